"""Run many schedules, or one step by step: ``python -m tests.simulation``, ``make sim``.

--schedules N        so many, from --from on, with progress; the figures go to docs/simulation.md with --write
--seed N             one, with every step and what it breaks
--trace N …          the steps of these, and nothing else
"""

import argparse
import contextlib
import multiprocessing
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.installed import installed, run_seeds
from tests.simulation.sabotages import SABOTAGE_SCHEDULES, SABOTAGES
from tests.simulation.scenario import Scenario
from tests.simulation.verdict import Verdict
from tests.simulation.worlds import WORLDS
from tests.support.template import ROOT

CHUNK = 250
FIGURES = ROOT / "docs" / "simulation.md"


def main() -> int:
    """Run; return 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--schedules", type=int, default=100_000)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--trace", type=int, nargs="+")
    arguments = parser.parse_args()
    if arguments.trace:
        with installed() as simulation:
            for seed in arguments.trace:
                simulation.run(seed, trace=print)
        return 0
    if arguments.seed is not None:
        return one(arguments.seed)
    return many(arguments.first, arguments.schedules, arguments.processes, write=arguments.write)


def one(seed: int) -> int:
    """Runs one schedule and shows its steps."""
    with installed() as simulation:
        verdict = simulation.run(seed, trace=print)
    print()
    for name, number in verdict.figures.items():
        print(f"{number:>8}  {name}")
    for what in verdict.broken:
        print(f"BROKEN: {what}")
    print("broken" if verdict.broken else "every promise was kept")
    return 1 if verdict.broken else 0


def many(first: int, schedules: int, processes: int, *, write: bool) -> int:
    """Runs schedules in several processes, with progress, and says what happened in them, also if interrupted."""
    chunks = [range(at, min(at + CHUNK, first + schedules)) for at in range(first, first + schedules, CHUNK)]
    figures: Counter[str] = Counter()
    worst: dict[str, float] = {}
    broken: list[Verdict] = []
    done, began = 0, time.monotonic()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell ignores it for its background
    # Ctrl-C reaches the processes as well: they leave it to this one.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), signal.signal, ignore)
    with contextlib.suppress(KeyboardInterrupt):
        for number, counted, longest, failed in pool.map(run_seeds, chunks):
            done += number
            figures.update(counted)
            for what, delay in longest.items():
                worst[what] = max(worst.get(what, 0.0), delay)
            broken += failed
            seconds = time.monotonic() - began
            for verdict in failed:
                print(f"\nseed {verdict.seed}: {verdict.broken[0]}\n  make sim SEED={verdict.seed}")
            print(
                f"\r{done:>7} of {schedules}, {done / seconds:.0f} a second, {len(broken)} broken", end="", flush=True
            )
    pool.shutdown(wait=False, cancel_futures=True)
    schedules = done  # fewer if it was interrupted
    print()
    for name, count in sorted(figures.items()):
        print(f"{count:>12,}  {name}")
    for name, delay in sorted(worst.items()):
        print(f"{delay:>12,.0f}  {name}")
    if write:
        FIGURES.write_text(report(schedules, figures, worst, broken, time.monotonic() - began, first, processes))
        print(f"written to {FIGURES.relative_to(ROOT)}")
    return 1 if broken else 0


def report(
    schedules: int,
    figures: Counter[str],
    worst: dict[str, float],
    broken: list[Verdict],
    seconds: float,
    first: int,
    processes: int,
) -> str:
    """The figures, as a page."""
    common = {name: count for name, count in figures.items() if not name.startswith(WORLD)}
    rows = "\n".join(f"| {name} | {count:,} |" for name, count in sorted(common.items()))
    worlds = "\n".join(_world(world, figures, worst) for world in WORLDS)
    return f"""# Simulation: the figures of `make sim`

Written by `make sim`; see [tests/simulation](../tests/simulation/world.py) for the method. The real library, handlers
and state machines ran {schedules:,} schedules of faults (seeds {first} to {first + schedules - 1}) in virtual time.

**{len(broken)} schedules broke a promise**: a prediction lost, started twice or late, a terminal status changed, a file
missing or partial, a notification missing, or one owner delayed by another. They took {seconds:,.0f} s in {processes}
processes: {schedules / seconds:.0f} per second.

| in all schedules | |
|---|---|
{rows}

## Worlds

Every schedule has predictions and their callers. Some add more: each of these worlds alone or with others. The
delays are the longest of any schedule that has the world alone.

| world | adds | figures | longest delays |
|---|---|---|---|
{worlds}

{len(SABOTAGES)} sabotages of the code are each detected within {SABOTAGE_SCHEDULES:,} of these schedules by
`make slow`: see [their list](../tests/simulation/sabotages.py).
"""


WORLD = "world "


def _world(world: type[Scenario], figures: Counter[str], worst: dict[str, float]) -> str:
    """The row of one world."""
    start = f"{WORLD}{world.name}: "
    counted = [f"{count:,} {name.removeprefix(start)}" for name, count in figures.items() if name.startswith(start)]
    delays = [f"{name.removeprefix(start)}: {d:,.0f} s" for name, d in sorted(worst.items()) if name.startswith(start)]
    adds = (world.__doc__ or "").strip().splitlines()[0]
    return f"| {world.name} | {adds} | {', '.join(counted)} | {', '.join(delays)} |"


if __name__ == "__main__":
    sys.exit(main())
