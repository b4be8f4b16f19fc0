"""The body of `POST /batches`."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from predictions.bodies import LIST, OBJECT, Checks, ValidationError, choice, errors_of, optional, text
from predictions.errors import Problem
from predictions.intents.groups import GROUP_CHECKS
from predictions.recipes.schema import BatchLimits
from predictions.validation import field_problem, fields_refused


@dataclass(kw_only=True)
class BatchBody(BatchLimits):
    """The fields of `POST /batches`."""

    requests: list[Any] | None = None
    manifest: str | None = None
    format: Literal["jsonl", "csv"] | None = None
    template: dict[str, Any] | None = None
    recipe: str | None = None
    labels: dict[str, Any] | None = None
    webhook: str | None = None
    webhook_events_filter: list[str] | None = None

    checks: ClassVar[Checks] = {
        **BatchLimits.checks, "requests": optional(LIST), "manifest": optional(text(most=1200)),
        "format": optional(choice(("jsonl", "csv"))), "template": optional(OBJECT), "recipe": optional(text(most=63)),
        **GROUP_CHECKS,
    }  # fmt: skip


def read_body(value: Any) -> BatchBody:
    """Validate each field independently.

    Raises:
        Problem: 422 (with `invalid_fields`).
    """
    if not isinstance(value, dict):
        raise Problem(422, "The body must be a JSON object with `requests` or `manifest`.")
    try:
        return BatchBody.of(value)
    except ValidationError as error:
        raise fields_refused(
            [field_problem(str(each["loc"][0])[:200], each, BatchBody.names()) for each in errors_of(error)]
        ) from None
