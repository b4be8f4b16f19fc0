"""Load on the limiter in virtual time: the real `Submissions`, `Limiter` and table, and executions that only wait.

What the promises say of the rate and of owners is measured here: goodput above the rate, fairness between owners,
starts that are given back, and how often a prediction asks.
"""

import heapq
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from predictions import aws
from predictions.errors import PredictionThrottled, Problem
from predictions.executions import Executions
from predictions.limiter import Limiter
from predictions.limits import OwnersUsage
from predictions.observability import logger, metrics
from predictions.outputs import OutputsBucket
from predictions.submissions import Submissions
from predictions.table import PredictionsTable
from predictions.upstream import Replicate, Token

from tests.reliability import Recorded
from tests.simulation.account import AwsError, Clients, raise_client_error
from tests.simulation.dynamodb import ConditionFailed, Table
from tests.unit.conftest import TIMING
from tests.unit.fakes import API_URL, Clock, ReplicateInMemory
from tests.unit.test_submissions import wanted

ARN = "arn:aws:states:us-east-1:123456789012:stateMachine:track-prediction"
RATE = 60
"""Creates a minute; the queue's lane has nine tenths of it."""
DAY = 86400


@dataclass
class Request:
    """One request, and what became of it.

    Attributes:
        asks: How often its execution, or its caller, ran a function to submit it.
        started: When Replicate got it.
        refused: The problem that its caller got instead.
    """

    owner: str
    came: float
    id: str = ""
    asks: int = 0
    started: float | None = None
    refused: Problem | None = None


@dataclass
class Stack:
    """A stack whose clock is moved by what happens next."""

    clock: Clock
    replicate: ReplicateInMemory
    clients: Clients
    rate: int = RATE
    seed: int = 1
    requests: dict[str, Request] = field(default_factory=dict)
    limiter_writes: int = 0
    starts: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.begin = self.clock.now()
        self.table = Table(self.clock.now)
        self.clients.world = self  # type: ignore[assignment]  # answers calls as a world does
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        dynamodb = aws.client("dynamodb")
        upstream = Replicate(ReplicateInMemory.URL, Token("replicate-token"), self.replicate.client())
        outputs = OutputsBucket("outputs", open_client=self.replicate.client, clock=self.clock.now)
        self.predictions = PredictionsTable("predictions", outputs, dynamodb)
        self.functions = [
            Submissions(
                self.predictions,
                upstream,
                Executions(ARN, aws.client("stepfunctions")),
                TIMING,
                limiter=Limiter("predictions", dynamodb, creates_per_minute=self.rate, now=self.clock.now),
                usage=OwnersUsage("predictions", dynamodb, now=self.clock.now),
                now=self.clock.now,
            )
            for _ in range(4)
        ]

    # -- what calls are answered --------------------------------------------------------------------------------

    def call(self, service: str, operation: str, asked: dict[str, Any], client: Any) -> Any:
        """A call of the library."""
        if service == "dynamodb":
            if operation == "UpdateItem" and asked["Key"]["pk"]["S"] == "limiter":
                self.limiter_writes += 1
            try:
                return self.table.call(operation, asked)
            except ConditionFailed as failed:
                raise_client_error(client, operation, AwsError("ConditionalCheckFailedException", failed.item))
        if operation == "StartExecution":
            if json.loads(asked["input"])["submit"]:
                self.later(self.rng.uniform(0.05, 0.4), lambda: self.submit(asked["name"].rpartition("-")[0]))
            return {"executionArn": asked["name"]}
        return {"GetParameter": {"Parameter": {"Value": API_URL}}, "GetSecretValue": {"SecretString": ReplicateInMemory.TOKEN}}[
            operation
        ]

    # -- time -----------------------------------------------------------------------------------------------------

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        """Have something happen after that many seconds."""
        heapq.heappush(self._events, (self.clock.now() + seconds, next(self._order), act))

    def run(self, seconds: float) -> None:
        """Let happen what happens in that many seconds."""
        until = self.clock.now() + seconds
        while self._events and self._events[0][0] <= until:
            self.clock.moment, _, act = heapq.heappop(self._events)
            act()
        self.clock.moment = until

    # -- requests -------------------------------------------------------------------------------------------------

    @property
    def function(self) -> Submissions:
        """One of the warm functions."""
        return self.rng.choice(self.functions)

    def send(self, owner: str, lifetime: int = DAY) -> Request:
        """A message in the queue, written down and tracked."""
        request = Request(owner, self.clock.now())
        intent = wanted(owner=owner, lifetime=f"{lifetime}s")
        request.id = intent.id
        self.requests[intent.id] = request
        now = self.clock.now()
        self.predictions.put_intent(
            intent, version=intent.reference.version, deadline=int(now) + lifetime, expires=int(now) + 30 * DAY,
            claim=False, execution_arn=f"{ARN}:{intent.id}-1", now=now,
        )  # fmt: skip
        item = self.table.items[f"prediction#{intent.id}", "status"]
        item["source"] = {"S": "queue"}
        self.later(self.rng.uniform(0.05, 0.4), lambda: self.submit(intent.id))
        return request

    def post(self, owner: str, lifetime: int = DAY) -> Request:
        """A create over HTTP."""
        request = Request(owner, self.clock.now())
        intent = wanted(owner=owner, lifetime=f"{lifetime}s")
        request.id = intent.id
        self.requests[intent.id] = request
        try:
            self.function.start(intent)
        except Problem as problem:
            request.refused = problem
        else:
            self._look(request)
        return request

    def submit(self, prediction_id: str) -> None:
        """The state SubmitPrediction, and WaitForTurn behind it."""
        request = self.requests[prediction_id]
        request.asks += 1
        try:
            self.function.submit(prediction_id)
        except PredictionThrottled as throttled:
            self.later(throttled.seconds + self.rng.uniform(0.05, 0.4), lambda: self.submit(prediction_id))
        else:
            self._look(request)

    def cancel(self, request: Request) -> None:
        """A cancel by its owner."""
        found = self.predictions.get(request.id)
        assert found is not None
        self.function.cancel(found)

    def _look(self, request: Request) -> None:
        item = self.table.items[f"prediction#{request.id}", "status"]
        if "upstream_id" in item and request.started is None:
            request.started = self.clock.now()
            if "reserved_start" in item:
                lane = "http" if item["source"]["S"] == "http" else "queue"
                self.starts.append((lane, int(item["reserved_start"]["N"]) // 1000))

    # -- what is measured -----------------------------------------------------------------------------------------

    def of(self, owner: str) -> list[Request]:
        """The requests of one owner."""
        return [each for each in self.requests.values() if each.owner == owner]

    def started_in(self, minutes: int) -> list[int]:
        """How many started in each of the first minutes."""
        per_minute = Counter(int((each.started - self.begin) // 60) for each in self.requests.values() if each.started)
        return [per_minute[minute] for minute in range(minutes)]

    def check(self, per_second: float, burst: float) -> None:
        """No start is used twice, and no window of a second or more has more starts than the rate allows."""
        assert len(self.starts) == len(set(self.starts)), "a start time was handed out twice"
        times = sorted(each.started for each in self.requests.values() if each.started)
        worst = 0.0
        level, last = 0.0, 0.0
        for time in times:  # a bucket that leaks at the rate: what is in it beyond the burst was too much
            level = max(0.0, level - (time - last) * per_second) + 1
            last = time
            worst = max(worst, level)
        assert worst <= burst, worst


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clients]:
    """Clients that are answered by the table in memory."""
    clients = Clients()
    monkeypatch.setattr(aws, "_client", clients)
    monkeypatch.setattr(aws, "_api_url", None)
    monkeypatch.setattr(metrics, "add_metric", lambda **_: None)
    monkeypatch.setattr("predictions.submissions.count_ended", lambda *_: None)
    level = logger.log_level
    logger.setLevel("CRITICAL")
    yield clients
    logger.setLevel(level)
    aws._api_url = None


@pytest.fixture
def stack(clients: Clients, clock: Clock, replicate: ReplicateInMemory) -> Stack:
    """A stack of 60 creates a minute."""
    return Stack(clock, replicate, clients)


def arrive(stack: Stack, come: Callable[[str, int], Request], per_minute: float, minutes: int, lifetimes: Any,
           owners: tuple[str, ...] = ("alice",)) -> None:  # fmt: skip
    """Have requests come at a rate, of these lifetimes and owners in turn."""
    for n in range(int(per_minute * minutes)):
        lifetime, owner = lifetimes[n % len(lifetimes)], owners[n % len(owners)]

        def one(owner: str = owner, lifetime: int = lifetime) -> None:
            come(owner, lifetime)

        stack.later(n * 60 / per_minute, one)



def report(stack: Stack, minutes: int) -> None:
    rs = list(stack.requests.values())
    print("\n", stack.started_in(minutes), "writes/req %.2f asks/req %.2f max asks %d" % (stack.limiter_writes / len(rs), sum(r.asks for r in rs)/len(rs), max(r.asks for r in rs)), "refused", sum(r.refused is not None for r in rs), "started", sum(r.started is not None for r in rs))

@pytest.mark.parametrize("lifetimes", [(60,), (60, DAY), (DAY,), (60, 60, 60, 300), (30, 60, 600, 3600, DAY)], ids=str)
@pytest.mark.parametrize("door", ["send", "post"])
@pytest.mark.parametrize("owners", [1, 3, 10])
def test_print(stack: Stack, lifetimes, door, owners) -> None:
    arrive(stack, getattr(stack, door), 1.2 * (54 if door == "send" else 60), 20, lifetimes, tuple(f"o{n}" for n in range(owners)))
    stack.run(20 * 60)
    report(stack, 20)
    stack.check(0.9 if door == "send" else 1, 15)

def test_backlog(stack: Stack) -> None:
    stack = Stack(stack.clock, stack.replicate, stack.clients, rate=600)
    for _ in range(5000):
        stack.send("alice")
    single = []
    for n in range(20):
        stack.later(20*n+7.3, lambda n=n: single.append(stack.send(f"bob{n}")))
    stack.run(14*60)
    report(stack, 14)
    print("waits of singles", [round(r.started - r.came, 1) for r in single])
    print(Counter(r.asks for r in stack.of("alice")))
    stack.check(9, 30)

def test_two(stack: Stack) -> None:
    stack = Stack(stack.clock, stack.replicate, stack.clients, rate=600)
    for o, n in (("a", 3000), ("b", 1000), ("c", 300)):
        for _ in range(n):
            stack.send(o)
    stack.run(14*60)
    report(stack, 14)
    for o in "abc":
        print(o, Counter(r.asks for r in stack.of(o)), max(r.started-r.came for r in stack.of(o)))
    stack.check(9, 30)

def test_canceled(stack: Stack) -> None:
    stack = Stack(stack.clock, stack.replicate, stack.clients, rate=600)
    rs = [stack.send("alice") for _ in range(1500)]
    stack.run(3)
    for r in rs: stack.cancel(r)
    b = stack.send("bob"); a = stack.send("alice")
    stack.run(60)
    report(stack, 1)
    print(a.started-a.came, b.started-b.came, {k: v for k, v in stack.table.items["limiter","creates"].items()})
