"""The API's own document, as the deployed stack gives it, and the deployed stack, as the document has it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from predictions.description import describe, operations

from local.cloud import LocalCloud
from local.replicate.process import LocalReplicate

Api = Callable[..., httpx.Client]

SCHEMATHESIS = str(Path(sys.executable).with_name("schemathesis"))
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,response_headers_conformance"
)


@pytest.fixture
def document(api: Api) -> dict[str, Any]:
    answer = api("alice").get("/openapi.json")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    found: dict[str, Any] = answer.json()
    return found


@pytest.fixture
def compare(api: Api, cloud: LocalCloud, replicate: LocalReplicate, tmp_path: Path) -> Callable[..., Any]:
    """Calls the API in every way that a document allows, and in ways that it does not; 0 where all answers fit it."""

    def compare(document: dict[str, Any], *options: str, known: str = "") -> "subprocess.CompletedProcess[str]":
        (tmp_path / "openapi.json").write_text(json.dumps(document))
        (tmp_path / "schemathesis.toml").write_text(known)
        authorization = api("mallory").headers["Authorization"]
        command = [
            SCHEMATHESIS, "--config-file", "schemathesis.toml", "run", "openapi.json", "--url", cloud.stack.api_url,
            "--header", f"Authorization: {authorization}", "--checks", CHECKS, "--generation-deterministic",
            "--max-examples", "6", "--continue-on-failure", "--request-timeout", "40", "--no-color", *options,
        ]  # fmt: skip
        environment = {**os.environ, "NO_PROXY": "*"}
        return subprocess.run(  # noqa: S603  # the arguments are ours
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
        )

    return compare


def test_document_needs_a_token(cloud: LocalCloud) -> None:
    assert httpx.get(f"{cloud.stack.api_url}/openapi.json", trust_env=False).status_code == 401


def test_document_describes_this_stack(cloud: LocalCloud, document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()
    assert document == describe(cloud.stack.api_url)


def test_answer_that_does_not_fit_the_document_would_be_found(
    document: dict[str, Any], compare: Callable[..., Any]
) -> None:
    document["components"]["schemas"]["PredictionPage"]["properties"]["results"]["type"] = "string"
    found = compare(document, "--phases", "fuzzing", "--include-path", "/predictions", "--include-method", "GET")
    assert found.returncode == 1, found.stdout + found.stderr
    assert "Response violates schema" in found.stdout


def test_every_operation_answers_whatever_comes_as_the_document_says(
    document: dict[str, Any], compare: Callable[..., Any]
) -> None:
    found = compare(document, "--phases", "examples,coverage,fuzzing")
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr
    assert f"Tested: {len(operations())}\n" in found.stdout


def test_what_is_there_is_shown_as_the_document_says(
    api: Api, document: dict[str, Any], compare: Callable[..., Any]
) -> None:
    client = api("mallory")
    body = {"version": "local/painter", "input": {"prompt": "a red fox"}}
    prediction = client.post("/predictions", json=body, headers={"Prefer": "wait=20"}).json()
    assert prediction["status"] == "succeeded", prediction
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
    assert report.returncode == 0, report.stdout[-8000:] + report.stderr
    lacking = report.stdout.partition("Missing test data")[2]
    for path in ("/models/{owner}/{name}", "/predictions/{id}", "/files/{id}", "/collections/{slug}"):
        assert f"GET {path}\n" not in lacking
