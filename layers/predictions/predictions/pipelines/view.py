"""Pipelines as callers see them."""

import json
from collections.abc import Mapping
from typing import Any

from predictions.aws.clients import api_url
from predictions.clock import rfc3339
from predictions.money.cost import total
from predictions.pipelines.state import StepState, run_ids, states_of
from predictions.pipelines.store import Pipeline, StoredPipeline
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction, PredictionDetail
from predictions.views.prediction import ANSWER_LIMIT_BYTES, Presenter, answer_bytes


class PipelineView:
    """Shows pipelines with their steps.

    Args:
        predictions: The predictions of their steps.
        presenter: Builds the representation of outputs.
    """

    def __init__(self, predictions: PredictionsTable, presenter: Presenter) -> None:
        self._predictions = predictions
        self._presenter = presenter

    def show(self, stored: StoredPipeline, predictions: Mapping[str, Prediction] | None = None) -> dict[str, Any]:
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
            **show_listed(stored.pipeline),
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


def show_listed(pipeline: Pipeline) -> dict[str, Any]:
    """Return a pipeline as a list shows it: without its steps."""
    url = f"{api_url()}/pipelines/{pipeline.id}"
    return {
        "id": pipeline.id,
        "status": pipeline.status,
        "error": pipeline.error,
        "created_at": pipeline.created_at,
        "completed_at": pipeline.completed_at,
        "cancel_requested_at": rfc3339(pipeline.cancel_requested) if pipeline.cancel_requested else None,
        "deadline": rfc3339(pipeline.deadline),
        **({"labels": dict(pipeline.labels)} if pipeline.labels else {}),
        **({"webhook": pipeline.webhook} if pipeline.webhook else {}),
        "urls": {"get": url, "cancel": f"{url}/cancel"},
    }
