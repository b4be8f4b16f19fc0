"""The console: a public, static page. What it shows, it reads from the API with its visitor's access token."""

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from predictions.api.app import answer_with, resolver
from predictions.api.routing import Response
from predictions.aws.clients import api_url
from predictions.errors import Problem

# Instead of the API's own path, which no build knows: the stage, or the base path of a domain name.
_BASE = "/@base"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_ASSETS: Mapping[str, Path] = {path.name: path for path in Path(__file__).with_name("assets").iterdir()}
_PAGE = "index.html"

# Files come from these hosts alone. Nothing of other hosts is loaded, nothing runs but the page's own script, and no
# site can frame it or receive its forms.
_FILES = os.environ["FILE_HOSTS"]
_POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", f"img-src 'self' {_FILES}",
    f"media-src 'self' {_FILES}", f"connect-src 'self' {_FILES}", "base-uri 'none'", "form-action 'none'",
    "frame-ancestors 'none'",
))  # fmt: skip
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}

app = resolver()


@app.route("/console", "GET")
def page() -> Response:
    """`GET /console`: the page. Its address stays the same with each release, so browsers ask each time."""
    return _asset(_PAGE, "no-cache")


@app.route("/console/<name>", "GET")
def asset(name: str) -> Response:
    """`GET /console/{name}`: a file of the page; its name holds a hash of its content, but for the icon's."""
    if name not in _ASSETS or name == _PAGE:
        raise Problem(404, f"The console has no file {name[:100]!r}.")
    return _asset(name, "public, max-age=86400" if name == "icon.svg" else "public, max-age=31536000, immutable")


def _asset(name: str, caching: str) -> Response:
    path = _ASSETS[name]
    text = path.read_text(encoding="utf-8")
    if name == _PAGE:
        text = text.replace(_BASE, urlsplit(api_url()).path)
    return Response(200, f"{_TYPES[path.suffix]}; charset=utf-8", text, {**_HEADERS, "Cache-Control": caching})


handler = answer_with(app)
