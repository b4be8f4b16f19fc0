"""Cancel and delete routes of the API: cancel an open prediction, delete the data of a completed one."""

from predictions.api.app import answer_with, json_response, own_prediction, owner_with, resolver
from predictions.api.routing import Response
from predictions.lifecycle.cancel import CancelPrediction
from predictions.lifecycle.delete import DeletePrediction
from predictions.store.predictions import PredictionsTable
from predictions.views.prediction import Presenter

app = resolver()
table = PredictionsTable.from_env()
canceling = CancelPrediction.from_env()
deleting = DeletePrediction.from_env()
presenter = Presenter.from_env()


@app.post("/predictions/<prediction_id>/cancel")
def cancel(prediction_id: str) -> Response:
    """`POST /predictions/{id}/cancel`: 200 with the prediction as it is then; a completed one stays unchanged."""
    owner = owner_with(app, "predict")
    whole = own_prediction(table, prediction_id, owner)
    canceling.cancel(whole.prediction)
    return json_response(200, presenter.show(own_prediction(table, prediction_id, owner)))


@app.post("/trainings/<training_id>/cancel")
def cancel_training(training_id: str) -> Response:
    """`POST /trainings/{id}/cancel`: as for a prediction; a token that may start trainings may cancel them."""
    owner = owner_with(app, "predict", "train")
    canceling.cancel(own_prediction(table, training_id, owner, "training").prediction)
    return json_response(200, presenter.show(own_prediction(table, training_id, owner, "training")))


@app.delete("/predictions/<prediction_id>")
def delete(prediction_id: str) -> Response:
    """`DELETE /predictions/{id}`: 200 with the rest of a completed prediction; 409 for an open one."""
    owner = owner_with(app, "predict")
    deleting.delete_ended(own_prediction(table, prediction_id, owner).prediction)
    return json_response(200, presenter.show(own_prediction(table, prediction_id, owner)))


handler = answer_with(app)
