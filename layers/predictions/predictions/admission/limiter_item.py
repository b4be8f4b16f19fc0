"""The limiter's item as it is read: lanes, starts, lines, a block and a pause.

A value that no rule can have written (not a number, or further ahead than the rules allow), for example from a manual
edit or an earlier release, is ignored: creates go on at their rate, and the next reservation replaces it. A lane then
begins with its burst used up, since the earlier reservations are unknown. A pause that is not by Replicate counts
whatever its end is: an operator who may write the item wants it.

The item is read exactly: the write that replaces such a value names it, fraction included. A lane has nanoseconds, as
fractions of a millisecond, so that its rate is exact; elsewhere a fraction has no meaning, and is cut off.

Each owner that waits has an item of its own in each lane (`line_key`): this one stays below a kilobyte, and its writes
at one unit each, however many owners wait.
"""

import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

from predictions.aws.dynamodb import Key

AUTOMATIC_PAUSE_SECONDS = 300
"""For how long a 401 or 402 of Replicate pauses all submissions; then one of them tries again."""

HORIZON_SECONDS = 7 * 86400
"""No turn is further ahead: the longest deadline, a training's (`TrainingLifetimeSeconds`), is over then."""

MANUAL = "command"
AUTOMATIC = "Replicate"

FOREVER = 253_402_300_799_000  # the year 9999

# By so much the clocks of functions may differ.
_CLOCKS_SECONDS = 600
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
# Attributes of owners are removed once they have passed by this: the known state may be a second old, and one
# that an owner has just set again must not be removed.
_PASSED_SECONDS = 10
_OF_OWNER = re.compile(r"(http|queue)_(last|turn)_([a-z0-9_]{1,40})")
_OF_FREE = re.compile(r"(http|queue)_(free|taken)")

Lane = Literal["http", "queue"]

LANES: tuple[Lane, ...] = ("http", "queue")

Milliseconds = int | Decimal
"""A time since 1970, or a step, with nanoseconds."""

# Owners' lines are spread over so many partition keys: enough for DynamoDB's 1,000 writes a second and key, and few
# enough for the command `status` to read them all.
_LINE_KEYS = 16


@dataclass(frozen=True)
class Pause:
    """A pause of all submissions.

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
        """Return how many whole seconds it goes on, at most `limit`."""
        return limit if self.until is None else max(1, min(limit, int(self.until - now) + 1))


@dataclass(frozen=True)
class LimiterState:
    """The limiter's item; times are milliseconds since 1970, 0 if absent.

    Attributes:
        last: The last reserved start, by lane and owner, as the release before kept it here.
        turns: The end of the line, likewise.
        free: Numbers of starts that were given back, by lane.
        taken: Those that were reserved again, by lane.
        budget_day: The stack's budget of a day in micro-dollars, 0 without one: here, since each start reads this item.
        budget_month: That of a month.
        budget_unknown: What a run at an unknown price counts in them (see `money.budgets`).
    """

    http_at: Milliseconds = 0
    queue_at: Milliseconds = 0
    blocked_until: int = 0
    paused_until: int = 0
    paused_at: int = 0
    paused_by: str = ""
    pause_reason: str = ""
    budget_day: int = 0
    budget_month: int = 0
    budget_unknown: int = 0
    last: Mapping[tuple[str, str], int] = field(default_factory=dict)
    turns: Mapping[tuple[str, str], int] = field(default_factory=dict)
    free: Mapping[str, frozenset[int]] = field(default_factory=dict)
    taken: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def end(self, lane: Lane) -> Milliseconds:
        """Return a lane's end."""
        return self.http_at if lane == "http" else self.queue_at

    def pause(self, now: float) -> Pause | None:
        """Return the pause at that moment, or None."""
        if self.paused_until <= now * 1000:
            return None
        until = None if self.paused_until >= FOREVER else self.paused_until / 1000
        return Pause(until, self.paused_at / 1000, self.paused_by, self.pause_reason)


@dataclass(frozen=True)
class Known:
    """The result of reading the item.

    Attributes:
        state: What the rules go by.
        absurd: Values that no rule can have written, as they are in the table.
        removable: Names of attributes that have passed or mean nothing.
    """

    state: LimiterState = field(default_factory=LimiterState)
    absurd: Mapping[str, Any] = field(default_factory=dict)
    removable: Sequence[str] = ()


@dataclass(frozen=True)
class OwnersLine:
    """What one owner has in a lane, as its item says; times are milliseconds since 1970, 0 if absent.

    Attributes:
        last: The last start that it has reserved, if that was not near.
        turn: The end of its line: when its next request asks for a start.
        absurd: Values that no rule can have written, as they are in the table.
    """

    last: Milliseconds = 0
    turn: Milliseconds = 0
    absurd: Mapping[str, Any] = field(default_factory=dict)


def line_key(lane: Lane, owner: str) -> Key:
    """Return the key of an owner's line."""
    return Key(f"limiter#{zlib.crc32(owner.encode()) % _LINE_KEYS:x}", f"{lane}#{owner}")


def line_partitions() -> Iterator[str]:
    """Return the partition keys of all lines."""
    return (f"limiter#{n:x}" for n in range(_LINE_KEYS))


def read_line(item: Mapping[str, Any], state: LimiterState, now: float, max_start_delay_seconds: int) -> OwnersLine:
    """Read an owner's line, and leave out what no rule can have written; the arguments are those of `read_item`."""
    ahead = max((now + max_start_delay_seconds) * 1000, state.blocked_until)
    farthest = {"last_at": ahead + _LANE_SECONDS * 1000, "turn_at": (now + HORIZON_SECONDS + _BLOCK_SECONDS) * 1000}
    read: dict[str, Milliseconds] = {}
    absurd: dict[str, Any] = {}
    for name, limit in farthest.items():
        value = item.get(name, 0)
        if type(value) in (int, Decimal) and value <= limit:
            read[name] = value
        else:
            absurd[name] = value
    return OwnersLine(read.get("last_at", 0), read.get("turn_at", 0), absurd)


def read_item(item: Mapping[str, Any], now: float, max_start_delay_seconds: int) -> Known:
    """Read the item, and leave out what no rule can have written.

    Args:
        item: As the table has it, read exactly; empty if it is missing.
        now: The time, in seconds since 1970.
        max_start_delay_seconds: How far ahead a start may be reserved.
    """
    read: dict[str, Any] = {name: item[name] for name in _TEXTS & item.keys() if isinstance(item[name], str)}
    absurd: dict[str, Any] = {}

    def farthest_start() -> float:
        """Return up to where rules move a lane."""
        ahead = max((now + max_start_delay_seconds) * 1000, read.get("blocked_until", 0))
        return float(ahead + _LANE_SECONDS * 1000)

    # Lanes last: how far ahead they may be is up to the block.
    for name in sorted(_NUMBERS & item.keys(), key=lambda name: name in _LANE_ENDS):
        number: Milliseconds | None = _whole(item[name])
        farthest = _FARTHEST_SECONDS.get(name)
        if name == "paused_until" and read.get("paused_by") != AUTOMATIC:
            farthest = None
        limit = math.inf if farthest is None else (now + farthest + _CLOCKS_SECONDS) * 1000
        if name in _LANE_ENDS:
            limit = farthest_start()
        if number is None or number > limit:
            absurd[name] = item[name]
        else:
            read[name] = item[name] if name in _LANE_ENDS else number
    lanes, removable = _read_lanes(item, now, farthest_start())
    return Known(LimiterState(**read, **lanes), absurd, removable)


def _read_lanes(item: Mapping[str, Any], now: float, farthest_start: float) -> tuple[dict[str, Any], list[str]]:
    """Return owners' attributes and sets of starts, and the names of obsolete ones."""
    found: dict[str, dict[Any, Any]] = {"last": {}, "turns": {}, "free": {}, "taken": {}}
    removable: list[str] = []
    farthest = {"last": farthest_start, "turn": (now + HORIZON_SECONDS + _BLOCK_SECONDS) * 1000}
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
            if not isinstance(item[name], set) or any(type(number) is not int for number in item[name]):
                removable.append(name)
            else:
                found[match[2]][match[1]] = frozenset(item[name])
    return found, removable


_TEXTS = {name for name, field in LimiterState.__dataclass_fields__.items() if field.type is str}
_LANE_ENDS = frozenset(f"{lane}_at" for lane in LANES)
_NUMBERS = {name for name, field in LimiterState.__dataclass_fields__.items() if field.type is int} | _LANE_ENDS


def _whole(value: Any) -> int | None:
    """Return a number of the table without its fraction, or None for anything else."""
    return int(value) if type(value) in (int, Decimal) else None
