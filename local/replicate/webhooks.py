"""Webhooks as Replicate sends them: signed, and only the last one of a prediction is retried.

https://replicate.com/docs/topics/webhooks and https://github.com/standard-webhooks/standard-webhooks.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from local.replicate.faults import Control, FaultName

log = logging.getLogger(__name__)

ATTEMPT_SECONDS = 10
# Waits between attempts, as shares of `webhook_retry_seconds` (60 by default: 1, 2, 4, 8, 16 and 29 s).
RETRY_SHARES = (1 / 60, 2 / 60, 4 / 60, 8 / 60, 16 / 60, 29 / 60)
# How long a webhook to be overtaken is held if no other one follows.
HOLD_SECONDS = 3


def new_signing_secret() -> str:
    """Return a random secret in the form `whsec_<base64 of 24 bytes>`."""
    return f"whsec_{base64.b64encode(secrets.token_bytes(24)).decode()}"


def signature(secret: str, webhook_id: str, timestamp: int, body: bytes) -> str:
    """Return `webhook-signature`: HMAC-SHA256 over `{id}.{timestamp}.{body}`."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{webhook_id}.{timestamp}.".encode() + body
    return f"v1,{base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()}"


@dataclass
class Webhook:
    """One webhook: its body is that of the time of the event, its id the same in every attempt."""

    prediction_id: str
    model: str
    event: str
    url: str
    body: bytes
    done: Callable[[], None]
    id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(13)}")


class Webhooks:
    """Sends webhooks, those of one prediction one after the other unless a fault says otherwise."""

    def __init__(self, control: Control) -> None:
        self._control = control
        # No proxy: webhooks mostly go to this machine. Replicate follows no redirects.
        self._client = httpx.AsyncClient(
            timeout=ATTEMPT_SECONDS,
            trust_env=False,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        )
        self._queues: dict[str, asyncio.Queue[Webhook]] = {}
        self._held: dict[str, list[Webhook]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def send(
        self,
        *,
        prediction_id: str,
        model: str,
        event: str,
        url: str,
        body: dict[str, Any],
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """Queue one webhook and return immediately.

        Args:
            prediction_id: Webhooks of one prediction are sent in the order of these calls.
            model: `owner/name`, for faults that name a model.
            event: `start`, `output`, `logs` or `completed`; only `completed` is retried.
            url: The URL of the receiver.
            body: The prediction as it is now.
            done: Called after the last attempt, or after the webhook was dropped by a fault.
        """
        webhook = Webhook(prediction_id, model, event, url, json.dumps(body).encode(), done)
        queue = self._queues.get(prediction_id)
        if queue is None:
            queue = self._queues[prediction_id] = asyncio.Queue()
            self._spawn(self._work(prediction_id, queue))
        queue.put_nowait(webhook)

    async def close(self) -> None:
        """Give up unsent webhooks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, prediction_id: str, queue: asyncio.Queue[Webhook]) -> None:
        event = ""
        while event != "completed":
            webhook = await queue.get()
            event = webhook.event
            await self._send_one(webhook)
        del self._queues[prediction_id]

    async def _send_one(self, webhook: Webhook) -> None:
        def fault(name: FaultName) -> Any:
            return self._control.take(name, model=webhook.model, webhook=webhook.url, event=webhook.event)

        if lost := fault(FaultName.WEBHOOK_LOST):
            self._record(webhook, attempt=0, answer=None, error=None, fault=lost.fault)
            webhook.done()
            return
        if late := fault(FaultName.WEBHOOK_LATE):
            self._spawn(self._deliver_later(webhook, late.seconds))
            return
        if fault(FaultName.WEBHOOK_REORDERED):
            self._held.setdefault(webhook.prediction_id, []).append(webhook)
            self._spawn(self._release_later(webhook))
            return
        copies = 2 if fault(FaultName.WEBHOOK_DUPLICATED) else 1
        for _ in range(copies):
            await self._deliver(webhook)
        for held in self._held.pop(webhook.prediction_id, []):
            await self._deliver(held)

    async def _deliver_later(self, webhook: Webhook, seconds: float) -> None:
        await self._control.pause(seconds)
        await self._deliver(webhook)

    async def _release_later(self, webhook: Webhook) -> None:
        await asyncio.sleep(HOLD_SECONDS)
        held = self._held.get(webhook.prediction_id, [])
        if webhook in held:
            held.remove(webhook)
            await self._deliver(webhook)

    async def _deliver(self, webhook: Webhook) -> None:
        """Try once, and retry the terminal webhook for about a minute."""
        waits = RETRY_SHARES if webhook.event == "completed" else ()
        for attempt in range(1, len(waits) + 2):
            if await self._attempt(webhook, attempt) or attempt > len(waits):
                break
            await asyncio.sleep(waits[attempt - 1] * self._control.settings.webhook_retry_seconds)
        webhook.done()

    async def _attempt(self, webhook: Webhook, attempt: int) -> bool:
        """Try once; return False for 4xx, 5xx or no response, True otherwise."""
        timestamp = int(time.time())
        secret = self._control.settings.signing_secret
        headers = {
            "content-type": "application/json",
            "user-agent": "local-replicate/1",
            "webhook-id": webhook.id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(secret, webhook.id, timestamp, webhook.body),
        }
        try:
            answer = await self._client.post(webhook.url, content=webhook.body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            self._record(webhook, attempt=attempt, answer=None, error=type(error).__name__, fault=None)
            return False
        self._record(webhook, attempt=attempt, answer=answer.status_code, error=None, fault=None)
        return answer.status_code < 400

    def _record(
        self, webhook: Webhook, *, attempt: int, answer: int | None, error: str | None, fault: str | None
    ) -> None:
        self._control.record_webhook(
            {
                "prediction": webhook.prediction_id,
                "event": webhook.event,
                "url": webhook.url,
                "webhook_id": webhook.id,
                "prediction_status": json.loads(webhook.body)["status"],
                "attempt": attempt,
                "answer": answer,
                "error": error,
                "fault": fault,
            }
        )
