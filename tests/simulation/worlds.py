"""The named worlds, and which of them a schedule has."""

import random

from tests.simulation.attacks import Backlog, Killer, OldKeys, Overload, PoisonMessage, Tarpit, TokenFlood
from tests.simulation.jobs import Batches, Pipelines, Trainings
from tests.simulation.notices import Events, Redelivery, TaskTokens, Webhooks
from tests.simulation.scenario import Scenario

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
}
"""The share of the schedules that have each of them."""


def worlds_of(seed: int) -> list[type[Scenario]]:
    """The worlds of a schedule: none in most of them, else mostly one."""
    rng = random.Random(f"worlds of {seed}")  # noqa: S311  # not for secrets
    chosen = [world for world, share in WORLDS.items() if rng.random() < share]
    return [world for world in chosen if world.alone][:1] or chosen
