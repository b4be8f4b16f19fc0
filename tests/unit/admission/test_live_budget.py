"""The budget of live reads: of the whole stack, in leases of a few; paused while Replicate fails."""

from collections.abc import Callable

import pytest
from botocore.exceptions import ClientError
from predictions.admission.live_budget import FAILURES, PAUSE_SECONDS, LiveBudget
from predictions.aws import clients
from predictions.aws.dynamodb import Table

from tests.support.apps import AwsCalls
from tests.support.fakes import Clock

Budgets = Callable[[], LiveBudget]
PER_MINUTE = 100


@pytest.fixture
def budget(cloud: None, clock: Clock) -> Budgets:
    """The budget as one more function sees it."""
    clock.moment = 1_750_000_020.0  # a minute of the clock begins
    return lambda: LiveBudget(Table("predictions", clients.client("dynamodb")), PER_MINUTE, now=clock.now)


def test_functions_together_get_no_more_than_the_minute_has(budget: Budgets, clock: Clock) -> None:
    functions = [budget() for _ in range(7)]
    for _ in range(2):
        taken = [one.acquire() for _ in range(40) for one in functions]
        assert PER_MINUTE - 70 <= sum(taken) <= PER_MINUTE  # what is leased and not used is lost
        assert not any(taken[-7:])
        clock.advance(60)


def test_one_function_gets_all_of_a_minute_with_few_writes(budget: Budgets, clock: Clock) -> None:
    calls, one = AwsCalls(), budget()
    assert sum(one.acquire() for _ in range(3 * PER_MINUTE)) == PER_MINUTE
    # Leases of 1, 1, 2, 4, 8 and then 10, the rest of 4, and two refusals: of the first lease and of the last.
    assert len(calls.made) <= 17
    clock.advance(59.9)
    assert (one.acquire(), one.is_closed) == (False, True)
    clock.advance(0.1)
    assert (one.is_closed, one.acquire()) == (False, True)


def test_three_failures_of_different_functions_pause_all(budget: Budgets, clock: Clock) -> None:
    functions = [budget() for _ in range(FAILURES)]
    for one in functions:
        assert one.acquire()
    for one in functions:
        one.failed()
    assert [one.acquire() for one in [*functions, budget()]] == [False] * (FAILURES + 1)
    clock.advance(PAUSE_SECONDS - 1)
    assert not budget().acquire()
    clock.advance(1)
    assert all(one.acquire() for one in functions)


def test_429_pauses_at_once(budget: Budgets, clock: Clock) -> None:
    one = budget()
    one.acquire()
    one.failed(throttled=True)
    assert (one.is_closed, budget().acquire()) == (True, False)
    clock.advance(PAUSE_SECONDS)
    assert one.acquire()


def test_success_of_another_function_ends_the_row_of_failures(budget: Budgets) -> None:
    failing = budget()
    for _ in range(4):
        for _ in range(FAILURES - 1):
            assert failing.acquire()
            failing.failed()
        good = budget()
        assert good.acquire()
        good.succeeded()
        assert good.acquire()  # with its next lease, which tells it


def test_failures_of_one_pause_count_from_zero_after_it(budget: Budgets, clock: Clock) -> None:
    one = budget()
    for _ in range(FAILURES):
        one.acquire()
        one.failed()
    clock.advance(PAUSE_SECONDS)
    for _ in range(FAILURES - 1):
        assert one.acquire()
        one.failed()
    assert one.acquire()


def test_clock_that_is_behind_counts_to_the_minute_of_the_others(budget: Budgets, clock: Clock) -> None:
    clock.advance(60)
    ahead = budget()
    assert sum(ahead.acquire() for _ in range(PER_MINUTE)) == PER_MINUTE
    clock.advance(-2)
    assert not budget().acquire()


def test_error_of_the_table_is_the_callers(budget: Budgets) -> None:
    AwsCalls().fail(ClientError({"Error": {"Code": "ThrottlingException"}}, "UpdateItem"))
    with pytest.raises(ClientError):
        budget().acquire()
