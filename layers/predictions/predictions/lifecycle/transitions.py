"""Transitions that every step makes: merge what Replicate said, and end a prediction without it."""

import time
from collections.abc import Callable
from typing import Any

from predictions.lifecycle.merging import count_unknown_cost, merge
from predictions.lifecycle.reservations import Reservations, lane_of
from predictions.lifecycle.tracking import wake
from predictions.observability import count_ended, logger
from predictions.status import Status
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction, Waits
from predictions.upstream.prediction import UpstreamPrediction


class Transitions:
    """Change predictions, count completions, and wake the execution that waits.

    Args:
        reservations: Gives back the start of a prediction that ended unsubmitted.
    """

    def __init__(
        self, table: PredictionsTable, reservations: Reservations, *, now: Callable[[], float] = time.time
    ) -> None:
        self._table = table
        self._reservations = reservations
        self._now = now

    def merge(
        self, prediction: Prediction, told: UpstreamPrediction, *, next_check_at: int | None = None, fresh: bool = False
    ) -> Prediction:
        """Merge what Replicate said of a prediction; return the prediction as it is then.

        Args:
            prediction: The prediction.
            told: What Replicate said.
            next_check_at: When the sweep should look, if the caller knows better than the item.
            fresh: Whether the caller has just read or written the prediction: then it is not read again.
        """
        known = prediction if fresh else None
        outcome = merge(self._table, prediction.id, told, self._now(), next_check_at=next_check_at, known=known)
        return outcome.prediction or prediction

    def end(
        self, prediction: Prediction, status: Status, error: str | None, *, refusal: dict[str, Any] | None = None,
        not_accepted: bool = False,
    ) -> Prediction:  # fmt: skip
        """End a prediction; return it as it is then: another function may have ended it otherwise.

        Args:
            prediction: The prediction.
            status: Its terminal status.
            error: Why.
            refusal: Replicate's refusal of the create.
            not_accepted: Whether Replicate is known to have accepted nothing although it is claimed.
        """
        ended = self._table.end(prediction, status, error, self._now(), refusal=refusal, not_accepted=not_accepted)
        if ended is None:
            there = self._table.get(prediction.id) or prediction
            if there.terminal:
                # Another function may have crashed before it woke the execution, or this write's response was lost.
                wake(there)
            return there
        logger.info("ended by the stack", status=status.value)
        count_ended(ended.visible, self._now() - ended.created)
        count_unknown_cost(ended)
        wake(ended)
        # Last, since a crash before it does no harm: a start then stays unused.
        if not ended.claimed and not ended.upstream_id and (ended.submit_at or 0) > self._now():
            self._reservations.release(lane_of(ended), ended.owner, Waits(ended.reserved_start, ended.turn_ms))
        return ended
