"""Files that owners upload as inputs: an item of the table and an object each.

`pk` = `file#{id}`, `sk` = `file`; the object is `files/{owner}/{id}`, so nothing of its key is a caller's to choose.
A file's `urls.get` is a link that anyone who has it can open until the file expires or is deleted, since a model has
no access token: `GET /files/{id}/download` with an unguessable `signature`, which redirects to S3. It is not a link to
S3 itself, because that would end with the credentials of the function that signed it, within hours and perhaps before
a prediction that waits its turn reads its input. And so an input stays the same text from the caller to Replicate.

An object outlives its item: the bucket's lifecycle counts whole days from midnight. An object without an item (a crash
between the two writes) is invisible and expires the same way.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from predictions.aws.clients import client
from predictions.aws.dynamodb import PRESENT, ConditionFailed, Key, Table
from predictions.aws.s3 import download_url, head
from predictions.clock import rfc3339, timestamp

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from predictions.files.upload_requests import NewFile

UPLOAD_URL_SECONDS = 3600
"""How long an upload may begin; one that has begun may take longer."""

_DOWNLOAD_URL_SECONDS = 300
_CHECKS_AT_ONCE = 10


@dataclass(frozen=True)
class File:
    """A file's item. Times are whole seconds since 1970, except `created_at`.

    Attributes:
        uploaded: Whether the object is known to be there.
        signature: The capability in its download link.
    """

    id: str
    owner: str
    name: str
    content_type: str
    size: int
    metadata_json: str
    created_at: str
    expires_at: int
    signature: str = field(repr=False)
    uploaded: bool = True
    etag: str = ""
    checksums: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Return the key of the object."""
        return f"files/{self.owner}/{self.id}"

    def show(self, api_url: str) -> dict[str, Any]:
        """Return this in Replicate's JSON, with `uploaded` added."""
        query = urlencode({"owner": self.owner, "expiry": self.expires_at, "signature": self.signature})
        return {
            "id": self.id,
            "name": self.name,
            "content_type": self.content_type,
            "size": self.size,
            "etag": self.etag,
            "checksums": self.checksums,
            "metadata": json.loads(self.metadata_json),
            "created_at": self.created_at,
            "expires_at": rfc3339(self.expires_at),
            "urls": {"get": f"{api_url}/files/{self.id}/download?{query}"},
            "uploaded": self.uploaded,
        }


@dataclass(frozen=True)
class UploadLink:
    """How to send a file to S3: exactly this request, until `expires_at`."""

    method: str
    url: str
    headers: dict[str, str]
    expires_at: str


class Files:
    """The files of all owners.

    Args:
        bucket_name: The inputs bucket.
        lifetime_seconds: How long a file is kept.
    """

    def __init__(
        self, table_name: str, bucket_name: str, lifetime_seconds: int, *, now: Callable[[], float] = time.time
    ) -> None:
        self._table_name = table_name
        self._bucket_name = bucket_name
        self._lifetime_seconds = lifetime_seconds
        self._now = now

    @classmethod
    def from_env(cls) -> "Files":
        """Create from `TABLE_NAME`, `INPUTS_BUCKET_NAME` and `FILE_RETENTION_DAYS`."""
        days = int(os.environ["FILE_RETENTION_DAYS"])
        return cls(os.environ["TABLE_NAME"], os.environ["INPUTS_BUCKET_NAME"], days * 86400)

    def store(self, owner: str, new: "NewFile") -> File:
        """Store a file with its content: the object first, so that no item lacks one."""
        content = new.content or b""
        file = self._file(owner, new)
        stored = self._s3.put_object(
            Bucket=self._bucket_name, Key=file.key, Body=content, ContentType=file.content_type
        )
        checksums = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "md5": hashlib.md5(content, usedforsecurity=False).hexdigest(),
        }
        file = replace(file, etag=stored["ETag"].strip('"'), checksums=checksums)
        self._put(file)
        return file

    def announce(self, owner: str, new: "NewFile") -> tuple[File, UploadLink]:
        """Create the URL to which an owner uploads a file straight to S3, once.

        S3 refuses another size than was announced, another type, another SHA-256 (where one was given), and a second
        upload, because all of these are signed.
        """
        file = replace(self._file(owner, new), uploaded=False, checksums={"sha256": new.sha256} if new.sha256 else {})
        parameters: dict[str, Any] = {"ContentType": file.content_type, "IfNoneMatch": "*"}
        headers = {"Content-Type": file.content_type, "If-None-Match": "*"}
        if new.sha256_base64:
            parameters["ChecksumSHA256"] = headers["x-amz-checksum-sha256"] = new.sha256_base64
        url = self._s3.generate_presigned_url(
            "put_object",
            Params={"Bucket": self._bucket_name, "Key": file.key, "ContentLength": file.size, **parameters},
            ExpiresIn=UPLOAD_URL_SECONDS,
        )
        self._put(file)
        # A client's HTTP library writes the length by itself; that it has to be this one must be said all the same.
        headers["Content-Length"] = str(file.size)
        return file, UploadLink("PUT", url, headers, rfc3339(int(self._now()) + UPLOAD_URL_SECONDS))

    def find(self, owner: str, file_id: str) -> File | None:
        """Return one of an owner's files, or None if not found or another owner's."""
        file = self._read(file_id)
        if file is None or file.owner != owner:
            return None
        return self._as_it_is(file)

    def list(self, owner: str, start: str | None, *, older: bool, size: int) -> tuple[list[File], bool]:
        """List a page of an owner's files, each as `find` returns it.

        Args:
            owner: Whose.
            start: The place beside which the page starts (`place`), or None for the newest.
            older: Whether the page lies on the older side of `start`.
            size: The most files of a page.

        Returns:
            The files from the start of the page on, away from it, and whether there are further ones beyond.
        """
        key = _listed_owner(owner)
        items, more = self._table.list_items(key, start, older=older, size=size, sk="file")
        files = [file for file in map(self._kept, items) if file]
        announced = [file for file in files if not file.uploaded]
        if announced:
            # One after the other, a page of uploads that S3 has to be asked for would take seconds.
            with ThreadPoolExecutor(_CHECKS_AT_ONCE) as pool:
                current = {file.id: file for file in pool.map(self._as_it_is, announced)}
            files = [current.get(file.id, file) for file in files]
        return files, more

    def delete(self, owner: str, file_id: str) -> bool:
        """Delete one of an owner's files; return whether it existed.

        The object goes first: a crash in between leaves an item, with which the owner can ask again.
        """
        file = self._read(file_id)
        if file is None or file.owner != owner:
            return False
        self._s3.delete_object(Bucket=self._bucket_name, Key=file.key)
        self._table.delete_item(_key(file_id))
        return True

    def download_url(
        self, file_id: str, owner: str, expiry: str, signature: str, *, for_head: bool = False
    ) -> str | None:
        """Return a presigned S3 URL for the holder of a file's `urls.get`; for HEAD, if `for_head`.

        Returns:
            The URL, which works for five minutes and makes browsers save the file, not show it, or None if any part
            of the request is wrong, or the file is missing (expired, or not uploaded yet).
        """
        file = self._read(file_id)
        if file is None or file.owner != owner or expiry != str(file.expires_at):
            return None
        if not hmac.compare_digest(file.signature.encode(), signature.encode("utf-8", "replace")):
            return None
        if not file.uploaded and self._uploaded(file) is None:
            return None
        return download_url(self._bucket_name, file.key, _DOWNLOAD_URL_SECONDS, for_head=for_head)

    @property
    def _s3(self) -> "S3Client":
        return client("s3")

    @property
    def _table(self) -> Table:
        return Table(self._table_name, client("dynamodb"))

    def _file(self, owner: str, new: "NewFile") -> File:
        now = self._now()
        return File(
            id=new.id,
            owner=owner,
            name=new.name,
            content_type=new.content_type,
            size=new.size,
            metadata_json=new.metadata_json,
            created_at=timestamp(now),
            expires_at=int(now) + self._lifetime_seconds,
            signature=secrets.token_urlsafe(32),
        )

    def _put(self, file: File) -> None:
        item = {
            "id": file.id,
            # Another owner than that of predictions, so that their lists stay apart.
            "owner": _listed_owner(file.owner),
            "listed_at": place(file),
            "name": file.name,
            "content_type": file.content_type,
            "size": file.size,
            "metadata_json": file.metadata_json,
            "created_at": file.created_at,
            "expires_at": file.expires_at,
            "signature": file.signature,
            "uploaded": file.uploaded,
            "etag": file.etag,
            "checksums": file.checksums,
        }
        # The id is new and random: nothing can be there but this very item, of a write whose response botocore missed.
        self._table.put_item(_key(file.id), item)

    def _read(self, file_id: str) -> File | None:
        item = self._table.get_item(_key(file_id))
        return self._kept(item) if item else None

    def _kept(self, item: dict[str, Any]) -> File | None:
        """Return an item's file, or None once expired (DynamoDB deletes it days later)."""
        values = {name: item[name] for name in File.__dataclass_fields__ if name in item}
        file = File(**{**values, "owner": item["owner"].removeprefix("files#")})
        return file if self._now() < file.expires_at else None

    def _as_it_is(self, file: File) -> File:
        """Return a file with what S3 has of it, if its upload was not known; record the upload."""
        if file.uploaded or not (found := self._uploaded(file)):
            return file
        self._note_upload(found)
        return found

    def _uploaded(self, file: File) -> File | None:
        """Return an announced file as S3 has it, or None if it was not uploaded."""
        found = head(self._bucket_name, file.key)
        if found is None:
            return None
        return replace(file, uploaded=True, size=found["ContentLength"], etag=found["ETag"].strip('"'))

    def _note_upload(self, file: File) -> None:
        # It may be deleted meanwhile.
        with contextlib.suppress(ConditionFailed):
            uploaded = {"uploaded": True, "size": file.size, "etag": file.etag}
            self._table.update_item(_key(file.id), set=uploaded, condition=PRESENT)


def place(file: File) -> str:
    """Return a file's position in its owner's list."""
    return f"{file.created_at}#{file.id}"


def _listed_owner(owner: str) -> str:
    return f"files#{owner}"


def _key(file_id: str) -> Key:
    return Key(f"file#{file_id}", "file")
