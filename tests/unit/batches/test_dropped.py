"""Manifests that are dropped into the inputs bucket, from S3's event to the batch."""

import json
from typing import Any

import pytest
from botocore.exceptions import ClientError
from predictions.aws import clients
from predictions.batches.dropped import DroppedManifests
from predictions.batches.files import read_jsonl, requests_key
from predictions.batches.prepare import prepare
from predictions.batches.store import Batch
from predictions.intents.sources import Message, RequestRefused

from tests.support.batches import World, world
from tests.support.fakes import refusing

__all__ = ["world"]  # a fixture

KEY = "batches/alice/fill/2025/a.jsonl"
ROWS = b'{"animal": "fox"}\n{"animal": \n{"animal": "hare"}\n'
TAKES: dict[str, Any] = {"input": {"prompt": "{{ row.animal }}"}, "batches": {}}


def put(key: str = KEY, body: bytes = ROWS, **options: Any) -> str:
    """Drops a manifest; its ETag."""
    return str(clients.client("s3").put_object(Bucket="inputs", Key=key, Body=body, **options)["ETag"]).strip('"')


def told(key: str = KEY, *, bucket: str = "inputs", **of_object: Any) -> dict[str, Any]:
    """What S3 tells of an object."""
    found = {"key": key, "size": 5, "sequencer": "00617F08299329D189", **of_object}
    return {
        "source": "aws.s3",
        "detail-type": "Object Created",
        "detail": {"bucket": {"name": bucket}, "object": found},
    }


@pytest.fixture
def door(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    manifests = DroppedManifests(world.control, inputs_bucket_name="inputs", max_origin_depth=3)
    # The door finds them by the environment.
    monkeypatch.setattr(DroppedManifests, "from_env", classmethod(lambda _: manifests))
    return world


def take(door: World, event: Any, **others: Any) -> list[Batch]:
    """Gives the door a message; alice's batches after it."""
    body = json.dumps({"batch_manifest": event, **others})
    assert door.requests.take(Message("m", "AIDAANYBODY", body, int(door.clock.now()))) is None
    return list(door.batches.page("alice", None, older=True, size=25)[0])


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (None, "must be S3's Object Created"),
        ([], "must be S3's Object Created"),
        ({"detail": {"bucket": {"name": "inputs"}, "object": {}}}, "must be S3's Object Created"),
        (told("x" * 1025), "must be S3's Object Created"),
        (told(KEY, bucket="outputs"), "in the inputs bucket"),
        (told(KEY, bucket="source"), "in the inputs bucket"),
        (told("files/alice/fill/a.jsonl"), "below batches/"),
        (told("batches/alice/fill/a.txt"), "must be a .jsonl or .csv"),
        (told("batches/alice/missing/a.jsonl"), "alice has no recipe missing that accepts manifests"),
        (told("batches/alice/plain/a.jsonl"), "alice has no recipe plain that accepts manifests"),
        (told("batches/alice/going/a.jsonl"), "alice has no recipe going that accepts manifests"),
        (told("batches/bob/fill/a.jsonl"), "bob has no recipe fill that accepts manifests"),
        (told("batches//fill/a.jsonl"), "has no recipe fill"),
        (told("batches/alice#fill/name/a.jsonl"), "has no recipe name"),
        (told("batches/alice/fill/deep.jsonl"), "descends from 4 results"),
        (told("batches/alice/fill/odd.jsonl"), "origin-depth: must be a whole number"),
    ],
    ids=lambda value: json.dumps(value)[-90:],
)
def test_manifest_that_can_start_nothing_is_refused_with_its_reason(door: World, event: Any, reason: str) -> None:
    door.put_recipe("fill", **TAKES)
    door.put_recipe("plain")
    door.put_recipe("going", state="deleting", **TAKES)
    for place in ("alice/missing/a", "alice/plain/a", "alice/going/a", "bob/fill/a", "/fill/a", "alice#fill/name/a"):
        put(f"batches/{place}.jsonl")
    put("batches/alice/fill/deep.jsonl", Metadata={"origin-depth": "3"})
    put("batches/alice/fill/odd.jsonl", Metadata={"origin-depth": "many"})
    with pytest.raises(RequestRefused, match=reason):
        take(door, event)
    assert door.executions == {}


def test_manifest_that_is_too_large_is_refused(door: World, monkeypatch: pytest.MonkeyPatch) -> None:
    door.put_recipe("fill", **TAKES)
    put()
    monkeypatch.setattr("predictions.batches.dropped.MANIFEST_LIMIT_BYTES", len(ROWS) - 1)
    with pytest.raises(RequestRefused, match=rf"\(got {len(ROWS)}\)"):
        take(door, told())


def test_state_that_would_wait_for_a_manifest_is_refused(door: World) -> None:
    door.put_recipe("fill", **TAKES)
    put()
    with pytest.raises(RequestRefused, match="task_token"):
        take(door, told(), task_token="token")
    assert door.executions == {}


@pytest.mark.parametrize("key", ["batches/a.jsonl", "batches/alice/a.jsonl", "batches/alice/fill/gone.jsonl"])
def test_manifest_that_is_gone_or_lies_where_calls_look_for_it_starts_nothing(door: World, key: str) -> None:
    door.put_recipe("fill", **TAKES)
    put("batches/alice/a.jsonl")
    assert take(door, told(key)) == []


def test_manifest_starts_one_batch_of_its_recipe_however_often_and_by_whomever_it_is_told_of(door: World) -> None:
    recipe = door.put_recipe("fill", **TAKES | {"batches": {"max_concurrency": 3, "tolerated_failure_percentage": 5}})
    etag = put()
    (batch,) = take(door, told(etag=etag))
    assert (batch.owner, batch.recipe, batch.max_concurrency, batch.tolerated_failure_percentage) == (
        "alice", "fill", 3, 5
    )  # fmt: skip
    assert batch.manifest_uri("outputs") == f"s3://inputs/{KEY}"
    assert list(door.executions) == [f"{batch.id}-1-1"]
    # Notified twice; a sender of the queue who made an event up; the recipe is not there any more.
    assert take(door, told(etag=etag)) == [batch]
    assert take(door, told(sequencer="FF")) == [batch]
    assert door.recipes.erase(recipe)
    assert take(door, told(etag=etag)) == [batch]

    assert prepare(door.batches, batch.id, 1)["lines"] == 2
    assert [(line["n"], line["request"]["input"]) for line in read_jsonl("outputs", requests_key(batch.id))] == [
        (1, {"prompt": "fox"}),
        (3, {"prompt": "hare"}),
    ]
    assert door.there(batch).refused == 1


def test_overwritten_manifest_is_a_batch_of_its_own_and_its_late_event_no_more(door: World) -> None:
    door.put_recipe("fill", **TAKES)
    first = put()
    (batch,) = take(door, told(etag=first))
    second = put(body=b'{"animal": "elk"}\n')
    assert take(door, told(etag=first)) == [batch], "of what is not there any more"
    assert len(take(door, told(etag=second))) == 2
    assert prepare(door.batches, batch.id, 1)["lines"] == 0, "no line of another manifest runs in its place"


def test_csv_is_read_as_one_and_the_depth_handed_on(door: World) -> None:
    door.put_recipe("fill", **TAKES)
    put("batches/alice/fill/a.csv", b"animal\nfox\n", Metadata={"origin-depth": "1"})
    (batch,) = take(door, told("batches/alice/fill/a.csv"))
    assert (batch.manifest["format"], batch.depth) == ("csv", 2)
    prepare(door.batches, batch.id, 1)
    (prediction_id,) = door.run(batch, submit=False).values()
    prediction = door.table.get(prediction_id)
    assert prediction
    assert prediction.depth == 2


def test_start_that_died_half_way_is_completed_by_the_next_notification(door: World) -> None:
    door.put_recipe("fill", **TAKES)
    put()
    refused = refusing(
        "PutItem", "AccessDeniedException", lambda body: body["Item"]["sk"] == {"S": "status"}, service="dynamodb"
    )
    with refused, pytest.raises(ClientError):
        take(door, told())
    assert door.executions == {}
    (batch,) = take(door, told())
    assert list(door.executions) == [f"{batch.id}-1-1"]
