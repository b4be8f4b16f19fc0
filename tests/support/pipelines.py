"""Pipelines as tests start them and move them on."""

import json
from typing import Any

import pytest
from predictions.aws import clients
from predictions.aws.executions import Executions
from predictions.files.links import Links
from predictions.files.outputs_bucket import OutputsBucket
from predictions.intake.queue import Requests
from predictions.intents.sources import Message
from predictions.lifecycle.archive_outputs import copy
from predictions.pipelines.advance import PipelineExecutions, Progress, Turn
from predictions.pipelines.manage import PipelineApi
from predictions.pipelines.state import run_id
from predictions.pipelines.steps import Pipelines, prediction_ended
from predictions.pipelines.store import PipelinesTable
from predictions.store.callers import WaitingCallers
from predictions.store.predictions import PredictionsTable
from predictions.store.recent_requests import RecentRequests
from predictions.store.records import Prediction
from predictions.views.prediction import Presenter

from tests.support.fakes import Clock, Executed, ReplicateInMemory
from tests.support.pipeline_definitions import FLUX, INPUT, step
from tests.support.protocol import Submissions

FAILED = object()


class World:
    """A stack whose queue, state machines and stream the test moves by hand."""

    def __init__(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        outputs: OutputsBucket,
        replicate: ReplicateInMemory,
        executed: Executed,
        pipeline_executed: Executed,
        clock: Clock,
    ) -> None:
        self.clock, self.replicate, self.submissions, self.predictions = clock, replicate, submissions, table
        self._outputs = outputs
        self.table = PipelinesTable("predictions", outputs, clients.client("dynamodb"))
        links = Links({"outputs": "outputs"}, "link-secret", now=clock.now)
        self.pipelines = Pipelines(self.table, table, outputs, links)
        self.executions = PipelineExecutions(
            self.table, Executions(pipeline_executed.machine_arn, clients.client("stepfunctions")), now=clock.now
        )
        self.queue_url = clients.client("sqs").get_queue_url(QueueName="requests")["QueueUrl"]
        self.progress = Progress(
            self.pipelines, submissions.canceling, self.queue_url, clients.client("sqs"), now=clock.now
        )
        presenter = Presenter(outputs, 3600)
        self.api = PipelineApi(
            self.table, table, RecentRequests.from_env(), submissions.lookup, self.executions, presenter, 30 * 86400,
            now=clock.now,
        )  # fmt: skip
        self.requests = Requests(
            table,
            WaitingCallers.from_env(),
            Executions(executed.machine_arn, clients.client("stepfunctions")),
            lifetime_seconds=86400,
            retention_seconds=30 * 86400,
            queue_owner="queue",
            sender_owners={},
            allow_loopback_webhooks=False,
            now=clock.now,
        )

    def create(self, *steps: dict[str, Any], key: str | None = None, **others: Any) -> str:
        """A pipeline of alice's, after its first turn."""
        body = json.dumps({"input": INPUT, "steps": list(steps), **others}).encode()
        headers = {"idempotency-key": key} if key else {}
        shown = self.api.create_pipeline("alice", body, headers)
        self.turn(shown["id"])
        return str(shown["id"])

    def turn(self, pipeline_id: str, remaining_seconds: float = 100) -> Turn:
        return self.progress.advance(pipeline_id, lambda: remaining_seconds)

    def sent(self) -> list[dict[str, Any]]:
        """The messages of the requests queue, which are gone then."""
        sqs, found = clients.client("sqs"), []
        while messages := sqs.receive_message(QueueUrl=self.queue_url, MaxNumberOfMessages=10).get("Messages"):
            for each in messages:
                found.append(json.loads(each["Body"]))
                sqs.delete_message(QueueUrl=self.queue_url, ReceiptHandle=each["ReceiptHandle"])
        return found

    def deliver(self, *messages: dict[str, Any]) -> list[Prediction]:
        """What the queue's function and the track machines make of messages, by default of those that were sent."""
        started = []
        for body in messages or self.sent():
            prediction = self.requests.take(Message("m", "AIDA", json.dumps(body), int(self.clock.now())))
            if prediction is not None:
                # Else the limiter would keep those back that come at one moment.
                key = {"pk": {"S": "limiter"}, "sk": {"S": "creates"}}
                clients.client("dynamodb").delete_item(TableName="predictions", Key=key)
                self.submissions.submit(prediction.id)
                started.append(prediction)
        return started

    def run_id(self, pipeline_id: str, name: str, index: int = 0) -> str:
        return run_id("alice", pipeline_id, name, index)

    def end(self, pipeline_id: str, name: str, output: Any, index: int = 0) -> None:
        """A step's prediction ends at Replicate, and everybody hears of it."""
        prediction = self.predictions.get(self.run_id(pipeline_id, name, index))
        assert prediction is not None
        assert prediction.upstream_id
        told = {"status": "failed", "error": "out of paint"} if output is FAILED else {"output": output}
        self.replicate.finish(prediction.upstream_id, **told)
        self.submissions.poll(prediction.id)
        copy(self.predictions, self._outputs, prediction.id, 1, remaining_seconds=lambda: 900, now=self.clock.now)
        self.hear(prediction.id)

    def hear(self, prediction_id: str) -> None:
        """The record of a prediction's end in the stream."""
        ended = self.predictions.get(prediction_id)
        assert ended is not None
        prediction_ended(ended.id, ended.origin, ended.visible)

    def shown(self, pipeline_id: str) -> dict[str, Any]:
        return self.api.view.show(self.api.own_pipeline(pipeline_id, "alice"))

    def statuses(self, pipeline_id: str) -> dict[str, str]:
        return {each["name"]: each["status"] for each in self.shown(pipeline_id)["steps"]}

    def inputs(self) -> list[Any]:
        """The inputs that Replicate was given, in their order."""
        return [each["input"] for each in self.replicate.creates]


@pytest.fixture
def world(
    submissions: Submissions,
    table: PredictionsTable,
    outputs: OutputsBucket,
    replicate: ReplicateInMemory,
    executed: Executed,
    pipeline_executed: Executed,
    clock: Clock,
) -> World:
    return World(submissions, table, outputs, replicate, executed, pipeline_executed, clock)


IMAGE = step("image", {"prompt": "{{ input.prompt }}"}, model=FLUX)
