"""The same account, Replicate and clock in process as the unit tests have: what differs is who calls."""

from collections.abc import Iterator

import pytest

from tests.attacks.stack import Stack, quick_stack
from tests.support.fixtures import (  # noqa: F401 - fixtures
    clock,
    cloud,
    environment,
    executed,
    outputs,
    pipeline_executed,
    replicate,
    submissions,
    table,
    table_service,
    wakes,
)


@pytest.fixture
def stack(environment: None) -> Iterator[Stack]:  # noqa: F811 - the fixture
    """The whole stack, quick: for attacks in great numbers."""
    with quick_stack() as stack:
        yield stack
