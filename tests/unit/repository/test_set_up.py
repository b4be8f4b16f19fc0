"""The set-up's choices: which Python, which pip, whether there is anything to do. Programs are small scripts."""

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from local import lock, set_up

CHECKOUT = Path(__file__).resolve().parents[3]
FAILS = "exit 127"  # a pyenv shim of a version that is not active
IS_313 = "echo 3 13 /found/{}"


def program(path: Path, script: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


class TestChoosePython:
    @pytest.fixture(autouse=True)
    def path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The only folder on the PATH beside those of the shell itself, which have no Python 3.13 and no pyenv."""
        folder = tmp_path / "path"
        tools = tmp_path / "tools"
        tools.mkdir()
        for tool in ("sh", "echo", "test"):
            (tools / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{tools}")
        return folder

    @pytest.fixture
    def pyenv(self, path: Path, tmp_path: Path) -> Path:
        """A pyenv with two versions of 3.13 and one that is none; returns where they are."""
        versions = tmp_path / "versions"
        program(
            path / "pyenv",
            f'if test "$1" = versions; then echo 3.12.9; echo 3.13.9; echo 3.13.10; else echo {versions}/$2; fi',
        )
        for version in ("3.12.9", "3.13.9", "3.13.10"):
            program(versions / version / "bin" / "python", f"echo 3 {version.split('.')[1]} /pyenv/{version}")
        return versions

    def chosen(self, uv: str = "/no/uv") -> tuple[str, str]:
        return set_up.choose_python(set_up.candidates(uv))

    @pytest.mark.parametrize(
        "script",
        [FAILS, "exit 1", "echo 3 12 /found/other", "echo 3 130 /found/other", "echo 3 14 /found/other"],
    )
    def test_program_on_the_path_that_fails_or_is_another_version_is_passed_over(
        self, script: str, path: Path, pyenv: Path
    ) -> None:
        program(path / "python3.13", script)
        assert self.chosen() == ("/pyenv/3.13.10", "from pyenv")

    def test_program_on_the_path_comes_first(self, path: Path, pyenv: Path) -> None:
        program(path / "python3.13", IS_313.format("with a space/python"))
        assert self.chosen() == ("/found/with a space/python", "on the PATH")

    def test_newest_version_of_pyenv_that_works_is_taken(self, pyenv: Path) -> None:
        program(pyenv / "3.13.10" / "bin" / "python", FAILS)
        assert self.chosen() == ("/pyenv/3.13.9", "from pyenv")

    def test_pyenv_that_fails_leaves_it_to_uv(self, path: Path, tmp_path: Path) -> None:
        program(path / "pyenv", FAILS)
        python = program(tmp_path / "python", IS_313.format("uv"))
        assert self.chosen(program(tmp_path / "uv", f"echo {python}")) == ("/found/uv", "found by uv")

    def test_uv_fetches_one_only_when_it_finds_none(self, tmp_path: Path) -> None:
        python = program(tmp_path / "python", IS_313.format("uv"))
        fetched = tmp_path / "fetched"
        uv = program(
            tmp_path / "uv",
            f'if test "$2" = install; then echo > {fetched}; exit; fi; test -e {fetched} && echo {python}',
        )
        assert self.chosen(uv) == ("/found/uv", "fetched by uv")

    def test_without_any_the_one_that_runs_this_is_taken(self, tmp_path: Path) -> None:
        python, why = self.chosen(program(tmp_path / "uv", "exit 2"))
        assert python == set_up.this_python()
        assert "deployed with this one" in why

    def test_inside_an_environment_its_base_is_taken(self) -> None:
        assert Path(set_up.this_python()).exists()
        assert not set_up.this_python().startswith(sys.prefix + os.sep) or sys.prefix == sys.base_prefix


class TestFindPip:
    @pytest.fixture
    def served(self, tmp_path: Path) -> Iterator[tuple[Path, str]]:
        """A folder, and the address of an HTTP server that serves it."""
        folder = tmp_path / "served"
        folder.mkdir()
        with ThreadingHTTPServer(("127.0.0.1", 0), partial(SilentHandler, directory=str(folder))) as server:
            thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
            thread.start()
            yield folder, f"http://127.0.0.1:{server.server_port}/get-pip.py"
            server.shutdown()
            thread.join()

    def test_nothing_that_could_bring_pip_is_an_error_that_names_the_package(
        self, tmp_path: Path, served: tuple[Path, str]
    ) -> None:
        python = program(tmp_path / "python3", "exit 1")
        with pytest.raises(set_up.SetUpError, match=r"404(.|\n)*python3-pip"):
            set_up.find_pip(python, tmp_path, served[1])

    def test_bootstrap_script_that_fails_is_an_error_that_names_the_package(
        self, tmp_path: Path, served: tuple[Path, str]
    ) -> None:
        python = program(tmp_path / "python3", "exit 1")
        (served[0] / "get-pip.py").write_text("")
        with pytest.raises(set_up.SetUpError, match="python3-pip"):
            set_up.find_pip(python, tmp_path, served[1])

    def test_bootstrap_script_lends_pip_where_venv_cannot(self, tmp_path: Path, served: tuple[Path, str]) -> None:
        folder, address = served
        # As Debian's python3: it has the modules `pip` and `venv` as little as it has `ensurepip`.
        python = program(tmp_path / "python3", f'if test "$1" = -m; then exit 1; fi; exec {sys.executable} "$@"')
        (folder / "get-pip.py").write_text(
            "import pathlib, sys\n"
            "pip = pathlib.Path(sys.argv[sys.argv.index('--target') + 1], 'pip')\n"
            "pip.mkdir(parents=True)\n"
            "(pip / '__main__.py').write_text('print(\"lent\")')\n"
        )
        assert set_up.capture(*set_up.find_pip(python, tmp_path, address), "--version") == "lent"

    def test_venv_lends_pip_where_python_has_none(self, tmp_path: Path) -> None:
        lent = tmp_path / "venv" / "bin" / "python"
        python = program(tmp_path / "python3", f'test "$2 $3" = "venv {tmp_path}/venv"')
        assert set_up.find_pip(python, tmp_path, "http://127.0.0.1:9/") == [str(lent), "-m", "pip"]

    def test_python_with_pip_uses_its_own(self, tmp_path: Path) -> None:
        python = program(tmp_path / "python3", 'test "$*" = "-m pip --version"')
        assert set_up.find_pip(python, tmp_path, "http://127.0.0.1:9/") == [python, "-m", "pip"]


class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


class TestUpToDate:
    @pytest.fixture
    def checkout(self, tmp_path: Path) -> Path:
        """A checkout whose set-up has finished."""
        checkout = tmp_path / "checkout"
        for name in ("pyproject.toml", "local/set_up.py", "requirements/dev.txt", "requirements/emulator.txt"):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_text(name)
        for environment in set_up.ENVIRONMENTS:
            program(checkout / environment / "bin" / "python", "")
        set_up.finished(checkout)
        return checkout

    @pytest.mark.parametrize(
        "name", ["pyproject.toml", "local/set_up.py", "requirements/dev.txt", "requirements/emulator.txt"]
    )
    def test_changed_file_is_installed_into_what_is_there(self, name: str, checkout: Path) -> None:
        (checkout / name).write_text("changed")
        assert not set_up.up_to_date(checkout)
        assert set_up.usable(checkout)

    @pytest.mark.parametrize("name", [".venv/bin/python", ".local/emulator/bin/python", ".venv/set-up.json"])
    def test_environment_that_lost_something_is_made_again(self, name: str, checkout: Path) -> None:
        (checkout / name).unlink()
        assert not set_up.up_to_date(checkout)
        assert not set_up.usable(checkout)

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
    def test_stamp_that_cannot_be_read_is_none(self, text: str, checkout: Path) -> None:
        (checkout / ".venv" / "set-up.json").write_text(text)
        assert not set_up.up_to_date(checkout)
        assert not set_up.usable(checkout)

    def test_environment_that_was_copied_is_made_again(self, checkout: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(checkout, tmp_path / "copy")
        assert not set_up.up_to_date(copy)
        assert not set_up.usable(copy)

    def test_nothing_changed_is_nothing_to_do(self, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nowhere")  # no program is asked for anything
        assert set_up.main(checkout) == 0


class TestPinned:
    @pytest.mark.parametrize(
        "text", ["", "uv-build==1\n    --hash=sha256:a\n", "uv==1\n", "uvx==1 \\\n    --hash=sha256:a\n"]
    )
    def test_package_that_is_not_pinned_by_hash_is_refused(self, text: str) -> None:
        with pytest.raises(set_up.SetUpError, match="uv"):
            set_up.pinned(text, "uv")

    def test_entry_ends_where_the_next_begins(self) -> None:
        entry = "uv==1.2 ; sys_platform != 'win32' \\\n    --hash=sha256:a \\\n    --hash=sha256:b\n"
        assert set_up.pinned(f"a==1 \\\n    --hash=sha256:c\n{entry}w==2 \\\n    --hash=sha256:d\n", "uv") == (
            "1.2",
            entry,
        )


class TestLock:
    @pytest.fixture
    def checkout(self, tmp_path: Path) -> Path:
        for name in ("pyproject.toml", lock.DEV, lock.EMULATOR, lock.AUDIT, lock.DOCS, lock.CONSOLE, lock.LAYER):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / name, tmp_path / name)
        return tmp_path

    @pytest.mark.parametrize(
        ("name", "old", "new", "complaint"),
        [
            ("pyproject.toml", '"httpx==', '"httpx>=', "not up to date with pyproject.toml"),
            (lock.EMULATOR, "# Made", "# made", f"{lock.EMULATOR} is not up to date with pyproject.toml"),
            (lock.DOCS, "# Made", "# made", f"{lock.DOCS} is not up to date with pyproject.toml"),
            (lock.LAYER, "httpx==", "httpx==9.", f"{lock.LAYER} does not have the httpx"),
            (lock.DEV, "\nhttpx==", "\nhttpx==9.", f"{lock.LAYER} does not have the httpx"),
            (lock.DEV, "\nanyio==", "\n--index-url https://index.example\nanyio==", f"{lock.DEV} contains an address"),
        ],
    )
    def test_files_that_disagree_are_refused(
        self, name: str, old: str, new: str, complaint: str, checkout: Path
    ) -> None:
        file = checkout / name
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))
        assert any(complaint in found for found in lock.check(checkout))

    def test_files_of_the_project_agree(self, checkout: Path) -> None:
        assert lock.check(checkout) == []

    def test_layer_has_what_the_project_asks_for_and_not_what_the_runtime_brings(self) -> None:
        packages = set(lock.entries(CHECKOUT / lock.LAYER))
        assert {"aws-lambda-powertools", "aws-xray-sdk", "httpx", "pydantic"} <= packages
        assert not packages & {"boto3", "botocore", "urllib3", "python-dateutil", "pytest"}
