"""Batches as tests make, run and end them."""

import json
from typing import Any

import pytest
from predictions.aws import clients
from predictions.aws.executions import Executions
from predictions.batches.files import lines_key, read_jsonl
from predictions.batches.finish import finish
from predictions.batches.manage import BatchControl
from predictions.batches.prepare import prepare
from predictions.batches.store import Batch, Batches
from predictions.ids import random_id
from predictions.intake.queue import Requests
from predictions.intents.sources import Message
from predictions.recipes.store import Recipe, RecipeItems, State
from predictions.store.callers import WaitingCallers
from predictions.store.predictions import PredictionsTable

from tests.support.fakes import Clock, Executed, ReplicateInMemory, Wakes
from tests.support.protocol import Submissions

LLAMA: dict[str, Any] = {"model": "meta/llama", "input": {"prompt": "a fox"}}
RETENTION = 30 * 86400


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


class World:
    """A stack in which the tests are Step Functions: they run the states that they want to see."""

    def __init__(self, table: PredictionsTable, submissions: Submissions, executed: Executed, clock: Clock) -> None:
        self.table = table
        self.submissions = submissions
        self.clock = clock
        self.batches = Batches("predictions", "outputs", now=clock.now)
        self.machine = executed.batch_machine_arn
        self.recipes = RecipeItems("predictions", clients.client("dynamodb"))
        stepfunctions = clients.client("stepfunctions")
        self.control = BatchControl(self.batches, self.recipes, self.machine, "inputs", RETENTION, stepfunctions)
        self.requests = Requests(
            table,
            WaitingCallers.from_env(),
            Executions(executed.machine_arn, clients.client("stepfunctions")),
            lifetime_seconds=86400,
            retention_seconds=RETENTION,
            queue_owner="queue",
            sender_owners={},
            allow_loopback_webhooks=False,
            now=clock.now,
        )
        # The door finds batches by the environment.
        Batches.from_env = classmethod(lambda _: self.batches)  # type: ignore[method-assign,assignment]

    def make(self, *requests: Any, key: str | None = None, owner: str = "alice", **fields: Any) -> Batch:
        headers = {"idempotency-key": key} if key else {}
        if requests:
            fields["requests"] = list(requests)
        return self.control.make(body(**fields), headers, owner)

    def put_recipe(self, name: str, owner: str = "alice", state: State = "active", **definition: Any) -> Recipe:
        at, there = "2025-06-15T15:00:00.000000Z", self.recipes.named(owner, name)
        recipe_id = there.id if there else self.recipes.claim_name(owner, name, random_id())
        revision = f"{there.revision}+" if there else "1"
        recipe = Recipe(recipe_id, owner, name, LLAMA | definition, state, revision, at, at)
        assert self.recipes.put(recipe, replaces=there)
        return recipe

    def prepared(self, *requests: Any, **fields: Any) -> Batch:
        batch = self.make(*requests, **fields)
        prepare(self.batches, batch.id, 1)
        return self.there(batch)

    def there(self, batch: Batch) -> Batch:
        found = self.batches.find(batch.id)
        assert found
        return found

    def messages(self, batch: Batch) -> list[dict[str, Any]]:
        """What the Map sends of the current attempt."""
        return [
            {"batch_id": batch.id, "attempt": batch.attempt, **line, "task_token": f"token-{batch.attempt}-{line['n']}"}
            for line in read_jsonl("outputs", lines_key(batch.id, batch.attempt))
        ]

    def take(self, message: dict[str, Any]) -> str:
        prediction = self.requests.take(Message("m", "sender", json.dumps(message), int(self.clock.now())))
        assert prediction
        return prediction.id

    def run(self, batch: Batch, *, submit: bool = True) -> dict[int, str]:
        """Lets all lines of an attempt in, and has them submitted: their predictions by line."""
        ids = {message["n"]: self.take(message) for message in self.messages(batch)}
        if submit:
            for prediction_id in ids.values():
                self.submissions.submit(prediction_id)
        return ids

    def end(self, prediction_id: str, replicate: ReplicateInMemory, status: str = "succeeded", **told: Any) -> None:
        prediction = self.table.get(prediction_id)
        assert prediction
        assert prediction.upstream_id
        replicate.finish(prediction.upstream_id, status, **told)
        self.submissions.poll(prediction_id)

    def finish(self, batch: Batch, *, exceeded: bool = False) -> dict[str, Any]:
        return finish(self.batches, self.table, batch.id, self.there(batch).attempt, 0, exceeded=exceeded)

    def results(self, batch: Batch) -> list[dict[str, Any]]:
        return list(read_jsonl("outputs", self.there(batch).results_key or ""))

    @property
    def executions(self) -> dict[str, Any]:
        stepfunctions = clients.client("stepfunctions")
        found = stepfunctions.list_executions(stateMachineArn=self.machine)["executions"]
        return {
            each["name"]: json.loads(stepfunctions.describe_execution(executionArn=each["executionArn"])["input"])
            for each in found
        }

    def stop_execution(self, name: str) -> None:
        arn = f"{self.machine.replace(':stateMachine:', ':execution:')}:{name}"
        clients.client("stepfunctions").stop_execution(executionArn=arn)


@pytest.fixture
def world(
    table: PredictionsTable,
    submissions: Submissions,
    executed: Executed,
    clock: Clock,
    wakes: Wakes,
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    monkeypatch.setattr(Batches, "from_env", Batches.from_env)  # put back afterwards
    return World(table, submissions, executed, clock)


def plenty() -> float:
    return 100.0
