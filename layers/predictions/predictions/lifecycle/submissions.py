"""The protocol: a wanted prediction is submitted to Replicate at most once, and followed until it has ended.

A training is a prediction to it: another path at Replicate, a `destination`, and a deadline that we alone keep.

    start       intent and claim in one write, one POST, bind; an execution tracks it from there
    submit      claim and POST, for an intent that was only written down or whose POST was not accepted
    poll        what no webhook told: ask, reconcile, enforce the deadline
    cancel      the owner's flag, and Replicate's cancel
    delete      the owner's flag, then the data of what has ended
    sweep       whatever stands still is moved on

Each step may happen twice, late or never, and its function may die after any line. So each begins by reading what is
there, writes on condition, and leaves `next_check_at` in the item: when that passes, the sweep looks.

The one rule that everything else serves: after a POST whose outcome is unknown there is no second POST without
evidence that the first one started nothing. A webhook binds the prediction it started, or Replicate's list shows it; or
two complete readings of that list do not (see `lifecycle.reconcile`), and it is submitted again.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from botocore.exceptions import BotoCoreError, ClientError

from predictions.admission.limiter_item import Lane, Pause
from predictions.admission.quotas import LimitReached, OwnerLimits, OwnersUsage, Slot, refusal_of
from predictions.admission.rate_limiter import Limiter
from predictions.admission.reservations import AskAgain, Reservation, Start, TooLate
from predictions.aws.clients import api_url
from predictions.aws.executions import Executions, wake
from predictions.errors import PredictionThrottled, Problem
from predictions.files.output_references import StoredFile
from predictions.intents.model import Attempt, Intent, Reference
from predictions.lifecycle.model_lookup import ModelSchemas
from predictions.lifecycle.reconcile import RESUBMIT_WAITS, UnknownSubmissions, target_of, undecided_ids, webhook_of
from predictions.observability import MetricUnit, count_ended, logger, metrics
from predictions.status import TERMINAL_RANK, Status, rank_of
from predictions.store.origins import is_canceled
from predictions.store.predictions import AlreadyExists, Change, Prediction, PredictionsTable, Waits
from predictions.upstream.client import Replicate
from predictions.upstream.errors import (
    NotAccepted,
    NotFound,
    OutcomeUnknown,
    Refused,
    Throttled,
    Unauthorized,
    Unavailable,
)
from predictions.upstream.prediction import UpstreamPrediction
from predictions.validation import fields_refused, input_json_canonical

if TYPE_CHECKING:
    from predictions.upstream.create_window import SendWindow
    from predictions.upstream.input_schema import InputSchema

# A prediction whose submission nobody can account for is given up this long after Replicate must have ended it.
_GIVE_UP_SECONDS = 300
# A bound one is given up by our own word only this long after its deadline, or after that many 404s in a row.
_ABANDON_SECONDS = 3600
_NOT_FOUND_LIMIT = 5
# The files of one that has ended are given up by the sweep this long after the end: Replicate has removed them by then,
# and the copier would have taken the file host at its word an hour before.
_ABANDON_COPY_SECONDS = 3 * 3600

# Backoff of the sweep's looks at a prediction over which functions die: from 3 minutes, doubled, up to an hour. Up to
# 15 minutes if it is unbound: Replicate removes the input by which its list shows whose it is an hour after its end.
_LOOK_AGAIN_SECONDS = 180
_LOOK_AGAIN_MOST_SECONDS = 3600
_LOOK_AGAIN_UNBOUND_SECONDS = 900
# That many looks in a row died, or found the execution dead, before a prediction is ended without asking Replicate.
_STALLED_LOOKS = 3

# Replicate's clock and ours may differ by this much.
_CLOCK_SKEW_SECONDS = 30
# Claims without `submit_until` are of a release whose functions acted on a claim for this long at most.
_PREVIOUS_RELEASE_SECONDS = 60
# A sweep stops this long before its function ends, and looks again at what it cannot finish after as much.
_SWEEP_STEP_SECONDS = 60

_NO_CONNECTION_WAIT_SECONDS = 10
_UNAUTHORIZED_WAIT_SECONDS = 300
_STUCK_SECONDS = 600

# The most that is waited while submissions are paused: then somebody looks whether they still are.
_PAUSE_STEP_SECONDS = 300
# A start that is as near as this is not waited for.
_SOON_SECONDS = 1
# From the claim to the last byte of the POST: the write, the token, and a connection that takes its time.
_CLAIM_SECONDS = 10
# No start is reserved later than this before the deadline: waits are rounded up to whole seconds.
_START_MARGIN_SECONDS = 5
# A prediction that could not start before its deadline asks again when half of the rest has passed, until that is less
# than this.
_LOOK_SECONDS = 10
# What a caller whose create is refused is told to wait, in seconds; it would start later than that otherwise.
_REFUSED_WAITS = (10, 300)
# How long an owner's other predictions are waited for: a quarter of the time that has passed, within these bounds.
_OWN_LIMIT_WAITS = (10, 300)

REFUSAL_FIELDS_LIMIT = 50
REFUSAL_FIELD_CHARACTERS = 300
"""With these limits a refusal takes at most 180 KB of its item (6 bytes a character, where JSON escapes it); DynamoDB
allows 400 KB. https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/ServiceQuotas.html"""

# A caller waits in looks at the table that become ever rarer: each is a consistent read.
_WAIT_STEP_SECONDS = 0.1
_WAIT_STEP_GROWTH = 1.3
_WAIT_STEP_LIMIT_SECONDS = 1.0
_MODEL_CACHE_SECONDS = 300
_MODELS_CACHED = 64


@dataclass(frozen=True)
class Timing:
    """The spans of time, in seconds, that an operator chooses.

    Attributes:
        lifetime: The deadline of a prediction whose caller gives none.
        training_lifetime: The deadline of a training.
        grace: How long after its claim a submission may still show up by itself, by webhook or in the list.
        first_poll: When the first poll is due, after the execution began to wait.
        poll: When each further poll is due.
        retention: How long the table keeps a prediction, from its request on.
    """

    lifetime: int
    training_lifetime: int
    grace: int
    first_poll: int
    poll: int
    retention: int

    @classmethod
    def from_env(cls) -> "Timing":
        """From the variables with these names' long forms."""
        return cls(
            lifetime=int(os.environ["DEFAULT_LIFETIME_SECONDS"]),
            training_lifetime=int(os.environ["TRAINING_LIFETIME_SECONDS"]),
            grace=int(os.environ["SUBMIT_GRACE_SECONDS"]),
            first_poll=int(os.environ["FIRST_POLL_SECONDS"]),
            poll=int(os.environ["POLL_SECONDS"]),
            retention=int(os.environ["RETENTION_DAYS"]) * 86400,
        )


class _Model(NamedTuple):
    """What is known of a model: its version (None: Replicate runs it without one) and its input's schema, if any."""

    version: str | None
    schema: "InputSchema | None"


class Submissions:
    """Starts predictions, and moves on those that nobody else does.

    Args:
        table: The predictions.
        replicate: Replicate.
        executions: The state machine.
        timing: The operator's choices.
        limiter: When a create may start.
        usage: What owners use of their limits.
        unknown: Finds out what became of creates without a clear answer.
        schemas: Finds the schemas by which inputs are checked; None: they are not.
        resubmit: Whether a prediction is submitted again once there is evidence that Replicate accepted nothing.
        max_unknown_creates: After how many creates of unknown outcome a prediction fails.
        now: The time, in seconds since 1970.
        sleep: Waits that many seconds.
    """

    def __init__(
        self,
        table: PredictionsTable,
        replicate: Replicate,
        executions: Executions,
        timing: Timing,
        *,
        limiter: Limiter,
        usage: OwnersUsage,
        unknown: UnknownSubmissions,
        schemas: ModelSchemas | None = None,
        resubmit: bool = False,
        max_unknown_creates: int = 5,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.table = table
        self._replicate = replicate
        self._executions = executions
        self._timing = timing
        self._limiter = limiter
        self._usage = usage
        self._unknown = unknown
        self._schemas = schemas
        self._resubmit = resubmit
        self._max_unknown_creates = max_unknown_creates
        self._now = now
        self._sleep = sleep
        self._models: dict[str, tuple[float, _Model]] = {}

    @classmethod
    def from_env(cls) -> "Submissions":
        """From the environment of any function that may talk to Replicate."""
        table = PredictionsTable.from_env()
        replicate = Replicate.from_env()
        return cls(
            table,
            replicate,
            Executions.from_env(),
            Timing.from_env(),
            limiter=Limiter.from_env(),
            usage=OwnersUsage.from_env(),
            unknown=UnknownSubmissions.from_env(table, replicate),
            schemas=ModelSchemas(table, replicate) if os.environ["VALIDATE_INPUT"] == "true" else None,
            resubmit=os.environ["UNKNOWN_SUBMISSION"] == "resubmit",
            max_unknown_creates=int(os.environ["MAX_UNKNOWN_CREATES"]),
        )

    # -- start ------------------------------------------------------------------------------------------------

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
        """Starts the prediction that a caller waits for the beginning of.

        Args:
            intent: What is wanted.
            attempt: Which attempt of its client's this is, where that repeats a POST whose answer it did not see,
                without a key, and counts how often.
            wait_seconds: How long the caller waits for the end: as long, at most, Replicate is asked to hold its
                answer.
            remaining_seconds: How long the function may still run, where that may be too short for a create.
            limits: The owner's, where an authorizer has told them; None: they are looked up.
            rate_limit: Takes what Replicate's answer to the create says of its limit, as headers; nothing where no
                create was made, or none was answered.

        Returns:
            The prediction: new, or `repeated`, the one that the same request started before.

        Raises:
            Problem: 404 or 422 (an input that is not the model's, Replicate's refusal, or another request with the same
                key), 429 (one of the owner's limits is used up, or it could start only much later), 502 (Replicate
                refuses the stack's token or credit), 503 (submissions are paused, or Replicate cannot be asked which
                version to run).
        """
        wait_until = self._now() + wait_seconds
        # Without a key, the id of an HTTP request is random; any other is made of the event that it came with.
        comes_again = intent.keyed or intent.source != "http"
        existing = self.table.get(intent.id) if comes_again else None
        # A key that outlives its prediction starts another one: what has expired may be there for days.
        if existing and not existing.expired(self._now()):
            return _existing(existing, intent)
        if intent.keyed:
            attempt = None
        if attempt and attempt.number:
            existing = self.table.recent(intent.owner, intent.fingerprint, attempt)
            if existing is not None:
                return _existing(existing, intent)
        if pause := self._limiter.pause_now():
            raise _paused(pause, self._now())
        # A version's schema says what it runs on, not what it is trained on.
        version, schema = self._look_up(intent.reference, check=intent.object == "prediction")
        if invalid := self._violations(schema, intent.input_json):
            raise fields_refused(invalid)
        now = self._now()
        default_seconds = self._timing.training_lifetime if intent.object == "training" else self._timing.lifetime
        deadline = int(now) + (intent.lifetime_seconds or default_seconds)
        latest = min(deadline - _START_MARGIN_SECONDS, now + self._limiter.max_start_delay_seconds)
        if late := self._limiter.too_late(intent.owner, latest):
            raise self._refused(intent, late, latest)
        # All that can fail on our side comes before the claim: after it, a POST that was never made is as unknown
        # as one whose answer was lost.
        api_url()
        if attempt:
            noted_id = self.table.note_request(intent.id, intent.owner, intent.fingerprint, attempt)
            intent = replace(intent, id=noted_id)
        if limits is None:
            limits = self._usage.known_limits(intent.owner)
        place = self._acquire_slot(intent, limits) if limits else Slot()
        start = self._limiter.reserve_for_caller(intent.owner, latest=latest)
        if isinstance(start, TooLate):
            try:
                self._usage.release_slot(intent.owner, intent.id, place)
            except (ClientError, BotoCoreError):
                logger.exception("a place in its owner's limits is lost")
            raise self._refused(intent, start, latest)
        soon = isinstance(start, Start) and start.at <= self._now() + _SOON_SECONDS
        submit_at = None if soon else math.ceil(start.at)
        waits = _waits(start)
        if submit_at is None and remaining_seconds and remaining_seconds() < _CLAIM_SECONDS:
            # A crash between claim and POST makes a prediction unsubmittable: the execution has the time. Its start is
            # of now, so nothing else is reserved for it.
            submit_at = math.ceil(self._now())
            waits = Waits(reserved_start=round(self._now() * 1000) * 1000)
        try:
            prediction = self.table.put_intent(
                intent,
                version=version,
                deadline=deadline,
                expires=int(now) + self._timing.retention,
                claim=submit_at is None,
                execution_arn=self._executions.arn(intent.id, 1),
                now=self._now(),
                submit_at=submit_at,
                waits=waits,
                wait_seconds=max(0, math.ceil(wait_seconds)),
            )
        except AlreadyExists as error:
            self._return("http", intent.owner, waits)
            return _existing(error.prediction, intent)
        logger.set_correlation_id(prediction.id)
        metrics.add_metric(name="PredictionsStarted", unit=MetricUnit.Count, value=1)
        if submit_at is not None:
            logger.info("submitted later: by the limiter, or for want of time", submit_at=submit_at)
            return self._track_for_caller(prediction, submit=True)
        return self._submit_for_caller(prediction, intent.input_json, wait_until, rate_limit)

    def _refused(self, intent: Intent, late: TooLate, latest: float) -> Problem:
        """The answer to a create that could start only after `latest`; nothing was written."""
        now = self._now()
        least, most = _REFUSED_WAITS
        retry_seconds = max(least, min(most, math.ceil(late.at - latest)))
        logger.warning("refused: it would start too late", owner=intent.owner, seconds=math.ceil(late.at - now))
        detail = (
            f"Creates of the owner {intent.owner} would start in {math.ceil(late.at - now)} s at the earliest: this"
            f" stack creates at most {self._limiter.creates_per_minute} a minute (CreatesPerMinute) and accepts a"
            f" create only if it can start within {self._limiter.max_start_delay_seconds} s (MaxStartDelaySeconds) and"
            f" {_START_MARGIN_SECONDS} s before its deadline. Nothing was started or counted. Retry in"
            f" {retry_seconds} s, or send the request through the queue."
        )
        return Problem(429, detail, headers={"Retry-After": str(retry_seconds)})

    def _acquire_slot(self, intent: Intent, limits: OwnerLimits) -> Slot:
        try:
            return self._usage.acquire_slot(intent.owner, intent.id, limits)
        except LimitReached as reached:
            raise refusal_of(reached) from None

    def _submit_for_caller(
        self, prediction: Prediction, input_json: str, wait_until: float, rate_limit: dict[str, str] | None
    ) -> Prediction:
        submit = False
        try:
            prediction = self._submit(prediction, input_json, wait_until, rate_limit)
        except Refused as error:
            refusal = _refusal_of(error)
            self._end(prediction, Status.FAILED, error.detail, refusal=refusal)
            raise _problem_of(refusal) from None
        except Unauthorized as error:
            self._count_refused_token(error)
            why = f"Replicate refuses this stack's token or credit ({error.status or 'no token'})."
            refusal = {
                "status": 502,
                "detail": f"{why} Its operator has to mend that.",
                "invalid_fields": [],
                "upstream_status": error.status,
            }
            if prediction.keyed:
                # Its caller can ask again by its key; the sweep submits it once the operator has mended the token.
                self._give_back(prediction, error)
            else:
                self._end(prediction, Status.FAILED, why, refusal=refusal)
            raise _problem_of(refusal) from None
        except NotAccepted as error:
            prediction, _ = self._give_back(prediction, error)
            submit = not prediction.terminal
        except OutcomeUnknown as error:
            self._note_unknown(prediction, error)
            submit = True  # its execution looks for it, and submits it again if it is not there
        except (ClientError, BotoCoreError):
            # Replicate has it: whatever failed on our side, the caller must not be told to try again. The claim keeps
            # anybody from submitting it twice, and webhook or poll bind it.
            logger.exception("submitted, but not bound")
        if prediction.ended_visibly:
            return prediction  # there is nothing left to follow
        return self._track_for_caller(prediction, submit=submit)

    def _track_for_caller(self, prediction: Prediction, *, submit: bool) -> Prediction:
        try:
            self._track(prediction, submit=submit)
        except (ClientError, BotoCoreError):
            logger.exception("not tracked yet")
            if submit and not prediction.keyed and not prediction.claimed:
                # Nobody would submit it. Ended first, so that an execution that did start submits nothing.
                try:
                    prediction = self._end(prediction, Status.FAILED, "The state machine could not be reached.")
                except (ClientError, BotoCoreError):
                    # An execution may have started and submit it. If none has, the sweep ends it as failed.
                    logger.exception("neither tracked nor ended: accepted")
                    return prediction
                if prediction.claimed or prediction.upstream_id:
                    # That execution was faster: the prediction is paid for, and a caller who sees an error would
                    # create another one.
                    return prediction
                detail = "The prediction was not started, since a part of the stack could not be reached: try again."
                raise Problem(503, detail, headers={"Retry-After": "2"}) from None
            # Accepted all the same: the sweep starts the execution within two minutes.
        return prediction

    def wait_for_end(self, prediction_id: str, seconds: float) -> bool:
        """Waits until a prediction has visibly ended, at most that long.

        Returns:
            Whether it has.
        """
        until = self._now() + seconds
        step = _WAIT_STEP_SECONDS
        while True:
            prediction = self.table.get(prediction_id)
            if prediction is None or (prediction.ended_visibly):
                return prediction is not None
            remaining = until - self._now()
            if remaining <= 0:
                return False
            self._sleep(min(step, remaining))
            step = min(step * _WAIT_STEP_GROWTH, _WAIT_STEP_LIMIT_SECONDS)

    def violations(self, reference: Reference, asked: Any) -> list[dict[str, str]]:
        """What is wrong with an input by its model's schema, for what is to be started later; nothing is written.

        Raises:
            Problem: 404 where there is no such model, 422 where it has no version, 503 where that is not known.
        """
        return self._violations(self._look_up(reference).schema, json.dumps(asked))

    # -- submit -----------------------------------------------------------------------------------------------

    def submit(self, prediction_id: str) -> None:
        """Submits a prediction that nobody has claimed, and looks for one whose submission has an unknown outcome.

        Raises:
            PredictionThrottled: Not now; nothing was started by this call.
        """
        prediction = self.table.get(prediction_id)
        if prediction is None or prediction.terminal or prediction.upstream_id:
            return
        if prediction.claimed:
            if prediction.submit_until:  # older code's are left to the polls
                self._look_for(prediction)
            return
        now = self._now()
        if prediction.cancel_requested or _unwanted(prediction):
            self._end(prediction, Status.CANCELED, None)
            return
        if now >= prediction.deadline:
            self._end(prediction, Status.FAILED, self._why_not_started(prediction))
            return
        if not self.table.line_wanted(prediction):
            self._end(prediction, Status.CANCELED, "It was not started: its batch has stopped.")
            return
        # One that is woken before its turn takes a start that nobody else waits for.
        may_go = prediction.turn_ms and self._limiter.is_idle(_lane(prediction))
        if prediction.submit_at and prediction.submit_at > now and not may_go:
            raise self._put_off_until(prediction, prediction.submit_at, prediction.turn_ms)
        if pause := self._limiter.pause_now():
            raise PredictionThrottled(self._within_lifetime(prediction, pause.remaining(now, _PAUSE_STEP_SECONDS)))
        if prediction.unknown_creates and (stopped := self._unknown.stopped_seconds()):
            # Evidence has proved wrong since its claim was released.
            raise PredictionThrottled(self._within_lifetime(prediction, min(_PAUSE_STEP_SECONDS, stopped)))
        # What came over HTTP was checked before it was written down; a training's input is not of its version's schema.
        check = prediction.source != "http" and prediction.object == "prediction"
        # Before anything that may refuse it: what is refused costs executions too, and counts for its owner's day.
        counted = self._acquire_slot_in_queue(prediction)
        try:
            version, schema = self._look_up(_reference(prediction), check=check)
        except Problem as problem:
            if problem.status >= 500:
                if counted:
                    # A crash before this write counts it twice: too many of the day, never too few.
                    self.table.note_counted(prediction)
                raise PredictionThrottled(self._within_lifetime(prediction, self._outage_seconds(prediction))) from None
            self._end(prediction, Status.FAILED, problem.detail)
            return
        # As in `start`: what can fail on our side comes before the claim.
        input_json = self.table.input_json(prediction)
        if input_json is None:
            self._end(prediction, Status.FAILED, "Its input had expired before Replicate accepted it.")
            return
        if check and (invalid := self._violations(schema, input_json)):
            self._end(prediction, Status.FAILED, _listed(invalid))
            return
        api_url()
        self._take_turn(prediction, counted=counted)
        claimed = self.table.claim(prediction_id, version, self._now(), counted=counted)
        if claimed is None:
            return
        self._submit_for_execution(claimed, input_json)

    def _take_turn(self, prediction: Prediction, *, counted: bool) -> None:
        """Takes a start at the limiter, unless it has one.

        A place in the owner's limits is taken before: who has to wait for the one must not use up the other.

        Args:
            prediction: The prediction.
            counted: Whether it has a place that its item does not tell of yet.

        Raises:
            PredictionThrottled: It has to wait, this once.
        """
        # One that an earlier release reserved has no number: its lane may have begun anew, so it asks again.
        if (
            prediction.reserved_start is not None
            and prediction.submit_at
            and self._limiter.is_reserved(prediction.submit_at)
        ):
            return
        start, now = self._reserve_start(prediction), self._now()
        turn_is_ahead = prediction.turn_ms and prediction.submit_at and prediction.submit_at > now
        if isinstance(start, Start) and start.at <= now + _SOON_SECONDS:
            if turn_is_ahead:
                self._limiter.release_turn(_lane(prediction), prediction.owner, prediction.turn_ms or 0)
            return
        if isinstance(start, AskAgain) and not start.step_ms:
            raise self._put_off_until(prediction, math.ceil(start.at), prediction.turn_ms)
        submit_at = math.ceil(now + self._look_seconds(prediction) if isinstance(start, TooLate) else start.at)
        waits = _waits(start)
        # Where it moved on meanwhile, the next look finds out.
        if self.table.put_off(prediction, submit_at, counted=counted, waits=waits) is None:
            self._return(_lane(prediction), prediction.owner, waits)
        raise self._put_off_until(prediction, submit_at, waits.turn_ms)

    def _put_off_until(self, prediction: Prediction, submit_at: int, turn_ms: int | None) -> PredictionThrottled:
        """How long to wait for a start or a turn: until then, and for a turn that is far ahead until half of it."""
        seconds = int(submit_at - self._now()) + 1
        if turn_ms and seconds > self._limiter.max_start_delay_seconds:
            # What is ahead of it may be canceled meanwhile, and the lane idle: those who wait look at different times.
            seconds = math.ceil(seconds / 2)
        return PredictionThrottled(self._within_lifetime(prediction, seconds))

    def _look_seconds(self, prediction: Prediction) -> float:
        """How long to wait with a prediction whose turn would come after its deadline."""
        remaining = max(1.0, prediction.deadline - self._now())
        return remaining / 2 if remaining / 2 >= _LOOK_SECONDS else remaining

    def _why_not_started(self, prediction: Prediction) -> str:
        reason = "Its deadline passed before Replicate accepted it."
        if not prediction.submit_at:
            return reason
        seconds = math.ceil(self._limiter.expected_start(_lane(prediction), prediction.owner) - self._now())
        if seconds < _START_MARGIN_SECONDS:
            return reason
        return (
            f"{reason} Requests of the owner {prediction.owner} now wait about {seconds} s for a start, at"
            f" {self._limiter.creates_per_minute} creates a minute: allow a longer lifetime, or send fewer at once."
        )

    def _return(self, lane: Lane, owner: str, waits: Waits) -> None:
        """Give back to the limiter what was reserved for a prediction that will not use it."""
        if waits.reserved_start is not None:
            self._limiter.release(lane, waits.reserved_start)
        if waits.turn_ms:
            self._limiter.release_turn(lane, owner, waits.turn_ms)

    def _acquire_slot_in_queue(self, prediction: Prediction) -> bool:
        """Takes a place in the owner's limits, unless it has one.

        Returns:
            Whether it has a place that its item does not tell of yet.

        Raises:
            PredictionThrottled: There is none.
        """
        # What `start` has put off has its place.
        if prediction.source in ("http", "run_job") or prediction.counted:
            return False
        limits = self._usage.known_limits(prediction.owner)
        if not limits:
            return False
        try:
            self._usage.acquire_slot(prediction.owner, prediction.id, limits)
        except LimitReached as reached:
            least, most = _OWN_LIMIT_WAITS
            seconds = max(reached.seconds, min(most, max(least, (int(self._now()) - prediction.created) // 4)))
            logger.info("waits for its owner's limit", reason=reached.detail, wait_seconds=seconds)
            raise PredictionThrottled(self._within_lifetime(prediction, seconds)) from None
        return True

    def _reserve_start(self, prediction: Prediction) -> Reservation:
        latest = prediction.deadline - _START_MARGIN_SECONDS
        has_turn = prediction.turn_ms or prediction.reserved
        turn_at = prediction.submit_at if has_turn else None
        if _lane(prediction) == "http":
            return self._limiter.reserve_for_caller(prediction.owner, latest=latest, turn_at=turn_at)
        return self._limiter.reserve_for_queue(prediction.owner, latest=latest, turn_at=turn_at)

    def _within_lifetime(self, prediction: Prediction, seconds: int) -> int:
        """That long, but not longer than until just after the deadline, which ends it."""
        return max(1, min(seconds, int(prediction.deadline - self._now()) + 1))

    def _submit_for_execution(self, prediction: Prediction, input_json: str) -> None:
        try:
            self._submit(prediction, input_json)
        except Refused as error:
            self._end(prediction, Status.FAILED, error.detail)
        except NotAccepted as error:
            if isinstance(error, Unauthorized):
                self._count_refused_token(error)
            released, wait_seconds = self._give_back(prediction, error)
            if not released.terminal:
                raise PredictionThrottled(self._within_lifetime(prediction, wait_seconds)) from None
        except OutcomeUnknown as error:
            raise PredictionThrottled(self._note_unknown(prediction, error)) from None

    def _note_unknown(self, prediction: Prediction, error: OutcomeUnknown) -> int:
        """Record an unknown outcome; return in how many seconds to look for what it started."""
        logger.warning("submitted with unknown outcome", reason=str(error))
        try:
            return self._unknown.note(prediction, error)
        except (ClientError, BotoCoreError):
            # The claim itself says until when its holder was at work.
            logger.exception("the unknown outcome was not recorded")
            return 1

    def _submit(
        self,
        prediction: Prediction,
        input_json: str,
        wait_until: float = 0,
        rate_limit: dict[str, str] | None = None,
    ) -> Prediction:
        """The one POST, for the holder of the claim, and the bind.

        Where a caller waits, Replicate holds its answer (its sync mode). Meanwhile webhooks bind, merge and end the
        item as ever, and a cancel flags it; what the answer tells is merged by the same rule, so that `processing`
        with the whole output is no end.

        Raises:
            NotAccepted: The claim may be released.
            OutcomeUnknown: It may not.
        """
        body: dict[str, Any] = {"input": json.loads(input_json)}
        webhook = webhook_of(prediction.id)
        if self._replicate.calls_back(webhook):
            body |= {"webhook": webhook, "webhook_events_filter": _events(prediction)}
        if prediction.stream is not None:
            body["stream"] = prediction.stream
        remaining_seconds: int | None = prediction.deadline - int(self._now())
        if prediction.destination is not None:
            body["destination"] = prediction.destination
            remaining_seconds = None  # the poll keeps a training's deadline
        wait_seconds = int(wait_until - self._now())
        if prediction.unknown_creates:
            # What an earlier submission started may have told its webhook since: the last moment to see that.
            there = self.table.get(prediction.id) or prediction
            if there.upstream_id or there.terminal:
                return there
            if there.cancel_requested or there.written_by != prediction.written_by or there.claimed is None:
                raise NotAccepted(None, "the prediction was canceled, or is somebody else's to submit")
        told = self._replicate.create(
            target_of(prediction),
            body,
            cancel_after_seconds=remaining_seconds,
            wait_seconds=wait_seconds if wait_seconds >= 1 else None,
            rate_limit=rate_limit,
            window=self._window(prediction),
        )
        logger.info("submitted", upstream_id=told.id, status=told.status)
        bound = self._bind(prediction, told)
        if self._schemas and prediction.version and not prediction.name:
            self._schemas.learn(prediction.version, told)
        return bound

    def _window(self, prediction: Prediction) -> "SendWindow | None":
        """When the holder of this claim may send its create."""
        from predictions.upstream.create_window import SendWindow  # loaded with the first create

        if prediction.claimed is None or prediction.submit_until is None:
            return None
        return SendWindow(prediction.claimed + _CLAIM_SECONDS, prediction.submit_until, self._now)

    def _bind(self, prediction: Prediction, told: UpstreamPrediction) -> Prediction:
        now = self._now()
        next_check_at = int(now) + self._timing.first_poll + 120
        merged = self._merge(prediction, told, next_check_at=next_check_at)
        if merged.orphans:
            self._cancel_orphans(merged)
        if merged.cancel_requested and not merged.terminal and merged.upstream_id == told.id:
            return self._cancel_upstream(merged) or merged
        return merged

    def _wait_seconds(self, prediction: Prediction, error: NotAccepted) -> tuple[int, Waits]:
        """How long to wait after a submission that was not accepted, and what for."""
        if isinstance(error, Throttled):
            metrics.add_metric(name="UpstreamThrottles", unit=MetricUnit.Count, value=1)
            # Those that wait with it start one after another then, as do all others.
            self._limiter.block(error.seconds)
            start = self._reserve_start(prediction)
            if isinstance(start, TooLate):
                return error.seconds, Waits()
            return max(error.seconds, math.ceil(round(start.at - self._now(), 3))), _waits(start)
        if isinstance(error, Unauthorized):
            return _UNAUTHORIZED_WAIT_SECONDS, Waits()
        return self._outage_seconds(prediction), Waits()

    def _outage_seconds(self, prediction: Prediction) -> int:
        """How long to wait while Replicate cannot be reached. The longer it lasts, the rarer: a quarter of it."""
        waited = (int(self._now()) - prediction.created) // 4
        return min(_UNAUTHORIZED_WAIT_SECONDS, max(_NO_CONNECTION_WAIT_SECONDS, waited))

    def _give_back(self, prediction: Prediction, error: NotAccepted) -> tuple[Prediction, int]:
        """Releases a claim whose submission was certainly not accepted; a cancel of meanwhile ends the prediction.

        Returns:
            The prediction, and how many seconds it has to wait.
        """
        wait_seconds, waits = self._wait_seconds(prediction, error)
        logger.warning("not accepted, submitted again later", wait_seconds=wait_seconds)
        released = self.table.release(prediction, self._now(), wait_seconds, waits=waits)
        if released is None:
            self._return(_lane(prediction), prediction.owner, waits)
        if released and released.cancel_requested:
            return self._end(released, Status.CANCELED, None), wait_seconds
        return released or prediction, wait_seconds

    # -- poll -------------------------------------------------------------------------------------------------

    def poll(self, prediction_id: str) -> None:
        """Moves an open prediction on without a webhook.

        Raises:
            PredictionThrottled: It still has to be submitted, and not now.
        """
        prediction = self.table.get(prediction_id)
        if prediction is None:
            return
        if prediction.terminal:
            if prediction.orphans:
                self._cancel_orphans(prediction)
            return
        metrics.add_metric(name="Polls", unit=MetricUnit.Count, value=1)
        self._measure_age(prediction)
        # One look fewer than in the sweep: the poll is what the look that started this execution waits for.
        if prediction.stalled_looks >= _STALLED_LOOKS - 1 and self._is_abandoned(prediction):
            self._abandon(prediction)
            return
        if prediction.orphans:
            self._cancel_orphans(prediction)
        if prediction.upstream_id:
            self._ask(prediction)
        elif prediction.claimed and prediction.submit_until:
            self._look_for(prediction)
        elif prediction.claimed:
            self._reconcile(prediction)
        else:
            self.submit(prediction_id)
        if prediction.stalled_looks:
            self.table.forget_stalled_looks(prediction)

    def _ask(self, prediction: Prediction) -> None:
        now = self._now()
        upstream_id = prediction.upstream_id or ""
        not_found = 0
        try:
            told = self._replicate.get(upstream_id, prediction.collection)
            if told.too_large and rank_of(told.status) < TERMINAL_RANK:
                # It may go on for hours, and what it makes can be neither kept nor shown: it is not to be paid for.
                # Where this is not heard, the next poll says it again.
                canceled = self._replicate.cancel(upstream_id, prediction.collection)
                logger.warning("canceled: its output is too large", upstream_id=upstream_id, status=canceled.status)
                told = told.failed_for_its_size()
            prediction = self._merge(prediction, told)
            if prediction.terminal:
                metrics.add_metric(name="EndsByPoll", unit=MetricUnit.Count, value=1)
            elif prediction.cancel_requested or now >= prediction.deadline:
                prediction = self._cancel_upstream(prediction) or prediction
        except NotFound:
            not_found = prediction.not_found_count + 1
        except Unavailable as error:
            logger.warning("poll without answer", reason=str(error))
            not_found = prediction.not_found_count
        except (ClientError, BotoCoreError):
            # A result that cannot be kept must not keep a prediction open for ever.
            if now < prediction.deadline + _ABANDON_SECONDS:
                raise
            logger.exception("the end cannot be kept")
        if prediction.terminal:
            return
        if not_found >= _NOT_FOUND_LIMIT:
            self._end(prediction, Status.FAILED, f"Replicate does not know {prediction.object} {upstream_id} any more.")
        elif now >= prediction.deadline + _ABANDON_SECONDS:
            why = (
                f"No end of Replicate's {prediction.object} {upstream_id} could be had until an hour past its deadline."
            )
            self._end(prediction, Status.FAILED, why)
        elif not_found != prediction.not_found_count:
            self.table.count_not_found(prediction, not_found)

    def _look_for(self, prediction: Prediction) -> None:
        """Look for what a submission of unknown outcome started; act on evidence that it started nothing.

        Raises:
            PredictionThrottled: Neither is known yet, or it is submitted again later.
        """
        wait_seconds = 1
        # Without either, it is left to its deadline, whatever the readings say.
        acts = self._resubmit or prediction.cancel_requested is not None
        if not (acts and self._unknown.has_evidence(prediction)):
            wait_seconds = self._unknown.look(prediction, self._bind)
            there = self.table.get(prediction.id)
            if there is None or there.terminal or there.upstream_id:
                return
            if there.written_by != prediction.written_by or there.claimed is None:
                raise PredictionThrottled(1)  # somebody else has acted on the same evidence
            prediction = there
        if acts and self._unknown.has_evidence(prediction):
            self._act_on_absence(prediction)
        now = self._now()
        over_at = prediction.deadline + (_ABANDON_SECONDS if prediction.read_failed else _GIVE_UP_SECONDS)
        if now >= over_at:
            self._give_up(prediction)
            return
        raise PredictionThrottled(max(1, min(wait_seconds, int(over_at - now) + 1)))

    def _act_on_absence(self, prediction: Prediction) -> NoReturn:
        """Release the claim of a prediction that Replicate has not accepted, or end it.

        Raises:
            PredictionThrottled: It is submitted again later, or has ended: the next look finds out.
        """
        now = self._now()
        creates = prediction.unknown_creates + 1
        wait_seconds = 1
        if prediction.cancel_requested:
            self._end(prediction, Status.CANCELED, None)
        elif why := self._why_not_again(prediction, creates):
            self._end(prediction, Status.FAILED, why)
        elif stopped := self._unknown.stopped_seconds():
            wait_seconds = min(_PAUSE_STEP_SECONDS, stopped)
        else:
            self._unknown.watch(prediction)  # first: an orphan must be looked for whatever happens to this function
            wait_seconds = RESUBMIT_WAITS[min(creates, len(RESUBMIT_WAITS)) - 1]
            if self.table.release_absent(prediction, now, wait_seconds, creates):
                logger.warning("Replicate accepted nothing: submitted again", wait_seconds=wait_seconds)
                metrics.add_metric(name="Resubmissions", unit=MetricUnit.Count, value=1)
            else:
                wait_seconds = 1
        raise PredictionThrottled(wait_seconds)

    def _why_not_again(self, prediction: Prediction, creates: int) -> str | None:
        """Why a prediction that was not accepted is not submitted again; None where it is."""
        if self._now() >= prediction.deadline:
            return "Its deadline passed before Replicate accepted it."
        if prediction.object == "training":
            return "Replicate's answer to the submission was lost, and Replicate's list shows that nothing was started."
        if prediction.unanswered:
            return "It was not submitted: its caller was told of an error."
        if creates >= self._max_unknown_creates:
            return (
                f"Replicate gave no clear answer to {creates} submissions, and its list shows that none of them "
                "started anything. Request it again later."
            )
        return None

    def _reconcile(self, prediction: Prediction) -> None:
        """Finds what a submission of unknown outcome started, if it started anything; of claims by older code."""
        now = self._now()
        if now < (prediction.claimed or 0) + self._timing.grace:
            return
        matches = None
        try:
            matches = self._candidates(prediction)
        except Unavailable as error:
            logger.warning("reconciling without answer", reason=str(error))
        if matches and len(matches) == 1 and self.table.reserve(matches[0].id, prediction):
            logger.info("reconciled", upstream_id=matches[0].id)
            self._bind(prediction, matches[0])
            return
        if matches:
            logger.warning("several predictions may be this one: none is taken", candidates=[m.id for m in matches])
        patience_seconds = _GIVE_UP_SECONDS if matches is not None else _ABANDON_SECONDS
        if now >= prediction.deadline + patience_seconds:
            self._give_up(prediction)

    def _candidates(self, prediction: Prediction) -> list[UpstreamPrediction]:
        """The predictions of Replicate's that can be this one: same target, input and time, bound to no other."""
        input_json = self.table.input_json(prediction)
        if input_json is None:
            return []
        target, wanted = target_of(prediction), input_json_canonical(json.loads(input_json))
        claimed = prediction.claimed or 0
        start = datetime.fromtimestamp(claimed - _CLOCK_SKEW_SECONDS, UTC)
        end = datetime.fromtimestamp(claimed + _PREVIOUS_RELEASE_SECONDS + _CLOCK_SKEW_SECONDS, UTC)
        matches = []
        for listed in self._replicate.created_between(start, end, prediction.collection):
            if not target.ran(listed) or listed.id in prediction.orphans | prediction.orphans_canceled:
                continue
            if listed.input is not None and not _same_input(listed.input, wanted):
                continue
            if self.table.bound_to(listed.id) not in (None, prediction.id):
                continue
            try:
                told = self._replicate.get(listed.id, prediction.collection)
            except NotFound:
                continue
            names_us = told.webhook is not None and told.webhook.endswith(f"/webhooks/replicate/{prediction.id}")
            if names_us:
                return [told]
            if told.webhook is None and _same_input(told.input, wanted):
                matches.append(told)
        return matches

    def _give_up(self, prediction: Prediction) -> None:
        if prediction.cancel_requested:
            self._end(prediction, Status.CANCELED, None)
            return
        why = (
            "Replicate's answer to the submission was lost, and no prediction of it was found until the deadline. "
            "It was not submitted again, since that could have been paid for twice."
        )
        if undecided := undecided_ids(prediction):
            why += (
                f" These predictions at Replicate may be it, and nothing that Replicate shows of them tells: "
                f"{', '.join(undecided)}."
            )
        self._end(prediction, Status.FAILED, why)

    # -- cancel -----------------------------------------------------------------------------------------------

    def cancel(self, prediction: Prediction) -> Prediction:
        """Cancels a prediction for its owner.

        Returns:
            The prediction as it is then: still open where Replicate has yet to end it, unchanged where it had ended.
        """
        flagged = self.table.request_cancel(prediction.id, self._now()) or self.table.get(prediction.id) or prediction
        if flagged.terminal:
            return flagged
        if flagged.upstream_id:
            return self._cancel_upstream(flagged) or flagged
        if not flagged.claimed:
            return self._end(flagged, Status.CANCELED, None)
        return flagged

    def _cancel_upstream(self, prediction: Prediction) -> Prediction | None:
        """Ask Replicate to cancel a prediction, and merge an end that it answers with.

        Of the answer to a cancel, which holds the whole prediction, only the status is read: an end is read by a GET,
        by the same rules as in a poll.

        Returns:
            The prediction as it is then, or None if Replicate did not answer: the flag or the deadline stays, and the
            next poll, or the sweep, asks again.
        """
        upstream_id = prediction.upstream_id or ""
        try:
            status = self._replicate.cancel(upstream_id, prediction.collection).status
            if status is None or rank_of(status) < TERMINAL_RANK:
                return prediction
            return self._merge(prediction, self._replicate.get(upstream_id, prediction.collection))
        except (NotFound, Unavailable) as error:
            logger.warning("cancel without answer", reason=str(error))
            return None

    # -- delete -----------------------------------------------------------------------------------------------

    def delete_ended(self, prediction: Prediction) -> None:
        """Removes input, output, files and logs of a prediction that has ended, for its owner.

        The flag comes first, so that nobody is shown any of it from then on. Died half-way, or asked again: the next
        call, or the sweep, removes the rest.

        Raises:
            Problem: 409, where it has not ended.
        """
        now = self._now()
        there = self.table.request_delete(prediction.id, now) or self.table.get(prediction.id) or prediction
        if not there.deleted:
            raise Problem(409, _not_ended(there))
        if there.next_check_at is not None:
            self.table.delete_data(there, now)

    # -- sweep ------------------------------------------------------------------------------------------------

    def sweep(
        self,
        limit: int,
        remaining_seconds: Callable[[], float],
        others: Mapping[str, Callable[[str], None]] | None = None,
    ) -> int:
        """Moves on every prediction whose check is due; stops in time, since the next sweep goes on.

        Args:
            limit: The most items of one sweep.
            remaining_seconds: How long the function may still run.
            others: What moves on items of other kinds, such as `pipeline`, by the id that follows in their key. It puts
                the next check off before anything else.

        Returns:
            How many it looked at.
        """
        looked_at = 0
        sweepers = {"prediction": self._sweep, **(others or {})}
        for pk in self.table.due(self._now(), limit):
            if remaining_seconds() < _SWEEP_STEP_SECONDS:
                break
            looked_at += 1
            kind, _, each = pk.partition("#")
            try:
                sweepers[kind](each)
            except Exception:  # noqa: BLE001  # one that cannot be mended must not keep the sweep from the others
                logger.exception("swept without success", pk=pk)
                # Nor stay before them in the queue, where its first write was the one that failed.
                with contextlib.suppress(ClientError, BotoCoreError):
                    if stuck := self.table.get(each):
                        self.table.check_again_at(stuck, self._now() + _STUCK_SECONDS)
        return looked_at

    def _sweep(self, prediction_id: str) -> None:
        now = self._now()
        prediction = self.table.get(prediction_id)
        # The index may lag behind the item.
        if prediction is None or prediction.next_check_at is None or prediction.next_check_at > now:
            return
        logger.set_correlation_id(prediction_id)
        # Before anything is asked of anybody: a function that is killed by its memory or its time raises nothing, and
        # what stays due stays before all others.
        begun = self.table.begin_look(prediction, self._look_again_at(prediction, now))
        if begun is None:
            return
        prediction = begun
        if prediction.stalled_looks > 1:
            # Where the function is killed, this is the last that its log says.
            logger.warning("looked at again: the look before died, or the execution", stalled=prediction.stalled_looks)
        if prediction.stalled_looks >= _STALLED_LOOKS and self._is_abandoned(prediction):
            prediction = self._abandon(prediction)
        if prediction.orphans:
            self._cancel_orphans(prediction)
            prediction = self.table.get(prediction_id) or prediction
        if prediction.deleted:
            self.table.delete_data(prediction, now)
        if prediction.ended_visibly:
            if prediction.orphans:
                self.table.end_look(prediction, now + _SWEEP_STEP_SECONDS, stalled=False)
            elif not prediction.deleted:
                self.table.close(prediction)
            return
        execution = self._executions.status(prediction_id, prediction.execution_n)
        unclaimed = not prediction.claimed and not prediction.upstream_id
        never_tracked = execution is None and prediction.execution_n == 1
        if unclaimed and never_tracked and prediction.source == "http" and not prediction.keyed:
            self._end(prediction, Status.FAILED, "It was not submitted: its caller was told of an error.")
            return
        lost = not prediction.upstream_id and prediction.claimed is not None and prediction.submit_until is not None
        if lost and never_tracked and prediction.source == "http" and not prediction.keyed:
            # Its function died before it answered: its caller saw an error, and may have asked again.
            prediction = self.table.note_unknown(prediction, {"unanswered": True}) or prediction
        logger.info("stands still", status=prediction.status, execution=execution, stalled=prediction.stalled_looks)
        self._measure_age(prediction)
        unheard = False
        if prediction.cancel_requested and prediction.upstream_id and not prediction.terminal:
            canceled = self._cancel_upstream(prediction)
            unheard = canceled is None
            prediction = canceled or prediction
        soon = now + self._timing.first_poll + 120
        dead = execution not in ("RUNNING", None)
        if dead and self._resumes_later(prediction):
            # A look that Replicate did not answer has not died: its cancel is sent again soon, by a look that may
            # still put the execution off.
            again = soon if unheard else self._look_again_at(prediction, now)
            self.table.end_look(prediction, again, stalled=True, put_off=not unheard)
            return
        if execution == "RUNNING":
            if prediction.terminal:
                wake(prediction.task_token)
        else:
            metrics.add_metric(name="ExecutionsReplaced", unit=MetricUnit.Count, value=1)
            self._track(prediction, submit=unclaimed or lost)
        # The new execution notes a time of its own where it waits for a webhook; where it copies, this one holds.
        again = self._look_again_at(prediction, now) if dead and prediction.stalled_looks > 1 else 0
        self.table.end_look(prediction, max(again, soon), stalled=dead)

    def _look_again_at(self, prediction: Prediction, now: float) -> float:
        """When to look next at a prediction if this look dies: exponential backoff, never past the last look of all."""
        doubled: int = 2 ** min(prediction.stalled_looks, 10)
        most = _LOOK_AGAIN_UNBOUND_SECONDS if prediction.upstream_id is None else _LOOK_AGAIN_MOST_SECONDS
        backoff = min(most, _LOOK_AGAIN_SECONDS * doubled)
        last = self._abandoned_at(prediction)
        return now + backoff if now >= last else min(now + backoff, last)

    def _resumes_later(self, prediction: Prediction) -> bool:
        """Whether a dead execution is replaced by the next look only: the second in a row, and each one after it.

        The files of one that has ended do not wait: Replicate removes them.
        """
        again = prediction.stalled_looks > 1 and prediction.resume_n != prediction.execution_n
        return again and not prediction.terminal

    @staticmethod
    def _abandoned_at(prediction: Prediction) -> int:
        """When a prediction over which functions die is ended by our own word."""
        if prediction.awaits_copy:
            return (prediction.ended or 0) + _ABANDON_COPY_SECONDS
        return prediction.deadline + _ABANDON_SECONDS

    def _is_abandoned(self, prediction: Prediction) -> bool:
        return self._now() >= self._abandoned_at(prediction)

    def _abandon(self, prediction: Prediction) -> Prediction:
        """End a prediction over which functions died, without asking Replicate or its file host anything.

        Orphans are struck off too: they were created with the same deadline, so Replicate has canceled them.
        """
        logger.error("functions died over it: ended without asking", stalled=prediction.stalled_looks)
        for upstream_id in sorted(prediction.orphans):
            self.table.orphan_canceled(prediction, upstream_id)
        prediction = self.table.get(prediction.id) or prediction
        if prediction.awaits_copy:
            lost = StoredFile("", 0, error="The files could not be copied: functions died over this output each time.")
            metrics.add_metric(name="CopiesFailed", unit=MetricUnit.Count, value=1)
            ended = self.table.end_copy(prediction, [lost], self._now())
            if ended is not None:
                count_ended(ended.visible, self._now() - ended.created)
            return ended or self.table.get(prediction.id) or prediction
        if prediction.terminal:
            return prediction
        of = f" Its id at Replicate is {prediction.upstream_id}." if prediction.upstream_id else ""
        why = (
            "This stack's functions ran out of memory or time each time that they looked at it, so it was ended an "
            f"hour past its deadline without asking Replicate again.{of} Have the model return large outputs as files."
        )
        return self._end(prediction, Status.FAILED, why)

    def _cancel_orphans(self, prediction: Prediction) -> None:
        for upstream_id in sorted(prediction.orphans):
            if prediction.unknown_creates:
                self._unknown.stop(prediction, upstream_id)
            self._unknown.remember_orphan(upstream_id, prediction)
            try:
                told = self._replicate.cancel(upstream_id, prediction.collection)
                if prediction.upstream_id and told.status in (Status.SUCCEEDED, Status.FAILED):
                    logger.error("paid twice: an orphan had ended", upstream_id=upstream_id)
                    metrics.add_metric(name="PaidTwice", unit=MetricUnit.Count, value=1)
            except NotFound:
                if prediction.orphans_not_found + 1 < _NOT_FOUND_LIMIT:
                    # One 404 is not believed, as in a poll: an orphan that runs on is paid for.
                    logger.warning("orphan not found", upstream_id=upstream_id, times=prediction.orphans_not_found + 1)
                    self.table.count_orphans_not_found(prediction)
                    continue
                logger.info("orphan is gone", upstream_id=upstream_id)
            except Unavailable as error:
                logger.warning("orphan not canceled yet", upstream_id=upstream_id, reason=str(error))
                continue
            self.table.orphan_canceled(prediction, upstream_id)

    def look_again(self) -> int:
        """Read Replicate's list once more for what was submitted again, where that is due; returns for how many.

        Raises:
            ClientError, BotoCoreError: AWS failed; the next sweep does it.
        """
        return self._unknown.look_again(self._cancel_orphans, self._bind)

    def measure(self) -> None:
        """Counts what is open, and notes whether submissions are paused, for the stack's metrics; none where none is.

        Raises:
            ClientError, BotoCoreError: AWS did not tell.
        """
        if open_ := self.table.count_open():
            metrics.add_metric(name="OpenItems", unit=MetricUnit.Count, value=open_)
        if self._limiter.limiter_state().pause(self._now()):
            metrics.add_metric(name="Paused", unit=MetricUnit.Count, value=1)

    def _measure_age(self, prediction: Prediction) -> None:
        # Polls and sweeps look at everything that stays open: the maximum is the age of the oldest.
        now = self._now()
        metrics.add_metric(name="OpenSeconds", unit=MetricUnit.Seconds, value=max(0, now - prediction.created))
        if now > prediction.deadline:
            overdue = now - prediction.deadline
            metrics.add_metric(name="SecondsPastDeadline", unit=MetricUnit.Seconds, value=overdue)

    def signing_secret(self) -> str:
        """The secret with which Replicate signs its webhooks.

        Raises:
            UpstreamError: Replicate did not tell it.
        """
        return self._replicate.signing_secret()

    # -- inside -----------------------------------------------------------------------------------------------

    def _track(self, prediction: Prediction, *, submit: bool) -> None:
        """Makes sure that an execution of this prediction runs."""
        following: Prediction | None = prediction
        while following is not None and not self._executions.start(following.id, following.execution_n, submit=submit):
            # That name is used up by one that has ended.
            n = following.execution_n + 1
            following = self.table.next_execution(following, self._executions.arn(following.id, n), self._now())

    def _merge(
        self, prediction: Prediction, told: UpstreamPrediction, *, next_check_at: int | None = None
    ) -> Prediction:
        merge = self.table.merge(prediction.id, told, self._now(), next_check_at=next_check_at)
        merged = merge.prediction or prediction
        if merge.change is Change.ORPHAN:
            logger.warning("orphan: a second prediction of the same request", upstream_id=told.id)
            metrics.add_metric(name="Orphans", unit=MetricUnit.Count, value=1)
        if merge.change is Change.ENDED and not merged.awaits_copy:
            count_ended(merged.visible, self._now() - merged.created)
        if merge.change in (Change.ENDED, Change.CLOSED):
            wake(merged.task_token)
        return merged

    def _end(
        self, prediction: Prediction, status: Status, error: str | None, *, refusal: dict[str, Any] | None = None
    ) -> Prediction:
        ended = self.table.end(prediction, status, error, self._now(), refusal=refusal)
        if ended is None:
            there = self.table.get(prediction.id) or prediction
            if there.terminal:
                # By somebody else, who may have died before waking it; or by this very write, its answer lost.
                wake(there.task_token)
            return there
        logger.info("ended by the stack", status=status.value)
        count_ended(ended.visible, self._now() - ended.created)
        wake(ended.task_token)
        # Last, since only this can be lost without harm: a start then stays unused.
        if not ended.claimed and not ended.upstream_id and (ended.submit_at or 0) > self._now():
            self._return(_lane(ended), ended.owner, Waits(ended.reserved_start, ended.turn_ms))
        return ended

    def _look_up(self, reference: Reference, *, check: bool = True) -> "_Model":
        """The version that runs a reference, and by which schema to check its input.

        Args:
            reference: What is to be run.
            check: Whether the schema is needed.

        Raises:
            Problem: 404 where there is no such model, 422 where it has no version, 503 where that is not known.
        """
        name, version = reference.name or "", reference.version
        if reference.kind == "model" and version is None:
            return self._model(name)
        if self._schemas is None or not check:
            return _Model(version, None)
        if reference.kind == "deployment":
            return _Model(version, self._schemas.of_deployment(name))
        return _Model(version, self._schemas.of_version(reference.name, version or ""))

    def _model(self, name: str) -> "_Model":
        cached = self._models.get(name)
        if cached and cached[0] > self._now():
            return cached[1]
        try:
            model = self._replicate.model(name)
        except NotFound:
            detail = f"There is no model {name}, or this stack's Replicate token may not use it."
            raise Problem(404, detail, upstream_status=404) from None
        except Unavailable as error:
            detail = f"Replicate could not be asked for the version of {name}: {error}. Nothing was started: try again."
            raise Problem(503, detail, headers={"Retry-After": "5"}, upstream_status=error.status) from None
        version = None if model.is_official else model.latest_version
        if version is None and not model.is_official:
            raise Problem(422, f"The model {name} has no version that could be run.")
        schema = self._schemas.of_model(name, model.openapi_schema) if self._schemas else None
        self._models.pop(name, None)
        while len(self._models) >= _MODELS_CACHED:
            del self._models[next(iter(self._models))]  # the oldest: schemas are large
        found = _Model(version, schema)
        self._models[name] = (self._now() + _MODEL_CACHE_SECONDS, found)
        return found

    def _violations(self, schema: "InputSchema | None", input_json: str) -> list[dict[str, str]]:
        """What is wrong with an input, as far as it can be told; Replicate looks at it again."""
        if schema is None:
            return []
        from predictions.upstream.input_schema import NotChecked  # loaded with the first schema

        try:
            return schema.violations(json.loads(input_json))
        except NotChecked as error:
            logger.info("input not checked", reason=str(error))
            return []

    def _count_refused_token(self, error: Unauthorized) -> None:
        logger.error("Replicate refuses the stack's token or credit", status=error.status)
        metrics.add_metric(name="UpstreamRefusals", unit=MetricUnit.Count, value=1)
        if error.status in (401, 402):  # 403 may be of this one model
            why = "token" if error.status == 401 else "credit"
            self._limiter.pause_automatically(f"Replicate refuses this stack's {why} ({error.status}).")


def _existing(prediction: Prediction, intent: Intent) -> Prediction:
    """The answer to a request that was made before.

    Raises:
        Problem: 422, where it was another request; or the refusal that the first one got.
    """
    if prediction.owner != intent.owner or prediction.fingerprint != intent.fingerprint:
        detail = "This key belongs to another request: use a new key for a new request, and the old one to repeat it."
        raise Problem(422, detail, invalid_fields=[{"field": "Idempotency-Key", "detail": detail}])
    if prediction.refusal_json:
        raise _problem_of(json.loads(prediction.refusal_json))
    return replace(prediction, repeated=True)


def _paused(pause: Pause, now: float) -> Problem:
    detail = f"This stack submits nothing now: {pause.reason} Nothing was started or written: try again later."
    seconds = pause.remaining(now, _PAUSE_STEP_SECONDS)
    return Problem(503, detail, title="Paused", headers={"Retry-After": str(seconds)})


def _waits(start: Reservation) -> Waits:
    """What a prediction waits for, after this answer of the limiter."""
    if isinstance(start, Start):
        return Waits(reserved_start=start.number)
    return Waits(turn_ms=start.step_ms) if isinstance(start, AskAgain) else Waits()


def _lane(prediction: Prediction) -> Lane:
    """Callers who wait for the answer to their create have a lane of their own."""
    return "http" if prediction.source in ("http", "run_job") else "queue"


def _unwanted(prediction: Prediction) -> bool:
    """Whether what asked for a prediction was canceled after its request was read, and before it was written down."""
    if "pipeline" not in prediction.origin:
        return False
    return is_canceled(str(prediction.origin["pipeline"]))


def _not_ended(prediction: Prediction) -> str:
    if prediction.terminal:
        return f"Prediction {prediction.id} has ended, and its files are being stored: delete it when that is done."
    return f"Prediction {prediction.id} has not ended: cancel it first, and delete it when it has ended."


def _refusal_of(error: Refused) -> dict[str, Any]:
    """Return a refusal by Replicate as the caller is answered, now and when the request is repeated.

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


def _listed(invalid: list[dict[str, str]]) -> str:
    return " ".join(f"{field['field']}: {field['detail']}" for field in invalid)


def _reference(prediction: Prediction) -> Reference:
    kind: Any = prediction.kind
    return Reference(kind, prediction.name, prediction.version)


def _same_input(told: Any, wanted: str) -> bool:
    try:
        return input_json_canonical(told) == wanted
    except RecursionError:
        return False  # deeper than any input that this stack has sent


def _events(prediction: Prediction) -> list[str]:
    """The webhook events to ask Replicate for: what the protocol needs, and what the caller wants to hear of.

    Replicate's default for a caller who names none is outputs and the end.
    """
    wanted = {"start", "completed", *prediction.wanted_events}
    return [event for event in ("start", "output", "logs", "completed") if event in wanted]
