import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from predictions.errors import Problem
from predictions.ids import derived_id, is_id, random_id
from predictions.intents.model import Intent, Reference, create_intent, model_reference, wait_seconds
from predictions.validation import BODY_LIMIT_BYTES, DEPTH_LIMIT, input_json_canonical, parse_json

VERSION = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
BODY = {"version": VERSION, "input": {"prompt": "a red fox"}}


def intent_of(
    body: Any, *, reference: Reference | None = None, loopback: bool = False, owner: str = "alice", **headers: Any
) -> Intent:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return create_intent(raw, named, owner=owner, reference=reference, allow_loopback_webhooks=loopback)


def refused(body: Any, **options: Any) -> Problem:
    with pytest.raises(Problem) as refusal:
        intent_of(body, **options)
    problem = refusal.value
    assert 400 <= problem.status < 500
    assert problem.detail
    assert problem.title
    assert problem.body()["status"] == problem.status
    json.dumps(problem.body()).encode("ascii")  # can be answered, whatever was sent
    return problem


def fields_of(problem: Problem) -> list[str]:
    return [field["field"] for field in problem.invalid_fields]


NOT_JSON = {
    "nothing": b"",
    "white space": b" \n",
    "text": b"prompt=a+red+fox",
    "cut off": b'{"input": {"prompt": "a red',
    "two values": b'{"input": {}} {"input": {}}',
    "a comment": b'{"input": {}} // hello',
    "a trailing comma": b'{"input": {},}',
    "single quotes": b"{'input': {}}",
    "NaN": b'{"input": {"seed": NaN}}',
    "Infinity": b'{"input": {"seed": Infinity}}',
    "-Infinity": b'{"input": {"seed": -Infinity}}',
    "a float beyond 64 bits": b'{"input": {"seed": 1e999}}',
    "a negative float beyond 64 bits": b'{"input": {"seed": -1e999}}',
    "an integer beyond 64-bit floats": b'{"input": {"seed": 1' + b"0" * 400 + b"}}",
    "an integer that Python does not read": b'{"input": {"seed": 1' + b"0" * 5000 + b"}}",
    "invalid UTF-8": b'{"input": {"prompt": "\xff"}}',
    "UTF-16": '{"input": {}}'.encode("utf-16"),
    "a surrogate in UTF-8": b'{"input": {"prompt": "\xed\xa0\x80"}}',
    "half a surrogate pair": b'{"input": {"prompt": "\\ud800"}}',
    "half a surrogate pair in a key": b'{"input": {"\\udfff": 1}}',
    "a byte order mark": b'\xef\xbb\xbf{"input": {}}',
    "a control character": b'{"input": {"prompt": "\x00"}}',
    "a key twice": b'{"input": {"seed": 1}, "input": {"seed": 2}}',
    "a key twice further in": b'{"input": {"options": [{"seed": 1, "seed": 2}]}}',
    "100 000 lists": b'{"input": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
    "100 000 lists that do not close": b"[" * 100_000,
    "100 000 objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "one level too deep": b'{"input":' + b"[" * DEPTH_LIMIT + b"]" * DEPTH_LIMIT + b"}",
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    assert refused(body, reference=Reference("version", None, VERSION)).status == 400


@pytest.mark.parametrize("body", [b"[]", b"null", b"true", b"1", b'"input"', b'[{"input": {}}]'])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    problem = refused(body)
    assert problem.status == 422
    assert "`input`" in problem.detail


@pytest.mark.parametrize("prompt", ["", "x" * 100, "\x00\x1f", "é", "🦊"])
def test_whatever_text_json_can_hold_is_kept(prompt: str) -> None:
    assert json.loads(intent_of({**BODY, "input": {"prompt": prompt}}).input_json) == {"prompt": prompt}


@pytest.mark.parametrize(
    "number", [0, -1, 2**53 + 1, 2**64, -(10**300), 0.1, 1.7976931348623157e308, 5e-324, True, None]
)
def test_whatever_number_json_can_hold_is_kept(number: Any) -> None:
    kept = json.loads(intent_of({**BODY, "input": {"n": number}}).input_json)["n"]
    assert (type(kept), kept) == (type(number), number)


def test_the_deepest_body_is_kept() -> None:
    depth = DEPTH_LIMIT - 2  # the body and `input` are levels too
    body = b'{"input": {"x": ' + b"[" * depth + b"]" * depth + b"}}"
    assert intent_of(body, reference=Reference("version", None, VERSION)).input_json.count("[") == depth


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(body: bytes) -> None:
    refusal, value = None, None
    try:
        value = parse_json(body, "application/json")
    except Problem as problem:
        refusal = problem
    assert refusal is None or refusal.status == 400
    assert json.loads(json.dumps(value, allow_nan=False)) == value


def test_a_body_above_the_limit_is_refused_and_told_both_sizes() -> None:
    body = json.dumps({**BODY, "input": {"image": "x" * BODY_LIMIT_BYTES}}).encode()
    problem = refused(body)
    assert problem.status == 413
    assert str(len(body)) in problem.detail
    assert str(BODY_LIMIT_BYTES) in problem.detail


def test_the_largest_body_is_taken() -> None:
    frame = len(json.dumps({**BODY, "input": {"image": ""}}))
    body = json.dumps({**BODY, "input": {"image": "x" * (BODY_LIMIT_BYTES - frame)}}).encode()
    assert len(body) == BODY_LIMIT_BYTES
    assert len(intent_of(body).input_json) < BODY_LIMIT_BYTES


@pytest.mark.parametrize(
    "media_type",
    [
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "application/xml",
        "application/jsonx",
        "application/octet-stream",
        "json",
        ";",
        "x" * 10_000,
        "\u00e9",
        "application/json; charset=utf-16",
        'application/json;Charset="ISO-8859-1"; x=y',
        "application/json; charset=",
        "application/json; charset=" + "\u00e9" * 10_000,
    ],
)
def test_another_media_type_or_charset_is_refused(media_type: str) -> None:
    problem = refused(BODY, content_type=media_type)
    assert problem.status == 415
    assert len(problem.detail) < 300


@pytest.mark.parametrize(
    "media_type",
    [
        "application/json",
        "APPLICATION/JSON; charset=utf-8",
        'application/json;charset="UTF8"',
        "application/json; charset=us-ascii",
        "application/ld+json",
        " application/json ",
    ],
)
def test_a_media_type_of_json_is_taken(media_type: str) -> None:
    assert intent_of(BODY, content_type=media_type).reference.version == VERSION


WRONG_FIELDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no input": ({"input": ...}, ["input"]),
    "input null": ({"input": None}, ["input"]),
    "input a list": ({"input": []}, ["input"]),
    "input text": ({"input": "a red fox"}, ["input"]),
    "input a number": ({"input": 1}, ["input"]),
    "no version": ({"version": ...}, ["version"]),
    "version null": ({"version": None}, ["version"]),
    "version a number": ({"version": 1}, ["version"]),
    "version a list": ({"version": [VERSION]}, ["version"]),
    "version too long": ({"version": "a/" + "b" * 1000}, ["version"]),
    "an unknown field": ({"inputs": {}}, ["inputs"]),
    "two unknown fields": ({"prompt": "a red fox", "seed": 1}, ["prompt", "seed"]),
    "an id": ({"id": "abcdefghijklmnopqrstuvwxyz"}, ["id"]),
    "webhook a number": ({"webhook": 1}, ["webhook"]),
    "webhook an object": ({"webhook": {"url": "https://example.com"}}, ["webhook"]),
    "webhook_completed a flag": ({"webhook_completed": True}, ["webhook_completed"]),
    "webhook_events_filter text": ({"webhook_events_filter": "completed"}, ["webhook_events_filter"]),
    "an unknown event": ({"webhook_events_filter": ["completed", "done"]}, ["webhook_events_filter.1"]),
    "an event not text": ({"webhook_events_filter": [1]}, ["webhook_events_filter.0"]),
    "five events": ({"webhook_events_filter": ["start"] * 5}, ["webhook_events_filter"]),
    "stream text": ({"stream": "true"}, ["stream"]),
    "stream a number": ({"stream": 1}, ["stream"]),
    "lifetime an object": ({"lifetime": {}}, ["lifetime"]),
    "lifetime a flag": ({"lifetime": True}, ["lifetime"]),
    "lifetime a fraction": ({"lifetime": 30.5}, ["lifetime"]),
    "several": ({"input": 1, "stream": 1, "x": 1}, ["input", "stream", "x"]),
    "several of the second look": (
        {"version": "x", "webhook": "http://example.com", "lifetime": "0"},
        ["version", "webhook", "lifetime"],
    ),
}


@pytest.mark.parametrize(("change", "fields"), WRONG_FIELDS.values(), ids=WRONG_FIELDS)
def test_a_wrong_field_is_refused_by_its_name(change: dict[str, Any], fields: list[str]) -> None:
    body = {name: value for name, value in {**BODY, **change}.items() if value is not ...}
    problem = refused(body)
    assert problem.status == 422
    assert sorted(fields_of(problem)) == sorted(fields)
    assert all(field["detail"] for field in problem.invalid_fields)
    assert fields[0] in problem.detail


def test_an_unknown_field_is_answered_with_the_known_ones() -> None:
    [field] = refused({**BODY, "promt": "x"}).invalid_fields
    assert all(f"`{name}`" in field["detail"] for name in ("input", "version", "webhook", "lifetime"))


def test_any_number_of_unknown_fields_of_any_length_gets_a_short_answer() -> None:
    many = {"x" * 1000 + str(n): n for n in range(2000)}
    assert len(json.dumps(refused({**BODY, **many}).body())) < 50_000


BAD_VERSIONS = [
    "",
    "/",
    "fox",
    "owner/",
    "/name",
    "owner//name",
    "owner/name/more",
    "owner/name:",
    "owner/name:latest",
    f"owner/name:{VERSION[:-1]}",
    f"owner/name:{VERSION}0",
    f"owner/name:{VERSION.upper()}",
    f"owner/name:{VERSION}:{VERSION}",
    f":{VERSION}",
    VERSION[:-1],
    VERSION + "0",
    VERSION.upper(),
    VERSION + "\n",
    "owner/name\n",
    "owner\n/name",
    "owner/name ",
    " owner/name",
    "owner/na me",
    "../models",
    "owner/..",
    "./name",
    "owner/name/../../account",
    "owner/%2e%2e",
    "owner%2Fname",
    "owner/name?x=1",
    "owner/name#x",
    "owner\\name",
    "owner/name\x00",
    "öwner/name",
    "owner/\u0661",
    "owner/name.",
    "-owner/name",
    "owner/" + "n" * 65,
    "https://replicate.com/owner/name",
]


@pytest.mark.parametrize("version", BAD_VERSIONS, ids=repr)
def test_a_bad_model_reference_is_refused(version: str) -> None:
    problem = refused({**BODY, "version": version})
    assert problem.status == 422
    assert fields_of(problem) == ["version"]
    assert "owner/name" in problem.detail


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (VERSION, Reference("version", None, VERSION)),
        (f"stability-ai/sdxl:{VERSION}", Reference("version", "stability-ai/sdxl", VERSION)),
        ("meta/meta-llama-3-70b-instruct", Reference("model", "meta/meta-llama-3-70b-instruct")),
        ("a/b", Reference("model", "a/b")),
        ("black-forest-labs/flux-1.1-pro", Reference("model", "black-forest-labs/flux-1.1-pro")),
        ("owner_1/name_", Reference("model", "owner_1/name_")),
    ],
)
def test_a_model_reference_is_read(version: str, expected: Reference) -> None:
    assert intent_of({**BODY, "version": version}).reference == expected


@pytest.mark.parametrize("kind", ["model", "deployment"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("..", ".."),
        (".", "."),
        ("owner", ".."),
        ("owner", "."),
        ("..", "predictions"),
        ("owner", "%2e%2e"),
        ("%2E%2E", "name"),
        ("owner", "name%2Fpredictions"),
        ("owner", "name/../../x"),
        ("owner", "a/b"),
        ("owner", "name\n"),
        ("owner\r\nX: y", "name"),
        ("owner", ""),
        ("", "name"),
        ("owner", "name?x"),
        ("owner", "name#x"),
        ("owner", "name:latest"),
        ("owner", f"name:{VERSION}"),
        ("owner", "na me"),
        ("owner", "name\x00"),
        ("owner", "ñ"),
        ("owner", "\ud800"),
        ("o" * 65, "name"),
        ("owner", "n" * 10_000),
    ],
)
def test_a_route_with_a_bad_name_is_not_found(kind: Any, owner: str, name: str) -> None:
    with pytest.raises(Problem) as refusal:
        model_reference(kind, owner, name)
    assert refusal.value.status == 404
    assert kind in refusal.value.detail
    assert len(refusal.value.detail) < 200


def test_a_route_names_what_runs() -> None:
    reference = model_reference("deployment", "acme", "upscaler-2.0")
    assert reference == Reference("deployment", "acme/upscaler-2.0")
    assert intent_of({"input": {}}, reference=reference).reference == reference


@pytest.mark.parametrize("kind", ["model", "deployment"])
def test_a_version_beside_a_route_that_names_the_model_is_refused(kind: Any) -> None:
    problem = refused(BODY, reference=Reference(kind, "acme/upscaler"))
    assert (problem.status, fields_of(problem)) == (422, ["version"])


BAD_WEBHOOKS = [
    "",
    " ",
    "example.com/hook",
    "//example.com/hook",
    "http://example.com/hook",
    "ftp://example.com/hook",
    "file:///etc/passwd",
    "javascript:alert(1)",
    "https://",
    "https:///hook",
    "https://user:secret@example.com/hook",
    "https://user@example.com/hook",
    "https://example.com@10.0.0.1/hook",
    "https://localhost/hook",
    "https://localhost:8443/hook",
    "https://127.0.0.1/hook",
    "https://127.1/hook",
    "https://0x7f000001/hook",
    "https://2130706433/hook",
    "https://017700000001/hook",
    "https://0.0.0.0/hook",
    "https://10.1.2.3/hook",
    "https://172.16.0.1/hook",
    "https://192.168.1.1/hook",
    "https://100.64.0.1/hook",
    "https://169.254.169.254/latest/meta-data/",
    "https://[::1]/hook",
    "https://[::ffff:169.254.169.254]/hook",
    "https://[fd00:ec2::254]/hook",
    "https://[fe80::1%25eth0]/hook",
    "https://metadata.google.internal/hook",
    "https://intranet/hook",
    "https://printer.local/hook",
    "https://example.com:22/hook",
    "https://example.com:0/hook",
    "https://example.com:99999/hook",
    "https://example.com:port/hook",
    "https://example.com/hook#fragment",
    "https://example.com/ho ok",
    "https://example.com/hook\n",
    "https://example.com\r\nHost: internal/hook",
    "https://example.com\\@10.0.0.1/hook",
    "https://ex\u00e4mple.com/hook",
    "https://example.com/" + "x" * 3000,
]


@pytest.mark.parametrize("field", ["webhook", "webhook_completed"])
@pytest.mark.parametrize("url", BAD_WEBHOOKS, ids=lambda url: repr(url[:60]))
def test_a_bad_webhook_url_is_refused(field: str, url: str) -> None:
    problem = refused({**BODY, field: url})
    assert (problem.status, fields_of(problem)) == (422, [field])
    assert "secret" not in problem.detail


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/hook", "http://localhost:1234/", "https://127.0.0.1/hook"])
def test_a_webhook_to_this_machine_is_for_the_local_cloud_only(url: str) -> None:
    assert intent_of({**BODY, "webhook": url}, loopback=True).webhook == url
    assert fields_of(refused({**BODY, "webhook": url})) == ["webhook"]


@pytest.mark.parametrize("url", ["http://10.0.0.1/hook", "http://example.com/hook", "https://169.254.169.254/"])
def test_the_local_cloud_refuses_other_private_webhooks(url: str) -> None:
    assert fields_of(refused({**BODY, "webhook": url}, loopback=True)) == ["webhook"]


def test_a_webhook_is_kept_with_its_events() -> None:
    url = "https://example.com:8443/hook?user=1"
    events = ["completed", "start", "completed"]
    intent = intent_of({**BODY, "webhook": url, "webhook_events_filter": events})
    assert (intent.webhook, intent.webhook_events_filter) == (url, ("completed", "start"))


def test_webhook_completed_is_a_webhook_for_the_end_only() -> None:
    intent = intent_of({**BODY, "webhook_completed": "https://example.com/hook"})
    assert (intent.webhook, intent.webhook_events_filter) == ("https://example.com/hook", ("completed",))


BAD_DURATIONS = [
    "",
    " ",
    "0",
    "4",
    "4s",
    "0h0m4s",
    "-30",
    "+30",
    "30.5",
    "1e3",
    "30 s",
    "s",
    "h",
    "30d",
    "5m1h",
    "30S",
    "1h1h",
    "forever",
    "259201",
    "73h",
    "9" * 400,
    "٣٠",
    "30\x00",
    "30s; x",
    "PT30S",
]


@pytest.mark.parametrize("duration", BAD_DURATIONS, ids=lambda text: repr(text[:20]))
def test_a_bad_deadline_is_refused(duration: str) -> None:
    problem = refused(BODY, cancel_after=duration)
    assert (problem.status, fields_of(problem)) == (422, ["Cancel-After"])
    problem = refused({**BODY, "lifetime": duration})
    assert (problem.status, fields_of(problem)) == (422, ["lifetime"])
    assert "5 seconds" in problem.detail


@pytest.mark.parametrize("lifetime", [0, 4, -30, 259_201, 10**300])
def test_a_bad_number_of_seconds_is_refused(lifetime: int) -> None:
    assert fields_of(refused({**BODY, "lifetime": lifetime})) == ["lifetime"]


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [("5", 5), ("30s", 30), ("5m", 300), ("1h", 3600), ("1h30m45s", 5445), ("1h45", 3645), ("72h", 259_200)],
)
def test_a_deadline_is_read(duration: str, seconds: int) -> None:
    assert intent_of(BODY, cancel_after=duration).lifetime_seconds == seconds
    assert intent_of({**BODY, "lifetime": duration}).lifetime_seconds == seconds


def test_a_deadline_in_the_header_goes_before_one_in_the_body() -> None:
    assert intent_of({**BODY, "lifetime": 60}, cancel_after="30").lifetime_seconds == 30
    assert intent_of({**BODY, "lifetime": 60}).lifetime_seconds == 60
    assert intent_of(BODY).lifetime_seconds is None


@pytest.mark.parametrize(
    "key",
    ["", " ", '""', "a b", 'a"b', '"a', "a\nb", "a\x00", "\x7f", "é", "x" * 256, '"' + "x" * 256 + '"', "\ud800"],
    ids=lambda key: ascii(key[:20]),
)
def test_a_bad_idempotency_key_is_refused(key: str) -> None:
    problem = refused(BODY, idempotency_key=key)
    assert (problem.status, fields_of(problem)) == (422, ["Idempotency-Key"])


def test_the_same_key_of_the_same_owner_is_the_same_id() -> None:
    first = intent_of(BODY, idempotency_key="8e03978e-40d5-43dd-bc93-6894a57f9324")
    assert intent_of({**BODY, "input": {}}, idempotency_key="8e03978e-40d5-43dd-bc93-6894a57f9324").id == first.id
    assert intent_of(BODY, idempotency_key='"8e03978e-40d5-43dd-bc93-6894a57f9324"').id == first.id
    assert intent_of(BODY, idempotency_key="8E03978e-40d5-43dd-bc93-6894a57f9324").id != first.id
    assert intent_of(BODY, idempotency_key="8e03978e-40d5-43dd-bc93-6894a57f9324", owner="bob").id != first.id
    assert first.keyed


def test_owner_and_key_cannot_be_shifted_into_one_another() -> None:
    assert derived_id("alice", "b-key") != derived_id("aliceb", "-key")
    assert derived_id("alice", "xkey") != derived_id("alicex", "key")


def test_without_a_key_every_request_has_its_own_id() -> None:
    intents = [intent_of(BODY) for _ in range(100)]
    assert len({intent.id for intent in intents}) == 100
    assert not any(intent.keyed for intent in intents)


@pytest.mark.parametrize(
    "made",
    [random_id(), derived_id("alice", "key"), derived_id("", "")],
    ids=["random", "derived", "derived from nothing"],
)
def test_an_id_is_26_letters_and_digits(made: str) -> None:
    assert re.fullmatch(r"[a-z0-9]{26}", made)
    assert is_id(made)


@pytest.mark.parametrize(
    "text", ["", "a" * 25, "a" * 27, "A" * 26, "a" * 25 + "\n", "a" * 26 + "\n", "../" + "a" * 23, "٣" * 26]
)
def test_other_texts_are_no_ids(text: str) -> None:
    assert not is_id(text)


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the order of keys": ({"input": {"b": {"y": 1, "x": 2}, "a": 1}, "version": VERSION}, {}),
    "the key": ({**BODY, "input": {"a": 1, "b": {"x": 2, "y": 1}}}, {"idempotency_key": "another"}),
    "the wait": ({**BODY, "input": {"a": 1, "b": {"x": 2, "y": 1}}}, {"prefer": "wait=5"}),
}
OTHER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the input": ({"input": {"a": 1, "b": {"x": 2, "y": 2}}}, {}),
    "a type in the input": ({"input": {"a": "1", "b": {"x": 2, "y": 1}}}, {}),
    "the version": ({"version": "0" * 64}, {}),
    "the model": ({"version": "owner/name"}, {}),
    "the webhook": ({"webhook": "https://example.com"}, {}),
    "the events": ({"webhook_events_filter": ["start"]}, {}),
    "the stream": ({"stream": True}, {}),
    "the deadline": ({}, {"cancel_after": "30"}),
}
FINGERPRINTED = {**BODY, "input": {"a": 1, "b": {"x": 2, "y": 1}}}


@pytest.mark.parametrize(("body", "headers"), SAME.values(), ids=SAME)
def test_the_fingerprint_of_the_same_request_is_the_same(body: dict[str, Any], headers: dict[str, Any]) -> None:
    assert intent_of(body, **headers).fingerprint == intent_of(FINGERPRINTED).fingerprint


@pytest.mark.parametrize(("change", "headers"), OTHER.values(), ids=OTHER)
def test_the_fingerprint_of_another_request_is_another(change: dict[str, Any], headers: dict[str, Any]) -> None:
    assert intent_of({**FINGERPRINTED, **change}, **headers).fingerprint != intent_of(FINGERPRINTED).fingerprint


def test_the_fingerprint_tells_a_model_from_a_deployment() -> None:
    by_kind = {
        intent_of({"input": {}}, reference=Reference(kind, "acme/fox")).fingerprint for kind in ("model", "deployment")
    }
    assert len(by_kind) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("aé🦊"),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text("abé"), values, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text("abcé"), JSON, max_size=4))
def test_any_input_is_kept_as_it_is(value: dict[str, Any]) -> None:
    assert json.loads(intent_of({**BODY, "input": value}).input_json) == value
    assert json.loads(input_json_canonical(value)) == value


@pytest.mark.parametrize(
    "prefer",
    ["wait=0", "wait=61", "wait=-1", "wait=", "wait=5.5", "wait=five", "wait=1e1", "wait=٣", "wait=0x5", "wait=05"],
)
def test_a_bad_wait_is_refused(prefer: str) -> None:
    with pytest.raises(Problem) as refusal:
        wait_seconds(prefer, 25)
    assert (refusal.value.status, fields_of(refusal.value)) == (422, ["Prefer"])


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        (None, None),
        ("", None),
        ("respond-async", None),
        ("return=minimal, handling=lenient", None),
        ("waiting=5", None),
        ("wait", 25),
        ("WAIT", 25),
        ("wait=1", 1),
        ("wait=25", 25),
        ("wait=60", 25),
        ('wait="10"', 10),
        ("wait = 10", 10),
        ("wait=10; x=y", 10),
        ("respond-async, wait=10", 10),
        ("wait=10, return=minimal", 10),
        ("," * 1000 + "wait=3", 3),
    ],
)
def test_a_wait_is_at_most_the_limit(prefer: str | None, seconds: int | None) -> None:
    assert wait_seconds(prefer, 25) == seconds
