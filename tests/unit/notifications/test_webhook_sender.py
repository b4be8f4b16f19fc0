"""Sending webhooks: to whom, signed how, what counts as success, and what becomes of the rest."""

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpcore
import httpx
import pytest
from botocore.exceptions import ClientError
from predictions.aws import clients
from predictions.files.output_references import StoredFile
from predictions.files.outputs_bucket import OutputsBucket
from predictions.net.client import guarded_client
from predictions.notifications.signing_secrets import OwnerSecrets, SecretVersions
from predictions.notifications.webhook_order import WebhookOrder
from predictions.notifications.webhook_queue import DeadLetters, DeliveriesQueue, Delivery, deliveries_of
from predictions.notifications.webhook_sender import Receivers
from predictions.notifications.webhook_slots import WebhookSlots
from predictions.observability import metrics
from predictions.store.predictions import PredictionsTable
from predictions.views.prediction import Presenter
from standardwebhooks import Webhook

from tests.support.apps import AwsCalls
from tests.support.fakes import Clock, refusing
from tests.support.hosts import ENDED, endless, head, hostile_host
from tests.support.predictions import FILE, put, told
from tests.support.webhook_queue import hook, stream, waiting

HOOK = "https://hooks.example.com/replicate?job=7"
ALL = ["start", "output", "logs", "completed"]
QUEUE = "https://sqs.us-east-1.amazonaws.com/123456789012/deliveries"

Answer = Callable[[httpx.Request], httpx.Response]


class Sent:
    """A receiver in process: what it was sent, and how it answers."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answer: Answer = lambda _: httpx.Response(200)

    def client(self, **options: Any) -> httpx.Client:
        assert options["allowed_origins"] == []
        return httpx.Client(transport=httpx.MockTransport(self._receive))

    def _receive(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        answer = self.answer(request)
        # As it comes over the network: not read yet.
        return httpx.Response(answer.status_code, headers=answer.headers, stream=httpx.ByteStream(answer.content))

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.requests]


@pytest.fixture
def sent() -> Sent:
    return Sent()


@pytest.fixture
def secrets(cloud: None) -> OwnerSecrets:
    return OwnerSecrets.from_env()


@pytest.fixture
def make(table: PredictionsTable, outputs: OutputsBucket, secrets: OwnerSecrets, clock: Clock) -> Any:
    def make(open_client: Callable[..., httpx.Client], **options: Any) -> Receivers:
        return Receivers(
            table,
            Presenter(outputs, 3600),
            secrets,
            DeliveriesQueue.from_env(),
            DeadLetters.from_env(),
            WebhookSlots.from_env(),
            WebhookOrder.from_env(),
            open_client=open_client,
            now=clock.now,
            jitter=lambda: 0.5,
            **{"allow_loopback": False, **options},
        )

    return make


@pytest.fixture
def receivers(make: Any, sent: Sent) -> Receivers:
    found: Receivers = make(sent.client)
    return found


def ended(table: PredictionsTable, clock: Clock, status: str = "succeeded", **more: Any) -> str:
    prediction = put(table, clock, webhook=HOOK, webhook_events_filter=ALL)
    table.merge(prediction.id, told(status, **{"output": "text", "logs": "log", **more}), clock.now())
    return prediction.id


def queued(clock: Clock, prediction_id: str, event: str = "completed", n: int = 1) -> tuple[Delivery, str]:
    """A delivery that is due now, received from its queue."""
    delivery = Delivery(prediction_id, event, n, int(clock.now()))
    DeliveriesQueue.from_env().send(delivery)
    (message,) = clients.client("sqs").receive_message(QueueUrl=QUEUE, VisibilityTimeout=1)["Messages"]
    return delivery, message["ReceiptHandle"]


def redirect(_: httpx.Request) -> httpx.Response:
    return httpx.Response(302, headers={"location": "https://elsewhere.example.com/"})


def broken(kind: type[httpx.HTTPError]) -> Answer:
    def answer(_: httpx.Request) -> httpx.Response:
        raise kind("broken")

    return answer


# -- what is not delivered -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.7", "169.254.169.254", "::1", "fd00:ec2::254", "100.64.0.1"])
def test_address_that_is_private_when_it_is_dialled_is_never_called(
    table: PredictionsTable, clock: Clock, make: Any, address: str
) -> None:
    class Network(httpcore.NetworkBackend):
        def connect_tcp(self, *_: Any, **__: Any) -> httpcore.NetworkStream:
            raise AssertionError("dialled")

    def open_client(**options: Any) -> httpx.Client:
        return guarded_client(**{**options, "resolve": lambda *_: [address], "network": Network()})

    prediction_id = ended(table, clock)
    assert make(open_client).deliver(*queued(clock, prediction_id)), "trying again is of no use"
    (letter,) = waiting("dead-deliveries")
    assert (letter["id"], letter["reason"]) == (prediction_id, "the address leads to a private or reserved address")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "http://localhost:9/", "http://hooks.example.com/"])
def test_plain_http_is_never_called_where_loopback_is_not_allowed(
    table: PredictionsTable, clock: Clock, make: Any, url: str
) -> None:
    prediction_id = ended(table, clock)
    hook(prediction_id, url)
    assert make(guarded_client).deliver(*queued(clock, prediction_id))
    assert waiting("dead-deliveries")[0]["reason"] == "the address must start with https://"


@pytest.mark.parametrize("url", ["http://10.0.0.1/", "http://hooks.example.com/"])
def test_loopback_that_is_allowed_allows_nothing_else(
    table: PredictionsTable, clock: Clock, make: Any, url: str
) -> None:
    prediction_id = ended(table, clock)
    hook(prediction_id, url)
    assert make(guarded_client, allow_loopback=True).deliver(*queued(clock, prediction_id))
    assert waiting("dead-deliveries")[0]["reason"] == "the address must start with https://"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda _: httpx.Response(400), "responded with 400"),
        (lambda _: httpx.Response(404), "responded with 404"),
        (lambda _: httpx.Response(429), "responded with 429"),
        (lambda _: httpx.Response(500, text="secret of the receiver"), "responded with 500"),
        (lambda _: httpx.Response(503), "responded with 503"),
        (lambda _: httpx.Response(304), "responded with 304"),
        (redirect, "responded with 302"),
        (broken(httpx.ConnectTimeout), "ConnectTimeout"),
        (broken(httpx.ConnectError), "ConnectError"),
        (broken(httpx.ReadTimeout), "ReadTimeout"),
        (broken(httpx.RemoteProtocolError), "RemoteProtocolError"),
    ],
)
def test_receiver_that_fails_is_called_again_and_in_the_end_given_up_with_the_reason(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent, answer: Answer, reason: str
) -> None:
    sent.answer = answer
    delivery, handle = queued(clock, ended(table, clock))
    assert not receivers.deliver(delivery, handle)
    assert waiting("deliveries") == [], "the message is hidden until the next try"
    clock.advance(24 * 3600 - 1)
    assert not receivers.deliver(delivery, handle)
    assert waiting("dead-deliveries") == []
    clock.advance(1)
    assert receivers.deliver(delivery, handle)
    assert waiting("dead-deliveries") == [{**json.loads(delivery.message()), "reason": reason}]
    assert [r.url for r in sent.requests] == [httpx.URL(HOOK)] * 3, "a redirect is not followed"
    assert len({r.headers["webhook-id"] for r in sent.requests}) == 1
    assert len({r.headers["webhook-timestamp"] for r in sent.requests}) == 3
    assert "DeliveriesFailed" in metrics.metric_set


@pytest.mark.parametrize("event", ["start", "output", "logs"])
def test_event_of_a_running_prediction_is_given_up_after_a_minute(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent, event: str
) -> None:
    prediction = put(table, clock, webhook=HOOK, webhook_events_filter=ALL)
    table.merge(prediction.id, told("processing", output="te", logs="l"), clock.now())
    sent.answer = lambda _: httpx.Response(500)
    delivery, handle = queued(clock, prediction.id, event)
    clock.advance(59)
    assert not receivers.deliver(delivery, handle)
    clock.advance(1)
    assert receivers.deliver(delivery, handle)
    assert waiting("dead-deliveries") == [], "only the end is kept"


def test_receiver_that_is_gone_is_not_called_again(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent
) -> None:
    sent.answer = lambda _: httpx.Response(410)
    assert receivers.deliver(*queued(clock, ended(table, clock)))
    assert waiting("dead-deliveries") == []


def test_prediction_that_is_gone_or_has_no_webhook_is_told_to_nobody(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent
) -> None:
    assert receivers.deliver(*queued(clock, "z" * 26))
    assert receivers.deliver(*queued(clock, put(table, clock).id))
    assert sent.requests == []


def test_end_that_is_not_there_is_not_told(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent
) -> None:
    prediction = put(table, clock, webhook=HOOK)
    table.merge(prediction.id, told("succeeded", output=FILE), clock.now())
    assert receivers.deliver(*queued(clock, prediction.id)), "its files are not stored"
    assert sent.requests == []


@pytest.mark.parametrize("event", ["start", "output", "logs"])
def test_late_event_is_left_out_once_the_end_tells_more(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent, event: str
) -> None:
    delivery, handle = queued(clock, ended(table, clock), event)
    clock.advance(5)
    assert receivers.deliver(delivery, handle)
    assert sent.requests == []


# -- what is -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_end_is_sent_as_the_api_shows_it(
    table: PredictionsTable,
    clock: Clock,
    receivers: Receivers,
    sent: Sent,
    outputs: OutputsBucket,
    secrets: OwnerSecrets,
    status: int,
) -> None:
    sent.answer = lambda _: httpx.Response(status)
    prediction_id = ended(table, clock)
    assert receivers.deliver(*queued(clock, prediction_id))
    whole = table.read(prediction_id)
    assert whole is not None
    assert sent.bodies == [Presenter(outputs, 3600).show(whole)]
    assert sent.bodies[0]["status"] == "succeeded"
    (request,) = sent.requests
    assert (request.method, str(request.url)) == ("POST", HOOK)
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-id"] == f"{prediction_id}-completed-1"
    assert "authorization" not in request.headers


def test_signature_is_one_that_the_published_library_verifies(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent, secrets: OwnerSecrets
) -> None:
    clock.moment = time.time()  # the library asks the system for the time
    old = secrets.current_secret("alice")
    assert receivers.deliver(*queued(clock, ended(table, clock)))
    SecretVersions.from_env().rotate("alice", clock.now())
    new = secrets.current_secret("alice")
    assert receivers.deliver(*queued(clock, ended(table, clock, status="failed")))
    before, after = sent.requests
    for secret, request in ((old, before), (old, after), (new, after)):
        Webhook(secret).verify(request.content, dict(request.headers))
    assert [len(r.headers["webhook-signature"].split(" ")) for r in sent.requests] == [1, 2]


def test_only_the_end_shows_an_end(table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent) -> None:
    prediction_id = ended(table, clock, status="failed", error="no paint")
    for event in ALL:
        assert receivers.deliver(*queued(clock, prediction_id, event))
    assert [(b["status"], b.get("output"), b["logs"], b["error"]) for b in sent.bodies] == [
        ("processing", None, "", None),
        ("processing", "text", "log", None),
        ("processing", "text", "log", None),
        ("failed", "text", "log", "no paint"),
    ]
    assert [bool(b.get("completed_at")) for b in sent.bodies] == [False, False, False, True]
    # As an open one is shown: without what it does not have yet.
    ending = {"completed_at", "metrics", "cost"}
    assert [ending & b.keys() for b in sent.bodies] == [set(), set(), set(), ending]
    assert ["output" in b for b in sent.bodies] == [False, True, True, True]
    assert [b["upstream_status"] for b in sent.bodies] == ["processing", "processing", "processing", "failed"]


@pytest.mark.parametrize(
    ("output", "logs", "expected"),
    [
        ("text", "log", ["output", "logs"]),
        ("text", "", ["output"]),
        (None, "log", ["logs"]),
        (None, "", []),
    ],
)
def test_end_tells_output_and_logs_that_there_are_to_those_who_want_nothing_else(
    table: PredictionsTable,
    clock: Clock,
    receivers: Receivers,
    sent: Sent,
    output: str | None,
    logs: str,
    expected: list[str],
) -> None:
    prediction = put(table, clock, webhook=HOOK, webhook_events_filter=["output", "logs"])
    table.merge(prediction.id, told("succeeded", output=output, logs=logs), clock.now())
    for record in stream():
        for delivery in deliveries_of(record):
            clock.moment = delivery.first_at + 30  # late, and nothing else tells it
            assert receivers.deliver(*queued(clock, delivery.id, delivery.event, delivery.n))
    assert [request.headers["webhook-id"].split("-")[1] for request in sent.requests] == expected
    for body in sent.bodies:
        assert (body["status"], body.get("output"), body["logs"]) == ("processing", output, logs)
        assert ("output" in body) == (output is not None)


def test_output_of_files_is_told_with_our_urls_only(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent
) -> None:
    prediction = put(table, clock, webhook=HOOK)
    table.merge(prediction.id, told("processing", output=[FILE]), clock.now())
    assert receivers.deliver(*queued(clock, prediction.id, "output", 30))
    assert sent.requests == [], "its files are upstream's still"
    whole = table.merge(prediction.id, told("succeeded", output=[FILE]), clock.now()).prediction
    assert whole is not None
    table.end_copy(whole, [StoredFile(path="/0", index=0, key="alice/x/y/0", bytes=1)], clock.now())
    assert receivers.deliver(*queued(clock, prediction.id, "output", 0))
    (body,) = sent.bodies
    assert body["status"] == "processing"
    assert "alice/x/y/0" in body["output"][0]
    assert FILE not in json.dumps(body)


# -- their order ---------------------------------------------------------------------------------------------------


def running(table: PredictionsTable, clock: Clock, events: list[str] | None = None) -> str:
    return put(table, clock, webhook=HOOK, webhook_events_filter=events or ALL).id


def grow(table: PredictionsTable, clock: Clock, prediction_id: str, output: str, status: str = "processing") -> None:
    table.merge(prediction_id, told(status, output=output, logs=""), clock.now())


def ids(sent: Sent) -> list[str]:
    """What was sent, by the ends of the webhook-ids."""
    return [request.headers["webhook-id"].partition("-")[2] for request in sent.requests]


@pytest.mark.parametrize("event", ["start", "output", "logs"])
@pytest.mark.parametrize("n", [0, 4])
def test_webhook_that_comes_after_the_completion_is_left_out(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent, event: str, n: int
) -> None:
    prediction_id = ended(table, clock)
    late = queued(clock, prediction_id, event, n)
    assert receivers.deliver(*queued(clock, prediction_id))
    assert receivers.deliver(*late), "in the same second: the deliveries queue keeps no order"
    assert ids(sent) == ["completed-1"]


def test_retry_that_is_due_after_the_completion_is_left_out_also_if_that_is_not_accepted(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent
) -> None:
    prediction_id = running(table, clock)
    grow(table, clock, prediction_id, "one")
    sent.answer = lambda _: httpx.Response(500)
    first = queued(clock, prediction_id, "output", 30)
    assert not receivers.deliver(*first)
    grow(table, clock, prediction_id, "one two", "succeeded")
    completed = queued(clock, prediction_id)
    assert not receivers.deliver(*completed)
    clock.advance(1)
    sent.answer = lambda _: httpx.Response(200)
    assert receivers.deliver(*first)
    assert receivers.deliver(*completed)
    assert ids(sent) == ["output-30", "completed-1", "completed-1"]


def test_content_that_was_sent_is_not_sent_by_a_later_webhook(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent
) -> None:
    prediction_id = running(table, clock)
    grow(table, clock, prediction_id, "one")
    first = queued(clock, prediction_id, "output", 30)
    grow(table, clock, prediction_id, "one two")
    second = queued(clock, prediction_id, "output", 34)
    assert receivers.deliver(*first)
    assert receivers.deliver(*second)
    assert [body["output"] for body in sent.bodies] == ["one two"], "the first one has shown it already"
    grow(table, clock, prediction_id, "one two three")
    assert receivers.deliver(*queued(clock, prediction_id, "output", 40))
    assert [body["output"] for body in sent.bodies] == ["one two", "one two three"]
    assert ids(sent) == ["output-30", "output-40"]


def test_completion_that_tells_output_and_logs_does_not_repeat_them(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent
) -> None:
    prediction_id = running(table, clock, ["output", "logs"])
    table.merge(prediction_id, told("processing", output="all", logs="l"), clock.now())
    assert receivers.deliver(*queued(clock, prediction_id, "output", 30))
    table.merge(prediction_id, told("succeeded", output="all", logs="logs"), clock.now())
    for event in ("output", "logs"):
        assert receivers.deliver(*queued(clock, prediction_id, event, 0))
    assert ids(sent) == ["output-30", "logs-0"]


def test_content_that_a_receiver_did_not_accept_is_sent_by_a_later_webhook(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent
) -> None:
    prediction_id = running(table, clock, ["output"])
    grow(table, clock, prediction_id, "all")
    first = queued(clock, prediction_id, "output", 30)
    sent.answer = lambda _: httpx.Response(503)
    assert not receivers.deliver(*first)
    grow(table, clock, prediction_id, "all", "succeeded")
    assert not receivers.deliver(*queued(clock, prediction_id, "output", 0))
    sent.answer = lambda _: httpx.Response(200)
    assert receivers.deliver(*first), "the later one tells it"
    assert receivers.deliver(*queued(clock, prediction_id, "output", 0))
    assert ids(sent) == ["output-30", "output-0", "output-0"]


def test_webhooks_in_the_other_order_show_the_output_once(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent
) -> None:
    prediction_id = running(table, clock)
    grow(table, clock, prediction_id, "one two")
    assert receivers.deliver(*queued(clock, prediction_id, "output", 34))
    grow(table, clock, prediction_id, "one two three")
    assert receivers.deliver(*queued(clock, prediction_id, "output", 30)), "the growth has a webhook of its own"
    assert receivers.deliver(*queued(clock, prediction_id, "output", 40))
    assert ids(sent) == ["output-34", "output-40"]


def test_retry_is_the_same_webhook_or_none(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent
) -> None:
    prediction_id = running(table, clock)
    grow(table, clock, prediction_id, "one")
    first = queued(clock, prediction_id, "output", 30)
    sent.answer = lambda _: httpx.Response(500)
    assert not receivers.deliver(*first)
    sent.answer = lambda _: httpx.Response(200)
    assert receivers.deliver(*first), "also after a crash between the record and the request"
    assert (ids(sent), sent.bodies[0] == sent.bodies[1]) == (["output-30"] * 2, True)
    grow(table, clock, prediction_id, "one two")
    assert receivers.deliver(*first), "a receiver that knows its id would ignore the new content"
    assert receivers.deliver(*queued(clock, prediction_id, "output", 34))
    assert ids(sent) == ["output-30"] * 2 + ["output-34"]


def test_webhook_whose_record_fails_is_not_sent_and_stays(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent
) -> None:
    prediction_id = running(table, clock)
    grow(table, clock, prediction_id, "one")
    first = queued(clock, prediction_id, "output", 30)
    with refusing("UpdateItem", "AccessDeniedException", service="dynamodb"), pytest.raises(ClientError):
        receivers.deliver(*first)
    assert sent.requests == []
    assert receivers.deliver(*first)
    assert ids(sent) == ["output-30"]


def test_webhook_that_an_operator_sends_again_is_sent_after_the_completion(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent
) -> None:
    prediction_id = ended(table, clock)
    assert receivers.deliver(*queued(clock, prediction_id))
    delivery, handle = queued(clock, prediction_id, "output", 0)
    assert receivers.deliver(Delivery.read(replace(delivery, again=True).message()), handle)
    assert ids(sent) == ["completed-1", "output-0"]


def test_caller_of_completions_alone_costs_no_write(
    table: PredictionsTable, clock: Clock, receivers: Receivers, sent: Sent
) -> None:
    prediction_id = running(table, clock, ["completed"])
    grow(table, clock, prediction_id, "one", "succeeded")
    calls = AwsCalls()
    assert receivers.deliver(*queued(clock, prediction_id))
    assert ids(sent) == ["completed-1"]
    assert "dynamodb.UpdateItem" not in calls.made


def test_prediction_of_an_id_that_was_used_before_has_its_own_record(table: PredictionsTable, clock: Clock) -> None:
    prediction = put(table, clock, webhook=HOOK)
    order, output = WebhookOrder.from_env(), Delivery(prediction.id, "output", 30, 0)
    assert order.begin(prediction, replace(output, event="completed"), None, clock.now())
    assert not order.begin(prediction, output, "one", clock.now())
    assert order.begin(replace(prediction, created=prediction.created + 9), output, "one", clock.now())


# -- receivers that mean no good -----------------------------------------------------------------------------------


POUR = endless(b"x" * 65536, start=head("Content-Type: text/plain"))


def drip(connection: socket.socket) -> None:
    # Each byte comes in time; all of them take longer than any try may.
    for byte in b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 1_000:
        connection.sendall(bytes([byte]))
        ENDED.wait(0.02)


def test_name_server_without_answer_ends_the_try_in_time_and_the_delivery_is_tried_again(
    table: PredictionsTable, clock: Clock, make: Any
) -> None:
    over = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        over.wait(30)
        return ["1.1.1.1"]

    def open_client(**options: Any) -> httpx.Client:
        return guarded_client(**{**options, "resolve": resolve})

    started = time.monotonic()
    try:
        receivers = make(open_client, total_seconds=0.3)
        assert not receivers.deliver(*queued(clock, ended(table, clock)))
        assert time.monotonic() - started < 5, "the scaled bound: 10 s are 0.3 s here"
    finally:
        over.set()


def test_answer_without_end_is_not_read(table: PredictionsTable, clock: Clock, make: Any) -> None:
    prediction_id = ended(table, clock)
    with hostile_host({"": POUR}) as host:
        hook(prediction_id, host.origin)
        assert make(guarded_client, allow_loopback=True).deliver(*queued(clock, prediction_id))


def test_answer_that_comes_byte_by_byte_is_cut_off(table: PredictionsTable, clock: Clock, make: Any) -> None:
    prediction_id = ended(table, clock)
    with hostile_host({"": drip}) as host:
        hook(prediction_id, host.origin)
        # On a busy machine, the time may be over before the request is sent: then more of it is needed.
        for total_seconds in (0.4, 2, 10):
            started = time.monotonic()
            receivers = make(guarded_client, allow_loopback=True, total_seconds=total_seconds)
            assert not receivers.deliver(*queued(clock, prediction_id))
            assert time.monotonic() - started < total_seconds + 5
            if host.asked:
                break
        assert host.asked
