"""Sends callers their webhooks: signed, to public addresses only, and again until they arrive."""

import json
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx

from predictions.net.addresses import AddressRefused
from predictions.net.client import TimedNetwork, guarded_client, read_up_to
from predictions.net.signatures import sign
from predictions.notifications.signing_secrets import OwnerSecrets
from predictions.notifications.webhook_queue import FIRST_WAIT_SECONDS, DeadLetters, DeliveriesQueue, Delivery
from predictions.notifications.webhook_slots import NoSlotFree, WebhookSlots
from predictions.observability import MetricUnit, logger, metrics
from predictions.status import Status
from predictions.store.predictions import PredictionsTable, Whole
from predictions.views.prediction import Presenter

TOTAL_SECONDS = 10.0
"""The most one try takes, whatever the receiver does."""

ANSWER_LIMIT_BYTES = 1024
"""No more of an answer is read: the status says all."""

_CONNECT_SECONDS = 5.0
_GONE = 410
_LOOPBACK = ("127.0.0.1", "localhost")


class _NotDelivered(Exception):
    """The receiver did not take the webhook.

    Attributes:
        reason: Why, without anything that the receiver sent.
        final: Whether trying again is of no use.
    """

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.final = final


class Receivers:
    """Those who asked for webhooks.

    Args:
        table: The predictions.
        presenter: Shows one as the API does.
        secrets: What each owner's webhooks are signed with.
        queue: Where a delivery waits for its next try.
        dead_letters: Where one goes that is given up.
        slots: How many tries there may be of one owner at once.
        allow_loopback: Whether a receiver may be on this machine (the local cloud's setting).
        open_client: Makes a guarded HTTP client; see `guarded_client`.
        now: The time.
        jitter: Gives random numbers from 0 to 1.
        total_seconds: The most one try takes.
    """

    def __init__(
        self,
        table: PredictionsTable,
        presenter: Presenter,
        secrets: OwnerSecrets,
        queue: DeliveriesQueue,
        dead_letters: DeadLetters,
        slots: WebhookSlots,
        *,
        allow_loopback: bool,
        open_client: Callable[..., httpx.Client] = guarded_client,
        now: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
        total_seconds: float = TOTAL_SECONDS,
    ) -> None:
        self._table = table
        self._presenter = presenter
        self._secrets = secrets
        self._queue = queue
        self._dead_letters = dead_letters
        self._slots = slots
        self._allow_loopback = allow_loopback
        self._open_client = open_client
        self._now = now
        self._jitter = jitter
        self._total_seconds = total_seconds

    @classmethod
    def from_env(cls) -> "Receivers":
        """From `ALLOW_LOOPBACK_WEBHOOKS` and what the parts' own `from_env` read."""
        return cls(
            PredictionsTable.from_env(),
            Presenter.from_env(),
            OwnerSecrets.from_env(),
            DeliveriesQueue.from_env(),
            DeadLetters.from_env(),
            WebhookSlots.from_env(),
            allow_loopback=os.environ["ALLOW_LOOPBACK_WEBHOOKS"] == "true",
        )

    def deliver(self, delivery: Delivery, receipt_handle: str) -> bool:
        """Makes one try.

        Twice at once, or again after a crash: the receiver is sent the same `webhook-id` again. 2xx is success, 410
        ends the delivery; everything else, redirects too, is tried again later, or given up when its time is over. So
        is a delivery for which no slot is free (see `notifications.webhook_slots`), at the same times and untried.

        Args:
            delivery: What to deliver.
            receipt_handle: Of its message, which hides until the next try.

        Returns:
            Whether the message is done with; else it must stay in the queue.
        """
        logger.set_correlation_id(delivery.id)
        prediction = self._table.get(delivery.id)
        if prediction is None or not prediction.webhook:
            logger.warning("nothing to deliver: the prediction is gone", webhook_event=delivery.event)
            return True
        # Before the payloads are read: a delivery that finds no slot has to cost little.
        try:
            slot = self._slots.acquire(prediction.owner, _origin(prediction.webhook), self._now())
        except NoSlotFree:
            return self._put_off(delivery, receipt_handle, _NotDelivered("no slot was free: its receivers are slow"))
        try:
            return self._try(delivery, receipt_handle, prediction.webhook)
        finally:
            self._slots.release(slot, self._now())

    def _try(self, delivery: Delivery, receipt_handle: str, url: str) -> bool:
        whole = self._table.read(delivery.id)
        shown = self._shown(whole, delivery) if whole is not None else None
        if whole is None or shown is None:
            logger.info("not delivered: out of date", webhook_event=delivery.event)
            return True
        try:
            status = self._post(url, whole.prediction.owner, delivery, shown)
        except _NotDelivered as failure:
            return self._put_off(delivery, receipt_handle, failure)
        logger.info("webhook delivered", webhook_id=delivery.webhook_id, answer=status)
        return True

    def _put_off(self, delivery: Delivery, receipt_handle: str, failure: _NotDelivered) -> bool:
        wait_seconds = None if failure.final else delivery.wait_seconds(self._now(), self._jitter())
        logger.warning(
            "webhook not delivered", webhook_id=delivery.webhook_id, reason=failure.reason, wait_seconds=wait_seconds
        )
        if wait_seconds is not None:
            self._queue.postpone(receipt_handle, wait_seconds)
            return False
        metrics.add_metric(name="DeliveriesFailed", unit=MetricUnit.Count, value=1)
        if delivery.event == "completed":
            self._dead_letters.send(delivery, failure.reason)
        return True

    def _shown(self, whole: Whole, delivery: Delivery) -> dict[str, Any] | None:
        """The prediction as the event tells it; None where it has nothing to tell (any more).

        Replicate's receivers know the end by its status, so only `completed` may show one: what comes late of the
        others shows the prediction as it ran.
        """
        prediction = whole.prediction
        ended = prediction.ended_visibly
        if delivery.event == "completed":
            return self._presenter.show(whole) if ended else None
        if ended and "completed" in prediction.wanted_events and self._now() >= delivery.first_at + FIRST_WAIT_SECONDS:
            return None
        shown = self._presenter.show(whole)
        shown |= {"status": Status.PROCESSING.value, "completed_at": None, "error": None, "metrics": {}}
        if delivery.event == "start":
            return shown | {"output": None, "logs": "", "output_files": []}
        # The end is queued without knowing whether there is an output, or logs.
        nothing = shown["output"] is None if delivery.event == "output" else not shown["logs"]
        return None if nothing else shown

    def _post(self, url: str, owner: str, delivery: Delivery, shown: dict[str, Any]) -> int:
        """Sends it; gives the status, 2xx or 410.

        Raises:
            _NotDelivered: The receiver did not take it.
        """
        body = json.dumps(shown, separators=(",", ":"), allow_nan=False).encode()
        now = self._now()
        signature = sign(
            body,
            webhook_id=delivery.webhook_id,
            timestamp=int(now),
            secrets=self._secrets.valid_secrets(owner, now),
        )
        headers = {"Content-Type": "application/json", "User-Agent": "replicate-serverless", **signature}
        try:
            with (
                self._client(url) as http,
                http.stream("POST", url, content=body, headers=headers) as answer,
            ):
                status = answer.status_code
                # A small response, as receivers expect, is read; of a larger one the rest is of no interest.
                with suppress(httpx.HTTPError):
                    read_up_to(answer.iter_raw(), ANSWER_LIMIT_BYTES)
        except AddressRefused as error:
            raise _NotDelivered(f"the address {error}", final=True) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _NotDelivered(type(error).__name__) from error
        if 200 <= status < 300 or status == _GONE:
            return status
        raise _NotDelivered(f"answered {status}")

    def _client(self, url: str) -> httpx.Client:
        # One for each try: a connection that was kept might end just then, and so might the time of another try.
        target = httpx.URL(url)
        local = self._allow_loopback and target.host in _LOOPBACK
        until = time.monotonic() + self._total_seconds
        return self._open_client(
            allowed_origins=[f"{target.scheme}://{target.netloc.decode()}"] if local else [],
            network=TimedNetwork(lambda: until - time.monotonic()),
            timeout=httpx.Timeout(self._total_seconds, connect=_CONNECT_SECONDS),
        )


def _origin(url: str) -> str:
    """The receiver that a URL leads to; a URL that none can be read from is refused when it is called."""
    try:
        target = httpx.URL(url)
    except httpx.InvalidURL:
        return ""
    return f"{target.scheme}://{target.netloc.decode()}"
