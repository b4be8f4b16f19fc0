"""The steps of the protocol as one object, made of the real ones for tests that go through several of them."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from predictions.admission.quotas import OwnersUsage
from predictions.admission.rate_limiter import Limiter
from predictions.aws import clients
from predictions.aws.dynamodb import Table
from predictions.aws.executions import Executions
from predictions.lifecycle.abandonment import Abandonment
from predictions.lifecycle.binding import Binding
from predictions.lifecycle.cancel import CancelPrediction
from predictions.lifecycle.connections import Connections
from predictions.lifecycle.create import Creates
from predictions.lifecycle.delete import DeletePrediction
from predictions.lifecycle.evidence import Evidence
from predictions.lifecycle.model_lookup import ModelLookup, ModelSchemas
from predictions.lifecycle.orphans import Breaker, Orphans
from predictions.lifecycle.poll import PollPrediction
from predictions.lifecycle.readings import Readings
from predictions.lifecycle.reconcile import UnknownSubmissions
from predictions.lifecycle.reservations import Reservations
from predictions.lifecycle.spending import Spending
from predictions.lifecycle.start import StartPrediction
from predictions.lifecycle.submit import SubmitPrediction
from predictions.lifecycle.sweep import SweepPredictions
from predictions.lifecycle.timing import Lifetimes
from predictions.lifecycle.tracking import Tracking
from predictions.lifecycle.transitions import Transitions
from predictions.lifecycle.unknown_claims import UnknownClaims
from predictions.lifecycle.unknown_registry import UnknownRegistry
from predictions.money.budgets import Budgets
from predictions.money.stored import StackPrices
from predictions.store.predictions import PredictionsTable
from predictions.store.recent_requests import RecentRequests
from predictions.upstream.client import Replicate
from predictions.upstream.list_reader import ListReader


@dataclass(frozen=True)
class Timing:
    """What an operator chooses, in seconds."""

    lifetime: int
    training_lifetime: int
    grace: int
    first_poll: int
    retention: int


class Submissions:
    """Every step, with the same collaborators; the names of the steps are those that handlers give them."""

    def __init__(
        self,
        table: PredictionsTable,
        replicate: Replicate,
        executions: Executions,
        timing: Timing,
        *,
        limiter: Limiter,
        recent: RecentRequests,
        usage: OwnersUsage,
        schemas: ModelSchemas | None = None,
        resubmit: bool = False,
        max_unknown_creates: int = 5,
        now: Callable[[], float],
        sleep: Callable[[float], None] = time.sleep,
        between_readings: Callable[[float], None] | None = None,
    ) -> None:
        items = Table("predictions", clients.client("dynamodb"))
        grace, first_poll = timing.grace, timing.first_poll
        self.table = table
        self.limiter = limiter
        self.breaker = Breaker(items, now=now)
        self.lookup = ModelLookup(replicate, schemas, now=now)
        reservations = Reservations(limiter)
        spending = Spending(lambda: Budgets(items, StackPrices(items)), limiter)
        transitions = Transitions(table, reservations, now=now)
        orphans = Orphans(table, replicate, self.breaker, items)
        self.canceling = CancelPrediction(table, replicate, transitions, now=now)
        self.deleting = DeletePrediction(table, now=now)
        binding = Binding(transitions, orphans, self.canceling, first_poll=first_poll, now=now)
        registry = UnknownRegistry(table, items, grace=grace, now=now)
        reader = ListReader(replicate, now=now)
        readings = Readings(
            table, reader, items, grace=grace, first_poll=first_poll,
            now=now, sleep=between_readings or sleep,
        )  # fmt: skip
        evidence = Evidence(table, reader, items, now=now)
        unknown = UnknownSubmissions(table, registry, readings, evidence, grace=grace, now=now)
        claims = UnknownClaims(
            table, replicate, unknown, registry, self.breaker, binding, transitions,
            grace=grace, resubmit=resubmit, max_unknown_creates=max_unknown_creates, now=now,
        )  # fmt: skip
        creates = Creates(
            table, replicate, limiter, reservations, transitions, binding, registry, self.lookup, now=now
        )  # fmt: skip
        submitted = Executions(os.environ["SUBMITTED_STATE_MACHINE_ARN"], clients.client("stepfunctions"))
        tracking = Tracking(table, executions, submitted, now=now)
        abandonment = Abandonment(table, transitions, now=now)
        self.connections = Connections(
            table,
            replicate,
            limiter,
            reservations,
            transitions,
            self.canceling,
            self.breaker,
            orphans,
            binding,
            registry,
        )
        self.starting = StartPrediction(
            table, limiter, recent, reservations, usage, spending, self.lookup, creates, tracking, transitions,
            Lifetimes(timing.lifetime, timing.training_lifetime, timing.retention), now=now, sleep=sleep,
        )  # fmt: skip
        self.submitting = SubmitPrediction(
            table, limiter, reservations, usage, spending, self.lookup, creates, claims, self.breaker, transitions,
            now=now,
        )  # fmt: skip
        self.polling = PollPrediction(
            table, replicate, transitions, self.canceling, orphans, claims, self.submitting, abandonment, now=now
        )
        self.sweeping = SweepPredictions(
            table, limiter, tracking, transitions, self.canceling, orphans, binding, unknown, abandonment,
            first_poll=first_poll, now=now,
        )  # fmt: skip
        self.start, self.wait_for_end = self.starting.start, self.starting.wait_for_end
        self.submit = self.submitting.submit
        self.poll = self.polling.poll
        self.cancel = self.canceling.cancel
        self.delete_ended = self.deleting.delete_ended
        self.sweep, self.look_again = self.sweeping.sweep, self.sweeping.look_again
        self.measure = self.sweeping.measure

    def put_into(self, app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have a handler use these steps in place of its own."""
        for name in ("table", "connections", "starting", "submitting", "polling", "canceling", "deleting", "sweeping"):
            if hasattr(app, name):
                monkeypatch.setattr(app, name, getattr(self, name))
