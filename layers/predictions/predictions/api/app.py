"""The HTTP API's common part: routing, and errors as problems.

Each API function makes a resolver with `resolver()`, adds its routes and ends with `answer_with(app)`. Errors become
RFC 7807 problems here, once.
"""

import base64
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from aws_lambda_powertools.event_handler import APIGatewayRestResolver, CORSConfig, Response
from aws_lambda_powertools.event_handler.exceptions import NotFoundError
from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import api_url
from predictions.errors import Problem
from predictions.ids import is_id
from predictions.observability import handler_of, logger
from predictions.store.predictions import PredictionsTable
from predictions.store.records import PredictionDetail

# What a page's script may read of an answer, besides its body.
_EXPOSED_HEADERS = [
    "Location", "Preference-Applied", "Retry-After", "RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset"
]  # fmt: skip

_JSON = "application/json"
_PROBLEM = "application/problem+json"

# Made from openapi.yaml by `make openapi`; read when it is asked for, so that no cold start pays for its 97 KB.
_DOCUMENT = Path(__file__).with_name("openapi.json")
_DOCUMENT_URL = "https://api.example.com/v1"  # the server that openapi.yaml names


def resolver() -> APIGatewayRestResolver:
    """A Powertools resolver that answers every error with a problem."""
    origin = os.environ["CORS_ORIGIN"]
    cors = CORSConfig(allow_origin=origin, expose_headers=_EXPOSED_HEADERS, max_age=600) if origin else None
    # Under a domain name of its own the API's base path is part of the event's path.
    app = APIGatewayRestResolver(debug=False, cors=cors, strip_prefixes=["/v1"])

    def refuse(problem: Problem) -> Response[str]:
        logger.info("refused", status=problem.status, title=problem.title)
        return _response(problem.status, problem.body(), _PROBLEM, problem.headers)

    def not_found(_: NotFoundError) -> Response[str]:
        event = app.current_event
        return refuse(Problem(404, f"There is no route {event.http_method} {event.path[:200]}."))

    app.exception_handler(Problem)(refuse)
    app.not_found(not_found)
    return app


def answer_with(app: APIGatewayRestResolver) -> Callable[[dict[str, Any], Any], dict[str, Any]]:
    """The Lambda handler of a resolver: whatever its routes do not expect is a 503 problem that says nothing of it."""

    def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
        try:
            return app.resolve(event, context)
        except (ClientError, BotoCoreError):
            logger.exception("AWS failed")
            problem = Problem(
                503, "The stack could not reach a part of itself: try again.", headers={"Retry-After": "2"}
            )
        except Exception:  # noqa: BLE001  # the last border before the caller: nothing of an unexpected error may reach it
            logger.exception("unexpected error")
            problem = Problem(500, "The stack made an error; its log has the details.")
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


def json_response(status: int, body: Any, headers: Mapping[str, str] | None = None) -> Response[str]:
    """A JSON answer."""
    return _response(status, body, _JSON, headers)


def openapi_response() -> Response[str]:
    """Respond with the API's OpenAPI document.

    Its server is this stack's own URL.
    The file's text is the response: to parse and serialize it again would only take time.
    """
    text = _DOCUMENT.read_text(encoding="ascii").replace(json.dumps(_DOCUMENT_URL), json.dumps(api_url()), 1)
    return Response(status_code=200, content_type=_JSON, body=text)


def owner_with(app: APIGatewayRestResolver, *scopes: Literal["predict", "read", "train", "manage"]) -> str:
    """Return the owner of the access token of the current request.

    Args:
        app: The resolver of the request.
        scopes: The token needs one of these; `manage` includes `train`.

    Raises:
        Problem: 403, where the token has none of the scopes.
    """
    authorized: Mapping[str, Any] = app.current_event.request_context.authorizer.raw_event
    owner = authorized.get("owner")
    given = set(str(authorized.get("scopes", "")).split())
    if "manage" in given:
        given.add("train")
    if not owner or given.isdisjoint(scopes):
        wanted = " or ".join(f"`{scope}`" for scope in scopes)
        raise Problem(403, f"This access token lacks the scope {wanted}: its owner has to make one that has it.")
    return str(owner)


def headers_of(app: APIGatewayRestResolver) -> dict[str, str]:
    """The current request's headers, their names in lower case."""
    headers: Mapping[str, str | None] = app.current_event.headers
    return {name.lower(): value for name, value in headers.items() if value is not None}


def all_headers_of(app: APIGatewayRestResolver) -> dict[str, str]:
    """As `headers_of`, but with all values of a header that was sent more than once, joined as RFC 9110 does.

    The last of them is what `headers_of` has; whoever must not choose among several uses this.
    """
    event = app.current_event.raw_event
    many: Mapping[str, list[str | None]] = event.get("multiValueHeaders") or {
        name: [value] for name, value in (event.get("headers") or {}).items()
    }
    joined: dict[str, list[str]] = {}
    for name, values in many.items():
        joined.setdefault(name.lower(), []).extend(value for value in values if value is not None)
    return {name: ", ".join(values) for name, values in joined.items() if values}


def body_of(app: APIGatewayRestResolver) -> bytes:
    """The current request's body, as sent.

    Raises:
        Problem: 415, where it is said to be compressed or otherwise encoded; 400, where bytes that are no UTF-8 were
            replaced on the way, or what API Gateway calls base64 is none.
    """
    event, headers = app.current_event, headers_of(app)
    coding = headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        # To unpack what a stranger packed has no bound; to read it as it is would take it for something else.
        detail = f"The body is said to be encoded as {coding[:30]!a}: send it as it is, without Content-Encoding."
        raise Problem(415, detail, headers={"Accept-Encoding": "identity"})
    if event.is_base64_encoded:
        try:
            return base64.b64decode(event.body or "", validate=True)
        except ValueError:
            raise Problem(400, "The body is not readable: it came as base64, and is none.") from None
    body = (event.body or "").encode("utf-8", "surrogatepass")
    length, media_type = headers.get("content-length", ""), headers.get("content-type", "application/json")
    # Other types are refused as such: nobody who sends one means text.
    is_read = re.match(r"\s*(application/([^;]*\+)?json|multipart/form-data)\s*(;|$)", media_type, re.IGNORECASE)
    if is_read and re.fullmatch(r"[0-9]{1,12}", length, re.ASCII) and int(length) != len(body):
        raise Problem(400, "The body was altered on its way: it is no UTF-8, and was taken for text.")
    return body


def own_prediction(
    table: PredictionsTable, prediction_id: str, owner: str, kind: Literal["prediction", "training"] = "prediction"
) -> PredictionDetail:
    """One of an owner's predictions, or trainings.

    Raises:
        Problem: 404, where there is none, it is of the other kind, or another owner's: nobody learns which.
    """
    whole = table.read(prediction_id) if is_id(prediction_id) else None
    if whole is None or whole.prediction.owner != owner or whole.prediction.object != kind:
        raise no_prediction(prediction_id, kind)
    return whole


def no_prediction(prediction_id: str, kind: str = "prediction") -> Problem:
    """The 404 for a prediction or training that is not there, or not the caller's."""
    return Problem(404, f"There is no {kind} {prediction_id[:64]!r}.")


def _response(status: int, body: Any, content_type: str, headers: Mapping[str, str] | None) -> Response[str]:
    text = json.dumps(body, separators=(",", ":"), allow_nan=False)
    return Response(status_code=status, content_type=content_type, body=text, headers=dict(headers or {}))
