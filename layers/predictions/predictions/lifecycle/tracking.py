"""Tracking of open predictions: the execution that follows each, how it is woken, and how old they are."""

import os
import time
from collections.abc import Callable

from predictions.aws.clients import client
from predictions.aws.executions import Executions, wake_by_error
from predictions.aws.executions import wake as wake_by_success
from predictions.errors import OutputsToCopy
from predictions.observability import MetricUnit, metrics
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction


class Tracking:
    """Keep an execution running for each open prediction.

    Two state machines have the same definition and begin with different states, so that a prediction that is submitted
    already enters no state for that. Names of executions are unique in one machine only: the item names the machine,
    from the write that creates it on, and an execution in the other machine gets the next number.

    Args:
        submitting: The machine that begins with `SubmitPrediction`.
        submitted: The machine that begins with `AwaitWebhook`.
    """

    def __init__(
        self,
        table: PredictionsTable,
        submitting: Executions,
        submitted: Executions,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._submitting = submitting
        self._submitted = submitted
        self._now = now

    @classmethod
    def from_env(cls, table: PredictionsTable) -> "Tracking":
        """Read `STATE_MACHINE_ARN` and `SUBMITTED_STATE_MACHINE_ARN`."""
        submitted = Executions(os.environ["SUBMITTED_STATE_MACHINE_ARN"], client("stepfunctions"))
        return cls(table, Executions.from_env(), submitted)

    def execution_arn(self, prediction_id: str, n: int, *, submit: bool) -> str:
        """Return the ARN of a prediction's nth execution, whether it exists or not."""
        return (self._submitting if submit else self._submitted).arn(prediction_id, n)

    def status(self, prediction: Prediction) -> str | None:
        """Return the status of a prediction's execution, or None if it was never started."""
        return self._machine_of(prediction).status(prediction.id, prediction.execution_n)

    def was_tracked(self, prediction: Prediction) -> bool:
        """Return whether any execution of a prediction was ever started."""
        # A function that needs the other machine counts up before it starts the first one, and may crash in between.
        numbers = range(1, prediction.execution_n + 1)
        machines = (self._submitting, self._submitted)
        return any(machine.status(prediction.id, n) is not None for n in numbers for machine in machines)

    def track(self, prediction: Prediction, *, submit: bool, takes_copy: bool = False) -> None:
        """Start an execution for a prediction, unless one runs.

        Args:
            prediction: The prediction.
            submit: Whether the execution must submit it, or look for what its create started.
            takes_copy: Whether the execution before has succeeded without copying the files: the next one takes over
                the lease that the end granted.
        """
        following: Prediction | None = prediction
        if submit and self._machine_of(prediction) is self._submitted:
            # Read again: if it was bound meanwhile, the machine of its item is right, and may run it already.
            following = self._table.get(prediction.id)
            if following is None or following.execution_n != prediction.execution_n or following.ended_visibly:
                return
            submit = following.upstream_id is None
            if submit:
                following = self._next(following, submit=True, unbound=True)
        while following is not None and not self._machine_of(following).start(
            following.id, following.execution_n, following.traceparent
        ):
            # The name belongs to an execution that has ended.
            following = self._next(following, submit=submit, takes_copy=takes_copy)

    def _next(self, prediction: Prediction, *, submit: bool, **conditions: bool) -> Prediction | None:
        arn = self.execution_arn(prediction.id, prediction.execution_n + 1, submit=submit)
        return self._table.next_execution(prediction, arn, self._now(), **conditions)

    def _machine_of(self, prediction: Prediction) -> Executions:
        """Return the machine that the item names; items of earlier releases name the one that submits."""
        submitted = prediction.execution_arn == self._submitted.arn(prediction.id, prediction.execution_n)
        return self._submitted if submitted else self._submitting


def wake(prediction: Prediction) -> bool:
    """Resume the execution that waits for a completed prediction: it copies the files, or ends without any.

    An execution that began before the release of `wake` = `v2` catches no such error, and finds out by itself whether
    there is something to copy.

    Returns:
        Whether an execution waited.
    """
    if prediction.awaits_copy and prediction.wake is not None:
        return wake_by_error(prediction.task_token, OutputsToCopy.__name__, "Not a fault: its files are copied next.")
    return wake_by_success(prediction.task_token)


def measure_age(prediction: Prediction, now: float) -> None:
    """Count how old an open prediction is, and how long its deadline has passed."""
    # Polls and sweeps check everything that stays open: the maximum is the age of the oldest.
    metrics.add_metric(name="OpenSeconds", unit=MetricUnit.Seconds, value=max(0, now - prediction.created))
    if now > prediction.deadline:
        overdue = now - prediction.deadline
        metrics.add_metric(name="SecondsPastDeadline", unit=MetricUnit.Seconds, value=overdue)
