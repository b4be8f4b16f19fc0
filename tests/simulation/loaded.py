"""A world under load: nothing fails by chance, and AWS and Replicate refuse what is beyond their quotas.

The library, the handlers and the state machines are the real ones, as in `world`. DynamoDB counts units of partition
keys (`partition_limits`), Step Functions and Replicate have token buckets, SQS serves quiet tenants first
(`fair_queue`); botocore's standard retries are those of the library's clients. What has ended is looked at and removed,
or ten minutes of load would not fit into memory.

https://docs.aws.amazon.com/step-functions/latest/dg/service-quotas.html
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import httpx
from botocore.exceptions import UnseekableStreamError
from predictions.aws.s3 import SourceFailed

from tests.simulation.distributed_map import BatchMachine, MapRun, _at, _filled
from tests.simulation.fair_queue import FairQueue
from tests.simulation.faults import Faults
from tests.simulation.functions import Functions
from tests.simulation.machine import StateMachine, TaskError, Tokens, Told
from tests.simulation.queues import Queue, settings_of
from tests.simulation.stream import Stream
from tests.simulation.upstream import Run, Upstream
from tests.simulation.verdict import Verdict
from tests.simulation.world import EXECUTIONS, World, definition
from tests.support.aws_clients import AwsError, raise_client_error
from tests.support.dynamodb import ConditionFailed, Item, NotModelled, Table
from tests.support.partition_limits import INDEXES, Bucket, PartitionLimits, Throttled, read_units, size_of, write_units
from tests.support.scheduler import BEGIN, Died, Waiter

ATTEMPTS = 4
"""`total_max_attempts` of the library's clients, in standard mode."""
DISPATCHED_PER_SECOND = 100
"""Standard child executions that one Map Run starts a second: a hard quota."""
STREAM_SHARDS = 8
"""At least one for each 1,000 write units of the table, which has about so many partitions under this load."""
REMOVED_AFTER_SECONDS = 30.0

QUOTAS = {
    "StartExecution": (300, 1300),
    "StopExecution": (200, 1000),
    "DescribeExecution": (15, 300),
    "DescribeMapRun": (1, 200),
    "ListMapRuns": (1, 100),
    "SendTaskSuccess": (500, 3000),
    "SendTaskFailure": (500, 3000),
}
"""Step Functions' default quotas of large regions: tokens a second, and size of the bucket."""


class LimitedTable(Table):
    """The table, as fast as long as it is, whose partition keys are limited."""

    def __init__(
        self, now: Callable[[], float], written: Callable[[Item | None, Item | None], None], limits: PartitionLimits
    ) -> None:
        super().__init__(now, 0.0, written)
        self._limits = limits
        self._sizes: dict[tuple[str, str], int] = {}
        self._by_key: dict[str | None, dict[str, dict[tuple[str, str], None]]] = {name: {} for name in (None, *INDEXES)}

    def remove(self, pk: str) -> None:
        """Forgets the items of a partition key, without a write."""
        for key in list(self._by_key[None].get(pk, ())):
            self._index(key, self.items.pop(key), None)
            self._sizes.pop(key, None)

    def _candidates(self, index: str | None, values: dict[str, Any]) -> list[tuple[str, str]]:
        by_key = self._by_key[index]
        return [key for value in values.values() if value.get("S") in by_key for key in by_key[value["S"]]]

    def _index(self, key: tuple[str, str], before: Item | None, after: Item | None) -> None:
        for index, by_key in self._by_key.items():
            name = "pk" if index is None else INDEXES[index][0]
            was, will = (item[name]["S"] if item and name in item else None for item in (before, after))
            if was == will:
                continue
            if was is not None:
                by_key[was].pop(key)
                if not by_key[was]:
                    del by_key[was]
            if will is not None:
                by_key.setdefault(will, {})[key] = None

    def _write(self, key: tuple[str, str], after: Item | None) -> None:
        before = self.items.get(key)
        if before is not None or after is not None:
            size = size_of(after)
            self._limits.write(write_units(before, after, max(size, self._sizes.get(key, 0))))
            self._index(key, before, after)
            self._sizes[key] = size
        super()._write(key, after)

    def _check(self, key: tuple[str, str], asked: dict[str, Any]) -> None:
        try:
            super()._check(key, asked)
        except ConditionFailed:
            # It costs what the write would have.
            units = max(1, -(-self._sizes.get(key, 0) // 1024))
            self._limits.write([(("table", key[0]), units)])
            raise

    def _get(self, asked: dict[str, Any]) -> dict[str, Any]:
        key = asked["Key"]["pk"]["S"], asked["Key"]["sk"]["S"]
        units = read_units(self._sizes.get(key, 0), consistent=bool(asked.get("ConsistentRead")))
        self._limits.read(("table", key[0]), units)
        return super()._get(asked)

    def _batch_get(self, asked: dict[str, Any]) -> dict[str, Any]:
        ((_, wanted),) = asked["RequestItems"].items()
        consistent = bool(wanted.get("ConsistentRead"))
        for each in wanted["Keys"]:
            key = each["pk"]["S"], each["sk"]["S"]
            self._limits.read(("table", key[0]), read_units(self._sizes.get(key, 0), consistent=consistent))
        return super()._batch_get(asked)

    def _query(self, asked: dict[str, Any]) -> dict[str, Any]:
        index, limit, start = asked.get("IndexName"), asked.get("Limit"), asked.get("ExclusiveStartKey")
        if not asked.get("ScanIndexForward", True) and start is not None:
            raise NotModelled("pages backwards")
        order = {None: "sk", "due": "next_check_at", "by_upstream_id": "upstream_id", "by_owner": "listed_at"}[index]
        whole = {
            name: value for name, value in asked.items() if name not in ("Limit", "Select", "ProjectionExpression")
        }
        found = super()._query(whole)["Items"]
        if start is not None:
            after = (_place(start[order]), start["pk"]["S"], start["sk"]["S"])
            found = [item for item in found if (_place(item[order]), item["pk"]["S"], item["sk"]["S"]) > after]
        if index == "due":
            found.sort(key=lambda item: (_place(item[order]), item["pk"]["S"], item["sk"]["S"]))
        page = found[:limit] if limit else found
        name = next(value["S"] for value in asked["ExpressionAttributeValues"].values() if "S" in value)
        units = read_units(sum(map(size_of, page)), consistent=bool(asked.get("ConsistentRead")))
        self._limits.read((index or "table", name), units)
        answer: dict[str, Any] = {"Count": len(page)}
        if limit and len(page) == limit:
            names = ("pk", "sk", *(INDEXES[index] if index else ()))
            answer["LastEvaluatedKey"] = {name: page[-1][name] for name in names}
        if asked.get("Select") == "COUNT":
            return answer
        if projection := asked.get("ProjectionExpression"):
            given = asked.get("ExpressionAttributeNames", {})
            wanted = [given.get(each.strip(), each.strip()) for each in projection.split(",")]
            page = [{each: item[each] for each in wanted if each in item} for item in page]
        return {**answer, "Items": page}


def _place(value: dict[str, str]) -> Any:
    ((kind, held),) = value.items()
    return int(held) if kind == "N" else held


class SteadyFaults(Faults):
    """No faults, and the same times each time."""

    aws_seconds = staticmethod(lambda: 0.01)
    create_seconds = staticmethod(lambda: 0.5)
    read_seconds = staticmethod(lambda: 0.2)
    file_seconds = staticmethod(lambda: 1.0)
    list_lag_seconds = staticmethod(lambda: 0.0)

    def of_webhook(self, event: str) -> list[float]:
        """When it comes."""
        return [0.3]


class BusyFunctions(Functions):
    """Functions of which is counted how many run at once."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.running: Counter[str] = Counter()
        self.peaks: Counter[str] = Counter()

    def _run(self, function: str, event: Any, until: float) -> Any:
        for name in (function, "all functions"):
            self.running[name] += 1
            self.peaks[name] = max(self.peaks[name], self.running[name])
        try:
            return super()._run(function, event, until)
        finally:
            for name in (function, "all functions"):
                self.running[name] -= 1


class SteadyUpstream(Upstream):
    """Replicate, which limits requests, and runs each prediction as long as its input asks for.

    Attributes:
        creates: The bucket of creates: the account's limit a minute.
        others: That of all other requests.
        refused: How many requests it answered with 429.
        lost: Whether its webhooks get lost.
        times: How often each prediction was accepted.
    """

    def __init__(self, world: "LoadedWorld", creates_per_minute: int, others_per_minute: int) -> None:
        super().__init__(world)
        now = world.scheduler.now
        self.creates = Bucket(creates_per_minute / 60, creates_per_minute, now)
        self.others = Bucket(others_per_minute / 60, others_per_minute, now)
        self.refused: Counter[str] = Counter()
        self.lost = False
        self.times: Counter[str] = Counter()

    def _answer(self, request: httpx.Request) -> httpx.Response:
        is_create = request.method == "POST" and not request.url.path.endswith("/cancel")
        bucket, now = self.creates if is_create else self.others, self._world.scheduler.now
        if not bucket.take(1, now):
            self.refused["creates" if is_create else "others"] += 1
            self._world.step("upstream", 0.05)
            return httpx.Response(429, json={"detail": "Request was throttled. Your rate limit resets in ~1s."})
        return super()._answer(request)

    def accept(self, body: dict[str, Any], request: httpx.Request, path: str) -> Run:
        """As of `Upstream`."""
        run = super().accept(body, request, path)
        self.times[run.our_id or ""] += 1
        return run

    def _run(self, run: Run, plan: dict[str, Any], life: float) -> None:
        given = run.body["input"]
        plan |= {
            "queued_seconds": 1.0, "output_seconds": None, "run_seconds": given["seconds"],
            "files": given["files"], "text": False, "status": "succeeded", "cancel_loses": False,
            "unstarted": "canceled",
        }  # fmt: skip
        super()._run(run, plan, life)

    def _tell(self, run: Run, event: str) -> None:
        if not self.lost:
            super()._tell(run, event)


class ManyTokens(Tokens):
    """Task tokens: those of lines of batches call back, and none is kept once it is told."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self._calls: dict[str, Callable[[Told], None]] = {}

    def call(self, token: str, back: Callable[[Told], None]) -> None:
        """Calls back when somebody is told with this token."""
        self._calls[token] = back

    def tell(self, token: str, told: Told) -> None:
        """As of `Tokens`."""
        if (back := self._calls.pop(token, None)) is not None:
            back(told)
            return
        super().tell(token, told)
        del self._waiters[token]


class ManyLines(BatchMachine):
    """A Distributed Map whose children are a callback each: what a line sends is the definition's, and how fast."""

    world: "LoadedWorld"

    def _run_map(self, execution: Any, state: Mapping[str, Any], given: Any) -> None:
        reader = _filled(state["ItemReader"]["Parameters"], given, {})
        lines = self._read(reader["Key"]).splitlines()
        at_once = _at(state["MaxConcurrencyPath"], given, {})
        child = state["ItemProcessor"]["States"][state["ItemProcessor"]["StartAt"]]
        assert child["Resource"].endswith("sqs:sendMessage.waitForTaskToken")
        assert child["End"]
        run = self.map_runs[execution.name] = MapRun(len(lines))

        def ended(told: Told) -> None:
            run.running -= 1
            run.succeeded += told.error is None
            run.failed += told.error is not None
            self.scheduler.wake(run.waiter, None)

        for index, line in enumerate(lines):
            while run.running >= at_once and execution.status == "RUNNING":
                run.waiter = Waiter()
                self.scheduler.wait(run.waiter, 1e9)
            if execution.status != "RUNNING":
                return
            chosen = _filled(
                state["ItemSelector"], given, {"Map": {"Item": {"Value": json.loads(line), "Index": index}}}
            )
            token = f"{execution.name}/{index}"
            self._tokens.call(token, ended)  # type: ignore[attr-defined]
            run.running += 1
            self.world.send_message(_filled(child["Parameters"], chosen, {"Task": {"Token": token}}))
            self.scheduler.sleep(1 / DISPATCHED_PER_SECOND)
        while run.running and execution.status == "RUNNING":
            run.waiter = Waiter()
            self.scheduler.wait(run.waiter, 1e9)

    def abort(self, execution: Any) -> None:
        """As of `StateMachine`."""
        super().abort(execution)
        if execution.name in self.map_runs:
            self.scheduler.wake(self.map_runs[execution.name].waiter, None)


class LoadedWorld(World):
    """Everything in one load.

    Args:
        creates_per_minute: `CreatesPerMinute`, and what Replicate accepts.
        others_per_minute: Further requests that Replicate answers.
        requests_concurrency: `MaximumConcurrency` of the queue's event source; None for the template's.
        quotas: Of Step Functions, that differ from `QUOTAS`.
        senders: The value of `QUEUE_SENDERS`.

    Attributes:
        limits: What DynamoDB counts.
        throttled: How many calls were refused by a quota, by operation; those that failed for good, by `failed: …`.
        ended: Of each prediction that has ended visibly, its status; of removed ones too.
    """

    def __init__(
        self,
        *,
        creates_per_minute: int = 18_000,
        others_per_minute: int = 3000,
        requests_concurrency: int | None = None,
        quotas: Mapping[str, tuple[float, float]] | None = None,
        senders: str = "",
    ) -> None:
        super().__init__(0)
        self.faults = SteadyFaults(self.rng, self.scheduler)
        self.faults.calm()
        self.faults.secret_is_unknown = False
        self.account.secrets["signing-secret"] = json.dumps(
            {"current": "whsec_dGhlIHNpZ25pbmcgc2VjcmV0IG9mIFJlcGxpY2F0ZSE=", "previous": None,
             "rotated_at": "2025-01-01T00:00:00+00:00"}
        )  # fmt: skip
        self.limits = PartitionLimits(lambda: self.scheduler.now)
        self.table: LimitedTable = LimitedTable(lambda: self.scheduler.now, self._written, self.limits)
        self.functions: BusyFunctions = BusyFunctions(self)
        self.upstream: SteadyUpstream = SteadyUpstream(self, creates_per_minute, others_per_minute)
        self.stream = Stream(self, STREAM_SHARDS)
        self.queues = {}
        for name, settings in settings_of().items():
            if name == "RequestsQueue" and requests_concurrency:
                settings = replace(settings, concurrency=requests_concurrency)
            self.queues[name] = FairQueue(self, name, settings, Queue(self, f"dead of {name}", settings, None))
        self.environment = {"CREATES_PER_MINUTE": str(creates_per_minute), "QUEUE_SENDERS": senders}
        now = self.scheduler.now
        self.quotas = {name: Bucket(*of, now) for name, of in {**QUOTAS, **(quotas or {})}.items()}
        self.throttled: Counter[str] = Counter()
        self.ended: dict[str, str] = {}
        self.ended_at = 0.0
        self.noticed: Callable[[float], None] = lambda _: None
        self.creates_per_minute = creates_per_minute
        self.asked_at: dict[str, float] = {}
        self.keeps = False
        """Whether what has ended stays: the results of a batch are read at its end."""
        self.progress: Callable[[], None] = lambda: None
        self._over: Callable[[], bool] = lambda: False
        self._late: list[float] = []

    def _make_machines(self) -> dict[str, StateMachine]:
        self.tokens = ManyTokens(self.scheduler)
        machines = super()._make_machines()
        batches = machines["run-batch"] = ManyLines(
            definition("run_batch"), self.scheduler, {"lambda:invoke": self._invoke}, self.tokens,
            lambda key: self.account.objects[key][0],
        )  # fmt: skip
        batches._arn = f"{EXECUTIONS}:run-batch"
        batches.world = self
        return machines

    # -- AWS --------------------------------------------------------------------------------------------------

    def call(self, service: str, operation: str, asked: dict[str, Any], client: Any) -> Any:
        """One call to AWS, with botocore's standard retries where a quota refuses it."""
        self.step("", self.faults.aws_seconds())
        for attempt in range(ATTEMPTS):
            try:
                if operation in self.quotas and not self.quotas[operation].take(1, self.scheduler.now):
                    raise Throttled(operation)
                return self.account.do(service, operation, asked)
            except AwsError as error:
                raise_client_error(client, operation, error)
            except Throttled as throttled:
                self.throttled[str(throttled)] += 1
                if attempt + 1 == ATTEMPTS:
                    self.throttled[f"failed: {operation}"] += 1
                    code = "ProvisionedThroughputExceededException" if service == "dynamodb" else "ThrottlingException"
                    raise_client_error(client, operation, AwsError(code))
                self.scheduler.sleep(min(20, self.rng.random() * 2**attempt))
            except (SourceFailed, UnseekableStreamError):
                raise
            except Exception as error:
                self.broken = error
                raise Died from error
        raise AssertionError

    def _update(self, given: dict[str, Any], timeout: float) -> None:
        try:
            super()._update(given, timeout)
        except Throttled as throttled:
            self.throttled[str(throttled)] += 1
            raise TaskError("DynamoDb.ProvisionedThroughputExceededException") from None

    def send_message(self, given: dict[str, Any]) -> None:
        """`sqs:sendMessage` of a state."""
        super()._send_message(given, 0)

    # -- what is watched --------------------------------------------------------------------------------------

    def _written(self, before: Item | None, after: Item | None) -> None:
        super()._written(before, after)
        if after is None or after["sk"]["S"] != "status" or "visible" not in after or "id" not in after:
            return
        id_, status = after["id"]["S"], after["visible"]["S"]
        if status in ("succeeded", "failed", "canceled") and id_ not in self.ended and "upstream_id" in after:
            self.ended[id_], self.ended_at = status, self.scheduler.now
            self.noticed(self.scheduler.now)
            run = self.upstream.runs.get(after["upstream_id"]["S"])
            if run is not None and run.ended is not None:
                self.longest("Replicate's completion to visible", self.scheduler.now - run.ended)
                self._late.append(self.scheduler.now - run.ended)
            if not self.keeps:
                self.scheduler.at(self.scheduler.now + REMOVED_AFTER_SECONDS, lambda: self._remove(id_))

    def _remove(self, id_: str) -> None:
        """Forgets what has ended, if nothing follows any more."""
        pk = f"prediction#{id_}"
        item = self.table.items.get((pk, "status"))
        if item is None:
            return
        if "open" in item:
            self.scheduler.at(self.scheduler.now + REMOVED_AFTER_SECONDS, lambda: self._remove(id_))
            return
        if self.upstream.runs.pop(item["upstream_id"]["S"], None) is not None:
            self.upstream.removed += 1
        for machine in self.tracking:
            for n in range(1, 4):
                machine.executions.pop(f"{id_}-{n}", None)
        self.table.remove(pk)
        self.terminal_at.pop(id_, None)
        self.visible_at.pop(id_, None)
        self.bound_at.pop(id_, None)
        self.writers.pop(pk, None)

    @property
    def seconds(self) -> float:
        """Since the load began."""
        return self.scheduler.now - BEGIN

    # -- run --------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if not self._over():
            self.scheduler.spawn("schedule", lambda: self.invoke("sweep_predictions", {}))
            self.scheduler.at(self.scheduler.now + 60, self._tick)

    def _watch(self) -> None:
        self.progress()
        self.events.clear()
        if not self._over():
            self.scheduler.at(self.scheduler.now + 1, self._watch)

    def load(self, begin: Callable[[], None], over: Callable[[], bool]) -> None:
        """What `run` does: begins something, and goes on until it is over and nothing runs any more."""
        self._begin, self._over = begin, over

    def run(self) -> Verdict:
        """Runs it; broken is what was lost, started twice, or failed."""
        began = time.process_time()
        self.scheduler.at(BEGIN, self._begin)
        self.scheduler.at(BEGIN + 30, self._tick)
        self.scheduler.at(BEGIN, self._watch)
        if not self.scheduler.run(BEGIN + 48 * 3600.0):
            self.violations.append("something still goes on at the end")
        if self.broken is not None:
            raise self.broken
        for id_, times in self.upstream.times.items():
            if times > 1:
                self.violations.append(f"{id_} was started {times} times")
        for id_, status in self.ended.items():
            if status != "succeeded":
                self.violations.append(f"{id_} has ended {status}")
        missing = [key for key, item in self.table.items.items()
                   if key[0].startswith("prediction#") and key[1] == "status" and "open" in item]  # fmt: skip
        if missing:
            self.violations.append(f"{len(missing)} are still open: {missing[0]}")
        self.cpu_seconds = time.process_time() - began
        figures = {**self.throttled, **{f"{name} refused by Replicate": n for name, n in self.upstream.refused.items()}}
        return Verdict(0, self.violations, figures, dict(self.delays))

    def late(self, share: float) -> float:
        """The share's quantile of the times from Replicate's completion to visible."""
        ordered = sorted(self._late)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
