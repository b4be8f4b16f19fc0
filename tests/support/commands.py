"""The commands of `replicate-serverless` for tests of them and of pages, and those of AWS that they print."""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from botocore import xform_name
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


# Names that the AWS CLI gives to options, where they are not those of the parameters.
_RENAMED = {("sns", "subscribe", "notification-endpoint"): "Endpoint"}


def call_of(command: str, client_of: Callable[[str], Any]) -> tuple[Any, str, dict[str, Any]]:
    """The call that a command of the AWS CLI makes: its client, its operation and its parameters.

    Raises:
        AssertionError: The service has no such operation, or it has no such parameter.
    """
    program, service, name, *words = shlex.split(command)
    assert program == "aws"
    client = client_of({"s3api": "s3"}.get(service, service))
    model = client.meta.service_model
    operations = {xform_name(each, "-"): each for each in model.operation_names}
    assert name in operations, command
    shape = model.operation_model(operations[name]).input_shape
    members = {xform_name(each, "-"): each for each in shape.members}
    asked: dict[str, Any] = {}
    while words:
        option = words.pop(0).removeprefix("--")
        positive = option.removeprefix("no-")
        member = _RENAMED.get((service, name, option)) or members.get(option) or members.get(positive)
        assert member, f"{command}: --{option}"
        kind = shape.members[member].type_name
        if kind == "boolean":
            asked[member] = option == positive or option in members
            continue
        text = words.pop(0)
        read: Mapping[str, Callable[[str], Any]]
        read = {"structure": json.loads, "list": json.loads, "integer": int, "double": float}
        asked[member] = read.get(kind, str)(text)
    return client, operations[name], asked


def paste(command: str, client_of: Callable[[str], Any]) -> None:
    """Make the call of a command of the AWS CLI."""
    client, operation, asked = call_of(command, client_of)
    getattr(client, xform_name(operation))(**asked)
