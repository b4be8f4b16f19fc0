"""Schedules of faults against the real code: none breaks a promise, and each sabotage of the code does."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.reliability import Recorded
from tests.simulation.installed import Simulation
from tests.simulation.sabotages import SABOTAGE_SCHEDULES, SABOTAGES, seeds_of
from tests.simulation.scenario import Scenario
from tests.simulation.unknown import Frozen, LateCreates, LateLists, Strangers, UnknownCreates
from tests.simulation.verdict import BEYOND, SECOND_RUNS_CANCELED
from tests.simulation.worlds import WORLDS, worlds_of
from tests.support.template import ROOT

SCHEDULES = 5000
PARTS = 10


@pytest.mark.parametrize("part", range(PARTS))
def test_schedule_of_faults_breaks_no_promise(simulation: Simulation, part: int, record_property: Recorded) -> None:
    for seed in range(part * SCHEDULES // PARTS, (part + 1) * SCHEDULES // PARTS):
        broken = simulation.run(seed).broken
        assert not broken, f"{broken}\n`make sim SEED={seed}` shows it step by step."
    record_property("schedules", SCHEDULES // PARTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotaged_code_breaks_a_promise_in_some_schedule(
    simulation: Simulation, name: str, record_property: Recorded
) -> None:
    record_property("sabotages", 1)
    with SABOTAGES[name]():
        caught = any(simulation.run(seed).broken for seed in seeds_of(name, SABOTAGE_SCHEDULES))
    assert caught, f"{SABOTAGE_SCHEDULES} schedules did not notice: {name}"


def test_schedules_reach_every_kind_of_fault_and_function(simulation: Simulation) -> None:
    seen: set[str] = set()
    for seed in range(300):
        seen |= simulation.run(seed).figures.keys()
    kinds = (
        "aws", "receiver", "create", "read", "webhook", "file", "invoke", "state", "stopped", "bus",
        "handed over again",
    )  # fmt: skip
    assert {f"faults: {kind}" for kind in kinds} <= seen
    functions = (
        "start_prediction", "start_from_queue", "submit_prediction", "poll_prediction", "receive_webhook",
        "copy_outputs", "cancel_prediction", "sweep_predictions", "publish_changes", "deliver_webhook",
        "manage_batches", "prepare_batch", "finish_batch", "manage_pipelines", "advance_pipeline",
    )  # fmt: skip
    assert {f"runs of {function}" for function in functions} <= seen


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_each_world_is_reached_and_breaks_no_promise(
    simulation: Simulation, world: type[Scenario], record_property: Recorded
) -> None:
    # Beside the schedules that have it by their seed.
    for seed in range(3):
        verdict = simulation.run(seed, scenarios=[world])
        assert not verdict.broken, f"{verdict.broken}, seed {seed}"
        assert any(name.startswith(f"world {world.name}: ") for name in verdict.figures)
    record_property("schedules", 3)
    schedules = [seed for seed in range(SCHEDULES) if world in worlds_of(seed)]
    assert len(schedules) >= 10


SITUATIONS = {
    "1 unknown creates in a row", "2 unknown creates in a row", "3 unknown creates in a row",
    "accepted, without a clear answer", "accepted minutes later", "listed within the grace", "listed after the grace",
    "no webhook in list", "no webhook in get", "no input", "no redacted input", "no deployment",
    "no webhook arrives", "strangers", "thawed", "canceled between evidence and submission",
}  # fmt: skip
"""What creates without a clear answer have to be tried in."""


def _situations_of(scenario: UnknownCreates) -> set[str]:
    """The situations that a schedule has been in."""
    world = scenario.world
    runs = [run for run in world.upstream.runs.values() if run.prompt.startswith("unknown ")]
    items = {item["id"]["S"]: item for (_, sk), item in world.table.items.items() if sk == "status" and "id" in item}
    found = {f"{number} unknown creates in a row" for number in scenario.failed.values()}
    found |= {f"no {hidden}" for hidden in world.upstream.hides}
    holds = {
        "accepted, without a clear answer": any("submit_over" in items.get(run.our_id or "", {}) for run in runs),
        "accepted minutes later": any(run.created - run.sent_at >= 60 for run in runs),
        "listed within the grace": any(0 < run.listed_at - run.created <= 45 for run in runs),
        "listed after the grace": any(run.listed_at - run.created > 45 for run in runs),
        "no webhook arrives": world.faults.webhook_is_lost(),
        "strangers": isinstance(scenario, Strangers) and scenario.number_of_strangers > 0,
        "thawed": isinstance(scenario, Frozen) and bool(scenario.failed),
        "canceled between evidence and submission": any(
            "evidence_at" in item and "cancel_requested" in item and item["status"]["S"] == "canceled"
            for item in items.values()
        ),
    }
    return found | {name for name, held in holds.items() if held}


def test_worlds_of_unknown_creates_reach_each_situation(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch, record_property: Recorded
) -> None:
    seen: set[str] = set()
    check = UnknownCreates.check

    def look(scenario: UnknownCreates) -> None:
        seen.update(_situations_of(scenario))
        check(scenario)

    monkeypatch.setattr(UnknownCreates, "check", look)
    worlds = [world for world in WORLDS if issubclass(world, UnknownCreates)]
    for seed in range(10):
        for world in worlds:
            verdict = simulation.run(seed, scenarios=[world])
            assert not verdict.broken, f"{verdict.broken}, seed {seed} of {world.name}"
    record_property("schedules", 10 * len(worlds))
    assert seen >= SITUATIONS, SITUATIONS - seen


@pytest.mark.parametrize("world", [LateLists, LateCreates], ids=lambda world: world.name)
def test_what_is_accepted_or_listed_after_the_second_reading_is_noticed_and_counted(
    simulation: Simulation, world: type[Scenario], record_property: Recorded
) -> None:
    counted: Counter[str] = Counter()
    for seed in range(50):
        verdict = simulation.run(seed, scenarios=[world])
        assert not verdict.broken, f"{verdict.broken}, seed {seed}"
        counted += Counter({name: verdict.figures.get(name, 0) for name in BEYOND})
    for name, number in counted.items():
        record_property(name, number)
    assert counted[SECOND_RUNS_CANCELED] > 0


@pytest.mark.parametrize("seed", [9616, 10267, 12381, 29135, 31674, 44719, 45657, 48775])
def test_schedule_that_once_broke_a_promise_breaks_none(simulation: Simulation, seed: int) -> None:
    broken = simulation.run(seed).broken
    assert not broken, f"{broken}\n`make sim SEED={seed}` shows it step by step."


def test_seed_gives_the_same_schedule_in_another_process(simulation: Simulation) -> None:
    seeds = (3, 42, 77)
    traces: list[str] = []
    for seed in seeds:
        simulation.run(seed, trace=traces.append)
    # Another order of sets and other addresses in memory must not matter.
    again = subprocess.run(  # noqa: S603  # our own module
        [sys.executable, "-m", "tests.simulation", "--trace", *map(str, seeds)],
        cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert again.stdout.splitlines() == traces
    assert len(traces) > 100
