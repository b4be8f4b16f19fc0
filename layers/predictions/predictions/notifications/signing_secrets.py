"""The secret with which each owner's webhooks are signed.

It is HMAC-SHA256(master, owner, version): nothing is stored for an owner who never rotated, one owner's secret tells
nothing of another's, and with a new version the one before signs too for 24 hours. The master is in Secrets Manager;
the version is an item at pk `owner#{owner}`, sk `webhook_secret`.
"""

import base64
import hashlib
import hmac
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from predictions.aws.clients import client
from predictions.aws.dynamodb import NEW, Condition, ConditionFailed, Table
from predictions.errors import PredictionsError
from predictions.store.keys import webhook_secret_key

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_secretsmanager import SecretsManagerClient

OVERLAP_SECONDS = 24 * 3600
_CACHE_SECONDS = 300
_FIRST_VERSION = 1


class MasterSecretUnusable(PredictionsError):
    """The stack's own fault: the secret that all owners' secrets are made from is too short to be one."""


class RotatedRecently(PredictionsError):
    """The owner's secret before this one still signs: another rotation would end that early."""


@dataclass(frozen=True)
class SecretVersion:
    """Which version of an owner's secret is the current one, and since when (Unix seconds; None: from the start)."""

    version: int
    rotated_at: int | None


class SecretVersions:
    """The versions of the owners' secrets."""

    def __init__(self, table_name: str, dynamodb: "DynamoDBClient") -> None:
        self._table = Table(table_name, dynamodb)

    @classmethod
    def from_env(cls) -> "SecretVersions":
        """Those in the table named by `TABLE_NAME`."""
        return cls(os.environ["TABLE_NAME"], client("dynamodb"))

    def version_of(self, owner: str) -> SecretVersion:
        """The current version, read consistently."""
        item = self._table.get_item(webhook_secret_key(owner))
        return (
            SecretVersion(item["secret_version"], item["rotated_at"]) if item else SecretVersion(_FIRST_VERSION, None)
        )

    def rotate(self, owner: str, now: float, *, force: bool = False) -> SecretVersion:
        """Makes the next version the current one; the one before signs too for 24 h.

        Two at once, or one whose answer was lost and that botocore sends again, raise the version by one.

        Args:
            owner: Whose.
            now: The time.
            force: Also within 24 h of the last rotation: the version before that one stops signing at once.

        Raises:
            RotatedRecently: The last rotation is less than 24 h ago, and `force` is not given.
        """
        before = self.version_of(owner)
        if before.rotated_at is not None and now < before.rotated_at + OVERLAP_SECONDS and not force:
            until = datetime.fromtimestamp(before.rotated_at + OVERLAP_SECONDS, UTC).isoformat(timespec="seconds")
            raise RotatedRecently(
                f"The webhook secret of {owner} was rotated less than 24 hours ago, and the one before signs until"
                f" {until}. Wait for that, or end it now with --force."
            )
        after = SecretVersion(before.version + 1, int(now))
        try:
            self._table.put_item(
                webhook_secret_key(owner),
                {"secret_version": after.version, "rotated_at": after.rotated_at},
                NEW | Condition("secret_version = :before", before=before.version),
            )
        except ConditionFailed:
            # Somebody else did it just now, or this very write did and its answer was lost.
            return self.version_of(owner)
        return after


class OwnerSecrets:
    """The owners' secrets.

    Args:
        versions: The version of each.
        master_arn: The secret in Secrets Manager that all are made from.
        secretsmanager: The client to read it with.
        clock: Seconds that only go forward, for how long the master is kept in memory.
    """

    def __init__(
        self,
        versions: SecretVersions,
        master_arn: str,
        secretsmanager: "SecretsManagerClient",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._versions = versions
        self._master_arn = master_arn
        self._secretsmanager = secretsmanager
        self._clock = clock
        self._master = b""
        self._read_at = -math.inf

    @classmethod
    def from_env(cls) -> "OwnerSecrets":
        """From `WEBHOOK_MASTER_SECRET_ARN` and what `SecretVersions.from_env` reads."""
        return cls(SecretVersions.from_env(), os.environ["WEBHOOK_MASTER_SECRET_ARN"], client("secretsmanager"))

    def current_secret(self, owner: str) -> str:
        """The secret that an owner's receivers verify webhooks with: `whsec_…`.

        Raises:
            MasterSecretUnusable: Our own fault.
            botocore.exceptions.ClientError: The table or the master cannot be read.
        """
        return self._secret(owner, self._versions.version_of(owner).version)

    def valid_secrets(self, owner: str, now: float) -> list[str]:
        """The secrets to sign with now: the current one, and for 24 h after a rotation the one before it.

        Raises:
            MasterSecretUnusable: Our own fault.
            botocore.exceptions.ClientError: The table or the master cannot be read.
        """
        current = self._versions.version_of(owner)
        versions = [current.version]
        if current.rotated_at is not None and now < current.rotated_at + OVERLAP_SECONDS:
            versions.append(current.version - 1)
        return [self._secret(owner, version) for version in versions]

    def _secret(self, owner: str, version: int) -> str:
        # An owner's name has no line end, so no two owners and versions give one text.
        mac = hmac.new(self._key(), f"webhook secret\n{version}\n{owner}".encode(), hashlib.sha256)
        return f"whsec_{base64.b64encode(mac.digest()).decode()}"

    def _key(self) -> bytes:
        if self._clock() - self._read_at >= _CACHE_SECONDS:
            answer = self._secretsmanager.get_secret_value(SecretId=self._master_arn)
            self._master, self._read_at = answer["SecretString"].encode(), self._clock()
        if len(self._master) < 32:
            raise MasterSecretUnusable(f"The secret {self._master_arn} must hold at least 32 characters.")
        return self._master
