"""AWS as unit tests have it, against moto behind HTTP: the same calls, answered alike."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import moto
import pytest
from botocore.exceptions import ClientError
from botocore.session import Session
from predictions.aws import clients

from tests.support.dynamodb import NotModelled
from tests.support.fakes import API_URL, Clock, Executed, answers_lost, refusing
from tests.support.fixtures import SECRETS
from tests.support.quick_aws import QUICK, QuickTable, account, mocked
from tests.support.template import table_properties

TABLE = {"TableName": "predictions"}


def item(n: int, owner: str = "alice", **more: Any) -> dict[str, Any]:
    values = {"pk": f"a#{n}", "sk": "status", "owner": owner, "listed_at": f"2025-06-15T0{n}", **more}
    return {name: {"N": str(value)} if isinstance(value, int) else {"S": value} for name, value in values.items()}


def by_owner(**more: Any) -> dict[str, Any]:
    return {
        **TABLE,
        "IndexName": "by_owner",
        "KeyConditionExpression": "#owner = :owner",
        "ExpressionAttributeNames": {"#owner": "owner"},
        "ExpressionAttributeValues": {":owner": {"S": "alice"}},
        **more,
    }


def of_key(**more: Any) -> dict[str, Any]:
    values = {":pk": {"S": "many"}}
    return {**TABLE, "KeyConditionExpression": "pk = :pk", "ExpressionAttributeValues": values, **more}


def many(n: int) -> dict[str, Any]:
    return {"pk": {"S": "many"}, "sk": {"S": str(n)}, "n": {"N": str(n)}}


CALLS: list[tuple[str, dict[str, Any]]] = [
    *[("put_item", {**TABLE, "Item": item(n)}) for n in range(5)],
    *[("put_item", {**TABLE, "Item": many(n)}) for n in range(5)],
    ("put_item", {**TABLE, "Item": item(9, owner="bob", rank=3)}),
    ("put_item", {**TABLE, "Item": item(1), "ConditionExpression": "attribute_not_exists(pk)"}),
    ("scan", TABLE),
    ("query", by_owner(Limit=2)),
    ("query", by_owner(Limit=2, ScanIndexForward=False)),
    ("query", by_owner(Limit=2, ExclusiveStartKey=item(1))),
    ("query", by_owner(ExclusiveStartKey=item(1))),
    ("query", by_owner(Limit=9)),
    ("query", of_key(Limit=1, ExclusiveStartKey={name: many(2)[name] for name in ("pk", "sk")})),
    ("query", of_key(Limit=2, Select="COUNT")),
    ("query", of_key(Limit=2, ProjectionExpression="sk, #n", ExpressionAttributeNames={"#n": "n"})),
    ("get_item", {**TABLE, "Key": {"pk": {"S": "many"}, "sk": {"S": "1"}}, "ProjectionExpression": "n, absent"}),
    ("get_item", {**TABLE, "Key": {"pk": {"S": "many"}, "sk": {"S": "no"}}, "ProjectionExpression": "n"}),
    ("delete_item", {**TABLE, "Key": {"pk": {"S": "many"}, "sk": {"S": "1"}}, "ReturnValues": "ALL_OLD"}),
    ("delete_item", {**TABLE, "Key": {"pk": {"S": "many"}, "sk": {"S": "1"}}, "ReturnValues": "ALL_OLD"}),
    (
        "update_item",
        {
            **TABLE,
            "Key": {"pk": {"S": "many"}, "sk": {"S": "2"}},
            "UpdateExpression": "SET n = :n",
            "ConditionExpression": "n > :n",
            "ExpressionAttributeValues": {":n": {"N": "7"}},
            "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
        },
    ),
    (
        "update_item",
        {
            **TABLE,
            "Key": {"pk": {"S": "many"}, "sk": {"S": "2"}},
            "UpdateExpression": "SET n = :n",
            "ExpressionAttributeValues": {":n": {"N": "7"}},
            "ReturnValues": "ALL_NEW",
        },
    ),
    (
        "batch_write_item",
        {
            "RequestItems": {
                "predictions": [
                    *[{"PutRequest": {"Item": many(n)}} for n in (1, 7, 8)],
                    *[{"DeleteRequest": {"Key": {"pk": {"S": "many"}, "sk": {"S": sk}}}} for sk in ("3", "absent")],
                ]
            }
        },
    ),
    ("scan", TABLE),
]


def outcome(call: Callable[..., Any], asked: dict[str, Any]) -> Any:
    try:
        answer = call(**asked)
    except ClientError as error:
        answer = {**error.response, "Error": {"Code": error.response["Error"]["Code"]}, "type": type(error).__name__}
    dropped = ("ResponseMetadata", "ScannedCount", "ConsumedCapacity", "ItemCollectionMetrics", "message", "Message")
    found = {name: value for name, value in answer.items() if name not in dropped}
    return {**found, "Items": sorted(found["Items"], key=str)} if "Items" in found else found


@pytest.fixture
def by_http(environment: None) -> Iterator[Callable[[str], Any]]:
    """Clients that nothing here has touched."""
    with moto.mock_aws():
        yield Session().create_client


def test_table_answers_as_moto_does(by_http: Callable[[str], Any]) -> None:
    theirs = by_http("dynamodb")
    theirs.create_table(TableName="predictions", **table_properties())
    with QUICK.lent(QuickTable()):
        ours = clients.client("dynamodb")
        for name, asked in CALLS:
            assert outcome(getattr(ours, name), asked) == outcome(getattr(theirs, name), asked), (name, asked)


def test_table_that_a_test_deletes_is_not_found(by_http: Callable[[str], Any]) -> None:
    theirs = by_http("dynamodb")
    theirs.create_table(TableName="predictions", **table_properties())
    with QUICK.lent(QuickTable()):
        for dynamodb in (clients.client("dynamodb"), theirs):
            dynamodb.delete_table(**TABLE)
            for operation, asked in (("put_item", {"Item": many(1)}), ("query", of_key())):
                with pytest.raises(dynamodb.exceptions.ResourceNotFoundException):
                    getattr(dynamodb, operation)(**{**TABLE, **asked})


def test_pages_hold_every_item_once(cloud: None) -> None:
    dynamodb: Any = clients.client("dynamodb")
    for n in range(7):
        dynamodb.put_item(**TABLE, Item=many(n))
    pages = [
        [each["sk"]["S"] for each in page["Items"]]
        for page in dynamodb.get_paginator("query").paginate(**of_key(), PaginationConfig={"PageSize": 3})
    ]
    assert pages == [["0", "1", "2"], ["3", "4", "5"], ["6"]]


def test_page_that_ends_with_the_last_item_has_a_key_as_dynamodbs_do_and_motos_do_not(cloud: None) -> None:
    dynamodb: Any = clients.client("dynamodb")
    for n in range(2):
        dynamodb.put_item(**TABLE, Item=many(n))
    last = {name: many(1)[name] for name in ("pk", "sk")}
    assert dynamodb.query(**of_key(Limit=2))["LastEvaluatedKey"] == last
    assert dynamodb.query(**of_key(Limit=2, ExclusiveStartKey=last))["Items"] == []


def streamed(table_arn: str, streams: Any) -> list[dict[str, Any]]:
    (shard,) = streams.describe_stream(StreamArn=table_arn)["StreamDescription"]["Shards"]
    iterator = streams.get_shard_iterator(
        StreamArn=table_arn, ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
    )["ShardIterator"]
    records = streams.get_records(ShardIterator=iterator)["Records"]
    for record in records:
        assert record["dynamodb"]["ApproximateCreationDateTime"].timestamp() > 0
    names = ("Keys", "NewImage", "OldImage", "StreamViewType")
    return [
        {"eventName": record["eventName"], **{name: record["dynamodb"].get(name) for name in names}}
        for record in records
    ]


def test_stream_tells_what_motos_does(by_http: Callable[[str], Any]) -> None:
    theirs = by_http("dynamodb")
    theirs.create_table(TableName="predictions", **table_properties())
    with QUICK.lent(QuickTable()):
        found = []
        for dynamodb, streams in (
            (clients.client("dynamodb"), clients._session().create_client("dynamodbstreams")),
            (theirs, by_http("dynamodbstreams")),
        ):
            client: Any = dynamodb
            for name, asked in CALLS:
                outcome(getattr(client, name), asked)
            arn = client.describe_table(**TABLE)["Table"]["LatestStreamArn"]
            found.append(streamed(arn, streams))
    # Moto tells of the put that changes nothing; DynamoDB does not.
    assert found[0] == [record for record in found[1] if record["NewImage"] != record["OldImage"]]


@pytest.mark.parametrize(
    ("operation", "asked"),
    [
        ("scan", {**TABLE, "Limit": 1}),
        ("scan", {**TABLE, "FilterExpression": "attribute_exists(a)"}),
        ("query", of_key(FilterExpression="attribute_exists(a)")),
        ("put_item", {**TABLE, "Item": many(1), "ReturnValues": "ALL_OLD"}),
        (
            "transact_write_items",
            {"TransactItems": [{"Delete": {**TABLE, "Key": {"pk": {"S": "a"}}}}]},
        ),
        ("put_item", {**TABLE, "Item": many(1), "Expected": {"n": {"Exists": False}}}),
    ],
)
def test_call_that_is_not_modelled_is_an_error(cloud: None, operation: str, asked: dict[str, Any]) -> None:
    with pytest.raises(NotModelled):
        getattr(clients.client("dynamodb"), operation)(**asked)


DIRECT: list[tuple[str, str, dict[str, Any]]] = [
    ("stepfunctions", "start_execution", {"name": "x-1", "input": "{}"}),
    ("stepfunctions", "start_execution", {"name": "x-1", "input": "{}"}),
    ("stepfunctions", "start_execution", {"name": "x-1", "input": '{"a": 1}'}),
    ("stepfunctions", "describe_execution", {"executionArn": "x-1"}),
    ("stepfunctions", "describe_execution", {"executionArn": "x-2"}),
    ("stepfunctions", "stop_execution", {"executionArn": "x-1"}),
    ("stepfunctions", "describe_execution", {"executionArn": "x-1"}),
    ("stepfunctions", "start_execution", {"name": "x-1", "input": "{}"}),
    ("ssm", "get_parameter", {"Name": "/replicate-serverless/api_url"}),
    ("ssm", "get_parameter", {"Name": "/absent"}),
    ("secretsmanager", "get_secret_value", {"SecretId": "replicate-token"}),
    ("secretsmanager", "get_secret_value", {"SecretId": "absent"}),
]


def test_calls_of_nearly_every_test_are_answered_as_moto_answers_them_by_http(environment: None) -> None:
    outcomes = []
    for create_client in (clients.client, Session().create_client):
        with mocked(), QUICK.lent(QuickTable()):
            account("ssm").put_parameter(
                "/replicate-serverless/api_url", "", API_URL, "String", "", "", False, [], "text", None, []
            )
            for name, text in SECRETS.items():
                account("secretsmanager").create_secret(name, text, None, "", [], None, None, [], False)
            machine = Executed().machine_arn
            found = []
            for service, operation, given in DIRECT:
                client: Any = create_client(service)  # type: ignore[call-overload]
                asked = dict(given)
                if "executionArn" in asked:
                    name = asked["executionArn"]
                    asked["executionArn"] = f"{machine.replace(':stateMachine:', ':execution:')}:{name}"
                elif service == "stepfunctions":
                    asked["stateMachineArn"] = machine
                found.append(outcome(getattr(client, operation), asked))
            outcomes.append(found)
    ours, theirs = (json.loads(json.dumps(found, default=lambda moment: "a moment")) for found in outcomes)
    assert len(ours) == len(DIRECT)
    for mine, other in zip(ours, theirs, strict=True):
        for one, two in ((mine, other), *[(mine[n], other[n]) for n in mine if isinstance(mine[n], dict)]):
            shared = one.keys() & two.keys() - {"ARN", "VersionId"}
            assert shared
            assert {n: one[n] for n in shared if not isinstance(one[n], dict)} == {
                n: two[n] for n in shared if not isinstance(two[n], dict)
            }
            assert one.keys() <= two.keys()


def test_handlers_that_a_test_registers_are_gone_in_the_next(environment: None) -> None:
    asked: list[str] = []
    for _ in range(2):
        with mocked(), QUICK.lent(QuickTable()):
            events: Any = clients.client("dynamodb").meta.events
            events.register("before-call.dynamodb", lambda model, **_: asked.append(model.name))
            clients.client("dynamodb").scan(TableName="predictions")
    assert asked == ["Scan", "Scan"]


def test_retries_of_one_test_take_none_from_the_next(environment: None) -> None:
    for _ in range(30):
        with mocked(), QUICK.lent(QuickTable()):
            client = clients.client("dynamodb")
            for _ in range(10):
                with answers_lost() as lost:
                    client.scan(TableName="predictions")
                assert lost == ["Scan"]


def test_refusals_and_conditions_raise_what_botocore_raises(cloud: None, clock: Clock) -> None:
    client = clients.client("dynamodb")
    client.put_item(TableName="predictions", Item=many(1))
    with pytest.raises(client.exceptions.ConditionalCheckFailedException):
        client.put_item(TableName="predictions", Item=many(1), ConditionExpression="attribute_not_exists(pk)")
    with refusing("PutItem", "ThrottlingException", service="dynamodb"), pytest.raises(ClientError) as refused:
        client.put_item(TableName="predictions", Item=many(2))
    assert refused.value.response["Error"]["Code"] == "ThrottlingException"
    assert len(client.scan(TableName="predictions")["Items"]) == 1


def test_moto_answers_where_a_test_asks_for_it(environment: None) -> None:
    with mocked(), QUICK.lent(None):
        client = clients.client("dynamodb")
        client.create_table(TableName="predictions", **table_properties())
        client.put_item(TableName="predictions", Item=many(1))
        found = account("dynamodb").get_table("predictions")
        assert len(list(found.all_items())) == 1
