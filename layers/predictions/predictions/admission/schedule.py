"""Schedule of the limiter: plan the writes that a request needs, given the limiter's item and its owner's line.

Nothing here reads or writes: `rate_limiter.Limiter` does, and the condition of its write says whether what was known
was right.
"""

import math
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import cache, reduce
from operator import and_
from typing import Any, Literal

from predictions.admission.limiter_item import HORIZON_SECONDS, Known, Lane, Milliseconds, OwnersLine
from predictions.aws.dynamodb import Condition, Sum

BURST_SECONDS = 10
"""HTTP creates of this many seconds, at the full rate, may come at once."""

NEAR_SECONDS = (1, 5)
"""How far ahead an owner's last reserved start may be when it reserves the next one: two starts of the lane, within
these bounds. Starts a second ahead are not waited for (see `lifecycle.timing`), so a request whose turn has come mostly
starts at once; at a slow rate, requests that ask a little late would leave the lane idle with less than two."""

CATCH_UP_MS = 100
"""How far a lane may have fallen behind the time and still move on from where it is, instead of beginning again.

While requests come about as fast as the lane moves, it is about now, and of many functions that begin it again at once
one succeeds, in each round trip. So any time holds the starts of this one more: at high rates only, since a lane whose
steps are as long is ahead after one start.
"""

# The queue's share of the rate; with the rest, HTTP callers do not wait behind what is reserved already.
_QUEUED_SHARE = Fraction(9, 10)
# The most released starts that a lane keeps.
FREE_MOST = 100
# Attributes of owners, which the release before kept in the limiter's item, are removed once they have passed, so many
# at a time.
_REMOVED_MOST = 20
# An owner's line is deleted when all of its turns have passed.
_LINE_SECONDS = HORIZON_SECONDS + 86400
# Turns are by so much rarer than starts: requests that came late, and found the lane ahead, catch up by it.
_TURN_SLACK = Fraction(102, 100)
# How many turns there are for each start while many owners wait: see `_plan_turn`.
_TURNS_PER_START = 3
# A request asks up to some seconds after its turn: then a start must still be early enough for it.
_TURN_MARGIN_SECONDS = 5
# How often one start is given back at most; its number holds that in the last three digits.
GENERATIONS = 1000
_NANOSECONDS = 10**6  # of a millisecond


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


@dataclass(kw_only=True)
class Update:
    """One conditional update of an item, as it comes together."""

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


@dataclass
class Plan(Update):
    """The update of the limiter's item, and before it, that of the owner's line, if it needs one.

    Attributes:
        kind: The result: `start`, `free` (a released start) or `turn`, which updates the line only.
        step: By how much it moves the lane or the line on.
        number: Of the released start.
        line: The update of the owner's line.
    """

    kind: Literal["start", "free", "turn"]
    step: Milliseconds
    number: int = 0
    line: Update | None = None


@cache
def step_of(creates_per_minute: int, share: Fraction = Fraction(1)) -> Milliseconds:
    """Return the time between two starts at a share of the rate, in milliseconds.

    Rounded up to a nanosecond, so that starts are never more than the rate, and fewer by less than one in a million.
    """
    nanoseconds = math.ceil(Fraction(60_000 * _NANOSECONDS, creates_per_minute) / share)
    whole, rest = divmod(nanoseconds, _NANOSECONDS)
    return Decimal(nanoseconds) / _NANOSECONDS if rest else whole


class Schedule:
    """The limiter at one moment, as far as it is known.

    Args:
        known: What was read of the item.
        now: The moment, in seconds since 1970.
        creates_per_minute: The rate.
        max_start_delay_seconds: How far ahead a start may be reserved.
        uncounted: How many creates of this process the lane does not know of yet.

    Attributes:
        now_ms: The moment in milliseconds.
    """

    def __init__(
        self, known: Known, now: float, *, creates_per_minute: int, max_start_delay_seconds: int, uncounted: int
    ) -> None:
        self.now_ms = round(now * 1000)
        self._known = known
        self._state = known.state
        self._now = now
        self._rate = creates_per_minute
        self._max_start_delay_seconds = max_start_delay_seconds
        self._uncounted = uncounted

    def plan(
        self,
        lane: Lane,
        owner: str,
        line: OwnersLine,
        latest: int,
        turn: int | None,
        *,
        others: int,
        free: bool,
        granted: bool = False,
        contended: bool = False,
    ) -> Plan | AskAgain | TooLate:
        """Plan the writes that a request needs, or return the result if it needs none.

        Args:
            lane: The lane.
            owner: Whose request it is.
            line: The owner's line; of no effect while the lane is idle.
            latest: The last moment at which it may start or have its turn.
            turn: Its turn, where it has one.
            others: How many other owners are known to wait in the lane.
            free: Whether to take a released start.
            granted: Whether the owner's line already has this start as its last one.
            contended: Whether others were faster, once: all want what is near, and few get it in a round trip.
        """
        now = self.now_ms
        start, floor = self.next_start(lane), max(now, self._state.blocked_until)
        bound = max(now, min(latest, now + self._max_start_delay_seconds * 1000))
        least, most = NEAR_SECONDS
        # A millisecond more, by which the nanoseconds of many steps round a start up.
        near = floor + max(least * 1000, min(most * 1000, 2 * self._step(lane))) + 1
        if start <= now:
            # A start of now that is not used would be wasted, whatever turns are ahead. If others take those of now
            # meanwhile, the next one that is near is as good.
            return self._plan_start(lane, bound=min(bound, near) if self._floor(lane) < now else now)
        if free and (given_back := self.given_back(lane)) and given_back[0] // GENERATIONS <= bound:
            return self._plan_free(lane, given_back[0])
        if turn is not None and turn > now:
            return AskAgain(turn / 1000, 0)
        # A request without a turn goes behind those of its owner that have one, unless its deadline is before that.
        latest_turn = latest - _TURN_MARGIN_SECONDS * 1000
        before = _slot(owner)
        last = max(line.last, self._state.last.get((lane, before), 0))
        begin = max(start, self._state.turns.get((lane, before), 0))
        end = max(line.turn, begin if begin > start else 0)
        if start <= bound and (turn is not None or end <= now or end > latest_turn):
            if start <= near and not contended:
                # No owner's last start is further ahead than this one, so no line says more.
                return self._plan_start(lane, bound=min(bound, near))
            if last <= near or granted:
                plan = self._plan_start(lane, bound=bound)
                plan.line = None if granted else self._plan_last(line, start, near)
                return plan
        if max(start, end) > latest_turn:
            return TooLate(float(max(start, end)) / 1000)
        # Each owner that presses for starts is ahead of what is near by one: so many they are at most. Too low a number
        # has requests ask more often, too high a one would leave the lane idle.
        owners = 1 + min(Fraction(others), Fraction(max(0, start - near)) / Fraction(self._step(lane)))
        return self._plan_turn(lane, line, begin, latest_turn, owners)

    def _plan_start(self, lane: Lane, *, bound: Milliseconds) -> Plan:
        """Advance the lane, whose next start must not be later than `bound`."""
        now, floor = self.now_ms, self._floor(lane)
        own = f"{lane}_at"
        step = self._step(lane)
        plan = Plan("start", step)
        steps = {own: step} if lane == "queue" else {own: step, "queue_at": step}
        for name, each in steps.items():
            at = self._state.end("http" if name == "http_at" else "queue")
            if name in self._known.absurd:
                plan.require(f"{name} = :was_{name}", **{f"was_{name}": self._known.absurd[name]})
                plan.set[name] = now + each + (BURST_SECONDS * 1000 if name == "http_at" else 0)
            elif at > floor:
                plan.require(f"{name} > :floor", floor=floor)
                plan.set[name] = Sum(name, each)
            else:
                plan.require(f"attribute_not_exists({name}) OR {name} <= :floor", floor=floor)
                if name == own:
                    plan.set[name] = now + each
        if own not in self._known.absurd and self._state.end(lane) > floor:
            plan.require(f"{own} <= :bound", bound=bound - self._lead(lane))
        self._clean(plan, lane)
        return plan

    def _plan_last(self, line: OwnersLine, start: Milliseconds, near: Milliseconds) -> Update:
        """Have a start be its owner's last one, unless another one is later than `near`."""
        update = self._update_of_line()
        if "last_at" in line.absurd:
            update.require("last_at = :was", was=line.absurd["last_at"])
        else:
            update.require("attribute_not_exists(last_at) OR last_at <= :near", near=near)
        update.set["last_at"] = start
        return update

    def _plan_free(self, lane: Lane, number: int) -> Plan:
        """Take a released start."""
        plan = Plan("free", 0, number)
        plan.require(f"contains({lane}_free, :number)", number=number)
        plan.add[f"{lane}_taken"] = {number}
        self._clean(plan, lane, number)
        return plan

    def _plan_turn(self, lane: Lane, line: OwnersLine, begin: Milliseconds, latest: int, owners: Fraction) -> Plan:
        """Extend the owner's line by a third of its share, at least by one start.

        A third, so that the lane is used up also when two thirds of them stop waiting: turns that were given cannot be
        moved. The price is that a request asks up to three times while many owners wait.

        Args:
            lane: The lane.
            line: The owner's line.
            begin: The earliest turn.
            latest: The latest one.
            owners: How many owners share the lane.
        """
        step = Fraction(self._step(lane)) * max(Fraction(1), owners / _TURNS_PER_START) * _TURN_SLACK
        plan = Plan("turn", _nearest(step))
        plan.line = update = self._update_of_line()
        if "turn_at" in line.absurd:
            update.require("turn_at = :was", was=line.absurd["turn_at"])
            update.set["turn_at"] = begin + plan.step
        elif line.turn >= begin:
            update.require("turn_at BETWEEN :begin AND :latest", begin=begin, latest=latest)
            update.set["turn_at"] = Sum("turn_at", plan.step)
        else:
            update.require("attribute_not_exists(turn_at) OR turn_at < :begin", begin=begin)
            update.set["turn_at"] = begin + plan.step
        return plan

    def _update_of_line(self) -> Update:
        update = Update()
        update.set["expires_at"] = int(self._now) + _LINE_SECONDS
        return update

    def _clean(self, plan: Plan, lane: Lane, number: int | None = None) -> None:
        """Remove what has passed, in the same write that takes the start `number`."""
        plan.remove += self._known.removable[:_REMOVED_MOST]
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

    def next_start(self, lane: Lane) -> Milliseconds:
        """Return the start of a lane's next reservation, in milliseconds since 1970."""
        end = self._state.end(lane)
        return max(self.now_ms, end + self._lead(lane)) if end > self.now_ms else self.now_ms

    def start_of(self, lane: Lane, step: Milliseconds) -> int:
        """Return the start that a reservation has just brought, by the state after it; whole, as its number is.

        Steps are a millisecond at least, so no two starts are the same without their fractions.
        """
        if lane == "http":
            return int(self._state.http_at - step_of(self._rate) - BURST_SECONDS * 1000)
        return int(self._state.queue_at - step)

    def _floor(self, lane: Lane) -> Milliseconds:
        """Return the time before which a lane's end has no effect any more."""
        return self.now_ms - max(0, CATCH_UP_MS - self._step(lane))

    def _lead(self, lane: Lane) -> Milliseconds:
        """Return the offset of the next start from the lane's end; negative with a burst."""
        if lane == "queue":
            return 0
        return self._step(lane) - step_of(self._rate) - BURST_SECONDS * 1000

    def _step(self, lane: Lane) -> Milliseconds:
        """Return by how much a reservation advances a lane."""
        if lane == "queue":
            return step_of(self._rate, _QUEUED_SHARE)
        return step_of(self._rate) * (1 + self._uncounted)


def _slot(owner: str) -> str:
    """Return an owner's name in attributes of the limiter's item, as the release before wrote them."""
    return owner.replace("-", "_")


def _nearest(milliseconds: Fraction) -> Milliseconds:
    """Return a time to the nearest nanosecond."""
    return Decimal(round(milliseconds * _NANOSECONDS)) / _NANOSECONDS
