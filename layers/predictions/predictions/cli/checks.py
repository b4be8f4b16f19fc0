"""Checks of a deployed stack: the result of one, and the ways in which one ends other than well."""

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.s3 import error_code
from predictions.cli.stack import PROGRAM, Stack
from predictions.errors import PredictionsError

# The codes with which AWS's services refuse a caller who lacks a permission.
# https://docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot_access-denied.html
_DENIED = frozenset(
    {
        "403",
        "AccessDenied",
        "AccessDeniedException",
        "AuthorizationError",
        "AuthorizationErrorException",
        "UnauthorizedOperation",
    }
)
# Those of something that does not exist, in the services that the checks ask.
_MISSING = frozenset(
    {
        "404",
        "AWS.SimpleQueueService.NonExistentQueue",
        "NoSuchBucket",
        "NotFound",
        "NotFoundException",
        "ParameterNotFound",
        "QueueDoesNotExist",
        "ResourceNotFoundException",
    }
)
_REDEPLOY = "Part of the stack was deleted outside of CloudFormation: restore it, or deploy a new stack."


class Result(StrEnum):
    """What a check found."""

    OK = "ok"
    FAILED = "failed"
    UNKNOWN = "unknown"


class CheckFailed(Exception):
    """Something is not as it has to be.

    Attributes:
        seen: What was found.
        action: What to do about it.
    """

    def __init__(self, seen: str, action: str) -> None:
        super().__init__(seen)
        self.seen = seen
        self.action = action


class CheckUnclear(Exception):
    """Something could not be found out.

    Attributes:
        why: The reason.
        action: What to do, to find it out.
    """

    def __init__(self, why: str, action: str) -> None:
        super().__init__(why)
        self.why = why
        self.action = action


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: The check's name: the same in each version, for machines.
        seen: What was found, or why nothing was.
        action: What to do; empty if all is well.
        seconds: How long the check took.
    """

    name: str
    result: Result
    seen: str
    action: str
    seconds: float


@dataclass(frozen=True)
class Check:
    """One question about the stack.

    Attributes:
        name: Its name.
        find: Returns what is as it has to be; raises `CheckFailed` or `CheckUnclear`.
    """

    name: str
    find: Callable[[], str]


def run(check: Check, clock: Callable[[], float] = time.monotonic) -> Finding:
    """Run a check; whatever AWS responds becomes a finding, so that the next one runs."""
    began = clock()
    result, seen, action = _result_of(check.find)
    return Finding(check.name, result, seen, action, round(clock() - began, 3))


def _result_of(find: Callable[[], str]) -> tuple[Result, str, str]:
    try:
        return Result.OK, find(), ""
    except CheckFailed as failed:
        return Result.FAILED, failed.seen, failed.action
    except CheckUnclear as unclear:
        return Result.UNKNOWN, unclear.why, unclear.action
    except ClientError as error:
        code, operation = error_code(error), error.operation_name
        if code in _DENIED:
            return Result.UNKNOWN, f"not permitted: {operation}", f"Allow {operation}: docs/aws.md lists all actions."
        if code in _MISSING:
            return Result.FAILED, f"{operation}: does not exist ({code})", _REDEPLOY
        return Result.UNKNOWN, f"{operation} failed: {error}", "Try again later."
    except BotoCoreError as error:
        return Result.UNKNOWN, str(error), "Check the network and the region, then try again."
    except PredictionsError as error:
        return Result.FAILED, str(error), _REDEPLOY
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        seen = f"a response could not be read ({type(error).__name__}: {error})"
        return Result.UNKNOWN, seen, "Check that this command has the version of the stack."


def expect(actual: Any, wanted: Any, what: str, action: str) -> str:
    """Return what is as wanted.

    Raises:
        CheckFailed: It is not.
    """
    if actual != wanted:
        raise CheckFailed(f"{what} is {actual} instead of {wanted}", action)
    return f"{what} is {actual}"


class Deployed:
    """A deployed stack as CloudFormation describes it, read once.

    Attributes:
        stack: Gives the clients of AWS.
        status: The stack's status, such as `UPDATE_COMPLETE`.
        parameters: The values of its parameters.
        outputs: The values of its outputs.
        resources: Type and physical id of its resources, by logical id.
        answered_at: AWS's time when it was described, by the `Date` of its response; None without one.
        described_at: The caller's time at the same moment.
    """

    def __init__(self, stack: Stack, now: Callable[[], float]) -> None:
        description, response = stack.description()
        self.described_at = now()
        self.stack = stack
        self.status = str(description["StackStatus"])
        self.parameters = {each["ParameterKey"]: each["ParameterValue"] for each in description.get("Parameters", [])}
        self.outputs = {each["OutputKey"]: each["OutputValue"] for each in description.get("Outputs", [])}
        self.answered_at = date_of(response.get("HTTPHeaders", {}))
        self.resources = {
            each["LogicalResourceId"]: (str(each["ResourceType"]), str(each.get("PhysicalResourceId", "")))
            for page in self.client("cloudformation")
            .get_paginator("list_stack_resources")
            .paginate(StackName=stack.name)
            for each in page["StackResourceSummaries"]
        }

    def client(self, service_name: str) -> Any:
        """Return the client of an AWS service."""
        return self.stack.client(service_name)

    def command(self, words: str) -> str:
        """Write a command of this program for this stack."""
        return f"{PROGRAM} {words} --stack {shlex.quote(self.stack.name)}"

    def id(self, logical_id: str) -> str:
        """Return the physical id of a resource.

        Raises:
            CheckFailed: The stack has no such resource.
        """
        _, physical_id = self.resources.get(logical_id, ("", ""))
        if not physical_id:
            raise CheckFailed(
                f"the stack has no {logical_id}", "Deploy this version of the stack again, and check its name."
            )
        return physical_id

    def ids(self, resource_type: str) -> dict[str, str]:
        """Return the physical ids of all resources of a type, by logical id."""
        return {name: id_ for name, (kind, id_) in sorted(self.resources.items()) if kind == resource_type}

    def parameter(self, key: str) -> str:
        """Return the value of a parameter; empty for one that the deployed version does not have."""
        return str(self.parameters.get(key, ""))


def date_of(headers: Mapping[str, str]) -> float | None:
    """Return the time in the `Date` header of a response, in Unix seconds, or None if it has no valid one."""
    try:
        return parsedate_to_datetime(headers["date"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None
