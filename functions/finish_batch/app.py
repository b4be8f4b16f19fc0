"""State FinishBatch: write a batch's results, and end it."""

from typing import Any

from predictions.batches.finish import finish
from predictions.batches.store import Batches
from predictions.observability import handler_of, logger
from predictions.store.predictions import PredictionsTable

batches = Batches.from_env()
table = PredictionsTable.from_env()


@handler_of
def handler(event: dict[str, Any], context: object) -> dict[str, Any]:  # noqa: ARG001  # Lambda passes both
    """End an attempt once no line of it runs any more. A second run writes the same.

    Args:
        event: `{"id", "attempt", "exceeded", "lap"}`.
        context: Not used.

    Returns:
        `{"id", "attempt", "exceeded", "open", "lap", "wait_seconds"}`: with open lines, to be invoked again.
    """
    logger.set_correlation_id(event["id"])
    told = finish(batches, table, event["id"], event["attempt"], event["lap"], exceeded=event["exceeded"])
    return {"id": event["id"], "attempt": event["attempt"], "exceeded": event["exceeded"], **told}
