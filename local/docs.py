"""Build the site of docs/ into .local/site: ``python -m local.docs``, ``make docs``.

The build is strict: a broken link or anchor, or a page that is missing from the navigation, fails it. mkdocs has
an environment of its own, ``.local/docs``, filled from requirements/docs.txt, checked by hash.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from local.set_up import environment_of

CHECKOUT = Path(__file__).resolve().parent.parent
REQUIREMENTS = CHECKOUT / "requirements" / "docs.txt"
ENVIRONMENT = CHECKOUT / ".local" / "docs"
# With --quiet, warnings are neither shown nor counted, and a strict build passes despite them.
BUILD = ("build", "--strict")


def main() -> int:
    """Build the site; return the exit status."""
    try:
        tools = environment_of(REQUIREMENTS, ENVIRONMENT) / "bin"
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{REQUIREMENTS.name} could not be installed, see above ({error})", file=sys.stderr)
        return 1
    environment = dict(os.environ)
    if "REPOSITORY_URL" not in environment and (url := repository_url(origin())):
        environment["REPOSITORY_URL"] = url
    # The theme advertises its successor on each build.
    environment["NO_MKDOCS_2_WARNING"] = "1"
    command = [str(tools / "mkdocs"), *BUILD]
    done = subprocess.run(command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, env=environment)
    if done.returncode == 0:
        print("the site is in .local/site")
    return done.returncode


def origin() -> str:
    """Return the address of the git remote `origin`, empty if there is no such remote."""
    command = ["git", "-C", str(CHECKOUT), "remote", "get-url", "origin"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout.strip()


def repository_url(remote: str) -> str:
    """Return the web address of a git remote, without credentials, or empty."""
    found = re.fullmatch(r"(?:https://(?:[^@/]+@)?|ssh://git@|git@)([\w.-]+)[:/](.+?)(?:\.git)?/?", remote)
    return f"https://{found[1]}/{found[2]}" if found else ""


if __name__ == "__main__":
    sys.exit(main())
