"""The API's own OpenAPI document, as what tests hold answers against."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from predictions.api.proxy import ROUTES as FORWARDED_ROUTES

from tests.support.fakes import API_URL
from tests.support.template import ROOT, SAFE_LOADER

SOURCE = ROOT / "layers/predictions/predictions/api/openapi.yaml"
FORWARDED = "(forwarded to Replicate)"
NAMED_HEADERS = {"location", "preference-applied", "ratelimit-limit", "ratelimit-remaining", "ratelimit-reset"}


@dataclass(frozen=True)
class Operation:
    """An operation of the document.

    Attributes:
        method: In capitals.
        path: As in the template.
        described: What the document has of it.
    """

    method: str
    path: str
    described: Mapping[str, Any]

    @property
    def id(self) -> str:
        """Its `operationId`."""
        return str(self.described["operationId"])

    @property
    def scopes(self) -> tuple[str, ...]:
        """Each scope that allows it; none for a public route."""
        return tuple(scope for each in self.described["security"] for scope in each["accessToken"])

    @property
    def successes(self) -> list[int]:
        """The statuses of success."""
        return [int(status) for status in self.described["responses"] if status < "400"]

    @property
    def status(self) -> int:
        """The first status of success."""
        return self.successes[0]

    @property
    def problems(self) -> list[int]:
        """The statuses of its answers other than success."""
        return sorted(int(status) for status in self.described["responses"] if status >= "400")

    @property
    def content(self) -> Mapping[str, Any]:
        """By media type, what a success answers; empty where it has no body."""
        content: Mapping[str, Any] = self.described["responses"][str(self.status)].get("content", {})
        return content

    @property
    def media_type(self) -> str:
        """Of the answer; JSON's where it has no body."""
        return next(iter(self.content), "application/json")

    @property
    def has_body(self) -> bool:
        """Whether callers send a body."""
        return "requestBody" in self.described

    @property
    def names(self) -> list[str]:
        """The parameters of the path."""
        return [part[1:-1] for part in self.path.split("/") if part.startswith("{")]

    @property
    def parameters(self) -> list[str]:
        """Names in `components.parameters`, beside those of the path."""
        return [each["$ref"].rpartition("/")[2] for each in self.described["parameters"] if "$ref" in each]

    @property
    def forwarded(self) -> bool:
        """Whether it is passed on to Replicate, of whose refusals the known ones are described."""
        return (self.method, self.path) in FORWARDED_ROUTES


@cache
def document() -> dict[str, Any]:
    """The document; not to be changed by who gets it."""
    found: dict[str, Any] = yaml.load(SOURCE.read_text(encoding="utf-8"), SAFE_LOADER)  # noqa: S506  # a SafeLoader
    return {**found, "servers": [{"url": API_URL}]}


@cache
def operations() -> list[Operation]:
    """All routes: what this stack answers by itself, and what is passed on."""
    paths = document()["paths"]
    return [Operation(method.upper(), path, each) for path in paths for method, each in paths[path].items()]


def operation_of(event: dict[str, Any]) -> dict[str, Any]:
    """The operation that an API event calls."""
    operation: dict[str, Any] = document()["paths"][event["resource"]][event["httpMethod"].lower()]
    return operation


def complaints(schema: dict[str, Any], value: Any) -> list[str]:
    """What is wrong with a value; a field that the document does not name is wrong too."""
    whole = {**closed(schema), "components": _closed_components()}
    validator = Draft202012Validator(whole, format_checker=Draft202012Validator.FORMAT_CHECKER)
    return [f"{error.json_path}: {error.message}"[:300] for error in validator.iter_errors(value)]


@cache
def _closed_components() -> Any:
    return closed(document()["components"])


def closed(schema: Any) -> Any:
    """A schema whose objects have no other fields, unless it says that they may."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(part) for name, part in schema.items()}
    if schema.get("type") == "object" and "properties" in schema:
        found.setdefault("additionalProperties", False)
    return found


def check_answer(event: dict[str, Any], answer: dict[str, Any]) -> None:
    """An answer of a handler is one that the document describes.

    Raises:
        AssertionError: It is not; the message has everything that differs.
    """
    operation, status = operation_of(event), str(answer["statusCode"])
    responses = operation["responses"]
    if status not in responses:
        # What Replicate answers is for Replicate to say.
        assert FORWARDED in operation["summary"], f"{operation['operationId']} answers {status}, which is not described"
        return
    response = responses[status]
    if "$ref" in response:
        response = document()["components"]["responses"][response["$ref"].rpartition("/")[2]]
    headers = {**answer.get("headers", {}), **{k: v[0] for k, v in answer.get("multiValueHeaders", {}).items()}}
    told = {name.lower() for name in headers if name.lower() in NAMED_HEADERS}
    assert told <= {name.lower() for name in response.get("headers", {})}, told
    if "content" not in response:
        assert not answer.get("body")
        return
    media_type = headers["Content-Type"].partition(";")[0]
    assert media_type in response["content"]
    schema = response["content"][media_type]["schema"]
    if status.startswith("2") and FORWARDED in operation["summary"]:
        return  # made up by the test
    assert complaints(schema, json.loads(answer["body"]) if media_type.endswith("json") else answer["body"]) == []
