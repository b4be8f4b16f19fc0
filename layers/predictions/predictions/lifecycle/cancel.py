"""Cancel: the owner's flag, and Replicate's cancel."""

import time
from collections.abc import Callable, Sequence

from predictions.admission.rate_limiter import Limiter
from predictions.lifecycle.reservations import Reservations
from predictions.lifecycle.transitions import Transitions
from predictions.observability import logger
from predictions.status import TERMINAL_RANK, Status, rank_of
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction
from predictions.upstream.client import Replicate
from predictions.upstream.errors import NotFound, Unavailable

_CANCEL_SECONDS = 5
"""Time for one cancel: none begins with less time left."""


class CancelPrediction:
    """Cancel predictions, here and at Replicate.

    Args:
        transitions: Merges what Replicate said, and ends predictions.
    """

    def __init__(
        self,
        table: PredictionsTable,
        replicate: Replicate,
        transitions: Transitions,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._replicate = replicate
        self._transitions = transitions
        self._now = now

    @classmethod
    def from_env(cls) -> "CancelPrediction":
        """Read the environment of a function that cancels predictions."""
        table = PredictionsTable.from_env()
        return cls(table, Replicate.from_env(), Transitions(table, Reservations(Limiter.from_env())))

    def cancel(self, prediction: Prediction) -> Prediction:
        """Cancel a prediction for its owner.

        Returns:
            The prediction as it is then: still open if Replicate has yet to end it, unchanged if it was completed.
        """
        flagged = self._table.request_cancel(prediction.id, self._now()) or self._table.get(prediction.id) or prediction
        if flagged.terminal:
            return flagged
        if flagged.upstream_id:
            return self.pass_on(flagged) or flagged
        if not flagged.claimed:
            return self._transitions.end(flagged, Status.CANCELED, None)
        return flagged

    def cancel_open(self, prediction_ids: Sequence[str], owner: str, remaining_seconds: Callable[[], float]) -> bool:
        """Cancel the open ones of an owner's predictions; return False if the time was too short for all."""
        for result in self._table.results(prediction_ids, owner).values():
            if not result.prediction.terminal:
                if remaining_seconds() < _CANCEL_SECONDS:
                    return False
                self.cancel(result.prediction)
        return True

    def pass_on(self, prediction: Prediction) -> Prediction | None:
        """Ask Replicate to cancel a prediction, and merge a completion in its response.

        Of the response, which holds the whole prediction, only the status is read: a completion is read by a GET, by
        the same rules as in a poll.

        Returns:
            The prediction as it is then, or None if Replicate did not answer: the flag or the deadline stays, and the
            next poll, or the sweep, asks again.
        """
        upstream_id = prediction.upstream_id or ""
        try:
            status = self._replicate.cancel(upstream_id, prediction.collection).status
            if status is None or rank_of(status) < TERMINAL_RANK:
                return prediction
            return self._transitions.merge(prediction, self._replicate.get(upstream_id, prediction.collection))
        except (NotFound, Unavailable) as error:
            logger.warning("cancel without answer", reason=str(error))
            return None
