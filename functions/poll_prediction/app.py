"""State PollPrediction: ask Replicate, since no webhook came in time."""

from typing import Any

from predictions.lifecycle.poll import PollPrediction
from predictions.observability import handler_of, logger

polling = PollPrediction.from_env()


@handler_of
def handler(event: dict[str, Any], context: object) -> dict[str, Any]:  # noqa: ARG001  # Lambda passes both
    """Poll a bound prediction, look for a claimed one, submit an unclaimed one; enforce the deadline.

    Args:
        event: `{"id": …}`.
        context: Not used.

    Returns:
        `{}`: the next state's condition reads the status in the table.

    Raises:
        PredictionThrottled: The prediction has to be submitted, and has to wait; the message is the number of seconds.
    """
    logger.set_correlation_id(event["id"])
    polling.poll(event["id"])
    return {}
