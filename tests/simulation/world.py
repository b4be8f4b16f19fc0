"""One schedule: the stack, Replicate and the callers, from a seed to the verdict."""

import base64
import hashlib
import hmac
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import httpx
from predictions.aws.dynamodb import serialize

from tests.simulation import account
from tests.simulation.account import Account
from tests.simulation.callers import Callers
from tests.simulation.distributed_map import BatchMachine
from tests.simulation.faults import Faults
from tests.simulation.functions import FunctionFailed, Functions
from tests.simulation.machine import StateMachine, TaskError, Tokens
from tests.simulation.queues import names_by_url, queues_of
from tests.simulation.receivers import Receivers
from tests.simulation.scenario import Scenario
from tests.simulation.stream import Stream
from tests.simulation.upstream import SECRET, TERMINAL, TOKEN, Upstream, file_bytes
from tests.simulation.verdict import PRICE, PRICED, Check, Verdict
from tests.support.dynamodb import ConditionFailed, Item, Table
from tests.support.fixtures import ENVIRONMENT
from tests.support.scheduler import BEGIN, Died, Process, Scheduler
from tests.support.template import ROOT

API_URL = "https://api.example.com/v1"
EXECUTIONS = "arn:aws:states:us-east-1:123456789012:execution"
LIFETIME_SECONDS = 3600
GRACE_SECONDS = 45
END_SECONDS = 5 * 3600.0
"""By then everything has to be over: the deadline, the hour in which Replicate is asked on, and room."""

MASTER_SECRET, LINK_SECRET = "m" * 64, "l" * 64

ENVIRONMENT_HERE = {
    **ENVIRONMENT,
    "DEFAULT_LIFETIME_SECONDS": str(LIFETIME_SECONDS),
    "TRAINING_LIFETIME_SECONDS": str(LIFETIME_SECONDS),
    "SUBMIT_GRACE_SECONDS": str(GRACE_SECONDS),
    "UNKNOWN_SUBMISSION": "resubmit",
    "QUEUE_SENDERS": "AROAALICE0000=alice,AROAMALLORY00=mallory",
    "POWERTOOLS_METRICS_DISABLED": "true",
    "POWERTOOLS_LOG_LEVEL": "CRITICAL",
}


class World:
    """Everything in one schedule.

    Args:
        seed: Decides all that is left to chance.
        scenarios: What else there is than predictions and their callers; see `worlds`.
        trace: Takes a line for each step.
        recorder: Takes each call to DynamoDB with its answer.
    """

    def __init__(
        self,
        seed: int,
        *,
        scenarios: Sequence[type[Scenario]] = (),
        trace: Callable[[str], None] | None = None,
        recorder: Callable[..., None] | None = None,
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)  # noqa: S311  # not for secrets
        self.trace = trace
        self.recorder = recorder
        self.scheduler = Scheduler()
        self.faults = Faults(self.rng, self.scheduler)
        self.api_url = API_URL
        self.table = Table(lambda: self.scheduler.now, self.faults.index_lag, self._written)
        self.table.items["prices", "book"] = serialize(
            {"pk": "prices", "sk": "book", "json": json.dumps({PRICED: PRICE}), "changes": 1}
        )
        self.account = Account(self)
        self.functions = Functions(self)
        self.upstream = Upstream(self)
        self.queues = queues_of(self)
        self.receivers = Receivers(self)
        self.stream = Stream(self) if scenarios else None
        self.callers = Callers(self)
        self.tokens = Tokens(self.scheduler)
        self.machines = self._make_machines()
        self.tracking = [self.machines[name] for name in ("track-prediction", "track-submitted")]
        self.canceled: dict[str, float] = {}
        self.broken: BaseException | None = None
        self.violations: list[str] = []
        self.prompts: Counter[str] = Counter()
        """How often a prompt may be started, where scenarios ask for it."""
        self.special: set[str] = set()
        """Predictions that a scenario looks at by itself."""
        self.ids_by_prompt: dict[str, dict[str, None]] = {}
        self.writers: dict[str, Process] = {}
        """Which run of a function wrote each batch, pipeline and prediction down."""
        self.events: list[tuple[float, dict[str, Any]]] = []
        """What is on the bus: entries of PutEvents."""
        self.delays: dict[str, float] = {}
        self.terminal_at: dict[str, float] = {}
        self.visible_at: dict[str, float] = {}
        self._copiers: dict[str, list[tuple[str, Process]]] = {}
        self._open: dict[str, int] = {}
        self.bound_at: dict[str, float] = {}
        self.evidenced: Callable[[str], None] = lambda _: None
        """Called in the midst of a write that records evidence that Replicate accepted nothing."""
        self.wakes_by_success: Callable[[], bool] = lambda: False
        """Whether a function of the release before wakes an execution, which knows of no files."""
        self.evidence_at: dict[str, list[int]] = {}
        """When the second reading began after which a prediction was submitted again; 0 where there was none."""
        self.released_at: dict[str, list[float]] = {}
        self._sweeps = 0
        self._expiring = False
        secret = {"current": SECRET, "previous": None, "rotated_at": "2025-01-01T00:00:00+00:00"}
        self.account.secrets = {
            "replicate-token": TOKEN,
            "signing-secret": "{}" if self.faults.secret_is_unknown else json.dumps(secret),
            "webhook-master": MASTER_SECRET,
            "link-secret": LINK_SECRET,
        }
        self.account.parameters = {ENVIRONMENT["API_URL_PARAMETER"]: API_URL}
        self.scenarios = [scenario(self) for scenario in scenarios]
        self.environment: dict[str, str] = {}
        for scenario in self.scenarios:
            self.environment |= scenario.environment
        if self.scenarios:
            self.faults.aim_at([at for scenario in self.scenarios for at in scenario.foci])

    def _make_machines(self) -> dict[str, StateMachine]:
        tasks: dict[str, Callable[[Any, float], Any]] = {
            "lambda:invoke": self._invoke,
            "aws-sdk:dynamodb:updateItem": self._update,
            "sqs:sendMessage": self._send_message,
        }
        return {
            name: StateMachine(definition(*of), self.scheduler, tasks, self.tokens, f"{EXECUTIONS}:{name}")
            for name, of in (
                ("track-prediction", ("track_prediction", "SubmitPrediction")),
                ("track-submitted", ("track_prediction", "AwaitWebhook")),
                ("run-pipeline", ("run_pipeline",)),
            )
        } | {
            "run-batch": BatchMachine(
                definition("run_batch"), self.scheduler, tasks, self.tokens, lambda key: self.account.objects[key][0]
            ),
        }

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
        self.note("dies")
        raise Died

    def call(self, service: str, operation: str, asked: dict[str, Any], client: Any) -> Any:
        """One call to AWS."""
        return account.call(self, service, operation, asked, client)

    def answer(self, how: str, request: httpx.Request) -> httpx.Response:
        """One request to Replicate, to its file host, or to a caller's receiver."""
        try:
            asked = self.receivers.handle if how == "receive" else getattr(self.upstream, how)
            answer: httpx.Response = asked(request)
        except httpx.HTTPError:
            raise
        except Exception as error:
            self.broken = error  # the library would bear it
            raise
        return answer

    def note(self, what: str) -> None:
        """A line of the trace, where there is one."""
        if self.trace is not None:
            self._say(what)

    def longest(self, what: str, seconds: float) -> None:
        """Notes a delay, of which figures show the longest."""
        self.delays[what] = max(self.delays.get(what, 0.0), seconds)

    def _say(self, what: str) -> None:
        assert self.trace is not None
        name = self.scheduler.current.name if self.scheduler.current else "-"
        self.trace(f"{self.scheduler.now - BEGIN:10.2f}  {name:28} {what}")

    # -- the state machines' tasks ----------------------------------------------------------------------------

    def _invoke(self, given: dict[str, Any], timeout: float) -> dict[str, Any]:
        function, event = given["FunctionName"], given["Payload"]
        fault = self.faults.of_invoke()
        self.step(f"invoke {function} {fault or ''}", 0.02)
        if fault == "refused":
            raise TaskError("Lambda.TooManyRequestsException")
        if fault == "unknown":
            raise TaskError("Lambda.Unknown")
        if fault == "answer lost":
            self.scheduler.spawn("invoked, answer lost", lambda: self.invoke(function, event))
            self.step("answer lost", self.rng.choice((0.0, 1.0, 30.0)))
            raise TaskError("Lambda.SdkClientException")
        if fault == "twice":
            delay = self.rng.choice((0.0, 0.03, 0.5))
            self.scheduler.spawn("invoked twice", lambda: self.invoke(function, event), delay)
        try:
            return {"Payload": self.functions.invoke(function, event, timeout)}
        except FunctionFailed as failed:
            self.note(f"{function} failed: {failed.kind} {failed.message}")
            name = {"timeout": "Sandbox.Timedout", "died": "Lambda.Unknown"}.get(failed.kind, failed.kind)
            raise TaskError(name, json.dumps({"errorType": name, "errorMessage": failed.message})) from None

    def invoke(self, function: str, event: Any) -> Any:
        """Runs a function; None where it failed, which nobody is told of."""
        try:
            return self.functions.invoke(function, event)
        except FunctionFailed as failed:
            self.note(f"{function} failed: {failed.kind} {failed.message}")
            return None

    def _update(self, given: dict[str, Any], timeout: float) -> None:  # as every task
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

    def _send_message(self, given: dict[str, Any], timeout: float) -> None:  # as every task
        self.step("sqs.SendMessage of a state", 0.02)
        fault = self.faults.of_state()
        queue = self.queues[names_by_url()[given["QueueUrl"]]]
        if fault is None or self.rng.random() < 0.5:  # it may be sent all the same
            queue.send(json.dumps(given["MessageBody"]), group=given.get("MessageGroupId"))
        if fault:
            raise TaskError("SQS.SdkClientException")

    # -- what is watched while it happens ---------------------------------------------------------------------

    def _written(self, before: Item | None, after: Item | None) -> None:
        if self.stream is not None:
            self.stream.written(before, after)
        item: Item = after or before or {}
        pk, sk = item["pk"]["S"], item["sk"]["S"]
        if after and "open" in after and "next_check_at" in after:
            self._open[pk] = int(after["next_check_at"]["N"])
        elif sk in ("status", "creates"):
            self._open.pop(pk, None)
        if before is None and sk == "status" and self.scheduler.current is not None:
            self.writers[pk] = self.scheduler.current
        if not pk.startswith("prediction#"):
            return
        prediction_id = pk.partition("#")[2]
        if self.trace is not None and sk == "status" and after:
            kept = ("status", "visible", "upstream_id", "claimed", "next_check_at", "execution_n", "orphans")
            self._say("writes " + " ".join(f"{n}={next(iter(after[n].values()))}" for n in kept if n in after))
        if sk.startswith("result#") and before and after and before["json"] != after["json"]:
            self.violations.append(f"{prediction_id}: the result changed after it was kept")
        if sk.startswith("input#") and after and "json" in after:
            prompt = str(json.loads(after["json"]["S"]).get("prompt"))
            self.ids_by_prompt.setdefault(prompt, {})[prediction_id] = None
        if sk != "status":
            return
        if after is None:
            if not self._expiring:
                self.violations.append(f"{prediction_id}: the item was removed")
            return
        now = self.scheduler.now
        ended = after["rank"]["N"] == "9"
        if ended and prediction_id not in self.terminal_at:
            self.terminal_at[prediction_id] = now
        if ended and after["visible"]["S"] in TERMINAL and prediction_id not in self.visible_at:
            self.visible_at[prediction_id] = now
            for scenario in self.scenarios:
                scenario.ended(prediction_id)
        if before is None:
            return
        if "upstream_id" in after and "upstream_id" not in before:
            self.bound_at[prediction_id] = now
        if after.get("evidence_at", {"N": "0"})["N"] != "0" and "evidence_at" not in before:
            self.evidenced(prediction_id)
        if "claimed" in before and int(after.get("unknown_creates", {"N": "0"})["N"]) > int(
            before.get("unknown_creates", {"N": "0"})["N"]
        ):
            read_at = int(before.get("evidence_at", {"N": "0"})["N"])
            done = before.get("submit_over") or before.get("submit_until") or {"N": "0"}
            done_at = int(done["N"])
            # What a reading before the grace says is no evidence, whatever the code takes it for.
            known = max(read_at, done_at + GRACE_SECONDS) if read_at else 0
            self.evidence_at.setdefault(prediction_id, []).append(known)
            self.released_at.setdefault(prediction_id, []).append(now)
        if "upstream_id" in before and before["upstream_id"] != after.get("upstream_id"):
            self.violations.append(f"{prediction_id}: bound to another upstream id")
        if before["rank"]["N"] == "9":
            for name in (
                "rank", "status", "error", "completed_at", "upstream_id", "metrics_json", "cost_micro_dollars",
                "cost_reason", "cost_price",
            ):  # fmt: skip
                if before.get(name) != after.get(name):
                    self.violations.append(f"{prediction_id}: {name} changed after the end")
            if before["visible"] != after["visible"] and before["visible"]["S"] != "processing":
                self.violations.append(f"{prediction_id}: the visible status changed after the end")

    def stored(self, key: str, body: bytes) -> None:
        """An object becomes visible."""
        parts = key.split("/")
        if parts[0] == "payloads" or parts[1] == "batches":
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
        for machine in self.tracking:
            machine.stop(process.event["execution"])
        return True

    def expire(self, share: float) -> None:
        """Removes items that have expired, or this share of them: the table's own clock is late, and in no order."""
        self._expiring = True
        for key, item in list(self.table.items.items()):
            # Chance is asked last: only of what has expired.
            if int(item.get("expires_at", {"N": 10**12})["N"]) <= self.scheduler.now and self.rng.random() < share:
                self.table.call("DeleteItem", {"Key": {"pk": {"S": key[0]}, "sk": {"S": key[1]}}})
        self._expiring = False

    def forget_expired(self) -> None:
        """What has expired need not be there; see `expire`."""
        now = self.scheduler.now
        there = {pk for pk, sk in self.table.items if sk == "status"}
        for request in list(self.callers.requests):
            if f"prediction#{request.accepted_id}" not in there:
                self.callers.requests.remove(request)
                self.prompts[request.prompt] += 1
        for (pk, sk), item in self.table.items.items():
            if sk == "status" and int(item["expires_at"]["N"]) <= now:
                self.special.add(pk.partition("#")[2])

    def signing_secrets(self, url: str) -> list[str]:
        """What webhooks to a receiver have to be signed with: his owner's secret, as the API would tell it."""
        owner = url.rpartition("/")[2].partition("-")[0]
        mac = hmac.new(MASTER_SECRET.encode(), f"webhook secret\n1\n{owner}".encode(), hashlib.sha256)
        return [f"whsec_{base64.b64encode(mac.digest()).decode()}"]

    # -- callers ----------------------------------------------------------------------------------------------

    def api_event(
        self, method: str, path: str, headers: dict[str, str], body: bytes | str = "", owner: str = "alice"
    ) -> dict[str, Any]:
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
                "authorizer": {"owner": owner, "scopes": "predict read train manage"},
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

    # -- the minute's sweep -----------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = self.scheduler.now
        # What was submitted again is read once more, whether it is open or not.
        again = [key for key in self.table.items if key[0] == "unknown" and key[1].startswith("again#")]
        due = bool(again) or any(moment <= now for moment in self._open.values())
        if due or (self.faults.secret_is_unknown and self._sweeps == 0):
            self._sweeps += 1
            for delay in (0.0, 0.02) if self.faults.doubled_sweeps else (0.0,):
                self.scheduler.spawn("schedule", lambda: self.invoke("sweep_predictions", {}), delay)
        if self._open or again:
            self.scheduler.at(now + 60, self._tick)
        elif (following := self.scheduler.next_at) is not None:
            # With nothing to look at, as in the night, no minute is looked at.
            self.scheduler.at(now + 60 * max(1, math.ceil((following - now) / 60)), self._tick)

    # -- run --------------------------------------------------------------------------------------------------

    def run(self) -> Verdict:
        """Runs the schedule, and looks at what is left."""
        rng, callers = self.rng, self.callers
        ordinary = callers.plan()
        callers.requests = list(ordinary)
        for scenario in self.scenarios:
            scenario.begin()
        for wanted in ordinary:
            for scenario in self.scenarios:
                scenario.dress(wanted)
            self.scheduler.spawn(f"caller {wanted.number}", partial(callers.ask_for, wanted))
            if rng.random() < (0.7 if self.faults.long_runs else 0.25):
                self.scheduler.spawn(f"cancel {wanted.number}", partial(callers.cancel_some_time, wanted))
            if rng.random() < 0.25:
                self.scheduler.spawn(f"delete {wanted.number}", partial(callers.delete_some_time, wanted))
        if self.faults.stops:
            for _ in range(2):
                self.scheduler.at(BEGIN + rng.choice((2.0, 20.0, 45.0, 90.0, 200.0, 500.0)), self.stop_one)
        self.scheduler.at(BEGIN + rng.uniform(0, 60), self._tick)
        end = max([END_SECONDS, *(scenario.end_seconds for scenario in self.scenarios)])
        over = self.scheduler.run(BEGIN + end)
        if self.broken is not None:
            raise self.broken
        for scenario in self.scenarios:
            scenario.count_prompts()
        Check(self).all(over)
        for scenario in self.scenarios:
            scenario.check()
        verdict = Verdict(self.seed, self.violations, self._figures(self.scheduler.now - BEGIN), self._worst())
        self.scheduler.stop()
        return verdict

    def _figures(self, seconds: float) -> dict[str, int]:
        machines = self.machines.values()
        figures = {
            "predictions": len(self.terminal_at),
            "runs at Replicate": len(self.upstream.runs),
            "invocations": sum(self.functions.invocations.values()),
            "executions": sum(len(machine.executions) for machine in machines),
            "states": sum(len(e.states) for machine in machines for e in machine.executions.values()),
            "virtual seconds": int(seconds),
            **Check(self).paid_twice(),
            **{f"runs of {name}": number for name, number in self.functions.invocations.items()},
            **{f"faults: {kind}": number for kind, number in self.faults.struck.items()},
        }
        if self.stream is not None:
            figures |= {"records of the stream": self.stream.records, "events on the bus": len(self.events)}
        for scenario in self.scenarios:
            counted = {"schedules": 1, **scenario.figures()}
            figures |= {f"world {scenario.name}: {what}": number for what, number in counted.items()}
        return figures

    def _worst(self) -> dict[str, float]:
        # Of several worlds at once, no one could tell which of them made it late.
        if len(self.scenarios) > 1:
            return {}
        name = self.scenarios[0].name if self.scenarios else "predictions alone"
        return {f"world {name}: {what}": seconds for what, seconds in self.delays.items()}

    def stop_one(self) -> None:
        """Stops an execution, as by hand."""
        running = [
            execution
            for machine in self.tracking
            for execution in machine.executions.values()
            if execution.status == "RUNNING" and execution.states[-1:] != ["CopyOutputs"]
        ]
        if running:
            self.faults.struck["stopped"] = self.faults.struck.get("stopped", 0) + 1
            self.tracking[0].abort(self.rng.choice(running))


@cache
def definition(name: str, start_at: str = "") -> dict[str, Any]:
    """A state machine, with the names of folders for functions and the tests' numbers."""
    text = (ROOT / "statemachine" / f"{name}.asl.json").read_text()
    given = {
        "${StartAt}": start_at,
        "${Partition}": "aws",
        "${TableName}": ENVIRONMENT["TABLE_NAME"],
        "${OutputsBucketName}": ENVIRONMENT["OUTPUTS_BUCKET_NAME"],
        "${RequestsQueueUrl}": ENVIRONMENT["REQUESTS_QUEUE_URL"],
        "${FirstPollSeconds}": ENVIRONMENT["FIRST_POLL_SECONDS"],
        "${PollSeconds}": ENVIRONMENT["POLL_SECONDS"],
        "${SubmitPredictionFunctionArn}": "submit_prediction",
        "${PollPredictionFunctionArn}": "poll_prediction",
        "${CopyOutputsFunctionArn}": "copy_outputs",
        "${AdvancePipelineFunctionArn}": "advance_pipeline",
        "${PrepareBatchFunctionArn}": "prepare_batch",
        "${FinishBatchFunctionArn}": "finish_batch",
    }
    for each, value in given.items():
        text = text.replace(each, value)
    parsed: dict[str, Any] = json.loads(text)
    return parsed
