"""Quotas of owners: predictions in flight and per day, open batches and pipelines.

Limits are kept at `pk` = `owner#{owner}`, `sk` = `limits`; the authorizer reads them with the token, so that a create
over HTTP reads nothing more. An owner without limits costs nothing. What an owner uses of them is two items at `pk` =
`usage#{owner}`, and one each for what is open of batches and pipelines:

    in_flight           `ids`: a map of the predictions in flight, and when each began, in milliseconds since 1970
    open_batches        the same of batches that have not ended
    open_pipelines      the same of pipelines
    in_flight#{model}   the same as `in_flight`, of a model that has a limit of its own
    day#YYYY-MM-DD      `n`: how many predictions began on that day (UTC); `model_{hash}`: of them, those of a model

Limits of one model (`owner/name`, in lower case) are in the map `models` of the owner's limits. A model's name is part
of a key or a value, never of an expression.

A start acquires a slot in both by conditional writes, before anything else is written: two concurrent starts never get
the same slot. A finish does not release its slot: when the map is full, finished ones are looked up and removed, so
that a finish costs no write. A crash in between counts too much for two minutes, or a day, never too little.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from predictions.aws.clients import client
from predictions.aws.dynamodb import NEW, PRESENT, Condition, ConditionFailed, Key, Table
from predictions.clock import rfc3339
from predictions.errors import PredictionsError, Problem

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

IN_FLIGHT_MAX = 1000
"""The highest limit of predictions in flight: the map of them is one item, and each start is billed by its size."""

PER_DAY_MAX = 10_000_000

OPEN_MAX = 1000
"""The highest limit of open batches, and of open pipelines."""

OPEN_BATCHES_DEFAULT = 100
"""How many batches an owner with any limit may have open, where no limit of them is set."""

OPEN_PIPELINES_DEFAULT = 500
"""How many pipelines, likewise."""

MODELS_MAX = 50
"""How many models of an owner may have limits: the authorizer passes all of them on with each request."""

MODELS_CONTEXT_CHARACTERS = 4000
"""How long the limits of an owner's models may be as the authorizer's context. API Gateway takes 10,240 bytes of
headers and context. https://docs.aws.amazon.com/apigateway/latest/developerguide/limits.html"""

# A slot without a prediction is released after this time: a function may have crashed between the two writes.
_MISSING_MS = 120_000
# A process does not scan a full map again before this time.
_FULL_SECONDS = 2
_CACHE_SECONDS = 60
_RETRY_SECONDS = 10
_OPEN_RETRY_SECONDS = 60
_CHUNK = 50

# Tries of a change of a model's limits, while other calls change them.
_CHANGE_TRIES = 10

# Under this name the index `by_owner` lists the owners that have limits; no owner's name holds a `#`.
_LIST = "#limits"


Kind = Literal["batch", "pipeline"]


class LimitInvalid(PredictionsError):
    """A limit that cannot be set; the message says why."""


class LimitReached(PredictionsError):
    """An owner's limit is used up; nothing was written or started.

    Attributes:
        seconds: When to ask again; with the limit of a day, when the day is over.
    """

    def __init__(self, detail: str, seconds: int) -> None:
        super().__init__(detail)
        self.detail = detail
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class Slot:
    """The result of `acquire_slot`, for `release_slot`.

    Attributes:
        began: When it was added to those in flight, in milliseconds since 1970; None where it was not, or was before.
        day: The day it was counted in, as in the item's key; None where it was not counted.
        n: How many that day had then.
        model: The model whose limits apply to it; None for none.
        model_began: As `began`, in the model's map.
        model_n: How many of the model that day had then; 0 where they are not counted.
    """

    began: int | None = None
    day: str | None = None
    n: int = 0
    model: str | None = None
    model_began: int | None = None
    model_n: int = 0


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """An owner's limits of one model; None is no limit of that kind. They apply beside those of the owner.

    Attributes:
        in_flight: How many predictions and trainings of the model there may be at once.
        per_day: How many may be started in a day (UTC).
    """

    in_flight: int | None = None
    per_day: int | None = None

    def __bool__(self) -> bool:
        return self.in_flight is not None or self.per_day is not None


_NO_MODEL = ModelLimits()


@dataclass(frozen=True, slots=True)
class OwnerLimits:
    """The limits of one owner; None is no limit of that kind.

    Attributes:
        in_flight: How many predictions and trainings, started and not ended, there may be at once.
        per_day: How many may be started in a day (UTC).
        open_batches: How many batches that have not ended there may be at once.
        open_pipelines: How many pipelines, likewise.
        models: The limits of single models, by `owner/name` in lower case.
        budget_day: Its budget of a day in micro-dollars, beside its limits so that no start reads more (see
            `money.budgets`).
        budget_month: Its budget of a month.
        budget_unknown: What a run at an unknown price counts in them.
    """

    in_flight: int | None = None
    per_day: int | None = None
    open_batches: int | None = None
    open_pipelines: int | None = None
    budget_day: int | None = None
    budget_month: int | None = None
    budget_unknown: int | None = None
    models: Mapping[str, ModelLimits] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.models) or any(getattr(self, name) is not None for name in LIMIT_NAMES)

    def context(self) -> dict[str, str]:
        """Return the limits as the authorizer's context; API Gateway takes texts."""
        found = {f"{name}_limit": getattr(self, name) for name in (*LIMIT_NAMES, *BUDGET_NAMES)}
        texts = {name: str(limit) for name, limit in found.items() if limit is not None}
        return texts | ({"models_limit": _models_text(self.models)} if self.models else {})

    @classmethod
    def of_context(cls, context: Mapping[str, Any]) -> "OwnerLimits":
        """Read what `context` returned."""
        found = {name: context.get(f"{name}_limit") for name in (*LIMIT_NAMES, *BUDGET_NAMES)}
        models = _models_of_text(context.get("models_limit") or "")
        return cls(**{name: int(limit) for name, limit in found.items() if limit}, models=models)

    def open_allowed(self, kind: Kind) -> int | None:
        """Return how many batches or pipelines may be open, or None without any limit."""
        if not self:
            return None
        given = self.open_batches if kind == "batch" else self.open_pipelines
        default = OPEN_BATCHES_DEFAULT if kind == "batch" else OPEN_PIPELINES_DEFAULT
        return default if given is None else given


def _models_text(models: Mapping[str, ModelLimits]) -> str:
    """Return limits of models as one text: `owner/name:5:1000`, an absent limit empty, separated by commas."""

    def text(limit: int | None) -> str:
        return "" if limit is None else str(limit)

    return ",".join(f"{name}:{text(each.in_flight)}:{text(each.per_day)}" for name, each in models.items())


def _models_of_text(text: str) -> dict[str, ModelLimits]:
    parts = (each.split(":") for each in text.split(",") if each)
    return {name: ModelLimits(*(int(limit) if limit else None for limit in limits)) for name, *limits in parts}


LIMIT_NAMES = ("in_flight", "per_day", "open_batches", "open_pipelines")
"""The limits, by their attributes."""

BUDGET_NAMES = ("budget_day", "budget_month", "budget_unknown")
"""The owner's budget, likewise; an owner with a budget alone has no limits."""

_MODEL_LIMIT_NAMES = ("in_flight", "per_day")


class _Slots(NamedTuple):
    """A map of slots: the item, and the error for a full one.

    Attributes:
        sk: The map's item.
        prefix: Of the `pk` of what has a slot.
        full: What is said where all slots are taken.
        retry_seconds: When to ask again then.
    """

    sk: str
    prefix: str
    full: str
    retry_seconds: int


_IN_FLIGHT = _Slots(
    "in_flight",
    "prediction#",
    "Owner {owner} has reached its limit of {limit} predictions in flight. Retry when one of them finishes.",
    _RETRY_SECONDS,
)
_OPEN: Mapping[Kind, _Slots] = {
    "batch": _Slots(
        "open_batches",
        "batch#",
        "Owner {owner} has reached its limit of {limit} open batches. Retry when one of them completes, or cancel one.",
        _OPEN_RETRY_SECONDS,
    ),
    "pipeline": _Slots(
        "open_pipelines",
        "pipeline#",
        "Owner {owner} has reached its limit of {limit} open pipelines. Retry when one of them completes, or cancel"
        " one.",
        _OPEN_RETRY_SECONDS,
    ),
}


def _in_flight_of(model: str) -> _Slots:
    return _Slots(
        f"in_flight#{model}",
        "prediction#",
        f"Owner {{owner}} has reached its limit of {{limit}} predictions of {model} in flight. Retry when one of them"
        " finishes, or use another model.",
        _RETRY_SECONDS,
    )


def refusal_of(reached: LimitReached) -> Problem:
    """Return the response for a caller whose owner has used a limit up."""
    return Problem(429, reached.detail, headers={"Retry-After": str(reached.seconds)})


class OwnersLimits:
    """The limits that owners have."""

    def __init__(self, table_name: str, dynamodb: "DynamoDBClient") -> None:
        self._table = Table(table_name, dynamodb)

    @classmethod
    def from_env(cls) -> "OwnersLimits":
        """Create from `TABLE_NAME`."""
        return cls(os.environ["TABLE_NAME"], client("dynamodb"))

    def limits_of(self, owner: str) -> OwnerLimits:
        """Return an owner's limits, read consistently."""
        return _limits_of(self._table.get_item(_limits_key(owner)) or {})

    def set_limits(self, owner: str, limits: OwnerLimits) -> OwnerLimits:
        """Set the given limits of an owner; limits that are not given stay as they are.

        One update of these attributes alone: a concurrent call that sets another limit loses nothing.

        Returns:
            All limits of the owner after it.

        Raises:
            LimitInvalid: Nothing was written.
        """
        if not limits:
            given_by = ", ".join(f"--{name.replace('_', '-')}" for name in LIMIT_NAMES)
            raise LimitInvalid(f"Give at least one of {given_by}; `limits remove` takes limits away.")
        changed: dict[str, Any] = {"owner": _LIST, "listed_at": owner}
        for name, most in zip(LIMIT_NAMES, (IN_FLIGHT_MAX, PER_DAY_MAX, OPEN_MAX, OPEN_MAX), strict=True):
            limit = getattr(limits, name)
            if limit is None:
                continue
            if not 0 <= limit <= most:
                raise LimitInvalid(f"--{name.replace('_', '-')} must be 0 to {most} (got {limit}).")
            changed[name] = limit
        return _limits_of(self._table.update_item(_limits_key(owner), set=changed))

    def set_model_limits(self, owner: str, model: str, limits: ModelLimits) -> OwnerLimits:
        """Set the given limits of one model for an owner; all others stay as they are.

        Returns:
            All limits of the owner after it.

        Raises:
            LimitInvalid: Nothing was written.
        """
        if not limits:
            raise LimitInvalid("Give at least one of --in-flight, --per-day; `limits remove` takes limits away.")
        changed: dict[str, int] = {}
        for name, most in zip(_MODEL_LIMIT_NAMES, (IN_FLIGHT_MAX, PER_DAY_MAX), strict=True):
            limit = getattr(limits, name)
            if limit is None:
                continue
            if not 0 <= limit <= most:
                raise LimitInvalid(f"--{name.replace('_', '-')} must be 0 to {most} (got {limit}).")
            changed[name] = limit
        return self._change_model(owner, model, lambda before: before | changed)

    def remove_model_limits(self, owner: str, model: str, names: Collection[str] = ()) -> OwnerLimits:
        """Remove limits of one model for an owner: the named ones, or both. Idempotent.

        Returns:
            The limits that are left.
        """
        gone = names or _MODEL_LIMIT_NAMES
        left = self._change_model(
            owner, model, lambda before: {name: limit for name, limit in before.items() if name not in gone}
        )
        # An item without a limit would stay listed.
        return left or self.remove_limits(owner, ("models",))

    def _change_model(self, owner: str, model: str, change: Callable[[dict[str, int]], dict[str, int]]) -> OwnerLimits:
        """Change a model's limits on condition that no other call has changed those of any model meanwhile."""
        key, model = _limits_key(owner), model.lower()
        for _ in range(_CHANGE_TRIES):
            item = self._table.get_item(key) or {}
            before: dict[str, dict[str, int]] = item.get("models", {})
            after = {name: limits for name, limits in before.items() if name != model}
            if limits := change(before.get(model, {})):
                after[model] = limits
            if after == before:
                return _limits_of(item)
            if len(after) > max(MODELS_MAX, len(before)):
                raise LimitInvalid(f"An owner may have limits of {MODELS_MAX} models at most: remove one first.")
            whole = _limits_of({"models": after})
            if len(after) > len(before) and len(_models_text(whole.models)) > MODELS_CONTEXT_CHARACTERS:
                raise LimitInvalid(
                    f"The limits of an owner's models may have {MODELS_CONTEXT_CHARACTERS} characters in all, names"
                    f" included (got {len(_models_text(whole.models))}): remove one first."
                )
            unchanged = Condition("models = :before", before=before)
            try:
                written = self._table.update_item(
                    key,
                    set={"owner": _LIST, "listed_at": owner} | ({"models": after} if after else {}),
                    remove=() if after else ("models",),
                    condition=unchanged if before else Condition("attribute_not_exists(models)"),
                )
            except ConditionFailed:
                continue
            return _limits_of(written)
        raise LimitInvalid(f"The limits of {owner} are being changed by others: try again.")

    def remove_limits(self, owner: str, names: Collection[str] = ()) -> OwnerLimits:
        """Remove limits of an owner. Idempotent.

        Args:
            owner: The owner.
            names: The limits to remove, of `LIMIT_NAMES`; none for all of them.

        Returns:
            The limits that are left.
        """
        key = _limits_key(owner)
        with contextlib.suppress(ConditionFailed):
            left = _limits_of(self._table.update_item(key, remove=names or (*LIMIT_NAMES, "models"), condition=PRESENT))
            if left:
                return left
        # If the function crashes before this, the item without a limit counts as no item.
        nothing = " AND ".join(f"attribute_not_exists({name})" for name in (*LIMIT_NAMES, *BUDGET_NAMES, "models"))
        try:
            self._table.delete_item(key, Condition(nothing))
        except ConditionFailed:  # another call has just set one, or the owner has a budget
            return self.limits_of(owner)
        return OwnerLimits()

    def list_limits(self) -> Iterator[tuple[str, OwnerLimits]]:
        """List the owners that have limits, by name, as the index has them."""
        return ((owner, limits) for owner, limits in self._listed() if limits)

    def set_budget(self, owner: str, values: Mapping[str, int]) -> OwnerLimits:
        """Set the given parts of an owner's budget, of `BUDGET_NAMES`; return it with the owner's limits."""
        listed = {"owner": _LIST, "listed_at": owner}
        return _limits_of(self._table.update_item(_limits_key(owner), set={**listed, **values}))

    def list_budgets(self) -> Iterator[tuple[str, OwnerLimits]]:
        """List the owners that have a budget, by name, as the index has them."""
        for owner, limits in self._listed():
            if limits.budget_day is not None or limits.budget_month is not None:
                yield owner, limits

    def _listed(self) -> Iterator[tuple[str, OwnerLimits]]:
        for item in self._table.query(Condition("owner = :list", list=_LIST), index="by_owner"):
            yield item["listed_at"], self.limits_of(item["listed_at"])


class OwnersUsage:
    """The usage of owners' limits."""

    def __init__(self, table_name: str, dynamodb: "DynamoDBClient", *, now: Callable[[], float] = time.time) -> None:
        self._table = Table(table_name, dynamodb)
        self._now = now
        self._limits = OwnersLimits(table_name, dynamodb)
        self._known: dict[str, tuple[float, OwnerLimits]] = {}
        self._full: dict[tuple[str, str], float] = {}

    @classmethod
    def from_env(cls) -> "OwnersUsage":
        """Create from `TABLE_NAME`."""
        return cls(os.environ["TABLE_NAME"], client("dynamodb"))

    def known_limits(self, owner: str) -> OwnerLimits:
        """Return an owner's limits, up to a minute old, for sources without authorizer."""
        known = self._known.get(owner)
        if known is None or known[0] <= self._now():
            if len(self._known) >= 1000:
                self._known.clear()
            known = self._known[owner] = (self._now() + _CACHE_SECONDS, self._limits.limits_of(owner))
        return known[1]

    def acquire_slot(self, owner: str, prediction_id: str, limits: OwnerLimits, model: str | None = None) -> Slot:
        """Acquire a slot in flight, and one of the day, for a prediction about to start.

        Where its model has limits of its own, it acquires the same in those, first: a prediction that waits for its
        model takes no slot that one of another model could use. Twice, it has one slot in flight, and two of the day.

        Args:
            owner: The owner.
            prediction_id: The prediction.
            limits: The owner's limits.
            model: Its model, `owner/name`, if it is known.

        Returns:
            The slot.

        Raises:
            LimitReached: One of the limits is used up.
        """
        began = round(self._now() * 1000)
        named = (model or "").lower()
        of_model = limits.models.get(named, _NO_MODEL)
        slot = Slot(model=named if of_model else None)
        if of_model.in_flight is not None and self._add(
            _in_flight_of(named), owner, prediction_id, of_model.in_flight, began
        ):
            slot = replace(slot, model_began=began)
        try:
            if limits.in_flight is not None and self._add(_IN_FLIGHT, owner, prediction_id, limits.in_flight, began):
                slot = replace(slot, began=began)
            return self._count_in_day(owner, limits.per_day, of_model.per_day, slot)
        except LimitReached:
            self._release_in_flight(owner, prediction_id, slot)
            raise

    def _release_in_flight(self, owner: str, prediction_id: str, slot: Slot) -> None:
        if slot.began is not None:
            self._release(_IN_FLIGHT, owner, {prediction_id: slot.began})
        if slot.model and slot.model_began is not None:
            self._release(_in_flight_of(slot.model), owner, {prediction_id: slot.model_began})

    def release_slot(self, owner: str, prediction_id: str, slot: Slot) -> None:
        """Release what `acquire_slot` took, for a prediction that is not started.

        A count of the day is given back only while it is the latest one: where another was counted meanwhile, or this
        write was made before and its response lost, the day stays as it is. So it may count too much, never too little.
        """
        self._release_in_flight(owner, prediction_id, slot)
        if slot.day is None:
            return
        latest = Condition("n = :n", n=slot.n)
        not_yet = Condition("attribute_not_exists(given_back) OR given_back <> :id", id=prediction_id)
        # Each count of a model counts in `n` too, so that the model's is the latest one if `n` is.
        of_model = {_day_attribute(slot.model): slot.model_n - 1} if slot.model and slot.model_n else {}
        with contextlib.suppress(ConditionFailed):
            self._table.update_item(
                _usage_key(owner, f"day#{slot.day}"),
                set={"n": slot.n - 1, "given_back": prediction_id, **of_model},
                condition=latest & not_yet,
            )

    def check_day(self, owner: str, limits: OwnerLimits) -> None:
        """Check that an owner's limit of the day is not used up, without using any of it.

        Raises:
            LimitReached: The limit is used up.
        """
        if limits.per_day is None:
            return
        now = self._now()
        if (self._table.get_item(_usage_key(owner, _day_sk(now))) or {}).get("n", 0) >= limits.per_day:
            raise _day_is_full(owner, limits.per_day, now)

    def acquire_open_slot(self, kind: Kind, owner: str, id_: str, limits: OwnerLimits) -> int | None:
        """Acquire a slot among an owner's open batches or pipelines.

        Twice, it has one slot. An owner without limits needs none, and no call is made.

        Returns:
            When the slot was taken, as `release_open_slot` wants it; None if no slot was taken by this call.

        Raises:
            LimitReached: No slot is free.
        """
        limit = limits.open_allowed(kind)
        if limit is None:
            return None
        began = round(self._now() * 1000)
        return began if self._add(_OPEN[kind], owner, id_, limit, began) else None

    def release_open_slot(self, kind: Kind, owner: str, id_: str, began: int | None) -> None:
        """Release a slot of `acquire_open_slot` after the request was refused."""
        if began is not None:
            self._release(_OPEN[kind], owner, {id_: began})

    def _add(self, slots: _Slots, owner: str, id_: str, limit: int, began: int) -> bool:
        """Acquire a slot; return whether it is a new one."""
        for attempt in ("as it is", "looked through"):
            if limit > 0 and (before := self._try_to_add(slots, owner, id_, limit, began)) is not None:
                return before == 0
            if attempt == "looked through" or self._full.get((owner, slots.sk), 0) > self._now():
                break
            if limit == 0 or self._release_finished(slots, owner) >= limit:
                self._full[owner, slots.sk] = self._now() + _FULL_SECONDS
                break
        raise LimitReached(slots.full.format(owner=owner, limit=limit), slots.retry_seconds)

    def _try_to_add(self, slots: _Slots, owner: str, id_: str, limit: int, began: int) -> int | None:
        """Return when it was added before (0 if never), or None if no slot is free."""
        key, slot = _usage_key(owner, slots.sk), f"ids.{id_}"
        has_room = Condition(f"size(ids) < :limit OR attribute_exists({slot})", limit=limit)
        try:
            before = self._table.update_item(
                key,
                set={slot: began},
                condition=Condition("attribute_exists(ids)") & has_room,
                returns="UPDATED_OLD",
            )
        except ConditionFailed as failed:
            if failed.item:
                return None
        else:
            return int(before.get("ids", {}).get(id_, 0))
        try:
            self._table.put_item(key, {"ids": {id_: began}}, NEW)
        except ConditionFailed:
            # Another writer has just created it, or this write has and its response was lost.
            return self._try_to_add(slots, owner, id_, limit, began)
        return 0

    def _release_finished(self, slots: _Slots, owner: str) -> int:
        """Release the slots of what has finished, or was never created.

        Returns:
            How many are left, as far as is known: others may release or acquire slots meanwhile.
        """
        taken: Mapping[str, int] = (self._table.get_item(_usage_key(owner, slots.sk)) or {}).get("ids", {})
        statuses = self._table.read_items((f"{slots.prefix}{id_}", "status") for id_ in taken)
        long_ago = self._now() * 1000 - _MISSING_MS
        gone: dict[str, int] = {}
        for id_, began in taken.items():
            status = statuses.get((f"{slots.prefix}{id_}", "status"))
            if _is_finished(status) if status else began < long_ago:
                gone[id_] = began
        ids = list(gone)
        chunks = [{each: gone[each] for each in ids[n : n + _CHUNK]} for n in range(0, len(ids), _CHUNK)]
        for chunk in chunks:
            self._release(slots, owner, chunk)
        return len(taken) - len(gone)

    def _release(self, slots: _Slots, owner: str, taken: Mapping[str, int]) -> None:
        """Release slots, unless one of them was acquired again meanwhile."""
        unchanged = Condition(
            " AND ".join(f"ids.{id_} = :p{n}" for n, id_ in enumerate(taken)),
            **{f"p{n}": began for n, began in enumerate(taken.values())},
        )
        with contextlib.suppress(ConditionFailed):
            self._table.update_item(
                _usage_key(owner, slots.sk), remove=[f"ids.{id_}" for id_ in taken], condition=unchanged
            )

    def _count_in_day(self, owner: str, limit: int | None, model_limit: int | None, slot: Slot) -> Slot:
        """Acquire a slot of the day, in the owner's limit and in its model's, by one write.

        Raises:
            LimitReached: One of them is used up; nothing was counted.
        """
        if limit is None and model_limit is None:
            return slot
        now = self._now()  # the day that is full must be the one whose end the error names
        day = rfc3339(now)[:10]
        model = slot.model or ""
        of_model = _day_attribute(model)
        if limit == 0:
            raise _day_is_full(owner, limit, now)
        if model_limit == 0:
            raise _day_is_full(owner, model_limit, now, model)
        rooms = []
        if limit is not None:
            rooms.append(Condition("attribute_not_exists(n) OR n < :limit", limit=limit))
        if model_limit is not None:
            free = f"attribute_not_exists({of_model}) OR {of_model} < :model_limit"
            rooms.append(Condition(free, model_limit=model_limit))
        try:
            counted = self._table.update_item(
                _usage_key(owner, f"day#{day}"),
                add={"n": 1} if model_limit is None else {"n": 1, of_model: 1},
                set={"expires_at": int(now) + 2 * 86400},
                condition=rooms[0] if len(rooms) == 1 else rooms[0] & rooms[1],
            )
        except ConditionFailed as failed:
            if limit is not None and (failed.item or {}).get("n", 0) >= limit:
                raise _day_is_full(owner, limit, now) from None
            raise _day_is_full(owner, model_limit or 0, now, model) from None
        return replace(slot, day=day, n=int(counted["n"]), model_n=int(counted[of_model]) if model_limit else 0)


def _is_finished(status: Mapping[str, Any]) -> bool:
    """Return whether a prediction, batch or pipeline has finished, by its status item."""
    from predictions.status import TERMINAL_RANK

    return bool(status["rank"] >= TERMINAL_RANK) if "rank" in status else "open" not in status


def _day_attribute(model: str) -> str:
    """Return the attribute that counts a model in a day's item: 64 bits of the hash, since names have `/` and `.`."""
    return f"model_{hashlib.sha256(model.encode()).hexdigest()[:16]}"


def _day_is_full(owner: str, limit: int, now: float, model: str = "") -> LimitReached:
    midnight = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    of_model = f" of {model}" if model else ""
    return LimitReached(
        f"Owner {owner} has reached its limit of {limit} predictions{of_model} per day. Retry after"
        f" {rfc3339(midnight)}{', or use another model' if model else ''}.",
        int(midnight.timestamp() - now) + 1,
    )


def _day_sk(now: float) -> str:
    return f"day#{rfc3339(now)[:10]}"


def _limits_of(item: Mapping[str, Any]) -> OwnerLimits:
    models = {
        model: ModelLimits(**{name: limits[name] for name in _MODEL_LIMIT_NAMES if name in limits})
        for model, limits in item.get("models", {}).items()
    }
    return OwnerLimits(**{name: item[name] for name in (*LIMIT_NAMES, *BUDGET_NAMES) if name in item}, models=models)


def _limits_key(owner: str) -> Key:
    return Key(f"owner#{owner}", "limits")


def _usage_key(owner: str, sk: str) -> Key:
    return Key(f"usage#{owner}", sk)
