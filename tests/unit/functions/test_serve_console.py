"""The console's page: what it may load, where its files are, and that nothing else is served."""

import re
from typing import Any

import pytest

from tests.support.apps import Context, load_app, sample


@pytest.fixture
def get(cloud: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Serves a path."""
    app = load_app("serve_console", monkeypatch)

    def get(path: str) -> dict[str, Any]:
        answer: dict[str, Any] = app.handler(sample("serve_console", "page") | {"path": path}, Context())
        return answer

    return get


def test_page_names_files_below_the_path_of_the_api_and_all_of_them_are_served(get: Any) -> None:
    page = get("/console")["body"]
    assert "@base" not in page
    files = re.findall(r'(?:src|href)="/v1(/console/[^"]+)"', page)
    assert {path.rpartition(".")[2] for path in files} == {"js", "css", "svg"}
    for path in files:
        assert get(path)["statusCode"] == 200
    assert 'name="api" content="/v1"' in page


def test_pictures_of_the_style_are_files_too_since_the_policy_allows_no_data(get: Any) -> None:
    (style,) = re.findall(r'href="/v1(/console/[^"]+\.css)"', get("/console")["body"])
    css = get(style)["body"]
    assert "data:" not in css
    pictures = set(re.findall(r"url\(([^)]+)\)", css))
    assert pictures
    for name in pictures:
        assert get(f"/console/{name}")["statusCode"] == 200


def test_policy_allows_scripts_of_the_api_alone_and_files_of_the_buckets(get: Any) -> None:
    headers = get("/console")["multiValueHeaders"]
    (policy,) = headers["Content-Security-Policy"]
    directives = dict(each.split(" ", 1) for each in policy.split("; "))
    hosts = "'self' https://outputs.s3.us-east-1.amazonaws.com https://inputs.s3.us-east-1.amazonaws.com"
    assert directives == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": hosts,
        "media-src": hosts,
        "connect-src": hosts,
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert headers["X-Content-Type-Options"] == ["nosniff"]


def test_page_is_asked_for_each_time_and_its_files_are_kept(get: Any) -> None:
    page = get("/console")
    assert page["multiValueHeaders"]["Cache-Control"] == ["no-cache"]
    (script,) = re.findall(r'src="/v1(/console/[^"]+\.js)"', page["body"])
    assert get(script)["multiValueHeaders"]["Cache-Control"] == ["public, max-age=31536000, immutable"]


@pytest.mark.parametrize("name", ["index.html", "app.py", "..", "%2e%2e%2fapp.py", "../app.py", "/etc/passwd", ""])
def test_no_other_file_is_served(get: Any, name: str) -> None:
    answer = get(f"/console/{name}")
    assert answer["statusCode"] == (404 if name else 200)
    assert "def handler" not in answer["body"]
