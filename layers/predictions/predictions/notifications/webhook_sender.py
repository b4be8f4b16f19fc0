"""Webhook sender: signed, to public addresses only, retried until delivered."""

import json
import os
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import httpx

from predictions.net.addresses import AddressRefused
from predictions.net.client import TimedNetwork, guarded_client, read_up_to
from predictions.net.signatures import sign
from predictions.notifications.group_webhooks import Completion, Groups
from predictions.notifications.signing_secrets import OwnerSecrets
from predictions.notifications.webhook_order import WebhookOrder
from predictions.notifications.webhook_queue import FIRST_WAIT_SECONDS, DeadLetters, DeliveriesQueue, Delivery
from predictions.notifications.webhook_slots import NoSlotFree, WebhookSlots
from predictions.observability import MetricUnit, logger, metrics
from predictions.status import Status
from predictions.store.predictions import PredictionsTable
from predictions.store.records import PredictionDetail
from predictions.views.prediction import Presenter, without_unset

TOTAL_SECONDS = 10.0
"""The time limit of one try, whatever the receiver does."""

ANSWER_LIMIT_BYTES = 1024
"""The limit of a response that is read: only its status matters."""

_CONNECT_SECONDS = 5.0
_GONE = 410
_LOOPBACK = ("127.0.0.1", "localhost")


class _NotDelivered(Exception):
    """The receiver did not accept the webhook.

    Attributes:
        reason: The reason, without any data from the receiver.
        final: Whether a retry cannot succeed.
    """

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.final = final


class Receivers:
    """Delivers webhooks to their receivers.

    Args:
        presenter: Builds the API's representation of a prediction.
        secrets: The secrets that sign each owner's webhooks.
        queue: The queue in which a delivery waits for its next try.
        dead_letters: The queue for deliveries that are given up.
        slots: Limits the concurrent tries of one owner.
        order: Records what is sent, so that nothing follows `completed`.
        allow_loopback: Whether a receiver may be on this machine (the local cloud's setting).
        open_client: Opens a guarded HTTP client; see `guarded_client`.
        jitter: Returns random numbers from 0 to 1.
        total_seconds: The time limit of one try.
    """

    def __init__(
        self,
        table: PredictionsTable,
        presenter: Presenter,
        secrets: OwnerSecrets,
        queue: DeliveriesQueue,
        dead_letters: DeadLetters,
        slots: WebhookSlots,
        order: WebhookOrder,
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
        self._groups = Groups(presenter)
        self._order = order
        self._allow_loopback = allow_loopback
        self._open_client = open_client
        self._now = now
        self._jitter = jitter
        self._total_seconds = total_seconds

    @classmethod
    def from_env(cls) -> "Receivers":
        """Build from `ALLOW_LOOPBACK_WEBHOOKS` and the environment of its parts."""
        return cls(
            PredictionsTable.from_env(),
            Presenter.from_env(),
            OwnerSecrets.from_env(),
            DeliveriesQueue.from_env(),
            DeadLetters.from_env(),
            WebhookSlots.from_env(),
            WebhookOrder.from_env(),
            allow_loopback=os.environ["ALLOW_LOOPBACK_WEBHOOKS"] == "true",
        )

    def deliver(self, delivery: Delivery, receipt_handle: str) -> bool:
        """Try to deliver a webhook once; return whether its message is done.

        Concurrently, or again after a crash, the receiver gets the same `webhook-id` again. 2xx is success, 410
        ends the delivery; everything else, redirects too, is retried later, or given up when its time is over. A
        delivery without a free slot (see `notifications.webhook_slots`) is deferred in the same way, without a try.

        Args:
            delivery: The webhook to deliver.
            receipt_handle: Of its message, which stays hidden until the next try.

        Returns:
            Whether the message is done; else it must stay in the queue.
        """
        logger.set_correlation_id(delivery.id)
        if delivery.kind != "prediction":
            completion = self._groups.find(delivery)
            if completion is None:
                logger.info("not delivered: outdated", webhook_event=delivery.event)
                return True
            return self._in_slot(
                delivery, receipt_handle, completion.owner, completion.url,
                lambda: self._try_group(delivery, receipt_handle, completion),
            )  # fmt: skip
        prediction = self._table.get(delivery.id)
        if prediction is None or not prediction.webhook:
            logger.warning("nothing to deliver: prediction not found", webhook_event=delivery.event)
            return True
        url = prediction.webhook
        return self._in_slot(
            delivery, receipt_handle, prediction.owner, url, lambda: self._try(delivery, receipt_handle, url)
        )

    def _in_slot(
        self, delivery: Delivery, receipt_handle: str, owner: str, url: str, attempt: Callable[[], bool]
    ) -> bool:
        # Before the payloads are read: a delivery without a slot must cost little.
        try:
            slot = self._slots.acquire(owner, _origin(url), self._now())
        except NoSlotFree:
            return self._defer(delivery, receipt_handle, _NotDelivered("no free slot: its receivers are slow"))
        try:
            return attempt()
        finally:
            self._slots.release(slot, self._now())

    def _try_group(self, delivery: Delivery, receipt_handle: str, completion: Completion) -> bool:
        try:
            status = self._post(completion.url, completion.owner, delivery, completion.show(), completion.traceparent)
        except _NotDelivered as failure:
            return self._defer(delivery, receipt_handle, failure)
        logger.info("webhook delivered", webhook_id=delivery.webhook_id, answer=status)
        return True

    def _try(self, delivery: Delivery, receipt_handle: str, url: str) -> bool:
        whole = self._table.read(delivery.id)
        shown = self._shown(whole, delivery) if whole is not None else None
        if whole is None or shown is None:
            logger.info("not delivered: outdated", webhook_event=delivery.event)
            return True
        content = {"output": whole.output, "logs": whole.logs}.get(delivery.event)
        # Right before the request. A webhook that an operator sends again is sent whatever was sent before.
        resent = delivery.again and delivery.event != "completed"
        if not resent and not self._order.begin(whole.prediction, delivery, content, self._now()):
            logger.info("not delivered: a later webhook told it", webhook_id=delivery.webhook_id)
            return True
        try:
            status = self._post(url, whole.prediction.owner, delivery, shown, whole.prediction.traceparent)
        except _NotDelivered as failure:
            if not resent:
                self._order.failed(whole.prediction, delivery)
            return self._defer(delivery, receipt_handle, failure)
        logger.info("webhook delivered", webhook_id=delivery.webhook_id, answer=status)
        return True

    def _defer(self, delivery: Delivery, receipt_handle: str, failure: _NotDelivered) -> bool:
        wait_seconds = None if failure.final else delivery.wait_seconds(self._now(), self._jitter())
        logger.warning(
            "webhook not delivered", webhook_id=delivery.webhook_id, reason=failure.reason, wait_seconds=wait_seconds
        )
        if wait_seconds is not None:
            self._queue.postpone(receipt_handle, wait_seconds)
            return False
        metrics.add_metric(name="DeliveriesFailed", unit=MetricUnit.Count, value=1)
        if delivery.completes:
            self._dead_letters.send(delivery, failure.reason)
        return True

    def _shown(self, whole: PredictionDetail, delivery: Delivery) -> dict[str, Any] | None:
        """Return the prediction as this event shows it, or None if outdated or empty.

        Replicate's receivers detect a completion by its status, so only `completed` may show one: a late delivery of
        another event shows the prediction as it ran.
        """
        prediction = whole.prediction
        ended = prediction.ended_visibly
        if delivery.event == "completed":
            return self._presenter.show(whole) if ended else None
        late = self._now() >= delivery.first_at + FIRST_WAIT_SECONDS and not delivery.again
        if ended and "completed" in prediction.wanted_events and late:
            return None
        shown = self._presenter.show(whole) | {"status": Status.PROCESSING.value, "error": None}
        if prediction.terminal:
            shown |= {"upstream_status": Status.PROCESSING.value, "completed_at": None, "metrics": None, "cost": None}
        if delivery.event == "start":
            shown |= {"output": None, "logs": "", "output_files": []}
        shown = without_unset(shown)
        # A completion is queued without knowing whether it has an output or logs.
        nothing = {"start": False, "output": "output" not in shown, "logs": not shown["logs"]}[delivery.event]
        return None if nothing else shown

    def _post(self, url: str, owner: str, delivery: Delivery, shown: Mapping[str, Any], traceparent: str | None) -> int:
        """Send the webhook and return the response's status, 2xx or 410.

        Raises:
            _NotDelivered: The receiver did not accept it.
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
        headers |= {"traceparent": traceparent} if traceparent else {}
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
        raise _NotDelivered(f"responded with {status}")

    def _client(self, url: str) -> httpx.Client:
        # A client for each try: a pooled connection might close at that moment, or use up another try's time.
        target = httpx.URL(url)
        local = self._allow_loopback and target.host in _LOOPBACK
        until = time.monotonic() + self._total_seconds
        return self._open_client(
            allowed_origins=[f"{target.scheme}://{target.netloc.decode()}"] if local else [],
            network=TimedNetwork(lambda: until - time.monotonic()),
            timeout=httpx.Timeout(self._total_seconds, connect=_CONNECT_SECONDS),
        )


def _origin(url: str) -> str:
    """Return a URL's origin; a URL without one is rejected when it is called."""
    try:
        target = httpx.URL(url)
    except httpx.InvalidURL:
        return ""
    return f"{target.scheme}://{target.netloc.decode()}"
