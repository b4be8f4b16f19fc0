"""The index `due` in shards: what is written there, and how it is read."""

from collections import Counter
from typing import Any

import pytest
from predictions.aws import clients
from predictions.aws.dynamodb import deserialize
from predictions.ids import random_id
from predictions.store.keys import OPEN_SHARDS, prediction_key, shard_of
from predictions.store.predictions import PredictionsTable

from tests.support.fakes import Clock
from tests.support.predictions import put, told


def item_of(prediction_id: str) -> dict[str, object]:
    key = {"pk": {"S": prediction_key(prediction_id).pk}, "sk": {"S": "status"}}
    return dict(deserialize(clients.client("dynamodb").get_item(TableName="predictions", Key=key)["Item"]))


def put_open(name: str, shard: str, due_at: int) -> None:
    clients.client("dynamodb").put_item(
        TableName="predictions",
        Item={
            "pk": {"S": f"prediction#{name}"}, "sk": {"S": "status"}, "open": {"S": shard},
            "next_check_at": {"N": str(due_at)},
        },
    )  # fmt: skip


def test_shards_take_equal_parts_of_predictions_and_each_keeps_its_own() -> None:
    ids = [random_id() for _ in range(8000)]
    counts = Counter(map(shard_of, ids))
    assert counts.keys() == set(OPEN_SHARDS) - {"open"}
    assert max(counts.values()) < 2 * 8000 / 16
    assert [shard_of(each) for each in ids[:50]] == [shard_of(each) for each in ids[:50]]


def test_new_prediction_is_open_in_its_shard(table: PredictionsTable, clock: Clock) -> None:
    prediction = put(table, clock)
    assert item_of(prediction.id)["open"] == shard_of(prediction.id) != "open"


@pytest.mark.parametrize("shard", ["open", None])
def test_item_that_is_open_stays_in_its_shard_and_one_that_is_not_gets_its_own(
    table: PredictionsTable, clock: Clock, shard: str | None
) -> None:
    prediction = put(table, clock)
    key = {"pk": {"S": prediction_key(prediction.id).pk}, "sk": {"S": "status"}}
    change = "SET #o = :o" if shard else "REMOVE #o"
    given: Any = {"ExpressionAttributeValues": {":o": {"S": shard}}} if shard else {}
    clients.client("dynamodb").update_item(
        TableName="predictions", Key=key, UpdateExpression=change, ExpressionAttributeNames={"#o": "open"}, **given
    )
    table.merge(prediction.id, told("starting"), clock.now())
    table.merge(prediction.id, told("starting", "v" * 26), clock.now())  # an orphan
    assert item_of(prediction.id)["open"] == (shard or shard_of(prediction.id))


def test_all_shards_are_read_the_longest_overdue_first(table: PredictionsTable, clock: Clock) -> None:
    now = int(clock.now())
    for n, shard in enumerate(OPEN_SHARDS):
        put_open(f"late{n}", shard, now - n)
        put_open(f"future{n}", shard, now + 60 + n)
    expected = [f"prediction#late{n}" for n in reversed(range(17))]
    assert list(table.due(now, 100)) == expected
    assert list(table.due(now, 3)) == expected[:3]
    assert list(table.due(now, 100, ["open", "open#0"])) == ["prediction#late1", "prediction#late0"]
    assert list(table.open_from(now + 60)) == [f"prediction#future{n}" for n in range(17)]
    assert table.count_open() == dict.fromkeys(OPEN_SHARDS, 2)
    assert table.count_due(now, ["open#f", "open"]) == {"open#f": 1, "open": 1}


def test_shard_is_read_only_as_far_as_it_is_needed(table: PredictionsTable, clock: Clock) -> None:
    now = int(clock.now())
    for n in range(110):
        put_open(f"many{n:03}", "open#3", now - 1000 + n)
    put_open("one", "open#4", now)
    asked: list[int] = []
    clients.client("dynamodb").meta.events.register_first(
        "before-call.dynamodb.Query", lambda params, **_: asked.append(1)
    )
    found = list(table.due(now, 20))
    assert found == [f"prediction#many{n:03}" for n in range(20)]
    assert len(asked) == 17
    assert list(table.due(now, 1000))[-1] == "prediction#one"


def test_idle_table_is_counted_in_17_queries(table: PredictionsTable) -> None:
    asked: list[int] = []
    clients.client("dynamodb").meta.events.register_first(
        "before-call.dynamodb.Query", lambda params, **_: asked.append(1)
    )
    assert table.count_open() == {}
    assert len(asked) == 17
