"""The search for secrets finds what is put where it must not be; what the other tests leave is searched at the end."""

import base64
import fnmatch
import json
import secrets
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest

from tests.stack.secrecy import WatchedCloud, leaks, secrets_of


@pytest.fixture(scope="module")
def planted(cloud: WatchedCloud) -> list[str]:
    """What is found once a canary is in many places, in other forms; afterwards nobody looks for it any more."""
    canary = f'{{"{secrets.token_urlsafe(32)}?/\\'
    cloud.canaries["canary"] = canary
    logs, sqs, s3, dynamodb = (cloud.client(name) for name in ("logs", "sqs", "s3", "dynamodb"))
    group = {"logGroupName": logs.describe_log_groups()["logGroups"][0]["logGroupName"], "logStreamName": "planted"}
    logs.create_log_stream(**group)
    told = base64.b64encode(f"Authorization: {canary}, and so on".encode()).decode()
    logs.put_log_events(**group, logEvents=[{"timestamp": 0, "message": told}])
    key = {"pk": {"S": "planted"}, "sk": {"S": "planted"}}
    dynamodb.put_item(TableName=cloud.stack.table_name, Item={**key, "error": {"S": f"?signature={quote(canary)}"}})
    dynamodb.delete_item(TableName=cloud.stack.table_name, Key=key)
    bucket, queue = cloud.stack.outputs_bucket, sqs.create_queue(QueueName="planted")["QueueUrl"]
    s3.put_object(Bucket=bucket, Key="planted/hex", Body=f"x{canary.encode().hex()}x")
    s3.put_object(Bucket=bucket, Key="planted/metadata", Metadata={"of": canary})
    sqs.send_message(QueueUrl=queue, MessageBody=json.dumps({"told": json.dumps({"token": canary})}))
    sqs.send_message(QueueUrl=queue, MessageBody=json.dumps({"url": "https://example.com/?X-Amz-Signature=0123"}))
    event = {"Source": "planted", "DetailType": "Told", "Detail": json.dumps({"token": canary})}
    cloud.client("events").put_events(Entries=[{**event, "EventBusName": cloud.stack.event_bus_name}])
    cloud.client("stepfunctions").start_execution(
        stateMachineArn=cloud.stack.state_machine_arn, name="planted", input=json.dumps({"id": canary})
    )
    cloud.answers.append(("GET /planted", json.dumps({"detail": canary})))
    cloud.strangers.append("GET /files/planted.png")
    found = leaks(cloud)
    sqs.delete_queue(QueueUrl=queue)
    for name in ("hex", "metadata"):
        s3.delete_object(Bucket=bucket, Key=f"planted/{name}")
    cloud.canaries.clear()
    cloud.answers.pop()
    cloud.strangers.clear()
    return found


@pytest.mark.parametrize(
    "leak",
    [
        "log */*: canary",
        "stream's record of planted: canary",
        "object */planted/hex: canary",
        "object */planted/metadata: canary",
        "message of planted: canary",
        "message of planted: a presigned URL",
        "message of heard-events: canary",
        "execution planted: canary",
        "history of planted: canary",
        "answer to GET /planted: canary",
        "GET /files/planted.png: an Authorization header went *",
    ],
)
def test_secret_is_found_wherever_it_is_put(planted: list[str], leak: str) -> None:
    assert fnmatch.filter(planted, leak), planted


def test_every_secret_of_the_stack_is_looked_for(cloud: WatchedCloud, boto: Callable[[str], Any]) -> None:
    kept = {each["Name"] for each in boto("secretsmanager").list_secrets()["SecretList"]}
    names = " ".join(secrets_of(cloud))
    assert len(kept) == 4
    assert {name for name in kept if name not in names} <= {name for name in kept if "SigningSecret" in name}
