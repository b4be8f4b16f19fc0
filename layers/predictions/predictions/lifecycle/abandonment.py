"""Abandonment: the end of a prediction over which functions crash each time."""

import time
from collections.abc import Callable

from predictions.files.output_references import StoredFile
from predictions.lifecycle.timing import ABANDON_SECONDS
from predictions.lifecycle.transitions import Transitions
from predictions.observability import MetricUnit, count_ended, logger, metrics
from predictions.status import Status
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction

# The sweep gives up the files of a completed prediction this long after completion: Replicate has removed them by then,
# and the copier stops retrying an hour earlier.
_ABANDON_COPY_SECONDS = 3 * 3600


class Abandonment:
    """End predictions without asking Replicate.

    Args:
        transitions: Writes the end.
    """

    def __init__(
        self, table: PredictionsTable, transitions: Transitions, *, now: Callable[[], float] = time.time
    ) -> None:
        self._table = table
        self._transitions = transitions
        self._now = now

    @staticmethod
    def due_at(prediction: Prediction) -> int:
        """Return when a prediction over which functions crash is ended without asking Replicate."""
        if prediction.awaits_copy:
            return (prediction.ended or 0) + _ABANDON_COPY_SECONDS
        return prediction.deadline + ABANDON_SECONDS

    def is_due(self, prediction: Prediction) -> bool:
        """Return whether that time has come."""
        return self._now() >= self.due_at(prediction)

    def end(self, prediction: Prediction) -> Prediction:
        """End a prediction over which functions crashed, without asking Replicate or its file host.

        Its orphans are closed too: they were created with the same deadline, so Replicate has canceled them.
        """
        logger.error("functions crashed on it: ended without a call", stalled=prediction.stalled_looks)
        for upstream_id in sorted(prediction.orphans):
            self._table.orphan_canceled(prediction, upstream_id)
        prediction = self._table.get(prediction.id) or prediction
        if prediction.awaits_copy:
            lost = StoredFile("", 0, error="The files could not be copied: functions crashed on this output each time.")
            metrics.add_metric(name="CopiesFailed", unit=MetricUnit.Count, value=1)
            ended = self._table.end_copy(prediction, [lost], self._now())
            if ended is not None:
                count_ended(ended.visible, self._now() - ended.created)
            return ended or self._table.get(prediction.id) or prediction
        if prediction.terminal:
            return prediction
        of = f" Its id at Replicate is {prediction.upstream_id}." if prediction.upstream_id else ""
        why = (
            "This stack's functions ran out of memory or time each time that they looked at it, so it was ended an "
            f"hour past its deadline without asking Replicate again.{of} Have the model return large outputs as files."
        )
        return self._transitions.end(prediction, Status.FAILED, why)
