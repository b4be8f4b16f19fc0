import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import moto
import pytest
from botocore.exceptions import ClientError
from predictions.aws import clients
from predictions.upstream import client as upstream
from predictions.upstream.bounded_json import LIGHT_BYTES
from predictions.upstream.client import Model, Replicate, Target
from predictions.upstream.credentials import Token
from predictions.upstream.errors import (
    NotAccepted,
    NotFound,
    OutcomeUnknown,
    Refused,
    Throttled,
    TokenUnreadable,
    Unauthorized,
    Unavailable,
)
from predictions.upstream.prediction import UpstreamPrediction

URL = "https://api.replicate.com/v1"
TOKEN = "r8_of_the_stack"
VERSION = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
TARGET = Target("version", "stability-ai/sdxl", VERSION)
TOLD = {"id": "ufawqhfynnddngldkgtslldrkq", "status": "starting"}

Answer = Callable[[httpx.Request], httpx.Response]
Ask = Callable[[Replicate], Any]


@pytest.fixture(scope="module")
def secrets_manager() -> Iterator[None]:
    """A Secrets Manager, the same for all tests: they ask for nothing else, and there are many of them."""
    with pytest.MonkeyPatch.context() as monkeypatch, moto.mock_aws():
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
        clients._client.cache_clear()
        yield
    clients._client.cache_clear()


@pytest.fixture
def token(secrets_manager: None) -> Iterator[Token]:
    """The stack's token, read by nobody yet."""
    client = clients.client("secretsmanager")
    client.create_secret(Name="replicate-token", SecretString=TOKEN)
    yield Token("replicate-token")
    client.delete_secret(SecretId="replicate-token", ForceDeleteWithoutRecovery=True)


class Upstream:
    """A Replicate whose answers a test gives; what it was asked is in `asked`."""

    def __init__(self, token: Token) -> None:
        self.answer: Answer = lambda _: httpx.Response(201, json=TOLD)
        self.asked: list[httpx.Request] = []
        self.client = httpx.Client(transport=httpx.MockTransport(self._handle))
        self.replicate = Replicate(URL, token, self.client)

    def _handle(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.asked.append(request)
        return self.answer(request)

    def create(self, target: Target = TARGET, **options: Any) -> UpstreamPrediction:
        return self.replicate.create(
            target, {"input": {"prompt": "a red fox"}}, **{"cancel_after_seconds": 60} | options
        )


@pytest.fixture
def server(token: Token) -> Iterator[Upstream]:
    """A Replicate that accepts, unless told otherwise."""
    server = Upstream(token)
    with server.client:
        yield server


def breaking(error: Exception) -> Answer:
    def broken(_: httpx.Request) -> httpx.Response:
        raise error

    return broken


def answering(status: int, **response: Any) -> Answer:
    return lambda _: httpx.Response(status, **response)


class Breaks(httpx.SyncByteStream):
    """A body that ends in an error half-way."""

    def __iter__(self) -> Iterator[bytes]:
        yield b'{"id": "ufawqhfynnddngl'
        raise httpx.ReadError("reset")


CREATES: dict[str, tuple[Answer, type[Exception]]] = {
    # Nothing has left this machine.
    "no connection": (breaking(httpx.ConnectError("refused")), NotAccepted),
    "no connection in time": (breaking(httpx.ConnectTimeout("slow")), NotAccepted),
    "no connection free": (breaking(httpx.PoolTimeout("busy")), NotAccepted),
    "no such protocol": (breaking(httpx.UnsupportedProtocol("ftp")), NotAccepted),
    # Replicate said no.
    "400": (answering(400, json={"detail": "bad"}), Refused),
    "401": (answering(401, json={"detail": "You did not pass a valid authentication token"}), Unauthorized),
    "402": (answering(402, json={"detail": "no credit"}), Unauthorized),
    "403": (answering(403, json={"detail": "not allowed"}), Unauthorized),
    "404": (answering(404, json={"detail": "no version"}), Refused),
    "405": (answering(405), Refused),
    "409": (answering(409), Refused),
    "413": (answering(413, text="<html>"), Refused),
    "422": (answering(422, json={"detail": "bad input"}), Refused),
    "429": (answering(429, json={"detail": "throttled"}), Throttled),
    "451": (answering(451, content=b"\xff"), Refused),
    "499": (answering(499), Refused),
    # It may have been taken.
    "no answer in time": (breaking(httpx.ReadTimeout("slow")), OutcomeUnknown),
    "not sent in time": (breaking(httpx.WriteTimeout("slow")), OutcomeUnknown),
    "reset while waiting": (breaking(httpx.ReadError("reset")), OutcomeUnknown),
    "reset while sending": (breaking(httpx.WriteError("reset")), OutcomeUnknown),
    "closed without answer": (breaking(httpx.RemoteProtocolError("closed")), OutcomeUnknown),
    "closed": (breaking(httpx.CloseError("closed")), OutcomeUnknown),
    "a proxy's error": (breaking(httpx.ProxyError("proxy")), OutcomeUnknown),
    "an answer in no known encoding": (
        answering(201, headers={"content-encoding": "gzip"}, content=b"x"),
        OutcomeUnknown,
    ),
    "an answer that breaks off": (answering(201, stream=Breaks()), OutcomeUnknown),
    "408": (answering(408), OutcomeUnknown),
    "500": (answering(500, json={"detail": "oops"}), OutcomeUnknown),
    "502": (answering(502, text="<html>"), OutcomeUnknown),
    "503": (answering(503), OutcomeUnknown),
    "504": (answering(504), OutcomeUnknown),
    "520": (answering(520), OutcomeUnknown),
    "a redirect": (answering(307, headers={"location": f"{URL}/other"}), OutcomeUnknown),
    "a redirect elsewhere": (answering(302, headers={"location": "https://evil.example"}), OutcomeUnknown),
    "304": (answering(304), OutcomeUnknown),
    "an empty answer": (answering(201), OutcomeUnknown),
    "204": (answering(204), OutcomeUnknown),
    "an answer that is not JSON": (answering(201, text="created"), OutcomeUnknown),
    "an answer that is cut off": (answering(201, content=json.dumps(TOLD).encode()[:-3]), OutcomeUnknown),
    "an answer that is a list": (answering(201, json=[TOLD]), OutcomeUnknown),
    "an answer without id": (answering(201, json={"status": "starting"}), OutcomeUnknown),
    "an answer with an id that climbs": (answering(201, json={**TOLD, "id": "../x"}), OutcomeUnknown),
    "an answer nested beyond all": (answering(201, content=b"[" * 100_000), OutcomeUnknown),
}


def test_input_that_is_text_is_sent_as_it_is_beside_the_other_members(server: Upstream) -> None:
    server.replicate.create(TARGET, {"stream": True}, cancel_after_seconds=60, input_json='{"prompt":"é"}')
    server.replicate.create(TARGET, {}, cancel_after_seconds=60, input_json="{}")
    first, second = (json.loads(request.content) for request in server.asked)
    expected = {"version": TARGET.version} if TARGET.kind == "version" else {}
    assert first == {"input": {"prompt": "é"}, "stream": True} | expected
    assert second == {"input": {}} | expected
    assert server.asked[0].headers["content-type"] == "application/json"


@pytest.mark.parametrize("status", ["processing", "succeeded", "failed"])
def test_large_output_of_a_create_that_is_waited_for_is_left_to_the_webhook(server: Upstream, status: str) -> None:
    large = {**TOLD, "status": status, "error": None, "output": "x" * (LIGHT_BYTES + 1)}
    server.answer = answering(201, json=large)
    found = server.create(leave_large=True)
    assert (found.id, found.status, found.output, found.too_large) == (TOLD["id"], "processing", None, None)
    assert server.create().status == status
    server.answer = answering(201, json={**large, "output": "x"})
    assert server.create(leave_large=True).status == status


@pytest.mark.parametrize(("answer", "error"), CREATES.values(), ids=CREATES)
def test_a_create_without_prediction_tells_whether_one_may_run(
    server: Upstream, answer: Answer, error: type[Exception]
) -> None:
    server.answer = answer
    with pytest.raises(error) as outcome:
        server.create()
    assert type(outcome.value) is error
    assert len(server.asked) == 1, "a create is never repeated, and a redirect never followed"
    assert TOKEN not in str(outcome.value)
    if error in (Unauthorized, Refused, Throttled):
        assert isinstance(outcome.value, NotAccepted)
        assert outcome.value.status == answer(server.asked[0]).status_code
        assert outcome.value.detail


@pytest.mark.parametrize("status", [200, 201, 202])
def test_an_accepted_create_is_the_prediction(server: Upstream, status: int) -> None:
    server.answer = answering(status, json={**TOLD, "output": "x"}, headers={"content-type": "text/plain"})
    told = server.create()
    assert (told.id, told.status, told.output) == (TOLD["id"], "starting", "x")


def test_a_compressed_answer_is_read(server: Upstream) -> None:
    import gzip

    server.answer = answering(
        201, content=gzip.compress(json.dumps(TOLD).encode()), headers={"content-encoding": "gzip"}
    )
    assert server.create().id == TOLD["id"]


def test_an_answer_beyond_the_limit_is_of_unknown_outcome(server: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_ANSWER_LIMIT_BYTES", 1000)
    read = []

    def endless() -> Iterator[bytes]:
        while True:
            read.append(1)
            yield b" " * 100

    server.answer = lambda _: httpx.Response(201, content=endless())
    with pytest.raises(OutcomeUnknown):
        server.create()
    assert len(read) == 11
    with pytest.raises(Unavailable):
        server.replicate.get("ufawq")


@pytest.mark.parametrize(
    ("target", "path", "version"),
    [
        (TARGET, "/v1/predictions", VERSION),
        (Target("version", None, VERSION), "/v1/predictions", VERSION),
        (Target("model", "meta/llama"), "/v1/models/meta/llama/predictions", None),
        (Target("deployment", "acme/fox"), "/v1/deployments/acme/fox/predictions", None),
    ],
)
def test_a_create_is_one_post_to_its_target(server: Upstream, target: Target, path: str, version: str | None) -> None:
    server.create(target)
    [request] = server.asked
    assert (request.method, str(request.url)) == ("POST", f"https://api.replicate.com{path}")
    assert request.headers["authorization"] == f"Bearer {TOKEN}"
    assert request.headers["content-type"] == "application/json"
    assert "prefer" not in request.headers
    expected = {"input": {"prompt": "a red fox"}, **({"version": version} if version else {})}
    assert json.loads(request.content) == expected


@pytest.mark.parametrize(
    ("seconds", "sent"), [(-100, "5s"), (0, "5s"), (4, "5s"), (5, "5s"), (6, "6s"), (86400, "86400s")]
)
def test_cancel_after_is_at_least_what_replicate_takes(server: Upstream, seconds: int, sent: str) -> None:
    server.create(cancel_after_seconds=seconds)
    assert server.asked[0].headers["cancel-after"] == sent


THROTTLED: dict[str, tuple[dict[str, str], Any, int]] = {
    "header": ({"retry-after": "7"}, {"detail": "no"}, 7),
    "header before body": ({"retry-after": "7"}, {"retry_after": 20, "detail": "resets in ~30s"}, 7),
    "header of zero": ({"retry-after": "0"}, {}, 1),
    "header below zero": ({"retry-after": "-5"}, {}, 1),
    "header with a fraction": ({"retry-after": "1.2"}, {}, 2),
    "header beyond patience": ({"retry-after": "86400"}, {}, 3600),
    "header with a date": ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, {"retry_after": 20}, 20),
    "header of nonsense": ({"retry-after": "soon"}, {"detail": "resets in ~30s."}, 30),
    "header not a number": ({"retry-after": "nan"}, {"retry_after": 20}, 20),
    "header without end": ({"retry-after": "inf"}, {"retry_after": 20}, 20),
    "body": ({}, {"retry_after": 20, "detail": "resets in ~30s"}, 20),
    "body as text": ({}, {"retry_after": "20"}, 20),
    "body beyond all floats": ({}, {"retry_after": 10**400, "detail": "resets in ~30s"}, 30),
    "body a list": ({}, {"retry_after": [1], "detail": "resets in ~30s"}, 30),
    "body null": ({}, {"retry_after": None}, 10),
    "text": ({}, {"detail": "Request was throttled. Your rate limit resets in ~30s."}, 30),
    "text with a fraction": ({}, {"detail": "Your rate limit resets in ~2.5s."}, 3),
    "text of many digits": ({}, {"detail": "~" + "9" * 1000 + "s"}, 10),
    "text without number": ({}, {"detail": "Your rate limit resets soon."}, 10),
    "detail no text": ({}, {"detail": {"resets": "~4s"}}, 4),
    "no object": ({}, ["~30s"], 10),
    "nothing": ({}, None, 10),
}


@pytest.mark.parametrize(("headers", "body", "seconds"), THROTTLED.values(), ids=THROTTLED)
def test_a_throttled_create_tells_how_long_to_wait(
    server: Upstream, headers: dict[str, str], body: Any, seconds: int
) -> None:
    server.answer = answering(429, headers=headers, json=body)
    with pytest.raises(Throttled) as outcome:
        server.create()
    assert outcome.value.seconds == seconds


def test_a_refusal_keeps_replicates_words_and_fields(server: Upstream) -> None:
    fields = [
        {"type": "required", "field": "input.prompt", "description": "prompt is required"},
        {"field": "input.seed", "detail": "not an integer"},
        "nonsense",
        {"field": None},
    ]
    server.answer = answering(
        422, json={"title": "Input validation failed", "detail": "- input: bad", "invalid_fields": fields}
    )
    with pytest.raises(Refused) as refusal:
        server.create()
    assert (refusal.value.status, refusal.value.detail) == (422, "- input: bad")
    assert refusal.value.invalid_fields == [
        {"field": "input.prompt", "detail": "prompt is required"},
        {"field": "input.seed", "detail": "not an integer"},
        {"field": "None", "detail": ""},
    ]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "Replicate answered 422"),
        (b"<html>", "Replicate answered 422"),
        (b"[1]", "Replicate answered 422"),
        (b'{"detail": null, "title": "Bad"}', "Bad"),
        (b'{"detail": "", "title": ""}', "Replicate answered 422"),
        (b'{"detail": ["a"]}', "['a']"),
        (b'{"detail": "half \\ud800"}', "half ?"),
        (b'{"detail": "x", "invalid_fields": 5}', "x"),
        (b'{"detail": "' + b"x" * 10_000 + b'"}', "x" * 2000),
    ],
)
def test_a_refusal_without_usual_words_still_has_some(server: Upstream, body: bytes, detail: str) -> None:
    server.answer = answering(422, content=body)
    with pytest.raises(Refused) as refusal:
        server.create()
    assert (refusal.value.detail, refusal.value.invalid_fields) == (detail, [])


# -- reads ----------------------------------------------------------------------------------------------------

NOW = datetime(2025, 6, 15, 15, 0, tzinfo=UTC)


def listed(server: Upstream, start: datetime = NOW, end: datetime = NOW + timedelta(minutes=1)) -> list[str]:
    return [told.id for told in server.replicate.created_between(start, end)]


ASKS: dict[str, Ask] = {
    "get": lambda replicate: replicate.get("ufawq"),
    "cancel": lambda replicate: replicate.cancel("ufawq"),
    "list": lambda replicate: list(replicate.created_between(NOW, NOW)),
    "model": lambda replicate: replicate.model("meta/llama"),
    "signing secret": lambda replicate: replicate.signing_secret(),
}
NO_ANSWERS: dict[str, tuple[Answer, type[Exception]]] = {
    "no connection": (breaking(httpx.ConnectError("refused")), Unavailable),
    "no answer in time": (breaking(httpx.ReadTimeout("slow")), Unavailable),
    "closed": (breaking(httpx.RemoteProtocolError("closed")), Unavailable),
    "an answer that breaks off": (answering(200, stream=Breaks()), Unavailable),
    "a redirect": (answering(301, headers={"location": "https://evil.example"}), Unavailable),
    "400": (answering(400), Unavailable),
    "401": (answering(401), Unavailable),
    "402": (answering(402), Unavailable),
    "403": (answering(403), Unavailable),
    "404": (answering(404, json={"detail": "not found"}), NotFound),
    "410": (answering(410), NotFound),
    "429": (answering(429), Unavailable),
    "500": (answering(500), Unavailable),
    "503": (answering(503, text="<html>"), Unavailable),
    "not JSON": (answering(200, text="<html>"), Unavailable),
    "nothing": (answering(200), Unavailable),
    "a list": (answering(200, json=[]), Unavailable),
    "null": (answering(200, json=None), Unavailable),
    "deep": (answering(200, content=b"[" * 100_000), Unavailable),
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
@pytest.mark.parametrize(("answer", "error"), NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_a_read_without_answer_says_nothing_about_what_was_asked(
    server: Upstream, ask: Ask, answer: Answer, error: type[Exception]
) -> None:
    server.answer = answer
    with pytest.raises(error) as outcome:
        ask(server.replicate)
    assert type(outcome.value) is error
    assert len(server.asked) == 1
    assert TOKEN not in str(outcome.value)


@pytest.mark.parametrize("ask", [ASKS["get"], ASKS["cancel"]])
def test_an_answer_that_is_no_prediction_is_no_answer(server: Upstream, ask: Ask) -> None:
    server.answer = answering(200, json={"detail": "hello"})
    with pytest.raises(Unavailable):
        ask(server.replicate)


@pytest.mark.parametrize(
    ("ask", "method", "path"),
    [
        (ASKS["get"], "GET", "/v1/predictions/ufawq"),
        (ASKS["cancel"], "POST", "/v1/predictions/ufawq/cancel"),
    ],
)
def test_a_prediction_is_read_and_canceled_by_its_id(server: Upstream, ask: Ask, method: str, path: str) -> None:
    server.answer = answering(200, json={**TOLD, "id": "ufawq", "status": "canceled"})
    assert ask(server.replicate).status == "canceled"
    assert [(r.method, r.url.path, r.headers["authorization"]) for r in server.asked] == [
        (method, path, f"Bearer {TOKEN}")
    ]


def test_a_list_is_read_across_pages(server: Upstream) -> None:
    pages = {
        "": {"next": f"{URL}/predictions?cursor=two", "results": [entry("a"), entry("b")]},
        "two": {"next": f"{URL}/predictions?cursor=three", "results": []},
        "three": {"next": None, "results": [entry("c")]},
    }
    server.answer = lambda request: httpx.Response(200, json=pages[request.url.params.get("cursor", "")])
    assert listed(server) == ["a", "b", "c"]
    assert len(server.asked) == 3
    first = server.asked[0].url.params
    assert (first["created_after"], first["created_before"]) == ("2025-06-15T15:00:00.000Z", "2025-06-15T15:01:00.000Z")
    assert all(request.headers["authorization"] == f"Bearer {TOKEN}" for request in server.asked)


def entry(prediction_id: str, after_seconds: float = 30, **told: Any) -> dict[str, Any]:
    created = (NOW + timedelta(seconds=after_seconds)).isoformat().replace("+00:00", "Z")
    return {**TOLD, "id": prediction_id, "created_at": created, **told}


def test_a_list_stops_at_the_first_that_is_older_than_the_window(server: Upstream) -> None:
    pages = {
        "": {
            "next": f"{URL}/predictions?cursor=two",
            "results": [entry("later", 61), entry("last", 60), entry("first", 0)],
        },
        "two": {
            "next": f"{URL}/predictions?cursor=three",
            "results": [entry("earlier", -0.001), entry("out-of-order", 30)],
        },
    }
    server.answer = lambda request: httpx.Response(200, json=pages[request.url.params.get("cursor", "")])
    assert listed(server) == ["last", "first"]
    assert len(server.asked) == 2


@pytest.mark.parametrize("created_at", [None, "", "yesterday", 1750000000, "2025-06-15T15:00:30"])
def test_a_listed_prediction_without_a_time_is_a_candidate(server: Upstream, created_at: Any) -> None:
    server.answer = answering(200, json={"next": None, "results": [entry("a", created_at=created_at)]})
    assert listed(server) == ["a"]


@pytest.mark.parametrize(
    "created_at",
    [
        "2025-06-15T15:00:30Z",
        "2025-06-15T15:00:30.1Z",
        "2025-06-15T15:00:30.123456789Z",
        "2025-06-15T17:00:30+02:00",
    ],
)
def test_times_of_any_precision_are_read(server: Upstream, created_at: str) -> None:
    server.answer = answering(200, json={"results": [entry("a", created_at=created_at)]})
    assert listed(server) == ["a"]
    assert listed(server, start=NOW + timedelta(seconds=31)) == []
    assert listed(server, end=NOW + timedelta(seconds=29)) == []


@pytest.mark.parametrize("results", [None, 5, True, "abc", {"id": "a"}, [1, None, [], {}, {"id": "../x"}, "x"]])
def test_entries_that_are_no_predictions_are_passed_over(server: Upstream, results: Any) -> None:
    server.answer = answering(200, json={"next": None, "results": results})
    assert listed(server) == []


@pytest.mark.parametrize(
    "following",
    [
        "https://evil.example/v1/predictions?cursor=x",
        "http://api.replicate.com/v1/predictions?cursor=x",
        "https://api.replicate.com.evil.example/v1/predictions",
        "https://api.replicate.com@evil.example/v1/predictions",
        "https://api.replicate.com:8443/v1/predictions",
        "//evil.example/v1/predictions",
        "/v1/predictions?cursor=x",
        "https://api.replicate.com/v1",
        "https://api.replicate.com/v1@evil.example/",
        "",
        5,
        None,
        ["https://api.replicate.com/v1/predictions"],
    ],
)
def test_a_next_page_elsewhere_never_gets_the_token(server: Upstream, following: Any) -> None:
    server.answer = answering(200, json={"next": following, "results": [entry("a")]})
    assert listed(server) == ["a"]
    assert [request.url.host for request in server.asked] == ["api.replicate.com"]


def test_pages_that_lead_in_a_circle_are_no_answer(server: Upstream) -> None:
    server.answer = answering(200, json={"next": f"{URL}/predictions?cursor=again", "results": []})
    with pytest.raises(Unavailable):
        listed(server)
    assert len(server.asked) == 2


def test_a_next_page_that_is_no_url_is_no_answer(server: Upstream) -> None:
    server.answer = answering(200, json={"next": f"{URL}/\x00", "results": []})
    with pytest.raises(Unavailable):
        listed(server)


@pytest.mark.parametrize(
    ("described", "model"),
    [
        ({"is_official": True, "latest_version": None}, Model(True, None)),
        ({"is_official": True, "latest_version": {"id": VERSION}}, Model(True, VERSION)),
        ({"is_official": False, "latest_version": {"id": VERSION}}, Model(False, VERSION)),
        ({"latest_version": {"id": "latest"}}, Model(False, None)),
        ({"latest_version": {"id": VERSION + "\n"}}, Model(False, None)),
        ({"latest_version": {"id": "../x"}}, Model(False, None)),
        ({"latest_version": {"id": 5}}, Model(False, None)),
        ({"latest_version": {}}, Model(False, None)),
        ({"latest_version": VERSION}, Model(False, None)),
        ({"is_official": "yes", "latest_version": {"id": VERSION}}, Model(False, VERSION)),
        ({}, Model(False, None)),
    ],
)
def test_a_model_is_described(server: Upstream, described: dict[str, Any], model: Model) -> None:
    server.answer = answering(200, json=described)
    assert server.replicate.model("stability-ai/sdxl") == model
    assert server.asked[0].url.path == "/v1/models/stability-ai/sdxl"


def test_the_signing_secret_is_read(server: Upstream) -> None:
    server.answer = answering(200, json={"key": "whsec_x"})
    assert server.replicate.signing_secret() == "whsec_x"
    assert server.asked[0].url.path == "/v1/webhooks/default/secret"


@pytest.mark.parametrize("answer", [{}, {"key": None}, {"key": 5}, {"secret": "whsec_x"}])
def test_no_signing_secret_is_no_answer(server: Upstream, answer: Any) -> None:
    server.answer = answering(200, json=answer)
    with pytest.raises(Unavailable) as error:
        server.replicate.signing_secret()
    assert "whsec" not in str(error.value)


RAN: dict[str, tuple[Target, dict[str, Any], bool]] = {
    "the version": (TARGET, {"version": VERSION}, True),
    "the version, of a deployment": (TARGET, {"version": VERSION, "deployment": "acme/fox"}, True),
    "another version": (TARGET, {"version": "0" * 64}, False),
    "a hidden version": (TARGET, {"version": "hidden"}, False),
    "the model": (Target("model", "meta/llama"), {"model": "meta/llama", "version": "hidden"}, True),
    "another model": (Target("model", "meta/llama"), {"model": "meta/llama-2"}, False),
    "no model": (Target("model", "meta/llama"), {}, False),
    "the deployment": (Target("deployment", "acme/fox"), {"deployment": "acme/fox", "model": "x/y"}, True),
    "the deployment's short name": (Target("deployment", "acme/fox"), {"deployment": "fox"}, True),
    "another deployment": (Target("deployment", "acme/fox"), {"deployment": "acme/wolf"}, False),
    "no deployment": (Target("deployment", "acme/fox"), {"model": "acme/fox"}, False),
}


@pytest.mark.parametrize(("target", "told", "ran"), RAN.values(), ids=RAN)
def test_a_target_knows_what_it_ran(target: Target, told: dict[str, Any], ran: bool) -> None:
    assert target.ran(UpstreamPrediction.parse({**TOLD, **told})) is ran


# -- the token ------------------------------------------------------------------------------------------------


def put_token(text: str | bytes) -> None:
    value: Any = {"SecretString": text} if isinstance(text, str) else {"SecretBinary": text}
    clients.client("secretsmanager").put_secret_value(SecretId="replicate-token", **value)


@pytest.mark.parametrize(
    "secret",
    [
        TOKEN,
        f" {TOKEN}\n",
        json.dumps({"token": TOKEN}),
        json.dumps({"token": f" {TOKEN} ", "x": 1}, indent=2),
        TOKEN.encode(),
    ],
)
def test_a_token_is_read_bare_or_from_json(token: Token, secret: str | bytes) -> None:
    put_token(secret)
    assert token.value() == TOKEN


NO_TOKENS = [
    " ",
    "{}",
    "{",
    '{"token": ""}',
    '{"key": "r8_x"}',
    '{"token": "r8_\\ud800"}',
    "r8 with spaces",
    "r8_x\r\nX-Injected: y",
    "r8_\u00e9",
    b"\xff\xfe",
]


@pytest.mark.parametrize("secret", NO_TOKENS, ids=repr)
def test_a_secret_that_holds_no_token_sends_nothing(server: Upstream, secret: str | bytes) -> None:
    put_token(secret)
    with pytest.raises(NotAccepted) as refusal:
        server.create()
    assert refusal.value.status is None
    with pytest.raises(Unavailable):
        server.replicate.get("ufawq")
    assert server.asked == []
    text = secret.decode(errors="replace") if isinstance(secret, bytes) else secret
    assert text.strip() not in str(refusal.value) or len(text.strip()) < 2


def test_a_secret_that_cannot_be_read_sends_nothing(server: Upstream) -> None:
    clients.client("secretsmanager").delete_secret(SecretId="replicate-token", ForceDeleteWithoutRecovery=True)
    with pytest.raises(NotAccepted):
        server.create()
    for ask in ASKS.values():
        with pytest.raises(Unavailable):
            ask(server.replicate)
    assert server.asked == []
    with pytest.raises(TokenUnreadable) as error:
        Token("replicate-token").value()
    assert isinstance(error.value.__cause__, ClientError)


def test_a_token_is_read_once_for_many_calls(server: Upstream) -> None:
    server.create()
    put_token("r8_new")
    for _ in range(5):
        server.create()
    assert {request.headers["authorization"] for request in server.asked} == {f"Bearer {TOKEN}"}


def test_a_token_of_a_sandbox_that_stood_still_for_a_minute_is_read_again(
    token: Token, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = time.time()
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    monkeypatch.setattr(time, "time", lambda: present)
    server = Upstream(Token("replicate-token"))
    server.create()
    put_token("r8_new")
    present += 59
    server.create()
    present += 1
    server.create()
    assert [request.headers["authorization"] for request in server.asked] == [
        f"Bearer {TOKEN}", f"Bearer {TOKEN}", "Bearer r8_new",
    ]  # fmt: skip


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_changed_token_is_seen_after_a_refusal(server: Upstream, status: int) -> None:
    server.answer = lambda request: (
        httpx.Response(201, json=TOLD)
        if request.headers["authorization"] == "Bearer r8_new"
        else httpx.Response(status, json={"detail": "no"})
    )
    with pytest.raises(Unauthorized):
        server.create()
    put_token("r8_new")
    assert server.create().id == TOLD["id"]


def test_response_about_another_prediction_is_none(server: Upstream) -> None:
    server.answer = answering(200, json=TOLD)
    with pytest.raises(Unavailable, match="another prediction"):
        server.replicate.get("another")


def test_a_changed_token_is_seen_after_a_refused_read(server: Upstream) -> None:
    server.answer = answering(401)
    with pytest.raises(Unavailable):
        server.replicate.get(TOLD["id"])
    put_token("r8_new")
    server.answer = answering(200, json=TOLD)
    server.replicate.get(TOLD["id"])
    assert server.asked[-1].headers["authorization"] == "Bearer r8_new"


def test_the_client_from_the_environment_follows_no_redirects_and_trusts_no_proxy(
    token: Token, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    made: list[httpx.Client] = []
    original = httpx.Client.__init__

    def remember(self: httpx.Client, **options: Any) -> None:
        original(self, **options)
        made.append(self)

    monkeypatch.setattr(httpx.Client, "__init__", remember)
    replicate = Replicate.from_env()
    assert made == []  # many invocations ask nothing
    client = replicate._reads()
    assert made == [client]
    assert replicate._reads() is client
    assert not client.follow_redirects
    assert not client.trust_env
    assert client.timeout.connect == 5
    assert client.timeout.read == upstream.CREATE_TIMEOUT_SECONDS
    client.close()
