"""Origins of predictions: whether what a prediction belongs to is still active."""

import os

from predictions.aws.clients import client
from predictions.aws.dynamodb import deserialize, serialize


def is_canceled(pipeline_id: str) -> bool:
    """Whether nothing of a pipeline is to be started any more: it was canceled, has ended, or expired."""
    dynamodb = client("dynamodb")
    found = dynamodb.get_item(
        TableName=os.environ["TABLE_NAME"],
        Key=serialize({"pk": f"pipeline#{pipeline_id}", "sk": "status"}),
        ConsistentRead=True,
    ).get("Item")
    item = deserialize(found) if found else {}
    return item.get("status") != "running" or "cancel_requested" in item
