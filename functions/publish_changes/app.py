"""Table stream: state changes become webhooks, events, and responses to waiting state machines."""

from typing import Any

from predictions.notifications.stream import Changes
from predictions.observability import handler_of, remaining_seconds

changes = Changes.from_env()


@handler_of
def handler(event: dict[str, Any], context: object) -> dict[str, Any]:
    """Publish what the records call for, or retry what failed before.

    Args:
        event: `{"Records": […]}` of the stream, filtered by the event source for changes that a caller may want.
            Or messages of the queue of retries.
        context: Says how much time is left to the function.

    Returns:
        `{"batchItemFailures": […]}`: the first record that failed, from which on the stream is read again; or the
        messages that stay in the queue.
    """
    records = event["Records"]
    if records and records[0].get("eventSource") == "aws:sqs":
        waiting = changes.retry(records, remaining_seconds(context))
    else:
        failed = changes.publish(records, remaining_seconds(context))
        waiting = [failed] if failed else []
    return {"batchItemFailures": [{"itemIdentifier": identifier} for identifier in waiting]}
