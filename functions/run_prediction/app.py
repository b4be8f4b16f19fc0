"""Direct invocation: run a prediction for a person, a service or a schedule."""

from typing import Any

from predictions.intake.invocation import RunJobs
from predictions.observability import handler_of, remaining_seconds

run_jobs = RunJobs.from_env()


@handler_of
def handler(event: Any, context: Any) -> dict[str, Any]:
    """Start one prediction, however often the invocation is repeated; wait for its completion if asked to.

    Args:
        event: `{"model", "prompt", "webhook_url"?}`, or `{"model", "input_data", "wait_for_completion"?,
            "poll_interval"?, "max_poll_attempts"?}`; each with `idempotency_key`?. Or `{"request_id", "job"}`: one of
            these whose invocation failed, redriven under its id.
        context: Says how much time is left to the function, and the id of the request.

    Returns:
        `{"success", "prediction_id", "status", "output", "urls", "logs", "error"}` for the first, `{"prediction_id",
        "status", "model", "input", "output", "error", "created_at", "completed_at", "urls", "metrics"}` for the
        second, refusals too.

    Raises:
        ClientError, BotoCoreError: AWS failed before anything was started.
    """
    return run_jobs.run(event, context.aws_request_id, remaining_seconds(context))
