"""Items of batches: many requests from one manifest, and their progress.

A batch's item (`pk` = `batch#{id}`, `sk` = `status`) is small and has no list: the lines are objects (see
`batches.files`), and the id of a line's prediction is derived from the batch's id, the line's number and the attempt.
So a line starts one prediction however often it is sent, and a reader of all of them iterates over the lines.

    preparing ─▶ running ─▶ succeeded | failed | canceled     ─ retry ─▶ preparing, attempt + 1

`succeeded` is a batch that has processed its lines, of which at least one succeeded or none was to run; `failed` one
that could not be read, had more failing lines than it tolerates, or whose lines all failed or were refused. `stop` in
the item means that no further line starts (`canceled`, `exceeded`). The field is written before running lines are
searched for, and a line checks it right before it is submitted, after it has been stored: so either of the two sees the
other, and no line is left running.

`sk` = `key` under `batch#{owner's key, hashed}` holds the id that belongs to an `Idempotency-Key` (see
`store.idempotency_keys`). Batches' own ids are random, because messages name them without further proof.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import client
from predictions.aws.dynamodb import NEW, Condition, ConditionFailed, Table, deserialize
from predictions.batches.files import read_range, requests_key
from predictions.clock import backoff_seconds, timestamp
from predictions.errors import NoLongerWanted, Problem
from predictions.ids import derived_id
from predictions.intents.model import Intent, create_requested_intent
from predictions.store.idempotency_keys import IdempotencyKeys
from predictions.store.keys import batch_key, list_of, owner_of, shard_of
from predictions.store.records import labels_and_trace
from predictions.validation import BODY_LIMIT_BYTES

ENDED = ("succeeded", "failed", "canceled")

COUNTED = ("waiting", "running", *ENDED, "refused")
"""The statuses by which lines are counted."""

CHECK_SECONDS = 300
"""How often the sweep checks that the execution of a batch exists."""

_START_CHECK_SECONDS = 60
# Backoff of the checks of a batch whose functions crash: doubled with each execution, up to an hour.
_CHECK_MOST_SECONDS = 3600
# A batch has no deadline: one whose functions keep crashing is failed this long before its item expires.
_ABANDON_BEFORE_SECONDS = 86400
_DEAD_EXECUTIONS = 3
# The bytes of a line of requests.jsonl around its request.
_AROUND_BYTES = 1024

_OPEN = Condition("attribute_exists(open)")
_PREPARING = Condition("status = :preparing", preparing="preparing")


@dataclass(frozen=True)
class Batch:
    """A batch's item. Times are whole seconds since 1970.

    Attributes:
        manifest: Bucket, key, ETag and format of the manifest.
        templated: Whether a template builds its requests.
        checked: Whether the schema of their inputs is stored with it.
        recipe: The name of the recipe that builds them.
        attempt: From 1; each retry adds 1.
        execution_n: The number of the current execution of the attempt.
        lines: The number of lines in this attempt; None until it is known.
        total: The number of all lines, including invalid ones.
        refused: The number of invalid lines.
        counts: Lines by their status, after completion.
        results_key: The results of the last completed attempt.
        stop: Why no further line starts: `canceled` or `exceeded`.
        stopped_before: The number of this attempt's lines checked for cancellation; None when all are.
        labels: The labels of each of its lines, unless the line has one of that key.
        traceparent: The trace that it belongs to.
        webhook: The URL to which each completion is sent.
        stalled_looks: The number of consecutive checks of the sweep that crashed while canceling lines.
    """

    id: str
    owner: str
    listed_at: str
    created_at: str
    created: int
    status: str
    fingerprint: str
    manifest: Mapping[str, str]
    max_concurrency: int
    tolerated_failure_percentage: int
    attempt: int
    execution_n: int
    expires_at: int
    templated: bool = False
    checked: bool = False
    recipe: str | None = None
    depth: int = 0
    lines: int | None = None
    total: int | None = None
    refused: int | None = None
    counts: Mapping[str, int] | None = None
    results_key: str | None = None
    error: str | None = None
    stop: str | None = None
    stopped_before: int | None = None
    stalled_looks: int = 0
    completed_at: str | None = None
    next_check_at: int | None = None
    labels: Mapping[str, str] | None = None
    traceparent: str | None = None
    webhook: str | None = None

    @property
    def ended(self) -> bool:
        """Return whether the batch has completed."""
        return self.status in ENDED

    @property
    def reason(self) -> str | None:
        """Return why the batch failed, as far as it is known; None if it did not.

        Only `error` is stored. The text of a batch without a succeeded line follows from its counts, and such a batch
        can be retried, which one with an `error` cannot.
        """
        if self.error or self.status != "failed" or self.stop is not None or not all_lines_failed(self.counts or {}):
            return self.error
        counts = self.counts or {}
        shown = ", ".join(f"{counts[name]} {name}" for name in ("failed", "refused", "canceled") if counts.get(name))
        return f"No line of the batch succeeded ({shown}). The results hold the reason of each line."

    @property
    def is_canceling(self) -> bool:
        """Return whether running lines are still to be canceled."""
        return self.stop is not None and self.stopped_before is not None and self.lines is not None

    @property
    def abandoned_at(self) -> int | None:
        """Return when the stack fails the batch because its functions keep crashing."""
        died = self.execution_n > _DEAD_EXECUTIONS or self.stalled_looks > _DEAD_EXECUTIONS
        return self.expires_at - _ABANDON_BEFORE_SECONDS if died else None

    @property
    def execution_name(self) -> str:
        """Return the name of the current execution."""
        return f"{self.id}-{self.attempt}-{self.execution_n}"

    def manifest_uri(self, outputs_bucket_name: str) -> str | None:
        """Return its manifest's `s3://…`, or None if the body had the requests."""
        bucket, key = self.manifest["bucket"], self.manifest["key"]
        return None if bucket == outputs_bucket_name else f"s3://{bucket}/{key}"

    def prediction_id(self, n: int, attempt: int) -> str:
        """Return the id of a line's prediction, whether it exists or not."""
        # As `create_requested_intent` derives it.
        return derived_id(f"batch#{self.owner}", self.line_key(n, attempt))

    def line_key(self, n: int, attempt: int) -> str:
        """Return the key that identifies repetitions of a line's request."""
        return f"{self.id}-{n}-{attempt}"


class Batches:
    """The batches of all owners.

    Args:
        table_name: The table.
        bucket_name: The outputs bucket.
        allow_loopback_webhooks: Whether a line's webhook may go to this machine (the local cloud's setting).
        now: The time, in seconds since 1970.
    """

    def __init__(
        self,
        table_name: str,
        bucket_name: str,
        *,
        allow_loopback_webhooks: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table_name = table_name
        self.bucket_name = bucket_name
        self.allow_loopback_webhooks = allow_loopback_webhooks
        self.now = now

    @classmethod
    def from_env(cls) -> "Batches":
        """Build from `TABLE_NAME`, `OUTPUTS_BUCKET_NAME` and `ALLOW_LOOPBACK_WEBHOOKS`."""
        return cls(
            os.environ["TABLE_NAME"],
            os.environ["OUTPUTS_BUCKET_NAME"],
            allow_loopback_webhooks=os.environ["ALLOW_LOOPBACK_WEBHOOKS"] == "true",
        )

    # -- entry point for the requests queue -----------------------------------------------------------------------

    def intent(self, body: Mapping[str, Any], message: object) -> Intent:  # noqa: ARG002  # the interface of `Source`
        """Return the intent of a line, which was stored when its owner created the batch.

        Args:
            body: `{"batch_id", "attempt", "n", "offset", "length"}`.
            message: The message that carried it.

        Raises:
            NoLongerWanted: The line is no longer active.
            Problem: 404 if the batch or line does not exist; 422 if its request is no longer valid.
        """
        batch_id, *numbers = (body.get(name) for name in ("batch_id", "attempt", "n", "offset", "length"))
        if not isinstance(batch_id, str) or not all(type(number) is int and number >= 0 for number in numbers):
            raise Problem(404, "A line of a batch must have batch_id, attempt, n, offset and length.")
        attempt, n, offset, length = (int(str(number)) for number in numbers)
        batch = self.find(batch_id)
        if batch is None:
            raise Problem(404, "Batch not found.")
        self._check_open(batch, attempt)
        if not 0 < length <= BODY_LIMIT_BYTES + _AROUND_BYTES:
            raise Problem(404, "Line not found in the batch.")
        line = read_range(self.bucket_name, requests_key(batch.id), offset, length)
        try:
            found = json.loads(line or b"null")
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("n") != n:
            raise Problem(404, "Line not found in the batch.")
        return create_requested_intent(
            found["request"],
            owner=batch.owner,
            source="batch",
            source_key=batch.line_key(n, attempt),
            allow_loopback_webhooks=self.allow_loopback_webhooks,
            origin={"batch": batch.id, "line": n, "attempt": attempt},
            depth=batch.depth,
            output_prefix=found.get("output_prefix"),
            traceparent=batch.traceparent,
        )

    def _check_open(self, batch: Batch, attempt: int) -> None:
        if batch.stop == "canceled":
            raise NoLongerWanted("The batch was canceled.")
        if batch.stop is not None:
            raise NoLongerWanted("More lines of the batch had failed than it tolerates.")
        if batch.ended or batch.attempt != attempt:
            raise NoLongerWanted("The batch has completed without this line.")

    # -- reading ------------------------------------------------------------------------------------------------------

    def find(self, batch_id: str) -> Batch | None:
        """Return a batch, read consistently, or None."""
        item = self._table.get_item(batch_key(batch_id))
        return _batch(item) if item else None

    def page(self, owner: str, start: str | None, *, older: bool, size: int) -> tuple[Sequence[Batch], bool]:
        """Return a page of an owner's batches; see `Table.list_items`."""
        items, more = self._table.list_items(list_of(owner, "batches"), start, older=older, size=size, sk="status")
        return [_batch(item) for item in items], more

    # -- changes ------------------------------------------------------------------------------------------------------

    @property
    def idempotency_keys(self) -> IdempotencyKeys:
        """Return the idempotency keys of batches."""
        return IdempotencyKeys("batch", self._table, now=self.now)

    def write_down(self, batch: Batch) -> Batch:
        """Store a new batch, or return the existing one unchanged.

        Raises:
            ClientError, BotoCoreError: The batch is not stored, as far as the table shows: nothing will run it.
        """
        values = {name: getattr(batch, name) for name in _FIELDS}
        item = {name: value for name, value in values.items() if value is not None}
        try:
            self._table.put_item(
                batch_key(batch.id), {**item, "owner": list_of(batch.owner, "batches"), "open": shard_of(batch.id)}, NEW
            )
        except ConditionFailed as failed:
            # Another read could fail, and a caller that gets an error would create another batch.
            return _batch(failed.item) if failed.item else batch
        except (ClientError, BotoCoreError):
            # The write may have succeeded with its response lost: then the sweep runs the batch, and a caller that gets
            # an error would create another one.
            if there := self.find(batch.id):
                return there
            raise
        return batch

    def running(self, batch: Batch, *, lines: int, total: int, refused: int) -> None:
        """Record the number of lines that an attempt runs."""
        values = {"status": "running", "lines": lines, "total": total, "refused": refused}
        self._change(batch, set=values, condition=_this_attempt(batch) & _PREPARING)

    def unreadable(self, batch: Batch, error: str) -> None:
        """Record why a batch has no lines."""
        values = {"status": "running", "lines": 0, "total": 0, "refused": 0, "error": error}
        self._change(batch, set=values, condition=_this_attempt(batch) & _PREPARING)

    def stop(self, batch: Batch, why: str) -> Batch | None:
        """Stop a batch: no further line starts, and running ones are to be canceled.

        Returns:
            The updated batch, or None if it had completed or been stopped before.
        """
        return self._change(
            batch,
            set={"stop": why, "stopped_before": 0, "next_check_at": int(self.now())},
            condition=_this_attempt(batch) & _OPEN & Condition("attribute_not_exists(stop)"),
        )

    def stopped(self, batch: Batch, before: int | None) -> None:
        """Record the progress of canceling its lines; None: all of them were checked."""
        # A function that writes this did not crash.
        self._change(
            batch,
            set={} if before is None else {"stopped_before": before},
            remove=["stopped_before", "stalled_looks"],
            condition=_this_attempt(batch) & _OPEN,
        )

    def end(self, batch: Batch, *, status: str, counts: Mapping[str, int], results_key: str) -> Batch | None:
        """Complete an attempt. Return None if that was done before, or if it was stopped since it was read."""
        as_read = Condition("stop = :stop", stop=batch.stop) if batch.stop else Condition("attribute_not_exists(stop)")
        return self._change(
            batch,
            set={
                "status": status,
                # The event filter of the stream's consumer matches this attribute, so completions only.
                "visible": status,
                "counts": dict(counts),
                "results_key": results_key,
                "completed_at": timestamp(self.now()),
            },
            remove=["open", "next_check_at", "stopped_before"],
            condition=_this_attempt(batch) & _OPEN & as_read,
        )

    def begin_again(self, batch: Batch) -> Batch | None:
        """Begin another attempt of a completed batch. Return None if another call did."""
        try:
            return self._change(
                batch,
                set={
                    "attempt": batch.attempt + 1,
                    "execution_n": 1,
                    "status": "preparing",
                    "open": shard_of(batch.id),
                    "next_check_at": int(self.now()) + _START_CHECK_SECONDS,
                },
                remove=["stop", "stopped_before", "stalled_looks", "counts", "completed_at", "lines", "visible"],
                condition=_this_attempt(batch) & Condition("attribute_not_exists(open)"),
            )
        except (ClientError, BotoCoreError):
            # As for a new batch: the write may have succeeded with its response lost.
            there = self.find(batch.id)
            if there is None or there.attempt <= batch.attempt:
                raise
            return there

    def take_check(self, batch: Batch) -> Batch | None:
        """Claim a check that is due. Return None if another function did.

        The same write defers the next check, before anything is done: the longer, the more executions or checks of this
        batch have crashed.
        """
        wait = _START_CHECK_SECONDS if batch.stop else CHECK_SECONDS
        died = batch.execution_n - 1 + batch.stalled_looks
        look = {"stalled_looks": batch.stalled_looks + 1} if batch.is_canceling else {}
        return self._change(
            batch,
            set={"next_check_at": int(self.now()) + backoff_seconds(wait, died, _CHECK_MOST_SECONDS), **look},
            condition=_OPEN & Condition("next_check_at = :due", due=batch.next_check_at),
        )

    def abandon(self, batch: Batch) -> Batch | None:
        """Fail an attempt whose functions keep crashing. Return None if it has completed."""
        error = (
            "This stack's functions ran out of memory or time each time they processed this batch, so it has failed "
            "without results. Its predictions complete independently: read them one by one."
        )
        return self._change(
            batch,
            set={
                "status": "failed",
                "visible": "failed",
                "counts": {},
                "error": error,
                "completed_at": timestamp(self.now()),
            },
            remove=["open", "next_check_at", "stopped_before", "stalled_looks"],
            condition=_this_attempt(batch) & _OPEN,
        )

    def next_execution(self, batch: Batch) -> Batch | None:
        """Increment the execution number. Return None if another function did."""
        return self._change(
            batch,
            set={"execution_n": batch.execution_n + 1},
            condition=_this_attempt(batch) & _OPEN & Condition("execution_n = :n", n=batch.execution_n),
        )

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _table(self) -> Table:
        return Table(self._table_name, client("dynamodb"))

    def _change(self, batch: Batch, *, condition: Condition, **changes: Any) -> Batch | None:
        """Update a batch (see `Table.update_item`); return it, or None if the condition does not hold."""
        try:
            return _batch(self._table.update_item(batch_key(batch.id), condition=condition, **changes))
        except ConditionFailed:
            return None


def _this_attempt(batch: Batch) -> Condition:
    return Condition("attempt = :attempt", attempt=batch.attempt)


def all_lines_failed(counts: Mapping[str, int]) -> bool:
    """Return whether lines failed or were refused, and none succeeded."""
    return not counts.get("succeeded") and counts.get("failed", 0) + counts.get("refused", 0) > 0


def event_of(change: Mapping[str, Any], bucket_name: str) -> tuple[str, dict[str, Any]] | None:
    """Return the event of a change of a batch: `Batch Completed`, after an attempt.

    Args:
        change: Of the table's stream, with the images before and after.
        bucket_name: The outputs bucket.

    Returns:
        Its type and its detail, or None if the change has no event.
    """
    new, old = (deserialize(change.get(name) or {}) for name in ("NewImage", "OldImage"))
    if "visible" not in new or "visible" in old:
        return None
    batch = _batch(new)
    return "Batch Completed", {
        "version": "1",
        "event_id": f"{batch.id}-{batch.attempt}-completed",
        "id": batch.id,
        "object": "batch",
        "owner": batch.owner,
        "status": batch.status,
        "attempt": batch.attempt,
        "recipe": batch.recipe,
        "manifest": batch.manifest_uri(bucket_name),
        "total": batch.total,
        "counts": dict(batch.counts or {}),
        "depth": batch.depth,
        "error": batch.reason,
        "results": f"s3://{bucket_name}/{batch.results_key}" if batch.results_key else None,
        "created_at": batch.created_at,
        "completed_at": batch.completed_at,
        **labels_and_trace(batch.labels or {}, batch.traceparent),
    }


_FIELDS = frozenset(Batch.__dataclass_fields__)


def _batch(item: Mapping[str, Any]) -> Batch:
    values = {name: value for name, value in item.items() if name in _FIELDS}
    values["owner"] = owner_of(values["owner"])
    return Batch(**values)
