"""What a change of the table calls for, as its stream tells it: the one place that knows all of it.

- Webhooks to callers, as deliveries in a queue: `predictions.deliveries`.
- Events on the stack's bus: `predictions.events`.
- The end, for state machines of others that wait for it: `predictions.callers`.
- What pipelines do at the end of what they started: `_ended`. A batch's lines have callers: its state machine.

Stream records come at least once, and in the order of an item's changes. Each of these is the same for a record that
comes twice, or can be told to be: deliveries and events have ids, a task token works once, and a hook has to look.
"""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.callers import tell_failure, tell_success
from predictions.deliveries import DeliveriesQueue
from predictions.errors import PredictionsError
from predictions.events import Event, EventBus, event_of_prediction, list_files
from predictions.observability import logger
from predictions.outputs import OutputsBucket, StoredFile
from predictions.statuses import Status
from predictions.table import Prediction, PredictionsTable, read_image

OUTPUT_LIMIT_BYTES = 32 * 1024
"""What the output may take in what a state machine is told: it carries 256 KiB in all, and has data of its own."""

_FILES_LIMIT_BYTES = 16 * 1024
# However much of both has to be escaped, a cause of 32 KiB holds them whole: cut off, it were no JSON.
_CAUSE_ERROR_CHARACTERS = 2000

_ENDED = frozenset({Status.SUCCEEDED.value, Status.FAILED.value, Status.CANCELED.value})


class NotTaken(PredictionsError):
    """The bus did not take an event now."""


class Changes:
    """Does what changes call for.

    Args:
        table: The predictions.
        outputs: The bucket with their files.
        deliveries: The queue of webhooks to callers.
        bus: The stack's event bus.
        processing_events: Whether `Prediction Processing` is told too.
    """

    def __init__(
        self,
        table: PredictionsTable,
        outputs: OutputsBucket,
        deliveries: DeliveriesQueue,
        bus: EventBus,
        *,
        processing_events: bool,
    ) -> None:
        self._table = table
        self._outputs = outputs
        self._deliveries = deliveries
        self._bus = bus
        self._processing_events = processing_events

    @classmethod
    def from_env(cls) -> "Changes":
        """From the environment of publish_changes."""
        return cls(
            PredictionsTable.from_env(),
            OutputsBucket.from_env(),
            DeliveriesQueue.from_env(),
            EventBus.from_env(),
            processing_events=os.environ["PROCESSING_EVENTS"] == "true",
        )

    def publish(self, records: Iterable[Mapping[str, Any]]) -> str | None:
        """Does what records of the stream call for, in their order; events go to the bus together, at the end.

        Returns:
            The sequence number of the first record that failed, from which on all are to be read again; None where
            none did.
        """
        told: set[str] = set()
        news: list[tuple[str, Event]] = []
        failed: str | None = None
        for record in records:
            sequence_number = str(record["dynamodb"]["SequenceNumber"])
            try:
                self._deliveries.send_for(record, told)
                if event := self._act(record):
                    news.append((sequence_number, event))
            except (ClientError, BotoCoreError):
                failed = sequence_number
                logger.exception("change not published", sequence_number=failed)
                break
        try:
            refused = self._bus.put([event for _, event in news])
        except (ClientError, BotoCoreError):
            refused = 0
            logger.exception("events not put")
        if refused is not None:
            # Its record comes before the one that failed, if any did.
            failed = news[refused][0]
            logger.error("event not taken", sequence_number=failed)
        return failed

    def _act(self, record: Mapping[str, Any]) -> Event | None:
        """Everything but webhooks: what a record calls for is done, and its event is returned."""
        change = record["dynamodb"]
        kind, _, id_ = str(change["Keys"]["pk"]["S"]).partition("#")
        sk = str(change["Keys"]["sk"]["S"])
        match kind:
            case "prediction" if sk == "status":
                return self._status_changed(change)
            case "prediction" if sk.startswith("caller#"):
                self._caller_came(id_, str(change["NewImage"]["task_token"]["S"]))
            case "pipeline":
                from predictions.pipelines import event_of  # with the first record of a pipeline

                if told := event_of(record):
                    return Event(*told, at=float(change["ApproximateCreationDateTime"]))
            case "batch" if sk == "status":
                return self._batch_changed(change)
        return None

    def _status_changed(self, change: Mapping[str, Any]) -> Event | None:
        after = read_image(change["NewImage"])
        before = read_image(change["OldImage"]) if change.get("OldImage") else None
        if before is not None and before.visible == after.visible:
            return None
        if after.visible == Status.PROCESSING and (not self._processing_events or after.terminal):
            # With files an end is first seen as `processing`: that is no news of a model that runs.
            return None
        if after.visible in _ENDED:
            self._ended(after)
        at = float(change["ApproximateCreationDateTime"])
        return event_of_prediction(after, self._table.stored_files(after), self._outputs.name, at)

    def _batch_changed(self, change: Mapping[str, Any]) -> Event | None:
        from predictions.batches import event_of  # the stream of a stack without batches never needs it

        told = event_of(change, self._outputs.name)
        return Event(*told, at=float(change["ApproximateCreationDateTime"])) if told else None

    def _ended(self, prediction: Prediction) -> None:
        """The visible end: whoever waits for it is told."""
        if tokens := list(self._table.callers(prediction.id)):
            self._tell(prediction, tokens)
        if "pipeline" in prediction.origin:
            from predictions.pipelines import prediction_ended  # with the first step of a pipeline

            prediction_ended(prediction.id, prediction.origin, prediction.visible)

    def _caller_came(self, prediction_id: str, token: str) -> None:
        prediction = self._table.get(prediction_id)
        # Before the end there is nothing to tell; the record of the end finds this caller, since it is there already.
        if prediction is not None and prediction.visible in _ENDED:
            self._tell(prediction, [token])

    def _tell(self, prediction: Prediction, tokens: list[str]) -> None:
        stored = self._table.stored_files(prediction)
        files, truncated = list_files(stored, self._outputs.name, _FILES_LIMIT_BYTES)
        result: dict[str, Any] = {
            "id": prediction.id,
            "status": prediction.visible,
            "error": prediction.error,
            "output_files": files,
            "output_files_truncated": truncated,
        }
        if prediction.visible != Status.SUCCEEDED:
            error = prediction.error[:_CAUSE_ERROR_CHARACTERS] if prediction.error else None
            cause = json.dumps(result | {"error": error}, ensure_ascii=False)
            for token in tokens:
                tell_failure(token, f"Prediction{prediction.visible.capitalize()}", cause)
            return
        result |= self._output(prediction, stored)
        for token in tokens:
            tell_success(token, result)

    def _output(self, prediction: Prediction, files: Iterable[StoredFile]) -> dict[str, Any]:
        """The output where it is short enough; its files are named by their places in the bucket."""
        if prediction.deleted:
            return {"output": None}
        found = self._table.result_output(prediction)
        # A file that nobody copied is missing: its URL is not ours.
        output = self._outputs.place_files(
            found, {file.path: f"s3://{self._outputs.name}/{file.key}" for file in files if file.key}
        )
        if len(json.dumps(output, separators=(",", ":")).encode()) > OUTPUT_LIMIT_BYTES:
            return {"output_truncated": True}
        return {"output": output}
