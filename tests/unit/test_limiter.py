"""The limiter: a create waits for its turn once, whoever else reserves at the same time, and is never lost to it."""

import contextlib
import itertools
from typing import Any

import pytest
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from predictions import aws
from predictions.errors import PredictionThrottled, Problem
from predictions.limiter import BURST_SECONDS, QUIET_SECONDS, Limiter, Start
from predictions.submissions import Submissions
from predictions.table import PredictionsTable

from tests.unit.apps import AwsCalls
from tests.unit.conftest import make_submissions
from tests.unit.fakes import Clock, Executed, ReplicateInMemory, answer, refusing
from tests.unit.test_submissions import current, waiting, wanted


def limiter_of(clock: Clock, creates_per_minute: int = 600) -> Limiter:
    return Limiter("predictions", aws.client("dynamodb"), creates_per_minute=creates_per_minute, now=clock.now)


LONG = 4e9
"""A deadline that no start and no turn passes."""

_owners = itertools.count()


def other_owner() -> str:
    """An owner that has reserved nothing: one owner alone reserves starts of a second at most."""
    return f"owner-{next(_owners)}"


def for_caller(limiter: Limiter, owner: str = "alice") -> float:
    """The start of a create over HTTP, which has to be granted."""
    start = limiter.reserve_for_caller(owner, latest=LONG)
    assert isinstance(start, Start)
    return start.at


def for_queue(limiter: Limiter, owner: str = "alice") -> float:
    """The start of a queued create, which has to be granted."""
    start = limiter.reserve_for_queue(owner, latest=LONG)
    assert isinstance(start, Start)
    return start.at


@pytest.fixture
def limiter(cloud: None, clock: Clock) -> Limiter:
    """A limiter of ten creates a second."""
    return limiter_of(clock)


@pytest.fixture
def slow(table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock) -> Submissions:
    """The protocol with one create in six seconds."""
    return make_submissions(table, replicate, executed, clock, limiter=limiter_of(clock, 10))


def queued(table: PredictionsTable, clock: Clock, **options: Any) -> str:
    """A prediction that came by the queue's door."""
    prediction_id = waiting(table, clock, **options).id
    aws.client("dynamodb").update_item(
        TableName="predictions",
        Key={"pk": {"S": f"prediction#{prediction_id}"}, "sk": {"S": "status"}},
        UpdateExpression="SET #source = :queue",
        ExpressionAttributeNames={"#source": "source"},
        ExpressionAttributeValues={":queue": {"S": "queue"}},
    )
    return prediction_id


class TestFailure:
    @pytest.mark.parametrize("operation", ["GetItem", "UpdateItem"])
    def test_limiter_that_cannot_be_reached_lets_creates_go(
        self, limiter: Limiter, clock: Clock, operation: str
    ) -> None:
        with refusing(operation, "InternalServerError", service="dynamodb"):
            assert for_queue(limiter) == clock.now()
            for _ in range(3):
                assert for_caller(limiter) == clock.now()
                assert limiter.pause_now() is None
            limiter.block(30)
            limiter.pause_automatically("x")

    def test_limiter_that_is_contended_lets_creates_go(self, limiter: Limiter, clock: Clock) -> None:
        asked: list[Any] = []

        def noted(body: Any) -> bool:
            asked.append(body)
            return True

        with refusing("UpdateItem", "ConditionalCheckFailedException", noted, service="dynamodb"):
            assert for_queue(limiter) == clock.now()
        assert len(asked) == 5

    def test_command_that_was_not_written_says_so(self, limiter: Limiter) -> None:
        with refusing("UpdateItem", "InternalServerError", service="dynamodb"), pytest.raises(ClientError):
            limiter.pause_by_command("x")


class TestCallers:
    def test_lone_create_writes_nothing(self, limiter: Limiter, clock: Clock) -> None:
        calls = AwsCalls()
        for _ in range(3):
            assert for_caller(limiter) == clock.now()
            clock.advance(QUIET_SECONDS)
        assert set(calls.made) == {"dynamodb.GetItem"}

    def test_uncounted_create_is_counted_with_the_next(self, limiter: Limiter, clock: Clock) -> None:
        for_caller(limiter)
        for_caller(limiter)
        assert limiter.limiter_state().http_at == clock.now() * 1000 + 200
        for_caller(limiter)
        assert limiter.limiter_state().http_at == clock.now() * 1000 + 300

    def test_lone_create_writes_where_others_have_used_the_burst_up(self, limiter: Limiter, clock: Clock) -> None:
        limiter.block(7)
        assert for_caller(limiter_of(clock)) == clock.now() + 7

    def test_burst_goes_at_once_and_what_is_beyond_it_one_after_another(self, limiter: Limiter, clock: Clock) -> None:
        starts = [round(for_caller(limiter) - clock.now(), 3) for _ in range(BURST_SECONDS * 10 + 4)]
        assert starts == [0.0] * (BURST_SECONDS * 10 + 1) + [0.1, 0.2, 0.3]

    def test_callers_come_before_what_is_reserved_after_them(self, limiter: Limiter, clock: Clock) -> None:
        for_queue(limiter)
        for_queue(limiter)
        ahead = limiter.limiter_state().queue_at
        for _ in range(10):
            assert for_caller(limiter) == clock.now()
        assert limiter.limiter_state().queue_at == ahead + 1000
        assert for_queue(limiter) == (ahead + 1000) / 1000


class TestQueue:
    def test_starts_are_apart_by_nine_tenths_of_the_rate(self, limiter: Limiter, clock: Clock) -> None:
        starts = [for_queue(limiter, other_owner()) - clock.now() for _ in range(20)]
        assert starts[0] == 0
        assert [round(b - a, 3) for a, b in itertools.pairwise(starts)] == [0.111] * 19

    def test_unused_time_is_not_saved_up(self, limiter: Limiter, clock: Clock) -> None:
        for_queue(limiter)
        clock.advance(3600)
        assert for_queue(limiter) == clock.now()
        assert for_queue(limiter) > clock.now()

    def test_block_keeps_all_back_and_they_start_one_after_another_then(self, limiter: Limiter, clock: Clock) -> None:
        other = limiter_of(clock)
        for_caller(other)
        limiter.block(30)
        limiter.block(10)
        starts = [round(for_caller(other) - clock.now(), 1) for _ in range(2)]
        assert starts == [30.1, 30.2], "it owed one"
        assert round(for_queue(other) - clock.now(), 1) == 30.3

    @pytest.mark.parametrize(
        ("late", "counts"), [(0, True), (29, True), (31, False)], ids=["at its time", "a little late", "too late"]
    )
    def test_reservation_counts_for_half_a_minute(
        self, limiter: Limiter, clock: Clock, late: float, counts: bool
    ) -> None:
        start = clock.now()
        clock.advance(late)
        assert limiter.is_reserved(start) is counts

    def test_reservation_of_before_a_429_does_not_count(self, limiter: Limiter, clock: Clock) -> None:
        limiter.block(20)
        clock.advance(21)
        assert not limiter.is_reserved(clock.now() - 10)
        assert limiter.is_reserved(clock.now() - 1)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        steps=st.lists(
            st.tuples(st.sampled_from(["caller", "queue", "time"]), st.integers(0, 2), st.floats(0, 3)), max_size=60
        )
    )
    def test_starts_of_several_functions_never_exceed_both_lanes(
        self, cloud: None, clock: Clock, steps: list[tuple[str, int, float]]
    ) -> None:
        aws.client("dynamodb").delete_item(
            TableName="predictions", Key={"pk": {"S": "limiter"}, "sk": {"S": "creates"}}
        )
        functions = [limiter_of(clock, 120) for _ in range(3)]
        starts: dict[str, list[float]] = {"caller": [], "queue": []}
        for kind, n, seconds in steps:
            if kind == "time":
                clock.advance(seconds)
                continue
            limiter = functions[n]
            start = (for_caller if kind == "caller" else for_queue)(limiter, other_owner())
            assert start >= clock.now()
            starts[kind].append(start)
        # One create each function owes, and a millisecond each for the rounding.
        for kind, rate, burst in (("caller", 2, BURST_SECONDS * 2 + 1 + 3), ("queue", 1.8, 1)):
            ordered = sorted(starts[kind])
            for i, first in enumerate(ordered):
                for j in range(i, len(ordered)):
                    assert j - i + 1 <= (ordered[j] - first + 0.1) * rate + burst + 0.01


class TestSubmissions:
    def test_queued_prediction_waits_once_and_is_submitted_at_its_time(
        self, slow: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        first, second, third = (queued(table, clock) for _ in range(3))
        slow.submit(first)
        assert len(replicate.creates) == 1
        waits = []
        for prediction_id in (second, third):
            with pytest.raises(PredictionThrottled) as throttled:
                slow.submit(prediction_id)
            waits.append(throttled.value.seconds)
        assert waits == [8, 15]
        assert current(table, second).reserved
        clock.advance(waits[0])
        slow.submit(second)
        assert len(replicate.creates) == 2
        clock.advance(waits[1] - waits[0])
        slow.submit(third)
        assert len(replicate.creates) == 3

    def test_prediction_woken_before_its_time_waits_for_the_rest_of_it(
        self, slow: Submissions, table: PredictionsTable, clock: Clock
    ) -> None:
        slow.submit(queued(table, clock))
        second = queued(table, clock)
        for wait, passed in ((8, 3), (5, 0)):
            with pytest.raises(PredictionThrottled, match=f"^{wait}$"):
                slow.submit(second)
            clock.advance(passed)
        assert slow_state(clock).queue_at == round((clock.now() - 3) * 1000) + 2 * 6667

    def test_prediction_that_has_to_wait_beyond_its_deadline_is_ended_by_it(
        self, slow: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        for _ in range(2):
            with contextlib.suppress(PredictionThrottled):
                slow.submit(queued(table, clock))
        late = queued(table, clock, headers={"cancel-after": "5"})
        with pytest.raises(PredictionThrottled, match=r"^6$"):
            slow.submit(late)
        clock.advance(6)
        slow.submit(late)
        assert (current(table, late).visible, len(replicate.creates)) == ("failed", 1)

    def test_caller_beyond_the_burst_is_answered_and_submitted_at_its_time(
        self,
        slow: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        executed: Executed,
        clock: Clock,
    ) -> None:
        started = [slow.start(wanted()) for _ in range(5)]
        accepted = [prediction for prediction in started if prediction.upstream_id]
        assert len(replicate.creates) == len(accepted) == 2
        assert {each.visible for each in started} == {"starting"}
        assert [executed.inputs[f"{each.id}-1"]["submit"] for each in started] == [False] * 2 + [True] * 3
        later = started[2]
        assert (later.claimed, later.reserved, (later.submit_at or 0) - clock.now()) == (None, True, 2)
        clock.advance(2)
        calls = AwsCalls()
        slow.submit(later.id)
        assert len(replicate.creates) == 3
        assert calls.made.count("dynamodb.UpdateItem") == 2, "claim and bind"

    def test_429_of_replicate_keeps_others_back_too(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        executed: Executed,
        clock: Clock,
    ) -> None:
        replicate.faults = [answer(429, {}, {"Retry-After": "20"})]
        first, second, third = (queued(table, clock) for _ in range(3))
        waits = []
        for prediction_id in (first, second, third):
            with pytest.raises(PredictionThrottled) as throttled:
                submissions.submit(prediction_id)
            waits.append(throttled.value.seconds)
        assert waits == [20, 22, 22]
        started = submissions.start(wanted())
        assert not started.upstream_id
        assert len(replicate.creates) == 1
        clock.advance(20)
        submissions.submit(first)
        assert len(replicate.creates) == 2

    def test_prediction_that_was_not_accepted_reserves_anew(
        self, slow: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        slow.submit(queued(table, clock))
        second = queued(table, clock)
        with pytest.raises(PredictionThrottled):
            slow.submit(second)
        clock.advance(8)
        replicate.faults = [answer(403)]
        with pytest.raises(PredictionThrottled, match=r"^300$"):
            slow.submit(second)
        assert not current(table, second).reserved

    def test_reservation_that_is_not_written_is_not_lost(
        self, slow: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        slow.submit(queued(table, clock))
        second = queued(table, clock)
        with (
            refusing("UpdateItem", "InternalServerError", lambda a: "prediction#" in str(a["Key"]), service="dynamodb"),
            pytest.raises(ClientError),
        ):
            slow.submit(second)
        with pytest.raises(PredictionThrottled, match=r"^15$"):
            slow.submit(second)


class TestPause:
    def test_caller_is_told_why_and_nothing_is_written_or_asked(
        self, submissions: Submissions, replicate: ReplicateInMemory, limiter: Limiter
    ) -> None:
        limiter.pause_by_command("We move to another account.")
        calls = AwsCalls()
        with pytest.raises(Problem) as problem:
            submissions.start(wanted())
        assert (problem.value.status, problem.value.headers) == (503, {"Retry-After": "300"})
        assert "We move to another account." in problem.value.detail
        assert calls.made == ["dynamodb.GetItem"]
        assert replicate.asked == []

    def test_request_that_was_made_before_is_answered(
        self, submissions: Submissions, limiter: Limiter, clock: Clock
    ) -> None:
        started = submissions.start(wanted(key="k1"))
        limiter.pause_by_command("x")
        clock.advance(2)
        assert submissions.start(wanted(key="k1")).id == started.id

    def test_queued_prediction_waits_and_goes_on_when_it_is_over(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        limiter: Limiter,
        clock: Clock,
    ) -> None:
        prediction_id = queued(table, clock)
        before = current(table, prediction_id)
        limiter.pause_by_command("x")
        for _ in range(3):
            with pytest.raises(PredictionThrottled, match=r"^300$"):
                submissions.submit(prediction_id)
            clock.advance(300)
        assert current(table, prediction_id) == before
        limiter.resume()
        submissions.submit(prediction_id)
        assert len(replicate.creates) == 1

    def test_deadline_holds_in_a_pause(
        self, submissions: Submissions, table: PredictionsTable, limiter: Limiter, clock: Clock
    ) -> None:
        prediction_id = queued(table, clock, headers={"cancel-after": "1m"})
        limiter.pause_by_command("x")
        with pytest.raises(PredictionThrottled, match=r"^61$"):
            submissions.submit(prediction_id)
        clock.advance(61)
        submissions.submit(prediction_id)
        assert current(table, prediction_id).visible == "failed"

    @pytest.mark.parametrize("status", [401, 402])
    def test_refused_token_or_credit_pauses_and_the_next_create_after_it_finds_out(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        clock: Clock,
        status: int,
    ) -> None:
        replicate.faults = [answer(status), answer(status)]
        with pytest.raises(Problem) as problem:
            submissions.start(wanted())
        assert problem.value.status == 502
        with pytest.raises(Problem) as problem:
            submissions.start(wanted())
        assert (problem.value.status, str(status) in problem.value.detail) == (503, True)
        waits = []
        prediction_id = queued(table, clock)
        for _ in range(2):
            with pytest.raises(PredictionThrottled) as throttled:
                submissions.submit(prediction_id)
            waits.append(throttled.value.seconds)
            clock.advance(throttled.value.seconds)
        assert waits == [300, 300]
        assert len(replicate.creates) == 2
        submissions.submit(prediction_id)
        assert len(replicate.creates) == 3

    def test_refusal_of_one_model_does_not_pause(
        self, submissions: Submissions, replicate: ReplicateInMemory, limiter: Limiter
    ) -> None:
        replicate.faults = [answer(403)]
        with pytest.raises(Problem):
            submissions.start(wanted())
        assert limiter.pause_now() is None

    def test_automatic_pause_leaves_one_by_command_as_it_is_and_a_command_ends_both(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        limiter.pause_by_command("mine")
        limiter.pause_automatically("401")
        pause = limiter.limiter_state().pause(clock.now() + 10**6)
        assert pause is not None
        assert (pause.reason, pause.until) == ("mine", None)
        limiter.resume()
        limiter.resume()
        assert limiter.limiter_state().pause(clock.now()) is None
        limiter.pause_automatically("401")
        limiter.pause_by_command("mine")
        pause = limiter.limiter_state().pause(clock.now())
        assert pause is not None
        assert (pause.reason, pause.by) == ("mine", "command")

    def test_reservations_of_before_a_pause_do_not_all_start_at_its_end(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        limiter: Limiter,
        clock: Clock,
    ) -> None:
        ids = [queued(table, clock) for _ in range(30)]
        for prediction_id in ids:
            with contextlib.suppress(PredictionThrottled):
                submissions.submit(prediction_id)
        before = len(replicate.creates)
        limiter.pause_by_command("x")
        clock.advance(600)
        limiter.resume()
        waits = 0
        for prediction_id in ids:
            try:
                submissions.submit(prediction_id)
            except PredictionThrottled:
                waits += 1
        assert before == 10, "of the first second"
        assert (len(replicate.creates), waits) == (20, 10)


def slow_state(clock: Clock) -> Any:
    return limiter_of(clock).limiter_state()
