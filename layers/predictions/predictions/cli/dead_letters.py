"""Commands for dead letters of every queue: count, list, redrive and delete them."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import typer
from botocore.exceptions import ClientError

from predictions.aws.dead_letter_queue import DeadLetterQueue, DeadMessage
from predictions.cli.stack import (
    JsonList,
    JsonObject,
    NotDone,
    Stack,
    command,
    group,
    hidden,
    line,
    print_table,
    second,
)
from predictions.intake.refused import DeadRequest, DeadRequests
from predictions.notifications.stream_retries import Retry, RetryQueue, read_dead_letter
from predictions.notifications.webhook_queue import DeadLetters, DeliveriesQueue

app = group("Count, list, redrive and delete dead letters.")

LOOK_SECONDS = 30
"""How long a dead letter that a command has received is hidden from others, unless the command releases it."""


class Queue(StrEnum):
    """The dead-letter queues, by the names that commands use."""

    REQUESTS = "requests"
    WEBHOOKS = "webhooks"
    CHANGES = "changes"
    RUN_JOBS = "run-jobs"
    INVOCATIONS = "invocations"


QUEUES: Mapping[str, str] = {
    Queue.REQUESTS: "RequestsDeadLetterQueue",
    Queue.WEBHOOKS: "DeliveriesDeadLetterQueue",
    Queue.CHANGES: "ChangesDeadLetterQueue",
    Queue.RUN_JOBS: "RunJobsDeadLetterQueue",
    Queue.INVOCATIONS: "InvocationsDeadLetterQueue",
}
"""The logical id of each queue."""

_COLUMNS: Mapping[Queue, tuple[str, ...]] = {
    Queue.REQUESTS: ("SENT", "REASON", "BODY"),
    Queue.WEBHOOKS: ("EVENT", "DUE", "REASON"),
    Queue.CHANGES: ("RECORDS", "FROM", "TO", "REASON"),
    Queue.RUN_JOBS: ("FAILED", "REASON"),
    Queue.INVOCATIONS: ("FUNCTION", "SENT", "REASON"),
}

_SHOWN_CHARACTERS = 60
# A stream sometimes returns an empty page before its end.
_EMPTY_PAGES = 5

_QueueName = Annotated[Queue, typer.Argument(metavar="QUEUE", help="The queue.")]
_LetterId = Annotated[
    str | None, typer.Option("--id", help="Only the dead letter of this id, as shown by `dead-letters list`.")
]


class _Left(Exception):
    """A redrive leaves a dead letter in its queue; the text says why."""


@dataclass(frozen=True)
class _Dead:
    """A dead letter of any queue.

    Attributes:
        id: The id that commands show and accept.
        row: The other columns of the list.
        whole: The entry in the JSON list.
        redrive: Processes it again, or raises `_Left`.
        receipt_handle: Needed to delete it.
    """

    id: str
    row: tuple[str, ...]
    whole: Mapping[str, Any]
    redrive: Callable[[], None]
    receipt_handle: str


@command(app, "count", example="dead-letters count --stack NAME")
def count_letters(stack: Stack, as_json: JsonObject = False) -> None:
    """Count the dead letters of each queue."""
    sqs = stack.client("sqs")
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    counts = {}
    for name, logical_id in QUEUES.items():
        url = stack.resource(logical_id)
        known = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
        counts[name] = sum(int(known[each]) for each in names)
    if as_json:
        print(json.dumps(counts, indent=2))
        return
    print_table(("QUEUE", "LETTERS"), [(name, str(count)) for name, count in counts.items()])


@command(app, "list", example="dead-letters list requests --stack NAME")
def list_letters(stack: Stack, queue: _QueueName, as_json: JsonList = False) -> None:
    """List the dead letters of a queue with their reasons.

    The next command receives them again at once.
    """
    with _received(stack, queue) as letters:
        if as_json:
            print(json.dumps([letter.whole for letter in letters], indent=2))
            return
        print_table(("ID", *_COLUMNS[queue]), [(letter.id, *letter.row) for letter in letters])


@command(app, "redrive", example="dead-letters redrive webhooks --stack NAME")
def redrive_letters(stack: Stack, queue: _QueueName, letter_id: _LetterId = None) -> None:
    """Process dead letters again.

    Each is processed as what it was: nothing is started or sent twice.
    """
    dead = _queue(stack, queue)
    count, left = 0, []
    with _received(stack, queue) as letters:
        for letter in _chosen(letters, letter_id):
            try:
                letter.redrive()
            except (_Left, NotDone) as reason:  # the others are still redriven
                left.append(f"{letter.id}: {reason}")
                continue
            # In this order: after a crash in between it is redriven twice, which starts and sends nothing twice.
            dead.delete(letter.receipt_handle)
            letters.remove(letter)
            count += 1
    print(f"Redriven: {count}. Those that fail again are listed again.", file=sys.stderr)
    for why in left:
        print(f"Left in the queue: {line(why, 500)}", file=sys.stderr)
    if left:
        raise NotDone(f"{len(left)} could not be redriven, and can be listed again.")


@command(app, "forget", example="dead-letters forget invocations --all --stack NAME")
def forget_letters(
    stack: Stack,
    queue: _QueueName,
    letter_id: _LetterId = None,
    every: Annotated[bool, typer.Option("--all", help="All that are in the queue now.")] = False,
) -> None:
    """Delete one dead letter, or all dead letters of a queue."""
    if (letter_id is None) is not every:
        raise NotDone("Give either --id or --all: a deleted dead letter cannot be redriven.")
    dead = _queue(stack, queue)
    count = 0
    with _received(stack, queue) as letters:
        for letter in _chosen(letters, letter_id):
            dead.delete(letter.receipt_handle)
            letters.remove(letter)
            count += 1
    print(f"Deleted: {count}.", file=sys.stderr)


@contextmanager
def _received(stack: Stack, queue: Queue) -> Iterator[list[_Dead]]:
    """Receive all dead letters of a queue, and release those that are still in the list on exit.

    All are received before the first is redriven: one that fails again comes back as a new dead letter. After a crash,
    those that were not released are hidden for at most `LOOK_SECONDS`.
    """
    letters = list(_RECEIVE[queue](stack))
    try:
        yield letters
    finally:
        if not _queue(stack, queue).release(letter.receipt_handle for letter in letters):
            print(f"Some of them are hidden from the next command for {LOOK_SECONDS} seconds.", file=sys.stderr)


def _chosen(letters: Sequence[_Dead], letter_id: str | None) -> list[_Dead]:
    chosen = [letter for letter in letters if letter_id in (None, letter.id)]
    if letter_id is not None and not chosen:
        raise NotDone(
            f"Found no dead letter {letter_id[:100]!r}. One that another command is reading is hidden for up to"
            f" {LOOK_SECONDS} seconds."
        )
    return chosen


def _queue(stack: Stack, queue: Queue) -> DeadLetterQueue:
    return DeadLetterQueue(_url(stack, queue), stack.client("sqs"))


# -- by queue ------------------------------------------------------------------------------------------------------


def _requests(stack: Stack) -> Iterator[_Dead]:
    dead = DeadRequests(_url(stack, Queue.REQUESTS), stack.client("sqs"), lambda: stack.outputs_bucket)
    function = stack.resource("StartFromQueueFunction")
    for each in sorted(dead.receive(LOOK_SECONDS), key=lambda request: request.sent_at):

        def redrive(request: DeadRequest = each) -> None:
            if stack.invoke(function, request.event())["batchItemFailures"]:
                raise _Left("AWS did not start it; see the log of start_from_queue")

        row = (second(each.sent_at), line(each.reason, 100), line(hidden(each.body), _SHOWN_CHARACTERS))
        shown = ("id", "sender", "sent_at", "reason", "body")
        yield _Dead(each.id, row, {name: getattr(each, name) for name in shown}, redrive, each.receipt_handle)


def _webhooks(stack: Stack) -> Iterator[_Dead]:
    deliveries = DeliveriesQueue(stack.output("DeliveriesQueueUrl"), stack.client("sqs"))
    for each in DeadLetters(_url(stack, Queue.WEBHOOKS), stack.client("sqs")).receive(LOOK_SECONDS):
        delivery = each.delivery

        def redrive(delivery: Any = delivery) -> None:
            if delivery is None:
                raise _Left("not a delivery")
            # For another 24 hours, under the same webhook-id: the receiver can recognize a duplicate.
            deliveries.send(replace(delivery, first_at=int(time.time())))

        row = (delivery.event, second(delivery.first_at)) if delivery else ("-", "-")
        whole = {**(delivery.fields() if delivery else {"message": each.body}), "reason": each.reason}
        yield _Dead(delivery.id if delivery else "-", (*row, each.reason), whole, redrive, each.receipt_handle)


def _changes(stack: Stack) -> Iterator[_Dead]:
    function = stack.resource("PublishChangesFunction")
    for letter, body in _records(stack, Queue.CHANGES):
        part = body.get("DDBStreamBatchInfo", {})
        first, last = (str(part.get(f"approximateArrivalOf{which}Record", "-")) for which in ("First", "Last"))

        if (retry := read_dead_letter(letter.body, time.time())) is not None:
            yield _effect(stack, letter, body, retry)
            continue

        def redrive(part: Any = part) -> None:
            records = _read_stream(stack, part, function)
            if records and (failures := stack.invoke(function, {"Records": records})["batchItemFailures"]):
                raise _Left(f"publish_changes fails from record {failures[0]['itemIdentifier']} on; see its log")

        row = (str(part.get("batchSize", "-")), first, last, "publish_changes failed every time; see its log")
        yield _Dead(letter.id, row, {"id": letter.id, **part}, redrive, letter.receipt_handle)


def _effect(stack: Stack, letter: DeadMessage, body: Mapping[str, Any], retry: Retry) -> _Dead:
    """Make a dead letter of one effect of a change.

    The effect failed for a day, or publish_changes crashed on it.
    """

    def redrive() -> None:
        queue, dead = stack.resource("ChangesRetryQueue"), stack.resource(QUEUES[Queue.CHANGES])
        RetryQueue(queue, dead, stack.client("sqs")).send(retry, 0)

    reason = str(body.get("reason", "publish_changes crashed on it every time; see its log"))
    changed = second(int(retry.record["dynamodb"]["ApproximateCreationDateTime"]))
    what = {"effect": retry.effect.value, "of": retry.record["dynamodb"]["Keys"]["pk"]["S"], "reason": reason}
    row = ("1", changed, changed, f"{retry.effect}: {reason}")
    return _Dead(letter.id, row, {"id": letter.id, **what}, redrive, letter.receipt_handle)


def _run_jobs(stack: Stack) -> Iterator[_Dead]:
    function = stack.resource("RunPredictionFunction")
    lambda_ = stack.client("lambda")
    for letter, body in _records(stack, Queue.RUN_JOBS):
        context, job = body.get("requestContext", {}), body.get("requestPayload")
        request_id, reason = str(context.get("requestId", "-")), _why(body)
        if isinstance(job, dict) and job.keys() == {"request_id", "job"}:
            request_id, job = str(job["request_id"]), job["job"]  # redriven before

        def redrive(job: Any = job, request_id: str = request_id) -> None:
            if not isinstance(job, dict):
                raise _Left("not an invocation of run_prediction")
            # With the id of the first invocation it starts nothing twice. No caller waits for it any longer.
            again = {"request_id": request_id, "job": job}
            lambda_.invoke(FunctionName=function, InvocationType="Event", Payload=json.dumps(again).encode())

        row = (str(body.get("timestamp", "-")), reason)
        whole = {"id": request_id, "reason": reason, "timestamp": body.get("timestamp"), "job": job}
        yield _Dead(request_id, row, whole, redrive, letter.receipt_handle)


def _invocations(stack: Stack) -> Iterator[_Dead]:
    def redrive() -> None:
        raise _Left("nothing to redrive: the next sweep does the work")

    for letter, body in _records(stack, Queue.INVOCATIONS):
        function = str(body.get("requestContext", {}).get("functionArn", "the schedule of the sweep"))
        name = function.partition(":function:")[2].partition(":")[0] or function
        row = (name, second(letter.sent_at), _why(body))
        whole = {"id": letter.id, "function": name, "sent_at": letter.sent_at, "reason": _why(body)}
        yield _Dead(letter.id, row, whole, redrive, letter.receipt_handle)


def _url(stack: Stack, queue: Queue) -> str:
    return stack.resource(QUEUES[queue])


def _records(stack: Stack, queue: Queue) -> Iterator[tuple[DeadMessage, dict[str, Any]]]:
    """Receive dead letters that AWS itself wrote, with their parsed bodies."""
    for letter in _queue(stack, queue).receive(LOOK_SECONDS):
        try:
            body = json.loads(letter.body)
        except ValueError:
            body = None
        yield letter, body if isinstance(body, dict) else {}


def _why(body: Mapping[str, Any]) -> str:
    """Say why an invocation failed.

    https://docs.aws.amazon.com/lambda/latest/dg/invocation-async-retain-records.html
    """
    payload = body.get("responsePayload")
    error = payload.get("errorMessage") or payload.get("errorType") if isinstance(payload, dict) else None
    return line(str(error or body.get("requestContext", {}).get("condition", "invocation failed")), 200)


def _read_stream(stack: Stack, part: Mapping[str, Any], function: str) -> list[dict[str, Any]]:
    """Read a part of the table's stream, as Lambda passes it to the function.

    https://docs.aws.amazon.com/lambda/latest/dg/services-dynamodb-errors.html
    """
    streams = stack.client("dynamodbstreams")
    if not {"streamArn", "shardId", "startSequenceNumber", "endSequenceNumber"} <= part.keys():
        raise _Left("names no part of the stream")
    start, end = int(part["startSequenceNumber"]), int(part["endSequenceNumber"])
    first, last = (part.get(f"approximateArrivalOf{which}Record") for which in ("First", "Last"))
    gone = (
        "no longer in the stream, which keeps records for 24 hours: use `webhooks redeliver` for predictions that"
        f" completed from {first} to {last}, then `dead-letters forget`"
    )
    try:
        iterator = streams.get_shard_iterator(
            StreamArn=part["streamArn"],
            ShardId=part["shardId"],
            ShardIteratorType="AT_SEQUENCE_NUMBER",
            SequenceNumber=part["startSequenceNumber"],
        )["ShardIterator"]
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("TrimmedDataAccessException", "ResourceNotFoundException"):
            raise
        raise _Left(gone) from None
    patterns = _patterns(stack, function)
    records: list[dict[str, Any]] = []
    empty = 0
    while iterator and empty < _EMPTY_PAGES:
        page = streams.get_records(ShardIterator=iterator)
        iterator = page.get("NextShardIterator")
        empty = 0 if page["Records"] else empty + 1
        for record in page["Records"]:
            number = int(record["dynamodb"]["SequenceNumber"])
            if start <= number <= end and any(_passes(pattern, record) for pattern in patterns):
                at: datetime = record["dynamodb"]["ApproximateCreationDateTime"]
                change = {**record["dynamodb"], "ApproximateCreationDateTime": at.astimezone(UTC).timestamp()}
                records.append({**record, "dynamodb": change})
            if number >= end:
                return records
    # The missing records would be lost with the dead letter.
    raise _Left("the stream did not return all of it; retry")


def _patterns(stack: Stack, function: str) -> list[Any]:
    """Return the filter patterns of the function's event source.

    Without a filter, one pattern that accepts everything.
    """
    found = stack.client("lambda").list_event_source_mappings(FunctionName=function)["EventSourceMappings"]
    filters = [each for source in found for each in source.get("FilterCriteria", {}).get("Filters", [])]
    return [json.loads(each["Pattern"]) for each in filters] or [{}]


def _passes(pattern: Any, value: Any) -> bool:
    """Check whether a record passes a filter.

    Supports what the filters of this stack use: names, lists of strings, `prefix` and `exists`.
    """
    if isinstance(pattern, dict):
        return isinstance(value, dict) and all(_passes(each, value.get(name)) for name, each in pattern.items())
    if pattern == [{"exists": True}]:
        return value is not None
    prefixes = tuple(each["prefix"] for each in pattern if isinstance(each, dict))
    return value in pattern or (isinstance(value, str) and bool(prefixes) and value.startswith(prefixes))


_RECEIVE: Mapping[Queue, Callable[[Stack], Iterator[_Dead]]] = {
    Queue.REQUESTS: _requests,
    Queue.WEBHOOKS: _webhooks,
    Queue.CHANGES: _changes,
    Queue.RUN_JOBS: _run_jobs,
    Queue.INVOCATIONS: _invocations,
}
