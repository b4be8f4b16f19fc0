"""File routes of the API: upload, list and delete the input files of models."""

from dataclasses import asdict

from predictions.api.app import answer_with, body_of, headers_of, json_response, owner_with, resolver
from predictions.api.pagination import page_body, read_cursor
from predictions.api.routing import Response
from predictions.aws.clients import api_url
from predictions.errors import Problem
from predictions.files.upload_requests import read_form, read_upload
from predictions.files.uploads import Files, place
from predictions.ids import is_id

PAGE_SIZE = 100

app = resolver()
files = Files.from_env()


@app.post("/files")
def create() -> Response:
    """`POST /files`: a form with `content`, and optionally `filename`, `type`, `metadata`; 413 names `/uploads`."""
    owner = owner_with(app, "predict")
    new = read_form(body_of(app), headers_of(app))
    shown = files.store(owner, new).show(api_url())
    return json_response(201, shown, {"Location": f"{api_url()}/files/{new.id}"})


@app.post("/uploads")
def announce() -> Response:
    """`POST /uploads` `{filename, size, type?, metadata?, sha256?}`: the file, and where to PUT its bytes."""
    owner = owner_with(app, "predict")
    file, upload = files.announce(owner, read_upload(body_of(app), headers_of(app).get("content-type")))
    shown = {**file.show(api_url()), "upload": asdict(upload)}
    return json_response(201, shown, {"Location": f"{api_url()}/files/{file.id}"})


@app.get("/files")
def list_() -> Response:
    """`GET /files?cursor=`: up to 100 files, newest first."""
    owner = owner_with(app, "read")
    older, start = read_cursor(app.request.query_value("cursor", ""))
    page, more = files.list(owner, start, older=older, size=PAGE_SIZE)
    first, last = (place(page[0]), place(page[-1])) if page else (None, None)
    results = [file.show(api_url()) for file in page]
    body = page_body("/files", start, results, older=older, first=first, beyond=last if more else None)
    return json_response(200, body)


@app.get("/files/<file_id>")
def get(file_id: str) -> Response:
    """`GET /files/{id}`: 404 also for a file of another owner."""
    owner = owner_with(app, "read")
    file = files.find(owner, file_id) if is_id(file_id) else None
    if file is None:
        raise _not_found(file_id)
    return json_response(200, file.show(api_url()))


@app.delete("/files/<file_id>")
def delete(file_id: str) -> Response:
    """`DELETE /files/{id}`: 204; its link is dead from then on."""
    owner = owner_with(app, "predict")
    if not (is_id(file_id) and files.delete(owner, file_id)):
        raise _not_found(file_id)
    return Response(status_code=204, body="")


def _not_found(file_id: str) -> Problem:
    return Problem(404, f"There is no file {file_id[:64]!r}: it may have expired.")


handler = answer_with(app)
