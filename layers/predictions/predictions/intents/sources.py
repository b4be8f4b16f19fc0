"""Sources of intents: messages of the requests queue, and what turns them into intents."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from predictions.errors import PredictionsError
from predictions.intents.model import Intent


class RequestRefused(PredictionsError):
    """A message that can start nothing, now or later; its text is the reason, for the person who finds it."""


@dataclass(frozen=True)
class Message:
    """A message of the requests queue.

    Attributes:
        id: What it is known by for good: its own id, or the first one's where it was redriven.
        sender: The principal that sent it, as SQS says (`SenderId`).
        body: Its text.
        sent_at: When it was sent first, in Unix seconds: what depends on the time has to come out the same again.
    """

    id: str
    sender: str
    body: str
    sent_at: int


class Source(Protocol):
    """What turns a message that names something stored into an intent: recipes, batches, pipelines."""

    def intent(self, body: Mapping[str, Any], message: Message) -> Intent | None:
        """The intent; None where it is no longer wanted, and nothing has to be said of that.

        Twice, it gives an intent with the same id.

        Raises:
            RequestRefused: It never can.
            Problem: 422, with the fields.
        """
