"""Retries of a change's failed effects: a queue of their own, so that the table's stream goes on.

`notifications.stream` performs the effects of each change of the table one by one. An effect that fails (the bus
rejects an event, Step Functions throttles, an unexpected exception) is sent to this queue with the data to repeat it:
the record of the stream, without the secrets in it. The effect is retried with exponential backoff for a day, then
kept in the dead-letter queue of changes. So trouble with the bus delays no webhook and repeats none, and no record
blocks the others of its shard.

Each retry is a message of its own, sent with a delay, and the previous message is deleted. So SQS counts as receives
only those during which the function crashed, and moves such a message to the dead-letter queue after five.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from predictions.aws.clients import client
from predictions.aws.dead_letter_queue import DeadLetterQueue
from predictions.clock import retry_seconds
from predictions.errors import PredictionsError

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

RETRY_SECONDS = 24 * 3600
"""How long an effect is retried: the retention of the stream."""

_FIRST_WAIT_SECONDS = 5
# The longest delay of a message, short enough that little is late once AWS has recovered:
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html
_LONGEST_WAIT_SECONDS = 900

# The attributes of the old image that effects compare to detect a change.
_COMPARED = frozenset({"pk", "sk", "rank", "status", "visible", "output_digest", "logs_digest", "cost_micro_dollars"})
# No effect needs them: the execution's own task token, a caller's, the payload. Of a webhook only its presence
# matters, since its URL is read again when it is called.
_LEFT_OUT = frozenset({"task_token", "json", "input_json", "result_json"})
_HIDDEN = {"webhook": {"S": "https://hidden.invalid/"}}


class Effect(StrEnum):
    """The effects of a change: each is performed, fails and is retried independently."""

    WEBHOOKS = "webhooks"
    CALLERS = "callers"
    PIPELINE = "pipeline"
    BUDGET = "budget"
    USAGE = "usage"
    EVENT = "event"


class UnreadableRetry(PredictionsError):
    """The message is not a retry of this stack."""


@dataclass(frozen=True)
class Retry:
    """An effect that failed.

    Attributes:
        effect: The effect.
        record: The record of the stream, with the parts that the effect needs.
        first_at: When it first failed, in Unix seconds: the backoff is computed from there.
        callers: For `CALLERS`: the `sk` of those still to be notified; None for all.
    """

    effect: Effect
    record: Mapping[str, Any]
    first_at: int
    callers: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls, effect: Effect, record: Mapping[str, Any], now: float, callers: tuple[str, ...] | None = None
    ) -> "Retry":
        """Build the first retry of an effect of a record."""
        change = record["dynamodb"]
        kept: dict[str, Any] = {
            "SequenceNumber": str(change["SequenceNumber"]),
            "ApproximateCreationDateTime": float(change["ApproximateCreationDateTime"]),
            "Keys": change["Keys"],
        }
        new = {name: value for name, value in (change.get("NewImage") or {}).items() if name not in _LEFT_OUT}
        kept["NewImage"] = new | {name: value for name, value in _HIDDEN.items() if name in new}
        if old := change.get("OldImage"):
            kept["OldImage"] = {name: value for name, value in old.items() if name in _COMPARED}
        return cls(effect, {"eventName": record.get("eventName", "MODIFY"), "dynamodb": kept}, int(now), callers)

    def wait_seconds(self, now: float, jitter: float) -> int | None:
        """Return the delay before the next try, or None to give up.

        The delay is twice the time that has passed, from 5 s to 15 min, with a jitter of a fifth.

        Args:
            now: The time, in Unix seconds.
            jitter: Random, from 0 to 1.

        Returns:
            The seconds, or None if the effect is given up.
        """
        passed = now - self.first_at
        if passed >= RETRY_SECONDS:
            return None
        return min(round(retry_seconds(passed, _FIRST_WAIT_SECONDS, math.inf, jitter)), _LONGEST_WAIT_SECONDS)

    def message(self) -> str:
        """Return the message's body."""
        body: dict[str, Any] = {"effect": self.effect.value, "first_at": self.first_at, "record": self.record}
        if self.callers is not None:
            body["callers"] = list(self.callers)
        return json.dumps(body, separators=(",", ":"))

    @classmethod
    def read(cls, body: str) -> "Retry":
        """Parse a message's body.

        Raises:
            UnreadableRetry: The message is not a retry of this stack.
        """
        try:
            message = json.loads(body)
            callers = message.get("callers")
            retry = cls(
                Effect(message["effect"]),
                message["record"],
                int(message["first_at"]),
                tuple(map(str, callers)) if callers is not None else None,
            )
            str(retry.record["dynamodb"]["Keys"]["pk"]["S"])
            float(retry.record["dynamodb"]["ApproximateCreationDateTime"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UnreadableRetry("not a retry: effect, first_at and record are needed") from None
        return retry


class RetryQueue:
    """The queue of effects that failed.

    Args:
        dead_letters_url: The queue for effects that are given up.
    """

    def __init__(self, url: str, dead_letters_url: str, sqs: "SQSClient") -> None:
        self._url = url
        self._sqs = sqs
        self._dead_letters = DeadLetterQueue(dead_letters_url, sqs)

    @classmethod
    def from_env(cls) -> "RetryQueue":
        """Build from `CHANGES_RETRY_QUEUE_URL` and `CHANGES_DEAD_LETTER_QUEUE_URL`."""
        return cls(os.environ["CHANGES_RETRY_QUEUE_URL"], os.environ["CHANGES_DEAD_LETTER_QUEUE_URL"], client("sqs"))

    def send(self, retry: Retry, delay_seconds: int) -> None:
        """Queue an effect; targets deduplicate an effect that is performed twice."""
        self._sqs.send_message(QueueUrl=self._url, MessageBody=retry.message(), DelaySeconds=delay_seconds)

    def give_up(self, retry: Retry, reason: str) -> None:
        """Send an effect to the DLQ, with the reason."""
        self._dead_letters.send(json.dumps({**json.loads(retry.message()), "reason": reason}, separators=(",", ":")))


def read_dead_letter(body: str, now: float) -> Retry | None:
    """Return a given-up effect, to retry for another day, or None if it is not one."""
    try:
        return replace(Retry.read(body), first_at=int(now))
    except UnreadableRetry:
        return None
