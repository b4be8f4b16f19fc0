"""Checks of untrusted JSON: parsing within limits, refusals, canonical text."""

import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from predictions.errors import Problem

BODY_LIMIT_BYTES = 5 * 1024 * 1024
"""The largest body: Lambda takes 6 MB with the event around it.
https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html"""

DEPTH_LIMIT = 100
"""The deepest JSON: far above any model's input, far below what recursive code bears."""

_NUMBER_LIMIT = sys.float_info.max

FIELDS_LIMIT = 50
"""The most fields that one response names: a body may hold any number of unknown fields."""

_CHARSET = re.compile(r";\s*charset\s*=\s*[\"']?([^;\"'\s]*)", re.IGNORECASE)


def parse_json(body: bytes, content_type: str | None) -> Any:
    """Parse an untrusted body as JSON that can be stored and written again.

    Raises:
        Problem: 413 above `BODY_LIMIT_BYTES`; 415 for another media type or charset; 400 for what is not JSON
            (RFC 8259), is nested deeper than `DEPTH_LIMIT`, gives one key twice (which of them is meant, readers
            disagree), or holds numbers or text that JSON cannot carry on.
    """
    if len(body) > BODY_LIMIT_BYTES:
        raise Problem(
            413,
            f"The body has {len(body)} bytes, which exceeds the limit of {BODY_LIMIT_BYTES}."
            " Pass large files as https URLs in `input`.",
        )
    media_type = (content_type or "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise Problem(415, f"The body must be application/json, not {media_type[:100]!r}.")
    # JSON is UTF-8 (RFC 8259, 8.1), and names no charset; a sender that names another one means other text.
    charset = _CHARSET.search(content_type or "")
    if charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise Problem(415, f"The body must be UTF-8, not {charset[1][:30]!a}.")
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_object)
    except UnicodeDecodeError:
        raise Problem(400, "The body is not UTF-8.") from None
    except RecursionError:
        raise Problem(400, f"The body is nested deeper than {DEPTH_LIMIT} levels.") from None
    except ValueError as error:
        place = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise Problem(400, f"The body is not JSON{place}.") from None
    _check_json(value)
    return value


def fields_refused(fields: Sequence[Mapping[str, str]]) -> Problem:
    """Return the problem that names every refused field, at most `FIELDS_LIMIT`.

    Args:
        fields: `{"field": …, "detail": …}` of each.
    """
    return Problem(422, list_fields(fields[:5]), title="Input validation failed", invalid_fields=fields[:FIELDS_LIMIT])


def list_fields(fields: Iterable[Mapping[str, str]]) -> str:
    """Return refused fields as one line of text."""
    return " ".join(f"{each['field']}: {each['detail']}" for each in fields)


UNKNOWN_FIELD = "The model does not know this field."
"""How `upstream.input_schema` begins the detail of a field that a model's schema does not have."""


def certain_violations(violations: Iterable[dict[str, str]], open_fields: Collection[str]) -> list[dict[str, str]]:
    """Return the violations of a model's schema that hold whatever a template's placeholders find.

    The value of a placeholder is not known before it is filled, nor its effect on the values around and below it. A
    field that the model does not know is wrong with any value.

    Args:
        violations: Of the template, checked as if it were the input.
        open_fields: The places of its placeholders, as `input.images.0`.
    """
    return [
        each
        for each in violations
        if each["detail"].startswith(UNKNOWN_FIELD) or not any(_overlap(each["field"], field) for field in open_fields)
    ]


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def field_problem(field: str, error: Mapping[str, Any], known: Iterable[str] = ()) -> dict[str, str]:
    """Return how a field is refused by one of pydantic's errors.

    Args:
        field: Its name.
        error: One of `ValidationError.errors()`.
        known: The fields that there are, for one that is not among them.
    """
    detail = str(error["msg"])
    if error["type"] == "extra_forbidden":
        listed = ", ".join(f"`{name}`" for name in known)
        detail = f"Unknown field. The known fields are {listed}." if listed else "Unknown field."
    elif error["type"] == "missing":
        detail = "This field is required."
    return {"field": field, "detail": detail}


def input_json_canonical(value: Any) -> str:
    """Return JSON text that is equal for equal values; key order is ignored, 7.0 is 7."""
    return json.dumps(_with_whole_numbers(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _with_whole_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_whole_numbers(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_with_whole_numbers(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise Problem(400, f"The body gives the key {twice[:100]!a} twice in one object.")
    return made


def _check_json(value: Any) -> None:
    # Iterative: the depth is the caller's to choose.
    waiting: list[tuple[Any, int]] = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if depth > DEPTH_LIMIT:
            raise Problem(400, f"The body is nested deeper than {DEPTH_LIMIT} levels.")
        if isinstance(item, dict):
            waiting += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            waiting += [(part, depth + 1) for part in item]
        elif isinstance(item, int | float) and not -_NUMBER_LIMIT <= item <= _NUMBER_LIMIT:
            raise Problem(400, "The body holds a number that is too large for JSON's common range (a 64-bit float).")
        elif isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                raise Problem(400, "The body holds half of a surrogate pair, which is not a character.") from None
