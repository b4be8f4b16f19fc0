"""JSON: one table of hostile texts at five doors: the API, webhooks, the queue, manifests, and models' answers."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.attacks.stack import MESSAGE_LIMIT_BYTES, Stack, read_strictly
from tests.attacks.texts import DEEP, DOCUMENTS, FRAGMENTS, OBJECT, TOO_LONG, UNREADABLE, Text
from tests.reliability import Recorded
from tests.support.fakes import VERSION, ReplicateInMemory

CASE_SECONDS = 2.0
"""Of the processor's, for one text at one door."""


@contextmanager
def in_time(name: str) -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < CASE_SECONDS, name


@pytest.fixture
def token(stack: Stack) -> str:
    """Alice's."""
    return stack.tokens.create("alice", ("predict", "read", "train", "manage"))[0]


def body_of(answer: dict[str, Any]) -> Any:
    """An answer's body, which has to be JSON by the letter."""
    return read_strictly(answer["body"])


def same(mine: Any, theirs: Any) -> bool:
    """Equal values of the same types; JSON has no other zero."""
    return json.dumps(mine, sort_keys=True) == json.dumps(theirs, sort_keys=True) or (
        isinstance(mine, int | float) and mine == theirs
    )


# -- the API --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Door:
    """A route that takes JSON.

    Attributes:
        path: Where.
        template: A body, with `%s` where the text goes.
        found: The value in the answer to a GET of what was made; None: nobody shows it.
        method: Of the route.
        limit_bytes: The largest body that it takes; a larger one is refused for that.
    """

    path: str
    template: bytes
    found: Callable[[Any], Any] | None
    method: str = "POST"
    limit_bytes: int = 5 * 1024 * 1024


DOORS: dict[str, Door] = {
    "predictions": Door(
        "/predictions", b'{"version":"%s","input":{"x":%%s}}' % VERSION.encode(), lambda p: p["input"]["x"]
    ),
    "a model's": Door("/models/meta/llama/predictions", b'{"input":{"x":%s}}', lambda p: p["input"]["x"]),
    "a deployment's": Door("/deployments/meta/llama/predictions", b'{"input":{"x":%s}}', lambda p: p["input"]["x"]),
    "trainings": Door(
        f"/models/meta/llama/versions/{VERSION}/trainings", b'{"destination":"acme/fox","input":{"x":%s}}',
        lambda p: p["input"]["x"],
    ),
    "batches": Door("/batches", b'{"requests":[{"model":"meta/llama","input":{"x":%s}}]}', None),
    "pipelines": Door(
        "/pipelines", b'{"steps":[{"name":"one","model":"meta/llama","input":{}}],"input":{"x":%s}}',
        lambda p: p["input"]["x"],
    ),
    "recipes": Door(
        "/recipes/hostile", b'{"model":"meta/llama","input":{"x":%s},"schedule":{"expression":"rate(1 day)"}}',
        lambda p: p["input"]["x"], "PUT", 64 * 1024
    ),
    "uploads": Door("/uploads", b'{"filename":"a","size":1,"metadata":{"x":%s}}', lambda p: p["metadata"]["x"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DOORS)
def test_text_within_a_body_is_refused_or_comes_back_equal(
    stack: Stack, token: str, name: str, record_property: Recorded
) -> None:
    record_property("texts", len(FRAGMENTS))
    door = DOORS[name]
    release = {"number": 1, "model": "meta/llama", "version": VERSION}
    stack.replicate.deployments["meta/llama"] = {"owner": "meta", "name": "llama", "current_release": release}
    stack.replicate.others["GET", "/models/acme/fox"] = lambda: httpx.Response(200, json={"owner": "acme"})
    wrong = []
    for case, text in FRAGMENTS.items():
        before = len(stack.replicate.predictions)
        with in_time(f"{name}: {case}"):
            answer = stack.api(door.method, door.path, token=token, body=door.template % text.text)
        status, said = (201, "") if text.refused is None else (400, text.refused)
        if len(door.template % text.text) > door.limit_bytes:
            status, said = 413, f"limit of {door.limit_bytes}"
        if name == "uploads" and status == 201 and len(text.text) > 16_000:
            status, said = 422, "metadata: Must be at most 16384 bytes"
        shown = body_of(answer)
        if (answer["statusCode"] not in (status, 200 if status == 201 and door.method == "PUT" else status)) or (
            status >= 400 and said not in shown["detail"]
        ):
            wrong.append((case, answer["statusCode"], str(shown)[:300]))
            continue
        if status >= 400:
            assert len(stack.replicate.predictions) == before, "nothing is started"
            assert len(answer["body"]) < 20_000
            continue
        with in_time(f"{name}: {case}, read"):
            read = shown  # of what is yet to be uploaded there is no other
            if name != "uploads":
                path = shown["urls"]["get"].removeprefix("https://api.example.com/v1")
                read = body_of(stack.api("GET", path, token=token))
        if door.found and not same(door.found(read), json.loads(text.text)):
            wrong.append((case, 200, str(door.found(read))[:300]))
    assert wrong == []


@pytest.mark.parametrize("name", DOORS)
def test_body_is_refused_with_its_reason_and_starts_nothing(
    stack: Stack, token: str, name: str, record_property: Recorded
) -> None:
    record_property("texts", len(DOCUMENTS))
    door, wrong = DOORS[name], []
    for case, (text, status, said) in DOCUMENTS.items():
        if len(text) > door.limit_bytes:
            status, said = 413, f"limit of {door.limit_bytes}"
        with in_time(f"{name}: {case}"):
            answer = stack.api(door.method, door.path, token=token, body=text)
        shown = body_of(answer)
        if (answer["statusCode"], shown["status"]) != (status, status) or (
            status != 422 and said not in shown["detail"]
        ):
            wrong.append((case, answer["statusCode"], shown["detail"][:300]))
        elif status == 422 and said != OBJECT:
            named = {each["field"] for each in shown["invalid_fields"]}
            if not named or len(answer["body"]) > 40_000:
                wrong.append((case, 422, str(named)[:300]))
    assert wrong == []
    assert stack.replicate.predictions == {}
    assert [key for key in stack.table.items if key[0] != "tokens"] == []


# -- the queue ------------------------------------------------------------------------------------------------------


NO_MESSAGE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
"""What no message holds: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessage.html"""


def test_message_is_refused_alone_with_its_reason_or_starts_with_an_equal_input(
    stack: Stack, record_property: Recorded
) -> None:
    good, wrong = b'{"model":"meta/llama","input":{"x":"good"}}', []
    tried = 0
    cases = {
        f"within: {name}": (b'{"model":"meta/llama","input":{"x":%s}}' % each.text, each.refused)
        for name, each in FRAGMENTS.items()
    }
    cases |= {name: (text, said) for name, (text, _, said) in DOCUMENTS.items()}
    for case, (text, said) in cases.items():
        try:
            body = text.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            continue
        if NO_MESSAGE.search(body) or len(text) > MESSAGE_LIMIT_BYTES:
            continue
        tried += 1
        before, there = len(stack.account.executions), set(stack.table.items)
        with in_time(case):
            stays, reasons = stack.send(good.decode(), body, good.decode())
        started = len(stack.account.executions) - before
        expected = 3 if said is None else 2
        if stays or started != expected or (said is not None and said not in reasons.get(body, "")):
            wrong.append((case, stays, started, [reason[:200] for reason in reasons.values()]))
        elif said is None:
            inputs = [
                item for key, item in stack.table.items.items() if key[1].startswith("input") and key not in there
            ]
            (held,) = {
                item["json"]["S"] if "json" in item else stack.account.objects[item["s3_key"]["S"]][0].decode()
                for item in inputs
            } - {'{"x":"good"}'}
            if not same(read_strictly(held)["x"], json.loads(text)["input"]["x"]):
                wrong.append((case, ["another input"], 0, [str(held)[:200]]))
    assert wrong == []
    assert tried > 90
    record_property("texts", tried)


# -- manifests ------------------------------------------------------------------------------------------------------


def test_line_of_a_manifest_is_refused_alone_with_its_reason(
    stack: Stack, token: str, record_property: Recorded
) -> None:
    good = b'{"model":"meta/llama","input":{"x":"good"}}'
    lines: list[tuple[str, bytes, str | None]] = []
    for name, each in FRAGMENTS.items():
        lines.append((f"within: {name}", b'{"model":"meta/llama","input":{"x":%s}}' % each.text, each.refused))
    for name, (document, _, reason) in DOCUMENTS.items():
        if b"\n" not in document and document.strip(b" \t\r"):
            lines.append((name, document, TOO_LONG if len(document) > 1024 * 1024 else reason))
    record_property("texts", len(lines))
    manifest = b"\n".join(part for _, text, _ in lines for part in (text, good))
    stack.account.objects["batches/alice/hostile.jsonl"] = manifest, "application/jsonl"
    began = time.process_time()
    made = stack.api("POST", "/batches", token=token, body='{"manifest":"s3://inputs/batches/alice/hostile.jsonl"}')
    assert made["statusCode"] == 201, made
    batch_id = body_of(made)["id"]
    plan = stack.invoke("prepare_batch", {"id": batch_id, "attempt": 1})
    assert time.process_time() - began < CASE_SECONDS * 10
    kept = objects_of(stack, batch_id)
    refused = {each["n"]: each["error"] for each in kept["refused"]}
    requests = {each["n"]: each["request"]["input"]["x"] for each in kept["requests"]}
    wrong = []
    for place, (case, text, said) in enumerate(lines):
        n = 2 * place + 1
        assert requests.get(n + 1) == "good", f"the one after {case}"
        if said is not None and said not in refused.get(n, "it is not refused"):
            wrong.append((case, said, refused.get(n)))
        if said is None and (n not in requests or not same(requests[n], json.loads(text)["input"]["x"])):
            wrong.append((case, "equal", refused.get(n)))
    assert wrong == []
    assert plan["lines"] == len(requests) == len(lines) + sum(said is None for _, _, said in lines)


def objects_of(stack: Stack, batch_id: str) -> dict[str, list[Any]]:
    """What preparing a batch has written."""
    from predictions.batches.files import refused_key, requests_key

    return {
        part: [read_strictly(line) for line in stack.account.objects[key][0].split(b"\n") if line]
        for part, key in (("requests", requests_key(batch_id)), ("refused", refused_key(batch_id)))
    }


# -- models' answers ------------------------------------------------------------------------------------------------


def upstream_id_of(stack: Stack, prediction_id: str) -> str:
    return str(stack.table.items[f"prediction#{prediction_id}", "status"]["upstream_id"]["S"])


def told(upstream_id: str, text: bytes, field: str = "output") -> bytes:
    """A prediction in Replicate's words, with a text in one of its fields."""
    return b'{"id":"%s","status":"succeeded","%s":%s}' % (upstream_id.encode(), field.encode(), text)


def publish(stack: Stack, prediction_id: str, before: dict[str, Any] | None) -> None:
    """The table's stream tells of a prediction, as it would."""
    after = stack.table.items[f"prediction#{prediction_id}", "status"]
    record = {
        "eventID": "e", "eventName": "MODIFY", "eventVersion": "1.1", "eventSource": "aws:dynamodb", "awsRegion": "x",
        "dynamodb": {
            "ApproximateCreationDateTime": time.time(), "Keys": {name: after[name] for name in ("pk", "sk")},
            "NewImage": after, "SequenceNumber": "1", "StreamViewType": "NEW_AND_OLD_IMAGES",
            **({"OldImage": before} if before else {}),
        },
        "eventSourceARN": "arn:aws:dynamodb:x",
    }  # fmt: skip
    answer = stack.invoke("publish_changes", {"Records": [json.loads(json.dumps(record))]})
    assert not answer.get("batchItemFailures")


def by_webhook(stack: Stack, token: str, text: bytes, field: str) -> str:
    prediction_id = stack.start(token)
    answer = stack.webhook(prediction_id, told(upstream_id_of(stack, prediction_id), text, field))
    assert answer["statusCode"] == 200, answer
    return prediction_id


def by_poll(stack: Stack, token: str, text: bytes, field: str) -> str:
    prediction_id = stack.start(token)
    body = told(upstream_id_of(stack, prediction_id), text, field)
    stack.replicate.read_faults = [lambda *_: httpx.Response(200, content=body)]
    stack.invoke("poll_prediction", {"id": prediction_id})
    stack.replicate.read_faults = []
    return prediction_id


def by_create(stack: Stack, token: str, text: bytes, field: str) -> str:
    def accept(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
        upstream_id = replicate.accept(request)["id"]
        return httpx.Response(201, content=told(upstream_id, text, field))

    stack.replicate.faults = [accept]
    return stack.start(token)


WAYS = {"webhook": by_webhook, "poll": by_poll, "create": by_create}


def shown(text: Text, field: str) -> Any:
    """What a caller is to see of a model's value."""
    if text.told is UNREADABLE or field == "output":
        return text.told
    value = text.told
    if field == "logs":
        return value if isinstance(value, str) else "" if value is None else json.dumps(value)
    return value


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("field", ["output", "logs", "error", "metrics"])
def test_whatever_a_model_says_is_kept_and_shown_as_json(
    stack: Stack, token: str, way: str, field: str, record_property: Recorded
) -> None:
    record_property("texts", len(FRAGMENTS))
    wrong = []
    for case, text in FRAGMENTS.items():
        with in_time(f"{way}, {field}: {case}"):
            prediction_id = WAYS[way](stack, token, text.text, field)
            answer = stack.api("GET", f"/predictions/{prediction_id}", token=token)
        item = stack.table.items[f"prediction#{prediction_id}", "status"]
        publish(stack, prediction_id, {**item, "visible": {"S": "starting"}, "rank": {"N": "1"}})
        seen = body_of(answer)
        if text.told is UNREADABLE and text.refused == DEEP:
            # It can be told that it is beyond the bound: that is an end, with the reason.
            if (seen["status"], seen["output"]) != ("failed", None) or "nested deeper than 300" not in seen["error"]:
                wrong.append((case, answer["statusCode"], seen["status"], str(seen)[:300]))
            continue
        if text.told is UNREADABLE:
            # Nothing of it can be told: it is as if it had not come, and the prediction goes on until it is asked for.
            if (answer["statusCode"], seen["status"], seen.get("output")) != (200, "starting", None):
                wrong.append((case, answer["statusCode"], seen["status"], str(seen["output"])[:100]))
            continue
        if (answer["statusCode"], seen["status"]) != (200, "succeeded"):
            wrong.append((case, answer["statusCode"], seen["status"], str(seen)[:300]))
            continue
        expected = shown(text, field)
        if field in ("output", "logs") and not same(seen[field], expected[-262144:] if field == "logs" else expected):
            wrong.append((case, 200, str(seen[field])[:100], str(expected)[:100]))
        if field == "error" and expected is not None:
            whole = expected if isinstance(expected, str) else json.dumps(expected)
            if seen["error"] != (whole[:4000] or None):
                wrong.append((case, 200, str(seen["error"])[:100], whole[:100]))
        if field == "metrics" and seen["metrics"] not in (expected, {}):
            wrong.append((case, 200, str(seen["metrics"])[:100], str(expected)[:100]))
    assert wrong == []
