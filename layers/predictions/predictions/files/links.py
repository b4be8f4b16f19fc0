"""Links to objects in the stack's buckets, for models, which have no access token.

`{api_url}/objects/{bucket}/{name}?key=…&expires=…&signature=…` redirects to S3 until `expires`. A presigned URL of S3
itself would end with the credentials of the function that signed it, within hours and perhaps before a prediction that
waits its turn reads its input; and it would be another text each time, where a request that comes twice has to be the
same. The signature is an HMAC of bucket, key, version and expiry with a secret of its own: the holder of one link
cannot make another one.

`{name}` says how the object is called, since models look at the end of a URL for what kind of file it is. Nothing
depends on it.
"""

import hashlib
import hmac
import json
import os
import re
import time
from collections.abc import Callable
from urllib.parse import urlencode

from predictions.aws.clients import api_url
from predictions.aws.s3 import download_url
from predictions.aws.secrets import CachedSecret
from predictions.errors import PredictionsError

_REDIRECT_SECONDS = 300
# Large results and inputs of predictions are no files that a model reads.
_PAYLOADS = "payloads/"
_NAME_LIMIT_CHARACTERS = 100
_SIGNATURE = re.compile(r"[0-9a-f]{64}", re.ASCII)
_EXPIRES = re.compile(r"[1-9][0-9]{0,11}", re.ASCII)


class UnknownBucket(PredictionsError):
    """A link into a bucket that does not belong to this stack."""


class Links:
    """Makes and opens links.

    Args:
        buckets: Their names by how links call them: `inputs`, `outputs`, `source`.
        secret_arn: The secret in Secrets Manager that signs.
        clock: Seconds that only go forward, for how long the secret is kept in memory.
    """

    def __init__(
        self,
        buckets: dict[str, str],
        secret_arn: str,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._buckets = {name: bucket for name, bucket in buckets.items() if bucket}
        self._now = now
        self._secret = CachedSecret(secret_arn, clock=clock)

    @classmethod
    def from_env(cls) -> "Links":
        """Create from `LINK_SECRET_ARN` and bucket names (of the source: may be empty)."""
        buckets = {
            "inputs": os.environ["INPUTS_BUCKET_NAME"],
            "outputs": os.environ["OUTPUTS_BUCKET_NAME"],
            "source": os.environ["SOURCE_BUCKET_NAME"],
        }
        return cls(buckets, os.environ["LINK_SECRET_ARN"])

    def url(self, bucket: str, key: str, *, version_id: str | None = None, expires: int) -> str:
        """Return a link to an object; the same for the same arguments.

        Args:
            bucket: `inputs`, `outputs`, or the name of a bucket of this stack.
            key: The object's key.
            version_id: The object's version; None for whichever is there when the link is opened.
            expires: Until when it works, in Unix seconds. A link that must come out the same again counts from a
                recorded time, never from now.

        Raises:
            UnknownBucket: Not one of the stack's buckets, or a part of one that is not for models.
        """
        names = {real: name for name, real in self._buckets.items()} | {name: name for name in self._buckets}
        name = names.get(bucket)
        if name is None or _closed(name, key):
            raise UnknownBucket(f"no links are made into {bucket[:100]!r} at {key[:100]!r}")
        query = {"key": key, "expires": str(expires), "signature": self._signature(name, key, version_id, expires)}
        if version_id is not None:
            query["version_id"] = version_id
        return f"{api_url()}/objects/{name}/{_shown(key)}?{urlencode(query)}"

    def open(
        self, bucket: str, key: str, version_id: str | None, expires: str, signature: str, *, for_head: bool = False
    ) -> str | None:
        """Return a presigned S3 URL for the holder of a link.

        Args:
            bucket: As the link calls it.
            key: As in the link.
            version_id: As in the link; None where it has none.
            expires: As in the link.
            signature: As in the link.
            for_head: Whether the URL is for HEAD.

        Returns:
            The URL, which works for five minutes and makes browsers save the object, not show it, or None if any part
            of the link is wrong, or it has expired.
        """
        if bucket not in self._buckets or not key or _closed(bucket, key):
            return None
        if not _EXPIRES.fullmatch(expires) or not _SIGNATURE.fullmatch(signature):
            return None
        if not hmac.compare_digest(signature, self._signature(bucket, key, version_id, int(expires))):
            return None
        if self._now() >= int(expires):
            return None
        real = self._buckets[bucket]
        return download_url(real, key, _REDIRECT_SECONDS, version_id=version_id, for_head=for_head)

    def _signature(self, bucket: str, key: str, version_id: str | None, expires: int) -> str:
        # As JSON, so that no two links give one text, whatever characters a key has.
        signed = json.dumps(["object link", bucket, key, version_id, expires])
        return hmac.new(self._secret.signing_key(), signed.encode(), hashlib.sha256).hexdigest()


def _closed(bucket: str, key: str) -> bool:
    return bucket == "outputs" and key.startswith(_PAYLOADS)


def _shown(key: str) -> str:
    """Return the end of a key, in characters without meaning in a URL's path."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", key.rpartition("/")[2])[-_NAME_LIMIT_CHARACTERS:]
    # A segment of dots is a way up.
    return name if name.strip(".") else "object"
