"""Read routes of the API: one prediction or training, and an owner's list of them; the table only, never Replicate."""

import base64
import re
from typing import Literal

from aws_lambda_powertools.event_handler import Response
from predictions.api import (
    Presenter,
    answer_with,
    json_response,
    own_prediction,
    owner_with,
    resolver,
)
from predictions.aws import api_url
from predictions.errors import Problem
from predictions.table import PredictionsTable

PAGE_SIZE = 100

app = resolver()
table = PredictionsTable.from_env()
presenter = Presenter.from_env()


@app.get("/predictions/<prediction_id>")
def get(prediction_id: str) -> Response[str]:
    """`GET /predictions/{id}`: 404 also for another owner's."""
    return json_response(200, presenter.show(own_prediction(table, prediction_id, owner_with(app, "read"))))


@app.get("/trainings/<training_id>")
def get_training(training_id: str) -> Response[str]:
    """`GET /trainings/{id}`: 404 also for another owner's, and for a prediction."""
    owner = owner_with(app, "read")
    return json_response(200, presenter.show(own_prediction(table, training_id, owner, "training")))


@app.get("/predictions")
def list_() -> Response[str]:
    """`GET /predictions?cursor=`: up to 100 predictions, newest first; a page of large ones ends earlier."""
    return _page("prediction")


@app.get("/trainings")
def list_trainings() -> Response[str]:
    """`GET /trainings?cursor=`: as for predictions."""
    return _page("training")


def _page(kind: Literal["prediction", "training"]) -> Response[str]:
    owner = owner_with(app, "read")
    older, start = _position(app.current_event.get_query_string_value("cursor", ""))
    shown = presenter.show_page(table.list(owner, start, older=older, size=PAGE_SIZE, object=kind))
    beyond, before = shown.beyond, shown.first if start else None
    newer, further = (before, beyond) if older else (beyond, before)
    results = shown.results if older else shown.results[::-1]
    links = {"previous": _link(kind, "n", newer), "next": _link(kind, "o", further)}
    return json_response(200, {**links, "results": results})


def _link(kind: str, direction: str, key: str | None) -> str | None:
    if key is None:
        return None
    cursor = base64.urlsafe_b64encode(f"{direction}{key}".encode()).decode().rstrip("=")
    return f"{api_url()}/{kind}s?cursor={cursor}"


def _position(cursor: str) -> tuple[bool, str | None]:
    """Where a page starts, and whether it goes to the older side of there.

    A cursor is opaque to callers, and harmless if they make one up: the owner is not in it.
    """
    if not cursor:
        return True, None
    try:
        text = base64.urlsafe_b64decode(cursor.encode() + b"=" * (-len(cursor) % 4)).decode("ascii")
    except ValueError:
        text = ""
    found = re.fullmatch(r"([no])(\d{4}-\d\d-\d\dT[\d:.]{8,15}Z#[a-z0-9]{26})", text, re.ASCII)
    if not found:
        detail = "Not a cursor of this API: take it from `next` or `previous` as it is."
        raise Problem(422, detail, invalid_fields=[{"field": "cursor", "detail": detail}])
    return found[1] == "o", found[2]


handler = answer_with(app)
