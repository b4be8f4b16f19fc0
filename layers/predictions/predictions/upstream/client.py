"""Client of Replicate's HTTP API: the calls and the meaning of their responses.

Nothing in here retries: the caller decides by the error (`upstream.errors`). Source of the protocol's facts:
https://replicate.com/docs/reference/http
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeGuard

import httpx

from predictions.clock import parse_rfc3339, rfc3339
from predictions.net.client import read_up_to, run_in_time, usual_authorities
from predictions.observability import MetricUnit, metrics
from predictions.upstream.bounded_json import LIGHT_BYTES, Unscannable, elements, members, read_members
from predictions.upstream.credentials import Token
from predictions.upstream.errors import (
    AnswerTooLargeError,
    NotAccepted,
    NotFound,
    OutcomeUnknown,
    Refused,
    Throttled,
    TokenUnreadable,
    Unauthorized,
    Unavailable,
)
from predictions.upstream.prediction import (
    TEXT_LIMIT_BYTES,
    UnreadablePrediction,
    UpstreamPrediction,
    read_json,
    utf8,
)

if TYPE_CHECKING:
    from predictions.upstream.create_window import SendWindow

CREATE_TIMEOUT_SECONDS = 20
"""The longest a create may take that waits for no end."""

_CONNECT_SECONDS = 5

# How much later than asked for a response that was waited for may come; a function that waits has 5 s left then.
_SYNC_MARGIN_SECONDS = 3

# Reads can be repeated; a caller of the API waits for one within API Gateway's 29 s, before the create.
_ASK_TIMEOUT_SECONDS = 7

# A schema is asked for while a caller waits, and can be done without.
_SCHEMA_TIMEOUT_SECONDS = 2.5
SCHEMA_LIMIT_BYTES = 2 * 1024 * 1024
"""The largest response that a schema is taken from."""

# A prediction's JSON can hold data: URLs and long logs. What of it is parsed is bounded by a function's memory.
_ANSWER_LIMIT_BYTES = TEXT_LIMIT_BYTES

# A response of Replicate may refuse any number of fields; the others are counted.
_FIELDS_LIMIT = 100

RATE_LIMIT_HEADERS = ("ratelimit-limit", "ratelimit-remaining", "ratelimit-reset")
"""The rate-limit headers of Replicate's response to a create."""

Collection = Literal["predictions", "trainings"]


@dataclass(frozen=True)
class Target:
    """The target of a create: a version, a model, a deployment, or a training.

    Attributes:
        kind: `version` (`POST /predictions`), `model` or `deployment` (`POST /{kind}s/{name}/predictions`), or
            `training` (`POST /models/{name}/versions/{version}/trainings`).
        name: `owner/name` of the model or deployment; None for a bare version id.
        version: The version's 64 hexadecimal digits, where one is named.
    """

    kind: Literal["version", "model", "deployment", "training"]
    name: str | None = None
    version: str | None = None

    @property
    def path(self) -> str:
        """Return the path of the create."""
        if self.kind == "version":
            return "/predictions"
        if self.kind == "training":
            return f"/models/{self.name}/versions/{self.version}/trainings"
        return f"/{self.kind}s/{self.name}/predictions"

    def ran(self, prediction: UpstreamPrediction) -> bool:
        """Return whether a prediction ran on this target, according to Replicate."""
        if self.kind == "deployment":
            return prediction.deployment in (self.name, (self.name or "").rpartition("/")[2])
        if self.kind == "model":
            return prediction.model == self.name
        return prediction.version == self.version


class Canceled(NamedTuple):
    """The response to a cancel, as far as it is read.

    Attributes:
        id: The prediction's id.
        status: Its status then; None where the response is so large or so deep that it cannot be found in it.
    """

    id: str
    status: str | None


@dataclass(frozen=True)
class Model:
    """A model's description.

    Attributes:
        is_official: Whether Replicate runs it without a version.
        latest_version: The id of its latest version.
        openapi_schema: That version's, whatever its author made of it.
    """

    is_official: bool
    latest_version: str | None
    openapi_schema: Any = None


class Replicate:
    """Replicate's HTTP API with this stack's token.

    Args:
        url: The API's base URL, ending in `/v1`.
        token: Gives the token; asked before each call, so that it can be changed at any time.
        http: The client to use, or makes it; it must not follow redirects, since the token goes with every request.
        creates: The client for creates (see `upstream.create_window`); by default `http`.
    """

    def __init__(
        self,
        url: str,
        token: Token,
        http: httpx.Client | Callable[[], httpx.Client],
        creates: Callable[[], httpx.Client] | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._token = token
        self._reads: Callable[[], httpx.Client] = (lambda: http) if isinstance(http, httpx.Client) else http
        self._creates = creates or self._reads

    @classmethod
    def from_env(cls) -> "Replicate":
        """Create from `REPLICATE_API_URL` and `REPLICATE_TOKEN_SECRET_ARN`."""
        options: dict[str, Any] = {
            "timeout": httpx.Timeout(CREATE_TIMEOUT_SECONDS, connect=_CONNECT_SECONDS),
            "headers": {"User-Agent": "replicate-serverless", "Accept": "application/json"},
        }

        # Each is made with its first call: many invocations need neither.
        @cache
        def reads() -> httpx.Client:
            return httpx.Client(follow_redirects=False, trust_env=False, verify=usual_authorities(), **options)

        @cache
        def creates() -> httpx.Client:
            from predictions.upstream.create_window import single_use_client

            return single_use_client(**options)

        return cls(os.environ["REPLICATE_API_URL"], Token(os.environ["REPLICATE_TOKEN_SECRET_ARN"]), reads, creates)

    def calls_back(self, webhook: str) -> bool:
        """Return whether Replicate accepts a webhook URL: it refuses a local cloud's."""
        return webhook.startswith("https://") or self._url.startswith("http://")

    def create(
        self,
        target: Target,
        body: Mapping[str, Any],
        *,
        cancel_after_seconds: int | None,
        wait_seconds: int | None = None,
        rate_limit: dict[str, str] | None = None,
        window: "SendWindow | None" = None,
        input_json: str | None = None,
        leave_large: bool = False,
    ) -> UpstreamPrediction:
        """Create a prediction or training with one POST, never repeated.

        Args:
            target: What is to run it.
            body: `input`, `webhook`, `webhook_events_filter` and, where asked for, `stream`, or for a training
                `destination`; Replicate refuses others.
            cancel_after_seconds: Sent as `Cancel-After`; Replicate's minimum is 5. None for a training, which has none.
            wait_seconds: Sent as `Prefer: wait`, 1 to 60: Replicate holds its response until the end or that long.
                The response may be `processing` with the whole output, its files as `data:` URLs.
            rate_limit: Filled with the rate-limit headers of Replicate's response, if there was one.
            window: When the request may be sent, and by when it is over.
            input_json: The `input` as JSON text. Parsed, it would take up to 25 times the memory until the response is
                read, which needs that memory itself.
            leave_large: Whether the output in a response of more than `LIGHT_BYTES` is left to the webhook or the poll:
                reading it takes up to 256 MiB and seconds of a processor, which a function that waits must not need.

        Raises:
            NotAccepted: Nothing was started (`Throttled`, `Unauthorized`, `Refused`, no connection, or the window has
                closed).
            OutcomeUnknown: A prediction may have been started.
        """
        payload = {**body, "version": target.version} if target.kind == "version" else dict(body)
        content = json.dumps(payload, separators=(",", ":"), allow_nan=False)
        if input_json is not None:
            content = f'{{"input":{input_json}{"," if payload else ""}{content[1:]}'
        headers = {"Content-Type": "application/json"}
        if cancel_after_seconds is not None:
            headers["Cancel-After"] = f"{max(5, cancel_after_seconds)}s"
        read_seconds = CREATE_TIMEOUT_SECONDS
        if wait_seconds is not None:
            headers["Prefer"] = f"wait={wait_seconds}"
            read_seconds = max(read_seconds, wait_seconds + _SYNC_MARGIN_SECONDS)
        timeout = httpx.Timeout(read_seconds, connect=_CONNECT_SECONDS)
        try:
            response = self._request(
                "POST", target.path, content=content.encode(), headers=headers, timeout=timeout, beginning_will_do=True,
                create=True, window=window,
            )  # fmt: skip
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol) as error:
            raise NotAccepted(None, f"Replicate could not be reached ({type(error).__name__})") from error
        except TokenUnreadable as error:
            raise Unauthorized(None, str(error)) from error
        except (httpx.HTTPError, AnswerTooLargeError) as error:
            raise OutcomeUnknown(f"the create was sent, but its response was lost ({type(error).__name__})") from error
        if rate_limit is not None:
            rate_limit |= _rate_limit(response)
        if 400 <= response.status_code < 500 and response.status_code != 408:
            raise not_accepted(response)
        if not 200 <= response.status_code < 300:
            raise OutcomeUnknown(f"Replicate answered {response.status_code} to the create", response.status_code)
        try:
            if leave_large and len(response.content) > LIGHT_BYTES:
                return UpstreamPrediction.read_as_open(response.content)
            # A response that is too large still shows its id in most cases, and so what was started.
            return UpstreamPrediction.read(response.content, truncated=_is_truncated(response))
        except UnreadablePrediction as error:
            reason = "Replicate's response to the create is not a prediction"
            raise OutcomeUnknown(reason, response.status_code) from error

    def get(self, upstream_id: str, collection: Collection = "predictions") -> UpstreamPrediction:
        """Read a prediction or training, without an output that is too large.

        Raises:
            NotFound: Replicate does not know it.
            Unavailable: Replicate could not be asked.
        """
        response = self._ask("GET", f"/{collection}/{upstream_id}", beginning_will_do=True)
        return _read_asked(response.content, upstream_id, truncated=_is_truncated(response))

    def glimpse(
        self, upstream_id: str, collection: Collection = "predictions", *, seconds: float, limit_bytes: int
    ) -> UpstreamPrediction | None:
        """Read a prediction or training within a time, whatever a name server, a connection or Replicate does.

        Returns:
            The prediction, or None if the response is larger than the limit.

        Raises:
            NotFound: Replicate does not know it.
            Unavailable: Replicate could not be asked within the time.
        """
        end = time.monotonic() + seconds

        def check() -> None:
            if time.monotonic() >= end:
                raise httpx.ReadTimeout("the time is over")

        def read() -> tuple[int, bytes, bool]:
            with self.opened(f"/{collection}/{upstream_id}", timeout_seconds=seconds) as response:
                return response.status_code, *read_up_to(response.iter_bytes(), limit_bytes, check)

        try:
            status, body, truncated = run_in_time(read, seconds)
        except TimeoutError as error:
            raise Unavailable(f"Replicate did not answer within {seconds:g} s") from error
        _check(httpx.Response(status, content=body))
        return None if truncated else _read_asked(body, upstream_id)

    def cancel(self, upstream_id: str, collection: Collection = "predictions") -> "Canceled":
        """Cancel a prediction or training; a finished one does not change.

        The response holds the whole prediction. Nothing but its id and status is read; all else is skipped unparsed.

        Raises:
            NotFound: Replicate does not know it.
            Unavailable: Replicate could not be asked; asking again does no harm.
        """
        response = self._ask("POST", f"/{collection}/{upstream_id}/cancel", beginning_will_do=True)
        texts = read_members(utf8(response.content), ("id", "status"))
        found = {name: value for name, text in texts.items() if isinstance(value := read_json(text), str)}
        if "status" not in found and len(response.content) <= LIGHT_BYTES:
            raise Unavailable("Replicate's response to the cancel is not a prediction")
        return Canceled(found.get("id", upstream_id), found.get("status"))

    def created_between(
        self, start: datetime, end: datetime, collection: Collection = "predictions"
    ) -> Iterator[UpstreamPrediction]:
        """List the predictions or trainings created in a span of time, newest first.

        Raises:
            Unavailable: Replicate could not be asked.
        """
        url = f"/{collection}"
        query: dict[str, str] | None = {
            "created_after": rfc3339(start, "milliseconds"),
            "created_before": rfc3339(end, "milliseconds"),
        }
        if collection == "trainings":
            query = None  # their list has no such filters: it is read from the newest on
        asked: set[str] = set()
        while url:
            if url in asked:
                raise Unavailable(f"Replicate's list of {collection} leads back to a page that was read")
            asked.add(url)
            following, entries = _read_page(self._ask("GET", url, params=query).content)
            for entry in entries:
                try:
                    listed = UpstreamPrediction.parse(entry)
                except UnreadablePrediction:
                    continue
                created = parse_rfc3339(listed.created_at)
                # The filters may be unknown to a server; the order is documented: newest first.
                if created is not None and created < start:
                    return
                if created is None or created <= end:
                    yield listed
            # The token goes along, so a page on another host is not followed.
            url = following if isinstance(following, str) and following.startswith(self._url + "/") else ""
            query = None

    def model(self, name: str) -> Model:
        """Read the description of a model, `owner/name`.

        Raises:
            NotFound: There is no such model, or the stack's token may not see it.
            Unavailable: Replicate could not be asked.
        """
        described = self._json(self._ask("GET", f"/models/{name}"))
        latest = described.get("latest_version")
        version = latest.get("id") if isinstance(latest, dict) else None
        return Model(
            is_official=described.get("is_official") is True,
            latest_version=version if _is_version(version) else None,
            openapi_schema=latest.get("openapi_schema") if isinstance(latest, dict) else None,
        )

    def version_schema(self, name: str, version: str) -> Any:
        """Read the `openapi_schema` of a version of the model `owner/name`, unchecked.

        Raises:
            NotFound: There is no such version, or the stack's token may not see it.
            Unavailable: Replicate could not be asked, or not within seconds.
        """
        return self._describe(f"/models/{name}/versions/{version}").get("openapi_schema")

    def release(self, deployment: str) -> tuple[str, str] | None:
        """Read the model and version that a deployment runs, or None if either is missing.

        Raises:
            NotFound: There is no such deployment, or the stack's token may not see it.
            Unavailable: Replicate could not be asked, or not within seconds.
        """
        current = self._describe(f"/deployments/{deployment}").get("current_release")
        model, version = (current.get("model"), current.get("version")) if isinstance(current, dict) else (None, None)
        return (model, version) if is_model_path(model) and _is_version(version) else None

    def _describe(self, path: str) -> dict[str, Any]:
        return self._json(self._ask("GET", path, timeout=_SCHEMA_TIMEOUT_SECONDS, limit_bytes=SCHEMA_LIMIT_BYTES))

    def signing_secret(self) -> str:
        """Read the secret with which Replicate signs this account's webhooks (`whsec_…`).

        Raises:
            Unavailable: Replicate could not be asked, or gave no secret.
        """
        key = self._json(self._ask("GET", "/webhooks/default/secret")).get("key")
        if not isinstance(key, str):
            raise Unavailable("Replicate gave no signing secret")
        return key

    def _ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            response = self._request(method, path, **{"timeout": _ASK_TIMEOUT_SECONDS, **request})
        except TokenUnreadable as error:
            raise Unavailable(str(error)) from error
        except (httpx.HTTPError, httpx.InvalidURL, AnswerTooLargeError) as error:
            raise Unavailable(f"Replicate could not be asked ({type(error).__name__})") from error
        _check(response)
        return response

    @contextmanager
    def opened(self, path: str, *, timeout_seconds: float) -> Iterator[httpx.Response]:
        """Open the response to a GET, of any status; the caller reads its body in pieces.

        Args:
            path: The path, or a whole URL of this API, such as a list's `next`.
            timeout_seconds: The longest wait for one piece. A server that sends slowly is the caller's to bound.

        Raises:
            Unavailable: Replicate could not be asked, or the response broke off while it was read.
        """
        url = path if path.startswith(self._url + "/") else self._url + path
        try:
            # A piece of compressed text may hold a thousand times as much.
            headers = {"Authorization": f"Bearer {self._token.value()}", "Accept-Encoding": "identity"}
            with self._reads().stream("GET", url, headers=headers, timeout=timeout_seconds) as response:
                if response.status_code in (401, 402, 403):
                    self._token.forget()
                yield response
        except TokenUnreadable as error:
            raise Unavailable(str(error)) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(f"Replicate could not be asked ({type(error).__name__})") from error

    def owns(self, url: object) -> bool:
        """Return whether a URL is of this API, so that the token may be sent to it."""
        return isinstance(url, str) and url.startswith(self._url + "/")

    def _request(
        self,
        method: str,
        path: str,
        *,
        limit_bytes: int | None = None,
        beginning_will_do: bool = False,
        create: bool = False,
        window: "SendWindow | None" = None,
        **request: Any,
    ) -> httpx.Response:
        most = _ANSWER_LIMIT_BYTES if limit_bytes is None else limit_bytes
        headers = {**request.pop("headers", {}), "Authorization": f"Bearer {self._token.value()}"}
        url = path if path.startswith(self._url + "/") else self._url + path
        if window is not None:
            # Here too, for clients that open no connection of their own: reading the token may have taken its time.
            window.check()
            request["extensions"] = {"window": window}
        began = time.monotonic()
        http = self._creates() if create else self._reads()
        with http.stream(method, url, headers=headers, **request) as response:
            if "Prefer" not in headers:  # else it waited for the model
                seconds = time.monotonic() - began
                metrics.add_metric(name="UpstreamSeconds", unit=MetricUnit.Seconds, value=seconds)
            received, truncated = read_up_to(response.iter_bytes(), most)
            if truncated and not (beginning_will_do and 200 <= response.status_code < 300):
                raise AnswerTooLargeError(f"more than {most} bytes")
            if response.status_code in (401, 402, 403):
                self._token.forget()
            return httpx.Response(
                response.status_code,
                # The body is decoded already; its length and encoding are no longer what these say.
                # As bytes: httpx would refuse text that is not ASCII, after a prediction was started.
                headers=[(k, v) for k, v in response.headers.raw if not k.lower().startswith(b"content-")],
                content=received,
                extensions={_TRUNCATED: truncated},
            )

    def _json(self, response: httpx.Response) -> dict[str, Any]:
        value = read_json(response.content)
        if not isinstance(value, dict):
            raise Unavailable("Replicate's response is not a JSON object")
        return value


def is_model_path(value: Any) -> TypeGuard[str]:
    """Return whether a value is a valid `owner/name`, which becomes part of a path."""
    return (
        isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]{0,127}/[\w-][\w.-]{0,127}", value, re.ASCII) is not None
    )


def _is_version(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


# The members that are read of each entry in a list that is too large to be parsed whole.
_LISTED_MEMBERS = ("id", "status", "model", "version", "deployment", "input", "created_at", "webhook")


def _read_page(body: bytes) -> tuple[Any, Iterator[Any]]:
    """Read a page of a list: the URL of the next page, and the entries.

    A page holds whole predictions with their outputs, of all owners. One that is too large to be parsed is scanned: of
    each entry only small members are read, so that what one prediction returned keeps none from being found.

    Raises:
        Unavailable: It is no page.
    """
    page = read_json(body)
    if isinstance(page, dict):
        results = page.get("results")
        return page.get("next"), iter(results if isinstance(results, list) else ())
    text = utf8(body)
    try:
        if len(text) <= LIGHT_BYTES:
            raise Unscannable("no JSON")
        found = {member.name: member for member in members(text)}
        spans = list(elements(text, found["results"].start)) if "results" in found else []
    except Unscannable as error:
        raise Unavailable("Replicate's response is not a JSON object") from error
    following = read_json(text[found["next"].start : found["next"].end]) if "next" in found else None
    return following, (
        {name: read_json(value, replace=True) for name, value in read_members(text, _LISTED_MEMBERS, start).items()}
        for start, _ in spans
    )


_TRUNCATED = "truncated"


def _is_truncated(response: httpx.Response) -> bool:
    """Return whether a response was cut off at the limit."""
    return bool(response.extensions.get(_TRUNCATED))


def _read_asked(body: bytes, upstream_id: str, *, truncated: bool = False) -> UpstreamPrediction:
    """Read the prediction that was asked for.

    Raises:
        Unavailable: It is none, or another one: taken for this one, it would be canceled as its orphan.
    """
    try:
        found = UpstreamPrediction.read(body, truncated=truncated, upstream_id=upstream_id)
    except UnreadablePrediction as error:
        raise Unavailable("Replicate's response is not a prediction") from error
    if found.id != upstream_id:
        raise Unavailable("Replicate's response is another prediction")
    return found


def _check(response: httpx.Response) -> None:
    """Raise the error that the status of a read's response means."""
    if response.status_code in (404, 410):
        raise NotFound(_detail(response))
    if response.status_code in (401, 402, 403):
        reason = f"Replicate refuses the stack's token or credit ({response.status_code})"
        raise Unavailable(reason, response.status_code)
    if not 200 <= response.status_code < 300:
        raise Unavailable(f"Replicate answered {response.status_code}", response.status_code)


def not_accepted(response: httpx.Response) -> NotAccepted:
    """Turn a 4xx of Replicate into `Throttled`, `Unauthorized` or `Refused`."""
    detail = _detail(response)
    if response.status_code == 429:
        return Throttled(detail, _retry_after_seconds(response, detail))
    if response.status_code in (401, 402, 403):
        return Unauthorized(response.status_code, detail)
    fields = _invalid_fields(response)
    kept = [{"field": field[:200], "detail": text[:1000]} for field, text in fields[:_FIELDS_LIMIT]]
    return Refused(response.status_code, detail, kept, fields_left_out=len(fields) - len(kept))


def _rate_limit(response: httpx.Response) -> dict[str, str]:
    told = {name: response.headers.get(name, "") for name in RATE_LIMIT_HEADERS}
    # They become headers of our own response.
    return {name: value for name, value in told.items() if re.fullmatch(r"[!-~][ -~]{0,99}", value)}


def _problem_of(response: httpx.Response) -> dict[str, Any]:
    value = read_json(response.content)
    return value if isinstance(value, dict) else {}


def _detail(response: httpx.Response) -> str:
    problem = _problem_of(response)
    detail = problem.get("detail") or problem.get("title") or f"Replicate answered {response.status_code}"
    # Half a surrogate pair cannot be stored.
    return str(detail)[:2000].encode("utf-8", "replace").decode()


def _invalid_fields(response: httpx.Response) -> list[tuple[str, str]]:
    fields = _problem_of(response).get("invalid_fields")
    if not isinstance(fields, list):
        return []
    return [
        (str(f.get("field", "")), str(f.get("detail") or f.get("description") or ""))
        for f in fields
        if isinstance(f, dict)
    ]


def _retry_after_seconds(response: httpx.Response, detail: str) -> int:
    """Return the wait of a 429: header, body's `retry_after`, its `~Ns`, or 10 s."""
    candidates = [response.headers.get("retry-after"), _problem_of(response).get("retry_after")]
    if said := re.search(r"~\s*(\d+(?:\.\d+)?)\s*s", detail):
        candidates.append(said.group(1))
    for candidate in candidates:
        try:
            seconds = float(candidate)
        except (TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(seconds):
            return min(3600, max(1, math.ceil(seconds)))
    return 10
