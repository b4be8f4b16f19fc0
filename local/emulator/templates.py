"""Resources of templates.

A template with an alarm of metric math is rejected: here such an alarm exists, and watches the first of its metrics.

The emulator derives the name of a resource from its stack's name and its own. So a stack of the same name, in another
region or after a deletion that kept a table, would meet the resources of the first. AWS draws a part of each name.

A log group whose name is taken is replaced by a new one. AWS refuses it.

A deleted stack is forgotten when there is another one of its name. AWS lists it for 90 days, with its events.
"""

import functools
import uuid
from collections.abc import Callable
from typing import Any

from ministack.core.responses import AccountRegionScopedDict
from ministack.services import cloudformation, cloudwatch_logs
from ministack.services.cloudformation import provisioners, stacks


class Stacks(AccountRegionScopedDict):  # type: ignore[misc] # has no types
    """All stacks by name; an earlier one of a name by its id.

    https://docs.aws.amazon.com/AWSCloudFormation/latest/APIReference/API_ListStacks.html
    """

    __slots__ = ()

    def __setitem__(self, name: str, stack: dict[str, Any]) -> None:
        """Store a stack, and keep an earlier one of that name."""
        before = self.get(name)
        if before and before["StackId"] != stack["StackId"]:
            super().__setitem__(before["StackId"], before)
        super().__setitem__(name, stack)


def of_one_metric(record: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Treat an alarm of metric math as one of the first metric that it reads."""

    @functools.wraps(record)
    def make(name: str, properties: dict[str, Any]) -> dict[str, Any]:
        read = [each["MetricStat"] for each in properties.get("Metrics", []) if "MetricStat" in each]
        if not read:
            return record(name, properties)
        others = {key: value for key, value in properties.items() if key != "Metrics"}
        return record(name, others | read[0]["Metric"] | {"Period": read[0]["Period"], "Statistic": read[0]["Stat"]})

    return make


def with_drawn_name(*of_the_resource: Any) -> tuple[Any, str]:
    """Create a resource, and return what its name was drawn with, by which it keeps the name in updates.

    https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/resources-section-structure.html (Physical ID)
    """
    before = provisioners._NAME_SEED.set(uuid.uuid4().hex)
    try:
        return stacks._provision_resource(*of_the_resource), provisioners._NAME_SEED.get()
    finally:
        provisioners._NAME_SEED.reset(before)


def with_free_name(create: Callable[..., Any]) -> Callable[..., Any]:
    """Create a log group under a name of its own, or the one that is asked for if that is free.

    https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_CreateLogGroup.html
    """

    @functools.wraps(create)
    def run(logical_id: str, properties: dict[str, Any], stack_name: str) -> Any:
        name = properties.get("LogGroupName") or provisioners._physical_name(stack_name, logical_id)
        if name in cloudwatch_logs._log_groups:
            raise ValueError(f"Resource of type 'AWS::Logs::LogGroup' with identifier '{name}' already exists.")
        return create(logical_id, {**properties, "LogGroupName": name}, stack_name)

    return run


def with_kept_name(update: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the name of a log group that the template gives none."""

    @functools.wraps(update)
    def run(physical_id: str, old: dict[str, Any], new: dict[str, Any], *others: Any, **options: Any) -> Any:
        named = {} if "LogGroupName" in old | new else {"LogGroupName": physical_id}
        return update(physical_id, old | named, new | named, *others, **options)

    return run


def patch() -> None:
    """Change the emulator."""
    cloudformation._stacks = Stacks()
    stacks._provision_keeping_seed = with_drawn_name
    groups = provisioners._RESOURCE_HANDLERS["AWS::Logs::LogGroup"]
    groups["create"] = with_free_name(groups["create"])
    groups["update"] = with_kept_name(groups["update"])
    provisioners._cw_metric_alarm_record = of_one_metric(provisioners._cw_metric_alarm_record)
