"""Fixtures: a simulation for each test."""

from collections.abc import Iterator

import pytest

from tests.simulation.installed import Simulation, installed


@pytest.fixture
def simulation() -> Iterator[Simulation]:
    """The library in a world of its own."""
    with installed() as simulation:
        yield simulation
