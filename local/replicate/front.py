"""The HTTP front of the local Replicate.

Under `/v1` it responds like https://replicate.com/docs/reference/http. Further routes:

    GET  /files/{key}/{name}     output files, without a token
    GET  /stream/{key}           output of a streaming model as server-sent events, without a token
    GET  /_control/record        {"requests": […], "webhooks": […], "predictions": […]}, oldest first
    POST /_control/faults        one `Fault` of `local.replicate.faults` or a list; GET shows the remaining ones
    POST /_control/settings      some of `Settings`; GET shows all
    POST /_control/release       removes the faults, and ends what they hold up
    POST /_control/reset         clears record and faults, restores the settings, models and deployments;
                                 predictions stay

Unlike Replicate, it also accepts webhook URLs with http on the loopback interface.
"""

import asyncio
import base64
import contextlib
import json
import logging
import os
import re
import secrets
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from local.replicate.account import (
    COLLECTIONS,
    HARDWARE,
    USER,
    Account,
    CreateDeployment,
    CreateModel,
    UpdateDeployment,
    UpdateModel,
)
from local.replicate.catalog import OWNER, Model, models, models_by_version
from local.replicate.faults import Control, Fault, FaultName, Settings, timestamp
from local.replicate.predictions import Prediction, Predictions

log = logging.getLogger(__name__)

JsonObject = dict[str, Any]

PAGE = 100
RECORDED_HEADERS = ("prefer", "cancel-after", "content-type", "user-agent", "range", "idempotency-key")
RECORDED_BODY_BYTES = 64 * 1024
SILENCE_SECONDS = 3600.0

Value = TypeVar("Value")


class Problem(HTTPException):
    """A response `application/problem+json`."""

    def __init__(self, status: int, title: str, detail: str, **more: Any) -> None:
        super().__init__(status, detail)
        self.body: JsonObject = {"title": title, "detail": detail, "status": status, **more}


def not_found() -> Problem:
    """Return Replicate's 404."""
    return Problem(404, "Not found", "The requested resource could not be found.")


def invalid(fields: list[JsonObject]) -> Problem:
    """Return Replicate's 422: one line for each `{"type", "field", "description"}`."""
    detail = "".join(f"- {field['field']}: {field['description']}\n" for field in fields)
    return Problem(422, "Input validation failed", detail, invalid_fields=fields)


def _webhook_url(value: str) -> str:
    parts = urlsplit(value)
    loopback = parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1")
    if not (loopback or (parts.scheme == "https" and parts.hostname)):
        raise ValueError("must be an https URL (here also http on the loopback interface)")
    return value


class CreateRequest(BaseModel):
    """The body of a create; Replicate rejects any other field."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: JsonObject
    webhook: Annotated[str, AfterValidator(_webhook_url)] | None = None
    webhook_events_filter: list[Literal["start", "output", "logs", "completed"]] | None = None
    stream: bool | None = None


class CreateByVersionRequest(CreateRequest):
    """The body of `POST /v1/predictions`."""

    version: str = Field(min_length=1)


class TrainRequest(BaseModel):
    """The body of `POST /v1/models/{owner}/{name}/versions/{version}/trainings`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    destination: str
    input: JsonObject
    webhook: Annotated[str, AfterValidator(_webhook_url)] | None = None
    webhook_events_filter: list[Literal["start", "output", "logs", "completed"]] | None = None


Body = TypeVar("Body", bound=BaseModel)


class Connections(H11Protocol):
    """HTTP connections that a fault can close: ASGI itself cannot close one without a response."""

    open: dict[tuple[str, int], asyncio.Transport] = {}  # noqa: RUF012 - one for the process, on purpose

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Store the connection by the caller's address."""
        super().connection_made(transport)
        self.open[transport.get_extra_info("peername")[:2]] = transport
        self.peer = transport.get_extra_info("peername")[:2]

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection."""
        self.open.pop(self.peer, None)
        super().connection_lost(exc)


class Dropped(Response):
    """No response: the connection is closed after `seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - nothing is sent
        """Wait at most `seconds` for the caller to give up, then close."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_disconnected(receive), self._seconds)
            return
        if transport := Connections.open.get(tuple(scope["client"])):
            transport.abort()
        await _disconnected(receive)


class Truncated(StreamingResponse):
    """A file whose connection is closed after some of the announced bytes."""

    async def stream_response(self, send: Send) -> None:
        """Send the parts, but not the end of the body."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self.body_iterator:
            await send({"type": "http.response.body", "body": part, "more_body": True})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, close and wait until it is closed."""
        await self.stream_response(send)
        if transport := Connections.open.get(tuple(scope["client"])):
            transport.close()
        await _disconnected(receive)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Gate:
    """Middleware of every request: the record, the token, the rate limit."""

    def __init__(self, app: ASGIApp, control: Control, token: str) -> None:
        self._app = app
        self._control = control
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Record the request and its response; respond with 401 and 429 itself."""
        if scope["type"] != "http" or scope["path"].startswith(("/_control/", "/_cog/")):
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        entry = scope["record"] = {
            "at": timestamp(),
            "method": scope["method"],
            "path": scope["path"],
            "query": scope["query_string"].decode("latin-1"),
            "headers": {name: request.headers[name] for name in RECORDED_HEADERS if name in request.headers},
            "authorization": self._authorization(request),
            "body": None,
            "status": None,
            "seconds": None,
            "fault": None,
            "prediction": None,
        }
        self._control.record_request(entry)
        started = time.monotonic()
        body = b""

        async def receive_and_record() -> Message:
            nonlocal body
            message = await receive()
            if message["type"] == "http.request":
                body += message.get("body", b"")
                if not message.get("more_body") and body:
                    entry["body"] = _recorded(body)
            return message

        async def send_and_record(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry["status"] = message["status"]
                entry["seconds"] = round(time.monotonic() - started, 3)
                message["headers"] = [*message.get("headers", []), *limits]
            await send(message)

        limits: list[tuple[bytes, bytes]] = []
        refusal: Response | None = None
        if scope["path"].startswith("/v1/"):
            if entry["authorization"] != "valid":
                detail = "You did not pass a valid authentication token"
                refusal = problem_response(Problem(401, "Unauthenticated", detail))
            else:
                creates = scope["method"] == "POST" and scope["path"].endswith(("/predictions", "/trainings"))
                bucket = self._control.creates if creates else self._control.others
                allowed, remaining, reset = bucket.take()
                limits = [
                    (b"ratelimit-remaining", str(remaining).encode()),
                    (b"ratelimit-reset", str(reset).encode()),
                ]
                if not allowed:
                    refusal = throttled(reset)
                elif {"predictions", "trainings"}.isdisjoint(scope["path"].split("/")):
                    refusal = self._fault(scope["path"], entry)
        try:
            await (refusal or self._app)(scope, receive_and_record, send_and_record)
        except Exception:
            entry["status"] = 500  # Starlette's outermost layer sends the response
            raise

    def _fault(self, path: str, entry: JsonObject) -> Response | None:
        for name in (FaultName.OTHER_ERROR, FaultName.OTHER_RESET, FaultName.OTHER_SILENCE):
            if found := self._control.take(name, path=path):
                entry["fault"] = found.fault
                if name is FaultName.OTHER_ERROR:
                    return problem_response(_fault_problem(found))
                return Dropped(found.seconds or SILENCE_SECONDS if name is FaultName.OTHER_SILENCE else 0)
        return None

    def _authorization(self, request: Request) -> str:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not scheme:
            return "missing"
        known = scheme.lower() in ("bearer", "token") and secrets.compare_digest(token.encode(), self._token.encode())
        return "valid" if known else "wrong"


def _recorded(body: bytes) -> Any:
    """Return the body, without a large input: tests count creates by webhook."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {"not_json": body[:1000].decode(errors="replace")}
    if len(body) <= RECORDED_BODY_BYTES:
        return value
    left_out = {"too_large_to_record_bytes": len(body)}
    return {**value, "input": left_out} if isinstance(value, dict) else left_out


def throttled(seconds: int, *, header: bool = False, body_field: bool = False) -> JSONResponse:
    """Return Replicate's 429, with its two undocumented fields as options."""
    body: JsonObject = {"detail": f"Request was throttled. Your rate limit resets in ~{seconds}s."}
    if body_field:
        body["retry_after"] = seconds
    headers = {"retry-after": str(seconds)} if header else None
    return JSONResponse(body, 429, headers=headers, media_type="application/problem+json")


def problem_response(problem: Problem) -> JSONResponse:
    """Return the response for a problem."""
    return JSONResponse(problem.body, problem.status_code, media_type="application/problem+json")


class Front:
    """The routes.

    Args:
        origin: The base URL of the front, without a slash at the end.
        state_dir: Folder for models, files and logs.
        token: The one access token that is accepted.
        settings: The settings that `POST /_control/reset` restores.
    """

    def __init__(self, origin: str, state_dir: Path, token: str, settings: Settings) -> None:
        self._origin = origin
        self._state_dir = state_dir
        self._control = Control(settings)
        self._account = Account(origin)
        self._token = token

    def app(self) -> Starlette:
        """Return the ASGI application; its lifespan starts and stops all else."""

        def route(path: str, endpoint: Callable[[Request], Awaitable[Response]], method: str = "GET") -> Route:
            return Route(path, endpoint, methods=[method])

        return Starlette(
            routes=[
                route("/v1/predictions", self.create_by_version, "POST"),
                route("/v1/predictions", self.list_predictions),
                route("/v1/predictions/{id}", self.get_prediction),
                route("/v1/predictions/{id}/cancel", self.cancel_prediction, "POST"),
                route("/v1/models", self.list_models),
                route("/v1/models", self.create_model, "POST"),
                route("/v1/models/{owner}/{name}", self.get_model),
                route("/v1/models/{owner}/{name}", self.update_model, "PATCH"),
                route("/v1/models/{owner}/{name}", self.delete_model, "DELETE"),
                route("/v1/models/{owner}/{name}/examples", self.list_examples),
                route("/v1/models/{owner}/{name}/readme", self.get_readme),
                route("/v1/models/{owner}/{name}/predictions", self.create_by_model, "POST"),
                route("/v1/models/{owner}/{name}/versions", self.list_versions),
                route("/v1/models/{owner}/{name}/versions/{version}", self.get_version),
                route("/v1/models/{owner}/{name}/versions/{version}", self.delete_version, "DELETE"),
                route("/v1/collections", self.list_collections),
                route("/v1/collections/{slug}", self.get_collection),
                route("/v1/search", self.search),
                route("/v1/models/{owner}/{name}/versions/{version}/trainings", self.create_training, "POST"),
                route("/v1/trainings", self.list_trainings),
                route("/v1/trainings/{id}", self.get_prediction),
                route("/v1/trainings/{id}/cancel", self.cancel_prediction, "POST"),
                route("/v1/deployments", self.list_deployments),
                route("/v1/deployments", self.create_deployment, "POST"),
                route("/v1/deployments/{owner}/{name}", self.get_deployment),
                route("/v1/deployments/{owner}/{name}", self.update_deployment, "PATCH"),
                route("/v1/deployments/{owner}/{name}", self.delete_deployment, "DELETE"),
                route("/v1/deployments/{owner}/{name}/predictions", self.create_by_deployment, "POST"),
                route("/v1/webhooks/default/secret", self.get_signing_secret),
                route("/v1/account", self.get_account),
                route("/v1/hardware", self.list_hardware),
                route("/files/{key}/{name}", self.get_file),
                route("/stream/{key}", self.stream),
                route("/_cog/{key}/{name:path}", self.store_file, "PUT"),
                route("/_control/record", self.get_record),
                route("/_control/faults", self.get_faults),
                route("/_control/faults", self.add_faults, "POST"),
                route("/_control/settings", self.get_settings),
                route("/_control/settings", self.change_settings, "POST"),
                route("/_control/release", self.release, "POST"),
                route("/_control/reset", self.reset, "POST"),
            ],
            middleware=[
                # A page in a browser must not reach the control routes by a host name that resolves to this machine.
                Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]),
                Middleware(Gate, control=self._control, token=self._token),
            ],
            exception_handlers={
                Problem: _answer_problem,
                HTTPException: _answer_http_exception,
                ClientDisconnect: _answer_nobody,
                Exception: _answer_error,
            },
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:  # noqa: ARG002 - Starlette's signature
        self._predictions = Predictions(self._origin, self._state_dir, self._control)
        tasks = [
            asyncio.create_task(self._predictions.remove_when_due()),
            asyncio.create_task(_end_with_parent(os.getppid())),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._predictions.close()

    # Predictions

    async def create_by_version(self, request: Request) -> Response:
        """`POST /v1/predictions`: `owner/name` (official), `owner/name:id` or `id`."""
        body = await _parse(request, CreateByVersionRequest)
        path, _, version = body.version.rpartition(":") if ":" in body.version else ("", "", body.version)
        model = models_by_version.get(version)
        if model is not None and path in ("", model.path):
            return await self._create(request, body, model, version=version)
        official = models.get(version)
        if not path and official is not None and official.official:
            return await self._create(request, body, official, version="hidden")
        detail = "The specified version does not exist (or perhaps you don't have permission to use it?)"
        raise Problem(422, "Invalid version or not permitted", detail)

    async def create_by_model(self, request: Request) -> Response:
        """`POST /v1/models/{owner}/{name}/predictions`: official models only."""
        model = _model(request)
        if not model.official:
            raise not_found()
        return await self._create(request, await _parse(request, CreateRequest), model, version="hidden")

    async def create_by_deployment(self, request: Request) -> Response:
        """`POST /v1/deployments/{owner}/{name}/predictions`."""
        path = "{owner}/{name}".format(**request.path_params)
        model = self._account.deployed(path)
        if model is None:
            raise not_found()
        body = await _parse(request, CreateRequest)
        return await self._create(request, body, model, version=model.version, deployment=path)

    async def create_training(self, request: Request) -> Response:
        """`POST /v1/models/{owner}/{name}/versions/{version}/trainings`."""
        model = _model(request)
        if request.path_params["version"] != model.version or not model.trainable:
            raise not_found()
        body = await _parse(request, TrainRequest)
        if body.destination not in models:
            description = "The destination does not exist (or perhaps you don't have permission to use it?)"
            raise invalid([{"type": "destination", "field": "destination", "description": description}])
        return await self._create(request, body, model, version=model.version)

    async def _create(
        self,
        request: Request,
        body: CreateRequest | TrainRequest,
        model: Model,
        *,
        version: str,
        deployment: str | None = None,
    ) -> Response:
        destination = body.destination if isinstance(body, TrainRequest) else None
        # A training has neither a wait nor a deadline.
        wait_seconds = None if destination else _wait_seconds(request.headers.get("prefer"))
        lifetime_seconds = None if destination else _lifetime_seconds(request.headers.get("cancel-after"))
        if fields := model.invalid_fields(body.input, training=destination is not None):
            raise invalid(fields)

        def fault(name: FaultName) -> Fault | None:
            found = self._control.take(name, model=model.path, path=request.url.path, webhook=body.webhook)
            if found:
                request.scope["record"]["fault"] = found.fault
            return found

        if found := fault(FaultName.CREATE_THROTTLED):
            return throttled(found.retry_after_seconds, header=found.header, body_field=found.body_field)
        if found := fault(FaultName.CREATE_REFUSED):
            raise _fault_problem(found)
        if fault(FaultName.CREATE_RESET):
            return Dropped()
        if found := fault(FaultName.CREATE_SILENCE):
            return Dropped(found.seconds or SILENCE_SECONDS)
        prediction = self._predictions.create(
            model,
            version,
            body.input,
            webhook=body.webhook,
            events=list(body.webhook_events_filter) if body.webhook_events_filter is not None else None,
            deployment=deployment,
            lifetime_seconds=lifetime_seconds,
            destination=destination,
        )
        request.scope["record"]["prediction"] = prediction.id
        if found := fault(FaultName.CREATE_ACCEPTED_THEN_ERROR):
            raise _fault_problem(found)
        if fault(FaultName.CREATE_ACCEPTED_THEN_RESET):
            return Dropped()
        if found := fault(FaultName.CREATE_ACCEPTED_THEN_SILENCE):
            return Dropped(found.seconds or SILENCE_SECONDS)
        if wait_seconds is not None:
            await self._predictions.wait(prediction, wait_seconds)
        if found := fault(FaultName.CREATE_ANSWER_LATE):
            with contextlib.suppress(TimeoutError):
                late = prediction.webhook_done.wait() if found.until_webhook else self._control.pause(found.seconds)
                await asyncio.wait_for(late, found.seconds or SILENCE_SECONDS)
        shown = prediction.to_json(self._origin)
        headers = {"location": shown["urls"]["get"]}
        if wait_seconds is not None:
            headers["preference-applied"] = request.headers["prefer"].strip()
            if prediction.status == "succeeded" and fault(FaultName.CREATE_DATA_URLS):
                shown["status"] = "processing"
                shown["output"] = self._predictions.with_data_urls(shown["output"])
                for name in ("completed_at", "metrics"):
                    shown.pop(name, None)
        return JSONResponse(shown, 201, headers=headers)

    async def get_prediction(self, request: Request) -> Response:
        """`GET /v1/predictions/{id}`."""
        prediction = self._find(request)
        self._raise_fault(request, FaultName.GET_ERROR, prediction)
        if found := self._take_fault(request, FaultName.GET_SILENCE, prediction):
            return Dropped(found.seconds or SILENCE_SECONDS)
        return JSONResponse(prediction.to_json(self._origin))

    async def cancel_prediction(self, request: Request) -> Response:
        """`POST /v1/predictions/{id}/cancel`: may respond before the status changes."""
        prediction = self._find(request)
        self._raise_fault(request, FaultName.CANCEL_ERROR, prediction)
        await self._predictions.cancel(prediction)
        return JSONResponse(prediction.to_json(self._origin))

    async def list_predictions(self, request: Request) -> Response:
        """`GET /v1/predictions`: pages of 100, newest first."""
        query = request.query_params
        if query.get("source") not in (None, "web"):
            raise invalid([{"type": "enum", "field": "source", "description": "must be web"}])
        after, before = (_moment(query.get(name), name) for name in ("created_after", "created_before"))
        if found := self._control.take(FaultName.LIST_ERROR, path=request.url.path):
            request.scope["record"]["fault"] = found.fault
            raise _fault_problem(found)
        now, lag = datetime.now(UTC), self._control.settings.list_lag_seconds
        listed = [
            prediction
            for prediction in self._predictions.all()
            if prediction.collection == "predictions"
            and (now - prediction.created_at).total_seconds() >= lag
            and (after is None or prediction.created_at >= after)
            and (before is None or prediction.created_at < before)
            and "source" not in query  # no prediction here was created on the web site
        ]
        ids = [prediction.id for prediction in listed]
        return self._page(request, ids, [prediction.to_json(self._origin) for prediction in listed])

    async def list_trainings(self, request: Request) -> Response:
        """`GET /v1/trainings`: pages of 100, newest first; it has no filters."""
        if found := self._control.take(FaultName.LIST_ERROR, path=request.url.path):
            request.scope["record"]["fault"] = found.fault
            raise _fault_problem(found)
        listed = [each for each in self._predictions.all() if each.collection == "trainings"]
        return self._page(request, [each.id for each in listed], [each.to_json(self._origin) for each in listed])

    def _find(self, request: Request) -> Prediction:
        prediction = self._predictions.find(request.path_params["id"])
        if prediction is None or prediction.collection not in request.url.path:
            raise not_found()
        request.scope["record"]["prediction"] = prediction.id
        return prediction

    def _take_fault(self, request: Request, name: FaultName, prediction: Prediction) -> Fault | None:
        found = self._control.take(name, model=prediction.model.path, path=request.url.path, webhook=prediction.webhook)
        if found:
            request.scope["record"]["fault"] = found.fault
        return found

    def _raise_fault(self, request: Request, name: FaultName, prediction: Prediction) -> None:
        if found := self._take_fault(request, name, prediction):
            raise not_found() if found.status == 404 else _fault_problem(found)

    # Models

    async def list_models(self, request: Request) -> Response:
        """`GET /v1/models`: the public ones."""
        for name, allowed in {
            "sort_by": ("model_created_at", "latest_version_created_at"),
            "sort_direction": ("asc", "desc"),
        }.items():
            if request.query_params.get(name) not in (None, *allowed):
                raise invalid([{"type": "enum", "field": name, "description": f"must be {' or '.join(allowed)}"}])
        public = [path for path, model in self._account.models.items() if model["visibility"] == "public"]
        return self._page(request, public, [self._model_json(path) for path in public])

    async def create_model(self, request: Request) -> Response:
        """`POST /v1/models`."""
        body = await _parse(request, CreateModel)
        if body.owner != OWNER:
            raise Problem(403, "Forbidden", "The model's owner must be the account that the token belongs to.")
        if f"{body.owner}/{body.name}" in self._account.models:
            raise Problem(409, "Conflict", "A model with that name and owner already exists.")
        return JSONResponse(self._account.create_model(body), 201)

    async def get_model(self, request: Request) -> Response:
        """`GET /v1/models/{owner}/{name}`."""
        return JSONResponse(self._model_json(self._model_path(request)))

    async def update_model(self, request: Request) -> Response:
        """`PATCH /v1/models/{owner}/{name}`."""
        path = self._model_path(request)
        return JSONResponse(self._account.update_model(path, await _parse(request, UpdateModel)))

    async def delete_model(self, request: Request) -> Response:
        """`DELETE /v1/models/{owner}/{name}`: private ones without versions.

        Replicate does not document the error's status.
        """
        path = self._model_path(request)
        if self._account.models[path]["visibility"] != "private" or self._account.versions[path]:
            raise Problem(403, "Forbidden", "You can only delete private models that have no versions.")
        self._account.delete_model(path)
        return Response(status_code=204)

    async def list_examples(self, request: Request) -> Response:
        """`GET /v1/models/{owner}/{name}/examples`."""
        examples = self._account.examples(self._model_path(request))
        return self._page(request, [example["id"] for example in examples], examples)

    async def get_readme(self, request: Request) -> Response:
        """`GET /v1/models/{owner}/{name}/readme`: Markdown, as plain text."""
        readme = self._account.readmes.get(self._model_path(request))
        if readme is None:
            raise not_found()
        return PlainTextResponse(readme)

    async def list_versions(self, request: Request) -> Response:
        """`GET /v1/models/{owner}/{name}/versions`."""
        versions = self._account.versions[self._model_path(request)]
        return self._page(request, list(versions), list(versions.values()))

    async def get_version(self, request: Request) -> Response:
        """`GET /v1/models/{owner}/{name}/versions/{version}`."""
        version = self._account.versions[self._model_path(request)].get(request.path_params["version"])
        if version is None:
            raise not_found()
        return JSONResponse(version)

    async def delete_version(self, request: Request) -> Response:
        """`DELETE /v1/models/{owner}/{name}/versions/{version}`: of private models.

        Accepted with 202, done immediately.
        """
        path = self._model_path(request)
        if request.path_params["version"] not in self._account.versions[path]:
            raise not_found()
        if self._account.models[path]["visibility"] != "private":
            raise Problem(403, "Forbidden", "You can only delete versions from private models.")
        del self._account.versions[path][request.path_params["version"]]
        return Response(status_code=202)

    async def list_collections(self, request: Request) -> Response:
        """`GET /v1/collections`."""
        return self._page(request, list(COLLECTIONS), [self._account.collection(slug) for slug in COLLECTIONS])

    async def get_collection(self, request: Request) -> Response:
        """`GET /v1/collections/{slug}`."""
        slug = request.path_params["slug"]
        if slug not in COLLECTIONS:
            raise not_found()
        held = [self._model_json(f"{OWNER}/{name}") for name in COLLECTIONS[slug][2]]
        return JSONResponse({**self._account.collection(slug), "full_description": None, "models": held})

    async def search(self, request: Request) -> Response:
        """`GET /v1/search?query=&limit=`."""
        query = request.query_params.get("query", "")
        if not query:
            return JSONResponse({"detail": 'Query parameter "query" is required'}, 400)
        limit = request.query_params.get("limit", "20")
        if not re.fullmatch("[1-9]|[1-4][0-9]|50", limit):
            return JSONResponse({"detail": 'Query parameter "limit" must be between 1 and 50'}, 400)
        return JSONResponse(self._account.search(query, int(limit)))

    async def list_deployments(self, request: Request) -> Response:
        """`GET /v1/deployments`."""
        found = self._account.deployments
        return self._page(request, list(found), list(found.values()))

    async def create_deployment(self, request: Request) -> Response:
        """`POST /v1/deployments`: responds with 200."""
        body = await _parse(request, CreateDeployment)
        if body.version not in self._account.versions.get(body.model, {}):
            raise invalid([{"type": "value", "field": "version", "description": "is not a version of the model"}])
        if f"{OWNER}/{body.name}" in self._account.deployments:
            raise Problem(409, "Conflict", "A deployment with that name already exists.")
        return JSONResponse(self._account.create_deployment(body))

    async def get_deployment(self, request: Request) -> Response:
        """`GET /v1/deployments/{owner}/{name}`."""
        return JSONResponse(self._account.deployments[self._deployment_path(request)])

    async def update_deployment(self, request: Request) -> Response:
        """`PATCH /v1/deployments/{owner}/{name}`: creates another release."""
        path = self._deployment_path(request)
        body = await _parse(request, UpdateDeployment)
        model = self._account.deployments[path]["current_release"]["model"]
        if body.version is not None and body.version not in self._account.versions.get(model, {}):
            raise invalid([{"type": "value", "field": "version", "description": "is not a version of the model"}])
        return JSONResponse(self._account.update_deployment(path, body))

    async def delete_deployment(self, request: Request) -> Response:
        """`DELETE /v1/deployments/{owner}/{name}`.

        Replicate requires that it has been idle for 15 minutes.
        """
        del self._account.deployments[self._deployment_path(request)]
        return Response(status_code=204)

    def _model_path(self, request: Request) -> str:
        path = "{owner}/{name}".format(**request.path_params)
        if path not in self._account.models:
            raise not_found()
        return path

    def _deployment_path(self, request: Request) -> str:
        path = "{owner}/{name}".format(**request.path_params)
        if path not in self._account.deployments:
            raise not_found()
        return path

    def _model_json(self, path: str) -> JsonObject:
        runs = sum(prediction.model.path == path for prediction in self._predictions.all())
        return {**(self._account.model(path) or {}), "run_count": runs}

    def _page(self, request: Request, keys: list[str], items: list[JsonObject]) -> Response:
        """Return one page; its cursor is a key, so that new items do not shift pages."""
        start = 0
        if cursor := request.query_params.get("cursor"):
            try:
                start = keys.index(base64.urlsafe_b64decode(cursor).decode()) + 1
            except ValueError:
                raise invalid([{"type": "cursor", "field": "cursor", "description": "Invalid cursor"}]) from None

        def url(before: int) -> str:
            query = [(name, value) for name, value in parse_qsl(request.url.query) if name != "cursor"]
            if before > 0:
                query.append(("cursor", base64.urlsafe_b64encode(keys[before - 1].encode()).decode()))
            return f"{self._origin}{request.url.path}" + (f"?{urlencode(query)}" if query else "")

        return JSONResponse(
            {
                "previous": url(max(0, start - PAGE)) if start else None,
                "next": url(start + PAGE) if start + PAGE < len(items) else None,
                "results": items[start : start + PAGE],
            }
        )

    # The rest of the API

    async def get_signing_secret(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        """`GET /v1/webhooks/default/secret`."""
        return JSONResponse({"key": self._control.settings.signing_secret})

    async def get_account(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        """`GET /v1/account`."""
        return JSONResponse(USER)

    async def list_hardware(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        """`GET /v1/hardware`: a plain array."""
        return JSONResponse(HARDWARE)

    # Files and streams

    async def get_file(self, request: Request) -> Response:
        """`GET /files/{key}/{name}`."""
        stored = self._predictions.file(request.path_params["key"], request.path_params["name"])
        if stored is None:
            raise not_found()

        def fault(name: FaultName) -> Fault | None:
            found = self._control.take(name, model=stored.model, path=request.url.path)
            if found:
                request.scope["record"]["fault"] = found.fault
            return found

        if found := fault(FaultName.FILE_ERROR):
            raise _fault_problem(found)
        if found := fault(FaultName.FILE_REDIRECTED):
            return RedirectResponse(found.location, 302)
        size = stored.path.stat().st_size
        headers = {"content-length": str(size)}
        if found := fault(FaultName.FILE_TRUNCATED):
            some = _parts(stored.path, int(size * found.share))
            return Truncated(some, media_type=stored.content_type, headers=headers)
        if found := fault(FaultName.FILE_SLOW):
            drops = _parts(stored.path, size, found.bytes_per_second)
            return StreamingResponse(drops, media_type=stored.content_type, headers=headers)
        return FileResponse(stored.path, media_type=stored.content_type)

    async def store_file(self, request: Request) -> Response:
        """`PUT /_cog/{key}/{name}`: Cog uploads an output file."""
        if not secrets.compare_digest(request.path_params["key"], self._predictions.upload_key):
            raise not_found()
        url = await self._predictions.store(
            request.headers.get("x-prediction-id", ""),
            request.path_params["name"],
            request.headers.get("content-type", "application/octet-stream"),
            request.stream(),
        )
        if url is None:
            raise not_found()
        return Response(status_code=201, headers={"location": url})

    async def stream(self, request: Request) -> Response:
        """`GET /stream/{key}`: server-sent events, from `Last-Event-ID` on."""
        prediction = self._predictions.find_stream(request.path_params["key"])
        if prediction is None or not prediction.model.streams:
            raise not_found()
        events = self._predictions.stream_events(prediction, request.headers.get("last-event-id", ""))
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})

    # Control

    async def get_record(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        """`GET /_control/record`."""
        return JSONResponse(
            {
                "requests": list(self._control.requests),
                "webhooks": list(self._control.webhooks),
                "predictions": [
                    {**prediction.to_json(self._origin), "webhook": prediction.webhook}
                    for prediction in reversed(self._predictions.all())
                ],
            }
        )

    async def get_faults(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        """`GET /_control/faults`."""
        return JSONResponse({"faults": self._control.faults()})

    async def add_faults(self, request: Request) -> Response:
        """`POST /_control/faults`."""
        body = await _json(request)
        self._control.add(_validated(TypeAdapter(list[Fault]), body if isinstance(body, list) else [body]))
        return JSONResponse({"faults": self._control.faults()}, 201)

    async def get_settings(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        """`GET /_control/settings`."""
        return JSONResponse(self._control.settings.model_dump())

    async def change_settings(self, request: Request) -> Response:
        """`POST /_control/settings`."""
        body = await _json(request)
        if not isinstance(body, dict):
            raise invalid([{"type": "type", "field": "settings", "description": "must be an object"}])
        merged = self._control.settings.model_dump() | body
        self._control.apply(_validated(TypeAdapter(Settings), merged))
        return JSONResponse(self._control.settings.model_dump())

    async def release(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        """`POST /_control/release`."""
        self._control.release()
        return JSONResponse({})

    async def reset(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        """`POST /_control/reset`."""
        self._control.reset()
        self._account.reset()
        return JSONResponse({})


async def _end_with_parent(parent: int) -> None:
    """Stop this process when its parent has ended, so that no process is left."""
    while os.getppid() == parent:
        await asyncio.sleep(0.5)
    log.info("the process that started the local Replicate has ended: stopping")
    signal.raise_signal(signal.SIGTERM)


async def _parts(path: Path, end: int, bytes_per_second: int | None = None) -> AsyncIterator[bytes]:
    """Yield the first `end` bytes of a file, at a given speed."""
    step = max(1, bytes_per_second // 10) if bytes_per_second else 256 * 1024
    with path.open("rb") as file:
        while file.tell() < end:
            yield file.read(min(step, end - file.tell()))
            if bytes_per_second:
                await asyncio.sleep(step / bytes_per_second)


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "Bad request", f"The request body is not valid JSON: {error}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


async def _parse(request: Request, kind: type[Body]) -> Body:
    return _validated(TypeAdapter(kind), await _json(request))


def _validated(adapter: TypeAdapter[Value], body: Any) -> Value:
    try:
        return adapter.validate_python(body)
    except ValidationError as error:
        raise invalid(
            [
                {
                    "type": found["type"],
                    "field": ".".join(str(part) for part in found["loc"]) or "body",
                    "description": found["msg"],
                }
                for found in error.errors()
            ]
        ) from None


def _model(request: Request) -> Model:
    model = models.get("{owner}/{name}".format(**request.path_params))
    if model is None:
        raise not_found()
    return model


def _wait_seconds(prefer: str | None) -> int | None:
    """Return the seconds of `Prefer: wait[=1..60]`, or None."""
    if prefer is None:
        return None
    match = re.fullmatch(r"\s*wait(?:=([1-9]|[1-5][0-9]|60))?\s*", prefer)
    if match is None:
        raise invalid([{"type": "pattern", "field": "Prefer", "description": "must be wait or wait=1 to wait=60"}])
    return int(match[1] or 60)


def _lifetime_seconds(cancel_after: str | None) -> int | None:
    """Return the seconds of `Cancel-After: 30 | 30s | 5m | 1h30m45s`, or None."""
    if cancel_after is None:
        return None
    match = re.fullmatch(r"(?:(\d{1,6})|(?=\d)(?:(\d{1,4})h)?(?:(\d{1,4})m)?(?:(\d{1,6})s)?)", cancel_after.strip())
    seconds = 0
    if match is not None:
        plain, hours, minutes, rest = (int(group or 0) for group in match.groups())
        seconds = plain + hours * 3600 + minutes * 60 + rest
    if seconds < 5:
        description = "must be a duration of at least 5 seconds, such as 30s, 5m or 1h30m45s"
        raise invalid([{"type": "duration", "field": "Cancel-After", "description": description}])
    return seconds


def _moment(value: str | None, name: str) -> datetime | None:
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise invalid([{"type": "format", "field": name, "description": "must be an RFC 3339 time"}]) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _fault_problem(fault: Fault) -> Problem:
    return Problem(fault.status, "Fault", f"The fault {fault.fault} was switched on.")


async def _answer_problem(request: Request, problem: Exception) -> Response:  # noqa: ARG001 - Starlette's signature
    assert isinstance(problem, Problem)
    return problem_response(problem)


async def _answer_http_exception(request: Request, error: Exception) -> Response:  # noqa: ARG001 - as above
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return problem_response(not_found())
    return problem_response(Problem(error.status_code, error.detail, f"{error.detail}."))


async def _answer_nobody(request: Request, error: Exception) -> Response:  # noqa: ARG001 - as above
    return Response(status_code=400)


async def _answer_error(request: Request, error: Exception) -> Response:  # noqa: ARG001 - Starlette logs the error
    return problem_response(Problem(500, "Internal error", "Internal error of the local Replicate. See its log."))
