"""What a schedule has to have kept: every promise, looked at when nothing goes on any more."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from predictions.aws.dynamodb import deserialize
from predictions.status import visible

from tests.simulation.callers import Wanted
from tests.simulation.upstream import TERMINAL, Run, file_bytes
from tests.support.dynamodb import Item

if TYPE_CHECKING:
    from tests.simulation.world import World

SUBMITTED_AGAIN = "submitted again"
PAID_TWICE = "paid twice: listed later than the second reading"
SECOND_RUNS_CANCELED = "second runs that were canceled"
PRICED = "meta/llama"
"""The model that the stack has a price of."""
PRICE = {
    "date": "2025-01-01",
    "source": "https://replicate.com/meta/llama",
    "tiers": [{"prices": {"predict_time": "0.0010001"}}],
}
MICRO_DOLLARS = 1500
"""What a run of it costs: 1.5 s."""

BEYOND = (SUBMITTED_AGAIN, PAID_TWICE, SECOND_RUNS_CANCELED)
"""Figures of what evidence led to, right or wrong."""


@dataclass
class Verdict:
    """How a schedule went.

    Attributes:
        seed: Its seed.
        broken: What was promised and not kept; empty where all is well.
        figures: What happened, counted.
        worst: The longest delays in seconds, of which the figures of many schedules are the longest.
    """

    seed: int
    broken: list[str]
    figures: dict[str, int] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)


class Check:
    """Looks at a world that is over; what is broken is added to its violations."""

    def __init__(self, world: "World") -> None:
        self.world = world

    def _statuses(self) -> Iterator[Item]:
        for (pk, sk), item in list(self.world.table.items.items()):
            if pk.startswith("prediction#") and sk == "status":
                yield item

    def all(self, over: bool) -> None:
        """Looks at everything; `over` is whether nothing goes on any more."""
        bad = self.world.violations.append
        if not over:
            bad("something still goes on at the end")
        for machine in self.world.machines.values():
            for name, execution in machine.executions.items():
                if execution.status == "RUNNING":
                    bad(f"execution {name} still runs, in {execution.states[-1]}")
        first, second = (machine.executions.keys() for machine in self.world.tracking)
        for name in first & second:
            bad(f"two state machines ran {name}")
        items = {item["id"]["S"]: deserialize(item) for item in self._statuses()}
        for wanted in self.world.callers.requests:
            if wanted.accepted_id and wanted.accepted_id not in items:
                bad(f"request {wanted.number} is lost: it was accepted as {wanted.accepted_id}")
        self._check_starts()
        runs: dict[str, list[Run]] = {}
        for run in self.world.upstream.runs.values():
            runs.setdefault(run.our_id or "", []).append(run)
            if not run.over:
                bad(f"{run.id} still runs at Replicate")
        for prediction_id, item in items.items():
            if prediction_id not in self.world.special:
                self._check_item(prediction_id, item, runs.get(prediction_id, []))
        self._check_writers()
        if self.world.stream is not None:
            self._check_events(items)
        for (pk, sk), left in self.world.table.items.items():
            if "open" in left and not pk.startswith("prediction#"):
                bad(f"{pk} {sk} is still on the sweep's list")

    def _check_writers(self) -> None:
        """What was written down, and may be paid for, was not answered as if it were not."""
        for pk, process in self.world.writers.items():
            answer = process.result if isinstance(process.result, dict) else {}
            # A function whose write and whose read of the item both got no answer cannot know of it.
            unknowable = process.unanswered >= {("PutItem", pk), ("GetItem", pk)}
            if answer.get("statusCode", 0) < 500 or unknowable:
                continue
            kind, _, id_ = pk.partition("#")
            runs = [run for run in self.world.upstream.runs.values() if run.our_id == id_]
            if kind != "prediction" or any(run.created <= (process.ended_at or 0) for run in runs):
                self.world.violations.append(f"{pk}: goes on, and was answered {answer['statusCode']}")

    def _check_events(self, items: dict[str, Any]) -> None:
        """Every visible change is on the bus, at least once and as it is."""
        assert self.world.stream is not None
        told: dict[str, tuple[float, dict[str, Any]]] = {}
        for at, entry in self.world.events:
            detail = json.loads(entry["Detail"])
            told.setdefault(detail["event_id"], (at, detail))
        for record in self.world.stream.dead:
            self.world.violations.append(f"a change was given up: {record['dynamodb']['Keys']}")
        for prediction_id, item in items.items():
            for word in ("started", item["visible"]):
                if f"{prediction_id}-{word}" not in told:
                    self.world.violations.append(f"{prediction_id}: no event of {word!r}")
            at, detail = told.get(f"{prediction_id}-{item['visible']}", (0.0, {}))
            if detail and (detail["status"] != item["visible"] or detail["owner"] != item["owner"].rpartition("#")[2]):
                self.world.violations.append(f"{prediction_id}: its event says {detail}")
            if detail and prediction_id in self.world.visible_at:
                self.world.longest("event after its change", at - self.world.visible_at[prediction_id])

    def _check_starts(self) -> None:
        wanted: dict[str, int] = dict(self.world.prompts)
        for request in self.world.callers.requests:
            wanted[request.prompt] = wanted.get(request.prompt, 0) + 1
        started: dict[str, int] = {}
        by_id: dict[str, int] = {}
        for run in self.world.upstream.runs.values():
            if self.late(run):
                continue
            started[run.prompt] = started.get(run.prompt, 0) + 1
            if run.our_id:
                by_id[run.our_id] = by_id.get(run.our_id, 0) + 1
        for prompt, number in started.items():
            if number > wanted.get(prompt, 0):
                self.world.violations.append(
                    f"{prompt!r} was started {number} times, and asked for {wanted.get(prompt, 0)} times"
                )
        for our_id, number in by_id.items():
            if number > 1:
                self.world.violations.append(f"{our_id}: was started {number} times")

    def late(self, run: Run) -> bool:
        """Whether the list showed a run only after the second reading that led to another submission.

        That is outside of what can be known. It is counted, and must not stay unnoticed.
        """
        return any(run.listed_at > at for at in self.world.evidence_at.get(run.our_id or "", ()) if run.sent_at < at)

    def paid_twice(self) -> dict[str, int]:
        """The requests with two runs that ran to their end, and those where a second one was canceled in time."""
        ended: dict[str, int] = {}
        runs: dict[str, int] = {}
        for run in self.world.upstream.runs.values():
            if run.our_id:
                runs[run.our_id] = runs.get(run.our_id, 0) + 1
                ended[run.our_id] = ended.get(run.our_id, 0) + (run.status in ("succeeded", "failed"))
        counted = {
            PAID_TWICE: sum(number > 1 for number in ended.values()),
            SECOND_RUNS_CANCELED: sum(number > 1 and ended[our_id] < 2 for our_id, number in runs.items()),
            SUBMITTED_AGAIN: sum(map(len, self.world.evidence_at.values())),
        }
        return {name: number for name, number in counted.items() if number}

    def _named(self, item: dict[str, Any], runs: list[Run]) -> bool:
        """Whether a prediction was left undecided until its deadline, and tells a person which runs may be it."""
        waited = self.world.terminal_at[item["id"]] >= item["deadline"] + 300
        return waited and all(run.id in item.get("error", "") for run in runs)

    def _check_noticed(self, item: dict[str, Any], run: Run, bad: Callable[[str], None]) -> None:
        """A second run is known as an orphan, if anything told of it while it was looked for."""
        known = set(item.get("orphans", ())) | set(item.get("orphans_canceled", ()))
        told = run.heard_at is not None or run.listed_at < item.get("bound_at", 0) + 290
        if told and run.id not in known:
            bad(f"its second run {run.id} was not noticed")

    def _check_item(self, prediction_id: str, item: dict[str, Any], runs: list[Run]) -> None:
        def bad(what: str) -> None:
            self.world.violations.append(f"{prediction_id}: {what}")

        if item["rank"] != 9 or item["visible"] not in TERMINAL:
            bad(f"has not ended: {item['status']}, seen as {item['visible']}")
            return
        if item["visible"] != visible(item["status"]) or item["visible"] == "aborted":
            bad(f"ended {item['status']}, and is seen as {item['visible']}")
        if "next_check_at" in item or "open" in item:
            bad("is still on the sweep's list")
        wanted = self.world.callers.wanted_of(prediction_id)
        in_time = [run for run in runs if self._in_time(run, item)]
        bound = [run for run in runs if run.id == item.get("upstream_id")]
        if bound:
            self._check_end(item, bound[0], wanted, bad)
        elif in_time and not self._named(item, in_time):
            bad(f"is lost: {in_time[0].id} ended {in_time[0].status}, and it {item['status']}: {item.get('error')}")
        else:
            self._check_unstarted(item, wanted, bad)
        for run in runs:
            orphan = run.id != item.get("upstream_id")
            if orphan:
                self._check_noticed(item, run, bad)
            known = orphan and run.told_at and run.ended and run.id not in self.world.canceled
            if known and run.told_at and run.ended and run.ended > run.told_at + 300:
                bad(f"its orphan {run.id} was left running")
        self._check_cost(item, bound[0] if bound else None, runs, bad)
        if wanted and wanted.deleted:
            self._check_deleted(item, bad)

    def _check_cost(self, item: dict[str, Any], bound: Run | None, runs: list[Run], bad: Callable[[str], None]) -> None:
        """Its cost is what Replicate bills, or unknown with a reason; never 0 for what may have run."""
        cost, reason = item.get("cost_micro_dollars"), item.get("cost_reason")
        if cost is None and not reason:
            bad("ended without a cost, and without a reason why it is unknown")
        ran = [run for run in runs if run.started and run.status != "aborted" and self._in_time(run, item)]
        if cost == 0 and bound is None and ran:
            bad(f"is said to cost nothing, and {ran[0].id} ran: {reason}")
        if bound is None or item["status"] != bound.status or (cost is None and "could not be read" in (reason or "")):
            return
        priced = bound.collection == "predictions" and bound.body["model"] == PRICED and "deployment" not in bound.body
        billed = bound.started and bound.status != "aborted"
        wanted = (MICRO_DOLLARS if priced else None) if billed else 0
        if cost != wanted:
            bad(f"costs {cost} ({reason}), and Replicate bills {wanted}")

    def _in_time(self, run: Run, item: dict[str, Any]) -> bool:
        """Whether the stack could have known of it before the end: by a webhook, or in the list near its claim."""
        ended_at = self.world.terminal_at[item["id"]]
        if run.heard_at is not None and run.heard_at < ended_at:
            return True
        found_until = (item.get("submit_over") or item.get("submit_until") or item.get("claimed", 0)) + 45
        return run.created < ended_at and run.listed_at < min(found_until, ended_at - 5)

    def _check_unstarted(self, item: dict[str, Any], wanted: Wanted | None, bad: Callable[[str], None]) -> None:
        struck = {kind for kind in self.world.faults.struck if kind != "webhook"}
        if not struck and not (wanted and wanted.canceled_at) and not self._is_unwanted(item):
            bad(f"was never started, and nothing was wrong: {item['status']}, {item.get('error')}")
        if item["status"] not in ("failed", "canceled"):
            bad(f"{item['status']}, and was never started")

    def _is_unwanted(self, item: dict[str, Any]) -> bool:
        """Whether the pipeline or batch that it belongs to was stopped."""
        origin = item.get("origin", {})
        for kind, stopped in (("pipeline", "cancel_requested"), ("batch", "stop")):
            if kind in origin and stopped in self.world.table.items[f"{kind}#{origin[kind]}", "status"]:
                return True
        return False

    def _check_end(self, item: dict[str, Any], run: Run, wanted: Wanted | None, bad: Callable[[str], None]) -> None:
        if item["status"] != run.status:
            bad(f"ended {item['status']} ({item.get('error')}), at Replicate {run.status}")
            return
        assert run.ended is not None
        pk = item["pk"]
        deleted = "deleted" in item
        result = self.world.table.items.get((pk, f"result#{run.id}"))
        text = result["json"]["S"] if result else item.get("result_json")
        if run.status == "succeeded" and not deleted:
            told = json.loads(text)["output"] if text else "nothing"
            if told != run.final_output:
                bad(f"its output is {told}, at Replicate {run.final_output}")
            self._check_files(item, run, bad)
        late = self.world.visible_at[item["id"]] - run.ended
        if late > 4000:
            bad(f"its end came {late:.0f} s late")
        quiet = not set(self.world.faults.struck) - {"webhook", "file"} and not self.world.faults.secret_is_unknown
        if quiet and late > 1100:
            bad(f"its end came {late:.0f} s late, though only webhooks and files were lost")
        wrong = set(self.world.faults.struck) | ({"secret"} if self.world.faults.secret_is_unknown else set())
        waited = self.world.visible_at[item["id"]] - self.world.terminal_at[item["id"]]
        if not wrong - {"webhook", "receiver", "old function"} and waited > 300:
            bad(f"its files were waited for {waited:.0f} s, though only webhooks went wrong")
        if not wrong - {"webhook"} and waited > 110:
            # Sooner than the sweep looks.
            bad(f"its files were waited for {waited:.0f} s, though all who knew of its end could wake its execution")
        if wanted and wanted.canceled_at and run.ended > wanted.canceled_at + 1500 and run.cancel_asked is None:
            bad("its cancel never reached Replicate")

    def _check_files(self, item: dict[str, Any], run: Run, bad: Callable[[str], None]) -> None:
        output = run.final_output
        urls = [output] if isinstance(output, str) else output.get("images", []) if isinstance(output, dict) else []
        stored = json.loads(item.get("files_json") or "[]")
        if len(stored) != len(urls):
            bad(f"{len(stored)} of {len(urls)} files are stored")
        for url, file in zip(urls, stored, strict=False):
            body = self.world.account.objects.get(file.get("key") or "", (None, ""))[0]
            if body != file_bytes(url):
                bad(f"{url} is not stored: {file}")
            elif file["sha256"] != hashlib.sha256(body).hexdigest() or file["bytes"] != len(body):
                bad(f"{url} is stored, and described otherwise: {file}")

    def _check_deleted(self, item: dict[str, Any], bad: Callable[[str], None]) -> None:
        # Task tokens stay, since who waits may not have been told yet.
        kept = ("status", "caller#")
        left = [sk for (pk, sk) in self.world.table.items if pk == item["pk"] and not sk.startswith(kept)]
        left += [key for key in self.world.account.objects if item["id"] in key]
        if left:
            bad(f"was deleted, and {left} is left")
