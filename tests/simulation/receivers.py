"""The receivers of callers' webhooks, who take them at once, late, at the third try, never, or not at all."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from predictions.net.signatures import verify

if TYPE_CHECKING:
    from tests.simulation.world import World

TRY_SECONDS = 10.0
"""What one try may take, whatever the receiver does."""


@dataclass(frozen=True)
class Call:
    """One POST to a receiver, and what he answered; None where no answer came in time."""

    at: float
    webhook_id: str
    status: int | None
    told: dict[str, Any]

    @property
    def taken(self) -> bool:
        """Whether it is delivered."""
        return self.status is not None and (200 <= self.status < 300 or self.status == 410)


class Receivers:
    """All receivers, by their URL: `https://hooks.example/{kind}/{name}`."""

    KINDS = ("takes", "takes", "slow", "third try", "an hour down", "breaks", "gone", "refuses", "hangs")

    def __init__(self, world: "World") -> None:
        self.calls: dict[str, list[Call]] = {}
        self._world = world

    def url(self, kind: str, name: str) -> str:
        """The URL of a new receiver."""
        return f"https://hooks.example/{kind.replace(' ', '-')}/{name}"

    def handle(self, request: httpx.Request) -> httpx.Response:
        """Answers one POST, or fails as one fails."""
        world, url = self._world, str(request.url)
        kind = request.url.path.split("/")[1].replace("-", " ")
        before = self.calls.setdefault(url, [])
        name, body = request.headers["webhook-id"], request.read()
        verify(body, request.headers, world.signing_secrets(url), world.scheduler.now)
        began, told = world.scheduler.now, json.loads(body)
        tries = sum(call.webhook_id == name for call in before)
        status: int | None = 200
        match kind:
            case "slow":
                world.step("receiver", 7.0)
            case "third try" if tries < 2:
                status = 503
            case "an hour down" if before and began < before[0].at + 3600:
                status = 500
            case "an hour down" if not before:
                status = 500
            case "breaks" if tries < 1:
                before.append(Call(began, name, None, told))
                raise httpx.RemoteProtocolError("broke off")
            case "gone":
                status = 410
            case "refuses":
                status = 403
            case "hangs":
                before.append(Call(began, name, None, told))
                world.step("receiver", TRY_SECONDS)
                raise httpx.ReadTimeout("no answer")
        world.step("receiver", 0.1)
        before.append(Call(began, name, status, told))
        world.note(f"{url} answers {status} to {name}")
        return httpx.Response(status or 500, stream=httpx.ByteStream(b"noted"))
