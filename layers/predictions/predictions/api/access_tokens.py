"""Access tokens of the API: their owners and scopes.

A token is `rs_` and 256 random bits. Only its SHA-256 is stored (a random token needs no salt and no slow
hash), at pk `tokens` and sk the hash, so that one consistent read is enough. Its item has no `listed_at`, so it is
in no index of predictions.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from predictions.aws.clients import client
from predictions.aws.dynamodb import NEW, Condition, Table
from predictions.errors import PredictionsError
from predictions.ids import _OWNER
from predictions.store.keys import TOKENS_PK, token_key

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

_ALL = Condition("pk = :pk", pk=TOKENS_PK)

_TOKEN = re.compile(r"rs_[A-Za-z0-9_-]{43}")
_AUTHORIZATION = re.compile(r"(?:bearer|token) +([\x21-\x7e]{1,256}) *", re.IGNORECASE | re.ASCII)
_NAME = re.compile(r"[ -~]{0,64}")  # Printable ASCII: names are shown in terminals.
_ID = re.compile(r"[0-9a-f]{6,64}")


class Scope(StrEnum):
    """Permissions of a token: start and cancel predictions, read them, start trainings, manage recipes and models.

    A training adds a version to a model of the Replicate account, which others may run by its name. So `manage`, which
    may change models in any way, includes `train`, and `predict` does not.
    """

    PREDICT = "predict"
    READ = "read"
    TRAIN = "train"
    MANAGE = "manage"


class AccessTokenInvalid(PredictionsError):
    """The owner, scopes, name or id given for a token is invalid; the message names it and the reason."""


class AccessTokenNotFound(PredictionsError):
    """No single token has this id: it does not exist, is already revoked, or is ambiguous."""


@dataclass(frozen=True, slots=True)
class AccessToken:
    """The stored data of a token, without the token itself.

    Attributes:
        id: The first 12 characters of the hash: identifies the token and grants nothing.
        owner: The owner whose predictions it reads and starts.
        scopes: In the order of `Scope`.
        name: A label for people, such as the machine that uses it.
        created_at: RFC 3339, UTC.
        token_hint: The token's last four characters, to recognize it by.
    """

    id: str
    owner: str
    scopes: tuple[Scope, ...]
    name: str
    created_at: str
    token_hint: str


def parse_authorization(header: str | None) -> str | None:
    """Return the credentials of a `Bearer` or `Token` header, or None if it has none.

    The scheme may be in any case. Replicate's clients send either: https://replicate.com/docs/reference/http#authentication
    """
    match = _AUTHORIZATION.fullmatch(header) if isinstance(header, str) else None
    return match[1] if match else None


class AccessTokens:
    """The access tokens of one stack."""

    def __init__(self, table_name: str, dynamodb: "DynamoDBClient") -> None:
        self._table = Table(table_name, dynamodb)

    @classmethod
    def from_env(cls) -> "AccessTokens":
        """Use the table named by TABLE_NAME."""
        return cls(os.environ["TABLE_NAME"], client("dynamodb"))

    def create(self, owner: str, scopes: Iterable[str], name: str = "") -> tuple[str, AccessToken]:
        """Create a token that is valid immediately.

        If the process crashes before the token is shown, nobody has it; `list` shows its entry, to be revoked.

        Args:
            owner: 1 to 32 of `a-z`, `0-9` and `-`, not beginning with `-`.
            scopes: At least one of `Scope`.
            name: A label, at most 64 printable ASCII characters.

        Returns:
            The token, which cannot be retrieved later, and its stored data.

        Raises:
            AccessTokenInvalid: An argument is invalid; nothing was written.
        """
        if not _OWNER.fullmatch(owner):
            raise AccessTokenInvalid(
                f"The owner {owner!r} must be 1 to 32 of a-z, 0-9 and '-', and not begin with '-'."
            )
        wanted = set(scopes)
        if not wanted or not wanted <= set(Scope):
            raise AccessTokenInvalid(
                f"The scopes {', '.join(sorted(wanted)) or '(none)'} must be some of {', '.join(Scope)}."
            )
        if not _NAME.fullmatch(name):
            raise AccessTokenInvalid(f"The name {name!r} must be at most 64 printable ASCII characters.")
        token = f"rs_{secrets.token_urlsafe(32)}"
        hashed = _hash(token)
        item = {
            "owner": owner,
            "scopes": wanted,
            "name": name,
            "created_at": datetime.now(UTC).isoformat(),
            "token_hint": token[-4:],
        }
        # The second half lets botocore retry the put if only its response was lost.
        same = Condition("owner = :owner AND created_at = :created_at", owner=owner, created_at=item["created_at"])
        self._table.put_item(token_key(hashed), item, NEW | same)
        return token, _access_token({**item, "sk": hashed})

    def find(self, token: str) -> AccessToken | None:
        """Return the token's stored data, or None if the token is not valid.

        A string that is not shaped like a token costs no read. Reads are consistent: a revoked token is unknown
        immediately.
        """
        if not _TOKEN.fullmatch(token):
            return None
        item = self._table.get_item(token_key(_hash(token)))
        return _access_token(item) if item else None

    def revoke(self, token_id: str) -> AccessToken:
        """Delete a token.

        The API rejects it after at most 60 s, the time for which it caches an authorizer's response.

        Args:
            token_id: The id that `list` shows, or any prefix of the hash of at least 6 characters.

        Returns:
            The deleted token's data.

        Raises:
            AccessTokenInvalid: This is not a valid id.
            AccessTokenNotFound: No token or several tokens have this id; nothing was deleted.
        """
        if not _ID.fullmatch(token_id):
            raise AccessTokenInvalid(f"The id {token_id!r} must be 6 to 64 of 0-9 and a-f, as `tokens list` shows it.")
        items = list(self._table.query(_ALL & Condition("begins_with(sk, :id)", id=token_id)))
        if len(items) != 1:
            raise AccessTokenNotFound(
                f"Token {token_id} not found. It may already be revoked."
                if not items
                else f"{len(items)} tokens have an id that begins with {token_id}. Give more characters of the id."
            )
        self._table.delete_item(token_key(items[0]["sk"]))
        return _access_token(items[0])

    def list(self) -> Sequence[AccessToken]:
        """Return all tokens, oldest first."""
        return sorted(map(_access_token, self._table.query(_ALL)), key=lambda token: token.created_at)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _access_token(item: Mapping[str, Any]) -> AccessToken:
    return AccessToken(
        id=item["sk"][:12],
        owner=item["owner"],
        # A scope this version does not know allows nothing.
        scopes=tuple(scope for scope in Scope if scope in item["scopes"]),
        name=item["name"],
        created_at=item["created_at"],
        token_hint=item["token_hint"],
    )
