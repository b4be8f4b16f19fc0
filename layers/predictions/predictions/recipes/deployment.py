"""Recipes that come with a deployment: files `recipes/<name>.json`, packed into a layer of their own.

A file holds what `PUT /recipes/<name>` takes, and may name its `owner`. All files are checked before anything is
written, so a bad one leaves everything as it was. Which recipes are a deployment's is written down before they are put
and after those without a file are gone: whatever dies in between, the next deployment finds all of them.
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
"""How many files are taken: each takes about a second, and all have to fit into one run of the function."""

NEEDED_SECONDS = 60
"""What one file may take when AWS and Replicate are slow: with less time left, it is not begun."""

_PACKAGE = "recipe_files"


class DeploymentRefused(PredictionsError):
    """The files cannot be deployed; its text names each file, its field and the reason."""


class DeployedRecipes:
    """Brings the stack's recipes in line with the files of a deployment.

    Args:
        items: The recipes.
        changes: Puts and deletes them.
        rules: What starts them.
        default_owner: Whose recipe it is where the file does not say.
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
        """From the environment of deploy_recipes."""
        return cls(
            RecipeItems.from_env(),
            RecipeChanges.from_env(),
            RecipeRules.from_env(),
            default_owner=os.environ["QUEUE_OWNER"],
        )

    def apply(self, found: Mapping[str, bytes], seconds_left: Callable[[], float]) -> None:
        """Puts what the files say, and deletes what earlier files said. What the API has put stays. Twice: the same.

        Args:
            found: What is in each file, by its name, such as `etch.json`.
            seconds_left: How long it may still take.

        Raises:
            DeploymentRefused: A file is no recipe, in which case nothing was changed; EventBridge does not take one;
                or the time is too short.
        """
        if len(found) > FILES_LIMIT:
            raise DeploymentRefused(f"recipes/ has {len(found)} files, and {FILES_LIMIT} are taken.")
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
                raise DeploymentRefused(f"recipes/{name}.json is gone, its recipe not: {problem.detail}") from None
        self._items.note_deployed(wanted)

    def remove(self, stack_id: str, seconds_left: Callable[[], float]) -> None:
        """Before the stack goes, removes what starts its recipes, of all of them: rules would outlive it.

        Where only the deployment of recipes is taken out of a stack that stays, as when the update is rolled back that
        had brought it, deletes the recipes of deployments and nothing else.

        Args:
            stack_id: The stack's ARN.
            seconds_left: How long it may still take.
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
        """The owner that a file names, and the rest of it.

        Raises:
            Problem: It is no JSON, too large, or names nobody.
        """
        if len(content) > RECIPE_LIMIT_BYTES:
            raise Problem(413, f"The recipe has {len(content)} bytes, which exceeds the limit of {RECIPE_LIMIT_BYTES}.")
        value = parse_json(content, None)
        if not isinstance(value, dict) or "owner" not in value:
            return self._default_owner, content
        owner = value.pop("owner")
        if not isinstance(owner, str) or not is_owner(owner):
            raise Problem(422, "owner: 1 to 32 of `a` to `z`, digits and `-`, not beginning with `-`.")
        return owner, json.dumps(value).encode()


def recipe_files() -> dict[str, bytes]:
    """What was packed of `recipes/`, by name."""
    return {each.name: each.read_bytes() for each in files(_PACKAGE).iterdir() if each.name.endswith(".json")}


def _check_time(file: str, seconds_left: Callable[[], float]) -> None:
    if seconds_left() < NEEDED_SECONDS:
        raise DeploymentRefused(f"The time was too short to come to recipes/{file}: deploy again.")
