"""Check the template and the installed packages: ``python -m local.audit``, ``make audit``.

checkov reads the template as CloudFormation gets it, after SAM's transform: it finds more there than in the file. So
does cfn-lint, and also what the services get of it; parliament reads each policy, asl-validator and jsonata the state
machines (see `local.opinions`). Each finding must be explained in the table "Exceptions" of docs/security.md, and each
explanation must have a finding; so no exception outlives its reason. In the workflows of .github checkov must find
nothing.

pip-audit queries the database https://osv.dev for known vulnerabilities of every locked version. If the database cannot
be reached, nothing is known, and the output says so. With ``AUDIT=strict`` that is a failure.

checkov, parliament and pip-audit have an environment of their own, ``.local/audit``, filled from
requirements/audit.txt, checked by hash; if it cannot be created, the audit fails. asl-validator and jsonata have
``.local/opinions``, and need node; without it the output says that they were left out.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from local.findings import AuditError, Finding, explained, judge
from local.opinions import machines, policies, templates
from local.set_up import environment_of

CHECKOUT = Path(__file__).resolve().parent.parent
PAGE = CHECKOUT / "docs" / "security.md"
FOLDER = CHECKOUT / "requirements"
REQUIREMENTS = FOLDER / "audit.txt"
ENVIRONMENT = CHECKOUT / ".local" / "audit"
LOCKED = (
    "layers/predictions/requirements.txt",
    *(f"requirements/{name.name}" for name in sorted(FOLDER.glob("*.txt"))),
    "tests/conformance/locks/python2.txt",
)
DATABASE = "api.osv.dev"

FAILED = 1
NOT_AUDITED = 3

# The AWS managed policies that SAM attaches, by the names that the transform looks up.
MANAGED = {
    name: f"arn:aws:iam::aws:policy/{path}"
    for name, path in (
        ("AWSLambdaBasicExecutionRole", "service-role/AWSLambdaBasicExecutionRole"),
        ("AWSXrayWriteOnlyAccess", "AWSXrayWriteOnlyAccess"),
        ("AWSXRayDaemonWriteAccess", "AWSXRayDaemonWriteAccess"),
    )
}
# Placeholders for packages after `sam build` and `sam package`.
PACKAGED = {
    "AWS::Serverless::Function": "CodeUri",
    "AWS::Serverless::LayerVersion": "ContentUri",
    "AWS::Serverless::StateMachine": "DefinitionUri",
}


def main() -> int:
    """Audit the template and the locked packages; return the exit status."""
    try:
        tools = environment()
        template = translated(CHECKOUT / "template.yaml")
        complaints = judge([*scan(tools, template), *opinions(tools, template)], explained(PAGE.read_text()))
        complaints += workflows(tools)
    except AuditError as error:
        print(f"NOT AUDITED: {error}", file=sys.stderr)
        return FAILED
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if not complaints:
        print("template.yaml: docs/security.md explains every finding")
    vulnerable, unknown = dependencies(tools)
    if complaints or vulnerable:
        return FAILED
    return NOT_AUDITED if (unknown or not has_node()) and os.environ.get("AUDIT") == "strict" else 0


def environment(folder: Path = ENVIRONMENT, requirements: Path = REQUIREMENTS) -> Path:
    """Return the folder of the tools' programs, created or updated if necessary.

    Raises:
        AuditError: The environment could not be created.
    """
    try:
        return environment_of(requirements, folder) / "bin"
    except (OSError, subprocess.CalledProcessError) as error:
        raise AuditError(f"{requirements.name} could not be installed, see above ({error})") from error


def translated(template: Path) -> dict[str, Any]:
    """Return a SAM template as CloudFormation gets it.

    Raises:
        AuditError: SAM rejects the template.
    """
    # Imported only here: the import takes a second.
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
            name = PACKAGED[resource["Type"]]
            # The checks read definitions of state machines, by their file's name.
            key = resource["Properties"][name] if name == "DefinitionUri" else "package"
            resource["Properties"][name] = f"s3://packages/{key}"
    try:
        result: dict[str, Any] = transform(source, {}, Managed())
    except InvalidDocumentException as error:
        raise AuditError(f"SAM rejects {template.name}: {error}") from error
    finally:
        logging.disable(logging.NOTSET)
    return result


def scan(tools: Path, template: Mapping[str, Any]) -> list[Finding]:
    """Return checkov's findings in a CloudFormation template.

    Raises:
        AuditError: checkov did not check all of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "template.json"
        file.write_text(json.dumps(template))
        failed, summary = checkov(tools, "--file", str(file), "--framework", "cloudformation")
    if summary["parsing_errors"] or summary["resource_count"] != len(template["Resources"]):
        raise AuditError(f"checkov checked only {summary['resource_count']} of {len(template['Resources'])} resources")
    return [Finding(each["check_id"], each["resource"].rpartition(".")[2], each["check_name"]) for each in failed]


def workflows(tools: Path, checkout: Path = CHECKOUT) -> list[str]:
    """Return checkov's findings in the workflows of `.github`; each must be fixed.

    Raises:
        AuditError: checkov did not check them.
    """
    failed, summary = checkov(tools, "--directory", str(checkout / ".github"), "--framework", "github_actions")
    if summary["parsing_errors"] or not summary["passed"] + len(failed):
        raise AuditError("checkov checked no workflow of .github")
    return [f"{each['check_id']} {each['resource']}: {each['check_name']}. Fix it" for each in failed]


def checkov(tools: Path, *asked: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run checkov, without the settings of the person who runs it; return the failed checks and the summary.

    Raises:
        AuditError: checkov wrote no report.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [str(tools / "checkov"), *asked, "--output", "json", "--compact", "--skip-download"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=folder,
            env={name: value for name, value in os.environ.items() if not name.startswith(("BC_", "CKV_", "PRISMA_"))},
        )  # fmt: skip
    try:
        report = json.loads(done.stdout)
        return list(report["results"]["failed_checks"]), dict(report["summary"])
    except (ValueError, KeyError, TypeError) as error:
        said = done.stderr[-2000:] or done.stdout[-2000:]
        raise AuditError(f"checkov wrote no report of {asked[1]}: {said}") from error


def opinions(tools: Path, template: Mapping[str, Any]) -> list[Finding]:
    """Return what the other tools find in a translated template; print which of them were left out.

    Raises:
        AuditError: One of them did not run, or did not notice a fault that it was given.
    """
    found = [*templates.opinions(template), *policies.opinions(tools, template)]
    if has_node():
        return [*found, *machines.opinions(template)]
    print("NOT AUDITED: state machines by asl-validator and jsonata: node is not installed", file=sys.stderr)
    return found


def has_node() -> bool:
    """Return whether the tools that need node can run."""
    return shutil.which("node") is not None


def dependencies(tools: Path, files: Sequence[str] = LOCKED, database: str = DATABASE) -> tuple[bool, bool]:
    """Query known vulnerabilities of all locked packages, and print them.

    Returns:
        Whether any exist, and whether some packages could not be checked.
    """
    vulnerable = unknown = False
    if not _reachable(database):
        print(f"NOT AUDITED: {', '.join(files)}: {database} cannot be reached", file=sys.stderr)
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
            f" (fixed in {', '.join(vulnerability['fix_versions']) or 'no version yet'})"
            for each in packages
            for vulnerability in each.get("vulns", [])
        ]
        print(
            "\n".join(f"{name}: {line}" for line in told) or f"{name}: {len(packages)} packages, no known vulnerability"
        )
        vulnerable = vulnerable or bool(told)
    return vulnerable, unknown


def _reachable(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        # A proxy may reach the host.
        return bool(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"))
    return True


if __name__ == "__main__":
    sys.exit(main())
