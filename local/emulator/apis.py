"""REST APIs of API Gateway.

The emulator imports the methods of an OpenAPI definition only: not the names of the operations, the gateway responses,
the binary media types, the timeouts, nor the responses to preflight requests. A changed definition makes another API,
with another address; on AWS the API stays, and so do its deployments.

A stage serves what was imported last. On AWS it serves the snapshot that its deployment took.

An event has the request's `Content-Length`. On AWS it has none.

The emulator keeps no log of the requests: here it is a file, `requests.log`.
"""

import copy
import functools
import json
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ministack import app
from ministack.core.responses import AccountRegionScopedDict
from ministack.services import apigateway_v1
from ministack.services.cloudformation import provisioners

from local.emulator.logs import append

# What a deployment takes a snapshot of, by API: https://docs.aws.amazon.com/apigateway/latest/api/API_Deployment.html
PARTS = ("_rest_apis", "_resources", "_authorizers_v1", "_models", "_request_validators")

# Of each API and deployment.
SNAPSHOTS: dict[tuple[str, str], dict[str, Any]] = {}

# The API that a request is served from, and its snapshot.
SERVED: ContextVar[tuple[str, dict[str, Any]] | None] = ContextVar("SERVED", default=None)


class Part(AccountRegionScopedDict):  # type: ignore[misc] # has no types
    """One part of all APIs; while a request is served, that of its deployment."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        """Create the part, for all APIs to come."""
        super().__init__()
        self.name = name

    def get(self, key: str, default: Any = None) -> Any:
        """Return the part of one API."""
        served = SERVED.get()
        if served and served[0] == key:
            return served[1].get(self.name, default)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        """Return the part of one API."""
        served = SERVED.get()
        return served[1][self.name] if served and served[0] == key else super().__getitem__(key)


def with_snapshot(deploy: Callable[..., Any]) -> Callable[..., Any]:
    """Take a snapshot of an API with each deployment."""

    @functools.wraps(deploy)
    def run(api_id: str, *others: Any, **options: Any) -> Any:
        status, headers, body = deploy(api_id, *others, **options)
        if status == 201:
            parts = {name: getattr(apigateway_v1, name).get(api_id) for name in PARTS}
            taken = {name: copy.deepcopy(part) for name, part in parts.items() if part is not None}
            SNAPSHOTS[api_id, json.loads(body)["id"]] = taken
        return status, headers, body

    return run


def from_snapshot(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Serve a request from the snapshot of its stage's deployment."""

    @functools.wraps(execute)
    async def run(request: Any, api_id: str, stage_name: str, *others: Any, **options: Any) -> Any:
        stage = apigateway_v1._stages_v1.get(api_id, {}).get(stage_name) or {}
        snapshot = SNAPSHOTS.get((api_id, stage.get("deploymentId", "")))
        before = SERVED.set((api_id, snapshot) if snapshot is not None else None)
        try:
            return await execute(request, api_id, stage_name, *others, **options)
        finally:
            SERVED.reset(before)

    return run


def in_place(update: Callable[..., Any]) -> Callable[..., Any]:
    """Import a changed definition into the same API.

    https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/aws-resource-apigateway-restapi.html
    """

    @functools.wraps(update)
    def run(api_id: str, old: Any, new: Any, stack_name: str, logical_id: str | None = None) -> Any:
        if new.get("Body") == old.get("Body"):
            return update(api_id, old, new, stack_name, logical_id)
        imported, _ = provisioners._apigw_rest_api_create(logical_id or api_id, new, stack_name)
        for name in (*PARTS, "_gateway_responses"):
            store = getattr(apigateway_v1, name)
            store[api_id] = store.pop(imported, {})
        apigateway_v1._rest_apis[api_id]["id"] = api_id
        return api_id, provisioners._apigw_rest_api_attrs(api_id)

    return run


def with_extensions(import_api: Callable[..., str]) -> Callable[..., str]:
    """Import an API's gateway responses and binary media types.

    https://docs.aws.amazon.com/apigateway/latest/developerguide/api-gateway-swagger-extensions.html
    """

    @functools.wraps(import_api)
    def run(definition: dict[str, Any], *others: Any) -> str:
        api_id = import_api(definition, *others)
        for kind, response in definition.get("x-amazon-apigateway-gateway-responses", {}).items():
            apigateway_v1._put_gateway_response(api_id, kind, response)
        if kinds := definition.get("x-amazon-apigateway-binary-media-types"):
            apigateway_v1._rest_apis[api_id]["binaryMediaTypes"] = kinds
        return api_id

    return run


def with_details(import_operation: Callable[..., None]) -> Callable[..., None]:
    """Name each method as its operation, and import the responses of its integration.

    https://docs.aws.amazon.com/apigateway/latest/developerguide/api-gateway-swagger-extensions-integration.html
    """

    @functools.wraps(import_operation)
    def run(api_id: str, resource_id: str, method: str, operation: dict[str, Any], *others: Any) -> None:
        import_operation(api_id, resource_id, method, operation, *others)
        made = apigateway_v1._resources[api_id][resource_id]["resourceMethods"][method]
        made["operationName"] = operation.get("operationId", "")
        integration = operation.get("x-amazon-apigateway-integration") or {}
        for name in ("requestTemplates", "passthroughBehavior"):
            if name in integration:
                made["methodIntegration"][name] = integration[name]
        if "timeoutInMillis" in integration:
            made["methodIntegration"]["timeoutInMillis"] = int(integration["timeoutInMillis"])
        for pattern, response in (integration.get("responses") or {}).items():
            selected = response | {"selectionPattern": "" if pattern == "default" else pattern}
            status = str(response["statusCode"])
            apigateway_v1._put_integration_response(api_id, resource_id, method, status, selected)

    return run


def without_length(build: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Leave `Content-Length` out of an event.

    https://docs.aws.amazon.com/apigateway/latest/developerguide/api-gateway-known-issues.html
    """

    @functools.wraps(build)
    def run(*args: Any, **options: Any) -> dict[str, Any]:
        event = build(*args, **options)
        for name in ("headers", "multiValueHeaders"):
            event[name] = {key: value for key, value in event[name].items() if key.lower() != "content-length"}
        return event

    return run


def logged(handle: Callable[..., Any]) -> Callable[..., Any]:
    """Log each request to the API, without its query, which may hold a signature."""

    @functools.wraps(handle)
    async def run(host: str, path: str, method: str, *others: Any, **options: Any) -> Any:
        began = time.monotonic()
        answer = await handle(host, path, method, *others, **options)
        if answer is not None:
            below = path.removeprefix("/_aws/execute-api/").partition("/")[2].partition("/")[2]
            record = {"method": method, "path": f"/{below}", "status": answer[0], "seconds": time.monotonic() - began}
            append("requests.log", json.dumps(record))
        return answer

    return run


def patch() -> None:
    """Change the emulator."""
    for name in PARTS:
        setattr(apigateway_v1, name, Part(name))
    apigateway_v1._create_deployment = with_snapshot(apigateway_v1._create_deployment)
    apigateway_v1._execute_in_scope = from_snapshot(apigateway_v1._execute_in_scope)
    apigateway_v1._import_rest_api = with_extensions(apigateway_v1._import_rest_api)
    apigateway_v1._import_operation = with_details(apigateway_v1._import_operation)
    apigateway_v1._build_lambda_event_v1 = without_length(apigateway_v1._build_lambda_event_v1)
    handlers = provisioners._RESOURCE_HANDLERS["AWS::ApiGateway::RestApi"]
    handlers["update"] = in_place(handlers["update"])
    app._handle_execute_api_request = logged(app._handle_execute_api_request)
