"""The template as data: intrinsic functions in their long form, `{"Ref": …}` and `{"Fn::GetAtt": […]}`."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from local.audit import translated

ROOT = Path(__file__).resolve().parents[2]


# With libyaml, which not every build of PyYAML has, a tenth of the time.
SAFE_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(SAFE_LOADER):  # type: ignore[misc]
    """YAML with CloudFormation's tags."""


def _intrinsic(loader: Any, tag: str, node: yaml.Node) -> dict[str, Any]:
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


@cache
def translated_template() -> dict[str, Any]:
    """The template after SAM's transform, as CloudFormation gets it; not to be changed by who gets it."""
    return translated(ROOT / "template.yaml")


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


def mapped(value: Any, parameters: Mapping[str, Any] | None = None) -> Any:
    """A value, or what `!FindInMap [Map, !Ref Parameter, Name]` finds for parameters, else for their defaults."""
    if not isinstance(value, dict):
        return value
    mapping, parameter, name = value["Fn::FindInMap"]
    chosen = (parameters or {}).get(parameter["Ref"], load_template()["Parameters"][parameter["Ref"]]["Default"])
    return load_template()["Mappings"][mapping][str(chosen)][name]


def timeout_of(function: str, parameters: Mapping[str, Any] | None = None) -> int:
    """A function's timeout in seconds."""
    seconds: int = mapped(load_template()["Resources"][function]["Properties"]["Timeout"], parameters)
    return seconds


def variables(function: str) -> dict[str, Any]:
    """The environment variables of one function, those of all functions included."""
    common: dict[str, Any] = load_template()["Globals"]["Function"]["Environment"]["Variables"]
    properties = load_template()["Resources"][function]["Properties"]
    own: dict[str, Any] = properties.get("Environment", {}).get("Variables", {})
    return common | own


def statements(resource: str) -> list[dict[str, Any]]:
    """The policy statements of a function or state machine; of a conditional one, the statement itself.

    Those of a customer-managed key are left out: tests of their own hold them.
    """
    policies = list(load_template()["Resources"][resource]["Properties"]["Policies"])
    policies += [
        policy["Properties"]["PolicyDocument"]
        for policy in resources("AWS::IAM::Policy").values()
        if "Condition" not in policy and {"Ref": f"{resource}Role"} in policy["Properties"]["Roles"]
    ]
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


FUNCTIONS = sorted(resources("AWS::Serverless::Function"))


def passes(pattern: Any, value: Any) -> bool:
    """Whether a value passes a filter, as far as ours go: nested names, lists of texts, `prefix`, `exists`."""
    if isinstance(pattern, dict):
        return isinstance(value, dict) and all(passes(each, value.get(name)) for name, each in pattern.items())
    if pattern == [{"exists": True}]:
        return value is not None
    prefixes = [each["prefix"] for each in pattern if isinstance(each, dict)]
    return value in pattern or any(isinstance(value, str) and value.startswith(prefix) for prefix in prefixes)


def kept(destination: Any) -> str:
    """The queue in which what fails is kept, by how a resource names it."""
    assert list(destination) == ["Fn::GetAtt"], f"not kept in a queue of this stack: {destination}"
    queue, attribute = destination["Fn::GetAtt"]
    assert attribute == "Arn"
    return str(queue)


UNKEPT = {
    each["Properties"]["ServiceToken"]["Fn::GetAtt"][0]
    for each in load_template()["Resources"].values()
    if each["Type"].startswith("Custom::")
}
"""Functions whose failed invocations are kept nowhere, because what they are invoked with is a secret."""


def dead_letter_queues() -> dict[str, str]:
    """Every asynchronous hop of the template, and the queue that keeps what does not get across; fails without one."""
    found: dict[str, str] = {}
    template = load_template()["Resources"]
    invoked: set[str] = set()  # asynchronously
    for name, resource in template.items():
        properties = resource.get("Properties", {})
        kind = resource["Type"]
        if kind == "AWS::Events::Rule":
            for target in properties["Targets"]:
                found[f"{name} → {target['Id']}"] = kept(target["DeadLetterConfig"]["Arn"])
        elif kind == "AWS::Scheduler::Schedule":
            found[name] = kept(properties["Target"]["DeadLetterConfig"]["Arn"])
        elif kind == "AWS::Lambda::EventSourceMapping":
            source, attribute = properties["EventSourceArn"]["Fn::GetAtt"]
            if attribute == "StreamArn":
                found[name] = kept(properties["DestinationConfig"]["OnFailure"]["Destination"])
            else:
                found[name] = kept(template[source]["Properties"]["RedrivePolicy"]["deadLetterTargetArn"])
        elif kind.startswith("Custom::"):
            invoked.add(properties["ServiceToken"]["Fn::GetAtt"][0])
        elif kind == "AWS::Serverless::Function":
            for event, source in properties.get("Events", {}).items():
                if source["Type"] == "ScheduleV2":
                    found[f"{name} {event}"] = kept(source["Properties"]["DeadLetterConfig"]["Arn"])
                    invoked.add(name)
                else:
                    assert source["Type"] == "Api", f"what keeps what fails of a {source['Type']}?"
        elif kind == "AWS::S3::Bucket":
            # To the default bus, which is AWS's own; the rules there are those above.
            assert properties.get("NotificationConfiguration", {}).keys() <= {"EventBridgeConfiguration"}
        else:
            assert kind not in ("AWS::SNS::Subscription", "AWS::Pipes::Pipe", "AWS::Lambda::Permission"), name
    invoked |= {
        output["Value"]["Fn::GetAtt"][0]
        for output in load_template()["Outputs"].values()
        # Whoever has a function's ARN may have a schedule or a rule invoke it.
        if "Fn::GetAtt" in output["Value"] and output["Value"]["Fn::GetAtt"][0] in FUNCTIONS
    }
    invoked.add("PollPredictionFunction")  # by receive_webhook's code
    # Its payload holds CloudFormation's presigned URL, and CloudFormation tells of an answer that does not come.
    assert invoked >= UNKEPT
    for name in invoked - UNKEPT:
        on_failure = template[name]["Properties"]["EventInvokeConfig"]["DestinationConfig"]["OnFailure"]
        assert on_failure["Type"] == "SQS"
        found[f"invocations of {name}"] = kept(on_failure["Destination"])
    return found
