"""Reservations: starts and turns that predictions hold at the rate limiter."""

from predictions.admission.limiter_item import Lane
from predictions.admission.rate_limiter import Limiter
from predictions.admission.schedule import AskAgain, Reservation, Start
from predictions.lifecycle.timing import START_MARGIN_SECONDS
from predictions.store.records import Prediction, Waits


class Reservations:
    """Reserve starts for predictions, and give back unused ones."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter

    def reserve(self, prediction: Prediction) -> Reservation:
        """Reserve a start for a prediction, or a turn."""
        latest = prediction.deadline - START_MARGIN_SECONDS
        has_turn = prediction.turn_ms or prediction.reserved
        turn_at = prediction.submit_at if has_turn else None
        if lane_of(prediction) == "http":
            return self._limiter.reserve_for_caller(prediction.owner, latest=latest, turn_at=turn_at)
        return self._limiter.reserve_for_queue(prediction.owner, latest=latest, turn_at=turn_at)

    def release(self, lane: Lane, owner: str, waits: Waits) -> None:
        """Give back a start or turn that a prediction will not use."""
        if waits.reserved_start is not None:
            self._limiter.release(lane, waits.reserved_start)
        if waits.turn_ms:
            self._limiter.release_turn(lane, owner, waits.turn_ms)


def lane_of(prediction: Prediction) -> Lane:
    """Return the lane of a prediction: callers who wait for the response to their create have one of their own."""
    return "http" if prediction.source in ("http", "run_job") else "queue"


def waits_of(start: Reservation) -> Waits:
    """Return what a prediction waits for, after this response of the limiter."""
    if isinstance(start, Start):
        return Waits(reserved_start=start.number)
    return Waits(turn_ms=start.step_ms) if isinstance(start, AskAgain) else Waits()
