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

import boto3
import httpx
import pytest
from botocore.config import Config
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
        self.held = [self.pool.submit(self.hold, each) for each in began]
        wait(lambda: all(each.exists() for each in began))

    def hold(self, began: Path) -> Any:
        functions = self.emulator.client("lambda")
        payload = json.dumps({"began": str(began), "until": str(self.until)})

        def held() -> Any:
            # What ran in the test before may still be about to end.
            try:
                return functions.invoke(FunctionName="holding", Payload=payload)
            except functions.exceptions.TooManyRequestsException:
                return None

        return wait(held)

    def let_go(self) -> None:
        self.until.touch()
        for each in self.held:
            assert "FunctionError" not in each.result()

    def file(self, name: str) -> Path:
        return self.folder / name


def wait(until: Callable[[], Any], seconds: float = 60) -> Any:
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
    return float(sum(each["Sum"] for each in found["Datapoints"]))


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
    assert dict(refused.value.response)["Reason"] == "ConcurrentInvocationLimitExceeded"


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


# -- REST APIs ------------------------------------------------------------------------------------------------------

ECHO = """
import json
def handle(event, context):
    return {"statusCode": 200, "body": json.dumps({name: event[name] for name in ("headers", "multiValueHeaders")})}
"""


@pytest.fixture(scope="module")
def echo(emulator: Emulator) -> str:
    """A function that returns the headers of its event."""
    return emulator.function("echo", ECHO)


def test_event_of_an_api_has_no_content_length(emulator: Emulator, http: httpx.Client, echo: str) -> None:
    api = Api(emulator, echo)
    api.put("POST", echo)
    api.deploy()
    event = http.post(api.url, json={}, headers={"X-Kept": "yes"}).json()
    for part in event.values():
        assert {"x-kept", "content-type"} <= {name.lower() for name in part}
        assert "content-length" not in {name.lower() for name in part}


def test_stage_serves_its_deployment_until_the_next_one(emulator: Emulator, http: httpx.Client, echo: str) -> None:
    api = Api(emulator, echo)
    api.deploy()
    api.put("POST", echo)
    api.gateway.delete_method(**api.root, httpMethod="GET")
    answers = [http.request(method, api.url).status_code for method in ("GET", "POST")]
    assert answers == [200, 403]
    first = api.gateway.get_stage(restApiId=api.id, stageName="v1")["deploymentId"]
    api.deploy()
    answers = [http.request(method, api.url).status_code for method in ("GET", "POST")]
    assert answers == [403, 200]
    back = [{"op": "replace", "path": "/deploymentId", "value": first}]
    api.gateway.update_stage(restApiId=api.id, stageName="v1", patchOperations=back)
    assert http.get(api.url).status_code == 200


def defined(function: str, path: str, origin: str) -> dict[str, Any]:
    """Return a definition of an API, as SAM writes it."""
    uri = f"arn:aws:apigateway:{REGION}:lambda:path/2015-03-31/functions/{function}/invocations"
    allowed = {"method.response.header.Access-Control-Allow-Origin": f"'{origin}'"}
    return {
        "openapi": "3.0.1",
        "info": {"title": "defined", "version": "1"},
        "paths": {
            path: {
                "get": {
                    "operationId": "echo",
                    "x-amazon-apigateway-integration": {"type": "aws_proxy", "httpMethod": "POST", "uri": uri},
                },
                "options": {
                    "x-amazon-apigateway-integration": {
                        "type": "mock",
                        "requestTemplates": {JSON: '{"statusCode": 200}'},
                        "responses": {"default": {"statusCode": "200", "responseParameters": allowed}},
                    }
                },
            }
        },
        "x-amazon-apigateway-binary-media-types": ["multipart/form-data"],
        "x-amazon-apigateway-gateway-responses": {
            "MISSING_AUTHENTICATION_TOKEN": {"statusCode": 404, "responseTemplates": {JSON: json.dumps(origin)}}
        },
    }


def template(body: dict[str, Any], *deployments: str) -> dict[str, Any]:
    """Return a template of an API with deployments; the stage is at the last one."""
    api = {"Ref": "Api"}
    stage = {"RestApiId": api, "DeploymentId": {"Ref": deployments[-1]}, "StageName": "v1"}
    return {
        "Api": {"Type": "AWS::ApiGateway::RestApi", "Properties": {"Body": body}},
        **{each: {"Type": "AWS::ApiGateway::Deployment", "Properties": {"RestApiId": api}} for each in deployments},
        "Stage": {"Type": "AWS::ApiGateway::Stage", "Properties": stage},
    }


def test_changed_definition_keeps_the_api_and_is_served_by_a_new_deployment_only(
    emulator: Emulator, http: httpx.Client, echo: str
) -> None:
    def served(path: str) -> tuple[int, str, int, str]:
        preflight = http.options(f"{url}{path}")
        missing = http.get(f"{url}/none")
        origin = preflight.headers.get("Access-Control-Allow-Origin", "")
        return http.get(f"{url}{path}").status_code, origin, missing.status_code, missing.text

    stack = Deployed(emulator, "defined", template(defined(echo, "/old", "https://old"), "First"))
    api_id = stack.resources()["Api"]
    url = f"{emulator.endpoint_url}/_aws/execute-api/{api_id}/v1"
    assert served("/old") == (200, "https://old", 404, '"https://old"')
    assert emulator.client("apigateway").get_rest_api(restApiId=api_id)["binaryMediaTypes"] == ["multipart/form-data"]
    listed = emulator.client("apigateway").get_resources(restApiId=api_id, embed=["methods"])["items"]
    assert [each["resourceMethods"]["GET"]["operationName"] for each in listed if each["path"] == "/old"] == ["echo"]

    # A template whose deployment stays the same: the stage, too.
    new = defined(echo, "/new", "https://new")
    assert stack.update(template(new, "First")) == "UPDATE_COMPLETE"
    assert stack.resources()["Api"] == api_id
    assert served("/old") == (200, "https://old", 404, '"https://old"')
    assert http.get(f"{url}/new").status_code == 404

    assert stack.update(template(new, "Second")) == "UPDATE_COMPLETE"
    assert stack.resources()["Api"] == api_id
    assert served("/new") == (200, "https://new", 404, '"https://new"')
    assert http.get(f"{url}/old").status_code == 404


# -- CloudFormation, buses and schedules ----------------------------------------------------------------------------


class Deployed:
    """A stack of resources."""

    def __init__(self, emulator: Emulator, name: str, resources: dict[str, Any]) -> None:
        self.cloudformation = emulator.client("cloudformation")
        self.id = self.cloudformation.create_stack(StackName=name, TemplateBody=self.body(resources))["StackId"]
        self.status = self.settled()

    @staticmethod
    def body(resources: dict[str, Any]) -> str:
        return json.dumps({"Resources": resources})

    def settled(self) -> str:
        """Wait until the stack does not change any more, and return its status."""

        def status() -> str:
            found = str(self.cloudformation.describe_stacks(StackName=self.id)["Stacks"][0]["StackStatus"])
            return "" if found.endswith("IN_PROGRESS") else found

        return str(wait(status))

    def update(self, resources: dict[str, Any]) -> str:
        self.cloudformation.update_stack(StackName=self.id, TemplateBody=self.body(resources))
        return self.settled()

    def delete(self) -> str:
        self.cloudformation.delete_stack(StackName=self.id)
        return self.settled()

    def resources(self) -> dict[str, str]:
        found = self.cloudformation.describe_stack_resources(StackName=self.id)["StackResources"]
        return {each["LogicalResourceId"]: each["PhysicalResourceId"] for each in found}

    def reasons(self) -> str:
        events = self.cloudformation.describe_stack_events(StackName=self.id)["StackEvents"]
        return " ".join(each.get("ResourceStatusReason", "") for each in events)


def schedule(function: str) -> dict[str, Any]:
    return {
        "ScheduleExpression": "rate(1 hour)",
        "FlexibleTimeWindow": {"Mode": "OFF"},
        "Target": {"Arn": function, "RoleArn": f"arn:aws:iam::{ACCOUNT}:role/none"},
    }


def test_schedule_with_a_taken_name_is_refused(emulator: Emulator, echo: str) -> None:
    scheduler = emulator.client("scheduler")
    scheduler.create_schedule(Name="taken", **schedule(echo))
    with pytest.raises(ClientError) as refused:
        scheduler.create_schedule(Name="taken", **schedule(echo))
    assert refused.value.response["Error"]["Code"] == "ConflictException"
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 409
    scheduler.create_schedule_group(Name="another")
    scheduler.create_schedule(Name="taken", GroupName="another", **schedule(echo))

    wanted = {"Type": "AWS::Scheduler::Schedule", "Properties": {"Name": "taken", **schedule(echo)}}
    stack = Deployed(emulator, "schedules", {"Schedule": wanted})
    assert stack.status == "ROLLBACK_COMPLETE"
    assert "Schedule taken already exists in group default" in stack.reasons()
    scheduler.get_schedule(Name="taken")  # the other one's


def test_bus_with_rules_cannot_be_deleted(emulator: Emulator) -> None:
    events = emulator.client("events")
    stack = Deployed(emulator, "buses", {"Bus": {"Type": "AWS::Events::EventBus", "Properties": {"Name": "bus"}}})
    events.put_rule(Name="mine", EventBusName="bus", EventPattern='{"source": ["test"]}')
    with pytest.raises(ClientError, match=r"EventBus can't be deleted since it has rules\.") as refused:
        events.delete_event_bus(Name="bus")
    assert refused.value.response["Error"]["Code"] == "ValidationException"
    assert stack.delete() == "DELETE_FAILED"
    assert "EventBus can't be deleted since it has rules." in stack.reasons()
    assert events.list_rules(EventBusName="bus")["Rules"]

    events.delete_rule(Name="mine", EventBusName="bus")
    assert stack.delete() == "DELETE_COMPLETE"


# -- roles of state machines ----------------------------------------------------------------------------------------


class Tasks:
    """A state for each service, the statement that allows it, and the error without it."""

    def __init__(self, emulator: Emulator, function: str) -> None:
        dynamodb, key = emulator.client("dynamodb"), {"pk": {"S": "mine#1"}}
        dynamodb.create_table(
            TableName="items",
            KeySchema=[{"AttributeName": "pk", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "pk", "AttributeType": "S"}],
            BillingMode="PAY_PER_REQUEST",
        )
        queue = emulator.client("sqs").create_queue(QueueName="asked")["QueueUrl"]
        emulator.client("s3").create_bucket(Bucket="lines")
        emulator.client("s3").put_object(Bucket="lines", Key="in/all.jsonl", Body=b'{"n": 1}')
        children = f"arn:aws:states:{REGION}:{ACCOUNT}:stateMachine:*"
        table = f"arn:aws:dynamodb:{REGION}:{ACCOUNT}:table/items"
        put = {"TableName": "items", "Item": key}
        started, read, written = (
            {"Action": "states:StartExecution", "Resource": children},
            {"Action": "s3:GetObject", "Resource": "arn:aws:s3:::lines/in/*"},
            {"Action": "s3:PutObject", "Resource": "arn:aws:s3:::lines/out/*"},
        )
        self.others = [started, read, written]
        run_lines = {
            "Type": "Map",
            "ItemReader": {
                "Resource": "arn:aws:states:::s3:getObject",
                "ReaderConfig": {"InputType": "JSONL"},
                "Parameters": {"Bucket": "lines", "Key": "in/all.jsonl"},
            },
            "ItemProcessor": {
                "ProcessorConfig": {"Mode": "DISTRIBUTED", "ExecutionType": "STANDARD"},
                "StartAt": "Line",
                "States": {"Line": {"Type": "Pass", "End": True}},
            },
            "ResultWriter": {
                "Resource": "arn:aws:states:::s3:putObject",
                "Parameters": {"Bucket": "lines", "Prefix": "out/runs"},
            },
        }
        leading = {"ForAllValues:StringLike": {"dynamodb:LeadingKeys": "mine#*"}}
        self.each: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
            "function": (
                self.task("lambda:invoke", {"FunctionName": function}),
                {"Action": "lambda:InvokeFunction", "Resource": function},
                "Lambda.AWSLambdaException",
            ),
            "table": (
                self.task("dynamodb:putItem", put),
                {"Action": "dynamodb:PutItem", "Resource": table},
                "DynamoDB.AmazonDynamoDBException",
            ),
            "table by SDK": (
                self.task("aws-sdk:dynamodb:putItem", put),
                {"Action": "dynamodb:PutItem", "Resource": table, "Condition": leading},
                "DynamoDb.DynamoDbException",
            ),
            "queue": (
                self.task("sqs:sendMessage", {"QueueUrl": queue, "MessageBody": {"n": 1}}),
                {"Action": "sqs:SendMessage", "Resource": f"arn:aws:sqs:{REGION}:{ACCOUNT}:asked"},
                "SQS.AmazonSQSException",
            ),
            "another machine": (
                self.task("states:startExecution", {"StateMachineArn": self.machine(emulator), "Input": {}}),
                started,
                "StepFunctions.AWSStepFunctionsException",
            ),
            "children of a map": (run_lines, started, "States.Permissions"),
            "lines of a map": (run_lines, read, "States.ItemReaderFailed"),
            "results of a map": (run_lines, written, "States.ResultWriterFailed"),
        }

    @staticmethod
    def machine(emulator: Emulator) -> str:
        definition = json.dumps({"StartAt": "Only", "States": {"Only": {"Type": "Succeed"}}})
        made = emulator.client("stepfunctions").create_state_machine(
            name="another", definition=definition, roleArn=emulator.role("states", name="another-machine")
        )
        return str(made["stateMachineArn"])

    @staticmethod
    def task(resource: str, parameters: dict[str, Any]) -> dict[str, Any]:
        return {"Type": "Task", "Resource": f"arn:aws:states:::{resource}", "Parameters": parameters}


@pytest.fixture(scope="module")
def tasks(emulator: Emulator, echo: str) -> Tasks:
    return Tasks(emulator, emulator.function("invoked", "def handle(event, context): return {}"))


@pytest.mark.parametrize(
    "name",
    [
        "function",
        "table",
        "table by SDK",
        "queue",
        "another machine",
        "children of a map",
        "lines of a map",
        "results of a map",
    ],
)
def test_state_whose_role_lacks_its_action_fails_as_on_aws(emulator: Emulator, tasks: Tasks, name: str) -> None:
    state, allowed, refusal = tasks.each[name]
    others = [each for each in tasks.others if each != allowed]
    lacking = emulator.role("states", *others, name=f"lacking-{next(NUMBERS)}")
    error, cause = ended(emulator, lacking, state)
    assert error == refusal
    assert f"is not authorized to perform: {allowed['Action']} on resource: " in cause
    having = emulator.role("states", allowed, *others, name=f"having-{next(NUMBERS)}")
    assert ended(emulator, having, state) == ("", "")


def test_state_that_waits_for_a_token_fails_where_its_role_lacks_its_action(emulator: Emulator, tasks: Tasks) -> None:
    state, _, refusal = tasks.each["queue"]
    waiting = state | {"Resource": f"{state['Resource']}.waitForTaskToken", "TimeoutSeconds": 30}
    role = emulator.role("states", name=f"lacking-{next(NUMBERS)}")
    assert ended(emulator, role, waiting)[0] == refusal


# -- presigned URLs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["account", "role"])
def url(emulator: Emulator, request: pytest.FixtureRequest) -> str:
    """A presigned URL of an object, by the account itself and with the credentials of a role, as functions have."""
    s3, name = emulator.client("s3"), f"signed-{request.param}"
    s3.create_bucket(Bucket=name)
    s3.put_object(Bucket=name, Key="object", Body=b"content")
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    if request.param == "role":
        both = {"Action": ["s3:GetObject", "s3:PutObject"], "Resource": f"arn:aws:s3:::{name}/*"}
        role = emulator.role("lambda", both, name=name)
        given = emulator.client("sts").assume_role(RoleArn=role, RoleSessionName="test")["Credentials"]
        keys = {
            "aws_access_key_id": given["AccessKeyId"],
            "aws_secret_access_key": given["SecretAccessKey"],
            "aws_session_token": given["SessionToken"],
        }
    config = Config(signature_version="s3v4", s3={"addressing_style": "path"})
    session: Any = boto3.session.Session
    signer = session(**keys, region_name=REGION).client("s3", endpoint_url=emulator.endpoint_url, config=config)
    return str(signer.generate_presigned_url("get_object", {"Bucket": name, "Key": "object"}))


def code(answer: httpx.Response) -> tuple[int, str]:
    """Return the status and the code of an error of S3."""
    return answer.status_code, answer.text.partition("<Code>")[2].partition("</Code>")[0]


def test_presigned_url_is_served(http: httpx.Client, url: str) -> None:
    assert http.get(url).content == b"content"


def test_presigned_url_with_another_signature_is_refused(http: httpx.Client, url: str) -> None:
    before, _, signature = url.partition("X-Amz-Signature=")
    other = "0" if signature[0] != "0" else "1"
    assert code(http.get(f"{before}X-Amz-Signature={other}{signature[1:]}")) == (403, "SignatureDoesNotMatch")
    assert code(http.get(url.replace("/object?", "/another?"))) == (403, "SignatureDoesNotMatch")
    assert code(http.put(url)) == (403, "SignatureDoesNotMatch")


def test_expired_presigned_url_is_refused(http: httpx.Client, url: str) -> None:
    signed_at = url.partition("X-Amz-Date=")[2][:16]
    answer = http.get(url.replace(signed_at, "20200101T000000Z"))
    assert code(answer) == (403, "AccessDenied")
    assert "Request has expired" in answer.text


@pytest.mark.parametrize("authorization", ["Bearer rs_token", "AWS4-HMAC-SHA256 Credential=test/x", "Basic dTpw"])
def test_presigned_url_with_other_credentials_is_refused(http: httpx.Client, url: str, authorization: str) -> None:
    answer = http.get(url, headers={"Authorization": authorization})
    assert code(answer) == (400, "InvalidArgument")
    assert "Only one auth mechanism allowed" in answer.text
