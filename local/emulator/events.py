"""EventBridge's buses and schedules.

A template gets a schedule under a name that is taken, and does not notice that the schedule stays another's. A bus is
deleted together with its rules. AWS refuses both.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

from ministack.core.responses import error_response_json
from ministack.services import eventbridge, scheduler
from ministack.services.cloudformation import provisioners


def unless_taken(create: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a template's schedule whose name is taken in its group.

    https://docs.aws.amazon.com/scheduler/latest/APIReference/API_CreateSchedule.html (ConflictException)
    """

    @functools.wraps(create)
    def run(logical_id: str, properties: dict[str, Any], stack_name: str) -> Any:
        name = properties.get("Name") or provisioners._physical_name(stack_name, logical_id, max_len=64)
        group = properties.get("GroupName", "default")
        if f"{group}/{name}" in scheduler._schedules:
            raise ValueError(f"Schedule {name} already exists in group {group}. (HandlerErrorCode: AlreadyExists)")
        return create(logical_id, properties, stack_name)

    return run


def unless_it_has_rules(delete: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse to delete a bus that has rules.

    https://docs.aws.amazon.com/eventbridge/latest/APIReference/API_DeleteEventBus.html
    The message: https://github.com/hashicorp/terraform-provider-aws/issues/22131
    """

    @functools.wraps(delete)
    def run(request: dict[str, Any]) -> Any:
        if any(rule.get("EventBusName") == request.get("Name") for rule in eventbridge._rules.values()):
            return error_response_json("ValidationException", "EventBus can't be deleted since it has rules.", 400)
        return delete(request)

    return run


def or_fail(delete: Callable[..., Any]) -> Callable[..., Any]:
    """Fail the deletion of a stack whose bus cannot be deleted."""

    @functools.wraps(delete)
    def run(physical_id: str, properties: Any) -> None:
        delete(physical_id, properties)
        if physical_id != "default" and physical_id in eventbridge._event_buses:
            _, _, body = eventbridge._delete_event_bus({"Name": physical_id})
            raise ValueError(json.loads(body)["message"])

    return run


def patch() -> None:
    """Change the emulator."""
    eventbridge._delete_event_bus = unless_it_has_rules(eventbridge._delete_event_bus)
    handlers = provisioners._RESOURCE_HANDLERS
    buses, schedules = handlers["AWS::Events::EventBus"], handlers["AWS::Scheduler::Schedule"]
    buses["delete"] = or_fail(buses["delete"])
    schedules["create"] = provisioners._scheduler_schedule_create = unless_taken(schedules["create"])
