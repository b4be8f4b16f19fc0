"""The audit after a run with faults: what the API, the table, its stream, the bucket, the executions, the callers and
the stand-in for Replicate each say must be one story, in which every promise was kept."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MARK = re.compile(r"request-\d+-\d+")
TERMINAL_RANK = 9
ENDS = ("succeeded", "failed", "canceled")
UPSTREAM_ENDS = (*ENDS, "aborted")


@dataclass
class Request:
    """One request of a caller's, and what he was answered.

    Attributes:
        mark: Text that is in its input and in no other's.
        door: `http`, `http with key`, `http of an SDK`, or `queue`.
        body: The body of the create, or of the message.
        key: Its idempotency key, where it has one.
        tries: How often its caller tries while he gets no answer, or a 5xx.
        again: Whether it is sent again after it was accepted.
        cancel_after_seconds: When its caller cancels it; None: never.
        headers: Further headers.
        ids: The ids that it was answered.
        taken: Whether it was accepted: what was accepted must end.
        answers: Every answer, for its story.
    """

    mark: str
    door: str
    body: dict[str, Any]
    key: str | None = None
    tries: int = 1
    again: bool = False
    cancel_after_seconds: float | None = None
    headers: dict[str, str] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    taken: bool = False
    answers: list[str] = field(default_factory=list)


@dataclass
class Evidence:
    """Everything that was left behind by a run.

    Attributes:
        requests: What was asked for.
        items: The status items, by the prediction's id.
        shown: What `GET /predictions/{id}` answers its owner, by id.
        changes: The status items' images before and after each write, in the order of the stream.
        objects: Size and SHA-256 of each object in the outputs bucket, by key.
        payloads: The keys that items of the table name as their payloads.
        uploads: Keys of multipart uploads that were neither completed nor aborted.
        executions: Their statuses, by name.
        upstream: The stand-in's predictions, with `files`: the SHA-256 of each of its output's files.
        told: What callers' webhooks told: (id, event, webhook-id, status).
        events: The events on the bus: (id, kind, event_id, status).
        strikes: What happened to calls of AWS about a prediction, by its id.
    """

    requests: list[Request]
    items: dict[str, dict[str, Any]]
    shown: dict[str, dict[str, Any]]
    changes: list[tuple[str, dict[str, Any], dict[str, Any]]]
    objects: dict[str, tuple[int, str]]
    payloads: set[str]
    uploads: list[str]
    executions: dict[str, str]
    upstream: list[dict[str, Any]]
    told: list[tuple[str, str, str, str]]
    events: list[tuple[str, str, str, str]]
    strikes: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, order=True)
class Finding:
    """A promise that was not kept.

    Attributes:
        what: In words.
        id: Of the prediction, where it is about one.
        mark: Of the request.
    """

    what: str
    id: str = ""
    mark: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, [self.mark, self.id])) + f": {self.what}"


def audit(evidence: Evidence) -> list[Finding]:
    """Finds every promise that was not kept; an empty list: all were."""
    return sorted({*_requests(evidence), *_ends(evidence), *_files(evidence), *_changes(evidence), *_others(evidence)})


def _mark(told: dict[str, Any]) -> str:
    found = MARK.search(json.dumps(told.get("input")))
    return found[0] if found else ""


def _requests(evidence: Evidence) -> Iterator[Finding]:
    """Each accepted request has one prediction; each request has one run at Replicate, at most."""
    ids, runs = defaultdict(set), defaultdict(list)
    for id_, shown in evidence.shown.items():
        ids[_mark(shown)].add(id_)
    for run in evidence.upstream:
        runs[_mark(run)].append(run["id"])
    for request in evidence.requests:
        found = ids[request.mark]
        if request.taken and not found:
            yield Finding("lost: it was accepted, and there is no prediction", mark=request.mark)
        if request.ids - found:
            yield Finding(f"lost: its caller was answered {sorted(request.ids - found)}", mark=request.mark)
        # A caller who was told of an error and asks anew without a key, or a word of its SDK, makes a new request.
        if len(found) > 1:
            yield Finding(f"has {len(found)} predictions: {sorted(found)}", mark=request.mark)
        if len(runs[request.mark]) > 1:
            yield Finding(f"double start: ran {len(runs[request.mark])} times at Replicate", mark=request.mark)
    known = {request.mark for request in evidence.requests}
    for mark in (ids.keys() | runs.keys()) - known:
        yield Finding("nobody asked for it", mark=mark)


def _ends(evidence: Evidence) -> Iterator[Finding]:
    """All has ended, and the API, the table and Replicate name the same end."""
    runs = {run["id"]: run for run in evidence.upstream}
    bound = {item["upstream_id"]: id_ for id_, item in evidence.items.items() if item.get("upstream_id")}
    for run in runs.values():
        if run["status"] not in UPSTREAM_ENDS:
            yield Finding(f"still {run['status']} at Replicate", mark=_mark(run))
        if run["id"] not in bound:
            canceled = any(run["id"] in item.get("orphans_canceled", ()) for item in evidence.items.values())
            if not canceled:
                yield Finding("runs at Replicate, and no prediction is bound to it", mark=_mark(run))
    for id_ in evidence.items.keys() ^ evidence.shown.keys():
        yield Finding("is in the table or shown by the API, but not both", id_)
    for id_ in evidence.items.keys() & evidence.shown.keys():
        item, shown = evidence.items[id_], evidence.shown[id_]
        mark = _mark(shown)
        if item["rank"] != TERMINAL_RANK or item["visible"] not in ENDS or "open" in item or item.get("orphans"):
            yield Finding(f"has not ended: {item['status']}, seen as {item['visible']}", id_, mark)
        if shown["status"] != item["visible"]:
            yield Finding(f"the API shows {shown['status']}, the table {item['visible']}", id_, mark)
        upstream_id = item.get("upstream_id")
        if upstream_id is None:
            if item["visible"] == "succeeded" or (item["visible"] == "failed" and not shown["error"]):
                yield Finding(f"{item['visible']}, without a run at Replicate and without a reason", id_, mark)
            continue
        own = runs.get(upstream_id)
        if own is None or _mark(own) != mark:
            yield Finding("is bound to a run at Replicate that is none of its own", id_, mark)
            continue
        expected = "canceled" if own["status"] == "aborted" else own["status"]
        if item["visible"] != expected:
            yield Finding(f"ended {item['visible']}, at Replicate {run['status']}", id_, mark)
        if expected == "succeeded" and not own["files"] and shown["output"] != own["output"]:
            yield Finding("its output is another one than Replicate's", id_, mark)


def _files(evidence: Evidence) -> Iterator[Finding]:
    """Every file of a prediction that succeeded is stored byte for byte, and nothing else is in the bucket."""
    runs = {run["id"]: run for run in evidence.upstream}
    explained = set(evidence.payloads)
    for id_, shown in evidence.shown.items():
        files = shown.get("output_files") or []
        run = runs.get(evidence.items.get(id_, {}).get("upstream_id", ""))
        keys = {file.get("key") for file in files}
        explained |= keys
        if run is None:
            continue
        wanted = sorted(run["files"]) if run["status"] == "succeeded" else []
        if sorted(str(file.get("sha256")) for file in files) != wanted:
            yield Finding(f"has {len(files)} stored files, of Replicate's {len(wanted)}, or others", id_, _mark(shown))
        for file in files:
            stored = evidence.objects.get(file.get("key") or "")
            if stored is None:
                yield Finding(f"the object of its file {file['path'] or '/'} is missing", id_, _mark(shown))
            elif stored != (file["bytes"], file["sha256"]):
                yield Finding(f"the object of its file {file['path'] or '/'} has other bytes", id_, _mark(shown))
    for key in evidence.objects.keys() - explained:
        yield Finding(f"an object that nothing explains: {key}")
    for key in evidence.uploads:
        yield Finding(f"an upload that was left unfinished: {key}")


def _changes(evidence: Evidence) -> Iterator[Finding]:
    """No terminal status changed, not for a moment, nor what an item is bound to."""
    for id_, before, after in evidence.changes:
        if before.get("rank") == TERMINAL_RANK and before["status"] != after.get("status"):
            yield Finding(f"a terminal status changed: {before['status']} to {after.get('status')}", id_)
        if before.get("visible") in ENDS and before["visible"] != after.get("visible"):
            yield Finding(f"a visible end changed: {before['visible']} to {after.get('visible')}", id_)
        if before.get("upstream_id") and before["upstream_id"] != after.get("upstream_id"):
            yield Finding(f"bound to {before['upstream_id']}, then to {after.get('upstream_id')}", id_)


def _others(evidence: Evidence) -> Iterator[Finding]:
    """No execution runs on, and callers and the bus were told the end, and only that one."""
    for name, status in evidence.executions.items():
        id_, _, n = name.rpartition("-")
        if status == "RUNNING":
            yield Finding(f"execution {name} still runs", id_)
        if id_ not in evidence.items or int(n) > evidence.items[id_]["execution_n"]:
            yield Finding(f"execution {name} belongs to no prediction", id_)
        if status == "TWICE":
            yield Finding(f"two state machines ran execution {name}", id_)
    ends: dict[str, set[str]] = defaultdict(set)
    for id_, event, _, status in evidence.told:
        if event == "completed":
            ends[id_].add(status)
    on_bus: dict[str, set[str]] = defaultdict(set)
    for id_, _, _, status in evidence.events:
        if status in ENDS:
            on_bus[id_].add(status)
    for id_, item in evidence.items.items():
        mark = _mark(evidence.shown.get(id_, {}))
        if item.get("webhook") and ends[id_] != {item["visible"]}:
            yield Finding(f"ended {item['visible']}; its caller's webhook was told {sorted(ends[id_])}", id_, mark)
        if on_bus[id_] != {item["visible"]}:
            yield Finding(f"ended {item['visible']}; the bus was told {sorted(on_bus[id_])}", id_, mark)


def story(evidence: Evidence, finding: Finding) -> str:
    """What is known of the prediction that a finding is about, in order of time where it has one."""
    mark = finding.mark or _mark(evidence.shown.get(finding.id, {}))
    ids = {id_ for id_, shown in evidence.shown.items() if mark and _mark(shown) == mark} | {finding.id} - {""}
    lines = [f"{finding}"]
    for request in evidence.requests:
        if request.mark == mark:
            lines.append(f"  asked for by {request.door}: {json.dumps(request.body)[:300]}")
            lines += [f"    answered {answer}" for answer in request.answers]
    for id_ in sorted(ids):
        lines += [f"  {id_}: {strike}" for strike in evidence.strikes.get(id_, [])]
        for changed, before, after in evidence.changes:
            if changed == id_:
                kept = {"next_check_at", "task_token"}
                names = sorted(name for name in after if before.get(name) != after[name] and name not in kept)
                told = ", ".join(f"{name}={str(after[name])[:60]}" for name in names)
                gone = ", ".join(sorted(before.keys() - after.keys() - kept))
                lines.append(f"  {id_}: written {told}" + (f"; removed {gone}" if gone else ""))
        lines += [f"  execution {name}: {s}" for name, s in evidence.executions.items() if name.startswith(id_)]
        lines += [f"  webhook told {event} {status}" for told, event, _, status in evidence.told if told == id_]
        lines += [f"  bus told {kind}" for told, kind, _, _ in evidence.events if told == id_]
    for run in evidence.upstream:
        if _mark(run) == mark:
            lines.append(f"  at Replicate {run['id']}: {run['status']}, files {len(run['files'])}, {run['created_at']}")
    return "\n".join(lines)


def verdict(evidence: Evidence) -> str:
    """What was not kept, with its stories; empty where all was."""
    return "\n\n".join(story(evidence, finding) for finding in audit(evidence))
