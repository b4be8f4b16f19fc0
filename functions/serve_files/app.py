"""Download routes: public, since models have no access token; an unguessable link is the proof."""

from predictions.api.app import answer_with, resolver
from predictions.api.routing import Response
from predictions.errors import Problem
from predictions.files.links import Links
from predictions.files.uploads import Files
from predictions.ids import is_id

app = resolver()
files = Files.from_env()
links = Links.from_env()


@app.route("/files/<file_id>/download", "GET", "HEAD")
def download(file_id: str) -> Response:
    """`GET /files/{id}/download?owner=&expiry=&signature=`: 302 to S3; the same 404 for every error."""
    asked = {name: app.request.query_value(name, "") for name in ("owner", "expiry", "signature")}
    complete = is_id(file_id) and all(asked.values())
    return _redirect(files.download_url(file_id, **asked, for_head=_is_head()) if complete else None)


@app.route("/objects/<bucket>/<name>", "GET", "HEAD")
def open_object(bucket: str, name: str) -> Response:  # noqa: ARG001  # the name is for readers of the URL
    """`GET /objects/{bucket}/{name}?key=&expires=&signature=`, and `version_id`: as above."""
    query = app.request.query_value
    asked = {name: query(name, "") for name in ("key", "expires", "signature")}
    return _redirect(links.open(bucket, version_id=query("version_id"), **asked, for_head=_is_head()))


def _is_head() -> bool:
    return app.request.http_method == "HEAD"


def _redirect(url: str | None) -> Response:
    if url is None:
        raise Problem(404, "There is no such file, or this is not its link: it may have expired.")
    return Response(status_code=302, body="", headers={"Location": url, "Cache-Control": "no-store"})


handler = answer_with(app)
