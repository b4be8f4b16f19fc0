"""Calls that are passed on to Replicate: all that neither starts nor shows a prediction, a training or a file.

What passes is written down here; all else stays. To Replicate go a path made of checked names, the query, and the body
of a change: no header of the caller's, so neither its access token nor a hop-by-hop header. Back come the status, the
body with its links turned to this stack, and `HEADERS`.

    Replicate                    caller
    2xx, 3xx within its API      the same; 502 where it is nothing that this route can answer
    401, 402                     502: the stack's own token or credit, `UpstreamRefusals` counts it
    other 4xx                    the same, as a problem
    5xx                          502, or 503 for 503
    no answer in time            504
    no connection                502

A GET is tried a second time when the connection breaks; nothing else is, since it may have been done.
"""

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlencode

import httpx
from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import api_url, client
from predictions.errors import Problem
from predictions.lifecycle.model_lookup import KEEP_SECONDS, to_keep, usable_schema
from predictions.net.client import read_up_to
from predictions.observability import MetricUnit, logger, metrics
from predictions.store.predictions import PAYLOAD_LIMIT_BYTES, schema_key
from predictions.upstream.client import RATE_LIMIT_HEADERS, SCHEMA_LIMIT_BYTES, not_accepted
from predictions.upstream.credentials import Token
from predictions.upstream.errors import Throttled, TokenUnreadable
from predictions.upstream.prediction import read_json
from predictions.validation import parse_json

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

Method = Literal["GET", "POST", "PATCH", "DELETE"]

ROUTES: tuple[tuple[Method, str], ...] = (
    ("GET", "/account"),
    ("GET", "/collections"),
    ("GET", "/collections/{slug}"),
    ("GET", "/deployments"),
    ("POST", "/deployments"),
    ("GET", "/deployments/{owner}/{name}"),
    ("PATCH", "/deployments/{owner}/{name}"),
    ("DELETE", "/deployments/{owner}/{name}"),
    ("GET", "/hardware"),
    ("GET", "/models"),
    ("POST", "/models"),
    ("GET", "/models/{owner}/{name}"),
    ("PATCH", "/models/{owner}/{name}"),
    ("DELETE", "/models/{owner}/{name}"),
    ("GET", "/models/{owner}/{name}/examples"),
    ("GET", "/models/{owner}/{name}/readme"),
    ("GET", "/models/{owner}/{name}/versions"),
    ("GET", "/models/{owner}/{name}/versions/{id}"),
    ("DELETE", "/models/{owner}/{name}/versions/{id}"),
    ("GET", "/search"),
)
"""What is passed on, as in Replicate's own document. `QUERY /models` is not: API Gateway knows no such method."""

HEADERS = ("retry-after", *RATE_LIMIT_HEADERS)
"""Headers that come back as they are. No `etag`: it would name the body before its links were turned."""

CHANGE_LIMIT_BYTES = 1024 * 1024
"""The largest body of a change: a readme is the longest thing in one."""

QUERY_LIMIT_CHARACTERS = 4096

ANSWER_LIMIT_BYTES = 5_500_000
"""Lambda answers with at most 6 MB, in which the body is a string.
https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html"""

VERSION_CACHE_SECONDS = 3600
"""A version never changes, but it can be deleted, and the stack's token can become another account's."""

VERSION_CACHE_LIMIT_BYTES = 200 * 1024
"""An item holds 400 KB: https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/ServiceQuotas.html"""

# API Gateway ends a request after 29 s. The longest way takes 26: two connections (3 s each), the head of an answer and
# a part of its body (10 s each).
_TIMEOUT = httpx.Timeout(10, connect=3)
_DEADLINE_SECONDS = 16

# Nothing in them can lead out of the API's path, or means anything to a URL: no '/', '%', '?', '#', nor '..' alone.
_NAMES = {
    "owner": re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9_])?"),
    "name": re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9_])?"),
    "slug": re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}"),
    "id": re.compile(r"[0-9a-f]{64}"),
}

_BROKEN = (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError)
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


@dataclass(frozen=True)
class Call:
    """A call of a route of `ROUTES`, checked.

    Attributes:
        path: Below the API's base URL.
        query: Encoded anew, without the question mark; empty where there is none.
        body: For POST and PATCH only.
        version_id: The version that the path names.
        is_readme: Whether the answer is text.
    """

    method: Method
    path: str
    query: str = ""
    body: bytes | None = None
    version_id: str | None = None
    is_readme: bool = False

    @classmethod
    def check(
        cls,
        method: Method,
        template: str,
        names: Mapping[str, str],
        query: Mapping[str, Sequence[str]],
        body: bytes,
        content_type: str | None,
    ) -> "Call":
        """Checks what a stranger sent.

        Args:
            method: Of the route.
            template: The route's path, as in `ROUTES`.
            names: The path's parameters.
            query: The query, decoded.
            body: As sent; left out where the method takes none.
            content_type: The body's, as the caller says.

        Raises:
            Problem: 404 (nothing can have that name), 400 (the query or body is not readable), 413, 414, 415 or 422.
        """
        for key, value in names.items():
            if not _NAMES[key].fullmatch(value):
                raise Problem(404, f"Nothing on Replicate has such a name: the {key} in the path is not valid.")
        try:
            encoded = urlencode({name: list(values) for name, values in query.items()}, doseq=True)
        except UnicodeEncodeError:
            raise Problem(400, "The query is not UTF-8.") from None
        if len(encoded) > QUERY_LIMIT_CHARACTERS:
            raise Problem(414, f"The query is longer than {QUERY_LIMIT_CHARACTERS} characters.")
        content = None
        if method in ("POST", "PATCH"):
            if len(body) > CHANGE_LIMIT_BYTES:
                raise Problem(413, f"The body has {len(body)} bytes, which exceeds the limit of {CHANGE_LIMIT_BYTES}.")
            if not isinstance(parse_json(body, content_type), dict):
                raise Problem(422, "The body has to be a JSON object.")
            content = body
        path = template.format(**names)
        return cls(method, path, encoded, content, names.get("id"), template.endswith("/readme"))


@dataclass(frozen=True)
class Answer:
    """What the caller gets: `text` is empty where Replicate sent no body."""

    status: int
    text: str
    content_type: str
    headers: Mapping[str, str]


class Forwarding:
    """Passes calls on with the stack's token.

    Args:
        url: The base URL of Replicate's API.
        token: Gives the stack's token.
        http: The client to use; it must not follow redirects, since the token goes with every request.
        versions: Keeps model versions.
        clock: Seconds, for the deadline.
    """

    def __init__(
        self,
        url: str,
        token: Token,
        http: httpx.Client,
        versions: "VersionCache",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url.rstrip("/")
        self._token = token
        self._http = http
        self._versions = versions
        self._clock = clock

    @classmethod
    def from_env(cls) -> "Forwarding":
        """From `REPLICATE_API_URL`, `REPLICATE_TOKEN_SECRET_ARN`, `TABLE_NAME` and `VALIDATE_INPUT`."""
        http = httpx.Client(
            timeout=_TIMEOUT, follow_redirects=False, trust_env=False, headers={"User-Agent": "replicate-serverless"}
        )
        keeps_schemas = os.environ["VALIDATE_INPUT"] == "true"
        versions = VersionCache(os.environ["TABLE_NAME"], client("dynamodb"), keeps_schemas=keeps_schemas)
        return cls(os.environ["REPLICATE_API_URL"], Token(os.environ["REPLICATE_TOKEN_SECRET_ARN"]), http, versions)

    def forward(self, call: Call) -> Answer:
        """Passes one call on.

        Raises:
            Problem: Replicate's own 4xx; 502, 503 or 504 where Replicate, the way there or the stack's token failed.
        """
        # Before anything is changed at Replicate: without it no answer can be given.
        own_url = api_url()
        if call.version_id and call.method == "GET" and (text := self._versions.find(call)):
            return Answer(200, text, "application/json", {})
        try:
            answer = self._answer(call, self._send(call), own_url)
        finally:
            if call.version_id and call.method == "DELETE":  # an answer that was lost may have been a yes
                self._versions.forget(call)
        if call.version_id and call.method == "GET" and answer.status == 200:
            self._versions.keep(call, answer.text)
        return answer

    def _send(self, call: Call) -> httpx.Response:
        deadline = self._clock() + _DEADLINE_SECONDS
        for attempt in (1, 2):
            try:
                return self._exchange(call, deadline)
            except TokenUnreadable as error:
                _count_refusal(None)
                raise Problem(502, f"Nothing was asked: {error}. The stack's operator has to mend that.") from error
            except _BROKEN as error:
                if call.method == "GET" and attempt == 1 and self._clock() < deadline:
                    continue
                what = "could not be reached" if isinstance(error, _NOT_SENT) else "broke the connection off"
                raise Problem(502, _lost(call, error, what)) from error
            except httpx.TimeoutException as error:
                raise Problem(504, _lost(call, error, "did not answer in time")) from error
            except httpx.HTTPError as error:
                raise Problem(502, _lost(call, error, "gave no readable answer")) from error
        raise AssertionError("the second attempt either returns or raises")

    def _exchange(self, call: Call, deadline: float) -> httpx.Response:
        headers = {
            "Authorization": f"Bearer {self._token.value()}",
            "Accept": "text/plain, text/markdown" if call.is_readme else "application/json",
        }
        if call.body is not None:
            headers["Content-Type"] = "application/json"
        # As text: httpx would take `params` for a replacement of what is in the URL.
        url = f"{self._url}{call.path}" + (f"?{call.query}" if call.query else "")

        def check_time() -> None:
            if self._clock() > deadline:
                raise httpx.ReadTimeout("the answer does not end")

        with self._http.stream(call.method, url, content=call.body, headers=headers) as told:
            received, more = read_up_to(told.iter_bytes(), ANSWER_LIMIT_BYTES, check_time)
            if more:
                raise _too_large()
        # The body is decoded already; its length and encoding are no longer what these say.
        kept = [(k, v) for k, v in told.headers.raw if k.lower() not in (b"content-length", b"content-encoding")]
        return httpx.Response(told.status_code, headers=kept, content=received, request=told.request)

    def _answer(self, call: Call, told: httpx.Response, own_url: str) -> Answer:
        status = told.status_code
        headers = {name: told.headers[name] for name in HEADERS if name in told.headers}
        logger.info("forwarded", method=call.method, path=call.path, status=status)
        if 400 <= status < 500:
            raise self._refusal(told, headers)
        if not 200 <= status < 400:
            detail = f"Replicate failed ({status}). " + _whether_done(call)
            raise Problem(503 if status == 503 else 502, detail, headers=headers if status == 503 else {})
        if turned := self._turned(_location(told), own_url):
            headers["location"] = turned
        elif status >= 300:
            raise Problem(502, f"Replicate redirects ({status}) to a place outside its API; that is not followed.")
        if not told.content or status >= 300:
            return Answer(status, "", "", headers)
        text, content_type = self._body(call, told, own_url)
        if len(json.dumps(text)) > ANSWER_LIMIT_BYTES:
            raise _too_large()
        return Answer(status, text, content_type, headers)

    def _refusal(self, told: httpx.Response, headers: Mapping[str, str]) -> Problem:
        refusal = not_accepted(told)
        if told.status_code in (401, 402):
            self._token.forget()
            _count_refusal(told.status_code)
            why = f"Replicate refuses this stack's token or credit ({told.status_code})."
            return Problem(502, f"{why} Its operator has to mend that.")
        if isinstance(refusal, Throttled):
            headers = {"retry-after": str(refusal.seconds), **headers}
        return Problem(told.status_code, refusal.detail, invalid_fields=refusal.invalid_fields, headers=headers)

    def _body(self, call: Call, told: httpx.Response, own_url: str) -> tuple[str, str]:
        media_type = told.headers.get("content-type", "").partition(";")[0].strip().lower()
        if call.is_readme and media_type in ("text/plain", "text/markdown"):
            return told.content.decode("utf-8", "replace"), f"{media_type}; charset=utf-8"
        value = read_json(told.content) if media_type == "application/json" else None
        if not isinstance(value, dict | list):
            raise Problem(502, f"Replicate's answer ({told.status_code}) is not of the kind that this route gives.")
        self._turn_links(value, own_url)
        try:
            text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
            text.encode()
        except (ValueError, RecursionError):
            raise Problem(502, "Replicate's answer is nested too deep, or not Unicode.") from None
        return text, "application/json"

    def _turn_links(self, value: Any, own_url: str) -> None:
        """Turns the links that Replicate's document defines; no text, input or output that looks like one."""
        waiting = [value]
        while waiting:
            part = waiting.pop()
            if isinstance(part, list):
                waiting += part
            elif isinstance(part, dict):
                if "results" in part:
                    # A client sends its access token to whatever page is named.
                    part |= {k: self._turned(part[k], own_url) for k in ("next", "previous") if k in part}
                if isinstance(urls := part.get("urls"), dict):
                    # The other ones, such as `web`, lead to Replicate's own pages.
                    part["urls"] = {k: self._turned(v, own_url) or v for k, v in urls.items()}
                # Pages; a model's example; a collection's models; what a search found.
                waiting += [part[k] for k in ("results", "default_example", "models", "model") if k in part]

    def _turned(self, link: Any, own_url: str) -> str | None:
        """The same place behind this stack; None where it is outside Replicate's API."""
        if not isinstance(link, str) or not link.startswith(f"{self._url}/"):
            return None
        return own_url + link.removeprefix(self._url)


class VersionCache:
    """Model versions as Replicate answered them, in the table. A cache that fails is none: the call goes on without it.

    Args:
        table_name: The table's name.
        dynamodb: The client to use.
        now: Seconds since 1970.
        keeps_schemas: Whether to keep the schemas of their inputs too, by which `lifecycle.model_lookup` checks a
            prediction that names nothing but the version's id.
    """

    def __init__(
        self,
        table_name: str,
        dynamodb: "DynamoDBClient",
        now: Callable[[], float] = time.time,
        *,
        keeps_schemas: bool = False,
    ) -> None:
        self._table_name = table_name
        self._dynamodb = dynamodb
        self._now = now
        self._keeps_schemas = keeps_schemas

    def find(self, call: Call) -> str | None:
        """The answer to a call, where it is kept and not too old."""
        try:
            found = self._dynamodb.get_item(TableName=self._table_name, Key=self._key(call)).get("Item")
        except (ClientError, BotoCoreError):
            logger.exception("the cache of versions cannot be read")
            return None
        # The table removes expired items up to days later.
        return found["json"]["S"] if found and int(found["expires_at"]["N"]) > self._now() else None

    def keep(self, call: Call, text: str) -> None:
        """Keeps the answer to a call, if it is the version that was asked for and not too large."""
        value = read_json(text.encode())
        if call.version_id is None or not isinstance(value, dict) or value.get("id") != call.version_id:
            return
        size = len(text.encode())
        if size <= VERSION_CACHE_LIMIT_BYTES:
            self._put(call, text, int(self._now()) + VERSION_CACHE_SECONDS)
        if self._keeps_schemas and size <= SCHEMA_LIMIT_BYTES:
            self._keep_schema(call.version_id, "/".join(call.path.split("/")[2:4]), value.get("openapi_schema"))

    def forget(self, call: Call) -> None:
        """Forgets a version that was deleted: no function may delete items, so an expired one replaces it.

        A read at the same moment may keep it once more, for `VERSION_CACHE_SECONDS`.
        """
        self._put(call, "{}", int(self._now()))

    def _keep_schema(self, version: str, model: str, openapi_schema: Any) -> None:
        """As `PredictionsTable.keep_schema`; of a schema that is too large for an item only whose it is."""
        text, seconds = to_keep(usable_schema(openapi_schema, version))
        kept: dict[str, Any] = {"model": {"S": model}, "json": {"S": text}}
        options: dict[str, Any] = {}
        if len(text.encode()) > PAYLOAD_LIMIT_BYTES:
            # The next prediction asks for it, and keeps it in the bucket: this function has nothing to do there.
            del kept["json"]
            options = {
                "ConditionExpression": "attribute_not_exists(pk) OR expires_at <= :now",
                "ExpressionAttributeValues": {":now": {"N": str(int(self._now()))}},
            }
            seconds = KEEP_SECONDS
        key = {name: {"S": value} for name, value in schema_key(version).items()}
        self._write({**key, **kept, "expires_at": {"N": str(int(self._now()) + seconds)}}, **options)

    def _put(self, call: Call, text: str, expires_at: int) -> None:
        self._write({**self._key(call), "json": {"S": text}, "expires_at": {"N": str(expires_at)}})

    def _write(self, item: dict[str, Any], **options: Any) -> None:
        try:
            self._dynamodb.put_item(TableName=self._table_name, Item=item, **options)
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            return  # what is there knows more
        except (ClientError, BotoCoreError):
            logger.exception("the cache of versions cannot be written")

    def _key(self, call: Call) -> dict[str, Any]:
        return {"pk": {"S": f"forwarded#{call.path}"}, "sk": {"S": "answer"}}


def _location(told: httpx.Response) -> str | None:
    """Where an answer leads, which may be said relative to what was asked."""
    location = told.headers.get("location")
    try:
        return str(told.request.url.join(location)) if location else None
    except (httpx.InvalidURL, ValueError):
        return None


def _too_large() -> Problem:
    limit = f"{ANSWER_LIMIT_BYTES} bytes that this stack can pass on"
    return Problem(502, f"Replicate's answer is larger than the {limit}. Ask Replicate itself for it.")


def _whether_done(call: Call) -> str:
    if call.method == "GET":
        return "Try again later."
    return "Whether the change was made is not known: look before you repeat it."


def _lost(call: Call, error: Exception, what: str) -> str:
    done = "Nothing was changed." if isinstance(error, _NOT_SENT) else _whether_done(call)
    return f"Replicate {what} ({type(error).__name__}). {done}"


def _count_refusal(status: int | None) -> None:
    logger.error("Replicate refuses the stack's token or credit", status=status)
    metrics.add_metric(name="UpstreamRefusals", unit=MetricUnit.Count, value=1)
