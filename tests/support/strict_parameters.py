"""Calls of AWS as strict as AWS: what botocore's models say of parameters, and botocore itself does not check.

botocore refuses unknown and missing names, wrong types, and what is too short or too small. It lets through what is too
long or too large, what is none of an enumeration, and what does not match a pattern: AWS answers ValidationException to
these. Whole calls are checked here, of every client, before anything answers them.

Each operation's check is made once, from the parts of its model that have such a bound, and skips all others.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import botocore.validate
import regex

Path = tuple[str | int, ...]
Check = Callable[[Any, Path], Iterator[str]]

# Bounds of AWS's models that AWS itself does not keep, by operation or shape, each with its reason.
NOT_KEPT: dict[str, str] = {}


class RefusedByAws(AssertionError):
    """A call that AWS would refuse. No error of botocore's, so that no handling of those hides it."""


refused: list[str] = []
"""The calls that were refused since somebody looked: code that catches everything does not hide one either."""

_checks: dict[tuple[str, str], Check | None] = {}


def check_call(operation_model: Any, parameters: dict[str, Any]) -> None:
    """Refuse parameters beyond the bounds of their model.

    Raises:
        RefusedByAws: Which ones, with the value and the bound.
    """
    key = operation_model.service_model.service_name, operation_model.name
    if key not in _checks:
        shape = operation_model.input_shape
        _checks[key] = _made(shape, {}) if shape is not None else None
    check = _checks[key]
    if check is not None and (found := list(check(parameters, ()))):
        refused.append(f"{':'.join(key)}: {'; '.join(found)}")
        raise RefusedByAws(refused[-1])


def install() -> None:
    """Check each call of each client of botocore in this process."""
    decorator: Any = botocore.validate.ParamValidationDecorator
    if decorator.serialize_to_request is _strict:
        return
    decorator.serialize_to_request = _strict


_serialize_to_request: Any = botocore.validate.ParamValidationDecorator.serialize_to_request


def _strict(self: Any, parameters: dict[str, Any], operation_model: Any) -> Any:
    # First, as far as botocore itself goes: names, types, what is missing.
    request = _serialize_to_request(self, parameters, operation_model)
    check_call(operation_model, parameters)
    return request


def _made(shape: Any, within: dict[str, Any]) -> Check | None:
    """The check of values of a shape, or None if it has no bound; `within` are the checks that are being made."""
    if shape.name in within:
        # A shape within itself, such as a list of attribute values: looked up when it is met.
        return lambda value, path: checks(value, path) if (checks := within[shape.name]) else iter(())
    within[shape.name] = None
    members: dict[str, Check] = {}
    if shape.type_name == "structure":
        members = {name: made for name, each in shape.members.items() if (made := _made(each, within))}
    elif shape.type_name == "list":
        members = {"": made} if (made := _made(shape.member, within)) else {}
    elif shape.type_name == "map":
        pair = (("key", shape.key), ("value", shape.value))
        members = {name: made for name, each in pair if (made := _made(each, within))}
    own = _bounds(shape)
    if not own and not members:
        return None
    of_type: dict[str, Callable[[Any, Path], Iterator[str]]] = {
        "structure": lambda value, path: _structure(members, value, path),
        "list": lambda value, path: _list(members, value, path),
        "map": lambda value, path: _map(members, value, path),
    }
    inner = of_type.get(shape.type_name)

    def check(value: Any, path: Path) -> Iterator[str]:
        for bound in own:
            if reason := bound(value):
                yield f"{'.'.join(map(str, path))} {reason}"
        if inner is not None:
            yield from inner(value, path)

    within[shape.name] = check
    return check


def _structure(members: dict[str, Check], value: Any, path: Path) -> Iterator[str]:
    for name, check in members.items():
        if value.get(name) is not None:
            yield from check(value[name], (*path, name))


def _list(members: dict[str, Check], value: Any, path: Path) -> Iterator[str]:
    if members:
        for index, each in enumerate(value):
            yield from members[""](each, (*path, index))


def _map(members: dict[str, Check], value: Any, path: Path) -> Iterator[str]:
    for name, each in value.items():
        if "key" in members:
            yield from members["key"](name, (*path, name))
        if "value" in members:
            yield from members["value"](each, (*path, name))


def _bounds(shape: Any) -> list[Callable[[Any], str | None]]:
    """What the model says of a shape's own value; each tells what is wrong, or None."""
    if shape.name in NOT_KEPT:
        return []
    found: list[Callable[[Any], str | None]] = []
    least, most = shape.metadata.get("min"), shape.metadata.get("max")
    kind = shape.type_name
    if kind in ("integer", "long", "float", "double"):
        if least is not None or most is not None:
            found.append(lambda value: _outside("is", value, value, least, most))
    elif (least is not None or most is not None) and kind in ("string", "blob", "list", "map"):
        unit = {"string": "characters", "blob": "bytes"}.get(kind, "entries")
        found.append(lambda value: _outside(f"has {unit}:", _length(value), value, least, most))
    if kind == "string":
        if shape.enum:
            found.append(lambda value: None if value in shape.enum else f"is none of {shape.enum}: {value!r}")
        if pattern := shape.metadata.get("pattern"):
            matches = _compiled(pattern).fullmatch
            found.append(lambda value: None if matches(value) else f"does not match {pattern}: {_short(value)}")
    return found


def _outside(what: str, amount: Any, value: Any, least: Any, most: Any) -> str | None:
    if least is not None and amount < least:
        return f"{what} {amount}, must be at least {least}: {_short(value)}"
    if most is not None and amount > most:
        return f"{what} {amount}, must be at most {most}: {_short(value)}"
    return None


def _length(value: Any) -> int:
    # A stream's length is not known before it is read.
    return len(value) if hasattr(value, "__len__") else 0


def _compiled(pattern: str) -> Any:
    try:
        return re.compile(pattern)
    except re.error:
        return regex.compile(pattern)  # knows \p{L}, which re does not


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
