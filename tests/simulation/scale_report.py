"""Run the loads of `scale` in full, and write what they showed into docs/scale.md: `make scale`.

--seconds N    virtual seconds of the steady loads (600)
--lines N      lines of each of the ten batches (5000)
--only NAME    one load; nothing is written
"""

import argparse
import gc
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from tests.simulation.installed import installed
from tests.simulation.loaded import LoadedWorld
from tests.simulation.scale import Result, fairness, lines, lost_webhooks, stalled, steady
from tests.support.template import ROOT

PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- begin: make scale -->", "<!-- end: make scale -->"
Row = tuple[str, list[str], bool]


def loads(seconds: int, of: int) -> dict[str, Callable[..., Result]]:
    """The loads by name, as the table has them."""
    return {
        f"280 a second for {seconds} s, one owner, half over HTTP and half by the queue": partial(
            steady, owners=1, door="both", during=seconds
        ),
        f"280 a second for {seconds} s, a thousand owners, half over HTTP and half by the queue": partial(
            steady, owners=1000, door="both", during=seconds
        ),
        "10,000 open predictions, all webhooks lost": lost_webhooks,
        "10,000 open predictions, all executions stopped": stalled,
        f"ten batches of {of:,} lines at once, of ten owners": partial(lines, of=of),
        "one owner's 20 batches of 5,000 lines, then another owner's message": fairness,
    }


def run_one(name: str, seconds: int, of: int) -> Row:
    """Runs one load in this process; its row."""
    # Thousands of open predictions are no garbage: looking at each again and again takes a quarter of the time.
    gc.set_threshold(50_000, 10, 10)
    shown = [time.monotonic()]

    def progress(world: LoadedWorld) -> None:
        if time.monotonic() - shown[0] > 5:
            shown[0] = time.monotonic()
            print(f"{world.seconds:7.0f} virtual s  {len(world.ended):>8,} ended  {name}", flush=True)

    with installed() as simulation:
        result = loads(seconds, of)[name](simulation, progress=progress)
    return row_of(name, result)


def row_of(name: str, result: Result) -> Row:
    """A load as a row of the table, and whether it kept everything."""
    world = result.world
    peaks = world.limits.peaks
    keys = {what: f"{peaks.get(f'write: {key}', 0):,.0f}" for what, key in _KEYS.items()}
    throttled = sum(n for what, n in world.throttled.items() if not what.startswith("failed"))
    cells = [
        f"{len(world.ended):,}",
        f"{result.drained:,.0f} s" + "".join(f"; {note}" for note in result.notes),
        f"{world.late(0.5):.1f} / {world.late(0.99):.1f} s",
        ", ".join(f"{what} {peak}" for what, peak in keys.items()),
        f"{peaks.get('write: all of table', 0):,.0f}",
        f"{world.functions.peaks['all functions']:,}",
        "; ".join(result.broken[:2]) or (f"none; {throttled:,} calls retried" if throttled else "none"),
    ]
    return name, cells, not result.broken


_KEYS = {"`due`": "a key of due", "`by_owner`": "a key of by_owner", "`limiter`": "limiter"}


def table_of(rows: list[Row]) -> str:
    """The rows as a table."""
    head = (
        "| load | predictions | drained after | completion to visible, p50 / p99 | write units of the busiest key "
        "in a second (of 1,000) | of the table | functions at once | broken |"
    )
    body = "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells, _ in rows)
    return f"{head}\n|{'---|' * 8}\n{body}"


def main() -> int:
    """Run; return 1 where something was not kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.scale_report", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--lines", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only")
    arguments = parser.parse_args()
    names = [name for name in loads(arguments.seconds, arguments.lines) if (arguments.only or "") in name]
    run = partial(run_one, seconds=arguments.seconds, of=arguments.lines)
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = list(pool.map(run, names))
    print(table_of(rows))
    if not arguments.only:
        page = PAGE.read_text()
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{table_of(rows)}\n\n{END}{rest.partition(END)[2]}")
        print(f"written to {PAGE.relative_to(ROOT)}")
    return 0 if all(kept for *_, kept in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
