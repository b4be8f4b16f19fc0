"""Create: the one POST of a claim's holder, and what its outcome means for the claim."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.admission.rate_limiter import Limiter
from predictions.admission.schedule import TooLate
from predictions.lifecycle.binding import Binding
from predictions.lifecycle.connections import Connections
from predictions.lifecycle.model_lookup import ModelLookup
from predictions.lifecycle.reservations import Reservations, lane_of, waits_of
from predictions.lifecycle.targets import target_of, webhook_of
from predictions.lifecycle.timing import CLAIM_SECONDS
from predictions.lifecycle.transitions import Transitions
from predictions.lifecycle.unknown_registry import UnknownRegistry
from predictions.observability import MetricUnit, logger, metrics
from predictions.status import Status
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction, Waits
from predictions.upstream.client import Replicate
from predictions.upstream.errors import NotAccepted, OutcomeUnknown, Throttled, Unauthorized

if TYPE_CHECKING:
    from predictions.upstream.create_window import SendWindow

_NO_CONNECTION_WAIT_SECONDS = 10
_UNAUTHORIZED_WAIT_SECONDS = 300


class Creates:
    """Create predictions at Replicate for the holders of their claims.

    Args:
        limiter: Holds creates back after a 429, and while the token is refused.
        reservations: Reserves the next start of a create that was not accepted.
        transitions: Ends predictions.
        binding: Binds accepted predictions.
        registry: Registers creates without a clear response.
        lookup: Learns which model a version belongs to.
    """

    def __init__(
        self,
        table: PredictionsTable,
        replicate: Replicate,
        limiter: Limiter,
        reservations: Reservations,
        transitions: Transitions,
        binding: Binding,
        registry: UnknownRegistry,
        lookup: ModelLookup,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._replicate = replicate
        self._limiter = limiter
        self._reservations = reservations
        self._transitions = transitions
        self._binding = binding
        self._registry = registry
        self._lookup = lookup
        self._now = now

    @classmethod
    def over(cls, connections: Connections, lookup: ModelLookup) -> "Creates":
        """Create over the connections of a function."""
        return cls(
            connections.table,
            connections.replicate,
            connections.limiter,
            connections.reservations,
            connections.transitions,
            connections.binding,
            connections.registry,
            lookup,
        )

    def create(
        self,
        prediction: Prediction,
        input_json: str,
        wait_until: float = 0,
        rate_limit: dict[str, str] | None = None,
        *,
        leave_large: bool = False,
    ) -> Prediction:
        """Send the one POST for the holder of the claim, and bind the response.

        If a caller waits, Replicate holds its response (its sync mode). Meanwhile webhooks bind, merge and end the
        item as usual, and a cancel flags it; the response is merged by the same rule, so `processing` with the whole
        output is not a completion.

        Args:
            prediction: What is claimed.
            input_json: Its input.
            wait_until: Until when the caller waits.
            rate_limit: Filled with the rate-limit headers of the response.
            leave_large: As for `Replicate.create`.

        Raises:
            NotAccepted: The claim may be released.
            OutcomeUnknown: The claim must be kept.
        """
        body: dict[str, Any] = {}
        webhook = webhook_of(prediction.id)
        if self._replicate.calls_back(webhook):
            body |= {"webhook": webhook, "webhook_events_filter": _events(prediction)}
        if prediction.stream is not None:
            body["stream"] = prediction.stream
        remaining_seconds: int | None = prediction.deadline - int(self._now())
        if prediction.destination is not None:
            body["destination"] = prediction.destination
            remaining_seconds = None  # the poll keeps a training's deadline
        wait_seconds = int(wait_until - self._now())
        if prediction.unknown_creates:
            # An earlier submission may have been bound by its webhook since: this is the last moment to see that.
            there = self._table.get(prediction.id) or prediction
            if there.upstream_id or there.terminal:
                return there
            if there.cancel_requested or there.written_by != prediction.written_by or there.claimed is None:
                raise NotAccepted(None, "the prediction was canceled, or is somebody else's to submit")
        told = self._replicate.create(
            target_of(prediction),
            body,
            cancel_after_seconds=remaining_seconds,
            wait_seconds=wait_seconds if wait_seconds >= 1 else None,
            rate_limit=rate_limit,
            window=self._window(prediction),
            input_json=input_json,
            leave_large=leave_large,
        )
        logger.info("submitted", upstream_id=told.id, status=told.status)
        bound = self._binding.bind(prediction, told)
        if prediction.version and not prediction.name:
            self._lookup.learn(prediction.version, told)
        return bound

    def release(self, prediction: Prediction, error: NotAccepted) -> tuple[Prediction, int]:
        """Release a claim whose create was certainly not accepted; a cancel meanwhile ends the prediction.

        Returns:
            The prediction, and the seconds that it has to wait.
        """
        wait_seconds, waits = self._wait_seconds(prediction, error)
        logger.warning("not accepted, submitted again later", wait_seconds=wait_seconds)
        released = self._table.release(prediction, self._now(), wait_seconds, waits=waits)
        if released is None:
            self._reservations.release(lane_of(prediction), prediction.owner, waits)
        if released and released.cancel_requested:
            return self._transitions.end(released, Status.CANCELED, None), wait_seconds
        return released or prediction, wait_seconds

    def note_unknown(self, prediction: Prediction, error: OutcomeUnknown) -> int:
        """Record an unknown outcome; return in how many seconds to look for what it started."""
        logger.warning("submitted with unknown outcome", reason=str(error))
        try:
            return self._registry.note(prediction, error)
        except (ClientError, BotoCoreError):
            # The claim itself says until when its holder may have acted.
            logger.exception("the unknown outcome was not recorded")
            return 1

    def count_refused_token(self, error: Unauthorized) -> None:
        """Count a refusal of the stack's token or credit; pause submissions if it concerns all of them."""
        logger.error("Replicate refuses the stack's token or credit", status=error.status)
        metrics.add_metric(name="UpstreamRefusals", unit=MetricUnit.Count, value=1)
        if error.status in (401, 402):  # 403 may concern this model only
            why = "token" if error.status == 401 else "credit"
            self._limiter.pause_automatically(f"Replicate refuses this stack's {why} ({error.status}).")

    def outage_seconds(self, prediction: Prediction) -> int:
        """Return the wait while Replicate is unreachable, in seconds: a quarter of the time since the request."""
        waited = (int(self._now()) - prediction.created) // 4
        return min(_UNAUTHORIZED_WAIT_SECONDS, max(_NO_CONNECTION_WAIT_SECONDS, waited))

    def _wait_seconds(self, prediction: Prediction, error: NotAccepted) -> tuple[int, Waits]:
        """Return the wait after a create that was not accepted, in seconds, and the start that it waits for."""
        if isinstance(error, Throttled):
            metrics.add_metric(name="UpstreamThrottles", unit=MetricUnit.Count, value=1)
            # Predictions that wait with it start one after another then, like all others.
            self._limiter.block(error.seconds)
            start = self._reservations.reserve(prediction)
            if isinstance(start, TooLate):
                return error.seconds, Waits()
            return max(error.seconds, math.ceil(round(start.at - self._now(), 3))), waits_of(start)
        if isinstance(error, Unauthorized):
            return _UNAUTHORIZED_WAIT_SECONDS, Waits()
        return self.outage_seconds(prediction), Waits()

    def _window(self, prediction: Prediction) -> "SendWindow | None":
        """Return the time window in which the holder of this claim may send its create."""
        from predictions.upstream.create_window import SendWindow  # loaded with the first create

        if prediction.claimed is None or prediction.submit_until is None:
            return None
        return SendWindow(prediction.claimed + CLAIM_SECONDS, prediction.submit_until, self._now)


def _events(prediction: Prediction) -> list[str]:
    """Return the webhook events to ask Replicate for: those of the protocol, and those of the caller.

    Replicate's default for a caller who names none is `output` and `completed`.
    """
    wanted = {"start", "completed", *prediction.wanted_events}
    return [event for event in ("start", "output", "logs", "completed") if event in wanted]
