"""When a prediction may be created at Replicate: one rate for all sources, and one switch that holds them all.

Both are one item (`pk` = `limiter`, `sk` = `creates`), so that one read tells all of it. Its times are milliseconds
since 1970:

    http_at         until when the lane of HTTP callers is used up, at the full rate
    queue_at        the next free time in the lane of all others, at nine tenths of the rate
    blocked_until   when Replicate takes creates again, after it said 429
    paused_until    until when nothing is submitted; `paused_by` and `pause_reason` say who wants that, and why

A create reserves its start by moving a lane on by one interval, in one write without a read before it (the generic
cell rate algorithm): so any number of functions can do it at once, nobody waits for a lock, and who has to wait is told
for how long, once. Each HTTP create moves the other lane too: what is reserved after it starts later.

Nothing in here loses a prediction or keeps one: where the table fails, a create goes as if there were no limiter, and
Replicate's own 429 is what holds it.

Nor does a value that no rule can have written, no whole number or further ahead than `HORIZON_SECONDS` lets any be, as
by a hand that edits the table: it counts as none, creates go on at their rate, and the next reservation replaces it. A
lane begins anew with its burst used up, since nobody knows what was reserved. A pause that is not by Replicate counts
whatever its end is: somebody who may write the item wants it.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws import client
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
"""No start is reserved further ahead: the longest deadline, a training's (`TrainingLifetimeSeconds`), is over then."""

MANUAL = "command"
AUTOMATIC = "Replicate"

# What the queue may use of the rate; the rest keeps HTTP callers from having to wait behind what is reserved already.
_QUEUED_SHARE = 0.9
_CACHE_SECONDS = 1.0
_ATTEMPTS = 5
# A reservation that was not used in this time, as in a pause, is none any more: many of them would start at once.
_STALE_SECONDS = 30
_FOREVER = 253_402_300_799_000  # the year 9999
# By so much the clocks of functions may differ.
_CLOCKS_SECONDS = 600

Lane = Literal["http_at", "queue_at"]

_KEY = {"pk": {"S": "limiter"}, "sk": {"S": "creates"}}
_PAUSE = ("paused_until", "paused_at", "paused_by", "pause_reason")

# How far ahead rules put each of these at most; `upstream` takes a `Retry-After` up to an hour.
_BLOCK_SECONDS = 3600
_FARTHEST_SECONDS: dict[str, int] = {
    "http_at": HORIZON_SECONDS + _BLOCK_SECONDS,
    "queue_at": HORIZON_SECONDS + _BLOCK_SECONDS,
    "blocked_until": _BLOCK_SECONDS,
    "paused_until": AUTOMATIC_PAUSE_SECONDS,
    "paused_at": 0,
}


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
    """The limiter's item; milliseconds since 1970, 0 where there is none yet."""

    http_at: int = 0
    queue_at: int = 0
    blocked_until: int = 0
    paused_until: int = 0
    paused_at: int = 0
    paused_by: str = ""
    pause_reason: str = ""

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
        now: The time, in seconds since 1970.
    """

    def __init__(
        self,
        table_name: str,
        dynamodb: "DynamoDBClient",
        *,
        creates_per_minute: int = 600,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table_name = table_name
        self._dynamodb = dynamodb
        self._interval = 60_000 / creates_per_minute
        self._now = now
        self._known = LimiterState()
        # Values that no rule can have written, as they are in the table.
        self._absurd: dict[str, Any] = {}
        self._known_at = float("-inf")
        self._last_create = float("-inf")
        self._uncounted = 0

    @classmethod
    def from_env(cls) -> "Limiter":
        """From `TABLE_NAME` and `CREATES_PER_MINUTE`."""
        rate = int(os.environ["CREATES_PER_MINUTE"])
        return cls(os.environ["TABLE_NAME"], client("dynamodb"), creates_per_minute=rate)

    def limiter_state(self) -> LimiterState:
        """The item as it is now.

        Raises:
            ClientError: It cannot be read.
        """
        found = self._dynamodb.get_item(TableName=self._table_name, Key=_KEY, ConsistentRead=True)
        return self._know(found.get("Item", {}))

    # -- reserving --------------------------------------------------------------------------------------------

    def reserve_for_caller(self) -> float:
        """When a create of the HTTP API may start, in seconds since 1970; mostly now.

        A process whose last create is `QUIET_SECONDS` back does not write: it counts this one with its next, so that
        a lone prediction costs no write here. A process owes one create at most, since one that is older than the
        burst would have no effect any more. What the lane does not know of is therefore never more than the number of
        warm functions, once in `QUIET_SECONDS` each.
        """
        now = self._now()
        state = self._state()
        quiet = now - self._last_create >= QUIET_SECONDS
        self._last_create = now
        if quiet and state.http_at <= (now + BURST_SECONDS) * 1000 - self._interval:
            self._uncounted = 1
            return now
        step = round(self._interval * (1 + self._uncounted))
        self._uncounted = 0
        used_until = self._move({"http_at": step, "queue_at": step}, follows="queue_at")
        return max(now, (used_until - self._interval) / 1000 - BURST_SECONDS)

    def reserve_for_queue(self) -> float:
        """When a create of any other source may start, in seconds since 1970: behind what is reserved already."""
        step = round(self._interval / _QUEUED_SHARE)
        return max(self._now(), (self._move({"queue_at": step}) - step) / 1000)

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
            condition = f"attribute_not_exists({name}) OR {name} < :value"
            self._replace(name, f"SET {name} = :value", condition, {":value": value})

    def _move(self, steps: Mapping[Lane, int], *, follows: Lane | None = None) -> float:
        """Moves lanes on, in one write; returns where the first one ends then, in milliseconds, 0 if unknown.

        A lane that is not used up begins at this moment, and one that only `follows` is then left alone. Which lane is
        used up is the write's condition, and what is known says which to suppose: so it holds at the first try but
        where a lane has just run out or begun. One that is used up for as long as anything can wait is not moved on:
        who is told that end never starts.
        """
        now = round(self._now() * 1000)
        horizon = now + HORIZON_SECONDS * 1000
        first = next(iter(steps))
        for _ in range(_ATTEMPTS):
            changes: list[str] = []
            conditions: list[str] = []
            values: dict[str, int | str] = {":now": now}
            raw: dict[str, Any] = {}
            if (first_at := getattr(self._known, first)) > horizon:
                return float(first_at + steps[first])
            for name, step in steps.items():
                if name in self._absurd:
                    conditions.append(f"{name} = :was_{name}")
                    raw[f":was_{name}"] = self._absurd[name]
                    changes.append(f"{name} = :{name}")
                    values[f":{name}"] = now + step + (BURST_SECONDS * 1000 if name == "http_at" else 0)
                elif (at := getattr(self._known, name)) > horizon:
                    continue
                elif at > now:
                    changes.append(f"{name} = {name} + :{name}")
                    conditions.append(f"{name} > :now AND {name} <= :horizon")
                    values[f":{name}"], values[":horizon"] = step, horizon
                else:
                    conditions.append(f"(attribute_not_exists({name}) OR {name} <= :now)")
                    if name != follows:
                        changes.append(f"{name} = :{name}")
                        values[f":{name}"] = now + step
            held = self._write("SET " + ", ".join(changes), " AND ".join(conditions), values, raw)
            if held is None:
                return 0.0
            if held:
                return float(getattr(self._known, first))
        logger.warning("the limiter is contended: a create goes uncounted")
        return 0.0

    # -- pausing ----------------------------------------------------------------------------------------------

    def pause_now(self) -> Pause | None:
        """The pause, as it was a second ago at most."""
        return self._state().pause(self._now())

    def pause_automatically(self, reason: str) -> None:
        """Holds all submissions for `AUTOMATIC_PAUSE_SECONDS`; a pause by command is left as it is."""
        now = round(self._now() * 1000)
        values: dict[str, int | str] = {
            ":until": now + AUTOMATIC_PAUSE_SECONDS * 1000,
            ":now": now,
            ":by": AUTOMATIC,
            ":reason": reason,
        }
        held = self._replace(
            "paused_until",
            "SET paused_until = :until, paused_at = :now, paused_by = :by, pause_reason = :reason",
            "attribute_not_exists(paused_until) OR paused_until <= :now OR paused_by = :by",
            values,
        )
        if held:
            logger.error("submissions are paused", reason=reason, seconds=AUTOMATIC_PAUSE_SECONDS)
            metrics.add_metric(name="Pauses", unit=MetricUnit.Count, value=1)

    def pause_by_command(self, reason: str) -> None:
        """Holds all submissions until `resume`.

        Raises:
            ClientError: It was not written.
        """
        self._dynamodb.update_item(
            TableName=self._table_name,
            Key=_KEY,
            UpdateExpression="SET paused_until = :until, paused_at = :now, paused_by = :by, pause_reason = :reason",
            ExpressionAttributeValues=_values(
                {":until": _FOREVER, ":now": round(self._now() * 1000), ":by": MANUAL, ":reason": reason}
            ),
        )

    def resume(self) -> None:
        """Ends any pause; without one it changes nothing.

        Raises:
            ClientError: It was not written.
        """
        self._dynamodb.update_item(TableName=self._table_name, Key=_KEY, UpdateExpression=f"REMOVE {', '.join(_PAUSE)}")

    # -- inside -----------------------------------------------------------------------------------------------

    def _state(self) -> LimiterState:
        """What is known, as it was a second ago at most; where the table fails, whatever is known."""
        if self._now() - self._known_at >= _CACHE_SECONDS:
            try:
                return self.limiter_state()
            except (ClientError, BotoCoreError):
                logger.exception("the limiter cannot be read")
        return self._known

    def _replace(self, name: str, expression: str, condition: str, values: Mapping[str, int | str]) -> bool | None:
        """As `_write`; a value that no rule can have written gives way, whatever the condition says of it."""
        held = self._write(expression, condition, values)
        if held is False and name in self._absurd:
            held = self._write(expression, f"{name} = :was", values, {":was": self._absurd[name]})
        return held

    def _write(
        self, expression: str, condition: str, values: Mapping[str, int | str], raw: Mapping[str, Any] | None = None
    ) -> bool | None:
        """One conditional update: whether its condition held, and None where the table failed."""
        try:
            answer = self._dynamodb.update_item(
                TableName=self._table_name,
                Key=_KEY,
                UpdateExpression=expression,
                ConditionExpression=condition,
                ExpressionAttributeValues={**_values(values), **(raw or {})},
                ReturnValues="ALL_NEW",
                ReturnValuesOnConditionCheckFailure="ALL_OLD",
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException as error:
            there: Any = error.response
            self._know(there.get("Item", {}))
            return False
        except (ClientError, BotoCoreError):
            logger.exception("the limiter cannot be written")
            return None
        self._know(answer["Attributes"])
        return True

    def _know(self, item: Mapping[str, Any]) -> LimiterState:
        now = self._now()
        read: dict[str, Any] = {name: str(value.get("S", "")) for name, value in item.items() if name in _TEXTS}
        absurd: dict[str, Any] = {}
        for name in _NUMBERS & item.keys():
            number, farthest = _whole(item[name]), _FARTHEST_SECONDS.get(name)
            if name == "paused_until" and read.get("paused_by") != AUTOMATIC:
                farthest = None
            if number is None or (farthest is not None and number > (now + farthest + _CLOCKS_SECONDS) * 1000):
                absurd[name] = item[name]
            else:
                read[name] = number
        if absurd and absurd != self._absurd:
            logger.error("the limiter holds what no rule can have written: it counts as none", values=str(absurd)[:500])
        self._absurd = absurd
        self._known, self._known_at = LimiterState(**read), now
        return self._known


_TEXTS = {name for name, field in LimiterState.__dataclass_fields__.items() if field.type is str}
_NUMBERS = LimiterState.__dataclass_fields__.keys() - _TEXTS


def _whole(value: Mapping[str, Any]) -> int | None:
    """A whole number of the table; None for anything else."""
    try:
        return int(value["N"])
    except (KeyError, ValueError):
        return None


def _values(values: Mapping[str, int | str]) -> dict[str, Any]:
    return {name: {"S": value} if isinstance(value, str) else {"N": str(value)} for name, value in values.items()}
