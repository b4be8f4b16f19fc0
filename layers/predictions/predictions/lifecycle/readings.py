"""Readings of Replicate's list: a lease, a budget of calls, and a control group.

The holder of the lease (`pk` = `readings`, `sk` = `lease`) reads the list once for all that is registered. The lease's
item also holds the budget of list calls: at most 60 in any minute, however many predictions wait. A lease only saves
work: each write that follows from a reading is conditional on the claim that was read.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from predictions.aws.dynamodb import Condition, ConditionFailed, Table
from predictions.observability import logger
from predictions.store.keys import READING_LEASE
from predictions.store.predictions import PredictionsTable
from predictions.upstream.client import Collection
from predictions.upstream.list_reader import ListReader, Reading

_READING_SECONDS = 25
_LEASE_SECONDS = 55

CALLS_PER_MINUTE = 40
CALLS_AT_ONCE = 19
"""Together fewer than 60 list calls in any minute."""

_CONTROLS = 20
# Parts of the index that are searched for controls: most open items of a busy stack wait for other things.
_CONTROL_PAGES = 5
_CONTROL_PAGE_ITEMS = 100
# A bound prediction is due again this long after its first poll.
_DUE_AFTER_POLL_SECONDS = 120
# At the edge of what was read, the clocks decide whether an entry is shown.
_CONTROL_MARGIN_SECONDS = 5


class Readings:
    """Read Replicate's list as the holder of the lease.

    Args:
        reader: Reads the pages.
        grace: How late the list may be, in seconds.
        first_poll: Seconds to the first poll of a bound prediction.
    """

    def __init__(
        self,
        table: PredictionsTable,
        reader: ListReader,
        items: Table,
        *,
        grace: int,
        first_poll: int,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._table = table
        self._reader = reader
        self._items = items
        self._grace = grace
        self._first_poll = first_poll
        self._now = now
        self._sleep = sleep
        # Of the lease that this function holds.
        self._budget = Budget(0, now, sleep)
        self._until = 0

    @classmethod
    def from_env(cls, table: PredictionsTable, reader: ListReader) -> "Readings":
        """Read `TABLE_NAME`, `SUBMIT_GRACE_SECONDS` and `FIRST_POLL_SECONDS`."""
        return cls(
            table,
            reader,
            Table.from_env(),
            grace=int(os.environ["SUBMIT_GRACE_SECONDS"]),
            first_poll=int(os.environ["FIRST_POLL_SECONDS"]),
        )

    def lease(self) -> dict[str, Any]:
        """Return the item of the lease, empty before its first holder."""
        return self._items.get_item(READING_LEASE) or {}

    def acquire(self, lease: Mapping[str, Any], now: float) -> bool:
        """Acquire the lease. Return False if another function holds it.

        The budget is written as used up until the lease ends: a crash of this function never exceeds it.
        """
        if lease.get("until", 0) > now:
            return False
        self._budget = Budget(float(lease.get("used_ms", 0)) / 1000, self._now, self._sleep)
        until = int(now) + _LEASE_SECONDS
        try:
            self._items.update_item(
                READING_LEASE,
                set={"until": until, "used_ms": int((until + Budget.burst_seconds) * 1000)},
                condition=Condition("attribute_not_exists(until) OR until <= :now", now=int(now)),
            )
        except ConditionFailed:
            return False
        self._until = until
        return True

    def release(self, last: Mapping[str, Any]) -> None:
        """Release the lease, with what the readings have seen by collection."""
        try:
            self._items.update_item(
                READING_LEASE,
                set={"used_ms": int(self._budget.used_until * 1000), "last_json": json.dumps(last)},
                remove=["until"],
                condition=Condition("until = :until", until=self._until),
            )
        except ConditionFailed:
            logger.warning("the lease on reading the list was over before the reading")

    def read(self, collection: Collection, back_to: float) -> Reading:
        """Read the list back to a point in time, as the holder of the lease."""
        over_at = self._now() + _READING_SECONDS
        reading = self._reader.read(collection, back_to, may_ask=lambda: self._budget.may_ask(over_at), over_at=over_at)
        if reading.why_not is None and (missing := self.missing_controls(collection, reading, back_to)):
            reading.why_not = f"it does not show {len(missing)} predictions that it has to show, such as {missing[0]}"
        return reading

    def missing_controls(self, collection: Collection, reading: Reading, back_to: float) -> list[str]:
        """Return the open, bound predictions of the same time that a reading does not show.

        Those younger than the grace are left out: the list may be late by as much.
        """
        start = max(back_to, reading.reached)
        due_from = int(start) + self._first_poll + _DUE_AFTER_POLL_SECONDS
        due = self._table.open_from(due_from)
        controls: list[str] = []
        for _ in range(_CONTROL_PAGES):
            pks = list(islice(due, _CONTROL_PAGE_ITEMS))
            there = self._table.get_many(pk.removeprefix("prediction#") for pk in pks if pk.startswith("prediction#"))
            controls += [
                prediction.upstream_id
                for prediction in there.values()
                if prediction.upstream_id
                and prediction.collection == collection
                and not prediction.terminal
                and not prediction.unknown_creates
                and start + _CONTROL_MARGIN_SECONDS <= (prediction.claimed or 0) <= reading.began - self._grace
            ]
            if not pks or len(controls) >= _CONTROLS:
                break
        return [upstream_id for upstream_id in controls[:_CONTROLS] if upstream_id not in reading.entries]


class Budget:
    """Limit the list calls of the stack: `CALLS_AT_ONCE`, then `CALLS_PER_MINUTE` (a GCRA).

    Args:
        used_until: The time until which the rate is used up, in seconds since 1970.
    """

    interval = 60 / CALLS_PER_MINUTE
    burst_seconds = CALLS_AT_ONCE * interval

    def __init__(self, used_until: float, now: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self.used_until = used_until
        self._now = now
        self._sleep = sleep

    def may_ask(self, over_at: float) -> bool:
        """Wait for the turn of one more call; return False if that is after `over_at`."""
        now = self._now()
        used_until = max(self.used_until, now) + self.interval
        wait = used_until - now - self.burst_seconds
        if now + wait >= over_at:
            return False
        if wait > 0:
            self._sleep(wait)
        self.used_until = used_until
        return True


def last_of(lease: Mapping[str, Any], collection: str) -> dict[str, Any]:
    """Return what the last reading of a collection has seen, empty before the first one."""
    last: dict[str, Any] = json.loads(lease.get("last_json", "{}")).get(collection, {})
    return last
