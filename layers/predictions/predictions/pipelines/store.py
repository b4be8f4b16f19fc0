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
from predictions.aws.dynamodb import deserialize, list_page, read_items, serialize, timestamp
from predictions.errors import PredictionsError
from predictions.files.outputs_bucket import OutputsBucket
from predictions.pipelines.definition import Definition
from predictions.store.idempotency_keys import IdempotencyKeys
from predictions.store.predictions import PAYLOAD_LIMIT_BYTES

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

_START_CHECK_SECONDS = 60
_REASON_LIMIT_CHARACTERS = 1000
_ERROR_LIMIT_CHARACTERS = 4000

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
        self._name = name
        self._outputs = outputs
        self._dynamodb = dynamodb

    @classmethod
    def from_env(cls) -> "PipelinesTable":
        """From `TABLE_NAME` and what `OutputsBucket.from_env` reads."""
        return cls(os.environ["TABLE_NAME"], OutputsBucket.from_env(), client("dynamodb"))

    def idempotency_keys(self, now: Callable[[], float]) -> IdempotencyKeys:
        """The idempotency keys of pipelines.

        Args:
            now: The time, in seconds since 1970.
        """
        return IdempotencyKeys("pipeline", self._name, self._dynamodb, now=now)

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
            **_key(pipeline_id),
            "id": pipeline_id,
            "owner": _list_key(owner),
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
            self._dynamodb.put_item(
                TableName=self._name,
                Item=serialize(item),
                ConditionExpression="attribute_not_exists(pk)",
                ReturnValuesOnConditionCheckFailure="ALL_OLD",
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException as error:
            left: Any = error.response
            there = _pipeline(deserialize(left["Item"]))
            # botocore repeats a write whose answer it did not see: then what is there is this very one.
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
        found = self._dynamodb.get_item(
            TableName=self._name, Key=serialize(_key(pipeline_id)), ConsistentRead=True
        ).get("Item")
        return _pipeline(deserialize(found)) if found else None

    def read_pipeline(self, pipeline_id: str) -> StoredPipeline | None:
        """A pipeline with all that is noted of it, read consistently; None where there is none (any more)."""
        items: dict[str, dict[str, Any]] = {}
        for page in self._dynamodb.get_paginator("query").paginate(
            TableName=self._name,
            KeyConditionExpression="pk = :pk",
            ExpressionAttributeValues=serialize({":pk": _key(pipeline_id)["pk"]}),
            ConsistentRead=True,
        ):
            items |= {item["sk"]: item for item in map(deserialize, page["Items"])}
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
        key = _list_key(owner)
        pks, more = list_page(self._dynamodb, self._name, key, start, older=older, size=size)
        found = read_items(self._dynamodb, self._name, [(pk, "status") for pk in pks])
        return [_pipeline(found[pk, "status"]) for pk in pks if (pk, "status") in found], more

    # -- what is noted of steps -------------------------------------------------------------------------------

    def note_count(self, pipeline: Pipeline, step: str, count: int) -> None:
        """Notes how many elements a `for_each` found; the first number stays."""
        self._note(pipeline, f"step#{step}", "#value = if_not_exists(#value, :value)", "count", count)

    def note_sent(self, pipeline: Pipeline, step: str, now: float) -> None:
        """Notes that a step's requests have been sent."""
        self._note(pipeline, f"step#{step}", "#value = :value", "sent_at", int(now))

    def note_error(self, pipeline: Pipeline, step: str, index: int, reason: str) -> None:
        """Notes why a run of a step (-1: any) cannot be started; the first reason stays."""
        reason = reason[:_REASON_LIMIT_CHARACTERS]
        self._note(pipeline, f"error#{step}#{index}", "#value = if_not_exists(#value, :value)", "reason", reason)

    def _note(self, pipeline: Pipeline, sk: str, assignment: str, name: str, value: Any) -> None:
        self._dynamodb.update_item(
            TableName=self._name,
            Key=serialize({**_key(pipeline.id), "sk": sk}),
            UpdateExpression=f"SET {assignment}, expires_at = :expires",
            ExpressionAttributeNames={"#value": name},
            ExpressionAttributeValues=serialize({":value": value, ":expires": pipeline.expires_at}),
        )

    # -- what happens to a pipeline ---------------------------------------------------------------------------

    def request_pipeline_cancel(self, pipeline: Pipeline, now: float) -> Pipeline | None:
        """Flags a running pipeline as canceled: from this write on nothing of it is started.

        Returns:
            The pipeline as it is then; None where it has ended, or is canceled already.
        """
        return self._change(
            pipeline.id,
            "SET cancel_requested = :now, next_check_at = :check ADD events :one",
            "#status = :running AND attribute_not_exists(cancel_requested)",
            {":now": int(now), ":check": int(now) + _START_CHECK_SECONDS, ":one": 1, ":running": "running"},
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
        values = {":status": status, ":at": timestamp(now), ":counts": dict(counts), ":running": "running"}
        if error:
            values[":error"] = error[:_ERROR_LIMIT_CHARACTERS]
        return self._change(
            pipeline.id,
            # `visible` is what the stream's filter asks for.
            "SET #status = :status, visible = :status, completed_at = :at, counts = :counts"
            f"{', #error = :error' if error else ''} REMOVE #open, next_check_at, task_token",
            "#status = :running",
            values,
        )

    def next_pipeline_execution(self, pipeline: Pipeline, now: float) -> Pipeline | None:
        """Counts up the execution that runs a pipeline; None where another did so first, or it has ended."""
        return self._change(
            pipeline.id,
            "SET execution_n = :next, next_check_at = :check",
            "#status = :running AND execution_n = :n",
            {
                ":next": pipeline.execution_n + 1,
                ":n": pipeline.execution_n,
                ":check": int(now) + _START_CHECK_SECONDS,
                ":running": "running",
            },
        )

    def check_pipeline_at(self, pipeline: Pipeline, moment: float) -> None:
        """Sets when the sweep should look at a running pipeline next."""
        self._change(
            pipeline.id,
            "SET next_check_at = :check",
            "#status = :running",
            {":check": int(moment), ":running": "running"},
        )

    def _change(self, pipeline_id: str, update: str, condition: str, values: Mapping[str, Any]) -> Pipeline | None:
        names = {"#status": "status", "#error": "error", "#open": "open"}
        try:
            answer = self._dynamodb.update_item(
                TableName=self._name,
                Key=serialize(_key(pipeline_id)),
                UpdateExpression=update,
                ConditionExpression=condition,
                ExpressionAttributeNames={n: name for n, name in names.items() if n in update + condition},
                ExpressionAttributeValues=serialize(values),
                ReturnValues="ALL_NEW",
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            return None
        return _pipeline(deserialize(answer["Attributes"]))

    def _put_definition(self, pipeline_id: str, fingerprint: str, text: str, expires: int) -> None:
        item: dict[str, Any] = {
            "pk": _key(pipeline_id)["pk"],
            "sk": f"definition#{fingerprint}",
            "expires_at": expires,
        }
        if len(text.encode()) > PAYLOAD_LIMIT_BYTES:
            item["s3_key"] = f"payloads/pipelines/{pipeline_id}/{fingerprint}.json"
            self._outputs.put_payload(item["s3_key"], text)
        else:
            item["json"] = text
        self._dynamodb.put_item(TableName=self._name, Item=serialize(item))


def _key(pipeline_id: str) -> dict[str, str]:
    return {"pk": f"pipeline#{pipeline_id}", "sk": "status"}


_PIPELINES_OF = "pipelines#"


def _list_key(owner: str) -> str:
    """The key of the index `by_owner`: an owner's pipelines are a list of their own. No owner's name holds a `#`."""
    return f"{_PIPELINES_OF}{owner}"


def _pipeline(item: Mapping[str, Any]) -> Pipeline:
    values = {name: item[name] for name in Pipeline.__dataclass_fields__ if name in item}
    return Pipeline(**{**values, "owner": item["owner"].removeprefix(_PIPELINES_OF)})


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
