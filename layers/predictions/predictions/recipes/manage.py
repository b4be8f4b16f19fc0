"""Use cases of recipes: validate, store, and create the rule or schedule that starts each.

The order is the item first, `pending`, then the rule, then `active`. So each rule that fires has an item, and a write
that crashed midway is completed by repeating the request. Deletion is the reverse: `deleting` in the item, in which
state intake starts nothing more, then the rule, then the item.
"""

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from predictions.bodies import ValidationError, errors_of
from predictions.clock import timestamp
from predictions.errors import Problem
from predictions.ids import random_id
from predictions.intents.model import REFERENCE_FIELDS, Reference, create_requested_intent
from predictions.lifecycle.model_lookup import ModelLookup
from predictions.recipes.rules import RecipeRules, RuleRefused
from predictions.recipes.schema import NAME, RecipeBody
from predictions.recipes.store import ANY_ROOTS, KEPT_APART, OBJECT_FIELDS, SOURCE_ROOTS, Recipe, RecipeItems
from predictions.store.schemas import StoredSchemas
from predictions.templating import PlaceholderError, check_uses, expressions, holds_placeholders
from predictions.upstream.client import Replicate
from predictions.validation import certain_violations, field_problem, fields_refused, parse_json

RECIPE_LIMIT_BYTES = 64 * 1024
"""The largest recipe, as JSON: an item holds 400 KB, and a page of a list must hold many."""

PATTERN_LIMIT_CHARACTERS = 2048
"""The largest event pattern that EventBridge accepts.
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
        rules: Manages their rules and schedules.
        lookup: Looks up the schemas of models' inputs.
        source_bucket_name: The team's own bucket; empty if the stack has none.
        outputs_bucket_name: The outputs bucket, which no recipe may name.
        allow_loopback_webhooks: Whether a webhook may go to this machine (the local cloud's setting).
    """

    def __init__(
        self,
        items: RecipeItems,
        rules: RecipeRules,
        lookup: ModelLookup,
        *,
        source_bucket_name: str,
        outputs_bucket_name: str,
        allow_loopback_webhooks: bool,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._items = items
        self._rules = rules
        self._lookup = lookup
        self._source_bucket_name = source_bucket_name
        self._outputs_bucket_name = outputs_bucket_name
        self._allow_loopback_webhooks = allow_loopback_webhooks
        self._now = now

    @classmethod
    def from_env(cls) -> "RecipeChanges":
        """Build from the environment of manage_recipes and deploy_recipes."""
        return cls(
            RecipeItems.from_env(),
            RecipeRules.from_env(),
            ModelLookup.from_env(StoredSchemas.from_env(), Replicate.from_env()),
            source_bucket_name=os.environ["SOURCE_BUCKET_NAME"],
            outputs_bucket_name=os.environ["OUTPUTS_BUCKET_NAME"],
            allow_loopback_webhooks=os.environ["ALLOW_LOOPBACK_WEBHOOKS"] == "true",
        )

    def check(self, owner: str, body: bytes, name: str) -> None:
        """Validate a recipe of a deployment, and write nothing.

        Raises:
            Problem: As for `put`, except errors of EventBridge.
        """
        self._read(body, None, name)
        _check_whose(self._items.named(owner, name), name, deployed=True)

    def put(
        self, owner: str, body: bytes, content_type: str | None, *, name: str | None = None, deployed: bool = False
    ) -> tuple[Recipe, bool]:
        """Create a recipe, or replace the one of that name.

        Twice: the same recipe. If the function crashes after any line, the next call completes it.

        Args:
            owner: The owner of the recipe.
            body: A `RecipeBody` as JSON.
            content_type: Of the body.
            name: The name in the route; without one the body must have it, and no recipe may have it yet.
            deployed: Whether it is part of a deployment. Deployed recipes and others do not replace each other.

        Returns:
            The recipe, and whether it is new.

        Raises:
            Problem: 400, 413, 415 (see `parse_json`), 404 (the model), 409 (exists already, is a deployment's, or was
                changed concurrently) or 422 (with `invalid_fields`).
        """
        named, definition = self._read(body, content_type, name)
        existing = self._items.named(owner, named)
        if existing is not None and existing.state == "deleting":
            self._delete(existing)
            existing = None
        _check_whose(existing, named, deployed=deployed)
        if deployed and existing is not None and (existing.state, existing.definition) == ("active", definition):
            # Nothing to write, but its rule may depend on parameters of the stack that have changed.
            try:
                self._reconcile(existing)
            except RuleRefused as refused:
                raise fields_refused([{"field": existing.kind or "name", "detail": str(refused)}]) from None
            return existing, False
        if existing is not None and name is None and existing.state == "active":
            raise Problem(409, f"Recipe {named} exists already. Replace it with PUT /recipes/{named}.")
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
            self._reconcile(recipe)
            raise _changed_meanwhile(named)
        return replace(recipe, state="active"), existing is None

    def delete(self, owner: str, name: str, *, deployed: bool | None = None) -> bool:
        """Delete a recipe and its rule, not its predictions; return whether it existed.

        Args:
            owner: The owner of the recipe.
            name: Its name.
            deployed: Only one that is part of a deployment, or only another; None: either.

        Raises:
            Problem: 409 if another call changed it concurrently.
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
            self._reconcile(recipe)
            raise _changed_meanwhile(recipe.name)

    def _restore(self, existing: Recipe | None, recipe: Recipe) -> None:
        """Restore the previous recipe after EventBridge rejected the new one."""
        if existing is None:
            self._rules.withdraw(recipe)
            self._items.erase(recipe)
        elif self._items.put(existing, replaces=recipe):
            # Usually the previous rule is still in place.
            with contextlib.suppress(RuleRefused):
                self._rules.put(existing)

    def _reconcile(self, recipe: Recipe) -> None:
        """Update the rule of a recipe to match its item, after concurrent calls."""
        current = self._items.find(recipe.id)
        if current is None or current.state == "deleting":
            self._rules.withdraw(recipe)
        else:
            self._rules.put(current)

    # -- checks -----------------------------------------------------------------------------------------------

    def _read(self, body: bytes, content_type: str | None, name: str | None) -> tuple[str, dict[str, Any]]:
        """Return the name and the definition in a body.

        Raises:
            Problem: See `put`.
        """
        if len(body) > RECIPE_LIMIT_BYTES:
            raise Problem(413, f"The recipe exceeds the limit of {RECIPE_LIMIT_BYTES} bytes (got {len(body)}).")
        value = parse_json(body, content_type)
        if not isinstance(value, dict):
            raise Problem(422, "The body must be a JSON object with the key `input`.")
        try:
            asked = RecipeBody.of(value)
        except ValidationError as error:
            fields = [(".".join(map(str, each["loc"]))[:200] or "body", each) for each in errors_of(error)]
            raise fields_refused([field_problem(field, each) for field, each in fields]) from None
        named = asked.name or name or ""
        if not re.fullmatch(NAME, named, re.ASCII) or named != (name or named):
            detail = "Must be 1 to 63 of `a` to `z`, digits and `-`; the same in the body as in the route."
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
        detail = (
            "This stack has no source bucket: its parameter SourceBucketName is empty, or names the outputs bucket."
        )
        return [{"field": "s3.bucket", "detail": detail}]

    def _check_request(self, asked: RecipeBody, invalid: list[dict[str, str]]) -> Reference | None:
        """Validate the fields of the request without placeholders; return its reference."""
        value: dict[str, Any] = {
            "input": {},
            "model": asked.model,
            "version": asked.version,
            "deployment": asked.deployment,
            "webhook": None if holds_placeholders(asked.webhook) else asked.webhook,
            "webhook_events_filter": asked.webhook_events_filter,
            "lifetime": asked.lifetime,
            # What a placeholder gives is checked once it is filled.
            "labels": {key: "-" if holds_placeholders(part) else part for key, part in (asked.labels or {}).items()}
            or None,
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
        """Validate the constant parts of `input` and `defaults` by the model's schema, if available.

        A required field that is in neither of them is invalid too: no event and no row can fill it.

        Raises:
            Problem: 404 if the model does not exist; 422 if it cannot run, or the input does not match its schema.
        """
        defaults = asked.defaults or {}
        open_fields = [place for place, _ in expressions({"input": asked.input})]
        try:
            schema, invalid = self._lookup.template_violations(reference, {**defaults, **asked.input}, open_fields)
            used = {name: part for name, part in defaults.items() if holds_placeholders(asked.input.get(name))}
            if used and schema is not None:
                # A default is used where the placeholder of the same name finds nothing.
                found = self._lookup.violations_of(schema, json.dumps({**defaults, **asked.input, **used}))
                others = [place for place in open_fields if _name_of(place) not in used]
                invalid += [each for each in certain_violations(found, others) if each not in invalid]
        except Problem as problem:
            if problem.status == 404:
                detail = f"Model {reference.name} not found, or not accessible with this stack's Replicate token."
                raise Problem(404, detail) from None
            kind = next(name for name in REFERENCE_FIELDS if getattr(asked, name) is not None)
            raise fields_refused([{"field": kind, "detail": problem.detail}]) from None
        if invalid:
            raise fields_refused([_in_defaults(each, asked) for each in invalid])


def is_name(text: str) -> bool:
    """Return whether a string is a valid recipe name."""
    return re.fullmatch(NAME, text, re.ASCII) is not None


def _check_whose(existing: Recipe | None, name: str, *, deployed: bool) -> None:
    """Reject replacing a deployed recipe by another, or the reverse."""
    if existing is None or existing.deployed == deployed or existing.state == "deleting":
        return
    if deployed:
        detail = f"{existing.owner} has a recipe {name} from the API. Delete it, or rename the file."
        raise Problem(409, detail)
    raise Problem(409, f"Recipe {name} is deployed with the stack. Change the file recipes/{name}.json and deploy.")


def _check_source(asked: RecipeBody) -> list[dict[str, str]]:
    """Return the violations in the source of a recipe."""
    invalid: list[dict[str, str]] = []
    given = [name for name in ("s3", "pattern", "schedule") if getattr(asked, name) is not None]
    if len(given) > 1:
        detail = f"A recipe must have at most one source (got {' and '.join(f'`{name}`' for name in given)})."
        invalid.append({"field": given[-1], "detail": detail})
    if asked.bus is not None and asked.pattern is None:
        invalid.append({"field": "bus", "detail": "Only allowed with `pattern`."})
    if asked.s3 is not None:
        prefix, least, most = asked.s3.prefix, asked.s3.min_bytes, asked.s3.max_bytes
        apart = any(prefix.startswith(kept) or kept.startswith(prefix) for kept in KEPT_APART)
        if asked.s3.bucket == "inputs" and apart:
            detail = "Must be a prefix such as `photos/`, outside of `files/` and `batches/`, which are reserved."
            invalid.append({"field": "s3.prefix", "detail": detail})
        if least is not None and most is not None and least > most:
            invalid.append({"field": "s3.max_bytes", "detail": "Must be at least `min_bytes`."})
    if asked.pattern is not None:
        size = len(json.dumps(asked.pattern, separators=(",", ":")))
        if not asked.pattern or size > PATTERN_LIMIT_CHARACTERS:
            detail = f"Must be an event pattern of 1 to {PATTERN_LIMIT_CHARACTERS} characters."
            invalid.append({"field": "pattern", "detail": detail})
    if asked.schedule is not None and not _SCHEDULE.fullmatch(asked.schedule.expression):
        detail = "Must be `rate(5 minutes)`, `cron(0 9 ? * MON-FRI *)` (six fields) or `at(2026-12-24T18:00:00)`."
        invalid.append({"field": "schedule.expression", "detail": detail})
    return invalid


def _check_placeholders(asked: RecipeBody) -> list[dict[str, str]]:
    kind = next((kind for kind in SOURCE_ROOTS if getattr(asked, kind) is not None), None)
    roots = (*(SOURCE_ROOTS[kind] if kind else ()), *ANY_ROOTS)
    fields = {
        "object": OBJECT_FIELDS,
        "schedule": ("time",),
        "recipe": ("id", "name"),
        "defaults": asked.defaults or (),
    }
    elsewhere = {root for each in SOURCE_ROOTS.values() for root in each}
    invalid: list[dict[str, str]] = []
    for name in ("input", "webhook", "output_prefix", "labels"):
        try:
            invalid += check_uses({name: getattr(asked, name)}, roots, fields, elsewhere)
        except PlaceholderError as error:
            invalid.append({"field": error.field, "detail": error.detail})
    if holds_placeholders(asked.defaults):
        invalid.append({"field": "defaults", "detail": "Must not have placeholders."})
    return invalid


def _name_of(field: str) -> str:
    """Return the name of the model's field in a place such as `input.images.0`."""
    return field.split(".")[1] if "." in field else ""


def _in_defaults(violation: dict[str, str], asked: RecipeBody) -> dict[str, str]:
    """Name the place of a violation in the recipe: a constant of `defaults` is no part of `input`."""
    name = _name_of(violation["field"])
    if name not in (asked.defaults or {}) or (name in asked.input and not holds_placeholders(asked.input[name])):
        return violation
    return {**violation, "field": f"defaults{violation['field'].removeprefix('input')}"}


def _changed_meanwhile(name: str) -> Problem:
    detail = f"Another call changed recipe {name} concurrently. Check it, then retry."
    return Problem(409, detail, headers={"Retry-After": "1"})
