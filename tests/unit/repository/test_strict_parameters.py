"""Calls that botocore lets through and AWS refuses fail the test that makes them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from botocore.exceptions import ParamValidationError
from botocore.session import Session
from predictions.aws import clients

from tests.attacks.stack import QuickClients
from tests.simulation.installed import installed
from tests.support import strict_parameters
from tests.support.aws_clients import Clients
from tests.support.fixtures import ENVIRONMENT
from tests.support.strict_parameters import RefusedByAws, check_call, make_check, refused
from tests.support.template import FUNCTIONS, actions

MACHINE = ENVIRONMENT["STATE_MACHINE_ARN"]
QUEUE = ENVIRONMENT["REQUESTS_QUEUE_URL"]
KEY = {"pk": {"S": "a"}, "sk": {"S": "status"}}
TARGET = {"Arn": "arn:aws:sqs:us-east-1:123456789012:requests", "RoleArn": ENVIRONMENT["SCHEDULER_ROLE_ARN"]}
SCHEDULE = {"ScheduleExpression": "rate(1 hour)", "FlexibleTimeWindow": {"Mode": "OFF"}, "Target": TARGET}
RULE = {"EventPattern": "{}", "EventBusName": "bus"}

CALLS: list[tuple[str, str, dict[str, Any], str]] = [
    ("events", "PutRule", {"Name": "r" * 65, **RULE}, "Name has 65 characters, must have at most 64"),
    ("events", "PutRule", {"Name": "a b", **RULE}, "Name does not match"),
    ("events", "PutRule", {"Name": "r", **RULE, "State": "ON"}, "State is none of ['DISABLED', 'ENABLED'"),
    ("events", "PutTargets", {"Rule": "r", "Targets": [{"Id": "t" * 65, "Arn": "arn:x"}]}, "Targets[0].Id has 65"),
    ("scheduler", "CreateSchedule", {"Name": "s" * 65, **SCHEDULE}, "Name has 65 characters"),
    (
        "scheduler",
        "CreateSchedule",
        {"Name": "s", **SCHEDULE, "Target": {**TARGET, "RetryPolicy": {"MaximumRetryAttempts": 186}}},
        "Target.RetryPolicy.MaximumRetryAttempts is 186, must be at most 185",
    ),
    ("stepfunctions", "StartExecution", {"stateMachineArn": MACHINE, "name": "n" * 81}, "name has 81 characters"),
    ("stepfunctions", "StartExecution", {"stateMachineArn": MACHINE, "traceHeader": "é"}, "traceHeader does not"),
    ("dynamodb", "GetItem", {"TableName": "t" * 1025, "Key": KEY}, "TableName has 1025 characters"),
    ("dynamodb", "PutItem", {"TableName": "t", "Item": KEY, "ReturnValues": "SOME"}, "ReturnValues is none of"),
    (
        "dynamodb",
        "BatchGetItem",
        {"RequestItems": {"t": {"Keys": [{"pk": {"S": str(n)}} for n in range(101)]}}},
        "RequestItems['t'].Keys has 101 entries, must have at most 100",
    ),
    ("ssm", "GetParameter", {"Name": "n" * 2049}, "Name has 2049"),
    ("secretsmanager", "GetSecretValue", {"SecretId": "s" * 2049}, "SecretId has 2049"),
    ("lambda", "Invoke", {"FunctionName": "a function"}, "FunctionName does not match"),
]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """These calls shall be refused: they do not fail the test."""
    yield
    refused.clear()


def of_session(service: str) -> Any:
    create: Any = Session().create_client
    return create(service, region_name="us-east-1")


@pytest.mark.parametrize(("service", "operation", "parameters", "reason"), CALLS)
def test_call_that_botocore_lets_through_and_aws_refuses_is_refused(
    cloud: None, service: str, operation: str, parameters: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RefusedByAws) as told:
        of_session(service)._make_api_call(operation, parameters)
    assert str(told.value).startswith(f"{service}:{operation}: {reason}")
    # Code that catches everything does not hide it: the fixture of all unit tests fails the test for this.
    assert refused == [str(told.value)]


@pytest.mark.parametrize(
    "of_tests",
    [clients.client, of_session, Clients(), QuickClients()],
    ids=["library", "session", "simulation", "attacks"],
)
def test_calls_of_every_kind_of_client_are_checked(cloud: None, of_tests: Callable[[str], Any]) -> None:
    client = of_tests("stepfunctions")
    if hasattr(of_tests, "world"):
        of_tests.world = object()  # that is not asked
    if hasattr(of_tests, "stack"):
        of_tests.stack = object()
    with pytest.raises(RefusedByAws, match="name has 81 characters"):
        client.start_execution(stateMachineArn=MACHINE, name="n" * 81)


def test_call_that_botocore_refuses_stays_an_error_of_botocores(cloud: None) -> None:
    with pytest.raises(ParamValidationError):
        clients.client("stepfunctions").start_execution(stateMachineArn="", name="n")


def nested(depth: int) -> dict[str, Any]:
    return {"M": {"in": nested(depth - 1)}} if depth else {"S": "x"}


def test_value_within_values_of_its_own_kind_is_read_to_its_end(cloud: None) -> None:
    client = of_session("dynamodb")
    check_call(client, "PutItem", {"TableName": "t", "Item": {**KEY, "deep": nested(30)}})
    events = of_session("events")
    with pytest.raises(RefusedByAws, match=r"Entries has 101 entries"):
        check_call(events, "PutEvents", {"Entries": [{"Source": "s"}] * 101})


SERVICES = {"states": "stepfunctions"}
OPERATIONS = {"InvokeFunction": "Invoke"}


def test_every_call_that_the_functions_may_make_has_a_check_that_can_be_made() -> None:
    # A pattern that Python cannot read would be found only by the test that makes the call.
    allowed = {action for name in FUNCTIONS for action in actions(name)}  # the calls of their code: test_template.py
    made = 0
    for prefix, name in (action.split(":") for action in allowed):
        if prefix not in ("s3", "iam"):
            model = Session().get_service_model(SERVICES.get(prefix, prefix))
            operation = OPERATIONS.get(name, name)
            # A stream is read by Lambda itself.
            if operation in model.operation_names:
                made += make_check(model, operation) is not None
    assert made > 25


def test_schedule_of_the_simulation_in_which_a_call_is_refused_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever the function makes of it, and the world of the function.
    name = "stepfunctions", "StartExecution"
    monkeypatch.setitem(strict_parameters._checks, name, lambda parameters: ".name is not to AWS's liking")
    with installed() as simulation, pytest.raises(AssertionError, match="name is not to AWS's liking"):
        simulation.run(1)
