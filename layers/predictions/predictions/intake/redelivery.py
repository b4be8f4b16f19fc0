"""Received messages of the requests queue: in which order they are handled, and how often each was tried.

Lambda hands over several messages at once. When it kills the function over one of them, by memory or by time, all of
them return to the queue. No message may pay for another one, so

- a message is deleted as soon as it is done: a kill afterwards does not bring it back;
- messages that are received for the first time are handled first, in the order of their ids, and those that come again
  after them, at every second receive in the opposite order. What comes back from a kill is the message it happened
  over and those behind it: next time that message is the last of them;
- SQS counts receives, also of messages that nobody looked at. So its own limit is high, and a message is given up by
  what is counted here: tries that were begun and never finished. The first try of a message is not counted, which
  saves a write for each message that needs only one;
- a message for which no time is left is untouched: nothing is counted, and it returns soon.

    pk = message#{id}, sk = tries      `begun` and `failed` (begun, and ended by an error), for messages that come again
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
"""What one message may take when AWS is slow: with less time left it stays in the queue, untouched."""

KILLS_LIMIT = 3
"""How many tries of a message may be cut off, besides its first one, before it is given up."""

FAILURES_LIMIT = 20
"""How many tries of a message may fail by an error, such as AWS's: an hour, at the queue's visibility timeout."""

RETURN_SECONDS = 30
"""When a message returns that nobody looked at."""

_COUNTED_SECONDS = 15 * 86400  # longer than the queue keeps a message


@dataclass(frozen=True)
class Tries:
    """How often a message was tried, its first receive left out.

    Attributes:
        begun: Tries that were begun.
        failed: Those of them that ended by an error; the rest were cut off.
    """

    begun: int = 0
    failed: int = 0

    @property
    def killed(self) -> int:
        """Tries that were cut off: the function was stopped over the message, or ran out of time for it."""
        return self.begun - self.failed


@dataclass(frozen=True)
class GivenUp:
    """Why a message is not tried again.

    Attributes:
        reason: For the person who finds it among the dead letters.
        killed: Whether its tries were cut off, rather than refused by AWS.
    """

    reason: str
    killed: bool


class ReceivedRequests:
    """Handles received messages one by one.

    Args:
        table_name: Where tries are counted.
        dynamodb: The client to use.
        queue_url: The requests queue.
        sqs: The client to use.
        now: The time, in seconds since 1970.
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
        """From `TABLE_NAME` and `REQUESTS_QUEUE_URL`."""
        return cls(os.environ["TABLE_NAME"], client("dynamodb"), os.environ["REQUESTS_QUEUE_URL"], client("sqs"))

    def handle(
        self,
        records: Sequence[Mapping[str, Any]],
        take: Callable[[Mapping[str, Any]], None],
        give_up: Callable[[Mapping[str, Any], GivenUp], None],
        remaining_seconds: Callable[[], float],
    ) -> list[str]:
        """Handle each message by itself.

        Args:
            records: Of an SQS event. One without a receipt handle was redriven by an invocation.
            take: Handles one; an error leaves it in the queue.
            give_up: Keeps one that was tried too often; likewise.
            remaining_seconds: How long the function may still run.

        Returns:
            The ids of the messages that stay in the queue.
        """
        stay: list[str] = []
        new = [record for record in records if _receives(record) <= 1]
        again = [record for record in records if _receives(record) > 1]
        waiting = [(record, Tries()) for record in _in_turn(new)]
        # Counts are read after the new messages are done: if they cannot be read, only the others wait.
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
        """Whether a message is done; else it stays in the queue."""
        counted = _receives(record) > 1
        try:
            before = self._begin(record) if counted else Tries()
        except (ClientError, BotoCoreError):
            logger.exception("try not counted, so not begun")
            # It may have been counted, its answer lost: without this, that would count as cut off.
            self._count_failed(record)
            return False
        try:
            if reason := _given_up(before):
                give_up(record, reason)
            else:
                take(record)
        except TooSlow:
            return False  # counts as cut off
        except Exception:  # noqa: BLE001  # `take` and `give_up` have logged it; the next message is none of its business
            if counted:
                self._count_failed(record)
            return False
        return True

    def _counted(self, records: Sequence[Mapping[str, Any]], stay: list[str]) -> list[tuple[Mapping[str, Any], Tries]]:
        """Messages that come again, with their tries, those that were cut off least often first."""
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
        """Count a try before it begins; the tries before it."""
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
        """Delete a message that is done, before another one begins. Lambda does it too, if the function lives."""
        if handle := record.get("receiptHandle"):
            try:
                self._sqs.delete_message(QueueUrl=self._queue_url, ReceiptHandle=handle)
            except (ClientError, BotoCoreError):
                logger.exception("message not deleted at once")

    def _return_soon(self, records: Iterable[Mapping[str, Any]]) -> None:
        for record in records:
            if handle := record.get("receiptHandle"):
                try:
                    self._sqs.change_message_visibility(
                        QueueUrl=self._queue_url, ReceiptHandle=handle, VisibilityTimeout=RETURN_SECONDS
                    )
                except (ClientError, BotoCoreError):
                    # It returns after the visibility timeout.
                    logger.exception("untouched message not returned soon")
                    return


def _given_up(before: Tries) -> GivenUp | None:
    """Why a message is not tried once more; None where it is."""
    if before.killed >= KILLS_LIMIT:
        reason = (
            f"start_from_queue did not finish it in {before.killed + 1} tries: it ran out of memory or time over it."
            " See its log; make what the message names smaller."
        )
        return GivenUp(reason, killed=True)
    if before.failed >= FAILURES_LIMIT:
        reason = f"start_from_queue failed in each of {before.failed + 1} tries: see its log, then redrive it."
        return GivenUp(reason, killed=False)
    return None


def _in_turn(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages in the order of their ids, and in the opposite order at their second, fourth, … receive."""
    ordered = sorted(records, key=lambda record: str(record["messageId"]))
    return [record for record in ordered if _receives(record) % 2] + [
        record for record in reversed(ordered) if not _receives(record) % 2
    ]


def _receives(record: Mapping[str, Any]) -> int:
    return int(record["attributes"].get("ApproximateReceiveCount", "1"))


def _tries(item: Mapping[str, Any]) -> Tries:
    return Tries(item.get("begun", 0), item.get("failed", 0))
