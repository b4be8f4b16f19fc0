"""Replicate in memory: it loses answers, webhooks and outputs, is late, throttles, and races with cancels."""

import hashlib
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

import httpx
from predictions.net.signatures import sign

from tests.simulation.functions import FunctionFailed
from tests.support.scheduler import Waiter

if TYPE_CHECKING:
    from tests.simulation.world import World

URL = "https://api.replicate.com/v1"
TOKEN = "r8_of_the_stack"
SECRET = "whsec_dGhlIHNpZ25pbmcgc2VjcmV0IG9mIFJlcGxpY2F0ZSE="
VERSION = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
TERMINAL = ("succeeded", "failed", "canceled", "aborted")
PAGE = 3
"""How many predictions a page of a list has: few, so that a reading has pages."""
REMOVED_AFTER_SECONDS = 3600
"""How long after its end Replicate keeps output and files: https://replicate.com/docs/topics/predictions/data-retention"""


def file_bytes(url: str) -> bytes:
    """The bytes of a file, by its URL."""
    seed = hashlib.sha256(url.encode()).digest()
    return seed * (1 + seed[0] % 40) + seed[: seed[1] % 32]


class Run:
    """A prediction at Replicate."""

    def __init__(self, upstream_id: str, body: dict[str, Any], created: float) -> None:
        self.id = upstream_id
        self.collection = "predictions"
        self.body = body
        self.created = created
        self.listed_at = created
        self.sent_at = created
        """When the stack sent its create."""
        self.status = "starting"
        self.started: float | None = None
        self.ended: float | None = None
        self.output: Any = None
        self.final_output: Any = None
        self.logs = ""
        self.cancel_asked: float | None = None
        self.cancel = Waiter()
        self.told_at: float | None = None
        """When the stack first received a webhook that it runs."""
        self.heard_at: float | None = None
        """When it first received any."""
        match = re.search(r"/webhooks/replicate/([a-z0-9]{26})$", body.get("webhook") or "")
        self.our_id = match[1] if match else None

    @property
    def prompt(self) -> str:
        return str(self.body["input"]["prompt"])

    @property
    def over(self) -> bool:
        return self.ended is not None


class Upstream:
    """Replicate's API and its predictions."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.runs: dict[str, Run] = {}
        self.removed = 0
        """How many of them are not there any more."""
        self.hides = {"webhook in list"}
        """What answers do not show: `webhook in list`, `webhook in get`, `input`, `redacted input`, `deployment`."""

    # -- HTTP -------------------------------------------------------------------------------------------------

    def handle(self, request: httpx.Request) -> httpx.Response:
        """Answers a request of the library's client, or fails as one fails."""
        answer = self._answer(request)
        moment = datetime.fromtimestamp(self._world.scheduler.now, UTC)
        answer.headers.setdefault("date", format_datetime(moment, usegmt=True))
        return answer

    def _answer(self, request: httpx.Request) -> httpx.Response:
        world = self._world
        world.step("upstream", 0.0)
        request.read()
        path = request.url.path.removeprefix("/v1")
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return httpx.Response(401, json={"detail": "no"})
        if request.method == "POST" and path.endswith(("/predictions", "/trainings")):
            return self._create(request, path)
        for scenario in world.scenarios:
            if (odd := scenario.answers(request, path)) is not None:
                world.step("upstream", world.faults.read_seconds())
                return odd
        fault = world.faults.of_read(path)
        world.step("upstream", world.faults.read_seconds())
        if fault == "died before":
            world.die()
        if fault == "timeout":
            self._time_out(request)
        if fault == "no connection":
            raise httpx.ConnectError("refused")
        if fault == "500":
            return httpx.Response(500, json={"detail": "down"})
        if fault == "404":
            return httpx.Response(404, json={"detail": "not found"})
        answer = self._read(request, path)
        if fault == "answer lost":
            self._time_out(request)
        if fault == "died after":
            world.die()
        return answer

    def _time_out(self, request: httpx.Request) -> None:
        self._world.step("upstream", request.extensions["timeout"]["read"])
        raise httpx.ReadTimeout("no answer")

    def _create(self, request: httpx.Request, path: str) -> httpx.Response:
        world = self._world
        body = json.loads(request.content)
        for scenario in world.scenarios:
            if (answer := scenario.creates(request, body, path)) is not None:
                return answer
        fault = world.faults.of_create()
        world.step("upstream", world.faults.create_seconds())
        if fault == "died before":
            world.die()
        if fault == "no connection":
            raise httpx.ConnectError("refused")
        if fault in ("429", "422", "401", "402"):
            headers = {"Retry-After": str(world.rng.choice((1, 1, 10, 40)))} if fault == "429" else {}
            return httpx.Response(int(fault), json={"detail": "no", "status": int(fault)}, headers=headers)
        if fault == "500":
            return httpx.Response(502, json={"detail": "bad gateway"})
        if fault == "timeout":
            self._time_out(request)
        if fault in ("late", "late and 500"):
            delay, sent_at = world.faults.late_seconds(), world.scheduler.now
            world.scheduler.spawn("late create", lambda: self.accept_late(body, request, path, sent_at), delay)
            if fault == "late":
                self._time_out(request)
            return httpx.Response(504, json={"detail": "gateway timeout"})
        run = self.accept(body, request, path)
        if fault == "answer lost":
            self._time_out(request)
        if fault == "died after":
            world.die()
        if fault == "500 after":
            return httpx.Response(502, json={"detail": "bad gateway"})
        if fault == "unreadable":
            return httpx.Response(201, content=b"<html>")
        if wait := re.fullmatch(r"wait=(\d+)", request.headers.get("prefer", "")):
            until = world.scheduler.now + int(wait[1])
            while not run.over and world.scheduler.now < until:
                world.step("upstream", min(1.0, until - world.scheduler.now))
        return httpx.Response(201, json=self.told(run))

    def accept(self, body: dict[str, Any], request: httpx.Request, path: str) -> Run:
        """Makes the prediction that a create asks for, and lets it run."""
        world = self._world
        number = len(self.runs) + self.removed
        run = Run(f"{number:02d}" + "u" * 22 + f"{number:02d}", body, world.scheduler.now)
        run.listed_at = run.created + world.faults.list_lag_seconds()
        self.runs[run.id] = run
        match = re.fullmatch(r"(\d+)s", request.headers.get("cancel-after", ""))
        life = float(match[1]) if match else 86400.0
        named = re.fullmatch(r"/models/([^/]+/[^/]+)/(?:versions/([^/]+)/)?(predictions|trainings)", path)
        body["model"] = named[1] if named else "a/b"
        if deployed := re.fullmatch(r"/deployments/([^/]+/[^/]+)/predictions", path):
            body["deployment"] = deployed[1]
        if named and named[2]:
            # It has no deadline at Replicate; one that the stack was never told of ends by itself.
            body["version"], run.collection, life = named[2], named[3], 7200.0
        plan = world.faults.plan_run()
        for scenario in world.scenarios:
            scenario.plan(run, plan)
        world.scheduler.spawn(f"run {run.id}", lambda: self._run(run, plan, life))
        return run

    def accept_late(self, body: dict[str, Any], request: httpx.Request, path: str, sent_at: float) -> None:
        """Makes it long after its create was sent."""
        self.accept(body, request, path).sent_at = sent_at

    def _run(self, run: Run, plan: dict[str, Any], life: float) -> None:
        world = self._world
        end_of_life = run.created + life
        self._pass(run, plan["queued_seconds"], end_of_life)
        if not run.over and run.cancel_asked is None and world.scheduler.now < end_of_life:
            run.status, run.started = "processing", world.scheduler.now
            self._tell(run, "start")
            for _ in range(plan.get("log_lines", 0)):
                self._pass(run, 1.0, end_of_life)
                run.logs += "still working\n"
                self._tell(run, "logs")
            if plan["output_seconds"] is not None:
                self._pass(run, plan["output_seconds"], end_of_life)
                run.logs += "working\n"
                self._tell(run, "logs")
                if plan["text"] and run.cancel_asked is None:
                    run.output = [f"{run.prompt}: first"]
                    self._tell(run, "output")
            self._pass(run, plan["run_seconds"], end_of_life)
        status = plan["status"]
        if run.cancel_asked is not None or world.scheduler.now >= end_of_life:
            lost_race = plan["cancel_loses"] and run.cancel_asked is not None and run.started
            if not lost_race:
                status = "canceled" if run.started else plan["unstarted"]
        self._end(run, status, plan)

    def _pass(self, run: Run, seconds: float, end_of_life: float) -> None:
        """Lets time pass, less where it is canceled or its life ends."""
        scheduler = self._world.scheduler
        seconds = min(seconds, end_of_life - scheduler.now)
        if run.cancel_asked is None and seconds > 0:
            run.cancel = Waiter()  # one whose time is over wakes nobody any more
            scheduler.wait(run.cancel, seconds)

    def _end(self, run: Run, status: str, plan: dict[str, Any]) -> None:
        run.status, run.ended = status, self._world.scheduler.now
        run.logs += "done\n"
        if status == "succeeded":
            run.output = run.final_output = self._final_output(run, plan)
        else:
            run.output = None
        self._tell(run, "completed")

    def _final_output(self, run: Run, plan: dict[str, Any]) -> Any:
        urls = [f"https://replicate.delivery/xezq/{run.id}/{n}.png" for n in range(plan["files"])]
        if not urls:
            return [f"{run.prompt}: first", f"{run.prompt}: last"] if plan["text"] else {"text": run.prompt}
        return urls[0] if len(urls) == 1 else {"images": urls, "seed": 7}

    def told(self, run: Run, *, listed: bool = False) -> dict[str, Any]:
        """A prediction in Replicate's JSON, as it is now."""
        removed = run.ended is not None and self._world.scheduler.now >= run.ended + REMOVED_AFTER_SECONDS
        told = {
            "id": run.id,
            "model": run.body["model"],
            "version": run.body.get("version", "hidden"),
            "input": {} if removed else run.body["input"],
            "output": None if removed else run.output,
            "logs": "" if removed else run.logs,
            "error": "it broke" if run.status == "failed" else None,
            "status": run.status,
            "created_at": _timestamp(run.created),
            "started_at": _timestamp(run.started) if run.started else None,
            "completed_at": _timestamp(run.ended) if run.ended else None,
            "metrics": {"predict_time": 1.5} if run.ended and run.started else None,
            "data_removed": removed,
            "urls": {"get": f"{URL}/{run.collection}/{run.id}"},
        }
        if run.body.get("webhook") and f"webhook in {'list' if listed else 'get'}" not in self.hides:
            told["webhook"] = run.body["webhook"]
        if "deployment" in run.body and "deployment" not in self.hides:
            told["deployment"] = run.body["deployment"]
        if "input" in self.hides:
            told["input"] = None
        elif "redacted input" in self.hides:
            told["input"] = {"prompt": "[redacted]"}
        return told

    def _read(self, request: httpx.Request, path: str) -> httpx.Response:
        if path in ("/predictions", "/trainings"):
            return self._list(request, path[1:])
        if path == "/webhooks/default/secret":
            return httpx.Response(200, json={"key": SECRET})
        if path.startswith("/models/"):
            return httpx.Response(200, json={"is_official": True, "latest_version": None})
        run = self.runs.get(path.split("/")[2])
        if run is None or run.collection != path.split("/")[1]:
            return httpx.Response(404, json={"detail": "not found"})
        if path.endswith("/cancel"):
            self._world.canceled.setdefault(run.id, self._world.scheduler.now)
            if run.cancel_asked is None and not run.over:
                # It ends a moment later.
                run.cancel_asked = self._world.scheduler.now
                self._world.scheduler.at(run.cancel_asked + 0.5, lambda: self._cancel(run))
        # What is read piece by piece is not parsed.
        parsed = request.headers.get("accept-encoding") != "identity"
        if parsed and any(scenario.reads(run) for scenario in self._world.scenarios):
            self._world.die()
        return httpx.Response(200, json=self.told(run))

    def _cancel(self, run: Run) -> None:
        self._world.scheduler.wake(run.cancel, None)

    def _list(self, request: httpx.Request, collection: str) -> httpx.Response:
        now = self._world.scheduler.now
        found = [run for run in self.runs.values() if run.listed_at <= now and run.collection == collection]
        found.sort(key=lambda run: run.created, reverse=True)
        start = int(request.url.params.get("cursor", "0"))
        page = found[start : start + PAGE]
        following = f"{URL}/{collection}?cursor={start + PAGE}" if len(found) > start + PAGE else None
        results = [self.told(run, listed=True) for run in page]
        return httpx.Response(200, json={"previous": None, "next": following, "results": results})

    # -- webhooks ---------------------------------------------------------------------------------------------

    def _tell(self, run: Run, event: str) -> None:
        if not run.body.get("webhook") or event not in run.body.get("webhook_events_filter", ()):
            return
        body = json.dumps(self._told_by_webhook(run)).encode()
        for delay in self._world.faults.of_webhook(event):
            self._world.scheduler.spawn(f"webhook {event}", lambda: self._deliver(run, event, body), delay)

    def _told_by_webhook(self, run: Run) -> dict[str, Any]:
        """What a webhook shows: as a GET does, whatever lists and GETs hide."""
        told = self.told(run)
        return {**told, "webhook": run.body["webhook"]} if "webhook in get" not in self.hides else told

    def _deliver(self, run: Run, event: str, body: bytes) -> None:
        """Sends one, and sends the last one again while it is not taken, for about a minute."""
        world = self._world
        path = run.body["webhook"].removeprefix(world.api_url)
        for pause in (2, 5, 10, 20, 20) if event == "completed" else (0,):
            moment = int(world.scheduler.now)
            headers = sign(body, webhook_id=f"msg_{run.id}_{event}", timestamp=moment, secrets=[SECRET])
            # One that would kill whoever reads it is larger than what Lambda takes: the receiver is never called.
            too_large = any(scenario.reads(run) for scenario in world.scenarios)
            if not too_large and not world.faults.webhook_is_lost():
                try:
                    answer = world.functions.invoke("receive_webhook", world.api_event("POST", path, headers, body))
                except FunctionFailed:
                    answer = {"statusCode": 502}
                if answer["statusCode"] == 200:
                    run.heard_at = run.heard_at or world.scheduler.now
                    if event != "completed" and run.told_at is None:
                        run.told_at = world.scheduler.now
                    return
            if pause:
                world.scheduler.sleep(pause)

    # -- files ------------------------------------------------------------------------------------------------

    def serve_file(self, request: httpx.Request) -> httpx.Response:
        """The file host."""
        world = self._world
        assert "authorization" not in request.headers, "the token went to a file host"
        url = str(request.url)
        world.step("file host", world.faults.file_seconds())
        run = self.runs.get(request.url.path.split("/")[2])
        if run is None or run.ended is None or world.scheduler.now >= run.ended + REMOVED_AFTER_SECONDS:
            return httpx.Response(404)
        body, fault = file_bytes(url), world.faults.of_file()
        headers = {"content-type": "image/png", "content-length": str(len(body))}
        world.copies(run.our_id)
        if fault == "died before":
            world.die()
        if fault == "500":
            return httpx.Response(503)
        if fault == "no connection":
            raise httpx.ConnectError("refused")
        if fault == "cut":
            return httpx.Response(200, headers=headers, stream=httpx.ByteStream(body[: len(body) // 2]))
        if fault == "no length":
            del headers["content-length"]
        if world.stop_copying():
            fault = "slow"
        if fault == "slow":
            return httpx.Response(200, headers=headers, stream=self._slow(body))
        return httpx.Response(200, headers=headers, stream=httpx.ByteStream(body))

    def _slow(self, body: bytes) -> Any:
        world = self._world
        seconds = world.rng.choice((20.0, 100.0, 300.0))

        class Slow(httpx.SyncByteStream):
            def __iter__(self) -> Iterator[bytes]:
                yield body[:40]
                world.step("file host", seconds)
                yield body[40:]

        return Slow()


def _timestamp(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")
