"""The source of the library: its modules by name, for tests that read them."""

from functools import cache
from pathlib import Path

from tests.support.template import ROOT

LIBRARY = ROOT / "layers" / "predictions" / "predictions"
# Packages of operators: no function imports them.
COMMANDS = ("commands", "cli")
# How many modules a reader of the library has to see: one that walks the wrong folder would find nothing wrong.
MODULES_LEAST = 65


@cache
def modules() -> dict[str, Path]:
    """Find every module and package of the library, by its name: `predictions.x.y`.

    Raises:
        AssertionError: The folder holds too few of them to be the library.
    """
    found = {_name(path): path for path in sorted(LIBRARY.rglob("*.py"))}
    assert len(found) >= MODULES_LEAST, f"{LIBRARY} holds {len(found)} modules"
    return found


def of_functions() -> dict[str, Path]:
    """Find the modules that functions may import: all but the command line's.

    Raises:
        AssertionError: The folder holds too few of them to be the library.
    """
    found = {
        name: path
        for name, path in modules().items()
        if not any(name == each or name.startswith(f"{each}.") for each in _COMMAND_MODULES)
    }
    assert len(found) >= MODULES_LEAST - 10, f"functions may import {len(found)} modules"
    return found


_COMMAND_MODULES = ("predictions.__main__", *(f"predictions.{name}" for name in COMMANDS))


def _name(path: Path) -> str:
    parts = path.relative_to(LIBRARY.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
