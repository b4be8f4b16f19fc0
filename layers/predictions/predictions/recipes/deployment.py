"""Recipes that are deployed with the stack: files `recipes/<name>.json`, packed into a layer of their own.

A file has the body of `PUT /recipes/<name>`, and optionally its `owner`. All files are validated before anything is
written, so an invalid one changes nothing. The list of deployed recipes is written before they are put and after those
without a file are deleted: after a crash in between, the next deployment finds all of them.
"""

import json
import os
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import TYPE_CHECKING

from predictions.aws.clients import client
from predictions.errors import PredictionsError, Problem
from predictions.ids import is_owner
from predictions.recipes.manage import RECIPE_LIMIT_BYTES, RecipeChanges
from predictions.recipes.rules import RecipeRules
from predictions.recipes.store import RecipeItems
from predictions.validation import parse_json

if TYPE_CHECKING:
    from mypy_boto3_cloudformation import CloudFormationClient

FILES_LIMIT = 100
"""The limit of files: each takes about a second, and all must fit into one run of the function."""

NEEDED_SECONDS = 60
"""The time that one file may need when AWS and Replicate are slow: with less time left, it is not begun."""

_PACKAGE = "recipe_files"


class DeploymentRefused(PredictionsError):
    """The files cannot be deployed; the error's text names each file, its field and the reason."""


class DeployedRecipes:
    """Updates the stack's recipes to match the files of a deployment.

    Args:
        changes: Puts and deletes them.
        rules: Manages their rules and schedules.
        default_owner: The owner of a recipe whose file names none.
    """

    def __init__(
        self,
        items: RecipeItems,
        changes: RecipeChanges,
        rules: RecipeRules,
        *,
        default_owner: str,
    ) -> None:
        self._items = items
        self._changes = changes
        self._rules = rules
        self._default_owner = default_owner

    @classmethod
    def from_env(cls) -> "DeployedRecipes":
        """Build from the environment of deploy_recipes."""
        return cls(
            RecipeItems.from_env(),
            RecipeChanges.from_env(),
            RecipeRules.from_env(),
            default_owner=os.environ["QUEUE_OWNER"],
        )

    def apply(self, found: Mapping[str, bytes], seconds_left: Callable[[], float]) -> None:
        """Put the recipes of the files, and delete those of earlier files.

        Recipes from the API stay. Running twice does the same.

        Args:
            found: The content of each file, by its name, such as `etch.json`.
            seconds_left: Returns how long it may still take.

        Raises:
            DeploymentRefused: A file is not a valid recipe, in which case nothing was changed; EventBridge rejects one;
                or the time is too short.
        """
        if len(found) > FILES_LIMIT:
            raise DeploymentRefused(f"recipes/ exceeds the limit of {FILES_LIMIT} files (got {len(found)}).")
        wanted: dict[tuple[str, str], tuple[str, bytes]] = {}
        refused = []
        for file, content in sorted(found.items()):
            _check_time(file, seconds_left)
            try:
                name = file.removesuffix(".json")
                owner, body = self._read(content)
                self._changes.check(owner, body, name)
                wanted[owner, name] = file, body
            except Problem as problem:
                refused.append(f"recipes/{file}: {problem.detail}")
        if refused:
            raise DeploymentRefused(" ".join(refused))
        before = self._items.deployed()
        if not before and not wanted:
            return
        self._items.note_deployed(before | wanted.keys())
        for (owner, name), (file, body) in wanted.items():
            _check_time(file, seconds_left)
            try:
                self._changes.put(owner, body, None, name=name, deployed=True)
            except Problem as problem:
                raise DeploymentRefused(f"recipes/{file}: {problem.detail}") from None
        for owner, name in sorted(before - wanted.keys()):
            _check_time(f"{name}.json", seconds_left)
            try:
                self._changes.delete(owner, name, deployed=True)
            except Problem as problem:
                raise DeploymentRefused(
                    f"recipes/{name}.json was removed, but not its recipe: {problem.detail}"
                ) from None
        self._items.note_deployed(wanted)

    def remove(self, stack_id: str, seconds_left: Callable[[], float]) -> None:
        """Remove the rules of all recipes, which would outlive the deleted stack.

        If only the deployment of recipes is removed from a stack that stays, as when the update that added it is rolled
        back, the recipes of deployments are deleted and nothing else.

        Args:
            stack_id: The stack's ARN.
            seconds_left: Returns how long it may still take.
        """
        (stack,) = self._cloudformation.describe_stacks(StackName=stack_id)["Stacks"]
        if stack["StackStatus"].startswith(("DELETE_", "ROLLBACK_")):
            self._rules.withdraw_all()
        else:
            self.apply({}, seconds_left)

    @property
    def _cloudformation(self) -> "CloudFormationClient":
        return client("cloudformation")

    def _read(self, content: bytes) -> tuple[str, bytes]:
        """Return the owner that a file names, and the rest of it.

        Raises:
            Problem: The file is not JSON, too large, or has an invalid owner.
        """
        if len(content) > RECIPE_LIMIT_BYTES:
            raise Problem(413, f"The recipe exceeds the limit of {RECIPE_LIMIT_BYTES} bytes (got {len(content)}).")
        value = parse_json(content, None)
        if not isinstance(value, dict) or "owner" not in value:
            return self._default_owner, content
        owner = value.pop("owner")
        if not isinstance(owner, str) or not is_owner(owner):
            raise Problem(422, "owner: must be 1 to 32 of `a` to `z`, digits and `-`, not beginning with `-`.")
        return owner, json.dumps(value).encode()


def recipe_files() -> dict[str, bytes]:
    """Return the packed files of `recipes/`, by name."""
    return {each.name: each.read_bytes() for each in files(_PACKAGE).iterdir() if each.name.endswith(".json")}


def _check_time(file: str, seconds_left: Callable[[], float]) -> None:
    if seconds_left() < NEEDED_SECONDS:
        raise DeploymentRefused(f"Not enough time for recipes/{file}. Deploy again.")
