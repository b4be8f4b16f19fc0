"""What one prediction takes: measured on the local cloud, read where it was recorded.

Two series, on one deployment. The first is timed, as callers have it: warm functions, a token that the authorizer has
seen. The second goes through `tests.benchmarks.aws_calls`, with a new token each time, and counts: the authorizer runs
too, and every request to AWS is seen.
"""

import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from local.cloud import LocalCloud
from tests.benchmarks.aws_calls import Call, recorded
from tests.benchmarks.report import BenchmarkFailed
from tests.support.template import load_template

POLL_SECONDS = 3
QUICK = {"FirstPollSeconds": str(POLL_SECONDS), "PollSeconds": str(POLL_SECONDS)}
SECONDS = 60.0
ASK_SECONDS = 0.01
# Runs each minute for the whole stack, whatever there is to do.
NOT_COUNTED = "sweep_predictions"
NOT_COUNTED_CALL = "/webhooks/default/secret"

SYNC_RUNS = 20
WAIT = {"Prefer": "wait=20"}

TASK_TOKEN_CHARACTERS = 2048
"""https://docs.aws.amazon.com/step-functions/latest/apireference/API_SendTaskSuccess.html"""

PAINTER = {"prompt": "a lighthouse by the sea at dusk", "seed": 7}


@dataclass(frozen=True)
class Case:
    """A kind of prediction.

    Attributes:
        model: Run by its name.
        input: For it.
        runs: How often it is timed.
        faults: Of the stand-in (see `local.replicate.faults`), with their options.
        completed: Whether the terminal webhook arrives.
    """

    name: str
    model: str
    input: Mapping[str, Any]
    runs: int
    faults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    completed: bool = True


CASES = (
    Case("one file", "local/painter", PAINTER, 5),
    Case("no files", "local/sleeper", {"seconds": 0.1}, 5),
    # The model starts late: asked once before its webhook comes.
    Case("one file, slow model", "local/painter", PAINTER, 0, {"start_late": {"seconds": POLL_SECONDS + 1.5}}),
    Case("one file, webhooks lost", "local/painter", PAINTER, 2, {"webhook_lost": {"times": None}}, completed=False),
)


@dataclass(frozen=True)
class Run:
    """One prediction's figures.

    Attributes:
        created_ms: From POST to its answer.
        ended_ms: From POST until callers can see the end, seen within `ASK_SECONDS`.
        model_ms: How long the model ran.
        invocations: By function.
        lambda_ms: Billed, by function, as the emulator reports it.
        gigabyte_seconds: The same times memory.
        log_bytes: What the functions logged, as CloudWatch counts it.
        states: Those entered, in order.
        writes: Items of the prediction written, from the table's stream.
        limiter_writes: The limiter's item, written by each create that follows another one within seconds.
        written_bytes: The sum of their sizes.
        write_units: What DynamoDB bills for them, indexes included, refused writes not.
        upstream: Requests to Replicate.
        webhooks: Delivered, by event.
        file_bytes: Copied to the outputs bucket.
        calls: To AWS, by functions; empty in the timed series.
    """

    created_ms: float
    ended_ms: float
    model_ms: float
    invocations: Counter[str]
    lambda_ms: Mapping[str, float]
    gigabyte_seconds: Mapping[str, float]
    log_bytes: int
    states: tuple[str, ...]
    writes: int
    limiter_writes: int
    written_bytes: int
    write_units: int
    upstream: Counter[str]
    webhooks: Counter[str]
    file_bytes: int
    calls: tuple[Call, ...]

    @property
    def polls(self) -> int:
        """How often Replicate was asked."""
        return self.states.count("PollPrediction")

    @property
    def asked_writes(self) -> int:
        """Writes that functions and the state machine asked DynamoDB for, refused ones included."""
        by_machine = sum(state.startswith("AwaitWebhook") for state in self.states)
        return by_machine + sum(call.writes for call in self.calls)


@dataclass(frozen=True)
class Figures:
    """The figures of one case."""

    case: Case
    timed: tuple[Run, ...]
    counted: Run

    @property
    def runs(self) -> tuple[Run, ...]:
        """All of them."""
        return (*self.timed, self.counted)


@dataclass(frozen=True)
class Sync:
    """Milliseconds from POST with `Prefer: wait` to the answer with the end, each pair one after the other.

    Attributes:
        direct: Asked of the stand-in for Replicate itself.
        stack: Asked of the stack.
    """

    direct: tuple[float, ...]
    stack: tuple[float, ...]


def measure(say: Callable[[str], None]) -> tuple[list[Figures], Sync]:
    """Deploy to a local cloud of its own, and run every case.

    Raises:
        BenchmarkFailed: A prediction did not end as it must.
        LocalCloudError: The local cloud did not start.
    """
    with LocalCloud(parameters=QUICK, say=say) as cloud:
        bench = _Bench(cloud)
        say("warming the functions")
        bench.warm()
        timed = {}
        for case in CASES:
            if case.runs:
                say(f"timing: {case.name}, {case.runs} times")
                timed[case.name] = tuple(bench.run(case) for _ in range(case.runs))
        say(f"timing: responses with Prefer: wait, {SYNC_RUNS} times")
        sync = bench.sync()
        say("counting: the same again, with every request to AWS recorded")
        functions = [name for name in cloud.functions if name != NOT_COUNTED]
        with recorded(cloud, functions) as bench.calls:
            with bench.new_token():
                bench.warm()
            found = []
            for case in CASES:
                with bench.new_token():
                    found.append(Figures(case, timed.get(case.name, ()), bench.run(case)))
        say("stopping")
    return found, sync


class _Bench:
    """Runs predictions and reads what they left behind."""

    def __init__(self, cloud: LocalCloud) -> None:
        self._cloud = cloud
        self._token = cloud.stack.access_token
        self.calls: list[Call] = []

    def warm(self) -> None:
        """Have every function start that the cases use, and fill what they cache."""
        self.run(CASES[0])
        self.run(next(case for case in CASES if not case.completed))

    @contextmanager
    def new_token(self) -> Iterator[None]:
        """A token that the authorizer has not seen, while the context lasts."""
        before, self._token = self._token, self._cloud.create_token("local")
        try:
            yield
        finally:
            self._token = before

    def run(self, case: Case) -> Run:
        """Run one prediction to its very end.

        Raises:
            BenchmarkFailed: It was not accepted, did not succeed in time, or has no file although it must.
        """
        cloud = self._cloud
        cloud.replicate.reset()
        for fault, options in case.faults.items():
            cloud.replicate.fault(fault, **options)
        logs, changes, calls = self._logs(), self._changes(), len(self.calls)
        with self._api() as api:
            api.get("/_unknown")  # the connection is open, and the emulator's threads are awake
            began = time.monotonic()
            answer = api.post(f"/models/{case.model}/predictions", json={"input": case.input})
            created = time.monotonic()
            if answer.status_code != 201:
                raise BenchmarkFailed(f"{case.name}: POST answered {answer.status_code}: {answer.text[:500]}")
            id_ = answer.json()["id"]
            while (item := self._item(id_)).get("visible") not in ("succeeded", "failed", "canceled"):
                if time.monotonic() > began + SECONDS:
                    raise BenchmarkFailed(f"{case.name}: {id_} is {item.get('visible')} after {SECONDS:.0f} s")
                time.sleep(ASK_SECONDS)
            ended = time.monotonic()
            self._settle(case, item)
            # Before anything else is asked: the answer to this is not part of it.
            logged = list((self._logs() - logs).elements())
            new_changes = [change for key, change in self._changes().items() if key not in changes]
            new_calls = tuple(self.calls[calls:])
            record = cloud.replicate.record()
            prediction = api.get(f"/predictions/{id_}").raise_for_status().json()
        if prediction["status"] != "succeeded":
            raise BenchmarkFailed(f"{case.name}: {id_} ended {prediction['status']}: {prediction['error']}")
        files = prediction["output_files"] or []
        if len(files) != case.name.count("one file") or any("error" in file for file in files):
            raise BenchmarkFailed(f"{case.name}: {id_} has the files {files}")
        reports: dict[str, list[tuple[float, int]]] = defaultdict(list)
        for function, *_, message in logged:
            if message.startswith("REPORT RequestId"):
                reports[function].append(_report(message))
        limiter_writes = sum(change["Keys"]["pk"]["S"] == "limiter" for change in new_changes)
        return Run(
            created_ms=(created - began) * 1000,
            ended_ms=(ended - began) * 1000,
            model_ms=prediction["metrics"].get("predict_time", 0.0) * 1000,
            invocations=Counter({name: len(found) for name, found in reports.items()}),
            lambda_ms={name: sum(ms for ms, _ in found) for name, found in reports.items()},
            gigabyte_seconds={name: sum(ms / 1000 * mb / 1024 for ms, mb in found) for name, found in reports.items()},
            # https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_PutLogEvents.html
            log_bytes=sum(len(message.encode()) + 26 for *_, message in logged),
            states=self._states(item),
            writes=len(new_changes) - limiter_writes,
            limiter_writes=limiter_writes,
            written_bytes=sum(_size(change.get("NewImage", {})) for change in new_changes),
            write_units=sum(map(_write_units, new_changes)),
            upstream=_upstream(record, item["upstream_id"]),
            webhooks=Counter(sent["event"] for sent in record["webhooks"] if sent["answer"] == 200),
            file_bytes=sum(file["bytes"] for file in files),
            calls=new_calls,
        )

    def sync(self) -> Sync:
        """Ask for an end without files, of the stand-in and of the stack in turn.

        Raises:
            BenchmarkFailed: An answer was not the end.
        """
        replicate = self._cloud.replicate
        replicate.reset()
        direct = httpx.Client(base_url=replicate.url, headers=replicate.headers, timeout=30, trust_env=False)
        with direct, self._api() as stack:
            version = direct.get("/models/local/sleeper").json()["latest_version"]["id"]
            body = {"version": version, "input": {"seconds": 0.3}}
            took: dict[httpx.Client, list[float]] = {direct: [], stack: []}
            for _ in range(SYNC_RUNS + 1):
                for api, times in took.items():
                    began = time.monotonic()
                    answer = api.post("/predictions", json=body, headers=WAIT)
                    times.append((time.monotonic() - began) * 1000)
                    if answer.json().get("status") != "succeeded":
                        raise BenchmarkFailed(f"Prefer: wait answered {answer.status_code}: {answer.text[:500]}")
        # The first one of each opens the connection and fills what is kept.
        return Sync(tuple(took[direct][1:]), tuple(took[stack][1:]))

    def _api(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self._token}"}
        return httpx.Client(base_url=self._cloud.stack.api_url, headers=headers, timeout=60, trust_env=False)

    def _item(self, id_: str) -> dict[str, Any]:
        answer = self._cloud.client("dynamodb").get_item(
            TableName=self._cloud.stack.table_name,
            Key={"pk": {"S": f"prediction#{id_}"}, "sk": {"S": "status"}},
            ConsistentRead=True,
        )
        return {name: next(iter(value.values())) for name, value in answer["Item"].items()}

    def _settle(self, case: Case, item: Mapping[str, Any]) -> None:
        """Wait until nothing of the prediction runs any more."""
        states = self._cloud.client("stepfunctions")
        deadline = time.monotonic() + SECONDS
        while True:
            status = states.describe_execution(executionArn=item["execution_arn"])["status"]
            webhooks = self._cloud.replicate.record()["webhooks"]
            arrived = any(sent["event"] == "completed" and sent["answer"] == 200 for sent in webhooks)
            if status == "SUCCEEDED" and arrived == case.completed:
                break
            if status not in ("RUNNING", "SUCCEEDED") or time.monotonic() > deadline:
                raise BenchmarkFailed(f"{case.name}: execution {status}, terminal webhook answered: {arrived}")
            time.sleep(0.05)
        # Logs and stream are written behind the answers, and the emulator reads the stream each second.
        time.sleep(1.7)

    def _states(self, item: Mapping[str, Any]) -> tuple[str, ...]:
        states = self._cloud.client("stepfunctions")
        pages = states.get_paginator("get_execution_history").paginate(executionArn=item["execution_arn"])
        events = [event for page in pages for event in page["events"]]
        return tuple(e["stateEnteredEventDetails"]["name"] for e in events if "stateEnteredEventDetails" in e)

    def _logs(self) -> Counter[tuple[str, str, int, str]]:
        """Every line so far: function, stream, time, text."""
        pages = self._cloud.client("logs").get_paginator("filter_log_events")
        return Counter(
            (function, event["logStreamName"], event["timestamp"], event["message"])
            for function, name in self._cloud.functions.items()
            if function != NOT_COUNTED
            for page in pages.paginate(logGroupName=f"/aws/lambda/{name}")
            for event in page["events"]
        )

    def _changes(self) -> dict[str, dict[str, Any]]:
        """Every change of an item so far, but those of access tokens."""
        table = self._cloud.client("dynamodb").describe_table(TableName=self._cloud.stack.table_name)["Table"]
        streams, arn = self._cloud.client("dynamodbstreams"), table["LatestStreamArn"]
        found = {}
        for shard in streams.describe_stream(StreamArn=arn)["StreamDescription"]["Shards"]:
            iterator = streams.get_shard_iterator(
                StreamArn=arn, ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
            )["ShardIterator"]
            while iterator:
                page = streams.get_records(ShardIterator=iterator)
                found.update({record["eventID"]: record["dynamodb"] for record in page["Records"]})
                iterator = page.get("NextShardIterator") if page["Records"] else None
        return {key: change for key, change in found.items() if change["Keys"]["pk"]["S"] != "tokens"}


def _report(message: str) -> tuple[float, int]:
    """Billed milliseconds and megabytes of memory."""
    found = re.search(r"Billed Duration: ([\d.]+) ms\tMemory Size: (\d+) MB", message)
    if not found:
        raise BenchmarkFailed(f"the emulator reports no billed duration: {message}")
    return math.ceil(float(found[1])), int(found[2])


def _upstream(record: Mapping[str, Any], upstream_id: str) -> Counter[str]:
    calls = (f"{each['method']} {each['path'].replace(upstream_id, '{id}')}" for each in record["requests"])
    return Counter(re.sub("/files/.*", "/files/…", call) for call in calls if not call.endswith(NOT_COUNTED_CALL))


def _size(image: Mapping[str, Any]) -> int:
    """Bytes of an item: names and values; numbers about a byte for two digits.

    https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/CapacityUnitCalculations.html
    """
    return sum(len(name.encode()) + _value_size(value) for name, value in image.items())


def _value_size(value: Mapping[str, Any]) -> int:
    ((kind, content),) = value.items()
    match kind:
        case "S":
            return len(content.encode())
        case "N":
            return (len(content.strip("-0.")) + 1) // 2 + 1
        case "SS" | "L":
            parts = content if kind == "L" else [{"S": text} for text in content]
            return 3 + sum(1 + _value_size(part) for part in parts)
        case "M":
            return 3 + _size(content) + len(content)
        case "B":
            return len(content)
    return 1  # true, false, null


def _write_units(change: Mapping[str, Any]) -> int:
    """1 KB each for the item, and for each index that changes: one when a key comes or goes, two when it changes.

    A task token counts as long as AWS's may be; the emulator's are short.
    """
    old, new = (
        image | ({"task_token": {"S": "x" * TASK_TOKEN_CHARACTERS}} if "task_token" in image else {})
        for image in (change.get("OldImage", {}), change.get("NewImage", {}))
    )
    units = math.ceil(max(_size(old), _size(new)) / 1024)
    for index in load_template()["Resources"]["PredictionsTable"]["Properties"]["GlobalSecondaryIndexes"]:
        names = [key["AttributeName"] for key in index["KeySchema"]]
        before, after = ([image.get(name) for name in names] for image in (old, new))
        if before != after:
            units += (None not in before) + (None not in after)
    return units
