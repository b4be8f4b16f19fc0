"""The clients, unmodified, on the deployed stack: every flow of each, and the tables in docs/conformance.md."""

import functools
from collections.abc import Callable

import pytest

from local.cloud import LocalCloud
from tests.conformance.suite import (
    CLIENTS,
    NOT_OF_THE_OFFICIAL,
    NOT_OFFERED,
    PAGE,
    Told,
    column,
    has_live_reads,
    operations,
)

Run = Callable[[str], dict[str, Told]]
# The clients of others take their own time to install: `make slow` runs them.
NAMES = [pytest.param(name, marks=() if CLIENTS[name].official else pytest.mark.slow) for name in CLIENTS]


@pytest.fixture(scope="module")
def run(cloud: LocalCloud) -> Run:
    """Runs all flows of a client, once."""
    cloud.replicate.reset()

    @functools.cache
    def run(name: str) -> dict[str, Told]:
        if CLIENTS[name].lacks:
            pytest.skip(CLIENTS[name].lacks)
        return CLIENTS[name].run(cloud)

    return run


@pytest.mark.parametrize("flow", [flow for flow in operations() if flow not in NOT_OF_THE_OFFICIAL])
@pytest.mark.parametrize("name", [name for name, client in CLIENTS.items() if client.official])
def test_flow_of_an_official_client_goes_well(run: Run, name: str, flow: str) -> None:
    told = run(name)
    assert told[flow].ok, told[flow].detail


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, client in CLIENTS.items() if not client.official])
def test_flows_of_another_client_go_well(run: Run, name: str) -> None:
    told = run(name)
    assert told
    assert {flow: each.detail for flow, each in told.items() if not each.ok} == {}
    assert told.keys() <= operations().keys()


@pytest.mark.parametrize("name", NAMES)
def test_table_shows_what_ran(run: Run, name: str) -> None:
    told = run(name)
    if CLIENTS[name].official:
        assert told.keys() == operations().keys() - NOT_OF_THE_OFFICIAL
    shown = column(PAGE.read_text(), CLIENTS[name])
    ran = {operations()[flow]: each.cell for flow, each in told.items() if each.cell != NOT_OFFERED}
    assert shown == ran, "run make conformance"


@pytest.mark.parametrize("name", NAMES)
def test_growth_is_asserted_exactly_where_reads_are_live(run: Run, name: str) -> None:
    live = {flow for flow in run(name) if flow.startswith("live_")}
    assert bool(live) is (has_live_reads() and "live_" in CLIENTS[name].path.read_text())
