"""Task tokens: resume the callers' state machines that wait for a prediction.

https://docs.aws.amazon.com/step-functions/latest/dg/connect-to-resource.html#connect-wait-token
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from botocore.exceptions import ClientError

from predictions.aws.clients import client
from predictions.observability import logger

# https://docs.aws.amazon.com/step-functions/latest/apireference/API_SendTaskFailure.html
_CAUSE_LIMIT = 32768


# The state timed out, was completed already (these calls may come twice), or the token is invalid: a retry changes
# nothing, and a strange token must not hold up what comes after it.
_GONE = frozenset({"TaskTimedOut", "TaskDoesNotExist", "InvalidToken", "ValidationException"})

# Step Functions has no error of its own for a token of another account: only principals of the same account may send
# one, so it is IAM that refuses it, in the words in which it refuses a right that this function lacks. What differs is
# the account of the state machine that the message names.
_DENIED = "AccessDeniedException"
_CALLING_ACCOUNT = re.compile(r"arn:[a-z-]+:(?:sts|iam)::([0-9]{12}):")
_ACCOUNT_OF_MACHINE = re.compile(r"on resource: arn:[a-z-]+:states:[a-z0-9-]*:([0-9]{12}):")


def tell_success(task_token: str, result: Mapping[str, Any]) -> None:
    """Complete a waiting state with a result; ignore one that no longer waits.

    An `output` that Step Functions do not accept, such as one nested deeper than they read, is left out.

    Raises:
        ClientError: Step Functions refused the call, and may accept it later: it was throttled, or this function
            lacks the right to send it.
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
    """Fail a waiting state with an error catchable error; ignore one that no longer waits.

    Raises:
        ClientError: As for `tell_success`.
    """
    stepfunctions = client("stepfunctions")
    try:
        stepfunctions.send_task_failure(taskToken=task_token, error=error, cause=cause[:_CAUSE_LIMIT])
    except ClientError as refused:
        _pass_over(refused)


def _pass_over(error: ClientError) -> None:
    code = error.response["Error"]["Code"]
    if code not in _GONE and not (code == _DENIED and _is_of_another_account(error)):
        raise error
    logger.info("no state waits with this token", reason=code)


def _is_of_another_account(error: ClientError) -> bool:
    message = error.response["Error"].get("Message", "")
    ours, theirs = _CALLING_ACCOUNT.search(message), _ACCOUNT_OF_MACHINE.search(message)
    return bool(ours and theirs and ours[1] != theirs[1])
