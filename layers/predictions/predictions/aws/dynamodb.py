"""Items of the table in the form that DynamoDB's client speaks, and the two reads that lists are made of.

The codec is not boto3's: importing that one imports boto3, a tenth of the cold start of most functions. A test holds it
to boto3's.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

# https://docs.aws.amazon.com/amazondynamodb/latest/APIReference/API_BatchGetItem.html
_BATCH_LIMIT = 100

# Before and after every place of a list, each of which begins with a year.
_FIRST_PLACE, _LAST_PLACE = "0", "9~"


def serialize(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes, a key or an expression's values in DynamoDB's form: `{"rank": 1}` as `{"rank": {"N": "1"}}`.

    Raises:
        TypeError: A value has no such form, for example a float.
    """
    return {name: _typed(value) for name, value in values.items()}


def deserialize(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `serialize` made as it was; numbers are ints, since every number in this table is whole."""
    return {name: _untyped(value) for name, value in item.items()}


def _typed(value: Any) -> dict[str, Any]:
    match value:
        case None:
            return {"NULL": True}
        case bool():  # before int, which it is too
            return {"BOOL": value}
        case str():
            return {"S": value}
        case int():
            return {"N": str(value)}
        case bytes():
            return {"B": value}
        case Mapping():
            return {"M": serialize(value)}
        case list() | tuple():
            return {"L": [_typed(each) for each in value]}
        case set() | frozenset() if all(type(each) is int for each in value):
            return {"NS": [str(each) for each in value]}
        case set() | frozenset() if all(isinstance(each, str) for each in value):
            return {"SS": list(value)}
    raise TypeError(f"DynamoDB has no form of {type(value).__name__}")


def _untyped(typed: Mapping[str, Any]) -> Any:
    ((kind, value),) = typed.items()
    match kind:
        case "N":
            return _whole(value)
        case "NULL":
            return None
        case "M":
            return deserialize(value)
        case "L":
            return [_untyped(each) for each in value]
        case "SS" | "BS":
            return set(value)
        case "NS":
            return {_whole(each) for each in value}
    return value  # S, BOOL, B


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # of a manual edit
        return int(float(text))


def timestamp(moment: float | datetime) -> str:
    """A moment (a number is Unix seconds) as places in lists begin with it: RFC 3339 in UTC, with microseconds."""
    given = moment if isinstance(moment, datetime) else datetime.fromtimestamp(moment, UTC)
    return given.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


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
