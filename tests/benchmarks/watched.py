"""A watched prediction: what it costs to look at it while it runs, counted on a clock that moves by itself.

The real handlers run in the simulation's world, without faults: a client's `run()` of ten minutes takes seconds here.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import httpx

from local.terminal import Terminal
from tests.benchmarks.report import BenchmarkFailed, note, table
from tests.simulation.callers import Wanted
from tests.simulation.installed import installed
from tests.simulation.scenario import Scenario
from tests.simulation.upstream import TERMINAL, Run
from tests.simulation.world import World

POLL_SECONDS = 0.5
"""How long `run()` of the official clients waits between two GETs."""

_WRITES = ("PutItem", "UpdateItem", "DeleteItem")


@dataclass
class Watched:
    """What was counted for one prediction.

    Attributes:
        seconds: How long it ran.
        gets: The caller's GETs.
        reads: Live reads: GETs of Replicate that a caller's GET made.
        polls: GETs of Replicate by the stack itself.
        calls: Calls to DynamoDB of `read_prediction`, by operation.
        growing: Answers that showed more than the one before, while it ran.
    """

    seconds: int
    gets: int = 0
    reads: int = 0
    polls: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    growing: int = 0

    @property
    def writes(self) -> int:
        """Writes of the caller's GETs, refused ones too."""
        return sum(self.calls[operation] for operation in _WRITES)


class _Watch(Scenario):
    """One prediction that runs for some seconds and logs a line each second; one caller, who looks or does not."""

    name = "a watched prediction"
    alone: ClassVar[bool] = True
    found: ClassVar[Watched]
    looks: ClassVar[bool]

    def __init__(self, world: World) -> None:
        super().__init__(world)
        world.faults.calm()
        world.callers.plan = list  # type: ignore[method-assign]
        world.recorder = self._record

    def begin(self) -> None:
        wanted = Wanted(0, "key", "watched", "key", None, None)
        self.world.callers.requests.append(wanted)
        self.world.scheduler.spawn("caller", partial(self._run, wanted))

    def plan(self, run: Run, plan: dict[str, Any]) -> None:
        plan |= {
            "queued_seconds": 0.0, "output_seconds": None, "run_seconds": 0.0, "log_lines": self.found.seconds,
            "status": "succeeded", "files": 0, "text": True,
        }  # fmt: skip

    def answers(self, request: httpx.Request, path: str) -> httpx.Response | None:
        process = self.world.scheduler.current
        if request.method == "GET" and path.startswith("/predictions/") and process is not None:
            if process.name == "read_prediction":
                self.found.reads += 1
            else:
                self.found.polls += 1
        return None

    def _record(self, service: str, operation: str, *_: Any) -> None:
        process = self.world.scheduler.current
        if service == "dynamodb" and process is not None and process.name == "read_prediction":
            self.found.calls[operation] += 1

    def _run(self, wanted: Wanted) -> None:
        callers, logs = self.world.callers, ""
        callers.post(wanted)
        for _ in range(int(self.found.seconds / POLL_SECONDS) + 100 if self.looks else 0):
            self.world.scheduler.sleep(POLL_SECONDS)
            self.found.gets += 1
            shown = json.loads(callers.call("read_prediction", "GET", f"/predictions/{wanted.accepted_id}")["body"])
            self.found.growing += shown["status"] == "processing" and len(shown["logs"]) > len(logs)
            logs = shown["logs"]
            if shown["status"] in TERMINAL:
                break


def measure(seconds: Iterable[int] = (10, 600), *, looks: bool = True) -> list[Watched]:
    """Run one prediction of each length.

    Args:
        seconds: The lengths.
        looks: Whether its caller looks.

    Raises:
        BenchmarkFailed: It did not complete.
    """
    found = []
    with installed() as simulation:
        for length in seconds:
            _Watch.found, _Watch.looks = Watched(length), looks
            verdict = simulation.run(1, scenarios=[_Watch])
            if verdict.broken:
                raise BenchmarkFailed(f"a watched prediction of {length} s: {verdict.broken[0]}")
            found.append(_Watch.found)
    return found


def show(terminal: Terminal, found: list[Watched], unwatched: list[Watched]) -> None:
    """Show what looking takes, in all and for each minute."""
    terminal.write()
    terminal.write(
        table(
            ("run() of", "GETs", "live reads", "  a minute", "writes", "  a minute", "reads of the table",
             "answers that grew", "polls", "live reads, unwatched"),
            [
                (
                    f"{each.seconds} s",
                    f"{each.gets:,}",
                    str(each.reads),
                    f"{60 * each.reads / each.seconds:.1f}",
                    str(each.writes),
                    f"{60 * each.writes / each.seconds:.1f}",
                    f"{each.calls['Query'] + each.calls['GetItem']:,}",
                    str(each.growing),
                    str(each.polls),
                    str(other.reads),
                )
                for each, other in zip(found, unwatched, strict=True)
            ],
        )
    )  # fmt: skip
    terminal.write(
        note(
            f"A model that logs a line each second; its caller asks every {POLL_SECONDS:g} s, as run() of the official "
            "clients. Counted with the real handlers on a clock that moves by itself. Writes are those of the GETs: "
            "when a read began, what it brought, and the lease of the stack's budget. What promise 7 counts does not "
            "include them."
        )
    )
