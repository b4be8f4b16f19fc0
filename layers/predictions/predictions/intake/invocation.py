"""Run jobs: predictions that are asked for by invoking `run_prediction`, not over HTTP.

A job comes in one of two shapes, and is answered in the same shape, whatever happens:

    {model, prompt, webhook_url?}                                           at once
    {model, input_data, wait_for_completion?, poll_interval?, …}            when it has ended, or the wait has

Underneath it is the same prediction as any other. Lambda repeats an event that nobody waits for, with the same request
id: the job's id is made from it, so that the repetition finds the prediction. Whoever invokes twice by himself, as a
schedule or an SDK may, gives an `idempotency_key`.

An invocation that failed for good may have started its prediction all the same. `dead-letters redrive` invokes it again
as `{"request_id", "job"}`, under the request id that it had. Who may invoke the function is trusted with that id.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from predictions.errors import Problem
from predictions.intents.model import Intent, create_requested_intent
from predictions.lifecycle.submissions import Submissions
from predictions.observability import MetricUnit, logger, metrics
from predictions.store.predictions import Prediction, Whole
from predictions.validation import field_problem, fields_refused, parse_json
from predictions.views.prediction import Presenter

WAIT_MARGIN_SECONDS = 20
"""What of the function's time is left for the answer, when a wait is cut: reading it, with AWS's own retries."""

# Nothing was started by a 503: it is tried again as often as this, after what `Retry-After` says, if that is soon.
_ATTEMPTS = 3
_RETRY_LIMIT_SECONDS = 10
_TOKEN_REFUSED = (401, 402, 403)


class _Job(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(min_length=1, max_length=256)
    idempotency_key: str | None = None


class PromptJob(_Job):
    """A job that is answered at once.

    Attributes:
        model: `owner/name`, `owner/name:version` or a version id.
        prompt: The model's input `prompt`, its only one.
        webhook_url: Where the end is told.
        idempotency_key: As the API's header `Idempotency-Key`.
    """

    prompt: str = Field(min_length=1)
    webhook_url: str | None = None

    def request(self) -> dict[str, Any]:
        """The same as a `RequestBody`."""
        webhook = {"webhook": self.webhook_url, "webhook_events_filter": ["completed"]} if self.webhook_url else {}
        return {"model": self.model, "input": {"prompt": self.prompt}, **webhook}

    @staticmethod
    def field(name: str) -> str:
        """What a field of the request is called in the job."""
        names = {"input.prompt": "prompt", "webhook": "webhook_url", "Idempotency-Key": "idempotency_key"}
        return names.get(name, name)

    @staticmethod
    def answer(shown: dict[str, Any] | None, error: str | None) -> dict[str, Any]:
        """The answer: of a prediction, or, without one, of the error."""
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


class InputJob(_Job):
    """A job that is answered at its end, unless the wait ends first.

    Attributes:
        model: `owner/name`, `owner/name:version` or a version id.
        input_data: The model's input.
        wait_for_completion: Whether to wait at all.
        poll_interval: Seconds between two looks at the prediction.
        max_poll_attempts: After how many looks the wait ends.
        idempotency_key: As the API's header `Idempotency-Key`.
    """

    input_data: dict[str, Any]
    wait_for_completion: StrictBool = True
    poll_interval: float = Field(default=1, ge=0.1, le=60)
    max_poll_attempts: int = Field(default=60, ge=1, le=10_000)

    def request(self) -> dict[str, Any]:
        """The same as a `RequestBody`."""
        return {"model": self.model, "input": self.input_data}

    @staticmethod
    def field(name: str) -> str:
        """What a field of the request is called in the job."""
        if name.partition(".")[0] == "input":
            return f"input_data{name.removeprefix('input')}"
        return "idempotency_key" if name == "Idempotency-Key" else name

    @staticmethod
    def answer(shown: dict[str, Any] | None, error: str | None) -> dict[str, Any]:
        """The answer: of a prediction, or, without one, of the error."""
        shown = shown or {}
        names = ("status", "model", "input", "output", "created_at", "completed_at", "metrics")
        return {
            "prediction_id": shown.get("id"),
            **{name: shown.get(name) for name in names},
            "error": error,
            "urls": _urls(shown),
        }


class RunJobs:
    """Runs jobs.

    Args:
        submissions: Starts predictions.
        presenter: Shows them.
        owner: Whose they are.
        allow_loopback_webhooks: Whether a webhook may go to this machine (the local cloud's setting).
        sleep: Waits that many seconds.
    """

    def __init__(
        self,
        submissions: Submissions,
        presenter: Presenter,
        *,
        owner: str,
        allow_loopback_webhooks: bool,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._submissions = submissions
        self._presenter = presenter
        self._owner = owner
        self._allow_loopback_webhooks = allow_loopback_webhooks
        self._sleep = sleep

    @classmethod
    def from_env(cls) -> "RunJobs":
        """From the environment of run_prediction."""
        return cls(
            Submissions.from_env(),
            Presenter.from_env(),
            owner=os.environ["QUEUE_OWNER"],
            allow_loopback_webhooks=os.environ["ALLOW_LOOPBACK_WEBHOOKS"] == "true",
        )

    def run(self, event: Any, request_id: str, remaining_seconds: Callable[[], float]) -> dict[str, Any]:
        """Runs one job; the same one again is answered with the prediction that it started before.

        Args:
            event: The job, of a stranger's making; or one that failed, with its request id.
            request_id: The invocation's; the same when Lambda repeats it.
            remaining_seconds: How long the function may still run.

        Returns:
            The answer in the job's shape. A refusal is one, too.

        Raises:
            ClientError, BotoCoreError: AWS failed before the prediction was started: a repetition starts it.
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
            # Whoever does not wait for the answer has only this to find.
            logger.warning("refused", status=problem.status, upstream_status=problem.upstream_status, fields=fields)
            metrics.add_metric(name="RunJobsRefused", unit=MetricUnit.Count, value=1)
            return kind.answer(None, _error(problem, job))
        if isinstance(job, InputJob) and job.wait_for_completion and not prediction.ended_visibly:
            self._wait(prediction.id, job, remaining_seconds)
        shown = self._presenter.show_started(
            prediction, json.loads(intent.input_json), lambda: self._read(prediction), as_starting=False
        )
        shown["model"] = shown["model"] or job.model  # until it is submitted, a version alone does not tell it
        return kind.answer(shown, shown["error"])

    def _intent(self, job: PromptJob | InputJob, request_id: str) -> Intent:
        intent = create_requested_intent(
            {**job.request(), "idempotency_key": job.idempotency_key},
            owner=self._owner,
            source="run_job",
            source_key=request_id,
            allow_loopback_webhooks=self._allow_loopback_webhooks,
        )
        # Nobody can ask again by a request id: what its caller is told has failed must not be started later.
        return replace(intent, keyed=job.idempotency_key is not None)

    def _start(self, intent: Intent, remaining_seconds: Callable[[], float]) -> Prediction:
        for attempt in range(_ATTEMPTS):
            try:
                return self._submissions.start(intent)
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
                logger.info("wait is cut")
                return
            self._sleep(job.poll_interval)
            try:
                seen = self._submissions.table.get(prediction_id)
            except (ClientError, BotoCoreError):
                logger.exception("not seen this time")
                continue
            if seen is None or seen.ended_visibly:
                return

    def _read(self, prediction: Prediction) -> Whole:
        whole = self._submissions.table.read(prediction.id)
        if whole is None:
            raise LookupError(prediction.id)
        return whole


def _redriven(event: Any, request_id: str) -> tuple[Any, str]:
    """The job and the id of its first invocation, which this one may be."""
    if isinstance(event, dict) and event.keys() == {"request_id", "job"} and isinstance(event["request_id"], str):
        return event["job"], event["request_id"]
    return event, request_id


def _kind(event: Any) -> type[PromptJob] | type[InputJob]:
    """By which shape a job is read, and refused: the second one's has fields that the first has not."""
    own = InputJob.model_fields.keys() - PromptJob.model_fields.keys()
    return InputJob if isinstance(event, dict) and own & event.keys() else PromptJob


def _read(kind: type[PromptJob] | type[InputJob], event: Any) -> PromptJob | InputJob:
    """The job in an event.

    Raises:
        Problem: 400, 413 or 422: it holds what JSON cannot carry on, is too large, or is not of that shape.
    """
    try:
        value = parse_json(json.dumps(event).encode(), None)
    except RecursionError:
        raise Problem(400, "The event is nested too deep.") from None
    if not isinstance(value, dict):
        raise Problem(422, "The event has to be a JSON object with `model` and either `prompt` or `input_data`.")
    if "prompt" in value and "input_data" in value:
        detail = "Give `prompt` or `input_data`, not both."
        raise Problem(422, detail, invalid_fields=[{"field": "input_data", "detail": detail}])
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        invalid = [field_problem(str(each["loc"][0])[:100], each, kind.model_fields) for each in found]
        for each in invalid:
            if each == {"field": "prompt", "detail": "This field is required."}:
                each["detail"] = "This field is required (or `input_data`)."
        raise fields_refused(invalid) from None


def _error(problem: Problem, job: PromptJob | InputJob | None) -> str:
    """The text of an answer's `error`; with Replicate's status, where that is why.

    Args:
        problem: Names fields as the job does where it could not be read, else as the request that was made of it does.
        job: The job, if it could be read.
    """
    listed = [
        f"{job.field(field['field']) if job else field['field']}: {field['detail']}"
        for field in problem.invalid_fields[:5]
    ]
    detail = " ".join(listed) or problem.detail
    if problem.upstream_status is None:
        return detail
    told = f"Replicate API error: HTTP {problem.upstream_status}"
    # Of a refused token nothing more can be told to who did not choose it.
    return told if problem.upstream_status in _TOKEN_REFUSED else f"{told}: {detail}"


def _urls(shown: dict[str, Any]) -> dict[str, str] | None:
    return {name: shown["urls"][name] for name in ("get", "cancel")} if shown else None
