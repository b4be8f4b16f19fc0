"""Items of pipelines, and the conditions under which they change.

    pk = pipeline#{id}
        sk = status                     the pipeline: small, since each completion of a prediction writes it
        sk = definition#{fingerprint}   its definition, written before the status; an object above 100 KiB
        sk = step#{name}                the number of elements of a `for_each`, and when its requests were sent
        sk = error#{name}#{index}       why a run of a step cannot be started: its input cannot be filled
    pk = pipeline#{owner and key, hashed}
        sk = key                        the pipeline of an idempotency key (see `store.idempotency_keys`)

Ids are random, so that no data of an expired pipeline is ever taken for that of another one with the same key. The
state of a step is derived from its predictions and not stored: their ids come from the pipeline's id, the step's name
and the index. `events` counts changes that may require action: the execution waits only as long as it is the number
that it read before it checked.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import client
from predictions.aws.dynamodb import NEW, Condition, ConditionFailed, IfNotExists, Table
from predictions.clock import timestamp
from predictions.errors import PredictionsError
from predictions.files.outputs_bucket import OutputsBucket
from predictions.pipelines.definition import Definition
from predictions.store.idempotency_keys import IdempotencyKeys
from predictions.store.keys import list_of, owner_of, pipeline_key, shard_of
from predictions.store.payloads import store_text

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

_START_CHECK_SECONDS = 60
_REASON_LIMIT_CHARACTERS = 1000
_ERROR_LIMIT_CHARACTERS = 4000

_RUNNING = Condition("status = :running", running="running")

Status = Literal["running", "succeeded", "failed", "canceled"]


class PipelineExists(PredictionsError):
    """The pipeline's id exists already, as `pipeline`."""

    def __init__(self, pipeline: "Pipeline") -> None:
        super().__init__(f"pipeline {pipeline.id} exists")
        self.pipeline = pipeline


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's status item. Times are whole seconds since 1970, except where they are text (RFC 3339).

    Attributes:
        deadline: When it is canceled automatically; until then links to its intermediate files work.
        cancel_requested: When it was canceled, by its owner or at its deadline.
        events: The number of completions in it.
        labels: The labels of each of its predictions.
        traceparent: The trace that it belongs to.
        webhook: The URL to which its completion is sent.
    """

    id: str
    owner: str
    status: Status
    created_at: str
    created: int
    deadline: int
    expires_at: int
    fingerprint: str
    execution_n: int
    depth: int = 0
    events: int = 0
    next_check_at: int | None = None
    cancel_requested: int | None = None
    completed_at: str | None = None
    error: str | None = None
    labels: Mapping[str, str] | None = None
    traceparent: str | None = None
    webhook: str | None = None
    written_by: str | None = None
    task_token: str | None = field(default=None, repr=False)

    @property
    def listed_at(self) -> str:
        """Return its position in its owner's list."""
        return f"{self.created_at}#{self.id}"

    @property
    def ended(self) -> bool:
        """Return whether the pipeline has completed."""
        return self.status != "running"


@dataclass(frozen=True)
class Notes:
    """The stored records of a step.

    Attributes:
        count: The number of elements of its `for_each`.
        sent_at: When its requests were last sent.
        errors: Why runs of it cannot be started, by index; -1 for all of them.
    """

    count: int | None = None
    sent_at: int | None = None
    errors: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredPipeline:
    """A pipeline with its definition, and the records of its steps by name."""

    pipeline: Pipeline
    definition: Definition
    notes: Mapping[str, Notes]


class PipelinesTable:
    """The pipelines' part of the table.

    Args:
        outputs: The bucket that stores large definitions.
    """

    def __init__(self, name: str, outputs: OutputsBucket, dynamodb: "DynamoDBClient") -> None:
        self._table = Table(name, dynamodb)
        self._outputs = outputs

    @classmethod
    def from_env(cls) -> "PipelinesTable":
        """Build from `TABLE_NAME` and the environment of `OutputsBucket`."""
        return cls(os.environ["TABLE_NAME"], OutputsBucket.from_env(), client("dynamodb"))

    def idempotency_keys(self, now: Callable[[], float]) -> IdempotencyKeys:
        """Return the idempotency keys of pipelines.

        Args:
            now: The time, in seconds since 1970.
        """
        return IdempotencyKeys("pipeline", self._table, now=now)

    def put_pipeline(
        self, pipeline_id: str, definition: Definition, *, owner: str, fingerprint: str, deadline: int, expires: int,
        depth: int, now: float, context: Mapping[str, Any] | None = None,
    ) -> Pipeline:  # fmt: skip
        """Store a pipeline. If the function crashes right after, the sweep starts it.

        `context` has its `labels`, `traceparent` and `webhook`, as far as it has them.

        Raises:
            PipelineExists: The id exists already.
            ClientError, BotoCoreError: The pipeline is not stored, as far as the table shows: nothing will run it.
        """
        created_at = timestamp(now)
        self._put_definition(pipeline_id, fingerprint, definition.to_json(), expires)
        item: dict[str, Any] = {
            "id": pipeline_id,
            "owner": list_of(owner, "pipelines"),
            "listed_at": f"{created_at}#{pipeline_id}",
            "status": "running",
            "created_at": created_at,
            "created": int(now),
            "deadline": deadline,
            "expires_at": expires,
            "fingerprint": fingerprint,
            "execution_n": 1,
            "depth": depth,
            "events": 0,
            "open": shard_of(pipeline_id),
            "next_check_at": int(now) + _START_CHECK_SECONDS,
            "written_by": secrets.token_hex(8),
            **(context or {}),
        }
        try:
            self._table.put_item(pipeline_key(pipeline_id), item, NEW)
        except ConditionFailed as failed:
            there = _pipeline(failed.item or item)
            # botocore repeats a write whose response it did not receive: then what is there is this very one.
            if there.written_by != item["written_by"]:
                raise PipelineExists(there) from None
        except (ClientError, BotoCoreError):
            # The write may have succeeded with its response lost: then the sweep runs the pipeline, and a caller that
            # gets an error would create another one.
            if written := self.get_pipeline(pipeline_id):
                return written
            raise
        return _pipeline(item)

    def get_pipeline(self, pipeline_id: str) -> Pipeline | None:
        """Return a status item, read consistently, or None."""
        item = self._table.get_item(pipeline_key(pipeline_id))
        return _pipeline(item) if item else None

    def read_pipeline(self, pipeline_id: str) -> StoredPipeline | None:
        """Return a pipeline with all its items, read consistently, or None if not found."""
        partition = Condition("pk = :pk", pk=pipeline_key(pipeline_id).pk)
        items = {item["sk"]: item for item in self._table.query(partition)}
        if "status" not in items:
            return None
        pipeline = _pipeline(items["status"])
        kept = items.get(f"definition#{pipeline.fingerprint}")
        if kept is None:
            return None
        text = str(kept["json"]) if "json" in kept else self._outputs.get_payload(kept["s3_key"])
        return StoredPipeline(pipeline, Definition.from_json(text), _notes(items.values()))

    def list_pipelines(self, owner: str, start: str | None, *, older: bool, size: int) -> tuple[list[Pipeline], bool]:
        """Return a page of an owner's pipelines.

        Args:
            owner: The owner.
            start: The position (`Pipeline.listed_at`) next to which the page starts, or None for the newest.
            older: Whether the page holds the entries older than `start`.
            size: The limit of pipelines of a page.

        Returns:
            The pipelines from the start of the page on, away from it, and whether more follow.
        """
        items, more = self._table.list_items(list_of(owner, "pipelines"), start, older=older, size=size, sk="status")
        return [_pipeline(item) for item in items], more

    # -- records of steps --------------------------------------------------------------------------------------

    def note_count(self, pipeline: Pipeline, step: str, count: int) -> None:
        """Record the number of elements of a `for_each`; the first number stays."""
        self._note(pipeline, f"step#{step}", count=IfNotExists(count))

    def note_sent(self, pipeline: Pipeline, step: str, now: float) -> None:
        """Record that a step's requests have been sent."""
        self._note(pipeline, f"step#{step}", sent_at=int(now))

    def note_error(self, pipeline: Pipeline, step: str, index: int, reason: str) -> None:
        """Record why a run of a step (-1: any) cannot start; the first reason stays."""
        self._note(pipeline, f"error#{step}#{index}", reason=IfNotExists(reason[:_REASON_LIMIT_CHARACTERS]))

    def _note(self, pipeline: Pipeline, sk: str, **values: Any) -> None:
        self._table.update_item(pipeline_key(pipeline.id, sk), set={**values, "expires_at": pipeline.expires_at})

    # -- changes of a pipeline --------------------------------------------------------------------------------

    def request_pipeline_cancel(self, pipeline: Pipeline, now: float) -> Pipeline | None:
        """Flag a running pipeline as canceled: after this write no step of it starts.

        Returns:
            The updated pipeline, or None if it has completed or is canceled already.
        """
        return self._change(
            pipeline,
            set={"cancel_requested": int(now), "next_check_at": int(now) + _START_CHECK_SECONDS},
            add={"events": 1},
            condition=_RUNNING & Condition("attribute_not_exists(cancel_requested)"),
        )

    def end_pipeline(
        self, pipeline: Pipeline, status: Status, error: str | None, counts: Mapping[str, int], now: float
    ) -> Pipeline | None:
        """Complete a running pipeline. Return None if it has completed already.

        Args:
            pipeline: The pipeline.
            status: Its terminal status.
            error: Why it did not succeed.
            counts: The number of steps by status, for the event.
            now: The time.
        """
        return self._change(
            pipeline,
            set={
                "status": status,
                # The stream's event filter matches `visible`.
                "visible": status,
                "completed_at": timestamp(now),
                "counts": dict(counts),
                **({"error": error[:_ERROR_LIMIT_CHARACTERS]} if error else {}),
            },
            remove=["open", "next_check_at", "task_token"],
            condition=_RUNNING,
        )

    def next_pipeline_execution(self, pipeline: Pipeline, now: float) -> Pipeline | None:
        """Increment the execution number. Return None if done already, or completed."""
        return self._change(
            pipeline,
            set={"execution_n": pipeline.execution_n + 1, "next_check_at": int(now) + _START_CHECK_SECONDS},
            condition=_RUNNING & Condition("execution_n = :n", n=pipeline.execution_n),
        )

    def check_pipeline_at(self, pipeline: Pipeline, moment: float) -> None:
        """Set the time of the sweep's next check of a running pipeline."""
        self._change(pipeline, set={"next_check_at": int(moment)}, condition=_RUNNING)

    def _change(self, pipeline: Pipeline, *, condition: Condition, **changes: Any) -> Pipeline | None:
        try:
            return _pipeline(self._table.update_item(pipeline_key(pipeline.id), condition=condition, **changes))
        except ConditionFailed:
            return None

    def _put_definition(self, pipeline_id: str, fingerprint: str, text: str, expires: int) -> None:
        stored = store_text(self._outputs, text, f"payloads/pipelines/{pipeline_id}/{fingerprint}.json")
        key = pipeline_key(pipeline_id, f"definition#{fingerprint}")
        self._table.put_item(key, {"expires_at": expires, **stored})


def _pipeline(item: Mapping[str, Any]) -> Pipeline:
    values = {name: item[name] for name in Pipeline.__dataclass_fields__ if name in item}
    return Pipeline(**{**values, "owner": owner_of(item["owner"])})


def _notes(items: Iterable[Mapping[str, Any]]) -> dict[str, Notes]:
    counts: dict[str, Mapping[str, Any]] = {}
    errors: dict[str, dict[int, str]] = {}
    for item in items:
        kind, _, rest = item["sk"].partition("#")
        if kind == "step":
            counts[rest] = item
        elif kind == "error":
            name, _, index = rest.partition("#")
            errors.setdefault(name, {})[int(index)] = item["reason"]
    return {
        name: Notes(counts.get(name, {}).get("count"), counts.get(name, {}).get("sent_at"), errors.get(name, {}))
        for name in counts.keys() | errors.keys()
    }
