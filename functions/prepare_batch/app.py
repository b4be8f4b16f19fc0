"""State PrepareBatch: finds the lines of a batch's manifest, and refuses those that cannot run."""

from typing import Any

from predictions.batches.prepare import prepare
from predictions.batches.store import Batches
from predictions.observability import handler_of, logger, remaining_seconds

batches = Batches.from_env()


@handler_of
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Writes down what an attempt runs. Twice, it writes the same.

    Args:
        event: `{"id", "attempt"}`.
        context: Tells how long the function may still run.

    Returns:
        `{"id", "attempt", "lines", "key", "max_concurrency", "tolerated_failure_percentage"}` for the next states.
    """
    logger.set_correlation_id(event["id"])
    return prepare(batches, event["id"], event["attempt"], remaining_seconds(context))
