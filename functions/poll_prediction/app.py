"""State PollPrediction: no webhook came in time, so Replicate is asked."""

from typing import Any

from predictions.lifecycle.poll import PollPrediction
from predictions.observability import handler_of, logger

polling = PollPrediction.from_env()


@handler_of
def handler(event: dict[str, Any], context: object) -> dict[str, Any]:  # noqa: ARG001  # Lambda passes both
    """Asks for a bound prediction, reconciles a claimed one, submits one that is neither; keeps the deadline.

    Args:
        event: `{"id": …}`.
        context: Not used.

    Returns:
        `{}`: whether it has ended is in the table, and the next state's condition reads it there.

    Raises:
        PredictionThrottled: It has to be submitted, and not now; the message is the number of seconds to wait.
    """
    logger.set_correlation_id(event["id"])
    polling.poll(event["id"])
    return {}
