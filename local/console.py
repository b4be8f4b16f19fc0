"""Build the console: ``python -m local.console [--check]``, ``make console``.

The files that functions/serve_console ships are checked in, so that a deployment needs no node. A build of the same
sources gives the same files on every machine: ``--check`` builds beside them, and fails if they differ.
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from local.npm import run

CHECKOUT = Path(__file__).resolve().parent.parent
SOURCES = CHECKOUT / "console"
ASSETS = CHECKOUT / "functions" / "serve_console" / "assets"
BUDGET_BYTES = 200_000
"""What all files together may have, compressed."""


def main() -> int:
    """Build or check the files; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m local.console", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only check that the files are those of the sources")
    arguments = parser.parse_args()
    try:
        install()
        if not arguments.check:
            build(ASSETS)
            found = files(ASSETS)
        else:
            with tempfile.TemporaryDirectory() as folder:
                build(Path(folder) / "assets")
                found = files(Path(folder) / "assets")
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"The console could not be built; it needs node 20 and npm ({error})", file=sys.stderr)
        return 1
    complaints = [*differences(files(ASSETS), found), *too_large(found)]
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if not complaints:
        print(f"the console has {len(found)} files, {compressed(found) / 1000:.1f} kB compressed")
    return 1 if complaints else 0


def install() -> None:
    """Install what the lock holds into console/node_modules; nothing to do if it is there.

    Raises:
        OSError: There is no npm.
        subprocess.CalledProcessError: npm failed, and printed the reason.
    """
    installed = SOURCES / "node_modules" / ".package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < (SOURCES / "package-lock.json").stat().st_mtime:
        run("ci", SOURCES)


def build(target: Path) -> None:
    """Build into a folder, which is replaced.

    Raises:
        OSError: There is no npm.
        subprocess.CalledProcessError: A type is wrong, or the build failed, and printed the reason.
    """
    command = ["npm", "run", "--silent", "build", "--", "--outDir", str(target), "--logLevel", "warn"]
    subprocess.run(command, cwd=SOURCES, stdin=subprocess.DEVNULL, check=True)


def files(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def differences(there: Mapping[str, bytes], built: Mapping[str, bytes]) -> list[str]:
    """Return what is wrong with the checked-in files, for people."""
    names = sorted(name for name in there.keys() | built.keys() if there.get(name) != built.get(name))
    return [f"functions/serve_console/assets/{name} is not what console/ gives. Run make console." for name in names]


def too_large(built: Mapping[str, bytes]) -> list[str]:
    """Return a complaint if the files exceed the budget."""
    size = compressed(built)
    return [f"The console has {size} bytes compressed; the limit is {BUDGET_BYTES}."] if size > BUDGET_BYTES else []


def compressed(built: Mapping[str, bytes]) -> int:
    """Return the size of all files, each compressed."""
    return sum(len(gzip.compress(content, mtime=0)) for content in built.values())


if __name__ == "__main__":
    sys.exit(main())
