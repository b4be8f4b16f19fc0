"""Pages of a list: cursors, opaque to callers and harmless when made up, and the moments that a list is between.

A cursor says where a page starts and on which side.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from predictions.aws.clients import api_url
from predictions.errors import Problem


def cursor_url(path: str, place: str | None, *, older: bool, filters: Mapping[str, str] | None = None) -> str | None:
    """The URL of the page beside a place in a list; None where there is no such page.

    Args:
        path: The list's route, such as `/files`.
        place: `{created_at}#{id}`.
        older: Whether the page lies on the older side of it.
        filters: The list's other parameters, which its pages keep.
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
        start: The place beside which the page starts; None for the newest page.
        results: What the page shows, from `start` on.
        older: Whether the page lies on the older side of it.
        first: The place of the first of the page, from `start` on; None on an empty page.
        beyond: The place of the last one, where there are further ones.
        filters: The list's other parameters, which its pages keep.
    """
    before = first if start else None
    newer, further = (before, beyond) if older else (beyond, before)
    return {
        "previous": cursor_url(path, newer, older=False, filters=filters),
        "next": cursor_url(path, further, older=True, filters=filters),
        "results": list(results) if older else list(results[::-1]),
    }


def read_cursor(cursor: str) -> tuple[bool, str | None]:
    """Whether a page lies on the older side of its place, and the place; the newest page where there is no cursor.

    Raises:
        Problem: 422, where it is none of ours. The owner is not in it, so a made-up one shows nothing of others.
    """
    if not cursor:
        return True, None
    try:
        text = base64.urlsafe_b64decode(cursor.encode() + b"=" * (-len(cursor) % 4)).decode("ascii")
    except ValueError:
        text = ""
    found = re.fullmatch(r"([no])(\d{4}-\d\d-\d\dT[\d:.]{8,15}Z#[a-z0-9]{26})", text, re.ASCII)
    if not found:
        detail = "Not a cursor of this API: take it from `next` or `previous` as it is."
        raise Problem(422, detail, invalid_fields=[{"field": "cursor", "detail": detail}])
    return found[1] == "o", found[2]


def read_moment(name: str, text: str) -> datetime:
    """A moment in ISO 8601, in UTC; one without an offset is UTC's.

    Args:
        name: The parameter's.
        text: Its value.

    Raises:
        Problem: 422, where it is none.
    """
    upper = text.upper()
    form = r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:?\d\d)?)?"
    try:
        if re.fullmatch(form, upper, re.ASCII):
            moment = datetime.fromisoformat(upper)
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        pass  # no such day, or before the first one
    detail = "Has to be a date-time in ISO 8601, such as 2025-01-31T12:00:00Z; a `+` in a query is sent as %2B."
    raise Problem(422, detail, invalid_fields=[{"field": name, "detail": detail}])
