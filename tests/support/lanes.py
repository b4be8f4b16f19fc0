"""Predictions that wait for a turn of the rate limiter."""

from typing import Any

from predictions.aws import clients
from predictions.store.predictions import PredictionsTable

from tests.support.fakes import Clock
from tests.support.predictions import waiting


def queued(table: PredictionsTable, clock: Clock, **options: Any) -> str:
    """A prediction that came by the queue's door."""
    prediction_id = waiting(table, clock, **options).id
    clients.client("dynamodb").update_item(
        TableName="predictions",
        Key={"pk": {"S": f"prediction#{prediction_id}"}, "sk": {"S": "status"}},
        UpdateExpression="SET #source = :queue",
        ExpressionAttributeNames={"#source": "source"},
        ExpressionAttributeValues={":queue": {"S": "queue"}},
    )
    return prediction_id
