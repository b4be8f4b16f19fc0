"""Deleting a prediction's data: only what has ended, all of it, and nothing ever brings it back."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError
from predictions.aws import clients
from predictions.errors import Problem
from predictions.files.outputs_bucket import OutputsBucket
from predictions.lifecycle.archive_outputs import copy
from predictions.lifecycle.receive_webhook import receive
from predictions.store.payloads import PAYLOAD_LIMIT_BYTES
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction, PredictionDetail

from tests.support.fakes import (
    PNG,
    Clock,
    Died,
    Fault,
    ReplicateInMemory,
    Wakes,
    answers_lost,
    faulty,
    meanwhile,
    refusing,
    served,
)
from tests.support.predictions import FILE, current, raw_items, wanted
from tests.support.protocol import Submissions

LATER = 1021
"""Seconds after which no function can be alive that read the prediction while it was open."""


def started(submissions: Submissions, *, large: bool = False, **options: Any) -> Prediction:
    prompt = "secret " * (PAYLOAD_LIMIT_BYTES if large else 1)
    return submissions.start(wanted(input={"prompt": prompt}, **options))


@pytest.fixture
def run_to_end(
    submissions: Submissions,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    outputs: OutputsBucket,
    clock: Clock,
    wakes: Wakes,
) -> Callable[..., Prediction]:
    """Runs a prediction to its visible end; its input, progress, logs and output are all there then."""

    def run(*, output: Any = None, large: bool = False, **options: Any) -> Prediction:
        replicate.files = {FILE: served(PNG)}
        prediction = started(submissions, large=large, **options)
        upstream_id = current(table, prediction.id).upstream_id or ""
        logs = "secret log " * (PAYLOAD_LIMIT_BYTES if large else 1)
        told = replicate.predictions[upstream_id] | {"status": "processing", "logs": logs}
        receive(table, prediction.id, json.dumps(told).encode(), clock.now())
        done = replicate.finish(upstream_id, output=output or [FILE, "secret text"], logs=logs + "done")
        receive(table, prediction.id, json.dumps(done).encode(), clock.now())
        copy(table, outputs, prediction.id, 1, remaining_seconds=lambda: 900, now=clock.now)
        ended = current(table, prediction.id)
        assert ended.visible == "succeeded"
        return ended

    return run


def shown(table: PredictionsTable, prediction_id: str) -> PredictionDetail:
    whole = table.read(prediction_id)
    assert whole is not None
    return whole


def assert_hidden(table: PredictionsTable, prediction_id: str) -> None:
    """Nobody is shown any of it, alone or in a list."""
    listed = {w.prediction.id: w for w in table.list("alice", None, older=True, size=100).predictions}
    for whole in (shown(table, prediction_id), listed[prediction_id]):
        assert (whole.input, whole.output, whole.logs, whole.files) == ({}, None, None, [])
        assert (whole.input_key, whole.result_key) == (None, None)
        assert whole.prediction.data_removed
        assert whole.prediction.files_json is None


def left(prediction_id: str) -> list[str]:
    """What the table and the bucket have of a prediction, beside its status item."""
    items = clients.client("dynamodb").scan(TableName="predictions")["Items"]
    keys = [i["sk"]["S"] for i in items if i["pk"]["S"] == f"prediction#{prediction_id}" and i["sk"]["S"] != "status"]
    s3 = clients.client("s3")
    keys += [o["Key"] for o in s3.list_objects_v2(Bucket="outputs").get("Contents", []) if prediction_id in o["Key"]]
    uploads = s3.list_multipart_uploads(Bucket="outputs").get("Uploads", [])
    return keys + [upload["Key"] for upload in uploads if prediction_id in upload["Key"]]


# -- refusals -------------------------------------------------------------------------------------------------


def test_open_prediction_is_refused_and_stays_as_it_is(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory
) -> None:
    prediction = started(submissions)
    before = shown(table, prediction.id)
    with pytest.raises(Problem) as problem:
        submissions.delete_ended(prediction)
    assert problem.value.status == 409
    assert "cancel it first" in problem.value.detail
    assert shown(table, prediction.id) == before
    assert replicate.canceled == []


def test_prediction_whose_files_are_being_stored_is_refused(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock, wakes: Wakes
) -> None:
    prediction = started(submissions)
    upstream_id = current(table, prediction.id).upstream_id or ""
    receive(table, prediction.id, json.dumps(replicate.finish(upstream_id, output=FILE)).encode(), clock.now())
    with pytest.raises(Problem) as problem:
        submissions.delete_ended(current(table, prediction.id))
    assert problem.value.status == 409
    assert "files are being stored" in problem.value.detail
    assert current(table, prediction.id).deleted is None


# -- what is removed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [False, True], ids=["in the table", "in the bucket"])
def test_input_output_logs_and_files_are_removed_and_the_rest_stays(
    submissions: Submissions, table: PredictionsTable, run_to_end: Callable[..., Prediction], large: bool
) -> None:
    other = run_to_end()
    prediction = run_to_end(large=large)
    assert len(left(prediction.id)) >= (4 if large else 3)
    others = left(other.id)
    submissions.delete_ended(prediction)
    assert left(prediction.id) == []
    assert_hidden(table, prediction.id)
    kept = current(table, prediction.id)
    assert (kept.status, kept.visible, kept.completed_at) == ("succeeded", "succeeded", prediction.completed_at)
    assert (kept.metrics_json, kept.model) == (prediction.metrics_json, prediction.model)
    assert left(other.id) == others
    assert shown(table, other.id).output == [FILE, "secret text"]


def test_input_and_result_in_the_status_item_are_removed_with_the_flag(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock, wakes: Wakes
) -> None:
    prediction = started(submissions)
    upstream_id = current(table, prediction.id).upstream_id or ""
    done = replicate.finish(upstream_id, output="secret text", logs="secret log")
    receive(table, prediction.id, json.dumps(done).encode(), clock.now())
    assert "secret" in json.dumps(raw_items(prediction.id)["status"]), "nothing is there: this test tests nothing"
    table.request_delete(prediction.id, clock.now())
    assert "secret" not in json.dumps(raw_items(prediction.id)["status"])
    assert_hidden(table, prediction.id)


def test_many_files_and_the_list_of_their_places_are_removed(
    submissions: Submissions, table: PredictionsTable, run_to_end: Callable[..., Prediction]
) -> None:
    prediction = run_to_end(output=[FILE] * 100)
    assert "files" in left(prediction.id)
    submissions.delete_ended(prediction)
    assert left(prediction.id) == []


def test_parts_of_an_upload_that_broke_off_are_removed(
    submissions: Submissions, run_to_end: Callable[..., Prediction]
) -> None:
    prediction = run_to_end()
    key = f"alice/{prediction.id}/{prediction.upstream_id}/7"
    upload = clients.client("s3").create_multipart_upload(Bucket="outputs", Key=key)["UploadId"]
    clients.client("s3").upload_part(Bucket="outputs", Key=key, UploadId=upload, PartNumber=1, Body=b"secret")
    assert key in left(prediction.id)
    submissions.delete_ended(prediction)
    assert left(prediction.id) == []


def test_request_with_the_key_of_a_deleted_prediction_starts_nothing(
    submissions: Submissions, replicate: ReplicateInMemory, run_to_end: Callable[..., Prediction]
) -> None:
    prediction = run_to_end(key="order-7")
    submissions.delete_ended(prediction)
    assert started(submissions, key="order-7").id == prediction.id
    assert len(replicate.creates) == 1
    assert left(prediction.id) == []


# -- twice, late, half-way ------------------------------------------------------------------------------------


def test_repeated_deletion_changes_nothing(
    submissions: Submissions, table: PredictionsTable, run_to_end: Callable[..., Prediction], clock: Clock
) -> None:
    prediction = run_to_end()
    submissions.delete_ended(prediction)
    once = current(table, prediction.id)
    for seconds in (0, 5, LATER):
        clock.advance(seconds)
        submissions.delete_ended(current(table, prediction.id))
        assert_hidden(table, prediction.id)
    assert current(table, prediction.id).deleted == once.deleted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "finished_by"),
    [
        (Fault.DIED_BEFORE, "the sweep"),
        (Fault.DIED_AFTER, "the next call"),
        (Fault.REFUSED, "the next call"),
        (Fault.ANSWER_LOST, "the sweep"),
    ],
)
def test_deletion_that_breaks_off_anywhere_is_finished_and_shows_nothing_after_its_first_write(
    submissions: Submissions,
    table: PredictionsTable,
    run_to_end: Callable[..., Prediction],
    clock: Clock,
    fault: Fault,
    finished_by: str,
) -> None:
    n = 0
    while True:
        prediction = run_to_end(large=True)
        broke_off = False
        with faulty(fault, n) as calls:
            try:
                submissions.delete_ended(prediction)
            except (Died, Problem, ClientError, BotoCoreError):
                broke_off = True
        if len(calls) <= n:
            break
        flagged = current(table, prediction.id).deleted is not None
        if flagged:
            assert_hidden(table, prediction.id)
        else:
            assert broke_off, "a caller was told of a deletion that is none"
        if finished_by == "the next call" or not flagged:
            submissions.delete_ended(current(table, prediction.id))
        else:
            clock.advance(61)
            submissions.sweep(100, lambda: 300)
            if left(prediction.id):  # the sweep itself comes once more
                clock.advance(LATER)
                submissions.sweep(100, lambda: 300)
        assert left(prediction.id) == [], calls[n]
        assert_hidden(table, prediction.id)
        n += 1
    assert n > 8


def test_deletion_whose_answers_are_lost_is_done(
    submissions: Submissions, table: PredictionsTable, run_to_end: Callable[..., Prediction]
) -> None:
    prediction = run_to_end(large=True)
    with answers_lost("dynamodb", "s3"):
        submissions.delete_ended(prediction)
    assert left(prediction.id) == []
    assert_hidden(table, prediction.id)


def test_object_that_s3_does_not_remove_is_told_and_removed_by_the_sweep(
    submissions: Submissions, table: PredictionsTable, run_to_end: Callable[..., Prediction], clock: Clock
) -> None:
    prediction = run_to_end()
    with refusing("DeleteObject", "SlowDown", service="s3"), pytest.raises(ClientError):
        submissions.delete_ended(prediction)
    assert left(prediction.id) != []
    assert_hidden(table, prediction.id)
    clock.advance(61)
    assert submissions.sweep(10, lambda: 300) == 1
    assert left(prediction.id) == []


@pytest.mark.parametrize("status", ["processing", "succeeded", "failed", "canceled"])
def test_late_webhook_or_poll_brings_nothing_back(
    submissions: Submissions,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    run_to_end: Callable[..., Prediction],
    clock: Clock,
    status: str,
) -> None:
    prediction = run_to_end()
    submissions.delete_ended(prediction)
    upstream_id = prediction.upstream_id or ""
    late = replicate.predictions[upstream_id] | {"status": status, "output": [FILE], "logs": "secret " * 50}
    receive(table, prediction.id, json.dumps(late).encode(), clock.now())
    submissions.poll(prediction.id)
    assert_hidden(table, prediction.id)
    assert left(prediction.id) == []


@pytest.mark.parametrize("large", [False, True], ids=["in the table", "in the bucket"])
@pytest.mark.parametrize("status", ["processing", "succeeded"])
def test_webhook_that_read_the_item_while_it_was_open_leaves_nothing_behind(
    submissions: Submissions,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    clock: Clock,
    wakes: Wakes,
    status: str,
    large: bool,
) -> None:
    prediction = started(submissions)
    upstream_id = current(table, prediction.id).upstream_id or ""
    # Too long for the status item, whose write is refused by then.
    logs = "secret " * (PAYLOAD_LIMIT_BYTES if large else 500)
    slow = json.dumps(replicate.predictions[upstream_id] | {"status": status, "logs": logs}).encode()
    done = json.dumps(replicate.finish(upstream_id, output="secret", logs="secret")).encode()

    def end_and_delete() -> None:
        receive(table, prediction.id, done, clock.now())
        submissions.delete_ended(current(table, prediction.id))

    # The slow receiver has read the item; before it writes the payload, the prediction ends and is deleted.
    with meanwhile("PutItem", end_and_delete):
        receive(table, prediction.id, slow, clock.now())
    assert left(prediction.id) != [], "nothing was written late: this test tests nothing"
    assert_hidden(table, prediction.id)
    clock.advance(LATER)
    assert submissions.sweep(10, lambda: 300) == 1
    assert left(prediction.id) == []
    assert current(table, prediction.id).next_check_at is None
    assert submissions.sweep(10, lambda: 300) == 0


def test_late_copy_stores_nothing_that_stays(
    submissions: Submissions,
    table: PredictionsTable,
    outputs: OutputsBucket,
    replicate: ReplicateInMemory,
    run_to_end: Callable[..., Prediction],
    clock: Clock,
) -> None:
    prediction = run_to_end()
    submissions.delete_ended(prediction)
    # A copier that began before the other one ended the prediction.
    outputs.store(
        outputs.find_files([FILE]),
        prefix=f"alice/{prediction.id}/{prediction.upstream_id}",
        remaining_seconds=lambda: 900,
    )
    assert table.end_copy(prediction, [], clock.now()) is None
    assert_hidden(table, prediction.id)
    clock.advance(LATER)
    submissions.sweep(10, lambda: 300)
    assert left(prediction.id) == []


def test_sweep_that_read_the_item_before_the_deletion_does_not_take_it_off_the_list(
    submissions: Submissions, table: PredictionsTable, run_to_end: Callable[..., Prediction]
) -> None:
    prediction = run_to_end()
    submissions.delete_ended(prediction)
    table.close(prediction)
    assert current(table, prediction.id).next_check_at is not None


def test_orphan_of_a_deleted_prediction_is_still_canceled(
    submissions: Submissions,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    run_to_end: Callable[..., Prediction],
    clock: Clock,
) -> None:
    prediction = run_to_end()
    submissions.delete_ended(prediction)
    orphan = replicate.predictions[prediction.upstream_id or ""] | {"id": "orphan" * 4, "status": "processing"}
    orphan["webhook"] = f"https://api.example.com/v1/webhooks/replicate/{prediction.id}"
    replicate.predictions[orphan["id"]] = orphan
    receive(table, prediction.id, json.dumps(orphan).encode(), clock.now())
    for seconds in (1, LATER, LATER):
        clock.advance(seconds)
        submissions.sweep(10, lambda: 300)
    assert replicate.canceled == [orphan["id"]]
    assert left(prediction.id) == []
    assert current(table, prediction.id).next_check_at is None


@pytest.mark.parametrize(("prediction_id", "owner"), [("", "alice"), ("../x", "alice"), ("a" * 26, ""), ("a", "..")])
def test_prefix_that_is_none_of_ours_is_never_deleted(outputs: OutputsBucket, prediction_id: str, owner: str) -> None:
    with pytest.raises(ValueError, match="not a prefix"):
        outputs.delete_all(prediction_id, owner)
