"""The named worlds, and which of them a schedule has."""

import random

from tests.simulation.scenario import Scenario

WORLDS: dict[type[Scenario], float] = {}


def worlds_of(seed: int) -> list[type[Scenario]]:
    """The worlds of a schedule: none in most of them, else mostly one."""
    return []
