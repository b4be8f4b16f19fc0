"""The whole stack in process, for attacks in great numbers: real handlers, and an account that answers in microseconds.

The handlers are loaded as Lambda loads them; Replicate is the one of the unit tests; of AWS there is what they ask for:
the simulation's table, which evaluates the real expressions, and refuses what DynamoDB refuses of an item.
"""

import base64
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl, urlencode

import botocore.session
import httpx
import pytest
from predictions.api.access_tokens import AccessTokens
from predictions.aws import clients as aws
from predictions.files import outputs_bucket
from predictions.intake import queue as requests
from predictions.net.signatures import sign

from tests.simulation.account import Account
from tests.support.apps import Context, load_app
from tests.support.aws_clients import AwsError
from tests.support.downloads import downloads_of
from tests.support.dynamodb import Item, Table
from tests.support.fakes import API_URL, Clock, ReplicateInMemory
from tests.support.fixtures import ENVIRONMENT
from tests.support.strict_parameters import check_call
from tests.support.template import folder_name, resources

SERVICES = ("dynamodb", "events", "lambda", "s3", "scheduler", "secretsmanager", "sqs", "ssm", "stepfunctions")

ROUTES = {
    (event["Properties"]["Method"].upper(), event["Properties"]["Path"]): {
        "folder": folder_name(name), "public": event["Properties"].get("Auth") == {"Authorizer": "NONE"},
    }
    for name, function in resources("AWS::Serverless::Function").items()
    for event in function["Properties"].get("Events", {}).values()
    if event["Type"] == "Api"
}  # fmt: skip
"""Every route of the API, with its function and whether it takes no token."""

ITEM_LIMIT_BYTES = 400 * 1024
DEPTH_LIMIT = 32
"""https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Constraints.html"""
EXECUTION_INPUT_LIMIT_BYTES = 256 * 1024
EVENT_LIMIT_BYTES = 256 * 1024
MESSAGE_LIMIT_BYTES = 1024 * 1024
"""https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html"""


_STATUSES = {"404": 404, "NoSuchKey": 404, "PreconditionFailed": 412}


class Refused(AssertionError):
    """AWS would refuse this: the product must not ask for it."""


class QuickTable(Table):
    """The simulation's table, which looks only at items that a query's key can mean, and has DynamoDB's limits."""

    def __init__(self) -> None:
        super().__init__(time.time)
        self._of: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self.largest = 0

    def _candidates(self, index: str | None, values: dict[str, Any]) -> list[tuple[str, str]]:
        named = [value["S"] for value in values.values() if "S" in value]
        return [key for name in named for key in self._of.get(name, ()) if key in self.items]

    def _write(self, key: tuple[str, str], after: Item | None) -> None:
        if after is not None:
            size = _size(after)
            self.largest = max(self.largest, size)
            if size > ITEM_LIMIT_BYTES:
                raise Refused(f"an item of {size} bytes: {key}")
            if (depth := _depth({"M": after})) > DEPTH_LIMIT:
                raise Refused(f"an item {depth} levels deep: {key}")
            for name in ("owner", "open", "upstream_id"):
                if name in after:
                    self._of[after[name]["S"]].add(key)
            self._of[key[0]].add(key)
        super()._write(key, after)


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode())  # which half a surrogate pair has none of: DynamoDB refuses it, and so does this
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(_size(name) + _size(each) for name, each in value.items())
    return sum(map(_size, value)) if isinstance(value, list | tuple | set) else 1


def _depth(value: Any) -> int:
    if "M" in value:
        return 1 + max((_depth(each) for each in value["M"].values()), default=0)
    return 1 + max(map(_depth, value["L"]), default=0) if "L" in value else 0


class QuickAccount(Account):
    """What else of the account the API's functions ask for."""

    def __init__(self, stack: "Stack") -> None:
        super().__init__(stack)  # type: ignore[arg-type]  # has what an account needs of a world
        self._stack = stack
        self.executions: dict[str, str] = {}
        self.messages: list[dict[str, Any]] = []
        self.polls: list[str] = []

    def _lambda_Invoke(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        if asked["InvocationType"] != "Event":
            raise Refused("a function of the API waits for another one")
        self.polls.append(json.loads(asked["Payload"])["id"])
        return {"StatusCode": 202}

    def _stepfunctions_StartExecution(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        if len(asked["input"].encode()) > EXECUTION_INPUT_LIMIT_BYTES:
            raise Refused("an execution's input is too large")
        if asked["name"] in self.executions:
            raise AwsError("ExecutionAlreadyExists")
        self.executions[asked["name"]] = asked["input"]
        return {"executionArn": asked["name"]}

    def _stepfunctions_DescribeExecution(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"status": "RUNNING"}

    def _stepfunctions_SendTaskSuccess(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        if len(asked["output"].encode()) > EXECUTION_INPUT_LIMIT_BYTES:
            raise Refused("a task's output is too large")
        return {}

    def _stepfunctions_SendTaskFailure(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        if len(asked["error"]) > 256 or len(asked["cause"]) > 32768:
            raise Refused("a task's error is too long")
        return {}

    def _stepfunctions_StopExecution(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {}

    def _sqs_SendMessage(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        texts = [
            text
            for name, each in asked.get("MessageAttributes", {}).items()
            for text in (name, each["DataType"], each["StringValue"])
        ]
        # SQS counts the body and the attributes together.
        if sum(len(text.encode()) for text in (asked["MessageBody"], *texts)) > MESSAGE_LIMIT_BYTES:
            raise Refused("a message is too large")
        self.messages.append(asked)
        return {"MessageId": "m"}

    def _sqs_DeleteMessage(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {}

    def _events_PutEvents(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        if sum(len(entry["Detail"].encode()) for entry in asked["Entries"]) > EVENT_LIMIT_BYTES:
            raise Refused("events are too large")
        for entry in asked["Entries"]:
            json.loads(entry["Detail"], parse_constant=_no_constant)
            self._stack.events.append(entry)
        return {"FailedEntryCount": 0, "Entries": [{"EventId": "e"}] * len(asked["Entries"])}

    def _events_ListRules(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"Rules": []}

    def _s3_HeadObject(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {**super()._s3_HeadObject(asked), "ContentType": "text/plain"}

    def _s3_PutObject(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return super()._s3_PutObject({"ContentType": "application/octet-stream", **asked})

    def _s3_GetObject(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {**super()._s3_GetObject(asked), "ETag": super()._s3_HeadObject(asked)["ETag"]}

    def do(self, service: str, operation: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Does one operation; of rules and schedules nothing but that it was asked for."""
        if service in ("events", "scheduler") and operation not in ("PutEvents", "ListRules"):
            return {"FailedEntryCount": 0, "FailedEntries": []}
        return super().do(service, operation, asked)


def _no_constant(name: str) -> None:
    raise Refused(f"{name} in JSON")


def read_strictly(text: str | bytes) -> Any:
    """JSON by the letter: no NaN, and nothing but whole characters."""
    if isinstance(text, str):
        text.encode()
    return json.loads(text, parse_constant=_no_constant)


class QuickClients:
    """Clients of botocore, which `stack` answers; made once, since that takes a third of a second."""

    def __init__(self) -> None:
        self.stack: Stack | None = None
        session = botocore.session.Session()
        keys: dict[str, Any] = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        self._clients: dict[str, Any] = {}
        for name in SERVICES:
            client: Any = session.create_client(name, region_name="us-east-1", **keys)

            def answer(operation: str, asked: dict[str, Any], client: Any = client, name: str = name) -> Any:
                assert self.stack is not None
                check_call(client, operation, asked)
                return self.stack.call(name, operation, asked, client)

            client._make_api_call = answer
            self._clients[name] = client

    def __call__(self, name: str) -> Any:
        return self._clients[name]

    def cache_clear(self) -> None:
        """As of the function that this stands for."""


class Stack:
    """The stack, and what surrounds it.

    Attributes:
        replicate: Replicate.
        table: The table.
        account: Everything else of AWS.
        refused: What AWS would not have done, but was asked for; empty where all is well.
        events: What the bus was told.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clients: QuickClients, replicate: ReplicateInMemory) -> None:
        self.replicate = replicate
        self.table = QuickTable()
        self.account = QuickAccount(self)
        self.refused: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.machine = None
        secret = {"current": ReplicateInMemory.SECRET, "previous": None, "rotated_at": "2025-01-01T00:00:00+00:00"}
        self.account.secrets = {
            "replicate-token": ReplicateInMemory.TOKEN, "signing-secret": json.dumps(secret),
            "webhook-master": "m" * 64, "link-secret": "l" * 64,
        }  # fmt: skip
        self.account.parameters = {ENVIRONMENT["API_URL_PARAMETER"]: API_URL}
        self._apps: dict[str, Any] = {}
        clients.stack = self
        transport = httpx.MockTransport(replicate._answer)

        class Client(httpx.Client):
            def __init__(self, **options: Any) -> None:
                super().__init__(**{**options, "transport": transport})

        monkeypatch.setattr(httpx, "Client", Client)
        monkeypatch.setattr(aws, "_client", clients)
        monkeypatch.setattr(aws, "_api_url", None)
        made: Any = outputs_bucket.OutputsBucket.__init__
        monkeypatch.setattr(
            made, "__kwdefaults__", {**made.__kwdefaults__, "open_client": downloads_of(replicate.client)}
        )
        monkeypatch.setenv("CREATES_PER_MINUTE", "6000")
        requests._source.cache_clear()
        requests._dropped_manifests.cache_clear()
        self.tokens = AccessTokens("predictions", clients("dynamodb"))

    def stored(self, key: str, body: bytes) -> None:
        """An object is written."""

    def call(self, service: str, operation: str, asked: dict[str, Any], client: Any) -> Any:
        """One call to AWS."""
        try:
            return self.account.do(service, operation, asked)
        except AwsError as error:
            status = _STATUSES.get(error.code, 400)
            told = {"Error": {"Code": error.code, "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": status}}
            told |= {"Item": error.item} if error.item is not None else {}
            raise client.exceptions.from_code(error.code)(told, operation) from None
        except Exception as error:
            # The product would take it for a fault of AWS's, and bear it.
            self.refused.append(f"{service}.{operation}: {error!r}"[:500])
            raise

    def app(self, function: str) -> Any:
        """A function's module, loaded as Lambda loads it, once."""
        if function not in self._apps:
            with pytest.MonkeyPatch.context() as only_here:
                self._apps[function] = load_app(function, only_here)
        return self._apps[function]

    def invoke(self, function: str, event: Any) -> Any:
        """Invokes a function."""
        return self.app(function).handler(event, Context(remaining_seconds=280))

    def api(
        self,
        method: str,
        path: str,
        *,
        token: str | None = None,
        body: bytes | str | None = None,
        headers: Mapping[str, str] | None = None,
        resource: str | None = None,
    ) -> dict[str, Any]:
        """Calls the API as API Gateway does: by the authorizer, then the route's function.

        A body of bytes comes as base64, a text as it is.
        """
        bare, _, query = path.partition("?")
        route = (method, resource or resource_of(method, bare))
        if route[1] is None or route not in ROUTES:
            return {"statusCode": 403, "headers": {}, "body": '{"message":"Missing Authentication Token"}'}
        context: dict[str, Any] = {}
        if not ROUTES[route]["public"]:
            given = {"type": "TOKEN", "authorizationToken": f"Bearer {token}" if token else None}
            try:
                allowed = self.invoke(
                    "authorize_request", given | {"methodArn": f"arn:aws:execute-api:x:1:api/v1/{method}{bare}"}
                )
            except Exception as error:  # as API Gateway takes it
                if str(error) != "Unauthorized":
                    raise
                return {"statusCode": 401, "headers": {}, "body": '{"message":"Unauthorized"}'}
            context = allowed["context"]
        asked = {"Content-Type": "application/json", **(headers or {})}
        pairs = parse_qsl(query, keep_blank_values=True)
        text = base64.b64encode(body).decode() if isinstance(body, bytes) else body
        event = {
            "resource": route[1], "path": bare, "httpMethod": method, "headers": asked,
            "multiValueHeaders": {name: [value] for name, value in asked.items()},
            "queryStringParameters": dict(pairs) or None,
            "multiValueQueryStringParameters": {name: [v for n, v in pairs if n == name] for name, _ in pairs} or None,
            "pathParameters": None, "stageVariables": None,
            "requestContext": {
                "requestId": "r", "requestTimeEpoch": int(time.time() * 1000), "stage": "v1",
                "path": f"/v1{bare}", "httpMethod": method, "identity": {}, "authorizer": context,
            },
            "body": text, "isBase64Encoded": isinstance(body, bytes),
        }  # fmt: skip
        answer: dict[str, Any] = self.invoke(ROUTES[route]["folder"], event)
        return answer

    def webhook(self, prediction_id: str, body: bytes) -> dict[str, Any]:
        """A webhook of Replicate's, signed."""
        headers = sign(body, webhook_id="msg_1", timestamp=int(time.time()), secrets=[ReplicateInMemory.SECRET])
        return self.api("POST", f"/webhooks/replicate/{prediction_id}", body=body, headers=headers)

    def send(self, *bodies: str, sender: str = "AROAALICE0000") -> tuple[list[str], dict[str, str]]:
        """Messages in the requests queue: the ids that stay in it, and why others were refused, by their body."""
        before = len(self.account.messages)
        records = [
            {
                "messageId": f"m{n}-{len(self.account.messages)}-{len(self.table.items)}", "receiptHandle": "h",
                "body": body,
                "attributes": {"SentTimestamp": str(int(time.time()) * 1000), "SenderId": sender},
                "messageAttributes": {}, "eventSource": "aws:sqs", "eventSourceARN": ENVIRONMENT["REQUESTS_QUEUE_ARN"],
                "awsRegion": "us-east-1",
            }
            for n, body in enumerate(bodies)
        ]  # fmt: skip
        answer = self.invoke("start_from_queue", {"Records": records})
        dead = self.account.messages[before:]
        reasons = {each["MessageBody"]: each["MessageAttributes"]["reason"]["StringValue"] for each in dead}
        return [each["itemIdentifier"] for each in answer["batchItemFailures"]], reasons

    def start(self, token: str, given: Any = None) -> str:
        """Starts a prediction; its id."""
        body = json.dumps({"input": given or {"prompt": "a fox"}})
        answer = self.api("POST", "/models/meta/llama/predictions", token=token, body=body)
        assert answer["statusCode"] == 201, answer
        found: str = json.loads(answer["body"])["id"]
        return found


def resource_of(method: str, path: str) -> str | None:
    """The route that API Gateway takes a path for: of two, the one with more fixed parts."""
    parts = path.split("/")
    fitting = [
        resource
        for asked, resource in ROUTES
        if asked == method and len(resource.split("/")) == len(parts) and all(map(_fits, resource.split("/"), parts))
    ]
    return min(fitting, key=lambda resource: resource.count("{"), default=None)


def _fits(mine: str, theirs: str) -> bool:
    return mine == theirs or (mine.startswith("{") and theirs != "")


def query_of(**values: str) -> str:
    """A query string."""
    return urlencode(values)


_clients: list[QuickClients] = []


@contextmanager
def quick_stack() -> Iterator[Stack]:
    """A stack of its own."""
    if not _clients:
        _clients.append(QuickClients())
    with pytest.MonkeyPatch.context() as monkeypatch, ReplicateInMemory(Clock()) as replicate:
        stack = Stack(monkeypatch, _clients[0], replicate)
        try:
            yield stack
            assert stack.refused == []
        finally:
            _clients[0].stack = None
