"""Requests by the queue, state machines that wait, and events on the bus, on the deployed stack."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from local.cloud import CREDENTIALS, OWNER, REGION, STACK_NAME, LocalCloud
from local.replicate.process import LocalReplicate

Api = Callable[..., httpx.Client]
WaitUntil = Callable[..., Any]

SAMPLE = Path(__file__).parents[2] / "docs/samples/caller.asl.json"
ENDS = ("succeeded", "failed", "canceled")


def sleeper(seconds: float = 0, **more: Any) -> dict[str, Any]:
    return {"model": "local/sleeper", "input": {"seconds": seconds}, **more}


class Queue:
    """Who sends to the requests queue, and sees what becomes of it."""

    def __init__(self, cloud: LocalCloud, client: httpx.Client, wait_until: WaitUntil) -> None:
        self.cloud = cloud
        self.sqs = cloud.client("sqs")
        self.url = cloud.outputs["RequestsQueueUrl"]
        self.dead_url = cloud.outputs["RequestsDeadLetterQueueUrl"]
        self.wait_until = wait_until
        self._client = client
        self._before = self._ids()

    def send(self, body: Any) -> str:
        text = body if isinstance(body, str) else json.dumps(body)
        return str(self.sqs.send_message(QueueUrl=self.url, MessageBody=text)["MessageId"])

    def started(self) -> list[dict[str, Any]]:
        """The queue's predictions since this was made, the oldest first."""
        listed = self._client.get("/predictions").raise_for_status().json()["results"]
        return [each for each in reversed(listed) if each["id"] not in self._before]

    def ended(self, count: int = 1, seconds: float = 40) -> list[dict[str, Any]]:
        def found() -> list[dict[str, Any]] | None:
            started = self.started()
            over = len(started) >= count and all(each["status"] in ENDS for each in started)
            return started if over else None

        ended: list[dict[str, Any]] = self.wait_until(found, seconds, f"{count} predictions of the queue to end")
        assert len(ended) == count
        return ended

    def handled(self) -> None:
        """Waits until the queue holds no message."""
        self.wait_until(lambda: self._count(self.url) == 0, 30, "the queue to be empty")

    def dead(self) -> int:
        return self._count(self.dead_url)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ, **CREDENTIALS, "AWS_ENDPOINT_URL": self.cloud.endpoint_url, "AWS_REGION": REGION,
        }  # fmt: skip
        return subprocess.run(  # noqa: S603  # ours
            [sys.executable, "-m", "predictions", "dead-letters", *arguments, "--stack", STACK_NAME],
            env=environment, check=True, capture_output=True, text=True,
        )  # fmt: skip

    def _ids(self) -> set[str]:
        return {each["id"] for each in self._client.get("/predictions").raise_for_status().json()["results"]}

    def _count(self, url: str) -> int:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        counts = self.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
        return sum(int(counts[name]) for name in names)


@pytest.fixture
def queue(cloud: LocalCloud, api: Api, wait_until: WaitUntil, replicate: LocalReplicate) -> Iterator[Queue]:
    queue = Queue(cloud, api(OWNER), wait_until)
    queue.handled()
    queue.sqs.purge_queue(QueueUrl=queue.dead_url)  # of tests of other files
    yield queue
    queue.sqs.purge_queue(QueueUrl=queue.dead_url)


class TestQueue:
    def test_message_runs_a_prediction_to_its_end(self, queue: Queue, replicate: LocalReplicate) -> None:
        queue.send({"model": "local/painter", "input": {"prompt": "a lighthouse"}})
        (ended,) = queue.ended()
        assert (ended["status"], len(ended["output_files"])) == ("succeeded", 1)
        assert len(replicate.creates(ended["id"])) == 1

    def test_key_that_is_sent_twice_and_a_message_that_is_delivered_twice_start_one(
        self, queue: Queue, replicate: LocalReplicate
    ) -> None:
        keyed = sleeper(idempotency_key=f"order-{uuid.uuid4()}")
        for _ in range(3):
            queue.send(keyed)
        (first,) = queue.ended()
        # SQS may deliver one message twice: to the function it is the same event again.
        event = _record(str(uuid.uuid4()), sleeper(0.5))
        for _ in range(3):
            assert _invoke(queue.cloud, event) == {"batchItemFailures": []}
        queue.handled()
        _, second = queue.ended(2)
        assert [len(replicate.creates(each["id"])) for each in (first, second)] == [1, 1]
        assert len(replicate.creates()) == 2

    def test_poison_is_kept_with_its_reason_and_holds_up_no_other(
        self, queue: Queue, replicate: LocalReplicate
    ) -> None:
        queue.send(sleeper())
        poison = queue.send('{"model": "local/sleeper", "input"')
        queue.send(sleeper(owner="alice"))
        queue.send(sleeper())
        assert {each["status"] for each in queue.ended(2)} == {"succeeded"}
        queue.handled()
        queue.wait_until(lambda: queue.dead() == 2, 20, "two dead letters")
        listed = {each["id"]: each for each in json.loads(queue.command("list", "requests", "--json").stdout)}
        assert listed[poison]["reason"] == "The body is not JSON at line 1, column 35."
        (other,) = [each for each in listed.values() if each["id"] != poison]
        assert other["reason"].startswith("owner: Unknown field.")
        assert len(replicate.creates()) == 2

    def test_input_that_its_model_refuses_ends_failed_with_the_field(
        self, queue: Queue, replicate: LocalReplicate
    ) -> None:
        queue.send({"model": "local/painter", "input": {"seed": -1}})
        (ended,) = queue.ended()
        assert ended["status"] == "failed"
        assert "input.prompt" in ended["error"]
        assert replicate.creates() == []

    def test_redriven_after_mending_it_starts_and_nothing_starts_twice(
        self, queue: Queue, replicate: LocalReplicate
    ) -> None:
        hook = sleeper(webhook="http://127.0.0.1:9/")
        with variable(queue.cloud, "ALLOW_LOOPBACK_WEBHOOKS", "false"):
            message_id = queue.send(hook)
            queue.wait_until(lambda: queue.dead() == 1, 30, "a dead letter")
            # A function that is changed before it has done with a message leaves it hidden for three minutes.
            queue.handled()
        assert queue.started() == []
        assert "Redriven: 1." in queue.command("redrive", "requests", "--id", message_id).stderr
        (ended,) = queue.ended()
        assert queue.dead() == 0
        # Given up all the same, after it had started: as where the function died each time after that.
        queue.sqs.send_message(
            QueueUrl=queue.dead_url,
            MessageBody=json.dumps(hook),
            MessageAttributes={
                name: {"DataType": "String", "StringValue": value}
                for name, value in {"request_id": message_id, "sender": "AIDA", "sent_at": "1750000000"}.items()
            },
        )
        assert "Redriven: 1." in queue.command("redrive", "requests").stderr
        assert [each["id"] for each in queue.started()] == [ended["id"]]
        assert len(replicate.creates()) == 1

    def test_refused_again_it_is_listed_again(self, queue: Queue) -> None:
        message_id = queue.send("{")
        queue.wait_until(lambda: queue.dead() == 1, 30, "a dead letter")
        queue.command("redrive", "requests")
        queue.wait_until(lambda: queue.dead() == 1, 20, "the dead letter to be back")
        (listed,) = json.loads(queue.command("list", "requests", "--json").stdout)
        assert (listed["id"], listed["body"]) == (message_id, "{")


def _record(message_id: str, body: dict[str, Any]) -> dict[str, Any]:
    attributes = {"SenderId": "AIDAEXAMPLE0000", "SentTimestamp": "1750000000000"}
    record = {"messageId": message_id, "body": json.dumps(body), "attributes": attributes, "messageAttributes": {}}
    return {"Records": [record | {"eventSource": "aws:sqs"}]}


def _invoke(cloud: LocalCloud, event: dict[str, Any]) -> Any:
    answer = cloud.client("lambda").invoke(
        FunctionName=cloud.functions["start_from_queue"], Payload=json.dumps(event).encode()
    )
    return json.loads(answer["Payload"].read())


@contextmanager
def variable(cloud: LocalCloud, name: str, value: str) -> Iterator[None]:
    """start_from_queue with another value of a variable."""
    client, function = cloud.client("lambda"), cloud.functions["start_from_queue"]
    before = client.get_function_configuration(FunctionName=function)["Environment"]["Variables"]
    client.update_function_configuration(FunctionName=function, Environment={"Variables": before | {name: value}})
    try:
        yield
    finally:
        client.update_function_configuration(FunctionName=function, Environment={"Variables": before})


class Bus:
    """A queue to which a rule sends what the stack puts on its bus."""

    def __init__(self, cloud: LocalCloud, wait_until: WaitUntil, pattern: dict[str, Any]) -> None:
        self._sqs, self._events = cloud.client("sqs"), cloud.client("events")
        self._bus = cloud.outputs["EventBusName"]
        self._name = f"rule-{uuid.uuid4().hex[:8]}"
        self._url = self._sqs.create_queue(QueueName=self._name)["QueueUrl"]
        arn = self._sqs.get_queue_attributes(QueueUrl=self._url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        self._events.put_rule(Name=self._name, EventBusName=self._bus, EventPattern=json.dumps(pattern))
        self._events.put_targets(Rule=self._name, EventBusName=self._bus, Targets=[{"Id": "queue", "Arn": arn}])
        self._wait_until = wait_until
        self.seen: list[dict[str, Any]] = []

    def of(self, prediction_id: str, count: int) -> list[dict[str, Any]]:
        """The events of a prediction, once there are so many."""

        def found() -> list[dict[str, Any]] | None:
            messages = self._sqs.receive_message(QueueUrl=self._url, MaxNumberOfMessages=10).get("Messages", [])
            for message in messages:
                self.seen.append(json.loads(message["Body"]))
                self._sqs.delete_message(QueueUrl=self._url, ReceiptHandle=message["ReceiptHandle"])
            of_it = [event for event in self.seen if event["detail"]["id"] == prediction_id]
            return of_it if len(of_it) >= count else None

        events: list[dict[str, Any]] = self._wait_until(found, 20, f"{count} events of {prediction_id}")
        return events

    def close(self) -> None:
        self._events.remove_targets(Rule=self._name, EventBusName=self._bus, Ids=["queue"])
        self._events.delete_rule(Name=self._name, EventBusName=self._bus)
        self._sqs.delete_queue(QueueUrl=self._url)


@pytest.fixture
def bus(cloud: LocalCloud, wait_until: WaitUntil, replicate: LocalReplicate) -> Iterator[Bus]:
    bus = Bus(cloud, wait_until, {"source": ["replicate-serverless"]})
    yield bus
    bus.close()


class TestEvents:
    def test_start_and_end_are_told_with_the_places_of_the_files(self, cloud: LocalCloud, api: Api, bus: Bus) -> None:
        body = {"version": "local/painter", "input": {"prompt": "CANARY in the mist"}}
        created = api("alice").post("/predictions", json=body).json()
        started, succeeded = bus.of(created["id"], 2)
        assert [started["detail-type"], succeeded["detail-type"]] == ["Prediction Started", "Prediction Succeeded"]
        detail = succeeded["detail"]
        assert (detail["version"], detail["owner"], detail["status"]) == ("1", "alice", "succeeded")
        (file,) = detail["output_files"]
        bucket, _, key = file["uri"].removeprefix("s3://").partition("/")
        assert cloud.client("s3").head_object(Bucket=bucket, Key=key)["ContentLength"] == file["bytes"]
        assert "CANARY" not in json.dumps(bus.seen)

    @pytest.mark.parametrize(("model", "status"), [("crasher", "failed"), ("sleeper", "canceled")])
    def test_other_ends_are_told(self, api: Api, bus: Bus, model: str, status: str) -> None:
        asked = {"version": f"local/{model}", "input": {"seconds": 60} if model == "sleeper" else {}}
        created = api("alice").post("/predictions", json=asked).json()
        if status == "canceled":
            api("alice").post(f"/predictions/{created['id']}/cancel").raise_for_status()
        _, ended = bus.of(created["id"], 2)
        assert (ended["detail-type"], ended["detail"]["status"]) == (f"Prediction {status.capitalize()}", status)
        assert bool(ended["detail"]["error"]) is (status == "failed")

    def test_prediction_of_a_webhook_runs_six_functions_at_most(
        self, cloud: LocalCloud, api: Api, bus: Bus, quiet: None
    ) -> None:
        before: Counter[str] = cloud.invocations()
        created = api("alice").post("/predictions", json={"version": "local/painter", "input": {"prompt": "x"}}).json()
        bus.of(created["id"], 2)
        time.sleep(1.5)  # the emulator reads the stream each second
        ran = cloud.invocations() - before
        for others in ("authorize_request", "read_prediction", "read_predictions", "sweep_predictions"):
            del ran[others]
        assert 1 <= ran["publish_changes"] <= 2, "for the events of its start and end, at once or one by one"
        assert sum(ran.values()) <= 6, ran


def _role(cloud: LocalCloud, name: str) -> str:
    """A role as docs/step-functions.md says the machine's has to be."""
    iam = cloud.client("iam")
    arn = cloud.outputs["RequestsQueueArn"]
    trusted = {"Effect": "Allow", "Principal": {"Service": "states.amazonaws.com"}, "Action": "sts:AssumeRole"}
    allowed = {"Effect": "Allow", "Action": "sqs:SendMessage", "Resource": arn}
    document = {"Version": "2012-10-17"}
    role = iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(document | {"Statement": [trusted]}))
    policy = json.dumps(document | {"Statement": [allowed]})
    iam.put_role_policy(RoleName=name, PolicyName="send", PolicyDocument=policy)
    return str(role["Role"]["Arn"])


class Machine:
    """The sample state machine."""

    def __init__(self, queue: Queue, model: str) -> None:
        self._states = queue.cloud.client("stepfunctions")
        self._wait_until = queue.wait_until
        definition = SAMPLE.read_text().replace("${RequestsQueueUrl}", queue.url).replace("${Model}", model)
        name = f"caller-{uuid.uuid4().hex[:8]}"
        self.arn = self._states.create_state_machine(
            name=name, definition=definition, roleArn=_role(queue.cloud, name)
        )["stateMachineArn"]

    def start(self, **input_: Any) -> str:
        started = self._states.start_execution(stateMachineArn=self.arn, input=json.dumps({"input": input_}))
        return str(started["executionArn"])

    def end(self, execution: str) -> dict[str, Any]:
        def over() -> dict[str, Any] | None:
            found: dict[str, Any] = self._states.describe_execution(executionArn=execution)
            return found if found["status"] != "RUNNING" else None

        ended: dict[str, Any] = self._wait_until(over, 40, "the execution to end")
        assert ended["status"] == "SUCCEEDED", ended
        said: dict[str, Any] = json.loads(ended["output"])
        return said


class TestStateMachines:
    def test_state_goes_on_with_the_files_of_its_prediction(self, queue: Queue, replicate: LocalReplicate) -> None:
        machine = Machine(queue, "local/painter")
        said = machine.end(machine.start(prompt="a harbour"))
        (ended,) = queue.ended()
        assert said["prediction"] == ended["id"]
        (file,) = said["files"]
        assert file["uri"] == said["output"]
        assert file["uri"].endswith(ended["output_files"][0]["key"])
        assert len(replicate.creates()) == 1

    def test_failure_and_refusal_can_be_caught(self, queue: Queue) -> None:
        machine = Machine(queue, "local/crasher")
        said = machine.end(machine.start())
        assert (said["reason"], said["status"]) == ("PredictionFailed", "failed")
        assert said["error"]
        machine = Machine(queue, "no slash")
        said = machine.end(machine.start())
        assert said["reason"] == "RequestRefused"
        assert said["error"].startswith("model: ")

    def test_message_that_is_sent_twice_starts_one_and_is_told_once(
        self, queue: Queue, replicate: LocalReplicate
    ) -> None:
        machine = Machine(queue, "local/sleeper")
        execution = machine.start(seconds=3)
        (started,) = queue.wait_until(queue.started, 20, "the prediction to start")
        callers = queue.cloud.client("dynamodb").query(
            TableName=queue.cloud.stack.table_name,
            KeyConditionExpression="pk = :pk AND begins_with(sk, :caller)",
            ExpressionAttributeValues={":pk": {"S": f"prediction#{started['id']}"}, ":caller": {"S": "caller#"}},
        )["Items"]
        assert len(callers) == 1
        again = sleeper(3, lifetime="1h", idempotency_key=f"{execution}:Paint",
                        task_token=callers[0]["task_token"]["S"])  # fmt: skip
        queue.send(again)
        assert machine.end(execution)["prediction"] == started["id"]
        queue.send(again)
        queue.handled()
        queue.ended()
        assert len(replicate.creates()) == 1
        assert queue.dead() == 0
