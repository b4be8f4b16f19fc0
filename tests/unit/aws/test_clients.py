"""The clients of AWS: created once, whoever asks first."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
