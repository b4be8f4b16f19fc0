"""Copying outputs: the end is visible only when every file is stored or given up, and only once."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from predictions.aws import clients
from predictions.errors import CopyInterrupted
from predictions.files.outputs_bucket import OutputsBucket
from predictions.lifecycle.archive_outputs import copy, copy_again
from predictions.observability import metrics
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction
from predictions.views.prediction import Presenter

from tests.support.fakes import PNG, Clock, ReplicateInMemory, served
from tests.support.predictions import FILE, put, told

OTHER = "https://replicate.delivery/x/gone.png"


@pytest.fixture
def ended(table: PredictionsTable, clock: Clock) -> Prediction:
    prediction = put(table, clock)
    merged = table.merge(prediction.id, told("succeeded", output=[FILE, "text", {"more": OTHER}]), clock.now())
    assert merged.prediction is not None
    return merged.prediction


def run(table: PredictionsTable, outputs: OutputsBucket, prediction_id: str, clock: Clock, n: int = 1) -> None:
    copy(table, outputs, prediction_id, n, remaining_seconds=lambda: 900, now=clock.now)


@contextmanager
def made_calls(operation: str) -> Iterator[list[str]]:
    """The keys of the objects that calls of an operation of S3 name."""
    made: list[str] = []

    def note(params: dict[str, Any], **_: Any) -> None:
        made.append(params["Key"])

    client: Any = clients.client("s3")
    event = f"provide-client-params.s3.{operation}"
    client.meta.events.register(event, note)
    try:
        yield made
    finally:
        client.meta.events.unregister(event, note)


def keys() -> list[str]:
    return [o["Key"] for o in clients.client("s3").list_objects_v2(Bucket="outputs").get("Contents", [])]


def test_unknown_running_or_finished_prediction_is_left_alone(
    table: PredictionsTable, outputs: OutputsBucket, clock: Clock
) -> None:
    run(table, outputs, "d" * 26, clock)
    running = put(table, clock)
    run(table, outputs, running.id, clock)
    assert table.get(running.id) == running


def test_every_file_is_stored_byte_for_byte_before_the_end_is_visible(
    table: PredictionsTable, outputs: OutputsBucket, clock: Clock, replicate: ReplicateInMemory, ended: Prediction
) -> None:
    replicate.files = {FILE: served(PNG), OTHER: served(b"other")}
    run(table, outputs, ended.id, clock)
    whole = table.read(ended.id)
    assert whole is not None
    assert whole.prediction.visible == "succeeded"
    prefix = f"alice/{ended.id}/{ended.upstream_id}"
    assert [(f.path, f.key, f.bytes, f.sha256) for f in whole.files] == [
        ("/0", f"{prefix}/0", len(PNG), hashlib.sha256(PNG).hexdigest()),
        ("/2/more", f"{prefix}/1", 5, hashlib.sha256(b"other").hexdigest()),
    ]
    assert clients.client("s3").get_object(Bucket="outputs", Key=f"{prefix}/0")["Body"].read() == PNG


def test_copy_that_failed_for_now_is_interrupted_and_goes_on_later(
    table: PredictionsTable, outputs: OutputsBucket, clock: Clock, replicate: ReplicateInMemory, ended: Prediction
) -> None:
    replicate.files = {FILE: served(PNG), OTHER: served(b"", 500)}
    with pytest.raises(CopyInterrupted):
        run(table, outputs, ended.id, clock)
    between = table.get(ended.id)
    assert between is not None
    assert between.visible == "processing"
    replicate.files[OTHER] = served(b"other")
    run(table, outputs, ended.id, clock)
    after = table.get(ended.id)
    assert after is not None
    assert after.visible == "succeeded"
    assert len(keys()) == 2


def test_file_that_is_gone_ends_the_prediction_with_its_reason(
    table: PredictionsTable, outputs: OutputsBucket, clock: Clock, replicate: ReplicateInMemory, ended: Prediction
) -> None:
    replicate.files = {FILE: served(PNG)}
    run(table, outputs, ended.id, clock)
    whole = table.read(ended.id)
    assert whole is not None
    assert whole.prediction.visible == "succeeded"
    assert [bool(f.error) for f in whole.files] == [False, True]


def test_host_that_fails_for_hours_is_given_up_with_its_reason(
    table: PredictionsTable, outputs: OutputsBucket, clock: Clock, replicate: ReplicateInMemory, ended: Prediction
) -> None:
    replicate.files = {FILE: served(PNG), OTHER: served(b"", 500)}
    clock.advance(2 * 3600)
    run(table, outputs, ended.id, clock)
    whole = table.read(ended.id)
    assert whole is not None
    assert whole.prediction.visible == "succeeded"
    assert whole.files[1].error


def test_second_execution_does_not_copy_at_the_same_time(
    table: PredictionsTable, outputs: OutputsBucket, clock: Clock, replicate: ReplicateInMemory, ended: Prediction
) -> None:
    replicate.files = {FILE: served(PNG), OTHER: served(b"other")}
    with pytest.raises(CopyInterrupted):
        run(table, outputs, ended.id, clock, n=2)
    assert keys() == []


def test_copied_twice_stores_and_ends_once(
    table: PredictionsTable, outputs: OutputsBucket, clock: Clock, replicate: ReplicateInMemory, ended: Prediction
) -> None:
    replicate.files = {FILE: served(PNG), OTHER: served(b"other")}
    run(table, outputs, ended.id, clock)
    before = table.get(ended.id)
    run(table, outputs, ended.id, clock)
    assert table.get(ended.id) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "url", "stored"),
    [(1000, "data:text/plain,a", 1000), (1001, "data:text/plain,a", 1000), (300_000, "data:text/plain;base64,A", 0)],
)
def test_output_of_too_many_files_keeps_the_first_thousand_and_fails_once_for_the_rest(
    table: PredictionsTable, outputs: OutputsBucket, clock: Clock, count: int, url: str, stored: int
) -> None:
    prediction = put(table, clock)
    table.merge(prediction.id, told("succeeded", output=[url] * count), clock.now())
    metrics.clear_metrics()
    with made_calls("PutObject") as puts:
        run(table, outputs, prediction.id, clock)
    assert len([key for key in puts if not key.startswith("payloads/")]) == stored
    failed: Any = metrics.metric_set["CopiesFailed"]["Value"]
    assert failed == [float(min(count, 1001) - stored)]
    whole = table.read(prediction.id)
    assert whole is not None
    assert whole.prediction.visible == "succeeded"
    assert (len(whole.files), sum(bool(file.key) for file in whole.files)) == (min(count, 1001), stored)
    shown = Presenter(outputs, 60).show(whole)
    beyond = (
        f"output/1000: the output has {count} files: the first 1000 are stored, this one and those after it are not"
    )
    if count > 1000:
        assert shown["error"].endswith(beyond)
        assert shown["output"][1000:] == [None] * (count - 1000)
        assert shown["output_files"][-1] == {"path": "/1000", "error": beyond.removeprefix("output/1000: ")}
        refused = again(table, outputs, prediction.id).get("refused")
        assert refused == (
            "No file of it is missing. Of an output, the first 1000 files are stored." if stored else None
        )
    assert [bool(link) for link in shown["output"][:1000]] == [bool(stored)] * 1000
    assert len(shown["output_files"]) == min(count, 1001)


# -- once more, for an operator ------------------------------------------------------------------------------------


def again(table: PredictionsTable, outputs: OutputsBucket, prediction_id: str) -> dict[str, Any]:
    return copy_again(table, outputs, prediction_id, remaining_seconds=lambda: 900)


def test_what_could_not_be_copied_is_copied_again_and_the_end_stays_as_it_was_told(
    table: PredictionsTable, outputs: OutputsBucket, clock: Clock, replicate: ReplicateInMemory, ended: Prediction
) -> None:
    replicate.files = {FILE: served(PNG)}
    run(table, outputs, ended.id, clock)
    before = table.get(ended.id)
    replicate.files[OTHER] = served(b"other")
    assert again(table, outputs, ended.id) == {"stored": ["/2/more"], "failed": []}
    after = table.get(ended.id)
    assert before is not None
    assert after is not None
    assert replace(after, files_json=before.files_json) == before
    assert [(file.path, file.bytes, file.error) for file in table.stored_files(after)] == [
        ("/0", len(PNG), None),
        ("/2/more", 5, None),
    ]
    assert again(table, outputs, ended.id) == {"refused": "No file of it is missing."}


def test_file_that_is_still_gone_stays_so_with_its_reason(
    table: PredictionsTable, outputs: OutputsBucket, clock: Clock, replicate: ReplicateInMemory, ended: Prediction
) -> None:
    replicate.files = {FILE: served(PNG)}
    run(table, outputs, ended.id, clock)
    before = table.get(ended.id)
    answer = again(table, outputs, ended.id)
    assert (answer["stored"], [file["path"] for file in answer["failed"]]) == ([], ["/2/more"])
    assert answer["failed"][0]["error"]
    assert table.get(ended.id) == before


def test_what_has_not_ended_or_is_deleted_or_unknown_is_not_copied_again(
    table: PredictionsTable, outputs: OutputsBucket, clock: Clock, replicate: ReplicateInMemory, ended: Prediction
) -> None:
    assert "no such" in again(table, outputs, "d" * 26)["refused"]
    assert "not ended" in again(table, outputs, ended.id)["refused"]
    replicate.files = {FILE: served(PNG)}
    run(table, outputs, ended.id, clock)
    assert table.request_delete(ended.id, clock.now())
    replicate.files[OTHER] = served(b"other")
    assert "deleted" in again(table, outputs, ended.id)["refused"]
    assert keys() == [f"alice/{ended.id}/{ended.upstream_id}/0"]
