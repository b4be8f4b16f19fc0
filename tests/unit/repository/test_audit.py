"""The audit's verdict: what is not explained, what is explained and not found, and what nobody looked at."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from local import audit, findings
from local.findings import AuditError, Explained, Finding

PAGE = """
### Exceptions

| check | resources | why |
|---|---|---|
| `CKV_1` | `*Function` | No. |
| `CKV_2` | `Table`, `Bucket` | It is so. |

## Next
| `CKV_3` | `Elsewhere` | Not in that section. |
"""


def program(path: Path, output: str, status: int = 0) -> Path:
    """Makes a program that prints a text."""
    path.parent.mkdir(exist_ok=True)
    (path.parent / f"{path.name}.out").write_text(output)
    path.write_text(f'#!/bin/sh\ncat "{path}.out"\nexit {status}\n')
    path.chmod(0o755)
    return path.parent


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("", "no table"),
        ("### Exceptions\n\nNone.\n", "no table"),
        (PAGE.replace("| No. |", "| |"), "a reason"),
        (PAGE.replace("| No. |", "|"), "a reason"),
        (PAGE.replace("| `*Function` |", "| |"), "a reason"),
    ],
)
def test_page_without_reasons_is_refused(page: str, reason: str) -> None:
    with pytest.raises(AuditError, match=reason):
        findings.explained(page)


def test_exceptions_are_those_of_their_section() -> None:
    assert findings.explained(PAGE) == [
        Explained("CKV_1", ("*Function",), "No."),
        Explained("CKV_2", ("Table", "Bucket"), "It is so."),
    ]


EXPLAINED = [Finding("CKV_1", "AFunction"), Finding("CKV_2", "Table"), Finding("CKV_2", "Bucket")]


@pytest.mark.parametrize(
    ("found", "complaints"),
    [
        (EXPLAINED, []),
        ([*EXPLAINED, Finding("CKV_1", "OtherFunction")], []),
        ([*EXPLAINED, Finding("CKV_2", "Queue")], ["CKV_2 Queue"]),
        ([*EXPLAINED, Finding("CKV_3", "AFunction")], ["CKV_3 AFunction"]),
        (EXPLAINED[1:], ["CKV_1 *Function"]),
        (EXPLAINED[:2], ["CKV_2 Bucket"]),
        ([], ["CKV_1 *Function", "CKV_2 Table", "CKV_2 Bucket"]),
    ],
)
def test_findings_and_explanations_have_to_be_the_same(found: list[Finding], complaints: list[str]) -> None:
    told = findings.judge(found, findings.explained(PAGE))
    assert [line.partition(":")[0] for line in told] == complaints


def test_tools_that_cannot_be_installed_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = tmp_path / "audit.txt"
    requirements.write_text("no-such-package==1 --hash=sha256:00\n")
    monkeypatch.setenv("UV_OFFLINE", "1")
    with pytest.raises(AuditError, match=r"audit\.txt could not be installed"):
        audit.environment(tmp_path / "audit", requirements)
    assert not (tmp_path / "audit" / "finished").exists()


def test_audit_without_its_tools_fails_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Path:
        raise AuditError("they are not there")

    monkeypatch.setattr(audit, "environment", missing)
    assert audit.main() == audit.FAILED
    assert capsys.readouterr().err == "NOT AUDITED: they are not there\n"


@pytest.mark.parametrize(
    "output",
    [
        "",
        "[]",
        "{}",
        '{"passed": 0, "failed": 0}',
        json.dumps({"summary": {"resource_count": 0, "parsing_errors": 0}, "results": {"failed_checks": []}}),
        json.dumps({"summary": {"resource_count": 1, "parsing_errors": 1}, "results": {"failed_checks": []}}),
    ],
)
def test_scan_that_did_not_look_at_everything_is_an_error(output: str, tmp_path: Path) -> None:
    tools = program(tmp_path / "bin" / "checkov", output)
    with pytest.raises(AuditError, match="checkov"):
        audit.scan(tools, {"Resources": {"Table": {}}})


def test_scan_tells_what_was_found(tmp_path: Path) -> None:
    failed = {"check_id": "CKV_1", "resource": "AWS::DynamoDB::Table.Table", "check_name": "Be good"}
    report = {"summary": {"resource_count": 1, "parsing_errors": 0}, "results": {"failed_checks": [failed]}}
    tools = program(tmp_path / "bin" / "checkov", json.dumps(report), 1)
    assert audit.scan(tools, {"Resources": {"Table": {}}}) == [Finding("CKV_1", "Table", "Be good")]


def test_translated_template_has_the_roles_that_sam_makes() -> None:
    found = audit.translated(audit.CHECKOUT / "template.yaml")["Resources"]
    assert found["ReceiveWebhookFunctionRole"]["Type"] == "AWS::IAM::Role"
    assert not [each for each in found.values() if each["Type"].startswith("AWS::Serverless::")]


def test_template_that_sam_refuses_is_an_error(tmp_path: Path) -> None:
    template = tmp_path / "template.yaml"
    template.write_text(
        "Transform: AWS::Serverless-2016-10-31\n"
        "Resources: {F: {Type: AWS::Serverless::Function, Properties: {Events: 1}}}"
    )
    with pytest.raises(AuditError, match="SAM rejects"):
        audit.translated(template)


def test_no_way_to_the_database_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    assert audit.dependencies(Path("/none"), ["requirements/dev.txt"], "database.invalid") == (False, True)
    assert capsys.readouterr().err.startswith("NOT AUDITED: requirements/dev.txt: database.invalid")


HTTPX = {"name": "httpx", "version": "1.0", "vulns": []}
BAD = {**HTTPX, "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}


@pytest.mark.parametrize(
    ("output", "status", "verdict", "told"),
    [
        (json.dumps({"dependencies": [HTTPX]}), 0, (False, False), "1 packages, no known vulnerability"),
        (json.dumps({"dependencies": [BAD]}), 1, (True, False), "httpx 1.0: PYSEC-1 (fixed in 1.1)"),
        ("", 1, (False, True), "NOT AUDITED"),
        ("[]", 0, (False, True), "NOT AUDITED"),
    ],
)
def test_vulnerabilities_are_told_and_silence_is_no_verdict(
    output: str, status: int, verdict: tuple[bool, bool], told: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(audit, "_reachable", lambda host: True)
    tools = program(tmp_path / "bin" / "pip-audit", output, status)
    assert audit.dependencies(tools, ["requirements/dev.txt"]) == verdict
    assert told in "".join(capsys.readouterr())


def test_finding_in_a_workflow_is_a_complaint(tmp_path: Path) -> None:
    finding = {"check_id": "CKV2_GHA_1", "resource": "on(test)", "check_name": "Be modest"}
    written = {"results": {"failed_checks": [finding]}, "summary": {"passed": 3, "parsing_errors": 0}}
    assert audit.workflows(program(tmp_path / "bin" / "checkov", json.dumps(written)), tmp_path) == [
        "CKV2_GHA_1 on(test): Be modest. Fix it"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "no report",
        '{"passed": 0, "failed": 0}',  # what checkov writes if it finds no file
        '{"results": {"failed_checks": []}, "summary": {"passed": 0, "parsing_errors": 0}}',
        '{"results": {"failed_checks": []}, "summary": {"passed": 5, "parsing_errors": 1}}',
    ],
)
def test_workflows_that_are_not_read_are_not_audited(text: str, tmp_path: Path) -> None:
    with pytest.raises(AuditError, match=r"\.github"):
        audit.workflows(program(tmp_path / "bin" / "checkov", text), tmp_path)


@pytest.mark.parametrize(
    ("complaints", "known", "node", "strict", "status"),
    [
        ([], (False, False), True, "", 0),
        ([], (False, True), True, "", 0),
        ([], (False, True), True, "strict", audit.NOT_AUDITED),
        ([], (True, True), True, "strict", audit.FAILED),
        ([], (True, False), True, "", audit.FAILED),
        (["CKV_1 Queue: Be good"], (False, True), True, "strict", audit.FAILED),
        ([], (False, False), False, "", 0),
        ([], (False, False), False, "strict", audit.NOT_AUDITED),
    ],
)
def test_status_tells_failure_from_not_knowing(
    complaints: list[str],
    known: tuple[bool, bool],
    node: bool,
    strict: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Callable[..., Any]] = {
        "environment": lambda: Path("/none"),
        "translated": lambda template: {},
        "scan": lambda tools, template: [],
        "opinions": lambda tools, template: [],
        "judge": lambda findings, exceptions: complaints,
        "workflows": lambda tools: [],
        "dependencies": lambda tools: known,
        "has_node": lambda: node,
    }
    for name, value in given.items():
        monkeypatch.setattr(audit, name, value)
    monkeypatch.setenv("AUDIT", strict)
    assert audit.main() == status
