"""The deployed recipes as a custom resource: what CloudFormation asks for, and the response it waits for."""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import httpx

from predictions.errors import PredictionsError
from predictions.observability import logger
from predictions.recipes.deployment import DeployedRecipes, DeploymentRefused

_RESPONSE_SECONDS = 10
_RESPONSE_ATTEMPTS = 3
_REASON_LIMIT_BYTES = 1500
"""The response may have 4096 bytes, and quotation marks take two.
https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/crpg-ref-responses.html"""


class NotAnswered(PredictionsError):
    """CloudFormation did not take the response. Lambda runs the function again, which does no harm."""


def follow(
    event: dict[str, Any],
    deployed: DeployedRecipes,
    read_files: Callable[[], Mapping[str, bytes]],
    seconds_left: Callable[[], float],
) -> str | None:
    """Do what CloudFormation asks for.

    Args:
        event: `{"RequestType": "Create" | "Update" | "Delete", "StackId", "ResourceProperties": {"Files", …}, …}`.
        deployed: The recipes of the deployment.
        read_files: Reads this function's recipe files.
        seconds_left: How long it may still take.

    Returns:
        Why it failed, or None.
    """
    reason = None
    try:
        _follow(event, deployed, read_files, seconds_left)
    except DeploymentRefused as refused:
        logger.warning("recipes refused", reason=str(refused))
        reason = str(refused)
    except Exception as error:  # noqa: BLE001  # CloudFormation would wait for a response, and then not know why
        logger.exception("recipes not deployed")
        reason = f"The recipes were not deployed ({type(error).__name__}: {error}): see the log."
    return None if event["RequestType"] == "Delete" else reason  # a stack that is to go is never held


def _follow(
    event: dict[str, Any],
    deployed: DeployedRecipes,
    read_files: Callable[[], Mapping[str, bytes]],
    seconds_left: Callable[[], float],
) -> None:
    if event["RequestType"] == "Delete":
        deployed.remove(event["StackId"], seconds_left)
    elif event["ResourceProperties"]["Files"] == os.environ["RECIPE_FILES_ARN"]:
        deployed.apply(read_files(), seconds_left)
    else:
        # CloudFormation changes this function before it asks. So this is a rollback, before the function's own: what
        # it would apply is what has failed, and a failure now would leave the stack stuck.
        logger.warning("recipes left as they are: the files asked for are not those of this function")


def respond(
    event: dict[str, Any], reason: str | None, open_client: Callable[..., AbstractContextManager[httpx.Client]]
) -> None:
    """Send CloudFormation its response.

    Args:
        event: `{"ResponseURL", "StackId", "RequestId", "LogicalResourceId", …}`.
        reason: Why it failed, or None.
        open_client: Opens the client to use.

    Raises:
        NotAnswered: The response did not arrive.
    """
    answer = {
        "Status": "SUCCESS" if reason is None else "FAILED",
        # Always the same: another one would have CloudFormation delete the first.
        "PhysicalResourceId": event.get("PhysicalResourceId") or event["LogicalResourceId"],
        **{name: event[name] for name in ("StackId", "RequestId", "LogicalResourceId")},
    }
    if reason is not None:
        shown = "".join(each if each.isprintable() else " " for each in reason)
        answer["Reason"] = shown.encode()[:_REASON_LIMIT_BYTES].decode(errors="ignore")
    content = json.dumps(answer, ensure_ascii=False).encode()
    why = ""
    with open_client(timeout=_RESPONSE_SECONDS) as client:
        for _ in range(_RESPONSE_ATTEMPTS):
            try:
                # Without a media type, as the URL is signed. It is a secret, and in no message of ours.
                status = client.put(event["ResponseURL"], content=content).status_code
            except httpx.HTTPError as error:
                why = type(error).__name__
                continue
            if status < 300:
                return
            why = f"HTTP {status}"
    raise NotAnswered(f"CloudFormation took no answer: {why}")
