"""Bodies of requests, held against pydantic's models of the same fields."""

import itertools
import json
from typing import Any, Literal

import pytest
from predictions.batches.schema import BatchBody
from predictions.bodies import Body, ValidationError, errors_of
from predictions.files.upload_requests import UPLOAD_LIMIT_BYTES, UploadBody
from predictions.intake.invocation import InputJob, PromptJob
from predictions.intents.model import PredictionBody, RequestBody, TrainingBody
from predictions.pipelines.definition import PipelineBody
from predictions.recipes.schema import RecipeBody
from pydantic import BaseModel, ConfigDict, Field, create_model

Event = Literal["start", "output", "logs", "completed"]
STRICT = ConfigDict(extra="forbid", strict=True)
NAMED = (str | None, Field(default=None, max_length=256))
EVENTS = (list[Event] | None, Field(default=None, max_length=4))
TEXT = (str | None, None)
OBJECT = (dict[str, Any], ...)
OPTIONAL_OBJECT = (dict[str, Any] | None, None)
LIFETIME = (str | int | None, None)
BYTES = (int | None, Field(default=None, ge=0, le=5_000_000_000))


def model(of: type[Body], **fields: Any) -> type[BaseModel]:
    made: type[BaseModel] = create_model(of.__name__, __config__=STRICT, **fields)
    return made


S3 = create_model(
    "S3Body", __config__=STRICT, bucket=(Literal["inputs", "source"], "inputs"), prefix=(str, Field(max_length=512)),
    suffix=(str | None, Field(default=None, min_length=1, max_length=256)), min_bytes=BYTES, max_bytes=BYTES,
)  # fmt: skip
SCHEDULE = create_model(
    "ScheduleBody", __config__=STRICT, expression=(str, Field(max_length=256)),
    time_zone=(str | None, Field(default=None, pattern=r"^[A-Za-z0-9_+/-]{1,50}$")),
)  # fmt: skip
LIMITS: dict[str, Any] = {
    "max_concurrency": (int, Field(default=20, ge=1, le=1000)),
    "tolerated_failure_percentage": (int, Field(default=100, ge=0, le=100)),
}
STEP = create_model(
    "StepBody", __config__=STRICT, name=(str, Field(max_length=256)), model=NAMED, version=NAMED, deployment=NAMED,
    input=OBJECT, for_each=(str | list[Any] | None, None), lifetime=LIFETIME,
)  # fmt: skip
ANYTHING = (Any, None)
GROUP: dict[str, Any] = {
    "labels": OPTIONAL_OBJECT,
    "webhook": (str | None, Field(None, max_length=2048)),
    "webhook_events_filter": (list[Literal["completed"]] | None, Field(None, min_length=1, max_length=1)),
}
PREDICTION: dict[str, Any] = {
    "input": OBJECT, "version": NAMED, "webhook": TEXT, "webhook_completed": TEXT, "webhook_events_filter": EVENTS,
    "stream": (bool | None, None), "lifetime": LIFETIME,
}  # fmt: skip
JOB: dict[str, Any] = {"model": (str, Field(min_length=1, max_length=256)), "idempotency_key": TEXT}
JOB |= {"labels": ANYTHING, "traceparent": ANYTHING}

MODELS: dict[type[Body], type[BaseModel]] = {
    PredictionBody: model(PredictionBody, **PREDICTION),
    RequestBody: model(
        RequestBody, **PREDICTION, model=NAMED, deployment=NAMED, idempotency_key=TEXT, labels=ANYTHING,
        traceparent=ANYTHING,
    ),
    TrainingBody: model(TrainingBody, destination=(str, ...), input=OBJECT, webhook=TEXT, webhook_events_filter=EVENTS),
    BatchBody: model(
        BatchBody, **LIMITS, requests=(list[Any] | None, None), manifest=(str | None, Field(None, max_length=1200)),
        format=(Literal["jsonl", "csv"] | None, None), template=OPTIONAL_OBJECT,
        recipe=(str | None, Field(None, max_length=63)), **GROUP,
    ),
    RecipeBody: model(
        RecipeBody, name=(str | None, Field(None, pattern="^[a-z0-9][a-z0-9-]{0,62}$")), model=NAMED, version=NAMED,
        deployment=NAMED, input=OBJECT, defaults=OPTIONAL_OBJECT, webhook=(str | None, Field(None, max_length=2048)),
        webhook_events_filter=EVENTS, lifetime=LIFETIME, output_prefix=(str | None, Field(None, max_length=512)),
        s3=(S3 | None, None), pattern=OPTIONAL_OBJECT, bus=(Literal["default", "stack"] | None, None),
        schedule=(SCHEDULE | None, None),
        batches=(create_model("BatchLimits", __config__=STRICT, **LIMITS) | None, None), labels=OPTIONAL_OBJECT,
    ),
    PipelineBody: model(
        PipelineBody, input=(dict[str, Any], {}), steps=(list[STEP], Field(min_length=1, max_length=50)), **GROUP,
    ),
    PromptJob: model(PromptJob, **JOB, prompt=(str, Field(min_length=1)), webhook_url=TEXT),
    InputJob: model(
        InputJob, **JOB, input_data=OBJECT, wait_for_completion=(bool, True),
        poll_interval=(float, Field(1, ge=0.1, le=60)), max_poll_attempts=(int, Field(60, ge=1, le=10_000)),
    ),
    UploadBody: model(
        UploadBody, filename=(str, ...), size=(int, Field(ge=1, le=UPLOAD_LIMIT_BYTES)),
        type=(str, "application/octet-stream"), metadata=(dict[str, Any], {}),
        sha256=(str | None, Field(None, pattern=r"^[0-9a-f]{64}$")),
    ),
}  # fmt: skip
"""As they would be written for pydantic."""

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 60, 61, 100, 101, 1000, 1001, 10_001, 2**63, 10**30, 5_000_000_001, 0.05, 0.5, 1.0,
    1e300, UPLOAD_LIMIT_BYTES + 1, "", "a", "A b", "1", "true", "start", "inputs", "stack", "jsonl", "é\n", "a" * 64,
    "a" * 257, "a" * 600, "a" * 2049, "\x00", [], [1], ["start"], ["start"] * 5, ["start", 1], ["other"], {}, {"a": 1},
    {"a": {"b": []}}, [{}], [None], [[]], [{"name": "a", "input": {}}], [{"name": "a", "input": {}}] * 51,
    [{"name": 1, "input": [], "more": 1, "for_each": 1}], {"prefix": "a"}, {"prefix": 1, "suffix": "", "min_bytes": -1},
    {"expression": "rate(1 day)", "time_zone": "%"}, {"max_concurrency": 0}, {"max_concurrency": 1.0},
]  # fmt: skip


def outcome(check: Any, value: Any) -> Any:
    """The body's fields, or the errors in it."""
    try:
        found = check(value)
    except ValidationError as error:
        # Of an object within, pydantic also names the class that it would take.
        return [
            (each["loc"], "dict_type" if each["type"] == "model_type" else each["type"],
             each["msg"].partition(" or instance of ")[0])
            for each in errors_of(error)
        ]  # fmt: skip
    return json.dumps(found, default=lambda each: each.model_dump() if isinstance(each, BaseModel) else vars(each))


def usual(of: type[Body]) -> dict[str, Any]:
    """A body that passes, with each field that it needs."""
    needed = {"input": {}, "input_data": {}, "steps": [{"name": "a", "input": {}}], "size": 1}
    return {name: needed.get(name, "a") for name, each in MODELS[of].model_fields.items() if each.is_required()}


@pytest.mark.parametrize("of", MODELS)
def test_any_value_of_any_field_is_taken_or_refused_as_pydantic_does(of: type[Body]) -> None:
    whole = usual(of)
    assert not isinstance(outcome(of.of, whole), list)
    for name, value in itertools.product([*of.names(), "unknown"], VALUES):
        for body in ({**whole, name: value}, {name: value}):
            assert outcome(of.of, body) == outcome(MODELS[of].model_validate, body), (name, value)


@pytest.mark.parametrize("of", MODELS)
def test_what_is_no_object_is_refused(of: type[Body]) -> None:
    values: list[Any] = [[], "a", 1, None, [{}]]
    for value in values:
        with pytest.raises(ValidationError):
            of.of(value)


@pytest.mark.parametrize("of", MODELS)
def test_each_field_has_a_check(of: type[Body]) -> None:
    assert set(of.names()) == set(of.checks) == set(MODELS[of].model_fields)


def test_defaults_are_not_shared_between_bodies() -> None:
    first = PipelineBody.of({"steps": [{"name": "a", "input": {}}]})
    first.input["changed"] = True
    assert PipelineBody.of({"steps": [{"name": "a", "input": {}}]}).input == {}
