"""Compare two templates as CloudFormation gets them: ``python -m local.template_changes [REF]``.

SAM translates both first, so that their order, their YAML anchors and their form do not matter. Compared are sets: of
resources, parameters, conditions, rules and outputs; of each function's variables; of what each policy grants, one
action on one resource on one condition at a time. Descriptions and the Sids of statements are left out, and so are the
suffixes that SAM computes from a definition.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from local.audit import CHECKOUT, translated

# The parts of a template besides its resources.
PARTS = ("Parameters", "Conditions", "Rules", "Outputs")
# Kinds to whose logical ids SAM adds ten characters of a digest of their definition.
_DIGESTED = ("AWS::ApiGateway::Deployment", "AWS::Lambda::LayerVersion")
# Texts for people; `Label` and the dashboard's `title` and `label` are those of graphs.
_TEXTS = re.compile(r".*Description|Comment|Label|Sid|title|label")


@dataclass
class Part:
    """A part of a template: a resource, a parameter, an output, and so on."""

    kind: str
    #: Canonical JSON of everything but variables and grants.
    rest: str
    #: Canonical JSON of each environment variable's value, by its name.
    variables: dict[str, str] = field(default_factory=dict)
    #: What the part's policies grant or deny.
    grants: list[str] = field(default_factory=list)


@dataclass(frozen=True, order=True)
class Change:
    """A difference between two templates."""

    part: str
    #: `added`, `removed`, `changed`, `variables added`, `variables removed`, `grants added` or `grants removed`.
    what: str
    #: The names of the variables, or the grants; empty for the other changes.
    names: tuple[str, ...] = ()


def parts(template: Mapping[str, Any]) -> dict[str, Part]:
    """Return the parts of a translated template by name: `CopyOutputsFunction`, `Parameters.LogLevel`."""
    text = json.dumps(template)
    for name, resource in template["Resources"].items():
        if resource["Type"] in _DIGESTED:
            text = text.replace(f'"{name}"', f'"{name[:-10]}"').replace(f"${{{name}", f"${{{name[:-10]}")
    template = json.loads(text)
    for resource in template["Resources"].values():
        # Where a package is says nothing of what is deployed.
        if "DefinitionS3Location" in resource.get("Properties", {}):
            resource["Properties"]["DefinitionS3Location"]["Key"] = "package"
    found = {name: _part(value["Type"], value) for name, value in template["Resources"].items()}
    for kind in PARTS:
        found |= {f"{kind}.{name}": _part(kind, value) for name, value in template.get(kind, {}).items()}
    return found


def digests(found: Mapping[str, Part]) -> dict[str, dict[str, Any]]:
    """Return parts as a file of moderate size keeps them: each text as a digest."""
    return {
        name: {
            "kind": part.kind,
            "rest": digest(part.rest),
            "variables": {variable: digest(value) for variable, value in sorted(part.variables.items())},
            "grants": sorted(map(digest, part.grants)),
        }
        for name, part in sorted(found.items())
    }


def digest(text: str) -> str:
    """Return ten characters that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def changes(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> list[Change]:
    """Compare two templates, either both as digests or both as `asdict` of their parts.

    A variable with another value counts as removed and added.
    """
    found = [Change(name, "removed") for name in before.keys() - after.keys()]
    found += [Change(name, "added") for name in after.keys() - before.keys()]
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if (old["kind"], old["rest"]) != (new["kind"], new["rest"]):
            found.append(Change(name, "changed"))
        for what, gone, come in (
            ("variables", set(old["variables"].items()), set(new["variables"].items())),
            ("grants", {(each,) for each in old["grants"]}, {(each,) for each in new["grants"]}),
        ):
            for how, names in (("removed", gone - come), ("added", come - gone)):
                if names:
                    found.append(Change(name, f"{what} {how}", tuple(sorted(each[0] for each in names))))
    return sorted(found)


def _part(kind: str, value: Any) -> Part:
    value = _plain(value)
    found = Part(kind, "")
    if kind == "AWS::Lambda::Function":
        variables = value["Properties"].get("Environment", {}).pop("Variables", {})
        found.variables = {name: _canonical(each) for name, each in variables.items()}
    found.grants = sorted(set(_take_grants(value, "")))
    found.rest = _canonical(value)
    return found


def _plain(value: Any) -> Any:
    """Leave out texts for people, and read JSON in a dashboard's body."""
    if isinstance(value, dict):
        body = value.get("DashboardBody")
        if body is not None:
            value = value | {"DashboardBody": json.loads(body["Fn::Sub"])}
        return {name: _plain(each) for name, each in value.items() if not _TEXTS.fullmatch(name)}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value


def _take_grants(value: Any, path: str) -> Iterator[str]:
    """Remove the statements from a part, and tell what each grants, with the path of its policy."""
    if isinstance(value, dict):
        if isinstance(value.get("Statement"), list):
            for statement in value["Statement"]:
                yield from (f"{path} {grant}" for grant in _grants(statement))
            value["Statement"] = []
        for name, each in value.items():
            yield from _take_grants(each, f"{path}/{name}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _take_grants(each, f"{path}/{index}")


def _grants(statement: Mapping[str, Any], when: str = "") -> Iterator[str]:
    if "Fn::If" in statement:
        condition, then, otherwise = statement["Fn::If"]
        assert otherwise == {"Ref": "AWS::NoValue"}, otherwise
        yield from _grants(then, f"if {condition} ")
        return
    rest = {name: each for name, each in statement.items() if name not in ("Action", "Resource", "Condition")}
    for action in _listed(statement["Action"]):
        for resource in _listed(statement.get("Resource", "")):
            for condition in _conditions(statement.get("Condition", {})):
                yield when + " ".join(map(_canonical, (rest, action, resource, condition)))


def _conditions(condition: Mapping[str, Any]) -> Iterator[Any]:
    """Split a condition on the keys of table items into one for each key: each of them is a grant."""
    keys = condition.get("ForAllValues:StringLike", {}).get("dynamodb:LeadingKeys")
    if keys is None:
        yield condition
        return
    for key in keys:
        yield {**condition, "ForAllValues:StringLike": {"dynamodb:LeadingKeys": [key]}}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def of_ref(ref: str) -> dict[str, Part]:
    """Return the parts of the template of a Git reference."""
    text = subprocess.run(
        ["git", "show", f"{ref}:template.yaml"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "template.yaml"
        file.write_text(text)
        return parts(translated(file))


def of_checkout() -> dict[str, Part]:
    """Return the parts of the template of this checkout."""
    return parts(translated(CHECKOUT / "template.yaml"))


def report(before: Mapping[str, Part], after: Mapping[str, Part]) -> Iterator[str]:
    """Describe each change on a line, and each variable and grant below it."""
    pair = [{name: asdict(part) for name, part in found.items()} for found in (before, after)]
    for change in changes(*pair):
        yield f"{change.part}: {change.what}"
        yield from (f"    {name}" for name in change.names)


def main(arguments: Iterable[str] | None = None) -> int:
    """Print the changes since a Git reference, or the digests of its template; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m local.template_changes", description=__doc__)
    parser.add_argument("ref", nargs="?", default="main", help="a Git reference (default: main)")
    parser.add_argument("--digests", action="store_true", help="print the digests of the reference's template, as JSON")
    chosen = parser.parse_args(None if arguments is None else list(arguments))
    before = of_ref(chosen.ref)
    if chosen.digests:
        lines = [f"{json.dumps(name)}: {_canonical(part)}" for name, part in digests(before).items()]
        print("{\n" + ",\n".join(lines) + "\n}")
    else:
        print("\n".join(report(before, of_checkout())) or "no changes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
