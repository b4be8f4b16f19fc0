"""This stack's API as an OpenAPI 3.1 document, for `GET /openapi.json`.

Made from one table of operations. The bodies that callers send are the pydantic models that check them; the answers
are written out here, and tests hold every answer of the handlers against them. What Replicate's own API does not have
is marked `x-added: true`: operations, parameters, headers and fields.

Routes that are passed on are answered by Replicate: their schemas name the fields that it documents
(https://api.replicate.com/openapi.json), require none of them and forbid none, because nothing here checks them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from predictions.batch_body import BatchBody
from predictions.file_uploads import UploadBody
from predictions.intents import PredictionBody, TrainingBody
from predictions.pipeline_definition import STEPS_LIMIT, PipelineBody, StepBody
from predictions.recipe_bodies import RecipeBody

VERSION = "0.1.0"

Scope = Literal["predict", "read", "train", "manage"]
Schema = dict[str, Any]

_JSON = "application/json"
_ADDED = {"x-added": True}
_NAME = {"type": "string", "pattern": "^[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9_])?$"}
_ID = {"type": "string", "pattern": "^[a-z0-9]{26}$"}
_BUCKET = {"type": "string", "enum": ["inputs", "outputs", "source"]}
_RECIPE_NAME = {"type": "string", "pattern": "^[a-z0-9][a-z0-9-]{0,62}$"}
_VERSION_ID = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_INTEGER = {"type": "integer"}
_NUMBER = {"type": "number"}
_FLAG = {"type": "boolean"}
_OBJECT = {"type": "object"}
_URL = {"type": "string", "format": "uri"}
_TIME = {"type": "string", "format": "date-time"}
_TIME_OR_NULL = {"type": ["string", "null"], "format": "date-time"}

_WORDS = {
    400: "The request is not readable.",
    401: "No valid access token.",
    403: "The access token lacks the scope.",
    404: "There is no such thing, or it is not the caller's.",
    409: "Not in this state.",
    413: "The body is too large.",
    414: "The query is too long.",
    415: "Another media type, charset or encoding is needed.",
    422: "Fields are wrong: `invalid_fields` names each one.",
    429: "Too many requests, a limit of the owner's is used up, or the create could start only later than"
    " `MaxStartDelaySeconds` from now: see `Retry-After`.",
    502: "The request failed, or Replicate did.",
    503: "Not now, as in a pause: see `Retry-After`, or try again.",
    504: "It took too long.",
}
# Which operation gives which. A 500 is none of them: it would be a defect, and a check of the answers has to find it.
_OF_EVERY_ROUTE = (400, 429, 502, 503, 504)  # API Gateway's own, and 503 of a handler that AWS fails
_OF_A_TOKEN = (401, 403)
_OF_A_NAME_IN_THE_PATH = (404,)
_OF_A_BODY = (413, 415)
_OF_A_CHECKED_FIELD = (422,)  # of a body, or of the query: a cursor here, an order at Replicate
_OF_A_FORWARDED_CALL = (404, 414)
_OF_A_FORWARDED_CHANGE = (409,)


@dataclass(frozen=True)
class Operation:
    """One route.

    Attributes:
        method: In capitals.
        path: As in the template.
        id: Its name, that of Replicate's own document where it is there.
        summary: What it does, in a few words.
        scope: What an access token needs; None for a public route.
        or_scope: Another scope that allows it as well.
        status: Of success.
        answer: Schema of the answer's body, by name or written out; None where there is no body.
        body: Schema of the body by name; None where the route takes none.
        refusals: Statuses that nothing else here tells (see `problems`).
        parameters: Names in `components.parameters`, beside those of the path.
        headers: Names in `components.headers` that a success has.
        added: Whether Replicate has no such route.
        also: Another status of success, with the same answer.
        media_type: Of the answer.
        body_media_type: Of the body.
        forwarded: Whether it is passed on to Replicate, of whose refusals the known ones are described: any other 4xx
            comes through as it is.
    """

    method: str
    path: str
    id: str
    summary: str
    scope: Scope | None
    status: int = 200
    answer: str | Schema | None = None
    body: str | None = None
    refusals: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    added: bool = False
    also: int | None = None
    media_type: str = _JSON
    body_media_type: str = _JSON
    forwarded: bool = False
    or_scope: Scope | None = None

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """Each scope that allows it; none for a public route."""
        named = tuple(scope for scope in (self.scope, self.or_scope) if scope)
        return (*named, "manage") if "train" in named else named

    @property
    def names(self) -> list[str]:
        """The parameters of the path."""
        return [part[1:-1] for part in self.path.split("/") if part.startswith("{")]

    @property
    def problems(self) -> list[int]:
        """The statuses of its answers other than success."""
        families = [
            (_OF_EVERY_ROUTE, True),
            (_OF_A_TOKEN, self.scope is not None),
            (_OF_A_NAME_IN_THE_PATH, bool(self.names)),
            (_OF_A_BODY, self.body is not None),
            (_OF_A_CHECKED_FIELD, self._checks_fields),
            (_OF_A_FORWARDED_CALL, self.forwarded),
            (_OF_A_FORWARDED_CHANGE, self.forwarded and self.method != "GET"),
            (self.refusals, True),
        ]
        return sorted({status for family, given in families if given for status in family})

    @property
    def _checks_fields(self) -> bool:
        # Of a webhook only the signature is checked: what it says is for the protocol to judge.
        checks_body = self.body is not None and self.scope is not None
        return checks_body or "Cursor" in self.parameters or (self.forwarded and bool(self.parameters))


_SIGNATURE = ("WebhookId", "WebhookTimestamp", "WebhookSignature")
_RATE_LIMIT = ("RateLimitLimit", "RateLimitRemaining", "RateLimitReset")
_CREATE: dict[str, Any] = {"scope": "predict", "status": 201}
_CREATE_PREDICTION: dict[str, Any] = {
    **_CREATE,
    "refusals": (404,),  # a model that is not there, wherever it is named
    "answer": "Prediction",
    "parameters": ("Prefer", "CancelAfter", "IdempotencyKey", "RetryCount"),
    "headers": ("Location", "PreferenceApplied", *_RATE_LIMIT),
}
_CREATE_FILE: dict[str, Any] = {**_CREATE, "headers": ("Location",)}
_PAGE: dict[str, Any] = {"scope": "read", "parameters": ("Cursor",)}

OWN: tuple[Operation, ...] = (
    Operation("GET", "/openapi.json", "openapi.get", "Get this document", "read", answer=_OBJECT, added=True),
    Operation(
        "POST", "/predictions", "predictions.create", "Create a prediction", body="VersionBody", **_CREATE_PREDICTION
    ),
    Operation(
        "POST",
        "/models/{owner}/{name}/predictions",
        "models.predictions.create",
        "Create a prediction using a model; a community model runs its latest version",
        body="InputBody",
        **_CREATE_PREDICTION,
    ),
    Operation(
        "POST",
        "/deployments/{owner}/{name}/predictions",
        "deployments.predictions.create",
        "Create a prediction using a deployment",
        body="InputBody",
        **_CREATE_PREDICTION,
    ),
    Operation(
        "GET",
        "/predictions",
        "predictions.list",
        "List predictions",
        answer="PredictionPage",
        **{**_PAGE, "parameters": ("Cursor", "CreatedAfter", "CreatedBefore", "Source")},
    ),
    Operation("GET", "/predictions/{id}", "predictions.get", "Get a prediction", "read", answer="Prediction"),
    Operation(
        "POST", "/predictions/{id}/cancel", "predictions.cancel", "Cancel a prediction", "predict", answer="Prediction"
    ),
    Operation(
        "DELETE",
        "/predictions/{id}",
        "predictions.delete",
        "Remove input, output, logs and files of a prediction that has ended",
        "predict",
        answer="Prediction",
        refusals=(409,),
        added=True,
    ),
    Operation(
        "POST",
        "/models/{owner}/{name}/versions/{id}/trainings",
        "trainings.create",
        "Train a version into a new one of `destination`",
        answer="Training",
        body="TrainingBody",
        parameters=("IdempotencyKey", "RetryCount"),
        headers=("Location", *_RATE_LIMIT),
        **{**_CREATE, "scope": "train"},
    ),
    Operation("GET", "/trainings", "trainings.list", "List trainings", answer="TrainingPage", **_PAGE),
    Operation("GET", "/trainings/{id}", "trainings.get", "Get a training", "read", answer="Training"),
    Operation(
        "POST",
        "/trainings/{id}/cancel",
        "trainings.cancel",
        "Cancel a training",
        "predict",
        answer="Training",
        or_scope="train",
    ),
    Operation(
        "POST",
        "/files",
        "files.create",
        "Store a file of up to 4.4 MB",
        answer="File",
        body="FileForm",
        body_media_type="multipart/form-data",
        **_CREATE_FILE,
    ),
    Operation(
        "POST",
        "/uploads",
        "uploads.create",
        "Get a URL for a file of up to 5 GiB",
        answer="Upload",
        body="UploadBody",
        added=True,
        **_CREATE_FILE,
    ),
    Operation("GET", "/files", "files.list", "List files", answer="FilePage", **_PAGE),
    Operation("GET", "/files/{id}", "files.get", "Get a file's description", "read", answer="File"),
    Operation("DELETE", "/files/{id}", "files.delete", "Delete a file", "predict", 204),
    Operation(
        "GET",
        "/files/{id}/download",
        "files.download",
        "Get a file's bytes, by redirection: the link is the secret",
        None,
        302,
        parameters=("LinkOwner", "LinkExpiry", "LinkSignature"),
        headers=("Location",),
    ),
    Operation(
        "POST",
        "/batches",
        "batches.create",
        "Run many requests, from the body or from a manifest in the inputs bucket",
        answer="Batch",
        body="BatchBody",
        parameters=("IdempotencyKey",),
        headers=("Location",),
        added=True,
        **_CREATE,
    ),
    Operation("GET", "/batches", "batches.list", "List batches", answer="BatchPage", added=True, **_PAGE),
    Operation("GET", "/batches/{id}", "batches.get", "Get a batch", "read", answer="Batch", added=True),
    Operation(
        "POST", "/batches/{id}/cancel", "batches.cancel", "Cancel a batch", "predict", answer="Batch", added=True
    ),
    Operation(
        "POST",
        "/batches/{id}/retry",
        "batches.retry",
        "Run the lines anew that failed or were canceled, in a batch that has ended",
        "predict",
        answer="Batch",
        refusals=(409,),
        added=True,
    ),
    Operation(
        "GET",
        "/objects/{bucket}/{name}",
        "objects.get",
        "Get an object's bytes, by redirection: the link, which models are given, is the secret",
        None,
        302,
        parameters=("ObjectKey", "ObjectVersion", "ObjectExpires", "LinkSignature"),
        headers=("Location",),
        added=True,
    ),
    Operation(
        "POST",
        "/recipes",
        "recipes.create",
        "Create a recipe: a template of a request, and what starts it",
        "manage",
        201,
        "Recipe",
        body="NamedRecipeBody",
        refusals=(409,),
        headers=("Location",),
        added=True,
    ),
    Operation(
        "GET",
        "/recipes",
        "recipes.list",
        "List recipes",
        "manage",
        answer="RecipePage",
        parameters=("Cursor",),
        added=True,
    ),
    Operation("GET", "/recipes/{name}", "recipes.get", "Get a recipe", "manage", answer="Recipe", added=True),
    Operation(
        "PUT",
        "/recipes/{name}",
        "recipes.put",
        "Create a recipe (201), or replace the one of that name (200)",
        "manage",
        answer="Recipe",
        body="RecipeBody",
        refusals=(409,),
        headers=("Location",),
        also=201,
        added=True,
    ),
    Operation(
        "DELETE", "/recipes/{name}", "recipes.delete", "Delete a recipe", "manage", 204, refusals=(409,), added=True
    ),
    Operation(
        "POST",
        "/pipelines",
        "pipelines.create",
        "Start a pipeline: steps that use each other's outputs",
        answer="Pipeline",
        body="PipelineBody",
        parameters=("IdempotencyKey",),
        headers=("Location",),
        added=True,
        **_CREATE,
    ),
    Operation("GET", "/pipelines", "pipelines.list", "List pipelines", answer="PipelinePage", added=True, **_PAGE),
    Operation(
        "GET",
        "/pipelines/{id}",
        "pipelines.get",
        "Get a pipeline with its steps",
        "read",
        answer="Pipeline",
        added=True,
    ),
    Operation(
        "POST",
        "/pipelines/{id}/cancel",
        "pipelines.cancel",
        "Cancel a pipeline",
        "predict",
        answer="Pipeline",
        added=True,
    ),
    Operation(
        "GET",
        "/webhooks/default/secret",
        "webhooks.default.secret.get",
        "Get the secret with which webhooks to you are signed",
        "predict",
        answer="WebhookSecret",
    ),
    Operation(
        "POST",
        "/webhooks/replicate/{id}",
        "webhooks.replicate",
        "Take a webhook that Replicate signed",
        None,
        answer="Receipt",
        body="ReplicateWebhook",
        parameters=_SIGNATURE,
        refusals=(401,),
        added=True,
    ),
)
"""What this stack answers by itself."""

_FORWARDED: Mapping[tuple[str, str], tuple[str, str, int, str | Schema | None, str | None]] = {
    ("GET", "/account"): ("account.get", "Get the account of the stack's Replicate token", 200, "Account", None),
    ("GET", "/collections"): ("collections.list", "List collections", 200, "CollectionPage", None),
    ("GET", "/collections/{slug}"): ("collections.get", "Get a collection", 200, "Collection", None),
    ("GET", "/deployments"): ("deployments.list", "List deployments", 200, "DeploymentPage", None),
    ("POST", "/deployments"): ("deployments.create", "Create a deployment", 200, "Deployment", "DeploymentBody"),
    ("GET", "/deployments/{owner}/{name}"): ("deployments.get", "Get a deployment", 200, "Deployment", None),
    ("PATCH", "/deployments/{owner}/{name}"): (
        "deployments.update",
        "Change a deployment",
        200,
        "Deployment",
        "DeploymentChanges",
    ),
    ("DELETE", "/deployments/{owner}/{name}"): ("deployments.delete", "Delete a deployment", 204, None, None),
    ("GET", "/hardware"): (
        "hardware.list",
        "List what models can run on",
        200,
        {"type": "array", "items": {"$ref": "#/components/schemas/Hardware"}},
        None,
    ),
    ("GET", "/models"): ("models.list", "List public models", 200, "ModelPage", None),
    ("POST", "/models"): ("models.create", "Create a model", 201, "Model", "ModelBody"),
    ("GET", "/models/{owner}/{name}"): ("models.get", "Get a model", 200, "Model", None),
    ("PATCH", "/models/{owner}/{name}"): ("models.update", "Change a model", 200, "Model", "ModelChanges"),
    ("DELETE", "/models/{owner}/{name}"): ("models.delete", "Delete a model", 204, None, None),
    ("GET", "/models/{owner}/{name}/examples"): (
        "models.examples.list",
        "List a model's examples",
        200,
        "ExamplePage",
        None,
    ),
    ("GET", "/models/{owner}/{name}/readme"): ("models.readme.get", "Get a model's readme", 200, _TEXT, None),
    ("GET", "/models/{owner}/{name}/versions"): (
        "models.versions.list",
        "List a model's versions",
        200,
        "VersionPage",
        None,
    ),
    ("GET", "/models/{owner}/{name}/versions/{id}"): ("models.versions.get", "Get a version", 200, "Version", None),
    ("DELETE", "/models/{owner}/{name}/versions/{id}"): ("models.versions.delete", "Delete a version", 202, None, None),
    ("GET", "/search"): ("search", "Find models and collections", 200, "SearchResult", None),
}
_FORWARDED_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "/models": ("SortBy", "SortDirection"),
    "/search": ("Query", "Limit"),
}


def operations() -> list[Operation]:
    """All routes: what this stack answers by itself, and what is passed on."""
    return [*OWN, *(_forwarded(method, path) for method, path in _FORWARDED)]


def describe(api_url: str) -> dict[str, Any]:
    """The document.

    Args:
        api_url: The stack's public URL, ending in `/v1`.
    """
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations():
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "replicate-serverless",
            "version": VERSION,
            "description": (
                "Replicate's HTTP API, as this stack speaks it. `x-added: true` marks what Replicate's own does not "
                "have. Where Replicate is asked, a refusal of its that is not listed comes through with its own status."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": api_url}],
        "paths": paths,
        "webhooks": {"prediction": {"post": _webhook()}},
        "components": {
            "schemas": _SCHEMAS | _bodies(),
            "parameters": _PARAMETERS,
            "headers": _HEADERS,
            "responses": {
                f"Problem{status}": _problem(words, _RATE_LIMIT if status == 429 else ())
                for status, words in _WORDS.items()
            },
            "securitySchemes": {
                "accessToken": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An access token of this stack; the list that an operation gives is its scope.",
                }
            },
        },
    }


def _forwarded(method: str, path: str) -> Operation:
    name, summary, status, answer, body = _FORWARDED[method, path]
    return Operation(
        method,
        path,
        name,
        f"{summary} (passed on to Replicate)",
        "read" if method == "GET" else "manage",
        status,
        answer,
        body,
        parameters=_FORWARDED_PARAMETERS.get(path, ()) if method == "GET" else (),
        media_type="text/plain" if path.endswith("/readme") else _JSON,
        forwarded=True,
    )


def _operation(operation: Operation) -> dict[str, Any]:
    success: dict[str, Any] = {"description": "Done." if operation.answer is None else "What was asked for."}
    if operation.answer is not None:
        success["content"] = {operation.media_type: {"schema": _schema(operation.answer)}}
    if operation.headers:
        success["headers"] = {
            _HEADER_NAMES[name]: {"$ref": f"#/components/headers/{name}"} for name in operation.headers
        }
    described: dict[str, Any] = {
        "operationId": operation.id,
        "summary": operation.summary,
        "parameters": [
            *(_path(operation, name) for name in operation.names),
            *({"$ref": f"#/components/parameters/{name}"} for name in operation.parameters),
        ],
        "responses": {
            str(operation.status): success,
            **({str(operation.also): success} if operation.also else {}),
            **{str(status): {"$ref": f"#/components/responses/Problem{status}"} for status in operation.problems},
        },
        "security": [{"accessToken": [scope]} for scope in operation.scopes],
    }
    if operation.body:
        content = {operation.body_media_type: {"schema": _schema(operation.body)}}
        described["requestBody"] = {"required": True, "content": content}
    return described | (_ADDED if operation.added else {})


def _path(operation: Operation, name: str) -> dict[str, Any]:
    """A parameter of the path: `id` names a version below a model, else something of ours."""
    if name == "slug":
        schema: Schema = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_-]{0,127}$"}
    elif name == "id":
        schema = _VERSION_ID if "/versions/" in operation.path else _ID
    elif operation.path.startswith("/objects/"):
        schema = _BUCKET if name == "bucket" else _TEXT
    elif operation.path.startswith("/recipes/"):
        schema = _RECIPE_NAME
    else:
        schema = _NAME
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _schema(schema: str | Schema) -> Schema:
    return {"$ref": f"#/components/schemas/{schema}"} if isinstance(schema, str) else schema


def _problem(words: str, headers: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "description": words,
        "headers": {_HEADER_NAMES[name]: {"$ref": f"#/components/headers/{name}"} for name in ("RetryAfter", *headers)},
        "content": {"application/problem+json": {"schema": _schema("Problem")}},
    }


def _webhook() -> dict[str, Any]:
    return {
        "summary": "What is sent to the `webhook` of a prediction or training, signed with the owner's secret",
        "parameters": [
            {"$ref": f"#/components/parameters/{name}"}
            for name in ("WebhookId", "WebhookTimestamp", "WebhookSignature")
        ],
        "requestBody": {
            "required": True,
            "content": {_JSON: {"schema": {"anyOf": [_schema("Prediction"), _schema("Training")]}}},
        },
        "responses": {
            "2XX": {"description": "It was received."},
            "410": {"description": "Do not try again."},
            "default": {"description": "Try again."},
        },
    }


def _object(properties: dict[str, Schema], *, optional: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> Schema:
    """An object of ours: every field is there, but for the optional ones."""
    return {
        "type": "object",
        "required": [name for name in properties if name not in optional],
        "properties": {name: {**schema, **(_ADDED if name in added else {})} for name, schema in properties.items()},
    }


def _open(properties: dict[str, Schema], required: tuple[str, ...] = ()) -> Schema:
    """An object of Replicate's: it may have other fields, and lack some."""
    found: Schema = {"type": "object", "properties": properties, "additionalProperties": True}
    return found | ({"required": list(required)} if required else {})


def _page(schema: str) -> Schema:
    return _object(
        {"previous": _LINK, "next": _LINK, "results": {"type": "array", "items": _schema(schema), "maxItems": 100}}
    )


def _open_page(schema: str) -> Schema:
    return _open({"previous": _LINK, "next": _LINK, "results": {"type": "array", "items": _schema(schema)}})


_LINK = {"type": ["string", "null"], "format": "uri"}
_STATUS = {"type": "string", "enum": ["starting", "processing", "succeeded", "failed", "canceled", "aborted"]}
_EVENTS = {"type": "array", "items": {"type": "string", "enum": ["start", "output", "logs", "completed"]}}
_PREDICTION: dict[str, Schema] = {
    "id": _ID,
    "model": {**_TEXT, "description": "`owner/name`; empty where only a version's id is known."},
    "version": {**_TEXT, "description": "A version's id, or `hidden`."},
    "input": {**_OBJECT, "description": "As sent; one that no answer can carry is `{url}` of it."},
    "output": {
        "description": "What the model makes, or null; files are URLs of this stack's copies. One that no answer can "
        "carry is the URL of a JSON document with `output` and `logs`."
    },
    "logs": {**_TEXT, "description": "The last 256 Ki characters."},
    "error": _TEXT_OR_NULL,
    "status": _STATUS,
    "created_at": _TIME,
    "started_at": _TIME_OR_NULL,
    "completed_at": _TIME_OR_NULL,
    "metrics": _OBJECT,
    "data_removed": _FLAG,
    "source": {"type": "string", "enum": ["api"]},
    "deadline": _TIME,
    "urls": _object({"get": _URL, "cancel": _URL, "web": _URL, "stream": _URL}, optional=("stream",)),
    "output_files": {"type": "array", "items": {"$ref": "#/components/schemas/OutputFile"}},
    "deployment": {**_TEXT, "description": "`owner/name`, where a deployment runs it."},
    "webhook": _TEXT,
    "webhook_events_filter": _EVENTS,
}
_OPTIONAL = ("deployment", "webhook", "webhook_events_filter")
_FILE: dict[str, Schema] = {
    "id": _ID,
    "name": _TEXT,
    "content_type": _TEXT,
    "size": {"type": "integer", "minimum": 0},
    "etag": _TEXT,
    "checksums": {"type": "object", "properties": {"sha256": _TEXT, "md5": _TEXT}},
    "metadata": _OBJECT,
    "created_at": _TIME,
    "expires_at": _TIME,
    "urls": _object({"get": _URL}),
    "uploaded": {**_FLAG, "description": "False for an upload that S3 does not have yet."},
}
_RECIPE: dict[str, Schema] = {
    "id": _ID,
    "name": _RECIPE_NAME,
    "model": _TEXT,
    "version": _TEXT,
    "deployment": _TEXT,
    "input": _OBJECT,
    "defaults": _OBJECT,
    "webhook": _TEXT,
    "webhook_events_filter": _EVENTS,
    "lifetime": {"type": ["string", "integer"]},
    "output_prefix": _TEXT,
    "s3": _OBJECT,
    "pattern": _OBJECT,
    "bus": {"type": "string", "enum": ["default", "stack"]},
    "schedule": _OBJECT,
    "state": {
        "type": "string",
        "enum": ["pending", "active", "deleting"],
        "description": "`pending`: what starts it may not be there yet; put it again.",
    },
    "deployed": {"type": "boolean", "description": "Whether it came with the stack's deployment."},
    "created_at": _TIME,
    "updated_at": _TIME,
    "urls": _object({"get": _URL}),
}
_UPLOAD_LINK = _object(
    {
        "method": {"type": "string", "enum": ["PUT"]},
        "url": _URL,
        "headers": {"type": "object", "additionalProperties": _TEXT},
        "expires_at": _TIME,
    }
)
_MODEL_FIELDS: dict[str, Schema] = {
    "description": _TEXT_OR_NULL,
    "github_url": _TEXT_OR_NULL,
    "paper_url": _TEXT_OR_NULL,
    "license_url": _TEXT_OR_NULL,
}
_RELEASE_FIELDS: dict[str, Schema] = {
    "version": _TEXT,
    "hardware": _TEXT,
    "min_instances": _INTEGER,
    "max_instances": _INTEGER,
}
_VISIBILITY = {"type": "string", "enum": ["public", "private"]}
_ACCOUNT = _open({"type": _TEXT, "username": _TEXT, "name": _TEXT, "github_url": _TEXT_OR_NULL})
_LISTED_COLLECTION: dict[str, Schema] = {"name": _TEXT, "slug": _TEXT, "description": _TEXT_OR_NULL}

_PIPELINE: dict[str, Schema] = {
    "id": _ID,
    "status": {"type": "string", "enum": ["running", "succeeded", "failed", "canceled"]},
    "error": _TEXT_OR_NULL,
    "created_at": _TIME,
    "completed_at": _TIME_OR_NULL,
    "cancel_requested_at": _TIME_OR_NULL,
    "deadline": _TIME,
    "urls": _object({"get": _URL, "cancel": _URL}),
}
_PIPELINE_STEP = _object(
    {
        "name": _TEXT,
        "status": {
            "type": "string",
            "enum": ["waiting", "starting", "processing", "succeeded", "failed", "canceled", "skipped"],
        },
        "needs": {"type": "array", "items": _TEXT},
        "predictions": {"type": "array", "items": _ID},
        "output": {"description": "What the model made; with `for_each` a list, in its order."},
        "error": _TEXT_OR_NULL,
        "seconds": {"type": ["integer", "null"]},
    }
)

_SCHEMAS: dict[str, Schema] = {
    "Problem": {
        **_object(
            {
                "title": _TEXT,
                "detail": _TEXT,
                "status": _INTEGER,
                "invalid_fields": {"type": "array", "items": _object({"field": _TEXT, "detail": _TEXT})},
            },
            optional=("status", "invalid_fields"),
        ),
        "description": "RFC 7807.",
    },
    "OutputFile": {
        "description": "Where an output file is for good, or why it is not; `path` is a JSON pointer into `output`.",
        "anyOf": [
            _object(
                {
                    "path": _TEXT,
                    "bucket": _TEXT,
                    "key": _TEXT,
                    "bytes": {"type": "integer", "minimum": 0},
                    "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
                    "content_type": _TEXT,
                }
            ),
            _object({"path": _TEXT, "error": _TEXT}),
        ],
    },
    "Prediction": _object(_PREDICTION, optional=_OPTIONAL, added=("output_files",)),
    "Training": _object(
        {**_PREDICTION, "destination": {**_TEXT, "description": "The model that it makes a version of."}},
        optional=_OPTIONAL,
        added=("output_files", "deadline", "destination"),
    ),
    "PredictionPage": _page("Prediction"),
    "TrainingPage": _page("Training"),
    "File": _object(_FILE, added=("uploaded",)),
    "FilePage": _page("File"),
    "Upload": _object({**_FILE, "upload": _UPLOAD_LINK}, added=("uploaded", "upload")),
    "Recipe": _object(
        _RECIPE,
        optional=tuple(
            name
            for name in _RECIPE
            if name not in {"id", "name", "input", "state", "deployed", "created_at", "updated_at", "urls"}
        ),
    ),
    "RecipePage": _page("Recipe"),
    "FileForm": _object(
        {
            "content": {"type": "string", "contentMediaType": "application/octet-stream"},
            "filename": _TEXT,
            "type": _TEXT,
            "metadata": _OBJECT,
        },
        optional=("filename", "type", "metadata"),
    ),
    "Pipeline": _object(
        {
            **_PIPELINE,
            "input": _OBJECT,
            "steps": {"type": "array", "items": _PIPELINE_STEP},
            "output": {
                "type": ["object", "null"],
                "additionalProperties": {},
                "description": "By name, the outputs of the steps that no other one needs; null until the end.",
            },
            "outputs_left_out": {
                "type": "array",
                "items": _TEXT,
                "description": "Steps whose outputs no answer can carry; each prediction has its own.",
            },
        }
    ),
    "PipelinePage": _page("ListedPipeline"),
    "ListedPipeline": _object(_PIPELINE),
    "Batch": _object(
        {
            "id": _ID,
            "status": {"type": "string", "enum": ["preparing", "running", "succeeded", "failed", "canceled"]},
            "recipe": {**_TEXT_OR_NULL, "description": "The name of the recipe that makes its requests."},
            "manifest": {**_TEXT_OR_NULL, "description": "`s3://…`; null where the requests came with the call."},
            "total": {"type": ["integer", "null"], "description": "Lines; null until they are counted."},
            "counts": _object(
                {
                    name: {"type": "integer", "minimum": 0}
                    for name in ("waiting", "running", "succeeded", "failed", "canceled", "refused")
                }
            ),
            "attempt": _INTEGER,
            "max_concurrency": _INTEGER,
            "tolerated_failure_percentage": _INTEGER,
            "cancel_requested": _FLAG,
            "error": _TEXT_OR_NULL,
            "results": {
                "description": "JSONL, a line for each line of the manifest, in its order; null before the first end.",
                "anyOf": [{"type": "null"}, _object({"uri": _TEXT, "url": _URL})],
            },
            "created_at": _TIME,
            "completed_at": _TIME_OR_NULL,
            "urls": _object({"get": _URL, "cancel": _URL, "retry": _URL}),
        }
    ),
    "BatchPage": _page("Batch"),
    "WebhookSecret": _object({"key": {"type": "string", "pattern": "^whsec_"}}),
    "Receipt": _object({"received": _TEXT}),
    "ReplicateWebhook": _open({"id": _TEXT, "status": _STATUS}),
    "Account": _ACCOUNT,
    "Collection": _open(
        {
            **_LISTED_COLLECTION,
            "full_description": _TEXT_OR_NULL,
            "models": {"type": "array", "items": _schema("Model")},
        }
    ),
    "ListedCollection": _open(_LISTED_COLLECTION),
    "CollectionPage": _open_page("ListedCollection"),
    "Deployment": _open(
        {
            "owner": _TEXT,
            "name": _TEXT,
            "current_release": _open(
                {
                    "number": _INTEGER,
                    "model": _TEXT,
                    "version": _TEXT,
                    "created_at": _TIME,
                    "created_by": _ACCOUNT,
                    "configuration": _open(
                        {name: schema for name, schema in _RELEASE_FIELDS.items() if name != "version"}
                    ),
                }
            ),
        }
    ),
    "DeploymentPage": _open_page("Deployment"),
    "DeploymentBody": _open(
        {"name": _TEXT, "model": _TEXT, **_RELEASE_FIELDS}, required=("name", "model", *_RELEASE_FIELDS)
    ),
    "DeploymentChanges": _open(_RELEASE_FIELDS),
    "Hardware": _open({"name": _TEXT, "sku": _TEXT}),
    "Model": _open(
        {
            **_MODEL_FIELDS,
            "owner": _TEXT,
            "name": _TEXT,
            "url": _TEXT,
            "visibility": _VISIBILITY,
            "is_official": _FLAG,
            "run_count": _INTEGER,
            "cover_image_url": _TEXT_OR_NULL,
            "default_example": {"type": ["object", "null"]},
            "latest_version": {"type": ["object", "null"]},
        }
    ),
    "ModelPage": _open_page("Model"),
    "ModelBody": _open(
        {
            **_MODEL_FIELDS,
            "owner": _TEXT,
            "name": _TEXT,
            "visibility": _VISIBILITY,
            "hardware": _TEXT,
            "cover_image_url": _TEXT_OR_NULL,
        },
        required=("owner", "name", "visibility", "hardware"),
    ),
    "ModelChanges": _open({**_MODEL_FIELDS, "readme": _TEXT_OR_NULL, "weights_url": _TEXT_OR_NULL}),
    "ExamplePage": _open_page("Example"),
    "Example": _open({"id": _TEXT, "model": _TEXT, "input": _OBJECT, "output": {}, "status": _TEXT, "urls": _OBJECT}),
    "Version": _open(
        {
            "id": _TEXT,
            "created_at": _TIME,
            "cog_version": _TEXT_OR_NULL,
            "openapi_schema": {"type": ["object", "null"]},
        }
    ),
    "VersionPage": _open_page("Version"),
    "SearchResult": _open(
        {
            "query": _TEXT,
            "models": {"type": "array", "items": _open({"model": _schema("Model"), "metadata": _OBJECT})},
            "collections": {"type": "array", "items": _schema("ListedCollection")},
            "pages": {"type": "array", "items": _open({"name": _TEXT, "href": _TEXT})},
        }
    ),
}

_FIELDS = {
    "batches": "That it takes manifests dropped as `batches/{owner}/{recipe}/…`, and how such batches run.",
    "bus": "Where the `pattern` looks: the account's default bus, or the stack's own.",
    "defaults": "Values for fields of `input` that are not there, or whose placeholder finds nothing.",
    "deployment": "`owner/name`.",
    "format": "Of the manifest: by default what the end of its name says, else `jsonl`.",
    "manifest": "The id of a file of yours, or `s3://{inputs bucket}/batches/{owner}/…`.",
    "max_concurrency": "How many lines run at once.",
    "recipe": "The name of a recipe of yours that makes a request of each line, as `row`; in place of `template`.",
    "requests": "Bodies of `POST /predictions`, each with `model`, `version` or `deployment`.",
    "template": "A request whose texts have placeholders, `{{ row.column }}`, that are filled from each line.",
    "tolerated_failure_percentage": "Of lines that fail; where more do, no further one starts.",
    "destination": "An existing model that the training makes a version of, as `owner/name`.",
    "filename": "Shown again, and used for nothing else.",
    "for_each": "A list, or a placeholder that finds one: the step runs once for each of its elements.",
    "input": "What the model takes, checked against its own schema where that is known.",
    "model": "`owner/name`, or `owner/name:version`.",
    "name": "Unique among its owner's recipes, or in its pipeline.",
    "output_prefix": "Where results go in the owner's part of the outputs bucket; by default the object's key.",
    "pattern": "An event pattern of EventBridge.",
    "s3": "Objects of the inputs bucket, or of the source bucket, that start it.",
    "schedule": "A schedule of EventBridge Scheduler that starts it.",
    "lifetime": "As the header Cancel-After, which goes first.",
    "metadata": "Any JSON object of up to 16 KiB.",
    "sha256": "In hexadecimal: S3 refuses other bytes.",
    "size": "In bytes: S3 refuses another size.",
    "stream": "Deprecated; passed on to Replicate.",
    "type": "A media type.",
    "version": "`owner/name`, `owner/name:version` or a version's id.",
    "webhook": "An https URL of a public host, to which the stack POSTs the prediction.",
    "webhook_completed": "Deprecated: a `webhook` for `completed` alone.",
    "webhook_events_filter": "Which events; without it `output` and `completed`.",
}


def _bodies() -> dict[str, Schema]:
    """What callers send, as the models that check it say."""
    version_body = _body(PredictionBody, added=("lifetime", "webhook_completed"))
    version_body["required"] = ["version", "input"]
    version_body["properties"]["version"] = {
        "type": "string", "maxLength": 256, "description": _FIELDS["version"]
    }  # fmt: skip
    input_body = _body(PredictionBody, added=("lifetime", "webhook_completed"))
    del input_body["properties"]["version"]
    named_recipe_body = _body(RecipeBody)
    named_recipe_body["required"] = ["name", *named_recipe_body["required"]]
    return {
        "RecipeBody": _body(RecipeBody),
        "NamedRecipeBody": named_recipe_body,
        "VersionBody": version_body,
        "InputBody": input_body,
        "TrainingBody": _body(TrainingBody),
        "UploadBody": _body(UploadBody),
        "PipelineBody": _body(
            PipelineBody,
            input={**_OBJECT, "description": "What steps refer to as `input`."},
            steps={"type": "array", "minItems": 1, "maxItems": STEPS_LIMIT, "items": _body(StepBody)},
        ),
        "BatchBody": _body(BatchBody),
    }


def _body(model: type[BaseModel], *, added: tuple[str, ...] = (), **written_out: Schema) -> Schema:
    made: dict[str, Any] = model.model_json_schema()
    within = {f"#/$defs/{name}": schema for name, schema in made.get("$defs", {}).items()}
    properties = {}
    for name, schema in made["properties"].items():
        if name in written_out:
            properties[name] = written_out[name]
            continue
        kept = {key: _inlined(value, within) for key, value in schema.items() if key != "title"}
        properties[name] = {**kept, "description": _FIELDS[name], **(_ADDED if name in added else {})}
    return {
        "type": "object",
        "required": made.setdefault("required", []),
        "properties": properties,
        "additionalProperties": made["additionalProperties"],
    }


def _inlined(schema: Any, within: Mapping[str, Schema]) -> Any:
    """A schema with the ones that it refers to in their places; a model's are never within themselves."""
    if isinstance(schema, list):
        return [_inlined(part, within) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema and schema["$ref"] in within:
        return _inlined(within[schema["$ref"]], within)
    return {key: _inlined(value, within) for key, value in schema.items()}


def _parameter(name: str, place: str, description: str, schema: Schema, **others: Any) -> dict[str, Any]:
    return {"name": name, "in": place, "description": description, "schema": schema, **others}


_PARAMETERS: dict[str, dict[str, Any]] = {
    "Cursor": _parameter("cursor", "query", "From `next` or `previous`, as it is.", _TEXT),
    "CreatedAfter": _parameter(
        "created_after", "query", "Only what was created at or after this time; UTC without an offset.", _TIME
    ),
    "CreatedBefore": _parameter(
        "created_before", "query", "Only what was created before this time; UTC without an offset.", _TIME
    ),
    "Source": _parameter(
        "source",
        "query",
        "How it was made. All of this stack's predictions are of the `api` (which Replicate's own API does not take "
        "here), and none of the `web`.",
        {"type": "string", "enum": ["web", "api"]},
    ),
    "Prefer": _parameter(
        "Prefer",
        "header",
        "`wait` or `wait=10`: answer when the prediction has ended, at most 25 s later.",
        {"type": "string", "examples": ["wait=10"]},
    ),
    "CancelAfter": _parameter(
        "Cancel-After",
        "header",
        "The deadline: 5 seconds to 3 days.",
        {"type": "string", "examples": ["90", "5m", "1h30m"]},
    ),
    "IdempotencyKey": _parameter(
        "Idempotency-Key",
        "header",
        "The same owner, key and request get what the first one started.",
        {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
        **_ADDED,
    ),
    "RetryCount": _parameter(
        "X-Stainless-Retry-Count",
        "header",
        "Which repetition of a request this is: for two minutes as good as an Idempotency-Key.",
        _TEXT,
        **_ADDED,
    ),
    "LinkOwner": _parameter("owner", "query", "Of the link.", _TEXT, required=True),
    "LinkExpiry": _parameter("expiry", "query", "Of the link.", _TEXT, required=True),
    "LinkSignature": _parameter("signature", "query", "Of the link.", _TEXT, required=True),
    "ObjectKey": _parameter("key", "query", "Of the link.", _TEXT, required=True),
    "ObjectVersion": _parameter("version_id", "query", "Of the link, where it has one.", _TEXT),
    "ObjectExpires": _parameter("expires", "query", "Of the link.", _TEXT, required=True),
    "WebhookId": _parameter("webhook-id", "header", "The same for every try.", _TEXT, required=True),
    "WebhookTimestamp": _parameter(
        "webhook-timestamp", "header", "Seconds since 1970.", {"type": "string", "pattern": "^[0-9]+$"}, required=True
    ),
    "WebhookSignature": _parameter(
        "webhook-signature", "header", "See https://www.standardwebhooks.com.", _TEXT, required=True
    ),
    "SortBy": _parameter("sort_by", "query", "Passed on to Replicate.", _TEXT),
    "SortDirection": _parameter("sort_direction", "query", "Passed on to Replicate.", _TEXT),
    "Query": _parameter("query", "query", "What to find; passed on to Replicate.", _TEXT, required=True),
    "Limit": _parameter("limit", "query", "The most results; passed on to Replicate.", _INTEGER),
}

_HEADER_NAMES = {
    "Location": "Location",
    "PreferenceApplied": "Preference-Applied",
    "RetryAfter": "Retry-After",
    "RateLimitLimit": "RateLimit-Limit",
    "RateLimitRemaining": "RateLimit-Remaining",
    "RateLimitReset": "RateLimit-Reset",
}
_HEADERS: dict[str, dict[str, Any]] = {
    "Location": {"description": "Where it is.", "schema": _URL},
    "PreferenceApplied": {"description": "How long it was waited at most.", "schema": _TEXT},
    "RetryAfter": {"description": "When to try again, in seconds.", "schema": _TEXT},
    "RateLimitLimit": {
        "description": "Of Replicate's limit, where Replicate tells it: how many calls.",
        "schema": _TEXT,
    },
    "RateLimitRemaining": {
        "description": "Of Replicate's limit, where Replicate tells it: how many calls the whole stack has left; 0 "
        "where Replicate did not take this one yet, which is submitted again by itself.",
        "schema": _TEXT,
    },
    "RateLimitReset": {
        "description": "Of Replicate's limit, where Replicate tells it: in how many seconds it is whole again.",
        "schema": _TEXT,
    },
}
