"""Many creates of unknown outcome in virtual time: how long they take to be decided, and what that asks of Replicate.

The real `Submissions`, `UnknownSubmissions`, `Limiter` and table; executions only wait. Replicate's list has pages of a
hundred, each of which takes half a second, and holds what others create as well.
"""

import heapq
import itertools
import json
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import partial
from typing import Any

import httpx
import pytest
from predictions.admission.quotas import OwnersUsage
from predictions.admission.rate_limiter import Limiter
from predictions.aws import clients as aws
from predictions.aws.dynamodb import Table as AwsTable
from predictions.aws.executions import Executions
from predictions.errors import PredictionThrottled
from predictions.files.outputs_bucket import OutputsBucket
from predictions.observability import logger, metrics
from predictions.store.predictions import PredictionsTable
from predictions.store.recent_requests import RecentRequests
from predictions.upstream.client import Replicate
from predictions.upstream.credentials import Token

from tests.reliability import Recorded
from tests.support.aws_clients import AwsError, Clients, raise_client_error
from tests.support.dynamodb import ConditionFailed, Table
from tests.support.fakes import API_URL, Clock, ReplicateInMemory
from tests.support.predictions import wanted
from tests.support.protocol import Submissions, Timing

pytestmark = pytest.mark.slow

ARN = "arn:aws:states:us-east-1:123456789012:stateMachine:track-prediction"
TIMING = Timing(lifetime=86400, training_lifetime=604800, grace=45, first_poll=60, retention=30 * 86400)
PAGE = 100
PAGE_SECONDS = 0.5


class Account:
    """Replicate's account: what it accepted, newest first, and the creates that it loses."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.entries: list[tuple[float, dict[str, Any]]] = []
        self.lists: list[float] = []
        self.answers: dict[str, Callable[[], httpx.Response | None]] = {}
        self.large: dict[str, str] = {}
        self._ids = itertools.count()

    def accept(self, webhook: str, prompt: str) -> dict[str, Any]:
        """One more prediction."""
        now = self.clock.now()
        entry = {
            "id": f"{next(self._ids):026d}", "status": "starting", "webhook": webhook, "input": {"prompt": prompt},
            "created_at": datetime.fromtimestamp(now, UTC).isoformat().replace("+00:00", "Z"),
            "model": "stability-ai/sdxl", "version": "v", "urls": {},
        }  # fmt: skip
        self.entries.append((now, entry))
        return entry

    def handle(self, request: httpx.Request) -> httpx.Response:
        """A create, or a page of the list."""
        request.read()
        if request.method == "POST":
            body = json.loads(request.content)
            prompt = body["input"]["prompt"]
            if (answer := self.answers.get(prompt, lambda: None)()) is not None:
                return answer
            return httpx.Response(201, json=self.accept(body["webhook"], prompt))
        assert request.url.path == "/v1/predictions", request.url
        self.lists.append(self.clock.now())
        self.clock.advance(PAGE_SECONDS)
        start = int(request.url.params.get("cursor", "0"))
        newest = self.entries[::-1]
        page = newest[start : start + PAGE]
        following = f"{ReplicateInMemory.URL}/predictions?cursor={start + PAGE}" if start + PAGE < len(newest) else None
        text = json.dumps({"next": following, "results": [entry for _, entry in page]})
        for marker, value in self.large.items():
            text = text.replace(f'"{marker}"', value)
        now = datetime.fromtimestamp(self.clock.now(), UTC)
        return httpx.Response(200, content=text.encode(), headers={"date": format_datetime(now, usegmt=True)})

    def most_lists_in_a_minute(self) -> int:
        """The most list calls that began within sixty seconds."""
        return max(sum(at <= other < at + 60 for other in self.lists) for at in self.lists)


class Stack:
    """A stack whose clock is moved by what happens next."""

    def __init__(self, clock: Clock, clients: Clients) -> None:
        self.clock = clock
        self.rng = random.Random(1)  # noqa: S311  # a seed makes it the same again
        self.account = Account(clock)
        self.table = Table(clock.now)
        clients.world = self
        self.decided: dict[str, float] = {}
        self.came: dict[str, float] = {}
        self.asks = 0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        dynamodb = aws.client("dynamodb")
        http = httpx.Client(transport=httpx.MockTransport(self.account.handle))
        upstream = Replicate(ReplicateInMemory.URL, Token("replicate-token"), http)
        self.predictions = PredictionsTable("predictions", OutputsBucket("outputs", clock=clock.now), dynamodb)
        self.functions = [
            Submissions(
                self.predictions, upstream, Executions(ARN, aws.client("stepfunctions")), TIMING,
                limiter=Limiter("predictions", dynamodb, creates_per_minute=6000, now=clock.now),
                recent=RecentRequests(AwsTable("predictions", dynamodb)),
                usage=OwnersUsage("predictions", dynamodb, now=clock.now),
                resubmit=True, now=clock.now, sleep=clock.sleep,
            )
            for _ in range(4)
        ]  # fmt: skip

    def call(self, service: str, operation: str, asked: dict[str, Any], client: Any) -> Any:
        """A call of the library."""
        if service == "dynamodb":
            try:
                return self.table.call(operation, asked)
            except ConditionFailed as failed:
                raise_client_error(client, operation, AwsError("ConditionalCheckFailedException", failed.item))
        if operation == "StartExecution":
            if asked["stateMachineArn"] == ARN:
                self.later(0.2, lambda: self.submit(asked["name"].rpartition("-")[0]))
            return {"executionArn": asked["name"]}
        return {
            "GetParameter": {"Parameter": {"Value": API_URL}},
            "GetSecretValue": {"SecretString": ReplicateInMemory.TOKEN},
        }[operation]

    def later(self, seconds: float, act: Callable[[], object]) -> None:
        """Have something happen after that many seconds."""
        heapq.heappush(self._events, (self.clock.now() + seconds, next(self._order), act))

    def run(self) -> None:
        """Let everything happen."""
        while self._events:
            moment, _, act = heapq.heappop(self._events)
            self.clock.moment = max(self.clock.moment, moment)
            act()

    def post(self, prompt: str) -> None:
        """A create over HTTP."""
        began = self.clock.now()
        started = self.rng.choice(self.functions).start(wanted(input={"prompt": prompt}, key=prompt.replace(" ", "-")))
        self.came[started.id] = began
        self._look(started.id)

    def submit(self, prediction_id: str) -> None:
        """The state SubmitPrediction, and WaitForTurn behind it."""
        self.asks += 1
        try:
            self.rng.choice(self.functions).submit(prediction_id)
        except PredictionThrottled as throttled:
            self.later(throttled.seconds + self.rng.uniform(0.05, 0.4), lambda: self.submit(prediction_id))
        else:
            self._look(prediction_id)

    def _look(self, prediction_id: str) -> None:
        item = self.table.items[f"prediction#{prediction_id}", "status"]
        if "upstream_id" in item:
            self.decided.setdefault(prediction_id, self.clock.now())

    def seconds(self) -> list[float]:
        """How long each took from its request until it was bound, the shortest first."""
        return sorted(self.decided[id_] - came for id_, came in self.came.items())


@pytest.fixture
def stack(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """A stack on the table in memory."""
    clients = Clients()
    monkeypatch.setattr(aws, "_client", clients)
    monkeypatch.setattr(aws, "_api_url", None)
    monkeypatch.setattr(metrics, "add_metric", lambda **_: None)
    level = logger.log_level
    logger.setLevel("CRITICAL")
    yield Stack(clock, clients)
    logger.setLevel(level)
    aws._api_url = None


def accepted_or_not(stack: Stack, prompt: str, n: int) -> None:
    """Has the first create of a prompt answered 502, every third time after it was accepted."""
    done: list[int] = []
    account = stack.account

    def answer() -> httpx.Response | None:
        if done:
            return None
        done.append(1)
        if n % 3 == 0:
            (id_,) = [
                item["id"]["S"]
                for (pk, sk), item in stack.table.items.items()
                if sk == "status" and pk.startswith("prediction#") and item["id"]["S"] not in stack.came
            ]
            account.accept(f"{API_URL}/webhooks/replicate/{id_}", prompt)
        return httpx.Response(502)

    account.answers[prompt] = answer


class TestLoad:
    def test_200_unknown_a_minute_among_600_creates(self, stack: Stack, record_property: Recorded) -> None:
        minutes = 3
        for n in range(400 * minutes):
            stack.later(n * 60 / 400, partial(stack.account.accept, "https://example.com/theirs", f"theirs {n}"))
        for n in range(200 * minutes):
            accepted_or_not(stack, f"unknown {n}", n)
            stack.later(n * 60 / 200 + 0.1, partial(stack.post, f"unknown {n}"))
        stack.run()
        self.measure(stack, 200 * minutes, record_property)

    def test_1000_unknown_at_once(self, stack: Stack, record_property: Recorded) -> None:
        number = 1000
        for n in range(number):
            accepted_or_not(stack, f"unknown {n}", n)
            stack.later(n * 0.01, partial(stack.post, f"unknown {n}"))
        stack.run()
        self.measure(stack, number, record_property)

    def test_entry_of_60_mb_delays_nobody(self, stack: Stack, record_property: Recorded) -> None:
        number = 20
        theirs = stack.account.accept("https://example.com/theirs", "theirs")
        theirs["output"] = "LARGE"
        stack.account.large["LARGE"] = "[" + "[1234,1567]," * (60 * 1024 * 1024 // 12) + "0]"
        for n in range(number):
            accepted_or_not(stack, f"unknown {n}", n)
            stack.later(n * 0.1, partial(stack.post, f"unknown {n}"))
        stack.run()
        self.measure(stack, number, record_property)

    @staticmethod
    def measure(stack: Stack, number: int, record_property: Recorded) -> None:
        """Each is decided, the 95th of a hundred within four minutes, none has two, and few lists were asked for."""
        seconds = stack.seconds()
        assert len(seconds) == number
        runs = [entry for _, entry in stack.account.entries if entry["input"]["prompt"].startswith("unknown")]
        assert len(runs) == number
        most = stack.account.most_lists_in_a_minute()
        p95 = seconds[int(number * 0.95)]
        record_property("unknown creates", number)
        record_property(f"s until 95 of 100 of {number} were decided", round(p95))
        record_property(f"list calls in the busiest minute of {number}", most)
        assert p95 < 240
        assert most < 60
        assert stack.asks / number < 15
