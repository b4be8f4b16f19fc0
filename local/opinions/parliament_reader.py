"""Read policies with parliament: a JSON object of them on standard input, findings as JSON on standard output.

A program for the audit's own environment, which has parliament.
"""

import json
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")  # parliament reads its files by pkg_resources

import parliament  # noqa: E402
from parliament import statement  # noqa: E402

# parliament 1.6.4 has a type in its table of condition keys that it cannot read.
known = statement.translate_documentation_types
statement.translate_documentation_types = lambda name: known({"ArrayOfARN": "ARN"}.get(name, name))

auditors = Path(parliament.__file__).parent / "community_auditors"
parliament.override_config(auditors / "config_override.yaml")
findings = []
policies = json.load(sys.stdin)
for name, policy in policies.items():
    # The community's auditors ask what a principal may do: they are not made for trust policies.
    of_principal = "/AssumeRolePolicyDocument/" not in name
    read = parliament.analyze_policy_string(json.dumps(policy), name, include_community_auditors=of_principal)
    for each in read.findings:
        actions = [part["action"] for part in each.detail] if each.issue == "RESOURCE_MISMATCH" else []
        actions = actions or (each.location if isinstance(each.location, dict) else {}).get("actions", [])
        issues = [f"{each.issue} {action}" for action in actions] or [each.issue]
        findings += [{"policy": name, "issue": issue, "detail": json.dumps(each.detail)} for issue in issues]
json.dump({"read": len(policies), "findings": findings}, sys.stdout)
