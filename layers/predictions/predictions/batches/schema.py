"""The body of `POST /batches`."""

from typing import Any, Literal

from pydantic import Field, ValidationError

from predictions.errors import Problem
from predictions.recipes.schema import BatchLimits
from predictions.validation import field_problem, fields_refused


class BatchBody(BatchLimits):
    """The fields of `POST /batches`."""

    requests: list[Any] | None = Field(default=None)
    manifest: str | None = Field(default=None, max_length=1200)
    format: Literal["jsonl", "csv"] | None = None
    template: dict[str, Any] | None = None
    recipe: str | None = Field(default=None, max_length=63)


def read_body(value: Any) -> BatchBody:
    """Validate each field independently.

    Raises:
        Problem: 422 (with `invalid_fields`).
    """
    if not isinstance(value, dict):
        raise Problem(422, "The body must be a JSON object with `requests` or `manifest`.")
    try:
        return BatchBody.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        raise fields_refused(
            [field_problem(str(each["loc"][0])[:200], each, BatchBody.model_fields) for each in found]
        ) from None
