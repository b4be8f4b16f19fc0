"""Labels of a request: up to 10 pairs of key and value by which its owner groups predictions, and their costs.

Labels are never sent to Replicate, and are no part of a request's fingerprint: a retry with other labels finds the same
prediction, with the labels of the first request. They are given as an object of texts, or in the header `X-Labels`:

    X-Labels: team=vision,project=spring%20catalog

In the header, values are percent-encoded UTF-8: at least commas, spaces, `%` and all that is not ASCII.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from predictions.errors import Problem

LABELS_LIMIT = 10
"""The limit of labels of a request."""

LABELS_LIMIT_BYTES = 1024
"""The limit of all keys and values together, in bytes of UTF-8; and of the header, in characters."""

VALUE_LIMIT_CHARACTERS = 256
"""The limit of a value."""

HEADER = "X-Labels"

_KEY = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_VALUE = re.compile(rf"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{{1,{VALUE_LIMIT_CHARACTERS}}}")
_PAIR = re.compile(r"([A-Za-z0-9_.-]{1,64})=((?:[\x21-\x24\x26-\x2b\x2d-\x7e]|%[0-9A-Fa-f]{2})+)", re.ASCII)

_KEY_DETAIL = "The key must be 1 to 64 letters, digits, `_`, `.` and `-`."
_VALUE_DETAIL = (
    f"The value must be a text of 1 to {VALUE_LIMIT_CHARACTERS} characters, none of them a control character"
)
_PAIR_DETAIL = (
    "Must be `key=value` pairs, separated by commas: each key 1 to 64 letters, digits, `_`, `.` and `-`, each value"
    " percent-encoded ASCII"
)

Violations = list[dict[str, str]]


def read_labels(value: Any, invalid: Violations, field: str = "labels") -> dict[str, str]:
    """Return the labels in an object; violations are added to `invalid`.

    Args:
        value: Parsed JSON, untrusted; None without labels.
        invalid: `{"field", "detail"}` of what is wrong.
        field: The name of the object.
    """
    if value is None:
        return {}
    found = list(_violations(value, field))
    invalid += found
    return {} if found else dict(value)


def header_labels(text: str, invalid: Violations) -> dict[str, str]:
    """Return the labels in a header `X-Labels`; violations are added to `invalid`.

    Args:
        text: The value of the header, untrusted; values of a repeated header are joined by commas.
        invalid: `{"field", "detail"}` of what is wrong.
    """
    labels: dict[str, str] = {}
    try:
        if len(text) > LABELS_LIMIT_BYTES:
            raise ValueError(f"Exceeds the limit of {LABELS_LIMIT_BYTES} characters (got {len(text)}).")
        for part in text.split(",") if text.strip() else ():
            pair = _PAIR.fullmatch(part.strip(" \t"))
            if pair is None:
                raise ValueError(f"{_PAIR_DETAIL} (got {part[:50]!a}).")
            key, value = pair[1], unquote_to_bytes(pair[2]).decode()
            if key in labels:
                raise ValueError(f"The key {key!a} is given twice. Give each key once.")
            labels[key] = value
    except UnicodeDecodeError:
        invalid.append({"field": HEADER, "detail": "The percent-encoded values must be UTF-8."})
        return {}
    except ValueError as error:
        invalid.append({"field": HEADER, "detail": str(error)})
        return {}
    found = list(_violations(labels, HEADER))
    invalid += found
    return {} if found else labels


def read_label(text: str) -> tuple[str, str]:
    """Return key and value of a label in a list's query, `key=value`.

    Raises:
        Problem: 422 if it is not a label.
    """
    key, _, value = text.partition("=")
    if not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
        detail = f"Must be a label, `key=value`, such as `team=vision` (got {text[:50]!a})."
        raise Problem(422, detail, invalid_fields=[{"field": "label", "detail": detail}])
    return key, value


def filled_labels(labels: Any) -> Any:
    """Return the filled template of labels, with numbers and booleans that a placeholder gave as texts."""
    if not isinstance(labels, Mapping):
        return labels
    return {key: json.dumps(part) if isinstance(part, bool | int | float) else part for key, part in labels.items()}


def with_common_labels(request: dict[str, Any], common: Mapping[str, str]) -> dict[str, Any]:
    """Return a request with labels that many have in common; a label of the request's own has precedence."""
    own = request.get("labels")
    if not common or not isinstance(own, Mapping | None):
        return request
    return {**request, "labels": {**common, **(own or {})}}


def _violations(labels: Any, field: str) -> Iterator[dict[str, str]]:
    if not isinstance(labels, Mapping):
        yield {"field": field, "detail": 'Must be an object of texts, such as {"team": "vision"}.'}
        return
    if len(labels) > LABELS_LIMIT:
        yield {"field": field, "detail": f"Exceeds the limit of {LABELS_LIMIT} labels (got {len(labels)})."}
        return
    texts = [text for pair in labels.items() for text in pair if isinstance(text, str)]
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if size > LABELS_LIMIT_BYTES:
        detail = f"Exceeds the limit of {LABELS_LIMIT_BYTES} bytes for all keys and values together (got {size})."
        yield {"field": field, "detail": detail}
    for key, value in labels.items():
        if not _KEY.fullmatch(key):
            yield {"field": field, "detail": f"{_KEY_DETAIL} (got {key[:80]!a})"}
        elif not isinstance(value, str) or not _VALUE.fullmatch(value):
            got = f"{len(value)} characters" if isinstance(value, str) else type(value).__name__
            yield {"field": f"{field}.{key}", "detail": f"{_VALUE_DETAIL} (got {got})."}
