"""Poll: ask Replicate for what no webhook delivered, and enforce the deadline."""

import time
from collections.abc import Callable

from botocore.exceptions import BotoCoreError, ClientError

from predictions.lifecycle.abandonment import Abandonment
from predictions.lifecycle.cancel import CancelPrediction
from predictions.lifecycle.connections import Connections
from predictions.lifecycle.orphans import Orphans
from predictions.lifecycle.submit import SubmitPrediction
from predictions.lifecycle.timing import ABANDON_SECONDS, NOT_FOUND_LIMIT, STALLED_LOOKS
from predictions.lifecycle.tracking import measure_age
from predictions.lifecycle.transitions import Transitions
from predictions.lifecycle.unknown_claims import UnknownClaims
from predictions.observability import MetricUnit, logger, metrics
from predictions.status import TERMINAL_RANK, Status, rank_of
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction
from predictions.upstream.client import Replicate
from predictions.upstream.errors import NotFound, Unavailable


class PollPrediction:
    """Advance open predictions without a webhook.

    Args:
        table: The predictions.
        replicate: Replicate.
        transitions: Merges what Replicate said.
        canceling: Passes on the owner's cancel, and enforces the deadline.
        orphans: Cancels second predictions of a request.
        claims: Resolves claims with an unknown outcome.
        submitting: Submits unclaimed predictions.
        abandonment: Ends predictions over which functions crash.
        now: The time, in seconds since 1970.
    """

    def __init__(
        self,
        table: PredictionsTable,
        replicate: Replicate,
        transitions: Transitions,
        canceling: CancelPrediction,
        orphans: Orphans,
        claims: UnknownClaims,
        submitting: SubmitPrediction,
        abandonment: Abandonment,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._replicate = replicate
        self._transitions = transitions
        self._canceling = canceling
        self._orphans = orphans
        self._claims = claims
        self._submitting = submitting
        self._abandonment = abandonment
        self._now = now

    @classmethod
    def from_env(cls) -> "PollPrediction":
        """Read the environment of poll_prediction."""
        connections = Connections.from_env()
        claims = UnknownClaims.from_env(connections)
        return cls(
            connections.table,
            connections.replicate,
            connections.transitions,
            connections.canceling,
            connections.orphans,
            claims,
            SubmitPrediction.over(connections, claims),
            Abandonment(connections.table, connections.transitions),
        )

    def poll(self, prediction_id: str) -> None:
        """Advance an open prediction without a webhook.

        Raises:
            PredictionThrottled: The prediction has to be submitted, and has to wait.
        """
        prediction = self._table.get(prediction_id)
        if prediction is None:
            return
        if prediction.terminal:
            if prediction.orphans:
                self._orphans.cancel(prediction)
            return
        metrics.add_metric(name="Polls", unit=MetricUnit.Count, value=1)
        measure_age(prediction, self._now())
        # One check fewer than in the sweep: the check that started this execution waits for this poll.
        if prediction.stalled_looks >= STALLED_LOOKS - 1 and self._abandonment.is_due(prediction):
            self._abandonment.end(prediction)
            return
        if prediction.orphans:
            self._orphans.cancel(prediction)
        if prediction.upstream_id:
            self._ask(prediction)
        elif prediction.claimed and prediction.submit_until:
            self._claims.look_for(prediction)
        elif prediction.claimed:
            self._claims.reconcile(prediction)
        else:
            self._submitting.submit(prediction_id)
        if prediction.stalled_looks:
            self._table.forget_stalled_looks(prediction)

    def _ask(self, prediction: Prediction) -> None:
        now = self._now()
        upstream_id = prediction.upstream_id or ""
        not_found = 0
        try:
            told = self._replicate.get(upstream_id, prediction.collection)
            if told.too_large and rank_of(told.status) < TERMINAL_RANK:
                # The prediction may run for hours, and its output can be neither stored nor shown: it should cost
                # nothing more. If this cancel fails, the next poll repeats it.
                canceled = self._replicate.cancel(upstream_id, prediction.collection)
                logger.warning("canceled: its output is too large", upstream_id=upstream_id, status=canceled.status)
                told = told.failed_for_its_size()
            prediction = self._transitions.merge(prediction, told)
            if prediction.terminal:
                metrics.add_metric(name="EndsByPoll", unit=MetricUnit.Count, value=1)
            elif prediction.cancel_requested or now >= prediction.deadline:
                prediction = self._canceling.pass_on(prediction) or prediction
        except NotFound:
            not_found = prediction.not_found_count + 1
        except Unavailable as error:
            logger.warning("poll without answer", reason=str(error))
            not_found = prediction.not_found_count
        except (ClientError, BotoCoreError):
            # A result that cannot be stored must not keep a prediction open for ever.
            if now < prediction.deadline + ABANDON_SECONDS:
                raise
            logger.exception("the end cannot be kept")
        if prediction.terminal:
            return
        if not_found >= NOT_FOUND_LIMIT:
            self._transitions.end(
                prediction, Status.FAILED, f"Replicate does not know {prediction.object} {upstream_id} any more."
            )
        elif now >= prediction.deadline + ABANDON_SECONDS:
            why = (
                f"No end of Replicate's {prediction.object} {upstream_id} could be had until an hour past its deadline."
            )
            self._transitions.end(prediction, Status.FAILED, why)
        elif not_found != prediction.not_found_count:
            self._table.count_not_found(prediction, not_found)
