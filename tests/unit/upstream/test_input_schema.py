"""The check of an input: what is refused, what is left to Replicate, its bounds. Hostile schemas: tests/attacks."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from predictions.upstream.input_schema import (
    STEPS_LIMIT,
    VIOLATIONS_LIMIT,
    InputSchema,
    NotChecked,
    UnusableSchema,
)

# As Cog writes it: an enumeration by `allOf`, `x-order`, titles, a file as a `uri`.
COG: dict[str, Any] = {
    "Input": {
        "type": "object",
        "title": "Input",
        "required": ["prompt"],
        "properties": {
            "prompt": {"type": "string", "title": "Prompt", "x-order": 0, "minLength": 1, "maxLength": 20},
            "seed": {"type": "integer", "nullable": True, "x-order": 1, "minimum": 0, "maximum": 100},
            "guidance": {"type": "number", "default": 7.5, "minimum": 1, "maximum": 20},
            "scheduler": {"allOf": [{"$ref": "#/components/schemas/scheduler"}], "default": "DDIM", "x-order": 3},
            "image": {"type": "string", "format": "uri"},
            "images": {"type": "array", "items": {"type": "string", "format": "uri"}, "minItems": 1, "maxItems": 2},
            "upscale": {"type": "boolean"},
            "language": {"type": "string", "pattern": "^[a-z]{2}$"},
            "extra": {"type": "object"},
        },
    },
    "scheduler": {"type": "string", "title": "scheduler", "description": "An enumeration.", "enum": ["DDIM", "PNDM"]},
    "Output": {"type": "array", "items": {"type": "string", "format": "uri"}},
}
GOOD = {"prompt": "a fox"}


def schema(described: Any, **others: Any) -> InputSchema:
    return InputSchema({"Input": described, **others})


def of_field(described: Any, value: Any, **others: Any) -> list[str]:
    """What is wrong with one field `x`."""
    checked = schema({"type": "object", "required": ["x"], "properties": {"x": described}}, **others)
    return [each["detail"] for each in checked.violations({"x": value})]


@pytest.mark.parametrize(
    ("given", "field", "detail"),
    [
        ({}, "input.prompt", "This field is required."),
        ({"prompt": 7}, "input.prompt", "Must be a string, not a number."),
        ({"prompt": None}, "input.prompt", "Must be a string, not null."),
        ({"prompt": ["a"]}, "input.prompt", "Must be a string, not a list."),
        ({"prompt": ""}, "input.prompt", "Must have at least 1 characters (got 0)."),
        ({"prompt": "x" * 21}, "input.prompt", "Must have at most 20 characters (got 21)."),
        ({**GOOD, "seed": "7"}, "input.seed", "Must be a whole number, not a string."),
        ({**GOOD, "seed": 1.5}, "input.seed", "Must be a whole number, not a number."),
        ({**GOOD, "seed": True}, "input.seed", "Must be a whole number, not true or false."),
        ({**GOOD, "seed": -1}, "input.seed", "Must be at least 0 (got -1)."),
        ({**GOOD, "seed": 101}, "input.seed", "Must be at most 100 (got 101)."),
        ({**GOOD, "guidance": 0.99}, "input.guidance", "Must be at least 1 (got 0.99)."),
        ({**GOOD, "guidance": False}, "input.guidance", "Must be a number, not true or false."),
        ({**GOOD, "scheduler": "ddim"}, "input.scheduler", "Must be one of `DDIM`, `PNDM`."),
        ({**GOOD, "scheduler": 1}, "input.scheduler", "Must be a string, not a number."),
        ({**GOOD, "image": "fox.png"}, "input.image", "Must be a URL that begins with https://, http:// or data:."),
        ({**GOOD, "image": "file:///etc/passwd"}, "input.image", "Must be a URL that begins with"),
        ({**GOOD, "image": {"url": "https://a.example/x"}}, "input.image", "Must be a string, not an object."),
        ({**GOOD, "images": "https://a.example/x"}, "input.images", "Must be a list, not a string."),
        ({**GOOD, "images": []}, "input.images", "Must have at least 1 elements (got 0)."),
        ({**GOOD, "images": ["https://a.example/x", "y"]}, "input.images.1", "Must be a URL that begins with"),
        ({**GOOD, "upscale": "true"}, "input.upscale", "Must be true or false, not a string."),
        ({**GOOD, "upscale": 1}, "input.upscale", "Must be true or false, not a number."),
        ({**GOOD, "language": "eng"}, "input.language", "Must match the regular expression `^[a-z]{2}$`."),
        ({**GOOD, "extra": []}, "input.extra", "Must be an object, not a list."),
    ],
)
def test_input_that_is_not_the_models_is_refused_by_field(given: dict[str, Any], field: str, detail: str) -> None:
    (violation,) = InputSchema(COG).violations(given)
    assert violation["field"] == field
    assert violation["detail"].startswith(detail)


@pytest.mark.parametrize(
    "given",
    [
        GOOD,
        {"prompt": "🦊" * 20},
        {**GOOD, "seed": 0},
        {**GOOD, "seed": 7.0},
        {**GOOD, "seed": None},
        {**GOOD, "guidance": 20},
        {**GOOD, "scheduler": "PNDM"},
        {**GOOD, "image": "https://a.example/fox.png"},
        {**GOOD, "image": "HTTP://a.example/fox.png"},
        {**GOOD, "image": "data:image/png;base64,AAAA"},
        {**GOOD, "images": ["https://a.example/x", "data:,y"]},
        {**GOOD, "extra": {"anything": [1, {"goes": None}]}},
        # Cog ignores what it does not know, unless the schema forbids it.
        {**GOOD, "unknown": 1},
        # An explicit null for what may be left out is Replicate's to judge.
        {**GOOD, "upscale": None},
    ],
)
def test_input_that_may_be_the_models_passes(given: dict[str, Any]) -> None:
    assert InputSchema(COG).violations(given) == []


def test_all_violations_are_told_at_once() -> None:
    found = InputSchema(COG).violations({"seed": -1, "scheduler": "x", "image": "x", "images": [1, 2, 3]})
    assert [each["field"] for each in found] == [
        "input.prompt", "input.seed", "input.scheduler", "input.image", "input.images", "input.images.0",
        "input.images.1", "input.images.2",
    ]  # fmt: skip


def test_more_violations_than_an_answer_takes_are_cut() -> None:
    names = [f"field_{n}" for n in range(500)]
    found = schema({"type": "object", "required": names}).violations({})
    assert len(found) == VIOLATIONS_LIMIT


@pytest.mark.parametrize(
    ("described", "value", "details"),
    [
        # OpenAPI 3.0 and 3.1 write the same in two ways.
        ({"type": "integer", "minimum": 1, "exclusiveMinimum": True}, 1, ["Must be more than 1 (got 1)."]),
        ({"type": "integer", "minimum": 1, "exclusiveMinimum": False}, 1, []),
        ({"type": "number", "exclusiveMaximum": 2}, 2, ["Must be less than 2 (got 2)."]),
        ({"type": ["string", "null"]}, None, []),
        ({"type": ["string", "null"]}, 1, ["Must be a string or null, not a number."]),
        ({"anyOf": [{"type": "integer", "minimum": 3}, {"type": "null"}]}, 2, ["Must be at least 3 (got 2)."]),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, None, []),
        ({"anyOf": [{"type": "string"}, {"type": "number"}]}, [], ["Must be a string or a number, not a list."]),
        ({"oneOf": [{"type": "string"}, {"enum": ["a"]}]}, "a", []),
        ({"anyOf": [{"minimum": 5}, {"maximum": 1}]}, 3, ["Must match one of the 2 forms that the model takes here."]),
        ({"const": "a"}, "b", ["Must be `a`."]),
        ({"const": None}, None, []),
        ({"enum": [1, "a", None, True]}, 1.0, []),
        ({"enum": [1]}, True, ["Must be one of `1`."]),
        ({"enum": [1], "nullable": True}, None, []),
        ({"enum": []}, 1, ["Must be one of no values at all."]),
        ({"enum": [[1]]}, [2], []),
        ({"allOf": [{"$ref": "#/components/schemas/e"}], "nullable": True}, None, []),
        ({"$ref": "#/components/schemas/e"}, "b", ["Must be one of `a`."]),
        ({"$ref": "#/components/schemas/a~1b"}, 1, ["Must be a string, not a number."]),
        (True, 1, []),
        (False, 1, ["No value is allowed here."]),
        ({"format": "date", "type": "string"}, "no date", []),
        ({"multipleOf": 2, "x-order": {"not": "a schema"}, "uniqueItems": True}, [3, 3], []),
        ({"properties": {"y": {"type": "string"}}}, {"y": 1}, ["Must be a string, not a number."]),
        ({"minimum": None, "enum": None, "items": None, "anyOf": None}, 1, []),
    ],
)
def test_keywords_mean_what_openapi_says(described: Any, value: Any, details: list[str]) -> None:
    assert of_field(described, value, e={"enum": ["a"]}, **{"a/b": {"type": "string"}}) == details


@pytest.mark.parametrize(
    ("additional", "details"),
    [
        (None, []),
        (True, []),
        (False, ["The model does not know this field. Its fields are `a`."]),
        ({"type": "string"}, ["Must be a string, not a number."]),
    ],
)
def test_unknown_field_is_refused_where_the_model_says_so(additional: Any, details: list[str]) -> None:
    described: dict[str, Any] = {"type": "object", "properties": {"a": {}}}
    if additional is not None:
        described["additionalProperties"] = additional
    found = schema(described).violations({"a": 1, "b": 2})
    assert [each["detail"] for each in found] == details
    # Names that a pattern allows are not judged.
    assert schema({**described, "patternProperties": {"^b": {}}}).violations({"b": 2}) == []


# -- bounds ------------------------------------------------------------------------------------------------------


def test_steps_are_counted_up_to_the_limit_and_no_further() -> None:
    numbers = schema({"properties": {"x": {"items": {"type": "integer"}}}})
    # A step for each schema that meets a value, one for each type it allows, two for the field's name.
    elements = (STEPS_LIMIT - 4) // 2
    assert numbers.violations({"x": [1] * elements}) == []
    with pytest.raises(NotChecked):
        numbers.violations({"x": [1] * (elements + 1)})


def test_recursive_schema_is_followed_as_deep_as_the_input_goes() -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#/components/schemas/Input"}, "n": {"type": "integer"}}}
    found = schema(tree).violations({"left": {"left": {"n": "x"}}})
    assert [each["field"] for each in found] == ["input.left.left.n"]


def test_what_is_kept_is_the_input_and_what_it_refers_to_and_checks_the_same() -> None:
    whole = InputSchema.from_openapi({"openapi": "3.0.2", "components": {"schemas": COG}})
    kept = InputSchema.from_json(whole.to_json())
    assert json.loads(whole.to_json()) == {name: COG[name] for name in ("Input", "scheduler")}
    bad = {"seed": -1, "scheduler": "x"}
    assert kept.violations(bad) == whole.violations(bad) != []


# -- any schema, any input -----------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
numbers = st.integers(-20, 20) | st.floats(-20, 20).filter(math.isfinite)
scalars = st.none() | st.booleans() | numbers | texts
names = st.sampled_from(["a", "b", "c"])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)
kinds = st.sampled_from(["string", "integer", "number", "boolean", "array", "object", "null"])
plain = st.fixed_dictionaries(
    {},
    optional={
        "type": kinds | st.lists(kinds, min_size=1, max_size=3, unique=True),
        "enum": st.lists(scalars, min_size=1, max_size=3),
        "minimum": numbers,
        "maximum": numbers,
        "exclusiveMinimum": numbers,
        "exclusiveMaximum": numbers,
        "minLength": st.integers(0, 5),
        "maxLength": st.integers(0, 5),
        "minItems": st.integers(0, 3),
        "maxItems": st.integers(0, 3),
        "required": st.lists(names, max_size=2, unique=True),
    },
)


def composed(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {},
        optional={
            "properties": st.dictionaries(names, inner, max_size=3),
            "additionalProperties": st.booleans() | inner,
            "items": inner,
            "allOf": st.lists(inner, min_size=1, max_size=2),
            "anyOf": st.lists(inner, min_size=1, max_size=2),
        },
    )


described_schemas = st.recursive(plain, composed, max_leaves=6)


@given(described_schemas, values)
@settings(max_examples=300, deadline=None)
def test_what_is_refused_here_breaks_the_schema_as_the_reference_implementation_reads_it(
    described: dict[str, Any], value: Any
) -> None:
    if InputSchema({"Input": described}).violations(value):
        assert not Draft202012Validator(described).is_valid(value)


@given(described_schemas, values.filter(lambda value: "null" not in json.dumps(value)))
@settings(max_examples=300, deadline=None)
def test_what_breaks_the_schema_is_refused(described: dict[str, Any], value: Any) -> None:
    if not InputSchema({"Input": described}).violations(value):
        assert Draft202012Validator(described).is_valid(value)


junk = st.recursive(
    scalars | st.sampled_from(["string", "#/components/schemas/Input", "^(a+)+$"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "$ref", "properties", "items", "allOf", "anyOf", "enum", "pattern", "required", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(junk, values)
@settings(max_examples=300, deadline=None)
def test_anything_in_the_place_of_a_schema_is_unusable_or_gives_an_answer(described: Any, value: Any) -> None:
    try:
        found = schema(described).violations(value)
    except (UnusableSchema, NotChecked):
        return
    assert all(set(each) == {"field", "detail"} for each in found)


def test_schemas_of_the_local_models_are_usable() -> None:
    from local.replicate.catalog import models

    for model in models.values():
        checked = InputSchema.from_openapi(model.schema)
        required = model.schema["components"]["schemas"]["Input"].get("required", [])
        given = dict.fromkeys(required, "https://a.example/x")
        assert checked.violations(given) == [], model.name
