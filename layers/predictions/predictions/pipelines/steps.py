"""Pipelines in the requests queue and the table's stream: steps become intents, completions wake the execution.

A message of the queue names the due run of a step, and nothing else. Its request was stored with the pipeline; the
outputs to which its input refers are read when it arrives, with their files as links of this stack that work until the
pipeline's deadline. So the message may be repeated, late or early: the same message gives the same intent, or none.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from predictions.aws.dynamodb import Condition, ConditionFailed, Table, deserialize
from predictions.aws.executions import wake
from predictions.errors import PredictionsError, Problem
from predictions.files.links import Links
from predictions.files.outputs_bucket import OutputsBucket
from predictions.intents.model import Intent, create_requested_intent
from predictions.intents.sources import Message, RequestRefused
from predictions.observability import logger
from predictions.pipelines.definition import Step, elements
from predictions.pipelines.state import run_ids, run_key, states_of
from predictions.pipelines.store import PipelinesTable, StoredPipeline
from predictions.store.keys import owner_of, pipeline_key
from predictions.store.predictions import PredictionsTable
from predictions.store.records import UnreadResult, labels_and_trace
from predictions.templating import Allowance, PlaceholderError, fill
from predictions.validation import BODY_LIMIT_BYTES

GATHERED_LIMIT_BYTES = 16 * 1024 * 1024
"""The limit in bytes of the outputs, with logs, that a step refers to; summed before any of them is read."""

GATHERED_LIMIT_VALUES = 1_000_000
"""The limit of values in these outputs. A parsed value takes up to 70 bytes: with the limit above, about 200 MB
in all, of the 1,024 MB of start_from_queue and the 512 MB of advance_pipeline."""

# advance_pipeline has 120 seconds, and only its own pipeline waits for it.
_COUNT_SECONDS = 20.0

_ID = re.compile(r"[a-z0-9]{26}", re.ASCII)


class CannotRun(PredictionsError):
    """A run of a step can never start; the error's text is the reason, for the pipeline's author."""


def prediction_ended(prediction_id: str, origin: Mapping[str, str | int], status: str) -> None:
    """Notify the pipeline of a completed prediction. Idempotent.

    Args:
        prediction_id: Our id.
        origin: Its origin, with the pipeline's id as `pipeline`.
        status: Its terminal status.
    """
    logger.info(
        "step's prediction completed", prediction_id=prediction_id, pipeline_id=origin["pipeline"], status=status
    )
    wake_pipeline(str(origin["pipeline"]))


def wake_pipeline(pipeline_id: str) -> None:
    """Wake the execution of a running pipeline.

    The number is raised first: an execution that has read it already, and is about to wait, sees that and reads again.
    """
    running = Condition("status = :running", running="running")
    try:
        pipeline = Table.from_env().update_item(pipeline_key(pipeline_id), add={"events": 1}, condition=running)
    except ConditionFailed:
        return  # completed or expired
    wake(pipeline.get("task_token"))


def event_of(record: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return the event of a stream record if a pipeline has completed, or None.

    Args:
        record: Of an item whose `pk` begins with `pipeline#`.

    Returns:
        `("Pipeline Completed", detail)`, or None.
    """
    images = record["dynamodb"]
    new, old = (deserialize(images.get(name, {})) for name in ("NewImage", "OldImage"))
    if new.get("sk") != "status" or new["status"] == "running" or old.get("status") == new["status"]:
        return None
    detail = {
        "version": "1",
        # An event may arrive twice: receivers deduplicate by this id.
        "event_id": f"{new['id']}-completed",
        "id": new["id"],
        "owner": owner_of(new["owner"]),
        "status": new["status"],
        "error": new.get("error"),
        "depth": new["depth"],
        "created_at": new["created_at"],
        "completed_at": new["completed_at"],
        "steps": {name: int(count) for name, count in new["counts"].items()},
        **labels_and_trace(new.get("labels") or {}, new.get("traceparent")),
    }
    return "Pipeline Completed", detail


class Pipelines:
    """Turns due steps into intents.

    Args:
        predictions: The predictions of their steps.
        outputs: Knows the strings in an output that are files.
        links: Builds URLs of those files.
    """

    def __init__(
        self, pipelines: PipelinesTable, predictions: PredictionsTable, outputs: OutputsBucket, links: Links
    ) -> None:
        self.table = pipelines
        self.predictions = predictions
        self._outputs = outputs
        self._links = links

    @classmethod
    def from_env(cls) -> "Pipelines":
        """Build from the environment of the tables, the bucket and the links."""
        return cls(PipelinesTable.from_env(), PredictionsTable.from_env(), OutputsBucket.from_env(), Links.from_env())

    def intent(self, body: Mapping[str, Any], message: Message) -> Intent | None:  # noqa: ARG002  # of every source
        """Return the intent of one run of a step; see `intents.sources.Source`.

        A run whose input cannot be filled is recorded as failed, which wakes the pipeline.

        Raises:
            RequestRefused: The pipeline, step or run does not exist.
            TooSlow: The machine stalled while its input was filled.
        """
        pipeline_id, name, index = _named(body)
        stored = self.table.read_pipeline(pipeline_id)
        if stored is None:
            raise RequestRefused(f"pipeline_id: pipeline {pipeline_id} not found, or expired.")
        step = stored.definition.step(name)
        if step is None:
            raise RequestRefused(f"step: step {name[:32]!r} not found in pipeline {pipeline_id}.")
        pipeline = stored.pipeline
        if pipeline.ended or pipeline.cancel_requested:
            return None
        ids = run_ids(stored)
        # A step's state depends on those of all its dependencies.
        before = [each for other in stored.definition.before(step) for each in ids[other.name]]
        states = states_of(stored, self.predictions.get_many(before))
        if not all(states[needed].status == "succeeded" for needed in step.needs):
            return None  # too early: the pipeline sends another message in time
        if index >= len(ids[name]):
            raise RequestRefused(f"index: step {name!r} of pipeline {pipeline_id} has no run {index}.")
        try:
            return self._intent(stored, step, index)
        except CannotRun as error:
            logger.info("input of a step not filled", pipeline_id=pipeline_id, step=name, index=index)
            self.table.note_error(pipeline, name, index, str(error))
            wake_pipeline(pipeline_id)
            return None

    def give_up(self, body: Mapping[str, Any], reason: str) -> None:
        """Record that a run's message was given up, so that its pipeline fails.

        Otherwise the pipeline would send the same message again every hour. The definition is not read, since it may be
        the reason why the function was killed. A message that names no run of a running pipeline is ignored.
        """
        try:
            pipeline_id, name, index = _named(body)
        except RequestRefused:
            return
        pipeline = self.table.get_pipeline(pipeline_id)
        if pipeline is not None and not pipeline.ended:
            self.table.note_error(pipeline, name[:32], index, reason)
            wake_pipeline(pipeline_id)

    def elements(self, stored: StoredPipeline, step: Step) -> list[Any]:
        """Return the elements of a `for_each`, once its dependencies have succeeded.

        Raises:
            CannotRun: The value is not a list, or too long; or the outputs that it reads are too large.
        """
        context = self._context(stored, step)
        try:
            filled = fill({"for_each": step.for_each}, context, Allowance(seconds=_COUNT_SECONDS))
            return elements(filled["for_each"])
        except PlaceholderError as error:
            raise CannotRun(f"Step `{step.name}`: {error.field}: {error.detail}") from None

    def _intent(self, stored: StoredPipeline, step: Step, index: int) -> Intent:
        """Return one run's intent: the same at each call.

        Raises:
            CannotRun: Its input cannot be filled.
        """
        pipeline, context = stored.pipeline, self._context(stored, step)
        allowance = Allowance()  # one for the whole message
        try:
            if step.for_each is not None:
                found = elements(fill({"for_each": step.for_each}, context, allowance)["for_each"])
                if index >= len(found):
                    raise PlaceholderError("for_each", f"Gives {len(found)} elements now, but gave more before.")
                context |= {"item": found[index], "index": index}
            filled = fill({"input": dict(step.input)}, context, allowance)
        except PlaceholderError as error:
            raise CannotRun(f"Step `{step.name}`: {error.field}: {error.detail}") from None
        if len(json.dumps(filled)) > BODY_LIMIT_BYTES:
            raise CannotRun(f"Step `{step.name}`: input: Exceeds the limit of {BODY_LIMIT_BYTES} bytes when filled.")
        try:
            return create_requested_intent(
                {**step.request, **filled, "labels": pipeline.labels},
                owner=pipeline.owner,
                source="pipeline",
                source_key=run_key(pipeline.id, step.name, index),
                allow_loopback_webhooks=False,
                origin={"pipeline": pipeline.id, "step": step.name, "index": index},
                depth=pipeline.depth,
                traceparent=pipeline.traceparent,
            )
        except Problem as problem:
            raise CannotRun(f"Step `{step.name}`: {problem.detail}") from None

    def _context(self, stored: StoredPipeline, step: Step) -> dict[str, Any]:
        """Return the values for a step's templates, reading outputs within the limits.

        Raises:
            CannotRun: The outputs are too large.
        """
        ids = run_ids(stored)
        found = {name: self.predictions.unread_results(ids[name]) for name in step.needs}
        size = sum(result.length for results in found.values() for result in results)
        if size > GATHERED_LIMIT_BYTES:
            raise _too_large(step, f"exceed the limit of {GATHERED_LIMIT_BYTES} bytes with their logs (got {size})")
        steps: dict[str, Any] = {}
        values = 0
        for name, results in found.items():
            outputs = []
            for result in results:
                text = self.predictions.result_text(result)
                values += _values_in(text)
                if values > GATHERED_LIMIT_VALUES:
                    raise _too_large(step, f"exceed the limit of {GATHERED_LIMIT_VALUES} values")
                output = json.loads(text)["output"] if text else None
                outputs.append(self._output(output, result, stored.pipeline.deadline))
            needed = stored.definition.step(name)
            steps[name] = {"output": outputs[0] if needed and needed.for_each is None else outputs}
        return {"input": stored.definition.input, "steps": steps}

    def _output(self, output: Any, result: UnreadResult, expires: int) -> Any:
        """Return an output with its files as links; null for one that was not stored."""
        links = {f.path: self._links.url("outputs", f.key, expires=expires) for f in result.files if f.key}
        return self._outputs.place_files(output, links)


def _too_large(step: Step, what: str) -> CannotRun:
    names = ", ".join(f"`{name}`" for name in step.needs)
    return CannotRun(
        f"Step `{step.name}`: The outputs of {names} {what}. Refer to fewer steps, or to steps that return files."
    )


def _values_in(text: str | None) -> int:
    """Return an upper bound of the values in a JSON text, without parsing it."""
    return 1 + sum(map(text.count, ",:[{")) if text else 1


def _named(body: Mapping[str, Any]) -> tuple[str, str, int]:
    """Return the run that a message names.

    Raises:
        RequestRefused: The message names no run.
    """
    pipeline_id, name, index = body.get("pipeline_id"), body.get("step"), body.get("index")
    if unknown := body.keys() - {"pipeline_id", "step", "index"}:
        raise RequestRefused(f"{min(unknown)[:100]}: unknown field in a message of a pipeline.")
    if not isinstance(pipeline_id, str) or not _ID.fullmatch(pipeline_id):
        raise RequestRefused("pipeline_id: must be 26 characters [a-z0-9].")
    if not isinstance(name, str):
        raise RequestRefused("step: must be a string.")
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise RequestRefused("index: must be a whole number, at least 0.")
    return pipeline_id, name, index
