"""Predictions as tests start, store and read them."""

import contextlib
import json
from typing import Any

from predictions.aws import clients
from predictions.errors import PredictionThrottled
from predictions.intents.model import Intent, create_intent
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction
from predictions.upstream.prediction import UpstreamPrediction

from tests.support.fakes import VERSION, Clock
from tests.support.protocol import Submissions


def wanted(
    *, owner: str = "alice", key: str | None = None, headers: dict[str, str] | None = None, **body: Any
) -> Intent:
    sent = {"version": VERSION, "input": {"prompt": "a fox"}, **body}
    asked = {"content-type": "application/json", **(headers or {})}
    if key:
        asked["idempotency-key"] = key
    return create_intent(json.dumps(sent).encode(), asked, owner=owner, reference=None, allow_loopback_webhooks=False)


def waiting(table: PredictionsTable, clock: Clock, **options: Any) -> Prediction:
    """An intent that was only written down, as the queue's door does it."""
    intent = wanted(**options)
    return table.put_intent(
        intent,
        version=intent.reference.version,
        deadline=int(clock.now()) + (intent.lifetime_seconds or 86400),
        expires=int(clock.now()) + 864000,
        claim=False,
        execution_arn="arn:x",
        now=clock.now(),
    )


def look(submissions: Submissions, prediction_id: str) -> None:
    """What the state machine does with one whose create had no clear answer; it comes again when it is told to."""
    with contextlib.suppress(PredictionThrottled):
        submissions.poll(prediction_id)


def current(table: PredictionsTable, prediction_id: str) -> Prediction:
    found = table.get(prediction_id)
    assert found is not None
    return found


def forget_expired(clock: Clock) -> None:
    """What DynamoDB does with items whose time is over."""
    dynamodb = clients.client("dynamodb")
    for item in dynamodb.scan(TableName="predictions")["Items"]:
        if "expires_at" in item and int(item["expires_at"]["N"]) <= clock.now():
            dynamodb.delete_item(TableName="predictions", Key={"pk": item["pk"], "sk": item["sk"]})


def hold_token(
    table: PredictionsTable,
    prediction_id: str,
    token: str,
    *,
    next_check_at: float | None = None,
    execution_arn: str | None = None,
    catches: bool = True,
) -> None:
    """What the state AwaitWebhook does; of an execution that began before it caught errors, if `catches` is False."""
    check = ", wake = :wake" if catches else ""
    check += ", next_check_at = :next_check_at" if next_check_at else ""
    values: dict[str, Any] = {":token": {"S": token}, ":terminal": {"N": "9"}}
    if catches:
        values[":wake"] = {"S": "v2"}
    if execution_arn:
        values[":execution"] = {"S": execution_arn}
    if next_check_at:
        values[":next_check_at"] = {"N": str(int(next_check_at))}
    clients.client("dynamodb").update_item(
        TableName="predictions",
        Key={"pk": {"S": f"prediction#{prediction_id}"}, "sk": {"S": "status"}},
        UpdateExpression="SET task_token = :token" + check,
        ConditionExpression=("execution_arn = :execution" if execution_arn else "attribute_exists(pk)")
        + " AND #rank < :terminal",
        ExpressionAttributeNames={"#rank": "rank"},
        ExpressionAttributeValues=values,
    )


FILE = "https://replicate.delivery/x/out.png"


def put(table: PredictionsTable, clock: Clock, *, owner: str = "alice", claim: bool = True, **body: Any) -> Prediction:
    intent = create_intent(
        json.dumps({"version": VERSION, "input": {"n": 1}, **body}).encode(),
        {},
        owner=owner,
        reference=None,
        allow_loopback_webhooks=False,
    )
    now = clock.now()
    return table.put_intent(
        intent,
        version=VERSION,
        deadline=int(now) + 600,
        expires=int(now) + 864000,
        claim=claim,
        execution_arn="arn:1",
        now=now,
    )


def told(status: str, upstream_id: str = "u" * 26, **more: Any) -> UpstreamPrediction:
    return UpstreamPrediction.parse({"id": upstream_id, "status": status, **more})


def raw_items(prediction_id: str) -> dict[str, dict[str, Any]]:
    items = clients.client("dynamodb").scan(TableName="predictions")["Items"]
    return {item["sk"]["S"]: item for item in items if item["pk"]["S"] == f"prediction#{prediction_id}"}
