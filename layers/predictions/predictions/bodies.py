"""JSON bodies of requests, as pydantic's core checks them.

Importing pydantic itself, and building its models, takes two fifths of a botocore client at the cold start of each
function that reads a body. Its core alone takes a twentieth, and makes the same checks with the same errors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar, Self

from pydantic_core import CoreSchema, SchemaValidator, ValidationError, core_schema

__all__ = [
    "ANYTHING", "BOOLEAN", "LIST", "OBJECT", "TEXT", "Body", "Checks", "ValidationError", "choice", "either",
    "errors_of", "listed", "number", "optional", "text", "whole",
]  # fmt: skip

Checks = Mapping[str, CoreSchema]
"""The check of each field, by its name."""

ANYTHING = core_schema.any_schema()
TEXT = core_schema.str_schema()
BOOLEAN = core_schema.bool_schema()
OBJECT = core_schema.dict_schema(TEXT, ANYTHING)
LIST = core_schema.list_schema(ANYTHING)

_STRICT = core_schema.CoreConfig(strict=True)


def text(least: int | None = None, most: int | None = None, pattern: str | None = None) -> CoreSchema:
    """Return the check of a text of so many characters."""
    return core_schema.str_schema(min_length=least, max_length=most, pattern=pattern)


def whole(least: int | None = None, most: int | None = None) -> CoreSchema:
    """Return the check of a whole number."""
    return core_schema.int_schema(ge=least, le=most)


def number(least: float, most: float) -> CoreSchema:
    """Return the check of a number."""
    return core_schema.float_schema(ge=least, le=most)


def choice(values: Iterable[str]) -> CoreSchema:
    """Return the check of one of these texts."""
    return core_schema.literal_schema(list(values))


def listed(of: CoreSchema, least: int | None = None, most: int | None = None) -> CoreSchema:
    """Return the check of a list of so many elements."""
    return core_schema.list_schema(of, min_length=least, max_length=most)


def either(*of: CoreSchema) -> CoreSchema:
    """Return the check of a value that passes one of these."""
    return core_schema.union_schema(list(of))


def optional(of: CoreSchema) -> CoreSchema:
    """Return the check of a value that may be null."""
    return core_schema.nullable_schema(of)


@dataclass(kw_only=True)
class Body:
    """The fields of a JSON object; any other field is an error, and so is another type that could be converted.

    A class for a body is a dataclass: a field without a default is required.

    Attributes:
        checks: The check of each field, by its name.
    """

    checks: ClassVar[Checks]
    _validator: ClassVar[SchemaValidator]

    @classmethod
    def of(cls, value: Any) -> Self:
        """Check a parsed JSON value.

        Raises:
            ValidationError: It is no such body.
        """
        if "_validator" not in cls.__dict__:
            cls._validator = SchemaValidator(cls.schema())
        found: Self = cls._validator.validate_python(value)
        return found

    @classmethod
    def schema(cls) -> CoreSchema:
        """Return the check of the whole body, as part of another one."""
        members = {each.name: _member(each, cls.checks[each.name]) for each in fields(cls)}
        return core_schema.no_info_after_validator_function(
            lambda found: cls(**found),
            core_schema.typed_dict_schema(members, extra_behavior="forbid", config=_STRICT),
        )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of its fields, in their order."""
        return tuple(each.name for each in fields(cls))

    def given(self, *names: str) -> dict[str, Any]:
        """Return those of these fields that are not None."""
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}


def errors_of(error: ValidationError) -> list[Any]:
    """Return the errors in a body: `loc`, `type` and `msg` of each."""
    return list(error.errors(include_url=False, include_context=False, include_input=False))


def _member(of: Field[Any], check: CoreSchema) -> core_schema.TypedDictField:
    if of.default is not MISSING:
        check = core_schema.with_default_schema(check, default=of.default)
    elif of.default_factory is not MISSING:
        check = core_schema.with_default_schema(check, default_factory=of.default_factory)
    required = of.default is MISSING and of.default_factory is MISSING
    return core_schema.typed_dict_field(check, required=required)
