"""Redelivery of messages of the requests queue: processing order, and the number of tries.

Lambda hands over several messages at once. If it kills the function during one of them, by memory or by time, all of
them return to the queue. No message may suffer for another one, so

- a message is deleted as soon as it is done: a kill afterwards does not bring it back;
- messages that are received for the first time are processed first, in the order of their ids, and redelivered ones
  after them, at every second receive in the opposite order. After a kill, the message that caused it and those behind
  it return: next time that message is the last of them;
- SQS counts receives, also of messages that were not processed. So its own limit is high, and a message is given up by
  the counts kept here: tries that were begun and never finished. The first try of a message is not counted, which
  saves a write for each message that needs only one;
- a message for which no time is left is untouched: nothing is counted, and it returns soon.

    pk = message#{id}, sk = tries      `begun` and `failed` (begun, and ended by an error), for redelivered messages
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import client
from predictions.aws.dynamodb import Table
from predictions.observability import logger
from predictions.store.keys import message_key
from predictions.templating import TooSlow

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_sqs import SQSClient

NEEDED_SECONDS = 10
"""The time that one message may need when AWS is slow: with less time left it stays in the queue, untouched."""

KILLS_LIMIT = 3
"""The number of killed tries, besides the first one, after which a message is given up."""

FAILURES_LIMIT = 20
"""The number of tries that may fail by an error, such as AWS's: an hour, at the queue's visibility timeout."""

RETURN_SECONDS = 30
"""Seconds until an untouched message returns."""

_COUNTED_SECONDS = 15 * 86400  # longer than the queue's retention


@dataclass(frozen=True)
class Tries:
    """Counts of a message's tries, without its first receive.

    Attributes:
        begun: Tries that were begun.
        failed: Tries that ended by an error; the rest were killed.
    """

    begun: int = 0
    failed: int = 0

    @property
    def killed(self) -> int:
        """Return the tries that were killed, or for which time ran out."""
        return self.begun - self.failed


@dataclass(frozen=True)
class GivenUp:
    """The reason why a message is not retried.

    Attributes:
        reason: For the person who finds it in the dead-letter queue.
        killed: Whether its tries were killed, rather than failed by an error of AWS.
    """

    reason: str
    killed: bool


class ReceivedRequests:
    """Processes received messages one by one.

    Args:
        table_name: The table that counts tries.
        queue_url: The requests queue.
    """

    def __init__(
        self,
        table_name: str,
        dynamodb: "DynamoDBClient",
        queue_url: str,
        sqs: "SQSClient",
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table = Table(table_name, dynamodb)
        self._queue_url = queue_url
        self._sqs = sqs
        self._now = now

    @classmethod
    def from_env(cls) -> "ReceivedRequests":
        """Build from `TABLE_NAME` and `REQUESTS_QUEUE_URL`."""
        return cls(os.environ["TABLE_NAME"], client("dynamodb"), os.environ["REQUESTS_QUEUE_URL"], client("sqs"))

    def handle(
        self,
        records: Sequence[Mapping[str, Any]],
        take: Callable[[Mapping[str, Any]], None],
        give_up: Callable[[Mapping[str, Any], GivenUp], None],
        remaining_seconds: Callable[[], float],
    ) -> list[str]:
        """Process each message independently and return the ids of those to retry.

        Args:
            records: The records of an SQS event. One without a receipt handle was redriven by an invocation.
            take: Processes a message; an error leaves it in the queue.
            give_up: Sends a message that was tried too often to the DLQ; an error leaves it in the queue.
            remaining_seconds: How long the function may still run.

        Returns:
            The ids of the messages that stay in the queue.
        """
        stay: list[str] = []
        new = [record for record in records if _receives(record) <= 1]
        again = [record for record in records if _receives(record) > 1]
        waiting = [(record, Tries()) for record in _in_turn(new)]
        # Counts are read after the new messages are done: if they cannot be read, only redelivered messages wait.
        while waiting or again:
            if not waiting:
                waiting, again = self._counted(again, stay), []
                continue
            if remaining_seconds() < NEEDED_SECONDS:
                left = [record for record, _ in waiting] + again
                logger.warning("no time left", messages=len(left))
                self._return_soon(left)
                return stay + [record["messageId"] for record in left]
            record, _ = waiting.pop(0)
            if not self._handled(record, take, give_up):
                stay.append(record["messageId"])
            elif waiting or again:
                self._delete(record)
        return stay

    def _handled(
        self,
        record: Mapping[str, Any],
        take: Callable[[Mapping[str, Any]], None],
        give_up: Callable[[Mapping[str, Any], GivenUp], None],
    ) -> bool:
        """Process a message; return whether it is done, or False if it stays in the queue."""
        counted = _receives(record) > 1
        try:
            before = self._begin(record) if counted else Tries()
        except (ClientError, BotoCoreError):
            logger.exception("try not counted, message left in the queue")
            # The write may have succeeded with its response lost: without this, the try would count as killed.
            self._count_failed(record)
            return False
        try:
            if reason := _given_up(before):
                give_up(record, reason)
            else:
                take(record)
        except TooSlow:
            return False  # counts as killed
        except Exception:  # noqa: BLE001  # `take` and `give_up` have logged it; the next message is independent
            if counted:
                self._count_failed(record)
            return False
        return True

    def _counted(self, records: Sequence[Mapping[str, Any]], stay: list[str]) -> list[tuple[Mapping[str, Any], Tries]]:
        """Return redelivered messages with their tries, the least often killed first."""
        try:
            keys = [message_key(record["messageId"]) for record in records]
            found = self._table.read_items(keys)
        except (ClientError, BotoCoreError):
            logger.exception("tries not read")
            stay += [record["messageId"] for record in records]
            return []
        tries = [_tries(found.get(key, {})) for key in keys]
        by_id = {record["messageId"]: each for record, each in zip(records, tries, strict=True)}
        in_turn = sorted(_in_turn(records), key=lambda record: by_id[record["messageId"]].killed)
        return [(record, by_id[record["messageId"]]) for record in in_turn]

    def _begin(self, record: Mapping[str, Any]) -> Tries:
        """Count a try before it begins and return the previous tries."""
        after = self._add(record, "begun")
        return Tries(after.begun - 1, after.failed)

    def _count_failed(self, record: Mapping[str, Any]) -> None:
        try:
            self._add(record, "failed")
        except (ClientError, BotoCoreError):
            logger.exception("failed try not counted")

    def _add(self, record: Mapping[str, Any], count: str) -> Tries:
        expires = int(self._now()) + _COUNTED_SECONDS
        return _tries(
            self._table.update_item(message_key(record["messageId"]), set={"expires_at": expires}, add={count: 1})
        )

    def _delete(self, record: Mapping[str, Any]) -> None:
        """Delete a completed message before the next one begins.

        Lambda deletes it too, if the function returns.
        """
        if handle := record.get("receiptHandle"):
            try:
                self._sqs.delete_message(QueueUrl=self._queue_url, ReceiptHandle=handle)
            except (ClientError, BotoCoreError):
                logger.exception("message not deleted yet")

    def _return_soon(self, records: Iterable[Mapping[str, Any]]) -> None:
        for record in records:
            if handle := record.get("receiptHandle"):
                try:
                    self._sqs.change_message_visibility(
                        QueueUrl=self._queue_url, ReceiptHandle=handle, VisibilityTimeout=RETURN_SECONDS
                    )
                except (ClientError, BotoCoreError):
                    # The messages return after the visibility timeout.
                    logger.exception("untouched message not returned soon")
                    return


def _given_up(before: Tries) -> GivenUp | None:
    """Return why a message is not retried, or None if it is."""
    if before.killed >= KILLS_LIMIT:
        reason = (
            f"start_from_queue did not finish it in {before.killed + 1} tries: it ran out of memory or time."
            " See its log; reduce the size of the input or files that the message names."
        )
        return GivenUp(reason, killed=True)
    if before.failed >= FAILURES_LIMIT:
        reason = f"start_from_queue failed in each of {before.failed + 1} tries. See its log, then redrive the message."
        return GivenUp(reason, killed=False)
    return None


def _in_turn(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Sort messages by id, in reverse at their second, fourth, … receive."""
    ordered = sorted(records, key=lambda record: str(record["messageId"]))
    return [record for record in ordered if _receives(record) % 2] + [
        record for record in reversed(ordered) if not _receives(record) % 2
    ]


def _receives(record: Mapping[str, Any]) -> int:
    return int(record["attributes"].get("ApproximateReceiveCount", "1"))


def _tries(item: Mapping[str, Any]) -> Tries:
    return Tries(item.get("begun", 0), item.get("failed", 0))
