"""Merge a report of Replicate: the table's rule, its metrics, and waking the execution that waits."""

from typing import TYPE_CHECKING

from predictions.lifecycle.tracking import wake
from predictions.observability import MetricUnit, count_ended, logger, metrics
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Change, Merge, Prediction

if TYPE_CHECKING:
    from predictions.upstream.prediction import UpstreamPrediction


def merge(
    table: PredictionsTable,
    prediction_id: str,
    report: "UpstreamPrediction",
    now: float,
    *,
    next_check_at: int | None = None,
    known: Prediction | None = None,
) -> Merge:
    """Merge what Replicate said of a prediction, whichever way it came.

    The token of a completed prediction is sent again, in case an earlier function crashed between its write and its
    message.

    Args:
        table: The predictions.
        prediction_id: Our id.
        report: What Replicate said.
        now: The time.
        next_check_at: When the sweep should look, if the caller knows better than the item.
        known: As for `PredictionsTable.merge`.
    """
    outcome = table.merge(prediction_id, report, now, next_check_at=next_check_at, known=known)
    if outcome.change is Change.ORPHAN:
        logger.warning("orphan: a second prediction of the same request", upstream_id=report.id)
        metrics.add_metric(name="Orphans", unit=MetricUnit.Count, value=1)
    if outcome.change in (Change.ENDED, Change.CLOSED) and outcome.prediction is not None:
        if outcome.change is Change.ENDED:
            count_unknown_cost(outcome.prediction)
            if not outcome.prediction.awaits_copy:
                count_ended(outcome.prediction.visible, now - outcome.prediction.created)
        wake(outcome.prediction)
    return outcome


def count_unknown_cost(ended: Prediction) -> None:
    """Count a prediction that has just ended at an unknown cost; its item says why."""
    if ended.cost_micro_dollars is None:
        metrics.add_metric(name="CostsUnknown", unit=MetricUnit.Count, value=1)
