"""Moves a pipeline on: sends what is due, cancels what is to be canceled, and ends it when nothing is left.

Each turn looks at all that there is and does what follows from it. It may come twice, late, or die after any line: the
next turn finds the same, or more, and messages that are sent twice start nothing twice.
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
from predictions.lifecycle.submissions import Submissions
from predictions.observability import logger
from predictions.pipelines.state import StepState, run_ids, states_of
from predictions.pipelines.steps import CannotRun, Pipelines
from predictions.pipelines.store import Notes, Pipeline, PipelinesTable, Status, StoredPipeline

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

RESEND_SECONDS = 3600
"""When a request that has started nothing is sent again: it may have gone to the dead-letter queue."""

_CANCEL_SECONDS = 15
_STUCK_SECONDS = 120
# Backoff of the sweep's looks at a pipeline over which executions die: from `_STUCK_SECONDS`, doubled, up to an hour.
_STUCK_MOST_SECONDS = 3600
# After that many dead executions it is ended by the sweep, this long after its deadline, which the execution keeps.
_DEAD_EXECUTIONS = 2
_ABANDON_SECONDS = 3600


@dataclass(frozen=True)
class Turn:
    """What a turn found.

    Attributes:
        done: Whether the pipeline has ended.
        seen: The number of its events before the turn looked; -1 where another turn has to follow at once.
    """

    done: bool
    seen: int


class Progress:
    """Runs pipelines, a turn at a time.

    Args:
        pipelines: The pipelines.
        submissions: Cancels predictions.
        queue_url: The requests queue.
        sqs: The client to use.
        now: The time, in seconds since 1970.
    """

    def __init__(
        self,
        pipelines: Pipelines,
        submissions: Submissions,
        queue_url: str,
        sqs: "SQSClient",
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._pipelines = pipelines
        self._submissions = submissions
        self._queue_url = queue_url
        self._sqs = sqs
        self._now = now

    @classmethod
    def from_env(cls) -> "Progress":
        """From `REQUESTS_QUEUE_URL` and what its parts read."""
        return cls(Pipelines.from_env(), Submissions.from_env(), os.environ["REQUESTS_QUEUE_URL"], client("sqs"))

    def advance(self, pipeline_id: str, remaining_seconds: Callable[[], float]) -> Turn:
        """One turn.

        Args:
            pipeline_id: Which pipeline.
            remaining_seconds: How long the function may still run.
        """
        table = self._pipelines.table
        # Read before the predictions: what ends afterwards raises the number, and the execution does not wait.
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
        """The pipeline and its states, after every `for_each` that can be has been counted."""
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
            # The first of two who count may have been another, whose messages have started something already.
            there |= predictions.get_many(run_ids(stored)[uncounted.name])

    def _send(self, stored: StoredPipeline, states: dict[str, StepState]) -> None:
        for name, state in states.items():
            sent_at = stored.notes.get(name, Notes()).sent_at
            if not state.missing or (sent_at is not None and sent_at + RESEND_SECONDS > self._now()):
                continue
            for index in state.missing:
                message = {"pipeline_id": stored.pipeline.id, "step": name, "index": index}
                self._sqs.send_message(QueueUrl=self._queue_url, MessageBody=json.dumps(message))
            # Afterwards: died in between, the next turn sends them all again, which starts nothing twice.
            self._pipelines.table.note_sent(stored.pipeline, name, self._now())
            logger.info("a step is due", step=name, requests=len(state.missing))

    def _cancel(self, states: dict[str, StepState], remaining_seconds: Callable[[], float]) -> bool:
        """Cancels every prediction that is open, once; the sweep repeats it where Replicate did not answer.

        Returns:
            Whether that was all of them; there may have been no time for the rest.
        """
        for state in states.values():
            for prediction in state.predictions.values():
                if prediction.terminal or prediction.cancel_requested:
                    continue
                if remaining_seconds() < _CANCEL_SECONDS:
                    return False
                self._submissions.cancel(prediction)
        return True

    def _end(self, pipeline: Pipeline, states: dict[str, StepState]) -> None:
        unsuccessful = {name: state for name, state in states.items() if state.status != "succeeded"}
        status: Status = "succeeded"
        error = None
        if unsuccessful:
            late = (pipeline.cancel_requested or 0) >= pipeline.deadline
            status = "canceled" if pipeline.cancel_requested and not late else "failed"
            reasons = [f"`{name}` {s.status}{f' ({s.error})' if s.error else ''}" for name, s in unsuccessful.items()]
            passed = "Its deadline passed. " if late else ""
            error = f"{passed}Steps: {'; '.join(reasons)}"
        counts = Counter[str](state.status for state in states.values())
        if self._pipelines.table.end_pipeline(pipeline, status, error, counts, self._now()):
            logger.info("pipeline ended", status=status, steps=dict(counts))


class PipelineExecutions:
    """Sees to it that an execution runs for every pipeline that has not ended.

    Args:
        table: The pipelines.
        executions: Those of `run_pipeline`.
        now: The time, in seconds since 1970.
    """

    def __init__(self, table: PipelinesTable, executions: Executions, *, now: Callable[[], float] = time.time) -> None:
        self._table = table
        self._executions = executions
        self._now = now

    @classmethod
    def from_env(cls) -> "PipelineExecutions":
        """From `PIPELINE_STATE_MACHINE_ARN` and what the table reads."""
        executions = Executions(os.environ["PIPELINE_STATE_MACHINE_ARN"], client("stepfunctions"))
        return cls(PipelinesTable.from_env(), executions)

    def run(self, pipeline: Pipeline) -> None:
        """Starts the execution of a pipeline, unless it runs; twice, nothing is started again."""
        following: Pipeline | None = pipeline
        while following is not None and not self._executions.start(following.id, following.execution_n, submit=None):
            # That name is used up by one that has ended.
            following = self._table.next_pipeline_execution(following, self._now())

    def restart(self, pipeline_id: str) -> None:
        """What the sweep does for a pipeline that nobody has looked at for too long."""
        pipeline = self._table.get_pipeline(pipeline_id)
        # The index may lag behind the item.
        if pipeline is None or pipeline.next_check_at is None or pipeline.next_check_at > self._now():
            return
        logger.info("stands still", pipeline_id=pipeline_id)
        # First: one that cannot be started must not stand before the others in the next sweep.
        died = pipeline.execution_n - 1
        check_at = self._now() + backoff_seconds(_STUCK_SECONDS, died, _STUCK_MOST_SECONDS)
        self._table.check_pipeline_at(pipeline, check_at)
        over = died >= _DEAD_EXECUTIONS and self._now() >= pipeline.deadline + _ABANDON_SECONDS
        if over and self._executions.status(pipeline.id, pipeline.execution_n) != "RUNNING":
            logger.error("functions died over it: ended by the sweep", pipeline_id=pipeline_id, executions=died + 1)
            why = (
                "Its deadline passed, and this stack's functions ran out of memory or time each time that they worked "
                "on it. Its predictions have their own ends: read them one by one."
            )
            self._table.end_pipeline(pipeline, "failed", why, {}, self._now())
            return
        self.run(pipeline)
        if died:
            # The next execution has noted a time of its own: it is not to die any sooner than this.
            self._table.check_pipeline_at(pipeline, check_at)
