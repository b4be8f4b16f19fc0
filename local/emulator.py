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

Of an OpenAPI definition of an API the emulator does not import the names of the operations, the timeouts of
integrations, the responses of mocks (preflights), gateway responses and binary media types; and a changed definition makes another API, with another URL.

The emulator derives the name of a resource from its stack's and its own: a stack of the same name in another region,
or after a deletion, would meet the names of the first.

A number that comes from a template's parameter stays a text in the emulator; the concurrency of a queue is read as one.

`dynamodb:LeadingKeys`, with which policies limit the items of the table that a function may access, is not supported.

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
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ministack import app
from ministack.core import iam_actions, lambda_runtime
from ministack.services import apigateway_v1, lambda_svc, stepfunctions
from ministack.services.cloudformation import provisioners, stacks

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


def whole_operation(import_operation: Callable[..., None]) -> Callable[..., None]:
    """Name each method of an API as its operation, and import the responses of its integration.

    https://docs.aws.amazon.com/apigateway/latest/developerguide/api-gateway-swagger-extensions-integration-responses.html
    """

    @functools.wraps(import_operation)
    def run(api_id: str, resource_id: str, method: str, operation: dict[str, Any], *others: Any) -> None:
        import_operation(api_id, resource_id, method, operation, *others)
        imported = apigateway_v1._resources[api_id][resource_id]["resourceMethods"][method]
        imported["operationName"] = operation.get("operationId", "")
        integration = operation.get("x-amazon-apigateway-integration") or {}
        if "timeoutInMillis" in integration:
            imported["methodIntegration"]["timeoutInMillis"] = int(integration["timeoutInMillis"])
        for pattern, response in integration.get("responses", {}).items():
            status, chosen = str(response["statusCode"]), "" if pattern == "default" else pattern
            data = {**response, "selectionPattern": chosen}
            apigateway_v1._put_integration_response(api_id, resource_id, method, status, data)

    return run


def whole_definition(import_api: Callable[..., str]) -> Callable[..., str]:
    """Import the gateway responses and the binary media types of an API's definition.

    https://docs.aws.amazon.com/apigateway/latest/developerguide/api-gateway-swagger-extensions.html
    """

    @functools.wraps(import_api)
    def run(spec: dict[str, Any], *others: Any) -> str:
        api_id = import_api(spec, *others)
        for kind, response in spec.get("x-amazon-apigateway-gateway-responses", {}).items():
            apigateway_v1._put_gateway_response(api_id, kind, response)
        if kinds := spec.get("x-amazon-apigateway-binary-media-types"):
            apigateway_v1._rest_apis[api_id]["binaryMediaTypes"] = kinds
        return api_id

    return run


def in_place(update: Callable[..., tuple[str, Any]]) -> Callable[..., tuple[str, Any]]:
    """Import a changed definition into the API that exists, whose id and URL stay.

    https://docs.aws.amazon.com/AWSCloudFormation/latest/TemplateReference/aws-resource-apigateway-restapi.html
    """

    @functools.wraps(update)
    def run(api_id: str, before: Any, after: dict[str, Any], stack: str, logical_id: str) -> tuple[str, Any]:
        if before.get("Body") == after.get("Body"):
            return update(api_id, before, after, stack, logical_id)
        other, _ = provisioners._apigw_rest_api_create(logical_id, after, stack)
        for kept in (
            apigateway_v1._rest_apis, apigateway_v1._resources, apigateway_v1._authorizers_v1,
            apigateway_v1._models, apigateway_v1._gateway_responses,
        ):  # fmt: skip
            kept[api_id] = kept.pop(other)
        apigateway_v1._rest_apis[api_id]["id"] = api_id
        apigateway_v1._delete_rest_api(other)
        return api_id, provisioners._apigw_rest_api_attrs(api_id)

    return run


def with_a_name_of_its_own(*of_the_resource: Any) -> tuple[Any, str]:
    """Create a resource of a stack, with a random suffix in its name, and return the suffix's seed with it.

    https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/resources-section-structure.html
    """
    token = provisioners._NAME_SEED.set(uuid.uuid4().hex)
    try:
        return stacks._provision_resource(*of_the_resource), provisioners._NAME_SEED.get()
    finally:
        provisioners._NAME_SEED.reset(token)


def with_whole_number(limit_of: Callable[..., int]) -> Callable[..., int]:
    """Read the concurrency of an event source as a number, as AWS does; a text ends the emulator's polling."""

    @functools.wraps(limit_of)
    def limit(mapping: dict[str, Any], *others: Any, **options: Any) -> int:
        scaling = mapping.get("ScalingConfig") or {}
        scaling |= {name: int(value) for name, value in scaling.items() if name == "MaximumConcurrency"}
        return limit_of(mapping, *others, **options)

    return limit


iam_actions.extract_resource_arn = addressed(iam_actions.extract_resource_arn)
iam_actions.dynamodb_service_context = with_leading_keys(iam_actions.dynamodb_service_context)
iam_actions.dynamodb_transaction_checks = with_leading_keys_of_items(iam_actions.dynamodb_transaction_checks)
lambda_runtime.zipfile = types.SimpleNamespace(**{**vars(zipfile), "ZipFile": Archive})
lambda_runtime.Worker._spawn = known_to_start(lambda_runtime.Worker._spawn)
lambda_runtime.Worker.starting = False
lambda_svc._sqs_esm_concurrency = with_whole_number(lambda_svc._sqs_esm_concurrency)
lambda_svc.acquire_worker = one_at_a_time(lambda_svc.acquire_worker)
lambda_svc._execute_function_warm = with_log(named(lambda_svc._execute_function_warm))
iam_actions.extract_resource_arn = with_map_runs(iam_actions.extract_resource_arn)
stepfunctions._run_distributed_map = with_paths(stepfunctions._run_distributed_map)
provisioners._cw_metric_alarm_record = of_one_metric(provisioners._cw_metric_alarm_record)
apigateway_v1._import_operation = whole_operation(apigateway_v1._import_operation)
apigateway_v1._import_rest_api = whole_definition(apigateway_v1._import_rest_api)
of_apis = provisioners._RESOURCE_HANDLERS["AWS::ApiGateway::RestApi"]
of_apis["update"] = in_place(of_apis["update"])
stacks._provision_keeping_seed = with_a_name_of_its_own
app._handle_execute_api_request = logged(app._handle_execute_api_request)
app.main()
