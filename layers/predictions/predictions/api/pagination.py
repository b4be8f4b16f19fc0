"""Paging of lists: opaque cursors that are safe if forged, and filters.

A cursor encodes where a page starts and its direction.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from predictions.aws.clients import api_url
from predictions.errors import Problem
from predictions.ids import is_model_name
from predictions.intents.labels import read_label
from predictions.status import Status, visible
from predictions.store.records import ORIGINS, Filters
from predictions.validation import fields_refused

FILTERS = ("status", "model", "origin", "label")
"""The query parameters of `read_filters`."""

_CHOICES = {"status": tuple(dict.fromkeys(map(visible, Status))), "origin": ORIGINS}


def cursor_url(path: str, place: str | None, *, older: bool, filters: Mapping[str, str] | None = None) -> str | None:
    """Return the URL of the page next to a position, or None if it does not exist.

    Args:
        path: The list's route, such as `/files`.
        place: `{created_at}#{id}`.
        older: Whether the page holds the older entries.
        filters: The list's other query parameters, repeated in the URL.
    """
    if place is None:
        return None
    cursor = base64.urlsafe_b64encode(f"{'o' if older else 'n'}{place}".encode()).decode().rstrip("=")
    return f"{api_url()}{path}?{urlencode({'cursor': cursor, **(filters or {})})}"


def page_body(
    path: str,
    start: str | None,
    results: Sequence[dict[str, Any]],
    *,
    older: bool,
    first: str | None,
    beyond: str | None,
    filters: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the body of a list's response: results, and the neighbours' URLs as `previous` and `next` (older).

    Args:
        path: The list's route, such as `/files`.
        start: The position next to which the page starts; None for the newest page.
        results: What the page shows, from `start` on.
        older: Whether the page holds the entries older than `start`.
        first: The position of the page's entry nearest to `start`; None if the page is empty.
        beyond: The position of the page's last entry, if more entries follow.
        filters: The list's other query parameters, repeated in the URLs.
    """
    before = first if start else None
    newer, further = (before, beyond) if older else (beyond, before)
    return {
        "previous": cursor_url(path, newer, older=False, filters=filters),
        "next": cursor_url(path, further, older=True, filters=filters),
        "results": list(results) if older else list(results[::-1]),
    }


def read_cursor(cursor: str) -> tuple[bool, str | None]:
    """Return a cursor's direction (whether older) and position, None if newest.

    Raises:
        Problem: 422 if it is not a cursor of this API. A cursor does not name the owner, so a forged one shows nothing
            of other owners.
    """
    if not cursor:
        return True, None
    try:
        text = base64.urlsafe_b64decode(cursor.encode() + b"=" * (-len(cursor) % 4)).decode("ascii")
    except ValueError:
        text = ""
    found = re.fullmatch(r"([no])(\d{4}-\d\d-\d\dT[\d:.]{8,15}Z#[a-z0-9]{26})", text, re.ASCII)
    if not found:
        detail = "Not a valid cursor. Use the URLs in `next` and `previous` unchanged."
        raise Problem(422, detail, invalid_fields=[{"field": "cursor", "detail": detail}])
    return found[1] == "o", found[2]


def read_moment(name: str, text: str) -> datetime:
    """Parse an ISO 8601 date-time and return it in UTC, the default offset.

    Args:
        name: The parameter's name.
        text: Its value.

    Raises:
        Problem: 422 if it is not a date-time.
    """
    upper = text.upper()
    form = r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:?\d\d)?)?"
    try:
        if re.fullmatch(form, upper, re.ASCII):
            moment = datetime.fromisoformat(upper)
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        pass  # not a calendar date, or out of range
    detail = "Must be an ISO 8601 date-time, such as 2025-01-31T12:00:00Z. Encode a `+` in a query as %2B."
    raise Problem(422, detail, invalid_fields=[{"field": name, "detail": detail}])


def read_filters(query: Mapping[str, str]) -> Filters:
    """Return the filters in a list's query parameters, all of them in `FILTERS`; others are ignored.

    Raises:
        Problem: 422 for a status or an origin that no prediction has, or a model or label without the form of one.
    """
    given = {name: query[name] for name in FILTERS if name in query}
    label = read_label(given.pop("label")) if "label" in given else None
    invalid = []
    for name, choices in _CHOICES.items():
        if given.get(name, choices[0]) not in choices:
            listed = ", ".join(f"`{choice}`" for choice in choices)
            invalid.append({"field": name, "detail": f"Must be one of {listed} (got {given[name][:50]!a})."})
    if "model" in given and not is_model_name(given["model"]):
        detail = f"Must be a model's name, `owner/name`, without a version (got {given['model'][:50]!a})."
        invalid.append({"field": "model", "detail": detail})
    if invalid:
        raise fields_refused(invalid)
    return Filters(**given, label=label)
