"""Hostile schemas of models: nothing is fetched, nothing lasts, and no prediction is kept from being started by one."""

import json
import time
from typing import Any

import pytest
from predictions.upstream.input_schema import InputSchema, NotChecked, UnusableSchema

from tests.attacks.stack import Stack
from tests.reliability import Recorded

NOWHERE = "#/components/schemas/nowhere"
CASE_SECONDS = 2.0
"""Of the processor's, for one schema and all its doors."""


def schema(described: Any, **others: Any) -> InputSchema:
    return InputSchema({"Input": described, **others})


def of_field(described: Any, value: Any, **others: Any) -> list[str]:
    """What is wrong with one field `x`."""
    checked = schema({"type": "object", "required": ["x"], "properties": {"x": described}}, **others)
    return [each["detail"] for each in checked.violations({"x": value})]


def nested(depth: int) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for _ in range(depth):
        described = {"properties": {"x": described}}
    return described


@pytest.mark.parametrize(
    "document",
    [
        None, 7, [], "schema", {}, {"components": None}, {"components": {"schemas": []}},
        {"components": {"schemas": {}}}, {"components": {"schemas": {"Input": None}}},
        {"components": {"schemas": {"Output": {}}}},
    ],
)  # fmt: skip
def test_document_without_a_schema_of_the_input_is_unusable(document: Any) -> None:
    with pytest.raises(UnusableSchema):
        InputSchema.from_openapi(document)


@pytest.mark.parametrize(
    "described",
    [
        {"$ref": "https://evil.example/schema.json"},
        {"$ref": "http://169.254.169.254/latest/meta-data"},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "#/definitions/x"},
        {"$ref": "other.json#/components/schemas/Input"},
        {"$ref": ""},
        {"$ref": NOWHERE},
        {"$ref": 7},
        {"properties": {"x": {"items": {"anyOf": [{"$ref": NOWHERE}]}}}},
        {"type": "file"},
        {"type": 7},
        {"enum": "abc"},
        {"required": True},
        {"required": "abc"},
        {"properties": ["a"]},
        {"properties": {"a": 7}},
        {"items": [{}, {}]},
        {"minimum": "3"},
        {"minLength": 1.5},
        {"nullable": "yes"},
        {"pattern": ["a"]},
        {"allOf": {}},
        nested(50),
        {"enum": list(range(30_000))},
        {"properties": {f"p{n}": {"type": "string"} for n in range(10_000)}},
        {"description": "x" * 2_000_000},
        {"x": {"y" * 2_000_000: 1}},
    ],
    ids=lambda described: json.dumps(described)[:40],
)
def test_schema_that_is_none_or_reaches_outside_is_unusable(described: Any) -> None:
    with pytest.raises(UnusableSchema):
        schema(described)


@pytest.mark.parametrize("text", ["", "{", "null", "[" * 100_000, '{"Input": 1}', "[]"])
def test_kept_text_that_is_no_schema_is_unusable(text: str) -> None:
    with pytest.raises(UnusableSchema):
        InputSchema.from_json(text)


def doubling(keyword: str) -> dict[str, Any]:
    """20 schemas, each of which refers twice to the next: a million ways."""
    schemas: dict[str, Any] = {f"s{n}": {keyword: [{"$ref": f"#/components/schemas/s{n + 1}"}] * 2} for n in range(40)}
    return {"Input": {"properties": {"x": {"$ref": "#/components/schemas/s0"}}}, **schemas, "s20": {"type": "string"}}


ROOT = {"$ref": "#/components/schemas/Input"}


@pytest.mark.parametrize(
    ("schemas", "value"),
    [
        ({"Input": ROOT}, {}),
        ({"Input": {"allOf": [ROOT, ROOT]}}, {}),
        ({"Input": {"anyOf": [ROOT, ROOT]}}, {}),
        ({"Input": {"additionalProperties": ROOT, "allOf": [ROOT]}}, {"x": {}}),
        (doubling("allOf"), {"x": "a"}),
        (doubling("anyOf"), {"x": 1}),
        (doubling("oneOf"), {"x": 1}),
        # An input that is large, or deep, instead.
        ({"Input": {"properties": {"x": {"items": {"type": "integer"}}}}}, {"x": [1] * 200_000}),
        ({"Input": {"additionalProperties": {"type": "integer"}}}, dict.fromkeys(map(str, range(200_000)), 1)),
        ({"Input": {"additionalProperties": False}}, dict.fromkeys(map(str, range(200_000)), 1)),
        ({"Input": {"properties": {"x": {"items": {"required": ["r"] * 9_000}}}}}, {"x": [{}] * 9_000}),
        ({"Input": {"properties": {"x": {"items": {"type": ["null"] * 9_000}}}}}, {"x": [1] * 9_000}),
    ],
)  # fmt: skip
def test_check_that_would_last_is_given_up_after_its_steps(schemas: dict[str, Any], value: Any) -> None:
    checked = InputSchema(schemas)
    with pytest.raises(NotChecked):
        checked.violations(value)


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|aa)+$", r"(.*)*b$", r"(x+x+)+y", r"^(\w+\s?)*$"])
def test_pattern_that_python_would_not_finish_is_matched_in_linear_time(pattern: str) -> None:
    # With Python's `re` 10,000 characters would take longer than the universe has had; nothing here waits for it.
    assert of_field({"type": "string", "pattern": pattern}, "a" * 9_999 + "!") == [
        f"Must match the regular expression `{pattern}`."
    ]


@pytest.mark.parametrize(
    "pattern", [r"(?=a)b", r"(a)\1", "(", "[", r"(?P<x", r"(a{1000}){1000}", "a" * 201, "(" * 300, r"\p{Nothing}"]
)
def test_pattern_that_the_engine_does_not_take_is_left_to_replicate(pattern: str) -> None:
    assert of_field({"type": "string", "pattern": pattern}, "zzz") == []


def test_patterns_beyond_the_limit_and_texts_beyond_theirs_are_left_to_replicate() -> None:
    properties = {f"p{n}": {"type": "string", "pattern": "^a$"} for n in range(40)}
    found = schema({"properties": properties}).violations(dict.fromkeys(properties, "b"))
    assert len(found) == 16
    assert of_field({"pattern": "^a$"}, "b" * 10_001) == []


@pytest.mark.parametrize(
    "described",
    [
        {"enum": ["y" * 100_000, *map(str, range(5_000))]},
        {"pattern": "^" + "y" * 150},
        {"const": "\ud800"},
        {"additionalProperties": False, "properties": {"\udfff" * 100: {}, **{str(n): {} for n in range(3_000)}}},
        {"minimum": 10**300},
    ],
    ids=lambda described: next(iter(described)),
)
def test_text_of_a_schema_in_an_answer_is_short_and_can_be_stored(described: Any) -> None:
    for value in ("x", 1, {"z" * 5_000: 1}):
        for detail in of_field(described, value):
            assert len(detail.encode()) < 4_000


# -- through the handlers -------------------------------------------------------------------------------------------

UNCHECKED = "unchecked"
FITS = "fits"
UNREADABLE = "unreadable"


def document(schemas: Any) -> dict[str, Any]:
    return {"openapi": "3.0.2", "info": {"title": "Cog"}, "components": {"schemas": schemas}}


def of_x(described: Any, **others: Any) -> dict[str, Any]:
    """The schema of an input with one field, `x`."""
    return document({"Input": {"type": "object", "properties": {"x": described}}, **others})


def text(**described: Any) -> dict[str, Any]:
    """The schema of an input whose `x` is a text."""
    return of_x({"type": "string", **described})


def reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


REMOTE = (
    "https://evil.example/schema.json", "http://169.254.169.254/latest/meta-data", "http://127.0.0.1:9001/x",
    "file:///etc/passwd", "file:///proc/self/environ", "ftp://evil.example/x", "//evil.example/x", "gopher://x",
    "data:application/json,{}", "other.json#/components/schemas/Input", "#/definitions/x", "#", "#/", "",
    "#/components/schemas/../secrets", "urn:x", "https://api.replicate.com/v1/account", "\u0000", "x" * 100_000,
)  # fmt: skip
FORMATS = ("uri", "regex", "date-time", "email", "hostname", "ipv6", "json-pointer", "binary", "x" * 10_000, "\u0000")
PATTERNS = (
    r"(a+)+$",
    r"(a|aa)+$",
    r"(.*)*b$",
    r"(x+x+)+y",
    r"^(\w+\s?)*$",
    r"(a{1000}){1000}",
    "(" * 190,
    r"(a)\1",
    "[",
)

NO_SCHEMAS: tuple[Any, ...] = (None, False, 7, 1.5, [], "x")

THROUGH: dict[str, tuple[Any, Any, str]] = {
    **{f"refers to {ref[:40]!a}": (of_x({"$ref": ref}), 1, UNCHECKED) for ref in REMOTE},
    **{
        f"refers within a list to {ref[:40]!a}": (of_x({"items": {"anyOf": [{"$ref": ref}]}}), [1], UNCHECKED)
        for ref in REMOTE
    },
    **{f"is {value!r}": (document({"Input": value}), 1, UNCHECKED) for value in (*NO_SCHEMAS, True)},
    **{f"schemas are {value!r}": (document(value), 1, UNCHECKED) for value in (*NO_SCHEMAS, {})},
    **{f"the document is {value!r}": (value, 1, UNCHECKED) for value in (*NO_SCHEMAS, {})},
    **{f"x is {value!r}": (of_x(value), 1, UNCHECKED) for value in NO_SCHEMAS if value is not False},
    "x is true": (of_x(True), 1, FITS),
    "x is false": (of_x(False), 1, "input.x"),
    **{f"format {name[:20]!a}": (text(format=name), "https://a.example", FITS) for name in FORMATS},
    **{f"format {name[:20]!a}, of a number": (text(format=name), 1, "input.x") for name in FORMATS},
    **{f"pattern {p[:20]}": (of_x({"pattern": p}), "a" * 9_999, UNCHECKED) for p in PATTERNS[5:]},
    **{f"pattern {p[:20]}, not met": (text(pattern=p), "a" * 9_999 + "!", "input.x") for p in PATTERNS[:5]},
    **{
        f"names by the pattern {p[:20]}": (
            of_x({"patternProperties": {p: False}, "additionalProperties": False}), {"a" * 5_000 + "!": 1}, FITS,
        )
        for p in PATTERNS
    },
    "refers to itself": (document({"Input": {"$ref": "#/components/schemas/Input"}}), 1, UNCHECKED),
    "two refer to each other": (
        of_x(reference("a"), a=reference("b"), b=reference("a")), 1, UNCHECKED,
    ),
    "all of it, doubled": (document(doubling("allOf")), "a", UNCHECKED),
    "any of it, doubled": (document(doubling("anyOf")), 1, UNCHECKED),
    "one of it, doubled": (document(doubling("oneOf")), 1, UNCHECKED),
    "deep": (document({"Input": nested(50)}), 1, UNCHECKED),
    "very deep": (document({"Input": nested(900)}), 1, UNREADABLE),
    "a choice of 10,000": (of_x({"enum": list(range(10_000))}), 10_001, "input.x"),
    "a choice of 100,000": (of_x({"enum": list(range(100_000))}), -1, UNCHECKED),
    "10,000 fields": (document({"Input": {"properties": {f"p{n}": {} for n in range(10_000)}}}), 1, UNCHECKED),
    "100,000 required": (document({"Input": {"required": [f"p{n}" for n in range(100_000)]}}), 1, UNCHECKED),
    "1,000 required": (document({"Input": {"required": [f"p{n}" for n in range(1_000)]}}), 1, "input.p0"),
    "a text of a megabyte": (of_x({"description": "x" * 1_500_000}), 1, UNCHECKED),
    **{
        f"{name} is {value!r}": (of_x({name: value}), 1, UNCHECKED)
        for name, value in (
            ("type", 7), ("type", "file"), ("type", {}), ("enum", "abc"), ("enum", {}), ("required", True),
            ("properties", []), ("items", 7), ("minimum", "3"), ("maximum", []), ("minLength", 1.5),
            ("nullable", "yes"),
            ("pattern", []), ("allOf", {}), ("anyOf", "x"), ("oneOf", 7), ("additionalProperties", "no"),
            ("exclusiveMinimum", "x"), ("format", 7), ("$ref", []),
        )
    },
}  # fmt: skip
"""A version's `openapi_schema`, a value for its input `x`, and what becomes of a create.

It is unchecked, or refused by field. What makes the whole description unreadable leaves open what is to be run.
"""


@pytest.mark.parametrize("door", ["official", "community", "version"])
def test_hostile_schema_refuses_by_field_or_leaves_the_input_to_replicate(
    stack: Stack, door: str, record_property: Recorded
) -> None:
    record_property("schemas", len(THROUGH))
    token, wrong = stack.tokens.create("alice", ("predict",))[0], []
    for n, (case, (told, value, verdict)) in enumerate(THROUGH.items()):
        name, version = f"evil/model-{n}", f"{n:064x}"
        model = {"is_official": door == "official", "latest_version": {"id": version, "openapi_schema": told}}
        stack.replicate.models[name] = model
        stack.replicate.versions[f"{name}/versions/{version}"] = {"id": version, "openapi_schema": told}
        path = "/predictions" if door == "version" else f"/models/{name}/predictions"
        body: dict[str, Any] = {"input": {"x": value}}
        if door == "version":
            body["version"] = f"{name}:{version}"
        creates, began = len(stack.replicate.creates), time.process_time()
        answer = stack.api("POST", path, token=token, body=json.dumps(body))
        seconds, started = time.process_time() - began, len(stack.replicate.creates) - creates
        fields = [each["field"] for each in json.loads(answer["body"]).get("invalid_fields", [])]
        expected = (201, 1) if verdict in (UNCHECKED, FITS) else (422, 0)
        if verdict == UNREADABLE:
            expected = (201, 1) if door == "version" else (503, 0)
        if (answer["statusCode"], started) != expected or seconds > CASE_SECONDS or len(answer["body"]) > 100_000:
            wrong.append((case, answer["statusCode"], answer["body"][:300], seconds))
        elif expected[0] == 422 and verdict not in fields:
            wrong.append((case, 422, fields, seconds))
    assert wrong == []
    assert {request.url.host for request in stack.replicate.asked} == {"api.replicate.com"}
    asked = {request.url.path for request in stack.replicate.asked}
    assert all(path == "/v1/predictions" or path.startswith("/v1/models/evil/model-") for path in asked), asked
