"""The body of a recipe, as the routes validate it and the OpenAPI document describes it."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from predictions.bodies import OBJECT, Body, Checks, choice, optional, text, whole
from predictions.intents.model import EVENTS, LIFETIME, TARGET_NAME, WebhookEvent

NAME = r"[a-z0-9][a-z0-9-]{0,62}"
"""The pattern of a whole recipe name."""

# The largest number that EventBridge compares.
# https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-create-pattern-operators.html#filtering-numeric-matching
_BYTES_LIMIT = 5_000_000_000


@dataclass(kw_only=True)
class S3Body(Body):
    """Objects that start a recipe."""

    bucket: Literal["inputs", "source"] = "inputs"
    prefix: str
    suffix: str | None = None
    min_bytes: int | None = None
    max_bytes: int | None = None

    checks: ClassVar[Checks] = {
        "bucket": choice(("inputs", "source")), "prefix": text(most=512), "suffix": optional(text(1, 256)),
        "min_bytes": optional(whole(0, _BYTES_LIMIT)), "max_bytes": optional(whole(0, _BYTES_LIMIT)),
    }  # fmt: skip


@dataclass(kw_only=True)
class ScheduleBody(Body):
    """Times that start a recipe."""

    expression: str
    time_zone: str | None = None

    checks: ClassVar[Checks] = {
        "expression": text(most=256), "time_zone": optional(text(pattern=r"^[A-Za-z0-9_+/-]{1,50}$")),
    }  # fmt: skip


MAX_CONCURRENCY = 1000
"""The limit of lines of a batch that run concurrently."""


@dataclass(kw_only=True)
class BatchLimits(Body):
    """The limits of a batch's execution."""

    max_concurrency: int = 20
    tolerated_failure_percentage: int = 100

    checks: ClassVar[Checks] = {
        "max_concurrency": whole(1, MAX_CONCURRENCY),
        "tolerated_failure_percentage": whole(0, 100),
    }


@dataclass(kw_only=True)
class RecipeBody(Body):
    """The fields of `PUT /recipes/{name}`; `POST /recipes` has `name` in it too."""

    name: str | None = None
    model: str | None = None
    version: str | None = None
    deployment: str | None = None
    input: dict[str, Any]
    defaults: dict[str, Any] | None = None
    webhook: str | None = None
    webhook_events_filter: list[WebhookEvent] | None = None
    lifetime: str | int | None = None
    output_prefix: str | None = None
    s3: S3Body | None = None
    pattern: dict[str, Any] | None = None
    bus: Literal["default", "stack"] | None = None
    schedule: ScheduleBody | None = None
    batches: BatchLimits | None = None
    labels: dict[str, Any] | None = None

    checks: ClassVar[Checks] = {
        "name": optional(text(pattern=f"^{NAME}$")), "model": TARGET_NAME, "version": TARGET_NAME,
        "deployment": TARGET_NAME, "input": OBJECT, "defaults": optional(OBJECT), "webhook": optional(text(most=2048)),
        "webhook_events_filter": EVENTS, "lifetime": LIFETIME, "output_prefix": optional(text(most=512)),
        "s3": optional(S3Body.schema()), "pattern": optional(OBJECT), "bus": optional(choice(("default", "stack"))),
        "schedule": optional(ScheduleBody.schema()), "batches": optional(BatchLimits.schema()),
        "labels": optional(OBJECT),
    }  # fmt: skip
