"""The named worlds, and which of them a schedule has."""

import random

from tests.simulation.attacks import Backlog, Killer, OldKeys, Overload, PoisonMessage, Tarpit, TokenFlood
from tests.simulation.budgets import Budgets
from tests.simulation.jobs import Batches, Pipelines, ToldBatches, Trainings
from tests.simulation.notices import (
    Events,
    HastyDeletions,
    Redelivery,
    TaskTokens,
    TroubleOfTheBus,
    Webhooks,
    WebhooksInARow,
)
from tests.simulation.scenario import Scenario
from tests.simulation.unknown import (
    CancelBetween,
    Frozen,
    HiddenDeployments,
    HiddenInputs,
    HiddenWebhooks,
    LateCreates,
    LateLists,
    Outage,
    StaleLists,
    Strangers,
    UnknownCreates,
)
from tests.simulation.upgrades import Upgrade
from tests.simulation.watchers import BusyWatchers, Watchers

WORLDS: dict[type[Scenario], float] = {
    Events: 0.06,
    Webhooks: 0.06,
    TaskTokens: 0.06,
    Redelivery: 0.02,
    Batches: 0.05,
    Pipelines: 0.05,
    Trainings: 0.04,
    Killer: 0.04,
    PoisonMessage: 0.02,
    Tarpit: 0.004,
    Backlog: 0.005,
    Overload: 0.004,
    TokenFlood: 0.006,
    OldKeys: 0.008,
    UnknownCreates: 0.01,
    HiddenWebhooks: 0.01,
    HiddenInputs: 0.01,
    HiddenDeployments: 0.01,
    Strangers: 0.01,
    LateLists: 0.01,
    LateCreates: 0.01,
    Frozen: 0.01,
    Outage: 0.02,
    StaleLists: 0.01,
    CancelBetween: 0.01,
    Watchers: 0.02,
    Upgrade: 0.02,
    WebhooksInARow: 0.02,
    HastyDeletions: 0.02,
    TroubleOfTheBus: 0.02,
    ToldBatches: 0.008,
    Budgets: 0.006,
    BusyWatchers: 0.01,
}
"""The share of the schedules that have each of them."""


def worlds_of(seed: int) -> list[type[Scenario]]:
    """The worlds of a schedule: none in most of them, else mostly one."""
    rng = random.Random(f"worlds of {seed}")  # noqa: S311  # not for secrets
    chosen = [world for world, share in WORLDS.items() if rng.random() < share]
    # Two worlds of unknown creates would each judge what the other has made of them.
    others = [world for world in chosen if issubclass(world, UnknownCreates)][1:]
    return [world for world in chosen if world.alone][:1] or [world for world in chosen if world not in others]
