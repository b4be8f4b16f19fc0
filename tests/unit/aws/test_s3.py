import base64
import hashlib
import io
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import botocore.session
import pytest
from botocore.awsrequest import AWSResponse, HTTPHeaders
from botocore.exceptions import ClientError
from predictions.aws import clients, s3
from predictions.aws.s3 import SourceFailed, StreamedBody, put_streamed

MIB = 1024**2
ENDPOINTS = ["https://s3.us-east-1.amazonaws.com", "http://127.0.0.1:4566"]


def answer(request: Any, status: int) -> AWSResponse:
    """A response without a body."""
    return AWSResponse(request.url, status, HTTPHeaders(), SimpleNamespace(stream=lambda: iter(())))


@pytest.fixture(params=ENDPOINTS, ids=["TLS", "emulator"])
def sent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests that were sent, as S3 would get them."""
    created = botocore.session.get_session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=request.param,
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
        config=clients._S3_CONFIG,
    )
    monkeypatch.setattr(clients, "_client", lambda name: created)
    requests = Requests()
    created.meta.events.register("before-send.s3", requests.take)  # type: ignore[arg-type]  # its answer is sent
    return requests


class Requests(list[Any]):
    """Takes each request in the place of the network, and reads its body as urllib3 does."""

    status = 200
    taken: list[bytes]

    def take(self, request: Any, **_: Any) -> AWSResponse:
        self.append(request)
        if self.status == 200:
            self.taken = [bytes(piece) for piece in iter(lambda: request.body.read(16384), b"")]
        return answer(request, self.status)


def source_of(content: bytes, most: int = 100_000) -> Callable[[int], bytes]:
    """Gives a little at a time, as a connection does."""
    whole = io.BytesIO(content)
    return lambda size: whole.read(min(size, most))


def decoded(framed: bytes) -> tuple[bytes, list[int], dict[bytes, bytes]]:
    """The content, the sizes of its frames, and what is behind them, read by the letter."""
    content = b""
    sizes: list[int] = []
    while True:
        line, _, framed = framed.partition(b"\r\n")
        if not (size := int(line, 16)):
            break
        content, sizes = content + framed[:size], [*sizes, size]
        assert framed[size : size + 2] == b"\r\n"
        framed = framed[size + 2 :]
    assert framed.endswith(b"\r\n\r\n")
    lines = framed[:-4].split(b"\r\n")
    return content, sizes, {name: value for name, _, value in (line.partition(b":") for line in lines)}


@pytest.mark.parametrize("size", [0, 1, 100_000, MIB - 1, MIB, MIB + 1, 3 * MIB + 17])
def test_object_is_sent_with_its_length_before_and_its_sha256_behind(sent: Any, size: int) -> None:
    content = hashlib.shake_128(b"seed").digest(size)
    body = StreamedBody(source_of(content), size)
    put_streamed("outputs", "a/0", body, IfNoneMatch="*", ContentType="image/png")
    [request] = sent
    framed = b"".join(sent.taken)
    found, sizes, behind = decoded(framed)
    digest = hashlib.sha256(content)
    assert found == content
    assert sizes == [MIB] * (size // MIB) + [size % MIB] * bool(size % MIB)
    assert behind == {b"x-amz-checksum-sha256": base64.b64encode(digest.digest())}
    assert body.sha256.hexdigest() == digest.hexdigest()
    headers = {
        name.lower(): value.decode() if isinstance(value, bytes) else value for name, value in request.headers.items()
    }
    assert headers["content-length"] == str(len(framed))
    assert headers["x-amz-decoded-content-length"] == str(size)
    assert headers["content-encoding"] == "aws-chunked"
    assert headers["x-amz-trailer"] == "x-amz-checksum-sha256"
    assert headers["x-amz-content-sha256"] == "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
    assert headers["if-none-match"] == "*"
    assert "transfer-encoding" not in headers
    signed = headers["authorization"].partition("SignedHeaders=")[2].split(",")[0].split(";")
    assert {"content-length", "if-none-match", "x-amz-trailer", "x-amz-content-sha256"} <= set(signed)


def test_body_of_any_size_takes_the_memory_of_one_read(sent: Any) -> None:
    piece = memoryview(bytearray(256 * 1024))
    body = StreamedBody(lambda size: piece[:size], 64 * MIB)
    largest = 0

    def take(request: Any, **_: Any) -> AWSResponse:
        nonlocal largest
        while read := request.body.read(16384):
            largest = max(largest, len(read))
        return answer(request, 200)

    clients.client("s3").meta.events.register_first("before-send.s3", take)  # type: ignore[arg-type]  # its answer is sent
    put_streamed("outputs", "warm", StreamedBody(source_of(b""), 0))
    tracemalloc.start()
    try:
        put_streamed("outputs", "a/0", body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert largest == len(piece)
    assert peak < MIB


def test_body_is_passed_on_as_it_comes(sent: Any) -> None:
    pieces = [b"a" * 10, b"b", b"c" * 1000]
    left = iter(pieces)
    put_streamed("outputs", "a/0", StreamedBody(lambda size: next(left), 1011))
    assert sent.taken[1:4] == pieces


def test_error_of_the_source_is_raised_and_the_request_not_repeated(sent: Any) -> None:
    asked = []

    def read(size: int) -> bytes:
        asked.append(size)
        if len(asked) > 1:
            raise ZeroDivisionError("the source's own")
        return b"some"

    with pytest.raises(ZeroDivisionError):
        put_streamed("outputs", "a/0", StreamedBody(read, 10))
    assert len(asked) == 2
    assert len(sent) == 1


def test_request_that_failed_before_its_body_was_read_is_repeated(sent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)
    statuses = iter([503, 200])

    def next_status(request: Any, **_: Any) -> None:
        sent.status = next(statuses)

    clients.client("s3").meta.events.register_first("before-send.s3", next_status)
    put_streamed("outputs", "a/0", StreamedBody(source_of(b"file"), 4))
    assert len(sent) == 2
    assert decoded(b"".join(sent.taken))[0] == b"file"


def test_refusal_leaves_the_rest_of_the_body_to_read(sent: Any) -> None:
    sent.status = 412
    body = StreamedBody(source_of(b"file"), 4)
    with pytest.raises(ClientError):
        put_streamed("outputs", "a/0", body)
    assert body.tell() == 0
    body.drain()
    assert body.sha256.hexdigest() == hashlib.sha256(b"file").hexdigest()


def test_body_that_was_read_cannot_be_rewound() -> None:
    body = StreamedBody(source_of(b"file"), 4)
    assert body.seek(0) == 0
    body.read(1)
    for offset, whence in ((0, io.SEEK_SET), (0, io.SEEK_END)):
        with pytest.raises(io.UnsupportedOperation):
            body.seek(offset, whence)
    assert body.read() == b"ile"


def test_error_of_the_source_is_one_that_botocore_does_not_repeat() -> None:
    def read(size: int) -> bytes:
        raise ZeroDivisionError

    with pytest.raises(SourceFailed):
        StreamedBody(read, 1).read(1)


def test_largest_object_of_one_request_is_what_s3_takes() -> None:
    assert s3.PUT_MAX_BYTES == 5_000_000_000
