"""Entries of a list are read whatever surrounds them, and what is no list is refused."""

import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from predictions.upstream.entry_scanner import NAMES, TEXT_LIMIT_BYTES, Entry, EntryScanner, MalformedListError


def scan(text: bytes, *, size: int = 65536, single: bool = False) -> tuple[list[Entry], Any]:
    scanner = EntryScanner(single=single)
    entries = []
    for start in range(0, len(text), size):
        entries += list(scanner.feed(text[start : start + size]))
    scanner.finish()
    assert scanner.has_results
    return entries, scanner.following


def page(*entries: Any, following: Any = None) -> bytes:
    return json.dumps({"previous": None, "next": following, "results": list(entries)}).encode()


ENTRY = {
    "id": "abc",
    "status": "starting",
    "created_at": "2026-01-01T00:00:00Z",
    "webhook": 'https://example.com/"quoted"\\',
    "input": {"prompt": 'a "fox" \\', "list": [[1, 2], {"id": "inner", "webhook": "inner"}]},
    "output": None,
    "logs": ']}"{[' * 30,
    "urls": {"get": "https://api.replicate.com/v1/predictions/abc"},
    "data_removed": False,
}

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*NAMES, "input", "x", 'a"\\']) | st.text(), inner),
    max_leaves=12,
)
entries = st.dictionaries(st.sampled_from([*NAMES, "input", "output", "logs", 'odd"']), values)


class TestEntries:
    @pytest.mark.slow
    @given(st.lists(entries, max_size=4), st.none() | st.text(), st.integers(1, 40), st.booleans())
    @settings(max_examples=300, deadline=None)
    def test_fields_and_inputs_of_any_entries_in_pieces_of_any_size_are_those_that_json_has(
        self, listed: list[dict[str, Any]], following: str | None, size: int, ascii_: bool
    ) -> None:
        text = json.dumps({"next": following, "results": listed}, ensure_ascii=ascii_, indent=1).encode(
            "utf-8", "surrogatepass"
        )
        found, next_ = scan(text, size=size)
        assert next_ == following
        assert len(found) == len(listed)
        for got, given_ in zip(found, listed, strict=True):
            kept = {n: v for n, v in given_.items() if n in NAMES and (v is None or isinstance(v, bool | str))}
            assert got.fields == kept
            assert got.unreadable == {n for n in given_ if n in NAMES and n not in kept}
            wanted = given_.get("input")
            if isinstance(wanted, dict | list):
                assert got.input_json is not None
                assert json.loads(got.input_json) == wanted

    @pytest.mark.parametrize("size", [1, 7, 65536])
    def test_entry_in_pieces_of_any_size_is_read(self, size: int) -> None:
        found, following = scan(page(ENTRY, ENTRY, following="https://next"), size=size)
        assert following == "https://next"
        assert [entry.fields["id"] for entry in found] == ["abc", "abc"]
        assert found[0].fields["webhook"] == ENTRY["webhook"]
        assert json.loads(found[1].input_json or b"") == ENTRY["input"]

    def test_single_prediction_is_one_entry(self) -> None:
        (entry,), _ = scan(json.dumps(ENTRY).encode(), single=True)
        assert entry.fields["webhook"] == ENTRY["webhook"]
        assert json.loads(entry.input_json or b"") == ENTRY["input"]

    def test_long_text_is_skipped_and_named(self) -> None:
        (entry,), _ = scan(page({"logs": "x" * 10**6, "webhook": "w" * (TEXT_LIMIT_BYTES + 1), "id": "a"}))
        assert entry.fields == {"id": "a"}
        assert entry.unreadable == {"webhook"}

    def test_input_that_is_too_large_is_not_kept(self) -> None:
        (entry,), _ = scan(page({"input": {"prompt": "x" * 10**6}, "id": "a"}))
        assert entry.input_json is None


class TestRefused:
    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b"<html>",
            b"[]",
            b'"results"',
            b'{"results": {}}',
            b'{"results": null}',
            b'{"results": [1]}',
            b'{"results": [[]]}',
            b'{"results": ["a"]}',
            b'{"results": []',
            b'{"results": [{"id": "a"}',
            b'{"results": [{"id": "a"},]}',
            b'{"results": [{"id": "a",}]}',
            b'{"results": [{"id" "a"}]}',
            b'{"results": [{"id": a}]}',
            b'{"results": [{"id": "a"}]} x',
            b'{"results": [{"id": "a"}]}{',
            b'{"results": [], "results": []}',
            b'{"results": [{"output": [[1, 2]',
            b'{"results": [{"logs": "abc',
            b'{"results": [{"logs": "abc\\"}]}',
            b"{'results': []}",
            b'{"results": []]}',
        ],
    )
    @pytest.mark.parametrize("size", [1, 65536])
    def test_text_that_is_no_list_of_objects_is_refused(self, text: bytes, size: int) -> None:
        with pytest.raises(MalformedListError):
            scan(text, size=size)

    def test_page_without_results_has_none(self) -> None:
        scanner = EntryScanner()
        assert list(scanner.feed(b'{"detail": "no"}')) == []
        scanner.finish()
        assert not scanner.has_results


MEGABYTES = 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "piece"),
    [
        ("polygons", b"[1234,1567],"),
        ("empty lists", b"[],"),
        ("word timestamps", b'{"word": "fox", "start": 12.34, "end": 12.56},'),
        ("short strings", b'"a",'),
        ("escaped quotes", b'"\\"\\\\",'),
        ("one long string", b"x"),
    ],
)
def test_entry_of_60_mb_takes_little_memory_and_seconds(kind: str, piece: bytes, record_property: Any) -> None:
    count = MEGABYTES * 1024 * 1024 // len(piece)
    inner = b'"' + piece * count + b'"' if kind == "one long string" else b"[" + piece * count + b"0]"
    head, tail = b'{"next": null, "results": [{"id": "a", "output": ', b', "webhook": "w"}]}'
    scanner = EntryScanner()
    tracemalloc.start()
    began = time.process_time()
    found = list(scanner.feed(head))
    for start in range(0, len(inner), 65536):
        found += list(scanner.feed(inner[start : start + 65536]))
    found += list(scanner.feed(tail))
    scanner.finish()
    seconds = time.process_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    record_property("megabytes", MEGABYTES)
    assert [entry.fields for entry in found] == [{"id": "a", "webhook": "w"}]
    assert peak < 8 * 1024 * 1024
    assert seconds < 30
