"""S3: uploads of any size, and objects that may not be there.

put_streamed       one object in one request, from a source that is read once
MultipartUpload    one object in parts, whose length nobody knows
"""

import base64
import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError
from botocore.httpchecksum import AwsChunkedWrapper

from predictions.aws.clients import client

if TYPE_CHECKING:
    from botocore.awsrequest import AWSRequest
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, HeadObjectOutputTypeDef

# S3 responds 403 for a missing key to callers that may not list the bucket, such as our functions:
# https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadObject.html
_MISSING = ("NoSuchKey", "AccessDenied", "404", "403")

PUT_MAX_BYTES = 5 * 10**9
"""The largest object of one request: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html"""

# Of a body that is sent with its checksum behind it: at least 8 KiB, except the last.
# https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-streaming-trailers.html
_FRAME_BYTES = 1024**2
_TRAILER = b"x-amz-checksum-sha256"
_registering = threading.Lock()


def error_code(error: ClientError) -> str:
    """Return the code of an AWS error, such as `NoSuchKey`."""
    return str(error.response.get("Error", {}).get("Code", "an unknown error"))


def is_missing(error: ClientError) -> bool:
    """Return whether an error means a missing object (403 without list access)."""
    return error_code(error) in _MISSING


def head(bucket: str, key: str) -> "HeadObjectOutputTypeDef | None":
    """Return an object's metadata, or None if there is no such object."""
    try:
        return client("s3").head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if is_missing(error):
            return None
        raise


def download_url(bucket: str, key: str, seconds: int, *, version_id: str | None = None, for_head: bool = False) -> str:
    """Return a presigned URL that makes browsers save an object, not show it.

    Args:
        bucket: The object's bucket.
        key: Its key.
        seconds: How long the URL works.
        version_id: Its version; None for the current one.
        for_head: Whether the URL is for HEAD instead of GET: the signature covers the method.
    """
    s3 = client("s3")
    asked: dict[str, Any] = {"Bucket": bucket, "Key": key}
    if version_id is not None:
        asked["VersionId"] = version_id
    if not for_head:
        asked["ResponseContentDisposition"] = "attachment"
    return s3.generate_presigned_url("head_object" if for_head else "get_object", Params=asked, ExpiresIn=seconds)


class MultipartUpload:
    """A multipart upload; the bucket's lifecycle rule removes what a crash leaves.

    Args:
        **headers: Of the object, such as `ContentType`.
    """

    def __init__(self, bucket: str, key: str, **headers: Any) -> None:
        self._s3 = client("s3")
        self._at: dict[str, Any] = {"Bucket": bucket, "Key": key}
        self._at["UploadId"] = self._s3.create_multipart_upload(**self._at, **headers)["UploadId"]
        self._parts: list[CompletedPartTypeDef] = []

    def send_part(self, body: Any) -> None:
        """Send the next part, bytes or a file: at least 5 MiB unless it is the last."""
        number = len(self._parts) + 1
        sent = self._s3.upload_part(**self._at, PartNumber=number, Body=body)
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})

    def complete(self, **conditions: Any) -> None:
        """Make the object visible, under conditions such as `IfNoneMatch`."""
        self._s3.complete_multipart_upload(**self._at, MultipartUpload={"Parts": self._parts}, **conditions)

    def abort(self) -> None:
        """Discard what was sent; ignore a failure, since an earlier error led here."""
        with suppress(ClientError, BotoCoreError):
            self._s3.abort_multipart_upload(**self._at)


class StreamedBody:
    """The body of one `put_streamed`: read once, and hashed on its way.

    Args:
        read: Returns at least one byte and at most as many as it is asked for, in memory that it may use again; raises
            where there are no more.
        length: The bytes that are sent.

    Attributes:
        sha256: The hash of what was read.
    """

    def __init__(self, read: "Callable[[int], bytes | memoryview]", length: int) -> None:
        self._read = read
        self._length = length
        self._left = length
        self.sha256 = hashlib.sha256()

    def __len__(self) -> int:
        return self._length

    def read(self, size: int | None = None, /) -> bytes | memoryview:
        """Read what comes next: at most `size` bytes; all that is left where that is None.

        Raises:
            SourceFailed: The source raised an error, which is its cause.
        """
        if size is None or size < 0:
            return b"".join(iter(lambda: bytes(self.read(_FRAME_BYTES)), b""))
        size = min(size, self._left)
        if not size:
            return b""
        try:
            piece = self._read(size)
        except Exception as error:
            raise SourceFailed from error
        self.sha256.update(piece)
        self._left -= len(piece)
        return piece

    def drain(self) -> None:
        """Read what is left, so that the hash is that of all of it.

        Raises:
            Exception: What the source raised.
        """
        with _errors_of_source():
            while self.read(_FRAME_BYTES):
                pass

    def tell(self) -> int:
        """Return how many bytes were read."""
        return self._length - self._left

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Stay at the beginning: nothing that was read can be read again.

        Raises:
            io.UnsupportedOperation: Somewhere else is meant.
        """
        if (offset, whence) != (0, io.SEEK_SET) or self.tell():
            raise io.UnsupportedOperation("a body that is read once cannot be rewound")
        return 0


class SourceFailed(CancelledError):
    """The source of a body raised an error while it was sent.

    botocore repeats a request of which the body failed, except for this class of errors.
    """


def put_streamed(bucket: str, key: str, body: StreamedBody, **headers: Any) -> None:
    """Create an object in one request; S3 makes it visible when it has all of it and has verified its SHA-256.

    The hash is known at the end only, so it follows the body. The payload itself is not signed, as botocore does over
    TLS: that takes the hash before the first byte.

    Args:
        bucket: The object's bucket.
        key: Its key.
        body: At most `PUT_MAX_BYTES`.
        **headers: Of the object, such as `ContentType`, and conditions such as `IfNoneMatch`.

    Raises:
        Exception: What the body's source raised; S3 discards what it has got.
        botocore.exceptions.UnseekableStreamError: S3 broke the request off, after some of the body was read.
    """
    s3 = client("s3")
    hooks: Any = s3.meta.events
    with _registering:  # a second registration of the same id is ignored
        hooks.register("before-call.s3.PutObject", _checksum_behind, unique_id="checksum behind the body")
        hooks.register("before-sign.s3.PutObject", _frame, unique_id="frames of the body")
    with _errors_of_source():
        s3.put_object(Bucket=bucket, Key=key, Body=body, ChecksumAlgorithm="SHA256", **headers)  # type: ignore[arg-type]  # a file in all but typing


@contextmanager
def _errors_of_source() -> Iterator[None]:
    try:
        yield
    except SourceFailed as failed:
        raise failed.__cause__ or failed from None


def _checksum_behind(params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
    """Have a checksum sent behind the body at an endpoint without TLS (the emulator's) too."""
    if isinstance(params["body"], StreamedBody):
        context["checksum"]["request_algorithm"]["in"] = "trailer"
        context["streamed_body"] = params["body"]


def _frame(request: "AWSRequest", **_: Any) -> None:
    """Replace botocore's wrapper of the body: it copies 32 bytes for each one that it sends, and hides the length."""
    body = request.context.get("streamed_body")
    if isinstance(body, StreamedBody):
        framed = _Framed(body)
        request.data = framed
        for name in ("Transfer-Encoding", "Content-Length"):
            del request.headers[name]
        request.headers["Content-Length"] = str(len(framed))


class _Framed(AwsChunkedWrapper):
    """A body in frames, and its SHA-256 behind them, as they come: nothing is collected."""

    def __init__(self, body: StreamedBody) -> None:
        self._body = body
        self._rewind()

    def _rewind(self) -> None:
        self._ahead = self._next_head()

    def __len__(self) -> int:
        whole, last = divmod(len(self._body), _FRAME_BYTES)
        frames = whole * _framed_length(_FRAME_BYTES) + (_framed_length(last) if last else 0)
        return frames + len(b"0\r\n%s:\r\n\r\n" % _TRAILER) + 44

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> None:
        self._body.seek(offset, whence)
        self._rewind()

    def read(self, size: int | None = None, /) -> bytes | memoryview:  # type: ignore[override]  # is only sent
        """Read what comes next, more than is asked for too: urllib3 asks for 16 KiB, and sends what it gets."""
        if size is None or size <= 0:
            return b"".join(iter(lambda: bytes(self.read(_FRAME_BYTES)), b""))
        if not self._ahead and self._in_frame:
            piece = self._body.read(self._in_frame)
            self._in_frame -= len(piece)
            if not self._in_frame:
                self._ahead = b"\r\n" + self._next_head()
            return piece
        head, self._ahead = self._ahead, b""
        return head

    def _next_head(self) -> bytes:
        self._in_frame = min(_FRAME_BYTES, len(self._body) - self._body.tell())
        if self._in_frame:
            return b"%x\r\n" % self._in_frame
        return b"0\r\n%s:%s\r\n\r\n" % (_TRAILER, base64.b64encode(self._body.sha256.digest()))


def _framed_length(size: int) -> int:
    return len(b"%x\r\n\r\n" % size) + size
