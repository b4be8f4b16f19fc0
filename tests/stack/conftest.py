"""Stack tests run against the deployed template: one local cloud for the whole session, IAM enforced.

Deployed with short times, so that polls, timeouts and deadlines come within seconds. Tests share the stack, so each
one looks at its own predictions only; faults of the stand-in are switched off again after each test.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import httpx
import pytest

from local.cloud import LocalCloud
from local.replicate.process import LocalReplicate

T = TypeVar("T")

QUICK = {
    "FirstPollSeconds": "5",
    "PollSeconds": "3",
    "SubmitGraceSeconds": "3",
    "LogLevel": "DEBUG",
    "CorsOrigin": "https://app.example.com",
}


@pytest.fixture(scope="session")
def cloud() -> Iterator[LocalCloud]:
    """The deployed stack."""
    with LocalCloud(parameters=QUICK) as started:
        yield started


@pytest.fixture(scope="session")
def boto(cloud: LocalCloud) -> Callable[[str], Any]:
    """Makes clients of the cloud's AWS services, with all rights."""
    return cloud.client


@pytest.fixture(scope="session")
def api(cloud: LocalCloud) -> Iterator[Callable[..., httpx.Client]]:
    """Makes HTTP clients of the API that carry an access token of an owner; one of each owner."""
    clients: dict[str, httpx.Client] = {}

    def client(owner: str = "alice") -> httpx.Client:
        if owner not in clients:
            headers = {"Authorization": f"Bearer {cloud.create_token(owner)}"}
            clients[owner] = httpx.Client(base_url=cloud.stack.api_url, headers=headers, timeout=60, trust_env=False)
        return clients[owner]

    yield client
    for each in clients.values():
        each.close()


@pytest.fixture
def replicate(cloud: LocalCloud) -> Iterator[LocalReplicate]:
    """The stand-in for Replicate, without faults and with an empty record; what its 429, 401 and 402 held is let go."""
    cloud.replicate.reset()
    yield cloud.replicate
    cloud.replicate.reset()
    held = cloud.client("dynamodb").delete_item(
        TableName=cloud.stack.table_name,
        Key={"pk": {"S": "limiter"}, "sk": {"S": "creates"}},
        ReturnValues="ALL_OLD",
    )
    if {"paused_until", "blocked_until"} & held.get("Attributes", {}).keys():
        time.sleep(1.2)  # functions keep what they have read of it for a second


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    """Waits for something to become true: see `_wait_until`."""
    return _wait_until


def _wait_until(condition: Callable[[], T], seconds: float = 20, what: str = "") -> T:
    """Ask again and again until the answer is truthy, and return it.

    Args:
        condition: Asked about five times a second.
        seconds: How long at most.
        what: What is waited for, for the message.

    Raises:
        AssertionError: It did not become true in time; the message has the last answer.
    """
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or condition.__name__}; last seen: {answer!r}")
        time.sleep(0.2)
    return answer
