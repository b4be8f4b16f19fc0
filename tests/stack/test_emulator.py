"""The emulator refuses what AWS refuses: on an emulator alone, with nothing deployed."""

import io
import itertools
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from botocore.exceptions import ClientError

from local.cloud import REGION, LocalCloud

CONCURRENCY = 2
ACCOUNT = "000000000000"
NUMBERS = itertools.count()


class Emulator(LocalCloud):
    """An emulator without a stack."""

    def __enter__(self) -> Self:
        self.run_directory = self._make_run_directory()
        self._start_emulator()
        return self

    def role(self, service: str, *allowed: dict[str, Any], name: str) -> str:
        """Create a role of a service with the statements of a policy, and return its ARN."""
        trust = {"Effect": "Allow", "Principal": {"Service": f"{service}.amazonaws.com"}, "Action": "sts:AssumeRole"}
        iam = self.client("iam")
        created = iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps({"Statement": [trust]}))
        if allowed:
            policy = json.dumps(
                {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", **each} for each in allowed]}
            )
            iam.put_role_policy(RoleName=name, PolicyName="allowed", PolicyDocument=policy)
        return str(created["Role"]["Arn"])

    def function(self, name: str, code: str, *allowed: dict[str, Any]) -> str:
        """Create a function, and return its ARN."""
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as opened:
            opened.writestr("app.py", code)
        created = self.client("lambda").create_function(
            FunctionName=name,
            Runtime="python3.13",
            Role=self.role("lambda", *allowed, name=f"{name}-role"),
            Handler="app.handle",
            Code={"ZipFile": archive.getvalue()},
            Timeout=30,
        )
        return str(created["FunctionArn"])


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with Emulator(concurrency=CONCURRENCY, directory=tmp_path_factory.mktemp("emulator")) as started:
        yield started


@pytest.fixture(scope="module")
def http(emulator: Emulator) -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=30) as client:
        yield client


# -- the account's concurrency --------------------------------------------------------------------------------------

HOLD = """
import json, pathlib, time
def handle(event, context):
    for record in event.get("Records", [event]):
        told = json.loads(record["body"]) if "body" in record else record
        told = told.get("detail") or told
        pathlib.Path(told["began"]).touch()
        while not pathlib.Path(told["until"]).exists():
            time.sleep(0.01)
"""
QUICK = """
import json, pathlib
def handle(event, context):
    for record in event.get("Records", []):
        if "dynamodb" in record:
            record["body"] = json.dumps({"began": record["dynamodb"]["Keys"]["pk"]["S"]})
        pathlib.Path(json.loads(record["body"])["began"]).touch()
    if "began" in (event.get("detail") or event):
        pathlib.Path((event.get("detail") or event)["began"]).touch()
    return {"statusCode": 200, "body": "ran"}
"""


JSON = "application/json"


class Api:
    """A REST API whose root is a function."""

    def __init__(self, emulator: Emulator, function: str) -> None:
        self.gateway = emulator.client("apigateway")
        self.id = self.gateway.create_rest_api(name="api")["id"]
        self.url = f"{emulator.endpoint_url}/_aws/execute-api/{self.id}/v1"
        root = self.gateway.get_resources(restApiId=self.id)["items"][0]["id"]
        self.root = {"restApiId": self.id, "resourceId": root}
        self.put("GET", function)

    def put(self, method: str, function: str) -> None:
        """Pass requests of a method on to a function."""
        uri = f"arn:aws:apigateway:{REGION}:lambda:path/2015-03-31/functions/{function}/invocations"
        self.gateway.put_method(**self.root, httpMethod=method, authorizationType="NONE")
        self.gateway.put_integration(
            **self.root, httpMethod=method, type="AWS_PROXY", integrationHttpMethod="POST", uri=uri
        )

    def deploy(self) -> None:
        """Make a deployment, and point the stage at it."""
        self.gateway.create_deployment(restApiId=self.id, stageName="v1")


def ended(emulator: Emulator, role: str, state: dict[str, Any]) -> tuple[str, str]:
    """Run a machine of one state to its end, and return error and cause (empty where it succeeded)."""
    machines = emulator.client("stepfunctions")
    definition = {"StartAt": "Only", "States": {"Only": {**state, "End": True}}}
    name = f"machine-{next(NUMBERS)}"
    machine = machines.create_state_machine(name=name, definition=json.dumps(definition), roleArn=role)
    execution = machines.start_execution(stateMachineArn=machine["stateMachineArn"])["executionArn"]

    def last() -> Any:
        described = machines.describe_execution(executionArn=execution)
        return described if described["status"] != "RUNNING" else None

    described = wait(last)
    return described.get("error", ""), described.get("cause", "")


class Account:
    """Two functions, and the account's concurrency: used up from `use_up` to `let_go`."""

    def __init__(self, emulator: Emulator, folder: Path) -> None:
        self.emulator = emulator
        self.folder = folder
        self.holding = emulator.function("holding", HOLD)
        self.quick = emulator.function("quick", QUICK)
        self.pool = ThreadPoolExecutor(CONCURRENCY)
        self.until = folder / "never"

    def use_up(self, name: str) -> None:
        self.until = self.folder / f"{name}-until"
        began = [self.folder / f"{name}-holding-{n}" for n in range(CONCURRENCY)]
        self.held = [
            self.pool.submit(
                self.emulator.client("lambda").invoke,
                FunctionName="holding",
                Payload=json.dumps({"began": str(each), "until": str(self.until)}),
            )
            for each in began
        ]
        wait(lambda: all(each.exists() for each in began))

    def let_go(self) -> None:
        self.until.touch()
        for each in self.held:
            assert "FunctionError" not in each.result()

    def file(self, name: str) -> Path:
        return self.folder / name


def wait(until: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := until()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def account(emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    made = Account(emulator, tmp_path_factory.mktemp("account"))
    yield made
    made.pool.shutdown()


@pytest.fixture
def used_up(account: Account, request: pytest.FixtureRequest) -> Iterator[Account]:
    account.use_up(request.node.name)
    try:
        yield account
    finally:
        account.let_go()


def throttles(account: Account) -> float:
    """Return how many calls of `quick` were refused so far."""
    now = datetime.now(UTC)
    found = account.emulator.client("cloudwatch").get_metric_statistics(
        Namespace="AWS/Lambda",
        MetricName="Throttles",
        Dimensions=[{"Name": "FunctionName", "Value": "quick"}],
        StartTime=now - timedelta(hours=1),
        EndTime=now + timedelta(hours=1),
        Period=86400,
        Statistics=["Sum"],
    )
    return sum(each["Sum"] for each in found["Datapoints"])


def runs_later(account: Account, name: str, send: Callable[[dict[str, str]], Any]) -> None:
    """Send an event while no function can run: nothing runs until the concurrency is there again."""
    before, began = throttles(account), account.file(name)
    send({"began": str(began)})
    wait(lambda: throttles(account) > before)
    assert not began.exists()
    account.let_go()
    wait(began.exists)


def test_invoke_beyond_the_concurrency_is_refused_with_429(used_up: Account) -> None:
    functions = used_up.emulator.client("lambda")
    assert functions.get_account_settings()["AccountLimit"]["ConcurrentExecutions"] == CONCURRENCY
    with pytest.raises(ClientError) as refused:
        functions.invoke(FunctionName="quick", Payload=b"{}")
    assert refused.value.response["Error"]["Code"] == "TooManyRequestsException"
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 429
    assert refused.value.response["Reason"] == "ConcurrentInvocationLimitExceeded"


def test_asynchronous_event_beyond_the_concurrency_runs_later_and_needs_no_retry(used_up: Account) -> None:
    functions = used_up.emulator.client("lambda")
    functions.put_function_event_invoke_config(FunctionName="quick", MaximumRetryAttempts=0)
    runs_later(
        used_up,
        "asynchronous",
        lambda told: functions.invoke(FunctionName="quick", InvocationType="Event", Payload=json.dumps(told)),
    )


def test_event_of_a_rule_beyond_the_concurrency_runs_later(used_up: Account) -> None:
    events = used_up.emulator.client("events")
    events.put_rule(Name="quick", EventPattern='{"source": ["test"]}')
    events.put_targets(Rule="quick", Targets=[{"Id": "quick", "Arn": used_up.quick}])
    runs_later(
        used_up,
        "by-rule",
        lambda told: events.put_events(Entries=[{"Source": "test", "DetailType": "t", "Detail": json.dumps(told)}]),
    )


def test_message_beyond_the_concurrency_runs_before_it_would_come_back(used_up: Account) -> None:
    sqs = used_up.emulator.client("sqs")
    queue = sqs.create_queue(QueueName="waiting", Attributes={"VisibilityTimeout": "60"})["QueueUrl"]
    arn = f"arn:aws:sqs:{REGION}:{ACCOUNT}:waiting"
    used_up.emulator.client("lambda").create_event_source_mapping(FunctionName="quick", EventSourceArn=arn)
    runs_later(used_up, "by-message", lambda told: sqs.send_message(QueueUrl=queue, MessageBody=json.dumps(told)))


def test_message_beyond_the_concurrency_comes_back_after_its_visibility_timeout(used_up: Account) -> None:
    sqs = used_up.emulator.client("sqs")
    queue = sqs.create_queue(QueueName="returning", Attributes={"VisibilityTimeout": "1"})["QueueUrl"]
    arn = f"arn:aws:sqs:{REGION}:{ACCOUNT}:returning"
    before = throttles(used_up)
    mapping = used_up.emulator.client("lambda").create_event_source_mapping(FunctionName="quick", EventSourceArn=arn)
    began = used_up.file("returned")
    sqs.send_message(QueueUrl=queue, MessageBody=json.dumps({"began": str(began)}))
    wait(lambda: throttles(used_up) >= before + 2)
    used_up.let_go()
    wait(began.exists)
    used_up.emulator.client("lambda").delete_event_source_mapping(UUID=mapping["UUID"])


def test_record_of_a_stream_beyond_the_concurrency_waits(used_up: Account) -> None:
    dynamodb = used_up.emulator.client("dynamodb")
    table = dynamodb.create_table(
        TableName="streamed",
        KeySchema=[{"AttributeName": "pk", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "pk", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
        StreamSpecification={"StreamEnabled": True, "StreamViewType": "NEW_IMAGE"},
    )["TableDescription"]
    used_up.emulator.client("lambda").create_event_source_mapping(
        FunctionName="quick", EventSourceArn=table["LatestStreamArn"], StartingPosition="TRIM_HORIZON"
    )
    runs_later(
        used_up,
        "by-stream",
        lambda told: dynamodb.put_item(TableName="streamed", Item={"pk": {"S": told["began"]}}),
    )


def test_api_answers_500_beyond_the_concurrency(used_up: Account, http: httpx.Client) -> None:
    api = Api(used_up.emulator, used_up.quick)
    api.deploy()
    answer = http.get(api.url)
    assert (answer.status_code, answer.json()) == (500, {"message": "Internal server error"})
    api.gateway.put_gateway_response(
        restApiId=api.id, responseType="INTEGRATION_FAILURE", statusCode="502", responseTemplates={JSON: "{}"}
    )
    api.deploy()
    answer = http.get(api.url)
    assert (answer.status_code, answer.json()) == (502, {})
    used_up.let_go()
    assert http.get(api.url).text == "ran"


def test_state_beyond_the_concurrency_fails_with_the_name_of_the_error(used_up: Account) -> None:
    role = used_up.emulator.role(
        "states", {"Action": "lambda:InvokeFunction", "Resource": used_up.quick}, name="throttled-machine"
    )
    error, cause = ended(
        used_up.emulator,
        role,
        {"Type": "Task", "Resource": "arn:aws:states:::lambda:invoke", "Parameters": {"FunctionName": "quick"}},
    )
    assert error == "Lambda.TooManyRequestsException"
    assert cause.startswith("Rate Exceeded")
