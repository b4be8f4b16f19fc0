"""Times as texts, and waits between retries."""

from datetime import UTC, datetime


def rfc3339(moment: float | datetime, timespec: str = "auto") -> str:
    """Return a moment (a number is Unix seconds) as RFC 3339 in UTC, ending in `Z`.

    Args:
        moment: The moment.
        timespec: Its precision, as for `datetime.isoformat`: by default microseconds where there are any.
    """
    given = moment if isinstance(moment, datetime) else datetime.fromtimestamp(moment, UTC)
    return given.astimezone(UTC).isoformat(timespec=timespec).replace("+00:00", "Z")


def timestamp(moment: float | datetime) -> str:
    """Return a moment as RFC 3339 with microseconds, so that all texts have one length and sort by time."""
    return rfc3339(moment, "microseconds")


def parse_rfc3339(text: object) -> datetime | None:
    """Return the moment of an RFC 3339 text, or None if it is not one with an offset.

    Of fractional digits, of which Replicate writes 0 to 9, six are kept.
    """
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else None


def backoff_seconds(first_seconds: int, failures: int, most_seconds: int) -> int:
    """Return the wait after so many failures: exponential backoff."""
    doubled: int = 2 ** min(failures, 10)
    return min(most_seconds, first_seconds * doubled)


def retry_seconds(passed_seconds: float, first_seconds: int, most_seconds: float, jitter: float) -> float:
    """Return the wait before a retry: twice the time since the first attempt.

    Nothing but that time counts, so a crash or a message that comes twice cannot upset it.

    Args:
        passed_seconds: The time since the first attempt.
        first_seconds: The shortest wait.
        most_seconds: The longest wait.
        jitter: Random, from 0 to 1, for a fifth less or more: what failed together is not retried together.
    """
    return min(max(2 * passed_seconds, first_seconds), most_seconds) * (0.8 + 0.4 * jitter)
