"""Sweep: recover stalled predictions."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping

from botocore.exceptions import BotoCoreError, ClientError

from predictions.admission.rate_limiter import Limiter
from predictions.clock import backoff_seconds
from predictions.lifecycle.abandonment import Abandonment
from predictions.lifecycle.binding import Binding
from predictions.lifecycle.cancel import CancelPrediction
from predictions.lifecycle.connections import Connections
from predictions.lifecycle.orphans import Orphans
from predictions.lifecycle.reconcile import UnknownSubmissions
from predictions.lifecycle.timing import STALLED_LOOKS
from predictions.lifecycle.tracking import Tracking, measure_age, wake
from predictions.lifecycle.transitions import Transitions
from predictions.observability import MetricUnit, logger, metrics
from predictions.status import Status
from predictions.store.keys import OPEN_SHARDS
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction

# Exponential backoff of the checks of a prediction over which functions crash: from 3 minutes to an hour. To 15 minutes
# if it is unbound: an hour after completion Replicate removes the input by which an entry of its list is recognized.
_LOOK_AGAIN_SECONDS = 180
_LOOK_AGAIN_MOST_SECONDS = 3600
_LOOK_AGAIN_UNBOUND_SECONDS = 900
# A sweep stops this long before its function times out, and checks what it could not finish after as long.
_STEP_SECONDS = 60
_STUCK_SECONDS = 600


class SweepPredictions:
    """Recover stalled predictions.

    Args:
        limiter: Says whether submissions are paused.
        tracking: Starts executions.
        transitions: Ends predictions.
        canceling: Passes on the owner's cancel.
        orphans: Cancels second predictions of a request.
        binding: Binds predictions that a reading of the list shows.
        unknown: Reads Replicate's list.
        abandonment: Ends predictions over which functions crash.
        first_poll: Seconds from the beginning of an execution's wait to its first poll.
    """

    def __init__(
        self,
        table: PredictionsTable,
        limiter: Limiter,
        tracking: Tracking,
        transitions: Transitions,
        canceling: CancelPrediction,
        orphans: Orphans,
        binding: Binding,
        unknown: UnknownSubmissions,
        abandonment: Abandonment,
        *,
        first_poll: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._limiter = limiter
        self._tracking = tracking
        self._transitions = transitions
        self._canceling = canceling
        self._orphans = orphans
        self._binding = binding
        self._unknown = unknown
        self._abandonment = abandonment
        self._first_poll = first_poll
        self._now = now

    @classmethod
    def over(cls, connections: Connections) -> "SweepPredictions":
        """Sweep over the connections of a function, by `FIRST_POLL_SECONDS`."""
        return cls(
            connections.table,
            connections.limiter,
            Tracking.from_env(connections.table),
            connections.transitions,
            connections.canceling,
            connections.orphans,
            connections.binding,
            UnknownSubmissions.from_env(connections.table, connections.replicate, connections.registry),
            Abandonment(connections.table, connections.transitions),
            first_poll=int(os.environ["FIRST_POLL_SECONDS"]),
        )

    def sweep(
        self,
        limit: int,
        remaining_seconds: Callable[[], float],
        others: Mapping[str, Callable[[str], None]] | None = None,
        shards: Iterable[str] = OPEN_SHARDS,
    ) -> int:
        """Check every prediction whose check is due, as far as the time allows: the next sweep continues.

        Args:
            limit: The largest number of items to check.
            remaining_seconds: The time left to the function.
            others: Functions that check items of other kinds, such as `pipeline`, by the id that follows in their key.
                Each defers the next check before anything else.
            shards: Where to look for them.

        Returns:
            The number of checked items.
        """
        looked_at = 0
        sweepers = {"prediction": self._sweep, **(others or {})}
        for pk in self._table.due(self._now(), limit, shards):
            if remaining_seconds() < _STEP_SECONDS:
                break
            looked_at += 1
            kind, _, each = pk.partition("#")
            try:
                sweepers[kind](each)
            except Exception:  # noqa: BLE001  # an item that always fails must not hold up the others
                logger.exception("swept without success", pk=pk)
                # Nor may it stay first in the queue, if its first write, which defers it, is the one that failed.
                with contextlib.suppress(ClientError, BotoCoreError):
                    stuck = self._table.get(each)
                    if stuck and stuck.next_check_at and stuck.next_check_at <= self._now():
                        self._table.check_again_at(stuck, self._now() + _STUCK_SECONDS)
        return looked_at

    def _sweep(self, prediction_id: str) -> None:
        now = self._now()
        prediction = self._table.get(prediction_id)
        # The index may lag behind the item.
        if prediction is None or prediction.next_check_at is None or prediction.next_check_at > now:
            return
        logger.set_correlation_id(prediction_id)
        # Before any other call: a function that runs out of memory or time raises nothing, and an item that stays due
        # stays before all others.
        begun = self._table.begin_look(prediction, self._look_again_at(prediction, now))
        if begun is None:
            return
        prediction = begun
        if prediction.stalled_looks > 1:
            # If the function is killed, this is the last line of its log.
            logger.warning("looked at again: the look before died, or the execution", stalled=prediction.stalled_looks)
        if prediction.stalled_looks >= STALLED_LOOKS and self._abandonment.is_due(prediction):
            prediction = self._abandonment.end(prediction)
        if prediction.orphans:
            self._orphans.cancel(prediction)
            prediction = self._table.get(prediction_id) or prediction
        if prediction.deleted:
            self._table.delete_data(prediction, now)
        if prediction.ended_visibly:
            if prediction.orphans:
                self._table.end_look(prediction, now + _STEP_SECONDS, stalled=False)
            elif not prediction.deleted:
                self._table.close(prediction)
            return
        execution = self._tracking.status(prediction)
        unclaimed = not prediction.claimed and not prediction.upstream_id
        unanswered = execution is None and prediction.source == "http" and not prediction.keyed
        if unanswered:
            unanswered = not self._tracking.was_tracked(prediction)
        if unclaimed and unanswered:
            self._transitions.end(prediction, Status.FAILED, "It was not submitted: its caller received an error.")
            return
        lost = not prediction.upstream_id and prediction.claimed is not None and prediction.submit_until is not None
        if lost and unanswered:
            # Its function crashed before the response: the caller got an error, and may have repeated the request.
            prediction = self._table.note_unknown(prediction, {"unanswered": True}) or prediction
        logger.info("stalled", status=prediction.status, execution=execution, stalled=prediction.stalled_looks)
        measure_age(prediction, self._now())
        unheard = False
        if prediction.cancel_requested and prediction.upstream_id and not prediction.terminal:
            canceled = self._canceling.pass_on(prediction)
            unheard = canceled is None
            prediction = canceled or prediction
        soon = now + self._first_poll + 120
        dead = execution not in ("RUNNING", None)
        if dead and self._resumes_later(prediction):
            # A check that got no response from Replicate has not crashed: the cancel is repeated soon, by a check that
            # may still defer the execution.
            again = soon if unheard else self._look_again_at(prediction, now)
            self._table.end_look(prediction, again, stalled=True, deferred=not unheard)
            return
        if execution == "RUNNING":
            if prediction.terminal:
                wake(prediction)
        else:
            metrics.add_metric(name="ExecutionsReplaced", unit=MetricUnit.Count, value=1)
            # An execution that succeeded copies nothing any more: it was resumed as if there were nothing to copy.
            takes_copy = prediction.awaits_copy and execution == "SUCCEEDED"
            self._tracking.track(prediction, submit=unclaimed or lost, takes_copy=takes_copy)
        # A new execution that waits for a webhook records a time of its own; for one that copies, this time holds.
        again = self._look_again_at(prediction, now) if dead and prediction.stalled_looks > 1 and not unheard else 0
        self._table.end_look(prediction, max(again, soon), stalled=dead)

    def _look_again_at(self, prediction: Prediction, now: float) -> float:
        """Return when to check again if this check crashes: exponential backoff, up to the last check of all."""
        most = _LOOK_AGAIN_UNBOUND_SECONDS if prediction.upstream_id is None else _LOOK_AGAIN_MOST_SECONDS
        again = now + backoff_seconds(_LOOK_AGAIN_SECONDS, prediction.stalled_looks, most)
        last = self._abandonment.due_at(prediction)
        return again if now >= last else min(again, last)

    def _resumes_later(self, prediction: Prediction) -> bool:
        """Return whether a dead execution is replaced by the next check only: from the second in a row on.

        An unbound prediction does not wait: nothing else looks for what its create has started, and only small
        responses are parsed for that. The files of a completed prediction do not wait either: Replicate removes them.
        """
        again = prediction.stalled_looks > 1 and prediction.execution_n > 1 and prediction.upstream_id is not None
        return again and prediction.resume_n != prediction.execution_n and not prediction.terminal

    def look_again(self) -> int:
        """Read Replicate's list again for resubmitted predictions that are due; return their number.

        Raises:
            ClientError, BotoCoreError: AWS failed; the next sweep repeats it.
        """
        return self._unknown.look_again(self._orphans.cancel, self._binding.bind)

    def measure(self) -> None:
        """Emit the metric of a pause of submissions; none if they are not paused.

        Raises:
            ClientError, BotoCoreError: AWS failed.
        """
        if self._limiter.limiter_state().pause(self._now()):
            metrics.add_metric(name="Paused", unit=MetricUnit.Count, value=1)
