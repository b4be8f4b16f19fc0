"""A worker: sends requests to the stack, and takes the results from its events, each of them once.

    python worker.py send order-1209 "a harbour in fog"     # a key of your own, and a prompt
    python worker.py                                        # handle results until SIGTERM or Ctrl-C

Needs boto3, credentials with the policy of template.yaml beside this file, and in the environment:
REQUESTS_QUEUE_URL (output RequestsQueueUrl of the stack), RESULTS_QUEUE_URL and EVENTS_TABLE_NAME (outputs of
template.yaml), RESULTS_FOLDER (default: results) and MODEL (default: black-forest-labs/flux-schnell).

EventBridge and SQS deliver an event at least once. A lease in the table lets one worker handle it, and the state
`done` ends all further deliveries. A worker that crashes in between leaves the lease, and the delivery after its end
is handled. So `handle` runs again only after a crash, or if it takes longer than LEASE_SECONDS: let it have the same
effect twice.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import ClientError

# Shorter than the queue's VisibilityTimeout in template.yaml: the next delivery finds it over.
LEASE_SECONDS = 240
# SQS keeps a message for at most 14 days, and a copy of an event is not older:
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SetQueueAttributes.html
REMEMBERED_SECONDS = 15 * 24 * 3600


def send(queue: Any, queue_url: str, model: str, key: str, prompt: str) -> None:
    """Request a prediction. The same key and prompt, sent again, start nothing more."""
    request = {"model": model, "input": {"prompt": prompt}, "idempotency_key": key}
    queue.send_message(QueueUrl=queue_url, MessageBody=json.dumps(request))


def handle(detail: Mapping[str, Any], s3: Any, folder: Path) -> None:
    """Store the result of one prediction as a folder: its files, and result.json. Put your code here."""
    result = folder / detail["id"]
    unfinished = folder / f".{detail['id']}"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a worker that crashed here
    unfinished.mkdir(parents=True)
    for number, file in enumerate(detail["output_files"]):
        if "uri" in file:  # else `error` says why the stack could not store it
            bucket, _, key = file["uri"].removeprefix("s3://").partition("/")
            s3.download_file(bucket, key, str(unfinished / str(number)))
    outcome = {name: detail[name] for name in ("id", "model", "status", "error", "output_files")}
    (unfinished / "result.json").write_text(json.dumps(outcome, indent=2))
    shutil.rmtree(result, ignore_errors=True)
    unfinished.rename(result)


class Worker:
    """Handles the events of a queue.

    Args:
        sqs: A client of SQS.
        queue_url: The queue to which the rule of template.yaml sends the events.
        events: The table (boto3 resource) that remembers events, with the key `event_id`.
        handler: Called with `detail` of an event. An exception leaves the event for the next delivery.
        now: The time in Unix seconds.
    """

    def __init__(
        self,
        sqs: Any,
        queue_url: str,
        events: Any,
        handler: Callable[[Mapping[str, Any]], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._sqs = sqs
        self._queue_url = queue_url
        self._events = events
        self._handler = handler
        self._now = now

    def work(self, wait_seconds: int = 20) -> int:
        """Receive up to ten messages and handle them; return the number received."""
        received = self._sqs.receive_message(
            QueueUrl=self._queue_url, MaxNumberOfMessages=10, WaitTimeSeconds=wait_seconds
        )
        messages = received.get("Messages", [])
        for message in messages:
            try:
                done = self._handle(json.loads(message["Body"])["detail"])
            except Exception as error:  # noqa: BLE001 - one event must not keep the others: it comes again, then goes to the DLQ
                print(f"not handled, it will be delivered again: {error!r}", file=sys.stderr)  # noqa: T201
                continue
            if done:
                self._sqs.delete_message(QueueUrl=self._queue_url, ReceiptHandle=message["ReceiptHandle"])
        return len(messages)

    def _handle(self, detail: Mapping[str, Any]) -> bool:
        """Return whether the event is done, so that its message can be deleted."""
        key, now = {"event_id": detail["event_id"]}, int(self._now())
        lease = {":doing": "doing", ":until": now + LEASE_SECONDS, ":expires": now + REMEMBERED_SECONDS}
        free = "attribute_not_exists(event_id) OR (#state = :doing AND lease_until <= :now)"
        taken = "SET #state = :doing, lease_until = :until, expires_at = :expires"
        if not self._write(key, taken, free, lease | {":now": now}):
            found = self._events.get_item(Key=key, ConsistentRead=True).get("Item", {})
            return bool(found.get("state") == "done")  # else another worker has it: keep the message for later
        try:
            self._handler(detail)
        except Exception:
            # The next delivery need not wait for the end of the lease, unless it is another worker's by now.
            self._write(key, "SET lease_until = :now", "lease_until = :until", {":now": now, ":until": lease[":until"]})
            raise
        self._write(key, "SET #state = :done", "attribute_exists(event_id)", {":done": "done"})
        return True

    def _write(self, key: Mapping[str, str], update: str, condition: str, values: Mapping[str, Any]) -> bool:
        """Update the item of an event; return whether the condition held."""
        names = {"#state": "state"} if "#state" in update + condition else {}
        try:
            self._events.update_item(
                Key=dict(key),
                UpdateExpression=update,
                ConditionExpression=condition,
                ExpressionAttributeValues=dict(values),
                **({"ExpressionAttributeNames": names} if names else {}),
            )
        except ClientError as error:
            if error.response["Error"]["Code"] != "ConditionalCheckFailedException":
                raise
            return False
        return True


def main(arguments: list[str]) -> int:
    """Send one request, or handle results until the process gets a signal to stop."""
    sqs = boto3.client("sqs")
    if arguments[:1] == ["send"] and len(arguments) == 3:
        model = os.environ.get("MODEL", "black-forest-labs/flux-schnell")
        send(sqs, os.environ["REQUESTS_QUEUE_URL"], model, arguments[1], arguments[2])
        return 0
    if arguments:
        print("usage: worker.py [send KEY PROMPT]", file=sys.stderr)  # noqa: T201
        return 2
    s3, folder = boto3.client("s3"), Path(os.environ.get("RESULTS_FOLDER", "results"))
    events = boto3.resource("dynamodb").Table(os.environ["EVENTS_TABLE_NAME"])
    worker = Worker(sqs, os.environ["RESULTS_QUEUE_URL"], events, lambda detail: handle(detail, s3, folder))
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stopping.append(received))
    while not stopping:
        worker.work()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
