"""A release: its version everywhere, what makes a checkout one, what its files hold, and what publishes them."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import botocore.session
import pytest

from local import lock, package
from local.cloud import STACK_NAME, _sam
from tests.support.pages import rows, section
from tests.support.template import ROOT, load_template

VERSION = package.version_of(ROOT)
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
RUNTIME: str = load_template()["Parameters"]["PythonRuntime"]["Default"]
METADATA: dict[str, Any] = load_template()["Metadata"]["AWS::ServerlessRepo::Application"]


# -- the version ---------------------------------------------------------------------------------------------------


def test_newest_version_of_the_changelog_and_of_the_template_is_that_of_the_project() -> None:
    assert package.check(ROOT, None, RUNTIME) == []
    assert re.search(r"^## (\S+)", CHANGELOG.partition(package.UNRELEASED)[2], re.MULTILINE)[1] == VERSION  # type: ignore[index]
    assert METADATA["SemanticVersion"] == VERSION


def test_changelog_has_its_unreleased_changes_first_and_each_version_once_newest_first() -> None:
    headings = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    assert headings[0] == package.UNRELEASED.strip("# \n")
    versions = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+) — \d{4}-\d{2}-\d{2}", heading) for heading in headings[1:]]
    assert all(versions)
    numbers = [tuple(map(int, found.groups())) for found in versions if found]
    assert numbers == sorted(set(numbers), reverse=True)


def copy(folder: Path) -> Path:
    for name in ("pyproject.toml", "template.yaml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new", "complaints"),
    [
        ("pyproject.toml", f'"{VERSION}"', '"9.9.9"', [f"CHANGELOG.md is {VERSION}", f"must be 9.9.9 (got {VERSION})"]),
        ("CHANGELOG.md", f"## {VERSION} — ", "## 9.9.9 — ", ["but the newest of CHANGELOG.md is 9.9.9"]),
        ("CHANGELOG.md", f"## {VERSION} — ", f"## {VERSION}: ", ["the newest of CHANGELOG.md has none"]),
        ("template.yaml", f"Version: {VERSION}", "Version: 0.0.9", [f"must be {VERSION} (got 0.0.9)"]),
        ("template.yaml", f"Default: {RUNTIME}\n", "Default: python3.99\n", ["python3.99, the default of"]),
    ],
)  # fmt: skip
def test_checkout_whose_versions_differ_is_not_packaged(
    file: str, old: str, new: str, complaints: list[str], tmp_path: Path
) -> None:
    checkout = copy(tmp_path)
    replace(checkout / file, old, new)
    found = package.check(checkout, None, RUNTIME)
    assert len(found) == len(complaints), found
    for complaint, wanted in zip(found, complaints, strict=True):
        assert wanted in complaint


@pytest.mark.parametrize("tag", ["", "v9.9.9", VERSION, f"v{VERSION}-rc1"])
def test_tag_of_another_version_is_not_packaged(tag: str, tmp_path: Path) -> None:
    (complaint,) = [each for each in package.check(ROOT, tag, RUNTIME) if "tag" in each]
    assert complaint == f"the tag of version {VERSION} must be v{VERSION} (got {tag!r})"


def test_changes_without_a_version_are_packaged_for_trial_but_not_for_a_tag(tmp_path: Path) -> None:
    checkout = copy(tmp_path)
    text = CHANGELOG.replace(package.unreleased(CHANGELOG), "") if package.unreleased(CHANGELOG) else CHANGELOG
    (checkout / "CHANGELOG.md").write_text(text)
    assert package.check(checkout, f"v{VERSION}", RUNTIME) == []
    replace(checkout / "CHANGELOG.md", package.UNRELEASED, f"{package.UNRELEASED}\n- Something new.\n")
    assert package.check(checkout, None, RUNTIME) == []
    (complaint,) = package.check(checkout, f"v{VERSION}", RUNTIME)
    assert "lists changes under" in complaint


def test_command_says_why_it_packages_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout = copy(tmp_path)
    replace(checkout / "pyproject.toml", f'version = "{VERSION}"', 'version = "9.9.9"')
    monkeypatch.setattr(package, "CHECKOUT", checkout)
    monkeypatch.setattr(package, "DIST", checkout / "dist")
    monkeypatch.setattr(sys, "argv", ["package"])
    assert package.main() == 1
    assert "NOT PACKAGED: pyproject.toml has version 9.9.9" in capsys.readouterr().err
    assert not (checkout / "dist").exists()


def test_notes_of_a_release_are_the_changes_of_its_version_without_links_into_the_repository() -> None:
    changelog = """# Changelog

## Unreleased

- Later: [what](docs/x.md).

## 0.2.0 — 2026-12-01

- A change: [how](docs/api.md#routes), [why](https://replicate.com).

## 0.1.0 — 2026-11-30

- The first.
"""
    assert package.notes(changelog) == "- A change: how, [why](https://replicate.com).\n"


# -- the files -----------------------------------------------------------------------------------------------------


def test_zip_has_the_same_bytes_whatever_the_order_and_the_time() -> None:
    files = {"b.py": b"2", "a/c.txt": b"1" * 1000}
    made = package.zipped(files)
    assert made == package.zipped(dict(reversed(files.items())))
    with zipfile.ZipFile(io.BytesIO(made)) as opened:
        assert opened.namelist() == ["a/c.txt", "b.py"]
        for entry in opened.infolist():
            assert (entry.date_time, entry.external_attr >> 16, entry.create_system) == (package.TIME, 0o100644, 3)


BUILT = """Metadata:
  AWS::ServerlessRepo::Application:
    LicenseUrl: ../../../LICENSE
    ReadmeUrl: ../../../README.md
Resources:
  Start:
    Properties:
      CodeUri: StartFunction
  Layer:
    Properties:
      ContentUri: Layer
  Machine:
    Properties:
      DefinitionUri: ../../../statemachine/run.asl.json
  Url:
    Value: https://example.com/a/../b
"""


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """What `sam build` wrote, in a checkout."""
    folder = tmp_path / ".local/package-1/build"
    for name, content in {
        "pyproject.toml": f'[project]\nversion = "{VERSION}"\n',
        "LICENSE": "the license",
        "samconfig.toml": "version = 0.1\n",
        "statemachine/run.asl.json": "{}",
        ".local/package-1/build/template.yaml": BUILT.replace("/a/../b", ""),
        ".local/package-1/build/StartFunction/app.py": "def handler(): ...",
        ".local/package-1/build/Layer/python/p/__init__.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return folder


def test_template_of_a_release_names_files_of_its_own_folder(built: Path) -> None:
    files = package.contents(built.parents[2], built)
    assert set(files) == {
        "LICENSE", "README.md", "samconfig.toml", "template.yaml", "functions/StartFunction.zip", "layers/Layer.zip",
        "statemachine/run.asl.json",
    }  # fmt: skip
    named = re.findall(r"(?:Uri|LicenseUrl|ReadmeUrl): (\S+)", files["template.yaml"].decode())
    assert sorted(named) == sorted(files.keys() - {"samconfig.toml", "template.yaml"})
    with zipfile.ZipFile(io.BytesIO(files["functions/StartFunction.zip"])) as opened:
        assert opened.read("app.py") == b"def handler(): ..."
    assert VERSION in files["README.md"].decode()
    assert "VERSION" not in files["README.md"].decode()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("      CodeUri: Missing", "must be a file or folder (got 'Missing')"),
        ("      CodeUri: two words", "not in the zip: CodeUri: two words"),
        ("      BodyUri: openapi.yaml", "not in the zip: BodyUri: openapi.yaml"),
        ("      Location: ../nested.yaml", "not in the zip: Location: ../nested.yaml"),
    ],
)
def test_template_that_names_what_the_zip_lacks_is_not_packaged(built: Path, line: str, complaint: str) -> None:
    with (built / "template.yaml").open("a") as template:
        template.write(f"  More:\n    Properties:\n{line}\n")
    with pytest.raises(package.PackageError) as raised:
        package.contents(built.parents[2], built)
    assert complaint in str(raised.value)


def test_bill_of_materials_lists_what_the_layer_holds_with_its_locked_digests(tmp_path: Path) -> None:
    def install(name: str, version: str, *lines: str) -> None:
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("\n".join([f"Name: {name}", f"Version: {version}", *lines, "", "Text."]))

    install("httpx", "0.28.1", "License-Expression: BSD-3-Clause", "Requires-Dist: Typing_Extensions>=4 ; extra == 'x'")
    install("typing_extensions", "4.16.0", "License: PSF", "Requires-Dist: botocore")
    locked = lock.entries(ROOT / lock.LAYER)
    parts = package.sbom("1.2.3", tmp_path, locked)
    assert (parts["bomFormat"], parts["specVersion"], parts["version"]) == ("CycloneDX", "1.5", 1)
    assert parts.keys() & {"serialNumber"} == set()
    assert parts["metadata"]["component"]["version"] == "1.2.3"
    httpx, typing_extensions = parts["components"]
    assert (httpx["purl"], typing_extensions["purl"]) == ("pkg:pypi/httpx@0.28.1", "pkg:pypi/typing-extensions@4.16.0")
    assert httpx["licenses"] == [{"expression": "BSD-3-Clause"}]
    assert typing_extensions["licenses"] == [{"license": {"name": "PSF"}}]
    digests = [each["value"] for each in httpx["properties"]]
    assert len(digests) > 1
    assert all(f"sha256:{digest}" in locked["httpx"] for digest in digests)
    needs = {each["ref"]: each["dependsOn"] for each in parts["dependencies"]}
    assert needs == {
        "pkg:generic/replicate-serverless@1.2.3": [httpx["purl"], typing_extensions["purl"]],
        httpx["purl"]: [typing_extensions["purl"]],
        typing_extensions["purl"]: [],
    }
    json.dumps(parts)


def test_readme_of_a_release_names_real_commands_and_the_stack_of_samconfig() -> None:
    text = package.README.read_text()
    commands = re.findall(r"^    (?!    )(\S.*(?:\\\n.*)*)$", text, re.MULTILINE)
    assert len(commands) == 7
    first = [command.split()[:2] for command in commands]
    assert [words for words in first if words[0] == "sam"] == [["sam", "deploy"]] * 3
    assert all(f"--stack-name {STACK_NAME}" in each for each in commands if "cloudformation deploy" in each)
    given = {name for each in commands for name in re.findall(r"(\w+)=(?:arn|ARN)", each)}
    assert given <= load_template()["Parameters"].keys()
    # Commands as the page of deployment has them.
    page = section("docs/deploy.md", "From a release")
    assert "README" in page
    assert f"--stack {STACK_NAME} " in commands[-1]


# -- samconfig.toml ------------------------------------------------------------------------------------------------


def test_samconfig_makes_a_deployment_two_words_and_holds_no_secret() -> None:
    config = tomllib.loads((ROOT / "samconfig.toml").read_text())
    assert config["version"] == 0.1
    given = {command: found["parameters"] for command, found in config["default"].items()}
    assert given == {
        "global": {"stack_name": STACK_NAME},
        "build": {"cached": True, "parallel": True},
        "deploy": {"capabilities": "CAPABILITY_IAM", "resolve_s3": True, "confirm_changeset": False},
    }
    assert "/samconfig.toml" not in (ROOT / ".gitignore").read_text().split()


def test_local_cloud_reads_another_samconfig() -> None:
    options = _sam("deploy", ROOT / "template.yaml")
    file = Path(options[options.index("--config-file") + 1])
    assert file.is_absolute()
    assert file != ROOT / "samconfig.toml"
    assert file.read_text() == ""


# -- AWS Serverless Application Repository -------------------------------------------------------------------------


def test_metadata_of_the_repository_is_what_it_takes() -> None:
    service = botocore.session.get_session().get_service_model("serverlessrepo")
    shape: Any = service.shape_for("CreateApplicationRequest")
    assert METADATA.keys() <= shape.members.keys()
    assert {"Name", "Author", "Description"} == set(shape.required_members) <= METADATA.keys()

    # The bounds that the documentation of each member gives.
    assert re.fullmatch(r"[a-zA-Z0-9\-]{1,140}", METADATA["Name"])
    assert re.fullmatch(r"[a-z0-9](([a-z0-9]|-(?!-))*[a-z0-9])?", METADATA["Author"])
    assert len(METADATA["Author"]) <= 127
    assert 1 <= len(METADATA["Description"]) <= 256
    assert len(METADATA["Labels"]) == len(set(METADATA["Labels"])) <= 10
    assert all(re.fullmatch(r"[a-zA-Z0-9+\-_:/@]{1,127}", label) for label in METADATA["Labels"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (METADATA["Name"], METADATA["SpdxLicenseId"]) == (project["name"], project["license"])
    for name in ("LicenseUrl", "ReadmeUrl"):
        assert 0 < (ROOT / METADATA[name]).stat().st_size < 5_000_000


# -- make ----------------------------------------------------------------------------------------------------------


CREATED = "release create v1.2.3 FILES --verify-tag --title v1.2.3 --notes-file .local/release-notes.md"


@pytest.mark.parametrize(
    ("exists", "calls"),
    [(False, [CREATED]), (True, ["release upload v1.2.3 FILES --clobber", "release edit v1.2.3 --draft=false"])],
)
def test_release_is_published_once_and_completed_by_a_second_run(
    exists: bool, calls: list[str], tmp_path: Path
) -> None:
    gh = tmp_path / "gh"
    status = 0 if exists else 1
    gh.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\ntest "$2" != view || exit {status}\n')
    gh.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "dist").mkdir()
    for name in ("SHA256SUMS", "a.zip"):
        (tmp_path / "dist" / name).touch()
    variables = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "TAG": "v1.2.3"}
    command = ["make", "--silent", "--old-file=setup", "publish", "PYTHON=true"]
    subprocess.run(command, cwd=tmp_path, env=variables, check=True)  # noqa: S603  # our own Makefile
    made = (tmp_path / "calls").read_text().replace("dist/SHA256SUMS dist/a.zip", "FILES").splitlines()
    assert made == ["release view v1.2.3", *calls]


def test_checkout_that_is_no_release_is_not_published(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    gh = tmp_path / "gh"
    gh.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    gh.chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "TAG": "v1.2.3"}
    command = ["make", "--silent", "--old-file=setup", "publish", "PYTHON=false"]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True)  # noqa: S603  # our own Makefile
    assert done.returncode != 0
    assert not (tmp_path / "called").exists()


def test_table_of_the_release_lists_its_files() -> None:
    listed = {row[0].strip("`") for row in rows(section("docs/deploy.md", "From a release"))}
    assert listed == {
        f"{package.NAME}-VERSION.zip", f"{package.NAME}-VERSION.cdx.json", "SHA256SUMS",
        "replicate_serverless-VERSION-py3-none-any.whl",
    }  # fmt: skip
