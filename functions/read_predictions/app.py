"""Serve the lists of predictions and trainings, usage, and the API's own document.

Lists are read from the table only, never from Replicate.
"""

from datetime import UTC, datetime
from typing import Literal

from predictions.api.app import answer_with, headers_of, json_response, openapi_response, owner_with, resolver
from predictions.api.pagination import FILTERS, page_body, read_cursor, read_filters, read_moment
from predictions.api.routing import Response
from predictions.api.usage import PARAMETERS, UsageQuery, usage_csv
from predictions.aws.dynamodb import Table
from predictions.errors import Problem
from predictions.money.usage import read_usage
from predictions.store.predictions import PredictionsTable
from predictions.views.prediction import Presenter

PAGE_SIZE = 100

app = resolver()
table = PredictionsTable.from_env()
presenter = Presenter.from_env()


@app.get("/predictions")
def list_() -> Response:
    """`GET /predictions`: up to 100 predictions, newest first; a page of large ones ends earlier.

    Its links keep the filters: `created_after`, `created_before`, `source`, `status`, `model`, `origin`
    and `label`.
    """
    query = _query("created_after", "created_before", "source", *FILTERS)
    if query.get("source", "api") not in ("api", "web"):
        detail = "Has to be `web`, or `api`, of which all of this stack's predictions are."
        raise Problem(422, detail, invalid_fields=[{"field": "source", "detail": detail}])
    return _page("prediction", query)


@app.get("/trainings")
def list_trainings() -> Response:
    """`GET /trainings`: as for predictions, narrowed by `status`, `model`, `origin` and `label`."""
    return _page("training", _query(*FILTERS))


@app.get("/usage")
def usage() -> Response:
    """`GET /usage?from=&to=&by=`: the caller's own counters of usage; with the scope `manage` those of all owners."""
    owner = owner_with(app, "read", "manage")
    manages = "manage" in str(app.request.owner_context.get("scopes", "")).split()
    today = datetime.fromtimestamp(app.request.request_time_epoch / 1000, UTC).date()
    query = UsageQuery.read(_query(*PARAMETERS), today, headers_of(app).get("accept", ""))
    rows = read_usage(Table.from_env(), query.first, query.last, None if manages else owner, query.by)
    if query.csv:
        return Response(200, "text/csv; charset=utf-8", usage_csv(query.by, rows))
    return json_response(200, query.body(rows))


@app.get("/openapi.json")
def document() -> Response:
    """Serve `GET /openapi.json`: this stack's own OpenAPI 3.1 document."""
    owner_with(app, "read")
    return openapi_response()


def _query(*names: str) -> dict[str, str]:
    asked = {name: app.request.query_value(name) for name in names}
    return {name: text for name, text in asked.items() if text is not None}


def _page(kind: Literal["prediction", "training"], query: dict[str, str]) -> Response:
    owner = owner_with(app, "read")
    older, start = read_cursor(_query("cursor").get("cursor", ""))
    between = {name: read_moment(name, query[name]) for name in ("created_after", "created_before") if name in query}
    filters = read_filters(query)
    if query.get("source") == "web":
        # Made on Replicate's web site: it has none of an owner of ours.
        return json_response(200, {"previous": None, "next": None, "results": []})
    page = table.list(owner, start, older=older, size=PAGE_SIZE, object=kind, filters=filters, **between)
    shown = presenter.show_page(page)
    ends = {"first": shown.first, "beyond": shown.beyond}
    return json_response(200, page_body(f"/{kind}s", start, shown.results, older=older, **ends, filters=query))


handler = answer_with(app)
