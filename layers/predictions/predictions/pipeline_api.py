"""The routes below `/pipelines`: what they write, and pipelines as callers see them."""

import json
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from predictions.api import ANSWER_LIMIT_BYTES, Presenter, answer_bytes
from predictions.aws import api_url
from predictions.errors import Problem
from predictions.intents import derived_id, idempotency_key, parse_json, random_id
from predictions.observability import logger
from predictions.pipeline_definition import create_definition, fingerprint
from predictions.pipeline_progress import PipelineExecutions
from predictions.pipeline_runs import StepState, run_ids, states_of
from predictions.pipelines import wake_pipeline
from predictions.pipelines_table import Pipeline, PipelineExists, PipelinesTable, StoredPipeline
from predictions.submissions import Submissions
from predictions.table import PredictionsTable, Whole, is_id

LIFETIME_SECONDS = 7 * 86400
"""How long a pipeline may take: less than the shortest retention, 15 days, so that its first outputs are there to its
end."""


class PipelineApi:
    """What the routes below `/pipelines` do.

    Args:
        table: The pipelines.
        predictions: The predictions of their steps.
        submissions: Knows the schemas of models' inputs.
        executions: Runs pipelines.
        presenter: Shows outputs.
        retention_seconds: How long the table keeps a pipeline.
        now: The time, in seconds since 1970.
    """

    def __init__(
        self,
        table: PipelinesTable,
        predictions: PredictionsTable,
        submissions: Submissions,
        executions: PipelineExecutions,
        presenter: Presenter,
        retention_seconds: int,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._predictions = predictions
        self._submissions = submissions
        self._executions = executions
        self._presenter = presenter
        self._retention_seconds = retention_seconds
        self._now = now

    @classmethod
    def from_env(cls) -> "PipelineApi":
        """From the environment of manage_pipelines."""
        return cls(
            PipelinesTable.from_env(),
            PredictionsTable.from_env(),
            Submissions.from_env(),
            PipelineExecutions.from_env(),
            Presenter.from_env(),
            int(os.environ["RETENTION_DAYS"]) * 86400,
        )

    def create_pipeline(self, owner: str, body: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
        """Checks a pipeline, writes it down, and starts its execution; the same key, the same pipeline.

        Returns:
            The pipeline.

        Raises:
            Problem: 400, 413, 415; 422, with everything that is wrong in `invalid_fields`, or where the key belongs to
                another pipeline; 503, where a model cannot be asked for now. Nothing was started.
        """
        value = parse_json(body, headers.get("content-type"))
        key = idempotency_key(headers)
        pipeline_id = derived_id(f"pipelines#{owner}", key) if key else random_id()
        print_ = fingerprint(value)
        there = self._table.get_pipeline(pipeline_id) if key else None
        if there is None:
            definition = create_definition(value, self._submissions.violations)
            now = self._now()
            try:
                there = self._table.put_pipeline(
                    pipeline_id,
                    definition,
                    owner=owner,
                    fingerprint=print_,
                    deadline=int(now) + LIFETIME_SECONDS,
                    expires=int(now) + self._retention_seconds,
                    depth=0,
                    now=now,
                )
                logger.info("pipeline written down", pipeline_id=pipeline_id, steps=len(definition.steps))
            except PipelineExists as error:
                there = error.pipeline
        if there.fingerprint != print_:
            detail = "This key belongs to another pipeline: use a new key for a new one, and the old one to repeat it."
            raise Problem(422, detail, invalid_fields=[{"field": "Idempotency-Key", "detail": detail}])
        if not there.ended:
            # Whoever wrote it down may have died right after.
            self._executions.run(there)
        return self.show_pipeline(self.own_pipeline(pipeline_id, owner))

    def cancel_pipeline(self, pipeline_id: str, owner: str) -> dict[str, Any]:
        """Cancels a pipeline: from now on nothing of it starts, and its execution cancels what runs.

        Raises:
            Problem: 404.
        """
        pipeline = self.own_pipeline(pipeline_id, owner).pipeline
        if self._table.request_pipeline_cancel(pipeline, self._now()):
            logger.info("pipeline canceled", pipeline_id=pipeline_id)
        # Also where it is flagged already: whoever did so may have died before this.
        wake_pipeline(pipeline_id)
        return self.show_pipeline(self.own_pipeline(pipeline_id, owner))

    def own_pipeline(self, pipeline_id: str, owner: str) -> StoredPipeline:
        """One of an owner's pipelines.

        Raises:
            Problem: 404, where there is none, or it is another owner's: nobody learns which.
        """
        stored = self._table.read_pipeline(pipeline_id) if is_id(pipeline_id) else None
        if stored is None or stored.pipeline.owner != owner:
            raise Problem(404, f"There is no pipeline {pipeline_id[:64]!r}.")
        return stored

    def list_pipelines(
        self, owner: str, start: str | None, *, older: bool, size: int
    ) -> tuple[list[dict[str, Any]], str | None, str | None]:
        """A page of an owner's pipelines, without their steps.

        Returns:
            The pipelines from the start of the page on, away from it; the place of the first one; the place of the
            last one, where there are further ones.
        """
        page, more = self._table.list_pipelines(owner, start, older=older, size=size)
        places = [pipeline.listed_at for pipeline in page]
        return [_shown(pipeline) for pipeline in page], *(
            (places[0], places[-1] if more else None) if places else (None, None)
        )

    def show_pipeline(self, stored: StoredPipeline) -> dict[str, Any]:
        """A pipeline with its steps.

        Outputs that would make the answer too large for Lambda are left out, the later steps' first, and
        `outputs_left_out` names their steps: each prediction has its own. Those whose noted length, logs included, is
        more than there is room for are not even read.
        """
        ids = run_ids(stored)
        there = self._predictions.get_many(each for found in ids.values() for each in found)
        states = states_of(stored, there)
        room = ANSWER_LIMIT_BYTES - answer_bytes(stored.definition.input)
        outputs: dict[str, Any] = {}
        left_out = []
        for step in stored.definition.steps:
            state = states[step.name]
            if state.status != "succeeded":
                continue
            # The output of a step that no other one needs is shown twice.
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
                }
                for step in stored.definition.steps
            ],
            "output": last if stored.pipeline.ended else None,
            "outputs_left_out": left_out,
        }

    def _output(self, state: StepState, ids: list[str], room: int) -> tuple[Any, int] | None:
        """The output of a step and its size in an answer; None where that is more than there is room for."""
        results = self._predictions.unread_results(ids)
        if sum(result.length for result in results) > room:
            return None
        outputs = []
        for result in results:
            text = self._predictions.result_text(result)
            said = json.loads(text) if text else {"output": None, "logs": None}
            whole = Whole(result.prediction, {}, said["output"], said["logs"], result.files)
            outputs.append(self._presenter.show(whole)["output"])
        output = outputs[0] if state.step.for_each is None else outputs
        size = answer_bytes(output)
        return (output, size) if size <= room else None


def _shown(pipeline: Pipeline) -> dict[str, Any]:
    url = f"{api_url()}/pipelines/{pipeline.id}"
    return {
        "id": pipeline.id,
        "status": pipeline.status,
        "error": pipeline.error,
        "created_at": pipeline.created_at,
        "completed_at": pipeline.completed_at,
        "cancel_requested_at": _rfc3339(pipeline.cancel_requested) if pipeline.cancel_requested else None,
        "deadline": _rfc3339(pipeline.deadline),
        "urls": {"get": url, "cancel": f"{url}/cancel"},
    }


def _rfc3339(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")
