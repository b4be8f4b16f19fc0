"""Register of unknown costs: which models ran lately without a price that applied, for `prices check`.

    unpriced    {key}#{reason's hash}    why, since when, when last, an example, and the owners of such predictions

Written by the consumer of the table's stream, at most once an hour for each process, key, reason and owner. An entry
expires 35 days after the last write.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.dynamodb import Condition, IfNotExists, Key, Table
from predictions.observability import logger

HOUR_SECONDS = 3600
KEPT_SECONDS = 35 * 24 * HOUR_SECONDS
_PK = "unpriced"
_REMEMBERED = 1000


@dataclass(frozen=True)
class Unpriced:
    """Predictions without a known cost.

    Attributes:
        key: The key of the entry that would price them.
        reason: Why their costs are unknown.
        first_at: When it was recorded first, in Unix seconds.
        last_at: When last.
        example: The id of one of the predictions.
        owners: Owners of such predictions.
    """

    key: str
    reason: str
    first_at: int
    last_at: int
    example: str
    owners: frozenset[str]


class UnknownCosts:
    """The register.

    Args:
        table: The table.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._noted: dict[tuple[str, str, str], float] = {}

    def note(self, key: str, reason: str, owner: str, prediction_id: str, now: float) -> None:
        """Record an unknown cost, unless this process has done so within the hour.

        A write that fails is repeated at the next such prediction. Twice does no harm.
        """
        same = (key, reason, owner)
        if now < self._noted.get(same, float("-inf")) + HOUR_SECONDS:
            return
        if len(self._noted) >= _REMEMBERED:
            self._noted.clear()
        try:
            self._table.update_item(
                Key(_PK, f"{key[:300]}#{hashlib.sha256(reason.encode()).hexdigest()[:16]}"),
                set={
                    "key": key[:300],
                    "reason": reason,
                    "first_at": IfNotExists(int(now)),
                    "last_at": int(now),
                    "example": prediction_id,
                    "expires_at": int(now) + KEPT_SECONDS,
                },
                add={"owners": {owner}},
            )
        except (ClientError, BotoCoreError):
            logger.exception("unknown cost not recorded", key=key)
            return
        self._noted[same] = now

    def entries(self, now: float) -> Iterator[Unpriced]:
        """Read all entries that have not expired."""
        for item in self._table.query(Condition("pk = :pk", pk=_PK), consistent=False):
            if item["expires_at"] > now:
                yield Unpriced(
                    item["key"],
                    item["reason"],
                    item["first_at"],
                    item["last_at"],
                    item["example"],
                    frozenset(item["owners"]),
                )
