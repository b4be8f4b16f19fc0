"""Deleting on the deployed stack: the function's own rights, the bucket and the table behind it."""

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from local.cloud import LocalCloud
from local.replicate.process import LocalReplicate

Api = Callable[..., httpx.Client]
WaitUntil = Callable[..., Any]


class Kept:
    """What the deployed stack keeps of a prediction."""

    def __init__(self, cloud: LocalCloud) -> None:
        self._cloud = cloud

    def left(self, prediction_id: str) -> list[str]:
        """Keys of its items, but for the status, and of its objects."""
        found = self._cloud.client("dynamodb").query(
            TableName=self._cloud.stack.table_name,
            KeyConditionExpression="pk = :pk",
            ExpressionAttributeValues={":pk": {"S": f"prediction#{prediction_id}"}},
        )["Items"]
        pages = (
            self._cloud.client("s3").get_paginator("list_objects_v2").paginate(Bucket=self._cloud.stack.outputs_bucket)
        )
        keys = [each["Key"] for page in pages for each in page.get("Contents", [])]
        return [i["sk"]["S"] for i in found if i["sk"]["S"] != "status"] + [k for k in keys if prediction_id in k]

    def break_off(self, prediction_id: str) -> None:
        """Leaves the item as a function does that died right after its first write, 2000 seconds ago."""
        self._cloud.client("dynamodb").update_item(
            TableName=self._cloud.stack.table_name,
            Key={"pk": {"S": f"prediction#{prediction_id}"}, "sk": {"S": "status"}},
            UpdateExpression="SET deleted = :then, data_removed = :true, #open = :open, next_check_at = :due",
            ExpressionAttributeNames={"#open": "open"},
            ExpressionAttributeValues={
                ":then": {"N": str(int(time.time()) - 2000)},
                ":true": {"BOOL": True},
                ":open": {"S": "open"},
                ":due": {"N": "1"},
            },
        )

    def sweep(self) -> None:
        answer = self._cloud.client("lambda").invoke(
            FunctionName=self._cloud.functions["sweep_predictions"], Payload=json.dumps({})
        )
        assert "FunctionError" not in answer, answer["Payload"].read()


@pytest.fixture(scope="session")
def kept(cloud: LocalCloud) -> Kept:
    return Kept(cloud)


def create(client: httpx.Client, model: str, **input_: Any) -> str:
    answer = client.post("/predictions", json={"version": f"local/{model}", "input": input_})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def test_data_of_what_has_ended_is_removed_from_table_and_bucket(
    api: Api, kept: Kept, replicate: LocalReplicate, wait_until: WaitUntil
) -> None:
    alice = api("alice")
    prompt = "a lighthouse " * 12_000  # large enough to be an object itself
    replicate.fault("start_late", seconds=600)  # still open when its deletion is asked for
    prediction_id = create(alice, "painter", prompt=prompt)
    assert alice.delete(f"/predictions/{prediction_id}").status_code == 409
    replicate.release()

    def shown() -> dict[str, Any]:
        found: dict[str, Any] = alice.get(f"/predictions/{prediction_id}").raise_for_status().json()
        return found

    wait_until(lambda: shown()["status"] == "succeeded", 30, "the prediction to end")
    assert len(kept.left(prediction_id)) >= 4
    assert api("bob").delete(f"/predictions/{prediction_id}").status_code == 404
    link = shown()["output"]
    for _ in range(2):
        answer = alice.delete(f"/predictions/{prediction_id}")
        assert answer.status_code == 200, answer.text
        assert answer.json()["data_removed"] is True
    assert kept.left(prediction_id) == []
    assert httpx.get(link, trust_env=False, timeout=60).status_code == 404
    removed = shown()
    assert (removed["status"], removed["input"], removed["output"], removed["logs"]) == ("succeeded", {}, None, "")
    assert removed["output_files"] == []
    assert prompt not in alice.get("/predictions").text


def test_deletion_that_broke_off_is_finished_by_the_sweep(
    api: Api, kept: Kept, replicate: LocalReplicate, wait_until: WaitUntil
) -> None:
    alice = api("alice")
    prediction_id = create(alice, "painter", prompt="a harbour")
    path = f"/predictions/{prediction_id}"
    wait_until(lambda: alice.get(path).json()["status"] == "succeeded", 30, "the prediction to end")
    assert kept.left(prediction_id) != []
    kept.break_off(prediction_id)
    assert alice.get(path).json()["output"] is None
    kept.sweep()
    # By this sweep, or by that of the schedule, which may still be at it.
    wait_until(lambda: kept.left(prediction_id) == [], 20, "everything to be removed")
