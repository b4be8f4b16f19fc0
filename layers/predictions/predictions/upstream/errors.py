"""Errors of calls to Replicate.

The protocol needs to know one thing of a failed create: can it have started a prediction or not? So every outcome
that is no prediction is one of

    NotAccepted        nothing was started: connection never made, or a 4xx
    ├── Throttled      429
    ├── Unauthorized   401, 402 or 403: the stack's own token or credit
    └── Refused        any other 4xx: the request's own fault
    OutcomeUnknown     a prediction may have been started: timeout, reset, 5xx, a response that cannot be read

and a read that fails is

    NotFound           404: Replicate does not know it
    Unavailable        anything else: ask again later
"""

from predictions.errors import PredictionsError


class UpstreamError(PredictionsError):
    """A call to Replicate failed."""


class NotAccepted(UpstreamError):
    """Replicate has not started anything.

    Attributes:
        status: The HTTP status, or None where no connection was made.
        detail: Replicate's explanation.
        invalid_fields: The first of the fields that Replicate refused.
        fields_left_out: How many more it refused.
    """

    def __init__(
        self,
        status: int | None,
        detail: str,
        invalid_fields: list[dict[str, str]] | None = None,
        fields_left_out: int = 0,
    ) -> None:
        super().__init__(f"{status or 'no connection'}: {detail}")
        self.status = status
        self.detail = detail
        self.invalid_fields = invalid_fields or []
        self.fields_left_out = fields_left_out


class Throttled(NotAccepted):
    """429; `seconds` is how long to wait."""

    def __init__(self, detail: str, seconds: int) -> None:
        super().__init__(429, detail)
        self.seconds = seconds


class Unauthorized(NotAccepted):
    """401, 402, 403 or no token: the operator has to fix the stack's token or credit."""


class Refused(NotAccepted):
    """Another 4xx: the request itself is refused."""


class OutcomeUnknown(UpstreamError):
    """A prediction may have been started, or not.

    Attributes:
        status: The HTTP status of the response, or None without a response.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class TokenUnreadable(UpstreamError):
    """The stack's token cannot be read, or is not valid; nothing was sent."""


class NotFound(UpstreamError):
    """404 to a read: not found, or not any more."""


class Unavailable(UpstreamError):
    """A read failed, with no information about its subject: retry later.

    Attributes:
        status: The HTTP status, or None where there was no response to go by.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class AnswerTooLargeError(UpstreamError):
    """A response is larger than a function can hold."""
