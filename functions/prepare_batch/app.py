"""State PrepareBatch: finds the lines of a batch's manifest, and refuses those that cannot run."""

from typing import Any

from predictions.batch_preparation import prepare
from predictions.batches import Batches
from predictions.observability import handler_of, logger

batches = Batches.from_env()


@handler_of
def handler(event: dict[str, Any], context: object) -> dict[str, Any]:  # noqa: ARG001  # Lambda passes both
    """Writes down what an attempt runs. Twice, it writes the same.

    Args:
        event: `{"id", "attempt"}`.
        context: Not used.

    Returns:
        `{"id", "attempt", "lines", "key", "max_concurrency", "tolerated_failure_percentage"}` for the next states.
    """
    logger.set_correlation_id(event["id"])
    return prepare(batches, event["id"], event["attempt"])
