"""The body of a recipe, as the routes validate it and the OpenAPI document describes it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from predictions.intents.model import WebhookEvent

NAME = r"[a-z0-9][a-z0-9-]{0,62}"
"""The pattern of a whole recipe name."""

# The largest number that EventBridge compares.
# https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-create-pattern-operators.html#filtering-numeric-matching
_BYTES_LIMIT = 5_000_000_000


class S3Body(BaseModel):
    """Objects that start a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True)

    bucket: Literal["inputs", "source"] = "inputs"
    prefix: str = Field(max_length=512)
    suffix: str | None = Field(default=None, min_length=1, max_length=256)
    min_bytes: int | None = Field(default=None, ge=0, le=_BYTES_LIMIT)
    max_bytes: int | None = Field(default=None, ge=0, le=_BYTES_LIMIT)


class ScheduleBody(BaseModel):
    """Times that start a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True)

    expression: str = Field(max_length=256)
    time_zone: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_+/-]{1,50}$")


MAX_CONCURRENCY = 1000
"""The limit of lines of a batch that run concurrently."""


class BatchLimits(BaseModel):
    """The limits of a batch's execution."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_concurrency: int = Field(default=20, ge=1, le=MAX_CONCURRENCY)
    tolerated_failure_percentage: int = Field(default=100, ge=0, le=100)


class RecipeBody(BaseModel):
    """The fields of `PUT /recipes/{name}`; `POST /recipes` has `name` in it too."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str | None = Field(default=None, pattern=f"^{NAME}$")
    model: str | None = Field(default=None, max_length=256)
    version: str | None = Field(default=None, max_length=256)
    deployment: str | None = Field(default=None, max_length=256)
    input: dict[str, Any]
    defaults: dict[str, Any] | None = None
    webhook: str | None = Field(default=None, max_length=2048)
    webhook_events_filter: list[WebhookEvent] | None = Field(default=None, max_length=4)
    lifetime: str | int | None = None
    output_prefix: str | None = Field(default=None, max_length=512)
    s3: S3Body | None = None
    pattern: dict[str, Any] | None = None
    bus: Literal["default", "stack"] | None = None
    schedule: ScheduleBody | None = None
    batches: BatchLimits | None = None
