"""Replicate's webhook signing secret, stored in Secrets Manager."""

import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import client
from predictions.net.signatures import SignatureMismatch, SigningSecretUnavailable, key_of, verify

if TYPE_CHECKING:
    from mypy_boto3_secretsmanager import SecretsManagerClient

OVERLAP_SECONDS = 24 * 3600
CACHE_SECONDS = 300
UNAVAILABLE_CACHE_SECONDS = 5
REFRESH_SECONDS = 30


class SigningSecrets:
    """Replicate's signing secret, stored in Secrets Manager.

    Its value is `{"current": "whsec_…", "previous": "whsec_…" | null, "rotated_at": RFC 3339}`, or `{}` until
    one is stored. The sweep, which holds the Replicate token, stores it; the public webhook function only
    reads it.
    """

    def __init__(self, secret_arn: str, secretsmanager: "SecretsManagerClient") -> None:
        self._secret_arn = secret_arn
        self._secretsmanager = secretsmanager
        self._document: dict[str, Any] = {}
        self._read_at = -math.inf

    @classmethod
    def from_env(cls) -> "SigningSecrets":
        """Create from `SIGNING_SECRET_ARN`."""
        return cls(os.environ["SIGNING_SECRET_ARN"], client("secretsmanager"))

    def verify(self, body: bytes, headers: Mapping[str, str | None], now: float) -> None:
        """Verify with the current secrets; on a mismatch retry with freshly read ones.

        Raises:
            WebhookRefused: The request is not genuine.
            SigningSecretUnavailable: Our own fault; the sender should try again.
        """
        try:
            verify(body, headers, self.current(now), now)
        except SignatureMismatch:
            if not self.refresh_after_refusal(now):
                raise
            verify(body, headers, self.current(now), now)

    def current(self, now: float) -> list[str]:
        """Return the valid secrets: the current one and, for 24 h, the previous one.

        They are read at most every 5 minutes, or 5 seconds while none is stored: anyone may call the public
        function as often as they like, and must not thereby use up Secrets Manager for it.

        Raises:
            SigningSecretUnavailable: None has been stored yet, it is malformed, or it cannot be read.
        """
        if now - self._read_at >= (CACHE_SECONDS if self._document else UNAVAILABLE_CACHE_SECONDS):
            self._document, self._read_at = {}, now
            try:
                self._document = self._read()
            except (BotoCoreError, ClientError) as error:
                raise SigningSecretUnavailable(f"The secret {self._secret_arn} cannot be read: {error}") from error
        if not self._document:
            raise SigningSecretUnavailable(
                f"The secret {self._secret_arn} holds no signing secret, or could not be read moments ago."
                " The sweep stores Replicate's within a minute if the Replicate token is valid."
            )
        secrets = [self._document["current"]]
        if now - self._document["rotated_at"] < OVERLAP_SECONDS:
            secrets += self._document["previous"]
        return secrets

    def refresh_after_refusal(self, now: float) -> bool:
        """Drop secrets read at least 30 s ago: a mismatch may be caused by a newer one.

        Returns:
            Whether `current` will read again, so that another verification can have another result.
        """
        if now - self._read_at < REFRESH_SECONDS:
            return False
        self._read_at = -math.inf
        return True

    def store(self, secret: str, now: float) -> bool:
        """Make `secret` the current one, and the present one the previous one.

        Safe to repeat and to crash before or after its one write. Two writers with different values in hand
        (one asked Replicate just before a rotation) leave both valid; the next sweep puts them in order.

        Args:
            secret: As Replicate's API gives it.
            now: Unix time in seconds.

        Returns:
            Whether it was new.

        Raises:
            SigningSecretUnavailable: `secret` is malformed; nothing was written.
            botocore.exceptions.ClientError: Secrets Manager refused.
        """
        key_of(secret)
        stored = self._read()
        if stored.get("current") == secret:
            return False
        document = {
            "current": secret,
            "previous": stored.get("current"),
            "rotated_at": datetime.fromtimestamp(now, UTC).isoformat(),
        }
        self._secretsmanager.put_secret_value(SecretId=self._secret_arn, SecretString=json.dumps(document))
        self._read_at = -math.inf
        return True

    def _read(self) -> dict[str, Any]:
        """Read and check the stored document; return `{}` if it is unusable.

        `previous` is a list of none or one, `rotated_at` is in Unix seconds.
        An unusable document counts as none, so that `store` replaces it.
        """
        try:
            response = self._secretsmanager.get_secret_value(SecretId=self._secret_arn)
        except ClientError as error:
            # A secret without any value yet; if there is no such secret at all, writing to it will say so.
            if error.response["Error"]["Code"] == "ResourceNotFoundException":
                return {}
            raise
        try:
            document = json.loads(response["SecretString"])
            key_of(document["current"])
        except (KeyError, TypeError, ValueError, SigningSecretUnavailable):
            return {}
        try:
            key_of(document["previous"])
            rotated_at = datetime.fromisoformat(document["rotated_at"]).timestamp()
        except (KeyError, TypeError, ValueError, SigningSecretUnavailable):
            return {"current": document["current"], "previous": [], "rotated_at": -math.inf}
        return {"current": document["current"], "previous": [document["previous"]], "rotated_at": rotated_at}
