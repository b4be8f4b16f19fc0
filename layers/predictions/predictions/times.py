"""Moments as text: RFC 3339, in UTC."""

from datetime import UTC, datetime


def rfc3339(moment: float) -> str:
    """Write a moment, in Unix seconds, as `2030-01-31T12:00:00Z`; with microseconds if it has some."""
    return _utc(datetime.fromtimestamp(moment, UTC).isoformat())


def timestamp(moment: float | datetime) -> str:
    """Write a moment with microseconds, so that all texts have the same length and sort by time.

    Args:
        moment: Unix seconds, or a time with a zone.
    """
    given = moment if isinstance(moment, datetime) else datetime.fromtimestamp(moment, UTC)
    return _utc(given.astimezone(UTC).isoformat(timespec="microseconds"))


def _utc(text: str) -> str:
    return text.replace("+00:00", "Z")
