"""The outputs bucket: files of outputs, and payloads too large for the table.

OutputsBucket.find_files   list the files in an output (`files.output_references`)
OutputsBucket.store        copy them, each whole or not at all (`files.copier`)
OutputsBucket.put_payload  store JSON text
OutputsBucket.delete_all   remove whatever the bucket has of one prediction
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from predictions.aws.clients import client
from predictions.aws.s3 import error_code, head
from predictions.files.copier import Copier
from predictions.files.output_references import (
    JSON,
    OutputFile,
    StoredFile,
    find_files,
    first_files,
    holds_files,
    is_file_url,
    place_files,
)

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client

    from predictions.net.downloads import DownloadClient

# One owner's files are below one segment; a segment is what our own ids are made of, and cannot climb.
_PREFIX = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._@+=-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._@+=-]*)*")
_PAYLOADS = "payloads/"
_UNSAFE = re.compile(r"[^A-Za-z0-9._@+=-]")
_OUTPUT_PREFIX_LIMIT_CHARACTERS = 512

# Of a conditional write: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
_REPLACED_MEANWHILE = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey", "404")
# Concurrent webhooks of one prediction: each attempt that fails is one that another writer won.
_LONGER_ATTEMPTS = 3
# Metadata of an object that grows: the length of its text.
_CHARACTERS = "characters"


def safe_prefix(text: str) -> str:
    """Turn any text, such as another object's key, into a safe prefix.

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
    """Return the prefix of a prediction's files, without a slash at the end.

    Args:
        owner: Whose prediction it is.
        prediction_id: Our id.
        output_prefix: From `safe_prefix`, or None for the usual place.
    """
    return f"{owner}/{output_prefix}/{prediction_id}" if output_prefix else f"{owner}/{prediction_id}"


class OutputsBucket:
    """The S3 bucket of outputs and payloads; not thread-safe.

    `store` uses several threads of its own.

    Args:
        file_origins: Origins of files beside Replicate's, as `scheme://host[:port]`.
        open_client: Makes the HTTP client that downloads; by default one that talks to public addresses only.
        clock: Seconds that only go forward.
    """

    def __init__(
        self,
        name: str,
        file_origins: Sequence[str] = (),
        *,
        open_client: "Callable[[], AbstractContextManager[DownloadClient]] | None" = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = name
        self._file_origins = tuple(file_origins)
        self._copier = Copier(name, self._file_origins, open_client, clock, sleep)

    @classmethod
    def from_env(cls) -> "OutputsBucket":
        """Create from `OUTPUTS_BUCKET_NAME` and `FILE_ORIGINS` (comma-separated)."""
        origins = [origin.strip() for origin in os.environ["FILE_ORIGINS"].split(",")]
        return cls(os.environ["OUTPUTS_BUCKET_NAME"], [origin for origin in origins if origin])

    def find_files(self, output: JSON) -> list[OutputFile]:
        """Find the files in an output on allowed hosts; see the function `find_files`."""
        return find_files(output, self._is_file_url)

    def files_to_store(self, output: JSON) -> tuple[list[OutputFile], list[StoredFile]]:
        """Find the files of an output that are stored; see the function `first_files`."""
        return first_files(output, self._is_file_url)

    def place_files(self, output: JSON, values: Mapping[str, JSON]) -> JSON:
        """Replace every file in an output; see the function `place_files`."""
        return place_files(output, values, self._is_file_url)

    def holds_files(self, output: JSON) -> bool:
        """Return whether an output has any file; stop at the first."""
        return holds_files(output, self._is_file_url)

    def url(self, key: str, expires_seconds: int) -> str:
        """Return a presigned URL; it may end earlier, with the function's credentials."""
        return self._s3.generate_presigned_url(
            "get_object", Params={"Bucket": self.name, "Key": key}, ExpiresIn=expires_seconds
        )

    def put_payload(self, key: str, text: str | bytes) -> None:
        """Store JSON text.

        The last writer wins: where contents can differ, give each a key of its own (with its hash, say).

        Args:
            key: Starts with `payloads/`.
            text: JSON; as bytes where the caller has them, so that a long one is not encoded twice.
        """
        body = text.encode() if isinstance(text, str) else text
        self._s3.put_object(Bucket=self.name, Key=_payload_key(key), Body=body, ContentType="application/json")

    def put_longer_payload(self, key: str, text: str) -> bool:
        """Store JSON text, unless the object holds a text at least as long.

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
            if there := head(self.name, key):
                if int(there["Metadata"].get(_CHARACTERS, "0")) >= len(text):
                    return True
                condition = {"IfMatch": there["ETag"]}
            try:
                self._s3.put_object(
                    **to, Body=text.encode(), ContentType="application/json",
                    Metadata={_CHARACTERS: str(len(text))}, **condition,
                )  # fmt: skip
            except ClientError as error:
                if error_code(error) not in _REPLACED_MEANWHILE:
                    raise
            else:
                return True
        return False

    def get_payload(self, key: str) -> str:
        """Return JSON text that `put_payload` stored.

        Raises:
            botocore.exceptions.ClientError: `NoSuchKey`, or `AccessDenied` where listing is not allowed: it
                is not there, which the bucket's lifecycle rules can bring about.
        """
        body: StreamingBody = self._s3.get_object(Bucket=self.name, Key=_payload_key(key))["Body"]
        return body.read().decode()

    def delete_all(self, prediction_id: str, owner: str, output_prefix: str | None = None) -> None:
        """Delete a prediction's objects: files, payloads and parts of aborted uploads.

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
        """Copy files into the bucket, as objects `{prefix}/{index}`, several at once.

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
        return self._copier.copy_files(files, prefix, remaining_seconds, depth, final=final)

    @property
    def _s3(self) -> "S3Client":
        return client("s3")

    def _is_file_url(self, url: str) -> bool:
        return is_file_url(url, self._file_origins)


def _payload_key(key: str) -> str:
    if not key.startswith(_PAYLOADS):
        raise ValueError(f"not the key of a payload: {key!r}")
    return key
