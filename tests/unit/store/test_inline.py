"""Small payloads are in the status item, where they cost less than items of their own."""

import json
import math
from typing import Any

import pytest
from predictions.aws import clients
from predictions.aws.dynamodb import deserialize, size_of
from predictions.store.keys import prediction_key
from predictions.store.predictions import PredictionsTable

from tests.support import partition_limits
from tests.support.fakes import Clock
from tests.support.predictions import current, put, raw_items, told

TOKENS = (36, 750, 1024)
"""Characters of task tokens: the emulator's, AWS's samples', and what docs/cost.md counts with."""


def wait(prediction_id: str, characters: int) -> None:
    clients.client("dynamodb").update_item(
        TableName="predictions",
        Key={"pk": {"S": prediction_key(prediction_id).pk}, "sk": {"S": "status"}},
        UpdateExpression="SET task_token = :t, wake = :w",
        ExpressionAttributeValues={":t": {"S": "t" * characters}, ":w": {"S": "v2"}},
    )


def units_of(prediction_id: str) -> int:
    return math.ceil(partition_limits.size_of(raw_items(prediction_id)["status"]) / 1024)


@pytest.mark.parametrize("token", TOKENS)
def test_small_input_and_result_take_no_item_and_no_more_units(
    table: PredictionsTable, clock: Clock, token: int
) -> None:
    asked, said = {"seconds": 0.1}, {"output": "slept well", "logs": "0.1 s left\n"}
    prediction = put(table, clock, input=asked)
    table.merge(prediction.id, told("starting"), clock.now())
    wait(prediction.id, token)
    table.merge(prediction.id, told("processing", started_at="2026-12-01T04:01:06.047613Z"), clock.now())
    waiting = units_of(prediction.id)
    assert waiting == math.ceil((token + 700) / 1024)
    metrics = {"predict_time": 0.105159465, "total_time": 0.367682}
    table.merge(prediction.id, told("succeeded", metrics=metrics, **said), clock.now())
    assert raw_items(prediction.id).keys() == {"status"}
    assert units_of(prediction.id) == waiting
    whole = table.read(prediction.id)
    assert whole is not None
    assert (whole.input, whole.output, whole.logs, whole.prediction.data_removed) == (asked, *said.values(), False)
    assert table.input_json(prediction) == json.dumps(asked, separators=(",", ":"))
    assert table.result_output(current(table, prediction.id)) == "slept well"
    (listed,) = table.list("alice", None, older=True, size=10).predictions
    assert (listed.input, listed.output) == (asked, "slept well")
    assert table.results([prediction.id], "alice")[prediction.id].output_json == '"slept well"'
    (unread,) = table.unread_results([prediction.id])
    assert json.loads(table.result_text(unread) or "") == said
    assert unread.length == len(table.result_text(unread) or "")


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("characters", [*range(0, 1600, 50)])
def test_result_never_takes_more_units_than_an_item_of_its_own(
    table: PredictionsTable, clock: Clock, token: int, characters: int
) -> None:
    prediction = put(table, clock)
    wait(prediction.id, token)
    table.merge(prediction.id, told("processing"), clock.now())
    result: dict[str, Any] = {"output": None, "logs": "x" * characters}
    table.merge(prediction.id, told("succeeded", **result), clock.now())
    items = raw_items(prediction.id)
    written = units_of(prediction.id) + ("result#" + "u" * 26 in items)
    status = {name: value for name, value in items["status"].items() if name != "result_json"}
    assert written <= math.ceil(partition_limits.size_of(status) / 1024) + 1
    whole = table.read(prediction.id)
    assert whole is not None
    assert whole.logs == "x" * characters


def test_input_of_a_prediction_that_another_function_submits_is_an_item(table: PredictionsTable, clock: Clock) -> None:
    unclaimed = put(table, clock, claim=False)
    assert "input_json" not in raw_items(unclaimed.id)["status"]
    claimed = put(table, clock, input={"n": 2})
    assert raw_items(claimed.id).keys() == {"status"}
    # A function of an earlier release, which may submit it next, reads the item only.
    assert table.release(claimed, clock.now(), 5) is not None
    stored = raw_items(claimed.id)[f"input#{claimed.fingerprint}"]
    assert stored["json"] == raw_items(claimed.id)["status"]["input_json"]


def test_result_that_was_stored_first_stays_when_replicate_has_removed_it(
    table: PredictionsTable, clock: Clock
) -> None:
    prediction = put(table, clock)
    table._payloads.put_result(prediction, told("succeeded", output="first", logs="kept"))
    table.merge(prediction.id, told("succeeded", output=None, data_removed=True), clock.now())
    whole = table.read(prediction.id)
    assert whole is not None
    assert (whole.output, whole.logs) == ("first", "kept")


def test_size_of_an_item_is_what_dynamodb_counts(table: PredictionsTable, clock: Clock) -> None:
    prediction = put(table, clock, webhook="https://example.com/h", webhook_events_filter=["completed"])
    table.merge(prediction.id, told("processing", logs="täglich"), clock.now())
    item = raw_items(prediction.id)["status"]
    assert size_of(deserialize(item)) == pytest.approx(partition_limits.size_of(item), abs=4)
    assert current(table, prediction.id).stored_bytes == size_of(deserialize(item))
