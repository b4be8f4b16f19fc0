"""The state machine `track_prediction` as releases had it that woke each execution by success."""

import copy
from collections.abc import Mapping
from typing import Any


def older(definition: Mapping[str, Any]) -> dict[str, Any]:
    """A definition whose executions ask nobody which of them tracks the prediction, and copy however they are woken."""
    machine: dict[str, Any] = copy.deepcopy(dict(definition))
    for name in ("AwaitWebhook", "AwaitWebhookAgain"):
        state = machine["States"][name]
        arguments = state["Arguments"]
        arguments["UpdateExpression"] = "SET task_token = :task_token, next_check_at = :next_check_at"
        arguments["ConditionExpression"] = "attribute_exists(pk) AND #rank < :terminal"
        for value in (":wake", ":execution"):
            del arguments["ExpressionAttributeValues"][value]
        state["Catch"][0]["ErrorEquals"].remove("OutputsToCopy")
        del state["End"]
        state["Next"] = "CopyOutputs"
    return machine
