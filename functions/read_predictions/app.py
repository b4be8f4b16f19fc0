"""Serve the lists of predictions and trainings, and the API's own document.

Lists are read from the table only, never from Replicate.
"""

from typing import Literal

from aws_lambda_powertools.event_handler import Response
from predictions.api.app import answer_with, json_response, openapi_response, owner_with, resolver
from predictions.api.pagination import page_body, read_cursor, read_moment
from predictions.errors import Problem
from predictions.store.predictions import PredictionsTable
from predictions.views.prediction import Presenter

PAGE_SIZE = 100

app = resolver()
table = PredictionsTable.from_env()
presenter = Presenter.from_env()


@app.get("/predictions")
def list_() -> Response[str]:
    """`GET /predictions`: up to 100 predictions, newest first; a page of large ones ends earlier.

    `created_after`, `created_before` and `source` narrow the list, and its links keep them.
    """
    asked = {name: _query(name) for name in ("created_after", "created_before", "source")}
    filters = {name: text for name, text in asked.items() if text is not None}
    if filters.get("source", "api") not in ("api", "web"):
        detail = "Has to be `web`, or `api`, of which all of this stack's predictions are."
        raise Problem(422, detail, invalid_fields=[{"field": "source", "detail": detail}])
    return _page("prediction", filters)


@app.get("/trainings")
def list_trainings() -> Response[str]:
    """`GET /trainings`: as for predictions, whole: Replicate's list of trainings has no filters either."""
    return _page("training", {})


@app.get("/openapi.json")
def document() -> Response[str]:
    """Serve `GET /openapi.json`: this stack's own OpenAPI 3.1 document."""
    owner_with(app, "read")
    return openapi_response()


def _query(name: str) -> str | None:
    text: str | None = app.current_event.get_query_string_value(name)
    return text


def _page(kind: Literal["prediction", "training"], filters: dict[str, str]) -> Response[str]:
    owner = owner_with(app, "read")
    older, start = read_cursor(_query("cursor") or "")
    between = {
        name: read_moment(name, filters[name]) for name in ("created_after", "created_before") if name in filters
    }
    if filters.get("source") == "web":
        # Made on Replicate's web site: it has none of an owner of ours.
        return json_response(200, {"previous": None, "next": None, "results": []})
    shown = presenter.show_page(table.list(owner, start, older=older, size=PAGE_SIZE, object=kind, **between))
    ends = {"first": shown.first, "beyond": shown.beyond}
    return json_response(200, page_body(f"/{kind}s", start, shown.results, older=older, **ends, filters=filters))


handler = answer_with(app)
