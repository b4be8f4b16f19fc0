"""Modules outside of packages."""

import importlib.util
from pathlib import Path
from typing import Any


def load_module(path: Path) -> Any:
    """A file as a module of its own, executed anew."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
