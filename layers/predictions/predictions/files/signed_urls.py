"""Signed CloudFront URLs of output files, for clients that send `Authorization`.

S3 refuses a presigned URL that comes with such a header (https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html,
"Only one auth mechanism allowed"), and Replicate's Python client 1 sends one with `FileOutput.read()`. CloudFront drops
it, checks the signature in the URL, and signs its own request to the bucket.

A URL is signed with RSA and SHA-1 over a policy that covers the files of one prediction, so that one signature does for
all of them (7 ms of a processor each, which a canned policy would take for every file of a page):
https://docs.aws.amazon.com/AmazonCloudFront/latest/DeveloperGuide/private-content-creating-signed-url-custom-policy.html
The signature is made with integers here (RFC 8017, 8.2.1; the tests verify it with `cryptography`): `cryptography`
itself cannot be in the layer, in which the modules of two processors have to differ by name; `rsa` is not maintained
any more, and takes three times as long.
"""

import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from urllib.parse import quote

from botocore.signers import CloudFrontSigner

from predictions.aws.secrets import CachedSecret

# A page of a list is asked for again and again: for this part of its time a file keeps its URL, which is signed once.
_KEPT_PART = 4
_KEPT_SIGNATURES = 4096

# DER of DigestInfo up to the digest: RFC 8017, 9.2, note 1.
_SHA1_PREFIX = bytes.fromhex("3021300906052b0e03021a05000414")


@dataclass(frozen=True)
class PrivateKey:
    """An RSA key, as `replicate-serverless urls keys` puts it into Secrets Manager.

    Attributes:
        p: A prime.
        q: The other one.
        e: The public exponent.
    """

    p: int = field(repr=False)
    q: int = field(repr=False)
    e: int

    @classmethod
    def from_json(cls, text: str) -> "PrivateKey":
        """Read what `to_json` returned.

        Raises:
            ValueError: Not such JSON. The text is not repeated.
        """
        try:
            value = json.loads(text)
            return cls(int(value["p"], 16), int(value["q"], 16), int(value["e"], 16))
        except (ValueError, KeyError, TypeError):
            raise ValueError("the secret holds no key of `replicate-serverless urls keys`") from None

    def to_json(self) -> str:
        """Return `{"p", "q", "e"}` in hexadecimal."""
        return json.dumps({name: f"{value:x}" for name, value in (("p", self.p), ("q", self.q), ("e", self.e))})

    def sign_sha1(self, message: bytes) -> bytes:
        """Sign with RSASSA-PKCS1-v1_5 and SHA-1."""
        p, q, e = self.p, self.q, self.e
        n = p * q
        length = (n.bit_length() + 7) // 8
        digest = _SHA1_PREFIX + hashlib.sha1(message, usedforsecurity=False).digest()  # CloudFront's choice
        padded = b"\x00\x01" + b"\xff" * (length - len(digest) - 3) + b"\x00" + digest
        wanted = int.from_bytes(padded)
        # Blinded, so that its duration reveals nothing of the key; by the primes, since that is four times as fast.
        while math.gcd(blind := 2 + secrets.randbelow(n - 3), n) != 1:
            pass
        blinded = wanted * pow(blind, e, n) % n
        d = pow(e, -1, (p - 1) * (q - 1))
        of_p, of_q = pow(blinded, d % (p - 1), p), pow(blinded, d % (q - 1), q)
        signed = (of_q + q * ((of_p - of_q) * pow(q, -1, p) % p)) * pow(blind, -1, n) % n
        # A fault in one half would give the key away.
        if pow(signed, e, n) != wanted:
            raise ArithmeticError("the key is damaged: its signature does not verify")
        return signed.to_bytes(length)


class Distribution:
    """The CloudFront distribution before the outputs bucket.

    Args:
        domain: Its domain name.
        key_id: The id of the public key that it trusts.
        private_key: Gives the key that belongs to it; asked once, when the first URL is signed.
    """

    def __init__(
        self,
        domain: str,
        key_id: str,
        private_key: Callable[[], PrivateKey],
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._domain = domain
        self._private_key = private_key
        self._key: PrivateKey | None = None
        self._now = now
        self._signer = CloudFrontSigner(key_id, lru_cache(maxsize=_KEPT_SIGNATURES)(self._sign))

    @classmethod
    def from_env(cls) -> "Distribution | None":
        """Create from `OUTPUT_URL_DOMAIN`, `…_KEY_ID`, `…_SECRET_ARN`; None if empty."""
        domain, key_id = os.environ["OUTPUT_URL_DOMAIN"], os.environ["OUTPUT_URL_KEY_ID"]
        # Not cached as a text: the key is, once it could be read. Until then each URL reads the secret again.
        secret = CachedSecret(os.environ["OUTPUT_URL_SECRET_ARN"], cache_seconds=0)
        return cls(domain, key_id, lambda: PrivateKey.from_json(secret.current_value())) if domain else None

    def url(self, key: str, expires_seconds: int) -> str:
        """Return a URL of an object, valid for that time and at most a quarter more.

        Its signature opens the objects beside it too: `{folder}/*`, which is one prediction's output.
        """
        kept_seconds = max(1, expires_seconds // _KEPT_PART)
        expires = -(-(int(self._now()) + expires_seconds) // kept_seconds) * kept_seconds
        folder = f"https://{self._domain}/{quote(key.rpartition('/')[0])}"
        policy = self._signer.build_policy(f"{folder}/*", datetime.fromtimestamp(expires, UTC))
        signed: str = self._signer.generate_presigned_url(f"https://{self._domain}/{quote(key)}", policy=policy)
        return signed

    def _sign(self, policy: bytes) -> bytes:
        self._key = self._key or self._private_key()
        return self._key.sign_sha1(policy)
