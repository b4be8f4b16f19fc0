"""The HTTP API's common part: routing, problems, and predictions as callers see them.

Each API function makes a resolver with `resolver()`, adds its routes and ends with `answer_with(app)`. Errors become
RFC 7807 problems here, once.
"""

import base64
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from aws_lambda_powertools.event_handler import APIGatewayRestResolver, CORSConfig, Response
from aws_lambda_powertools.event_handler.exceptions import NotFoundError
from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import api_url
from predictions.errors import Problem
from predictions.files.outputs_bucket import FILES_LIMIT, OutputsBucket, StoredFile
from predictions.files.signed_urls import Distribution
from predictions.ids import is_id
from predictions.observability import MetricUnit, handler_of, logger, metrics
from predictions.store.predictions import Page, Prediction, PredictionsTable, Whole

# Lambda answers with at most 6 MB, in which the body is a string: JSON within JSON.
# https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html
ANSWER_LIMIT_BYTES = 5_500_000
_LOGS_LIMIT_CHARACTERS = 256 * 1024
_LARGE_INPUT_BYTES = ANSWER_LIMIT_BYTES - 1024**2

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
) -> Whole:
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


@dataclass(frozen=True)
class ShownPage:
    """A page as callers see it.

    Attributes:
        results: Its predictions, from its start on.
        first: The place in the list of the first one; None on an empty page.
        beyond: The place of the last one, where there are further ones.
    """

    results: list[dict[str, Any]]
    first: str | None
    beyond: str | None


class Presenter:
    """Shows predictions as Replicate does, with every key present.

    Args:
        outputs: Makes the URLs of stored files, where no distribution does.
        url_seconds: How long those URLs work.
        distribution: Makes URLs that any client can fetch.
    """

    def __init__(self, outputs: OutputsBucket, url_seconds: int, distribution: Distribution | None = None) -> None:
        self._outputs = outputs
        self._url_seconds = url_seconds
        self._distribution = distribution

    @classmethod
    def from_env(cls) -> "Presenter":
        """From `OUTPUTS_BUCKET_NAME`, `FILE_ORIGINS`, `OUTPUT_URL_SECONDS` and what `Distribution.from_env` reads."""
        return cls(OutputsBucket.from_env(), int(os.environ["OUTPUT_URL_SECONDS"]), Distribution.from_env())

    def show(self, whole: Whole, *, as_starting: bool = False) -> dict[str, Any]:
        """A prediction in Replicate's JSON; what is ours is `output_files`.

        An output that makes the answer too large for Lambda is answered as the URL of a JSON document
        `{"output": …, "logs": …}`, and such an input as `{"url": …}`.

        Args:
            whole: The prediction.
            as_starting: Whether to show one that has not ended as `starting`, without output: the official clients
                take the answer to a wait that ended early for the end, unless it says so.
        """
        prediction = whole.prediction
        status = prediction.visible
        output = self._output(whole)
        if as_starting and status == "processing":
            status, output = "starting", None
        url = f"{api_url()}/{prediction.collection}/{prediction.id}"
        urls = {"get": url, "cancel": f"{url}/cancel", "web": url}
        if prediction.stream_url:
            urls["stream"] = prediction.stream_url
        ended = prediction.terminal and not prediction.awaits_copy
        shown: dict[str, Any] = {
            "id": prediction.id,
            "model": prediction.model or prediction.name or "",
            "version": prediction.upstream_version or prediction.version or "hidden",
            "input": whole.input,
            "output": output,
            "logs": (whole.logs or "")[-_LOGS_LIMIT_CHARACTERS:],
            "error": _error(prediction, whole.files) if ended else None,
            "status": status,
            "created_at": prediction.created_at,
            "started_at": prediction.started_at,
            "completed_at": prediction.completed_at if ended else None,
            "metrics": json.loads(prediction.metrics_json) if prediction.metrics_json and ended else {},
            "data_removed": prediction.data_removed,
            "source": "api",
            "deadline": _rfc3339(prediction.deadline),
            "urls": urls,
            "output_files": [self._file(file) for file in whole.files],
        }
        if prediction.destination:
            shown["destination"] = prediction.destination
        if prediction.deployment:
            shown["deployment"] = prediction.deployment
        if prediction.webhook:
            shown["webhook"] = prediction.webhook
            if prediction.webhook_events_filter:
                shown["webhook_events_filter"] = list(prediction.webhook_events_filter)
        # What no answer can carry is linked: it is an object in the bucket then.
        if whole.input_key and _is_too_large(shown):
            shown["input"] = {"url": self._url(whole.input_key)}
        if whole.result_key and output is not None and _is_too_large(shown):
            # A result with files names upstream's URLs, which end within the hour: it is not linked.
            link = None if whole.files else self._url(whole.result_key)
            shown |= {"output": link, "output_files": []}
            if link is None:
                shown["error"] = f"The output with its {len(whole.files)} files is too large for an answer."
        return shown

    def show_started(
        self, prediction: Prediction, asked: Any, read: Callable[[], Whole], *, as_starting: bool = True
    ) -> dict[str, Any]:
        """Show a prediction to the caller who has just started it, whatever fails while it is shown.

        It is started, and may be paid for: a caller who got an error would start another one. So on any error
        (AWS fails, the secret that signs URLs is refused or damaged) it is shown as `starting`, without output: the
        caller reads it by its id.

        Args:
            prediction: What was started.
            asked: Its input.
            read: Reads it with its payloads.
            as_starting: As for `show`.
        """
        try:
            return self.show(read(), as_starting=as_starting)
        except Exception:  # noqa: BLE001  # whatever it is, the caller must not take it for "nothing was started"
            logger.exception("started, but not shown", prediction_id=prediction.id)
            metrics.add_metric(name="AnswersWithoutOutput", unit=MetricUnit.Count, value=1)
        # Nothing of this has to be signed or read. The input is left out where it leaves no room for the rest.
        open_ = replace(prediction, status="starting", visible="starting", rank=0)
        return self.show(Whole(open_, {} if answer_bytes(asked) > _LARGE_INPUT_BYTES else asked, None, None, []))

    def link(self, key: str) -> str:
        """A URL of an object in the outputs bucket, which works for a while."""
        return self._url(key)

    def show_page(self, page: Page) -> "ShownPage":
        """As many predictions of a page as one answer carries, but at least one, from its start on."""
        results: list[dict[str, Any]] = []
        places: list[str] = []
        room, more = ANSWER_LIMIT_BYTES, page.more
        for whole in page.predictions:
            shown = self.show(whole)
            room -= answer_bytes(shown)
            if results and room < 0:
                more = True
                break
            results.append(shown)
            places.append(whole.prediction.listed_at)
        return ShownPage(results, places[0] if places else None, places[-1] if places and more else None)

    def _output(self, whole: Whole) -> Any:
        if whole.output is None or whole.prediction.awaits_copy:
            return None
        if not whole.prediction.terminal:
            # Its files are still upstream's: callers are shown no URL that is not ours.
            return None if self._outputs.holds_files(whole.output) else whole.output
        # A file that nobody copied, as after an end by our own word, is shown as missing: its URL is not ours.
        return self._outputs.place_files(whole.output, {f.path: self._url(f.key) for f in whole.files if f.key})

    def _url(self, key: str) -> str:
        return (self._distribution or self._outputs).url(key, self._url_seconds)

    def _file(self, file: StoredFile) -> dict[str, Any]:
        if file.error:
            return {"path": file.path, "error": file.error}
        return {
            "path": file.path,
            "bucket": self._outputs.name,
            "key": file.key,
            "bytes": file.bytes,
            "sha256": file.sha256,
            "content_type": file.content_type,
        }


def answer_bytes(shown: Any) -> int:
    """How much of Lambda's answer a JSON value takes."""
    return len(json.dumps(json.dumps(shown)))


def _is_too_large(shown: Any) -> bool:
    text = json.dumps(shown)
    # Within Lambda's answer it only gets longer, which would take its memory twice more.
    return len(text) > ANSWER_LIMIT_BYTES or len(json.dumps(text)) > ANSWER_LIMIT_BYTES


def _error(prediction: Prediction, files: Any) -> str | None:
    if prediction.error:
        return prediction.error
    said = [f"output{file.path}: {file.error}" for file in files if file.error]
    # The entry for all files beyond the limit is the last one, and says how many there are.
    beyond = said[-1:] if files and files[-1].index >= FILES_LIMIT else []
    lost, known = len(said) - len(beyond), len(files) - len(beyond)
    counted = f"{lost} of {known} output files could not be stored. " if lost else ""
    return counted + "; ".join([*said[:lost][:10], *beyond]) or None


def _rfc3339(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")


def _response(status: int, body: Any, content_type: str, headers: Mapping[str, str] | None) -> Response[str]:
    text = json.dumps(body, separators=(",", ":"), allow_nan=False)
    return Response(status_code=status, content_type=content_type, body=text, headers=dict(headers or {}))
