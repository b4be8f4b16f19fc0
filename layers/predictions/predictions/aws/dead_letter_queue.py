"""Dead-letter queues: send, receive and delete messages that cannot be processed."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_ChangeMessageVisibilityBatch.html
_BATCH_LIMIT = 10


@dataclass(frozen=True)
class DeadMessage:
    """A message of a dead-letter queue.

    Attributes:
        id: The message's own id; one that SQS moved here keeps that of the queue it comes from.
        body: Its text.
        sender: The principal that sent it (`SenderId`).
        sent_at: When it was sent, in Unix seconds.
        moved: Whether SQS moved it here, after it had been received too often, so that all of it is its sender's;
            otherwise one of our functions put it here.
        attributes: The message attributes of its sender that are texts.
        receipt_handle: Deletes it.
    """

    id: str
    body: str
    sender: str
    sent_at: int
    moved: bool
    attributes: Mapping[str, str]
    receipt_handle: str


class DeadLetterQueue:
    """A dead-letter queue; it keeps messages for 14 days."""

    def __init__(self, url: str, sqs: "SQSClient") -> None:
        self._url = url
        self._sqs = sqs

    def send(self, body: str, attributes: Mapping[str, str] | None = None) -> None:
        """Send a message with message attributes."""
        self._sqs.send_message(
            QueueUrl=self._url,
            MessageBody=body,
            MessageAttributes={
                name: {"DataType": "String", "StringValue": value} for name, value in (attributes or {}).items()
            },
        )

    def receive(self, hidden_seconds: int) -> Iterator[DeadMessage]:
        """Receive all messages, each once; hide each from other receivers for a while.

        Of thousands, the first return before the last are reached: the iteration ends when it receives nothing new.
        """
        met: set[str] = set()
        while True:
            messages = self._sqs.receive_message(
                QueueUrl=self._url,
                MaxNumberOfMessages=10,
                VisibilityTimeout=hidden_seconds,
                WaitTimeSeconds=1,
                MessageSystemAttributeNames=["SenderId", "SentTimestamp", "DeadLetterQueueSourceArn"],
                MessageAttributeNames=["All"],
            ).get("Messages", [])
            new = [message for message in messages if message["MessageId"] not in met]
            if not new:
                return
            met |= {message["MessageId"] for message in new}
            for message in new:
                known = {str(name): value for name, value in message.get("Attributes", {}).items()}
                yield DeadMessage(
                    id=message["MessageId"],
                    body=message["Body"],
                    sender=known.get("SenderId", ""),
                    sent_at=int(known.get("SentTimestamp", "0")) // 1000,
                    moved="DeadLetterQueueSourceArn" in known,
                    attributes={
                        name: each["StringValue"]
                        for name, each in message.get("MessageAttributes", {}).items()
                        if "StringValue" in each
                    },
                    receipt_handle=message["ReceiptHandle"],
                )

    def release(self, receipt_handles: Iterable[str]) -> bool:
        """Make received messages visible again; return whether that worked for all of them.

        Never fails: a message that is not released stays hidden for the rest of the time given to `receive`, and one
        whose handle has expired is visible already. No queue is behind a dead-letter queue, so that receives are not
        counted against a limit.
        """
        done = True
        handles = list(receipt_handles)
        for start in range(0, len(handles), _BATCH_LIMIT):
            entries: Any = [
                {"Id": str(n), "ReceiptHandle": handle, "VisibilityTimeout": 0}
                for n, handle in enumerate(handles[start : start + _BATCH_LIMIT])
            ]
            try:
                answer = self._sqs.change_message_visibility_batch(QueueUrl=self._url, Entries=entries)
            except (ClientError, BotoCoreError):
                return False
            done = done and not answer.get("Failed")
        return done

    def delete(self, receipt_handle: str) -> None:
        """Delete a message that was received."""
        self._sqs.delete_message(QueueUrl=self._url, ReceiptHandle=receipt_handle)
