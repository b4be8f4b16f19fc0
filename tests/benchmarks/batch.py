"""``python -m tests.benchmarks.batch --lines 1000``: one batch on a local cloud of its own, with its progress.

Prints how many lines end in a second, and what a line takes: upstream calls, states, item writes. `make bench` runs a
small one. The stand-in's rate limit is lifted; what is measured is the emulator on this machine, not AWS.
"""

import argparse
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import FrameType
from typing import Any

import httpx

from local.cloud import LocalCloud, LocalCloudError
from local.terminal import Terminal
from tests.benchmarks.report import BenchmarkFailed, note, table

CONCURRENCY = 8
ASK_SECONDS = 2.0
# Longer than a line has ever taken on two cores; the emulator starts a process for each function that runs at once.
SECONDS_A_LINE = 5.0
# The stand-in keeps so many requests in its record.
RECORDED = 20_000
SAMPLED = 20


@dataclass(frozen=True)
class BatchFigures:
    """What a batch took.

    Attributes:
        lines: How many it had; all succeeded, each created once upstream.
        seconds: From its making to its end.
        calls: Requests to Replicate that were recorded; of large batches the last ones only.
        recorded_lines: Lines to which these belong.
        creates: How many of them create predictions.
        states: Entered for a line by track_prediction, on average.
        writes: Items written, by the first part of their keys: `prediction`, `batch`, `limiter`, …
    """

    lines: int
    seconds: float
    calls: int
    recorded_lines: int
    creates: int
    states: float
    writes: Mapping[str, int]


def main() -> int:
    """Runs it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.batch", description=__doc__)
    parser.add_argument("--lines", type=int, default=1000, help="1 to 100000 (%(default)s)")
    lines = parser.parse_args().lines
    terminal = Terminal(sys.stdout)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        if not 1 <= lines <= 100_000:
            raise BenchmarkFailed("a batch has 1 to 100000 lines")
        show(terminal, measure(lines, terminal.step))
    except (LocalCloudError, BenchmarkFailed) as error:
        terminal.refuse(str(error))
        return 1
    return 0


def measure(lines: int, say: Callable[[str], None]) -> BatchFigures:
    """Deploys to a local cloud of its own, and runs a batch, with its progress.

    Raises:
        BenchmarkFailed: A line was created twice, or has not its result at its place.
        LocalCloudError: The local cloud did not start.
    """
    # A webhook that a busy machine has lost is made good by a poll after a minute.
    parameters = {"FirstPollSeconds": "60", "LogLevel": "WARNING"}
    with LocalCloud(parameters=parameters, say=say) as cloud:
        found = _measure(cloud, lines, say)
        say("stopping")
    return found


def show(terminal: Terminal, found: BatchFigures) -> None:
    """Prints the figures of a batch as a table."""
    lines = found.lines
    others = {kind: n for kind, n in found.writes.items() if kind not in ("prediction", "batch", "tokens")}
    rows = [
        ("lines per second", f"{lines / found.seconds:.1f}"),
        ("per line: upstream calls", f"{found.calls / found.recorded_lines:.2f}"),
        ("  of which creates", f"{found.creates / found.recorded_lines:.2f}"),
        ("per line: states", f"{found.states + 1:.2f}"),
        ("  of which the batch's Map", "1.00"),
        ("per line: item writes", f"{found.writes['prediction'] / lines:.2f}"),
        *((f"  besides, {kind}", f"{n / lines:.2f}") for kind, n in sorted(others.items())),
        ("the batch: item writes in total", str(found.writes["batch"])),
    ]
    terminal.write()
    terminal.write(table((f"a batch of {lines:,} lines in {found.seconds:.0f} s", ""), rows))
    terminal.write(
        note(
            f"{CONCURRENCY} lines at once on warm functions, of a model that takes no time and returns no files, "
            "without Replicate's limit of creates. The speed is this machine's and the emulator's, not AWS's. Every "
            "line was created once upstream, and has its result at its place."
        )
    )


def _measure(cloud: LocalCloud, lines: int, say: Callable[[str], None]) -> BatchFigures:
    cloud.replicate.settings(creates_per_minute=10_000_000, others_per_minute=10_000_000)
    headers = {"Authorization": f"Bearer {cloud.create_token(OWNER)}"}
    with httpx.Client(base_url=cloud.stack.api_url, headers=headers, timeout=120, trust_env=False) as api:
        say("warming the functions")
        # Each function that runs at once is a process, and a second of a processor: not all of them together.
        for at_once in (1, CONCURRENCY // 2, CONCURRENCY):
            _batch(cloud, api, 2 * at_once, at_once, lambda _: None)
        cloud.replicate.reset()
        cloud.replicate.settings(creates_per_minute=10_000_000, others_per_minute=10_000_000)
        before = _writes(cloud)
        began = time.monotonic()

        def progress(batch: Mapping[str, Any]) -> None:
            counts = batch["counts"]
            ended = counts["succeeded"] + counts["failed"]
            rate = ended / (time.monotonic() - began)
            say(f"{ended} of {lines} lines completed, {counts['running']} running, {rate:.1f} per second")

        batch = _batch(cloud, api, lines, CONCURRENCY, progress)
    writes = _writes(cloud) - before
    requests = [each for each in cloud.replicate.record()["requests"] if "/webhooks/" not in each["path"]]
    creates = [each["body"]["webhook"] for each in requests if each["method"] == "POST"]
    if len(set(creates)) != len(creates):
        raise BenchmarkFailed("a line was created twice")
    bucket, _, key = batch["results"]["uri"].removeprefix("s3://").partition("/")
    body = cloud.client("s3").get_object(Bucket=bucket, Key=key)["Body"]
    results = [json.loads(line) for line in body.iter_lines()]
    if [line.get("output") for line in results] != [f"line {n}" for n in range(1, lines + 1)]:
        raise BenchmarkFailed(f"not every line has its result at its place: {batch['counts']}")
    made, ended = (datetime.fromisoformat(batch[name]) for name in ("created_at", "completed_at"))
    return BatchFigures(
        lines=lines,
        seconds=(ended - made).total_seconds(),
        calls=len(requests),
        recorded_lines=min(lines, RECORDED),
        creates=len(creates),
        states=_states(cloud, [line["id"] for line in results[:: max(1, lines // SAMPLED)]]),
        writes=writes,
    )


def _batch(
    cloud: LocalCloud, api: httpx.Client, lines: int, at_once: int, progress: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    """Runs a batch to its end.

    Raises:
        BenchmarkFailed: It was refused, or took too long.
    """
    requests = ({"model": "local/sleeper", "input": {"seconds": 0, "text": f"line {n}"}} for n in range(1, lines + 1))
    key = f"batches/{OWNER}/{lines}.jsonl"
    manifest = "".join(json.dumps(request) + "\n" for request in requests)
    cloud.client("s3").put_object(Bucket=cloud.stack.inputs_bucket, Key=key, Body=manifest.encode())
    body = {"manifest": f"s3://{cloud.stack.inputs_bucket}/{key}", "max_concurrency": at_once}
    answer = api.post("/batches", json=body)
    if answer.status_code != 201:
        raise BenchmarkFailed(f"POST /batches answered {answer.status_code}: {answer.text[:500]}")
    batch: dict[str, Any] = answer.json()
    until = time.monotonic() + 300 + lines * SECONDS_A_LINE
    while batch["status"] in ("preparing", "running"):
        if time.monotonic() > until:
            raise BenchmarkFailed(f"batch {batch['id']} has not ended: {batch['counts']}")
        time.sleep(ASK_SECONDS)
        shown = api.get(f"/batches/{batch['id']}")
        # The emulator may be too busy for a moment.
        batch = shown.json() if shown.status_code == 200 else batch
        progress(batch)
    return batch


OWNER = "bench"


def _writes(cloud: LocalCloud) -> Counter[str]:
    """Items written so far, by kind, from the table's stream."""
    found: Counter[str] = Counter()
    streams = cloud.client("dynamodbstreams")
    arn = cloud.client("dynamodb").describe_table(TableName=cloud.stack.table_name)["Table"]["LatestStreamArn"]
    for shard in streams.describe_stream(StreamArn=arn)["StreamDescription"]["Shards"]:
        iterator = streams.get_shard_iterator(
            StreamArn=arn, ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
        )["ShardIterator"]
        while iterator:
            page: dict[str, Any] = streams.get_records(ShardIterator=iterator)
            found.update(record["dynamodb"]["Keys"]["pk"]["S"].partition("#")[0] for record in page["Records"])
            iterator = page.get("NextShardIterator") if page["Records"] else None
    return found


def _states(cloud: LocalCloud, ids: list[str]) -> float:
    """States that the executions of these predictions entered, on average."""
    stepfunctions = cloud.client("stepfunctions")
    executions = cloud.stack.state_machine_arn.replace(":stateMachine:", ":execution:")  # a line is submitted by it
    entered = 0
    for id_ in ids:
        history = stepfunctions.get_execution_history(executionArn=f"{executions}:{id_}-1", maxResults=1000)["events"]
        entered += sum("stateEnteredEventDetails" in event for event in history)
    return entered / len(ids)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
