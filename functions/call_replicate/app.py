"""Routes of the API that are forwarded to Replicate: account, collections, deployments, hardware, models, search."""

from collections.abc import Callable

from predictions.api.app import answer_with, body_of, headers_of, owner_with, resolver
from predictions.api.proxy import ROUTES, Call, Forwarding, Method
from predictions.api.routing import Response
from predictions.observability import logger

app = resolver()
forwarding = Forwarding.from_env()


def _route(method: Method, template: str) -> Callable[..., Response]:
    def pass_on(**names: str) -> Response:
        # The only record of who changed what: to Replicate all callers are the stack.
        logger.append_keys(owner=owner_with(app, "read" if method == "GET" else "manage"))
        query = app.request.queries
        body = body_of(app) if method in ("POST", "PATCH") else b""
        call = Call.check(method, template, names, query, body, headers_of(app).get("content-type"))
        answer = forwarding.forward(call)
        # Nothing that Replicate's users wrote may run as a page under the API's name.
        headers = {**answer.headers, "X-Content-Type-Options": "nosniff"}
        return Response(answer.status, answer.content_type or None, answer.text, headers)

    return pass_on


for each_method, each_template in ROUTES:
    app.route(each_template.replace("{", "<").replace("}", ">"), each_method)(_route(each_method, each_template))

handler = answer_with(app)
