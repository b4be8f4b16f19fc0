"""Links to objects on the deployed stack: a model opens them, and nobody opens any other."""

import io
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import pytest
from PIL import Image
from predictions.aws import clients
from predictions.files.links import Links

from local.cloud import LocalCloud

Api = Callable[..., httpx.Client]


@pytest.fixture
def link(cloud: LocalCloud, boto: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Makes links as the stack's functions do, with the stack's own secret."""
    secret = boto("secretsmanager").get_secret_value(SecretId=cloud.resources["LinkSecret"])["SecretString"]
    monkeypatch.setattr(clients, "_api_url", (time.monotonic() + 600, cloud.stack.api_url))

    def link(bucket: str, key: str, expires: int | None = None) -> str:
        links = Links({"inputs": cloud.stack.inputs_bucket, "outputs": cloud.stack.outputs_bucket}, "")
        monkeypatch.setattr(links._secret, "current_value", lambda: secret)
        return links.url(bucket, key, expires=expires or int(time.time()) + 600)

    return link


@pytest.fixture
def picture(cloud: LocalCloud, boto: Callable[[str], Any]) -> bytes:
    drawn = io.BytesIO()
    Image.effect_noise((96, 64), 80).convert("RGB").save(drawn, "PNG")
    boto("s3").put_object(
        Bucket=cloud.stack.inputs_bucket, Key="links/a fox.png", Body=drawn.getvalue(), ContentType="image/png"
    )
    return drawn.getvalue()


def fetched(url: str) -> httpx.Response:
    return httpx.get(url, follow_redirects=True, timeout=30, trust_env=False)


def test_a_link_that_is_forged_or_expired_opens_nothing(link: Callable[..., str], picture: bytes) -> None:
    good = httpx.URL(link("inputs", "links/a fox.png"))
    wrong = [
        good.copy_set_param("key", "files/alice/x"),
        good.copy_set_param("expires", "9999999999"),
        good.copy_set_param("signature", "0" * 64),
        good.copy_set_param("version_id", "null"),
        good.copy_remove_param("signature"),
        good.copy_with(path=good.path.replace("/inputs/", "/outputs/")),
        good.copy_with(path=good.path.replace("/inputs/", "/elsewhere/")),
        httpx.URL(link("inputs", "links/a fox.png", expires=int(time.time()) - 1)),
    ]
    for url in wrong:
        answer = fetched(str(url))
        assert (answer.status_code, answer.json()["status"]) == (404, 404)
    assert fetched(str(good)).content == picture


def test_a_link_is_the_input_of_a_model(
    link: Callable[..., str], picture: bytes, api: Api, wait_until: Callable[..., Any]
) -> None:
    url = link("inputs", "links/a fox.png")
    assert "X-Amz-Signature" not in dict(parse_qsl(urlsplit(url).query))
    body = {"version": "local/etcher", "input": {"image": url, "style": "mosaic"}}
    created = api("alice").post("/predictions", json=body).json()["id"]

    def ended() -> Any:
        found = api("alice").get(f"/predictions/{created}").json()
        return found if found["status"] in ("succeeded", "failed", "canceled") else None

    shown = wait_until(ended, 20, "its end")
    assert shown["status"] == "succeeded", shown
    with Image.open(io.BytesIO(fetched(shown["output"]).content)) as opened:
        assert opened.size == (96, 64)
