"""Manifests as strangers write them: what is wrong with a line is that line's own affair."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from predictions.batches.files import read_lines
from predictions.batches.manifest import (
    LINE_LIMIT_BYTES,
    Format,
    Line,
    LineRefused,
    ManifestUnreadable,
    check_request,
    lines_of,
    request_of,
)

GOOD = b'{"model": "meta/llama", "input": {"prompt": "a fox"}}'
FOX = json.loads(GOOD)


def pieces(content: bytes, size: int = 7) -> Iterator[bytes]:
    """A body as it arrives: in pieces that respect nothing."""
    yield from (content[start : start + size] for start in range(0, len(content), size))


def lines(content: bytes, kind: Format = "jsonl", size: int = 7) -> list[Line]:
    return list(lines_of(pieces(content, size), kind))


# -- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"model": ', "The line is not JSON"),
        (b"model,prompt", "The line is not JSON"),
        (b'{"seed": NaN}', "The line is not JSON"),
        (b'{"seed": Infinity}', "The line is not JSON"),
        (b'{"seed": 1e999}', "too large"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"[" * 200 + b"]" * 200, "nested deeper"),
        (b"[" * 100_000, "nested deeper"),
        (b'{"prompt": "' + b"x" * LINE_LIMIT_BYTES + b'"}', "exceeds the limit"),
        (b"1" * 5000, "not JSON"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else None,
)
def test_unreadable_line_is_refused_with_its_number_and_nothing_else_is_lost(line: bytes, reason: str) -> None:
    first, bad, last = lines(b"\n".join([GOOD, line, GOOD]), size=65_536)
    assert (first, last) == (Line(1, FOX), Line(3, FOX))
    assert (bad.n, bad.value) == (2, None)
    assert reason in (bad.error or "")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"input": {}}, "model"),
        ({"model": "meta/llama"}, "input"),
        ({"model": "meta/llama", "version": "a" * 64, "input": {}}, "model"),
        ({"model": "no slash", "input": {}}, "model"),
        ({"model": "meta/llama", "input": []}, "input"),
        ({"model": "meta/llama", "input": {}, "owner": "bob"}, "owner"),
        ({"model": "meta/llama", "input": {}, "webhook": "http://169.254.169.254/"}, "webhook"),
        ({"model": "meta/llama", "input": {}, "lifetime": "1s"}, "lifetime"),
        ({"model": "meta/llama", "input": {}, "idempotency_key": "k"}, "idempotency_key"),
    ],
    ids=str,
)
def test_request_that_the_queue_would_refuse_is_refused_by_its_field(request_: dict[str, Any], field: str) -> None:
    with pytest.raises(LineRefused, match=f"{field}: "):
        check_request(request_, allow_loopback_webhooks=False)


@pytest.mark.parametrize("value", [None, 3, "a fox", [FOX], True])
def test_line_that_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(LineRefused, match="JSON object"):
        request_of(value, None)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "finds nothing"),
        ({"prompt": None}, "finds nothing"),
    ],
)
def test_row_that_leaves_a_placeholder_empty_is_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(LineRefused, match=f"input.prompt: .*{reason}"):
        request_of(row, {"model": "meta/llama", "input": {"prompt": "{{ row.prompt }}"}})


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", b"prompt,prompt\na,b\n", b"prompt,\na,b\n", b"prompt\xff\na\n", b'"prompt\na\n', b"\x00\na\n"],
)
def test_csv_without_a_header_that_names_its_columns_is_no_manifest(content: bytes) -> None:
    with pytest.raises(ManifestUnreadable):
        lines(content, "csv")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"only one", "1 fields, but the header has 2"),
        (b"a,b,c", "3 fields"),
        (b'"a"b,c', "Not valid CSV"),
        (b"\xff,b", "Not valid UTF-8"),
        (b"x" * (LINE_LIMIT_BYTES + 1) + b",b", "exceeds the limit"),
        (b"a\rb,c", "Not valid CSV"),
    ],
    ids=lambda value: value[:16] if isinstance(value, bytes) else None,
)
def test_bad_row_is_refused_with_its_line_and_nothing_else_is_lost(row: bytes, reason: str) -> None:
    first, bad, last = lines(b"\n".join([b"prompt,seed", b"fox,1", row, b"owl,2"]), "csv", 65_536)
    assert (first, last) == (Line(2, {"prompt": "fox", "seed": "1"}), Line(4, {"prompt": "owl", "seed": "2"}))
    assert bad.n == 3
    assert reason in (bad.error or "")


def test_quote_that_is_never_closed_takes_at_most_a_lines_worth_along() -> None:
    many = b"owl,2\n" * (LINE_LIMIT_BYTES // 6 + 10)
    first, bad, *others = lines(b'prompt,seed\nfox,1\n"open,1\n' + many, "csv", 65_536)
    assert (first.n, bad.n) == (2, 3)
    assert "quote" in (bad.error or "")
    assert others
    assert all(line.value == {"prompt": "owl", "seed": "2"} for line in others)


# -- taken ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_ends_of_lines_and_the_mark_of_windows_are_no_part_of_a_line(end: bytes, mark: bytes, size: int) -> None:
    content = mark + GOOD + end + end + b"  \t" + end + GOOD
    assert lines(content, size=size) == [Line(1, FOX), Line(4, FOX)]
    content = mark + b"prompt,seed" + end + b'"a ""red"", fox",1' + end + end + b"owl," + end
    assert lines(content, "csv", size) == [
        Line(2, {"prompt": 'a "red", fox', "seed": "1"}),
        Line(4, {"prompt": "owl", "seed": ""}),
    ]


def test_row_over_several_lines_has_the_number_of_its_first() -> None:
    content = b'prompt,seed\n"a\nb",1\nowl,2\n'
    assert lines(content, "csv") == [
        Line(2, {"prompt": "a\nb", "seed": "1"}),
        Line(4, {"prompt": "owl", "seed": "2"}),
    ]


def test_template_makes_requests_of_rows() -> None:
    template = {"model": "meta/llama", "input": {"prompt": "Tell of {{ row.who }}", "n": "{{ to_number(row.n) }}"}}
    request = request_of({"who": "a fox", "n": "3"}, template)
    assert request == {"model": "meta/llama", "input": {"prompt": "Tell of a fox", "n": 3}}
    check_request(request, allow_loopback_webhooks=False)


@given(st.lists(st.binary(max_size=20)), st.integers(1, 9), st.integers(1, 12))
def test_lines_are_those_of_the_text_however_it_comes_in_pieces(parts: list[bytes], size: int, limit: int) -> None:
    content = b"\n".join(parts)
    expected = content.split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    found = list(read_lines(pieces(content, size), limit))
    assert len(found) == len(expected)
    for line, whole in zip(found, expected, strict=True):
        kept = whole.removesuffix(b"\r")
        assert line == (kept if len(kept) <= limit else None)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00")), min_size=1))
def test_csv_that_is_written_is_read_as_it_was(values: list[str]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerows([["first", "value"], *(["x", value] for value in values)])
    assert [line.value for line in lines(text.getvalue().encode(), "csv")] == [
        {"first": "x", "value": value} for value in values
    ]


@given(st.binary())
def test_whatever_is_in_a_manifest_gives_lines_in_their_order(content: bytes) -> None:
    for kind in ("jsonl", "csv"):
        try:
            numbers = [line.n for line in lines(content, "csv" if kind == "csv" else "jsonl")]
        except ManifestUnreadable:
            continue
        assert numbers == sorted(set(numbers))
