"""State machines: the permissions of their roles, and Distributed Maps.

The emulator runs states whatever the role of the machine allows. Here a state fails as on AWS where the role lacks an
action: with the general error of the service, since none of them models a refusal.

Of a Distributed Map it supports `MaxConcurrency` and `ToleratedFailurePercentage`, but not the fields with their paths
in the input.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ministack import app
from ministack.core import iam_actions, iam_evaluator
from ministack.core.responses import get_account_id, get_region
from ministack.services import lambda_svc, stepfunctions, sts

# The access key of the role of the machine that runs; empty outside of one.
KEY: ContextVar[str] = ContextVar("KEY", default="")

# Errors of optimized integrations, which are those of version 1 of the AWS SDK for Java:
# https://docs.aws.amazon.com/step-functions/latest/dg/connect-ddb.html#connect-ddb-exceptions
# A function that the role may not invoke: https://github.com/awslabs/aws-deployment-framework/issues/460
ERRORS = {
    "lambda": "Lambda.AWSLambdaException",
    "sqs": "SQS.AmazonSQSException",
    "sns": "SNS.AmazonSNSException",
    "dynamodb": "DynamoDB.AmazonDynamoDBException",
    "events": "EventBridge.AmazonEventBridgeException",
    "states": "StepFunctions.AWSStepFunctionsException",
}

# The service in a signature: `Credential=KEY/DATE/REGION/SERVICE/aws4_request`.
SIGNED_FOR = re.compile(r"Credential=[^/]+/[^/]+/[^/]+/([^/]+)/")


def as_its_role(run_execution: Callable[[str], None]) -> Callable[[str], None]:
    """Run an execution with the credentials of its machine's role."""

    @functools.wraps(run_execution)
    def run(execution_arn: str) -> None:
        execution = stepfunctions._executions.get(execution_arn) or {}
        machine = stepfunctions._state_machines.get(execution.get("stateMachineArn", "")) or {}
        before = KEY.set(key_of(machine.get("roleArn", "")))
        try:
            run_execution(execution_arn)
        finally:
            KEY.reset(before)

    return run


def key_of(role_arn: str) -> str:
    """Return the access key of a session of a role."""
    role = role_arn.rpartition("/")[2]
    key = f"ASIA{hashlib.sha256(f'states:{role_arn}'.encode()).hexdigest()[:16].upper()}"
    session = f"arn:aws:sts::{get_account_id()}:assumed-role/{role}/states"
    sts.register_session(key, {"Arn": session, "UserId": f"{role}:states", "SecretAccessKey": key, "SessionToken": key})
    return key


def require(error: str, service: str, action: str, resource: str, context: dict[str, Any] | None = None) -> None:
    """Fail the running state unless the role of its machine allows an action."""
    if not KEY.get():
        return
    denied = iam_evaluator.enforce(
        KEY.get(), action, service, get_region(), resource_arn=resource, service_context=context
    )
    if denied:
        principal = getattr(denied, "principal_arn", "")
        explicit = getattr(denied, "decision", "") == "Deny"
        message = iam_actions.identity_denial_message(action, principal, resource, explicit)
        raise stepfunctions._ExecutionError(error, message)


def require_call(error: str, service: str, method: str, path: str, headers: Any, body: bytes, query: Any) -> None:
    """Fail the running state unless the role of its machine allows a call."""
    action = iam_actions.extract_iam_action(service, method, path, headers, body, query)
    if action:
        where = (get_region(), get_account_id())
        resource = iam_actions.extract_resource_arn(service, method, path, headers, body, query, *where)
        context = iam_actions.dynamodb_service_context(body) if service == "dynamodb" else None
        require(error, service, action, resource, context)


def allowed_by_sdk(call: Callable[..., Any]) -> Callable[..., Any]:
    """Check the calls of `aws-sdk` integrations.

    Their errors are those of version 2 of the AWS SDK for Java:
    https://docs.aws.amazon.com/step-functions/latest/dg/supported-services-awssdk.html
    """

    @functools.wraps(call)
    def run(handler: Any, method: str, path: str, headers: Any, body: Any, query: Any, *others: Any) -> Any:
        signed = SIGNED_FOR.search(headers.get("authorization", "")) if KEY.get() else None
        if signed:
            services = stepfunctions._AWS_SDK_SERVICE_MAP.items()
            name = next((each for each, info in services if info.get("service_key", each) == signed[1]), signed[1])
            prefix = stepfunctions._AWS_SDK_ERROR_PREFIX.get(name, name.capitalize())
            raw = body.encode() if isinstance(body, str) else body
            require_call(f"{prefix}.{prefix}Exception", signed[1], method, path, headers, raw, query)
        return call(handler, method, path, headers, body, query, *others)

    return run


def allowed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Check the calls of an optimized integration, `sqs:sendMessage`."""
    service, _, operation = name.partition(":")

    @functools.wraps(call)
    def run(resource: str, arguments: Any) -> Any:
        headers = {"x-amz-target": f"{service}.{operation[0].upper()}{operation[1:]}"}
        body = json.dumps(arguments).encode()
        require_call(ERRORS.get(service, "States.Permissions"), service, "POST", "/", headers, body, {})
        return call(resource, arguments)

    return run


def allowed_to_invoke(call: Callable[..., Any]) -> Callable[..., Any]:
    """Check whether the role may invoke a function."""

    @functools.wraps(call)
    def run(function: str, event: Any) -> Any:
        arn = function if function.startswith("arn:") else lambda_svc._func_arn(function)
        require(ERRORS["lambda"], "lambda", "lambda:InvokeFunction", arn)
        return call(function, event)

    return run


def allowed_to_start(start: Callable[..., Any]) -> Callable[..., Any]:
    """Check whether the role may start another machine."""

    @functools.wraps(start)
    def run(resource: str, arguments: Any) -> Any:
        machine = stepfunctions._nested_start_execution_request(arguments)["stateMachineArn"]
        require(ERRORS["states"], "states", "states:StartExecution", machine)
        return start(resource, arguments)

    return run


def allowed_to_map(run_map: Callable[..., Any]) -> Callable[..., Any]:
    """Check whether the role may run a Distributed Map: start children, read items and write results.

    https://docs.aws.amazon.com/step-functions/latest/dg/iam-policies-eg-dist-map.html
    https://docs.aws.amazon.com/step-functions/latest/dg/concepts-error-handling.html#error-handling-error-representation
    """

    @functools.wraps(run_map)
    def run(state: dict[str, Any], raw: Any, effective: Any, iterator: Any, execution: Any, context: Any) -> Any:
        require("States.Permissions", "states", "states:StartExecution", execution["stateMachineArn"])
        for field, failure, action, name in (
            ("ItemReader", "States.ItemReaderFailed", "s3:GetObject", "Key"),
            ("ResultWriter", "States.ResultWriterFailed", "s3:PutObject", "Prefix"),
        ):
            used = state.get(field) or {}
            if used.get("Resource", "").endswith((":s3:getObject", ":s3:putObject")):
                where = stepfunctions._resolve_params_obj(used.get("Parameters") or {}, effective, context)
                below = "/manifest.json" if field == "ResultWriter" else ""
                require(failure, "s3", action, f"arn:aws:s3:::{where.get('Bucket')}/{where.get(name)}{below}")
        return run_map(state, raw, effective, iterator, execution, context)

    return run


def with_paths(run_map: Callable[..., Any]) -> Callable[..., Any]:
    """Let a Distributed Map read its numbers from the input."""

    @functools.wraps(run_map)
    def run(state: dict[str, Any], raw_input: Any, effective: Any, *others: Any) -> Any:
        numbers = {
            name: stepfunctions._resolve_path_or_ctx(state[f"{name}Path"], effective, None)
            for name in ("MaxConcurrency", "ToleratedFailurePercentage")
            if f"{name}Path" in state
        }
        return run_map({**state, **numbers}, raw_input, effective, *others)

    return run


def patch() -> None:
    """Change the emulator."""
    stepfunctions._run_distributed_map = allowed_to_map(with_paths(stepfunctions._run_distributed_map))
    stepfunctions._run_execution = as_its_role(stepfunctions._run_execution)
    stepfunctions._call_lambda = allowed_to_invoke(stepfunctions._call_lambda)
    for name in ("_invoke_nested_start_execution", "_invoke_nested_start_execution_sync"):
        setattr(stepfunctions, name, allowed_to_start(getattr(stepfunctions, name)))
    for resource, call in stepfunctions._SERVICE_DISPATCH.items():
        stepfunctions._SERVICE_DISPATCH[resource] = allowed(resource.removeprefix("arn:aws:states:::"), call)
    app.call_service_handler_sync = allowed_by_sdk(app.call_service_handler_sync)
