"""Templates: JSON whose texts may hold placeholders, `{{ expression }}`, that are filled from a context.

An expression is JMESPath (https://jmespath.org/specification.html) over the context. A text that is exactly one
placeholder becomes what its expression finds, of whatever type; else what it finds is put into the text. What finds
nothing (null) is refused: `{{ object.metadata.title || 'untitled' }}` is how to write a default. A placeholder ends
at its first `}}`, so two braces that an expression needs get a space between them. Names of fields are never filled.

Templates and what they are filled from are both strangers' text. JMESPath runs no code and finds everything in the
context, but `[@, @][] | [@, @][] | …` doubles a list with every step: so the interpreter counts what it visits and
what it makes, and stops at `STEPS_LIMIT`, or at `SECONDS_LIMIT`.
"""

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jmespath import functions
from jmespath.exceptions import JMESPathError
from jmespath.parser import Parser
from jmespath.visitor import TreeInterpreter

from predictions.errors import PredictionsError

EXPRESSION_LIMIT_CHARACTERS = 256
"""The longest expression."""

PLACEHOLDERS_LIMIT = 64
"""The most placeholders in one text."""

STEPS_LIMIT = 200_000
"""The most steps of one filling: half a second, where they are spent on nothing but counting."""

SECONDS_LIMIT = 5.0
"""The longest one filling computes: a single step, such as `max(rows)`, may look through a long list."""

TEMPLATE_DEPTH_LIMIT = 100
"""The deepest template: as deep as a request's JSON may be."""

# Of a text so many characters are one step: with the limit above, texts of 12 MB in all.
_CHARACTERS_PER_STEP = 64
_PLACEHOLDER = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_NUMBER_LIMIT = sys.float_info.max
# What JMESPath's own functions let through: `sum` of too much, `to_number` of a thousand digits, deep parentheses.
_FAILURES = (JMESPathError, ArithmeticError, ValueError, TypeError, AttributeError, RecursionError)


class PlaceholderError(PredictionsError):
    """A placeholder that cannot be read, or that finds nothing.

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


class Filler:
    """Fills templates from one context; all of them share `STEPS_LIMIT`.

    Args:
        context: What expressions look into: parsed JSON.
    """

    def __init__(self, context: Mapping[str, Any]) -> None:
        self._context = context
        self._interpreter = _Interpreter()

    def fill(self, template: Any, field: str = "") -> Any:
        """A template with its placeholders filled.

        Args:
            template: Parsed JSON.
            field: Where the template itself is, for what is refused.

        Returns:
            New JSON, which may share parts with the context.

        Raises:
            NothingFound: One finds nothing.
            PlaceholderError: One cannot be read, finds what is no JSON, or takes too many steps.
        """
        return self._fill(template, field, 1)

    def _fill(self, template: Any, field: str, depth: int) -> Any:
        _check_depth(field, depth)
        if isinstance(template, str):
            return self._fill_text(template, field)
        if isinstance(template, Mapping):
            return {name: self._fill(part, _within(field, name), depth + 1) for name, part in template.items()}
        if isinstance(template, list):
            return [self._fill(part, _within(field, place), depth + 1) for place, part in enumerate(template)]
        return template

    def _fill_text(self, text: str, field: str) -> Any:
        found = [
            self._interpreter.find(part, self._context, field) if isinstance(part, _Expression) else part
            for part in _parts(text, field)
        ]
        return (
            found[0] if len(found) == 1 else "".join(part if isinstance(part, str) else _json(part) for part in found)
        )


def fill(template: Any, context: Mapping[str, Any]) -> Any:
    """`Filler(context).fill(template)`, for one template."""
    return Filler(context).fill(template)


def expressions(template: Any) -> Iterator[tuple[str, str]]:
    """The place and the text of every expression in a template, each one checked to be JMESPath.

    Raises:
        PlaceholderError: One cannot be read.
    """
    for field, text in _texts(template, "", 1):
        for part in _parts(text, field):
            if isinstance(part, _Expression):
                yield field, part.text


def holds_placeholders(value: Any) -> bool:
    """Whether any text in a value has a placeholder, readable or not."""
    return any(_PLACEHOLDER.search(text) for _, text in _texts(value, "", 1))


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
        """As it is named in a refusal."""
        return f"`{{{{ {self.text} }}}}`"


class _TooMuch(ArithmeticError):
    """More steps than one filling may take."""


class _Interpreter(TreeInterpreter):  # type: ignore[misc]  # jmespath has no types
    """JMESPath's interpreter, with all that it does counted."""

    def __init__(self) -> None:
        super().__init__()
        self._functions = functions.Functions()
        self._steps = 0
        self._until = time.thread_time() + SECONDS_LIMIT

    def find(self, expression: _Expression, context: Mapping[str, Any], field: str) -> Any:
        """What an expression finds.

        Raises:
            PlaceholderError: Nothing, what is no JSON, or not within `STEPS_LIMIT`.
        """
        try:
            found = self.visit(expression.tree, context)
            self._measure(found)
        except _TooMuch:
            raise PlaceholderError(field, f"{expression.shown} takes too many steps, or finds too much.") from None
        except _FAILURES as error:
            reason = " ".join(str(error).split())[:300]
            raise PlaceholderError(field, f"{expression.shown} cannot be filled: {reason}") from None
        if found is None:
            detail = f"{expression.shown} finds nothing here; `{{{{ {expression.text} || 'default' }}}}` would."
            raise NothingFound(field, detail)
        return found

    def visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
        self._count(1)
        return super().visit(node, *args, **kwargs)

    # Only these make anything new; all else hands parts of what is there on, or lists of them.

    def visit_multi_select_dict(self, node: Any, value: Any) -> Any:
        return self._measured(super().visit_multi_select_dict(node, value))

    def visit_multi_select_list(self, node: Any, value: Any) -> Any:
        return self._measured(super().visit_multi_select_list(node, value))

    def visit_function_expression(self, node: Any, value: Any) -> Any:
        return self._measured(super().visit_function_expression(node, value))

    def visit_flatten(self, node: Any, value: Any) -> Any:
        return self._measured(super().visit_flatten(node, value))

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > STEPS_LIMIT or time.thread_time() > self._until:
            raise _TooMuch

    def _measured(self, value: Any) -> Any:
        self._measure(value)
        return value

    def _measure(self, value: Any) -> None:
        """Counts a value with all that is in it, as often as it is in it: so large it is as text."""
        waiting = [value]
        while waiting:
            part = waiting.pop()
            self._count(1)
            if isinstance(part, str):
                self._count(len(part) // _CHARACTERS_PER_STEP)
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


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        # A literal's escape makes one; it cannot be stored.
        raise ValueError("it finds half of a surrogate pair, which is no character") from None


def _parts(text: str, field: str) -> Iterator[str | _Expression]:
    """A text's literal parts and its expressions, in their order; at least one part.

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
