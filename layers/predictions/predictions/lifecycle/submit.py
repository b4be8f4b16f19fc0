"""Submit: claim and POST, for an intent that was only written or whose POST was not accepted."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from predictions.admission.quotas import LimitReached, OwnersUsage
from predictions.admission.rate_limiter import Limiter
from predictions.admission.schedule import AskAgain, Start, TooLate
from predictions.aws.clients import api_url
from predictions.errors import BudgetReached, PredictionThrottled, Problem
from predictions.intents.model import Reference
from predictions.lifecycle.connections import Connections
from predictions.lifecycle.create import Creates
from predictions.lifecycle.model_lookup import ModelLookup
from predictions.lifecycle.orphans import Breaker
from predictions.lifecycle.reservations import Reservations, lane_of, waits_of
from predictions.lifecycle.spending import BUDGET_WAIT_SECONDS, Spending
from predictions.lifecycle.timing import PAUSE_STEP_SECONDS, SOON_SECONDS, START_MARGIN_SECONDS
from predictions.lifecycle.transitions import Transitions
from predictions.lifecycle.unknown_claims import UnknownClaims
from predictions.observability import logger
from predictions.status import Status
from predictions.store.origins import is_active
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction
from predictions.store.schemas import StoredSchemas
from predictions.upstream.errors import NotAccepted, OutcomeUnknown, Refused, Unauthorized
from predictions.validation import list_fields

if TYPE_CHECKING:
    from predictions.money.budgets import Reservation

# A prediction that could not start before its deadline asks again after half of the remaining time, until that is less
# than this.
_LOOK_SECONDS = 10
# Wait for an owner's other predictions: a quarter of the time since the request, within these bounds, in seconds.
_OWN_LIMIT_WAITS = (10, 300)


class SubmitPrediction:
    """Submit predictions for their executions.

    Args:
        limiter: Decides when a create may start.
        reservations: Reserves starts, and gives them back.
        usage: Counts what owners use of their limits.
        spending: Plans what predictions reserve in budgets.
        lookup: Finds the version to run, and the schema to check its input by.
        creates: Sends the POST.
        claims: Resolves claims with an unknown outcome.
        breaker: Stops resubmission after wrong evidence.
        transitions: Writes what follows.
    """

    def __init__(
        self,
        table: PredictionsTable,
        limiter: Limiter,
        reservations: Reservations,
        usage: OwnersUsage,
        spending: Spending,
        lookup: ModelLookup,
        creates: Creates,
        claims: UnknownClaims,
        breaker: Breaker,
        transitions: Transitions,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._limiter = limiter
        self._reservations = reservations
        self._usage = usage
        self._spending = spending
        self._lookup = lookup
        self._creates = creates
        self._claims = claims
        self._breaker = breaker
        self._transitions = transitions
        self._now = now

    @classmethod
    def from_env(cls) -> "SubmitPrediction":
        """Read the environment of submit_prediction."""
        connections = Connections.from_env()
        return cls.over(connections, UnknownClaims.from_env(connections))

    @classmethod
    def over(cls, connections: Connections, claims: UnknownClaims) -> "SubmitPrediction":
        """Submit over the connections of a function."""
        lookup = ModelLookup.from_env(StoredSchemas.from_env(), connections.replicate)
        return cls(
            connections.table,
            connections.limiter,
            connections.reservations,
            OwnersUsage.from_env(),
            Spending.from_env(connections.limiter),
            lookup,
            Creates.over(connections, lookup),
            claims,
            connections.breaker,
            connections.transitions,
        )

    def submit(self, prediction_id: str) -> None:
        """Submit an unclaimed prediction, or look for one whose submission has an unknown outcome.

        Raises:
            PredictionThrottled: The prediction has to wait; this call started nothing.
        """
        prediction = self._table.get(prediction_id)
        if prediction is None or prediction.terminal or prediction.upstream_id:
            return
        if prediction.claimed:
            if prediction.submit_until:  # claims of older code are left to the polls
                self._claims.look_for(prediction)
            return
        now = self._now()
        if prediction.cancel_requested or _unwanted(prediction):
            self._transitions.end(prediction, Status.CANCELED, None)
            return
        if now >= prediction.deadline:
            self._transitions.end(prediction, Status.FAILED, self._why_not_started(prediction))
            return
        if "batch" in prediction.origin and not is_active(prediction.origin):
            self._transitions.end(prediction, Status.CANCELED, "It was not started: its batch has stopped.")
            return
        # A prediction that wakes before its turn takes a start that no other one waits for.
        may_go = prediction.turn_ms and self._limiter.is_idle(lane_of(prediction))
        if prediction.submit_at and prediction.submit_at > now and not may_go:
            raise self._defer_until(prediction, prediction.submit_at, prediction.turn_ms)
        if pause := self._limiter.pause_now():
            raise PredictionThrottled(self._within_lifetime(prediction, pause.remaining(now, PAUSE_STEP_SECONDS)))
        if prediction.unknown_creates and (stopped := self._breaker.stopped_seconds()):
            # Evidence has proved wrong since the claim was released.
            raise PredictionThrottled(self._within_lifetime(prediction, min(PAUSE_STEP_SECONDS, stopped)))
        # HTTP requests were checked before they were written; a version's schema does not describe trainings.
        check = prediction.source != "http" and prediction.object == "prediction"
        reservation = self._plan_budget(prediction)
        # Before anything that may refuse it: refused predictions cost executions too, and count for the owner's day.
        counted = self._acquire_slot_in_queue(prediction)
        try:
            version, schema = self._lookup.find(_reference(prediction), check=check)
        except Problem as problem:
            if problem.status >= 500:
                if counted:
                    # A crash before this write counts it twice: the day may show too many, never too few.
                    self._table.note_counted(prediction)
                raise PredictionThrottled(
                    self._within_lifetime(prediction, self._creates.outage_seconds(prediction))
                ) from None
            self._transitions.end(prediction, Status.FAILED, problem.detail)
            return
        # As in `start`: all that can fail in this stack comes before the claim.
        input_json = self._table.input_json(prediction)
        if input_json is None:
            self._transitions.end(prediction, Status.FAILED, "Its input had expired before Replicate accepted it.")
            return
        if check and (invalid := self._lookup.violations_of(schema, input_json)):
            self._transitions.end(prediction, Status.FAILED, list_fields(invalid))
            return
        api_url()
        self._take_turn(prediction, counted=counted)
        try:
            claimed = self._table.claim(prediction_id, version, self._now(), counted=counted, reservation=reservation)
        except BudgetReached as reached:
            # Others have reserved since it was planned.
            if counted:
                self._table.note_counted(prediction)
            raise self._wait_for_budget(prediction, reached) from None
        if claimed is None:
            return
        self._submit_for_execution(claimed, input_json)

    def _take_turn(self, prediction: Prediction, *, counted: bool) -> None:
        """Reserve a start at the limiter, unless the prediction has one.

        The slot in the owner's limits is acquired first: a prediction that waits for one must not use up the other.

        Args:
            prediction: The prediction.
            counted: Whether it has a slot that its item does not record yet.

        Raises:
            PredictionThrottled: The prediction has to wait.
        """
        # A start reserved by an earlier release has no number: its lane may have been reset, so it asks again.
        if (
            prediction.reserved_start is not None
            and prediction.submit_at
            and self._limiter.is_reserved(prediction.submit_at)
        ):
            return
        start, now = self._reservations.reserve(prediction), self._now()
        turn_is_ahead = prediction.turn_ms and prediction.submit_at and prediction.submit_at > now
        if isinstance(start, Start) and start.at <= now + SOON_SECONDS:
            if turn_is_ahead:
                self._limiter.release_turn(lane_of(prediction), prediction.owner, prediction.turn_ms or 0)
            return
        if isinstance(start, AskAgain) and not start.step_ms:
            raise self._defer_until(prediction, math.ceil(start.at), prediction.turn_ms)
        submit_at = math.ceil(now + self._look_seconds(prediction) if isinstance(start, TooLate) else start.at)
        waits = waits_of(start)
        # If the prediction has changed meanwhile, the next check sees that.
        if self._table.defer(prediction, submit_at, counted=counted, waits=waits) is None:
            self._reservations.release(lane_of(prediction), prediction.owner, waits)
        raise self._defer_until(prediction, submit_at, waits.turn_ms)

    def _defer_until(self, prediction: Prediction, submit_at: int, turn_ms: int | None) -> PredictionThrottled:
        """Return the wait until a start or a turn; until half of the time for a turn that is far ahead."""
        seconds = int(submit_at - self._now()) + 1
        if turn_ms and seconds > self._limiter.max_start_delay_seconds:
            # Requests ahead of it may be canceled, and the lane idle: waiting ones check at different times.
            seconds = math.ceil(seconds / 2)
        return PredictionThrottled(self._within_lifetime(prediction, seconds))

    def _look_seconds(self, prediction: Prediction) -> float:
        """Return the wait, in seconds, of a prediction whose turn would come after its deadline."""
        remaining = max(1.0, prediction.deadline - self._now())
        return remaining / 2 if remaining / 2 >= _LOOK_SECONDS else remaining

    def _why_not_started(self, prediction: Prediction) -> str:
        reason = "Its deadline passed before Replicate accepted it."
        if not prediction.submit_at:
            return reason
        seconds = math.ceil(self._limiter.expected_start(lane_of(prediction), prediction.owner) - self._now())
        if seconds < START_MARGIN_SECONDS:
            return reason
        return (
            f"{reason} Requests of the owner {prediction.owner} now wait about {seconds} s for a start, at"
            f" {self._limiter.creates_per_minute} creates a minute: allow a longer lifetime, or send fewer at once."
        )

    def _acquire_slot_in_queue(self, prediction: Prediction) -> bool:
        """Acquire a slot in the owner's limits, unless the prediction has one.

        Returns:
            Whether the prediction has a slot that its item does not record yet.

        Raises:
            PredictionThrottled: No slot is free.
        """
        # A prediction that `start` deferred has its slot.
        if prediction.source in ("http", "run_job") or prediction.counted:
            return False
        limits = self._usage.known_limits(prediction.owner)
        if not limits:
            return False
        try:
            model = self._lookup.model_of(_reference(prediction)) if limits.models else None
            self._usage.acquire_slot(prediction.owner, prediction.id, limits, model)
        except LimitReached as reached:
            least, most = _OWN_LIMIT_WAITS
            seconds = max(reached.seconds, min(most, max(least, (int(self._now()) - prediction.created) // 4)))
            logger.info("waits for its owner's limit", reason=reached.detail, wait_seconds=seconds)
            raise PredictionThrottled(self._within_lifetime(prediction, seconds)) from None
        return True

    def _plan_budget(self, prediction: Prediction) -> "Reservation | None":
        """Plan what a prediction reserves in budgets.

        Raises:
            PredictionThrottled: A budget has no room.
        """
        try:
            return self._spending.plan(prediction, self._usage.known_limits, self._now())
        except BudgetReached as reached:
            raise self._wait_for_budget(prediction, reached) from None

    def _wait_for_budget(self, prediction: Prediction, reached: BudgetReached) -> PredictionThrottled:
        seconds = min(reached.seconds, BUDGET_WAIT_SECONDS)
        logger.info("waits for a budget", reason=reached.detail, wait_seconds=seconds)
        return PredictionThrottled(self._within_lifetime(prediction, seconds))

    def _within_lifetime(self, prediction: Prediction, seconds: int) -> int:
        """Return a wait of that many seconds, cut to just after the deadline, which ends the prediction."""
        return max(1, min(seconds, int(prediction.deadline - self._now()) + 1))

    def _submit_for_execution(self, prediction: Prediction, input_json: str) -> None:
        try:
            self._creates.create(prediction, input_json)
        except Refused as error:
            self._transitions.end(prediction, Status.FAILED, error.detail, not_accepted=True)
        except NotAccepted as error:
            if isinstance(error, Unauthorized):
                self._creates.count_refused_token(error)
            released, wait_seconds = self._creates.release(prediction, error)
            if not released.terminal:
                raise PredictionThrottled(self._within_lifetime(prediction, wait_seconds)) from None
        except OutcomeUnknown as error:
            raise PredictionThrottled(self._creates.note_unknown(prediction, error)) from None


def _unwanted(prediction: Prediction) -> bool:
    """Return whether the pipeline was canceled between the reading of the request and its write."""
    if "pipeline" not in prediction.origin:
        return False
    return not is_active(prediction.origin)


def _reference(prediction: Prediction) -> Reference:
    kind: Any = prediction.kind
    return Reference(kind, prediction.name, prediction.version)
