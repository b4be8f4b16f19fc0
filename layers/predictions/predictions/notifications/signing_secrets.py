"""The secret that signs each owner's webhooks.

A secret is HMAC-SHA256(master, owner, version): nothing is stored for an owner who never rotated, one owner's secret
reveals nothing of another's, and after a rotation the previous version also signs for 24 hours. The master is in
Secrets Manager; the version is an item at pk `owner#{owner}`, sk `webhook_secret`.
"""

import base64
import hashlib
import hmac
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from predictions.aws.clients import client
from predictions.aws.dynamodb import NEW, Condition, ConditionFailed, Table
from predictions.aws.secrets import CachedSecret
from predictions.errors import PredictionsError
from predictions.store.keys import webhook_secret_key

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_secretsmanager import SecretsManagerClient

OVERLAP_SECONDS = 24 * 3600
_FIRST_VERSION = 1


class RotatedRecently(PredictionsError):
    """The owner's previous secret still signs; another rotation would end that early."""


@dataclass(frozen=True)
class SecretVersion:
    """The current version of an owner's secret, and since when (Unix seconds; None: never rotated)."""

    version: int
    rotated_at: int | None


class SecretVersions:
    """The versions of the owners' secrets."""

    def __init__(self, table_name: str, dynamodb: "DynamoDBClient") -> None:
        self._table = Table(table_name, dynamodb)

    @classmethod
    def from_env(cls) -> "SecretVersions":
        """Use the table named by `TABLE_NAME`."""
        return cls(os.environ["TABLE_NAME"], client("dynamodb"))

    def version_of(self, owner: str) -> SecretVersion:
        """Return the current version, read consistently."""
        item = self._table.get_item(webhook_secret_key(owner))
        return (
            SecretVersion(item["secret_version"], item["rotated_at"]) if item else SecretVersion(_FIRST_VERSION, None)
        )

    def rotate(self, owner: str, now: float, *, force: bool = False) -> SecretVersion:
        """Make the next version the current one; the previous one also signs for 24 h.

        Two concurrent rotations, or one that botocore retries after a lost response, raise the version by one.

        Args:
            owner: The owner of the secret.
            now: The time.
            force: Also rotate within 24 h of the last rotation: the version before that one stops signing immediately.

        Raises:
            RotatedRecently: The last rotation is less than 24 h ago, and `force` is not given.
        """
        before = self.version_of(owner)
        if before.rotated_at is not None and now < before.rotated_at + OVERLAP_SECONDS and not force:
            until = datetime.fromtimestamp(before.rotated_at + OVERLAP_SECONDS, UTC).isoformat(timespec="seconds")
            raise RotatedRecently(
                f"The webhook secret of {owner} was rotated less than 24 hours ago, and the previous one signs until"
                f" {until}. Retry after that time, or end it now with --force."
            )
        after = SecretVersion(before.version + 1, int(now))
        try:
            self._table.put_item(
                webhook_secret_key(owner),
                {"secret_version": after.version, "rotated_at": after.rotated_at},
                NEW | Condition("secret_version = :before", before=before.version),
            )
        except ConditionFailed:
            # A concurrent rotation succeeded, or this write did and its response was lost.
            return self.version_of(owner)
        return after


class OwnerSecrets:
    """Derives the owners' secrets.

    Args:
        versions: The version of each.
        master_arn: The secret in Secrets Manager from which all are derived.
        secretsmanager: The client to read it with.
        clock: Monotonic seconds, for the time that the master is cached.
    """

    def __init__(
        self,
        versions: SecretVersions,
        master_arn: str,
        secretsmanager: "SecretsManagerClient",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._versions = versions
        self._master = CachedSecret(master_arn, secretsmanager, clock=clock)

    @classmethod
    def from_env(cls) -> "OwnerSecrets":
        """Build from `WEBHOOK_MASTER_SECRET_ARN` and the environment of `SecretVersions`."""
        return cls(SecretVersions.from_env(), os.environ["WEBHOOK_MASTER_SECRET_ARN"], client("secretsmanager"))

    def current_secret(self, owner: str) -> str:
        """Return the secret with which an owner's receivers verify webhooks: `whsec_…`.

        Raises:
            SecretTooShort: A fault of the stack.
            botocore.exceptions.ClientError: The table or the master cannot be read.
        """
        return self._secret(owner, self._versions.version_of(owner).version)

    def valid_secrets(self, owner: str, now: float) -> list[str]:
        """Return the secrets that sign now: the current, and for 24 h the previous one.

        Raises:
            SecretTooShort: A fault of the stack.
            botocore.exceptions.ClientError: The table or the master cannot be read.
        """
        current = self._versions.version_of(owner)
        versions = [current.version]
        if current.rotated_at is not None and now < current.rotated_at + OVERLAP_SECONDS:
            versions.append(current.version - 1)
        return [self._secret(owner, version) for version in versions]

    def _secret(self, owner: str, version: int) -> str:
        # An owner's name has no line break, so no two pairs of owner and version give the same text.
        mac = hmac.new(self._master.signing_key(), f"webhook secret\n{version}\n{owner}".encode(), hashlib.sha256)
        return f"whsec_{base64.b64encode(mac.digest()).decode()}"
