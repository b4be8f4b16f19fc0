"""Messages of the requests queue that started nothing: kept with the reason, and given to start_from_queue once more.

A message is put back by invoking the function with it, not by sending it again: sent again, it would have the id, time
and sender of whoever puts it back, and be another request, of another owner. Who may invoke the function is trusted
with those three; who may only send to the requests queue cannot choose them.
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
"""What SQS takes of a message: its body, and the names, types and values of its attributes, together.
https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html"""

_REASON_LIMIT_CHARACTERS = 2000
# Of a reason that is cut to fit, so many bytes have to be left: with less, the body goes to S3.
_REASON_LEAST_BYTES = 200
_BODY_KEY = re.compile(r"payloads/requests/[0-9a-f]{64}\.json", re.ASCII)
_SECONDS = re.compile("[0-9]{1,12}")
_NO_REASON = "start_from_queue failed each time: see its log"
_RECIPE_OF_RULE = re.compile(r"-recipe-([a-z0-9]{26})\Z", re.ASCII)


@dataclass(frozen=True)
class DeadRequest:
    """A message that started nothing.

    Attributes:
        id: What it is known by for good.
        sender: The principal that sent it first.
        sent_at: When that was, in Unix seconds.
        reason: Why it was given up.
        body: Its text, as it was sent.
        receipt_handle: Deletes it.
    """

    id: str
    sender: str
    sent_at: int
    reason: str
    body: str
    receipt_handle: str = field(repr=False)

    def event(self) -> dict[str, Any]:
        """The event of start_from_queue that tries it once more, as the message that it was."""
        return {
            "Records": [
                {
                    "messageId": self.id,
                    "body": self.body,
                    "attributes": {"SenderId": self.sender, "SentTimestamp": str(self.sent_at * 1000)},
                    "messageAttributes": {},
                    "eventSource": "aws:sqs",
                }
            ]
        }


class DeadRequests:
    """The dead-letter queue of the requests queue.

    Args:
        url: The queue.
        sqs: The client to use.
        outputs: Gives the bucket that holds the bodies which leave no room for a reason; asked only for those.
    """

    def __init__(self, url: str, sqs: "SQSClient", outputs: Callable[[], OutputsBucket]) -> None:
        self._queue = DeadLetterQueue(url, sqs)
        self._outputs = outputs

    @classmethod
    def from_env(cls) -> "DeadRequests":
        """The queue of `REQUESTS_DEAD_LETTER_QUEUE_URL`, and what the bucket reads."""
        return cls(os.environ["REQUESTS_DEAD_LETTER_QUEUE_URL"], client("sqs"), OutputsBucket.from_env)

    def send(self, message: "Message", reason: str) -> None:
        """Keeps a message that is refused, as it is, with the reason. Twice: it is listed twice.

        SQS counts attributes with the body. Of a body near its limit the reason is cut, or the body is an object.
        """
        attributes = {
            "request_id": message.id,
            "sender": message.sender,
            "sent_at": str(message.sent_at),
            "reason": _attribute(reason),
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
                body = "The message is an object of the outputs bucket: see the attribute body_key."
        self._queue.send(body, attributes)

    def receive(self, hidden_seconds: int) -> Iterator[DeadRequest]:
        """All that are there. Each is hidden from another look for a while, so that none is met twice."""
        for letter in self._queue.receive(hidden_seconds):
            known: Mapping[str, str] = letter.attributes
            if not letter.moved and "ERROR_CODE" in known:
                yield _undelivered(letter)
                continue
            # Where SQS moved it, its sender wrote the attributes. They may say which request of the same owner it
            # repeats, and when that was; not who sent it.
            ours = not letter.moved and "request_id" in known
            said_at = known.get("sent_at", "")
            yield DeadRequest(
                id=known.get("request_id") or letter.id,
                sender=known.get("sender", "") if ours else letter.sender,
                sent_at=min(int(said_at), letter.sent_at) if _SECONDS.fullmatch(said_at) else letter.sent_at,
                reason=known.get("reason", _NO_REASON) if ours else _NO_REASON,
                body=self._body(letter) if ours else letter.body,
                receipt_handle=letter.receipt_handle,
            )

    def _body(self, letter: DeadMessage) -> str:
        """The body of a message that `send` kept."""
        key = letter.attributes.get("body_key", "")
        if not _BODY_KEY.fullmatch(key):
            return letter.body
        try:
            return self._outputs().get_payload(key)
        except ClientError as error:
            if not is_missing(error):
                raise
            return letter.body  # it has expired, and cannot be redriven any more

    def delete(self, request: DeadRequest) -> None:
        """Deletes one."""
        self._queue.delete(request.receipt_handle)


def _undelivered(letter: DeadMessage) -> DeadRequest:
    """What EventBridge could not put into the requests queue, as the message that it would have put there.

    Of a rule it keeps the event alone, and names the rule, whose name has the recipe's id; of a schedule the message.
    The rule of manifests is known by its events: a manifest is believed nothing but where it is.
    Who could put such a letter here can send messages that name recipes as well.

    https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-rule-dlq.html
    https://docs.aws.amazon.com/scheduler/latest/UserGuide/configuring-schedule-dlq.html
    """
    known = letter.attributes
    reason = f"EventBridge could not send it, a redrive does ({known['ERROR_CODE']}: {known.get('ERROR_MESSAGE', '')})"
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
            reason = f"EventBridge could not send it, and it is no event of a recipe's rule ({known['ERROR_CODE']})"
        elif "recipe_id" not in event:
            body = f'{{"recipe_id": "{recipe[1]}", "event": {body}}}'
    return DeadRequest(letter.id, letter.sender, letter.sent_at, reason, body, letter.receipt_handle)


def _names_a_manifest(event: Any) -> bool:
    """Whether an event is one of the template's ManifestsRule: S3 has created an object below `batches/`."""
    if not isinstance(event, dict) or (event.get("source"), event.get("detail-type")) != ("aws.s3", "Object Created"):
        return False
    try:
        return str(event["detail"]["object"]["key"]).startswith("batches/")
    except (KeyError, TypeError):
        return False


def _size(body: str, attributes: Mapping[str, str]) -> int:
    """What SQS counts of a message whose attributes are texts."""
    return len(body.encode(errors="surrogatepass")) + sum(
        len(name) + len("String") + len(value.encode()) for name, value in attributes.items()
    )


def _attribute(text: str) -> str:
    """What SQS takes as an attribute: not empty, and no character that XML has not."""
    # https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessage.html
    kept = "".join(each if each >= " " or each in "\t\n\r" else "?" for each in text[:_REASON_LIMIT_CHARACTERS])
    return kept.replace("\ufffe", "?").replace("\uffff", "?") or "?"
