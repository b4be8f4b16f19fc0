"""Owners' limits: no interleaving of starts takes more places than there are, and places are given back."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from predictions.admission.quotas import LimitReached, OwnerLimits, OwnersLimits, OwnersUsage
from predictions.aws import clients
from predictions.errors import PredictionThrottled, Problem
from predictions.ids import random_id
from predictions.store.predictions import PredictionsTable

from tests.support.apps import AwsCalls
from tests.support.fakes import Clock, ReplicateInMemory, answer, answers_lost
from tests.support.lanes import queued
from tests.support.predictions import current, wanted
from tests.support.protocol import Submissions

MIDNIGHT = 1_750_032_000
"""The end of the day of the tests' clock."""


@pytest.fixture
def usage(cloud: None, clock: Clock) -> OwnersUsage:
    """What owners use."""
    return OwnersUsage("predictions", clients.client("dynamodb"), now=clock.now)


def places() -> dict[str, Any]:
    """Alice's places, and how many of her days."""
    found = clients.client("dynamodb").scan(TableName="predictions")["Items"]
    items = {item["sk"]["S"]: item for item in found if item["pk"]["S"] == "usage#alice"}
    return {sk: set(item["ids"]["M"]) if sk == "in_flight" else int(item["n"]["N"]) for sk, item in items.items()}


def give(**limits: Any) -> None:
    OwnersLimits("predictions", clients.client("dynamodb")).set_limits("alice", OwnerLimits(**limits))


class TestRefused:
    @pytest.mark.parametrize(
        ("limits", "said", "retry_after"),
        [
            (OwnerLimits(in_flight=1), "limit of 1 predictions in flight", "10"),
            (OwnerLimits(per_day=1), "limit of 1 predictions per day", str(MIDNIGHT - 1_750_000_000 + 1)),
            (OwnerLimits(in_flight=0), "limit of 0 predictions in flight", "10"),
            (OwnerLimits(per_day=0, in_flight=9), "Retry after 2025-06-16T00:00:00Z", "32001"),
        ],
    )
    def test_caller_over_a_limit_is_told_which_and_when_and_nothing_is_written_or_asked(
        self, submissions: Submissions, replicate: ReplicateInMemory, limits: OwnerLimits, said: str, retry_after: str
    ) -> None:
        if 0 not in (limits.in_flight, limits.per_day):
            submissions.start(wanted(), limits=limits)
        before, asked = items(), len(replicate.creates)
        with pytest.raises(Problem) as problem:
            submissions.start(wanted(), limits=limits)
        assert (problem.value.status, problem.value.headers) == (429, {"Retry-After": retry_after})
        assert said in problem.value.detail
        assert len(replicate.creates) == asked
        assert [item for item in items() if item["pk"]["S"] != "usage#alice"] == [
            item for item in before if item["pk"]["S"] != "usage#alice"
        ]
        assert len(places().get("in_flight", ())) == (1 if limits == OwnerLimits(in_flight=1) else 0)

    def test_request_that_is_wrong_uses_nothing(self, submissions: Submissions) -> None:
        with pytest.raises(Problem):
            submissions.start(wanted(version="nobody/nothing"), limits=OwnerLimits(per_day=5, in_flight=5))
        assert places() == {}

    def test_queued_prediction_waits_for_its_owners_others_and_then_goes(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        give(in_flight=1)
        first, second = queued(table, clock), queued(table, clock)
        submissions.submit(first)
        waits = []
        for _ in range(6):
            with pytest.raises(PredictionThrottled) as throttled:
                submissions.submit(second)
            waits.append(throttled.value.seconds)
            clock.advance(60)
        assert waits == [10, 15, 30, 45, 60, 75]
        replicate.finish(upstream_id := current(table, first).upstream_id or "")
        submissions.poll(first)
        assert replicate.predictions[upstream_id]["status"] == "succeeded"
        submissions.submit(second)
        assert places() == {"in_flight": {second}}
        assert len(replicate.creates) == 2

    def test_queued_prediction_waits_for_the_next_day_and_ends_at_its_deadline(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        give(per_day=1)
        submissions.submit(queued(table, clock))
        patient, hasty = queued(table, clock), queued(table, clock, headers={"cancel-after": "1h"})
        with pytest.raises(PredictionThrottled, match=r"^32001$"):
            submissions.submit(patient)
        with pytest.raises(PredictionThrottled, match=r"^3601$"):
            submissions.submit(hasty)
        clock.advance(3601)
        submissions.submit(hasty)
        assert current(table, hasty).visible == "failed"
        clock.advance(32001 - 3601)
        submissions.submit(patient)
        assert len(replicate.creates) == 2


def items() -> list[Any]:
    return sorted(clients.client("dynamodb").scan(TableName="predictions")["Items"], key=str)


class TestPlaces:
    def test_owner_without_limits_costs_nothing(self, submissions: Submissions) -> None:
        submissions.start(wanted())
        assert places() == {}

    def test_same_id_has_one_place(self, usage: OwnersUsage, clock: Clock) -> None:
        for _ in range(3):
            usage.acquire_slot("alice", "a" * 26, OwnerLimits(in_flight=1))
            clock.advance(1)
        assert places() == {"in_flight": {"a" * 26}}

    def test_place_whose_answer_was_lost_is_one_place(self, usage: OwnersUsage) -> None:
        with answers_lost():
            for letter in "ab":
                usage.acquire_slot("alice", letter * 26, OwnerLimits(in_flight=2))
        assert places() == {"in_flight": {"a" * 26, "b" * 26}}
        with pytest.raises(LimitReached):
            usage.acquire_slot("alice", "c" * 26, OwnerLimits(in_flight=2))

    def test_place_of_what_has_ended_is_given_back_when_it_is_needed(
        self, submissions: Submissions, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        limits = OwnerLimits(in_flight=3)
        started = [submissions.start(wanted(), limits=limits) for _ in range(3)]
        replicate.finish(started[1].upstream_id or "", "failed")
        submissions.poll(started[1].id)
        newest = submissions.start(wanted(), limits=limits)
        assert places() == {"in_flight": {started[0].id, started[2].id, newest.id}}

    def test_place_of_what_replicate_refused_is_given_back(
        self, submissions: Submissions, replicate: ReplicateInMemory
    ) -> None:
        replicate.faults = [answer(422)]
        with pytest.raises(Problem):
            submissions.start(wanted(), limits=OwnerLimits(in_flight=1))
        assert submissions.start(wanted(), limits=OwnerLimits(in_flight=1)).upstream_id

    def test_place_of_what_never_came_to_be_is_kept_for_two_minutes(self, usage: OwnersUsage, clock: Clock) -> None:
        limits = OwnerLimits(in_flight=1)
        usage.acquire_slot("alice", "a" * 26, limits)
        clock.advance(119)
        with pytest.raises(LimitReached):
            usage.acquire_slot("alice", "b" * 26, limits)
        clock.advance(3)
        usage.acquire_slot("alice", "b" * 26, limits)
        assert places() == {"in_flight": {"b" * 26}}

    def test_full_places_are_not_looked_through_with_each_request(self, usage: OwnersUsage, clock: Clock) -> None:
        limits = OwnerLimits(in_flight=1)
        usage.acquire_slot("alice", "a" * 26, limits)
        calls = AwsCalls()
        for _ in range(5):
            with pytest.raises(LimitReached):
                usage.acquire_slot("alice", "b" * 26, limits)
        assert calls.made.count("dynamodb.BatchGetItem") == 1

    def test_many_places_are_given_back_at_once(self, usage: OwnersUsage, clock: Clock) -> None:
        limits = OwnerLimits(in_flight=120)
        for _ in range(120):
            usage.acquire_slot("alice", random_id(), limits)
        clock.advance(200)
        usage.acquire_slot("alice", "b" * 26, limits)
        assert places() == {"in_flight": {"b" * 26}}

    def test_day_that_is_full_takes_no_place_in_flight(self, usage: OwnersUsage) -> None:
        with pytest.raises(LimitReached):
            usage.acquire_slot("alice", "a" * 26, OwnerLimits(in_flight=1, per_day=0))
        assert places() == {"in_flight": set()}

    def test_next_day_begins_at_midnight_and_a_day_is_forgotten(self, usage: OwnersUsage, clock: Clock) -> None:
        for _ in range(2):
            usage.acquire_slot("alice", random_id(), OwnerLimits(per_day=2))
        clock.moment = MIDNIGHT
        usage.acquire_slot("alice", random_id(), OwnerLimits(per_day=2))
        assert places() == {"day#2025-06-15": 2, "day#2025-06-16": 1}
        found = clients.client("dynamodb").scan(TableName="predictions")["Items"]
        assert all(0 < int(item["expires_at"]["N"]) - MIDNIGHT < 3 * 86400 for item in found)

    def test_midnight_while_a_full_day_is_asked_costs_no_other_day(self, cloud: None, clock: Clock) -> None:
        def ticking() -> float:
            clock.advance(0.25)
            return clock.now()

        usage = OwnersUsage("predictions", clients.client("dynamodb"), now=ticking)
        clock.moment = MIDNIGHT - 60
        usage.acquire_slot("alice", random_id(), OwnerLimits(per_day=1))
        clock.moment = MIDNIGHT - 0.6
        with pytest.raises(LimitReached) as reached:
            usage.acquire_slot("alice", random_id(), OwnerLimits(per_day=1))
        assert reached.value.seconds == 1

    def test_waiting_prediction_is_counted_once(
        self, submissions: Submissions, table: PredictionsTable, clock: Clock
    ) -> None:
        give(per_day=100, in_flight=100)
        waits: dict[str, int] = {}
        for prediction_id in [queued(table, clock) for _ in range(20)]:
            try:
                submissions.submit(prediction_id)
            except PredictionThrottled as throttled:
                waits[prediction_id] = throttled.seconds
        assert waits
        clock.advance(max(waits.values()))
        for prediction_id in waits:
            submissions.submit(prediction_id)
        assert places()["day#2025-06-15"] == 20
        assert len(places()["in_flight"]) == 20


class Turns:
    """A client of DynamoDB whose calls are made one at a time (moto's are not atomic), in the order of a schedule."""

    def __init__(self, schedule: list[int], count: int) -> None:
        self._schedule = schedule
        self._alive = set(range(count))
        self._changed = threading.Condition()
        self._client: Any = clients.client("dynamodb")
        self._me = threading.local()

    def run(self, works: list[Callable[[], None]]) -> None:
        def work(n: int) -> None:
            self._me.n = n
            try:
                works[n]()
            finally:
                with self._changed:
                    self._alive.discard(n)
                    self._changed.notify_all()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(works))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)

    def _is_next(self, n: int) -> bool:
        while self._schedule and self._schedule[0] not in self._alive:
            del self._schedule[0]
        return not self._schedule or self._schedule[0] == n

    def __getattr__(self, name: str) -> Any:
        if name == "exceptions":
            return self._client.exceptions

        def call(**arguments: Any) -> Any:
            with self._changed:
                assert self._changed.wait_for(lambda: self._is_next(self._me.n), 30)
                if self._schedule:
                    del self._schedule[0]
                try:
                    return getattr(self._client, name)(**arguments)
                finally:
                    self._changed.notify_all()

        return call


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    schedule=st.lists(st.integers(0, 3), max_size=24),
    limits=st.builds(OwnerLimits, in_flight=st.none() | st.integers(1, 3), per_day=st.none() | st.integers(1, 3)),
    before=st.integers(0, 2),
)
def test_starts_at_the_same_time_never_pass_a_limit(
    cloud: None, clock: Clock, schedule: list[int], limits: OwnerLimits, before: int
) -> None:
    client = clients.client("dynamodb")
    for item in client.scan(TableName="predictions")["Items"]:
        client.delete_item(TableName="predictions", Key={"pk": item["pk"], "sk": item["sk"]})
    # Places of what never came to be: they are given back meanwhile, by whoever comes first.
    earlier = OwnersUsage("predictions", client, now=lambda: clock.now() - 300)
    for _ in range(min(before, limits.in_flight or 0)):
        earlier.acquire_slot("alice", random_id(), OwnerLimits(in_flight=limits.in_flight))
    turns = Turns(list(schedule), 4)
    passed: list[str] = []

    def start() -> None:
        prediction_id = random_id()
        mine: Any = turns
        try:
            OwnersUsage("predictions", mine, now=clock.now).acquire_slot("alice", prediction_id, limits)
        except LimitReached:
            return
        passed.append(prediction_id)

    turns.run([start] * 4)
    most = min(4 if limit is None else limit for limit in (limits.in_flight, limits.per_day))
    assert len(passed) <= most
    assert passed, "the first one always gets its place"
    if limits.in_flight is not None:
        assert set(passed) <= places()["in_flight"]
    if limits.per_day is None:
        assert len(passed) == most
