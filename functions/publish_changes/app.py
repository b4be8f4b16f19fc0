"""The table's stream: what changes becomes webhooks to callers, events, and answers to state machines that wait."""

from typing import Any

from predictions.notifications.stream import Changes
from predictions.observability import handler_of, remaining_seconds

changes = Changes.from_env()


@handler_of
def handler(event: dict[str, Any], context: object) -> dict[str, Any]:
    """Publishes what the records call for, or retries what could not be published before.

    Args:
        event: `{"Records": […]}` of the stream, of changes that somebody may want to be told: the event source filters.
            Or messages of the queue of retries.
        context: Tells how long the function may still run.

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
