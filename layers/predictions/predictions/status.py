"""The words for where a prediction stands, and their order."""

from enum import StrEnum


class Status(StrEnum):
    """A prediction's status, in Replicate's words, and `queued`, ours, before anything was submitted."""

    QUEUED = "queued"
    STARTING = "starting"
    PROCESSING = "processing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    ABORTED = "aborted"


TERMINAL_RANK = 9
"""The rank of every status that never changes again."""

DEFAULT_WEBHOOK_EVENTS = ("output", "completed")
"""What a caller who names no events is told of: https://replicate.com/docs/topics/webhooks/setup-webhook"""

_WORDS = frozenset(status.value for status in Status)
_RANKS = {Status.QUEUED: 0, Status.STARTING: 1, Status.PROCESSING: 2}


def rank_of(status: str) -> int:
    """The rank of a status: a write may only raise it.

    A word that is not in Replicate's vocabulary ranks lowest, so that it can never change an item: the prediction
    goes on being polled, and ends by its deadline at the latest.
    """
    if status not in _WORDS:
        return 0
    return _RANKS.get(Status(status), TERMINAL_RANK)


def visible(status: str) -> str:
    """The status as callers see it.

    Replicate's official clients poll for ever, or fail to parse, on `aborted` (seen with replicate 1.0.7 and
    2.0.0b4 for Python and 1.4.0 for JavaScript), and do not know `queued`.
    """
    return {Status.ABORTED: Status.CANCELED, Status.QUEUED: Status.STARTING}.get(Status(status), Status(status)).value
