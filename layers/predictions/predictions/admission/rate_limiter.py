"""Rate limiter of creates: one rate for all sources, and a switch to pause them.

Both are one item (`pk` = `limiter`, `sk` = `creates`), so that one read is enough. Its times are milliseconds
since 1970. Of each lane, `http` and `queue`:

    {lane}_at                   the lane's end, with nanoseconds: for `http` when it is used up, at the full rate; for
                                `queue` the next free start, at nine tenths of the rate
    {lane}_free, {lane}_taken   released starts, and those of them that were reserved again

and of both:

    blocked_until   when Replicate takes creates again, after it said 429
    paused_until    until when nothing is submitted; `paused_by` and `pause_reason` say on whose behalf, and why

Each owner that waits has an item of its own in each lane (`pk` = `limiter#0` to `limiter#f`, `sk` = `{lane}#{owner}`):

    last_at   the last start that it has reserved, if that was not near
    turn_at   the end of its line: when its next request asks for a start

So a start is one write of one unit, however many owners wait: DynamoDB takes 1,000 a second for one partition key.

A create reserves its start by moving a lane on by one interval, in one write without a read before it (the generic
cell rate algorithm), so any number of functions do it at once and no lock is waited for. Each HTTP create moves the
other lane too: later reservations start behind it. A lane only moves forward, and no start time is handed out twice.

Starts are reserved at the last moment. A start that is at most `NEAR_SECONDS` ahead is anybody's. An owner reserves a
later one only while its last one is not further ahead than that, and its own item is written first: so the lane stays
about as short as that, owners alternate, and the single request of one owner waits seconds whatever the backlog of
another is. A request that is refused gets a turn: a time in its owner's own line at which to ask again. A turn holds
no start, so a line may be long, may move back when requests are canceled, and may be wrong: a request that finds the
lane idle takes the start, whatever turns are ahead.

A reserved start that is not used is released into a bounded set, from which another request takes that very start. The
set holds numbers (the start's milliseconds, and how often it was released), so that a write that AWS repeats cannot
put the same start into it twice.

A failure of the limiter never loses or delays a prediction: while the table fails, a create goes ahead without it, and
Replicate's own 429 holds it.

Hand-made: libraries that limit rates count in one process, or in Redis, and none hands out starts that lie ahead.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.admission.limiter_item import (
    AUTOMATIC,
    AUTOMATIC_PAUSE_SECONDS,
    FOREVER,
    MANUAL,
    Known,
    Lane,
    LimiterState,
    Milliseconds,
    OwnersLine,
    Pause,
    line_key,
    line_partitions,
    read_item,
    read_line,
)
from predictions.admission.schedule import (
    BURST_SECONDS,
    FREE_MOST,
    GENERATIONS,
    AskAgain,
    Plan,
    Reservation,
    Schedule,
    Start,
    TooLate,
    Update,
    step_of,
)
from predictions.aws.clients import client
from predictions.aws.dynamodb import Condition, ConditionFailed, IfNotExists, Key, Sum, Table
from predictions.observability import MetricUnit, logger, metrics

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient


QUIET_SECONDS = 10
"""A create that comes this long after the last one of its process is counted with the next one."""


MAX_START_DELAY_SECONDS = 3600
"""The largest `MaxStartDelaySeconds` of the template."""


_CACHE_SECONDS = 1.0
# Of what decides about a start that lies ahead.
_FRESH_SECONDS = 0.1
_LINES_MOST = 1000
_ATTEMPTS = 5
# A released start goes to the first request that takes it. After so many lost races, the lane is advanced instead.
_FREE_ATTEMPTS = 2
# A reservation that was not used in this time, as in a pause, expires: many of them would start at once.
_STALE_SECONDS = 30


_KEY = Key("limiter", "creates")


class Limiter:
    """The one limiter of a stack.

    Args:
        creates_per_minute: The rate.
        max_start_delay_seconds: How far ahead a start may be reserved, or promised to a caller of HTTP.
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
        self._now = now
        self._known = Known()
        self._lines: dict[tuple[Lane, str], tuple[float, OwnersLine]] = {}
        self._known_at = float("-inf")
        self._last_create = float("-inf")
        self._uncounted = 0

    @classmethod
    def from_env(cls) -> "Limiter":
        """Create from `TABLE_NAME`, `CREATES_PER_MINUTE` and `MAX_START_DELAY_SECONDS`."""
        return cls(
            os.environ["TABLE_NAME"],
            client("dynamodb"),
            creates_per_minute=int(os.environ["CREATES_PER_MINUTE"]),
            max_start_delay_seconds=int(os.environ["MAX_START_DELAY_SECONDS"]),
        )

    def limiter_state(self) -> LimiterState:
        """Read the item.

        Raises:
            ClientError: It cannot be read.
        """
        return self._know(self._table.get_item(_KEY, exact=True) or {})

    def lines(self) -> dict[tuple[str, str], float]:
        """Read the ends of all owners' lines that are ahead, by lane and owner, in seconds since 1970.

        Raises:
            ClientError: They cannot be read.
        """
        state, now = self.limiter_state(), self._now()
        ends: dict[tuple[str, str], Milliseconds] = {
            (lane, owner.replace("_", "-").removeprefix("-")): at for (lane, owner), at in state.turns.items()
        }
        for pk in line_partitions():
            for item in self._table.query(Condition("pk = :pk", pk=pk)):
                lane, _, owner = item["sk"].partition("#")
                line = read_line(item, state, now, self.max_start_delay_seconds)
                ends[lane, owner] = max(line.turn, ends.get((lane, owner), 0))
        return {key: float(at) / 1000 for key, at in sorted(ends.items()) if at > now * 1000}

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
        state = self._read_state()
        quiet = now - self._last_create >= QUIET_SECONDS
        self._last_create = now
        if quiet and state.http_at <= round((now + BURST_SECONDS) * 1000) - step_of(self.creates_per_minute):
            self._uncounted = 1
            return Start(now)
        return self._reserve("http", owner, latest, turn_at)

    def reserve_for_queue(self, owner: str, *, latest: float, turn_at: float | None = None) -> Reservation:
        """Reserve a start for a create of any other source, behind earlier reservations.

        Args:
            owner: Whose request it is.
            latest: The last moment at which it may start or have its turn, in seconds since 1970.
            turn_at: Its turn, where it has one.
        """
        return self._reserve("queue", owner, latest, turn_at)

    def too_late(self, owner: str, latest: float) -> TooLate | None:
        """Return the refusal of `reserve_for_caller`, or None; write nothing."""
        self._read_state()
        plan = self._plan("http", owner, round(latest * 1000), None, free=True)
        return plan if isinstance(plan, TooLate) else None

    def expected_start(self, lane: Lane, owner: str) -> float:
        """Estimate when a request made now would start, in seconds since 1970."""
        self._read_state()
        line = self._read_line(lane, owner)
        return float(max(self._schedule().next_start(lane), line.turn)) / 1000

    def is_idle(self, lane: Lane) -> bool:
        """Return whether a start is available now, as far as is known."""
        self._read_state()
        schedule = self._schedule()
        return schedule.next_start(lane) <= schedule.now_ms or bool(schedule.given_back(lane))

    def release(self, lane: Lane, number: int) -> None:
        """Release a reserved start for another request. Idempotent.

        Only for its holder, once nothing can start at it any more: a start whose holder may still use it would be
        handed out twice. Called too late, it changes nothing.
        """
        at, generation = divmod(number, GENERATIONS)
        if at <= self._now() * 1000 or generation + 1 == GENERATIONS:
            return
        free, taken, end = f"{lane}_free", f"{lane}_taken", at + (BURST_SECONDS * 1000 if lane == "http" else 0)
        has_room = Condition(f"attribute_not_exists({free}) OR size({free}) < :most", most=FREE_MOST)
        not_taken = Condition(f"NOT contains({taken}, :number)", number=number + 1)
        ahead = Condition(f"{lane}_at > :end", end=end)
        passed = {taken: gone} if (gone := self._schedule().passed(taken)) else {}
        if self._write(has_room & not_taken & ahead, add={free: {number + 1}}, delete=passed) is False:
            logger.info("start not released: too many are, it is released already, or its lane has restarted")

    def release_turn(self, lane: Lane, owner: str, step_ms: int) -> None:
        """Shorten an owner's line by a request that left it, if the write succeeds."""
        update = Update(set={"turn_at": Sum("turn_at", -step_ms)})
        update.require("turn_at >= :least", least=round(self._now() * 1000) + step_ms)
        self._write_line(lane, owner, update)

    def is_reserved(self, start: float) -> bool:
        """Return whether a reservation for `start`, a second that has come, still counts.

        Not if Replicate has responded 429 since, or if it was not used in time, as in a pause.
        """
        return (start + 1) * 1000 > self._read_state().blocked_until and self._now() - start <= _STALE_SECONDS

    def block(self, seconds: int) -> None:
        """Block all creates that are not reserved yet, for the time of Replicate's 429."""
        until = round((self._now() + seconds) * 1000)
        self._uncounted = 0
        # The burst is used up, or it would all be sent at that moment.
        for name, value in (("blocked_until", until), ("queue_at", until), ("http_at", until + BURST_SECONDS * 1000)):
            earlier = Condition(f"attribute_not_exists({name}) OR {name} < :value", value=value)
            # Released starts lie before the block, as does the lane that is moved by it.
            free = [f"{name.removesuffix('_at')}_free"] if name.endswith("_at") else []
            self._replace(name, earlier, set={name: value}, remove=free)

    def _reserve(self, lane: Lane, owner: str, latest: float, turn_at: float | None) -> Reservation:
        """Reserve a start or a turn; start now if the table fails.

        The known state selects the write, and the write's condition verifies that state. So the first attempt succeeds
        unless a lane has just run out or begun, an owner's start was just reserved, or a released start was just taken.
        """
        turn_ms = None if turn_at is None else round(turn_at * 1000)
        granted = False
        for attempt in range(_ATTEMPTS):
            free = attempt < _FREE_ATTEMPTS
            plan = self._plan(
                lane, owner, round(latest * 1000), turn_ms, free=free, granted=granted, contended=attempt > 0
            )
            if not isinstance(plan, Plan):
                return plan
            held: bool | None = True
            if plan.line:
                # If the function crashes after this, the owner has its next start a little later, and nothing is lost.
                held = self._write_line(lane, owner, plan.line)
                granted = granted or (held is True and plan.kind == "start")
            if held and plan.kind != "turn":
                held = self._write(plan.condition, **plan.changes)
            if held is None:
                self._uncounted = 0
                return Start(self._now())
            if held:
                return self._done(plan, lane, owner)
        logger.warning("the limiter is contended: a create goes uncounted")
        self._uncounted = 0
        return Start(self._now())

    def _plan(
        self,
        lane: Lane,
        owner: str,
        latest: int,
        turn: int | None,
        *,
        free: bool,
        granted: bool = False,
        contended: bool = False,
    ) -> Plan | AskAgain | TooLate:
        """Plan by what is known; the owner's line is read only if its request cannot start now."""
        schedule = self._schedule()
        line = OwnersLine()
        if schedule.next_start(lane) > schedule.now_ms:
            line = self._read_line(lane, owner)
            schedule = self._schedule()
        others = sum(
            of == lane and other != owner and each.turn > schedule.now_ms
            for (of, other), (_, each) in self._lines.items()
        )
        return schedule.plan(
            lane, owner, line, latest, turn, others=others, free=free, granted=granted, contended=contended
        )

    def _done(self, plan: Plan, lane: Lane, owner: str) -> Start | AskAgain:
        """Return what a write has brought, by the item as it is after it."""
        now = self._now()
        if plan.kind == "turn":
            _, line = self._lines[lane, owner]
            return AskAgain(int(line.turn - plan.step) / 1000, max(1, round(plan.step)))
        if plan.kind == "free":
            return Start(plan.number // GENERATIONS / 1000, plan.number)
        at = self._schedule().start_of(lane, plan.step)
        self._uncounted = 0
        return Start(at / 1000, at * GENERATIONS) if at > round(now * 1000) else Start(now)

    # -- pausing ----------------------------------------------------------------------------------------------

    def pause_now(self) -> Pause | None:
        """Return the pause, at most a second old, or None."""
        return self._read_state().pause(self._now())

    def stack_budget(self) -> tuple[int, int, int]:
        """Return the stack's budget, at most a second old: of a day, of a month (0: none), and for an unknown price."""
        state = self._read_state()
        return state.budget_day, state.budget_month, state.budget_unknown

    def change_stack_budget(
        self,
        *,
        set_: Mapping[str, int] | None = None,
        unless_set: Mapping[str, int] | None = None,
        remove: Iterable[str] = (),
    ) -> None:
        """Change the stack's budget.

        Args:
            set_: Attributes to set.
            unless_set: Those to set if they have no value and are not in `set_`.
            remove: Those to remove.

        Raises:
            ClientError: It was not written.
        """
        defaults = {name: IfNotExists(value) for name, value in (unless_set or {}).items()}
        self._table.update_item(_KEY, set={**defaults, **(set_ or {})}, remove=remove)

    def pause_automatically(self, reason: str) -> None:
        """Pause submissions for `AUTOMATIC_PAUSE_SECONDS`, unless paused by command."""
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
        """Pause all submissions until `resume`.

        Raises:
            ClientError: It was not written.
        """
        self._table.update_item(_KEY, set=_pause(FOREVER, round(self._now() * 1000), MANUAL, reason))

    def resume(self) -> None:
        """End any pause. Idempotent.

        Raises:
            ClientError: It was not written.
        """
        self._table.update_item(_KEY, remove=_pause(0, 0, "", ""))

    # -- inside -----------------------------------------------------------------------------------------------

    def _schedule(self) -> Schedule:
        """Return the limiter at this moment, by what is known."""
        return Schedule(
            self._known,
            self._now(),
            creates_per_minute=self.creates_per_minute,
            max_start_delay_seconds=self.max_start_delay_seconds,
            uncounted=self._uncounted,
        )

    def _read_state(self) -> LimiterState:
        """Return the item, at most a second old, or older while the table fails."""
        if self._now() - self._known_at >= _CACHE_SECONDS:
            try:
                return self.limiter_state()
            except (ClientError, BotoCoreError):
                logger.exception("the limiter cannot be read")
        return self._known.state

    def _replace(self, name: str, condition: Condition, **changes: Any) -> bool | None:
        """Write like `_write`, but always replace a value that no rule can have written."""
        held = self._write(condition, **changes)
        if held is False and name in self._known.absurd:
            held = self._write(Condition(f"{name} = :was", was=self._known.absurd[name]), **changes)
        return held

    def _write(self, condition: Condition | None, **changes: Any) -> bool | None:
        """Do one update; return whether its condition held, None on a failure."""
        try:
            self._know(self._table.update_item(_KEY, condition=condition, exact=True, **changes))
        except ConditionFailed as failed:
            self._know(failed.item or {})
            return False
        except (ClientError, BotoCoreError):
            logger.exception("the limiter cannot be written")
            return None
        return True

    def _read_line(self, lane: Lane, owner: str) -> OwnersLine:
        """Return an owner's line, and know the limiter's item, both just read; an empty line if the table fails."""
        now = self._now()
        try:
            if now - self._known_at > _FRESH_SECONDS:
                self.limiter_state()
            read_at, line = self._lines.get((lane, owner), (float("-inf"), OwnersLine()))
            if now - read_at > _FRESH_SECONDS:
                line = self._know_line(lane, owner, self._table.get_item(line_key(lane, owner), exact=True) or {})
        except (ClientError, BotoCoreError):
            logger.exception("an owner's line cannot be read")
            return OwnersLine()
        return line

    def _write_line(self, lane: Lane, owner: str, update: Update) -> bool | None:
        """Update an owner's line; return whether the condition held, None on a failure."""
        key = line_key(lane, owner)
        try:
            item = self._table.update_item(key, condition=update.condition, exact=True, **update.changes)
        except ConditionFailed as failed:
            self._know_line(lane, owner, failed.item or {})
            return False
        except (ClientError, BotoCoreError):
            logger.exception("an owner's line cannot be written")
            return None
        self._know_line(lane, owner, item)
        return True

    def _know_line(self, lane: Lane, owner: str, item: Mapping[str, Any]) -> OwnersLine:
        now = self._now()
        line = read_line(item, self._known.state, now, self.max_start_delay_seconds)
        if len(self._lines) >= _LINES_MOST:
            self._lines.clear()
        self._lines[lane, owner] = now, line
        return line

    def _know(self, item: Mapping[str, Any]) -> LimiterState:
        now = self._now()
        known = read_item(item, now, self.max_start_delay_seconds)
        if known.absurd and known.absurd != self._known.absurd:
            values = str(known.absurd)[:500]
            logger.error("the limiter holds what no rule can have written: it counts as none", values=values)
        self._known, self._known_at = known, now
        return known.state


def _pause(until: int, now: int, by: str, reason: str) -> dict[str, Any]:
    return {"paused_until": until, "paused_at": now, "paused_by": by, "pause_reason": reason}
