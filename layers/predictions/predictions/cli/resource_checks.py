"""Checks of the stack's resources: each is deployed and configured as the template says.

Settings that somebody has changed by hand stay changed: CloudFormation compares a template with the one before, not
with the resource. So each action names the call that restores the setting.
"""

import json
import shlex
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from botocore.exceptions import ClientError

from predictions.aws.s3 import error_code
from predictions.cli.checks import Check, CheckFailed, CheckUnclear, Deployed, expect
from predictions.cli.dead_letters import QUEUES

_COMPLETE = frozenset({"CREATE_COMPLETE", "UPDATE_COMPLETE", "IMPORT_COMPLETE"})
_IN_PROGRESS = "_IN_PROGRESS"

# The days on which AWS ends the support of the runtimes that the template allows.
# https://docs.aws.amazon.com/lambda/latest/dg/lambda-runtimes.html
_SUPPORTED_UNTIL = {"python3.11": "2027-06-30", "python3.12": "2028-10-31", "python3.13": "2029-06-30"}

_INDEXES = ("by_owner", "by_upstream_id", "due")
_TTL_ATTRIBUTE = "expires_at"

# The stage's integrations end after 29 s unless this quota, in milliseconds, is higher.
# https://docs.aws.amazon.com/apigateway/latest/developerguide/api-gateway-execution-service-limits-table.html
_TIMEOUT_QUOTA = ("apigateway", "L-E5AE38E3")
# The wait, and the rest of the call: the mapping SyncWait of the template.
_INTEGRATION_MARGIN_SECONDS = 4
_CONCURRENCY_QUOTA = ("lambda", "L-B99A9384")
_CONCURRENCY_ASKED_FOR = 1000
# Of the account's concurrency, the part that queues and the stream may take: the rest is for webhooks, callers, the
# authorizer, the sweep and copies.
_QUEUES_SHARE = 0.5


def _aws(service: str, operation: str, *flags: str, **options: Any) -> str:
    """Write a call of the AWS CLI that can be pasted."""
    words = ["aws", service, operation]
    for name, value in options.items():
        text = value if isinstance(value, str) else json.dumps(value)
        words += [f"--{name.replace('_', '-')}", text]
    return shlex.join([*words, *(f"--{flag}" for flag in flags)])


class ResourceChecks:
    """The checks of everything that CloudFormation has deployed.

    Args:
        deployed: The stack.
        now: The time.
    """

    def __init__(self, deployed: Deployed, now: Callable[[], float]) -> None:
        self._deployed = deployed
        self._now = now

    def checks(self) -> Iterator[Check]:
        """List the checks, in the order in which a reader understands their failures."""
        yield Check("stack", self._stack)
        yield Check("functions", self._functions)
        yield Check("event-sources", self._event_sources)
        yield Check("sweep-schedule", self._sweep_schedule)
        yield Check("table", self._table_and_indexes)
        yield Check("table.recovery", self._recovery)
        yield Check("table.ttl", self._ttl)
        yield Check("table.stream", self._stream)
        yield Check("table.deletion-protection", self._deletion_protection)
        yield Check("table.encryption", self._table_encryption)
        for name, logical_id in (("outputs-bucket", "OutputsBucket"), ("inputs-bucket", "InputsBucket")):
            bucket = _Bucket(self._deployed, logical_id)
            yield Check(f"{name}.public-access", bucket.public_access)
            yield Check(f"{name}.ownership", bucket.ownership)
            yield Check(f"{name}.encryption", bucket.encryption)
            yield Check(f"{name}.tls", bucket.tls)
            yield Check(f"{name}.lifecycle", bucket.lifecycle)
            yield Check(f"{name}.cors", bucket.cors)
            yield Check(f"{name}.events", bucket.events)
        yield Check("dead-letters", self._dead_letters)
        yield Check("alarms.topic", self._topic)
        yield Check("alarms.actions", self._alarm_actions)
        yield Check("alarms.state", self._alarm_states)
        yield Check("quotas.concurrency", self._concurrency)
        yield Check("quotas.api-timeout", self._api_timeout)

    # -- stack and functions ------------------------------------------------------------------------------------------

    def _stack(self) -> str:
        status = self._deployed.status
        if status.endswith(_IN_PROGRESS):
            raise CheckUnclear(status, "CloudFormation is at work: run this command again when it has finished.")
        if status not in _COMPLETE:
            raise CheckFailed(
                status,
                f"The last deployment did not succeed. See why with"
                f" `{_aws('cloudformation', 'describe-stack-events', stack_name=self._deployed.stack.name)}`,"
                " fix it and deploy again.",
            )
        return f"{status}, {len(self._deployed.resources)} resources"

    def _functions(self) -> str:
        functions = self._deployed.ids("AWS::Lambda::Function")
        if not functions:
            raise CheckFailed("the stack has no functions", "Deploy it again, and check its name.")
        today = datetime.fromtimestamp(self._now(), UTC).strftime("%Y-%m-%d")
        runtimes: set[str] = set()
        broken: list[str] = []
        for logical_id, name in functions.items():
            found = self._deployed.client("lambda").get_function_configuration(FunctionName=name)
            runtimes.add(str(found.get("Runtime")))
            state, update = found.get("State", "Active"), found.get("LastUpdateStatus", "Successful")
            # A function that was not called for weeks is Inactive until its next call.
            # https://docs.aws.amazon.com/lambda/latest/dg/functions-states.html
            if state not in ("Active", "Inactive") or update != "Successful":
                why = found.get("StateReason") or found.get("LastUpdateStatusReason") or ""
                broken.append(f"{logical_id} is {state}, its last update {update} {why}".strip())
        if broken:
            raise CheckFailed("; ".join(broken), "Deploy again. If it stays so, read the reason in Lambda's console.")
        old = sorted(each for each in runtimes if today > _SUPPORTED_UNTIL.get(each, ""))
        if old:
            raise CheckFailed(
                f"AWS does not support {', '.join(old)} any more, or this version does not know it",
                "Build and deploy with a newer PythonRuntime: docs/deploy.md.",
            )
        return f"{len(functions)} active and updated, with {', '.join(sorted(runtimes))}"

    def _event_sources(self) -> str:
        mappings = self._mappings()
        stream = self._table.get("LatestStreamArn")
        for logical_id, found in mappings.items():
            state, source = str(found.get("State")), str(found.get("EventSourceArn", ""))
            if state in ("Creating", "Enabling", "Updating"):
                raise CheckUnclear(f"{logical_id} is {state}", "Run this command again in a minute.")
            if state != "Enabled":
                raise CheckFailed(
                    f"{logical_id} is {state} ({found.get('StateTransitionReason', 'without a reason')}):"
                    " its messages or changes wait",
                    _aws("lambda", "update-event-source-mapping", "enabled", uuid=found["UUID"]),
                )
            if ":dynamodb:" in source and source != stream:
                raise CheckFailed(
                    f"{logical_id} reads {source}, and the table's stream is {stream}",
                    "The stream was turned off and on: delete this event source and deploy the stack again.",
                )
        return f"{len(mappings)} enabled"

    def _mappings(self) -> dict[str, dict[str, Any]]:
        ids = self._deployed.ids("AWS::Lambda::EventSourceMapping")
        if not ids:
            raise CheckFailed("the stack has no event sources", "Deploy it again, and check its name.")
        lambda_ = self._deployed.client("lambda")
        return {name: lambda_.get_event_source_mapping(UUID=uuid) for name, uuid in ids.items()}

    def _sweep_schedule(self) -> str:
        name = self._deployed.id("SweepPredictionsFunctionEveryMinute")
        group = self._deployed.id("ScheduleGroup")
        found = self._deployed.client("scheduler").get_schedule(Name=name, GroupName=group)
        if found["State"] != "ENABLED":
            wanted = {key: found[key] for key in ("FlexibleTimeWindow", "Target")}
            action = _aws(
                "scheduler", "update-schedule", name=name, group_name=group, state="ENABLED",
                schedule_expression=found["ScheduleExpression"], flexible_time_window=wanted["FlexibleTimeWindow"],
                target=wanted["Target"],
            )  # fmt: skip
            raise CheckFailed(f"{found['State']}: nothing recovers stalled predictions", action)
        return f"{found['State']}, {found['ScheduleExpression']}"

    # -- table --------------------------------------------------------------------------------------------------------

    @cached_property
    def _table(self) -> dict[str, Any]:
        described = self._deployed.client("dynamodb").describe_table(TableName=self._table_name)
        return dict(described["Table"])

    @property
    def _table_name(self) -> str:
        return self._deployed.id("PredictionsTable")

    def _table_and_indexes(self) -> str:
        status = self._table["TableStatus"]
        if status not in ("ACTIVE", "UPDATING"):
            raise CheckFailed(f"the table is {status}", "See the events of the table in DynamoDB's console.")
        indexes = {
            each["IndexName"]: each.get("IndexStatus", "ACTIVE")
            for each in self._table.get("GlobalSecondaryIndexes", [])
        }
        wrong = [f"{name} {indexes.get(name, 'missing')}" for name in _INDEXES if indexes.get(name) != "ACTIVE"]
        if wrong:
            raise CheckFailed(
                f"indexes: {', '.join(wrong)}", "Wait until they are ACTIVE; a missing one needs a deployment."
            )
        return f"{self._table_name} is {status}, with {', '.join(_INDEXES)}"

    def _recovery(self) -> str:
        described = self._deployed.client("dynamodb").describe_continuous_backups(TableName=self._table_name)
        recovery = described["ContinuousBackupsDescription"].get("PointInTimeRecoveryDescription", {})
        return expect(
            recovery.get("PointInTimeRecoveryStatus"), "ENABLED", "point-in-time recovery",
            _aws(
                "dynamodb", "update-continuous-backups", table_name=self._table_name,
                point_in_time_recovery_specification={"PointInTimeRecoveryEnabled": True},
            ),
        )  # fmt: skip

    def _ttl(self) -> str:
        described = self._deployed.client("dynamodb").describe_time_to_live(TableName=self._table_name)
        found = described["TimeToLiveDescription"]
        status, attribute = found.get("TimeToLiveStatus"), found.get("AttributeName")
        if status == "ENABLING":
            raise CheckUnclear("expiry is ENABLING", "Run this command again in an hour.")
        return expect(
            f"{status} {attribute}" if status == "ENABLED" else status, f"ENABLED {_TTL_ATTRIBUTE}", "expiry of items",
            _aws(
                "dynamodb", "update-time-to-live", table_name=self._table_name,
                time_to_live_specification={"Enabled": True, "AttributeName": _TTL_ATTRIBUTE},
            ),
        )  # fmt: skip

    def _stream(self) -> str:
        wanted = {"StreamEnabled": True, "StreamViewType": "NEW_AND_OLD_IMAGES"}
        found = self._table.get("StreamSpecification") or {"StreamEnabled": False}
        if found != wanted:
            turn_on = _aws("dynamodb", "update-table", table_name=self._table_name, stream_specification=wanted)
            raise CheckFailed(
                f"stream: {json.dumps(found)}; webhooks, events and pipelines wait",
                f"{turn_on}; then see event-sources: the new stream has another ARN.",
            )
        return f"stream with {found['StreamViewType']}"

    def _deletion_protection(self) -> str:
        wanted = self._deployed.parameter("DeletionProtection") != "false"
        flag = "deletion-protection-enabled" if wanted else "no-deletion-protection-enabled"
        return expect(
            "on" if self._table.get("DeletionProtectionEnabled") else "off",
            "on" if wanted else "off",
            "deletion protection",
            _aws("dynamodb", "update-table", flag, table_name=self._table_name),
        )  # fmt: skip

    def _table_encryption(self) -> str:
        key = self._deployed.parameter("KmsKeyArn")
        specification = {"Enabled": True, "SSEType": "KMS"} | ({"KMSMasterKeyId": key} if key else {})
        action = _aws("dynamodb", "update-table", table_name=self._table_name, sse_specification=specification)
        found = self._table.get("SSEDescription")
        if not found or found.get("Status") not in ("ENABLED", "UPDATING"):
            raise CheckFailed("the table is encrypted with a key of DynamoDB's, not with one of this account", action)
        if key and found.get("KMSMasterKeyArn") != key:
            raise CheckFailed(f"the table is encrypted with {found.get('KMSMasterKeyArn')} instead of {key}", action)
        return f"encrypted with {found.get('KMSMasterKeyArn') or 'the key aws/dynamodb'}"

    # -- queues and alarms --------------------------------------------------------------------------------------------

    def _dead_letters(self) -> str:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        full: dict[str, int] = {}
        for queue, logical_id in QUEUES.items():
            url = self._deployed.id(logical_id)
            known = self._deployed.client("sqs").get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
            if count := sum(int(known[name]) for name in names):
                full[queue] = count
        if full:
            first, stack = next(iter(full)), self._deployed.stack.name
            raise CheckFailed(
                ", ".join(f"{count} in {queue}" for queue, count in full.items()),
                f"replicate-serverless dead-letters list {first} --stack {shlex.quote(stack)}",
            )
        return f"none in {len(QUEUES)} queues"

    def _topic(self) -> str:
        topic = self._deployed.parameter("AlarmTopicArn")
        if not topic:
            raise CheckUnclear(
                "AlarmTopicArn is empty: alarms are displayed, and nobody is notified",
                "Create an SNS topic with a subscription, and deploy with its ARN as AlarmTopicArn.",
            )
        pages = self._deployed.client("sns").get_paginator("list_subscriptions_by_topic")
        try:
            arns = [
                each["SubscriptionArn"] for page in pages.paginate(TopicArn=topic) for each in page["Subscriptions"]
            ]
        except ClientError as error:
            if error_code(error) not in ("NotFound", "NotFoundException"):
                raise
            raise CheckFailed(
                f"the topic {topic} does not exist", "Create it, or deploy with another AlarmTopicArn."
            ) from error
        # A subscription that its receiver has not confirmed has no ARN, but one of these words.
        # https://docs.aws.amazon.com/sns/latest/api/API_Subscription.html
        confirmed = [arn for arn in arns if arn.startswith("arn:")]
        if not confirmed:
            waiting = f", {len(arns)} wait for a confirmation" if arns else ""
            raise CheckFailed(
                f"the topic has no confirmed subscription{waiting}: nobody is notified",
                _aws("sns", "subscribe", topic_arn=topic, protocol="email", notification_endpoint="YOU@EXAMPLE.COM")
                + " and confirm it with the link in the e-mail.",
            )
        return f"{len(confirmed)} confirmed subscriptions"

    def _alarms(self) -> list[dict[str, Any]]:
        names = sorted(self._deployed.ids("AWS::CloudWatch::Alarm").values())
        if not names:
            raise CheckFailed("the stack has no alarms", "Deploy it again, and check its name.")
        cloudwatch = self._deployed.client("cloudwatch")
        found: list[dict[str, Any]] = []
        for start in range(0, len(names), 100):  # the most names of one call
            pages = cloudwatch.get_paginator("describe_alarms").paginate(AlarmNames=names[start : start + 100])
            found += [alarm for page in pages for alarm in page["MetricAlarms"]]
        if missing := set(names) - {alarm["AlarmName"] for alarm in found}:
            raise CheckFailed(
                f"alarms are missing: {', '.join(sorted(missing))}", "Restore them, or deploy a new stack."
            )
        return found

    def _alarm_actions(self) -> str:
        topic, alarms = self._deployed.parameter("AlarmTopicArn"), self._alarms()
        off = [alarm["AlarmName"] for alarm in alarms if not alarm.get("ActionsEnabled")]
        if off:
            raise CheckFailed(
                f"actions are disabled: {', '.join(off)}", _aws("cloudwatch", "enable-alarm-actions", alarm_names=off)
            )
        if not topic:
            return f"{len(alarms)} alarms without a topic"
        silent = [alarm["AlarmName"] for alarm in alarms if topic not in alarm.get("AlarmActions", [])]
        if silent:
            raise CheckFailed(
                f"{len(silent)} alarms do not notify the topic, such as {silent[0]}",
                "Restore their actions in CloudWatch's console: the topic, for the states ALARM and OK.",
            )
        return f"{len(alarms)} alarms notify the topic"

    def _alarm_states(self) -> str:
        alarms = self._alarms()
        ringing = [alarm for alarm in alarms if alarm["StateValue"] == "ALARM"]
        if ringing:
            names = {name: logical_id for logical_id, name in self._deployed.ids("AWS::CloudWatch::Alarm").items()}
            which = [names[alarm["AlarmName"]] for alarm in ringing]
            raise CheckFailed(
                f"in ALARM: {', '.join(which)}",
                f"docs/runbook.md#{which[0].lower()}. SweepStoppedAlarm may fire in a new stack's first ten minutes.",
            )  # fmt: skip
        return f"none of {len(alarms)} is in ALARM"

    # -- quotas -------------------------------------------------------------------------------------------------------

    def _concurrency(self) -> str:
        limit = self._deployed.client("lambda").get_account_settings()["AccountLimit"]
        total, free = int(limit["ConcurrentExecutions"]), int(limit["UnreservedConcurrentExecutions"])
        # A stream has one shard until it grows.
        queues = sum(
            int(each.get("ScalingConfig", {}).get("MaximumConcurrency", 1)) for each in self._mappings().values()
        )
        if free * _QUEUES_SHARE < queues:
            service, code = _CONCURRENCY_QUOTA
            raise CheckFailed(
                f"the account runs {total} functions at once, {free} of them unreserved, and queues may take {queues}:"
                " under load, webhooks and callers are throttled",
                _aws(
                    "service-quotas", "request-service-quota-increase", service_code=service, quota_code=code,
                    desired_value=str(_CONCURRENCY_ASKED_FOR),
                ),
            )  # fmt: skip
        return f"{total} functions at once, {free} unreserved; queues take {queues} at most"

    def _api_timeout(self) -> str:
        service, code = _TIMEOUT_QUOTA
        seconds = int(float(self._deployed.parameter("SyncWaitSeconds") or 25)) + _INTEGRATION_MARGIN_SECONDS
        quotas = self._deployed.client("service-quotas")
        try:
            quota = quotas.get_service_quota(ServiceCode=service, QuotaCode=code)["Quota"]
        except ClientError as error:
            if error_code(error) != "NoSuchResourceException":
                raise
            # A quota that was never raised may have its default only.
            # https://docs.aws.amazon.com/servicequotas/2019-06-24/apireference/API_GetServiceQuota.html
            quota = quotas.get_aws_default_service_quota(ServiceCode=service, QuotaCode=code)["Quota"]
        allowed = float(quota["Value"]) / 1000
        if allowed < seconds:
            raise CheckFailed(
                f"API Gateway ends a call after {allowed:g} s, and SyncWaitSeconds needs {seconds} s",
                _aws(
                    "service-quotas", "request-service-quota-increase", service_code=service, quota_code=code,
                    desired_value=str(seconds * 1000),
                ) + "; until then deploy with SyncWaitSeconds=25.",
            )  # fmt: skip
        return f"API Gateway allows {allowed:g} s, SyncWaitSeconds needs {seconds} s"


class _Bucket:
    """The checks of a bucket."""

    def __init__(self, deployed: Deployed, logical_id: str) -> None:
        self._deployed = deployed
        self._logical_id = logical_id

    @property
    def _name(self) -> str:
        return self._deployed.id(self._logical_id)

    @property
    def _s3(self) -> Any:
        return self._deployed.client("s3")

    def _read(self, operation: str, missing: str) -> dict[str, Any]:
        """Read a part of the configuration; return `{}` if the bucket has none."""
        try:
            return dict(getattr(self._s3, operation)(Bucket=self._name))
        except ClientError as error:
            if error_code(error) != missing:
                raise
            return {}

    def public_access(self) -> str:
        """Check that all public access is blocked."""
        found = self._read("get_public_access_block", "NoSuchPublicAccessBlockConfiguration")
        wanted = dict.fromkeys(
            ("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"), True
        )
        blocks = found.get("PublicAccessBlockConfiguration", {})
        off = [name for name in wanted if not blocks.get(name)]
        if off:
            raise CheckFailed(
                f"public access is not blocked: {', '.join(off)} off",
                _aws("s3api", "put-public-access-block", bucket=self._name, public_access_block_configuration=wanted),
            )
        return "all public access is blocked"

    def ownership(self) -> str:
        """Check that the bucket's owner owns every object, and access control lists are off."""
        found = self._read("get_bucket_ownership_controls", "OwnershipControlsNotFoundError")
        rules = {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
        owners = [str(rule["ObjectOwnership"]) for rule in found.get("OwnershipControls", {}).get("Rules", [])]
        return expect(
            ", ".join(owners) or "not set", "BucketOwnerEnforced", "ownership",
            _aws("s3api", "put-bucket-ownership-controls", bucket=self._name, ownership_controls=rules),
        )  # fmt: skip

    def encryption(self) -> str:
        """Check the default encryption: S3's key, or the customer's."""
        key = self._deployed.parameter("KmsKeyArn")
        by_default = {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key} if key else {"SSEAlgorithm": "AES256"}
        rule: dict[str, Any] = {"ApplyServerSideEncryptionByDefault": by_default} | (
            {"BucketKeyEnabled": True} if key else {}
        )
        found = self._read("get_bucket_encryption", "ServerSideEncryptionConfigurationNotFoundError")
        rules = found.get("ServerSideEncryptionConfiguration", {}).get("Rules", [])
        defaults = [each.get("ApplyServerSideEncryptionByDefault", {}) for each in rules]
        shown = [f"{each.get('SSEAlgorithm')} {each.get('KMSMasterKeyID', '')}".strip() for each in defaults]
        return expect(
            ", ".join(shown) or "not set", f"aws:kms {key}" if key else "AES256", "encryption",
            _aws(
                "s3api", "put-bucket-encryption", bucket=self._name,
                server_side_encryption_configuration={"Rules": [rule]},
            ),
        )  # fmt: skip

    def tls(self) -> str:
        """Check that the policy refuses requests without TLS."""
        text = self._read("get_bucket_policy", "NoSuchBucketPolicy").get("Policy", "{}")
        statements = json.loads(text).get("Statement", [])
        if not any(each.get("Sid") == "TlsOnly" and each.get("Effect") == "Deny" for each in statements):
            raise CheckFailed(
                "the bucket's policy has no statement TlsOnly",
                f"Restore the statement of {self._logical_id}Policy in template.yaml with aws s3api put-bucket-policy.",
            )
        return "requests without TLS are refused"

    def lifecycle(self) -> str:
        """Check the days after which objects expire, and that incomplete uploads are removed."""
        days = {key: self._deployed.parameter(key) for key in ("RetentionDays", "FileRetentionDays")}
        abort = {
            "ID": "abort-incomplete-uploads", "Status": "Enabled", "Filter": {"Prefix": ""},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1},
        }  # fmt: skip
        if self._logical_id == "OutputsBucket":
            wanted = [_expiry("expire-results", "", days["RetentionDays"]), abort]
        else:
            wanted = [
                _expiry("expire-inputs", "", days["RetentionDays"]),
                _expiry("expire-files", "files/", days["FileRetentionDays"]),
                abort,
            ]
        found = self._read("get_bucket_lifecycle_configuration", "NoSuchLifecycleConfiguration").get("Rules", [])
        seen = {rule.get("ID"): _essence(rule) for rule in found}
        wrong = [str(rule["ID"]) for rule in wanted if seen.get(rule["ID"]) != _essence(rule)]
        if wrong:
            raise CheckFailed(
                f"lifecycle rules missing, disabled or changed: {', '.join(wrong)}",
                _aws(
                    "s3api", "put-bucket-lifecycle-configuration", bucket=self._name,
                    lifecycle_configuration={"Rules": wanted},
                ),
            )  # fmt: skip
        return f"objects expire after {days['RetentionDays']} days"

    def cors(self) -> str:
        """Check that browsers of any origin may use signed URLs, as the console does."""
        methods = ["GET", "HEAD"] if self._logical_id == "OutputsBucket" else ["GET", "HEAD", "PUT"]
        rules = self._read("get_bucket_cors", "NoSuchCORSConfiguration").get("CORSRules", [])
        seen = "; ".join(
            " ".join([*rule.get("AllowedOrigins", []), *sorted(rule.get("AllowedMethods", []))]) for rule in rules
        )
        rule = {"AllowedOrigins": ["*"], "AllowedMethods": methods, "AllowedHeaders": ["*"], "MaxAgeSeconds": 600}
        return expect(
            seen or "off", " ".join(["*", *methods]), "CORS",
            _aws("s3api", "put-bucket-cors", bucket=self._name, cors_configuration={"CORSRules": [rule]}),
        )  # fmt: skip

    def events(self) -> str:
        """Check that the inputs bucket, and not the outputs bucket, sends its events to EventBridge."""
        found = "EventBridgeConfiguration" in self._read("get_bucket_notification_configuration", "")
        if self._logical_id == "OutputsBucket":
            if found:
                raise CheckFailed(
                    "the outputs bucket sends events to EventBridge, so results can start recipes",
                    _aws(
                        "s3api",
                        "put-bucket-notification-configuration",
                        bucket=self._name,
                        notification_configuration={},
                    ),
                )
            return "sends no events"
        return expect(
            "on" if found else "off", "on", "sending events to EventBridge",
            _aws(
                "s3api", "put-bucket-notification-configuration", bucket=self._name,
                notification_configuration={"EventBridgeConfiguration": {}},
            ),
        )  # fmt: skip


def _expiry(name: str, prefix: str, days: str) -> dict[str, Any]:
    return {"ID": name, "Status": "Enabled", "Filter": {"Prefix": prefix}, "Expiration": {"Days": int(days or 0)}}


def _essence(rule: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a lifecycle rule does. S3 shows a rule without a filter with an empty prefix, or with none."""
    prefix = rule.get("Filter", {}).get("Prefix") or rule.get("Prefix") or ""
    aborted = rule.get("AbortIncompleteMultipartUpload", {}).get("DaysAfterInitiation")
    return rule.get("Status"), prefix, rule.get("Expiration", {}).get("Days"), aborted
