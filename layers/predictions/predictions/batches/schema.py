"""The body of `POST /batches`."""

from typing import Any, Literal

from pydantic import Field, ValidationError

from predictions.errors import Problem
from predictions.recipes.schema import BatchLimits


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
        known = ", ".join(f"`{name}`" for name in BatchBody.model_fields)
        fields = []
        for each in error.errors(include_url=False, include_context=False):
            unknown = each["type"] == "extra_forbidden"
            detail = f"Unknown field. The known fields are {known}." if unknown else each["msg"]
            fields.append({"field": str(each["loc"][0])[:200], "detail": detail})
        raise refusal(fields) from None


def refusal(fields: list[dict[str, str]]) -> Problem:
    """Return the response that names every invalid field."""
    detail = " ".join(f"{each['field']}: {each['detail']}" for each in fields[:5])
    return Problem(422, detail, title="Input validation failed", invalid_fields=fields[:50])
