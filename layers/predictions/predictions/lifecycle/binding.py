"""Bind: a prediction and the one that Replicate made of it."""

import os
import time
from collections.abc import Callable

from predictions.lifecycle.cancel import CancelPrediction
from predictions.lifecycle.orphans import Orphans
from predictions.lifecycle.transitions import Transitions
from predictions.store.predictions import Prediction
from predictions.upstream.prediction import UpstreamPrediction


class Binding:
    """Binds predictions.

    Args:
        transitions: Writes what Replicate said.
        orphans: Cancels what was started twice.
        canceling: Passes on a cancel that came before the id.
        first_poll: When the first poll is due, after the execution began to wait, in seconds.
        now: The time, in seconds since 1970.
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
        """From `FIRST_POLL_SECONDS`."""
        return cls(transitions, orphans, canceling, first_poll=int(os.environ["FIRST_POLL_SECONDS"]))

    def bind(self, prediction: Prediction, told: UpstreamPrediction) -> Prediction:
        """Bind a prediction to what Replicate started for it; return the prediction as it is then."""
        now = self._now()
        next_check_at = int(now) + self._first_poll + 120
        merged = self._transitions.merge(prediction, told, next_check_at=next_check_at)
        if merged.orphans:
            self._orphans.cancel(merged)
        if merged.cancel_requested and not merged.terminal and merged.upstream_id == told.id:
            return self._canceling.pass_on(merged) or merged
        return merged
