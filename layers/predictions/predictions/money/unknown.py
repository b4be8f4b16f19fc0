"""Register of unknown costs: which models ran lately without a price that applied, for `prices check`.

    unpriced    {key}#{reason's hash}#{owner}    why, since when, when last, and an example

Written by the consumer of the table's stream, at most once an hour for each process, key, reason and owner, and once a
second for each process: all entries have one partition key, and each function that starts begins without a memory. An
entry expires 35 days after the last write.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.dynamodb import Condition, IfNotExists, Key, Table
from predictions.observability import logger

HOUR_SECONDS = 3600
APART_SECONDS = 1.0
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
        self._last = float("-inf")

    def note(self, key: str, reason: str, owner: str, prediction_id: str, now: float) -> None:
        """Record an unknown cost, unless this process has done so within the hour, or another one within the second.

        What is left out, as by a write that fails, is recorded with the next such prediction. Twice does no harm.
        """
        same = (key, reason, owner)
        if now < self._noted.get(same, float("-inf")) + HOUR_SECONDS or abs(now - self._last) < APART_SECONDS:
            return
        self._last = now
        if len(self._noted) >= _REMEMBERED:
            self._noted.clear()
        try:
            self._table.update_item(
                Key(_PK, f"{key[:300]}#{hashlib.sha256(reason.encode()).hexdigest()[:16]}#{owner}"),
                set={
                    "key": key[:300],
                    "reason": reason,
                    "owner": owner,
                    "first_at": IfNotExists(int(now)),
                    "last_at": int(now),
                    "example": prediction_id,
                    "expires_at": int(now) + KEPT_SECONDS,
                },
            )
        except (ClientError, BotoCoreError):
            logger.exception("unknown cost not recorded", key=key)
            return
        self._noted[same] = now

    def entries(self, now: float) -> Iterator[Unpriced]:
        """Read all entries that have not expired, those of one key and reason as one."""
        found = self._table.query(Condition("pk = :pk", pk=_PK), consistent=False)
        of_all = groupby((each for each in found if each["expires_at"] > now), key=itemgetter("key", "reason"))
        for (key, reason), group in of_all:
            items = list(group)
            latest = max(items, key=itemgetter("last_at"))
            yield Unpriced(
                key,
                reason,
                min(item["first_at"] for item in items),
                latest["last_at"],
                latest["example"],
                frozenset(item["owner"] for item in items),
            )
