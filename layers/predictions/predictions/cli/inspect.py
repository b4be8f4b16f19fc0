"""What happened to a prediction, what it waits for, and which ones stand still."""

import argparse
import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from botocore.exceptions import ClientError

from predictions.cli.stack import NotDone, Stack, found, line, print_table, second
from predictions.executions import Executions
from predictions.items import deserialize, serialize
from predictions.table import Prediction, PredictionsTable

_STUCK_LIMIT = 1000
_LOG_LINES_LIMIT = 200
# What of a log line is shown: never an exception's text, which may be of anything.
_TOLD = ("status", "change", "upstream_id", "reason", "wait_seconds", "files", "failed", "path", "event", "execution")
_YEAR_10000 = 253_402_300_800
_DURATION = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class _Moment:
    at: float
    where: str
    what: str


def show(stack: Stack, arguments: argparse.Namespace) -> None:
    """One prediction: what it is, what happened when, its files, and what it waits for."""
    table = stack.table
    prediction = found(table, arguments.id)
    executions = Executions(stack.output("TrackPredictionStateMachineArn"), stack.client("stepfunctions"))
    story = [*_of_item(prediction), *_of_executions(stack, executions, prediction)]
    if not arguments.no_log:
        story += _of_log(stack, prediction)
    story.sort(key=lambda moment: moment.at)
    sizes = _sizes(stack, prediction)
    running = executions.status(prediction.id, prediction.execution_n)
    shown: dict[str, Any] = {
        "id": prediction.id,
        "object": prediction.object,
        "owner": prediction.owner,
        "source": prediction.source,
        "model": prediction.model or prediction.name,
        "version": prediction.upstream_version or prediction.version,
        "status": prediction.visible,
        "upstream_id": prediction.upstream_id,
        "upstream_status": prediction.status,
        "orphans": sorted(prediction.orphans),
        "execution": f"{prediction.id}-{prediction.execution_n} ({running or 'never started'})",
        "deadline": second(prediction.deadline),
        "webhook": prediction.webhook is not None,
        "error": prediction.error,
        "characters": sizes,
        "files": [file.to_item() for file in table.stored_files(prediction)],
        "waits_for": waits_for(prediction, running, time.time()),
        "story": [{"at": _exact(each.at), "where": each.where, "what": each.what} for each in story],
    }
    if arguments.input or arguments.output:
        whole = table.read(prediction.id)
        shown |= {"input": whole.input if whole else None} if arguments.input else {}
        shown |= (
            {"output": whole.output if whole else None, "logs": whole.logs if whole else None}
            if arguments.output
            else {}
        )
    if arguments.json:
        print(json.dumps(shown, indent=2))
        return
    told = {name: value for name, value in shown.items() if name not in ("story", "files", "characters", "waits_for")}
    told["characters"] = ", ".join(f"{name} {size}" for name, size in sizes.items())
    print_table(
        ("WHAT", "IS"), [(name, line(_text(value), 4000)) for name, value in told.items() if value not in (None, [])]
    )
    if shown["files"]:
        print()
        print_table(
            ("FILE", "BYTES", "OBJECT, OR WHY THERE IS NONE"),
            [(line(file["path"] or "/", 60), str(file.get("bytes", "-")), line(file.get("key") or file["error"], 300))
             for file in shown["files"]],
        )  # fmt: skip
    print()
    print_table(("WHEN", "WHERE", "WHAT"), [(_exact(each.at), each.where, line(each.what, 300)) for each in story])
    print(f"\nIt waits for: {shown['waits_for'] or 'nothing; this is its end.'}")


def waits_for(prediction: Prediction, execution: str | None, now: float) -> str | None:
    """What a prediction waits for, in a sentence, given its execution's status; None where it has ended."""
    if prediction.ended_visibly:
        if prediction.orphans:
            return f"the sweep to cancel {len(prediction.orphans)} orphan(s) of it at Replicate"
        return "the sweep to finish its deletion" if prediction.deleted and prediction.next_check_at else None
    if execution != "RUNNING":
        return f"the sweep to start another execution, since this one is {execution or 'not there'}"
    if prediction.awaits_copy:
        return "copy_outputs to store its files"
    if prediction.upstream_id:
        overdue = now >= prediction.deadline
        return "Replicate to end it" + (", which is asked to cancel it, its deadline being over" if overdue else "")
    if prediction.claimed:
        return "its create, whose answer was lost, to be found at Replicate, by its webhook or in the list"
    if prediction.submit_at and prediction.submit_at > now:
        return f"its turn to be submitted, at {second(prediction.submit_at)}"
    return "submit_prediction to submit it"


def stuck(stack: Stack, arguments: argparse.Namespace) -> None:
    """What is open and should have moved on some time ago, the longest overdue first."""
    given = _DURATION.fullmatch(arguments.older_than)
    if given is None:
        raise NotDone(f"--older-than {arguments.older_than[:20]!r} must be a time such as 90s, 10m, 2h or 1d.")
    now = time.time()
    table = stack.table
    pks = list(table.due(now - int(given[1]) * _SECONDS[given[2]], _STUCK_LIMIT))
    ids = [pk.removeprefix("prediction#") for pk in pks if pk.startswith("prediction#")]
    predictions = _get_many(table, ids)
    executions = Executions(stack.output("TrackPredictionStateMachineArn"), stack.client("stepfunctions"))
    rows = []
    for pk in pks:
        kind, _, id_ = pk.partition("#")
        prediction = predictions.get(id_)
        if prediction is None:
            # The index lags behind; of other kinds the API tells more.
            rows += [] if kind == "prediction" else [(id_, kind, "-", "-", f"the sweep; see GET /{kind}s/{id_}")]
            continue
        why = waits_for(prediction, executions.status(id_, prediction.execution_n), now)
        since = second(prediction.next_check_at) if prediction.next_check_at else "-"
        rows.append((id_, prediction.object, prediction.visible, since, why or "the sweep to take it off its list"))
    columns = ("ID", "KIND", "STATUS", "DUE SINCE", "WAITS FOR")
    if arguments.json:
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
    yield _Moment(
        _told_at(prediction.created_at) or prediction.created,
        "table",
        f"asked for by {prediction.owner} ({prediction.source})",
    )
    for at, what in (
        (prediction.claimed, "claimed, to be submitted once"),
        (prediction.cancel_requested, "its cancel was asked for"),
        (prediction.ended, f"its end was written: {prediction.visible}"),
        (prediction.deleted, "its data was deleted for its owner"),
    ):
        if at is not None:
            yield _Moment(at, "table", what)
    for text, what in (
        (prediction.started_at, "the model began"),
        (prediction.completed_at, f"it ended: {prediction.status}"),
    ):
        # Kept as Replicate tells it, which need not be a time.
        if text and (moment := _told_at(text)) is not None:
            yield _Moment(moment, "Replicate", what)


def _of_executions(stack: Stack, executions: Executions, prediction: Prediction) -> Iterator[_Moment]:
    stepfunctions = stack.client("stepfunctions")
    for n in range(1, prediction.execution_n + 1):
        arn, where = executions.arn(prediction.id, n), f"execution {n}"
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
    """What the functions logged of it: webhooks, polls, copies, deliveries."""
    logs = stack.client("logs")
    group = f"/aws/lambda/{stack.name}"
    try:
        groups = [each["logGroupName"] for each in logs.describe_log_groups(logGroupNamePrefix=group)["logGroups"]]
        for name in groups:
            if name != group and not name.startswith(f"{group}-"):
                continue
            pages = logs.get_paginator("filter_log_events").paginate(
                logGroupName=name,
                filterPattern=f'"{prediction.id}"',
                startTime=(prediction.created - 60) * 1000,
                PaginationConfig={"MaxItems": _LOG_LINES_LIMIT},
            )
            for event in (event for page in pages for event in page["events"]):
                if told := _logged(event["message"], prediction.id):
                    yield _Moment(event["timestamp"] / 1000, *told)
    except ClientError as error:
        yield _Moment(time.time(), "log", f"cannot be read: {error.response['Error']['Code']}")


def _logged(message: str, prediction_id: str) -> tuple[str, str] | None:
    try:
        said = json.loads(message)
    except ValueError:
        return None
    if not isinstance(said, dict) or said.get("correlation_id") != prediction_id or "_aws" in said:
        return None
    details = [f"{name}={said[name]}" for name in _TOLD if said.get(name) not in (None, "")]
    function = str(said.get("function_name", "log"))
    where = re.sub(r"^.*-(\w+)Function-.*$", r"\1", function)
    return where, " ".join([f"{said.get('level', '')}:", str(said.get("message", ""))[:200], *details])


def _sizes(stack: Stack, prediction: Prediction) -> dict[str, int]:
    pages = (
        stack.client("dynamodb")
        .get_paginator("query")
        .paginate(
            TableName=stack.output("TableName"),
            KeyConditionExpression="pk = :pk",
            ExpressionAttributeValues=serialize({":pk": f"prediction#{prediction.id}"}),
            ProjectionExpression="sk, #length",
            ExpressionAttributeNames={"#length": "length"},
        )
    )
    items = [deserialize(item) for page in pages for item in page["Items"]]
    return {str(item["sk"]).partition("#")[0]: int(item["length"]) for item in items if "length" in item}


def _told_at(text: str) -> float | None:
    with suppress(ValueError, OverflowError):
        at = datetime.fromisoformat(text).timestamp()
        return at if 0 <= at < _YEAR_10000 else None
    return None


def _exact(moment: float) -> str:
    return f"{second(int(moment))[:-1]}.{int(moment % 1 * 1000):03}Z"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
