"""The fixtures that unit tests share."""

import gc
from collections.abc import Iterator

import pytest

from tests.support import strict_parameters
from tests.support.fixtures import (
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

__all__ = [
    "clock",
    "cloud",
    "environment",
    "executed",
    "outputs",
    "pipeline_executed",
    "replicate",
    "submissions",
    "table",
    "table_service",
    "wakes",
]

strict_parameters.install()


@pytest.fixture(autouse=True)
def no_call_that_aws_refuses() -> Iterator[None]:
    """Fail a test in which a call was refused, also if the code caught the error and went on."""
    strict_parameters.refused.clear()
    yield
    assert strict_parameters.refused == []


def pytest_collection_finish() -> None:
    """Leave what was imported out of the garbage collector's searches: looking through it takes a sixth of the time."""
    gc.collect()
    gc.freeze()
