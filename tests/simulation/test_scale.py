"""Loads at 280 predictions a second in virtual time, with AWS's and Replicate's quotas; `make scale` runs them in full.

Each is a few seconds or a few thousand predictions of the full load, which show what is throttled, since DynamoDB's
limits hold for each second; and each is noticed when the code that it rests on is taken out.
"""

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest

from tests.reliability import Recorded
from tests.simulation import without
from tests.simulation.installed import Simulation
from tests.simulation.scale import (
    REQUESTS_CONCURRENCY,
    Result,
    fairness,
    lines,
    lost_webhooks,
    stalled,
    steady,
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _seldom_collected() -> Iterator[None]:
    """Thousands of open predictions are no garbage: looking at each again and again takes a quarter of the time."""
    thresholds = gc.get_threshold()
    gc.set_threshold(50_000, 10, 10)
    yield
    gc.set_threshold(*thresholds)


def _with(taken_out: AbstractContextManager[None] | None) -> AbstractContextManager[None]:
    return taken_out or nullcontext()


def assert_kept(result: Result, *, kept: bool) -> None:
    """All of it was kept; or something was not, where code is taken out."""
    assert (not result.broken) == kept, result.broken[:5]


@pytest.mark.parametrize(("owners", "door"), [(1, "http"), (1000, "queue")])
def test_a_million_predictions_an_hour_are_not_throttled(
    simulation: Simulation, owners: int, door: str, record_property: Recorded
) -> None:
    result = steady(simulation, owners=owners, door=door, during=6, runs=0.1)
    assert_kept(result, kept=True)
    record_property("predictions under load", len(result.world.ended))


def test_a_million_predictions_an_hour_throttle_the_index_without_its_shards(simulation: Simulation) -> None:
    with without.shards():
        result = steady(simulation, owners=1, door="queue", during=6, runs=0.1)
    assert result.world.throttled["write: a key of due"] > 0
    assert_kept(result, kept=False)


@pytest.mark.parametrize(("taken_out", "kept"), [(None, True), (without.polls(), False)], ids=["", "without polls"])
def test_predictions_whose_webhooks_are_all_lost_are_polled_to_their_end(
    simulation: Simulation, taken_out: AbstractContextManager[None] | None, kept: bool, record_property: Recorded
) -> None:
    with _with(taken_out):
        result = lost_webhooks(simulation, predictions=560, within=200)
    assert_kept(result, kept=kept)
    record_property("predictions under load", len(result.world.ended))


@pytest.mark.parametrize(
    ("taken_out", "kept"), [(None, True), (without.shared_sweep(), False)], ids=["", "without shared sweep"]
)
def test_stalled_predictions_are_replaced_by_the_first_sweeps(
    simulation: Simulation, taken_out: AbstractContextManager[None] | None, kept: bool
) -> None:
    # Of the same quota a second as 10,000 in five minutes.
    with _with(taken_out):
        result = stalled(simulation, predictions=1400, within=75)
    assert_kept(result, kept=kept)


def test_lines_of_batches_drain_at_the_rate_of_creates(simulation: Simulation) -> None:
    assert_kept(lines(simulation, batches=4, of=150, creates_per_minute=2400, least=0.8), kept=True)


@pytest.mark.parametrize(
    ("requests_concurrency", "kept"), [(REQUESTS_CONCURRENCY, True), (None, False)], ids=["", "without it"]
)
def test_lines_drain_at_a_high_rate_only_with_the_concurrency_of_the_queue_raised(
    simulation: Simulation, requests_concurrency: int | None, kept: bool
) -> None:
    """270 lines a second may start; five consumers of five messages take some sixty."""
    result = lines(simulation, batches=10, of=60, least=0.8, requests_concurrency=requests_concurrency)
    assert_kept(result, kept=kept)


@pytest.mark.parametrize(
    ("taken_out", "kept"),
    [(None, True), (without.near_starts_left_to_the_fastest(), False)],
    ids=["", "without giving way"],
)
def test_lines_of_many_functions_at_once_take_starts_without_contending_for_the_same(
    simulation: Simulation, taken_out: AbstractContextManager[None] | None, kept: bool
) -> None:
    with _with(taken_out):
        result = lines(simulation, batches=10, of=100, least=0.0)
    assert (not result.broken and not result.world.throttled) == kept, result.broken


@pytest.mark.parametrize(
    ("taken_out", "kept"), [(None, True), (without.message_groups(), False)], ids=["", "without groups"]
)
def test_single_message_does_not_wait_for_the_lines_of_another_owner(
    simulation: Simulation, taken_out: AbstractContextManager[None] | None, kept: bool
) -> None:
    with _with(taken_out):
        result = fairness(simulation, batches=20, of=300, after=5, concurrency=2)
    assert_kept(result, kept=kept)
