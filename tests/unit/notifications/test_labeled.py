"""Labels and traces of predictions, from the request to whoever is notified; and webhooks of batches and pipelines."""

import json
from typing import Any

import httpx
import pytest
from predictions.aws import clients
from predictions.batches.prepare import prepare
from predictions.batches.store import event_of as batch_event_of
from predictions.batches.view import show_batch
from predictions.errors import Problem
from predictions.files.outputs_bucket import OutputsBucket
from predictions.net.signatures import sign
from predictions.notifications.event_bus import event_of_prediction
from predictions.notifications.signing_secrets import OwnerSecrets
from predictions.notifications.webhook_order import WebhookOrder
from predictions.notifications.webhook_queue import (
    DeadLetters,
    DeliveriesQueue,
    Delivery,
    UnreadableDelivery,
    deliveries_of,
)
from predictions.notifications.webhook_sender import Receivers
from predictions.notifications.webhook_slots import WebhookSlots
from predictions.pipelines.steps import event_of as pipeline_event_of
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Filters
from predictions.views.prediction import Presenter

from tests.support.batches import LLAMA
from tests.support.batches import World as BatchWorld
from tests.support.batches import world as batch_world
from tests.support.fakes import VERSION, Clock, Executed, ReplicateInMemory
from tests.support.pipelines import IMAGE
from tests.support.pipelines import World as PipelineWorld
from tests.support.pipelines import world as pipeline_world
from tests.support.predictions import put, told, wanted
from tests.support.protocol import Submissions
from tests.support.requests import Function, function, items, look, record, requests
from tests.support.webhook_queue import stream, waiting

__all__ = ["batch_world", "function", "pipeline_world", "requests"]  # fixtures

HOOK = "https://hooks.example.com/7"
QUEUE = "https://sqs.us-east-1.amazonaws.com/123456789012/deliveries"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
LABELS = {"team": "vision"}
HEADERS = {"x-labels": "team=vision", "traceparent": TRACE}


class Receiver:
    """A receiver of webhooks in process."""

    def __init__(self) -> None:
        self.sent: list[httpx.Request] = []
        self.status = 200

    def client(self, **_: Any) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self._receive))

    def _receive(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.sent.append(request)
        # As it comes over the network: not read yet.
        return httpx.Response(self.status, stream=httpx.ByteStream(b""))


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
def receivers(table: PredictionsTable, outputs: OutputsBucket, clock: Clock, receiver: Receiver) -> Receivers:
    return Receivers(
        table,
        Presenter(outputs, 3600),
        OwnerSecrets.from_env(),
        DeliveriesQueue.from_env(),
        DeadLetters.from_env(),
        WebhookSlots.from_env(),
        WebhookOrder.from_env(),
        open_client=receiver.client,
        now=clock.now,
        jitter=lambda: 0.5,
        allow_loopback=False,
    )


def deliver(receivers: Receivers, delivery: Delivery) -> bool:
    DeliveriesQueue.from_env().send(delivery)
    (message,) = clients.client("sqs").receive_message(QueueUrl=QUEUE, VisibilityTimeout=1)["Messages"]
    assert Delivery.read(message["Body"]) == delivery
    return receivers.deliver(delivery, message["ReceiptHandle"])


def of(kind: str) -> list[Delivery]:
    """What the table's stream calls for, each record read twice."""
    found = [list(deliveries_of(each)) for each in stream() for _ in range(2)]
    assert found[::2] == found[1::2]
    return [each for some in found[::2] for each in some if each.kind == kind]


# -- predictions ----------------------------------------------------------------------------------------------------


def test_labels_and_trace_are_kept_shown_and_never_sent_to_replicate(
    submissions: Submissions, table: PredictionsTable, outputs: OutputsBucket, replicate: ReplicateInMemory,
    executed: Executed,
) -> None:  # fmt: skip
    plain = submissions.start(wanted())
    sent_before, headers_before = replicate.asked[-1].content, set(replicate.asked[-1].headers)
    labeled = submissions.start(wanted(headers=HEADERS))
    assert replicate.asked[-1].content.replace(labeled.id.encode(), plain.id.encode()) == sent_before
    assert set(replicate.asked[-1].headers) == headers_before

    whole, bare = table.read(labeled.id), table.read(plain.id)
    assert whole
    assert bare
    assert Presenter(outputs, 60).show(whole)["labels"] == LABELS
    assert "labels" not in Presenter(outputs, 60).show(bare)
    assert {"labels", "traceparent"}.isdisjoint(next(each for each in items("status") if each["id"] == plain.id))
    assert executed.inputs[f"{labeled.id}-1"]["traceparent"] == TRACE
    assert "traceparent" not in executed.inputs[f"{plain.id}-1"]


def test_repeated_request_with_other_labels_finds_the_prediction_with_the_first_ones(submissions: Submissions) -> None:
    first = submissions.start(wanted(key="one", headers=HEADERS))
    again = submissions.start(wanted(key="one", headers={"x-labels": "team=other"}))
    assert (again.id, again.labels, again.traceparent) == (first.id, LABELS, TRACE)


def test_event_has_labels_and_trace(table: PredictionsTable, submissions: Submissions) -> None:
    labeled, plain = submissions.start(wanted(headers=HEADERS)), submissions.start(wanted())
    detail = event_of_prediction(labeled, [], "outputs", 0).detail
    assert (detail["labels"], detail["traceparent"]) == (LABELS, TRACE)
    assert {"labels", "traceparent"}.isdisjoint(event_of_prediction(plain, [], "outputs", 0).detail)


def test_list_is_narrowed_by_a_label(table: PredictionsTable, submissions: Submissions) -> None:
    labeled = submissions.start(wanted(headers=HEADERS))
    submissions.start(wanted(headers={"x-labels": "team=other"}))
    submissions.start(wanted())
    page = table.list("alice", None, older=True, size=10, filters=Filters(label=("team", "vision")))
    assert [each.prediction.id for each in page.predictions] == [labeled.id]


def test_webhook_has_the_labels_in_its_body_and_the_trace_in_its_header(
    table: PredictionsTable, clock: Clock, submissions: Submissions, receivers: Receivers, receiver: Receiver
) -> None:
    labeled = submissions.start(wanted(headers=HEADERS, webhook=HOOK))
    plain = put(table, clock, webhook=HOOK)
    for prediction in (labeled, plain):
        table.merge(prediction.id, told("failed", prediction.upstream_id or "u" * 26), clock.now())
        assert deliver(receivers, Delivery(prediction.id, "completed", 1, int(clock.now())))
    first, second = receiver.sent
    assert (json.loads(first.content)["labels"], first.headers["traceparent"]) == (LABELS, TRACE)
    assert "labels" not in json.loads(second.content)
    assert "traceparent" not in second.headers


# -- messages -------------------------------------------------------------------------------------------------------


def test_message_has_labels_and_its_trace_as_member_or_attribute(function: Function, executed: Executed) -> None:
    request: dict[str, Any] = {"version": VERSION, "input": {}, "labels": LABELS}
    other = TRACE.replace("b7ad", "cafe")
    assert not function(record({**request, "traceparent": TRACE}, id="a", traceparent=other))
    assert not function(record(request, id="b", traceparent=other), record(request, id="c", traceparent="nonsense"))
    found = {each["id"]: (each["labels"], each.get("traceparent")) for each in items("status")}
    assert sorted(found.values(), key=repr) == sorted([(LABELS, TRACE), (LABELS, other), (LABELS, None)], key=repr)
    assert {each.get("traceparent") for each in executed.inputs.values()} == {TRACE, other, None}


def test_message_with_bad_labels_is_a_dead_letter_that_keeps_its_trace(function: Function) -> None:
    bad = {"version": VERSION, "input": {}, "labels": {f"k{n}": "v" for n in range(11)}}
    assert not function(record(bad, traceparent=TRACE))
    (letter,) = look()
    assert "labels: Exceeds the limit of 10 labels (got 11)." in letter.reason
    assert letter.event()["Records"][0]["messageAttributes"] == {"traceparent": {"stringValue": TRACE}}
    assert items("status") == []


# -- batches --------------------------------------------------------------------------------------------------------


def ended_batch(world: BatchWorld, replicate: ReplicateInMemory, **fields: Any) -> Any:
    batch = world.prepared(LLAMA, **fields)
    for prediction_id in world.run(batch).values():
        world.end(prediction_id, replicate)
    world.finish(batch)
    return world.there(batch)


def test_lines_have_the_labels_of_their_batch_and_their_own(batch_world: BatchWorld) -> None:
    own = {**LLAMA, "labels": {"team": "own", "n": "2"}}
    too_many = {**LLAMA, "labels": {f"k{n}": "v" for n in range(10)}}
    headers = {"traceparent": TRACE}
    body = json.dumps({"requests": [LLAMA, own, too_many], "labels": LABELS}).encode()
    batch = batch_world.control.make(body, headers, "alice")
    prepare(batch_world.batches, batch.id, 1)
    batch = batch_world.there(batch)
    assert (batch.refused, batch.labels) == (1, LABELS)
    found = batch_world.run(batch, submit=False)
    lines = [batch_world.table.get(id_) for id_ in found.values()]
    assert [line.labels for line in lines if line] == [LABELS, {"team": "own", "n": "2"}]
    assert {line.traceparent for line in lines if line} == {TRACE}
    assert next(iter(batch_world.executions.values()))["traceparent"] == TRACE


def test_template_fills_labels_of_lines(batch_world: BatchWorld) -> None:
    template = {**LLAMA, "labels": {"n": "{{ row.n }}", "who": "{{ row.who }}"}}
    rows = [{"n": 7, "who": "a"}, {"n": 8, "who": ""}]
    batch = batch_world.prepared(*rows, template=template)
    assert batch.refused == 1
    (line,) = (batch_world.table.get(id_) for id_ in batch_world.run(batch, submit=False).values())
    assert line
    assert line.labels == {"n": "7", "who": "a"}


def test_results_and_event_of_a_batch_have_the_labels(batch_world: BatchWorld, replicate: ReplicateInMemory) -> None:
    batch = ended_batch(batch_world, replicate, labels=LABELS)
    assert [each["labels"] for each in batch_world.results(batch)] == [LABELS]
    events = [
        batch_event_of(each["dynamodb"], "outputs") for each in stream() if "batch#" in str(each["dynamodb"]["Keys"])
    ]
    ((_, detail),) = filter(None, events)
    assert detail["labels"] == LABELS


def test_batch_with_a_private_webhook_is_refused(batch_world: BatchWorld) -> None:
    for field in ({"webhook": "https://10.0.0.1/"}, {"webhook": HOOK, "webhook_events_filter": ["start"]}):
        with pytest.raises(Problem) as refused:
            batch_world.make(LLAMA, **field)
        assert refused.value.status == 422
        assert str(refused.value.invalid_fields[0]["field"]).startswith("webhook")


def test_completed_batch_sends_one_signed_webhook_for_each_attempt(
    batch_world: BatchWorld, replicate: ReplicateInMemory, receivers: Receivers, receiver: Receiver, clock: Clock,
    outputs: OutputsBucket,
) -> None:  # fmt: skip
    batch = batch_world.prepared(LLAMA, webhook=HOOK)
    assert of("batch") == []
    for prediction_id in batch_world.run(batch).values():
        batch_world.end(prediction_id, replicate, "failed")
    batch_world.finish(batch)
    (first,) = of("batch")
    assert (first.webhook_id, first.n) == (f"{batch.id}-completed-1", 1)
    assert deliver(receivers, first)
    (request,) = receiver.sent
    body = json.loads(request.content)
    secrets = OwnerSecrets.from_env().valid_secrets("alice", clock.now())
    signed = sign(request.content, webhook_id=first.webhook_id, timestamp=int(clock.now()), secrets=secrets)
    assert {name: request.headers[name] for name in signed} == signed
    assert (body["id"], body["status"], body["counts"]["failed"], body["webhook"]) == (batch.id, "failed", 1, HOOK)
    there = batch_world.there(batch)
    shown = show_batch(there, batch_world.control, Presenter(outputs, 3600))
    assert {**shown, "results": None} == {**body, "results": None}

    again = batch_world.control.again(there)
    assert deliver(receivers, first), "outdated: a later attempt runs"
    assert len(receiver.sent) == 1
    prepare(batch_world.batches, again.id, 2)
    for prediction_id in batch_world.run(batch_world.there(again)).values():
        batch_world.end(prediction_id, replicate)
    batch_world.finish(again)
    assert [each.webhook_id for each in of("batch")] == [f"{batch.id}-completed-1", f"{batch.id}-completed-2"]


def test_webhook_of_a_batch_that_fails_is_retried_and_then_a_dead_letter(
    batch_world: BatchWorld, replicate: ReplicateInMemory, receivers: Receivers, receiver: Receiver, clock: Clock
) -> None:
    batch = ended_batch(batch_world, replicate, webhook=HOOK)
    receiver.status = 500
    delivery = Delivery(batch.id, "batch.completed", 1, int(clock.now()))
    assert not deliver(receivers, delivery)
    assert waiting("dead-deliveries") == []
    late = Delivery(batch.id, "batch.completed", 1, int(clock.now()) - 90_000)
    assert deliver(receivers, late)
    (letter,) = waiting("dead-deliveries")
    assert (letter["id"], letter["event"], letter["reason"]) == (batch.id, "batch.completed", "responded with 500")


# -- pipelines ------------------------------------------------------------------------------------------------------


def test_completed_pipeline_sends_one_webhook_with_what_its_route_shows(
    pipeline_world: PipelineWorld, receivers: Receivers, receiver: Receiver
) -> None:
    world = pipeline_world
    body = json.dumps({"steps": [IMAGE], "input": {"prompt": "x", "styles": []}, "labels": LABELS, "webhook": HOOK})
    shown = world.api.create_pipeline("alice", body.encode(), {"traceparent": TRACE})
    world.turn(shown["id"])
    (prediction,) = world.deliver()
    assert (prediction.labels, prediction.traceparent) == (LABELS, TRACE)
    assert of("pipeline") == []
    world.end(shown["id"], "image", "text")
    assert world.turn(shown["id"]).done
    (delivery,) = of("pipeline")
    assert delivery.webhook_id == f"{shown['id']}-completed-1"
    assert deliver(receivers, delivery)
    (request,) = receiver.sent
    assert json.loads(request.content) == world.shown(shown["id"])
    assert json.loads(request.content)["labels"] == LABELS
    assert request.headers["traceparent"] == TRACE
    ((_, detail),) = filter(
        None, (pipeline_event_of(each) for each in stream() if "pipeline#" in str(each["dynamodb"]["Keys"]))
    )
    assert (detail["labels"], detail["traceparent"]) == (LABELS, TRACE)


def test_groups_without_a_webhook_send_none(batch_world: BatchWorld, replicate: ReplicateInMemory) -> None:
    ended_batch(batch_world, replicate)
    assert of("batch") == []


@pytest.mark.parametrize("event", ["batch.completed", "pipeline.completed"])
def test_webhook_of_a_group_that_is_gone_is_done(receivers: Receivers, clock: Clock, event: str) -> None:
    assert deliver(receivers, Delivery("a" * 26, event, 1, int(clock.now())))


def test_events_of_groups_are_not_those_of_predictions() -> None:
    """Earlier releases leave such a message in the queue, for the next one that receives it."""
    with pytest.raises(UnreadableDelivery):
        Delivery.read(json.dumps({"id": "a" * 26, "event": "batch.start", "n": 1, "first_at": 1}))
