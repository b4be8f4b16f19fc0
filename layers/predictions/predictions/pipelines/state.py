"""Progress of a pipeline: the state of each step, derived from its predictions.

No function in this module reads or writes anything: the same facts always give the same states.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from predictions.ids import derived_id
from predictions.money.cost import Cost, total
from predictions.pipelines.definition import Step
from predictions.pipelines.store import Notes, StoredPipeline
from predictions.status import Status
from predictions.store.records import Prediction

StepStatus = Literal["waiting", "starting", "processing", "succeeded", "failed", "canceled", "skipped"]

_OVER = ("succeeded", "failed", "canceled", "skipped")
_REASONS_SHOWN = 3


@dataclass(frozen=True)
class StepState:
    """The progress of a step.

    Attributes:
        step: The step.
        status: `waiting` for others, `starting`, `processing`, or its terminal status; `skipped` for a step with a
            dependency that did not succeed.
        predictions: Its existing predictions, by index.
        missing: The indexes to be started.
        uncounted: Whether its number of elements is still to be determined.
        error: Why it did not succeed.
    """

    step: Step
    status: StepStatus
    predictions: Mapping[int, Prediction]
    missing: tuple[int, ...] = ()
    uncounted: bool = False
    error: str | None = None

    @property
    def over(self) -> bool:
        """Return whether the step has completed."""
        return self.status in _OVER

    @property
    def seconds(self) -> int | None:
        """Return the seconds from its first request to its last completion, or None."""
        ends = [prediction.ended for prediction in self.predictions.values() if prediction.ended]
        if not self.over or not ends:
            return None
        return max(ends) - min(prediction.created for prediction in self.predictions.values())

    @property
    def cost(self) -> Cost | None:
        """Return what its predictions cost together, or None while it is not over."""
        return (
            total(prediction.cost for prediction in self.predictions.values() if prediction.cost) if self.over else None
        )


def run_id(owner: str, pipeline_id: str, step: str, index: int) -> str:
    """Return the prediction's id of a run, as `create_requested_intent` derives it."""
    return derived_id(f"pipeline#{owner}", run_key(pipeline_id, step, index))


def run_key(pipeline_id: str, step: str, index: int) -> str:
    """Return the key that identifies repetitions of a run's request."""
    return f"{pipeline_id}/{step}/{index}"


def run_ids(stored: StoredPipeline) -> dict[str, list[str]]:
    """Return the ids of the predictions that each step can have by now."""
    pipeline, found = stored.pipeline, {}
    for step in stored.definition.steps:
        count = _count(step, stored.notes.get(step.name, Notes())) or 0
        found[step.name] = [run_id(pipeline.owner, pipeline.id, step.name, index) for index in range(count)]
    return found


def states_of(stored: StoredPipeline, predictions: Mapping[str, Prediction]) -> dict[str, StepState]:
    """Return every step's state by its name, each after its dependencies.

    Args:
        stored: The pipeline.
        predictions: Its existing predictions, by id.
    """
    ids = run_ids(stored)
    states: dict[str, StepState] = {}
    for step in stored.definition.in_order:
        there = {index: predictions[each] for index, each in enumerate(ids[step.name]) if each in predictions}
        notes = stored.notes.get(step.name, Notes())
        states[step.name] = _state(step, notes, there, states, canceled=stored.pipeline.cancel_requested is not None)
    return states


def _count(step: Step, notes: Notes) -> int | None:
    """Return the number of runs of a step, or None if it is not known yet."""
    return 1 if step.for_each is None else notes.count


def _state(
    step: Step, notes: Notes, there: Mapping[int, Prediction], states: Mapping[str, StepState], *, canceled: bool
) -> StepState:
    needed = [states[name] for name in step.needs]
    lost = [state for state in needed if state.over and state.status != "succeeded"]
    if -1 in notes.errors:
        return StepState(step, "failed", there, error=notes.errors[-1])
    if canceled and not there and not notes.errors and not (step.for_each is not None and notes.count == 0):
        return StepState(step, "canceled", there)
    if lost:
        why = ", ".join(f"`{state.step.name}`, which {_ended_how(state.status)}" for state in lost)
        return StepState(step, "skipped", there, error=f"Needs {why}.")
    if not all(state.over for state in needed):
        return StepState(step, "waiting", there)
    count = _count(step, notes)
    if count is None:
        return StepState(step, "starting", there, uncounted=True)
    absent = tuple(index for index in range(count) if index not in there and index not in notes.errors)
    missing = () if canceled else absent
    if missing or not all(prediction.ended_visibly for prediction in there.values()):
        begun = any(prediction.visible != Status.STARTING for prediction in there.values())
        return StepState(step, "processing" if begun else "starting", there, missing)
    reasons = {index: notes.errors[index] for index in notes.errors}
    reasons |= {i: p.error or f"Prediction {p.visible}." for i, p in there.items() if p.visible != Status.SUCCEEDED}
    if not reasons and not absent:
        return StepState(step, "succeeded", there)
    failed = notes.errors or any(prediction.visible == Status.FAILED for prediction in there.values())
    return StepState(step, "failed" if failed else "canceled", there, error=_listed(step, reasons, count))


def _ended_how(status: str) -> str:
    return {"failed": "failed", "canceled": "was canceled", "skipped": "was skipped"}[status]


def _listed(step: Step, reasons: Mapping[int, str], count: int) -> str | None:
    if step.for_each is None:
        return next(iter(reasons.values()), None)
    shown = [f"{index}: {reasons[index]}" for index in sorted(reasons)[:_REASONS_SHOWN]]
    return f"{len(reasons)} of {count} did not succeed. {' '.join(shown)}" if reasons else None
