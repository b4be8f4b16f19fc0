"""Webhook signatures: verify Replicate's, sign this stack's own.

Replicate signs as Standard Webhooks describes (https://www.standardwebhooks.com/,
https://replicate.com/docs/topics/webhooks/verify-webhook): HMAC-SHA256 over `{id}.{timestamp}.{raw body}`.
Hand-made: the published libraries let other exceptions than a refusal escape on malformed headers, or do not check the
timestamp; here all malformed requests end in `WebhookRefused`.
"""

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence

from predictions.errors import PredictionsError

TOLERANCE_SECONDS = 300
MAX_BODY_BYTES = 6 * 1024 * 1024
"""No larger body reaches a function: https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html"""
MAX_HEADER_CHARACTERS = 2048
MAX_SIGNATURES = 8

# No dot in an id: it separates the signed parts, and with it two different webhooks could sign alike.
_ID = re.compile(r"[A-Za-z0-9_-]{1,256}")
_TIMESTAMP = re.compile(r"[1-9][0-9]{0,11}")
_SIGNATURE = re.compile(r"[A-Za-z0-9+/]{43}=")
_VERSION = re.compile(r"v[0-9]{1,3}[a-z]?")


class WebhookRefused(PredictionsError):
    """The request is not a genuine webhook: respond 401 and change nothing.

    Attributes:
        reason: One of a few constant sentences, without anything of the request: fit for logs and metrics.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SignatureMismatch(WebhookRefused):
    """Well-formed and fresh, but no secret matches: forged, or of a newer secret."""


class SigningSecretUnavailable(PredictionsError):
    """No usable signing secret, this stack's own fault: respond 503 for redelivery."""


def verify(body: bytes, headers: Mapping[str, str | None], secrets: Sequence[str], now: float) -> None:
    """Verify that a webhook is genuine and fresh.

    Within the tolerance a copy of a genuine webhook verifies again, as Replicate's own repetition must: what
    a webhook does must be harmless twice.

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
    """Return the three headers that make `body` a genuine webhook.

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
    """Return the version 1 signatures (base64); ignore other versions."""
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
    mac = hmac.new(key_of(secret), f"{webhook_id}.{timestamp}.".encode(), hashlib.sha256)
    mac.update(body)
    return base64.b64encode(mac.digest()).decode()


def key_of(secret: str) -> bytes:
    """Decode a secret into the key: 24 to 64 bytes (Standard Webhooks), never empty."""
    try:
        prefix, _, encoded = secret.partition("whsec_")
        key = base64.b64decode(encoded, validate=True)
    except (AttributeError, TypeError, ValueError, binascii.Error):
        prefix, key = "", b""
    if prefix or not 24 <= len(key) <= 64:
        # Never the value itself: this message goes to the log.
        raise SigningSecretUnavailable("A signing secret is malformed: it must be whsec_ and 24 to 64 bytes in base64.")
    return key
