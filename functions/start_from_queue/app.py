"""The requests queue: each message starts a prediction, or is stored with the reason why it cannot."""

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
    """Handle each message by itself.

    Args:
        event: `{"Records": [{"messageId", "receiptHandle", "body", "attributes", "messageAttributes", …}]}` of SQS.
        context: Tells how long the function may still run.

    Returns:
        `{"batchItemFailures": […]}`: the messages that stay in the queue, because AWS did not do what they need.
    """
    consumer: RequestConsumer = RequestConsumer(requests, dead_requests)
    stay = received_requests.handle(event["Records"], consumer.take, consumer.give_up, remaining_seconds(context))
    return {"batchItemFailures": [{"itemIdentifier": message_id} for message_id in stay]}
