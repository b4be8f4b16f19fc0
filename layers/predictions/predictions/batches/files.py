"""The S3 objects of batches, read and written as streams: memory use does not grow with the batch.

In the outputs bucket, each in JSONL, sorted by `n`, the line number in the manifest:

    payloads/batches/{id}/manifest.jsonl           requests from the body of the call
    payloads/batches/{id}/template.json            the template that turns rows into requests
    payloads/batches/{id}/recipe.json              or the recipe that does, as it was
    payloads/batches/{id}/schema.json              the schema of the model that all lines run, if it could be read
    payloads/batches/{id}/requests.jsonl           {"n", "request"} (and "output_prefix"), of the valid lines
    payloads/batches/{id}/refused.jsonl            {"n", "error"}, of the invalid lines
    payloads/batches/{id}/lines-{attempt}.jsonl    {"n", "offset", "length"} in requests.jsonl: the lines of an attempt
    {owner}/batches/{id}/results-{attempt}.jsonl   one for each line: the results for the owner

All objects but the results are derived from the owner's request, so that writing them twice writes the same.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from botocore.exceptions import ClientError

from predictions.aws.clients import client
from predictions.aws.s3 import MultipartUpload, error_code, head, is_missing

# S3 accepts 10,000 parts of at least 5 MiB: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
PART_BYTES = 8 * 1024**2
_PIECE_BYTES = 256 * 1024
_JSONL = "application/x-ndjson"


def manifest_key(batch_id: str) -> str:
    """Return the key of the requests from the body of the call."""
    return f"payloads/batches/{batch_id}/manifest.jsonl"


def template_key(batch_id: str) -> str:
    """Return the key of the template that turns rows into requests."""
    return f"payloads/batches/{batch_id}/template.json"


def recipe_key(batch_id: str) -> str:
    """Return the key of the recipe as it was when the batch was created."""
    return f"payloads/batches/{batch_id}/recipe.json"


def schema_key(batch_id: str) -> str:
    """Return the key of the schema by which the lines' inputs are checked."""
    return f"payloads/batches/{batch_id}/schema.json"


def requests_key(batch_id: str) -> str:
    """Return the key of the requests of the valid lines."""
    return f"payloads/batches/{batch_id}/requests.jsonl"


def refused_key(batch_id: str) -> str:
    """Return the key of the invalid lines."""
    return f"payloads/batches/{batch_id}/refused.jsonl"


def lines_key(batch_id: str, attempt: int) -> str:
    """Return the key of the lines that an attempt runs."""
    return f"payloads/batches/{batch_id}/lines-{attempt}.jsonl"


def results_key(owner: str, batch_id: str, attempt: int) -> str:
    """Return the key of the results, a new one for each attempt.

    So nobody reads an object that is being replaced.
    """
    return f"{owner}/batches/{batch_id}/results-{attempt}.jsonl"


class ObjectWriter:
    """An object that is being written; see `new_object`.

    Attributes:
        written: The number of bytes written so far.
    """

    def __init__(self, bucket: str, key: str) -> None:
        self._bucket, self._key = bucket, key
        self._buffer = bytearray()
        self._upload: MultipartUpload | None = None
        self.written = 0

    def write_json(self, value: Any) -> int:
        """Append a line of JSON; return its length in bytes without the line break."""
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        try:
            line = text.encode()
        except UnicodeEncodeError:
            # A model's output may contain half a surrogate pair, which only an escape can represent.
            line = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
        self._buffer += line + b"\n"
        self.written += len(line) + 1
        while len(self._buffer) >= PART_BYTES:
            self._send_part()
        return len(line)

    def complete(self) -> None:
        """Make the object visible."""
        if self._upload is None:
            s3 = client("s3")
            s3.put_object(Bucket=self._bucket, Key=self._key, Body=bytes(self._buffer), ContentType=_JSONL)
            return
        if self._buffer:
            self._send_part()
        self._upload.complete()

    def drop(self) -> None:
        """Discard the data that was sent."""
        if self._upload:
            self._upload.abort()

    def _send_part(self) -> None:
        self._upload = self._upload or MultipartUpload(self._bucket, self._key, ContentType=_JSONL)
        part, self._buffer = bytes(self._buffer[:PART_BYTES]), self._buffer[PART_BYTES:]
        self._upload.send_part(part)


@contextmanager
def new_object(bucket: str, key: str) -> Iterator[ObjectWriter]:
    """Write one object, replaced as a whole if the context exits without error."""
    writer = ObjectWriter(bucket, key)
    try:
        yield writer
    except BaseException:
        writer.drop()
        raise
    writer.complete()


def read_pieces(bucket: str, key: str, *, etag: str | None = None) -> Iterator[bytes]:
    """Read an object's bytes, a piece at a time.

    Args:
        bucket: The bucket's name.
        key: The object's key.
        etag: The ETag that the object must still have.

    Raises:
        ClientError: The object does not exist, or `PreconditionFailed`: it was replaced.
    """
    s3 = client("s3")
    wanted: Any = {"IfMatch": etag} if etag else {}
    answer = s3.get_object(Bucket=bucket, Key=key, **wanted)
    yield from answer["Body"].iter_chunks(_PIECE_BYTES)


def read_lines(pieces: Iterable[bytes], limit_bytes: int) -> Iterator[bytes | None]:
    """Yield the lines of a text in pieces, without line breaks; too long ones as None.

    A line of more than `limit_bytes` is too long. A line ends with LF or CR LF; the last one need not. No more than one
    line is held in memory.
    """
    rest, too_long = bytearray(), False
    for piece in pieces:
        start = 0
        while (end := piece.find(b"\n", start)) >= 0:
            if not too_long:
                rest += piece[start:end]
            line = bytes(rest).removesuffix(b"\r")
            yield None if too_long or len(line) > limit_bytes else line
            rest, too_long, start = bytearray(), False, end + 1
        if not too_long:
            rest += piece[start:]
            if len(rest) > limit_bytes + 1:
                rest, too_long = bytearray(), True
    if too_long or rest:
        line = bytes(rest).removesuffix(b"\r")
        yield None if too_long or len(line) > limit_bytes else line


def read_jsonl(bucket: str, key: str) -> Iterator[dict[str, Any]]:
    """Read the lines of an object that this stack wrote."""
    for line in read_lines(read_pieces(bucket, key), 2**30):
        yield json.loads(line or b"{}")


def read_range(bucket: str, key: str, offset: int, length: int) -> bytes | None:
    """Read a range of an object, or return None if it or the object does not exist."""
    s3 = client("s3")
    try:
        answer = s3.get_object(Bucket=bucket, Key=key, Range=f"bytes={offset}-{offset + length - 1}")
    except ClientError as error:
        if not is_missing(error) and error_code(error) != "InvalidRange":
            raise
        return None
    return b"".join(answer["Body"].iter_chunks(_PIECE_BYTES))


def etag_of(bucket: str, key: str) -> tuple[str, int] | None:
    """Return an object's ETag and its size in bytes, or None if it does not exist."""
    found = head(bucket, key)
    return (found["ETag"], found["ContentLength"]) if found else None


def put_text(bucket: str, key: str, text: str) -> None:
    """Store a text as an object."""
    s3 = client("s3")
    s3.put_object(Bucket=bucket, Key=key, Body=text.encode(), ContentType="application/json")


def get_text(bucket: str, key: str) -> str:
    """Return an object's text."""
    return b"".join(read_pieces(bucket, key)).decode()
