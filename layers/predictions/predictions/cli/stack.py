"""A deployed stack, as commands find it, and how they print what they find."""

import json
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import ClientError

from predictions.errors import PredictionsError
from predictions.outputs import OutputsBucket
from predictions.table import Prediction, PredictionsTable, is_id

# A function may take 15 minutes. By default, botocore waits for one, and then invokes it again beside the first.
# https://docs.aws.amazon.com/lambda/latest/dg/configuration-timeout.html
_PATIENT = Config(read_timeout=960, tcp_keepalive=True)


class StackUnusable(PredictionsError):
    """The named stack is not there, or is not one of this project's."""


class NotDone(PredictionsError):
    """A command cannot do what it was asked to; the message says why, and what to do."""


class _Bucket(OutputsBucket):
    """The outputs bucket, by the credentials of the command line."""

    def __init__(self, name: str, s3: Any) -> None:
        super().__init__(name)
        self._client = s3

    @property
    def _s3(self) -> Any:
        return self._client


class Stack:
    """A deployed stack, found by its name, with the region and credentials of the command line.

    Region: `--region`, else AWS_REGION, else as botocore finds one. AWS_ENDPOINT_URL is honoured.

    Attributes:
        name: Its name.
    """

    def __init__(self, name: str, region: str | None, profile: str | None) -> None:
        self.name = name
        self._region = region or os.environ.get("AWS_REGION") or None
        self._session = botocore.session.Session(profile=profile)
        self._clients: dict[str, Any] = {}

    def client(self, service_name: str) -> Any:
        """A client of an AWS service in the stack's region; one of each service."""
        if service_name not in self._clients:
            config = _PATIENT if service_name == "lambda" else None
            self._clients[service_name] = self._session.create_client(
                service_name, region_name=self._region, config=config
            )
        return self._clients[service_name]

    @property
    def table(self) -> PredictionsTable:
        """Its predictions."""
        return PredictionsTable(self.output("TableName"), self.outputs_bucket, self.client("dynamodb"))

    @property
    def outputs_bucket(self) -> OutputsBucket:
        """Its outputs bucket, for payloads."""
        return _Bucket(self.output("OutputsBucketName"), self.client("s3"))

    def resource(self, logical_id: str) -> str:
        """The physical id of one of the stack's resources: a function's name, a queue's URL, a secret's ARN.

        Raises:
            StackUnusable: There is no such stack, or it has no such resource.
        """
        try:
            found = self.client("cloudformation").describe_stack_resource(
                StackName=self.name, LogicalResourceId=logical_id
            )
        except ClientError as error:
            if error.response["Error"]["Code"] != "ValidationError":
                raise
            raise StackUnusable(f"The stack {self.name!r} is not there, or has no {logical_id}.") from error
        return str(found["StackResourceDetail"]["PhysicalResourceId"])

    def parameter(self, key: str) -> str:
        """The value of one of the parameters that the stack was deployed with.

        Raises:
            StackUnusable: There is no such stack, or it has no such parameter.
        """
        return self._told("Parameter", key)

    def invoke(self, function: str, event: Any) -> Any:
        """Invokes a function by its name, and waits for its answer.

        Raises:
            NotDone: It fails.
        """
        answer = self.client("lambda").invoke(FunctionName=function, Payload=json.dumps(event).encode())
        said = answer["Payload"].read().decode()
        if answer.get("FunctionError"):
            raise NotDone(f"{function} fails: {said[:500]}")
        return json.loads(said)

    def output(self, key: str) -> str:
        """The value of one of the stack's outputs, such as `TableName`.

        Raises:
            StackUnusable: There is no such stack, or it has no such output.
        """
        return self._told("Output", key)

    def _told(self, kind: str, key: str) -> str:
        """One of the values that CloudFormation tells of the stack."""
        cloudformation = self.client("cloudformation")
        try:
            stack = cloudformation.describe_stacks(StackName=self.name)["Stacks"][0]
        except ClientError as error:
            if "does not exist" not in error.response["Error"].get("Message", ""):
                raise
            raise StackUnusable(
                f"There is no stack {self.name!r} in {cloudformation.meta.region_name}."
                " Check its name, --region and --profile."
            ) from error
        for each in stack.get(f"{kind}s", []):
            if each[f"{kind}Key"] == key:
                return str(each[f"{kind}Value"])
        raise StackUnusable(
            f"The stack {self.name!r} ({stack['StackStatus']}) has no {kind.lower()} {key}:"
            " either it is not one of replicate-serverless, or it is not deployed completely."
        )


def second(moment: int) -> str:
    """A moment as text, to the second."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def print_table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Prints rows below their heading."""
    table = [heading, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def line(text: str, characters: int) -> str:
    """A text of strangers as a part of a line: nothing in it moves the terminal's cursor."""
    shown = "".join(each if each.isprintable() else " " for each in text[: characters + 1])
    return shown if len(shown) <= characters else shown[: characters - 1] + "…"


def hidden(body: str) -> str:
    """A body without the token of a state that waits, which is somebody's to keep."""
    return re.sub(r'("task_token"\s*:\s*")[^"]*', r"\1…", body)


def found(table: PredictionsTable, prediction_id: str) -> Prediction:
    """A prediction that a command names.

    Raises:
        NotDone: There is none.
    """
    prediction = table.get(prediction_id) if is_id(prediction_id) else None
    if prediction is None:
        raise NotDone(f"There is no prediction {prediction_id[:64]!r}.")
    return prediction
