"""The definition of a pipeline, validated as far as possible before any part of it is started.

A step's input may contain placeholders (see `templating`), over

    input               the pipeline's own input
    steps.NAME.output   another step's output: that step must succeed first
    item, index         in a step with `for_each`: the element of this run, and its index from 0

So the steps and their dependencies form a graph, which must be acyclic. An expression's dependencies are read from its
syntax tree, never guessed from its text: an expression that could reach steps that it does not name is rejected.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as member
from typing import Any, ClassVar

from predictions.bodies import (
    LIST,
    OBJECT,
    TEXT,
    Body,
    Checks,
    ValidationError,
    either,
    errors_of,
    listed,
    optional,
    text,
)
from predictions.errors import Problem
from predictions.intents.groups import GROUP_CHECKS, identity_of, read_group
from predictions.intents.model import LIFETIME, REFERENCE_FIELDS, TARGET_NAME, Reference, create_requested_intent
from predictions.templating import (
    Allowance,
    PlaceholderError,
    TooSlow,
    Use,
    expressions,
    fill,
    holds_placeholders,
    unknown_root,
    uses_of,
)
from predictions.validation import certain_violations, fields_refused, input_json_canonical

STEPS_LIMIT = 50
"""The limit of steps of a pipeline."""

ITEMS_LIMIT = 100
"""The limit of elements of a `for_each`."""

FAN_OUTS_LIMIT = 5
"""The limit of steps with a `for_each`: with the limits above 545 predictions, each of which wakes the execution once.
Its history has at most 25,000 events: https://docs.aws.amazon.com/step-functions/latest/dg/service-quotas.html"""

PART_LIMIT_BYTES = 2 * 1024 * 1024
"""The limit in bytes of a pipeline's input, and of a step: each message of a step fills templates with them."""

PART_LIMIT_VALUES = 150_000
"""The limit of values in each of these: three quarters of the step budget of filling."""

BODY_LIMIT_VALUES = 200_000
"""The limit of values in a pipeline: the whole of it is read for each message."""

BODY_LIMIT_PLACEHOLDERS = 2000
"""The limit of placeholders in a pipeline."""

# The step budget of filling during validation: beyond it, templates are first filled when their step runs.
_CHECK_STEPS = 1_000_000
_CHECK_SECONDS = 5.0

_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)
# How many names of a path tell what an expression depends on.
_DEPTHS = {"input": 2, "steps": 3}

Violations = list[dict[str, str]]
Check = Callable[[Reference, Mapping[str, Any]], Violations]
"""Returns an input's violations of its model's schema, as `[{"field": "input.prompt", "detail": …}]`.

Raises:
    Problem: 404 or 422 if the model is not found; 503 if that cannot be determined now.
"""


@dataclass(kw_only=True)
class StepBody(Body):
    """A step in a request."""

    name: str
    model: str | None = None
    version: str | None = None
    deployment: str | None = None
    input: dict[str, Any]
    for_each: str | list[Any] | None = None
    lifetime: str | int | None = None

    checks: ClassVar[Checks] = {
        "name": text(most=256), "model": TARGET_NAME, "version": TARGET_NAME, "deployment": TARGET_NAME,
        "input": OBJECT, "for_each": optional(either(TEXT, LIST)), "lifetime": LIFETIME,
    }  # fmt: skip


@dataclass(kw_only=True)
class PipelineBody(Body):
    """The fields of `POST /pipelines`."""

    input: dict[str, Any] = member(default_factory=dict)
    steps: list[StepBody]
    labels: dict[str, Any] | None = None
    webhook: str | None = None
    webhook_events_filter: list[str] | None = None

    checks: ClassVar[Checks] = {
        "input": OBJECT, "steps": listed(StepBody.schema(), 1, STEPS_LIMIT), **GROUP_CHECKS,
    }  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A validated step of a pipeline.

    Attributes:
        name: `[a-z][a-z0-9_]{0,31}`.
        request: `model`, `version` or `deployment`, and optionally `lifetime`, as in a `RequestBody`.
        input: The template of the model's input.
        for_each: The template of the list over whose elements the step runs; None if it runs once.
        needs: The steps whose outputs it refers to.
    """

    name: str
    request: Mapping[str, Any]
    input: Mapping[str, Any]
    for_each: Any
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Definition:
    """A validated pipeline.

    Attributes:
        input: The pipeline's own input.
        steps: In the order of the request.
    """

    input: Mapping[str, Any]
    steps: tuple[Step, ...]

    @property
    def in_order(self) -> list[Step]:
        """Return the steps, each after its dependencies."""
        done: dict[str, Step] = {}
        while len(done) < len(self.steps):
            ready = [step for step in self.steps if step.name not in done and done.keys() >= set(step.needs)]
            assert ready, "a definition has no cycles"
            done |= {step.name: step for step in ready}
        return list(done.values())

    @property
    def last(self) -> list[Step]:
        """Return the steps on which no other depends: their outputs are the pipeline's."""
        needed = {name for step in self.steps for name in step.needs}
        return [step for step in self.steps if step.name not in needed]

    def before(self, step: Step) -> list[Step]:
        """Return the transitive dependencies of a step, which must succeed before it."""
        found: list[Step] = []
        for each in reversed(self.in_order):
            if each.name in step.needs or any(each.name in other.needs for other in found):
                found.append(each)
        return found

    def step(self, name: str) -> Step | None:
        """Return the step of that name, or None."""
        return next((step for step in self.steps if step.name == name), None)

    def to_json(self) -> str:
        """Return the definition as JSON text."""
        return json.dumps(asdict(self), separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Definition":
        """Parse the text of `to_json`."""
        value = json.loads(text)
        steps = tuple(Step(**{**step, "needs": tuple(step["needs"])}) for step in value["steps"])
        return cls(value["input"], steps)


def fingerprint(value: Any) -> str:
    """Return a digest of a body that does not depend on the order of its keys, nor on its labels."""
    described = identity_of(value) if isinstance(value, dict) else value
    return hashlib.sha256(input_json_canonical(described).encode()).hexdigest()


def read_context(
    value: Any, headers: Mapping[str, str], *, allow_loopback: bool
) -> tuple[dict[str, Any], Sequence[dict[str, str]]]:
    """Return the labels, trace and webhook of a pipeline, and what is wrong with them; see `read_group`.

    Raises:
        Problem: 422, with `invalid_fields`: the body has not the form of a pipeline.
    """
    asked = _validated(value)
    return read_group(asked.labels, asked.webhook, headers, allow_loopback=allow_loopback)


def create_definition(value: Any, check: Check, known: Sequence[dict[str, str]] = ()) -> Definition:
    """Validate the body of `POST /pipelines` and return its definition.

    Args:
        value: The body as parsed JSON.
        check: Returns an input's violations of its model's schema.
        known: Violations that are known already.

    Raises:
        Problem: 422, with every violation in `invalid_fields`, each by its place and its step's name; 503 if a
            model cannot be looked up now.
    """
    asked = _validated(value)
    invalid: Violations = [*known, *_too_large(asked)]
    if invalid:
        # No template is filled before this is checked.
        raise fields_refused(invalid)
    filling = _Filling()
    steps = [_step(asked, number, invalid, filling) for number in range(len(asked.steps))]
    invalid += _fan_outs(asked)
    invalid += _cycles(steps)
    for number, step in enumerate(steps):
        invalid += [_of_step(number, step.name, found) for found in _by_schema(step, asked.input, check, filling)]
    if invalid:
        # The first reason of each place: the others follow from it.
        raise fields_refused(list({each["field"]: each for each in reversed(invalid)}.values())[::-1])
    return Definition(asked.input, tuple(steps))


def _validated(value: Any) -> PipelineBody:
    if not isinstance(value, dict):
        raise Problem(422, "The body must be a JSON object with the key `steps`.")
    try:
        return PipelineBody.of(value)
    except ValidationError as error:
        found = [_shape(each, value) for each in errors_of(error)]
        raise fields_refused(list({each["field"]: each for each in found}.values())) from None


def _shape(error: Any, value: Mapping[str, Any]) -> dict[str, str]:
    parts = error["loc"][:3] if error["loc"][:1] == ("steps",) else error["loc"][:1]
    name = ".".join(str(part) for part in parts)[:200] or "body"
    of: type[Body] = StepBody if len(parts) == 3 else PipelineBody
    details = {
        "extra_forbidden": f"Unknown field. The known fields are {', '.join(f'`{n}`' for n in of.names())}.",
        "missing": "This field is required.",
        "too_long": f"Exceeds the limit of {STEPS_LIMIT} steps.",
        "too_short": "Must have at least one step.",
    }
    detail = details.get(error["type"], error["msg"])
    if len(parts) == 3 and isinstance(step := value["steps"][parts[1]], dict) and isinstance(step.get("name"), str):
        detail = f"Step `{step['name'][:32]}`: {detail}"
    return {"field": name, "detail": detail}


class _Filling:
    """Fills templates from the pipeline's input during validation, within a step budget."""

    def __init__(self) -> None:
        self._steps = 0

    def fill(self, template: Any, pipeline_input: Mapping[str, Any]) -> Any:
        """Return a filled template.

        Raises:
            PlaceholderError: The template cannot be filled.
            TooSlow: The template is not filled now: the time or the step budget is used up.
        """
        if self._steps > _CHECK_STEPS:
            raise TooSlow("Filling the previous templates took too many steps.")
        allowance = Allowance(seconds=_CHECK_SECONDS)
        try:
            return fill(template, {"input": pipeline_input}, allowance)
        finally:
            self._steps += allowance.steps


def _too_large(asked: PipelineBody) -> Iterator[dict[str, str]]:
    """Yield a violation for each part that exceeds a limit of filling."""
    parts: list[tuple[str, Any]] = [("input", asked.input)]
    parts += [(f"steps.{number}.input", [step.input, step.for_each]) for number, step in enumerate(asked.steps)]
    total = 0
    for field, part in parts:
        text = json.dumps(part, separators=(",", ":"), ensure_ascii=False)
        size, values = len(text.encode()), _count_values(part)
        total += values
        if size > PART_LIMIT_BYTES:
            detail = f"Exceeds the limit of {PART_LIMIT_BYTES} bytes (got {size}, with `for_each`). Pass files as URLs."
            yield {"field": field, "detail": detail if field != "input" else detail.replace(", with `for_each`", "")}
        elif values > PART_LIMIT_VALUES:
            detail = (
                f"Exceeds the limit of {PART_LIMIT_VALUES} values (got {values}). Pass long lists as URLs of files."
            )
            yield {"field": field, "detail": detail}
    if total > BODY_LIMIT_VALUES:
        detail = f"Exceeds the limit of {BODY_LIMIT_VALUES} values in all (got {total}). Create several pipelines."
        yield {"field": "steps", "detail": detail}
    placeholders = sum(json.dumps(part).count("{{") for _, part in parts)
    if placeholders > BODY_LIMIT_PLACEHOLDERS:
        detail = f"Exceeds the limit of {BODY_LIMIT_PLACEHOLDERS} placeholders (got {placeholders})."
        yield {"field": "steps", "detail": detail}


def _count_values(value: Any) -> int:
    """Count the values in JSON: objects, lists, their elements and their names."""
    count, waiting = 0, [value]
    while waiting:
        part = waiting.pop()
        count += 1
        if isinstance(part, dict):
            count += len(part)
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return count


def _step(asked: PipelineBody, number: int, invalid: Violations, filling: _Filling) -> Step:
    """Validate one step; its dependencies may still have a cycle."""
    body = asked.steps[number]
    found: Violations = []
    if not _NAME.fullmatch(body.name):
        detail = "Must be 1 to 32 lower-case letters, digits and `_`, beginning with a letter."
        found.append({"field": "name", "detail": detail})
    elif any(other.name == body.name for other in asked.steps[:number]):
        found.append({"field": "name", "detail": "Another step has this name."})
    request = body.given("model", "version", "deployment", "lifetime")
    try:
        _reference(request)
    except Problem as problem:
        found += [dict(field) for field in problem.invalid_fields]
    needs: dict[str, None] = {}
    for name, template in [("input", body.input), ("for_each", body.for_each)]:
        for field, uses, unclear in _uses(name, template):
            if unclear:
                found.append({"field": field, "detail": unclear})
            for use in uses:
                if wrong := _wrong(use, asked, body, within_for_each=name == "for_each"):
                    found.append({"field": field, "detail": wrong})
                elif use.path[0] == "steps":
                    needs[use.path[1]] = None
    found += _for_each(body, asked.input, filling)
    invalid += [_of_step(number, body.name, each) for each in found]
    return Step(body.name, request, body.input, body.for_each, tuple(needs))


def _uses(name: str, template: Any) -> Iterator[tuple[str, list[Use], str | None]]:
    """Yield the place, the references and the error of each expression in a template."""
    parts = template.items() if isinstance(template, dict) else [("", template)]
    for key, part in parts:
        field = f"{name}.{key}" if key else name
        try:
            found = list(expressions({field: part}))
        except PlaceholderError as error:
            yield error.field, [], error.detail
            continue
        for place, expression in found:
            uses = uses_of(expression, _DEPTHS)
            if any(use.path == () or (use.path[0] == "steps" and len(use.path) < 3) for use in uses):
                # It reaches steps that it does not name.
                yield place, [], f"`{expression}`: Name the step and its output, as in `steps.image.output`."
            else:
                yield place, uses, None


def _wrong(use: Use, asked: PipelineBody, step: StepBody, *, within_for_each: bool) -> str | None:
    """Return why a reference is invalid in a step, or None if it is valid."""
    root, *rest = use.path
    if root == "steps":
        name, what = rest
        if name == step.name:
            return "A step cannot depend on its own output."
        if all(other.name != name for other in asked.steps):
            return f"Step `{name[:32]}` not found."
        return None if what == "output" else f"A step has only `output`, not `{what[:32]}`."
    if root == "input":
        if not rest or rest[0] in asked.input or use.optional:
            return None
        return f"The pipeline's input has no `{rest[0][:32]}`."
    if root in ("item", "index"):
        return None if step.for_each is not None and not within_for_each else f"`{root}` needs `for_each`."
    return unknown_root(root, ("input", "steps", *(("item", "index") if step.for_each is not None else ())))


def _for_each(step: StepBody, pipeline_input: Mapping[str, Any], filling: _Filling) -> Violations:
    if step.for_each is None:
        return []
    if isinstance(step.for_each, str):
        try:
            whole = len(list(expressions(step.for_each))) == 1
        except PlaceholderError:
            return []  # already reported
        if not whole or not (step.for_each.startswith("{{") and step.for_each.endswith("}}")):
            return [{"field": "for_each", "detail": "Must be a list, or exactly one placeholder that gives a list."}]
    if not _needs_nothing(step.for_each):
        return []
    try:
        elements(filling.fill(step.for_each, pipeline_input))
    except PlaceholderError as error:
        return [{"field": "for_each", "detail": error.detail}]
    except TooSlow:
        pass  # checked when the step runs
    return []


def elements(found: Any) -> list[Any]:
    """Return the elements of a `for_each`, which must be a list.

    Raises:
        PlaceholderError: The value is not a list, or too long.
    """
    if not isinstance(found, list):
        raise PlaceholderError("for_each", f"Must give a list (got {_kind(found)}).")
    if len(found) > ITEMS_LIMIT:
        raise PlaceholderError("for_each", f"Exceeds the limit of {ITEMS_LIMIT} elements (got {len(found)}).")
    return found


def _kind(value: Any) -> str:
    kinds = {str: "a string", bool: "a boolean", dict: "an object", type(None): "nothing"}
    return kinds.get(type(value), "a number")


def _needs_nothing(template: Any) -> bool:
    """Return whether a template can be filled from the pipeline's input alone."""
    return all(not unclear and all(use.path[0] == "input" for use in uses) for _, uses, unclear in _uses("", template))


def _fan_outs(asked: PipelineBody) -> Iterator[dict[str, str]]:
    fanned = [number for number, step in enumerate(asked.steps) if step.for_each is not None]
    for number in fanned[FAN_OUTS_LIMIT:]:
        detail = f"Exceeds the limit of {FAN_OUTS_LIMIT} steps with `for_each` in a pipeline."
        yield _of_step(number, asked.steps[number].name, {"field": "for_each", "detail": detail})


def _cycles(steps: Sequence[Step]) -> Iterator[dict[str, str]]:
    """Yield a violation for each step in a cycle."""
    needs = {step.name: step.needs for step in steps}
    for number, step in enumerate(steps):
        if way := _way(step.name, needs):
            detail = f"The step depends on itself: {' needs '.join(f'`{name}`' for name in way)}."
            yield _of_step(number, step.name, {"field": "input", "detail": detail})


def _way(start: str, needs: Mapping[str, Sequence[str]]) -> list[str] | None:
    """Return the shortest path from a step back to itself, or None."""
    ways = [[start, name] for name in needs[start]]
    seen: set[str] = set()
    while ways:
        way = ways.pop(0)
        if way[-1] == start:
            return way
        if way[-1] not in seen:
            seen.add(way[-1])
            ways += [[*way, name] for name in needs.get(way[-1], ())]
    return None


def _by_schema(step: Step, pipeline_input: Mapping[str, Any], check: Check, filling: _Filling) -> Violations:
    """Return the certain schema violations of a step's input.

    Values from other steps are checked after those have completed.
    """
    try:
        reference = _reference(step.request)
    except Problem:
        return []  # already reported
    known: dict[str, Any] = {}
    open_fields: list[str] = []
    found: Violations = []
    for name, template in step.input.items():
        known[name] = template
        try:
            if step.for_each is None and holds_placeholders(template) and _needs_nothing(template):
                known |= filling.fill({name: template}, pipeline_input)
            else:
                open_fields += [place for place, _ in expressions({"input": {name: template}})]
        except PlaceholderError as error:
            open_fields.append(f"input.{name}")
            if _needs_nothing(template):
                found.append({"field": f"input.{error.field}", "detail": error.detail})
        except TooSlow:
            open_fields.append(f"input.{name}")
    try:
        violations = check(reference, known)
    except Problem as problem:
        if problem.status >= 500:
            raise
        kind = next(name for name in REFERENCE_FIELDS if name in step.request)
        return [*found, {"field": kind, "detail": problem.detail}]
    return found + certain_violations(violations, open_fields)


def _reference(request: Mapping[str, Any]) -> Reference:
    """Return the model, version or deployment that a step runs.

    Raises:
        Problem: 422.
    """
    intent = create_requested_intent(
        {**request, "input": {}}, owner="", source="pipeline", source_key="", allow_loopback_webhooks=False
    )
    return intent.reference


def _of_step(number: int, name: str, found: Mapping[str, str]) -> dict[str, str]:
    return {"field": f"steps.{number}.{found['field']}"[:300], "detail": f"Step `{name[:32]}`: {found['detail']}"}
