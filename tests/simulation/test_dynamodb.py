"""The table in memory against moto, behind botocore's own checks: the calls that schedules made, answered alike."""

from typing import Any

import moto
import pytest
from botocore.exceptions import ClientError
from botocore.session import Session

from tests.simulation.installed import installed
from tests.support.aws_clients import AwsError
from tests.support.dynamodb import ConditionFailed, NotModelled, Table
from tests.support.template import table_properties

Call = tuple[str, dict[str, Any], Any]


def recorded(seed: int) -> list[Call]:
    """The calls to DynamoDB of one schedule, with the answers of the table in memory."""
    calls: list[Call] = []

    def record(service: str, operation: str, asked: dict[str, Any], answer: Any) -> None:
        if service == "dynamodb":
            calls.append((operation, asked, answer))

    with installed() as simulation:
        simulation.run(seed, recorder=record)
    return calls


def lags(seed: int) -> bool:
    """Whether indexes lag in a schedule, as moto's do not."""
    from tests.simulation.world import World

    return World(seed).faults.index_lag > 0


def items_before(seed: int) -> list[Any]:
    """The items that the table has before a schedule begins."""
    from tests.simulation.world import World

    return list(World(seed).table.items.values())


def comparable(answer: Any) -> Any:
    if isinstance(answer, dict):
        return {name: comparable(each) for name, each in answer.items() if name not in _PASSED_OVER}
    if isinstance(answer, list):
        return [comparable(each) for each in answer]
    return answer


_PASSED_OVER = {"ResponseMetadata", "ScannedCount", "ConsumedCapacity"}


def in_order(answer: Any) -> Any:
    """Sets have no order, nor have the items of a batch."""
    if isinstance(answer, dict):
        if kind := answer.keys() & {"SS", "NS"}:
            return {each: sorted(answer[each]) for each in kind}
        found = {name: in_order(each) for name, each in answer.items()}
        if "Responses" in found:
            found["Responses"] = {n: sorted(items, key=str) for n, items in found["Responses"].items()}
        return found
    return [in_order(each) for each in answer] if isinstance(answer, list) else answer


@pytest.fixture
def dynamodb(monkeypatch: pytest.MonkeyPatch) -> Any:
    with moto.mock_aws():
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        client: Any = Session().create_client("dynamodb", region_name="us-east-1")
        client.create_table(TableName="predictions", **table_properties())
        yield client


def test_calls_of_schedules_are_answered_as_moto_answers_them(dynamodb: Any) -> None:
    compared: dict[str, int] = {}
    for seed in [seed for seed in range(30) if not lags(seed)]:
        for item in items_before(seed):
            dynamodb.put_item(TableName="predictions", Item=item)
        for operation, asked, told in recorded(seed):
            call = getattr(dynamodb, _METHODS[operation])
            if isinstance(told, AwsError):
                with pytest.raises(ClientError) as refused:
                    call(**asked)
                answer: Any = refused.value.response
                told = {"Error": {"Code": told.code}, "Item": told.item}
                answer = {"Error": {"Code": answer["Error"]["Code"]}, "Item": answer.get("Item")}
            else:
                answer = call(**asked)
            assert in_order(comparable(answer)) == in_order(comparable(told)), (operation, asked)
            compared[operation] = compared.get(operation, 0) + 1
        for page in dynamodb.get_paginator("scan").paginate(TableName="predictions"):
            for item in page["Items"]:
                dynamodb.delete_item(TableName="predictions", Key={"pk": item["pk"], "sk": item["sk"]})
    assert compared.keys() == _METHODS.keys()


_METHODS = {
    "GetItem": "get_item",
    "PutItem": "put_item",
    "UpdateItem": "update_item",
    "DeleteItem": "delete_item",
    "Query": "query",
    "BatchGetItem": "batch_get_item",
}


@pytest.mark.parametrize(
    "condition", ["a = :x BETWEEN", "a IN (:x)", "attribute_type(a, :x)", "a[0] = :x", "a = :x trailing", ""]
)
def test_expression_that_is_not_modelled_is_an_error(condition: str) -> None:
    table = Table(lambda: 0.0)
    with pytest.raises(NotModelled):
        table.call(
            "PutItem",
            {"Item": {"pk": {"S": "a"}, "sk": {"S": "b"}}, "ConditionExpression": condition,
             "ExpressionAttributeValues": {":x": {"S": "x"}}},
        )  # fmt: skip


def test_index_lags_behind_the_table() -> None:
    moment = [1000.0]
    table = Table(lambda: moment[0], index_lag=2.0)
    item = {"pk": {"S": "a"}, "sk": {"S": "b"}, "open": {"S": "open"}, "next_check_at": {"N": "5"}}
    query = {
        "IndexName": "due",
        "KeyConditionExpression": "#open = :open AND next_check_at <= :now",
        "ExpressionAttributeNames": {"#open": "open"},
        "ExpressionAttributeValues": {":open": {"S": "open"}, ":now": {"N": "9"}},
    }
    table.call("PutItem", {"Item": item})
    assert table.call("Query", query)["Items"] == []
    moment[0] += 2.5
    assert table.call("Query", query)["Count"] == 1


def test_condition_that_does_not_hold_writes_nothing() -> None:
    table = Table(lambda: 0.0)
    key = {"pk": {"S": "a"}, "sk": {"S": "b"}}
    with pytest.raises(ConditionFailed):
        table.call(
            "UpdateItem",
            {"Key": key, "UpdateExpression": "SET c = :c", "ConditionExpression": "attribute_exists(pk)",
             "ExpressionAttributeValues": {":c": {"N": "1"}}},
        )  # fmt: skip
    assert table.items == {}
