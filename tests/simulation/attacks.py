"""Worlds in which one owner, mallory, does what costs others, as far as the stack lets him."""

import json
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from predictions.aws.dynamodb import deserialize

from tests.simulation.callers import Wanted
from tests.simulation.jobs import Batches, Job, Pipelines, _Jobs
from tests.simulation.notices import TaskTokens, Webhooks
from tests.simulation.scenario import Scenario
from tests.simulation.upstream import Run
from tests.support.scheduler import BEGIN

DAY_SECONDS = 86400.0


class Killer(Scenario):
    """An output that costs more memory than any function has: who reads it is killed. Mallory cancels it, too."""

    name = "killing output"
    seconds: ClassVar[int] = 600

    def begin(self) -> None:
        """Mallory's prediction; and innocents whose executions stop, so that only the sweep helps them."""
        world, callers = self.world, self.world.callers
        self.killed = 0
        wanted = self.wanted = Wanted(400, "key", "kills", "kills", f"{self.seconds}s", None, owner="mallory")
        world.prompts["kills"] += 1
        world.scheduler.spawn("mallory", partial(callers.post, wanted))

        def cancel() -> None:
            world.scheduler.sleep(self.rng.choice((30.0, 90.0, 200.0)))
            for _ in range(3):
                if wanted.accepted_id:
                    callers.call(
                        "cancel_prediction", "POST", f"/predictions/{wanted.accepted_id}/cancel", owner="mallory"
                    )
                world.scheduler.sleep(60.0)

        world.scheduler.spawn("mallory cancels", cancel)
        for moment in (3.0, 40.0, 100.0, 200.0, 400.0):
            world.scheduler.at(BEGIN + moment, world.stop_one)

    def plan(self, run: Run, plan: dict[str, Any]) -> None:
        """It ends soon, and well."""
        if run.prompt == "kills":
            plan |= {"status": "succeeded", "queued_seconds": 0.2, "output_seconds": None, "run_seconds": 5.0}
            plan |= {"files": 0, "text": True, "cancel_loses": True}

    def reads(self, run: Run) -> bool:
        """Whoever reads the whole answer is killed."""
        if run.prompt != "kills" or run.status != "succeeded":
            return False
        self.killed += 1
        return True

    def count_prompts(self) -> None:
        """Mallory's own prediction is looked at here."""
        self.world.special |= set(self.world.ids_by_prompt.get("kills", ()))

    def check(self) -> None:
        """It is over by its deadline and an hour, whatever is asked."""
        for id_ in self.world.ids_by_prompt.get("kills", ()):
            stored = self.world.table.items.get((f"prediction#{id_}", "status"))
            if stored is None:
                continue
            item = deserialize(stored)
            if item["rank"] != 9:
                self.bad(f"it has not ended: {item['status']}")
                continue
            late = self.world.visible_at[id_] - item["deadline"]
            self.longest("killing prediction after its deadline", late)
            if late > 3600 + 900:
                self.bad(f"it ended {late:.0f} s after its deadline")
        for id_, ended in self.world.visible_at.items():
            if (stored := self.world.table.items.get((f"prediction#{id_}", "status"))) is None:
                continue  # expired
            item = deserialize(stored)
            run = self.world.upstream.runs.get(item.get("upstream_id", ""))
            if item["owner"] == "alice" and run is not None and run.ended is not None:
                self.longest("innocent's end after Replicate's", ended - run.ended)

    def figures(self) -> dict[str, int]:
        """How many functions it killed."""
        return {"functions killed": self.killed}


class PoisonMessage(Scenario):
    """A message over which the function dies, each time, among those of others."""

    name = "poison message"

    def begin(self) -> None:
        """One of mallory's, and several of alice's with it."""
        world, callers = self.world, self.world.callers
        self.killed = 0
        self.innocents = [
            Wanted(500 + n, "queue", f"beside the poison {n}", "", None, None) for n in range(self.rng.choice((3, 9)))
        ]
        callers.requests += self.innocents
        body = json.dumps({"model": "meta/llama", "input": {"prompt": "poison"}})
        before = self.rng.randrange(len(self.innocents) + 1)

        def send() -> None:
            for n, wanted in enumerate(self.innocents):
                if n == before:
                    world.queues["RequestsQueue"].send(body, sender="AROAMALLORY00")
                callers.send(wanted)
            if before == len(self.innocents):
                world.queues["RequestsQueue"].send(body, sender="AROAMALLORY00")

        self.began = BEGIN + 1.0
        world.scheduler.spawn("all at once", send, 1.0)

    def writes(self, text: str) -> bool:
        """The function is killed over it."""
        if "poison" in text and "beside" not in text:
            self.killed += 1
            return True
        return False

    def check(self) -> None:
        """The others are taken; that none of them is a dead letter is looked at where they are sent."""
        for wanted in self.innocents:
            created = self.world.table.items.get((f"prediction#{wanted.accepted_id}", "status"))
            if created is None:
                self.bad(f"{wanted.prompt} was not taken")
                continue
            late = int(created["created"]["N"]) - self.began
            self.longest("innocent message was taken after", late)
            if late > 1200:
                self.bad(f"{wanted.prompt} was taken {late:.0f} s late")

    def figures(self) -> dict[str, int]:
        """How many functions it killed, and how many innocents were there."""
        return {"functions killed": self.killed, "innocent messages": len(self.innocents)}


class Tarpit(Webhooks):
    """Mallory's receivers hang, each as long as it can; alice's takes what comes."""

    name = "hanging receivers"
    alone = True
    foci: ClassVar[tuple[str, ...]] = ()
    kinds = ("takes",)
    concurrency: ClassVar[int] = 8

    def begin(self) -> None:
        """Some predictions of mallory's, each with many webhooks."""
        world, callers = self.world, self.world.callers
        world.faults.calm()
        queue = world.queues["DeliveriesQueue"]
        queue.settings = replace(queue.settings, concurrency=self.concurrency)
        for n in range(20):
            wanted = Wanted(600 + n, "queue", f"hangs {n}", "", None, None, owner="mallory")
            wanted.also["webhook"] = world.receivers.url("hangs", f"mallory-{n}")
            wanted.also["webhook_events_filter"] = ["start", "logs", "completed"]
            callers.requests.append(wanted)
            world.scheduler.spawn("mallory", partial(callers.ask_for, wanted), self.rng.uniform(0.0, 20.0))

        for n in range(4):
            wanted = Wanted(650 + n, "key", f"takes {n}", f"takes-{n}", None, None)
            wanted.also["webhook"] = world.receivers.url("takes", f"alice-{650 + n}")
            wanted.also["webhook_events_filter"] = ["completed"]
            callers.requests.append(wanted)
            world.scheduler.spawn("alice", partial(callers.ask_for, wanted), 20.0 + 10.0 * n)

    def dress(self, wanted: Wanted) -> None:
        """Not the ordinary ones."""

    def plan(self, run: Run, plan: dict[str, Any]) -> None:
        """Mallory's write much into their logs, and alice's end meanwhile."""
        hangs = run.prompt.startswith("hangs")
        plan |= {"queued_seconds": 1.0, "output_seconds": 1.0, "run_seconds": 100.0 if hangs else 5.0}
        plan |= {"log_lines": 10} if hangs else {}
        plan |= {"files": 0, "status": "succeeded"}

    def check(self) -> None:
        """Alice is told in time."""
        super().check()
        late = self.world.delays.get("webhook after the end", 0.0)
        if late > 45:
            self.bad(f"alice's webhook came {late:.0f} s after the end")


class _Limited(Scenario):
    """A stack whose rate is used up."""

    alone = True
    per_minute: ClassVar[int] = 12
    environment: ClassVar[dict[str, str]] = {"CREATES_PER_MINUTE": "12"}
    """The same as in the functions' environment."""

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.asked_at: dict[str, float] = {}

    def plan(self, run: Run, plan: dict[str, Any]) -> None:
        """Short runs: what matters is when they begin."""
        plan |= {"queued_seconds": 0.2, "output_seconds": None, "run_seconds": 1.0, "files": 0, "status": "succeeded"}

    def started(self, prompt: str) -> float | None:
        """When a prompt was created at Replicate."""
        return next((run.created for run in self.world.upstream.runs.values() if run.prompt == prompt), None)

    def check_rate(self) -> None:
        """Never more creates than the rate and the burst allow, in any window."""
        times = sorted(run.created for run in self.world.upstream.runs.values())
        # Each process owes one create: there are as many as came at once.
        functions = len(self.world.functions.instances("start_prediction"))
        rate, burst, slack = self.per_minute / 60, 10 * self.per_minute / 60 + 2 + functions, 8.0
        for i, first in enumerate(times):
            for j in range(i, len(times)):
                if j - i + 1 > (times[j] - first + slack) * rate + burst:
                    self.bad(f"{j - i + 1} creates within {times[j] - first:.0f} s")
                    return


class Backlog(_Limited):
    """Mallory has a backlog, or creates and cancels; alice wants one."""

    name = "backlog of another"

    def begin(self) -> None:
        """Thirty of mallory's, and then one of alice's by each door."""
        world, callers = self.world, self.world.callers
        world.faults.calm()
        door = self.rng.choice(("queue", "http"))
        self.alices = [
            Wanted(700, "queue", "alice by queue", "", None, None),
            Wanted(701, "key", "alice by http", "alice-http", None, None),
        ]
        for n in range(30):
            wanted = Wanted(
                720 + n, "queue" if door == "queue" else "key", f"backlog {n}", f"b{n}", None, None, "mallory"
            )
            callers.requests.append(wanted)
            world.scheduler.spawn(f"mallory {n}", partial(self._create_and_cancel, wanted, n % 3 > 0), n * 0.4)
        for wanted in self.alices:
            callers.requests.append(wanted)
            world.scheduler.spawn("alice", partial(self._ask, wanted), 20.0)

    def _create_and_cancel(self, wanted: Wanted, cancel: bool) -> None:
        callers = self.world.callers
        if wanted.door == "queue":
            callers.send(wanted)
            return
        body = {"input": {"prompt": wanted.prompt}}
        headers = {"Content-Type": "application/json", "Idempotency-Key": wanted.key}
        answer = callers.call("start_prediction", "POST", "/models/meta/llama/predictions", headers, body, "mallory")
        if answer["statusCode"] == 201 and cancel:
            wanted.accepted_id = json.loads(answer["body"])["id"]
            path = f"/predictions/{wanted.accepted_id}/cancel"
            if callers.call("cancel_prediction", "POST", path, owner="mallory")["statusCode"] == 200:
                wanted.canceled_at = self.world.scheduler.now

    def _ask(self, wanted: Wanted) -> None:
        self.asked_at[wanted.prompt] = self.world.scheduler.now
        if wanted.door == "queue":
            self.world.callers.send(wanted)
        else:
            self.world.callers.post(wanted)

    def check(self) -> None:
        """Alice's start within seconds."""
        self.check_rate()
        for wanted in self.alices:
            started = self.started(wanted.prompt)
            if started is None:
                self.bad(f"{wanted.prompt} was never started: {wanted.answers}")
                continue
            late = started - self.asked_at[wanted.prompt]
            self.longest("single request of another waited", late)
            if late > 60:
                self.bad(f"{wanted.prompt} was started {late:.0f} s after it was asked for")


class Overload(_Limited):
    """More than the rate comes, each with a deadline soon after."""

    name = "overload"
    per_minute = 6
    environment: ClassVar[dict[str, str]] = {"CREATES_PER_MINUTE": "6"}
    minutes: ClassVar[int] = 6

    def begin(self) -> None:
        """A third more than the rate, for some minutes."""
        world, callers = self.world, self.world.callers
        world.faults.calm()
        world.faults.struck["overload"] = 1
        number = self.per_minute * self.minutes * 4 // 3
        for n in range(number):
            wanted = Wanted(800 + n, "queue", f"overload {n}", "", "30s", None, self.rng.choice(("alice", "mallory")))
            callers.requests.append(wanted)
            world.scheduler.spawn(f"sender {n}", partial(callers.send, wanted), n * self.minutes * 60.0 / number)

    def check(self) -> None:
        """The rate is used, after the first minute."""
        self.check_rate()
        runs = [run for run in self.world.upstream.runs.values() if run.prompt.startswith("overload")]
        started = sum(60 <= run.created - BEGIN < self.minutes * 60 for run in runs)
        usable = 0.9 * self.per_minute * (self.minutes - 1)
        self.longest("percent of the rate that was not used", 100 * (1 - started / usable))
        if started < 0.75 * usable:
            self.bad(f"{started} starts, of {usable:.0f} that the rate allows")

    def figures(self) -> dict[str, int]:
        """What came, and what of it was started."""
        runs = [run for run in self.world.upstream.runs.values() if run.prompt.startswith("overload")]
        return {"asked for": self.per_minute * self.minutes * 4 // 3, "started": len(runs)}


class TokenFlood(TaskTokens):
    """So many states wait for one prediction that one run of publish_changes cannot tell them all."""

    name = "masses of task tokens"
    alone = True
    foci: ClassVar[tuple[str, ...]] = ()
    number: ClassVar[int] = 40

    def begin(self) -> None:
        """Forty, of which each takes its time."""
        super().begin()
        wanted = Wanted(900, "queue", "waited for by many", "many", None, None)
        wanted.also["idempotency_key"] = wanted.key
        self.world.callers.requests.append(wanted)
        for k in range(self.number):
            body = {"model": "meta/llama", "input": {"prompt": wanted.prompt}}
            self._wait(f"flood-{k}", body, self.rng.uniform(0.0, 3.0), wanted)

    def tells(self, token: str) -> float:
        """How long it takes to tell a state."""
        return 2.5 if token.startswith("flood") else 0.0


class OldKeys(_Jobs):
    """Keys that are used again after all that they named has expired, or some of it."""

    name = "keys after retention"
    kind = "batches"
    alone = True
    end_seconds = 33 * DAY_SECONDS

    def begin(self) -> None:
        """A batch or a pipeline, and the same a month later."""
        self.kind = self.rng.choice(("batches", "pipelines"))
        self.asked_again, self.outlived = 0.0, False
        maker: _Jobs = (Batches if self.kind == "batches" else Pipelines)(self.world)
        maker.jobs = []
        job = maker.make_job(0)
        self.jobs = [replace(job, key="monthly")]
        self.world.faults.calm()
        self.world.scheduler.spawn("every month", partial(self._monthly, self.jobs[0]))

    def plan(self, run: Run, plan: dict[str, Any]) -> None:
        """All goes well."""
        plan |= {"status": "succeeded", "files": 0, "text": True, "run_seconds": 5.0}

    def _monthly(self, job: Job) -> None:
        world = self.world
        headers = {"Content-Type": "application/json", "Idempotency-Key": str(job.key)}
        for month in range(2):
            if month:
                world.scheduler.sleep(30 * DAY_SECONDS + self.rng.choice((-3600.0, 60.0, 3600.0)))
                (item,) = self.items()
                self.outlived = item["expires_at"] <= world.scheduler.now
                # What is left is removed by and by, in no order.
                world.expire(self.rng.choice((0.3, 0.7, 1.0)))
                self.asked_again = world.scheduler.now
            answer = world.callers.call(f"manage_{self.kind}", "POST", f"/{self.kind}", headers, job.body)
            if answer["statusCode"] != 201:
                self.bad(f"month {month} was answered {answer}")

    def count_prompts(self) -> None:
        """Each may be started in each month."""
        for prompt in self.jobs[0].prompts:
            self.world.prompts[prompt] += 2
        self.world.forget_expired()

    def check(self) -> None:
        """What was asked for again after its end has run again."""
        prompts = set(self.jobs[0].prompts)
        ran = [run for run in self.world.upstream.runs.values() if run.prompt in prompts]
        first = {run.prompt for run in ran if run.created < self.asked_again}
        second = {run.prompt for run in ran if run.created >= self.asked_again}
        if self.outlived and first != second:
            self.bad(f"{self.kind}: {sorted(first)} ran in the first month, and {sorted(second)} in the second")

    def figures(self) -> dict[str, int]:
        """How many were asked for again after their end."""
        return {f"{self.kind} after retention": int(self.outlived)}
