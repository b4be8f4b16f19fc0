"""Hostile and disordered webhooks, through the function that receives them."""

import base64
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from predictions.aws import clients as aws
from predictions.files.outputs_bucket import OutputsBucket
from predictions.net.signatures import (
    MAX_BODY_BYTES,
    SignatureMismatch,
    SigningSecretUnavailable,
    WebhookRefused,
    sign,
    verify,
)
from predictions.store.predictions import PredictionsTable

from tests.reliability import Recorded
from tests.support.apps import Context, clock_module, load_app
from tests.support.aws_clients import AwsError, Clients, raise_client_error
from tests.support.dynamodb import ConditionFailed, Item, Table
from tests.support.fakes import API_URL, WEBHOOK_VECTORS, Clock
from tests.support.predictions import FILE, put, told

SEED = 20250615
CHANGES = 100_000
CHANGES_THROUGH_THE_DOOR = 2_000

NOW = 1_750_000_000
SECRET = "whsec_" + base64.b64encode(bytes(range(24))).decode()
OTHER = "whsec_" + base64.b64encode(bytes(range(32))).decode()
THIRD = "whsec_" + base64.b64encode(bytes(range(64))).decode()
U1, U2 = "u" * 26, "v" * 26
TOKEN = "the task token of the execution that waits"
REFUSED = "This is not a webhook that Replicate signed for this stack."

Headers = dict[str, Any]


class Account:
    """What the function reaches: a table in memory, the signing secret, executions that wait, and poll_prediction."""

    def __init__(self, clock: Clock) -> None:
        self.table = Table(clock.now)
        self.secret = {"current": SECRET, "previous": None, "rotated_at": "2025-01-01T00:00:00Z"}
        self.woken: list[str] = []
        self.polled: list[str] = []
        self.calls: list[str] = []

    def call(self, service: str, operation: str, asked: dict[str, Any], client: Any) -> Any:
        self.calls.append(f"{service}.{operation}")
        if service == "dynamodb":
            try:
                return self.table.call(operation, asked)
            except ConditionFailed as error:
                raise_client_error(client, operation, AwsError("ConditionalCheckFailedException", error.item))
        if operation == "GetSecretValue":
            return {"SecretString": json.dumps(self.secret)}
        if operation == "SendTaskSuccess":
            self.woken.append(asked["taskToken"])
            return {}
        if operation == "Invoke":
            assert asked["InvocationType"] == "Event", "a webhook waits for no function"
            self.polled.append(json.loads(asked["Payload"])["id"])
            return {"StatusCode": 202}
        raise AssertionError(f"the webhook's function called {service}.{operation}")


@pytest.fixture(scope="module")
def clients() -> Clients:
    return Clients()


@pytest.fixture
def account(clients: Clients, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Account:
    account: Any = Account(clock)
    clients.world = account
    monkeypatch.setattr(aws, "_client", clients)
    found: Account = account
    return found


Call = Callable[..., tuple[int, str]]


@pytest.fixture
def send(account: Account, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """Sends a webhook as API Gateway passes it on; the status, and the receipt or the problem's detail."""
    with pytest.MonkeyPatch.context() as template_only:
        app = load_app("receive_webhook", template_only)
    monkeypatch.setattr(app, "time", clock_module(clock.now))
    monkeypatch.setenv("CORS_ORIGIN", "")

    def send(
        body: bytes | str | None,
        headers: Headers | Iterable[tuple[str, Any]] | None,
        prediction_id: str = "z" * 26,
        **changes: Any,
    ) -> tuple[int, str]:
        pairs = list(headers.items() if isinstance(headers, dict) else headers or [])
        many: dict[str, list[Any]] = {}
        for name, value in pairs:
            many.setdefault(name, []).append(value)
        text, encoded = (body, False) if not isinstance(body, bytes) else (base64.b64encode(body).decode(), True)
        event = {
            "resource": "/webhooks/replicate/{id}",
            "path": f"/webhooks/replicate/{prediction_id}",
            "httpMethod": "POST",
            "headers": {name: values[-1] for name, values in many.items()} if headers is not None else None,
            "multiValueHeaders": many if headers is not None else None,
            "queryStringParameters": None,
            "multiValueQueryStringParameters": None,
            "pathParameters": {"id": prediction_id},
            "requestContext": {"requestId": "r", "stage": "v1", "httpMethod": "POST", "identity": {}},
            "body": text,
            "isBase64Encoded": encoded,
            **changes,
        }
        answer = app.handler(event, Context())
        shown = json.loads(answer["body"])
        return answer["statusCode"], shown.get("received") or shown["detail"]

    # The log of a few thousand refusals is of no use to anybody.
    level = app.logger.log_level
    app.logger.setLevel("CRITICAL")
    yield send
    app.logger.setLevel(level)


def body_of(upstream_id: str = U1, status: str = "processing", **more: Any) -> bytes:
    return json.dumps({"id": upstream_id, "status": status, "output": None, "logs": "", **more}).encode()


def signed(body: bytes, *, at: float = NOW, webhook_id: str = "msg_1", secrets: tuple[str, ...] = (SECRET,)) -> Headers:
    return {**sign(body, webhook_id=webhook_id, timestamp=int(at), secrets=list(secrets))}


BODY = body_of(status="succeeded")
SIGNED = signed(BODY)
SIGNATURE = SIGNED["webhook-signature"]


def changed(**headers: Any) -> Headers:
    return {**SIGNED, **{name.replace("_", "-"): value for name, value in headers.items()}}


def without(name: str) -> Headers:
    return {key: value for key, value in SIGNED.items() if key != name}


# -- published vectors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("secret", "webhook_id", "timestamp", "body", "signature"), WEBHOOK_VECTORS)
def test_a_published_vector_is_verified_and_made(
    send: Call,
    account: Account,
    clock: Clock,
    secret: str,
    webhook_id: str,
    timestamp: int,
    body: bytes,
    signature: str,
) -> None:
    headers = {"Webhook-ID": webhook_id, "WEBHOOK-TIMESTAMP": str(timestamp), "webhook-Signature": signature}
    verify(body, headers, [secret], timestamp)
    made = sign(body, webhook_id=webhook_id, timestamp=timestamp, secrets=[secret])
    assert made == {name.lower(): value for name, value in headers.items()}
    account.secret = {**account.secret, "current": secret}
    clock.moment = timestamp
    assert send(body, headers) == (200, "unknown prediction")
    assert send(body.replace(b"t", b"T", 1), headers) == (401, REFUSED)


# -- headers ------------------------------------------------------------------------------------------------------

ZEROS = f"v1,{'A' * 43}="

MALFORMED: dict[str, Headers] = {
    "no headers": {},
    "no id": without("webhook-id"),
    "no timestamp": without("webhook-timestamp"),
    "no signature": without("webhook-signature"),
    "svix's names": {name.replace("webhook", "svix"): value for name, value in SIGNED.items()},
    "underscores for dashes": {name.replace("-", "_"): value for name, value in SIGNED.items()},
    "a space in each name": {f"{name} ": value for name, value in SIGNED.items()},
    "names of other letters": {name.replace("i", "\u0131"): value for name, value in SIGNED.items()},
    "names of wide letters": {name.replace("w", "\uff57"): value for name, value in SIGNED.items()},
    "id twice": {**SIGNED, "Webhook-Id": "msg_1"},
    "timestamp twice": {**SIGNED, "WEBHOOK-TIMESTAMP": str(NOW)},
    "signature twice": {**SIGNED, "Webhook-Signature": SIGNATURE},
    "id joined with another": changed(webhook_id="msg_1, msg_1"),
    "id not text": changed(webhook_id=None),
    "id empty": changed(webhook_id=""),
    "id with a dot": changed(webhook_id="msg.1"),
    "id with a space": changed(webhook_id="msg 1"),
    "id with a space before": changed(webhook_id=" msg_1"),
    "id with a tab": changed(webhook_id="msg_1\t"),
    "id with a line end": changed(webhook_id="msg_1\n"),
    "id with a null": changed(webhook_id="msg_1\0"),
    "id with an escape": changed(webhook_id="msg_1\x1b[2J"),
    "id not ASCII": changed(webhook_id="msg_é"),
    "id of wide digits": changed(webhook_id="msg_\uff11"),
    "id with a lone surrogate": changed(webhook_id="msg_\ud800"),
    "id of 257": changed(webhook_id="m" * 257),
    "id beyond any header": changed(webhook_id="m" * 1_000_000),
    "timestamp empty": changed(webhook_timestamp=""),
    "timestamp negative": changed(webhook_timestamp=f"-{NOW}"),
    "timestamp with a plus": changed(webhook_timestamp=f"+{NOW}"),
    "timestamp of a fraction": changed(webhook_timestamp=f"{NOW}.0"),
    "timestamp with a comma": changed(webhook_timestamp=f"{NOW},0"),
    "timestamp in e notation": changed(webhook_timestamp="1e9"),
    "timestamp in e notation of now": changed(webhook_timestamp="1.75e9"),
    "timestamp in hexadecimal": changed(webhook_timestamp=hex(NOW)),
    "timestamp in octal": changed(webhook_timestamp=oct(NOW)),
    "timestamp with an underscore": changed(webhook_timestamp="1_750_000_000"),
    "timestamp in Arabic digits": changed(webhook_timestamp="1\u0667\u0665\u0660\u0660\u0660\u0660\u0660\u0660\u0660"),
    "timestamp in wide digits": changed(webhook_timestamp="".join(chr(0xFF10 + int(digit)) for digit in str(NOW))),
    "timestamp with a superscript": changed(webhook_timestamp="175000000²"),
    "timestamp with a space": changed(webhook_timestamp=f" {NOW}"),
    "timestamp with a line end": changed(webhook_timestamp=f"{NOW}\n"),
    "timestamp with a null": changed(webhook_timestamp=f"{NOW}\0"),
    "timestamp nan": changed(webhook_timestamp="nan"),
    "timestamp infinite": changed(webhook_timestamp="inf"),
    "timestamp a date": changed(webhook_timestamp="2025-06-15T15:06:40Z"),
    "timestamp zero": changed(webhook_timestamp="0"),
    "timestamp with a leading zero": changed(webhook_timestamp=f"0{NOW}"),
    "timestamp in milliseconds": changed(webhook_timestamp=str(NOW * 1000)),
    "timestamp huge": changed(webhook_timestamp="9" * 5000),
    "timestamp of twelve digits": changed(webhook_timestamp="9" * 12),
    "timestamp joined with another": changed(webhook_timestamp=f"{NOW}, {NOW}"),
    "signature empty": changed(webhook_signature=""),
    "signature of spaces": changed(webhook_signature="   "),
    "signature without version": changed(webhook_signature=SIGNATURE[3:]),
    "signature of version only": changed(webhook_signature="v1,"),
    "signature without comma": changed(webhook_signature=SIGNATURE.replace(",", "")),
    "signature with an equals sign": changed(webhook_signature=SIGNATURE.replace(",", "=")),
    "signature with a space behind the comma": changed(webhook_signature=SIGNATURE.replace(",", ", ")),
    "signature of other versions only": changed(webhook_signature=f"v1a,abc v2,{SIGNATURE[3:]}"),
    "signature of version v1a": changed(webhook_signature=f"v1a,{SIGNATURE[3:]}"),
    "signature of version v2": changed(webhook_signature=f"v2,{SIGNATURE[3:]}"),
    "signature of version V1": changed(webhook_signature=f"V1,{SIGNATURE[3:]}"),
    "signature of version v01": changed(webhook_signature=f"v01,{SIGNATURE[3:]}"),
    "signature of version v0": changed(webhook_signature=f"v0,{SIGNATURE[3:]}"),
    "signature of a version with a wide digit": changed(webhook_signature=f"v\uff11,{SIGNATURE[3:]}"),
    "signature of no version": changed(webhook_signature=f"x1,{SIGNATURE[3:]}"),
    "signature not base64": changed(webhook_signature="v1,***"),
    "signature in hexadecimal": changed(webhook_signature="v1," + base64.b64decode(SIGNATURE[3:]).hex()),
    "signature not ASCII": changed(webhook_signature="v1," + "é" * 44),
    "signature with a lone surrogate": changed(webhook_signature="v1,\udcff"),
    "signature with a null": changed(webhook_signature=SIGNATURE + "\0"),
    "signature without padding": changed(webhook_signature=SIGNATURE.rstrip("=")),
    "signature with more padding": changed(webhook_signature=SIGNATURE + "="),
    "signature with padding in front": changed(webhook_signature=f"v1,={SIGNATURE[3:-1]}"),
    "signature too short": changed(webhook_signature="v1," + base64.b64encode(b"x" * 31).decode()),
    "signature too long": changed(webhook_signature="v1," + base64.b64encode(b"x" * 33).decode()),
    "signature of base64url": changed(webhook_signature="v1," + "-_" * 21 + "A="),
    "signature with a line end": changed(webhook_signature=SIGNATURE + "\n"),
    "signature with a space behind": changed(webhook_signature=SIGNATURE + " "),
    "signature with a space before": changed(webhook_signature=" " + SIGNATURE),
    "signature in quotes": changed(webhook_signature=f'"{SIGNATURE}"'),
    "signatures joined by a comma": changed(webhook_signature=f"{SIGNATURE}, {SIGNATURE}"),
    "signatures joined by a tab": changed(webhook_signature=f"{SIGNATURE}\t{SIGNATURE}"),
    "signatures with two spaces": changed(webhook_signature=f"{SIGNATURE}  {SIGNATURE}"),
    "one signature malformed": changed(webhook_signature=f"{SIGNATURE} v1,abc"),
    "nine signatures": changed(webhook_signature=" ".join([SIGNATURE] * 9)),
    "a header of other versions beyond measure": changed(webhook_signature=f"{SIGNATURE} v2,{'A' * 4000}"),
}

# As API Gateway tells of a header that came twice: the last value by its name, and all of them.
DOUBLED: dict[str, list[tuple[str, Any]]] = {
    f"{name} {which} in one case{'' if same else ' and another'}": [
        pair for key, value in SIGNED.items() for pair in (pairs if key == name else [(key, value)])
    ]
    for name in SIGNED
    for same in (True, False)
    for which, other in (("alike", SIGNED[name]), ("and nonsense", "x"), ("and nothing", ""))
    for pairs in (
        [[(name, other), (name if same else name.title(), SIGNED[name])]]
    )
}  # fmt: skip

MISMATCHES: dict[str, Headers] = {
    "other id": changed(webhook_id="msg_2"),
    "id in other case": changed(webhook_id="MSG_1"),
    "other timestamp": changed(webhook_timestamp=str(NOW + 1)),
    "a signature of zeros": changed(webhook_signature=ZEROS),
    "eight signatures of zeros": changed(webhook_signature=" ".join([ZEROS] * 8)),
    "other secret": signed(BODY, secrets=(OTHER,)),
    "other secrets": signed(BODY, secrets=(OTHER, THIRD)),
    "other body": signed(BODY + b" "),
    "no body": signed(b""),
    "signature backwards": changed(webhook_signature=f"v1,{SIGNATURE[3:-1][::-1]}="),
    "signature in lower case": changed(webhook_signature=f"v1,{SIGNATURE[3:].lower()}"),
}

GENUINE: dict[str, Headers] = {
    "as signed": SIGNED,
    "names in title case": {name.title(): value for name, value in SIGNED.items()},
    "names in capitals": {name.upper(): value for name, value in SIGNED.items()},
    "zeros before": changed(webhook_signature=f"{ZEROS} {SIGNATURE}"),
    "zeros behind": changed(webhook_signature=f"{SIGNATURE} {ZEROS}"),
    "other versions around": changed(webhook_signature=f"v1a,anything {SIGNATURE} v2,more"),
    "the last of eight": changed(webhook_signature=" ".join([*[ZEROS] * 7, SIGNATURE])),
    "two secrets": signed(BODY, secrets=(OTHER, SECRET)),
    "an access token besides": {**SIGNED, "Authorization": "Bearer rs_" + "A" * 43},
    "svix's names besides": {**SIGNED, "svix-id": "x", "svix-signature": ZEROS},
}


def verdict_of(body: bytes, headers: Headers, secrets: list[str], now: float = NOW) -> str:
    """The verdict of `verify`, of which there are three."""
    try:
        verify(body, headers, secrets, now)
    except WebhookRefused as refusal:
        sentence = refusal.reason
        kind = "mismatch" if isinstance(refusal, SignatureMismatch) else "refused"
    else:
        return "genuine"
    assert sentence.isascii()
    assert not any(str(value) in sentence for value in headers.values() if len(str(value)) > 4)
    return kind


FAMILIES = {"refused": MALFORMED, "mismatch": MISMATCHES, "genuine": GENUINE}


@pytest.mark.parametrize("verdict", FAMILIES)
def test_headers_of_each_family_have_their_verdict(
    send: Call, account: Account, clock: Clock, verdict: str, record_property: Recorded
) -> None:
    clock.moment = NOW
    record_property("cases", len(FAMILIES[verdict]))
    wrong = {}
    for case, headers in FAMILIES[verdict].items():
        account.calls.clear()
        found = verdict_of(BODY, headers, [SECRET])
        answer = send(BODY, headers)
        in_the_table = any(call.startswith("dynamodb") for call in account.calls)
        if verdict == "genuine":
            right = found == verdict and answer == (200, "unknown prediction")
        else:
            right = found == verdict and answer == (401, REFUSED) and not in_the_table
        if not right:
            wrong[case] = found, answer, account.calls.copy()
    assert wrong == {}


def test_header_that_came_twice_is_refused_whatever_it_says(send: Call, account: Account, clock: Clock) -> None:
    clock.moment = NOW
    assert len(DOUBLED) == 18
    assert verdict_of(BODY, changed(webhook_timestamp=NOW), [SECRET]) == "refused"
    assert {case: answer for case, pairs in DOUBLED.items() if (answer := send(BODY, pairs)) != (401, REFUSED)} == {}
    assert send(BODY, None) == (401, REFUSED)
    assert not any(call.startswith("dynamodb") for call in account.calls)


@pytest.mark.parametrize("secrets", [[SECRET], [OTHER, SECRET], [SECRET, OTHER], [THIRD, OTHER, SECRET]])
def test_one_right_signature_of_one_valid_secret_suffices(secrets: list[str]) -> None:
    assert {case for case, headers in GENUINE.items() if verdict_of(BODY, headers, secrets) != "genuine"} == set()


@pytest.mark.parametrize(
    "secret",
    [
        "", "whsec_", SECRET.removeprefix("whsec_"), f" {SECRET}", f"{SECRET}\n", "whsec_***", "whsec_é", SECRET[:-1],
        "whsec_" + base64.b64encode(b"x" * 23).decode(), "whsec_" + base64.b64encode(b"x" * 65).decode(), None,
        b"whsec_",
    ],
)  # fmt: skip
def test_a_malformed_secret_is_our_fault_and_is_not_shown(secret: Any) -> None:
    for secrets in ([secret], [SECRET, secret]):
        with pytest.raises(SigningSecretUnavailable) as fault:
            verify(BODY, SIGNED, secrets, NOW)
        assert not isinstance(fault.value, WebhookRefused)
        assert "***" not in str(fault.value)
        assert SECRET not in str(fault.value)
        with pytest.raises(SigningSecretUnavailable):
            sign(BODY, webhook_id="msg_1", timestamp=NOW, secrets=secrets)


def test_a_dot_cannot_be_moved_between_id_timestamp_and_body() -> None:
    """Id `a`, timestamp `1750000000`, body `1750000001.x` are signed as id `a.1750000000` and so on would."""
    headers = {**signed(b"1750000001.x", webhook_id="a"), "webhook-id": "a.1750000000"}
    assert verdict_of(b"x", {**headers, "webhook-timestamp": "1750000001"}, [SECRET]) == "refused"


# -- time ---------------------------------------------------------------------------------------------------------


def test_timestamp_is_believed_for_exactly_five_minutes_around_the_present(send: Call, clock: Clock) -> None:
    verdicts = {
        -1e18: 401, -86400: 401, -301: 401, -300.001: 401, -300: 200, -299.999: 200, -1: 200, 0: 200, 0.5: 200,
        299.999: 200, 300: 200, 300.001: 401, 301: 401, 600: 401, 86400: 401, 1e18: 401,
    }  # fmt: skip
    found = {}
    for seconds in verdicts:
        clock.moment = NOW + seconds
        found[seconds] = send(BODY, SIGNED)[0]
    assert found == verdicts


# -- bodies -------------------------------------------------------------------------------------------------------

UNKNOWN = (200, "unknown prediction")

# Genuine, but no prediction or not one of ours: Replicate is told that it arrived, and nothing happens.
STRANGE: dict[str, bytes] = {
    "empty": b"",
    "a space": b" ",
    "a null": b"\0",
    "not JSON": b"hello",
    "an array": b"[]",
    "an array of one": b"[" + body_of(status="succeeded") + b"]",
    "a string": b'"succeeded"',
    "a number": b"1",
    "null": b"null",
    "true": b"true",
    "NaN": b"NaN",
    "Infinity": b"-Infinity",
    "an empty object": b"{}",
    "truncated": BODY[:-1],
    "truncated in a name": BODY[:3],
    "followed by more": BODY + b"{}",
    "twice": BODY * 2,
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep and whole": b"[" * 5_000 + b"]" * 5_000,
    "no id": b'{"status": "succeeded"}',
    "no status": b'{"id": "' + U1.encode() + b'"}',
    "an id of null": b'{"id": null, "status": "succeeded"}',
    "an id of NaN": b'{"id": NaN, "status": "succeeded"}',
    "an id of a number": b'{"id": 1, "status": "succeeded"}',
    "an id in capitals": body_of("U" * 26, "succeeded"),
    "an empty id": body_of("", "succeeded"),
    "an id that climbs": body_of("../../tokens", "succeeded"),
    "an id with a line end": body_of(f"{U1}\n", "succeeded"),
    "an id of wide letters": body_of("\uff55" * 26, "succeeded"),
    "an id beyond measure": body_of("u" * 65, "succeeded"),
    "a status of null": b'{"id": "' + U1.encode() + b'", "status": null}',
    "a status of a list": b'{"id": "' + U1.encode() + b'", "status": ["succeeded"]}',
    "a status beyond measure": body_of(status="s" * 65),
    "the id of another prediction": body_of(U1, "succeeded", webhook=f"{API_URL}/webhooks/replicate/{'y' * 26}"),
    "another stack's webhook": body_of(U1, "succeeded", webhook="https://other.example.com/hook"),
}

# Genuine and a prediction, whatever else is in it; the end is merged.
ODD: dict[str, bytes] = {
    "behind a byte order mark": b"\xef\xbb\xbf" + BODY,
    "in UTF-16": BODY.decode().encode("utf-16"),
    "in UTF-32": BODY.decode().encode("utf-32"),
    "NaN in the output": BODY.replace(b'"output": null', b'"output": [NaN, -Infinity, 1e999]'),
    "a number of many digits": BODY.replace(b'"output": null', b'"output": ' + b"9" * 4000),
    "half a surrogate pair": BODY.replace(b'"output": null', b'"output": "\\ud800"'),
    "half a surrogate pair as bytes": BODY.replace(b'"output": null', b'"output": "\xed\xa0\x80"'),
    "a null in a text": BODY.replace(b'"output": null', b'"output": "\\u0000"'),
    "a name twice": BODY.replace(b'"logs"', b'"status": "starting", "status": "succeeded", "logs"'),
    "logs of an object": BODY.replace(b'"logs": ""', b'"logs": {"a": [1]}'),
    "metrics of a list": BODY.replace(b'"logs"', b'"metrics": [1], "logs"'),
    "urls of a text": BODY.replace(b'"logs"', b'"urls": "x", "logs"'),
    "times of numbers": BODY.replace(b'"logs"', b'"completed_at": 1, "started_at": {}, "logs"'),
    "a name of ours": BODY.replace(b'"logs"', b'"pk": "tokens", "rank": 99, "logs"'),
    "dunder names": BODY.replace(b'"logs"', b'"__proto__": {"a": 1}, "__class__": "x", "logs"'),
    "spaces around": b" \r\n\t" + BODY + b"\n",
    "invalid UTF-8": BODY.replace(b'"output": null', b'"output": "\xff\xfe"'),
    "overlong UTF-8": BODY.replace(b'"logs": ""', b'"logs": "\xc0\xaf"'),
    "a control character": BODY.replace(b'"output": null', b'"output": "\x01"'),
}

# Genuine and a prediction, in a state that nobody knows: it is bound, and has not ended.
UNKNOWN_WORDS: dict[str, bytes] = {
    "invalid UTF-8": BODY.replace(b"succeeded", b"succ\xff\xfe"),
    "overlong UTF-8": BODY.replace(b"succeeded", b"\xc0\xaf"),
    "a control character": BODY.replace(b"succeeded", b"succ\x01eeded"),
    "capitals": BODY.replace(b"succeeded", b"SUCCEEDED"),
    "another word": BODY.replace(b"succeeded", b"paused"),
}


def test_genuine_webhook_of_anything_else_than_a_prediction_changes_nothing(
    send: Call, account: Account, clock: Clock
) -> None:
    clock.moment = NOW
    prediction_id = intent(clock)
    before, items = frozen(account.table), dict(account.table.items)
    wrong = {}
    for case, body in STRANGE.items():
        answer = send(body, signed(body), prediction_id)
        if answer != UNKNOWN or frozen(account.table) != before:
            wrong[case] = answer
            account.table.items = dict(items)
    assert wrong == {}
    for path in ("", "x", prediction_id.upper(), f"{prediction_id}x", "%2e%2e", "tokens", "é", "\x00", "x" * 5000):
        answer = send(BODY, SIGNED, path)
        assert answer in (UNKNOWN, (404, f"Route POST /webhooks/replicate/{path} not found.")), path
    assert frozen(account.table) == before


def test_genuine_webhook_with_odd_contents_ends_the_prediction_all_the_same(
    send: Call, account: Account, clock: Clock
) -> None:
    clock.moment = NOW
    wrong = {}
    for case, body in ODD.items():
        account.table.items.clear()
        prediction_id = intent(clock)
        answers = [send(body, signed(body), prediction_id) for _ in range(2)]
        whole = predictions().read(prediction_id)
        if answers != [(200, "merged"), (200, "nothing new")] or not whole or whole.prediction.visible != "succeeded":
            wrong[case] = answers
        else:
            json.dumps([whole.output, whole.logs], allow_nan=False).encode()
    assert wrong == {}


def test_genuine_webhook_of_an_unknown_status_binds_and_ends_nothing(
    send: Call, account: Account, clock: Clock
) -> None:
    clock.moment = NOW
    wrong: dict[str, Any] = {}
    for case, body in UNKNOWN_WORDS.items():
        account.table.items.clear()
        prediction_id = intent(clock)
        answer, found = send(body, signed(body), prediction_id), predictions().get(prediction_id)
        if answer != (200, "merged") or not found or (found.upstream_id, found.visible) != (U1, "starting"):
            wrong[case] = answer, found
        elif send(BODY, SIGNED, prediction_id) != (200, "merged"):
            wrong[case] = "its end is not taken any more", found
    assert wrong == {}


PACKED = base64.b64encode(BODY).decode()
ALTERED = "The body is not valid UTF-8. Send it as UTF-8."
NO_BASE64 = "The body is not valid base64."
LENGTH = {"Content-Type": "application/json", "Content-Length": str(len(BODY))}


def test_body_that_came_in_another_way_than_it_says(send: Call, account: Account, clock: Clock) -> None:
    clock.moment = NOW
    text = BODY.decode()
    latin = {**signed(b'{"id": "\xe9"}'), "Content-Type": "application/json", "Content-Length": "10"}
    cases: dict[str, tuple[tuple[int, str], str | None, Headers, dict[str, Any]]] = {
        "as text": (UNKNOWN, text, SIGNED, {}),
        "as text, with its length": (UNKNOWN, text, {**SIGNED, **LENGTH}, {}),
        "as base64": (UNKNOWN, PACKED, SIGNED, {"isBase64Encoded": True}),
        "base64 that is called text": ((401, REFUSED), PACKED, SIGNED, {}),
        "text that is called base64": ((400, NO_BASE64), text, SIGNED, {"isBase64Encoded": True}),
        "base64 without padding": ((400, NO_BASE64), PACKED.rstrip("=") + "A", SIGNED, {"isBase64Encoded": True}),
        "base64 that is not ASCII": ((400, NO_BASE64), "é" * 8, SIGNED, {"isBase64Encoded": True}),
        "base64 with a line end": ((400, NO_BASE64), f"{PACKED}\n", SIGNED, {"isBase64Encoded": True}),
        "base64 of base64": (
            (401, REFUSED), base64.b64encode(PACKED.encode()).decode(), SIGNED, {"isBase64Encoded": True},
        ),
        "no body": ((401, REFUSED), None, SIGNED, {}),
        "no body as base64": ((401, REFUSED), None, SIGNED, {"isBase64Encoded": True}),
        "an empty body": ((401, REFUSED), "", SIGNED, {}),
        "half a surrogate pair": ((401, REFUSED), "\ud800", SIGNED, {}),
        "Latin-1 that was taken for UTF-8": ((400, ALTERED), '{"id": "\ufffd"}', latin, {}),
        # As API Gateway sends it, without a length: the signature is over other bytes.
        "Latin-1 that API Gateway took for UTF-8": (
            (401, REFUSED), '{"id": "\ufffd"}', {n: v for n, v in latin.items() if n != "Content-Length"}, {},
        ),
        "a length that is another": ((400, ALTERED), text, {**SIGNED, **LENGTH, "Content-Length": "1"}, {}),
        "a length that is none": (UNKNOWN, text, {**SIGNED, **LENGTH, "Content-Length": "-1"}, {}),
        "a length of other digits": (UNKNOWN, text, {**SIGNED, **LENGTH, "Content-Length": "\u0661"}, {}),
        "identity": (UNKNOWN, text, {**SIGNED, "Content-Encoding": "Identity"}, {}),
        **{
            f"charset {name}": (UNKNOWN, text, {**SIGNED, "Content-Type": f"application/json; charset={name}"}, {})
            for name in ("utf-8", "UTF-8", "utf-16", "iso-8859-1", "utf-7", "x", "")
        },
        **{
            f"type {kind}": (UNKNOWN, text, {**SIGNED, "Content-Type": kind}, {})
            for kind in ("", "text/plain", "text/html", "multipart/form-data", "application/x-www-form-urlencoded", "x")
        },
    }  # fmt: skip
    for coding in ("gzip", "GZIP", "deflate", "br", "zstd", "gzip, gzip", "identity, gzip", "x", "é"):
        cases[f"coding {coding}"] = (415, ""), text, {**SIGNED, "Content-Encoding": coding}, {}
    wrong = {}
    for case, (expected, body, headers, changes) in cases.items():
        account.calls.clear()
        status, told = send(body, headers, **changes)
        in_the_table = any(call.startswith("dynamodb") for call in account.calls)
        if (status, told if expected[1] else "") != expected or in_the_table != (status == 200):
            wrong[case] = status, told
    assert wrong == {}


def test_body_over_the_limit_is_refused_even_if_signed(send: Call, account: Account, clock: Clock) -> None:
    clock.moment = NOW
    for size, expected in ((MAX_BODY_BYTES, UNKNOWN), (MAX_BODY_BYTES + 1, (401, REFUSED))):
        body = b"x" * size
        assert send(body, signed(body)) == expected


# -- single bits --------------------------------------------------------------------------------------------------

TWICE_SIGNED = signed(BODY, secrets=(OTHER, SECRET))


def genuine_after(part: str, original: bytes, altered: bytes) -> bool:
    """Whether a changed request is the same one: names have no case, and one right signature is enough."""
    if part.startswith("name of"):
        return altered.lower() == original.lower()
    if part != "webhook-signature":
        return False
    right = original.split(b" ")[-1] if b" " in original else original
    entries = altered.split(b" ")
    well_formed = all(
        re.fullmatch(rb"v1,[A-Za-z0-9+/]{43}=|(?!v1,)v[0-9]{1,3}[a-z]?,.+", each, re.DOTALL) for each in entries
    )
    return well_formed and right in entries


def flip(headers: Headers, rng: random.Random) -> tuple[str, bytes, bytes, list[tuple[str, str]]]:
    """Changes one bit of a signed request: which part, that part before and after, and the headers then."""
    parts: dict[str, bytes] = {"body": BODY}
    for name, value in headers.items():
        parts[f"name of {name}"], parts[name] = name.encode(), value.encode()
    part = rng.choices(list(parts), [len(text) for text in parts.values()])[0]
    bit = rng.randrange(8 * len(parts[part]))
    altered = bytearray(parts[part])
    altered[bit // 8] ^= 1 << bit % 8
    after = {**parts, part: bytes(altered)}
    # As they come from a socket: bytes that HTTP servers show as Latin-1 text.
    pairs = [(after[f"name of {name}"].decode("latin-1"), after[name].decode("latin-1")) for name in headers]
    return part, parts[part], bytes(altered), pairs


@pytest.mark.parametrize("headers", [SIGNED, TWICE_SIGNED], ids=["one signature", "two signatures"])
def test_each_single_bit_that_changes_is_noticed_or_of_no_importance(
    headers: Headers, record_property: Recorded
) -> None:
    record_property("changed bits", CHANGES // 2)
    rng = random.Random(SEED)  # noqa: S311  # not for secrets
    verdicts = {"refused": 0, "genuine": 0}
    for _ in range(CHANGES // 2):
        part, original, altered, pairs = flip(headers, rng)
        expected = "genuine" if genuine_after(part, original, altered) else "refused"
        try:
            verify(altered if part == "body" else BODY, dict(pairs), [SECRET], NOW)
            found = "genuine"
        except WebhookRefused:
            found = "refused"
        assert found == expected, (part, original, altered)
        verdicts[found] += 1
    assert verdicts["genuine"] > 500, "the case of names"
    assert verdicts["refused"] > 40_000


def test_each_single_bit_that_changes_is_noticed_at_the_door(
    send: Call, account: Account, clock: Clock, record_property: Recorded
) -> None:
    record_property("changed bits", CHANGES_THROUGH_THE_DOOR)
    clock.moment = NOW
    rng = random.Random(SEED + 1)  # noqa: S311  # not for secrets
    genuine = 0
    for n in range(CHANGES_THROUGH_THE_DOOR):
        part, original, altered, pairs = flip((SIGNED, TWICE_SIGNED)[n % 2], rng)
        expected = UNKNOWN if genuine_after(part, original, altered) else (401, REFUSED)
        assert send(altered if part == "body" else BODY, pairs) == expected, (part, original, altered)
        genuine += expected == UNKNOWN
    assert 10 < genuine < CHANGES_THROUGH_THE_DOOR / 4


# -- again, and with other secrets --------------------------------------------------------------------------------


def test_replay_does_nothing_again_and_ends_after_five_minutes(send: Call, account: Account, clock: Clock) -> None:
    clock.moment = NOW
    prediction_id, other_id = intent(clock), intent(clock)
    assert send(BODY, SIGNED, prediction_id) == (200, "merged")
    after = frozen(account.table)
    for seconds, expected in ((0, (200, "nothing new")), (299, (200, "nothing new")), (301, (401, REFUSED))):
        clock.moment = NOW + seconds
        assert send(BODY, SIGNED, prediction_id) == expected
        # To the address of another prediction, which is not bound yet:
        assert send(BODY, SIGNED, other_id) == (UNKNOWN if seconds < 300 else (401, REFUSED))
        assert frozen(account.table) == after
    assert account.woken == [TOKEN] * 3


def test_previous_secret_is_believed_for_a_day_and_no_longer(send: Call, account: Account, clock: Clock) -> None:
    def rotated(current: str, previous: str | None) -> None:
        moment = datetime.fromtimestamp(clock.moment, UTC).isoformat()
        account.secret = {"current": current, "previous": previous, "rotated_at": moment}

    def verdicts() -> list[int]:
        return [send(BODY, signed(BODY, at=clock.moment, secrets=(each,)))[0] for each in (SECRET, OTHER, THIRD)]

    clock.moment = NOW
    assert verdicts() == [200, 401, 401]
    clock.moment += 60
    rotated(OTHER, SECRET)
    assert verdicts() == [200, 200, 401], "read again for a signature that does not match"
    found = {}
    for seconds in (60, 3600, 86398, 86400, 86700, 10**6):
        clock.moment = NOW + 60 + seconds
        found[seconds] = verdicts()
    believed, over = [200, 200, 401], [401, 200, 401]
    assert found == {60: believed, 3600: believed, 86398: believed, 86400: over, 86700: over, 10**6: over}
    rotated(THIRD, OTHER)
    clock.moment += 60
    assert verdicts() == [401, 200, 200], "the one before the previous one is not believed"
    # Rotated away because it leaked: nothing is left to believe it.
    rotated(THIRD, None)
    clock.moment += 300
    assert verdicts() == [401, 401, 200]
    account.secret = {}
    clock.moment += 300
    assert verdicts() == [503, 503, 503]


# -- every order --------------------------------------------------------------------------------------------------


def predictions() -> PredictionsTable:
    return PredictionsTable("predictions", OutputsBucket("outputs"), aws.client("dynamodb"))


def intent(clock: Clock, upstream_id: str | None = None) -> str:
    """A prediction that was submitted, by default one whose answer was lost; an execution waits for its end."""
    table = predictions()
    prediction = put(table, clock)
    if upstream_id:
        table.merge(prediction.id, told("starting", upstream_id), clock.now())
    item = aws.client("dynamodb").update_item(
        TableName="predictions",
        Key={"pk": {"S": f"prediction#{prediction.id}"}, "sk": {"S": "status"}},
        UpdateExpression="SET task_token = :token",
        ExpressionAttributeValues={":token": {"S": TOKEN}},
        ReturnValues="ALL_NEW",
    )
    assert item["Attributes"]["task_token"] == {"S": TOKEN}
    return prediction.id


def frozen(table: Table) -> str:
    """All that is in a table."""
    return json.dumps(sorted((key, item) for key, item in table.items.items()), sort_keys=True)


EVENTS: dict[str, dict[str, Any]] = {
    "start": {"status": "processing"},
    "output": {"status": "processing", "output": ["a"]},
    "more output": {"status": "processing", "output": ["a", "b"], "logs": "1\n"},
    "logs": {"status": "processing", "logs": "1\n2\n"},
    "late": {"status": "starting"},
    "a word of the future": {"status": "paused", "output": ["?"]},
    "succeeded": {"status": "succeeded", "output": ["a", "b", "c"], "logs": "1\n2\n3\n", "completed_at": "at 1"},
    "succeeded with a file": {"status": "succeeded", "output": FILE, "completed_at": "at 2"},
    "failed": {"status": "failed", "error": "no paint", "completed_at": "at 3"},
    "canceled": {"status": "canceled", "output": ["a"], "completed_at": "at 4"},
    "start of another": {"id": U2, "status": "processing", "output": ["other"]},
    "end of another": {"id": U2, "status": "succeeded", "output": ["other"], "completed_at": "at 5"},
    "of another address": {
        "id": "w" * 26,
        "status": "succeeded",
        "webhook": "https://x.example.com/webhooks/replicate/y",
    },
}
LENGTH_OF_ORDERS = 7


@dataclass(frozen=True)
class Expected:
    """The oracle: what must have come of the events so far, told in the words of the promises.

    The first prediction of Replicate's that reports is ours, and stays it. The first end stays. Before it, a status
    only moves on, and what is shown of output and logs only grows. A second prediction that runs is remembered, to be
    canceled; one that has ended, or that somebody else asked for, is not.
    """

    bound: str | None = None
    status: str = "queued"
    output: str = "null"
    logs: str | None = None
    error: str | None = None
    completed_at: str | None = None
    progress: str = ""
    orphans: frozenset[str] = frozenset()
    woken: bool = False

    def after(self, event: dict[str, Any]) -> tuple["Expected", str]:
        upstream_id, status = event.get("id", U1), event["status"]
        ends = status in ("succeeded", "failed", "canceled")
        same = replace(self, woken=False)
        if "webhook" in event:
            return same, "unknown prediction"
        if self.bound not in (None, upstream_id):
            return replace(same, orphans=self.orphans | {upstream_id}), "orphan"
        if self.status in ("succeeded", "failed", "canceled"):
            return replace(same, woken=True), "nothing new"
        new = replace(same, bound=upstream_id, woken=ends)
        if ends:
            return replace(
                new, status=status, output=json.dumps(event.get("output")), logs=event.get("logs", ""),
                error=event.get("error"), completed_at=event["completed_at"],
            ), "merged"  # fmt: skip
        order = ("queued", "paused", "starting", "processing")
        if status == "processing" and (event.get("output") or event.get("logs")):
            text = json.dumps([event.get("output"), event.get("logs", "")])
            if len(text) > len(self.progress):
                new = replace(new, progress=text, output=json.dumps(event.get("output")), logs=event.get("logs", ""))
        moved = status != "paused" and order.index(status) > order.index(self.status)
        new = replace(new, status=status if moved else self.status)
        return new, "merged" if moved or self.bound is None else "nothing new"


def seen(prediction_id: str, woken: list[str]) -> Expected:
    """The same, from the table as its readers see it."""
    whole = predictions().read(prediction_id)
    assert whole is not None
    prediction = whole.prediction
    copying = whole.output == FILE
    shown = {"queued": "starting"}.get(prediction.status, prediction.status)
    assert prediction.visible == ("processing" if copying else shown)
    assert prediction.terminal == (prediction.status in ("succeeded", "failed", "canceled"))
    return Expected(
        prediction.upstream_id, prediction.status, json.dumps(whole.output), whole.logs, prediction.error,
        prediction.completed_at, "", prediction.orphans, bool(woken),
    )  # fmt: skip


@pytest.mark.parametrize("bound", [None, U1], ids=["answer lost", "answered"])
def test_every_order_of_up_to_seven_events_ends_in_the_right_state(
    send: Call, account: Account, clock: Clock, bound: str | None, record_property: Recorded
) -> None:
    """All orders with repetition, 13 + 13² + … + 13⁷: those that lead to the same table and the same expectation go on
    alike, since the function knows nothing else, so from each such pair each event is sent once.
    """  # fmt: skip
    clock.moment = NOW
    prediction_id = intent(clock, bound)
    webhook = f"{API_URL}/webhooks/replicate/{prediction_id}"
    bodies = {
        name: json.dumps({"id": U1, "logs": "", "webhook": webhook, **event}).encode() for name, event in EVENTS.items()
    }
    headers = {name: signed(body) for name, body in bodies.items()}
    first = Expected(bound, "starting" if bound else "queued")
    Pair = tuple[str, Expected]  # noqa: N806  # a type
    tables: dict[str, dict[tuple[str, str], Item]] = {frozen(account.table): dict(account.table.items)}
    orders: dict[Pair, int] = {(frozen(account.table), first): 1}
    edges: dict[Pair, list[Pair]] = {}
    all_orders = 0
    for _ in range(LENGTH_OF_ORDERS):
        further: dict[Pair, int] = {}
        for pair, count in orders.items():
            if pair not in edges:
                edges[pair] = []
                for name, event in EVENTS.items():
                    account.table.items = dict(tables[pair[0]])
                    account.woken.clear()
                    account.polled.clear()
                    expected, receipt = pair[1].after(event)
                    answer = send(bodies[name], headers[name], prediction_id)
                    assert answer == (200, receipt), (pair, name)
                    # An orphan is canceled by a poll that is asked for at once, and counted if it has ended.
                    assert account.polled == [prediction_id] * (receipt == "orphan"), (pair, name)
                    assert replace(seen(prediction_id, account.woken), progress=expected.progress) == expected, name
                    state = frozen(account.table)
                    tables.setdefault(state, dict(account.table.items))
                    edges[pair].append((state, replace(expected, woken=False)))
            for next_pair in edges[pair]:
                further[next_pair] = further.get(next_pair, 0) + count
        orders = further
        all_orders += sum(orders.values())
    assert all_orders == sum(13**n for n in range(1, 8)) == 67_977_559
    record_property("orders", all_orders)
    record_property("webhooks from each state", len(edges) * len(EVENTS))
    assert len(edges) > 40
