"""Items: their form, reads of many that DynamoDB answers in parts, and pages of an owner's list."""

from decimal import Decimal
from typing import Any

import pytest
from boto3.dynamodb.types import TypeDeserializer, TypeSerializer
from hypothesis import given
from hypothesis import strategies as st
from predictions.aws import clients
from predictions.aws.dynamodb import Condition, ConditionFailed, Key, Table, deserialize, serialize

from tests.support.apps import AwsCalls

TABLE = "predictions"


def put(pk: str, **attributes: Any) -> None:
    clients.client("dynamodb").put_item(TableName=TABLE, Item=serialize({"pk": pk, "sk": "x", **attributes}))


def test_item_comes_back_as_it_was_and_with_whole_numbers() -> None:
    item = {"pk": "a", "n": 3, "big": 10**15, "yes": True, "names": {"b", "c"}, "list": ["d", 1], "map": {"e": "f"}}
    assert deserialize(serialize(item)) == item
    assert type(deserialize(serialize(item))["n"]) is int


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.text() | st.integers(-(10**37), 10**37) | st.binary()
    | st.sets(st.text()) | st.frozensets(st.integers(-(10**37), 10**37)),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=10,
)  # fmt: skip


@given(VALUES)
def test_form_is_that_of_boto3(value: Any) -> None:
    typed = serialize({"it": value})
    assert typed == {"it": TypeSerializer().serialize(value)}
    assert deserialize(typed) == {"it": TypeDeserializer().deserialize(typed["it"])} == {"it": value}


@pytest.mark.parametrize("value", [1.5, {1, "a"}, object()])
def test_value_without_a_form_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        serialize({"it": value})
    with pytest.raises(TypeError):
        TypeSerializer().serialize(value)


def test_number_that_is_not_whole_is_read_as_a_whole_one() -> None:
    assert deserialize({"it": {"N": "1.5"}, "large": {"N": "1E+3"}}) == {"it": 1, "large": 1000}


def test_number_that_is_not_whole_is_read_exactly_where_a_write_shall_name_it(cloud: None) -> None:
    typed: Any = {"it": {"N": "1.5"}, "whole": {"N": "2"}, "map": {"M": {"list": {"L": [{"N": "-0.25"}]}}}}
    read = deserialize(typed, exact=True)
    assert read == {"it": Decimal("1.5"), "whole": 2, "map": {"list": [Decimal("-0.25")]}}
    assert type(read["whole"]) is int
    assert serialize(read) == typed
    table, key = Table(TABLE, clients.client("dynamodb")), Key("a", "x")
    clients.client("dynamodb").put_item(TableName=TABLE, Item={**serialize(key._asdict()), **typed})
    with pytest.raises(ConditionFailed) as failed:
        table.update_item(key, set={"n": 1}, condition=Condition("whole = :whole", whole=3), exact=True)
    assert failed.value.item == table.get_item(key, exact=True) == {**key._asdict(), **read}
    assert table.update_item(key, set={"n": 1}, exact=True) == {**key._asdict(), **read, "n": 1}


def test_keys_that_are_not_there_are_left_out(cloud: None) -> None:
    put("a")
    assert Table(TABLE, clients.client("dynamodb")).read_items([("a", "x"), ("a", "y"), ("b", "x")]).keys() == {
        ("a", "x")
    }
    assert Table(TABLE, clients.client("dynamodb")).read_items([]) == {}


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
    assert Table(TABLE, dynamodb).read_items(keys).keys() == set(keys)
    assert calls.made == ["dynamodb.BatchGetItem"] * 2  # 100 of which 60 are answered; those 40 and the last one


@pytest.mark.parametrize(
    ("start", "older", "expected"),
    [
        (None, True, ([("c", "3"), ("b", "2")], True)),
        ("3", True, ([("b", "2"), ("a", "1")], False)),
        ("2", True, ([("a", "1")], False)),
        ("1", True, ([], False)),
        ("1", False, ([("b", "2"), ("c", "3")], False)),
        ("0", False, ([("a", "1"), ("b", "2")], True)),
    ],
)
def test_page_begins_beside_its_place_and_says_whether_there_is_more(
    cloud: None, start: str | None, older: bool, expected: tuple[list[tuple[str, str]], bool]
) -> None:
    for place, pk in enumerate("abc", 1):
        put(pk, owner="alice", listed_at=str(place))
    put("d", owner="bob", listed_at="2")
    assert Table(TABLE, clients.client("dynamodb")).list_page("alice", start, older=older, size=2) == expected


def test_every_page_of_a_partition_is_read(cloud: None) -> None:
    table = Table(TABLE, clients.client("dynamodb"))
    for n in range(7):
        clients.client("dynamodb").put_item(TableName=TABLE, Item=serialize({"pk": "a", "sk": str(n)}))
    assert [item["sk"] for item in table.query(Condition("pk = :pk", pk="a"), page_items=3)] == list("0123456")
