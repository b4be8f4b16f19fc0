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
        name: The table's name.
        outputs: The bucket that stores large definitions.
        dynamodb: The client to use.
    """

    def __init__(self, name: str, outputs: OutputsBucket, dynamodb: "DynamoDBClient") -> None:
        self._name = name
        self._outputs = outputs
        self._dynamodb = dynamodb

    @classmethod
    def from_env(cls) -> "PipelinesTable":
        """Build from `TABLE_NAME` and the environment of `OutputsBucket`."""
        return cls(os.environ["TABLE_NAME"], OutputsBucket.from_env(), client("dynamodb"))

    def idempotency_keys(self, now: Callable[[], float]) -> IdempotencyKeys:
        """Return the idempotency keys of pipelines.

        Args:
            now: The time, in seconds since 1970.
        """
        return IdempotencyKeys("pipeline", self._name, self._dynamodb, now=now)

    def put_pipeline(
        self, pipeline_id: str, definition: Definition, *, owner: str, fingerprint: str, deadline: int, expires: int,
        depth: int, now: float,
    ) -> Pipeline:  # fmt: skip
        """Store a pipeline. If the function crashes right after, the sweep starts it.

        Raises:
            PipelineExists: The id exists already.
            ClientError, BotoCoreError: The pipeline is not stored, as far as the table shows: nothing will run it.
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
            # botocore retries a write whose response was lost: then the stored item is this very one.
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
        found = self._dynamodb.get_item(
            TableName=self._name, Key=serialize(_key(pipeline_id)), ConsistentRead=True
        ).get("Item")
        return _pipeline(deserialize(found)) if found else None

    def read_pipeline(self, pipeline_id: str) -> StoredPipeline | None:
        """Return a pipeline with all its items, read consistently, or None if not found."""
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
        """Return a page of an owner's pipelines.

        Args:
            owner: The owner.
            start: The position (`Pipeline.listed_at`) next to which the page starts, or None for the newest.
            older: Whether the page holds the entries older than `start`.
            size: The limit of pipelines of a page.

        Returns:
            The pipelines from the start of the page on, away from it, and whether more follow.
        """
        key = _list_key(owner)
        pks, more = list_page(self._dynamodb, self._name, key, start, older=older, size=size)
        found = read_items(self._dynamodb, self._name, [(pk, "status") for pk in pks])
        return [_pipeline(found[pk, "status"]) for pk in pks if (pk, "status") in found], more

    # -- records of steps --------------------------------------------------------------------------------------

    def note_count(self, pipeline: Pipeline, step: str, count: int) -> None:
        """Record the number of elements of a `for_each`; the first number stays."""
        self._note(pipeline, f"step#{step}", "#value = if_not_exists(#value, :value)", "count", count)

    def note_sent(self, pipeline: Pipeline, step: str, now: float) -> None:
        """Record that a step's requests have been sent."""
        self._note(pipeline, f"step#{step}", "#value = :value", "sent_at", int(now))

    def note_error(self, pipeline: Pipeline, step: str, index: int, reason: str) -> None:
        """Record why a run of a step (-1: any) cannot start; the first reason stays."""
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

    # -- changes of a pipeline --------------------------------------------------------------------------------

    def request_pipeline_cancel(self, pipeline: Pipeline, now: float) -> Pipeline | None:
        """Flag a running pipeline as canceled: after this write no step of it starts.

        Returns:
            The updated pipeline, or None if it has completed or is canceled already.
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
        """Complete a running pipeline. Return None if it has completed already.

        Args:
            pipeline: The pipeline.
            status: Its terminal status.
            error: Why it did not succeed.
            counts: The number of steps by status, for the event.
            now: The time.
        """
        values = {":status": status, ":at": timestamp(now), ":counts": dict(counts), ":running": "running"}
        if error:
            values[":error"] = error[:_ERROR_LIMIT_CHARACTERS]
        return self._change(
            pipeline.id,
            # The stream's event filter matches `visible`.
            "SET #status = :status, visible = :status, completed_at = :at, counts = :counts"
            f"{', #error = :error' if error else ''} REMOVE #open, next_check_at, task_token",
            "#status = :running",
            values,
        )

    def next_pipeline_execution(self, pipeline: Pipeline, now: float) -> Pipeline | None:
        """Increment the execution number. Return None if done already, or completed."""
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
        """Set the time of the sweep's next check of a running pipeline."""
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
    """Return the key of an owner's pipelines in the index `by_owner`.

    They are a list of their own: no owner's name contains a `#`.
    """
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
