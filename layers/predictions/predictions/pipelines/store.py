"""Pipelines in the table: who asked for what, and the conditions under which that changes.

    pk = pipeline#{id}
        sk = status                     the pipeline: small, since each end of a prediction writes it
        sk = definition#{fingerprint}   its definition, written before the status; an object above 100 KiB
        sk = step#{name}                how many elements a `for_each` found, and when its requests were sent
        sk = error#{name}#{index}       why a run of a step cannot be started: its input cannot be filled
    pk = pipeline#{owner and key, hashed}
        sk = key                        which pipeline an idempotency key names (see `store.idempotency_keys`)

Ids are random, so that nothing of a pipeline that has expired is ever taken for another one's of the same key.
Nothing is said of a step that its predictions say: their ids come from the pipeline's id, the step's name and the
index. `events` counts what may change what there is to do: the execution waits only as long as it is the number that
it saw before it looked.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import client
from predictions.aws.dynamodb import NEW, Condition, ConditionFailed, IfNotExists, Table
from predictions.errors import PredictionsError
from predictions.files.outputs_bucket import OutputsBucket
from predictions.pipelines.definition import Definition
from predictions.store.idempotency_keys import IdempotencyKeys
from predictions.store.keys import list_of, owner_of, pipeline_key
from predictions.store.payloads import store_text
from predictions.times import timestamp

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

_START_CHECK_SECONDS = 60
_REASON_LIMIT_CHARACTERS = 1000
_ERROR_LIMIT_CHARACTERS = 4000

_RUNNING = Condition("status = :running", running="running")

Status = Literal["running", "succeeded", "failed", "canceled"]


class PipelineExists(PredictionsError):
    """A pipeline's id is taken; `pipeline` is what has it."""

    def __init__(self, pipeline: "Pipeline") -> None:
        super().__init__(f"pipeline {pipeline.id} exists")
        self.pipeline = pipeline


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's status item. Times are whole seconds since 1970, except where they are text (RFC 3339).

    Attributes:
        deadline: When it is canceled at the latest; until then links to its intermediate files work.
        cancel_requested: When it was canceled, by its owner or for its deadline.
        events: How often something of it has ended.
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
    written_by: str | None = None
    task_token: str | None = field(default=None, repr=False)

    @property
    def listed_at(self) -> str:
        """Its place in its owner's list."""
        return f"{self.created_at}#{self.id}"

    @property
    def ended(self) -> bool:
        """Whether it is over: nothing of it changes any more."""
        return self.status != "running"


@dataclass(frozen=True)
class Notes:
    """What is noted of a step.

    Attributes:
        count: How many elements its `for_each` found.
        sent_at: When its requests were sent last.
        errors: Why runs of it cannot be started, by index; -1 for all of them.
    """

    count: int | None = None
    sent_at: int | None = None
    errors: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredPipeline:
    """A pipeline with its definition, and what is noted of its steps by their names."""

    pipeline: Pipeline
    definition: Definition
    notes: Mapping[str, Notes]


class PipelinesTable:
    """The pipelines' part of the table.

    Args:
        name: The table's name.
        outputs: The bucket that takes large definitions.
        dynamodb: The client to use.
    """

    def __init__(self, name: str, outputs: OutputsBucket, dynamodb: "DynamoDBClient") -> None:
        self._table = Table(name, dynamodb)
        self._outputs = outputs

    @classmethod
    def from_env(cls) -> "PipelinesTable":
        """From `TABLE_NAME` and what `OutputsBucket.from_env` reads."""
        return cls(os.environ["TABLE_NAME"], OutputsBucket.from_env(), client("dynamodb"))

    def idempotency_keys(self, now: Callable[[], float]) -> IdempotencyKeys:
        """The idempotency keys of pipelines.

        Args:
            now: The time, in seconds since 1970.
        """
        return IdempotencyKeys("pipeline", self._table, now=now)

    def put_pipeline(
        self, pipeline_id: str, definition: Definition, *, owner: str, fingerprint: str, deadline: int, expires: int,
        depth: int, now: float,
    ) -> Pipeline:  # fmt: skip
        """Writes a pipeline down. Twice: the second is told of the first. Crash right after: the sweep starts it.

        Raises:
            PipelineExists: The id is taken.
            ClientError, BotoCoreError: It is not there, as far as the table tells: nobody is about to run it.
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
            "open": "open",
            "next_check_at": int(now) + _START_CHECK_SECONDS,
            "written_by": secrets.token_hex(8),
        }
        try:
            self._table.put_item(pipeline_key(pipeline_id), item, NEW)
        except ConditionFailed as failed:
            there = _pipeline(failed.item or item)
            # botocore repeats a write whose response it did not receive: then what is there is this very one.
            if there.written_by != item["written_by"]:
                raise PipelineExists(there) from None
        except (ClientError, BotoCoreError):
            # The write may have been made, and only its answer be lost: then the sweep runs the pipeline, and a caller
            # who is told of an error would create another one.
            if written := self.get_pipeline(pipeline_id):
                return written
            raise
        return _pipeline(item)

    def get_pipeline(self, pipeline_id: str) -> Pipeline | None:
        """One status item, read consistently."""
        item = self._table.get_item(pipeline_key(pipeline_id))
        return _pipeline(item) if item else None

    def read_pipeline(self, pipeline_id: str) -> StoredPipeline | None:
        """A pipeline with all that is noted of it, read consistently; None where there is none (any more)."""
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
        """A page of an owner's pipelines.

        Args:
            owner: Whose.
            start: The place (`Pipeline.listed_at`) beside which the page starts, or None for the newest.
            older: Whether the page lies on the older side of `start`.
            size: The most pipelines of a page.

        Returns:
            The pipelines from the start of the page on, away from it, and whether there are further ones beyond.
        """
        items, more = self._table.list_items(list_of(owner, "pipelines"), start, older=older, size=size, sk="status")
        return [_pipeline(item) for item in items], more

    # -- what is noted of steps -------------------------------------------------------------------------------

    def note_count(self, pipeline: Pipeline, step: str, count: int) -> None:
        """Notes how many elements a `for_each` found; the first number stays."""
        self._note(pipeline, f"step#{step}", count=IfNotExists(count))

    def note_sent(self, pipeline: Pipeline, step: str, now: float) -> None:
        """Notes that a step's requests have been sent."""
        self._note(pipeline, f"step#{step}", sent_at=int(now))

    def note_error(self, pipeline: Pipeline, step: str, index: int, reason: str) -> None:
        """Notes why a run of a step (-1: any) cannot be started; the first reason stays."""
        self._note(pipeline, f"error#{step}#{index}", reason=IfNotExists(reason[:_REASON_LIMIT_CHARACTERS]))

    def _note(self, pipeline: Pipeline, sk: str, **values: Any) -> None:
        self._table.update_item(pipeline_key(pipeline.id, sk), set={**values, "expires_at": pipeline.expires_at})

    # -- what happens to a pipeline ---------------------------------------------------------------------------

    def request_pipeline_cancel(self, pipeline: Pipeline, now: float) -> Pipeline | None:
        """Flags a running pipeline as canceled: from this write on nothing of it is started.

        Returns:
            The pipeline as it is then; None where it has ended, or is canceled already.
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
        """Ends a running pipeline; None where it has ended.

        Args:
            pipeline: Which.
            status: How.
            error: Why it did not succeed.
            counts: How many steps ended how, for who hears of it.
            now: The time.
        """
        return self._change(
            pipeline,
            set={
                "status": status,
                # `visible` is what the stream's filter asks for.
                "visible": status,
                "completed_at": timestamp(now),
                "counts": dict(counts),
                **({"error": error[:_ERROR_LIMIT_CHARACTERS]} if error else {}),
            },
            remove=["open", "next_check_at", "task_token"],
            condition=_RUNNING,
        )

    def next_pipeline_execution(self, pipeline: Pipeline, now: float) -> Pipeline | None:
        """Counts up the execution that runs a pipeline; None where another did so first, or it has ended."""
        return self._change(
            pipeline,
            set={"execution_n": pipeline.execution_n + 1, "next_check_at": int(now) + _START_CHECK_SECONDS},
            condition=_RUNNING & Condition("execution_n = :n", n=pipeline.execution_n),
        )

    def check_pipeline_at(self, pipeline: Pipeline, moment: float) -> None:
        """Sets when the sweep should look at a running pipeline next."""
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
