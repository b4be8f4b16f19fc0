"""Routes of a function behind API Gateway, by method and path.

Our own, because Powertools' resolver, with the resolvers and events of every other service, takes a seventh of a
botocore client to import, at the cold start of each function of the API (docs/decisions/own-router.md). What it did is
kept: its route syntax, static routes first, a slash at the end, CORS, and the form of the response.
"""

import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, overload

# What a name in a path may consist of: RFC 3986 without the slash, and what clients send unescaped.
_NAME = r"[-._~()'!*:@,;=+&$%<> \[\]{}|^\w]+"

# Those that browsers and AWS's own signing send; other request headers, such as Prefer, are simple or not for scripts.
_ALLOWED_HEADERS = "Authorization,Content-Type,X-Amz-Date,X-Amz-Security-Token,X-Api-Key"


@dataclass(frozen=True)
class Request:
    """A request, as the event of a REST API's proxy integration has it.

    https://docs.aws.amazon.com/apigateway/latest/developerguide/set-up-lambda-proxy-integrations.html

    Attributes:
        event: The whole event.
        context: Lambda's context of the invocation.
    """

    event: Mapping[str, Any]
    context: Any

    @property
    def http_method(self) -> str:
        """Return the method."""
        return str(self.event["httpMethod"])

    @property
    def path(self) -> str:
        """Return the path, with the base path of a custom domain name."""
        return str(self.event["path"])

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers with names in lower case, of a repeated one its last value."""
        headers: Mapping[str, str | None] = self.event.get("headers") or {}
        return {name.lower(): value for name, value in headers.items() if value is not None}

    @property
    def origin(self) -> str | None:
        """Return the header `Origin`, of a repeated one its first value."""
        many: Mapping[str, list[str]] = self.event.get("multiValueHeaders") or {}
        last: Mapping[str, str] = self.headers
        origins = next((values for name, values in many.items() if name.lower() == "origin"), None)
        return origins[0] if origins else last.get("origin")

    @property
    def owner_context(self) -> Mapping[str, Any]:
        """Return what the authorizer said of the caller; empty on a public route."""
        return self.event["requestContext"].get("authorizer") or {}

    @property
    def request_time_epoch(self) -> int:
        """Return when API Gateway received the request, in milliseconds since 1970."""
        return int(self.event["requestContext"]["requestTimeEpoch"])

    @property
    def queries(self) -> Mapping[str, list[str]]:
        """Return all values of every query parameter."""
        return self.event.get("multiValueQueryStringParameters") or {}

    @overload
    def query_value(self, name: str) -> str | None: ...

    @overload
    def query_value(self, name: str, default: str) -> str: ...

    def query_value(self, name: str, default: str | None = None) -> str | None:
        """Return a query parameter's last value."""
        return (self.event.get("queryStringParameters") or {}).get(name, default)


@dataclass
class Response:
    """A response; a body that is not given is none."""

    status_code: int
    content_type: str | None = None
    body: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def proxied(self, added: Mapping[str, str]) -> dict[str, Any]:
        """Return the form that API Gateway expects, with these headers added."""
        typed = {"Content-Type": self.content_type} if self.content_type else {}
        return {
            "statusCode": self.status_code,
            "body": self.body,
            "isBase64Encoded": False,
            "multiValueHeaders": {name: [value] for name, value in {**typed, **self.headers, **added}.items()},
        }


Route = Callable[..., Response]

_request: ContextVar[Request] = ContextVar("request")


class Router:
    """Calls the route of a request.

    Args:
        refused: Respond to an exception of a route, or return None to have it raised.
        not_found: Respond to a request without a route.
        base_path: Left out at the beginning of a path: with a custom domain name, it is part of the event's path.
        origin: The web origin whose scripts may read responses, `*` for any, empty for none.
        exposed_headers: Response headers that those may read.
    """

    def __init__(
        self,
        *,
        refused: Callable[[Exception], Response | None],
        not_found: Callable[[Request], Response],
        base_path: str,
        origin: str,
        exposed_headers: tuple[str, ...],
    ) -> None:
        self._refused = refused
        self._not_found = not_found
        self._base_path = base_path
        self._origin = origin
        self._exposed_headers = exposed_headers
        self._static: dict[tuple[str, str], Route] = {}
        self._dynamic: list[tuple[str, re.Pattern[str], Route]] = []

    @property
    def request(self) -> Request:
        """Return the request at hand.

        Raises:
            LookupError: No request is being served.
        """
        return _request.get()

    def route(self, rule: str, *methods: str) -> Callable[[Route], Route]:
        """Add a route: `/models/<owner>/<name>` calls with `owner` and `name`."""

        def add(function: Route) -> Route:
            for method in methods:
                if "<" in rule:
                    names = re.sub(r"<(\w+)>", lambda name: f"(?P<{name[1]}>{_NAME})", rule)
                    self._dynamic.append((method, re.compile(f"^{names}/*$"), function))
                else:
                    self._static[method, rule] = function
            return function

        return add

    def get(self, rule: str) -> Callable[[Route], Route]:
        """Add a route for GET."""
        return self.route(rule, "GET")

    def post(self, rule: str) -> Callable[[Route], Route]:
        """Add a route for POST."""
        return self.route(rule, "POST")

    def put(self, rule: str) -> Callable[[Route], Route]:
        """Add a route for PUT."""
        return self.route(rule, "PUT")

    def delete(self, rule: str) -> Callable[[Route], Route]:
        """Add a route for DELETE."""
        return self.route(rule, "DELETE")

    def resolve(self, event: Mapping[str, Any], context: Any) -> dict[str, Any]:
        """Call the route of an event and return the response as API Gateway expects it.

        Raises:
            Exception: Raised by the route, and `refused` has no response to it.
        """
        request = Request(event, context)
        at_hand = _request.set(request)
        try:
            response = self._response(request)
        except Exception as error:
            refusal = self._refused(error)
            if refusal is None:
                raise
            response = refusal
        finally:
            _request.reset(at_hand)
        return response.proxied(self._cors(request))

    def _response(self, request: Request) -> Response:
        method, path = request.http_method.upper(), request.path
        if path.startswith(f"{self._base_path}/"):
            path = path.removeprefix(self._base_path)
        # `$` and `/*` of Powertools' routes: slashes and a line end behind the path do not count.
        static = method, path.removesuffix("\n").rstrip("/")
        if static in self._static:
            return self._static[static]()
        for wanted, names, function in self._dynamic:
            if method == wanted and (found := names.search(path)):
                return function(**found.groupdict())
        if method == "OPTIONS" and self._origin:
            methods = {"OPTIONS", *(method for method, _ in self._static), *(method for method, _, _ in self._dynamic)}
            return Response(204, body="", headers={"Access-Control-Allow-Methods": ",".join(sorted(methods))})
        return self._not_found(request)

    def _cors(self, request: Request) -> dict[str, str]:
        asked = request.origin
        if not self._origin or (asked != self._origin and (self._origin != "*" or asked is None)):
            return {}
        return {
            "Access-Control-Allow-Origin": self._origin,
            "Access-Control-Allow-Headers": _ALLOWED_HEADERS,
            "Access-Control-Expose-Headers": ",".join(self._exposed_headers),
            "Access-Control-Max-Age": "600",
        }
