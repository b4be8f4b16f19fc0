"""The table in memory: the operations and expressions that the library uses, and an error for any other.

`test_dynamodb.py` gives moto, behind botocore's own checks, the same calls that schedules made, and compares.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from typing import Any

Item = dict[str, Any]
Names = dict[str, str]
Evaluate = Callable[[Item, Names, dict[str, Any]], Any]

_TOKEN = re.compile(r"\s*(<>|<=|>=|[=<>(),+]|[#:]?[A-Za-z_][A-Za-z0-9_]*(?:\.#?[A-Za-z_][A-Za-z0-9_]*)*)")
_CLAUSES = ("SET", "REMOVE", "ADD", "DELETE")


class NotModelled(AssertionError):
    """The library uses something of DynamoDB that is not in here: it has to be added."""


class ConditionFailed(Exception):
    """A condition did not hold; `item` is what is there."""

    def __init__(self, item: Item | None) -> None:
        super().__init__("The conditional request failed")
        self.item = item


class TransactionCanceled(Exception):
    """Conditions of a transaction did not hold; `reasons` are those of its writes."""

    def __init__(self, reasons: list[dict[str, Any]]) -> None:
        super().__init__("Transaction cancelled")
        self.reasons = reasons


class Table:
    """One table, with indexes that lag behind.

    Args:
        now: The time.
        index_lag: By how many seconds indexes are late.
        written: Told of each write: the item before and after, None where there was or is none.
    """

    def __init__(
        self,
        now: Callable[[], float],
        index_lag: float = 0.0,
        written: Callable[[Item | None, Item | None], None] = lambda _, __: None,
    ) -> None:
        self.items: dict[tuple[str, str], Item] = {}
        self._now = now
        self._index_lag = index_lag
        self._written = written
        # For the indexes: what an item was, and until when.
        self._were: dict[tuple[str, str], list[tuple[float, Item | None]]] = {}

    def call(self, operation: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Does one operation.

        Raises:
            ConditionFailed: A condition did not hold; nothing was written.
            TransactionCanceled: Likewise, of a transaction.
        """
        operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "GetItem": self._get,
            "PutItem": self._put,
            "UpdateItem": self._update,
            "DeleteItem": self._delete,
            "Query": self._query,
            "BatchGetItem": self._batch_get,
            "TransactWriteItems": self._transact,
        }
        if operation not in operations:
            raise NotModelled(operation)
        return operations[operation](asked)

    # -- reading ----------------------------------------------------------------------------------------------

    def _get(self, asked: dict[str, Any]) -> dict[str, Any]:
        item = self.items.get(_key(asked["Key"]))
        return {"Item": dict(item)} if item is not None else {}

    def _batch_get(self, asked: dict[str, Any]) -> dict[str, Any]:
        ((name, wanted),) = asked["RequestItems"].items()
        found = [self.items[key] for key in map(_key, wanted["Keys"]) if key in self.items]
        return {"Responses": {name: [dict(item) for item in found]}, "UnprocessedKeys": {}}

    def _query(self, asked: dict[str, Any]) -> dict[str, Any]:
        index = asked.get("IndexName")
        order = {None: "sk", "due": "next_check_at", "by_upstream_id": "upstream_id", "by_owner": "listed_at"}[index]
        needs = {None: (), "due": ("open", "next_check_at"), "by_upstream_id": ("upstream_id",)}.get(
            index, ("owner", "listed_at")
        )
        condition = _condition(asked["KeyConditionExpression"])
        names, values = asked.get("ExpressionAttributeNames", {}), asked["ExpressionAttributeValues"]
        found = []
        partition, given = (needs or ("pk",))[0], list(values.values())
        for key in self._candidates(index, values):
            item = self._indexed(key) if index else self.items[key]
            # The partition first, which is the quickest to tell.
            if item is None or item.get(partition) not in given:
                continue
            if all(name in item for name in needs) and condition(item, names, values):
                found.append(item)
        found.sort(key=lambda item: _sortable(item[order]), reverse=not asked.get("ScanIndexForward", True))
        limit = asked.get("Limit")
        found = found[:limit] if limit else found
        if asked.get("Select") == "COUNT":
            return {"Count": len(found)}
        if index:  # keys only
            own = ("pk", "sk", *needs)
            found = [{name: item[name] for name in own} for item in found]
        if projection := asked.get("ProjectionExpression"):
            wanted = [names.get(name.strip(), name.strip()) for name in projection.split(",")]
            found = [{name: item[name] for name in wanted if name in item} for item in found]
        return {"Items": [dict(item) for item in found], "Count": len(found)}

    def _candidates(self, index: str | None, values: dict[str, Any]) -> list[tuple[str, str]]:
        """The keys of whatever a query may find."""
        return list(self.items)

    def _indexed(self, key: tuple[str, str]) -> Item | None:
        """An item as indexes have it."""
        seen_at = self._now() - self._index_lag
        for until, item in self._were.get(key, ()):
            if until > seen_at:
                return item
        return self.items.get(key)

    # -- writing ----------------------------------------------------------------------------------------------

    def _put(self, asked: dict[str, Any]) -> dict[str, Any]:
        key = _key(asked["Item"])
        self._check(key, asked)
        self._write(key, dict(asked["Item"]))
        return {}

    def _delete(self, asked: dict[str, Any]) -> dict[str, Any]:
        key = _key(asked["Key"])
        self._check(key, asked)
        self._write(key, None)
        return {}

    def _update(self, asked: dict[str, Any]) -> dict[str, Any]:
        key = _key(asked["Key"])
        self._check(key, asked)
        before = self.items.get(key)
        names, values = asked.get("ExpressionAttributeNames", {}), asked.get("ExpressionAttributeValues", {})
        after = dict(before) if before is not None else dict(asked["Key"])
        for change in _update(asked["UpdateExpression"]):
            change(before or {}, after, names, values)
        self._write(key, after)
        wanted = asked.get("ReturnValues", "NONE")
        if wanted == "ALL_NEW":
            return {"Attributes": dict(after)}
        if wanted == "NONE":
            return {}
        if wanted == "UPDATED_OLD":
            # Of a map of which one place changes, that place alone.
            old = _changed_paths(asked["UpdateExpression"], before or {}, names)
            return {"Attributes": old} if old else {}
        raise NotModelled(f"ReturnValues {wanted}")

    def _transact(self, asked: dict[str, Any]) -> dict[str, Any]:
        writes = [next(iter(each.items())) for each in asked["TransactItems"]]
        if beyond := {kind for kind, _ in writes} - {"Put", "Update"}:
            raise NotModelled(f"{sorted(beyond)} of a transaction")
        keys = [_key(write["Item"] if kind == "Put" else write["Key"]) for kind, write in writes]
        if len(set(keys)) < len(keys):
            raise NotModelled("two writes of one item, which DynamoDB refuses")
        reasons: list[dict[str, Any]] = []
        for key, (_, write) in zip(keys, writes, strict=True):
            try:
                self._check(key, write)
                reasons.append({"Code": "None"})
            except ConditionFailed as failed:
                there = {"Item": failed.item} if failed.item is not None else {}
                reasons.append({"Code": "ConditionalCheckFailed", **there})
        if any(reason["Code"] != "None" for reason in reasons):
            raise TransactionCanceled(reasons)
        for kind, write in writes:
            {"Put": self._put, "Update": self._update}[kind](write)
        return {}

    def _check(self, key: tuple[str, str], asked: dict[str, Any]) -> None:
        text = asked.get("ConditionExpression")
        if text is None:
            return
        item = self.items.get(key)
        names, values = asked.get("ExpressionAttributeNames", {}), asked.get("ExpressionAttributeValues", {})
        if not _condition(text)(item or {}, names, values):
            told = asked.get("ReturnValuesOnConditionCheckFailure") == "ALL_OLD" and item is not None
            raise ConditionFailed(dict(item) if told and item is not None else None)

    def _write(self, key: tuple[str, str], after: Item | None) -> None:
        before = self.items.get(key)
        if before is None and after is None:
            return
        if self._index_lag:
            self._were.setdefault(key, []).append((self._now(), before))
            self._were[key] = [each for each in self._were[key] if each[0] > self._now() - 60]
        if after is None:
            self.items.pop(key, None)
        else:
            self.items[key] = after
        self._written(before, after)


def _key(item: Item) -> tuple[str, str]:
    return item["pk"]["S"], item["sk"]["S"]


# -- expressions --------------------------------------------------------------------------------------------------


def _tokens(text: str) -> list[str]:
    found, at = [], 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            raise NotModelled(f"{text[at:]!r} in {text!r}")
        found.append(match[1])
        at = match.end()
    return found


class _Reader:
    """Reads a condition: the grammar of DynamoDB's, from OR down to operands."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _tokens(text)
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def next(self, *wanted: str) -> str:
        token = self.peek()
        if not token or (wanted and token not in wanted):
            raise NotModelled(f"{token!r} in {self.text!r}")
        self.at += 1
        return token

    def any_of(self) -> Evaluate:
        parts = [self.all_of()]
        while self.peek() == "OR":
            self.next()
            parts.append(self.all_of())
        return parts[0] if len(parts) == 1 else lambda i, n, v: any(part(i, n, v) for part in parts)

    def all_of(self) -> Evaluate:
        parts = [self.one()]
        while self.peek() == "AND":
            self.next()
            parts.append(self.one())
        return parts[0] if len(parts) == 1 else lambda i, n, v: all(part(i, n, v) for part in parts)

    def one(self) -> Evaluate:
        token = self.peek()
        if token == "NOT":
            self.next()
            part = self.one()
            return lambda i, n, v: not part(i, n, v)
        if token == "(":
            self.next()
            inner = self.any_of()
            self.next(")")
            return inner
        if token in ("attribute_exists", "attribute_not_exists", "begins_with", "contains"):
            return self.function(self.next())
        left = self.operand()
        sign = self.next("=", "<>", "<", "<=", ">", ">=", "BETWEEN")
        right = self.operand()
        if sign == "BETWEEN":
            self.next("AND")
            last = self.operand()
            return lambda i, n, v: (
                _compare(left(i, n, v), ">=", right(i, n, v)) and _compare(left(i, n, v), "<=", last(i, n, v))
            )
        return lambda i, n, v: _compare(left(i, n, v), sign, right(i, n, v))

    def function(self, name: str) -> Evaluate:
        self.next("(")
        first = self.operand()
        if name.startswith("attribute_"):
            self.next(")")
            exists = name == "attribute_exists"
            return lambda i, n, v: (first(i, n, v) is not None) == exists
        self.next(",")
        second = self.operand()
        self.next(")")
        test = _begins_with if name == "begins_with" else _contains
        return lambda i, n, v: test(first(i, n, v), second(i, n, v))

    def operand(self) -> Evaluate:
        token = self.next()
        if token == "if_not_exists":
            self.next("(")
            path = self.operand()
            self.next(",")
            other = self.operand()
            self.next(")")
            return lambda i, n, v: there if (there := path(i, n, v)) is not None else other(i, n, v)
        if token == "size":
            self.next("(")
            inner = self.operand()
            self.next(")")
            return lambda i, n, v: _size(inner(i, n, v))
        if token.startswith(":"):
            return lambda i, n, v: v[token]
        if not re.match(r"#?[A-Za-z_]", token):
            raise NotModelled(f"{token!r} in {self.text!r}")
        return lambda i, n, v: _at(i, n, token)


@lru_cache(maxsize=1000)
def _condition(text: str) -> Evaluate:
    reader = _Reader(text)
    found = reader.any_of()
    if reader.peek():
        raise NotModelled(f"{reader.peek()!r} in {text!r}")
    return found


Change = Callable[[Item, Item, Names, dict[str, Any]], None]


@lru_cache(maxsize=1000)
def _update(text: str) -> list[Change]:
    reader = _Reader(text)
    changes: list[Change] = []
    while reader.peek():
        clause = reader.next(*_CLAUSES)
        while True:
            changes.append(_change(reader, clause))
            if reader.peek() != ",":
                break
            reader.next()
    return changes


def _change(reader: _Reader, clause: str) -> Change:
    path = reader.next()
    if "." in path:
        return _change_within(reader, clause, path)
    if clause == "REMOVE":
        return lambda before, after, n, v: after.pop(_name(path, n), None) and None
    if clause == "SET":
        reader.next("=")
        value = reader.operand()
        if reader.peek() != "+":
            return lambda before, after, n, v: after.__setitem__(_name(path, n), value(before, n, v))
        reader.next()
        more = reader.operand()
        return lambda before, after, n, v: after.__setitem__(
            _name(path, n), _number(_decimal(value(before, n, v)) + _decimal(more(before, n, v)))
        )
    value = reader.operand()
    if clause == "ADD":
        return lambda before, after, n, v: after.__setitem__(
            _name(path, n), _added(before.get(_name(path, n)), value(before, n, v))
        )

    def delete(before: Item, after: Item, names: Names, values: dict[str, Any]) -> None:
        name = _name(path, names)
        if name in before:
            ((kind, members),) = value(before, names, values).items()
            left = set(before[name][kind]) - set(members)
            after[name] = {kind: sorted(left)}
            if not left:
                del after[name]

    return delete


def _change_within(reader: _Reader, clause: str, path: str) -> Change:
    """Of one place in a map: the form `map.place`, to set or to remove."""
    outer, _, inner = path.partition(".")
    if "." in inner or clause not in ("SET", "REMOVE"):
        raise NotModelled(f"{path!r} in {reader.text!r}")
    value = None
    if clause == "SET":
        reader.next("=")
        value = reader.operand()
        if reader.peek() == "+":
            raise NotModelled(f"{path!r} in {reader.text!r}")

    def change(before: Item, after: Item, names: Names, values: dict[str, Any]) -> None:
        name = _name(outer, names)
        if "M" not in after.get(name, {}):
            raise NotModelled(f"{path!r} of no map, which DynamoDB refuses")
        places = dict(after[name]["M"])
        if value is None:
            places.pop(_name(inner, names), None)
        else:
            places[_name(inner, names)] = value(before, names, values)
        after[name] = {"M": places}

    return change


def _changed_paths(text: str, before: Item, names: Names) -> Item:
    """What was there before at the places that an update sets, which has to be its only clause."""
    match = re.fullmatch(r"SET ([^ ,=]+) = [^,]+", text)
    if match is None:
        raise NotModelled(f"UPDATED_OLD of {text!r}")
    outer, _, inner = match[1].partition(".")
    there = _at(before, names, match[1])
    if there is None:
        return {}
    return {_name(outer, names): {"M": {_name(inner, names): there}} if inner else there}


def _name(token: str, names: Names) -> str:
    return names[token] if token.startswith("#") else token


def _at(item: Item, names: Names, path: str) -> Any:
    if "." not in path:
        return item.get(names[path] if path[0] == "#" else path)
    value: Any = {"M": item}
    for token in path.split("."):
        value = value.get("M", {}).get(_name(token, names)) if value else None
    return value


def _decimal(value: Any) -> Decimal:
    return Decimal(value["N"])


def _number(value: Decimal) -> dict[str, str]:
    return {"N": str(value)}


def _added(there: Any, value: Any) -> Any:
    if value.keys() & {"SS", "NS"}:
        ((kind, members),) = value.items()
        return {kind: sorted(set(there[kind] if there else ()) | set(members))}
    return _number((_decimal(there) if there else Decimal(0)) + _decimal(value))


def _compare(left: Any, sign: str, right: Any) -> bool:
    if left is None or right is None:
        return sign == "<>"
    if left.keys() != right.keys():
        return sign == "<>"
    a, b = (_sortable(left), _sortable(right)) if left.keys() & {"N", "S"} else (left, right)
    if sign == "=":
        return bool(a == b)
    if sign == "<>":
        return bool(a != b)
    if not left.keys() & {"N", "S"}:
        raise NotModelled(f"{sign} of {left}")
    return bool({"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[sign])


def _sortable(value: Any) -> Any:
    return _decimal(value) if "N" in value else value["S"].encode()


def _begins_with(value: Any, start: Any) -> bool:
    return value is not None and "S" in value and value["S"].startswith(start["S"])


def _contains(value: Any, part: Any) -> bool:
    if value is None:
        return False
    if "N" in part:
        return part["N"] in value.get("NS", ())
    return part["S"] in value.get("SS", ()) or ("S" in value and part["S"] in value["S"])


def _size(value: Any) -> Any:
    if value is None:
        return None
    ((_, content),) = value.items()
    return {"N": str(len(content))}
