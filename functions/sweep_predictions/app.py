"""Every minute: recover stalled predictions, pipelines and batches; refresh Replicate's signing secret."""

import time
from collections.abc import Sequence
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from predictions.batches.manage import BatchControl
from predictions.lifecycle.connections import Connections
from predictions.lifecycle.fan_out import FanOut, handed_over
from predictions.lifecycle.sweep import SweepPredictions
from predictions.observability import MetricUnit, handler_of, logger, metrics, remaining_seconds
from predictions.pipelines.advance import PipelineExecutions
from predictions.upstream.signing_secret import SigningSecrets
from predictions.upstream.signing_secret_refresh import SigningSecretRefresh

SWEEP_LIMIT = 1000
"""Items that one run checks at most; the next sweep, a minute later, continues."""

LOOK_AGAIN_SECONDS = 90
"""Time for a reading of Replicate's list, with all that follows from it."""

connections = Connections.from_env()
sweeping = SweepPredictions.over(connections)
fan_out = FanOut(connections.table)
pipeline_executions = PipelineExecutions.from_env()
batch_control = BatchControl.from_env()
secret_refresh = SigningSecretRefresh(SigningSecrets.from_env())


@handler_of
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Sweep once.

    Args:
        event: The event of the schedule; or `{"shards": […]}` from another run, which has more to check than it can.
        context: Says how much time is left to the function, and its name.

    Returns:
        `{"found": …}`, the number of checked predictions, pipelines and batches.
    """
    left = remaining_seconds(context)

    def sweep_batch(batch_id: str) -> None:
        batch_control.sweep_one(batch_id, connections.canceling, left)

    def sweep(shards: Sequence[str], *, shared: bool) -> int:
        others = {"batch": sweep_batch, "pipeline": pipeline_executions.restart}
        found = sweeping.sweep(SWEEP_LIMIT, fan_out.for_a_run(left) if shared else left, others, shards)
        metrics.add_metric(name="SweepFound", unit=MetricUnit.Count, value=found)
        return found

    if handed := handed_over(event):
        return {"found": sweep(handed, shared=True)}
    secret_refresh.refresh(connections.replicate.signing_secret, time.time())
    shards, shared = fan_out.share(context.function_name)
    found = sweep(shards, shared=shared)
    if left() > LOOK_AGAIN_SECONDS:
        try:
            sweeping.look_again()
        except (ClientError, BotoCoreError):
            # Registered predictions stay registered: the next sweep reads the list.
            logger.exception("the list was not read again")
    try:
        sweeping.measure()
    except (ClientError, BotoCoreError):
        # These metrics are for alarms and the dashboard only; the next sweep emits them.
        logger.exception("not measured")
    return {"found": found}
