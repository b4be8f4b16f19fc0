"""Create routes of the API: check a request, submit it once, and respond with the prediction."""

import os

from predictions.admission.quotas import OwnerLimits
from predictions.api.app import (
    all_headers_of,
    answer_with,
    body_of,
    headers_of,
    json_response,
    own_prediction,
    owner_with,
    resolver,
)
from predictions.api.routing import Response
from predictions.intents.model import (
    Attempt,
    Intent,
    Reference,
    create_intent,
    create_training,
    model_reference,
    training_reference,
    wait_seconds,
)
from predictions.lifecycle.start import StartPrediction
from predictions.observability import remaining_seconds
from predictions.store.predictions import PredictionsTable
from predictions.store.records import PredictionDetail
from predictions.views.prediction import Presenter

# API Gateway ends a request 4 s later: the submission and the response take them.
WAIT_LIMIT_SECONDS = int(os.environ["SYNC_WAIT_SECONDS"])

app = resolver()
table = PredictionsTable.from_env()
starting = StartPrediction.from_env()
presenter = Presenter.from_env()


@app.post("/predictions")
def create() -> Response:
    """`POST /predictions`: the body's `version` names what to run."""
    return _create(None)


@app.post("/models/<owner>/<name>/predictions")
def create_with_model(owner: str, name: str) -> Response:
    """`POST /models/{owner}/{name}/predictions`: a community model runs its latest version."""
    return _create(model_reference("model", owner, name))


@app.post("/deployments/<owner>/<name>/predictions")
def create_with_deployment(owner: str, name: str) -> Response:
    """`POST /deployments/{owner}/{name}/predictions`."""
    return _create(model_reference("deployment", owner, name))


@app.post("/models/<owner>/<name>/versions/<version>/trainings")
def create_training_of(owner: str, name: str, version: str) -> Response:
    """`POST /models/{owner}/{name}/versions/{id}/trainings`: trains a version into a new one of `destination`."""
    token_owner = owner_with(app, "train")
    intent = create_training(
        body_of(app),
        _headers(),
        owner=token_owner,
        reference=training_reference(owner, name, version),
        allow_loopback_webhooks=os.environ["ALLOW_LOOPBACK_WEBHOOKS"] == "true",
    )
    return _answer(intent)


def _create(reference: Reference | None) -> Response:
    token_owner = owner_with(app, "predict")
    headers = _headers()
    seconds = wait_seconds(headers.get("prefer"), WAIT_LIMIT_SECONDS)
    intent = create_intent(
        body_of(app),
        headers,
        owner=token_owner,
        reference=reference,
        allow_loopback_webhooks=os.environ["ALLOW_LOOPBACK_WEBHOOKS"] == "true",
    )
    return _answer(intent, seconds)


def _headers() -> dict[str, str]:
    """Return the request's headers; labels may be spread over several `X-Labels`."""
    headers = headers_of(app)
    return {**headers, "x-labels": all_headers_of(app)["x-labels"]} if "x-labels" in headers else headers


def _answer(intent: Intent, seconds: int | None = None) -> Response:
    request = app.request
    started = starting.start_and_wait(
        intent,
        seconds,
        remaining_seconds(app.request.context),
        attempt=Attempt.of(headers_of(app), request.request_time_epoch),
        limits=OwnerLimits.of_context(request.owner_context),
    )

    def read() -> PredictionDetail:
        return own_prediction(table, started.prediction.id, intent.owner, intent.object)

    shown = presenter.show_started(started.prediction, intent.input_json, read)
    applied = {"Preference-Applied": f"wait={seconds}"} if started.waited else {}
    return json_response(201, shown, {**started.rate_limit, **applied, "Location": shown["urls"]["get"]})


handler = answer_with(app)
