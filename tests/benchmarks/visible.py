"""How soon a caller can see that a prediction completed, beside a caller who polls Replicate.

    python -m tests.benchmarks.visible [--runs 20]

Everything is on the local cloud, on warm functions. The time is that from `completed_at`, as the stand-in for Replicate
sets it, until a GET of the prediction would show its completion: until the item says so, looked at each 10 ms. Nothing
is subtracted: the webhook's way through the emulator, which runs functions in processes of their own, counts for the
stack. Meanwhile callers of the stand-in itself poll it, as the official clients do (0.5 s) and as a loop of Step
Functions would (5 s).
"""

import argparse
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import quantiles
from typing import Any

import httpx

from local.cloud import LocalCloud, LocalCloudError
from local.terminal import Terminal
from tests.benchmarks.report import BenchmarkFailed, note, table

RUNS = 20
WARM_RUNS = 3
SECONDS = 60.0
LOOK_SECONDS = 0.01
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "no file": ("local/sleeper", {"seconds": 0.3}),
    "one file": ("local/painter", {"prompt": "a lighthouse by the sea at dusk", "seed": 7}),
}
# How often each asks, and how many do at once: those who ask seldom see few completions in the same time.
POLLERS = ((0.5, 2), (5.0, 6))
GOAL = 1 / 5


@dataclass(frozen=True)
class Visible:
    """Milliseconds from completion until it is visible, by who looks at what.

    Attributes:
        stack: By kind of prediction.
        answered: Until the webhook of it was answered, which the visible completion comes before or soon after.
        polled: By the seconds between two polls.
    """

    stack: Mapping[str, Sequence[float]]
    answered: Mapping[str, Sequence[float]]
    polled: Mapping[float, Sequence[float]]


def measure(say: Callable[[str], None], runs: int = RUNS) -> Visible:
    """Deploy to a local cloud of its own, and run predictions of each kind while others poll.

    Raises:
        BenchmarkFailed: A prediction did not succeed.
        LocalCloudError: The local cloud did not start.
    """
    with LocalCloud(say=say) as cloud:
        bench = _Bench(cloud)
        say("warming the functions")
        for kind in MODELS:
            for _ in range(WARM_RUNS):
                bench.run(kind)
        cloud.replicate.reset()
        say(f"timing: {runs} of each, while {sum(number for _, number in POLLERS)} callers poll Replicate's stand-in")
        with bench.polled() as polled:
            found = {kind: [bench.run(kind) for _ in range(runs)] for kind in MODELS}
        say("stopping")
    return Visible(
        {kind: [visible for visible, _ in each] for kind, each in found.items()},
        {kind: [answered for _, answered in each] for kind, each in found.items()},
        polled,
    )


def show(terminal: Terminal, found: Visible) -> None:
    """Show p50 and p95 of each, and what the goal says of them."""
    half = found.polled[POLLERS[0][0]]
    rows = [
        *((f"the stack, {kind}", *_row(times, half)) for kind, times in found.stack.items()),
        *((f"  its webhook answered, {kind}", *_row(times, half)) for kind, times in found.answered.items()),
        *((f"polling each {seconds:g} s", *_row(times, half)) for seconds, times in found.polled.items()),
    ]
    terminal.write()
    terminal.write(table(("completion until visible, ms", "runs", "p50", "p95", "p50 in that of 0.5 s"), rows))
    ratio = _percentile(found.stack["no file"], 50) / _percentile(half, 50)
    terminal.write(
        note(
            f"Without a file at most {GOAL:g} of the p50 of polling each 0.5 s: {ratio:.2f}. Warm functions on the "
            "local cloud, nothing subtracted: the emulator takes the webhook, starts its function and writes the item "
            "on this machine, and is slower where the machine does other work, which polling is not. The item is "
            f"looked at each {LOOK_SECONDS * 1000:.0f} ms, which is part of it. A poll's time ends "
            "with its answer."
        )
    )


def _row(times: Sequence[float], half: Sequence[float]) -> tuple[str, ...]:
    p50, p95 = _percentile(times, 50), _percentile(times, 95)
    return f"{len(times)}", f"{p50:,.0f}", f"{p95:,.0f}", f"{p50 / _percentile(half, 50):.2f}"


def _percentile(times: Sequence[float], percent: int) -> float:
    return quantiles(times, n=100, method="inclusive")[percent - 1]


class _Bench:
    def __init__(self, cloud: LocalCloud) -> None:
        self._cloud = cloud
        token = cloud.stack.access_token
        self._api = httpx.Client(
            base_url=cloud.stack.api_url, headers={"Authorization": f"Bearer {token}"}, timeout=60, trust_env=False
        )
        self._dynamodb = cloud.client("dynamodb")

    def run(self, kind: str) -> tuple[float, float]:
        """Run one prediction; return when its completion was visible, and when its webhook was answered.

        Raises:
            BenchmarkFailed: It did not succeed.
        """
        model, given = MODELS[kind]
        answer = self._api.post(f"/models/{model}/predictions", json={"input": given})
        if answer.status_code != 201:
            raise BenchmarkFailed(f"{kind}: POST answered {answer.status_code}: {answer.text[:500]}")
        id_ = answer.json()["id"]
        end = time.monotonic() + SECONDS
        while (item := self._item(id_)).get("visible") not in ("succeeded", "failed", "canceled"):
            if time.monotonic() > end:
                raise BenchmarkFailed(f"{kind}: {id_} is {item.get('visible')} after {SECONDS:.0f} s")
            time.sleep(LOOK_SECONDS)
        seen = time.time()
        if item["visible"] != "succeeded":
            raise BenchmarkFailed(f"{kind}: {id_} ended {item['visible']}")
        completed = _unix(self._api.get(f"/predictions/{id_}").raise_for_status().json()["completed_at"])
        webhook = self._cloud.replicate.wait_for_webhook(item["upstream_id"])
        return (seen - completed) * 1000, (_unix(webhook["at"]) - completed) * 1000

    def _item(self, id_: str) -> dict[str, Any]:
        answer = self._dynamodb.get_item(
            TableName=self._cloud.stack.table_name,
            Key={"pk": {"S": f"prediction#{id_}"}, "sk": {"S": "status"}},
            ConsistentRead=True,
        )
        return {name: next(iter(value.values())) for name, value in answer["Item"].items()}

    def polled(self) -> "_Pollers":
        """Callers who poll Replicate's stand-in while the context lasts."""
        return _Pollers(self._cloud.replicate.url, self._cloud.replicate.headers)


class _Pollers:
    """Callers in threads, each of whom runs one prediction after the other and polls it."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._url, self._headers = url, dict(headers)
        self._over = threading.Event()
        self._found: dict[float, list[float]] = {seconds: [] for seconds, _ in POLLERS}
        self._failed: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._poll, args=(seconds, number))
            for seconds, count in POLLERS
            for number in range(count)
        ]

    def __enter__(self) -> Mapping[float, Sequence[float]]:
        for thread in self._threads:
            thread.start()
        return self._found

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        if self._failed:
            raise BenchmarkFailed(f"polling failed: {self._failed[0]}")

    def _poll(self, seconds: float, number: int) -> None:
        rng = random.Random(number)  # noqa: S311  # not for secrets
        try:
            with httpx.Client(base_url=self._url, headers=self._headers, timeout=30, trust_env=False) as api:
                version = api.get("/models/local/sleeper").json()["latest_version"]["id"]
                # The last one is polled to its end, so that slow pollers see some at all.
                while not self._over.is_set():
                    body = {"version": version, "input": {"seconds": rng.uniform(0.1, 0.1 + seconds)}}
                    url = api.post("/predictions", json=body).raise_for_status().json()["urls"]["get"]
                    while (shown := api.get(url).json())["status"] not in ("succeeded", "failed", "canceled"):
                        time.sleep(seconds)
                    self._found[seconds].append((time.time() - _unix(shown["completed_at"])) * 1000)
        except Exception as error:  # noqa: BLE001  # raised where the pollers are joined
            self._failed.append(error)


def _unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def main() -> int:
    """Run this part alone; return the exit status."""
    parser = argparse.ArgumentParser(description="Measure how soon a completion is visible.")
    parser.add_argument("--runs", type=int, default=RUNS, help="predictions of each kind")
    terminal = Terminal(sys.stdout)
    try:
        show(terminal, measure(terminal.step, parser.parse_args().runs))
    except (BenchmarkFailed, LocalCloudError) as error:
        terminal.refuse(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
