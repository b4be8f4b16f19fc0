"""Worlds of work that consists of several predictions, or is one of another kind: batches, pipelines, trainings."""

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from predictions.aws.dynamodb import deserialize
from predictions.ids import derived_id

from tests.simulation.callers import Wanted
from tests.simulation.scenario import Scenario
from tests.simulation.upstream import TERMINAL, Run

_derived_id = derived_id
"""As it is, whatever a sabotage puts into its place."""


@dataclass
class Job:
    """A batch or a pipeline that somebody asked for, perhaps several times, not knowing of the first."""

    number: int
    body: dict[str, Any]
    key: str | None
    prompts: list[str] = field(default_factory=list)
    id: str | None = None
    canceled: bool = False
    retries: int = 0
    refused: bool = False


class _Jobs(Scenario):
    """What batches and pipelines have in common: how they are asked for."""

    kind = ""

    def begin(self) -> None:
        """One or two, by callers who try again until they are answered."""
        self.jobs = [self.make_job(n) for n in range(self.rng.choice((1, 1, 2)))]
        for job in self.jobs:
            self.world.scheduler.spawn(f"{self.kind} {job.number}", partial(self._ask_for, job))

    def make_job(self, number: int) -> Job:
        """What is asked for."""
        raise NotImplementedError

    def _ask_for(self, job: Job) -> None:
        world = self.world
        world.scheduler.sleep(self.rng.choice((0.0, 1.0, 10.0)))
        headers = {"Content-Type": "application/json", **({"Idempotency-Key": job.key} if job.key else {})}
        for _ in range(5):
            patience = self.rng.choice((29.0, 29.0, 29.0, 3.0))
            path = f"/{self.kind}"
            answer = world.callers.call(f"manage_{self.kind}", "POST", path, headers, job.body, patience=patience)
            if answer["statusCode"] == 201:
                job.id = json.loads(answer["body"])["id"]
                break
            if answer["statusCode"] < 500:
                self.bad(f"{self.kind} {job.number} was answered {answer}")
                return
            world.scheduler.sleep(self.rng.choice((0.5, 2.0, 8.0)))
        if job.id and self.rng.random() < 0.25:
            world.scheduler.sleep(self.rng.choice((0.0, 1.0, 10.0, 100.0)))
            self._cancel(job)
        if job.id:
            self.follow(job)

    def follow(self, job: Job) -> None:
        """What its caller does afterwards."""

    def _cancel(self, job: Job) -> None:
        for _ in range(4):
            answer = self.world.callers.call(f"manage_{self.kind}", "POST", f"/{self.kind}/{job.id}/cancel")
            if answer["statusCode"] == 200:
                job.canceled = True
                return
            self.world.scheduler.sleep(2.0)

    def items(self) -> list[dict[str, Any]]:
        """The status items of all that there are."""
        prefix = f"{self.kind.removesuffix('es' if self.kind == 'batches' else 's')}#"
        return [
            deserialize(item)
            for (pk, sk), item in self.world.table.items.items()
            if pk.startswith(prefix) and sk == "status"
        ]

    def events_of(self, word: str) -> dict[str, dict[str, Any]]:
        """The details of events of one type by their `event_id`."""
        found = {}
        for _, entry in self.world.events:
            if entry["DetailType"] == word:
                detail = json.loads(entry["Detail"])
                found[detail["event_id"]] = detail
        return found

    def job_of(self, prompts: str) -> Job | None:
        """Whose prompt begins so."""
        return next((job for job in self.jobs if prompts in job.prompts), None)


class Batches(_Jobs):
    """Batches: some lines of which cannot run, some tolerance, canceled, run again, lines deleted at once."""

    name = "batches"
    kind = "batches"
    foci: ClassVar[tuple[str, ...]] = (
        "manage_batches", "prepare_batch", "finish_batch", "start_from_queue", "publish_changes",
        "stepfunctions.StartExecution", "s3.PutObject",
    )  # fmt: skip
    end_seconds = 16 * 3600.0

    def make_job(self, number: int) -> Job:
        """Up to six lines."""
        rng = self.rng
        prompts = [f"batch {number} line {n}" for n in range(rng.choice((1, 2, 3, 6)))]
        lines: list[Any] = [{"model": "meta/llama", "input": {"prompt": prompt}} for prompt in prompts]
        if rng.random() < 0.3:
            lines.insert(rng.randrange(len(lines) + 1), {"model": "meta/llama"})
        body = {
            "requests": lines,
            "max_concurrency": rng.choice((1, 2, 20)),
            "tolerated_failure_percentage": rng.choice((100, 100, 100, 30, 0)),
        }
        self._deleted_at_once = rng.random() < 0.3
        return Job(number, body, f"batch-{number}" if rng.random() < 0.5 else None, prompts)

    def ended(self, prediction_id: str) -> None:
        """A line's owner may delete it at once."""
        for job in self.jobs:
            if self._deleted_at_once and any(prediction_id in self.world.ids_by_prompt.get(p, ()) for p in job.prompts):
                path = f"/predictions/{prediction_id}"
                self.world.scheduler.spawn(
                    "deletes", partial(self.world.callers.call, "cancel_prediction", "DELETE", path), 0.001
                )
                return

    def follow(self, job: Job) -> None:
        """Once it has ended, what failed is run again, sometimes."""
        if self.rng.random() > 0.3:
            return
        for _ in range(60):
            self.world.scheduler.sleep(240.0)
            item = self.world.table.items[f"batch#{job.id}", "status"]
            if "open" in item:
                continue
            answer = self.world.callers.call("manage_batches", "POST", f"/batches/{job.id}/retry")
            if answer["statusCode"] < 500:
                return

    def count_prompts(self) -> None:
        """A line may be started once for each attempt of each batch that there is."""
        for item in self.items():
            for job in self._jobs_of(item):
                for prompt in job.prompts:
                    self.world.prompts[prompt] += item["attempt"]

    def _jobs_of(self, item: dict[str, Any]) -> list[Job]:
        manifest = self.world.account.objects.get(item["manifest"]["key"], (b"", ""))[0].decode()
        return [job for job in self.jobs if f'"{job.prompts[0]}"' in manifest]

    def check(self) -> None:
        """Each has ended, with one result for each line, and an event for each attempt."""
        events = self.events_of("Batch Completed")
        items = {item["id"]: item for item in self.items()}
        for job in self.jobs:
            if job.id and job.id not in items:
                self.bad(f"{job.id} was accepted, and is not there")
            made = [item for item in items.values() if job in self._jobs_of(item)]
            if job.key and len(made) > 1:
                self.bad(f"the key {job.key} made {len(made)} batches")
            for item in made:
                self._check_batch(job, item, events)

    def _check_batch(self, job: Job, item: dict[str, Any], events: dict[str, dict[str, Any]]) -> None:
        def bad(what: str) -> None:
            self.bad(f"{item['id']}: {what}")

        if item["status"] not in ("succeeded", "failed", "canceled"):
            bad(f"has not ended: {item['status']}")
            return
        for attempt in range(1, int(item["attempt"]) + 1):
            if f"{item['id']}-{attempt}-completed" not in events:
                bad(f"no event of the end of attempt {attempt}")
        if "error" in item and self.world.faults.struck.get("aws"):
            return  # it was given up, after too many executions died over its manifest
        lines = job.body["requests"]
        results = [json.loads(line) for line in self.world.account.objects[item["results_key"]][0].splitlines()]
        if [result["n"] for result in results] != list(range(1, len(lines) + 1)):
            bad(f"its results are of the lines {[result['n'] for result in results]}")
        if Counter(r["status"] for r in results) != Counter({n: int(c) for n, c in item["counts"].items() if c}):
            bad(f"it counts {item['counts']}, and its results say otherwise")
        if job.canceled and item["status"] == "succeeded" and item.get("stop"):
            bad("was canceled, and ended succeeded")
        last = 0.0
        for result, line in zip(results, lines, strict=False):
            last = max(last, self._check_line(item, result, line, bad))
        if last and item["attempt"] == 1 and "stop" not in item:
            self.longest("batch after its last line", _seconds(item["completed_at"]) - last)

    def _check_line(self, item: dict[str, Any], result: dict[str, Any], line: dict[str, Any], bad: Any) -> float:
        """When its prediction ended; 0 where there is none."""
        if ("input" not in line) != (result["status"] == "refused"):
            bad(f"line {result['n']} is {result['status']}")
        if result["status"] == "refused":
            return 0.0
        if result["id"] is None:
            if "stop" not in item:
                bad(f"line {result['n']} was not started, and nobody stopped it: {result['error']}")
            return 0.0
        prediction = self.world.table.items.get((f"prediction#{result['id']}", "status"))
        if prediction is None or prediction["visible"]["S"] != result["status"]:
            bad(f"line {result['n']} is told as {result['status']}, which it is not")
        return self.world.visible_at.get(result["id"], 0.0)

    def figures(self) -> dict[str, int]:
        """Batches and their lines."""
        items = self.items()
        lines = sum(int(item.get("lines") or 0) for item in items)
        again = sum(int(item["attempt"]) > 1 for item in items)
        return {"batches": len(items), "lines": lines, "run again": again}


class ToldBatches(Batches):
    """Batches with labels, whose owners ask for a webhook at their completion; receivers of several kinds."""

    name = "batches with webhooks"
    alone: ClassVar[bool] = True  # other batches would have the same keys
    foci: ClassVar[tuple[str, ...]] = (
        "finish_batch", "publish_changes", "deliver_webhook", "sqs.SendMessage", "sqs.ChangeMessageVisibility",
    )  # fmt: skip

    def make_job(self, number: int) -> Job:
        """One of a batch, with prompts of its own."""
        job = super().make_job(number)
        job.prompts = [f"told {prompt}" for prompt in job.prompts]
        prompts = iter(job.prompts)
        for line in job.body["requests"]:
            if "input" in line:
                line["input"]["prompt"] = next(prompts)
        url = self.world.receivers.url(self.rng.choice(("takes", "slow", "third try")), f"alice-batch{number}")
        job.body |= {"webhook": url, "labels": {"batch": str(number)}}
        return job

    def check(self) -> None:
        """The end of the last attempt is told as it is, and each end under one id; lines have the labels."""
        super().check()
        letters = self.world.queues["DeliveriesDeadLetterQueue"].messages.values()
        given_up = {json.loads(letter.body).get("id") for letter in letters}
        for item in self.items():
            if "webhook" not in item:
                continue
            calls = [
                call for call in self.world.receivers.calls.get(item["webhook"], []) if call.told["id"] == item["id"]
            ]
            ids = {f"{item['id']}-completed-{attempt}" for attempt in range(1, int(item["attempt"]) + 1)}
            if strange := {call.webhook_id for call in calls} - ids:
                self.bad(f"{item['id']}: webhooks of no end: {strange}")
            last = [
                call for call in calls if call.taken and call.webhook_id == f"{item['id']}-completed-{item['attempt']}"
            ]
            if not last and item["id"] not in given_up:
                self.bad(f"{item['id']}: nobody was told of its end")
            if any(call.told["status"] != item["status"] for call in last):
                self.bad(f"{item['id']}: ended {item['status']}, and another end was told")
            for job in self._jobs_of(item):
                for id_ in {id_ for prompt in job.prompts for id_ in self.world.ids_by_prompt.get(prompt, ())}:
                    line = self.world.table.items.get((f"prediction#{id_}", "status"))
                    if line and deserialize(line).get("labels") != item["labels"]:
                        self.bad(f"{id_}: a line without the labels of its batch")


class Pipelines(_Jobs):
    """Pipelines: steps that need others, steps over lists, canceled ones."""

    name = "pipelines"
    kind = "pipelines"
    foci: ClassVar[tuple[str, ...]] = (
        "manage_pipelines", "advance_pipeline", "start_from_queue", "publish_changes", "stepfunctions.StartExecution",
        "sqs.SendMessage",
    )  # fmt: skip
    end_seconds = 16 * 3600.0

    def make_job(self, number: int) -> Job:
        """One of some shapes."""
        rng = self.rng
        shape = rng.choice(("chain", "over a list", "over an output", "both"))

        def step(name: str, **also: Any) -> dict[str, Any]:
            given = {"prompt": f"pipeline {number} {name}", **also.pop("input", {})}
            return {"name": name, "model": "meta/llama", "input": given, **also}

        last = {"given": "{{ steps.a.output }}"}
        items = ["x", "y", "z"][: rng.choice((1, 2, 3))]
        prompts = [f"pipeline {number} a"]
        match shape:
            case "chain":
                steps = [step("a"), step("b", input=last)]
                prompts.append(f"pipeline {number} b")
            case "over a list":
                over = {"prompt": f"pipeline {number} a {{{{ index }}}}", "item": "{{ item }}"}
                steps = [step("a", input=over, for_each="{{ input.items }}"), step("b", input=last)]
                prompts = [f"pipeline {number} a {n}" for n in range(3)] + [f"pipeline {number} b"]
            case "over an output":
                over = {"prompt": f"pipeline {number} b {{{{ index }}}}", "item": "{{ item }}"}
                steps = [step("a"), step("b", input=over, for_each="{{ steps.a.output }}")]
                prompts += [f"pipeline {number} b {n}" for n in range(3)]
            case _:
                joined = {"left": "{{ steps.a.output }}", "right": "{{ steps.b.output }}"}
                steps = [step("c", input=joined), step("a"), step("b")]
                prompts += [f"pipeline {number} b", f"pipeline {number} c"]
        body = {"input": {"items": items}, "steps": steps}
        return Job(number, body, f"pipeline-{number}" if rng.random() < 0.5 else None, prompts)

    def plan(self, run: Run, plan: dict[str, Any]) -> None:
        """Mostly it goes well: what needs it would not run else."""
        if run.prompt.startswith("pipeline") and self.rng.random() < 0.7:
            plan |= {"status": "succeeded", "text": True, "run_seconds": min(plan["run_seconds"], 70.0)}

    def count_prompts(self) -> None:
        """Each run of a step may be started once for each pipeline that there is."""
        for item in self.items():
            for prompt in self._job_of(item).prompts:
                self.world.prompts[prompt] += 1

    def _job_of(self, item: dict[str, Any]) -> Job:
        text = self.world.table.items[item["pk"], f"definition#{item['fingerprint']}"]["json"]["S"]
        return next(job for job in self.jobs if f'"pipeline {job.number} ' in text)

    def check(self) -> None:
        """Each has ended as its predictions did, and is on the bus."""
        events = self.events_of("Pipeline Completed")
        items = {item["id"]: item for item in self.items()}
        runs: dict[str, list[dict[str, Any]]] = {}
        for (pk, sk), stored in self.world.table.items.items():
            if pk.startswith("prediction#") and sk == "status" and "origin" in stored:
                prediction = deserialize(stored)
                if "pipeline" in prediction["origin"]:
                    runs.setdefault(prediction["origin"]["pipeline"], []).append(prediction)
        for job in self.jobs:
            if job.id and job.id not in items:
                self.bad(f"{job.id} was accepted, and is not there")
            if job.key and sum(self._job_of(item) is job for item in items.values()) > 1:
                self.bad(f"the key {job.key} made several pipelines")
        for id_, item in items.items():
            self._check_pipeline(item, runs.get(id_, []), f"{id_}-completed" in events)

    def _check_pipeline(self, item: dict[str, Any], runs: list[dict[str, Any]], told: bool) -> None:
        id_ = item["id"]
        if item["status"] not in ("succeeded", "failed", "canceled"):
            self.bad(f"{id_} has not ended: {item['status']}")
            return
        if not told:
            self.bad(f"{id_}: no event of its end")
        completed = _seconds(item["completed_at"])
        for run in runs:
            if "upstream_id" not in run and run["visible"] == "canceled":
                continue  # written down while the pipeline was canceled, and never submitted
            if run["visible"] not in TERMINAL or self.world.visible_at.get(run["id"], 0.0) > completed + 1:
                self.bad(f"{id_} ended before its run {run['id']}")
        well = all(run["visible"] == "succeeded" for run in runs)
        if item["status"] == "succeeded" and not (well and len(runs) >= 2):
            self.bad(f"{id_} succeeded, with {[run['visible'] for run in runs]}")
        if runs and "cancel_requested" not in item:
            self.longest(
                "pipeline after its last run", completed - max(self.world.visible_at[run["id"]] for run in runs)
            )

    def figures(self) -> dict[str, int]:
        """Pipelines, and how many of them succeeded."""
        items = self.items()
        return {"pipelines": len(items), "succeeded": sum(item["status"] == "succeeded" for item in items)}


class Trainings(Scenario):
    """Trainings, whose deadline the stack alone keeps."""

    name = "trainings"
    foci: ClassVar[tuple[str, ...]] = ("start_prediction", "poll_prediction", "dynamodb.UpdateItem")

    def begin(self) -> None:
        """One or two, some of them canceled."""
        callers = self.world.callers
        for n in range(self.rng.choice((1, 1, 2))):
            door = self.rng.choice(("key", "key", "sdk", "plain"))
            wanted = Wanted(300 + n, door, f"training {n}", f"training-{n}", None, None, collection="trainings")
            callers.requests.append(wanted)
            self.world.scheduler.spawn(f"trainer {n}", partial(callers.ask_for, wanted))
            if self.rng.random() < 0.3:
                self.world.scheduler.spawn(f"cancel training {n}", partial(callers.cancel_some_time, wanted))

    def figures(self) -> dict[str, int]:
        """How many were started."""
        return {"trainings": sum(run.collection == "trainings" for run in self.world.upstream.runs.values())}


def _seconds(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()
