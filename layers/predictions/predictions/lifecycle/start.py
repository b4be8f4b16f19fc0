"""Start: intent and claim in one write, one POST, bind; an execution tracks the prediction from there."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from predictions.admission.limiter_item import Pause
from predictions.admission.quotas import LimitReached, OwnerLimits, OwnersUsage, Slot, refusal_of
from predictions.admission.rate_limiter import Limiter
from predictions.admission.schedule import Start, TooLate
from predictions.aws.clients import api_url
from predictions.errors import BudgetReached, Problem
from predictions.intents.model import Attempt, Intent
from predictions.lifecycle.connections import Connections
from predictions.lifecycle.create import Creates
from predictions.lifecycle.model_lookup import ModelLookup
from predictions.lifecycle.reservations import Reservations, waits_of
from predictions.lifecycle.spending import Spending
from predictions.lifecycle.timing import (
    CLAIM_SECONDS,
    PAUSE_STEP_SECONDS,
    SOON_SECONDS,
    START_MARGIN_SECONDS,
    Lifetimes,
)
from predictions.lifecycle.tracking import Tracking
from predictions.lifecycle.transitions import Transitions
from predictions.observability import MetricUnit, logger, metrics
from predictions.status import Status
from predictions.store.predictions import PredictionsTable
from predictions.store.recent_requests import RecentRequests
from predictions.store.records import AlreadyExists, Prediction, Waits
from predictions.store.schemas import StoredSchemas
from predictions.upstream.errors import NotAccepted, OutcomeUnknown, Refused, Unauthorized
from predictions.validation import fields_refused

if TYPE_CHECKING:
    from predictions.money.budgets import Reservation

# Bounds of `Retry-After`, in seconds, in the refusal of a create that would start too late.
_REFUSED_WAITS = (10, 300)

REFUSAL_FIELDS_LIMIT = 50
REFUSAL_FIELD_CHARACTERS = 300
"""With these limits a refusal takes at most 180 KB of its item (6 bytes a character, where JSON escapes it); DynamoDB
allows 400 KB. https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/ServiceQuotas.html"""

RESPONSE_SECONDS = 5
"""Time that a function whose caller waits keeps for its response."""

# A waiting caller's prediction is read ever less often: each read of the table is a consistent one.
_WAIT_STEP_SECONDS = 0.1
_WAIT_STEP_GROWTH = 1.3
_WAIT_STEP_LIMIT_SECONDS = 1.0


class Started(NamedTuple):
    """Hold a prediction that was started, or found already started.

    Attributes:
        prediction: The prediction as it was then.
        rate_limit: The rate-limit headers of Replicate's response, if there was one.
        waited: Whether the function waited for its completion.
    """

    prediction: Prediction
    rate_limit: dict[str, str]
    waited: bool


class StartPrediction:
    """Start predictions for callers who wait for the response.

    Args:
        limiter: Decides when a create may start.
        recent: Recent requests without a key.
        reservations: Gives back starts that are not used.
        usage: Counts what owners use of their limits.
        spending: Plans what requests reserve in budgets.
        lookup: Finds the version to run, and the schema to check its input by.
        creates: Sends the POST.
        tracking: Starts the execution.
        transitions: Writes what follows.
        lifetimes: The operator's choices.
    """

    def __init__(
        self,
        table: PredictionsTable,
        limiter: Limiter,
        recent: RecentRequests,
        reservations: Reservations,
        usage: OwnersUsage,
        spending: Spending,
        lookup: ModelLookup,
        creates: Creates,
        tracking: Tracking,
        transitions: Transitions,
        lifetimes: Lifetimes,
        *,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._table = table
        self._limiter = limiter
        self._recent = recent
        self._reservations = reservations
        self._usage = usage
        self._spending = spending
        self._lookup = lookup
        self._creates = creates
        self._tracking = tracking
        self._transitions = transitions
        self._lifetimes = lifetimes
        self._now = now
        self._sleep = sleep

    @classmethod
    def from_env(cls) -> "StartPrediction":
        """Read the environment of start_prediction and run_prediction."""
        connections = Connections.from_env()
        lookup = ModelLookup.from_env(StoredSchemas.from_env(), connections.replicate)
        return cls(
            connections.table,
            connections.limiter,
            RecentRequests.from_env(),
            connections.reservations,
            OwnersUsage.from_env(),
            Spending.from_env(connections.limiter),
            lookup,
            Creates.over(connections, lookup),
            Tracking.from_env(connections.table),
            connections.transitions,
            Lifetimes.from_env(),
        )

    def start(
        self,
        intent: Intent,
        *,
        attempt: Attempt | None = None,
        wait_seconds: float = 0,
        remaining_seconds: Callable[[], float] | None = None,
        limits: OwnerLimits | None = None,
        rate_limit: dict[str, str] | None = None,
    ) -> Prediction:
        """Start a prediction while its caller waits for the response.

        Args:
            intent: The request.
            attempt: The client's attempt, if it has no key but counts how often it repeats a POST whose response it
                did not see.
            wait_seconds: How long the caller waits for completion; Replicate is asked to hold its response for at
                most as long.
            remaining_seconds: The time left to the function, if it may be too short for a create.
            limits: The owner's limits as the authorizer passed them, or None to look them up.
            rate_limit: Filled with the rate-limit headers of Replicate's response, if there was one.

        Returns:
            The new prediction, or the one that the same request started before, with `repeated` set.

        Raises:
            Problem: 404 or 422 (invalid input, a refusal by Replicate, or another request with the same key), 429 (a
                limit of the owner or a budget is reached, or the prediction could start only much later), 502
                (Replicate refuses the stack's token or credit), 503 (submissions are paused, or Replicate did not say
                which version to run).
        """
        wait_until = self._now() + wait_seconds
        # Without a key, the id of an HTTP request is random; other ids are derived from the event of the request.
        comes_again = intent.keyed or intent.source != "http"
        existing = self._table.get(intent.id) if comes_again else None
        # A key that outlives its prediction starts another one: an expired item may stay in the table for days.
        if existing and not existing.expired(self._now()):
            return _existing(existing, intent)
        if intent.keyed:
            attempt = None
        if attempt and attempt.number:
            recorded_id = self._recent.find(intent.owner, intent.fingerprint, attempt)
            existing = self._table.get(recorded_id) if recorded_id else None
            if existing is not None:
                return _existing(existing, intent)
        if pause := self._limiter.pause_now():
            raise _paused(pause, self._now())
        # A version's schema describes the input of a prediction, not of a training.
        version, schema = self._lookup.find(intent.reference, check=intent.object == "prediction")
        if invalid := self._lookup.violations_of(schema, intent.input_json):
            raise fields_refused(invalid)
        now = self._now()
        default_seconds = self._lifetimes.training if intent.object == "training" else self._lifetimes.prediction
        deadline = int(now) + (intent.lifetime_seconds or default_seconds)
        latest = min(deadline - START_MARGIN_SECONDS, now + self._limiter.max_start_delay_seconds)
        if late := self._limiter.too_late(intent.owner, latest):
            raise self._refused(intent, late, latest)
        # All that can fail in this stack comes before the claim: afterwards, a POST that was never sent is as unknown
        # as one whose response was lost.
        api_url()
        if attempt:
            noted_id = self._recent.note(intent.id, intent.owner, intent.fingerprint, attempt)
            intent = replace(intent, id=noted_id)
        if limits is None:
            limits = self._usage.known_limits(intent.owner)
        reservation = self._plan_budget(intent, version, limits)
        place = self._acquire_slot(intent, limits) if limits else Slot()
        start = self._limiter.reserve_for_caller(intent.owner, latest=latest)
        if isinstance(start, TooLate):
            self._release_slot(intent, place)
            raise self._refused(intent, start, latest)
        soon = isinstance(start, Start) and start.at <= self._now() + SOON_SECONDS
        submit_at = None if soon else math.ceil(start.at)
        waits = waits_of(start)
        if submit_at is None and remaining_seconds and remaining_seconds() < CLAIM_SECONDS:
            # A crash between the claim and the POST makes the prediction unsubmittable, so the execution submits it:
            # its function has the time. Its start is reserved for now, so no other one is reserved for it.
            submit_at = math.ceil(self._now())
            waits = Waits(reserved_start=round(self._now() * 1000) * 1000)
        try:
            prediction = self._table.put_intent(
                intent,
                version=version,
                deadline=deadline,
                expires=int(now) + self._lifetimes.retention,
                claim=submit_at is None,
                execution_arn=self._tracking.execution_arn(intent.id, 1, submit=submit_at is not None),
                now=self._now(),
                submit_at=submit_at,
                waits=waits,
                wait_seconds=max(0, math.ceil(wait_seconds)),
                reservation=reservation,
            )
        except BudgetReached as reached:
            # Others have reserved since it was planned.
            self._release_slot(intent, place)
            self._reservations.release("http", intent.owner, waits)
            raise reached.refusal from None
        except AlreadyExists as error:
            self._reservations.release("http", intent.owner, waits)
            return _existing(error.prediction, intent)
        logger.set_correlation_id(prediction.id)
        metrics.add_metric(name="PredictionsStarted", unit=MetricUnit.Count, value=1)
        if submit_at is not None:
            logger.info("submitted later: by the limiter, or for want of time", submit_at=submit_at)
            return self._track_for_caller(prediction, submit=True)
        return self._submit_for_caller(prediction, intent.input_json, wait_until, rate_limit)

    def _refused(self, intent: Intent, late: TooLate, latest: float) -> Problem:
        """Return the refusal of a create that could start only after `latest`; nothing was written."""
        now = self._now()
        least, most = _REFUSED_WAITS
        retry_seconds = max(least, min(most, math.ceil(late.at - latest)))
        logger.warning("refused: it would start too late", owner=intent.owner, seconds=math.ceil(late.at - now))
        detail = (
            f"Creates of the owner {intent.owner} would start in {math.ceil(late.at - now)} s at the earliest: this"
            f" stack creates at most {self._limiter.creates_per_minute} a minute (CreatesPerMinute) and accepts a"
            f" create only if it can start within {self._limiter.max_start_delay_seconds} s (MaxStartDelaySeconds) and"
            f" {START_MARGIN_SECONDS} s before its deadline. Nothing was started or counted. Retry in"
            f" {retry_seconds} s, or send the request through the queue."
        )
        return Problem(429, detail, headers={"Retry-After": str(retry_seconds)})

    def _acquire_slot(self, intent: Intent, limits: OwnerLimits) -> Slot:
        try:
            model = self._lookup.model_of(intent.reference) if limits.models else None
            return self._usage.acquire_slot(intent.owner, intent.id, limits, model)
        except LimitReached as reached:
            raise refusal_of(reached) from None

    def _release_slot(self, intent: Intent, slot: Slot) -> None:
        try:
            self._usage.release_slot(intent.owner, intent.id, slot)
        except (ClientError, BotoCoreError):
            logger.exception("a place in its owner's limits is lost")

    def _plan_budget(self, intent: Intent, version: str | None, limits: OwnerLimits) -> "Reservation | None":
        try:
            return self._spending.plan_intent(intent, version, limits, self._now())
        except BudgetReached as reached:
            raise reached.refusal from None

    def _submit_for_caller(
        self, prediction: Prediction, input_json: str, wait_until: float, rate_limit: dict[str, str] | None
    ) -> Prediction:
        submit = False
        try:
            prediction = self._creates.create(prediction, input_json, wait_until, rate_limit, leave_large=True)
        except Refused as error:
            refusal = _refusal_of(error)
            self._transitions.end(prediction, Status.FAILED, error.detail, refusal=refusal)
            raise _problem_of(refusal) from None
        except Unauthorized as error:
            self._creates.count_refused_token(error)
            why = f"Replicate refuses this stack's token or credit ({error.status or 'no token'})."
            refusal = {
                "status": 502,
                "detail": f"{why} The operator of this stack must fix that.",
                "invalid_fields": [],
                "upstream_status": error.status,
            }
            if prediction.keyed:
                # Its caller can repeat the request by its key; the sweep submits it once the token works again.
                self._creates.release(prediction, error)
            else:
                self._transitions.end(prediction, Status.FAILED, why, refusal=refusal)
            raise _problem_of(refusal) from None
        except NotAccepted as error:
            prediction, _ = self._creates.release(prediction, error)
            submit = not prediction.terminal
        except OutcomeUnknown as error:
            self._creates.note_unknown(prediction, error)
            submit = True  # its execution looks for it, and submits it again if Replicate does not have it
        except (ClientError, BotoCoreError):
            # Replicate has accepted it: whatever failed in this stack, the response must not ask for a retry. The claim
            # prevents a second submission, and the webhook or a poll binds it.
            logger.exception("submitted, but not bound")
        if prediction.ended_visibly:
            return prediction  # nothing is left to follow
        return self._track_for_caller(prediction, submit=submit)

    def _track_for_caller(self, prediction: Prediction, *, submit: bool) -> Prediction:
        try:
            self._tracking.track(prediction, submit=submit)
        except (ClientError, BotoCoreError):
            logger.exception("not tracked yet")
            if submit and not prediction.keyed and not prediction.claimed:
                # No function would submit it. First the end, so that an execution that did start submits nothing.
                try:
                    prediction = self._transitions.end(
                        prediction, Status.FAILED, "The state machine could not be reached."
                    )
                except (ClientError, BotoCoreError):
                    # An execution may have started, and submits it. If none has, the sweep ends it as failed.
                    logger.exception("neither tracked nor ended: accepted")
                    return prediction
                if prediction.claimed or prediction.upstream_id:
                    # That execution was faster: the prediction is paid for, and a caller who got an error would create
                    # another one.
                    return prediction
                detail = "The prediction was not started, since a part of the stack could not be reached: try again."
                raise Problem(503, detail, headers={"Retry-After": "2"}) from None
            # The request is accepted: the sweep starts the execution within two minutes.
        return prediction

    def start_and_wait(
        self,
        intent: Intent,
        seconds: float | None,
        remaining_seconds: Callable[[], float],
        *,
        attempt: Attempt | None = None,
        limits: OwnerLimits | None = None,
    ) -> "Started":
        """Start a prediction, and wait for its completion if the caller asks for that.

        Args:
            intent: The request.
            seconds: The longest wait that the caller asks for, or None.
            remaining_seconds: The time left to the function; `RESPONSE_SECONDS` of it are not used.
            attempt: As for `start`.
            limits: As for `start`.

        Raises:
            Problem: As for `start`.
        """
        rate_limit: dict[str, str] = {}
        allowed = 0.0 if seconds is None else min(seconds, remaining_seconds() - RESPONSE_SECONDS)
        until = remaining_seconds() - allowed
        prediction = self.start(
            intent,
            attempt=attempt,
            wait_seconds=allowed,
            remaining_seconds=remaining_seconds,
            limits=limits,
            rate_limit=rate_limit,
        )
        if seconds is None or (prediction.repeated and not prediction.ended_visibly):
            # Only the request that started it waits, in its slot of its owner's limits: repetitions would hold
            # functions outside of every limit. Their response says `starting`, and the client polls.
            return Started(prediction, rate_limit, waited=False)
        try:
            self.wait_for_end(prediction.id, remaining_seconds() - until)
        except (ClientError, BotoCoreError):
            logger.exception("started, but not waited for")
        return Started(prediction, rate_limit, waited=True)

    def wait_for_end(self, prediction_id: str, seconds: float) -> bool:
        """Wait until a prediction is visibly completed, but no longer than `seconds`.

        Returns:
            Whether it is.
        """
        until = self._now() + seconds
        step = _WAIT_STEP_SECONDS
        while True:
            prediction = self._table.get(prediction_id)
            if prediction is None or prediction.ended_visibly:
                return prediction is not None
            remaining = until - self._now()
            if remaining <= 0:
                return False
            self._sleep(min(step, remaining))
            step = min(step * _WAIT_STEP_GROWTH, _WAIT_STEP_LIMIT_SECONDS)


def _existing(prediction: Prediction, intent: Intent) -> Prediction:
    """Return the prediction of a request that was made before.

    Raises:
        Problem: 422, if it was another request; or the refusal that the first request got.
    """
    if prediction.owner != intent.owner or prediction.fingerprint != intent.fingerprint:
        detail = "This key belongs to another request: use a new key for a new request, and the old one to repeat it."
        raise Problem(422, detail, invalid_fields=[{"field": "Idempotency-Key", "detail": detail}])
    if prediction.refusal_json:
        raise _problem_of(json.loads(prediction.refusal_json))
    return replace(prediction, repeated=True)


def _paused(pause: Pause, now: float) -> Problem:
    detail = f"This stack submits nothing now: {pause.reason} Nothing was started or written: try again later."
    seconds = pause.remaining(now, PAUSE_STEP_SECONDS)
    return Problem(503, detail, title="Paused", headers={"Retry-After": str(seconds)})


def _refusal_of(error: Refused) -> dict[str, Any]:
    """Return a refusal by Replicate as responses show it, now and if the request is repeated.

    Bounded, because the table keeps it in the prediction's item: `REFUSAL_FIELDS_LIMIT` fields, each with
    `REFUSAL_FIELD_CHARACTERS` of its name and of its explanation.
    """
    fields = [
        {name: text[:REFUSAL_FIELD_CHARACTERS] for name, text in field.items()}
        for field in error.invalid_fields[:REFUSAL_FIELDS_LIMIT]
    ]
    left_out = len(error.invalid_fields) + error.fields_left_out - len(fields)
    listed = f" {left_out} more fields were refused; `invalid_fields` lists the first {len(fields)}."
    return {
        "status": error.status,
        "detail": error.detail + (listed if left_out else ""),
        "invalid_fields": fields,
        "upstream_status": error.status,
    }


def _problem_of(refusal: dict[str, Any]) -> Problem:
    return Problem(
        refusal["status"],
        refusal["detail"],
        invalid_fields=refusal["invalid_fields"],
        upstream_status=refusal.get("upstream_status"),
    )
