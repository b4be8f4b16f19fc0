"""The demonstration: predictions on a local cloud, shown as they happen, and checked.

First part, through the HTTP API: one prediction paints a picture, one fails. Second part: the picture is dropped into a
bucket, and a recipe redraws it. Each line shows data from its source: the prediction's item, its execution's history,
the stand-in's record, the bucket. Any inconsistency ends the demonstration with an error.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from predictions.aws.dynamodb import Table
from predictions.money.stored import StackPrices

from local.cloud import LocalCloud, Upstream, local_directory
from local.terminal import Terminal

REPLICATE_API_URL = "https://api.replicate.com/v1"
SECONDS = 60.0
SECONDS_LIVE = 600.0  # a model that has been idle has to start first
# Functions that run each minute for the whole stack or serve this program: not part of a prediction.
NOT_COUNTED = {"sweep_predictions", "read_prediction", "read_predictions", "manage_recipes"}
_STREAM_SECONDS = 1.5  # the emulator reads the table's stream each second
NOT_COUNTED_CALL = "/webhooks/default/secret"  # also the sweep's
SUFFIXES = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp", "image/gif": ".gif"}


class DemoFailed(Exception):
    """A check failed; the message names it."""


@dataclass(frozen=True)
class Task:
    """One prediction to run, and its expected status."""

    title: str
    model: str
    input: Mapping[str, Any]
    status: str


PICTURE = Task(
    "A picture", "local/painter", {"prompt": "a lighthouse by the sea at dusk", "aspect_ratio": "3:2"}, "succeeded"
)
FAILURE = Task("One that fails", "local/crasher", {"message": "The model ran out of paint"}, "failed")
PICTURE_LIVE = Task(
    "A picture", "black-forest-labs/flux-schnell",
    {"prompt": "a lighthouse by the sea at dusk, watercolour", "num_outputs": 1}, "succeeded",
)  # fmt: skip
FAILURE_LIVE = Task(
    "One that fails (it is given a page for a picture)", "nightmareai/real-esrgan",
    {"image": "https://www.example.com/"}, "failed",
)  # fmt: skip

PRICED = ("local/painter", "local/etcher")
DOLLARS_A_SECOND = "0.000225"
"""What Replicate bills for a second on an Nvidia T4."""

DROPPED = Task("A file that is dropped into a bucket", "local/etcher", {"image": "{{ object.url }}"}, "succeeded")


def demonstrate(
    terminal: Terminal, environment: Mapping[str, str], *, live: bool = False, verbose: bool = False
) -> list[bytes]:
    """Run the predictions on a fresh local cloud; return the output files, in order.

    The last line links to the file of the first one.

    The second part is left out on the real Replicate, which could not open a link to this machine.

    Args:
        terminal: The terminal for the output.
        environment: For a live run, ``REPLICATE_API_TOKEN``.
        live: Run them on the real Replicate, which bills them, a cent or less.
        verbose: Also show the figures of each one: functions, states, writes, calls.

    Returns:
        The output files, in the order of their predictions.

    Raises:
        DemoFailed: A check failed, or a live run has no token.
        LocalCloudError: The local cloud did not start.
    """
    upstream = None
    parameters = {}
    if live:
        token = environment.get("REPLICATE_API_TOKEN")
        if not token:
            raise DemoFailed(
                "LIVE=1 runs two predictions on the real Replicate and needs REPLICATE_API_TOKEN "
                "(https://replicate.com/account/api-tokens). Without LIVE=1 a stand-in on this machine is used."
            )
        upstream = Upstream(environment.get("REPLICATE_API_URL") or REPLICATE_API_URL, token)
        # Replicate's webhooks do not reach this machine: it has to be polled.
        parameters = {"FirstPollSeconds": "5", "PollSeconds": "5"}
    terminal.title("replicate-serverless: predictions on a local cloud")
    with LocalCloud(parameters=parameters, upstream=upstream, say=terminal.step) as cloud:
        headers = {"Authorization": f"Bearer {cloud.stack.access_token}"}
        with httpx.Client(base_url=cloud.stack.api_url, headers=headers, timeout=30, trust_env=False) as api:
            if not live:
                _set_prices(cloud)
            runs = [
                _Run(cloud, api, terminal, task, live=live, verbose=verbose)
                for task in ((PICTURE_LIVE, FAILURE_LIVE) if live else (PICTURE, FAILURE))
            ]
            for run in runs:
                run.tell()
            if not live:
                runs.append(
                    _DroppedRun(cloud, api, terminal, DROPPED, live=False, verbose=verbose, content=runs[0].files[0][1])
                )
                runs[-1].tell()
        terminal.write()
        terminal.step("stopping")
    files = [file for run in runs for file in run.files]
    conclude(terminal, files[0][0])
    return [content for _, content in files]


def conclude(terminal: Terminal, picture: Path) -> None:
    """Write the last lines: that everything was checked, and a link to the picture, which terminals open."""
    terminal.succeed("all lines were checked")
    terminal.write(f"  {picture.as_uri()}")


def _set_prices(cloud: LocalCloud) -> None:
    """Give the stand-in's models a price, as `replicate-serverless prices set` does."""
    tier = {"prices": {"predict_time": DOLLARS_A_SECOND}}
    entry = {"date": datetime.now(UTC).date().isoformat(), "source": "https://replicate.com/pricing", "tiers": [tier]}
    prices = StackPrices(Table(cloud.stack.table_name, cloud.client("dynamodb")))
    prices.write_entries(lambda _: dict.fromkeys(PRICED, entry))


@dataclass
class _Run:
    """One prediction, from its request to its figures."""

    cloud: LocalCloud
    api: httpx.Client
    terminal: Terminal
    task: Task
    live: bool
    verbose: bool
    id: str = ""
    item: dict[str, Any] = field(default_factory=dict)
    files: list[tuple[Path, bytes]] = field(default_factory=list)

    def tell(self) -> None:
        """Run the prediction, print its timeline and check it.

        Raises:
            DemoFailed: The prediction did not complete as expected.
        """
        self.terminal.title(self.task.title)
        ran_before = self.cloud.invocations() if self.verbose else Counter()
        self._asked_before = 0 if self.live else len(self.cloud.replicate.record()["requests"])
        self._began = time.monotonic()
        self._request()
        for name, text in self._events():
            self._event(name, text)
        seconds = time.monotonic() - self._began
        prediction = self._get()
        _check(
            prediction["status"] == self.task.status,
            f"its status is {prediction['status']} ({prediction['error']}), not {self.task.status}",
        )
        if self.task.status == "succeeded":
            _check(prediction["output_files"], "it has no output files")
            for file in prediction["output_files"]:
                self._check_file(prediction["output"], file)
        else:
            _check(prediction["error"], "it failed without an error")
            self._event("error", prediction["error"])
        self._tell_cost(prediction)
        if not self.live:
            created = self._creates()
            _check(created == 1, f"it was created {created} times upstream")
        if self.verbose:
            time.sleep(_STREAM_SECONDS)
            self._figures(prediction, seconds, self.cloud.invocations() - ran_before)

    def _tell_cost(self, prediction: Mapping[str, Any]) -> None:
        """Tell what Replicate bills, which is known for a model with a price."""
        cost, metrics = prediction["cost"], prediction["metrics"]
        micro_dollars, seconds = cost["micro_dollars"], metrics.get("predict_time")
        if micro_dollars is None:
            self._event("cost", f"unknown: {cost['reason']}")
            return
        if self.task.model in PRICED:
            billed = round(seconds * float(DOLLARS_A_SECOND) * 10**6)
            _check(abs(micro_dollars - billed) <= 1, f"its cost is {micro_dollars} micro-dollars, not {billed}")
        how = cost["reason"] or f"{seconds:.3f} s, by the price {cost['price']}"
        self._event("cost", f"${micro_dollars / 10**6:.6f}: {how}")

    def _event(self, name: str, text: str) -> None:
        self.terminal.event(name, text, time.monotonic() - self._began)

    def _request(self) -> None:
        path = f"/models/{self.task.model}/predictions"
        body: dict[str, Any] = {"input": self.task.input}
        if self.task is FAILURE:  # a community model is addressed by its version
            path, body = "/predictions", {"version": self.task.model, **body}
        self._event("request", f"POST {path} {json.dumps(self.task.input)}")
        answer = self.api.post(path, json=body)
        _check(answer.status_code == 201, f"POST {path} answered {answer.status_code}: {answer.text[:500]}")
        self.id = answer.json()["id"]
        self._event("accepted", f"as {self.id}, status {answer.json()['status']}")

    def _events(self) -> Iterator[tuple[str, str]]:
        """Yield the events of the prediction until its completion."""
        deadline = time.monotonic() + (SECONDS_LIVE if self.live else SECONDS)
        submitted = visible = ""
        seen = 0
        webhooks: set[str] = set()
        over = False
        while not over:
            _check(time.monotonic() < deadline, f"{self.id} did not complete in time")
            # In this order: the first read shows the earlier event.
            over = self._execution_status() != "RUNNING"
            self.item = self._read_item()
            if not submitted and (submitted := self.item.get("upstream_id", "")):
                yield "submitted", f"to {self.cloud.replicate_url} as {submitted}"
            for webhook in self._webhooks(submitted):
                if webhook["webhook_id"] not in webhooks:
                    webhooks.add(webhook["webhook_id"])
                    # The response to anything but a valid signature of Replicate is 401.
                    _check(webhook["answer"] == 200, f"webhook {webhook['event']}: response {webhook['answer']}")
                    yield "webhook", f"{webhook['event']}: signature verified, response 200"
            history = self._states()
            for state in history[seen:]:
                yield "state", state
            seen = len(history)
            if visible != (visible := self.item["visible"]):
                yield "status", visible
            if not over:
                time.sleep(0.1)
        _check(visible == self.task.status, f"its execution has completed, but its status is {visible}")
        _check(self.live or webhooks, "no webhook reported its completion")

    def _check_file(self, output: Any, file: Mapping[str, Any]) -> None:
        """Check that record, URL and bucket have the same file, and save it."""
        _check("error" not in file, f"an output was not copied: {file.get('error')}")
        self._event("copied", f"{file['bytes']:,} bytes of {file['content_type']}")
        for name in ("bucket", "key", "sha256"):
            self.terminal.detail(name, file[name])
        url = output
        for part in file["path"].split("/")[1:]:
            url = url[int(part)] if isinstance(url, list) else url[part]
        with httpx.Client(trust_env=False, timeout=60) as http:  # without our token: the URL is sufficient
            downloaded = http.get(url).raise_for_status().content
        stored = self.cloud.client("s3").get_object(Bucket=file["bucket"], Key=file["key"])["Body"].read()
        for what, content in (("downloaded file", downloaded), ("object in the bucket", stored)):
            _check(len(content) == file["bytes"], f"the {what} has {len(content)} bytes")
            _check(hashlib.sha256(content).hexdigest() == file["sha256"], f"the {what} has a different sha256")
        name = f"{self.id}-{file['path'].strip('/').replace('/', '-') or '0'}"
        path = local_directory() / "demo" / f"{name}{SUFFIXES.get(file['content_type'], '')}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(downloaded)
        self.files.append((path, downloaded))
        self._event("checked", "its URL and the bucket return the same bytes")
        self._event("saved", _shown(path))

    def _figures(self, prediction: Mapping[str, Any], seconds: float, ran: Counter[str]) -> None:
        functions = {name: count for name, count in sorted(ran.items()) if name not in NOT_COUNTED}
        states = Counter(self._states())
        model_seconds = prediction["metrics"].get("predict_time", 0.0)
        self.terminal.write()
        figure = self.terminal.figure
        figure("time to completion", f"{seconds:.1f} s", f"of which the model ran {model_seconds:.1f} s")
        figure("functions run", str(sum(functions.values())), _counted(functions))
        figure("states entered", str(sum(states.values())), _counted(states))
        figure("item writes", str(self._writes()), "changes of this prediction's items, from the table's stream")
        if not self.live:
            calls = self._upstream_calls()
            figure("upstream calls", str(sum(calls.values())), _counted(calls))

    def _get(self) -> dict[str, Any]:
        answer = self.api.get(f"/predictions/{self.id}")
        _check(answer.status_code == 200, f"GET: response {answer.status_code}: {answer.text[:500]}")
        return dict(answer.json())

    def _read_item(self) -> dict[str, Any]:
        key = {"pk": {"S": f"prediction#{self.id}"}, "sk": {"S": "status"}}
        table = self.cloud.stack.table_name
        answer = self.cloud.client("dynamodb").get_item(TableName=table, Key=key, ConsistentRead=True)
        return {name: next(iter(value.values())) for name, value in answer["Item"].items()}

    def _execution_status(self) -> str:
        if not (arn := self.item.get("execution_arn")):
            return "RUNNING"
        states = self.cloud.client("stepfunctions")
        try:
            return str(states.describe_execution(executionArn=arn)["status"])
        except states.exceptions.ExecutionDoesNotExist:  # started after Replicate's response
            return "RUNNING"

    def _states(self) -> list[str]:
        states = self.cloud.client("stepfunctions")
        try:
            pages = states.get_paginator("get_execution_history").paginate(executionArn=self.item["execution_arn"])
            events = [event for page in pages for event in page["events"]]
        except states.exceptions.ExecutionDoesNotExist:
            return []
        return [event["stateEnteredEventDetails"]["name"] for event in events if event["type"].endswith("StateEntered")]

    def _webhooks(self, upstream_id: str) -> list[dict[str, Any]]:
        if self.live:
            return []
        sent = self.cloud.replicate.record()["webhooks"]
        return [webhook for webhook in sent if webhook["prediction"] == upstream_id]

    def _upstream_calls(self) -> Counter[str]:
        asked = self.cloud.replicate.record()["requests"][self._asked_before :]
        upstream_id = self.item["upstream_id"]
        calls = (f"{request['method']} {request['path'].replace(upstream_id, '{id}')}" for request in asked)
        return Counter(re.sub("/files/.*", "/files/…", call) for call in calls if not call.endswith(NOT_COUNTED_CALL))

    def _creates(self) -> int:
        calls = self._upstream_calls().items()
        return sum(count for call, count in calls if call.startswith("POST ") and "{id}" not in call)

    def _writes(self) -> int:
        stream = self.cloud.client("dynamodb").describe_table(TableName=self.cloud.stack.table_name)["Table"]
        streams = self.cloud.client("dynamodbstreams")
        arn = stream["LatestStreamArn"]
        keys = []
        for shard in streams.describe_stream(StreamArn=arn)["StreamDescription"]["Shards"]:
            iterator = streams.get_shard_iterator(
                StreamArn=arn, ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
            )["ShardIterator"]
            while iterator:
                page = streams.get_records(ShardIterator=iterator)
                keys += [record["dynamodb"]["Keys"]["pk"]["S"] for record in page["Records"]]
                iterator = page.get("NextShardIterator") if page["Records"] else None
        return keys.count(f"prediction#{self.id}")


@dataclass
class _DroppedRun(_Run):
    """One prediction that is started by a file."""

    content: bytes = b""

    def _request(self) -> None:
        recipe = {"name": "etchings", "model": self.task.model, "input": self.task.input, "s3": {"prefix": "photos/"}}
        self._event("recipe", f"POST /recipes {json.dumps(recipe)}")
        answer = self.api.post("/recipes", json=recipe)
        _check(answer.status_code == 201, f"POST /recipes: response {answer.status_code}: {answer.text[:500]}")
        known = {prediction["id"] for prediction in self._list()}
        bucket, key = self.cloud.stack.inputs_bucket, "photos/lighthouse.png"
        self.cloud.client("s3").put_object(Bucket=bucket, Key=key, Body=self.content, ContentType="image/png")
        self._event("dropped", f"{len(self.content):,} bytes as s3://{bucket}/{key}")
        started: list[dict[str, Any]] = []
        deadline = time.monotonic() + SECONDS
        while not started:
            _check(time.monotonic() < deadline, "the file started nothing")
            time.sleep(0.2)
            started = [prediction for prediction in self._list() if prediction["id"] not in known]
        _check(len(started) == 1, f"the file started {len(started)} predictions")
        self.id = started[0]["id"]
        self._event("started", f"by the object's event, through the bus and the requests queue, as {self.id}")
        with httpx.Client(trust_env=False, timeout=60, follow_redirects=True) as http:  # as the model does, no token
            opened = http.get(started[0]["input"]["image"]).raise_for_status().content
        _check(opened == self.content, "the link to the file returns other bytes")
        self._event("link", "the model's link to the file returns the same bytes, without a token")

    def _list(self) -> list[dict[str, Any]]:
        answer = self.api.get("/predictions")
        _check(answer.status_code == 200, f"GET /predictions: response {answer.status_code}: {answer.text[:500]}")
        return list(answer.json()["results"])


def _check(holds: object, otherwise: str) -> None:
    if not holds:
        raise DemoFailed(f"The demonstration failed: {otherwise}.")


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
