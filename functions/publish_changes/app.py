"""The table's stream: what changes becomes webhooks to callers, events, and answers to state machines that wait."""

from typing import Any

from predictions.changes import Changes
from predictions.observability import handler_of

changes = Changes.from_env()


@handler_of
def handler(event: dict[str, Any], context: object) -> dict[str, Any]:  # noqa: ARG001  # Lambda passes both
    """Publishes what the records call for.

    Args:
        event: `{"Records": […]}` of the stream, of changes that somebody may want to be told: the event source filters.
        context: Not used.

    Returns:
        `{"batchItemFailures": […]}`: the first record that failed, from which on the stream is read again.
    """
    failed = changes.publish(event["Records"])
    return {"batchItemFailures": [{"itemIdentifier": failed}] if failed else []}
