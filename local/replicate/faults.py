"""Control of the local Replicate by tests: faults, settings, and the record of its requests."""

import asyncio
import base64
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

JsonObject = dict[str, Any]

RECORDED = 20_000


class FaultName(StrEnum):
    """The faults, by their target."""

    CREATE_THROTTLED = "create_throttled"
    """429, nothing created. `retry_after_seconds` (30) is in the text; by `header`, `body_field` also there."""
    CREATE_REFUSED = "create_refused"
    """`status` (500), nothing created."""
    CREATE_RESET = "create_reset"
    """Nothing created; the connection is closed without a response."""
    CREATE_SILENCE = "create_silence"
    """Nothing created; no response for `seconds` (0: as long as the caller waits)."""
    CREATE_ACCEPTED_THEN_ERROR = "create_accepted_then_error"
    """The prediction is created and runs; the response is `status` (500)."""
    CREATE_ACCEPTED_THEN_RESET = "create_accepted_then_reset"
    """The prediction is created and runs; the connection is closed without a response."""
    CREATE_ACCEPTED_THEN_SILENCE = "create_accepted_then_silence"
    """The prediction is created and runs; no response for `seconds` (0: as long as the caller waits)."""
    CREATE_ANSWER_LATE = "create_answer_late"
    """The response is sent after `seconds` or a `release`; by `until_webhook`, after the terminal webhook."""
    CREATE_DATA_URLS = "create_data_urls"
    """The response to a create that waits is `processing` with the full output, its files as `data:` URLs."""
    START_LATE = "start_late"
    """The prediction stays `starting` for `seconds` (a cold boot), or until a `release`."""
    GET_ERROR = "get_error"
    """`GET /v1/predictions/{id}` responds with `status` (500); 404 looks as if the prediction did not exist."""
    GET_SILENCE = "get_silence"
    """`GET /v1/predictions/{id}` sends no response for `seconds` (0: as long as the caller waits)."""
    LIST_ERROR = "list_error"
    """`GET /v1/predictions` responds with `status` (500)."""
    CANCEL_ERROR = "cancel_error"
    """`POST /v1/predictions/{id}/cancel` responds with `status` (500) and cancels nothing."""
    OTHER_ERROR = "other_error"
    """Routes under /v1 other than predictions and trainings respond with `status` (500), and do nothing."""
    OTHER_RESET = "other_reset"
    """The same routes close the connection without a response."""
    OTHER_SILENCE = "other_silence"
    """The same routes send no response for `seconds` (0: as long as the caller waits)."""
    WEBHOOK_LOST = "webhook_lost"
    """Never sent, not even again."""
    WEBHOOK_LATE = "webhook_late"
    """Sent after `seconds` or a `release`; those behind it overtake it."""
    WEBHOOK_DUPLICATED = "webhook_duplicated"
    """Sent twice, with the same `webhook-id`."""
    WEBHOOK_REORDERED = "webhook_reordered"
    """Sent after the next webhook of the same prediction (or after 3 s without one)."""
    FILE_ERROR = "file_error"
    """`GET /files/…` responds with `status` (500)."""
    FILE_TRUNCATED = "file_truncated"
    """The connection is closed after `share` (0.5) of the announced bytes."""
    FILE_SLOW = "file_slow"
    """`bytes_per_second` (1000)."""
    FILE_REDIRECTED = "file_redirected"
    """302 to `location`."""


class Fault(BaseModel):
    """One fault: its kind, its count and its target.

    Attributes:
        times: How often it happens; null: until `reset`.
        model: Only for this model (`owner/name`).
        path: Only for requests whose path contains this.
        webhook: Only for predictions whose webhook URL contains this (our ids are in our webhook URLs).
        events: Only for webhooks of these events.
    """

    model_config = ConfigDict(extra="forbid")

    fault: FaultName
    times: Annotated[int, Field(ge=1)] | None = 1
    model: str | None = None
    path: str | None = None
    webhook: str | None = None
    events: list[Literal["start", "output", "logs", "completed"]] | None = None
    status: int = Field(default=500, ge=400, le=599)
    seconds: float = Field(default=0.0, ge=0, le=3600)
    retry_after_seconds: int = Field(default=30, ge=0)
    header: bool = False
    body_field: bool = False
    until_webhook: bool = False
    share: float = Field(default=0.5, ge=0, lt=1)
    bytes_per_second: int = Field(default=1000, ge=1)
    location: str = ""


def _signing_secret(value: str) -> str:
    base64.b64decode(value.removeprefix("whsec_"), validate=True)
    return value


class Settings(BaseModel):
    """The behaviour of the local Replicate without faults.

    Attributes:
        creates_per_minute: Token bucket of creates; holds that many at most. Also `others_per_minute`.
        removal_seconds: Seconds after completion for which a prediction keeps input, output, files and logs.
        webhook_retry_seconds: Seconds for which the terminal webhook is retried.
        list_lag_seconds: How old a prediction must be before the list shows it.
        signing_secret: Key of the webhook signatures, `whsec_<base64>`.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    creates_per_minute: int = Field(default=600, ge=1)
    others_per_minute: int = Field(default=3000, ge=1)
    removal_seconds: float = Field(default=3600.0, ge=0)
    webhook_retry_seconds: float = Field(default=60.0, ge=0)
    list_lag_seconds: float = Field(default=0.0, ge=0)
    signing_secret: Annotated[str, Field(pattern="^whsec_"), AfterValidator(_signing_secret)]


class Bucket:
    """A token bucket that holds at most one minute's worth."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._tokens = float(per_minute)
        self._at = clock()

    def take(self) -> tuple[bool, int, int]:
        """Take one token, if available.

        Returns:
            Whether one was available, the remaining number, and the seconds (at least 1) until the next one, or, if
            some remain, until the bucket is full.
        """
        now = self._clock()
        self._tokens = min(self.per_minute, self._tokens + (now - self._at) * self.per_minute / 60)
        self._at = now
        allowed = self._tokens >= 1
        if allowed:
            self._tokens -= 1
        missing = (self.per_minute if self._tokens >= 1 else 1) - self._tokens
        return allowed, int(self._tokens), max(1, round(missing * 60 / self.per_minute))


class Control:
    """The active faults, the settings, and the record."""

    def __init__(self, settings: Settings) -> None:
        self._at_start = settings
        self._faults: list[Fault] = []
        self._released = asyncio.Event()
        self.requests: deque[JsonObject] = deque(maxlen=RECORDED)
        self.webhooks: deque[JsonObject] = deque(maxlen=RECORDED)
        self.settings = settings
        self.apply(settings)

    def apply(self, settings: Settings) -> None:
        """Apply new settings; the buckets are full again."""
        self.settings = settings
        self.creates = Bucket(settings.creates_per_minute)
        self.others = Bucket(settings.others_per_minute)

    def reset(self) -> None:
        """Remove all faults, clear the record and restore the initial settings."""
        self._faults.clear()
        self.requests.clear()
        self.webhooks.clear()
        self.apply(self._at_start)

    def release(self) -> None:
        """Remove all faults, and end what they hold up."""
        self._faults.clear()
        self._released.set()
        self._released = asyncio.Event()

    async def pause(self, seconds: float) -> None:
        """Wait some seconds, or until the next `release`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._released.wait(), seconds)

    def add(self, faults: Iterable[Fault]) -> None:
        """Add faults after the active ones."""
        self._faults.extend(faults)

    def faults(self) -> list[JsonObject]:
        """Return the active faults, with their remaining `times`."""
        return [fault.model_dump(mode="json", exclude_defaults=True) | {"times": fault.times} for fault in self._faults]

    def take(
        self, name: FaultName, *, model: str = "", path: str = "", webhook: str | None = None, event: str = ""
    ) -> Fault | None:
        """Return and count the first matching fault of this name, or None."""
        for fault in self._faults:
            if (
                fault.fault == name
                and fault.model in (None, model)
                and (fault.path is None or fault.path in path)
                and (fault.webhook is None or fault.webhook in (webhook or ""))
                and (fault.events is None or event in fault.events)
            ):
                if fault.times is not None:
                    fault.times -= 1
                    if not fault.times:
                        self._faults.remove(fault)
                return fault
        return None

    def record_request(self, entry: JsonObject) -> None:
        """Append a request; the caller adds the response later."""
        self.requests.append(entry)

    def record_webhook(self, entry: JsonObject) -> None:
        """Append one attempt to send a webhook."""
        self.webhooks.append({"at": timestamp(), **entry})


def timestamp(moment: datetime | None = None) -> str:
    """Format a time as RFC 3339 in UTC with microseconds and `Z`."""
    return (moment or datetime.now(UTC)).isoformat(timespec="microseconds").replace("+00:00", "Z")
