"""The template as AWS's services get it: with everything on, everything off, and each part alone on or off.

What lengths of names and texts the services take is in AWS's schemas, to which `make audit` holds the same templates
(local/opinions/templates.py); here are the limits that no schema has, each with its source, and the room that is left.
"""

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from local.concrete import NOTHING, Stack, UnresolvedError, combinations
from local.opinions import machines, policies, templates
from tests.support.template import ROOT, listed
from tests.support.template import translated_template as template

COMBINATIONS = dict(combinations())
# What has to be left of each limit: a template that grows into one fails here long before it fails on AWS.
MARGIN = 0.1


@cache
def stack(label: str) -> Stack:
    """A stack of the longest name that its parameters allow."""
    parameters = COMBINATIONS[label]
    cloudfront = parameters.get("OutputUrls") == "cloudfront"
    name = templates.LONGEST_NAME_WITH_CLOUDFRONT if cloudfront else templates.LONGEST_NAME
    return Stack(template(), name, parameters)


@cache
def resources(label: str) -> dict[str, dict[str, Any]]:
    return stack(label).resources()


def of_type(label: str, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from (
        (name, found["Properties"]) for name, found in resources(label).items() if found["Type"] == f"AWS::{kind}"
    )


def size(value: Any) -> int:
    """The characters of a document as services count them: without white space."""
    return len(json.dumps(value, separators=(",", ":")))


# -- refused -------------------------------------------------------------------------------------------------------


def changed(path: str, value: Any) -> Stack:
    """A stack of a template in which one value is another."""
    made = copy.deepcopy(template())
    at = made
    *parents, last = path.split("/")
    for name in parents:
        at = at[name]
    at[last] = value
    return Stack(made, "stack", NOTHING)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("Outputs/TableName/Value", {"Ref": "StackDashboard"}, "StackDashboard is referred to, but ShowDashboard"),
        ("Outputs/TableName/Value", {"Ref": "Nowhere"}, "no resource and no parameter Nowhere"),
        ("Outputs/TableName/Value", {"Fn::Sub": "${Nowhere.Arn}"}, "no resource and no parameter Nowhere"),
        ("Outputs/TableName/Value", {"Fn::GetAtt": ["PredictionsTable", "Colour"]}, "no attribute Colour"),
        ("Outputs/TableName/Value", {"Fn::If": ["Nowhere", "a", "b"]}, "no condition Nowhere"),
        ("Outputs/TableName/Value", {"Fn::FindInMap": ["SyncWait", "26", "FunctionSeconds"]}, "SyncWait has no 26"),
        ("Outputs/TableName/Value", {"Fn::Cidr": []}, "Fn::Cidr is not known"),
        ("Outputs/TableName/Value", {"Ref": "ReplicateToken"}, "no resource and no parameter ReplicateToken"),
        ("Conditions/AllowCors", {"Fn::Maybe": []}, "Fn::Maybe is no condition"),
    ],
)
def test_template_that_cloudformation_refuses_is_refused(path: str, value: Any, reason: str) -> None:
    deployed = changed(path, value)
    with pytest.raises(UnresolvedError, match=re.escape(reason)):
        deployed.concrete()


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({}, "Give either ReplicateApiToken or ReplicateTokenSecretArn"),
        ({**NOTHING, "OutputUrls": "cloudfront"}, "OutputUrls=cloudfront needs"),
        ({**NOTHING, "DomainName": "ai.example.com"}, "Give DomainName and CertificateArn"),
        ({**NOTHING, "ScheduleExpression": "rate(1 hour)"}, "Give ScheduleExpression and ScheduleRequest"),
    ],
)
def test_parameters_that_break_a_rule_are_told(parameters: dict[str, str], reason: str) -> None:
    (told,) = Stack(template(), "stack", parameters).broken_rules()
    assert told.startswith(reason)


# -- every combination ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", COMBINATIONS)
def test_stack_with_each_part_alone_on_or_off_refers_only_to_what_it_has(label: str) -> None:
    concrete = stack(label).concrete()  # raises where it does not
    assert len(concrete["Resources"]) > 170
    assert stack(label).broken_rules() == []
    assert "Fn::" not in json.dumps(concrete), "something is not resolved"


def test_combinations_decide_every_condition_both_ways_and_alone() -> None:
    conditions = template()["Conditions"]
    assert all(stack("everything").decide(each) for each in conditions)
    assert not any(stack("nothing").decide(each) for each in conditions)
    decided = {
        label: frozenset(each for each in conditions if stack(label).decide(each)) for label in COMBINATIONS
    }  # fmt: skip
    for condition in conditions:
        needed = {"SourceBucket"} if condition == "SourceKey" else set()
        with_it = {"SourceKey", condition} if condition == "SourceBucket" else {condition}
        assert any({condition} <= on <= needed | with_it for on in decided.values()), f"{condition} alone is on"
        assert any({condition} <= conditions.keys() - on <= with_it for on in decided.values()), "… alone is off"


@pytest.mark.parametrize("label", COMBINATIONS)
def test_parameters_of_each_combination_are_such_as_the_template_takes(label: str) -> None:
    for name, value in COMBINATIONS[label].items():
        parameter = template()["Parameters"][name]
        assert re.search(parameter.get("AllowedPattern", ""), value), name
        assert value in parameter.get("AllowedValues", [value])
        assert len(value) <= int(parameter.get("MaxLength", 4096))
        if parameter["Type"] == "Number":
            assert parameter.get("MinValue", 0) <= int(value) <= parameter.get("MaxValue", int(value))


@pytest.mark.parametrize("label", ["everything", "nothing"])
def test_no_role_and_no_policy_has_a_name_of_its_own(label: str) -> None:
    # A name of a role is one in all regions of the account, and would need CAPABILITY_NAMED_IAM.
    for _, role in of_type(label, "IAM::Role"):
        assert not {"RoleName", "Path"} & role.keys()
        names = [each["PolicyName"] for each in role.get("Policies", [])]
        names += [each["PolicyName"] for _, each in of_type(label, "IAM::Policy")]
        assert len(names) == len(set(names)), "two policies of a role have one name: one replaces the other"
    assert not list(of_type(label, "IAM::ManagedPolicy"))


@pytest.mark.parametrize("label", ["everything", "nothing"])
def test_names_of_a_type_are_different(label: str) -> None:
    named = ("AlarmName", "QueueName", "StateMachineName", "LayerName", "LogGroupName", "Name")
    found = Counter(
        (resource["Type"], resource["Properties"][name])
        for resource in resources(label).values()
        for name in named
        if name in resource["Properties"]
    )
    assert [name for name, times in found.items() if times > 1] == []
    assert {kind for kind, _ in found} >= {"AWS::StepFunctions::StateMachine", "AWS::Events::EventBus"}


@pytest.mark.parametrize("label", ["everything", "nothing"])
def test_statements_have_ids_that_iam_takes_once_each(label: str) -> None:
    # https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_elements_sid.html
    for path, document in policies.all_policies(template()):
        if path.endswith(label):
            ids = [each["Sid"] for each in document["Statement"] if "Sid" in each]
            assert len(ids) == len(set(ids)), path
            assert all(re.fullmatch("[A-Za-z0-9]+", each) for each in ids)


# -- limits --------------------------------------------------------------------------------------------------------


def packaged(label: str) -> int:
    """Bytes of the template as `sam package` uploads it, with the addresses of all artifacts in it."""
    return len((ROOT / "template.yaml").read_bytes()) + 200 * len(list(of_type(label, "Lambda::Function")))


def policy_of_function(label: str) -> int:
    """The largest policy of a function: a statement for each of its permissions."""
    sizes: Counter[str] = Counter()
    for logical, permission in of_type(label, "Lambda::Permission"):
        arn = {"ArnLike": {"AWS:SourceArn": permission.get("SourceArn", "")}}
        function = permission["FunctionName"]
        made = {"Sid": f"{stack(label).name}-{logical}-ABCDEFGHIJKL", "Effect": "Allow", "Condition": arn}
        made |= {"Principal": {"Service": permission["Principal"]}, "Action": permission["Action"]}
        made |= {"Resource": f"arn:aws:lambda:ap-southeast-4:123456789012:function:{'f' * 64}"}
        sizes[str(function)] += size(made) + 1
    return max(sizes.values()) + size({"Version": "2012-10-17", "Id": "default", "Statement": []})


def policy(kind: str) -> Callable[[str], int]:
    """The largest policy of a resource of a type."""
    return lambda label: max(size(found["PolicyDocument"]) for _, found in of_type(label, kind))


def paths_of_api(label: str) -> int:
    """The resources of the API: each part of a path is one."""
    ((_, api),) = of_type(label, "ApiGateway::RestApi")
    parts = [path.strip("/").split("/") for path in api["Body"]["paths"]]
    return len({tuple(path[:length]) for path in parts for length in range(1, len(path) + 1)}) + 1


def statements_of(kind: str) -> Callable[[str], int]:
    return lambda label: max(len(found["PolicyDocument"]["Statement"]) for _, found in of_type(label, kind))


LIMITS: dict[str, tuple[float, Callable[[str], float], str]] = {
    "bytes of the packaged template": (
        1_000_000, packaged,
        "https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/cloudformation-limits.html",
    ),
    "bytes of the translated template": (
        1_000_000, lambda _: size(template()),
        "https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/cloudformation-limits.html",
    ),
    "resources": (
        500, lambda label: len(resources(label)),
        "https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/cloudformation-limits.html",
    ),
    "mappings": (
        200, lambda _: len(template()["Mappings"]),
        "https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/cloudformation-limits.html",
    ),
    "characters of an output's description": (
        1024, lambda _: max(len(each["Description"]) for each in template()["Outputs"].values()),
        "https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/outputs-section-structure.html",
    ),
    "characters of a trust policy": (
        2048, lambda label: max(size(role["AssumeRolePolicyDocument"]) for _, role in of_type(label, "IAM::Role")),
        "https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html",
    ),
    "managed policies of a role": (
        10, lambda label: max(len(role.get("ManagedPolicyArns", [])) for _, role in of_type(label, "IAM::Role")),
        "https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html",
    ),
    "bytes of a function's own policy": (
        20 * 1024, policy_of_function,
        "https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html",
    ),
    "layers of a function": (
        5, lambda label: max(len(found.get("Layers", [])) for _, found in of_type(label, "Lambda::Function")),
        "https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html",
    ),
    "bytes of a bucket's policy": (
        20 * 1024, policy("S3::BucketPolicy"),
        "https://docs.aws.amazon.com/AmazonS3/latest/userguide/add-bucket-policy.html",
    ),
    "bytes of a queue's policy": (
        8192, policy("SQS::QueuePolicy"),
        "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-policies.html",
    ),
    "statements of a queue's policy": (
        20, statements_of("SQS::QueuePolicy"),
        "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-policies.html",
    ),
    "bytes of a state machine's definition": (
        1024 * 1024, lambda _: max(size(each) for each in machines.deployed(template()).values()),
        "https://docs.aws.amazon.com/step-functions/latest/dg/service-quotas.html",
    ),
    "resources of the API": (
        300, paths_of_api,
        "https://docs.aws.amazon.com/apigateway/latest/developerguide/limits.html",
    ),
    "characters of an event pattern": (
        2048, lambda label: max((size(rule["EventPattern"]) for _, rule in of_type(label, "Events::Rule"))),
        "https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-quota.html",
    ),
    "targets of a rule": (
        5, lambda label: max((len(rule["Targets"]) for _, rule in of_type(label, "Events::Rule"))),
        "https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-quota.html",
    ),
    "characters of a schedule's input": (
        256 * 1024,
        lambda label: max(len(each["Target"].get("Input", "")) for _, each in of_type(label, "Scheduler::Schedule")),
        "https://docs.aws.amazon.com/scheduler/latest/UserGuide/scheduler-quotas.html",
    ),
    "bytes of a parameter's value": (
        4096, lambda label: max(len(found["Value"]) for _, found in of_type(label, "SSM::Parameter")),
        "https://docs.aws.amazon.com/general/latest/gr/ssm.html",
    ),
    "dimensions of an alarm": (
        30, lambda label: max(len(found.get("Dimensions", [])) for _, found in of_type(label, "CloudWatch::Alarm")),
        "https://docs.aws.amazon.com/AmazonCloudWatch/latest/APIReference/API_PutMetricAlarm.html",
    ),
    "tags of a resource": (
        50, lambda label: max(len(listed(x["Properties"].get("Tags", []))) for x in resources(label).values()),
        "https://docs.aws.amazon.com/tag-editor/latest/userguide/best-practices-and-strats.html",
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", ["everything", "nothing"])
@pytest.mark.parametrize("what", LIMITS)
def test_limit_of_aws_is_kept_with_room_to_spare(what: str, label: str) -> None:
    limit, used_by, source = LIMITS[what]
    used = used_by(label)
    assert used > 0 or what == "characters of a schedule's input", "nothing was measured"
    assert used <= (1 - MARGIN) * limit, f"{what}: {used:,} of {limit:,}, see {source}"


def test_template_that_outgrows_a_limit_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    of_template = of_type

    def grown(label: str, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, found in of_template(label, kind):
            for number in range(40 if kind == "Lambda::Permission" else 1):
                yield f"{name}{number}", found
            if kind == "SQS::QueuePolicy":
                yield name, {"PolicyDocument": {"Statement": found["PolicyDocument"]["Statement"] * 10}}

    monkeypatch.setitem(globals(), "of_type", grown)
    beyond = {what for what, (limit, used_by, _) in LIMITS.items() if used_by("everything") > (1 - MARGIN) * limit}
    assert beyond == {
        "bytes of a function's own policy",
        "bytes of a queue's policy",
        "statements of a queue's policy",
    }
