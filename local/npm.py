"""Packages of npm: installed into a folder from a lock, checked by hash."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path


def install(folder: Path, package_json: str, lock: Path, *options: str) -> None:
    """Install what a lock holds into a folder; nothing to do if the same lock was installed there.

    Args:
        folder: Replaced, with all that is in it.
        package_json: The text of the `package.json` that the lock was made from.
        lock: A `package-lock.json`, whatever its name.
        options: More options of `npm ci`.

    Raises:
        OSError: There is no npm.
        subprocess.CalledProcessError: npm failed, and printed the reason.
    """
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    # Written last: a folder without it was not finished.
    finished = folder / "finished"
    if finished.exists() and finished.read_text() == digest:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "package.json").write_text(package_json)
    shutil.copy(lock, folder / "package-lock.json")
    run("ci", folder, *options)
    finished.write_text(digest)


def run(command: str, folder: Path, *options: str) -> None:
    """Run a command of npm in a folder, without scripts of packages.

    Raises:
        OSError: There is no npm.
        subprocess.CalledProcessError: npm failed, and printed the reason.
    """
    quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run(["npm", command, *quiet, *options], cwd=folder, stdin=subprocess.DEVNULL, check=True)
