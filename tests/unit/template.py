"""The template as data: intrinsic functions in their long form, `{"Ref": …}` and `{"Fn::GetAtt": […]}`."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]


class _Loader(yaml.SafeLoader):
    """YAML with CloudFormation's tags."""


def _intrinsic(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> dict[str, Any]:
    value: Any
    if isinstance(node, yaml.ScalarNode):
        value = loader.construct_scalar(node)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        assert isinstance(node, yaml.MappingNode)
        value = loader.construct_mapping(node, deep=True)
    if tag == "GetAtt" and isinstance(value, str):
        value = value.split(".", 1)
    return {tag if tag in ("Ref", "Condition") else f"Fn::{tag}": value}


_Loader.add_multi_constructor("!", _intrinsic)


@cache
def load_template() -> dict[str, Any]:
    """The whole of `template.yaml`; not to be changed by who gets it."""
    template: dict[str, Any] = yaml.load((ROOT / "template.yaml").read_text(), _Loader)  # noqa: S506  # a SafeLoader
    return template


def resources(kind: str) -> dict[str, Any]:
    """The resources of one type by logical name, such as `resources("AWS::S3::Bucket")`."""
    return {name: found for name, found in load_template()["Resources"].items() if found["Type"] == kind}


def table_properties() -> dict[str, Any]:
    """What `create_table` of DynamoDB takes, but for the name, to make the template's own table."""
    properties = load_template()["Resources"]["PredictionsTable"]["Properties"]
    names = ("AttributeDefinitions", "BillingMode", "GlobalSecondaryIndexes", "KeySchema")
    return {
        **{name: properties[name] for name in names},
        "StreamSpecification": {"StreamEnabled": True, **properties["StreamSpecification"]},
    }


def logical_name(folder: str) -> str:
    """`copy_outputs` → `CopyOutputsFunction`."""
    return "".join(word.capitalize() for word in folder.split("_")) + "Function"


def folder_name(function: str) -> str:
    """`CopyOutputsFunction` → `copy_outputs`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", function.removesuffix("Function")).lower()


def variables(function: str) -> dict[str, Any]:
    """The environment variables of one function, those of all functions included."""
    common: dict[str, Any] = load_template()["Globals"]["Function"]["Environment"]["Variables"]
    properties = load_template()["Resources"][function]["Properties"]
    own: dict[str, Any] = properties.get("Environment", {}).get("Variables", {})
    return common | own


def statements(resource: str) -> list[dict[str, Any]]:
    """The policy statements of a function or state machine; of a conditional one, the statement itself."""
    policies = load_template()["Resources"][resource]["Properties"]["Policies"]
    return [
        statement["Fn::If"][1] if "Fn::If" in statement else statement
        for policy in policies
        for statement in policy["Statement"]
    ]


def listed(value: Any) -> list[Any]:
    """A list of what a policy gives as one value or as a list."""
    return value if isinstance(value, list) else [value]


def actions(resource: str) -> set[str]:
    """Every action that the policies of a function or state machine allow."""
    return {action for statement in statements(resource) for action in listed(statement["Action"])}
