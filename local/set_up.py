"""Make the two environments that everything else runs in: ``.venv`` and ``.local/emulator``.

``make setup`` runs this file with whatever ``python3`` there is (3.11 or newer, standard library only). It looks for
Python 3.13, the version that is deployed, and takes its own version where there is none: the local cloud then deploys
its functions with that runtime. Both environments hold exactly what ``uv.lock`` says; uv itself is installed from there
too, by pip, or straight from the address and checksum in the lock on a machine without pip.

Nothing outside the checkout is changed, except the caches and the interpreters of uv and pip. A second run with nothing
changed does nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

OLDEST = (3, 11)
WANTED = "3.13"
CHECKOUT = Path(__file__).resolve().parent.parent
PROJECT = CHECKOUT / ".venv"
EMULATOR = CHECKOUT / ".local" / "emulator"
UV = CHECKOUT / ".local" / "uv"
STAMP = PROJECT / "set-up.json"


class SetUpError(Exception):
    """The machine lacks something; the message says what, and what to do."""


def main() -> int:
    """Bring both environments up to date.

    Returns:
        The exit status: 0 when both are ready.
    """
    if sys.version_info < OLDEST:
        return refuse(f"python3 is {sys.version.split()[0]}; Python 3.11 or newer is needed")
    try:
        with one_at_a_time():
            if not up_to_date():
                make_environments()
    except SetUpError as error:
        return refuse(str(error))
    except subprocess.CalledProcessError as error:
        return refuse(f"this failed: {' '.join(map(str, error.cmd))}")
    return 0


def make_environments() -> None:
    """Install uv, choose a Python and fill both environments from the lock."""
    began = time.monotonic()
    uv = install_uv()
    python, why = choose_python(uv)
    version = capture(python, "-c", "import platform; print(platform.python_version())")
    say(f"Python {version} ({why})")
    groups = {PROJECT: ("the project and its tools",), EMULATOR: ("the AWS emulator", "--only-group", "emulator")}
    for environment, (what, *arguments) in groups.items():
        say(f"installing {what} into {environment.relative_to(CHECKOUT)}")
        sync = [uv, "sync", "--frozen", "--python", python, "--no-python-downloads", "--no-progress", *arguments]
        if environment is EMULATOR:
            # 200,000 lines that every start would compile again where bytecode may not be written later.
            sync.append("--compile-bytecode")
        run(sync, UV_PROJECT_ENVIRONMENT=str(environment))
    STAMP.write_text(json.dumps({"checkout": str(CHECKOUT), "inputs": inputs()}) + "\n")
    say(f"ready in {time.monotonic() - began:.0f} s")


def up_to_date() -> bool:
    """Tell whether the last set-up was made from these same files, in this place, and is still there.

    Environments that were copied or lost their interpreter are removed: their programs name it by its path.
    """
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        stamp = {}
    environments = (PROJECT, EMULATOR)
    there = all((environment / "bin" / "python").exists() for environment in environments)
    if not (there and stamp.get("checkout") == str(CHECKOUT)):
        for environment in environments:
            shutil.rmtree(environment, ignore_errors=True)
        return False
    return bool(stamp["inputs"] == inputs())


def inputs() -> str:
    """Return one hash of everything the environments depend on."""
    files = [CHECKOUT / "pyproject.toml", CHECKOUT / "uv.lock", Path(__file__)]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def choose_python(uv: str) -> tuple[str, str]:
    """Find a Python 3.13, or settle for the one that runs this.

    Being on the PATH is not enough: a pyenv shim is there for versions that are not active, and fails. So every
    candidate is run before it is believed.

    Returns:
        The path of the interpreter, and where it was found.
    """
    for candidate, why in candidates(uv):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            # The base interpreter, so that no environment is made inside another one.
            found = capture(candidate, "-c", "import sys; print(sys.version_info[:2], sys._base_executable)")
            version, _, executable = found.partition(") ")
            if version == f"({WANTED.replace('.', ', ')}":
                return executable, why
    return getattr(sys, "_base_executable", sys.executable), f"no {WANTED} here: functions are deployed with this one"


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
    say(f"no Python {WANTED} on this machine: asking uv for one")
    with contextlib.suppress(subprocess.CalledProcessError):
        # Not reachable everywhere: give up soon, there is another way.
        quick = {"UV_HTTP_RETRIES": "0", "UV_HTTP_CONNECT_TIMEOUT": "5"}
        capture(uv, "python", "install", "--no-bin", WANTED, **quick)
        yield capture(uv, "python", "find", "--no-project", "--managed-python", WANTED), "fetched by uv"


def install_uv() -> str:
    """Install the uv that the lock names into ``.local/uv``.

    Returns:
        The path of the executable.

    Raises:
        SetUpError: Neither pip nor a direct download brought it.
    """
    version, wheels = locked_uv()
    executable = UV / version / "bin" / "uv"
    if executable.exists():
        return str(executable)
    say(f"installing uv {version}")
    UV.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=UV) as name:
        fresh = Path(name) / version
        try:
            requirement = Path(name) / "requirements.txt"
            hashes = " ".join(f"--hash={wheel['hash']}" for wheel in wheels)
            requirement.write_text(f"uv=={version} {hashes}\n")
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            run([*pip, "--only-binary=:all:", "--target", str(fresh), "--requirement", str(requirement)], quiet=True)
        except subprocess.CalledProcessError:
            download_uv(wheels, fresh)
        fresh.replace(UV / version)
    return str(executable)


def locked_uv() -> tuple[str, list[dict[str, str]]]:
    """Return uv's version and wheels (``url``, ``hash``) from the lock."""
    import tomllib

    packages = tomllib.loads((CHECKOUT / "uv.lock").read_text())["package"]
    uv = next(package for package in packages if package["name"] == "uv")
    return uv["version"], uv["wheels"]


def download_uv(wheels: list[dict[str, str]], target: Path) -> None:
    """Fetch the wheel for this machine without pip (Debian's python3 has none) and unpack its executable.

    Raises:
        SetUpError: There is no wheel for this machine, it could not be fetched, or it is not the one in the lock.
    """
    machine = os.uname().machine
    tags = {"Linux": f"-manylinux_2_17_{machine}", "Darwin": f"_{machine}.whl"}
    tag = tags.get(os.uname().sysname, "none")
    wheel = next((wheel for wheel in wheels if tag in wheel["url"]), None)
    if not wheel or not wheel["url"].startswith("https://"):
        raise SetUpError(f"uv could not be installed for {os.uname().sysname} {machine}: install pip and try again")
    try:
        with urllib.request.urlopen(wheel["url"], timeout=60) as answer:  # noqa: S310 - https, checked above
            content = answer.read()
    except OSError as error:
        raise SetUpError(f"uv could not be fetched ({error}): install pip, or look at the network") from error
    if "sha256:" + hashlib.sha256(content).hexdigest() != wheel["hash"]:
        raise SetUpError(f"{wheel['url']} is not the file that uv.lock names")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".data/scripts/uv"))
        (target / "bin").mkdir(parents=True)
        (target / "bin" / "uv").write_bytes(archive.read(member))
        (target / "bin" / "uv").chmod(0o755)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let a second set-up of the same checkout wait for the first."""
    import fcntl

    (CHECKOUT / ".local").mkdir(exist_ok=True)
    with (CHECKOUT / ".local" / "set-up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: list[str], *, quiet: bool = False, **variables: str) -> None:
    """Run a command in the checkout, in the environment of a fresh shell; `quiet` hides what it says."""
    hidden = subprocess.DEVNULL if quiet else None
    subprocess.run(command, cwd=CHECKOUT, env=clean_environment() | variables, check=True, stdout=hidden, stderr=hidden)


def capture(*command: str, **variables: str) -> str:
    """Return what a command prints, without saying why it fails."""
    done = subprocess.run(
        command, cwd=CHECKOUT, env=clean_environment() | variables, check=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return done.stdout.strip()


def clean_environment() -> dict[str, str]:
    """Return the environment without what would send uv or Python to another environment than ours."""
    ours = {"VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH", "UV_PYTHON", "UV_PROJECT_ENVIRONMENT"}
    return {name: value for name, value in os.environ.items() if name not in ours}


def say(text: str) -> None:
    """Show progress."""
    print(f"setup: {text}", file=sys.stderr, flush=True)


def refuse(text: str) -> int:
    """Say why there is no environment; return the exit status."""
    say(text)
    return 1


if __name__ == "__main__":
    sys.exit(main())
