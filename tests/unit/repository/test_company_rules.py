"""What a company requires of each stack in its account: a permissions boundary of every role, and its tags."""

import json
import re
from functools import cache
from typing import Any

import pytest
from cfnlint.schema.manager import PROVIDER_SCHEMA_MANAGER

from local.audit import translated
from tests.support.pages import section
from tests.support.template import FUNCTIONS, ROOT, actions, load_template, resources

POLICY = "arn:aws:iam::123456789012:policy/company/boundary"
# Of each type, whether it takes tags: `tagging` of CloudFormation's own schema, which cfn-lint brings along.
UNTAGGED = {
    "AWS::ApiGateway::BasePathMapping",
    "AWS::ApiGateway::Deployment",
    "AWS::CloudFront::CachePolicy",
    "AWS::CloudFront::KeyGroup",
    "AWS::CloudFront::OriginAccessControl",
    "AWS::CloudFront::PublicKey",
    "AWS::CloudFront::ResponseHeadersPolicy",
    "AWS::IAM::Policy",  # a part of the roles
    "AWS::Lambda::EventInvokeConfig",
    "AWS::Lambda::LayerVersion",
    "AWS::Lambda::Permission",
    "AWS::S3::BucketPolicy",
    "AWS::SQS::QueuePolicy",
    "AWS::Scheduler::Schedule",  # its group takes them
    "Custom::DeployedRecipes",  # a function call
}


@cache
def template() -> dict[str, Any]:
    """The template after SAM's transform; not to be changed by who gets it."""
    return translated(ROOT / "template.yaml")


def of_type(kind: str) -> dict[str, Any]:
    return {name: found for name, found in template()["Resources"].items() if found["Type"] == kind}


def chosen(value: Any, boundary: str) -> Any:
    """What CloudFormation makes of a property with a value of PermissionsBoundaryArn; None is no property."""
    if value == {"Ref": "PermissionsBoundaryArn"}:
        return boundary
    if value in (None, {"Ref": "AWS::NoValue"}):
        return None
    name, then, otherwise = value["Fn::If"]
    assert template()["Conditions"][name] == {
        "Fn::Not": [{"Fn::Equals": [{"Ref": "PermissionsBoundaryArn"}, ""]}],
    }
    return chosen(then if boundary else otherwise, boundary)


@pytest.mark.parametrize("role", sorted(of_type("AWS::IAM::Role")))
def test_role_has_the_boundary_that_is_named_and_none_without(role: str) -> None:
    given = of_type("AWS::IAM::Role")[role]["Properties"].get("PermissionsBoundary")
    assert chosen(given, POLICY) == POLICY
    assert chosen(given, "") is None


def test_roles_are_those_of_functions_machines_and_schedules() -> None:
    of_functions = {
        f"{name}Role" for kind in ("Function", "StateMachine") for name in resources(f"AWS::Serverless::{kind}")
    }
    assert of_type("AWS::IAM::Role").keys() == of_functions | {
        "SchedulerRole",
        "SweepPredictionsFunctionEveryMinuteRole",
    }


def test_boundary_is_of_roles_alone_and_none_by_default() -> None:
    holders = {
        found["Type"] for found in template()["Resources"].values() if "PermissionsBoundaryArn" in json.dumps(found)
    }
    assert holders == {"AWS::IAM::Role"}
    assert load_template()["Parameters"]["PermissionsBoundaryArn"]["Default"] == ""


def test_nothing_makes_roles_or_changes_boundaries_at_run_time() -> None:
    for name in (*FUNCTIONS, *resources("AWS::Serverless::StateMachine")):
        assert {action for action in actions(name) if action.startswith("iam:")} <= {"iam:PassRole"}


@pytest.mark.parametrize(
    ("arn", "taken"),
    [
        ("", True),
        (POLICY, True),
        ("arn:aws:iam::aws:policy/PowerUserAccess", True),
        ("arn:aws-us-gov:iam::123456789012:policy/boundary", True),
        ("boundary", False),
        ("arn:aws:iam::123456789012:role/boundary", False),
        ("arn:aws:iam::123456789012:policy/", False),
        ("arn:aws:iam::123456789012:policy/two words", False),
    ],
)
def test_boundary_is_the_arn_of_a_managed_policy(arn: str, taken: bool) -> None:
    pattern = load_template()["Parameters"]["PermissionsBoundaryArn"]["AllowedPattern"]
    assert bool(re.fullmatch(pattern, arn)) is taken


# -- tags ----------------------------------------------------------------------------------------------------------


def test_template_sets_no_tag_that_one_of_the_company_could_contradict() -> None:
    assert "Tags" not in json.dumps(load_template())
    # SAM adds one of its own to functions, machines and their roles.
    tags = {
        json.dumps(found["Properties"]["Tags"])
        for found in template()["Resources"].values()
        if "Tags" in found.get("Properties", {})
    }
    keys = {tag["Key"] for each in tags for tag in json.loads(each)}
    assert keys == {"lambda:createdBy", "stateMachine:createdBy"}
    page = section("docs/deploy.md", "In a company's account")
    assert all(f"`{key}`" in page for key in keys)


def test_tags_of_the_stack_reach_every_resource_that_takes_tags() -> None:
    untagged = set()
    for kind in {found["Type"] for found in template()["Resources"].values()}:
        tagging = PROVIDER_SCHEMA_MANAGER.get_resource_schema("us-east-1", kind).schema.get("tagging") or {}
        if not tagging.get("tagOnCreate"):
            untagged.add(kind)
    assert untagged == UNTAGGED
