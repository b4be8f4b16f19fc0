"""What each role of the stack may not do: real calls with its own credentials, which the emulator refuses as AWS would.

Each deployed role (of every function, state machine and of the scheduler) makes every call below. What its deployed
policies do not list has to be refused; what they list has to be let through, so that no refusal means nothing. A call
that is let through does nothing: it has a condition that never holds, a number out of range, or the name of nothing.
Who may do what matters most is written down here once more, by hand.
"""

import contextlib
import fnmatch
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from botocore.session import Session

from local.cloud import REGION, STACK_NAME, LocalCloud
from tests.support.template import folder_name, load_template

ACCOUNT = "000000000000"
DENIED = {"AccessDenied", "AccessDeniedException"}
NEVER = "attribute_exists(pk) AND attribute_not_exists(pk)"
LEADING_KEYS = (
    "batch#x", "file#x", "forwarded#x", "limiter", "owner#x", "pipeline#x", "prediction#x", "recent#x", "recipe#x",
    "schema#x", "tokens", "upstream#x", "usage#x", "x",
)  # fmt: skip
SECRETS = ("ReplicateTokenSecret", "SigningSecret", "WebhookMasterSecret", "LinkSecret")
QUEUES = (
    "RequestsQueue", "RequestsDeadLetterQueue", "DeliveriesQueue", "DeliveriesDeadLetterQueue",
    "ChangesRetryQueue", "ChangesDeadLetterQueue", "RunJobsDeadLetterQueue",
)  # fmt: skip
MACHINES = (
    "TrackPredictionStateMachine",
    "TrackSubmittedStateMachine",
    "RunPipelineStateMachine",
    "RunBatchStateMachine",
)
KEYS = {
    "OutputsBucket": ("payloads/x", "payloads/batches/x", "payloads/schemas/x", "alice/x/0", "alice/batches/x", "x"),
    "InputsBucket": ("files/x", "batches/x", "photos/x"),
}
ROLES = sorted(
    name
    for name, found in load_template()["Resources"].items()
    if found["Type"] in ("AWS::Serverless::Function", "AWS::Serverless::StateMachine", "AWS::IAM::Role")
)


@dataclass(frozen=True)
class Probe:
    """A call, and the permission that it takes.

    Attributes:
        name: What it tries, in the words of `ONLY`.
        action: The permission, such as `s3:GetObject`.
        arn: Of what.
        call: Makes it; given a client of the service.
        service: Whose client.
        leading_key: The partition key of the item, where it is one of the table.
    """

    name: str
    action: str
    arn: str
    call: Callable[[Any], Any]
    service: str = ""
    leading_key: str | None = None


TOKEN_READERS = {
    "start_prediction", "read_prediction", "cancel_prediction", "manage_batches", "call_replicate", "manage_recipes",
    "deploy_recipes", "run_prediction", "submit_prediction", "poll_prediction", "sweep_predictions", "manage_pipelines",
    "advance_pipeline",
}  # fmt: skip
ONLY: dict[str, set[str]] = {
    "GetSecretValue ReplicateTokenSecret": TOKEN_READERS,
    "GetSecretValue SigningSecret": {"receive_webhook", "sweep_predictions"},
    "GetSecretValue WebhookMasterSecret": {"give_secret", "deliver_webhook"},
    "GetSecretValue LinkSecret": {"serve_files", "start_from_queue", "advance_pipeline"},
    "PutSecretValue SigningSecret": {"sweep_predictions"},
    "GetItem tokens": {"authorize_request"},
    "Query tokens": set(),
    "PutItem tokens": set(),
    "DeleteItem tokens": set(),
    "PutItem owner#x": {"run_prediction", "submit_prediction", "poll_prediction"},
    "DeleteItem prediction#x": {"cancel_prediction", "sweep_predictions"},
    "DeleteItem recipe#x": {"manage_recipes", "deploy_recipes"},
    "DeleteItem file#x": {"store_files"},
    "PutItem prediction#x": {
        "start_prediction", "read_prediction", "cancel_prediction", "manage_batches", "receive_webhook",
        "start_from_queue", "run_prediction", "submit_prediction", "poll_prediction", "copy_outputs",
        "sweep_predictions", "manage_pipelines", "advance_pipeline",
    },
    "StartExecution TrackPredictionStateMachine": {
        "start_prediction", "start_from_queue", "run_prediction", "sweep_predictions",
    },
    "StartExecution TrackSubmittedStateMachine": {"start_prediction", "run_prediction", "sweep_predictions"},
    "StartExecution RunPipelineStateMachine": {"manage_pipelines", "sweep_predictions"},
    "StartExecution RunBatchStateMachine": {
        "manage_batches", "start_from_queue", "sweep_predictions", "run_batch_state_machine",
    },
    "PutObject OutputsBucket alice/x/0": {"copy_outputs"},
    "DeleteObject OutputsBucket alice/x/0": {"cancel_prediction", "sweep_predictions"},
    "DeleteObject InputsBucket files/x": {"store_files"},
    "PutObject InputsBucket files/x": {"store_files"},
    "PutObject InputsBucket batches/x": set(),
    "ListBucket OutputsBucket": {"cancel_prediction", "sweep_predictions"},
    "ListBucket InputsBucket": set(),
    "SendMessage ChangesRetryQueue": {"publish_changes"},
    "ReceiveMessage ChangesRetryQueue": {"publish_changes"},
    "SendMessage RequestsQueue": {"advance_pipeline", "run_batch_state_machine", "scheduler_role"},
    "PutEvents": {"publish_changes"},
    "Invoke RunPredictionFunction": set(),
}  # fmt: skip
"""Who may do what matters most, of all roles of the stack."""


@pytest.fixture(scope="module")
def probes(cloud: LocalCloud) -> list[Probe]:
    return [*_of_the_table(cloud), *_of_buckets(cloud), *_of_the_rest(cloud), *_of_nobody(cloud)]


def _of_the_table(cloud: LocalCloud) -> Iterator[Probe]:
    table = cloud.stack.table_name
    arn = f"arn:aws:dynamodb:{REGION}:{ACCOUNT}:table/{table}"

    def probe(operation: str, leading_key: str, action: str = "", **arguments: Any) -> Probe:
        return Probe(
            f"{operation} {leading_key}",
            f"dynamodb:{action or operation}",
            arn,
            lambda client: getattr(client, _method(operation))(**arguments),
            leading_key=leading_key,
        )

    for name in LEADING_KEYS:
        key = {"pk": {"S": name}, "sk": {"S": "probe"}}
        yield probe("GetItem", name, TableName=table, Key=key)
        yield probe("PutItem", name, TableName=table, Item=key, ConditionExpression=NEVER)
        yield probe("DeleteItem", name, TableName=table, Key=key, ConditionExpression=NEVER)
    for name in ("tokens", "prediction#x", "recipe#x", "batch#x", "pipeline#x", "x"):
        key = {"pk": {"S": name}, "sk": {"S": "probe"}}
        values = {":pk": {"S": name}}
        put = {"TableName": table, "Item": key, "ConditionExpression": NEVER}
        yield probe("UpdateItem", name, TableName=table, Key=key, ConditionExpression=NEVER)
        yield probe("Query", name, TableName=table, KeyConditionExpression="pk = :pk", ExpressionAttributeValues=values)
        yield probe("BatchGetItem", name, RequestItems={table: {"Keys": [key]}})
        yield probe("TransactWriteItems", name, "PutItem", TransactItems=[{"Put": put}])
    for index, attribute in (("by_owner", "owner"), ("due", "open"), ("by_upstream_id", "upstream_id")):
        query = {
            "TableName": table,
            "IndexName": index,
            "KeyConditionExpression": "#key = :key",
            "ExpressionAttributeNames": {"#key": attribute},
            "ExpressionAttributeValues": {":key": {"S": "x"}},
        }
        yield Probe(f"Query {index}", "dynamodb:Query", f"{arn}/index/{index}", _call("query", **query))


def _of_buckets(cloud: LocalCloud) -> Iterator[Probe]:
    for bucket, keys in {**KEYS, "another-stack": ("payloads/x", "x")}.items():
        name = cloud.resources.get(bucket, bucket)
        arn = f"arn:aws:s3:::{name}"
        for key in keys:
            place = {"Bucket": name, "Key": key}
            of = f"{bucket} {key}"
            yield Probe(f"GetObject {of}", "s3:GetObject", f"{arn}/{key}", _call("get_object", **place))
            # The emulator looks at IfMatch once the call is let through, and finds nothing there that could match.
            yield Probe(
                f"PutObject {of}", "s3:PutObject", f"{arn}/{key}", _call("put_object", **place, Body=b"", IfMatch='"x"')
            )
            yield Probe(f"DeleteObject {of}", "s3:DeleteObject", f"{arn}/{key}", _call("delete_object", **place))
        yield Probe(f"ListBucket {bucket}", "s3:ListBucket", arn, _call("list_objects_v2", Bucket=name, Prefix="none/"))


def _of_the_rest(cloud: LocalCloud) -> Iterator[Probe]:
    at = cloud.resources
    for name in (*SECRETS, "another-stack"):
        arn = _arn_of_secret(cloud, name)
        yield Probe(
            f"GetSecretValue {name}", "secretsmanager:GetSecretValue", arn, _call("get_secret_value", SecretId=arn)
        )
        # Beside what is there, which stays the current one.
        put = _call("put_secret_value", SecretId=arn, SecretString="{}", VersionStages=["PROBE"])
        yield Probe(f"PutSecretValue {name}", "secretsmanager:PutSecretValue", arn, put)
    for name in (*QUEUES, "another-stack"):
        url = at.get(name) or _address_of(cloud, name)
        arn = f"arn:aws:sqs:{REGION}:{ACCOUNT}:{url.rpartition('/')[2]}"
        send = _call("send_message", QueueUrl=url, MessageBody="{}", DelaySeconds=100_000)
        yield Probe(f"SendMessage {name}", "sqs:SendMessage", arn, send)
        receive = _call("receive_message", QueueUrl=url, MaxNumberOfMessages=100)
        yield Probe(f"ReceiveMessage {name}", "sqs:ReceiveMessage", arn, receive)
    for name in MACHINES:
        machine = at[name]
        start = _call("start_execution", stateMachineArn=machine, name="no name?", input="{}")
        yield Probe(f"StartExecution {name}", "states:StartExecution", machine, start)
        run = machine.replace(":stateMachine:", ":execution:") + ":none"
        yield Probe(f"StopExecution {name}", "states:StopExecution", run, _call("stop_execution", executionArn=run))
        yield Probe(
            f"DescribeExecution {name}", "states:DescribeExecution", run, _call("describe_execution", executionArn=run)
        )
    success = _call("send_task_success", taskToken="none", output="{}")
    yield Probe("SendTaskSuccess", "states:SendTaskSuccess", "*", success)
    failure = _call("send_task_failure", taskToken="none")
    yield Probe("SendTaskFailure", "states:SendTaskFailure", "*", failure)
    bus = cloud.stack.event_bus_name
    entry = {"Source": "probe", "DetailType": "probe", "Detail": "{}", "EventBusName": bus}
    arn = f"arn:aws:events:{REGION}:{ACCOUNT}:event-bus/{bus}"
    yield Probe("PutEvents", "events:PutEvents", arn, _call("put_events", Entries=[entry]))
    for rule in (f"{STACK_NAME}-recipe-none", at["ManifestsRule"].rpartition("/")[2].rpartition("|")[2], "another"):
        arn = f"arn:aws:events:{REGION}:{ACCOUNT}:rule/{rule}"
        put = _call("put_rule", Name=rule, EventPattern="{")
        yield Probe(f"PutRule {rule}", "events:PutRule", arn, put)
    for group, name in ((STACK_NAME, f"{STACK_NAME}-recipe-none"), (STACK_NAME, "none"), ("default", "none")):
        arn = f"arn:aws:scheduler:{REGION}:{ACCOUNT}:schedule/{group}/{name}"
        delete = _call("delete_schedule", Name=name, GroupName=group)
        yield Probe(f"DeleteSchedule {group} {name}", "scheduler:DeleteSchedule", arn, delete)
    for parameter in (cloud.outputs["ApiUrlParameterName"], "/another-stack/api_url"):
        arn = f"arn:aws:ssm:{REGION}:{ACCOUNT}:parameter{parameter}"
        yield Probe(f"GetParameter {parameter}", "ssm:GetParameter", arn, _call("get_parameter", Name=parameter))
    for name in (
        "SubmitPredictionFunction",
        "AdvancePipelineFunction",
        "PrepareBatchFunction",
        "RunPredictionFunction",
    ):
        arn = f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:{at[name]}"
        dry = _call("invoke", FunctionName=at[name], InvocationType="DryRun", Payload=b"{}")
        yield Probe(f"Invoke {name}", "lambda:InvokeFunction", arn, dry)
    arn = f"arn:aws:cloudformation:{REGION}:{ACCOUNT}:stack/{STACK_NAME}/x"
    yield Probe("DescribeStacks", "cloudformation:DescribeStacks", arn, _call("describe_stacks", StackName=STACK_NAME))


def _of_nobody(cloud: LocalCloud) -> Iterator[Probe]:
    """What no role of the stack may do, whatever the template says."""
    at, table = cloud.resources, cloud.stack.table_name
    queue, bucket, function = at["RequestsQueue"], cloud.stack.outputs_bucket, at["ReceiveWebhookFunction"]
    role, machine = at["ReceiveWebhookFunctionRole"], at["TrackPredictionStateMachine"]
    admin = json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]})
    secret = _arn_of_secret(cloud, "ReplicateTokenSecret")
    topic: dict[str, dict[str, Any]] = {
        "dynamodb:Scan": {"TableName": table},
        "dynamodb:DeleteTable": {"TableName": table},
        "dynamodb:UpdateTable": {"TableName": table, "BillingMode": "PAY_PER_REQUEST"},
        "s3:DeleteBucket": {"Bucket": bucket},
        "s3:PutBucketPolicy": {"Bucket": bucket, "Policy": admin},
        "s3:DeleteBucketPolicy": {"Bucket": bucket},
        "secretsmanager:DeleteSecret": {"SecretId": secret},
        "secretsmanager:UpdateSecret": {"SecretId": secret},
        "secretsmanager:ListSecrets": {},
        "sqs:PurgeQueue": {"QueueUrl": queue},
        "sqs:DeleteQueue": {"QueueUrl": queue},
        "sqs:SetQueueAttributes": {"QueueUrl": queue, "Attributes": {"Policy": admin}},
        "states:DeleteStateMachine": {"stateMachineArn": machine},
        "states:UpdateStateMachine": {"stateMachineArn": machine, "roleArn": machine},
        "states:ListExecutions": {"stateMachineArn": machine},
        "states:GetExecutionHistory": {"executionArn": machine.replace(":stateMachine:", ":execution:") + ":none"},
        "events:DeleteEventBus": {"Name": cloud.stack.event_bus_name},
        "iam:CreateUser": {"UserName": "mallory"},
        "iam:PutRolePolicy": {"RoleName": role, "PolicyName": "mine", "PolicyDocument": admin},
        "iam:AttachRolePolicy": {"RoleName": role, "PolicyArn": "arn:aws:iam::aws:policy/AdministratorAccess"},
        "iam:GetRole": {"RoleName": role},
        "lambda:GetFunction": {"FunctionName": function},
        "lambda:DeleteFunction": {"FunctionName": function},
        "lambda:UpdateFunctionConfiguration": {"FunctionName": function, "Timeout": 15},
        "lambda:UpdateFunctionCode": {"FunctionName": function, "ZipFile": b"none"},
        "ssm:PutParameter": {"Name": cloud.outputs["ApiUrlParameterName"], "Value": "https://x", "Type": "String"},
        "logs:FilterLogEvents": {"logGroupName": f"/aws/lambda/{STACK_NAME}"},
        "logs:DeleteLogGroup": {"logGroupName": f"/aws/lambda/{STACK_NAME}"},
        "cloudformation:DeleteStack": {"StackName": STACK_NAME},
        "sts:AssumeRole": {"RoleArn": f"arn:aws:iam::{ACCOUNT}:role/{role}", "RoleSessionName": "mallory"},
    }
    for action, arguments in topic.items():
        service, _, operation = action.partition(":")
        ours = {"states": "stepfunctions"}.get(service, service)
        yield Probe(f"nobody {action}", action, "", _call(_method(operation), **arguments), service=ours)


def _call(method: str, **arguments: Any) -> Callable[[Any], Any]:
    return lambda client: getattr(client, method)(**arguments)


def _method(operation: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower()


def _arn_of_secret(cloud: LocalCloud, name: str) -> str:
    found: str = cloud.client("secretsmanager").describe_secret(SecretId=cloud.resources.get(name, name))["ARN"]
    return found


def _address_of(cloud: LocalCloud, queue: str) -> str:
    found: str = cloud.client("sqs").get_queue_url(QueueName=queue)["QueueUrl"]
    return found


@pytest.fixture(scope="module", autouse=True)
def another_stack(cloud: LocalCloud) -> Iterator[None]:
    """A bucket, a queue, a secret and a parameter that are not the stack's."""
    s3, sqs, secrets, ssm = map(cloud.client, ("s3", "sqs", "secretsmanager", "ssm"))
    s3.create_bucket(Bucket="another-stack")
    queue = sqs.create_queue(QueueName="another-stack")["QueueUrl"]
    secrets.create_secret(Name="another-stack", SecretString="none")
    ssm.put_parameter(Name="/another-stack/api_url", Value="none", Type="String")
    yield
    s3.delete_bucket(Bucket="another-stack")
    sqs.delete_queue(QueueUrl=queue)
    secrets.delete_secret(SecretId="another-stack", ForceDeleteWithoutRecovery=True)
    ssm.delete_parameter(Name="/another-stack/api_url")


class Roles:
    """Clients of AWS that act as one of the stack's roles after the other."""

    def __init__(self, cloud: LocalCloud) -> None:
        self._cloud = cloud
        session = Session()
        session.set_credentials("none", "none", "none")
        credentials = session.get_credentials()
        assert isinstance(credentials, Credentials)
        self._credentials = credentials
        self._boto = boto3.session.Session(botocore_session=session, region_name=REGION)
        self._clients: dict[str, Any] = {}

    def client(self, service: str) -> Any:
        """A client of a service, with the credentials of whichever role is being acted as when it is used."""
        if service not in self._clients:
            config = Config(
                retries={"total_max_attempts": 1},
                proxies={},
                s3={"addressing_style": "path"},
                parameter_validation=False,
            )
            self._clients[service] = self._boto.client(
                service,
                endpoint_url=self._cloud.endpoint_url,
                config=config,  # type: ignore[call-overload]
            )
        return self._clients[service]

    def name(self, logical_name: str) -> str:
        """The deployed role of a function or a state machine, or the role itself."""
        return self._cloud.resources.get(f"{logical_name}Role") or self._cloud.resources[logical_name]

    def act_as(self, logical_name: str) -> None:
        """Take on a role, which trusts this test for that moment only."""
        iam, name = self._cloud.client("iam"), self.name(logical_name)
        role = iam.get_role(RoleName=name)["Role"]
        root = {"Effect": "Allow", "Principal": {"AWS": f"arn:aws:iam::{ACCOUNT}:root"}, "Action": "sts:AssumeRole"}
        trust = json.dumps({"Version": "2012-10-17", "Statement": [root]})
        iam.update_assume_role_policy(RoleName=name, PolicyDocument=trust)
        try:
            taken = self._cloud.client("sts").assume_role(RoleArn=role["Arn"], RoleSessionName="probe")["Credentials"]
        finally:
            before = json.dumps(role["AssumeRolePolicyDocument"])
            iam.update_assume_role_policy(RoleName=name, PolicyDocument=before)
        self._credentials.access_key = taken["AccessKeyId"]
        self._credentials.secret_key = taken["SecretAccessKey"]
        self._credentials.token = taken["SessionToken"]

    def statements(self, logical_name: str) -> list[dict[str, Any]]:
        """What its own deployed policies allow; those that AWS manages let a function write its log and traces."""
        iam, name = self._cloud.client("iam"), self.name(logical_name)
        policies = [
            iam.get_role_policy(RoleName=name, PolicyName=policy)["PolicyDocument"]["Statement"]
            for policy in iam.list_role_policies(RoleName=name)["PolicyNames"]
        ]
        attached = iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]
        managed = {each["PolicyName"] for each in attached}
        assert managed <= {"AWSLambdaBasicExecutionRole", "AWSXrayWriteOnlyAccess"}
        found = [statement for policy in policies for statement in policy]
        assert {statement["Effect"] for statement in found} <= {"Allow"}
        return found


@pytest.fixture(scope="module")
def roles(cloud: LocalCloud) -> Roles:
    return Roles(cloud)


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def permits(statements: list[dict[str, Any]], probe: Probe) -> bool:
    """Whether policies list what a probe does."""
    for statement in statements:
        if not any(fnmatch.fnmatchcase(probe.action, action) for action in _listed(statement["Action"])):
            continue
        if not any(fnmatch.fnmatchcase(probe.arn, arn) for arn in _listed(statement["Resource"])):
            continue
        conditions = statement.get("Condition", {})
        if not conditions:
            return True
        assert conditions.keys() == {"ForAllValues:StringLike"}, f"{probe.action}: what does {conditions} ask for?"
        assert probe.leading_key, f"{probe.action} is not about an item"
        keys = _listed(conditions["ForAllValues:StringLike"]["dynamodb:LeadingKeys"])
        if any(fnmatch.fnmatchcase(probe.leading_key, key) for key in keys):
            return True
    return False


def is_denied(client: Any, probe: Probe) -> bool:
    """Whether AWS refuses the call for want of permission; anything else, a success too, is let through."""
    with contextlib.suppress(ClientError):
        try:
            probe.call(client)
        except ClientError as error:
            if error.response["Error"]["Code"] in DENIED:
                return True
            raise
    return False


@pytest.mark.parametrize("name", ROLES)
def test_role_is_refused_what_its_policies_do_not_list_and_let_through_what_they_do(
    name: str, probes: list[Probe], roles: Roles, record_property: Callable[[str, object], None]
) -> None:
    statements = roles.statements(name)
    roles.act_as(name)
    wrong = []
    allowed = 0
    for probe in probes:
        expected = permits(statements, probe) if probe.arn else False
        service = probe.service or probe.action.partition(":")[0]
        client = roles.client({"states": "stepfunctions"}.get(service, service))
        if is_denied(client, probe) is expected:
            wrong.append(f"{probe.name}: {'refused' if expected else 'let through'}")
        allowed += expected
    record_property("calls refused", len(probes) - allowed)
    assert not wrong
    assert allowed, "a table in which nothing is let through shows nothing"


@pytest.mark.parametrize("what", ONLY)
def test_what_matters_most_is_allowed_to_those_named_here_only(what: str, probes: list[Probe], roles: Roles) -> None:
    (probe,) = [each for each in probes if each.name == what]
    found = {folder_name(name) for name in ROLES if permits(roles.statements(name), probe)}
    assert found == ONLY[what]


def test_role_is_taken_on_by_its_own_service_only(cloud: LocalCloud, roles: Roles) -> None:
    services = {"AWS::Serverless::Function": "lambda", "AWS::Serverless::StateMachine": "states"}
    for name in ROLES:
        service = services.get(load_template()["Resources"][name]["Type"], "scheduler")
        role = cloud.client("iam").get_role(RoleName=roles.name(name))["Role"]
        (statement,) = role["AssumeRolePolicyDocument"]["Statement"]
        assert _listed(statement["Principal"]["Service"]) == [f"{service}.amazonaws.com"]
        assert (statement["Effect"], _listed(statement["Action"])) == ("Allow", ["sts:AssumeRole"])
