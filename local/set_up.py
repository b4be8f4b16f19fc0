"""Create the two environments in which everything else runs: ``.venv`` and ``.local/emulator``.

``make setup`` runs this file with the machine's ``python3`` (3.11 or newer, standard library only). The script looks
for Python 3.13, the deployed version, and falls back to its own version: the local cloud then deploys its functions
with that runtime. Both environments hold exactly the packages of ``requirements/``, by hash. uv, which fills them, is
one of those packages; pip installs it, and a python3 without pip gets a temporary one.

Nothing outside the checkout is changed, except the caches and the interpreters of uv and pip. A second run without
changes does nothing, and needs no network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

OLDEST = (3, 11)
WANTED = "3.13"
CHECKOUT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = {".venv": "dev.txt", ".local/emulator": "emulator.txt"}
# pip's own bootstrap for a machine without it: https://pip.pypa.io/en/stable/installation/#get-pip-py
GET_PIP = "https://bootstrap.pypa.io/get-pip.py"
# Variables that would redirect uv, pip or Python to another place.
MISLEADING = {
    "VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH", "UV_PYTHON", "UV_PROJECT_ENVIRONMENT", "UV_SYSTEM_PYTHON",
    "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV", "PIP_TARGET", "PIP_USER",
}  # fmt: skip


class SetUpError(Exception):
    """The machine lacks a requirement; the message names it and the remedy."""


def main(checkout: Path = CHECKOUT) -> int:
    """Update both environments.

    Returns:
        The exit status: 0 when both are ready.
    """
    if sys.version_info < OLDEST:
        return refuse(f"python3 is {sys.version.split()[0]}; Python 3.11 or newer is needed")
    try:
        with one_at_a_time(checkout):
            if not up_to_date(checkout):
                make_environments(checkout)
    except SetUpError as error:
        return refuse(str(error))
    except subprocess.CalledProcessError as error:
        return refuse(f"this failed: {' '.join(map(str, error.cmd))}")
    return 0


def up_to_date(checkout: Path) -> bool:
    """Return whether the last set-up used these files, here, and still exists."""
    return stamp(checkout).get("inputs") == inputs(checkout) and usable(checkout)


def usable(checkout: Path) -> bool:
    """Return whether both environments were completed here, not copied from elsewhere."""
    interpreters = (checkout / environment / "bin" / "python" for environment in ENVIRONMENTS)
    return stamp(checkout).get("checkout") == str(checkout) and all(python.exists() for python in interpreters)


def stamp(checkout: Path) -> dict[str, str]:
    """Return the record of the last finished set-up; empty without one."""
    try:
        return dict(json.loads((checkout / ".venv" / "set-up.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def finished(checkout: Path) -> None:
    """Record that the environments are complete, for `up_to_date`."""
    text = json.dumps({"checkout": str(checkout), "inputs": inputs(checkout)}) + "\n"
    (checkout / ".venv" / "set-up.json").write_text(text)


def inputs(checkout: Path) -> str:
    """Return one hash of everything the environments depend on."""
    names = ("pyproject.toml", "local/set_up.py", *(f"requirements/{name}" for name in ENVIRONMENTS.values()))
    digests = (hashlib.sha256((checkout / name).read_bytes()).digest() for name in names)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def make_environments(checkout: Path) -> None:
    """Install uv, choose a Python and fill both environments.

    Raises:
        SetUpError: uv could not be installed.
        subprocess.CalledProcessError: uv or pip failed, and printed the reason.
    """
    began = time.monotonic()
    if not usable(checkout):
        for environment in ENVIRONMENTS:
            shutil.rmtree(checkout / environment, ignore_errors=True)
    uv = install_uv(checkout)
    python, why = choose_python(candidates(uv))
    say(f"Python {capture(python, '-c', 'import platform; print(platform.python_version())')} ({why})")
    for environment, requirements in ENVIRONMENTS.items():
        say(f"installing requirements/{requirements} into {environment}")
        interpreter = checkout / environment / "bin" / "python"
        if interpreter.resolve() != Path(python).resolve():
            run([uv, "venv", "--quiet", "--no-project", "--clear", "--python", python, str(checkout / environment)])
        sync = [uv, "pip", "sync", "--quiet", "--require-hashes", "--python", str(interpreter)]
        if environment != ".venv" or sys.dont_write_bytecode:
            # 200,000 lines that every start would compile again if bytecode is not written later: never by the
            # emulator, nor by tests and tools with PYTHONDONTWRITEBYTECODE.
            sync.append("--compile-bytecode")
        run([*sync, str(checkout / "requirements" / requirements)])
    # The project itself, so that `predictions` is imported from the checkout. uv includes the build backend.
    editable = [uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--editable", str(checkout)]
    run([*editable, "--python", str(checkout / ".venv" / "bin" / "python")])
    finished(checkout)
    say(f"ready in {time.monotonic() - began:.0f} s")


def environment_of(requirements: Path, folder: Path) -> Path:
    """Create an environment of a requirements file, checked by hash, if missing.

    For tools beside the first two environments: with the Python and the uv of the one that runs this.

    Raises:
        OSError, subprocess.CalledProcessError: uv is missing, or failed and printed the reason.
    """
    wanted = hashlib.sha256(requirements.read_bytes() + sys.executable.encode()).hexdigest()
    finished = folder / "finished"
    if not finished.exists() or finished.read_text() != wanted:
        uv = str(Path(sys.executable).parent / "uv")
        run(
            [
                uv,
                "venv",
                "--quiet",
                "--no-project",
                "--clear",
                "--python",
                str(Path(sys.executable).resolve()),
                str(folder),
            ]
        )
        interpreter = str(folder / "bin" / "python")
        run([uv, "pip", "install", "--quiet", "--require-hashes", "--python", interpreter, "-r", str(requirements)])
        finished.write_text(wanted)
    return folder


def choose_python(interpreters: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """Return the first of `interpreters` that works and is Python 3.13, or this one.

    Being on the PATH is not sufficient: a pyenv shim exists for versions that are not active, and fails. So every
    candidate is run before it is used.

    Args:
        interpreters: Programs, each with its origin; read one by one, because some are costly to find.

    Returns:
        The path of the interpreter, and its origin.
    """
    for candidate, why in interpreters:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            # The base interpreter, so that no environment is made inside another one.
            found = capture(candidate, "-c", "import sys; print(*sys.version_info[:2], sys._base_executable)")
            major, minor, executable = found.split(" ", 2)
            if f"{major}.{minor}" == WANTED:
                return executable, why
    return this_python(), f"no {WANTED} found: functions are deployed with this one"


def candidates(uv: str) -> Iterator[tuple[str, str]]:
    """Yield interpreters that may be Python 3.13, the cheapest to find first."""
    yield f"python{WANTED}", "on the PATH"
    if pyenv := shutil.which("pyenv"):
        with contextlib.suppress(subprocess.CalledProcessError):
            installed = [v for v in capture(pyenv, "versions", "--bare").split() if v.startswith(f"{WANTED}.")]
            for version in sorted(installed, key=lambda v: [int(n) for n in re.findall(r"\d+", v)], reverse=True):
                yield f"{capture(pyenv, 'prefix', version)}/bin/python", "from pyenv"
    with contextlib.suppress(subprocess.CalledProcessError):
        yield capture(uv, "python", "find", "--no-project", "--no-python-downloads", WANTED), "found by uv"
    say(f"no Python {WANTED} on this machine: fetching one with uv")
    with contextlib.suppress(subprocess.CalledProcessError):
        # Not reachable everywhere: give up soon, the fallback is this Python.
        quick = {"UV_HTTP_RETRIES": "0", "UV_HTTP_CONNECT_TIMEOUT": "5"}
        capture(uv, "python", "install", "--no-bin", WANTED, **quick)
        yield capture(uv, "python", "find", "--no-project", "--managed-python", WANTED), "fetched by uv"


def install_uv(checkout: Path) -> str:
    """Install the uv that ``requirements/dev.txt`` names into ``.local/uv``.

    Returns:
        The path of the executable.

    Raises:
        SetUpError: The file does not pin uv, or pip is missing and could not be fetched.
        subprocess.CalledProcessError: pip failed, and printed the reason.
    """
    version, requirement = pinned((checkout / "requirements" / "dev.txt").read_text(), "uv")
    target = checkout / ".local" / "uv" / version
    executable = target / "bin" / "uv"
    if not executable.exists():
        import tempfile

        say(f"installing uv {version}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as name:
            scratch = Path(name)
            (scratch / "uv.txt").write_text(requirement)
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--require-hashes"]
            source = ["--requirement", str(scratch / "uv.txt"), "--target", str(scratch / "uv")]
            # In a container every user is root.
            run([*find_pip(this_python(), scratch), "install", *options, *source], PIP_ROOT_USER_ACTION="ignore")
            (scratch / "uv").replace(target)
    return str(executable)


def pinned(requirements: str, name: str) -> tuple[str, str]:
    """Return a package's version in a requirements file, and its whole entry.

    Raises:
        SetUpError: The file does not pin the package with a version and hashes.
    """
    entry = re.search(rf"^{name}==(\S+).*(?:\n +--hash.*)+", requirements, re.MULTILINE)
    if not entry:
        raise SetUpError(f"requirements/dev.txt does not pin {name}. Restore the file from git, then run make lock")
    return entry[1], entry[0] + "\n"


def find_pip(python: str, scratch: Path, get_pip: str = GET_PIP) -> list[str]:
    """Return the command that runs pip.

    Debian's and Ubuntu's python3 comes without pip, and without the parts from which ``venv`` installs it.

    Args:
        python: The interpreter that needs it.
        scratch: An empty directory, for a temporary pip.
        get_pip: The address of pip's bootstrap script.

    Raises:
        SetUpError: pip is missing and could not be fetched.
    """
    with contextlib.suppress(subprocess.CalledProcessError):
        capture(python, "-m", "pip", "--version")
        return [python, "-m", "pip"]
    with contextlib.suppress(subprocess.CalledProcessError):
        capture(python, "-m", "venv", str(scratch / "venv"))
        return [str(scratch / "venv" / "bin" / "python"), "-m", "pip"]
    import urllib.request

    script = scratch / "get-pip.py"
    say(f"python3 has no pip: fetching {get_pip}")
    try:
        with urllib.request.urlopen(get_pip, timeout=20) as answer:  # noqa: S310 - the address above, https
            script.write_bytes(answer.read())
        capture(python, str(script), "--target", str(scratch / "lent"))
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetUpError(
            f"python3 ({python}) has no pip, and none could be fetched ({error}).\n"
            "Install pip and retry: apt install python3-pip (or python3-venv), dnf install python3-pip, …"
        ) from error
    return [python, str(scratch / "lent" / "pip")]


def this_python() -> str:
    """Return the interpreter that runs this, or the one its environment was made from."""
    return str(getattr(sys, "_base_executable", "") or sys.executable)


@contextlib.contextmanager
def one_at_a_time(checkout: Path) -> Iterator[None]:
    """Make a second set-up of the same checkout wait for the first."""
    import fcntl

    (checkout / ".local").mkdir(exist_ok=True)
    with (checkout / ".local" / "set-up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: list[str], **variables: str) -> None:
    """Run a command and show its output."""
    subprocess.run(command, env=clean_environment() | variables, stdin=subprocess.DEVNULL, check=True)


def capture(*command: str, **variables: str) -> str:
    """Return the output of a command, without its errors."""
    done = subprocess.run(
        command, env=clean_environment() | variables, stdin=subprocess.DEVNULL, check=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return done.stdout.strip()


def clean_environment() -> dict[str, str]:
    """Return the environment without the `MISLEADING` variables."""
    return {name: value for name, value in os.environ.items() if name not in MISLEADING}


def say(text: str) -> None:
    """Show progress."""
    print(f"setup: {text}", file=sys.stderr, flush=True)


def refuse(text: str) -> int:
    """Print why the set-up failed; return the exit status."""
    say(text)
    return 1


if __name__ == "__main__":
    sys.exit(main())
