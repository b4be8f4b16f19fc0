"""Templates: JSON with placeholders, `{{ expression }}`, filled from a context.

The budget around JMESPath is hand-made: no library of it bounds the steps or the memory of an expression.

An expression is JMESPath (https://jmespath.org/specification.html) over the context. A text that is exactly one
placeholder becomes what its expression finds, of whatever type; else what it finds is put into the text. What finds
nothing (null) is refused: `{{ object.metadata.title || 'untitled' }}` is how to write a default. A placeholder ends
at its first `}}`, so two braces that an expression needs get a space between them. Names of fields are never filled.

Templates and their context are both untrusted. JMESPath runs no code and finds everything in the
context, but `[@, @][] | [@, @][] | …` doubles a list with every step, and `max(rows)` looks through all rows in one.
So all of it is charged to an `Allowance`: the templates, reading their expressions, what the interpreter visits and
makes, and what functions and comparisons are given. One allowance covers everything that one message fills. Its steps
are the same on every machine, and are chosen to run out first; the wall-clock limit is for a machine that stalls.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jmespath import functions
from jmespath.exceptions import JMESPathError, JMESPathTypeError
from jmespath.parser import Parser
from jmespath.visitor import TreeInterpreter

from predictions.errors import PredictionsError

EXPRESSION_LIMIT_CHARACTERS = 256
"""The longest expression."""

PLACEHOLDERS_LIMIT = 64
"""The most placeholders in one text."""

STEPS_LIMIT = 200_000
"""The most steps of one allowance: about half a second of a whole processor, whatever they are spent on."""

SECONDS_LIMIT = 2.0
"""The wall-clock limit of one allowance. `STEPS_LIMIT` takes less, unless the machine stalls."""

TEMPLATE_DEPTH_LIMIT = 100
"""The deepest template: as deep as a request's JSON may be."""

# Of a text so many characters are one step: with the limit above, texts of 12 MB in all.
_CHARACTERS_PER_STEP = 64
# Functions that look into all that they are given, and not only at its outermost values.
_DEEP_FUNCTIONS = ("contains", "to_string")
_PLACEHOLDER = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_NUMBER_LIMIT = sys.float_info.max
# Errors that JMESPath's functions let through: `sum` of too much, `to_number` of a thousand digits, deep parentheses.
_FAILURES = (JMESPathError, ArithmeticError, ValueError, TypeError, AttributeError, RecursionError)


class PlaceholderError(PredictionsError):
    """A placeholder that cannot be parsed, or that finds nothing.

    Attributes:
        field: Where it is in the template, as `input.images.0`.
        detail: What is wrong, for the person who wrote it.
    """

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}")
        self.field = field
        self.detail = detail


class NothingFound(PlaceholderError):
    """A placeholder that finds nothing in this context, and may in another."""


class TooSlow(PredictionsError):
    """The wall-clock limit was reached: the machine stalled; a retry may succeed."""


class Allowance:
    """Steps and wall-clock time, shared by everything that one message fills.

    Args:
        steps: The most steps.
        seconds: The most seconds, counted from now.
        clock: A monotonic clock in seconds.
    """

    def __init__(
        self, *, steps: int | None = None, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.steps = 0
        self._limit = STEPS_LIMIT if steps is None else steps
        self._seconds = SECONDS_LIMIT if seconds is None else seconds
        self._clock = clock
        self._until = clock() + self._seconds

    def charge(self, steps: int) -> None:
        """Charge some steps.

        Raises:
            TooSlow: The time is used up.
        """
        self.steps += steps
        if self.steps > self._limit:
            raise _TooMuch
        if self._clock() > self._until:
            raise TooSlow(f"The placeholders were not filled within the limit of {self._seconds:g} seconds.")

    def charge_text(self, text: str) -> None:
        """Charge the steps of a text, besides the one of a value."""
        self.charge(len(text) // _CHARACTERS_PER_STEP)


class Filler:
    """Fills templates from one context.

    Args:
        context: What expressions look into: parsed JSON.
        allowance: What may be used; by default one of its own.
    """

    def __init__(self, context: Mapping[str, Any], allowance: Allowance | None = None) -> None:
        self._context = context
        self._allowance = allowance or Allowance()
        self._interpreter = _Interpreter(self._allowance)

    def fill(self, template: Any, field: str = "", *, encode: Callable[[str], str] | None = None) -> Any:
        """Fill a template's placeholders.

        Args:
            template: Parsed JSON.
            field: Where the template itself is, for what is refused.
            encode: Applied to each value that is put into a text after its beginning, as `quote` for URLs. A
                placeholder at the beginning is the base of the URL, and stays as it is.

        Returns:
            New JSON, which may share parts with the context.

        Raises:
            NothingFound: One finds nothing.
            PlaceholderError: One cannot be read, finds what is no JSON, or takes too many steps.
            TooSlow: The time of the allowance is used up.
        """
        return self._fill(template, field, 1, encode)

    def _fill(self, template: Any, field: str, depth: int, encode: Callable[[str], str] | None) -> Any:
        _check_depth(field, depth)
        self._charge(1, field)
        if isinstance(template, str):
            return self._fill_text(template, field, encode)
        if isinstance(template, Mapping):
            return {name: self._fill(part, _within(field, name), depth + 1, encode) for name, part in template.items()}
        if isinstance(template, list):
            return [self._fill(part, _within(field, place), depth + 1, encode) for place, part in enumerate(template)]
        return template

    def _fill_text(self, text: str, field: str, encode: Callable[[str], str] | None) -> Any:
        self._charge(len(text) // _CHARACTERS_PER_STEP, field)
        found: list[Any] = []
        for part in _parts(text, field, self._charge):
            if isinstance(part, _Expression):
                value = self._interpreter.find(part, self._context, field)
                found.append(encode(_text(value)) if encode and found else value)
            else:
                found.append(part)
        return found[0] if len(found) == 1 else "".join(map(_text, found))

    def _charge(self, steps: int, field: str) -> None:
        try:
            self._allowance.charge(steps)
        except _TooMuch:
            raise PlaceholderError(field, f"The template takes more than {STEPS_LIMIT} steps up to here.") from None


def fill(template: Any, context: Mapping[str, Any], allowance: Allowance | None = None) -> Any:
    """Fill one template: `Filler(context, allowance).fill(template)`."""
    return Filler(context, allowance).fill(template)


def expressions(template: Any) -> Iterator[tuple[str, str]]:
    """Yield the field and text of every expression in a template; check each.

    Raises:
        PlaceholderError: One cannot be read.
    """
    for field, text in _texts(template, "", 1):
        for part in _parts(text, field):
            if isinstance(part, _Expression):
                yield field, part.text


def holds_placeholders(value: Any) -> bool:
    """Return whether any text in a value has a placeholder, valid or not."""
    return any(_PLACEHOLDER.search(text) for _, text in _texts(value, "", 1))


@dataclass(frozen=True)
class Use:
    """A value of the context that an expression uses.

    Attributes:
        path: Its names, from the context: `("object", "url")`; empty for the context itself.
        optional: Whether it is left of a `||`, which gives a default.
    """

    path: tuple[str, ...]
    optional: bool


def uses_of(expression: str, depths: Mapping[str, int]) -> list[Use]:
    """Return what an expression uses, read from its syntax tree and never guessed from its text.

    Args:
        expression: From `expressions`.
        depths: How many names of a path are wanted, by its first name; one name unless given.

    Returns:
        Each with as many names as the expression gives, up to the wanted number: fewer where it uses a whole object.
    """
    walk = _Walk(depths)
    walk.as_value(walk.visit(Parser().parse(expression).parsed, (), optional=False), optional=False)
    return walk.uses


def unknown_root(root: str, known: Sequence[str]) -> str:
    """Return why an expression may not begin with a name, for the person who wrote it."""
    *first, last = (f"`{name}`" for name in known)
    listed = f"{', '.join(first)} or {last}" if len(first) > 1 else ", ".join((*first, last))
    return f"An expression must begin with {listed} (got `{root[:32]}`).{_nearest(root, known)}"


def check_uses(
    template: Any,
    roots: Sequence[str],
    fields: Mapping[str, Collection[str]] | None = None,
    elsewhere: Collection[str] = (),
) -> Iterator[dict[str, str]]:
    """Yield `{"field", "detail"}` of each expression that uses a value which its context never has.

    Args:
        template: The template.
        roots: The names of the context.
        fields: The names within a root, where they are known. An expression with a default may use others.
        elsewhere: The names of other contexts, which an expression may use beside those of this one.

    Raises:
        PlaceholderError: An expression cannot be read.
    """
    fields = fields or {}
    for place, expression in expressions(template):
        uses = uses_of(expression, dict.fromkeys(fields, 2))
        tolerated = elsewhere if any(not use.path or use.path[0] in roots for use in uses) else ()
        for use in uses:
            root, name = (*use.path, "", "")[:2]
            if root and root not in roots:
                if root not in tolerated:
                    yield {"field": place, "detail": f"`{{{{ {expression} }}}}`: {unknown_root(root, roots)}"}
            elif name and not use.optional and name not in fields.get(root, (name,)):
                known = ", ".join(f"`{each}`" for each in sorted(fields[root])) or "none"
                said = f"`{root}` has no `{name[:32]}`. Its fields are {known}.{_nearest(name, fields[root])}"
                yield {"field": place, "detail": f"`{{{{ {expression} }}}}`: {said[:500]}"}


def _nearest(name: str, known: Collection[str]) -> str:
    from difflib import get_close_matches  # only for what is refused

    near = get_close_matches(name[:64], known, 1)
    return f" Did you mean `{near[0][:32]}`?" if near else ""


# The path of values below a named one, of which nothing more is known.
_BELOW = ("*",)


class _Walk:
    """A walk through the syntax tree of an expression.

    Attributes:
        uses: What it has found.
    """

    def __init__(self, depths: Mapping[str, int]) -> None:
        self.uses: list[Use] = []
        self._depths = depths

    def visit(self, node: Any, at: tuple[str, ...], *, optional: bool) -> tuple[str, ...]:
        """Return a node's result as a path from the context; add to `uses` what is used of it.

        Args:
            node: Of JMESPath's syntax tree.
            at: The path of the value that it is applied to.
            optional: Whether its result has a default.
        """
        kind, children = node["type"], node["children"]
        match kind:
            case "field":
                return self._field(at, node["value"], optional=optional)
            case "identity" | "current":
                return at
            case "literal":
                return _BELOW
            case "subexpression" | "pipe" | "index_expression":
                for child in children:
                    if child["type"] in ("index", "slice"):
                        at = self.as_value(at, optional=optional)
                    else:
                        at = self.visit(child, at, optional=optional)
                return at
            case "projection" | "value_projection" | "filter_projection":
                left, *others = children
                within = self.as_value(self.visit(left, at, optional=optional), optional=optional)
                for child in others:
                    self.visit(child, within, optional=optional)
                return _BELOW
            case "or_expression":
                first, *others = children
                self.as_value(self.visit(first, at, optional=True), optional=True)
                for child in others:
                    self.as_value(self.visit(child, at, optional=optional), optional=optional)
                return _BELOW
            case "expref":
                self.visit(children[0], _BELOW, optional=optional)
                return _BELOW
            case _:  # functions, comparisons, lists and objects: each part is a value of its own
                for child in children:
                    self.as_value(self.visit(child, at, optional=optional), optional=optional)
                return _BELOW

    def as_value(self, path: tuple[str, ...], *, optional: bool) -> tuple[str, ...]:
        """Use the value at a path; return the path of what is below it."""
        if path != _BELOW:
            self.uses.append(Use(path, optional))
        return _BELOW

    def _field(self, at: tuple[str, ...], name: str, *, optional: bool) -> tuple[str, ...]:
        if at == _BELOW:
            return _BELOW
        path = (*at, name)
        return path if len(path) < self._depths.get(path[0], 1) else self.as_value(path, optional=optional)


class _Expression:
    """An expression that can be read.

    Attributes:
        text: As it was written, without the space around it.
        tree: What the interpreter visits.
    """

    def __init__(self, text: str, field: str) -> None:
        self.text = text.strip()
        if len(self.text) > EXPRESSION_LIMIT_CHARACTERS:
            raise PlaceholderError(field, f"A placeholder has at most {EXPRESSION_LIMIT_CHARACTERS} characters.")
        try:
            self.tree = Parser().parse(self.text).parsed
        except _FAILURES:
            detail = f"{self.shown} is not JMESPath (https://jmespath.org)."
            raise PlaceholderError(field, detail) from None

    @property
    def shown(self) -> str:
        """Return it as errors quote it."""
        return f"`{{{{ {self.text} }}}}`"


class _TooMuch(ArithmeticError):
    """More steps than the allowance has."""


class _Functions(functions.Functions):  # type: ignore[misc]  # jmespath has no types
    """JMESPath's functions, with what they are given charged before they run."""

    def __init__(self, allowance: Allowance) -> None:
        super().__init__()
        self._allowance = allowance

    def call_function(self, function_name: str, resolved_args: list[Any]) -> Any:
        for argument in resolved_args:
            if function_name in _DEEP_FUNCTIONS:
                _measure(argument, self._allowance)
            elif isinstance(argument, list):
                self._allowance.charge(len(argument))
                for each in argument:
                    if isinstance(each, str):
                        self._allowance.charge_text(each)
            elif isinstance(argument, dict):
                self._allowance.charge(len(argument))
            elif isinstance(argument, str):
                self._allowance.charge_text(argument)
        if function_name == "join" and len(resolved_args) == 2:
            separator, texts = resolved_args
            if isinstance(separator, str) and isinstance(texts, list):
                # Before the text is made: a long separator between many texts is more than the memory holds.
                self._allowance.charge(len(separator) * len(texts) // _CHARACTERS_PER_STEP)
        return super().call_function(function_name, resolved_args)


class _Interpreter(TreeInterpreter):  # type: ignore[misc]  # jmespath has no types
    """JMESPath's interpreter, with all that it does charged to an allowance."""

    def __init__(self, allowance: Allowance) -> None:
        super().__init__()
        self._allowance = allowance
        self._functions = _Functions(allowance)
        self.COMPARATOR_FUNC = {name: self._charged(each) for name, each in TreeInterpreter.COMPARATOR_FUNC.items()}

    def find(self, expression: _Expression, context: Mapping[str, Any], field: str) -> Any:
        """Evaluate an expression.

        Raises:
            PlaceholderError: Nothing, what is no JSON, or not within `STEPS_LIMIT`.
            TooSlow: Not within the time of the allowance.
        """
        try:
            found = self.visit(expression.tree, context)
            _measure(found, self._allowance)
        except _TooMuch:
            detail = (
                f"{expression.shown} takes too many steps, or finds too much: the limit is {STEPS_LIMIT} steps in all."
            )
            raise PlaceholderError(field, detail) from None
        except _FAILURES as error:
            raise PlaceholderError(field, f"{expression.shown} cannot be filled: {_reason(error)}") from None
        if found is None:
            detail = f"{expression.shown} finds nothing here; `{{{{ {expression.text} || 'default' }}}}` would."
            raise NothingFound(field, detail)
        return found

    def visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
        self._allowance.charge(1)
        return super().visit(node, *args, **kwargs)

    # Only these make anything new; all else hands parts of what is there on, or lists of them.

    def visit_multi_select_dict(self, node: Any, value: Any) -> Any:
        return self._measured(super().visit_multi_select_dict(node, value))

    def visit_multi_select_list(self, node: Any, value: Any) -> Any:
        return self._measured(super().visit_multi_select_list(node, value))

    def visit_function_expression(self, node: Any, value: Any) -> Any:
        return self._measured(super().visit_function_expression(node, value))

    def visit_flatten(self, node: Any, value: Any) -> Any:
        base = self.visit(node["children"][0], value)
        if not isinstance(base, list):
            return None
        # Also the empty lists, of which nothing is left in what is made.
        self._allowance.charge(len(base))
        made: list[Any] = []
        for each in base:
            made += each if isinstance(each, list) else [each]
        return self._measured(made)

    def visit_slice(self, node: Any, value: Any) -> Any:
        if isinstance(value, list):
            self._allowance.charge(len(value))
        return super().visit_slice(node, value)

    def _charged(self, compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Return a comparison that charges for long operands."""

        def compare_charged(left: Any, right: Any) -> Any:
            for each in (left, right):
                if isinstance(each, str):
                    self._allowance.charge_text(each)
                elif isinstance(each, list | dict):
                    _measure(each, self._allowance)
            return compare(left, right)

        return compare_charged

    def _measured(self, value: Any) -> Any:
        _measure(value, self._allowance)
        return value


def _measure(value: Any, allowance: Allowance) -> None:
    """Charge for a value and everything in it, as often as it occurs in the text.

    Raises:
        ValueError: It is no JSON.
    """
    waiting = [value]
    while waiting:
        part = waiting.pop()
        allowance.charge(1)
        if isinstance(part, str):
            allowance.charge_text(part)
            _check_characters(part)
        elif isinstance(part, dict):
            waiting += part.keys()
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, int | float) and not -_NUMBER_LIMIT <= part <= _NUMBER_LIMIT:
            raise ValueError("it is no number that JSON can carry")
        elif part is not None and not isinstance(part, bool | int | float):
            raise ValueError("it finds no value")


def _reason(error: Exception) -> str:
    """Return why an expression cannot be filled."""
    if isinstance(error, JMESPathTypeError):
        # Its own text quotes the value, which may be megabytes.
        expected = ", ".join(map(str, error.expected_types))
        return f"{error.function_name}() takes {expected}, and is given {error.actual_type}"[:300]
    return " ".join(str(error)[:1000].split())[:300]


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        # A literal's escape makes one; it cannot be stored.
        raise ValueError("it finds half of a surrogate pair, which is no character") from None


def _parts(
    text: str, field: str, charge: Callable[[int, str], None] = lambda _steps, _field: None
) -> Iterator[str | _Expression]:
    """Split a text into literal parts and expressions; yield at least one part.

    Args:
        text: The text.
        field: Where it is in the template.
        charge: Takes the steps of reading an expression, one for each character.

    Raises:
        PlaceholderError: An expression cannot be read, or there are too many.
    """
    end = 0
    for count, placeholder in enumerate(_PLACEHOLDER.finditer(text)):
        if count >= PLACEHOLDERS_LIMIT:
            raise PlaceholderError(field, f"A text has at most {PLACEHOLDERS_LIMIT} placeholders.")
        begin, following = placeholder.span()
        if begin > end:
            yield text[end:begin]
        charge(min(len(placeholder[1]), EXPRESSION_LIMIT_CHARACTERS), field)
        yield _Expression(placeholder[1], field)
        end = following
    if "{{" in text[end:]:
        raise PlaceholderError(field, "A placeholder begins with `{{` and does not end with `}}`.")
    if end < len(text) or end == 0:
        yield text[end:]


def _texts(value: Any, field: str, depth: int) -> Iterator[tuple[str, str]]:
    _check_depth(field, depth)
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _texts(part, _within(field, name), depth + 1)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _texts(part, _within(field, index), depth + 1)


def _check_depth(field: str, depth: int) -> None:
    if depth > TEMPLATE_DEPTH_LIMIT + 1:
        raise PlaceholderError(field[:200], f"It is nested deeper than {TEMPLATE_DEPTH_LIMIT} levels.")


def _within(field: str, name: str | int) -> str:
    return f"{field}.{name}" if field else str(name)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _text(value: Any) -> str:
    """Return a found value as a part of a text."""
    return value if isinstance(value, str) else _json(value)
