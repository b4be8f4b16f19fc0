"""A world of callers who look at running predictions: each GET may ask Replicate."""

import json
from collections import Counter
from functools import partial
from typing import Any, ClassVar

import httpx

from tests.simulation.callers import Wanted
from tests.simulation.scenario import Scenario
from tests.simulation.upstream import TERMINAL, Run
from tests.simulation.world import World

_WATCHERS = 3
_LOOKS = 80
_ORDER = {"starting": 0, "processing": 1}


class Watchers(Scenario):
    """Several callers look at each prediction until it has ended, and a little longer."""

    name = "watchers"
    foci: ClassVar[tuple[str, ...]] = ("read_prediction", "read_prediction", "dynamodb.UpdateItem")
    waits: ClassVar[tuple[float, ...]] = (0.3, 0.5, 1.0, 7.0)

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._counted: Counter[str] = Counter()
        self._reads: dict[str, list[float]] = {}
        """When Replicate was asked by a GET, by its id of the prediction."""

    def dress(self, wanted: Wanted) -> None:
        """With watchers."""
        for number in range(_WATCHERS):
            self.world.scheduler.spawn(f"watcher {wanted.number}.{number}", partial(self._watch, wanted))

    def plan(self, run: Run, plan: dict[str, Any]) -> None:
        """It says something each second; of its end mostly a GET is the first to know."""
        if self.rng.random() < 0.6:
            self.world.faults.lose_webhooks()
        plan["log_lines"] = self.rng.choice((5, 20))

    def answers(self, request: httpx.Request, path: str) -> httpx.Response | None:
        """Notes the reads of GETs."""
        process = self.world.scheduler.current
        if process is not None and process.name == "read_prediction":
            self._reads.setdefault(path.split("/")[2], []).append(self.world.scheduler.now)
        return None

    def _watch(self, wanted: Wanted) -> None:
        world = self.world
        last: dict[str, Any] = {"status": "starting", "logs": ""}
        for _ in range(_LOOKS):
            world.scheduler.sleep(self.rng.choice(self.waits))
            if wanted.accepted_id in (None, "nothing"):
                continue
            path = f"/{wanted.collection}/{wanted.accepted_id}"
            answer = world.callers.call("read_prediction", "GET", path, owner=wanted.owner)
            if answer["statusCode"] != 200:
                continue
            self._counted["answers"] += 1
            shown = json.loads(answer["body"])
            self._compare(wanted, last, shown)
            last = shown

    def _compare(self, wanted: Wanted, before: dict[str, Any], after: dict[str, Any]) -> None:
        if "replicate.delivery" in json.dumps({**after, "input": None}):
            self.bad(f"{after['id']}: a GET shows a URL of Replicate's while {after['status']}")
        if before["status"] in TERMINAL and after["status"] != before["status"]:
            self.bad(f"{after['id']}: {before['status']} became {after['status']}")
        if _ORDER.get(after["status"], 2) < _ORDER.get(before["status"], 2):
            self.bad(f"{after['id']}: {before['status']} went back to {after['status']}")
        if wanted.deleted and not before.get("data_removed") and after["data_removed"] and after["logs"]:
            self.bad(f"{after['id']}: deleted logs are shown")
        if after["status"] == "processing" and len(after["logs"]) > len(before["logs"]) > 0:
            self._counted["answers that grew while it ran"] += 1

    def check(self) -> None:
        """No prediction was read more often than once a second."""
        for upstream_id, moments in self._reads.items():
            seconds = max(moments) - min(moments)
            # A slow call before a read can bring it into the next one's second.
            if len(moments) > seconds + 5:
                self.bad(f"{upstream_id}: read {len(moments)} times in {seconds:.1f} s")

    def figures(self) -> dict[str, int]:
        """Answers, and reads."""
        return {**self._counted, "reads of Replicate": sum(map(len, self._reads.values()))}


class BusyWatchers(Watchers):
    """All of them look several times a second, at a prediction that runs for a while."""

    name = "busy watchers"
    waits: ClassVar[tuple[float, ...]] = (0.2, 0.3)

    def plan(self, run: Run, plan: dict[str, Any]) -> None:
        """It runs for longer than they look."""
        super().plan(run, plan)
        plan["run_seconds"] = 30.0
