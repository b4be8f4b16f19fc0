"""What is passed on to Replicate and what is not, from the event to the answer."""

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError
from hypothesis import given, settings
from hypothesis import strategies as st
from predictions.api.proxy import (
    ANSWER_LIMIT_BYTES,
    CHANGE_LIMIT_BYTES,
    QUERY_LIMIT_CHARACTERS,
    ROUTES,
    VERSION_CACHE_LIMIT_BYTES,
    VERSION_CACHE_SECONDS,
    Forwarding,
    Method,
    VersionCache,
)
from predictions.api.proxy import Call as ForwardedCall
from predictions.aws import clients
from predictions.errors import Problem
from predictions.intents.model import create_intent
from predictions.observability import logger
from predictions.store.predictions import PredictionsTable
from predictions.store.records import StoredSchema
from predictions.store.schemas import StoredSchemas
from predictions.upstream.credentials import Token

from tests.support.apps import AwsCalls, Context, load_app, sample
from tests.support.fakes import API_URL, VERSION, Clock, ReplicateInMemory, refusing
from tests.support.protocol import Submissions

URL = ReplicateInMemory.URL
NAMES = {"owner": "acme", "name": "fox-1.5", "slug": "text-to-image", "id": VERSION}
VERSION_PATH = f"/models/acme/fox-1.5/versions/{VERSION}"

Answer = Callable[[httpx.Request], httpx.Response]
Call = Callable[..., dict[str, Any]]


class Upstream:
    """A Replicate whose answers a test gives, one after the other, the last one for ever; `asked` is what it was."""

    def __init__(self) -> None:
        self.answers: list[Answer] = [lambda _: httpx.Response(200, json={"ok": True})]
        self.asked: list[httpx.Request] = []
        self.client = httpx.Client(transport=httpx.MockTransport(self._handle))

    def answer(self, *answers: Answer | httpx.Response) -> None:
        """What it answers from now on."""

        def repeat(response: httpx.Response) -> Answer:
            # A response can be read once.
            return lambda _: httpx.Response(response.status_code, headers=response.headers, content=response.content)

        self.answers = [repeat(each) if isinstance(each, httpx.Response) else each for each in answers]

    def _handle(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.asked.append(request)
        return (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])(request)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    upstream = Upstream()
    with upstream.client:
        yield upstream


@pytest.fixture
def call(cloud: None, upstream: Upstream, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls the function as API Gateway does, with all scopes; the answer's headers have names in lower case."""
    with pytest.MonkeyPatch.context() as template_only:
        app = load_app("call_replicate", template_only)
    versions = VersionCache("predictions", clients.client("dynamodb"), clock.now)
    token = Token("replicate-token")
    monkeypatch.setattr(app, "forwarding", Forwarding(URL, token, upstream.client, versions, clock.now))

    def call(
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, list[str]] | None = None,
        headers: Mapping[str, str] | None = None,
        scopes: str = "predict read manage",
        **changes: Any,
    ) -> dict[str, Any]:
        event = sample("call_replicate", "account")
        event["requestContext"]["authorizer"]["scopes"] = scopes
        event |= {"httpMethod": method, "path": path, "multiValueQueryStringParameters": query}
        event["body"] = body if isinstance(body, str | None) else json.dumps(body)
        event["headers"] |= headers or {}
        event["multiValueHeaders"] |= {name: [value] for name, value in (headers or {}).items()}
        answer: dict[str, Any] = app.handler(event | changes, Context())
        found = {**answer.get("headers", {}), **{k: v[0] for k, v in answer.get("multiValueHeaders", {}).items()}}
        return {**answer, "headers": {name.lower(): value for name, value in found.items()}}

    return call


def problem_of(answer: dict[str, Any], status: int) -> dict[str, Any]:
    """The RFC 7807 problem in an answer, which has to be one of this status."""
    assert (answer["statusCode"], answer["headers"]["content-type"]) == (status, "application/problem+json")
    problem: dict[str, Any] = json.loads(answer["body"])
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    return problem


def path_of(template: str) -> str:
    return template.format(**NAMES)


def body_for(method: str) -> Any:
    return {"name": "fox"} if method in ("POST", "PATCH") else None


@pytest.fixture
def counted(capsys: pytest.CaptureFixture[str]) -> Callable[[], int]:
    """How many of the lines of metrics so far count a refusal of the stack's token."""
    seen: list[str] = []

    def count() -> int:
        seen.append(capsys.readouterr().out)
        return "".join(seen).count('"UpstreamRefusals":[')

    return count


# -- refusals before anything is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "template"), ROUTES, ids=lambda value: str(value))
def test_a_token_needs_read_for_a_get_and_manage_for_all_else(
    call: Call, upstream: Upstream, method: str, template: str
) -> None:
    scope, others = ("read", "predict manage") if method == "GET" else ("manage", "predict read")
    calls = AwsCalls()
    problem = problem_of(call(method, path_of(template), body_for(method), scopes=others), 403)
    assert f"`{scope}`" in problem["detail"]
    assert (calls.made, upstream.asked) == ([], [])
    assert call(method, path_of(template), body_for(method), scopes=scope)["statusCode"] == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/predictions"),
        ("GET", f"/predictions/{'a' * 26}"),
        ("POST", "/models/acme/fox/predictions"),
        ("GET", "/trainings"),
        ("POST", f"/models/acme/fox/versions/{VERSION}/trainings"),
        ("GET", "/files"),
        ("GET", "/webhooks/default/secret"),
        ("QUERY", "/models"),
        ("PUT", "/models/acme/fox"),
        ("DELETE", "/account"),
        ("POST", "/search"),
        ("GET", "/"),
        ("GET", "//account"),
        ("GET", "/models/acme"),
        ("GET", "/models/acme/fox/../../account"),
    ],
)
def test_what_is_no_route_is_not_passed_on(call: Call, upstream: Upstream, method: str, path: str) -> None:
    problem_of(call(method, path), 404)
    assert upstream.asked == []


HOSTILE = [
    "..",
    ".",
    "...",
    "%2e%2e",
    "..%2f..%2faccount",
    "%252e%252e",
    "a%2fb",
    "a%0d%0aHost:%20evil.example",
    "a\r\nHost: evil.example",
    "a b",
    "a?x=1",
    "a#b",
    "a;b",
    "a:b",
    "@evil.example",
    "a\\b",
    "-a",
    "_a",
    "a.",
    "ñ",
    "\ud800",
    "\uff0e\uff0e",
    "\x00",
    "<script>",
    "x" * 129,
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_name_that_could_lead_elsewhere_is_not_passed_on(call: Call, upstream: Upstream, name: str) -> None:
    calls = AwsCalls()
    for template in ("/models/{}/fox", "/models/acme/{}", "/deployments/acme/{}", "/collections/{}"):
        assert len(problem_of(call("GET", template.format(name)), 404)["detail"]) < 300, template
    assert (calls.made, upstream.asked) == ([], [])


@pytest.mark.parametrize(
    "version", ["latest", "hidden", VERSION[:-1], VERSION + "0", VERSION.upper(), "g" * 64, "%2e%2e"]
)
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_version_that_is_none_is_not_passed_on(call: Call, upstream: Upstream, method: str, version: str) -> None:
    problem_of(call(method, f"/models/acme/fox/versions/{version}"), 404)
    assert upstream.asked == []


@pytest.mark.parametrize("end", ["/", "\n"])
def test_what_the_router_leaves_out_behind_a_path_is_not_passed_on(call: Call, upstream: Upstream, end: str) -> None:
    assert call("GET", f"/models/acme/fox{end}")["statusCode"] == 200
    assert upstream.asked[0].url.raw_path == b"/v1/models/acme/fox"


@settings(deadline=None)  # a loaded machine is not a failure
@given(
    route=st.sampled_from(ROUTES),
    names=st.fixed_dictionaries({name: st.text() | st.just(value) for name, value in NAMES.items()}),
    query=st.dictionaries(st.text(), st.lists(st.text(), min_size=1)),
)
def test_whatever_is_in_path_and_query_stays_below_the_path_of_its_route(
    route: tuple[Method, str], names: dict[str, str], query: dict[str, list[str]]
) -> None:
    method, template = route
    used = {name: value for name, value in names.items() if f"{{{name}}}" in template}
    try:
        checked = ForwardedCall.check(method, template, used, query, b"{}", None)
    except Problem:
        return
    url = httpx.URL(f"{URL}{checked.path}?{checked.query}")
    assert (url.host, url.userinfo, url.fragment) == ("api.replicate.com", b"", "")
    assert url.raw_path.partition(b"?")[0].decode() == "/v1" + template.format(**used)
    assert url.params.multi_items() == [(name, value) for name, values in query.items() for value in values]


BROKEN_BODIES: dict[str, tuple[dict[str, Any], int]] = {
    "none": ({"body": None}, 400),
    "empty": ({"body": ""}, 400),
    "cut off": ({"body": '{"name": "fo'}, 400),
    "deep": ({"body": "[" * 100_000}, 400),
    "deep objects": ({"body": '{"a":' * 100_000 + "1" + "}" * 100_000}, 400),
    "NaN": ({"body": '{"min_instances": NaN}'}, 400),
    "a key twice": ({"body": '{"name": "a", "name": "b"}'}, 400),
    "half a surrogate pair": ({"body": '{"name": "\ud800"}'}, 400),
    "no UTF-8": ({"body": "//4=", "isBase64Encoded": True}, 400),
    "base64 that is none": ({"body": "not base64!", "isBase64Encoded": True}, 400),
    "a list": ({"body": "[]"}, 422),
    "text": ({"body": '"name"'}, 422),
    "too large": ({"body": '{"readme": "' + "x" * CHANGE_LIMIT_BYTES + '"}'}, 413),
    "a form": ({"body": "{}", "headers": {"Content-Type": "application/x-www-form-urlencoded"}}, 415),
    "multipart": ({"body": "{}", "headers": {"Content-Type": "multipart/form-data"}}, 415),
    "text by its type": ({"body": "{}", "headers": {"content-type": "text/plain"}}, 415),
}


@pytest.mark.parametrize(("change", "status"), BROKEN_BODIES.values(), ids=BROKEN_BODIES)
def test_a_broken_body_is_not_passed_on(call: Call, upstream: Upstream, change: dict[str, Any], status: int) -> None:
    calls = AwsCalls()
    for method, template in ROUTES:
        if method in ("POST", "PATCH"):
            problem_of(call(method, path_of(template), **change), status)
    assert (calls.made, upstream.asked) == ([], [])


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({"query": ["\ud800"]}, 400),
        ({"\udfff": ["x"]}, 400),
        ({"query": ["x" * QUERY_LIMIT_CHARACTERS]}, 414),
        ({str(n): ["x"] for n in range(2000)}, 414),
    ],
    ids=["half a surrogate pair", "in a name", "long", "many"],
)
def test_a_query_that_cannot_be_encoded_or_is_too_long_is_not_passed_on(
    call: Call, upstream: Upstream, query: dict[str, list[str]], status: int
) -> None:
    problem_of(call("GET", "/search", query=query), status)
    assert upstream.asked == []


# -- what goes to Replicate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "template"), ROUTES, ids=lambda value: str(value))
def test_each_route_is_passed_on_to_the_same_path_with_the_stacks_token(
    call: Call, upstream: Upstream, method: str, template: str
) -> None:
    assert call(method, path_of(template), body_for(method))["statusCode"] == 200
    [request] = upstream.asked
    assert (request.method, str(request.url)) == (method, URL + path_of(template))
    assert request.headers["authorization"] == f"Bearer {ReplicateInMemory.TOKEN}"


def test_no_header_of_the_caller_is_passed_on(call: Call, upstream: Upstream) -> None:
    hostile = {
        "Authorization": "Bearer rs_the_callers",
        "Cookie": "session=1",
        "Connection": "keep-alive, X-Secret",
        "Keep-Alive": "timeout=5",
        "Proxy-Authorization": "Basic YTpi",
        "Proxy-Connection": "keep-alive",
        "TE": "trailers",
        "Trailer": "X-Secret",
        "Transfer-Encoding": "chunked",
        "Upgrade": "websocket",
        "Expect": "100-continue",
        "Host": "evil.example",
        "X-Forwarded-For": "10.0.0.1",
        "X-HTTP-Method-Override": "DELETE",
        "X-Amz-Security-Token": "token",
        "Prefer": "wait",
        "X-Secret": "1",
    }
    assert call("POST", "/deployments", {"name": "fox"}, headers=hostile)["statusCode"] == 200
    [request] = upstream.asked
    assert dict(request.headers) == {
        "host": "api.replicate.com",
        "accept": "application/json",
        "accept-encoding": request.headers["accept-encoding"],
        "connection": "keep-alive",
        "user-agent": request.headers["user-agent"],
        "authorization": f"Bearer {ReplicateInMemory.TOKEN}",
        "content-type": "application/json",
        "content-length": "15",
    }
    assert "rs_" not in request.headers["user-agent"]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_body_where_none_belongs_stays_here(call: Call, upstream: Upstream, method: str) -> None:
    assert call(method, "/models/acme/fox", "[" * 1000)["statusCode"] == 200
    assert upstream.asked[0].content == b""


def test_a_body_is_passed_on_byte_for_byte(call: Call, upstream: Upstream) -> None:
    body = '{ "readme" : "# Füchse\\n\\u0041 🦊", "n": 1.0e2 }'
    assert call("PATCH", "/models/acme/fox", body)["statusCode"] == 200
    assert upstream.asked[0].content == body.encode()


def test_a_query_is_encoded_anew(call: Call, upstream: Upstream) -> None:
    query = {"query": ["a&b=c#d/../e?f%2f ü\r\nX: y"], "limit": ["5", "6"], "é": [""]}
    assert call("GET", "/search", query=query)["statusCode"] == 200
    [request] = upstream.asked
    assert re.fullmatch(rb"/v1/search\?[A-Za-z0-9%&=+._-]+", request.url.raw_path)
    assert request.url.params.multi_items() == [
        ("query", query["query"][0]),
        ("limit", "5"),
        ("limit", "6"),
        ("é", ""),
    ]


# -- what comes back --------------------------------------------------------------------------------------------------


def test_of_replicates_headers_only_those_on_the_list_come_back(call: Call, upstream: Upstream) -> None:
    told = {
        "Set-Cookie": "session=1",
        "Connection": "close",
        "Keep-Alive": "timeout=5",
        "Transfer-Encoding": "chunked",
        "Server": "cloudflare",
        "ETag": '"abc"',
        "Authorization": "Bearer r8_of_the_stack",
        "X-Request-Id": "1",
        "RateLimit-Remaining": "2999",
        "RateLimit-Reset": "1",
        "Access-Control-Allow-Origin": "*",
    }
    upstream.answer(httpx.Response(200, json={"ok": True}, headers=told))
    answer = call("GET", "/account")
    assert answer["headers"] == {
        "content-type": "application/json",
        "ratelimit-remaining": "2999",
        "ratelimit-reset": "1",
        "x-content-type-options": "nosniff",
    }
    assert json.loads(answer["body"]) == {"ok": True}


@pytest.mark.parametrize(
    ("told", "given"),
    [
        (f"{URL}/models?cursor=a%2Fb", f"{API_URL}/models?cursor=a%2Fb"),
        (None, None),
        ("null", None),
        ("", None),
        (7, None),
        ("https://evil.example/v1/models", None),
        ("https://api.replicate.com.evil.example/v1/models", None),
        ("https://api.replicate.com/v1evil/models", None),
        ("https://user@api.replicate.com/v1/models", None),
    ],
)
@pytest.mark.parametrize("field", ["next", "previous"])
def test_a_link_to_a_page_leads_to_this_stack_or_nowhere(
    call: Call, upstream: Upstream, field: str, told: Any, given: str | None
) -> None:
    upstream.answer(httpx.Response(200, json={"next": None, "previous": None, "results": [], field: told}))
    assert json.loads(call("GET", "/models")["body"])[field] == given


EXAMPLE = {
    "id": "example",
    "model": "acme/fox",
    "input": {"next": f"{URL}/models", "urls": {"get": f"{URL}/x"}, "results": [{"urls": {"get": f"{URL}/x"}}]},
    "output": {"urls": {"get": f"{URL}/x"}, "results": [], "next": f"{URL}/models"},
    "logs": f"see {URL}/models",
    "urls": {
        "get": f"{URL}/predictions/example",
        "cancel": f"{URL}/predictions/example/cancel",
        "web": "https://replicate.com/p/example",
        "stream": "https://stream.replicate.com/v1/files/opaque",
    },
}
TURNED = EXAMPLE | {
    "urls": {
        "get": f"{API_URL}/predictions/example",
        "cancel": f"{API_URL}/predictions/example/cancel",
        "web": "https://replicate.com/p/example",
        "stream": "https://stream.replicate.com/v1/files/opaque",
    }
}
MODEL = {"url": f"{URL}/models", "description": f"{URL}/models", "default_example": EXAMPLE}
MODEL_TURNED = MODEL | {"default_example": TURNED}
BARE = {"default_example": None}


@pytest.mark.parametrize(
    ("path", "told", "given"),
    [
        ("/models/acme/fox", MODEL, MODEL_TURNED),
        ("/models/acme/fox/examples", {"results": [EXAMPLE]}, {"results": [TURNED]}),
        ("/models", {"results": [MODEL, BARE]}, {"results": [MODEL_TURNED, BARE]}),
        ("/collections/foxes", {"slug": "foxes", "models": [MODEL]}, {"slug": "foxes", "models": [MODEL_TURNED]}),
        (
            "/search",
            {"query": URL, "models": [{"model": MODEL, "metadata": {"tags": [URL]}}], "pages": [{"href": URL}]},
            {"query": URL, "models": [{"model": MODEL_TURNED, "metadata": {"tags": [URL]}}], "pages": [{"href": URL}]},
        ),
        ("/hardware", [{"name": "CPU", "sku": "cpu"}], [{"name": "CPU", "sku": "cpu"}]),
    ],
)  # fmt: skip
def test_links_are_turned_and_texts_inputs_and_outputs_are_left(
    call: Call, upstream: Upstream, path: str, told: Any, given: Any
) -> None:
    upstream.answer(httpx.Response(200, json=told))
    answer = call("GET", path)
    assert (answer["statusCode"], json.loads(answer["body"])) == (200, given)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("DELETE", "/models/acme/fox", 204), ("DELETE", VERSION_PATH, 202), ("DELETE", "/deployments/acme/fox", 204)],
)
def test_an_answer_without_a_body_is_one(call: Call, upstream: Upstream, method: str, path: str, status: int) -> None:
    upstream.answer(httpx.Response(status))
    answer = call(method, path)
    assert (answer["statusCode"], answer["body"], answer["isBase64Encoded"]) == (status, "", False)
    assert "content-type" not in answer["headers"]


def test_a_made_model_is_answered_as_made(call: Call, upstream: Upstream) -> None:
    upstream.answer(httpx.Response(201, json={"name": "fox"}, headers={"Location": "/v1/models/acme/fox"}))
    answer = call("POST", "/models", {"name": "fox"})
    assert (answer["statusCode"], answer["headers"]["location"]) == (201, f"{API_URL}/models/acme/fox")


@pytest.mark.parametrize(
    ("told", "given"),
    [
        ("text/plain", "text/plain; charset=utf-8"),
        ("text/markdown; charset=UTF-8", "text/markdown; charset=utf-8"),
    ],
)
def test_a_readme_is_text_that_no_browser_takes_for_a_page(
    call: Call, upstream: Upstream, told: str, given: str
) -> None:
    text = f"# Füchse\n<script>alert(1)</script> {URL}/models"
    upstream.answer(httpx.Response(200, content=text.encode(), headers={"Content-Type": told}))
    answer = call("GET", "/models/acme/fox/readme")
    assert (answer["statusCode"], answer["body"], answer["headers"]["content-type"]) == (200, text, given)
    assert answer["headers"]["x-content-type-options"] == "nosniff"


def test_a_model_that_is_called_readme_is_a_model(call: Call, upstream: Upstream) -> None:
    upstream.answer(httpx.Response(200, text="text", headers={"Content-Type": "text/plain"}))
    problem_of(call("GET", "/models/acme/readme"), 502)


UNREADABLE: dict[str, httpx.Response] = {
    "a page": httpx.Response(200, html="<h1>hello</h1>"),
    "a picture": httpx.Response(200, content=b"\x89PNG", headers={"Content-Type": "image/png"}),
    "no type": httpx.Response(200, content=b"{}"),
    "cut off": httpx.Response(200, content=b'{"a": ', headers={"Content-Type": "application/json"}),
    "no UTF-8": httpx.Response(200, content=b'{"a": "\xff"}', headers={"Content-Type": "application/json"}),
    "a number": httpx.Response(200, json=7),
    "deep": httpx.Response(200, content=b"[" * 200_000, headers={"Content-Type": "application/json"}),
}


@pytest.mark.parametrize("told", UNREADABLE.values(), ids=UNREADABLE)
def test_an_answer_of_another_kind_is_not_passed_on(call: Call, upstream: Upstream, told: httpx.Response) -> None:
    upstream.answer(told)
    assert "hello" not in problem_of(call("GET", "/models/acme/fox"), 502)["detail"]


def test_numbers_and_halves_of_characters_that_json_does_not_have_are_replaced(call: Call, upstream: Upstream) -> None:
    content = b'{"default_example": {"output": [NaN, 1e999, 1.5, "\\ud800"]}}'
    upstream.answer(httpx.Response(200, content=content, headers={"Content-Type": "application/json"}))
    expected = {"default_example": {"output": [None, None, 1.5, "?"]}}
    assert json.loads(call("GET", "/models/acme/fox")["body"]) == expected


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": "' + b"x" * ANSWER_LIMIT_BYTES + b'"}',
        # Below the limit by itself, above it as a string within Lambda's answer.
        json.dumps({"a": '"' * (ANSWER_LIMIT_BYTES // 3)}).encode(),
    ],
    ids=["as it is", "within Lambda's answer"],
)
def test_an_answer_that_is_too_large_for_lambda_is_a_problem_that_says_so(
    call: Call, upstream: Upstream, content: bytes
) -> None:
    upstream.answer(httpx.Response(200, content=content, headers={"Content-Type": "application/json"}))
    assert str(ANSWER_LIMIT_BYTES) in problem_of(call("GET", "/models"), 502)["detail"]


def test_a_small_answer_that_unpacks_to_a_large_one_is_a_problem(call: Call, upstream: Upstream) -> None:
    content = gzip.compress(b'{"a": "' + b"x" * 20_000_000 + b'"}')
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    upstream.answer(lambda _: httpx.Response(200, content=iter([content]), headers=headers))
    problem_of(call("GET", "/models"), 502)


def test_a_packed_answer_is_unpacked(call: Call, upstream: Upstream) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    upstream.answer(lambda _: httpx.Response(200, content=iter([gzip.compress(b'{"a": 1}')]), headers=headers))
    answer = call("GET", "/models")
    assert (answer["statusCode"], answer["body"]) == (200, '{"a":1}')
    assert "content-encoding" not in answer["headers"]


# -- problems of Replicate, and on the way there ----------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 403, 404, 405, 409, 410, 413, 418, 422, 499])
def test_a_refusal_of_replicate_comes_through_as_a_problem(call: Call, upstream: Upstream, status: int) -> None:
    told = {"title": "No", "detail": "The version is in use.", "status": status}
    upstream.answer(httpx.Response(status, json=told, headers={"Set-Cookie": "a=b"}))
    answer = call("DELETE", VERSION_PATH)
    assert problem_of(answer, status)["detail"] == "The version is in use."
    assert "set-cookie" not in answer["headers"]
    assert len(upstream.asked) == 1


def test_the_fields_of_a_refusal_come_through(call: Call, upstream: Upstream) -> None:
    fields = [{"type": "maximum", "field": "max_instances", "description": "must be 20 or less"}]
    upstream.answer(httpx.Response(422, json={"detail": "- max_instances", "invalid_fields": fields}))
    problem = problem_of(call("POST", "/deployments", {"max_instances": 99}), 422)
    assert problem["invalid_fields"] == [{"field": "max_instances", "detail": "must be 20 or less"}]


@pytest.mark.parametrize("content", [b"", b"<h1>gone</h1>", b"[" * 10_000, b'{"detail": {"a": 1}}', b"\xff"])
def test_a_refusal_that_is_no_problem_becomes_one(call: Call, upstream: Upstream, content: bytes) -> None:
    upstream.answer(httpx.Response(404, content=content))
    problem_of(call("GET", "/models/acme/fox"), 404)


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({"Retry-After": "7"}, {}, "7"),
        ({}, {"detail": "Request was throttled. Your rate limit resets in ~30s."}, "30"),
        ({}, {"retry_after": 5}, "5"),
        ({}, {}, "10"),
    ],
)
def test_a_throttled_call_is_told_when_to_come_again(
    call: Call, upstream: Upstream, headers: dict[str, str], body: Any, seconds: str
) -> None:
    upstream.answer(httpx.Response(429, json=body, headers={**headers, "RateLimit-Remaining": "0"}))
    answer = call("GET", "/models")
    problem_of(answer, 429)
    assert (answer["headers"]["retry-after"], answer["headers"]["ratelimit-remaining"]) == (seconds, "0")


@pytest.mark.parametrize("status", [401, 402])
@pytest.mark.parametrize(("method", "path"), [("GET", "/account"), ("DELETE", "/deployments/acme/fox")])
def test_a_refusal_of_the_stacks_token_is_502_and_counted_and_the_token_is_read_anew(
    call: Call, upstream: Upstream, counted: Callable[[], int], method: str, path: str, status: int
) -> None:
    upstream.answer(httpx.Response(status, json={"detail": "r8_of_the_stack is bad"}))
    problem = problem_of(call(method, path), 502)
    assert "operator" in problem["detail"]
    assert "r8_" not in json.dumps(problem)
    assert counted() == 1
    clients.client("secretsmanager").put_secret_value(SecretId="replicate-token", SecretString="r8_a_new_one")
    call(method, path)
    assert [request.headers["authorization"] for request in upstream.asked] == [
        f"Bearer {ReplicateInMemory.TOKEN}",
        "Bearer r8_a_new_one",
    ]


def test_a_token_that_cannot_be_read_is_502_and_counted_and_nothing_is_asked(
    call: Call, upstream: Upstream, counted: Callable[[], int]
) -> None:
    clients.client("secretsmanager").delete_secret(SecretId="replicate-token", ForceDeleteWithoutRecovery=True)
    problem_of(call("GET", "/account"), 502)
    assert counted() == 1
    assert upstream.asked == []


def test_a_refusal_of_the_call_is_not_counted_as_one_of_the_token(
    call: Call, upstream: Upstream, counted: Callable[[], int]
) -> None:
    upstream.answer(httpx.Response(403, json={"detail": "You can only delete models you own."}))
    problem_of(call("DELETE", "/models/acme/fox"), 403)
    assert counted() == 0


@pytest.mark.parametrize(("told", "given"), [(500, 502), (502, 502), (503, 503), (504, 502), (520, 502), (999, 502)])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_failure_of_replicate_is_told_as_such_and_not_tried_again(
    call: Call, upstream: Upstream, method: str, told: int, given: int
) -> None:
    upstream.answer(httpx.Response(told, text="Traceback: secret", headers={"Retry-After": "3"}))
    answer = call(method, "/models/acme/fox")
    detail = problem_of(answer, given)["detail"]
    assert detail.startswith(f"Replicate failed ({told}).")
    assert ("Check before you repeat" in detail) == (method == "DELETE")
    assert "secret" not in detail
    assert answer["headers"].get("retry-after") == ("3" if given == 503 else None)
    assert len(upstream.asked) == 1


@pytest.mark.parametrize(
    "location", ["https://evil.example/v1/models", "//evil.example/v1/x", "/account", "", "http://["]
)
def test_a_redirect_out_of_the_api_is_not_passed_on(call: Call, upstream: Upstream, location: str) -> None:
    for status in (301, 302, 303, 304, 307, 308):
        upstream.answer(httpx.Response(status, headers={"Location": location}))
        answer = call("GET", "/models/acme/fox")
        problem_of(answer, 502)
        assert "location" not in answer["headers"]
    assert len(upstream.asked) == 6


def test_a_redirect_within_the_api_leads_to_this_stack(call: Call, upstream: Upstream) -> None:
    upstream.answer(httpx.Response(301, html="moved", headers={"Location": f"{URL}/models/acme/wolf"}))
    answer = call("GET", "/models/acme/fox")
    assert (answer["statusCode"], answer["headers"]["location"]) == (301, f"{API_URL}/models/acme/wolf")
    assert answer["body"] == ""


def breaking(error: type[httpx.HTTPError]) -> Answer:
    def broken(_: httpx.Request) -> httpx.Response:
        raise error("broken")

    return broken


BROKEN = [
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.ReadError,
    httpx.WriteError,
    httpx.CloseError,
    httpx.RemoteProtocolError,
]


@pytest.mark.parametrize("error", BROKEN)
def test_a_read_whose_connection_breaks_is_tried_once_more(
    call: Call, upstream: Upstream, error: type[httpx.HTTPError]
) -> None:
    upstream.answer(breaking(error), httpx.Response(200, json={"ok": True}))
    assert call("GET", "/account")["statusCode"] == 200
    upstream.answer(breaking(error))
    problem_of(call("GET", "/account"), 502)
    assert len(upstream.asked) == 4


@pytest.mark.parametrize("error", BROKEN)
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/models"), ("PATCH", "/models/acme/fox"), ("DELETE", "/models/acme/fox")]
)
def test_a_change_whose_connection_breaks_is_never_tried_again(
    call: Call, upstream: Upstream, method: str, path: str, error: type[httpx.HTTPError]
) -> None:
    upstream.answer(breaking(error))
    detail = problem_of(call(method, path, body_for(method)), 502)["detail"]
    never_sent = error in (httpx.ConnectError, httpx.ConnectTimeout)
    assert ("Nothing was changed" in detail, "is unknown" in detail) == (never_sent, not never_sent)
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("error", [httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_silence_is_504_and_not_tried_again(
    call: Call, upstream: Upstream, method: str, error: type[httpx.HTTPError]
) -> None:
    upstream.answer(breaking(error))
    problem_of(call(method, "/models/acme/fox"), 504)
    assert len(upstream.asked) == 1


def test_an_answer_that_does_not_end_is_504(call: Call, upstream: Upstream, clock: Clock) -> None:
    def drops() -> Iterator[bytes]:
        while True:
            clock.advance(5)
            yield b" "

    upstream.answer(lambda _: httpx.Response(200, content=drops(), headers={"Content-Type": "application/json"}))
    started = clock.now()
    problem_of(call("GET", "/models"), 504)
    assert clock.now() - started <= 20


def test_an_answer_that_cannot_be_unpacked_is_502(call: Call, upstream: Upstream) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    upstream.answer(lambda _: httpx.Response(200, content=iter([b"not gzip"]), headers=headers))
    problem_of(call("GET", "/models"), 502)


def test_a_url_that_cannot_be_read_stops_a_change_before_it_is_made(call: Call, upstream: Upstream) -> None:
    clients.client("ssm").delete_parameter(Name="/replicate-serverless/api_url")
    problem_of(call("DELETE", "/models/acme/fox"), 503)
    assert upstream.asked == []


def test_logs_hold_neither_bodies_nor_queries_nor_tokens(
    call: Call, upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.answer(httpx.Response(200, json={"answered": "secret-answer"}))
    call("PATCH", "/models/acme/fox", {"readme": "secret-body"}, query={"cursor": ["secret-query"]})
    upstream.answer(httpx.Response(500, text="secret-answer"))
    call("GET", "/search", query={"query": ["secret-query"]})
    logged = "".join(logger.registered_formatter.format(record) for record in caplog.records)
    assert '"path":"/models/acme/fox"' in logged
    assert '"owner":"alice"' in logged
    assert not re.search("secret-|r8_of|rs_", logged)


# -- versions that are kept -------------------------------------------------------------------------------------------

TOLD = {"id": VERSION, "openapi_schema": {"title": "Füchse"}}


def test_a_version_is_asked_for_once_in_an_hour(call: Call, upstream: Upstream, clock: Clock) -> None:
    upstream.answer(httpx.Response(200, json=TOLD))
    first = call("GET", VERSION_PATH)
    assert call("GET", VERSION_PATH)["body"] == first["body"]
    assert json.loads(first["body"]) == TOLD
    assert len(upstream.asked) == 1
    call("GET", f"/models/acme/wolf/versions/{VERSION}")
    assert len(upstream.asked) == 2, "another model's version of that id is another answer"
    clock.advance(VERSION_CACHE_SECONDS + 1)
    call("GET", VERSION_PATH)
    assert len(upstream.asked) == 3, "also while the table still has the item"


def test_a_kept_version_is_for_those_who_may_read(call: Call, upstream: Upstream) -> None:
    upstream.answer(httpx.Response(200, json=TOLD))
    call("GET", VERSION_PATH)
    problem_of(call("GET", VERSION_PATH, scopes="predict manage"), 403)


@pytest.mark.parametrize(
    "told",
    [
        httpx.Response(200, json=TOLD | {"id": "0" * 64}),
        httpx.Response(200, json=[TOLD]),
        httpx.Response(200, json=TOLD | {"openapi_schema": "x" * VERSION_CACHE_LIMIT_BYTES}),
        httpx.Response(200),
        httpx.Response(202, json=TOLD),
        httpx.Response(404, json=TOLD),
        httpx.Response(500, json=TOLD),
    ],
    ids=["another id", "no object", "large", "empty", "not 200", "missing", "failed"],
)
def test_only_the_version_itself_is_kept(call: Call, upstream: Upstream, told: httpx.Response) -> None:
    upstream.answer(told)
    call("GET", VERSION_PATH)
    call("GET", VERSION_PATH)
    assert len(upstream.asked) == 2
    assert clients.client("dynamodb").scan(TableName="predictions")["Items"] == []


@pytest.mark.parametrize("path", ["/account", "/hardware", "/models/acme/fox", "/models/acme/fox/versions", "/search"])
def test_nothing_else_is_kept(call: Call, upstream: Upstream, path: str) -> None:
    upstream.answer(httpx.Response(200, json=TOLD))
    call("GET", path)
    call("GET", path)
    assert len(upstream.asked) == 2


@pytest.mark.parametrize("told", [httpx.Response(202), httpx.Response(500), breaking(httpx.ReadError)])
def test_a_version_that_may_be_deleted_is_asked_for_again(
    call: Call, upstream: Upstream, told: httpx.Response | Answer
) -> None:
    upstream.answer(httpx.Response(200, json=TOLD))
    call("GET", VERSION_PATH)
    upstream.answer(told)
    call("DELETE", VERSION_PATH)
    upstream.answer(httpx.Response(404, json={"detail": "gone"}))
    problem_of(call("GET", VERSION_PATH), 404)


def test_a_cache_that_fails_is_none(
    call: Call, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, cloud: None
) -> None:
    upstream.answer(httpx.Response(200, json=TOLD))

    def refuse(**_: Any) -> None:
        raise ClientError({"Error": {"Code": "ThrottlingException", "Message": "slow down"}}, "GetItem")

    events: Any = clients.client("dynamodb").meta.events
    events.register_first("before-call.dynamodb", refuse)
    try:
        assert call("GET", VERSION_PATH)["statusCode"] == 200
        assert call("GET", VERSION_PATH)["statusCode"] == 200
        upstream.answer(httpx.Response(202))
        assert call("DELETE", VERSION_PATH)["statusCode"] == 202
    finally:
        events.unregister("before-call.dynamodb", refuse)
    assert len(upstream.asked) == 3


def test_the_access_of_the_cache_is_to_its_own_items_only(call: Call, upstream: Upstream) -> None:
    upstream.answer(httpx.Response(200, json=TOLD))
    call("GET", VERSION_PATH)
    [item] = clients.client("dynamodb").scan(TableName="predictions")["Items"]
    assert item["pk"] == {"S": f"forwarded#{VERSION_PATH}"}
    assert item.keys() == {"pk", "sk", "json", "expires_at"}


# -- schemas of versions that are read ----------------------------------------------------------------------------

INPUT = {"type": "object", "required": ["prompt"], "properties": {"prompt": {"type": "string"}}}


def described(given: Any) -> dict[str, Any]:
    return {"id": VERSION, "openapi_schema": {"components": {"schemas": {"Input": given}}}}


@pytest.fixture
def read_version(cloud: None, upstream: Upstream, clock: Clock) -> Callable[[Any], str]:
    """Reads a version through the forwarding, which keeps schemas."""
    versions = VersionCache("predictions", clients.client("dynamodb"), clock.now, keeps_schemas=True)
    forwarding = Forwarding(URL, Token("replicate-token"), upstream.client, versions, clock.now)

    def read(told: Any) -> str:
        upstream.answer(httpx.Response(200, json=told))
        names = {"owner": "acme", "name": "fox-1.5", "id": VERSION}
        template = "/models/{owner}/{name}/versions/{id}"
        return forwarding.forward(ForwardedCall.check("GET", template, names, {}, b"", None)).text

    return read


@pytest.mark.parametrize(
    "given",
    [None, 7, [], {"$ref": "https://a.example/b"}, {"properties": 7}],
    ids=str,
)
def test_schema_of_no_use_is_kept_as_such_and_the_answer_comes_through(
    read_version: Callable[[Any], str], table: PredictionsTable, clock: Clock, given: Any
) -> None:
    assert json.loads(read_version(described(given))) == described(given)
    assert StoredSchemas.from_env().get_schema(VERSION, clock.now()) == StoredSchema("acme/fox-1.5", "null")
    assert StoredSchemas.from_env().get_schema(VERSION, clock.now() + 86400) is None


def test_schema_of_a_version_that_is_read_checks_the_next_prediction_of_the_bare_version(
    read_version: Callable[[Any], str], submissions: Submissions, replicate: ReplicateInMemory
) -> None:
    read_version(described(INPUT))
    body = json.dumps({"version": VERSION, "input": {"prompt": 7}}).encode()
    intent = create_intent(body, {}, owner="alice", reference=None, allow_loopback_webhooks=False)
    with pytest.raises(Problem) as problem:
        submissions.start(intent)
    assert [each["field"] for each in problem.value.invalid_fields] == ["input.prompt"]
    assert replicate.asked == []


def test_of_a_schema_too_large_for_an_item_only_the_model_is_noted(
    read_version: Callable[[Any], str], table: PredictionsTable, clock: Clock
) -> None:
    choices = {**INPUT["properties"], "choice": {"enum": [f"{n} " + "x" * 60 for n in range(3_000)]}}  # type: ignore[dict-item]
    read_version(described({**INPUT, "properties": choices}))
    assert StoredSchemas.from_env().get_schema(VERSION, clock.now()) == StoredSchema("acme/fox-1.5", None)
    StoredSchemas.from_env().put_schema(VERSION, "{}", int(clock.now()) + 60, "acme/fox-1.5")
    read_version(described({**INPUT, "properties": choices}))
    assert StoredSchemas.from_env().get_schema(VERSION, clock.now()) == StoredSchema("acme/fox-1.5", "{}")


def test_table_that_takes_no_schema_does_not_matter(read_version: Callable[[Any], str]) -> None:
    with refusing("PutItem", "ThrottlingException", service="dynamodb"):
        assert json.loads(read_version(described(INPUT))) == described(INPUT)


@pytest.mark.parametrize(("value", "keeps"), [("true", True), ("false", False)])
def test_schemas_are_kept_where_inputs_are_checked(
    cloud: None, monkeypatch: pytest.MonkeyPatch, value: str, keeps: bool
) -> None:
    monkeypatch.setenv("VALIDATE_INPUT", value)
    assert Forwarding.from_env()._versions._keeps_schemas == keeps
