"""Writing recipes: what an owner asks for is checked, written down, and given the rule or schedule that starts it.

The order is the item first, `pending`, then the rule, then `active`. So whatever fires has an item, and what died
half-way is mended by asking for it again. Deleting goes the other way: `deleting` in the item, at which the door starts
nothing any more, then the rule, then the item.
"""

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from predictions.aws.dynamodb import timestamp
from predictions.errors import Problem
from predictions.ids import random_id
from predictions.intents.model import Reference, create_requested_intent
from predictions.lifecycle.model_lookup import ModelSchemas
from predictions.observability import logger
from predictions.recipes.rules import RecipeRules, RuleRefused
from predictions.recipes.schema import NAME, RecipeBody
from predictions.recipes.store import KEPT_APART, Recipe, RecipeItems
from predictions.store.predictions import PredictionsTable
from predictions.templating import PlaceholderError, expressions, holds_placeholders
from predictions.upstream.client import Replicate
from predictions.upstream.errors import NotFound, UpstreamError
from predictions.validation import field_problem, fields_refused, parse_json

if TYPE_CHECKING:
    from predictions.upstream.input_schema import InputSchema

RECIPE_LIMIT_BYTES = 64 * 1024
"""The largest recipe, as JSON: an item holds 400 KB, and a page of a list has to hold many."""

PATTERN_LIMIT_CHARACTERS = 2048
"""The largest event pattern that EventBridge takes.
https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-quota.html"""

# https://docs.aws.amazon.com/scheduler/latest/UserGuide/schedule-types.html
_SCHEDULE = re.compile(
    r"rate\([1-9][0-9]{0,5} (?:minutes?|hours?|days?)\)"
    r"|cron\([A-Za-z0-9*,/?#-]{1,60}(?: [A-Za-z0-9*,/?#-]{1,60}){5}\)"
    r"|at\(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\)",
    re.ASCII,
)


class RecipeChanges:
    """Creates, replaces and deletes recipes.

    Args:
        items: The recipes.
        rules: What starts them.
        replicate: Tells models' schemas.
        schemas: Finds them by version; None: inputs are not checked.
        source_bucket_name: The team's own bucket; empty where there is none.
        outputs_bucket_name: Which no recipe may name.
        allow_loopback_webhooks: Whether a webhook may go to this machine (the local cloud's setting).
        now: The time, in seconds since 1970.
    """

    def __init__(
        self,
        items: RecipeItems,
        rules: RecipeRules,
        replicate: Replicate,
        schemas: ModelSchemas | None,
        *,
        source_bucket_name: str,
        outputs_bucket_name: str,
        allow_loopback_webhooks: bool,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._items = items
        self._rules = rules
        self._replicate = replicate
        self._schemas = schemas
        self._source_bucket_name = source_bucket_name
        self._outputs_bucket_name = outputs_bucket_name
        self._allow_loopback_webhooks = allow_loopback_webhooks
        self._now = now

    @classmethod
    def from_env(cls) -> "RecipeChanges":
        """From the environment of manage_recipes and deploy_recipes."""
        replicate = Replicate.from_env()
        schemas = ModelSchemas(PredictionsTable.from_env(), replicate)
        return cls(
            RecipeItems.from_env(),
            RecipeRules.from_env(),
            replicate,
            schemas if os.environ["VALIDATE_INPUT"] == "true" else None,
            source_bucket_name=os.environ["SOURCE_BUCKET_NAME"],
            outputs_bucket_name=os.environ["OUTPUTS_BUCKET_NAME"],
            allow_loopback_webhooks=os.environ["ALLOW_LOOPBACK_WEBHOOKS"] == "true",
        )

    def check(self, owner: str, body: bytes, name: str) -> None:
        """Checks a recipe that a deployment is to put, and writes nothing.

        Raises:
            Problem: As `put` would, but for what EventBridge refuses.
        """
        self._read(body, None, name)
        _check_whose(self._items.named(owner, name), name, deployed=True)

    def put(
        self, owner: str, body: bytes, content_type: str | None, *, name: str | None = None, deployed: bool = False
    ) -> tuple[Recipe, bool]:
        """Creates a recipe, or replaces the one of that name.

        Twice: the same recipe. A crash after any line: the next call finishes it.

        Args:
            owner: Whose it is to be.
            body: A `RecipeBody` as JSON.
            content_type: Of the body.
            name: That the route names; without one the body has to, and no recipe may have it yet.
            deployed: Whether it comes with a deployment. Those and the others do not replace each other.

        Returns:
            The recipe, and whether it is new.

        Raises:
            Problem: 400, 413, 415 (see `parse_json`), 404 (the model), 409 (there already, a deployment's, or changed
                by another call at the same time) or 422 (with `invalid_fields`).
        """
        named, definition = self._read(body, content_type, name)
        existing = self._items.named(owner, named)
        if existing is not None and existing.state == "deleting":
            self._delete(existing)
            existing = None
        _check_whose(existing, named, deployed=deployed)
        if deployed and existing is not None and (existing.state, existing.definition) == ("active", definition):
            # Nothing to write. Its rule may depend on parameters of the stack, which have changed.
            try:
                self._mend(existing)
            except RuleRefused as refused:
                raise fields_refused([{"field": existing.kind or "name", "detail": str(refused)}]) from None
            return existing, False
        if existing is not None and name is None and existing.state == "active":
            raise Problem(409, f"There is a recipe {named} already: replace it with PUT /recipes/{named}.")
        now = timestamp(self._now())
        recipe = Recipe(
            id=existing.id if existing else self._items.claim_name(owner, named, random_id()),
            owner=owner,
            name=named,
            definition=definition,
            state="pending",
            revision=secrets.token_hex(8),
            created_at=existing.created_at if existing else now,
            updated_at=now,
            deployed=deployed,
        )
        if not self._items.put(recipe, replaces=existing):
            raise _changed_meanwhile(named)
        if recipe.kind or existing:
            try:
                self._rules.put(recipe)
            except RuleRefused as refused:
                self._restore(existing, recipe)
                raise fields_refused([{"field": recipe.kind or "name", "detail": str(refused)}]) from None
        if not self._items.set_state(recipe, "active"):
            self._mend(recipe)
            raise _changed_meanwhile(named)
        return replace(recipe, state="active"), existing is None

    def delete(self, owner: str, name: str, *, deployed: bool | None = None) -> bool:
        """Deletes a recipe and what starts it; whether there was one. What it has started goes on.

        Args:
            owner: Whose it is.
            name: Its name.
            deployed: Only one that came with a deployment, or only another; None: whichever there is.

        Raises:
            Problem: 409, where another call changed it at the same time.
        """
        recipe = self._items.named(owner, name)
        if recipe is None or deployed not in (None, recipe.deployed):
            return False
        self._delete(recipe)
        return True

    def _delete(self, recipe: Recipe) -> None:
        if not self._items.set_state(recipe, "deleting"):
            raise _changed_meanwhile(recipe.name)
        self._rules.withdraw(recipe)
        if not self._items.erase(recipe):
            self._mend(recipe)
            raise _changed_meanwhile(recipe.name)

    def _restore(self, existing: Recipe | None, recipe: Recipe) -> None:
        """Takes back what EventBridge did not take."""
        if existing is None:
            self._rules.withdraw(recipe)
            self._items.erase(recipe)
        elif self._items.put(existing, replaces=recipe):
            # Most often it is still there as it was.
            with contextlib.suppress(RuleRefused):
                self._rules.put(existing)

    def _mend(self, recipe: Recipe) -> None:
        """Two calls at once: brings what starts a recipe in line with the item, whoever wrote that last."""
        current = self._items.find(recipe.id)
        if current is None or current.state == "deleting":
            self._rules.withdraw(recipe)
        else:
            self._rules.put(current)

    # -- checks -----------------------------------------------------------------------------------------------

    def _read(self, body: bytes, content_type: str | None, name: str | None) -> tuple[str, dict[str, Any]]:
        """The name and the definition in a body.

        Raises:
            Problem: See `put`.
        """
        if len(body) > RECIPE_LIMIT_BYTES:
            raise Problem(413, f"The recipe has {len(body)} bytes, which exceeds the limit of {RECIPE_LIMIT_BYTES}.")
        value = parse_json(body, content_type)
        if not isinstance(value, dict):
            raise Problem(422, "The body has to be a JSON object with the key `input`.")
        try:
            asked = RecipeBody.model_validate(value)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False)
            fields = [(".".join(map(str, each["loc"]))[:200] or "body", each) for each in found]
            raise fields_refused([field_problem(field, each) for field, each in fields]) from None
        named = asked.name or name or ""
        if not re.fullmatch(NAME, named, re.ASCII) or named != (name or named):
            detail = "1 to 63 of `a` to `z`, digits and `-`; the same in the body as in the route."
            raise fields_refused([{"field": "name", "detail": detail}])
        definition = {field: part for field, part in value.items() if part is not None and field != "name"}
        for field in ("s3", "schedule"):
            if field in definition:
                definition[field] = {key: part for key, part in definition[field].items() if part is not None}
        invalid = [*_check_source(asked), *self._check_bucket(asked), *_check_placeholders(asked)]
        reference = self._check_request(asked, invalid)
        if invalid or reference is None:
            raise fields_refused(invalid)
        self._check_input(asked, reference)
        return named, definition

    def _check_bucket(self, asked: RecipeBody) -> list[dict[str, str]]:
        if asked.s3 is None or asked.s3.bucket != "source":
            return []
        if self._source_bucket_name and self._source_bucket_name != self._outputs_bucket_name:
            return []
        detail = "This stack has no source bucket: its parameter SourceBucketName names none, or the outputs bucket."
        return [{"field": "s3.bucket", "detail": detail}]

    def _check_request(self, asked: RecipeBody, invalid: list[dict[str, str]]) -> Reference | None:
        """Checks what is a request's own, as far as it is written out; what it is to run."""
        value: dict[str, Any] = {
            "input": {},
            "model": asked.model,
            "version": asked.version,
            "deployment": asked.deployment,
            "webhook": None if holds_placeholders(asked.webhook) else asked.webhook,
            "webhook_events_filter": asked.webhook_events_filter,
            "lifetime": asked.lifetime,
        }
        try:
            return create_requested_intent(
                value,
                owner="",
                source="recipe",
                source_key="",
                allow_loopback_webhooks=self._allow_loopback_webhooks,
            ).reference
        except Problem as problem:
            invalid += [dict(each) for each in problem.invalid_fields]
            return None

    def _check_input(self, asked: RecipeBody, reference: Reference) -> None:
        """Checks the parts of the input that are written out by the model's own schema, where that can be had.

        Raises:
            Problem: 404, where there is no such model; 422, where the input is not the model's.
        """
        schema = self._schema(reference)
        if schema is None:
            return
        from predictions.upstream.input_schema import NotChecked

        value = {**(asked.defaults or {}), **asked.input}
        open_places = [place for place, _ in expressions({"input": asked.input})]
        try:
            found = schema.violations(value)
        except NotChecked as error:
            logger.info("recipe not checked", reason=str(error))
            return
        # What a placeholder will be is not known yet, nor what it makes of the values around it.
        invalid = [
            each
            for each in found
            if not any(place == each["field"] or place.startswith(f"{each['field']}.") for place in open_places)
        ]
        if invalid:
            raise fields_refused(invalid)

    def _schema(self, reference: Reference) -> "InputSchema | None":
        if self._schemas is None or reference.name is None:
            return None
        if reference.kind == "deployment":
            return self._schemas.of_deployment(reference.name)
        if reference.version is not None:
            return self._schemas.of_version(reference.name, reference.version)
        try:
            return self._schemas.of_model(reference.name, self._replicate.model(reference.name).openapi_schema)
        except NotFound:
            detail = f"There is no model {reference.name}, or this stack's Replicate token may not use it."
            raise Problem(404, detail) from None
        except UpstreamError as error:
            logger.warning("no schema to check the recipe by", reason=str(error))
            return None


def is_name(text: str) -> bool:
    """Whether a text can be a recipe's name."""
    return re.fullmatch(NAME, text, re.ASCII) is not None


def _check_whose(existing: Recipe | None, name: str, *, deployed: bool) -> None:
    """Refuses that a recipe of a deployment takes the place of another one, or the other way round."""
    if existing is None or existing.deployed == deployed or existing.state == "deleting":
        return
    if deployed:
        detail = f"{existing.owner} has a recipe {name} that was put by the API: delete it, or rename the file."
        raise Problem(409, detail)
    raise Problem(409, f"The recipe {name} comes with the stack: change the file recipes/{name}.json, and deploy.")


def _check_source(asked: RecipeBody) -> list[dict[str, str]]:
    """What is wrong with what is to start a recipe."""
    invalid: list[dict[str, str]] = []
    given = [name for name in ("s3", "pattern", "schedule") if getattr(asked, name) is not None]
    if len(given) > 1:
        detail = f"A recipe has one source at most: here are {' and '.join(f'`{name}`' for name in given)}."
        invalid.append({"field": given[-1], "detail": detail})
    if asked.bus is not None and asked.pattern is None:
        invalid.append({"field": "bus", "detail": "Only a `pattern` has one."})
    if asked.s3 is not None:
        prefix, least, most = asked.s3.prefix, asked.s3.min_bytes, asked.s3.max_bytes
        apart = any(prefix.startswith(kept) or kept.startswith(prefix) for kept in KEPT_APART)
        if asked.s3.bucket == "inputs" and apart:
            detail = "A prefix such as `photos/`; it may not reach into `files/` or `batches/`, which are kept apart."
            invalid.append({"field": "s3.prefix", "detail": detail})
        if least is not None and most is not None and least > most:
            invalid.append({"field": "s3.max_bytes", "detail": "Has to be at least `min_bytes`."})
    if asked.pattern is not None:
        size = len(json.dumps(asked.pattern, separators=(",", ":")))
        if not asked.pattern or size > PATTERN_LIMIT_CHARACTERS:
            detail = f"An event pattern of at most {PATTERN_LIMIT_CHARACTERS} characters, not an empty one."
            invalid.append({"field": "pattern", "detail": detail})
    if asked.schedule is not None and not _SCHEDULE.fullmatch(asked.schedule.expression):
        detail = "`rate(5 minutes)`, `cron(0 9 ? * MON-FRI *)` (six fields) or `at(2026-12-24T18:00:00)`."
        invalid.append({"field": "schedule.expression", "detail": detail})
    return invalid


def _check_placeholders(asked: RecipeBody) -> list[dict[str, str]]:
    invalid: list[dict[str, str]] = []
    for name in ("input", "webhook", "output_prefix"):
        try:
            list(expressions({name: getattr(asked, name)}))
        except PlaceholderError as error:
            invalid.append({"field": error.field, "detail": error.detail})
    if holds_placeholders(asked.defaults):
        invalid.append({"field": "defaults", "detail": "No placeholders are filled here."})
    return invalid


def _changed_meanwhile(name: str) -> Problem:
    detail = f"Another call changed the recipe {name} at the same time: look at it, and try again."
    return Problem(409, detail, headers={"Retry-After": "1"})
