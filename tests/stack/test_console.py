"""The console as the deployed stack serves it, and what an origin gets of the buckets without a signed URL."""

import re
from collections.abc import Callable

import httpx
import pytest

from local.cloud import OWNER, LocalCloud

ELSEWHERE = {"Origin": "https://elsewhere.example.com"}


def test_console_is_public_and_its_files_are_where_it_says(cloud: LocalCloud) -> None:
    url = cloud.stack.api_url
    page = httpx.get(f"{url}/console", trust_env=False, timeout=60)
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
    files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(files) == 3
    for path in files:
        assert httpx.get(httpx.URL(url).join(path), trust_env=False, timeout=60).status_code == 200
    assert httpx.get(f"{url}/console/app.py", trust_env=False, timeout=60).status_code == 404


def test_page_gives_no_data_without_a_token(cloud: LocalCloud) -> None:
    for path in ("predictions", "batches", "pipelines", "recipes", "usage"):
        assert httpx.get(f"{cloud.stack.api_url}/{path}", trust_env=False, timeout=60).status_code == 401


@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD", "DELETE", "LIST"])
def test_request_of_any_origin_without_a_signature_is_refused_by_the_buckets(cloud: LocalCloud, method: str) -> None:
    for bucket in (cloud.stack.outputs_bucket, cloud.stack.inputs_bucket):
        url = f"{cloud.stack.endpoint_url}/{bucket}" + ("?list-type=2" if method == "LIST" else "/alice/file.png")
        verb = "GET" if method == "LIST" else method
        answer = httpx.request(verb, url, headers=ELSEWHERE, trust_env=False, timeout=60)
        assert answer.status_code == 403, f"{method} {url}: {answer.text[:200]}"


def test_usage_of_a_stack_that_counts_none_is_empty(api: Callable[..., httpx.Client]) -> None:
    shown = api(OWNER).get("/usage").json()
    assert shown["results"] == []
