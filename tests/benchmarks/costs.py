"""What a prediction takes of all that AWS bills, of the stack and of its peers: counted on one local cloud.

    python -m tests.benchmarks.costs [--write]

What is counted is independent of the machine, but for the CPU time of functions: a model runs until the stand-in is
told to release it, which is when its prediction is waited for, and not for a time that a busy machine makes longer.
`tests.benchmarks.cost_page` makes dollars of it. With `--write` the counts are stored in `counted.json`, and
docs/cost.md is written from them.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from local.cloud import LocalCloud, LocalCloudError
from local.terminal import Terminal
from tests.benchmarks import cost_page
from tests.benchmarks.aws_calls import recorded
from tests.benchmarks.cost_page import (
    BATCH,
    COUNTED,
    LENGTHS,
    NO_FILE,
    ONE_FILE,
    POLLED,
    QUEUE,
    TOKEN_CHARACTERS,
    Counted,
    Function,
    Used,
    run_of,
)  # fmt: skip
from tests.benchmarks.figures import PAINTER, SECONDS, Bench, report, write_units
from tests.benchmarks.imports import Loaded
from tests.benchmarks.peers import deploy
from tests.benchmarks.report import BenchmarkFailed
from tests.support.template import ROOT, load_template

# A poll of a prediction whose webhooks were lost; the longest model that a client waits for completes before it.
FIRST_POLL_SECONDS = 120
POLL_SECONDS = 0.5  # of `run()` of an official client
SYNC_WAIT_SECONDS = int(load_template()["Parameters"]["SyncWaitSeconds"]["Default"])
HELD: dict[str, Any] = {"seconds": 3600, "times": None}  # until it is released
ASKED_WAIT_SECONDS = 60  # by `run()`; the stack waits as long as it lets callers wait
REPEATED = 3
LINES = 10
LINE_SECONDS = 3  # long enough for an execution to wait before the model of its line has run
PAINTED: dict[str, Any] = {"model": "local/painter", "input": PAINTER}
SLEPT: dict[str, Any] = {"model": "local/sleeper", "input": {"seconds": 0.1}}
TERMINAL = ("succeeded", "failed", "canceled")
_Processes = Mapping[tuple[str, int], float]
_TICKS_MS = 1000 / os.sysconf("SC_CLK_TCK")


def measure(
    say: Callable[[str], None],
    loaded: Mapping[str, Loaded] | None = None,
    *,
    copy_seconds: float | None = None,
    largest: Mapping[str, int] | None = None,
) -> Counted:
    """Deploy to a local cloud of its own, and count every case and every peer.

    Args:
        say: Called with each line of progress.
        loaded: The imports of functions; as the two below it takes minutes to measure, and is the one stored before if
            it is not given.
        copy_seconds: The CPU of copying a file of `copying.FILE_MIB`.
        largest: The peak of each function with the largest answer that is accepted (`with_the_largest_answers`).

    Raises:
        BenchmarkFailed: A prediction did not end as it must.
        LocalCloudError: The local cloud did not start.
    """
    parameters = {"FirstPollSeconds": str(FIRST_POLL_SECONDS), "PollSeconds": str(FIRST_POLL_SECONDS)}
    with LocalCloud(parameters=parameters, say=say) as cloud, deploy.deployed(cloud, LENGTHS) as peers:
        bench = _Costs(cloud)
        ours = dict(bench.functions)
        with recorded(cloud, ours) as bench.calls:
            cases = dict(bench.cases(say))
        bench.functions |= peers.functions
        with recorded(cloud, peers.functions) as bench.calls:
            cases |= bench.peers(peers, say)
        say("stopping")
    before = Counted.load() if COUNTED.exists() else Counted({}, {})
    import_ms = {name: round(each.import_ms) for name, each in (loaded or {}).items()}
    if not loaded:
        import_ms = {name: each.import_ms for name, each in before.functions.items()}
    if largest is None:
        largest = {name: each.largest_mb for name, each in before.functions.items()}
    functions = {
        name: Function(round(bench.peaks[name] / 1024), import_ms.get(name, 0), largest.get(name, 0))
        for name in sorted(ours)
        if name in bench.peaks
    }
    return Counted(cases, functions, before.copy_seconds if copy_seconds is None else round(copy_seconds, 2))


def with_the_largest_answers(say: Callable[[str], None]) -> dict[str, int]:
    """Measure the peak of each function, in MiB, with the largest answer that is accepted, by tests/attacks.

    Raises:
        BenchmarkFailed: A function does not bear it in the memory that it has.
    """
    say("measuring the memory of functions with the largest answers, for minutes")
    with tempfile.NamedTemporaryFile("r", prefix="peaks-") as peaks:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/attacks/test_answers.py"]
        environment = {**os.environ, "MEMORY_PEAKS": peaks.name}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise BenchmarkFailed(f"a function does not bear the largest answer: {done.stdout[-2000:]}")
        found: dict[str, int] = {}
        for function, mib in map(str.split, peaks):
            found[function] = max(found.get(function, 0), int(mib))
    return found


class _Costs(Bench):
    """Counts whatever happens while something is done."""

    def __init__(self, cloud: LocalCloud) -> None:
        super().__init__(cloud)
        self.peaks: dict[str, int] = {}

    def cases(self, say: Callable[[str], None]) -> Iterator[tuple[str, Used]]:
        """Count the cases of the stack."""
        say("warming the functions")
        poll = self.functions["poll_prediction"]
        self._cloud.client("lambda").invoke(FunctionName=poll, Payload=json.dumps({"id": "a" * 26}).encode())
        self._batch(2)
        # Each model once: that its price is unknown is recorded by the first of its predictions.
        for warm, body in ((self._post, PAINTED), (self._queue, PAINTED), (self._post, PAINTED), (self._post, SLEPT)):
            warm(body)
        for name, work in {
            ONE_FILE: lambda: self._post(PAINTED),
            NO_FILE: lambda: self._post(SLEPT),
            QUEUE: lambda: self._queue(PAINTED),
        }.items():
            say(f"counting: {name}, {REPEATED} times")
            yield name, _middle([self._counted(work) for _ in range(REPEATED)])
        say(f"counting: {BATCH}, of {LINES}")
        start_late = {"seconds": LINE_SECONDS, "times": None}
        yield BATCH, self._counted(self._batch, predictions=LINES, start_late=start_late)
        for length in LENGTHS:
            say(f"counting: {run_of(length)}, {_times(length)}")
            held = {"start_prediction": min(length, SYNC_WAIT_SECONDS)}
            runs = [
                self._counted(partial(self._run, PAINTED, length), held=held, start_late=HELD)
                for _ in range(_times(length))
            ]
            yield run_of(length), _middle(runs)
        say(f"counting: {POLLED}, in {FIRST_POLL_SECONDS} s")
        yield POLLED, self._counted(lambda: self._post(PAINTED, held=False), webhook_lost={"times": None})

    def peers(self, peers: deploy.Peers, say: Callable[[str], None]) -> dict[str, Used]:
        """Count the peers, one length after the other on warm functions."""
        self._cloud.replicate.reset()
        deploy.warm(self._cloud, peers, PAINTED["model"], PAINTER)
        found = {}
        for length in LENGTHS:
            say(f"counting: the peers, of a model of {length} s")
            before = self._before()
            execution = deploy.run(self._cloud, peers, length, PAINTED["model"], PAINTER)
            time.sleep(1.7)
            for peer in (deploy.WAIT, deploy.LOOP):
                names = {name for name in peers.functions if name.startswith(f"{peer} {length} ")}
                states = self._entered([execution]) if peer == deploy.LOOP else 0
                held = {f"{deploy.WAIT} {length} wait": length} if peer == deploy.WAIT else {}
                found[f"{peer} {length}"] = self._used(before, names=names, states=states, held=held)
        return found

    def _counted(
        self,
        work: Callable[[], int],
        *,
        predictions: int = 1,
        held: Mapping[str, float] | None = None,
        **faults: Mapping[str, Any],
    ) -> Used:
        """Count what a piece of work takes, until nothing of it runs any more.

        Args:
            work: Returns the requests that it made to the API.
            predictions: How many predictions it is; the counts are of one.
            held: The seconds for which a function waits for the model, if one does.
            faults: Of the stand-in.
        """
        self._cloud.replicate.reset()
        for fault, options in faults.items():
            self._cloud.replicate.fault(fault, **options)
        before = self._before()
        with self.new_token():
            requests = work()
        self._quiet(before)
        arns = self._executions(before)
        # Each line of a batch is a run of one state, in the batch's Map.
        states = self._entered(arns) + (predictions if predictions > 1 else 0)
        webhooks = sum(sent["answer"] == 200 for sent in self._cloud.replicate.record()["webhooks"])
        return self._used(
            before,
            names=set(self.functions),
            states=states,
            api=requests + webhooks,
            predictions=predictions,
            held=held or {},
        )

    def _before(self) -> dict[str, Any]:
        self._note_peaks()
        return {
            "logs": self._logs(), "changes": self._changes(), "calls": len(self.calls), "cpu": self._cpu(),
            "objects": self._objects(),
        }  # fmt: skip

    def _used(
        self,
        before: Mapping[str, Any],
        *,
        names: set[str],
        states: int,
        api: int = 0,
        predictions: int = 1,
        held: Mapping[str, float],
    ) -> Used:
        cpu = self._cpu()
        self._note_peaks()
        logged = [line for line in (self._logs() - before["logs"]).elements() if line[0] in names]
        calls = [call for call in self.calls[before["calls"] :] if call.function in names]
        changes = [change for key, change in self._changes().items() if key not in before["changes"]]
        written = [change for change in changes if change["Keys"]["pk"]["S"] not in ("limiter", "live_reads")]
        refused = sum(call.writes and bool(call.error) for call in calls)
        s3 = [call.operation for call in calls if call.service == "s3"]
        reads = sum(name in ("GetObject", "HeadObject") for name in s3)
        runs: dict[str, list[float]] = defaultdict(list)
        for function, *_, message in logged:
            if message.startswith("REPORT RequestId"):
                runs[function].append(report(message)[0])
        upstream = self._upstream({name: len(billed) for name, billed in runs.items()})
        functions, ours = {}, set(self._cloud.functions)
        for name, billed in sorted(runs.items()):
            used_ms = self._cpu_ms(name, before["cpu"], cpu)
            functions[name] = {
                "runs": round(len(billed) / predictions, 2),
                "cpu_ms": round(used_ms / predictions, 1),
                "requests": round(sum(call.function == name for call in calls) / predictions, 2),
                **{kind: round(upstream[kind, name] / predictions, 2) for kind in ("creates", "gets", "files")},
                "held_seconds": held.get(name, 0),
            }
            if name in held and name not in ours:
                functions[name]["gets"] = 0  # while the model runs
        stored = sum(size for key, size in self._objects().items() if key not in before["objects"])
        if not api:  # a peer's: that of the other peer is stored at the same time
            stored //= 2
        counts = {
            "api_requests": api,
            "states": states,
            "write_units": sum(map(_write_units, written)) + refused if api else 0,
            "write_units_short_tokens": sum(write_units(each, 0) for each in written) + refused if api else 0,
            "items_written": len(written) if api else 0,
            "read_units": sum(call.read_units for call in calls),
            "s3_writes": len(s3) - reads,
            "s3_reads": reads,
            "stored_bytes": stored,
            "events": sum(call.service == "events" for call in calls),
            "queue_requests": sum(call.service == "sqs" for call in calls),
            "secrets": sum(call.service == "secretsmanager" for call in calls),
            "log_bytes": sum(len(message.encode()) + 26 for *_, message in logged),
        }
        return Used({name: round(value / predictions, 2) for name, value in counts.items()}, functions)

    def _upstream(self, runs: Mapping[str, int]) -> Counter[tuple[str, str]]:
        """Requests to Replicate, by kind and the function that makes them."""

        def first(*names: str) -> str:
            return next((name for name in names if name in runs), "")

        found: Counter[tuple[str, str]] = Counter()
        if peer := next((name for name in runs if " " in name), None):
            way = peer.rpartition(" ")[0]
            step = {each: f"{way} {'wait' if way.startswith(deploy.WAIT) else each}" for each in deploy.STEPS}
            found["creates", step["create"]] = found["files", step["store"]] = 1
            found["gets", step["get"]] = runs[step["get"]]
            return found
        for each in self._cloud.replicate.record()["requests"]:
            if each["method"] == "POST":
                found["creates", first("start_prediction", "submit_prediction")] += 1
            elif "/files/" in each["path"]:
                found["files", "copy_outputs"] += 1
            elif "/predictions/" in each["path"]:
                found["gets", first("poll_prediction", "read_prediction", "start_prediction")] += 1
        return found

    # -- work ---------------------------------------------------------------------------------------------------------

    def _post(self, body: Mapping[str, Any], *, held: bool = True) -> int:
        """POST, completion, and one GET of its result.

        Args:
            body: The model and its input.
            held: Whether the model starts only once its execution waits, as the models do that are not there already.
        """
        if held:
            self._cloud.replicate.fault("start_late", **HELD)
        with self._api() as api:
            answer = api.post(f"/models/{body['model']}/predictions", json={"input": body["input"]})
            if answer.status_code != 201:
                raise BenchmarkFailed(f"POST answered {answer.status_code}: {answer.text[:500]}")
            id_ = answer.json()["id"]
            if held:
                self._release_once_waited_for(id_)
            self._ended(id_)
            api.get(f"/predictions/{id_}").raise_for_status()
        return 2

    def _release_once_waited_for(self, id_: str) -> None:
        deadline = time.monotonic() + SECONDS
        while "task_token" not in self._item(id_):
            if time.monotonic() > deadline:
                raise BenchmarkFailed(f"no execution waits for {id_}")
            time.sleep(0.1)
        self._cloud.replicate.release()

    def _run(self, body: Mapping[str, Any], length: int) -> int:
        """`run()` of an official client: a create that waits, then a GET every half a second.

        The model is released during the create if that waits as long, else after as many GETs as fit into the rest.
        """
        looks = int((length - SYNC_WAIT_SECONDS) / POLL_SECONDS)
        if looks <= 0:
            threading.Thread(target=self._release_once_created, daemon=True).start()
        with self._api() as api:
            shown = api.post(
                f"/models/{body['model']}/predictions",
                json={"input": body["input"]},
                headers={"Prefer": f"wait={ASKED_WAIT_SECONDS}"},
            ).json()
            requests = 1
            while shown["status"] not in TERMINAL:
                if requests == looks + 1:
                    self._cloud.replicate.release()
                time.sleep(POLL_SECONDS)
                shown = api.get(f"/predictions/{shown['id']}").json()
                requests += 1
        if shown["status"] != "succeeded":
            raise BenchmarkFailed(f"run() ended {shown['status']}: {shown['error']}")
        return requests

    def _release_once_created(self) -> None:
        deadline = time.monotonic() + SECONDS
        while not any(each["method"] == "POST" for each in self._cloud.replicate.record()["requests"]):
            if time.monotonic() > deadline:
                return  # the create has failed, and says why
            time.sleep(0.1)
        self._cloud.replicate.release()

    def _queue(self, body: Mapping[str, Any]) -> int:
        """One message, completion, and one GET of its result."""
        self._cloud.replicate.fault("start_late", **HELD)
        known = self._changes()
        self._cloud.client("sqs").send_message(QueueUrl=self._cloud.stack.queue_url, MessageBody=json.dumps(body))
        deadline = time.monotonic() + SECONDS
        while True:
            ids = {
                change["Keys"]["pk"]["S"].partition("#")[2]
                for key, change in self._changes().items()
                if key not in known
                and change["Keys"]["pk"]["S"].startswith("prediction#")
                and change["Keys"]["sk"]["S"] == "status"
            }
            if ids:
                break
            if time.monotonic() > deadline:
                raise BenchmarkFailed("a message of the queue started no prediction")
            time.sleep(0.2)
        (id_,) = ids
        self._release_once_waited_for(id_)
        self._ended(id_)
        with self._api() as api:
            api.get(f"/predictions/{id_}").raise_for_status()
        return 1

    def _batch(self, number: int = LINES) -> int:
        """A batch of lines with one file each."""
        key = f"batches/local/{time.time_ns()}.jsonl"
        lines = ({**PAINTED, "input": {**PAINTER, "seed": n}} for n in range(number))
        manifest = "".join(json.dumps(line) + "\n" for line in lines)
        bucket = self._cloud.stack.inputs_bucket
        self._cloud.client("s3").put_object(Bucket=bucket, Key=key, Body=manifest.encode())
        with self._api() as api:
            answer = api.post("/batches", json={"manifest": f"s3://{bucket}/{key}", "max_concurrency": 4})
            if answer.status_code != 201:
                raise BenchmarkFailed(f"POST /batches answered {answer.status_code}: {answer.text[:500]}")
            batch, requests = answer.json(), 1
            deadline = time.monotonic() + 6 * SECONDS
            while batch["status"] in ("preparing", "running"):
                if time.monotonic() > deadline:
                    raise BenchmarkFailed(f"the batch has not ended: {batch['counts']}")
                time.sleep(5)
                batch, requests = api.get(f"/batches/{batch['id']}").json(), requests + 1
        if batch["counts"]["succeeded"] != number:
            raise BenchmarkFailed(f"not every line succeeded: {batch['counts']}")
        return requests

    def _ended(self, id_: str) -> None:
        deadline = time.monotonic() + FIRST_POLL_SECONDS + SECONDS
        while (status := self._item(id_).get("visible")) not in TERMINAL:
            if time.monotonic() > deadline:
                raise BenchmarkFailed(f"{id_} is {status}")
            time.sleep(0.1)
        if status != "succeeded":
            raise BenchmarkFailed(f"{id_} is {status}")

    # -- what is there ------------------------------------------------------------------------------------------------

    def _quiet(self, before: Mapping[str, Any]) -> None:
        """Wait until no execution runs any more, and logs and stream are written."""
        states, deadline = self._cloud.client("stepfunctions"), time.monotonic() + SECONDS
        for arn in self._executions(before):
            while states.describe_execution(executionArn=arn)["status"] == "RUNNING":
                if time.monotonic() > deadline:
                    raise BenchmarkFailed(f"{arn} runs on")
                time.sleep(0.1)
        time.sleep(2.5)

    def _executions(self, before: Mapping[str, Any]) -> list[str]:
        images = (change.get("NewImage", {}) for key, change in self._changes().items() if key not in before["changes"])
        return sorted({image["execution_arn"]["S"] for image in images if "execution_arn" in image})

    def _entered(self, arns: list[str]) -> int:
        return sum(len(self._states({"execution_arn": arn})) for arn in arns)

    def _objects(self) -> dict[str, int]:
        pages = (
            self._cloud.client("s3").get_paginator("list_objects_v2").paginate(Bucket=self._cloud.stack.outputs_bucket)
        )
        return {each["Key"]: each["Size"] for page in pages for each in page.get("Contents", [])}

    def _processes(self) -> dict[tuple[str, int], Path]:
        found = {}
        for process in Path("/proc").iterdir():
            if not process.name.isdigit():
                continue
            try:
                command = (process / "cmdline").read_text()
            except OSError:
                continue
            if worker := re.search(r"ministack-lambda-(.+)-[^-/]+/_worker", command):
                names = [name for name, id_ in self.functions.items() if id_ == worker[1]]
                found.update({(name, int(process.name)): process for name in names})
        return found

    def _cpu(self) -> dict[tuple[str, int], float]:
        """CPU milliseconds of each function's processes: those of the scheduler, which are exact."""
        found = {}
        for key, process in self._processes().items():
            try:
                tasks = [(task / "schedstat").read_text().split() for task in (process / "task").iterdir()]
                fields = (process / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            # Threads that have ended are only in the sum, which counts in ticks.
            found[key] = max(sum(int(task[0]) / 1e6 for task in tasks), (int(fields[11]) + int(fields[12])) * _TICKS_MS)
        return found

    def _cpu_ms(
        self, name: str, before: Mapping[tuple[str, int], float], after: Mapping[tuple[str, int], float]
    ) -> float:
        """CPU of a function's warm processes; one that started in between has its imports in it, and counts without."""
        return sum(ms - before[key] for key, ms in after.items() if key[0] == name and key in before)

    def _note_peaks(self) -> None:
        for (name, _), process in self._processes().items():
            try:
                found = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
            except OSError:
                continue
            self.peaks[name] = max(self.peaks.get(name, 0), int(found[1]) if found else 0)


def _write_units(change: Mapping[str, Any]) -> int:
    return write_units(change, TOKEN_CHARACTERS)


def _times(length: int) -> int:
    """Return how often a `run()` is counted: its create races with the webhook, and one that polls takes a minute."""
    return REPEATED if length <= SYNC_WAIT_SECONDS else 1


def _middle(found: list[Used]) -> Used:
    """Return the dearest of some runs, with the median CPU of each function in all of them."""
    dearest = max(found, key=lambda used: sum(cost_page.dollars(cost_page.units(used)).values()))
    functions = {
        name: {**used, "cpu_ms": median(each.functions.get(name, used)["cpu_ms"] for each in found)}
        for name, used in dearest.functions.items()
    }
    return Used(dearest.counts, functions)


@contextmanager
def _refusing(terminal: Terminal) -> Iterator[None]:
    try:
        yield
    except (BenchmarkFailed, LocalCloudError) as error:
        terminal.refuse(str(error))
        raise SystemExit(1) from error


def main() -> None:
    """Count, show, and write if asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.costs", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write counted.json, docs/cost.md and docs/cost.svg")
    parser.add_argument("--memory", action="store_true", help="measure the memory that the largest answers take")
    options = parser.parse_args()
    write = options.write
    terminal = Terminal(sys.stdout)
    with _refusing(terminal):
        found = measure(terminal.step, largest=with_the_largest_answers(terminal.step) if options.memory else None)
        cost_page.show(terminal, found)
        if write:
            found.store(COUNTED)
            cost_page.write(found)


if __name__ == "__main__":
    main()
