"""The account's concurrency, limited by `LAMBDA_ACCOUNT_CONCURRENCY`.

A call beyond the limit fails at once in the emulator, also for an event that nobody repeats. Here, as on AWS, events
are kept and tried again, an API answers 500, and a state machine sees `Lambda.TooManyRequestsException`.
"""

import functools
import json
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ministack.services import apigateway_v1, eventbridge, lambda_svc, stepfunctions

# Until when an event waits for concurrency, in seconds since 1970; 0 for a call that somebody waits for.
PATIENT_UNTIL: ContextVar[float] = ContextVar("PATIENT_UNTIL", default=0)
# https://docs.aws.amazon.com/lambda/latest/api/API_FunctionEventInvokeConfig.html
DEFAULT_EVENT_AGE_SECONDS = 6 * 3600


def patient(execute: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Try an event again while the account's concurrency is used up.

    An asynchronous event stays in Lambda's queue, with exponential backoff from one second; attempts that were
    throttled do not count as retries: https://docs.aws.amazon.com/lambda/latest/dg/invocation-async-error-handling.html
    The poller of an SQS queue tries a batch again until its visibility timeout ends:
    https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-errorhandling.html
    """

    @functools.wraps(execute)
    def run(*args: Any, **options: Any) -> dict[str, Any]:
        pause = lambda_svc._LAMBDA_ASYNC_RETRY_BASE_SECONDS
        while True:
            result = execute(*args, **options)
            if not result.get("throttle") or time.time() + pause > PATIENT_UNTIL.get():
                return result
            time.sleep(pause)
            pause = min(pause * 2, lambda_svc._LAMBDA_ASYNC_RETRY_MAX_SECONDS)

    return run


def patient_for_its_age(invoke: Callable[..., None]) -> Callable[..., None]:
    """Let an asynchronous event wait for concurrency as long as it may get old."""

    @functools.wraps(invoke)
    def run(function: dict[str, Any], event: Any) -> None:
        settings = function.get("event_invoke_config") or (function.get("event_invoke_configs") or {}).get("$LATEST")
        age = int((settings or {}).get("MaximumEventAgeInSeconds") or DEFAULT_EVENT_AGE_SECONDS)
        before = PATIENT_UNTIL.set(time.time() + age)
        try:
            invoke(function, event)  # starts a thread that copies the context
        finally:
            PATIENT_UNTIL.reset(before)

    return run


def patient_for_its_visibility(run_batch: Callable[..., None]) -> Callable[..., None]:
    """Let a batch of messages wait for concurrency until their visibility timeout."""

    @functools.wraps(run_batch)
    def run(mapping: Any, function: Any, event: Any, batch: list[dict[str, Any]], *others: Any) -> None:
        before = PATIENT_UNTIL.set(min(float(message["visible_at"]) for message in batch))
        try:
            run_batch(mapping, function, event, batch, *others)
        finally:
            PATIENT_UNTIL.reset(before)

    return run


def invoke_by_event(arn: str, payload: str) -> None:
    """Invoke the target of a rule or a schedule asynchronously, as EventBridge does.

    https://docs.aws.amazon.com/lambda/latest/dg/with-eventbridge-scheduler.html
    """
    function, config, name = lambda_svc._get_func_record_for_ref(arn)
    if not function or not config:
        eventbridge.logger.warning("EventBridge: function %s not found", name)
        return
    record = lambda_svc._execution_record_for_config(function, config)
    lambda_svc.invoke_async_with_retry(record, json.loads(payload))


class Throttled(Exception):
    """Lambda has refused to run the function of an API."""


def refused(response_of: Callable[..., Any]) -> Callable[..., Any]:
    """Tell a refusal by Lambda apart from an answer of the function."""

    @functools.wraps(response_of)
    def read(result: dict[str, Any]) -> Any:
        if result.get("throttle"):
            raise Throttled
        return response_of(result)

    return read


def as_server_error(invoke: Callable[..., Any]) -> Callable[..., Any]:
    """Answer 500 where Lambda refused a call for want of concurrency, or as the API customizes integration failures.

    https://docs.aws.amazon.com/lambda/latest/dg/services-apigateway-errors.html
    https://docs.aws.amazon.com/apigateway/latest/developerguide/supported-gateway-response-types.html
    """

    @functools.wraps(invoke)
    async def run(integration: Any, api_id: str, name: str, stage: dict[str, Any], *others: Any, **more: Any) -> Any:
        try:
            return await invoke(integration, api_id, name, stage, *others, **more)
        except Throttled:
            customized = apigateway_v1._deployed_gateway_responses.get(api_id, {}).get(stage.get("deploymentId")) or {}
            kind = "INTEGRATION_FAILURE" if "INTEGRATION_FAILURE" in customized else "DEFAULT_5XX"
            return apigateway_v1._gw_error(kind, "Internal server error")

    return run


def named_as_throttled(call: Callable[..., Any]) -> Callable[..., Any]:
    """Name the error of a state whose function was throttled.

    https://docs.aws.amazon.com/step-functions/latest/dg/sfn-best-practices.html#bp-lambda-serviceexception
    """

    @functools.wraps(call)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return call(*args, **options)
        except stepfunctions._ExecutionError as error:
            if error.error == "Lambda.Unknown" and '"TooManyRequestsException"' in error.cause:
                message = json.loads(error.cause)["message"]
                raise stepfunctions._ExecutionError("Lambda.TooManyRequestsException", message) from error
            raise

    return run


def patch() -> None:
    """Change the emulator."""
    lambda_svc._execute_function = patient(lambda_svc._execute_function)
    lambda_svc.invoke_async_with_retry = patient_for_its_age(lambda_svc.invoke_async_with_retry)
    lambda_svc._run_sqs_batch = patient_for_its_visibility(lambda_svc._run_sqs_batch)
    eventbridge._dispatch_to_lambda = invoke_by_event
    apigateway_v1._lambda_proxy_response = refused(apigateway_v1._lambda_proxy_response)
    apigateway_v1._invoke_lambda_proxy_v1 = as_server_error(apigateway_v1._invoke_lambda_proxy_v1)
    stepfunctions._call_lambda = named_as_throttled(stepfunctions._call_lambda)
