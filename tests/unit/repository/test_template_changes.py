"""The comparison of two templates, and with it the template since the release before its sections."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from local import template_changes
from local.template_changes import Change, Part, changes, digests, parts

# The digests of the template of the release before. The whole section below goes with them: see CONTRIBUTING.md.
BEFORE = Path(__file__).with_name("template-before.json")

TABLE = {"Fn::GetAtt": ["Table", "Arn"]}


def statement(**changed: Any) -> dict[str, Any]:
    condition = {"ForAllValues:StringLike": {"dynamodb:LeadingKeys": ["a#*", "b#*"]}}
    return {
        "Sid": "Items",
        "Effect": "Allow",
        "Action": ["dynamodb:GetItem", "dynamodb:PutItem"],
        "Resource": TABLE,
        "Condition": condition,
    } | changed


TEMPLATE: dict[str, Any] = {
    "Parameters": {"LogLevel": {"Type": "String", "Default": "INFO", "Description": "Least severe level."}},
    "Outputs": {"Url": {"Value": {"Fn::Sub": "https://${Api}/v1"}}},
    "Resources": {
        "Function": {
            "Type": "AWS::Lambda::Function",
            "Properties": {"Timeout": 5, "Environment": {"Variables": {"A": {"Ref": "Table"}, "B": "2"}}},
        },
        "Role": {
            "Type": "AWS::IAM::Role",
            "Properties": {"Policies": [{"PolicyName": "p", "PolicyDocument": {"Statement": [statement()]}}]},
        },
        "ApiDeployment0123456789": {"Type": "AWS::ApiGateway::Deployment", "Properties": {"Description": "x"}},
        "Stage": {
            "Type": "AWS::ApiGateway::Stage",
            "Properties": {"DeploymentId": {"Ref": "ApiDeployment0123456789"}, "StageName": "v1"},
        },
        "Graphs": {
            "Type": "AWS::CloudWatch::Dashboard",
            "Properties": {"DashboardBody": {"Fn::Sub": '{"widgets": [{"title": "Open", "metrics": ["a", "b"]}]}'}},
        },
    },
}


def changed(change: Callable[[dict[str, Any]], Any]) -> list[Change]:
    """The changes that a change of the template above makes."""
    after = deepcopy(TEMPLATE)
    change(after)
    return changes(digests(parts(TEMPLATE)), digests(parts(after)))


def properties(template: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = template["Resources"][name]["Properties"]
    return found


def policy(template: dict[str, Any], *statements: dict[str, Any]) -> None:
    properties(template, "Role")["Policies"][0]["PolicyDocument"]["Statement"] = [*statements]


def set_property(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda template: properties(template, name).update({key: value})


@pytest.mark.parametrize(
    "change",
    [
        lambda template: template["Parameters"]["LogLevel"].update(Description="Another text."),
        lambda template: policy(template, statement(Sid="Other")),
        lambda template: policy(template, statement(Action="dynamodb:PutItem"), statement(Action="dynamodb:GetItem")),
        set_property("Graphs", "DashboardBody", {"Fn::Sub": '{"widgets":[{"title":"All","metrics":["a","b"]}]}'}),
        set_property("ApiDeployment0123456789", "Description", "y"),
        lambda template: template.update(Resources=dict(reversed(template["Resources"].items()))),
    ],
    ids=["description", "sid", "split statement", "title", "description of a deployment", "order"],
)
def test_texts_order_and_form_are_no_changes(change: Callable[[dict[str, Any]], Any]) -> None:
    assert changed(change) == []


def test_other_digest_in_a_logical_id_is_no_change() -> None:
    def redeploy(template: dict[str, Any]) -> None:
        found = json.loads(json.dumps(template["Resources"]).replace("0123456789", "abcdef0123"))
        template["Resources"] = found

    assert changed(redeploy) == []


@pytest.mark.parametrize(
    ("change", "part", "what"),
    [
        (lambda template: template["Resources"].pop("Stage"), "Stage", "removed"),
        (lambda template: template["Resources"].update(More={"Type": "AWS::SQS::Queue"}), "More", "added"),
        (set_property("Function", "Timeout", 6), "Function", "changed"),
        (set_property("Stage", "StageName", "v2"), "Stage", "changed"),
        (set_property("Graphs", "DashboardBody", {"Fn::Sub": '{"widgets": [{"metrics": []}]}'}), "Graphs", "changed"),
        (lambda template: template["Parameters"]["LogLevel"].update(Default="DEBUG"), "Parameters.LogLevel", "changed"),
        (lambda template: template["Outputs"].pop("Url"), "Outputs.Url", "removed"),
        (lambda template: template["Resources"]["Stage"].update(Condition="C"), "Stage", "changed"),
        (lambda template: policy(template, statement(Action="dynamodb:GetItem")), "Role", "grants removed"),
        (lambda template: policy(template), "Role", "grants removed"),
        (lambda template: policy(template, statement(), statement(Action="dynamodb:Query")), "Role", "grants added"),
    ],
)  # fmt: skip
def test_other_change_is_found(change: Callable[[dict[str, Any]], Any], part: str, what: str) -> None:
    (found,) = changed(change)
    assert (found.part, found.what) == (part, what)


@pytest.mark.parametrize(
    "wider",
    [
        {"Resource": "*"},
        {"Condition": {}},
        {"Condition": {"ForAllValues:StringLike": {"dynamodb:LeadingKeys": ["a#*", "b#*", "c#*"]}}},
        {"Condition": {"ForAnyValue:StringLike": {"dynamodb:LeadingKeys": ["a#*", "b#*"]}}},
        {"Action": ["dynamodb:GetItem", "dynamodb:PutItem", "dynamodb:DeleteItem"]},
        {"Effect": "Deny"},
    ],
)
def test_statement_that_grants_more_or_something_else_is_a_new_grant(wider: dict[str, Any]) -> None:
    assert "grants added" in {change.what for change in changed(lambda template: policy(template, statement(**wider)))}


def test_statement_without_its_condition_of_cloudformation_is_a_new_grant() -> None:
    conditional = deepcopy(TEMPLATE)
    policy(conditional, {"Fn::If": ["C", statement(), {"Ref": "AWS::NoValue"}]})
    found = changes(digests(parts(conditional)), digests(parts(TEMPLATE)))
    assert {change.what for change in found} == {"grants added", "grants removed"}


def test_statements_that_are_merged_across_items_are_a_new_grant() -> None:
    def keyed(action: str, key: str) -> dict[str, Any]:
        return statement(Action=action, Condition={"ForAllValues:StringLike": {"dynamodb:LeadingKeys": [key]}})

    apart, merged = deepcopy(TEMPLATE), deepcopy(TEMPLATE)
    policy(apart, keyed("dynamodb:GetItem", "a#*"), keyed("dynamodb:PutItem", "b#*"))
    policy(merged, statement())
    (found,) = changes(digests(parts(apart)), digests(parts(merged)))
    assert (found.what, len(found.names)) == ("grants added", 2)


def test_variables_are_compared_one_by_one() -> None:
    (found,) = changed(lambda template: properties(template, "Function")["Environment"]["Variables"].pop("A"))
    assert found == Change("Function", "variables removed", ("A",))
    other = changed(lambda template: properties(template, "Function")["Environment"]["Variables"].update(A="3"))
    assert other == [Change("Function", "variables added", ("A",)), Change("Function", "variables removed", ("A",))]


def test_report_names_each_change_with_its_variables_and_grants() -> None:
    before = {"F": Part("AWS::Lambda::Function", "{}", {"A": "1"}), "R": Part("AWS::IAM::Role", "{}", grants=["x y"])}
    after = {"F": Part("AWS::Lambda::Function", "{}"), "R": Part("AWS::IAM::Role", "{}", grants=["x z"])}
    assert [*template_changes.report(before, after)] == [
        "F: variables removed", "    A", "R: grants added", "    x z", "R: grants removed", "    x y",
    ]  # fmt: skip


def test_template_of_a_commit_is_compared_with_the_one_of_the_checkout(capsys: pytest.CaptureFixture[str]) -> None:
    assert template_changes.main(["HEAD"]) == 0
    assert capsys.readouterr().out
    assert len(template_changes.of_ref("HEAD")) > len(TEMPLATE)


# -- since the release before --------------------------------------------------------------------------------------

# openapi.json is a route of read_predictions, and describe_api is gone with what was its own. The API's methods have
# names, from which MCP gateways name tools.
ROUTE_MOVED = {
    Change("Api", "changed"),
    Change("DescribeApiFunction", "removed"),
    Change("DescribeApiFunctionDescribePermissionv1", "removed"),
    Change("DescribeApiFunctionRole", "removed"),
    Change("ReadPredictionsFunctionDescribePermissionv1", "added"),
}
# One prediction's GET is a function of its own, which reads Replicate for those who look; and a create waits longer.
LIVE_READS = {
    Change("Parameters.LiveReadSeconds", "added"),
    Change("Parameters.LiveReadsPerMinute", "added"),
    Change("ReadPredictionFunction", "added"),
    Change("ReadPredictionFunctionGetPredictionPermissionv1", "added"),
    Change("ReadPredictionFunctionGetTrainingPermissionv1", "added"),
    Change("ReadPredictionFunctionRole", "added"),
    Change("ReadPredictionsFunctionGetPredictionPermissionv1", "removed"),
    Change("ReadPredictionsFunctionGetTrainingPermissionv1", "removed"),
    Change("TableKeyPolicy", "changed"),
    Change("WriteObjectsKeyPolicy", "changed"),
}
LONGER_WAIT = {
    Change("Parameters.SyncWaitSeconds", "added"),
    Change("StartPredictionFunction", "changed"),
    Change("StartPredictionFunction", "variables added", ("SYNC_WAIT_SECONDS",)),
}
# What an audit for AWS found: names that another stack has or late logs take, a stage that serves an old snapshot, the
# concurrency of a new account, a browser's preflight, a source bucket with a key of its own, HEAD on links.
ON_AWS = {
    Change("Apiv1Stage", "changed"),
    Change("Conditions.SourceKey", "added"),
    Change("DeliverWebhookFunction", "variables added", ("DELIVERIES_CONCURRENCY",)),
    Change("DeliveriesEventSource", "changed"),
    Change("FunctionsLogGroup", "changed"),
    Change("InputsBucket", "changed"),
    Change("OutputsBucket", "changed"),
    Change("Outputs.FunctionsLogGroupName", "added"),
    Change("OutputsAccessControl", "changed"),
    Change("OutputsCachePolicy", "changed"),
    Change("OutputsDistribution", "changed"),
    Change("OutputsResponseHeadersPolicy", "changed"),
    Change("OutputUrlKey", "removed"),
    Change("OutputUrlKeyGroup", "changed"),
    Change("OutputUrlSigningKey", "added"),
    Change("Parameters.DeliveriesConcurrency", "added"),
    Change("Parameters.QueueSenders", "changed"),
    Change("Parameters.SourceKeyArn", "added"),
    Change("PredictionsLayer", "changed"),
    Change("RecipeFilesLayer", "changed"),
    Change("ServeFilesFunctionHeadFilePermissionv1", "added"),
    Change("ServeFilesFunctionHeadObjectPermissionv1", "added"),
    Change("SourceKeyPolicy", "added"),
    Change("SweepPredictionsFunctionEveryMinute", "changed"),
}
# Every role that the release before had gets the boundary of a company that has one (test_company_rules.py).
BOUNDARY = {
    Change("Conditions.Boundary", "added"),
    Change("Parameters.PermissionsBoundaryArn", "added"),
    *(
        Change(name, "changed")
        for name, part in json.loads(BEFORE.read_text()).items()
        if part["kind"] == "AWS::IAM::Role" and name != "DescribeApiFunctionRole"
    ),
}
# Functions that sign with the key of another logical id: its variable has another value.
SIGNING = {
    "CancelPredictionFunction",
    "DeliverWebhookFunction",
    "ManageBatchesFunction",
    "ManagePipelinesFunction",
    "ReadPredictionsFunction",
    "RunPredictionFunction",
    "StartPredictionFunction",
}
# Variables that a function's step does not read.
FEWER_VARIABLES: dict[str, tuple[str, ...]] = {
    "AdvancePipelineFunction": (
        "DEFAULT_LIFETIME_SECONDS",
        "FIRST_POLL_SECONDS",
        "MAX_UNKNOWN_CREATES",
        "POLL_SECONDS",
        "RETENTION_DAYS",
        "STATE_MACHINE_ARN",
        "SUBMIT_GRACE_SECONDS",
        "TRAINING_LIFETIME_SECONDS",
        "UNKNOWN_SUBMISSION",
        "VALIDATE_INPUT",
    ),
    "CancelPredictionFunction": (
        "DEFAULT_LIFETIME_SECONDS",
        "FIRST_POLL_SECONDS",
        "MAX_UNKNOWN_CREATES",
        "POLL_SECONDS",
        "RETENTION_DAYS",
        "STATE_MACHINE_ARN",
        "SUBMIT_GRACE_SECONDS",
        "TRAINING_LIFETIME_SECONDS",
        "UNKNOWN_SUBMISSION",
        "VALIDATE_INPUT",
    ),
    "ManageBatchesFunction": (
        "DEFAULT_LIFETIME_SECONDS",
        "FIRST_POLL_SECONDS",
        "MAX_UNKNOWN_CREATES",
        "POLL_SECONDS",
        "STATE_MACHINE_ARN",
        "SUBMIT_GRACE_SECONDS",
        "TRAINING_LIFETIME_SECONDS",
        "UNKNOWN_SUBMISSION",
    ),
    "ManagePipelinesFunction": (
        "CREATES_PER_MINUTE",
        "DEFAULT_LIFETIME_SECONDS",
        "FIRST_POLL_SECONDS",
        "MAX_START_DELAY_SECONDS",
        "MAX_UNKNOWN_CREATES",
        "POLL_SECONDS",
        "STATE_MACHINE_ARN",
        "SUBMIT_GRACE_SECONDS",
        "TRAINING_LIFETIME_SECONDS",
        "UNKNOWN_SUBMISSION",
    ),
    "PollPredictionFunction": (
        "DEFAULT_LIFETIME_SECONDS",
        "POLL_SECONDS",
        "RETENTION_DAYS",
        "STATE_MACHINE_ARN",
        "TRAINING_LIFETIME_SECONDS",
    ),
    "RunPredictionFunction": (
        "MAX_UNKNOWN_CREATES",
        "POLL_SECONDS",
        "UNKNOWN_SUBMISSION",
    ),
    "StartPredictionFunction": (
        "MAX_UNKNOWN_CREATES",
        "POLL_SECONDS",
        "UNKNOWN_SUBMISSION",
    ),
    "SubmitPredictionFunction": (
        "DEFAULT_LIFETIME_SECONDS",
        "POLL_SECONDS",
        "RETENTION_DAYS",
        "STATE_MACHINE_ARN",
        "TRAINING_LIFETIME_SECONDS",
    ),
    "SweepPredictionsFunction": (
        "DEFAULT_LIFETIME_SECONDS",
        "MAX_UNKNOWN_CREATES",
        "POLL_SECONDS",
        "TRAINING_LIFETIME_SECONDS",
        "UNKNOWN_SUBMISSION",
        "VALIDATE_INPUT",
    ),
}
# Templates and lines of batches are checked by the schemas of models, which manage_batches reads and caches.
BATCHES_CHECKED = {Change("ManageBatchesFunctionRole", "grants added", ("22d0c37852", "fcb1719ebc"))}
# deliver_webhook records what was sent of a prediction, so that nothing follows `completed`.
WEBHOOKS_ORDERED = {Change("DeliverWebhookFunctionRole", "grants added", ("92fdbb9068",))}
# A second state machine of the same definition, which a submitted prediction's execution enters by its wait; and
# executions that are woken by an error where files are to be copied. By the statements of those who start executions of
# both machines, and of those who send such errors.
WAKES = ("790247729e",)
STARTS_BOTH = ("3114a91f53", "790247729e", "9d8616faee")
STARTS_AND_WAKES = ("10cc848aa7", "2f5f1d6466", "f2b85b7de5")
TWO_MACHINES = {
    Change("TrackPredictionStateMachine", "changed"),
    Change("TrackSubmittedStateMachine", "added"),
    Change("TrackSubmittedStateMachineRole", "added"),
    Change("ExecutionsFailedAlarm", "changed"),
    Change("RunPredictionFunction", "changed"),
    Change("SweepPredictionsFunction", "changed"),
    Change("StackDashboard", "changed"),
    Change("Outputs.TrackSubmittedStateMachineArn", "added"),
    *(
        Change(f"{name}Function", "variables added", ("SUBMITTED_STATE_MACHINE_ARN",))
        for name in ("RunPrediction", "StartPrediction", "SweepPredictions")
    ),
    *(
        Change(f"{name}FunctionRole", "grants added", WAKES)
        for name in ("AdvancePipeline", "CancelPrediction", "ManageBatches", "ReceiveWebhook", "SubmitPrediction")
    ),
    Change("StartPredictionFunctionRole", "grants added", STARTS_BOTH),
    Change("RunPredictionFunctionRole", "grants added", STARTS_AND_WAKES),
    Change("SweepPredictionsFunctionRole", "grants added", STARTS_AND_WAKES),
    Change("PollPredictionFunctionRole", "grants added", ("f2b85b7de5",)),
}
# The sweep invokes itself if more is due than one run checks.
SWEEP_SHARED = {Change("ShareSweepPolicy", "added")}
# How many batches of messages start at once was a number of the template.
REQUESTS_AT_ONCE = {Change("Parameters.RequestsConcurrency", "added"), Change("RequestsEventSource", "changed")}
# Owners that wait at the limiter have items of their own, which those use that use the limiter's; and a rate of up to
# 30,000 creates a minute.
RELEASES_LINES = ("c3890fca5e",)
SUBMITS_LINES = ("98a1f25649", "aa21d41460", "c3890fca5e", "e83cdb56f0")
OWNERS_LINES = {
    Change("Parameters.CreatesPerMinute", "changed"),
    *(
        Change(f"{name}FunctionRole", "grants added", RELEASES_LINES)
        for name in ("AdvancePipeline", "CancelPrediction", "ManageBatches")
    ),
    *(
        Change(
            f"{name}FunctionRole",
            "grants added",
            ("111afa01a6", "114cca994d", "1b76c1e039", "28a2b2f259", "586267abc9"),
        )
        for name in ("PollPrediction", "RunPrediction")
    ),
    Change("StartPredictionFunctionRole", "grants added", (*SUBMITS_LINES, "f4fc70c228")),
    Change("SubmitPredictionFunctionRole", "grants added", SUBMITS_LINES),
    Change("SweepPredictionsFunctionRole", "grants added", ("1b76c1e039", "28a2b2f259")),
}
# What waits for Replicate and copies files has the memory that the largest accepted answer takes (docs/cost.md).
LESS_MEMORY = {Change("CopyOutputsFunction", "changed"), Change("StartPredictionFunction", "changed")}
# Each function that ends predictions reads the stack's prices; the consumer of the stream records unknown costs.
READS_PRICES = {
    "f91693d3e8": ("AdvancePipeline", "CancelPrediction", "ManageBatches", "ReceiveWebhook", "StartPrediction",
                   "SubmitPrediction"),
    "05098c3d97": ("PollPrediction", "RunPrediction", "SweepPredictions"),  # whose roles have a policy of AWS's first
}  # fmt: skip
PRICES = {
    Change("PublishChangesFunctionRole", "grants added", ("75ee19d432",)),
    *(
        Change(f"{name}FunctionRole", "grants added", (grant,))
        for grant, names in READS_PRICES.items()
        for name in names
    ),
}
# Batches and pipelines have webhooks: deliver_webhook reads them too, and manage_pipelines checks their addresses.
GROUP_WEBHOOKS = {
    Change("ManagePipelinesFunction", "variables added", ("ALLOW_LOOPBACK_WEBHOOKS",)),
    Change(
        "DeliverWebhookFunctionRole",
        "grants added",
        (
            "31fae6d2c9",
            "6b6c3f88f8",
            "71b85d70d1",
            "76f748e357",
            "9355bd2364",
            "d567b4084b",
            "e51393d02c",
            "ed8b6eb6d9",
        ),
    ),
}
# The consumer of the stream settles what predictions reserved in budgets, and passes on that one reached a threshold.
BUDGETS = {
    Change("BudgetThresholdsAlarm", "added"),
    Change("ChangesEventSource", "changed"),
    Change(
        "PublishChangesFunctionRole",
        "grants added",
        ("0dff5654f2", "ae71f4af2f", "d08479ef06", "f39ccbfe80"),
    ),
}
# The consumer of the stream counts usage if it is asked to; GET /usage reads the counters.
USAGE = {
    Change("Parameters.UsageCounters", "added"),
    Change("PublishChangesFunction", "variables added", ("USAGE_COUNTERS",)),
    Change("PublishChangesFunctionRole", "grants added", ("122ca602c1", "1e71213468", "ab0379b180")),
    Change("ReadPredictionsFunctionRole", "grants added", ("069aaaa281",)),
    Change("ReadPredictionsFunctionGetUsagePermissionv1", "added"),
}
# The console, and any origin at the buckets, of which a signed URL is the permission.
CONSOLE = {
    Change("ServeConsoleFunction", "added"),
    Change("ServeConsoleFunctionAssetPermissionv1", "added"),
    Change("ServeConsoleFunctionPagePermissionv1", "added"),
    Change("ServeConsoleFunctionRole", "added"),
    Change("InputsBucket", "changed"),
    Change("OutputsBucket", "changed"),
}
# Roles that may do less: which statements, test_template.py holds against the code.
NARROWER_ROLES: set[str] = set()


def test_nothing_changed_since_the_release_before_but_what_is_listed() -> None:
    after = template_changes.of_checkout()
    found = set(changes(json.loads(BEFORE.read_text()), digests(after)))
    narrower = {change.part for change in found if change.what == "grants removed"}
    listed = ROUTE_MOVED | LIVE_READS | LONGER_WAIT | BATCHES_CHECKED | WEBHOOKS_ORDERED | ON_AWS | BOUNDARY
    listed |= TWO_MACHINES | SWEEP_SHARED | REQUESTS_AT_ONCE | OWNERS_LINES | LESS_MEMORY
    listed |= PRICES | GROUP_WEBHOOKS | BUDGETS | USAGE | CONSOLE
    listed |= {Change(name, "variables removed", tuple(sorted(names))) for name, names in FEWER_VARIABLES.items()}
    listed |= {
        Change(name, what, ("OUTPUT_URL_KEY_ID",))
        for name in SIGNING
        for what in ("variables added", "variables removed")
    }
    # A function's variables are one change, and so are its grants: those of the sets above together.
    for name, what in {(change.part, change.what) for change in listed}:
        same = {change for change in listed if (change.part, change.what) == (name, what)}
        names = {each for change in same for each in change.names}
        listed = listed - same | {Change(name, what, tuple(sorted(names)))}
    assert {change for change in found if change.what != "grants removed"} == listed, (
        "python -m local.template_changes REF shows the changes"
    )
    assert narrower == NARROWER_ROLES
