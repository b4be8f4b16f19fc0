"""The limiter: a create waits for its turn once, whoever else reserves at the same time, and is never lost to it."""

import contextlib
import itertools
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from predictions.admission.limiter_item import line_key
from predictions.admission.quotas import OwnerLimits
from predictions.admission.rate_limiter import QUIET_SECONDS, Limiter
from predictions.admission.schedule import BURST_SECONDS, AskAgain, Start, TooLate, step_of
from predictions.aws import clients
from predictions.aws.dynamodb import serialize
from predictions.errors import PredictionThrottled, Problem
from predictions.store.predictions import PredictionsTable

from tests.support.apps import AwsCalls
from tests.support.fakes import Clock, Executed, ReplicateInMemory, answer, answers_lost, meanwhile, refusing
from tests.support.fixtures import make_submissions
from tests.support.lanes import queued
from tests.support.predictions import current, wanted
from tests.support.protocol import Submissions


def limiter_of(clock: Clock, creates_per_minute: int = 600) -> Limiter:
    return Limiter("predictions", clients.client("dynamodb"), creates_per_minute=creates_per_minute, now=clock.now)


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
        assert for_queue(limiter) == int(ahead + 1000) / 1000


class TestQueue:
    def test_starts_are_apart_by_nine_tenths_of_the_rate(self, limiter: Limiter, clock: Clock) -> None:
        starts = [for_queue(limiter, other_owner()) - clock.now() for _ in range(20)]
        assert starts[0] == 0
        # In whole milliseconds, of which the ninth part of a second is none: 0.112 once in a second.
        apart = [round(b - a, 3) for a, b in itertools.pairwise(starts)]
        assert Counter(apart) == {0.111: 17, 0.112: 2}
        assert starts[18] == pytest.approx(2.0, abs=1e-6)

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

    @given(rate=st.integers(1, 30_000), share=st.sampled_from([Fraction(1), Fraction(9, 10)]))
    def test_rate_is_exact_whatever_it_is(self, rate: int, share: Fraction) -> None:
        step = step_of(rate, share)
        in_an_hour = Fraction(3_600_000) / Fraction(step)
        assert 0 <= 60 * rate * share - in_an_hour <= 1, "never more, and one less in an hour at most"
        assert step >= 1, "or two starts would have one number"

    @settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(rate=st.one_of(st.sampled_from([7000, 16_800, 30_000]), st.integers(100, 30_000)))
    def test_starts_keep_the_rate_exactly_in_both_lanes(self, cloud: None, clock: Clock, rate: int) -> None:
        clients.client("dynamodb").delete_item(TableName="predictions", Key=KEY)
        limiter = limiter_of(clock, rate)
        limiter.block(1)
        # What a step of whole milliseconds would be wrong by adds up to more than the millisecond of a start's number.
        for reserve, share in ((limiter.reserve_for_queue, 0.9), (limiter.reserve_for_caller, 1.0)):
            free = [each for _ in range(30) if isinstance(each := reserve(other_owner(), latest=LONG), Start)]
            starts = [each.at for each in free]
            assert len(set(starts)) == len(starts) == 30
            apart = (starts[-1] - starts[0]) / (len(starts) - 1)
            assert apart == pytest.approx(60 / rate / share, abs=0.0011 / (len(starts) - 1))

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        steps=st.lists(
            st.tuples(st.sampled_from(["caller", "queue", "time"]), st.integers(0, 2), st.floats(0, 3)), max_size=60
        )
    )
    def test_starts_of_several_functions_never_exceed_both_lanes(
        self, cloud: None, clock: Clock, steps: list[tuple[str, int, float]]
    ) -> None:
        clients.client("dynamodb").delete_item(
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


def reserved(limiter: Limiter, owner: str | None = None) -> Start:
    """A start in the queue's lane that lies ahead."""
    start = limiter.reserve_for_queue(owner or other_owner(), latest=LONG)
    assert isinstance(start, Start)
    assert start.number is not None
    return start


class TestGivenBack:
    def test_start_that_is_given_back_is_the_next_ones_and_the_lane_stays(self, limiter: Limiter, clock: Clock) -> None:
        for_queue(limiter)
        first, second = reserved(limiter), reserved(limiter)
        end = limiter.limiter_state().queue_at
        for _ in range(5):
            limiter.release("queue", first.number or 0)
            again = reserved(limiter_of(clock))
            assert again.at == first.at
            assert again.number != first.number
            first = again
        assert reserved(limiter).at == int(end) / 1000 > second.at

    def test_start_of_a_caller_is_given_back_too(self, limiter: Limiter, clock: Clock) -> None:
        limiter.block(7)
        start = limiter.reserve_for_caller("alice", latest=LONG)
        assert isinstance(start, Start)
        assert start.number is not None
        limiter.release("http", start.number)
        assert limiter.reserve_for_caller("bob", latest=LONG) == Start(start.at, start.number + 1)

    def test_start_that_is_given_back_twice_is_handed_out_once(self, limiter: Limiter, clock: Clock) -> None:
        for_queue(limiter)
        start = reserved(limiter)
        with answers_lost() as lost:
            limiter.release("queue", start.number or 0)
        assert lost == ["UpdateItem"]
        starts = [reserved(limiter).at]
        # As by a repetition that was late on its way.
        limiter.release("queue", start.number or 0)
        starts += [reserved(limiter).at for _ in range(3)]
        assert len(set(starts)) == 4
        assert starts.count(start.at) == 1

    def test_start_that_has_passed_is_not_handed_out_and_removed(self, limiter: Limiter, clock: Clock) -> None:
        for_queue(limiter)
        for start in [reserved(limiter) for _ in range(5)]:
            limiter.release("queue", start.number or 0)
        clock.advance(0.3)
        assert reserved(limiter).at == pytest.approx(clock.now() + 0.033, abs=0.002)
        clock.advance(20)
        now = [limiter_of(clock).reserve_for_queue(other_owner(), latest=LONG) for _ in range(2)]
        assert now[0] == Start(clock.now())
        assert (limiter.limiter_state().free, limiter.limiter_state().taken) == ({}, {})

    def test_more_starts_than_are_kept_are_lost_not_handed_out_twice(self, cloud: None, clock: Clock) -> None:
        limiter = limiter_of(clock, 6000)
        for_queue(limiter)
        starts = [reserved(limiter, f"many-{n % 50}") for n in range(120)]
        for start in starts:
            limiter.release("queue", start.number or 0)
        assert len(limiter.limiter_state().free["queue"]) == 100
        again = [reserved(limiter, "again").at for _ in range(100)] + [reserved(limiter).at]
        assert again[:100] == [start.at for start in starts[:100]]
        assert again[100] > starts[-1].at

    def test_start_of_before_a_429_is_not_handed_out_after_it(self, limiter: Limiter, clock: Clock) -> None:
        for_queue(limiter)
        start = reserved(limiter)
        limiter.release("queue", start.number or 0)
        other = reserved(limiter)
        limiter.block(20)
        limiter.release("queue", other.number or 0)
        assert reserved(limiter).at == clock.now() + 20

    @pytest.mark.parametrize("number", [0, 1, 10**18, 1_750_000_000_500_999])
    def test_number_that_no_reservation_gave_is_not_kept(self, limiter: Limiter, number: int) -> None:
        for_queue(limiter)
        limiter.release("queue", number)
        assert limiter.limiter_state().free == {}

    def test_table_that_fails_loses_the_start_and_nothing_else(self, limiter: Limiter) -> None:
        for_queue(limiter)
        start = reserved(limiter)
        with refusing("UpdateItem", "InternalServerError", service="dynamodb"):
            limiter.release("queue", start.number or 0)
            limiter.release_turn("queue", "alice", 113)
        assert reserved(limiter).at > start.at


class TestTurns:
    def test_start_beyond_the_deadline_is_not_reserved_and_nothing_is_written(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        limiter.block(30)
        before = limiter.limiter_state()
        calls = AwsCalls()
        for reserve in (limiter.reserve_for_queue, limiter.reserve_for_caller):
            late = reserve("alice", latest=clock.now() + 29)
            assert isinstance(late, TooLate)
            assert late.at == clock.now() + 30
        assert "dynamodb.UpdateItem" not in calls.made
        assert limiter.limiter_state() == before
        assert isinstance(limiter.reserve_for_queue("alice", latest=clock.now() + 31), Start)

    def test_start_beyond_the_delay_is_not_reserved_and_has_a_turn(self, cloud: None, clock: Clock) -> None:
        limiter = Limiter("predictions", clients.client("dynamodb"), max_start_delay_seconds=20, now=clock.now)
        limiter.block(30)
        before = limiter.limiter_state().queue_at
        turn = limiter.reserve_for_queue("alice", latest=LONG)
        assert isinstance(turn, AskAgain)
        assert turn.at == clock.now() + 30
        assert limiter.limiter_state().queue_at == before

    def test_owner_with_starts_ahead_has_turns_and_another_one_has_the_next_start(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        answers = [limiter.reserve_for_queue("alice", latest=LONG) for _ in range(50)]
        starts = [each.at for each in answers if isinstance(each, Start)]
        turns = [each.at for each in answers if isinstance(each, AskAgain)]
        assert len(starts) == 11
        assert len(turns) == 39
        assert turns[0] == pytest.approx(starts[-1] + 0.111, abs=0.001)
        assert max(turns) == pytest.approx(turns[0] + 38 * 1.02 / 9, abs=0.001)
        assert for_queue(limiter, "bob") == pytest.approx(turns[0])

    def test_turn_that_has_come_is_a_start_and_a_later_request_goes_behind(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        turns = [
            each for _ in range(50) if isinstance(each := limiter.reserve_for_queue("alice", latest=LONG), AskAgain)
        ]
        clock.advance(2)
        for_queue(limiter, "bob")  # the lane is not idle
        behind = limiter.reserve_for_queue("alice", latest=LONG)
        assert isinstance(behind, AskAgain)
        assert behind.at > turns[-1].at
        assert isinstance(limiter.reserve_for_queue("alice", latest=LONG, turn_at=clock.now()), Start)
        # One that is woken before its turn keeps it.
        early = limiter.reserve_for_queue("alice", latest=LONG, turn_at=turns[-1].at)
        assert isinstance(early, AskAgain)
        assert early.at == pytest.approx(turns[-1].at, abs=0.001)
        assert early.step_ms == 0

    def test_start_that_nobody_waits_for_is_taken_whatever_turns_are_ahead(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        turns = [
            each for _ in range(50) if isinstance(each := limiter.reserve_for_queue("alice", latest=LONG), AskAgain)
        ]
        clock.advance(2)
        assert limiter.is_idle("queue")
        assert limiter.reserve_for_queue("alice", latest=LONG, turn_at=turns[-1].at) == Start(clock.now())
        assert not limiter.is_idle("queue")

    def test_turns_that_are_given_back_shorten_the_line_to_this_moment_at_most(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        turns = [
            each for _ in range(50) if isinstance(each := limiter.reserve_for_queue("alice", latest=LONG), AskAgain)
        ]
        for each in turns * 2:
            limiter.release_turn("queue", "alice", each.step_ms)
        line = limiter.lines()["queue", "alice"]
        assert clock.now() <= line <= clock.now() + 0.114

    def test_owners_that_wait_leave_nothing_in_the_limiters_item(self, limiter: Limiter, clock: Clock) -> None:
        limiter.block(200)
        before = item_of(KEY)
        for n in range(150):
            limiter.reserve_for_queue(f"owner-{n}", latest=LONG)
        assert item_of(KEY).keys() == before.keys()
        # The starts of the first second are anybody's; each later one is its owner's last one.
        lines = [item_of(line_of(f"owner-{n}")) for n in range(12, 150)]
        began = int(clock.now() * 1000)
        assert [int(Decimal(line["last_at"]["N"])) - began for line in lines[:2]] == [201_333, 201_444]
        assert {int(line["expires_at"]["N"]) - clock.now() for line in lines} == {8 * 86400}
        assert len({line["pk"]["S"] for line in lines}) == 16

    def test_attributes_of_the_release_before_count_until_they_have_passed_and_are_removed(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        now = int(clock.now() * 1000)
        ahead = {"queue_last_team_a": now + 20_000, "queue_turn_team_a": now + 60_000, "queue_turn__other": now + 5_000}
        clients.client("dynamodb").put_item(
            TableName="predictions", Item={**KEY, **serialize({"queue_at": now + 20_111, **ahead})}
        )
        limiter.limiter_state()
        turn = limiter.reserve_for_queue("team-a", latest=LONG)
        assert turn == AskAgain(now / 1000 + 60, turn.step_ms if isinstance(turn, AskAgain) else 0)
        assert limiter.lines()["queue", "team-a"] > now / 1000 + 60
        assert for_queue(limiter, "bob") == now / 1000 + 20.111
        clock.advance(100)
        limiter.limiter_state()
        for_queue(limiter, "bob")
        assert [name for name in item_of(KEY) if "team" in name or "other" in name] == []

    @pytest.mark.parametrize("value", [{"S": "x"}, {"N": "1E+40"}, {"N": "9" * 38}, {"M": {}}, {"NS": ["1.5"]}])
    @pytest.mark.parametrize("name", ["last_alice", "turn_alice", "free", "taken"])
    def test_attribute_that_no_rule_can_have_written_is_replaced_or_removed(
        self, limiter: Limiter, clock: Clock, name: str, value: Any
    ) -> None:
        for_queue(limiter)
        clients.client("dynamodb").update_item(
            TableName="predictions",
            Key=KEY,
            UpdateExpression="SET #name = :value",
            ExpressionAttributeNames={"#name": f"queue_{name}"},
            ExpressionAttributeValues={":value": value},
        )
        limiter = limiter_of(clock)
        answers = [limiter.reserve_for_queue("alice", latest=LONG) for _ in range(30)]
        assert {type(each) for each in answers} == {Start, AskAgain}
        assert len({each.at for each in answers}) == 30
        start = reserved(limiter)
        limiter.release("queue", start.number or 0)
        assert reserved(limiter).at == start.at

    @pytest.mark.parametrize("name", ["http_at", "queue_at", "blocked_until"])
    def test_fraction_that_is_far_ahead_is_replaced(self, limiter: Limiter, clock: Clock, name: str) -> None:
        years = int(clock.now() + 1e9) * 1000
        item = {**KEY, name: {"N": f"{years}.5"}}
        clients.client("dynamodb").put_item(TableName="predictions", Item=item)
        limiter.limiter_state()
        if name == "blocked_until":
            limiter.block(40)
        else:
            starts = [(for_caller if name == "http_at" else for_queue)(limiter, other_owner()) for _ in range(3)]
            assert len(set(starts)) == 3, "all are counted"
        assert clock.now() * 1000 < Decimal(stored(name)) <= (clock.now() + 60) * 1000

    def test_fraction_of_a_millisecond_counts_in_a_lane_only(self, limiter: Limiter, clock: Clock) -> None:
        until = int(clock.now()) * 1000 + 20_000
        item = {**KEY, "blocked_until": {"N": f"{until}.5"}, "queue_at": {"N": f"{until}.9"}}
        clients.client("dynamodb").put_item(TableName="predictions", Item=item)
        state = limiter.limiter_state()
        assert (state.blocked_until, state.queue_at) == (until, until + Decimal("0.9"))

    def test_turn_that_no_rule_can_have_written_is_replaced_by_the_next_one(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        now = int(clock.now() * 1000)
        item = {"queue_at": now + 60_000, "queue_last_alice": now + 50_000, "queue_turn_alice": "x"}
        clients.client("dynamodb").put_item(TableName="predictions", Item={**KEY, **serialize(item)})
        limiter.limiter_state()
        turns = [limiter.reserve_for_queue("alice", latest=LONG) for _ in range(2)]
        assert [type(each) for each in turns] == [AskAgain, AskAgain]
        assert clock.now() + 60 <= turns[0].at < turns[1].at


class TestLines:
    """The items of owners that wait."""

    @pytest.fixture
    def ahead(self, limiter: Limiter, clock: Clock) -> Limiter:
        """A limiter whose next start is 20 s ahead: only an owner's first one is reserved."""
        item = {**KEY, **serialize({"queue_at": int(clock.now() * 1000) + 20_000})}
        clients.client("dynamodb").put_item(TableName="predictions", Item=item)
        limiter.limiter_state()
        return limiter

    def test_two_functions_of_one_owner_at_once_reserve_one_start(self, ahead: Limiter, clock: Clock) -> None:
        other = limiter_of(clock)
        others: list[Any] = []

        # Right before the first write, which is that of the owner's line.
        with meanwhile("UpdateItem", lambda: others.append(other.reserve_for_queue("alice", latest=LONG))):
            answer = ahead.reserve_for_queue("alice", latest=LONG)
        assert others == [Start(clock.now() + 20, int(clock.now() + 20) * 10**6)]
        assert isinstance(answer, AskAgain)
        assert answer.at >= others[0].at
        assert for_queue(ahead, "bob") == pytest.approx(clock.now() + 20.111, abs=0.001)

    def test_crash_between_the_two_writes_wastes_no_start(self, ahead: Limiter, clock: Clock) -> None:
        last = serialize({"last_at": int(clock.now() + 20) * 1000})
        clients.client("dynamodb").put_item(TableName="predictions", Item={**line_of("alice"), **last})
        assert isinstance(ahead.reserve_for_queue("alice", latest=LONG), AskAgain)
        assert for_queue(ahead, "bob") == clock.now() + 20
        clock.advance(19.5)
        assert isinstance(ahead.reserve_for_queue("alice", latest=LONG, turn_at=clock.now()), Start)

    @pytest.mark.parametrize("operation", ["GetItem", "UpdateItem"])
    def test_line_that_cannot_be_reached_holds_no_create_back(
        self, ahead: Limiter, clock: Clock, operation: str
    ) -> None:
        with refusing(operation, "InternalServerError", lambda a: "limiter#" in str(a["Key"]), service="dynamodb"):
            start = ahead.reserve_for_queue("alice", latest=LONG)
        # The start is free; only who has it last is unknown.
        assert start == (Start(clock.now()) if operation == "UpdateItem" else Start(clock.now() + 20, start.number))  # type: ignore[union-attr]

    @pytest.mark.parametrize("value", [{"S": "x"}, {"N": "1E+40"}, {"N": "9" * 38}, {"M": {}}, {"NS": ["1.5"]}])
    @pytest.mark.parametrize("name", ["last_at", "turn_at"])
    def test_value_that_no_rule_can_have_written_is_replaced(
        self, ahead: Limiter, clock: Clock, name: str, value: Any
    ) -> None:
        clients.client("dynamodb").put_item(TableName="predictions", Item={**line_of("alice"), name: value})
        answers = [ahead.reserve_for_queue("alice", latest=LONG) for _ in range(4)]
        assert [type(each) for each in answers] == [Start, AskAgain, AskAgain, AskAgain]
        assert [each.at for each in answers] == sorted({each.at for each in answers})
        assert answers[-1].at < clock.now() + 21
        assert item_of(line_of("alice"))[name].keys() == {"N"}


KEY = {"pk": {"S": "limiter"}, "sk": {"S": "creates"}}


def item_of(key: dict[str, Any]) -> dict[str, Any]:
    """An item as the table has it."""
    item: dict[str, Any] = clients.client("dynamodb").get_item(TableName="predictions", Key=key)["Item"]
    return item


def line_of(owner: str) -> dict[str, Any]:
    """The key of an owner's line in the queue's lane."""
    return serialize(line_key("queue", owner)._asdict())


def stored(name: str) -> str:
    """A number of the limiter's item, as the table has it."""
    number: str = clients.client("dynamodb").get_item(TableName="predictions", Key=KEY)["Item"][name]["N"]
    return number


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
        assert float(slow_state(clock).queue_at) == pytest.approx((clock.now() - 3 + 2 * 60 / 9) * 1000, abs=0.001)

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


class TestReturned:
    def test_start_of_a_canceled_prediction_is_anothers(
        self, slow: Submissions, table: PredictionsTable, clock: Clock
    ) -> None:
        slow.submit(queued(table, clock))
        ids = [queued(table, clock) for _ in range(2)]
        for prediction_id in ids[:1]:
            with pytest.raises(PredictionThrottled):
                slow.submit(prediction_id)
        end, start = slow_state(clock).queue_at, current(table, ids[0]).submit_at
        slow.cancel(current(table, ids[0]))
        with pytest.raises(PredictionThrottled):
            slow.submit(ids[1])
        assert (slow_state(clock).queue_at, current(table, ids[1]).submit_at) == (end, start)
        # Canceled again, and once more: it is given back once each time.
        slow.cancel(current(table, ids[1]))
        slow.cancel(current(table, ids[1]))
        slow.cancel(current(table, ids[0]))
        assert len(slow_state(clock).free["queue"]) == 1

    def test_turn_of_a_canceled_prediction_shortens_the_line(
        self, slow: Submissions, table: PredictionsTable, clock: Clock
    ) -> None:
        ids = [queued(table, clock) for _ in range(6)]
        for prediction_id in ids:
            with contextlib.suppress(PredictionThrottled):
                slow.submit(prediction_id)
        waiting_ids = [each for each in ids if current(table, each).turn_ms]
        assert len(waiting_ids) >= 3
        for prediction_id in waiting_ids[1:]:
            slow.cancel(current(table, prediction_id))
        (line,) = limiter_of(clock, 10).lines().values()
        first = current(table, waiting_ids[0])
        assert line == pytest.approx((first.submit_at or 0) + (first.turn_ms or 0) / 1000, abs=1.001)

    def test_prediction_that_was_submitted_or_ended_by_replicate_gives_nothing_back(
        self, slow: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        slow.submit(queued(table, clock))
        second = queued(table, clock)
        with pytest.raises(PredictionThrottled):
            slow.submit(second)
        clock.advance(8)
        replicate.faults = [answer(422)]
        slow.submit(second)
        slow.cancel(current(table, second))
        assert slow_state(clock).free == {}

    def test_prediction_that_is_canceled_while_it_reserves_gives_its_start_back(
        self, slow: Submissions, table: PredictionsTable, clock: Clock
    ) -> None:
        slow.submit(queued(table, clock))
        second = queued(table, clock)
        found = current(table, second)

        # Right before the limiter's write.
        with meanwhile("UpdateItem", lambda: slow.cancel(found)), pytest.raises(PredictionThrottled):
            slow.submit(second)
        assert current(table, second).visible == "canceled"
        assert len(slow_state(clock).free["queue"]) == 1

    def test_request_that_came_twice_at_once_gives_one_start_back(
        self, slow: Submissions, table: PredictionsTable, clock: Clock
    ) -> None:
        for _ in range(2):
            slow.start(wanted())
        intent = wanted(key="k1")
        with meanwhile("PutItem", lambda: slow.start(intent)):
            slow.start(intent)
        assert len(slow_state(clock).free["http"]) == 1

    def test_canceled_one_of_a_table_that_fails_is_canceled(
        self, slow: Submissions, table: PredictionsTable, clock: Clock
    ) -> None:
        slow.submit(queued(table, clock))
        second = queued(table, clock)
        with pytest.raises(PredictionThrottled):
            slow.submit(second)
        with refusing("UpdateItem", "InternalServerError", lambda a: "limiter" in str(a["Key"]), service="dynamodb"):
            assert slow.cancel(current(table, second)).visible == "canceled"


class TestRefused:
    def test_caller_whose_start_is_far_ahead_gets_a_429_and_nothing_is_written(
        self, submissions: Submissions, limiter: Limiter
    ) -> None:
        limiter.block(400)
        calls = AwsCalls()
        with pytest.raises(Problem) as problem:
            submissions.start(wanted(), limits=OwnerLimits(in_flight=1, per_day=1))
        assert (problem.value.status, problem.value.headers) == (429, {"Retry-After": "100"})
        for told in ("alice", "400 s", "600 a minute", "300 s (MaxStartDelaySeconds)", "Retry in 100 s"):
            assert told in problem.value.detail
        assert set(calls.made) == {"dynamodb.GetItem"}

    def test_caller_whose_deadline_is_before_its_start_gets_a_429(
        self, submissions: Submissions, limiter: Limiter
    ) -> None:
        limiter.block(40)
        with pytest.raises(Problem) as problem:
            submissions.start(wanted(headers={"cancel-after": "40"}))
        assert (problem.value.status, problem.value.headers) == (429, {"Retry-After": "10"})
        assert submissions.start(wanted(headers={"cancel-after": "60"})).visible == "starting"

    def test_caller_that_is_refused_after_it_took_its_place_gets_it_back(
        self, submissions: Submissions, limiter: Limiter, table: PredictionsTable, clock: Clock
    ) -> None:
        limits = OwnerLimits(in_flight=1, per_day=1)
        submissions.start(wanted(owner="bob"))  # the next one asks the limiter
        with meanwhile("UpdateItem", lambda: limiter.block(400)), pytest.raises(Problem) as problem:
            submissions.start(wanted(), limits=limits)
        assert (problem.value.status, problem.value.headers) == (429, {"Retry-After": "101"})
        clock.advance(410)
        assert submissions.start(wanted(), limits=limits).upstream_id

    def test_request_that_was_made_before_is_answered_whatever_is_ahead(
        self, submissions: Submissions, limiter: Limiter, clock: Clock
    ) -> None:
        started = submissions.start(wanted(key="k1"))
        limiter.block(400)
        clock.advance(2)
        assert submissions.start(wanted(key="k1")).id == started.id

    def test_queued_prediction_whose_start_is_far_ahead_waits(
        self, submissions: Submissions, limiter: Limiter, table: PredictionsTable, clock: Clock
    ) -> None:
        limiter.block(400)
        prediction_id = queued(table, clock)
        with pytest.raises(PredictionThrottled, match=r"^201$"):
            submissions.submit(prediction_id)
        clock.advance(201)
        with pytest.raises(PredictionThrottled, match=r"^200$"):
            submissions.submit(prediction_id)
        clock.advance(200)
        submissions.submit(prediction_id)
        assert current(table, prediction_id).upstream_id


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
