"""State SubmitPrediction: submits a prediction that was only written down, or was not accepted before."""

from typing import Any

from predictions.lifecycle.submit import SubmitPrediction
from predictions.observability import handler_of, logger

submitting = SubmitPrediction.from_env()


@handler_of
def handler(event: dict[str, Any], context: object) -> dict[str, Any]:  # noqa: ARG001  # Lambda passes both
    """Submits once; leaves alone what is claimed, bound or ended.

    Args:
        event: `{"id": …}`.
        context: Not used.

    Returns:
        `{}`: the machine carries nothing but ids.

    Raises:
        PredictionThrottled: Not now; the message is the number of seconds to wait.
    """
    logger.set_correlation_id(event["id"])
    submitting.submit(event["id"])
    return {}
