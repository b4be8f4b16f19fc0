"""Live reads: a caller who looks at a running prediction sees what Replicate shows, within bounds."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError
from predictions.admission.live_budget import FAILURES, PAUSE_SECONDS, LiveBudget
from predictions.aws import clients
from predictions.aws.dynamodb import Table
from predictions.files.outputs_bucket import OutputsBucket
from predictions.lifecycle import live_reads
from predictions.lifecycle.live_reads import LiveReads
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction, PredictionDetail
from predictions.upstream.client import Replicate
from predictions.upstream.credentials import Token
from predictions.views.prediction import Presenter

from tests.reliability import Recorded
from tests.support.apps import AwsCalls
from tests.support.fakes import Clock, ReplicateInMemory, Wakes
from tests.support.predictions import FILE, current, hold_token, put, raw_items, told, waiting

UP = "u" * 26
Live = Callable[..., LiveReads]


@pytest.fixture
def live(table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock) -> Live:
    """The live reads of one more function."""

    def make(*, period: int = 1, per_minute: int = 600, http: httpx.Client | None = None) -> LiveReads:
        upstream = Replicate(ReplicateInMemory.URL, Token("replicate-token"), http or replicate.client())
        budget = LiveBudget(Table("predictions", clients.client("dynamodb")), per_minute, now=clock.now)
        return LiveReads(table, lambda: upstream, budget, period=period, now=clock.now)

    return make


@pytest.fixture
def running(table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock) -> Prediction:
    """A prediction that runs, here and at Replicate."""
    prediction = put(table, clock)
    table.merge(prediction.id, told("processing", UP), clock.now())
    shows(replicate, status="processing", logs="")
    return current(table, prediction.id)


def shows(replicate: ReplicateInMemory, **what: Any) -> None:
    replicate.predictions[UP] = {"id": UP, **replicate.predictions.get(UP, {}), **what}


def seen(live: LiveReads, table: PredictionsTable, prediction: Prediction) -> PredictionDetail:
    """What a GET reads."""
    detail = table.read(prediction.id)
    assert detail is not None
    return live.refresh(detail)


def reads(replicate: ReplicateInMemory) -> int:
    return sum(request.method == "GET" for request in replicate.asked)


# -- what a caller sees ---------------------------------------------------------------------------------------------


def test_logs_and_output_grow_while_a_caller_looks(
    live: Live, table: PredictionsTable, running: Prediction, replicate: ReplicateInMemory, clock: Clock
) -> None:
    reader, pieces = live(), []
    for n in range(1, 5):
        shows(replicate, output=["token "] * n, logs=f"{n * 25}%")
        detail = seen(reader, table, running)
        pieces.append((detail.prediction.visible, len(detail.output), detail.logs))
        clock.advance(1)
    assert pieces == [("processing", n, f"{n * 25}%") for n in range(1, 5)]


def test_starting_becomes_processing(
    live: Live, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
) -> None:
    prediction = put(table, clock)
    table.merge(prediction.id, told("starting", UP), clock.now())
    shows(replicate, status="processing", started_at="2025-06-15T15:06:41Z")
    after = seen(live(), table, prediction).prediction
    assert (after.visible, after.started_at) == ("processing", "2025-06-15T15:06:41Z")


def test_end_that_a_read_sees_is_merged_counted_and_wakes(
    live: Live, table: PredictionsTable, running: Prediction, replicate: ReplicateInMemory, wakes: Wakes
) -> None:
    hold_token(table, running.id, "token")
    shows(replicate, status="succeeded", output="done", logs="all of it")
    detail = seen(live(), table, running)
    assert (detail.prediction.visible, detail.output, detail.logs) == ("succeeded", "done", "all of it")
    assert wakes.tokens == ["token"]


def test_end_with_files_is_left_to_the_copier(
    live: Live, table: PredictionsTable, running: Prediction, replicate: ReplicateInMemory, wakes: Wakes
) -> None:
    hold_token(table, running.id, "token")
    shows(replicate, status="succeeded", output=[FILE])
    detail = seen(live(), table, running)
    assert (detail.prediction.visible, detail.prediction.awaits_copy, detail.files) == ("processing", True, [])
    assert (wakes.tokens, wakes.copies) == ([], ["token"])
    assert [request.url.host for request in replicate.asked if request.url.host != "api.replicate.com"] == []


@pytest.mark.parametrize(
    "output",
    [FILE, [FILE], ["a text first", FILE], ["text", {"image": FILE}], {"text": "x", "files": ["x", FILE]},
     ["text", "data:image/png;base64,AAAA"]],
)  # fmt: skip
def test_no_url_of_replicate_is_shown_while_it_runs(
    live: Live, table: PredictionsTable, outputs: OutputsBucket, running: Prediction, replicate: ReplicateInMemory,
    clock: Clock, output: Any,
) -> None:  # fmt: skip
    reader, presenter = live(), Presenter(outputs, 60)
    if isinstance(output, list) and not str(output[0]).startswith("http"):
        shows(replicate, output=output[:1], logs="1")
        assert seen(reader, table, running).output == output[:1]
        clock.advance(1)
    shows(replicate, output=output, logs="12")
    detail = seen(reader, table, running)
    text = json.dumps(presenter.show(detail))
    assert "replicate.delivery" not in text
    assert "base64" not in text
    assert json.dumps(raw_items(running.id)).count("replicate.delivery") == 0


def test_training_is_read_among_the_trainings(
    live: Live, table: PredictionsTable, running: Prediction, replicate: ReplicateInMemory
) -> None:
    detail = table.read(running.id)
    assert detail is not None
    live().refresh(_with(detail, object="training"))
    assert replicate.asked[-1].url.path == f"/v1/trainings/{UP}"


# -- when nothing is asked -------------------------------------------------------------------------------------------


def test_one_read_per_period_however_many_look(
    live: Live, table: PredictionsTable, running: Prediction, replicate: ReplicateInMemory, clock: Clock
) -> None:
    readers = [live() for _ in range(4)]
    for second in range(1, 4):
        for _ in range(3):
            for reader in readers:
                seen(reader, table, running)
        assert reads(replicate) == second
        clock.advance(1)


def test_readers_that_come_at_once_ask_once(
    live: Live, table: PredictionsTable, running: Prediction, replicate: ReplicateInMemory
) -> None:
    details = [table.read(running.id) for _ in range(5)]
    for reader, detail in zip([live() for _ in details], details, strict=True):
        assert detail is not None
        reader.refresh(detail)
    assert reads(replicate) == 1


def test_old_prediction_is_read_thirty_times_in_its_life(
    live: Live, table: PredictionsTable, running: Prediction, replicate: ReplicateInMemory, clock: Clock
) -> None:
    clock.advance(599)
    reader = live()
    seen(reader, table, running)
    clock.advance(19)
    seen(reader, table, running)
    assert reads(replicate) == 1
    clock.advance(2)
    seen(reader, table, running)
    assert reads(replicate) == 2


def test_nothing_is_asked_about_one_that_is_unbound_ended_or_deleted(
    live: Live, table: PredictionsTable, running: Prediction, replicate: ReplicateInMemory, clock: Clock
) -> None:
    unbound = waiting(table, clock)
    table.merge(running.id, told("succeeded", UP, output="x"), clock.now())
    reader = live()
    seen(reader, table, unbound)
    seen(reader, table, running)
    table.request_delete(running.id, clock.now())
    seen(reader, table, running)
    assert (reads(replicate), raw_items(running.id).keys() & {"live"}) == (0, set())


def test_nothing_is_asked_where_live_reads_are_off(
    live: Live, table: PredictionsTable, running: Prediction, replicate: ReplicateInMemory
) -> None:
    seen(live(period=0), table, running)
    assert reads(replicate) == 0


def test_stack_asks_no_more_than_its_budget(
    live: Live, table: PredictionsTable, running: Prediction, replicate: ReplicateInMemory, clock: Clock
) -> None:
    clock.moment = running.created // 60 * 60 + 60
    reader = live(per_minute=3)
    for _ in range(30):
        seen(reader, table, running)
        clock.advance(1)
    assert reads(replicate) == 3


def test_read_without_news_writes_only_that_it_began(
    live: Live, table: PredictionsTable, running: Prediction, replicate: ReplicateInMemory, clock: Clock
) -> None:
    reader = live()
    shows(replicate, output=["a"], logs="1")
    for _ in range(3):
        seen(reader, table, running)
        clock.advance(1)
    calls = AwsCalls()
    seen(reader, table, running)
    # The second is the budget's lease, which most reads do not need.
    assert calls.made == ["dynamodb.Query", "dynamodb.UpdateItem"] + ["dynamodb.UpdateItem"] * (len(calls.made) - 2)
    assert len(calls.made) <= 3


# -- Replicate fails -------------------------------------------------------------------------------------------------


def fail(status: int) -> Callable[..., httpx.Response]:
    return lambda request, of: httpx.Response(status, json={"detail": "no"})


@pytest.mark.parametrize(
    "answer",
    [
        *[httpx.Response(status, json={"detail": "no"}) for status in (301, 401, 404, 410, 429, 500, 503)],
        httpx.Response(200, content=b"<html>"),
        httpx.Response(200, content=b"[" * 100_000),
        httpx.Response(200, json={"id": "other" * 5, "status": "succeeded", "output": "not mine"}),
        httpx.Response(200, json={"id": UP, "status": "a new word", "output": "x"}),
        httpx.Response(200, json={"id": UP, "status": "processing", "output": "x" * 1024**2}),
    ],
    ids=lambda answer: f"{answer.status_code} {answer.content[:20]!r}",
)
def test_odd_answer_changes_nothing_and_the_caller_sees_the_table(
    live: Live, table: PredictionsTable, running: Prediction, replicate: ReplicateInMemory, answer: httpx.Response
) -> None:
    replicate.read_faults.append(lambda request, of: answer)
    before = raw_items(running.id)
    detail = seen(live(), table, running)
    assert (detail.prediction, detail.output) == (running, None)
    after = raw_items(running.id)
    assert {sk: item for sk, item in after.items() if sk != "live"} == before


def test_three_failures_in_a_row_stop_reads_for_30_seconds(
    live: Live, table: PredictionsTable, running: Prediction, replicate: ReplicateInMemory, clock: Clock
) -> None:
    replicate.read_faults += [fail(503)] * FAILURES
    reader, other = live(), live()
    for _ in range(FAILURES + 5):
        seen(reader, table, running)
        seen(other, table, running)
        clock.advance(1)
    assert reads(replicate) == FAILURES
    clock.advance(PAUSE_SECONDS)
    shows(replicate, logs="back")
    assert seen(other, table, running).logs == "back"


def test_429_to_a_read_stops_reads_and_no_create(
    live: Live, table: PredictionsTable, running: Prediction, replicate: ReplicateInMemory, clock: Clock
) -> None:
    replicate.read_faults.append(fail(429))
    reader = live()
    for _ in range(5):
        seen(reader, table, running)
        clock.advance(1)
    assert reads(replicate) == 1
    items = clients.client("dynamodb").scan(TableName="predictions")["Items"]
    assert [item for item in items if item["pk"]["S"] == "limiter"] == []


@pytest.mark.parametrize("hangs", ["before its answer", "in its answer", "in one byte after the other"])
def test_caller_waits_for_a_hanging_replicate_no_longer_than_the_bound(
    live: Live, table: PredictionsTable, running: Prediction, monkeypatch: pytest.MonkeyPatch, hangs: str
) -> None:
    monkeypatch.setattr(live_reads, "READ_SECONDS", 0.2)
    over = threading.Event()

    class Slow(httpx.SyncByteStream):
        def __iter__(self) -> Any:
            while not over.is_set():
                yield b" "
                over.wait(0.01 if hangs.endswith("other") else 10)

    def answer(request: httpx.Request) -> httpx.Response:
        if hangs == "before its answer":
            over.wait(10)
        return httpx.Response(200, stream=Slow())

    reader = live(http=httpx.Client(transport=httpx.MockTransport(answer)))
    began = time.monotonic()
    try:
        assert seen(reader, table, running).prediction == running
        assert 0.15 < time.monotonic() - began < 2
    finally:
        over.set()


@pytest.mark.slow
@pytest.mark.parametrize("predictions", [1, 200])
def test_two_hundred_readers_wait_less_than_two_seconds_while_replicate_hangs(
    live: Live, table: PredictionsTable, clock: Clock, predictions: int, record_property: Recorded
) -> None:
    over = threading.Event()

    def hang(request: httpx.Request) -> httpx.Response:
        over.wait(30)
        return httpx.Response(503)

    started = [put(table, clock) for _ in range(predictions)]
    for number, prediction in enumerate(started):
        table.merge(prediction.id, told("processing", f"{number:03d}" + "u" * 23), clock.now())
    details = [table.read(prediction.id) for prediction in started]
    http = httpx.Client(transport=httpx.MockTransport(hang))
    took: list[float] = []

    def look(reader: LiveReads, number: int) -> None:
        for _ in range(4):
            began = time.monotonic()
            detail = details[number % predictions]
            assert detail is not None
            assert reader.refresh(detail) == detail
            took.append(time.monotonic() - began)

    threads = [threading.Thread(target=look, args=(live(http=http), number)) for number in range(200)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        over.set()
    assert len(took) == 800
    slow = sum(seconds > 1 for seconds in took)
    record_property("milliseconds at p95", round(1000 * sorted(took)[int(0.95 * len(took))]))
    assert sorted(took)[int(0.95 * len(took))] < 2
    assert slow <= (1 if predictions == 1 else 200 + FAILURES)


def test_caller_gets_an_answer_where_the_tables_writes_fail(
    live: Live, table: PredictionsTable, running: Prediction, replicate: ReplicateInMemory
) -> None:
    detail = table.read(running.id)
    assert detail is not None
    calls = AwsCalls()
    calls.fail(ClientError({"Error": {"Code": "ThrottlingException"}}, "UpdateItem"))
    assert live().refresh(detail) == detail
    calls.fail(None)
    assert reads(replicate) == 0


def test_read_that_is_overtaken_by_the_end_and_a_deletion_brings_nothing_back(
    live: Live, table: PredictionsTable, outputs: OutputsBucket, running: Prediction, replicate: ReplicateInMemory,
    clock: Clock,
) -> None:  # fmt: skip
    def meanwhile(request: httpx.Request, of: ReplicateInMemory) -> httpx.Response:
        table.merge(running.id, told("succeeded", UP, output="secret", logs="secret"), clock.now())
        deleted = table.request_delete(running.id, clock.now())
        assert deleted is not None
        table.delete_data(deleted, clock.now())
        return httpx.Response(200, json={"id": UP, "status": "processing", "output": "secret", "logs": "secret " * 9})

    replicate.read_faults.append(meanwhile)
    detail = seen(live(), table, running)
    assert (detail.output, detail.logs, detail.input) == (None, None, {})
    clock.advance(2000)
    table.delete_data(current(table, running.id), clock.now())
    assert "secret" not in json.dumps(raw_items(running.id))
    assert "secret" not in json.dumps(Presenter(outputs, 60).show(seen(live(), table, running)))


def _with(detail: PredictionDetail, **changes: Any) -> PredictionDetail:
    from dataclasses import replace

    return replace(detail, prediction=replace(detail.prediction, **changes))
