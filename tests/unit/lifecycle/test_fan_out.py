"""The sweep shares what is due among runs: how many items they check in how long, and what fails on the way."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, cast

import pytest
from botocore.exceptions import ClientError
from predictions.aws import clients
from predictions.ids import random_id
from predictions.intents.model import create_intent
from predictions.lifecycle.fan_out import ITEMS_OF_A_RUN, RUNS_AT_ONCE, FanOut, groups_of, handed_over
from predictions.lifecycle.orphan_polls import OrphanPolls
from predictions.lifecycle.sweep import SweepPredictions
from predictions.store.keys import OPEN_SHARDS, shard_of

from tests.support.fakes import VERSION, Clock, Executed
from tests.support.protocol import Submissions

CALLS_OF_A_LOOK = 8
CALL_SECONDS = 0.02
"""What a call to DynamoDB or Step Functions takes: more than their median."""


class Due:
    """Open items by shard, with the time at which each is due."""

    def __init__(self, due: Mapping[str, int]) -> None:
        self.due_at = dict(due)
        self._shards: dict[str, list[str]] = {shard: [] for shard in OPEN_SHARDS}
        for id_ in due:
            self._shards[shard_of(id_)].append(id_)

    def _of(self, shards: Iterable[str], until: float) -> list[str]:
        found = [id_ for shard in shards for id_ in self._shards[shard] if self.due_at[id_] <= until]
        return sorted(found, key=self.due_at.__getitem__)

    def due(self, now: float, limit: int, shards: Iterable[str]) -> Iterator[str]:
        return islice((f"prediction#{id_}" for id_ in self._of(shards, now)), limit)

    def count_open(self) -> dict[str, int]:
        return self.count_due(float("inf"), OPEN_SHARDS)

    def count_due(self, now: float, shards: Iterable[str]) -> dict[str, int]:
        counts = {shard: len(self._of([shard], now)) for shard in shards}
        return {shard: count for shard, count in counts.items() if count}


class Runs:
    """The sweep's function: asynchronous invocations are kept until a test runs them."""

    def __init__(self, refused: Iterable[int] = ()) -> None:
        self.handed: list[list[str]] = []
        self.calls = 0
        self._refused = set(refused)

    def invoke(self, *, FunctionName: str, InvocationType: str, Payload: bytes) -> None:  # noqa: N803  # AWS's names
        assert (FunctionName, InvocationType) == ("sweep", "Event")
        self.calls += 1
        if self.calls in self._refused:
            raise ClientError({"Error": {"Code": "TooManyRequestsException", "Message": ""}}, "Invoke")
        self.handed.append(handed_over(json.loads(Payload)))


def sweep_once(table: Due, runs: Runs, now: float, *, dies: Iterable[int] = (), twice: bool = False) -> int:
    """One sweep of the schedule with the runs that it asks for, each with a clock of its own; items it looked at."""
    own, shared = FanOut(cast(Any, table), cast(Any, runs), now=lambda: now).share("sweep")
    parts = [own, *(part for n, part in enumerate(runs.handed) if n not in set(dies))]
    runs.handed.clear()
    looked = 0
    for part in parts + parts[1:] * twice:
        seconds = 0.0
        run = FanOut(cast(Any, table), cast(Any, runs), clock=lambda: seconds)  # noqa: B023  # called within this turn
        lasted = run.for_a_run(lambda: 300 - seconds)  # noqa: B023

        def look(id_: str) -> None:
            nonlocal seconds, looked
            if table.due_at[id_] > now:  # as `begin_look`, whose write is refused
                return
            table.due_at[id_] = int(now) + 180
            seconds += CALLS_OF_A_LOOK * CALL_SECONDS
            looked += 1

        sweeper = SweepPredictions(*(cast(Any, each) for each in (table, *(None,) * 8)), first_poll=60, now=lambda: now)
        limit_of_app = 1000
        remaining = lasted if shared else lambda: 300 - seconds  # noqa: B023
        sweeper.sweep(limit_of_app, remaining, {"prediction": look}, part)
        assert seconds < 60 or not shared
    return looked


def stalled(number: int) -> Due:
    return Due({random_id(): -n for n in range(number)})


def test_ten_thousand_stalled_predictions_are_looked_at_within_five_sweeps() -> None:
    table = stalled(10_000)
    looked: list[int] = []
    while sum(looked) < 10_000:
        looked.append(sweep_once(table, Runs(), 60.0 * len(looked)))
    assert len(looked) <= 5


def test_runs_that_die_or_run_twice_leave_nothing_out() -> None:
    table = stalled(3000)
    first = sweep_once(table, Runs(), 0, dies=[0, 3], twice=True)
    assert first < 3000
    assert first + sum(sweep_once(table, Runs(), 60.0 * n, twice=True) for n in (1, 2)) == 3000


def test_few_items_are_checked_by_one_run_that_asks_for_no_other() -> None:
    table, runs = stalled(ITEMS_OF_A_RUN), Runs()
    own, shared = FanOut(cast(Any, table), cast(Any, runs), now=lambda: 0).share("sweep")
    assert (set(own), shared, runs.calls) == (set(OPEN_SHARDS) - {"open"}, False, 0)


def test_many_open_items_of_which_few_are_due_are_checked_by_one_run() -> None:
    table, runs = stalled(3000), Runs()
    for n, id_ in enumerate(table.due_at):
        table.due_at[id_] = 100 if n % 20 else -100
    own, shared = FanOut(cast(Any, table), cast(Any, runs), now=lambda: 0).share("sweep")
    assert (set(own), shared, runs.calls) == (set(OPEN_SHARDS) - {"open"}, False, 0)


@pytest.mark.parametrize("refused", [range(1, 2), range(1, RUNS_AT_ONCE)], ids=["one", "all"])
def test_groups_that_cannot_be_handed_over_are_checked_by_the_run_of_the_schedule(refused: range) -> None:
    table, runs = stalled(10_000), Runs(refused)
    own, shared = FanOut(cast(Any, table), cast(Any, runs), now=lambda: 0).share("sweep")
    handed = [shard for group in runs.handed for shard in group]
    assert sorted([*own, *handed]) == sorted(set(OPEN_SHARDS) - {"open"})
    assert (len(runs.handed), shared) == (RUNS_AT_ONCE - 1 - len(refused), len(refused) < RUNS_AT_ONCE - 1)


def test_groups_are_even_bounded_and_hold_each_shard_once() -> None:
    due = {shard: 700 if shard == "open" else 100 for shard in OPEN_SHARDS}
    groups = groups_of(due)
    assert len(groups) == RUNS_AT_ONCE
    assert sorted(shard for group in groups for shard in group) == sorted(OPEN_SHARDS)
    sums = [sum(due[shard] for shard in group) for group in groups]
    assert (max(sums), min(sums)) == (700, 200)
    assert groups_of({}) == [[]]


@pytest.mark.parametrize(
    ("event", "shards"),
    [
        ({}, []),
        ({"shards": ["open#a", "open"]}, ["open", "open#a"]),
        ({"shards": ["prediction#x", 1, None]}, []),
        ({"detail": "{}"}, []),
    ],
)
def test_only_shards_are_handed_over(event: dict[str, Any], shards: list[str]) -> None:
    assert handed_over(event) == shards


def test_look_at_a_stalled_prediction_makes_no_more_calls_than_a_run_is_counted_with(
    submissions: Submissions, executed: Executed, clock: Clock
) -> None:
    body = json.dumps({"version": VERSION, "input": {"prompt": "fox"}}).encode()
    asked = {"content-type": "application/json"}
    ids: list[str] = []
    for _ in range(2):
        intent = create_intent(body, asked, owner="alice", reference=None, allow_loopback_webhooks=False)
        ids.append(submissions.start(intent).id)
        executed.stop(f"{ids[-1]}-1")
    clock.advance(181)
    calls: list[str] = []
    for service in ("dynamodb", "stepfunctions"):
        events: Any = clients.client(cast(Any, service)).meta.events
        events.register_first("before-call", lambda model, **_: calls.append(model.name))
    assert submissions.sweep(10, lambda: 300) == 2
    looks = [call for call in calls if call != "Query"]
    assert len(looks) <= 2 * CALLS_OF_A_LOOK, looks
    assert set(executed.inputs) >= {f"{id_}-2" for id_ in ids}


def test_client_of_lambda_is_made_with_the_first_invocation_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setenv("POLL_PREDICTION_FUNCTION_NAME", "poll")
    for module in ("fan_out", "orphan_polls"):
        monkeypatch.setattr(f"predictions.lifecycle.{module}.client", made.append)
    fan_out, polls = FanOut(cast(Any, None)), OrphanPolls.from_env()
    assert made == []
    for user in (fan_out, polls):
        assert user._lambda is None  # what `append` gives
    assert made == ["lambda", "lambda"]
