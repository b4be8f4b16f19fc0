"""Effects of a change that could not be published: a queue of their own, so that the table's stream goes on.

`notifications.stream` gives each change of the table its effects one by one. An effect that fails (the bus refuses an
event, Step Functions throttle, an exception that nobody expected) is sent to this queue with what it takes to do it
again: the record of the stream, without the secrets in it. It is retried with exponential backoff for a day, then kept
in the dead-letter queue of changes. So trouble with the bus delays no webhook and repeats none, and no record holds up
the others of its shard.

Each retry is a message of its own, sent with a delay, and the message before is deleted. So SQS counts as receives only
those that the function died over, and moves such a message to the dead-letter queue after five.
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
"""How long an effect is retried: as long as the stream would have kept the record."""

_FIRST_WAIT_SECONDS = 5
# The longest delay of a message, and short enough that little is late once AWS is well again:
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html
_LONGEST_WAIT_SECONDS = 900

# What effects look at of an item as it was before: whether it is news.
_COMPARED = frozenset({"pk", "sk", "rank", "status", "visible", "output_digest", "logs_digest"})
# No effect needs them: the execution's own task token, a caller's, the payload. Of a webhook it matters only that there
# is one, since its URL is read again when it is called.
_LEFT_OUT = frozenset({"task_token", "json"})
_HIDDEN = {"webhook": {"S": "https://hidden.invalid/"}}


class Effect(StrEnum):
    """What a change has for an effect: each is done, fails and is retried without regard to the others."""

    WEBHOOKS = "webhooks"
    CALLERS = "callers"
    PIPELINE = "pipeline"
    EVENT = "event"


class UnreadableRetry(PredictionsError):
    """A message that is no retry of ours."""


@dataclass(frozen=True)
class Retry:
    """An effect that failed.

    Attributes:
        effect: Which one.
        record: The record of the stream, as far as the effect needs it.
        first_at: When it failed first, in Unix seconds: the backoff is computed from there.
        callers: Of `CALLERS`: the `sk` of those that are still to be told; None for all.
    """

    effect: Effect
    record: Mapping[str, Any]
    first_at: int
    callers: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls, effect: Effect, record: Mapping[str, Any], now: float, callers: tuple[str, ...] | None = None
    ) -> "Retry":
        """The first retry of an effect of a record."""
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
        """How long to wait before the next try: twice the time that has passed, 5 s to 15 min, give or take a fifth.

        Args:
            now: The time, in Unix seconds.
            jitter: Random, from 0 to 1.

        Returns:
            The seconds, or None where it is to be given up.
        """
        passed = now - self.first_at
        if passed >= RETRY_SECONDS:
            return None
        return min(round(retry_seconds(passed, _FIRST_WAIT_SECONDS, math.inf, jitter)), _LONGEST_WAIT_SECONDS)

    def message(self) -> str:
        """The message's body."""
        body: dict[str, Any] = {"effect": self.effect.value, "first_at": self.first_at, "record": self.record}
        if self.callers is not None:
            body["callers"] = list(self.callers)
        return json.dumps(body, separators=(",", ":"))

    @classmethod
    def read(cls, body: str) -> "Retry":
        """Reads a message's body.

        Raises:
            UnreadableRetry: It is none of ours.
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
        url: The queue.
        dead_letters_url: Where an effect goes that is given up.
        sqs: The client to use.
    """

    def __init__(self, url: str, dead_letters_url: str, sqs: "SQSClient") -> None:
        self._url = url
        self._sqs = sqs
        self._dead_letters = DeadLetterQueue(dead_letters_url, sqs)

    @classmethod
    def from_env(cls) -> "RetryQueue":
        """From `CHANGES_RETRY_QUEUE_URL` and `CHANGES_DEAD_LETTER_QUEUE_URL`."""
        return cls(os.environ["CHANGES_RETRY_QUEUE_URL"], os.environ["CHANGES_DEAD_LETTER_QUEUE_URL"], client("sqs"))

    def send(self, retry: Retry, delay_seconds: int) -> None:
        """Queues an effect. Twice: it is done twice, which receivers, rules and states can tell."""
        self._sqs.send_message(QueueUrl=self._url, MessageBody=retry.message(), DelaySeconds=delay_seconds)

    def give_up(self, retry: Retry, reason: str) -> None:
        """Keeps an effect in the dead-letter queue, with the reason."""
        self._dead_letters.send(json.dumps({**json.loads(retry.message()), "reason": reason}, separators=(",", ":")))


def read_dead_letter(body: str, now: float) -> Retry | None:
    """An effect that was given up, to be retried for another day; None where a dead letter is none."""
    try:
        return replace(Retry.read(body), first_at=int(now))
    except UnreadableRetry:
        return None
