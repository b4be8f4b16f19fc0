import json
import math
from dataclasses import asdict, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from predictions.upstream.prediction import UnreadablePrediction, UpstreamPrediction, read_json
from pydantic import BaseModel, Field, ValidationError, field_validator

VERSION = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
TOLD: dict[str, Any] = {
    "id": "ufawqhfynnddngldkgtslldrkq",
    "model": "stability-ai/sdxl",
    "version": VERSION,
    "deployment": "acme/sdxl",
    "input": {"prompt": "a red fox"},
    "output": ["https://replicate.delivery/pbxt/a/out-0.png"],
    "logs": "step 1\n",
    "error": None,
    "status": "succeeded",
    "created_at": "2025-06-15T15:06:40.123456789Z",
    "started_at": "2025-06-15T15:06:41Z",
    "completed_at": "2025-06-15T15:06:45.1Z",
    "metrics": {"predict_time": 4.1},
    "data_removed": False,
    "webhook": "https://api.example.com/v1/webhooks/replicate/x",
    "urls": {"get": "https://api.replicate.com/v1/predictions/x", "stream": "https://stream.replicate.com/v1/files/x"},
}

UNREADABLE: dict[str, bytes] = {
    "nothing": b"",
    "text": b"upstream connect error",
    "HTML": b"<html><body>502 Bad Gateway</body></html>",
    "cut off": json.dumps(TOLD).encode()[:-10],
    "not UTF-8": b'{"id": "\xff", "status": "starting"}',
    "deep": b"[" * 100_000,
    "null": b"null",
    "a list": b"[]",
    "a number": b"1",
    "no id": b'{"status": "starting"}',
    "no status": b'{"id": "ufawqhfynnddngldkgtslldrkq"}',
    "id null": b'{"id": null, "status": "starting"}',
    "id a number": b'{"id": 12, "status": "starting"}',
    "id empty": b'{"id": "", "status": "starting"}',
    "id with a path": b'{"id": "../account", "status": "starting"}',
    "id with capitals": b'{"id": "UFAWQ", "status": "starting"}',
    "id with a line end": b'{"id": "ufawq\\n", "status": "starting"}',
    "id beyond any": json.dumps({**TOLD, "id": "a" * 65}).encode(),
    "id not ASCII": '{"id": "ufawé", "status": "starting"}'.encode(),
    "status a number": b'{"id": "ufawq", "status": 1}',
    "status null": b'{"id": "ufawq", "status": null}',
    "status beyond any": json.dumps({**TOLD, "status": "s" * 65}).encode(),
}


def members(told: UpstreamPrediction) -> dict[str, Any]:
    """All members of what Replicate says."""
    return {name: value for name, value in asdict(told).items() if not name.startswith("_")}


@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_no_prediction_is_unreadable(body: bytes) -> None:
    with pytest.raises(UnreadablePrediction) as error:
        UpstreamPrediction.read(body)
    assert len(str(error.value)) < 200


def test_an_unreadable_prediction_is_not_repeated_in_the_error() -> None:
    with pytest.raises(UnreadablePrediction) as error:
        UpstreamPrediction.parse({"id": "r8_secret", "status": "starting"})
    assert "r8_secret" not in str(error.value)
    assert "id" in str(error.value)


def test_a_whole_prediction_is_read() -> None:
    told = UpstreamPrediction.read(json.dumps({**TOLD, "source": "api", "a_new_field": 1}).encode())
    assert members(told) == TOLD


def test_a_prediction_with_nothing_but_id_and_status_is_read() -> None:
    told = UpstreamPrediction.parse({"id": "ufawq", "status": "starting"})
    assert (told.id, told.status, told.output, told.urls, told.data_removed) == ("ufawq", "starting", None, {}, False)


ODD: dict[str, tuple[str, Any, Any]] = {
    "logs null": ("logs", None, None),
    "logs empty": ("logs", "", ""),
    "logs a list": ("logs", ["a", 1], '["a", 1]'),
    "error an object": ("error", {"detail": "out of memory"}, '{"detail": "out of memory"}'),
    "error with half a surrogate pair": ("error", "bad \ud800", "bad ?"),
    "metrics a list": ("metrics", [1], {}),
    "metrics null": ("metrics", None, {}),
    "urls null": ("urls", None, {}),
    "urls text": ("urls", "https://example.com", {}),
    "data_removed text": ("data_removed", "true", False),
    "data_removed true": ("data_removed", True, True),
    "data_removed null": ("data_removed", None, False),
    "model null": ("model", None, None),
    "model an object": ("model", {"owner": "a"}, None),
    "model beyond any": ("model", "m" * 5000, None),
    "model with half a surrogate pair": ("model", "a/\udfff", "a/?"),
    "version a number": ("version", 1, None),
    "webhook a list": ("webhook", [], None),
    "completed_at a number": ("completed_at", 1750000000, None),
    "started_at null": ("started_at", None, None),
    "status of the future": ("status", "paused", "paused"),
}


class Model(BaseModel):
    """The same rules, as pydantic has them."""

    id: str = Field(pattern=r"^[a-z0-9]{1,64}$")
    status: str = Field(max_length=64)
    model: str | None = None
    version: str | None = None
    deployment: str | None = None
    input: Any = None
    output: Any = None
    logs: str | None = None
    error: str | None = None
    metrics: dict[str, Any] | None = None
    created_at: str | None = None
    started_at: str | None = None
    completed_at: str | None = None
    webhook: str | None = None
    data_removed: bool = False
    urls: dict[str, Any] = Field(default_factory=dict)

    @field_validator("logs", "error", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        text = value if value is None or isinstance(value, str) else json.dumps(value)
        return text and text.encode("utf-8", "replace").decode()

    @field_validator("metrics", "urls", mode="before")
    @classmethod
    def _object(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {}

    @field_validator("data_removed", mode="before")
    @classmethod
    def _true(cls, value: Any) -> Any:
        return value is True

    @field_validator(
        "model", "version", "deployment", "webhook", "created_at", "started_at", "completed_at", mode="before"
    )
    @classmethod
    def _name(cls, value: Any) -> Any:
        return cls._text(value) if isinstance(value, str) and len(value) <= 4096 else None


VALUES: list[Any] = [
    None, True, False, 0, -1, 2**70, 10**400, 1.5, 1e308, math.inf, math.nan, "", " ", "a", "A", "a\n", "a" * 64,
    "a" * 65, "a" * 4096, "a" * 4097, "\ud800", "é\udc00", "\x00", "true", [], ["a"], {},
    {"a": math.nan}, {"a": {"b": [None]}},
]  # fmt: skip


def outcome(read: Any, value: Any) -> Any:
    try:
        found = read(value)
    except UnreadablePrediction as error:
        return str(error)
    except ValidationError as error:
        return f"not a prediction: {', '.join(str(each['loc'][0]) for each in error.errors())}"
    return repr(found.model_dump() if isinstance(found, Model) else members(found))


@pytest.mark.parametrize("field", [each.name for each in fields(UpstreamPrediction) if each.init])
def test_any_value_of_a_field_is_read_as_by_pydantic(field: str) -> None:
    for value in VALUES:
        for told in ({**TOLD, field: value}, {"id": "a", "status": "starting", field: value}):
            assert outcome(UpstreamPrediction.parse, told) == outcome(Model.model_validate, told), value
    told = {name: value for name, value in TOLD.items() if name != field}
    assert outcome(UpstreamPrediction.parse, told) == outcome(Model.model_validate, told)


@pytest.mark.parametrize(("field", "value", "expected"), ODD.values(), ids=ODD)
def test_an_odd_field_does_not_lose_the_prediction(field: str, value: Any, expected: Any) -> None:
    told = UpstreamPrediction.read(json.dumps({**TOLD, field: value}).encode())
    assert members(told) == {**TOLD, field: expected}


@pytest.mark.parametrize(
    "output", [None, "", "text", 0, 1.5, False, [], {}, [[["x"]]], {"a": {"b": [1, None]}}, "\U0001f600", 2**70]
)
def test_any_output_is_kept(output: Any) -> None:
    assert UpstreamPrediction.read(json.dumps({**TOLD, "output": output}).encode()).output == output


def test_numbers_that_json_does_not_have_become_null() -> None:
    body = b'{"id": "ufawq", "status": "succeeded", "output": [NaN, Infinity, -Infinity, 1e999, -1e999, 1e308]}'
    assert UpstreamPrediction.read(body).output == [None] * 5 + [1e308]


def test_a_deep_output_is_kept_where_python_bears_it() -> None:
    body = b'{"id": "ufawq", "status": "succeeded", "output": ' + b"[" * 200 + b"]" * 200 + b"}"
    assert json.dumps(UpstreamPrediction.read(body).output) == "[" * 200 + "]" * 200


@given(st.binary(max_size=100))
def test_no_bytes_break_the_reader(body: bytes) -> None:
    json.dumps(read_json(body), allow_nan=False)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(set(TOLD) - {"id", "status"})), ANY_JSON))
def test_whatever_is_beside_id_and_status_can_be_read(change: dict[str, Any]) -> None:
    told = UpstreamPrediction.parse({**TOLD, **change})
    assert (told.id, told.status) == (TOLD["id"], TOLD["status"])


@pytest.mark.parametrize("half", [b"\\ud83d", b"\\uDE00", b"\xed\xa0\xbd"])
def test_half_a_surrogate_pair_becomes_a_character_wherever_it_is(half: bytes) -> None:
    body = b'{"id": "ufawq", "status": "succeeded", "output": {"%s": ["a%s", "\\ud83d\\ude00"]}, "metrics": {"%s": 1}}'
    told = UpstreamPrediction.read(body.replace(b"%s", half))
    json.dumps([told.output, told.metrics], ensure_ascii=False).encode()
    assert [value[-1] for value in told.output.values()] == ["\U0001f600"]
