"""DynamoDB stream consumer: fans out state changes to webhooks, events, task tokens and pipelines.

- Webhooks to callers, as deliveries in a queue: `notifications.webhook_queue`.
- Events on the stack's bus: `notifications.event_bus`.
- Completion notifications for other state machines that wait for it: `aws.task_tokens`.
- Settlement of budgets: `store.settlements`; and the event of a budget's threshold.
- Counters of usage, once for a batch: `money.usage`.
- Progress of pipelines at the completion of their steps: `_ended`. A batch's lines have callers: its state machine.

Stream records arrive at least once, and in the order of an item's changes. Each effect is idempotent for a record that
arrives twice, or its receiver can deduplicate: deliveries and events have ids, a task token works once, and a pipeline
checks its state.

Each of the six effects is independent of the others: one that fails is sent to a queue of its own and retried from
there (`notifications.stream_retries`), and the stream goes on. Only while that queue cannot be reached either is the
stream read again, from that record on.
"""

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.dynamodb import Table, deserialize
from predictions.aws.task_tokens import tell_failure, tell_success
from predictions.files.output_references import StoredFile
from predictions.files.outputs_bucket import OutputsBucket
from predictions.money.budgets import THRESHOLD
from predictions.money.cost import key_of
from predictions.money.unknown import UnknownCosts
from predictions.money.usage import Counted, UsageCounters, counted
from predictions.notifications.event_bus import Event, EventBus, event_of_prediction, event_of_threshold, list_files
from predictions.notifications.stream_retries import Effect, Retry, RetryQueue, UnreadableRetry
from predictions.notifications.webhook_queue import DeliveriesQueue
from predictions.observability import MetricUnit, logger, metrics
from predictions.status import Status
from predictions.store.callers import Caller, WaitingCallers
from predictions.store.payloads import PayloadTooLong
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction, read_image
from predictions.store.settlements import Settlements

OUTPUT_LIMIT_BYTES = 32 * 1024
"""The limit of the output in a task result: an execution carries 256 KiB in all, and has data of its own."""

PARSED_LIMIT_CHARACTERS = 1024 * 1024
"""The size of output and logs together up to which they are parsed to look for a short output. Up to 65 times its size
in memory (`{}` in a list) is within the function's; above it the output counts as too long without being parsed."""

NEEDED_SECONDS = 20.0
"""The remaining time that is needed to begin another effect: a call to AWS with all its retries, and the last calls of
a run."""

_FILES_LIMIT_BYTES = 16 * 1024
# A cause of 32 KiB holds both whole however much is escaped: a cut one would not be valid JSON.
_CAUSE_ERROR_CHARACTERS = 2000
# Step Functions rejects single tokens; so many failures in a row are not the tokens' fault.
_FAILURES_IN_A_ROW = 3

_ENDED = frozenset({Status.SUCCEEDED.value, Status.FAILED.value, Status.CANCELED.value})

T = TypeVar("T")


class Changes:
    """Performs the effects of changes.

    Args:
        table: The predictions.
        callers: The states that wait for their ends.
        outputs: The bucket with their files.
        deliveries: The queue of webhooks to callers.
        bus: The stack's event bus.
        retries: The queue for effects that failed.
        processing_events: Whether `Prediction Processing` is sent too.
        unknown_costs: The register of unknown costs, or None to record none.
        settlements: Settles predictions in budgets.
        usage: The counters of usage, or None to count nothing.
        now: The time.
        jitter: Returns random numbers from 0 to 1.
    """

    def __init__(
        self,
        table: PredictionsTable,
        callers: WaitingCallers,
        outputs: OutputsBucket,
        deliveries: DeliveriesQueue,
        bus: EventBus,
        retries: RetryQueue,
        *,
        processing_events: bool,
        unknown_costs: UnknownCosts | None = None,
        settlements: Settlements | None = None,
        usage: UsageCounters | None = None,
        now: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._table = table
        self._callers = callers
        self._outputs = outputs
        self._deliveries = deliveries
        self._bus = bus
        self._retries = retries
        self._now = now
        self._jitter = jitter
        self._processing_events = processing_events
        self._unknown_costs = unknown_costs
        self._settlements = settlements
        self._usage = usage

    @classmethod
    def from_env(cls) -> "Changes":
        """Build from the environment of publish_changes."""
        return cls(
            PredictionsTable.from_env(),
            WaitingCallers.from_env(),
            OutputsBucket.from_env(),
            DeliveriesQueue.from_env(),
            EventBus.from_env(),
            RetryQueue.from_env(),
            processing_events=os.environ["PROCESSING_EVENTS"] == "true",
            unknown_costs=UnknownCosts(Table.from_env()),
            settlements=Settlements.from_env(),
            usage=UsageCounters(Table.from_env()) if os.environ["USAGE_COUNTERS"] == "true" else None,
        )

    def publish(
        self, records: Sequence[Mapping[str, Any]], remaining_seconds: Callable[[], float] = lambda: math.inf
    ) -> str | None:
        """Perform the effects of stream records, in order; events are put at the end.

        Args:
            records: As Lambda passes them.
            remaining_seconds: Returns how long the function may still run.

        Returns:
            The sequence number of the first record from which on all must be read again, because an effect failed and
            could not be sent to its queue, or no time was left; or None if all are done.
        """
        told: set[str] = set()
        news: list[tuple[Mapping[str, Any], Event]] = []
        failed: str | None = None
        done: list[Mapping[str, Any]] = []
        for record in records:
            number = str(record["dynamodb"]["SequenceNumber"])
            if record is not records[0] and remaining_seconds() < NEEDED_SECONDS:
                logger.warning("no time left", sequence_number=number)
                failed = number
                break
            try:
                if event := self._publish(record, told, remaining_seconds):
                    news.append((record, event))
            except Exception:  # noqa: BLE001  # Lambda reads the stream again from the record that could not be queued
                failed = number
                logger.exception("change not published", sequence_number=number)
                break
            done.append(record)
        late = [(record, Effect.USAGE) for record in self._not_counted(done)]
        late += [(record, Effect.EVENT) for record, _ in self._not_taken(news)]
        for record, effect in sorted(late, key=lambda each: records.index(each[0])):
            try:
                self._retry_later(effect, record)
            except Exception:  # noqa: BLE001  # as above
                # Its record comes before the one that failed, if any.
                number = str(record["dynamodb"]["SequenceNumber"])
                logger.exception("effect not queued", effect=effect, sequence_number=number)
                return number
        return failed

    def _not_counted(self, records: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Count the usage of records, and return those whose count must be retried."""
        if self._usage is None:
            return ()
        changes = [(record, change) for record in records if (change := _usage_of(record["dynamodb"]))]
        try:
            self._usage.add([change for _, change in changes])
        except Exception:  # noqa: BLE001  # whatever the error, no effect blocks another
            logger.exception("usage not counted", records=len(changes))
            return [record for record, _ in changes]  # those that were counted are found counted
        return ()

    def retry(
        self, messages: Iterable[Mapping[str, Any]], remaining_seconds: Callable[[], float] = lambda: math.inf
    ) -> list[str]:
        """Retry failed effects; queue those that fail again, for at most a day.

        Args:
            messages: Of the queue of retries, as Lambda passes them.
            remaining_seconds: Returns how long the function may still run.

        Returns:
            The ids of the messages that must stay in the queue.
        """
        waiting: list[str] = []
        news: list[tuple[tuple[str, Retry], Event]] = []
        for message in messages:
            id_ = str(message["messageId"])
            try:
                left = retry = Retry.read(message["body"])
            except UnreadableRetry:
                logger.exception("message is not a retry", message_id=id_)
                waiting.append(id_)  # SQS moves it to the dead-letter queue in the end
                continue
            if remaining_seconds() < NEEDED_SECONDS:
                waiting.append(id_)
                continue
            try:
                if retry.effect is Effect.EVENT:
                    event = self._event(retry.record)
                    news += [((id_, retry), event)] if event else []
                    continue
                untold = self._do(retry.effect, retry.record, set(), retry.callers, remaining_seconds)
                if not untold:
                    continue
                # After some callers were notified the backoff restarts: at most once for each caller.
                progress = retry.callers is not None and len(untold) < len(retry.callers)
                left = replace(retry, callers=untold, first_at=int(self._now()) if progress else retry.first_at)
            except Exception:  # noqa: BLE001  # whatever the error, no effect blocks another
                logger.exception("effect failed again", effect=retry.effect)
            waiting += [] if self._defer(left) else [id_]
        for (id_, retry), _ in self._not_taken(news):
            waiting += [] if self._defer(retry) else [id_]
        return waiting

    def _publish(
        self, record: Mapping[str, Any], told: set[str], remaining_seconds: Callable[[], float]
    ) -> Event | None:
        """Perform every effect of a record except its event, which is returned.

        Raises:
            Exception: An effect failed, and its retry could not be queued.
        """
        for effect in (each for each in Effect if each is not Effect.USAGE):  # which is counted by the batch
            untold: tuple[str, ...] | None = None
            try:
                if effect is Effect.EVENT:
                    return self._event(record)
                untold = self._do(effect, record, told, None, remaining_seconds)
                if not untold:
                    continue
            except Exception:  # noqa: BLE001  # whatever the error, no effect blocks another
                number = record["dynamodb"]["SequenceNumber"]
                logger.exception("effect failed", effect=effect, sequence_number=number)
            self._retry_later(effect, record, untold)
        return None

    def _do(
        self,
        effect: Effect,
        record: Mapping[str, Any],
        told: set[str],
        callers: Sequence[str] | None,
        remaining_seconds: Callable[[], float],
    ) -> tuple[str, ...]:
        """Perform any effect but the event; return the callers still to be notified."""
        match effect:
            case Effect.WEBHOOKS:
                self._deliveries.send_for(record, told)
            case Effect.CALLERS:
                return self._tell_callers(record, callers, remaining_seconds)
            case Effect.PIPELINE:
                self._wake_pipeline(record)
            case Effect.BUDGET:
                self._settle(record)
            case Effect.USAGE:
                if self._usage and (change := _usage_of(record["dynamodb"])):
                    self._usage.add([change])
        return ()

    def _retry_later(self, effect: Effect, record: Mapping[str, Any], callers: tuple[str, ...] | None = None) -> None:
        retry = Retry.of(effect, record, self._now(), callers)
        self._retries.send(retry, retry.wait_seconds(self._now(), self._jitter()) or 0)
        metrics.add_metric(name="ChangesDelayed", unit=MetricUnit.Count, value=1)

    def _defer(self, retry: Retry) -> bool:
        """Queue a retry again, or give it up; return False if both failed."""
        metrics.add_metric(name="ChangesDelayed", unit=MetricUnit.Count, value=1)
        wait_seconds = retry.wait_seconds(self._now(), self._jitter())
        try:
            if wait_seconds is None:
                self._retries.give_up(retry, "failed for a day. See the log of publish_changes.")
            else:
                self._retries.send(retry, wait_seconds)
        except (ClientError, BotoCoreError):
            logger.exception("retry not queued", effect=retry.effect)
            return False
        return True

    def _not_taken(self, news: Sequence[tuple[T, Event]]) -> list[tuple[T, Event]]:
        """Put events on the bus and return those that failed."""
        return [news[n] for n in self._bus.put([event for _, event in news])]

    def _event(self, record: Mapping[str, Any]) -> Event | None:
        """Return the event of a record, or None."""
        change = record["dynamodb"]
        kind, sk = _kind(change), str(change["Keys"]["sk"]["S"])
        at = float(change["ApproximateCreationDateTime"])
        told: tuple[str, Mapping[str, Any]] | None = None
        if kind == "pipeline":
            from predictions.pipelines.steps import event_of  # with the first record of a pipeline

            told = event_of(record)
        elif kind == "batch" and sk == "status":
            from predictions.batches.store import event_of as event_of_batch  # not needed in a stack without batches

            told = event_of_batch(change, self._outputs.name)
        elif kind == "usage" and sk.startswith(THRESHOLD):
            metrics.add_metric(name="BudgetThresholds", unit=MetricUnit.Count, value=1)
            told = event_of_threshold(change)
        elif (after := _newly_visible(change)) is not None:
            if after.visible == Status.PROCESSING and (not self._processing_events or after.terminal):
                # With files, a completion is first visible as `processing`: the model did not just start.
                return None
            self._note_unknown_cost(after)
            return event_of_prediction(after, self._table.stored_files(after), self._outputs.name, at)
        return Event(*told, at=at) if told else None

    def _note_unknown_cost(self, ended: Prediction) -> None:
        """Record a completion at an unknown cost; of those of one hour one is enough, so a lost one does no harm."""
        cost = ended.cost
        if self._unknown_costs and cost and cost.micro_dollars is None and cost.reason:
            key = key_of(ended.run) or "unknown"
            self._unknown_costs.note(key, cost.reason, ended.owner, ended.id, self._now())

    def _settle(self, record: Mapping[str, Any]) -> None:
        """Settle a prediction that has reserved in budgets, once it has visibly ended, or its cost is corrected."""
        image = record["dynamodb"].get("NewImage", {})
        if self._settlements and "reserved_on" in image and image["visible"]["S"] in _ENDED:
            self._settlements.settle(read_image(image), self._now())

    def _wake_pipeline(self, record: Mapping[str, Any]) -> None:
        """Advance the pipeline of a step that visibly completed."""
        ended = _newly_visible(record["dynamodb"])
        if ended is not None and ended.visible in _ENDED and "pipeline" in ended.origin:
            from predictions.pipelines.steps import prediction_ended  # with the first step of a pipeline

            prediction_ended(ended.id, ended.origin, ended.visible)

    def _tell_callers(
        self, record: Mapping[str, Any], only: Sequence[str] | None, remaining_seconds: Callable[[], float]
    ) -> tuple[str, ...]:
        """Notify waiting states, at the record of the completion or of their arrival.

        A caller that cannot be notified does not block the others.

        Args:
            record: As Lambda passes it.
            only: The `sk` of those to be notified; None for all.
            remaining_seconds: Returns how long the function may still run.

        Returns:
            The `sk` of those still to be notified, those first that were not tried.
        """
        change = record["dynamodb"]
        id_, sk = str(change["Keys"]["pk"]["S"]).partition("#")[2], str(change["Keys"]["sk"]["S"])
        coming = _kind(change) == "prediction" and sk.startswith("caller#")
        ended = _newly_visible(change)
        if not coming and (ended is None or ended.visible not in _ENDED):
            return ()
        if coming and "task_token" in change["NewImage"]:
            waiting = [Caller(sk, str(change["NewImage"]["task_token"]["S"]), "brief" in change["NewImage"])]
        else:
            known = {caller.sk: caller for caller in self._callers.callers_of(id_)}
            wanted = [sk] if coming else known if only is None else only
            waiting = [known[key] for key in wanted if key in known]
        if not waiting:
            return ()
        # The current state, read after the callers: it may have been deleted since, and then its output is not sent.
        # Nothing is sent before the completion, whose record finds this caller, since it is stored already.
        prediction = self._table.get(id_)
        if prediction is None or prediction.visible not in _ENDED:
            return ()
        tellers: dict[bool, Callable[[str], None]] = {}
        failed: list[str] = []
        in_a_row = 0
        for brief in {caller.brief for caller in waiting}:
            tellers[brief] = self._teller(prediction, brief=brief)
        for n, caller in enumerate(waiting):
            if in_a_row == _FAILURES_IN_A_ROW or (n and remaining_seconds() < NEEDED_SECONDS):
                return (*(rest.sk for rest in waiting[n:]), *failed)
            try:
                tellers[caller.brief](caller.task_token)
            except (ClientError, BotoCoreError):
                logger.exception("caller not notified", caller=caller.sk)
                failed.append(caller.sk)
                in_a_row += 1
            else:
                in_a_row = 0
        return tuple(failed)

    def _teller(self, prediction: Prediction, *, brief: bool) -> Callable[[str], None]:
        """Return the function that notifies a token; the task result is built once."""
        result: dict[str, Any] = {"id": prediction.id, "status": prediction.visible}
        stored = [] if brief else self._table.stored_files(prediction)
        if not brief:
            files, truncated = list_files(stored, self._outputs.name, _FILES_LIMIT_BYTES)
            result |= {"error": prediction.error, "output_files": files, "output_files_truncated": truncated}
            result |= {"cost": prediction.cost.shown} if prediction.cost else {}
            result |= {"labels": dict(prediction.labels)} if prediction.labels else {}
        if prediction.visible != Status.SUCCEEDED:
            if error := result.get("error"):
                result["error"] = error[:_CAUSE_ERROR_CHARACTERS]
            cause = json.dumps(result, ensure_ascii=False)
            return lambda token: tell_failure(token, f"Prediction{prediction.visible.capitalize()}", cause)
        if not brief:
            result |= self._output(prediction, stored)
        return lambda token: tell_success(token, result)

    def _output(self, prediction: Prediction, files: Iterable[StoredFile]) -> dict[str, Any]:
        """Return the output if it is short enough, with its files' places in the bucket."""
        if prediction.deleted:
            return {"output": None}
        try:
            found = self._table.result_output(prediction, PARSED_LIMIT_CHARACTERS)
        except PayloadTooLong:
            return {"output_truncated": True}
        # A file that was not copied is left out: its URL is not ours.
        output = self._outputs.place_files(
            found, {file.path: f"s3://{self._outputs.name}/{file.key}" for file in files if file.key}
        )
        if len(json.dumps(output, separators=(",", ":")).encode()) > OUTPUT_LIMIT_BYTES:
            return {"output_truncated": True}
        return {"output": output}


def _kind(change: Mapping[str, Any]) -> str:
    return str(change["Keys"]["pk"]["S"]).partition("#")[0]


def _newly_visible(change: Mapping[str, Any]) -> Prediction | None:
    """Return the prediction after a change of its visible status, or None."""
    if _kind(change) != "prediction" or change["Keys"]["sk"]["S"] != "status":
        return None
    after, before = change["NewImage"], change.get("OldImage") or {}
    # Every effect of a record calls this, and most records change nothing visible: those are not deserialized.
    return read_image(after) if after["visible"] != before.get("visible") else None


def _usage_of(change: Mapping[str, Any]) -> Counted | None:
    """Return what a change of a visibly ended prediction adds to the counters of usage, or None."""
    if _kind(change) != "prediction" or change["Keys"]["sk"]["S"] != "status":
        return None
    image, old = change["NewImage"], change.get("OldImage") or {}
    if image["visible"]["S"] not in _ENDED:
        return None
    if old.get("visible") == image["visible"] and old.get("cost_micro_dollars") == image.get("cost_micro_dollars"):
        return None
    ended = read_image(image)
    after = deserialize(image) | {"metrics": json.loads(ended.metrics_json or "{}")}
    at = float(change["ApproximateCreationDateTime"])
    return counted(after, deserialize(old), at, ended.owner, ended.shown_model)
