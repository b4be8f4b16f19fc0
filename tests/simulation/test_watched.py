"""What looking at a running prediction costs, counted with the real handlers: see `tests.benchmarks.watched`."""

from tests.benchmarks import watched
from tests.reliability import Recorded


def test_watched_prediction_is_read_once_a_second_at_most_and_an_old_one_thirty_times_in_its_life(
    record_property: Recorded,
) -> None:
    short, long = watched.measure((10, 600))
    assert short.seconds / 2 <= short.reads <= short.seconds + 1
    # Each second for half a minute, then ever more rarely.
    assert 30 < long.reads < 30 + 30 * 4
    assert (short.growing, long.growing) >= (3, 30)
    for each in (short, long):
        # That it began, what it brought, and now and then a lease of the budget.
        assert each.writes <= 3 * each.reads
    record_property("reads of Replicate in a run of 10 minutes", long.reads)


def test_nothing_is_read_where_nobody_looks() -> None:
    (unwatched,) = watched.measure((60,), looks=False)
    assert (unwatched.gets, unwatched.reads, unwatched.calls) == (0, 0, {})
