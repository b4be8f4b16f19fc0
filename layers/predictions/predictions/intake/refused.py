"""Dead-letter queue of the requests queue: rejected messages with their reason, and how they are redriven.

A message is redriven by invoking the function with it, not by sending it again: sent again, it would have the id, time
and sender of the operator, and be another request, of another owner. Every principal that may invoke the function is
trusted with those three; one that may only send to the requests queue cannot choose them.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from predictions.aws.clients import client
from predictions.aws.dead_letter_queue import DeadLetterQueue, DeadMessage
from predictions.aws.s3 import is_missing
from predictions.files.outputs_bucket import OutputsBucket

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

    from predictions.intents.sources import Message

MESSAGE_LIMIT_BYTES = 1024 * 1024
"""SQS's limit of a message: its body, and the names, types and values of its attributes, together.
https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html"""

_REASON_LIMIT_CHARACTERS = 2000
# A reason that is cut to fit keeps at least this many bytes: with less, the body goes to S3.
_REASON_LEAST_BYTES = 200
_BODY_KEY = re.compile(r"payloads/requests/[0-9a-f]{64}\.json", re.ASCII)
_SECONDS = re.compile("[0-9]{1,12}")
_NO_REASON = "start_from_queue failed each time. See its log."
_RECIPE_OF_RULE = re.compile(r"-recipe-([a-z0-9]{26})\Z", re.ASCII)


@dataclass(frozen=True)
class DeadRequest:
    """A message that started nothing.

    Attributes:
        id: Its permanent id.
        sender: The principal that first sent it.
        sent_at: When it was first sent, in Unix seconds.
        reason: Why it was given up.
        body: Its text, as it was sent.
        receipt_handle: Deletes it.
        traceparent: Its attribute of that name, or None.
    """

    id: str
    sender: str
    sent_at: int
    reason: str
    body: str
    receipt_handle: str = field(repr=False)
    traceparent: str | None = None

    def event(self) -> dict[str, Any]:
        """Return the event of start_from_queue that redrives it as the original message."""
        return {
            "Records": [
                {
                    "messageId": self.id,
                    "body": self.body,
                    "attributes": {"SenderId": self.sender, "SentTimestamp": str(self.sent_at * 1000)},
                    "messageAttributes": {"traceparent": {"stringValue": self.traceparent}} if self.traceparent else {},
                    "eventSource": "aws:sqs",
                }
            ]
        }


class DeadRequests:
    """The dead-letter queue of the requests queue.

    Args:
        outputs: Returns the bucket that stores bodies which leave no room for a reason; called only for those.
    """

    def __init__(self, url: str, sqs: "SQSClient", outputs: Callable[[], OutputsBucket]) -> None:
        self._queue = DeadLetterQueue(url, sqs)
        self._outputs = outputs

    @classmethod
    def from_env(cls) -> "DeadRequests":
        """Build from `REQUESTS_DEAD_LETTER_QUEUE_URL` and the environment of the bucket."""
        return cls(os.environ["REQUESTS_DEAD_LETTER_QUEUE_URL"], client("sqs"), OutputsBucket.from_env)

    def send(self, message: "Message", reason: str) -> None:
        """Send a rejected message to the DLQ, unchanged, with the reason.

        Sent twice, it is listed twice. SQS counts attributes with the body. Near the limit, the reason is cut, or the
        body is stored in S3.
        """
        attributes = {
            "request_id": message.id,
            "sender": message.sender,
            "sent_at": str(message.sent_at),
            "reason": _attribute(reason),
            **({"traceparent": message.traceparent} if message.traceparent else {}),
        }
        body = message.body
        excess = _size(body, attributes) - MESSAGE_LIMIT_BYTES
        if excess > 0:
            kept = attributes["reason"].encode()[:-excess]
            if len(kept) >= _REASON_LEAST_BYTES:
                attributes["reason"] = kept.decode(errors="ignore")
            else:
                text = body.encode(errors="surrogatepass")
                attributes["body_key"] = f"payloads/requests/{hashlib.sha256(text).hexdigest()}.json"
                self._outputs().put_payload(attributes["body_key"], body)
                body = "The message is stored in the outputs bucket. See the attribute body_key."
        self._queue.send(body, attributes)

    def receive(self, hidden_seconds: int) -> Iterator[DeadRequest]:
        """Receive all messages, each hidden for a while so that it is returned once."""
        for letter in self._queue.receive(hidden_seconds):
            known: Mapping[str, str] = letter.attributes
            if not letter.moved and "ERROR_CODE" in known:
                yield _undelivered(letter)
                continue
            # If SQS moved it, its sender wrote the attributes. They may say which request of the same owner it repeats,
            # and when that was; not who sent it.
            ours = not letter.moved and "request_id" in known
            said_at = known.get("sent_at", "")
            yield DeadRequest(
                id=known.get("request_id") or letter.id,
                sender=known.get("sender", "") if ours else letter.sender,
                sent_at=min(int(said_at), letter.sent_at) if _SECONDS.fullmatch(said_at) else letter.sent_at,
                reason=known.get("reason", _NO_REASON) if ours else _NO_REASON,
                body=self._body(letter) if ours else letter.body,
                receipt_handle=letter.receipt_handle,
                traceparent=known.get("traceparent"),
            )

    def _body(self, letter: DeadMessage) -> str:
        """Return the original body of a message that `send` stored."""
        key = letter.attributes.get("body_key", "")
        if not _BODY_KEY.fullmatch(key):
            return letter.body
        try:
            return self._outputs().get_payload(key)
        except ClientError as error:
            if not is_missing(error):
                raise
            return letter.body  # the object has expired, so the message can no longer be redriven

    def delete(self, request: DeadRequest) -> None:
        """Delete a message."""
        self._queue.delete(request.receipt_handle)


def _undelivered(letter: DeadMessage) -> DeadRequest:
    """Rebuild the message of an event that EventBridge could not deliver.

    For a rule it keeps the event alone, and names the rule, whose name has the recipe's id; for a schedule the message.
    The rule of manifests is recognized by its events: only the place of a manifest is trusted.
    A principal that could put such a dead letter here can also send messages that name recipes.
    https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-rule-dlq.html
    https://docs.aws.amazon.com/scheduler/latest/UserGuide/configuring-schedule-dlq.html
    """
    known = letter.attributes
    reason = f"EventBridge could not deliver it; redrive it ({known['ERROR_CODE']}: {known.get('ERROR_MESSAGE', '')})"
    body = letter.body
    if "RULE_ARN" in known:
        recipe = _RECIPE_OF_RULE.search(known["RULE_ARN"])
        try:
            event = json.loads(body)
        except (ValueError, RecursionError):
            event = None
        if recipe is None and _names_a_manifest(event):
            body = f'{{"batch_manifest": {body}}}'
        elif recipe is None or not isinstance(event, dict):
            reason = f"EventBridge could not deliver it, and no rule of a recipe matches ({known['ERROR_CODE']})"
        elif "recipe_id" not in event:
            body = f'{{"recipe_id": "{recipe[1]}", "event": {body}}}'
    return DeadRequest(letter.id, letter.sender, letter.sent_at, reason, body, letter.receipt_handle)


def _names_a_manifest(event: Any) -> bool:
    """Return whether an event matches the template's ManifestsRule.

    The rule matches objects that S3 has created below `batches/`.
    """
    if not isinstance(event, dict) or (event.get("source"), event.get("detail-type")) != ("aws.s3", "Object Created"):
        return False
    try:
        return str(event["detail"]["object"]["key"]).startswith("batches/")
    except (KeyError, TypeError):
        return False


def _size(body: str, attributes: Mapping[str, str]) -> int:
    """Return the size that SQS counts for a message with string attributes."""
    return len(body.encode(errors="surrogatepass")) + sum(
        len(name) + len("String") + len(value.encode()) for name, value in attributes.items()
    )


def _attribute(text: str) -> str:
    """Return a valid SQS attribute: not empty, only characters that XML allows."""
    # https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessage.html
    kept = "".join(each if each >= " " or each in "\t\n\r" else "?" for each in text[:_REASON_LIMIT_CHARACTERS])
    return kept.replace("\ufffe", "?").replace("\uffff", "?") or "?"
