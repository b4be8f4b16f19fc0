"""Predictions as the table holds them: their items, and what reads and writes return."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from enum import Enum
from typing import Any, Literal

from predictions.aws.dynamodb import deserialize, size_of
from predictions.errors import PredictionsError
from predictions.files.output_references import StoredFile
from predictions.money.cost import Cost, Run
from predictions.status import DEFAULT_WEBHOOK_EVENTS, TERMINAL_RANK, Status
from predictions.store.keys import owner_of

ORIGINS = ("api", "queue", "invocation", "recipe", "batch", "pipeline")
"""The entry points that start predictions, as callers see them (`origin`)."""

# `source` of the item; the others have the same name.
_ORIGIN_OF_SOURCE = {"http": "api", "run_job": "invocation"}


class AlreadyExists(PredictionsError):
    """The id of an intent is taken by `prediction`."""

    def __init__(self, prediction: "Prediction") -> None:
        super().__init__(f"prediction {prediction.id} exists")
        self.prediction = prediction


class Change(Enum):
    """Change that a merge made."""

    UNKNOWN = "no such prediction"
    ORPHAN = "the prediction is bound to another upstream id, or has ended without one"
    CLOSED = "the prediction had ended already"
    NOTHING = "the report holds nothing newer"
    PROGRESS = "the prediction has progressed"
    ENDED = "the prediction ended upstream"


@dataclass(frozen=True)
class Prediction:
    """The status item of a prediction or training. Times are Unix seconds; those that are text are Replicate's."""

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
    cancel_requested: int | None = None
    upstream_id: str | None = None
    started_at: str | None = None
    completed_at: str | None = None
    error: str | None = None
    metrics_json: str | None = None
    cost_micro_dollars: int | None = None
    cost_reason: str | None = None
    cost_price: str | None = None
    reserved_micro_dollars: int | None = None
    reserved_unknown: int = 0
    reserved_on: str | None = None
    reserved_in: str | None = None
    settled_micro_dollars: int | None = None
    settled_unknown: bool = False
    stream_url: str | None = None
    refusal_json: str | None = None
    execution_arn: str | None = None
    task_token: str | None = field(default=None, repr=False)
    wake: str | None = None
    next_check_at: int | None = None
    ended: int | None = None
    not_found_count: int = 0
    stalled_looks: int = 0
    resume_n: int | None = None
    orphans: frozenset[str] = frozenset()
    orphans_canceled: frozenset[str] = frozenset()
    orphans_not_found: int = 0
    upstream_status: str | None = None
    copy_until: int | None = None
    copy_by: int | None = None
    data_removed: bool = False
    deleted: int | None = None
    files_json: str | None = None
    origin: Mapping[str, str | int] = field(default_factory=dict)
    depth: int = 0
    output_prefix: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    traceparent: str | None = None
    # Its input, and its output and logs, if they are in this item: see `store.inline`.
    input_json: str | None = field(default=None, repr=False)
    result_json: str | None = field(default=None, repr=False)
    # No attribute of the item: whether a start found it instead of making it.
    repeated: bool = field(default=False, compare=False)
    # Nor this: how large the item was when it was read.
    stored_bytes: int = field(default=0, compare=False, repr=False)

    @property
    def listed_at(self) -> str:
        """Its position in its owner's list."""
        return f"{self.created_at}#{self.id}"

    @property
    def origin_kind(self) -> str:
        """Which entry point started it, one of `ORIGINS`; derived, so that items of every release have it."""
        return _ORIGIN_OF_SOURCE.get(self.source, self.source)

    @property
    def shown_model(self) -> str:
        """The model that callers see, `owner/name`; empty while only a version id is known."""
        return self.model or self.name or ""

    @property
    def reported_status(self) -> str | None:
        """The last status that Replicate itself reported, or None before it reported one.

        It differs from `status` where this stack ended the prediction: the item has it as `upstream_status` then.
        """
        if self.upstream_status or self.upstream_id is None or self.status == Status.QUEUED:
            return self.upstream_status
        return self.status

    @property
    def holder_done_at(self) -> int | None:
        """When the holder of its claim has sent all it will send; None without a claim, or of an earlier release."""
        return self.submit_over or self.submit_until if self.claimed else None

    @property
    def searched_from(self) -> int:
        """When it was claimed first: since then Replicate may have accepted it."""
        return self.first_claimed or self.claimed or self.created

    @property
    def wanted_events(self) -> tuple[str, ...]:
        """The webhook events that its caller subscribed to, by default those of Replicate; none without a webhook."""
        return (self.webhook_events_filter or DEFAULT_WEBHOOK_EVENTS) if self.webhook else ()

    @property
    def collection(self) -> Literal["predictions", "trainings"]:
        """The collection in its path, here and at Replicate."""
        return "trainings" if self.object == "training" else "predictions"

    @property
    def terminal(self) -> bool:
        """Whether it has finished upstream; callers see `processing` until its files are copied."""
        return self.rank >= TERMINAL_RANK

    @property
    def ended_visibly(self) -> bool:
        """Whether callers see that it has finished."""
        return self.terminal and not self.awaits_copy

    @property
    def cost(self) -> Cost | None:
        """What it cost, written with its end; None until callers see that it has ended."""
        if not self.ended_visibly:
            return None
        if self.cost_micro_dollars is None and self.cost_reason is None:
            return Cost(None, "It ended before this stack recorded costs.")
        return Cost(self.cost_micro_dollars, self.cost_reason, self.cost_price)

    @property
    def run(self) -> Run:
        """The facts by which its cost is computed, as far as its item has them."""
        model = self.model or (None if self.kind == "deployment" else self.name)
        version = self.upstream_version or self.version
        return Run(
            self.object, self.reported_status or self.status, model, version, self.deployment,
            started=self.started_at is not None, metrics=json.loads(self.metrics_json or "{}"),
        )  # fmt: skip

    def expired(self, now: float) -> bool:
        """Return whether it has finished and is past its retention. Its key is free then, although TTL deletes late."""
        return self.ended_visibly and self.expires_at <= now

    @property
    def awaits_copy(self) -> bool:
        """Whether it has finished upstream, and its files are yet to be copied."""
        return self.terminal and self.visible == Status.PROCESSING


def labels_and_trace(labels: Mapping[str, str], traceparent: str | None) -> dict[str, Any]:
    """Return the fields of an event that only some predictions, batches and pipelines have."""
    return ({"labels": dict(labels)} if labels else {}) | ({"traceparent": traceparent} if traceparent else {})


@dataclass(frozen=True, slots=True)
class Waits:
    """Start or turn that an unclaimed prediction waits for at the rate limiter; see `admission.rate_limiter`.

    Attributes:
        reserved_start: The number of the start that is reserved for it.
        turn_ms: By how much it made its owner's line longer, if it has a turn instead.
    """

    reserved_start: int | None = None
    turn_ms: int | None = None

    def attributes(self, *, without_none: bool = False) -> dict[str, Any]:
        """Return the attributes of the item."""
        found = {
            "reserved": True if self.reserved_start is not None else None,
            "reserved_start": self.reserved_start,
            "turn_ms": self.turn_ms,
        }
        return {name: value for name, value in found.items() if value is not None or not without_none}


NOTHING_RESERVED = Waits()


@dataclass(frozen=True)
class Merge:
    """The outcome of a merge: what it changed, and the item as it is now, or None if it is not there."""

    change: Change
    prediction: Prediction | None


@dataclass(frozen=True)
class PredictionDetail:
    """A prediction with its payloads, as callers see it.

    Attributes:
        input_key: The object that holds the input, where it is too large for the table.
        result_key: The object that holds `{"output", "logs"}`, where they are.
        live_read_at: When the last live read began (see `lifecycle.live_reads`), in Unix seconds; None without one.
    """

    prediction: Prediction
    input: Any
    output: Any
    logs: str | None
    files: Sequence[StoredFile]
    input_key: str | None = None
    result_key: str | None = None
    live_read_at: int | None = None


@dataclass(frozen=True)
class StoredSchema:
    """Record of a model's version.

    Attributes:
        model: The model, `owner/name`.
        text: The schema of its input as JSON text, or None if only the model is known.
    """

    model: str | None
    text: str | None


@dataclass(frozen=True)
class Result:
    """How a prediction ended, without its input.

    Attributes:
        output_json: The output as JSON text, or None if it has no output, has files, or is too large for the table.
        files: Where its files are.
    """

    prediction: Prediction
    output_json: str | None
    files: Sequence[StoredFile]


@dataclass(frozen=True)
class UnreadResult:
    """The output and logs of a prediction before they are read: the text may be an object in S3.

    Attributes:
        length: The length of the text in characters; 0 without a text.
        files: Where its files are.
        item: The item of the text, or None without a text.
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
        more: Whether the list has further entries beyond `last`.
        first: The place (`Prediction.listed_at`) of the first entry that was examined, or None if the page is empty.
        last: That of the last one, whether the page holds it or not.
    """

    predictions: Iterator[PredictionDetail]
    more: bool
    first: str | None = None
    last: str | None = None


@dataclass(frozen=True)
class Filters:
    """The predictions that a list is narrowed to, by what callers see; None leaves a value open.

    Attributes:
        status: The status that callers see.
        model: The model that callers see, `owner/name`.
        origin: One of `ORIGINS`.
        label: Key and value of a label.
    """

    status: str | None = None
    model: str | None = None
    origin: str | None = None
    label: tuple[str, str] | None = None

    def __bool__(self) -> bool:
        return self != NO_FILTERS

    def match(self, prediction: Prediction) -> bool:
        """Return whether a prediction is on the list."""
        label = self.label if self.label and self.label in prediction.labels.items() else None
        seen = (prediction.visible, prediction.shown_model, prediction.origin_kind, label)
        return all(wanted in (None, value) for wanted, value in zip(astuple(self), seen, strict=True))


NO_FILTERS = Filters()


def read_image(image: Mapping[str, Any]) -> Prediction:
    """Read a status item from a record of the table's stream."""
    return prediction_of(deserialize(image))


_ATTRIBUTES = frozenset(Prediction.__dataclass_fields__) - {"repeated", "stored_bytes"}


def prediction_of(item: Mapping[str, Any]) -> Prediction:
    """Read a status item; attributes of other releases are passed over."""
    values = {name: value for name, value in item.items() if name in _ATTRIBUTES}
    for name in {"orphans", "orphans_canceled"} & values.keys():
        values[name] = frozenset(values[name])
    if "webhook_events_filter" in values:
        values["webhook_events_filter"] = tuple(values["webhook_events_filter"])
    return Prediction(**{**values, "owner": owner_of(values["owner"])}, stored_bytes=size_of(item))
