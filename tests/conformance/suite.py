"""The clients whose real flows run against the deployed stack, and the page made of what they tell.

A client is one file of `clients/`, in its own language. Its header is a comment in TOML, between `/// client` and
`///`: `title`, `packages` with their exact versions (the page names the first one), and `official` for Replicate's own
libraries. The rest of the file is a program with one flow for each of `OPERATIONS` that the client has. It prints a
line of JSON for each: ``{"flow", "ok", "detail"}``, where `detail` is why a flow failed, or in what a client differs.

Lines between `docs:point` and `docs:end` point a client at a stack, those after `docs:key` send an idempotency key:
docs/clients.md shows them as they ran. The hashes of a client's packages are in `locks/`, written where they are
missing or of other versions; the packages are installed into ``.local/conformance``.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from local import npm
from local.cloud import CHECKOUT, LocalCloud
from local.lock import compiled
from local.set_up import environment_of

HERE = Path(__file__).resolve().parent
PAGE = CHECKOUT / "docs" / "conformance.md"
SECONDS = 600  # for all flows of one client; the official ones take about 60
WORKS = "✓"
NOT_OFFERED = "–"  # noqa: RUF001 - what the page shows
# Flows that need what a read shows of a running prediction: only where the template has this parameter.
LIVE, LIVE_PARAMETER = "live_", "LiveReadSeconds"
HEADER = re.compile(r"^(?:#|//) /// client\n(.*?)^(?:#|//) ///$", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"^[ ]*(?:#|//) docs:(point|key)\n(.*?)^[ ]*(?:#|//) docs:end$", re.MULTILINE | re.DOTALL)

OPERATIONS = {
    "run_file": "run: a file",
    "run_text": "run: text",
    "run_list": "run: a list of files",
    "run_nested": "run: files within an object",
    "run_by_version": "run `owner/name:version`",
    "run_polling": "run, polling instead of `Prefer: wait`",
    "run_longer_than_wait": "run of a model that takes longer than the wait",
    "run_failed": "run of a model that fails",
    "run_aborted": "run, given up by the caller",
    "run_file_object": "run: a file object in the input",
    "file_as_input": "run: an uploaded file in the input",
    "progress": "progress of a run",
    "live_logs": "logs grow while the model runs",
    "live_progress": "progress while the model runs",
    "live_output": "output grows while the model runs",
    "stream": "stream",
    "stream_link": "stream: the link `urls.stream`",
    "stream_token": "stream: what it tells Replicate's host",
    "idempotency_key": "`Idempotency-Key`: two requests, one prediction",
    "no_output_yet": "a prediction that has no output yet",
    "create_by_model": "predictions: create by model",
    "create_by_owner_and_name": "predictions: create with `version` `owner/name`",
    "create_by_version_id": "predictions: create by version id",
    "create_and_wait": "predictions: create and wait",
    "create_without_waiting": "predictions: create without waiting",
    "predictions_get": "predictions: get",
    "predictions_list": "predictions: list",
    "predictions_paginate": "predictions: all pages",
    "predictions_cancel": "predictions: cancel",
    "models_get": "models: get",
    "models_list": "models: list, all pages",
    "models_search": "models: search",
    "models_create": "models: create",
    "models_delete": "models: delete",
    "models_versions_list": "models: versions",
    "models_versions_get": "models: one version",
    "models_examples": "models: examples",
    "models_readme": "models: readme",
    "collections_list": "collections: list",
    "collections_get": "collections: get",
    "hardware_list": "hardware",
    "account_get": "account",
    "deployments_create": "deployments: create",
    "deployments_get": "deployments: get",
    "deployments_list": "deployments: list",
    "deployments_update": "deployments: update",
    "deployments_delete": "deployments: delete",
    "deployments_predictions_create": "deployments: create a prediction",
    "trainings_create": "trainings: create, to the end",
    "trainings_get": "trainings: get",
    "trainings_list": "trainings: list",
    "trainings_cancel": "trainings: cancel",
    "files_create": "files: upload",
    "files_get": "files: get",
    "files_list": "files: list",
    "files_delete": "files: delete",
    "webhooks": "webhooks, validated with the client's own validator",
    "dynamic_tools": "tools that find and call other tools (`--tools=dynamic`)",
    "error_unauthorized": "error: no valid token (401)",
    "error_forbidden": "error: a token without the scope (403)",
    "error_not_found": "error: not there (404)",
    "error_invalid_input": "error: input that does not fit the schema (422)",
}
# What only clients of other kinds have.
NOT_OF_THE_OFFICIAL = {"dynamic_tools"}


@dataclass(frozen=True)
class Told:
    """What a client's program told of one flow: see the module."""

    ok: bool
    detail: str

    @property
    def cell(self) -> str:
        """What the table shows of it."""
        return self.detail or WORKS


@dataclass(frozen=True)
class Client:
    """One client, in one version: a file of `clients/`.

    Attributes:
        path: The file.
        title_of_kind: The head of its column, without package and version.
        packages: With their versions, `name==1.0` or `name@1.0`.
        official: Whether it is a library of Replicate's, which has each operation.
    """

    path: Path
    title_of_kind: str
    packages: tuple[str, ...]
    official: bool

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.stem

    @property
    def owner(self) -> str:
        """Its owner on the stack."""
        return self.name.replace("_", "-")

    @property
    def is_python(self) -> bool:
        """Whether it is a program in Python; else in JavaScript."""
        return self.path.suffix == ".py"

    @property
    def title(self) -> str:
        """The head of its column: `Python, `replicate` 1.0.7`."""
        package, _, version = self.packages[0].rpartition("==" if self.is_python else "@")
        return f"{self.title_of_kind}, `{package}` {version}"

    @property
    def lacks(self) -> str:
        """What is not installed here and keeps it from running; empty if nothing."""
        return "" if self.is_python or shutil.which("node") else "node is not installed"

    @functools.cached_property
    def shown(self) -> list[tuple[str, str]]:
        """What the pages show of it: (`point` or `key`, lines)."""
        return [(kind, textwrap.dedent(lines)) for kind, lines in SHOWN.findall(self.path.read_text())]

    @property
    def lock(self) -> Path:
        """The file with the hashes of its packages."""
        return HERE / "locks" / f"{self.name}{'.txt' if self.is_python else '.json'}"

    def is_locked(self) -> bool:
        """Return whether `lock` holds the packages of the header."""
        if not self.lock.exists():
            return False
        if self.is_python:
            locked = set(re.findall(r"^\S+==\S+", self.lock.read_text(), re.MULTILINE))
            return locked >= {package.lower() for package in self.packages}
        return bool(json.loads(self.lock.read_text())["packages"][""]["dependencies"] == self._dependencies())

    def run(self, cloud: LocalCloud, flows: Iterable[str] = ()) -> dict[str, Told]:
        """Run flows against a stack: those that are named, or all.

        Returns:
            What was told of each flow, by its name.

        Raises:
            subprocess.CalledProcessError: The client could not be installed, or the program itself failed.
            subprocess.TimeoutExpired: It took longer than `SECONDS`.
        """
        tokens = {
            "API_URL": cloud.stack.api_url,
            "ACCESS_TOKEN": cloud.create_token(self.owner),
            "WEAK_TOKEN": cloud.create_token(self.owner, ["read"]),
            "RECORD_URL": f"{cloud.replicate.origin}/_control/record",
            "LIVE": "1" if has_live_reads() else "",
            "PYTHONPATH": str(HERE / "support"),
        }
        folder, command = self.installed()
        done = subprocess.run(  # noqa: S603 - a program of this folder
            [*command, *flows], cwd=folder, env=environment() | tokens, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, check=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"flow":')]
        return {line["flow"]: Told(line["ok"], line["detail"]) for line in lines}

    def installed(self) -> tuple[Path, list[str]]:
        """Install what is locked into a folder below ``.local/conformance``, checked by hash; once.

        Returns:
            The folder, and the command that runs the program there.

        Raises:
            subprocess.CalledProcessError: uv or npm failed, and said why.
        """
        if not self.is_locked():
            self._write_lock()
        folder = CHECKOUT / ".local" / "conformance" / self.name
        if self.is_python:
            environment_of(self.lock, folder)
            # -P: a client's file may be named as its package.
            return folder, [str(folder / "bin" / "python"), "-P", str(self.path)]
        # Peers are what the header names: those of LangChain would be a hundred others.
        npm.install(folder, self._package_json(), self.lock, "--legacy-peer-deps")
        # Node finds packages above a program's own folder only.
        for part in (self.path.parent, HERE / "support"):
            shutil.rmtree(folder / part.name, ignore_errors=True)
            shutil.copytree(part, folder / part.name, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        return folder, ["node", f"clients/{self.path.name}"]

    def _write_lock(self) -> None:
        self.lock.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            if self.is_python:
                (scratch / "in.txt").write_text("\n".join(self.packages) + "\n")
                locked = compiled(CHECKOUT, str(scratch / "in.txt"), "--generate-hashes")
                self.lock.write_text(f"# Made by `make conformance` from the header of {self.path.name}.\n{locked}")
            else:
                (scratch / "package.json").write_text(self._package_json())
                npm.run(
                    "install", scratch, "--legacy-peer-deps", "--package-lock-only", "--omit-lockfile-registry-resolved"
                )
                shutil.copy(scratch / "package-lock.json", self.lock)

    def _dependencies(self) -> dict[str, str]:
        return {name: version for name, _, version in (package.rpartition("@") for package in self.packages)}

    def _package_json(self) -> str:
        return json.dumps({"name": "conformance", "private": True, "dependencies": self._dependencies()})


def environment() -> dict[str, str]:
    """Return the environment of a client: no token of the person who runs this, and no proxy to the stack."""
    hidden = re.compile(r"REPLICATE_.*|(https?|all)_proxy", re.IGNORECASE)
    return {name: value for name, value in os.environ.items() if not hidden.fullmatch(name)}


def read_client(path: Path) -> Client:
    """Return the client of a file.

    Raises:
        ValueError: The file has no header, or one with a package that names no exact version.
    """
    found = HEADER.search(path.read_text())
    if not found:
        raise ValueError(f"{path.name} has no header: a comment in TOML between /// client and ///")
    header = tomllib.loads(re.sub(r"^(?:#|//) ?", "", found[1], flags=re.MULTILINE))
    exact = re.compile(r"[\w.-]+==[\w.]+" if path.suffix == ".py" else r"(@[\w-]+/)?[\w.-]+@\d[\w.-]*")
    for package in header["packages"]:
        if not exact.fullmatch(package):
            raise ValueError(f"{path.name}: the package {package!r} must name one version")
    return Client(path, header["title"], tuple(header["packages"]), header.get("official", False))


def read_clients(folder: Path = HERE / "clients") -> dict[str, Client]:
    """Return the clients of a folder by name: the official ones first."""
    found = [read_client(path) for path in sorted(folder.glob("*.*")) if path.suffix in (".py", ".mjs")]
    return {client.name: client for client in sorted(found, key=lambda client: not client.official)}


CLIENTS = read_clients()


@functools.cache
def has_live_reads(template: Path = CHECKOUT / "template.yaml") -> bool:
    """Return whether a read of a running prediction shows it as it is at Replicate."""
    return re.search(rf"^  {LIVE_PARAMETER}:", template.read_text(), re.MULTILINE) is not None


def operations(*, live: bool | None = None) -> dict[str, str]:
    """Return the operations that are possible on this stack, or on one with live reads or without."""
    wanted = has_live_reads() if live is None else live
    return {flow: text for flow, text in OPERATIONS.items() if wanted or not flow.startswith(LIVE)}


def page(told: Mapping[str, Mapping[str, Told]]) -> str:
    """Return the page that shows what was told: a table of the official clients, and one of the others.

    Args:
        told: For each client's name, what its program told.
    """
    parts = [(HERE / "page.md").read_text().rstrip("\n")]
    for title, official in (("Replicate's own libraries", True), ("Other clients", False)):
        clients = [CLIENTS[name] for name in told if CLIENTS[name].official is official]
        lines = [f"## {title}\n", "| operation | " + " | ".join(client.title for client in clients) + " |"]
        lines.append("|---|" + "---|" * len(clients))
        for flow, operation in operations().items():
            if any(flow in told[client.name] for client in clients):
                lines.append(
                    f"| {operation} | " + " | ".join(_cell(told[client.name], flow) for client in clients) + " |"
                )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(told: Mapping[str, Told], flow: str) -> str:
    return told[flow].cell if flow in told else NOT_OFFERED


def column(text: str, client: Client) -> dict[str, str]:
    """Return what a page shows of one client: cells by operation, without what it has no method for."""
    tables = [part.splitlines() for part in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    for head, _, *rows in [[line.strip().strip("|").split(" | ") for line in table] for table in tables]:
        titles = [title.strip() for title in head]
        if client.title in titles:
            place = titles.index(client.title)
            return {row[0].strip(): row[place].strip() for row in rows if row[place].strip() != NOT_OFFERED}
    raise KeyError(f"the page has no column {client.title!r}")


def write(text: str) -> None:
    """Write the page, whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=PAGE.parent, delete=False) as unfinished:
        unfinished.write(text)
    Path(unfinished.name).chmod(0o644)
    Path(unfinished.name).replace(PAGE)
