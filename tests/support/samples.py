"""The samples of docs/samples, as tests read them."""

import re
from typing import Any

import hcl2
import yaml

from tests.support.modules import load_module
from tests.support.template import ROOT, _Loader

SAMPLES = ROOT / "docs" / "samples"


def text(name: str) -> str:
    """The text of one file."""
    return (SAMPLES / name).read_text()


def terraform() -> dict[str, list[Any]]:
    """The blocks of the Terraform sample by kind, without quotes around names and texts."""
    return {kind: _plain(blocks) for kind, blocks in hcl2.loads(text("terraform/main.tf")).items()}


def _plain(value: Any) -> Any:
    # python-hcl2 8 leaves texts as they are written.
    if isinstance(value, dict):
        return {_plain(name): _plain(each) for name, each in value.items() if not name.startswith("__")}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value[1:-1] if isinstance(value, str) and re.fullmatch(r'".*"', value) else value


def workflow() -> dict[str, Any]:
    """The workflow of GitHub Actions; its key `on` is a text, which YAML 1.1 would read as true."""
    found: dict[str, Any] = yaml.load(text("github-actions/deploy.yml"), yaml.BaseLoader)  # noqa: S506  # texts, lists and mappings only
    return found


def worker_template() -> dict[str, Any]:
    """The template beside the worker."""
    found: dict[str, Any] = yaml.load(text("worker/template.yaml"), _Loader)  # noqa: S506  # a SafeLoader
    return found


def load_worker() -> Any:
    """The worker as a module of its own: docs/ is no package."""
    return load_module(SAMPLES / "worker" / "worker.py")
