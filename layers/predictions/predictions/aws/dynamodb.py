"""Items of the table in the form that DynamoDB's client speaks, and the two reads that lists are made of.

`api.access_tokens`, which runs before every cold call, and modules with an item of two values
(`notifications.signing_secrets`, `api.proxy`) write that form themselves: importing the serializers imports boto3.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from boto3.dynamodb.types import TypeDeserializer, TypeSerializer

from predictions.clock import rfc3339

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

# https://docs.aws.amazon.com/amazondynamodb/latest/APIReference/API_BatchGetItem.html
_BATCH_LIMIT = 100

# Before and after every place of a list, each of which begins with a year.
_FIRST_PLACE, _LAST_PLACE = "0", "9~"

_serializer = TypeSerializer()
_deserializer = TypeDeserializer()


def serialize(values: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes, a key or an expression's values: `{"rank": 1}` as `{"rank": {"N": "1"}}`."""
    return {name: _serializer.serialize(value) for name, value in values.items()}


def deserialize(item: Mapping[str, Any]) -> dict[str, Any]:
    """What `serialize` made, as it was; numbers are ints, since every number in this table is whole."""
    values = {name: _deserializer.deserialize(value) for name, value in item.items()}
    return {name: int(value) if hasattr(value, "to_integral") else value for name, value in values.items()}


def timestamp(moment: float | datetime) -> str:
    """A moment (a number is Unix seconds) as places in lists begin with it: RFC 3339 in UTC, with microseconds."""
    return rfc3339(moment, "microseconds")


def read_items(
    dynamodb: "DynamoDBClient", table_name: str, keys: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], dict[str, Any]]:
    """The items of these keys (`pk`, `sk`) that there are, by key, read consistently."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    waiting = [serialize({"pk": pk, "sk": sk}) for pk, sk in keys]
    while waiting:
        request, waiting = waiting[:_BATCH_LIMIT], waiting[_BATCH_LIMIT:]
        answer = dynamodb.batch_get_item(RequestItems={table_name: {"Keys": request, "ConsistentRead": True}})
        for item in map(deserialize, answer["Responses"].get(table_name, [])):
            found[item["pk"], item["sk"]] = item
        unprocessed = answer.get("UnprocessedKeys", {})
        waiting += unprocessed[table_name]["Keys"] if table_name in unprocessed else []
    return found


def list_page(
    dynamodb: "DynamoDBClient",
    table_name: str,
    owner: str,
    start: str | None,
    *,
    older: bool,
    size: int,
    between: tuple[str | None, str | None] = (None, None),
) -> tuple[list[str], bool]:
    """A page of the index `by_owner`.

    Args:
        dynamodb: The client to use.
        table_name: The table.
        owner: The list's key in the index, which is not for every list the bare name of an owner.
        start: The place (`listed_at`) beside which the page starts, or None for the newest.
        older: Whether the page lies on the older side of `start`.
        size: The most items of a page.
        between: Two timestamps in the form of `listed_at`: only what was created from the first on and before the
            second.

    Returns:
        Each item's `pk`, from the start of the page on, away from it, and whether there are further ones beyond.
    """
    # A place is a timestamp, `#` and an id: none of either is a timestamp alone, so both bounds can be inclusive.
    first, last = between[0] or _FIRST_PLACE, between[1] or _LAST_PLACE
    if start is not None and older:
        # All places have the same length: this is before `start`, and after whatever comes before it.
        last = min(last, f"{start[:-1]}{chr(ord(start[-1]) - 1)}~")
    elif start is not None:
        first = max(first, f"{start} ")
    if first > last:  # which DynamoDB refuses
        return [], False
    answer = dynamodb.query(
        TableName=table_name,
        IndexName="by_owner",
        KeyConditionExpression="#owner = :owner AND listed_at BETWEEN :first AND :last",
        ExpressionAttributeNames={"#owner": "owner"},
        ExpressionAttributeValues=serialize({":owner": owner, ":first": first, ":last": last}),
        ScanIndexForward=not older,
        Limit=size + 1,
    )
    pks = [str(deserialize(item)["pk"]) for item in answer["Items"]]
    return pks[:size], len(pks) > size
