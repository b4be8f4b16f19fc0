"""The consumer of the table's stream, and the bus that it writes to."""

import json
from typing import Any

from predictions.aws import clients
from predictions.files.outputs_bucket import OutputsBucket
from predictions.notifications.event_bus import EventBus
from predictions.notifications.stream import Changes
from predictions.notifications.stream_retries import RetryQueue
from predictions.notifications.webhook_queue import DeliveriesQueue
from predictions.store.callers import WaitingCallers
from predictions.store.predictions import PredictionsTable

from tests.support.fakes import refusal_of


class Bus:
    """What the bus was asked to take; `refused` of it, by detail-type, it does not."""

    def __init__(self) -> None:
        self.calls: list[list[dict[str, Any]]] = []
        self.refused: set[str] = set()
        self.error_code = "InternalFailure"
        self.call_refused_with = ""
        events: Any = clients.client("events").meta.events
        self._answered: Any = self._put
        events.register_first("before-call.eventbridge.PutEvents", self._answered)

    @property
    def taken(self) -> list[tuple[str, dict[str, Any]]]:
        return [
            (entry["DetailType"], json.loads(entry["Detail"]))
            for entries in self.calls
            for entry in entries
            if entry["DetailType"] not in self.refused
        ]

    @property
    def types(self) -> list[str]:
        return [detail_type for detail_type, _ in self.taken]

    def _put(self, params: dict[str, Any], **_: Any) -> tuple[Any, dict[str, Any]]:
        if self.call_refused_with:
            return refusal_of(self.call_refused_with)
        entries = json.loads(params["body"])["Entries"]
        self.calls.append(entries)
        answers = [{"ErrorCode": self.error_code} if e["DetailType"] in self.refused else {"EventId": "1"}
                   for e in entries]  # fmt: skip
        failed = sum("ErrorCode" in each for each in answers)
        return type("Http", (), {"status_code": 200})(), {"Entries": answers, "FailedEntryCount": failed}


def make(
    table: PredictionsTable, outputs: OutputsBucket, *, processing_events: bool = False, **options: Any
) -> Changes:
    return Changes(
        table,
        WaitingCallers.from_env(),
        outputs,
        DeliveriesQueue.from_env(),
        EventBus("bus", clients.client("events")),
        RetryQueue.from_env(),
        processing_events=processing_events,
        **options,
    )
