"""The same account, Replicate and clock in process as the unit tests have: what differs is who calls."""

from tests.unit.conftest import (  # noqa: F401 - fixtures
    clock,
    cloud,
    environment,
    executed,
    outputs,
    pipeline_executed,
    replicate,
    submissions,
    table,
    wakes,
)
