"""Items: their form, reads of many that DynamoDB answers in parts, and pages of an owner's list."""

from typing import Any

import pytest
from predictions.aws import clients
from predictions.aws.dynamodb import deserialize, list_page, read_items, serialize

from tests.unit.apps import AwsCalls


@pytest.fixture
def table_service() -> str:
    """Let moto answer DynamoDB: what talks to it itself is tested here."""
    return "moto"


TABLE = "predictions"


def put(pk: str, **attributes: Any) -> None:
    clients.client("dynamodb").put_item(TableName=TABLE, Item=serialize({"pk": pk, "sk": "x", **attributes}))


def test_item_comes_back_as_it_was_and_with_whole_numbers() -> None:
    item = {"pk": "a", "n": 3, "big": 10**15, "yes": True, "names": {"b", "c"}, "list": ["d", 1], "map": {"e": "f"}}
    assert deserialize(serialize(item)) == item
    assert type(deserialize(serialize(item))["n"]) is int


def test_keys_that_are_not_there_are_left_out(cloud: None) -> None:
    put("a")
    assert read_items(clients.client("dynamodb"), TABLE, [("a", "x"), ("a", "y"), ("b", "x")]).keys() == {("a", "x")}
    assert read_items(clients.client("dynamodb"), TABLE, []) == {}


def test_more_keys_than_one_call_takes_and_what_dynamodb_leaves_for_later_are_all_read(cloud: None) -> None:
    keys = [(f"pk{n}", "x") for n in range(101)]
    for pk, _ in keys:
        put(pk)
    calls = AwsCalls()
    dynamodb: Any = clients.client("dynamodb")

    def answer_in_parts(parsed: dict[str, Any], **_: Any) -> None:
        there = parsed["Responses"][TABLE]
        parsed["Responses"][TABLE], left = there[:60], there[60:]
        if left:
            parsed["UnprocessedKeys"] = {TABLE: {"Keys": [{"pk": each["pk"], "sk": each["sk"]} for each in left]}}

    dynamodb.meta.events.register("after-call.dynamodb.BatchGetItem", answer_in_parts)
    assert read_items(dynamodb, TABLE, keys).keys() == set(keys)
    assert calls.made == ["dynamodb.BatchGetItem"] * 2  # 100 of which 60 are answered; those 40 and the last one


@pytest.mark.parametrize(
    ("start", "older", "expected"),
    [
        (None, True, (["c", "b"], True)),
        ("3", True, (["b", "a"], False)),
        ("2", True, (["a"], False)),
        ("1", True, ([], False)),
        ("1", False, (["b", "c"], False)),
        ("0", False, (["a", "b"], True)),
    ],
)
def test_page_begins_beside_its_place_and_says_whether_there_is_more(
    cloud: None, start: str | None, older: bool, expected: tuple[list[str], bool]
) -> None:
    for place, pk in enumerate("abc", 1):
        put(pk, owner="alice", listed_at=str(place))
    put("d", owner="bob", listed_at="2")
    assert list_page(clients.client("dynamodb"), TABLE, "alice", start, older=older, size=2) == expected
