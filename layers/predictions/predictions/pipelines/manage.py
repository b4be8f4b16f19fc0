"""Use cases of the routes below `/pipelines`, and the representation of pipelines."""

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.admission.quotas import LimitReached, OwnerLimits, OwnersUsage, refusal_of
from predictions.aws.clients import api_url
from predictions.clock import rfc3339
from predictions.errors import Problem
from predictions.ids import derived_id, is_id, random_id
from predictions.intents.model import Attempt, idempotency_key
from predictions.lifecycle.model_lookup import ModelLookup
from predictions.money.cost import total
from predictions.observability import MetricUnit, logger, metrics
from predictions.pipelines.advance import PipelineExecutions
from predictions.pipelines.definition import create_definition, fingerprint
from predictions.pipelines.state import StepState, run_ids, states_of
from predictions.pipelines.steps import wake_pipeline
from predictions.pipelines.store import Pipeline, PipelineExists, PipelinesTable, StoredPipeline
from predictions.store.predictions import PredictionsTable
from predictions.store.recent_requests import RecentRequests
from predictions.store.records import Prediction, PredictionDetail
from predictions.store.schemas import StoredSchemas
from predictions.upstream.client import Replicate
from predictions.validation import parse_json
from predictions.views.prediction import ANSWER_LIMIT_BYTES, Presenter, answer_bytes

LIFETIME_SECONDS = 7 * 86400
"""The longest time of a pipeline: less than the shortest retention, 15 days, so that its first outputs are stored until
its completion."""


class PipelineApi:
    """Implements the routes below `/pipelines`.

    Args:
        predictions: The predictions of their steps.
        recent: Recent requests without a key.
        lookup: Looks up the schemas of models' inputs.
        executions: Runs pipelines.
        presenter: Builds the representation of outputs.
        retention_seconds: How long the table stores a pipeline.
        usage: The owners' usage; None: limits are not applied.
    """

    def __init__(
        self,
        table: PipelinesTable,
        predictions: PredictionsTable,
        recent: RecentRequests,
        lookup: ModelLookup,
        executions: PipelineExecutions,
        presenter: Presenter,
        retention_seconds: int,
        *,
        usage: OwnersUsage | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._keys = table.idempotency_keys(now)
        self._usage = usage
        self._table = table
        self._predictions = predictions
        self._recent = recent
        self._lookup = lookup
        self._executions = executions
        self._presenter = presenter
        self._retention_seconds = retention_seconds
        self._now = now

    @classmethod
    def from_env(cls) -> "PipelineApi":
        """Build from the environment of manage_pipelines."""
        return cls(
            PipelinesTable.from_env(),
            PredictionsTable.from_env(),
            RecentRequests.from_env(),
            ModelLookup.from_env(StoredSchemas.from_env(), Replicate.from_env()),
            PipelineExecutions.from_env(),
            Presenter.from_env(),
            int(os.environ["RETENTION_DAYS"]) * 86400,
            usage=OwnersUsage.from_env(),
        )

    def create_pipeline(
        self,
        owner: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        attempt: Attempt | None = None,
        limits: OwnerLimits | None = None,
    ) -> dict[str, Any]:
        """Validate, store and start a pipeline; the same key gives the same one.

        After it is written, an error of AWS is not reported to the caller: the sweep starts the pipeline.

        Args:
            owner: The owner of the pipeline.
            body: The raw body.
            headers: The request's headers, their names in lower case.
            attempt: The number of the client's attempt, if it counts them; a retry without a key finds the pipeline of
                the last two minutes.
            limits: The owner's limits; None: no limits.

        Returns:
            The pipeline.

        Raises:
            Problem: 400, 413, 415; 422, with every violation in `invalid_fields`, or if the key belongs to another
                pipeline; 429 if one of the owner's limits is reached; 503 if a model cannot be looked up now. Nothing
                was started.
        """
        value = parse_json(body, headers.get("content-type"))
        key = idempotency_key(headers)
        print_ = fingerprint(value)
        there = self._of_key(owner, key, print_) if key else self._sent_before(owner, print_, attempt)
        if there is not None:
            return self._show_again(there, value, print_)
        definition = create_definition(value, self._lookup.violations)
        # The response needs it: a pipeline without a response is not started.
        api_url()
        now = self._now()
        expires = int(now) + self._retention_seconds
        pipeline_id = random_id()
        if key:
            pipeline_id, known = self._keys.take_key(owner, key, pipeline_id, print_, expires)
            if known != print_:
                raise _of_another()
        elif attempt:
            pipeline_id = self._recent.note(pipeline_id, owner, f"pipeline#{print_}", attempt)
        self._acquire_slot(owner, pipeline_id, limits)
        try:
            pipeline = self._table.put_pipeline(
                pipeline_id,
                definition,
                owner=owner,
                fingerprint=print_,
                deadline=int(now) + LIFETIME_SECONDS,
                expires=expires,
                depth=0,
                now=now,
            )
        except PipelineExists as error:
            return self._show_again(error.pipeline, value, print_)
        logger.info("pipeline stored", pipeline_id=pipeline_id, steps=len(definition.steps))
        self._run_or_leave(pipeline)
        # No step can have started: the response is built without another read.
        return self.show_pipeline(StoredPipeline(pipeline, definition, {}), {})

    def _of_key(self, owner: str, key: str, print_: str) -> Pipeline | None:
        """Return the pipeline of an idempotency key, or None.

        Raises:
            Problem: 422 if the key was used for another request.
        """
        holder = self._keys.key_holder(owner, key)
        if holder is None:
            # From a release that derived a pipeline's id from its key.
            old = self._table.get_pipeline(derived_id(f"pipelines#{owner}", key))
            return old if old and old.expires_at > self._now() else None
        if holder.fingerprint != print_:
            raise _of_another()
        there = self._table.get_pipeline(holder.id)
        if there is None:
            # Its first request failed midway: the pipeline is stored only now, and its key must last as long.
            expires = int(self._now()) + self._retention_seconds
            self._keys.extend_key(owner, key, holder.id, expires)
        return there

    def _sent_before(self, owner: str, print_: str, attempt: Attempt | None) -> Pipeline | None:
        """Return the pipeline of an earlier attempt of the same request, or None."""
        if attempt is None or not attempt.number:
            return None
        noted = self._recent.find(owner, f"pipeline#{print_}", attempt)
        return self._table.get_pipeline(noted) if noted else None

    def _acquire_slot(self, owner: str, pipeline_id: str, limits: OwnerLimits | None) -> None:
        """Check the owner's daily limit, and acquire a slot among the open pipelines.

        Raises:
            Problem: 429.
        """
        if self._usage is None or not limits:
            return
        try:
            self._usage.check_day(owner, limits)
            self._usage.acquire_open_slot("pipeline", owner, pipeline_id, limits)
        except LimitReached as reached:
            raise refusal_of(reached) from None

    def _run_or_leave(self, pipeline: Pipeline) -> None:
        """Start a stored pipeline; on an error the sweep does, within two minutes."""
        try:
            self._executions.run(pipeline)
        except (ClientError, BotoCoreError):
            # Accepted nevertheless: a caller that gets an error would create another one.
            logger.exception("accepted, but not started yet", pipeline_id=pipeline.id)

    def _show_again(self, pipeline: Pipeline, value: Any, print_: str) -> dict[str, Any]:
        """Return the response to a repeated request, even if reading the pipeline fails.

        Raises:
            Problem: 422 if it was another request.
        """
        if pipeline.fingerprint != print_:
            raise _of_another()
        if not pipeline.ended:
            # If the function crashed right after storing it, it has no execution.
            self._run_or_leave(pipeline)
        try:
            return self.show_pipeline(self.own_pipeline(pipeline.id, pipeline.owner))
        except Exception:  # noqa: BLE001  # on any error, the caller must not conclude that nothing was started
            logger.exception("started, but not shown", pipeline_id=pipeline.id)
            metrics.add_metric(name="AnswersWithoutOutput", unit=MetricUnit.Count, value=1)
        definition = create_definition(value, lambda *_: [])  # validated when it was stored
        return self.show_pipeline(StoredPipeline(pipeline, definition, {}), {})

    def cancel_pipeline(self, pipeline_id: str, owner: str) -> dict[str, Any]:
        """Cancel a pipeline: no further step starts, running ones are canceled.

        Raises:
            Problem: 404.
        """
        pipeline = self.own_pipeline(pipeline_id, owner).pipeline
        if self._table.request_pipeline_cancel(pipeline, self._now()):
            logger.info("pipeline canceled", pipeline_id=pipeline_id)
        # Also if it is flagged already: the function that did so may have crashed before this.
        wake_pipeline(pipeline_id)
        return self.show_pipeline(self.own_pipeline(pipeline_id, owner))

    def own_pipeline(self, pipeline_id: str, owner: str) -> StoredPipeline:
        """Return one of an owner's pipelines.

        Raises:
            Problem: 404 if it does not exist or belongs to another owner; the response is the same.
        """
        stored = self._table.read_pipeline(pipeline_id) if is_id(pipeline_id) else None
        if stored is None or stored.pipeline.owner != owner:
            raise Problem(404, f"Pipeline {pipeline_id[:64]!r} not found.")
        return stored

    def list_pipelines(
        self, owner: str, start: str | None, *, older: bool, size: int
    ) -> tuple[list[dict[str, Any]], str | None, str | None]:
        """Return a page of an owner's pipelines, without their steps.

        Returns:
            The pipelines from the start of the page on, away from it; the position of the first one; the position of
            the last one, if more follow.
        """
        page, more = self._table.list_pipelines(owner, start, older=older, size=size)
        places = [pipeline.listed_at for pipeline in page]
        return [_shown(pipeline) for pipeline in page], *(
            (places[0], places[-1] if more else None) if places else (None, None)
        )

    def show_pipeline(
        self, stored: StoredPipeline, predictions: Mapping[str, Prediction] | None = None
    ) -> dict[str, Any]:
        """Return a pipeline with its steps.

        Outputs that would make the response too large for Lambda are left out, the later steps' first, and
        `outputs_left_out` names their steps: each prediction has its own output. Outputs whose recorded length, logs
        included, exceeds the remaining room are not even read.

        Args:
            stored: The pipeline.
            predictions: Its existing predictions, by id; None: they are read.
        """
        ids = run_ids(stored)
        there = predictions
        if there is None:
            there = self._predictions.get_many(each for found in ids.values() for each in found)
        states = states_of(stored, there)
        room = ANSWER_LIMIT_BYTES - answer_bytes(stored.definition.input)
        outputs: dict[str, Any] = {}
        left_out = []
        for step in stored.definition.steps:
            state = states[step.name]
            if state.status != "succeeded":
                continue
            # The output of a step on which no other depends is shown twice.
            times = 2 if step in stored.definition.last else 1
            shown = self._output(state, ids[step.name], room // times)
            if shown is None:
                left_out.append(step.name)
                continue
            outputs[step.name], size = shown
            room -= size * times
        last = {step.name: outputs.get(step.name) for step in stored.definition.last}
        return {
            **_shown(stored.pipeline),
            "input": stored.definition.input,
            "steps": [
                {
                    "name": step.name,
                    "status": states[step.name].status,
                    "needs": list(step.needs),
                    "predictions": [each for each in ids[step.name] if each in there],
                    "output": outputs.get(step.name),
                    "error": states[step.name].error,
                    "seconds": states[step.name].seconds,
                    "cost": cost.shown if (cost := states[step.name].cost) else None,
                }
                for step in stored.definition.steps
            ],
            "cost": total(each.cost for each in there.values() if each.cost).shown if stored.pipeline.ended else None,
            "output": last if stored.pipeline.ended else None,
            "outputs_left_out": left_out,
        }

    def _output(self, state: StepState, ids: list[str], room: int) -> tuple[Any, int] | None:
        """Return a step's output and its size in a response, or None if too large."""
        results = self._predictions.unread_results(ids)
        if sum(result.length for result in results) > room:
            return None
        outputs = []
        for result in results:
            text = self._predictions.result_text(result)
            said = json.loads(text) if text else {"output": None, "logs": None}
            whole = PredictionDetail(result.prediction, {}, said["output"], said["logs"], result.files)
            outputs.append(self._presenter.show(whole).get("output"))
        output = outputs[0] if state.step.for_each is None else outputs
        size = answer_bytes(output)
        return (output, size) if size <= room else None


def _of_another() -> Problem:
    detail = "This key belongs to another pipeline. Use a new key for a new pipeline."
    return Problem(422, detail, invalid_fields=[{"field": "Idempotency-Key", "detail": detail}])


def _shown(pipeline: Pipeline) -> dict[str, Any]:
    url = f"{api_url()}/pipelines/{pipeline.id}"
    return {
        "id": pipeline.id,
        "status": pipeline.status,
        "error": pipeline.error,
        "created_at": pipeline.created_at,
        "completed_at": pipeline.completed_at,
        "cancel_requested_at": rfc3339(pipeline.cancel_requested) if pipeline.cancel_requested else None,
        "deadline": rfc3339(pipeline.deadline),
        "urls": {"get": url, "cancel": f"{url}/cancel"},
    }
