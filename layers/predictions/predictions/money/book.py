"""Price books: entries by key, each with tiers of prices, checked when they are read.

A book is JSON: `{key: entry}`. The keys:

    owner/name                 predictions of a model
    owner/name:version         predictions of one version of it, which come first
    deployment:owner/name      predictions of a deployment
    training:owner/name        trainings by a model; also with a version
    hardware:sku               a second on some hardware

An entry has `date` and `source` (when and where its prices were read), and `tiers`, or for hardware `second`, the price
of a second. The first tier applies whose `when` equals the prediction's metrics; a tier without `when` always applies.
It has `prices` by metric, in dollars for one unit, as decimal strings: a JSON number would be rounded on the way. The
metric `run` counts 1 for a prediction that succeeded. `hardware` names the entry by which `predict_time` is billed.

Only dataclasses, since the functions at each end of a prediction import this module.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

from predictions.errors import PredictionsError
from predictions.ids import NAME

ENTRIES_LIMIT = 400
TIERS_LIMIT = 40
BOOK_LIMIT_BYTES = 64 * 1024
"""A book of a stack is one item, of which each process reads at most 8 units every five minutes."""

PRICE_LIMIT_DOLLARS = 10_000
RUN = "run"
PREDICT_TIME = "predict_time"

_PARTS_LIMIT = 10
_TEXT_LIMIT_CHARACTERS = 300
_MODEL = rf"{NAME}/{NAME}(?::[0-9a-f]{{64}})?"
_SKU = r"[a-z0-9][a-z0-9.-]{0,62}"
# Compiled where a book is checked, not where a price is looked up: that takes longer than all else in this module.
_KEY = rf"(?:training:)?{_MODEL}|deployment:{NAME}/{NAME}|hardware:{_SKU}"
_PRICE = re.compile(r"(?:0|[1-9][0-9]{0,5})(?:\.[0-9]{1,12})?", re.ASCII)
# The metrics that Replicate's own models record for billing, and any name of their form, since new ones are added. A
# criterion is a metric that says which kind of run it was.
_METRIC = re.compile(r"run|predict_time|[a-z][a-z0-9_]{0,50}_(?:count|seconds|metric)", re.ASCII)
_CRITERION = re.compile(r"with_[a-z0-9_]{1,40}|[a-z][a-z0-9_]{0,50}_(?:variant|mode|target)", re.ASCII)

Value = str | bool | int


class BookInvalid(PredictionsError):
    """A price book, or an entry of one, is invalid; the message begins with the field.

    Attributes:
        field: The field, for example `google/veo-3.tiers[0].prices.image_output_count`.
        detail: The value, the rule and the remedy.
    """

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}")
        self.field = field
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Tier:
    """Prices that apply together.

    Attributes:
        when: The metrics that must have these values; empty for a tier that always applies.
        prices: Dollars for one unit, by metric.
        hardware: The sku by which `predict_time` is billed, or None.
    """

    when: Mapping[str, Value]
    prices: Mapping[str, Decimal]
    hardware: str | None = None

    def applies(self, metrics: Mapping[str, Any]) -> bool:
        """Return whether the metrics of a prediction equal all criteria."""
        return all(name in metrics and _same(metrics[name], value) for name, value in self.when.items())


@dataclass(frozen=True, slots=True)
class PriceEntry:
    """The prices of a model, deployment or training, or of hardware.

    Attributes:
        key: Its key in the book.
        date: When its prices were read, `YYYY-MM-DD`.
        source: Where, as a link.
        tiers: Its tiers, in order; none for hardware.
        second: The price of a second on this hardware, or None.
    """

    key: str
    date: str
    source: str
    tiers: tuple[Tier, ...] = ()
    second: Decimal | None = None


class Book:
    """Entries by key. Each is checked when it is looked up first: one that is invalid does not spoil the others.

    Args:
        entries: The entries as JSON has them.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._raw = entries
        self._read: dict[str, PriceEntry] = {}

    def find(self, *keys: str) -> PriceEntry | None:
        """Return the entry of the first key that has one, or None.

        Raises:
            BookInvalid: That entry is invalid.
        """
        for key in keys:
            if key in self._raw:
                if key not in self._read:
                    self._read[key] = _entry(key, self._raw[key])
                return self._read[key]
        return None

    def entries(self) -> list[PriceEntry]:
        """Return all entries, by key.

        Raises:
            BookInvalid: One is invalid.
        """
        return [entry for key in sorted(self._raw) if (entry := self.find(key))]


def parse_book(text: str) -> dict[str, Any]:
    """Parse and check a whole book; return its entries as JSON has them.

    Raises:
        BookInvalid: It is too large, no JSON object, or an entry is invalid.
    """
    if len(text.encode()) > BOOK_LIMIT_BYTES:
        raise BookInvalid("book", f"has {len(text.encode())} bytes, which exceeds the limit of {BOOK_LIMIT_BYTES}.")
    try:
        book = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise BookInvalid("book", f"is not JSON: {error}") from None
    return check_book(book)


def check_book(book: Any) -> dict[str, Any]:
    """Check a book that is parsed; return its entries.

    Raises:
        BookInvalid: It is no object, has too many entries, or one is invalid.
    """
    if not isinstance(book, dict):
        raise BookInvalid("book", f"must be an object of entries by key, not {_kind(book)}.")
    if len(book) > ENTRIES_LIMIT:
        raise BookInvalid("book", f"has {len(book)} entries, which exceeds the limit of {ENTRIES_LIMIT}.")
    for key, entry in book.items():
        read_entry(key, entry)
    return book


def read_entry(key: Any, value: Any) -> PriceEntry:
    """Check an entry and return it.

    Raises:
        BookInvalid: It is invalid.
    """
    if not isinstance(key, str) or not re.fullmatch(_KEY, key, re.ASCII):
        raise BookInvalid(
            _shown(key), "is no key. Use owner/name, owner/name:version, deployment:…, training:… or hardware:sku."
        )
    return _entry(key, value)


def _entry(key: str, value: Any) -> PriceEntry:
    hardware = key.startswith("hardware:")
    needed = {"date", "source", "second" if hardware else "tiers"}
    members = _members(key, value, needed, needed)
    read_at = _date(f"{key}.date", members["date"])
    source = _text(f"{key}.source", members["source"])
    if not source.startswith("https://"):
        raise BookInvalid(f"{key}.source", f"must be a link that begins with https:// (got {_shown(source)}).")
    if hardware:
        return PriceEntry(key, read_at, source, second=read_price(f"{key}.second", members["second"]))
    tiers = members["tiers"]
    if not isinstance(tiers, list) or not 1 <= len(tiers) <= TIERS_LIMIT:
        got = f"{len(tiers)}" if isinstance(tiers, list) else _kind(tiers)
        raise BookInvalid(f"{key}.tiers", f"must be a list of 1 to {TIERS_LIMIT} tiers (got {got}).")
    read = tuple(_tier(f"{key}.tiers[{n}]", tier) for n, tier in enumerate(tiers))
    for n, tier in enumerate(read[:-1]):
        if not tier.when:
            raise BookInvalid(f"{key}.tiers[{n}].when", "is missing, so that no later tier ever applies: put it last.")
        if any(tier.when == later.when for later in read[n + 1 :]):
            raise BookInvalid(f"{key}.tiers[{n}].when", "is that of a later tier too, which would never apply.")
    return PriceEntry(key, read_at, source, read)


def read_price(field: str, value: Any) -> Decimal:
    """Check a price: dollars for one unit, as a decimal string.

    Raises:
        BookInvalid: It is none.
    """
    if not isinstance(value, str) or not _PRICE.fullmatch(value):
        rule = 'must be dollars for one unit as a decimal string such as "0.003", not negative, without exponent'
        raise BookInvalid(field, f"{rule}, with at most 12 decimals (got {_shown(value)}).")
    price = Decimal(value)
    if price > PRICE_LIMIT_DOLLARS:
        raise BookInvalid(field, f"must be at most {PRICE_LIMIT_DOLLARS} dollars for one unit (got {value}).")
    return price


def _tier(field: str, value: Any) -> Tier:
    members = _members(field, value, {"when", "prices", "hardware"}, set())
    when = _named(f"{field}.when", members.get("when", {}), _CRITERION, "criterion")
    for name, wanted in when.items():
        if not isinstance(wanted, str | bool | int) or (isinstance(wanted, str) and not 1 <= len(wanted) <= 100):
            rule = "must be a text of 1 to 100 characters, true, false or a whole number"
            raise BookInvalid(f"{field}.when.{name}", f"{rule} (got {_shown(wanted)}).")
    prices = _named(f"{field}.prices", members.get("prices", {}), _METRIC, "metric")
    hardware = members.get("hardware")
    if hardware is not None:
        if not isinstance(hardware, str) or not re.fullmatch(_SKU, hardware, re.ASCII):
            raise BookInvalid(f"{field}.hardware", f"must be a sku such as gpu-l40s (got {_shown(hardware)}).")
        if PREDICT_TIME in prices:
            raise BookInvalid(f"{field}.hardware", f"bills {PREDICT_TIME}, which `prices` bills too: leave out one.")
    if not prices and hardware is None:
        raise BookInvalid(field, "must have `prices`, `hardware`, or both.")
    return Tier(when, {name: read_price(f"{field}.prices.{name}", price) for name, price in prices.items()}, hardware)


def _named(field: str, value: Any, pattern: re.Pattern[str], word: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BookInvalid(field, f"must be an object (got {_kind(value)}).")
    if len(value) > _PARTS_LIMIT:
        raise BookInvalid(field, f"has {len(value)} members, which exceeds the limit of {_PARTS_LIMIT}.")
    for name in value:
        if not isinstance(name, str) or not pattern.fullmatch(name):
            examples = {
                "criterion": "model_variant, resolution_target, motion_mode and with_audio",
                "metric": "run, predict_time, image_output_count and video_output_duration_seconds",
            }[word]
            raise BookInvalid(f"{field}.{_shown(name)}", f"is no {word} of Replicate, such as {examples}.")
    return value


def _members(field: str, value: Any, known: set[str], needed: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BookInvalid(field, f"must be an object (got {_kind(value)}).")
    if unknown := [name for name in value if name not in known]:
        raise BookInvalid(f"{field}.{_shown(unknown[0])}", f"is unknown. Known are {', '.join(sorted(known))}.")
    if missing := sorted(needed - value.keys()):
        raise BookInvalid(f"{field}.{missing[0]}", "is missing.")
    return value


def _date(field: str, value: Any) -> str:
    try:
        if isinstance(value, str) and len(value) == len("2026-01-31"):
            return date.fromisoformat(value).isoformat()
    except ValueError:
        pass
    raise BookInvalid(field, f"must be a date such as 2026-01-31 (got {_shown(value)}).")


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= _TEXT_LIMIT_CHARACTERS or not value.isprintable():
        raise BookInvalid(field, f"must be a text of 1 to {_TEXT_LIMIT_CHARACTERS} characters (got {_shown(value)}).")
    return value


def _same(reported: Any, wanted: Value) -> bool:
    # True is not 1, although Python says so.
    return type(reported) is type(wanted) and reported == wanted


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:100]!r} is given twice")
    return members


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}.get(
        type(value), "a number"
    )


def _shown(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except (TypeError, ValueError):
        text = _kind(value)
    shown = "".join(each if each.isprintable() else "?" for each in text[:80])
    return shown if len(text) <= 80 else f"{shown}…"
