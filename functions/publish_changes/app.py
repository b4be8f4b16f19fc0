"""The table's stream: what callers asked to be told becomes deliveries in a queue."""

from typing import Any

from predictions.deliveries import DeliveriesQueue
from predictions.observability import handler_of

queue = DeliveriesQueue.from_env()


@handler_of
def handler(event: dict[str, Any], context: object) -> dict[str, Any]:  # noqa: ARG001  # Lambda passes both
    """Queues the deliveries that the records call for.

    Args:
        event: `{"Records": […]}` of the stream, of predictions with a webhook only: the event source filters.
        context: Not used.

    Returns:
        `{"batchItemFailures": […]}`: the first record that failed, from which on the stream is read again.
    """
    failed = queue.publish(event["Records"])
    return {"batchItemFailures": [{"itemIdentifier": failed}] if failed else []}
