"""The second opinions of the audit: what they are asked, what counts as an answer, and that silence is not one.

The tools themselves run in `make audit` only; there each of them first has to notice faults that it is given.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from local import audit
from local.concrete import EVERYTHING, Stack
from local.findings import AuditError, Finding
from local.opinions import machines, policies, templates
from tests.support.template import translated_template as template

TYPE, NAME, STATE = (Finding(check, "x") for check in ("E3012", "E3033", "E3601"))
MISTAKEN = Finding("E3502", "RequestsQueue")


def program(path: Path, output: str, status: int = 0) -> Path:
    """A program that prints a text."""
    path.with_suffix(".out").write_text(output)
    path.write_text(f'#!/bin/sh\ncat >/dev/null\ncat "{path.with_suffix(".out")}"\nexit {status}\n')
    path.chmod(0o755)
    return path


# -- cfn-lint ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "status"), [("", 2), ("[]", 1), ("[]", 32), ("{", 0), ("{}x", 0), ('[{"Filename": "other"}]', 2)]
)
def test_cfn_lint_that_did_not_run_is_an_error(output: str, status: int, tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="cfn-lint"):
        templates.lint({"translated": {}}, program(tmp_path / "cfn-lint", output, status))


def test_cfn_lint_tells_what_it_found_by_template_and_resource(tmp_path: Path) -> None:
    # A program that finds something in each file that it is given.
    stub = tmp_path / "cfn-lint"
    stub.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        "files = sys.argv[sys.argv.index('--') + 1:]\n"
        "print(json.dumps([{'Filename': file, 'Rule': {'Id': 'E1'}, 'Message': json.load(open(file))['of'],"
        " 'Location': {'Path': ['Resources', 'Table', 'Properties']}} for file in files]))\n"
        "sys.exit(2)\n"
    )
    stub.chmod(0o755)
    found = templates.lint({"one": {"of": "first"}, "two": {"of": "second"}}, stub)
    assert found == {"one": [Finding("E1", "Table", "first")], "two": [Finding("E1", "Table", "second")]}


def linted(monkeypatch: pytest.MonkeyPatch, **found: list[Finding]) -> list[Finding]:
    """The opinion, where cfn-lint finds this in each template."""
    given: dict[str, list[Finding]] = {
        "translated": [],
        "everything": [MISTAKEN],
        "nothing": [],
        "faulty": [TYPE, NAME, STATE],
        **found,
    }
    monkeypatch.setattr(templates, "lint", lambda asked, program: {name: given[name] for name in asked})
    return templates.opinions(template())


def test_cfn_lint_is_believed_in_all_three_forms_but_for_its_known_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linted(monkeypatch) == []
    found = [Finding("E1", each) for each in ("A", "B", "C")]
    assert linted(monkeypatch, translated=found[:1], everything=[MISTAKEN, found[1]], nothing=found[2:]) == found
    assert linted(monkeypatch, translated=[MISTAKEN]) == [MISTAKEN], "in the template itself it is no mistake"


@pytest.mark.parametrize("noticed", [[], [TYPE, NAME], [TYPE, STATE], [NAME, STATE]])
def test_cfn_lint_that_does_not_notice_a_fault_is_an_error(
    noticed: list[Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AuditError, match="did not notice"):
        linted(monkeypatch, faulty=noticed)


def test_mistake_that_cfn_lint_no_longer_makes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AuditError, match="no longer makes the mistake"):
        linted(monkeypatch, everything=[])


def test_faulty_template_differs_in_three_places() -> None:
    good = templates.with_definitions(Stack(template(), "stack", EVERYTHING).concrete())
    bad = templates.faulty(good)
    changed = [name for name, each in good["Resources"].items() if each != bad["Resources"][name]]
    assert sorted(changed) == ["PredictionsTable", "RunBatchStateMachine", "ScheduleGroup"]


def test_state_machines_are_within_the_template_as_they_are_deployed() -> None:
    good = templates.with_definitions(Stack(template(), "stack", EVERYTHING).concrete())
    definition = json.loads(good["Resources"]["TrackPredictionStateMachine"]["Properties"]["DefinitionString"])
    state = definition["States"]["AwaitWebhook"]
    assert state["TimeoutSeconds"] == 60
    assert state["Arguments"]["TableName"].startswith("stack-PredictionsTable-")
    assert "${" not in json.dumps(definition)


# -- parliament ----------------------------------------------------------------------------------------------------

SEEN = [
    {"policy": "Faulty", "issue": "UNKNOWN_ACTION", "detail": ""},
    {"policy": "Faulty", "issue": "RESOURCE_MISMATCH sqs:SendMessage", "detail": ""},
]
POLICIES = len(dict(policies.all_policies(template()))) + 1


def parliament(folder: Path, findings: list[dict[str, str]], read: int = POLICIES) -> Path:
    program(folder / "python", json.dumps({"read": read, "findings": findings}))
    return folder


def test_parliament_tells_what_it_found_once_for_each_resource(tmp_path: Path) -> None:
    own = [{"policy": f"R/Policies/{n}/PolicyDocument/nothing", "issue": "NO_VERSION", "detail": ""} for n in range(2)]
    found = policies.opinions(parliament(tmp_path, [*SEEN, *own]), template())
    assert found == [Finding("NO_VERSION", "R", "")]


@pytest.mark.parametrize("seen", [[], SEEN[:1], SEEN[1:]])
def test_parliament_that_does_not_notice_a_fault_is_an_error(seen: list[dict[str, str]], tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="did not notice"):
        policies.opinions(parliament(tmp_path, seen), template())


def test_parliament_that_did_not_read_everything_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match=f"{POLICIES - 1} of {POLICIES}"):
        policies.opinions(parliament(tmp_path, SEEN, POLICIES - 1), template())
    program(tmp_path / "python", "Traceback", 1)
    with pytest.raises(AuditError, match="no report"):
        policies.opinions(tmp_path, template())


def test_every_policy_of_the_template_is_read() -> None:
    read = dict(policies.all_policies(template()))
    resources = template()["Resources"]
    roles = {name for name, each in resources.items() if each["Type"] == "AWS::IAM::Role"}
    assert {path.split("/")[0] for path in read if "/AssumeRolePolicyDocument/" in path} == roles
    others = {"AWS::IAM::Policy", "AWS::S3::BucketPolicy", "AWS::SQS::QueuePolicy"}
    named = {path.split("/")[0] for path in read} - roles
    assert named == {name for name, each in resources.items() if each["Type"] in others}
    # A role's statements, whichever parameters turn them on.
    text = json.dumps(template()).count('"Effect":')
    assert sum(len(each["Statement"]) for path, each in read.items() if path.endswith("everything")) > 0.9 * text
    for path, document in read.items():
        for statement in document["Statement"]:
            assert statement["Resource"], path
            assert "Fn::" not in json.dumps(statement)


# -- asl-validator and jsonata -------------------------------------------------------------------------------------


def node(folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> Path:
    """A folder for node, which answers as if all were well but for a change; its fault it notices."""
    cases = list(machines.expression_cases())
    answer: dict[str, Any] = {
        "errors": {**{name: [] for name in machines.deployed(template())}, "Faulty": ["MISSING_TRANSITION_TARGET"]},
        "values": [*({"value": case["value"]} for case in cases), {"value": "1"}],
    }
    change(answer)
    program(folder / "node", json.dumps(answer))
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


def test_machines_are_said_to_be_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = node(tmp_path, monkeypatch, lambda answer: None)
    assert machines.opinions(template(), folder) == []


def test_error_of_a_machine_and_another_value_are_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(answer: dict[str, Any]) -> None:
        answer["errors"]["RunBatchStateMachine"].append("SCHEMA_VALIDATION_FAILED: no")
        answer["values"][0] = {"value": 1}  # for true, which equals 1 in Python
        answer["values"][1] = {"error": "Unknown function"}

    found = machines.opinions(template(), node(tmp_path, monkeypatch, change))
    text = "$states.input.done = true"
    assert [(each.check, each.resource) for each in found] == [
        ("asl-validator", "RunBatchStateMachine"),
        ("jsonata", text),
        ("jsonata", text),
    ]
    assert "is 'error: Unknown function', not False" in found[2].title


@pytest.mark.parametrize("unnoticed", ["errors", "values"])
def test_node_that_does_not_notice_a_fault_is_an_error(
    unnoticed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(answer: dict[str, Any]) -> None:
        if unnoticed == "errors":
            answer["errors"]["Faulty"] = []
        else:
            answer["values"][-1] = {"value": 1}

    with pytest.raises(AuditError, match="did not notice"):
        machines.opinions(template(), node(tmp_path, monkeypatch, change))


def test_node_that_did_not_read_everything_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = node(tmp_path, monkeypatch, lambda answer: answer["values"].pop())
    with pytest.raises(AuditError, match="not everything was read"):
        machines.opinions(template(), folder)


def test_packages_that_cannot_be_installed_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "npm", "", 1)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(AuditError, match="could not be installed"):
        machines.installed(tmp_path / "opinions")
    assert not (tmp_path / "opinions" / "finished").exists()


def test_locked_packages_are_exact_and_checked_by_hash() -> None:
    packages = json.loads(machines.LOCK.read_text())["packages"]
    own = packages.pop("")["dependencies"]
    assert own.keys() == {"asl-validator", "jsonata"}
    assert all(packages[f"node_modules/{name}"]["version"] == version for name, version in own.items())
    assert all("integrity" in each and "resolved" not in each for each in packages.values())


# -- the audit -----------------------------------------------------------------------------------------------------


def test_audit_without_node_says_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Finding("E1", "Table"), Finding("NO_VERSION", "Role"), Finding("asl-validator", "Machine")]
    monkeypatch.setattr(templates, "opinions", lambda given: found[:1])
    monkeypatch.setattr(policies, "opinions", lambda tools, given: found[1:2])
    monkeypatch.setattr(machines, "opinions", lambda given: found[2:])
    monkeypatch.setattr(audit, "has_node", lambda: True)
    assert audit.opinions(Path("/none"), {}) == found
    monkeypatch.setattr(audit, "has_node", lambda: False)
    assert audit.opinions(Path("/none"), {}) == found[:2]
    assert (
        capsys.readouterr().err == "NOT AUDITED: state machines by asl-validator and jsonata: node is not installed\n"
    )
