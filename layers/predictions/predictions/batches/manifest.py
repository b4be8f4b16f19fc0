"""Manifests: the requests of a batch, one on each line, untrusted.

Two formats: JSONL, a JSON value in each line, and CSV (RFC 4180) with a header. A line is a request as the requests
queue accepts it, or a row from which a template or a recipe builds one. An error in a line affects that line only: the
line is rejected with its number and the reason, and the others go on.
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
"""The longest line; a file belongs in a bucket, and its URL in the line."""

LINES_LIMIT = 100_000
"""The limit of lines: a number that one function can read twice in its time, with a reserve."""

MANIFEST_LIMIT_BYTES = 1024**3
"""The largest manifest."""

# A line's step budget takes half a second: prepare_batch has minutes, and only its own batch waits for it.
_FILL_SECONDS = 20.0
REASON_LIMIT = 1000
"""The longest reason of a refused line, in characters."""

Format = Literal["jsonl", "csv"]


class ManifestUnreadable(PredictionsError):
    """The manifest has no readable lines; the error's text is the reason, for its author."""


class LineRefused(PredictionsError):
    """The line is invalid; the error's text is the reason."""


@dataclass(frozen=True)
class Line:
    """A line of a manifest.

    Attributes:
        n: Its number, from 1: the line in the file, for a row its first line.
        value: A request or a row; None if `error` is given.
        error: Why the line is unreadable.
    """

    n: int
    value: Any = None
    error: str | None = None


def lines_of(pieces: Iterable[bytes], kind: Format) -> Iterator[Line]:
    """Yield the lines of a manifest in order; empty ones are skipped but numbered.

    Raises:
        ManifestUnreadable: A CSV without a header that names its columns.
    """
    numbered = enumerate(read_lines(_without_mark(pieces), LINE_LIMIT_BYTES), 1)
    yield from _json_lines(numbered) if kind == "jsonl" else _csv_lines(numbered)


def request_of(value: Any, template: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the request in a line.

    Args:
        value: The line's own value.
        template: A request with placeholders over `row`; None if the line is the request.

    Raises:
        LineRefused: The line gives no valid request.
    """
    row = _row(value)
    if template is None:
        return row
    from predictions.intents.labels import filled_labels  # only with a template
    from predictions.templating import Allowance, PlaceholderError, TooSlow, fill  # as above

    try:
        made = fill(template, {"row": row}, Allowance(seconds=_FILL_SECONDS))
    except (PlaceholderError, TooSlow) as error:
        raise LineRefused(str(error)[:REASON_LIMIT]) from None
    return {**made, "labels": filled_labels(made["labels"])} if "labels" in made else dict(made)


def request_by(recipe: "Recipe", value: Any) -> tuple[dict[str, Any], str | None]:
    """Return the request that a recipe builds from a line, and its output prefix.

    Raises:
        LineRefused: The line gives no valid request.
    """
    from predictions.templating import Allowance, PlaceholderError, TooSlow

    context, allowance = {"row": _row(value)}, Allowance(seconds=_FILL_SECONDS)
    try:
        return recipe.request(context, allowance), recipe.output_prefix(context, allowance)
    except (PlaceholderError, TooSlow) as error:
        raise LineRefused(str(error)[:REASON_LIMIT]) from None


def _row(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LineRefused("The line must be a JSON object.")
    return value


def check_request(request: dict[str, Any], *, allow_loopback_webhooks: bool) -> None:
    """Validate a line's request as the requests queue will.

    Raises:
        LineRefused: The queue would reject the request.
    """
    size = len(json.dumps(request, separators=(",", ":"), ensure_ascii=False).encode())
    if size > BODY_LIMIT_BYTES:
        raise LineRefused(f"The request exceeds the limit of {BODY_LIMIT_BYTES} bytes (got {size}).")
    if "idempotency_key" in request:
        raise LineRefused("idempotency_key: Not allowed in a line, which has a key of its own for retries. Remove it.")
    try:
        create_requested_intent(
            request, owner="", source="batch", source_key="", allow_loopback_webhooks=allow_loopback_webhooks
        )
    except Problem as problem:
        raise LineRefused(_of_a_line(problem.detail)) from None


def _without_mark(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Remove the byte order mark that Windows tools put first."""
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
    # The source counts a row's bytes and reports errors.
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
                row, source.error = [""], source.error or f"Not valid CSV: {error}."
            if header is None:
                if not row:
                    continue
                header = _header(row, source.error)
            elif source.error:
                yield Line(source.first, error=source.error)
            elif len(row) not in (0, len(header)):
                yield Line(source.first, error=f"The row has {len(row)} fields, but the header has {len(header)}.")
            elif row:
                yield Line(source.first, dict(zip(header, row, strict=True)))
        if header is None:
            raise ManifestUnreadable("The manifest is empty. A CSV must begin with a header that names its columns.")
    finally:
        csv.field_size_limit(previous_limit)


class _CsvSource:
    """Lines for the CSV reader, with the position and error that the reader cannot report.

    Attributes:
        first: The line on which the current row begins.
        error: The error in the current row.
    """

    def __init__(self, numbered: Iterator[tuple[int, bytes | None]]) -> None:
        self._numbered = numbered
        self.begin()

    def begin(self) -> None:
        """Begin a new row."""
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
            # With an unclosed quote, all following lines would become part of this row. The reader discards its partial
            # row when its source fails, and starts again with the next line.
            raise csv.Error(f"the row exceeds {LINE_LIMIT_BYTES} bytes, possibly because of an unclosed quote")
        try:
            return line.decode() + "\n"
        except UnicodeDecodeError:
            self.error = self.error or "Not valid UTF-8."
            return line.decode(errors="replace") + "\n"


def _header(row: list[str], error: str) -> list[str]:
    names = [name.strip() for name in row]
    if error:
        raise ManifestUnreadable(f"The header is not readable. {error}")
    if len(set(names)) != len(names) or not all(re.fullmatch(r"[^\x00-\x1f\x7f]{1,256}", name) for name in names):
        raise ManifestUnreadable("The header must name each column once, in at most 256 characters.")
    return names


_TOO_LONG = f"The line exceeds the limit of {LINE_LIMIT_BYTES} bytes. Pass large files as URLs."


def _of_a_line(detail: str) -> str:
    return detail.replace("The body", "The line")[:REASON_LIMIT]
