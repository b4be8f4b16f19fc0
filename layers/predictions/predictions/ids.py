"""Ids of predictions and names of owners."""

import base64
import hashlib
import re
import secrets


def random_id() -> str:
    """A new prediction id."""
    return _id_of(secrets.token_bytes(17))


def derived_id(owner: str, key: str) -> str:
    """The prediction id that belongs to an owner's idempotency key."""
    return _id_of(hashlib.sha256(f"{owner}\0{key}".encode()).digest())


def _id_of(entropy: bytes) -> str:
    return base64.b32encode(entropy).decode().lower()[:26]


def is_id(text: str) -> bool:
    """Whether a text can be a prediction's id."""
    return re.fullmatch(r"[a-z0-9]{26}", text, re.ASCII) is not None


# `payloads` is what the outputs bucket keeps beside the owners' files.
_OWNER = re.compile(r"(?!payloads$)[a-z0-9][a-z0-9-]{0,31}")
OWNER_RULE = "1 to 32 of a-z, 0-9 and '-', not '-' first, and not 'payloads'"
"""What `is_owner` asks for, in words."""


def is_owner(text: str) -> bool:
    """Whether a text can be an owner's name."""
    return _OWNER.fullmatch(text) is not None
