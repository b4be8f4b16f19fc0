"""Stacks in one account, in another region than the emulator's own: two side by side, one of which is deleted and
deployed again; and one whose parameters change while predictions run.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from predictions.cli.__main__ import main

from local.cloud import CREDENTIALS, OWNER, LocalCloud, aws_client
from local.cloud import REGION as OTHER_REGION
from tests.stack.crowd import Receiver

Wait = Callable[..., Any]
Run = Callable[..., tuple[int, str, str]]

REGION = "eu-central-1"
NAME = "team"
NEIGHBOUR = f"{NAME}-recipe-b"
"""The names of its recipes' rules begin as those of the stack `NAME` do."""

BEFORE = {
    "FirstPollSeconds": "600",
    "PollSeconds": "600",
    "LiveReadSeconds": "0",
    "OutputUrlSeconds": "600",
}
AFTER = {
    "FirstPollSeconds": "2",
    "LiveReadSeconds": "1",
    "OutputUrlSeconds": "900",
    "CorsOrigin": "https://app.example.com",
    "LogLevel": "DEBUG",
    "SyncWaitSeconds": "45",
    "DeliveriesConcurrency": "20",
    "ApiRequestsPerSecond": "50",
    "RetentionDays": "60",
    "LogRetentionDays": "90",
    "Dashboard": "false",
}


@pytest.fixture(scope="module")
def team() -> Iterator[LocalCloud]:
    """A stack in the other region, and the AWS that both stacks share."""
    with LocalCloud(stack_name=NAME, region=REGION, parameters={"FirstPollSeconds": "5"}) as started:
        yield started


@pytest.fixture(scope="module")
def neighbour(team: LocalCloud) -> Iterator[LocalCloud]:
    """A second stack beside it, at the same Replicate."""
    with LocalCloud(stack_name=NEIGHBOUR, region=REGION, parameters=BEFORE, beside=team) as started:
        yield started


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def run(team: LocalCloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command as on a terminal: its exit code, stdout and stderr."""

    def command(*argv: str, region: str = REGION) -> tuple[int, str, str]:
        for name, value in {**CREDENTIALS, "AWS_REGION": region, "AWS_ENDPOINT_URL": team.endpoint_url}.items():
            monkeypatch.setenv(name, value)
        code = main(argv)
        return code, *capsys.readouterr()

    return command


class Caller:
    """Who uses one of the stacks, with an access token of it."""

    def __init__(self, cloud: LocalCloud, wait_until: Wait, owner: str = OWNER) -> None:
        self.cloud = cloud
        self.wait_until = wait_until
        self.headers = {"Authorization": f"Bearer {cloud.create_token(owner)}"}

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        sent: dict[str, Any] = {"headers": self.headers, "timeout": 60, "trust_env": False} | options
        return httpx.request(method, self.cloud.api_url + path, **sent)

    def get(self, path: str) -> Any:
        return self.call("GET", path).raise_for_status().json()

    def create(self, model: str, **body: Any) -> str:
        answer = self.call("POST", "/predictions", json={"version": f"local/{model}", "input": {}, **body})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def blob(self, **body: Any) -> str:
        return self.create("blob", input=a_blob("caller"), **body)

    def ended(self, prediction_id: str, status: str = "succeeded") -> Any:
        """Waits for the end of a prediction, and returns it."""
        path = f"/predictions/{prediction_id}"
        self.wait_until(lambda: self.get(path)["status"] not in ("starting", "processing"), 90, f"the end of {path}")
        shown = self.get(path)
        assert shown["status"] == status, shown
        return shown

    def listed(self) -> list[Any]:
        found: list[Any] = self.get("/predictions")["results"]
        return found


def a_blob(name: str) -> dict[str, Any]:
    return {"size_bytes": 3000, "name": f"{name}.bin"}


def start_by_every_way(caller: Caller, receiver: Receiver, mark: str) -> dict[str, str]:
    """Starts a prediction by HTTP, by a message and by an event; returns what else was made, by its kind."""
    cloud, input_ = caller.cloud, a_blob(mark)
    for recipe, trigger in (
        ("shop", {"pattern": {"source": ["shop"]}, "bus": "stack"}),
        ("nightly", {"schedule": {"expression": "cron(0 3 * * ? *)"}}),
    ):
        made = caller.call("PUT", f"/recipes/{recipe}", json={"model": "local/blob", "input": input_, **trigger})
        assert made.is_success, made.text
    file = caller.call("POST", "/files", files={"content": cloud.stack_name.encode()})
    assert file.status_code == 201, file.text
    http = caller.create("blob", input=input_, webhook=receiver.url)
    message = json.dumps({"model": "local/blob", "input": input_})
    cloud.client("sqs").send_message(QueueUrl=cloud.stack.queue_url, MessageBody=message)
    entry = {"Source": "shop", "DetailType": "Order", "EventBusName": cloud.stack.event_bus_name, "Detail": "{}"}
    cloud.client("events").put_events(Entries=[entry])
    recipe_ids = [each["id"] for each in caller.get("/recipes")["results"]]
    assert len(recipe_ids) == 2
    return {"http": http, "file": file.json()["id"], "link": file.json()["urls"]["get"]}


def rules_of(cloud: LocalCloud) -> dict[str, list[str]]:
    """The targets of each rule of a region, by the rule's bus and name."""
    events = cloud.client("events")
    return {
        f"{bus['Name']}/{rule['Name']}": [
            target["Arn"]
            for target in events.list_targets_by_rule(Rule=rule["Name"], EventBusName=bus["Name"])["Targets"]
        ]
        for bus in events.list_event_buses()["EventBuses"]
        for rule in events.list_rules(EventBusName=bus["Name"])["Rules"]
    }


def schedules_of(cloud: LocalCloud) -> list[str]:
    """The targets of the schedules of a stack."""
    scheduler = cloud.client("scheduler")
    names = [each["Name"] for each in scheduler.list_schedules(GroupName=cloud.stack_name)["Schedules"]]
    return sorted(
        scheduler.get_schedule(GroupName=cloud.stack_name, Name=name)["Target"]["Arn"].rpartition(":")[2]
        for name in names
    )


def items_of(cloud: LocalCloud) -> str:
    pages = cloud.client("dynamodb").get_paginator("scan").paginate(TableName=cloud.stack.table_name)
    return json.dumps([item for page in pages for item in page["Items"]], default=str)


def keys_of(cloud: LocalCloud, bucket: str) -> list[str]:
    return [each["Key"] for each in cloud.client("s3").list_objects_v2(Bucket=bucket).get("Contents", [])]


def made_in(cloud: LocalCloud, region: str) -> dict[str, list[str]]:
    """What there is of an account in a region, without what AWS itself puts there."""

    def client(service: str) -> Any:
        return aws_client(cloud.endpoint_url, service, region)

    s3 = client("s3")
    buckets = [each["Name"] for each in s3.list_buckets()["Buckets"]]
    found = {
        "stacks": [each["StackName"] for each in client("cloudformation").describe_stacks()["Stacks"]],
        "functions": [each["FunctionName"] for each in client("lambda").list_functions()["Functions"]],
        "layers": [each["LayerName"] for each in client("lambda").list_layers()["Layers"]],
        "tables": client("dynamodb").list_tables()["TableNames"],
        "queues": client("sqs").list_queues().get("QueueUrls", []),
        "machines": [each["name"] for each in client("stepfunctions").list_state_machines()["stateMachines"]],
        "buses": [each["Name"] for each in client("events").list_event_buses()["EventBuses"]],
        "rules": [each["Name"] for each in client("events").list_rules()["Rules"]],
        "schedules": [each["Name"] for each in client("scheduler").list_schedules()["Schedules"]],
        "groups of schedules": [each["Name"] for each in client("scheduler").list_schedule_groups()["ScheduleGroups"]],
        "log groups": [each["logGroupName"] for each in client("logs").describe_log_groups()["logGroups"]],
        "secrets": [each["Name"] for each in client("secretsmanager").list_secrets()["SecretList"]],
        "parameters": [each["Name"] for each in client("ssm").describe_parameters()["Parameters"]],
        "APIs": [each["name"] for each in client("apigateway").get_rest_apis()["items"]],
        "alarms": [each["AlarmName"] for each in client("cloudwatch").describe_alarms()["MetricAlarms"]],
        "dashboards": [each["DashboardName"] for each in client("cloudwatch").list_dashboards()["DashboardEntries"]],
        "buckets": [
            # https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetBucketLocation.html: none is us-east-1
            name
            for name in buckets
            if (s3.get_bucket_location(Bucket=name)["LocationConstraint"] or "us-east-1") == region
        ],
    }
    return {kind: [name for name in names if name != "default"] for kind, names in found.items()}


def execution_of(cloud: LocalCloud, prediction_id: str) -> Any:
    key = {"pk": {"S": f"prediction#{prediction_id}"}, "sk": {"S": "status"}}
    item = cloud.client("dynamodb").get_item(TableName=cloud.stack.table_name, Key=key)["Item"]
    return cloud.client("stepfunctions").describe_execution(executionArn=item["execution_arn"]["S"])


def assert_complete(caller: Caller, own: dict[str, str], receiver: Receiver, mark: str) -> set[str]:
    """Everything that was asked of a stack has run there, once; returns the ids of its predictions."""
    cloud = caller.cloud
    machines = {cloud.stack.state_machine_arn, cloud.stack.submitted_state_machine_arn}
    own_url = f"{cloud.api_url}/webhooks/replicate/"

    def started() -> list[str]:
        return [each["id"] for each in caller.listed() if mark in json.dumps(each["input"])]

    caller.wait_until(lambda: len(started()) == 3, 60, f"a prediction of each way in {cloud.stack_name}")
    ids = set(started())
    for shown in map(caller.ended, ids):
        (file,) = shown["output_files"]
        assert (file["bucket"], file["key"] in keys_of(cloud, file["bucket"])) == (cloud.stack.outputs_bucket, True)
        (signed_for,) = parse_qs(urlsplit(shown["output"]).query)["X-Amz-Credential"]
        assert signed_for.split("/")[2:] == [REGION, "s3", "aws4_request"]
        assert len(httpx.get(shown["output"], trust_env=False, timeout=60).content) == 3000
    caller.wait_until(lambda: own["http"] in [told[0] for told in receiver.told], 60, "the caller's webhook")
    # Each of the other's runs names the other's API.
    runs = [each["body"]["webhook"] for each in cloud.replicate.creates() if mark in json.dumps(each["body"])]
    own_runs = [url.removeprefix(own_url).partition("?")[0] for url in runs if url.startswith(own_url)]
    assert sorted(own_runs) == sorted(ids)
    assert {execution_of(cloud, prediction_id)["stateMachineArn"] for prediction_id in ids} == machines
    assert own["file"] in [each["id"] for each in caller.get("/files")["results"]]
    assert (
        httpx.get(own["link"], follow_redirects=True, trust_env=False, timeout=60).content == cloud.stack_name.encode()
    )
    return ids


def assert_works(caller: Caller) -> None:
    """A stack has all that is its own, takes a prediction with a file and sweeps."""
    cloud = caller.cloud
    assert len(caller.ended(caller.blob())["output_files"]) == 1
    swept = cloud.client("lambda").invoke(FunctionName=cloud.functions["sweep_predictions"], Payload=b"{}")
    assert "FunctionError" not in swept, swept["Payload"].read()
    queue = cloud.outputs["RequestsQueueArn"].rpartition(":")[2]
    assert schedules_of(cloud) == sorted([queue, cloud.functions["sweep_predictions"]])
    own = {each["id"]: each["name"] for each in caller.get("/recipes")["results"]}
    targets = {rule: arns for rule, arns in rules_of(cloud).items() if rule.rpartition("-recipe-")[2] in own}
    assert list(targets.values()) == [[cloud.outputs["RequestsQueueArn"]]]


def run_by_every_way(callers: Sequence[Caller], receiver: Receiver, mark: str) -> tuple[list[set[str]], list[str]]:
    """Runs predictions on both stacks at the same time; returns the ids of each one's, and of its file."""
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda caller: start_by_every_way(caller, receiver, mark), callers))
        ids = list(pool.map(lambda caller, own: assert_complete(caller, own, receiver, mark), callers, made))
    return ids, [own["file"] for own in made]


def test_two_stacks_in_one_account_run_side_by_side_and_share_nothing(
    team: LocalCloud, neighbour: LocalCloud, receiver: Receiver, wait_until: Wait
) -> None:
    callers = Caller(team, wait_until), Caller(neighbour, wait_until)
    mark = "side by side"
    ids, files = run_by_every_way(callers, receiver, mark)
    assert sum(mark in json.dumps(each["body"]) for each in team.replicate.creates()) == 6
    for caller, other, others_ids, others_file in zip(callers, callers[::-1], ids[::-1], files[::-1], strict=True):
        assert caller.call("GET", "/predictions", headers=other.headers).status_code == 401
        for path in (*(f"/predictions/{each}" for each in others_ids), f"/files/{others_file}"):
            assert caller.call("GET", path).status_code == 404
        held = items_of(caller.cloud) + "".join(keys_of(caller.cloud, caller.cloud.stack.outputs_bucket))
        assert not [each for each in (*others_ids, others_file) if each in held]
        assert_works(caller)


@pytest.mark.slow  # two more deployments
def test_stack_that_is_deleted_harms_no_other_and_its_name_can_be_deployed_again_at_once(
    team: LocalCloud, neighbour: LocalCloud, receiver: Receiver, run: Run, wait_until: Wait
) -> None:
    callers = earlier, other = Caller(team, wait_until), Caller(neighbour, wait_until)
    (ids, _), _ = run_by_every_way(callers, receiver, "deleted")
    before, log_group = team.stack, team.outputs["FunctionsLogGroupName"]
    kept = {before.table_name, before.outputs_bucket, before.inputs_bucket}

    team.delete()
    assert_works(other)
    assert earlier.call("GET", "/predictions").is_error
    assert named_by(run, NAME) == kept

    # Functions that still log when their group is deleted make it again, on AWS.
    logs = team.client("logs")
    logs.create_log_group(logGroupName=log_group)
    logs.create_log_stream(logGroupName=log_group, logStreamName="late")
    team.deploy()

    # It begins empty, without the access tokens of the earlier one, whose data stays.
    new = {team.stack.table_name, team.stack.outputs_bucket, team.stack.inputs_bucket}
    assert not kept & new
    assert team.stack.api_url != before.api_url
    assert team.outputs["FunctionsLogGroupName"] != log_group
    again = Caller(team, wait_until)
    assert again.call("GET", "/predictions", headers=earlier.headers).status_code == 401
    assert (again.listed(), again.get("/recipes")["results"]) == ([], [])
    shown = again.ended(again.blob())
    assert [file["bucket"] for file in shown["output_files"]] == [team.stack.outputs_bucket]
    assert named_by(run, NAME) == kept | new
    held = json.dumps(team.client("dynamodb").scan(TableName=before.table_name)["Items"], default=str)
    assert [each for each in ids if each not in held] == []
    assert len(keys_of(team, before.outputs_bucket)) >= len(ids)
    assert logs.describe_log_streams(logGroupName=log_group)["logStreams"][0]["logStreamName"] == "late"
    assert_works(other)


def named_by(run: Run, stack: str) -> set[str]:
    """What `replicate-serverless kept` names."""
    code, out, error = run("kept", "--stack", stack, "--json")
    assert code == 0, error
    return {each["name"] for each in json.loads(out)}


def test_stack_in_another_region_has_everything_there_and_commands_find_it_by_the_region(
    neighbour: LocalCloud, run: Run, wait_until: Wait
) -> None:
    assert {kind: names for kind, names in made_in(neighbour, OTHER_REGION).items() if names} == {}
    there = made_in(neighbour, REGION)
    assert [kind for kind, names in there.items() if kind != "rules" and not names] == []
    arns = [value for value in (*neighbour.outputs.values(), *neighbour.resources.values()) if value.startswith("arn:")]
    assert len(arns) > 8
    assert {arn.split(":")[3] for arn in arns} == {REGION}, arns

    prediction_id = Caller(neighbour, wait_until).blob()
    for region, option in ((REGION, []), (OTHER_REGION, ["--region", REGION])):
        code, out, error = run("show", prediction_id, "--stack", NEIGHBOUR, "--json", *option, region=region)
        assert (code, json.loads(out or "{}").get("id")) == (0, prediction_id), error
    code, _, error = run("show", prediction_id, "--stack", NEIGHBOUR, region=OTHER_REGION)
    assert (code, f"no stack {NEIGHBOUR!r} in {OTHER_REGION}" in error) == (2, True), error


def upstream_id(cloud: LocalCloud, prediction_id: str) -> str:
    """The id of a prediction at Replicate; empty while it has none."""
    key = {"pk": {"S": f"prediction#{prediction_id}"}, "sk": {"S": "status"}}
    item = cloud.client("dynamodb").get_item(TableName=cloud.stack.table_name, Key=key, ConsistentRead=True)["Item"]
    return str(item.get("upstream_id", {}).get("S", ""))


def allowed_origins(caller: Caller) -> list[str | None]:
    """The origin that a preflight, a function and the API itself allow."""
    page = {"Origin": AFTER["CorsOrigin"]}
    answers = (
        caller.call("OPTIONS", "/predictions", headers=page),
        caller.call("GET", "/predictions", headers=page | caller.headers),
        caller.call("GET", "/predictions", headers=page),
    )
    assert [each.status_code for each in answers] == [200, 200, 401]
    return [each.headers.get("Access-Control-Allow-Origin") for each in answers]


def valid_seconds(shown: Any) -> str:
    return parse_qs(urlsplit(str(shown["output"])).query)["X-Amz-Expires"][0]


def settings_of(cloud: LocalCloud) -> dict[str, Any]:
    """What parameters have set that no answer shows."""
    gateway, functions, api = cloud.client("apigateway"), cloud.client("lambda"), cloud.resources["Api"]
    resources = gateway.get_resources(restApiId=api, limit=500)["items"]
    (create,) = [each["id"] for each in resources if each["path"] == "/predictions"]
    (mapping,) = functions.list_event_source_mappings(FunctionName=cloud.functions["deliver_webhook"])[
        "EventSourceMappings"
    ]
    group = cloud.outputs["FunctionsLogGroupName"]
    start = functions.get_function_configuration(FunctionName=cloud.functions["start_prediction"])
    dashboards = cloud.client("cloudwatch").list_dashboards()["DashboardEntries"]
    return {
        "SyncWaitSeconds": (
            start["Timeout"],
            gateway.get_integration(restApiId=api, resourceId=create, httpMethod="POST")["timeoutInMillis"],
        ),
        "ApiRequestsPerSecond": gateway.get_stage(restApiId=api, stageName="v1")["methodSettings"]["*/*"][
            "throttlingRateLimit"
        ],
        "DeliveriesConcurrency": int(mapping["ScalingConfig"]["MaximumConcurrency"]),
        "RetentionDays": int(start["Environment"]["Variables"]["RETENTION_DAYS"]),
        "LogRetentionDays": cloud.client("logs").describe_log_groups(logGroupNamePrefix=group)["logGroups"][0][
            "retentionInDays"
        ],
        "LogLevel": start["Environment"]["Variables"]["POWERTOOLS_LOG_LEVEL"],
        "Dashboard": cloud.stack_name in [each["DashboardName"] for each in dashboards],
    }


@pytest.mark.slow  # another deployment
def test_changed_parameters_take_effect_and_running_predictions_go_on(neighbour: LocalCloud, wait_until: Wait) -> None:
    cloud, caller = neighbour, Caller(neighbour, wait_until, "changes")

    def reads(prediction_id: str) -> int:
        path = f"/v1/predictions/{upstream_id(cloud, prediction_id)}"
        return sum((each["method"], each["path"]) == ("GET", path) for each in cloud.replicate.record()["requests"])

    # Before: no live reads, no polls, no origin.
    endless = caller.create("sleeper", input={"seconds": 3600})
    wait_until(lambda: caller.get(f"/predictions/{endless}")["status"] == "processing", 60, "its start")
    assert reads(endless) == 0
    assert allowed_origins(caller) == ["https://none.invalid", None, None]
    assert valid_seconds(caller.ended(caller.blob())) == "600"
    before, api_id = settings_of(cloud), cloud.resources["Api"]
    assert before == {
        "SyncWaitSeconds": (29, 29000), "ApiRequestsPerSecond": 100, "DeliveriesConcurrency": 5, "RetentionDays": 30,
        "LogRetentionDays": 30, "LogLevel": "INFO", "Dashboard": True,
    }  # fmt: skip
    under_way = [caller.create("sleeper", input={"seconds": seconds}) for seconds in (4, 8, 12, 16)]

    cloud.deploy_again(**AFTER)

    assert cloud.resources["Api"] == api_id
    assert allowed_origins(caller) == ["https://app.example.com"] * 3
    assert settings_of(cloud) == {
        "SyncWaitSeconds": (49, 49000), "ApiRequestsPerSecond": 50, "DeliveriesConcurrency": 20, "RetentionDays": 60,
        "LogRetentionDays": 90, "LogLevel": "DEBUG", "Dashboard": False,
    }  # fmt: skip
    assert caller.get(f"/predictions/{endless}")["status"] == "processing"
    wait_until(lambda: caller.get(f"/predictions/{endless}") and reads(endless) > 0, 60, "a live read")
    assert valid_seconds(caller.ended(caller.blob())) == "900"
    # Nobody looks at it alone, and its webhooks are lost: a poll finds its end.
    cloud.replicate.fault("webhook_lost", times=None, model="local/storyteller")
    unheard = caller.create("storyteller", input={"prompt": "a lamp"})
    wait_until(lambda: {each["id"]: each["status"] for each in caller.listed()}[unheard] == "succeeded", 60, "a poll")

    # What ran when the parameters changed ends as it should, and ran once.
    for prediction_id in under_way:
        caller.ended(prediction_id)
    caller.call("POST", f"/predictions/{endless}/cancel").raise_for_status()
    caller.ended(endless, "canceled")
    for prediction_id in (*under_way, endless):
        assert len(cloud.replicate.creates(f"/webhooks/replicate/{prediction_id}")) == 1
