"""``python -m tests.benchmarks.batch --lines 1000``: one batch on a local cloud of its own, with its progress.

Prints how many lines end in a second, and what a line takes: upstream calls, states, item writes. The stand-in's rate
limit is lifted; what is measured is the emulator on this machine, not AWS.
"""

import argparse
import json
import signal
import sys
import time
from collections import Counter
from types import FrameType
from typing import Any

import httpx

from local.cloud import LocalCloud, LocalCloudError
from local.terminal import Terminal
from tests.benchmarks.report import BenchmarkFailed

CONCURRENCY = 16
ASK_SECONDS = 2.0
# Longer than a line has ever taken on two cores; the emulator starts a process for each function that runs at once.
SECONDS_A_LINE = 5.0
# The stand-in keeps so many requests in its record.
RECORDED = 20_000
SAMPLED = 20


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
        # Webhooks tell the ends: polls would only add to the work.
        parameters = {"FirstPollSeconds": "600", "LogLevel": "WARNING"}
        with LocalCloud(parameters=parameters, say=terminal.step) as cloud:
            _run(cloud, lines, terminal)
            terminal.step("stopping")
    except (LocalCloudError, BenchmarkFailed) as error:
        terminal.refuse(str(error))
        return 1
    return 0


def _run(cloud: LocalCloud, lines: int, terminal: Terminal) -> None:
    cloud.replicate.settings(creates_per_minute=10_000_000, others_per_minute=10_000_000)
    manifest = "".join(
        json.dumps({"model": "local/sleeper", "input": {"seconds": 0, "text": f"line {n}"}}) + "\n"
        for n in range(1, lines + 1)
    )
    key = f"batches/{OWNER}/lines.jsonl"
    cloud.client("s3").put_object(Bucket=cloud.stack.inputs_bucket, Key=key, Body=manifest.encode())
    headers = {"Authorization": f"Bearer {cloud.create_token(OWNER)}"}
    with httpx.Client(base_url=cloud.stack.api_url, headers=headers, timeout=120, trust_env=False) as api:
        began = time.monotonic()
        body = {"manifest": f"s3://{cloud.stack.inputs_bucket}/{key}", "max_concurrency": CONCURRENCY}
        answer = api.post("/batches", json=body)
        if answer.status_code != 201:
            raise BenchmarkFailed(f"POST /batches answered {answer.status_code}: {answer.text[:500]}")
        batch = answer.json()
        while batch["status"] in ("preparing", "running"):
            took = time.monotonic() - began
            if took > 120 + lines * SECONDS_A_LINE:
                raise BenchmarkFailed(f"batch {batch['id']} has not ended after {took:.0f} s: {batch['counts']}")
            time.sleep(ASK_SECONDS)
            shown = api.get(f"/batches/{batch['id']}")
            # The emulator may be too busy for a moment.
            batch = shown.json() if shown.status_code == 200 else batch
            counts = batch["counts"]
            ended = counts["succeeded"] + counts["failed"]
            rate = ended / (time.monotonic() - began)
            terminal.step(f"{ended} of {lines} lines have ended, {counts['running']} run, {rate:.1f} a second")
        took = time.monotonic() - began
    counted = _counted(cloud, lines)
    bucket, _, key = batch["results"]["uri"].removeprefix("s3://").partition("/")
    results = [json.loads(line) for line in cloud.client("s3").get_object(Bucket=bucket, Key=key)["Body"].iter_lines()]
    if [line["n"] for line in results] != list(range(1, lines + 1)) or batch["counts"]["succeeded"] != lines:
        raise BenchmarkFailed(f"{len(results)} results, and {batch['counts']}")
    if [line["output"] for line in results] != [f"line {line['n']}" for line in results]:
        raise BenchmarkFailed("results are not at their lines' places")
    states = _states(cloud, [line["id"] for line in results[:: max(1, lines // SAMPLED)]])
    terminal.write(f"""
{lines} lines in {took:.0f} s: {lines / took:.1f} a second, {CONCURRENCY} at once

a line takes
  upstream calls   {counted["upstream"] / min(lines, RECORDED):.2f}, creates {counted["creates"]}
  states           {states + 1:.2f}: {states:.2f} of track_prediction, 1 of the batch's Map
  item writes      {counted["writes"] / lines:.2f}; the batch itself {counted["batch writes"]} in all
""")


OWNER = "bench"


def _counted(cloud: LocalCloud, lines: int) -> Counter[str]:
    found: Counter[str] = Counter()
    requests = [each for each in cloud.replicate.record()["requests"] if "/webhooks/" not in each["path"]]
    found["upstream"] = len(requests)
    creates = [each["body"]["webhook"] for each in requests if each["method"] == "POST"]
    found["creates"] = len(creates)
    if len(set(creates)) != len(creates):
        raise BenchmarkFailed("a line was created twice")
    streams = cloud.client("dynamodbstreams")
    arn = cloud.client("dynamodb").describe_table(TableName=cloud.stack.table_name)["Table"]["LatestStreamArn"]
    for shard in streams.describe_stream(StreamArn=arn)["StreamDescription"]["Shards"]:
        iterator = streams.get_shard_iterator(
            StreamArn=arn, ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
        )["ShardIterator"]
        while iterator:
            page: dict[str, Any] = streams.get_records(ShardIterator=iterator)
            kinds = Counter(record["dynamodb"]["Keys"]["pk"]["S"].partition("#")[0] for record in page["Records"])
            found["writes"] += kinds["prediction"]
            found["batch writes"] += kinds["batch"]
            iterator = page.get("NextShardIterator") if page["Records"] else None
    return found


def _states(cloud: LocalCloud, ids: list[str]) -> float:
    """States that the executions of these predictions entered, on average."""
    stepfunctions = cloud.client("stepfunctions")
    executions = cloud.stack.state_machine_arn.replace(":stateMachine:", ":execution:")
    entered = 0
    for id_ in ids:
        history = stepfunctions.get_execution_history(executionArn=f"{executions}:{id_}-1", maxResults=1000)["events"]
        entered += sum("stateEnteredEventDetails" in event for event in history)
    return entered / len(ids)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
