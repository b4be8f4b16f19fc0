"""Findings of the tools of ``make audit``, and the table of docs/security.md that explains those that stay."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PAGE_NAME = "docs/security.md"


class AuditError(Exception):
    """The audit cannot run; the message says why."""


@dataclass(frozen=True)
class Finding:
    """A check that a resource fails."""

    check: str
    resource: str
    title: str = ""


@dataclass(frozen=True)
class Explained:
    """A row of the page: a check, the resources that may fail it (`*` for any part of a name), and the reason."""

    check: str
    resources: tuple[str, ...]
    why: str

    def covers(self, finding: Finding) -> bool:
        """Return whether this row explains a finding."""
        return self.check == finding.check and any(
            fnmatch.fnmatchcase(finding.resource, name) for name in self.resources
        )


def explained(page: str) -> list[Explained]:
    """Return the rows of the table of exceptions.

    Raises:
        AuditError: The page has no table, or a row without a reason.
    """
    section = re.search(r"^#+ Exceptions\n(.*?)(?=^#+ |\Z)", page, re.MULTILINE | re.DOTALL)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (section[1].splitlines() if section else [])
        if line.startswith("| `")
    ]
    if not rows:
        raise AuditError(f"{PAGE_NAME} has no table of exceptions")
    for row in rows:
        if len(row) != 3 or not all(row):
            raise AuditError(f"{PAGE_NAME}: this exception must have a check, resources and a reason: {row}")
    return [
        Explained(check.strip("`"), tuple(re.findall(r"`([^`]+)`", resources)), why) for check, resources, why in rows
    ]


def judge(findings: Iterable[Finding], exceptions: Sequence[Explained]) -> list[str]:
    """Return the errors: unexplained findings, and explanations without a finding."""
    found = list(findings)
    unexplained = [
        f"{each.check} {each.resource}: {each.title}. Fix it, or explain it in {PAGE_NAME}"
        for each in found
        if not any(exception.covers(each) for exception in exceptions)
    ]
    stale = [
        f"{exception.check} {name}: {PAGE_NAME} explains a finding that no longer exists. Remove it"
        for exception in exceptions
        for name in exception.resources
        if not any(Explained(exception.check, (name,), "").covers(each) for each in found)
    ]
    return unexplained + stale
