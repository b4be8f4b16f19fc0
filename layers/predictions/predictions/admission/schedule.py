"""Schedule of the limiter: plan the write that a request needs, given the limiter's item.

Nothing here reads or writes: `rate_limiter.Limiter` does, and the condition of its write says whether what was known
was right.
"""

import re
from dataclasses import dataclass, field
from functools import reduce
from operator import and_
from typing import Any, Literal

from predictions.admission.limiter_item import Known, Lane
from predictions.aws.dynamodb import Condition, Sum

BURST_SECONDS = 10
"""HTTP creates of this many seconds, at the full rate, may come at once."""

NEAR_SECONDS = (1, 5)
"""How far ahead an owner's last reserved start may be when it reserves the next one: two starts of the lane, within
these bounds. Starts a second ahead are not waited for (see `lifecycle.timing`), so a request whose turn has come mostly
starts at once; at a slow rate, requests that ask a little late would leave the lane idle with less than two."""

# The queue's share of the rate; with the rest, HTTP callers do not wait behind what is reserved already.
_QUEUED_SHARE = 0.9
# Bounds of the limiter's item: released starts, and owners with attributes of their own in a lane;
# further owners share them.
FREE_MOST = 100
_LINES_MOST = 100
_OTHER = "_other"
# Attributes of owners that have passed are removed by later writes, so many at a time.
_REMOVED_MOST = 20
# Turns are by so much rarer than starts: requests that came late, and found the lane ahead, catch up by it.
_TURN_SLACK = 1.02
# How many turns there are for each start while many owners wait: see `_plan_turn`.
_TURNS_PER_START = 3
# A request asks up to some seconds after its turn: then a start must still be early enough for it.
_TURN_MARGIN_SECONDS = 5
# How often one start is given back at most; its number holds that in the last three digits.
GENERATIONS = 1000


@dataclass(frozen=True, slots=True)
class Start:
    """A create may start.

    Attributes:
        at: When, in seconds since 1970; mostly now.
        number: Of a reserved start that lies ahead, what `release` takes; None for one of now.
    """

    at: float
    number: int | None = None


@dataclass(frozen=True, slots=True)
class AskAgain:
    """A create may not start yet; nothing is reserved for it.

    Attributes:
        at: When to ask again, in seconds since 1970.
        step_ms: By how much its owner's line became longer, for `release_turn`; 0 where it has its turn already.
    """

    at: float
    step_ms: int


@dataclass(frozen=True, slots=True)
class TooLate:
    """A create would start, or have its turn, too late; nothing was written.

    Attributes:
        at: When that would be, in seconds since 1970.
    """

    at: float


Reservation = Start | AskAgain | TooLate
"""The result of a request for a start."""


@dataclass
class Plan:
    """One conditional update, as it comes together.

    Attributes:
        kind: Its result: `start`, `free` (a released start) or `turn`.
        step: By how much it moves the lane or the line on.
        number: Of the released start.
    """

    kind: Literal["start", "free", "turn"]
    step: int
    number: int = 0
    conditions: list[Condition] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)
    remove: list[str] = field(default_factory=list)
    add: dict[str, Any] = field(default_factory=dict)
    delete: dict[str, Any] = field(default_factory=dict)

    def require(self, text: str, **values: Any) -> None:
        """Add a condition."""
        self.conditions.append(Condition(text, **values))

    @property
    def condition(self) -> Condition | None:
        """Return all conditions as one, or None without any."""
        return reduce(and_, self.conditions) if self.conditions else None

    @property
    def changes(self) -> dict[str, Any]:
        """Return the changes as arguments of `Table.update_item`."""
        return {"set": self.set, "remove": self.remove, "add": self.add, "delete": self.delete}


class Schedule:
    """The limiter at one moment, as far as it is known.

    Args:
        known: What was read of the item.
        now: The moment, in seconds since 1970.
        interval: Between two starts at the full rate, in milliseconds.
        max_start_delay_seconds: How far ahead a start may be reserved.
        uncounted: How many creates of this process the lane does not know of yet.

    Attributes:
        now_ms: The moment in milliseconds.
    """

    def __init__(
        self, known: Known, now: float, *, interval: float, max_start_delay_seconds: int, uncounted: int = 0
    ) -> None:
        self.now_ms = round(now * 1000)
        self._known = known
        self._state = known.state
        self._now = now
        self._interval = interval
        self._max_start_delay_seconds = max_start_delay_seconds
        self._uncounted = uncounted

    def plan(self, lane: Lane, slot: str, latest: int, turn: int | None, *, free: bool) -> Plan | AskAgain | TooLate:
        """Plan the write that a request needs, or return the result if it needs no write."""
        now = self.now_ms
        start, floor = self.next_start(lane), max(now, self._state.blocked_until)
        line, last = (each.get((lane, slot), 0) for each in (self._state.turns, self._state.last))
        bound = max(now, min(latest, now + self._max_start_delay_seconds * 1000))
        least, most = NEAR_SECONDS
        near = floor + max(least * 1000, min(most * 1000, 2 * self._step(lane)))
        if start <= now:
            # A start of now that is not used would be wasted, whatever turns are ahead.
            return self._plan_start(lane, slot, bound=now, near=None)
        if free and (given_back := self.given_back(lane)) and given_back[0] // GENERATIONS <= bound:
            return self._plan_free(lane, given_back[0])
        if turn is not None and turn > now:
            return AskAgain(turn / 1000, 0)
        # A request without a turn goes behind those of its owner that have one, unless its deadline is before that.
        latest_turn = latest - _TURN_MARGIN_SECONDS * 1000
        if start <= bound and last <= near and (turn is not None or line <= now or line > latest_turn):
            return self._plan_start(lane, slot, bound=bound, near=near)
        if max(start, line) > latest_turn:
            return TooLate(max(start, line) / 1000)
        return self._plan_turn(lane, slot, start, latest_turn)

    def _plan_start(self, lane: Lane, slot: str, *, bound: int, near: int | None) -> Plan:
        """Advance the lane, unless the owner's last start is later than `near`, if given."""
        now = self.now_ms
        own, last = f"{lane}_at", f"{lane}_last_{slot}"
        step = self._step(lane)
        lead = self._lead(lane)
        plan = Plan("start", step)
        steps = {own: step} if lane == "queue" else {own: step, "queue_at": step}
        for name, each in steps.items():
            at = self._state.end("http" if name == "http_at" else "queue")
            if name in self._known.absurd:
                plan.require(f"{name} = :was_{name}", **{f"was_{name}": self._known.absurd[name]})
                plan.set[name] = now + each + (BURST_SECONDS * 1000 if name == "http_at" else 0)
            elif at > now:
                plan.require(f"{name} > :now", now=now)
                plan.set[name] = Sum(name, each)
            else:
                plan.require(f"attribute_not_exists({name}) OR {name} <= :now", now=now)
                if name == own:
                    plan.set[name] = now + each
        if own not in self._known.absurd and self._state.end(lane) > now:
            plan.require(f"{own} <= :bound", bound=bound - lead)
            if near is not None:
                # The lane's end before this write, and what lies between it and the start.
                plan.set[last] = Sum(own, lead)
                if last not in self._known.removable or (lane, slot) in self._state.last:
                    plan.require(f"attribute_not_exists({last}) OR {last} <= :near", near=near)
        self._clean(plan, lane, last)
        return plan

    def _plan_free(self, lane: Lane, number: int) -> Plan:
        """Take a released start."""
        plan = Plan("free", 0, number)
        plan.require(f"contains({lane}_free, :number)", number=number)
        plan.add[f"{lane}_taken"] = {number}
        self._clean(plan, lane, "", number)
        return plan

    def _plan_turn(self, lane: Lane, slot: str, start: int, latest: int) -> Plan:
        """Extend the owner's line by a third of its share, at least by one start.

        A third, so that the lane is used up also when two thirds of them stop waiting: turns that were given cannot be
        moved. The price is that a request asks up to three times while many owners wait.
        """
        line = f"{lane}_turn_{slot}"
        others = sum(at > self.now_ms for (of, other), at in self._state.turns.items() if of == lane and other != slot)
        step = round(self._step(lane) * max(1.0, (others + 1) / _TURNS_PER_START) * _TURN_SLACK)
        plan = Plan("turn", step)
        if self._state.turns.get((lane, slot), 0) >= start:
            plan.require(f"{line} BETWEEN :start AND :latest", start=start, latest=latest)
            plan.set[line] = Sum(line, step)
        else:
            if line not in self._known.removable or (lane, slot) in self._state.turns:
                plan.require(f"attribute_not_exists({line}) OR {line} < :start", start=start)
            plan.set[line] = start + step
        self._clean(plan, lane, line)
        return plan

    def _clean(self, plan: Plan, lane: Lane, own: str, number: int | None = None) -> None:
        """Remove what has passed, in the same write that takes the start `number`."""
        plan.remove += [name for name in self._known.removable if name != own][:_REMOVED_MOST]
        if gone := self.passed(f"{lane}_free", number):
            plan.delete[f"{lane}_free"] = gone
        if number is None and (gone := self.passed(f"{lane}_taken")):
            plan.delete[f"{lane}_taken"] = gone

    def passed(self, name: str, number: int | None = None) -> set[int]:
        """Return the numbers of a set that have passed, and `number`."""
        lane, _, which = name.partition("_")
        known: frozenset[int] = (self._state.free if which == "free" else self._state.taken).get(lane, frozenset())
        return {each for each in known if each // GENERATIONS < self._now * 1000 or each == number}

    def given_back(self, lane: Lane) -> list[int]:
        """Return the numbers of released starts that can be reserved, the earliest first."""
        if len(self._state.taken.get(lane, ())) >= FREE_MOST or f"{lane}_taken" in self._known.removable:
            return []
        earliest, end = max(self.now_ms, self._state.blocked_until), self.next_start(lane)
        return sorted(n for n in self._state.free.get(lane, ()) if earliest <= n // GENERATIONS < end)

    def next_start(self, lane: Lane) -> int:
        """Return the start of a lane's next reservation, in milliseconds since 1970."""
        end = self._state.end(lane)
        return max(self.now_ms, end + self._lead(lane)) if end > self.now_ms else self.now_ms

    def _lead(self, lane: Lane) -> int:
        """Return the offset of the next start from the lane's end; negative with a burst."""
        if lane == "queue":
            return 0
        return self._step(lane) - round(self._interval) - BURST_SECONDS * 1000

    def _step(self, lane: Lane) -> int:
        """Return by how much a reservation advances a lane."""
        return round(self._interval / _QUEUED_SHARE if lane == "queue" else self._interval * (1 + self._uncounted))

    def slot(self, lane: Lane, owner: str) -> str:
        """Return an owner's name in attributes: its own, or a shared one when many wait."""
        slot = owner.replace("-", "_")
        if not re.fullmatch("[a-z0-9][a-z0-9_]{0,31}", slot):
            return _OTHER
        named = {each for of, each in [*self._state.turns, *self._state.last] if of == lane}
        return slot if slot in named or len(named) < _LINES_MOST else _OTHER
