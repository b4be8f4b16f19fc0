"""AWS for unit tests that is quick: clients that are made once, the table in memory, moto without HTTP.

A client of botocore's costs 3 ms, mocking AWS another 4 ms, and so does a call that moto answers; a test of the
protocol makes hundreds. The clients stay botocore's own, with their events, checks of parameters, serializers, retries
and errors: only the HTTP request between them and what answers is left out, for the calls that nearly every test makes.
The tests of this module, and those of the simulation's table, hold the answers to those of moto behind HTTP.
"""

import copy
import json
import os
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from typing import Any

import botocore.retries.quota
import botocore.session
import certifi
import moto
from botocore.awsrequest import AWSResponse, HTTPHeaders
from moto.backends import get_backend
from moto.core.model_instances import reset_model_data
from moto.core.models import DEFAULT_ACCOUNT_ID, botocore_stubber
from moto.sqs.models import Message, SQSBackend
from predictions.aws import clients

from tests.support.dynamodb import ConditionFailed, Item, NotModelled, Table

# Sessions that tests make share what botocore reads from its files: reading it takes half a second each time.
botocore.session.create_loader = cache(botocore.session.create_loader)

_create_context = ssl.create_default_context
_create_shared = cache(_create_context)


def _context(*purpose: Any, **options: Any) -> ssl.SSLContext:
    # Of httpx's clients, which only read it: loading all authorities takes ten milliseconds.
    shared = not purpose and options in ({"cafile": certifi.where()}, {"cafile": os.environ.get("SSL_CERT_FILE")})
    return _create_shared(**options) if shared else _create_context(*purpose, **options)


ssl.create_default_context = _context

_receive = SQSBackend.receive_message


def _receive_at_once(self: SQSBackend, queue: str, count: int, wait: int, *more: Any, **named: Any) -> list[Message]:
    return _receive(self, queue, count, 0, *more, **named)


# Long polls of an empty queue end at once: nothing that a test does meanwhile could end them.
SQSBackend.receive_message = _receive_at_once  # type: ignore[assignment]

REGION = "us-east-1"
STREAM_ARN = "arn:aws:dynamodb:us-east-1:123456789012:table/predictions/stream/2025-01-01T00:00:00.000"
_SHARD_ID = "shardId-00000001735689600000-00000001"

# What the table understands of each operation; whatever else is asked for is an error, and not passed over.
_EXPRESSIONS = {"ExpressionAttributeNames", "ExpressionAttributeValues"}
_CONDITION = {"ConditionExpression", "ReturnValuesOnConditionCheckFailure", *_EXPRESSIONS}
_UNDERSTOOD = {
    "BatchGetItem": {"RequestItems"},
    "BatchWriteItem": {"RequestItems"},
    "DeleteItem": {"TableName", "Key", "ReturnValues", *_CONDITION},
    "DeleteTable": {"TableName"},
    "DescribeTable": {"TableName"},
    "GetItem": {"TableName", "Key", "ConsistentRead", "ProjectionExpression", "ExpressionAttributeNames"},
    "PutItem": {"TableName", "Item", *_CONDITION},
    "Query": {
        "TableName", "IndexName", "KeyConditionExpression", "ScanIndexForward", "Limit", "ExclusiveStartKey", "Select",
        "ConsistentRead", "ProjectionExpression", *_EXPRESSIONS,
    },
    "Scan": {"TableName"},
    "TransactWriteItems": {"TransactItems", "ClientRequestToken"},
    "UpdateItem": {"TableName", "Key", "UpdateExpression", "ReturnValues", *_CONDITION},
}  # fmt: skip


class TableNotFound(Exception):
    """A test has deleted the table."""


class TransactionCanceled(Exception):
    """A condition of a transaction did not hold; `reasons` has one for each action."""

    def __init__(self, reasons: list[dict[str, Any]]) -> None:
        super().__init__("transaction canceled")
        self.reasons = reasons


class QuickTable(Table):
    """The simulation's table with what tests ask of it besides: scans, pages, projections, its stream and its end."""

    def __init__(self) -> None:
        super().__init__(time.time, written=self._record)
        self.records: list[dict[str, Any]] = []
        self._deleted = False

    def call(self, operation: str, asked: dict[str, Any]) -> dict[str, Any]:
        if self._deleted:
            raise TableNotFound
        if beyond := asked.keys() - _UNDERSTOOD.get(operation, set()):
            raise NotModelled(f"{sorted(beyond)} of {operation}")
        if operation == "BatchGetItem":
            ((_, wanted),) = asked["RequestItems"].items()
            if beyond := wanted.keys() - {"Keys", "ConsistentRead"}:
                raise NotModelled(f"{sorted(beyond)} of {operation}")
        own = {
            "BatchWriteItem": self._batch_write,
            "DeleteTable": self._delete_table,
            "DescribeTable": self._describe,
            "GetItem": self._projected,
            "Query": self._page,
            "Scan": self._scan,
            "TransactWriteItems": self._transact,
        }
        if operation == "DeleteItem" and asked.get("ReturnValues") == "ALL_OLD":
            before = self.items.get((asked["Key"]["pk"]["S"], asked["Key"]["sk"]["S"]))
            super().call(operation, asked)
            return {"Attributes": before} if before is not None else {}
        return own[operation](asked) if operation in own else super().call(operation, asked)

    def _describe(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"Table": {"TableName": asked["TableName"], "TableStatus": "ACTIVE", "LatestStreamArn": STREAM_ARN}}

    def _batch_write(self, asked: dict[str, Any]) -> dict[str, Any]:
        ((_, wanted),) = asked["RequestItems"].items()
        if len(wanted) > 25:
            raise NotModelled(f"{len(wanted)} writes at once")
        for each in wanted:
            ((kind, request),) = each.items()
            super().call({"PutRequest": "PutItem", "DeleteRequest": "DeleteItem"}[kind], request)
        return {"UnprocessedItems": {}}

    def _transact(self, asked: dict[str, Any]) -> dict[str, Any]:
        actions = asked["TransactItems"]
        if len(actions) > 100 or any(action.keys() != {"Update"} for action in actions):
            raise NotModelled("a transaction of other actions than at most 100 updates")
        reasons: list[dict[str, Any]] = []
        for action in actions:
            update = action["Update"]
            try:
                self._check((update["Key"]["pk"]["S"], update["Key"]["sk"]["S"]), update)
                reasons.append({"Code": "None"})
            except ConditionFailed as error:
                reasons.append({"Code": "ConditionalCheckFailed", **({"Item": error.item} if error.item else {})})
        if any(reason["Code"] != "None" for reason in reasons):
            raise TransactionCanceled(reasons)
        for action in actions:
            super().call("UpdateItem", action["Update"])
        return {}

    def _delete_table(self, asked: dict[str, Any]) -> dict[str, Any]:
        self._deleted = True
        return {"TableDescription": {"TableName": asked["TableName"], "TableStatus": "DELETING"}}

    def _scan(self, asked: dict[str, Any]) -> dict[str, Any]:
        items = [dict(item) for item in self.items.values()]
        return {"Items": items, "Count": len(items), "ScannedCount": len(items)}

    def _projected(self, asked: dict[str, Any]) -> dict[str, Any]:
        answer = super().call("GetItem", asked)
        if "Item" in answer and (projection := asked.get("ProjectionExpression")):
            names = asked.get("ExpressionAttributeNames", {})
            wanted = [names.get(name.strip(), name.strip()) for name in projection.split(",")]
            if any("." in name for name in wanted):
                raise NotModelled(f"{projection!r}")
            answer["Item"] = {name: answer["Item"][name] for name in wanted if name in answer["Item"]}
        return answer

    def _page(self, asked: dict[str, Any]) -> dict[str, Any]:
        limit, start = asked.get("Limit"), asked.get("ExclusiveStartKey")
        if limit is None and start is None:
            return super().call("Query", asked)
        whole = super().call("Query", {**asked, "Limit": None, "ProjectionExpression": None, "Select": None})
        found = whole["Items"]
        if start is not None:
            at = next((n for n, item in enumerate(found) if _key(item) == _key(start)), None)
            if at is None and "next_check_at" not in start:
                raise NotModelled(f"a page after {start}, which is not there")
            # An item of the index `due` may have moved since: what follows is later than it was.
            found = (
                found[at + 1 :]
                if at is not None
                else [item for item in found if int(item["next_check_at"]["N"]) > int(start["next_check_at"]["N"])]
            )
        page = found if limit is None else found[:limit]
        answer: dict[str, Any] = {"Count": len(page)}
        # DynamoDB does not look beyond a full page: the key is there even where nothing follows.
        if limit is not None and len(found) >= limit:
            of_index = {None: (), "due": ("open", "next_check_at"), "by_upstream_id": ("upstream_id",)}
            names = ("pk", "sk", *of_index.get(asked.get("IndexName"), ("owner", "listed_at")))
            answer["LastEvaluatedKey"] = {name: page[-1][name] for name in names}
        if asked.get("Select") == "COUNT":
            return answer
        if projection := asked.get("ProjectionExpression"):
            names = asked.get("ExpressionAttributeNames", {})
            wanted = [names.get(name.strip(), name.strip()) for name in projection.split(",")]
            page = [{name: item[name] for name in wanted if name in item} for item in page]
        return {**answer, "Items": page}

    def _record(self, before: Item | None, after: Item | None) -> None:
        if before == after:
            return
        item: Item = after or before or {}
        number = f"{len(self.records) + 1:021d}"
        change: dict[str, Any] = {
            "ApproximateCreationDateTime": time.time(),
            "Keys": {"pk": item["pk"], "sk": item["sk"]},
            "SequenceNumber": number,
            "SizeBytes": 1,
            "StreamViewType": "NEW_AND_OLD_IMAGES",
        }
        if after is not None:
            change["NewImage"] = after
        if before is not None:
            change["OldImage"] = before
        self.records.append(
            {
                "eventID": number,
                "eventName": "INSERT" if before is None else "REMOVE" if after is None else "MODIFY",
                "eventVersion": "1.1",
                "eventSource": "aws:dynamodb",
                "awsRegion": "us-east-1",
                "dynamodb": change,
            }
        )


def _key(item: Item) -> tuple[str, str]:
    return item["pk"]["S"], item["sk"]["S"]


def account(service: str, region: str = REGION) -> Any:
    """Moto's backend of a service, such as `account("sqs")`; S3's region is `aws`."""
    find: Any = get_backend
    return find(service)[DEFAULT_ACCOUNT_ID][region]


@contextmanager
def mocked() -> Iterator[None]:
    """Let moto answer botocore's clients from an empty account.

    As `moto.mock_aws`, but for the library `requests`, which nothing here uses: its 1,288 patterns cost 4 ms each time.
    """
    moto.mock_aws().reset()
    botocore_stubber.enabled = True
    try:
        yield
    finally:
        botocore_stubber.enabled = False
        reset_model_data()


class QuickClients:
    """Stands for `predictions.aws.clients._client`: clients that are made once for all tests.

    Attributes:
        table: The table that answers DynamoDB, or None while moto does.
    """

    def __init__(self) -> None:
        self.table: QuickTable | None = None
        self._made: dict[str, Any] = {}
        self._events: dict[str, Any] = {}
        self._quotas: list[botocore.retries.quota.RetryQuota] = []
        self._others: dict[str, Any] | None = None

    def __call__(self, name: str) -> Any:
        if self._others is not None:
            if name not in self._others:
                self._others[name] = self._make(name)
            return self._others[name]
        if name not in self._made:
            # Whatever a test does to the environment, the clients are the same for all.
            of_all = {"region_name": REGION, "aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
            self._made[name] = client = self._make(name, **of_all)
            self._events[name] = copy.copy(client.meta.events)
        return self._made[name]

    def cache_clear(self) -> None:
        """Make the test's next clients for it alone: they shall see what it changed in the environment."""
        self._others = {}

    @contextmanager
    def lent(self, table: QuickTable | None) -> Iterator[None]:
        """The clients for one test; handlers that it registers are gone after it, and retries are as at first."""
        self.table, self._others = table, None
        of_library = clients._client
        clients._client, clients._api_url = self, None  # type: ignore[assignment]
        events = clients._session().get_component("event_emitter")
        events.register_first("before-call.dynamodb-streams", self._read_stream, unique_id="quick-streams")
        try:
            yield
        finally:
            events.unregister("before-call.dynamodb-streams", unique_id="quick-streams")
            clients._client, clients._api_url = of_library, None
            of_library.cache_clear()
            self.table, self._others = None, None
            for name, at_first in self._events.items():
                emitter = self._made[name].meta.events._emitter
                # Whatever is registered or unregistered begins a new cache.
                if emitter._lookup_cache is not at_first._emitter._lookup_cache:
                    emitter.__dict__.update(copy.copy(at_first._emitter).__dict__)
            for quota in self._quotas:
                quota.release(quota.INITIAL_CAPACITY)

    def _make(self, name: str, **options: str) -> Any:
        quotas = self._quotas

        class Remembered(botocore.retries.quota.RetryQuota):
            def __init__(self) -> None:
                super().__init__()
                quotas.append(self)

        whole = botocore.retries.quota.RetryQuota
        botocore.retries.quota.RetryQuota = Remembered  # type: ignore[assignment,misc]
        try:
            create_client: Any = clients._session().create_client
            client = create_client(name, config=clients._S3_CONFIG if name == "s3" else clients._CONFIG, **options)
        finally:
            botocore.retries.quota.RetryQuota = whole  # type: ignore[misc]
        client._endpoint.make_request = self._answering(name, client._endpoint)
        client._user_agent_creator.to_string = lambda: "unit-tests"
        return client

    def _answering(self, service: str, endpoint: Any) -> Callable[[Any, dict[str, Any]], Any]:
        by_http = endpoint.make_request

        def make_request(operation_model: Any, request_dict: dict[str, Any]) -> Any:
            attempts = 0
            while True:
                attempts += 1
                request_dict["context"].setdefault("retries", {})["attempt"] = attempts
                answer = self._answer(service, operation_model.name, request_dict)
                if answer is None:
                    return by_http(operation_model, request_dict)
                answer[1]["ResponseMetadata"]["RetryAttempts"] = attempts - 1
                if not endpoint._needs_retry(attempts, operation_model, request_dict, answer, None):
                    return answer

        return make_request

    def _answer(
        self, service: str, operation: str, request_dict: dict[str, Any]
    ) -> tuple[AWSResponse, dict[str, Any]] | None:
        """The answer of the table, or of moto's backend; None where moto has to see the whole request."""
        if service == "dynamodb":
            return (
                _of_table(self.table, operation, json.loads(request_dict["body"])) if self.table is not None else None
            )
        if (service, operation) not in _DIRECT or not botocore_stubber.enabled:
            return None
        names, ask = _DIRECT[service, operation]
        asked = json.loads(request_dict["body"])
        if asked.keys() != names:
            return None
        try:
            found = ask(account(service), asked)
        except Exception:  # noqa: BLE001  # moto answers the same again, as an error
            return None
        return _answered(200, found)

    def _read_stream(self, model: Any, params: dict[str, Any], **_: Any) -> tuple[AWSResponse, dict[str, Any]] | None:
        if self.table is None:
            return None
        if model.name == "DescribeStream":
            return _answered(200, {"StreamDescription": {"StreamArn": STREAM_ARN, "Shards": [{"ShardId": _SHARD_ID}]}})
        if model.name == "GetShardIterator":
            return _answered(200, {"ShardIterator": "0"})
        assert model.name == "GetRecords"
        asked = json.loads(params["body"])
        first = int(asked["ShardIterator"])
        page = copy.deepcopy(self.table.records[first : first + asked.get("Limit", 1000)])
        for record in page:
            of_item = record["dynamodb"]
            of_item["ApproximateCreationDateTime"] = datetime.fromtimestamp(of_item["ApproximateCreationDateTime"], UTC)
        return _answered(200, {"Records": page, "NextShardIterator": str(first + len(page))})


def _of_table(table: QuickTable, operation: str, asked: dict[str, Any]) -> tuple[AWSResponse, dict[str, Any]]:
    try:
        return _answered(200, json.loads(json.dumps(table.call(operation, asked))))
    except TableNotFound:
        message = "Requested resource not found"
        return _answered(400, {"Error": {"Code": "ResourceNotFoundException", "Message": message}, "message": message})
    except TransactionCanceled as error:
        message = "Transaction cancelled"
        canceled = {"Error": {"Code": "TransactionCanceledException", "Message": message}, "Message": message}
        return _answered(400, {**canceled, "CancellationReasons": json.loads(json.dumps(error.reasons))})
    except ConditionFailed as error:
        message = "The conditional request failed"
        found: dict[str, Any] = {
            "Error": {"Code": "ConditionalCheckFailedException", "Message": message},
            "message": message,
        }
        return _answered(400, {**found, **({"Item": json.loads(json.dumps(error.item))} if error.item else {})})


def _answered(status: int, parsed: dict[str, Any]) -> tuple[AWSResponse, dict[str, Any]]:
    parsed["ResponseMetadata"] = {"HTTPStatusCode": status, "HTTPHeaders": {}}
    return _Response(status), parsed


def _started(backend: Any, asked: dict[str, Any]) -> dict[str, Any]:
    found = backend.start_execution(asked["stateMachineArn"], asked["name"], asked["input"])
    return {"executionArn": found.execution_arn, "startDate": found.start_date}


def _described(backend: Any, asked: dict[str, Any]) -> dict[str, Any]:
    found = backend.describe_execution(asked["executionArn"])
    names = {"name": found.name, "input": found.execution_input, "stateMachineArn": found.state_machine_arn}
    if found.status != "RUNNING":
        raise NotModelled("how one ended: moto tells")
    return {"executionArn": found.execution_arn, "status": found.status, "startDate": found.start_date, **names}


def _parameter(backend: Any, asked: dict[str, Any]) -> dict[str, Any]:
    found = backend.get_parameter(asked["Name"])
    names = {"Name": found.name, "Type": found.parameter_type, "Version": found.version}
    return {"Parameter": {**names, "Value": found.value}}


def _secret(backend: Any, asked: dict[str, Any]) -> dict[str, Any]:
    found = backend.get_secret_value(asked["SecretId"], None, None)
    return {name: found[name] for name in ("ARN", "Name", "VersionId", "SecretString", "VersionStages")}


# The calls of nearly every test, as moto's backends take them: the parameters, exactly, and the call.
_DIRECT: dict[tuple[str, str], tuple[set[str], Callable[[Any, dict[str, Any]], dict[str, Any]]]] = {
    ("stepfunctions", "StartExecution"): ({"stateMachineArn", "name", "input"}, _started),
    ("stepfunctions", "DescribeExecution"): ({"executionArn"}, _described),
    ("ssm", "GetParameter"): ({"Name"}, _parameter),
    ("secretsmanager", "GetSecretValue"): ({"SecretId"}, _secret),
}


class _Response(AWSResponse):
    """A response whose body has been read."""

    def __init__(self, status: int) -> None:
        super().__init__("https://aws.example/", status, HTTPHeaders(), None)
        self._content = b""


QUICK = QuickClients()
