"""The commands of `replicate-serverless`, as what tests of them and of pages go through."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from predictions.cli.__main__ import app, main
from predictions.cli.stack import Stack
from typer.main import get_command


def _named(command: Any, *names: str) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Each command below one by its names, and whether it is a group."""
    for name, each in command.commands.items():
        is_group = hasattr(each, "commands")
        yield (*names, name), is_group
        if is_group:
            yield from _named(each, *names, name)


_ALL = dict(_named(get_command(app)))
COMMANDS = [names for names, is_group in _ALL.items() if not is_group]
GROUPS = [names for names, is_group in _ALL.items() if is_group]


class _Parsed(Exception):
    """A command got as far as its stack: it is one, and complete."""


def stack_of(words: Sequence[str]) -> str:
    """The stack that a command names; it does not run.

    Raises:
        AssertionError: It is no command, or not a complete one.
    """

    def parsed(_: Stack, name: str, *__: Any) -> None:
        raise _Parsed(name)

    with pytest.MonkeyPatch.context() as only_here:
        only_here.setattr(Stack, "__init__", parsed)
        try:
            code = main(words)
        except _Parsed as found:
            return str(found)
    raise AssertionError(f"{words} ends with {code} before it has a stack")
