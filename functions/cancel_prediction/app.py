"""Cancel route of the API: flags the prediction, and cancels it at Replicate where it is known there."""

from aws_lambda_powertools.event_handler import Response
from predictions.api import Presenter, answer_with, json_response, own_prediction, owner_with, resolver
from predictions.submissions import Submissions

app = resolver()
submissions = Submissions.from_env()
presenter = Presenter.from_env()


@app.post("/predictions/<prediction_id>/cancel")
def cancel(prediction_id: str) -> Response[str]:
    """`POST /predictions/{id}/cancel`: 200 with the prediction as it is then; one that has ended stays as it is."""
    owner = owner_with(app, "predict")
    whole = own_prediction(submissions.table, prediction_id, owner)
    submissions.cancel(whole.prediction)
    return json_response(200, presenter.show(own_prediction(submissions.table, prediction_id, owner)))


handler = answer_with(app)
