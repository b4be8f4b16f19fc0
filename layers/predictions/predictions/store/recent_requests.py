"""Recent requests: deduplicates requests without an idempotency key whose response the client did not receive.

`pk` = `recent#{owner}#{fingerprint}`, `sk` = `recent` holds the latest request of a client that counts its attempts
(`x-stainless-retry-count`), for two minutes. Fingerprints of batches and pipelines begin with their kind.
"""

from typing import TYPE_CHECKING

from predictions.aws.dynamodb import Condition, ConditionFailed, Table
from predictions.store.keys import recent_key

if TYPE_CHECKING:
    from predictions.intents.model import Attempt

_RECENT_MS = 120_000


class RecentRequests:
    """The requests of the last two minutes that came without a key, by owner and fingerprint."""

    def __init__(self, table: Table) -> None:
        self._table = table

    @classmethod
    def from_env(cls) -> "RecentRequests":
        """Make them from `TABLE_NAME`."""
        return cls(Table.from_env())

    def note(self, new_id: str, owner: str, fingerprint: str, attempt: "Attempt") -> str:
        """Record which id a request creates that comes without a key and may be sent again.

        A first attempt is a request of its own and takes the record over, unless a later attempt has it that was sent
        after this one: that can only be its own repetition, which has overtaken it. A later attempt takes what an
        earlier one recorded in the last two minutes. Whichever attempt then writes the item first has created it.

        Args:
            new_id: The id that a new item would have.
            owner: Whose request it is.
            fingerprint: The fingerprint of the request.
            attempt: Which of its attempts this is.

        Returns:
            The id of the item to create: `new_id`, or the recorded one.
        """
        # An item without the attribute is an earlier release's, which recorded other things.
        forgotten = Condition(
            "attribute_not_exists(asked_at) OR asked_at < :forgotten", forgotten=attempt.asked_at - _RECENT_MS
        )
        overtakes_none = Condition("asked_at < :asked_at OR attempt = :first", asked_at=attempt.asked_at, first=0)
        item = {
            "id": new_id,
            "asked_at": attempt.asked_at,
            "attempt": attempt.number,
            "expires_at": attempt.asked_at // 1000 + 3600,
        }
        condition = forgotten | overtakes_none if attempt.number == 0 else forgotten
        try:
            self._table.put_item(recent_key(owner, fingerprint), item, condition)
        except ConditionFailed as failed:
            return str((failed.item or item)["id"])
        return new_id

    def find(self, owner: str, fingerprint: str, attempt: "Attempt") -> str | None:
        """Return the id that the same request of the two minutes before recorded, or None if there is no record."""
        recorded = self._table.get_item(recent_key(owner, fingerprint)) or {}
        return str(recorded["id"]) if recorded.get("asked_at", 0) >= attempt.asked_at - _RECENT_MS else None
