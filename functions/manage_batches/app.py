"""Batch routes of the API: create, read, list, cancel and retry batches."""

from typing import Any

from predictions.admission.quotas import OwnerLimits
from predictions.api.app import answer_with, body_of, headers_of, json_response, owner_with, resolver
from predictions.api.pagination import page_body, read_cursor
from predictions.api.routing import Response
from predictions.aws.clients import api_url
from predictions.batches.manage import BatchControl
from predictions.batches.store import Batch
from predictions.batches.view import show_batch, show_changed_batch
from predictions.intents.model import Attempt
from predictions.lifecycle.cancel import CancelPrediction
from predictions.lifecycle.model_lookup import ModelLookup
from predictions.observability import remaining_seconds
from predictions.store.schemas import StoredSchemas
from predictions.upstream.client import Replicate
from predictions.views.prediction import Presenter

PAGE_SIZE = 25

# API Gateway ends a request after 29 s: the sweep cancels the lines that are left then.
ANSWER_SECONDS = 9

app = resolver()
control = BatchControl.from_env(ModelLookup.from_env(StoredSchemas.from_env(), Replicate.from_env()))
canceling = CancelPrediction.from_env()
presenter = Presenter.from_env()


@app.post("/batches")
def make() -> Response:
    """`POST /batches`: 201 with the batch, also if the same key created it before."""
    owner, headers = owner_with(app, "predict"), headers_of(app)
    attempt = Attempt.of(headers, app.request.request_time_epoch)
    batch = control.make(body_of(app), headers, owner, attempt=attempt, limits=_limits())
    return json_response(201, _changed(batch), {"Location": f"{api_url()}/batches/{batch.id}"})


@app.get("/batches")
def list_() -> Response:
    """`GET /batches?cursor=`: up to 25 batches, newest first."""
    owner = owner_with(app, "read")
    older, start = read_cursor(app.request.query_value("cursor", ""))
    page, more = control.page(owner, start, older=older, size=PAGE_SIZE)
    first, last = (page[0].listed_at, page[-1].listed_at) if page else (None, None)
    results = [_show(batch) for batch in page]
    body = page_body("/batches", start, results, older=older, first=first, beyond=last if more else None)
    return json_response(200, body)


@app.get("/batches/<batch_id>")
def get(batch_id: str) -> Response:
    """`GET /batches/{id}`: 404 also for a batch of another owner."""
    return json_response(200, _show(control.own(batch_id, owner_with(app, "read"))))


@app.post("/batches/<batch_id>/cancel")
def cancel(batch_id: str) -> Response:
    """`POST /batches/{id}/cancel`: 200 with the batch as it is then; a completed one stays unchanged."""
    batch = control.own(batch_id, owner_with(app, "predict"))
    return json_response(200, _changed(control.halt(batch, canceling, _remaining_seconds)))


@app.post("/batches/<batch_id>/retry")
def retry(batch_id: str) -> Response:
    """`POST /batches/{id}/retry`: run the failed and canceled lines again; 409 before completion."""
    batch = control.own(batch_id, owner_with(app, "predict"))
    attempt = Attempt.of(headers_of(app), app.request.request_time_epoch)
    repeated = attempt is not None and attempt.number > 0
    return json_response(200, _changed(control.again(batch, limits=_limits(), repeated=repeated)))


def _limits() -> OwnerLimits:
    return OwnerLimits.of_context(app.request.owner_context)


def _remaining_seconds() -> float:
    return remaining_seconds(app.request.context)() - ANSWER_SECONDS


def _changed(batch: Batch) -> dict[str, Any]:
    return show_changed_batch(batch, control, presenter)


def _show(batch: Batch) -> dict[str, Any]:
    return show_batch(batch, control, presenter)


handler = answer_with(app)
