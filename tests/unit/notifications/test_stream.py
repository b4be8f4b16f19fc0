"""What changes of the table call for: events on the bus, and answers to state machines that wait."""

import json
from typing import Any

import pytest
from predictions.aws import clients
from predictions.files.output_references import StoredFile, find_files
from predictions.files.outputs_bucket import OutputsBucket
from predictions.notifications.event_bus import FILES_LIMIT_BYTES, Event, EventBus, list_files
from predictions.notifications.stream import OUTPUT_LIMIT_BYTES, PARSED_LIMIT_CHARACTERS, Changes
from predictions.status import Status
from predictions.store.callers import WaitingCallers
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction
from predictions.upstream.prediction import UpstreamPrediction

from tests.support.apps import AwsCalls
from tests.support.fakes import Clock, Queued, Wakes, refusing
from tests.support.predictions import FILE, put, told
from tests.support.stream import Bus, make
from tests.support.webhook_queue import DUE, HOOK, stream, waiting

STORED = [StoredFile(path="/0", index=0, key="alice/p/u/0", bytes=7, sha256="ab", content_type="image/png")]


@pytest.fixture
def bus(cloud: None) -> Bus:
    return Bus()


@pytest.fixture
def changes(table: PredictionsTable, outputs: OutputsBucket, bus: Bus) -> Changes:
    return make(table, outputs)


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
                "upstream_status": "failed",
                "created_at": prediction.created_at,
                "started_at": "2025-06-15T15:06:41Z",
                "completed_at": "2025-06-15T15:06:44Z",
                "error": "out of paint",
                "metrics": {"predict_time": 1.5},
                "cost": {"micro_dollars": None, "reason": "No price of a/b is known.", "price": None},
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
        assert EventBus("bus", clients.client("events")).put(events) == []
        assert [len(entries) for entries in bus.calls] == [10, 10, 5]

    @pytest.mark.parametrize("text", ["x" * 100_000, "é" * 50_000])
    def test_calls_are_within_the_size_that_the_bus_takes(self, bus: Bus, text: str) -> None:
        events = [Event("E", {"text": text}, DUE) for _ in range(5)]
        assert EventBus("bus", clients.client("events")).put(events) == []
        assert [len(entries) for entries in bus.calls] == [2, 2, 1]
        for entries in bus.calls:
            assert sum(len(entry["Detail"].encode()) for entry in entries) < 256 * 1024

    def test_nothing_is_called_for_nothing(self, bus: Bus) -> None:
        assert EventBus("bus", clients.client("events")).put([]) == []
        assert bus.calls == []


def publish_as_lambda(changes: Changes, records: list[dict[str, Any]], tries: int = 100) -> int:
    """Reads the stream as Lambda does, from the record on that failed; how often in all."""
    for n in range(1, tries + 1):
        failed = changes.publish(records)
        if failed is None:
            return n
        numbers = [record["dynamodb"]["SequenceNumber"] for record in records]
        records = records[numbers.index(failed) :]
    return tries


class TestFailures:
    @pytest.fixture
    def retries(self, cloud: None) -> Queued:
        return Queued("changes-retry")

    @pytest.fixture
    def given_up(self, cloud: None) -> Queued:
        return Queued("dead-changes")

    @pytest.fixture
    def changes(self, table: PredictionsTable, outputs: OutputsBucket, bus: Bus, clock: Clock) -> Changes:
        return make(table, outputs, now=clock.now, jitter=lambda: 0.5)

    def test_event_that_the_bus_does_not_take_is_put_again_later_alone(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus, retries: Queued
    ) -> None:
        run(table, clock, "failed")
        run(table, clock, "succeeded")
        bus.refused = {"Prediction Failed"}
        assert changes.publish(stream()) is None
        assert bus.types == ["Prediction Started", "Prediction Started", "Prediction Succeeded"]
        ((refused,),) = [[e for e in entries if e["DetailType"] == "Prediction Failed"] for entries in bus.calls]
        assert retries.delays == [5]
        bus.calls.clear()
        bus.refused = set()
        assert changes.retry(retries.take()) == []
        assert bus.calls == [[refused]], "the same event, under the same event_id"
        assert retries.bodies == []

    @pytest.mark.slow
    def test_bus_that_refuses_a_hundred_times_repeats_no_webhook_and_loses_no_event(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus, retries: Queued, given_up: Queued
    ) -> None:
        webhooks = Queued("deliveries")
        for n in range(5):
            prediction = put(table, clock, webhook=HOOK)
            table.merge(prediction.id, told("succeeded", upstream_id=f"{n}" * 26, output="x"), clock.now())
        bus.call_refused_with = "AccessDeniedException"
        assert publish_as_lambda(changes, stream()) == 1, "the stream goes on"
        for _ in range(100):
            clock.advance(600)
            assert changes.retry(retries.take()) == []
        bus.call_refused_with = ""
        assert len(webhooks.bodies) == 5
        assert max(retries.delays) == 900
        assert bus.types == []
        assert changes.retry(retries.take()) == []
        assert sorted(bus.types) == ["Prediction Started"] * 5 + ["Prediction Succeeded"] * 5
        assert (retries.bodies, given_up.bodies) == ([], [])

    @pytest.mark.slow
    def test_step_functions_that_refuse_a_hundred_times_repeat_no_webhook_and_no_event(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus, retries: Queued, wakes: Wakes
    ) -> None:
        webhooks = Queued("deliveries")
        prediction = put(table, clock, webhook=HOOK)
        WaitingCallers.from_env().add_caller(prediction.id, "token", 1)
        table.merge(prediction.id, told("succeeded", output="x"), clock.now())
        with refusing("SendTaskSuccess", "AccessDeniedException"):
            assert publish_as_lambda(changes, stream()) == 1
            for _ in range(100):
                clock.advance(600)
                assert changes.retry(retries.take()) == []
        assert wakes.told == []
        assert changes.retry(retries.take()) == []
        assert {token for token, _ in wakes.told} == {"token"}
        assert (len(webhooks.bodies), bus.types) == (1, ["Prediction Started", "Prediction Succeeded"])

    def test_record_that_nobody_foresaw_holds_up_nothing_and_is_kept_after_a_day(
        self,
        changes: Changes,
        table: PredictionsTable,
        clock: Clock,
        bus: Bus,
        retries: Queued,
        given_up: Queued,
        wakes: Wakes,
    ) -> None:
        prediction = put(table, clock, webhook=HOOK)
        WaitingCallers.from_env().add_caller(prediction.id, "token", 1)
        table.merge(prediction.id, told("succeeded", output="x"), clock.now())
        run(table, clock, "failed")
        records = stream()
        (damaged,) = [r for r in records if r["dynamodb"]["NewImage"].get("visible") == {"S": "succeeded"}]
        damaged["dynamodb"]["NewImage"]["metrics_json"] = {"S": "{"}
        assert publish_as_lambda(changes, records) == 1
        assert bus.types == ["Prediction Started", "Prediction Started", "Prediction Failed"]
        assert [message["event"] for message in waiting("deliveries")] == ["completed"], "its other effects are had"
        assert {token for token, _ in wakes.told} == {"token"}
        assert len(retries.bodies) == 1
        clock.advance(24 * 3600 - 1)
        assert changes.retry(retries.take()) == []
        assert (len(retries.bodies), given_up.bodies) == (1, [])
        clock.advance(1)
        assert changes.retry(retries.take()) == []
        (letter,) = map(json.loads, given_up.bodies)
        assert (letter["effect"], letter["reason"]) == ("event", "failed for a day. See the log of publish_changes.")
        assert letter["record"]["dynamodb"]["Keys"] == damaged["dynamodb"]["Keys"]
        assert retries.bodies == []

    @pytest.mark.parametrize("code", ["AccessDenied", "AWS.SimpleQueueService.NonExistentQueue"])
    def test_stream_is_read_again_only_where_the_queue_of_retries_is_not_reached_either(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus, code: str
    ) -> None:
        run(table, clock, "succeeded")
        records = stream()
        bus.refused = {"Prediction Succeeded"}
        with refusing("SendMessage", code, service="sqs"):
            assert changes.publish(records) == records[-1]["dynamodb"]["SequenceNumber"]
        assert bus.types == ["Prediction Started"]

    @pytest.mark.parametrize("put_again", [True, False])
    def test_retry_that_cannot_be_queued_again_stays_in_the_queue(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus, retries: Queued, put_again: bool
    ) -> None:
        run(table, clock, "succeeded")
        bus.refused = {"Prediction Succeeded"}
        changes.publish(stream())
        (message,) = retries.take()
        clock.advance(0 if put_again else 24 * 3600)
        with refusing("SendMessage", "AccessDenied", service="sqs"):
            assert changes.retry([message]) == [message["messageId"]]

    def test_message_that_is_no_retry_costs_the_others_of_its_batch_nothing(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus, retries: Queued
    ) -> None:
        run(table, clock, "succeeded")
        bus.refused = {"Prediction Succeeded"}
        changes.publish(stream())
        strange = [{"messageId": f"s{n}", "body": body} for n, body in enumerate(("", "[]", '{"effect": "x"}'))]
        bus.refused = set()
        bus.calls.clear()
        assert changes.retry([*strange, *retries.take()]) == ["s0", "s1", "s2"]
        assert bus.types == ["Prediction Succeeded"]

    def test_retry_holds_no_token_no_payload_and_no_address_of_a_receiver(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus, retries: Queued
    ) -> None:
        asked: dict[str, Any] = {"webhook": f"{HOOK}?key=CANARY", "webhook_events_filter": ["output", "completed"]}
        prediction = put(table, clock, **asked)
        WaitingCallers.from_env().add_caller(prediction.id, "CANARY-TOKEN", 1)
        table.merge(prediction.id, told("processing", output="CANARY-1"), clock.now())
        table.merge(prediction.id, told("succeeded", output="CANARY-2"), clock.now())
        webhooks = Queued("deliveries")
        with (
            refusing(
                "SendMessage", "AccessDenied", lambda sent: sent["QueueUrl"].endswith("/deliveries"), service="sqs"
            ),
            refusing("Query", "AccessDenied", service="dynamodb"),
            refusing("GetItem", "AccessDenied", service="dynamodb"),
        ):
            bus.call_refused_with = "AccessDenied"
            assert changes.publish(stream()) is None
            bus.call_refused_with = ""
        messages = retries.take()
        assert sorted(json.loads(message["body"])["effect"] for message in messages) == [
            "callers", "callers", "event", "event", "webhooks", "webhooks",
        ]  # fmt: skip
        assert "CANARY" not in json.dumps(messages)
        assert changes.retry(messages) == []
        assert [json.loads(body)["event"] for body in webhooks.bodies] == ["output", "completed"]

    def test_event_that_the_bus_never_takes_holds_up_no_other(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus
    ) -> None:
        run(table, clock, "failed")
        run(table, clock, "succeeded")
        bus.refused, bus.error_code = {"Prediction Failed"}, "MalformedDetail"
        assert changes.publish(stream()) is None
        assert "Prediction Succeeded" in bus.types

    def test_bus_that_cannot_be_reached_delays_no_webhook(
        self, table: PredictionsTable, outputs: OutputsBucket, clock: Clock, retries: Queued
    ) -> None:
        prediction = put(table, clock, webhook=HOOK)
        table.end(prediction, Status.FAILED, "no", clock.now())
        with refusing("PutEvents", "ThrottlingException", service="events"):
            assert make(table, outputs).publish(stream()) is None
        assert len(retries.bodies) == 2
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

    def test_callers_that_cannot_be_read_hold_up_no_event_and_are_told_later(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus, wakes: Wakes, retries: Queued
    ) -> None:
        prediction = run(table, clock, "succeeded")
        records = stream()
        WaitingCallers.from_env().add_caller(prediction.id, "token", 1)
        with refusing("Query", "ThrottlingException", service="dynamodb"):
            assert changes.publish(records) is None
        assert bus.types == ["Prediction Started", "Prediction Succeeded"]
        assert wakes.told == []
        assert changes.retry(retries.take()) == []
        assert [token for token, _ in wakes.told] == ["token"]

    def test_records_for_which_no_time_is_left_are_read_again(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus
    ) -> None:
        for _ in range(3):
            run(table, clock, "succeeded")
        records = stream()
        left = iter([60.0, 19.0])
        assert changes.publish(records, lambda: next(left)) == records[2]["dynamodb"]["SequenceNumber"]
        assert bus.types == ["Prediction Started"]
        left = iter([])
        assert changes.publish(records[-1:], lambda: next(left)) is None, "the first one is always begun"


class TestCallers:
    @pytest.fixture
    def news(self, changes: Changes, wakes: Wakes) -> Any:
        return lambda: (changes.publish(stream()), wakes.told)[1]

    def test_state_is_told_the_end_with_files_in_their_places(
        self, news: Any, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = put(table, clock)
        WaitingCallers.from_env().add_caller(prediction.id, "token", 1)
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
            "cost": {"micro_dollars": None, "reason": "The model is not known.", "price": None},
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
        WaitingCallers.from_env().add_caller(prediction.id, "token", 1)
        table.merge(prediction.id, told(status, error="ee" + "\x01é" * 2000, output="x"), clock.now())
        for token, (name, cause) in news():
            assert (token, name) == ("token", error)
            said = json.loads(cause)
            assert (said["id"], said["error"][:2]) == (prediction.id, "ee")
            assert "output" not in said
            assert len(cause) <= 32768

    @pytest.mark.parametrize("status", ["succeeded", "failed"])
    def test_line_of_a_batch_is_told_no_more_than_its_status_whoever_else_waits(
        self, news: Any, table: PredictionsTable, clock: Clock, status: str
    ) -> None:
        # Step Functions writes it to the bucket, where it would outlive a prediction that its owner deletes.
        prediction = put(table, clock)
        WaitingCallers.from_env().add_caller(prediction.id, "line", 1, brief=True)
        WaitingCallers.from_env().add_caller(prediction.id, "other", 1)
        table.merge(prediction.id, told(status, error="PRIVATE", output="PRIVATE"), clock.now())
        found = {token: said if status == "succeeded" else json.loads(said[1]) for token, said in news()}
        assert found["line"] == {"id": prediction.id, "status": status}
        assert "PRIVATE" in json.dumps(found["other"])

    def test_every_state_that_waits_is_told_and_stale_ones_are_no_error(
        self, news: Any, table: PredictionsTable, clock: Clock, wakes: Wakes
    ) -> None:
        prediction = put(table, clock)
        for token in ("one", "two", "three"):
            WaitingCallers.from_env().add_caller(prediction.id, token, 1)
        wakes.stale = {"one"}
        table.merge(prediction.id, told("succeeded", output="x"), clock.now())
        assert {token for token, _ in news()} == {"one", "two", "three"}

    @pytest.mark.parametrize("code", ["AccessDeniedException", "InvalidToken", "ValidationException"])
    def test_strange_token_holds_up_nothing(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus, wakes: Wakes, code: str
    ) -> None:
        prediction = run(table, clock, "succeeded", output="x")
        for n in range(7):
            WaitingCallers.from_env().add_caller(prediction.id, f"strange {n}", 1)
        WaitingCallers.from_env().add_caller(prediction.id, "ours", 1)
        retries = Queued("changes-retry")
        records = [record for record in stream() if record["dynamodb"]["Keys"]["sk"] == {"S": "status"}]
        with refusing("SendTaskSuccess", code, lambda body: "strange" in body["taskToken"]):
            assert changes.publish(records) is None
            for _ in range(4):
                assert changes.retry(retries.take()) == []
        assert [token for token, _ in wakes.told] == ["ours"], "once, however many refused ones there are"
        with refusing("SendTaskSuccess", "ThrottlingException"):
            assert changes.publish(records) is None
        assert retries.bodies

    @pytest.mark.parametrize(("machine", "dropped"), [("999999999999", True), ("123456789012", False)])
    def test_token_of_another_account_is_dropped_and_a_right_that_is_missing_is_waited_for(
        self,
        changes: Changes,
        table: PredictionsTable,
        clock: Clock,
        bus: Bus,
        wakes: Wakes,
        machine: str,
        dropped: bool,
    ) -> None:
        prediction = run(table, clock, "succeeded", output="x")
        WaitingCallers.from_env().add_caller(prediction.id, "token", 1)
        retries = Queued("changes-retry")
        said = (
            "User: arn:aws:sts::123456789012:assumed-role/publish/x is not authorized to perform: "
            f"states:SendTaskSuccess on resource: arn:aws:states:us-east-1:{machine}:stateMachine:caller because …"
        )
        with refusing("SendTaskSuccess", "AccessDeniedException", message=said):
            assert changes.publish(stream()[-1:]) is None
        assert (retries.bodies == []) is dropped
        assert changes.retry(retries.take()) == []
        assert [token for token, _ in wakes.told] == ([] if dropped else ["token"])

    def test_more_callers_than_there_is_time_for_are_all_told_and_hold_up_nobody(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus, wakes: Wakes
    ) -> None:
        prediction = run(table, clock, "succeeded", output="x")
        records = stream()
        run(table, clock, "failed")
        others = stream()[len(records) :]
        tokens = {f"token {n}" for n in range(60)}
        for token in tokens:
            WaitingCallers.from_env().add_caller(prediction.id, token, 1)
        retries = Queued("changes-retry")

        def run_of_the_function() -> Any:
            left = iter(range(60, 0, -1))  # a second for each look at the time
            return lambda: float(next(left))

        failed = changes.publish([records[-1], *others], run_of_the_function())
        assert failed == others[0]["dynamodb"]["SequenceNumber"]
        assert len(wakes.told) == 42
        assert changes.publish(others, run_of_the_function()) is None, "the others of its shard go on"
        assert "Prediction Failed" in bus.types
        assert changes.retry(retries.take(), run_of_the_function()) == []
        assert {token for token, _ in wakes.told} == tokens
        assert len(wakes.told) == 60, "each once"
        assert retries.bodies == []

    def test_callers_of_a_prediction_that_was_deleted_before_the_stream_was_read_are_told_without_output(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus, wakes: Wakes
    ) -> None:
        prediction = put(table, clock)
        WaitingCallers.from_env().add_caller(prediction.id, "token", 1)
        ended = table.merge(prediction.id, told("succeeded", output=[FILE, "CANARY"]), clock.now()).prediction
        assert ended is not None
        table.end_copy(ended, [StoredFile(path="/0", index=0, key="alice/CANARY", bytes=7)], clock.now())
        records = stream()
        flagged = table.request_delete(prediction.id, clock.now())
        assert flagged is not None
        # The end is read between the flag and the removal, and once more after that.
        for _ in range(2):
            assert changes.publish(records[-1:]) is None
            table.delete_data(flagged, clock.now())
        assert [token for token, _ in wakes.told] == ["token", "token"]
        for _, result in wakes.told:
            assert (result["status"], result["output"], result["output_files"]) == ("succeeded", None, [])
        assert "CANARY" not in json.dumps(wakes.told)

    def test_result_that_is_too_long_to_be_parsed_is_not_read(
        self, changes: Changes, table: PredictionsTable, clock: Clock, bus: Bus, wakes: Wakes
    ) -> None:
        prediction = put(table, clock)
        WaitingCallers.from_env().add_caller(prediction.id, "token", 1)
        table.merge(prediction.id, told("succeeded", output=[[0]] * (PARSED_LIMIT_CHARACTERS // 4)), clock.now())
        records = stream()
        calls = AwsCalls()
        assert changes.publish(records) is None
        assert {token for token, _ in wakes.told} == {"token"}
        assert all(result["output_truncated"] and "output" not in result for _, result in wakes.told)
        assert "s3.GetObject" not in calls.made

    def test_output_that_step_functions_do_not_take_is_left_out_and_that_is_said(
        self, changes: Changes, table: PredictionsTable, clock: Clock, wakes: Wakes
    ) -> None:
        prediction = run(table, clock, "succeeded", output="deeper than they read")
        WaitingCallers.from_env().add_caller(prediction.id, "token", 1)
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
        WaitingCallers.from_env().add_caller(prediction.id, "token", 1)
        changes.publish(stream()[-1:])
        assert [(token, result["output"]) for token, result in wakes.told] == [("token", "x")]

    def test_state_whose_prediction_runs_is_told_nothing_yet(
        self, news: Any, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = put(table, clock)
        WaitingCallers.from_env().add_caller(prediction.id, "token", 1)
        table.merge(prediction.id, told("processing"), clock.now())
        assert news() == []

    @pytest.mark.parametrize(("length", "truncated"), [(OUTPUT_LIMIT_BYTES - 2, False), (OUTPUT_LIMIT_BYTES - 1, True),
                                                       (300_000, True)])  # fmt: skip
    def test_long_output_is_left_out_and_that_is_said(
        self, news: Any, table: PredictionsTable, clock: Clock, length: int, truncated: bool
    ) -> None:
        prediction = put(table, clock)
        WaitingCallers.from_env().add_caller(prediction.id, "token", 1)
        table.merge(prediction.id, told("succeeded", output="x" * length), clock.now())
        for _, result in news():
            assert ("output" in result, result.get("output_truncated", False)) == (not truncated, truncated)

    def test_short_output_of_long_logs_is_told(self, news: Any, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock)
        WaitingCallers.from_env().add_caller(prediction.id, "token", 1)
        table.merge(prediction.id, told("succeeded", output="short", logs="l" * 300_000), clock.now())
        assert {result["output"] for _, result in news()} == {"short"}

    def test_many_files_leave_room_for_the_rest(self, news: Any, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock)
        WaitingCallers.from_env().add_caller(prediction.id, "token", 1)
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
        WaitingCallers.from_env().add_caller(prediction.id, "token", 1)
        changes.publish(stream()[-1:])
        assert "CANARY" not in json.dumps(wakes.told)
        assert wakes.told[0][1]["output"] is None

    def test_prediction_without_callers_tells_nobody(self, news: Any, table: PredictionsTable, clock: Clock) -> None:
        run(table, clock, "succeeded")
        assert news() == []
