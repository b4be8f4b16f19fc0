"""Price books: what is refused, by which field, and that the shipped one says when and where each price was read."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from predictions.money.book import (
    BOOK_LIMIT_BYTES,
    ENTRIES_LIMIT,
    Book,
    BookInvalid,
    check_book,
    parse_book,
    read_price,
)

READ = {"date": "2026-10-05", "source": "https://replicate.com/pricing"}
PRICED = {"prices": {"image_output_count": "0.003"}}


def entry(**members: Any) -> dict[str, Any]:
    """A valid entry, with other members."""
    return {**READ, "tiers": [PRICED], **members}


def tiers(*several: Any) -> dict[str, Any]:
    """A book of one model with these tiers."""
    return {"o/m": entry(tiers=list(several))}


@pytest.mark.parametrize(
    ("book", "field", "detail"),
    [
        ([], "book", "must be an object of entries by key, not a list"),
        (None, "book", "not null"),
        ({"flux": entry()}, "flux", "is no key"),
        ({"o/m:abc": entry()}, "o/m:abc", "is no key"),
        ({"hardware:GPU": entry()}, "hardware:GPU", "is no key"),
        ({"o/m\n": entry()}, "o/m?", "is no key"),
        ({"o/m": 5}, "o/m", "must be an object (got a number)"),
        ({"o/m": entry(note="x")}, "o/m.note", "is unknown. Known are date, source, tiers."),
        ({"o/m": {"date": "2026-10-05", "tiers": [PRICED]}}, "o/m.source", "is missing"),
        ({"o/m": entry(date="2026-13-05")}, "o/m.date", "must be a date such as 2026-01-31 (got 2026-13-05)"),
        ({"o/m": entry(date=20261005)}, "o/m.date", "must be a date"),
        ({"o/m": entry(source="http://replicate.com")}, "o/m.source", "begins with https://"),
        ({"o/m": entry(source="https://" + "x" * 300)}, "o/m.source", "1 to 300 characters"),
        ({"o/m": entry(tiers={})}, "o/m.tiers", "a list of 1 to 40 tiers (got an object)"),
        ({"o/m": entry(tiers=[])}, "o/m.tiers", "got 0"),
        ({"o/m": entry(tiers=[PRICED] * 41)}, "o/m.tiers", "got 41"),
        (tiers(7), "o/m.tiers[0]", "must be an object (got a number)"),
        (tiers({}), "o/m.tiers[0]", "must have `prices`, `hardware`, or both"),
        (tiers({"price": {}}), "o/m.tiers[0].price", "is unknown"),
        (tiers({"prices": []}), "o/m.tiers[0].prices", "must be an object (got a list)"),
        (tiers({"prices": {"images": "1"}}), "o/m.tiers[0].prices.images", "is no metric of Replicate"),
        (tiers({"prices": {"run": "-0.1"}}), "o/m.tiers[0].prices.run", "not negative, without exponent"),
        (tiers({"prices": {"run": 0.003}}), "o/m.tiers[0].prices.run", "decimal string"),
        (tiers({"prices": {"run": "$0.003"}}), "o/m.tiers[0].prices.run", "decimal string"),
        (tiers({"prices": {"run": "1e-3"}}), "o/m.tiers[0].prices.run", "decimal string"),
        (tiers({"prices": {"run": "NaN"}}), "o/m.tiers[0].prices.run", "decimal string"),
        (tiers({"prices": {"run": "Infinity"}}), "o/m.tiers[0].prices.run", "decimal string"),
        (tiers({"prices": {"run": "0,003"}}), "o/m.tiers[0].prices.run", "decimal string"),
        (tiers({"prices": {"run": "٣"}}), "o/m.tiers[0].prices.run", "decimal string"),
        (tiers({"prices": {"run": " 1"}}), "o/m.tiers[0].prices.run", "decimal string"),
        (tiers({"prices": {"run": ""}}), "o/m.tiers[0].prices.run", "decimal string"),
        (tiers({"prices": {"run": "0.0000000000001"}}), "o/m.tiers[0].prices.run", "at most 12 decimals"),
        (tiers({"prices": {"run": "9" * 40}}), "o/m.tiers[0].prices.run", "decimal string"),
        (tiers({"prices": {"run": "10000.01"}}), "o/m.tiers[0].prices.run", "at most 10000 dollars"),
        (
            tiers({"prices": {f"a{n}_count": "1" for n in range(11)}}),
            "o/m.tiers[0].prices",
            "exceeds the limit of 10",
        ),
        (tiers({**PRICED, "when": {"prompt": "x"}}), "o/m.tiers[0].when.prompt", "is no criterion of Replicate"),
        (tiers({**PRICED, "when": {"with_audio": None}}), "o/m.tiers[0].when.with_audio", "got null"),
        (tiers({**PRICED, "when": {"with_audio": 0.5}}), "o/m.tiers[0].when.with_audio", "got 0.5"),
        (tiers({**PRICED, "when": {"model_variant": ""}}), "o/m.tiers[0].when.model_variant", "1 to 100 characters"),
        (tiers(PRICED, PRICED), "o/m.tiers[0].when", "no later tier ever applies: put it last"),
        (
            tiers({**PRICED, "when": {"with_audio": True}}, {**PRICED, "when": {"with_audio": True}}, PRICED),
            "o/m.tiers[0].when",
            "that of a later tier too",
        ),
        (tiers({"hardware": "T4!"}), "o/m.tiers[0].hardware", "a sku such as gpu-l40s"),
        (tiers({"hardware": "gpu-t4", "prices": {"predict_time": "1"}}), "o/m.tiers[0].hardware", "leave out one"),
        ({"hardware:gpu-t4": entry()}, "hardware:gpu-t4.tiers", "is unknown. Known are date, second, source."),
        ({"hardware:gpu-t4": {**READ, "second": "-1"}}, "hardware:gpu-t4.second", "not negative"),
        ({f"o/m{n}": entry() for n in range(ENTRIES_LIMIT + 1)}, "book", "has 401 entries, which exceeds"),
    ],
)
def test_invalid_book_is_refused_with_the_field(book: Any, field: str, detail: str) -> None:
    with pytest.raises(BookInvalid) as refused:
        check_book(book)
    assert refused.value.field == field
    assert detail in refused.value.detail
    assert str(refused.value).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ('{"o/m": {}, "o/m": {}}', "'o/m' is given twice"),
        ("[" * 20_000, "is not JSON"),
        ("[" * 100_000, "exceeds the limit"),
        (json.dumps({f"o/m{n}": n for n in range(1_000_000)}), "exceeds the limit of 65536"),
    ],
)
def test_text_that_is_no_book_is_refused_at_once(text: str, detail: str) -> None:
    began = time.process_time()
    with pytest.raises(BookInvalid, match=detail):
        parse_book(text)
    assert time.process_time() - began < 1


def test_largest_book_is_read_in_a_fraction_of_a_second() -> None:
    text = json.dumps({f"owner/model-{n}": entry() for n in range(ENTRIES_LIMIT)}, separators=(",", ":"))
    assert len(text) <= BOOK_LIMIT_BYTES
    began = time.process_time()
    assert len(parse_book(text)) == ENTRIES_LIMIT
    assert time.process_time() - began < 1


def test_value_of_a_refusal_is_shortened_and_holds_no_control_characters() -> None:
    with pytest.raises(BookInvalid) as refused:
        read_price("o/m.price", "\x1b[2J" + "9" * 5000)
    assert len(str(refused.value)) < 300
    assert str(refused.value).isprintable()


def test_book_finds_the_first_of_several_keys() -> None:
    book = Book({"o/m": entry(), "o/other": entry()})
    assert (found := book.find("o/m:" + "a" * 64, "o/m")) is not None
    assert found.key == "o/m"
    assert book.find("o/none") is None
    assert [each.key for each in book.entries()] == ["o/m", "o/other"]


@given(st.text("0123456789.-+eE_ ", max_size=12))
def test_price_that_is_taken_is_a_plain_decimal(text: str) -> None:
    try:
        price = read_price("price", text)
    except BookInvalid:
        return
    assert 0 <= price <= 10_000
    assert set(text) <= set("0123456789.")
