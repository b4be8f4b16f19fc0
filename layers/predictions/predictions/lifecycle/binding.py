"""Bind a prediction to the one that Replicate started for it."""

import os
import time
from collections.abc import Callable

from predictions.lifecycle.cancel import CancelPrediction
from predictions.lifecycle.orphans import Orphans
from predictions.lifecycle.transitions import Transitions
from predictions.status import TERMINAL_RANK, rank_of
from predictions.store.records import Prediction
from predictions.upstream.prediction import UpstreamPrediction


class Binding:
    """Bind predictions to upstream ones.

    Args:
        transitions: Merges what Replicate said.
        orphans: Cancels second predictions of a request.
        canceling: Passes on a cancel that came before the bind.
        first_poll: Seconds from the beginning of an execution's wait to its first poll.
    """

    def __init__(
        self,
        transitions: Transitions,
        orphans: Orphans,
        canceling: CancelPrediction,
        *,
        first_poll: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._transitions = transitions
        self._orphans = orphans
        self._canceling = canceling
        self._first_poll = first_poll
        self._now = now

    @classmethod
    def from_env(cls, transitions: Transitions, orphans: Orphans, canceling: CancelPrediction) -> "Binding":
        """Read `FIRST_POLL_SECONDS`."""
        return cls(transitions, orphans, canceling, first_poll=int(os.environ["FIRST_POLL_SECONDS"]))

    def bind(self, prediction: Prediction, told: UpstreamPrediction) -> Prediction:
        """Bind a prediction to what Replicate started for it; return the prediction as it is then."""
        check_at = int(self._now()) + self._first_poll + 120
        # The check that its claim has set is sooner, and the wait of its execution sets the next one: none is written
        # here, since that costs two units of the index.
        next_check_at = None if prediction.next_check_at and prediction.next_check_at <= check_at else check_at
        # A completion is merged into what is there then: its files are leased to the execution of that moment.
        fresh = rank_of(told.status) < TERMINAL_RANK
        merged = self._transitions.merge(prediction, told, next_check_at=next_check_at, fresh=fresh)
        if merged.orphans:
            self._orphans.cancel(merged)
        if merged.cancel_requested and not merged.terminal and merged.upstream_id == told.id:
            return self._canceling.pass_on(merged) or merged
        return merged
