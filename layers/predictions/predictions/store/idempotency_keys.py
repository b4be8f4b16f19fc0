"""Idempotency keys of batches and pipelines: which id belongs to an owner's key, and until when.

`pk` = `{kind}#{owner and key, hashed}`, `sk` = `key`. The ids themselves are random, so what is derived from one (a
batch's lines, a pipeline's steps) is never another one's, however often its key is used.

    id              what the key names
    fingerprint     of the request that came with the key
    named_until     when the named item expires: from then on the key is free, and the next request gets a new id
    expires_at      a week later: TTL removes items late and in any order, so the key must not depend on it

An item without `named_until` is of an earlier release; there `expires_at` says when the named item expires.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from predictions.aws.dynamodb import deserialize, serialize

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

_KEEP_SECONDS = 7 * 86400

Kind = Literal["batch", "pipeline"]


class KeyHolder(NamedTuple):
    """What an idempotency key names.

    Attributes:
        id: The batch or pipeline; it may still have to be written.
        fingerprint: Of the request that came with the key.
    """

    id: str
    fingerprint: str


class IdempotencyKeys:
    """The keys of one kind of item.

    Args:
        kind: What they name.
        table_name: The table.
        dynamodb: The client to use.
        now: The time, in seconds since 1970.
    """

    def __init__(
        self, kind: Kind, table_name: str, dynamodb: "DynamoDBClient", *, now: Callable[[], float] = time.time
    ) -> None:
        self._kind = kind
        self._table_name = table_name
        self._dynamodb = dynamodb
        self._now = now

    def key_holder(self, owner: str, key: str) -> KeyHolder | None:
        """Return what an owner's key names, or None if the key is free."""
        found = self._dynamodb.get_item(
            TableName=self._table_name, Key=serialize(self._key(owner, key)), ConsistentRead=True
        ).get("Item")
        item = deserialize(found) if found else None
        if item is None or item.get("named_until", item["expires_at"]) <= self._now():
            return None
        return KeyHolder(item["id"], item["fingerprint"])

    def take_key(self, owner: str, key: str, new_id: str, fingerprint: str, expires: int) -> KeyHolder:
        """Bind an owner's key to an id, unless the key names something that has not expired.

        Twice, or with its answer lost, it gives the same.

        Args:
            owner: Whose key it is.
            key: The key.
            new_id: The id that a new item would have.
            fingerprint: The request's.
            expires: When that item would expire, in Unix seconds.

        Returns:
            What the key names now.
        """
        item = {
            **self._key(owner, key),
            "id": new_id,
            "fingerprint": fingerprint,
            "named_until": expires,
            "expires_at": expires + _KEEP_SECONDS,
        }
        try:
            self._dynamodb.put_item(
                TableName=self._table_name,
                Item=serialize(item),
                ConditionExpression="attribute_not_exists(pk) OR named_until <= :now"
                " OR (attribute_not_exists(named_until) AND expires_at <= :now)",
                ExpressionAttributeValues=serialize({":now": int(self._now())}),
                ReturnValuesOnConditionCheckFailure="ALL_OLD",
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException as error:
            left: Any = error.response
            there = deserialize(left["Item"])
            return KeyHolder(there["id"], there["fingerprint"])
        return KeyHolder(new_id, fingerprint)

    def extend_key(self, owner: str, key: str, id_: str, expires: int) -> None:
        """Bind a key for longer: what it names is written only now, since its first request failed half-way."""
        # The key names something else by now: then that stays.
        with contextlib.suppress(self._dynamodb.exceptions.ConditionalCheckFailedException):
            self._dynamodb.update_item(
                TableName=self._table_name,
                Key=serialize(self._key(owner, key)),
                UpdateExpression="SET named_until = :until, expires_at = :expires",
                ConditionExpression="id = :id",
                ExpressionAttributeValues=serialize(
                    {":until": expires, ":expires": expires + _KEEP_SECONDS, ":id": id_}
                ),
            )

    def _key(self, owner: str, key: str) -> dict[str, str]:
        hashed = hashlib.sha256(f"{owner}\0{key}".encode()).hexdigest()
        return {"pk": f"{self._kind}#{hashed}", "sk": "key"}
