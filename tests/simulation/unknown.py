"""Worlds in which creates have no clear answer: what Replicate's list hides, delays, and shows of strangers."""

import json
from functools import partial
from typing import Any, ClassVar

import httpx
from predictions.aws.dynamodb import deserialize
from predictions.upstream.create_window import CreateTooLateError

from tests.simulation.callers import Wanted
from tests.simulation.scenario import Scenario
from tests.simulation.upstream import Run
from tests.support.scheduler import BEGIN

LATER = 790
LEAVES_SECONDS = 300
"""Within this time after Replicate is there again, what was submitted into its outage is decided."""


class UnknownCreates(Scenario):
    """Some creates in a row have no clear answer, in each way; what they did at Replicate is as uncertain."""

    name = "unknown creates"
    number: ClassVar[int] = 3
    lifetime: ClassVar[str | None] = None
    least: ClassVar[int] = 1
    after_seconds: ClassVar[float] = 0.0

    def begin(self) -> None:
        """Callers through each door, whose first creates fail."""
        world = self.world
        world.faults.calm()
        world.faults.struck["unknown creates"] = 1
        self.wanted = []
        self.failing = self.rng.randint(self.least, 3)
        self.failed: dict[str, int] = {}
        for n in range(self.number):
            door = self.rng.choice(("key", "sdk", "queue"))
            wanted = Wanted(700 + n, door, f"unknown {n}", f"unknown-{n}", self.lifetime, None)
            self.wanted.append(wanted)
            world.callers.requests.append(wanted)
            world.scheduler.spawn(
                f"caller {wanted.number}", partial(world.callers.ask_for, wanted), self.after_seconds + n
            )

    def _is_ours(self, body: dict[str, Any]) -> bool:
        return str(body["input"].get("prompt", "")).startswith("unknown ")

    def creates(self, request: httpx.Request, body: dict[str, Any], path: str) -> httpx.Response | None:
        """The first creates of each request fail, after or before they were accepted."""
        if not self._is_ours(body):
            return None
        prompt = body["input"]["prompt"]
        if self.failed.get(prompt, 0) >= self.failing:
            return None
        self.failed[prompt] = self.failed.get(prompt, 0) + 1
        world = self.world
        world.step("upstream", self.rng.choice((0.1, 1.0)))
        if self.rng.random() < 0.5:
            self.accepted(world.upstream.accept(body, request, path))
            self.failed[prompt] = self.failing
        return self.lose(request)

    def accepted(self, run: Run) -> None:
        """Changes what was accepted without a clear answer."""

    def lose(self, request: httpx.Request) -> httpx.Response:
        """An answer that is none."""
        how = self.rng.choice(("502", "silence", "reset", "html"))
        if how == "silence":
            self.world.step("upstream", request.extensions["timeout"]["read"])
            raise httpx.ReadTimeout("no answer")
        if how == "reset":
            raise httpx.ReadError("reset")
        return (
            httpx.Response(502, json={"detail": "bad gateway"}) if how == "502" else httpx.Response(201, text="<html>")
        )

    def check(self) -> None:
        """Each has ended within minutes of its last create, and with what was accepted, if that is the newest."""
        for wanted in self.wanted:
            for id_ in self.world.ids_by_prompt.get(wanted.prompt, {}):
                item = self.world.table.items.get((f"prediction#{id_}", "status"))
                if item is not None:
                    self.check_item(wanted, deserialize(item))

    def check_item(self, wanted: Wanted, item: dict[str, Any]) -> None:
        """It was decided in time."""
        runs = [run for run in self.world.upstream.runs.values() if run.our_id == item["id"]]
        if ("readings", "breaker") in self.world.table.items:
            return  # nothing is submitted again for an hour, whatever the list shows
        # A caller without a key who was not answered asks again by himself.
        answered = item.get("keyed") or item["source"] != "http"
        if not runs and item["status"] == "failed" and self.decides(item) and answered:
            self.bad(f"{wanted.prompt} failed, and was not started: {item.get('error')}")
        if "first_claimed" in item or "submit_over" in item:
            begun = item.get("first_claimed", item.get("claimed", 0))
            found = item.get("bound_at") or self.world.bound_at.get(item["id"]) or self.world.terminal_at[item["id"]]
            self.longest("until an unknown create was decided", found - begun)
            # In other worlds, starts wait for others, and list calls for their turn.
            alone = len(self.world.scenarios) == 1
            if alone and found - begun > self.patience() and self.decides(item):
                self.bad(f"{wanted.prompt}: decided after {found - begun:.0f} s")

    def patience(self) -> float:
        """How long it may take: each unknown create a minute and its wait, and what is found at once."""
        return 100 * (self.failing + 1) + sum((5, 20, 80)[: self.failing])

    def decides(self, item: dict[str, Any]) -> bool:
        """Whether what the list shows decides this one."""
        return True

    def figures(self) -> dict[str, int]:
        """What was submitted again, and what for nothing."""
        ids = [id_ for wanted in self.wanted for id_ in self.world.ids_by_prompt.get(wanted.prompt, {})]
        again = sum(len(self.world.evidence_at.get(id_, ())) for id_ in ids)
        items = [self.world.table.items.get((f"prediction#{id_}", "status")) for id_ in ids]
        undecided = sum("may be it" in deserialize(item).get("error", "") for item in items if item is not None)
        return {
            "requests": len(self.wanted),
            "unknown creates": sum(self.failed.values()),
            "submitted again": again,
            "undecided until the deadline": undecided,
        }


class HiddenWebhooks(UnknownCreates):
    """Neither the list nor a GET shows a webhook, and in half of the schedules none arrives either."""

    name = "hidden webhooks"

    def begin(self) -> None:
        """Nothing but likeness tells."""
        super().begin()
        self.world.upstream.hides = {"webhook in list", "webhook in get"}
        if self.rng.random() < 0.5:
            self.world.faults.lose_webhooks()

    def patience(self) -> float:
        """Likeness tells after the grace only."""
        return super().patience() + 60

    def decides(self, item: dict[str, Any]) -> bool:
        """Entries of others are undecided, until they are known to be theirs."""
        return "undecided" not in item.get("readings_json", "")


class HiddenInputs(UnknownCreates):
    """Inputs are removed or redacted in the list and in a GET, which shows webhooks."""

    name = "hidden inputs"

    def begin(self) -> None:
        """The webhook alone tells."""
        super().begin()
        hidden = self.rng.choice(("input", "redacted input"))
        self.world.upstream.hides = {hidden, *self.rng.choice((("webhook in list",), ("webhook in get",), ()))}


class HiddenDeployments(UnknownCreates):
    """Deployments run what is asked for, of which the list and a GET show the model alone."""

    name = "hidden deployments"

    def begin(self) -> None:
        """The webhook tells, where one is shown or arrives."""
        super().begin()
        for wanted in self.wanted:
            wanted.deployment = "alice/chat"
        webhook = self.rng.choice(((), ("webhook in list",), ("webhook in list", "webhook in get")))
        self.world.upstream.hides = {"deployment", *webhook}
        if self.rng.random() < 0.5:
            self.world.faults.lose_webhooks()

    def decides(self, item: dict[str, Any]) -> bool:
        """Without a webhook nothing tells whose an entry is that shows no deployment."""
        return "undecided" not in item.get("readings_json", "")


class Strangers(UnknownCreates):
    """Others create predictions of the same model in the same account, with webhooks that are shown, or not."""

    name = "strangers"

    def begin(self) -> None:
        """One of theirs every few seconds."""
        super().begin()
        self.hidden = self.rng.random() < 0.5
        self.number_of_strangers = 0
        if self.hidden:
            self.world.upstream.hides = {"webhook in list", "webhook in get"}
        for n in range(20):
            self.world.scheduler.at(BEGIN + n * 7.0, partial(self._create, n))

    def _create(self, n: int) -> None:
        self.number_of_strangers += 1
        body = {"model": "meta/llama", "input": {"prompt": f"theirs {n}"}, "webhook": "https://example.com/theirs"}
        run = Run(f"{n:02d}" + "t" * 24, body, self.world.scheduler.now)
        run.status, run.ended = "succeeded", self.world.scheduler.now
        self.world.upstream.runs[run.id] = run
        self.world.prompts[run.prompt] += 1

    def decides(self, item: dict[str, Any]) -> bool:
        """Theirs cannot be told from ours where no webhook is shown."""
        return not self.hidden

    def figures(self) -> dict[str, int]:
        """Theirs too."""
        return super().figures() | {"predictions of strangers": self.number_of_strangers}


class LateLists(UnknownCreates):
    """The list shows a prediction late: within the grace, or up to five minutes later."""

    name = "late lists"

    def begin(self) -> None:
        """By how much, each time anew."""
        super().begin()
        self.beyond = self.rng.random() < 0.3
        if self.rng.random() < 0.5:
            self.world.faults.lose_webhooks()

    def accepted(self, run: Run) -> None:
        """Shows it late."""
        lag = self.rng.choice((60.0, 120.0, 300.0)) if self.beyond else self.rng.uniform(0.0, 40.0)
        run.listed_at = run.created + lag

    def patience(self) -> float:
        """As long as the list is late, nothing is decided."""
        return super().patience() + 400


class LateCreates(UnknownCreates):
    """Replicate accepts a create minutes after it has answered 5xx, or nothing."""

    name = "late creates"

    def creates(self, request: httpx.Request, body: dict[str, Any], path: str) -> httpx.Response | None:
        """The first one of each request takes effect later."""
        if not self._is_ours(body) or self.failed.get(body["input"]["prompt"]):
            return None
        self.failed[body["input"]["prompt"]] = 1
        world, sent_at = self.world, self.world.scheduler.now
        delay = self.rng.choice((1.0, 20.0, 60.0, 120.0, 240.0, 900.0))
        world.scheduler.spawn("late create", lambda: world.upstream.accept_late(body, request, path, sent_at), delay)
        world.step("upstream", 0.1)
        return self.lose(request)

    def begin(self) -> None:
        """One more comes later, when the others have ended."""
        super().begin()
        wanted = Wanted(LATER, "queue", "unknown later", "unknown-later", None, None)
        self.wanted.append(wanted)
        self.world.callers.requests.append(wanted)
        self.world.scheduler.spawn("later", partial(self.world.callers.ask_for, wanted), 1100.0)

    def _second_runs(self) -> list[tuple[Run, float]]:
        """The runs that turned out to be second ones, and when they were canceled."""
        bound = {item["upstream_id"]["S"] for item in self.world.table.items.values() if "upstream_id" in item}
        runs = self.world.upstream.runs.values()
        again = [run for run in runs if run.our_id in self.world.released_at and run.id not in bound]
        return [(run, self.world.canceled[run.id]) for run in again if run.id in self.world.canceled]

    def check_item(self, wanted: Wanted, item: dict[str, Any]) -> None:
        """Whatever comes late, no second run is left running, and the stack stops after the first."""
        super().check_item(wanted, item)
        runs = [run for run in self.world.upstream.runs.values() if run.our_id == item["id"]]
        if wanted.number == LATER:
            first = min((at for run, at in self._second_runs()), default=None)
            released = self.world.released_at.get(item["id"], ())
            sent = [run.sent_at for run in runs if any(at < run.sent_at for at in released)]
            for at in (*released, *sent):
                if first is not None and first + 30 < at < first + 3600:
                    self.bad(f"submitted again {at - first:.0f} s after evidence had proved wrong")
        again = self.world.evidence_at.get(item["id"], [])
        for run in runs:
            noticed = run.heard_at or run.listed_at
            if run.id != item.get("upstream_id") and noticed and again:
                self.longest("until a second run was canceled", self.world.canceled.get(run.id, noticed) - noticed)


class Frozen(UnknownCreates):
    """The function is frozen between its claim and its first byte, and its sandbox thawed minutes later."""

    name = "frozen sandboxes"

    def creates(self, request: httpx.Request, body: dict[str, Any], path: str) -> httpx.Response | None:
        """The first one of each request dies before the first byte; its sandbox goes on later."""
        if not self._is_ours(body) or self.failed.get(body["input"]["prompt"]):
            return None
        self.failed[body["input"]["prompt"]] = 1
        self.world.scheduler.spawn(
            "thawed sandbox", partial(self._thaw, request, body, path), self.rng.choice((11.0, 40.0, 100.0, 600.0))
        )
        self.world.die()
        return None

    def check_item(self, wanted: Wanted, item: dict[str, Any]) -> None:
        """Who was not answered, and gave no key, is not submitted for."""
        super().check_item(wanted, item)
        runs = [run for run in self.world.upstream.runs.values() if run.our_id == item["id"]]
        if runs and item["source"] == "http" and not item.get("keyed"):
            self.bad(f"{wanted.prompt} was submitted for a caller who was not answered")

    def _thaw(self, request: httpx.Request, body: dict[str, Any], path: str) -> None:
        """As the transport does, immediately before the first byte."""
        window = request.extensions.get("window")
        try:
            if window is not None:
                window.check()
        except CreateTooLateError:
            return
        self.world.upstream.accept(body, request, path)
        self.bad("a thawed sandbox sent its create")


class Outage(UnknownCreates):
    """Replicate is away for minutes: creates fail in each way, and lists with 5xx, silence, nonsense or half a page."""

    name = "outage of Replicate"
    number = 6

    def begin(self) -> None:
        """From the beginning on, for up to 40 minutes."""
        super().begin()
        self.until = BEGIN + self.rng.choice((20.0, 120.0, 600.0, 2400.0))
        self.lists_too = self.rng.random() < 0.7

    def creates(self, request: httpx.Request, body: dict[str, Any], path: str) -> httpx.Response | None:
        """All fail until it is over; those that took effect are few."""
        if not self._is_ours(body) or self.world.scheduler.now >= self.until:
            return None
        prompt = body["input"]["prompt"]
        self.failed[prompt] = self.failed.get(prompt, 0) + 1
        self.world.step("upstream", 0.1)
        if self.rng.random() < 0.15:
            self.world.upstream.accept(body, request, path)
        return self.lose(request)

    def answers(self, request: httpx.Request, path: str) -> httpx.Response | None:
        """Lists and reads fail too."""
        if not self.lists_too or self.world.scheduler.now >= self.until or path.startswith("/models"):
            return None
        half = json.dumps({"next": None, "results": [{"id": "a" * 26}]}).encode()[:-3]
        kind = self.rng.choice(("503", "html", "half", "empty", "circle", "no connection"))
        if kind == "no connection":
            raise httpx.ConnectError("away")
        return {
            "503": lambda: httpx.Response(503),
            "html": lambda: httpx.Response(200, text="<html>maintenance</html>"),
            "half": lambda: httpx.Response(200, content=half),
            "empty": lambda: httpx.Response(200, json={}),
            "circle": lambda: httpx.Response(200, json={"results": [], "next": str(request.url)}),
        }[kind]()

    def check_item(self, wanted: Wanted, item: dict[str, Any]) -> None:
        """Within minutes of Replicate's being there again it is bound, or has ended."""
        found = self.world.bound_at.get(item["id"]) or self.world.terminal_at[item["id"]]
        after = found - self.until
        self.longest("until it was decided, after Replicate was there again", after)
        if after > LEAVES_SECONDS and len(self.world.scenarios) == 1:
            self.bad(f"{wanted.prompt}: decided {after:.0f} s after Replicate was there again")


class CancelBetween(UnknownCreates):
    """Owners cancel while their creates are looked for, also between the evidence and the next submission."""

    name = "cancels while looked for"
    least = 2

    def begin(self) -> None:
        """Each at a time of its own."""
        super().begin()
        self.world.evidenced = self._evidenced
        for wanted in self.wanted:
            self.world.scheduler.spawn("cancels", partial(self.world.callers.cancel_some_time, wanted))

    def _evidenced(self, prediction_id: str) -> None:
        """The evidence was just written."""
        if self.rng.random() < 0.5:
            call, path = self.world.callers.call, f"/predictions/{prediction_id}/cancel"
            self.world.scheduler.spawn("cancels", partial(call, "cancel_prediction", "POST", path), 0.005)

    def decides(self, item: dict[str, Any]) -> bool:
        """One that was canceled in time is not started."""
        return "cancel_requested" not in item


class StaleLists(UnknownCreates):
    """The list is stalled for minutes, and shows nothing that was created since, while predictions run."""

    name = "stalled lists"
    after_seconds = 8.0

    def begin(self) -> None:
        """Some that run long are created a moment before those without a clear answer."""
        super().begin()
        self.world.faults.lose_webhooks()
        self.until = BEGIN + self.rng.choice((150.0, 400.0, 900.0))
        for n in range(2):
            wanted = Wanted(760 + n, "queue", f"control {n}", f"control-{n}", None, None)
            self.world.callers.requests.append(wanted)
            self.world.scheduler.spawn("control", partial(self.world.callers.ask_for, wanted), 0.1 * n)

    def plan(self, run: Run, plan: dict[str, Any]) -> None:
        """Hides it for so long; the control group runs until the list shows it."""
        run.listed_at = max(run.created, self.until)
        if run.prompt.startswith("control"):
            plan |= {"queued_seconds": 0.0, "output_seconds": None, "run_seconds": 1200.0}

    def patience(self) -> float:
        """Nothing is decided while the list is stalled."""
        return super().patience() + self.until - BEGIN

    def check(self) -> None:
        """Nothing was submitted again that had been accepted."""
        super().check()
        for run in self.world.upstream.runs.values():
            released = self.world.released_at.get(run.our_id or "", ())
            if run.prompt.startswith("unknown") and any(run.sent_at < at for at in released):
                self.bad(f"{run.prompt} was submitted again, while the list did not show what runs")
