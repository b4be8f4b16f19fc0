"""The function that reads the requests queue, and messages for it."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from predictions.aws import clients
from predictions.aws.dynamodb import deserialize
from predictions.aws.executions import Executions
from predictions.files.outputs_bucket import OutputsBucket
from predictions.intake.queue import Requests
from predictions.intake.refused import DeadRequest, DeadRequests
from predictions.store.callers import WaitingCallers
from predictions.store.predictions import PredictionsTable

from tests.support.apps import Context, load_app
from tests.support.fakes import Clock, Executed

MODEL = "black-forest-labs/flux-schnell"
BODY = {"model": MODEL, "input": {"prompt": "a fox"}}
SENT = 1_749_999_990


@pytest.fixture
def requests(table: PredictionsTable, executed: Executed, clock: Clock) -> Requests:
    return Requests(
        table,
        WaitingCallers.from_env(),
        Executions(executed.machine_arn, clients.client("stepfunctions")),
        lifetime_seconds=3600,
        retention_seconds=30 * 86400,
        queue_owner="queue",
        sender_owners={"AROAALICE0000": "alice"},
        allow_loopback_webhooks=False,
        now=clock.now,
    )


def items(sk: str) -> list[dict[str, Any]]:
    found = map(deserialize, clients.client("dynamodb").scan(TableName="predictions")["Items"])
    return [item for item in found if item["sk"].startswith(sk)]


def record(body: Any, *, id: str = "message-1", **attributes: str) -> dict[str, Any]:  # noqa: A002
    return {
        "messageId": id,
        "body": body if isinstance(body, str) else json.dumps(body),
        "attributes": {"SenderId": "AIDANOBODY00", "SentTimestamp": str(SENT * 1000)},
        "messageAttributes": {name: {"stringValue": value, "dataType": "String"} for name, value in attributes.items()},
        "eventSource": "aws:sqs",
    }


class Function:
    """start_from_queue, with the table and the time of the test."""

    def __init__(self, requests: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
        self._app = load_app("start_from_queue", monkeypatch)
        monkeypatch.setattr(self._app, "requests", requests)

    def __call__(self, *records: dict[str, Any], remaining_seconds: float = 25) -> list[str]:
        answer = self._app.handler({"Records": list(records)}, Context(remaining_seconds))
        return [each["itemIdentifier"] for each in answer["batchItemFailures"]]


@pytest.fixture
def function(requests: Requests, cloud: None) -> Iterator[Function]:
    # In a context of its own: what reads the dead letters below needs the variables of other functions.
    with pytest.MonkeyPatch.context() as only_here:
        yield Function(requests, only_here)


def look() -> list[DeadRequest]:
    url = "https://sqs.us-east-1.amazonaws.com/123456789012/dead-requests"
    return list(DeadRequests(url, clients.client("sqs"), lambda: OutputsBucket("outputs")).receive(30))
