import base64
import hashlib
import io
import json
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from botocore.exceptions import UnseekableStreamError
from hypothesis import given, settings
from hypothesis import strategies as st
from predictions.aws import clients
from predictions.errors import CopyInterrupted
from predictions.files import copier
from predictions.files.output_references import (
    FILES_LIMIT,
    JSON,
    OutputFile,
    StoredFile,
    find_files,
    is_file_url,
    place_files,
    replace_files,
)
from predictions.files.outputs_bucket import OutputsBucket
from predictions.net.downloads import DownloadClient

from tests.support.downloads import downloads_of
from tests.support.library import LIBRARY
from tests.support.quick_aws import QUICK, mocked

BUCKET = "outputs"
PREFIX = "ada/id0/up0"
URL = "https://replicate.delivery/xezq/abc/out-0.png"
MIB = 1024**2

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def s3() -> Iterator[Any]:
    with mocked(), QUICK.lent(None):
        s3 = clients.client("s3")
        s3.create_bucket(Bucket=BUCKET)
        yield s3


S3Answer = tuple[SimpleNamespace, dict[str, Any]]
S3Fault = Callable[[str, Callable[[dict[str, Any]], S3Answer | None]], None]


@pytest.fixture
def s3_fault(s3: Any) -> S3Fault:
    """Answers calls of one operation of S3 in the place of moto, as long as the given function gives an answer."""

    def register(operation: str, answer: Callable[[dict[str, Any]], S3Answer | None]) -> None:
        def before_call(params: dict[str, Any], **_: Any) -> S3Answer | None:
            return answer(params)

        s3.meta.events.register_last(f"before-call.s3.{operation}", before_call)  # gone after the test

    return register


def s3_answer(**parsed: Any) -> S3Answer:
    return SimpleNamespace(status_code=200), {"ResponseMetadata": {}, **parsed}


def s3_error(code: str, status: int) -> S3Answer:
    return SimpleNamespace(status_code=status), {"ResponseMetadata": {}, "Error": {"Code": code, "Message": "no"}}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def bucket_of(handler: Handler, *, origins: tuple[str, ...] = (), clock: Clock | None = None) -> OutputsBucket:
    clock = clock or Clock()
    return OutputsBucket(
        BUCKET,
        origins,
        open_client=downloads_of(lambda: httpx.Client(transport=httpx.MockTransport(handler))),
        clock=clock,
        sleep=clock.sleep,
    )


def plenty() -> float:
    return 900.0


def store(bucket: OutputsBucket, output: JSON, **options: Any) -> list[StoredFile]:
    return bucket.store(bucket.find_files(output), prefix=PREFIX, **{"remaining_seconds": plenty, **options})


def answering(
    content: bytes, content_type: str = "image/png", status: int = 200, headers: dict[str, str] | None = None
) -> Handler:
    headers = {"Content-Type": content_type, "Content-Length": str(len(content))} | (headers or {})
    return lambda request: httpx.Response(status, stream=Chunks(iter([content])), headers=headers)


def streaming(*chunks: bytes, headers: dict[str, str] | None = None) -> Handler:
    """An answer without Content-Length, unless there is one among the headers."""
    return lambda request: httpx.Response(200, stream=Chunks(iter(chunks)), headers=headers)


def file_of(content: bytes) -> httpx.Response:
    return answering(content)(httpx.Request("GET", URL))


class Chunks(httpx.SyncByteStream):
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        yield from self._chunks


def keys(s3: Any) -> list[str]:
    return [found["Key"] for found in s3.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def assert_nothing_left(s3: Any) -> None:
    assert keys(s3) == []
    assert s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) == []


def content_of(s3: Any, key: str) -> bytes:
    body: bytes = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    return body


def random_bytes(size: int) -> bytes:
    return hashlib.shake_128(b"seed").digest(size)


# ---- finding


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a picture",
        "https:",
        "https://",
        "https:///x.png",
        "https://example.com/x.png",
        "https://replicate.com/x.png",
        "https://replicate.delivery.example.com/x.png",
        "https://notreplicate.delivery/x.png",
        "https://xreplicate.delivery",
        "http://replicate.delivery/x.png",
        "ftp://replicate.delivery/x.png",
        "//replicate.delivery/x.png",
        "https:/replicate.delivery/x.png",
        "https://replicate.delivery:8443/x.png",
        "https://replicate.delivery:/x.png",
        "https://user@replicate.delivery/x.png",
        "https://replicate.delivery@example.com/x.png",
        "https://replicate.delivery:443@example.com/x.png",
        "https://replicate.delivery\\@example.com/x.png",
        "https://replicate.delivery\\.example.com/x.png",
        "https://replicate.delivery%2eexample.com/x.png",
        "https://replicate。delivery/x.png",
        "https://example.com/https://replicate.delivery/x.png",
        "see https://replicate.delivery/x.png",
        "https://replicate.delivery/x.png is your picture",
        " https://replicate.delivery/x.png",
        "https://replicate.delivery/x.png\n",
        "https://replicate.delivery/\x00",
        "https://replicate.delivery/\ud800",
        "http://127.0.0.1:4010/files/x.png",
        "data:",
        "data:,",
        "data:,hello",
        "data:;base64,aGVsbG8=",
        "data:hello, world",
        "data:text,hello",
        "data:text/plain",
        "data:text/plain;,x",
        "data:text/plain,hello world",
        "data:text/plain,hello\n",
        "data:image/png;base64,iVBOR w0KGgo=",
        "data:image/png;base64,iVBOR!",
        "data:image/png;base64,aa==aa==",
        "data:image/png;base64,aGVsbG8= and more",
        "data: image/png;base64,aGVsbG8=",
        "see data:image/png;base64,aGVsbG8=",
        "data:" + "x" * 600 + "/y,z",
    ],
)
def test_text_that_is_no_file_is_left_alone(text: str) -> None:
    assert OutputsBucket(BUCKET).find_files([text, {"key": text}]) == []
    assert not OutputsBucket(BUCKET).holds_files([text])


@pytest.mark.parametrize(
    "text",
    [
        URL,
        "https://replicate.delivery",
        "https://replicate.delivery?x",
        "https://pbxt.replicate.delivery/abc/out.mp4",
        "https://a.b.replicate.delivery/abc/out.mp4",
        "HTTPS://Replicate.Delivery/x",
        "https://replicate.delivery:443/x",
        "https://replicate.delivery/фото.png?sig=a%2Fb#t",
        "data:image/png;base64,aGVsbG8=",
        "data:text/plain;charset=utf-8;base64,",
        "data:text/plain;charset=utf-8,caf%C3%A9",
        "DATA:image/svg+xml,%3Csvg/%3E",
    ],
)
def test_url_of_a_file_is_found_wherever_it_is(text: str) -> None:
    bucket = OutputsBucket(BUCKET)
    assert bucket.find_files(text) == [OutputFile(0, "", text)]
    assert bucket.find_files({"a/b": [1, {"~": text}]}) == [OutputFile(0, "/a~1b/1/~0", text)]
    assert bucket.holds_files([None, {"x": [text]}])


def test_url_of_an_allowed_origin_is_found_and_no_other_port_of_it() -> None:
    bucket = OutputsBucket(BUCKET, ["http://127.0.0.1:4010", "https://files.example.com"])
    found = bucket.find_files(
        [
            "http://127.0.0.1:4010/a",
            "http://127.0.0.1:4011/b",
            "https://127.0.0.1:4010/c",
            "https://files.example.com/d",
        ]
    )
    assert [file.source for file in found] == ["http://127.0.0.1:4010/a", "https://files.example.com/d"]


def test_order_is_that_of_lists_and_of_sorted_keys() -> None:
    output: JSON = {
        "b": [f"{URL}?2", f"{URL}?3"],
        "a": {"z": f"{URL}?1", "y": f"{URL}?0"},
        "c": f"{URL}?4",
    }
    found = find_files(output, is_file_url)
    assert [(file.index, file.path) for file in found] == [
        (0, "/a/y"),
        (1, "/a/z"),
        (2, "/b/0"),
        (3, "/b/1"),
        (4, "/c"),
    ]
    assert [file.source[-1] for file in found] == list("01234")


def test_names_in_an_output_are_not_taken_for_files() -> None:
    assert find_files({URL: 1}, is_file_url) == []


def test_output_nested_deeper_than_python_recurses_is_walked_and_replaced() -> None:
    depth = 100_000
    output: Any = [URL]
    for _ in range(depth):
        output = [output]
    [file] = find_files(output, is_file_url)
    assert file.path == "/0" * (depth + 1)
    inner: Any = replace_files(output, {file.path: "ours"})
    for _ in range(depth):
        [inner] = inner
    assert inner == ["ours"]
    # Python itself would recurse when it frees this.
    while isinstance(output, list):
        output = output.pop()


def test_hundreds_of_thousands_of_strings_are_walked() -> None:
    output: list[Any] = ["token", {"a": "https://example.com/"}] * 200_000 + [URL]
    assert [file.path for file in find_files(output, is_file_url)] == ["/400000"]


def test_long_texts_are_looked_at_once() -> None:
    texts: list[JSON] = [
        "data:" + "a/" * MIB,
        "data:a/b" + ";x" * MIB,
        "https://" + "a." * MIB,
        URL + "\n" * MIB,
    ]
    assert find_files(texts, is_file_url) == []


# ---- replacing


def test_files_are_replaced_without_touching_the_given_output() -> None:
    output: JSON = {"a": [URL, "text", URL], "b/~": {"c": URL}, "d": [1.5, None]}
    before = json.dumps(output)
    replaced = replace_files(output, {"/a/0": "https://ours/0", "/a/2": None, "/b~1~0/c": "https://ours/2"})
    assert replaced == {"a": ["https://ours/0", "text", None], "b/~": {"c": "https://ours/2"}, "d": [1.5, None]}
    assert json.dumps(output) == before
    assert replace_files(URL, {"": "ours"}) == "ours"
    assert replace_files(output, {}) == output


def test_every_path_that_was_found_can_be_replaced() -> None:
    output: JSON = {"": URL, "~1": {"/": [URL]}, "0": {"": {"": URL}}, "~0~1": URL}
    found = find_files(output, is_file_url)
    assert len(found) == 4
    replaced = replace_files(output, {file.path: file.index for file in found})
    assert URL not in json.dumps(replaced)


@pytest.mark.parametrize("path", ["/b", "/a/2", "/a/-1", "/a/x", "/a/", "/a/0/0", "/c/x", "a", "0", "//a"])
def test_path_that_leads_nowhere_is_an_error(path: str) -> None:
    with pytest.raises(LookupError):
        replace_files({"a": [URL, "b"], "c": None}, {path: "ours"})


def test_every_file_is_placed_or_missing_and_nothing_else_changes() -> None:
    output: dict[str, Any] = {"a": [URL, "text", [URL]], "b/~": {"c": URL, "~1": [[1]]}, "d": [1.5, None], "": URL}
    before = json.dumps(output)
    placed: Any = place_files(output, {"/a/0": "ours 0", "/b~1~0/c": "ours 1"}, is_file_url)
    assert placed == {
        "a": ["ours 0", "text", [None]], "b/~": {"c": "ours 1", "~1": [[1]]}, "d": [1.5, None], "": None
    }  # fmt: skip
    assert json.dumps(output) == before
    assert placed["d"] is output["d"], "what holds no file is shared"
    assert place_files(URL, {"": "ours"}, is_file_url) == "ours"
    assert place_files(URL, {}, is_file_url) is None
    assert place_files("text", {}, is_file_url) == "text"
    # An older release took other texts for files: their places are known by the files that it stored.
    assert place_files(["text", URL], {"/0": "ours"}, is_file_url) == ["ours", None]
    with pytest.raises(LookupError):
        place_files(["text"], {"/1": "ours"}, is_file_url)


_JSON = st.recursive(
    st.none() | st.integers() | st.sampled_from([URL, "data:image/png;base64,AAAA", "text", "https://example.com/"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["", "a", "~", "/", "0"]), inner),
)


@given(output=_JSON)
@settings(max_examples=200, deadline=None)
def test_files_are_placed_where_they_are_found(output: Any) -> None:
    values: dict[str, Any] = {file.path: file.index for file in find_files(output, is_file_url)}
    before = json.dumps(output)
    assert place_files(output, values, is_file_url) == replace_files(output, values)
    assert place_files(output, {}, is_file_url) == replace_files(output, dict.fromkeys(values))
    assert json.dumps(output) == before


def test_files_nested_deeper_than_python_recurses_are_placed() -> None:
    depth = 100_000
    output: Any = [URL]
    for _ in range(depth):
        output = [output]
    inner: Any = place_files(output, {}, is_file_url)
    for _ in range(depth):
        [inner] = inner
    assert inner == [None]
    while isinstance(output, list):
        output = output.pop()


@pytest.mark.parametrize(("count", "entries"), [(0, 0), (999, 0), (1000, 0), (1001, 1), (300_000, 1)])
def test_files_beyond_the_limit_are_one_entry_that_counts_them(count: int, entries: int) -> None:
    bucket = OutputsBucket(BUCKET)
    files, beyond = bucket.files_to_store([URL] * count)
    assert [file.index for file in files] == list(range(min(count, FILES_LIMIT)))
    reason = f"the output has {count} files: the first 1000 are stored, this one and those after it are not"
    assert beyond == [StoredFile("/1000", 1000, error=reason)] * entries
    placed = bucket.place_files([URL] * count, {file.path: file.index for file in files})
    assert placed == [n if n < FILES_LIMIT else None for n in range(count)]


# ---- refusals of files


def redirecting(*locations: str) -> Handler:
    """Redirects from each request to the next location, then serves a file."""
    left = list(locations)
    return lambda request: httpx.Response(302, headers={"Location": left.pop(0)}) if left else file_of(b"file")


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (answering(b"", status=404), "404: the file is gone"),
        (answering(b"", status=403), "403: the file is gone"),
        (answering(b"", status=410), "410: the file is gone"),
        (answering(b"", status=401), "answered 401"),
        (answering(b"", status=400), "answered 400"),
        (answering(b"", status=204), "answered 204"),
        (answering(b"x", status=206), "answered 206"),
        (answering(b"", status=300), "answered 300"),
        (answering(b"", status=304), "answered 304"),
        (streaming(headers={"Content-Length": str(5 * 1024**3 + 1)}), "larger than 5 GiB"),
        (streaming(b"x", headers={"Content-Encoding": "gzip"}), "compressed"),
        (streaming(b"x", headers={"Content-Encoding": "br, gzip"}), "compressed"),
        (redirecting("https://example.com/x.png"), "redirected to where"),
        (redirecting("http://replicate.delivery/x.png"), "redirected to where"),
        (redirecting("//169.254.169.254/latest/meta-data/"), "redirected to where"),
        (redirecting("https://replicate.delivery@example.com/"), "redirected to where"),
        (redirecting("file:///etc/passwd"), "redirected to where"),
        (redirecting("data:image/png;base64,aGVsbG8="), "not valid"),
        (redirecting(f"{URL}?1", "https://example.com/x.png"), "redirected to where"),
        (redirecting(*[f"{URL}?{number}" for number in range(6)]), "more than 5 times"),
        (redirecting("https://replicate.delivery:99999999999/"), "redirected to where"),
        (redirecting("https://["), "redirected to where"),
    ],
)
def test_file_that_can_never_be_copied_has_a_reason_and_no_object(s3: Any, handler: Handler, reason: str) -> None:
    requests = []

    def counted(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return handler(request)

    clock = Clock()
    [stored] = store(bucket_of(counted, clock=clock), f"{URL}?X-Signature=secret")
    assert stored == StoredFile("", 0, error=stored.error)
    assert pytest.approx(clock.now) == 1000.0, "it was tried again"
    assert reason in (stored.error or "")
    assert "secret" not in (stored.error or "")
    assert_nothing_left(s3)


@pytest.mark.parametrize(
    "url", ["data:image/png;base64,a", "data:image/png;base64,aaaaa", "data:image/png;base64,aGVsbG8"]
)
def test_data_url_that_does_not_decode_has_a_reason(s3: Any, url: str) -> None:
    [stored] = store(bucket_of(answering(b"")), url)
    assert stored.error == "the data: URL is not valid base64"
    assert_nothing_left(s3)


def test_file_that_grows_beyond_the_limit_has_a_reason_and_no_upload_left(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "FILE_MAX_BYTES", 20 * MIB)  # a limit, not behaviour: 5 GiB would take minutes
    [stored] = store(bucket_of(streaming(*[bytes(MIB)] * 21)), URL)
    assert stored.error == copier._TOO_LARGE
    assert_nothing_left(s3)


def test_url_longer_than_any_client_takes_has_a_reason(s3: Any) -> None:
    [stored] = store(bucket_of(answering(b"file")), URL + "x" * 70_000)
    assert stored.error == "the file's URL, or one that it redirects to, is not valid"


def test_private_address_behind_a_file_host_has_a_reason(s3: Any) -> None:
    bucket = OutputsBucket(BUCKET, open_client=lambda: DownloadClient(resolve=lambda host, port: ["10.0.0.1"]))
    [stored] = store(bucket, URL)
    assert stored.error == "the file's address leads to a private or reserved address"


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "/",
        "ada/",
        "/ada",
        "ada//id",
        "../ada",
        "ada/../eve",
        "ada/.",
        "ada/.hidden",
        "ada/id\n",
        "ada/id?x",
        "ada/i d",
        "ada/%2e%2e",
        "payloads/id",
        "payloads",
    ],
)
def test_prefix_that_is_not_made_of_ids_is_an_error(s3: Any, prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        bucket_of(answering(b"x")).store([OutputFile(0, "", URL)], prefix=prefix, remaining_seconds=plenty)
    assert_nothing_left(s3)


# ---- copying


def test_files_are_stored_byte_for_byte_in_their_order(s3: Any) -> None:
    contents = {f"/{number}": random_bytes(1000 + number) for number in range(12)}
    requests: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return answering(contents[request.url.path], "image/webp")(request)

    output: JSON = [f"https://replicate.delivery{path}" for path in contents]
    stored = store(bucket_of(handler), output)
    for number, (file, content) in enumerate(zip(stored, contents.values(), strict=True)):
        assert file == StoredFile(
            f"/{number}", number, f"{PREFIX}/{number}", len(content), hashlib.sha256(content).hexdigest(), "image/webp"
        )
        assert content_of(s3, f"{PREFIX}/{number}") == content
    for request in requests:
        assert request.headers["Accept-Encoding"] == "identity"
        assert not {"Authorization", "Cookie", "Referer"} & {name.title() for name in request.headers}


def test_output_without_files_opens_no_connection(s3: Any) -> None:
    def open_client() -> Any:
        raise AssertionError("opened")

    assert store(OutputsBucket(BUCKET, open_client=open_client), ["text", 1, None]) == []


@pytest.mark.parametrize(
    ("url", "content", "content_type"),
    [
        ("data:image/png;base64,aGVsbG8=", b"hello", "image/png"),
        ("data:text/plain;charset=utf-8;base64,w6k=", "é".encode(), "text/plain; charset=utf-8"),
        ("data:text/plain,caf%C3%A9%2C", "café,".encode(), "text/plain"),
        ("data:audio/wav;base64,", b"", "audio/wav"),
    ],
)
def test_data_url_is_stored(s3: Any, url: str, content: bytes, content_type: str) -> None:
    [stored] = store(bucket_of(answering(b"not this")), {"file": url})
    assert (stored.path, stored.bytes, stored.content_type) == ("/file", len(content), content_type)
    assert content_of(s3, f"{PREFIX}/0") == content


def test_large_data_url_is_stored_at_once(s3: Any) -> None:
    content = random_bytes(10 * MIB)
    [stored] = store(bucket_of(answering(b"")), "data:video/mp4;base64," + base64.b64encode(content).decode())
    assert (stored.bytes, stored.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert "-" not in s3.head_object(Bucket=BUCKET, Key=f"{PREFIX}/0")["ETag"]


@pytest.mark.parametrize(
    ("size", "parts"), [(0, 0), (1, 0), (5 * MIB - 1, 0), (5 * MIB, 0), (5 * MIB + 1, 2), (15 * MIB, 3), (16 * MIB, 4)]
)
@pytest.mark.parametrize("announced", [True, False])
def test_file_of_any_size_is_stored_at_once_or_in_parts(s3: Any, size: int, parts: int, announced: bool) -> None:
    """In parts where nobody says how long it is."""
    content = random_bytes(size)
    handler = answering(content) if announced else streaming(content, headers={"Content-Type": "image/png"})
    parts = 0 if announced else parts
    [stored] = store(bucket_of(handler), URL)
    assert (stored.bytes, stored.sha256) == (size, hashlib.sha256(content).hexdigest())
    found = s3.head_object(Bucket=BUCKET, Key=f"{PREFIX}/0")
    assert found["ContentType"] == "image/png"
    assert found["ETag"].endswith(f'-{parts}"') == bool(parts)
    assert content_of(s3, f"{PREFIX}/0") == content
    assert s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) == []


def test_unknown_type_in_parts_is_a_download_too(s3: Any) -> None:
    store(bucket_of(streaming(bytes(9 * MIB), headers={"Content-Type": "text/html"})), URL)
    found = s3.head_object(Bucket=BUCKET, Key=f"{PREFIX}/0")
    assert (found["ContentType"], found["ContentDisposition"]) == ("application/octet-stream", "attachment")


def test_redirects_within_the_file_hosts_are_followed(s3: Any) -> None:
    locations = ["/relative", "https://pbxt.replicate.delivery/a", f"{URL}?3", f"{URL}?4", f"{URL}?5"]
    [stored] = store(bucket_of(redirecting(*locations)), URL)
    assert content_of(s3, stored.key or "") == b"file"


def test_file_without_length_is_stored(s3: Any) -> None:
    [stored] = store(bucket_of(streaming(b"ab", b"", b"cd")), URL)
    assert (stored.bytes, content_of(s3, f"{PREFIX}/0")) == (4, b"abcd")


# ---- broken off, and started again


def sequence(*handlers: Handler) -> Handler:
    """One handler for each request; the last one stays."""
    left = list(handlers)
    return lambda request: (left.pop(0) if len(left) > 1 else left[0])(request)


def failing(error: type[httpx.TransportError]) -> Handler:
    def handler(request: httpx.Request) -> httpx.Response:
        raise error("https://replicate.delivery/?X-Signature=secret")

    return handler


def breaking(*chunks: bytes) -> Handler:
    """Sends some of a body, then the connection ends."""

    def body() -> Iterator[bytes]:
        yield from chunks
        raise httpx.RemoteProtocolError("peer closed connection")

    return lambda request: httpx.Response(200, stream=Chunks(body()), headers={"Content-Type": "image/png"})


TEMPORARY = [
    pytest.param(streaming(bytes(9), headers={"Content-Length": "10"}), id="truncated"),
    pytest.param(streaming(*[bytes(MIB)] * 12, headers={"Content-Length": str(13 * MIB)}), id="truncated in parts"),
    pytest.param(streaming(bytes(11), headers={"Content-Length": "10"}), id="too long"),
    pytest.param(streaming(bytes(11), headers={"Content-Length": "10, 10"}), id="unclear length"),
    pytest.param(streaming(bytes(11), headers={"Content-Length": "-1"}), id="negative length"),
    pytest.param(breaking(), id="broken off at once"),
    pytest.param(breaking(b"some"), id="broken off"),
    pytest.param(breaking(*[bytes(MIB)] * 20), id="broken off in parts"),
    pytest.param(answering(b"", status=500), id="500"),
    pytest.param(answering(b"", status=502), id="502"),
    pytest.param(answering(b"", status=503), id="503"),
    pytest.param(answering(b"", status=429), id="429"),
    pytest.param(answering(b"", status=408), id="408"),
    pytest.param(failing(httpx.ConnectError), id="no connection"),
    pytest.param(failing(httpx.ConnectTimeout), id="connect timeout"),
    pytest.param(failing(httpx.ReadTimeout), id="read timeout"),
    pytest.param(failing(httpx.RemoteProtocolError), id="nonsense"),
]


@pytest.mark.parametrize("broken", TEMPORARY)
def test_broken_file_is_started_again(s3: Any, broken: Handler) -> None:
    clock = Clock()
    [stored] = store(bucket_of(sequence(broken, broken, answering(b"whole")), clock=clock), URL)
    assert stored.sha256 == hashlib.sha256(b"whole").hexdigest()
    assert content_of(s3, f"{PREFIX}/0") == b"whole"
    assert s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) == []
    assert clock.now == 1000.0 + 1 + 2


@pytest.mark.parametrize("broken", TEMPORARY)
def test_file_that_stays_broken_interrupts_and_leaves_nothing(s3: Any, broken: Handler) -> None:
    requests = []

    def counted(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return broken(request)

    with pytest.raises(CopyInterrupted, match="1 of 1 files") as interrupted:
        store(bucket_of(counted), f"{URL}?X-Signature=secret")
    assert len(requests) == 3
    assert "secret" not in str(interrupted.value)
    assert_nothing_left(s3)


@pytest.mark.parametrize("broken", TEMPORARY)
def test_file_that_stays_broken_has_a_reason_at_the_final_call(s3: Any, broken: Handler) -> None:
    [stored] = store(bucket_of(broken), f"{URL}?X-Signature=secret", final=True)
    assert stored.key is None
    assert "3 times" in (stored.error or "")
    assert "secret" not in (stored.error or "")
    assert_nothing_left(s3)


def test_interruption_comes_after_the_others_are_stored_and_they_are_not_written_again(s3: Any) -> None:
    requests: Counter[str] = Counter()
    broken = True

    def handler(request: httpx.Request) -> httpx.Response:
        requests[request.url.path] += 1
        if request.url.path == "/0" and broken:
            return httpx.Response(503)
        return file_of(request.url.path.encode() * 10)

    output: JSON = [f"https://replicate.delivery/{number}" for number in range(9)]
    with pytest.raises(CopyInterrupted, match=r"1 of 9 files .* 503"):
        store(bucket_of(handler), output)
    assert len(keys(s3)) == 8
    written = {key: s3.head_object(Bucket=BUCKET, Key=key)["LastModified"] for key in keys(s3)}

    broken = False
    stored = store(bucket_of(handler), output)
    assert [content_of(s3, file.key or "") for file in stored] == [b"/%d" % number * 10 for number in range(9)]
    assert all(file.sha256 == hashlib.sha256(b"/%d" % file.index * 10).hexdigest() for file in stored)
    assert written.items() <= {key: s3.head_object(Bucket=BUCKET, Key=key)["LastModified"] for key in keys(s3)}.items()


def test_refused_file_does_not_keep_the_others_from_being_stored(s3: Any) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404) if request.url.path == "/1" else file_of(b"file")

    stored = store(bucket_of(handler), [f"https://replicate.delivery/{number}" for number in range(3)])
    assert [file.key for file in stored] == [f"{PREFIX}/0", None, f"{PREFIX}/2"]
    assert [bool(file.error) for file in stored] == [False, True, False]


# ---- time


@pytest.mark.parametrize("first", [b"", bytes(9 * MIB)])
def test_slow_drip_ends_at_the_deadline_and_leaves_nothing(s3: Any, first: bytes) -> None:
    clock = Clock()

    def drip() -> Iterator[bytes]:
        yield first
        while True:
            clock.now += 10  # shorter than any timeout between two bytes
            yield b"x"

    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Chunks(drip()))

    with pytest.raises(CopyInterrupted, match="600 seconds"):
        store(bucket_of(handler, clock=clock), URL)
    assert clock.now < 1000 + 600 + 20
    assert_nothing_left(s3)


def test_copying_stops_in_time_and_leaves_nothing(s3: Any) -> None:
    clock = Clock()

    def body() -> Iterator[bytes]:
        while True:
            clock.now += 1
            yield bytes(MIB)

    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Chunks(body()))

    with pytest.raises(CopyInterrupted, match="time for copying"):
        store(bucket_of(handler, clock=clock), URL, remaining_seconds=lambda: 1050.0 - clock.now)
    assert clock.now <= 1050 - copier.STOP_BEFORE_SECONDS + 1
    assert_nothing_left(s3)


@pytest.mark.parametrize("final", [False, True])
def test_without_time_nothing_is_asked_for(s3: Any, final: bool) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise AssertionError("asked for")

    files: JSON = [URL, "data:image/png;base64,aGVsbG8="]
    if final:
        stored = store(bucket_of(handler), files, remaining_seconds=lambda: 5.0, final=True)
        assert [file.error for file in stored] == ["the time for copying was over"] * 2
    else:
        with pytest.raises(CopyInterrupted, match="2 of 2"):
            store(bucket_of(handler), files, remaining_seconds=lambda: 5.0)
    assert_nothing_left(s3)


# ---- what is there already


@pytest.mark.parametrize("size", [100, 9 * MIB])
def test_finished_copy_of_a_crashed_attempt_is_taken_over_without_downloading(s3: Any, size: int) -> None:
    content = random_bytes(size)
    s3.put_object(Bucket=BUCKET, Key=f"{PREFIX}/0", Body=content, ContentType="image/png")

    def body() -> Iterator[bytes]:
        raise AssertionError("downloaded")
        yield b""

    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Chunks(body()), headers={"Content-Length": str(size)})

    [stored] = store(bucket_of(handler), URL)
    assert stored == StoredFile("", 0, f"{PREFIX}/0", size, hashlib.sha256(content).hexdigest(), "image/png")


@pytest.mark.parametrize("status", [403, 404, 410])
def test_finished_copy_is_taken_over_when_the_file_is_gone(s3: Any, status: int) -> None:
    s3.put_object(Bucket=BUCKET, Key=f"{PREFIX}/0", Body=b"ours", ContentType="image/png")
    [stored] = store(bucket_of(answering(b"", status=status)), URL)
    assert (stored.key, stored.bytes, stored.error) == (f"{PREFIX}/0", 4, None)


def test_object_of_another_size_is_kept_and_named_as_the_reason(s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key=f"{PREFIX}/0", Body=b"theirs")
    [stored] = store(bucket_of(answering(b"ours")), URL)
    assert stored.error == "another file is stored in its place"
    assert content_of(s3, f"{PREFIX}/0") == b"theirs"


@pytest.mark.parametrize("size", [100, 9 * MIB])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_object_that_is_there_at_the_end_is_compared_byte_for_byte(s3: Any, size: int, same: bool, late: bool) -> None:
    """Late: another copy finishes during ours. Otherwise: before ours, which knows no length to compare."""
    content = random_bytes(size)
    other = content if same else content[:-1] + bytes([content[-1] ^ 1])

    def put() -> None:
        s3.put_object(Bucket=BUCKET, Key=f"{PREFIX}/0", Body=other, ContentType="image/png")

    def body() -> Iterator[bytes]:
        yield content
        if late:
            put()

    if not late:
        put()
    [stored] = store(bucket_of(lambda request: httpx.Response(200, stream=Chunks(body()))), URL)
    if same:
        assert stored.sha256 == hashlib.sha256(content).hexdigest()
        assert (stored.key, stored.content_type) == (f"{PREFIX}/0", "image/png")
    else:
        assert stored == StoredFile("", 0, error="another file is stored in its place")
    assert content_of(s3, f"{PREFIX}/0") == other
    assert s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) == []


@pytest.mark.parametrize("same", [True, False])
def test_object_that_comes_first_is_compared_with_the_rest_of_the_file_too(
    s3: Any, s3_fault: S3Fault, same: bool
) -> None:
    """S3 refuses an upload before it has read any of it."""
    content = random_bytes(3 * MIB)
    other = content if same else content[:-1] + bytes([content[-1] ^ 1])
    store_other = s3.put_object
    faults = iter([s3_error("PreconditionFailed", 412)])

    def refuse(params: Any) -> S3Answer | None:
        if "If-None-Match" not in params["headers"]:
            return None
        store_other(Bucket=BUCKET, Key=f"{PREFIX}/0", Body=other, ContentType="image/png")
        return next(faults)

    s3_fault("PutObject", refuse)
    [stored] = store(bucket_of(answering(content)), URL)
    if same:
        assert (stored.bytes, stored.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    else:
        assert stored.error == "another file is stored in its place"


def test_file_that_breaks_off_while_an_object_that_came_first_is_compared_is_started_again(
    s3: Any, s3_fault: S3Fault
) -> None:
    faults = iter([s3_error("PreconditionFailed", 412)])
    s3_fault("PutObject", lambda params: next(faults, None))
    broken = streaming(bytes(9), headers={"Content-Length": "10"})
    [stored] = store(bucket_of(sequence(broken, answering(b"whole"))), URL)
    assert stored.sha256 == hashlib.sha256(b"whole").hexdigest()


def test_data_url_that_is_stored_already_is_recognised(s3: Any) -> None:
    bucket = bucket_of(answering(b""))
    first = store(bucket, "data:image/png;base64,aGVsbG8=")
    assert store(bucket, "data:image/png;base64,aGVsbG8=") == first
    [other] = store(bucket, "data:image/png;base64,aGVsbG9v")
    assert other.error == "another file is stored in its place"


def test_complete_of_which_the_answer_was_lost_is_recognised(s3: Any, s3_fault: S3Fault) -> None:
    content = random_bytes(9 * MIB)

    def completed_before(params: Any) -> S3Answer:
        s3.put_object(Bucket=BUCKET, Key=f"{PREFIX}/0", Body=content, ContentType="image/png")
        return s3_error("NoSuchUpload", 404)

    s3_fault("CompleteMultipartUpload", completed_before)
    [stored] = store(bucket_of(streaming(content)), URL)
    assert (stored.sha256, stored.error) == (hashlib.sha256(content).hexdigest(), None)


def test_missing_object_is_403_for_those_who_may_not_list(s3: Any, s3_fault: S3Fault) -> None:
    s3_fault("HeadObject", lambda params: s3_error("403", 403))
    [stored] = store(bucket_of(answering(b"file")), URL)
    assert stored.bytes == 4


# ---- faults of S3


@pytest.mark.parametrize(
    "operation", ["HeadObject", "PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"]
)
def test_fault_of_the_bucket_interrupts_and_leaves_nothing(s3: Any, s3_fault: S3Fault, operation: str) -> None:
    s3_fault(operation, lambda params: s3_error("InvalidRequest", 400))
    handler = answering(bytes(10)) if operation == "PutObject" else streaming(bytes(9 * MIB))
    with pytest.raises(CopyInterrupted, match=r"outputs bucket answered InvalidRequest, 3 times"):
        store(bucket_of(handler), URL)
    assert_nothing_left(s3)


def test_fault_of_the_bucket_that_passes_is_got_over(s3: Any, s3_fault: S3Fault) -> None:
    faults = iter([s3_error("ConditionalRequestConflict", 409)])
    s3_fault("PutObject", lambda params: next(faults, None))
    [stored] = store(bucket_of(answering(b"file")), URL)
    assert stored.bytes == 4


def test_upload_that_the_bucket_breaks_off_is_started_again_from_the_file_host(s3: Any, s3_fault: S3Fault) -> None:
    asked = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        return file_of(b"file")

    def break_off(params: dict[str, Any]) -> None:
        """As botocore does when it would repeat a request whose body cannot be rewound."""
        if asked == 1:
            assert params["body"].read(2) == b"fi"
            with pytest.raises(io.UnsupportedOperation):
                params["body"].seek(0)
            raise UnseekableStreamError(stream_object=params["body"])

    s3_fault("PutObject", break_off)
    [stored] = store(bucket_of(handler), URL)
    assert (asked, stored.bytes, content_of(s3, f"{PREFIX}/0")) == (2, 4, b"file")


def test_bucket_that_breaks_every_upload_off_interrupts(s3: Any, s3_fault: S3Fault) -> None:
    def break_off(params: dict[str, Any]) -> None:
        raise UnseekableStreamError(stream_object=params["body"])

    s3_fault("PutObject", break_off)
    with pytest.raises(CopyInterrupted, match="the outputs bucket broke the upload off, 3 times"):
        store(bucket_of(answering(b"file")), URL)
    assert_nothing_left(s3)


def test_abort_that_fails_does_not_hide_the_reason(s3: Any, s3_fault: S3Fault) -> None:
    s3_fault("AbortMultipartUpload", lambda params: s3_error("AccessDenied", 403))
    with pytest.raises(CopyInterrupted, match="RemoteProtocolError"):
        store(bucket_of(breaking(*[bytes(MIB)] * 10)), URL)
    assert keys(s3) == []


def test_error_of_our_own_is_not_swallowed_and_leaves_no_upload(s3: Any) -> None:
    def body() -> Iterator[bytes]:
        yield bytes(9 * MIB)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store(bucket_of(lambda request: httpx.Response(200, stream=Chunks(body()))), URL)
    assert_nothing_left(s3)


# ---- over a real connection


class FileServer(ThreadingHTTPServer):
    requests: list[tuple[str, dict[str, str]]]


class FileHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        content = random_bytes(9 * MIB)
        if self.path == "/redirect":
            self.send_response(307)
            self.send_header("Location", "/file")
            self.send_header("Set-Cookie", "session=1")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = [path for path, _ in self.server.requests].count(self.path)
        truncated = self.path == "/truncated" or (self.path == "/truncated-once" and asked == 1)
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: -1 - MIB] if truncated else content)
        self.close_connection = truncated

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def file_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    server = FileServer(("127.0.0.1", 0), FileHandler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("OUTPUTS_BUCKET_NAME", BUCKET)
    monkeypatch.setenv("FILE_ORIGINS", f" http://127.0.0.1:{server.server_port}, ")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def real_bucket(server: FileServer) -> OutputsBucket:
    bucket = OutputsBucket.from_env()
    return OutputsBucket(bucket.name, [f"http://127.0.0.1:{server.server_port}"], sleep=lambda seconds: None)


def test_file_of_an_allowed_origin_is_copied_over_a_real_connection(s3: Any, file_server: FileServer) -> None:
    origin = f"http://127.0.0.1:{file_server.server_port}"
    stored = store(
        OutputsBucket.from_env(), [f"{origin}/file", f"{origin}/redirect", f"{origin}/file", f"{origin}/file?2"]
    )
    digest = hashlib.sha256(random_bytes(9 * MIB)).hexdigest()
    assert [(file.bytes, file.sha256) for file in stored] == [(9 * MIB, digest)] * 4
    for _, headers in file_server.requests:
        assert not {"authorization", "cookie"} & {name.lower() for name in headers}


def test_truncated_file_is_started_again_over_a_real_connection(s3: Any, file_server: FileServer) -> None:
    [stored] = store(real_bucket(file_server), f"http://127.0.0.1:{file_server.server_port}/truncated-once")
    assert stored.bytes == 9 * MIB
    assert [path for path, _ in file_server.requests] == ["/truncated-once"] * 2


def test_always_truncated_file_leaves_nothing_over_a_real_connection(s3: Any, file_server: FileServer) -> None:
    with pytest.raises(CopyInterrupted, match="RemoteProtocolError"):
        store(real_bucket(file_server), f"http://127.0.0.1:{file_server.server_port}/truncated")
    assert len(file_server.requests) == 3
    assert_nothing_left(s3)


# ---- the rest of the bucket


def test_stored_file_survives_being_an_item() -> None:
    stored = StoredFile("/a", 3, "k/3", 5, "00", "image/png")
    assert stored.to_item() == {
        "path": "/a", "index": 3, "key": "k/3", "bytes": 5, "sha256": "00", "content_type": "image/png"
    }  # fmt: skip
    failed = StoredFile("", 0, error="gone")
    assert failed.to_item() == {"path": "", "index": 0, "error": "gone"}
    for file in (stored, failed):
        assert StoredFile.from_item({**json.loads(json.dumps(file.to_item())), "of_a_later_version": 1}) == file


def test_url_is_presigned_with_signature_version_4(s3: Any) -> None:
    url = urlsplit(OutputsBucket(BUCKET).url(f"{PREFIX}/0", 3600))
    query = parse_qs(url.query)
    assert url.path.endswith(f"/{PREFIX}/0")
    assert BUCKET in url.netloc + url.path
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    assert query["X-Amz-Expires"] == ["3600"]


def test_payload_comes_back_as_it_was(s3: Any) -> None:
    bucket = OutputsBucket(BUCKET)
    text = json.dumps({"text": "é\u2028" * 60_000, "number": 1e300}, ensure_ascii=False)
    bucket.put_payload("payloads/id0/result", text)
    assert bucket.get_payload("payloads/id0/result") == text
    assert s3.head_object(Bucket=BUCKET, Key="payloads/id0/result")["ContentType"] == "application/json"


@pytest.mark.parametrize("key", ["", "id0/result", "/payloads/id0", "ada/id0/up0/0"])
def test_key_outside_of_the_payloads_is_an_error(s3: Any, key: str) -> None:
    with pytest.raises(ValueError, match="payload"):
        OutputsBucket(BUCKET).put_payload(key, "{}")
    with pytest.raises(ValueError, match="payload"):
        OutputsBucket(BUCKET).get_payload(key)
    assert_nothing_left(s3)


@pytest.mark.parametrize("missing", ["OUTPUTS_BUCKET_NAME", "FILE_ORIGINS"])
def test_missing_variable_fails_by_its_name(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setenv("OUTPUTS_BUCKET_NAME", BUCKET)
    monkeypatch.setenv("FILE_ORIGINS", "")
    monkeypatch.delenv(missing)
    with pytest.raises(KeyError, match=missing):
        OutputsBucket.from_env()


def test_readers_do_not_import_the_http_client() -> None:
    unwanted = "{'httpx', 'predictions.net.client', 'predictions.net.addresses'}"
    code = f"import sys, predictions.files.outputs_bucket; sys.exit(bool({unwanted} & set(sys.modules)))"
    layer = str(LIBRARY.parent)
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env={"PYTHONPATH": layer}, check=False).returncode == 0  # noqa: S603  # our own code


def test_bucket_that_copies_nothing_holds_no_memory_for_it() -> None:
    tracemalloc.start()
    try:
        bucket = OutputsBucket(BUCKET)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert bucket.name == BUCKET
    assert held < MIB
