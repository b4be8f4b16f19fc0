"""Every minute: moves on what stands still, and keeps Replicate's signing secret fresh."""

import time
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from predictions.batches.manage import BatchControl
from predictions.lifecycle.submissions import Submissions
from predictions.net.signatures import SigningSecretUnavailable
from predictions.observability import MetricUnit, handler_of, logger, metrics, remaining_seconds
from predictions.pipelines.advance import PipelineExecutions
from predictions.upstream.errors import UpstreamError
from predictions.upstream.signing_secret import SigningSecrets

SWEEP_LIMIT = 1000
"""The most items one sweep looks at; the next one, a minute later, goes on."""

SECRET_REFRESH_SECONDS = 600

LOOK_AGAIN_SECONDS = 90
"""What a reading of Replicate's list may take, with all that follows from it."""

submissions = Submissions.from_env()
pipeline_executions = PipelineExecutions.from_env()
batch_control = BatchControl.from_env()
secrets = SigningSecrets.from_env()
_refreshed_at = 0.0


@handler_of
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:  # noqa: ARG001  # Lambda passes both
    """Sweeps once.

    Args:
        event: Of the schedule; not used.
        context: Tells how long the function may still run.

    Returns:
        `{"found": …}`, how many predictions, pipelines and batches stood still.
    """
    _refresh_signing_secret()
    left = remaining_seconds(context)

    def sweep_batch(batch_id: str) -> None:
        batch_control.sweep_one(batch_id, submissions, left)

    found = submissions.sweep(SWEEP_LIMIT, left, {"batch": sweep_batch, "pipeline": pipeline_executions.restart})
    metrics.add_metric(name="SweepFound", unit=MetricUnit.Count, value=found)
    if left() > LOOK_AGAIN_SECONDS:
        try:
            submissions.look_again()
        except (ClientError, BotoCoreError):
            # What is registered stays so: the next sweep reads the list.
            logger.exception("the list was not read again")
    try:
        submissions.measure()
    except (ClientError, BotoCoreError):
        # They are for alarms and the dashboard only; the next sweep tells.
        logger.exception("not measured")
    return {"found": found}


def _refresh_signing_secret() -> None:
    global _refreshed_at  # once for each warm function: asking every minute would tell nothing new
    now = time.time()
    if now < _refreshed_at + SECRET_REFRESH_SECONDS:
        return
    try:
        changed = secrets.store(submissions.signing_secret(), now)
    except (UpstreamError, SigningSecretUnavailable, ClientError, BotoCoreError) as error:
        # Predictions end by poll without it, so the sweep goes on.
        logger.error("signing secret not refreshed", reason=str(error))
        return
    _refreshed_at = now
    if changed:
        logger.info("signing secret changed")
