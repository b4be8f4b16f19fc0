"""Tracking of open predictions: the execution that follows each, and how old they are."""

import time
from collections.abc import Callable

from predictions.aws.executions import Executions
from predictions.observability import MetricUnit, metrics
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction


class Tracking:
    """Keep an execution running for each open prediction."""

    def __init__(
        self, table: PredictionsTable, executions: Executions, *, now: Callable[[], float] = time.time
    ) -> None:
        self._table = table
        self._executions = executions
        self._now = now

    @classmethod
    def from_env(cls, table: PredictionsTable) -> "Tracking":
        """Read `STATE_MACHINE_ARN`."""
        return cls(table, Executions.from_env())

    def execution_arn(self, prediction_id: str, n: int) -> str:
        """Return the ARN of a prediction's nth execution, whether it exists or not."""
        return self._executions.arn(prediction_id, n)

    def status(self, prediction: Prediction) -> str | None:
        """Return the status of a prediction's execution, or None if it was never started."""
        return self._executions.status(prediction.id, prediction.execution_n)

    def track(self, prediction: Prediction, *, submit: bool) -> None:
        """Start an execution for a prediction, unless one runs."""
        following: Prediction | None = prediction
        while following is not None and not self._executions.start(following.id, following.execution_n, submit=submit):
            # The name belongs to an execution that has ended.
            n = following.execution_n + 1
            following = self._table.next_execution(following, self._executions.arn(following.id, n), self._now())


def measure_age(prediction: Prediction, now: float) -> None:
    """Count how old an open prediction is, and how long its deadline has passed."""
    # Polls and sweeps check everything that stays open: the maximum is the age of the oldest.
    metrics.add_metric(name="OpenSeconds", unit=MetricUnit.Seconds, value=max(0, now - prediction.created))
    if now > prediction.deadline:
        overdue = now - prediction.deadline
        metrics.add_metric(name="SecondsPastDeadline", unit=MetricUnit.Seconds, value=overdue)
