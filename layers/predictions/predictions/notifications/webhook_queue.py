"""Queue of webhooks to callers: which webhooks a change of the table requires, and their messages.

A delivery is one webhook of one prediction, batch or pipeline. Its message has ids and times only: the body for the
receiver is read from the table when it is sent, by `notifications.webhook_sender`.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from predictions.aws.clients import client
from predictions.aws.dead_letter_queue import DeadLetterQueue
from predictions.clock import retry_seconds
from predictions.errors import PredictionsError
from predictions.status import DEFAULT_WEBHOOK_EVENTS, Status

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

EVENTS = ("start", "output", "logs", "completed")

GROUP_EVENTS = ("batch.completed", "pipeline.completed")
"""The events of batches and pipelines: names that earlier releases leave in the queue."""

RETRY_SECONDS = 24 * 3600
"""How long `completed` is tried."""

RUNNING_RETRY_SECONDS = 60
"""How long the others are tried: later, `completed` carries more than they would."""

FIRST_WAIT_SECONDS = 5
LONGEST_WAIT_SECONDS = 4 * 3600
"""Well below 12 h, the longest time that SQS hides a message:
https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html"""

_ORDER_SECONDS = 1
_ENDED = frozenset({Status.SUCCEEDED.value, Status.FAILED.value, Status.CANCELED.value})
_ID = re.compile(r"[a-z0-9]{26}")


class UnreadableDelivery(PredictionsError):
    """The message is not a delivery of this stack."""


@dataclass(frozen=True)
class Delivery:
    """One webhook to be sent.

    Attributes:
        id: The id of the prediction, batch or pipeline.
        event: One of `EVENTS` or `GROUP_EVENTS`.
        n: Distinguishes deliveries of one event; the same for a stream record that arrives twice.
        first_at: When it was first due, in Unix seconds: retries are counted from there.
        again: Whether an operator sends it again, whatever was sent before.
    """

    id: str
    event: str
    n: int
    first_at: int
    again: bool = False

    @property
    def webhook_id(self) -> str:
        """Return the `webhook-id`, the same for each retry, so that receivers deduplicate."""
        return f"{self.id}-{self.event.rpartition('.')[2]}-{self.n}"

    @property
    def kind(self) -> str:
        """Return `prediction`, `batch` or `pipeline`; trainings count as predictions."""
        return self.event.partition(".")[0] if self.event in GROUP_EVENTS else "prediction"

    @property
    def completes(self) -> bool:
        """Return whether it reports a completion, and so must not be lost."""
        return self.event == "completed" or self.event in GROUP_EVENTS

    def wait_seconds(self, now: float, jitter: float) -> int | None:
        """Return the delay before the next try, or None if it was the last.

        The delay is twice the time that has passed, from 5 s up to 4 h, with a jitter of a fifth: about 16 tries
        in 24 h. Only the time of the first try determines it, so a crash or a duplicate message does not change it.

        Args:
            now: The time, in Unix seconds.
            jitter: Random, from 0 to 1: receivers that failed together are not called together.
        """
        until = self.first_at + (RETRY_SECONDS if self.completes else RUNNING_RETRY_SECONDS)
        if now >= until:
            return None
        wait = retry_seconds(now - self.first_at, FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, jitter)
        # The last try is at the very end.
        return max(1, round(min(wait, until - now)))

    def message(self) -> str:
        """Return the message's body."""
        return json.dumps(self.fields(), separators=(",", ":"))

    def fields(self) -> dict[str, Any]:
        """Return the fields of its message."""
        return {name: value for name, value in asdict(self).items() if name != "again" or value}

    @classmethod
    def read(cls, body: str) -> "Delivery":
        """Parse a message's body, ignoring unknown fields.

        Raises:
            UnreadableDelivery: The message is not a delivery of this stack.
        """
        try:
            message = json.loads(body)
            delivery = cls(str(message["id"]), str(message["event"]), int(message["n"]), int(message["first_at"]))
            again = message.get("again") is True
        except (KeyError, TypeError, ValueError):
            raise UnreadableDelivery("not a delivery: id, event, n and first_at are needed") from None
        if not _ID.fullmatch(delivery.id) or delivery.event not in (*EVENTS, *GROUP_EVENTS):
            raise UnreadableDelivery("not a delivery: the id or the event is unknown")
        return replace(delivery, again=again)


def deliveries_of(record: Mapping[str, Any]) -> Iterator[Delivery]:
    """Return the webhooks that one record of the table's stream requires, in order.

    `start` is sent when callers first see `processing`, or the completion of a run; `completed` when they first see
    the completion; `output` and `logs` when they grow, and `output` again with its files when these are stored. A
    record that changes nothing of that yields nothing, and the same record twice yields the same webhooks.

    Replicate may report the completion before any output or logs, or alone. `completed` then delivers both; for a
    caller without `completed`, the completion itself triggers the `output` and `logs` that it asked for.

    Args:
        record: As Lambda passes it, with the images before and after.
    """
    change = record["dynamodb"]
    new, old = change.get("NewImage") or {}, change.get("OldImage") or {}
    due_at = int(change["ApproximateCreationDateTime"])
    kind, _, prediction_id = _text(change["Keys"], "pk").partition("#")
    if kind in ("batch", "pipeline"):
        if _text(change["Keys"], "sk") == "status" and _text(new, "webhook") and _completed(new, old):
            # A batch completes once for each attempt; a pipeline has no such number.
            yield Delivery(prediction_id, f"{kind}.completed", int(_value(new, "attempt") or 1), due_at)
        return
    if kind != "prediction":
        return
    match _text(change["Keys"], "sk"):
        case "status":
            for event, n in _of_status(new, old):
                yield Delivery(prediction_id, event, n, due_at)
        case "progress":
            for event in _text(new, "notify").split(","):
                # A deleted output, or one whose files are still upstream, is not reported.
                told = _value(new, f"{event}_digest")
                if told and told != _value(old, f"{event}_digest"):
                    yield Delivery(prediction_id, event, int(_value(new, "length")), due_at)


def _completed(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Return whether a batch or a pipeline has just completed: only then it has `visible`."""
    return bool(_text(new, "visible")) and not _text(old, "visible")


def _of_status(new: Mapping[str, Any], old: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    if not _text(new, "webhook"):
        return
    named = [str(each.get("S")) for each in new.get("webhook_events_filter", {}).get("L", [])]
    wanted = named or DEFAULT_WEBHOOK_EVENTS
    before, after = _text(old, "visible"), _text(new, "visible")
    ended = after in _ENDED and before not in _ENDED
    began = before == Status.STARTING and (after == Status.PROCESSING or (ended and bool(_text(new, "started_at"))))
    # Replicate had finished before, so the files are now stored: only now are URLs available.
    copied = ended and before == Status.PROCESSING and _value(old, "rank") == _value(new, "rank")
    last = ended and "completed" not in wanted
    for event, happened, n in (
        ("start", began, 1), ("output", copied or last, 0), ("logs", last, 0), ("completed", ended, 1)
    ):  # fmt: skip
        if happened and event in wanted:
            yield event, n


def _owner_of(image: Mapping[str, Any]) -> str:
    """Return the owner of an item; empty if an earlier release wrote it."""
    owner = _text(image, "notify_owner") or _text(image, "owner")
    for listed in ("trainings#", "batches#", "pipelines#"):
        owner = owner.removeprefix(listed)
    return owner


def _text(image: Mapping[str, Any], name: str) -> str:
    return str(_value(image, name))


def _value(image: Mapping[str, Any], name: str) -> str:
    """Return a string or number of an image, as a string; empty if missing."""
    value = image.get(name) or {}
    return str(value.get("S") or value.get("N") or "")


class DeliveriesQueue:
    """The queue of deliveries.

    A message that is not delivered stays in the queue, hidden until its next try, so that a crash loses none.
    """

    def __init__(self, url: str, sqs: "SQSClient") -> None:
        self._url = url
        self._sqs = sqs

    @classmethod
    def from_env(cls) -> "DeliveriesQueue":
        """Use the queue of `DELIVERIES_QUEUE_URL`."""
        return cls(os.environ["DELIVERIES_QUEUE_URL"], client("sqs"))

    def send_for(self, record: Mapping[str, Any], told: set[str]) -> None:
        """Queue the webhooks of a stream record; receivers deduplicate repetitions.

        If one prediction has two at once, the later one is delayed by a second, so that they arrive in order.

        Args:
            record: As Lambda passes it.
            told: Predictions for which this reading of the stream has queued something; queued ones are added.
        """
        for delivery in deliveries_of(record):
            delay_seconds = _ORDER_SECONDS if delivery.id in told else 0
            self.send(delivery, delay_seconds, owner=_owner_of(record["dynamodb"]["NewImage"]))
            told.add(delivery.id)

    def send(self, delivery: Delivery, delay_seconds: int = 0, *, owner: str = "") -> None:
        """Queue one delivery.

        Args:
            delivery: The delivery.
            delay_seconds: How long the message stays hidden.
            owner: Its owner, if known. If an owner's deliveries occupy more than their share of the consumers, SQS
                prefers messages of other owners (fair queues):
                https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-fair-queues.html
        """
        # A message without a group counts as an owner of its own.
        group: dict[str, Any] = {"MessageGroupId": owner} if owner else {}
        self._sqs.send_message(QueueUrl=self._url, MessageBody=delivery.message(), DelaySeconds=delay_seconds, **group)

    def postpone(self, receipt_handle: str, seconds: int) -> None:
        """Hide a received message until its next try."""
        self._sqs.change_message_visibility(QueueUrl=self._url, ReceiptHandle=receipt_handle, VisibilityTimeout=seconds)


@dataclass(frozen=True)
class DeadLetter:
    """A delivery that was given up.

    Attributes:
        body: The message's body, unchanged.
        delivery: The delivery in it; None if the message is not a delivery of this stack.
        reason: Why it was given up, if known.
        receipt_handle: Deletes it.
    """

    body: str
    delivery: Delivery | None
    reason: str
    receipt_handle: str


class DeadLetters:
    """The dead-letter queue of deliveries, kept for 14 days."""

    def __init__(self, url: str, sqs: "SQSClient") -> None:
        self._queue = DeadLetterQueue(url, sqs)

    @classmethod
    def from_env(cls) -> "DeadLetters":
        """Use the queue of `DELIVERIES_DEAD_LETTER_QUEUE_URL`."""
        return cls(os.environ["DELIVERIES_DEAD_LETTER_QUEUE_URL"], client("sqs"))

    def send(self, delivery: Delivery, reason: str) -> None:
        """Send a given-up delivery to the DLQ, with the reason."""
        self._queue.send(json.dumps({**delivery.fields(), "reason": reason}, separators=(",", ":")))

    def receive(self, hidden_seconds: int) -> Iterator[DeadLetter]:
        """Receive all dead letters, each hidden for a while so that it is returned once."""
        for letter in self._queue.receive(hidden_seconds):
            yield _dead_letter(letter.body, letter.receipt_handle)

    def delete(self, letter: DeadLetter) -> None:
        """Delete a dead letter."""
        self._queue.delete(letter.receipt_handle)


def _dead_letter(body: str, receipt_handle: str) -> DeadLetter:
    try:
        # SQS moved it here, without a reason, after deliver_webhook crashed at each try.
        reason = json.loads(body).get("reason", "deliver_webhook failed each time. See its log.")
        return DeadLetter(body, Delivery.read(body), str(reason), receipt_handle)
    except (AttributeError, ValueError, UnreadableDelivery):
        return DeadLetter(body, None, "not a delivery", receipt_handle)
