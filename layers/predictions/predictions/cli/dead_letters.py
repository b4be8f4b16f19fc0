"""What was given up: dead letters of each queue, listed, tried once more, forgotten."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from botocore.exceptions import ClientError

from predictions.change_retries import Retry, RetryQueue, read_dead_letter
from predictions.cli.stack import NotDone, Stack, hidden, line, print_table, second
from predictions.dead_letters import DeadLetterQueue, Letter
from predictions.dead_requests import DeadRequest, DeadRequests
from predictions.deliveries import DeadLetters, DeliveriesQueue

LOOK_SECONDS = 30
"""For how long what has been shown, or tried, is hidden from the next look."""

_SHOWN_CHARACTERS = 60
# A stream answers with nothing now and then.
_EMPTY_PAGES = 5


class _Left(Exception):
    """A letter that a redrive leaves where it is; its text says why."""


@dataclass(frozen=True)
class _Dead:
    """A dead letter of any queue.

    Attributes:
        id: By which commands know it.
        row: What a line of the list shows of it besides.
        whole: What the list as JSON shows of it.
        redrive: Tries it once more, or raises `_Left`.
        receipt_handle: Deletes it.
    """

    id: str
    row: tuple[str, ...]
    whole: Mapping[str, Any]
    redrive: Callable[[], None]
    receipt_handle: str


def count_letters(stack: Stack, arguments: argparse.Namespace) -> None:
    """How many there are of each queue."""
    sqs = stack.client("sqs")
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    counts = {}
    for name, logical_id in QUEUES.items():
        url = stack.resource(logical_id)
        known = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
        counts[name] = sum(int(known[each]) for each in names)
    if arguments.json:
        print(json.dumps(counts, indent=2))
        return
    print_table(("QUEUE", "LETTERS"), [(name, str(count)) for name, count in counts.items()])


def list_letters(stack: Stack, arguments: argparse.Namespace) -> None:
    """All of one queue, with why they are there."""
    letters = list(_LOOK[arguments.queue](stack))
    if arguments.json:
        print(json.dumps([letter.whole for letter in letters], indent=2))
        return
    print_table(("ID", *_COLUMNS[arguments.queue]), [(letter.id, *letter.row) for letter in letters])


def redrive_letters(stack: Stack, arguments: argparse.Namespace) -> None:
    """Tries all of one queue once more, or one of them."""
    queue = DeadLetterQueue(stack.resource(QUEUES[arguments.queue]), stack.client("sqs"))
    count, left = 0, []
    for letter in _chosen(stack, arguments):
        try:
            letter.redrive()
        except (_Left, NotDone) as reason:  # one that cannot be tried keeps no other from it
            left.append(f"{letter.id}: {reason}")
            continue
        # In this order: a crash in between tries it twice, which starts and tells nothing twice, and loses nothing.
        queue.forget(letter.receipt_handle)
        count += 1
    print(f"Tried once more: {count}. What fails again is listed again.", file=sys.stderr)
    for why in left:
        print(f"Left where it is: {line(why, 500)}", file=sys.stderr)
    if left:
        raise NotDone(f"{len(left)} could not be tried, and can be listed again in {LOOK_SECONDS} seconds.")


def forget_letters(stack: Stack, arguments: argparse.Namespace) -> None:
    """Deletes one, or all that there are now."""
    if (arguments.id is None) is not arguments.all:
        raise NotDone("Give either --id or --all: what is forgotten cannot be tried any more.")
    queue = DeadLetterQueue(stack.resource(QUEUES[arguments.queue]), stack.client("sqs"))
    count = 0
    for letter in _chosen(stack, arguments):
        queue.forget(letter.receipt_handle)
        count += 1
    print(f"Forgotten: {count}.", file=sys.stderr)


def _chosen(stack: Stack, arguments: argparse.Namespace) -> list[_Dead]:
    # Before any is tried: one that fails again comes back as a new letter, which would be met once more.
    letters = list(_LOOK[arguments.queue](stack))
    chosen = [letter for letter in letters if arguments.id in (None, letter.id)]
    if arguments.id is not None and not chosen:
        raise NotDone(
            f"There is no dead letter {arguments.id[:100]!r}. One that was listed is hidden for {LOOK_SECONDS} seconds."
        )
    return chosen


# -- by queue ------------------------------------------------------------------------------------------------------


def _requests(stack: Stack) -> Iterator[_Dead]:
    dead = DeadRequests(_url(stack, "requests"), stack.client("sqs"), lambda: stack.outputs_bucket)
    function = stack.resource("StartFromQueueFunction")
    for each in sorted(dead.look(LOOK_SECONDS), key=lambda request: request.sent_at):

        def redrive(request: DeadRequest = each) -> None:
            if stack.invoke(function, request.event())["batchItemFailures"]:
                raise _Left("AWS did not let it start; see the log of start_from_queue")

        row = (second(each.sent_at), line(each.reason, 100), line(hidden(each.body), _SHOWN_CHARACTERS))
        shown = ("id", "sender", "sent_at", "reason", "body")
        yield _Dead(each.id, row, {name: getattr(each, name) for name in shown}, redrive, each.receipt_handle)


def _webhooks(stack: Stack) -> Iterator[_Dead]:
    deliveries = DeliveriesQueue(stack.output("DeliveriesQueueUrl"), stack.client("sqs"))
    for each in DeadLetters(_url(stack, "webhooks"), stack.client("sqs")).look(LOOK_SECONDS):
        delivery = each.delivery

        def redrive(delivery: Any = delivery) -> None:
            if delivery is None:
                raise _Left("it is no delivery")
            # For another 24 hours; under the same webhook-id, by which the receiver can tell.
            deliveries.send(replace(delivery, first_at=int(time.time())))

        row = (delivery.event, second(delivery.first_at)) if delivery else ("-", "-")
        whole = {**(asdict(delivery) if delivery else {"message": each.body}), "reason": each.reason}
        yield _Dead(delivery.id if delivery else "-", (*row, each.reason), whole, redrive, each.receipt_handle)


def _changes(stack: Stack) -> Iterator[_Dead]:
    function = stack.resource("PublishChangesFunction")
    for letter, body in _records(stack, "changes"):
        part = body.get("DDBStreamBatchInfo", {})
        first, last = (str(part.get(f"approximateArrivalOf{which}Record", "-")) for which in ("First", "Last"))

        if (retry := read_dead_letter(letter.body, time.time())) is not None:
            yield _effect(stack, letter, body, retry)
            continue

        def redrive(part: Any = part) -> None:
            records = _read_stream(stack, part, function)
            if records and (failures := stack.invoke(function, {"Records": records})["batchItemFailures"]):
                raise _Left(f"publish_changes fails from {failures[0]['itemIdentifier']} on; see its log")

        row = (str(part.get("batchSize", "-")), first, last, "publish_changes failed each time: see its log")
        yield _Dead(letter.id, row, {"id": letter.id, **part}, redrive, letter.receipt_handle)


def _effect(stack: Stack, letter: Letter, body: Mapping[str, Any], retry: Retry) -> _Dead:
    """An effect of one change that was retried for a day, or over which publish_changes died."""

    def redrive() -> None:
        queue, dead = stack.resource("ChangesRetryQueue"), stack.resource(QUEUES["changes"])
        RetryQueue(queue, dead, stack.client("sqs")).send(retry, 0)

    reason = str(body.get("reason", "publish_changes died over it each time: see its log"))
    changed = second(int(retry.record["dynamodb"]["ApproximateCreationDateTime"]))
    what = {"effect": retry.effect.value, "of": retry.record["dynamodb"]["Keys"]["pk"]["S"], "reason": reason}
    row = ("1", changed, changed, f"{retry.effect}: {reason}")
    return _Dead(letter.id, row, {"id": letter.id, **what}, redrive, letter.receipt_handle)


def _run_jobs(stack: Stack) -> Iterator[_Dead]:
    function = stack.resource("RunPredictionFunction")
    lambda_ = stack.client("lambda")
    for letter, body in _records(stack, "run-jobs"):
        context, job = body.get("requestContext", {}), body.get("requestPayload")
        request_id, reason = str(context.get("requestId", "-")), _why(body)
        if isinstance(job, dict) and job.keys() == {"request_id", "job"}:
            request_id, job = str(job["request_id"]), job["job"]  # it was redriven before

        def redrive(job: Any = job, request_id: str = request_id) -> None:
            if not isinstance(job, dict):
                raise _Left("it is no invocation of run_prediction")
            # Its id is what the first one was known by, and so it starts nothing twice. Nobody waits for it now either.
            again = {"request_id": request_id, "job": job}
            lambda_.invoke(FunctionName=function, InvocationType="Event", Payload=json.dumps(again).encode())

        row = (str(body.get("timestamp", "-")), reason)
        whole = {"id": request_id, "reason": reason, "timestamp": body.get("timestamp"), "job": job}
        yield _Dead(request_id, row, whole, redrive, letter.receipt_handle)


def _invocations(stack: Stack) -> Iterator[_Dead]:
    def redrive() -> None:
        raise _Left("nothing of it is to be done again: the next sweep does it")

    for letter, body in _records(stack, "invocations"):
        function = str(body.get("requestContext", {}).get("functionArn", "the schedule of the sweep"))
        name = function.partition(":function:")[2].partition(":")[0] or function
        row = (name, second(letter.sent_at), _why(body))
        whole = {"id": letter.id, "function": name, "sent_at": letter.sent_at, "reason": _why(body)}
        yield _Dead(letter.id, row, whole, redrive, letter.receipt_handle)


def _url(stack: Stack, queue: str) -> str:
    return stack.resource(QUEUES[queue])


def _records(stack: Stack, queue: str) -> Iterator[tuple[Letter, dict[str, Any]]]:
    """Letters that AWS itself wrote, with what is in them."""
    for letter in DeadLetterQueue(_url(stack, queue), stack.client("sqs")).look(LOOK_SECONDS):
        try:
            body = json.loads(letter.body)
        except ValueError:
            body = None
        yield letter, body if isinstance(body, dict) else {}


def _why(body: Mapping[str, Any]) -> str:
    """Why an invocation failed.

    https://docs.aws.amazon.com/lambda/latest/dg/invocation-async-retain-records.html
    """
    said = body.get("responsePayload")
    error = said.get("errorMessage") or said.get("errorType") if isinstance(said, dict) else None
    return line(str(error or body.get("requestContext", {}).get("condition", "it could not be invoked")), 200)


def _read_stream(stack: Stack, part: Mapping[str, Any], function: str) -> list[dict[str, Any]]:
    """A part of the table's stream, as Lambda passes it to the function.

    https://docs.aws.amazon.com/lambda/latest/dg/services-dynamodb-errors.html
    """
    streams = stack.client("dynamodbstreams")
    if not {"streamArn", "shardId", "startSequenceNumber", "endSequenceNumber"} <= part.keys():
        raise _Left("it names no part of the stream")
    start, end = int(part["startSequenceNumber"]), int(part["endSequenceNumber"])
    gone = (
        "the stream has forgotten it, after 24 hours: use webhooks redeliver for what ended from"
        f" {part.get('approximateArrivalOfFirstRecord')} to {part.get('approximateArrivalOfLastRecord')},"
        " then forget it"
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
        answer = streams.get_records(ShardIterator=iterator)
        iterator = answer.get("NextShardIterator")
        empty = 0 if answer["Records"] else empty + 1
        for record in answer["Records"]:
            number = int(record["dynamodb"]["SequenceNumber"])
            if start <= number <= end and any(_passes(pattern, record) for pattern in patterns):
                at: datetime = record["dynamodb"]["ApproximateCreationDateTime"]
                change = {**record["dynamodb"], "ApproximateCreationDateTime": at.astimezone(UTC).timestamp()}
                records.append({**record, "dynamodb": change})
            if number >= end:
                return records
    # What is missing would be forgotten with the letter.
    raise _Left("the stream did not give all of it: try again")


def _patterns(stack: Stack, function: str) -> list[Any]:
    """Of which records the function is told; of all where its event source has no filter."""
    found = stack.client("lambda").list_event_source_mappings(FunctionName=function)["EventSourceMappings"]
    filters = [each for source in found for each in source.get("FilterCriteria", {}).get("Filters", [])]
    return [json.loads(each["Pattern"]) for each in filters] or [{}]


def _passes(pattern: Any, value: Any) -> bool:
    """Whether a record passes a filter, as far as those of this stack go: names, lists of texts, `prefix`, `exists`."""
    if isinstance(pattern, dict):
        return isinstance(value, dict) and all(_passes(each, value.get(name)) for name, each in pattern.items())
    if pattern == [{"exists": True}]:
        return value is not None
    prefixes = tuple(each["prefix"] for each in pattern if isinstance(each, dict))
    return value in pattern or (isinstance(value, str) and bool(prefixes) and value.startswith(prefixes))


QUEUES = {
    "requests": "RequestsDeadLetterQueue",
    "webhooks": "DeliveriesDeadLetterQueue",
    "changes": "ChangesDeadLetterQueue",
    "run-jobs": "RunJobsDeadLetterQueue",
    "invocations": "InvocationsDeadLetterQueue",
}
"""The dead-letter queues, by how commands call them."""

_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "requests": ("SENT", "REASON", "BODY"),
    "webhooks": ("EVENT", "DUE", "REASON"),
    "changes": ("RECORDS", "FROM", "TO", "REASON"),
    "run-jobs": ("FAILED", "REASON"),
    "invocations": ("FUNCTION", "SENT", "REASON"),
}

_LOOK: Mapping[str, Callable[[Stack], Iterator[_Dead]]] = {
    "requests": _requests,
    "webhooks": _webhooks,
    "changes": _changes,
    "run-jobs": _run_jobs,
    "invocations": _invocations,
}
