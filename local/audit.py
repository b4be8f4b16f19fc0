"""Check what is deployed and what is installed: ``python -m local.audit``, ``make audit``.

checkov looks at the template as CloudFormation gets it, after SAM's transform: it finds more there than in the file.
What it finds has to be explained in the table "Exceptions" of docs/security.md, and what is explained there has to be
found; so no exception outlives its reason.

pip-audit asks the database https://osv.dev for known vulnerabilities of every locked version. Without a way there
nothing is known, and that is said. With ``AUDIT=strict`` it is a failure.

checkov and pip-audit have an environment of their own, ``.local/audit``, filled from requirements/audit.txt, checked by
hash; where it cannot be made, nothing passes.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local.set_up import environment_of

CHECKOUT = Path(__file__).resolve().parent.parent
PAGE = CHECKOUT / "docs" / "security.md"
FOLDER = CHECKOUT / "requirements"
REQUIREMENTS = FOLDER / "audit.txt"
ENVIRONMENT = CHECKOUT / ".local" / "audit"
LOCKED = (
    "layers/predictions/requirements.txt",
    *(f"requirements/{name.name}" for name in sorted(FOLDER.glob("*.txt"))),
)
DATABASE = "api.osv.dev"

FAILED = 1
NOT_AUDITED = 3

# The policies of AWS's own that SAM attaches, by the names that the transform looks up.
MANAGED = {
    name: f"arn:aws:iam::aws:policy/{path}"
    for name, path in (
        ("AWSLambdaBasicExecutionRole", "service-role/AWSLambdaBasicExecutionRole"),
        ("AWSXrayWriteOnlyAccess", "AWSXrayWriteOnlyAccess"),
        ("AWSXRayDaemonWriteAccess", "AWSXRayDaemonWriteAccess"),
    )
}
# Where packages would be after `sam build` and `sam package`; the checks do not look inside.
PACKAGED = {
    "AWS::Serverless::Function": "CodeUri",
    "AWS::Serverless::LayerVersion": "ContentUri",
    "AWS::Serverless::StateMachine": "DefinitionUri",
}


class AuditError(Exception):
    """The audit cannot be made; the message says why."""


@dataclass(frozen=True)
class Finding:
    """A check that a resource fails."""

    check: str
    resource: str
    title: str = ""


@dataclass(frozen=True)
class Explained:
    """A row of the page: a check, the resources that may fail it (`*` for any part of a name), and why."""

    check: str
    resources: tuple[str, ...]
    why: str

    def covers(self, finding: Finding) -> bool:
        """Tell whether this is about a finding."""
        return self.check == finding.check and any(
            fnmatch.fnmatchcase(finding.resource, name) for name in self.resources
        )


def main() -> int:
    """Audit the template and the locked packages; return the exit status."""
    try:
        tools = environment()
        complaints = judge(scan(tools, translated(CHECKOUT / "template.yaml")), explained(PAGE.read_text()))
    except AuditError as error:
        print(f"NOT AUDITED: {error}", file=sys.stderr)
        return FAILED
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if not complaints:
        print("template.yaml: nothing that docs/security.md does not explain")
    vulnerable, unknown = dependencies(tools)
    if complaints or vulnerable:
        return FAILED
    return NOT_AUDITED if unknown and os.environ.get("AUDIT") == "strict" else 0


def environment(folder: Path = ENVIRONMENT, requirements: Path = REQUIREMENTS) -> Path:
    """Return the folder of the tools' programs, made when it is not there or is not of these requirements.

    Raises:
        AuditError: It could not be made.
    """
    try:
        return environment_of(requirements, folder) / "bin"
    except (OSError, subprocess.CalledProcessError) as error:
        raise AuditError(f"{requirements.name} could not be installed, see above ({error})") from error


def translated(template: Path) -> dict[str, Any]:
    """Return a SAM template as CloudFormation gets it.

    Raises:
        AuditError: SAM refuses it.
    """
    # Only here: it takes a second to import.
    logging.disable(logging.WARNING)
    from samtranslator.model.exceptions import InvalidDocumentException
    from samtranslator.translator.transform import transform
    from samtranslator.yaml_helper import yaml_parse

    class Managed:
        def load(self) -> dict[str, str]:
            return MANAGED

    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    source = yaml_parse(template.read_text())
    for resource in source["Resources"].values():
        if resource["Type"] in PACKAGED:
            resource["Properties"][PACKAGED[resource["Type"]]] = "s3://packages/package"
    try:
        result: dict[str, Any] = transform(source, {}, Managed())
    except InvalidDocumentException as error:
        raise AuditError(f"SAM refuses {template.name}: {error}") from error
    finally:
        logging.disable(logging.NOTSET)
    return result


def scan(tools: Path, template: Mapping[str, Any]) -> list[Finding]:
    """Return what checkov finds in a template of CloudFormation.

    Raises:
        AuditError: It did not look at all of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "template.json"
        file.write_text(json.dumps(template))
        command = [str(tools / "checkov"), "--file", str(file), "--framework", "cloudformation"]
        done = subprocess.run(
            [*command, "--output", "json", "--compact", "--skip-download"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=folder,
            env={name: value for name, value in os.environ.items() if not name.startswith(("BC_", "CKV_", "PRISMA_"))},
        )  # fmt: skip
    try:
        report = json.loads(done.stdout)
        looked_at = report["summary"]["resource_count"]
        failed = report["results"]["failed_checks"]
        wrong = report["summary"]["parsing_errors"]
    except (ValueError, KeyError, TypeError) as error:
        raise AuditError(f"checkov gave no report: {done.stderr[-2000:] or done.stdout[-2000:]}") from error
    if wrong or looked_at != len(template["Resources"]):
        raise AuditError(f"checkov looked at {looked_at} of {len(template['Resources'])} resources")
    return [Finding(each["check_id"], each["resource"].rpartition(".")[2], each["check_name"]) for each in failed]


def explained(page: str) -> list[Explained]:
    """Return the rows of the table of exceptions.

    Raises:
        AuditError: The page has none, or a row without a reason.
    """
    section = re.search(r"^#+ Exceptions\n(.*?)(?=^#+ |\Z)", page, re.MULTILINE | re.DOTALL)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (section[1].splitlines() if section else [])
        if line.startswith("| `")
    ]
    if not rows:
        raise AuditError(f"{PAGE.name} has no table of exceptions")
    for row in rows:
        if len(row) != 3 or not all(row):
            raise AuditError(f"{PAGE.name}: this exception has not a check, resources and a reason: {row}")
    return [
        Explained(check.strip("`"), tuple(re.findall(r"`([^`]+)`", resources)), why) for check, resources, why in rows
    ]


def judge(findings: Iterable[Finding], exceptions: Sequence[Explained]) -> list[str]:
    """Return what is wrong: findings that nothing explains, and explanations (each name in them) of nothing."""
    found = list(findings)
    unexplained = [
        f"{each.check} {each.resource}: {each.title}. Mend it, or explain it in docs/security.md"
        for each in found
        if not any(exception.covers(each) for exception in exceptions)
    ]
    stale = [
        f"{exception.check} {name}: docs/security.md explains what is not found any more; take it out"
        for exception in exceptions
        for name in exception.resources
        if not any(Explained(exception.check, (name,), "").covers(each) for each in found)
    ]
    return unexplained + stale


def dependencies(tools: Path, files: Sequence[str] = LOCKED, database: str = DATABASE) -> tuple[bool, bool]:
    """Ask for known vulnerabilities of all locked packages, and tell of them.

    Returns:
        Whether there are any, and whether nothing is known of some.
    """
    vulnerable = unknown = False
    if not _reachable(database):
        print(f"NOT AUDITED: {', '.join(files)}: there is no way to {database} from here", file=sys.stderr)
        return False, True
    for name in files:
        command = [str(tools / "pip-audit"), "--requirement", str(CHECKOUT / name), "--vulnerability-service", "osv"]
        done = subprocess.run(
            [*command, "--disable-pip", "--require-hashes", "--format", "json", "--progress-spinner", "off"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        try:
            packages = json.loads(done.stdout)["dependencies"]
        except (ValueError, KeyError, TypeError):
            print(f"NOT AUDITED: {name}: {done.stderr.strip()[-500:]}", file=sys.stderr)
            unknown = True
            continue
        told = [
            f"{each['name']} {each['version']}: {vulnerability['id']}"
            f" (mended in {', '.join(vulnerability['fix_versions']) or 'no version yet'})"
            for each in packages
            for vulnerability in each.get("vulns", [])
        ]
        print("\n".join(f"{name}: {line}" for line in told) or f"{name}: none known of {len(packages)} packages")
        vulnerable = vulnerable or bool(told)
    return vulnerable, unknown


def _reachable(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        # A proxy may know the way.
        return bool(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"))
    return True


if __name__ == "__main__":
    sys.exit(main())
