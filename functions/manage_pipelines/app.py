"""Pipeline routes of the API: create, read, list and cancel pipelines."""

from predictions.admission.quotas import OwnerLimits
from predictions.api.app import answer_with, body_of, headers_of, json_response, owner_with, resolver
from predictions.api.pagination import page_body, read_cursor
from predictions.api.routing import Response
from predictions.intents.model import Attempt
from predictions.pipelines.manage import PipelineApi

PAGE_SIZE = 100

app = resolver()
pipelines = PipelineApi.from_env()


@app.post("/pipelines")
def create() -> Response:
    """`POST /pipelines`: 201 with the pipeline; 422 with every error in its steps."""
    owner, headers = owner_with(app, "predict"), headers_of(app)
    request = app.request
    shown = pipelines.create_pipeline(
        owner,
        body_of(app),
        headers,
        attempt=Attempt.of(headers, request.request_time_epoch),
        limits=OwnerLimits.of_context(request.owner_context),
    )
    return json_response(201, shown, {"Location": shown["urls"]["get"]})


@app.get("/pipelines/<pipeline_id>")
def get(pipeline_id: str) -> Response:
    """`GET /pipelines/{id}`: 404 also for a pipeline of another owner."""
    owner = owner_with(app, "read")
    return json_response(200, pipelines.view.show(pipelines.own_pipeline(pipeline_id, owner)))


@app.get("/pipelines")
def list_() -> Response:
    """`GET /pipelines?cursor=`: up to 100 pipelines without their steps, newest first."""
    owner = owner_with(app, "read")
    older, start = read_cursor(app.request.query_value("cursor", ""))
    results, first, beyond = pipelines.list_pipelines(owner, start, older=older, size=PAGE_SIZE)
    return json_response(200, page_body("/pipelines", start, results, older=older, first=first, beyond=beyond))


@app.post("/pipelines/<pipeline_id>/cancel")
def cancel(pipeline_id: str) -> Response:
    """`POST /pipelines/{id}/cancel`: 200 with the pipeline as it is then; it ends after its predictions."""
    owner = owner_with(app, "predict")
    return json_response(200, pipelines.cancel_pipeline(pipeline_id, owner))


handler = answer_with(app)
