"""Serve one prediction or training, an open one as Replicate shows it now."""

from predictions.api.app import answer_with, json_response, own_prediction, owner_with, resolver
from predictions.api.routing import Response
from predictions.lifecycle.live_reads import LiveReads
from predictions.store.predictions import PredictionsTable
from predictions.views.prediction import Presenter

app = resolver()
table = PredictionsTable.from_env()
live = LiveReads.from_env(table)
presenter = Presenter.from_env()


@app.get("/predictions/<prediction_id>")
def get(prediction_id: str) -> Response:
    """`GET /predictions/{id}`: 404 also for another owner's."""
    owner = owner_with(app, "read")
    return json_response(200, presenter.show(live.refresh(own_prediction(table, prediction_id, owner))))


@app.get("/trainings/<training_id>")
def get_training(training_id: str) -> Response:
    """`GET /trainings/{id}`: 404 also for another owner's, and for a prediction."""
    owner = owner_with(app, "read")
    return json_response(200, presenter.show(live.refresh(own_prediction(table, training_id, owner, "training"))))


handler = answer_with(app)
