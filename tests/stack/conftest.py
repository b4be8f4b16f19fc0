"""Stack tests run against the deployed template: one local cloud for the whole session, IAM enforced.

Deployed with short times, so that polls, timeouts and deadlines come within seconds. Tests share the stack, so each
one looks at its own predictions only; faults of the stand-in are switched off again after each test.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import httpx
import pytest

from local.replicate.process import LocalReplicate
from tests.stack.secrecy import WatchedCloud, leaks, told
from tests.support.deployment import QUICK

T = TypeVar("T")


LONG = (
    "test_faults.py", "test_stacks.py", "test_conformance.py", "test_upgrades.py", "test_deployed_recipes.py",
    "test_batches.py",
)  # fmt: skip
"""Begun first, each in a process of its own: the shorter ones fill what time is left."""

PATIENCE = 4
"""How many times longer a wait may take than on an idle machine, of which three local clouds leave little. A wait ends
when its condition is true, so that only a failure takes longer for it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def cloud() -> Iterator[WatchedCloud]:
    """The deployed stack; when all tests are over, no secret may be anywhere that any of them has left anything.

    Nor may any function have been refused by AWS, even where it went on without what it wanted.
    """
    with WatchedCloud(parameters=QUICK) as started:
        started.hear_events()
        yield started
        found = leaks(started)
        assert not found, told(found)
        refused = [line for name in started.functions.values() for line in refusals(started, name)]
        assert not refused, "\n".join(refused)


def refusals(cloud: WatchedCloud, function: str) -> list[str]:
    """What a function's log tells of calls that AWS refused for want of permission."""
    pages = cloud.client("logs").get_paginator("filter_log_events").paginate(logGroupName=f"/aws/lambda/{function}")
    return [each["message"][:2000] for page in pages for each in page["events"] if "AccessDenied" in each["message"]]


@pytest.fixture(scope="session")
def boto(cloud: WatchedCloud) -> Callable[[str], Any]:
    """Makes clients of the cloud's AWS services, with all rights."""
    return cloud.client


@pytest.fixture(scope="session")
def api(cloud: WatchedCloud) -> Iterator[Callable[..., httpx.Client]]:
    """Makes HTTP clients of the API that carry an access token of an owner; one of each owner."""
    clients: dict[str, httpx.Client] = {}

    def client(owner: str = "alice") -> httpx.Client:
        if owner not in clients:
            headers = {"Authorization": f"Bearer {cloud.create_token(owner)}"}
            clients[owner] = httpx.Client(
                base_url=cloud.stack.api_url,
                headers=headers,
                timeout=60,
                trust_env=False,
                event_hooks={"response": [cloud.hear]},
            )
        return clients[owner]

    yield client
    for each in clients.values():
        each.close()


@pytest.fixture
def replicate(cloud: WatchedCloud) -> Iterator[LocalReplicate]:
    """The stand-in for Replicate, without faults and with an empty record; what its 429, 401 and 402 held is let go."""
    cloud.replicate.reset()
    yield cloud.replicate
    cloud.look_at_record()
    cloud.replicate.reset()
    held = cloud.client("dynamodb").delete_item(
        TableName=cloud.stack.table_name,
        Key={"pk": {"S": "limiter"}, "sk": {"S": "creates"}},
        ReturnValues="ALL_OLD",
    )
    if {"paused_until", "blocked_until"} & held.get("Attributes", {}).keys():
        time.sleep(1.2)  # functions keep what they have read of it for a second


@pytest.fixture
def quiet(cloud: WatchedCloud, replicate: LocalReplicate) -> None:
    """What other tests have left is over, so that a test can count the functions that run: none does for four seconds.

    Webhooks to receivers that are gone would be sent again for a day: they are dropped.
    """
    # Polls of what is open come every three seconds.
    cloud.client("sqs").purge_queue(QueueUrl=cloud.outputs["DeliveriesQueueUrl"])

    def ran() -> Counter[str]:
        counted = cloud.invocations()
        del counted["sweep_predictions"]
        return counted

    def still() -> bool:
        before = ran()
        time.sleep(4)
        return ran() == before

    _wait_until(still, 60, "functions that no longer run")


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    """Waits for something to become true: see `_wait_until`."""
    return _wait_until


def _wait_until(condition: Callable[[], T], seconds: float = 20, what: str = "") -> T:
    """Ask again and again until the answer is truthy, and return it.

    Args:
        condition: Asked about five times a second.
        seconds: How long at most on an idle machine.
        what: What is waited for, for the message.

    Raises:
        AssertionError: It did not become true in time; the message has the last answer.
    """
    deadline = time.monotonic() + PATIENCE * seconds
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(
                f"not within {PATIENCE * seconds} s: {what or condition.__name__}; last seen: {answer!r}"
            )
        time.sleep(0.2)
    return answer
