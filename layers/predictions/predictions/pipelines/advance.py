"""Advance a pipeline: send due steps, cancel predictions if requested, and complete it when no step is left.

Each turn reads the whole state and acts on it. A turn may be repeated, late, or crash after any line: the next turn
finds the same state, or more, and messages that are sent twice start nothing twice.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from predictions.aws.clients import client
from predictions.aws.executions import Executions
from predictions.clock import backoff_seconds
from predictions.lifecycle.cancel import CancelPrediction
from predictions.observability import logger
from predictions.pipelines.state import StepState, run_ids, states_of
from predictions.pipelines.steps import CannotRun, Pipelines
from predictions.pipelines.store import Notes, Pipeline, PipelinesTable, Status, StoredPipeline

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

RESEND_SECONDS = 3600
"""Seconds until a request that has started nothing is sent again: it may be in the dead-letter queue."""

_CANCEL_SECONDS = 15
_STUCK_SECONDS = 120
# Backoff of the sweep's checks of a pipeline whose executions die: from `_STUCK_SECONDS`, doubled, up to an hour.
_STUCK_MOST_SECONDS = 3600
# After this many dead executions the sweep fails it, this long after its deadline, which the execution enforces.
_DEAD_EXECUTIONS = 2
_ABANDON_SECONDS = 3600


@dataclass(frozen=True)
class Turn:
    """The result of a turn.

    Attributes:
        done: Whether the pipeline has completed.
        seen: The number of its events before the turn read it; -1 if another turn must follow immediately.
    """

    done: bool
    seen: int


class Progress:
    """Advances pipelines, one turn at a time.

    Args:
        canceling: Cancels predictions.
        queue_url: The requests queue.
    """

    def __init__(
        self,
        pipelines: Pipelines,
        canceling: CancelPrediction,
        queue_url: str,
        sqs: "SQSClient",
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._pipelines = pipelines
        self._canceling = canceling
        self._queue_url = queue_url
        self._sqs = sqs
        self._now = now

    @classmethod
    def from_env(cls) -> "Progress":
        """Build from `REQUESTS_QUEUE_URL` and the environment of its parts."""
        return cls(Pipelines.from_env(), CancelPrediction.from_env(), os.environ["REQUESTS_QUEUE_URL"], client("sqs"))

    def advance(self, pipeline_id: str, remaining_seconds: Callable[[], float]) -> Turn:
        """Run one turn.

        Args:
            pipeline_id: The id of the pipeline.
            remaining_seconds: How long the function may still run.
        """
        table = self._pipelines.table
        # Read before the predictions: a later completion raises the number, and the execution does not wait.
        stored = table.read_pipeline(pipeline_id)
        if stored is None or stored.pipeline.ended:
            return Turn(done=True, seen=-1)
        pipeline = stored.pipeline
        if pipeline.cancel_requested is None and self._now() >= pipeline.deadline:
            table.request_pipeline_cancel(pipeline, self._now())
            return Turn(done=False, seen=-1)
        stored, states = self._counted(stored)
        if pipeline.cancel_requested is not None:
            if not self._cancel(states, remaining_seconds):
                return Turn(done=False, seen=-1)
        else:
            self._send(stored, states)
        if not all(state.over for state in states.values()):
            return Turn(done=False, seen=pipeline.events)
        self._end(pipeline, states)
        return Turn(done=True, seen=-1)

    def _counted(self, stored: StoredPipeline) -> tuple[StoredPipeline, dict[str, StepState]]:
        """Return the pipeline and its states, after counting every ready `for_each`."""
        predictions = self._pipelines.predictions
        there = predictions.get_many(each for ids in run_ids(stored).values() for each in ids)
        while True:
            states = states_of(stored, there)
            uncounted = next((state.step for state in states.values() if state.uncounted), None)
            if uncounted is None:
                return stored, states
            try:
                count = len(self._pipelines.elements(stored, uncounted))
                self._pipelines.table.note_count(stored.pipeline, uncounted.name, count)
                noted = Notes(count=count)
            except CannotRun as error:
                self._pipelines.table.note_error(stored.pipeline, uncounted.name, -1, str(error))
                noted = Notes(errors={-1: str(error)})
            stored = replace(stored, notes={**stored.notes, uncounted.name: noted})
            # A concurrent turn may have counted first, and its messages may have started predictions already.
            there |= predictions.get_many(run_ids(stored)[uncounted.name])

    def _send(self, stored: StoredPipeline, states: dict[str, StepState]) -> None:
        for name, state in states.items():
            sent_at = stored.notes.get(name, Notes()).sent_at
            if not state.missing or (sent_at is not None and sent_at + RESEND_SECONDS > self._now()):
                continue
            for index in state.missing:
                message = {"pipeline_id": stored.pipeline.id, "step": name, "index": index}
                # SQS prefers the messages of owners whose messages do not occupy the consumers (fair queues).
                self._sqs.send_message(
                    QueueUrl=self._queue_url, MessageBody=json.dumps(message), MessageGroupId=stored.pipeline.owner
                )
            # Recorded afterwards: if the function crashes here, the next turn sends them again, which starts nothing
            # twice.
            self._pipelines.table.note_sent(stored.pipeline, name, self._now())
            logger.info("step sent", step=name, requests=len(state.missing))

    def _cancel(self, states: dict[str, StepState], remaining_seconds: Callable[[], float]) -> bool:
        """Cancel every open prediction once; the sweep retries unacknowledged ones.

        Returns:
            Whether all were canceled; the time may have been too short for the rest.
        """
        for state in states.values():
            for prediction in state.predictions.values():
                if prediction.terminal or prediction.cancel_requested:
                    continue
                if remaining_seconds() < _CANCEL_SECONDS:
                    return False
                self._canceling.cancel(prediction)
        return True

    def _end(self, pipeline: Pipeline, states: dict[str, StepState]) -> None:
        unsuccessful = {name: state for name, state in states.items() if state.status != "succeeded"}
        status: Status = "succeeded"
        error = None
        if unsuccessful:
            late = (pipeline.cancel_requested or 0) >= pipeline.deadline
            status = "canceled" if pipeline.cancel_requested and not late else "failed"
            reasons = [f"`{name}` {s.status}{f' ({s.error})' if s.error else ''}" for name, s in unsuccessful.items()]
            passed = "The deadline has passed. " if late else ""
            error = f"{passed}Steps: {'; '.join(reasons)}"
        counts = Counter[str](state.status for state in states.values())
        if self._pipelines.table.end_pipeline(pipeline, status, error, counts, self._now()):
            logger.info("pipeline completed", status=status, steps=dict(counts))


class PipelineExecutions:
    """Keeps an execution running for every open pipeline.

    Args:
        executions: The executions of `run_pipeline`.
    """

    def __init__(self, table: PipelinesTable, executions: Executions, *, now: Callable[[], float] = time.time) -> None:
        self._table = table
        self._executions = executions
        self._now = now

    @classmethod
    def from_env(cls) -> "PipelineExecutions":
        """Build from `PIPELINE_STATE_MACHINE_ARN` and the environment of the table."""
        executions = Executions(os.environ["PIPELINE_STATE_MACHINE_ARN"], client("stepfunctions"))
        return cls(PipelinesTable.from_env(), executions)

    def run(self, pipeline: Pipeline) -> None:
        """Start the execution of a pipeline, unless it is running."""
        following: Pipeline | None = pipeline
        while following is not None and not self._executions.start(
            following.id, following.execution_n, following.traceparent
        ):
            # The name belongs to an execution that has ended.
            following = self._table.next_pipeline_execution(following, self._now())

    def restart(self, pipeline_id: str) -> None:
        """Recover a stalled pipeline, called by the sweep."""
        pipeline = self._table.get_pipeline(pipeline_id)
        # The index may lag behind the item.
        if pipeline is None or pipeline.next_check_at is None or pipeline.next_check_at > self._now():
            return
        logger.info("stalled", pipeline_id=pipeline_id)
        # First: a pipeline that cannot be started must not block the others in the next sweep.
        died = pipeline.execution_n - 1
        check_at = self._now() + backoff_seconds(_STUCK_SECONDS, died, _STUCK_MOST_SECONDS)
        self._table.check_pipeline_at(pipeline, check_at)
        over = died >= _DEAD_EXECUTIONS and self._now() >= pipeline.deadline + _ABANDON_SECONDS
        if over and self._executions.status(pipeline.id, pipeline.execution_n) != "RUNNING":
            logger.error("pipeline abandoned after repeated crashes", pipeline_id=pipeline_id, executions=died + 1)
            why = (
                "The deadline has passed, and this stack's functions ran out of memory or time each time they ran "
                "for this pipeline. Its predictions complete independently: read them one by one."
            )
            self._table.end_pipeline(pipeline, "failed", why, {}, self._now())
            return
        self.run(pipeline)
        if died:
            # The next execution has set a check of its own, which must not be earlier than this.
            self._table.check_pipeline_at(pipeline, check_at)
