"""Money: however starts meet, an owner's limits and the stack's rate are not passed; Replicate's record proves it.

Two starters meet in every order of their calls; whole handlers, by HTTP and by the queue, in orders that seeds decide,
with callers that try again and functions that die in between. Time and chance are the simulation's: moto answers two
threads at once in a way that no table does.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import greenlet
import httpx
import pytest
from predictions.admission.limiter_item import AUTOMATIC, AUTOMATIC_PAUSE_SECONDS, HORIZON_SECONDS, MANUAL
from predictions.admission.quotas import LimitReached, ModelLimits, OwnerLimits, OwnersUsage, _day_attribute
from predictions.admission.rate_limiter import Limiter
from predictions.admission.schedule import BURST_SECONDS, AskAgain, Start
from predictions.aws.dynamodb import serialize

from tests.reliability import Recorded
from tests.simulation.functions import FunctionFailed
from tests.simulation.installed import Simulation, installed
from tests.simulation.upstream import Run
from tests.simulation.world import END_SECONDS, World
from tests.support.aws_clients import AwsError, Clients, raise_client_error
from tests.support.dynamodb import ConditionFailed, Table
from tests.support.scheduler import BEGIN, Died

NOW = BEGIN
RATE = 60
"""Creates a minute in the worlds below: one a second."""


# -- two starters, in every order of their calls ------------------------------------------------------------------


class Turns:
    """Starters whose calls to the table come in a given order; from its end on the first one left goes on.

    Attributes:
        taken: Who made each call.
        could: Who could have made it.
    """

    def __init__(self, clients: Clients, table: Table, order: list[int], dies: tuple[int, int] | None) -> None:
        clients.world = self
        self._table = table
        self._order = order
        self._dies = dies
        self._calls: Counter[int] = Counter()
        self._me = -1
        self.taken: list[int] = []
        self.could: list[list[int]] = []

    def call(self, service: str, operation: str, asked: dict[str, Any], client: Any) -> Any:
        """A call, when its turn has come."""
        me = self._me
        greenlet.getcurrent().parent.switch()
        self._calls[me] += 1
        try:
            answer = self._table.call(operation, asked)
        except ConditionFailed as failed:
            raise_client_error(client, operation, AwsError("ConditionalCheckFailedException", failed.item))
        if self._dies == (me, self._calls[me]):
            raise Died
        return answer

    def run(self, starters: Sequence[Callable[[], object]]) -> None:
        """Lets all of them start."""

        def begin(starter: Callable[[], object]) -> None:
            with contextlib.suppress(Died):
                starter()

        waiting = {n: greenlet.greenlet(partial(begin, starter)) for n, starter in enumerate(starters)}
        for n in list(waiting):
            self._switch(waiting, n)
        while waiting:
            could = sorted(waiting)
            turn = len(self.taken)
            me = self._order[turn] if turn < len(self._order) else could[0]
            self.taken.append(me)
            self.could.append(could)
            self._switch(waiting, me)

    def _switch(self, waiting: dict[int, Any], n: int) -> None:
        self._me = n
        waiting[n].switch()
        if waiting[n].dead:
            del waiting[n]


def every_order(play: Callable[[list[int]], Turns]) -> int:
    """Plays every order of calls that there can be; how many."""
    orders, waiting = 0, [[]]  # type: tuple[int, list[list[int]]]
    while waiting:
        given = waiting.pop()
        turns = play(given)
        orders += 1
        for place in range(len(given), len(turns.taken)):
            others = [n for n in turns.could[place] if n != turns.taken[place]]
            waiting += [[*turns.taken[:place], other] for other in others]
    return orders


@pytest.fixture(scope="module")
def clients() -> Clients:
    """Clients whose calls `Turns` answers."""
    return Clients()


def status(prediction_id: str, rank: int) -> dict[str, Any]:
    return {"pk": {"S": f"prediction#{prediction_id}"}, "sk": {"S": "status"}, "rank": {"N": str(rank)}}


MODEL = "meta/llama"


def in_flight(**places: float) -> dict[str, Any]:
    """The item of places in flight, each with its age in seconds."""
    ids = {name: {"N": str(round((NOW - age) * 1000))} for name, age in places.items()}
    return {"pk": {"S": "usage#alice"}, "sk": {"S": "in_flight"}, "ids": {"M": ids}}


def of_model(**places: float) -> dict[str, Any]:
    """The same of a model's places."""
    return in_flight(**places) | {"sk": {"S": f"in_flight#{MODEL}"}}


def day(n: int, of_model: int | None = None) -> dict[str, Any]:
    item = {"pk": {"S": "usage#alice"}, "sk": {"S": "day#2025-06-15"}, "n": {"N": str(n)}}
    return item if of_model is None else item | {_day_attribute(MODEL): {"N": str(of_model)}}


def model(*limits: int | None, **owner: int) -> OwnerLimits:
    """Limits in flight and per day of the model, beside those of the owner."""
    return OwnerLimits(models={MODEL: ModelLimits(*limits)}, **owner)


PLACES: dict[str, tuple[OwnerLimits, list[dict[str, Any]], int]] = {
    "nothing yet": (OwnerLimits(in_flight=1), [], 1),
    "one is left": (OwnerLimits(in_flight=2), [in_flight(running=1), status("running", 2)], 1),
    "none is left": (OwnerLimits(in_flight=1), [in_flight(running=1), status("running", 2)], 0),
    "one has ended": (OwnerLimits(in_flight=1), [in_flight(ended=1), status("ended", 9)], 1),
    "both have ended": (
        OwnerLimits(in_flight=2), [in_flight(a=1, b=1), status("a", 9), status("b", 9)], 2,
    ),
    "one never came to be": (OwnerLimits(in_flight=1), [in_flight(gone=121)], 1),
    "one may come to be": (OwnerLimits(in_flight=1), [in_flight(coming=119)], 0),
    "a day's first": (OwnerLimits(per_day=1), [], 1),
    "a day's last": (OwnerLimits(per_day=5), [day(4)], 1),
    "a day that is full": (OwnerLimits(per_day=5), [day(5)], 0),
    "both limits, the day's less": (OwnerLimits(in_flight=2, per_day=1), [], 1),
    "both limits, that in flight less": (OwnerLimits(in_flight=1, per_day=2), [], 1),
    "nothing is allowed": (OwnerLimits(in_flight=0, per_day=0), [], 0),
    "the day is full, the ended one's place is free": (
        OwnerLimits(in_flight=1, per_day=1), [in_flight(ended=1), status("ended", 9), day(1)], 0,
    ),
    "a model's only place": (model(1), [], 1),
    "a model's place, the owner has more": (model(1, in_flight=2), [], 1),
    "the owner's place, its model has more": (model(2, in_flight=1), [], 1),
    "both are full": (model(1, in_flight=1), [of_model(a=1), in_flight(a=1), status("a", 2)], 0),
    "the model is full": (model(1, in_flight=3), [of_model(a=1), in_flight(a=1), status("a", 2)], 0),
    "the owner is full of others": (model(1, in_flight=1), [in_flight(a=1), status("a", 2)], 0),
    "one of the model has ended": (model(1, in_flight=2), [of_model(a=1), in_flight(a=1), status("a", 9)], 1),
    "one of the model never came to be": (model(1), [of_model(gone=121)], 1),
    "one of the model may come to be": (model(1), [of_model(coming=119)], 0),
    "a model's last of the day": (model(None, 5, per_day=9), [day(6, 4)], 1),
    "the day's last of all models": (model(None, 5, per_day=6), [day(5, 1)], 1),
    "a model's day is full": (model(2, 5, per_day=9), [day(6, 5)], 0),
    "a model's day is full, not the owner's": (model(None, 1), [day(1, 1)], 0),
    "the model is not allowed": (model(0, 0), [], 0),
    "all four limits": (model(2, 1, in_flight=1, per_day=2), [], 1),
}  # fmt: skip
"""Limits, what is there before, and how many of two starters may start."""


def meet(
    clients: Clients,
    case: str,
    order: list[int],
    ids: tuple[str, str] = ("first", "second"),
    dies: tuple[int, int] | None = None,
) -> tuple[Turns, list[str], Table]:
    """Two starters take a place, in that order of their calls; who got one, and what is there then."""
    limits, before, _ = PLACES[case]
    table = Table(lambda: NOW)
    for item in before:
        table.call("PutItem", {"Item": item})
    passed: list[str] = []

    def start(prediction_id: str) -> None:
        # Each in a process of its own.
        usage = OwnersUsage("predictions", clients("dynamodb"), now=lambda: NOW)
        try:
            usage.acquire_slot("alice", prediction_id, limits, MODEL)
        except LimitReached:
            return
        passed.append(prediction_id)

    turns = Turns(clients, table, order, dies)
    turns.run([partial(start, each) for each in ids])
    return turns, passed, table


def used(table: Table) -> tuple[set[str], int]:
    places = table.items.get(("usage#alice", "in_flight"), {}).get("ids", {}).get("M", {})
    days = table.items.get(("usage#alice", "day#2025-06-15"), {}).get("n", {"N": "0"})
    return set(places), int(days["N"])


def used_of_model(table: Table) -> tuple[set[str], int]:
    places = table.items.get(("usage#alice", f"in_flight#{MODEL}"), {}).get("ids", {}).get("M", {})
    days = table.items.get(("usage#alice", "day#2025-06-15"), {}).get(_day_attribute(MODEL), {"N": "0"})
    return set(places), int(days["N"])


def check_model(table: Table, limits: OwnerLimits, case: str, passed: list[str]) -> None:
    """What is used of a model's limits is what has passed, and never more than there is."""
    of_it = limits.models.get(MODEL, ModelLimits())
    places, n = used_of_model(table)
    if of_it.in_flight is not None:
        assert set(passed) <= places
        assert len(places) <= max(of_it.in_flight, sum("#meta" in each["sk"]["S"] for each in PLACES[case][1]))
    if of_it.per_day is not None:
        assert len(passed) <= n <= of_it.per_day


@pytest.mark.parametrize("case", PLACES)
def test_two_starters_in_any_order_of_their_calls_never_pass_a_limit(clients: Clients, case: str) -> None:
    limits, _, allowed = PLACES[case]

    def play(order: list[int]) -> Turns:
        turns, passed, table = meet(clients, case, order)
        assert len(passed) <= allowed, turns.taken
        # With both limits, one that gives its place back may have kept the other one from it: too few, never too many.
        assert passed or not allowed or (limits.in_flight and limits.per_day) or limits.models, turns.taken
        places, n = used(table)
        if limits.in_flight is not None:
            assert set(passed) <= places
            assert len(places) <= max(limits.in_flight, len(PLACES[case][1]))
        if limits.per_day is not None:
            assert len(passed) <= n <= max(limits.per_day, 0)
        check_model(table, limits, case, passed)
        if not allowed:  # what a refused one has taken, it has given back
            before = {each["sk"]["S"]: each for each in PLACES[case][1]}
            names = {name for each in before.values() for name in each.get("ids", {}).get("M", {})}
            assert used(table)[0] | used_of_model(table)[0] <= names, turns.taken
        return turns

    of_it = limits.models.get(MODEL, ModelLimits())
    assert every_order(play) >= 2 or not (limits.in_flight or limits.per_day or of_it.in_flight or of_it.per_day)


@pytest.mark.parametrize("case", PLACES)
def test_same_request_twice_in_any_order_has_one_place(clients: Clients, case: str) -> None:
    limits, _, allowed = PLACES[case]

    def play(order: list[int]) -> Turns:
        turns, passed, table = meet(clients, case, order, ("same", "same"))
        assert not passed or allowed
        places, _ = used(table)
        if limits.in_flight is not None and passed:
            assert len(places) <= limits.in_flight
        return turns

    every_order(play)


@pytest.mark.parametrize("case", PLACES)
def test_starter_that_dies_at_any_call_passes_no_limit_and_gives_its_place_back(clients: Clients, case: str) -> None:
    limits, _, allowed = PLACES[case]
    calls = max(Counter(meet(clients, case, [])[0].taken).values(), default=1)
    # Before its nth call it is as dead as after the one before.
    for n in range(1, calls + 1):

        def play(order: list[int], n: int = n) -> Turns:
            turns, passed, table = meet(clients, case, order, dies=(0, n))
            _, counted = used(table)
            assert len(passed) <= allowed, turns.taken
            if limits.per_day is not None:
                assert len(passed) <= counted <= limits.per_day
            check_model(table, limits, case, passed)
            return turns

        every_order(play)
    # What the dead one took comes back after two minutes; a day's is used up.
    if limits.in_flight and limits.per_day is None:
        _, _, table = meet(clients, case, [], dies=(0, 2))
        for (_, sk), item in list(table.items.items()):
            if sk == "status":
                table.call("PutItem", {"Item": {**item, "rank": {"N": "9"}}})
        turns = Turns(clients, table, [], None)
        later = OwnersUsage("predictions", clients("dynamodb"), now=lambda: NOW + 121)

        def start_later() -> None:
            later.acquire_slot("alice", "later", limits, MODEL)

        turns.run([start_later])
        assert "later" in used(table)[0]


LANES: dict[str, dict[str, int]] = {
    "nothing yet": {},
    "used up": {"http_at": 20_000, "queue_at": 20_000},
    "run out": {"http_at": -5, "queue_at": -5},
    "the queue's alone": {"queue_at": 7_000},
    "blocked": {"http_at": 15_000, "queue_at": 5_000, "blocked_until": 5_000},
}
"""The limiter's item, in milliseconds from now."""


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("kinds", [("queue", "queue"), ("caller", "queue"), ("caller", "caller")], ids=str)
def test_two_reservations_in_any_order_are_an_interval_apart(
    clients: Clients, kinds: tuple[str, str], lanes: str
) -> None:
    def play(order: list[int]) -> Turns:
        table = Table(lambda: NOW)
        values = {name: {"N": str(round(NOW * 1000) + ahead)} for name, ahead in LANES[lanes].items()}
        table.call("PutItem", {"Item": {"pk": {"S": "limiter"}, "sk": {"S": "creates"}, **values}})
        starts: list[float] = []

        def reserve(kind: str, n: int) -> None:
            limiter = Limiter("predictions", clients("dynamodb"), creates_per_minute=RATE, now=lambda: NOW)
            limiter._last_create = NOW  # not the first one of its process, which may owe a write
            reserve_in = limiter.reserve_for_caller if kind == "caller" else limiter.reserve_for_queue
            # Each of an owner of its own, which has reserved nothing yet.
            start = reserve_in(f"owner-{n}", latest=NOW + 86400)
            assert isinstance(start, Start)
            starts.append(start.at)

        turns = Turns(clients, table, order, None)
        turns.run([partial(reserve, kind, n) for n, kind in enumerate(kinds)])
        item = table.items["limiter", "creates"]
        began = round(NOW * 1000)
        queue_from = began + max(0, LANES[lanes].get("queue_at", 0))
        moved = float(item["queue_at"]["N"]) - queue_from if "queue_at" in item else 0
        steps = sum(60_000 / RATE / (0.9 if kind == "queue" else 1) for kind in kinds)
        if kinds == ("queue", "queue"):
            assert abs(starts[0] - starts[1]) >= 60 / RATE / 0.9 - 0.001, turns.taken
            assert moved == pytest.approx(60_000 / RATE / 0.9 * 2, abs=0.001)
        elif "caller" in kinds and LANES[lanes].get("queue_at", 0) > 0:
            assert abs(moved - steps) <= 1, turns.taken
        callers = Counter(kinds)["caller"]
        if callers:
            at = float(item["http_at"]["N"]) - max(began, began + LANES[lanes].get("http_at", 0))
            assert at == callers * 60_000 / RATE
        return turns

    assert every_order(play) >= 2


# -- whole handlers, in orders that seeds decide ------------------------------------------------------------------


@dataclass
class Create:
    """One POST to Replicate, accepted or not.

    Attributes:
        at: When it came.
        told_at: When it was answered; None where it was not.
        status: The answer's.
        retry_after: Of a 429, in seconds.
        source: Of its prediction: `http` or `queue`.
    """

    at: float
    told_at: float | None
    status: int
    retry_after: float
    source: str


class Meeting(World):
    """A world in which callers of one owner meet.

    Args:
        seed: Decides all that is left to chance.
        faults: Whether functions die, answers are lost and so on; else only what `script` says.
        limits: The owner's.
        script: What becomes of the first creates: `429`, `402`, …, or None.
    """

    def __init__(self, seed: int, *, faults: bool, limits: OwnerLimits, script: list[str | None] | None = None) -> None:
        super().__init__(seed)
        self.limits = limits
        self.creates: list[Create] = []
        self.answers: Counter[int] = Counter()
        self.most_at_once = 0
        if not faults:
            self.faults = Calm(self, script or [])  # type: ignore[assignment]
        self.faults.plan_run = self._plan_run  # type: ignore[method-assign]
        self.faults.very_late = self.faults.long_runs = self.faults.secret_is_unknown = False
        self.faults.index_lag = self.table._index_lag = 0.0
        create, accept = self.upstream._create, self.upstream.accept

        def noted_create(request: httpx.Request, path: str) -> httpx.Response:
            our_id = json.loads(request.content)["webhook"].rpartition("/")[2]
            source = self.table.items[f"prediction#{our_id}", "status"]["source"]["S"]
            made = Create(self.scheduler.now, None, 0, 0.0, source)
            self.creates.append(made)
            answer = create(request, path)
            made.told_at, made.status = self.scheduler.now, answer.status_code
            made.retry_after = float(answer.headers.get("retry-after", 0))
            return answer

        def noted_accept(body: dict[str, Any], request: httpx.Request, path: str) -> Run:
            run = accept(body, request, path)
            self.most_at_once = max(self.most_at_once, sum(not each.over for each in self.upstream.runs.values()))
            return run

        self.upstream._create = noted_create  # type: ignore[method-assign]
        self.upstream.accept = noted_accept  # type: ignore[method-assign]
        if limits:
            item: dict[str, Any] = {"pk": {"S": "owner#alice"}, "sk": {"S": "limits"}}
            given = {"in_flight": limits.in_flight, "per_day": limits.per_day}
            if limits.models:
                models = {
                    name: {n: v for n, v in asdict(of).items() if v is not None} for name, of in limits.models.items()
                }
                item |= serialize({"models": models})
            self.table.call("PutItem", {"Item": item | {n: {"N": str(v)} for n, v in given.items() if v is not None}})

    def _plan_run(self) -> dict[str, Any]:
        """Short runs without files: what matters is when they begin and end."""
        rng = self.rng
        return {
            "queued_seconds": rng.choice((0.0, 0.2)), "output_seconds": None,
            "run_seconds": rng.choice((0.5, 5.0, 40.0)), "status": rng.choice(("succeeded", "succeeded", "failed")),
            "unstarted": "canceled", "cancel_loses": False, "files": 0, "text": True,
        }  # fmt: skip

    def api_event(self, *args: Any, **options: Any) -> dict[str, Any]:
        """With the owner's limits, as the authorizer passes them on."""
        event = super().api_event(*args, **options)
        event["requestContext"]["authorizer"] |= self.limits.context()
        return event

    def post(self, n: int, delay: float, tries: int = 1, key: str | None = None) -> None:
        """A caller of the API, who tries again with the same key."""
        self.scheduler.sleep(delay)
        headers = {"Content-Type": "application/json", "Idempotency-Key": key or f"key-{n}"}
        event = self.api_event("POST", "/models/meta/llama/predictions", headers, f'{{"input":{{"prompt":"{n}"}}}}')
        for _ in range(tries):
            try:
                answer = self.functions.invoke("start_prediction", event, 29.0)
            except FunctionFailed:
                answer = {"statusCode": 502}
            self.answers[answer["statusCode"]] += 1
            assert answer["statusCode"] != 500, answer
            if answer["statusCode"] in (201, 422):
                return
            self.scheduler.sleep(self.rng.choice((0.5, 2.0, 20.0)))

    def send(self, n: int, delay: float, times: int = 1) -> None:
        """A message in the queue, which may come twice."""
        self.scheduler.sleep(delay)
        record = {
            "messageId": f"message-{n}",
            "receiptHandle": "handle",
            "body": json.dumps({"model": "meta/llama", "input": {"prompt": str(n)}}),
            "attributes": {"SentTimestamp": str(int(BEGIN) * 1000), "SenderId": "AROAALICE0000"},
            "messageAttributes": {},
            "eventSource": "aws:sqs",
            "eventSourceARN": "arn:aws:sqs:us-east-1:123456789012:requests",
            "awsRegion": "us-east-1",
        }
        for _ in range(4 * times):
            try:
                answer = self.functions.invoke("start_from_queue", {"Records": [record]})
            except FunctionFailed:
                answer = {"batchItemFailures": [record]}
            if not answer["batchItemFailures"]:
                times -= 1
            if not times:
                return
            self.scheduler.sleep(self.rng.choice((0.1, 30.0, 180.0)))

    def play(self, callers: list[Callable[[], None]], seconds: float = END_SECONDS) -> bool:
        """Lets them come, and the stack work until nothing is left to do; whether nothing is."""
        for n, caller in enumerate(callers):
            self.scheduler.spawn(f"caller {n}", caller)
        self.scheduler.at(self.scheduler.now + self.rng.uniform(0, 60), self._tick)
        over = self.scheduler.run(self.scheduler.now + seconds)
        if self.broken is not None:
            raise self.broken
        return over


class Calm:
    """Nothing goes wrong but what is said; times differ, so that any call may come between any two."""

    def __init__(self, world: Meeting, script: list[str | None]) -> None:
        self._rng = world.rng
        self._script = script
        self.index_lag = 0.0
        self.struck: dict[str, int] = {}
        self.doubled_sweeps = self.secret_is_unknown = False

    def aws_seconds(self) -> float:
        return self._rng.uniform(0.001, 0.03)

    def create_seconds(self) -> float:
        return self._rng.choice((0.05, 0.3))

    def read_seconds(self) -> float:
        return 0.1

    def file_seconds(self) -> float:
        return 0.1

    def list_lag_seconds(self) -> float:
        return 0.0

    def of_create(self) -> str | None:
        return self._script.pop(0) if self._script else None

    def of_webhook(self, _: str) -> list[float]:
        return [self._rng.choice((0.05, 1.0))]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_: None


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    """The library in a world of its own, at a rate of one create a second."""
    with installed() as simulation:
        monkeypatch.setitem(os.environ, "CREATES_PER_MINUTE", str(RATE))
        yield simulation


def meeting(simulation: Simulation, seed: int, **options: Any) -> Meeting:
    """A world, from now on the one that runs."""
    world = Meeting(seed, **options)
    simulation._clients.world = world
    return world


SEEDS = 8
LIMITS = {
    "one in flight": OwnerLimits(in_flight=1),
    "three in flight": OwnerLimits(in_flight=3),
    "four a day": OwnerLimits(per_day=4),
    "two in flight, five a day": OwnerLimits(in_flight=2, per_day=5),
    "none": OwnerLimits(in_flight=0),
    "one of the model in flight": model(1),
    "one of the model in flight, two of all": model(1, in_flight=2),
    "two of the model in flight, four a day": model(2, 4, in_flight=3, per_day=9),
}


@pytest.mark.parametrize("faults", [False, True], ids=["calm", "faults"])
@pytest.mark.parametrize("name", LIMITS)
def test_owner_never_passes_a_limit_by_any_door(
    simulation: Simulation, name: str, faults: bool, record_property: Recorded
) -> None:
    record_property("worlds", SEEDS)
    limits, started, kept_out = LIMITS[name], 0, 0
    for seed in range(SEEDS):
        world = meeting(simulation, seed, faults=faults, limits=limits)
        rng = world.rng
        callers: list[Callable[[], None]] = []
        for n in range(4):
            # Three of these come at once, and one again by the key of another.
            key = "key-0" if n == 3 else None
            callers.append(
                partial(world.post, 0 if key else n, rng.choice((0.0, 0.0, 0.01, 30.0)), rng.choice((1, 5)), key)
            )
            callers.append(partial(world.send, n, rng.choice((0.0, 0.0, 0.02, 30.0)), rng.choice((1, 2))))
        over = world.play(callers)
        runs = list(world.upstream.runs.values())
        told = f"seed {seed}: {world.most_at_once} at once, {len(runs)} in all"
        assert limits.in_flight is None or world.most_at_once <= limits.in_flight, told
        assert limits.per_day is None or len(runs) <= limits.per_day, told
        of_it = limits.models.get(MODEL, ModelLimits())  # all of them are of this model
        assert of_it.in_flight is None or world.most_at_once <= of_it.in_flight, told
        assert of_it.per_day is None or len(runs) <= of_it.per_day, told
        assert len({run.our_id for run in runs}) == len(runs), told
        started += len(runs)
        executions = [each for machine in world.tracking for each in machine.executions.values()]
        waits = sum(execution.states.count("WaitForTurn") for execution in executions)
        kept_out += world.answers[429] + waits
        if over and (limits.in_flight or of_it.in_flight) and (limits.per_day, of_it.per_day) == (None, None):
            # Everything has ended: its places are free again.
            world.answers.clear()
            assert all(run.over for run in runs), told
            world.play([partial(world.post, 99, 600.0, 3)])
            assert world.answers[201] == 1, (told, world.answers)
    assert (started > 0) == (name != "none")
    assert kept_out > 0


@pytest.mark.parametrize(
    "slots", [f"in_flight#{MODEL}", "in_flight"], ids=["of the model", "of the owner, as the model's were"]
)
def test_slot_that_is_not_given_back_is_noticed(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch, slots: str
) -> None:
    """A sabotage: what has ended keeps its slot in one of the two limits."""
    release = OwnersUsage._release

    def keeps(self: OwnersUsage, of: Any, owner: str, taken: Any) -> None:
        if of.sk != slots:
            release(self, of, owner, taken)

    monkeypatch.setattr(OwnersUsage, "_release", keeps)
    world = meeting(simulation, 7, faults=False, limits=model(1, in_flight=1))
    assert world.play([partial(world.post, 1, 0.0)])
    world.answers.clear()
    world.play([partial(world.post, 2, 600.0, 3)])
    assert world.answers == {429: 3}


@pytest.mark.parametrize("seed", range(4))
def test_repetitions_of_a_waiting_request_hold_no_function(simulation: Simulation, seed: int) -> None:
    """One key, `Prefer: wait`, many times: only the first call holds a function, in its place of the limits."""
    world = meeting(simulation, seed, faults=False, limits=OwnerLimits(in_flight=1))
    # Longer than any wait, in one phase.
    plan = {"queued_seconds": 0.0, "run_seconds": 120.0}
    world.faults.plan_run = lambda: world._plan_run() | plan  # type: ignore[method-assign]
    held: list[tuple[float, int, bool]] = []

    def ask(delay: float) -> None:
        world.scheduler.sleep(delay)
        headers = {"Content-Type": "application/json", "Idempotency-Key": "one", "Prefer": "wait=60"}
        event = world.api_event("POST", "/models/meta/llama/predictions", headers, '{"input":{"prompt":"x"}}')
        began = world.scheduler.now
        answer = world.functions.invoke("start_prediction", event, 29.0)
        applied = "Preference-Applied" in answer.get("multiValueHeaders", {})
        held.append((world.scheduler.now - began, answer["statusCode"], applied))
        assert json.loads(answer["body"])["status"] == "starting"

    # Some come while the first one is still being started, the others while it runs.
    delays = [0.0, *(world.rng.choice((0.0, 0.05, 1.0, 5.0)) for _ in range(8)), 5.0]
    assert world.play([partial(ask, delay) for delay in delays])
    assert {status for _, status, _ in held} == {201}
    waited = [(seconds, applied) for seconds, _, applied in held if seconds > 1.0]
    assert len(waited) == 1, held
    assert waited[0][1], "and it is told that its wish was granted"
    assert sum(applied for *_, applied in held) == 1
    assert len(world.upstream.runs) == 1


@dataclass
class Bound:
    """How many creates of a kind may come in a window of some seconds: `seconds * rate + burst`."""

    rate: float
    burst: float


def check_rate(creates: list[Create], bound: Bound, slack_seconds: float) -> None:
    """No window of any length has more of them than the bound allows."""
    times = sorted(each.at for each in creates)
    for i, first in enumerate(times):
        for j in range(i, len(times)):
            seconds = times[j] - first + slack_seconds
            assert j - i + 1 <= seconds * bound.rate + bound.burst + 0.01, (first - BEGIN, times[j] - BEGIN, j - i + 1)


# A start is a second early at most, and late by its whole second, the state's and the calls before it.
SLACK_SECONDS = 4.0
HTTP = Bound(RATE / 60, BURST_SECONDS * RATE / 60 + 1)
QUEUE = Bound(0.9 * RATE / 60, 1)


def check_rates(world: Meeting) -> None:
    """Each lane keeps its own rate."""
    # Each function owes one create: there are as many as came at once.
    functions = len(world.functions._warm.get("start_prediction", ()))
    callers = Bound(HTTP.rate, HTTP.burst + functions)
    check_rate([each for each in world.creates if each.source == "http"], callers, SLACK_SECONDS)
    check_rate([each for each in world.creates if each.source == "queue"], QUEUE, SLACK_SECONDS)


@pytest.mark.parametrize("seed", range(8))
def test_creates_of_all_sources_together_never_pass_the_rate(simulation: Simulation, seed: int) -> None:
    world = meeting(simulation, seed, faults=False, limits=OwnerLimits())
    rng = world.rng
    callers: list[Callable[[], None]] = [
        partial(world.post, n, rng.choice((0.0, 0.0, 1.0, rng.uniform(0, 60)))) for n in range(rng.choice((0, 15, 35)))
    ]
    callers += [partial(world.send, n, rng.choice((0.0, 0.0, rng.uniform(0, 60)))) for n in range(40)]
    assert world.play(callers)
    assert len(world.creates) == len(callers) == len(world.upstream.runs)
    check_rates(world)


def longest_retry_after(world: Meeting) -> None:
    """Of the times that Replicate's 429 may name, it names the longest."""
    choice = world.rng.choice
    named: Any = lambda values: 40 if tuple(values) == (1, 1, 10, 40) else choice(values)  # noqa: E731
    world.rng.choice = named  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("script", "seconds"),
    [(["429"], 40.0), ([None, None, "429"], 40.0), (["402"], 300.0), ([None, "401"], 300.0)],
    ids=["429 first", "429 third", "402 first", "401 second"],
)
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_created_while_replicate_wants_none(
    simulation: Simulation, script: list[str | None], seconds: float, seed: int
) -> None:
    world = meeting(simulation, seed, faults=False, limits=OwnerLimits(), script=list(script))
    longest_retry_after(world)
    callers: list[Callable[[], None]] = [partial(world.post, n, n * 3.0, 4) for n in range(8)]
    callers += [partial(world.send, n, n * 4.0) for n in range(8)]
    assert world.play(callers)
    (refused,) = (each for each in world.creates if each.status in (401, 402, 429))
    assert refused.told_at is not None
    # Known within a second by everybody; what was on its way by then has arrived within another.
    quiet = [c.at - refused.told_at for c in world.creates if 2.0 < c.at - refused.told_at < seconds - 1]
    assert quiet == []
    assert len(world.upstream.runs) >= 8, "and all that waited is started then"


@pytest.mark.slow
@pytest.mark.parametrize("n", [600])
def test_canceled_creates_of_one_owner_do_not_delay_another(simulation: Simulation, n: int) -> None:
    world = meeting(simulation, 7, faults=False, limits=OwnerLimits(in_flight=1))
    # The burst is used up: what is canceled now was never started, so its place is free again at once.
    world.table.call("PutItem", {"Item": edited({"http_at": BURST_SECONDS + 5, "queue_at": 1})})
    answers: Counter[int] = Counter()
    path = "/models/meta/llama/predictions"

    def attack() -> None:
        for i in range(20 * n):
            if answers[201] == n:
                break
            body = f'{{"input":{{"prompt":"{i}"}}}}'
            created = world.functions.invoke("start_prediction", world.api_event("POST", path, JSON, body))
            answers[created["statusCode"]] += 1
            if created["statusCode"] == 201:
                prediction_id = json.loads(created["body"])["id"]
                event = world.api_event("POST", f"/predictions/{prediction_id}/cancel", JSON)
                assert world.functions.invoke("cancel_prediction", event)["statusCode"] == 200
            else:
                world.scheduler.sleep(0.2)  # Replicate takes a moment to end what has started there
        event = world.api_event("POST", path, JSON, '{"input":{"prompt":"of another owner"}}')
        event["requestContext"]["authorizer"] = {"owner": "bob", "scopes": "predict read"}
        began = world.scheduler.now
        created = world.functions.invoke("start_prediction", event)
        assert created["statusCode"] == 201
        item = world.table.items[f"prediction#{json.loads(created['body'])['id']}", "status"]
        if "submit_at" in item:
            assert int(item["submit_at"]["N"]) - began <= 10
        waited.append(began)

    waited: list[float] = []
    world.play([attack])
    assert waited
    assert answers[201] == n
    check_rates(world)


JSON = {"Content-Type": "application/json"}


# -- the limiter's item, edited by hand ---------------------------------------------------------------------------

YEARS = 20 * 366 * 86400
CENTURIES: dict[str, dict[str, Any]] = {
    "lanes in 20 years": {"http_at": YEARS, "queue_at": YEARS},
    "the callers' lane in 20 years": {"http_at": YEARS},
    "lanes just beyond": {"http_at": HORIZON_SECONDS + 7200, "queue_at": HORIZON_SECONDS + 7200},
    "blocked for 20 years": {"blocked_until": YEARS},
    "paused for 20 years by Replicate": {"paused_until": YEARS, "paused_by": AUTOMATIC, "pause_reason": "x"},
    "all of it": {"http_at": YEARS, "queue_at": YEARS, "blocked_until": YEARS},
    "digits without end": {"http_at": {"N": "9" * 38}, "queue_at": {"N": "9" * 38}},
    "a fraction": {"http_at": {"N": "1750000000000.5"}, "queue_at": {"N": "0.1"}, "blocked_until": {"N": "1E+40"}},
    "fractions in 20 years": {
        name: {"N": f"{round((NOW + YEARS) * 1000)}.5"} for name in ("http_at", "queue_at", "blocked_until")
    },
    "text": {"http_at": {"S": "soon"}, "queue_at": {"S": ""}, "blocked_until": {"S": "x"}, "paused_until": {"S": "9"}},
    "other types": {
        "http_at": {"NULL": True},
        "queue_at": {"M": {}},
        "blocked_until": {"L": []},
        "paused_at": {"B": b""},
    },
    "texts that are none": {"paused_by": {"N": "1"}, "pause_reason": {"M": {}}},
    "long ago": {"http_at": {"N": "-1"}, "queue_at": {"N": "0"}, "blocked_until": {"N": "-99999999999999"}},
}
"""Values by their attribute: seconds from now, a text, or DynamoDB's own form."""


def edited(values: dict[str, Any]) -> dict[str, Any]:
    item: dict[str, Any] = {"pk": {"S": "limiter"}, "sk": {"S": "creates"}}
    for name, value in values.items():
        if isinstance(value, str):
            item[name] = {"S": value}
        else:
            item[name] = value if isinstance(value, dict) else {"N": str(round((NOW + value) * 1000))}
    return item


@pytest.mark.parametrize("case", CENTURIES)
def test_limiter_that_was_edited_stands_in_nobodys_way_and_the_rate_holds(simulation: Simulation, case: str) -> None:
    world = meeting(simulation, 7, faults=False, limits=OwnerLimits())
    world.table.call("PutItem", {"Item": edited(CENTURIES[case])})
    callers: list[Callable[[], None]] = [partial(world.post, n, 0.05 * n) for n in range(20)]
    callers += [partial(world.send, n, 0.05 * n) for n in range(20)]
    assert world.play(callers, 3600)
    assert world.answers == {201: 20}
    assert len(world.upstream.runs) == 40
    check_rates(world)
    for name in ("http_at", "queue_at"):
        left = float(world.table.items["limiter", "creates"][name]["N"]) / 1000 - NOW
        assert left < 3600, f"{name} is mended"


@pytest.mark.parametrize("script", ["402", "429"])
@pytest.mark.parametrize("case", CENTURIES)
def test_replicates_refusal_is_kept_where_the_limiter_was_edited(
    simulation: Simulation, case: str, script: str
) -> None:
    world = meeting(simulation, 7, faults=False, limits=OwnerLimits(), script=[script])
    world.table.call("PutItem", {"Item": edited(CENTURIES[case])})
    longest_retry_after(world)
    assert world.play([partial(world.post, n, 4.0 * n, 1) for n in range(6)], 3600)
    first = world.creates[0]
    assert first.told_at is not None
    assert (first.status, first.at < BEGIN + 5) == (int(script), True)
    wait = AUTOMATIC_PAUSE_SECONDS if script == "402" else 40
    assert [c for c in world.creates[1:] if c.at < first.told_at + wait - 1] == []


def test_pause_by_command_counts_whatever_its_end_is(simulation: Simulation) -> None:
    world = meeting(simulation, 7, faults=False, limits=OwnerLimits())
    pause = {"paused_until": YEARS, "paused_at": 0, "paused_by": MANUAL, "pause_reason": "a bill"}
    world.table.call("PutItem", {"Item": edited(pause)})
    world.play([partial(world.post, 1, 0.0), partial(world.send, 1, 0.0)], 3600)
    assert world.answers == {503: 1}
    assert world.creates == []


DELAY_SECONDS = 300
"""`MaxStartDelaySeconds` by default."""


def test_lane_is_never_put_further_ahead_than_the_delay(clients: Clients) -> None:
    table = Table(lambda: NOW)
    Turns(clients, table, [], None)
    ahead = DELAY_SECONDS - 90
    table.call("PutItem", {"Item": edited({"queue_at": ahead, "http_at": ahead + BURST_SECONDS})})

    def reserve() -> None:
        limiter = Limiter("predictions", clients("dynamodb"), creates_per_minute=RATE, now=lambda: NOW)
        limiter.limiter_state()
        for lane in (limiter.reserve_for_queue, limiter.reserve_for_caller):
            # An owner each, so that nobody is kept back by starts of its own.
            answers = [lane(f"owner-{n}", latest=NOW + 86400) for n in range(200)]
            starts = [each.at - NOW for each in answers if isinstance(each, Start)]
            assert max(starts) <= DELAY_SECONDS
            assert 75 <= len(starts) <= 91
            assert all(isinstance(each, AskAgain) for each in answers[len(starts) :])

    Turns(clients, table, [], None).run([reserve])
    for name in ("queue_at", "http_at"):
        # Each HTTP create moves the queue's lane, too.
        most = 2 * DELAY_SECONDS if name == "queue_at" else DELAY_SECONDS + BURST_SECONDS + 1
        assert float(table.items["limiter", "creates"][name]["N"]) / 1000 - NOW <= most
