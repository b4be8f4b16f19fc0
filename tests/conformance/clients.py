"""The official clients whose real flows run against the deployed stack, and the table made of what they tell.

Each client has a program beside this file with one flow for each of `OPERATIONS`. It prints a line of JSON for each:
``{"flow", "ok", "detail"}``, where `detail` is why a flow failed, or in what a client differs.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from local.cloud import LocalCloud
from local.set_up import environment_of

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
PAGE = CHECKOUT / "docs" / "conformance.md"
SECONDS = 300  # for all flows of one client; they take about 40
WORKS = "✓"

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
    "stream": "stream",
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
    "error_unauthorized": "error: no valid token (401)",
    "error_forbidden": "error: a token without the scope (403)",
    "error_not_found": "error: not there (404)",
    "error_invalid_input": "error: input that does not fit the schema (422)",
}


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
    """One official client, in one version.

    Attributes:
        name: Its owner on the stack, too.
        title: The head of its column.
        needs: A program that may be missing on this machine, or nothing.
        install: Brings it onto this machine; returns the folder to run it in.
        command: Runs its flows there.
    """

    name: str
    title: str
    needs: str
    install: Callable[[], Path]
    command: tuple[str, ...]

    @property
    def lacks(self) -> str:
        """What is not installed here and keeps it from running; empty if nothing."""
        return "" if not self.needs or shutil.which(self.needs) else f"{self.needs} is not installed"

    def run(self, cloud: LocalCloud) -> dict[str, Told]:
        """Run all flows against a stack.

        Returns:
            What was told of each flow, by its name.

        Raises:
            subprocess.CalledProcessError: The client could not be installed, or the program itself failed.
            subprocess.TimeoutExpired: It took longer than `SECONDS`.
        """
        tokens = {
            "API_URL": cloud.stack.api_url,
            "ACCESS_TOKEN": cloud.create_token(self.name),
            "WEAK_TOKEN": cloud.create_token(self.name, ["read"]),
        }
        done = subprocess.run(  # noqa: S603 - a program of this folder
            self.command, cwd=self.install(), env=_environment() | tokens, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, check=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        return {line["flow"]: Told(line["ok"], line["detail"]) for line in lines}


def install_javascript() -> Path:
    """Install what package-lock.json holds into ``.local/conformance/node``, checked by hash; once.

    Raises:
        subprocess.CalledProcessError: npm failed, and said why.
    """
    folder = CHECKOUT / ".local" / "conformance" / "node"
    manifests = [HERE / "package.json", HERE / "package-lock.json"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in manifests)).hexdigest()
    finished = folder / "finished"
    if not finished.exists() or finished.read_text() != digest:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in manifests:
            shutil.copy(path, folder)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, check=True)  # noqa: S603 - npm, from the PATH
        finished.write_text(digest)
    return folder


def install_python2() -> Path:
    """Install what requirements/python2-client.txt holds into ``.local/conformance/python2``, checked by hash; once.

    Raises:
        subprocess.CalledProcessError: uv failed, and said why.
    """
    folder = CHECKOUT / ".local" / "conformance" / "python2"
    return environment_of(CHECKOUT / "requirements" / "python2-client.txt", folder)


def _environment() -> dict[str, str]:
    # A client must find nothing but the stack: no token of the person who runs this, and no proxy on the way.
    hidden = re.compile(r"REPLICATE_.*|(https?|all)_proxy", re.IGNORECASE)
    return {name: value for name, value in os.environ.items() if not hidden.fullmatch(name)}


CLIENTS = {
    client.name: client
    for client in [
        Client("javascript", "JavaScript, `replicate` 1.4.0", "node", install_javascript,
               ("node", str(HERE / "flows.mjs"))),
        Client("python1", "Python, `replicate` 1.0.7", "", lambda: HERE,
               (sys.executable, str(HERE / "flows_python1.py"))),
        Client("python2", "Python, `replicate` 2.0.0b4", "", install_python2,
               (str(CHECKOUT / ".local" / "conformance" / "python2" / "bin" / "python"),
                str(HERE / "flows_python2.py"))),
    ]
}  # fmt: skip


def page(told: Mapping[str, Mapping[str, Told]]) -> str:
    """Return the page that shows what was told.

    Args:
        told: For each client's name, what its program told.
    """
    clients = [CLIENTS[name] for name in told]
    lines = ["| operation | " + " | ".join(client.title for client in clients) + " |"]
    lines.append("|---|" + "---|" * len(clients))
    for flow, operation in OPERATIONS.items():
        lines.append(f"| {operation} | " + " | ".join(told[client.name][flow].cell for client in clients) + " |")
    return (HERE / "page.md").read_text().rstrip("\n") + "\n\n" + "\n".join(lines) + "\n"


def column(text: str, client: Client) -> dict[str, str]:
    """Return what a page shows of one client: cells by operation."""
    head, _, *rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    place = [title.strip() for title in head].index(client.title)
    return {row[0].strip(): row[place].strip() for row in rows}


def write(text: str) -> None:
    """Write the page, whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=PAGE.parent, delete=False) as unfinished:
        unfinished.write(text)
    Path(unfinished.name).chmod(0o644)
    Path(unfinished.name).replace(PAGE)
