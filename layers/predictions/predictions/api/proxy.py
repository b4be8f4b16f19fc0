"""Proxy to Replicate for all routes that neither start nor show a prediction, a training or a file.

Only what is listed here passes. To Replicate go a path made of checked names, the query, and the body of a change: no
header of the caller's, so neither its access token nor a hop-by-hop header. Back come the status, the body with its
links rewritten to this stack, and `HEADERS`.

    Replicate                    caller
    2xx, 3xx within its API      the same; 502 if this route cannot return it
    401, 402                     502: the stack's own token or credit, `UpstreamRefusals` counts it
    other 4xx                    the same, as a problem
    5xx                          502, or 503 for 503
    no response in time          504
    no connection                502

A GET is retried once if the connection breaks; no other method is, because the change may have been made.
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
from predictions.aws.dynamodb import NEW, Condition, ConditionFailed, Key, Table
from predictions.errors import Problem
from predictions.lifecycle.model_lookup import KEEP_SECONDS, to_keep, usable_schema
from predictions.net.client import read_up_to
from predictions.observability import MetricUnit, logger, metrics
from predictions.store.keys import response_key, schema_key
from predictions.store.payloads import PAYLOAD_LIMIT_BYTES
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
"""The routes of the proxy, as in Replicate's own document.

`QUERY /models` is left out: API Gateway has no such method.
"""

HEADERS = ("retry-after", *RATE_LIMIT_HEADERS)
"""Response headers that are passed through. No `etag`: it identifies the body before its links are rewritten."""

CHANGE_LIMIT_BYTES = 1024 * 1024
"""The largest body of a change; a readme is its longest field."""

QUERY_LIMIT_CHARACTERS = 4096

ANSWER_LIMIT_BYTES = 5_500_000
"""A Lambda response has at most 6 MB, in which the body is a string.
https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html"""

VERSION_CACHE_SECONDS = 3600
"""A version never changes, but it can be deleted, and the stack's token may be replaced by another account's."""

VERSION_CACHE_LIMIT_BYTES = 200 * 1024
"""An item holds 400 KB: https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/ServiceQuotas.html"""

# API Gateway ends a request after 29 s. The longest path takes 26: two connections (3 s each), the head of a response
# and a part of its body (10 s each).
_TIMEOUT = httpx.Timeout(10, connect=3)
_DEADLINE_SECONDS = 16

# No name can leave the API's path or has a meaning in a URL: no '/', '%', '?', '#', nor '..' alone.
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
    """A validated call of a route of `ROUTES`.

    Attributes:
        path: Below the API's base URL.
        query: Encoded again, without the question mark; empty if the call has none.
        body: For POST and PATCH only.
        version_id: The version in the path.
        is_readme: Whether the response is text.
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
        """Validate a call; all arguments but the route are untrusted.

        Args:
            method: The route's method.
            template: The route's path, as in `ROUTES`.
            names: The path's parameters.
            query: The query, decoded.
            body: As sent; ignored if the method takes none.
            content_type: The body's media type, as the caller declares it.

        Raises:
            Problem: 404 (the name is not valid), 400 (the query or body is not readable), 413, 414, 415 or 422.
        """
        for key, value in names.items():
            if not _NAMES[key].fullmatch(value):
                raise Problem(404, f"Not found: the {key} in the path is not a valid name on Replicate.")
        try:
            encoded = urlencode({name: list(values) for name, values in query.items()}, doseq=True)
        except UnicodeEncodeError:
            raise Problem(400, "The query is not valid UTF-8.") from None
        if len(encoded) > QUERY_LIMIT_CHARACTERS:
            raise Problem(414, f"The query exceeds the limit of {QUERY_LIMIT_CHARACTERS} characters.")
        content = None
        if method in ("POST", "PATCH"):
            if len(body) > CHANGE_LIMIT_BYTES:
                raise Problem(413, f"The body exceeds the limit of {CHANGE_LIMIT_BYTES} bytes (got {len(body)}).")
            if not isinstance(parse_json(body, content_type), dict):
                raise Problem(422, "The body must be a JSON object.")
            content = body
        path = template.format(**names)
        return cls(method, path, encoded, content, names.get("id"), template.endswith("/readme"))


@dataclass(frozen=True)
class Answer:
    """The response to the caller; `text` is empty if Replicate sent no body."""

    status: int
    text: str
    content_type: str
    headers: Mapping[str, str]


class Forwarding:
    """Passes calls to Replicate with the stack's token.

    Args:
        url: The base URL of Replicate's API.
        token: Returns the stack's token.
        http: The client to use; it must not follow redirects, since the token is sent with every request.
        versions: Caches model versions.
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
        """Build from the environment.

        Reads `REPLICATE_API_URL`, `REPLICATE_TOKEN_SECRET_ARN`, `TABLE_NAME` and `VALIDATE_INPUT`.
        """
        http = httpx.Client(
            timeout=_TIMEOUT, follow_redirects=False, trust_env=False, headers={"User-Agent": "replicate-serverless"}
        )
        keeps_schemas = os.environ["VALIDATE_INPUT"] == "true"
        versions = VersionCache(os.environ["TABLE_NAME"], client("dynamodb"), keeps_schemas=keeps_schemas)
        return cls(os.environ["REPLICATE_API_URL"], Token(os.environ["REPLICATE_TOKEN_SECRET_ARN"]), http, versions)

    def forward(self, call: Call) -> Answer:
        """Pass one call to Replicate and return its response.

        Raises:
            Problem: Replicate's own 4xx; 502, 503 or 504 if Replicate, the connection or the stack's token failed.
        """
        # Before anything is changed at Replicate: without this URL no response can be built.
        own_url = api_url()
        if call.version_id and call.method == "GET" and (text := self._versions.find(call)):
            return Answer(200, text, "application/json", {})
        try:
            answer = self._answer(call, self._send(call), own_url)
        finally:
            if call.version_id and call.method == "DELETE":  # it may have succeeded with its response lost
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
                raise Problem(502, f"The request was not sent: {error}. Contact the operator of this stack.") from error
            except _BROKEN as error:
                if call.method == "GET" and attempt == 1 and self._clock() < deadline:
                    continue
                what = "could not be reached" if isinstance(error, _NOT_SENT) else "closed the connection"
                raise Problem(502, _lost(call, error, what)) from error
            except httpx.TimeoutException as error:
                raise Problem(504, _lost(call, error, "did not respond in time")) from error
            except httpx.HTTPError as error:
                raise Problem(502, _lost(call, error, "sent an unreadable response")) from error
        raise AssertionError("the second attempt either returns or raises")

    def _exchange(self, call: Call, deadline: float) -> httpx.Response:
        headers = {
            "Authorization": f"Bearer {self._token.value()}",
            "Accept": "text/plain, text/markdown" if call.is_readme else "application/json",
        }
        if call.body is not None:
            headers["Content-Type"] = "application/json"
        # As text: httpx would let `params` replace the query of the URL.
        url = f"{self._url}{call.path}" + (f"?{call.query}" if call.query else "")

        def check_time() -> None:
            if self._clock() > deadline:
                raise httpx.ReadTimeout("the response does not end")

        with self._http.stream(call.method, url, content=call.body, headers=headers) as response:
            received, more = read_up_to(response.iter_bytes(), ANSWER_LIMIT_BYTES, check_time)
            if more:
                raise _too_large()
        # The body is decoded already, so these two headers no longer describe it.
        kept = [(k, v) for k, v in response.headers.raw if k.lower() not in (b"content-length", b"content-encoding")]
        return httpx.Response(response.status_code, headers=kept, content=received, request=response.request)

    def _answer(self, call: Call, response: httpx.Response, own_url: str) -> Answer:
        status = response.status_code
        headers = {name: response.headers[name] for name in HEADERS if name in response.headers}
        logger.info("forwarded", method=call.method, path=call.path, status=status)
        if 400 <= status < 500:
            raise self._refusal(response, headers)
        if not 200 <= status < 400:
            detail = f"Replicate failed ({status}). " + _whether_done(call)
            raise Problem(503 if status == 503 else 502, detail, headers=headers if status == 503 else {})
        if turned := self._turned(_location(response), own_url):
            headers["location"] = turned
        elif status >= 300:
            raise Problem(502, f"Replicate redirects ({status}) to a URL outside its API, which is not followed.")
        if not response.content or status >= 300:
            return Answer(status, "", "", headers)
        text, content_type = self._body(call, response, own_url)
        if len(json.dumps(text)) > ANSWER_LIMIT_BYTES:
            raise _too_large()
        return Answer(status, text, content_type, headers)

    def _refusal(self, response: httpx.Response, headers: Mapping[str, str]) -> Problem:
        refusal = not_accepted(response)
        if response.status_code in (401, 402):
            self._token.forget()
            _count_refusal(response.status_code)
            why = f"Replicate rejects this stack's token or credit ({response.status_code})."
            return Problem(502, f"{why} Contact the operator of this stack.")
        if isinstance(refusal, Throttled):
            headers = {"retry-after": str(refusal.seconds), **headers}
        return Problem(response.status_code, refusal.detail, invalid_fields=refusal.invalid_fields, headers=headers)

    def _body(self, call: Call, response: httpx.Response, own_url: str) -> tuple[str, str]:
        media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if call.is_readme and media_type in ("text/plain", "text/markdown"):
            return response.content.decode("utf-8", "replace"), f"{media_type}; charset=utf-8"
        value = read_json(response.content) if media_type == "application/json" else None
        if not isinstance(value, dict | list):
            raise Problem(502, f"Replicate's response ({response.status_code}) is not of this route's media type.")
        self._turn_links(value, own_url)
        try:
            text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
            text.encode()
        except (ValueError, RecursionError):
            raise Problem(502, "Replicate's response is nested too deep, or not valid Unicode.") from None
        return text, "application/json"

    def _turn_links(self, value: Any, own_url: str) -> None:
        """Rewrite the links of Replicate's document, never text, input or output."""
        waiting = [value]
        while waiting:
            part = waiting.pop()
            if isinstance(part, list):
                waiting += part
            elif isinstance(part, dict):
                if "results" in part:
                    # A client sends its access token to any URL in these links.
                    part |= {k: self._turned(part[k], own_url) for k in ("next", "previous") if k in part}
                if isinstance(urls := part.get("urls"), dict):
                    # Other links, such as `web`, lead to Replicate's own pages.
                    part["urls"] = {k: self._turned(v, own_url) or v for k, v in urls.items()}
                # Pages; a model's example; a collection's models; search results.
                waiting += [part[k] for k in ("results", "default_example", "models", "model") if k in part]

    def _turned(self, link: Any, own_url: str) -> str | None:
        """Return the link's URL on this stack, or None if it is outside Replicate's API."""
        if not isinstance(link, str) or not link.startswith(f"{self._url}/"):
            return None
        return own_url + link.removeprefix(self._url)


class VersionCache:
    """Caches model versions, as Replicate returned them, in the table. If the cache fails, the call goes to Replicate.

    Args:
        table_name: The table's name.
        dynamodb: The client to use.
        now: Seconds since 1970.
        keeps_schemas: Whether to cache the schemas of their inputs too, with which `lifecycle.model_lookup` checks a
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
        self._table = Table(table_name, dynamodb)
        self._now = now
        self._keeps_schemas = keeps_schemas

    def find(self, call: Call) -> str | None:
        """Return the cached response to a call, or None if it is missing or expired."""
        try:
            found = self._table.get_item(response_key(call.path), consistent=False)
        except (ClientError, BotoCoreError):
            logger.exception("version cache not read")
            return None
        # DynamoDB removes expired items up to days later.
        return str(found["json"]) if found and found["expires_at"] > self._now() else None

    def keep(self, call: Call, text: str) -> None:
        """Cache the response to a call if it is the requested version and not too large."""
        value = read_json(text.encode())
        if call.version_id is None or not isinstance(value, dict) or value.get("id") != call.version_id:
            return
        size = len(text.encode())
        if size <= VERSION_CACHE_LIMIT_BYTES:
            self._write(response_key(call.path), {"json": text}, VERSION_CACHE_SECONDS)
        if self._keeps_schemas and size <= SCHEMA_LIMIT_BYTES:
            self._keep_schema(call.version_id, "/".join(call.path.split("/")[2:4]), value.get("openapi_schema"))

    def forget(self, call: Call) -> None:
        """Replace a deleted version by an expired item: no function may delete items.

        A concurrent read may cache it again, for `VERSION_CACHE_SECONDS`.
        """
        self._write(response_key(call.path), {"json": "{}"}, 0)

    def _keep_schema(self, version: str, model: str, openapi_schema: Any) -> None:
        """Cache a schema like `StoredSchemas.put_schema`; if too large, its owner."""
        text, seconds = to_keep(usable_schema(openapi_schema, version))
        if len(text.encode()) > PAYLOAD_LIMIT_BYTES:
            # The next prediction fetches it and stores it in the bucket, to which this function has no access.
            unknown = NEW | Condition("expires_at <= :now", now=int(self._now()))
            self._write(schema_key(version), {"model": model}, KEEP_SECONDS, unknown)
        else:
            self._write(schema_key(version), {"model": model, "json": text}, seconds)

    def _write(self, key: Key, item: Mapping[str, Any], seconds: int, condition: Condition | None = None) -> None:
        try:
            self._table.put_item(key, {**item, "expires_at": int(self._now()) + seconds}, condition)
        except ConditionFailed:
            return  # the stored item is more recent
        except (ClientError, BotoCoreError):
            logger.exception("version cache not written")


def _location(response: httpx.Response) -> str | None:
    """Return the target of a redirect, resolved against the request's URL."""
    location = response.headers.get("location")
    try:
        return str(response.request.url.join(location)) if location else None
    except (httpx.InvalidURL, ValueError):
        return None


def _too_large() -> Problem:
    limit = f"{ANSWER_LIMIT_BYTES} bytes that this stack can return"
    return Problem(502, f"Replicate's response exceeds the limit of {limit}. Request it from Replicate directly.")


def _whether_done(call: Call) -> str:
    if call.method == "GET":
        return "Retry later."
    return "The outcome of the change is unknown. Check before you repeat it."


def _lost(call: Call, error: Exception, what: str) -> str:
    done = "Nothing was changed." if isinstance(error, _NOT_SENT) else _whether_done(call)
    return f"Replicate {what} ({type(error).__name__}). {done}"


def _count_refusal(status: int | None) -> None:
    logger.error("Replicate rejects the stack's token or credit", status=status)
    metrics.add_metric(name="UpstreamRefusals", unit=MetricUnit.Count, value=1)
