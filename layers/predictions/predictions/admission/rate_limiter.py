"""When a prediction may be created at Replicate: one rate for all sources, and one switch that holds them all.

Both are one item (`pk` = `limiter`, `sk` = `creates`), so that one read tells all of it. Its times are milliseconds
since 1970. Of each lane, `http` and `queue`:

    {lane}_at                   the lane's end: for `http` when it is used up, at the full rate; for `queue` the next
                                free start, at nine tenths of the rate
    {lane}_last_{owner}         the last start that an owner has reserved, while it is ahead
    {lane}_turn_{owner}         the end of an owner's line: when its next request asks for a start
    {lane}_free, {lane}_taken   starts that were given back, and those of them that were reserved again

and of both:

    blocked_until   when Replicate takes creates again, after it said 429
    paused_until    until when nothing is submitted; `paused_by` and `pause_reason` say who wants that, and why

A create reserves its start by moving a lane on by one interval, in one write without a read before it (the generic
cell rate algorithm), so any number of functions do it at once and no lock is waited for. Each HTTP create moves the
other lane too: later reservations start behind it. A lane only moves forward, and no start time is handed out twice.

Starts are reserved at the last moment. An owner reserves the next start only while its last one is at most
`NEAR_SECONDS` ahead: so the lane stays about as short as that, owners alternate, and the single request of one owner
waits seconds whatever the backlog of another is. A request that is refused gets a turn: a time in its owner's own line
at which to ask again. A turn holds no start, so a line may be long, may move back when requests are canceled, and may
be wrong: a request that finds the lane idle takes the start, whatever turns are ahead.

A reserved start that is not used is given back into a bounded set, from which another request takes that very start.
The set holds numbers (the start's milliseconds, and how often it was given back), so that a write that AWS repeats
cannot put the same start into it twice.

The limiter never loses or delays a prediction on failure: where the table fails, a create goes as if there were no
limiter, and Replicate's own 429 holds it.

A value that no rule can have written (not a whole number, or further ahead than the rules allow), for example from a
manual edit or an earlier release, is ignored: creates go on at their rate, and the next reservation replaces it. A
lane then begins with its burst used up, since nobody knows what was reserved. A pause that is not by Replicate counts
whatever its end is: somebody who may write the item wants it.
"""

import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING, Any, Literal

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import client
from predictions.aws.dynamodb import Condition, ConditionFailed, Key, Sum, Table
from predictions.observability import MetricUnit, logger, metrics

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

BURST_SECONDS = 10
"""HTTP creates of this many seconds, at the full rate, may come at once."""

QUIET_SECONDS = 10
"""A create that comes this long after the last one of its process is counted with the next one."""

AUTOMATIC_PAUSE_SECONDS = 300
"""For how long an answer 401 or 402 of Replicate holds all submissions; then one of them finds out how it is."""

HORIZON_SECONDS = 7 * 86400
"""No turn is further ahead: the longest deadline, a training's (`TrainingLifetimeSeconds`), is over then."""

NEAR_SECONDS = (1, 5)
"""How far ahead an owner's last reserved start may be when it reserves the next one: two starts of the lane, within
these bounds. Starts a second ahead are not waited for (see `lifecycle.timing`), so a request whose turn has come mostly
starts at once; at a slow rate, requests that ask a little late would leave the lane idle with less than two."""

MAX_START_DELAY_SECONDS = 3600
"""The largest `MaxStartDelaySeconds` of the template."""

MANUAL = "command"
AUTOMATIC = "Replicate"

# What the queue may use of the rate; the rest keeps HTTP callers from having to wait behind what is reserved already.
_QUEUED_SHARE = 0.9
_CACHE_SECONDS = 1.0
_ATTEMPTS = 5
# Races for a start that was given back are lost to whoever takes it first: after these, the lane is moved instead.
_FREE_ATTEMPTS = 2
# A reservation that was not used in this time, as in a pause, is none any more: many of them would start at once.
_STALE_SECONDS = 30
_FOREVER = 253_402_300_799_000  # the year 9999
# By so much the clocks of functions may differ.
_CLOCKS_SECONDS = 600

# What bounds the limiter's item: starts kept that were given back, and owners with attributes of their own in a lane;
# further owners share them.
_FREE_MOST = 100
_LINES_MOST = 100
_OTHER = "_other"
# Attributes of owners are removed by later writes, so many at a time, once they have passed by this: what is known of
# them may be a second old, and one that an owner has just set again must not be removed.
_REMOVED_MOST = 20
_PASSED_SECONDS = 10
# Turns are by so much rarer than starts: requests that came late, and found the lane ahead, catch up by it.
_TURN_SLACK = 1.02
# How many turns there are for each start while many owners wait: see `_plan_turn`.
_TURNS_PER_START = 3
# A request asks up to some seconds after its turn: then a start must still be early enough for it.
_TURN_MARGIN_SECONDS = 5

Lane = Literal["http", "queue"]

LANES: tuple[Lane, ...] = ("http", "queue")

_KEY = Key("limiter", "creates")

# How far ahead rules put each of these at most; `upstream.client` takes a `Retry-After` up to an hour. Lanes are
# ahead of a block, or of this moment, by `MaxStartDelaySeconds` and less than two minutes: a burst of HTTP and the last
# starts.
_BLOCK_SECONDS = 3600
_LANE_SECONDS = 120
_FARTHEST_SECONDS: dict[str, int] = {
    "blocked_until": _BLOCK_SECONDS,
    "paused_until": AUTOMATIC_PAUSE_SECONDS,
    "paused_at": 0,
}
# How often one start is given back at most; its number holds that in the last three digits.
_GENERATIONS = 1000
_OF_OWNER = re.compile(r"(http|queue)_(last|turn)_([a-z0-9_]{1,40})")
_OF_FREE = re.compile(r"(http|queue)_(free|taken)")


@dataclass(frozen=True, slots=True)
class Start:
    """A create may start.

    Attributes:
        at: When, in seconds since 1970; mostly now.
        number: Of a reserved start that lies ahead, what `give_back` takes; None for one of now.
    """

    at: float
    number: int | None = None


@dataclass(frozen=True, slots=True)
class AskAgain:
    """A create may not start yet; nothing is reserved for it.

    Attributes:
        at: When to ask again, in seconds since 1970.
        step_ms: By how much its owner's line became longer, for `give_turn_back`; 0 where it has its turn already.
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
"""The answer to a request for a start."""


@dataclass(frozen=True)
class Pause:
    """That nothing is submitted now.

    Attributes:
        until: When it ends by itself, in seconds since 1970; None: by command only.
        since: When it began.
        by: `command` or `Replicate`.
        reason: Why, for callers to read.
    """

    until: float | None
    since: float
    by: str
    reason: str

    def remaining(self, now: float, limit: int) -> int:
        """How many whole seconds it goes on, at most `limit`."""
        return limit if self.until is None else max(1, min(limit, int(self.until - now) + 1))


@dataclass(frozen=True)
class LimiterState:
    """The limiter's item; milliseconds since 1970, 0 where there is none yet.

    Attributes:
        last: The last reserved start, by lane and owner.
        turns: The end of the line, by lane and owner.
        free: Numbers of starts that were given back, by lane.
        taken: Those that were reserved again, by lane.
    """

    http_at: int = 0
    queue_at: int = 0
    blocked_until: int = 0
    paused_until: int = 0
    paused_at: int = 0
    paused_by: str = ""
    pause_reason: str = ""
    last: Mapping[tuple[str, str], int] = field(default_factory=dict)
    turns: Mapping[tuple[str, str], int] = field(default_factory=dict)
    free: Mapping[str, frozenset[int]] = field(default_factory=dict)
    taken: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def end(self, lane: Lane) -> int:
        """A lane's end."""
        return self.http_at if lane == "http" else self.queue_at

    def pause(self, now: float) -> Pause | None:
        """The pause at that moment."""
        if self.paused_until <= now * 1000:
            return None
        until = None if self.paused_until >= _FOREVER else self.paused_until / 1000
        return Pause(until, self.paused_at / 1000, self.paused_by, self.pause_reason)


class Limiter:
    """The one limiter of a stack.

    Args:
        table_name: The table.
        dynamodb: The client to use.
        creates_per_minute: The rate.
        max_start_delay_seconds: How far ahead a start may be reserved, or promised to a caller of HTTP.
        now: The time, in seconds since 1970.
    """

    def __init__(
        self,
        table_name: str,
        dynamodb: "DynamoDBClient",
        *,
        creates_per_minute: int = 600,
        max_start_delay_seconds: int = 300,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.creates_per_minute = creates_per_minute
        self.max_start_delay_seconds = max_start_delay_seconds
        self._table = Table(table_name, dynamodb)
        self._interval = 60_000 / creates_per_minute
        self._now = now
        self._known = LimiterState()
        # Values that no rule can have written, as they are in the table.
        self._absurd: dict[str, Any] = {}
        self._removable: list[str] = []
        self._known_at = float("-inf")
        self._last_create = float("-inf")
        self._uncounted = 0

    @classmethod
    def from_env(cls) -> "Limiter":
        """From `TABLE_NAME`, `CREATES_PER_MINUTE` and `MAX_START_DELAY_SECONDS`."""
        return cls(
            os.environ["TABLE_NAME"],
            client("dynamodb"),
            creates_per_minute=int(os.environ["CREATES_PER_MINUTE"]),
            max_start_delay_seconds=int(os.environ["MAX_START_DELAY_SECONDS"]),
        )

    def limiter_state(self) -> LimiterState:
        """The item as it is now.

        Raises:
            ClientError: It cannot be read.
        """
        return self._know(self._table.get_item(_KEY) or {})

    # -- reserving --------------------------------------------------------------------------------------------

    def reserve_for_caller(self, owner: str, *, latest: float, turn_at: float | None = None) -> Reservation:
        """Reserve a start for a create of the HTTP API; mostly it is now.

        A process whose last create is `QUIET_SECONDS` back does not write: it counts this one with its next, so that
        a lone prediction costs no write here. A process owes one create at most, since one that is older than the
        burst would have no effect any more. What the lane does not know of is therefore never more than the number of
        warm functions, once in `QUIET_SECONDS` each.

        Args:
            owner: Whose request it is.
            latest: The last moment at which it may start or have its turn, in seconds since 1970.
            turn_at: Its turn, where it has one.
        """
        now = self._now()
        state = self._state()
        quiet = now - self._last_create >= QUIET_SECONDS
        self._last_create = now
        if quiet and state.http_at <= (now + BURST_SECONDS) * 1000 - self._interval:
            self._uncounted = 1
            return Start(now)
        return self._reserve("http", owner, latest, turn_at)

    def reserve_for_queue(self, owner: str, *, latest: float, turn_at: float | None = None) -> Reservation:
        """Reserve a start for a create of any other source, behind what is reserved already.

        Args:
            owner: Whose request it is.
            latest: The last moment at which it may start or have its turn, in seconds since 1970.
            turn_at: Its turn, where it has one.
        """
        return self._reserve("queue", owner, latest, turn_at)

    def too_late(self, owner: str, latest: float) -> TooLate | None:
        """Say whether `reserve_for_caller` would refuse, as far as is known; writes nothing."""
        self._state()
        now = round(self._now() * 1000)
        plan = self._plan("http", self._slot("http", owner), now, round(latest * 1000), None, free=True)
        return plan if isinstance(plan, TooLate) else None

    def expected_start(self, lane: Lane, owner: str) -> float:
        """When a request of an owner that comes now would start, as far as is known, in seconds since 1970."""
        state, now = self._state(), round(self._now() * 1000)
        return max(self._next(lane, now), state.turns.get((lane, self._slot(lane, owner)), 0)) / 1000

    def is_idle(self, lane: Lane) -> bool:
        """Whether a start of now is left over, as far as is known."""
        self._state()
        now = round(self._now() * 1000)
        return self._next(lane, now) <= now or bool(self._given_back(lane, now))

    def give_back(self, lane: Lane, number: int) -> None:
        """Keep a reserved start that is not used, for another request; late, or twice, it changes nothing.

        Only for the one who holds it, once nothing can start at it any more: a start whose holder may still use it
        would be handed out twice.
        """
        at, generation = divmod(number, _GENERATIONS)
        if at <= self._now() * 1000 or generation + 1 == _GENERATIONS:
            return
        free, taken, end = f"{lane}_free", f"{lane}_taken", at + (BURST_SECONDS * 1000 if lane == "http" else 0)
        has_room = Condition(f"attribute_not_exists({free}) OR size({free}) < :most", most=_FREE_MOST)
        not_taken = Condition(f"NOT contains({taken}, :number)", number=number + 1)
        ahead = Condition(f"{lane}_at > :end", end=end)
        passed = {taken: gone} if (gone := self._passed(taken)) else {}
        if self._write(has_room & not_taken & ahead, add={free: {number + 1}}, delete=passed) is False:
            logger.info("a start is not kept: too many are, it is there already, or its lane began anew")

    def give_turn_back(self, lane: Lane, owner: str, step_ms: int) -> None:
        """Make an owner's line shorter by a request that left it; where that is not written, the line stays longer."""
        turn = f"{lane}_turn_{self._slot(lane, owner)}"
        now = round(self._now() * 1000)
        self._write(Condition(f"{turn} >= :least", least=now + step_ms), set={turn: Sum(turn, -step_ms)})

    def is_reserved(self, start: float) -> bool:
        """Whether a reservation for `start`, a second that has come, still counts.

        Not if Replicate has said 429 since, or if nobody came for it in time, as in a pause.
        """
        return (start + 1) * 1000 > self._state().blocked_until and self._now() - start <= _STALE_SECONDS

    def block(self, seconds: int) -> None:
        """Keeps every create back that is not reserved yet, since Replicate said 429 and named that time."""
        until = round((self._now() + seconds) * 1000)
        self._uncounted = 0
        # The burst is used up, or it would all be sent at that moment.
        for name, value in (("blocked_until", until), ("queue_at", until), ("http_at", until + BURST_SECONDS * 1000)):
            earlier = Condition(f"attribute_not_exists({name}) OR {name} < :value", value=value)
            # Starts that were given back lie before the block, as does the lane that is moved by it.
            free = [f"{name.removesuffix('_at')}_free"] if name.endswith("_at") else []
            self._replace(name, earlier, set={name: value}, remove=free)

    def _reserve(self, lane: Lane, owner: str, latest: float, turn_at: float | None) -> Reservation:
        """Move a lane or a line on, in one write; a start of now where the table fails.

        What is known says which write to try, and the write's condition whether that was right: so it holds at the
        first try but where a lane has just run out or begun, an owner's start was just reserved, or a start that was
        given back was just taken.
        """
        turn_ms = None if turn_at is None else round(turn_at * 1000)
        for attempt in range(_ATTEMPTS):
            now = round(self._now() * 1000)
            slot = self._slot(lane, owner)
            plan = self._plan(lane, slot, now, round(latest * 1000), turn_ms, free=attempt < _FREE_ATTEMPTS)
            if not isinstance(plan, _Plan):
                return plan
            held = self._write(plan.condition, **plan.changes)
            if held is None:
                self._uncounted = 0
                return Start(self._now())
            if held:
                return self._done(plan, lane, slot, now)
        logger.warning("the limiter is contended: a create goes uncounted")
        self._uncounted = 0
        return Start(self._now())

    def _done(self, plan: "_Plan", lane: Lane, slot: str, now: int) -> Start | AskAgain:
        """What a write has brought, by the item as it is after it."""
        if plan.kind == "turn":
            return AskAgain((self._known.turns.get((lane, slot), now) - plan.step) / 1000, plan.step)
        if plan.kind == "free":
            return Start(plan.number // _GENERATIONS / 1000, plan.number)
        self._uncounted = 0
        at = self._known.end(lane) - plan.step
        if lane == "http":
            at = self._known.http_at - round(self._interval) - BURST_SECONDS * 1000
        return Start(at / 1000, at * _GENERATIONS) if at > now else Start(self._now())

    def _plan(
        self, lane: Lane, slot: str, now: int, latest: int, turn: int | None, *, free: bool
    ) -> "_Plan | AskAgain | TooLate":
        """The write that a request needs by what is known, or the answer where it needs none."""
        start, floor = self._next(lane, now), max(now, self._known.blocked_until)
        line, last = (each.get((lane, slot), 0) for each in (self._known.turns, self._known.last))
        bound = max(now, min(latest, now + self.max_start_delay_seconds * 1000))
        least, most = NEAR_SECONDS
        near = floor + max(least * 1000, min(most * 1000, 2 * self._step(lane)))
        if start <= now:
            # Nobody waits for it: unused it would be wasted, whoever's turn it is.
            return self._plan_start(lane, slot, now, bound=now, near=None)
        if free and (given_back := self._given_back(lane, now)) and given_back[0] // _GENERATIONS <= bound:
            return self._plan_free(lane, given_back[0])
        if turn is not None and turn > now:
            return AskAgain(turn / 1000, 0)
        # A request without a turn goes behind those of its owner that have one, unless its deadline is before that.
        latest_turn = latest - _TURN_MARGIN_SECONDS * 1000
        if start <= bound and last <= near and (turn is not None or line <= now or line > latest_turn):
            return self._plan_start(lane, slot, now, bound=bound, near=near)
        if max(start, line) > latest_turn:
            return TooLate(max(start, line) / 1000)
        return self._plan_turn(lane, slot, now, start, latest_turn)

    def _plan_start(self, lane: Lane, slot: str, now: int, *, bound: int, near: int | None) -> "_Plan":
        """Move the lane on; `near` says how far ahead the owner's last start may be, None that it does not matter."""
        own, last = f"{lane}_at", f"{lane}_last_{slot}"
        step = self._step(lane)
        lead = self._lead(lane)
        plan = _Plan("start", step)
        steps = {own: step} if lane == "queue" else {own: step, "queue_at": step}
        for name, each in steps.items():
            at = self._known.http_at if name == "http_at" else self._known.queue_at
            if name in self._absurd:
                plan.require(f"{name} = :was_{name}", **{f"was_{name}": self._absurd[name]})
                plan.set[name] = now + each + (BURST_SECONDS * 1000 if name == "http_at" else 0)
            elif at > now:
                plan.require(f"{name} > :now", now=now)
                plan.set[name] = Sum(name, each)
            else:
                plan.require(f"attribute_not_exists({name}) OR {name} <= :now", now=now)
                if name == own:
                    plan.set[name] = now + each
        if own not in self._absurd and self._known.end(lane) > now:
            plan.require(f"{own} <= :bound", bound=bound - lead)
            if near is not None:
                # The lane's end before this write, and what lies between it and the start.
                plan.set[last] = Sum(own, lead)
                if last not in self._removable or (lane, slot) in self._known.last:
                    plan.require(f"attribute_not_exists({last}) OR {last} <= :near", near=near)
        self._clean(plan, lane, last)
        return plan

    def _plan_free(self, lane: Lane, number: int) -> "_Plan":
        """Take a start that was given back."""
        plan = _Plan("free", 0, number)
        plan.require(f"contains({lane}_free, :number)", number=number)
        plan.add[f"{lane}_taken"] = {number}
        self._clean(plan, lane, "", number)
        return plan

    def _plan_turn(self, lane: Lane, slot: str, now: int, start: int, latest: int) -> "_Plan":
        """Make the owner's line longer: by a third of what the owners who wait leave to each, at least by one start.

        A third, so that the lane is used up also when two thirds of them stop waiting: turns that were given cannot be
        moved. The price is that a request asks up to three times while many owners wait.
        """
        line = f"{lane}_turn_{slot}"
        others = sum(at > now for (of, other), at in self._known.turns.items() if of == lane and other != slot)
        step = round(self._step(lane) * max(1.0, (others + 1) / _TURNS_PER_START) * _TURN_SLACK)
        plan = _Plan("turn", step)
        if self._known.turns.get((lane, slot), 0) >= start:
            plan.require(f"{line} BETWEEN :start AND :latest", start=start, latest=latest)
            plan.set[line] = Sum(line, step)
        else:
            if line not in self._removable or (lane, slot) in self._known.turns:
                plan.require(f"attribute_not_exists({line}) OR {line} < :start", start=start)
            plan.set[line] = start + step
        self._clean(plan, lane, line)
        return plan

    def _clean(self, plan: "_Plan", lane: Lane, own: str, number: int | None = None) -> None:
        """Remove what has passed, in the same write; `number` is the start that is taken by it."""
        plan.remove += [name for name in self._removable if name != own][:_REMOVED_MOST]
        if gone := self._passed(f"{lane}_free", number):
            plan.delete[f"{lane}_free"] = gone
        if number is None and (gone := self._passed(f"{lane}_taken")):
            plan.delete[f"{lane}_taken"] = gone

    def _passed(self, name: str, number: int | None = None) -> set[int]:
        """Numbers of a set whose starts have passed, and `number`."""
        lane, _, which = name.partition("_")
        known: frozenset[int] = (self._known.free if which == "free" else self._known.taken).get(lane, frozenset())
        now = self._now() * 1000
        return {each for each in known if each // _GENERATIONS < now or each == number}

    def _given_back(self, lane: Lane, now: int) -> list[int]:
        """Numbers of starts that were given back and can be reserved, the earliest first."""
        if len(self._known.taken.get(lane, ())) >= _FREE_MOST or f"{lane}_taken" in self._removable:
            return []
        earliest, end = max(now, self._known.blocked_until), self._next(lane, now)
        return sorted(n for n in self._known.free.get(lane, ()) if earliest <= n // _GENERATIONS < end)

    def _next(self, lane: Lane, now: int) -> int:
        """The start that the next reservation of a lane gives, in milliseconds since 1970."""
        end = self._known.end(lane)
        return max(now, end + self._lead(lane)) if end > now else now

    def _lead(self, lane: Lane) -> int:
        """How much later than the lane's end the next start is; less than nothing where bursts are allowed."""
        if lane == "queue":
            return 0
        return self._step(lane) - round(self._interval) - BURST_SECONDS * 1000

    def _step(self, lane: Lane) -> int:
        """By how much a reservation moves a lane on."""
        return round(self._interval / _QUEUED_SHARE if lane == "queue" else self._interval * (1 + self._uncounted))

    def _slot(self, lane: Lane, owner: str) -> str:
        """How attributes of an owner are named: by its own name, or where many wait already, by one for all others."""
        slot = owner.replace("-", "_")
        if not re.fullmatch("[a-z0-9][a-z0-9_]{0,31}", slot):
            return _OTHER
        named = {each for of, each in [*self._known.turns, *self._known.last] if of == lane}
        return slot if slot in named or len(named) < _LINES_MOST else _OTHER

    # -- pausing ----------------------------------------------------------------------------------------------

    def pause_now(self) -> Pause | None:
        """The pause, as it was a second ago at most."""
        return self._state().pause(self._now())

    def pause_automatically(self, reason: str) -> None:
        """Holds all submissions for `AUTOMATIC_PAUSE_SECONDS`; a pause by command is left as it is."""
        now = round(self._now() * 1000)
        replaceable = Condition(
            "attribute_not_exists(paused_until) OR paused_until <= :now OR paused_by = :by", now=now, by=AUTOMATIC
        )
        pause = _pause(now + AUTOMATIC_PAUSE_SECONDS * 1000, now, AUTOMATIC, reason)
        held = self._replace("paused_until", replaceable, set=pause)
        if held:
            logger.error("submissions are paused", reason=reason, seconds=AUTOMATIC_PAUSE_SECONDS)
            metrics.add_metric(name="Pauses", unit=MetricUnit.Count, value=1)

    def pause_by_command(self, reason: str) -> None:
        """Holds all submissions until `resume`.

        Raises:
            ClientError: It was not written.
        """
        self._table.update_item(_KEY, set=_pause(_FOREVER, round(self._now() * 1000), MANUAL, reason))

    def resume(self) -> None:
        """Ends any pause; without one it changes nothing.

        Raises:
            ClientError: It was not written.
        """
        self._table.update_item(_KEY, remove=_pause(0, 0, "", ""))

    # -- inside -----------------------------------------------------------------------------------------------

    def _state(self) -> LimiterState:
        """What is known, as it was a second ago at most; where the table fails, whatever is known."""
        if self._now() - self._known_at >= _CACHE_SECONDS:
            try:
                return self.limiter_state()
            except (ClientError, BotoCoreError):
                logger.exception("the limiter cannot be read")
        return self._known

    def _replace(self, name: str, condition: Condition, **changes: Any) -> bool | None:
        """As `_write`; a value that no rule can have written gives way, whatever the condition says of it."""
        held = self._write(condition, **changes)
        if held is False and name in self._absurd:
            held = self._write(Condition(f"{name} = :was", was=self._absurd[name]), **changes)
        return held

    def _write(self, condition: Condition, **changes: Any) -> bool | None:
        """One conditional update: whether its condition held, and None where the table failed."""
        try:
            self._know(self._table.update_item(_KEY, condition=condition, **changes))
        except ConditionFailed as failed:
            self._know(failed.item or {})
            return False
        except (ClientError, BotoCoreError):
            logger.exception("the limiter cannot be written")
            return None
        return True

    def _know(self, item: Mapping[str, Any]) -> LimiterState:
        now = self._now()
        read: dict[str, Any] = {name: item[name] for name in _TEXTS & item.keys() if isinstance(item[name], str)}
        absurd: dict[str, Any] = {}
        # Lanes last: how far ahead they may be is up to the block.
        for name in sorted(_NUMBERS & item.keys(), key=lambda name: name.endswith("_at")):
            number, farthest = _whole(item[name]), _FARTHEST_SECONDS.get(name)
            if name == "paused_until" and read.get("paused_by") != AUTOMATIC:
                farthest = None
            limit = math.inf if farthest is None else (now + farthest + _CLOCKS_SECONDS) * 1000
            if name in ("http_at", "queue_at"):
                limit = self._farthest(now, read.get("blocked_until", 0))
            if number is None or number > limit:
                absurd[name] = item[name]
            else:
                read[name] = number
        if absurd and absurd != self._absurd:
            logger.error("the limiter holds what no rule can have written: it counts as none", values=str(absurd)[:500])
        self._absurd = absurd
        lanes, self._removable = self._know_lanes(item, now, read.get("blocked_until", 0))
        self._known, self._known_at = LimiterState(**read, **lanes), now
        return self._known

    def _farthest(self, now: float, blocked_until: int) -> float:
        """Up to where rules move a lane."""
        return max((now + self.max_start_delay_seconds) * 1000, blocked_until) + _LANE_SECONDS * 1000

    def _know_lanes(self, item: Mapping[str, Any], now: float, blocked_until: int) -> tuple[dict[str, Any], list[str]]:
        """Attributes of owners, and sets of starts; and the names of those that have passed or mean nothing."""
        found: dict[str, dict[Any, Any]] = {"last": {}, "turns": {}, "free": {}, "taken": {}}
        removable: list[str] = []
        farthest = {"last": self._farthest(now, blocked_until), "turn": (now + HORIZON_SECONDS + _BLOCK_SECONDS) * 1000}
        for name in sorted(item):
            if match := _OF_OWNER.fullmatch(name):
                lane, kind, slot = match.groups()
                number = _whole(item[name])
                known = number is not None and number <= farthest[kind]
                if known:
                    found["turns" if kind == "turn" else kind][lane, slot] = number
                if number is None or not known or number <= (now - _PASSED_SECONDS) * 1000:
                    removable.append(name)
            elif match := _OF_FREE.fullmatch(name):
                if not isinstance(item[name], set) or None in map(_whole, item[name]):
                    removable.append(name)
                else:
                    found[match[2]][match[1]] = frozenset(item[name])
        return found, removable


@dataclass
class _Plan:
    """One conditional update, as it comes together.

    Attributes:
        kind: What it brings: `start`, `free` (a start that was given back) or `turn`.
        step: By how much it moves the lane or the line on.
        number: Of the start that was given back.
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
    def condition(self) -> Condition:
        """All conditions."""
        return reduce(and_, self.conditions)

    @property
    def changes(self) -> dict[str, Any]:
        """The changes, as `Table.update_item` takes them."""
        return {"set": self.set, "remove": self.remove, "add": self.add, "delete": self.delete}


_TEXTS = {name for name, field in LimiterState.__dataclass_fields__.items() if field.type is str}
_NUMBERS = {name for name, field in LimiterState.__dataclass_fields__.items() if field.type is int}


def _whole(value: Any) -> int | None:
    """A whole number of the table; None for anything else."""
    return value if type(value) is int else None


def _pause(until: int, now: int, by: str, reason: str) -> dict[str, Any]:
    return {"paused_until": until, "paused_at": now, "paused_by": by, "pause_reason": reason}
