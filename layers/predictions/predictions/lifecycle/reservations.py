"""Starts and turns at the limiter, as predictions hold them."""

from predictions.admission.rate_limiter import AskAgain, Lane, Limiter, Reservation, Start
from predictions.lifecycle.timing import START_MARGIN_SECONDS
from predictions.store.predictions import Prediction, Waits


class Reservations:
    """Reserves starts for predictions, and gives back those that are not used.

    Args:
        limiter: When a create may start.
    """

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

    def give_back(self, lane: Lane, owner: str, waits: Waits) -> None:
        """Give back to the limiter what was reserved for a prediction that will not use it."""
        if waits.reserved_start is not None:
            self._limiter.give_back(lane, waits.reserved_start)
        if waits.turn_ms:
            self._limiter.give_turn_back(lane, owner, waits.turn_ms)


def lane_of(prediction: Prediction) -> Lane:
    """Callers who wait for the answer to their create have a lane of their own."""
    return "http" if prediction.source in ("http", "run_job") else "queue"


def waits_of(start: Reservation) -> Waits:
    """What a prediction waits for, after this answer of the limiter."""
    if isinstance(start, Start):
        return Waits(reserved_start=start.number)
    return Waits(turn_ms=start.step_ms) if isinstance(start, AskAgain) else Waits()
