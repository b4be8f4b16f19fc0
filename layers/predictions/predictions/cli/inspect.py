"""Commands to inspect predictions: the timeline of one, the stalled ones."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import product
from typing import Annotated, Any

import typer
from botocore.exceptions import ClientError

from predictions.aws.dynamodb import Condition, Table
from predictions.aws.executions import Executions
from predictions.cli.stack import (
    JsonList,
    JsonObject,
    NotDone,
    PredictionId,
    Stack,
    command,
    found,
    group,
    line,
    print_table,
    second,
)
from predictions.lifecycle.evidence import undecided_ids
from predictions.lifecycle.tracking import Tracking
from predictions.status import TERMINAL_RANK, rank_of
from predictions.store.keys import PREDICTION, prediction_key
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction

app = group()

_STUCK_LIMIT = 1000
_LOG_LINES_LIMIT = 200
# The fields of a log line that are shown. An exception's text is never shown: it may contain anything.
_LOGGED = ("status", "change", "upstream_id", "reason", "wait_seconds", "files", "failed", "path", "event", "execution")
_YEAR_10000 = 253_402_300_800
_DURATION = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class _Moment:
    at: float
    where: str
    what: str


@command(app, "show", example="show yyys72zxolexwjthl2aalbmehp --stack NAME")
def show(
    stack: Stack,
    prediction_id: PredictionId,
    with_input: Annotated[bool, typer.Option("--input", help="Include the input.")] = False,
    with_output: Annotated[bool, typer.Option("--output", help="Include the output and the model's logs.")] = False,
    no_log: Annotated[
        bool, typer.Option("--no-log", help="Do not search the functions' log, which may take a while.")
    ] = False,
    as_json: JsonObject = False,
) -> None:
    """Show the timeline of a prediction and what it is waiting for.

    Prints its fields, its files and its timeline.
    """
    table = stack.table
    prediction = found(table, prediction_id)
    machines = _machines(stack)
    timeline = [*_of_item(prediction), *_of_executions(stack, machines, prediction)]
    if not no_log:
        timeline += _of_log(stack, prediction)
    # By the millisecond that is shown: the order of what happened in the same one stays.
    timeline.sort(key=lambda moment: _milliseconds(moment.at))
    sizes = _sizes(stack, prediction)
    running = Tracking(table, *machines).status(prediction)
    shown: dict[str, Any] = {
        "id": prediction.id,
        "object": prediction.object,
        "owner": prediction.owner,
        "source": prediction.source,
        "origin": prediction.origin_kind,
        "origin_names": dict(prediction.origin) or None,
        "model": prediction.shown_model or None,
        "version": prediction.upstream_version or prediction.version,
        "status": prediction.visible,
        "upstream_id": prediction.upstream_id,
        "upstream_status": prediction.reported_status,
        "orphans": sorted(prediction.orphans),
        "execution": f"{prediction.id}-{prediction.execution_n} ({running or 'never started'})",
        "deadline": second(prediction.deadline),
        "webhook": prediction.webhook is not None,
        "error": prediction.error,
        "cost": prediction.cost.shown if prediction.cost else None,
        "characters": sizes,
        "files": [file.to_item() for file in table.stored_files(prediction)],
        "waits_for": waits_for(prediction, running, time.time()),
        "story": [{"at": _exact(each.at), "where": each.where, "what": each.what} for each in timeline],
    }
    if with_input or with_output:
        whole = table.read(prediction.id)
        shown |= {"input": whole.input if whole else None} if with_input else {}
        shown |= (
            {"output": whole.output if whole else None, "logs": whole.logs if whole else None} if with_output else {}
        )
    if as_json:
        print(json.dumps(shown, indent=2))
        return
    fields = {name: value for name, value in shown.items() if name not in ("story", "files", "characters", "waits_for")}
    fields["characters"] = ", ".join(f"{name} {size}" for name, size in sizes.items())
    print_table(
        ("FIELD", "VALUE"),
        [(name, line(_text(value), 4000)) for name, value in fields.items() if value not in (None, [])],
    )
    if shown["files"]:
        print()
        print_table(
            ("FILE", "BYTES", "OBJECT OR ERROR"),
            [(line(file["path"] or "/", 60), str(file.get("bytes", "-")), line(file.get("key") or file["error"], 300))
             for file in shown["files"]],
        )  # fmt: skip
    print()
    print_table(("TIME", "SOURCE", "EVENT"), [(_exact(each.at), each.where, line(each.what, 300)) for each in timeline])
    print(f"\nWaits for: {shown['waits_for'] or 'nothing, it is finished.'}")


def waits_for(prediction: Prediction, execution: str | None, now: float) -> str | None:
    """Describe what a prediction waits for.

    Args:
        prediction: The prediction.
        execution: The status of its execution, or None if it was never started.
        now: The time.

    Returns:
        A phrase, or None if the prediction is finished.
    """
    if prediction.ended_visibly:
        if prediction.orphans:
            return f"the sweep to cancel {len(prediction.orphans)} orphan(s) at Replicate"
        return "the sweep to finish its deletion" if prediction.deleted and prediction.next_check_at else None
    if execution != "RUNNING":
        return f"the sweep to start another execution: the last one is {execution or 'not found'}"
    if prediction.awaits_copy:
        return "copy_outputs to store its files"
    if prediction.upstream_id:
        overdue = now >= prediction.deadline
        return "Replicate to complete it" + (", or to cancel it because its deadline has passed" if overdue else "")
    if prediction.claimed and undecided_ids(prediction):
        return (
            "a person or its deadline: Replicate's list does not show whether this is one of "
            f"{', '.join(undecided_ids(prediction))}"
        )
    if prediction.claimed:
        return "its create, whose response was lost, to be found at Replicate by webhook or in the list"
    if prediction.submit_at and prediction.submit_at > now:
        return f"its turn to be submitted, at {second(prediction.submit_at)}"
    return "submit_prediction to submit it"


@command(app, "stuck", example="stuck --stack NAME --older-than 1h")
def stuck(
    stack: Stack,
    older_than: Annotated[str, typer.Option(help="Minimum time overdue, such as 90s, 10m, 2h or 1d.")] = "10m",
    as_json: JsonList = False,
) -> None:
    """List what is open and overdue, and what it waits for.

    The longest overdue comes first.
    """
    given = _DURATION.fullmatch(older_than)
    if given is None:
        raise NotDone(f"--older-than {older_than[:20]!r} must be a duration such as 90s, 10m, 2h or 1d.")
    now = time.time()
    table = stack.table
    pks = list(table.due(now - int(given[1]) * _SECONDS[given[2]], _STUCK_LIMIT))
    ids = [pk.removeprefix(PREDICTION) for pk in pks if pk.startswith(PREDICTION)]
    predictions = _get_many(table, ids)
    tracking = Tracking(table, *_machines(stack))
    rows = []
    for pk in pks:
        kind, _, id_ = pk.partition("#")
        prediction = predictions.get(id_)
        if prediction is None:
            # The index is eventually consistent. For batches and pipelines the API shows more.
            rows += [] if kind == "prediction" else [(id_, kind, "-", "-", f"the sweep; see GET /{kind}s/{id_}")]
            continue
        why = waits_for(prediction, tracking.status(prediction), now)
        since = second(prediction.next_check_at) if prediction.next_check_at else "-"
        rows.append((id_, prediction.object, prediction.visible, since, why or "the sweep to remove it from its list"))
    columns = ("ID", "KIND", "STATUS", "DUE SINCE", "WAITS FOR")
    if as_json:
        names = [column.lower().replace(" ", "_") for column in columns]
        print(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2))
        return
    print_table(columns, rows)


def _get_many(table: PredictionsTable, ids: list[str]) -> dict[str, Prediction]:
    found_: dict[str, Prediction] = {}
    for start in range(0, len(ids), 100):
        found_ |= table.get_many(ids[start : start + 100])
    return found_


def _of_item(prediction: Prediction) -> Iterator[_Moment]:
    """List what the status item says, in the order in which it happened.

    The item has most times in whole seconds. Each is shown no earlier, within its second, than what came before it.
    """
    created = _reported_at(prediction.created_at) or prediction.created
    yield _Moment(created, "table", f"created by {prediction.owner} ({prediction.source})")
    if prediction.claimed:
        yield _Moment(_within(prediction.claimed, created), "table", "claimed for submission")
    if prediction.cancel_requested:
        yield _Moment(_within(prediction.cancel_requested, created), "table", "cancellation requested")
    for moment in _of_submissions(prediction):
        yield replace(moment, at=_within(moment.at, created))
    # Stored as Replicate sent it, which need not be a time.
    if prediction.started_at and (started := _reported_at(prediction.started_at)) is not None:
        yield _Moment(started, "Replicate", "the model started")
    completed = _reported_at(prediction.completed_at or "")
    # The stack itself ends what Replicate never ran, or does not know any more.
    if completed is not None and rank_of(prediction.reported_status or "") >= TERMINAL_RANK:
        yield _Moment(completed, "Replicate", f"completed: {prediction.reported_status}")
    if prediction.ended:
        ended = _within(prediction.ended, created if completed is None else completed)
        yield _Moment(ended, "table", f"finished: {prediction.visible}")
    if prediction.deleted:
        yield _Moment(_within(prediction.deleted, created), "table", "data deleted by the owner")


def _of_submissions(prediction: Prediction) -> Iterator[_Moment]:
    """List submissions with an unknown outcome, and readings of Replicate's list."""
    for submission in json.loads(prediction.submissions_json or "[]"):
        yield _Moment(submission["at"], "table", f"submitted, outcome unknown: {submission['outcome']}")
    for reading in json.loads(prediction.readings_json or "[]"):
        saw = f"read Replicate's list: {reading['pages']} pages, {reading['entries']} predictions"
        if "why_not" in reading:
            what = f"this is no evidence, since {reading['why_not']}"
        elif "undecided" in reading:
            more = reading["number"] - len(reading["undecided"])
            named = ", ".join(reading["undecided"]) + (f" and {more} more" if more > 0 else "")
            what = f"undecidable: {named}"
        else:
            what = "none of them is this one"
        yield _Moment(reading["at"], "table", f"{saw}; {what}")
    if prediction.evidence_at:
        yield _Moment(prediction.evidence_at, "table", "evidence of absence: two complete readings do not show it")
    if prediction.bound_at:
        times = prediction.unknown_creates
        yield _Moment(prediction.bound_at, "table", f"bound, after {times} submissions that started nothing")


def _machines(stack: Stack) -> tuple[Executions, Executions]:
    """Return the two state machines that track predictions: the one that submits them, and the other."""
    names = ("TrackPredictionStateMachineArn", "TrackSubmittedStateMachineArn")
    submitting, submitted = (Executions(stack.output(name), stack.client("stepfunctions")) for name in names)
    return submitting, submitted


def _of_executions(stack: Stack, machines: tuple[Executions, ...], prediction: Prediction) -> Iterator[_Moment]:
    stepfunctions = stack.client("stepfunctions")
    # The item names the machine of the last one only; no number is used in both.
    for n, machine in product(range(1, prediction.execution_n + 1), machines):
        arn, where = machine.arn(prediction.id, n), f"execution {n}"
        try:
            execution = stepfunctions.describe_execution(executionArn=arn)
            pages = stepfunctions.get_paginator("get_execution_history").paginate(
                executionArn=arn, includeExecutionData=False
            )
            for event in (event for page in pages for event in page["events"]):
                if entered := event.get("stateEnteredEventDetails"):
                    yield _Moment(event["timestamp"].timestamp(), where, f"enters {entered['name']}")
        except stepfunctions.exceptions.ExecutionDoesNotExist:
            # Step Functions keeps them for 90 days.
            continue
        if "stopDate" in execution:
            yield _Moment(execution["stopDate"].timestamp(), where, execution["status"])


def _of_log(stack: Stack, prediction: Prediction) -> Iterator[_Moment]:
    """Read what the functions logged about a prediction."""
    logs = stack.client("logs")
    # Earlier releases named the group after the stack; an upgrade leaves it with what was logged before.
    before = f"/aws/lambda/{stack.name}"
    try:
        found = [each["logGroupName"] for each in logs.describe_log_groups(logGroupNamePrefix=before)["logGroups"]]
        groups = {name for name in found if name == before or name.startswith(f"{before}-")}
        for name in sorted(groups | {stack.resource("FunctionsLogGroup")}):
            pages = logs.get_paginator("filter_log_events").paginate(
                logGroupName=name,
                filterPattern=f'"{prediction.id}"',
                startTime=max(0, prediction.created - 60) * 1000,
                PaginationConfig={"MaxItems": _LOG_LINES_LIMIT},
            )
            for event in (event for page in pages for event in page["events"]):
                if logged := _logged(event["message"], prediction.id):
                    yield _Moment(event["timestamp"] / 1000, *logged)
    except ClientError as error:
        yield _Moment(time.time(), "log", f"cannot be read: {error.response['Error']['Code']}")


def _logged(message: str, prediction_id: str) -> tuple[str, str] | None:
    try:
        entry = json.loads(message)
    except ValueError:
        return None
    if not isinstance(entry, dict) or entry.get("correlation_id") != prediction_id or "_aws" in entry:
        return None
    details = [f"{name}={entry[name]}" for name in _LOGGED if entry.get(name) not in (None, "")]
    function = str(entry.get("function_name", "log"))
    where = re.sub(r"^.*-(\w+)Function-.*$", r"\1", function)
    return where, " ".join([f"{entry.get('level', '')}:", str(entry.get("message", ""))[:200], *details])


def _sizes(stack: Stack, prediction: Prediction) -> dict[str, int]:
    partition = Condition("pk = :pk", pk=prediction_key(prediction.id).pk)
    items = Table(stack.output("TableName"), stack.client("dynamodb")).query(partition, only="sk, length")
    inline = {"input": prediction.input_json, "result": prediction.result_json}
    return {name: len(text) for name, text in inline.items() if text is not None} | {
        str(item["sk"]).partition("#")[0]: int(item["length"]) for item in items if "length" in item
    }


def _reported_at(text: str) -> float | None:
    with suppress(ValueError, OverflowError):
        at = datetime.fromisoformat(text).timestamp()
        return at if 0 <= at < _YEAR_10000 else None
    return None


def _within(at: float, after: float) -> float:
    """Return a time in whole seconds; `after` if that lies in the same second."""
    return after if int(after) == at else at


def _milliseconds(moment: float) -> int:
    # A float has a time of today to less than a microsecond: rounded down, it would lose a millisecond.
    return round(moment * 1_000_000) // 1000


def _exact(moment: float) -> str:
    seconds, milliseconds = divmod(_milliseconds(moment), 1000)
    return f"{second(seconds)[:-1]}.{milliseconds:03}Z"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
