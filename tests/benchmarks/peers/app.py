"""The functions of the peers: two ways to run a prediction and to store its file in S3.

`wait` creates the prediction and asks for it every half a second until it has completed, as the official clients do;
`create`, `get` and `store` are the steps of the state machine in `loop.asl.json`, which asks every five seconds.
Neither knows whether a create that was not answered has happened, neither notices a retry, and neither is signed up for
webhooks: they are what one writes first. They use what Lambda's runtime has.
"""

import json
import os
import time
from typing import Any

import boto3
import urllib3

POLL_SECONDS = 0.5
"""https://github.com/replicate/replicate-python#readme: `poll_interval`."""

HEADERS = {"Authorization": f"Bearer {os.environ['REPLICATE_TOKEN']}", "Content-Type": "application/json"}

http = urllib3.PoolManager()
s3 = boto3.client("s3")


def wait(event: dict[str, Any], _: object) -> dict[str, Any]:
    """Create a prediction, wait for it, and store its file."""
    prediction = create(event, _)
    while prediction["status"] not in ("succeeded", "failed", "canceled"):
        time.sleep(POLL_SECONDS)
        prediction = get(prediction, _)
    return store(prediction, _)


def create(event: dict[str, Any], _: object) -> dict[str, Any]:
    """Create a prediction."""
    body = json.dumps({"input": event["input"]})
    return _shown(_asked("POST", f"/models/{event['model']}/predictions", body))


def get(event: dict[str, Any], _: object) -> dict[str, Any]:
    """Ask how a prediction is."""
    return _shown(_asked("GET", f"/predictions/{event['id']}"))


def store(event: dict[str, Any], _: object) -> dict[str, Any]:
    """Store the file of a prediction that has succeeded."""
    if event["status"] != "succeeded":
        return event
    content = http.request("GET", event["file"], retries=False).data
    s3.put_object(Bucket=os.environ["BUCKET"], Key=f"peers/{event['id']}", Body=content, ContentType="image/png")
    return {**event, "bytes": len(content)}


def _asked(method: str, path: str, body: str | None = None) -> dict[str, Any]:
    answer = http.request(method, os.environ["REPLICATE_URL"] + path, body=body, headers=HEADERS, retries=False)
    if answer.status >= 400:
        raise RuntimeError(f"Replicate answered {answer.status}: {answer.data[:500]!r}")
    prediction: dict[str, Any] = answer.json()
    return prediction


def _shown(prediction: dict[str, Any]) -> dict[str, Any]:
    output = prediction.get("output")
    return {
        "id": prediction["id"],
        "status": prediction["status"],
        "file": output[0] if isinstance(output, list) and output else output,
    }
