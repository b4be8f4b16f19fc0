"""Build a release: ``python -m local.package [--tag v0.1.0]``, ``make package``.

`dist/` gets the stack as a zip that `sam deploy` deploys without Python and without a build, the command line as a
wheel, an SBOM of the layer, and the digests of all three. The layer holds the compiled modules of both architectures,
so there is one zip for both values of the parameter Architecture; its bytecode is that of the default PythonRuntime.

Two builds of one commit, with the same locked packages, give the same bytes: every zip has its files in order, with one
time and one mode, and bytecode is checked by no time (see layers/predictions/Makefile).
"""

from __future__ import annotations

import argparse
import email
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from local import lock

CHECKOUT = Path(__file__).resolve().parent.parent
DIST = CHECKOUT / "dist"
NAME = "replicate-serverless"
# For `make publish`.
NOTES = CHECKOUT / ".local" / "release-notes.md"
README = CHECKOUT / "local" / "package.md"
# The first time that a zip can hold.
TIME = (1980, 1, 1, 0, 0, 0)
# Properties of the built template that name a file or folder, and the folder of the zip in which each is.
ARTIFACTS = {"CodeUri": "functions", "ContentUri": "layers", "DefinitionUri": "statemachine"}
DOCUMENTS = {"LicenseUrl": "LICENSE", "ReadmeUrl": "README.md"}
PROPERTY = re.compile(rf"^( +)({'|'.join((*ARTIFACTS, *DOCUMENTS))}): (\S+)$", re.MULTILINE)
RELEASED = re.compile(r"^## (\d+\.\d+\.\d+) — (\d{4}-\d{2}-\d{2})$", re.MULTILINE)
UNRELEASED = "## Unreleased\n"


class PackageError(Exception):
    """The release cannot be built; the message says why."""


def main() -> int:
    """Build `dist/`; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m local.package", description=__doc__)
    parser.add_argument("--tag", help="refuse unless this commit is the release of that tag, such as v0.1.0")
    arguments = parser.parse_args()
    complaints = check(CHECKOUT, arguments.tag, f"python3.{sys.version_info.minor}")
    for complaint in complaints:
        print(f"NOT PACKAGED: {complaint}", file=sys.stderr)
    if complaints:
        return 1
    try:
        files = package(CHECKOUT, DIST)
        NOTES.write_text(notes((CHECKOUT / "CHANGELOG.md").read_text()))
        for file in files:
            print(f"dist/{file.name}: {file.stat().st_size:,} bytes")
    except PackageError as error:
        print(f"NOT PACKAGED: {error}", file=sys.stderr)
        return 1
    return 0


def check(checkout: Path, tag: str | None, python: str) -> list[str]:
    """Return the reasons why the checkout is no release, none if it is one.

    Args:
        checkout: The folder with `pyproject.toml`.
        tag: The tag of the release; without one, changes that are not released yet are accepted.
        python: The runtime whose bytecode this Python writes, such as `python3.13`.
    """
    version = version_of(checkout)
    template = (checkout / "template.yaml").read_text()
    changelog = (checkout / "CHANGELOG.md").read_text()
    found = []
    newest = RELEASED.search(changelog)
    if not newest or newest[1] != version:
        has = f"is {newest[1]}" if newest else "has none"
        found.append(
            f"pyproject.toml has version {version}, but the newest of CHANGELOG.md {has}: "
            f"it must begin with {UNRELEASED.strip()!r}, then '## {version} — YYYY-MM-DD'"
        )
    published = re.search(r"\bSemanticVersion: ([\w.+-]+)", template)
    if not published or published[1] != version:
        found.append(
            f"SemanticVersion of template.yaml must be {version} (got {published[1] if published else 'nothing'})"
        )
    runtime = re.search(r"^  PythonRuntime:\n    Type: String\n    Default: (\S+)$", template, re.MULTILINE)
    if not runtime or runtime[1] != python:
        wanted = runtime[1] if runtime else "of its default"
        found.append(f"bytecode of the layer must be that of {wanted}, the default of PythonRuntime (got {python})")
    if tag is not None and tag != f"v{version}":
        found.append(f"the tag of version {version} must be v{version} (got {tag!r})")
    if tag is not None and unreleased(changelog):
        found.append(f"CHANGELOG.md lists changes under {UNRELEASED.strip()!r}: move them to {version}")
    return found


def version_of(checkout: Path) -> str:
    """Return the version in `pyproject.toml`."""
    return str(tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["version"])


def unreleased(changelog: str) -> str:
    """Return the changes that belong to no version yet, or an empty text."""
    return changelog.partition(UNRELEASED)[2].partition("\n## ")[0].strip()


def notes(changelog: str) -> str:
    """Return the changes of the newest version, for a page on which links of this repository lead nowhere."""
    newest = RELEASED.search(changelog)
    section = changelog[newest.end() :].partition("\n## ")[0].strip() if newest else ""
    return re.sub(r"\[([^\]]+)\]\((?!https://)[^)]+\)", r"\1", section) + "\n"


def package(checkout: Path, dist: Path, *, runtime: str | None = None, platforms: str | None = None) -> list[Path]:
    """Build a release and replace `dist` by it.

    Args:
        checkout: The folder with `template.yaml`.
        dist: The folder for the files of the release.
        runtime: Another Python than the template's default, for tests on this machine.
        platforms: Other platforms than both of Lambda's: see layers/predictions/Makefile.

    Returns:
        The files.

    Raises:
        PackageError: The build failed, or its template names a file in a way that the zip cannot.
    """
    version = version_of(checkout)
    (checkout / ".local").mkdir(exist_ok=True)
    # In the checkout: paths in the built template are relative to it.
    with tempfile.TemporaryDirectory(prefix="package-", dir=checkout / ".local") as name:
        scratch = Path(name)
        build(checkout, scratch, runtime, platforms)
        files = contents(checkout, scratch / "build")
        new = scratch / "dist"
        (new / f"{NAME}-{version}.zip").write_bytes(zipped({f"{NAME}-{version}/{file}": files[file] for file in files}))
        parts = sbom(version, scratch / "build" / "PredictionsLayer" / "python", lock.entries(checkout / lock.LAYER))
        (new / f"{NAME}-{version}.cdx.json").write_text(json.dumps(parts, indent=2) + "\n")
        made = sorted(new.iterdir())
        digests = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in made]
        (new / "SHA256SUMS").write_text("".join(digests))
        # If the process is stopped here, the next run builds all of it again.
        shutil.rmtree(dist, ignore_errors=True)
        shutil.move(new, dist)
    return sorted(dist.iterdir())


def build(checkout: Path, scratch: Path, runtime: str | None, platforms: str | None) -> None:
    """Run `sam build` and build the wheel, without the user's configuration of SAM.

    Raises:
        PackageError: A build failed.
    """
    programs = Path(sys.executable).parent
    (scratch / "samconfig.toml").touch()
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SAM_"))}
    variables |= {
        "PATH": os.pathsep.join([str(programs), os.environ.get("PATH", os.defpath)]),
        "AWS_DEFAULT_REGION": "us-east-1",  # SAM wants one, and calls nothing there
        "SAM_CLI_TELEMETRY": "0",
        "__SAM_CLI_APP_DIR": str(scratch),
        "PYTHONHASHSEED": "0",
    }
    sam = [str(programs / "sam"), "build", "--template-file", "template.yaml", "--parallel"]
    sam += ["--build-dir", str(scratch / "build"), "--config-file", str(scratch / "samconfig.toml")]
    if runtime:
        sam += ["--parameter-overrides", f"ParameterKey=PythonRuntime,ParameterValue={runtime}"]
        variables["PYTHON_RUNTIME"] = runtime
    if platforms:
        variables["LAYER_PLATFORMS"] = platforms
    wheel = [str(programs / "uv"), "build", "--quiet", "--wheel", "--offline", "--python", sys.executable]
    wheel += ["--no-create-gitignore", "--out-dir", str(scratch / "dist")]
    for command in (sam, wheel):
        done = subprocess.run(
            command, cwd=checkout, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise PackageError(f"{' '.join(command[:2])} failed:\n{done.stdout[-3000:]}")


def contents(checkout: Path, built: Path) -> dict[str, bytes]:
    """Return the files of the zip, by name: the built template, and all that it names.

    Raises:
        PackageError: The template names a file outside the zip, or one of a kind that is not known.
    """
    files = {"samconfig.toml": (checkout / "samconfig.toml").read_bytes()}

    def packed(found: re.Match[str]) -> str:
        indent, name, value = found.groups()
        if name in DOCUMENTS:
            target = DOCUMENTS[name]
            files[target] = document(checkout, target)
        else:
            source = (built / value).resolve()
            target = f"{ARTIFACTS[name]}/{source.name}"
            if source.is_dir():
                target += ".zip"
                files[target] = zipped(read(source))
            elif source.is_file():
                files[target] = source.read_bytes()
            else:
                raise PackageError(f"{name} of the built template must be a file or folder (got {value!r})")
        return f"{indent}{name}: {target}"

    template = PROPERTY.sub(packed, (built / "template.yaml").read_text())
    if strange := re.search(
        r"^.*(?:\.\./|Uri: (?!functions/|layers/|statemachine/)[^!\s{]).*$", template, re.MULTILINE
    ):
        raise PackageError(f"the built template names a file that is not in the zip: {strange[0].strip()}")
    return files | {"template.yaml": template.encode()}


def document(checkout: Path, name: str) -> bytes:
    """Return a document of the release: its README is not that of the checkout."""
    if name == "README.md":
        return README.read_text().replace("VERSION", version_of(checkout)).encode()
    return (checkout / name).read_bytes()


def read(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder, by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def zipped(files: Mapping[str, bytes]) -> bytes:
    """Return a zip of some files: in order, all of one time, readable for everyone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, TIME)
            entry.create_system = 3  # Unix, wherever it is built
            entry.external_attr = 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            target.writestr(entry, files[name])
    return buffer.getvalue()


def sbom(version: str, layer: Path, locked: Mapping[str, str]) -> dict[str, Any]:
    """Return the software bill of materials of a built layer, in CycloneDX 1.5 (https://cyclonedx.org/docs/1.5/json/).

    Read from what the layer holds. `uv export --format cyclonedx1.5`, which is experimental, reads a lock file of its
    own instead: it lists botocore, which the layer leaves out, and writes the time, a random number and the address of
    the package index. No `serialNumber` and no `timestamp`, both optional: no other bytes would differ.

    Args:
        version: The version of the release.
        layer: The folder `python` of the built layer.
        locked: The entries of its requirements file, with the hashes of all files that may have been installed.
    """
    found = [email.message_from_string(file.read_text()) for file in layer.glob("*.dist-info/METADATA")]
    packages = {normal(each["Name"]): each for each in sorted(found, key=lambda each: normal(each["Name"]))}
    references = {name: f"pkg:pypi/{name}@{each['Version']}" for name, each in packages.items()}
    root = f"pkg:generic/{NAME}@{version}"
    own = {"type": "application", "bom-ref": root, "name": NAME, "version": version, "purl": root}
    components = []
    for name, each in packages.items():
        component = {"type": "library", "bom-ref": references[name], "name": name, "version": each["Version"]}
        if license_ := each["License-Expression"]:
            component["licenses"] = [{"expression": license_}]
        elif license_ := (each["License"] or "").strip():
            component["licenses"] = [{"license": {"name": license_.splitlines()[0]}}]
        component["purl"] = references[name]
        component["properties"] = [
            {"name": f"{NAME}:locked:sha256", "value": value}
            for value in re.findall(r"--hash=sha256:([0-9a-f]{64})", locked.get(name, ""))
        ]
        components.append(component)
    needs = {
        name: sorted({references[needed] for needed in required(each) if needed in references})
        for name, each in packages.items()
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": own | {"licenses": [{"license": {"id": "Apache-2.0"}}]}},
        "components": components,
        "dependencies": [
            {"ref": root, "dependsOn": sorted(references.values())},
            *({"ref": references[name], "dependsOn": needs[name]} for name in packages),
        ],
    }


def required(metadata: Any) -> list[str]:
    """Return the packages that one requires, those of its extras too."""
    names = (re.match(r"[\w.-]+", line) for line in metadata.get_all("Requires-Dist") or [])
    return [normal(name[0]) for name in names if name]


def normal(name: str) -> str:
    """Return the normalized name of a package (https://packaging.python.org/en/latest/specifications/name-normalization/)."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
