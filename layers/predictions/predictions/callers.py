"""State machines of others that wait, with a task token, for what they asked this stack for.

https://docs.aws.amazon.com/step-functions/latest/dg/connect-to-resource.html#connect-wait-token
"""

import json
from collections.abc import Mapping
from typing import Any

from botocore.exceptions import ClientError

from predictions.aws import client
from predictions.observability import logger

# https://docs.aws.amazon.com/step-functions/latest/apireference/API_SendTaskFailure.html
_CAUSE_LIMIT = 32768


# It timed out, was told already (these calls may come twice), or the token never was one of this account: nothing that
# another try mends, and a strange token must not hold up what comes after it.
_GONE = frozenset({"TaskTimedOut", "TaskDoesNotExist", "InvalidToken", "AccessDeniedException", "ValidationException"})


def tell_success(task_token: str, result: Mapping[str, Any]) -> None:
    """Lets a state go on with a result; one that no longer waits is no error.

    An `output` that Step Functions do not take, such as one nested deeper than they read, is left out.
    """
    stepfunctions = client("stepfunctions")
    try:
        stepfunctions.send_task_success(taskToken=task_token, output=json.dumps(result, separators=(",", ":")))
    except stepfunctions.exceptions.InvalidOutput:
        if "output" not in result:
            raise
        rest = {name: value for name, value in result.items() if name != "output"}
        tell_success(task_token, rest | {"output_truncated": True})
    except ClientError as error:
        _pass_over(error)


def tell_failure(task_token: str, error: str, cause: str) -> None:
    """Fails a state with a name that it can catch; one that no longer waits is no error."""
    stepfunctions = client("stepfunctions")
    try:
        stepfunctions.send_task_failure(taskToken=task_token, error=error, cause=cause[:_CAUSE_LIMIT])
    except ClientError as refused:
        _pass_over(refused)


def _pass_over(error: ClientError) -> None:
    code = error.response["Error"]["Code"]
    if code not in _GONE:
        raise error
    logger.info("nobody waits with this token", reason=code)
