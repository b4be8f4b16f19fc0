"""The limiter, the pause and owners' limits on the deployed stack, seen in the stand-in's own record."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from predictions.admission.rate_limiter import Limiter
from predictions.aws.executions import Executions
from predictions.files.outputs_bucket import OutputsBucket
from predictions.intents.model import create_requested_intent
from predictions.store.predictions import PredictionsTable

from local.cloud import CREDENTIALS, REGION, STACK_NAME, LocalCloud
from local.replicate.process import LocalReplicate

SLEEPER = {"version": "local/sleeper", "input": {"seconds": 0}}
QUEUED = 8
"""As many processes of a function may have to begin, one after the other, before the first start's time has come."""
CACHED_SECONDS = 1.2
"""Longer than a function keeps what it has read of the limiter."""


class Stack:
    """What these tests do to the deployed stack."""

    def __init__(self, cloud: LocalCloud, wait_until: Callable[..., Any]) -> None:
        self.cloud = cloud
        self.wait = wait_until
        self.dynamodb = cloud.client("dynamodb")
        self.limiter = Limiter(cloud.stack.table_name, self.dynamodb)
        self.table = PredictionsTable(
            cloud.stack.table_name, OutputsBucket(cloud.stack.outputs_bucket, [cloud.replicate.origin]), self.dynamodb
        )
        self.executions = Executions(cloud.stack.state_machine_arn, cloud.client("stepfunctions"))

    def run(self, *arguments: str) -> str:
        """Runs the command."""
        command = [sys.executable, "-m", "predictions", *arguments, "--stack", STACK_NAME]
        environment = {
            **os.environ, **CREDENTIALS, "AWS_ENDPOINT_URL": self.cloud.endpoint_url, "AWS_REGION": REGION
        }  # fmt: skip
        ran = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)  # noqa: S603  # ours
        return ran.stdout

    def put(self, **limiter: int) -> None:
        """Sets attributes of the limiter's item."""
        self.dynamodb.update_item(
            TableName=self.cloud.stack.table_name,
            Key={"pk": {"S": "limiter"}, "sk": {"S": "creates"}},
            UpdateExpression="SET " + ", ".join(f"{name} = :{name}" for name in limiter),
            ExpressionAttributeValues={f":{name}": {"N": str(value)} for name, value in limiter.items()},
        )

    def reserve(self, *, milliseconds: int) -> None:
        """Moves the lane of queued predictions on."""
        self.dynamodb.update_item(
            TableName=self.cloud.stack.table_name,
            Key={"pk": {"S": "limiter"}, "sk": {"S": "creates"}},
            UpdateExpression="ADD queue_at :more",
            ExpressionAttributeValues={":more": {"N": str(milliseconds)}},
        )

    def queue(self, key: str, owner: str = "alice") -> str:
        """Writes a queued prediction down and has it tracked, as the queue's door does."""
        intent = create_requested_intent(
            SLEEPER, owner=owner, source="queue", source_key=key, allow_loopback_webhooks=True
        )
        now = time.time()
        self.table.put_intent(
            intent, version=None, deadline=int(now) + 600, expires=int(now) + 86400, claim=False,
            execution_arn=self.executions.arn(intent.id, 1), now=now,
        )  # fmt: skip
        self.executions.start(intent.id, 1)
        return intent.id

    def states(self, prediction_id: str) -> list[str]:
        history = self.cloud.client("stepfunctions").get_execution_history(
            executionArn=self.executions.arn(prediction_id, 1), maxResults=1000
        )["events"]
        return [e["stateEnteredEventDetails"]["name"] for e in history if "stateEnteredEventDetails" in e]

    def ended(self, prediction_id: str) -> str:
        """How a prediction ended, once it has."""

        def visible() -> str | None:
            item = self.table.get(prediction_id)
            assert item is not None
            return item.visible if item.terminal and not item.awaits_copy else None

        try:
            found: str = self.wait(visible, 90, f"prediction {prediction_id} to end")
        except AssertionError as error:
            # What it stood still in.
            raise AssertionError(f"{self.states(prediction_id)} {self.table.get(prediction_id)}") from error
        return found


@pytest.fixture
def stack(cloud: LocalCloud, replicate: LocalReplicate, wait_until: Callable[..., Any]) -> Iterator[Stack]:
    """The stack; nothing of the limiter is left afterwards."""
    found = Stack(cloud, wait_until)
    yield found
    key = {"pk": {"S": "limiter"}, "sk": {"S": "creates"}}
    found.dynamodb.delete_item(TableName=cloud.stack.table_name, Key=key)
    time.sleep(CACHED_SECONDS)


@pytest.fixture
def ahead_seconds(stack: Stack) -> int:
    """How far ahead the starts of a test have to be, on this machine as it is."""
    submit = stack.cloud.functions["submit_prediction"]
    stack.cloud.client("lambda").update_function_configuration(FunctionName=submit, Description="")  # a new process
    began = time.monotonic()
    assert stack.ended(stack.queue(f"measured-{time.time()}")) == "succeeded"
    return max(16, round(QUEUED * (time.monotonic() - began)))


def test_queued_predictions_are_created_at_their_reserved_times_and_wait_once(
    stack: Stack, replicate: LocalReplicate, ahead_seconds: int
) -> None:
    began = time.time()
    # What others have reserved already: so all of them are there before the first one's time has come.
    stack.put(queue_at=int((began + ahead_seconds) * 1000))
    run = hex(int(began * 1000))
    ids = []
    for n in range(QUEUED):
        # Of an owner each: one alone reserves the next start only when its last one is near.
        ids.append(stack.queue(f"limited-{run}-{n}", f"limited-{n}"))
        time.sleep(0.2)  # or the emulator starts a process for each
        # And what others reserve in between.
        stack.reserve(milliseconds=500)
    assert {stack.ended(prediction_id) for prediction_id in ids} == {"succeeded"}
    for prediction_id in ids:
        assert [each["status"] for each in replicate.creates(prediction_id)] == [201]
        item = stack.table.get(prediction_id)
        assert item is not None
        assert item.reserved
        assert (item.claimed or 0) >= (item.submit_at or 0) >= int(began + ahead_seconds)
        entered = stack.states(prediction_id)
        assert entered.count("WaitForTurn") == 1, entered
    # Each has moved the lane on once, by one interval of nine a second.
    moved = float(stack.limiter.limiter_state().queue_at) - int((began + ahead_seconds) * 1000)
    assert moved == pytest.approx(len(ids) * (500 + 1000 / 9), abs=0.01)


def test_queued_predictions_of_one_owner_come_in_turn_and_their_starts_are_given_back(
    stack: Stack, api: Callable[..., httpx.Client], ahead_seconds: int
) -> None:
    began = time.time()
    stack.put(queue_at=int((began + ahead_seconds) * 1000))
    run = hex(int(began * 1000))
    ids = []
    for n in range(4):
        ids.append(stack.queue(f"turns-{run}-{n}"))
        stack.wait(lambda: (item := stack.table.get(ids[-1])) and item.submit_at, 20)
    items = [stack.table.get(prediction_id) for prediction_id in ids]
    assert [bool(item and item.turn_ms) for item in items] == [False, True, True, True]
    reserved = items[0]
    assert reserved is not None
    assert reserved.reserved_start
    api("alice").post(f"/predictions/{ids[0]}/cancel").raise_for_status()
    stack.wait(lambda: stack.limiter.limiter_state().free, 10)
    # The next request of anybody takes that very start.
    heir = stack.queue(f"turns-{run}-heir", "bob")
    stack.wait(lambda: (item := stack.table.get(heir)) and item.submit_at, 20)
    found = stack.table.get(heir)
    assert found is not None
    assert found.reserved_start == reserved.reserved_start + 1
    assert {stack.ended(prediction_id) for prediction_id in [heir, *ids[1:]]} == {"succeeded"}
    assert stack.ended(ids[0]) == "canceled"


def test_caller_whose_start_is_far_ahead_is_refused(
    stack: Stack, api: Callable[..., httpx.Client], replicate: LocalReplicate
) -> None:
    until = int((time.time() + 400) * 1000)
    stack.put(blocked_until=until, queue_at=until, http_at=until + 10_000)
    time.sleep(CACHED_SECONDS)
    asked_at = time.time()
    answer = api("alice").post("/predictions", json=SLEEPER)
    assert (answer.status_code, answer.json()["status"]) == (429, 429)
    # It could start within MaxStartDelaySeconds, which are 300.
    ahead = until / 1000 - 300
    assert ahead - time.time() - 10 <= int(answer.headers["retry-after"]) <= ahead - asked_at + 1
    assert "MaxStartDelaySeconds" in answer.json()["detail"]
    assert replicate.creates() == []


def test_pause_by_command_is_told_to_callers_until_it_is_over(
    stack: Stack, api: Callable[..., httpx.Client], replicate: LocalReplicate
) -> None:
    alice = api("alice")
    stack.run("pause", "--reason", "We move to another account.")
    time.sleep(CACHED_SECONDS)
    answer = alice.post("/predictions", json=SLEEPER)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "300")
    assert "We move to another account." in answer.json()["detail"]
    assert replicate.creates() == []
    assert json.loads(stack.run("status", "--json"))["pause_reason"] == "We move to another account."
    stack.run("resume")
    time.sleep(CACHED_SECONDS)
    assert alice.post("/predictions", json=SLEEPER).status_code == 201


def test_queued_prediction_outlasts_a_pause(stack: Stack, replicate: LocalReplicate) -> None:
    until = time.time() + 6
    stack.put(paused_until=int(until * 1000), paused_at=0)
    time.sleep(CACHED_SECONDS)
    prediction_id = stack.queue(f"paused-{until}")
    assert stack.ended(prediction_id) == "succeeded"
    item = stack.table.get(prediction_id)
    assert item is not None
    assert (item.claimed or 0) >= int(until)
    assert [each["status"] for each in replicate.creates(prediction_id)] == [201]


@pytest.mark.parametrize("status", [401, 402])
def test_refused_token_or_credit_pauses(
    stack: Stack, api: Callable[..., httpx.Client], replicate: LocalReplicate, status: int
) -> None:
    replicate.fault("create_refused", status=status)
    alice = api("alice")
    assert alice.post("/predictions", json=SLEEPER).status_code == 502
    time.sleep(CACHED_SECONDS)
    answer = alice.post("/predictions", json=SLEEPER)
    assert (answer.status_code, str(status) in answer.json()["detail"]) == (503, True)
    assert 280 <= int(answer.headers["retry-after"]) <= 300
    assert len(replicate.creates()) == 1
    stack.limiter.resume()
    time.sleep(CACHED_SECONDS)
    assert alice.post("/predictions", json=SLEEPER).status_code == 201


def test_owner_over_a_limit_is_told_which_and_goes_on_when_one_has_ended(
    stack: Stack, api: Callable[..., httpx.Client], replicate: LocalReplicate
) -> None:
    stack.run("limits", "set", "erin", "--in-flight", "1", "--per-day", "2")
    erin = api("erin")
    body = {"version": "local/sleeper", "input": {"seconds": 60}}
    first = erin.post("/predictions", json=body)
    assert first.status_code == 201
    refused = erin.post("/predictions", json=body)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
    assert refused.headers["content-type"].startswith("application/problem+json")
    assert "1 predictions in flight" in refused.json()["detail"]
    assert api("alice").post("/predictions", json=SLEEPER).status_code == 201
    erin.post(f"/predictions/{first.json()['id']}/cancel").raise_for_status()
    second = stack.wait(lambda: (r := erin.post("/predictions", json=SLEEPER)).status_code == 201 and r, 10)
    stack.ended(second.json()["id"])
    stack.wait(lambda: "2 predictions per day" in erin.post("/predictions", json=SLEEPER).json().get("detail", ""), 10)
    stack.run("limits", "remove", "erin")
    assert "erin" not in stack.run("limits", "list")


def test_owner_over_a_models_limit_starts_another_model_and_goes_on_when_one_has_ended(
    stack: Stack, api: Callable[..., httpx.Client]
) -> None:
    stack.run("limits", "set", "frank", "--model", "local/sleeper", "--in-flight", "1", "--per-day", "2")
    frank = api("frank")
    body = {"version": "local/sleeper", "input": {"seconds": 60}}
    first = frank.post("/predictions", json=body)
    assert first.status_code == 201
    refused = frank.post("/predictions", json=body)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
    assert "1 predictions of local/sleeper in flight" in refused.json()["detail"]
    other = frank.post("/predictions", json={"version": "local/resizer", "input": {}})
    assert other.status_code != 429, other.text
    queued = stack.queue(f"model-{time.time()}", "frank")
    frank.post(f"/predictions/{first.json()['id']}/cancel").raise_for_status()
    assert stack.ended(queued) == "succeeded"
    # Another start may look through the slots at the same moment: then this one is refused by the other limit.
    per_day = "2 predictions of local/sleeper per day"
    stack.wait(lambda: per_day in frank.post("/predictions", json=SLEEPER).json()["detail"])
    stack.run("limits", "remove", "frank", "--model", "local/sleeper")
    assert "frank" not in stack.run("limits", "list")
