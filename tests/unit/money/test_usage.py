"""Counters of usage: exact whatever is delivered twice, split or interrupted, and bounded."""

import json
import random
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any

import pytest
from predictions.api.usage import UsageQuery, usage_csv
from predictions.aws import clients
from predictions.aws.dynamodb import Condition, PutWrite, Table, TransactionRefused, UpdateWrite
from predictions.errors import Problem
from predictions.files.outputs_bucket import OutputsBucket
from predictions.money import usage
from predictions.money.usage import Counted, UsageCounters, counted, read_usage
from predictions.store.predictions import PredictionsTable

from tests.support.apps import Context, load_app, sample
from tests.support.fakes import Clock
from tests.support.predictions import put, told
from tests.support.stream import make
from tests.support.webhook_queue import stream

DAY = date(2026, 12, 1)
AT = 1_796_083_200  # that day, 00:00 UTC


class Crashing(Table):
    """The table, where the process may crash before or after a transaction."""

    dice: random.Random | None = None
    transactions = 0
    actions = 0

    def transact(self, writes: Sequence[PutWrite | UpdateWrite]) -> None:
        crash = self.dice.choice(("before", "after", "", "")) if self.dice else ""
        if crash == "before":
            raise ConnectionError
        self.transactions += 1
        self.actions += len(writes)
        super().transact(writes)
        if crash == "after":
            raise ConnectionError


@pytest.fixture
def items(cloud: None) -> Crashing:
    """The stack's table."""
    return Crashing("predictions", clients.client("dynamodb"))


def change(n: int, *, owner: str = "alice", second: int = AT, labels: tuple[str, ...] = (), **more: int) -> Counted:
    return Counted(f"p{n:025}", second, owner, DAY, f"o/m{n % 2}", labels, more or {"succeeded": 1, "predict_ms": 500})


def rows(items: Table, by: str = "owner", owner: str | None = None) -> list[dict[str, Any]]:
    return read_usage(items, DAY, DAY, owner, by.split(","))


def ran(items: Table, by: str = "owner", owner: str | None = None) -> dict[str, int]:
    return {row[by]: sum(row["predictions"].values()) for row in rows(items, by, owner)}


@pytest.mark.parametrize("seed", range(6))
def test_redelivery_in_any_split_with_crashes_at_each_call_gives_the_exact_sums(items: Crashing, seed: int) -> None:
    dice = items.dice = random.Random(seed)  # noqa: S311  # chances of a test
    records = [
        change(n, owner=dice.choice(("alice", "bob")), second=AT + n // 7, succeeded=1, cost_micro_dollars=n)
        for n in range(60)
    ]
    start = 0
    while start < len(records):
        size = dice.randint(1, 30)
        try:
            UsageCounters(items).add(records[start : start + size])
        except ConnectionError:
            continue  # the batch is read again, split differently
        start += dice.randint(max(0, size - 5), size)  # and sometimes although it was counted
    items.dice = None
    assert sum(ran(items).values()) == 60
    assert sum(row["cost_micro_dollars"] for row in rows(items)) == sum(range(60))


def test_full_batch_of_one_owner_and_model_takes_less_than_two_write_units_each(items: Crashing) -> None:
    UsageCounters(items).add([change(2 * n, second=AT + n // 34) for n in range(100)])  # 34 a second
    assert items.transactions == 2
    # Each action is an item of at most 1 KB: two units in a transaction.
    sets = list(items.query(Condition("pk = :pk", pk=f"usage_seen#{AT}")))
    assert [sum(map(len, each["tokens"])) < 1000 for each in sets] == [True]
    assert items.actions <= 8  # 16 units for 100 predictions


def test_later_price_is_counted_once_as_the_difference_in_the_day_of_completion() -> None:
    ended = {"pk": "prediction#a", "status": "succeeded", "visible": "succeeded", "ended": AT + 5}
    end = counted(ended, {"visible": "processing"}, AT + 6, "alice", "o/m")
    priced = counted({**ended, "cost_micro_dollars": 7}, ended, AT + 90_000, "alice", "o/m")
    assert end is not None
    assert priced is not None
    assert end.amounts == {"succeeded": 1, "cost_unknown": 1}
    assert priced.amounts == {"cost_micro_dollars": 7, "cost_unknown": -1}
    assert priced.token != end.token
    assert priced.day == end.day == DAY
    known = {**ended, "cost_micro_dollars": 7}
    assert counted({**known, "deleted": 1}, known, AT, "a", "") is None


@pytest.mark.parametrize("seconds", [-1, float("inf"), float("nan"), 10**10, "9", True, None])
def test_nonsense_of_a_model_adds_no_seconds(seconds: Any) -> None:
    ended = {"pk": "prediction#a", "status": "failed", "visible": "failed", "metrics": {"predict_time": seconds}}
    found = counted(ended, {}, AT, "alice", "o/m")
    assert found is not None
    assert found.amounts == {"failed": 1, "cost_unknown": 1}


def test_cost_that_is_unknown_is_counted_apart_and_never_zero(items: Crashing) -> None:
    UsageCounters(items).add([change(0, owner="alice", succeeded=1, cost_unknown=1)])
    UsageCounters(items).add([change(1, owner="bob", canceled=1)])
    alice, bob = rows(items)
    assert (alice["cost_micro_dollars"], alice["cost_unknown"]) == (None, 1)
    assert (bob["cost_micro_dollars"], bob["cost_unknown"]) == (0, 0)


def test_labels_above_the_limit_are_other_also_when_they_are_delivered_again(
    items: Crashing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "LABELS_LIMIT", 3)
    changes = [change(n, labels=(f"team={n}",)) for n in range(5)]
    for each in (*changes, *changes):
        UsageCounters(items).add([each])
    assert ran(items, "label") == {"team=0": 1, "team=1": 1, "team=2": 1, "other": 2}


def test_numbers_of_other_owners_are_left_out_also_with_a_name_that_begins_alike(items: Crashing) -> None:
    UsageCounters(items).add([change(0, owner="alice"), change(1, owner="alice2"), change(2, owner="bob")])
    assert ran(items, owner="alice") == {"alice": 1}
    assert ran(items) == {"alice": 1, "alice2": 1, "bob": 1}


def test_refusal_that_lasts_is_raised_and_counts_nothing(items: Crashing, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise TransactionRefused({0: {"tokens": {"another"}}})

    monkeypatch.setattr(Crashing, "transact", refuse)
    with pytest.raises(usage.UsageBusy):
        UsageCounters(items).add([change(0)])
    assert rows(items) == []


def test_many_owners_in_one_batch_are_written_in_transactions_within_the_limit(items: Crashing) -> None:
    UsageCounters(items).add([change(n, owner=f"o{n}", labels=("a=b", "c=d")) for n in range(100)])
    assert sum(ran(items).values()) == 100
    assert items.transactions > 1


def test_end_in_the_stream_is_counted_once_with_its_owner_and_model(
    items: Crashing, table: PredictionsTable, outputs: OutputsBucket, clock: Clock
) -> None:
    prediction = put(table, clock)
    table.merge(prediction.id, told("succeeded", model="o/m", metrics={"predict_time": 1.5}), clock.now())
    for _ in range(3):
        assert make(table, outputs, usage=UsageCounters(items)).publish(stream()) is None
    ended = table.get(prediction.id)
    assert ended is not None
    assert ended.ended is not None
    day = datetime.fromtimestamp(ended.ended, UTC).date()
    (row,) = read_usage(items, day, day, None, ("owner", "model"))
    assert (row["owner"], row["model"], row["predict_seconds"]) == ("alice", "o/m", 1.5)
    assert (row["predictions"]["succeeded"], row["cost_micro_dollars"], row["cost_unknown"]) == (1, None, 1)


@pytest.mark.parametrize(
    ("query", "field"),
    [({"from": "1.12."}, "from"), ({"to": "2026-02-30"}, "to"), ({"from": "2026-12-02"}, "from"),
     ({"from": "2025-11-01"}, "from"), ({"by": "owner,age"}, "by"), ({"by": "model,label"}, "by"),
     ({"format": "xml"}, "format")],
)  # fmt: skip
def test_invalid_query_is_refused_with_the_field(query: dict[str, str], field: str) -> None:
    with pytest.raises(Problem) as refused:
        UsageQuery.read(query, DAY)
    assert refused.value.status == 422
    assert f"'field': '{field}'" in str(refused.value.body())


def test_csv_has_no_formula_and_no_zero_for_an_unknown_cost(items: Crashing) -> None:
    UsageCounters(items).add([change(0, labels=("=1+1=x",), succeeded=1, cost_unknown=1)])
    lines = usage_csv(("label",), rows(items, "label")).splitlines()
    assert lines[1] == "'=1+1=x,1,0,0,0,0,0.0,,1"


@pytest.mark.parametrize(("scopes", "owners"), [("read", ["alice"]), ("read manage", ["alice", "bob"])])
def test_read_sees_its_own_numbers_and_manage_all(
    items: Crashing, monkeypatch: pytest.MonkeyPatch, scopes: str, owners: list[str]
) -> None:
    UsageCounters(items).add([change(0, owner="alice"), change(1, owner="bob")])
    event = sample("read_predictions", "list")
    event["path"], event["resource"] = "/usage", "/usage"
    event["queryStringParameters"] = {"from": "2026-12-01", "to": "2026-12-01", "by": "owner"}
    event["requestContext"]["authorizer"] = {"owner": "alice", "scopes": scopes}
    answer = load_app("read_predictions", monkeypatch).handler(event, Context())
    assert [row["owner"] for row in json.loads(answer["body"])["results"]] == owners
