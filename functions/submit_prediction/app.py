"""State SubmitPrediction: submit a prediction that was only written, or was not accepted before."""

from typing import Any

from predictions.lifecycle.submit import SubmitPrediction
from predictions.observability import handler_of, logger

submitting = SubmitPrediction.from_env()


@handler_of
def handler(event: dict[str, Any], context: object) -> dict[str, Any]:  # noqa: ARG001  # Lambda passes both
    """Submit a prediction once; do nothing if it is claimed, bound or completed.

    Args:
        event: `{"id": …}`.
        context: Not used.

    Returns:
        `{}`: the state machine carries only ids.

    Raises:
        PredictionThrottled: The prediction has to wait; the message is the number of seconds.
    """
    logger.set_correlation_id(event["id"])
    submitting.submit(event["id"])
    return {}
