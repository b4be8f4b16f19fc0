"""Errors that are raised across module boundaries.

    PredictionsError
    ├── Problem                 an error response for the caller (RFC 7807), raised before anything is written or spent
    ├── PredictionThrottled     caught by name in `track_prediction`: submit again after that many seconds
    ├── BudgetReached           a budget has no room for a prediction: its caller gets 429, or it waits
    ├── CopyInterrupted         caught by name in `track_prediction`: copy again later
    ├── OutputsToCopy           caught by name in `track_prediction`: the prediction has completed, with files
    └── NoLongerWanted          the batch, pipeline or recipe of a message is no longer active: nothing is started

Errors that one module raises for its direct caller are defined in that module, below `PredictionsError`.
Step Functions sees the class's name, so these three names are part of the state machine's definition.
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any


class PredictionsError(Exception):
    """Base class of all errors that this library raises on purpose."""


class Problem(PredictionsError):
    """An error response, as an RFC 7807 problem.

    Args:
        status: HTTP status of the response.
        detail: The invalid value, the rule and the remedy, for the person who reads it.
        title: A short name of the kind of problem; by default the status's standard phrase.
        invalid_fields: One `{"field": …, "detail": …}` for each invalid field.
        headers: Headers of the response, such as `Retry-After`.
        upstream_status: The HTTP status of Replicate's response, if that is the cause.
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
        # Replicate may respond with a status that has no name.
        self.title = title or (HTTPStatus(status).phrase if status in set(HTTPStatus) else "Request refused")
        self.invalid_fields = list(invalid_fields)
        self.headers = dict(headers or {})
        self.upstream_status = upstream_status

    def body(self) -> dict[str, Any]:
        """Return the problem as the JSON of `application/problem+json`."""
        body: dict[str, Any] = {"title": self.title, "detail": self.detail, "status": self.status}
        if self.invalid_fields:
            body["invalid_fields"] = self.invalid_fields
        return body


class PredictionThrottled(PredictionsError):
    """Replicate rejected the prediction for now and did not start it; it may be submitted again.

    The message is the number of seconds to wait and nothing else: the state machine reads it as a number.
    """

    def __init__(self, seconds: int) -> None:
        super().__init__(str(seconds))
        self.seconds = seconds


class BudgetReached(PredictionsError):
    """A budget has no room for a prediction; nothing was written or started.

    Attributes:
        detail: Which budget, what is used of it, its limit, and when it resets.
        seconds: Until it resets.
    """

    def __init__(self, detail: str, seconds: int) -> None:
        super().__init__(detail)
        self.detail = detail
        self.seconds = seconds

    @property
    def refusal(self) -> Problem:
        """The response for the caller."""
        return Problem(429, self.detail, title="Budget used up", headers={"Retry-After": str(self.seconds)})


class CopyInterrupted(PredictionsError):
    """Some outputs could not be copied yet; a retry may succeed, and stored files stay stored."""


class OutputsToCopy(PredictionsError):
    """A prediction has completed with files. Never raised: it is sent with a task token, and leads to `CopyOutputs`."""


class NoLongerWanted(PredictionsError):
    """The request in a message is no longer active, for example a line of a canceled batch."""
