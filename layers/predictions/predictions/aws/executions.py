"""Step Functions executions: one for each unfinished prediction, named `{id}-{n}`."""

import json
import os
from typing import TYPE_CHECKING

from predictions.aws.clients import client

if TYPE_CHECKING:
    from mypy_boto3_stepfunctions import SFNClient


class Executions:
    """The state machine's executions."""

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

    def start(self, prediction_id: str, n: int, *, submit: bool | None) -> bool:
        """Start the nth execution of a prediction or a pipeline.

        Args:
            prediction_id: Our id.
            n: The number of the execution.
            submit: Whether it must submit the prediction first; None for a pipeline.

        Returns:
            True if it runs now, also if another call started it; False if the name belongs to a finished one.
        """
        try:
            # While it runs, the same name and input get the same response as the first start.
            # https://docs.aws.amazon.com/step-functions/latest/apireference/API_StartExecution.html
            self._stepfunctions.start_execution(
                stateMachineArn=self._machine_arn,
                name=f"{prediction_id}-{n}",
                input=json.dumps({"id": prediction_id} | ({} if submit is None else {"submit": submit})),
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
    gone = (
        stepfunctions.exceptions.TaskTimedOut,
        stepfunctions.exceptions.TaskDoesNotExist,
        stepfunctions.exceptions.InvalidToken,
    )
    try:
        stepfunctions.send_task_success(taskToken=task_token, output="{}")
    except gone:
        return False
    return True
