"""The requests queue's door: what a message starts, whose it is, and what becomes of one that starts nothing."""

import contextlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from predictions.aws import clients
from predictions.aws.dynamodb import serialize
from predictions.intake.queue import Requests, _source_of, task_token_of
from predictions.intake.refused import MESSAGE_LIMIT_BYTES, DeadRequest, DeadRequests
from predictions.intents.model import Source, create_requested_intent
from predictions.intents.sources import Message, RequestRefused
from predictions.notifications.stream import Changes
from predictions.observability import logger
from predictions.status import Status
from predictions.store.callers import CALLERS_LIMIT, WaitingCallers
from predictions.store.payloads import PAYLOAD_LIMIT_BYTES
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction

from tests.support.fakes import Clock, Died, Executed, Fault, Wakes, faulty, meanwhile, refusing
from tests.support.fixtures import ENVIRONMENT
from tests.support.requests import BODY, MODEL, SENT, Function, function, items, look, record, requests

__all__ = ["function", "requests"]  # fixtures


MANIFEST_CREATED = json.dumps(
    {
        "source": "aws.s3",
        "detail-type": "Object Created",
        "detail": {"bucket": {"name": "inputs"}, "object": {"key": "batches/alice/postcards/may.jsonl", "size": 7}},
    }
)


def message(body: Any = BODY, *, id: str = "message-1", sender: str = "AIDANOBODY00") -> Message:  # noqa: A002
    return Message(id, sender, body if isinstance(body, str) else json.dumps(body), SENT)


class TestRefused:
    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            ("", "The body is not JSON"),
            ("[]", "must be a JSON object"),
            ('{"model": "a/b", "model": "c/d", "input": {}}', "twice"),
            ("[" * 200_000, "nested"),
            ({"input": {}}, "exactly one of"),
            ({**BODY, "owner": "alice"}, "owner"),
            ({**BODY, "version": MODEL}, "exactly one of"),
            ({**BODY, "model": "no slash"}, "model"),
            ({**BODY, "idempotency_key": "with space"}, "idempotency_key"),
            ({**BODY, "webhook": "http://example.com"}, "webhook"),
            ({**BODY, "task_token": ""}, "task_token"),
            ({**BODY, "task_token": "x" * 2049}, "task_token"),
            ({**BODY, "task_token": {}}, "task_token"),
        ],
    )
    def test_message_that_starts_nothing_writes_nothing(
        self, requests: Requests, executed: Executed, body: Any, reason: str
    ) -> None:
        with pytest.raises(RequestRefused, match=reason):
            requests.take(message(body))
        assert items("") == []
        assert executed.inputs == {}

    def test_more_states_than_may_wait_for_one_prediction_are_refused_and_those_that_wait_are_not(
        self, requests: Requests, table: PredictionsTable
    ) -> None:
        asked = {**BODY, "idempotency_key": "k"}
        prediction = requests.take(message({**asked, "task_token": "token 0"}))
        assert prediction is not None
        # As many as it takes, in few calls.
        rows = [{"pk": f"prediction#{prediction.id}", "sk": f"caller#{n}", "task_token": f"t{n}"} for n in range(998)]
        for n in range(0, len(rows), 25):
            puts: Any = [{"PutRequest": {"Item": serialize(row)}} for row in rows[n : n + 25]]
            clients.client("dynamodb").batch_write_item(RequestItems={"predictions": puts})
        requests.take(message({**asked, "task_token": "the last one"}, id="message-2"))
        assert len(items("caller#")) == CALLERS_LIMIT
        with pytest.raises(RequestRefused, match=f"1000 states already wait for prediction {prediction.id}"):
            requests.take(message({**asked, "task_token": "one too many"}, id="message-3"))
        assert len(items("caller#")) == CALLERS_LIMIT
        for token in ("token 0", "the last one"):  # SQS may deliver a message twice
            assert requests.take(message({**asked, "task_token": token})) is not None
        assert requests.take(message(asked)) is not None, "nobody waits for this one"

    def test_key_of_another_request_is_refused_and_its_caller_not_noted(
        self, requests: Requests, executed: Executed
    ) -> None:
        requests.take(message({**BODY, "idempotency_key": "k"}))
        other = {**BODY, "input": {"prompt": "a hare"}, "idempotency_key": "k", "task_token": "token"}
        with pytest.raises(RequestRefused, match="another request"):
            requests.take(message(other, id="message-2"))
        assert len(executed.inputs) == 1
        assert items("caller#") == [], "the end of the first must not be told as that of the second"


class TestTaken:
    def test_message_is_written_down_and_tracked_but_not_submitted(
        self, requests: Requests, executed: Executed, clock: Clock
    ) -> None:
        prediction = requests.take(message())
        assert prediction is not None
        assert (prediction.owner, prediction.source, prediction.claimed) == ("queue", "queue", None)
        assert prediction.deadline == int(clock.now()) + 3600
        assert executed.inputs == {f"{prediction.id}-1": {"id": prediction.id, "submit": True}}

    @pytest.mark.parametrize("again", ["message-1", "message-2"])
    def test_same_message_twice_or_same_key_in_two_starts_one(
        self, requests: Requests, executed: Executed, again: str
    ) -> None:
        body = BODY if again == "message-1" else {**BODY, "idempotency_key": "k"}
        first, second = requests.take(message(body)), requests.take(message(body, id=again))
        assert first is not None
        assert second is not None
        assert first.id == second.id
        assert len(executed.inputs) == len(items("status")) == 1

    def test_same_body_in_two_messages_starts_two(self, requests: Requests, executed: Executed) -> None:
        requests.take(message())
        requests.take(message(id="message-2"))
        assert len(executed.inputs) == 2

    @pytest.mark.parametrize(
        ("sender", "owner"), [("AROAALICE0000", "alice"), ("AROAALICE0000:job", "alice"), ("AIDANOBODY00", "queue")]
    )
    def test_owner_is_the_senders(self, requests: Requests, sender: str, owner: str) -> None:
        prediction = requests.take(message(sender=sender))
        assert prediction is not None
        assert prediction.owner == owner

    def test_one_owners_key_is_not_anothers(self, requests: Requests) -> None:
        body = {**BODY, "idempotency_key": "k"}
        first, second = requests.take(message(body)), requests.take(message(body, sender="AROAALICE0000"))
        assert first is not None
        assert second is not None
        assert first.id != second.id

    def test_intent_whose_writer_died_is_tracked_by_the_next_delivery(
        self, requests: Requests, executed: Executed
    ) -> None:
        with (
            refusing("StartExecution", "ThrottlingException"),
            pytest.raises(clients.client("stepfunctions").exceptions.ClientError),
        ):
            requests.take(message())
        assert executed.inputs == {}
        prediction = requests.take(message())
        assert prediction is not None
        assert list(executed.inputs) == [f"{prediction.id}-1"]

    def test_state_that_waits_is_noted_with_each_prediction_it_waits_for(self, requests: Requests) -> None:
        prediction = requests.take(message({**BODY, "task_token": "token"}))
        requests.take(message({**BODY, "task_token": "token"}))
        assert prediction is not None
        assert [(item["pk"], item["task_token"]) for item in items("caller#")] == [
            (f"prediction#{prediction.id}", "token")
        ]

    @pytest.mark.parametrize(("source", "brief"), [("queue", False), ("batch", True)])
    def test_line_of_a_batch_waits_for_no_more_than_the_status(
        self, requests: Requests, source: Source, brief: bool
    ) -> None:
        asked = create_requested_intent(
            BODY, owner="alice", source=source, source_key="1", allow_loopback_webhooks=False
        )
        requests.start(asked, "token")
        (caller,) = WaitingCallers.from_env().callers_of(asked.id)
        assert (caller.task_token, caller.brief) == ("token", brief)


class TestTokenOfARefused:
    @pytest.mark.parametrize(
        ("text", "token"),
        [
            ('{"task_token": "t"}', "t"),
            ('{"task_token": "t", "task_token": "u"}', "u"),
            ('{"task_token": ""}', None),
            ('{"task_token": 7}', None),
            ("{}", None),
            ("[]", None),
            ("", None),
            ("[" * 200_000, None),
        ],
    )
    def test_it_is_found_whatever_else_is_wrong(self, text: str, token: str | None) -> None:
        assert task_token_of(text) == token


@pytest.mark.parametrize("named", ["recipe_id", "pipeline_id", "batch_id"])
def test_what_messages_name_is_made_once(cloud: None, named: str) -> None:
    # It holds what is read once, such as the secret of links.
    assert _source_of({named: "a"}) is _source_of({named: "b"})


class TestFunction:
    def test_refused_message_is_kept_as_it_is_and_holds_up_no_other(
        self, function: Function, executed: Executed
    ) -> None:
        assert function(record(BODY, id="m-1"), record("{", id="m-2"), record(BODY, id="m-3")) == []
        assert len(executed.inputs) == 2
        (letter,) = look()
        assert (letter.id, letter.sender, letter.sent_at, letter.body) == ("m-2", "AIDANOBODY00", SENT, "{")
        assert letter.reason == "The body is not JSON at line 1, column 2."

    def test_refusal_fails_the_state_that_waits_also_where_it_cannot_be_kept(
        self, function: Function, wakes: Wakes
    ) -> None:
        bad = record({"model": MODEL, "task_token": "token"})
        with refusing("SendMessage", "AccessDenied", service="sqs"):
            assert function(bad) == ["message-1"]
        told = ("token", ("RequestRefused", "input: This field is required."))
        assert wakes.told == [told], "nothing else would ever tell it"
        assert function(bad) == []
        assert wakes.told == [told, told]
        (letter,) = look()
        assert letter.reason == "input: This field is required."
        wakes.stale = {"token"}
        assert function(bad) == [], "a state that no longer waits is no error"

    def test_state_whose_message_starts_nothing_does_not_wait_for_it(
        self, function: Function, monkeypatch: pytest.MonkeyPatch, wakes: Wakes
    ) -> None:
        monkeypatch.setattr(function._app.requests, "take", lambda _: None)
        assert function(record({"recipe_id": "r" * 26, "event": {}, "task_token": "token"}), record(BODY)) == []
        assert [(token, error) for token, (error, _) in wakes.told] == [("token", "RequestNoLongerWanted")]
        assert look() == []

    def test_message_that_aws_does_not_let_start_stays_and_holds_up_no_other(
        self, function: Function, executed: Executed
    ) -> None:
        first = record(BODY, id="m-1")
        with refusing("StartExecution", "ThrottlingException", lambda body: not executed.inputs):
            assert function(first) == ["m-1"]
        other = record({**BODY, "webhook": "https://hooks.example.com/"}, id="m-2")
        with refusing("PutItem", "ThrottlingException", lambda body: "hooks.example" in str(body), service="dynamodb"):
            assert function(other, first) == ["m-2"]
        assert len(executed.inputs) == 1
        assert look() == []

    def test_error_of_our_own_stays_in_the_queue_and_holds_up_no_other(
        self, function: Function, executed: Executed, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        take = function._app.requests.take

        def broken(message: Message) -> Any:
            if message.id == "m-1":
                raise KeyError("bug")
            return take(message)

        monkeypatch.setattr(function._app.requests, "take", broken)
        assert function(record(BODY, id="m-1"), record(BODY, id="m-2")) == ["m-1"]
        assert len(executed.inputs) == 1

    def test_message_for_which_no_time_is_left_stays_untouched(self, function: Function, executed: Executed) -> None:
        assert function(record(BODY), remaining_seconds=9) == ["message-1"]
        assert executed.inputs == {}
        assert items("") == []

    def test_message_that_was_put_back_is_known_by_what_its_attributes_say(
        self, function: Function, executed: Executed
    ) -> None:
        function(record(BODY, id="m-1"))
        function(record(BODY, id="m-2", request_id="m-1", sent_at=str(SENT)))
        assert len(executed.inputs) == 1

    @pytest.mark.parametrize(
        ("said", "sent_at"), [(str(SENT - 60), SENT - 60), (str(SENT + 60), SENT), ("soon", SENT), ("²", SENT)]
    )
    def test_no_message_makes_itself_younger(
        self, function: Function, monkeypatch: pytest.MonkeyPatch, said: str, sent_at: int
    ) -> None:
        taken: list[Message] = []
        monkeypatch.setattr(function._app.requests, "take", taken.append)
        assert function(record(BODY, sent_at=said)) == []
        assert [each.sent_at for each in taken] == [sent_at]

    def test_nothing_of_a_body_is_logged(self, function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
        log = io.StringIO()
        monkeypatch.setattr(logger.registered_handler, "stream", log)
        bad = record({"model": MODEL, "input": {"prompt": "CANARY"}, "task_token": "CANARY", "CANARY": 1})
        assert function(bad) == []
        with refusing("StartExecution", "ThrottlingException"):
            function(record({**BODY, "input": {"prompt": "CANARY"}}, id="m-2"), record("{", id="m-3"))
        lines = [json.loads(line) for line in log.getvalue().splitlines()]
        assert [(line["message"], line["request_id"], "correlation_id" in line) for line in lines] == [
            ("request refused", "message-1", False),
            ("request not started", "m-2", True),
            ("request refused", "m-3", False),
        ]
        assert "CANARY" not in log.getvalue()


@contextmanager
def limited(limit: int = MESSAGE_LIMIT_BYTES) -> Iterator[list[int]]:
    """SQS as it counts: the body, and the names, types and values of attributes; moto counts the body alone.

    Yields:
        The sizes of what it took.
    """
    sizes: list[int] = []

    def count(params: Any, **_: Any) -> tuple[Any, dict[str, Any]] | None:
        asked = json.loads(params["body"])
        attributes = asked.get("MessageAttributes", {})
        size = len(asked["MessageBody"].encode()) + sum(
            len(name.encode()) + len(each["DataType"]) + len(each["StringValue"].encode())
            for name, each in attributes.items()
        )
        if size > limit:
            error = {"Code": "InvalidParameterValue", "Message": "One or more parameters are invalid."}
            return type("Http", (), {"status_code": 400})(), {"Error": error}
        sizes.append(size)
        return None

    events: Any = clients.client("sqs").meta.events
    events.register_first("before-call.sqs.SendMessage", count)
    try:
        yield sizes
    finally:
        events.unregister("before-call.sqs.SendMessage", count)


def refused_body(size: int) -> str:
    """A message of that many bytes that is refused, from a state that waits."""
    around = json.dumps({"model": MODEL, "task_token": "token", "pad": ""})
    return around[:-2] + "é" * ((size - len(around)) // 2) + "x" * ((size - len(around)) % 2) + '"}'


class TestLargeRefused:
    """SQS's limit is for the body and the attributes together."""

    @pytest.mark.parametrize("below", [0, 1, 50, 199, 300, 400, 1000, 100_000])
    def test_message_near_the_limit_is_kept_whole_with_its_reason_and_its_state_is_told(
        self, function: Function, wakes: Wakes, below: int
    ) -> None:
        body = refused_body(MESSAGE_LIMIT_BYTES - below)
        assert len(body.encode()) == MESSAGE_LIMIT_BYTES - below
        with limited() as sizes:
            assert function(record(body, id="m" * 36)) == []
        assert len(sizes) == 1
        (letter,) = look()
        assert letter.body == body
        assert (letter.id, letter.sender, letter.sent_at) == ("m" * 36, "AIDANOBODY00", SENT)
        assert letter.reason.startswith("input: This field is required.")
        assert [token for token, _ in wakes.told] == ["token"]
        assert letter.event()["Records"][0]["body"] == body

    @pytest.mark.parametrize("below", [400, 1000])
    def test_long_reason_is_cut_to_what_fits(self, cloud: None, below: int) -> None:
        body = "x" * (MESSAGE_LIMIT_BYTES - below)
        with limited() as sizes:
            DeadRequests.from_env().send(message(body), "é" * 2000)
        assert MESSAGE_LIMIT_BYTES - 1 <= sizes[0] <= MESSAGE_LIMIT_BYTES
        (letter,) = look()
        assert letter.body == body
        assert letter.reason == "é" * len(letter.reason)

    @pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.DIED_BEFORE, Fault.DIED_AFTER])
    def test_burying_that_breaks_off_anywhere_is_done_by_the_next_receive(
        self, function: Function, wakes: Wakes, fault: Fault
    ) -> None:
        large = record(refused_body(MESSAGE_LIMIT_BYTES), id="m-1")
        for n in range(3):  # the object, the message, the state
            with faulty(fault, n) as made, contextlib.suppress(Died):
                function(large)
            assert len(made) > n
            with limited():
                assert function(large) == []
            assert {letter.body for letter in look()} == {large["body"]}
            assert wakes.told

    def test_object_is_read_for_messages_of_ours_alone(self, cloud: None) -> None:
        clients.client("s3").put_object(Bucket="outputs", Key="payloads/other/secret.json", Body=b"secret")
        attributes = {"request_id": "m-1", "sender": "AIDA", "sent_at": "1", "body_key": "payloads/other/secret.json"}
        clients.client("sqs").send_message(
            QueueUrl="https://sqs.us-east-1.amazonaws.com/123456789012/dead-requests",
            MessageBody="{}",
            MessageAttributes={n: {"DataType": "String", "StringValue": v} for n, v in attributes.items()},
        )
        (letter,) = look()
        assert letter.body == "{}"


class TestDeleted:
    """What its owner has deleted does not come back with its message."""

    LARGE = "secret " * PAYLOAD_LIMIT_BYTES

    def delete(self, table: PredictionsTable, prediction: Prediction, clock: Clock) -> None:
        assert table.request_cancel(prediction.id, clock.now())
        assert table.end(table.get(prediction.id) or prediction, Status.CANCELED, None, clock.now())
        deleted = table.request_delete(prediction.id, clock.now())
        assert deleted is not None
        table.delete_data(deleted, clock.now())
        assert self.kept(prediction) == []

    def kept(self, prediction: Prediction) -> list[str]:
        """The contents of everything that is kept of a prediction, beside its status."""
        found = [item for item in items("") if item["pk"] == f"prediction#{prediction.id}" and item["sk"] != "status"]
        s3 = clients.client("s3")
        listed = s3.list_objects_v2(Bucket="outputs").get("Contents", [])
        bodies = [s3.get_object(Bucket="outputs", Key=each["Key"])["Body"].read().decode() for each in listed]
        return [json.dumps(item, default=str) for item in found] + bodies

    @pytest.mark.parametrize("large", [False, True])
    @pytest.mark.parametrize("again", ["delivered", "redriven", "its key"])
    def test_message_that_comes_again_stores_nothing(
        self, function: Function, table: PredictionsTable, clock: Clock, large: bool, again: str
    ) -> None:
        prompt = self.LARGE if large else "secret"
        body = {**BODY, "input": {"prompt": prompt}, "idempotency_key": "k"}
        prediction = function._app.requests.take(message(body))
        self.delete(table, prediction, clock)
        repeated = {
            "delivered": record(body),
            "redriven": DeadRequest("message-1", "AIDANOBODY00", SENT, "", json.dumps(body), "").event()["Records"][0],
            "its key": record(body, id="message-2"),
        }[again]
        assert function(repeated) == []
        assert self.kept(prediction) == []

    @pytest.mark.parametrize("large", [False, True])
    def test_input_that_is_written_while_its_prediction_is_deleted_is_emptied(
        self, requests: Requests, table: PredictionsTable, clock: Clock, large: bool
    ) -> None:
        body = {**BODY, "input": {"prompt": self.LARGE if large else "secret"}}

        def start_and_delete() -> None:
            started = requests.take(message(body))
            assert started is not None
            self.delete(table, started, clock)

        with meanwhile("PutItem", start_and_delete):
            prediction = requests.take(message(body))
        assert prediction is not None
        assert not any("secret" in each for each in self.kept(prediction))
        # What is left holds nothing, and goes with the last look.
        clock.advance(1021)
        table.delete_data(table.get(prediction.id) or prediction, clock.now())
        assert self.kept(prediction) == []

    def test_state_that_waits_for_a_deleted_one_is_told_at_once(
        self, function: Function, table: PredictionsTable, clock: Clock, wakes: Wakes
    ) -> None:
        prediction = function._app.requests.take(message(BODY))
        self.delete(table, prediction, clock)
        assert function(record({**BODY, "task_token": "token"})) == []
        caller = next(item for item in items("caller#"))
        keys = {"pk": {"S": caller["pk"]}, "sk": {"S": caller["sk"]}}
        image = keys | {"task_token": {"S": "token"}}
        change = {"Keys": keys, "NewImage": image, "SequenceNumber": "1", "ApproximateCreationDateTime": 1}
        with pytest.MonkeyPatch.context() as only_here:
            for name, value in ENVIRONMENT.items():
                only_here.setenv(name, value)
            changes = Changes.from_env()
        assert changes.publish([{"dynamodb": change, "eventName": "INSERT"}]) is None
        assert [(token, error) for token, (error, _) in wakes.told] == [("token", "PredictionCanceled")]


class TestOwners:
    @pytest.mark.parametrize("owner", ["payloads", "-x", "", "Alice", "a" * 33])
    @pytest.mark.parametrize("variable", ["QUEUE_OWNER", "QUEUE_SENDERS"])
    def test_owner_that_cannot_be_one_is_refused_before_any_message(
        self, cloud: None, monkeypatch: pytest.MonkeyPatch, variable: str, owner: str
    ) -> None:
        monkeypatch.setenv(
            variable, owner if variable == "QUEUE_OWNER" else f"AROAALICE0000=alice,AROABOB000000={owner}"
        )
        with pytest.raises(ValueError, match=rf"The owner '{owner}' in {variable} must be"):
            Requests.from_env()


class TestDeadRequests:
    def test_message_that_is_put_back_by_its_event_is_the_same_request(
        self, function: Function, executed: Executed
    ) -> None:
        refused = record({**BODY, "webhook": "http://127.0.0.1:8000/"}, id="m-1")
        assert function(refused) == []
        (letter,) = look()
        function._app.requests._allow_loopback_webhooks = True
        for _ in range(2):
            assert function(*letter.event()["Records"]) == []
        assert len(executed.inputs) == 1
        assert function(refused) == []
        assert len(executed.inputs) == 1

    def test_message_that_sqs_moved_is_known_by_its_own_id_whatever_its_sender_wrote(self, cloud: None) -> None:
        sqs = clients.client("sqs")
        dead_url = "https://sqs.us-east-1.amazonaws.com/123456789012/dead-requests"
        arn = sqs.get_queue_attributes(QueueUrl=dead_url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        redrive = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 1})
        url = sqs.create_queue(QueueName="read-once", Attributes={"RedrivePolicy": redrive})["QueueUrl"]
        written = {"sender": "AROAALICE0000", "reason": "none", "sent_at": "9" * 5000}
        sent = sqs.send_message(
            QueueUrl=url,
            MessageBody="{}",
            MessageAttributes={n: {"DataType": "String", "StringValue": v} for n, v in written.items()},
        )["MessageId"]
        for _ in range(2):
            sqs.receive_message(QueueUrl=url, VisibilityTimeout=0)
        (letter,) = look()
        assert (letter.id, letter.reason) == (sent, "start_from_queue failed each time. See its log.")
        assert letter.sender != "AROAALICE0000"

    @pytest.mark.parametrize(
        ("body", "told", "kept", "reason"),
        [
            (
                '{"source": "shop", "id": "e-1"}',
                {"RULE_ARN": f"arn:aws:events:us-east-1:123456789012:rule/bus/stack-recipe-{'a' * 26}"},
                {"recipe_id": "a" * 26, "event": {"source": "shop", "id": "e-1"}},
                "EventBridge could not deliver it; redrive it (NO_PERMISSIONS: denied)",
            ),
            (
                json.dumps({"recipe_id": "b" * 26, "event": {}}),
                {"SCHEDULE_ARN": "arn:aws:scheduler:us-east-1:123456789012:schedule/stack/x"},
                {"recipe_id": "b" * 26, "event": {}},
                "EventBridge could not deliver it; redrive it (NO_PERMISSIONS: denied)",
            ),
            (
                '{"id": "e-1"}',
                {"RULE_ARN": "arn:aws:events:us-east-1:123456789012:rule/another"},
                {"id": "e-1"},
                "EventBridge could not deliver it, and no rule of a recipe matches (NO_PERMISSIONS)",
            ),
            (
                MANIFEST_CREATED,
                {"RULE_ARN": "arn:aws:events:us-east-1:123456789012:rule/stack-ManifestsRule-1ABC"},
                {"batch_manifest": json.loads(MANIFEST_CREATED)},
                "EventBridge could not deliver it; redrive it (NO_PERMISSIONS: denied)",
            ),
            (
                MANIFEST_CREATED.replace("batches/", "in/"),
                {"RULE_ARN": "arn:aws:events:us-east-1:123456789012:rule/another"},
                json.loads(MANIFEST_CREATED.replace("batches/", "in/")),
                "EventBridge could not deliver it, and no rule of a recipe matches (NO_PERMISSIONS)",
            ),
            (
                '{"source": "aws.s3", "detail-type": "Object Created", "detail": []}',
                {"RULE_ARN": "arn:aws:events:us-east-1:123456789012:rule/another"},
                {"source": "aws.s3", "detail-type": "Object Created", "detail": []},
                "EventBridge could not deliver it, and no rule of a recipe matches (NO_PERMISSIONS)",
            ),
            (
                "[]",
                {"RULE_ARN": f"arn:aws:events:us-east-1:123456789012:rule/stack-recipe-{'a' * 26}"},
                [],
                "EventBridge could not deliver it, and no rule of a recipe matches (NO_PERMISSIONS)",
            ),
        ],
        ids=["rule", "schedule", "another rule", "manifest", "no manifest", "no object", "no event"],
    )
    def test_message_that_eventbridge_could_not_send_is_put_back_as_what_it_would_have_sent(
        self, cloud: None, body: str, told: dict[str, str], kept: Any, reason: str
    ) -> None:
        attributes = {"ERROR_CODE": "NO_PERMISSIONS", "ERROR_MESSAGE": "denied", "TARGET_ARN": "arn:aws:sqs:x", **told}
        clients.client("sqs").send_message(
            QueueUrl="https://sqs.us-east-1.amazonaws.com/123456789012/dead-requests",
            MessageBody=body,
            MessageAttributes={n: {"DataType": "String", "StringValue": v} for n, v in attributes.items()},
        )
        (letter,) = look()
        assert (letter.reason, json.loads(letter.body)) == (reason, kept)
        (put_back,) = letter.event()["Records"]
        assert json.loads(put_back["body"]) == kept

    @pytest.mark.parametrize("reason", ["", "a\x00b", "x" * 100_000, "\ufffe", "é\n"])
    def test_any_reason_can_be_kept(self, cloud: None, reason: str) -> None:
        DeadRequests.from_env().send(message("{"), reason)
        (letter,) = look()
        assert letter.reason
        assert len(letter.reason) <= 2000
