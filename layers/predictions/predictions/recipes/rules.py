"""Rules of EventBridge and schedules of EventBridge Scheduler that start recipes.

Each has the requests queue as its target, and a message that names the recipe and has the event. All matching is
done by EventBridge. A recipe has at most one of them, always of the same name, `{name_prefix}{recipe id}`, so that
putting it twice has no further effect, and functions and queue can be limited to these.
"""

import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import client
from predictions.errors import PredictionsError
from predictions.ids import is_id
from predictions.observability import logger
from predictions.recipes.store import Recipe

if TYPE_CHECKING:
    from mypy_boto3_events import EventBridgeClient
    from mypy_boto3_scheduler import EventBridgeSchedulerClient

_TARGET = "requests-queue"
_NAME_LIMIT_CHARACTERS = 64
# Placeholders that EventBridge Scheduler fills: https://docs.aws.amazon.com/scheduler/latest/UserGuide/managing-schedule-context-attributes.html
_SCHEDULED_EVENT = {
    "id": "<aws.scheduler.execution-id>",
    "source": "aws.scheduler",
    "detail-type": "Scheduled Event",
    "time": "<aws.scheduler.scheduled-time>",
}
_RETRY: Any = {"MaximumRetryAttempts": 185, "MaximumEventAgeInSeconds": 86400}
# CloudFormation has just made the role, and IAM needs seconds until Scheduler may assume it: the refusal of such a role
# names that action (https://github.com/aws/aws-sdk-js-v3/issues/6494, and for the delay
# https://docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot.html#troubleshoot_general_eventual-consistency).
_ROLE_UNKNOWN = "assume the role"
# A recipe that is refused puts its earlier schedule again: both fit into the 29 s of a request.
_WAITS_SECONDS = (1, 2, 4)
_SHOWN_RULES = 20
_REFUSALS = {
    "InvalidEventPatternException",
    "ValidationException",
    "LimitExceededException",
    "ServiceQuotaExceededException",
}


class RuleRefused(PredictionsError):
    """EventBridge rejects a pattern or schedule, or its limit is reached; the error's text is EventBridge's reason."""


class RecipeRules:
    """The rules and schedules of this stack's recipes.

    Args:
        name_prefix: The prefix of all their names.
        bus_name: The stack's bus.
        schedule_group: The stack's group of schedules.
        scheduler_role_arn: The role with which schedules send.
        queue_arn: The requests queue.
        dead_letter_queue_arn: The queue for messages that could not be sent there.
        buckets: Names of the buckets by their names in recipes, `inputs` and `source`.
        sleep: Waits some seconds.
    """

    def __init__(
        self,
        *,
        name_prefix: str,
        bus_name: str,
        schedule_group: str,
        scheduler_role_arn: str,
        queue_arn: str,
        dead_letter_queue_arn: str,
        buckets: dict[str, str],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._name_prefix = name_prefix
        self._buses = {"default": "default", "stack": bus_name}
        self._schedule_group = schedule_group
        self._scheduler_role_arn = scheduler_role_arn
        self._queue_arn = queue_arn
        self._dead_letter_queue_arn = dead_letter_queue_arn
        self._buckets = buckets
        self._sleep = sleep

    @classmethod
    def from_env(cls, *, sleep: Callable[[float], None] = time.sleep) -> "RecipeRules":
        """Build from the environment of manage_recipes and deploy_recipes."""
        return cls(
            name_prefix=os.environ["RECIPE_NAME_PREFIX"],
            bus_name=os.environ["EVENT_BUS_NAME"],
            schedule_group=os.environ["SCHEDULE_GROUP_NAME"],
            scheduler_role_arn=os.environ["SCHEDULER_ROLE_ARN"],
            queue_arn=os.environ["REQUESTS_QUEUE_ARN"],
            dead_letter_queue_arn=os.environ["REQUESTS_DEAD_LETTER_QUEUE_ARN"],
            buckets={"inputs": os.environ["INPUTS_BUCKET_NAME"], "source": os.environ["SOURCE_BUCKET_NAME"]},
            sleep=sleep,
        )

    def put(self, recipe: Recipe) -> None:
        """Create or update the rule or schedule of a recipe; then remove the previous one.

        Idempotent. If the function crashes in between, both exist for a while: intake drops messages of the old one.

        Raises:
            RuleRefused: EventBridge rejects it; the previous one stays.
        """
        name = self._name(recipe)
        if len(name) > _NAME_LIMIT_CHARACTERS and recipe.kind:
            limit = _NAME_LIMIT_CHARACTERS - len(name) + len(self._name_prefix) - len("-recipe-")
            raise RuleRefused(f"The stack's name is too long for rules: it must have at most {limit} characters.")
        bus = self._bus(recipe)
        try:
            if bus is not None:
                self._put_rule(name, bus, recipe)
            elif recipe.kind == "schedule":
                self._put_schedule_of_new_role(name, recipe)
        except ClientError as error:
            if error.response["Error"]["Code"] not in _REFUSALS:
                raise
            raise RuleRefused(error.response["Error"]["Message"]) from None
        self._remove_others(name, keep_bus=bus, keep_schedule=recipe.kind == "schedule")

    def withdraw(self, recipe: Recipe) -> None:
        """Remove the rule or schedule of a recipe. Idempotent."""
        self._remove_others(self._name(recipe), keep_bus=None, keep_schedule=False)

    def withdraw_all(self) -> None:
        """Remove the rules of all recipes before the stack is deleted.

        Its schedules are deleted with their group. An error with one rule is logged and does not stop the others. What
        is left is tried again for some seconds: a bus with a rule cannot be deleted. Rules of others are not touched,
        and only logged.
        """
        for seconds in (*_WAITS_SECONDS, None):
            left = self._withdraw_all_once()
            if not left or seconds is None:
                break
            self._sleep(seconds)
        bus = self._buses["stack"]
        try:
            others = self._rules_on(bus)
        except (BotoCoreError, ClientError):
            logger.exception("rules not listed", bus=bus)
            return
        if others:
            # https://docs.aws.amazon.com/eventbridge/latest/APIReference/API_DeleteEventBus.html
            logger.warning("rules keep the bus from being deleted", bus=bus, rules=others[:_SHOWN_RULES])

    def _rules_on(self, bus: str, prefix: str | None = None) -> list[str]:
        asked: dict[str, Any] = {"EventBusName": bus} | ({"NamePrefix": prefix} if prefix else {})
        pages = self._events.get_paginator("list_rules").paginate(**asked)
        return [rule["Name"] for page in pages for rule in page["Rules"]]

    def _withdraw_all_once(self) -> bool:
        """Remove the rules of all recipes, and return whether any may be left."""
        left = False
        for bus in self._buses.values():
            try:
                found = self._rules_on(bus, self._name_prefix)
            except (BotoCoreError, ClientError):
                logger.exception("rules not listed", bus=bus)
                left = True
                continue
            for name in found:
                # A stack `a-recipe-b` has rules with the same name prefix as a stack `a`.
                if not is_id(name.removeprefix(self._name_prefix)):
                    continue
                try:
                    self._remove_rule(name, bus)
                except (BotoCoreError, ClientError):
                    logger.exception("rule not removed", rule=name, bus=bus)
                    left = True
        return left

    def pattern(self, recipe: Recipe) -> dict[str, Any]:
        """Return the event pattern of a recipe for objects or events."""
        if recipe.kind == "pattern":
            pattern: dict[str, Any] = recipe.definition["pattern"]
            return pattern
        asked: dict[str, Any] = recipe.definition["s3"]
        prefix, suffix = asked["prefix"], asked.get("suffix")
        key: list[Any] = [{"wildcard": f"{_escaped(prefix)}*{_escaped(suffix)}"}] if suffix else [{"prefix": prefix}]
        bounds: list[Any] = [">=", asked["min_bytes"]] if "min_bytes" in asked else []
        bounds += ["<=", asked["max_bytes"]] if "max_bytes" in asked else []
        matched: dict[str, Any] = {"key": key} if prefix or suffix else {}
        if bounds:
            matched["size"] = [{"numeric": bounds}]
        detail: dict[str, Any] = {"bucket": {"name": [self._buckets[asked.get("bucket", "inputs")]]}}
        if matched:
            detail["object"] = matched
        return {"source": ["aws.s3"], "detail-type": ["Object Created"], "detail": detail}

    def _name(self, recipe: Recipe) -> str:
        return f"{self._name_prefix}{recipe.id}"

    def _bus(self, recipe: Recipe) -> str | None:
        if recipe.kind == "s3":
            return self._buses["default"]  # the only bus that receives S3's events
        return self._buses[recipe.definition.get("bus", "default")] if recipe.kind == "pattern" else None

    def _put_rule(self, name: str, bus: str, recipe: Recipe) -> None:
        pattern = json.dumps(self.pattern(recipe), separators=(",", ":"))
        # Without its target it has no effect.
        self._events.put_rule(Name=name, EventBusName=bus, EventPattern=pattern, State="ENABLED")
        answer = self._events.put_targets(
            Rule=name,
            EventBusName=bus,
            Targets=[
                {
                    "Id": _TARGET,
                    "Arn": self._queue_arn,
                    "InputTransformer": {
                        "InputTemplate": f'{{"recipe_id": "{recipe.id}", "event": <aws.events.event.json>}}'
                    },
                    # SQS prefers the messages of owners whose messages do not occupy the consumers (fair queues). Not
                    # for schedules, whose reference has it for FIFO queues only.
                    # https://docs.aws.amazon.com/eventbridge/latest/APIReference/API_SqsParameters.html
                    "SqsParameters": {"MessageGroupId": recipe.owner},
                    "DeadLetterConfig": {"Arn": self._dead_letter_queue_arn},
                    "RetryPolicy": _RETRY,
                }
            ],
        )
        if answer["FailedEntryCount"]:
            raise RuleRefused(
                f"EventBridge rejected the rule's target: {answer['FailedEntries'][0].get('ErrorMessage', '')}"
            )

    def _put_schedule_of_new_role(self, name: str, recipe: Recipe) -> None:
        """Put a schedule, again for some seconds while Scheduler may not assume its role yet."""
        for seconds in _WAITS_SECONDS:
            try:
                return self._put_schedule(name, recipe)
            except ClientError as error:
                if _ROLE_UNKNOWN not in error.response["Error"].get("Message", ""):
                    raise
                logger.info("the schedules' role is not known yet", seconds=seconds)
                self._sleep(seconds)
        return self._put_schedule(name, recipe)

    def _put_schedule(self, name: str, recipe: Recipe) -> None:
        schedule = recipe.definition["schedule"]
        described: dict[str, Any] = {
            "Name": name,
            "GroupName": self._schedule_group,
            "ScheduleExpression": schedule["expression"],
            "ScheduleExpressionTimezone": schedule.get("time_zone", "UTC"),
            "FlexibleTimeWindow": {"Mode": "OFF"},
            "Target": {
                "Arn": self._queue_arn,
                "RoleArn": self._scheduler_role_arn,
                "Input": json.dumps({"recipe_id": recipe.id, "event": _SCHEDULED_EVENT}),
                "DeadLetterConfig": {"Arn": self._dead_letter_queue_arn},
                "RetryPolicy": _RETRY,
            },
        }
        try:
            self._scheduler.update_schedule(**described)
        except self._scheduler.exceptions.ResourceNotFoundException:
            try:
                self._scheduler.create_schedule(**described)
            except self._scheduler.exceptions.ConflictException:
                # Created by a concurrent call, or by this very one, whose response was lost.
                self._scheduler.update_schedule(**described)

    def _remove_others(self, name: str, *, keep_bus: str | None, keep_schedule: bool) -> None:
        for bus in set(self._buses.values()) - {keep_bus}:
            self._remove_rule(name, bus)
        if not keep_schedule:
            try:
                self._scheduler.delete_schedule(Name=name, GroupName=self._schedule_group)
            except self._scheduler.exceptions.ResourceNotFoundException:
                return

    def _remove_rule(self, name: str, bus: str) -> None:
        try:
            # A rule with targets cannot be deleted.
            self._events.remove_targets(Rule=name, EventBusName=bus, Ids=[_TARGET])
            self._events.delete_rule(Name=name, EventBusName=bus)
        except self._events.exceptions.ResourceNotFoundException:
            return

    @property
    def _events(self) -> "EventBridgeClient":
        return client("events")

    @property
    def _scheduler(self) -> "EventBridgeSchedulerClient":
        return client("scheduler")


def _escaped(text: str) -> str:
    """Return a text with the special characters of wildcard patterns escaped.

    https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-create-pattern-operators.html#eb-filtering-wildcard-matching-escape
    """
    return text.replace("\\", "\\\\").replace("*", "\\*")
