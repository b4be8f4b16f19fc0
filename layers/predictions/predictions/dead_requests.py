"""Messages of the requests queue that started nothing: kept with the reason, and given to start_from_queue once more.

A message is put back by invoking the function with it, not by sending it again: sent again, it would have the id, time
and sender of whoever puts it back, and be another request, of another owner. Who may invoke the function is trusted
with those three; who may only send to the requests queue cannot choose them.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from predictions.aws import client
from predictions.dead_letters import DeadLetterQueue, Letter

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

    from predictions.requests import Message

_REASON_LIMIT_CHARACTERS = 2000
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
    """The dead-letter queue of the requests queue."""

    def __init__(self, url: str, sqs: "SQSClient") -> None:
        self._queue = DeadLetterQueue(url, sqs)

    @classmethod
    def from_env(cls) -> "DeadRequests":
        """The queue of `REQUESTS_DEAD_LETTER_QUEUE_URL`."""
        return cls(os.environ["REQUESTS_DEAD_LETTER_QUEUE_URL"], client("sqs"))

    def bury(self, message: "Message", reason: str) -> None:
        """Keeps a message that is refused, as it is, with the reason. Twice: it is listed twice."""
        self._queue.bury(
            message.body,
            {
                "reason": _attribute(reason),
                "request_id": message.id,
                "sender": message.sender,
                "sent_at": str(message.sent_at),
            },
        )

    def look(self, hidden_seconds: int) -> Iterator[DeadRequest]:
        """All that are there. Each is hidden from another look for a while, so that none is met twice."""
        for letter in self._queue.look(hidden_seconds):
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
                body=letter.body,
                receipt_handle=letter.receipt_handle,
            )

    def forget(self, request: DeadRequest) -> None:
        """Deletes one."""
        self._queue.forget(request.receipt_handle)


def _undelivered(letter: Letter) -> DeadRequest:
    """What EventBridge could not put into the requests queue, as the message that it would have put there.

    Of a rule it keeps the event alone, and names the rule, whose name has the recipe's id; of a schedule the message.
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
        if recipe is None or not isinstance(event, dict):
            reason = f"EventBridge could not send it, and it is no event of a recipe's rule ({known['ERROR_CODE']})"
        elif "recipe_id" not in event:
            body = f'{{"recipe_id": "{recipe[1]}", "event": {body}}}'
    return DeadRequest(letter.id, letter.sender, letter.sent_at, reason, body, letter.receipt_handle)


def _attribute(text: str) -> str:
    """What SQS takes as an attribute: not empty, and no character that XML has not."""
    # https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessage.html
    kept = "".join(each if each >= " " or each in "\t\n\r" else "?" for each in text[:_REASON_LIMIT_CHARACTERS])
    return kept.replace("\ufffe", "?").replace("\uffff", "?") or "?"
