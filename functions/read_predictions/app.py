"""Read routes of the API: one prediction or training, and an owner's list of them; the table only, never Replicate."""

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
from predictions.cursors import cursor_url, read_cursor
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
    older, start = read_cursor(app.current_event.get_query_string_value("cursor", ""))
    shown = presenter.show_page(table.list(owner, start, older=older, size=PAGE_SIZE, object=kind))
    beyond, before = shown.beyond, shown.first if start else None
    newer, further = (before, beyond) if older else (beyond, before)
    results = shown.results if older else shown.results[::-1]
    links = {
        "previous": cursor_url(f"/{kind}s", newer, older=False),
        "next": cursor_url(f"/{kind}s", further, older=True),
    }
    return json_response(200, {**links, "results": results})


handler = answer_with(app)
