"""A custom resource of CloudFormation: the recipes that come with the stack's deployment."""

import json
import os
from typing import Any

import httpx
from predictions.errors import PredictionsError
from predictions.observability import handler_of, logger, remaining_seconds
from predictions.recipes.deployment import DeployedRecipes, DeploymentRefused, recipe_files

ANSWER_SECONDS = 10
ANSWER_ATTEMPTS = 3
REASON_LIMIT_BYTES = 1500
"""The answer may have 4096 bytes, and quotation marks take two.
https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/crpg-ref-responses.html"""

deployed_recipes = DeployedRecipes.from_env()
open_client = httpx.Client


class NotAnswered(PredictionsError):
    """CloudFormation did not take the answer. Lambda runs the function again, which does no harm."""


@handler_of
def handler(event: dict[str, Any], context: Any) -> None:
    """Does what CloudFormation asks for and answers it, whatever happens.

    Args:
        event: `{"RequestType": "Create" | "Update" | "Delete", "ResponseURL", "StackId", "RequestId",
            "LogicalResourceId", "ResourceProperties": {"Files", …}, …}`.
        context: Tells how long the function may still run.

    Raises:
        NotAnswered: The answer did not arrive.
    """
    reason = None
    try:
        _deal_with(event, context)
    except DeploymentRefused as refused:
        logger.warning("recipes refused", reason=str(refused))
        reason = str(refused)
    except Exception as error:  # noqa: BLE001  # CloudFormation would wait for an answer, and then not know why
        logger.exception("recipes not deployed")
        reason = f"The recipes were not deployed ({type(error).__name__}: {error}): see the log."
    if event["RequestType"] == "Delete":
        reason = None  # a stack that is to go is never held
    _answer(event, reason)


def _deal_with(event: dict[str, Any], context: Any) -> None:
    left = remaining_seconds(context)
    if event["RequestType"] == "Delete":
        deployed_recipes.remove(event["StackId"], left)
    elif event["ResourceProperties"]["Files"] == os.environ["RECIPE_FILES_ARN"]:
        deployed_recipes.apply(recipe_files(), left)
    else:
        # CloudFormation changes this function before it asks. So this is a rollback, before the function's own: what
        # it would apply is what has failed, and a failure now would leave the stack stuck.
        logger.warning("recipes left as they are: the files asked for are not those of this function")


def _answer(event: dict[str, Any], reason: str | None) -> None:
    answer = {
        "Status": "SUCCESS" if reason is None else "FAILED",
        # Always the same: another one would have CloudFormation delete the first.
        "PhysicalResourceId": event.get("PhysicalResourceId") or event["LogicalResourceId"],
        **{name: event[name] for name in ("StackId", "RequestId", "LogicalResourceId")},
    }
    if reason is not None:
        shown = "".join(each if each.isprintable() else " " for each in reason)
        answer["Reason"] = shown.encode()[:REASON_LIMIT_BYTES].decode(errors="ignore")
    content = json.dumps(answer, ensure_ascii=False).encode()
    why = ""
    with open_client(timeout=ANSWER_SECONDS) as client:
        for _ in range(ANSWER_ATTEMPTS):
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
