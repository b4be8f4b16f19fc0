"""Orphans: predictions at Replicate that a second create of the same request has started.

Each is canceled. One that was created although a reading had shown that nothing was started stops all resubmission for
an hour (`sk` = `breaker`), since evidence of this kind was wrong.
"""

import time
from collections.abc import Callable

from predictions.aws.dynamodb import Table
from predictions.lifecycle.timing import NOT_FOUND_LIMIT
from predictions.observability import MetricUnit, logger, metrics
from predictions.status import Status
from predictions.store.keys import BREAKER, upstream_key
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction
from predictions.upstream.client import Replicate
from predictions.upstream.errors import NotFound, Unavailable

STOP_SECONDS = 3600
"""Time without resubmission after wrong evidence."""


class Breaker:
    """Stop all resubmission of this stack."""

    def __init__(self, items: Table, *, now: Callable[[], float] = time.time) -> None:
        self._items = items
        self._now = now

    @classmethod
    def from_env(cls) -> "Breaker":
        """Read `TABLE_NAME`."""
        return cls(Table.from_env())

    def stop(self, prediction: Prediction, upstream_id: str) -> None:
        """Stop all resubmission of this stack for `STOP_SECONDS`: evidence has proved wrong."""
        item = {"until": int(self._now()) + STOP_SECONDS, "id": prediction.id, "upstream_id": upstream_id}
        self._items.put_item(BREAKER, item)
        logger.error("evidence of absence was wrong: nothing is submitted again for an hour", upstream_id=upstream_id)
        metrics.add_metric(name="ResubmissionStopped", unit=MetricUnit.Count, value=1)

    def stopped_seconds(self) -> int:
        """Return for how many seconds resubmission is stopped; 0 if it is not."""
        stopped = self._items.get_item(BREAKER) or {}
        return max(0, int(stopped.get("until", 0) - self._now()))


class Orphans:
    """Cancel orphans.

    Args:
        breaker: Stops resubmission after wrong evidence.
    """

    def __init__(
        self,
        table: PredictionsTable,
        replicate: Replicate,
        breaker: Breaker,
        items: Table,
    ) -> None:
        self._table = table
        self._replicate = replicate
        self._breaker = breaker
        self._items = items

    @classmethod
    def from_env(cls, table: PredictionsTable, replicate: Replicate, breaker: Breaker) -> "Orphans":
        """Read `TABLE_NAME`."""
        return cls(table, replicate, breaker, Table.from_env())

    def cancel(self, prediction: Prediction) -> None:
        """Cancel the orphans of a prediction; the sweep repeats a cancel that fails."""
        for upstream_id in sorted(prediction.orphans):
            if prediction.unknown_creates:
                self._breaker.stop(prediction, upstream_id)
            self._remember(upstream_id, prediction)
            try:
                told = self._replicate.cancel(upstream_id, prediction.collection)
                if prediction.upstream_id and told.status in (Status.SUCCEEDED, Status.FAILED):
                    logger.error("paid twice: an orphan had ended", upstream_id=upstream_id)
                    metrics.add_metric(name="PaidTwice", unit=MetricUnit.Count, value=1)
            except NotFound:
                if prediction.orphans_not_found + 1 < NOT_FOUND_LIMIT:
                    # As in a poll, one 404 is not believed: an orphan that runs on is paid for.
                    logger.warning("orphan not found", upstream_id=upstream_id, times=prediction.orphans_not_found + 1)
                    self._table.count_orphans_not_found(prediction)
                    continue
                logger.info("orphan is gone", upstream_id=upstream_id)
            except Unavailable as error:
                logger.warning("orphan not canceled yet", upstream_id=upstream_id, reason=str(error))
                continue
            self._table.orphan_canceled(prediction, upstream_id)

    def _remember(self, upstream_id: str, prediction: Prediction) -> None:
        """Record whose orphan an upstream prediction is, so that it becomes no other prediction's candidate."""
        item = {"id": prediction.id, "orphan": True, "expires_at": prediction.expires_at}
        self._items.put_item(upstream_key(upstream_id), item)
