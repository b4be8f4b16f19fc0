"""Step Functions executions: one for each unfinished prediction, named `{id}-{n}`."""

import json
import os
from typing import TYPE_CHECKING

from predictions.aws.clients import client

if TYPE_CHECKING:
    from mypy_boto3_stepfunctions import SFNClient


class Executions:
    """The executions of one state machine. Names are unique among them only."""

    def __init__(self, state_machine_arn: str, stepfunctions: "SFNClient") -> None:
        self._machine_arn = state_machine_arn
        self._stepfunctions = stepfunctions

    @classmethod
    def from_env(cls) -> "Executions":
        """Create from `STATE_MACHINE_ARN`."""
        return cls(os.environ["STATE_MACHINE_ARN"], client("stepfunctions"))

    def arn(self, prediction_id: str, n: int) -> str:
        """Return the ARN of a prediction's nth execution, whether it exists or not."""
        return f"{self._machine_arn.replace(':stateMachine:', ':execution:')}:{prediction_id}-{n}"

    def start(self, prediction_id: str, n: int, traceparent: str | None = None) -> bool:
        """Start the nth execution of a prediction or a pipeline.

        Args:
            prediction_id: Our id.
            n: The number of the execution.
            traceparent: The trace that it belongs to, for those who look at its input; the machine does not read it.

        Returns:
            True if it runs now, also if another call started it; False if the name belongs to a finished one.
        """
        given = {"id": prediction_id, **({"traceparent": traceparent} if traceparent else {})}
        try:
            # While it runs, the same name and input get the same response as the first start.
            # https://docs.aws.amazon.com/step-functions/latest/apireference/API_StartExecution.html
            self._stepfunctions.start_execution(
                stateMachineArn=self._machine_arn, name=f"{prediction_id}-{n}", input=json.dumps(given)
            )
        except self._stepfunctions.exceptions.ExecutionAlreadyExists:
            return self.status(prediction_id, n) == "RUNNING"
        return True

    def status(self, prediction_id: str, n: int) -> str | None:
        """Return its status (`RUNNING`, `SUCCEEDED`, …), or None if it was never started."""
        try:
            return self._stepfunctions.describe_execution(executionArn=self.arn(prediction_id, n))["status"]
        except self._stepfunctions.exceptions.ExecutionDoesNotExist:
            return None


def wake(task_token: str | None) -> bool:
    """Resume the execution that waits with this task token.

    Returns:
        Whether an execution waited. A stale token (its execution timed out and polls, was resumed before, or was
        stopped) is no error: that execution finds the end in the table by itself.
    """
    if task_token is None:
        return False
    stepfunctions = client("stepfunctions")
    try:
        stepfunctions.send_task_success(taskToken=task_token, output="{}")
    except _gone(stepfunctions):
        return False
    return True


def wake_by_error(task_token: str | None, error: str, cause: str) -> bool:
    """Resume the execution that waits with this task token by an error that its state catches; else as `wake`."""
    if task_token is None:
        return False
    stepfunctions = client("stepfunctions")
    try:
        stepfunctions.send_task_failure(taskToken=task_token, error=error, cause=cause)
    except _gone(stepfunctions):
        return False
    return True


def _gone(stepfunctions: "SFNClient") -> tuple[type[Exception], ...]:
    exceptions = stepfunctions.exceptions
    return exceptions.TaskTimedOut, exceptions.TaskDoesNotExist, exceptions.InvalidToken
