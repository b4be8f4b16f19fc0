"""The API's own OpenAPI document, as what tests hold answers against."""

import json
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from predictions.description import describe

from tests.unit.fakes import API_URL

FORWARDED = "(passed on to Replicate)"
NAMED_HEADERS = {"location", "preference-applied", "ratelimit-limit", "ratelimit-remaining", "ratelimit-reset"}


@cache
def document() -> dict[str, Any]:
    """The document; not to be changed by who gets it."""
    return describe(API_URL)


def operation_of(event: dict[str, Any]) -> dict[str, Any]:
    """The operation that an API event calls."""
    operation: dict[str, Any] = document()["paths"][event["resource"]][event["httpMethod"].lower()]
    return operation


def complaints(schema: dict[str, Any], value: Any) -> list[str]:
    """What is wrong with a value; a field that the document does not name is wrong too."""
    whole = {**closed(schema), "components": closed(document()["components"])}
    validator = Draft202012Validator(whole, format_checker=Draft202012Validator.FORMAT_CHECKER)
    return [f"{error.json_path}: {error.message}"[:300] for error in validator.iter_errors(value)]


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
    ((media_type, content),) = response["content"].items()
    assert headers["Content-Type"].partition(";")[0] == media_type
    if status.startswith("2") and FORWARDED in operation["summary"]:
        return  # made up by the test
    assert complaints(content["schema"], json.loads(answer["body"])) == []
