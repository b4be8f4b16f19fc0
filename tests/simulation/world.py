"""One schedule: the stack, Replicate and the callers, from a seed to the verdict."""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
from predictions import aws, intents, outputs, table
from predictions.items import deserialize
from predictions.limiter import Limiter
from predictions.limits import OwnersUsage
from predictions.observability import logger, metrics
from predictions.outputs import OutputsBucket
from predictions.requests import Requests
from predictions.schemas import ModelSchemas
from predictions.statuses import visible
from predictions.submissions import Submissions

from tests.simulation import account
from tests.simulation.account import Account, Clients
from tests.simulation.dynamodb import ConditionFailed, Item, Table
from tests.simulation.faults import Faults
from tests.simulation.functions import FunctionFailed, Functions
from tests.simulation.machine import StateMachine, TaskError
from tests.simulation.scheduler import BEGIN, Died, Process, Scheduler
from tests.simulation.upstream import SECRET, TERMINAL, TOKEN, Run, Upstream, file_bytes
from tests.unit.conftest import ENVIRONMENT
from tests.unit.template import ROOT

API_URL = "https://api.example.com/v1"
LIFETIME_SECONDS = 3600
END_SECONDS = 5 * 3600.0
"""By then everything has to be over: the deadline, the hour in which Replicate is asked on, and room."""

FOUND_SECONDS = 85
"""Until then after its claim, a create that takes effect is found in Replicate's list; later only a webhook tells."""

ENVIRONMENT_HERE = {
    **ENVIRONMENT,
    "DEFAULT_LIFETIME_SECONDS": str(LIFETIME_SECONDS),
    "POWERTOOLS_METRICS_DISABLED": "true",
    "POWERTOOLS_LOG_LEVEL": "CRITICAL",
}


@dataclass
class Wanted:
    """One request of a caller's, and what became of it in his eyes."""

    number: int
    door: str
    prompt: str
    key: str
    lifetime: str | None
    wait: str | None
    accepted_id: str | None = None
    refused: bool = False
    canceled_at: float | None = None
    deleted: bool = False


@dataclass
class Verdict:
    """How a schedule went.

    Attributes:
        seed: Its seed.
        broken: What was promised and not kept; empty where all is well.
        figures: What happened, counted.
    """

    seed: int
    broken: list[str]
    figures: dict[str, int] = field(default_factory=dict)


class World:
    """Everything in one schedule.

    Args:
        seed: Decides all that is left to chance.
        trace: Takes a line for each step.
        recorder: Takes each call to DynamoDB with its answer.
    """

    def __init__(
        self, seed: int, *, trace: Callable[[str], None] | None = None, recorder: Callable[..., None] | None = None
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)  # noqa: S311  # not for secrets
        self.trace = trace
        self.recorder = recorder
        self.scheduler = Scheduler()
        self.faults = Faults(self.rng, self.scheduler)
        self.api_url = API_URL
        self.table = Table(lambda: self.scheduler.now, self.faults.index_lag, self._written)
        self.account = Account(self)
        self.functions = Functions(self)
        self.upstream = Upstream(self)
        self.machine = StateMachine(
            definition(), self.scheduler, {"lambda:invoke": self._invoke, "aws-sdk:dynamodb:updateItem": self._update}
        )
        self.canceled: dict[str, float] = {}
        self.broken: BaseException | None = None
        self.violations: list[str] = []
        self.terminal_at: dict[str, float] = {}
        self.visible_at: dict[str, float] = {}
        self._copiers: dict[str, list[tuple[str, Process]]] = {}
        self._open: dict[str, int] = {}
        self._of_messages: dict[str, str] = {}
        self._sweeps = 0
        secret = {"current": SECRET, "previous": None, "rotated_at": "2025-01-01T00:00:00+00:00"}
        self.account.secrets = {
            "replicate-token": TOKEN,
            "signing-secret": "{}" if self.faults.secret_is_unknown else json.dumps(secret),
        }
        self.account.parameters = {ENVIRONMENT["API_URL_PARAMETER"]: API_URL}

    # -- the choke point --------------------------------------------------------------------------------------

    def step(self, what: str, seconds: float) -> None:
        """A side effect is about to happen: time passes, and others run.

        Raises:
            Died: The process has ended.
        """
        process = self.scheduler.current
        if process is not None and process.killed:
            raise Died
        self.scheduler.sleep(seconds)
        if self.trace is not None:
            self._say(what)

    def die(self) -> None:
        """Ends the process that runs now.

        Raises:
            Died: Always.
        """
        assert self.scheduler.current is not None
        self.scheduler.current.killed = True
        if self.trace is not None:
            self._say("dies")
        raise Died

    def call(self, service: str, operation: str, asked: dict[str, Any], client: Any) -> Any:
        """One call to AWS."""
        return account.call(self, service, operation, asked, client)

    def answer(self, how: str, request: httpx.Request) -> httpx.Response:
        """One request to Replicate, or to its file host."""
        try:
            answer: httpx.Response = getattr(self.upstream, how)(request)
        except httpx.HTTPError:
            raise
        except Exception as error:
            self.broken = error  # the library would bear it
            raise
        return answer

    def _say(self, what: str) -> None:
        assert self.trace is not None
        name = self.scheduler.current.name if self.scheduler.current else "-"
        self.trace(f"{self.scheduler.now - BEGIN:10.2f}  {name:28} {what}")

    # -- the state machine's tasks ----------------------------------------------------------------------------

    def _invoke(self, given: dict[str, Any], timeout: float) -> None:
        function, event = given["FunctionName"], given["Payload"]
        fault = self.faults.of_invoke()
        self.step(f"invoke {function} {fault or ''}", 0.02)
        if fault == "refused":
            raise TaskError("Lambda.TooManyRequestsException")
        if fault == "unknown":
            raise TaskError("Lambda.Unknown")
        if fault == "answer lost":
            self.scheduler.spawn("invoked, answer lost", lambda: self._try(function, event))
            self.step("answer lost", self.rng.choice((0.0, 1.0, 30.0)))
            raise TaskError("Lambda.SdkClientException")
        if fault == "twice":
            self.scheduler.spawn("invoked twice", lambda: self._try(function, event), self.rng.choice((0.0, 0.03, 0.5)))
        try:
            self.functions.invoke(function, event, timeout)
        except FunctionFailed as failed:
            if self.trace is not None:
                self._say(f"{function} failed: {failed.kind} {failed.message}")
            name = {"timeout": "Sandbox.Timedout", "died": "Lambda.Unknown"}.get(failed.kind, failed.kind)
            raise TaskError(name, json.dumps({"errorType": name, "errorMessage": failed.message})) from None

    def _try(self, function: str, event: Any) -> None:
        try:
            self.functions.invoke(function, event)
        except FunctionFailed as failed:
            if self.trace is not None:
                self._say(f"{function} failed: {failed.kind} {failed.message}")

    def _update(self, given: dict[str, Any], timeout: float) -> None:
        self.step("AwaitWebhook", 0.02)
        if self.faults.of_state():
            raise TaskError("DynamoDb.ThrottlingException")
        try:
            answer = self.table.call("UpdateItem", given)
        except ConditionFailed:
            raise TaskError("DynamoDb.ConditionalCheckFailedException") from None
        if self.recorder is not None:
            self.recorder("dynamodb", "UpdateItem", given, answer)
        self.step("AwaitWebhook answered", 0.02)

    # -- what is watched while it happens ---------------------------------------------------------------------

    def _written(self, before: Item | None, after: Item | None) -> None:
        item: Item = after or before or {}
        pk, sk = item["pk"]["S"], item["sk"]["S"]
        if after and "open" in after and "next_check_at" in after:
            self._open[pk] = int(after["next_check_at"]["N"])
        elif sk in ("status", "creates"):
            self._open.pop(pk, None)
        if not pk.startswith("prediction#"):
            return
        prediction_id = pk.partition("#")[2]
        if self.trace is not None and sk == "status" and after:
            kept = ("status", "visible", "upstream_id", "claimed", "next_check_at", "execution_n", "orphans")
            self._say("writes " + " ".join(f"{n}={next(iter(after[n].values()))}" for n in kept if n in after))
        if sk.startswith("result#") and before and after and before["json"] != after["json"]:
            self.violations.append(f"{prediction_id}: the result changed after it was kept")
        if sk != "status":
            return
        if after is None:
            self.violations.append(f"{prediction_id}: the item was removed")
            return
        now = self.scheduler.now
        ended = after["rank"]["N"] == "9"
        if ended and prediction_id not in self.terminal_at:
            self.terminal_at[prediction_id] = now
        if ended and after["visible"]["S"] in TERMINAL and prediction_id not in self.visible_at:
            self.visible_at[prediction_id] = now
        if before is None:
            process = self.scheduler.current
            if process is not None and process.event is not None and "Records" in process.event:
                self._of_messages[process.event["Records"][0]["messageId"]] = prediction_id
            return
        if "upstream_id" in before and before["upstream_id"] != after.get("upstream_id"):
            self.violations.append(f"{prediction_id}: bound to another upstream id")
        if before["rank"]["N"] == "9":
            for name in ("rank", "status", "error", "completed_at", "upstream_id", "metrics_json"):
                if before.get(name) != after.get(name):
                    self.violations.append(f"{prediction_id}: {name} changed after the end")
            if before["visible"] != after["visible"] and before["visible"]["S"] != "processing":
                self.violations.append(f"{prediction_id}: the visible status changed after the end")

    def stored(self, key: str, body: bytes) -> None:
        """An object becomes visible."""
        parts = key.split("/")
        if parts[0] == "payloads":
            return
        url = f"https://replicate.delivery/xezq/{parts[-2]}/{parts[-1]}.png"
        if body != file_bytes(url):
            self.violations.append(f"{key}: a partial object, {len(body)} of {len(file_bytes(url))} bytes")

    def copies(self, prediction_id: str | None) -> None:
        """The process that runs now copies a file of this prediction."""
        process = self.scheduler.current
        if process is None or process.event is None or prediction_id is None:
            return
        execution = process.event["execution"]
        copiers = self._copiers.setdefault(prediction_id, [])
        if any(other != execution and not (by.over or by.killed) for other, by in copiers):
            self.violations.append(f"{prediction_id}: two executions copy at once")
        copiers.append((execution, process))

    def stop_copying(self) -> bool:
        """Whether somebody stops the execution whose function is about to copy a file, and that file comes slowly."""
        process = self.scheduler.current
        if not self.faults.stops_copy() or process is None or process.event is None:
            return False
        self.machine.stop(process.event["execution"])
        return True

    # -- callers ----------------------------------------------------------------------------------------------

    def api_event(self, method: str, path: str, headers: dict[str, str], body: bytes | str = "") -> dict[str, Any]:
        """An event of API Gateway's, as far as the handlers read it."""
        return {
            "resource": path,
            "path": path,
            "httpMethod": method,
            "headers": headers,
            "multiValueHeaders": {name: [value] for name, value in headers.items()},
            "queryStringParameters": None,
            "multiValueQueryStringParameters": None,
            "pathParameters": None,
            "stageVariables": None,
            "requestContext": {
                "authorizer": {"owner": "alice", "scopes": "predict read"},
                "requestId": "r",
                "requestTimeEpoch": int(self.scheduler.now * 1000),
                "stage": "v1",
                "path": path,
                "httpMethod": method,
                "identity": {},
            },
            "body": body.decode() if isinstance(body, bytes) else body,
            "isBase64Encoded": False,
        }

    def _ask_for(self, wanted: Wanted) -> None:
        self.scheduler.sleep(self.rng.choice((0.0, 0.0, 0.05, 3.0)))
        if wanted.door == "queue":
            twice = self.rng.random() < 0.3
            if twice:
                self.scheduler.spawn(
                    "message again", lambda: self._send(wanted), self.rng.choice((0.0, 0.1, 5.0, 100.0, 400.0))
                )
            self._send(wanted)
        else:
            self._post(wanted)

    def _post(self, wanted: Wanted) -> None:
        body: dict[str, Any] = {"input": {"prompt": wanted.prompt}}
        if wanted.lifetime:
            body["lifetime"] = wanted.lifetime
        tries = {"key": 6, "sdk": 3, "plain": 1}[wanted.door]
        for attempt in range(tries):
            headers = {"Content-Type": "application/json"}
            if wanted.door == "key":
                headers["Idempotency-Key"] = wanted.key
            if wanted.door == "sdk":
                headers["x-stainless-retry-count"] = str(attempt)
            if wanted.wait:
                headers["Prefer"] = wanted.wait
            event = self.api_event("POST", "/models/meta/llama/predictions", headers, json.dumps(body))
            # Some hang up early, and ask again while the first one is still at work.
            patience = self.rng.choice((2.0, 10.0)) if tries > 1 and self.rng.random() < 0.2 else 29.0
            try:
                answer = self.functions.invoke("start_prediction", event, patience)
            except FunctionFailed:
                answer = {"statusCode": 502}
            if self.trace is not None:
                self._say(f"answered {answer['statusCode']} {str(answer.get('body'))[:200]}")
            if answer["statusCode"] == 201:
                wanted.accepted_id = json.loads(answer["body"])["id"]
                return
            if answer["statusCode"] < 500 and answer["statusCode"] != 429:
                wanted.refused = True
                return
            self.scheduler.sleep(self.rng.choice((0.5, 2.0, 8.0)))

    def _send(self, wanted: Wanted) -> None:
        body = {"model": "meta/llama", "input": {"prompt": wanted.prompt}}
        if wanted.lifetime:
            body["lifetime"] = wanted.lifetime
        record = {
            "messageId": f"059f36b4-87a3-44ab-83d2-{wanted.number:012d}",
            "receiptHandle": "handle",
            "body": json.dumps(body),
            "attributes": {"SentTimestamp": str(int(BEGIN) * 1000), "SenderId": "AROAALICE0000"},
            "messageAttributes": {},
            "eventSource": "aws:sqs",
            "eventSourceARN": "arn:aws:sqs:us-east-1:123456789012:requests",
            "awsRegion": "us-east-1",
        }  # fmt: skip
        for _ in range(5):
            began = self.scheduler.now
            try:
                answer = self.functions.invoke("start_from_queue", {"Records": [record]})
            except FunctionFailed:
                answer = {"batchItemFailures": [{"itemIdentifier": record["messageId"]}]}
            if not answer["batchItemFailures"]:
                wanted.accepted_id = self._of_messages.get(str(record["messageId"]), "nothing")
                return
            self.scheduler.sleep(180 - (self.scheduler.now - began))
        self.violations.append(f"the message of request {wanted.number} went to the dead-letter queue")

    def _cancel_some_time(self, wanted: Wanted) -> None:
        self.scheduler.sleep(self.rng.choice((0.0, 0.5, 5.0, 30.0, 100.0, 400.0)))
        for _ in range(4):
            if (prediction_id := wanted.accepted_id) is None:
                self.scheduler.sleep(self.rng.choice((0.3, 20.0)))
                continue
            was_over = prediction_id in self.terminal_at
            try:
                event = self.api_event("POST", f"/predictions/{prediction_id}/cancel", {})
                answer = self.functions.invoke("cancel_prediction", event)
            except FunctionFailed:
                answer = {"statusCode": 502}
            if answer["statusCode"] == 200:
                if not was_over:
                    wanted.canceled_at = self.scheduler.now
                return
            self.scheduler.sleep(2.0)

    def _delete_some_time(self, wanted: Wanted) -> None:
        for _ in range(6):
            self.scheduler.sleep(self.rng.choice((1.0, 20.0, 300.0)))
            prediction_id = wanted.accepted_id
            if prediction_id is None or prediction_id not in self.visible_at:
                continue
            try:
                answer = self.functions.invoke(
                    "cancel_prediction", self.api_event("DELETE", f"/predictions/{prediction_id}", {})
                )
            except FunctionFailed:
                answer = {"statusCode": 502}
            if answer["statusCode"] == 200:
                wanted.deleted = True
                return

    # -- the minute's sweep -----------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = self.scheduler.now
        due = any(moment <= now for moment in self._open.values())
        if due or (self.faults.secret_is_unknown and self._sweeps == 0):
            self._sweeps += 1
            for delay in (0.0, 0.02) if self.faults.doubled_sweeps else (0.0,):
                self.scheduler.spawn("schedule", lambda: self._try("sweep_predictions", {}), delay)
        if self._open or not self.scheduler.idle:
            self.scheduler.at(now + 60, self._tick)

    # -- run --------------------------------------------------------------------------------------------------

    def run(self) -> Verdict:
        """Runs the schedule, and looks at what is left."""
        rng = self.rng
        self.requests = self._plan()
        for wanted in self.requests:
            self.scheduler.spawn(f"caller {wanted.number}", partial(self._ask_for, wanted))
            if rng.random() < (0.7 if self.faults.long_runs else 0.25):
                self.scheduler.spawn(f"cancel {wanted.number}", partial(self._cancel_some_time, wanted))
            if rng.random() < 0.25:
                self.scheduler.spawn(f"delete {wanted.number}", partial(self._delete_some_time, wanted))
        if self.faults.stops:
            for _ in range(2):
                self.scheduler.at(BEGIN + rng.choice((2.0, 20.0, 45.0, 90.0, 200.0, 500.0)), self._stop_one)
        self.scheduler.at(BEGIN + rng.uniform(0, 60), self._tick)
        over = self.scheduler.run(BEGIN + END_SECONDS)
        if self.broken is not None:
            raise self.broken
        self._check(over)
        ended = self.scheduler.now - BEGIN
        self.scheduler.stop()
        figures = {
            "predictions": len(self.terminal_at),
            "runs at Replicate": len(self.upstream.runs),
            "invocations": sum(self.functions.invocations.values()),
            "executions": len(self.machine.executions),
            "states": sum(len(e.states) for e in self.machine.executions.values()),
            "virtual seconds": int(ended),
            **{f"runs of {name}": number for name, number in self.functions.invocations.items()},
            **{f"faults: {kind}": number for kind, number in self.faults.struck.items()},
        }
        return Verdict(self.seed, self.violations, figures)

    def _plan(self) -> list[Wanted]:
        rng = self.rng
        doors = [rng.choice(("key", "key", "sdk", "plain", "queue", "queue")) for _ in range(rng.choice((1, 1, 1, 2)))]
        twins = rng.random() < 0.3
        requests = []
        for number, door in enumerate(doors):
            same = twins and door in ("key", "queue")
            lifetime = "10m" if self.faults.very_late else rng.choice((None, None, "10m", "30m"))
            if self.faults.long_runs and not self.faults.very_late:
                lifetime = None
            wait = rng.choice((None, None, None, "wait=3"))
            requests.append(
                Wanted(number, door, "the same" if same else f"number {number}", f"key-{number}", lifetime, wait)
            )
        return requests

    def _stop_one(self) -> None:
        running = [
            name
            for name, execution in self.machine.executions.items()
            if execution.status == "RUNNING" and execution.states[-1:] != ["CopyOutputs"]
        ]
        if running:
            self.faults.struck["stopped"] = self.faults.struck.get("stopped", 0) + 1
            self.machine.stop(self.rng.choice(running))

    # -- the verdict ------------------------------------------------------------------------------------------

    def _statuses(self) -> Iterator[Item]:
        for (pk, sk), item in list(self.table.items.items()):
            if pk.startswith("prediction#") and sk == "status":
                yield item

    def _check(self, over: bool) -> None:
        bad = self.violations.append
        if not over:
            bad("something still goes on after five hours")
        for name, execution in self.machine.executions.items():
            if execution.status == "RUNNING":
                bad(f"execution {name} still runs, in {execution.states[-1]}")
        items = {item["id"]["S"]: deserialize(item) for item in self._statuses()}
        for wanted in self.requests:
            if wanted.accepted_id and wanted.accepted_id not in items:
                bad(f"request {wanted.number} is lost: it was accepted as {wanted.accepted_id}")
        self._check_starts()
        runs: dict[str, list[Run]] = {}
        for run in self.upstream.runs.values():
            runs.setdefault(run.our_id or "", []).append(run)
            if not run.over:
                bad(f"{run.id} still runs at Replicate")
        for prediction_id, item in items.items():
            self._check_item(prediction_id, item, runs.get(prediction_id, []))

    def _check_starts(self) -> None:
        wanted: dict[str, int] = {}
        for request in self.requests:
            wanted[request.prompt] = wanted.get(request.prompt, 0) + 1
        started: dict[str, int] = {}
        by_id: dict[str, int] = {}
        for run in self.upstream.runs.values():
            started[run.prompt] = started.get(run.prompt, 0) + 1
            by_id[str(run.our_id)] = by_id.get(str(run.our_id), 0) + 1
        for prompt, number in started.items():
            if number > wanted.get(prompt, 0):
                self.violations.append(
                    f"{prompt!r} was started {number} times, and asked for {wanted.get(prompt, 0)} times"
                )
        for our_id, number in by_id.items():
            if number > 1:
                self.violations.append(f"{our_id}: was started {number} times")

    def _check_item(self, prediction_id: str, item: dict[str, Any], runs: list[Run]) -> None:
        def bad(what: str) -> None:
            self.violations.append(f"{prediction_id}: {what}")

        if item["rank"] != 9 or item["visible"] not in TERMINAL:
            bad(f"has not ended: {item['status']}, seen as {item['visible']}")
            return
        if item["visible"] != visible(item["status"]) or item["visible"] == "aborted":
            bad(f"ended {item['status']}, and is seen as {item['visible']}")
        if "next_check_at" in item or "open" in item:
            bad("is still on the sweep's list")
        wanted = next((w for w in self.requests if w.accepted_id == prediction_id), None)
        in_time = [run for run in runs if self._in_time(run, item)]
        bound = [run for run in runs if run.id == item.get("upstream_id")]
        if bound:
            self._check_end(item, bound[0], wanted, bad)
        elif in_time:
            bad(f"is lost: {in_time[0].id} ended {in_time[0].status}, and it {item['status']}: {item.get('error')}")
        else:
            self._check_unstarted(item, wanted, bad)
        for run in runs:
            orphan = run.id != item.get("upstream_id")
            if orphan and run.told_at and run.ended and run.id not in self.canceled and run.ended > run.told_at + 300:
                bad(f"its orphan {run.id} was left running")
        if wanted and wanted.deleted:
            self._check_deleted(item, bad)

    def _in_time(self, run: Run, item: dict[str, Any]) -> bool:
        """Whether the stack could have known of it before the end: by a webhook, or in the list near its claim."""
        ended_at = self.terminal_at[item["id"]]
        if run.heard_at is not None and run.heard_at < ended_at:
            return True
        return run.created < ended_at and run.created < item.get("claimed", 0) + FOUND_SECONDS

    def _check_unstarted(self, item: dict[str, Any], wanted: Wanted | None, bad: Callable[[str], None]) -> None:
        struck = {kind for kind in self.faults.struck if kind != "webhook"}
        if not struck and not (wanted and wanted.canceled_at):
            bad(f"was never started, and nothing was wrong: {item['status']}, {item.get('error')}")
        if item["status"] not in ("failed", "canceled"):
            bad(f"{item['status']}, and was never started")

    def _check_end(self, item: dict[str, Any], run: Run, wanted: Wanted | None, bad: Callable[[str], None]) -> None:
        if item["status"] != run.status:
            bad(f"ended {item['status']} ({item.get('error')}), at Replicate {run.status}")
            return
        assert run.ended is not None
        pk = item["pk"]
        deleted = "deleted" in item
        result = self.table.items.get((pk, f"result#{run.id}"))
        if run.status == "succeeded" and not deleted:
            told = json.loads(result["json"]["S"])["output"] if result else "nothing"
            if told != run.final_output:
                bad(f"its output is {told}, at Replicate {run.final_output}")
            self._check_files(item, run, bad)
        late = self.visible_at[item["id"]] - run.ended
        if late > 4000:
            bad(f"its end came {late:.0f} s late")
        quiet = not set(self.faults.struck) - {"webhook", "file"} and not self.faults.secret_is_unknown
        if quiet and late > 1100:
            bad(f"its end came {late:.0f} s late, though only webhooks and files were lost")
        only_receiving = not set(self.faults.struck) - {"webhook", "receiver"} and not self.faults.secret_is_unknown
        waited = self.visible_at[item["id"]] - self.terminal_at[item["id"]]
        if only_receiving and waited > 300:
            bad(f"its files were waited for {waited:.0f} s, though only webhooks went wrong")
        if wanted and wanted.canceled_at and run.ended > wanted.canceled_at + 1500 and run.cancel_asked is None:
            bad("its cancel never reached Replicate")

    def _check_files(self, item: dict[str, Any], run: Run, bad: Callable[[str], None]) -> None:
        output = run.final_output
        urls = [output] if isinstance(output, str) else output.get("images", []) if isinstance(output, dict) else []
        stored = json.loads(item.get("files_json") or "[]")
        if len(stored) != len(urls):
            bad(f"{len(stored)} of {len(urls)} files are stored")
        for url, file in zip(urls, stored, strict=False):
            body = self.account.objects.get(file.get("key") or "", (None, ""))[0]
            if body != file_bytes(url):
                bad(f"{url} is not stored: {file}")
            elif file["sha256"] != hashlib.sha256(body).hexdigest() or file["bytes"] != len(body):
                bad(f"{url} is stored, and described otherwise: {file}")

    def _check_deleted(self, item: dict[str, Any], bad: Callable[[str], None]) -> None:
        left = [sk for (pk, sk) in self.table.items if pk == item["pk"] and sk != "status"]
        left += [key for key in self.account.objects if item["id"] in key]
        if left:
            bad(f"was deleted, and {left} is left")


@cache
def definition() -> dict[str, Any]:
    """`track_prediction`, with the names of folders for functions and the tests' numbers."""
    text = (ROOT / "statemachine" / "track_prediction.asl.json").read_text()
    given = {
        "${Partition}": "aws",
        "${TableName}": ENVIRONMENT["TABLE_NAME"],
        "${FirstPollSeconds}": ENVIRONMENT["FIRST_POLL_SECONDS"],
        "${PollSeconds}": ENVIRONMENT["POLL_SECONDS"],
        "${SubmitPredictionFunctionArn}": "submit_prediction",
        "${PollPredictionFunctionArn}": "poll_prediction",
        "${CopyOutputsFunctionArn}": "copy_outputs",
    }
    for name, value in given.items():
        text = text.replace(name, value)
    parsed: dict[str, Any] = json.loads(text)
    return parsed


class _Inline:
    """A pool of threads without threads: several at once would come in an order that no seed decides."""

    def __init__(self, _: int) -> None:
        pass

    def __enter__(self) -> "_Inline":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    map = staticmethod(map)


class Simulation:
    """Runs schedules in this process; see `installed`."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    def run(self, seed: int, **options: Any) -> Verdict:
        """Runs one schedule."""
        world = World(seed, **options)
        self._clients.world = world
        aws._api_url = None
        try:
            return world.run()
        finally:
            self._clients.world = None

    @property
    def world(self) -> World:
        """The one that runs now."""
        assert self._clients.world is not None
        return self._clients.world


def _count_nothing(*_: object, **__: object) -> None:
    """In the place of what writes metrics to the log."""


@cache
def _clients() -> Clients:
    """Made once: reading what botocore knows of six services takes a third of a second."""
    return Clients()


_CLOCKED = (Submissions, Limiter, OwnersUsage, ModelSchemas, Requests, OutputsBucket)


@contextmanager
def installed() -> Iterator[Simulation]:
    """The library in this world: its clients, clock and chance are the schedule's, everything else is real."""
    clients = _clients()
    simulation = Simulation(clients)

    def now() -> float:
        return simulation.world.scheduler.now

    def sleep(seconds: float) -> None:
        simulation.world.step("sleeps", seconds)

    transport = httpx.MockTransport(lambda request: simulation.world.answer("handle", request))
    files = httpx.Client(transport=httpx.MockTransport(lambda request: simulation.world.answer("serve_file", request)))

    class Client(httpx.Client):
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "transport": transport})

    chance = SimpleNamespace(
        token_hex=lambda n: simulation.world.rng.randbytes(n).hex(),
        token_bytes=lambda n: simulation.world.rng.randbytes(n),
    )
    clocks: dict[str, Any] = {"now": now, "sleep": sleep, "clock": now, "open_client": lambda: nullcontext(files)}
    level = logger.log_level
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith("AWS_")}, **ENVIRONMENT_HERE}
    with (
        mock.patch.dict(os.environ, environment, clear=True),
        mock.patch.object(aws, "_client", clients),
        mock.patch.object(aws, "time", SimpleNamespace(monotonic=now)),
        mock.patch.object(aws, "_api_url", None),
        mock.patch.object(intents, "secrets", chance),
        mock.patch.object(table, "secrets", chance),
        mock.patch.object(outputs, "ThreadPoolExecutor", _Inline),
        mock.patch.object(httpx, "Client", Client),
        mock.patch.object(metrics, "add_metric", _count_nothing),
        mock.patch("predictions.submissions.count_ended", _count_nothing),
        mock.patch("predictions.receipts.count_ended", _count_nothing),
        mock.patch("predictions.copies.count_ended", _count_nothing),
    ):
        logger.setLevel("CRITICAL")
        methods: list[Any] = [each.__init__ for each in _CLOCKED]
        kept = [(method, dict(method.__kwdefaults__)) for method in methods]
        for method, defaults in kept:
            method.__kwdefaults__ = {name: clocks.get(name, value) for name, value in defaults.items()}
        try:
            yield simulation
        finally:
            for method, defaults in kept:
                method.__kwdefaults__ = defaults
            logger.setLevel(level)
            files.close()


def run_seeds(seeds: range) -> tuple[int, Counter[str], list[Verdict]]:
    """Runs some schedules: how many, what happened in them, and those that broke a promise."""
    figures: Counter[str] = Counter()
    broken = []
    with installed() as simulation:
        for seed in seeds:
            verdict = simulation.run(seed)
            figures.update(verdict.figures)
            if verdict.broken:
                broken.append(verdict)
    return len(seeds), figures, broken
