"""The second opinion on the template: cfn-lint, on what SAM makes of it, and on what the services get of it."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from local.concrete import EVERYTHING, NOTHING, Stack
from local.findings import AuditError, Finding

MACHINES = Path(__file__).resolve().parents[2] / "statemachine"
# The longest name of a stack, with and without CloudFront: docs/deploy.md.
LONGEST_NAME, LONGEST_NAME_WITH_CLOUDFRONT = "n" * 63, "n" * 55
# Checks that mistake a resolved template, in which an ARN is a text and no reference, with the reason. Each must occur.
MISTAKEN = {"E3502": "compares a queue with its dead-letter queue, which it finds by a reference only"}
PLACEHOLDER = re.compile(r"\$\{(\w+)\}")


def opinions(template: Mapping[str, Any], program: Path | None = None) -> list[Finding]:
    """Return what cfn-lint says of a translated template, in three forms.

    As CloudFormation gets it; and with all functions resolved, for the longest names, once with everything that the
    parameters turn on and once with nothing: only then can names, patterns and lengths be checked.

    Raises:
        AuditError: cfn-lint did not run, or did not notice a fault.
    """
    resolved = {
        "everything": with_definitions(Stack(template, LONGEST_NAME_WITH_CLOUDFRONT, EVERYTHING).concrete()),
        "nothing": with_definitions(Stack(template, LONGEST_NAME, NOTHING).concrete()),
    }
    found = lint({"translated": template, **resolved, "faulty": faulty(resolved["everything"])}, program)
    if {each.check for each in found["faulty"]} < {"E3012", "E3033", "E3601"}:
        raise AuditError(f"cfn-lint did not notice the faults that it was given, only {found['faulty']}")
    mistaken = {each.check for name in resolved for each in found[name]} & MISTAKEN.keys()
    if mistaken != MISTAKEN.keys():
        raise AuditError(f"cfn-lint no longer makes the mistake {sorted(MISTAKEN.keys() - mistaken)}: remove it")
    return [
        each
        for name in ("translated", *resolved)
        for each in found[name]
        if name == "translated" or each.check not in MISTAKEN
    ]


def with_definitions(template: dict[str, Any]) -> dict[str, Any]:
    """Return a resolved template with its state machines within it, as Step Functions gets them."""
    template = copy.deepcopy(template)
    for resource in template["Resources"].values():
        if resource["Type"] == "AWS::StepFunctions::StateMachine":
            properties = resource["Properties"]
            properties["DefinitionString"] = definition(properties)
            del properties["DefinitionS3Location"], properties["DefinitionSubstitutions"]
    return template


def definition(properties: Mapping[str, Any]) -> str:
    """Return the definition of a state machine with its placeholders replaced, from its properties."""
    file = Path(properties["DefinitionS3Location"]["Key"]).name
    return replaced((MACHINES / file).read_text(), properties["DefinitionSubstitutions"])


def replaced(text: str, given: Mapping[str, Any]) -> str:
    """Return a text with the placeholders of a definition, such as `${PollSeconds}`, replaced."""
    return PLACEHOLDER.sub(lambda match: str(given[match[1]]), text)


def faulty(template: dict[str, Any]) -> dict[str, Any]:
    """Return a resolved template with a wrong type, a name that is too long, and a state of no kind."""
    template = copy.deepcopy(template)
    resources = template["Resources"]
    resources["PredictionsTable"]["Properties"]["DeletionProtectionEnabled"] = "perhaps"
    resources["ScheduleGroup"]["Properties"]["Name"] = "n" * 65
    machine = resources["RunBatchStateMachine"]["Properties"]
    machine["DefinitionString"] = machine["DefinitionString"].replace('"Type": "Choice"', '"Type": "Chance"')
    return template


def lint(templates: Mapping[str, Mapping[str, Any]], program: Path | None = None) -> dict[str, list[Finding]]:
    """Return cfn-lint's findings in each template, by its name.

    Raises:
        AuditError: cfn-lint did not run.
    """
    program = program or Path(sys.executable).parent / "cfn-lint"
    with tempfile.TemporaryDirectory() as folder:
        files = {str(Path(folder) / f"{name}.json"): name for name in templates}
        for file, name in files.items():
            Path(file).write_text(json.dumps(templates[name], indent=1))
        command: Sequence[str] = [str(program), "--format", "json", "--", *files]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=folder)
    found: dict[str, list[Finding]] = {name: [] for name in templates}
    try:
        # 0: nothing found; 2 to 14: errors, warnings and informational findings.
        if done.returncode not in (0, 2, 4, 6, 8, 10, 12, 14):
            raise ValueError(f"status {done.returncode}")
        for each in json.loads(done.stdout):
            path = each["Location"]["Path"] or []
            resource = path[1] if len(path) > 1 else "Template"
            found[files[each["Filename"]]].append(Finding(each["Rule"]["Id"], str(resource), each["Message"]))
    except (ValueError, KeyError, TypeError) as error:
        raise AuditError(f"cfn-lint wrote no report ({error}): {done.stderr[-2000:] or done.stdout[-2000:]}") from error
    return found
