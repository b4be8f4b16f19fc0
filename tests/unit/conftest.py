"""The fixtures that unit tests share."""

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
