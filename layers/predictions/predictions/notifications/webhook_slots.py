"""Limit on an owner's concurrent webhook tries, once its receivers are slow.

All owners share the consumers of the deliveries queue, and a receiver that hangs occupies one for the 10 seconds of
each try. So an origin whose receiver was slow is marked for two minutes, and while a mark lasts, a try to that origin
needs one of a few slots of its owner, a quarter of the consumers. If three origins of an owner are marked, all of its
tries need one: a new host name costs nothing and could hang each time. SQS fair queues do the same in the service if
they detect it; this limit works without them.

A healthy owner costs a read for each try and no write: only a slow try writes its mark, and only tries under a mark
acquire and release a slot. A slot is a lease: a function that crashes with it loses it after `LEASE_SECONDS`.

The marks and leases of an owner are one item, at pk `owner#{owner}`, sk `webhook_slots`:

    slow_{origin}   until when an origin counts as slow, in Unix milliseconds
    slot_{n}        until when a slot is leased, likewise
"""

import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import client
from predictions.aws.dynamodb import Condition, ConditionFailed, Table
from predictions.errors import PredictionsError
from predictions.observability import logger
from predictions.store.keys import webhook_slots_key

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

SHARE = 4
"""One slot for so many consumers of the queue (`DeliveriesConcurrency`), and at least one."""

SLOW_SECONDS = 2.0
"""The duration from which a try counts as slow, whatever its outcome."""

MARK_SECONDS = 120
LEASE_SECONDS = 30
"""The timeout of the function that delivers."""

_MARKED_ORIGINS = 3
# An expression has at most 4 KB, and a name in it takes 24 bytes:
# https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Constraints.html
_REMOVED_MOST = 100
_EXPIRES_SECONDS = 24 * 3600


class NoSlotFree(PredictionsError):
    """All slots of this owner are in use."""


@dataclass(frozen=True)
class Slot:
    """The permission for one try.

    Attributes:
        owner: The owner of the webhook.
        origin: Of the receiver, as it is marked.
        began: When it was acquired, in Unix seconds.
        name: The attribute of the slot that it holds; None if the origin is not marked.
        until: The lease of that slot, in Unix milliseconds.
    """

    owner: str
    origin: str
    began: float
    name: str | None = None
    until: int = 0


class WebhookSlots:
    """The slots of all owners.

    Args:
        slots: How many slots an owner has.
        choose: Picks one of several free slots, so that concurrent tries pick different ones.
    """

    def __init__(
        self,
        table_name: str,
        dynamodb: "DynamoDBClient",
        slots: int,
        choose: Callable[[list[str]], str] = random.choice,
    ) -> None:
        self._table = Table(table_name, dynamodb)
        self._slots = slots
        self._choose = choose

    @classmethod
    def from_env(cls) -> "WebhookSlots":
        """Use the table named by `TABLE_NAME`, and a share of `DELIVERIES_CONCURRENCY`."""
        slots = max(1, int(os.environ["DELIVERIES_CONCURRENCY"]) // SHARE)
        return cls(os.environ["TABLE_NAME"], client("dynamodb"), slots)

    def acquire(self, owner: str, origin: str, now: float) -> Slot:
        """Acquire the permission for a try. Return it with `release`.

        Args:
            owner: The owner of the webhook.
            origin: `scheme://host:port` of the receiver.
            now: The time.

        Raises:
            NoSlotFree: The origin is slow, and all slots of its owner are in use.
            botocore.exceptions.ClientError: The table cannot be read.
        """
        slot = Slot(owner, hashlib.sha256(origin.encode()).hexdigest()[:16], now)
        lasting = {name for name, until in self._times_of(owner).items() if until > now * 1000}
        marked = {name for name in lasting if name.startswith("slow_")}
        if f"slow_{slot.origin}" not in marked and len(marked) < _MARKED_ORIGINS:
            return slot
        free = [name for name in (f"slot_{n}" for n in range(self._slots)) if name not in lasting]
        if not free:
            raise NoSlotFree
        name, until = self._choose(free), int((now + LEASE_SECONDS) * 1000)
        try:
            free_now = Condition(f"attribute_not_exists({name}) OR {name} <= :now", now=int(now * 1000))
            self._table.update_item(webhook_slots_key(owner), set={name: until}, condition=free_now)
        except ConditionFailed:
            raise NoSlotFree from None
        return Slot(owner, slot.origin, now, name, until)

    def release(self, slot: Slot, now: float) -> None:
        """Release a slot, and mark the origin if the try was slow.

        Never fails, since the try is over: a slot that could not be released is free again when its lease expires.
        """
        slow = now - slot.began >= SLOW_SECONDS
        try:
            if slow:
                self._mark(slot, now)
            if slot.name is not None:
                self._free(slot)
        except (ClientError, BotoCoreError):
            logger.exception("slot not released")

    def _mark(self, slot: Slot, now: float) -> None:
        mark = f"slow_{slot.origin}"
        # Expired marks are removed, so that the item stays small however many origins it had.
        ended = [
            name
            for name, until in self._times_of(slot.owner).items()
            if name.startswith("slow_") and name != mark and until <= now * 1000
        ]
        times = {mark: int((now + MARK_SECONDS) * 1000), "expires_at": int(now) + _EXPIRES_SECONDS}
        self._table.update_item(webhook_slots_key(slot.owner), set=times, remove=ended[:_REMOVED_MOST])

    def _times_of(self, owner: str) -> dict[str, int]:
        item = self._table.get_item(webhook_slots_key(owner), consistent=False) or {}
        return {name: until for name, until in item.items() if name.startswith(("slow_", "slot_"))}

    def _free(self, slot: Slot) -> None:
        # The lease of this slot may have ended, and another one be there.
        own = Condition(f"{slot.name} = :until", until=slot.until)
        try:
            self._table.update_item(webhook_slots_key(slot.owner), remove=[str(slot.name)], condition=own)
        except ConditionFailed:
            logger.info("the lease of a slot had ended")
