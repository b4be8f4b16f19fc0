"""Cursors of pages: where one starts and on which side, opaque to callers and harmless when made up."""

import base64
import re

from predictions.aws import api_url
from predictions.errors import Problem


def cursor_url(path: str, place: str | None, *, older: bool) -> str | None:
    """The URL of the page beside a place in a list; None where there is no such page.

    Args:
        path: The list's route, such as `/files`.
        place: `{created_at}#{id}`.
        older: Whether the page lies on the older side of it.
    """
    if place is None:
        return None
    cursor = base64.urlsafe_b64encode(f"{'o' if older else 'n'}{place}".encode()).decode().rstrip("=")
    return f"{api_url()}{path}?cursor={cursor}"


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
