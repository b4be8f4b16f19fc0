"""The checks of `doctor`: each fault is found, with its remedy, and differs from what the caller may not see."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import formatdate
from functools import cache
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from botocore.validate import ParamValidator
from predictions.api.access_tokens import Scope
from predictions.cli.__main__ import main
from predictions.cli.checks import Check, Deployed, Finding, Result, run
from predictions.cli.doctor import examine, shown
from predictions.cli.endpoint_checks import EndpointChecks, GivenToken, access_token
from predictions.cli.prediction_checks import PredictionChecks, grace_for, wanted_of
from predictions.cli.resource_checks import ResourceChecks
from predictions.cli.stack import NotDone, Stack

from tests.support.aws_clients import AwsError, Clients, raise_client_error
from tests.support.commands import call_of
from tests.support.pages import code, rows, section
from tests.support.template import ROOT, load_template

NOW = datetime(2026, 12, 1, 12, tzinfo=UTC).timestamp()
API = "https://api.example.com/v1"
REPLICATE = "https://api.replicate.com/v1"
SIGNING = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
TOKEN = f"rs_{'a' * 43}"
TOPIC = "arn:aws:sns:eu-central-1:123456789012:alarms"
STREAM = "arn:aws:dynamodb:eu-central-1:123456789012:table/table-1/stream/2026"
SERVICES = (
    "cloudformation", "cloudwatch", "dynamodb", "lambda", "s3", "scheduler", "secretsmanager", "service-quotas", "sns",
    "sqs", "ssm", "stepfunctions",
)  # fmt: skip
PARAMETERS = {name: str(each.get("Default", "")) for name, each in load_template()["Parameters"].items()} | {
    "AlarmTopicArn": TOPIC
}
OUTPUTS = {
    "ApiUrlParameterName": "/demo/api_url",
    "ReplicateTokenSecretArn": "arn:token",
    "SigningSecretArn": "arn:signing",
    "TableName": "table-1",
}
KINDS = {"AWS::Serverless::Function": "AWS::Lambda::Function"}
DEPLOYED = {
    **{name: KINDS.get(each["Type"], each["Type"]) for name, each in load_template()["Resources"].items()},
    "SweepPredictionsFunctionEveryMinute": "AWS::Scheduler::Schedule",  # made by SAM
}


@cache
def clients() -> Clients:
    return Clients(SERVICES)


def page(**found: Any) -> dict[str, Any]:
    return found


def days(name: str, prefix: str, count: int) -> dict[str, Any]:
    return {"ID": name, "Status": "Enabled", "Filter": {"Prefix": prefix}, "Expiration": {"Days": count}}


ABORT = {
    "ID": "abort-incomplete-uploads", "Status": "Enabled", "Filter": {},
    "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1},
}  # fmt: skip
RESULTS = [days("expire-results", "", 30), ABORT]
INPUTS = [days("expire-inputs", "", 30), days("expire-files", "files/", 1), ABORT]
BLOCK = dict.fromkeys(("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"), True)
TABLE: dict[str, Any] = {
    "TableStatus": "ACTIVE",
    "GlobalSecondaryIndexes": [
        {"IndexName": name, "IndexStatus": "ACTIVE"} for name in ("by_owner", "due", "by_upstream_id")
    ],
    "StreamSpecification": {"StreamEnabled": True, "StreamViewType": "NEW_AND_OLD_IMAGES"},
    "LatestStreamArn": STREAM,
    "DeletionProtectionEnabled": True,
    "SSEDescription": {"Status": "ENABLED", "SSEType": "KMS", "KMSMasterKeyArn": "arn:key"},
}
FUNCTION = {"State": "Active", "LastUpdateStatus": "Successful", "Runtime": "python3.13"}
EMPTY_QUEUE = {"ApproximateNumberOfMessages": "0", "ApproximateNumberOfMessagesNotVisible": "0"}


def alarm(name: str, **other: Any) -> dict[str, Any]:
    return {"AlarmName": name, "ActionsEnabled": True, "AlarmActions": [TOPIC], "StateValue": "OK", **other}


def bucket_of(asked: dict[str, Any]) -> list[dict[str, Any]]:
    return RESULTS if asked["Bucket"] == "physical-OutputsBucket" else INPUTS


def physical(logical_id: str) -> str:
    """As long as a UUID where it is one: botocore's model refuses others."""
    return f"physical-{logical_id}".ljust(36, "-") if logical_id.endswith("EventSource") else f"physical-{logical_id}"


def mapping(asked: dict[str, Any]) -> dict[str, Any]:
    stream = asked["UUID"] == physical("ChangesEventSource")
    return {
        "UUID": asked["UUID"],
        "State": "Enabled",
        "EventSourceArn": STREAM if stream else "arn:aws:sqs:eu-central-1:123456789012:queue",
        **({} if stream else {"ScalingConfig": {"MaximumConcurrency": 5}}),
    }


def secret(asked: dict[str, Any]) -> dict[str, Any]:
    document = {"current": SIGNING, "previous": None, "rotated_at": "2026-11-01T00:00:00+00:00"}
    return {"SecretString": json.dumps(document) if asked["SecretId"] == "arn:signing" else "r8_token"}


def cors(*methods: str) -> dict[str, Any]:
    return {"CORSRules": [{"AllowedOrigins": ["*"], "AllowedMethods": list(methods)}]}


def recovery(status: str) -> dict[str, Any]:
    described = {"PointInTimeRecoveryDescription": {"PointInTimeRecoveryStatus": status}}
    return {"ContinuousBackupsDescription": described}


def alarms_with(**other: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda asked: {"MetricAlarms": [alarm(name, **other) for name in asked["AlarmNames"]]}


def queue_of_requests(asked: dict[str, Any]) -> dict[str, Any]:
    hidden = {"ApproximateNumberOfMessagesNotVisible": "3"} if "Requests" in asked["QueueUrl"] else {}
    return {"Attributes": EMPTY_QUEUE | hidden}


HEALTHY: dict[str, Any] = {
    "DescribeStacks": {
        "Stacks": [
            {
                "StackName": "demo",
                "StackStatus": "CREATE_COMPLETE",
                "Parameters": [{"ParameterKey": key, "ParameterValue": value} for key, value in PARAMETERS.items()],
                "Outputs": [{"OutputKey": key, "OutputValue": value} for key, value in OUTPUTS.items()],
            }
        ],
        "ResponseMetadata": {"HTTPHeaders": {"date": formatdate(NOW, usegmt=True)}},
    },
    "ListStackResources": {
        "StackResourceSummaries": [
            {"LogicalResourceId": name, "PhysicalResourceId": physical(name), "ResourceType": kind}
            for name, kind in DEPLOYED.items()
        ]
    },
    "GetFunctionConfiguration": FUNCTION,
    "GetEventSourceMapping": mapping,
    "GetAccountSettings": {"AccountLimit": {"ConcurrentExecutions": 1000, "UnreservedConcurrentExecutions": 1000}},
    "GetSchedule": {
        "State": "ENABLED",
        "ScheduleExpression": "rate(1 minute)",
        "FlexibleTimeWindow": {"Mode": "OFF"},
        "Target": {"Arn": "arn:function", "RoleArn": "arn:role"},
    },
    "DescribeTable": {"Table": TABLE},
    "DescribeContinuousBackups": recovery("ENABLED"),
    "DescribeTimeToLive": {"TimeToLiveDescription": {"TimeToLiveStatus": "ENABLED", "AttributeName": "expires_at"}},
    "GetPublicAccessBlock": {"PublicAccessBlockConfiguration": BLOCK},
    "GetBucketOwnershipControls": {"OwnershipControls": {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}},
    "GetBucketEncryption": {
        "ServerSideEncryptionConfiguration": {
            "Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}, "BucketKeyEnabled": False}]
        }
    },
    "GetBucketPolicy": {"Policy": json.dumps({"Statement": [{"Sid": "TlsOnly", "Effect": "Deny"}]})},
    "GetBucketLifecycleConfiguration": lambda asked: {"Rules": bucket_of(asked)},
    "GetBucketCors": lambda asked: cors(
        "GET", "HEAD", *(("PUT",) if asked["Bucket"] == "physical-InputsBucket" else ())
    ),
    "GetBucketNotificationConfiguration": lambda asked: (
        {"EventBridgeConfiguration": {}} if asked["Bucket"] == "physical-InputsBucket" else {}
    ),
    "GetQueueAttributes": {"Attributes": EMPTY_QUEUE},
    "ListSubscriptionsByTopic": {"Subscriptions": [{"SubscriptionArn": f"{TOPIC}:1"}]},
    "DescribeAlarms": alarms_with(),
    "GetServiceQuota": {"Quota": {"Value": 29000.0}},
    "GetParameter": {"Parameter": {"Value": API}},
    "GetSecretValue": secret,
    "GetExecutionHistory": {"events": []},
    "HeadObject": {"ContentLength": 4},
}
"""What AWS answers of a stack that is as it has to be, by operation."""


class World:
    """Answers the clients; what they ask is valid by botocore's models, and recorded."""

    def __init__(self, **other: Any) -> None:
        self.answers = HEALTHY | other
        self.calls: list[tuple[str, str]] = []

    def call(self, service: str, operation: str, asked: dict[str, Any], client: Any) -> Any:
        self.calls.append((service, operation))
        shape = client.meta.service_model.operation_model(operation).input_shape
        if shape is not None:
            report = ParamValidator().validate(asked, shape)
            assert not report.has_errors(), report.generate_report()
        answer = self.answers[operation]
        answer = answer(asked) if callable(answer) else answer
        if isinstance(answer, AwsError):
            raise_client_error(client, operation, answer)
        return answer


class Demo(Stack):
    """A stack named `demo`."""

    def __init__(self, table: Any = None) -> None:
        self.name = "demo"
        self._table = table

    def client(self, service_name: str) -> Any:
        return clients()(service_name)

    @property
    def table(self) -> Any:
        return self._table


def web(**other: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    """The API and Replicate, as they answer if all is well; `other` answers a request by its name below."""

    def problem(status: int, detail: str = "") -> httpx.Response:
        return httpx.Response(status, json={"detail": detail}, headers={"content-type": "application/problem+json"})

    def name_of(request: httpx.Request) -> str:
        if str(request.url).startswith(REPLICATE):
            return request.url.path.rpartition("/")[2]
        return {"predictions": "listing", "openapi.json": "document"}.get(
            request.url.path.rpartition("/")[2], "webhook" if request.method == "POST" else "nowhere"
        )

    def answer(request: httpx.Request) -> httpx.Response:
        name = name_of(request)
        token = request.headers.get("authorization", "")
        if name in other:
            return other[name](request)
        dated = {"date": formatdate(NOW, usegmt=True)}
        match name:
            case "account":
                if token != "Bearer r8_token":
                    return httpx.Response(401, headers=dated)
                return httpx.Response(200, json={"type": "organization", "username": "acme"}, headers=dated)
            case "secret":
                return httpx.Response(200, json={"key": SIGNING})
            case "webhook":
                return problem(401, "This is not a webhook that Replicate signed for this stack.")
            case "nowhere":
                return problem(404)
            case "document" if token == f"Bearer {TOKEN}":
                return httpx.Response(200, json={"openapi": "3.1.0", "paths": {}})
            case "listing" if token == f"Bearer {TOKEN}":
                return httpx.Response(200, json={"results": []})
        return problem(401)

    return httpx.Client(transport=httpx.MockTransport(answer))


def checks_of(stack: Stack, http: httpx.Client, now: float, token: str | None) -> Iterator[Check]:
    deployed = Deployed(stack, lambda: now)
    yield from ResourceChecks(deployed, lambda: now).checks()
    given = GivenToken(token, "the token in a variable" if token else "none is given")
    yield from EndpointChecks(deployed, given, http, lambda: now).checks()


def found(
    world: World,
    http: httpx.Client | None = None,
    *,
    only: str | None = None,
    now: float = NOW,
    token: str | None = TOKEN,
) -> dict[str, Finding]:
    clients().world = world
    wanted = [each for each in checks_of(Demo(), http or web(), now, token) if only in (None, each.name)]
    return {each.name: run(each, lambda: 0.0) for each in wanted}


def not_ok(findings: dict[str, Finding]) -> dict[str, Result]:
    return {name: each.result for name, each in findings.items() if each.result is not Result.OK}


def test_healthy_stack_is_ok_in_every_check() -> None:
    findings = found(World())
    assert not_ok(findings) == {}
    assert len(findings) > 35
    assert not any(each.action for each in findings.values())
    assert "organization acme" in findings["replicate.token"].seen


# -- one fault each ------------------------------------------------------------------------------------------------


def stack_with(**changed: Any) -> dict[str, Any]:
    whole: dict[str, Any] = HEALTHY["DescribeStacks"]
    parameters = PARAMETERS | changed.pop("parameters", {})
    listed = [{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()]
    return whole | {"Stacks": [whole["Stacks"][0] | {"Parameters": listed} | changed]}


def without(logical_id: str) -> dict[str, Any]:
    listed = HEALTHY["ListStackResources"]["StackResourceSummaries"]
    return {"StackResourceSummaries": [each for each in listed if each["LogicalResourceId"] != logical_id]}


def table_with(**changed: Any) -> dict[str, Any]:
    return {"Table": {key: value for key, value in (TABLE | changed).items() if value is not None}}


def quota(milliseconds: float) -> dict[str, Any]:
    return {"Quota": {"Value": milliseconds}}


def concurrency(total: int, free: int | None = None) -> dict[str, Any]:
    return {
        "AccountLimit": {
            "ConcurrentExecutions": total, "UnreservedConcurrentExecutions": total if free is None else free,
        }
    }  # fmt: skip


KEY = "arn:aws:kms:eu-central-1:123456789012:key/11111111-2222-3333-4444-555555555555"
OWN_KEY = stack_with(parameters={"KmsKeyArn": KEY})
FAULTS: list[tuple[str, str, dict[str, Any]]] = [
    ("functions", "no functions", {"ListStackResources": {"StackResourceSummaries": []}}),
    ("event-sources", "no event sources", {"ListStackResources": {"StackResourceSummaries": []}}),
    ("alarms.state", "no alarms", {"ListStackResources": {"StackResourceSummaries": []}}),
    ("stack", "UPDATE_ROLLBACK_COMPLETE", {"DescribeStacks": stack_with(StackStatus="UPDATE_ROLLBACK_COMPLETE")}),
    ("functions", "Failed", {"GetFunctionConfiguration": FUNCTION | {"State": "Failed", "StateReason": "no image"}}),
    ("functions", "InProgress", {"GetFunctionConfiguration": FUNCTION | {"LastUpdateStatus": "InProgress"}}),
    ("functions", "python3.9", {"GetFunctionConfiguration": FUNCTION | {"Runtime": "python3.9"}}),
    ("event-sources", "Disabled", {"GetEventSourceMapping": lambda asked: mapping(asked) | {"State": "Disabled"}}),
    ("event-sources", "ChangesEventSource reads", {"DescribeTable": table_with(LatestStreamArn=f"{STREAM}-2")}),
    ("sweep-schedule", "DISABLED", {"GetSchedule": HEALTHY["GetSchedule"] | {"State": "DISABLED"}}),
    ("sweep-schedule", "has no Sweep", {"ListStackResources": without("SweepPredictionsFunctionEveryMinute")}),
    ("sweep-schedule", "does not exist", {"GetSchedule": AwsError("ResourceNotFoundException")}),
    ("table", "ARCHIVED", {"DescribeTable": table_with(TableStatus="ARCHIVED")}),
    ("table", "due missing", {"DescribeTable": table_with(GlobalSecondaryIndexes=TABLE["GlobalSecondaryIndexes"][:1])}),
    ("table.recovery", "DISABLED", {"DescribeContinuousBackups": recovery("DISABLED")}),
    ("table.ttl", "DISABLED", {"DescribeTimeToLive": {"TimeToLiveDescription": {"TimeToLiveStatus": "DISABLED"}}}),
    ("table.ttl", "ENABLED ttl", {
        "DescribeTimeToLive": {"TimeToLiveDescription": {"TimeToLiveStatus": "ENABLED", "AttributeName": "ttl"}}
    }),
    ("table.stream", "StreamEnabled", {"DescribeTable": table_with(StreamSpecification=None)}),
    ("table.deletion-protection", "off", {"DescribeTable": table_with(DeletionProtectionEnabled=False)}),
    ("table.deletion-protection", "on instead of off", {
        "DescribeStacks": stack_with(parameters={"DeletionProtection": "false"})
    }),
    ("table.encryption", "DynamoDB's", {"DescribeTable": table_with(SSEDescription=None)}),
    ("table.encryption", f"instead of {KEY}", {"DescribeStacks": OWN_KEY}),
    ("outputs-bucket.public-access", "BlockPublicPolicy off", {
        "GetPublicAccessBlock": {"PublicAccessBlockConfiguration": BLOCK | {"BlockPublicPolicy": False}}
    }),
    ("inputs-bucket.public-access", "off", {"GetPublicAccessBlock": AwsError("NoSuchPublicAccessBlockConfiguration")}),
    ("outputs-bucket.ownership", "not set", {"GetBucketOwnershipControls": AwsError("OwnershipControlsNotFoundError")}),
    ("outputs-bucket.encryption", "not set", {
        "GetBucketEncryption": AwsError("ServerSideEncryptionConfigurationNotFoundError")
    }),
    ("inputs-bucket.encryption", f"aws:kms {KEY}", {"DescribeStacks": OWN_KEY}),
    ("outputs-bucket.tls", "TlsOnly", {"GetBucketPolicy": AwsError("NoSuchBucketPolicy")}),
    ("outputs-bucket.lifecycle", "expire-results", {
        "GetBucketLifecycleConfiguration": AwsError("NoSuchLifecycleConfiguration")
    }),
    ("outputs-bucket.lifecycle", "expire-results", {
        "GetBucketLifecycleConfiguration": {"Rules": [RESULTS[0] | {"Status": "Disabled"}, ABORT]}
    }),
    ("inputs-bucket.lifecycle", "expire-files", {
        "GetBucketLifecycleConfiguration": {"Rules": [INPUTS[0], days("expire-files", "", 1), ABORT]}
    }),
    ("inputs-bucket.cors", "off instead of * GET HEAD PUT", {"GetBucketCors": AwsError("NoSuchCORSConfiguration")}),
    ("outputs-bucket.cors", "* GET instead of * GET HEAD", {"GetBucketCors": lambda _: cors("GET")}),
    ("inputs-bucket.events", "off", {"GetBucketNotificationConfiguration": {}}),
    ("outputs-bucket.events", "results can start", {
        "GetBucketNotificationConfiguration": {"EventBridgeConfiguration": {}}
    }),
    ("outputs-bucket.tls", "does not exist", {"GetBucketPolicy": AwsError("NoSuchBucket")}),
    ("dead-letters", "3 in requests", {"GetQueueAttributes": queue_of_requests}),
    ("alarms.topic", "does not exist", {"ListSubscriptionsByTopic": AwsError("NotFound")}),
    ("alarms.topic", "1 wait for a confirmation", {
        "ListSubscriptionsByTopic": {"Subscriptions": [{"SubscriptionArn": "PendingConfirmation"}]}
    }),
    ("alarms.actions", "do not notify", {"DescribeAlarms": alarms_with(AlarmActions=[])}),
    ("alarms.actions", "disabled", {"DescribeAlarms": alarms_with(ActionsEnabled=False)}),
    ("alarms.state", "missing", {"DescribeAlarms": {"MetricAlarms": []}}),
    ("alarms.state", "PausedAlarm", {
        "DescribeAlarms": lambda asked: {
            "MetricAlarms": [
                alarm(name, StateValue="ALARM" if "Paused" in name else "OK") for name in asked["AlarmNames"]
            ]
        }
    }),
    ("quotas.concurrency", "runs 10 functions", {"GetAccountSettings": concurrency(10)}),
    ("quotas.concurrency", "20 of them unreserved", {"GetAccountSettings": concurrency(1000, 20)}),
    ("quotas.api-timeout", "after 29 s, and SyncWaitSeconds needs 64 s", {
        "DescribeStacks": stack_with(parameters={"SyncWaitSeconds": "60"})
    }),
    ("replicate.token", "does not exist", {"GetSecretValue": AwsError("ResourceNotFoundException")}),
    ("replicate.token", "holds no token", {"GetSecretValue": {"SecretString": '{"key": "r8_token"}'}}),
    ("replicate.token", "refuses", {"GetSecretValue": {"SecretString": "r8_another"}}),
    ("replicate.signing-secret", "no signing secret", {
        "GetSecretValue": lambda asked: {"SecretString": "{}"} if asked["SecretId"] == "arn:signing" else secret(asked)
    }),
    ("api.no-token", "does not exist", {"GetParameter": AwsError("ParameterNotFound")}),
    ("clock.caller", "-400 s", {
        "DescribeStacks": HEALTHY["DescribeStacks"]
        | {"ResponseMetadata": {"HTTPHeaders": {"date": formatdate(NOW + 400, usegmt=True)}}}
    }),
]  # fmt: skip


@pytest.mark.parametrize(("name", "seen", "answers"), FAULTS)
def test_fault_of_a_resource_is_found_with_what_to_do(name: str, seen: str, answers: dict[str, Any]) -> None:
    finding = found(World(**answers), only=name)[name]
    assert (finding.result, seen in finding.seen) == (Result.FAILED, True), finding
    assert finding.action
    for command in re.findall(r"aws [a-z0-9-]+ [a-z-]+ --[^;`]+", finding.action):
        call_of(command.split(" and confirm")[0], clients())


def test_every_check_has_a_fault_that_it_finds() -> None:
    """A check without one would be one that finds nothing."""
    faulty = {each[0] for each in FAULTS} | {each[0] for each in WEB_FAULTS}
    # The code of both buckets is the same.
    twins = {name.replace("outputs-", "inputs-") for name in faulty} | {
        name.replace("inputs-", "outputs-") for name in faulty
    }
    assert found(World()).keys() == twins & found(World()).keys()
    assert faulty <= found(World()).keys()


def test_runtime_at_the_end_of_its_support_is_found() -> None:
    ends = datetime(2029, 7, 1, tzinfo=UTC).timestamp()
    assert found(World(), only="functions", now=ends)["functions"].result is Result.FAILED
    allowed = load_template()["Parameters"]["PythonRuntime"]["AllowedValues"]
    for runtime in allowed:
        world = World(GetFunctionConfiguration=FUNCTION | {"Runtime": runtime})
        assert found(world, only="functions")["functions"].result is Result.OK


def test_quota_that_was_never_raised_is_its_default() -> None:
    world = World(GetServiceQuota=AwsError("NoSuchResourceException"), GetAWSDefaultServiceQuota=quota(29000))
    assert found(world, only="quotas.api-timeout")["quotas.api-timeout"].result is Result.OK


UNCLEAR = [
    ("stack", {"DescribeStacks": stack_with(StackStatus="UPDATE_IN_PROGRESS")}),
    ("event-sources", {"GetEventSourceMapping": lambda asked: mapping(asked) | {"State": "Enabling"}}),
    ("table.ttl", {"DescribeTimeToLive": {"TimeToLiveDescription": {"TimeToLiveStatus": "ENABLING"}}}),
    ("alarms.topic", {"DescribeStacks": stack_with(parameters={"AlarmTopicArn": ""})}),
    ("quotas.api-timeout", {"GetServiceQuota": AwsError("AccessDeniedException")}),
    ("quotas.api-timeout", {"GetServiceQuota": AwsError("ServiceException")}),
]


@pytest.mark.parametrize(("name", "answers"), UNCLEAR)
def test_what_cannot_be_known_is_unknown_with_what_to_do(name: str, answers: dict[str, Any]) -> None:
    finding = found(World(**answers), only=name)[name]
    assert (finding.result, bool(finding.action)) == (Result.UNKNOWN, True), finding


def test_response_that_cannot_be_read_is_unknown_and_the_other_checks_run() -> None:
    findings = found(World(GetAccountSettings={}, DescribeTable={"Table": {}}, GetBucketPolicy={"Policy": "{"}))
    unread = {name for name, each in findings.items() if "could not be read" in each.seen}
    assert unread == {"quotas.concurrency", "table", "outputs-bucket.tls", "inputs-bucket.tls"}
    assert {findings[name].result for name in unread} == {Result.UNKNOWN}


def test_what_the_caller_may_not_see_is_unknown_and_the_other_checks_run() -> None:
    described = {"DescribeStacks", "ListStackResources"}
    denied = {name: AwsError("AccessDenied") for name in HEALTHY if name not in described}
    findings = found(World(**denied))
    assert {each.result for each in findings.values()} == {Result.OK, Result.UNKNOWN}
    assert {name for name, result in not_ok(findings).items() if result is Result.FAILED} == set()
    assert findings["table.recovery"].seen == "not permitted: DescribeContinuousBackups"


# -- HTTP ----------------------------------------------------------------------------------------------------------


def unreachable(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("no route")


def answer(status: int, body: Any = None, kind: str = "application/problem+json", **headers: str) -> Any:
    return lambda _: httpx.Response(status, json=body or {}, headers={"content-type": kind, **headers})


WEB_FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("api.unknown-path", {"nowhere": answer(403)}),
    ("api.unknown-path", {"nowhere": unreachable}),
    ("api.no-token", {"listing": answer(200, {"results": []}, "application/json")}),
    ("api.no-token", {"listing": answer(401, {}, "text/html")}),
    ("api.wrong-token", {"listing": answer(200, {"results": []}, "application/json")}),
    ("api.wrong-token", {"listing": answer(503)}),
    ("api.valid-token", {"listing": answer(401)}),
    ("api.valid-token", {"listing": answer(403)}),
    ("api.openapi", {"document": answer(502)}),
    ("api.openapi", {"document": answer(200, {"swagger": "2.0"}, "application/json")}),
    ("webhooks.route", {"webhook": answer(404)}),
    ("webhooks.route", {"webhook": answer(301, location="https://www.example.com")}),
    ("webhooks.route", {"webhook": answer(200, {"received": "x"}, "application/json")}),
    ("webhooks.route", {"webhook": answer(401, {"detail": "You did not pass a valid authentication token"})}),
    ("webhooks.route", {"webhook": answer(503, {"detail": "Replicate's signing secret is not known yet"})}),
    ("webhooks.route", {"webhook": unreachable}),
    ("replicate.token", {"account": answer(401)}),
    ("replicate.token", {"account": answer(403)}),
    ("replicate.token", {"account": answer(200, {"hello": "world"}, "application/json")}),
    ("replicate.signing-secret", {"secret": answer(200, {"key": "whsec_b3RoZXI="}, "application/json")}),
    ("clock.replicate", {"account": answer(401, date=formatdate(NOW + 400, usegmt=True))}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "answers"), WEB_FAULTS)
def test_fault_that_is_seen_from_outside_is_found_with_what_to_do(name: str, answers: dict[str, Any]) -> None:
    finding = found(World(), web(**answers), only=name)[name]
    assert (finding.result, bool(finding.action)) == (Result.FAILED, True), finding


@pytest.mark.parametrize("name", ["replicate.token", "replicate.signing-secret", "clock.replicate"])
def test_replicate_that_cannot_be_reached_is_unknown(name: str) -> None:
    for fault in (unreachable, answer(500)):
        finding = found(World(), web(account=fault, secret=fault), only=name)[name]
        assert (finding.result, bool(finding.action)) == (Result.UNKNOWN, True), finding


def test_webhooks_of_replicate_need_https() -> None:
    world = World(GetParameter={"Parameter": {"Value": "http://api.example.com/v1"}})
    assert found(world, only="webhooks.route")["webhooks.route"].result is Result.FAILED


def test_clock_of_the_caller_that_is_off_is_not_replicates() -> None:
    findings = found(World(), now=NOW - 400)
    assert not_ok(findings) == {"clock.caller": Result.FAILED}


def test_checks_without_a_token_are_unknown() -> None:
    findings = found(World(), token=None)
    assert not_ok(findings) == {"api.valid-token": Result.UNKNOWN, "api.openapi": Result.UNKNOWN}
    assert "REPLICATE_SERVERLESS_TOKEN" in findings["api.openapi"].action


def test_no_secret_is_in_what_is_shown() -> None:
    for finding in (*found(World()).values(), *found(World(), web(account=answer(401), secret=answer(200))).values()):
        for text in (TOKEN, "r8_token", SIGNING):
            assert text not in shown(finding)


# -- token ---------------------------------------------------------------------------------------------------------


def test_token_of_the_environment_is_used_and_none_is_made() -> None:
    clients().world = world = World()
    deployed = Deployed(Demo(), lambda: NOW)
    with access_token(deployed, {"REPLICATE_SERVERLESS_TOKEN": TOKEN}, (Scope.READ,), print) as token:
        assert token.value == TOKEN
    assert {service for service, _ in world.calls} == {"cloudformation"}


def test_token_that_is_made_is_revoked_also_if_a_check_crashes() -> None:
    stored: dict[str, Any] = {}

    def put(asked: dict[str, Any]) -> dict[str, Any]:
        stored[asked["Item"]["sk"]["S"]] = asked["Item"]
        return {}

    def delete(asked: dict[str, Any]) -> dict[str, Any]:
        del stored[asked["Key"]["sk"]["S"]]
        return {}

    left = {"owner": {"S": "doctor"}, "name": {"S": "doctor 1"}, "scopes": {"SS": ["read"]}, "pk": {"S": "tokens"}}
    left |= {"sk": {"S": "0" * 64}, "created_at": {"S": "2026"}, "token_hint": {"S": "abcd"}}
    stored["0" * 64] = left
    alices = left | {"sk": {"S": "1" * 64}, "owner": {"S": "alice"}}
    stored["1" * 64] = alices

    def query(asked: dict[str, Any]) -> dict[str, Any]:
        begins = [value["S"] for value in asked["ExpressionAttributeValues"].values() if value["S"] != "tokens"]
        return {"Items": [item for sk, item in stored.items() if sk.startswith(begins[0] if begins else "")]}

    clients().world = World(PutItem=put, DeleteItem=delete, Query=query)
    deployed = Deployed(Demo(), lambda: NOW)

    def crash() -> None:
        with access_token(deployed, {}, (Scope.READ,), print) as token:
            assert token.value is not None
            assert len(stored) == 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crash()
    # What a killed run left is gone too, and nobody else's token.
    assert list(stored) == ["1" * 64]


def test_token_that_cannot_be_made_or_revoked_is_said() -> None:
    deployed_with = {"PutItem": AwsError("AccessDeniedException")}
    clients().world = World(**deployed_with)
    with access_token(Deployed(Demo(), lambda: NOW), {}, (Scope.READ,), print) as token:
        assert token == GivenToken(None, token.source)
        assert "AccessDeniedException" in token.source
    said: list[str] = []
    clients().world = World(PutItem={}, Query=AwsError("AccessDeniedException"))
    with access_token(Deployed(Demo(), lambda: NOW), {}, (Scope.READ,), said.append):
        pass
    assert "tokens revoke" in said[0]


# -- one prediction ------------------------------------------------------------------------------------------------

ID, UPSTREAM = "a" * 26, "u" * 26
EXECUTION = f"arn:aws:states:eu-central-1:123456789012:execution:demo-track-submitted:{ID}-1"
FILE = b"file"
HOOK = f"{API}/webhooks/replicate/{ID}"


class Trial:
    """A prediction of a stack in virtual time; each attribute is a fault if it is changed."""

    def __init__(self) -> None:
        self.at = NOW
        self.status = 201
        self.lag = 0.4
        self.runs = 2.0
        self.list_shows: dict[str, Any] = {"webhook": HOOK, "input": {}}
        self.get_shows: dict[str, Any] = {"webhook": HOOK, "input": {}}
        self.end = "succeeded"
        self.error: str | None = None
        self.files = [SimpleNamespace(key="k", bytes=4, sha256=hashlib.sha256(FILE).hexdigest(), error=None)]
        self.served = FILE
        self.served_status = 200
        self.output: Any = ["https://files.example.com/1"]
        self.posts = 0
        self.polls: list[float] = []
        self.grace = "45"
        self.bound = True

    def get(self, prediction_id: str) -> Any:
        assert prediction_id == ID
        over = self.at - NOW >= self.runs
        return SimpleNamespace(
            id=ID, visible=self.end if over else "processing", ended_visibly=over, error=self.error,
            execution_arn=EXECUTION, upstream_id=UPSTREAM if self.bound else None,
            completed_at=datetime.fromtimestamp(NOW + 1, UTC).isoformat(),
        )  # fmt: skip

    def stored_files(self, _: Any) -> Any:
        return self.files

    def _entry(self, shows: dict[str, Any]) -> dict[str, Any]:
        created = datetime.fromtimestamp(NOW, UTC).isoformat()
        return {"id": UPSTREAM, "created_at": created, "status": "starting", **shows}

    def respond(self, request: httpx.Request) -> httpx.Response:
        url = str(request.url)
        dated = {"date": formatdate(self.at, usegmt=True)}
        if request.method == "POST":
            self.posts += 1
            if not self.status:
                raise httpx.ReadTimeout("too late")
            return httpx.Response(self.status, json={"id": ID, "detail": "no such field"})
        if url == f"{REPLICATE}/predictions":
            there = [self._entry(self.list_shows)] if self.at - NOW >= self.lag else []
            return httpx.Response(200, json={"next": None, "previous": None, "results": there}, headers=dated)
        if url == f"{REPLICATE}/predictions/{UPSTREAM}":
            return httpx.Response(200, json=self._entry(self.get_shows), headers=dated)
        if url == f"{API}/predictions/{ID}":
            return httpx.Response(200, json={"output": self.output})
        if not self.served_status:
            raise httpx.ConnectError("no route")
        return httpx.Response(self.served_status, content=self.served)

    def _wait(self, seconds: float) -> None:
        self.at += seconds

    def run(self) -> dict[str, Finding]:
        events = [
            {
                "timestamp": datetime.fromtimestamp(NOW + poll, UTC), "type": "TaskStateEntered", "id": n,
                "stateEnteredEventDetails": {"name": "PollPrediction"},
            }
            for n, poll in enumerate(self.polls, 1)
        ]  # fmt: skip
        grace = stack_with(parameters={"SubmitGraceSeconds": self.grace})
        clients().world = World(DescribeStacks=grace, GetExecutionHistory={"events": events})
        deployed = Deployed(Demo(self), lambda: self.at)
        http = httpx.Client(transport=httpx.MockTransport(self.respond))
        token, wanted = GivenToken(TOKEN, "given"), wanted_of("acme/painter", None)
        endpoints = EndpointChecks(deployed, token, http, lambda: self.at)
        said: list[str] = []
        checks = PredictionChecks(
            deployed, endpoints, wanted, token, http, say=said.append, now=lambda: self.at, sleep=self._wait
        )
        findings = {each.name: run(each, lambda: 0.0) for each in checks.checks()}
        assert self.posts == 1  # a create is never repeated
        assert said or self.status != 201
        return findings


def trial(**changed: Any) -> dict[str, Finding]:
    made = Trial()
    for name, value in changed.items():
        assert hasattr(made, name)
        setattr(made, name, value)
    return made.run()


def test_prediction_runs_to_its_stored_file_and_each_step_is_timed() -> None:
    findings = trial()
    assert not_ok(findings) == {}
    assert list(findings) == [
        f"prediction.{name}"
        for name in ("accepted", "listed", "recognizable", "completed", "webhook", "stored", "link")
    ]
    for name in ("accepted", "completed", "link"):
        assert re.match(r"\d+\.\d s: ", findings[f"prediction.{name}"].seen)
    assert "the list shows webhook and input; a GET shows webhook and input" in findings["prediction.recognizable"].seen


NEITHER: dict[str, Any] = {"input": None}
TRIALS: list[tuple[str, Result, str, dict[str, Any]]] = [
    ("prediction.accepted", Result.FAILED, "422", {"status": 422}),
    ("prediction.accepted", Result.FAILED, "may have been accepted", {"status": 0}),
    ("prediction.link", Result.FAILED, "no URL of a file", {"output": None}),
    ("prediction.link", Result.FAILED, "gets 403", {"served_status": 403}),
    ("prediction.link", Result.FAILED, "could not be fetched", {"served_status": 0}),
    ("prediction.listed", Result.FAILED, "SubmitGraceSeconds=65 follows", {"lag": 20.0, "runs": 30.0}),
    ("prediction.listed", Result.FAILED, "does not show it within 300 s", {"lag": 1000.0}),
    ("prediction.listed", Result.FAILED, "ended without Replicate", {"bound": False, "end": "failed", "error": "x"}),
    ("prediction.recognizable", Result.UNKNOWN, "by target and input", {
        "list_shows": {"input": {}}, "get_shows": {"input": {}}
    }),
    ("prediction.recognizable", Result.FAILED, "neither webhook nor input", {"list_shows": {}, "get_shows": {}}),
    ("prediction.recognizable", Result.FAILED, "not the one that was sent", {"get_shows": {"webhook": "https://x.example"}}),
    ("prediction.completed", Result.FAILED, "failed: no memory", {"end": "failed", "error": "no memory"}),
    ("prediction.completed", Result.UNKNOWN, "processing after 900 s", {"runs": 5000.0}),
    ("prediction.webhook", Result.FAILED, "a poll found the completion", {"polls": [61.0]}),
    ("prediction.webhook", Result.UNKNOWN, "longer than FirstPollSeconds", {"polls": [0.5]}),
    ("prediction.stored", Result.FAILED, "not copied: 404", {
        "files": [SimpleNamespace(key=None, bytes=None, sha256=None, error="404")]
    }),
    ("prediction.stored", Result.FAILED, "4 bytes instead of 9", {
        "files": [SimpleNamespace(key="k", bytes=9, sha256="0", error=None)]
    }),
    ("prediction.stored", Result.UNKNOWN, "no files", {"files": []}),
    ("prediction.link", Result.FAILED, "not those that were stored", {"served": b"other"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "result", "seen", "changed"), TRIALS)
def test_step_of_a_prediction_that_goes_wrong_is_found(
    name: str, result: Result, seen: str, changed: dict[str, Any]
) -> None:
    finding = trial(**changed)[name]
    assert (finding.result, seen in finding.seen) == (result, True), finding
    assert finding.action


def test_get_that_shows_the_webhook_is_enough() -> None:
    finding = trial(list_shows={"input": {}})["prediction.recognizable"]
    assert finding.result is Result.OK


def test_list_that_the_grace_covers_three_times_is_ok() -> None:
    assert trial(lag=8.0, grace="30", runs=20.0)["prediction.listed"].result is Result.OK
    assert trial(lag=12.0, grace="30", runs=20.0)["prediction.listed"].result is Result.FAILED


def test_grace_is_three_times_the_lag_and_at_least_its_default() -> None:
    parameter = load_template()["Parameters"]["SubmitGraceSeconds"]
    assert grace_for(0) == parameter["Default"] == 45
    assert grace_for(15) == 45
    assert grace_for(15.1) == 50
    assert grace_for(10_000) == parameter["MaxValue"]


def test_no_prediction_is_started_without_a_token() -> None:
    clients().world = World()
    deployed = Deployed(Demo(), lambda: NOW)
    http = httpx.Client(transport=httpx.MockTransport(unreachable))
    token = GivenToken(None, "none")
    endpoints = EndpointChecks(deployed, token, http, lambda: NOW)
    checks = PredictionChecks(
        deployed, endpoints, wanted_of("m", "{}"), token, http, say=print, now=lambda: NOW, sleep=lambda _: None
    )
    assert {each.name: run(each).result for each in checks.checks()} == {"prediction.accepted": Result.UNKNOWN}


# -- command and page ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["[]", "{", '"x"'])
def test_input_that_is_no_object_is_refused_before_anything_is_asked(given: str) -> None:
    clients().world = world = World()
    with pytest.raises(NotDone, match="--input must be a JSON object"):
        list(examine(Demo(), "m", given, {}, print))
    assert world.calls == []


def test_clock_that_aws_refuses_is_named() -> None:
    clients().world = World(DescribeStacks=AwsError("RequestExpired"))
    with pytest.raises(NotDone, match="check its clock"):
        list(examine(Demo(), None, None, {}, print))


def test_exit_code_is_1_if_a_check_failed_and_0_if_some_are_unknown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def of(stack: str, parameters: dict[str, Any], *options: str) -> tuple[int, str]:
        clients().world = World(
            DescribeStacks=stack_with(parameters={"ReplicateApiUrl": "http://127.0.0.1:1/v1"}, **parameters)
        )
        code = main(["doctor", "--stack", stack, *options])
        return code, capsys.readouterr().out

    monkeypatch.setattr(Stack, "client", lambda _, name: clients()(name))
    monkeypatch.setenv("REPLICATE_SERVERLESS_TOKEN", TOKEN)
    code, out = of("demo", {"StackStatus": "ROLLBACK_COMPLETE"}, "--json")
    report = json.loads(out)
    assert (code, report["stack"], report["checks"][0]["result"]) == (1, "demo", "failed")
    assert report["ok"] + report["failed"] + report["unknown"] == len(report["checks"])


def test_pages_that_actions_name_have_these_sections() -> None:
    sources = "".join(source.read_text() for source in (ROOT / "layers/predictions/predictions/cli").glob("*checks.py"))
    named = set(re.findall(r"docs/[a-z]+\.md(?:#[a-z-]+)?", sources))
    assert len(named) > 4
    for name in named:
        path, _, anchor = name.partition("#")
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE)
        assert anchor in {"", *(heading.lower().replace(" ", "-") for heading in headings)}, name


PREFIXES = {"lambda": "lambda", "service-quotas": "servicequotas", "stepfunctions": "states"}
NAMES = {
    "s3:HeadObject": "s3:GetObject",
    "s3:GetPublicAccessBlock": "s3:GetBucketPublicAccessBlock",
    "s3:GetBucketEncryption": "s3:GetEncryptionConfiguration",
    "s3:GetBucketLifecycleConfiguration": "s3:GetLifecycleConfiguration",
    "s3:GetBucketCors": "s3:GetBucketCORS",
    "s3:GetBucketNotificationConfiguration": "s3:GetBucketNotification",
}
"""Actions whose names are not those of the operations.

https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazons3.html
"""


def test_page_lists_exactly_the_actions_that_the_checks_need() -> None:
    world = World(GetServiceQuota=AwsError("NoSuchResourceException"), GetAWSDefaultServiceQuota=quota(29000))
    found(world)
    calls = set(world.calls)
    trial()
    assert isinstance(clients().world, World)
    calls |= set(clients().world.calls)  # type: ignore[union-attr]
    asked = {f"{PREFIXES.get(service, service)}:{operation}" for service, operation in calls}
    asked = {NAMES.get(each, each) for each in asked}
    # Of the table: a token of its own, and the prediction.
    asked |= {f"dynamodb:{name}" for name in ("PutItem", "Query", "DeleteItem", "GetItem")}
    listed: set[str] = set()
    for row in rows(section("docs/aws.md", "What the caller may do")):
        prefix = ""
        for action in code(row[1]):
            prefix, _, name = action.rpartition(":") if ":" in action else (prefix, "", action)
            listed.add(f"{prefix}:{name}")
    assert listed == asked


def test_page_lists_exactly_the_checks() -> None:
    listed = {name for row in rows(section("docs/aws.md", "The checks")) for name in code(row[0])}
    assert listed == found(World()).keys() | trial().keys()
    only_there = section("docs/aws.md", "What only AWS can tell")
    named = {name for row in rows(only_there) for name in code(row[2])}
    assert len(named) > 15
    assert named <= listed
