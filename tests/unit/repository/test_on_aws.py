"""What AWS refuses and the local cloud does not: names that another stack has, and limits of sizes, on the template
as CloudFormation gets it.
"""

import json
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.template import ROOT, load_template
from tests.support.template import translated_template as template

# The longest name that docs/deploy.md allows, and what is left of it with rules or with CloudFront.
LONGEST_NAME = 63
PAGE = (ROOT / "docs/deploy.md").read_text()

REGION, ACCOUNT = "ap-southeast-4", "123456789012"

# The property that names a resource, by type, and the longest name that AWS takes; None where AWS makes the name up.
# Global names are those of an account in all regions: a part of the stack's own id has to be in them.
NAMES: dict[str, tuple[str, int] | None] = {
    "AWS::ApiGateway::BasePathMapping": None,
    "AWS::ApiGateway::Deployment": None,
    "AWS::ApiGateway::DomainName": None,  # the user's own
    "AWS::ApiGateway::RestApi": ("Name", 1024),
    "AWS::ApiGateway::Stage": None,
    # https://docs.aws.amazon.com/cloudfront/latest/APIReference/API_OriginAccessControlConfig.html
    "AWS::CloudFront::CachePolicy": ("CachePolicyConfig.Name", 128),
    "AWS::CloudFront::Distribution": None,
    "AWS::CloudFront::KeyGroup": ("KeyGroupConfig.Name", 128),
    "AWS::CloudFront::OriginAccessControl": ("OriginAccessControlConfig.Name", 64),
    "AWS::CloudFront::PublicKey": ("PublicKeyConfig.Name", 128),
    "AWS::CloudFront::ResponseHeadersPolicy": ("ResponseHeadersPolicyConfig.Name", 128),
    "AWS::CloudWatch::Alarm": ("AlarmName", 255),
    "AWS::CloudWatch::Dashboard": ("DashboardName", 255),
    "AWS::DynamoDB::Table": ("TableName", 255),
    "AWS::Events::EventBus": ("Name", 256),
    "AWS::Events::Rule": ("Name", 64),
    "AWS::IAM::Policy": None,  # a part of the role, as its name is
    "AWS::IAM::Role": ("RoleName", 64),
    "AWS::Lambda::EventInvokeConfig": None,
    "AWS::Lambda::EventSourceMapping": None,
    "AWS::Lambda::Function": ("FunctionName", 64),
    "AWS::Lambda::LayerVersion": ("LayerName", 140),
    "AWS::Lambda::Permission": None,
    "AWS::Logs::LogGroup": ("LogGroupName", 512),
    "AWS::S3::Bucket": ("BucketName", 63),
    "AWS::S3::BucketPolicy": None,
    "AWS::SQS::Queue": ("QueueName", 80),
    "AWS::SQS::QueuePolicy": None,
    "AWS::SSM::Parameter": ("Name", 1011),
    "AWS::Scheduler::Schedule": ("Name", 64),
    "AWS::Scheduler::ScheduleGroup": ("Name", 64),
    "AWS::SecretsManager::Secret": ("Name", 512),
    "AWS::StepFunctions::StateMachine": ("StateMachineName", 80),
    "Custom::DeployedRecipes": None,
}
GLOBAL = {kind for kind in NAMES if kind.startswith("AWS::CloudFront::")}


def of_type(kind: str) -> dict[str, dict[str, Any]]:
    return {name: found for name, found in template()["Resources"].items() if found["Type"] == kind}


def given_name(resource: dict[str, Any]) -> Any:
    """The name that the template gives to a resource, or None."""
    named = NAMES[resource["Type"]]
    value: Any = resource.get("Properties", {})
    for part in named[0].split(".") if named else ():
        value = value.get(part) if isinstance(value, dict) else None
    return value if named else None


def long_value(parameter: str) -> str:
    """A parameter's longest value that anybody gives on AWS."""
    found = load_template()["Parameters"][parameter]
    if "MaxLength" in found:
        return "x" * int(found["MaxLength"])
    if "AllowedValues" in found:
        return max(map(str, found["AllowedValues"]), key=len)
    if "MaxValue" in found:
        return str(found["MaxValue"])
    return "x" * {"CorsOrigin": 80, "SourceBucketName": 63, "QueueOwner": 32, "FileOrigins": 0}.get(parameter, 120)


def resolved(value: Any, name: str) -> Any:
    """A value as CloudFormation makes it, for the longest values, in a stack of this name."""
    known = {
        "AWS::StackName": name, "AWS::Region": REGION, "AWS::AccountId": ACCOUNT, "AWS::Partition": "aws-us-gov",
        "AWS::URLSuffix": "amazonaws.com.cn", "AWS::NoValue": None,
        "AWS::StackId": f"arn:aws:cloudformation:{REGION}:{ACCOUNT}:stack/{name}/51af3dc0-da77-11e4-872e-1234567db123",
    }  # fmt: skip
    if isinstance(value, list):
        return [each for each in (resolved(each, name) for each in value) if each is not None]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((function, asked),) = value.items()
        if function == "Ref":
            return known[asked] if asked in known else referred(asked, name)
        if function == "Fn::GetAtt":
            return referred(asked[0] if isinstance(asked, list) else asked.partition(".")[0], name)
        if function == "Fn::Sub":
            text, own = (asked, {}) if isinstance(asked, str) else asked
            own = {key: resolved(each, name) for key, each in own.items()}
            own = known | own
            return re.sub(
                r"\$\{([^}!]+)\}",
                lambda match: str(own[match[1]] if match[1] in own else referred(match[1].partition(".")[0], name)),
                text,
            )
        if function == "Fn::If":
            return max((resolved(each, name) for each in asked[1:]), key=lambda each: len(json.dumps(each)))
        if function == "Fn::Select":
            return resolved(asked[1], name)[int(asked[0])]
        if function == "Fn::Split":
            return str(resolved(asked[1], name)).split(asked[0])
        if function == "Fn::Join":
            return asked[0].join(map(str, resolved(asked[1], name)))
        if function == "Fn::FindInMap":
            return "29000"
    found = {key: resolved(each, name) for key, each in value.items()}
    return {key: each for key, each in found.items() if each is not None}


def referred(to: str, name: str) -> str:
    """A parameter, or the ARN or URL that a resource's attribute is: `{stack}-{logical id}-{12 characters}` in it."""
    if to in template()["Parameters"]:
        return long_value(to)
    return f"arn:aws-us-gov:secretsmanager:{REGION}:{ACCOUNT}:secret:{name[:24]}-{to[:24]}-ABCDEFGHIJKL-abcdef"


# -- names of other stacks -----------------------------------------------------------------------------------------


def test_every_type_is_known_by_its_name() -> None:
    assert {found["Type"] for found in template()["Resources"].values()} == NAMES.keys()


@pytest.mark.parametrize("kind", [kind for kind, named in NAMES.items() if named])
def test_name_is_the_stacks_own_or_made_up_by_aws(kind: str) -> None:
    for logical, resource in of_type(kind).items():
        name = given_name(resource)
        if name is None:
            assert kind not in GLOBAL, "CloudFront makes no names up"
            continue
        first, second = resolved(name, "first"), resolved(name, "second")
        assert first != second, f"{logical}: another stack has the same"
        assert first.replace("first", "second") == second
        if kind in GLOBAL:
            assert "AWS::StackId" in json.dumps(name), f"{logical}: a stack of this name in another region has the same"


def test_references_for_cloudfront_are_of_one_stack_too() -> None:
    (key,) = of_type("AWS::CloudFront::PublicKey").values()
    config = key["Properties"]["PublicKeyConfig"]
    assert config["CallerReference"] == config["Name"]


def test_sweep_has_its_schedule_in_the_stacks_own_group_under_a_name_that_aws_makes_up() -> None:
    schedule = of_type("AWS::Scheduler::Schedule")["SweepPredictionsFunctionEveryMinute"]["Properties"]
    assert "Name" not in schedule
    assert schedule["GroupName"] == {"Ref": "ScheduleGroup"}


def test_log_of_the_functions_has_no_name_that_late_logs_take_and_an_upgrade_keeps_the_one_before() -> None:
    group = of_type("AWS::Logs::LogGroup")["FunctionsLogGroup"]
    assert "LogGroupName" not in group["Properties"]
    assert group["UpdateReplacePolicy"] == "Retain"
    assert load_template()["Outputs"]["FunctionsLogGroupName"]["Value"] == {"Ref": "FunctionsLogGroup"}


def test_every_deployment_makes_a_snapshot_of_the_api_for_its_stage() -> None:
    # SAM's digest of the definition is the same, whatever the parameters in it are.
    assert load_template()["Resources"]["Api"]["Properties"]["AlwaysDeploy"] is True
    assert "CorsOrigin" in json.dumps(template()["Resources"]["Api"]["Properties"]["Body"])


def test_source_bucket_with_a_key_of_its_own_is_read_by_the_roles_that_read_the_bucket() -> None:
    policy = template()["Resources"]["SourceKeyPolicy"]
    assert policy["Condition"] == "SourceKey"
    (statement,) = policy["Properties"]["PolicyDocument"]["Statement"]
    assert (statement["Action"], statement["Resource"]) == ("kms:Decrypt", {"Ref": "SourceKeyArn"})
    via = {"Fn::Sub": "s3.${AWS::Region}.${AWS::URLSuffix}"}
    assert statement["Condition"] == {"StringEquals": {"kms:ViaService": via}}
    readers = {
        name for name, role in of_type("AWS::IAM::Role").items() if "SourceBucketName" in json.dumps(role["Properties"])
    }
    assert {role["Ref"] for role in policy["Properties"]["Roles"]} == readers


# -- limits --------------------------------------------------------------------------------------------------------


def test_names_fit_for_every_name_of_a_stack_that_the_page_allows() -> None:
    left = {False: LONGEST_NAME, True: LONGEST_NAME}
    for resource in template()["Resources"].values():
        if (named := NAMES[resource["Type"]]) and (name := given_name(resource)) is not None:
            around = len(resolved(name, "")) if isinstance(name, dict) else len(name)
            key = resource["Type"] in GLOBAL
            left[key] = min(left[key], named[1] - around)
    # https://docs.aws.amazon.com/eventbridge/latest/APIReference/API_PutRule.html: `{stack}-recipe-{26 characters}`
    of_rules = 64 - len("-recipe-") - 26
    table = PAGE.partition("**Name of the stack:**")[2].partition("\n## ")[0]
    rows = [int(found) for found in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)]
    assert rows == [left[False], left[True], of_rules]


def test_template_is_within_the_limits_of_cloudformation() -> None:
    # https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/cloudformation-limits.html
    found = template()
    assert len(json.dumps(found)) < 0.8 * 1_000_000
    assert len(found["Resources"]) < 0.8 * 500
    assert len(found["Parameters"]) < 0.8 * 200
    assert len(found["Outputs"]) < 0.8 * 200
    assert len(found["Description"]) < 0.8 * 1024
    for parameter in found["Parameters"].values():
        assert len(parameter["Description"]) < 0.8 * 4000
        assert int(parameter.get("MaxLength", 0)) <= 4096
    assert all(len(name) <= 255 for kind in ("Resources", "Parameters", "Outputs") for name in found[kind])


@pytest.mark.parametrize("name", sorted(of_type("AWS::Lambda::Function")))
def test_variables_of_a_function_are_within_the_limit_of_lambda(name: str) -> None:
    # 4 KB together: https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html
    variables = of_type("AWS::Lambda::Function")[name]["Properties"]["Environment"]["Variables"]
    given = resolved(variables, "n" * LONGEST_NAME)
    assert sum(len(key) + len(str(value)) for key, value in given.items()) <= 0.97 * 4096


def policies(role: str) -> Iterator[Any]:
    """The policies within a role, those of a customer-managed key included."""
    for each in template()["Resources"][role]["Properties"].get("Policies", []):
        yield each["PolicyDocument"]
    for policy in of_type("AWS::IAM::Policy").values():
        if {"Ref": role} in policy["Properties"]["Roles"]:
            yield policy["Properties"]["PolicyDocument"]


@pytest.mark.parametrize("role", sorted(of_type("AWS::IAM::Role")))
def test_policies_of_a_role_are_within_the_limit_of_iam(role: str) -> None:
    # 10,240 characters together, without white space: https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html
    sizes = [len(json.dumps(resolved(each, "n" * LONGEST_NAME), separators=(",", ":"))) for each in policies(role)]
    assert sum(sizes) < 0.9 * 10_240


def test_alarms_and_descriptions_are_within_their_limits() -> None:
    for alarm in of_type("AWS::CloudWatch::Alarm").values():
        assert len(alarm["Properties"]["AlarmDescription"]) <= 1024
    for function in of_type("AWS::Lambda::Function").values():
        assert len(function["Properties"]["Description"]) <= 256


# -- the page ------------------------------------------------------------------------------------------------------


def test_commands_that_deploy_name_parameters_of_the_template_and_need_no_more_than_samconfig() -> None:
    commands = [line.replace("\\\n", "") for line in re.findall(r"^\$ (sam deploy(?:.*\\\n)*.*)", PAGE, re.MULTILINE)]
    guided, *others = commands
    # SAM's prompt for a hidden parameter takes no empty answer, so a guided deployment cannot take a secret's ARN.
    assert guided == "sam deploy --guided"
    assert load_template()["Parameters"]["ReplicateApiToken"]["NoEcho"] is True
    # What a first deployment needs is in samconfig.toml.
    config = tomllib.loads((ROOT / "samconfig.toml").read_text())["default"]
    assert config["global"]["parameters"].keys() == {"stack_name"}
    assert config["deploy"]["parameters"]["resolve_s3"] is True
    assert config["deploy"]["parameters"]["capabilities"] == "CAPABILITY_IAM"
    given = []
    for command in others:
        assert set(re.findall(r"--[a-z-]+", command)) <= {"--guided", "--parameter-overrides", "--stack-name", "--tags"}
        given += [each.split("=", 1) for each in command.partition("--parameter-overrides ")[2].split()]
    for name, value in given:
        assert re.fullmatch(load_template()["Parameters"][name]["AllowedPattern"], value)
    assert [name for name, _ in given] == ["ReplicateTokenSecretArn", "PermissionsBoundaryArn"]


def test_page_says_how_a_new_account_gets_the_concurrency_that_a_stack_needs() -> None:
    section = PAGE.partition("### Concurrency")[2].partition("\n## ")[0]
    assert "--service-code lambda --quota-code L-B99A9384" in section
    deliveries = load_template()["Parameters"]["DeliveriesConcurrency"]
    assert f"leave `DeliveriesConcurrency` at {deliveries['Default']}" in section
    # Half of a new account's ten, whatever the receivers do.
    assert deliveries["Default"] <= 10 // 2
