"""State AdvancePipeline: send the due steps of a pipeline, and end it when nothing is left."""

from dataclasses import asdict
from typing import Any

from predictions.observability import handler_of, logger, remaining_seconds
from predictions.pipelines.advance import Progress

progress = Progress.from_env()


@handler_of
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Advance a pipeline by one turn.

    Args:
        event: `{"id": …}`.
        context: Says how much time is left to the function.

    Returns:
        `{"done": …, "seen": …}`: whether the pipeline has ended, or else the number of its events that this turn saw.
    """
    logger.set_correlation_id(event["id"])
    return asdict(progress.advance(event["id"], remaining_seconds(context)))
