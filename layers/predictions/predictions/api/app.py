"""Shared parts of the HTTP API: routing, and errors as problems.

Each API function creates a resolver with `resolver()`, adds its routes and ends with `answer_with(app)`. Errors become
RFC 7807 problems in this module only.
"""

import base64
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from botocore.exceptions import BotoCoreError, ClientError

from predictions.api.routing import Request, Response, Router
from predictions.aws.clients import api_url
from predictions.errors import Problem
from predictions.ids import is_id
from predictions.observability import handler_of, logger
from predictions.store.predictions import PredictionsTable
from predictions.store.records import PredictionDetail

# Response headers that a script in a browser may read.
_EXPOSED_HEADERS = (
    "Location", "Preference-Applied", "Retry-After", "RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset"
)  # fmt: skip

_JSON = "application/json"
_PROBLEM = "application/problem+json"

# Made from openapi.yaml by `make openapi`; read on request, so that no cold start pays for its 97 KB.
_DOCUMENT = Path(__file__).with_name("openapi.json")
_DOCUMENT_URL = "https://api.example.com/v1"  # the server that openapi.yaml names


def resolver() -> Router:
    """Return a router that turns every error into a problem response."""

    def refuse(problem: Problem) -> Response:
        logger.info("refused", status=problem.status, title=problem.title)
        return _response(problem.status, problem.body(), _PROBLEM, problem.headers)

    def refused(error: Exception) -> Response | None:
        return refuse(error) if isinstance(error, Problem) else None

    def not_found(request: Request) -> Response:
        return refuse(Problem(404, f"Route {request.http_method} {request.path[:200]} not found."))

    origin = os.environ["CORS_ORIGIN"]
    return Router(
        refused=refused, not_found=not_found, base_path="/v1", origin=origin, exposed_headers=_EXPOSED_HEADERS
    )


def answer_with(app: Router) -> Callable[[dict[str, Any], Any], dict[str, Any]]:
    """Return the Lambda handler of a resolver.

    An error that its routes do not expect becomes a 503 or 500 problem without details.
    """

    def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
        try:
            return app.resolve(event, context)
        except (ClientError, BotoCoreError):
            logger.exception("AWS failed")
            problem = Problem(
                503, "A backend service is temporarily unavailable. Retry the request.", headers={"Retry-After": "2"}
            )
        except Exception:  # noqa: BLE001  # the caller must see no detail of an unexpected error
            logger.exception("unexpected error")
            problem = Problem(500, "Internal error. The stack's log has the details.")
        answer = _response(problem.status, problem.body(), _PROBLEM, problem.headers)
        origin = os.environ["CORS_ORIGIN"]
        allowed = {"Access-Control-Allow-Origin": origin} if origin else {}
        return {
            "statusCode": answer.status_code,
            "headers": {"Content-Type": _PROBLEM, **allowed, **problem.headers},
            "body": answer.body,
            "isBase64Encoded": False,
        }

    return handler_of(handler)


def json_response(status: int, body: Any, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON response."""
    return _response(status, body, _JSON, headers)


def openapi_response() -> Response:
    """Respond with the API's OpenAPI document.

    Its server is this stack's own URL. The response is the file's text: parsing and serializing it would only take
    time.
    """
    text = _DOCUMENT.read_text(encoding="ascii").replace(json.dumps(_DOCUMENT_URL), json.dumps(api_url()), 1)
    return Response(status_code=200, content_type=_JSON, body=text)


def owner_with(app: Router, *scopes: Literal["predict", "read", "train", "manage"]) -> str:
    """Return the owner of the access token of the current request.

    Args:
        app: The resolver of the request.
        scopes: The token needs one of these; `manage` includes `train`.

    Raises:
        Problem: 403 if the token has none of the scopes.
    """
    authorized: Mapping[str, Any] = app.request.owner_context
    owner = authorized.get("owner")
    given = set(str(authorized.get("scopes", "")).split())
    if "manage" in given:
        given.add("train")
    if not owner or given.isdisjoint(scopes):
        wanted = " or ".join(f"`{scope}`" for scope in scopes)
        raise Problem(403, f"This access token lacks the scope {wanted}. Use a token that has it.")
    return str(owner)


def headers_of(app: Router) -> dict[str, str]:
    """Return the current request's headers, with names in lower case."""
    return app.request.headers


def all_headers_of(app: Router) -> dict[str, str]:
    """Return the current request's headers, repeated ones joined as in RFC 9110.

    `headers_of` has only the last value of a repeated header. Use this function where a choice among several values
    would be unsafe.
    """
    event = app.request.event
    many: Mapping[str, list[str | None]] = event.get("multiValueHeaders") or {
        name: [value] for name, value in (event.get("headers") or {}).items()
    }
    joined: dict[str, list[str]] = {}
    for name, values in many.items():
        joined.setdefault(name.lower(), []).extend(value for value in values if value is not None)
    return {name: ", ".join(values) for name, values in joined.items() if values}


def body_of(app: Router) -> bytes:
    """Return the current request's body, as sent.

    Raises:
        Problem: 415 if the body is declared as compressed or otherwise encoded; 400 if it has another length than the
            header says, since invalid UTF-8 was replaced in transit, or if the base64 from API Gateway is invalid.
    """
    event, headers = app.request.event, headers_of(app)
    coding = headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        # Decompressing untrusted data is unbounded; reading it without decompressing would misinterpret it.
        detail = f"The content encoding {coding[:30]!a} is not supported. Send the body without Content-Encoding."
        raise Problem(415, detail, headers={"Accept-Encoding": "identity"})
    if event.get("isBase64Encoded"):
        try:
            return base64.b64decode(event.get("body") or "", validate=True)
        except ValueError:
            raise Problem(400, "The body is not valid base64.") from None
    body = (event.get("body") or "").encode("utf-8", "surrogatepass")
    # API Gateway hands on no Content-Length (https://github.com/aws/aws-lambda-dotnet/issues/559), and bytes that are
    # not UTF-8 as U+FFFD, which a text may have too: there such a body is read as it came. Other gateways name it.
    length, media_type = headers.get("content-length", ""), headers.get("content-type", "application/json")
    # Other media types are rejected as unsupported, whatever their bytes.
    is_read = re.match(r"\s*(application/([^;]*\+)?json|multipart/form-data)\s*(;|$)", media_type, re.IGNORECASE)
    if is_read and re.fullmatch(r"[0-9]{1,12}", length, re.ASCII) and int(length) != len(body):
        raise Problem(400, "The body is not valid UTF-8. Send it as UTF-8.")
    return body


def own_prediction(
    table: PredictionsTable, prediction_id: str, owner: str, kind: Literal["prediction", "training"] = "prediction"
) -> PredictionDetail:
    """Return one of an owner's predictions or trainings.

    Raises:
        Problem: 404 if it does not exist, is of the other kind, or belongs to another owner; the response is the same.
    """
    whole = table.read(prediction_id) if is_id(prediction_id) else None
    if whole is None or whole.prediction.owner != owner or whole.prediction.object != kind:
        raise no_prediction(prediction_id, kind)
    return whole


def no_prediction(prediction_id: str, kind: str = "prediction") -> Problem:
    """Return the 404 for a prediction or training that the caller does not have."""
    return Problem(404, f"{kind.capitalize()} {prediction_id[:64]!r} not found.")


def _response(status: int, body: Any, content_type: str, headers: Mapping[str, str] | None) -> Response:
    text = json.dumps(body, separators=(",", ":"), allow_nan=False)
    return Response(status_code=status, content_type=content_type, body=text, headers=dict(headers or {}))
