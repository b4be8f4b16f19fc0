"""Copies output files from their hosts into the outputs bucket.

An object is visible only when all of its bytes are there, and is never written twice (`If-None-Match: *`), so an
object that exists is a finished copy: of an earlier attempt that crashed afterwards, or of one that runs now.

A file whose length its host announces is one PUT, which takes its bytes as they come: no more than one read is in
memory, and S3 verifies the SHA-256 that is recorded. A PUT that does not get all of its bytes makes no object.
All others, and what is above S3's limit for one PUT, are sent in parts.

Memory while storing: four files at once, each with 256 KiB, or one part of 5 MiB, plus the pieces that botocore and TLS
hold of it: below 32 MiB whatever the size of the files. A `data:` URL's text is in memory anyway, as part of the
output; what it decodes to comes on top.
"""

import binascii
import hashlib
import io
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from botocore.exceptions import BotoCoreError, ClientError, UnseekableStreamError

from predictions.aws.clients import client
from predictions.aws.s3 import PUT_MAX_BYTES, MultipartUpload, StreamedBody, error_code, head, put_streamed
from predictions.errors import CopyInterrupted
from predictions.files.output_references import ORIGIN_DEPTH, OutputFile, StoredFile, is_file_url

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from predictions.net.downloads import Download, DownloadClient

FILE_MAX_BYTES = 5 * 1024**3
"""The largest file that is copied: 5 GiB."""
FILE_SECONDS = 600.0
"""How long one file may take with all its attempts: 5 GiB in ten minutes is 9 MiB/s."""

STOP_BEFORE_SECONDS = 30.0
"""Copying stops when this little is left: what S3 is being sent then and the clean-up fit in it."""
_ATTEMPTS = 3
_FILES_AT_ONCE = 4
_MAX_REDIRECTS = 5
# S3 takes 10,000 parts of at least 5 MiB (https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html).
# The largest file has 1,024.
_PART_BYTES = 5 * 1024**2
_PIECE_BYTES = 256 * 1024
_SENT_BYTES = 64 * 1024

# Content types that a browser may show when it follows a link to the bucket. All others are downloads of
# application/octet-stream: everything that can carry a script (HTML, SVG, XML), and everything unknown.
_CONTENT_TYPES = re.compile(
    r"image/(?:png|jpeg|webp|gif|avif|bmp|tiff|heic|heif|jxl|x-icon|vnd\.microsoft\.icon|vnd\.radiance|x-exr)"
    r"|audio/(?:mpeg|mp3|mp4|x-m4a|aac|wav|x-wav|wave|vnd\.wave|ogg|opus|flac|x-flac|webm|midi|aiff|x-aiff)"
    r"|video/(?:mp4|x-m4v|webm|quicktime|x-matroska|mpeg|ogg|x-msvideo)"
    r"|text/(?:plain|csv|markdown|vtt)"
    r"|model/(?:gltf-binary|gltf\+json|obj|stl|ply|vnd\.usdz\+zip)"
    r"|application/(?:json|x-ndjson|jsonl|zip|gzip|x-tar|pdf|x-subrip)"
)
_OTHER_TYPE = "application/octet-stream"


class Copier:
    """Copies files into a bucket, several at once, in threads of its own.

    Args:
        file_origins: Origins of files beside Replicate's, as `scheme://host[:port]`.
        open_client: Makes the HTTP client that downloads; None for one that talks to public addresses only.
        clock: Seconds that only go forward.
    """

    def __init__(
        self,
        bucket_name: str,
        file_origins: Sequence[str],
        open_client: "Callable[[], AbstractContextManager[DownloadClient]] | None",
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self._bucket_name = bucket_name
        self._file_origins = tuple(file_origins)
        self._open_client = open_client or self._guarded_client
        self._clock = clock
        self._sleep = sleep
        self._thread = _OfThread()

    def copy_files(
        self,
        files: Sequence[OutputFile],
        prefix: str,
        remaining_seconds: Callable[[], float],
        depth: int,
        *,
        final: bool,
    ) -> list[StoredFile]:
        """Copy files, each as the object `{prefix}/{index}`; see `OutputsBucket.store`."""
        with self._open_client() as http, ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            outcomes = list(
                pool.map(lambda file: self._copy(file, f"{prefix}/{file.index}", http, remaining_seconds, depth), files)
            )
        interrupted = [outcome for outcome in outcomes if isinstance(outcome, _Interrupted)]
        if interrupted and not final:
            raise CopyInterrupted(
                f"{len(interrupted)} of {len(files)} files could not be copied yet, the first one because "
                f"{interrupted[0]}"
            )
        return [
            StoredFile(file.path, file.index, error=str(outcome)) if isinstance(outcome, _Interrupted) else outcome
            for file, outcome in zip(files, outcomes, strict=True)
        ]

    @property
    def _s3(self) -> "S3Client":
        return client("s3")

    def _guarded_client(self) -> "DownloadClient":
        # Imported here, since functions that only read outputs must not pay for an HTTP client at their cold start.
        from predictions.net.downloads import DownloadClient

        return DownloadClient(allowed_origins=self._file_origins, left=lambda: self._thread.left())

    def _copy(
        self,
        file: OutputFile,
        key: str,
        http: "DownloadClient",
        remaining_seconds: Callable[[], float],
        depth: int,
    ) -> "StoredFile | _Interrupted":
        """Copy one file, with retries; return an interruption, so that the others go on."""
        end = self._clock() + FILE_SECONDS

        def check_time() -> None:
            if remaining_seconds() < STOP_BEFORE_SECONDS:
                raise _OutOfTime("the time for copying was over")
            if self._clock() > end:
                raise _OutOfTime(f"the file host took more than {FILE_SECONDS:.0f} seconds")

        def left() -> float:
            return min(remaining_seconds() - STOP_BEFORE_SECONDS, end - self._clock())

        self._thread.left = left
        reason = ""
        for attempt in range(_ATTEMPTS):
            try:
                if attempt:
                    self._sleep(min(2.0 ** (attempt - 1), max(0.0, left())))
                check_time()
                return self._copy_once(file, key, http, check_time, depth)
            except _Refused as refusal:
                return StoredFile(file.path, file.index, error=str(refusal))
            except _OutOfTime as interruption:
                return interruption
            except _Interrupted as interruption:
                reason = str(interruption)
            except ClientError as error:
                # The stack's own fault, also if a permission is missing: the file itself is not to blame.
                reason = f"the outputs bucket answered {error_code(error)}"
            except UnseekableStreamError:
                reason = "the outputs bucket broke the upload off"
            except BotoCoreError as error:
                reason = f"the outputs bucket could not be reached ({type(error).__name__})"
        return _Interrupted(f"{reason}, {_ATTEMPTS} times")

    def _copy_once(
        self, file: OutputFile, key: str, http: "DownloadClient", check_time: Callable[[], None], depth: int
    ) -> StoredFile:
        if file.source[:5].lower() == "data:":
            return self._upload(file, key, _open_data_url(file.source), check_time, depth)
        found = head(self._bucket_name, key)
        there = found["ContentLength"] if found else None
        try:
            with self._open_url(file.source, http) as body:
                if there is None or body.length is None:
                    return self._upload(file, key, body, check_time, depth)
                if there != body.length:
                    raise _Refused(_OTHER_OBJECT)
        except _Gone:
            if there is None:
                raise
        # An earlier attempt has stored it. Its object is whole, or it would not be visible.
        return self._stored(file, key, check_time)

    def _upload(
        self, file: OutputFile, key: str, body: "_Body", check_time: Callable[[], None], depth: int
    ) -> StoredFile:
        """Write one object: as its bytes come, or in parts, invisible until it is complete."""
        headers: dict[str, Any] = {**_served_as(body.content_type), "Metadata": {ORIGIN_DEPTH: str(depth)}}
        if body.framed and body.length is not None and body.length <= PUT_MAX_BYTES:
            size, sha256, is_there = self._put(key, body, body.length, check_time, headers)
        else:
            size, sha256, is_there = self._upload_parts(key, body, check_time, headers)
        if is_there:
            stored = self._stored(file, key, check_time)
            if (stored.bytes, stored.sha256) != (size, sha256):
                raise _Refused(_OTHER_OBJECT)
            return stored
        return StoredFile(file.path, file.index, key, size, sha256, headers["ContentType"])

    def _put(
        self, key: str, body: "_Body", length: int, check_time: Callable[[], None], headers: dict[str, Any]
    ) -> tuple[int, str, bool]:
        """Send a body of a known length in one request; return its size, hash, and whether an object was there."""
        source = _Announced(body.read, length, check_time)
        sent = StreamedBody(source.read, length)
        check_time()
        try:
            put_streamed(self._bucket_name, key, sent, IfNoneMatch="*", **headers)
        except ClientError as error:
            if not _is_there(error):
                raise
            # S3 answers so before it has all of the body, too: its hash needs the rest.
            sent.drain()
            return length, sent.sha256.hexdigest(), True
        return length, sent.sha256.hexdigest(), False

    def _upload_parts(
        self, key: str, body: "_Body", check_time: Callable[[], None], headers: dict[str, Any]
    ) -> tuple[int, str, bool]:
        """Send a body in parts, or at once if it is smaller than one; return as `_put`."""
        sha256 = hashlib.sha256()
        size = 0
        part = self._thread.part
        part.clear()
        upload: MultipartUpload | None = None
        try:
            while piece := memoryview(body.read(_PIECE_BYTES)):
                check_time()
                size += len(piece)
                if size > FILE_MAX_BYTES:
                    raise _Refused(_TOO_LARGE)
                sha256.update(piece)
                if rest := part.add(piece):
                    upload = upload or MultipartUpload(self._bucket_name, key, **headers)
                    part.seek(0)
                    upload.send_part(part)
                    part.clear()
                    part.add(rest)
            if body.length not in (None, size):
                raise _Interrupted(f"the file ended after {size} of {body.length} bytes")
            check_time()
            try:
                part.seek(0)
                if upload:
                    upload.send_part(part)
                    upload.complete(IfNoneMatch="*")
                    upload = None
                else:
                    self._s3.put_object(Bucket=self._bucket_name, Key=key, Body=part, IfNoneMatch="*", **headers)  # type: ignore[arg-type]  # a file in all but typing
            except ClientError as error:
                if not _is_there(error):
                    raise
                return size, sha256.hexdigest(), True
        finally:
            if upload:
                upload.abort()
        return size, sha256.hexdigest(), False

    def _stored(self, file: OutputFile, key: str, check_time: Callable[[], None]) -> StoredFile:
        """Describe the stored object by reading it: its checksum is not stored elsewhere."""
        response = self._s3.get_object(Bucket=self._bucket_name, Key=key)
        sha256 = hashlib.sha256()
        size = 0
        with closing(response["Body"]) as body:
            for piece in body.iter_chunks(_PIECE_BYTES):
                check_time()
                sha256.update(piece)
                size += len(piece)
        return StoredFile(file.path, file.index, key, size, sha256.hexdigest(), response["ContentType"])

    @contextmanager
    def _open_url(self, url: str, http: "DownloadClient") -> "Iterator[_Body]":
        """Open the body at a URL, through at most five redirects to allowed origins."""
        from predictions.net.addresses import AddressRefused  # see _guarded_client
        from predictions.net.downloads import DownloadFailed, UrlInvalid

        # Without compression, lengths are those of the file.
        headers = {"Accept-Encoding": "identity", "User-Agent": "replicate-serverless"}
        try:
            for _ in range(_MAX_REDIRECTS + 1):
                with http.open(url, headers) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        url = response.redirect()
                        if not is_file_url(url, self._file_origins):
                            raise _Refused("the file host redirected to where files may not come from")
                        continue
                    _check_answer(response)
                    content_type = response.headers.get("Content-Type", "")
                    yield _Body(content_type, _length(response), response.length is not None, response.read)
                    return
            raise _Refused(f"the file host redirected more than {_MAX_REDIRECTS} times")
        except UrlInvalid:
            raise _Refused("the file's URL, or one that it redirects to, is not valid") from None
        except AddressRefused as error:
            raise _Refused(f"the file's address {error}") from None
        except DownloadFailed as error:
            raise _Interrupted(f"the connection to the file host failed ({error})") from None


class _OfThread(threading.local):
    """State of one copying thread.

    Attributes:
        left: How many seconds are left for its file.
    """

    def __init__(self) -> None:
        self.left: Callable[[], float] = lambda: math.inf

    @cached_property
    def part(self) -> "_UploadPart":
        """Return the upload buffer; only a thread that copies allocates it."""
        return _UploadPart()


class _Refused(Exception):
    """A file cannot be copied, now or later."""


class _Gone(_Refused):
    """The file host does not have, or does not give, the file any more."""


class _Interrupted(Exception):
    """A file was not copied, and may be later."""


class _OutOfTime(_Interrupted):
    """Not to be tried again in this call."""


_TOO_LARGE = f"the file is larger than {FILE_MAX_BYTES // 1024**3} GiB"
_OTHER_OBJECT = "another file is stored in its place"


@dataclass(frozen=True, slots=True)
class _Body:
    """A file on its way.

    Attributes:
        length: As its host announced it.
        framed: Whether nothing but the length ends it.
        read: Returns at least one byte and at most as many as it is asked for, in memory that the next call may
            overwrite; none at the end.
    """

    content_type: str
    length: int | None
    framed: bool
    read: Callable[[int], bytes | memoryview]


class _Announced:
    """A source of exactly as many bytes as were announced; of any other, it is an error."""

    def __init__(self, read: Callable[[int], bytes | memoryview], length: int, check_time: Callable[[], None]) -> None:
        self._read = read
        self._length = self._left = length
        self._check_time = check_time

    def read(self, size: int) -> bytes | memoryview:
        self._check_time()
        piece = self._read(size)
        self._left -= len(piece)
        if not piece:
            raise _Interrupted(f"the file ended after {self._length - self._left} of {self._length} bytes")
        # Nothing is received for this where the host's length ends the body, so the piece is not overwritten.
        if not self._left and self._read(1):
            raise _Interrupted(f"the file went on after the {self._length} bytes that were announced")
        return piece


class _UploadPart(io.RawIOBase):
    """One part after the other in the same memory, as a file that botocore can send.

    Memory of this size that is given back and asked for again is not always found again by the allocator.
    """

    def __init__(self) -> None:
        self._memory = memoryview(bytearray(_PART_BYTES))
        self._size = self._at = 0

    def clear(self) -> None:
        """Discard the content."""
        self._size = self._at = 0

    def add(self, piece: memoryview) -> memoryview:
        """Add what fits, and return the rest."""
        fits = piece[: _PART_BYTES - self._size]
        self._memory[self._size : self._size + len(fits)] = fits
        self._size += len(fits)
        return piece[len(fits) :]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        # All that is asked for, or a little of it: botocore asks for 1 MiB at a time, which each file would have twice.
        end = self._size if size is None or size < 0 else min(self._at + min(size, _SENT_BYTES), self._size)
        read = bytes(self._memory[self._at : end])
        self._at += len(read)
        return read

    def readinto(self, buffer: Any, /) -> int:
        read = self._memory[self._at : min(self._at + len(buffer), self._size)]
        buffer[: len(read)] = read
        self._at += len(read)
        return len(read)


def _open_data_url(url: str) -> _Body:
    comma = url.index(",")
    header, text = url[len("data:") : comma], url[comma + 1 :]
    if not header.lower().endswith(";base64"):
        content = unquote_to_bytes(text)
    else:
        header = header[: -len(";base64")]
        try:
            content = binascii.a2b_base64(text, strict_mode=True)
        except binascii.Error:
            raise _Refused("the data: URL is not valid base64") from None
    return _Body(header, len(content), True, io.BytesIO(content).read)


def _is_there(error: ClientError) -> bool:
    """Return whether an upload failed because there is an object."""
    # NoSuchUpload: a complete of which the response was lost, repeated by botocore.
    return error_code(error) in ("PreconditionFailed", "412", "NoSuchUpload")


def _check_answer(response: "Download") -> None:
    status = response.status
    if status in (403, 404, 410):
        raise _Gone(f"the file host answered {status}: the file is gone")
    if status in (408, 425, 429) or status >= 500:
        raise _Interrupted(f"the file host answered {status}")
    if status != 200:
        raise _Refused(f"the file host answered {status}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _Refused("the file host compressed the file, although it was asked not to")


def _length(response: "Download") -> int | None:
    text = response.headers.get("Content-Length")
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise _Interrupted("the file host's response has no valid Content-Length")
    if int(text) > FILE_MAX_BYTES:
        raise _Refused(_TOO_LARGE)
    return int(text)


def _served_as(content_type: str) -> dict[str, str]:
    """Return S3's arguments for an object of a content type that is not trusted."""
    name, _, parameters = content_type.lower().partition(";")
    name = name.strip()
    if not _CONTENT_TYPES.fullmatch(name):
        return {"ContentType": _OTHER_TYPE, "ContentDisposition": "attachment"}
    if name.startswith("text/") and re.search(r"charset=\"?utf-8", parameters):
        return {"ContentType": f"{name}; charset=utf-8"}
    return {"ContentType": name}
