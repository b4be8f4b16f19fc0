"""Checks of a batch before it is stored: what no row can make right, and the schema by which its lines are checked.

The schema is looked up once, when the batch is created, and stored with it: `prepare_batch`, which reads manifests that
anyone with rights on the bucket wrote, needs no access to Replicate.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from predictions.errors import Problem
from predictions.intents.model import REFERENCE_FIELDS, Reference, RequestBody, create_requested_intent
from predictions.templating import PlaceholderError, check_uses, expressions, holds_placeholders
from predictions.validation import fields_refused, list_fields

if TYPE_CHECKING:
    from predictions.lifecycle.model_lookup import ModelLookup
    from predictions.recipes.store import Recipe
    from predictions.upstream.input_schema import InputSchema

CHECK_SECONDS = 120.0
"""The time that the schema checks of a batch may take in all, of the 15 minutes of `prepare_batch`. The lines after it
are checked when their predictions start: a hostile schema takes half a second for each."""

# A valid name, in place of one that a row gives.
_ANY_NAME = "owner/name"


def check_template(template: Mapping[str, Any], *, allow_loopback_webhooks: bool) -> list[dict[str, str]]:
    """Return what is wrong in the template of a batch, whatever its rows hold.

    Args:
        template: A request with placeholders over `row`.
        allow_loopback_webhooks: Whether a webhook may go to this machine (the local cloud's setting).
    """
    try:
        invalid = list(check_uses(template, ("row",)))
    except PlaceholderError as error:
        return [_in_template({"field": error.field, "detail": error.detail})]
    if not isinstance(template.get("input"), dict):
        invalid.append({"field": "input", "detail": "This field is required and must be an object."})
    if "idempotency_key" in template:
        detail = "Not allowed in a line, which has a key of its own for retries. Remove it."
        invalid.append({"field": "idempotency_key", "detail": detail})
    known = RequestBody.names()
    # A field that no request has is wrong with any value.
    request: dict[str, Any] = {
        name: part for name, part in template.items() if name not in known or not holds_placeholders(part)
    }
    request |= {name: _ANY_NAME for name in REFERENCE_FIELDS if name in template and name not in request}
    request.pop("idempotency_key", None)
    try:
        _reference(request, allow_loopback_webhooks=allow_loopback_webhooks)
    except Problem as problem:
        invalid += [dict(each) for each in problem.invalid_fields]
    return list({each["field"]: each for each in map(_in_template, invalid)}.values())


def schema_of_lines(
    lookup: "ModelLookup",
    *,
    template: Mapping[str, Any] | None,
    recipe: "Recipe | None",
    requests: Sequence[Any] | None,
) -> "InputSchema | None":
    """Return the schema of the model that all lines of a batch run, and check the constant parts of a template by it.

    Args:
        lookup: Looks up models and schemas.
        template: The template of the lines, from `check_template`.
        recipe: Or the recipe, which was checked when it was written.
        requests: Or the lines themselves.

    Returns:
        The schema, or None if the lines name several models, a row names them, or the schema cannot be read now: then
        each input is checked when its prediction starts.

    Raises:
        Problem: 422, with `invalid_fields`.
    """
    if template is not None:
        request: Mapping[str, Any] = (
            {} if holds_placeholders([template.get(name) for name in REFERENCE_FIELDS]) else template
        )
    elif recipe is not None:
        request = recipe.definition
    else:
        request = _common_request(requests or ())
    named = {name: request[name] for name in REFERENCE_FIELDS if request.get(name) is not None}
    try:
        reference = _reference(named, allow_loopback_webhooks=False)
    except Problem:
        return None  # a line that names no model is refused by itself
    constants = template["input"] if template is not None else {}
    open_fields = [place for place, _ in expressions({"input": constants})]
    try:
        schema, invalid = lookup.template_violations(reference, constants, open_fields)
    except Problem as problem:
        if template is None and recipe is None:
            return None  # each line says so itself
        (kind,) = named
        field = f"template.{kind}" if template is not None else "recipe"
        raise fields_refused([{"field": field, "detail": problem.detail}]) from None
    if invalid and template is not None:
        raise fields_refused([_in_template(each) for each in invalid])
    return schema


class LineSchema:
    """Checks lines by the schema of their model, for a limited time in all.

    Args:
        text: The schema, from `InputSchema.to_json`.
        clock: A monotonic clock in seconds.
    """

    def __init__(self, text: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        from predictions.upstream.input_schema import InputSchema, NotChecked  # only for batches that have one

        self._schema = InputSchema.from_json(text)
        self._not_checked = NotChecked
        self._clock = clock
        self._seconds_left = CHECK_SECONDS

    def reason(self, line_input: Any) -> str | None:
        """Return why the model would refuse an input, or None if that is not known."""
        if self._seconds_left <= 0:
            return None
        began = self._clock()
        try:
            found = self._schema.violations(line_input)
        except self._not_checked:
            found = []
        self._seconds_left -= self._clock() - began
        return list_fields(found) if found else None


def _common_request(requests: Sequence[Any]) -> Mapping[str, Any]:
    """Return a request that names the model of all of them, or an empty one."""
    found = {json.dumps([each.get(name) for name in REFERENCE_FIELDS]) for each in requests if isinstance(each, dict)}
    return dict(zip(REFERENCE_FIELDS, json.loads(found.pop()), strict=True)) if len(found) == 1 else {}


def _reference(request: Mapping[str, Any], *, allow_loopback_webhooks: bool) -> Reference:
    """Validate the fields of a request around its input; return what it runs.

    Raises:
        Problem: 422.
    """
    return create_requested_intent(
        {**request, "input": {}},
        owner="",
        source="batch",
        source_key="",
        allow_loopback_webhooks=allow_loopback_webhooks,
    ).reference


def _in_template(violation: Mapping[str, str]) -> dict[str, str]:
    return {**violation, "field": f"template.{violation['field']}"[:200]}
