"""How event samples are sent by hand."""

import io
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from local.running import NotRunning, running_stack
from local.send import (
    BusEvent,
    Call,
    Invocation,
    Message,
    NotSendable,
    Object,
    SendFailed,
    _content,
    plan,
    read_sample,
    send,
    with_model,
)
from local.terminal import Terminal
from tests.support.apps import EVENTS, sample
from tests.support.template import logical_name, resources

KINDS = {
    "call_replicate": Call,
    "cancel_prediction": Call,
    "give_secret": Call,
    "read_prediction": Call,
    "read_predictions": Call,
    "receive_webhook": Call,
    "serve_console": Call,
    "serve_files": Call,
    "start_prediction": Call,
    "store_files": Call,
    "run_prediction": Invocation,
    "sweep_predictions": Invocation,
}
NOT_SENT = {
    "authorize_request": "API Gateway calls this function",
    "deploy_recipes": "CloudFormation calls it",
    "deliver_webhook": "Its messages name webhooks",
    "publish_changes": "Its records are those of the table's stream",
}
MACHINES = json.dumps([each["Properties"] for each in resources("AWS::Serverless::StateMachine").values()])
OTHERS = (Call, Invocation, Message, Object, BusEvent)
SAMPLES = sorted(EVENTS.glob("*/*.json"))


def sqs(*bodies: str) -> dict[str, Any]:
    return {"Records": [{"eventSource": "aws:sqs", "messageId": "m", "body": body} for body in bodies]}


CREATED = {
    "source": "aws.s3",
    "detail-type": "Object Created",
    "detail": {"bucket": {"name": "inputs"}, "object": {"key": "photos/a fox+1.png", "size": 7}},
}
OWN = {"source": "shop", "detail-type": "Order Placed", "detail": {"n": 7}, "resources": ["arn:x"]}

SCHEDULED = '{"recipe_id": "r", "event": {"source": "aws.scheduler", "detail-type": "Scheduled Event"}}'


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"), [(None, "^Sample .* not found"), ("{", "is not JSON")]
)  # fmt: skip
def test_sample_that_cannot_be_read_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "sample.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SendFailed, match=message):
        read_sample(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No local stack is running. Run `make local`"),
        ("[]", "was not written by `make local`"),
        ("{", "was not written by `make local`"),
        ('{"api_url": "x"}', "was not written by `make local`"),
        (
            json.dumps(
                dict.fromkeys(
                    (
                        "api_url", "access_token", "region", "table_name", "outputs_bucket", "inputs_bucket",
                        "queue_url", "event_bus_name", "state_machine_arn",
                        "submitted_state_machine_arn", "replicate_api_url", "owner",
                        "run_prediction_function_name", "run_prediction_function_arn",
                    ),
                    "x",
                )
                | {"endpoint_url": "http://127.0.0.1:9"}
            ),
            "does not respond. Run `make local`",
        ),
    ],
    ids=["nothing", "list", "cut off", "other keys", "gone"],
)  # fmt: skip
def test_without_a_running_stack_nothing_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    monkeypatch.setenv("LOCAL_DIR", str(tmp_path))
    if text is not None:
        (tmp_path / "stack.json").write_text(text)
    with pytest.raises(NotRunning, match=message):
        running_stack()
    with pytest.raises(NotRunning, match=message):
        send(Terminal(StringIO()), EVENTS / "start_prediction" / "version.json")


@pytest.mark.parametrize(
    ("folder", "event", "message"),
    [
        ("authorize_request", {"type": "TOKEN"}, "API Gateway calls this function"),
        ("publish_changes", {"Records": [{"eventSource": "aws:dynamodb"}]}, "Its records are those of the table"),
        ("deliver_webhook", sqs("{}"), "Its messages name webhooks"),
        ("other", {"source": "aws.ec2", "detail-type": "x"}, "Only AWS itself sends events of aws.ec2"),
        ("other", {"detail-type": "x"}, "has no source"),
        ("other", {"Records": [{"eventSource": "aws:kinesis"}]}, "Its records are those of aws:kinesis"),
        ("other", {"Records": []}, "A state machine calls other"),
        ("other", {"pipeline_id": "x"}, "A state machine calls other"),
        ("other", [], "A state machine calls other"),
    ],
)  # fmt: skip
def test_sample_of_what_comes_from_inside_says_why_it_is_not_sent(folder: str, event: Any, message: str) -> None:
    with pytest.raises(NotSendable, match=message):
        plan(folder, event)


# -- how each is sent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_sample_is_sent_as_its_folder_says_or_says_why_not(path: Path) -> None:
    folder, event = read_sample(path)
    stepped = f'"{logical_name(folder)}"' in MACHINES
    if stepped or folder in NOT_SENT:
        with pytest.raises(
            NotSendable, match=NOT_SENT.get(folder, f"A state machine calls {folder} as one of its steps")
        ):
            plan(folder, event)
        return
    shipments = plan(folder, event)
    assert shipments
    assert all(isinstance(shipment, KINDS.get(folder, OTHERS)) for shipment in shipments)


def test_request_is_sent_with_what_it_asks_for_and_without_its_own_connection_and_token() -> None:
    event = sample("start_prediction", "base64_body")
    event["multiValueQueryStringParameters"] = {"cursor": ["a b"], "tag": ["x", "y"]}
    event["headers"] |= {"Prefer": "wait=5", "Idempotency-Key": "order-7"}
    (call,) = plan("start_prediction", event)
    assert isinstance(call, Call)
    assert (call.method, call.path, call.authorized) == ("POST", "/predictions", True)
    assert call.query == (("cursor", "a b"), ("tag", "x"), ("tag", "y"))
    assert json.loads(call.body)["input"]["prompt"] == "a red fox in the snow"
    assert call.headers == {
        "Accept": "application/json",
        "Content-Type": "application/json",
        "User-Agent": "replicate-python/1.0.7",
        "Prefer": "wait=5",
        "Idempotency-Key": "order-7",
    }
    (webhook,) = plan("receive_webhook", sample("receive_webhook", "succeeded"))
    assert isinstance(webhook, Call)
    assert not webhook.authorized
    assert "webhook-signature" in {name.lower() for name in webhook.headers}


@pytest.mark.parametrize(
    ("event", "shipments"),
    [
        (sqs("{", '{"input": {}}'), [Message("{"), Message('{"input": {}}')]),
        (sqs('{"batch_id": "b", "n": 1}'), [Message('{"batch_id": "b", "n": 1}')]),
        (sqs(json.dumps({"recipe_id": "r", "event": CREATED})), [Object("photos/a fox+1.png")]),
        (sqs(SCHEDULED), [Message(SCHEDULED)]),
        (CREATED, [Object("photos/a fox+1.png")]),
        (
            {"Records": [{"eventSource": "aws:s3", "s3": {"object": {"key": "photos/a+fox%2B1.png"}}}]},
            [Object("photos/a fox+1.png")],
        ),
        (OWN, [BusEvent("shop", "Order Placed", '{"n": 7}', ("arn:x",))]),
        (sqs(json.dumps({"recipe_id": "r", "event": OWN})), [BusEvent("shop", "Order Placed", '{"n": 7}', ("arn:x",))]),
    ],
    ids=[
        "queue",
        "line",
        "object by a recipe",
        "schedule of a recipe",
        "object",
        "object of a notification",
        "event",
        "event by a recipe",
    ],
)
def test_event_is_sent_to_where_it_comes_from(event: Any, shipments: list[Any]) -> None:
    assert plan("start_from_queue", event) == shipments


# -- another model --------------------------------------------------------------------------------------------------


def call(path: str, body: str = "{}", method: str = "POST") -> Call:
    return Call(method, path, (), {}, body.encode(), authorized=True)


@pytest.mark.parametrize(
    ("shipment", "replaced", "named"),
    [
        (
            Invocation("run_prediction", {"model": "a/b", "prompt": "x"}),
            {"model": "local/painter", "prompt": "x"},
            "a/b",
        ),
        (Message('{"deployment": "a/b", "input": {}}'), {"model": "local/painter", "input": {}}, "a/b"),
        (call("/predictions", '{"version": "a/b:1", "input": {}}'), {"version": "local/painter", "input": {}}, "a/b:1"),
        (call("/recipes", '{"model": "a/b", "input": {}}'), {"model": "local/painter", "input": {}}, "a/b"),
        (call("/recipes/x", '{"model": "a/b"}', "PUT"), {"model": "local/painter"}, "a/b"),
        (call("/models/a/b/predictions"), "/models/local/painter/predictions", "a/b"),
        (call("/deployments/a/b/predictions"), "/models/local/painter/predictions", "a/b"),
    ],
    ids=["job", "message", "version", "recipe", "recipe that is there", "model", "deployment"],
)
def test_another_model_takes_the_place_of_the_samples(shipment: Any, replaced: Any, named: str) -> None:
    other, found = with_model(shipment, "local/painter")
    assert found == named
    match other:
        case Invocation(payload=payload):
            assert payload == replaced
        case Message(body=body):
            assert json.loads(body) == replaced
        case Call(path="/predictions" | "/recipes" | "/recipes/x", body=content):
            assert json.loads(content) == replaced
        case Call(path=path):
            assert path == replaced
    assert with_model(other, "local/painter") == (other, None)


@pytest.mark.parametrize(
    "shipment",
    [
        Invocation("sweep_predictions", {"model": "a/b"}),
        Invocation("run_prediction", {"prompt": "x"}),
        Message("{"),
        Message("[]"),
        Message('{"model": "a/b", "version": "c"}'),
        Message('{"recipe_id": "r"}'),
        call("/predictions", '{"version": 7}'),
        call("/predictions", "\udcff".encode("utf-8", "surrogatepass").decode("latin-1")),
        call("/predictions/x/cancel"),
        call("/models/a/b/versions/v/trainings", '{"destination": "a/b"}'),
        call("/models", '{"owner": "a"}'),
        Object("photos/a.png"),
        BusEvent("shop", "Order Placed", '{"model": "a/b"}'),
    ],
)
def test_what_names_no_model_is_left_as_it_is(shipment: Any) -> None:
    assert with_model(shipment, "local/painter") == (shipment, None)


def test_object_without_a_file_has_content_that_fits_its_key() -> None:
    with Image.open(io.BytesIO(_content("photos/fox.png"))) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
    assert len([json.loads(line) for line in _content("batches/x.jsonl").splitlines()]) == 2
    assert _content("batches/x.CSV").splitlines()[0] == b"prompt"
    assert json.loads(_content("x.json"))["model"] == "local/painter"
    assert _content("notes/x.txt").startswith(b"a harbour")
