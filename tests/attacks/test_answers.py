"""Answers of strangers' models, in functions that are killed at their own memory and time, as Lambda kills them.

What Replicate answers is what a model returned: `[],` is 3 bytes of text and 73 of memory, and one emoji makes four
bytes of each character. Every function that parses such JSON is run here as a process of its own, with the template's
MemorySize and Timeout. Beyond the bound (`PARSED_LIMIT_BYTES`) an answer ends its prediction `failed`; up to it,
everybody who reads the kept output bears it.
"""

import json
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from predictions.intents.model import create_intent
from predictions.net.signatures import sign
from predictions.notifications.webhook_queue import Delivery
from predictions.store.callers import WaitingCallers
from predictions.store.records import Prediction
from predictions.upstream.bounded_json import weigh
from predictions.upstream.prediction import PARSED_LIMIT_BYTES, UpstreamPrediction

from tests.attacks.killed import Cloud, Run, api_event, cloud
from tests.reliability import Recorded
from tests.support.fakes import VERSION, ReplicateInMemory
from tests.support.template import folder_name, resources

pytestmark = pytest.mark.slow

TRIED = {
    "poll_prediction", "cancel_prediction", "sweep_predictions", "submit_prediction", "start_prediction",
    "receive_webhook", "copy_outputs", "publish_changes", "read_prediction", "read_predictions", "run_prediction",
    "deliver_webhook", "advance_pipeline", "manage_pipelines", "start_from_queue",
}  # fmt: skip
PARSE_NONE = {
    "authorize_request": "reads a token's item",
    "give_secret": "reads a secret of this stack",
    "serve_console": "answers with files of its own",
    "serve_files": "reads a link's query and answers with a redirect",
    "store_files": "keeps the bytes of a form and parses none of its files",
    "call_replicate": "parses answers of at most 5,500,000 bytes, which `read_json` weighs first",
    "deploy_recipes": "reads the recipes that the operator deploys",
    "manage_recipes": "parses bodies of at most 64 KiB",
    "manage_batches": "parses bodies of at most 5 MiB, as tests/attacks/test_json.py tries them",
    "prepare_batch": "parses lines of at most 1 MiB, one after the other",
    "finish_batch": "parses results of at most 100 KiB, which are in the table's items",
}

EMPTY_LISTS, EMPTY_OBJECTS = b"[]", b"{}"
POLYGON = b"[1234,1567]"
WORD = b'{"word":"hello,","start":12.34,"end":12.56}'
FLOAT = b"0.123456789"


def filled(unit: bytes, size: int) -> bytes:
    return b"[" + b",".join([unit] * (size // (len(unit) + 1))) + b"]"


def emoji(size: int) -> bytes:
    return b'"' + b"lorem, ipsum " * (size // 13) + "🦊".encode() + b'"'


def deep(size: int) -> bytes:
    return b"[" * (size // 2) + b"]" * (size // 2)


MB = 1_000_000


def told(output: bytes, upstream_id: str, status: str = "succeeded") -> bytes:
    """A prediction as Replicate answers, with the status behind the output."""
    head = json.dumps({"id": upstream_id, "model": "a/b", "version": VERSION, "input": {"n": 1}, "logs": "done"})
    return head[:-1].encode() + b',"output":' + output + b',"error":null,"status":"' + status.encode() + b'"}'


@cache
def at_the_bound(unit: bytes) -> bytes:
    """The longest list that is just read, to within a twentieth."""
    read, refused = 4 * MB, 60 * MB
    while refused > 1.05 * read:
        size = (read + refused) // 2
        within = weigh(told(filled(unit, size), "u"), PARSED_LIMIT_BYTES).bytes <= PARSED_LIMIT_BYTES
        read, refused = (size, refused) if within else (read, size)
    return filled(unit, read)


@pytest.fixture
def lambdas(environment: None) -> Iterator[Cloud]:
    """Functions, and what is around them."""
    with cloud() as here:
        yield here


def prediction(here: Cloud, n: int = 1, *, claim: bool = True, lifetime: int = 86400, **body: Any) -> Prediction:
    """One that is bound to `up{n}`, or one that is still to be submitted."""
    table, now = here.predictions(), time.time()
    intent = create_intent(
        json.dumps({"version": VERSION, "input": {"n": n}, **body}, separators=(",", ":")).encode(),
        {"content-type": "application/json"}, owner="alice" if n == 1 else "bob", reference=None,
        allow_loopback_webhooks=True,
    )  # fmt: skip
    made = table.put_intent(
        intent, version=VERSION, deadline=int(now) + lifetime, expires=int(now) + 30 * 86400, claim=claim,
        execution_arn="arn", now=now,
    )  # fmt: skip
    if claim:
        table.merge(made.id, UpstreamPrediction.parse({"id": f"up{n}", "status": "processing"}), now)
    return seen(here, made.id)


def seen(here: Cloud, prediction_id: str) -> Prediction:
    found = here.predictions().get(prediction_id)
    assert found is not None
    return found


def due(here: Cloud, prediction_id: str, **attributes: Any) -> None:
    """Makes an item due now, and the longest."""
    item = here.table.items[f"prediction#{prediction_id}", "status"]
    item |= {"next_check_at": {"N": str(int(time.time()) - 3600)}, **attributes}


def ended(run: Run) -> Run:
    """A run that was not killed, and raised nothing."""
    assert (run.killed, run.error) == (None, None), f"{run.killed} at {run.peak_bytes >> 20} MiB, {run.seconds:.1f} s"
    return run


def test_every_function_of_the_template_is_tried_or_parses_no_strangers_json() -> None:
    functions = {folder_name(name) for name in resources("AWS::Serverless::Function")}
    assert TRIED | PARSE_NONE.keys() == functions
    assert not TRIED & PARSE_NONE.keys()


BEYOND = {
    "empty lists, 12 MB": lambda: filled(EMPTY_LISTS, 12 * MB),
    "empty lists, 60 MB": lambda: filled(EMPTY_LISTS, 60 * MB),
    "empty objects, 12 MB": lambda: filled(EMPTY_OBJECTS, 12 * MB),
    "polygons, 60 MB": lambda: filled(POLYGON, 60 * MB),
    "words, 60 MB": lambda: filled(WORD, 60 * MB),
    "floats, 60 MB": lambda: filled(FLOAT, 60 * MB),
    "text with one emoji, 60 MB": lambda: emoji(60 * MB),
    "deep, 12 MB": lambda: deep(12 * MB),
}


@pytest.mark.parametrize("case", BEYOND)
def test_poll_of_an_output_beyond_the_bound_ends_the_prediction_with_the_reason(
    lambdas: Cloud, case: str, record_property: Recorded
) -> None:
    record_property("answers", 1)
    mine = prediction(lambdas)
    lambdas.replicate["GET", "/predictions/up1"] = 200, told(BEYOND[case](), "up1")
    lambdas.replicate["POST", "/predictions/up1/cancel"] = 200, b"{}"
    ended(lambdas.invoke("poll_prediction", {"id": mine.id}))
    after = seen(lambdas, mine.id)
    if case.startswith("deep") and not after.terminal:
        # Its status is behind what no scan follows, and Replicate did not answer the cancel as it does.
        lambdas.replicate["POST", "/predictions/up1/cancel"] = 200, told(b"null", "up1")
        ended(lambdas.invoke("poll_prediction", {"id": mine.id}))
        after = seen(lambdas, mine.id)
    assert (after.visible, "too large" in (after.error or "")) == ("failed", True)
    assert "as a file" in (after.error or "")


WITHIN = {
    "empty lists": lambda: at_the_bound(EMPTY_LISTS),
    "words": lambda: at_the_bound(WORD),
    "text, 60 MB": lambda: b'"' + b"lorem, ipsum " * (60 * MB // 13) + b'"',
}


@pytest.mark.parametrize("case", WITHIN)
def test_output_at_the_bound_is_kept_by_the_poll_and_read_by_everybody(
    lambdas: Cloud, case: str, record_property: Recorded
) -> None:
    # The largest input besides, of a caller who wants nobody well.
    given = json.loads(filled(EMPTY_LISTS, 5 * MB)) if case == "empty lists" else 1
    mine = prediction(lambdas, input={"x": given}, webhook=f"{lambdas.url}/hook", webhook_events_filter=["completed"])
    before = dict(lambdas.table.items[f"prediction#{mine.id}", "status"])
    WaitingCallers.from_env().add_caller(mine.id, "token", int(time.time()) + 86400)
    output = WITHIN[case]()
    lambdas.replicate["GET", "/predictions/up1"] = 200, told(output, "up1")
    runs = [ended(lambdas.invoke("poll_prediction", {"id": mine.id}))]
    assert seen(lambdas, mine.id).visible == "succeeded"
    after = lambdas.table.items[f"prediction#{mine.id}", "status"]
    record = {
        "eventName": "MODIFY",
        "dynamodb": {
            "Keys": {"pk": after["pk"], "sk": after["sk"]}, "SequenceNumber": "1", "NewImage": after,
            "OldImage": before, "ApproximateCreationDateTime": int(time.time()),
        },
    }  # fmt: skip
    runs.append(ended(lambdas.invoke("publish_changes", {"Records": [json.loads(json.dumps(record, default=list))]})))
    assert [each["taskToken"] for each in lambdas.told] == ["token"]
    path = f"/predictions/{mine.id}"
    runs.append(ended(lambdas.invoke("read_prediction", api_event("GET", "/predictions/{prediction_id}", path))))
    assert json.loads(runs[-1].answer["body"])["status"] == "succeeded"
    runs.append(ended(lambdas.invoke("read_predictions", api_event("GET", "/predictions", "/predictions"))))
    assert [each["status"] for each in json.loads(runs[-1].answer["body"])["results"]] == ["succeeded"]
    message = Delivery(mine.id, "completed", 1, int(time.time())).message()
    deliver = {"Records": [{"messageId": "m", "receiptHandle": "r", "body": message}]}
    runs.append(ended(lambdas.invoke("deliver_webhook", deliver)))
    assert (runs[-1].answer, len(lambdas.hooks)) == ({"batchItemFailures": []}, 1)
    # As one with files, whose copy has yet to be made: the first line of the output is one.
    lambdas.table.items[f"prediction#{mine.id}", "status"] |= {
        "visible": {"S": "processing"}, "copy_by": {"N": "1"}, "copy_until": {"N": str(int(time.time()) + 1020)},
    }  # fmt: skip
    runs.append(ended(lambdas.invoke("copy_outputs", {"id": mine.id, "execution": f"{mine.id}-1"})))
    assert seen(lambdas, mine.id).visible == "succeeded"
    record_property("answers", len(runs))


@pytest.mark.parametrize(("size", "shown"), [(MB - 2000, True), (12 * MB, False), (60 * MB, False)])
def test_live_read_of_a_large_answer_is_borne_and_shows_what_fits(lambdas: Cloud, size: int, shown: bool) -> None:
    mine = prediction(lambdas)
    lambdas.replicate["GET", "/predictions/up1"] = 200, told(filled(EMPTY_LISTS, size), "up1", status="processing")
    path = f"/predictions/{mine.id}"
    answer = ended(lambdas.invoke("read_prediction", api_event("GET", "/predictions/{prediction_id}", path))).answer
    body = json.loads(answer["body"])
    assert (answer["statusCode"], body["status"], bool(body.get("output"))) == (200, "processing", shown)
    assert (seen(lambdas, mine.id).visible, body["logs"]) == ("processing", "done" if shown else "")


@pytest.mark.parametrize("function", ["submit_prediction", "start_prediction", "run_prediction"])
@pytest.mark.parametrize("case", ["beyond", "within"])
def test_create_with_a_large_answer_is_bound_and_its_outcome_not_lost(
    lambdas: Cloud, function: str, case: str, record_property: Recorded
) -> None:
    record_property("answers", 1)
    output = filled(EMPTY_LISTS, 60 * MB) if case == "beyond" else at_the_bound(EMPTY_LISTS)
    lambdas.replicate["POST", "/predictions"] = 201, told(output, "up1")
    if function == "submit_prediction":
        mine = prediction(lambdas, claim=False)
        lambdas.table.items[f"prediction#{mine.id}", "status"]["source"] = {"S": "queue"}
        ended(lambdas.invoke(function, {"id": mine.id}))
    elif function == "start_prediction":
        body = json.dumps({"version": VERSION, "input": {"n": 1}}).encode()
        event = api_event("POST", "/predictions", "/predictions", body=body, headers={"Prefer": "wait=5"})
        answer = ended(lambdas.invoke(function, event)).answer
        assert answer["statusCode"] in (200, 201), answer["body"][:300]
    else:
        ended(lambdas.invoke(function, {"model": VERSION, "input_data": {"n": 1}, "wait_for_completion": False}))
    [pk] = [pk for pk, sk in lambdas.table.items if sk == "status" and pk.startswith("prediction#")]
    after = seen(lambdas, pk.partition("#")[2])
    if function != "submit_prediction":
        # A caller waits there: the id is bound, and the output is left to the poll, which bears it.
        assert (after.upstream_id, after.visible) == ("up1", "processing")
        lambdas.replicate["GET", "/predictions/up1"] = 200, told(output, "up1")
        ended(lambdas.invoke("poll_prediction", {"id": after.id}))
        after = seen(lambdas, after.id)
    assert (after.upstream_id, after.visible) == ("up1", "failed" if case == "beyond" else "succeeded")
    assert lambdas.asked.count(("POST", "/predictions")) == 1


def test_create_with_the_largest_input_and_answer_is_responded_to_in_the_memory_of_its_function(
    lambdas: Cloud, record_property: Recorded
) -> None:
    record_property("answers", 1)
    lambdas.replicate["POST", "/predictions"] = 201, told(at_the_bound(EMPTY_LISTS), "up1")
    body = b'{"version": "%s", "input": {"n": 1, "x": %s}}' % (VERSION.encode(), filled(EMPTY_LISTS, 5 * MB))
    event = api_event("POST", "/predictions", "/predictions", body=body, headers={"Prefer": "wait=5"})
    answer = ended(lambdas.invoke("start_prediction", event, VALIDATE_INPUT="false")).answer
    shown = json.loads(answer["body"])
    assert (answer["statusCode"], shown["status"]) == (201, "starting")


@pytest.mark.parametrize("case", ["empty lists", "text with one emoji"])
def test_largest_webhook_is_received(lambdas: Cloud, case: str, record_property: Recorded) -> None:
    record_property("answers", 1)
    mine = prediction(lambdas)
    secret = {"current": ReplicateInMemory.SECRET, "previous": None, "rotated_at": "2025-01-01T00:00:00+00:00"}
    lambdas.secrets["signing-secret"] = json.dumps(secret)
    # Lambda takes 6 MB, in which the body is base64.
    body = told(filled(EMPTY_LISTS, 4_400_000) if case == "empty lists" else emoji(4_400_000), "up1")
    headers = sign(body, webhook_id="msg_1", timestamp=int(time.time()), secrets=[ReplicateInMemory.SECRET])
    path = f"/webhooks/replicate/{mine.id}"
    event = api_event("POST", "/webhooks/replicate/{prediction_id}", path, body=body, headers=headers)
    assert ended(lambdas.invoke("receive_webhook", event)).answer["statusCode"] == 200
    assert seen(lambdas, mine.id).visible == "succeeded"


@pytest.mark.parametrize("size", [12 * MB, 60 * MB])
def test_large_answer_to_a_cancel_is_borne_by_the_call_and_by_the_sweep_which_moves_on_what_is_due_later(
    lambdas: Cloud, size: int, record_property: Recorded
) -> None:
    record_property("answers", 2)
    mine, theirs = prediction(lambdas), prediction(lambdas, 2)
    body = told(filled(EMPTY_LISTS, size), "up1")
    lambdas.replicate["GET", "/predictions/up1"] = 200, body
    lambdas.replicate["POST", "/predictions/up1/cancel"] = 200, body
    lambdas.executions |= {f"{mine.id}-1": "FAILED", f"{theirs.id}-1": "FAILED"}
    due(lambdas, mine.id, cancel_requested={"N": "1"})
    due(lambdas, theirs.id)
    lambdas.table.items[f"prediction#{theirs.id}", "status"]["next_check_at"] = {"N": str(int(time.time()) - 60)}
    ended(lambdas.invoke("sweep_predictions", {}))
    assert seen(lambdas, theirs.id).execution_n == 2
    assert seen(lambdas, mine.id).visible == "failed"
    again = prediction(lambdas)
    path = f"/predictions/{again.id}/cancel"
    cancel = api_event("POST", "/predictions/{prediction_id}/cancel", path)
    assert ended(lambdas.invoke("cancel_prediction", cancel)).answer["statusCode"] == 200
    assert seen(lambdas, again.id).visible == "failed"


def test_item_over_which_the_sweep_is_killed_holds_up_nobody_and_is_ended_an_hour_past_its_deadline(
    lambdas: Cloud, record_property: Recorded
) -> None:
    record_property("answers", 2)
    # As if there were no bound: what keeps the sweep going must not rest on it.
    unbounded = {"PARSED_LIMIT_BYTES": str(1 << 40)}
    mine, theirs = prediction(lambdas, lifetime=600), prediction(lambdas, 2)
    body = told(filled(EMPTY_LISTS, 60 * MB), "up1")
    lambdas.replicate["GET", "/predictions/up1"] = 200, body
    lambdas.replicate["POST", "/predictions/up1/cancel"] = 200, told(b"null", "up1")
    lambdas.executions |= {f"{mine.id}-1": "RUNNING", f"{theirs.id}-1": "FAILED"}
    due(lambdas, mine.id, cancel_requested={"N": "1"})
    due(lambdas, theirs.id)
    lambdas.table.items[f"prediction#{theirs.id}", "status"]["next_check_at"] = {"N": str(int(time.time()) - 60)}
    assert lambdas.invoke("sweep_predictions", {}, **unbounded).killed == "memory"
    assert seen(lambdas, theirs.id).execution_n == 1
    assert (seen(lambdas, mine.id).next_check_at or 0) >= time.time() + 100
    assert lambdas.invoke("poll_prediction", {"id": mine.id}, **unbounded).killed == "memory"
    ended(lambdas.invoke("sweep_predictions", {}, **unbounded))
    assert seen(lambdas, theirs.id).execution_n == 2
    # An hour past its deadline, after looks that died.
    due(lambdas, mine.id, stalled_looks={"N": "3"}, deadline={"N": str(int(time.time()) - 3700)})
    asked = len(lambdas.asked)
    ended(lambdas.invoke("sweep_predictions", {}, **unbounded))
    assert (seen(lambdas, mine.id).visible, len(lambdas.asked)) == ("failed", asked + 1)  # the signing secret


def test_pipeline_over_an_output_at_the_bound_is_filled_or_refused_and_shown(
    lambdas: Cloud, record_property: Recorded
) -> None:
    record_property("answers", 4)
    steps = [
        {"name": "one", "version": VERSION, "input": {"n": 1}},
        {"name": "two", "version": VERSION, "input": {"first": "{{ steps.one.output[0] }}"}},
        {"name": "each", "version": VERSION, "for_each": "{{ steps.one.output[:2] }}", "input": {"x": "{{ item }}"}},
    ]
    create = api_event("POST", "/pipelines", "/pipelines", body=json.dumps({"steps": steps}).encode())
    made = ended(lambdas.invoke("manage_pipelines", create, VALIDATE_INPUT="false")).answer
    assert made["statusCode"] == 201, made["body"]
    pipeline_id = json.loads(made["body"])["id"]
    ended(lambdas.invoke("advance_pipeline", {"id": pipeline_id}))

    def take() -> None:
        sent, lambdas.messages = lambdas.messages, []
        for n, each in enumerate(sent):
            record = {
                "messageId": f"m{n}", "receiptHandle": "r", "body": each["MessageBody"],
                "attributes": {"SentTimestamp": str(int(time.time() * 1000)), "SenderId": "AROAALICE0000"},
                "messageAttributes": {}, "eventSourceARN": "arn:aws:sqs:us-east-1:123456789012:requests",
                "eventSource": "aws:sqs", "awsRegion": "us-east-1",
            }  # fmt: skip
            assert ended(lambdas.invoke("start_from_queue", {"Records": [record]})).answer == {"batchItemFailures": []}

    take()
    [pk] = [pk for pk, sk in lambdas.table.items if sk == "status" and pk.startswith("prediction#")]
    lambdas.replicate["POST", "/predictions"] = 201, told(at_the_bound(EMPTY_LISTS), "up1")
    ended(lambdas.invoke("submit_prediction", {"id": pk.partition("#")[2]}))
    assert seen(lambdas, pk.partition("#")[2]).visible == "succeeded"
    ended(lambdas.invoke("advance_pipeline", {"id": pipeline_id}))
    take()
    show = api_event("GET", "/pipelines/{pipeline_id}", f"/pipelines/{pipeline_id}")
    shown = json.loads(ended(lambdas.invoke("manage_pipelines", show)).answer["body"])
    assert shown["steps"][0]["status"] == "succeeded"
    # What steps gather has a bound of its own, and one that is refused by it says why.
    for step in shown["steps"][1:]:
        assert step["status"] == "starting" or (step["status"] == "failed" and step["error"]), step
