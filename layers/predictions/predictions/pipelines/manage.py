"""Use cases of the routes below `/pipelines`."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.admission.quotas import LimitReached, OwnerLimits, OwnersUsage, refusal_of
from predictions.aws.clients import api_url
from predictions.errors import Problem
from predictions.ids import derived_id, is_id, random_id
from predictions.intents.model import Attempt, idempotency_key
from predictions.lifecycle.model_lookup import ModelLookup
from predictions.observability import MetricUnit, logger, metrics
from predictions.pipelines.advance import PipelineExecutions
from predictions.pipelines.definition import create_definition, fingerprint, read_context
from predictions.pipelines.steps import wake_pipeline
from predictions.pipelines.store import Pipeline, PipelineExists, PipelinesTable, StoredPipeline
from predictions.pipelines.view import PipelineView, show_listed
from predictions.store.predictions import PredictionsTable
from predictions.store.recent_requests import RecentRequests
from predictions.store.schemas import StoredSchemas
from predictions.upstream.client import Replicate
from predictions.validation import parse_json
from predictions.views.prediction import Presenter

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
        allow_loopback_webhooks: Whether a webhook may go to this machine (the local cloud's setting).
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
        allow_loopback_webhooks: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._keys = table.idempotency_keys(now)
        self._usage = usage
        self._allow_loopback_webhooks = allow_loopback_webhooks
        self._table = table
        self._recent = recent
        self._lookup = lookup
        self._executions = executions
        self.view = PipelineView(predictions, presenter)
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
            allow_loopback_webhooks=os.environ["ALLOW_LOOPBACK_WEBHOOKS"] == "true",
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
        context, invalid = read_context(value, headers, allow_loopback=self._allow_loopback_webhooks)
        definition = create_definition(value, self._lookup.violations, invalid)
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
                context=context,
            )
        except PipelineExists as error:
            return self._show_again(error.pipeline, value, print_)
        logger.info("pipeline stored", pipeline_id=pipeline_id, steps=len(definition.steps))
        self._run_or_leave(pipeline)
        # No step can have started: the response is built without another read.
        return self.view.show(StoredPipeline(pipeline, definition, {}), {})

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
            return self.view.show(self.own_pipeline(pipeline.id, pipeline.owner))
        except Exception:  # noqa: BLE001  # on any error, the caller must not conclude that nothing was started
            logger.exception("started, but not shown", pipeline_id=pipeline.id)
            metrics.add_metric(name="AnswersWithoutOutput", unit=MetricUnit.Count, value=1)
        definition = create_definition(value, lambda *_: [])  # validated when it was stored
        return self.view.show(StoredPipeline(pipeline, definition, {}), {})

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
        return self.view.show(self.own_pipeline(pipeline_id, owner))

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
        return [show_listed(pipeline) for pipeline in page], *(
            (places[0], places[-1] if more else None) if places else (None, None)
        )


def _of_another() -> Problem:
    detail = "This key belongs to another pipeline. Use a new key for a new pipeline."
    return Problem(422, detail, invalid_fields=[{"field": "Idempotency-Key", "detail": detail}])
