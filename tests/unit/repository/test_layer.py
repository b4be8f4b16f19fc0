"""The layer as its Makefile builds it, without what it installs, and what it installs by its requirements."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from local import lock
from tests.support.template import ROOT

SOURCE = ROOT / "layers/predictions"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package in a layer that is built by `make build-PredictionsLayer`, with a uv that installs nothing."""
    folder = tmp_path_factory.mktemp("layer")
    uv = folder / "bin" / "uv"
    uv.parent.mkdir()
    # uv pip install … --target FOLDER …
    uv.write_text('#!/bin/sh\nwhile test "$1" != --target; do shift; done\nmkdir -p "$2/bin"\n')
    uv.chmod(0o755)
    source = folder / "source"
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(  # noqa: S603  # our own Makefile
        ["make", "--silent", "build-PredictionsLayer", f"ARTIFACTS_DIR={folder / 'artifacts'}",  # noqa: S607
         f"PYTHON_RUNTIME={sys.executable}", "LAYER_PLATFORMS=host"],
        cwd=source,
        env={**os.environ, "PATH": f"{uv.parent}{os.pathsep}{os.environ['PATH']}"},
        check=True,
    )  # fmt: skip
    return folder / "artifacts" / "python" / "predictions"


def test_layer_ships_the_package_without_its_command_line(built: Path) -> None:
    shipped = {str(path.relative_to(built)) for path in built.rglob("*.py")}
    here = SOURCE / "predictions"
    wanted = {str(path.relative_to(here)) for path in here.rglob("*.py")}
    left_out = {path for path in wanted if path == "__main__.py" or path.startswith("cli/")}
    assert "cli/__main__.py" in left_out
    assert shipped == wanted - left_out
    assert len(shipped) > 50
    assert not [path for path in built.rglob("*") if path.name == "cli"]


def test_layer_ships_the_document_as_json_alone(built: Path) -> None:
    (document,) = built.rglob("openapi.*")
    assert document.read_bytes() == (SOURCE / document.relative_to(built.parent)).read_bytes()
    assert document.name == "openapi.json"


def test_nothing_that_the_layer_ships_imports_the_command_line_or_what_it_needs(built: Path) -> None:
    sources = [path.read_text() for path in built.rglob("*.py")]
    assert sources
    for name in ("predictions.cli", "typer"):
        assert not [text for text in sources if f"import {name}" in text or f"from {name}" in text], name


def test_what_the_command_line_needs_is_no_dependency_of_the_layer() -> None:
    packages = lock.entries(ROOT / lock.LAYER).keys()
    assert not packages & {"typer", "click", "rich", "shellingham", "annotated-doc"}
    assert "typer" in lock.entries(ROOT / lock.DEV)
