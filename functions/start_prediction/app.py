"""Create routes of the API: checks a request, submits it once, and answers with the prediction."""

import json
import os

from aws_lambda_powertools.event_handler import Response
from botocore.exceptions import BotoCoreError, ClientError
from predictions.admission.quotas import OwnerLimits
from predictions.api.app import answer_with, body_of, headers_of, json_response, own_prediction, owner_with, resolver
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
from predictions.lifecycle.submissions import Submissions
from predictions.observability import logger, remaining_seconds
from predictions.store.records import Prediction, PredictionDetail
from predictions.views.prediction import Presenter

# API Gateway ends a request after 29 s; submitting and answering take the rest.
# https://docs.aws.amazon.com/apigateway/latest/developerguide/limits.html
WAIT_LIMIT_SECONDS = 25
ANSWER_SECONDS = 5

app = resolver()
submissions = Submissions.from_env()
presenter = Presenter.from_env()


@app.post("/predictions")
def create() -> Response[str]:
    """`POST /predictions`: the body's `version` names what to run."""
    return _create(None)


@app.post("/models/<owner>/<name>/predictions")
def create_with_model(owner: str, name: str) -> Response[str]:
    """`POST /models/{owner}/{name}/predictions`: a community model runs its latest version."""
    return _create(model_reference("model", owner, name))


@app.post("/deployments/<owner>/<name>/predictions")
def create_with_deployment(owner: str, name: str) -> Response[str]:
    """`POST /deployments/{owner}/{name}/predictions`."""
    return _create(model_reference("deployment", owner, name))


@app.post("/models/<owner>/<name>/versions/<version>/trainings")
def create_training_of(owner: str, name: str, version: str) -> Response[str]:
    """`POST /models/{owner}/{name}/versions/{id}/trainings`: trains a version into a new one of `destination`."""
    token_owner = owner_with(app, "train")
    intent = create_training(
        body_of(app),
        headers_of(app),
        owner=token_owner,
        reference=training_reference(owner, name, version),
        allow_loopback_webhooks=os.environ["ALLOW_LOOPBACK_WEBHOOKS"] == "true",
    )
    headers: dict[str, str] = {}
    return _answer(intent, _start(intent, headers), headers)


def _create(reference: Reference | None) -> Response[str]:
    token_owner = owner_with(app, "predict")
    headers = headers_of(app)
    seconds = wait_seconds(headers.get("prefer"), WAIT_LIMIT_SECONDS)
    intent = create_intent(
        body_of(app),
        headers,
        owner=token_owner,
        reference=reference,
        allow_loopback_webhooks=os.environ["ALLOW_LOOPBACK_WEBHOOKS"] == "true",
    )
    told: dict[str, str] = {}
    if seconds is None:
        return _answer(intent, _start(intent, told), told)
    allowed = min(seconds, _remaining_seconds() - ANSWER_SECONDS)
    until = _remaining_seconds() - allowed
    prediction = _start(intent, told, allowed)
    if prediction.repeated and not prediction.ended_visibly:
        # Only the request that started it waits, in its place of its owner's limits: repetitions would hold functions
        # outside of every limit. Its client is answered `starting`, and polls.
        return _answer(intent, prediction, told)
    try:
        submissions.wait_for_end(prediction.id, _remaining_seconds() - until)
    except (ClientError, BotoCoreError):
        logger.exception("started, but not waited for")
    return _answer(intent, prediction, {**told, "Preference-Applied": f"wait={seconds}"})


def _remaining_seconds() -> float:
    return remaining_seconds(app.lambda_context)()


def _start(intent: Intent, rate_limit: dict[str, str], wait_seconds: float = 0) -> Prediction:
    context = app.current_event.request_context
    return submissions.start(
        intent,
        attempt=Attempt.of(headers_of(app), context.request_time_epoch),
        wait_seconds=wait_seconds,
        remaining_seconds=_remaining_seconds,
        limits=OwnerLimits.of_context(context.authorizer.raw_event),
        rate_limit=rate_limit,
    )


def _answer(intent: Intent, prediction: Prediction, headers: dict[str, str]) -> Response[str]:
    def read() -> PredictionDetail:
        return own_prediction(submissions.table, prediction.id, intent.owner, intent.object)

    shown = presenter.show_started(prediction, json.loads(intent.input_json), read)
    return json_response(201, shown, {**headers, "Location": shown["urls"]["get"]})


handler = answer_with(app)
