"""Load on the limiter in virtual time: the real `Submissions`, `Limiter` and table, and executions that only wait.

What the promises say of the rate and of owners is measured here: goodput above the rate, fairness between owners,
starts that are given back, and how often a prediction asks.
"""

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from predictions.admission.quotas import OwnersUsage
from predictions.admission.rate_limiter import Limiter
from predictions.admission.schedule import BURST_SECONDS
from predictions.aws import clients as aws
from predictions.aws.dynamodb import Table as AwsTable
from predictions.aws.executions import Executions
from predictions.errors import PredictionThrottled, Problem
from predictions.files.outputs_bucket import OutputsBucket
from predictions.observability import logger, metrics
from predictions.store.predictions import PredictionsTable
from predictions.store.recent_requests import RecentRequests
from predictions.upstream.client import Replicate
from predictions.upstream.credentials import Token

from tests.reliability import Recorded
from tests.support.aws_clients import AwsError, Clients, raise_client_error
from tests.support.downloads import downloads_of
from tests.support.dynamodb import ConditionFailed, Table
from tests.support.fakes import API_URL, Clock, ReplicateInMemory
from tests.support.fixtures import TIMING
from tests.support.predictions import wanted
from tests.support.protocol import Submissions

pytestmark = pytest.mark.slow

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
        self.rng = random.Random(self.seed)  # noqa: S311  # a seed makes it the same again
        self.begin = self.clock.now()
        self.table = Table(self.clock.now)
        self.clients.world = self
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        dynamodb = aws.client("dynamodb")
        upstream = Replicate(ReplicateInMemory.URL, Token("replicate-token"), self.replicate.client())
        outputs = OutputsBucket("outputs", open_client=downloads_of(self.replicate.client), clock=self.clock.now)
        self.predictions = PredictionsTable("predictions", outputs, dynamodb)
        self.functions = [
            Submissions(
                self.predictions,
                upstream,
                Executions(ARN, aws.client("stepfunctions")),
                TIMING,
                limiter=Limiter("predictions", dynamodb, creates_per_minute=self.rate, now=self.clock.now),
                recent=RecentRequests(AwsTable("predictions", dynamodb)),
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
            if asked["stateMachineArn"] == ARN:
                self.later(self.rng.uniform(0.05, 0.4), lambda: self.submit(asked["name"].rpartition("-")[0]))
            return {"executionArn": asked["name"]}
        return {
            "GetParameter": {"Parameter": {"Value": API_URL}},
            "GetSecretValue": {"SecretString": ReplicateInMemory.TOKEN},
        }[operation]

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

    def asks(self) -> float:
        """How often a request asks, on average."""
        return sum(each.asks for each in self.requests.values()) / len(self.requests)

    def check(self, per_second: float, burst_seconds: float = 0) -> None:
        """No start is used twice, and no window has more starts than the rate allows, and the burst.

        A start is a second early at most, and late by its whole second, the state's and the calls before it.
        """
        burst = (burst_seconds + 3.4) * per_second + 1
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
    monkeypatch.setattr("predictions.lifecycle.transitions.count_ended", lambda *_: None)
    level = logger.log_level
    logger.setLevel("CRITICAL")
    yield clients
    logger.setLevel(level)
    aws._api_url = None


@pytest.fixture
def stack(clients: Clients, clock: Clock, replicate: ReplicateInMemory) -> Stack:
    """A stack of 60 creates a minute."""
    return Stack(clock, replicate, clients)


@pytest.fixture
def fast(clients: Clients, clock: Clock, replicate: ReplicateInMemory) -> Stack:
    """A stack of 600 creates a minute, the default."""
    return Stack(clock, replicate, clients, rate=600)


def arrive(stack: Stack, come: Callable[[str, int], Request], per_minute: float, minutes: int, lifetimes: Any,
           owners: tuple[str, ...] = ("alice",)) -> None:  # fmt: skip
    """Have requests come at a rate, of these lifetimes and owners in turn."""
    for n in range(int(per_minute * minutes)):
        lifetime, owner = lifetimes[n % len(lifetimes)], owners[n % len(owners)]

        def one(owner: str = owner, lifetime: int = lifetime) -> None:
            come(owner, lifetime)

        stack.later(n * 60 / per_minute, one)


LOADS = {
    "a minute": (60,),
    "a minute or a day": (60, DAY),
    "a day": (DAY,),
    "half a minute to a day": (30, 60, 600, 3600, DAY),
}
"""Lifetimes of requests, in turn."""


@pytest.mark.parametrize("owners", [1, 3])
@pytest.mark.parametrize("door", ["queue", "http"])
@pytest.mark.parametrize("lifetimes", LOADS)
def test_load_of_120_percent_uses_the_rate_in_each_minute(
    stack: Stack, door: str, lifetimes: str, owners: int, record_property: Recorded
) -> None:
    minutes, rate = 12, RATE * (0.9 if door == "queue" else 1.0)
    come = stack.send if door == "queue" else stack.post
    arrive(stack, come, 1.2 * rate, minutes, LOADS[lifetimes], tuple(f"owner-{n}" for n in range(owners)))
    stack.run(minutes * 60)
    started = stack.started_in(minutes)
    # Turns begin to come in the second minute.
    assert min(started[1:]) >= 0.95 * rate, started
    stack.check(rate / 60, burst_seconds=0 if door == "queue" else BURST_SECONDS)
    assert stack.asks() <= 5
    assert stack.limiter_writes / len(stack.requests) <= 4
    record_property("requests", len(stack.requests))


def test_backlog_of_one_owner_uses_the_rate_and_delays_no_other_owner(fast: Stack, record_property: Recorded) -> None:
    for _ in range(5000):
        fast.send("alice")
    singles: list[Request] = []
    for n in range(20):
        fast.later(7.3 + 20 * n, lambda n=n: singles.append(fast.send(f"owner-{n}")))  # type: ignore[misc]
    fast.run(11 * 60)
    assert min(fast.started_in(9)) >= 0.95 * 540
    assert all(each.started for each in fast.requests.values())
    assert max((each.started or 0) - each.came for each in singles) <= 5
    # The first ask gives the turn, and the second one comes at it; who waits for more than five minutes asks once more.
    asked = Counter(each.asks for each in fast.of("alice"))
    assert asked[1] + asked[2] >= 2500
    assert max(asked) == 3
    fast.check(9)
    record_property("requests", len(fast.requests))


def test_owners_with_backlogs_share_the_lane_and_waste_none_of_it(fast: Stack) -> None:
    sizes = {"alice": 3000, "bob": 1000, "carol": 300}
    for owner, size in sizes.items():
        for _ in range(size):
            fast.send(owner)
    fast.run(600)
    ended = {owner: max(each.started or 1e12 for each in fast.of(owner)) - fast.begin for owner in sizes}
    # Carol is served with a third of the rate; then Bob with half of it; then Alice alone.
    fair = {"carol": 3 * 300 / 9, "bob": 3 * 300 / 9 + 2 * 700 / 9, "alice": 4300 / 9}
    assert all(ended[owner] <= 1.15 * fair[owner] + 5 for owner in sizes), (ended, fair)
    assert ended["alice"] <= 1.05 * fair["alice"]
    assert fast.asks() <= 4
    fast.check(9)


@pytest.mark.parametrize("door", ["queue", "http"])
def test_requests_that_are_canceled_delay_no_owner(fast: Stack, door: str) -> None:
    come = fast.send if door == "queue" else fast.post
    canceled = [come("alice") for _ in range(1500)]
    fast.run(3)
    for each in canceled:
        if each.started is None:
            fast.cancel(each)
    after = [come("bob"), come("alice")]
    fast.run(30)
    assert max((each.started or 1e12) - each.came for each in after) <= 3


def test_request_that_cannot_start_before_its_deadline_fails_and_says_why(stack: Stack) -> None:
    for _ in range(300):
        stack.send("alice")
    stack.run(5)
    before = int(stack.table.items["limiter", "creates"]["queue_turn_alice"]["N"])
    late = [stack.send("alice", lifetime=60) for _ in range(120)]
    stack.run(2)
    line = int(stack.table.items["limiter", "creates"]["queue_turn_alice"]["N"])
    assert line - before <= 5 * 1134, "they have no turns; those of others that came late are as many"
    stack.run(62)
    failed = [each for each in late if each.started is None]
    assert 40 <= len(failed) <= 120
    assert max(each.asks for each in late) <= 4
    for each in failed:
        prediction = stack.predictions.get(each.id)
        assert prediction is not None
        assert prediction.visible == "failed"
        assert "deadline passed before Replicate accepted it" in (prediction.error or "")
        assert "owner alice now wait about" in (prediction.error or "")


def test_turns_that_are_far_ahead_are_taken_early_when_the_lane_is_idle(fast: Stack) -> None:
    backlog = [fast.send("alice") for _ in range(5000)]
    fast.run(3)
    items = {each.id: fast.table.items[f"prediction#{each.id}", "status"] for each in backlog}
    backlog.sort(key=lambda each: int(items[each.id].get("submit_at", {"N": "0"})["N"]))
    for each in backlog[20:4500]:
        # As a batch that is over its budget does: flagged, so that they end at their turns.
        fast.predictions.request_cancel(each.id, fast.clock.now())
    fast.run(310)
    started = [each for each in backlog[4500:] if each.started]
    assert len(started) >= 60, "of 500, whose turns are 500 seconds ahead"


def test_callers_beyond_the_delay_are_refused_and_nothing_is_written(fast: Stack) -> None:
    for _ in range(3300):
        items = {pk for pk, _ in fast.table.items}
        request = fast.post("alice")
        if request.refused is not None:
            break
    # A burst of ten seconds, and five minutes of turns.
    assert 2900 <= len(fast.of("alice")) - 1 <= 3200
    assert request.refused is not None
    assert request.refused.status == 429
    assert request.refused.headers == {"Retry-After": "10"}
    assert "MaxStartDelaySeconds" in request.refused.detail
    assert {pk for pk, _ in fast.table.items} == items
    assert fast.post("bob").refused is None
    fast.run(5)
    assert fast.of("bob")[0].started is not None
    fast.run(330)
    assert all(each.started for each in fast.requests.values() if each.refused is None)


def test_lane_of_an_earlier_release_that_is_days_ahead_holds_nothing_back(stack: Stack) -> None:
    ahead = round((stack.clock.now() + 2 * DAY) * 1000)
    key = {"pk": {"S": "limiter"}, "sk": {"S": "creates"}}
    stack.table.call("PutItem", {"Item": {**key, "queue_at": {"N": str(ahead)}, "http_at": {"N": str(ahead)}}})
    old = [stack.send("alice") for _ in range(20)]
    for each in old:  # reserved by that release, without a number
        item = stack.table.items[f"prediction#{each.id}", "status"]
        item |= {"reserved": {"BOOL": True}, "submit_at": {"N": str(round(stack.clock.now()) + 1)}}
    new = [stack.send("bob"), stack.post("carol"), stack.post("carol")]
    stack.run(60)
    assert all(each.started and each.started - each.came <= 5 for each in new)
    assert all(each.started for each in old)
    # The HTTP lane begins with its burst used up.
    stack.check(0.9 + 1)
