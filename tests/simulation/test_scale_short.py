"""A second of the loads of `test_scale`, for every run of the tests."""

from contextlib import AbstractContextManager, nullcontext

import pytest

from tests.simulation import without
from tests.simulation.installed import Simulation
from tests.simulation.scale import PER_SECOND, lost_webhooks


@pytest.mark.parametrize(
    ("taken_out", "kept"), [(nullcontext(), True), (without.polls(), False)], ids=["", "without polls"]
)
def test_predictions_of_a_second_at_280_a_second_are_polled_if_all_webhooks_are_lost(
    simulation: Simulation, taken_out: AbstractContextManager[None], kept: bool
) -> None:
    with taken_out:
        result = lost_webhooks(simulation, predictions=PER_SECOND, within=200)
    assert (not result.broken) == kept, result.broken[:5]
    assert not result.world.throttled
