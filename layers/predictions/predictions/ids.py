"""Ids of predictions, and names of owners and models."""

import base64
import hashlib
import re
import secrets


def random_id() -> str:
    """Return a new random prediction id."""
    return _id_of(secrets.token_bytes(17))


def derived_id(owner: str, key: str) -> str:
    """Return the prediction id derived from an owner's idempotency key."""
    return _id_of(hashlib.sha256(f"{owner}\0{key}".encode()).digest())


def _id_of(entropy: bytes) -> str:
    return base64.b32encode(entropy).decode().lower()[:26]


def is_id(text: str) -> bool:
    """Return whether a string is a valid prediction id."""
    return re.fullmatch(r"[a-z0-9]{26}", text, re.ASCII) is not None


# The outputs bucket has the prefix `payloads` next to the owners' prefixes.
_OWNER = re.compile(r"(?!payloads$)[a-z0-9][a-z0-9-]{0,31}")
OWNER_RULE = "1 to 32 of a-z, 0-9 and '-', not '-' first, and not 'payloads'"
"""The rule of `is_owner`, for error messages."""


def is_owner(text: str) -> bool:
    """Return whether a string is a valid owner name."""
    return _OWNER.fullmatch(text) is not None


NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_])?"
"""The pattern of both parts of the name of a model or deployment, `owner/name`."""


def is_model_name(text: str) -> bool:
    """Return whether a string can be the name of a model or deployment, without a version."""
    return re.fullmatch(rf"{NAME}/{NAME}", text, re.ASCII) is not None
