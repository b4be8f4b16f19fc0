"""Messages of the requests queue, as SQS hands them over: which of their parts are believed.

SQS itself sets `SenderId` and `SentTimestamp`: no sender can choose them. The attributes `request_id` and `sent_at` are
those of a message that was put back into the queue (`dead-letters redrive`), and any sender can set them as well. So
they decide nothing that a sender may not decide:

- `request_id` is what the request is known by. A prediction's id is made of it and of the owner, and the owner comes
  from `SenderId`: with another's request id a sender finds or starts only predictions of its own owner;
- `sent_at` counts only where it is earlier than SQS's own time: links to files are valid from then on, and a later time
  would make them last longer;
- `traceparent` is what any sender may set: the trace of its request.
"""

import re
from collections.abc import Mapping
from typing import Any

from predictions.intents.sources import Message


def read_message(record: Mapping[str, Any]) -> Message:
    """Return a message as it was first sent; its attributes tell, where it was put back into the queue.

    Args:
        record: `{"messageId", "body", "attributes", "messageAttributes", …}` of SQS.
    """
    sent_at = int(record["attributes"]["SentTimestamp"]) // 1000
    attributes = record["messageAttributes"]
    said: dict[str, str] = {
        name: attributes[name]["stringValue"]
        for name in ("request_id", "sent_at", "traceparent")
        if name in attributes and "stringValue" in attributes[name]
    }
    said_at = said.get("sent_at", "")
    return Message(
        id=said.get("request_id") or record["messageId"],
        sender=record["attributes"]["SenderId"],
        body=record["body"],
        # Never later than it is: links to files are valid from then on.
        sent_at=min(sent_at, int(said_at)) if re.fullmatch("[0-9]{1,12}", said_at) else sent_at,
        traceparent=_trace_of(said.get("traceparent")),
    )


def _trace_of(traceparent: str | None) -> str | None:
    if traceparent is None:
        return None
    from predictions.intents.trace import read_traceparent  # only messages with a trace need it

    return read_traceparent(traceparent)
