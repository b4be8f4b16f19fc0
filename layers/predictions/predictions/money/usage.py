"""Usage counters: what owners ran and what it cost, by day, model and label, counted exactly once.

    usage_month#{YYYY-MM}    {owner}#{YYYY-MM-DD}#model#{model}    counters of one model; `model` is empty if unknown
    usage_month#{YYYY-MM}    {owner}#{YYYY-MM-DD}#label#{label}    counters of one label, `key=value` or `other`
    usage_labels#{YYYY-MM}   {owner}                               hashes of the month's first 1,000 labels
    usage_seen#{second}      seen                                  what the records of one second have added

Lambda passes stream records at least once, in batches that may be split differently each time, and tells no shard. So
no checkpoint can say what was counted. Instead the transaction that adds a batch to the counters also adds a token of
each record to the set of the second in which the change was made, on the condition that it is not there. That second
is part of the record, so a redelivery finds the same set. A crash before the transaction repeats the batch, one after
it skips it. Sets expire after 40 days: longer than the day of the stream, and the two weeks of the dead-letter queue.

Each item stays below 1 KB but the set, which has 30 bytes for each completion of its second. A transaction costs two
units for each KB: four for a batch of one owner and model, whether it has one prediction or, in one second, 34.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from predictions.aws.dynamodb import (
    Condition,
    ConditionFailed,
    IfNotExists,
    Key,
    Table,
    TransactionRefused,
    UpdateWrite,
)
from predictions.errors import PredictionsError
from predictions.money.cost import METRIC_LIMIT

KEPT_DAYS = 427
"""How long counters are kept: 13 months after their own."""

SEEN_DAYS = 40
LABELS_LIMIT = 1000
OTHER = "other"
ENDS = ("succeeded", "failed", "canceled", "aborted")

_DAY_SECONDS = 24 * 3600
# https://docs.aws.amazon.com/amazondynamodb/latest/APIReference/API_TransactWriteItems.html
_ACTIONS_LIMIT = 100
_TRIES = 4


class UsageBusy(PredictionsError):
    """Other batches wrote the same counters at the same time; nothing was written."""


@dataclass(frozen=True)
class Counted:
    """What one record of the stream adds.

    Attributes:
        token: Names the change of the prediction: its end, or its later price.
        second: When the change was made, as the record says.
        owner: The owner.
        day: The day of completion in UTC.
        model: The model, or empty if it is unknown.
        labels: The labels, `key=value`.
        amounts: What is added, by counter.
    """

    token: str
    second: int
    owner: str
    day: date
    model: str
    labels: tuple[str, ...]
    amounts: Mapping[str, int]


def counted(after: Mapping[str, Any], before: Mapping[str, Any], at: float, owner: str, model: str) -> Counted | None:
    """Return what a change of a visibly ended prediction adds, or None.

    Args:
        after: The status item after the change.
        before: Before it, at least `visible` and the cost; empty for a new item.
        at: When the change was made.
        owner: The owner.
        model: The model, or empty if it is unknown.
    """
    ended_now = after["visible"] != before.get("visible")
    cost, known_before = after.get("cost_micro_dollars"), before.get("cost_micro_dollars") is not None
    if ended_now:
        amounts = {"cached" if "cached_from" in after else str(after["status"]): 1}
        amounts |= {"predict_ms": _predict_ms(after.get("metrics"))}
        amounts |= {"cost_unknown": 1} if cost is None else {"cost_micro_dollars": cost}
    elif cost is not None and not known_before:  # priced later
        amounts = {"cost_micro_dollars": cost, "cost_unknown": -1}
    else:
        return None
    day = datetime.fromtimestamp(after.get("ended") or at, UTC).date()
    token = f"{after['pk'].partition('#')[2]}{'' if ended_now else '#price'}"
    labels = tuple(f"{key}={value}" for key, value in sorted((after.get("labels") or {}).items()))
    return Counted(token, int(at), owner, day, model, labels, {name: n for name, n in amounts.items() if n})


class UsageCounters:
    """The counters.

    Args:
        table: The table.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._labels: dict[tuple[str, str], set[str]] = {}

    def add(self, changes: Sequence[Counted]) -> None:
        """Add changes that are not counted yet, in transactions of at most 100 writes.

        Raises:
            UsageBusy: Some were not added. Repeat the call: those that were are skipped.
        """
        waiting: list[Counted] = list({change.token: change for change in changes}.values())
        while waiting:
            some = waiting[: _ACTIONS_LIMIT - 2]
            while len(self._updates(some)) > _ACTIONS_LIMIT:  # one has at most 12
                some = some[: len(some) // 2]
            self._add_once(some)
            waiting = waiting[len(some) :]

    def _add_once(self, changes: Sequence[Counted]) -> None:
        for _ in range(_TRIES):
            if not changes:
                return
            try:
                self._table.transact(self._updates(changes))
                return
            except TransactionRefused as refused:
                seen = {token for item in refused.items.values() if item for token in item["tokens"]}
                changes = [change for change in changes if change.token not in seen]
        if changes:
            raise UsageBusy("the counters of usage are written by others")

    def _updates(self, changes: Sequence[Counted]) -> list[UpdateWrite]:
        seen: dict[int, set[str]] = {}
        sums: dict[tuple[Key, date], Counter[str]] = {}
        for change in changes:
            seen.setdefault(change.second, set()).add(change.token)
            month, place = f"{change.day:%Y-%m}", f"{change.owner}#{change.day}"
            parts = [f"model#{change.model}"]
            parts += sorted({f"label#{self._label(month, change.owner, label)}" for label in change.labels})
            for part in parts:
                key = Key(f"usage_month#{month}", f"{place}#{part}")
                sums.setdefault((key, change.day), Counter()).update(change.amounts)
        updates: list[UpdateWrite] = []
        for second, tokens in seen.items():
            names = {f"t{n}": token for n, token in enumerate(sorted(tokens))}
            absent = Condition(" AND ".join(f"NOT contains(tokens, :{name})" for name in names), **names)
            expires = {"expires_at": second + SEEN_DAYS * _DAY_SECONDS}
            updates.append(
                UpdateWrite(Key(f"usage_seen#{second}", "seen"), expires, add={"tokens": tokens}, condition=absent)
            )
        for (key, day), amounts in sums.items():
            midnight = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())
            kept = {"expires_at": IfNotExists(midnight + KEPT_DAYS * _DAY_SECONDS)}
            updates.append(UpdateWrite(key, kept, add={name: n for name, n in amounts.items() if n}))
        return updates

    def _label(self, month: str, owner: str, label: str) -> str:
        """Return the label, or `other` if the month has 1,000 others: once full, it stays so, and so does the answer.

        Reserved before it is counted: after a crash in between the redelivered record finds its own reservation.
        """
        key = Key(f"usage_labels#{month}", owner)
        hashed = hashlib.sha256(label.encode()).hexdigest()[:16]
        known = self._labels.setdefault((month, owner), set())
        if hashed in known:
            return label
        if len(known) < LABELS_LIMIT:
            first = datetime.fromisoformat(f"{month}-01").replace(tzinfo=UTC)
            try:
                item = self._table.update_item(
                    key,
                    set={"expires_at": int(first.timestamp()) + KEPT_DAYS * _DAY_SECONDS},
                    add={"hashes": {hashed}},
                    condition=Condition(
                        "attribute_not_exists(hashes) OR contains(hashes, :hashed) OR size(hashes) < :most",
                        hashed=hashed,
                        most=LABELS_LIMIT,
                    ),
                )
            except ConditionFailed as full:
                item = full.item or {}
            known |= item.get("hashes", set())
        return label if hashed in known else OTHER


def read_usage(table: Table, first: date, last: date, owner: str | None, by: Sequence[str]) -> list[dict[str, Any]]:
    """Return the sums of the days from `first` to `last`, in order of their groups.

    Args:
        table: The table.
        first: The first day, in UTC.
        last: The last day.
        owner: Only this owner, or None for all.
        by: `owner`, `day`, and `model` or `label`: what a row is for.
    """
    kind = "label" if "label" in by else "model"
    groups: dict[tuple[str, ...], Counter[str]] = {}
    for item in _items(table, first, last, owner):
        of, day, what, value = item["sk"].split("#", 3)
        if what != kind or not first.isoformat() <= day <= last.isoformat():
            continue
        facts = {"owner": of, "day": day, what: value}
        numbers = {name: n for name, n in item.items() if name not in ("pk", "sk", "expires_at")}
        groups.setdefault(tuple(facts[name] for name in by), Counter()).update(numbers)
    return [{**dict(zip(by, group, strict=True)), **_shown(groups[group])} for group in sorted(groups)]


def _items(table: Table, first: date, last: date, owner: str | None) -> Iterator[Mapping[str, Any]]:
    month = first.replace(day=1)
    while month <= last:
        pk = f"usage_month#{month:%Y-%m}"
        if owner is None:
            yield from table.query(Condition("pk = :pk", pk=pk), consistent=False)
        else:  # no owner's name holds a `#`
            own = Condition("pk = :pk AND begins_with(sk, :own)", pk=pk, own=f"{owner}#")
            yield from table.query(own, consistent=False)
        month = (month + timedelta(days=31)).replace(day=1)


def _shown(sums: Mapping[str, int]) -> dict[str, Any]:
    ends = {end: sums.get(end, 0) for end in (*ENDS, "cached")}
    unknown = max(sums.get("cost_unknown", 0), 0)
    # Without any known cost the sum is unknown, not 0.
    cost = sums.get("cost_micro_dollars", 0) if sum(ends.values()) > unknown or not unknown else None
    seconds = sums.get("predict_ms", 0) / 1000
    return {"predictions": ends, "predict_seconds": seconds, "cost_micro_dollars": cost, "cost_unknown": unknown}


def _predict_ms(metrics: Mapping[str, Any] | None) -> int:
    """Return the seconds that a prediction ran, in milliseconds; 0 for what cannot be: models set their own metrics."""
    seconds = (metrics or {}).get("predict_time")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return 0
    return round(seconds * 1000) if 0 <= seconds <= METRIC_LIMIT else 0
