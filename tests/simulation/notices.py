"""Worlds of those who are told: on the bus, by webhook, and by task token."""

import json
from collections import Counter
from functools import partial
from typing import Any, ClassVar

from predictions.aws.dynamodb import deserialize
from predictions.status import DEFAULT_WEBHOOK_EVENTS

from tests.simulation.callers import SENDERS, Wanted
from tests.simulation.machine import Told
from tests.simulation.receivers import Call
from tests.simulation.scenario import Scenario
from tests.simulation.upstream import TERMINAL, Run
from tests.support.scheduler import BEGIN

DAY_SECONDS = 86400.0
_FILTERS = (
    None, ["completed"], ["start", "completed"], ["output"], ["logs"], ["output", "logs"],
    ["start", "output", "logs", "completed"],
)  # fmt: skip


ABOUT_TO_SECONDS = 1.0
"""The time between the record of a webhook and its request, with what is read for its signature."""


class Events(Scenario):
    """Predictions and the events of each of their changes."""

    name = "events"
    foci: ClassVar[tuple[str, ...]] = ("publish_changes", "events.PutEvents", "publish_changes")


class Webhooks(Scenario):
    """Callers who ask for webhooks of some of the events; receivers of every kind."""

    name = "webhooks"
    foci: ClassVar[tuple[str, ...]] = (
        "publish_changes",
        "deliver_webhook",
        "sqs.SendMessage",
        "events.PutEvents",
        "sqs.ChangeMessageVisibility",
    )
    end_seconds = 30 * 3600.0
    kinds: ClassVar[tuple[str, ...]] = ()

    def dress(self, wanted: Wanted) -> None:
        """With a webhook, mostly."""
        if self.rng.random() < 0.8:
            kind = self.rng.choice(self.kinds or self.world.receivers.KINDS)
            wanted.also["webhook"] = self.world.receivers.url(kind, f"{wanted.owner}-{wanted.number}")
            if (events := self.rng.choice(_FILTERS)) is not None:
                wanted.also["webhook_events_filter"] = events

    def check(self) -> None:
        """Each end is told at least once, and nothing is told that is not so."""
        letters = self.world.queues["DeliveriesDeadLetterQueue"].messages.values()
        given_up = Counter(json.loads(letter.body).get("id") for letter in letters)
        for (_, sk), stored in self.world.table.items.items():
            if sk == "status" and "webhook" in stored and "rank" in stored:
                self._check_one(deserialize(stored), given_up)

    def _check_one(self, item: dict[str, Any], given_up: Counter[str]) -> None:
        url, id_ = item["webhook"], item["id"]
        calls = self.world.receivers.calls.get(url, [])
        kind = url.split("/")[3].replace("-", " ")
        wanted = set(item.get("webhook_events_filter") or DEFAULT_WEBHOOK_EVENTS)
        taken: dict[str, list[Call]] = {}
        for call in calls:
            event = call.webhook_id.split("-")[1]
            if event not in wanted:
                self.bad(f"{id_}: a webhook of {event!r}, which nobody wants")
            if (call.told["status"] in TERMINAL) != (event == "completed"):
                self.bad(f"{id_}: a webhook of {event!r} shows {call.told['status']}")
            if call.told["id"] != id_ or (event == "completed" and call.told["status"] != item["visible"]):
                self.bad(f"{id_}, {item['visible']}: {call.webhook_id} shows {call.told['id']} {call.told['status']}")
            if call.taken:
                taken.setdefault(call.webhook_id, []).append(call)
        self._check_order(id_, calls)
        self._check_contents(id_, calls)
        struck = self.world.faults.struck
        again = 1 + struck.get("handed over again", 0) + 2 * struck.get("aws", 0) + struck.get("timed out", 0)
        for webhook_id, each in taken.items():
            if len(each) > again:
                self.bad(f"{webhook_id} was sent {len(each)} times to a receiver who takes it")
        if "completed" in wanted:
            self._check_completed(item, kind, taken.get(f"{id_}-completed-1", []), given_up)
        elif kind in ("takes", "slow") and "deleted" not in item:
            result = self.world.table.items.get((item["pk"], f"result#{item.get('upstream_id')}"))
            kept = json.loads(result["json"]["S"]) if result else {"output": None, "logs": ""}
            for event in wanted & {"output", "logs"}:
                if kept[event] and not any(name.startswith(f"{id_}-{event}-") for name in taken):
                    self.bad(f"{id_}: there is {event!r}, and nobody was told")

    def _check_order(self, id_: str, calls: list[Call]) -> None:
        """Nothing begins after the end has begun, except a request that was about to."""
        ends = [call.at for call in calls if call.webhook_id.startswith(f"{id_}-completed-")]
        about_to = ABOUT_TO_SECONDS + 3 * self.world.faults.slowest_answer
        for call in calls:
            event = call.webhook_id.split("-")[1]
            if event != "completed" and ends and call.at > min(ends) + about_to:
                self.bad(f"{call.webhook_id} came {call.at - min(ends):.0f} s after the end was told")

    def _check_contents(self, id_: str, calls: list[Call]) -> None:
        """No two webhooks tell the same output or the same logs, to a receiver who took the first of them."""
        told: dict[tuple[str, str], str] = {}
        for call in calls:
            event = call.webhook_id.split("-")[1]
            if event not in ("output", "logs"):
                continue
            first = told.setdefault((event, json.dumps(call.told[event])), call.webhook_id)
            if first != call.webhook_id and all(each.taken for each in calls if each.webhook_id == first):
                self.bad(f"{id_}: {call.webhook_id} tells what {first} has told")

    def _check_completed(self, item: dict[str, Any], kind: str, taken: list[Call], given_up: Counter[str]) -> None:
        id_ = item["id"]
        if kind in ("refuses", "hangs"):
            if not given_up[id_]:
                self.bad(f"{id_}: its receiver {kind}, and it is no dead letter")
        elif not taken:
            self.bad(f"{id_}: its end was not delivered to a receiver of the kind {kind!r}")
        elif kind == "takes":
            late = taken[0].at - self.world.visible_at[id_]
            self.longest("webhook after the end", late)
            if late > 1500:
                self.bad(f"{id_}: its webhook came {late:.0f} s after its end")

    def figures(self) -> dict[str, int]:
        """Tries, and what came of them."""
        calls = [call for each in self.world.receivers.calls.values() for call in each]
        letters = len(self.world.queues["DeliveriesDeadLetterQueue"].messages)
        return {"tries": len(calls), "delivered": sum(call.taken for call in calls), "given up": letters}


class WebhooksInARow(Webhooks):
    """Runs of a few seconds that tell all they can, by a queue that keeps no order: what was first meets the end."""

    name = "webhooks in a row"
    kinds: ClassVar[tuple[str, ...]] = ("takes", "takes", "slow", "third try", "breaks")

    def begin(self) -> None:
        """Messages overtake one another, by less than the time after which one is outdated; mostly only that."""
        if self.rng.random() < 0.7:
            self.world.faults.calm()
        self.world.queues["DeliveriesQueue"].lateness = lambda: self.rng.choice((0.0, 0.0, 1.5, 3.0, 4.0))

    def dress(self, wanted: Wanted) -> None:
        """With a webhook of every event."""
        kind = self.rng.choice(self.kinds)
        wanted.also["webhook"] = self.world.receivers.url(kind, f"{wanted.owner}-{wanted.number}")
        wanted.also["webhook_events_filter"] = ["start", "output", "logs", "completed"]

    def plan(self, run: Run, plan: dict[str, Any]) -> None:
        """It ends before what its start and its output tell is delivered."""
        plan |= {"queued_seconds": 0.2, "output_seconds": 0.5, "run_seconds": self.rng.choice((0.6, 1.0, 3.0))}
        plan["files"] = 0


class TroubleOfTheBus(Webhooks):
    """Webhooks of predictions whose events the bus mostly does not take at once; mostly only that."""

    name = "trouble of the bus"
    kinds: ClassVar[tuple[str, ...]] = ("takes", "slow")

    def begin(self) -> None:
        """The bus refuses events, with or without trouble of others."""
        if self.rng.random() < 0.7:
            self.world.faults.calm()
        self.world.faults.trouble_the_bus()


class TaskTokens(Scenario):
    """State machines of others that wait for predictions, which are deleted as soon as they have ended."""

    name = "task tokens"
    foci: ClassVar[tuple[str, ...]] = (
        "publish_changes",
        "start_from_queue",
        "stepfunctions.SendTaskSuccess",
        "stepfunctions.SendTaskFailure",
    )
    patience_seconds: ClassVar[float] = 4 * 3600.0

    def begin(self) -> None:
        """Some requests that several states ask for with the same key, and some that nobody can start."""
        self.waiting: list[tuple[str, str | None, float, Any]] = []
        self._told: dict[str, tuple[float, Told]] = {}
        self._hurried = {}
        for n in range(self.rng.choice((1, 1, 2))):
            wanted = Wanted(100 + n, "queue", f"waited for {n}", f"state-{n}", None, None)
            wanted.also["idempotency_key"] = wanted.key
            self._hurried[wanted.prompt] = (wanted, self.rng.choice((None, 0.0, 0.3, 20.0)))
            self.world.callers.requests.append(wanted)
            for k in range(self.rng.choice((1, 1, 2, 4))):
                delay = 0.0 if k == 0 else self.rng.choice((0.0, 0.5, 20.0, 200.0, 1500.0))
                self._wait(
                    f"{self.name} {n}-{k}", {"model": "meta/llama", "input": {"prompt": wanted.prompt}}, delay, wanted
                )
        if self.rng.random() < 0.3:
            self._wait(f"{self.name} refused", {"model": "meta/llama", "input": {}, "nonsense": 1}, 0.0, None)

    def _wait(self, token: str, body: dict[str, Any], delay: float, wanted: Wanted | None) -> None:
        world = self.world

        def wait() -> None:
            waiter, began = world.tokens.new(token), world.scheduler.now
            self.waiting.append((token, wanted.prompt if wanted else None, began, waiter))
            also = {"idempotency_key": wanted.key} if wanted else {}
            text = json.dumps({**body, **also, "task_token": token})
            queue = world.queues["RequestsQueue"]
            message = queue.send(text, sender=SENDERS["alice"], told=self._taken(wanted, text))
            if self.rng.random() < 0.2:
                queue.send(text, message_id=message.id, delay=self.rng.choice((1.0, 60.0)), sender=SENDERS["alice"])
            if world.scheduler.wait(waiter, self.patience_seconds):
                self._told[token] = (world.scheduler.now, waiter.value)

        world.scheduler.spawn(f"state {token}", wait, delay)

    def _taken(self, wanted: Wanted | None, text: str) -> Any:
        def taken(well: bool) -> None:
            if wanted and well and not self.world.callers.gave_up(text):
                found = list(self.world.ids_by_prompt.get(wanted.prompt, ()))
                wanted.accepted_id = wanted.accepted_id or (found[0] if found else "nothing")

        return taken

    def ended(self, prediction_id: str) -> None:
        """Its owner may be quicker than whoever tells."""
        for prompt, (wanted, delay) in self._hurried.items():
            if prediction_id in self.world.ids_by_prompt.get(prompt, ()) and delay is not None:
                wanted.accepted_id = wanted.accepted_id or prediction_id
                delete = self.world.callers.delete_some_time
                self.world.scheduler.spawn("deletes", partial(delete, wanted, (delay,), 4), 0.001)

    def check(self) -> None:
        """Whoever waits is told how it ended, and soon."""
        for token, prompt, began, waiter in self.waiting:
            if token not in self._told:
                self.bad(f"nobody told {token} anything ({waiter.done})")
                continue
            at, told = self._told[token]
            if prompt is None:
                if told.error != "RequestRefused":
                    self.bad(f"{token} was told {told.error} {told.output}")
                continue
            if told.error == "RequestNotStarted":
                letters = self.world.queues["RequestsDeadLetterQueue"].messages.values()
                if not any(f'"{token}"' in letter.body for letter in letters):
                    self.bad(f"{token} was told {told.error}, and its message is no dead letter")
                continue
            ids = self.world.ids_by_prompt.get(prompt, {})
            if len(ids) != 1:
                self.bad(
                    f"{token} waits for {prompt!r}, which became {list(ids)}, and was told {told.error} {told.cause}"
                )
                continue
            (id_,) = ids
            item = deserialize(self.world.table.items[f"prediction#{id_}", "status"])
            late = at - max(began, self.world.visible_at[id_])
            self.longest("state told after the end", late)
            if late > 1500:
                self.bad(f"{token} was told {late:.0f} s late")
            self._check_told(token, item, told)
        refused = len(self.world.queues["RequestsDeadLetterQueue"].messages)
        if any(prompt is None for _, prompt, _, _ in self.waiting) and not refused:
            self.bad("a refused message is no dead letter")

    def _check_told(self, token: str, item: dict[str, Any], told: Told) -> None:
        if told.error is not None and not told.error.startswith("Prediction"):
            self.bad(f"{token}: it ended {item['visible']}, and the state was told {told.error}: {told.cause}")
            return
        right = item["visible"] == "succeeded"
        said = json.loads(told.output if told.output is not None else told.cause)
        if (told.output is not None) != right or said["id"] != item["id"] or said["status"] != item["visible"]:
            self.bad(f"{token}: it ended {item['visible']}, and the state was told {told.error} {said}")
        run = self.world.upstream.runs.get(item.get("upstream_id", ""))
        if right and run is not None and said.get("output") is not None:
            files = [file["uri"] for file in said["output_files"]]
            shown, meant = json.dumps(said["output"]), json.dumps(run.final_output)
            if shown != meant and not (files and all(uri in shown for uri in files)):
                self.bad(f"{token}: the output {meant} was told as {shown}")

    def figures(self) -> dict[str, int]:
        """How many waited, and were told."""
        return {"states that waited": len(self.waiting), "states told": len(self._told)}


class Redelivery(Scenario):
    """Messages that come again long after what they asked for was deleted."""

    name = "redelivery"

    def begin(self) -> None:
        """One message, a deletion and, an hour later, the message again."""
        world, callers = self.world, self.world.callers
        wanted = Wanted(200, "queue", "sent again after its deletion", "", None, None)
        callers.requests.append(wanted)

        def send() -> None:
            message = callers.send(wanted)
            callers.delete_some_time(wanted, (60.0, 200.0), 40)
            world.scheduler.sleep(self.rng.choice((2000.0, 4000.0)))
            callers.send(wanted, again=message)

        world.scheduler.spawn("sends again", send)
        self.began = BEGIN

    def figures(self) -> dict[str, int]:
        """How many were deleted first."""
        return {"deleted": sum(wanted.deleted for wanted in self.world.callers.requests)}


class HastyDeletions(Scenario):
    """Predictions whose files are copied by two runs of the function at once, and deleted when the first has ended."""

    name = "hasty deletions"

    def begin(self) -> None:
        """In half of the schedules nothing else goes wrong."""
        if self.rng.random() < 0.5:
            self.world.faults.calm()
        self.world.faults.invoke_twice()
        self._deleting = 0

    def plan(self, run: Run, plan: dict[str, Any]) -> None:
        """With files, soon."""
        plan |= {"status": "succeeded", "queued_seconds": 0.2, "files": self.rng.choice((1, 2))}
        plan["run_seconds"] = self.rng.choice((0.1, 1.0, 5.0))

    def ended(self, prediction_id: str) -> None:
        """Its owner deletes it at once."""
        for wanted in self.world.callers.requests:
            if prediction_id == wanted.accepted_id:
                self._deleting += 1
                delete = self.world.callers.delete_some_time
                self.world.scheduler.spawn(
                    "deletes", partial(delete, wanted, (self.rng.choice((0.0, 0.3, 2.0)),), 4), 0.001
                )

    def figures(self) -> dict[str, int]:
        """How many their owners wanted to delete."""
        return {"deleted as soon as they had ended": self._deleting}
