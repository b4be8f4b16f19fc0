"""State machines of others that wait, with a task token, for what they asked this stack for.

https://docs.aws.amazon.com/step-functions/latest/dg/connect-to-resource.html#connect-wait-token
"""

import json
from collections.abc import Mapping
from typing import Any

from predictions.aws import client

# https://docs.aws.amazon.com/step-functions/latest/apireference/API_SendTaskFailure.html
_CAUSE_LIMIT = 32768


def tell_success(task_token: str, result: Mapping[str, Any]) -> bool:
    """Lets a state go on with a result; False where it no longer waits, which is no error."""
    stepfunctions = client("stepfunctions")
    try:
        stepfunctions.send_task_success(taskToken=task_token, output=json.dumps(result, separators=(",", ":")))
    except _gone():
        return False
    return True


def tell_failure(task_token: str, error: str, cause: str) -> bool:
    """Fails a state with a name that it can catch; False where it no longer waits, which is no error."""
    stepfunctions = client("stepfunctions")
    try:
        stepfunctions.send_task_failure(taskToken=task_token, error=error, cause=cause[:_CAUSE_LIMIT])
    except _gone():
        return False
    return True


def _gone() -> tuple[type[Exception], ...]:
    """It timed out, was told already (this call may come twice), or the token never was one."""
    exceptions = client("stepfunctions").exceptions
    return (exceptions.TaskTimedOut, exceptions.TaskDoesNotExist, exceptions.InvalidToken)
