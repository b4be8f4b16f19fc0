"""Requests queue: each message starts a prediction, or is stored with the reason why it cannot."""

from typing import Any

from predictions.intake.consumer import RequestConsumer
from predictions.intake.queue import Requests
from predictions.intake.redelivery import ReceivedRequests
from predictions.intake.refused import DeadRequests
from predictions.observability import handler_of, remaining_seconds

requests = Requests.from_env()
dead_requests = DeadRequests.from_env()
received_requests = ReceivedRequests.from_env()


@handler_of
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Handle each message on its own.

    Args:
        event: `{"Records": [{"messageId", "receiptHandle", "body", "attributes", "messageAttributes", …}]}` of SQS.
        context: Says how much time is left to the function.

    Returns:
        `{"batchItemFailures": […]}`: the messages that stay in the queue, because a call of AWS failed.
    """
    consumer: RequestConsumer = RequestConsumer(requests, dead_requests)
    stay = received_requests.handle(event["Records"], consumer.take, consumer.give_up, remaining_seconds(context))
    return {"batchItemFailures": [{"itemIdentifier": message_id} for message_id in stay]}
