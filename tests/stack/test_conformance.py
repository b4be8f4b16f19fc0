"""The official clients, unmodified, on the deployed stack: every flow of each, and the table in docs/conformance.md."""

import functools
import json
from collections.abc import Callable

import pytest

from local.cloud import LocalCloud
from tests.conformance.clients import CHECKOUT, CLIENTS, HERE, OPERATIONS, PAGE, Told, column

Run = Callable[[str], dict[str, Told]]


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


@pytest.mark.parametrize("flow", OPERATIONS)
@pytest.mark.parametrize("name", CLIENTS)
def test_flow_of_an_official_client_goes_well(run: Run, name: str, flow: str) -> None:
    told = run(name)
    assert told[flow].ok, told[flow].detail


@pytest.mark.parametrize("name", CLIENTS)
def test_table_shows_what_ran(run: Run, name: str) -> None:
    told = run(name)
    assert told.keys() == OPERATIONS.keys()
    shown = column(PAGE.read_text(), CLIENTS[name])
    ran = {operation: told[flow].cell for flow, operation in OPERATIONS.items()}
    assert shown == ran, "run make conformance"


def test_javascript_client_is_locked_by_hash_and_from_no_certain_registry() -> None:
    packages = json.loads((HERE / "package-lock.json").read_text())["packages"]
    installed = {path: package for path, package in packages.items() if path}
    assert CLIENTS["javascript"].title.endswith(f" {installed['node_modules/replicate']['version']}")
    assert all(package["integrity"].startswith("sha512-") for package in installed.values())
    assert not any("resolved" in package for package in installed.values())


@pytest.mark.parametrize(("name", "requirements"), [("python1", "dev.txt"), ("python2", "python2-client.txt")])
def test_python_client_is_the_one_that_is_locked(name: str, requirements: str) -> None:
    locked = (CHECKOUT / "requirements" / requirements).read_text()
    version = CLIENTS[name].title.rpartition(" ")[2]
    assert f"\nreplicate=={version} " in locked
