"""Batches: many requests from one manifest, and where each of them stands.

A batch's item (`pk` = `batch#{id}`, `sk` = `status`) is small and holds no list: the lines are objects (see
`batches.files`), and a line's prediction is known by an id that is made from the batch's id, the line's
number and the attempt. So a line starts one prediction however often it is sent, and whoever wants to know of all of
them goes through the lines.

    preparing ─▶ running ─▶ succeeded | failed | canceled     ─ retry ─▶ preparing, attempt + 1

`succeeded` is a batch that has gone through its lines, whatever became of each; `failed` one that could not be read, or
had more failing lines than it tolerates. `stop` in the item says that no further line starts (`canceled`, `exceeded`).
It is written before anybody looks for lines that run, and a line looks at it right before it is submitted, when it has
been written down: so either of the two sees the other, and no line is left running.

`sk` = `key` under `batch#{owner's key, hashed}` holds the id that belongs to an `Idempotency-Key` (see
`store.idempotency_keys`). Batches' own ids are random, because messages name them without further proof.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import client
from predictions.aws.dynamodb import deserialize, list_page, read_items, serialize, timestamp
from predictions.batches.files import read_range, requests_key
from predictions.clock import backoff_seconds
from predictions.errors import NoLongerWanted, Problem
from predictions.ids import derived_id
from predictions.intents.model import Intent, create_requested_intent
from predictions.store.idempotency_keys import IdempotencyKeys
from predictions.validation import BODY_LIMIT_BYTES

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient


ENDED = ("succeeded", "failed", "canceled")

CHECK_SECONDS = 300
"""How often the sweep looks whether the execution of a batch is there."""

_START_CHECK_SECONDS = 60
# Backoff of the looks at a batch over which functions die: doubled with each execution, up to an hour.
_CHECK_MOST_SECONDS = 3600
# A batch has no deadline: one that functions died over for so long is ended this long before its item expires.
_ABANDON_BEFORE_SECONDS = 86400
_DEAD_EXECUTIONS = 3
# What a line of requests.jsonl has around its request.
_AROUND_BYTES = 1024


@dataclass(frozen=True)
class Batch:
    """A batch's item. Times are whole seconds since 1970.

    Attributes:
        manifest: Bucket, key, ETag and format of the manifest.
        templated: Whether a template makes its requests.
        recipe: The name of the recipe that makes them.
        attempt: From 1; each retry is a further one.
        execution_n: Which execution of the attempt runs it.
        lines: How many lines this attempt runs; None until they are known.
        total: How many lines there are, refused ones included.
        refused: How many of these cannot run.
        counts: Lines by their status, once it has ended.
        results_key: The results of the last attempt that ended.
        stop: Why no further line starts: `canceled` or `exceeded`.
        stopped_before: How many of this attempt's lines were looked at, to cancel those that run; None once all were.
        stalled_looks: How many looks in a row of the sweep died while they canceled lines.
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

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.status in ENDED

    @property
    def is_canceling(self) -> bool:
        """Whether lines of it that run are still to be canceled."""
        return self.stop is not None and self.stopped_before is not None and self.lines is not None

    @property
    def abandoned_at(self) -> int | None:
        """When it is ended by our own word, where functions died over it again and again."""
        died = self.execution_n > _DEAD_EXECUTIONS or self.stalled_looks > _DEAD_EXECUTIONS
        return self.expires_at - _ABANDON_BEFORE_SECONDS if died else None

    @property
    def execution_name(self) -> str:
        """Of the execution that runs it."""
        return f"{self.id}-{self.attempt}-{self.execution_n}"

    def manifest_uri(self, outputs_bucket_name: str) -> str | None:
        """`s3://…` of its manifest; None where its requests came with the call."""
        bucket, key = self.manifest["bucket"], self.manifest["key"]
        return None if bucket == outputs_bucket_name else f"s3://{bucket}/{key}"

    def prediction_id(self, n: int, attempt: int) -> str:
        """The id of a line's prediction, whether it exists or not."""
        # As `create_requested_intent` makes it.
        return derived_id(f"batch#{self.owner}", self.line_key(n, attempt))

    def line_key(self, n: int, attempt: int) -> str:
        """What makes a line's request the same one when it comes again."""
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
        """From `TABLE_NAME`, `OUTPUTS_BUCKET_NAME` and `ALLOW_LOOPBACK_WEBHOOKS`."""
        return cls(
            os.environ["TABLE_NAME"],
            os.environ["OUTPUTS_BUCKET_NAME"],
            allow_loopback_webhooks=os.environ["ALLOW_LOOPBACK_WEBHOOKS"] == "true",
        )

    # -- the requests queue's door --------------------------------------------------------------------------------

    def intent(self, body: Mapping[str, Any], message: object) -> Intent:  # noqa: ARG002  # the door's interface
        """The intent of a line: what it asks for was written down when its owner asked for the batch.

        Args:
            body: `{"batch_id", "attempt", "n", "offset", "length"}`.
            message: Where it came in.

        Raises:
            NoLongerWanted: It is not to start any more.
            Problem: 404, where there is no such batch or line; 422, where its request is not taken any more.
        """
        batch_id, *numbers = (body.get(name) for name in ("batch_id", "attempt", "n", "offset", "length"))
        if not isinstance(batch_id, str) or not all(type(number) is int and number >= 0 for number in numbers):
            raise Problem(404, "A line of a batch has batch_id, attempt, n, offset and length.")
        attempt, n, offset, length = (int(str(number)) for number in numbers)
        batch = self.find(batch_id)
        if batch is None:
            raise Problem(404, "There is no such batch.")
        self._check_open(batch, attempt)
        if not 0 < length <= BODY_LIMIT_BYTES + _AROUND_BYTES:
            raise Problem(404, "The batch has no such line.")
        line = read_range(self.bucket_name, requests_key(batch.id), offset, length)
        try:
            found = json.loads(line or b"null")
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("n") != n:
            raise Problem(404, "The batch has no such line.")
        return create_requested_intent(
            found["request"],
            owner=batch.owner,
            source="batch",
            source_key=batch.line_key(n, attempt),
            allow_loopback_webhooks=self.allow_loopback_webhooks,
            origin={"batch": batch.id, "line": n, "attempt": attempt},
            depth=batch.depth,
            output_prefix=found.get("output_prefix"),
        )

    def _check_open(self, batch: Batch, attempt: int) -> None:
        if batch.stop == "canceled":
            raise NoLongerWanted("The batch was canceled.")
        if batch.stop is not None:
            raise NoLongerWanted("More lines of the batch had failed than it tolerates.")
        if batch.ended or batch.attempt != attempt:
            raise NoLongerWanted("The batch has gone on without this line.")

    # -- reading ------------------------------------------------------------------------------------------------------

    def find(self, batch_id: str) -> Batch | None:
        """A batch, read consistently."""
        dynamodb = self._dynamodb
        found = dynamodb.get_item(TableName=self._table_name, Key=_key(batch_id), ConsistentRead=True).get("Item")
        return _batch(deserialize(found)) if found else None

    def page(self, owner: str, start: str | None, *, older: bool, size: int) -> tuple[Sequence[Batch], bool]:
        """A page of an owner's batches; see `aws.dynamodb.list_page`."""
        dynamodb = self._dynamodb
        key = _listed_owner(owner)
        pks, more = list_page(dynamodb, self._table_name, key, start, older=older, size=size)
        found = read_items(dynamodb, self._table_name, [(pk, "status") for pk in pks])
        return [_batch(found[pk, "status"]) for pk in pks if (pk, "status") in found], more

    # -- what changes -------------------------------------------------------------------------------------------------

    @property
    def idempotency_keys(self) -> IdempotencyKeys:
        """The idempotency keys of batches."""
        return IdempotencyKeys("batch", self._table_name, self._dynamodb, now=self.now)

    def write_down(self, batch: Batch) -> Batch:
        """Writes a new batch down; one that is there already stays as it is, and is given.

        Raises:
            ClientError, BotoCoreError: It is not there, as far as the table tells: nobody is about to run it.
        """
        dynamodb = self._dynamodb
        values = {name: getattr(batch, name) for name in _FIELDS}
        item = {
            **{name: value for name, value in values.items() if value is not None},
            "pk": f"batch#{batch.id}",
            "sk": "status",
            "owner": _listed_owner(batch.owner),
            "open": "open",
        }
        try:
            dynamodb.put_item(
                TableName=self._table_name, Item=serialize(item), ConditionExpression="attribute_not_exists(pk)"
            )
        except dynamodb.exceptions.ConditionalCheckFailedException:
            return self.find(batch.id) or batch
        except (ClientError, BotoCoreError):
            # The write may have been made, and only its answer be lost: then the sweep runs the batch, and a caller who
            # is told of an error would make another one.
            if there := self.find(batch.id):
                return there
            raise
        return batch

    def running(self, batch: Batch, *, lines: int, total: int, refused: int) -> None:
        """Notes what an attempt runs."""
        self._change(
            batch,
            {"status": "running", "lines": lines, "total": total, "refused": refused},
            condition="attempt = :attempt AND #status = :preparing",
            values={":preparing": "preparing"},
        )

    def unreadable(self, batch: Batch, error: str) -> None:
        """Notes why a batch has no lines."""
        self._change(
            batch,
            {"status": "running", "lines": 0, "total": 0, "refused": 0, "error": error},
            condition="attempt = :attempt AND #status = :preparing",
            values={":preparing": "preparing"},
        )

    def stop(self, batch: Batch, why: str) -> Batch | None:
        """Says that no further line of it starts, and that those that run are to be canceled.

        Returns:
            The batch as it is then; None where it had ended, or was stopped before.
        """
        return self._change(
            batch,
            {"stop": why, "stopped_before": 0, "next_check_at": int(self.now())},
            condition="attempt = :attempt AND attribute_exists(#open) AND attribute_not_exists(#stop)",
        )

    def stopped(self, batch: Batch, before: int | None) -> None:
        """Notes how far the cancelling of its lines has come; None: all of them were looked at."""
        set_ = {} if before is None else {"stopped_before": before}
        condition = "attempt = :attempt AND attribute_exists(#open)"
        done = ["stopped_before"] if before is None else []
        # Whoever writes this did not die.
        self._change(batch, set_, remove=[*done, "stalled_looks"], condition=condition)

    def end(self, batch: Batch, *, status: str, counts: Mapping[str, int], results_key: str) -> Batch | None:
        """Ends an attempt; None where that was done before."""
        return self._change(
            batch,
            {
                "status": status,
                # By this name the stream's reader is called for ends, and for ends only.
                "visible": status,
                "counts": dict(counts),
                "results_key": results_key,
                "completed_at": timestamp(self.now()),
            },
            remove=["open", "next_check_at", "stopped_before"],
            condition="attempt = :attempt AND attribute_exists(#open)",
        )

    def begin_again(self, batch: Batch) -> Batch | None:
        """Begins another attempt of a batch that has ended; None where somebody else did."""
        try:
            return self._change(
                batch,
                {
                    "attempt": batch.attempt + 1,
                    "execution_n": 1,
                    "status": "preparing",
                    "open": "open",
                    "next_check_at": int(self.now()) + _START_CHECK_SECONDS,
                },
                remove=["stop", "stopped_before", "stalled_looks", "counts", "completed_at", "lines", "visible"],
                condition="attempt = :attempt AND attribute_not_exists(#open)",
            )
        except (ClientError, BotoCoreError):
            # As for a new batch: the write may have been made, and only its answer be lost.
            there = self.find(batch.id)
            if there is None or there.attempt <= batch.attempt:
                raise
            return there

    def take_check(self, batch: Batch) -> Batch | None:
        """Takes a check that is due, so that nobody else does it; None where somebody did.

        The next check is put off by the same write, before anything is done: the further, the more executions or looks
        have died over this batch.
        """
        wait = _START_CHECK_SECONDS if batch.stop else CHECK_SECONDS
        died = batch.execution_n - 1 + batch.stalled_looks
        look = {"stalled_looks": batch.stalled_looks + 1} if batch.is_canceling else {}
        return self._change(
            batch,
            {"next_check_at": int(self.now()) + backoff_seconds(wait, died, _CHECK_MOST_SECONDS), **look},
            condition="attribute_exists(#open) AND next_check_at = :due",
            values={":due": batch.next_check_at},
        )

    def abandon(self, batch: Batch) -> Batch | None:
        """End an attempt over which functions died, without results; None if it ended meanwhile."""
        error = (
            "This stack's functions ran out of memory or time each time that they worked on this batch, so it was "
            "ended without results. Its predictions have their own ends: read them one by one."
        )
        return self._change(
            batch,
            {
                "status": "failed",
                "visible": "failed",
                "counts": {},
                "error": error,
                "completed_at": timestamp(self.now()),
            },
            remove=["open", "next_check_at", "stopped_before", "stalled_looks"],
            condition="attempt = :attempt AND attribute_exists(#open)",
        )

    def next_execution(self, batch: Batch) -> Batch | None:
        """Counts up the execution that runs it; None where somebody else did."""
        return self._change(
            batch,
            {"execution_n": batch.execution_n + 1},
            condition="attempt = :attempt AND execution_n = :n AND attribute_exists(#open)",
            values={":n": batch.execution_n},
        )

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _dynamodb(self) -> "DynamoDBClient":
        return client("dynamodb")

    def _change(
        self,
        batch: Batch,
        set_: Mapping[str, Any],
        *,
        condition: str,
        remove: Sequence[str] = (),
        values: Mapping[str, Any] | None = None,
    ) -> Batch | None:
        """One conditional update; the batch after it, or None where the condition did not hold."""
        clauses = ["SET " + ", ".join(f"#{name} = :set_{name}" for name in set_)] if set_ else []
        clauses += ["REMOVE " + ", ".join(f"#{name}" for name in remove)] if remove else []
        named = [*set_, *remove, *(name for name in ("status", "open", "stop") if f"#{name}" in condition)]
        bound = {**{f":set_{name}": value for name, value in set_.items()}, **(values or {})}
        bound |= {":attempt": batch.attempt} if ":attempt" in condition else {}
        dynamodb = self._dynamodb
        try:
            answer = dynamodb.update_item(
                TableName=self._table_name,
                Key=_key(batch.id),
                UpdateExpression=" ".join(clauses),
                ConditionExpression=condition,
                ExpressionAttributeNames={f"#{name}": name for name in named},
                ExpressionAttributeValues=serialize(bound),
                ReturnValues="ALL_NEW",
            )
        except dynamodb.exceptions.ConditionalCheckFailedException:
            return None
        return _batch(deserialize(answer["Attributes"]))


def event_of(change: Mapping[str, Any], bucket_name: str) -> tuple[str, dict[str, Any]] | None:
    """The event that a change of a batch calls for: `Batch Completed`, when an attempt has ended.

    Args:
        change: Of the table's stream, with the images before and after.
        bucket_name: The outputs bucket.

    Returns:
        Its type and its detail; None where it calls for none.
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
        "error": batch.error,
        "results": f"s3://{bucket_name}/{batch.results_key}" if batch.results_key else None,
        "created_at": batch.created_at,
        "completed_at": batch.completed_at,
    }


def _key(batch_id: str) -> dict[str, Any]:
    return serialize({"pk": f"batch#{batch_id}", "sk": "status"})


_LISTED = "batches#"


def _listed_owner(owner: str) -> str:
    """The key of the index `by_owner`: an owner's batches are a list of their own. No owner's name holds a `#`."""
    return f"{_LISTED}{owner}"


_FIELDS = frozenset(Batch.__dataclass_fields__)


def _batch(item: Mapping[str, Any]) -> Batch:
    values = {name: value for name, value in item.items() if name in _FIELDS}
    values["owner"] = values["owner"].removeprefix(_LISTED)
    if "counts" in values:
        values["counts"] = {name: int(count) for name, count in values["counts"].items()}
    return Batch(**values)
