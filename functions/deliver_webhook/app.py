"""Deliveries queue: each message is one attempt to send a caller a webhook."""

from typing import Any

from predictions.notifications.webhook_queue import Delivery
from predictions.notifications.webhook_sender import Receivers
from predictions.observability import handler_of

receivers = Receivers.from_env()


@handler_of
def handler(event: dict[str, Any], context: object) -> dict[str, Any]:  # noqa: ARG001  # Lambda passes both
    """Make one attempt for each message.

    Args:
        event: `{"Records": [{"messageId", "receiptHandle", "body": "{id, event, n, first_at}", …}]}`.
        context: Not used.

    Returns:
        `{"batchItemFailures": […]}`: the messages that stay in the queue for another attempt.

    Raises:
        UnreadableDelivery: A message is not a delivery; SQS moves it to the DLQ in the end.
    """
    waiting = [
        record["messageId"]
        for record in event["Records"]
        if not receivers.deliver(Delivery.read(record["body"]), record["receiptHandle"])
    ]
    return {"batchItemFailures": [{"itemIdentifier": message_id} for message_id in waiting]}
