"""Manifests: what a batch is to run, one request a line, as strangers write it.

Two forms: JSONL, a JSON value in each line, and CSV (RFC 4180) with a header. A line is a request as the requests
queue takes it, or a row from which a template or a recipe makes one. Whatever is wrong with a line is that line's own
affair: it is refused with its number and the reason, and the others go on.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from predictions.batches.files import read_lines
from predictions.errors import PredictionsError, Problem
from predictions.intents.model import create_requested_intent
from predictions.validation import BODY_LIMIT_BYTES, parse_json

if TYPE_CHECKING:
    from predictions.recipes.store import Recipe

LINE_LIMIT_BYTES = 1024 * 1024
"""The longest line; a file belongs into a bucket, and its URL into the line."""

LINES_LIMIT = 100_000
"""The most lines: what one function can look at twice in its time, with some to spare."""

MANIFEST_LIMIT_BYTES = 1024**3
"""The largest manifest."""

# The steps of a line's allowance take half a second: prepare_batch has minutes, and only its batch waits for it.
_FILL_SECONDS = 20.0
_REASON_LIMIT = 1000

Format = Literal["jsonl", "csv"]


class ManifestUnreadable(PredictionsError):
    """A manifest of which no line can be told; its text is the reason, for the person who wrote it."""


class LineRefused(PredictionsError):
    """A line that cannot run; its text is the reason."""


@dataclass(frozen=True)
class Line:
    """A line of a manifest.

    Attributes:
        n: Its number, from 1: the line in the file, or that on which a row begins.
        value: A request or a row; None where `error` is given.
        error: Why it cannot be read.
    """

    n: int
    value: Any = None
    error: str | None = None


def lines_of(pieces: Iterable[bytes], kind: Format) -> Iterator[Line]:
    """The lines of a manifest, in their order; empty ones are passed over, and counted.

    Raises:
        ManifestUnreadable: A CSV without a header that names its columns.
    """
    numbered = enumerate(read_lines(_without_mark(pieces), LINE_LIMIT_BYTES), 1)
    yield from _json_lines(numbered) if kind == "jsonl" else _csv_lines(numbered)


def request_of(value: Any, template: Mapping[str, Any] | None) -> dict[str, Any]:
    """The request that a line asks for.

    Args:
        value: The line's own value.
        template: A request with placeholders over `row`; None where the line is the request.

    Raises:
        LineRefused: There is none.
    """
    row = _row(value)
    if template is None:
        return row
    from predictions.templating import Allowance, PlaceholderError, TooSlow, fill  # only with a template

    try:
        made = fill(template, {"row": row}, Allowance(seconds=_FILL_SECONDS))
    except (PlaceholderError, TooSlow) as error:
        raise LineRefused(str(error)[:_REASON_LIMIT]) from None
    return dict(made)


def request_by(recipe: "Recipe", value: Any) -> tuple[dict[str, Any], str | None]:
    """The request that a recipe makes of a line, and where its results go.

    Raises:
        LineRefused: There is none.
    """
    from predictions.templating import Allowance, PlaceholderError, TooSlow

    context, allowance = {"row": _row(value)}, Allowance(seconds=_FILL_SECONDS)
    try:
        return recipe.request(context, allowance), recipe.output_prefix(context, allowance)
    except (PlaceholderError, TooSlow) as error:
        raise LineRefused(str(error)[:_REASON_LIMIT]) from None


def _row(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LineRefused("The line has to be a JSON object.")
    return value


def check_request(request: dict[str, Any], *, allow_loopback_webhooks: bool) -> None:
    """Checks the form of a line's request, as the requests queue will.

    Raises:
        LineRefused: It would be refused there.
    """
    size = len(json.dumps(request, separators=(",", ":"), ensure_ascii=False).encode())
    if size > BODY_LIMIT_BYTES:
        raise LineRefused(f"Its request has {size} bytes, and {BODY_LIMIT_BYTES} are taken.")
    if "idempotency_key" in request:
        raise LineRefused("idempotency_key: A line has a key of its own, by which a retry knows it: leave it out.")
    try:
        create_requested_intent(
            request, owner="", source="batch", source_key="", allow_loopback_webhooks=allow_loopback_webhooks
        )
    except Problem as problem:
        raise LineRefused(_of_a_line(problem.detail)) from None


def _without_mark(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """A text without the byte order mark that Windows puts first."""
    start: bytes | None = b""
    for piece in pieces:
        if start is None:
            yield piece
        elif len(start := start + piece) >= 3:
            yield start.removeprefix(b"\xef\xbb\xbf")
            start = None
    if start:
        yield start


def _json_lines(numbered: Iterator[tuple[int, bytes | None]]) -> Iterator[Line]:
    for n, line in numbered:
        if line is None:
            yield Line(n, error=_TOO_LONG)
        elif line.strip(b" \t\r"):
            try:
                yield Line(n, parse_json(line, None))
            except Problem as problem:
                yield Line(n, error=_of_a_line(problem.detail))


def _csv_lines(numbered: Iterator[tuple[int, bytes | None]]) -> Iterator[Line]:
    source = _CsvSource(numbered)
    rows = csv.reader(source, strict=True)
    # The source counts a row's bytes, and says what is wrong.
    previous_limit = csv.field_size_limit(2 * LINE_LIMIT_BYTES)
    try:
        header: list[str] | None = None
        while True:
            source.begin()
            try:
                row = next(rows)
            except StopIteration:
                break
            except csv.Error as error:
                row, source.error = [""], source.error or f"It is not CSV: {error}."
            if header is None:
                if not row:
                    continue
                header = _header(row, source.error)
            elif source.error:
                yield Line(source.first, error=source.error)
            elif len(row) not in (0, len(header)):
                yield Line(source.first, error=f"It has {len(row)} fields, and the header {len(header)}.")
            elif row:
                yield Line(source.first, dict(zip(header, row, strict=True)))
        if header is None:
            raise ManifestUnreadable("The manifest is empty: a CSV begins with a header that names its columns.")
    finally:
        csv.field_size_limit(previous_limit)


class _CsvSource:
    """Lines for the CSV reader, and what it cannot be told of them.

    Attributes:
        first: The line on which the current row begins.
        error: What is wrong with the current row.
    """

    def __init__(self, numbered: Iterator[tuple[int, bytes | None]]) -> None:
        self._numbered = numbered
        self.begin()

    def begin(self) -> None:
        """A new row."""
        self.first, self.error, self._bytes = 0, "", 0

    def __iter__(self) -> "_CsvSource":
        return self

    def __next__(self) -> str:
        n, line = next(self._numbered)
        self.first = self.first or n
        if line is None:
            self.error = self.error or _TOO_LONG
            return "\n"
        self._bytes += len(line) + 1
        if self._bytes > LINE_LIMIT_BYTES + 1:
            # With a quote not closed, all that follows would become part of this row. The reader forgets what it has of
            # a row when its source fails, and begins anew with the next line.
            raise csv.Error(f"the row has more than {LINE_LIMIT_BYTES} bytes; a quote may not be closed")
        try:
            return line.decode() + "\n"
        except UnicodeDecodeError:
            self.error = self.error or "It is not UTF-8."
            return line.decode(errors="replace") + "\n"


def _header(row: list[str], error: str) -> list[str]:
    names = [name.strip() for name in row]
    if error:
        raise ManifestUnreadable(f"The header cannot be read. {error}")
    if len(set(names)) != len(names) or not all(re.fullmatch(r"[^\x00-\x1f\x7f]{1,256}", name) for name in names):
        raise ManifestUnreadable("The header has to name each column, once, in at most 256 characters.")
    return names


_TOO_LONG = f"It has more than {LINE_LIMIT_BYTES} bytes: give large files as URLs."


def _of_a_line(detail: str) -> str:
    return detail.replace("The body", "The line")[:_REASON_LIMIT]
