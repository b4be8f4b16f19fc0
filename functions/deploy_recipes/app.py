"""Custom resource of CloudFormation: the recipes that come with the stack's deployment."""

from typing import Any

import httpx
from predictions.observability import handler_of, remaining_seconds
from predictions.recipes.custom_resource import follow, respond
from predictions.recipes.deployment import DeployedRecipes, recipe_files

deployed_recipes = DeployedRecipes.from_env()
open_client = httpx.Client


@handler_of
def handler(event: dict[str, Any], context: Any) -> None:
    """Do what CloudFormation asks for and respond, whatever happens.

    Args:
        event: `{"RequestType": "Create" | "Update" | "Delete", "ResponseURL", "StackId", "RequestId",
            "LogicalResourceId", "ResourceProperties": {"Files", …}, …}`.
        context: Says how much time is left to the function.

    Raises:
        NotAnswered: The response did not arrive.
    """
    respond(event, follow(event, deployed_recipes, recipe_files, remaining_seconds(context)), open_client)
