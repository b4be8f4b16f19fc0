"""Messages of the requests queue, and the interface of the parsers that turn them into intents."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from predictions.errors import PredictionsError
from predictions.intents.model import Intent


class RequestRefused(PredictionsError):
    """The message can never start anything; the error's text is the reason, for an operator."""


@dataclass(frozen=True)
class Message:
    """A message of the requests queue.

    Attributes:
        id: Its permanent id: its own, or that of the original message if it was redriven.
        sender: The principal that sent it, as reported by SQS (`SenderId`).
        body: The message's text.
        sent_at: When it was first sent, in Unix seconds, so that time-dependent results are the same on a retry.
        traceparent: The trace in the message's attribute `traceparent`, or None.
    """

    id: str
    sender: str
    body: str
    sent_at: int
    traceparent: str | None = None


class Source(Protocol):
    """Turns a message that refers to a recipe, batch or pipeline into an intent."""

    def intent(self, body: Mapping[str, Any], message: Message) -> Intent | None:
        """Return the intent, or None if it is no longer active and this needs no report.

        Called again for the same message, it returns an intent with the same id.

        Raises:
            RequestRefused: The message can never start anything.
            Problem: 422, with the fields.
        """
