"""What happens in a running local cloud, as lines: its requests, its predictions' status changes, its webhooks.

Requests come from the log that `local.emulator` writes, status changes from the table's stream, webhooks to callers
from the log of the functions. Nothing is asked of the stack itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from local.cloud import LocalCloud
from local.terminal import Terminal

INCOMING = "/webhooks/replicate/"  # the route of Replicate's webhooks
SHOWN_CHARACTERS = 300


class Activity:
    """Prints what has happened since the last time."""

    def __init__(self, cloud: LocalCloud, terminal: Terminal) -> None:
        self._terminal = terminal
        self._requests = _Tail(cloud.logs / "requests.log")
        self._functions = _Tail(cloud.logs / "functions.log")
        self._changes = _Changes(cloud)

    def skip(self) -> None:
        """Leave out what has happened until now."""
        for _ in self._lines():
            pass

    def show(self) -> None:
        """Print a line for each request, status change and webhook since the last call.

        A cloud that does not respond now is read the next time.
        """
        try:
            for name, text in self._lines():
                self._terminal.event(name, text, self._terminal.seconds)
        except (BotoCoreError, ClientError, OSError):
            return

    def _lines(self) -> Iterator[tuple[str, str]]:
        for old, new in self._changes.read():
            if shown := change(old, new):
                yield "prediction", shown
        for record in self._requests.records():
            yield request(record)
        for record in self._functions.records():
            if shown := delivery(record):
                yield "webhook", shown


def request(record: dict[str, Any]) -> tuple[str, str]:
    """Return the name and the text of a line for a request to the API."""
    outcome = f"{record['status']} in {record['seconds']:.1f} s"
    if record["method"] == "POST" and record["path"].startswith(INCOMING):
        return "webhook", f"{record['path'].removeprefix(INCOMING)} from Replicate: {outcome}"
    return "request", f"{record['method']} {record['path']}: {outcome}"


def change(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Return the text of a line for a change of an item, or None if no status changed."""
    if new.get("sk") != "status" or not new["pk"].startswith("prediction#"):
        return None
    if new.get("visible") == old.get("visible"):
        return None
    text = f"{new['id']} {new['visible']}"
    if not old:
        text += f": {new.get('name', 'a model')}, of {new['owner']}, from {new['source']}"
    elif new.get("error"):
        text += f": {new['error'][:SHOWN_CHARACTERS]}"
    return text


def delivery(record: dict[str, Any]) -> str | None:
    """Return the text of a line for a webhook to a caller, or None if the record is of something else."""
    match record:
        case {"message": "webhook delivered", "webhook_id": sent, "answer": status}:
            return f"{sent} to the caller: {status}"
        case {"message": "webhook not delivered", "webhook_id": sent, "reason": reason, "wait_seconds": seconds}:
            after = "given up" if seconds is None else f"sent again in {seconds} s"
            return f"{sent} to the caller: {reason}, {after}"
    return None


class _Tail:
    """The new JSON lines of a growing file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield each new complete line that is a JSON object."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:  # nothing was written yet
            return
        complete, _, _ = text.rpartition(b"\n")
        self._offset += len(complete) + 1 if complete else 0
        for line in complete.splitlines():
            if line.startswith(b"{"):
                try:
                    yield json.loads(line)
                except ValueError:
                    continue


class _Changes:
    """The new records of the table's stream."""

    def __init__(self, cloud: LocalCloud) -> None:
        self._streams = cloud.client("dynamodbstreams")
        self._arn = cloud.client("dynamodb").describe_table(TableName=cloud.stack.table_name)["Table"][
            "LatestStreamArn"
        ]
        self._iterators: dict[str, str | None] = {}

    def read(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield the item before and after each new change, as plain values; the one before a create is empty."""
        for shard in self._streams.describe_stream(StreamArn=self._arn)["StreamDescription"]["Shards"]:
            if shard["ShardId"] not in self._iterators:
                self._iterators[shard["ShardId"]] = self._first(shard["ShardId"])
            iterator = self._iterators[shard["ShardId"]]
            while iterator:
                page = self._streams.get_records(ShardIterator=iterator)
                iterator = self._iterators[shard["ShardId"]] = page.get("NextShardIterator")
                for record in page["Records"]:
                    if "NewImage" in record["dynamodb"]:
                        yield _plain(record["dynamodb"].get("OldImage", {})), _plain(record["dynamodb"]["NewImage"])
                if not page["Records"]:
                    break

    def _first(self, shard: str) -> str:
        found = self._streams.get_shard_iterator(StreamArn=self._arn, ShardId=shard, ShardIteratorType="TRIM_HORIZON")
        return str(found["ShardIterator"])


def _plain(image: dict[str, Any]) -> dict[str, Any]:
    return {name: next(iter(value.values())) for name, value in image.items()}
