"""Start the MiniStack emulator with fixes for this project; runs on the emulator's own Python.

The emulator unpacks a function's layer again for each of its workers: half a second, and 25 MB to remove in the end.
Here workers share it.

The emulator reports every error of a function as `Runtime.HandlerError`. AWS reports the class of the exception, and a
state machine catches it by that name. The class is in the traceback that the emulator keeps for the function's log.

Each invocation without a free process starts a new one, so that a burst starts dozens, each slowed down by the others.
Here each function starts one at a time, and an invocation takes the first one that is free.

If a function's process dies, the emulator reports its own error; AWS reports `Runtime.ExitError`, and so does this.

Permissions on EventBridge's rules and on schedules are checked with other ARNs than on AWS.
Of a Distributed Map the emulator supports `MaxConcurrency` and `ToleratedFailurePercentage`, but not the fields with
their paths in the input; and it checks whether a function may describe any run of a Map, not this one.
A template with an alarm of metric math is rejected: here such an alarm exists, and watches the first of its metrics.

Of an OpenAPI definition of an API the emulator does not import the names of the operations.

A number that comes from a template's parameter stays a text in the emulator; the concurrency of a queue is read as one.

`dynamodb:LeadingKeys`, with which policies limit the items of the table that a function may access, is not supported.

The account's concurrency is limited by `LAMBDA_ACCOUNT_CONCURRENCY`. A call beyond the limit fails at once in the
emulator, also for an event that nobody repeats. Here, as on AWS, events are kept and tried again, an API answers 500,
and a state machine sees `Lambda.TooManyRequestsException`.

The emulator keeps no log of the API's requests, and its own log lacks the lines of most invocations: here both are
files in `logs` of the working directory, `requests.log` and `functions.log`.
"""

import functools
import hashlib
import json
import re
import tempfile
import threading
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ministack import app
from ministack.core import iam_actions, lambda_runtime
from ministack.services import apigateway_v1, eventbridge, lambda_svc, stepfunctions
from ministack.services.cloudformation import provisioners

# The last line of a traceback: `package.module.ClassName: message`.
RAISED = re.compile(r"^(?:[\w.]+\.)?(\w+)(?::|$)", re.MULTILINE | re.ASCII)

# The emulator's error for a function whose process has ended.
DIED = "Worker process died"

SECONDS_TO_START = 10

REQUESTS_LOG = Path("logs/requests.log").absolute()
FUNCTIONS_LOG = Path("logs/functions.log").absolute()


def logged(handle: Callable[..., Any]) -> Callable[..., Any]:
    """Log each request to the API, without its query, which may hold a signature."""

    @functools.wraps(handle)
    async def run(host: str, path: str, method: str, *others: Any, **options: Any) -> Any:
        began = time.monotonic()
        answer = await handle(host, path, method, *others, **options)
        if answer is not None:
            below = path.removeprefix("/_aws/execute-api/").partition("/")[2].partition("/")[2]
            record = {"method": method, "path": f"/{below}", "status": answer[0], "seconds": time.monotonic() - began}
            append(REQUESTS_LOG, json.dumps(record))
        return answer

    return run


def append(log: Path, text: str) -> None:
    """Append lines to a log in one write, so that lines of several threads do not mix."""
    with log.open("a") as file:
        file.write(f"{text.rstrip()}\n")


def with_log(execute: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Log what a function has written."""

    @functools.wraps(execute)
    def run(*args: Any, **options: Any) -> dict[str, Any]:
        result = execute(*args, **options)
        if text := result.get("log"):
            append(FUNCTIONS_LOG, str(text))
        return result

    return run


def named(execute: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Report the class of a function's exception, or how its process died."""

    @functools.wraps(execute)
    def run(*args: Any, **options: Any) -> dict[str, Any]:
        result = execute(*args, **options)
        body = result.get("body")
        if isinstance(body, dict) and body.get("errorType") == "Runtime.HandlerError":
            message = str(body.get("errorMessage", ""))
            if message == DIED:
                exited = "RequestId: unknown Error: Runtime exited with error: signal: killed"
                body.update(errorType="Runtime.ExitError", errorMessage=exited)
                return result
            last = str(result.get("log", "")).rstrip().removesuffix(message).rstrip().rpartition("\n")[2]
            if raised := RAISED.match(last):
                body["errorType"] = raised[1]
        return result

    return run


def known_to_start(spawn: Callable[..., None]) -> Callable[..., None]:
    """Mark a worker whose process is starting."""

    @functools.wraps(spawn)
    def run(worker: Any) -> None:
        worker.starting = True
        try:
            spawn(worker)
        finally:
            worker.starting = False

    return run


def one_at_a_time(acquire: Callable[..., Any]) -> Callable[..., Any]:
    """Wait for a free worker of a function while another one is starting."""

    @functools.wraps(acquire)
    def run(name: str, config: dict[str, Any], code: bytes, qualifier: str = "$LATEST", **options: Any) -> Any:
        key = lambda_runtime._worker_key(name, config, qualifier)
        deadline = time.monotonic() + SECONDS_TO_START
        while True:
            with lambda_runtime._lock:
                workers = lambda_runtime._workers.get(key, [])
                workers.sort(key=lambda worker: worker._proc is None)  # the emulator takes the first one that is free
                free = any(worker._proc and not worker.in_use for worker in workers)
                starting = any(worker.in_use and (not worker._proc or worker.starting) for worker in workers)
            if free or not starting or time.monotonic() > deadline:
                return acquire(name, config, code, qualifier=qualifier, **options)
            time.sleep(0.01)

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


def of_one_metric(record: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Treat an alarm of metric math as one of the first metric that it reads."""

    @functools.wraps(record)
    def make(name: str, properties: dict[str, Any]) -> dict[str, Any]:
        read = [each["MetricStat"] for each in properties.get("Metrics", []) if "MetricStat" in each]
        if not read:
            return record(name, properties)
        others = {key: value for key, value in properties.items() if key != "Metrics"}
        return record(name, others | read[0]["Metric"] | {"Period": read[0]["Period"], "Statistic": read[0]["Stat"]})

    return make


def with_map_runs(resource_of: Callable[..., str]) -> Callable[..., str]:
    """Check permissions on the very run of a Map that is described."""

    @functools.wraps(resource_of)
    def arn(*args: Any, **options: Any) -> str:
        found = resource_of(*args, **options)
        if found == "*":
            for value in (*args, *options.values()):
                if isinstance(value, bytes) and b'"mapRunArn"' in value:
                    return str(json.loads(value)["mapRunArn"])
        return found

    return arn


# The leading keys with which the current request is checked.
CHECKED: ContextVar[list[str]] = ContextVar("CHECKED")
CONDITION = re.compile(r"^\s*(#?\w+)\s*=\s*(:\w+)")


def leading_keys(request: Any) -> list[str]:
    """Return the partition keys in a DynamoDB request (strings in this stack)."""
    found = [request[part].get("pk") for part in ("Key", "Item") if part in request]
    for table in request.get("RequestItems", {}).values():
        puts = [each["PutRequest"]["Item"] for each in table if "PutRequest" in each] if isinstance(table, list) else []
        found += [key.get("pk") for key in (puts if isinstance(table, list) else table.get("Keys", []))]
    if named := CONDITION.match(request.get("KeyConditionExpression", "")):
        found.append(request.get("ExpressionAttributeValues", {}).get(named[2]))
    return [str(key["S"]) for key in found if isinstance(key, dict) and "S" in key]


def with_leading_keys(context_of: Callable[[bytes], dict[str, Any]]) -> Callable[[bytes], dict[str, Any]]:
    """Add the leading keys of a request to the context of its policies.

    https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/specifying-conditions.html
    """

    @functools.wraps(context_of)
    def context(body: bytes) -> dict[str, Any]:
        keys = leading_keys(json.loads(body or b"{}"))
        CHECKED.set(keys)
        # Without any key it is absent, as on AWS for a Scan or a DescribeTable.
        return context_of(body) | ({"dynamodb:LeadingKeys": keys} if keys or b"TransactItems" in body else {})

    return context


class EachWithItsKeys(list[tuple[str, str]]):
    """The checks of a transaction's items, one after the other, each with its own leading keys."""

    keys: list[list[str]]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        checked = CHECKED.get()
        for check, checked[:] in zip(super().__iter__(), self.keys, strict=True):
            yield check


def with_leading_keys_of_items(checks_of: Callable[..., list[tuple[str, str]]]) -> Callable[..., list[tuple[str, str]]]:
    """Check each item of a transaction with its own leading keys."""

    @functools.wraps(checks_of)
    def checks(action: str, body: bytes, *others: Any) -> list[tuple[str, str]]:
        found = EachWithItsKeys(checks_of(action, body, *others))
        if found:
            found.keys = [leading_keys(each) for item in json.loads(body)["TransactItems"] for each in item.values()]
        return found

    return checks


class Archive(zipfile.ZipFile):
    """An archive of a function or a layer; a layer is unpacked once and linked to from then on."""

    unpacking = threading.Lock()

    def extractall(self, path: Any = None, members: Any = None, pwd: bytes | None = None) -> None:
        """Unpack into `path`, or link it to the same layer if unpacked before."""
        archive, folder = Path(str(self.filename)), Path(path)
        if not archive.name.startswith("layer_"):
            return super().extractall(folder, members, pwd)
        shared = Path(tempfile.gettempdir()) / f"layer-{hashlib.sha256(archive.read_bytes()).hexdigest()[:16]}"
        with self.unpacking:
            if not shared.exists():
                unfinished = tempfile.mkdtemp(dir=shared.parent)
                super().extractall(unfinished, members, pwd)
                Path(unfinished).rename(shared)
        folder.rmdir()
        folder.symlink_to(shared)
        return None


def addressed(find: Callable[..., str]) -> Callable[..., str]:
    """Check permissions on rules and schedules with the ARNs that AWS uses.

    https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazoneventbridge.html
    https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazoneventbridgescheduler.html
    """

    @functools.wraps(find)
    def resource(
        service: str, method: str, path: str, headers: Any, body: bytes, query: Any, region: str, account: str
    ) -> str:
        found = find(service, method, path, headers, body, query, region, account)
        if service == "events":
            asked = json.loads(body or b"{}")
            name, bus = asked.get("Rule") or asked.get("Name"), asked.get("EventBusName") or "default"
            action = next((str(headers[each]) for each in headers if each.lower() == "x-amz-target"), "")
            if name and action.endswith(("Rule", "Targets")):
                return f"arn:aws:events:{region}:{account}:rule/{name if bus == 'default' else f'{bus}/{name}'}"
        elif service == "scheduler" and ":schedule/default/" in found:
            group = json.loads(body or b"{}").get("GroupName") or query.get("groupName") or "default"
            return found.replace("/default/", f"/{group[0] if isinstance(group, list) else group}/")
        return found

    return resource


def with_operation_names(import_operation: Callable[..., None]) -> Callable[..., None]:
    """Name each method of an API as its operation."""

    @functools.wraps(import_operation)
    def run(api_id: str, resource_id: str, method: str, operation: dict[str, Any], *others: Any) -> None:
        import_operation(api_id, resource_id, method, operation, *others)
        resource = apigateway_v1._resources[api_id][resource_id]
        resource["resourceMethods"][method]["operationName"] = operation.get("operationId", "")

    return run


def with_whole_number(limit_of: Callable[..., int]) -> Callable[..., int]:
    """Read the concurrency of an event source as a number, as AWS does; a text ends the emulator's polling."""

    @functools.wraps(limit_of)
    def limit(mapping: dict[str, Any], *others: Any, **options: Any) -> int:
        scaling = mapping.get("ScalingConfig") or {}
        scaling |= {name: int(value) for name, value in scaling.items() if name == "MaximumConcurrency"}
        return limit_of(mapping, *others, **options)

    return limit


# Until when an event waits for concurrency, in seconds since 1970; 0 for a call that somebody waits for.
PATIENT_UNTIL: ContextVar[float] = ContextVar("PATIENT_UNTIL", default=0)
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


iam_actions.extract_resource_arn = addressed(iam_actions.extract_resource_arn)
iam_actions.dynamodb_service_context = with_leading_keys(iam_actions.dynamodb_service_context)
iam_actions.dynamodb_transaction_checks = with_leading_keys_of_items(iam_actions.dynamodb_transaction_checks)
lambda_runtime.zipfile = types.SimpleNamespace(**{**vars(zipfile), "ZipFile": Archive})
lambda_runtime.Worker._spawn = known_to_start(lambda_runtime.Worker._spawn)
lambda_runtime.Worker.starting = False
lambda_svc._sqs_esm_concurrency = with_whole_number(lambda_svc._sqs_esm_concurrency)
lambda_svc.acquire_worker = one_at_a_time(lambda_svc.acquire_worker)
lambda_svc._execute_function = patient(lambda_svc._execute_function)
lambda_svc.invoke_async_with_retry = patient_for_its_age(lambda_svc.invoke_async_with_retry)
lambda_svc._run_sqs_batch = patient_for_its_visibility(lambda_svc._run_sqs_batch)
eventbridge._dispatch_to_lambda = invoke_by_event
apigateway_v1._lambda_proxy_response = refused(apigateway_v1._lambda_proxy_response)
apigateway_v1._invoke_lambda_proxy_v1 = as_server_error(apigateway_v1._invoke_lambda_proxy_v1)
stepfunctions._call_lambda = named_as_throttled(stepfunctions._call_lambda)
lambda_svc._execute_function_warm = with_log(named(lambda_svc._execute_function_warm))
iam_actions.extract_resource_arn = with_map_runs(iam_actions.extract_resource_arn)
stepfunctions._run_distributed_map = with_paths(stepfunctions._run_distributed_map)
provisioners._cw_metric_alarm_record = of_one_metric(provisioners._cw_metric_alarm_record)
apigateway_v1._import_operation = with_operation_names(apigateway_v1._import_operation)
app._handle_execute_api_request = logged(app._handle_execute_api_request)
app.main()
