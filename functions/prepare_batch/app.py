"""State PrepareBatch: find the lines of a batch's manifest, and refuse those that cannot run."""

from typing import Any

from predictions.batches.prepare import prepare
from predictions.batches.store import Batches
from predictions.observability import handler_of, logger, remaining_seconds

batches = Batches.from_env()


@handler_of
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Write what an attempt runs. A second run writes the same.

    Args:
        event: `{"id", "attempt"}`.
        context: Says how much time is left to the function.

    Returns:
        `{"id", "attempt", "lines", "key", "max_concurrency", "tolerated_failure_percentage"}` for the next states.
    """
    logger.set_correlation_id(event["id"])
    return prepare(batches, event["id"], event["attempt"], remaining_seconds(context))
