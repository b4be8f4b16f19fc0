"""Test the console in a real browser: ``python -m local.console_test``, ``make console-test``.

Playwright drives Debian's Chromium. Both are installed here, since no other command needs them: Playwright into an
environment of its own, ``.local/console-test``; Chromium by apt, if this may, else `CHROMIUM` names one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from local.console import install
from local.set_up import environment_of

CHECKOUT = Path(__file__).resolve().parent.parent
REQUIREMENTS = CHECKOUT / "requirements" / "console.txt"
ENVIRONMENT = CHECKOUT / ".local" / "console-test"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_APT = ["apt-get", "-o", "Dpkg::Use-Pty=0", "-qq", "-y", "--no-install-recommends"]


class NoBrowser(Exception):
    """There is no Chromium, and it could not be installed; the message says what to do."""


def main() -> int:
    """Run the tests; return the exit status."""
    try:
        browser = find_browser()
        python = environment_of(REQUIREMENTS, ENVIRONMENT) / "bin" / "python"
        install()
    except (NoBrowser, OSError, subprocess.CalledProcessError) as error:
        print(f"The console cannot be tested: {error}", file=sys.stderr)
        return 1
    command = [str(python), "-m", "pytest", "tests/console", "-p", "no:cacheprovider", *sys.argv[1:]]
    return subprocess.run(command, cwd=CHECKOUT, env={**os.environ, "CHROMIUM": browser}).returncode


def find_browser() -> str:
    """Return the path of a Chromium; install Debian's if not found.

    Raises:
        NoBrowser: Not found, and this user may not install it.
        subprocess.CalledProcessError: apt failed, and printed the reason.
    """
    if found := os.environ.get("CHROMIUM") or _installed():
        return found
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise NoBrowser("install Chromium (Debian: sudo apt-get install chromium), or name one with CHROMIUM=/path.")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    print("installing chromium", file=sys.stderr, flush=True)
    subprocess.run([*_APT, "update"], check=True, env=environment, stdin=subprocess.DEVNULL)
    subprocess.run([*_APT, "install", "chromium"], check=True, env=environment, stdin=subprocess.DEVNULL)
    if found := _installed():
        return found
    raise NoBrowser("apt-get installed no program of the name chromium. Name one with CHROMIUM=/path.")


def _installed() -> str | None:
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


if __name__ == "__main__":
    sys.exit(main())
