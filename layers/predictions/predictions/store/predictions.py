"""The table: every prediction's state, and the conditions under which it may change.

One item per prediction or training (`pk` = `prediction#{id}`, `sk` = `status`) is small, because each of its updates is
billed by its size. Of a training it says `object` = `training`. Payloads are items of their own under the same `pk`,
written once each, or objects in the outputs bucket above `PAYLOAD_LIMIT_BYTES`:

    input#{fingerprint}     the model's input, written before the intent, so that an intent always has one
    progress                output and logs of a prediction that runs; replaced by longer ones only, as an item and as
                            an object, always of the same key. Where the caller wants to be told of them: `notify` and
                            digests, for the table's stream
    result#{upstream_id}    output and logs at the end, written before the status turns terminal; the first one stays
    files                   where the outputs are stored, where there are too many for the status item
    caller#{token's hash}   the task token of another state machine that waits for the end

Every write of a status item is conditional; there is no other way to change one than this module. What may happen
twice, late or out of order is refused by the condition, and the caller is told what is there instead.

Besides, `pk` = `tokens` holds the access tokens (see `api.access_tokens`) and `pk` = `recent#{owner}#{fingerprint}`
the latest request of a client that announced that it may send it again; `pk` = `forwarded#{path}` holds an answer of
Replicate that does not change (see `api.proxy`); `pk` = `schema#{version}` holds the schema of a model's
input, or only which model's version it is; `pk` = `limiter` when the next create may start (see
`admission.rate_limiter`), and `pk` = `usage#{owner}` what an owner uses of its limits (see `admission.quotas`). Below
`pk` = `pipeline#{id}` are pipelines (see `pipelines.store`).
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

from botocore.exceptions import ClientError

from predictions.aws.clients import client
from predictions.aws.dynamodb import deserialize, list_page, read_items, serialize, timestamp
from predictions.errors import PredictionsError
from predictions.files.output_references import StoredFile
from predictions.files.outputs_bucket import OutputsBucket
from predictions.status import DEFAULT_WEBHOOK_EVENTS, TERMINAL_RANK, Status, rank_of, visible
from predictions.store.recent_requests import RecentRequests

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

    from predictions.intents.model import Attempt, Intent
    from predictions.upstream.prediction import UpstreamPrediction

PAYLOAD_LIMIT_BYTES = 100 * 1024
"""Above this a payload goes to S3: an item holds 400 KB, and a page of a list has to hold many.
https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/ServiceQuotas.html"""

CALLERS_LIMIT = 1000
"""How many states may wait for the end of one prediction: the stream's reader can tell them all in one run."""

COPY_LEASE_SECONDS = 1020
"""Longer than the longest life of copy_outputs (900 s) and the way there."""

SUBMIT_SECONDS = 25
"""How long the holder of a claim may act on it, besides the time that Replicate is asked to wait for the end."""

# After `submit_until` the holder of a claim has sent all it will ever send.
_AFTER_SUBMIT_SECONDS = 5

# How long before the sweep looks at an item that should have moved on by itself.
_START_CHECK_SECONDS = 60
_COPY_CHECK_SECONDS = 120

# A claim is the second and the writer: another one may be made in the same second.
_THIS_CLAIM = (
    "#claimed = :claimed AND #written_by = :written_by AND attribute_not_exists(#upstream_id) AND #rank < :terminal"
)

_CALLER = "caller#"

# What leaves the sweep's list must hold no orphan, also none that was recorded since the item was read.
_NO_ORPHANS = " AND attribute_not_exists(#orphans)"

_FILES_LIMIT_BYTES = 16 * 1024
_ERROR_LIMIT_CHARACTERS = 4000
_METRICS_LIMIT_BYTES = 4000

# No function lives longer that could have read a prediction while it was open: what such a one may still write after a
# deletion is removed by then. The copier lives longest.
_LATE_WRITER_SECONDS = COPY_LEASE_SECONDS


class AlreadyExists(PredictionsError):
    """An intent's id is taken; `prediction` is what has it."""

    def __init__(self, prediction: "Prediction") -> None:
        super().__init__(f"prediction {prediction.id} exists")
        self.prediction = prediction


class PayloadTooLong(PredictionsError):
    """A payload is longer than its reader can parse."""


class Change(Enum):
    """What a merge did."""

    UNKNOWN = "there is no such prediction"
    ORPHAN = "the prediction is bound to another upstream id, or has ended without one"
    CLOSED = "the prediction had ended already"
    NOTHING = "nothing newer was told"
    PROGRESS = "the prediction moved on"
    ENDED = "the prediction ended upstream"


@dataclass(frozen=True)
class Prediction:
    """A prediction's status item. Times are whole seconds since 1970, except where they are Replicate's text."""

    id: str
    owner: str
    created_at: str
    created: int
    fingerprint: str
    source: str
    keyed: bool
    kind: str
    rank: int
    status: str
    visible: str
    deadline: int
    execution_n: int
    expires_at: int
    name: str | None = None
    version: str | None = None
    deployment: str | None = None
    object: str = "prediction"
    destination: str | None = None
    model: str | None = None
    upstream_version: str | None = None
    webhook: str | None = None
    webhook_events_filter: tuple[str, ...] | None = None
    stream: bool | None = None
    claimed: int | None = None
    written_by: str | None = None
    submit_until: int | None = None
    submit_over: int | None = None
    submit_answered: bool = False
    first_claimed: int | None = None
    unknown_creates: int = 0
    unanswered: bool = False
    read_at: int | None = None
    read_failed: bool = False
    absent_at: int | None = None
    evidence_at: int | None = None
    bound_at: int | None = None
    submissions_json: str | None = None
    readings_json: str | None = None
    submit_at: int | None = None
    reserved: bool = False
    reserved_start: int | None = None
    turn_ms: int | None = None
    counted: bool = False
    resubmitted: bool = False
    cancel_requested: int | None = None
    upstream_id: str | None = None
    started_at: str | None = None
    completed_at: str | None = None
    error: str | None = None
    metrics_json: str | None = None
    stream_url: str | None = None
    refusal_json: str | None = None
    execution_arn: str | None = None
    task_token: str | None = field(default=None, repr=False)
    next_check_at: int | None = None
    ended: int | None = None
    not_found_count: int = 0
    stalled_looks: int = 0
    resume_n: int | None = None
    orphans: frozenset[str] = frozenset()
    orphans_canceled: frozenset[str] = frozenset()
    orphans_not_found: int = 0
    copy_until: int | None = None
    copy_by: int | None = None
    data_removed: bool = False
    deleted: int | None = None
    files_json: str | None = None
    origin: Mapping[str, str | int] = field(default_factory=dict)
    depth: int = 0
    output_prefix: str | None = None
    # No attribute of the item: whether a start found it instead of making it.
    repeated: bool = field(default=False, compare=False)

    @property
    def listed_at(self) -> str:
        """Its place in its owner's list."""
        return f"{self.created_at}#{self.id}"

    @property
    def holder_done_at(self) -> int | None:
        """From this moment on the holder of its claim sends nothing more; None without a claim, or of older code."""
        return self.submit_over or self.submit_until if self.claimed else None

    @property
    def searched_from(self) -> int:
        """The moment of its first claim, since which Replicate may have accepted it."""
        return self.first_claimed or self.claimed or self.created

    @property
    def wanted_events(self) -> tuple[str, ...]:
        """The webhook events that its caller wants; none without a webhook, and by default those of Replicate."""
        return (self.webhook_events_filter or DEFAULT_WEBHOOK_EVENTS) if self.webhook else ()

    @property
    def collection(self) -> Literal["predictions", "trainings"]:
        """Under which path it is, here and at Replicate."""
        return "trainings" if self.object == "training" else "predictions"

    @property
    def terminal(self) -> bool:
        """Whether Replicate's part is over; callers may still see `processing` while files are copied."""
        return self.rank >= TERMINAL_RANK

    @property
    def ended_visibly(self) -> bool:
        """Whether callers see that it has ended."""
        return self.terminal and not self.awaits_copy

    def expired(self, now: float) -> bool:
        """Whether it is over and past its retention: TTL removes it late, and until then its key is free already."""
        return self.ended_visibly and self.expires_at <= now

    @property
    def awaits_copy(self) -> bool:
        """Whether only the copying of its files stands between this prediction and its visible end."""
        return self.terminal and self.visible == Status.PROCESSING


@dataclass(frozen=True, slots=True)
class Waits:
    """What a prediction that nobody has claimed waits for at the limiter (see `admission.rate_limiter`).

    Attributes:
        reserved_start: The number of the start that is reserved for it.
        turn_ms: By how much it made its owner's line longer, where it has a turn instead.
    """

    reserved_start: int | None = None
    turn_ms: int | None = None

    def attributes(self, *, without_none: bool = False) -> dict[str, Any]:
        """As attributes of the item."""
        found = {
            "reserved": True if self.reserved_start is not None else None,
            "reserved_start": self.reserved_start,
            "turn_ms": self.turn_ms,
        }
        return {name: value for name, value in found.items() if value is not None or not without_none}


NOTHING_RESERVED = Waits()


@dataclass(frozen=True)
class Merge:
    """The outcome of a merge: what happened, and the item as it is now (None where there is none)."""

    change: Change
    prediction: Prediction | None


@dataclass(frozen=True)
class Whole:
    """A prediction with its payloads, as callers are shown it.

    Attributes:
        input_key: The object that holds the input, where it is too large for the table.
        result_key: The object that holds `{"output", "logs"}`, where they are.
    """

    prediction: Prediction
    input: Any
    output: Any
    logs: str | None
    files: Sequence[StoredFile]
    input_key: str | None = None
    result_key: str | None = None


@dataclass(frozen=True)
class KeptSchema:
    """What is known of a version.

    Attributes:
        model: Whose it is, `owner/name`.
        text: The schema of its input as it was kept; None where only the model is known.
    """

    model: str | None
    text: str | None


@dataclass(frozen=True)
class Result:
    """How a prediction ended, without what it was asked.

    Attributes:
        output_json: The output as JSON text; None where there is none, it has files, or it is too large for the table.
        files: Where its files are.
    """

    prediction: Prediction
    output_json: str | None
    files: Sequence[StoredFile]


@dataclass(frozen=True)
class UnreadResult:
    """The output and logs of a prediction, not read yet: the text may be an object in S3.

    Attributes:
        length: How many bytes the text has; 0 where there is none.
        files: Where its files are.
        item: The table's item of the text; None where there is none.
    """

    prediction: Prediction
    length: int
    files: Sequence[StoredFile]
    item: Mapping[str, Any] | None = field(repr=False)


@dataclass(frozen=True)
class Page:
    """A page of an owner's predictions.

    Attributes:
        predictions: From the start of the page on, away from it; read one by one, so that a reader may stop early.
        more: Whether there are further ones beyond the last.
    """

    predictions: Iterator[Whole]
    more: bool


class PredictionsTable:
    """The DynamoDB table and the rules by which its items change.

    Args:
        name: The table's name.
        outputs: The bucket that takes large payloads, and knows which strings in an output are files.
        dynamodb: The client to use.
    """

    def __init__(self, name: str, outputs: OutputsBucket, dynamodb: "DynamoDBClient") -> None:
        self._name = name
        self._outputs = outputs
        self._dynamodb = dynamodb

    @classmethod
    def from_env(cls) -> "PredictionsTable":
        """From `TABLE_NAME` and what `OutputsBucket.from_env` reads."""
        return cls(os.environ["TABLE_NAME"], OutputsBucket.from_env(), client("dynamodb"))

    # -- intent and claim -------------------------------------------------------------------------------------

    def put_intent(
        self, intent: "Intent", *, version: str | None, deadline: int, expires: int, claim: bool, execution_arn: str,
        now: float, submit_at: int | None = None, waits: "Waits | None" = None, wait_seconds: int = 0,
    ) -> Prediction:  # fmt: skip
        """Writes down that a prediction is wanted and, in the same write, that the writer is about to submit it.

        Twice: the second is told of the first. Crash right after: the sweep finds the item a minute later.

        Args:
            intent: What is wanted.
            version: The version that will run, where it is known.
            deadline: When the prediction has to have ended, as sent to Replicate.
            expires: When the table may forget it.
            claim: Whether the caller of this method submits it now.
            execution_arn: The execution that will track it, `{id}-1`.
            now: The time.
            submit_at: When it may be submitted, where the caller of this method does not do it.
            waits: What it waits for until then (see `admission.rate_limiter`).
            wait_seconds: How long Replicate may hold its answer to the create.

        Raises:
            AlreadyExists: The id is taken by one that has not expired.
        """
        created_at = timestamp(now)
        self._put_payload(intent.id, f"input#{intent.fingerprint}", intent.input_json, expires)
        item: dict[str, Any] = {
            **_key(intent.id),
            "id": intent.id,
            "owner": _list_key(intent.owner, intent.object),
            "object": intent.object if intent.object != "prediction" else None,
            "destination": intent.destination,
            "listed_at": f"{created_at}#{intent.id}",
            "created_at": created_at,
            "created": int(now),
            "fingerprint": intent.fingerprint,
            "source": intent.source,
            "keyed": intent.keyed,
            "kind": intent.reference.kind,
            "name": intent.reference.name,
            "version": version,
            "deployment": intent.reference.name if intent.reference.kind == "deployment" else None,
            "webhook": intent.webhook,
            "webhook_events_filter": list(intent.webhook_events_filter) if intent.webhook_events_filter else None,
            "stream": intent.stream,
            "origin": dict(intent.origin) or None,
            "depth": intent.depth or None,
            "output_prefix": intent.output_prefix,
            "rank": 0,
            "status": Status.QUEUED.value,
            "visible": Status.STARTING.value,
            "deadline": deadline,
            **(
                _lease(now, wait_seconds)
                if claim
                else {"next_check_at": (submit_at or int(now)) + _START_CHECK_SECONDS}
            ),
            "submit_at": submit_at,
            **(waits or NOTHING_RESERVED).attributes(),
            "written_by": secrets.token_hex(8),
            "execution_n": 1,
            "execution_arn": execution_arn,
            "open": "open",
            "expires_at": expires,
        }
        item = {name: value for name, value in item.items() if value is not None}
        try:
            self._dynamodb.put_item(
                TableName=self._name,
                Item=serialize(item),
                # One that has expired may be there for days until TTL removes it: its key is used anew.
                ConditionExpression="attribute_not_exists(pk) OR (expires_at <= :now AND #rank = :terminal"
                " AND #visible <> :processing)",
                ExpressionAttributeNames={"#rank": "rank", "#visible": "visible"},
                ExpressionAttributeValues=serialize(
                    {":now": int(now), ":terminal": TERMINAL_RANK, ":processing": Status.PROCESSING.value}
                ),
                ReturnValuesOnConditionCheckFailure="ALL_OLD",
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException as error:
            there = _prediction(_left_behind(error))
            # botocore repeats a write whose answer it did not see: then what is there is this very one.
            if there.written_by != item["written_by"]:
                if there.deleted:
                    # Its owner had the data removed: what this write brought back must not stay. Whoever may write
                    # intents may not delete items; the last look of the sweep removes what is empty then.
                    self._put_payload(intent.id, f"input#{intent.fingerprint}", "{}", there.expires_at)
                    self._empty_payload(intent.id, intent.input_json)
                raise AlreadyExists(there) from None
        return _prediction_of(item)

    def note_request(self, prediction_id: str, owner: str, fingerprint: str, attempt: "Attempt") -> str:
        """Notes which prediction a request starts that comes without a key; see `store.recent_requests`.

        Args:
            prediction_id: The id that a new prediction would have.
            owner: Whose request it is.
            fingerprint: The request's.
            attempt: Which of its attempts this is.

        Returns:
            The id of the prediction to start: `prediction_id`, or the noted one.
        """
        return RecentRequests(self._name, self._dynamodb).note(prediction_id, owner, fingerprint, attempt)

    def recent(self, owner: str, fingerprint: str, attempt: "Attempt") -> Prediction | None:
        """The same owner's same request of the two minutes before, noted by `note_request`."""
        noted = self.recent_id(owner, fingerprint, attempt)
        return self.get(noted) if noted else None

    def recent_id(self, owner: str, fingerprint: str, attempt: "Attempt") -> str | None:
        """Return the id that `note_request` recorded for the same request in the two minutes before, or None."""
        return RecentRequests(self._name, self._dynamodb).find(owner, fingerprint, attempt)

    def claim(self, prediction_id: str, version: str | None, now: float, *, counted: bool = False) -> Prediction | None:
        """Takes the right to submit `version`; None where somebody has it, it was canceled, or it has ended.

        Args:
            prediction_id: Our id.
            version: The version that will run, where it is known.
            now: The time.
            counted: Whether it has its place in its owner's limits (see `admission.quotas`).
        """
        written_by = secrets.token_hex(8)
        claimed = self._change(
            prediction_id,
            set={
                **_lease(now, 0),
                "written_by": written_by,
                **({"version": version} if version else {}),
                **({"counted": True} if counted else {}),
            },
            condition="attribute_not_exists(#claimed) AND attribute_not_exists(#cancel_requested) "
            "AND attribute_not_exists(#upstream_id) AND #rank < :terminal",
        )
        if claimed is None:
            # botocore repeats a write whose answer it did not see: then the claim that is in the way is this very one.
            there = self.get(prediction_id)
            claimed = there if there and there.claimed and there.written_by == written_by else None
        return claimed

    def put_off(
        self, prediction: Prediction, submit_at: int, *, counted: bool, waits: "Waits | None" = None
    ) -> Prediction | None:
        """Notes when a prediction that nobody has claimed may be submitted; None where it moved on meanwhile.

        Args:
            prediction: The prediction.
            submit_at: When; nobody submits it before.
            counted: Whether it has its place in its owner's limits.
            waits: What it waits for until then.
        """
        return self._change(
            prediction.id,
            set={
                "submit_at": submit_at,
                "next_check_at": submit_at + _START_CHECK_SECONDS,
                **(waits or NOTHING_RESERVED).attributes(without_none=True),
                **({"counted": True} if counted else {}),
            },
            remove=list(NOTHING_RESERVED.attributes()),
            condition="attribute_not_exists(#claimed) AND attribute_not_exists(#upstream_id) AND #rank < :terminal",
        )

    def note_counted(self, prediction: Prediction) -> None:
        """Record that a prediction that waits has its place in its owner's limits, so that it takes no second one."""
        self._change(
            prediction.id,
            set={"counted": True},
            condition="attribute_not_exists(#claimed) AND attribute_not_exists(#upstream_id) AND #rank < :terminal",
        )

    def release(
        self, prediction: Prediction, now: float, wait_seconds: int, *, waits: "Waits | None" = None
    ) -> Prediction | None:
        """Gives the claim back: it is certain that nothing was started. None where the item moved on meanwhile.

        Nobody submits it before `wait_seconds` have passed; `waits` says what it waits for.
        """
        return self._change(
            prediction.id,
            set={
                "submit_at": int(now) + wait_seconds,
                "next_check_at": int(now) + wait_seconds + _START_CHECK_SECONDS,
                **(waits or NOTHING_RESERVED).attributes(without_none=True),
            },
            remove=["claimed", "submit_until", *NOTHING_RESERVED.attributes()],
            # Not only the second of the claim: another one may be made in it, once this very write was made but its
            # answer lost, and botocore writes again.
            condition="#claimed = :claimed AND #written_by = :written_by AND attribute_not_exists(#upstream_id) "
            "AND #rank < :terminal",
            values={":claimed": prediction.claimed, ":written_by": prediction.written_by},
        )

    # -- unknown outcomes: see `lifecycle.reconcile` ------------------------------------------------

    def note_unknown(self, prediction: Prediction, values: Mapping[str, Any]) -> Prediction | None:
        """Record something about a claim whose outcome is unknown; None if it is no longer this claim, or bound."""
        return self._change(prediction.id, set=values, condition=_THIS_CLAIM, values=_this_claim(prediction))

    def release_absent(
        self, prediction: Prediction, now: float, wait_seconds: int, unknown_creates: int
    ) -> Prediction | None:
        """Release a claim for which there is evidence that Replicate accepted nothing.

        Twice: the second finds another claim, or none. If the function crashes right after, the sweep starts an
        execution, which submits it.

        Returns:
            The prediction, or None if it is no longer this claim, is bound, or was canceled meanwhile.
        """
        return self._change(
            prediction.id,
            set={
                "submit_at": int(now) + wait_seconds,
                "next_check_at": int(now) + wait_seconds + _START_CHECK_SECONDS,
                "first_claimed": prediction.searched_from,
                "unknown_creates": unknown_creates,
            },
            remove=["claimed", "submit_until", "submit_over", "submit_answered", "read_at", "read_failed", "absent_at",
                    "evidence_at", *NOTHING_RESERVED.attributes()],
            condition=f"{_THIS_CLAIM} AND attribute_not_exists(#cancel_requested)",
            values=_this_claim(prediction),
        )  # fmt: skip

    # -- what Replicate says ----------------------------------------------------------------------------------

    def merge(
        self, prediction_id: str, told: "UpstreamPrediction", now: float, *, next_check_at: int | None = None
    ) -> Merge:
        """Merges what Replicate tells of a prediction: the same rule for webhook, poll, create answer and list.

        Writes only if the item is unbound or bound to that upstream id, and the rank is higher; a terminal item never
        changes. The first write of an upstream id binds it; a second upstream id is an orphan, recorded for the
        sweep to cancel.

        Args:
            prediction_id: Our id.
            told: What Replicate says.
            now: The time.
            next_check_at: When the sweep should look, where the caller knows better than the item.
        """
        rank = rank_of(told.status)
        prediction = self.get(prediction_id)
        kept_result = kept_progress = False
        while True:
            if prediction is None:
                return Merge(Change.UNKNOWN, None)
            if prediction.upstream_id != told.id and (prediction.upstream_id or prediction.terminal):
                return self._add_orphan(prediction, told, now)
            if prediction.terminal:
                return Merge(Change.CLOSED, prediction)
            if rank >= TERMINAL_RANK and not kept_result:
                told = self._put_result(prediction, told)
                kept_result = True
            elif 0 < rank < TERMINAL_RANK and rank >= prediction.rank and not kept_progress:
                self._put_progress(prediction, told)
                kept_progress = True
            if rank <= prediction.rank and prediction.upstream_id:
                return Merge(Change.NOTHING, prediction)
            values: dict[str, Any] = {":rank": max(rank, prediction.rank), ":upstream_id": told.id}
            closed = self._closed_by(prediction, told, rank)
            # What Replicate told was read to the end: no function died over it.
            read = ["stalled_looks", "resume_n"] if prediction.stalled_looks else []
            changed = self._change(
                prediction_id,
                set=self._told(prediction, told, rank, now, next_check_at),
                remove=closed + read,
                condition="(#rank < :rank OR attribute_not_exists(#upstream_id)) AND #rank < :terminal "
                "AND (attribute_not_exists(#upstream_id) OR #upstream_id = :upstream_id)"
                + (_NO_ORPHANS if closed else ""),
                values=values,
            )
            if changed is not None:
                return Merge(Change.ENDED if changed.terminal else Change.PROGRESS, changed)
            # Somebody else wrote in between: look again. Each turn raises the rank or records an orphan, so this ends.
            prediction = self.get(prediction_id)

    def _told(
        self, prediction: Prediction, told: "UpstreamPrediction", rank: int, now: float, next_check_at: int | None
    ) -> dict[str, Any]:
        # A word that ranks lowest binds, but is never taken over: it may be one that nobody knows.
        status = told.status if rank > prediction.rank else prediction.status
        rank = max(rank, prediction.rank)
        values: dict[str, Any] = {
            "upstream_id": told.id,
            "rank": rank,
            "status": status,
            "visible": visible(status),
            "model": told.model,
            "upstream_version": told.version,
            "deployment": told.deployment,
            "started_at": told.started_at,
            "stream_url": _short(told.urls.get("stream")),
            "next_check_at": next_check_at,
        }
        if prediction.unknown_creates and not prediction.upstream_id:
            values["bound_at"] = int(now)
        if prediction.cancel_requested and not prediction.upstream_id and next_check_at is None:
            # Whoever binds an item that is to be canceled may lack the token for it: the sweep has it.
            values["next_check_at"] = int(now)
        if rank >= TERMINAL_RANK:
            metrics_json = json.dumps(told.metrics) if told.metrics else None
            values |= {
                "completed_at": told.completed_at or timestamp(now),
                "error": told.error[:_ERROR_LIMIT_CHARACTERS] if told.error else None,
                "metrics_json": metrics_json if metrics_json and len(metrics_json) <= _METRICS_LIMIT_BYTES else None,
                "data_removed": told.data_removed or None,
                "ended": int(now),
            }
            if self._outputs.holds_files(told.output):
                # The running execution copies first; the lease is granted here to save it a write.
                values |= {
                    "visible": Status.PROCESSING.value,
                    "copy_by": prediction.execution_n,
                    "copy_until": int(now) + COPY_LEASE_SECONDS,
                    "next_check_at": int(now) + _COPY_CHECK_SECONDS,
                }
            elif not prediction.orphans:
                values["next_check_at"] = None
        return {name: value for name, value in values.items() if value is not None}

    def _closed_by(self, prediction: Prediction, told: "UpstreamPrediction", rank: int) -> list[str]:
        if rank < TERMINAL_RANK or prediction.orphans or self._outputs.holds_files(told.output):
            return []
        return ["open", "next_check_at"]

    def _add_orphan(self, prediction: Prediction, told: "UpstreamPrediction", now: float) -> Merge:
        # One that has ended is recorded too: it was paid for.
        if told.id in prediction.orphans | prediction.orphans_canceled:
            return Merge(Change.ORPHAN, prediction)
        changed = self._change(
            prediction.id,
            set={"open": "open", "next_check_at": int(now)},
            add={"orphans": {told.id}},
            condition="attribute_exists(pk) AND (NOT contains(#orphans, :told))",
            values={":told": told.id},
        )
        return Merge(Change.ORPHAN, changed or prediction)

    def end(
        self,
        prediction: Prediction,
        status: Status,
        error: str | None,
        now: float,
        *,
        refusal: Mapping[str, Any] | None = None,
    ) -> Prediction | None:
        """Ends a prediction by our own word, on condition that it is still as `prediction` says.

        Only for what Replicate cannot end any more: an intent that was never accepted, or a bound one that Replicate
        denies to know or leaves open an hour past its deadline (the callers' rules).

        Returns:
            The ended prediction, or None where it moved on meanwhile.
        """
        values: dict[str, Any] = {
            "rank": TERMINAL_RANK,
            "status": status.value,
            "visible": visible(status),
            "completed_at": timestamp(now),
            "ended": int(now),
        }
        if error:
            values["error"] = error[:_ERROR_LIMIT_CHARACTERS]
        if refusal:
            # UTF-8, not ASCII: escaped, a character takes up to 12 bytes.
            values["refusal_json"] = json.dumps(refusal, separators=(",", ":"), ensure_ascii=False)
        conditions = ["#rank < :terminal"]
        closed = [] if prediction.orphans else ["open", "next_check_at"]
        expected: dict[str, Any] = {}
        for name, value in (("upstream_id", prediction.upstream_id), ("claimed", prediction.claimed)):
            if value is None:
                conditions.append(f"attribute_not_exists(#{name})")
            else:
                conditions.append(f"#{name} = :{name}")
                expected[f":{name}"] = value
        ended = self._change(
            prediction.id,
            set=values,
            remove=closed,
            condition=" AND ".join(conditions) + (_NO_ORPHANS if closed else ""),
            values=expected,
        )
        if ended is None and closed and (there := self.get(prediction.id)) and there.orphans:
            # Only an orphan came in between: it stays on the sweep's list, and the end is the same.
            return self.end(replace(prediction, orphans=there.orphans), status, error, now, refusal=refusal)
        return ended

    # -- cancel, checks, executions -----------------------------------------------------------------------------

    def request_cancel(self, prediction_id: str, now: float) -> Prediction | None:
        """Flags an open prediction as canceled by its owner; None where it has ended. Twice changes nothing."""
        return self._change(
            prediction_id,
            set={"cancel_requested": int(now), "next_check_at": int(now) + _START_CHECK_SECONDS},
            condition="attribute_exists(pk) AND #rank < :terminal AND attribute_not_exists(#cancel_requested)",
        )

    def check_again_at(self, prediction: Prediction, moment: float) -> None:
        """Sets when the sweep should look at an open prediction next, unless it moved on meanwhile."""
        self._change(
            prediction.id,
            set={"next_check_at": int(moment)},
            condition="attribute_exists(#open) AND #rank = :rank",
            values={":rank": prediction.rank},
        )

    def begin_look(self, prediction: Prediction, moment: float) -> Prediction | None:
        """Postpone the next check of an open prediction before the sweep asks anything about it.

        The same write counts the look in `stalled_looks`. A look that completes resets the count (`end_look`), so the
        attribute holds how many looks in a row died or found the execution dead.

        Returns:
            The prediction, or None if it changed since it was read, or another sweep has begun this look.
        """
        return self._change(
            prediction.id,
            set={"next_check_at": int(moment), "stalled_looks": prediction.stalled_looks + 1},
            condition="attribute_exists(#open) AND #next_check_at = :due",
            values={":due": prediction.next_check_at},
        )

    def end_look(self, prediction: Prediction, moment: float, *, stalled: bool, put_off: bool = False) -> None:
        """Schedule the next check of an open prediction at the end of a look, unless it changed meanwhile.

        Args:
            prediction: The prediction as the look left it.
            moment: When the sweep should look next.
            stalled: Whether the look found the execution dead; only a healthy one resets `stalled_looks`.
            put_off: Whether the dead execution is replaced by the next look instead of this one.
        """
        self._change(
            prediction.id,
            set={"next_check_at": int(moment), **({"resume_n": prediction.execution_n} if put_off else {})},
            remove=[] if stalled else ["stalled_looks", "resume_n"],
            condition="attribute_exists(#open) AND #rank = :rank",
            values={":rank": prediction.rank},
        )

    def forget_stalled_looks(self, prediction: Prediction) -> None:
        """Reset the count of stalled looks: a function has dealt with this prediction and did not die."""
        self._change(prediction.id, remove=["stalled_looks", "resume_n"], condition="attribute_exists(#open)")

    def count_not_found(self, prediction: Prediction, count: int) -> None:
        """Notes how often in a row Replicate has denied to know an open prediction."""
        self._change(prediction.id, set={"not_found_count": count}, condition="attribute_exists(#open)")

    def count_orphans_not_found(self, prediction: Prediction) -> None:
        """Count one more 404 to the cancel of an orphan; the item stays due as it is."""
        count = prediction.orphans_not_found + 1
        self._change(prediction.id, set={"orphans_not_found": count}, condition="attribute_exists(#open)")

    def reserve(self, upstream_id: str, prediction: Prediction) -> bool:
        """Takes an upstream id for a prediction that is about to be bound to it by its likeness alone.

        The index of bound ids lags behind, so two predictions that look the same could both find the other's.
        """
        item = {"pk": f"upstream#{upstream_id}", "sk": "upstream", "id": prediction.id,
                "expires_at": prediction.expires_at}  # fmt: skip
        try:
            self._dynamodb.put_item(
                TableName=self._name,
                Item=serialize(item),
                ConditionExpression="attribute_not_exists(pk) OR id = :id",
                ExpressionAttributeValues=serialize({":id": prediction.id}),
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            return False
        return True

    def next_execution(self, prediction: Prediction, execution_arn: str, now: float) -> Prediction | None:
        """Counts up the execution that tracks a prediction; None where another did so first."""
        return self._change(
            prediction.id,
            set={
                "execution_n": prediction.execution_n + 1,
                "execution_arn": execution_arn,
                "next_check_at": int(now) + _START_CHECK_SECONDS,
            },
            condition="#execution_n = :n AND attribute_exists(#open)",
            values={":n": prediction.execution_n},
        )

    def orphan_canceled(self, prediction: Prediction, upstream_id: str) -> None:
        """Forgets an orphan that is canceled; its id stays known as an orphan's in `orphans_canceled`."""
        self._change(
            prediction.id,
            add={"orphans_canceled": {upstream_id}},
            delete={"orphans": {upstream_id}},
            remove=["orphans_not_found"],
            condition="attribute_exists(pk)",
        )

    def close(self, prediction: Prediction) -> None:
        """Takes a prediction that has ended, visibly and without open orphans, off the sweep's list."""
        self._change(
            prediction.id,
            remove=["open", "next_check_at"],
            condition="#rank = :terminal AND #visible <> :processing AND attribute_not_exists(#orphans) AND "
            + ("#deleted = :deleted" if prediction.deleted else "attribute_not_exists(#deleted)"),
            values={
                ":processing": Status.PROCESSING.value,
                **({":deleted": prediction.deleted} if prediction.deleted else {}),
            },
        )

    # -- deleting -------------------------------------------------------------------------------------------------

    def request_delete(self, prediction_id: str, now: float) -> Prediction | None:
        """Flags a prediction that has visibly ended as deleted: from this write on nobody is shown its data.

        Returns:
            The prediction as it is then; None where it has not ended, was flagged before, or is not there.
        """
        return self._change(
            prediction_id,
            set={
                "deleted": int(now),
                "data_removed": True,
                "open": "open",
                "next_check_at": int(now) + _START_CHECK_SECONDS,
            },
            # They lead to data: places in the bucket, and Replicate's stream.
            remove=["files_json", "stream_url"],
            condition="#rank = :terminal AND #visible <> :processing AND attribute_not_exists(#deleted)",
            values={":processing": Status.PROCESSING.value},
        )

    def delete_data(self, prediction: Prediction, now: float) -> None:
        """Removes input, output, logs and files of a prediction that is flagged as deleted; the status item stays.

        So do the items of callers that wait for the end: they hold task tokens and no data, and the table's stream
        may not have been read up to the end yet. They expire with the prediction.

        Twice does no harm. A function that read the item while it was open may write a payload or a file afterwards:
        so it stays on the sweep's list until none of those can be alive, and is gone through once more.

        Raises:
            ClientError: Not all of it could be removed; it is still on the sweep's list.
        """
        self._outputs.delete_all(prediction.id, prediction.owner, prediction.output_prefix)
        pk = _key(prediction.id)["pk"]
        for page in self._dynamodb.get_paginator("query").paginate(
            TableName=self._name,
            KeyConditionExpression="pk = :pk",
            ExpressionAttributeValues=serialize({":pk": pk}),
            ProjectionExpression="sk",
            ConsistentRead=True,
        ):
            for item in map(deserialize, page["Items"]):
                if item["sk"] != "status" and not item["sk"].startswith(_CALLER):
                    self._dynamodb.delete_item(TableName=self._name, Key=serialize({"pk": pk, "sk": item["sk"]}))
        last_look = (prediction.deleted or 0) + _LATE_WRITER_SECONDS
        if now < last_look:
            self.check_again_at(prediction, last_look)
        elif not prediction.orphans:
            self.close(prediction)

    # -- outputs ----------------------------------------------------------------------------------------------

    def lease_copy(self, prediction: Prediction, execution_n: int, needed_seconds: int, now: float) -> bool:
        """Takes, or already has, the right to copy this prediction's files for `needed_seconds`."""
        until = prediction.copy_until or 0
        if prediction.copy_by == execution_n and until >= now + needed_seconds:
            return True
        changed = self._change(
            prediction.id,
            set={
                "copy_by": execution_n,
                "copy_until": int(now) + COPY_LEASE_SECONDS,
                "next_check_at": int(now) + COPY_LEASE_SECONDS,
            },
            condition="#visible = :processing AND #rank = :terminal AND "
            "(attribute_not_exists(#copy_until) OR #copy_until < :now OR #copy_by = :me)",
            values={":processing": Status.PROCESSING.value, ":now": int(now), ":me": execution_n},
        )
        return changed is not None

    def end_copy(self, prediction: Prediction, files: Sequence[StoredFile], now: float) -> Prediction | None:
        """Makes a prediction's end visible, with its files' places; None where that was done already."""
        values: dict[str, Any] = {
            "visible": visible(prediction.status),
            "ended": int(now),
            "files_json": self._kept_files(prediction, files),
        }
        closed = [] if prediction.orphans else ["open", "next_check_at"]
        ended = self._change(
            prediction.id,
            set=values,
            remove=["copy_until", "copy_by", *closed],
            condition="#visible = :processing AND #rank = :terminal" + (_NO_ORPHANS if closed else ""),
            values={":processing": Status.PROCESSING.value},
        )
        if ended is None and closed and (there := self.get(prediction.id)) and there.orphans:
            # Only an orphan came in between: it stays on the sweep's list, and the end is the same.
            return self.end_copy(there, files, now)
        return ended

    def replace_files(self, prediction: Prediction, files: Sequence[StoredFile]) -> bool:
        """Writes where the files of a prediction are whose end is visible, and stays; False where it is deleted."""
        changed = self._change(
            prediction.id,
            set={"files_json": self._kept_files(prediction, files)},
            condition="#rank = :terminal AND #visible = :visible AND attribute_not_exists(#deleted)",
            values={":visible": prediction.visible},
        )
        return changed is not None

    def _kept_files(self, prediction: Prediction, files: Sequence[StoredFile]) -> str:
        files_json = json.dumps([stored.to_item() for stored in files], separators=(",", ":"))
        if len(files_json) <= _FILES_LIMIT_BYTES:
            return files_json
        self._put_payload(prediction.id, "files", files_json, prediction.expires_at)
        return ""  # there are some, in an item of their own

    # -- reading ----------------------------------------------------------------------------------------------

    def get(self, prediction_id: str) -> Prediction | None:
        """One status item, read consistently."""
        found = self._dynamodb.get_item(
            TableName=self._name, Key=serialize(_key(prediction_id)), ConsistentRead=True
        ).get("Item")
        return _prediction(found) if found else None

    def read(self, prediction_id: str) -> Whole | None:
        """One prediction with its payloads, read consistently."""
        items: list[dict[str, Any]] = []
        for page in self._dynamodb.get_paginator("query").paginate(
            TableName=self._name,
            KeyConditionExpression="pk = :pk",
            ExpressionAttributeValues=serialize({":pk": _key(prediction_id)["pk"]}),
            ConsistentRead=True,
        ):
            items += [deserialize(item) for item in page["Items"]]
        return self._whole({item["sk"]: item for item in items})

    def read_many(self, prediction_ids: Sequence[str]) -> Iterator[Whole]:
        """Those of these predictions that there are, with their payloads, in this order."""
        return self._wholes([_key(prediction_id)["pk"] for prediction_id in prediction_ids])

    def get_many(self, prediction_ids: Iterable[str]) -> dict[str, Prediction]:
        """Those of these predictions that there are, by id, read consistently."""
        keys = [(_key(prediction_id)["pk"], "status") for prediction_id in prediction_ids]
        found = map(_prediction_of, read_items(self._dynamodb, self._name, keys).values())
        return {prediction.id: prediction for prediction in found}

    def input_json(self, prediction: Prediction) -> str | None:
        """A prediction's input as it was asked for, as JSON text; None where it is gone."""
        return self._payload(prediction.id, f"input#{prediction.fingerprint}")

    def result_output(self, prediction: Prediction, longest: int | None = None) -> Any:
        """The output a terminal prediction ended with, as Replicate gave it.

        Args:
            prediction: The prediction.
            longest: The most characters of output and logs together that may be read; None: all that there are.

        Raises:
            PayloadTooLong: There are more. Nothing was read but their noted length.
        """
        text = self._payload(prediction.id, f"result#{prediction.upstream_id}", longest)
        return json.loads(text)["output"] if text else None

    def unread_results(self, prediction_ids: Sequence[str]) -> "list[UnreadResult]":
        """The results of those of these predictions that there are, in this order; `result_text` reads one of them."""
        statuses = read_items(self._dynamodb, self._name, [(_key(id_)["pk"], "status") for id_ in prediction_ids])
        predictions = {p.id: p for p in map(_prediction_of, statuses.values())}
        wanted = [
            (_key(p.id)["pk"], sk)
            for p in predictions.values()
            if p.ended_visibly and not p.deleted
            for sk in (f"result#{p.upstream_id}", *([] if p.files_json else ["files"]))
        ]
        items = read_items(self._dynamodb, self._name, wanted)
        results = []
        for prediction in (predictions[id_] for id_ in prediction_ids if id_ in predictions):
            pk = _key(prediction.id)["pk"]
            item, files = items.get((pk, f"result#{prediction.upstream_id}")), items.get((pk, "files"))
            files_json = None if prediction.deleted else prediction.files_json
            if files:
                files_json = self._payload_text(files)
            length = int(item.get("length") or len(item.get("json", ""))) if item else 0
            stored = [StoredFile.from_item(each) for each in json.loads(files_json or "[]")]
            results.append(UnreadResult(prediction, length, stored, item))
        return results

    def result_text(self, result: UnreadResult) -> str | None:
        """The JSON text `{"output", "logs"}` of a result; None where there is none, or it has expired."""
        return self._payload_text(result.item) if result.item else None

    def stored_files(self, prediction: Prediction) -> Sequence[StoredFile]:
        """Where the files of a prediction are; none before its visible end, and after its deletion."""
        files_json = prediction.files_json
        if files_json == "":
            files_json = self._payload(prediction.id, "files")
        return [StoredFile.from_item(item) for item in json.loads(files_json or "[]")]

    def list(
        self, owner: str, start: str | None, *, older: bool, size: int, object: str = "prediction",  # noqa: A002  # the API's word
        created_after: datetime | None = None, created_before: datetime | None = None,
    ) -> Page:  # fmt: skip
        """A page of an owner's predictions, or trainings.

        Filters are bounds of the index's range key: what they leave out is not read.

        Args:
            owner: Whose.
            start: The place (`Prediction.listed_at`) beside which the page starts, or None for the newest.
            older: Whether the page lies on the older side of `start`.
            size: The most predictions of a page.
            object: `prediction` or `training`: their lists are apart.
            created_after: Only those created then or later.
            created_before: Only those created earlier.
        """
        key = _list_key(owner, object)
        between = (
            timestamp(created_after) if created_after else None,
            timestamp(created_before) if created_before else None,
        )
        pks, more = list_page(self._dynamodb, self._name, key, start, older=older, size=size, between=between)
        return Page(self._wholes(pks), more=more)

    def results(self, prediction_ids: Sequence[str], owner: str) -> dict[str, Result]:
        """How an owner's predictions stand, by their ids; those that are not there are left out.

        Inputs and payloads that are objects are not read: so many may be asked for at once.
        """
        found = read_items(self._dynamodb, self._name, [(_key(id_)["pk"], "status") for id_ in prediction_ids])
        predictions = [p for p in map(_prediction_of, found.values()) if p.owner == owner]
        wanted = [
            (_key(p.id)["pk"], sk)
            for p in predictions
            if p.ended_visibly and p.status == Status.SUCCEEDED and not p.deleted
            for sk in ([] if p.files_json else [f"result#{p.upstream_id}", "files"])
        ]
        payloads = {key: item.get("json") for key, item in read_items(self._dynamodb, self._name, wanted).items()}
        results = {}
        for prediction in predictions:
            pk = _key(prediction.id)["pk"]
            files = json.loads(prediction.files_json or payloads.get((pk, "files")) or "[]")
            # An output with files names upstream's URLs.
            has_files = files or (pk, "files") in payloads
            text = None if has_files else payloads.get((pk, f"result#{prediction.upstream_id}"))
            output_json = json.dumps(json.loads(text)["output"], separators=(",", ":")) if text else None
            results[prediction.id] = Result(prediction, output_json, [StoredFile.from_item(file) for file in files])
        return results

    def due(self, now: float, limit: int) -> Iterator[str]:
        """Keys (`pk`) of open items whose `next_check_at` has passed, the longest overdue first."""
        found = self._dynamodb.query(
            TableName=self._name,
            IndexName="due",
            KeyConditionExpression="#open = :open AND next_check_at <= :now",
            ExpressionAttributeNames={"#open": "open"},
            ExpressionAttributeValues=serialize({":open": "open", ":now": int(now)}),
            Limit=limit,
        )
        for item in found["Items"]:
            yield str(deserialize(item)["pk"])

    def count_open(self) -> int:
        """How much is open: predictions, trainings, pipelines, batches. Of more than a page of the index, that page."""
        return self._dynamodb.query(
            TableName=self._name,
            IndexName="due",
            KeyConditionExpression="#open = :open",
            ExpressionAttributeNames={"#open": "open"},
            ExpressionAttributeValues=serialize({":open": "open"}),
            Select="COUNT",
        )["Count"]

    def bound_to(self, upstream_id: str) -> str | None:
        """The id of the prediction that an upstream id is bound to, as far as the index knows."""
        found = self._dynamodb.query(
            TableName=self._name,
            IndexName="by_upstream_id",
            KeyConditionExpression="upstream_id = :upstream_id",
            ExpressionAttributeValues=serialize({":upstream_id": upstream_id}),
            Limit=1,
        )["Items"]
        return str(deserialize(found[0])["pk"]).removeprefix("prediction#") if found else None

    # -- batches ----------------------------------------------------------------------------------------------

    def line_wanted(self, prediction: Prediction) -> bool:
        """Whether the batch that a prediction is a line of, if it is one, still wants it; see `batches.store`."""
        if "batch" not in prediction.origin:
            return True
        key = {"pk": f"batch#{prediction.origin['batch']}", "sk": "status"}
        found = self._dynamodb.get_item(TableName=self._name, Key=serialize(key), ConsistentRead=True).get("Item")
        batch = deserialize(found) if found else {}
        return "open" in batch and "stop" not in batch and batch["attempt"] == prediction.origin["attempt"]

    # -- state machines of others that wait for an end ---------------------------------------------------------------

    def add_caller(self, prediction_id: str, task_token: str, expires: int) -> None:
        """Notes that a state waits with this token for the end of a prediction, which may be yet to come or over.

        The table's stream tells publish_changes of it, as it does of the end. Twice changes nothing.
        """
        item = {**_caller_key(prediction_id, task_token), "task_token": task_token, "expires_at": expires}
        self._dynamodb.put_item(TableName=self._name, Item=serialize(item))

    def takes_caller(self, prediction_id: str, task_token: str) -> bool:
        """Check whether one more state may wait for a prediction: fewer than `CALLERS_LIMIT` do, or this one does.

        Writers that check at the same time may pass the limit by their number.
        """
        count = 0
        for page in self._dynamodb.get_paginator("query").paginate(
            **self._query_callers(prediction_id), Select="COUNT"
        ):
            count += page["Count"]
        if count < CALLERS_LIMIT:
            return True
        key = serialize(_caller_key(prediction_id, task_token))
        return "Item" in self._dynamodb.get_item(TableName=self._name, Key=key, ConsistentRead=True)

    def callers(self, prediction_id: str) -> Iterator[tuple[str, str]]:
        """The states that wait for a prediction's end, read consistently: the item's `sk`, and the task token.

        No item is removed: a token works once, and expires with its prediction.
        """
        for page in self._dynamodb.get_paginator("query").paginate(**self._query_callers(prediction_id)):
            yield from ((str(item["sk"]), str(item["task_token"])) for item in map(deserialize, page["Items"]))

    def _query_callers(self, prediction_id: str) -> dict[str, Any]:
        return {
            "TableName": self._name,
            "KeyConditionExpression": "pk = :pk AND begins_with(sk, :caller)",
            "ExpressionAttributeValues": serialize({":pk": _key(prediction_id)["pk"], ":caller": _CALLER}),
            "ConsistentRead": True,
        }

    # -- schemas of models' inputs ----------------------------------------------------------------------------

    def kept_schema(self, version: str, now: float) -> KeptSchema | None:
        """What was kept or noted of a version; None where that is nothing, or has expired."""
        found = self._dynamodb.get_item(TableName=self._name, Key=serialize(schema_key(version))).get("Item")
        item = deserialize(found) if found else None
        # What has expired stays there for some days.
        if not item or item["expires_at"] <= now:
            return None
        return KeptSchema(item.get("model"), self._payload_text(item) if {"json", "s3_key"} & item.keys() else None)

    def keep_schema(self, version: str, text: str, expires: int, model: str) -> None:
        """Keeps the schema of a version's input, as JSON text; the last writer wins, since a version never changes."""
        item: dict[str, Any] = {**schema_key(version), "expires_at": expires, "model": model}
        body = text.encode()
        if len(body) > PAYLOAD_LIMIT_BYTES:
            item["s3_key"] = f"payloads/schemas/{version}/{hashlib.sha256(body).hexdigest()}.json"
            self._outputs.put_payload(item["s3_key"], text)
        else:
            item["json"] = text
        self._dynamodb.put_item(TableName=self._name, Item=serialize(item))

    def note_model(self, version: str, model: str, expires: int, now: float) -> None:
        """Notes whose version it is, where nothing is known of it: what is kept stays."""
        # What another one wrote meanwhile is as good.
        with contextlib.suppress(self._dynamodb.exceptions.ConditionalCheckFailedException):
            self._dynamodb.put_item(
                TableName=self._name,
                Item=serialize({**schema_key(version), "expires_at": expires, "model": model}),
                ConditionExpression="attribute_not_exists(pk) OR expires_at <= :now",
                ExpressionAttributeValues=serialize({":now": int(now)}),
            )

    # -- inside -----------------------------------------------------------------------------------------------

    def _change(
        self,
        prediction_id: str,
        *,
        condition: str,
        set: Mapping[str, Any] | None = None,  # noqa: A002  # the expression's own word
        remove: Sequence[str] = (),
        add: Mapping[str, Any] | None = None,
        delete: Mapping[str, Any] | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> Prediction | None:
        """One conditional update; the item after it, or None where the condition did not hold."""
        set_, add_, delete_ = dict(set or {}), dict(add or {}), dict(delete or {})
        clauses = []
        if set_:
            clauses.append("SET " + ", ".join(f"#{name} = :set_{name}" for name in set_))
        removed = [name for name in remove if name not in set_]
        if removed:
            clauses.append("REMOVE " + ", ".join(f"#{name}" for name in removed))
        if add_:
            clauses.append("ADD " + ", ".join(f"#{name} :add_{name}" for name in add_))
        if delete_:
            clauses.append("DELETE " + ", ".join(f"#{name} :delete_{name}" for name in delete_))
        expression = " ".join(clauses)
        bound: dict[str, Any] = {
            **{f":set_{name}": value for name, value in set_.items()},
            **{f":add_{name}": value for name, value in add_.items()},
            **{f":delete_{name}": value for name, value in delete_.items()},
            **(values or {}),
        }
        if ":terminal" in condition:
            bound[":terminal"] = TERMINAL_RANK
        names = {word for word in (expression + " " + condition).replace("(", " ").replace(")", " ")
                 .replace(",", " ").split() if word.startswith("#")}  # fmt: skip
        try:
            answer = self._dynamodb.update_item(
                TableName=self._name,
                Key=serialize(_key(prediction_id)),
                UpdateExpression=expression,
                ConditionExpression=condition,
                ExpressionAttributeNames={name: name[1:] for name in names},
                **({"ExpressionAttributeValues": serialize(bound)} if bound else {}),  # type: ignore[arg-type]
                ReturnValues="ALL_NEW",
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            return None
        return _prediction(answer["Attributes"])

    def _put_result(self, prediction: Prediction, told: "UpstreamPrediction") -> "UpstreamPrediction":
        """Keeps output and logs of the end; the first ones told stay, so that a removed output replaces none."""
        if told.data_removed:
            kept = self._payload(prediction.id, f"result#{told.id}")
            if kept is not None:
                return told.model_copy(update={**json.loads(kept), "data_removed": False})
            if told.status == Status.SUCCEEDED:
                removed = "Replicate had removed the output before this stack could read it."
                told = told.model_copy(update={"error": removed})
        text = json.dumps({"output": told.output, "logs": told.logs}, separators=(",", ":"))
        self._put_payload(prediction.id, f"result#{told.id}", text, prediction.expires_at, only_first=True)
        return told

    def _put_progress(self, prediction: Prediction, told: "UpstreamPrediction") -> None:
        # Files are shown when they are ours: until then they are not kept, and the answer to a wait holds their bytes.
        output = None if self._outputs.holds_files(told.output) else told.output
        if output is None and not told.logs:
            return
        text = json.dumps({"output": output, "logs": told.logs}, separators=(",", ":"))
        notice: dict[str, str] = {}
        if notify := [event for event in ("output", "logs") if event in prediction.wanted_events]:
            # For the stream's reader, who sees no payload that is an object: who is told, and whether it is news. Not
            # `owner`, which is a key of an index.
            digests = {"output_digest": _digest(output), "logs_digest": _digest(told.logs)}
            notice = {
                "notify": ",".join(notify),
                "notify_owner": prediction.owner,
                **{name: digest for name, digest in digests.items() if digest},
            }
        self._put_payload(prediction.id, "progress", text, prediction.expires_at, only_longer=True, notice=notice)

    def _put_payload(
        self,
        prediction_id: str,
        sk: str,
        text: str,
        expires: int,
        *,
        only_first: bool = False,
        only_longer: bool = False,
        notice: Mapping[str, str] | None = None,
    ) -> None:
        item: dict[str, Any] = {"pk": _key(prediction_id)["pk"], "sk": sk, "expires_at": expires, "length": len(text)}
        item |= notice or {}
        body = text.encode()
        key = _payload_object(prediction_id, body)
        if key is None:
            item["json"] = text
        elif only_longer:
            # One object, however often it grows. It is only ever replaced by longer text, so it holds at least what the
            # item says, even if the item is written late or never.
            item["s3_key"] = f"payloads/{prediction_id}/{sk}.json"
            if not self._outputs.put_longer_payload(item["s3_key"], text):
                return
        else:
            item["s3_key"] = key
            self._outputs.put_payload(key, body)
        condition: dict[str, Any] = {}
        if only_first:
            condition = {"ConditionExpression": "attribute_not_exists(pk)"}
        elif only_longer:
            condition = {
                # What expires earlier is of an earlier prediction, whose key was used again.
                "ConditionExpression": "attribute_not_exists(pk) OR #length < :length OR expires_at < :expires",
                "ExpressionAttributeNames": {"#length": "length"},
                "ExpressionAttributeValues": serialize({":length": len(text), ":expires": expires}),
            }
        try:
            self._dynamodb.put_item(TableName=self._name, Item=serialize(item), **condition)
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            return  # an earlier or longer one is there, and stays

    def _empty_payload(self, prediction_id: str, text: str) -> None:
        """Replace the object that `_put_payload` made of a text, if it made one, by an empty one."""
        if key := _payload_object(prediction_id, text.encode()):
            self._outputs.put_payload(key, "{}")

    def _payload(self, prediction_id: str, sk: str, longest: int | None = None) -> str | None:
        found = self._dynamodb.get_item(
            TableName=self._name, Key=serialize({**_key(prediction_id), "sk": sk}), ConsistentRead=True
        ).get("Item")
        if not found:
            return None
        item = deserialize(found)
        if longest is not None and item["length"] > longest:
            raise PayloadTooLong(f"{sk} has {item['length']} characters; at most {longest} can be read")
        return self._payload_text(item)

    def _payload_text(self, item: Mapping[str, Any]) -> str | None:
        """A payload's text; None where its object has expired, which may be some days before its item does."""
        if "json" in item:
            return str(item["json"])
        try:
            return self._outputs.get_payload(item["s3_key"])
        except ClientError as error:
            # 403 is S3's answer for a missing object to those who may not list the bucket.
            if error.response["Error"]["Code"] not in ("NoSuchKey", "AccessDenied"):
                raise
            return None

    def _wholes(self, pks: Sequence[str]) -> Iterator[Whole]:
        """Predictions with their payloads, in the order of `pks`, read in as few calls as the payloads' sizes allow."""
        statuses = read_items(self._dynamodb, self._name, [(pk, "status") for pk in pks])
        wanted = []
        for (pk, _), item in statuses.items():
            prediction = _prediction_of(item)
            if prediction.deleted:
                continue
            sks = [f"input#{prediction.fingerprint}"]
            if prediction.upstream_id:
                sks.append(f"result#{prediction.upstream_id}" if prediction.terminal else "progress")
            if prediction.terminal and not prediction.awaits_copy and not prediction.files_json:
                sks.append("files")
            wanted += [(pk, sk) for sk in sks]
        payloads = read_items(self._dynamodb, self._name, wanted)
        for pk in pks:
            items = {sk: item for (p, sk), item in payloads.items() if p == pk}
            if (pk, "status") in statuses:
                items["status"] = statuses[pk, "status"]
            if whole := self._whole(items):
                yield whole

    def _whole(self, items: Mapping[str, Mapping[str, Any]]) -> Whole | None:
        if "status" not in items:
            return None
        prediction = _prediction_of(items["status"])
        if prediction.deleted:
            # Whatever is still there, or was written late.
            return Whole(prediction, input={}, output=None, logs=None, files=[])
        asked = items.get(f"input#{prediction.fingerprint}")
        # What expires earlier is of an earlier prediction, whose key was used again once it had expired.
        items = {
            sk: i for sk, i in items.items() if i.get("expires_at", prediction.expires_at) >= prediction.expires_at
        }
        told = items.get(f"result#{prediction.upstream_id}" if prediction.terminal else "progress")
        said_json = self._payload_text(told) if told else None
        said = json.loads(said_json) if said_json else {"output": None, "logs": None}
        files_json = prediction.files_json or (self._payload_text(items["files"]) if "files" in items else None)
        asked_json = self._payload_text(asked) if asked else None
        if (told and said_json is None) or asked_json is None:
            prediction = replace(prediction, data_removed=True)
        return Whole(
            prediction=prediction,
            input=json.loads(asked_json) if asked_json else {},
            output=said["output"],
            logs=said["logs"],
            files=[StoredFile.from_item(item) for item in json.loads(files_json or "[]")],
            input_key=asked.get("s3_key") if asked else None,
            result_key=told.get("s3_key") if told else None,
        )


def _key(prediction_id: str) -> dict[str, str]:
    return {"pk": f"prediction#{prediction_id}", "sk": "status"}


def _caller_key(prediction_id: str, task_token: str) -> dict[str, str]:
    digest = hashlib.sha256(task_token.encode()).hexdigest()
    return {"pk": _key(prediction_id)["pk"], "sk": f"{_CALLER}{digest}"}


def schema_key(version: str) -> dict[str, str]:
    """The key of the item that holds what is known of a version: see `PredictionsTable.kept_schema`."""
    return {"pk": f"schema#{version}", "sk": "input"}


def _this_claim(prediction: Prediction) -> dict[str, Any]:
    return {":claimed": prediction.claimed, ":written_by": prediction.written_by}


def _lease(now: float, wait_seconds: int) -> dict[str, int]:
    """The attributes of every claim: since when, until when its holder may act, and when the sweep looks."""
    submit_until = int(now) + wait_seconds + SUBMIT_SECONDS
    return {
        "claimed": int(now),
        "submit_until": submit_until,
        "next_check_at": submit_until + _AFTER_SUBMIT_SECONDS,
    }


def _list_key(owner: str, kind: str) -> str:
    """The key of the index `by_owner`: an owner's trainings are a list of their own. No owner's name holds a `#`."""
    return owner if kind == "prediction" else f"{_TRAININGS_OF}{owner}"


_TRAININGS_OF = "trainings#"


def _payload_object(prediction_id: str, body: bytes) -> str | None:
    """The key of the object that holds a payload; None for one that fits into an item.

    It is named by its content, so that a late writer can never replace what the item points to.
    """
    if len(body) <= PAYLOAD_LIMIT_BYTES:
        return None
    return f"payloads/{prediction_id}/{hashlib.sha256(body).hexdigest()}.json"


def _digest(value: Any) -> str | None:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] if value not in (None, "") else None


def _short(value: Any) -> str | None:
    return value if isinstance(value, str) and len(value) <= 2048 else None


def _left_behind(error: Any) -> Mapping[str, Any]:
    item: Mapping[str, Any] = error.response["Item"]
    return item


def read_image(image: Mapping[str, Any]) -> Prediction:
    """A status item as the table's stream shows it."""
    return _prediction(image)


def _prediction(item: Mapping[str, Any]) -> Prediction:
    return _prediction_of(deserialize(item))


_FIELDS = frozenset(Prediction.__dataclass_fields__) - {"repeated"}


def _prediction_of(item: Mapping[str, Any]) -> Prediction:
    values = {name: value for name, value in item.items() if name in _FIELDS}
    for name in {"orphans", "orphans_canceled"} & values.keys():
        values[name] = frozenset(values[name])
    values["owner"] = values["owner"].removeprefix(_TRAININGS_OF)
    if "origin" in values:
        values["origin"] = {n: v if isinstance(v, str) else int(v) for n, v in values["origin"].items()}
    if "webhook_events_filter" in values:
        values["webhook_events_filter"] = tuple(values["webhook_events_filter"])
    return Prediction(**values)
