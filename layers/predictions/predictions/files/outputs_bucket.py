"""The outputs bucket: the files of a prediction's output, and payloads that are too large for the table.

    find_files(output)        where files are in an output
    OutputsBucket.store       copies them, each whole or not at all
    place_files(output)       the output with other values in the places of its files
    OutputsBucket.delete_all  removes whatever the bucket has of one prediction

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
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote_to_bytes

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import client
from predictions.errors import CopyInterrupted

if TYPE_CHECKING:
    import httpx
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"

FILE_MAX_BYTES = 5 * 1024**3
"""The largest file that is copied: 5 GiB."""

FILES_LIMIT = 1000
"""The most files of one output that are stored: each costs a download and a PUT, and a webhook of 6 MB has room for the
addresses of 300,000."""

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

# What a browser may show when it follows a link to the bucket. Not here, and so a download of
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

# One owner's files are below one segment; a segment is what our own ids are made of, and cannot climb.
_PREFIX = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._@+=-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._@+=-]*)*")
_PAYLOADS = "payloads/"
_UNSAFE = re.compile(r"[^A-Za-z0-9._@+=-]")
_OUTPUT_PREFIX_LIMIT_CHARACTERS = 512

# 403 is S3's answer for a missing key to those who may not list the bucket, as our functions:
# https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadObject.html
_NOT_THERE = ("404", "403")
# Of a conditional write: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
_REPLACED_MEANWHILE = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey", "404")
# Concurrent webhooks of one prediction: each attempt that fails is one that another writer won.
_LONGER_ATTEMPTS = 3
# Metadata of an object that grows: the length of its text.
_CHARACTERS = "characters"

ORIGIN_DEPTH = "origin-depth"
"""Metadata of a stored file: how many results of this stack the prediction that made it descends from."""

_URL = re.compile(
    r"(https?)://([a-z0-9.-]+)(?::([0-9]{1,5}))?(?=[/?#]|\Z)[^\s\x00-\x1f\x7f-\x9f\ud800-\udfff]*",
    re.IGNORECASE,
)
# A media type is required, although RFC 2397 has a default: `data:,` at the start of a text is no file.
_DATA_HEADER = re.compile(r"data:([a-z0-9!#$&^_.+-]+/[a-z0-9!#$&^_.+-]+)((?:;[!-+\--:<-~]+)*)", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")
_NOT_IN_A_URL = re.compile(r"[^!-~]")


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file in an output.

    Attributes:
        index: Its number in the order of the output, from 0.
        path: Where it is: a JSON pointer (RFC 6901), `""` for an output that is the file.
        source: Its `https:` or `data:` URL. It gives access to the file, so it does not belong into logs.
    """

    index: int
    path: str
    source: str


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What became of a file: an object in the bucket, or the reason why there is none.

    Attributes:
        path: Where it is in the output (RFC 6901).
        index: Its number in the order of the output.
        key: The object's key.
        bytes: Its size.
        sha256: Of its bytes, in hexadecimal.
        content_type: As the bucket serves it.
        error: Why there is no object, for the person who asked for the prediction; all of the above but
            `path` and `index` are then None.
    """

    path: str
    index: int
    key: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    content_type: str | None = None
    error: str | None = None

    def to_item(self) -> dict[str, Any]:
        """This as JSON, without what is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_item(cls, item: Mapping[str, Any]) -> "StoredFile":
        """The inverse of `to_item`; names it does not know are passed over."""
        return cls(**{field.name: item[field.name] for field in fields(cls) if field.name in item})


def safe_prefix(text: str) -> str:
    """A place for files below their owner's, from a text of anybody's, such as the key of another object.

    Returns:
        Segments of harmless characters with slashes between them, none of which climbs or is a prediction's own
        folder; at most 512 characters. Empty where nothing is left.
    """
    segments = [_UNSAFE.sub("_", segment) for segment in text[:_OUTPUT_PREFIX_LIMIT_CHARACTERS].split("/") if segment]
    safe = [segment if re.match(r"[A-Za-z0-9_-]", segment) else f"_{segment[1:]}" for segment in segments]
    if safe and re.fullmatch(r"[a-z0-9]{26}", safe[0]):
        safe[0] = f"_{safe[0]}"
    return "/".join(safe)


def folder(owner: str, prediction_id: str, output_prefix: str | None = None) -> str:
    """Where the files of a prediction are, without a slash at the end.

    Args:
        owner: Whose prediction it is.
        prediction_id: Our id.
        output_prefix: From `safe_prefix`, or None for the usual place.
    """
    return f"{owner}/{output_prefix}/{prediction_id}" if output_prefix else f"{owner}/{prediction_id}"


def find_files(output: JSON, is_file_url: Callable[[str], bool]) -> list[OutputFile]:
    """All files anywhere in an output.

    The order is that of lists, and of the sorted keys of objects: the order of keys may be another one in the
    next answer about the same prediction, and a file keeps its index.

    Args:
        output: Parsed JSON of any depth and size.
        is_file_url: Whether an `https:` or `http:` URL is that of a file; see `is_file_url`.

    Returns:
        The files. A string is one if it is, as a whole, such a URL or a `data:` URL with a media type.
    """
    return [
        OutputFile(index, _pointer(place), source) for index, (place, source) in enumerate(_walk(output, is_file_url))
    ]


def replace_files(output: JSON, values: Mapping[str, JSON]) -> JSON:
    """An output with other values in some places; the given one stays as it is.

    Args:
        output: Parsed JSON.
        values: New values by the JSON pointers of `find_files`: our URL, or None for a file that was not
            stored.

    Returns:
        The new output, which shares what did not change with the given one.

    Raises:
        LookupError: A pointer leads nowhere in this output.
    """
    root: list[JSON] = [output]
    ours: dict[int, Any] = {}  # by id(); it also keeps the copies alive, so that no id is given twice

    for path, value in values.items():
        start, *steps = path.split("/")
        if start:
            raise LookupError(f"not a JSON pointer: {path[:200]!r}")
        parent: Any = root
        token: Any = 0
        for step in steps:
            child = parent[token]
            if id(child) not in ours:
                if not isinstance(child, dict | list):
                    raise LookupError(f"nothing is at {path[:200]!r}")
                child = child.copy()
                ours[id(child)] = child
                parent[token] = child
            parent, token = child, _token(child, step)
        parent[token] = value
    return root[0]


@dataclass(slots=True)
class _Level:
    """One container on the way to a value: the given one, the names left in it, its own name, and its copy, if any."""

    source: Any
    names: Iterator[Any]
    name: str | int
    copy: Any = None


def place_files(output: JSON, values: Mapping[str, JSON], is_file_url: Callable[[str], bool]) -> JSON:
    """Replace every file in an output by its value, or by None if it has none; the given output stays as it is.

    The work is that of one walk, however many files there are: only containers that hold files are copied, each once,
    and paths are written out only while values are left to place.

    Args:
        output: Parsed JSON of any depth and size.
        values: Values by the JSON pointers of `find_files`.
        is_file_url: As for `find_files`.

    Returns:
        The new output, which shares what holds no file with the given one.

    Raises:
        LookupError: The pointer of a value leads nowhere in this output.
    """
    root: list[JSON] = [output]
    left = dict(values)
    levels = [_Level([output], iter((0,)), "", root)]
    while levels:
        level = levels[-1]
        for name in level.names:
            value = level.source[name]
            if isinstance(value, str):
                if _is_file(value, is_file_url):
                    _copy_levels(levels)
                    path = "".join(f"/{_escaped(each)}" for each in (*(above.name for above in levels[2:]), name))
                    level.copy[name] = left.pop(path if len(levels) > 1 else "", None) if left else None
            elif isinstance(value, dict | list):
                names = sorted(value) if isinstance(value, dict) else range(len(value))
                levels.append(_Level(value, iter(names), name))
                break
        else:
            levels.pop()
    # An older release may have taken other texts for files.
    return replace_files(root[0], left) if left else root[0]


def _copy_levels(levels: Sequence[_Level]) -> None:
    """Copy the containers that lead to a file, from the first one down that is not copied yet."""
    first = len(levels)
    while levels[first - 1].copy is None:
        first -= 1
    for number in range(first, len(levels)):
        level = levels[number]
        level.copy = level.source.copy()
        levels[number - 1].copy[level.name] = level.copy


def _token(container: Any, step: str) -> str | int:
    """One step of a JSON pointer into a container, where it leads to something.

    Raises:
        LookupError: It does not.
    """
    token: str | int = step.replace("~1", "/").replace("~0", "~")
    if isinstance(container, list):
        if not re.fullmatch(r"[0-9]{1,18}", step):
            raise LookupError(f"no index of a list: {step[:200]!r}")
        token = int(step)
    container[token]
    return token


def is_file_url(url: str, file_origins: Iterable[str] = ()) -> bool:
    """Whether a URL is that of an output file, by its origin alone.

    "Output files are served by replicate.delivery and its subdomains":
    https://replicate.com/docs/topics/predictions/output-files

    Args:
        url: Any text.
        file_origins: Further origins, as `scheme://host[:port]`.
    """
    origin = _origin(url)
    if origin is None:
        return False
    scheme, host, port = origin
    if scheme == "https" and port == 443 and (host == "replicate.delivery" or host.endswith(".replicate.delivery")):
        return True
    return any(origin == _origin(allowed) for allowed in file_origins)


class OutputsBucket:
    """The S3 bucket of outputs and payloads. Safe to use from one thread; `store` uses several of its own.

    Args:
        name: The bucket's name.
        file_origins: Origins of files beside Replicate's, as `scheme://host[:port]`.
        open_client: Makes the HTTP client that downloads; by default one that talks to public addresses only.
        clock: Seconds that only go forward.
        sleep: Waits, in seconds.
    """

    def __init__(
        self,
        name: str,
        file_origins: Sequence[str] = (),
        *,
        open_client: "Callable[[], AbstractContextManager[httpx.Client]] | None" = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = name
        self._file_origins = tuple(file_origins)
        self._open_client = open_client or self._guarded_client
        self._clock = clock
        self._sleep = sleep
        self._thread = _Copier()

    @classmethod
    def from_env(cls) -> "OutputsBucket":
        """The bucket of `OUTPUTS_BUCKET_NAME`, with the comma-separated `FILE_ORIGINS` (may be empty)."""
        origins = [origin.strip() for origin in os.environ["FILE_ORIGINS"].split(",")]
        return cls(os.environ["OUTPUTS_BUCKET_NAME"], [origin for origin in origins if origin])

    def find_files(self, output: JSON) -> list[OutputFile]:
        """All files in an output, on the hosts that this stack copies from; see the function `find_files`."""
        return find_files(output, self._is_file_url)

    def files_to_store(self, output: JSON) -> tuple[list[OutputFile], list[StoredFile]]:
        """Find the files of an output that are stored, at most `FILES_LIMIT`.

        Returns:
            The files; and one entry for all files beyond the limit, in the place of the first of them, with the reason
            why they are not stored. No entry if there are none.
        """
        found = _walk(output, self._is_file_url)
        files = [
            OutputFile(index, _pointer(place), source)
            for index, (place, source) in enumerate(islice(found, FILES_LIMIT))
        ]
        if (beyond := next(found, None)) is None:
            return files, []
        count = FILES_LIMIT + 1 + sum(1 for _ in found)
        error = f"the output has {count} files: the first {FILES_LIMIT} are stored, this one and those after it are not"
        return files, [StoredFile(_pointer(beyond[0]), FILES_LIMIT, error=error)]

    def place_files(self, output: JSON, values: Mapping[str, JSON]) -> JSON:
        """Replace every file in an output by its value, or by None; see the function `place_files`."""
        return place_files(output, values, self._is_file_url)

    def holds_files(self, output: JSON) -> bool:
        """Whether `find_files` would find any; stops at the first."""
        return next(_walk(output, self._is_file_url), None) is not None

    def url(self, key: str, expires_seconds: int) -> str:
        """A presigned link to an object; it ends then, or with the function's credentials if sooner."""
        return self._s3.generate_presigned_url(
            "get_object", Params={"Bucket": self.name, "Key": key}, ExpiresIn=expires_seconds
        )

    def put_payload(self, key: str, text: str | bytes) -> None:
        """Stores JSON text.

        The last writer wins: where contents can differ, give each a key of its own (with its hash, say).

        Args:
            key: Starts with `payloads/`.
            text: JSON; as bytes where the caller has them, so that a long one is not encoded twice.
        """
        body = text.encode() if isinstance(text, str) else text
        self._s3.put_object(Bucket=self.name, Key=_payload_key(key), Body=body, ContentType="application/json")

    def put_longer_payload(self, key: str, text: str) -> bool:
        """Store JSON text in an object that grows, unless a text at least as long is stored there.

        Each write is conditional on the object that was measured, so a concurrent or late writer never shortens it.

        Args:
            key: Starts with `payloads/`.
            text: JSON.

        Returns:
            Whether the object holds this text or one at least as long; False if other writers replaced it between each
            measurement and the write.
        """
        to: dict[str, Any] = {"Bucket": self.name, "Key": _payload_key(key)}
        for _ in range(_LONGER_ATTEMPTS):
            condition: dict[str, Any] = {"IfNoneMatch": "*"}
            try:
                there = self._s3.head_object(**to)
            except ClientError as error:
                if _code(error) not in _NOT_THERE:
                    raise
            else:
                if int(there["Metadata"].get(_CHARACTERS, "0")) >= len(text):
                    return True
                condition = {"IfMatch": there["ETag"]}
            try:
                self._s3.put_object(
                    **to, Body=text.encode(), ContentType="application/json",
                    Metadata={_CHARACTERS: str(len(text))}, **condition,
                )  # fmt: skip
            except ClientError as error:
                if _code(error) not in _REPLACED_MEANWHILE:
                    raise
            else:
                return True
        return False

    def get_payload(self, key: str) -> str:
        """JSON text that `put_payload` stored.

        Raises:
            botocore.exceptions.ClientError: `NoSuchKey`, or `AccessDenied` where listing is not allowed: it
                is not there, which the bucket's lifecycle rules can bring about.
        """
        body: StreamingBody = self._s3.get_object(Bucket=self.name, Key=_payload_key(key))["Body"]
        return body.read().decode()

    def delete_all(self, prediction_id: str, owner: str, output_prefix: str | None = None) -> None:
        """Removes every object of one prediction: its files, its payloads, and the parts of uploads that broke off.

        Found by listing, so that also what a function left behind that died before it wrote the key down is removed.
        Twice does no harm.

        Args:
            prediction_id: Our id.
            owner: Whose prediction it is.
            output_prefix: As in `folder`.

        Raises:
            botocore.exceptions.ClientError: S3 did not remove all of it.
            ValueError: An id or owner has other characters than those that we make.
        """
        for prefix in (f"{folder(owner, prediction_id, output_prefix)}/", f"{_PAYLOADS}{prediction_id}/"):
            if not _PREFIX.fullmatch(prefix[:-1]):
                raise ValueError(f"not a prefix of outputs: {prefix!r}")
            for uploads in self._s3.get_paginator("list_multipart_uploads").paginate(Bucket=self.name, Prefix=prefix):
                for upload in uploads.get("Uploads", []):
                    self._s3.abort_multipart_upload(Bucket=self.name, Key=upload["Key"], UploadId=upload["UploadId"])
            for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix):
                # One call for each, since an error of one among many comes as a success.
                for found in page.get("Contents", []):
                    self._s3.delete_object(Bucket=self.name, Key=found["Key"])

    def store(
        self,
        files: Sequence[OutputFile],
        *,
        prefix: str,
        remaining_seconds: Callable[[], float],
        final: bool = False,
        depth: int = 0,
    ) -> list[StoredFile]:
        """Copies files into the bucket, as objects `{prefix}/{index}`, several at once.

        Calling it again, after a crash too, copies what is missing and recognises what is there. A file that
        breaks off, or does not have the size that was announced, is started again (three attempts, ten
        minutes at most).

        Args:
            files: As `find_files` gave them for this prediction.
            prefix: `{folder(…)}/{upstream_id}`; only from ids that we made or checked.
            remaining_seconds: How long the function may still run. Copying stops with 30 seconds left.
            final: There will be no further call: what may succeed later counts as failed.
            depth: Of the prediction: each object carries it as `ORIGIN_DEPTH`.

        Returns:
            One `StoredFile` for each file, in their order. One with an `error` cannot succeed: gone, too
            large, not allowed, another object in its place (or, when `final`, not within this time).

        Raises:
            CopyInterrupted: Some files could not be copied yet (network, 5xx, time, S3). The others are
                stored, and nothing is left of these.
            ValueError: The prefix has other characters than ids have.
        """
        if not _PREFIX.fullmatch(prefix) or f"{prefix}/".startswith(_PAYLOADS):
            raise ValueError(f"not a prefix of outputs: {prefix!r}")
        if not files:
            return []
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

    def _is_file_url(self, url: str) -> bool:
        return is_file_url(url, self._file_origins)

    def _guarded_client(self) -> "httpx.Client":
        # Imported here, because the functions that only read outputs must not pay for httpx at their cold
        # start.
        from predictions.net.addresses import TimedNetwork, guarded_client

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
        """Copies one file with all its attempts; an interruption is returned, so that the others go on."""
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
                # Ours to mend, also where it is a missing permission: the file itself is not to blame.
                reason = f"the outputs bucket answered {_code(error)}"
            except BotoCoreError as error:
                reason = f"the outputs bucket could not be reached ({type(error).__name__})"
        return _Interrupted(f"{reason}, {_ATTEMPTS} times")

    def _copy_once(
        self, file: OutputFile, key: str, http: "httpx.Client", check_time: Callable[[], None], depth: int
    ) -> StoredFile:
        if file.source[:5].lower() == "data:":
            return self._upload(file, key, _open_data_url(file.source), check_time, depth)
        there = self._size(key)
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
        """Writes one object: at once if it is one part, else in parts that show nothing until the end."""
        headers: dict[str, Any] = {**_served_as(body.content_type), "Metadata": {ORIGIN_DEPTH: str(depth)}}
        sha256 = hashlib.sha256()
        size = 0
        part = self._thread.part
        part.clear()
        upload: _Multipart | None = None
        try:
            for piece in _pieces(body.chunks):
                check_time()
                size += len(piece)
                if size > FILE_MAX_BYTES:
                    raise _Refused(_TOO_LARGE)
                sha256.update(piece)
                if rest := part.add(piece):
                    upload = upload or _Multipart(self._s3, self.name, key, headers)
                    upload.add(part)
                    part.clear()
                    part.add(rest)
            if body.length not in (None, size):
                raise _Interrupted(f"the file ended after {size} of {body.length} bytes")
            check_time()
            try:
                if upload:
                    upload.add(part)
                    upload.complete()
                    upload = None
                else:
                    part.seek(0)
                    self._s3.put_object(Bucket=self.name, Key=key, Body=part, IfNoneMatch="*", **headers)  # type: ignore[arg-type]  # a file in all but typing
            except ClientError as error:
                # NoSuchUpload: a complete of which the answer was lost, repeated by botocore.
                if _code(error) not in ("PreconditionFailed", "412", "NoSuchUpload"):
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
        """What is there, by reading it: its checksum is not kept anywhere else."""
        answer = self._s3.get_object(Bucket=self.name, Key=key)
        sha256 = hashlib.sha256()
        size = 0
        with closing(answer["Body"]) as body:
            for piece in body.iter_chunks(_PIECE_BYTES):
                check_time()
                sha256.update(piece)
                size += len(piece)
        return StoredFile(file.path, file.index, key, size, sha256.hexdigest(), answer["ContentType"])

    def _size(self, key: str) -> int | None:
        try:
            return self._s3.head_object(Bucket=self.name, Key=key)["ContentLength"]
        except ClientError as error:
            if _code(error) in _NOT_THERE:
                return None
            raise

    @contextmanager
    def _open_url(self, url: str, http: "httpx.Client") -> "Iterator[_Body]":
        """The body at a URL, behind at most five redirects, each to an origin that files may come from."""
        import httpx  # see _guarded_client

        from predictions.net.addresses import AddressRefused

        # Without compression, lengths are those of the file.
        headers = {"Accept-Encoding": "identity", "User-Agent": "replicate-serverless"}
        try:
            for _ in range(_MAX_REDIRECTS + 1):
                with http.stream("GET", url, headers=headers) as response:
                    if response.status_code in (301, 302, 303, 307, 308):
                        url = str(response.url.join(response.headers.get("Location", "")))
                        if not self._is_file_url(url):
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


class _Copier(threading.local):
    """What belongs to a thread that copies.

    Attributes:
        left: How many seconds are left for its file.
    """

    def __init__(self) -> None:
        self.left: Callable[[], float] = lambda: math.inf

    @cached_property
    def part(self) -> "_UploadPart":
        """The memory for what it sends; a thread that copies nothing has none."""
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
        """Forgets what is in it."""
        self._size = self._at = 0

    def add(self, piece: memoryview) -> memoryview:
        """Takes what fits, and gives back the rest."""
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


class _Multipart:
    """A multipart upload in progress; what a crash leaves behind is for the bucket's lifecycle rule."""

    def __init__(self, s3: "S3Client", bucket: str, key: str, headers: dict[str, Any]) -> None:
        self._s3 = s3
        self._at: dict[str, Any] = {"Bucket": bucket, "Key": key}
        self._at["UploadId"] = s3.create_multipart_upload(**self._at, **headers)["UploadId"]
        self._parts: list[CompletedPartTypeDef] = []

    def add(self, part: _UploadPart) -> None:
        part.seek(0)
        number = len(self._parts) + 1
        answer = self._s3.upload_part(**self._at, PartNumber=number, Body=part)  # type: ignore[arg-type]  # the same
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"]})

    def complete(self) -> None:
        self._s3.complete_multipart_upload(**self._at, MultipartUpload={"Parts": self._parts}, IfNoneMatch="*")

    def abort(self) -> None:
        # What led here is the error to tell; see above for what is left.
        with suppress(ClientError, BotoCoreError):
            self._s3.abort_multipart_upload(**self._at)


def _walk(output: JSON, is_file_url: Callable[[str], bool]) -> "Iterator[tuple[_Place, str]]":
    # An own stack, since a hostile output is nested deeper than Python recurses: of iterators, since all children of a
    # long list would take more memory than the list. Places are linked, not written out: text for each level would
    # take the square of the depth.
    stack: list[tuple[_Place, Iterator[tuple[str | int, Any]]]] = []
    place: _Place = None
    value: Any = output
    while True:
        if isinstance(value, str):
            if _is_file(value, is_file_url):
                yield place, value
        elif isinstance(value, dict):
            stack.append((place, _members(value)))
        elif isinstance(value, list):
            stack.append((place, enumerate(value)))
        while stack:
            above, children = stack[-1]
            if (child := next(children, None)) is not None:
                break
            stack.pop()
        else:
            return
        place, value = (above, child[0]), child[1]


def _members(container: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in sorted(container):
        yield name, container[name]


_Place: TypeAlias = "tuple[_Place, str | int] | None"


def _is_file(text: str, is_file_url: Callable[[str], bool]) -> bool:
    start = text[:5].lower()
    return _is_data_url(text) if start == "data:" else start in ("https", "http:") and is_file_url(text)


def _pointer(place: _Place) -> str:
    tokens = []
    while place is not None:
        place, token = place
        tokens.append(_escaped(token))
    return "".join(f"/{token}" for token in reversed(tokens))


def _escaped(token: str | int) -> str:
    return str(token).replace("~", "~0").replace("/", "~1")


def _origin(url: str) -> tuple[str, str, int] | None:
    # By a pattern instead of a URL parser: parsers differ on what is not plain, and nothing else passes here.
    match = _URL.fullmatch(url)
    if match is None:
        return None
    scheme = match[1].lower()
    return scheme, match[2].lower(), int(match[3] or {"https": 443, "http": 80}[scheme])


def _is_data_url(text: str) -> bool:
    comma = text.find(",", 0, 512)
    header = _DATA_HEADER.fullmatch(text, 0, comma) if comma > 0 else None
    if header is None:
        return False
    if header[2].lower().endswith(";base64"):
        return _BASE64.fullmatch(text, comma + 1) is not None
    return _NOT_IN_A_URL.search(text, comma + 1) is None


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
        raise _Interrupted("the file host's answer has no valid Content-Length")
    if int(text) > FILE_MAX_BYTES:
        raise _Refused(_TOO_LARGE)
    return int(text)


def _pieces(chunks: Iterable[bytes]) -> Iterator[memoryview]:
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), _PIECE_BYTES):
            yield view[start : start + _PIECE_BYTES]


def _served_as(content_type: str) -> dict[str, str]:
    """S3's arguments for an object, of the content type that a stranger named."""
    name, _, parameters = content_type.lower().partition(";")
    name = name.strip()
    if not _CONTENT_TYPES.fullmatch(name):
        return {"ContentType": _OTHER_TYPE, "ContentDisposition": "attachment"}
    if name.startswith("text/") and re.search(r"charset=\"?utf-8", parameters):
        return {"ContentType": f"{name}; charset=utf-8"}
    return {"ContentType": name}


def _payload_key(key: str) -> str:
    if not key.startswith(_PAYLOADS):
        raise ValueError(f"not the key of a payload: {key!r}")
    return key


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "an unknown error"))
