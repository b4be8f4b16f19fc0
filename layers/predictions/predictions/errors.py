"""Errors that cross a module's border.

    PredictionsError
    ├── Problem                 an answer for the caller (RFC 7807), raised before anything was written or spent
    ├── PredictionThrottled     caught by name in `track_prediction`: submit again after that many seconds
    ├── CopyInterrupted         caught by name in `track_prediction`: copy again later
    └── NoLongerWanted          a message for something that has stopped meanwhile: nothing is started, nothing is wrong

Errors that one module raises for its direct caller are defined in that module, below `PredictionsError`.
Step Functions sees the class's name, so these two names are part of the state machine's definition.
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any


class PredictionsError(Exception):
    """The root of everything this library raises on purpose."""


class Problem(PredictionsError):
    """An answer other than success, as an RFC 7807 problem.

    Args:
        status: HTTP status of the answer.
        detail: What was wrong, where, and what to do, for the person who reads it.
        title: A short name of the kind of problem; by default the status's standard phrase.
        invalid_fields: One `{"field": …, "detail": …}` for each field that was refused.
        headers: Headers of the answer, such as `Retry-After`.
        upstream_status: The HTTP status with which Replicate refused it, where that is why.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        title: str | None = None,
        invalid_fields: Sequence[Mapping[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        upstream_status: int | None = None,
    ) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail
        # Replicate may answer with a status that has no name.
        self.title = title or (HTTPStatus(status).phrase if status in set(HTTPStatus) else "Request refused")
        self.invalid_fields = list(invalid_fields)
        self.headers = dict(headers or {})
        self.upstream_status = upstream_status

    def body(self) -> dict[str, Any]:
        """The problem as the JSON of `application/problem+json`."""
        body: dict[str, Any] = {"title": self.title, "detail": self.detail, "status": self.status}
        if self.invalid_fields:
            body["invalid_fields"] = self.invalid_fields
        return body


class PredictionThrottled(PredictionsError):
    """Replicate did not take the prediction now and has not started it; it may be submitted again.

    The message is the number of seconds to wait and nothing else: the state machine reads it as a number.
    """

    def __init__(self, seconds: int) -> None:
        super().__init__(str(seconds))
        self.seconds = seconds


class CopyInterrupted(PredictionsError):
    """Some outputs could not be copied now, but may be later; files that are stored stay stored."""


class NoLongerWanted(PredictionsError):
    """What a message asks for is not wanted any more, as with a line of a batch that was canceled."""
