"""Shared by all commands: their registration, the stack, and output."""

import json
import os
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from inspect import Parameter, Signature, signature
from typing import Annotated, Any

import botocore.session
import typer
from botocore.config import Config
from botocore.exceptions import ClientError
from typer.core import TyperCommand

from predictions.errors import PredictionsError
from predictions.files.outputs_bucket import OutputsBucket
from predictions.ids import is_id
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction

PROGRAM = "replicate-serverless"

# A function may run for 15 minutes. By default botocore waits one minute, then invokes it a second time.
# https://docs.aws.amazon.com/lambda/latest/dg/configuration-timeout.html
_PATIENT = Config(read_timeout=960, tcp_keepalive=True)


class StackUnusable(PredictionsError):
    """The named stack does not exist, or is not one of this project."""


class NotDone(PredictionsError):
    """A command cannot do what it is asked to; the message says why, and what to do."""


class _Bucket(OutputsBucket):
    """The outputs bucket, accessed with the credentials of the command line."""

    def __init__(self, name: str, s3: Any) -> None:
        super().__init__(name)
        self._client = s3

    @property
    def _s3(self) -> Any:
        return self._client


class Stack:
    """A deployed stack, with the region and credentials of the command line.

    Region: `--region`, else AWS_REGION, else botocore's own order. AWS_ENDPOINT_URL is honoured.

    Attributes:
        name: The stack's name.
    """

    def __init__(self, name: str, region: str | None, profile: str | None) -> None:
        self.name = name
        self._region = region or os.environ.get("AWS_REGION") or None
        self._session = botocore.session.Session(profile=profile)
        self._clients: dict[str, Any] = {}

    def client(self, service_name: str) -> Any:
        """Return the client of an AWS service in the stack's region; one per service."""
        if service_name not in self._clients:
            config = _PATIENT if service_name == "lambda" else None
            self._clients[service_name] = self._session.create_client(
                service_name, region_name=self._region, config=config
            )
        return self._clients[service_name]

    @property
    def table(self) -> PredictionsTable:
        """The table with the stack's predictions."""
        return PredictionsTable(self.output("TableName"), self.outputs_bucket, self.client("dynamodb"))

    @property
    def outputs_bucket(self) -> OutputsBucket:
        """The stack's outputs bucket, which holds large payloads."""
        return _Bucket(self.output("OutputsBucketName"), self.client("s3"))

    def resource(self, logical_id: str) -> str:
        """Return the physical id of a resource: a function name, queue URL or secret ARN.

        Raises:
            StackUnusable: The stack does not exist, or has no such resource.
        """
        try:
            found = self.client("cloudformation").describe_stack_resource(
                StackName=self.name, LogicalResourceId=logical_id
            )
        except ClientError as error:
            if error.response["Error"]["Code"] != "ValidationError":
                raise
            raise StackUnusable(f"The stack {self.name!r} does not exist, or has no {logical_id}.") from error
        return str(found["StackResourceDetail"]["PhysicalResourceId"])

    def parameter(self, key: str) -> str:
        """Return the value of one of the stack's parameters.

        Raises:
            StackUnusable: The stack does not exist, or has no such parameter.
        """
        return self._described("Parameter", key)

    def invoke(self, function: str, event: Any) -> Any:
        """Invoke a function by its name and return its response.

        Raises:
            NotDone: The function failed.
        """
        response = self.client("lambda").invoke(FunctionName=function, Payload=json.dumps(event).encode())
        payload = response["Payload"].read().decode()
        if response.get("FunctionError"):
            raise NotDone(f"{function} failed: {payload[:500]}")
        return json.loads(payload)

    def output(self, key: str) -> str:
        """Return the value of one of the stack's outputs, such as `TableName`.

        Raises:
            StackUnusable: The stack does not exist, or has no such output.
        """
        return self._described("Output", key)

    def description(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return CloudFormation's description of the stack, and the metadata of its response.

        Raises:
            StackUnusable: The stack does not exist.
        """
        cloudformation = self.client("cloudformation")
        try:
            response: dict[str, Any] = cloudformation.describe_stacks(StackName=self.name)
        except ClientError as error:
            if "does not exist" not in error.response["Error"].get("Message", ""):
                raise
            raise StackUnusable(
                f"Found no stack {self.name!r} in {cloudformation.meta.region_name}."
                " Check the name, --region and --profile."
            ) from error
        return response["Stacks"][0], response.get("ResponseMetadata", {})

    def _described(self, kind: str, key: str) -> str:
        """Return a parameter or output of the stack."""
        stack, _ = self.description()
        for each in stack.get(f"{kind}s", []):
            if each[f"{kind}Key"] == key:
                return str(each[f"{kind}Value"])
        raise StackUnusable(
            f"The stack {self.name!r} ({stack['StackStatus']}) has no {kind.lower()} {key}:"
            " either it is not a replicate-serverless stack, or it is not completely deployed."
        )


def second(moment: int) -> str:
    """Format a time in Unix seconds as RFC 3339, in UTC."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def print_table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows as columns below a heading."""
    table = [heading, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def line(text: str, characters: int) -> str:
    """Shorten a text from outside, without control characters of the terminal."""
    shown = "".join(each if each.isprintable() else " " for each in text[: characters + 1])
    return shown if len(shown) <= characters else shown[: characters - 1] + "…"


def hidden(body: str) -> str:
    """Mask the task token in a body: it lets its holder complete the waiting state."""
    return re.sub(r'("task_token"\s*:\s*")[^"]*', r"\1…", body)


def found(table: PredictionsTable, prediction_id: str) -> Prediction:
    """Return the prediction that a command names.

    Raises:
        NotDone: The id belongs to no prediction.
    """
    prediction = table.get(prediction_id) if is_id(prediction_id) else None
    if prediction is None:
        raise NotDone(f"Found no prediction {prediction_id[:64]!r}.")
    return prediction


# -- registration of commands --------------------------------------------------------------------------------------

JsonList = Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")]
JsonObject = Annotated[bool, typer.Option("--json", help="Print a JSON object.")]
PredictionId = Annotated[str, typer.Argument(metavar="ID", help="The prediction's id.")]


def _options(
    stack: Annotated[str, typer.Option(help="Name of the deployed CloudFormation stack.")],
    region: Annotated[
        str | None, typer.Option(help="AWS region of the stack (default: AWS_REGION, else the profile's).")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="Profile of the AWS configuration to use.")] = None,
) -> Stack:
    """Make the stack from the options that every command has."""
    return Stack(stack, region, profile)


class _Command(TyperCommand):
    """A command that shows its usage with every usage error.

    Typer alone does not, if an option lacks its value.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            if getattr(error, "ctx", ctx) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            raise


def group(description: str | None = None) -> typer.Typer:
    """Make a group of commands with the settings that all groups share.

    Plain text instead of Rich's panels: the examples stay whole, and output is the same with and without a terminal.
    """
    return typer.Typer(help=description, rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


def command(app: typer.Typer, name: str, *, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command; its docstring is the help.

    The function's first parameter is the `Stack`, made from `--stack`, `--region` and `--profile`. The others are the
    command's own, as typer reads them.

    Args:
        app: The group of the command.
        name: The command's name in the group.
        example: One call of the command, for its help.
    """
    common = signature(_options, eval_str=True).parameters

    def register(run: Callable[..., None]) -> Callable[..., None]:
        def call(**given: Any) -> None:
            run(_options(*(given.pop(option) for option in common)), **given)

        _, *own = signature(run, eval_str=True).parameters.values()
        parameters = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in (*own, *common.values())]
        call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        call.__doc__ = run.__doc__
        # \b: the line is not wrapped.
        app.command(name, cls=_Command, epilog=f"\b\nExample: {PROGRAM} {example}")(call)
        return run

    return register
