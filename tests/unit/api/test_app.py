"""The HTTP API from the event to the answer; every door is tried by strangers first."""

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from predictions.api.app import answer_with, json_response, resolver
from predictions.api.routing import Response
from predictions.aws import clients
from predictions.errors import Problem
from predictions.files.output_references import StoredFile
from predictions.files.outputs_bucket import OutputsBucket
from predictions.ids import derived_id
from predictions.intents.model import create_intent
from predictions.status import Status, visible
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction, PredictionDetail
from predictions.upstream.prediction import UpstreamPrediction
from predictions.views.prediction import Presenter

from tests.support.apps import SAMPLE_SIGNING_SECRET, AwsCalls, Context, clock_module, load_app, sample
from tests.support.fakes import API_URL, VERSION, Clock, ReplicateInMemory, answer
from tests.support.protocol import Submissions

Call = Callable[..., dict[str, Any]]
BODY = {"version": VERSION, "input": {"prompt": "a red fox"}}
FUNCTIONS = {
    "start_prediction": "version",
    "read_prediction": "one",
    "read_predictions": "list",
    "cancel_prediction": "open",
}
"""Each with a sample of its events."""


@pytest.fixture
def call(submissions: Submissions, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls a function as API Gateway does: a sample's event with changes; the answer's body is parsed."""
    loaded: dict[str, Any] = {}

    def call(function: str, case: str, **changes: Any) -> dict[str, Any]:
        event = sample(function, case)
        owner, headers = changes.pop("owner", None), changes.pop("headers", {})
        if owner:
            event["requestContext"]["authorizer"]["owner"] = owner
        if headers is None:
            event["headers"] = event["multiValueHeaders"] = None
        else:
            event["headers"] |= headers
            event["multiValueHeaders"] |= {name: [value] for name, value in headers.items()}
        event |= changes
        if function not in loaded:
            with pytest.MonkeyPatch.context() as template_only:
                loaded[function] = load_app(function, template_only)
            submissions.put_into(loaded[function], monkeypatch)
            if hasattr(loaded[function], "time"):
                monkeypatch.setattr(loaded[function], "time", clock_module(clock.now))
        answer: dict[str, Any] = loaded[function].handler(event, Context())
        return {**answer, "body": json.loads(answer["body"])}

    return call


def start(call: Call, body: Any = BODY, headers: dict[str, str] | None = None, **changes: Any) -> dict[str, Any]:
    """POST /predictions, without a key unless given."""
    return call(
        "start_prediction", "sdk_retry", body=body if isinstance(body, str) else json.dumps(body),
        headers={"X-Stainless-Retry-Count": "0", **(headers or {})}, **changes,
    )  # fmt: skip


def read(call: Call, prediction_id: str, **changes: Any) -> dict[str, Any]:
    """GET /predictions/{id}."""
    return call("read_prediction", "one", path=f"/predictions/{prediction_id}", **changes)


def header(answer: dict[str, Any], name: str) -> Any:
    """A header of an answer, wherever the answer has it."""
    many = answer.get("multiValueHeaders", {}).get(name)
    return many[0] if many else answer.get("headers", {}).get(name)


def problem_of(answer: dict[str, Any], status: int) -> dict[str, Any]:
    """The RFC 7807 problem in an answer, which has to be one of this status."""
    problem: dict[str, Any] = answer["body"]
    assert (answer["statusCode"], header(answer, "Content-Type")) == (status, "application/problem+json")
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    return problem


# -- refusals before anything is asked or written ------------------------------------------------------------

NOT_THERE: dict[str, dict[str, str]] = {
    "root": {"path": "/"},
    "no path": {"path": ""},
    "another": {"path": "/collections"},
    "below one": {"path": "/predictions/x/y/z"},
    "model without route": {"path": "/models/a/b"},
    "deeper model": {"path": "/models/a/b/c/predictions"},
    "climbing": {"path": "/predictions/../tokens"},
    "line end": {"path": "/predictions\n/x"},
    "long": {"path": "/" + "x" * 10_000},
    "PUT": {"httpMethod": "PUT"},
    "PATCH": {"httpMethod": "PATCH"},
    "DELETE": {"httpMethod": "DELETE"},
    "OPTIONS": {"httpMethod": "OPTIONS"},
    "HEAD": {"httpMethod": "HEAD"},
    "QUERY": {"httpMethod": "QUERY"},
    "no method": {"httpMethod": ""},
    "hostile method": {"httpMethod": "GET /x HTTP/1.1\r\nX: y"},
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("change", NOT_THERE.values(), ids=NOT_THERE)
def test_an_unknown_route_or_method_is_a_problem(call: Call, function: str, change: dict[str, str]) -> None:
    case = FUNCTIONS[function]
    calls = AwsCalls()
    problem = problem_of(call(function, case, **change), 404)
    assert len(problem["detail"]) < 300
    assert calls.made == []


BROKEN_BODIES: dict[str, tuple[dict[str, Any], int]] = {
    "none": ({"body": None}, 400),
    "empty": ({"body": ""}, 400),
    "deep": ({"body": "[" * 100_000}, 400),
    "deep objects": ({"body": '{"a":' * 100_000 + "1" + "}" * 100_000}, 400),
    "a list": ({"body": "[]"}, 422),
    "half a surrogate pair": ({"body": '{"input": {"prompt": "\ud800"}}'}, 400),
    "escaped half a surrogate pair": ({"body": '{"input": {"prompt": "\\ud800"}}'}, 400),
    "too large": ({"body": '{"input": {"x": "' + "x" * 5 * 1024 * 1024 + '"}}'}, 413),
    "base64 of nothing": ({"body": "", "isBase64Encoded": True}, 400),
    "base64 that is none": ({"body": "not base64!", "isBase64Encoded": True}, 400),
    "base64 without padding": ({"body": "e30", "isBase64Encoded": True}, 400),
    "base64 that is not ASCII": ({"body": "é", "isBase64Encoded": True}, 400),
    "base64 of what is no UTF-8": ({"body": base64.b64encode(b"\xff\xfe").decode(), "isBase64Encoded": True}, 400),
}


@pytest.mark.parametrize(("change", "status"), BROKEN_BODIES.values(), ids=BROKEN_BODIES)
def test_a_broken_body_is_a_problem_before_anything_is_asked_or_written(
    call: Call, replicate: ReplicateInMemory, change: dict[str, Any], status: int
) -> None:
    calls = AwsCalls()
    problem_of(call("start_prediction", "version", **change), status)
    assert calls.made == []
    assert replicate.asked == []


@pytest.mark.parametrize(
    "coding", ["gzip", "GZIP", "br, gzip", "identity, gzip", "x" * 10_000, "é"], ids=lambda c: c[:20]
)
def test_a_body_that_is_said_to_be_encoded_is_a_problem_before_anything_is_asked_or_written(
    call: Call, replicate: ReplicateInMemory, coding: str
) -> None:
    calls = AwsCalls()
    refusal = start(call, headers={"Content-Encoding": coding})
    assert len(problem_of(refusal, 415)["detail"]) < 300
    assert header(refusal, "Accept-Encoding") == "identity"
    assert calls.made == []
    assert replicate.asked == []


def test_a_body_whose_bytes_were_replaced_on_their_way_is_a_problem_before_anything_is_asked_or_written(
    call: Call, replicate: ReplicateInMemory
) -> None:
    sent = json.dumps(BODY).encode().replace(b"red", b"\xff\xfe")
    calls = AwsCalls()
    refusal = start(call, sent.decode("utf-8", "replace"), headers={"Content-Length": str(len(sent))})
    assert "not valid UTF-8" in problem_of(refusal, 400)["detail"]
    assert calls.made == []
    assert replicate.asked == []


def test_a_body_whose_bytes_api_gateway_replaced_is_read_as_it_came(call: Call, table: PredictionsTable) -> None:
    # Its events have no Content-Length, so that these characters may be the caller's own: docs/api.md says so.
    sent = json.dumps(BODY).encode().replace(b"red", b"\xff\xfe")
    created = start(call, sent.decode("utf-8", "replace"))
    assert created["statusCode"] == 201
    assert "\ufffd\ufffd" in created["body"]["input"]["prompt"]


@pytest.mark.parametrize("length", ["", "many", "-1", "9" * 5000, None])
def test_a_body_is_read_whatever_else_its_length_is_said_to_be(call: Call, length: str | None) -> None:
    body = json.dumps({**BODY, "input": {"prompt": "Füchse 🦊"}}, ensure_ascii=False)
    length = str(len(body.encode())) if length is None else length
    assert start(call, body, headers={"Content-Length": length})["statusCode"] == 201


@pytest.mark.parametrize("coding", ["", "identity", " Identity "])
def test_a_body_that_is_said_to_be_as_it_is_is_read(call: Call, coding: str) -> None:
    assert start(call, headers={"Content-Encoding": coding})["statusCode"] == 201


BROKEN_NAMES = [
    ("..", "account"),
    ("%2e%2e", "account"),
    ("%2E%2E%2F", "x"),
    ("owner", "name%00"),
    ("owner", "name%0a"),
    ("owner", "a b"),
    ("owner", "<script>"),
    ("owner", "name:latest"),
    ("owner", "@evil.example"),
    ("owner", "ñ"),
    ("owner", "x" * 1000),
    ("-", "-"),
]


@pytest.mark.parametrize("kind", ["models", "deployments"])
@pytest.mark.parametrize(("owner", "name"), BROKEN_NAMES)
def test_a_route_with_a_hostile_name_is_a_problem_before_anything_is_asked_or_written(
    call: Call, replicate: ReplicateInMemory, kind: str, owner: str, name: str
) -> None:
    calls = AwsCalls()
    change = {"path": f"/{kind}/{owner}/{name}/predictions", "pathParameters": {"owner": owner, "name": name}}
    answer = call("start_prediction", "model_route", body='{"input": {}}', **change)
    assert len(problem_of(answer, 404)["detail"]) < 300
    assert calls.made == []
    assert replicate.asked == []


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({"Prefer": "wait=61"}, "Prefer"),
        ({"prefer": "WAIT=x"}, "Prefer"),
        ({"Cancel-After": "1s"}, "Cancel-After"),
        ({"cancel-after": "1 week"}, "Cancel-After"),
        ({"Idempotency-Key": ""}, "Idempotency-Key"),
        ({"idempotency-key": "a\tb"}, "Idempotency-Key"),
        ({"IDEMPOTENCY-KEY": "x" * 300}, "Idempotency-Key"),
    ],
)
def test_a_bad_header_is_a_problem_that_names_it(
    call: Call, replicate: ReplicateInMemory, headers: dict[str, str], field: str
) -> None:
    calls = AwsCalls()
    problem = problem_of(start(call, headers=headers), 422)
    assert [f["field"] for f in problem["invalid_fields"]] == [field]
    assert field in problem["detail"]
    assert calls.made == []
    assert replicate.asked == []


def without_authorizer(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event["requestContext"].items() if name != "authorizer"}


AUTHORIZERS: dict[str, Any] = {
    "no context": None,
    "empty context": {},
    "no scopes": {"owner": "alice"},
    "no owner": {"scopes": "predict read manage"},
    "owner empty": {"owner": "", "scopes": "predict read"},
    "scopes empty": {"owner": "alice", "scopes": ""},
    "another scope": {"owner": "alice", "scopes": "manage"},
    "part of a scope": {"owner": "alice", "scopes": "predictions pre reader unread"},
    "scopes null": {"owner": "alice", "scopes": None},
    "scopes with commas": {"owner": "alice", "scopes": "predict,read"},
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("authorizer", AUTHORIZERS.values(), ids=AUTHORIZERS)
def test_a_token_without_the_scope_is_refused_before_anything_is_asked_or_written(
    call: Call, replicate: ReplicateInMemory, function: str, authorizer: Any
) -> None:
    case = FUNCTIONS[function]
    context = {**without_authorizer(sample(function, case)), "authorizer": authorizer}
    calls = AwsCalls()
    problem = problem_of(call(function, case, requestContext=context), 403)
    assert "scope" in problem["detail"]
    assert calls.made == []
    assert replicate.asked == []


@pytest.mark.parametrize(
    ("function", "case"),
    [("start_prediction", "version"), ("read_prediction", "one"), ("cancel_prediction", "open")],
)
def test_a_request_that_no_authorizer_saw_is_refused(call: Call, function: str, case: str) -> None:
    problem_of(call(function, case, requestContext=without_authorizer(sample(function, case))), 403)


def test_a_request_without_headers_is_taken_for_json(call: Call) -> None:
    assert call("start_prediction", "version", headers=None)["statusCode"] == 201


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("event", [{}, {"httpMethod": "GET"}, {"path": "/predictions"}])
def test_an_event_that_is_none_of_api_gateway_is_a_problem(
    function: str, event: dict[str, Any], submissions: Submissions, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = load_app(function, monkeypatch).handler(event, Context())
    assert answer["statusCode"] in (404, 500)
    assert json.loads(answer["body"])["status"] == answer["statusCode"]


BAD_CURSORS = [
    "x",
    "====",
    "cD0x",
    "é",
    "\ud800",
    "../../x",
    "A" * 100_000,
    base64.urlsafe_b64encode(b"o2025-06-15T15:06:41.000000Z#short").decode(),
    base64.urlsafe_b64encode(b"x2025-06-15T15:06:41.000000Z#" + b"a" * 26).decode(),
    base64.urlsafe_b64encode(b"o2025-06-15T15:06:41.000000Z#" + b"A" * 26).decode(),
    base64.urlsafe_b64encode(b"o2025-06-15T15:06:41.000000Z#" + b"a" * 26 + b"\n").decode(),
    base64.urlsafe_b64encode(b"tokens").decode(),
    base64.urlsafe_b64encode(b"\xff" * 40).decode(),
]


@pytest.mark.parametrize("cursor", BAD_CURSORS, ids=lambda cursor: ascii(cursor[:30]))
def test_a_cursor_that_is_none_is_a_problem(call: Call, cursor: str) -> None:
    calls = AwsCalls()
    change = {"queryStringParameters": {"cursor": cursor}, "multiValueQueryStringParameters": {"cursor": [cursor]}}
    problem = problem_of(call("read_predictions", "list", **change), 422)
    assert [f["field"] for f in problem["invalid_fields"]] == ["cursor"]
    assert calls.made == []


# -- faults ---------------------------------------------------------------------------------------------------

FAULTS: dict[str, Exception] = {
    "throttled": ClientError({"Error": {"Code": "ThrottlingException", "Message": "secret detail"}}, "GetItem"),
    "denied": ClientError({"Error": {"Code": "AccessDeniedException", "Message": "secret detail"}}, "GetItem"),
    "unreachable": EndpointConnectionError(endpoint_url="https://secret.detail"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize(
    ("function", "case"),
    [
        ("start_prediction", "version"),
        ("start_prediction", "community_model"),
        ("read_prediction", "one"),
        ("read_predictions", "list"),
        ("cancel_prediction", "open"),
    ],
)
def test_a_failing_aws_is_a_problem_to_try_again(
    call: Call, replicate: ReplicateInMemory, fault: Exception, function: str, case: str
) -> None:
    calls = AwsCalls()
    calls.fail(fault)
    answer = call(function, case)
    problem_of(answer, 503)
    assert int(header(answer, "Retry-After")) > 0
    assert "secret" not in json.dumps(answer)
    assert replicate.creates == []


@pytest.mark.parametrize("body", [BODY, {**BODY, "version": "stability-ai/sdxl"}])
def test_a_url_that_cannot_be_read_stops_a_create_before_its_claim(
    call: Call, replicate: ReplicateInMemory, body: Any
) -> None:
    clients.client("ssm").delete_parameter(Name="/replicate-serverless/api_url")
    problem_of(start(call, body), 503)
    assert replicate.creates == []
    items = clients.client("dynamodb").scan(TableName="predictions")["Items"]
    assert [item for item in items if item["sk"]["S"] == "status"] == []


def test_a_token_that_cannot_be_read_is_told_as_the_stacks_fault_and_nothing_is_sent(
    call: Call, replicate: ReplicateInMemory
) -> None:
    clients.client("secretsmanager").delete_secret(SecretId="replicate-token", ForceDeleteWithoutRecovery=True)
    problem_of(start(call), 502)
    assert replicate.asked == []
    [shown] = call("read_predictions", "list")["body"]["results"]
    assert (shown["status"], "token" in shown["error"]) == ("failed", True)


def test_a_token_that_cannot_be_read_leaves_a_keyed_request_to_be_submitted_later(
    call: Call, replicate: ReplicateInMemory, table: PredictionsTable
) -> None:
    clients.client("secretsmanager").delete_secret(SecretId="replicate-token", ForceDeleteWithoutRecovery=True)
    problem_of(start(call, headers={"Idempotency-Key": "k-1"}), 502)
    assert replicate.asked == []
    prediction = table.get(derived_id("alice", "k-1"))
    assert prediction is not None
    assert (prediction.terminal, prediction.claimed, prediction.submit_at is None) == (False, None, False)


def test_an_unexpected_error_is_a_problem_that_says_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    app = resolver()

    @app.get("/predictions")
    def break_down() -> Response:
        raise ValueError("r8_secret in a message")

    answer = answer_with(app)(sample("read_predictions", "list"), Context())
    assert answer["statusCode"] == 500
    assert "r8_secret" not in json.dumps(answer)
    assert json.loads(answer["body"])["title"] == "Internal Server Error"
    assert "ValueError" in caplog.text, "the log has what the caller has not"


def test_a_problem_keeps_its_fields_and_headers() -> None:
    app = resolver()
    fields = [{"field": "input", "detail": "wrong"}]

    @app.get("/predictions")
    def refuse() -> Response:
        raise Problem(429, "Slower.", title="Throttled", invalid_fields=fields, headers={"Retry-After": "7"})

    answer = answer_with(app)(sample("read_predictions", "list"), Context())
    assert (answer["statusCode"], header(answer, "Retry-After")) == (429, "7")
    assert json.loads(answer["body"]) == {
        "title": "Throttled",
        "detail": "Slower.",
        "status": 429,
        "invalid_fields": fields,
    }


def test_an_answer_that_json_does_not_have_is_a_problem() -> None:
    app = resolver()

    @app.get("/predictions")
    def show() -> Any:
        return json_response(200, {"seed": float("nan")})

    assert answer_with(app)(sample("read_predictions", "list"), Context())["statusCode"] == 500


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_refused_token_of_the_stack_is_no_fault_of_the_caller(
    call: Call, replicate: ReplicateInMemory, status: int
) -> None:
    replicate.faults = [answer(status, {"detail": "token r8_of_the_stack is bad"})]
    answered = start(call)
    assert "r8_" not in problem_of(answered, 502)["detail"]


def test_a_refusal_of_replicate_is_the_callers_answer(call: Call, replicate: ReplicateInMemory) -> None:
    fields = [{"field": "input.prompt", "detail": "prompt is required"}]
    replicate.faults = [answer(422, {"detail": "- input: prompt is required", "invalid_fields": fields})]
    problem = problem_of(start(call), 422)
    assert (problem["detail"], problem["invalid_fields"]) == ("- input: prompt is required", fields)


# -- the public route -----------------------------------------------------------------------------------------


def store_signing_secret() -> None:
    """Makes the secret of the samples the one to verify with."""
    document = {"current": SAMPLE_SIGNING_SECRET, "previous": None, "rotated_at": "2025-01-01T00:00:00Z"}
    clients.client("secretsmanager").put_secret_value(SecretId="signing-secret", SecretString=json.dumps(document))


def test_a_webhook_before_there_is_a_secret_is_asked_for_again(call: Call) -> None:
    answered = call("receive_webhook", "succeeded")
    problem_of(answered, 503)
    assert int(header(answered, "Retry-After")) > 0


def test_a_webhook_while_aws_fails_is_asked_for_again(call: Call) -> None:
    store_signing_secret()
    assert call("receive_webhook", "succeeded")["statusCode"] == 200
    calls = AwsCalls()
    calls.fail(ClientError({"Error": {"Code": "InternalServerError", "Message": "x"}}, "GetItem"))
    problem_of(call("receive_webhook", "succeeded"), 503)
    assert set(calls.made) == {"dynamodb.GetItem"}, "the signing secret is still known"


# -- owners ---------------------------------------------------------------------------------------------------


def test_another_owner_is_told_nothing(call: Call, replicate: ReplicateInMemory) -> None:
    prediction_id = start(call)["body"]["id"]
    cancel_path = f"/predictions/{prediction_id}/cancel"
    of_another = [
        read(call, prediction_id, owner="bob"),
        call("cancel_prediction", "open", path=cancel_path, owner="bob"),
    ]
    of_none = [
        read(call, "b" * 26, owner="bob"),
        call("cancel_prediction", "open", path=f"/predictions/{'b' * 26}/cancel", owner="bob"),
    ]
    for theirs, nobodys in zip(of_another, of_none, strict=True):
        problem_of(theirs, 404)
        assert json.dumps(theirs).replace(prediction_id, "b" * 26) == json.dumps(nobodys)
    assert call("read_predictions", "list", owner="bob")["body"]["results"] == []
    assert replicate.canceled == []
    assert read(call, prediction_id)["body"]["status"] == "starting"


@pytest.mark.parametrize("prediction_id", ["x", "A" * 26, "a" * 500, "tokens", "%2e%2e", "a b", "é"])
def test_an_id_that_is_none_is_not_found(call: Call, prediction_id: str) -> None:
    problem = problem_of(read(call, prediction_id), 404)
    assert len(problem["detail"]) < 200


# -- what callers are shown -----------------------------------------------------------------------------------

# The properties of `schemas_prediction_response` that an answer can have without a webhook or deployment, and ours:
# https://api.replicate.com/openapi.json
KEYS = {
    "id", "model", "version", "input", "output", "logs", "error", "status", "created_at", "started_at", "completed_at",
    "metrics", "data_removed", "source", "deadline", "urls",
}  # fmt: skip
WHILE_SET = {"output", "started_at", "completed_at", "metrics"}
"""The keys of Replicate's responses that an open prediction without such a value does not have."""
OURS = {"output_files", "origin"}


@pytest.fixture
def presenter(cloud: None) -> Presenter:
    return Presenter(OutputsBucket("outputs"), 3600)


def whole(
    status: str = "succeeded", *, files: Any = (), output: Any = None, logs: str | None = None, **changes: Any
) -> PredictionDetail:
    """A prediction as the table has it."""
    ranks = {"queued": 0, "starting": 1, "processing": 2}
    prediction = Prediction(
        id="a" * 26, owner="alice", created_at="2025-06-15T15:06:40.000000Z", created=1_750_000_000, fingerprint="f",
        source="http", keyed=False, kind="version", rank=ranks.get(status, 9), status=status, visible=visible(status),
        deadline=1_750_086_400, execution_n=1, expires_at=1_752_678_400, name="stability-ai/sdxl", version=VERSION,
    )  # fmt: skip
    return PredictionDetail(replace(prediction, **changes), {"prompt": "a red fox"}, output, logs, files)


FILE = "https://replicate.delivery/xezq/abc/out-0.png"
STORED = StoredFile("/0", 0, "alice/a/u/0", 1234, "ab" * 32, "image/png")
LOST = StoredFile("/1", 1, error="the file host answered 404: the file is gone")


@pytest.mark.parametrize("status", [status.value for status in Status])
def test_every_key_is_there_in_every_status_but_what_an_open_prediction_does_not_have_yet(
    presenter: Presenter, status: str
) -> None:
    is_open = status in ("queued", "starting", "processing")
    for shown in (presenter.show(whole(status)), presenter.show(whole(status), as_starting=True)):
        assert shown.keys() == (KEYS - WHILE_SET if is_open else KEYS | {"cost"}) | OURS
        assert [shown.get(name) for name in ("output", "started_at", "completed_at")] == [None, None, None]
        assert shown.get("metrics") == (None if is_open else {})
        assert shown["status"] in {"starting", "processing", "succeeded", "failed", "canceled"}
        assert shown["urls"] == {
            "get": f"{API_URL}/predictions/{'a' * 26}",
            "cancel": f"{API_URL}/predictions/{'a' * 26}/cancel",
            "web": f"{API_URL}/predictions/{'a' * 26}",
        }
        assert (shown["model"], shown["version"]) == ("stability-ai/sdxl", VERSION)
        assert (shown["logs"], shown["error"], shown["data_removed"]) == ("", None, False)
        assert shown["deadline"] == "2025-06-16T15:06:40Z"
        assert shown["output_files"] == []


@pytest.mark.parametrize(
    ("status", "seen", "after_create"),
    [
        ("queued", "starting", "starting"),
        ("starting", "starting", "starting"),
        ("processing", "processing", "starting"),
        ("succeeded", "succeeded", "succeeded"),
        ("failed", "failed", "failed"),
        ("canceled", "canceled", "canceled"),
        ("aborted", "canceled", "canceled"),
    ],
)
def test_a_status_is_shown_in_words_that_clients_know(
    presenter: Presenter, status: str, seen: str, after_create: str
) -> None:
    assert presenter.show(whole(status))["status"] == seen
    assert presenter.show(whole(status), as_starting=True)["status"] == after_create


def test_a_create_that_has_output_but_no_end_shows_none(presenter: Presenter) -> None:
    running = whole("processing", output=["a ", "red "], logs="1%")
    assert presenter.show(running)["output"] == ["a ", "red "]
    assert "output" not in presenter.show(running, as_starting=True)


@pytest.mark.parametrize("output", ["", 0, False, [], {}])
def test_a_value_that_is_empty_is_no_missing_output(presenter: Presenter, output: Any) -> None:
    told = {"started_at": "2025-06-15T15:06:41Z", "metrics_json": '{"predict_time": 1}', "completed_at": "x"}
    shown = presenter.show(whole("processing", output=output, **told))
    assert (shown["output"], shown["started_at"]) == (output, "2025-06-15T15:06:41Z")
    assert WHILE_SET - shown.keys() == {"completed_at", "metrics"}


def test_what_only_the_end_has_is_not_shown_before(presenter: Presenter) -> None:
    told = {"error": "bad", "completed_at": "2025-06-15T15:06:41Z", "metrics_json": '{"predict_time": 1}'}
    copying = presenter.show(whole("failed", visible="processing", output=[FILE], **told))
    assert (copying["status"], copying["error"]) == ("processing", None)
    assert not WHILE_SET & copying.keys()
    ended = presenter.show(whole("failed", **told))
    assert (ended["error"], ended["completed_at"]) == ("bad", "2025-06-15T15:06:41Z")
    assert ended["metrics"] == {"predict_time": 1}


def test_files_are_links_to_our_bucket(presenter: Presenter) -> None:
    shown = presenter.show(whole(output=[FILE], files=[STORED]))
    [link] = shown["output"]
    query = parse_qs(urlsplit(link).query)
    assert "/alice/a/u/0" in link
    assert "outputs" in link
    assert query["X-Amz-Expires"] == ["3600"]
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    assert shown["output_files"] == [
        {
            "path": "/0",
            "bucket": "outputs",
            "key": "alice/a/u/0",
            "bytes": 1234,
            "sha256": "ab" * 32,
            "content_type": "image/png",
        }
    ]
    assert shown["error"] is None


def test_a_file_that_could_not_be_stored_is_told_and_not_linked(presenter: Presenter) -> None:
    shown = presenter.show(whole(output=[FILE, FILE], files=[STORED, LOST]))
    assert shown["status"] == "succeeded"
    assert shown["output"][1] is None
    assert "replicate.delivery" not in json.dumps(shown)
    assert "1 of 2 output files could not be stored" in shown["error"]
    assert "output/1: the file host answered 404" in shown["error"]
    assert shown["output_files"][1] == {"path": "/1", "error": LOST.error}


def test_the_models_own_error_goes_before_that_of_a_lost_file(presenter: Presenter) -> None:
    shown = presenter.show(whole("failed", error="out of memory", output=[FILE, FILE], files=[STORED, LOST]))
    assert shown["error"] == "out of memory"
    assert shown["output_files"][1]["error"] == LOST.error


@pytest.mark.parametrize("output", [FILE, [FILE], {"image": FILE}, [[{"a": FILE}]], "data:image/png;base64,aGk="])
@pytest.mark.parametrize("status", ["processing", "succeeded", "failed"])
def test_a_url_that_is_not_ours_is_never_shown(presenter: Presenter, status: str, output: Any) -> None:
    told = whole(status, output=output)
    for shown in (presenter.show(told), presenter.show(told, as_starting=True)):
        assert "replicate.delivery" not in json.dumps(shown)
        assert "data:" not in json.dumps(shown.get("output"))


@pytest.mark.parametrize("output", ["", 0, False, [], {}, "https://example.com/x.png", {"a": [1, None]}])
def test_an_output_without_files_is_shown_as_it_is(presenter: Presenter, output: Any) -> None:
    assert presenter.show(whole(output=output))["output"] == output


def test_of_long_logs_the_end_is_shown(presenter: Presenter) -> None:
    logs = presenter.show(whole(logs="x" * 1_000_000 + "the end"))["logs"]
    assert len(logs) == 256 * 1024
    assert logs.endswith("the end")


def test_what_the_caller_gave_is_shown_again(presenter: Presenter) -> None:
    given: dict[str, Any] = {
        "webhook": "https://example.com/hook",
        "webhook_events_filter": ("completed",),
        "deployment": "acme/fox",
    }
    shown = presenter.show(whole(stream_url="https://stream.replicate.com/v1/files/x", **given))
    assert (shown["webhook"], shown["webhook_events_filter"]) == ("https://example.com/hook", ["completed"])
    assert shown["deployment"] == "acme/fox"
    assert shown["urls"]["stream"] == "https://stream.replicate.com/v1/files/x"


@pytest.mark.parametrize(
    ("changes", "model", "version"),
    [
        ({"version": None, "kind": "model", "name": "meta/llama"}, "meta/llama", "hidden"),
        ({"name": None}, "", VERSION),
        ({"model": "real/name", "upstream_version": "0" * 64}, "real/name", "0" * 64),
    ],
)
def test_model_and_version_are_always_texts(presenter: Presenter, changes: Any, model: str, version: str) -> None:
    shown = presenter.show(whole(**changes))
    assert (shown["model"], shown["version"]) == (model, version)


# -- whole calls ----------------------------------------------------------------------------------------------


def test_a_create_is_answered_201_with_the_prediction(call: Call, replicate: ReplicateInMemory) -> None:
    answered = start(call)
    shown = answered["body"]
    assert answered["statusCode"] == 201
    assert header(answered, "Content-Type") == "application/json"
    assert header(answered, "Location") == shown["urls"]["get"] == f"{API_URL}/predictions/{shown['id']}"
    assert header(answered, "Preference-Applied") is None
    assert (shown["status"], shown["input"]) == ("starting", BODY["input"])
    assert not WHILE_SET & shown.keys()
    assert len(replicate.creates) == 1
    assert read(call, shown["id"])["body"] == shown


def test_an_aborted_prediction_is_shown_canceled(
    call: Call, replicate: ReplicateInMemory, submissions: Submissions
) -> None:
    prediction_id = start(call)["body"]["id"]
    [upstream_id] = replicate.predictions
    replicate.finish(upstream_id, "aborted")
    submissions.poll(prediction_id)
    shown = read(call, prediction_id)["body"]
    assert (shown["status"], shown["upstream_status"]) == ("canceled", "aborted")
    [shown] = call("read_predictions", "list")["body"]["results"]
    assert (shown["status"], shown["upstream_status"]) == ("canceled", "aborted")


def test_a_wait_ends_with_the_prediction(call: Call, replicate: ReplicateInMemory) -> None:
    def accept_ended(request: Any, replicate: ReplicateInMemory) -> Any:
        told = replicate.accept(request, status="succeeded", output="A fox.", metrics={"predict_time": 0.1})
        return httpx.Response(201, json=told)

    replicate.faults = [accept_ended]
    answered = start(call, headers={"Prefer": "wait=10"})
    assert header(answered, "Preference-Applied") == "wait=10"
    assert (answered["body"]["status"], answered["body"]["output"]) == ("succeeded", "A fox.")


@pytest.mark.parametrize(
    ("function", "case", "scopes"),
    [
        ("start_prediction", "version", "read train manage"),
        ("start_prediction", "model_route", "read train manage"),
        ("start_prediction", "deployment_route", "read train manage"),
        ("read_prediction", "one", "predict train manage"),
        ("read_predictions", "list", "predict train manage"),
        ("cancel_prediction", "open", "read train manage"),
        ("start_prediction", "training", "predict read"),
        ("cancel_prediction", "refused_training", "read"),
        ("give_secret", "secret", "read train manage"),
    ],
)
def test_every_route_asks_for_its_own_scope(call: Call, function: str, case: str, scopes: str) -> None:
    context = sample(function, case)["requestContext"]
    problem_of(
        call(function, case, requestContext={**context, "authorizer": {"owner": "alice", "scopes": scopes}}), 403
    )


def test_a_wait_that_ends_early_is_answered_starting(call: Call, replicate: ReplicateInMemory) -> None:
    def accept_running(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
        return httpx.Response(201, json=replicate.accept(request, status="processing", output=["a "]))

    replicate.faults = [accept_running]
    answered = start(call, headers={"Prefer": "wait"})
    assert answered["statusCode"] == 201
    assert header(answered, "Preference-Applied") == "wait=25"
    assert (answered["body"]["status"], answered["body"]["upstream_status"]) == ("starting", "processing")
    assert "output" not in answered["body"]
    shown = read(call, answered["body"]["id"])["body"]
    assert (shown["status"], shown["output"]) == ("processing", ["a "])


def test_the_same_key_is_answered_with_the_same_prediction(call: Call, replicate: ReplicateInMemory) -> None:
    answers = [start(call, headers={"Idempotency-Key": "k-1"}) for _ in range(3)]
    assert {answered["statusCode"] for answered in answers} == {201}
    assert len({answered["body"]["id"] for answered in answers}) == 1
    assert len(replicate.creates) == 1


def test_the_same_key_for_another_request_is_a_problem(call: Call, replicate: ReplicateInMemory) -> None:
    start(call, headers={"Idempotency-Key": "k-1"})
    problem = problem_of(start(call, {**BODY, "input": {}}, headers={"Idempotency-Key": "k-1"}), 422)
    assert [f["field"] for f in problem["invalid_fields"]] == ["Idempotency-Key"]
    assert len(replicate.creates) == 1


@pytest.mark.parametrize("count", ["", "x", "-1", "1.5", "0x1", "9" * 400])
def test_a_strange_retry_count_is_no_retry(call: Call, replicate: ReplicateInMemory, count: str) -> None:
    for _ in range(2):
        assert start(call, headers={"X-Stainless-Retry-Count": count})["statusCode"] == 201
    assert len(replicate.creates) == 2


def test_a_cancel_is_answered_with_the_prediction(call: Call, replicate: ReplicateInMemory) -> None:
    prediction_id = start(call)["body"]["id"]
    for _ in range(2):
        answered = call("cancel_prediction", "open", path=f"/predictions/{prediction_id}/cancel")
        assert (answered["statusCode"], answered["body"]["status"]) == (200, "canceled")
    assert len(replicate.canceled) == 1


def pages(call: Call, link: str, url: str | None) -> Iterator[dict[str, Any]]:
    """A page and those that it links to."""
    while url is not None:
        assert url.startswith(f"{API_URL}/predictions")
        cursors = parse_qs(urlsplit(url).query).get("cursor")
        query = {"cursor": cursors[0]} if cursors else None
        page = call("read_predictions", "list", queryStringParameters=query)
        assert page["statusCode"] == 200
        yield page["body"]
        url = page["body"][link]


def test_a_list_links_to_its_neighbours_until_the_ends(call: Call, table: PredictionsTable, clock: Clock) -> None:
    made = []
    for n in range(205):
        clock.advance(1)
        made.append(put(table, n, clock.now()))
    forward = list(pages(call, "next", f"{API_URL}/predictions"))
    assert [len(page["results"]) for page in forward] == [100, 100, 5]
    assert [p["id"] for page in forward for p in page["results"]] == made[::-1]
    assert forward[0]["previous"] is None
    back = list(pages(call, "previous", forward[-1]["previous"]))
    assert [p["id"] for p in back[0]["results"]] == made[104:4:-1]
    assert [p["id"] for page in back[::-1] for p in page["results"]] == made[:4:-1]
    assert all(page.keys() == {"previous", "next", "results"} for page in forward + back)


def put(table: PredictionsTable, n: int, now: float) -> str:
    """An intent of alice's, without anything that follows."""
    body = json.dumps({**BODY, "input": {"n": n}}).encode()
    intent = create_intent(body, {}, owner="alice", reference=None, allow_loopback_webhooks=False)
    table.put_intent(
        intent,
        version=VERSION,
        deadline=int(now) + 60,
        expires=int(now) + 3600,
        claim=False,
        execution_arn="arn",
        now=now,
    )
    return intent.id


def test_a_cursor_of_another_owner_shows_only_ones_own(call: Call, table: PredictionsTable, clock: Clock) -> None:
    for n in range(101):
        clock.advance(1)
        put(table, n, clock.now())
    following = call("read_predictions", "list")["body"]["next"]
    cursor = parse_qs(urlsplit(following).query)["cursor"][0]
    page = call("read_predictions", "list", queryStringParameters={"cursor": cursor}, owner="bob")
    assert page["body"]["results"] == []


# -- Replicate's limit ----------------------------------------------------------------------------------------

LIMITS = {"RateLimit-Limit": "600", "RateLimit-Remaining": "0", "RateLimit-Reset": "1", "X-Other": "x"}


def limits_of(answered: dict[str, Any]) -> dict[str, str]:
    """The headers of an answer that tell a limit, and any that must not be there."""
    names = ("ratelimit-limit", "ratelimit-remaining", "ratelimit-reset", "X-Other")
    return {name: found for name in names if (found := header(answered, name)) is not None}


@pytest.mark.parametrize("headers", [{}, {"Prefer": "wait=1"}])
@pytest.mark.parametrize("status", [201, 429])
def test_what_replicate_says_of_its_limit_is_told_to_the_caller(
    call: Call, replicate: ReplicateInMemory, headers: dict[str, str], status: int
) -> None:
    def limited(request: httpx.Request, there: ReplicateInMemory) -> httpx.Response:
        body = there.accept(request, status="succeeded") if status == 201 else {"detail": "Resets in ~30s."}
        return httpx.Response(status, json=body, headers=LIMITS)

    replicate.faults = [limited]
    answered = start(call, headers=headers)
    # One that is throttled is submitted later by itself: its caller sees why nothing moves yet.
    assert answered["statusCode"] == 201
    assert limits_of(answered) == {"ratelimit-limit": "600", "ratelimit-remaining": "0", "ratelimit-reset": "1"}
    assert limits_of(start(call)) == {}, "the next one is told nothing of this one's"


@pytest.mark.parametrize("value", ["", " ", "x" * 101, "\u00e9", "1\x7f", "1\x00"], ids=ascii)
def test_limit_that_no_header_of_ours_may_have_is_left_out(
    call: Call, replicate: ReplicateInMemory, value: str
) -> None:
    headers = [(b"ratelimit-remaining", value.encode("latin-1")), (b"ratelimit-reset", b"1")]
    replicate.faults = [lambda request, there: httpx.Response(201, json=there.accept(request), headers=headers)]
    assert limits_of(start(call)) == {"ratelimit-reset": "1"}


# -- filters of the list --------------------------------------------------------------------------------------


def listed(call: Call, **query: str) -> dict[str, Any]:
    return call("read_predictions", "list", queryStringParameters=query)


@pytest.mark.parametrize("name", ["created_after", "created_before"])
@pytest.mark.parametrize(
    "value",
    [
        "", "x", "2025", "2025-01", "2025-W01-1", "20250101", "1750000000", "2025-02-30", "2025-01-01T25:00:00Z",
        "2025-01-01T00:00:00 00:00", "2025-01-01T00:00:00Z ", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59",
        "\uff12\uff10\uff12\uff15-01-01", "2025-01-01T00:00:00+99:00", "2025-01-01T00:00:00." + "0" * 10 + "Z",
    ],
    ids=ascii,
)  # fmt: skip
def test_a_moment_that_is_none_is_a_problem_that_names_it(call: Call, name: str, value: str) -> None:
    calls = AwsCalls()
    problem = problem_of(listed(call, **{name: value, "source": "web"}), 422)
    assert [each["field"] for each in problem["invalid_fields"]] == [name]
    assert calls.made == []


@pytest.mark.parametrize("value", ["", "WEB", "api,web", "x" * 1000])
def test_a_source_that_is_none_is_a_problem_that_names_it(call: Call, value: str) -> None:
    problem = problem_of(listed(call, source=value), 422)
    assert [each["field"] for each in problem["invalid_fields"]] == ["source"]


def test_nothing_was_made_on_the_web_and_all_by_the_api(call: Call, table: PredictionsTable, clock: Clock) -> None:
    made = put(table, 1, clock.now())
    calls = AwsCalls()
    assert listed(call, source="web")["body"] == {"previous": None, "next": None, "results": []}
    assert "dynamodb.Query" not in calls.made
    assert [each["id"] for each in listed(call, source="api")["body"]["results"]] == [made]


def at(seconds: float) -> str:
    return datetime.fromtimestamp(1_750_000_000 + seconds, UTC).isoformat()


@pytest.mark.parametrize(
    ("query", "seconds"),
    [
        ({"created_after": at(2)}, [4, 3, 2]),
        ({"created_after": at(1.000001)}, [4, 3, 2]),
        ({"created_before": at(2)}, [1, 0]),
        ({"created_before": at(2.000001)}, [2, 1, 0]),
        ({"created_after": at(1), "created_before": at(3)}, [2, 1]),
        ({"created_after": at(3), "created_before": at(1)}, []),
        ({"created_after": at(2), "created_before": at(2)}, []),
        ({"created_after": "2025-06-15t17:06:42+02:00"}, [4, 3, 2]),
        ({"created_after": "2025-06-15T15:06:42"}, [4, 3, 2]),
        ({"created_after": "2025-06-15 15:06:42.000000000z"}, [4, 3, 2]),
        ({"created_after": "2025-06-15"}, [4, 3, 2, 1, 0]),
        ({"created_before": "2025-06-15"}, []),
        ({"created_after": "0001-01-01", "created_before": "9999-12-31T23:59:59Z"}, [4, 3, 2, 1, 0]),
    ],
    ids=str,
)
def test_list_begins_at_a_moment_and_ends_before_another(
    call: Call, table: PredictionsTable, clock: Clock, query: dict[str, str], seconds: list[int]
) -> None:
    made = {}
    for n in range(5):
        made[put(table, n, clock.now())] = n
        clock.advance(1)
    page = listed(call, **query)
    assert page["statusCode"] == 200
    assert [made[each["id"]] for each in page["body"]["results"]] == seconds
    assert listed(call, **query, cursor="bzIwMjU")["statusCode"] == 422


def test_pages_of_a_filtered_list_keep_its_filters(call: Call, table: PredictionsTable, clock: Clock) -> None:
    made = []
    for n in range(6):
        made.append(put(table, n, clock.now()))
        clock.advance(1)
    listed(call)  # loads the module
    query = {"created_after": at(1), "created_before": at(5), "source": "api"}
    with pytest.MonkeyPatch.context() as small:
        small.setattr("functions.read_predictions.app.PAGE_SIZE", 3)
        first = listed(call, **query)["body"]
        onward = parse_qs(urlsplit(first["next"]).query)
        assert {name: onward[name] for name in query} == {name: [value] for name, value in query.items()}
        second = listed(call, **{name: value for name, (value,) in onward.items()})["body"]
        back = parse_qs(urlsplit(second["previous"]).query)
        third = listed(call, **{name: value for name, (value,) in back.items()})["body"]
        beyond = listed(call, **{name: value for name, (value,) in onward.items()} | {"created_after": at(3)})["body"]
    assert [each["id"] for each in first["results"]] == [made[4], made[3], made[2]]
    assert ([each["id"] for each in second["results"]], second["next"]) == ([made[1]], None)
    assert ([each["id"] for each in third["results"]], third["previous"]) == ([made[4], made[3], made[2]], None)
    assert (beyond["results"], beyond["next"]) == ([], None)


def test_list_of_trainings_has_no_filters(call: Call) -> None:
    answered = call("read_predictions", "trainings", queryStringParameters={"created_after": "x", "source": "x"})
    assert answered["statusCode"] == 200


# -- answers that Lambda can carry ----------------------------------------------------------------------------

LAMBDA_ANSWER_BYTES = 6_291_556
"""Of the whole answer, the body a string in it: https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html"""


def lambda_bytes(answered: dict[str, Any]) -> int:
    return len(json.dumps({**answered, "body": json.dumps(answered["body"], separators=(",", ":"))}))


def bucket_has(link: str) -> Any:
    """The document that a presigned link leads to."""
    key = urlsplit(link).path.lstrip("/").removeprefix("outputs/")
    return json.loads(clients.client("s3").get_object(Bucket="outputs", Key=key)["Body"].read())


@pytest.mark.parametrize("prompt", ["\u4f60" * 1_600_000, '"' * 2_400_000], ids=["three bytes each", "escaped twice"])
def test_a_large_input_is_linked(call: Call, replicate: ReplicateInMemory, prompt: str) -> None:
    answered = start(call, json.dumps({**BODY, "input": {"prompt": prompt}}, ensure_ascii=False))
    assert answered["statusCode"] == 201
    for one in (answered, read(call, answered["body"]["id"])):
        assert lambda_bytes(one) <= LAMBDA_ANSWER_BYTES
        assert bucket_has(one["body"]["input"]["url"]) == {"prompt": prompt}
    assert len(replicate.creates) == 1


def test_an_input_that_an_answer_carries_is_shown_though_it_is_an_object(call: Call) -> None:
    answered = start(call, {**BODY, "input": {"prompt": "x" * 200_000}})
    assert answered["body"]["input"] == {"prompt": "x" * 200_000}


def test_a_large_output_is_linked_at_the_end(
    call: Call, replicate: ReplicateInMemory, submissions: Submissions
) -> None:
    prediction_id = start(call)["body"]["id"]
    replicate.finish(next(iter(replicate.predictions)), output="y" * 7_000_000, logs="done")
    submissions.poll(prediction_id)
    [listed] = call("read_predictions", "list")["body"]["results"]
    answered = read(call, prediction_id)
    assert lambda_bytes(answered) <= LAMBDA_ANSWER_BYTES
    for shown in (answered["body"], listed):
        assert (shown["status"], shown["error"], shown["output_files"]) == ("succeeded", None, [])
        assert bucket_has(shown["output"]) == {"output": "y" * 7_000_000, "logs": "done"}


def test_a_large_output_with_files_is_null_and_says_why(
    call: Call, replicate: ReplicateInMemory, submissions: Submissions, table: PredictionsTable, clock: Clock
) -> None:
    prediction_id = start(call)["body"]["id"]
    replicate.finish(next(iter(replicate.predictions)), output=[FILE, "y" * 7_000_000])
    submissions.poll(prediction_id)
    copying = read(call, prediction_id)
    ended = table.get(prediction_id)
    assert ended is not None
    table.end_copy(ended, [STORED], clock.now())
    answered = read(call, prediction_id)
    assert lambda_bytes(answered) <= LAMBDA_ANSWER_BYTES
    assert "replicate.delivery" not in json.dumps([copying, answered])
    assert (copying["body"]["status"], copying["body"].get("output", "left out")) == ("processing", "left out")
    assert (answered["body"]["status"], answered["body"]["output"]) == ("succeeded", None)
    assert "too large" in answered["body"]["error"]


def test_a_large_input_shows_no_result_before_its_files_are_stored(
    call: Call, replicate: ReplicateInMemory, submissions: Submissions
) -> None:
    prediction_id = start(call, {**BODY, "input": {"prompt": '"' * 2_400_000}})["body"]["id"]
    replicate.finish(next(iter(replicate.predictions)), output=[FILE, "y" * 200_000])
    submissions.poll(prediction_id)
    shown = read(call, prediction_id)["body"]
    assert (shown["status"], shown.get("output", "left out")) == ("processing", "left out")


@pytest.mark.slow
def test_a_page_is_cut_by_the_size_of_what_is_shown_in_both_directions(
    call: Call, table: PredictionsTable, clock: Clock
) -> None:
    # What callers are shown is many times as large as what the table holds: a file's link carries a signature.
    made = [with_many_files(table, n, clock) for n in range(15)]
    forward = list(pages(call, "next", f"{API_URL}/predictions"))
    back = list(pages(call, "previous", forward[-1]["previous"]))[::-1]
    assert [p["id"] for page in forward for p in page["results"]] == made[::-1]
    assert [p["id"] for page in [*back, forward[-1]] for p in page["results"]] == made[::-1]
    for page in forward + back:
        assert page["results"]
        assert lambda_bytes({"body": page}) <= LAMBDA_ANSWER_BYTES - 10_000
    assert 1 < len(forward) < 15


def with_many_files(table: PredictionsTable, n: int, clock: Clock) -> str:
    """A prediction of alice's that ended with a thousand files."""
    clock.advance(1)
    prediction_id = put(table, n, clock.now())
    output = [f"https://replicate.delivery/xezq/abc/{i}.png" for i in range(1000)]
    told = UpstreamPrediction.parse({"id": f"{n:026}", "status": "succeeded", "output": output})
    ended = table.merge(prediction_id, told, clock.now()).prediction
    assert ended is not None
    files = [StoredFile(f"/{i}", i, f"alice/{prediction_id}/{i}", 10, "0" * 64, "image/png") for i in range(1000)]
    table.end_copy(ended, files, clock.now())
    return prediction_id


# -- browsers and names --------------------------------------------------------------------------------------


@pytest.fixture
def from_a_page(cloud: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A function's answer to a page of some origin, deployed with another `CorsOrigin`."""

    def call(allowed: str, origin: str, case: str = "list", **changes: Any) -> dict[str, Any]:
        monkeypatch.setenv("CORS_ORIGIN", allowed)
        function = "read_predictions" if case == "list" else "read_prediction"
        event = sample(function, case) | changes
        event["headers"] |= {"Origin": origin}
        event["multiValueHeaders"] |= {"Origin": [origin]}
        answer: dict[str, Any] = load_app(function, monkeypatch).handler(event, Context())
        return answer

    return call


@pytest.mark.parametrize(
    ("allowed", "origin", "told"),
    [
        ("", "https://app.example.com", None),
        ("https://app.example.com", "https://evil.example.com", None),
        ("https://app.example.com", "https://app.example.com.evil.example", None),
        ("https://app.example.com", "https://app.example.com", "https://app.example.com"),
        ("*", "https://anything.example", "*"),
    ],
)
@pytest.mark.parametrize(("case", "status"), [("list", 200), ("refused_unknown", 404), ("refused_without_scope", 403)])
def test_only_pages_of_the_allowed_origin_may_read_an_answer(
    from_a_page: Call, allowed: str, origin: str, told: str | None, case: str, status: int
) -> None:
    answer = from_a_page(allowed, origin, case)
    assert (answer["statusCode"], header(answer, "Access-Control-Allow-Origin")) == (status, told)
    assert header(answer, "Access-Control-Allow-Credentials") is None


def test_an_error_of_our_own_can_be_read_by_the_allowed_page(from_a_page: Call) -> None:
    AwsCalls().fail(EndpointConnectionError(endpoint_url="https://dynamodb"))
    answer = from_a_page("https://app.example.com", "https://app.example.com")
    told = (answer["statusCode"], header(answer, "Access-Control-Allow-Origin"))
    assert told == (503, "https://app.example.com")


def test_the_base_path_of_a_domain_name_is_not_part_of_the_route(from_a_page: Call) -> None:
    assert from_a_page("", "https://app.example.com", path="/v1/predictions")["statusCode"] == 200
    assert from_a_page("", "https://app.example.com", path="/v1/v1/predictions")["statusCode"] == 404


def test_labels_in_several_headers_are_those_of_the_request(call: Call) -> None:
    answer = start(call, headers={"X-Labels": "b=2"}, multiValueHeaders={"X-Labels": ["a=1", "b=2"]})
    assert (answer["statusCode"], answer["body"]["labels"]) == (201, {"a": "1", "b": "2"})
    twice = start(call, headers={"X-Labels": "a=2"}, multiValueHeaders={"X-Labels": ["a=1", "a=2"]})
    assert problem_of(twice, 422)["invalid_fields"][0]["field"] == "X-Labels"
