"""Budget of live reads: how many GETs of callers may ask Replicate, and when none may.

One item (`pk` = `live_reads`, `sk` = `budget`) holds what the stack has used of the current minute, the failures in a
row, and a pause. Functions lease a few reads at a time, the more the more they use, so that most reads cost no write
here. A function that crashes wastes its lease; a minute later nothing of it is left.
"""

import os
import time
from collections.abc import Callable

from predictions.aws.dynamodb import Condition, ConditionFailed, Item, Key, Table

FAILURES = 3
"""Failures in a row, of all functions together, that pause live reads."""

PAUSE_SECONDS = 30

_KEY = Key("live_reads", "budget")
_MOST_LEASED = 10
_TURNS = 3


class LiveBudget:
    """The budget as one function sees it.

    Args:
        items: The stack's table.
        per_minute: The most live reads of the stack in one minute of the clock.
        now: The time, in seconds since 1970.
    """

    def __init__(self, items: Table, per_minute: int, *, now: Callable[[], float] = time.time) -> None:
        self._items = items
        self._per_minute = per_minute
        self._now = now
        self._minute = 0
        self._leased = 0
        self._left = 0
        self._closed_until = 0.0
        self._has_succeeded = False

    @classmethod
    def from_env(cls) -> "LiveBudget":
        """Read `TABLE_NAME` and `LIVE_READS_PER_MINUTE`."""
        return cls(Table.from_env(), int(os.environ["LIVE_READS_PER_MINUTE"]))

    @property
    def is_closed(self) -> bool:
        """Whether this function knows that no live read is possible now; asks nothing."""
        return self._now() < self._closed_until

    def acquire(self) -> bool:
        """Take one live read; return False if the minute's are used up, or while they are paused."""
        if self.is_closed:
            return False
        minute = int(self._now() // 60)
        if minute != self._minute:
            self._minute, self._leased, self._left = minute, 0, 0
        if not self._left:
            self._left = self._lease(minute)
            self._leased += self._left
        if not self._left:
            return False
        self._left -= 1
        return True

    def succeeded(self) -> None:
        """Note that Replicate answered. The next lease tells it to the others, without a write of its own."""
        self._has_succeeded = True

    def failed(self, *, throttled: bool = False) -> None:
        """Count a read that Replicate did not answer; pause all after three in a row.

        If the function crashes between the two writes, the next failure pauses.

        Args:
            throttled: Whether Replicate answered 429, which pauses at once.
        """
        self._left, self._has_succeeded = 0, False
        count = self._items.update_item(_KEY, add={"failures": 1})["failures"]
        if throttled or count >= FAILURES:
            self._closed_until = int(self._now()) + PAUSE_SECONDS
            self._items.update_item(_KEY, set={"paused_until": int(self._closed_until)}, remove=["failures"])

    def _lease(self, minute: int) -> int:
        """Lease some reads of a minute, as many as were leased before in it; return how many."""
        wanted = min(max(1, self._leased), _MOST_LEASED, self._per_minute)
        there: Item = {"minute": minute}
        for _ in range(_TURNS):
            try:
                self._take(wanted, minute, first=there.get("minute", 0) < minute)
            except ConditionFailed as failed:
                there = failed.item or {}
                if there.get("paused_until", 0) > self._now():
                    self._closed_until = there["paused_until"]
                    return 0
                if there.get("minute", 0) >= minute:
                    # Later only if another function's clock is ahead: then its minute counts.
                    minute = there["minute"]
                    wanted = min(wanted, self._per_minute - there["used"])
                    if wanted <= 0:
                        break
            else:
                self._has_succeeded = False
                return wanted
        self._closed_until = (minute + 1) * 60
        return 0

    def _take(self, count: int, minute: int, *, first: bool) -> None:
        """Count reads as used, as the first of a minute or together with those that are used already.

        Raises:
            ConditionFailed: The minute is another one, too many are used, or live reads are paused.
        """
        told = ["failures"] if self._has_succeeded else []
        not_paused = Condition("attribute_not_exists(paused_until) OR paused_until <= :now", now=int(self._now()))
        if first:
            earlier = Condition("attribute_not_exists(minute) OR minute < :minute", minute=minute)
            self._items.update_item(
                _KEY, set={"minute": minute, "used": count}, remove=told, condition=earlier & not_paused
            )
        else:
            left = Condition("minute = :minute AND used <= :most", minute=minute, most=self._per_minute - count)
            self._items.update_item(_KEY, add={"used": count}, remove=told, condition=left & not_paused)
