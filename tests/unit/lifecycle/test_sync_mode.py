"""`Prefer: wait` is Replicate's own sync mode, through the claim: whatever else happens while the answer is held."""

import base64
import json
from typing import Any

import httpx
import pytest
from predictions.aws import clients
from predictions.files.outputs_bucket import OutputsBucket
from predictions.lifecycle.archive_outputs import copy
from predictions.lifecycle.receive_webhook import Receipt, receive
from predictions.store.predictions import PredictionsTable
from predictions.store.schemas import StoredSchemas

from tests.support.fakes import PNG, VERSION, Clock, Executed, ReplicateInMemory, Wakes, answer
from tests.support.figures import Calls
from tests.support.fixtures import make_submissions
from tests.support.predictions import current, wanted
from tests.support.protocol import Submissions

DATA = "data:image/png;base64," + base64.b64encode(PNG).decode()


def held(clock: Clock, seconds: float, act: Any = None, **told: Any) -> Any:
    """A create that is accepted, and answered `seconds` later; `act(upstream prediction)` happens in between."""

    def hold(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
        prediction = replicate.accept(request, webhook=json.loads(request.content).get("webhook"))
        clock.advance(seconds)
        if act:
            act(prediction)
        return httpx.Response(201, json=prediction | told)

    return hold


def preferred(replicate: ReplicateInMemory) -> list[str | None]:
    """The `Prefer` header of each create."""
    creates = [r for r in replicate.asked if r.method == "POST" and not r.url.path.endswith("/cancel")]
    return [r.headers.get("prefer") for r in creates]


# -- what is asked ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wait_seconds", "prefer"), [(0, None), (0.9, None), (1, "wait=1"), (9.7, "wait=9"), (24, "wait=24")]
)
def test_replicate_is_asked_to_wait_no_longer_than_the_caller(
    submissions: Submissions, replicate: ReplicateInMemory, wait_seconds: float, prefer: str | None
) -> None:
    submissions.start(wanted(), wait_seconds=wait_seconds)
    assert preferred(replicate) == [prefer]
    [sent] = [r for r in replicate.asked if r.method == "POST"]
    timeout = sent.extensions["timeout"]
    assert timeout["connect"] == 5
    assert max(20, wait_seconds) <= timeout["read"] <= 27, "API Gateway ends a request after 29 s"


def test_time_that_the_look_up_of_the_version_took_is_not_waited_again(
    submissions: Submissions, replicate: ReplicateInMemory, clock: Clock
) -> None:
    def slow(_: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
        clock.advance(6)
        return httpx.Response(200, json=replicate.models["stability-ai/sdxl"])

    replicate.read_faults = [slow]
    submissions.start(wanted(version="stability-ai/sdxl"), wait_seconds=10)
    assert preferred(replicate) == ["wait=4"]


def test_what_the_state_machine_submits_waits_for_nothing(
    submissions: Submissions, replicate: ReplicateInMemory, clock: Clock
) -> None:
    replicate.faults = [answer(429, {"detail": "Your rate limit resets in ~1s."})]
    started = submissions.start(wanted(), wait_seconds=10)
    clock.advance(2)
    submissions.submit(started.id)
    assert preferred(replicate) == ["wait=10", None]


def test_same_request_again_is_not_posted_again(submissions: Submissions, replicate: ReplicateInMemory) -> None:
    for _ in range(2):
        submissions.start(wanted(key="order-7"), wait_seconds=5)
    assert preferred(replicate) == ["wait=5"]


# -- what the answer tells ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "seen"),
    [("succeeded", "succeeded"), ("failed", "failed"), ("canceled", "canceled"), ("aborted", "canceled")],
)
def test_end_without_files_is_the_end_and_nothing_is_left_to_follow(
    submissions: Submissions,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    executed: Executed,
    clock: Clock,
    status: str,
    seen: str,
) -> None:
    StoredSchemas.from_env().put_schema(VERSION, "null", int(clock.now()) + 3600, "stability-ai/sdxl")
    calls = Calls("dynamodb")
    replicate.faults = [held(clock, 3, status=status, output="A fox." if status == "succeeded" else None)]
    started = submissions.start(wanted(), wait_seconds=10)
    assert (started.visible, started.next_check_at) == (seen, None)
    assert executed.inputs == {}
    assert calls.writes == 2, "the claim with the input, and the end with the output"
    before = clock.now()
    assert submissions.wait_for_end(started.id, 7) is True
    assert clock.now() == before
    clock.advance(10_000)
    assert submissions.sweep(10, lambda: 300) == 0


def test_end_with_files_is_followed_until_they_are_copied(
    submissions: Submissions,
    table: PredictionsTable,
    outputs: OutputsBucket,
    replicate: ReplicateInMemory,
    executed: Executed,
    clock: Clock,
    wakes: Wakes,
) -> None:
    replicate.faults = [held(clock, 3, status="succeeded", output=[DATA])]
    started = submissions.start(wanted(), wait_seconds=10)
    assert current(table, started.id).visible == "processing"
    assert executed.inputs == {f"{started.id}-1": {"id": started.id, "submit": False}}
    copy(table, outputs, started.id, 1, remaining_seconds=lambda: 900, now=clock.now)
    whole = table.read(started.id)
    assert whole is not None
    assert (whole.prediction.visible, [file.bytes for file in whole.files]) == ("succeeded", [len(PNG)])


@pytest.mark.parametrize("output", ["A fox.", [DATA], {"text": "A fox.", "image": DATA}], ids=["text", "file", "both"])
def test_processing_with_the_whole_output_is_no_end_until_replicate_says_so(
    submissions: Submissions,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    executed: Executed,
    clock: Clock,
    wakes: Wakes,
    output: Any,
) -> None:
    replicate.faults = [held(clock, 3, status="processing", output=output, logs="100%")]
    started = submissions.start(wanted(), wait_seconds=10)
    assert (started.terminal, started.visible) == (False, "processing")
    assert executed.inputs == {f"{started.id}-1": {"id": started.id, "submit": False}}
    assert submissions.wait_for_end(started.id, 2) is False
    # The bytes of files are not kept as progress: nobody would be shown them.
    items = json.dumps(clients.client("dynamodb").scan(TableName="predictions")["Items"])
    assert "base64" not in items
    upstream_id = started.upstream_id or ""
    done = replicate.finish(upstream_id, output="A fox.", logs="100%")
    assert receive(table, started.id, json.dumps(done).encode(), clock.now()) is Receipt.MERGED
    assert current(table, started.id).visible == "succeeded"


# -- meanwhile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["processing", "succeeded"])
def test_webhooks_before_the_answer_bind_and_end_it_and_the_answer_changes_nothing(
    submissions: Submissions,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    clock: Clock,
    wakes: Wakes,
    status: str,
) -> None:
    seen = []

    def tell(prediction: dict[str, Any]) -> None:
        ours = prediction["webhook"].rpartition("/")[2]
        for told in (prediction | {"status": "processing"}, replicate.finish(prediction["id"], output="webhook's")):
            receive(table, ours, json.dumps(told).encode(), clock.now())
            seen.append(current(table, ours).visible)

    replicate.faults = [held(clock, 3, tell, status=status, output="answer's")]
    started = submissions.start(wanted(), wait_seconds=10)
    assert seen == ["processing", "succeeded"]
    whole = table.read(started.id)
    assert whole is not None
    assert (whole.prediction.visible, whole.output) == ("succeeded", "webhook's")
    assert whole.prediction.orphans == frozenset()
    assert len(replicate.creates) == 1


@pytest.mark.parametrize("bound", [False, True], ids=["not bound yet", "bound by a webhook"])
def test_cancel_while_the_answer_is_held_reaches_replicate(
    submissions: Submissions,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    executed: Executed,
    clock: Clock,
    wakes: Wakes,
    bound: bool,
) -> None:
    other_function = make_submissions(table, replicate, executed, clock)

    def cancel(prediction: dict[str, Any]) -> None:
        ours = prediction["webhook"].rpartition("/")[2]
        if bound:
            receive(table, ours, json.dumps(prediction | {"status": "processing"}).encode(), clock.now())
        other_function.cancel(current(table, ours))

    replicate.faults = [held(clock, 3, cancel, status="processing")]
    started = submissions.start(wanted(), wait_seconds=10)
    assert replicate.canceled == list(replicate.predictions)
    assert current(table, started.id).visible == "canceled"


@pytest.mark.parametrize("error", [httpx.ReadTimeout, httpx.ReadError, httpx.RemoteProtocolError, 504])
def test_answer_that_was_lost_is_an_unknown_outcome_and_never_posted_again(
    submissions: Submissions,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    executed: Executed,
    clock: Clock,
    error: Any,
) -> None:
    def lose(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
        replicate.accept(request, webhook=json.loads(request.content)["webhook"])
        clock.advance(27)
        if isinstance(error, int):
            return httpx.Response(error, json={"detail": "gateway timeout"})
        raise error("lost")

    replicate.faults = [lose]
    started = submissions.start(wanted(), wait_seconds=24)
    assert (started.upstream_id, started.visible) == (None, "starting")
    # Its execution looks for it.
    assert executed.inputs == {f"{started.id}-2": {"id": started.id, "submit": True}}
    clock.advance(91)
    submissions.poll(started.id)
    submissions.submit(started.id)
    assert current(table, started.id).upstream_id in replicate.predictions
    assert len(replicate.creates) == 1


def test_version_is_posted_as_ever(submissions: Submissions, replicate: ReplicateInMemory) -> None:
    submissions.start(wanted(), wait_seconds=5)
    [created] = replicate.creates
    assert created.keys() == {"version", "input", "webhook", "webhook_events_filter"}
    assert created["version"] == VERSION
