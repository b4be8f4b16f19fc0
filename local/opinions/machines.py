"""The second opinion on the state machines: asl-validator, and JSONata's own implementation on their expressions.

Both need node, which ``make test`` does not: without it the audit says what was left out. expressions.json has cases
for each JSONata expression of the machines; the unit tests hold jsonata-python, which the simulation uses, to the same.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from local import npm
from local.concrete import EVERYTHING, Stack
from local.findings import AuditError, Finding
from local.opinions.templates import definition, replaced

HERE = Path(__file__).resolve().parent
READER = HERE / "machines.mjs"
LOCK = HERE / "package-lock.json"
EXPRESSIONS = HERE / "expressions.json"
ENVIRONMENT = HERE.parents[1] / ".local" / "opinions"


def opinions(template: Mapping[str, Any], folder: Path | None = None) -> list[Finding]:
    """Return what asl-validator and jsonata say of the state machines of a translated template.

    Args:
        template: The template after SAM's transform.
        folder: Where the two packages are installed; installed if missing.

    Raises:
        AuditError: They could not be installed or did not run, or did not notice a fault.
    """
    folder = folder or installed()
    definitions = deployed(template)
    cases = list(expression_cases())
    errors, values = read(folder, {**definitions, "Faulty": faulty(definitions)}, [*cases, FAULTY_CASE])
    if not errors.pop("Faulty") or values.pop() == FAULTY_CASE["value"]:
        raise AuditError("asl-validator or jsonata did not notice a fault that it was given")
    found = [Finding("asl-validator", name, text) for name, texts in errors.items() for text in texts]
    found += [
        Finding("jsonata", case["text"], f"is {value!r}, not {case['value']!r}, of {case['states']}")
        for case, value in zip(cases, values, strict=True)
        # A number's own type is not compared: JSON has only one.
        if value != case["value"] or isinstance(value, bool) != isinstance(case["value"], bool)
    ]
    return found


FAULTY_CASE: dict[str, Any] = {"text": "$states.input.seen & ''", "states": {"input": {"seen": 1}}, "value": 1}


def deployed(template: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the definitions of the state machines as Step Functions gets them, by logical id."""
    return {
        logical: json.loads(definition(resource["Properties"]))
        for logical, resource in Stack(template, "replicate-serverless", EVERYTHING).resources().items()
        if resource["Type"] == "AWS::StepFunctions::StateMachine"
    }


def faulty(definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state machine with a state that leads nowhere."""
    machine: dict[str, Any] = copy.deepcopy(next(iter(definitions.values())))
    machine["States"][machine["StartAt"]]["Next"] = "Nowhere"
    return machine


def expression_cases() -> Iterator[dict[str, Any]]:
    """Yield each case of expressions.json: `text`, `states`, perhaps `millis`, and the `value` that it must have."""
    for each in json.loads(EXPRESSIONS.read_text()):
        for case in each["cases"]:
            yield {"states": {}, **case, "text": replaced(each["expression"], case.get("placeholders", {}))}


def installed(folder: Path = ENVIRONMENT, lock: Path = LOCK) -> Path:
    """Install the locked packages into a folder, once, checked by hash.

    Raises:
        AuditError: npm failed, and printed the reason.
    """
    packages = json.loads(lock.read_text())["packages"][""]
    try:
        npm.install(folder, json.dumps({"private": True, **packages}), lock)
    except (OSError, subprocess.CalledProcessError) as error:
        raise AuditError(f"{lock.name} could not be installed, see above ({error})") from error
    return folder


def read(
    folder: Path, definitions: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, list[str]], list[Any]]:
    """Return asl-validator's errors of each definition, and jsonata's value of each case.

    Raises:
        AuditError: The program failed.
    """
    # Node finds packages above a program's own folder only.
    program = shutil.copy(READER, folder)
    given = json.dumps({"definitions": definitions, "expressions": cases})
    done = subprocess.run(["node", program], input=given, cwd=folder, capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
        if report["errors"].keys() != definitions.keys() or len(report["values"]) != len(cases):
            raise ValueError("not everything was read")
        values = [each.get("value", f"error: {each.get('error', 'no value')}") for each in report["values"]]
    except (ValueError, KeyError, TypeError) as error:
        raise AuditError(f"asl-validator and jsonata wrote no report ({error}): {done.stderr[-2000:]}") from error
    return report["errors"], values
