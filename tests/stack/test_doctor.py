"""The checks of a deployed stack: all are ok on one that is as it has to be, and each fault is found with its remedy.

The emulator ignores some of what the template says of the table and the buckets. So the first checks find faults, and
what they advise is what repairs them.
"""

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import pytest
from predictions.cli.__main__ import main
from predictions.cli.checks import Deployed, Finding, Result, run
from predictions.cli.endpoint_checks import EndpointChecks, GivenToken
from predictions.cli.resource_checks import ResourceChecks
from predictions.cli.stack import Stack

from local.cloud import CREDENTIALS, REGION, STACK_NAME, LocalCloud
from local.replicate.process import LocalReplicate
from tests.support.commands import paste
from tests.support.deployment import QUICK
from tests.support.template import ROOT

Clients = Callable[[str], Any]
Find = Callable[..., Finding]

IGNORED = {"table.recovery", "table.ttl", "table.encryption", "outputs-bucket.lifecycle", "inputs-bucket.lifecycle"}
"""What the emulator does not take from the template."""

NOT_KNOWN = {
    "quotas.api-timeout",  # the emulator has no Service Quotas
    "prediction.recognizable",  # the stand-in, as Replicate's documents, shows no webhook
}
TOPIC = QUICK["AlarmTopicArn"]
SUBSCRIBER = TOPIC.replace(":sns:", ":sqs:")


@pytest.fixture(scope="module")
def cloud() -> Iterator[LocalCloud]:
    """A stack of its own: what other tests leave behind is what the checks find, and no poll comes before a webhook."""
    with LocalCloud(parameters=QUICK | {"FirstPollSeconds": "120"}) as started:
        yield started


@pytest.fixture
def replicate(cloud: LocalCloud) -> Iterator[LocalReplicate]:
    """The stand-in for Replicate, without faults."""
    yield cloud.replicate
    cloud.replicate.reset()


@pytest.fixture(autouse=True)
def environment(cloud: LocalCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**CREDENTIALS, "AWS_REGION": REGION, "AWS_ENDPOINT_URL": cloud.endpoint_url}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def repaired(cloud: LocalCloud) -> list[Finding]:
    """The stack as on AWS: what the emulator ignores is set by the commands that the checks print."""
    boto = cloud.client
    boto("sns").create_topic(Name=TOPIC.rpartition(":")[2])
    boto("sqs").create_queue(QueueName="alarms")
    boto("sns").subscribe(TopicArn=TOPIC, Protocol="sqs", Endpoint=SUBSCRIBER)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": cloud.endpoint_url}.items():
            patch.setenv(name, value)
        checks = ResourceChecks(Deployed(Stack(STACK_NAME, REGION, None), time.time), time.time)
        findings = [run(check) for check in checks.checks()]
    for finding in findings:
        if finding.name in IGNORED:
            paste(finding.action, boto)
    return findings


@pytest.fixture
def find(cloud: LocalCloud, repaired: object) -> Iterator[Find]:
    """Runs one check by its name, with what differs for it."""
    with httpx.Client(timeout=30, trust_env=False) as http:

        def one(name: str, outputs: Mapping[str, str] | None = None, now: Callable[[], float] = time.time) -> Finding:
            deployed = Deployed(Stack(STACK_NAME, REGION, None), now)
            deployed.outputs |= outputs or {}
            token = GivenToken(cloud.stack.access_token, "the stack's")
            endpoints = EndpointChecks(deployed, token, http, now)
            (check,) = (
                each for each in [*ResourceChecks(deployed, now).checks(), *endpoints.checks()] if each.name == name
            )
            return run(check)

        yield one


def tokens_of(cloud: LocalCloud) -> int:
    """How many access tokens there are."""
    count: int = cloud.client("dynamodb").query(
        TableName=cloud.stack.table_name,
        KeyConditionExpression="pk = :pk",
        ExpressionAttributeValues={":pk": {"S": "tokens"}},
        ConsistentRead=True,
    )["Count"]
    return count


def test_faults_that_the_emulator_makes_itself_are_found_and_no_others(repaired: list[Finding]) -> None:
    assert {each.name for each in repaired if each.result is Result.FAILED} == IGNORED
    assert {each.name for each in repaired if each.result is Result.UNKNOWN} <= NOT_KNOWN


@pytest.mark.usefixtures("repaired", "replicate")
def test_healthy_stack_runs_a_prediction_to_its_stored_file_and_all_checks_are_ok(
    cloud: LocalCloud, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = tokens_of(cloud)
    checks, prediction = (
        [word.replace("$STACK", STACK_NAME) for word in shlex.split(line)[1:]]
        for line in re.findall(r"^ *(replicate-serverless .*)$", (ROOT / "docs/aws.md").read_text(), re.MULTILINE)
    )
    assert main(checks) == 0
    assert "\nok       api.openapi " in capsys.readouterr().out
    prediction[prediction.index("--predict") + 1] = "local/painter"
    code = main([*prediction, "--json"])
    out, err = capsys.readouterr()
    report = json.loads(out)
    found = {each["name"]: each for each in report["checks"]}
    assert {name: each for name, each in found.items() if each["result"] != "ok" and name not in NOT_KNOWN} == {}
    assert (code, report["failed"], report["unknown"]) == (0, 0, len(NOT_KNOWN))
    assert len(found) == report["ok"] + len(NOT_KNOWN) > 40
    assert "SubmitGraceSeconds=45 follows" in found["prediction.listed"]["seen"]
    assert "no poll ran" in found["prediction.webhook"]["seen"]
    assert "with the SHA-256 that was stored" in found["prediction.link"]["seen"]
    # Progress is shown, and neither of the tokens; the token that was made is revoked.
    assert "processing" in err
    assert cloud.replicate.token not in out + err
    assert tokens_of(cloud) == tokens


@pytest.mark.slow
@pytest.mark.usefixtures("repaired")
def test_slow_list_and_a_lost_file_are_found_with_what_to_do(
    replicate: LocalReplicate, capsys: pytest.CaptureFixture[str]
) -> None:
    replicate.settings(list_lag_seconds=11)
    replicate.fault("file_error", status=404, times=None)
    code = main(["doctor", "--predict", "local/painter", "--stack", STACK_NAME])
    out, _ = capsys.readouterr()
    assert code == 1
    failed = {block.split()[0]: block for block in out.split("FAILED ")[1:]}
    assert set(failed) == {"prediction.listed", "prediction.stored"}
    assert "-> Deploy with SubmitGraceSeconds=" in failed["prediction.listed"]
    assert "outputs archive" in failed["prediction.stored"]


# -- one fault each ------------------------------------------------------------------------------------------------


def disable_schedule(cloud: LocalCloud) -> None:
    place = {"Name": cloud.resources["SweepPredictionsFunctionEveryMinute"], "GroupName": STACK_NAME}
    scheduler = cloud.client("scheduler")
    found = scheduler.get_schedule(**place)
    same = {key: found[key] for key in ("ScheduleExpression", "FlexibleTimeWindow", "Target")}
    scheduler.update_schedule(**place, **same, State="DISABLED")


def disable_actions(cloud: LocalCloud) -> None:
    cloud.client("cloudwatch").disable_alarm_actions(AlarmNames=[cloud.resources["PausedAlarm"]])


def disable_mapping(cloud: LocalCloud) -> None:
    cloud.client("lambda").update_event_source_mapping(UUID=cloud.resources["RequestsEventSource"], Enabled=False)


def unprotect(cloud: LocalCloud) -> None:
    cloud.client("dynamodb").update_table(TableName=cloud.stack.table_name, DeletionProtectionEnabled=False)


def recovery_off(cloud: LocalCloud) -> None:
    cloud.client("dynamodb").update_continuous_backups(
        TableName=cloud.stack.table_name,
        PointInTimeRecoverySpecification={"PointInTimeRecoveryEnabled": False},
    )


def expiry_by_another_attribute(cloud: LocalCloud) -> None:
    specification = {"Enabled": True, "AttributeName": "expires"}
    cloud.client("dynamodb").update_time_to_live(
        TableName=cloud.stack.table_name, TimeToLiveSpecification=specification
    )


def part_of_a_block(cloud: LocalCloud) -> None:
    block = {"BlockPublicAcls": True, "BlockPublicPolicy": False, "IgnorePublicAcls": True}
    cloud.client("s3").put_public_access_block(Bucket=cloud.stack.outputs_bucket, PublicAccessBlockConfiguration=block)


def shorter_lifecycle(cloud: LocalCloud) -> None:
    rule = {"ID": "expire-results", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 1}}
    cloud.client("s3").put_bucket_lifecycle_configuration(
        Bucket=cloud.stack.outputs_bucket, LifecycleConfiguration={"Rules": [rule]}
    )


def of_bucket(operation: str, bucket: str = "inputs_bucket", **asked: Any) -> Callable[[LocalCloud], None]:
    return lambda cloud: getattr(cloud.client("s3"), operation)(Bucket=getattr(cloud.stack, bucket), **asked)


OTHER_KEY = {"Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms"}}]}
OTHER_ORIGIN = {"CORSRules": [{"AllowedOrigins": ["*"], "AllowedMethods": ["GET"]}]}
REPAIRED = {
    "event-sources": disable_mapping,
    "sweep-schedule": disable_schedule,
    "table.recovery": recovery_off,
    "table.ttl": expiry_by_another_attribute,
    "table.deletion-protection": unprotect,
    "outputs-bucket.public-access": part_of_a_block,
    "inputs-bucket.public-access": of_bucket("delete_public_access_block"),
    "inputs-bucket.ownership": of_bucket("delete_bucket_ownership_controls"),
    "inputs-bucket.encryption": of_bucket("put_bucket_encryption", ServerSideEncryptionConfiguration=OTHER_KEY),
    "inputs-bucket.lifecycle": of_bucket("delete_bucket_lifecycle"),
    "outputs-bucket.lifecycle": shorter_lifecycle,
    "inputs-bucket.cors": of_bucket("delete_bucket_cors"),
    "outputs-bucket.cors": of_bucket("put_bucket_cors", "outputs_bucket", CORSConfiguration=OTHER_ORIGIN),
    "inputs-bucket.events": of_bucket("put_bucket_notification_configuration", NotificationConfiguration={}),
    "outputs-bucket.events": of_bucket(
        "put_bucket_notification_configuration",
        "outputs_bucket",
        NotificationConfiguration={"EventBridgeConfiguration": {}},
    ),
    "alarms.actions": disable_actions,
}


@pytest.mark.parametrize("name", REPAIRED)
def test_fault_is_found_and_the_command_that_is_advised_repairs_it(cloud: LocalCloud, find: Find, name: str) -> None:
    REPAIRED[name](cloud)
    found = find(name)
    try:
        assert found.result is Result.FAILED, found
    finally:
        if found.action:
            paste(found.action, cloud.client)
    assert find(name).result is Result.OK, found.action


def test_policy_without_tls_is_found(cloud: LocalCloud, find: Find) -> None:
    s3, bucket = cloud.client("s3"), cloud.stack.outputs_bucket
    policy = s3.get_bucket_policy(Bucket=bucket)["Policy"]
    s3.delete_bucket_policy(Bucket=bucket)
    try:
        assert find("outputs-bucket.tls").result is Result.FAILED
    finally:
        s3.put_bucket_policy(Bucket=bucket, Policy=policy)
    assert find("outputs-bucket.tls").result is Result.OK


def test_dead_letter_is_found_with_the_command_that_lists_it(cloud: LocalCloud, find: Find) -> None:
    sqs, url = cloud.client("sqs"), cloud.resources["ChangesDeadLetterQueue"]
    sqs.send_message(QueueUrl=url, MessageBody="{}")
    found = find("dead-letters")
    (letter,) = sqs.receive_message(QueueUrl=url)["Messages"]
    sqs.delete_message(QueueUrl=url, ReceiptHandle=letter["ReceiptHandle"])
    assert (found.result, found.seen) == (Result.FAILED, "1 in changes")
    assert found.action == f"replicate-serverless dead-letters list changes --stack {STACK_NAME}"
    assert find("dead-letters").result is Result.OK


def test_alarm_that_fires_is_found_with_its_section_of_the_runbook(cloud: LocalCloud, find: Find) -> None:
    cloudwatch, name = cloud.client("cloudwatch"), cloud.resources["OverduePredictionsAlarm"]
    cloudwatch.set_alarm_state(AlarmName=name, StateValue="ALARM", StateReason="test")
    found = find("alarms.state")
    cloudwatch.set_alarm_state(AlarmName=name, StateValue="OK", StateReason="test")
    assert (found.result, "docs/runbook.md#overduepredictionsalarm" in found.action) == (Result.FAILED, True)
    assert find("alarms.state").result is Result.OK


def test_topic_without_a_confirmed_subscription_or_without_existence_is_found(cloud: LocalCloud, find: Find) -> None:
    sns = cloud.client("sns")
    assert find("alarms.topic").result is Result.OK
    for each in sns.list_subscriptions_by_topic(TopicArn=TOPIC)["Subscriptions"]:
        sns.unsubscribe(SubscriptionArn=each["SubscriptionArn"])
    try:
        found = find("alarms.topic")
        assert (found.result, "no confirmed subscription" in found.seen) == (Result.FAILED, True)
        assert found.action.startswith("aws sns subscribe ")
        sns.delete_topic(TopicArn=TOPIC)
        found = find("alarms.topic")
        assert (found.result, "does not exist" in found.seen) == (Result.FAILED, True)
    finally:
        sns.create_topic(Name=TOPIC.rpartition(":")[2])
        sns.subscribe(TopicArn=TOPIC, Protocol="sqs", Endpoint=SUBSCRIBER)


def test_token_that_replicate_refuses_is_found(cloud: LocalCloud, find: Find) -> None:
    secrets, arn = cloud.client("secretsmanager"), cloud.outputs["ReplicateTokenSecretArn"]
    token = secrets.get_secret_value(SecretId=arn)["SecretString"]
    secrets.put_secret_value(SecretId=arn, SecretString="r8_wrong")
    try:
        found = find("replicate.token")
    finally:
        secrets.put_secret_value(SecretId=arn, SecretString=token)
    assert (found.result, found.seen) == (Result.FAILED, "Replicate refuses the stack's token (401)")
    assert "secrets rotate replicate-token" in found.action
    assert find("replicate.token").result is Result.OK


def test_secret_that_does_not_exist_is_found(cloud: LocalCloud, find: Find) -> None:
    missing = cloud.outputs["ReplicateTokenSecretArn"][:-6] + "AbCdEf"
    found = find("replicate.token", {"ReplicateTokenSecretArn": missing.replace("Secret", "Nothing")})
    assert (found.result, "does not exist" in found.seen) == (Result.FAILED, True)
    assert "secrets rotate replicate-token" in found.action


def test_signing_secret_that_is_not_stored_is_found_and_the_command_that_is_advised_stores_it(
    cloud: LocalCloud, find: Find
) -> None:
    secrets, arn = cloud.client("secretsmanager"), cloud.outputs["SigningSecretArn"]
    stored = secrets.get_secret_value(SecretId=arn)["SecretString"]
    secrets.put_secret_value(SecretId=arn, SecretString="{}")
    try:
        found = find("replicate.signing-secret")
        assert (found.result, "no signing secret is stored" in found.seen) == (Result.FAILED, True)
        assert found.action.startswith(f"replicate-serverless secrets refresh --stack {STACK_NAME}")
        assert main(["secrets", "refresh", "--stack", STACK_NAME]) == 0
        assert find("replicate.signing-secret").result is Result.OK
    finally:
        secrets.put_secret_value(SecretId=arn, SecretString=stored)


@pytest.mark.parametrize(
    ("address", "seen"),
    [
        ("{api}/none", "404"),
        ("http://127.0.0.1:1/v1", "got no response"),
        ("{replicate}", "something other than receive_webhook"),
    ],
)
def test_webhook_address_that_leads_elsewhere_is_found(cloud: LocalCloud, find: Find, address: str, seen: str) -> None:
    ssm, name = cloud.client("ssm"), cloud.outputs["ApiUrlParameterName"]
    other = address.format(api=cloud.stack.api_url, replicate=cloud.replicate_url)
    ssm.put_parameter(Name=name, Value=other, Type="String", Overwrite=True)
    try:
        found = find("webhooks.route")
    finally:
        ssm.put_parameter(Name=name, Value=cloud.stack.api_url, Type="String", Overwrite=True)
    assert found.result is Result.FAILED
    assert seen in found.seen
    assert found.action
    assert find("webhooks.route").result is Result.OK


def test_route_without_its_authorizer_is_found(cloud: LocalCloud, find: Find) -> None:
    gateway, api = cloud.client("apigateway"), cloud.resources["Api"]
    pages = gateway.get_paginator("get_resources").paginate(restApiId=api)
    (resource,) = (each["id"] for page in pages for each in page["items"] if each["path"] == "/predictions")
    place = {"restApiId": api, "resourceId": resource, "httpMethod": "GET"}

    def authorize(kind: str) -> None:
        operation = {"op": "replace", "path": "/authorizationType", "value": kind}
        gateway.update_method(**place, patchOperations=[operation])
        gateway.create_deployment(restApiId=api, stageName="v1")

    before = gateway.get_method(**place)["authorizationType"]
    authorize("NONE")
    try:
        found = [find("api.no-token"), find("api.wrong-token")]
    finally:
        authorize(before)
    assert {each.result for each in found} == {Result.FAILED}
    assert [find(name).result for name in ("api.no-token", "api.wrong-token")] == [Result.OK, Result.OK]


def test_clock_of_the_caller_that_is_off_is_found_and_not_taken_for_replicates(find: Find) -> None:
    def late() -> float:
        return time.time() + 400

    found = find("clock.caller", now=late)
    assert (found.result, "+400" in found.seen or "+401" in found.seen) == (Result.FAILED, True), found
    assert find("clock.replicate", now=late).result is Result.OK
