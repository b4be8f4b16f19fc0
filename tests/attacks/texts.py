"""Hostile JSON: each text with what becomes of it where a caller sends it, and where a model's answer holds it."""

import json
from dataclasses import dataclass
from typing import Any

DEEP = "nested deeper than 100 levels"
NO_JSON = "is not JSON"
NO_UTF8 = "is not UTF-8"
TWICE = "twice in one object"
HALF = "half of a surrogate pair"
LARGE = "a number that is too large"
TOO_LONG = "bytes"


class _Unreadable:
    """A model's answer of which nothing can be told: it counts as none."""


UNREADABLE: Any = _Unreadable()


@dataclass(frozen=True)
class Text:
    """A JSON value, or what pretends to be one.

    Attributes:
        text: The text.
        refused: What the refusal says where a caller sends it; None: it is taken, and comes back equal.
        told: What a model's output of it comes back as.
    """

    text: bytes
    refused: str | None
    told: Any


def taken(text: str | bytes) -> Text:
    """One that everybody takes."""
    raw = text.encode() if isinstance(text, str) else text
    return Text(raw, None, json.loads(raw))


def arrays(depth: int, core: bytes = b"") -> bytes:
    return b"[" * depth + core + b"]" * depth


def objects(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def mixed(depth: int) -> bytes:
    return b'[{"a":' * (depth // 2) + b"1" + b"}]" * (depth // 2)


def deep(text: bytes) -> Text:
    """One that is too deep for callers; a model's is kept where it can be read."""
    return Text(text, DEEP, json.loads(text))


FRAGMENTS: dict[str, Text] = {
    # depth
    "50 arrays": taken(arrays(50)),
    "90 arrays": taken(arrays(90)),
    "90 objects": taken(objects(90)),
    "90 of both": taken(mixed(90)),
    "100 arrays": deep(arrays(100)),
    "100 objects": deep(objects(100)),
    "100 of both": deep(mixed(100)),
    "150 arrays": deep(arrays(150)),
    "290 arrays": deep(arrays(290)),
    "310 arrays": Text(arrays(310), DEEP, UNREADABLE),
    "1,000 arrays, half a pair within": Text(arrays(1000, b'"\\ud800"'), DEEP, UNREADABLE),
    "1,000 arrays": Text(arrays(1000), DEEP, UNREADABLE),
    "1,000 objects": Text(objects(1000), DEEP, UNREADABLE),
    "1,000 of both": Text(mixed(1000), DEEP, UNREADABLE),
    "100,000 arrays": Text(arrays(100_000), DEEP, UNREADABLE),
    "100,000 objects": Text(objects(100_000), DEEP, UNREADABLE),
    "100,000 of both": Text(mixed(100_000), DEEP, UNREADABLE),
    "100,000 arrays beside one another": taken(b"[" + b"[]," * 99_999 + b"[]]"),
    "5,000 open arrays": Text(b"[" * 5000, NO_JSON, UNREADABLE),
    # numbers
    "1e400": Text(b"1e400", LARGE, None),
    "-1e400": Text(b"-1e400", LARGE, None),
    "1e308": taken("1e308"),
    "1e-400": taken("1e-400"),
    "minus nothing": taken("-0"),
    "minus nothing, a float": taken("-0.0"),
    "1E+2": taken("1E+2"),
    "1e2": taken("1e2"),
    "a fraction of 5,000 digits": taken("0." + "1" * 5000),
    "300 digits": taken("1" * 300),
    "400 digits": Text(b"1" * 400, LARGE, int("1" * 400)),
    "4,300 digits": Text(b"1" * 4300, LARGE, int("1" * 4300)),
    "5,000 digits": Text(b"1" * 5000, NO_JSON, None),
    "a million digits": Text(b"1" * 900_000, NO_JSON, None),
    "an exponent of 5,000 digits": Text(b"1e" + b"1" * 5000, LARGE, None),
    "a list of 300 digits": taken("[" + ",".join(["9" * 300] * 100) + "]"),
    "2 to the 53rd and one": taken("9007199254740993"),
    "a leading zero": Text(b"01", NO_JSON, UNREADABLE),
    "a plus": Text(b"+1", NO_JSON, UNREADABLE),
    "a point at the end": Text(b"1.", NO_JSON, UNREADABLE),
    "hexadecimal": Text(b"0x10", NO_JSON, UNREADABLE),
    "digits with a bar": Text(b"1_000", NO_JSON, UNREADABLE),
    "digits of another script": Text("١٢".encode(), NO_JSON, UNREADABLE),
    "NaN": Text(b"NaN", NO_JSON, None),
    "Infinity": Text(b"Infinity", NO_JSON, None),
    "-Infinity": Text(b"-Infinity", NO_JSON, None),
    "nan in a list": Text(b"[1,NaN,[Infinity]]", NO_JSON, [1, None, [None]]),
    # keys
    "a key twice": Text(b'{"a":1,"a":2}', TWICE, {"a": 2}),
    "a key twice, once escaped": Text(b'{"a":1,"\\u0061":2}', TWICE, {"a": 2}),
    "a key twice, deep": Text(b'[{"x":[{"a":1,"b":2,"a":1}]}]', TWICE, [{"x": [{"a": 1, "b": 2}]}]),
    "__proto__": taken('{"__proto__":{"admin":true},"constructor":{"prototype":{}}}'),
    "no key": taken('{"":{"":1}}'),
    "keys that look alike": taken('{"é":1,"e\\u0301":2}'),
    "a key of 100,000 characters": taken(json.dumps({"k" * 100_000: 1})),
    "20,000 keys": taken(json.dumps({f"k{n}": n for n in range(20_000)})),
    "NUL in a key": taken('{"a\\u0000b":1}'),
    "dots and dollars in keys": taken('{"a.b":1,"$ref":"#/x","a[0]":2,"S":"x","N":"NaN","#pk":":v"}'),
    "half a pair in a key": Text(b'{"\\ud800":1}', HALF, {"?": 1}),
    # characters
    "NUL": taken('"a\\u0000b"'),
    "NUL, raw": Text(b'"a\x00b"', NO_JSON, "a\x00b"),
    "a tab, raw": Text(b'"a\tb"', NO_JSON, "a\tb"),
    "control characters": taken(json.dumps("".join(map(chr, range(0x20))) + "\x7f\x80\x9f")),
    "separators of lines": taken('"\u2028\u2029\u0085"'),
    "directions": taken('"\u202e\u2066abc\u200f"'),
    "a mark inside": taken('"\ufeff"'),
    "no characters": taken('"\uffff\ufffe\\uffff"'),
    "beyond the first plane": taken('"🦊\U0010ffff"'),
    "a pair, escaped": taken('"\\ud83e\\udd8a"'),
    "half a pair, escaped": Text(b'"a\\ud800b"', HALF, "a?b"),
    "the other half, escaped": Text(b'"\\udfff"', HALF, "?"),
    "halves in the wrong order": Text(b'"\\udd8a\\ud83e"', HALF, "??"),
    "half a pair, raw": Text(b'"\xed\xa0\x80"', NO_UTF8, "?"),
    "a byte that begins nothing": Text(b'"\xff"', NO_UTF8, "\ufffd"),
    "a byte that goes on with nothing": Text(b'"\x80"', NO_UTF8, "\ufffd"),
    "a character that is cut off": Text(b'"\xf0\x9f\xa6"', NO_UTF8, "\ufffd"),
    "overlong": Text(b'"\xc0\xaf"', NO_UTF8, "\ufffd\ufffd"),
    "overlong NUL": Text(b'"\xc0\x80"', NO_UTF8, "\ufffd\ufffd"),
    "beyond Unicode": Text(b'"\xf4\x90\x80\x80"', NO_UTF8, "\ufffd" * 4),
    "Latin 1": Text('"é"'.encode("latin-1"), NO_UTF8, "\ufffd"),
    "an escape that is none": Text(b'"\\x41"', NO_JSON, UNREADABLE),
    "an escape that is cut off": Text(b'"\\u00"', NO_JSON, UNREADABLE),
    "half a megabyte": taken(json.dumps("x" * 500_000)),
    "half a megabyte of quotes": taken(json.dumps('"' * 250_000)),
    # what is no JSON
    "a comment": Text(b"/* a */ 1", NO_JSON, UNREADABLE),
    "a comment at the end": Text(b"1 // a", NO_JSON, UNREADABLE),
    "single quotes": Text(b"'a'", NO_JSON, UNREADABLE),
    "no quotes": Text(b"{a:1}", NO_JSON, UNREADABLE),
    "a comma too many": Text(b"[1,]", NO_JSON, UNREADABLE),
    "Python": Text(b"None", NO_JSON, UNREADABLE),
    "undefined": Text(b"undefined", NO_JSON, UNREADABLE),
    "nothing": Text(b"", NO_JSON, UNREADABLE),
    "white space that is none": Text("\u00a01".encode(), NO_JSON, UNREADABLE),
    "two values": Text(b"1 2", NO_JSON, UNREADABLE),
    "a string that does not end": Text(b'"abc', NO_JSON, UNREADABLE),
    # each type
    "null": taken("null"),
    "true": taken("true"),
    "text": taken('"a fox"'),
    "a list": taken('[1,"a",null,{"b":[]}]'),
    "an object": taken('{"S":{"N":"1"}}'),
}
"""Values: within the input that a caller sends, or in what a model says."""

_BODY = b'{"model":"meta/llama","input":{"prompt":"a fox"}}'
OBJECT = "object"

DOCUMENTS: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, NO_JSON),
    "only white space": (b" \t\r ", 400, NO_JSON),
    "a list": (b"[]", 422, OBJECT),
    "a list of it": (b"[" + _BODY + b"]", 422, OBJECT),
    "a number": (b"7", 422, OBJECT),
    "null": (b"null", 422, OBJECT),
    "true": (b"true", 422, OBJECT),
    "a text": (b'"model"', 422, OBJECT),
    "it as a text": (json.dumps(_BODY.decode()).encode(), 422, OBJECT),
    "two documents": (_BODY + b" " + _BODY, 400, NO_JSON),
    "something after it": (_BODY + b"]", 400, NO_JSON),
    "NUL after it": (_BODY + b"\x00", 400, NO_JSON),
    "a comment before it": (b"//\r" + _BODY, 400, NO_JSON),
    "cut off": (_BODY[:-1], 400, NO_JSON),
    "with a mark": (b"\xef\xbb\xbf" + _BODY, 400, NO_JSON),
    "UTF-16": (_BODY.decode().encode("utf-16"), 400, ""),
    "UTF-16, little end": (_BODY.decode().encode("utf-16-le"), 400, NO_JSON),
    "UTF-16, big end": (_BODY.decode().encode("utf-16-be"), 400, NO_JSON),
    "UTF-32": (_BODY.decode().encode("utf-32"), 400, ""),
    "UTF-32, little end": (_BODY.decode().encode("utf-32-le"), 400, NO_JSON),
    "UTF-32, big end": (_BODY.decode().encode("utf-32-be"), 400, NO_JSON),
    "UTF-7": (b"+AHs-" + _BODY[1:], 400, NO_JSON),
    "the model twice": (b'{"model":"meta/llama","model":"evil/x","input":{}}', 400, TWICE),
    "the same model twice": (b'{"model":"meta/llama","model":"meta/llama","input":{}}', 400, TWICE),
    "the version twice": (b'{"version":"a/b","version":"c/d","input":{}}', 400, TWICE),
    "the webhook twice": (b'{"webhook":"https://a.example","webhook":"http://127.0.0.1","input":{}}', 400, TWICE),
    "the input twice": (b'{"model":"meta/llama","input":{},"input":{"a":1}}', 400, TWICE),
    "the recipe twice": (b'{"recipe_id":"a","recipe_id":"b","event":{}}', 400, TWICE),
    "the batch twice, once escaped": (b'{"batch_id":"a","batch\\u005fid":"b","n":1}', 400, TWICE),
    "the owner, unknown": (b'{"input":{},"owner":"bob","model":"meta/llama"}', 422, "owner"),
    "__proto__": (b'{"input":{},"__proto__":{"owner":"bob"},"model":"meta/llama"}', 422, "__proto__"),
    "no key": (b'{"input":{},"":1,"model":"meta/llama"}', 422, ": Unknown field"),
    "100,000 keys": (
        json.dumps({"input": {}, "model": "meta/llama"} | {f"k{n}": n for n in range(100_000)}).encode(), 422, "k0",
    ),
    "a key of a megabyte": (b'{"input":{},"' + b"k" * 1_000_000 + b'":1}', 422, "kkk"),
    "6 MB": (b'{"input":{"a":"' + b"x" * 6_000_000 + b'"},"model":"meta/llama"}', 413, TOO_LONG),
    "6 MB of white space": (b" " * 6_000_000 + _BODY, 413, TOO_LONG),
    "100,000 arrays": (arrays(100_000), 400, DEEP),
    "100,000 open arrays": (b"[" * 100_000, 400, DEEP),
    "100,000 objects": (objects(100_000), 400, DEEP),
}  # fmt: skip
"""Whole bodies: the status at the API, and what is said of it there, in the queue and of a manifest's line."""
