"""The secret with which each owner's webhooks are signed.

It is HMAC-SHA256(master, owner, version): nothing is stored for an owner who never rotated, one owner's secret tells
nothing of another's, and with a new version the one before signs too for 24 hours. The master is in Secrets Manager;
the version is an item at pk `owner#{owner}`, sk `webhook_secret`.
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
from predictions.aws.secrets import CachedSecret
from predictions.errors import PredictionsError

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_secretsmanager import SecretsManagerClient

OVERLAP_SECONDS = 24 * 3600
_FIRST_VERSION = 1


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
        self._table_name = table_name
        self._dynamodb = dynamodb

    @classmethod
    def from_env(cls) -> "SecretVersions":
        """Those in the table named by `TABLE_NAME`."""
        return cls(os.environ["TABLE_NAME"], client("dynamodb"))

    def version_of(self, owner: str) -> SecretVersion:
        """The current version, read consistently."""
        item = self._dynamodb.get_item(
            TableName=self._table_name,
            Key={"pk": {"S": f"owner#{owner}"}, "sk": {"S": "webhook_secret"}},
            ConsistentRead=True,
        ).get("Item")
        if not item:
            return SecretVersion(_FIRST_VERSION, None)
        return SecretVersion(int(item["secret_version"]["N"]), int(item["rotated_at"]["N"]))

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
            self._dynamodb.put_item(
                TableName=self._table_name,
                Item={
                    "pk": {"S": f"owner#{owner}"},
                    "sk": {"S": "webhook_secret"},
                    "secret_version": {"N": str(after.version)},
                    "rotated_at": {"N": str(after.rotated_at)},
                },
                ConditionExpression="attribute_not_exists(pk) OR secret_version = :before",
                ExpressionAttributeValues={":before": {"N": str(before.version)}},
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
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
        self._master = CachedSecret(master_arn, secretsmanager, clock=clock)

    @classmethod
    def from_env(cls) -> "OwnerSecrets":
        """From `WEBHOOK_MASTER_SECRET_ARN` and what `SecretVersions.from_env` reads."""
        return cls(SecretVersions.from_env(), os.environ["WEBHOOK_MASTER_SECRET_ARN"], client("secretsmanager"))

    def current_secret(self, owner: str) -> str:
        """The secret that an owner's receivers verify webhooks with: `whsec_…`.

        Raises:
            SecretTooShort: Our own fault.
            botocore.exceptions.ClientError: The table or the master cannot be read.
        """
        return self._secret(owner, self._versions.version_of(owner).version)

    def valid_secrets(self, owner: str, now: float) -> list[str]:
        """The secrets to sign with now: the current one, and for 24 h after a rotation the one before it.

        Raises:
            SecretTooShort: Our own fault.
            botocore.exceptions.ClientError: The table or the master cannot be read.
        """
        current = self._versions.version_of(owner)
        versions = [current.version]
        if current.rotated_at is not None and now < current.rotated_at + OVERLAP_SECONDS:
            versions.append(current.version - 1)
        return [self._secret(owner, version) for version in versions]

    def _secret(self, owner: str, version: int) -> str:
        # An owner's name has no line end, so no two owners and versions give one text.
        mac = hmac.new(self._master.signing_key(), f"webhook secret\n{version}\n{owner}".encode(), hashlib.sha256)
        return f"whsec_{base64.b64encode(mac.digest()).decode()}"
