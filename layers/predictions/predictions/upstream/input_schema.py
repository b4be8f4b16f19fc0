"""Check an input against a model's own schema, before anything is paid for.

Hand-made: JSON Schema libraries bound neither the time of a check nor the patterns of a hostile schema.

The schema is part of a version's OpenAPI document (https://replicate.com/docs/reference/openapi): Cog makes it from the
model's code, so it is untrusted text. It is read as data and never run:

    $ref        only `#/components/schemas/…`; anything else makes the schema unusable
    pattern     matched by Rust's regular expressions, in time linear in the text (pydantic's core has them); one that
                they do not know (look-around, back references) or that is too large is left to Replicate
    size        its values, its depth and its patterns are limited when it is read
    time        every step of a check is counted, and a check that takes too many is given up

The model refuses as well whatever is refused here. Where that is not certain, the input passes and Replicate decides:
keywords that are not known, formats other than `uri`, an explicit null for an optional input, `oneOf` (as `anyOf`).

JSON Schema itself: https://json-schema.org/draft/2020-12/json-schema-validation, as OpenAPI 3.0 (`nullable`, boolean
`exclusiveMinimum`) and 3.1 write it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from pydantic_core import SchemaError, SchemaValidator, ValidationError, core_schema

from predictions.errors import PredictionsError
from predictions.validation import UNKNOWN_FIELD

VIOLATIONS_LIMIT = 50
"""The most violations that one response names."""

STEPS_LIMIT = 100_000
"""The most steps of one check: in the worst case that was found (patterns) half a second of a whole processor."""

# Names and values of a schema; of a text, each so many characters count for one: about 1 MB in all.
_VALUES_LIMIT = 20_000
_CHARACTERS_PER_VALUE = 64
_SCHEMA_DEPTH_LIMIT = 40
_CHECK_DEPTH_LIMIT = 64

# Rust's regular expressions are linear in the text, but by a factor that a pattern can drive up: with these, the worst
# that was found takes 50 ms to compile and 45 ms to match.
_PATTERNS_LIMIT = 16
_PATTERN_LIMIT_CHARACTERS = 200
_PATTERN_TEXT_LIMIT_CHARACTERS = 10_000

_SHOWN_CHOICES = 20
_SHOWN_CHARACTERS = 60

_PREFIX = "#/components/schemas/"

Violation = dict[str, str]
"""`{"field": "input.prompt", "detail": …}`."""

_KINDS = {
    "string": "a string",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_Kind = Literal["string", "integer", "number", "boolean", "array", "object", "null"]


class UnusableSchema(PredictionsError):
    """A model's schema is malformed, or cannot be used safely."""


class NotChecked(PredictionsError):
    """A check takes too many steps; the input is not known to be right or wrong."""


_ABSENT = object()


@dataclass(kw_only=True)
class _Node:
    """One schema, as far as it is checked; what else it says is ignored."""

    ref: str | None = None
    type: _Kind | list[_Kind] | None = None
    nullable: bool | None = None
    enum: list[Any] | None = None
    const: Any = _ABSENT
    minimum: int | float | None = None
    maximum: int | float | None = None
    exclusive_minimum: bool | int | float | None = None
    exclusive_maximum: bool | int | float | None = None
    min_length: int | None = None
    max_length: int | None = None
    pattern: str | None = None
    format: str | None = None
    items: "_Node | bool | None" = None
    min_items: int | None = None
    max_items: int | None = None
    properties: "dict[str, _Node | bool] | None" = None
    required: list[str] | None = None
    additional_properties: "_Node | bool | None" = None
    pattern_properties: dict[str, Any] | None = None
    all_of: "list[_Node | bool] | None" = None
    any_of: "list[_Node | bool] | None" = None
    one_of: "list[_Node | bool] | None" = None

    # Compiled once by `InputSchema`, for the checks.
    _choices: frozenset[Any] | None = None
    _matches: SchemaValidator | None = None

    @property
    def kinds(self) -> Sequence[str]:
        """Return the allowed types; empty if all are."""
        if self.type is None:
            return ()
        return [self.type] if isinstance(self.type, str) else self.type

    def inner(self) -> "Iterator[_Node]":
        """Return the schemas directly within this one."""
        within: list[_Node | bool | None] = [self.items, self.additional_properties, *(self.properties or {}).values()]
        within += [*(self.all_of or ()), *(self.any_of or ()), *(self.one_of or ())]
        return (node for node in within if isinstance(node, _Node))


def _reader() -> SchemaValidator:
    """Return what reads a schema into a `_Node`, strictly: with pydantic's core alone, see `bodies`."""
    anything, text, whole = core_schema.any_schema(), core_schema.str_schema(), core_schema.int_schema()
    boolean, kind = core_schema.bool_schema(), core_schema.literal_schema(list(_KINDS))
    number = core_schema.union_schema([whole, core_schema.float_schema()])
    limit = core_schema.union_schema([boolean, whole, core_schema.float_schema()])
    node = core_schema.union_schema([(core_schema.definition_reference_schema("node"), "_Node"), (boolean, "bool")])
    nodes = core_schema.list_schema(node)
    members: list[tuple[str, str, core_schema.CoreSchema]] = [
        ("ref", "$ref", text),
        ("type", "type", core_schema.union_schema([kind, core_schema.list_schema(kind)])),
        ("nullable", "nullable", boolean),
        ("enum", "enum", core_schema.list_schema(anything)),
        ("const", "const", anything),
        ("minimum", "minimum", number),
        ("maximum", "maximum", number),
        ("exclusive_minimum", "exclusiveMinimum", limit),
        ("exclusive_maximum", "exclusiveMaximum", limit),
        ("min_length", "minLength", whole),
        ("max_length", "maxLength", whole),
        ("pattern", "pattern", text),
        ("format", "format", text),
        ("items", "items", node),
        ("min_items", "minItems", whole),
        ("max_items", "maxItems", whole),
        ("properties", "properties", core_schema.dict_schema(text, node)),
        ("required", "required", core_schema.list_schema(text)),
        ("additional_properties", "additionalProperties", node),
        ("pattern_properties", "patternProperties", core_schema.dict_schema(text, anything)),
        ("all_of", "allOf", nodes),
        ("any_of", "anyOf", nodes),
        ("one_of", "oneOf", nodes),
    ]
    fields = {
        name: core_schema.typed_dict_field(core_schema.nullable_schema(check), required=False, validation_alias=alias)
        for name, alias, check in members
    }
    strict = core_schema.CoreConfig(strict=True)
    whole_node = core_schema.no_info_after_validator_function(
        lambda found: _Node(**found),
        core_schema.typed_dict_schema(fields, extra_behavior="ignore", config=strict),
        ref="node",
    )
    reference = core_schema.definition_reference_schema("node")
    return SchemaValidator(core_schema.definitions_schema(reference, [whole_node]), strict)


_READER = _reader()


class InputSchema:
    """The schema of a model's input, ready to check with.

    Args:
        schemas: `components.schemas` of a version's OpenAPI document, with `Input` among them.

    Raises:
        UnusableSchema: It is no schema, refers to something outside, or is too large.
    """

    def __init__(self, schemas: Any) -> None:
        if not isinstance(schemas, dict):
            raise UnusableSchema("the schemas are not an object")
        self._source: dict[str, Any] = {}
        self._nodes: dict[str, _Node] = {}
        self._patterns_left = _PATTERNS_LIMIT
        size = 0
        waiting = ["Input"]
        while waiting:
            name = waiting.pop()
            if name in self._nodes:
                continue
            if not isinstance(schemas.get(name), dict):
                raise UnusableSchema(f"the schema {name[:_SHOWN_CHARACTERS]!a} is missing")
            size = _measure(schemas[name], size)
            try:
                node: _Node = _READER.validate_python(schemas[name])
            except ValidationError as error:
                where = ".".join(str(part) for part in error.errors(include_url=False, include_input=False)[0]["loc"])
                raise UnusableSchema(f"it is malformed at {where[:200]!a}") from None
            self._source[name], self._nodes[name] = schemas[name], node
            waiting += self._prepare(node)

    @classmethod
    def from_openapi(cls, document: Any) -> "InputSchema":
        """Create from a version's `openapi_schema`.

        Raises:
            UnusableSchema: It holds no usable schema of an input.
        """
        components = document.get("components") if isinstance(document, dict) else None
        return cls(components.get("schemas") if isinstance(components, dict) else None)

    @classmethod
    def from_json(cls, text: str) -> "InputSchema":
        """Create from what `to_json` returned.

        Raises:
            UnusableSchema: It gave something else.
        """
        try:
            return cls(json.loads(text))
        except (ValueError, RecursionError):
            raise UnusableSchema("it is not JSON") from None

    def to_json(self) -> str:
        """Return `Input` and what it refers to as JSON text."""
        return json.dumps(self._source, separators=(",", ":"))

    def violations(self, value: Any) -> list[Violation]:
        """List an input's violations, at most `VIOLATIONS_LIMIT`, in the schema's order.

        Args:
            value: The input, parsed.

        Raises:
            NotChecked: That would take more than `STEPS_LIMIT` steps, or go too deep.
        """
        check = _Check(self._nodes)
        found: list[Violation] = []
        check.check(self._nodes["Input"], value, ("input",), found)
        return list({(each["field"], each["detail"]): each for each in found}.values())[:VIOLATIONS_LIMIT]

    def _prepare(self, root: _Node) -> Iterator[str]:
        """Compile a schema for checks; yield the names that it refers to."""
        waiting = [root]
        while waiting:
            node = waiting.pop()
            waiting += node.inner()
            if node.enum is not None:
                node._choices = frozenset(_comparable(choice) for choice in node.enum)
            if node.pattern is not None and self._patterns_left > 0:
                self._patterns_left -= 1
                node._matches = _compiled(node.pattern)
            if node.ref is not None:
                yield _name(node.ref)


class _Check:
    """One check: it counts its steps, so that no schema and no input can make it last.

    A step is a schema that meets a value, a name that is looked up, or a character that a pattern is matched with.
    """

    def __init__(self, nodes: Mapping[str, _Node]) -> None:
        self._nodes = nodes
        self._steps_left = STEPS_LIMIT

    def check(
        self, node: _Node | bool, value: Any, path: tuple[str, ...], found: list[Violation], depth: int = 0
    ) -> None:
        """Add a value's violations to `found`."""
        self._spend(1)
        if depth > _CHECK_DEPTH_LIMIT:
            raise NotChecked(f"the input or its schema is deeper than {_CHECK_DEPTH_LIMIT} levels")
        if len(found) >= VIOLATIONS_LIMIT or node is True:
            return
        if node is False:
            self._add(found, path, "No value is allowed here.")
            return
        if value is None and node.nullable:
            return
        if node.ref is not None:
            self.check(self._nodes[_name(node.ref)], value, path, found, depth + 1)
        if node.kinds:
            self._spend(len(node.kinds))
            if not any(_is(kind, value) for kind in node.kinds):
                self._add(found, path, f"Must be {_either(_KINDS[kind] for kind in node.kinds)}, not {_what(value)}.")
                return
        self._check_choice(node, value, path, found)
        if isinstance(value, str):
            self._check_text(node, value, path, found)
        elif isinstance(value, list):
            self._check_list(node, value, path, found, depth)
        elif isinstance(value, dict):
            self._check_object(node, value, path, found, depth)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            self._check_number(node, value, path, found)
        for part in node.all_of or ():
            self.check(part, value, path, found, depth + 1)
        for alternatives in (node.any_of, node.one_of):
            if alternatives:
                self._check_alternatives(alternatives, value, path, found, depth)

    def _check_choice(self, node: _Node, value: Any, path: tuple[str, ...], found: list[Violation]) -> None:
        # Lists and objects among the choices are not compared: they all look alike here.
        if node._choices is not None and _comparable(value) not in node._choices:
            choices = node.enum or []
            more = f" and {len(choices) - _SHOWN_CHOICES} more" if len(choices) > _SHOWN_CHOICES else ""
            shown = ", ".join(_shown(choice) for choice in choices[:_SHOWN_CHOICES])
            self._add(found, path, f"Must be one of {shown or 'no values at all'}{more}.")
        if node.const is not _ABSENT and _comparable(value) != _comparable(node.const):
            self._add(found, path, f"Must be {_shown(node.const)}.")

    def _check_number(self, node: _Node, value: float, path: tuple[str, ...], found: list[Violation]) -> None:
        least, most, above, below = node.minimum, node.maximum, node.exclusive_minimum, node.exclusive_maximum
        if isinstance(above, bool):  # OpenAPI 3.0: says how `minimum` is meant
            least, above = (None, least) if above else (least, None)
        if isinstance(below, bool):
            most, below = (None, most) if below else (most, None)
        limits: list[tuple[str, float | None, Callable[[float], bool]]] = [
            ("at least", least, lambda limit: value >= limit),
            ("at most", most, lambda limit: value <= limit),
            ("more than", above, lambda limit: value > limit),
            ("less than", below, lambda limit: value < limit),
        ]
        for words, limit, holds in limits:
            if limit is not None and not holds(limit):
                self._add(found, path, f"Must be {words} {_number(limit)} (got {_number(value)}).")

    def _check_text(self, node: _Node, value: str, path: tuple[str, ...], found: list[Violation]) -> None:
        self._check_length(node.min_length, node.max_length, len(value), "characters", path, found)
        # Cog opens these three and nothing else: python/cog/types.py in https://github.com/replicate/cog
        if node.format == "uri" and not value[:64].lstrip().lower().startswith(("http://", "https://", "data:")):
            self._add(found, path, "Must be a URL that begins with https://, http:// or data:.")
        if node._matches is not None and len(value) <= _PATTERN_TEXT_LIMIT_CHARACTERS:
            self._spend(100 + len(value))
            if not node._matches.isinstance_python(value):
                self._add(found, path, f"Must match the regular expression {_shown(node.pattern)}.")

    def _check_list(
        self, node: _Node, value: list[Any], path: tuple[str, ...], found: list[Violation], depth: int
    ) -> None:
        self._check_length(node.min_items, node.max_items, len(value), "elements", path, found)
        if node.items is not None:
            for place, element in enumerate(value):
                self.check(node.items, element, (*path, str(place)), found, depth + 1)

    def _check_object(
        self, node: _Node, value: dict[str, Any], path: tuple[str, ...], found: list[Violation], depth: int
    ) -> None:
        required, properties = node.required or [], node.properties or {}
        self._spend(len(required) + len(properties) + len(value))
        needed = set(required)
        for name in dict.fromkeys(required):
            if name not in value:
                self._add(found, (*path, name), "This field is required.")
        for name, part in properties.items():
            # Models disagree on the meaning of an explicit null for an optional input.
            if name in value and not (value[name] is None and name not in needed):
                self.check(part, value[name], (*path, name), found, depth + 1)
        if node.additional_properties is None or node.pattern_properties:
            return
        for name in value:
            if name in properties:
                continue
            if node.additional_properties is not False:
                self.check(node.additional_properties, value[name], (*path, name), found, depth + 1)
                continue
            known = ", ".join(f"`{each[:_SHOWN_CHARACTERS]}`" for each in islice(properties, _SHOWN_CHOICES))
            more = f" and {len(properties) - _SHOWN_CHOICES} more" if len(properties) > _SHOWN_CHOICES else ""
            self._add(found, (*path, name), f"{UNKNOWN_FIELD} Its fields are {known or 'none'}{more}.")

    def _check_alternatives(
        self, nodes: Sequence[_Node | bool], value: Any, path: tuple[str, ...], found: list[Violation], depth: int
    ) -> None:
        complaints = []
        for node in nodes:
            complaint: list[Violation] = []
            self.check(node, value, path, complaint, depth + 1)
            if not complaint:
                return
            # `anyOf: [{…}, {"type": "null"}]` is how an optional input is written: only the first is of interest.
            if not (isinstance(node, _Node) and set(node.kinds) == {"null"}):
                complaints.append(complaint)
        if len(complaints) == 1:
            found += complaints[0]
            return
        kinds = [_KINDS[kind] for node in nodes if isinstance(node, _Node) for kind in node.kinds]
        if all(isinstance(node, _Node) and node.kinds and not _is_any(node.kinds, value) for node in nodes):
            self._add(found, path, f"Must be {_either(kinds)}, not {_what(value)}.")
        else:
            self._add(found, path, f"Must match one of the {len(nodes)} forms that the model takes here.")

    def _check_length(
        self, least: int | None, most: int | None, length: int, unit: str, path: tuple[str, ...], found: list[Violation]
    ) -> None:
        if least is not None and length < least:
            self._add(found, path, f"Must have at least {_number(least)} {unit} (got {length}).")
        if most is not None and length > most:
            self._add(found, path, f"Must have at most {_number(most)} {unit} (got {length}).")

    def _add(self, found: list[Violation], path: tuple[str, ...], detail: str) -> None:
        self._spend(_SHOWN_CHOICES)
        if len(found) < VIOLATIONS_LIMIT:
            field = ".".join(part[:100] for part in path)[:300]
            found.append({"field": _printable(field), "detail": _printable(detail)})

    def _spend(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0:
            raise NotChecked(f"it would take more than {STEPS_LIMIT} steps")


def _measure(schema: Any, size: int) -> int:
    """Return `size` plus the size of a schema.

    Raises:
        UnusableSchema: It is too large or too deep.
    """
    waiting = [(schema, 1)]
    while waiting:
        part, depth = waiting.pop()
        size += 1 + (len(part) // _CHARACTERS_PER_VALUE if isinstance(part, str) else 0)
        if depth > _SCHEMA_DEPTH_LIMIT:
            raise UnusableSchema(f"it is deeper than {_SCHEMA_DEPTH_LIMIT} levels")
        inner: Iterable[Any] = (
            (*part, *part.values()) if isinstance(part, dict) else part if isinstance(part, list) else ()
        )
        waiting += [(each, depth + 1) for each in inner]
        if size + len(waiting) > _VALUES_LIMIT:
            raise UnusableSchema(f"it is larger than {_VALUES_LIMIT} values")
    return size


def _name(ref: str) -> str:
    """Return the name of the schema that a `$ref` refers to, in the same document.

    Raises:
        UnusableSchema: It names something else.
    """
    if not ref.startswith(_PREFIX):
        raise UnusableSchema("it refers to something outside of its own schemas")
    # A JSON pointer's own escapes: https://www.rfc-editor.org/rfc/rfc6901#section-3
    return ref.removeprefix(_PREFIX).replace("~1", "/").replace("~0", "~")


def _compiled(pattern: str) -> SchemaValidator | None:
    if len(pattern) > _PATTERN_LIMIT_CHARACTERS:
        return None
    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))
    except SchemaError:
        return None


def _is(kind: str, value: Any) -> bool:
    match kind:
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
        case "null":
            return value is None
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and (kind == "number" or value.is_integer()))


def _is_any(kinds: Sequence[str], value: Any) -> bool:
    return any(_is(kind, value) for kind in kinds)


def _comparable(value: Any) -> tuple[str, Any]:
    """Return a key that is equal for equal scalars: 1 is 1.0, but not true."""
    kind = _what(value)
    return kind, None if isinstance(value, list | dict) else value


def _what(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return next(words for kind, words in _KINDS.items() if _is(kind, value))


def _either(words: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(words))


def _shown(value: Any) -> str:
    """Return a short text for a value of the schema or the input."""
    if isinstance(value, list | dict):
        return _what(value)  # written out, it could be as long as the whole schema
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text[:_SHOWN_CHARACTERS]}{'…' if len(text) > _SHOWN_CHARACTERS else ''}`"


def _number(value: float) -> str:
    """Return a number as text, cut off where a schema made it long."""
    return json.dumps(value)[:_SHOWN_CHARACTERS]


def _printable(text: str) -> str:
    # Half a surrogate pair cannot be stored.
    return text.encode("utf-8", "replace").decode()
