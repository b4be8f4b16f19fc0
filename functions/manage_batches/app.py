"""Batch routes of the API: owners make, look at, list, cancel and retry batches."""

from typing import Any

from aws_lambda_powertools.event_handler import Response
from predictions.admission.quotas import OwnerLimits
from predictions.api.app import answer_with, body_of, headers_of, json_response, owner_with, resolver
from predictions.api.pagination import page_body, read_cursor
from predictions.aws.clients import api_url
from predictions.batches.manage import BatchControl
from predictions.batches.store import Batch
from predictions.intents.model import Attempt
from predictions.lifecycle.submissions import Submissions
from predictions.observability import MetricUnit, logger, metrics, remaining_seconds
from predictions.views.prediction import Presenter

PAGE_SIZE = 25

# API Gateway ends a request after 29 s: what is left to be canceled then is the sweep's.
ANSWER_SECONDS = 9

app = resolver()
control = BatchControl.from_env()
submissions = Submissions.from_env()
presenter = Presenter.from_env()


@app.post("/batches")
def make() -> Response[str]:
    """`POST /batches`: 201 with the batch, also when the same key made it before."""
    owner, headers = owner_with(app, "predict"), headers_of(app)
    attempt = Attempt.of(headers, app.current_event.request_context.request_time_epoch)
    batch = control.make(body_of(app), headers, owner, attempt=attempt, limits=_limits())
    return json_response(201, _show_changed(batch), {"Location": f"{api_url()}/batches/{batch.id}"})


@app.get("/batches")
def list_() -> Response[str]:
    """`GET /batches?cursor=`: up to 25 batches, newest first."""
    owner = owner_with(app, "read")
    older, start = read_cursor(app.current_event.get_query_string_value("cursor", ""))
    page, more = control.batches.page(owner, start, older=older, size=PAGE_SIZE)
    first, last = (page[0].listed_at, page[-1].listed_at) if page else (None, None)
    results = [_show(batch) for batch in page]
    body = page_body("/batches", start, results, older=older, first=first, beyond=last if more else None)
    return json_response(200, body)


@app.get("/batches/<batch_id>")
def get(batch_id: str) -> Response[str]:
    """`GET /batches/{id}`: 404 also for another owner's."""
    return json_response(200, _show(control.own(batch_id, owner_with(app, "read"))))


@app.post("/batches/<batch_id>/cancel")
def cancel(batch_id: str) -> Response[str]:
    """`POST /batches/{id}/cancel`: 200 with the batch as it is then; one that has ended stays as it is."""
    batch = control.own(batch_id, owner_with(app, "predict"))
    return json_response(200, _show_changed(control.halt(batch, submissions, _remaining_seconds)))


@app.post("/batches/<batch_id>/retry")
def retry(batch_id: str) -> Response[str]:
    """`POST /batches/{id}/retry`: runs the lines anew that failed or were canceled; 409 before the end."""
    batch = control.own(batch_id, owner_with(app, "predict"))
    attempt = Attempt.of(headers_of(app), app.current_event.request_context.request_time_epoch)
    repeated = attempt is not None and attempt.number > 0
    return json_response(200, _show_changed(control.again(batch, limits=_limits(), repeated=repeated)))


def _limits() -> OwnerLimits:
    return OwnerLimits.of_context(app.current_event.request_context.authorizer.raw_event)


def _remaining_seconds() -> float:
    return remaining_seconds(app.lambda_context)() - ANSWER_SECONDS


def _show_changed(batch: Batch) -> dict[str, Any]:
    """A batch that a call has just made or changed, whatever fails while it is shown."""
    try:
        return _show(batch)
    except Exception:  # noqa: BLE001  # whatever it is, the caller must not take it for "nothing was done"
        logger.exception("done, but not shown", batch_id=batch.id)
        metrics.add_metric(name="AnswersWithoutOutput", unit=MetricUnit.Count, value=1)
        return _show(batch, ask=False)


def _show(batch: Batch, *, ask: bool = True) -> dict[str, Any]:
    url = f"{api_url()}/batches/{batch.id}"
    results = None
    if batch.results_key and ask:
        uri = f"s3://{control.batches.bucket_name}/{batch.results_key}"
        results = {"uri": uri, "url": presenter.link(batch.results_key)}
    return {
        "id": batch.id,
        "status": batch.status,
        "recipe": batch.recipe,
        "manifest": batch.manifest_uri(control.batches.bucket_name),
        "total": batch.total,
        "counts": control.counts(batch, ask=ask),
        "attempt": batch.attempt,
        "max_concurrency": batch.max_concurrency,
        "tolerated_failure_percentage": batch.tolerated_failure_percentage,
        "cancel_requested": batch.stop == "canceled",
        "error": batch.error,
        "results": results,
        "created_at": batch.created_at,
        "completed_at": batch.completed_at,
        "urls": {"get": url, "cancel": f"{url}/cancel", "retry": f"{url}/retry"},
    }


handler = answer_with(app)
