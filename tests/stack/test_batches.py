"""Batches on the deployed stack: a Distributed Map, the requests queue, and the stand-in's own record of it all."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from local.cloud import LocalCloud
from local.replicate.process import LocalReplicate

Api = Callable[..., httpx.Client]
WaitUntil = Callable[..., Any]

ENDED = ("succeeded", "failed", "canceled")


def sleeper(text: str, seconds: float = 0.2) -> dict[str, Any]:
    return {"model": "local/sleeper", "input": {"seconds": seconds, "text": text}}


def crasher(message: str) -> dict[str, Any]:
    return {"model": "local/crasher", "input": {"message": message}}


class Owner:
    """An owner of batches."""

    def __init__(self, cloud: LocalCloud, client: httpx.Client, wait_until: WaitUntil) -> None:
        self.client = client
        self._cloud = cloud
        self._wait_until = wait_until

    def make(self, key: str | None = None, **fields: Any) -> str:
        headers = {"Idempotency-Key": key} if key else {}
        answer = self.client.post("/batches", json=fields, headers=headers)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def get(self, batch_id: str) -> dict[str, Any]:
        shown: dict[str, Any] = self.client.get(f"/batches/{batch_id}").raise_for_status().json()
        return shown

    def post(self, batch_id: str, what: str) -> httpx.Response:
        return self.client.post(f"/batches/{batch_id}/{what}")

    def wait(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        return self._wait_until(condition, seconds, what)

    def ended(self, batch_id: str, seconds: float = 60) -> dict[str, Any]:
        def shown() -> dict[str, Any] | None:
            batch = self.get(batch_id)
            return batch if batch["status"] in ENDED else None

        found: dict[str, Any] = self.wait(shown, seconds, f"batch {batch_id} to end")
        return found

    def results(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        bucket, _, key = batch["results"]["uri"].removeprefix("s3://").partition("/")
        text = self._cloud.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read().decode()
        by_url = httpx.get(batch["results"]["url"], trust_env=False, timeout=60).raise_for_status().text
        assert by_url == text
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def alice(cloud: LocalCloud, api: Api, wait_until: WaitUntil) -> Owner:
    return Owner(cloud, api("alice"), wait_until)


def test_batch_of_another_owner_is_not_found(alice: Owner, api: Api) -> None:
    batch_id = alice.make(requests=[{"model": "local/sleeper"}])
    for method, path in (("GET", ""), ("POST", "/cancel"), ("POST", "/retry")):
        assert api("bob").request(method, f"/batches/{batch_id}{path}").status_code == 404
    assert batch_id not in api("bob").get("/batches").text
    alice.ended(batch_id)  # the next test counts creates


def test_rows_of_a_csv_become_requests_and_a_bad_one_is_refused_alone(
    alice: Owner, cloud: LocalCloud, replicate: LocalReplicate
) -> None:
    manifest = "\ufefftext,seconds\r\n" + '"a ""red"" fox",0.1\r\nowl\r\nhare,0.1\r\n'
    key = "batches/alice/animals.csv"
    cloud.client("s3").put_object(Bucket=cloud.stack.inputs_bucket, Key=key, Body=manifest.encode())
    template = {
        "model": "local/sleeper",
        "input": {"text": "{{ row.text }}", "seconds": "{{ to_number(row.seconds) }}"},
    }
    batch = alice.ended(alice.make(manifest=f"s3://{cloud.stack.inputs_bucket}/{key}", template=template))
    results = alice.results(batch)
    assert [(line["n"], line["status"], line.get("output")) for line in results] == [
        (2, "succeeded", 'a "red" fox'),
        (3, "refused", None),
        (4, "succeeded", "hare"),
    ]
    assert results[1]["error"] == "The row has 1 fields, but the header has 2."
    assert len(replicate.creates()) == 2


def test_manifest_that_is_dropped_and_told_of_twice_is_one_batch_of_its_recipe(
    alice: Owner, api: Api, cloud: LocalCloud, replicate: LocalReplicate
) -> None:
    s3, sqs, bucket = cloud.client("s3"), cloud.client("sqs"), cloud.stack.inputs_bucket
    recipe = {
        "model": "local/sleeper",
        "input": {"text": "{{ row.text }}", "seconds": 0.1},
        "output_prefix": "said/{{ row.text }}",
    }
    assert api("alice").put("/recipes/quiet", json=recipe).status_code == 201
    assert api("alice").put("/recipes/say", json=recipe | {"batches": {"max_concurrency": 4}}).status_code == 201

    def drop(key: str, text: str) -> None:
        etag = s3.put_object(Bucket=bucket, Key=key, Body=text.encode())["ETag"]
        found = {"key": key, "size": len(text), "etag": etag.strip('"'), "sequencer": "0062E99A88DC407460"}
        event = {
            "source": "aws.s3",
            "detail-type": "Object Created",
            "detail": {"bucket": {"name": bucket}, "object": found},
        }
        # Besides the bucket's own notification.
        sqs.send_message(QueueUrl=cloud.stack.queue_url, MessageBody=json.dumps({"batch_manifest": event}))

    def batches_of(key: str) -> list[dict[str, Any]]:
        listed = alice.client.get("/batches").raise_for_status().json()["results"]
        return [each for each in listed if each["manifest"] == f"s3://{bucket}/{key}"]

    lines = '{"text": "fox"}\n{"text": \n{"text": "hare"}\n'
    key = "batches/alice/say/2026/animals.jsonl"
    drop("batches/alice/quiet/animals.jsonl", lines)
    drop("batches/alice/animals.jsonl", lines)
    drop(key, lines)
    # By the bucket's own notification alone.
    s3.put_object(Bucket=bucket, Key="batches/alice/say/owls.csv", Body=b"text\nowl\n")
    (begun,) = alice.wait(lambda: batches_of(key), 60, "the batch of the manifest")
    (owls,) = alice.wait(lambda: batches_of("batches/alice/say/owls.csv"), 60, "the batch of the other one")
    assert alice.ended(owls["id"])["counts"]["succeeded"] == 1
    assert (begun["recipe"], begun["max_concurrency"]) == ("say", 4)
    # What is changed now changes nothing of a batch that is there.
    assert api("alice").delete("/recipes/say").status_code == 204
    batch = alice.ended(begun["id"])
    results = alice.results(batch)
    assert [(line["n"], line["status"], line.get("output")) for line in results] == [
        (1, "succeeded", "fox"),
        (2, "refused", None),
        (3, "succeeded", "hare"),
    ]
    assert "not JSON" in results[1]["error"]

    def dead() -> list[str]:
        found = sqs.receive_message(
            QueueUrl=cloud.outputs["RequestsDeadLetterQueueUrl"],
            MaxNumberOfMessages=10,
            MessageAttributeNames=["All"],
            VisibilityTimeout=0,
        )
        told = map(json.dumps, found.get("Messages", []))
        return [each for each in told if "batches/alice/quiet/animals.jsonl" in each]

    refused = alice.wait(dead, 60, "the refusal of the other manifest")
    assert "alice has no recipe quiet that accepts manifests" in refused[0]
    # Both notifications of each have been dealt with, and started nothing more.
    alice.wait(lambda: len(batches_of(key)) == 1 and _empty(cloud), 60, "the queue to be empty")
    assert len(replicate.creates()) == 3
    assert len(batches_of(key)) == 1
    assert batches_of("batches/alice/animals.jsonl") == []
    assert api("alice").delete("/recipes/quiet").status_code == 204


def _empty(cloud: LocalCloud) -> bool:
    names: list[Any] = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    told = cloud.client("sqs").get_queue_attributes(QueueUrl=cloud.stack.queue_url, AttributeNames=names)
    return all(int(told["Attributes"][name]) == 0 for name in names)


def test_more_failing_lines_than_tolerated_fail_the_batch(alice: Owner, replicate: LocalReplicate) -> None:
    requests = [crasher(f"crash {n}") for n in range(4)] + [sleeper(f"after {n}") for n in range(6)]
    batch = alice.ended(alice.make(requests=requests, tolerated_failure_percentage=20, max_concurrency=10), 150)
    assert batch["status"] == "failed"
    assert batch["counts"]["failed"] == 4
    # The emulator's Map goes on to its last line before it fails; AWS's stops, and the lines that run are canceled.
    assert batch["counts"]["succeeded"] + batch["counts"]["canceled"] == 6
    assert [line["n"] for line in alice.results(batch)] == list(range(1, 11))


@pytest.mark.slow
def test_two_hundred_lines_canceled_half_way_and_run_anew_are_never_twice_upstream(
    alice: Owner, replicate: LocalReplicate
) -> None:
    requests: list[dict[str, Any]] = [
        crasher(f"line {n}") if n % 20 == 0 else sleeper(f"line {n}") for n in range(1, 201)
    ]
    requests[6] = {"model": "local/sleeper", "inputs": {}}
    key = "two hundred".replace(" ", "-")
    batch_id = alice.make(key, requests=requests)
    assert alice.make(key, requests=requests) == batch_id

    def half_way() -> bool:
        counts = alice.get(batch_id)["counts"]
        return bool(counts["succeeded"] + counts["failed"] >= 80)

    alice.wait(half_way, 150, "half of the lines to end")
    assert alice.post(batch_id, "retry").status_code == 409
    canceled = alice.post(batch_id, "cancel").json()
    assert canceled["cancel_requested"] is True
    batch = alice.ended(batch_id, 150)
    assert batch["status"] == "canceled"
    first = alice.results(batch)
    assert [line["n"] for line in first] == list(range(1, 201))
    assert Counter(line["status"] for line in first) == {k: v for k, v in batch["counts"].items() if v}
    assert batch["counts"]["canceled"] > 20
    assert first[6]["status"] == "refused"
    assert "inputs" in first[6]["error"]

    assert alice.post(batch_id, "retry").status_code == 200
    batch = alice.ended(batch_id, 240)
    assert batch["status"] == "succeeded"
    assert batch["counts"] == {
        "waiting": 0, "running": 0, "succeeded": 189, "failed": 10, "canceled": 0, "refused": 1
    }  # fmt: skip
    second = alice.results(batch)
    assert [line["n"] for line in second] == list(range(1, 201))
    for before, line in zip(first, second, strict=True):
        if line["status"] == "succeeded":
            assert line["output"] == f"line {line['n']}"
        if before["status"] == "succeeded":
            assert line == before

    # One create for each prediction, and no line that had succeeded was created again.
    creates = [request["body"] for request in replicate.creates()]
    assert max(Counter(create["webhook"] for create in creates).values()) == 1
    times = Counter(str(create["input"].get("text") or create["input"].get("message")) for create in creates)
    assert all(times[f"line {line['n']}"] == 1 for line in first if line["status"] == "succeeded")
    assert max(times.values()) <= 2
    ids = {line["id"] for line in (*first, *second) if line["id"]}
    assert {create["webhook"].rpartition("/")[2] for create in creates} <= ids
