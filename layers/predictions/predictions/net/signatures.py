"""Signatures of webhooks: Replicate's are verified here, ours are made here.

Replicate signs as Standard Webhooks describes (https://www.standardwebhooks.com/,
https://replicate.com/docs/topics/webhooks/verify-webhook): HMAC-SHA256 over `{id}.{timestamp}.{raw body}`.
The published libraries let other exceptions than a refusal escape on malformed headers, or do not look at the
timestamp; whatever a stranger sends here ends in `WebhookRefused`.
"""

import base64
import binascii
import hashlib
import hmac
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import client
from predictions.errors import PredictionsError

if TYPE_CHECKING:
    from mypy_boto3_secretsmanager import SecretsManagerClient

TOLERANCE_SECONDS = 300
MAX_BODY_BYTES = 6 * 1024 * 1024
"""No larger body reaches a function: https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html"""
MAX_HEADER_CHARACTERS = 2048
MAX_SIGNATURES = 8

OVERLAP_SECONDS = 24 * 3600
CACHE_SECONDS = 300
UNAVAILABLE_CACHE_SECONDS = 5
REFRESH_SECONDS = 30

# No dot in an id: it separates the signed parts, and with it two different webhooks could sign alike.
_ID = re.compile(r"[A-Za-z0-9_-]{1,256}")
_TIMESTAMP = re.compile(r"[1-9][0-9]{0,11}")
_SIGNATURE = re.compile(r"[A-Za-z0-9+/]{43}=")
_VERSION = re.compile(r"v[0-9]{1,3}[a-z]?")


class WebhookRefused(PredictionsError):
    """The request is no webhook of ours to believe: answer 401 and change nothing.

    Attributes:
        reason: One of a few constant sentences, without anything the stranger sent: fit for logs and metrics.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SignatureMismatch(WebhookRefused):
    """Well formed and in time, but signed with none of the secrets: forged, altered, or of a newer secret."""


class SigningSecretUnavailable(PredictionsError):
    """Our own fault: there is no usable signing secret now. Answer 503, so that the webhook is sent again."""


def verify(body: bytes, headers: Mapping[str, str | None], secrets: Sequence[str], now: float) -> None:
    """Returns if the webhook is genuine and fresh.

    Within the tolerance a copy of a genuine webhook verifies again, as Replicate's own repetition must: what
    a webhook does has to be harmless twice.

    Args:
        body: The body as it arrived, before any parsing.
        headers: The request's headers, names in any case.
        secrets: `whsec_…`, every one that is valid now; several while one is replaced by the next.
        now: Unix time in seconds.

    Raises:
        WebhookRefused: For every malformed, stale or wrongly signed request (then `SignatureMismatch`).
        SigningSecretUnavailable: No secret was given or one is malformed.
    """
    if len(body) > MAX_BODY_BYTES:
        raise WebhookRefused("The body is too large.")
    webhook_id = _header(headers, "webhook-id")
    timestamp = _header(headers, "webhook-timestamp")
    if not _ID.fullmatch(webhook_id):
        raise WebhookRefused("The header webhook-id is malformed.")
    if not _TIMESTAMP.fullmatch(timestamp):
        raise WebhookRefused("The header webhook-timestamp is malformed.")
    if abs(now - int(timestamp)) > TOLERANCE_SECONDS:
        raise WebhookRefused("The header webhook-timestamp is too far from the present.")
    signatures = _signatures(_header(headers, "webhook-signature"))
    if not secrets:
        raise SigningSecretUnavailable("No signing secret was given to verify a webhook with.")
    genuine = False
    # Every pair is compared, and as text: of the base64 texts of the same bytes, one is the signature.
    for expected in [_signature(body, webhook_id, timestamp, secret) for secret in secrets]:
        for signature in signatures:
            genuine |= hmac.compare_digest(expected, signature)
    if not genuine:
        raise SignatureMismatch("No signature in the header webhook-signature is right.")


def sign(body: bytes, *, webhook_id: str, timestamp: int, secrets: Sequence[str]) -> dict[str, str]:
    """The three headers that make `body` a genuine webhook.

    Args:
        body: The bytes that will be sent, unchanged.
        webhook_id: Letters, digits, `_` and `-`, at most 256; the same for each repetition of one webhook.
        timestamp: Unix time in seconds of this attempt.
        secrets: `whsec_…`; one signature is made with each, so that a receiver may know either.

    Raises:
        SigningSecretUnavailable: No secret was given or one is malformed.
        ValueError: No receiver would take this id, this timestamp or so many signatures.
    """
    if not secrets:
        raise SigningSecretUnavailable("No signing secret was given to sign a webhook with.")
    if not _ID.fullmatch(webhook_id) or not _TIMESTAMP.fullmatch(str(timestamp)) or len(secrets) > MAX_SIGNATURES:
        raise ValueError(f"Not to be signed: id {webhook_id!r}, timestamp {timestamp!r}, {len(secrets)} secrets.")
    signatures = [_signature(body, webhook_id, str(timestamp), secret) for secret in secrets]
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


def _header(headers: Mapping[str, str | None], name: str) -> str:
    values = [value for key, value in headers.items() if key.lower() == name]
    if len(values) != 1 or not isinstance(values[0], str):
        raise WebhookRefused(f"The header {name} must be there, and once.")
    if len(values[0]) > MAX_HEADER_CHARACTERS:
        raise WebhookRefused(f"The header {name} is too long.")
    return values[0]


def _signatures(header: str) -> list[str]:
    """The version 1 signatures, base64; other versions are for other receivers and passed over."""
    entries = header.split(" ")
    if len(entries) > MAX_SIGNATURES:
        raise WebhookRefused("The header webhook-signature holds too many signatures.")
    signatures = []
    for entry in entries:
        version, _, signature = entry.partition(",")
        if not _VERSION.fullmatch(version) or not signature:
            raise WebhookRefused("The header webhook-signature is malformed.")
        if version == "v1":
            if not _SIGNATURE.fullmatch(signature):
                raise WebhookRefused("The header webhook-signature is malformed.")
            signatures.append(signature)
    if not signatures:
        raise WebhookRefused("The header webhook-signature has no signature of version v1.")
    return signatures


def _signature(body: bytes, webhook_id: str, timestamp: str, secret: str) -> str:
    mac = hmac.new(_key(secret), f"{webhook_id}.{timestamp}.".encode(), hashlib.sha256)
    mac.update(body)
    return base64.b64encode(mac.digest()).decode()


def _key(secret: str) -> bytes:
    """The bytes to sign with: 24 to 64, says Standard Webhooks; an empty key would let everybody sign."""
    try:
        prefix, _, encoded = secret.partition("whsec_")
        key = base64.b64decode(encoded, validate=True)
    except (AttributeError, TypeError, ValueError, binascii.Error):
        prefix, key = "", b""
    if prefix or not 24 <= len(key) <= 64:
        # Never the value itself: this message goes to the log.
        raise SigningSecretUnavailable("A signing secret is malformed: it must be whsec_ and 24 to 64 bytes in base64.")
    return key


class SigningSecrets:
    """Replicate's signing secret, kept in Secrets Manager.

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
        """Of the secret named by SIGNING_SECRET_ARN."""
        return cls(os.environ["SIGNING_SECRET_ARN"], client("secretsmanager"))

    def verify(self, body: bytes, headers: Mapping[str, str | None], now: float) -> None:
        """`verify` with the secrets of now; on a mismatch once more if they can be read anew.

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
        """The secrets to believe: the current one and, for 24 h after it came, the one before it.

        They are read at most every 5 minutes, or 5 seconds while there is none: strangers call the public
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
        """Forgets secrets read at least 30 s ago: a signature that does not match may be of a newer one.

        Returns:
            Whether `current` will read anew, so that verifying again can have another result.
        """
        if now - self._read_at < REFRESH_SECONDS:
            return False
        self._read_at = -math.inf
        return True

    def store(self, secret: str, now: float) -> bool:
        """Makes `secret` the current one, unless it is already, and the one until now the previous one.

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
        _key(secret)
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
        """What is stored, checked, or `{}`.

        `previous` is a list of none or one, `rotated_at` is in Unix seconds.
        A document that makes no sense counts as none, so that `store` mends it.
        """
        try:
            answer = self._secretsmanager.get_secret_value(SecretId=self._secret_arn)
        except ClientError as error:
            # A secret without any value yet; if there is no such secret at all, writing to it will say so.
            if error.response["Error"]["Code"] == "ResourceNotFoundException":
                return {}
            raise
        try:
            document = json.loads(answer["SecretString"])
            _key(document["current"])
        except (KeyError, TypeError, ValueError, SigningSecretUnavailable):
            return {}
        try:
            _key(document["previous"])
            rotated_at = datetime.fromisoformat(document["rotated_at"]).timestamp()
        except (KeyError, TypeError, ValueError, SigningSecretUnavailable):
            return {"current": document["current"], "previous": [], "rotated_at": -math.inf}
        return {"current": document["current"], "previous": [document["previous"]], "rotated_at": rotated_at}
