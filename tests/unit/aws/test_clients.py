"""The clients of AWS: created once, whoever asks first."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import botocore.session
import pytest
from predictions.aws import clients


def test_threads_that_ask_at_once_share_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    created = 0
    at_once = threading.Barrier(4)
    second = threading.Event()

    class Session(botocore.session.Session):
        def create_client(self, *args: Any, **options: Any) -> Any:
            nonlocal created
            created += 1
            if created > 1:
                second.set()
            second.wait(0.1)  # another thread has its chance to come in
            return super().create_client(*args, **options)

    def ask() -> object:
        at_once.wait()
        return clients.client("s3")

    monkeypatch.setattr(clients, "_session", Session)
    clients._client.cache_clear()
    try:
        with ThreadPoolExecutor(4) as pool:
            found = [asked.result() for asked in [pool.submit(ask) for _ in range(4)]]
    finally:
        clients._client.cache_clear()
    assert len({id(client) for client in found}) == 1
    assert created == 1


@pytest.mark.parametrize(
    ("region", "host"),
    [
        ("us-east-1", "s3.us-east-1.amazonaws.com"),
        ("eu-central-1", "s3.eu-central-1.amazonaws.com"),
        ("eu-south-2", "s3.eu-south-2.amazonaws.com"),  # opened after March 2019
        ("ap-southeast-4", "s3.ap-southeast-4.amazonaws.com"),
        ("us-gov-west-1", "s3.us-gov-west-1.amazonaws.com"),
        ("cn-north-1", "s3.cn-north-1.amazonaws.com.cn"),
    ],
)
def test_presigned_urls_lead_to_the_region_of_the_bucket(
    environment: None, monkeypatch: pytest.MonkeyPatch, region: str, host: str
) -> None:
    monkeypatch.setenv("AWS_REGION", region)
    monkeypatch.setenv("AWS_DEFAULT_REGION", region)
    for operation in ("get_object", "put_object", "head_object"):
        url = urlsplit(
            _fresh("s3", monkeypatch).generate_presigned_url(operation, Params={"Bucket": "b-1", "Key": "a/b"})
        )
        assert (url.scheme, url.netloc, url.path) == ("https", f"b-1.{host}", "/a/b")
        assert f"%2F{region}%2Fs3%2Faws4_request" in url.query


def test_presigned_urls_of_the_emulator_have_the_bucket_in_their_path(
    environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:4566")
    url = urlsplit(
        _fresh("s3", monkeypatch).generate_presigned_url("get_object", Params={"Bucket": "b-1", "Key": "a/b"})
    )
    assert (url.scheme, url.netloc, url.path) == ("http", "127.0.0.1:4566", "/b-1/a/b")


def _fresh(service: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of this process, made from the environment as it is now."""
    monkeypatch.setattr(clients, "_session", botocore.session.get_session)
    clients._client.cache_clear()
    try:
        return clients.client(service)
    finally:
        clients._client.cache_clear()
