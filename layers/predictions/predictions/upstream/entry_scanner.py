"""Scanner of Replicate's lists: reads entries in pieces, skipping large values.

A page of a list holds the whole input and output of a hundred predictions. One output of 60 MB, or of millions of
nested numbers, would take the memory and the time of a small function when parsed. So nested values are skipped, piece
by piece, by operations that run in C: whole strings are cut out by one substitution, everything but brackets is deleted
by a translation, and a running sum finds out whether the value can end in this piece. Only a piece in which a nested
value does end is looked at bracket by bracket.

Skipped values are not validated. Their surroundings are: a page that is cut short or malformed is refused.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from predictions.errors import PredictionsError

NAMES = ("id", "status", "created_at", "version", "model", "deployment", "webhook", "data_removed")
"""The fields of an entry that are kept: strings, true, false and null."""

INPUT_LIMIT_BYTES = 512 * 1024
"""The largest input that is kept: the table's readers parse it."""

TEXT_LIMIT_BYTES = 8192
"""The longest string that is kept of the other fields."""

_BLOCK_BYTES = 16 * 1024
_BUFFER_LIMIT_BYTES = 1024 * 1024

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_STRINGS = re.compile(_STRING, re.DOTALL)
_TOKEN = re.compile(rb"[ \t\r\n]*+(?:(%s)|([{}\[\]:,])|([-+.0-9A-Za-z]++))" % _STRING, re.DOTALL)
_BLANKS = re.compile(rb"[ \t\r\n]*+")
# Up to the end of a string, or to a backslash whose partner is not here yet.
_REST_OF_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_BRACKETS = re.compile(rb"%s|[{}\[\]]" % _STRING, re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))
_STEPS = {ord("{"): 1, ord("["): 1, ord("}"): -1, ord("]"): -1}


class MalformedListError(PredictionsError):
    """A text is not the JSON of a list or a prediction; the message says why."""


@dataclass(frozen=True)
class Entry:
    """A prediction as a list shows it.

    Attributes:
        fields: Those of `NAMES` that are there: a string, a bool or None. A value of another kind is left out, as is a
            longer string than `TEXT_LIMIT_BYTES`, whose name is in `unreadable` then.
        unreadable: Names of fields that are there, and could not be kept.
        input_json: The input's JSON; None where it is absent or larger than `INPUT_LIMIT_BYTES`.
    """

    fields: dict[str, Any]
    unreadable: frozenset[str] = frozenset()
    input_json: bytes | None = None


class EntryScanner:
    """Reads a page's entries, as its bytes arrive.

    Args:
        single: Whether the text is one prediction and not a page of them.

    Attributes:
        following: The page's `next`, as it is there: a string, None, or `...` (Ellipsis) if absent.
        has_results: Whether a list `results` has begun.
    """

    def __init__(self, *, single: bool = False) -> None:
        self.following: Any = ...
        self.has_results = single
        self._single = single
        self._entry_depth = 1 if single else 3
        self._buffer = b""
        self._stack: list[int] = []
        self._expects = "value"
        self._key = ""
        self._fields: dict[str, Any] = {}
        self._unreadable: set[str] = set()
        self._input: bytes | None = None
        # Of a value that is skipped: its depth, whether a string is open, and the part that is collected.
        self._depth = 0
        self._in_string = False
        self._kept: bytearray | None = None
        # A string of an entry that is longer than the buffer.
        self._in_long_text = False

    def feed(self, piece: bytes) -> Iterator[Entry]:
        """Take the next bytes; yield each entry that they complete.

        Raises:
            MalformedListError: The text is not such JSON.
        """
        for start in range(0, len(piece), _BLOCK_BYTES):
            self._buffer += piece[start : start + _BLOCK_BYTES]
            yield from self._read()
            if len(self._buffer) > _BUFFER_LIMIT_BYTES:
                raise MalformedListError("a token is larger than can be held")

    def finish(self) -> None:
        """Check that the text is complete.

        Raises:
            MalformedListError: It is not.
        """
        if self._expects != "end" or self._depth or self._in_long_text or self._buffer.strip(b" \t\r\n"):
            raise MalformedListError("the JSON is not complete")

    def _read(self) -> Iterator[Entry]:
        while self._buffer:
            if self._depth:
                if not self._skip():
                    return
            elif self._in_long_text:
                if not self._skip_text():
                    return
            else:
                yield from self._walk()
                if not self._skips:
                    return

    @property
    def _skips(self) -> bool:
        return self._depth > 0 or self._in_long_text

    # -- what is skipped --------------------------------------------------------------------------------------

    def _take(self, end: int) -> None:
        """Consume the buffer up to there, collecting an input that is small enough."""
        if self._kept is not None:
            self._kept += self._buffer[:end]
            if len(self._kept) > INPUT_LIMIT_BYTES:
                self._kept = None
        self._buffer = self._buffer[end:]

    def _skip(self) -> bool:
        """Skip as much of a nested value as is here; return whether to go on at once."""
        if self._in_string:
            end = _REST_OF_STRING.match(self._buffer).end()  # type: ignore[union-attr]  # it matches anything
            if end < len(self._buffer) and self._buffer[end : end + 1] == b'"':
                self._in_string = False
                self._take(end + 1)
                return True
            self._take(end)
            return False
        bare = _STRINGS.sub(b"", self._buffer)
        structure, quote, text = bare.partition(b'"')
        depths = list(
            accumulate(map(_STEPS.__getitem__, structure.translate(None, _NOT_BRACKETS)), initial=self._depth)
        )
        if min(depths) > 0:
            self._depth = depths[-1]
            if quote:
                # The rest is in a string that goes on: a backslash at its end waits for its partner.
                self._in_string = True
                rest = _REST_OF_STRING.match(text)
                self._take(len(self._buffer) - (len(text) - rest.end() if rest else 0))
                return False
            self._take(len(self._buffer))
            return False
        for found in _BRACKETS.finditer(self._buffer):
            start, end = found.span()
            if end - start == 1:
                self._depth += _STEPS[self._buffer[start]]
            if self._depth == 0:
                self._take(end)
                break
        if self._kept is not None and self._key == "input":
            self._input = bytes(self._kept)
        self._kept = None
        return True

    def _skip_text(self) -> bool:
        end = _REST_OF_STRING.match(self._buffer).end()  # type: ignore[union-attr]  # it matches anything
        if end < len(self._buffer) and self._buffer[end : end + 1] == b'"':
            self._in_long_text = False
            self._buffer = self._buffer[end + 1 :]
            self._value(...)
            return True
        self._buffer = self._buffer[end:]
        return False

    # -- what surrounds it ------------------------------------------------------------------------------------

    def _walk(self) -> Iterator[Entry]:
        """Read tokens until a nested value begins, or the buffer ends."""
        at = 0
        buffer = self._buffer
        while True:
            found = _TOKEN.match(buffer, at)
            if found is None or (found.end() == len(buffer) and found[3]):
                # A token that may go on in the next piece. Of a long text no more is kept.
                at = _BLANKS.match(buffer, at).end()  # type: ignore[union-attr]  # it matches anything
                if found is None and at < len(buffer):
                    if buffer[at : at + 1] != b'"':
                        raise MalformedListError("unexpected characters")
                    if len(buffer) - at > 4 * TEXT_LIMIT_BYTES and self._expects in ("value", "value or end"):
                        self._in_long_text = True
                        at += 1
                self._buffer = buffer[at:]
                return
            at = found.end()
            text, mark, word = found.groups()
            if text is not None:
                self._text(text)
            elif word is not None:
                self._value(_word(word))
            elif mark in (b"{", b"["):
                if not self._opens(mark):
                    self._depth = 1
                    if self._key == "input" and len(self._stack) == self._entry_depth:
                        self._kept = bytearray(mark)
                    self._value(..., nested=True)
                    self._buffer = buffer[at:]
                    return
            elif mark in (b"}", b"]"):
                if (entry := self._closes(mark)) is not None:
                    yield entry
            elif mark == b":" and self._expects == "colon":
                self._expects = "value"
            elif mark == b"," and self._expects == "comma or end":
                self._expects = "key" if self._stack[-1] == ord("{") else "value"
            else:
                raise MalformedListError("unexpected punctuation")

    def _text(self, quoted: bytes) -> None:
        if self._expects in ("key", "key or end"):
            key = _unquoted(quoted)
            self._key = key if isinstance(key, str) else ""
            self._expects = "colon"
        else:
            self._value(_unquoted(quoted))

    def _opens(self, mark: bytes) -> bool:
        """Enter a container on the way to an entry's fields; return whether it is one."""
        if self._expects not in ("value", "value or end"):
            raise MalformedListError("unexpected value")
        depth = len(self._stack)
        if depth == 0 and mark == b"{":
            self._expects = "key or end"
        elif not self._single and depth == 1 and self._key == "results" and mark == b"[" and not self.has_results:
            self.has_results = True
            self._expects = "value or end"
        elif not self._single and depth == 2 and mark == b"{":
            self._expects = "key or end"
        else:
            return False
        self._stack.append(mark[0])
        if len(self._stack) == self._entry_depth:
            self._fields, self._unreadable, self._input = {}, set(), None
        self._key = ""
        return True

    def _closes(self, mark: bytes) -> Entry | None:
        opened = {b"}": ord("{"), b"]": ord("[")}[mark]
        ends = ("key or end", "comma or end") if mark == b"}" else ("value or end", "comma or end")
        if not self._stack or self._stack[-1] != opened or self._expects not in ends:
            raise MalformedListError("unexpected bracket")
        entry = None
        if len(self._stack) == self._entry_depth:
            entry = Entry(self._fields, frozenset(self._unreadable), self._input)
        self._stack.pop()
        self._expects = "comma or end" if self._stack else "end"
        return entry

    def _value(self, value: Any, *, nested: bool = False) -> None:
        """Take the value of the current key; `...` stands for a value that is left out."""
        if self._expects not in ("value", "value or end"):
            raise MalformedListError("unexpected value")
        depth = len(self._stack)
        if depth == 0:
            raise MalformedListError("the JSON is not an object")
        self._expects = "comma or end"
        if depth == self._entry_depth:
            if self._key in NAMES:
                if value is ...:
                    self._unreadable.add(self._key)
                else:
                    self._fields[self._key] = value
        elif depth == 1 and self._key == "next":
            self.following = value if not nested else 0
        elif depth == 1 and self._key == "results":
            raise MalformedListError("`results` is not one list")
        elif depth == 2:
            raise MalformedListError("an entry is not an object")


def _unquoted(quoted: bytes) -> Any:
    """Return a string's text, or `...` if it is too long or not valid."""
    if len(quoted) > TEXT_LIMIT_BYTES:
        return ...
    try:
        return json.loads(quoted, strict=False)
    except ValueError:
        return ...


def _word(word: bytes) -> Any:
    if word in (b"true", b"false", b"null"):
        return {b"true": True, b"false": False, b"null": None}[word]
    if word[:1].isalpha() and word not in (b"NaN", b"Infinity"):
        raise MalformedListError("unexpected word")
    return ...
