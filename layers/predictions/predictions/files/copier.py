"""Copies output files from their hosts into the outputs bucket.

An object is visible only when all of its bytes are there, and is never written twice (`If-None-Match: *`), so an
object that exists is a finished copy: of an earlier attempt that crashed afterwards, or of one that runs now.

Memory while storing: four files at once, each with one part of 5 MiB, plus the pieces that botocore and TLS hold of
it: below 32 MiB whatever the size of the files. A `data:` URL's text is in memory anyway, as part of the output; what
it decodes to comes on top.
"""

import binascii
import hashlib
import io
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import client
from predictions.aws.s3 import MultipartUpload, error_code, head
from predictions.errors import CopyInterrupted
from predictions.files.output_references import ORIGIN_DEPTH, OutputFile, StoredFile, is_file_url

if TYPE_CHECKING:
    import httpx
    from mypy_boto3_s3 import S3Client

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
        open_client: "Callable[[], AbstractContextManager[httpx.Client]] | None",
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

    def _guarded_client(self) -> "httpx.Client":
        # Imported here, since functions that only read outputs must not pay for httpx at their cold start.
        from predictions.net.client import TimedNetwork, guarded_client

        network = TimedNetwork(lambda: self._thread.left())
        return guarded_client(allowed_origins=self._file_origins, timeout=15, network=network)

    def _copy(
        self,
        file: OutputFile,
        key: str,
        http: "httpx.Client",
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
            except BotoCoreError as error:
                reason = f"the outputs bucket could not be reached ({type(error).__name__})"
        return _Interrupted(f"{reason}, {_ATTEMPTS} times")

    def _copy_once(
        self, file: OutputFile, key: str, http: "httpx.Client", check_time: Callable[[], None], depth: int
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
        """Write one object: in one request, or in parts, invisible until completed."""
        headers: dict[str, Any] = {**_served_as(body.content_type), "Metadata": {ORIGIN_DEPTH: str(depth)}}
        sha256 = hashlib.sha256()
        size = 0
        part = self._thread.part
        part.clear()
        upload: MultipartUpload | None = None
        try:
            for piece in _pieces(body.chunks):
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
                # NoSuchUpload: a complete of which the response was lost, repeated by botocore.
                if error_code(error) not in ("PreconditionFailed", "412", "NoSuchUpload"):
                    raise
                stored = self._stored(file, key, check_time)
                if (stored.bytes, stored.sha256) != (size, sha256.hexdigest()):
                    raise _Refused(_OTHER_OBJECT) from None
                return stored
        finally:
            if upload:
                upload.abort()
        return StoredFile(file.path, file.index, key, size, sha256.hexdigest(), headers["ContentType"])

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
    def _open_url(self, url: str, http: "httpx.Client") -> "Iterator[_Body]":
        """Open the body at a URL, through at most five redirects to allowed origins."""
        import httpx  # see _guarded_client

        from predictions.net.addresses import AddressRefused

        # Without compression, lengths are those of the file.
        headers = {"Accept-Encoding": "identity", "User-Agent": "replicate-serverless"}
        try:
            for _ in range(_MAX_REDIRECTS + 1):
                with http.stream("GET", url, headers=headers) as response:
                    if response.status_code in (301, 302, 303, 307, 308):
                        url = str(response.url.join(response.headers.get("Location", "")))
                        if not is_file_url(url, self._file_origins):
                            raise _Refused("the file host redirected to where files may not come from")
                        continue
                    _check_answer(response)
                    yield _Body(response.headers.get("Content-Type", ""), _length(response), response.iter_raw())
                    return
            raise _Refused(f"the file host redirected more than {_MAX_REDIRECTS} times")
        except httpx.InvalidURL:
            raise _Refused("the file's URL, or one that it redirects to, is not valid") from None
        except AddressRefused as error:
            raise _Refused(f"the file's address {error}") from None
        except httpx.HTTPError as error:
            raise _Interrupted(f"the connection to the file host failed ({type(error).__name__})") from None


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
    content_type: str
    length: int | None
    chunks: Iterable[bytes]


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
    return _Body(header, len(content), (content,))


def _check_answer(response: "httpx.Response") -> None:
    status = response.status_code
    if status in (403, 404, 410):
        raise _Gone(f"the file host answered {status}: the file is gone")
    if status in (408, 425, 429) or status >= 500:
        raise _Interrupted(f"the file host answered {status}")
    if status != 200:
        raise _Refused(f"the file host answered {status}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _Refused("the file host compressed the file, although it was asked not to")


def _length(response: "httpx.Response") -> int | None:
    text = response.headers.get("Content-Length")
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise _Interrupted("the file host's response has no valid Content-Length")
    if int(text) > FILE_MAX_BYTES:
        raise _Refused(_TOO_LARGE)
    return int(text)


def _pieces(chunks: Iterable[bytes]) -> Iterator[memoryview]:
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), _PIECE_BYTES):
            yield view[start : start + _PIECE_BYTES]


def _served_as(content_type: str) -> dict[str, str]:
    """Return S3's arguments for an object of a content type that is not trusted."""
    name, _, parameters = content_type.lower().partition(";")
    name = name.strip()
    if not _CONTENT_TYPES.fullmatch(name):
        return {"ContentType": _OTHER_TYPE, "ContentDisposition": "attachment"}
    if name.startswith("text/") and re.search(r"charset=\"?utf-8", parameters):
        return {"ContentType": f"{name}; charset=utf-8"}
    return {"ContentType": name}
