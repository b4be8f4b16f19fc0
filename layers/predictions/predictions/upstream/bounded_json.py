"""Untrusted JSON, bounded by the memory that it takes when parsed.

    weigh(body, limit)          estimates that memory before anything is parsed
    members(body), elements()   finds the values of an object or a list without building any of them
    read_members(body, names)   reads a few small members of an object, and skips the others

A limit in bytes bounds nothing: `[],` is 3 bytes of text and 73 of memory, and one emoji makes four bytes of every
character of a text. Regular expressions and methods of `bytes` do the counting, at about the speed of `json.loads`;
loops in Python end with the limit. No pattern backtracks (possessive quantifiers), so the time is linear in the length
of the text, whatever is in it.
"""

import json
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from predictions.errors import PredictionsError

LIGHT_BYTES = 1024 * 1024
"""A text up to this length is not weighed: no JSON takes more than 40 times its length, 40 MiB here."""

# Bytes of CPython 3.13's objects on 64 bits, as pymalloc hands them out: `sys.getsizeof`, rounded up to 16.
_LIST = 64
_FIRST_ELEMENTS = 32  # a list grows by four pointers first
_ELEMENT = 9  # a pointer, and an eighth more in a list that grows
_DICT = 64
_FIRST_ITEMS = 128  # the table of up to five items
_ITEM = 46  # of a larger table right after it grew
_NUMBER = 32
_STRING = 64
_KEY_NOTE = 66  # the parser notes each distinct key
_DIGITS_MORE = 14  # `1e15` is written as 1000000000000000.0

_STRING_PATTERN = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_STRING_TOKEN = re.compile(_STRING_PATTERN, re.DOTALL)
# Anything between strings, and plain strings: ASCII without escapes and punctuation of JSON; then one other string.
_UP_TO_ODD_STRING = re.compile(rb'[^"]*+(?:"[^"\\,:\[{\x80-\xff]*+"[^"]*+)*+(' + _STRING_PATTERN + rb")", re.DOTALL)
_STRING_AND_COLON = re.compile(rb'[^"]*+(' + _STRING_PATTERN + rb")([ \t\r\n]*+:)?", re.DOTALL)
_EMPTY_ONES = (b"[]", b"{}")
_ESCAPED_PAIR = re.compile(rb"\\u[dD][89abAB]")
_ESCAPED_BEYOND_LATIN = re.compile(rb"\\u(?!00)")
_BELOW_FOUR_BYTES = bytes(range(0xF0))
_BELOW_TWO_BYTES = bytes(range(0xC4))
_PLAIN = bytes(range(0x20, 0x7F))
_DISTINCT_KEYS_LIMIT = 4096
# Each is looked at in Python, for about a microsecond; punctuation in further ones counts as if it were outside.
_ODD_STRINGS_LIMIT = 1_500_000

_SKIPPED_LEVELS = 4


def _run(levels: int) -> bytes:
    inner = rb"|[\[{]" + _run(levels - 1) + rb"[\]}]" if levels else b""
    return rb'(?:[^"\[\]{}]++|' + _STRING_PATTERN + inner + rb")*+"


# As many whole values as follow one another that are no deeper than this: at most 5 times each byte is looked at.
_RUN = re.compile(_run(_SKIPPED_LEVELS), re.DOTALL)
_NAME = re.compile(rb"[ \t\r\n]*+(" + _STRING_PATTERN + rb")[ \t\r\n]*+:[ \t\r\n]*+", re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb"[^,\]}\s]++")

# Each step of a scan in Python takes about a microsecond.
_STEPS_LIMIT = 300_000
_MEMBERS_LIMIT = 10_000
_MEMBER_LIMIT_BYTES = 256 * 1024


class Unscannable(PredictionsError):
    """A text is cut off, invalid, or nested too deep for a scan in bounded time."""


class Weight(NamedTuple):
    """The weight of a JSON text when parsed.

    Attributes:
        values: How many values it has: the objects, lists, texts and numbers.
        bytes: The memory at the most, with the text itself and with the values written out again; where it is beyond
            the limit, there may be more.
    """

    values: int
    bytes: int


def weigh(body: bytes, limit_bytes: int) -> Weight:
    """Estimate the memory to parse a JSON text, hold it and write it out again.

    The estimate is an upper bound for what is JSON, mostly within a third of what is measured.

    Args:
        body: UTF-8.
        limit_bytes: Beyond this, counting may stop.
    """
    counted = _Counted(body)
    weight = counted.weight(distinct_keys=counted.strings)
    if weight.bytes <= limit_bytes:
        return weight
    # Texts hold punctuation, and an emoji in one of them widens that one only.
    counted.look_into_strings(limit_bytes)
    weight = counted.weight(distinct_keys=counted.strings)
    least = counted.weight(distinct_keys=0)
    if weight.bytes <= limit_bytes or least.bytes > limit_bytes:
        return weight if weight.bytes <= limit_bytes else least
    return counted.weight(distinct_keys=_distinct_keys(body))


class _Counted:
    """Counts over a text: first over all of it, then without its strings."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        size = len(body)
        self.lists = body.count(b"[")
        self.dicts = body.count(b"{")
        # Counted without space within: others weigh as if they had something in them.
        self.empty = 0
        self.commas = body.count(b",")
        self.colons = body.count(b":")
        self.strings = (body.count(b'"') + 1) // 2
        # No more numbers than these have an exponent, and are written longer than they were.
        self._exponents = body.count(b"e") + body.count(b"E")
        special = body.translate(None, _PLAIN)
        high = len(special.translate(None, bytes(range(0x80))))
        spaces = sum(special.count(each) for each in (b"\t", b"\r", b"\n"))
        # As `json.dumps` writes them: a character of two to four bytes as up to twelve, a control character as six.
        self._written_more = 2 * high + 5 * (len(special) - high - spaces) + spaces
        self._text_width = _width(special, body)
        self._string_bytes = size * self._text_width if self.strings else 0
        if not self.strings:
            self.empty = sum(body.count(each) for each in _EMPTY_ONES)

    def look_into_strings(self, limit_bytes: int) -> None:
        """Subtract what was counted within strings; stop if the strings exceed the limit."""
        body, at, seen, seen_bytes, wide = self._body, 0, 0, 0, 0
        self.empty = sum(body.count(each) for each in _EMPTY_ONES)
        match: re.Match[bytes] | None
        while match := _UP_TO_ODD_STRING.match(body, at):
            text = match[1]
            at = match.end()
            seen += 1
            seen_bytes += len(text)
            self.commas -= text.count(b",")
            self.colons -= text.count(b":")
            if b"[" in text or b"{" in text:
                self.lists -= text.count(b"[")
                self.dicts -= text.count(b"{")
                self.empty -= sum(text.count(each) for each in _EMPTY_ONES)
            if b"\\" in text:
                self.strings -= (text.count(b'"') - 2) // 2
            if self._text_width > 1 or b"\\" in text:
                wide += len(text) * (_width(text.translate(None, _PLAIN), text) - 1)
            if seen * _STRING + seen_bytes + wide > limit_bytes or seen == _ODD_STRINGS_LIMIT:
                break
        outside = self.lists + self.dicts + self.commas + self.colons
        self._string_bytes = max(0, len(body) - outside) + wide if self.strings else 0

    def weight(self, distinct_keys: int) -> Weight:
        containers = self.lists + self.dicts
        full = max(0, containers - self.empty)
        values = self.commas + full + 1
        items = min(self.colons, values)
        keys = min(items, self.strings)
        full_dicts = min(self.dicts, items)
        texts = max(0, self.strings - keys)
        numbers = max(0, values - containers - texts)
        memory = (
            _LIST * self.lists
            + _FIRST_ELEMENTS * min(self.lists, full)
            + _ELEMENT * max(0, values - items - min(self.lists, full))
            + _DICT * self.dicts
            + _FIRST_ITEMS * full_dicts
            + _ITEM * (items - full_dicts)
            + _NUMBER * numbers
            + _STRING * texts
            + (_STRING + _KEY_NOTE) * min(distinct_keys, keys)
            + self._string_bytes
        )
        size = len(self._body)
        written = size + self._written_more + _DIGITS_MORE * min(numbers, self._exponents)
        return Weight(values, size + memory + max(size * self._text_width, 2 * written))


def _width(special: bytes, text: bytes) -> int:
    """Return how many bytes Python uses for each character of a text.

    Args:
        special: What of the text is not printable ASCII.
        text: The text, with escapes.
    """
    escapes = b"\\u" in text
    if special.translate(None, _BELOW_FOUR_BYTES) or (escapes and _ESCAPED_PAIR.search(text)):
        return 4
    return 2 if special.translate(None, _BELOW_TWO_BYTES) or (escapes and _ESCAPED_BEYOND_LATIN.search(text)) else 1


def _distinct_keys(body: bytes) -> int:
    """Count the distinct keys; give up above a limit and return an upper bound."""
    keys: set[bytes] = set()
    match: re.Match[bytes]
    for match in _STRING_AND_COLON.finditer(body):
        if match.span(2)[0] >= 0:
            keys.add(match[1])
            if len(keys) > _DISTINCT_KEYS_LIMIT:
                return len(body)
    return len(keys)


class Member(NamedTuple):
    """Where the value of a member of an object is in a text."""

    name: str
    start: int
    end: int


def members(body: bytes, start: int = 0) -> Iterator[Member]:
    """Yield the members of an object, without parsing their values.

    Raises:
        Unscannable: There is no object at `start`, it is cut off, or it is nested too deep to be followed.
    """
    at = _after_space(body, start)
    if body[at : at + 1] != b"{":
        raise Unscannable("no object")
    at += 1
    steps: _Steps = _Steps()
    for _ in range(_MEMBERS_LIMIT):
        name: re.Match[bytes] | None = _NAME.match(body, at)
        if name is None:
            if body[_after_space(body, at) :][:1] == b"}":
                return
            raise Unscannable("no member")
        at = _end_of_value(body, name.end(), steps)
        yield Member(_text(name[1]), name.end(), at)
        at = _after_space(body, at)
        if body[at : at + 1] == b"}":
            return
        if body[at : at + 1] != b",":
            raise Unscannable("no end of a member")
        at += 1
    raise Unscannable("too many members")


def elements(body: bytes, start: int = 0) -> Iterator[tuple[int, int]]:
    """Yield the starts and ends of a list's elements, without parsing them.

    Raises:
        Unscannable: There is no list at `start`, it is cut off, or it is nested too deep to be followed.
    """
    at = _after_space(body, start)
    if body[at : at + 1] != b"[":
        raise Unscannable("no list")
    at = _after_space(body, at + 1)
    steps: _Steps = _Steps()
    while body[at : at + 1] != b"]":
        steps.take()
        end = _end_of_value(body, at, steps)
        yield at, end
        at = _after_space(body, end)
        if body[at : at + 1] == b",":
            at = _after_space(body, at + 1)
        elif body[at : at + 1] != b"]":
            raise Unscannable("no end of an element")


def read_members(body: bytes, names: Collection[str], start: int = 0) -> dict[str, bytes]:
    """Read some members of an object as JSON texts, and skip the others.

    Members of more than 256 KiB are left out, and those behind a place that cannot be scanned.
    """
    found: dict[str, bytes] = {}
    try:
        for name, begin, end in members(body, start):
            if name in names and end - begin <= _MEMBER_LIMIT_BYTES:
                found[name] = body[begin:end]
    except Unscannable:
        pass
    return found


class _Steps:
    """Counts the steps of a scan that are made in Python."""

    def __init__(self) -> None:
        self._left = _STEPS_LIMIT

    def take(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise Unscannable("too many steps")


def _end_of_value(body: bytes, start: int, steps: _Steps) -> int:
    first = body[start : start + 1]
    if first == b'"':
        text: re.Match[bytes] | None = _STRING_TOKEN.match(body, start)
        if text is None:
            raise Unscannable("a text that is cut off")
        return text.end()
    if first not in (b"[", b"{"):
        scalar: re.Match[bytes] | None = _SCALAR.match(body, start)
        if scalar is None:
            raise Unscannable("no value")
        return scalar.end()
    depth, at = 0, start
    while True:
        steps.take()
        match body[at : at + 1]:
            case b"[" | b"{":
                depth += 1
            case b"]" | b"}":
                depth -= 1
                if depth == 0:
                    return at + 1
            case _:
                raise Unscannable("a value that is cut off")
        run: re.Match[bytes] | None = _RUN.match(body, at + 1)
        at = run.end() if run else at + 1


def _after_space(body: bytes, at: int) -> int:
    match: re.Match[bytes] | None = _SPACE.match(body, at)
    return match.end() if match else at


def _text(literal: bytes) -> str:
    if b"\\" not in literal:
        return literal[1:-1].decode("utf-8", "replace")
    try:
        return str(json.loads(literal.decode("utf-8", "replace"), strict=False))
    except ValueError:
        raise Unscannable("a name with an escape that is none") from None
