"""What callers see of a prediction besides Replicate's own fields: what Replicate last said of it."""

import pytest
from predictions.notifications.event_bus import event_of_prediction
from predictions.status import Status
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction, PredictionDetail
from predictions.upstream.prediction import UpstreamPrediction
from predictions.views.prediction import Presenter

from tests.support.fakes import Clock
from tests.support.predictions import FILE, put, told

LEFT_OUT = "left out"


def shown(table: PredictionsTable, prediction: Prediction | None) -> tuple[str, str]:
    """The status and Replicate's own, as the API and events have them, which say the same."""
    assert prediction is not None
    whole = table.read(prediction.id)
    assert whole is not None
    seen = Presenter.from_env().show(whole)
    detail = event_of_prediction(whole.prediction, [], "outputs", 0).detail
    assert (detail["status"], detail["upstream_status"]) == (seen["status"], seen.get("upstream_status"))
    return seen["status"], seen.get("upstream_status", LEFT_OUT)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("starting", ("starting", "starting")),
        ("processing", ("processing", "processing")),
        ("succeeded", ("succeeded", "succeeded")),
        ("failed", ("failed", "failed")),
        ("canceled", ("canceled", "canceled")),
        ("aborted", ("canceled", "aborted")),
        # A word that Replicate did not have when this was written binds the prediction, and is not passed on.
        ("paused", ("starting", LEFT_OUT)),
    ],
)
def test_status_of_replicate_is_told_beside_the_one_that_clients_know(
    table: PredictionsTable, clock: Clock, said: str, expected: tuple[str, str]
) -> None:
    prediction = put(table, clock)
    assert shown(table, prediction) == ("starting", LEFT_OUT)
    assert shown(table, table.merge(prediction.id, told(said), clock.now()).prediction) == expected


def test_files_that_are_copied_are_told_from_a_model_that_runs(table: PredictionsTable, clock: Clock) -> None:
    prediction = put(table, clock)
    ended = table.merge(prediction.id, told("succeeded", output=[FILE]), clock.now()).prediction
    assert shown(table, ended) == ("processing", "succeeded")
    assert ended is not None
    assert shown(table, table.end_copy(ended, [], clock.now())) == ("succeeded", "succeeded")


def test_one_that_replicate_never_ran_has_no_status_of_its(table: PredictionsTable, clock: Clock) -> None:
    for status in (Status.CANCELED, Status.FAILED):
        ended = table.end(put(table, clock), status, None, clock.now())
        assert shown(table, ended) == (status.value, LEFT_OUT)


def test_end_by_the_stack_leaves_what_replicate_said_last(table: PredictionsTable, clock: Clock) -> None:
    running = table.merge(put(table, clock).id, told("processing"), clock.now()).prediction
    assert running is not None
    assert shown(table, table.end(running, Status.FAILED, "too late", clock.now())) == ("failed", "processing")


def test_output_that_is_too_large_fails_what_replicate_says_has_succeeded(
    table: PredictionsTable, clock: Clock
) -> None:
    text = b'{"id": "%b", "status": "succeeded", "output": "' % (b"u" * 26)
    report = UpstreamPrediction.read(text, truncated=True)
    assert (report.status, report.reported_status) == ("failed", "succeeded")
    ended = table.merge(put(table, clock).id, report, clock.now()).prediction
    assert shown(table, ended) == ("failed", "succeeded")
    # One that still runs is canceled for it, and failed by the stack.
    text = b'{"id": "%b", "status": "processing", "output": "' % (b"v" * 26)
    report = UpstreamPrediction.read(text, truncated=True).failed_for_its_size()
    ended = table.merge(put(table, clock).id, report, clock.now()).prediction
    assert shown(table, ended) == ("failed", "processing")
    # Its status may lie beyond what was read.
    running = table.merge(put(table, clock).id, told("processing", "w" * 26), clock.now()).prediction
    assert running is not None
    text = b'{"id": "%b", "output": "' % (b"w" * 26)
    report = UpstreamPrediction.read(text, truncated=True).failed_for_its_size()
    assert shown(table, table.merge(running.id, report, clock.now()).prediction) == ("failed", "processing")


@pytest.mark.parametrize("status", ["processing", "succeeded"])
def test_answer_that_cannot_be_read_claims_nothing_of_replicate(
    table: PredictionsTable, clock: Clock, status: str
) -> None:
    prediction = table.merge(put(table, clock).id, told(status, output="x"), clock.now()).prediction
    assert prediction is not None

    def fail() -> PredictionDetail:
        raise OSError("no signature")

    seen = Presenter.from_env().show_started(prediction, "{}", fail)
    assert (seen["status"], "upstream_status" in seen, "output" in seen) == ("starting", False, False)
