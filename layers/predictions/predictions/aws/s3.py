"""S3: multipart uploads, and objects that may not be there."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import client

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, HeadObjectOutputTypeDef

# S3 responds 403 for a missing key to callers that may not list the bucket, such as our functions:
# https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadObject.html
_MISSING = ("NoSuchKey", "AccessDenied", "404", "403")


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
