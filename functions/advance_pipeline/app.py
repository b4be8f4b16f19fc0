"""State AdvancePipeline: sends what is due of a pipeline, and ends it when nothing is left."""

from dataclasses import asdict
from typing import Any

from predictions.observability import handler_of, logger, remaining_seconds
from predictions.pipelines.advance import Progress

progress = Progress.from_env()


@handler_of
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """One turn.

    Args:
        event: `{"id": …}`.
        context: Tells how long the function may still run.

    Returns:
        `{"done": …, "seen": …}`: whether the pipeline has ended, else the number of its events that this turn knew of.
    """
    logger.set_correlation_id(event["id"])
    return asdict(progress.advance(event["id"], remaining_seconds(context)))
