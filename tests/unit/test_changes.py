"""What changes of the table call for: events on the bus, and answers to state machines that wait."""

import json
from typing import Any

import pytest
from predictions import aws
from predictions.changes import OUTPUT_LIMIT_BYTES, Changes
from predictions.deliveries import DeliveriesQueue
from predictions.events import FILES_LIMIT_BYTES, Event, EventBus, list_files
from predictions.outputs import OutputsBucket, StoredFile, find_files
from predictions.statuses import Status
from predictions.table import Prediction, PredictionsTable
from predictions.upstream_prediction import UpstreamPrediction

from tests.unit.fakes import Clock, Wakes, refusing
from tests.unit.test_deliveries import DUE, HOOK, stream, waiting
from tests.unit.test_table import FILE, put, told

STORED = [StoredFile(path="/0", index=0, key="alice/p/u/0", bytes=7, sha256="ab", content_type="image/png")]


class Bus:
    """What the bus was asked to take; `refused` of it, by detail-type, it does not."""

    def __init__(self) -> None:
        self.calls: list[list[dict[str, Any]]] = []
        self.refused: set[str] = set()
        self.error_code = "InternalFailure"
        events: Any = aws.client("events").meta.events
        self._answered: Any = self._put
        events.register_first("before-call.eventbridge.PutEvents", self._answered)

    @property
    def taken(self) -> list[tuple[str, dict[str, Any]]]:
        return [
            (entry["DetailType"], json.loads(entry["Detail"]))
            for entries in self.calls
            for entry in entries
            if entry["DetailType"] not in self.refused
        ]

    @property
    def types(self) -> list[str]:
        return [detail_type for detail_type, _ in self.taken]

    def _put(self, params: dict[str, Any], **_: Any) -> tuple[Any, dict[str, Any]]:
        entries = json.loads(params["body"])["Entries"]
        self.calls.append(entries)
        answers = [{"ErrorCode": self.error_code} if e["DetailType"] in self.refused else {"EventId": "1"}
                   for e in entries]  # fmt: skip
        failed = sum("ErrorCode" in each for each in answers)
        return type("Http", (), {"status_code": 200})(), {"Entries": answers, "FailedEntryCount": failed}


@pytest.fixture
def bus(cloud: None) -> Bus:
    return Bus()


@pytest.fixture
def changes(table: PredictionsTable, outputs: OutputsBucket, bus: Bus) -> Changes:
    return make(table, outputs)


def make(table: PredictionsTable, outputs: OutputsBucket, *, processing_events: bool = False) -> Changes:
    return Changes(
        table,
        outputs,
        DeliveriesQueue.from_env(),
        EventBus("bus", aws.client("events")),
        processing_events=processing_events,
    )


def run(table: PredictionsTable, clock: Clock, status: str, **more: Any) -> Prediction:
    """A prediction that ran and has ended without files."""
    prediction = put(table, clock)
    table.merge(prediction.id, told("processing"), clock.now())
    table.merge(prediction.id, told(status, **more), clock.now())
    return prediction


class TestEvents:
    @pytest.mark.parametrize(
        ("status", "word"), [("succeeded", "Succeeded"), ("failed", "Failed"), ("canceled", "Canceled"),
                             ("aborted", "Canceled")],
    )  # fmt: skip
    def test_start_and_end_are_told_once_each(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus, status: str, word: str
    ) -> None:
        prediction = run(table, clock, status)
        assert changes.publish(stream()) is None
        assert bus.types == ["Prediction Started", f"Prediction {word}"]
        assert [detail["event_id"] for _, detail in bus.taken] == [
            f"{prediction.id}-started",
            f"{prediction.id}-{word.lower()}",
        ]

    def test_what_nobody_sees_is_not_told(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus
    ) -> None:
        prediction = run(table, clock, "succeeded")
        table.merge(prediction.id, told("failed"), clock.now())
        table.merge(prediction.id, told("processing", upstream_id="v" * 26), clock.now())  # an orphan
        table.request_delete(prediction.id, clock.now())
        assert changes.publish(stream()) is None
        assert bus.types == ["Prediction Started", "Prediction Succeeded"]

    def test_end_with_files_is_told_when_they_are_stored_and_says_where(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus
    ) -> None:
        prediction = put(table, clock)
        ended = table.merge(prediction.id, told("succeeded", output=[FILE]), clock.now()).prediction
        assert ended is not None
        changes.publish(stream())
        assert bus.types == ["Prediction Started"]
        table.end_copy(ended, STORED, clock.now())
        changes.publish(stream()[-1:])
        assert bus.types[1:] == ["Prediction Succeeded"]
        detail = bus.taken[-1][1]
        assert detail["output_files"] == [
            {"path": "/0", "uri": "s3://outputs/alice/p/u/0", "bytes": 7, "content_type": "image/png"}
        ]
        assert detail["output_files_truncated"] is False

    def test_schema_is_as_documented_and_holds_no_input_output_or_webhook(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus
    ) -> None:
        prediction = put(table, clock, webhook=HOOK, input={"prompt": "CANARY-IN"})
        table.merge(
            prediction.id,
            told("failed", output="CANARY-OUT", logs="CANARY-LOG", error="out of paint", metrics={"predict_time": 1.5},
                 started_at="2025-06-15T15:06:41Z", completed_at="2025-06-15T15:06:44Z", model="a/b"),
            clock.now(),
        )  # fmt: skip
        changes.publish(stream())
        assert bus.taken[-1] == (
            "Prediction Failed",
            {
                "version": "1",
                "event_id": f"{prediction.id}-failed",
                "id": prediction.id,
                "object": "prediction",
                "owner": "alice",
                "status": "failed",
                "source": "http",
                "origin": {},
                "depth": 0,
                "model": "a/b",
                "deployment": None,
                "model_version": prediction.version,
                "destination": None,
                "upstream_id": "u" * 26,
                "created_at": prediction.created_at,
                "started_at": "2025-06-15T15:06:41Z",
                "completed_at": "2025-06-15T15:06:44Z",
                "error": "out of paint",
                "metrics": {"predict_time": 1.5},
                "output_files": [],
                "output_files_truncated": False,
            },
        )
        text = json.dumps(bus.calls)
        for hidden in ("CANARY", HOOK, "hooks.example.com"):
            assert hidden not in text
        ((first, *_), *_) = bus.calls
        assert (first["EventBusName"], first["Source"], first["Time"]) == ("bus", "replicate-serverless", DUE + 0.5)

    def test_same_record_twice_is_the_same_event(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus
    ) -> None:
        run(table, clock, "succeeded")
        for _ in range(2):
            changes.publish(stream())
        first, second = bus.calls
        assert first == second

    def test_run_is_told_only_where_that_is_asked_for(
        self, table: PredictionsTable, outputs: OutputsBucket, clock: Clock, bus: Bus
    ) -> None:
        prediction = put(table, clock, webhook=HOOK)
        table.merge(prediction.id, told("processing"), clock.now())
        table.merge(prediction.id, told("succeeded", output=[FILE]), clock.now())
        make(table, outputs).publish(stream())
        make(table, outputs, processing_events=True).publish(stream())
        assert bus.types == ["Prediction Started", "Prediction Started", "Prediction Processing"]

    def test_end_with_files_of_what_was_not_seen_to_run_is_no_news_of_a_run(
        self, table: PredictionsTable, outputs: OutputsBucket, clock: Clock, bus: Bus
    ) -> None:
        prediction = put(table, clock)
        table.merge(prediction.id, told("succeeded", output=[FILE]), clock.now())
        make(table, outputs, processing_events=True).publish(stream())
        assert bus.types == ["Prediction Started"]

    def test_many_files_are_found_in_their_item_and_listed_as_far_as_they_fit(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus
    ) -> None:
        prediction = put(table, clock)
        ended = table.merge(prediction.id, told("succeeded", output=[FILE]), clock.now()).prediction
        assert ended is not None
        files = [StoredFile(path=f"/{n}", index=n, key=f"alice/p/u/{n}", bytes=n) for n in range(5000)]
        table.end_copy(ended, files, clock.now())
        changes.publish(stream())
        detail = bus.taken[-1][1]
        assert len(json.dumps(detail)) < FILES_LIMIT_BYTES + 8192
        assert 1000 < len(detail["output_files"]) < 5000
        assert detail["output_files_truncated"] is True
        whole = table.read(prediction.id)
        assert whole is not None
        assert len(whole.files) == 5000

    def test_file_that_was_not_stored_is_listed_with_its_reason(self) -> None:
        listed, _ = list_files([StoredFile(path="", index=0, error="it is gone")], "outputs", 1000)
        assert listed == [{"path": "", "error": "it is gone"}]


class TestBus:
    def test_events_go_in_as_few_calls_as_the_bus_allows(self, bus: Bus) -> None:
        events = [Event("E", {"n": n}, DUE) for n in range(25)]
        assert EventBus("bus", aws.client("events")).put(events) is None
        assert [len(entries) for entries in bus.calls] == [10, 10, 5]

    @pytest.mark.parametrize("text", ["x" * 100_000, "é" * 50_000])
    def test_calls_are_within_the_size_that_the_bus_takes(self, bus: Bus, text: str) -> None:
        events = [Event("E", {"text": text}, DUE) for _ in range(5)]
        assert EventBus("bus", aws.client("events")).put(events) is None
        assert [len(entries) for entries in bus.calls] == [2, 2, 1]
        for entries in bus.calls:
            assert sum(len(entry["Detail"].encode()) for entry in entries) < 256 * 1024

    def test_nothing_is_called_for_nothing(self, bus: Bus) -> None:
        assert EventBus("bus", aws.client("events")).put([]) is None
        assert bus.calls == []


class TestFailures:
    def test_event_that_the_bus_does_not_take_is_read_again_from_there_on(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus
    ) -> None:
        run(table, clock, "failed")
        run(table, clock, "succeeded", upstream_id="w" * 26)
        bus.refused = {"Prediction Failed"}
        records = stream()
        failed = changes.publish(records)
        (of_it,) = [
            record["dynamodb"]["SequenceNumber"]
            for record in records
            if record["dynamodb"]["NewImage"].get("visible") == {"S": "failed"}
        ]
        assert failed == of_it

    def test_event_that_the_bus_never_takes_holds_up_no_other(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus
    ) -> None:
        run(table, clock, "failed")
        run(table, clock, "succeeded")
        bus.refused, bus.error_code = {"Prediction Failed"}, "MalformedDetail"
        assert changes.publish(stream()) is None
        assert "Prediction Succeeded" in bus.types

    def test_bus_that_cannot_be_reached_fails_the_first_event_and_delays_no_webhook(
        self, table: PredictionsTable, outputs: OutputsBucket, clock: Clock
    ) -> None:
        prediction = put(table, clock, webhook=HOOK)
        table.end(prediction, Status.FAILED, "no", clock.now())
        records = stream()
        with refusing("PutEvents", "ThrottlingException", service="events"):
            failed = make(table, outputs).publish(records)
        (inserted,) = [
            record["dynamodb"]["SequenceNumber"]
            for record in records
            if record["eventName"] == "INSERT" and record["dynamodb"]["Keys"]["sk"] == {"S": "status"}
        ]
        assert failed == inserted
        assert [message["event"] for message in waiting("deliveries")] == ["completed"]

    def test_half_a_surrogate_pair_in_what_a_model_returned_holds_up_no_record(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus
    ) -> None:
        prediction = put(table, clock)
        body = b'{"id": "%s", "status": "succeeded", "output": {"\\ud800": "%s"}, "metrics": {"\\ud800": 1}}'
        end = UpstreamPrediction.read(body % (b"u" * 26, FILE.encode()))
        ended = table.merge(prediction.id, end, clock.now()).prediction
        assert ended is not None
        (file,) = find_files(end.output, lambda _: True)
        table.end_copy(ended, [StoredFile(path=file.path, index=0, key="alice/p/u/0", bytes=7)], clock.now())
        assert changes.publish(stream()) is None
        assert bus.types == ["Prediction Started", "Prediction Succeeded"]

    def test_events_before_a_record_that_failed_are_put(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus, wakes: Wakes
    ) -> None:
        prediction = run(table, clock, "succeeded")
        records = stream()
        with refusing("Query", "ThrottlingException", service="dynamodb"):
            assert changes.publish(records) == records[-1]["dynamodb"]["SequenceNumber"]
        assert bus.types == ["Prediction Started"]
        table.add_caller(prediction.id, "token", 1)
        assert changes.publish(records[-1:]) is None
        assert bus.types == ["Prediction Started", "Prediction Succeeded"]


class TestCallers:
    @pytest.fixture
    def news(self, changes: Changes, wakes: Wakes) -> Any:
        return lambda: (changes.publish(stream()), wakes.told)[1]

    def test_state_is_told_the_end_with_files_in_their_places(
        self, news: Any, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = put(table, clock)
        table.add_caller(prediction.id, "token", 1)
        ended = table.merge(prediction.id, told("succeeded", output={"a": [FILE], "b": 1}), clock.now()).prediction
        assert ended is not None
        assert news() == [], "not before its files are stored"
        file = StoredFile(path="/a/0", index=0, key="alice/p/u/0", bytes=7, content_type="image/png")
        table.end_copy(ended, [file], clock.now())
        uri = "s3://outputs/alice/p/u/0"
        result = {
            "id": prediction.id,
            "status": "succeeded",
            "error": None,
            "output_files": [{"path": "/a/0", "uri": uri, "bytes": 7, "content_type": "image/png"}],
            "output_files_truncated": False,
            "output": {"a": [uri], "b": 1},
        }
        # By the record of its coming, which is read again here, and by that of the end: the second finds nobody.
        assert news() == [("token", result)] * 2

    @pytest.mark.parametrize(
        ("status", "error"), [("failed", "PredictionFailed"), ("canceled", "PredictionCanceled"),
                              ("aborted", "PredictionCanceled")],
    )  # fmt: skip
    def test_other_ends_fail_the_state(
        self, news: Any, table: PredictionsTable, clock: Clock, status: str, error: str
    ) -> None:
        prediction = put(table, clock)
        table.add_caller(prediction.id, "token", 1)
        table.merge(prediction.id, told(status, error="ee" + "\x01é" * 2000, output="x"), clock.now())
        for token, (name, cause) in news():
            assert (token, name) == ("token", error)
            said = json.loads(cause)
            assert (said["id"], said["error"][:2]) == (prediction.id, "ee")
            assert "output" not in said
            assert len(cause) <= 32768

    def test_every_state_that_waits_is_told_and_stale_ones_are_no_error(
        self, news: Any, table: PredictionsTable, clock: Clock, wakes: Wakes
    ) -> None:
        prediction = put(table, clock)
        for token in ("one", "two", "three"):
            table.add_caller(prediction.id, token, 1)
        wakes.stale = {"one"}
        table.merge(prediction.id, told("succeeded", output="x"), clock.now())
        assert {token for token, _ in news()} == {"one", "two", "three"}

    @pytest.mark.parametrize("code", ["AccessDeniedException", "InvalidToken", "ValidationException"])
    def test_strange_token_holds_up_nothing(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus, code: str
    ) -> None:
        prediction = run(table, clock, "succeeded", output="x")
        table.add_caller(prediction.id, "not one of ours", 1)
        with refusing("SendTaskSuccess", code):
            assert changes.publish(stream()) is None
        with refusing("SendTaskSuccess", "ThrottlingException"):
            assert changes.publish(stream()) is not None

    def test_output_that_step_functions_do_not_take_is_left_out_and_that_is_said(
        self, changes: Changes, table: PredictionsTable, clock: Clock, wakes: Wakes
    ) -> None:
        prediction = run(table, clock, "succeeded", output="deeper than they read")
        table.add_caller(prediction.id, "token", 1)
        with refusing("SendTaskSuccess", "InvalidOutput", lambda body: "deeper" in body["output"]):
            assert changes.publish(stream()) is None
        assert {token for token, _ in wakes.told} == {"token"}
        for _, result in wakes.told:
            assert ("output" in result, result["output_truncated"], result["status"]) == (False, True, "succeeded")

    def test_state_that_comes_after_the_end_is_told_at_once(
        self, changes: Changes, table: PredictionsTable, clock: Clock, wakes: Wakes
    ) -> None:
        prediction = run(table, clock, "succeeded", output="x")
        changes.publish(stream())
        assert wakes.told == []
        table.add_caller(prediction.id, "token", 1)
        changes.publish(stream()[-1:])
        assert [(token, result["output"]) for token, result in wakes.told] == [("token", "x")]

    def test_state_whose_prediction_runs_is_told_nothing_yet(
        self, news: Any, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = put(table, clock)
        table.add_caller(prediction.id, "token", 1)
        table.merge(prediction.id, told("processing"), clock.now())
        assert news() == []

    @pytest.mark.parametrize(("length", "truncated"), [(OUTPUT_LIMIT_BYTES - 2, False), (OUTPUT_LIMIT_BYTES - 1, True),
                                                       (300_000, True)])  # fmt: skip
    def test_long_output_is_left_out_and_that_is_said(
        self, news: Any, table: PredictionsTable, clock: Clock, length: int, truncated: bool
    ) -> None:
        prediction = put(table, clock)
        table.add_caller(prediction.id, "token", 1)
        table.merge(prediction.id, told("succeeded", output="x" * length), clock.now())
        for _, result in news():
            assert ("output" in result, result.get("output_truncated", False)) == (not truncated, truncated)

    def test_short_output_of_long_logs_is_told(self, news: Any, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock)
        table.add_caller(prediction.id, "token", 1)
        table.merge(prediction.id, told("succeeded", output="short", logs="l" * 300_000), clock.now())
        assert {result["output"] for _, result in news()} == {"short"}

    def test_many_files_leave_room_for_the_rest(self, news: Any, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock)
        table.add_caller(prediction.id, "token", 1)
        ended = table.merge(prediction.id, told("failed", output=[FILE]), clock.now()).prediction
        assert ended is not None
        files = [StoredFile(path=f"/{n}", index=n, error="gone\x01é" * 50) for n in range(1000)]
        table.end_copy(ended, files, clock.now())
        for _, (_, cause) in news():
            assert json.loads(cause)["output_files_truncated"] is True
            assert len(cause) <= 32768

    def test_deleted_prediction_tells_no_output(
        self, changes: Changes, table: PredictionsTable, clock: Clock, wakes: Wakes
    ) -> None:
        prediction = run(table, clock, "succeeded", output="CANARY")
        table.request_delete(prediction.id, clock.now())
        table.add_caller(prediction.id, "token", 1)
        changes.publish(stream()[-1:])
        assert "CANARY" not in json.dumps(wakes.told)
        assert wakes.told[0][1]["output"] is None

    def test_prediction_without_callers_tells_nobody(self, news: Any, table: PredictionsTable, clock: Clock) -> None:
        run(table, clock, "succeeded")
        assert news() == []
