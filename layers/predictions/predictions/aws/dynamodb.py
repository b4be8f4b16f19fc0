"""DynamoDB: the form of items, conditional writes, and the reads that lists are made of.

The codec is our own and the only one: boto3's import takes longer at cold start than all else that a function imports
from AWS's libraries.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from botocore.exceptions import ClientError

from predictions.aws.clients import client
from predictions.errors import PredictionsError

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

Item = dict[str, Any]

# https://docs.aws.amazon.com/amazondynamodb/latest/APIReference/API_BatchGetItem.html
_BATCH_LIMIT = 100

# Before and after every place of a list, each of which begins with a year.
_FIRST_PLACE, _LAST_PLACE = "0", "9~"


class Key(NamedTuple):
    """The key of an item."""

    pk: str
    sk: str


class ConditionFailed(PredictionsError):
    """The condition of a write did not hold, and nothing was written; `item` is what is there, or None."""

    def __init__(self, item: Item | None) -> None:
        super().__init__("the condition of a write did not hold")
        self.item = item


class ConditionsFailed(PredictionsError):
    """Conditions of writes that belong together did not hold, and nothing was written; `items` are what is there."""

    def __init__(self, items: list[Item]) -> None:
        super().__init__("conditions of writes did not hold")
        self.items = items


# -- items --------------------------------------------------------------------------------------------------------


def serialize(values: Mapping[str, Any]) -> dict[str, Any]:
    """Write attributes, a key or an expression's values as DynamoDB does: `{"rank": 1}` as `{"rank": {"N": "1"}}`.

    Raises:
        TypeError: A value is of a type that no item has, for example a float.
    """
    return {name: _serialized(value) for name, value in values.items()}


def deserialize(item: Mapping[str, Any], *, exact: bool = False) -> Item:
    """Read what `serialize` wrote; numbers are ints, since those in this table are whole, except the limiter's.

    Args:
        item: As DynamoDB has it.
        exact: Whether a number that is not whole is a Decimal and not cut off.
    """
    return {name: _deserialized(value, exact=exact) for name, value in item.items()}


def _serialized(value: Any) -> dict[str, Any]:
    match value:
        case None:
            return {"NULL": True}
        case bool():  # before int, of which it is a subclass
            return {"BOOL": value}
        case str():
            return {"S": value}
        case int() | Decimal():
            return {"N": str(value)}
        case bytes():
            return {"B": value}
        case Mapping():
            return {"M": serialize(value)}
        case list() | tuple():
            return {"L": [_serialized(each) for each in value]}
        case set() | frozenset() if all(type(each) in (int, Decimal) for each in value):
            return {"NS": [str(each) for each in value]}
        case set() | frozenset() if all(isinstance(each, str) for each in value):
            return {"SS": list(value)}
    raise TypeError(f"no item has a value of the type {type(value).__name__}")


def _deserialized(typed: Mapping[str, Any], *, exact: bool) -> Any:
    ((kind, value),) = typed.items()
    match kind:
        case "N":
            return _exact(value) if exact else int(Decimal(value))
        case "NULL":
            return None
        case "M":
            return deserialize(value, exact=exact)
        case "L":
            return [_deserialized(each, exact=exact) for each in value]
        case "SS" | "BS":
            return set(value)
        case "NS":
            return set(map(_exact, value))  # a write names a member exactly
    return value  # S, BOOL and B


def _exact(text: str) -> int | Decimal:
    number = Decimal(text)
    return int(number) if number == number.to_integral_value() else number


# -- expressions --------------------------------------------------------------------------------------------------

# Not after a colon: that is a value. Not before a parenthesis: that is a function.
_ATTRIBUTE = re.compile(r"(?<![:\w.])[a-z_]\w*(?:\.\w+)?(?![\w(])")


class Condition:
    """A condition in DynamoDB's words: `Condition("rank < :most AND attribute_exists(open)", most=9)`.

    Attributes stand by their own names, also those that are reserved words, and entries of maps after a dot.
    """

    def __init__(self, text: str, **values: Any) -> None:
        self.text = text
        self.values = values
        self._is_choice = " OR " in text

    def __and__(self, other: "Condition") -> "Condition":
        text = " AND ".join(f"({each.text})" if each._is_choice else each.text for each in (self, other))
        both = Condition(text, **self._values_with(other))
        both._is_choice = False
        return both

    def __or__(self, other: "Condition") -> "Condition":
        return Condition(f"{self.text} OR {other.text}", **self._values_with(other))

    def _values_with(self, other: "Condition") -> dict[str, Any]:
        if twice := [name for name in self.values.keys() & other.values if self.values[name] != other.values[name]]:
            raise ValueError(f"two values have the name {twice[0]}: {self.text}; {other.text}")
        return self.values | other.values


NEW = Condition("attribute_not_exists(pk)")
"""The item is not there yet."""

PRESENT = Condition("attribute_exists(pk)")
"""The item is there."""


class IfNotExists(NamedTuple):
    """A value to set if the attribute has none; else the attribute stays as it is."""

    value: Any


class Sum(NamedTuple):
    """The value of an attribute, which must be there, plus a number."""

    path: str
    addend: int | Decimal


class ItemUpdate(NamedTuple):
    """An update of one item of several that are written together: as the arguments of `Table.update_item`."""

    key: Key
    set: Mapping[str, Any]
    add: Mapping[str, Any]
    condition: Condition | None


class _Expressions(dict[str, Any]):
    """The arguments of a request that are expressions, with the names and values of all of them."""

    def express(self, argument: str, text: str, values: Mapping[str, Any]) -> None:
        """Add an expression."""
        names: dict[str, str] = self.setdefault("ExpressionAttributeNames", {})

        def placeholders(found: re.Match[str]) -> str:
            # For all names, since many are reserved words. They begin with a letter.
            parts = {f"#_{name}" if name[0].isdigit() else f"#{name}": name for name in found[0].split(".")}
            names.update(parts)
            return ".".join(parts)

        self[argument] = _ATTRIBUTE.sub(placeholders, text)
        if values:
            bound = serialize({f":{name}": value for name, value in values.items()})
            self["ExpressionAttributeValues"] = self.get("ExpressionAttributeValues", {}) | bound

    def require(self, condition: Condition | None) -> None:
        """Add the condition of a write; DynamoDB returns what is there if it does not hold."""
        if condition:
            self.express("ConditionExpression", condition.text, condition.values)
            self["ReturnValuesOnConditionCheckFailure"] = "ALL_OLD"

    def change(
        self, set_: Mapping[str, Any], remove: Iterable[str], add: Mapping[str, Any], delete: Mapping[str, Any]
    ) -> None:
        """Add the changes of an update."""
        values: dict[str, Any] = {}

        def bound(clause: str, path: str, value: Any) -> str:
            name = f"{clause}_{path.replace('.', '_')}"
            values[name] = value
            return f":{name}"

        def assigned(path: str, value: Any) -> str:
            match value:
                case IfNotExists(first):
                    return f"if_not_exists({path}, {bound('set', path, first)})"
                case Sum(of, addend):
                    return f"{of} + {bound('set', path, addend)}"
            return bound("set", path, value)

        clauses = {
            "SET": [f"{path} = {assigned(path, value)}" for path, value in set_.items()],
            "REMOVE": [path for path in remove if path not in set_],
            "ADD": [f"{path} {bound('add', path, value)}" for path, value in add.items()],
            "DELETE": [f"{path} {bound('delete', path, value)}" for path, value in delete.items()],
        }
        text = " ".join(f"{clause} {', '.join(parts)}" for clause, parts in clauses.items() if parts)
        self.express("UpdateExpression", text, values)


@contextmanager
def _conditional(*, exact: bool = False) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        if error.response["Error"]["Code"] != "ConditionalCheckFailedException":
            raise
        response: Any = error.response
        raise ConditionFailed(deserialize(response["Item"], exact=exact) if "Item" in response else None) from None


# -- the table ----------------------------------------------------------------------------------------------------


class Table:
    """A table whose items have the keys `pk` and `sk`."""

    def __init__(self, name: str, dynamodb: "DynamoDBClient") -> None:
        self._name = name
        self._dynamodb = dynamodb

    @classmethod
    def from_env(cls) -> "Table":
        """Make it from `TABLE_NAME`."""
        return cls(os.environ["TABLE_NAME"], client("dynamodb"))

    def put_item(self, key: Key, item: Mapping[str, Any], condition: Condition | None = None) -> None:
        """Write an item, also in the place of one that is there.

        Args:
            key: Its key.
            item: Its other attributes.
            condition: Of what is there.

        Raises:
            ConditionFailed: Nothing was written.
        """
        request = _Expressions()
        request.require(condition)
        with _conditional():
            self._dynamodb.put_item(TableName=self._name, Item=serialize({**key._asdict(), **item}), **request)

    def update_item(
        self, key: Key, *, set: Mapping[str, Any] | None = None, remove: Iterable[str] = (),  # noqa: A002  # its own word
        add: Mapping[str, Any] | None = None, delete: Mapping[str, Any] | None = None,
        condition: Condition | None = None, returns: Literal["ALL_NEW", "UPDATED_OLD"] = "ALL_NEW", exact: bool = False,
    ) -> Item:  # fmt: skip
        """Change attributes of an item, which is made if it is not there.

        Args:
            key: Its key.
            set: Values by attribute; also `IfNotExists` and `Sum`.
            remove: Attributes to remove, unless they are set.
            add: Numbers to add to attributes, and members to add to sets.
            delete: Members to remove from sets.
            condition: Of the item as it is.
            returns: Whether to return the item after the change, or what the changed attributes were before.
            exact: As for `deserialize`, also for the item of `ConditionFailed`.

        Raises:
            ConditionFailed: Nothing was changed.
        """
        request = _Expressions()
        request.change(set or {}, remove, add or {}, delete or {})
        request.require(condition)
        with _conditional(exact=exact):
            answer = self._dynamodb.update_item(
                TableName=self._name, Key=serialize(key._asdict()), ReturnValues=returns, **request
            )
        return deserialize(answer.get("Attributes", {}), exact=exact)

    def update_together(self, updates: Iterable[ItemUpdate]) -> bool:
        """Change several items, at most 100, all or none; return False if another write came in between.

        Raises:
            ConditionsFailed: The condition of one or more did not hold, and nothing was changed.
        """
        actions: list[Any] = []
        for each in updates:
            request = _Expressions(TableName=self._name, Key=serialize(each.key._asdict()))
            request.change(each.set, (), each.add, {})
            request.require(each.condition)
            actions.append({"Update": request})
        try:
            self._dynamodb.transact_write_items(TransactItems=actions)
        except ClientError as error:
            response: Any = error.response
            reasons = response.get("CancellationReasons", [])
            if failed := [reason for reason in reasons if reason["Code"] == "ConditionalCheckFailed"]:
                raise ConditionsFailed([deserialize(each["Item"]) for each in failed if "Item" in each]) from None
            if any(reason["Code"] == "TransactionConflict" for reason in reasons):
                return False
            raise
        return True

    def delete_item(self, key: Key, condition: Condition | None = None) -> None:
        """Delete an item, if it is there.

        Raises:
            ConditionFailed: Nothing was deleted.
        """
        request = _Expressions()
        request.require(condition)
        with _conditional():
            self._dynamodb.delete_item(TableName=self._name, Key=serialize(key._asdict()), **request)

    def get_item(self, key: Key, *, consistent: bool = True, exact: bool = False) -> Item | None:
        """Read an item, `exact` as for `deserialize`, or return None if it is not there."""
        answer = self._dynamodb.get_item(TableName=self._name, Key=serialize(key._asdict()), ConsistentRead=consistent)
        return deserialize(answer["Item"], exact=exact) if "Item" in answer else None

    def read_items(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Item]:
        """Read many items consistently, by key; those that are not there are left out."""
        found: dict[tuple[str, str], Item] = {}
        waiting: list[Any] = [serialize({"pk": pk, "sk": sk}) for pk, sk in keys]
        while waiting:
            batch, waiting = waiting[:_BATCH_LIMIT], waiting[_BATCH_LIMIT:]
            answer = self._dynamodb.batch_get_item(RequestItems={self._name: {"Keys": batch, "ConsistentRead": True}})
            for item in map(deserialize, answer["Responses"].get(self._name, [])):
                found[item["pk"], item["sk"]] = item
            unprocessed = answer.get("UnprocessedKeys", {})
            waiting += unprocessed[self._name]["Keys"] if self._name in unprocessed else []
        return found

    def query(
        self, keys: Condition, *, index: str | None = None, only: str | None = None, consistent: bool = True,
        page_items: int | None = None,
    ) -> Iterator[Item]:  # fmt: skip
        """Read all items of a partition; consistently, unless from an index.

        Args:
            keys: The condition on their keys; the partition comes first.
            index: The index to read from.
            only: The names of the attributes that are wanted.
            consistent: Whether to see all writes before; False costs half.
            page_items: The most items of one call, or None for 1 MB: a caller may stop before the last one.
        """
        pages = {"Limit": page_items} if page_items else {}
        for page in self._pages(keys, index, only, ConsistentRead=consistent and index is None, **pages):
            yield from map(deserialize, page["Items"])

    def query_page(self, keys: Condition, *, index: str, limit: int, ascending: bool = True) -> list[Item]:
        """Read the first items of a partition of an index, in one call."""
        request = _Expressions()
        request.express("KeyConditionExpression", keys.text, keys.values)
        answer = self._dynamodb.query(
            TableName=self._name, IndexName=index, ScanIndexForward=ascending, Limit=limit, **request
        )
        return [deserialize(item) for item in answer["Items"]]

    def count_items(self, keys: Condition, *, index: str | None = None) -> Iterator[int]:
        """Count the items of a partition, page by page: a page is 1 MB of items."""
        for page in self._pages(keys, index, None, Select="COUNT", ConsistentRead=index is None):
            yield int(page["Count"])

    def _pages(
        self, keys: Condition, index: str | None, only: str | None, **options: Any
    ) -> Iterator[Mapping[str, Any]]:
        request = _Expressions(TableName=self._name, **options)
        request |= {"IndexName": index} if index else {}
        request.express("KeyConditionExpression", keys.text, keys.values)
        if only:
            request.express("ProjectionExpression", only, {})
        # Without botocore's paginator: to make one costs more time than a page.
        while True:
            page = self._dynamodb.query(**request)
            yield page
            if "LastEvaluatedKey" not in page:
                return
            request["ExclusiveStartKey"] = page["LastEvaluatedKey"]

    def list_page(
        self, owner: str, start: str | None, *, older: bool, size: int,
        between: tuple[str | None, str | None] = (None, None),
    ) -> tuple[list[tuple[str, str]], bool]:  # fmt: skip
        """Read a page of a list of the index `by_owner`.

        Args:
            owner: The list's key in the index, which is not for every list the bare name of an owner.
            start: The place (`listed_at`) beside which the page starts, or None for the newest.
            older: Whether the page lies on the older side of `start`.
            size: The most items of a page.
            between: Two timestamps in the form of `listed_at`: only what was created from the first on and before the
                second.

        Returns:
            The `pk` and the place of each item, from the start of the page on, away from it, and whether there are
            further ones.
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
        listed = Condition("owner = :owner AND listed_at BETWEEN :first AND :last", owner=owner, first=first, last=last)
        items = self.query_page(listed, index="by_owner", limit=size + 1, ascending=not older)
        return [(str(item["pk"]), str(item["listed_at"])) for item in items[:size]], len(items) > size

    def list_items(self, owner: str, start: str | None, *, older: bool, size: int, sk: str) -> tuple[list[Item], bool]:
        """Read a page of a list as `list_page`, and then its items, whose sort key is `sk`, consistently."""
        listed, more = self.list_page(owner, start, older=older, size=size)
        found = self.read_items((pk, sk) for pk, _ in listed)
        return [found[pk, sk] for pk, _ in listed if (pk, sk) in found], more
