"""The tests themselves: where they stand, and what they import."""

import ast
from collections.abc import Set as AbstractSet
from functools import cache
from pathlib import Path

from tests.support.library import LIBRARY
from tests.support.template import ROOT

TESTS = ROOT / "tests"
# How many modules a reader of the tests has to see: one that walks the wrong folder would find nothing wrong.
MODULES_LEAST = 170
# Folders of unit tests that are not those of a package: of a function's handler, and of the repository around the code.
NO_PACKAGES = {"functions", "repository"}


@cache
def modules() -> dict[str, set[str]]:
    """Find every module of the tests, with those of the tests that it imports.

    Raises:
        AssertionError: The folder holds too few of them to be the tests.
    """
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(TESTS.rglob("*.py"))}
    assert len(paths) >= MODULES_LEAST, f"{TESTS} holds {len(paths)} modules"
    return {name: imports(path, paths.keys()) for name, path in paths.items()}


def imports(path: Path, there: AbstractSet[str]) -> set[str]:
    """Read which of the modules that are there one imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{each.name}" for each in node.names)}
    return found & there


def test_no_test_module_is_imported() -> None:
    shared = {name for name in modules() if name.rpartition(".")[2].startswith(("test_", "conftest"))}
    assert len(shared) > 100
    assert {name: found & shared for name, found in modules().items() if found & shared} == {}


def test_what_tests_share_imports_nothing_else_of_them() -> None:
    support = {name for name in modules() if name.startswith("tests.support.")}
    assert len(support) > 15
    others = {"tests.reliability"}
    assert {name: modules()[name] - support - others for name in support if modules()[name] - support - others} == {}


def test_what_tests_share_imports_itself_in_no_circle() -> None:
    waiting = {name: set(found) for name, found in modules().items() if name.startswith("tests.support.")}
    while ready := {name for name, found in waiting.items() if not found & waiting.keys()}:
        waiting = {name: found for name, found in waiting.items() if name not in ready}
    assert waiting == {}


def test_unit_tests_stand_in_the_folder_of_their_package() -> None:
    packages = {path.parent.name for path in LIBRARY.glob("*/__init__.py")}
    folders = {path.parent.relative_to(TESTS / "unit").as_posix() for path in (TESTS / "unit").rglob("test_*.py")}
    assert len(folders) > 10
    assert folders - packages - NO_PACKAGES == {"."}
    at_the_top = {path.stem.removeprefix("test_") for path in (TESTS / "unit").glob("test_*.py")}
    assert at_the_top <= {path.stem for path in LIBRARY.glob("*.py")}
