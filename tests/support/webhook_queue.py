"""Webhooks as tests have them wait, and the stream that calls for them."""

import json
from typing import Any

from predictions.aws import clients

HOOK = "https://hooks.example.com/7"
DUE = 1_750_000_000


def stream() -> list[dict[str, Any]]:
    """The table's stream so far, as Lambda passes it."""
    streams: Any = clients._session().create_client("dynamodbstreams")
    table = clients.client("dynamodb").describe_table(TableName="predictions")["Table"]
    arn = table["LatestStreamArn"]
    (shard,) = streams.describe_stream(StreamArn=arn)["StreamDescription"]["Shards"]
    iterator = streams.get_shard_iterator(StreamArn=arn, ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON")[
        "ShardIterator"
    ]
    records: list[dict[str, Any]] = []
    while page := (answer := streams.get_records(ShardIterator=iterator, Limit=1000))["Records"]:
        records += page
        iterator = answer["NextShardIterator"]
    for record in records:
        record["dynamodb"]["ApproximateCreationDateTime"] = DUE + 0.5
    return records


def waiting(name: str) -> list[dict[str, Any]]:
    """The bodies of a queue's visible messages."""
    url = clients.client("sqs").get_queue_url(QueueName=name)["QueueUrl"]
    found = clients.client("sqs").receive_message(QueueUrl=url, MaxNumberOfMessages=10, VisibilityTimeout=0)
    return [json.loads(message["Body"]) for message in found.get("Messages", [])]


def hook(prediction_id: str, url: str) -> None:
    """Gives a prediction a webhook that the API would not take."""
    clients.client("dynamodb").update_item(
        TableName="predictions",
        Key={"pk": {"S": f"prediction#{prediction_id}"}, "sk": {"S": "status"}},
        UpdateExpression="SET webhook = :url",
        ExpressionAttributeValues={":url": {"S": url}},
    )
