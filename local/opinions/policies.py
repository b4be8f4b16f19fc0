"""The second opinion on permissions: parliament, on every policy of the template as IAM gets it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from local.concrete import ACCOUNT, EVERYTHING, NOTHING, PARTITION, Stack
from local.findings import AuditError, Finding

READER = Path(__file__).with_name("parliament_reader.py")
FAULTY = {
    "Version": "2012-10-17",
    "Statement": [
        {"Sid": "Misspelled", "Effect": "Allow", "Action": "s3:GetObjekt", "Resource": "arn:aws:s3:::bucket/*"},
        {"Sid": "OfAnother", "Effect": "Allow", "Action": "sqs:SendMessage", "Resource": "arn:aws:s3:::bucket"},
    ],
}
NOTICED = {"UNKNOWN_ACTION", "RESOURCE_MISMATCH sqs:SendMessage"}


def opinions(tools: Path, template: Mapping[str, Any]) -> list[Finding]:
    """Return what parliament says of each policy of a translated template: issue and action, and the resource.

    Raises:
        AuditError: parliament did not read all of them, or did not notice a fault.
    """
    policies = dict(all_policies(template))
    found = read(tools, {**policies, "Faulty": FAULTY})
    if {each.check for each in found if each.resource == "Faulty"} != NOTICED:
        raise AuditError("parliament did not notice the faults that it was given")
    # Once for each resource, whichever of its policies it is about.
    return sorted({each for each in found if each.resource != "Faulty"}, key=lambda each: (each.check, each.resource))


def all_policies(template: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each policy document by the path to it, with everything that parameters turn on, and with nothing."""
    for label, parameters in (("everything", EVERYTHING), ("nothing", NOTHING)):
        for logical, resource in Stack(template, "replicate-serverless", parameters).resources().items():
            for path, document in documents(resource["Properties"]):
                yield f"{logical}/{path}{label}", document


def documents(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each policy document within a value."""
    if isinstance(value, dict):
        if isinstance(value.get("Statement"), list):
            yield path, as_read(path, value)
        for key, each in value.items():
            yield from documents(each, f"{path}{key}/")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from documents(each, f"{path}{index}/")


def as_read(path: str, document: dict[str, Any]) -> dict[str, Any]:
    """Return a trust policy with the resource that it stands for, since parliament knows no policies of that kind."""
    if not path.startswith("AssumeRolePolicyDocument"):
        return document
    role = f"arn:{PARTITION}:iam::{ACCOUNT}:role/this"
    return document | {"Statement": [statement | {"Resource": role} for statement in document["Statement"]]}


def read(tools: Path, policies: Mapping[str, Any]) -> list[Finding]:
    """Return parliament's findings in some policies.

    Raises:
        AuditError: parliament did not read all of them.
    """
    done = subprocess.run(
        [str(tools / "python"), "-P", str(READER)], input=json.dumps(policies), capture_output=True, text=True
    )
    try:
        report = json.loads(done.stdout)
        if report["read"] != len(policies):
            raise ValueError(f"{report['read']} of {len(policies)} policies were read")
        return [Finding(each["issue"], each["policy"].partition("/")[0], each["detail"]) for each in report["findings"]]
    except (ValueError, KeyError, TypeError) as error:
        raise AuditError(f"parliament wrote no report ({error}): {done.stderr[-2000:]}") from error
