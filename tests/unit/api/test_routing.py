"""Routes by method and path: held against the resolver that they replace."""

from contextvars import Context
from typing import Any

import pytest
from aws_lambda_powertools.event_handler import APIGatewayRestResolver, CORSConfig
from aws_lambda_powertools.event_handler import Response as PowertoolsResponse
from predictions.api.routing import Response, Router

EXPOSED = ("Location", "Retry-After")
RULES = {
    ("GET", "/predictions"): "list",
    ("POST", "/predictions"): "create",
    ("GET", "/predictions/<one>"): "one",
    ("GET", "/predictions/newest"): "newest",
    ("DELETE", "/predictions/<one>"): "delete",
    ("POST", "/models/<owner>/<name>/predictions"): "model",
}
PATHS = [
    "/", "", "/v1", "/v1/", "/v1/predictions", "/v1/v1/predictions", "/v1predictions", "/predictions", "/predictions/",
    "/predictions//", "/predictions\n", "/predictions/\n", "/predictions\n/", "/predictions/newest", "/predictions/a",
    "/predictions/a/", "/predictions/a\n", "/predictions/a/b", "/predictions/%2F", "/predictions/é €", "/predictions/#",
    "/predictions/a?b", '/predictions/"', "/predictions/.-_~()'!*:@,;=+&$%<> []{}|^", "//predictions",
    "/models/a/b/predictions", "/models/a//predictions", "/models/a/b/predictions/c",
]  # fmt: skip


def made(origin: str) -> Router:
    router = Router(
        refused=lambda error: Response(409, "text/plain", str(error)) if isinstance(error, KeyError) else None,
        not_found=lambda request: Response(404, "text/plain", f"{request.http_method} {request.path}"),
        base_path="/v1",
        origin=origin,
        exposed_headers=EXPOSED,
    )
    for (method, rule), name in RULES.items():
        router.route(rule, method)(
            lambda name=name, **names: Response(200, "text/plain", f"{name} {names}", {"A": "b"})
        )
    return router


def replaced(origin: str) -> Any:
    cors = CORSConfig(allow_origin=origin, expose_headers=list(EXPOSED), max_age=600) if origin else None
    app = APIGatewayRestResolver(debug=False, cors=cors, strip_prefixes=["/v1"])
    for (method, rule), name in RULES.items():
        app.route(rule, method)(
            lambda name=name, **names: PowertoolsResponse(200, "text/plain", f"{name} {names}", {"A": "b"})
        )
    app.not_found(
        lambda _: PowertoolsResponse(404, "text/plain", f"{app.current_event.http_method} {app.current_event.path}")
    )
    return app


def asked(method: str, path: str, origin: str | None = None, **members: Any) -> dict[str, Any]:
    headers = {} if origin is None else {"origin": origin}
    many = {name: [value] for name, value in headers.items()}
    return {"httpMethod": method, "path": path, "headers": headers, "multiValueHeaders": many, **members}


@pytest.mark.parametrize("method", ["GET", "get", "POST", "DELETE", "HEAD", "OPTIONS"])
def test_every_path_leads_where_it_led(method: str) -> None:
    for origin in ("", "https://a.example"):
        router, before = made(origin), replaced(origin)
        for path in PATHS:
            event = asked(method, path)
            assert router.resolve(event, None) == before.resolve(event, None), path


@pytest.mark.parametrize("allowed", ["", "*", "https://a.example"])
@pytest.mark.parametrize("origin", [None, "", "*", "null", "https://a.example", "https://b.example"])
def test_the_same_origins_may_read_the_same_headers(allowed: str, origin: str | None) -> None:
    router, before = made(allowed), replaced(allowed)
    for method in ("GET", "OPTIONS"):
        for event in (
            asked(method, "/predictions", origin),
            asked(method, "/predictions", origin, multiValueHeaders=None),
            asked(method, "/predictions", origin, headers=None),
        ):
            assert router.resolve(event, None) == before.resolve(event, None)


def test_an_error_that_has_a_response_gets_it_and_any_other_is_raised() -> None:
    router = made("")

    @router.get("/refused")
    def refused() -> Response:
        raise KeyError("x")

    @router.get("/broken")
    def broken() -> Response:
        raise ValueError("x")

    assert router.resolve(asked("GET", "/refused"), None)["statusCode"] == 409
    with pytest.raises(ValueError, match="x"):
        router.resolve(asked("GET", "/broken"), None)
    with pytest.raises(LookupError):
        router.request.path  # noqa: B018  # what it refused is no longer at hand


def test_requests_that_are_served_at_once_do_not_see_each_other() -> None:
    router = made("")
    seen: list[str] = []

    @router.get("/outer")
    def outer() -> Response:
        Context().run(router.resolve, asked("GET", "/inner"), None)
        seen.append(router.request.path)
        return Response(204)

    @router.get("/inner")
    def inner() -> Response:
        seen.append(router.request.path)
        return Response(204)

    router.resolve(asked("GET", "/outer"), None)
    assert seen == ["/inner", "/outer"]


def test_a_request_without_optional_members_is_read() -> None:
    router = made("")
    event = {"httpMethod": "GET", "path": "/here", "requestContext": {"authorizer": None}}
    found: list[Any] = []

    @router.get("/here")
    def here() -> Response:
        request = router.request
        found.extend([request.headers, request.queries, request.query_value("a"), request.query_value("a", "b")])
        found.append(request.owner_context)
        return Response(204)

    assert router.resolve(event, None)["statusCode"] == 204
    assert found == [{}, {}, None, "b", {}]
