"""A release, unpacked in an empty folder and deployed from there: `sam deploy` with its own samconfig.toml."""

import hashlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from local.cloud import CHECKOUT, STACK_NAME, LocalCloud, _sam_program
from local.package import NAME, package, version_of

PAINTER = {"version": "local/painter", "input": {"prompt": "a released fox"}}

pytestmark = pytest.mark.slow


def build(folder: Path) -> list[Path]:
    """A release for this machine's Python and processor, which run the functions here."""
    return package(CHECKOUT, folder, runtime=f"python3.{sys.version_info.minor}", platforms="host")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a release."""
    folder = tmp_path_factory.mktemp("release") / "dist"
    build(folder)
    return folder


class Unpacked(LocalCloud):
    """A local cloud that deploys a folder as it is, as the README of a release says."""

    def _new_build(self) -> Any:
        return SimpleNamespace(template=self._checkout / "template.yaml", start=lambda: None)

    def _deploy_command(self) -> list[str]:
        return [_sam_program(), "deploy"]

    def deploy_in_two_words(self) -> int:
        """`sam deploy`, and nothing else."""
        return self._start_sam(self._deploy_command(), self._checkout, self._log("sam-deploy-again")).wait()


@pytest.fixture(scope="module")
def released(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unpacked]:
    """A release, deployed."""
    folder = tmp_path_factory.mktemp("unpacked")
    (archive,) = dist.glob("*.zip")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    with Unpacked(checkout=folder / archive.stem) as started:
        yield started


def test_release_is_deployed_without_a_build_and_runs_a_prediction(released: Unpacked) -> None:
    headers = {"Authorization": f"Bearer {released.stack.access_token}", "Prefer": "wait"}
    url = f"{released.api_url}/predictions"
    done = httpx.post(url, json=PAINTER, headers=headers, timeout=60, trust_env=False).json()
    assert done["status"] == "succeeded", done
    (file,) = done["output_files"]
    head = released.client("s3").head_object(Bucket=released.stack.outputs_bucket, Key=file["key"])
    assert head["ContentLength"] == file["bytes"] > 0


def test_deployment_after_the_first_one_is_two_words_and_keeps_every_parameter(released: Unpacked) -> None:
    cloudformation = released.client("cloudformation")

    def stack() -> dict[str, Any]:
        found: dict[str, Any] = cloudformation.describe_stacks(StackName=STACK_NAME)["Stacks"][0]
        return found

    before = stack()
    assert released.deploy_in_two_words() == 0
    after = stack()
    assert after["StackStatus"] == "UPDATE_COMPLETE"
    assert after["StackId"] == before["StackId"]
    given = {each["ParameterKey"]: each["ParameterValue"] for each in before["Parameters"]}
    assert given["QueueOwner"] == released.owner
    assert given == {each["ParameterKey"]: each["ParameterValue"] for each in after["Parameters"]}


def test_second_build_of_a_release_has_the_same_bytes(dist: Path, tmp_path: Path) -> None:
    again = {file.name: file.read_bytes() for file in build(tmp_path / "dist")}
    assert again == {file.name: file.read_bytes() for file in dist.iterdir()}
    version = version_of(CHECKOUT)
    assert set(again) == {
        "SHA256SUMS",
        f"{NAME}-{version}.zip",
        f"{NAME}-{version}.cdx.json",
        f"replicate_serverless-{version}-py3-none-any.whl",
    }
    sums = again.pop("SHA256SUMS").decode().splitlines()
    assert sums == [f"{hashlib.sha256(content).hexdigest()}  {name}" for name, content in sorted(again.items())]
