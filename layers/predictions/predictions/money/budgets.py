"""Budgets of owners and of the stack: dollars of a day and a month (UTC), reserved at a start and settled at its end.

A budget is set in an item that each start reads anyway: an owner's in its limits (`admission.quotas`), the stack's in
the limiter's (`admission.rate_limiter`). What is used of it is one item of each month, written only where there is a
budget. `usage#` without an owner is the stack's:

    usage#{owner}    budget#YYYY-MM              `month`, `d01` to `d31`: what is used, settled and reserved together;
                                                 `unknown`: the part of it that was settled at an unknown price;
                                                 `day_limit`, `month_limit`: the budget at the last reservation
    usage#{owner}    runs#{model}                `mean`: what recent runs of a model cost, each newer one counts a
                                                 fifth; for 40 days
    usage#{owner}    threshold#{period}#{percent}    that so much was used; its write becomes an event, once

A reservation is one transaction with the write that claims the prediction, or that stores it to be claimed later
(`Reservation.write_with`): the budget's condition is in that write, so that parallel starts never pass it, and a start
that crashes has reserved and written all or nothing. The prediction's item has the amount, and the day whose budget it
counts in. `store.settlements` puts the true cost in its place, in one transaction with a mark on the same item.

Amounts are micro-dollars.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.dynamodb import (
    NEW,
    Condition,
    ConditionFailed,
    IfNotExists,
    Key,
    PutWrite,
    Table,
    TransactionRefused,
    UpdateWrite,
)
from predictions.clock import rfc3339
from predictions.errors import BudgetReached
from predictions.money.cost import Run, assumed_cost
from predictions.money.stored import StackPrices
from predictions.observability import logger

STACK = ""
"""The owner of the stack's own budget: no owner has this name."""

UNKNOWN_PRICE_DEFAULT = 100_000
"""What a run at an unknown price counts where the operator has not said it: $0.10."""

BUDGET_LIMIT = 10**12
"""The highest budget, a million dollars."""

THRESHOLDS = (80, 100)
"""The percentages of a budget that are reported."""

KEPT_SECONDS = 100 * 86400
RUNS_KEPT_SECONDS = 40 * 86400
_MEAN_CACHE_SECONDS = 60
_REMEMBERED = 1000
# A newer run counts a fifth in the mean: after ten runs at another price nine tenths of it are the new one.
_WEIGHT = 5


@dataclass(frozen=True, slots=True)
class MoneyBudget:
    """A budget.

    Attributes:
        owner: The owner, or `STACK`.
        day: For a day, or None.
        month: For a month, or None.
        unknown_price: What a run counts whose price is unknown.
    """

    owner: str
    day: int | None = None
    month: int | None = None
    unknown_price: int = UNKNOWN_PRICE_DEFAULT

    def __bool__(self) -> bool:
        return self.day is not None or self.month is not None

    @property
    def name(self) -> str:
        """The budget as errors name it."""
        return f"the owner {self.owner}" if self.owner else "the stack"


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a prediction reserves in budgets.

    Attributes:
        micro_dollars: The estimate.
        unknown_price: What it counts if its cost stays unknown.
        day: The day whose budget, and whose month's, it counts in: `YYYY-MM-DD`.
        budgets: The budgets, one or two.
        at: When, in Unix seconds.
    """

    micro_dollars: int
    unknown_price: int
    day: str
    budgets: Sequence[MoneyBudget]
    at: float

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of the prediction's item."""
        return {
            "reserved_micro_dollars": self.micro_dollars,
            "reserved_unknown": self.unknown_price,
            "reserved_on": self.day,
            "reserved_in": "both" if len(self.budgets) > 1 else "owner" if self.budgets[0].owner else "stack",
        }

    def put(self, table: Table, key: Key, item: Mapping[str, Any], condition: Condition) -> None:
        """Put the item of a prediction and its reservation in one write; raises as `write_with`."""
        self.write_with(table, PutWrite(key, item, condition))

    def update(self, table: Table, key: Key, values: Mapping[str, Any], condition: Condition) -> None:
        """Set values of the item of a prediction and its reservation in one write; nothing if the condition fails.

        Raises:
            BudgetReached: A budget has no room.
        """
        unreserved = condition & Condition("attribute_not_exists(reserved_on)")
        with contextlib.suppress(ConditionFailed):
            self.write_with(table, UpdateWrite(key, set={**values, **self.attributes()}, condition=unreserved))

    def write_with(self, table: Table, write: PutWrite | UpdateWrite) -> None:
        """Write a prediction's item and the reservation, or neither.

        Twice, as after a lost response, the condition of the item decides: nothing is reserved twice.

        Args:
            table: The table.
            write: The write of the item, which has our `attributes`.

        Raises:
            ConditionFailed: That of the item.
            BudgetReached: A budget has no room.
        """
        for budget in self.budgets:
            self.check(budget, {})
        try:
            table.transact([write, *map(self._write, self.budgets)])
        except TransactionRefused as refused:
            if 0 in refused.items:
                raise ConditionFailed(refused.items[0]) from None
            for n, item in refused.items.items():
                self.check(self.budgets[n - 1], item or {}, is_full=True)
            raise

    def check(self, budget: MoneyBudget, item: Mapping[str, Any], *, is_full: bool = False) -> None:
        """Check that a budget has room, by what is used of it.

        Args:
            budget: The budget.
            item: What is used of it.
            is_full: Whether a write was refused by that item: the period that is nearer to its limit is named.

        Raises:
            BudgetReached: It has none.
        """
        periods = [
            (limit, int(item.get(name, 0)), period)
            for limit, name, period in ((budget.day, _day(self.day), "day"), (budget.month, "month", "month"))
            if limit is not None
        ]
        for limit, used, period in periods:
            if used + self.micro_dollars > limit:
                raise self._reached(budget, period, used, limit)
        if is_full:  # room has come back since
            limit, used, period = max(periods, key=lambda each: each[1] - each[0])
            raise self._reached(budget, period, used, limit)

    def _write(self, budget: MoneyBudget) -> UpdateWrite:
        names = {_day(self.day): budget.day, "month": budget.month}
        conditions = [
            Condition(f"attribute_not_exists({name}) OR {name} <= :{name}", **{name: limit - self.micro_dollars})
            for name, limit in names.items()
            if limit is not None
        ]
        room = conditions[0] if len(conditions) == 1 else conditions[0] & conditions[1]
        limits = {"day_limit": budget.day, "month_limit": budget.month}
        return UpdateWrite(
            used_key(budget.owner, self.day),
            set={
                **{name: limit for name, limit in limits.items() if limit is not None},
                "expires_at": int(self.at) + KEPT_SECONDS,
            },
            remove=[name for name, limit in limits.items() if limit is None],
            add=dict.fromkeys(names, self.micro_dollars),
            condition=room,
        )

    def _reached(self, budget: MoneyBudget, period: str, used: int, limit: int) -> BudgetReached:
        first = date.fromisoformat(self.day)
        following = first + timedelta(days=1)
        if period == "month":
            following = (first.replace(day=1) + timedelta(days=32)).replace(day=1)
        resets = datetime(following.year, following.month, following.day, tzinfo=UTC)
        of = self.day if period == "day" else self.day[:7]
        return BudgetReached(
            f"The budget of {budget.name} for the {period} {of} has no room: {dollars(used)} of {dollars(limit)} are"
            f" spent, or reserved for what runs, and this request is estimated at {dollars(self.micro_dollars)}."
            f" Nothing was started. Retry after {rfc3339(resets)}, when it resets.",
            max(1, int(resets.timestamp() - self.at) + 1),
        )


class Budgets:
    """What is used of budgets.

    Args:
        table: The table.
        prices: The prices of the stack.
    """

    def __init__(self, table: Table, prices: StackPrices) -> None:
        self._table = table
        self._prices = prices
        self._means: dict[tuple[str, str], tuple[float, int | None]] = {}
        self._reported: set[Key] = set()

    @classmethod
    def from_env(cls) -> "Budgets":
        """Create from `TABLE_NAME`."""
        table = Table.from_env()
        return cls(table, StackPrices(table))

    def plan(self, run: Run, name: str, owner: str, budgets: Sequence[MoneyBudget], now: float) -> Reservation:
        """Estimate a prediction, and check that its budgets have room; reserve nothing yet.

        The estimate is the mean of the owner's recent runs of the model; without one, what the price book says of an
        assumed run; without a price, the unknown price of the budget, the higher one of two.

        Args:
            run: The prediction, as far as the request describes it.
            name: What it runs, as `run_name` returns it.
            owner: Its owner.
            budgets: The budgets, at least one.
            now: The time.

        Raises:
            BudgetReached: One of them has no room.
        """
        unknown_price = max(budget.unknown_price for budget in budgets)
        estimate = self._mean(owner, name, now)
        if estimate is None and (book := self._prices.current(now)):
            estimate = assumed_cost(run, book)
        day = rfc3339(now)[:10]
        reservation = Reservation(unknown_price if estimate is None else estimate, unknown_price, day, budgets, now)
        used = self._table.read_items(used_key(budget.owner, day) for budget in budgets)
        for budget in budgets:
            item = used.get(used_key(budget.owner, day), {})
            after = {name: item.get(name, 0) + reservation.micro_dollars for name in (_day(day), "month")}
            try:
                reservation.check(budget, item)
            except BudgetReached:
                # Nothing more fits: to the operator that is all of it.
                self._report_quietly(budget.owner, day, _limits(budget), after, now)
                raise
            self._report_quietly(budget.owner, day, _limits(budget), after, now)
        return reservation

    def report(self, owner: str, day: str, now: float) -> None:
        """Record the thresholds that a budget has reached, by what is used of it now; each once.

        Twice does no harm: the first record of a threshold stays.
        """
        item = self._table.get_item(used_key(owner, day)) or {}
        self._report(owner, day, {each: item[each] for each in ("day_limit", "month_limit") if each in item}, item, now)

    def settle(
        self,
        mark: UpdateWrite,
        owners: Sequence[str],
        day: str,
        add: Mapping[str, int],
        run: tuple[str, str, int] | None,
        now: float,
    ) -> None:
        """Correct what budgets have of a prediction, in one transaction with the mark on its item that says so.

        Args:
            mark: The write of its item; its condition decides whether this has been done.
            owners: The owners of the budgets, `STACK` among them.
            day: The day that it was reserved in.
            add: What to add to `used` and to `unknown`.
            run: Whose run of what cost how much, for later estimates; None where that is not known.
            now: The time.

        Raises:
            TransactionRefused: The mark's condition did not hold: nothing was changed.
        """
        writes = [mark, *(self._correction(owner, day, add, now) for owner in owners)]
        if run is not None:
            writes.append(self._newer_mean(*run, now))
        self._table.transact(writes)

    def _correction(self, owner: str, day: str, add: Mapping[str, int], now: float) -> UpdateWrite:
        return UpdateWrite(
            used_key(owner, day),
            set={"expires_at": IfNotExists(int(now) + KEPT_SECONDS)},
            add={_day(day): add["used"], "month": add["used"], "unknown": add["unknown"]},
        )

    def _newer_mean(self, owner: str, name: str, cost: int, now: float) -> UpdateWrite:
        # Of two at once one is lost: a mean may be that wrong.
        key = _runs_key(owner, name)
        item = self._table.get_item(key, consistent=False)
        mean = cost if item is None else item["mean"] + round((cost - item["mean"]) / _WEIGHT)
        return UpdateWrite(key, set={"mean": mean, "expires_at": int(now) + RUNS_KEPT_SECONDS})

    def _mean(self, owner: str, name: str, now: float) -> int | None:
        until, mean = self._means.get((owner, name), (float("-inf"), None))
        if until <= now:
            item = self._table.get_item(_runs_key(owner, name), consistent=False)
            mean = item["mean"] if item and item["expires_at"] > now else None
            if len(self._means) >= _REMEMBERED:
                self._means.clear()
            self._means[owner, name] = now + _MEAN_CACHE_SECONDS, mean
        return mean

    def _report_quietly(
        self, owner: str, day: str, limits: Mapping[str, int], used: Mapping[str, int], now: float
    ) -> None:
        try:
            self._report(owner, day, limits, used, now)
        except (ClientError, BotoCoreError):
            logger.exception("threshold of a budget not recorded")  # the next start or settlement does it

    def _report(self, owner: str, day: str, limits: Mapping[str, int], used: Mapping[str, int], now: float) -> None:
        for name, limit in limits.items():
            period, amount = (day, used.get(_day(day), 0)) if name == "day_limit" else (day[:7], used.get("month", 0))
            for percent in THRESHOLDS:
                key = Key(f"usage#{owner}", f"{THRESHOLD}{period}#{percent}")
                if amount * 100 < limit * percent or key in self._reported:
                    continue
                values = {
                    "budget": "owner" if owner else "stack",
                    "period": "day" if name == "day_limit" else "month",
                    "of": period,
                    "percent": percent,
                    "used_micro_dollars": amount,
                    "limit_micro_dollars": limit,
                    "expires_at": int(now) + KEPT_SECONDS,
                }
                with contextlib.suppress(ConditionFailed):
                    self._table.put_item(key, values, NEW)
                if len(self._reported) >= _REMEMBERED:
                    self._reported.clear()
                self._reported.add(key)


THRESHOLD = "threshold#"


def budgets_of(
    owner: str, owners: tuple[int | None, int | None, int | None], stacks: tuple[int, int, int]
) -> list[MoneyBudget]:
    """Return the budgets that a prediction counts in.

    Args:
        owner: The owner.
        owners: Its budget of a day and a month, and its unknown price; None for what is not set.
        stacks: The same of the stack; 0 for what is not set.
    """
    found = []
    if owners[0] is not None or owners[1] is not None:
        found.append(
            MoneyBudget(owner, owners[0], owners[1], UNKNOWN_PRICE_DEFAULT if owners[2] is None else owners[2])
        )
    if stacks[0] or stacks[1]:
        found.append(MoneyBudget(STACK, stacks[0] or None, stacks[1] or None, stacks[2]))
    return found


def owners_in(owner: str, reserved_in: str) -> list[str]:
    """Return the owners of the budgets that a prediction has reserved in, from its item."""
    return {"owner": [owner], "stack": [STACK]}.get(reserved_in, [owner, STACK])


def run_name(object_: str, kind: str, name: str | None, version: str | None) -> str:
    """Name what a request runs, the same at its start and its end: recent runs of that are compared."""
    what = name or f"version:{version}"
    return f"{kind}:{what}" if kind == "deployment" else f"training:{what}" if object_ == "training" else what


def used_key(owner: str, day: str) -> Key:
    """Name what is used of a budget in the month of a day."""
    return Key(f"usage#{owner}", f"budget#{day[:7]}")


def used_in(item: Mapping[str, Any], day: str) -> Iterator[tuple[str, int]]:
    """Return what an item has as used in the day and in its month, by `day` and `month`."""
    yield "day", int(item.get(_day(day), 0))
    yield "month", int(item.get("month", 0))


def dollars(micro_dollars: int) -> str:
    """Write an amount: `$1.25`, with more decimals where it has them."""
    text = f"{micro_dollars / 1e6:.6f}".rstrip("0")
    whole, _, decimals = text.partition(".")
    return f"${whole}.{decimals:0<2}"


def _limits(budget: MoneyBudget) -> dict[str, int]:
    found = {"day_limit": budget.day, "month_limit": budget.month}
    return {name: limit for name, limit in found.items() if limit is not None}


def _day(day: str) -> str:
    return f"d{day[8:]}"


def _runs_key(owner: str, name: str) -> Key:
    return Key(f"usage#{owner}", f"runs#{name[:300]}")
