"""Every minute: moves on what stands still, and keeps Replicate's signing secret fresh."""

import time
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from predictions.batches.manage import BatchControl
from predictions.lifecycle.connections import Connections
from predictions.lifecycle.sweep import SweepPredictions
from predictions.observability import MetricUnit, handler_of, logger, metrics, remaining_seconds
from predictions.pipelines.advance import PipelineExecutions
from predictions.upstream.signing_secret import SigningSecrets
from predictions.upstream.signing_secret_refresh import SigningSecretRefresh

SWEEP_LIMIT = 1000
"""The most items one sweep looks at; the next one, a minute later, goes on."""

LOOK_AGAIN_SECONDS = 90
"""What a reading of Replicate's list may take, with all that follows from it."""

connections = Connections.from_env()
sweeping = SweepPredictions.over(connections)
pipeline_executions = PipelineExecutions.from_env()
batch_control = BatchControl.from_env()
secret_refresh = SigningSecretRefresh(SigningSecrets.from_env())


@handler_of
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:  # noqa: ARG001  # Lambda passes both
    """Sweeps once.

    Args:
        event: Of the schedule; not used.
        context: Tells how long the function may still run.

    Returns:
        `{"found": …}`, how many predictions, pipelines and batches stood still.
    """
    secret_refresh.refresh(connections.replicate.signing_secret, time.time())
    left = remaining_seconds(context)

    def sweep_batch(batch_id: str) -> None:
        batch_control.sweep_one(batch_id, connections.canceling, left)

    found = sweeping.sweep(SWEEP_LIMIT, left, {"batch": sweep_batch, "pipeline": pipeline_executions.restart})
    metrics.add_metric(name="SweepFound", unit=MetricUnit.Count, value=found)
    if left() > LOOK_AGAIN_SECONDS:
        try:
            sweeping.look_again()
        except (ClientError, BotoCoreError):
            # What is registered stays so: the next sweep reads the list.
            logger.exception("the list was not read again")
    try:
        sweeping.measure()
    except (ClientError, BotoCoreError):
        # They are for alarms and the dashboard only; the next sweep tells.
        logger.exception("not measured")
    return {"found": found}
