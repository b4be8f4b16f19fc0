"""The memory of parsed JSON is estimated before it is parsed, and never below what it takes."""

import json
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from predictions.files.output_references import JSON
from predictions.files.outputs_bucket import OutputsBucket
from predictions.upstream.bounded_json import Unscannable, elements, members, read_members, weigh

# Of each text, in bytes; with four times as much, memory and estimate differ by less than 5 % from four times these.
SIZE = 250_000
NO_LIMIT = 1 << 40


def filled(unit: bytes) -> bytes:
    return b"[" + b",".join([unit] * (SIZE // (len(unit) + 1))) + b"]"


TEXTS: dict[str, Callable[[], bytes]] = {
    "empty lists": lambda: filled(b"[]"),
    "empty objects": lambda: filled(b"{}"),
    "polygons": lambda: filled(b"[1234,1567]"),
    "words": lambda: filled(b'{"word":"hello,","start":12.34,"end":12.56}'),
    "words beyond ASCII": lambda: filled('{"word":"größer","start":12.34}'.encode()),
    "words with an emoji": lambda: filled('{"word":"🦊 and more"}'.encode()),
    "words with an emoji, escaped": lambda: filled(b'{"word":"\\ud83e\\udd8a and more"}'),
    "numbers": lambda: filled(b"1234"),
    "floats": lambda: filled(b"0.123456789"),
    "floats that are written longer": lambda: filled(b"1e15"),
    "literals": lambda: filled(b"null"),
    "objects with one member": lambda: filled(b'{"a":1}'),
    "deep ones": lambda: filled(b"[[[[[[1]]]]]]"),
    "different names": lambda: b"{" + b",".join(b'"name%06d":1' % n for n in range(SIZE // 14)) + b"}",
    "names of objects": lambda: b"[" + b",".join(b'{"name%06d":{}}' % n for n in range(SIZE // 18)) + b"]",
    "text": lambda: b'"' + b"lorem, ipsum: [dolor] {sit} " * (SIZE // 28) + b'"',
    "text with one emoji": lambda: b'"' + b"lorem ipsum " * (SIZE // 12) + "🦊".encode() + b'"',
    "text with one emoji, escaped": lambda: b'"' + b"lorem ipsum " * (SIZE // 12) + b'\\ud83e\\udd8a"',
    "text in Greek": lambda: b'"' + "λόγος ".encode() * (SIZE // 11) + b'"',
    "control characters": lambda: b'"' + b"\x01" * SIZE + b'"',
    "quotes": lambda: b'"' + b'\\"' * (SIZE // 2) + b'"',
    "texts of punctuation": lambda: filled(b'","'),
    "spaces": lambda: b"[" + b" " * SIZE + b"]",
    "empty lists with a space": lambda: filled(b"[ ]"),
}


def refined(body: bytes) -> int:
    """The estimate as it is refined where a text is close to the limit."""
    estimated = weigh(body, NO_LIMIT).bytes
    for _ in range(3):
        estimated = min(estimated, weigh(body, estimated - 1).bytes)
    return estimated


@pytest.mark.parametrize("name", TEXTS)
def test_weight_is_never_below_the_memory_that_is_taken(name: str) -> None:
    body = TEXTS[name]()
    estimated = refined(body)
    tracemalloc.start()
    try:
        text = body.decode()
        value = json.loads(text, strict=False)
        read = tracemalloc.get_traced_memory()[0]
        del text
        written = json.dumps(value, separators=(",", ":")).encode()
        peak = max(read, tracemalloc.get_traced_memory()[0] + len(written))
    finally:
        tracemalloc.stop()
    assert peak + len(body) <= estimated * 1.02
    assert estimated <= 12 * (peak + len(body)), "it refuses much that can be borne"


@pytest.mark.parametrize("name", ["words", "text", "polygons"])
def test_honest_outputs_are_estimated_within_a_factor_of_two(name: str) -> None:
    body = TEXTS[name]()
    tracemalloc.start()
    try:
        value = json.loads(body)
        written = json.dumps(value).encode()
        taken = tracemalloc.get_traced_memory()[0] + len(written) + len(body)
    finally:
        tracemalloc.stop()
    assert refined(body) <= 2 * taken


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), ANY_JSON, max_size=5), st.sampled_from([None, 1]), st.booleans())
def test_members_of_any_object_are_found_where_they_are(
    value: dict[str, object], indent: int | None, ascii_only: bool
) -> None:
    body = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    found = {member.name: json.loads(body[member.start : member.end]) for member in members(body)}
    assert [*found.values()] == [json.loads(json.dumps(each)) for each in value.values()]


@given(st.lists(ANY_JSON, max_size=5), st.sampled_from([None, 1]))
def test_elements_of_any_list_are_found_where_they_are(value: list[object], indent: int | None) -> None:
    body = json.dumps(value, indent=indent).encode()
    assert [json.loads(body[start:end]) for start, end in elements(body)] == json.loads(json.dumps(value))


@given(st.binary(max_size=60))
def test_whatever_is_no_json_ends_a_scan_and_breaks_nothing(body: bytes) -> None:
    read_members(b'{"a":' + body, ("a",))
    weigh(body, NO_LIMIT)
    weigh(body, 0)
    for scan in (members, elements):
        with suppress(Unscannable):
            list(scan(body))


@pytest.mark.parametrize(
    "output", [b"[" * 6_000_000, b"[[]," * 3_000_000, b"[[[[[[[]]]]]]]," * 800_000, b'{"a":' * 2_000_000, b'"\\"' * 999]
)
def test_what_a_scan_cannot_follow_is_left_in_bounded_time_with_what_was_found(output: bytes) -> None:
    began = time.process_time()
    found = read_members(b'{"id":"u","output":[' + output + b',"status":"succeeded"}', ("id", "status"))
    assert found == {"id": b'"u"'}
    assert time.process_time() - began < 5


def test_small_members_are_read_beside_a_large_one() -> None:
    large = b"[" + b"[[1,2],[3,4]]," * 100_000 + b'"]}"]'
    body = b'{"id":"u", "output" : ' + large + b' ,"status":"succeeded","logs":"' + b"x" * 300_000 + b'"}'
    assert read_members(body, ("id", "status", "logs")) == {"id": b'"u"', "status": b'"succeeded"'}


def test_looking_for_files_in_a_long_list_takes_little_memory() -> None:
    output: JSON = [[] for _ in range(200_000)]
    bucket = OutputsBucket("outputs")
    tracemalloc.start()
    try:
        assert not bucket.holds_files(output)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000
