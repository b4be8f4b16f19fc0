"""Direct invocations of `run_prediction`.

A job has one of two shapes, and the response always has the same shape:

    {model, prompt, webhook_url?}                                           responds immediately
    {model, input_data, wait_for_completion?, poll_interval?, …}            responds on completion or timeout

Underneath, it is the same prediction as any other. Lambda retries an asynchronous event with the same request id: the
job's id is derived from it, so that the retry finds the prediction. A caller that retries by itself, as a schedule or
an SDK may, should pass an `idempotency_key`.

An invocation that failed permanently may still have started its prediction. `dead-letters redrive` invokes the function
again with `{"request_id", "job"}`, under the original request id. Every principal that may invoke the function is
trusted with that id.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from botocore.exceptions import BotoCoreError, ClientError

from predictions.bodies import (
    BOOLEAN,
    OBJECT,
    TEXT,
    Body,
    Checks,
    ValidationError,
    errors_of,
    number,
    optional,
    text,
    whole,
)
from predictions.errors import Problem
from predictions.intents.model import Intent, create_requested_intent
from predictions.lifecycle.start import StartPrediction
from predictions.observability import MetricUnit, logger, metrics
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction, PredictionDetail
from predictions.validation import field_problem, fields_refused, parse_json
from predictions.views.prediction import Presenter

WAIT_MARGIN_SECONDS = 20
"""The function's time that is reserved for the response when a wait is cut short: a read, with AWS's own retries."""

# A 503 started nothing: it is retried this often, after the time in `Retry-After`, if that is soon.
_ATTEMPTS = 3
_RETRY_LIMIT_SECONDS = 10
_TOKEN_REFUSED = (401, 402, 403)


@dataclass(kw_only=True)
class _Job(Body):
    model: str
    idempotency_key: str | None = None

    checks: ClassVar[Checks] = {"model": text(1, 256), "idempotency_key": optional(TEXT)}


@dataclass(kw_only=True)
class PromptJob(_Job):
    """A job whose response does not wait for completion.

    Attributes:
        model: `owner/name`, `owner/name:version` or a version id.
        prompt: The model's input `prompt`, its only one.
        webhook_url: The URL for the completion webhook.
        idempotency_key: As the API's header `Idempotency-Key`.
    """

    prompt: str
    webhook_url: str | None = None

    checks: ClassVar[Checks] = {**_Job.checks, "prompt": text(1), "webhook_url": optional(TEXT)}

    def request(self) -> dict[str, Any]:
        """Return the job as a `RequestBody`."""
        webhook = {"webhook": self.webhook_url, "webhook_events_filter": ["completed"]} if self.webhook_url else {}
        return {"model": self.model, "input": {"prompt": self.prompt}, **webhook}

    @staticmethod
    def field(name: str) -> str:
        """Return the job's name of a field of the request."""
        names = {"input.prompt": "prompt", "webhook": "webhook_url", "Idempotency-Key": "idempotency_key"}
        return names.get(name, name)

    @staticmethod
    def answer(shown: dict[str, Any] | None, error: str | None) -> dict[str, Any]:
        """Return the response for a prediction or, without one, for the error."""
        shown = shown or {}
        return {
            "success": bool(shown),
            "prediction_id": shown.get("id"),
            "status": shown.get("status"),
            "output": shown.get("output"),
            "urls": _urls(shown),
            "logs": shown.get("logs") or None,
            "error": error,
        }


@dataclass(kw_only=True)
class InputJob(_Job):
    """A job whose response waits for completion, up to a limit.

    Attributes:
        model: `owner/name`, `owner/name:version` or a version id.
        input_data: The model's input.
        wait_for_completion: Whether to wait at all.
        poll_interval: Seconds between two reads of the prediction.
        max_poll_attempts: The number of reads after which the wait ends.
        idempotency_key: As the API's header `Idempotency-Key`.
    """

    input_data: dict[str, Any]
    wait_for_completion: bool = True
    poll_interval: float = 1
    max_poll_attempts: int = 60

    checks: ClassVar[Checks] = {
        **_Job.checks, "input_data": OBJECT, "wait_for_completion": BOOLEAN, "poll_interval": number(0.1, 60),
        "max_poll_attempts": whole(1, 10_000),
    }  # fmt: skip

    def request(self) -> dict[str, Any]:
        """Return the job as a `RequestBody`."""
        return {"model": self.model, "input": self.input_data}

    @staticmethod
    def field(name: str) -> str:
        """Return the job's name of a field of the request."""
        if name.partition(".")[0] == "input":
            return f"input_data{name.removeprefix('input')}"
        return "idempotency_key" if name == "Idempotency-Key" else name

    @staticmethod
    def answer(shown: dict[str, Any] | None, error: str | None) -> dict[str, Any]:
        """Return the response for a prediction or, without one, for the error."""
        shown = shown or {}
        names = ("status", "model", "input", "output", "created_at", "completed_at")
        return {
            "prediction_id": shown.get("id"),
            **{name: shown.get(name) for name in names},
            "metrics": shown.get("metrics", {}) if shown else None,
            "cost": shown.get("cost"),
            "error": error,
            "urls": _urls(shown),
        }


class RunJobs:
    """Runs the jobs of direct invocations.

    Args:
        starting: Starts predictions.
        presenter: Builds the representation of a prediction.
        owner: The owner of the predictions.
        allow_loopback_webhooks: Whether a webhook may go to this machine (the local cloud's setting).
    """

    def __init__(
        self,
        starting: StartPrediction,
        table: PredictionsTable,
        presenter: Presenter,
        *,
        owner: str,
        allow_loopback_webhooks: bool,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._starting = starting
        self._table = table
        self._presenter = presenter
        self._owner = owner
        self._allow_loopback_webhooks = allow_loopback_webhooks
        self._sleep = sleep

    @classmethod
    def from_env(cls) -> "RunJobs":
        """Build from the environment of run_prediction."""
        return cls(
            StartPrediction.from_env(),
            PredictionsTable.from_env(),
            Presenter.from_env(),
            owner=os.environ["QUEUE_OWNER"],
            allow_loopback_webhooks=os.environ["ALLOW_LOOPBACK_WEBHOOKS"] == "true",
        )

    def run(self, event: Any, request_id: str, remaining_seconds: Callable[[], float]) -> dict[str, Any]:
        """Run one job; the same job again returns the prediction that it started before.

        Args:
            event: The job, untrusted; or one that failed, with its request id.
            request_id: The invocation's; the same when Lambda retries it.
            remaining_seconds: Returns how long the function may still run.

        Returns:
            The response in the job's shape, also for a rejected job.

        Raises:
            ClientError, BotoCoreError: AWS failed before the prediction was started: a retry starts it.
        """
        event, request_id = _redriven(event, request_id)
        kind, job = _kind(event), None
        try:
            job = _read(kind, event)
            intent = self._intent(job, request_id)
            logger.set_correlation_id(intent.id)
            prediction = self._start(intent, remaining_seconds)
        except Problem as problem:
            fields = [str(field["field"]) for field in problem.invalid_fields[:10]]
            # An asynchronous caller sees no response and can only find this log line.
            logger.warning("rejected", status=problem.status, upstream_status=problem.upstream_status, fields=fields)
            metrics.add_metric(name="RunJobsRefused", unit=MetricUnit.Count, value=1)
            return kind.answer(None, _error(problem, job))
        if isinstance(job, InputJob) and job.wait_for_completion and not prediction.ended_visibly:
            self._wait(prediction.id, job, remaining_seconds)
        shown = self._presenter.show_started(
            prediction, intent.input_json, lambda: self._read(prediction), as_starting=False
        )
        shown["model"] = shown["model"] or job.model  # until it is submitted, a version alone does not name its model
        return kind.answer(shown, shown["error"])

    def _intent(self, job: PromptJob | InputJob, request_id: str) -> Intent:
        intent = create_requested_intent(
            {**job.request(), "idempotency_key": job.idempotency_key},
            owner=self._owner,
            source="run_job",
            source_key=request_id,
            allow_loopback_webhooks=self._allow_loopback_webhooks,
        )
        # No caller can retry by a request id, so a prediction reported as failed must not be started later.
        return replace(intent, keyed=job.idempotency_key is not None)

    def _start(self, intent: Intent, remaining_seconds: Callable[[], float]) -> Prediction:
        for attempt in range(_ATTEMPTS):
            try:
                return self._starting.start(intent)
            except Problem as problem:
                wait_seconds = int(problem.headers.get("Retry-After", _RETRY_LIMIT_SECONDS))
                if (
                    problem.status != 503
                    or problem.upstream_status in _TOKEN_REFUSED
                    or attempt + 1 == _ATTEMPTS
                    or wait_seconds > min(_RETRY_LIMIT_SECONDS, remaining_seconds() - WAIT_MARGIN_SECONDS)
                ):
                    raise
                self._sleep(wait_seconds)
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, prediction_id: str, job: InputJob, remaining_seconds: Callable[[], float]) -> None:
        for _ in range(job.max_poll_attempts):
            if remaining_seconds() - job.poll_interval < WAIT_MARGIN_SECONDS:
                logger.info("wait cut short")
                return
            self._sleep(job.poll_interval)
            try:
                seen = self._table.get(prediction_id)
            except (ClientError, BotoCoreError):
                logger.exception("prediction not read, retrying")
                continue
            if seen is None or seen.ended_visibly:
                return

    def _read(self, prediction: Prediction) -> PredictionDetail:
        whole = self._table.read(prediction.id)
        if whole is None:
            raise LookupError(prediction.id)
        return whole


def _redriven(event: Any, request_id: str) -> tuple[Any, str]:
    """Return the job and the request id of its first invocation."""
    if isinstance(event, dict) and event.keys() == {"request_id", "job"} and isinstance(event["request_id"], str):
        return event["job"], event["request_id"]
    return event, request_id


def _kind(event: Any) -> type[PromptJob] | type[InputJob]:
    """Return the shape by which a job is parsed, by the fields of `InputJob`."""
    own = set(InputJob.names()) - set(PromptJob.names())
    return InputJob if isinstance(event, dict) and own & event.keys() else PromptJob


def _read(kind: type[PromptJob] | type[InputJob], event: Any) -> PromptJob | InputJob:
    """Parse the job in an event.

    Raises:
        Problem: 400, 413 or 422: it is not representable in JSON, too large, or not of that shape.
    """
    try:
        value = parse_json(json.dumps(event).encode(), None)
    except RecursionError:
        raise Problem(400, "The event is nested too deep.") from None
    if not isinstance(value, dict):
        raise Problem(422, "The event must be a JSON object with `model` and either `prompt` or `input_data`.")
    if "prompt" in value and "input_data" in value:
        detail = "Give `prompt` or `input_data`, not both."
        raise Problem(422, detail, invalid_fields=[{"field": "input_data", "detail": detail}])
    try:
        return kind.of(value)
    except ValidationError as error:
        invalid = [field_problem(str(each["loc"][0])[:100], each, kind.names()) for each in errors_of(error)]
        for each in invalid:
            if each == {"field": "prompt", "detail": "This field is required."}:
                each["detail"] = "This field is required (or `input_data`)."
        raise fields_refused(invalid) from None


def _error(problem: Problem, job: PromptJob | InputJob | None) -> str:
    """Return a response's `error`, with Replicate's status if that is the cause.

    Args:
        problem: Names fields as the job does if it could not be parsed, else as the request built from it does.
        job: The job, if it could be parsed.
    """
    listed = [
        f"{job.field(field['field']) if job else field['field']}: {field['detail']}"
        for field in problem.invalid_fields[:5]
    ]
    detail = " ".join(listed) or problem.detail
    if problem.upstream_status is None:
        return detail
    told = f"Replicate API error: HTTP {problem.upstream_status}"
    # Details about a rejected token are of no use to a caller who did not choose the token.
    return told if problem.upstream_status in _TOKEN_REFUSED else f"{told}: {detail}"


def _urls(shown: dict[str, Any]) -> dict[str, str] | None:
    return {name: shown["urls"][name] for name in ("get", "cancel")} if shown else None
