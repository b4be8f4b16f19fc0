"""Live reads: show the caller of a GET what Replicate shows now, within bounds.

A GET of one open, bound prediction asks Replicate at most once per period and merges the response like a webhook's. It
is an offer only: whatever fails, the caller gets what the table holds, at most `READ_SECONDS` later. No payload is
shown that the table does not hold, so everything that protects stored data (deletion, files that are not ours yet)
protects these reads too.
"""

import os
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from predictions.admission.live_budget import LiveBudget
from predictions.lifecycle.merging import merge
from predictions.observability import MetricUnit, logger, metrics
from predictions.status import rank_of
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Change, Prediction, PredictionDetail
from predictions.upstream.errors import NotFound, Unavailable

if TYPE_CHECKING:
    from predictions.upstream.client import Replicate
    from predictions.upstream.prediction import UpstreamPrediction

READ_SECONDS = 1.5
"""How long a caller waits for Replicate, in all."""

READ_LIMIT_BYTES = 1024**2
"""The largest response that a live read takes; webhooks and polls take larger ones."""

# An old prediction changes slowly: it is read at most this often in its life so far.
_READS_IN_A_LIFE = 30


class LiveReads:
    """Refresh predictions for callers that look at them.

    Args:
        table: The predictions.
        replicate: Gives Replicate's client, the same each time; not called before the first read.
        budget: The stack's budget of live reads.
        period: Seconds between two reads of one prediction, at least; 0 turns live reads off.
        now: The time, in seconds since 1970.
    """

    def __init__(
        self,
        table: PredictionsTable,
        replicate: Callable[[], "Replicate"],
        budget: LiveBudget,
        *,
        period: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._replicate = replicate
        self._budget = budget
        self._period = period
        self._now = now

    @classmethod
    def from_env(cls, table: PredictionsTable) -> "LiveReads":
        """Read `LIVE_READ_SECONDS` and what `LiveBudget` and `Replicate` read."""

        @cache
        def replicate() -> "Replicate":
            # Loaded with the first live read: finished predictions are read without an HTTP client.
            from predictions.upstream.client import Replicate

            return Replicate.from_env()

        return cls(table, replicate, LiveBudget.from_env(), period=int(os.environ["LIVE_READ_SECONDS"]))

    def refresh(self, detail: PredictionDetail) -> PredictionDetail:
        """Return a prediction as Replicate shows it now, or as it was given.

        Nothing is asked about one that is unbound or has finished, within the period of the last read, without
        budget, and while live reads are paused.
        """
        try:
            if not self._is_due(detail) or not self._begin(detail.prediction):
                return detail
            report = self._ask(detail.prediction)
            if report is None or not self._is_news(detail, report):
                return detail
            outcome = merge(self._table, detail.prediction.id, report, self._now())
            if outcome.change is Change.ENDED:
                metrics.add_metric(name="EndsByLiveRead", unit=MetricUnit.Count, value=1)
            return self._table.read(detail.prediction.id) or detail
        except Exception:  # noqa: BLE001  # whatever it is, the table's answer is right, and the next GET reads again
            logger.exception("live read failed")
            return detail

    def _is_due(self, detail: PredictionDetail) -> bool:
        prediction = detail.prediction
        if not self._period or not prediction.upstream_id or prediction.terminal or self._budget.is_closed:
            return False
        return (detail.live_read_at or 0) <= self._latest(prediction)

    def _latest(self, prediction: Prediction) -> int:
        """Return the latest time of the last read at which another one is due."""
        now = int(self._now())
        return now - max(self._period, (now - prediction.created) // _READS_IN_A_LIFE)

    def _begin(self, prediction: Prediction) -> bool:
        """Acquire the period's one read, then a part of the budget: of many readers of one prediction only one uses it.

        If the function crashes after this, the next period's reader asks.
        """
        if not self._table.begin_live_read(prediction, self._latest(prediction), self._now()):
            return False
        return self._budget.acquire()

    def _ask(self, prediction: Prediction) -> "UpstreamPrediction | None":
        metrics.add_metric(name="LiveReads", unit=MetricUnit.Count, value=1)
        try:
            report = self._replicate().glimpse(
                prediction.upstream_id or "", prediction.collection, seconds=READ_SECONDS, limit_bytes=READ_LIMIT_BYTES
            )
        except NotFound:
            # The poll counts these, and draws the conclusion.
            self._budget.succeeded()
            return None
        except Unavailable as error:
            logger.warning("live read without response", reason=str(error))
            self._budget.failed(throttled=error.status == 429)
            return None
        self._budget.succeeded()
        # What is too large is for webhooks and polls, which end it with a reason.
        return report if report is not None and report.too_large is None else None

    def _is_news(self, detail: PredictionDetail, report: "UpstreamPrediction") -> bool:
        """Return whether a report says more than the table: a merge without news would still cost a write."""
        rank = rank_of(report.status)
        return rank > detail.prediction.rank or (
            rank == detail.prediction.rank and self._table.is_progress(detail, report)
        )
