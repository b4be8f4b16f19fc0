import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from predictions.api.access_tokens import parse_authorization
from predictions.api.proxy import ROUTES
from predictions.batches.dropped import PREFIX
from predictions.cli.dead_letters import QUEUES as LETTERS
from predictions.ids import _OWNER, is_owner
from predictions.intake.redelivery import FAILURES_LIMIT, NEEDED_SECONDS
from predictions.lifecycle.start import RESPONSE_SECONDS
from predictions.lifecycle.timing import ABANDON_SECONDS
from predictions.notifications.stream import NEEDED_SECONDS as CHANGE_NEEDED_SECONDS
from predictions.notifications.stream_retries import RETRY_SECONDS as CHANGE_RETRY_SECONDS
from predictions.notifications.webhook_queue import LONGEST_WAIT_SECONDS, RETRY_SECONDS
from predictions.notifications.webhook_sender import TOTAL_SECONDS
from predictions.recipes.deployment import NEEDED_SECONDS as NEEDED_FOR_A_FILE_SECONDS
from predictions.store.predictions import SUBMIT_SECONDS

from local.audit import translated
from tests.support import library
from tests.support.code_reach import reach
from tests.support.template import (
    FUNCTIONS,
    ROOT,
    UNKEPT,
    actions,
    dead_letter_queues,
    folder_name,
    listed,
    load_template,
    logical_name,
    mapped,
    passes,
    resources,
    statements,
    table_properties,
    timeout_of,
    variables,
)

FOLDERS = sorted(path.parent.name for path in (ROOT / "functions").glob("*/app.py"))
MACHINES = sorted(resources("AWS::Serverless::StateMachine"))
BUCKETS = sorted(resources("AWS::S3::Bucket"))
QUEUES = sorted(resources("AWS::SQS::Queue"))
PARAMETERS = load_template()["Parameters"]
# Actions of AWS that know no resource types, and so take only "*".
WITHOUT_RESOURCES = {
    "events:ListRules",
    "dynamodb:ListStreams",
    "states:SendTaskFailure",
    "states:SendTaskSuccess",
    "logs:CreateLogDelivery",
    "logs:GetLogDelivery",
    "logs:UpdateLogDelivery",
    "logs:DeleteLogDelivery",
    "logs:ListLogDeliveries",
    "logs:PutResourcePolicy",
    "logs:DescribeResourcePolicies",
    "logs:DescribeLogGroups",
    "xray:PutTraceSegments",
    "xray:PutTelemetryRecords",
    "xray:GetSamplingRules",
    "xray:GetSamplingTargets",
}

# What Lambda asks for in the name of a function that a stream or a queue invokes, by the source's ARN.
# https://docs.aws.amazon.com/lambda/latest/dg/services-dynamodb-eventsourcemapping.html
# https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-configure.html
STREAM_ACTIONS = {
    "dynamodb:DescribeStream",
    "dynamodb:GetRecords",
    "dynamodb:GetShardIterator",
    "dynamodb:ListStreams",
}
QUEUE_ACTIONS = {"sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes"}
SOURCES = resources("AWS::Lambda::EventSourceMapping")


def source_actions(function: str) -> set[str]:
    """The actions that the sources of a function need."""
    needed: set[str] = set()
    for source in SOURCES.values():
        if source["Properties"]["FunctionName"] == {"Ref": function}:
            stream = source["Properties"]["EventSourceArn"]["Fn::GetAtt"][1] == "StreamArn"
            needed |= STREAM_ACTIONS if stream else QUEUE_ACTIONS
    return needed


def text(value: Any) -> str:
    return json.dumps(value)


# -- what must not be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FUNCTIONS, *MACHINES])
def test_policy_with_a_wildcard_is_one_that_aws_offers_no_narrower_form_of(name: str) -> None:
    for statement in statements(name):
        assert not [action for action in listed(statement["Action"]) if "*" in action]
        if "*" in listed(statement["Resource"]):
            assert set(listed(statement["Action"])) <= WITHOUT_RESOURCES


@pytest.mark.parametrize("name", FUNCTIONS)
def test_policy_is_written_out_and_not_a_ready_made_one(name: str) -> None:
    policies = resources("AWS::Serverless::Function")[name]["Properties"]["Policies"]
    assert all(isinstance(policy, dict) and "Statement" in policy for policy in policies)


def test_token_of_replicate_is_readable_only_by_functions_that_call_replicate() -> None:
    readers = {name for name in FUNCTIONS if any("ReplicateToken" in text(each) for each in statements(name))}
    assert readers == {
        "StartPredictionFunction",
        "ReadPredictionFunction",  # shows an open prediction as it is now
        "RunPredictionFunction",
        "SubmitPredictionFunction",
        "PollPredictionFunction",
        "CancelPredictionFunction",
        "SweepPredictionsFunction",
        "CallReplicateFunction",
        "ManageRecipesFunction",  # asks for models' schemas
        "DeployRecipesFunction",
        # It looks at the models that a pipeline names.
        "ManagePipelinesFunction",
        # It cancels the predictions of a canceled pipeline.
        "AdvancePipelineFunction",
        # Cancels the lines of a batch.
        "ManageBatchesFunction",
    }
    assert {name for name in FUNCTIONS if "REPLICATE_TOKEN_SECRET_ARN" in variables(name)} == readers


def test_schemas_are_kept_only_by_functions_that_submit_or_are_told_them() -> None:
    keepers = {name for name in FUNCTIONS if any("schema#*" in text(each) for each in statements(name))}
    submitting = {f"{name}PredictionFunction" for name in ("Start", "Run", "Submit", "Poll")}
    checking = {"ManageRecipesFunction", "DeployRecipesFunction", "ManagePipelinesFunction", "ManageBatchesFunction"}
    assert keepers == {*submitting, *checking, "CallReplicateFunction"}


def test_public_functions_are_webhook_file_links_and_console_and_hold_no_token_of_replicate() -> None:
    public = {
        name
        for name, function in resources("AWS::Serverless::Function").items()
        for event in function["Properties"].get("Events", {}).values()
        if event["Type"] == "Api" and event["Properties"].get("Auth") == {"Authorizer": "NONE"}
    }
    assert public == {"ReceiveWebhookFunction", "ServeFilesFunction", "ServeConsoleFunction"}
    for name in public:
        assert "ReplicateToken" not in text(load_template()["Resources"][name])
    assert actions("ServeFilesFunction") == {
        "dynamodb:GetItem",
        "s3:GetObject",
        "s3:GetObjectVersion",
        "secretsmanager:GetSecretValue",
    }
    (secret,) = [each for each in statements("ServeFilesFunction") if "secretsmanager" in text(each)]
    assert secret["Resource"] == {"Fn::GetAtt": ["LinkSecret", "Id"]}, "which signs nothing but links"


def test_secret_values_are_given_to_functions_by_arn_only() -> None:
    for name in FUNCTIONS:
        assert {"Ref": "ReplicateApiToken"} not in variables(name).values()
    users = [name for name, found in load_template()["Resources"].items() if "ReplicateApiToken" in text(found)]
    assert users == ["ReplicateTokenSecret"]
    assert "ReplicateApiToken" not in text(load_template()["Outputs"])


def test_access_tokens_are_out_of_reach_of_all_functions_but_the_authorizer() -> None:
    table = {"Fn::GetAtt": ["PredictionsTable", "Arn"]}
    for name in [*FUNCTIONS, *MACHINES]:
        on_table = [each for each in statements(name) if table in listed(each["Resource"])]
        assert on_table or name in {"RunBatchStateMachine", "ServeConsoleFunction"}
        for statement in on_table:
            (operator,) = statement["Condition"]
            keys = statement["Condition"][operator]["dynamodb:LeadingKeys"]
            if name == "AuthorizeRequestFunction":
                assert (operator, keys) == ("ForAllValues:StringLike", ["tokens", "owner#*"])
            else:
                assert operator == "ForAllValues:StringLike"
                assert set(keys) <= {
                    "prediction#*",
                    "recent#*",
                    "upstream#*",
                    "forwarded#*",
                    "schema#*",
                    "owner#*",
                    "usage#*",
                    "limiter",
                    "limiter#*",
                    "live_reads",
                    "file#*",
                    "recipe#*",
                    "pipeline#*",
                    "batch#*",
                    "webhooks#*",
                    "unknown",
                    "readings",
                    "listed#*",
                    "message#*",
                    "prices",
                    "unpriced",
                    "usage_labels#*",
                    "usage_month#*",
                    "usage_seen#*",
                }


def test_master_of_the_owners_secrets_is_readable_only_by_those_who_give_them_and_sign() -> None:
    master = {"Fn::GetAtt": ["WebhookMasterSecret", "Id"]}
    readers = {name for name in FUNCTIONS if any(master in listed(each["Resource"]) for each in statements(name))}
    assert readers == {"GiveSecretFunction", "DeliverWebhookFunction"}
    secret = load_template()["Resources"]["WebhookMasterSecret"]["Properties"]
    assert secret["GenerateSecretString"] == {"PasswordLength": 64, "ExcludePunctuation": True}
    assert "Ref" not in text(secret), "a new value would change every owner's secret"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_ever_deleted_by_a_function_but_what_its_owner_deletes(name: str) -> None:
    # Lambda deletes the messages that a function has dealt with.
    deleting = [
        statement
        for statement in statements(name)
        if any("Delete" in action for action in set(listed(statement["Action"])) - source_actions(name))
        # Nobody's data: creates of unknown outcome leave their list when it is known.
        and statement.get("Condition") != {"ForAllValues:StringLike": {"dynamodb:LeadingKeys": ["unknown"]}}
    ]
    if name in ("CancelPredictionFunction", "SweepPredictionsFunction"):
        # The route that deletes a prediction's data, and the sweep that finishes what it began.
        on_table, on_bucket = deleting
        assert "prediction#*" in on_table["Condition"]["ForAllValues:StringLike"]["dynamodb:LeadingKeys"]
        assert on_bucket["Resource"] == {"Fn::Sub": "${OutputsBucket.Arn}/*"}
        return
    if name in ("ManageRecipesFunction", "DeployRecipesFunction"):
        on_table, on_rules, on_schedules = deleting
        assert on_table["Condition"] == {"ForAllValues:StringLike": {"dynamodb:LeadingKeys": ["recipe#*"]}}
        for resource in [*on_rules["Resource"], on_schedules["Resource"]]:
            assert resource["Fn::Sub"].endswith("/${AWS::StackName}-recipe-*")
        return
    if name != "StoreFilesFunction":
        assert not deleting
        return
    on_table, on_bucket = deleting
    assert on_table["Condition"] == {"ForAllValues:StringLike": {"dynamodb:LeadingKeys": ["file#*"]}}
    assert on_bucket["Resource"] == {"Fn::Sub": "${InputsBucket.Arn}/files/*"}


def test_functions_of_files_see_nothing_but_files() -> None:
    for name in ("StoreFilesFunction", "ServeFilesFunction"):
        for statement in statements(name):
            # Links lead to objects of any key.
            if "s3:" in text(statement["Action"]) and name == "StoreFilesFunction":
                assert statement["Resource"] == {"Fn::Sub": "${InputsBucket.Arn}/files/*"}
            if statement["Resource"] == {"Fn::GetAtt": ["PredictionsTable", "Arn"]}:
                assert statement["Condition"] == {"ForAllValues:StringLike": {"dynamodb:LeadingKeys": ["file#*"]}}


@pytest.mark.parametrize("name", BUCKETS)
def test_bucket_is_closed_to_the_public_and_to_plain_http(name: str) -> None:
    properties = resources("AWS::S3::Bucket")[name]["Properties"]
    assert properties["PublicAccessBlockConfiguration"] == dict.fromkeys(
        ("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"), True
    )
    assert properties["OwnershipControls"] == {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
    assert "BucketEncryption" in properties
    (policy,) = [
        found["Properties"]
        for found in resources("AWS::S3::BucketPolicy").values()
        if found["Properties"]["Bucket"] == {"Ref": name}
    ]
    statement, *others = policy["PolicyDocument"]["Statement"]
    # The distribution is the one exception, on one condition: see below.
    assert [other["Fn::If"][1]["Sid"] for other in others] == (["Distribution"] if name == "OutputsBucket" else [])
    assert (statement["Effect"], statement["Principal"], statement["Action"]) == ("Deny", "*", "s3:*")
    assert statement["Resource"] == [{"Fn::GetAtt": [name, "Arn"]}, {"Fn::Sub": f"${{{name}.Arn}}/*"}]
    assert_plain_http_only(statement["Condition"])


def test_bucket_is_open_to_nobody_but_the_stacks_own_distribution_and_only_for_reading() -> None:
    policy = load_template()["Resources"]["OutputsBucketPolicy"]["Properties"]["PolicyDocument"]
    (condition, statement, nothing) = policy["Statement"][1]["Fn::If"]
    assert (condition, nothing) == ("CloudFrontUrls", {"Ref": "AWS::NoValue"})
    assert (statement["Principal"], statement["Action"]) == ({"Service": "cloudfront.amazonaws.com"}, "s3:GetObject")
    source = "arn:${AWS::Partition}:cloudfront::${AWS::AccountId}:distribution/${OutputsDistribution}"
    assert statement["Condition"] == {"StringEquals": {"aws:SourceArn": {"Fn::Sub": source}}}


def test_distribution_serves_signed_urls_only_and_passes_nothing_of_a_callers_on() -> None:
    template = load_template()["Resources"]
    config = template["OutputsDistribution"]["Properties"]["DistributionConfig"]
    behavior = config["DefaultCacheBehavior"]
    assert "CacheBehaviors" not in config, "each would need the key group too"
    assert behavior["TrustedKeyGroups"] == [{"Ref": "OutputUrlKeyGroup"}]
    assert template["OutputUrlKeyGroup"]["Properties"]["KeyGroupConfig"]["Items"] == [{"Ref": "OutputUrlSigningKey"}]
    assert behavior["ViewerProtocolPolicy"] == "https-only"
    # A browser's preflight passes, with its three headers: AWS's policy CORS-S3Origin.
    assert behavior["AllowedMethods"] == ["GET", "HEAD", "OPTIONS"]
    assert behavior["OriginRequestPolicyId"] == "88a5eaf4-2fd4-4709-b370-b4c650ea3fcf"
    assert "CachedMethods" not in behavior, "responses to OPTIONS are not cached"
    forwarded = template["OutputsCachePolicy"]["Properties"]["CachePolicyConfig"][
        "ParametersInCacheKeyAndForwardedToOrigin"
    ]
    assert forwarded == {
        "EnableAcceptEncodingGzip": False,
        "HeadersConfig": {"HeaderBehavior": "none"},
        "CookiesConfig": {"CookieBehavior": "none"},
        "QueryStringsConfig": {"QueryStringBehavior": "none"},
    }
    access = template["OutputsAccessControl"]["Properties"]["OriginAccessControlConfig"]
    assert (access["SigningBehavior"], access["SigningProtocol"]) == ("always", "sigv4")
    headers = template["OutputsResponseHeadersPolicy"]["Properties"]["ResponseHeadersPolicyConfig"]
    assert headers["SecurityHeadersConfig"]["ContentTypeOptions"] == {"Override": True}


def test_files_of_recipes_are_applied_when_they_change_and_with_the_stack() -> None:
    (applied,) = resources("Custom::DeployedRecipes").values()
    properties = applied["Properties"]
    assert properties["ServiceToken"] == {"Fn::GetAtt": ["DeployRecipesFunction", "Arn"]}
    # The layer's ARN is another one with other files, and the function's own tells it that it has these.
    layer = {"Ref": "RecipeFilesLayer"}
    assert properties["Files"] == variables("DeployRecipesFunction")["RECIPE_FILES_ARN"] == layer
    assert resources("AWS::Serverless::LayerVersion")["RecipeFilesLayer"]["Properties"]["ContentUri"] == "recipes"
    # What a recipe is checked by and made of comes from these, too.
    assert (properties["Owner"], properties["SourceBucket"]) == ({"Ref": "QueueOwner"}, {"Ref": "SourceBucketName"})
    function = resources("AWS::Serverless::Function")["DeployRecipesFunction"]["Properties"]
    assert NEEDED_FOR_A_FILE_SECONDS * 2 < function["Timeout"] < properties["ServiceTimeout"]
    assert (ROOT / "recipes/Makefile").read_text().count("build-RecipeFilesLayer:") == 1


def test_request_of_a_schedule_is_sent_to_the_queue_where_it_is_asked_for() -> None:
    (schedule,) = resources("AWS::Scheduler::Schedule").values()
    assert schedule["Condition"] == "ScheduledRequest"
    target = schedule["Properties"]["Target"]
    assert target["Arn"] == {"Fn::GetAtt": ["RequestsQueue", "Arn"]}
    assert target["DeadLetterConfig"] == {"Arn": {"Fn::GetAtt": ["RequestsDeadLetterQueue", "Arn"]}}
    assert target["Input"] == {"Ref": "ScheduleRequest"}
    # The role trusts schedules of this group only.
    assert schedule["Properties"]["GroupName"] == {"Ref": "ScheduleGroup"}
    pattern = PARAMETERS["ScheduleExpression"]["AllowedPattern"]
    for good in (
        "",
        "rate(5 minutes)",
        "cron(0 9 ? * MON-FRI *)",
        "cron(0/5 8-17 L * ? 2026,2027)",
        "at(2026-12-24T18:00:00)",
    ):
        assert re.fullmatch(pattern, good)
    for bad in ("rate", "every day", "rate(5 minutes) or so", "cron(<x>)"):
        assert not re.fullmatch(pattern, bad)
    (assertion,) = load_template()["Rules"]["RequestOfSchedule"]["Assertions"]
    assert "ScheduleExpression" in text(assertion["Assert"])
    assert "ScheduleRequest" in text(assertion["Assert"])


def test_everything_of_cloudfront_is_made_only_where_it_is_asked_for() -> None:
    kinds = {name: found for name, found in load_template()["Resources"].items() if "CloudFront" in found["Type"]}
    assert len(kinds) == 6
    assert {found["Condition"] for found in kinds.values()} == {"CloudFrontUrls"}
    (assertion,) = load_template()["Rules"]["KeysOfSignedUrls"]["Assertions"]
    assert "OutputUrlPublicKey" in text(assertion["Assert"])
    assert "OutputUrlSecretArn" in text(assertion["Assert"])


@pytest.mark.parametrize("name", QUEUES)
def test_queue_is_encrypted_and_closed_to_plain_http(name: str) -> None:
    assert resources("AWS::SQS::Queue")[name]["Properties"]["SqsManagedSseEnabled"] == {
        "Fn::If": ["OwnKey", False, True]
    }
    (policy,) = resources("AWS::SQS::QueuePolicy").values()
    assert {"Ref": name} in policy["Properties"]["Queues"]
    statement, recipes, manifests = policy["Properties"]["PolicyDocument"]["Statement"]
    assert (statement["Effect"], statement["Principal"], statement["Action"]) == ("Deny", "*", "sqs:*")
    assert {"Fn::GetAtt": [name, "Arn"]} in statement["Resource"]
    assert_plain_http_only(statement["Condition"])
    # Besides, EventBridge may send for the rules of recipes, which have these names, and for that of manifests.
    for sender in (recipes, manifests):
        assert (sender["Principal"], sender["Action"]) == ({"Service": "events.amazonaws.com"}, "sqs:SendMessage")
        assert [each["Fn::GetAtt"][0] for each in sender["Resource"]] == ["RequestsQueue", "RequestsDeadLetterQueue"]
    assert manifests["Condition"] == {"ArnEquals": {"aws:SourceArn": {"Fn::GetAtt": ["ManifestsRule", "Arn"]}}}
    for source in recipes["Condition"]["ArnLike"]["aws:SourceArn"]:
        assert source["Fn::Sub"].endswith("/${AWS::StackName}-recipe-*")


def test_rule_of_manifests_sees_those_of_the_inputs_bucket_only() -> None:
    (rule,) = resources("AWS::Events::Rule").values()
    pattern = rule["Properties"]["EventPattern"]
    assert pattern["detail"] == {
        "bucket": {"name": [{"Ref": "InputsBucket"}]},
        "object": {"key": [{"wildcard": f"{PREFIX}*.jsonl"}, {"wildcard": f"{PREFIX}*.csv"}]},
    }
    (target,) = rule["Properties"]["Targets"]
    assert target["InputTransformer"] == {"InputTemplate": '{"batch_manifest": <aws.events.event.json>}'}
    assert target["DeadLetterConfig"] == {"Arn": {"Fn::GetAtt": ["RequestsDeadLetterQueue", "Arn"]}}


def assert_plain_http_only(condition: dict[str, Any]) -> None:
    # A key more in the condition would deny less: the only exception is loopback, which no request to AWS comes from.
    assert condition == {
        "Bool": {"aws:SecureTransport": "false"},
        "NotIpAddress": {"aws:SourceIp": "127.0.0.1/32"},
    }


# -- parameters ----------------------------------------------------------------------------------------------------


def test_new_stacks_submit_again_on_evidence_after_a_grace_of_45_seconds_and_5_times_at_most() -> None:
    # A stack that exists keeps its values in an update: `fail`, where it was deployed before there was evidence.
    grace, policy, creates = (PARAMETERS[n] for n in ("SubmitGraceSeconds", "UnknownSubmission", "MaxUnknownCreates"))
    assert (grace["Default"], grace["MinValue"]) == (45, 30)
    assert (policy["Default"], policy["AllowedValues"]) == ("resubmit", ["fail", "resubmit"])
    assert creates["Default"] == 5


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_has_a_description_a_bound_a_default_and_a_group(name: str) -> None:
    parameter = PARAMETERS[name]
    assert len(parameter["Description"]) > 20
    assert "Default" in parameter
    assert {"AllowedPattern", "AllowedValues", "MinValue"} & parameter.keys()
    if "MinValue" in parameter:
        assert parameter["MinValue"] <= parameter["Default"] <= parameter["MaxValue"]
        # Its unit is in its name, its bounds in its description.
        assert re.search(r"(Seconds|Days|Creates|Depth|PerMinute|PerSecond|Concurrency)$", name)
        assert f"{parameter['MinValue']} to {parameter['MaxValue']}" in parameter["Description"]
    if "AllowedValues" in parameter:
        assert parameter["Default"] in parameter["AllowedValues"]
    if "AllowedPattern" in parameter:
        assert re.fullmatch(parameter["AllowedPattern"], parameter["Default"])
        assert parameter["ConstraintDescription"].startswith("must be ")
    groups = load_template()["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"]
    assert sum(group["Parameters"].count(name) for group in groups) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ReplicateApiToken", "r8 with spaces"),
        ("ReplicateApiToken", "short"),
        ("ReplicateTokenSecretArn", "my-secret"),
        ("ReplicateTokenSecretArn", "arn:aws:secretsmanager:eu-central-1:123456789012:secret:replicate"),
        ("ReplicateApiUrl", "http://replicate.example/v1"),
        ("ReplicateApiUrl", "http://127.0.0.1.evil.example:80/v1"),
        ("ReplicateApiUrl", "https://api.replicate.com/v1/"),
        ("ReplicateApiUrl", "https://user@api.replicate.com/v1"),
        ("FileOrigins", "http://169.254.169.254"),
        ("FileOrigins", "https://a.example/path"),
        ("FileOrigins", "https://a.example,"),
        ("OutputUrlPublicKey", "-----BEGIN PRIVATE KEY-----\nAAAA\nAAAA\nAAAA\nAAAA\n-----END PRIVATE KEY-----\n"),
        ("OutputUrlPublicKey", "MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8A"),
        ("OutputUrlSecretArn", "output-urls"),
        ("CorsOrigin", "https://app.example.com/"),
        ("CorsOrigin", "https://*.example.com"),
        ("CorsOrigin", "https://a.example.com,https://b.example.com"),
        ("CorsOrigin", "null"),
        ("CorsOrigin", "https://a'b.example.com"),
        ("DomainName", "https://ai.example.com"),
        ("DomainName", "ai.example.com/v1"),
        ("DomainName", "localhost"),
        ("CertificateArn", "arn:aws:iam::123456789012:server-certificate/x"),
        ("AlarmTopicArn", "arn:aws:sqs:eu-central-1:123456789012:queue"),
        ("KmsKeyArn", "arn:aws:kms:eu-central-1:123456789012:alias/team"),
        ("KmsKeyArn", "1234abcd-12ab-34cd-56ef-1234567890ab"),
    ],
)
def test_parameter_with_a_malformed_value_is_refused(name: str, value: str) -> None:
    assert not re.fullmatch(PARAMETERS[name]["AllowedPattern"], value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ReplicateApiToken", "r8_" + "x" * 37),
        ("ReplicateTokenSecretArn", "arn:aws:secretsmanager:eu-central-1:123456789012:secret:team/replicate-AbC123"),
        ("ReplicateApiUrl", "http://127.0.0.1:4010/v1"),
        ("FileOrigins", "http://127.0.0.1:4010,https://files.example:8443"),
        ("AlarmTopicArn", "arn:aws-us-gov:sns:us-gov-west-1:123456789012:alarms"),
        ("KmsKeyArn", "arn:aws:kms:eu-central-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"),
        ("KmsKeyArn", "arn:aws:kms:eu-central-1:123456789012:key/mrk-1234abcd12ab34cd56ef1234567890ab"),
    ],
)
def test_parameter_with_a_sound_value_is_taken(name: str, value: str) -> None:
    assert re.fullmatch(PARAMETERS[name]["AllowedPattern"], value)


def test_token_parameter_is_never_shown() -> None:
    assert PARAMETERS["ReplicateApiToken"]["NoEcho"] is True


def test_template_asks_for_exactly_one_source_of_the_token() -> None:
    (assertion,) = load_template()["Rules"]["OneReplicateToken"]["Assertions"]

    def holds(expression: dict[str, Any], given: dict[str, str]) -> bool:
        ((operator, parts),) = expression.items()
        match operator:
            case "Fn::Or":
                return any(holds(part, given) for part in parts)
            case "Fn::And":
                return all(holds(part, given) for part in parts)
            case "Fn::Not":
                return not holds(parts[0], given)
            case "Fn::Equals":
                return bool(given[parts[0]["Ref"]] == parts[1])
        raise AssertionError(operator)

    accepted = {
        (token, arn): holds(assertion["Assert"], {"ReplicateApiToken": token, "ReplicateTokenSecretArn": arn})
        for token in ("", "r8_token")
        for arn in ("", "arn")
    }
    assert accepted == {("", ""): False, ("r8_token", ""): True, ("", "arn"): True, ("r8_token", "arn"): False}


# -- functions -----------------------------------------------------------------------------------------------------


def test_every_folder_is_a_function_and_every_function_a_folder() -> None:
    assert sorted(map(logical_name, FOLDERS)) == FUNCTIONS
    assert sorted(map(folder_name, FUNCTIONS)) == FOLDERS


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_runs_the_handler_of_its_own_folder(name: str) -> None:
    properties = resources("AWS::Serverless::Function")[name]["Properties"]
    assert properties["CodeUri"] == f"functions/{folder_name(name)}"
    assert {"Handler", "Runtime", "Architectures"}.isdisjoint(properties)
    # Besides the library that all have.
    own = [{"Ref": "RecipeFilesLayer"}] if name == "DeployRecipesFunction" else None
    assert properties.get("Layers") == own
    assert {"Description", "MemorySize", "Timeout", "Policies"} <= properties.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_has_the_variables_that_its_code_reads_and_no_others(name: str) -> None:
    common = load_template()["Globals"]["Function"]["Environment"]["Variables"]
    needed = reach(folder_name(name)).variables
    assert needed <= variables(name).keys()
    assert variables(name).keys() - common.keys() <= needed


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_may_do_what_its_code_does_and_nothing_else(name: str) -> None:
    assert actions(name) == reach(folder_name(name)).actions | source_actions(name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_may_use_only_the_items_and_indexes_that_its_code_names(name: str) -> None:
    texts = reach(folder_name(name)).texts
    for statement in statements(name):
        if not any(action.startswith("dynamodb:") for action in listed(statement["Action"])):
            continue
        for keys in statement.get("Condition", {}).get("ForAllValues:StringLike", {}).values():
            assert {key.removesuffix("*") for key in listed(keys)} <= texts
        arns = [each["Fn::Sub"] for each in listed(statement["Resource"]) if "Fn::Sub" in each]
        assert {arn.rpartition("/index/")[2] for arn in arns if "/index/" in arn} <= texts


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_may_use_only_the_secrets_and_machines_that_its_variables_name(name: str) -> None:
    given = list(variables(name).values())
    machines = {_machine(value) for key, value in variables(name).items() if key.endswith("STATE_MACHINE_ARN")}
    used: set[str] = set()
    for statement in statements(name):
        services = {action.partition(":")[0] for action in listed(statement["Action"])}
        resources_ = listed(statement["Resource"])
        if services == {"secretsmanager"}:
            assert [each for each in resources_ if each not in given] == []
        elif services == {"states"} and resources_ != ["*"]:
            used |= {_machine(each) for each in resources_}
    assert used == machines, "neither a machine that it does not know, nor the name of one that it may not touch"


def _machine(arn: Any) -> str:
    """`run-batch` of the ARN of this machine, or of its executions and Map runs."""
    found = re.search(r"\$\{AWS::StackName\}-([a-z-]+)", arn["Fn::Sub"])
    assert found, arn
    return found[1]


def test_functions_behind_the_api_end_before_it_gives_up() -> None:
    for name, function in resources("AWS::Serverless::Function").items():
        if any(event["Type"] == "Api" for event in function["Properties"].get("Events", {}).values()):
            assert timeout_of(name) <= 29, name


def test_wait_of_a_create_fits_into_its_function_and_its_integration() -> None:
    allowed = load_template()["Parameters"]["SyncWaitSeconds"]["AllowedValues"]
    assert load_template()["Mappings"]["SyncWait"].keys() == {str(seconds) for seconds in allowed}
    events = resources("AWS::Serverless::Function")["StartPredictionFunction"]["Properties"]["Events"].values()
    waiting = [event["Properties"] for event in events if not event["Properties"]["Path"].endswith("/trainings")]
    assert len(waiting) == 3
    for seconds in allowed:
        chosen = {"SyncWaitSeconds": seconds}
        timeout = timeout_of("StartPredictionFunction", chosen)
        # The response gets `RESPONSE_SECONDS`, of which one is the wait's: API Gateway gives 29 s for 25. And the
        # function is gone before its claim's `submit_until`.
        assert seconds - 1 + RESPONSE_SECONDS == timeout < seconds + SUBMIT_SECONDS
        for event in waiting:
            assert mapped(event["TimeoutInMillis"], chosen) == 1000 * timeout
    assert max(allowed) == 60  # the most that Replicate takes


def test_logs_are_kept_for_a_set_time() -> None:
    groups = resources("AWS::Logs::LogGroup")
    assert all(group["Properties"]["RetentionInDays"] == {"Ref": "LogRetentionDays"} for group in groups.values())
    shared = load_template()["Globals"]["Function"]["LoggingConfig"]
    assert shared["LogGroup"]["Ref"] in groups
    for machine in resources("AWS::Serverless::StateMachine").values():
        logging = machine["Properties"]["Logging"]
        assert logging["IncludeExecutionData"] is False
        ((destination),) = logging["Destinations"]
        assert destination["CloudWatchLogsLogGroup"]["LogGroupArn"]["Fn::GetAtt"][0] in groups


# -- API -----------------------------------------------------------------------------------------------------------


def test_api_has_exactly_these_routes() -> None:
    routes = {
        (event["Properties"]["Method"], event["Properties"]["Path"]): name
        for name, function in resources("AWS::Serverless::Function").items()
        for event in function["Properties"].get("Events", {}).values()
        if event["Type"] == "Api"
    }
    forwarded: dict[tuple[str, str], str] = dict.fromkeys(ROUTES, "CallReplicateFunction")
    assert routes == forwarded | {
        ("POST", "/predictions"): "StartPredictionFunction",
        ("POST", "/models/{owner}/{name}/predictions"): "StartPredictionFunction",
        ("POST", "/deployments/{owner}/{name}/predictions"): "StartPredictionFunction",
        ("POST", "/models/{owner}/{name}/versions/{id}/trainings"): "StartPredictionFunction",
        ("GET", "/trainings"): "ReadPredictionsFunction",
        ("GET", "/trainings/{id}"): "ReadPredictionFunction",
        ("POST", "/trainings/{id}/cancel"): "CancelPredictionFunction",
        ("GET", "/predictions"): "ReadPredictionsFunction",
        ("GET", "/predictions/{id}"): "ReadPredictionFunction",
        ("POST", "/predictions/{id}/cancel"): "CancelPredictionFunction",
        ("DELETE", "/predictions/{id}"): "CancelPredictionFunction",
        ("POST", "/webhooks/replicate/{id}"): "ReceiveWebhookFunction",
        ("GET", "/webhooks/default/secret"): "GiveSecretFunction",
        ("GET", "/openapi.json"): "ReadPredictionsFunction",
        ("GET", "/usage"): "ReadPredictionsFunction",
        ("POST", "/files"): "StoreFilesFunction",
        ("POST", "/uploads"): "StoreFilesFunction",
        ("GET", "/files"): "StoreFilesFunction",
        ("GET", "/files/{id}"): "StoreFilesFunction",
        ("DELETE", "/files/{id}"): "StoreFilesFunction",
        ("GET", "/files/{id}/download"): "ServeFilesFunction",
        ("HEAD", "/files/{id}/download"): "ServeFilesFunction",
        ("GET", "/objects/{bucket}/{name}"): "ServeFilesFunction",
        ("HEAD", "/objects/{bucket}/{name}"): "ServeFilesFunction",
        ("GET", "/console"): "ServeConsoleFunction",
        ("GET", "/console/{name}"): "ServeConsoleFunction",
        ("POST", "/recipes"): "ManageRecipesFunction",
        ("GET", "/recipes"): "ManageRecipesFunction",
        ("GET", "/recipes/{name}"): "ManageRecipesFunction",
        ("PUT", "/recipes/{name}"): "ManageRecipesFunction",
        ("DELETE", "/recipes/{name}"): "ManageRecipesFunction",
        ("POST", "/pipelines"): "ManagePipelinesFunction",
        ("GET", "/pipelines"): "ManagePipelinesFunction",
        ("GET", "/pipelines/{id}"): "ManagePipelinesFunction",
        ("POST", "/pipelines/{id}/cancel"): "ManagePipelinesFunction",
        ("POST", "/batches"): "ManageBatchesFunction",
        ("GET", "/batches"): "ManageBatchesFunction",
        ("GET", "/batches/{id}"): "ManageBatchesFunction",
        ("POST", "/batches/{id}/cancel"): "ManageBatchesFunction",
        ("POST", "/batches/{id}/retry"): "ManageBatchesFunction",
    }


def test_every_method_of_the_deployed_api_has_the_name_of_its_operation() -> None:
    # SAM merges the routes of the events into the definition that has the names.
    paths = translated(ROOT / "template.yaml")["Resources"]["Api"]["Properties"]["Body"]["paths"]
    deployed = {
        (method, path): operation.get("operationId")
        for path, operations in paths.items()
        for method, operation in operations.items()
        if method != "options"  # preflight requests, which SAM adds
    }
    described = yaml.safe_load((ROOT / "layers/predictions/predictions/api/openapi.yaml").read_text())["paths"]
    assert deployed == {
        (method, path): operations[method]["operationId"].replace(".", "_")
        for path, operations in described.items()
        for method in operations.keys() & {"get", "head", "post", "put", "patch", "delete"}
    }
    # What models and MCP clients take as the name of a tool, an MCP gateway's prefix included.
    assert all(re.fullmatch(r"[a-z_]{1,40}", name) for name in deployed.values())
    assert len(set(deployed.values())) == len(deployed)


def test_api_asks_for_a_token_unless_a_route_says_otherwise() -> None:
    api = load_template()["Resources"]["Api"]["Properties"]
    assert api["StageName"] == "v1"
    authorizer = api["Auth"]["Authorizers"][api["Auth"]["DefaultAuthorizer"]]
    assert authorizer["FunctionArn"] == {"Fn::GetAtt": ["AuthorizeRequestFunction", "Arn"]}
    assert authorizer["FunctionPayloadType"] == "TOKEN"
    assert {name: authorizer["Identity"][name] for name in ("Header", "ReauthorizeEvery")} == {
        "Header": "Authorization", "ReauthorizeEvery": 60,
    }  # fmt: skip
    assert api["BinaryMediaTypes"] == ["multipart~1form-data"]
    assert [settings["DataTraceEnabled"] for settings in api["MethodSettings"]] == [False] * len(api["MethodSettings"])


@given(
    st.text()
    | st.from_regex(r"(bearer|token|Bearer|TOKEN|Basic|bearer\t|) *[ -~]{0,300} *", fullmatch=True)
    | st.sampled_from(
        ["Bearer rs_" + "A" * 43, "token  x ", "Bearer " + "x" * 256, "Bearer " + "x" * 257, "Bearer x y"]
    )
)
def test_header_runs_the_authorizer_exactly_if_it_can_hold_a_token(header: str) -> None:
    # A header has one line: whether `$` also matches before a line's end is no matter here.
    header = header.replace("\n", "")
    authorizer = load_template()["Resources"]["Api"]["Properties"]["Auth"]["Authorizers"]["AccessToken"]
    matched = re.search(authorizer["Identity"]["ValidationExpression"], header)
    assert bool(matched) == (parse_authorization(header) is not None)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "events:PutTargets" in actions(name)])
def test_rules_of_recipes_may_send_to_the_requests_queue_only(name: str) -> None:
    (targets,) = [each for each in statements(name) if "events:PutTargets" in listed(each["Action"])]
    assert targets["Action"] == "events:PutTargets"
    queue = {"Fn::GetAtt": ["RequestsQueue", "Arn"]}
    assert targets["Condition"] == {"ForAllValues:ArnEquals": {"events:TargetArn": queue}}
    assert variables(name)["REQUESTS_QUEUE_ARN"] == queue, "which is where the code sends them"
    for resource in targets["Resource"]:
        assert resource["Fn::Sub"].endswith("/${AWS::StackName}-recipe-*")


def test_public_routes_have_limits_of_their_own_so_that_strangers_cannot_use_up_that_of_the_callers() -> None:
    every, *public = load_template()["Resources"]["Api"]["Properties"]["MethodSettings"]
    assert (every["HttpMethod"], every["ResourcePath"]) == ("*", "/*")
    assert every["ThrottlingRateLimit"] == {"Ref": "ApiRequestsPerSecond"}
    open_to_all = {
        (event["Properties"]["Method"], event["Properties"]["Path"])
        for function in resources("AWS::Serverless::Function").values()
        for event in function["Properties"].get("Events", {}).values()
        if event["Type"] == "Api" and event["Properties"].get("Auth") == {"Authorizer": "NONE"}
    }
    assert {
        # https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/aws-properties-apigateway-stage-methodsetting.html
        (settings["HttpMethod"], settings["ResourcePath"].removeprefix("/").replace("~1", "/"))
        for settings in public
    } == open_to_all
    limits = ("ThrottlingRateLimit", "ThrottlingBurstLimit")
    assert all(settings[limit] == {"Ref": "PublicRequestsPerSecond"} for settings in public for limit in limits)


def test_an_origin_is_allowed_by_all_responses_of_the_api_or_by_none() -> None:
    template = load_template()["Resources"]
    origin = {"Fn::If": ["AllowCors", {"Fn::Sub": "'${CorsOrigin}'"}, {"Ref": "AWS::NoValue"}]}
    for answer in GATEWAY_RESPONSES.values():
        assert answer["ResponseParameters"]["Headers"]["Access-Control-Allow-Origin"] == origin
    preflight = template["Api"]["Properties"]["Cors"]
    assert preflight["AllowOrigin"]["Fn::If"] == ["AllowCors", {"Fn::Sub": "'${CorsOrigin}'"}, "'https://none.invalid'"]
    assert "AllowCredentials" not in preflight
    assert {"X-Labels", "Traceparent"} <= set(preflight["AllowHeaders"].strip("'").split(","))


def test_any_origin_may_use_a_signed_url_of_the_buckets_and_nothing_else() -> None:
    # What an origin without a signature gets: tests/stack/test_console.py.
    for name, methods in {"OutputsBucket": ["GET", "HEAD"], "InputsBucket": ["GET", "HEAD", "PUT"]}.items():
        (rule,) = load_template()["Resources"][name]["Properties"]["CorsConfiguration"]["CorsRules"]
        assert (rule["AllowedOrigins"], rule["AllowedMethods"]) == (["*"], methods)


def test_a_domain_name_leads_to_the_stage_under_its_own_path() -> None:
    template = load_template()["Resources"]
    mapping = template["ApiDomainMapping"]
    assert mapping["Condition"] == template["ApiDomain"]["Condition"] == "CustomDomain"
    assert mapping["Properties"]["BasePath"] == template["Api"]["Properties"]["StageName"]
    url = load_template()["Outputs"]["ApiUrl"]["Value"]
    assert url == template["ApiUrlParameter"]["Properties"]["Value"]
    assert url["Fn::If"][:2] == ["CustomDomain", {"Fn::Sub": "https://${DomainName}/v1"}]


GATEWAY_RESPONSES = load_template()["Resources"]["Api"]["Properties"]["GatewayResponses"]


@pytest.mark.parametrize("kind", GATEWAY_RESPONSES)
def test_answer_of_the_gateway_itself_is_a_problem(kind: str) -> None:
    answer = GATEWAY_RESPONSES[kind]
    assert answer["ResponseParameters"]["Headers"]["Content-Type"] == "'application/problem+json'"
    body = answer["ResponseTemplates"]["application/json"].replace("$context.error.messageString", '"what was wrong"')
    problem = json.loads(body)
    assert problem["title"]
    assert problem["detail"]
    assert problem.get("status") == answer.get("StatusCode")
    if answer.get("StatusCode") in (429, 503):
        assert re.fullmatch(r"'\d+'", answer["ResponseParameters"]["Headers"]["Retry-After"])


def test_gateway_answers_for_the_caller_are_the_documented_ones() -> None:
    statuses = {
        "UNAUTHORIZED": 401,
        "ACCESS_DENIED": 403,
        "MISSING_AUTHENTICATION_TOKEN": 404,
        "REQUEST_TOO_LARGE": 413,
        "UNSUPPORTED_MEDIA_TYPE": 415,
        "THROTTLED": 429,
        "QUOTA_EXCEEDED": 429,
        "DEFAULT_4XX": None,
        "DEFAULT_5XX": None,
    }
    assert {kind: GATEWAY_RESPONSES[kind].get("StatusCode") for kind in statuses} == statuses


# -- storage -------------------------------------------------------------------------------------------------------


def test_table_is_on_demand_recoverable_expiring_streamed_and_kept() -> None:
    table = load_template()["Resources"]["PredictionsTable"]
    properties = table["Properties"]
    assert properties["BillingMode"] == "PAY_PER_REQUEST"
    assert properties["PointInTimeRecoverySpecification"] == {"PointInTimeRecoveryEnabled": True}
    assert properties["TimeToLiveSpecification"] == {"AttributeName": "expires_at", "Enabled": True}
    assert properties["StreamSpecification"] == {"StreamViewType": "NEW_AND_OLD_IMAGES"}
    assert properties["SSESpecification"]["Fn::If"][2] == {"SSEEnabled": True}
    assert properties["DeletionProtectionEnabled"] == {"Fn::If": ["ProtectTable", True, False]}
    assert PARAMETERS["DeletionProtection"]["Default"] == "true"
    assert (table["DeletionPolicy"], table["UpdateReplacePolicy"]) == ("Retain", "Retain")


def test_indexes_hold_keys_only() -> None:
    indexes = {
        index["IndexName"]: (
            [key["AttributeName"] for key in index["KeySchema"]],
            index["Projection"]["ProjectionType"],
        )
        for index in table_properties()["GlobalSecondaryIndexes"]
    }
    assert indexes == {
        "by_owner": (["owner", "listed_at"], "KEYS_ONLY"),
        "due": (["open", "next_check_at"], "KEYS_ONLY"),
        "by_upstream_id": (["upstream_id"], "KEYS_ONLY"),
    }


@pytest.mark.parametrize("name", BUCKETS)
def test_bucket_keeps_files_for_the_retention_time_and_is_kept_itself(name: str) -> None:
    bucket = resources("AWS::S3::Bucket")[name]
    # Deleted only with the first deployment that fails, when it is empty. The table cannot be: its own protection.
    assert (bucket["DeletionPolicy"], bucket["UpdateReplacePolicy"]) == ("RetainExceptOnCreate", "Retain")
    rules = bucket["Properties"]["LifecycleConfiguration"]["Rules"]
    assert all(rule["Status"] == "Enabled" for rule in rules)
    whole = [rule for rule in rules if "ExpirationInDays" in rule and "Prefix" not in rule]
    assert [rule["ExpirationInDays"] for rule in whole] == [{"Ref": "RetentionDays"}]
    assert {"DaysAfterInitiation": 1} in [rule.get("AbortIncompleteMultipartUpload") for rule in rules]


@pytest.mark.parametrize(
    ("queue", "dead_letters"),
    [
        ("RequestsQueue", "RequestsDeadLetterQueue"),
        ("DeliveriesQueue", "DeliveriesDeadLetterQueue"),
        ("ChangesRetryQueue", "ChangesDeadLetterQueue"),
    ],
)
def test_messages_that_fail_again_and_again_are_kept(queue: str, dead_letters: str) -> None:
    queues = resources("AWS::SQS::Queue")
    redrive = queues[queue]["Properties"]["RedrivePolicy"]
    assert redrive["deadLetterTargetArn"] == {"Fn::GetAtt": [dead_letters, "Arn"]}
    assert queues[dead_letters]["Properties"]["MessageRetentionPeriod"] == 14 * 86400


def test_delivery_outlives_its_tries_and_its_message_the_function() -> None:
    queue = resources("AWS::SQS::Queue")["DeliveriesQueue"]["Properties"]
    function = resources("AWS::Serverless::Function")["DeliverWebhookFunction"]["Properties"]
    assert queue["MessageRetentionPeriod"] > RETRY_SECONDS + LONGEST_WAIT_SECONDS
    assert queue["VisibilityTimeout"] >= 6 * function["Timeout"]
    assert function["Timeout"] > 2 * TOTAL_SECONDS
    source = SOURCES["DeliveriesEventSource"]["Properties"]
    assert (source["BatchSize"], source["FunctionResponseTypes"]) == (1, ["ReportBatchItemFailures"])


def test_retry_of_a_change_outlives_its_tries_and_its_message_the_function() -> None:
    queue = resources("AWS::SQS::Queue")["ChangesRetryQueue"]["Properties"]
    function = resources("AWS::Serverless::Function")["PublishChangesFunction"]["Properties"]
    assert queue["MessageRetentionPeriod"] > CHANGE_RETRY_SECONDS
    assert queue["VisibilityTimeout"] >= 6 * function["Timeout"]
    assert function["Timeout"] >= 3 * CHANGE_NEEDED_SECONDS
    source = SOURCES["ChangesRetryEventSource"]["Properties"]
    assert source["EventSourceArn"] == {"Fn::GetAtt": ["ChangesRetryQueue", "Arn"]}
    assert (source["BatchSize"], source["FunctionResponseTypes"]) == (10, ["ReportBatchItemFailures"])
    assert source["ScalingConfig"] == {"MaximumConcurrency": 5}


def test_request_outlives_its_tries_and_its_message_the_function() -> None:
    queue = resources("AWS::SQS::Queue")["RequestsQueue"]["Properties"]
    function = resources("AWS::Serverless::Function")["StartFromQueueFunction"]["Properties"]
    # https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-configure.html
    assert queue["VisibilityTimeout"] >= 6 * function["Timeout"]
    # SQS counts receives that touched nothing, too: the function gives up long before, by its own count.
    assert queue["RedrivePolicy"]["maxReceiveCount"] > 3 * (FAILURES_LIMIT + 1)
    assert queue["RedrivePolicy"]["maxReceiveCount"] * queue["VisibilityTimeout"] < queue["MessageRetentionPeriod"]
    assert function["Timeout"] > 2 * NEEDED_SECONDS
    source = SOURCES["RequestsEventSource"]["Properties"]
    assert source["EventSourceArn"] == {"Fn::GetAtt": ["RequestsQueue", "Arn"]}
    assert source["FunctionResponseTypes"] == ["ReportBatchItemFailures"]
    assert source["ScalingConfig"] == {"MaximumConcurrency": {"Ref": "RequestsConcurrency"}}
    # https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-scaling.html
    parameter = load_template()["Parameters"]["RequestsConcurrency"]
    assert (parameter["Default"], parameter["MinValue"], parameter["MaxValue"]) == (5, 2, 1000)


def test_stream_is_read_from_its_start_and_what_fails_is_noted() -> None:
    source = SOURCES["ChangesEventSource"]["Properties"]
    assert source["EventSourceArn"] == {"Fn::GetAtt": ["PredictionsTable", "StreamArn"]}
    assert source["StartingPosition"] == "TRIM_HORIZON"
    assert source["FunctionResponseTypes"] == ["ReportBatchItemFailures"]
    assert source["BisectBatchOnFunctionError"] is True
    assert source["MaximumRetryAttempts"] == 100
    assert source["DestinationConfig"] == {
        "OnFailure": {"Destination": {"Fn::GetAtt": ["ChangesDeadLetterQueue", "Arn"]}}
    }


def test_invocation_that_nobody_waits_for_is_repeated_and_kept_where_it_fails_for_good() -> None:
    properties = resources("AWS::Serverless::Function")["RunPredictionFunction"]["Properties"]
    dead_letters = {"Type": "SQS", "Destination": {"Fn::GetAtt": ["RunJobsDeadLetterQueue", "Arn"]}}
    assert properties["EventInvokeConfig"]["DestinationConfig"] == {"OnFailure": dead_letters}
    assert properties["EventInvokeConfig"]["MaximumRetryAttempts"] == 2
    queue = resources("AWS::SQS::Queue")["RunJobsDeadLetterQueue"]["Properties"]
    assert queue["MessageRetentionPeriod"] == 14 * 86400
    alarm = resources("AWS::CloudWatch::Alarm")["DeadRunJobsAlarm"]["Properties"]
    assert alarm["Dimensions"][0]["Value"] == {"Fn::GetAtt": ["RunJobsDeadLetterQueue", "QueueName"]}


HOOK = {"S": "https://hooks.example.com/"}


STATUS = {"sk": {"S": "status"}}
PATTERNS = [
    (json.loads(each["Fn::If"][1]["Pattern"]), True) if "Fn::If" in each else (json.loads(each["Pattern"]), False)
    for each in SOURCES["ChangesEventSource"]["Properties"]["FilterCriteria"]["Filters"]
]


@pytest.mark.parametrize(
    ("name", "image", "passed"),
    [
        ("MODIFY", STATUS | {"visible": {"S": "starting"}, "webhook": HOOK}, False),
        ("MODIFY", STATUS | {"visible": {"S": "processing"}, "rank": {"N": "2"}}, False),
        ("MODIFY", STATUS | {"visible": {"S": "processing"}, "rank": {"N": "9"}}, False),
        ("REMOVE", None, False),
        ("INSERT", {"sk": {"S": "input#1"}, "json": {"S": "{}"}}, False),
        ("MODIFY", {"sk": {"S": "progress"}, "json": {"S": "{}"}}, False),
        ("INSERT", {"sk": {"S": "result#1"}, "json": {"S": "{}"}}, False),
        ("INSERT", {"sk": {"S": "files"}, "json": {"S": "{}"}}, False),
        ("INSERT", {"sk": {"S": "0123abc"}, "owner": {"S": "alice"}}, False),
        ("MODIFY", {"sk": {"S": "caller#1"}, "task_token": {"S": "t"}}, False),
        ("INSERT", STATUS | {"visible": {"S": "starting"}}, True),
        ("INSERT", {"sk": {"S": "caller#1"}, "task_token": {"S": "t"}}, True),
        ("MODIFY", STATUS | {"visible": {"S": "processing"}, "webhook": HOOK}, True),
        ("MODIFY", STATUS | {"visible": {"S": "succeeded"}}, True),
        ("MODIFY", STATUS | {"visible": {"S": "failed"}}, True),
        ("MODIFY", STATUS | {"visible": {"S": "canceled"}}, True),
        ("INSERT", {"sk": {"S": "progress"}, "notify": {"S": "output"}}, True),
        ("MODIFY", {"sk": {"S": "progress"}, "notify": {"S": "logs"}}, True),
    ],
)
def test_stream_invokes_only_for_starts_and_ends_and_for_who_wants_to_be_told_more(
    name: str, image: dict[str, Any] | None, passed: bool
) -> None:
    record = {"eventName": name, "dynamodb": {"NewImage": image} if image else {}}
    assert any(passes(pattern, record) for pattern, optional in PATTERNS if not optional) is passed


@pytest.mark.parametrize(
    ("image", "passed"),
    [
        (STATUS | {"visible": {"S": "processing"}, "rank": {"N": "2"}}, True),
        (STATUS | {"visible": {"S": "processing"}, "rank": {"N": "9"}}, False),
        (STATUS | {"visible": {"S": "starting"}, "rank": {"N": "1"}}, False),
    ],
)
def test_stream_invokes_for_what_runs_where_the_bus_is_to_be_told_of_it(image: dict[str, Any], passed: bool) -> None:
    record = {"eventName": "MODIFY", "dynamodb": {"NewImage": image}}
    assert any(passes(pattern, record) for pattern, optional in PATTERNS if optional) is passed


def test_patterns_of_the_stream_are_as_many_as_lambda_takes() -> None:
    # https://docs.aws.amazon.com/lambda/latest/dg/invocation-eventfiltering.html
    assert len(PATTERNS) <= 5


def test_uploaded_files_are_kept_for_a_time_of_their_own_that_ends_before_the_retention_time() -> None:
    rules = resources("AWS::S3::Bucket")["InputsBucket"]["Properties"]["LifecycleConfiguration"]["Rules"]
    assert [rule for rule in rules if "Prefix" in rule] == [
        {
            "Id": "expire-files",
            "Status": "Enabled",
            "Prefix": "files/",
            "ExpirationInDays": {"Ref": "FileRetentionDays"},
        }
    ]
    assert PARAMETERS["FileRetentionDays"]["MaxValue"] < PARAMETERS["RetentionDays"]["MinValue"]


def test_requests_that_fail_again_and_again_are_kept() -> None:
    queue = resources("AWS::SQS::Queue")["RequestsQueue"]["Properties"]
    assert queue["RedrivePolicy"]["deadLetterTargetArn"] == {"Fn::GetAtt": ["RequestsDeadLetterQueue", "Arn"]}
    dead_letters = resources("AWS::SQS::Queue")["RequestsDeadLetterQueue"]["Properties"]
    assert dead_letters["MessageRetentionPeriod"] == 14 * 86400


def test_signing_secret_starts_empty_and_nothing_of_it_can_change_with_a_parameter() -> None:
    # CloudFormation writes a secret anew when its properties change: none of them may depend on anything.
    properties = load_template()["Resources"]["SigningSecret"]["Properties"]
    assert properties["SecretString"] == "{}"
    assert all(isinstance(value, str) for value in properties.values())


# -- operation -----------------------------------------------------------------------------------------------------


def test_sweep_runs_every_minute_and_is_not_repeated() -> None:
    sweep = load_template()["Resources"]["SweepPredictionsFunction"]["Properties"]
    (event,) = sweep["Events"].values()
    assert event["Type"] == "ScheduleV2"
    assert event["Properties"]["ScheduleExpression"] == "rate(1 minute)"
    assert event["Properties"]["RetryPolicy"]["MaximumRetryAttempts"] == 0
    assert sweep["EventInvokeConfig"]["MaximumRetryAttempts"] == 0


ALARMS = {name: found["Properties"] for name, found in resources("AWS::CloudWatch::Alarm").items()}
COMMON = load_template()["Globals"]["Function"]["Environment"]["Variables"]
SOURCES_OF_METRICS = "".join(
    path.read_text() for path in (*sorted((ROOT / "functions").rglob("*.py")), *library.of_functions().values())
)
EMITTED = set(re.findall(r'(?:add_metric|single_metric)\(\s*name="(\w+)"', SOURCES_OF_METRICS))

# Metrics of AWS that alarms and the dashboard read, with the dimensions by which AWS gives them.
# https://docs.aws.amazon.com/lambda/latest/dg/monitoring-metrics-types.html
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-available-cloudwatch-metrics.html
# https://docs.aws.amazon.com/step-functions/latest/dg/procedure-cw-metrics.html
# https://docs.aws.amazon.com/apigateway/latest/developerguide/api-gateway-metrics-and-dimensions.html
AWS_METRICS = {
    ("AWS/Lambda", ("FunctionName",)): {"Invocations", "Errors", "Throttles", "Duration", "IteratorAge"},
    ("AWS/Lambda", ()): {"Throttles"},
    ("AWS/SQS", ("QueueName",)): {"ApproximateNumberOfMessagesVisible"},
    ("AWS/States", ("StateMachineArn",)): {"ExecutionsFailed"},
    ("AWS/ApiGateway", ("ApiName", "Stage")): {"Count", "4XXError", "5XXError", "Latency"},
}


def read_by(alarm: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """The metrics that an alarm reads: namespace, name, dimensions."""
    found = [each["MetricStat"]["Metric"] for each in alarm.get("Metrics", []) if "MetricStat" in each] or [alarm]
    return [
        (each["Namespace"], each["MetricName"], {one["Name"]: one["Value"] for one in each.get("Dimensions", [])})
        for each in found
    ]


def assert_is_emitted(namespace: str, metric: str, dimensions: dict[str, Any], service: Any) -> None:
    if namespace == COMMON["POWERTOOLS_METRICS_NAMESPACE"]:
        assert metric in EMITTED
        # Powertools' one dimension: what asks for another one watches nothing. One metric has a second.
        assert dimensions.pop("service") == service
        assert dimensions.keys() <= ({"status"} if metric == "PredictionsEnded" else set())
    else:
        assert metric in AWS_METRICS[namespace, tuple(dimensions)]


@pytest.mark.parametrize("name", ALARMS)
def test_alarm_reads_metrics_that_exist_tells_the_topic_and_says_where_its_remedy_is(name: str) -> None:
    alarm = ALARMS[name]
    for namespace, metric, dimensions in read_by(alarm):
        assert_is_emitted(namespace, metric, dimensions, COMMON["POWERTOOLS_SERVICE_NAME"])
    for told in ("AlarmActions", "OKActions"):
        assert alarm[told] == {"Fn::If": ["NotifyAlarms", [{"Ref": "AlarmTopicArn"}], {"Ref": "AWS::NoValue"}]}
    # Silence is good news, except from the sweep itself.
    assert alarm["TreatMissingData"] == ("breaching" if name == "SweepStoppedAlarm" else "notBreaching")
    text, _, anchor = alarm["AlarmDescription"].rpartition(" ")
    assert anchor == f"docs/runbook.md#{name.lower()}"
    assert 40 < len(text) < 900
    # What one alarm may read: https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/Create-alarm-on-metric-math-expression.html
    assert sum("MetricStat" in each for each in alarm.get("Metrics", [])) <= 10
    assert sum(each.get("ReturnData", True) for each in alarm.get("Metrics", [{}])) == 1


def test_alarms_watch_what_loses_results_or_money() -> None:
    assert {
        metric for alarm in ALARMS.values() for space, metric, _ in read_by(alarm) if space == "ReplicateServerless"
    } == {
        "BudgetThresholds",
        "ChangesDelayed",
        "CopiesFailed",
        "UpstreamRefusals",
        "UpstreamThrottles",
        "WebhooksRejected",
        "EndsByPoll",
        "SecondsToEnd",
        "ExecutionsReplaced",
        "SecondsPastDeadline",
        "Paused",
        "PaidTwice",
        "ResubmissionStopped",
        "UndecidableSubmissions",
    }
    failed = [
        dimensions["StateMachineArn"]
        for alarm in ALARMS.values()
        for _, metric, dimensions in read_by(alarm)
        if metric == "ExecutionsFailed"
    ]
    assert sorted(each["Ref"] for each in failed) == MACHINES


def test_errors_of_every_function_are_watched_but_of_those_that_fail_by_design() -> None:
    watched = [
        dimensions["FunctionName"]["Ref"]
        for alarm in ALARMS.values()
        for _, metric, dimensions in read_by(alarm)
        if metric == "Errors"
    ]
    by_design = {
        # They raise PredictionThrottled and CopyInterrupted, which the state machine takes; else its execution fails.
        "SubmitPredictionFunction",
        "PollPredictionFunction",
        "CopyOutputsFunction",
        # Its deployment fails, and DeadInvocationsAlarm tells.
        "DeployRecipesFunction",
    }
    # The gateway answers 502 where a function fails, and 500 where the authorizer does.
    behind_the_api = {
        name
        for name, function in resources("AWS::Serverless::Function").items()
        if any(event["Type"] == "Api" for event in function["Properties"].get("Events", {}).values())
    } | {"AuthorizeRequestFunction"}
    assert ("AWS/ApiGateway", "5XXError") in [each[:2] for alarm in ALARMS.values() for each in read_by(alarm)]
    assert sorted(watched) == sorted(set(FUNCTIONS) - by_design - behind_the_api)


def test_what_does_not_get_across_an_asynchronous_hop_is_kept_and_an_alarm_tells() -> None:
    kept_in = dead_letter_queues()
    assert len(kept_in) == 10
    queues = resources("AWS::SQS::Queue")
    watched = {
        dimensions["QueueName"]["Fn::GetAtt"][0]
        for alarm in ALARMS.values()
        for _, metric, dimensions in read_by(alarm)
        if metric == "ApproximateNumberOfMessagesVisible" and alarm["Threshold"] == 1
    }
    assert (
        set(kept_in.values())
        == watched
        == {name for name in queues if "RedrivePolicy" not in queues[name]["Properties"]}
    )


@pytest.mark.parametrize("function", sorted(UNKEPT))
def test_invocation_that_holds_a_secret_url_is_kept_in_no_queue(function: str) -> None:
    properties = resources("AWS::Serverless::Function")[function]["Properties"]
    assert "DestinationConfig" not in properties.get("EventInvokeConfig", {})
    assert "DeadLetterQueue" not in properties
    # It writes nothing of the event into a queue itself, either.
    assert not {action for action in actions(function) if action.startswith("sqs:")}


def test_every_dead_letter_queue_is_one_of_the_command_line() -> None:
    queues = resources("AWS::SQS::Queue")
    assert set(dead_letter_queues().values()) == set(LETTERS.values())
    assert {name for name in queues if "RedrivePolicy" not in queues[name]["Properties"]} == set(LETTERS.values())


def test_owner_in_a_parameter_is_one_that_the_code_takes() -> None:
    owner = _OWNER.pattern
    assert PARAMETERS["QueueOwner"]["AllowedPattern"] == f"^{owner}$"
    inner = owner.replace("payloads$", "payloads(,|$)")
    pair = f"[A-Z0-9]{{12,128}}={inner}"
    assert PARAMETERS["QueueSenders"]["AllowedPattern"] == f"^$|^{pair}(,{pair})*$"


@pytest.mark.parametrize(
    "owner", ["payloads", "-x", "", "a" * 33, "A", "a_b", "payloads-", "payload", "a", "0", "a-", "a" * 32, "queue"]
)
def test_parameters_take_the_owners_that_the_code_takes(owner: str) -> None:
    assert bool(re.search(PARAMETERS["QueueOwner"]["AllowedPattern"], owner)) == is_owner(owner)
    first, second = "AROAEXAMPLE00", "AROAEXAMPLE11"
    for senders in (f"{first}={owner}", f"{first}=a,{second}={owner}", f"{first}={owner},{second}=a"):
        assert bool(re.search(PARAMETERS["QueueSenders"]["AllowedPattern"], senders)) == is_owner(owner), senders


def test_code_makes_no_asynchronous_hop_without_a_queue_that_keeps_what_fails() -> None:
    # Of poll_prediction, by receive_webhook, and of sweep_predictions, by itself.
    assert SOURCES_OF_METRICS.count("InvocationType") == 2
    for made in ("put_targets(", "create_schedule("):
        assert SOURCES_OF_METRICS.count(made) <= 1
    # The target of recipes' rules and that of their schedules, which are put there and nowhere else.
    assert SOURCES_OF_METRICS.count('"DeadLetterConfig": {"Arn": self._dead_letter_queue_arn}') == 2


# -- dashboard -----------------------------------------------------------------------------------------------------


def dashboard() -> list[dict[str, Any]]:
    widgets: list[dict[str, Any]] = json.loads(
        load_template()["Resources"]["StackDashboard"]["Properties"]["DashboardBody"]["Fn::Sub"]
    )["widgets"]
    return widgets


def test_dashboard_shows_every_alarm_and_only_metrics_that_exist() -> None:
    alarms, *graphs = dashboard()
    # Most urgent first, which is not the order of the template.
    assert sorted(alarms["properties"]["alarms"]) == sorted(f"${{{name}.Arn}}" for name in ALARMS)
    for graph in graphs:
        assert graph["properties"]["region"] == "${AWS::Region}"
        for row in graph["properties"]["metrics"]:
            if isinstance(row[0], dict):
                search = re.fullmatch(
                    r"""SEARCH\('\{AWS/Lambda,FunctionName\} MetricName="(\w+)" \$\{AWS::StackName\}', '\w+', 300\)""",
                    row[0]["expression"],
                )
                assert search
                assert search[1] in AWS_METRICS["AWS/Lambda", ("FunctionName",)]
                continue
            texts = [each for each in row if isinstance(each, str)]
            dimensions: dict[str, Any] = dict(zip(texts[2::2], texts[3::2], strict=True))
            assert_is_emitted(texts[0], texts[1], dimensions, "${AWS::StackName}")
    shown = {row[1] for graph in graphs for row in graph["properties"]["metrics"] if row[0] == "ReplicateServerless"}
    assert shown >= {"PredictionsStarted", "PredictionsEnded", "OpenItems", "OpenSeconds", "UpstreamSeconds", "Polls"}


def test_dashboard_names_resources_of_the_stack_and_fits_its_grid() -> None:
    body = load_template()["Resources"]["StackDashboard"]["Properties"]["DashboardBody"]["Fn::Sub"]
    named = {name.partition(".")[0] for name in re.findall(r"\$\{([^}]+)\}", body)}
    assert named - {"AWS::Region", "AWS::StackName"} <= load_template()["Resources"].keys()
    assert not [name for name in named if "Condition" in load_template()["Resources"].get(name, {})]
    taken = [(x, y) for each in dashboard() for x in range(each["x"], each["x"] + each["width"])
             for y in range(each["y"], each["y"] + each["height"])]  # fmt: skip
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24
    assert load_template()["Resources"]["StackDashboard"]["Condition"] == "ShowDashboard"


# -- a key of one's own --------------------------------------------------------------------------------------------


def key_users(policy: str) -> set[str]:
    return {role["Ref"].removesuffix("Role") for role in load_template()["Resources"][policy]["Properties"]["Roles"]}


def test_everything_that_holds_data_is_encrypted_with_the_key_that_is_named() -> None:
    key = {"Ref": "KmsKeyArn"}
    encrypted: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
        "AWS::SQS::Queue": lambda properties: properties["KmsMasterKeyId"]["Fn::If"][:2],
        "AWS::Logs::LogGroup": lambda properties: properties["KmsKeyId"]["Fn::If"][:2],
        "AWS::DynamoDB::Table": lambda properties: [
            properties["SSESpecification"]["Fn::If"][0],
            properties["SSESpecification"]["Fn::If"][1]["KMSMasterKeyId"],
        ],
        "AWS::S3::Bucket": lambda properties: [
            (chosen := properties["BucketEncryption"]["ServerSideEncryptionConfiguration"][0]["Fn::If"])[0],
            chosen[1]["ServerSideEncryptionByDefault"]["KMSMasterKeyID"],
        ],
    }
    for kind, found in encrypted.items():
        for name, resource in resources(kind).items():
            assert found(resource["Properties"]) == ["OwnKey", key], name


def test_role_may_use_the_key_through_the_services_that_it_uses_and_no_others() -> None:
    def doing(*wanted: str) -> set[str]:
        return {name for name in [*FUNCTIONS, *MACHINES] if actions(name) & set(wanted)}

    on_table = {name for name in [*FUNCTIONS, *MACHINES] if any(each.startswith("dynamodb:") for each in actions(name))}
    writing = doing("s3:PutObject")
    failing = {
        name
        for name, function in resources("AWS::Serverless::Function").items()
        if "DestinationConfig" in function["Properties"].get("EventInvokeConfig", {})
    }
    sending = doing("sqs:SendMessage") | failing
    assert key_users("TableKeyPolicy") == on_table
    assert key_users("WriteObjectsKeyPolicy") == writing
    assert key_users("ReadObjectsKeyPolicy") == doing("s3:GetObject") - writing
    # Besides the roles of the schedules, whose own failures are sent to a queue too.
    assert key_users("SendMessagesKeyPolicy") == sending | {"Scheduler", "SweepPredictionsFunctionEveryMinute"}
    # Who receives may decrypt because it sends as well.
    assert doing("sqs:ReceiveMessage") <= sending


@pytest.mark.parametrize(
    ("name", "service", "allowed"),
    [
        (
            "TableKeyPolicy",
            "dynamodb",
            {"Decrypt", "DescribeKey", "Encrypt", "GenerateDataKey", "ReEncryptFrom", "ReEncryptTo"},
        ),
        ("ReadObjectsKeyPolicy", "s3", {"Decrypt"}),
        ("WriteObjectsKeyPolicy", "s3", {"Decrypt", "GenerateDataKey"}),
        ("SendMessagesKeyPolicy", "sqs", {"Decrypt", "GenerateDataKey"}),
    ],
)
def test_use_of_the_key_is_bound_to_one_service(name: str, service: str, allowed: set[str]) -> None:
    policy = load_template()["Resources"][name]
    assert policy["Condition"] == "OwnKey"
    (statement,) = policy["Properties"]["PolicyDocument"]["Statement"]
    assert statement["Resource"] == {"Ref": "KmsKeyArn"}
    assert set(statement["Action"]) == {f"kms:{action}" for action in allowed}
    via = {"Fn::Sub": f"{service}.${{AWS::Region}}.${{AWS::URLSuffix}}"}
    assert statement["Condition"] == {"StringEquals": {"kms:ViaService": via}}


def test_recipes_are_deployed_once_their_function_may_use_the_key_and_removed_while_it_may() -> None:
    (deployed,) = resources("Custom::DeployedRecipes").values()
    condition, policies, none = deployed["Properties"]["KeyPolicies"]["Fn::If"]
    assert (condition, none) == ("OwnKey", {"Ref": "AWS::NoValue"})
    for name in ("TableKeyPolicy", "ReadObjectsKeyPolicy", "WriteObjectsKeyPolicy"):
        assert ({"Ref": name} in policies) == ("DeployRecipesFunction" in key_users(name)), name


def test_alarm_for_what_is_past_its_deadline_comes_after_the_last_poll_that_may_end_it() -> None:
    longest = load_template()["Parameters"]["PollSeconds"]["MaxValue"]
    alarm = load_template()["Resources"]["OverduePredictionsAlarm"]["Properties"]
    assert alarm["Threshold"] > ABANDON_SECONDS + longest


def test_concurrency_is_reserved_for_webhooks_and_starts_only_where_it_is_asked_for() -> None:
    reserved = {
        name: function["Properties"]["ReservedConcurrentExecutions"]
        for name, function in resources("AWS::Serverless::Function").items()
        if "ReservedConcurrentExecutions" in function["Properties"]
    }
    webhooks = ["ReserveForWebhooks", {"Ref": "WebhookReservedConcurrency"}, {"Ref": "AWS::NoValue"}]
    starts = ["ReserveForStarts", {"Ref": "StartReservedConcurrency"}, {"Ref": "AWS::NoValue"}]
    assert reserved == {
        "ReceiveWebhookFunction": {"Fn::If": webhooks},
        "StartPredictionFunction": {"Fn::If": starts},
    }
    # A new account has 10, and Lambda lets nothing be reserved of the last 100: the stack could not be deployed.
    assert PARAMETERS["WebhookReservedConcurrency"]["Default"] == 0
    assert PARAMETERS["StartReservedConcurrency"]["Default"] == 0


def test_outputs_are_those_that_users_and_tools_rely_on() -> None:
    assert load_template()["Outputs"].keys() == {
        "ApiUrl",
        "TableName",
        "OutputsBucketName",
        "InputsBucketName",
        "RequestsQueueUrl",
        "RequestsQueueArn",
        "RequestsDeadLetterQueueUrl",
        "StartFromQueueFunctionName",
        "DeliveriesQueueUrl",
        "DeliveriesDeadLetterQueueUrl",
        "RunPredictionFunctionName",
        "RunPredictionFunctionArn",
        "RunJobsDeadLetterQueueUrl",
        "EventBusName",
        "TrackPredictionStateMachineArn",
        "TrackSubmittedStateMachineArn",
        "ReplicateTokenSecretArn",
        "ApiUrlParameterName",
        "SigningSecretArn",
        "FunctionsLogGroupName",
        "DomainTarget",
    }


def test_names_that_replace_references_agree() -> None:
    # Functions get the machines' ARNs and the parameter's name as text, since a reference would be circular.
    machines = {
        "STATE_MACHINE_ARN": load_template()["Resources"]["TrackPredictionStateMachine"]["Properties"]["Name"],
        "SUBMITTED_STATE_MACHINE_ARN": load_template()["Resources"]["TrackSubmittedStateMachine"]["Properties"]["Name"],
        "PIPELINE_STATE_MACHINE_ARN": load_template()["Resources"]["RunPipelineStateMachine"]["Properties"]["Name"],
        "BATCH_STATE_MACHINE_ARN": load_template()["Resources"]["RunBatchStateMachine"]["Properties"]["Name"],
    }
    parameter = load_template()["Resources"]["ApiUrlParameter"]["Properties"]["Name"]
    prefix = "arn:${AWS::Partition}:states:${AWS::Region}:${AWS::AccountId}"
    seen = set()
    for name in FUNCTIONS:
        given = variables(name)
        for variable in machines.keys() & given.keys():
            assert given[variable] == {"Fn::Sub": f"{prefix}:stateMachine:{machines[variable]['Fn::Sub']}"}
            seen.add(variable)
        if "API_URL_PARAMETER" in given:
            assert given["API_URL_PARAMETER"] == parameter
            seen.add("parameter")
        for statement in statements(name):
            for resource in listed(statement["Resource"]):
                if "states:" in text(resource):
                    assert resource["Fn::Sub"] in {
                        arn
                        for machine in machines.values()
                        for arn in (
                            f"{prefix}:stateMachine:{machine['Fn::Sub']}",
                            f"{prefix}:execution:{machine['Fn::Sub']}:*",
                            f"{prefix}:mapRun:{machine['Fn::Sub']}/*",
                        )
                    }
                if ":ssm:" in text(resource):
                    assert resource["Fn::Sub"].endswith(f":parameter{parameter['Fn::Sub']}")
    assert seen == {*machines, "parameter"}
