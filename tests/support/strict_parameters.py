"""Calls of AWS as strict as AWS: what botocore's models say of parameters, and botocore itself does not check.

botocore refuses unknown and missing names, wrong types, and what is too short or too small. It lets through what is too
long or too large, what is none of an enumeration, and what does not match a pattern: AWS answers ValidationException to
these. Whole calls are checked here, of every client, before anything answers them.

Each operation's check is made once, from the parts of its model that have such a bound, and skips all others.
"""

import re
from collections.abc import Callable
from typing import Any

import botocore.validate
import regex

Check = Callable[[Any], str | None]
"""Tells what is wrong with a value, after the path to it, or None."""

# Shapes whose bound is far beyond what a call can carry, in values of which a call has many.
UNREACHABLE = {
    "AttributeName": "a name within an item may have 65,535 characters, the whole item 400 KB",
}


class RefusedByAws(AssertionError):
    """A call that AWS would refuse. No error of botocore's, so that no handling of those hides it."""


refused: list[str] = []
"""The calls that were refused since somebody looked: code that catches everything does not hide one either."""

_checks: dict[tuple[str, str], Check | None] = {}


def check_call(client: Any, operation: str, parameters: dict[str, Any]) -> None:
    """Refuse parameters beyond the bounds of their model.

    Raises:
        RefusedByAws: Which one, with the value and the bound.
    """
    check_parameters(client.meta.service_model, operation, parameters)


def check_parameters(service: Any, operation: str, parameters: dict[str, Any]) -> None:
    """Refuse parameters beyond the bounds of a service's model.

    Raises:
        RefusedByAws: Which one, with the value and the bound.
    """
    key = service.service_name, operation
    if key not in _checks:
        _checks[key] = make_check(service, operation)
    check = _checks[key]
    if check is not None and (wrong := check(parameters)) is not None:
        refused.append(f"{service.service_name}:{operation}: {wrong.lstrip('.')}")
        raise RefusedByAws(refused[-1])


def make_check(service: Any, operation: str) -> Check | None:
    """The check of an operation's parameters, or None if its model has no bound."""
    shape = service.operation_model(operation).input_shape
    return _made(shape, {}) if shape is not None else None


def install() -> None:
    """Check each call of each client of botocore in this process."""
    decorator: Any = botocore.validate.ParamValidationDecorator
    decorator.serialize_to_request = _strict


_serialize_to_request: Any = botocore.validate.ParamValidationDecorator.serialize_to_request


def _strict(self: Any, parameters: dict[str, Any], operation_model: Any) -> Any:
    # First, as far as botocore itself goes: names, types, what is missing.
    request = _serialize_to_request(self, parameters, operation_model)
    check_parameters(operation_model.service_model, operation_model.name, parameters)
    return request


def _made(shape: Any, within: dict[str, Check | None]) -> Check | None:
    """The check of values of a shape, or None if it has no bound; `within` are those of the shapes around it."""
    if shape.name in within:
        # A shape within itself, such as a list of attribute values: its check is looked up when it is met.
        return (lambda value: again(value) if (again := within[shape.name]) else None) if _bounded(shape) else None
    within[shape.name] = None
    kind, own = shape.type_name, _bounds(shape)
    inner: Check | None = None
    if kind == "structure":
        members = {name: made for name, each in shape.members.items() if (made := _made(each, within))}
        inner = _of_structure(members) if members else None
    elif kind == "list" and (each := _made(shape.member, within)):
        inner = _of_list(each)
    elif kind == "map":
        keys, values = _made(shape.key, within), _made(shape.value, within)
        inner = _of_map(keys, values) if keys or values else None
    checks = [*own, *([inner] if inner else [])]
    if len(checks) > 1:

        def check(value: Any) -> str | None:
            for each in checks:
                if (wrong := each(value)) is not None:
                    return wrong
            return None

        within[shape.name] = check
    elif checks:
        within[shape.name] = checks[0]
    # Only the shapes around one are within it.
    return within[shape.name] if _recursive(shape) else within.pop(shape.name)


def _parts(shape: Any) -> list[Any]:
    if shape.type_name == "structure":
        return list(shape.members.values())
    if shape.type_name == "list":
        return [shape.member]
    return [shape.key, shape.value] if shape.type_name == "map" else []


def _all_parts(shape: Any) -> dict[str, Any]:
    """The shapes within a shape, by name; itself only if it is one of them."""
    found: dict[str, Any] = {}
    waiting = _parts(shape)
    while waiting:
        part = waiting.pop()
        if part.name not in found:
            found[part.name] = part
            waiting += _parts(part)
    return found


def _recursive(shape: Any) -> bool:
    return shape.name in _all_parts(shape)


def _bounded(shape: Any) -> bool:
    return any(_bounds(part) for part in (shape, *_all_parts(shape).values()))


def _of_structure(members: dict[str, Check]) -> Check:
    pairs = list(members.items())

    def check(value: Any) -> str | None:
        for name, each in pairs:
            if (part := value.get(name)) is not None and (wrong := each(part)) is not None:
                return f"{name}{wrong}" if wrong[0] in " .[" else f"{name} {wrong}"
        return None

    return lambda value: f".{wrong}" if (wrong := check(value)) is not None else None


def _of_list(member: Check) -> Check:
    def check(value: Any) -> str | None:
        for index, part in enumerate(value):
            if (wrong := member(part)) is not None:
                return f"[{index}]{wrong}" if wrong[0] in ".[" else f"[{index}] {wrong}"
        return None

    return check


def _of_map(keys: Check | None, values: Check | None) -> Check:
    def check(value: Any) -> str | None:
        for name, part in value.items():
            wrong = (keys(name) if keys else None) or (values(part) if values else None)
            if wrong is not None:
                return f"[{name!r}]{wrong}" if wrong[0] in ".[" else f"[{name!r}] {wrong}"
        return None

    return check


def _bounds(shape: Any) -> list[Check]:
    """What the model says of a shape's own value."""
    if shape.name in UNREACHABLE:
        return []
    found: list[Check] = []
    # botocore itself refuses what is less than the model's `min`.
    most, kind = shape.metadata.get("max"), shape.type_name
    if most is not None and kind in ("integer", "long", "float", "double"):
        found.append(lambda value: f"is {value}, must be at most {most}" if value > most else None)
    elif most is not None and kind in ("string", "blob", "list", "map"):
        unit = {"string": "characters", "blob": "bytes"}.get(kind, "entries")

        def too_long(value: Any) -> str | None:
            # A stream's length is not known before it is read.
            length = len(value) if hasattr(value, "__len__") else 0
            return f"has {length} {unit}, must have at most {most}: {_short(value)}" if length > most else None

        found.append(too_long)
    if kind == "string":
        if shape.enum:
            allowed = frozenset(shape.enum)
            found.append(lambda value: f"is none of {sorted(allowed)}: {value!r}" if value not in allowed else None)
        if pattern := shape.metadata.get("pattern"):
            matches = _compiled(pattern).fullmatch
            found.append(lambda value: f"does not match {pattern}: {_short(value)}" if not matches(value) else None)
    return found


def _compiled(pattern: str) -> Any:
    try:
        return re.compile(pattern)
    except re.error:
        return regex.compile(pattern)  # knows \p{L}, which re does not


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
