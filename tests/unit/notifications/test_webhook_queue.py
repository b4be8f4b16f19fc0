"""Which webhooks a change of the table calls for, when each is tried, and the queue that holds them."""

import json
from dataclasses import replace
from itertools import combinations, pairwise, permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from predictions.aws import clients
from predictions.files.output_references import StoredFile
from predictions.notifications.stream import Changes
from predictions.notifications.webhook_queue import (
    RETRY_SECONDS,
    RUNNING_RETRY_SECONDS,
    DeadLetters,
    DeliveriesQueue,
    Delivery,
    UnreadableDelivery,
    deliveries_of,
)
from predictions.status import Status
from predictions.store.predictions import PredictionsTable

from tests.support.fakes import Clock, Queued, refusing
from tests.support.predictions import FILE, put, told
from tests.support.webhook_queue import DUE, HOOK, stream, waiting

ID = "a" * 26
ALL = ["start", "output", "logs", "completed"]
COMPLETED = Delivery(ID, "completed", 1, DUE)


def called_for() -> list[tuple[str, int]]:
    """What all of the stream calls for."""
    return [(each.event, each.n) for record in stream() for each in deliveries_of(record)]


class TestChanges:
    def test_prediction_without_a_webhook_calls_for_none(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock)
        table.merge(prediction.id, told("processing", output="a", logs="b"), clock.now())
        table.merge(prediction.id, told("succeeded", output="ab"), clock.now())
        assert called_for() == []

    def test_change_that_callers_do_not_see_calls_for_none(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock, webhook=HOOK, webhook_events_filter=ALL)
        table.merge(prediction.id, told("starting"), clock.now())
        table.check_again_at(prediction, clock.now() + 60)
        table.next_execution(prediction, "arn:2", clock.now())
        table.request_cancel(prediction.id, clock.now())
        assert called_for() == []

    @pytest.mark.parametrize("late", ["starting", "processing", "succeeded", "failed"])
    def test_late_or_repeated_news_call_for_nothing_more(
        self, table: PredictionsTable, clock: Clock, late: str
    ) -> None:
        prediction = put(table, clock, webhook=HOOK, webhook_events_filter=ALL)
        table.merge(prediction.id, told("processing"), clock.now())
        table.merge(prediction.id, told("succeeded", output="text"), clock.now())
        before = called_for()
        table.merge(prediction.id, told(late, output="text"), clock.now())
        assert called_for() == before == [("start", 1), ("completed", 1)]

    @pytest.mark.parametrize(
        ("wanted", "expected"),
        [
            (None, ["completed"]),
            (["start"], ["start"]),
            (["completed"], ["completed"]),
            (["output"], ["output"]),
            (["logs", "start"], ["start", "logs"]),
            (ALL, ["start", "completed"]),
        ],
    )
    def test_only_what_the_caller_named_is_told(
        self, table: PredictionsTable, clock: Clock, wanted: list[str] | None, expected: list[str]
    ) -> None:
        named: dict[str, Any] = {"webhook_events_filter": wanted} if wanted else {}
        prediction = put(table, clock, webhook=HOOK, **named)
        table.merge(prediction.id, told("processing"), clock.now())
        table.merge(prediction.id, told("succeeded", output="text"), clock.now())
        assert [event for event, _ in called_for()] == expected

    @pytest.mark.parametrize("files", [False, True], ids=["text", "files"])
    def test_each_wanted_kind_is_told_in_every_order_of_replicates_webhooks(
        self, table: PredictionsTable, clock: Clock, files: bool
    ) -> None:
        output = [FILE] if files else "text"
        kinds = {
            "start": told("processing", started_at="2025-06-15T15:06:40Z"),
            "output": told("processing", output=output, logs="log", started_at="2025-06-15T15:06:40Z"),
            "completed": told("succeeded", output=output, logs="log", started_at="2025-06-15T15:06:40Z"),
        }
        wanted_of: dict[str, tuple[str, ...]] = {}
        orders: dict[str, tuple[str, ...]] = {}
        for order in permutations(kinds):
            for wanted in (each for size in range(1, 5) for each in combinations(ALL, size)):
                prediction = put(table, clock, webhook=HOOK, webhook_events_filter=list(wanted))
                wanted_of[prediction.id], orders[prediction.id] = wanted, order
                for kind in order:
                    ended = table.merge(prediction.id, kinds[kind], clock.now()).prediction
                    if ended is not None and ended.awaits_copy:
                        table.end_copy(ended, [StoredFile(path="/0", index=0, key="k", bytes=1)], clock.now())
        found: dict[str, list[str]] = {prediction_id: [] for prediction_id in wanted_of}
        for record in stream():
            for delivery in deliveries_of(record):
                found[delivery.id].append(delivery.event)
        assert len(found) == 90
        for prediction_id, wanted in wanted_of.items():
            # `completed` shows output and logs as well.
            told_by_the_end = {"output", "logs"} if "completed" in wanted else set()
            case = (orders[prediction_id], wanted, found[prediction_id])
            assert set(wanted) - told_by_the_end <= set(found[prediction_id]) <= set(wanted), case
            if files and "output" in wanted:
                assert "output" in found[prediction_id], case

    @pytest.mark.parametrize("status", ["succeeded", "failed", "canceled", "aborted"])
    def test_end_of_what_ran_unseen_is_told_after_its_start(
        self, table: PredictionsTable, clock: Clock, status: str
    ) -> None:
        prediction = put(table, clock, webhook=HOOK, webhook_events_filter=ALL)
        table.merge(prediction.id, told(status, started_at="2025-06-15T15:06:40Z"), clock.now())
        assert called_for() == [("start", 1), ("completed", 1)]

    def test_end_of_what_never_ran_is_told_alone(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock, webhook=HOOK, webhook_events_filter=ALL)
        table.end(prediction, Status.FAILED, "refused", clock.now())
        assert called_for() == [("completed", 1)]

    def test_end_with_files_is_told_when_they_are_stored(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock, webhook=HOOK)
        table.merge(prediction.id, told("processing", output=[FILE]), clock.now())
        ended = table.merge(prediction.id, told("succeeded", output=[FILE]), clock.now()).prediction
        assert called_for() == []
        assert ended is not None
        assert ended.awaits_copy
        table.end_copy(ended, [StoredFile(path="/0", index=0, key="k", bytes=1)], clock.now())
        assert called_for() == [("output", 0), ("completed", 1)]

    def test_output_and_logs_are_told_when_they_grow(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock, webhook=HOOK, webhook_events_filter=["output", "logs"])
        for output, logs in (("a", ""), ("ab", ""), ("ab", "x"), ("ab", "x"), ("a", ""), ("abc", "xy")):
            table.merge(prediction.id, told("processing", output=output, logs=logs), clock.now())
        events = called_for()
        assert [event for event, _ in events] == ["output", "output", "logs", "output", "logs"]
        assert len(set(events)) == len(events), "two deliveries of one event have different numbers"

    def test_output_that_is_an_object_is_told_without_its_text(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock, webhook=HOOK)
        table.merge(prediction.id, told("processing", output="x" * 200_000), clock.now())
        assert [event for event, _ in called_for()] == ["output"]
        assert "xxx" not in json.dumps(stream(), default=str)

    def test_logs_call_for_nothing_where_only_outputs_are_wanted(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock, webhook=HOOK)
        table.merge(prediction.id, told("processing", logs="x"), clock.now())
        assert called_for() == []

    def test_same_record_twice_gives_the_same_ids(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock, webhook=HOOK)
        table.merge(prediction.id, told("succeeded", output="text"), clock.now())
        record = stream()[-1]
        first, second = (list(deliveries_of(record)) for _ in range(2))
        assert first == second == [Delivery(prediction.id, "completed", 1, DUE)]
        assert first[0].webhook_id == f"{prediction.id}-completed-1"


class TestTries:
    @pytest.mark.parametrize("event", ALL)
    @pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
    def test_waits_grow_until_the_time_is_over(self, event: str, jitter: float) -> None:
        delivery = Delivery(ID, event, 1, DUE)
        now, waits = float(DUE), []
        while (wait := delivery.wait_seconds(now, jitter)) is not None:
            waits.append(wait)
            now += wait
        ends = RETRY_SECONDS if event == "completed" else RUNNING_RETRY_SECONDS
        assert now - DUE == ends, "the last try is at the end"
        assert all(later >= earlier for earlier, later in pairwise(waits[:-1]))
        assert 4 <= waits[0] <= 6
        assert max(waits) <= 4 * 3600 * 1.2 < 12 * 3600, "SQS hides a message for 12 h at most"
        low, high = (12, 24) if event == "completed" else (3, 6)
        assert low <= len(waits) <= high

    @given(st.floats(-3600, 2 * RETRY_SECONDS), st.floats(0, 1))
    def test_wait_is_one_that_sqs_takes(self, elapsed: float, jitter: float) -> None:
        wait = COMPLETED.wait_seconds(DUE + elapsed, jitter)
        assert wait is None if elapsed >= RETRY_SECONDS else wait is not None and 1 <= wait <= 12 * 3600

    def test_receivers_that_failed_together_are_not_called_together(self) -> None:
        assert COMPLETED.wait_seconds(DUE + 1000, 0) != COMPLETED.wait_seconds(DUE + 1000, 1)


class TestMessages:
    @pytest.mark.parametrize(
        "body",
        [
            "",
            "null",
            "[]",
            "{}",
            '{"id": 1}',
            json.dumps({"id": "../x", "event": "completed", "n": 1, "first_at": 1}),
            json.dumps({"id": ID, "event": "deleted", "n": 1, "first_at": 1}),
            json.dumps({"id": ID, "event": "completed", "n": "x", "first_at": 1}),
            json.dumps({"id": ID, "event": "completed", "n": 1}),
        ],
    )
    def test_other_message_is_refused(self, body: str) -> None:
        with pytest.raises(UnreadableDelivery):
            Delivery.read(body)

    def test_message_holds_ids_and_times_only(self) -> None:
        assert json.loads(COMPLETED.message()) == {"id": ID, "event": "completed", "n": 1, "first_at": DUE}
        assert Delivery.read(COMPLETED.message()) == COMPLETED


class TestQueues:
    def test_record_that_cannot_be_queued_is_named_and_those_before_it_are_kept(
        self, table: PredictionsTable, clock: Clock
    ) -> None:
        ids = [put(table, clock, webhook=HOOK).id for _ in range(3)]
        for prediction_id in ids:
            table.merge(prediction_id, told("succeeded", upstream_id=prediction_id, output="text"), clock.now())
        records = [record for record in stream() if list(deliveries_of(record))]
        assert len(records) == 3
        changes = Changes.from_env()
        with refusing("SendMessage", "AccessDenied", lambda body: ids[1] in body["MessageBody"], service="sqs"):
            assert changes.publish(records) == records[1]["dynamodb"]["SequenceNumber"]
        assert [message["id"] for message in waiting("deliveries")] == ids[:1]
        assert changes.publish(records[1:]) is None

    def test_message_belongs_to_its_owners_group_so_that_sqs_hands_out_others_first(
        self, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = put(table, clock, webhook=HOOK, owner="bob")
        table.merge(prediction.id, told("processing", output="a"), clock.now())
        table.merge(prediction.id, told("succeeded", output="ab"), clock.now())
        url = clients.client("sqs").get_queue_url(QueueName="deliveries")["QueueUrl"]
        sent = Queued("deliveries")
        for record in stream():
            DeliveriesQueue.from_env().send_for(record, set())
        found = clients.client("sqs").receive_message(
            QueueUrl=url, MaxNumberOfMessages=10, MessageSystemAttributeNames=["MessageGroupId"]
        )
        groups = [message["Attributes"].get("MessageGroupId") for message in found["Messages"]]
        assert len(sent.bodies) == 2
        assert set(groups) == {"bob"}

    def test_later_of_two_at_once_waits_a_second(self, table: PredictionsTable, clock: Clock) -> None:
        prediction = put(table, clock, webhook=HOOK, webhook_events_filter=ALL)
        table.merge(prediction.id, told("processing"), clock.now())
        table.merge(prediction.id, told("succeeded"), clock.now())
        assert Changes.from_env().publish(stream()) is None
        assert [message["event"] for message in waiting("deliveries")] == ["start"]
        queue = clients.client("sqs").get_queue_attributes(
            QueueUrl=clients.client("sqs").get_queue_url(QueueName="deliveries")["QueueUrl"],
            AttributeNames=["ApproximateNumberOfMessagesDelayed"],
        )
        assert queue["Attributes"]["ApproximateNumberOfMessagesDelayed"] == "1"

    def test_delivery_that_is_given_up_is_kept_with_the_reason_until_it_is_forgotten(self, cloud: None) -> None:
        letters = DeadLetters.from_env()
        letters.send(COMPLETED, "answered 500")
        letters.send(replace(COMPLETED, id="b" * 26), "answered 404")
        url = clients.client("sqs").get_queue_url(QueueName="dead-deliveries")["QueueUrl"]
        clients.client("sqs").send_message(QueueUrl=url, MessageBody=COMPLETED.message())
        clients.client("sqs").send_message(QueueUrl=url, MessageBody="[]")
        found = list(letters.receive(30))
        assert list(letters.receive(30)) == [], "what was looked at is hidden for a while"
        assert [(each.delivery.id[0] if each.delivery else "", each.reason) for each in found] == [
            ("a", "answered 500"),
            ("b", "answered 404"),
            ("a", "deliver_webhook failed each time. See its log."),
            ("", "not a delivery"),
        ]
        for each in found:
            letters.delete(each)
        counts = clients.client("sqs").get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        assert counts["ApproximateNumberOfMessagesNotVisible"] == "0"
