"""The API's own document, as the deployed stack gives it, and the deployed stack, as the document has it."""

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from local.cloud import LocalCloud
from local.replicate.catalog import models
from local.replicate.process import LocalReplicate
from tests.support.described import Operation, operations
from tests.support.described import document as described

Api = Callable[..., httpx.Client]
Answer = tuple[int, str, bytes]
"""Status, media type and body."""

SCHEMATHESIS = str(Path(sys.executable).with_name("schemathesis"))
PAINTER = models["local/painter"]
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,response_headers_conformance"
)


@dataclass(frozen=True)
class Report:
    """What Schemathesis found.

    Attributes:
        found: The operations, `GET /account`, with each kind of failure: `{"Server error": …}`.
        operations: How many it called.
        cases: How many calls it made of them.
        text: What it printed.
    """

    found: dict[str, set[str]]
    operations: int
    cases: int
    text: str


@pytest.fixture
def document(api: Api) -> dict[str, Any]:
    answer = api("alice").get("/openapi.json")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    found: dict[str, Any] = answer.json()
    return found


@pytest.fixture
def compare(api: Api, cloud: LocalCloud, replicate: LocalReplicate, tmp_path: Path) -> Callable[..., Report]:
    """Checks the deployed stack's answers with a document."""
    header = f"Authorization: {api('mallory').headers['Authorization']}"

    def compare(document: dict[str, Any], *options: str, known: str = "") -> Report:
        return check(tmp_path, document, cloud.stack.api_url, "--header", header, *options, known=known)

    return compare


def check(folder: Path, document: dict[str, Any], url: str, *options: str, known: str = "") -> Report:
    """Calls an API in every way that a document allows, and in ways that it does not, and checks the answers.

    Args:
        folder: For files of this one run.
        document: The document.
        url: Of the API.
        options: Further ones of Schemathesis.
        known: Its configuration, with values of parameters that are there.
    """
    (folder / "openapi.json").write_text(json.dumps(document))
    (folder / "schemathesis.toml").write_text(known)
    command = [
        SCHEMATHESIS, "--config-file", "schemathesis.toml", "run", "openapi.json", "--url", url,
        "--checks", CHECKS, "--generation-deterministic", "--max-examples", "6", "--continue-on-failure",
        "--request-timeout", "40", "--no-color", "--report", "json", "--report-json-path", "report.json", *options,
    ]  # fmt: skip
    done = subprocess.run(  # noqa: S603  # the arguments are ours
        command,
        cwd=folder,
        env={**os.environ, "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    told = json.loads((folder / "report.json").read_text())
    assert (told["complete"], told["operations"]["errored"], told["test_cases"]["errored"]) == (True, 0, 0), done.stdout
    found = {failure["title"]: set(failure["operations"]) for failure in told["failures"]}
    assert (done.returncode == 1) == bool(found)
    return Report(found, told["operations"]["tested"], told["test_cases"]["generated"], done.stdout)


def test_stage_is_exported_with_the_name_of_each_operation(cloud: LocalCloud, document: dict[str, Any]) -> None:
    # As an MCP gateway reads it: https://docs.aws.amazon.com/apigateway/latest/developerguide/mcp-server.html
    gateway = cloud.client("apigateway")
    export = gateway.get_export(restApiId=cloud.resources["Api"], stageName="v1", exportType="oas30")
    names = {
        operation.get("operationId")
        for operations in json.loads(export["body"].read())["paths"].values()
        for method, operation in operations.items()
        if method != "options"
    }
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert names == {each["operationId"].replace(".", "_") for each in operations if "operationId" in each}


def test_document_needs_a_token(cloud: LocalCloud) -> None:
    assert httpx.get(f"{cloud.stack.api_url}/openapi.json", trust_env=False, timeout=60).status_code == 401


def test_document_describes_this_stack(cloud: LocalCloud, document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()
    assert document == {**described(), "servers": [{"url": cloud.stack.api_url}]}


# -- that the checks find what they are for, in an API that is not ours -----------------------------------------------


def problem(status: int) -> Answer:
    """A problem such as ours."""
    body = {"title": "Refused", "detail": "Because.", "status": status}
    return status, "application/problem+json", json.dumps(body).encode()


def unfit(operation: Operation) -> Answer:
    """A success whose body is of no operation's schema."""
    return operation.status, operation.media_type, b"7"


SERVER_ERROR, OTHER_STATUS = "Server error", "Undocumented status code"
OTHER_TYPE, OTHER_BODY = "Undocumented Content-Type", "Response violates schema"
ANSWERS: dict[str, tuple[Callable[[Operation], Answer], set[str]]] = {
    "described": (lambda _: problem(400), set()),
    "error-500": (lambda _: problem(500), {SERVER_ERROR, OTHER_STATUS}),
    "described-503": (lambda _: problem(503), {SERVER_ERROR}),
    "status-418": (lambda _: problem(418), {OTHER_STATUS}),
    "success-206": (lambda _: (206, "application/json", b"{}"), {OTHER_STATUS}),
    "other-body": (unfit, {OTHER_BODY}),
    "empty-problem": (lambda _: (400, "application/problem+json", b"{}"), {OTHER_BODY}),
    "page": (lambda _: (400, "text/html", b"<h1>No</h1>"), {OTHER_TYPE}),
}
"""What an API may answer, and what is to be found in it."""


@pytest.fixture
def answering_url() -> Iterator[str]:
    """The URL of an API whose path begins with what it is to answer: `/status-418/account.get/…`."""
    by_id = {each.id: each for each in operations()}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", "0")))
            _, kind, name, *_ = self.path.split("/")
            status, media_type, body = ANSWERS[kind][0](by_id[name])
            self.send_response(status)
            self.send_header("Content-Type", media_type)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815  # http.server's names

        def log_message(self, *_: object) -> None:
            """Nothing: the report has every call."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_checks_find_in_every_operation_what_the_document_does_not_allow(answering_url: str, tmp_path: Path) -> None:
    document = {**described(), "servers": [{"url": answering_url}]}
    # All operations once for each answer, so that one run sees all of them.
    document["paths"] = {
        f"/{kind}/{each.id}{each.path}": {
            method: {**operation, "operationId": f"{kind}.{each.id}"}
            for method, operation in document["paths"][each.path].items()
            if method == each.method.lower()
        }
        for kind in ANSWERS
        for each in operations()
    }
    report = check(tmp_path, document, answering_url, "--phases", "fuzzing", "--max-examples", "1", "--no-shrink")
    assert report.operations == len(ANSWERS) * len(operations())
    for kind, (_, findings) in ANSWERS.items():
        # A body that is no JSON, or that no client reads, has no schema that it could violate.
        checked = [
            each
            for each in operations()
            if kind != "other-body" or (each.content and each.media_type == "application/json")
        ]
        of_kind = {f"{each.method} /{kind}/{each.id}{each.path}" for each in checked}
        for finding in (SERVER_ERROR, OTHER_STATUS, OTHER_TYPE, OTHER_BODY):
            found = {name for name in report.found[finding] if name.split("/")[1] == kind}
            # A response to HEAD has no body that could be another one.
            seen = {name for name in of_kind if finding != OTHER_BODY or not name.startswith("HEAD ")}
            assert found == (seen if finding in findings else set()), (kind, finding)


def test_checks_find_an_answer_of_the_stack_that_is_not_of_its_schema(
    document: dict[str, Any], compare: Callable[..., Report]
) -> None:
    document["components"]["schemas"]["PredictionPage"]["properties"]["results"]["type"] = "string"
    report = compare(document, "--phases", "fuzzing", "--include-path", "/predictions", "--include-method", "GET")
    assert report.found == {"Response violates schema": {"GET /predictions"}}


# -- the deployed stack -----------------------------------------------------------------------------------------------


def test_every_operation_answers_whatever_comes_as_the_document_says(
    document: dict[str, Any], compare: Callable[..., Report]
) -> None:
    report = compare(document, "--phases", "examples,coverage,fuzzing")
    assert report.found == {}, report.text[-8000:]
    assert report.operations == len(operations())
    assert report.cases > 10 * len(operations())


VALID = json.dumps({"version": "local/painter", "input": {"prompt": "a red fox"}}).encode()
FORM = b'--x\r\nContent-Disposition: form-data; name="content"; filename="fox.txt"\r\n\r\na red fox\r\n--x--\r\n'
JSON_TYPE = {"Content-Type": "application/json"}
FORM_TYPE = {"Content-Type": "multipart/form-data; boundary=x"}
_TOO_LARGE = {400, 413, 415}  # 413 where less is taken than of other bodies
BROKEN_BODIES: dict[str, tuple[bytes, dict[str, str], set[int]]] = {
    "100,000 lists": (b"[" * 100_000 + b"]" * 100_000, JSON_TYPE, _TOO_LARGE),
    "100,000 lists, open": (b"[" * 100_000, JSON_TYPE, _TOO_LARGE),
    "100,000 objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, JSON_TYPE, _TOO_LARGE),
    "100,000 lists in the input": (b'{"input":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}", JSON_TYPE, _TOO_LARGE),
    "half a surrogate pair": (b'{"input": {"prompt": "\\ud800"}}', JSON_TYPE, {400, 415}),
    "UTF-16": (VALID.decode().encode("utf-16"), JSON_TYPE, {400, 415}),
    "another charset": (VALID, {"Content-Type": "application/json; charset=utf-16"}, {415}),
    "an unknown charset": (VALID, {"Content-Type": "application/json; charset=fox"}, {415}),
    "compressed": (gzip.compress(VALID), {**JSON_TYPE, "Content-Encoding": "gzip"}, {415}),
    "not compressed": (VALID, {**JSON_TYPE, "Content-Encoding": "gzip"}, {415}),
    "an unknown encoding": (VALID, {**JSON_TYPE, "Content-Encoding": "fox"}, {415}),
    "form without boundary": (FORM, {"Content-Type": "multipart/form-data"}, {400, 415}),
    "form with an empty boundary": (FORM, {"Content-Type": 'multipart/form-data; boundary=""'}, {400, 415}),
    "form with another boundary": (FORM, {"Content-Type": "multipart/form-data; boundary=y"}, {400, 415}),
    "form that is cut off": (FORM[:-20], FORM_TYPE, {400, 415}),
    "form that is none": (b"\xff" * 1000, FORM_TYPE, {400, 415}),
    "form with a file name that is no UTF-8": (FORM.replace(b"fox.txt", b"\xff\xfe"), FORM_TYPE, {400, 415, 422}),
    "compressed form": (gzip.compress(FORM), {**FORM_TYPE, "Content-Encoding": "gzip"}, {415}),
    "no body": (b"", JSON_TYPE, {400, 415}),
}
"""What breaks parsers: 415 where the operation takes the other kind of body, too."""
BODY_OPERATIONS = [each for each in operations() if each.has_body]


def test_a_body_that_is_no_utf_8_is_read_as_the_gateway_passes_it_on(api: Api) -> None:
    body = b'{"input": {"prompt": "\xff\xfe\x80"}}'
    answer = api("mallory").post("/models/local/painter/predictions", content=body, headers=JSON_TYPE)
    # API Gateway replaces what is no UTF-8, and leaves out the Content-Length that would show it.
    assert (answer.status_code, answer.json()["input"]) == (201, {"prompt": "\ufffd" * 3})


@pytest.mark.parametrize(("body", "headers", "statuses"), BROKEN_BODIES.values(), ids=BROKEN_BODIES)
def test_a_body_that_breaks_parsers_is_a_problem_of_every_operation_and_starts_nothing(
    api: Api, replicate: LocalReplicate, body: bytes, headers: dict[str, str], statuses: set[int]
) -> None:
    names = {"owner": "local", "name": "painter", "id": PAINTER.version}
    for operation in BODY_OPERATIONS:
        answer = api("mallory").request(
            operation.method, operation.path.format_map(names), content=body, headers=headers
        )
        # A webhook that can be read is refused for its lack of a signature.
        allowed = {400, 401, 415} if operation.id == "webhooks.replicate" else statuses
        assert answer.status_code in allowed & set(operation.problems), (operation.id, answer.text)
        assert answer.headers["content-type"] == "application/problem+json", operation.id
        assert answer.json()["status"] == answer.status_code
    asked = [r for r in replicate.record()["requests"] if r["method"] in ("POST", "PATCH")]
    assert asked == []


def test_bytes_that_are_no_utf8_are_read_as_api_gateway_hands_them_on(api: Api, replicate: LocalReplicate) -> None:
    body = VALID.replace(b"red", b"\xff\xfe\x80")
    answer = api("mallory").post("/predictions", content=body, headers=JSON_TYPE)
    assert answer.status_code == 201, answer.text
    assert answer.json()["input"] == {"prompt": "a \ufffd\ufffd\ufffd fox"}
    assert [each["body"]["input"] for each in replicate.creates()] == [answer.json()["input"]]


def test_what_is_there_is_shown_as_the_document_says(
    api: Api, document: dict[str, Any], compare: Callable[..., Report], wait_until: Callable[..., Any]
) -> None:
    client = api("mallory")
    body = {"version": "local/painter", "input": {"prompt": "a red fox"}}
    prediction = client.post("/predictions", json=body, headers={"Prefer": "wait=20"}).json()
    path = f"/predictions/{prediction['id']}"
    wait_until(lambda: client.get(path).json()["status"] == "succeeded", 20, "its end")
    file = client.post("/files", files={"content": ("fox.txt", b"a red fox", "text/plain")}).json()
    version = client.get("/models/local/painter/versions").json()["results"][0]
    known = f"""
        [[operations]]
        include-path-regex = "^/models/"
        parameters = {{ owner = "local", name = "painter", id = "{version["id"]}" }}
        [[operations]]
        include-path = "/predictions/{{id}}"
        parameters = {{ id = "{prediction["id"]}" }}
        [[operations]]
        include-path = "/files/{{id}}"
        parameters = {{ id = "{file["id"]}" }}
        [[operations]]
        include-path = "/collections/{{slug}}"
        parameters = {{ slug = "text-to-image" }}
        [[operations]]
        include-path = "/search"
        parameters = {{ query = "fox", limit = 5 }}
    """
    report = compare(document, "--phases", "fuzzing", "--include-method", "GET", known=known)
    assert report.found == {}, report.text[-8000:]
    lacking = report.text.partition("Missing test data")[2]
    for path in ("/models/{owner}/{name}", "/predictions/{id}", "/files/{id}", "/collections/{slug}"):
        assert f"GET {path}\n" not in lacking
