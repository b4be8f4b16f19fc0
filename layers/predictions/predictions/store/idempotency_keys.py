"""Idempotency keys of batches and pipelines: the id that belongs to an owner's key, and until when.

`pk` = `{kind}#{owner and key, hashed}`, `sk` = `key`. The ids themselves are random, so what is derived from one (a
batch's lines, a pipeline's steps) is never another one's, however often its key is used.

    id              what the key names
    fingerprint     of the request that came with the key
    named_until     when the named item expires: from then on the key is free, and the next request gets a new id
    expires_at      a week later: TTL removes items late and in any order, so the key must not depend on it

An item without `named_until` is an earlier release's; there `expires_at` says when the named item expires.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

from predictions.aws.dynamodb import NEW, Condition, ConditionFailed, Item, Table
from predictions.store.keys import idempotency_key

_KEEP_SECONDS = 7 * 86400

Kind = Literal["batch", "pipeline"]


class KeyHolder(NamedTuple):
    """Holder of an idempotency key: the id that it names.

    Attributes:
        id: The batch or pipeline; it may still have to be written.
        fingerprint: The fingerprint of the request that came with the key.
    """

    id: str
    fingerprint: str


class IdempotencyKeys:
    """The keys of one kind of item.

    Args:
        kind: The kind that they name.
    """

    def __init__(self, kind: Kind, table: Table, *, now: Callable[[], float] = time.time) -> None:
        self._kind = kind
        self._table = table
        self._now = now

    def key_holder(self, owner: str, key: str) -> KeyHolder | None:
        """Return what an owner's key names, or None if the key is free."""
        item = self._table.get_item(idempotency_key(self._kind, owner, key))
        if item is None or int(item.get("named_until") or item["expires_at"]) <= self._now():
            return None
        return KeyHolder(item["id"], item["fingerprint"])

    def take_key(self, owner: str, key: str, new_id: str, fingerprint: str, expires: int) -> KeyHolder:
        """Bind an owner's key to an id, unless the key names something that has not expired.

        Twice, or if the response was lost, it gives the same.

        Args:
            owner: Whose key it is.
            key: The key.
            new_id: The id that a new item would have.
            fingerprint: The fingerprint of the request.
            expires: When that item would expire, in Unix seconds.

        Returns:
            What the key names now.
        """
        expired = Condition(
            "named_until <= :now OR (attribute_not_exists(named_until) AND expires_at <= :now)", now=int(self._now())
        )
        item: Item = {"id": new_id, "fingerprint": fingerprint, **_times(expires)}
        try:
            self._table.put_item(idempotency_key(self._kind, owner, key), item, NEW | expired)
        except ConditionFailed as failed:
            there = failed.item or item
            return KeyHolder(there["id"], there["fingerprint"])
        return KeyHolder(new_id, fingerprint)

    def extend_key(self, owner: str, key: str, id_: str, expires: int) -> None:
        """Bind a key for longer: what it names is written only now, since its first request failed half-way."""
        # A key that names something else by now stays as it is.
        with contextlib.suppress(ConditionFailed):
            self._table.update_item(
                idempotency_key(self._kind, owner, key), set=_times(expires), condition=Condition("id = :id", id=id_)
            )


def _times(expires: int) -> dict[str, int]:
    return {"named_until": expires, "expires_at": expires + _KEEP_SECONDS}
