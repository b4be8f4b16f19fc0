"""Recent requests: what a client without an idempotency key sends again after an answer that it did not see.

`pk` = `recent#{owner}#{fingerprint}`, `sk` = `recent` holds the latest request of a client that counts its attempts
(`x-stainless-retry-count`), for two minutes. Fingerprints of batches and pipelines begin with their kind.
"""

import os
from typing import TYPE_CHECKING, Any

from predictions.aws.clients import client
from predictions.aws.dynamodb import deserialize, serialize

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

    from predictions.intents.model import Attempt

_RECENT_MS = 120_000


class RecentRequests:
    """The requests of the last two minutes that came without a key, by owner and fingerprint.

    Args:
        table_name: The table.
        dynamodb: The client to use.
    """

    def __init__(self, table_name: str, dynamodb: "DynamoDBClient") -> None:
        self._table_name = table_name
        self._dynamodb = dynamodb

    @classmethod
    def from_env(cls) -> "RecentRequests":
        """Those in the table named by `TABLE_NAME`."""
        return cls(os.environ["TABLE_NAME"], client("dynamodb"))

    def note(self, new_id: str, owner: str, fingerprint: str, attempt: "Attempt") -> str:
        """Record which id a request creates that comes without a key and may be sent again.

        A first attempt is a request of its own and takes the record over, unless a later attempt has it that was sent
        after this one: that can only be its own repetition, which has overtaken it. A later attempt takes what an
        earlier one recorded in the last two minutes. Whichever attempt then writes the item first has created it.

        Args:
            new_id: The id that a new item would have.
            owner: Whose request it is.
            fingerprint: The request's.
            attempt: Which of its attempts this is.

        Returns:
            The id of the item to create: `new_id`, or the recorded one.
        """
        item = {"pk": f"recent#{owner}#{fingerprint}", "sk": "recent", "id": new_id,
                "asked_at": attempt.asked_at, "attempt": attempt.number,
                "expires_at": attempt.asked_at // 1000 + 3600}  # fmt: skip
        # An item without it is of a release that noted other things: it says nothing of this request.
        condition = "attribute_not_exists(asked_at) OR asked_at < :forgotten"
        values = {":forgotten": attempt.asked_at - _RECENT_MS}
        if attempt.number == 0:
            condition += " OR asked_at < :asked_at OR attempt = :first"
            values |= {":asked_at": attempt.asked_at, ":first": 0}
        try:
            self._dynamodb.put_item(
                TableName=self._table_name,
                Item=serialize(item),
                ConditionExpression=condition,
                ExpressionAttributeValues=serialize(values),
                ReturnValuesOnConditionCheckFailure="ALL_OLD",
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException as error:
            left: Any = error.response
            noted: str = deserialize(left["Item"])["id"]
            return noted
        return new_id

    def find(self, owner: str, fingerprint: str, attempt: "Attempt") -> str | None:
        """Return the id that the same request of the two minutes before recorded, or None if there is no record."""
        found = self._dynamodb.get_item(
            TableName=self._table_name,
            Key=serialize({"pk": f"recent#{owner}#{fingerprint}", "sk": "recent"}),
            ConsistentRead=True,
        ).get("Item")
        noted = deserialize(found) if found else {}
        return str(noted["id"]) if noted.get("asked_at", 0) >= attempt.asked_at - _RECENT_MS else None
