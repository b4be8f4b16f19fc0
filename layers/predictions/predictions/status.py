"""Prediction statuses and their ordering."""

from enum import StrEnum


class Status(StrEnum):
    """A prediction's status, in Replicate's terms, plus `queued` (ours) until it is submitted."""

    QUEUED = "queued"
    STARTING = "starting"
    PROCESSING = "processing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    ABORTED = "aborted"


TERMINAL_RANK = 9
"""The rank of every terminal status, which never changes."""

DEFAULT_WEBHOOK_EVENTS = ("output", "completed")
"""The webhook events that are sent if the caller names none: https://replicate.com/docs/topics/webhooks/setup-webhook"""

_WORDS = frozenset(status.value for status in Status)
_RANKS = {Status.QUEUED: 0, Status.STARTING: 1, Status.PROCESSING: 2}


def rank_of(status: str) -> int:
    """Return the rank of a status. A write may only raise the rank.

    A word that is not in Replicate's vocabulary ranks lowest, so that it can never change an item: the prediction
    is still polled, and finishes at its deadline at the latest.
    """
    if status not in _WORDS:
        return 0
    return _RANKS.get(Status(status), TERMINAL_RANK)


def visible(status: str) -> str:
    """Return the status that callers see.

    Replicate's official clients poll forever, or fail to parse the response, on `aborted` (seen with replicate
    1.0.7 and 2.0.0b4 for Python and 1.4.0 for JavaScript), and do not know `queued`.
    """
    return {Status.ABORTED: Status.CANCELED, Status.QUEUED: Status.STARTING}.get(Status(status), Status(status)).value
