"""Write the lock files: ``python -m local.lock [--upgrade | --check]``, ``make lock``.

Six files, each package with its version and hashes, for every platform and Python that the project runs on; the
package index is configured on the machine that installs them. The layer's file holds the project's own dependencies in
the versions of ``dev.txt``, so that the tested versions are the deployed ones.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
DEV = "requirements/dev.txt"
EMULATOR = "requirements/emulator.txt"
AUDIT = "requirements/audit.txt"
DOCS = "requirements/docs.txt"
CONSOLE = "requirements/console.txt"
LAYER = "layers/predictions/requirements.txt"
HEADER = "# Made by `make lock` from pyproject.toml, whose requirements have this digest: {digest}\n"
# The X-Ray SDK requires botocore, which comes with the Lambda runtime and would be three quarters of the layer.
IN_THE_RUNTIME = "botocore\n"


def main() -> int:
    """Write or check the files; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m local.lock", description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows")
    mode.add_argument("--check", action="store_true", help="only check that the files agree, without the network")
    arguments = parser.parse_args()
    if not arguments.check:
        try:
            lock(CHECKOUT, upgrade=arguments.upgrade)
        except subprocess.CalledProcessError:  # uv printed the reason
            return 1
    for complaint in (complaints := check(CHECKOUT)):
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


def lock(checkout: Path, *, upgrade: bool) -> None:
    """Write the six files, keeping their versions unless they are to be upgraded.

    Raises:
        subprocess.CalledProcessError: uv found no compatible versions, and printed the reason.
    """
    header = HEADER.format(digest=digest(checkout))
    sources = {
        DEV: ["pyproject.toml", "--group", "dev"],
        EMULATOR: ["--group", "emulator"],
        AUDIT: ["--group", "audit"],
        DOCS: ["--group", "docs"],
        CONSOLE: ["--group", "console"],
    }
    for name, source in sources.items():
        renew = ["--upgrade"] if upgrade else []
        compiled(checkout, *source, *renew, "--generate-hashes", "--output-file", name)
        (checkout / name).write_text(header + (checkout / name).read_text())
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as excluded:
        excluded.write(IN_THE_RUNTIME)
        excluded.flush()
        layer = compiled(checkout, "pyproject.toml", "--constraint", DEV, "--excludes", excluded.name)
    # The entries of dev.txt are used: an index may have added files since.
    locked = entries(checkout / DEV)
    packages = re.findall(r"^[\w.-]+", layer, re.MULTILINE)
    (checkout / LAYER).write_text(header + "".join(locked[package] for package in packages))


def compiled(checkout: Path, *arguments: str) -> str:
    """Return the packages to which uv resolves some requirements."""
    options = ["--quiet", "--universal", "--python-version", "3.11", "--no-annotate", "--no-header"]
    # The address of the index is private.
    options += ["--no-emit-index-url", "--no-emit-find-links"]
    command = [str(Path(sys.executable).parent / "uv"), "pip", "compile", *arguments, *options]
    return subprocess.run(
        command, cwd=checkout, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, text=True
    ).stdout


def check(checkout: Path) -> list[str]:
    """Return the errors in the files, none if they are as `lock` writes them."""
    header = HEADER.format(digest=digest(checkout))
    found = []
    for name in (DEV, EMULATOR, AUDIT, DOCS, CONSOLE, LAYER):
        text = (checkout / name).read_text()
        if not text.startswith(header):
            found.append(f"{name} is not up to date with pyproject.toml. Run make lock")
        if "://" in text:
            found.append(f"{name} contains an address. Run make lock")
    locked = entries(checkout / DEV)
    for package, entry in entries(checkout / LAYER).items():
        if entry != locked.get(package):
            found.append(f"{LAYER} does not have the {package} of {DEV}. Run make lock")
    return found


def digest(checkout: Path) -> str:
    """Return a digest of all requirements in pyproject.toml."""
    declared = tomllib.loads((checkout / "pyproject.toml").read_text())
    project = declared["project"]
    parts = [project["requires-python"], project["dependencies"], declared["dependency-groups"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def entries(requirements: Path) -> dict[str, str]:
    """Return the entries of a requirements file, with hashes, by package name."""
    found = re.finditer(r"^([\w.-]+)==.*(?:\n +--hash.*)+\n", requirements.read_text(), re.MULTILINE)
    return {entry[1]: entry[0] for entry in found}


if __name__ == "__main__":
    sys.exit(main())
