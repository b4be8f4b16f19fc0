"""Events on the stack's bus, which report changes of predictions.

The schema is documented in docs/events.md. Events have ids, names, times and places in S3; no input, no output, no
secret.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import client
from predictions.aws.dynamodb import deserialize
from predictions.files.output_references import StoredFile
from predictions.observability import logger
from predictions.status import Status
from predictions.store.records import Prediction, labels_and_trace

if TYPE_CHECKING:
    from mypy_boto3_events import EventBridgeClient
    from mypy_boto3_events.type_defs import PutEventsRequestEntryTypeDef

SOURCE = "replicate-serverless"

VERSION = "1"
"""The schema's version: incremented when a field is removed or changes its meaning, not when one is added."""

FILES_LIMIT_BYTES = 128 * 1024
"""The limit of an event's list of files: further files are left out, and the event reports that."""

_WORDS = {
    Status.STARTING.value: "Started",
    Status.PROCESSING.value: "Processing",
    Status.SUCCEEDED.value: "Succeeded",
    Status.FAILED.value: "Failed",
    Status.CANCELED.value: "Canceled",
}

# https://docs.aws.amazon.com/eventbridge/latest/APIReference/API_PutEvents.html: 10 entries, and 256 KB with all.
_ENTRIES_LIMIT = 10
_ENTRIES_LIMIT_BYTES = 240 * 1024
# An event that the bus cannot parse, as with metrics nested too deep, always fails and must not block the stream.
# https://docs.aws.amazon.com/eventbridge/latest/APIReference/API_PutEventsResultEntry.html
_MALFORMED = "MalformedDetail"


@dataclass(frozen=True)
class Event:
    """One event.

    Attributes:
        detail_type: The kind of change, such as `Prediction Succeeded`.
        detail: The schema's fields.
        at: When it happened, in Unix seconds.
    """

    detail_type: str
    detail: Mapping[str, Any]
    at: float


def event_of_prediction(prediction: Prediction, files: Sequence[StoredFile], bucket: str, at: float) -> Event:
    """Build the event of a visible change. The same change gives the same `event_id`.

    Args:
        prediction: The prediction after the change.
        files: Its stored files.
        bucket: The bucket that holds them.
        at: The time of the change.
    """
    word = _WORDS[prediction.visible]
    thing = prediction.object.capitalize()
    listed, truncated = list_files(files, bucket, FILES_LIMIT_BYTES)
    detail: dict[str, Any] = {
        "version": VERSION,
        "event_id": f"{prediction.id}-{word.lower()}",
        "id": prediction.id,
        "object": prediction.object,
        "owner": prediction.owner,
        "status": prediction.visible,
        "source": prediction.source,
        "origin": dict(prediction.origin),
        "depth": prediction.depth,
        "model": prediction.model or (None if prediction.deployment else prediction.name),
        "deployment": prediction.deployment,
        "model_version": prediction.upstream_version or prediction.version,
        "destination": prediction.destination,
        "upstream_id": prediction.upstream_id,
        "upstream_status": prediction.reported_status,
        "created_at": prediction.created_at,
        "started_at": prediction.started_at,
        "completed_at": prediction.completed_at,
        "error": prediction.error,
        "metrics": json.loads(prediction.metrics_json) if prediction.metrics_json else None,
        "cost": prediction.cost.shown if prediction.cost else None,
        "output_files": listed,
        "output_files_truncated": truncated,
        **labels_and_trace(prediction.labels, prediction.traceparent),
    }
    return Event(f"{thing} {word}", detail, at)


def event_of_threshold(change: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Build the event of a threshold that a budget has reached, from its record (see `money.budgets`)."""
    item = deserialize(change["NewImage"])
    owner = item["pk"].partition("#")[2] or None
    detail = {
        "version": VERSION,
        "event_id": f"budget-{owner or '#stack'}-{item['of']}-{item['percent']}",
        "budget": item["budget"],
        "owner": owner,
        "period": item["period"],
        "of": item["of"],
        "percent": item["percent"],
        "used_micro_dollars": item["used_micro_dollars"],
        "limit_micro_dollars": item["limit_micro_dollars"],
    }
    return "Budget Threshold Reached", detail


def list_files(files: Sequence[StoredFile], bucket: str, limit_bytes: int) -> tuple[list[dict[str, Any]], bool]:
    """Return stored files as events show them, and whether some were left out."""
    listed: list[dict[str, Any]] = []
    room = limit_bytes
    for file in files:
        if file.error or not file.key:
            one: dict[str, Any] = {"path": file.path, "error": file.error or "not stored"}
        else:
            uri = f"s3://{bucket}/{file.key}"
            one = {"path": file.path, "uri": uri, "bytes": file.bytes, "content_type": file.content_type}
        room -= len(json.dumps(one, ensure_ascii=False).encode()) + 2
        if room < 0:
            return listed, True
        listed.append(one)
    return listed, False


class EventBus:
    """The stack's event bus."""

    def __init__(self, name: str, eventbridge: "EventBridgeClient") -> None:
        self._name = name
        self._events = eventbridge

    @classmethod
    def from_env(cls) -> "EventBus":
        """Use the bus of `EVENT_BUS_NAME`."""
        return cls(os.environ["EVENT_BUS_NAME"], client("events"))

    def put(self, events: Sequence[Event]) -> list[int]:
        """Put events on the bus in few calls; return the indexes of failed ones.

        A failed call is the last one: the bus cannot be reached, or not at the moment.

        Returns:
            The indexes of the events to retry, in order. After a failed call, some of its events may be on the bus.
            Events that the bus would never accept are not among them.
        """
        entries = [self._entry(event) for event in events]
        refused: list[int] = []
        first = 0
        while first < len(entries):
            last, room = first, _ENTRIES_LIMIT_BYTES
            while last < len(entries) and last - first < _ENTRIES_LIMIT:
                room -= len(entries[last]["Detail"].encode()) + len(entries[last]["DetailType"]) + len(SOURCE) + 14
                if room < 0 and last > first:
                    break
                last += 1
            try:
                answer = self._events.put_events(Entries=entries[first:last])
            except (ClientError, BotoCoreError):
                logger.exception("events not put on the bus")
                return [*refused, *range(first, len(entries))]
            for number, each in enumerate(answer["Entries"], first):
                if each.get("ErrorCode") == _MALFORMED:
                    logger.error("event rejected permanently", event_id=events[number].detail.get("event_id"))
                elif "ErrorCode" in each:
                    logger.warning("event rejected", reason=each["ErrorCode"])
                    refused.append(number)
            first = last
        return refused

    def _entry(self, event: Event) -> "PutEventsRequestEntryTypeDef":
        return {
            "EventBusName": self._name,
            "Source": SOURCE,
            "DetailType": event.detail_type,
            "Detail": json.dumps(event.detail, separators=(",", ":"), ensure_ascii=False),
            "Time": datetime.fromtimestamp(event.at, UTC),
        }
