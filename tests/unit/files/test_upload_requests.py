import json
from typing import Any

import pytest
from predictions.errors import Problem
from predictions.files.upload_requests import CONTENT_LIMIT_BYTES, UPLOAD_LIMIT_BYTES, read_form, read_upload

FORM = "multipart/form-data; boundary=x"


def part(name: str, content: bytes = b"", more: str = "", headers: str = "") -> bytes:
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n{headers}\r\n'
    return head.encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--x--\r\n"


FILE = part("content", b"a fox", '; filename="fox.txt"', "Content-Type: text/plain\r\n")

BROKEN: dict[str, tuple[bytes, str | None, int, list[str]]] = {
    "no type": (form(FILE), None, 415, []),
    "JSON": (b"{}", "application/json", 415, []),
    "other multipart": (form(FILE), "multipart/mixed; boundary=x", 415, []),
    "no boundary": (form(FILE), "multipart/form-data", 400, []),
    "empty boundary": (form(FILE), 'multipart/form-data; boundary=""', 400, []),
    "boundary of line ends": (form(FILE), 'multipart/form-data; boundary="\r\n"', 400, []),
    "boundary that is not ASCII": (form(FILE), "multipart/form-data; boundary=ü", 400, []),
    "boundary that is surrogates": (form(FILE), "multipart/form-data; boundary=\udcff", 400, []),
    "endless boundary": (form(FILE), "multipart/form-data; boundary=" + "x" * 100_000, 400, []),
    "another boundary": (form(FILE), "multipart/form-data; boundary=y", 400, []),
    "empty body": (b"", FORM, 400, []),
    "rubbish": (b"\xff\xfe\x00" * 1000, FORM, 400, []),
    "no end": (FILE, FORM, 400, []),
    "end before the first part": (b"--x--\r\n", FORM, 422, ["content"]),
    "100,000 parts": (form(*[part(f"p{i}") for i in range(100_000)]), FORM, 413, []),
    "a thousand parts": (form(*[part(f"p{i}") for i in range(1000)]), FORM, 400, []),
    "huge header": (form(part("content", b"x", headers="X-Long: " + "x" * 10_000 + "\r\n")), FORM, 400, []),
    "many headers": (form(part("content", b"x", headers="X-Many: y\r\n" * 1000)), FORM, 400, []),
    "header that is not UTF-8": (form(FILE).replace(b"fox.txt", b"\xff.txt"), FORM, 400, []),
    "part without name": (form(FILE).replace(b' name="content";', b""), FORM, 400, []),
    "content twice": (form(FILE, FILE), FORM, 422, ["content"]),
    "no content": (form(part("file", b"x")), FORM, 422, ["content"]),
    "file name with line end": (form(FILE, part("filename", b"a\r\nX: y")), FORM, 422, ["filename"]),
    "file name with zero": (form(FILE, part("filename", b"a\x00b")), FORM, 422, ["filename"]),
    "file name that is not UTF-8": (form(FILE, part("filename", b"\xff")), FORM, 422, ["filename"]),
    "long file name": (form(FILE, part("filename", "é".encode() * 128)), FORM, 422, ["filename"]),
    "type that is none": (form(FILE, part("type", b"image")), FORM, 422, ["type"]),
    "type with line end": (form(FILE, part("type", b"image/png\r\nX: y")), FORM, 422, ["type"]),
    "metadata that is no JSON": (form(FILE, part("metadata", b"{")), FORM, 422, ["metadata"]),
    "metadata that is a list": (form(FILE, part("metadata", b"[]")), FORM, 422, ["metadata"]),
    "deep metadata": (form(FILE, part("metadata", b"[" * 100_000)), FORM, 422, ["metadata"]),
    "NaN in metadata": (form(FILE, part("metadata", b'{"a": NaN}')), FORM, 422, ["metadata"]),
    "large metadata": (form(FILE, part("metadata", b'{"a": "' + b"x" * 20_000 + b'"}')), FORM, 422, ["metadata"]),
    "two wrong fields": (form(FILE, part("type", b""), part("metadata", b"1")), FORM, 422, ["metadata"]),
    "too large a file": (form(part("content", bytes(CONTENT_LIMIT_BYTES + 1))), FORM, 413, []),
    "far too large a body": (bytes(9_000_000), FORM, 413, []),
}


@pytest.mark.parametrize(("body", "content_type", "status", "fields"), BROKEN.values(), ids=BROKEN)
def test_a_broken_form_is_a_problem(body: bytes, content_type: str | None, status: int, fields: list[str]) -> None:
    headers = {"content-type": content_type} if content_type is not None else {}
    with pytest.raises(Problem) as refused:
        read_form(body, headers)
    assert (refused.value.status, [f["field"] for f in refused.value.invalid_fields]) == (status, fields)
    assert 0 < len(refused.value.detail) < 500
    if status == 413:
        assert "POST /uploads" in refused.value.detail


def test_a_form_names_and_types_its_file_by_fields_before_the_part_itself() -> None:
    plain = read_form(form(FILE), {"content-type": FORM})
    assert (plain.name, plain.content_type, plain.content, plain.size) == ("fox.txt", "text/plain", b"a fox", 5)
    fields = [part("filename", "füchse.md".encode()), part("type", b"Text/Markdown; charset=utf-8")]
    blob = part("metadata", b'{"a": 1.5}', '; filename="blob"', "Content-Type: application/json\r\n")
    named = read_form(form(*fields, FILE, blob), {"content-type": FORM})
    assert (named.name, named.content_type, named.metadata_json) == ("füchse.md", "text/markdown", '{"a":1.5}')
    bare = read_form(form(part("content", b"")), {"content-type": FORM})
    assert (bare.name, bare.content_type, bare.size) == ("file", "application/octet-stream", 0)


def test_the_largest_file_of_a_form_is_taken_with_its_boundary_inside_a_line() -> None:
    content = b"--x--" + bytes(CONTENT_LIMIT_BYTES - 5)
    assert read_form(form(part("content", content)), {"content-type": FORM}).content == content


SOUND = {"filename": "film.mp4", "size": 10}
BROKEN_UPLOADS: dict[str, tuple[Any, int, list[str]]] = {
    "a list": ([], 422, ["body"]),
    "nothing": ({}, 422, ["filename", "size"]),
    "no size": ({"filename": "x"}, 422, ["size"]),
    "size zero": (SOUND | {"size": 0}, 422, ["size"]),
    "negative size": (SOUND | {"size": -1}, 422, ["size"]),
    "size as text": (SOUND | {"size": "10"}, 422, ["size"]),
    "size as truth": (SOUND | {"size": True}, 422, ["size"]),
    "too large": (SOUND | {"size": UPLOAD_LIMIT_BYTES + 1}, 422, ["size"]),
    "empty name": (SOUND | {"filename": ""}, 422, ["filename"]),
    "name with line end": (SOUND | {"filename": "a\nb"}, 422, ["filename"]),
    "type with line end": (SOUND | {"type": "a/b\r\nX: y"}, 422, ["type"]),
    "metadata as text": (SOUND | {"metadata": "{}"}, 422, ["metadata"]),
    "SHA-256 of other length": (SOUND | {"sha256": "ab"}, 422, ["sha256"]),
    "unknown field": (SOUND | {"key": "../x"}, 422, ["key"]),
}


@pytest.mark.parametrize(("value", "status", "fields"), BROKEN_UPLOADS.values(), ids=BROKEN_UPLOADS)
def test_a_broken_description_of_an_upload_is_a_problem(value: Any, status: int, fields: list[str]) -> None:
    with pytest.raises(Problem) as refused:
        read_upload(json.dumps(value).encode(), "application/json")
    assert (refused.value.status, [f["field"] for f in refused.value.invalid_fields]) == (status, fields)


def test_a_description_of_the_largest_upload_is_taken() -> None:
    new = read_upload(json.dumps(SOUND | {"size": UPLOAD_LIMIT_BYTES, "sha256": "00" * 32}).encode(), None)
    assert (new.size, new.content_type, new.content) == (UPLOAD_LIMIT_BYTES, "application/octet-stream", None)
    assert new.sha256_base64 == "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
