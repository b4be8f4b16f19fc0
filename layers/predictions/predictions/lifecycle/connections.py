"""Connections of one function, shared by the steps that create, poll and sweep."""

from dataclasses import dataclass

from predictions.admission.rate_limiter import Limiter
from predictions.lifecycle.binding import Binding
from predictions.lifecycle.cancel import CancelPrediction
from predictions.lifecycle.orphans import Breaker, Orphans
from predictions.lifecycle.reservations import Reservations
from predictions.lifecycle.transitions import Transitions
from predictions.lifecycle.unknown_registry import UnknownRegistry
from predictions.store.predictions import PredictionsTable
from predictions.upstream.client import Replicate


@dataclass(frozen=True)
class Connections:
    """Hold one table, one client of Replicate, one view of the limiter, and the steps on top of them.

    A second client would load the certificates again, and a second limiter would read its item again.
    """

    table: PredictionsTable
    replicate: Replicate
    limiter: Limiter
    reservations: Reservations
    transitions: Transitions
    canceling: CancelPrediction
    breaker: Breaker
    orphans: Orphans
    binding: Binding
    registry: UnknownRegistry

    @classmethod
    def from_env(cls) -> "Connections":
        """Read the environment of a function that creates, polls or sweeps predictions."""
        table, replicate, limiter = PredictionsTable.from_env(), Replicate.from_env(), Limiter.from_env()
        reservations = Reservations(limiter)
        transitions = Transitions(table, reservations)
        canceling = CancelPrediction(table, replicate, transitions)
        breaker = Breaker.from_env()
        orphans = Orphans.from_env(table, replicate, breaker)
        return cls(
            table,
            replicate,
            limiter,
            reservations,
            transitions,
            canceling,
            breaker,
            orphans,
            Binding.from_env(transitions, orphans, canceling),
            UnknownRegistry.from_env(table),
        )
