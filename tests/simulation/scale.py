"""Loads of a hundred times the usual scale, in virtual time: what each is, and what it has to keep.

Each load is one run of a `LoadedWorld`. Its result has the figures for the table in docs/scale.md and what is broken;
`tests.simulation.test_scale` runs them small, `python -m tests.simulation.scale` (`make scale`) in full.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.simulation.fair_queue import FairQueue
from tests.simulation.installed import Simulation
from tests.simulation.loaded import LoadedWorld
from tests.support.fixtures import ENVIRONMENT
from tests.support.scheduler import BEGIN

PER_SECOND = 280
"""A million an hour."""
MINUTE = 60
RAISED = {"StartExecution": (1000, 2000), "DescribeExecution": (300, 600)}
"""What docs/scale.md says to raise of Step Functions' quotas."""
REQUESTS_CONCURRENCY = 60
MINUTE_AT_MOST = 60.0


@dataclass
class Result:
    """How a load went.

    Attributes:
        broken: What it had to keep and did not.
        drained: When the last of it had visibly ended, in seconds after the last was asked for.
        notes: Further figures, in words.
    """

    world: LoadedWorld
    broken: list[str]
    drained: float
    notes: list[str] = field(default_factory=list)


def owner_of(number: int, owners: int) -> str:
    """The owner of a request: they take turns."""
    return f"owner-{number % owners}"


def sender_of(owner: str) -> str:
    """The role that sends an owner's messages."""
    return f"AROA{owner.replace('-', '').upper()}"


class Arrivals:
    """Requests of many callers that come at random moments, so many a second."""

    def __init__(self, world: LoadedWorld, owners: int, door: str, files: float, seconds: float = 10) -> None:
        self.world = world
        self.accepted: dict[str, float] = {}
        self.answers: Counter[int] = Counter()
        self.asked = 0
        self.last_at = 0.0
        self._owners, self._door, self._files, self._seconds = owners, door, files, seconds

    def begin(self, per_second: int, during: int) -> None:
        """Plans all of them."""
        self.planned = per_second * during
        self._plan(per_second, during)

    def _plan(self, per_second: int, left: int) -> None:
        world = self.world
        now = world.scheduler.now
        for _ in range(per_second):
            world.scheduler.at(now + world.rng.random(), partial(self._ask, self.asked))
            self.asked += 1
        if left > 1:
            world.scheduler.at(now + 1, lambda: self._plan(per_second, left - 1))

    def _ask(self, number: int) -> None:
        world, owner = self.world, owner_of(number, self._owners)
        files = int(world.rng.random() < self._files)
        asked = {"prompt": f"number {number}", "files": files, "seconds": self._seconds}
        self.last_at = world.scheduler.now
        if self._door == "queue" or (self._door == "both" and number % 2):
            body = json.dumps({"model": "meta/llama", "input": asked})
            world.queues["RequestsQueue"].send(
                body,
                sender=sender_of(owner),
                group=owner,
                told=lambda taken: self.answers.update([202 if taken else 500]),
            )
        else:
            world.scheduler.spawn("caller", partial(self._post, owner, asked))

    def _post(self, owner: str, asked: dict[str, Any]) -> None:
        world = self.world
        headers = {"Content-Type": "application/json"}
        began = world.scheduler.now
        for _ in range(5):
            answer = world.callers.call(
                "start_prediction", "POST", "/models/meta/llama/predictions", headers, {"input": asked}, owner
            )
            self.answers[answer["statusCode"]] += 1
            if answer["statusCode"] != 429:
                break
            world.scheduler.sleep(float(answer.get("headers", {}).get("Retry-After", 10)))
        world.longest("answered", world.scheduler.now - began)

    def over(self) -> bool:
        """Whether all of them have ended."""
        return self.asked == self.planned and len(self.world.ended) >= self.planned

    @property
    def lost(self) -> int:
        """How many have not become a prediction that ended."""
        return self.planned - len(self.world.ended)


def senders(owners: int) -> str:
    """`QUEUE_SENDERS` for so many owners."""
    return ",".join(f"{sender_of(owner)}={owner}" for owner in (owner_of(n, owners) for n in range(owners)))


def steady(
    simulation: Simulation, *, owners: int, door: str, during: int, per_second: int = PER_SECOND, runs: float = 10,
    progress: Callable[[LoadedWorld], None] | None = None,
) -> Result:  # fmt: skip
    """So many predictions a second for so many seconds, by HTTP, by the queue, or by both; half of them have a file."""
    world = LoadedWorld(requests_concurrency=REQUESTS_CONCURRENCY, senders=senders(owners))
    arrivals = Arrivals(world, owners, door, files=0.5, seconds=runs)
    world.load(lambda: arrivals.begin(per_second, during), arrivals.over)
    _run(simulation, world, progress)
    broken = [*world.violations]
    if arrivals.lost:
        broken.append(f"{arrivals.lost} of {arrivals.planned} were lost")
    if others := {status: n for status, n in arrivals.answers.items() if status not in (201, 202)}:
        broken.append(f"callers were answered {others}")
    broken += _throttled(world)
    return Result(world, broken, world.ended_at - arrivals.last_at)


def lost_webhooks(
    simulation: Simulation, *, predictions: int = 10_000, within: float = float("inf"),
    progress: Callable[[LoadedWorld], None] | None = None,
) -> Result:  # fmt: skip
    """So many predictions, created at 280 a second, of which no webhook comes: each has to be polled."""
    world = LoadedWorld()
    world.upstream.lost = True
    arrivals = Arrivals(world, 100, "http", files=0.5)

    def over() -> bool:
        return arrivals.over() or world.scheduler.now > arrivals.last_at + within > within

    world.load(lambda: arrivals.begin(PER_SECOND, -(-predictions // PER_SECOND)), over)
    _run(simulation, world, progress)
    broken = [*world.violations, *_failed(world)]
    if arrivals.lost:
        broken.append(f"{arrivals.lost} of {arrivals.planned} were lost")
    refused = world.upstream.refused["others"]
    notes = [f"{refused:,} polls were refused by Replicate and made again"]
    return Result(world, broken, world.ended_at - arrivals.last_at, notes)


def stalled(
    simulation: Simulation, *, predictions: int = 10_000, within: float = 5 * MINUTE, quotas: Any = None,
    progress: Callable[[LoadedWorld], None] | None = None,
) -> Result:  # fmt: skip
    """So many predictions whose executions are stopped: how long after they are due the sweep has replaced all."""
    world = LoadedWorld(quotas=RAISED if quotas is None else quotas, others_per_minute=60_000)
    arrivals = Arrivals(world, 100, "http", files=0.0, seconds=900.0)
    replaced_at: dict[str, float] = {}
    due_at: list[float] = []
    submitted = world.machines["track-submitted"]

    def stop_all() -> None:
        due_at.append(max(world._open.values()))
        for execution in list(submitted.executions.values()):
            submitted.abort(execution)

    def note(name: str, given: str) -> None:
        if not name.endswith("-1"):
            replaced_at.setdefault(name.partition("-")[0], world.scheduler.now)
        start(name, given)

    start, submitted.start = submitted.start, note  # type: ignore[method-assign]
    during = -(-predictions // PER_SECOND)
    world.load(lambda: arrivals.begin(PER_SECOND, during), arrivals.over)
    world.scheduler.at(BEGIN + during + 10, stop_all)
    _run(simulation, world, progress)
    last = max(replaced_at.values(), default=0.0) - due_at[0]
    broken = [*world.violations, *_failed(world)]
    if arrivals.lost:
        broken.append(f"{arrivals.lost} of {arrivals.planned} were lost")
    if len(replaced_at) < arrivals.planned or last > within:
        broken.append(
            f"{len(replaced_at)} of {arrivals.planned} were replaced, the last one {last:.0f} s after it was due"
        )
    runs = world.functions.peaks["sweep_predictions"]
    return Result(world, broken, last, [f"{runs} runs of the sweep at once"])


class Batches:
    """Batches of one owner or several, each asked for over HTTP with a manifest of so many lines."""

    def __init__(self, world: LoadedWorld, owners: Iterable[str], lines: int, seconds: float = 10) -> None:
        self.world = world
        self.lines = lines
        self.ids: list[str] = []
        self._owners, self._seconds = list(owners), seconds

    def begin(self) -> None:
        """Asks for all of them."""
        for n, owner in enumerate(self._owners):
            self.world.scheduler.spawn("owner", partial(self._post, n, owner))

    def _post(self, number: int, owner: str) -> None:
        world = self.world
        key = f"batches/{owner}/{number}.jsonl"
        manifest = "".join(f'{{"n": {n}}}\n' for n in range(self.lines))
        world.account.objects[key] = manifest.encode(), "application/jsonl"
        asked = {"prompt": f"batch {number} line {{{{ row.n }}}}", "files": 0, "seconds": self._seconds}
        body = {
            "manifest": f"s3://{ENVIRONMENT['INPUTS_BUCKET_NAME']}/{key}",
            "template": {"model": "meta/llama", "input": asked},
            "max_concurrency": 1000,
        }
        headers = {"Content-Type": "application/json"}
        answer = world.callers.call("manage_batches", "POST", "/batches", headers, body, owner)
        if answer["statusCode"] == 201:
            self.ids.append(json.loads(answer["body"])["id"])
        else:
            world.violations.append(f"a batch was answered {answer}")

    @property
    def planned(self) -> int:
        """All lines."""
        return self.lines * len(self._owners)

    def items(self) -> list[dict[str, Any]]:
        """What the table holds of them."""
        return [self.world.table.items[f"batch#{id_}", "status"] for id_ in self.ids]

    def over(self) -> bool:
        """Whether all of them have ended."""
        return len(self.ids) == len(self._owners) and not any("open" in item for item in self.items())

    def abort(self) -> None:
        """Stops them where they are, with what waits in the queue."""
        machine = self.world.machines["run-batch"]
        for execution in machine.executions.values():
            machine.abort(execution)
        queue = self.world.queues["RequestsQueue"]
        assert isinstance(queue, FairQueue)
        queue.clear()


def lines(
    simulation: Simulation, *, batches: int = 10, of: int = 2000, creates_per_minute: int = 18_000, least: float = 0.9,
    requests_concurrency: int | None = REQUESTS_CONCURRENCY,
    progress: Callable[[LoadedWorld], None] | None = None,
) -> Result:  # fmt: skip
    """Batches of ten owners at once: how many lines a second they drain once all of them run."""
    world = LoadedWorld(creates_per_minute=creates_per_minute, requests_concurrency=requests_concurrency, quotas=RAISED)
    world.keeps = True
    made = Batches(world, (f"owner-{n}" for n in range(batches)), of)
    world.load(made.begin, made.over)
    times: list[float] = []
    world.noticed = times.append
    _run(simulation, world, progress)
    broken = [*world.violations, *_failed(world)]
    if (succeeded := sum(item["status"]["S"] == "succeeded" for item in made.items())) != batches:
        broken.append(f"{succeeded} of {batches} batches succeeded")
    if len(world.ended) != made.planned:
        broken.append(f"{len(world.ended)} of {made.planned} lines have ended")
    rate = rate_of(times)
    allowed = 0.9 * world.creates_per_minute / 60
    if rate < least * allowed:
        broken.append(f"{rate:.0f} lines a second, where {allowed:.0f} may start")
    lane_end = float(world.table.items["limiter", "creates"]["queue_at"]["N"]) / 1000
    if (counted := (lane_end - BEGIN) * allowed) < made.planned:
        broken.append(f"{made.planned} lines began, and the limiter has counted {counted:.0f} at most")
    hours = 1_000_000 / rate / 3600
    return Result(
        world, broken, world.ended_at - BEGIN, [f"{rate:.0f} lines a second", f"{hours:.2f} hours for a million"]
    )


def rate_of(times: list[float]) -> float:
    """How many a second, without the first and the last tenth."""
    ordered = sorted(times)
    first, last = len(ordered) // 5, len(ordered) * 4 // 5
    return (last - first) / max(1e-9, ordered[last] - ordered[first])


def fairness(
    simulation: Simulation, *, batches: int = 20, of: int = 5000, after: float = 60.0, concurrency: int | None = None,
    progress: Callable[[LoadedWorld], None] | None = None,
) -> Result:  # fmt: skip
    """One owner's batches, of which thousands of lines wait in the queue; then a single message of another owner."""
    world = LoadedWorld(requests_concurrency=concurrency, quotas=RAISED, senders=f"{sender_of('single')}=single")
    world.keeps = True
    made = Batches(world, ["whale"] * batches, of)
    sent: dict[str, float] = {}
    backlog: list[int] = []

    def send() -> None:
        sent["at"] = world.scheduler.now
        queue = world.queues["RequestsQueue"]
        backlog.append(len(queue.messages))
        body = json.dumps({"model": "meta/llama", "input": {"prompt": "single", "files": 0, "seconds": 1}})
        queue.send(body, sender=sender_of("single"), group="single")

    def single() -> float | None:
        return next((run.created for run in world.upstream.runs.values() if run.prompt == "single"), None)

    def over() -> bool:
        if "at" not in sent or (single() is None and world.scheduler.now <= sent["at"] + MINUTE_AT_MOST):
            return False
        made.abort()
        return True

    world.load(made.begin, over)
    world.scheduler.at(BEGIN + after, send)
    _run(simulation, world, progress)
    created = single()
    waited = created - sent["at"] if created else float("inf")
    broken = [*world.violations, *_failed(world)]
    if waited > MINUTE_AT_MOST:
        broken.append(f"the single message waited {waited:.0f} s, behind {backlog[0]} others")
    return Result(world, broken, waited, [f"{backlog[0]:,} messages in the queue before it"])


def _throttled(world: LoadedWorld) -> Iterable[str]:
    return [f"{n} calls were throttled: {what}" for what, n in world.throttled.items()]


def _failed(world: LoadedWorld) -> Iterable[str]:
    return [f"{n} calls {what}" for what, n in world.throttled.items() if what.startswith("failed")]


def _run(simulation: Simulation, world: LoadedWorld, progress: Callable[[LoadedWorld], None] | None) -> None:
    if progress is not None:
        world.progress = partial(progress, world)
    simulation.run_in(world)
