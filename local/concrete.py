"""The template as AWS's services get it: a stack's name and parameters given, conditions decided, references resolved.

CloudFormation does that while it deploys. Doing it here shows what no template with functions in it shows: how long a
name, a policy or the variables of a function become, whether a text matches its service's pattern, and whether anything
refers to a resource that a condition leaves out, which CloudFormation refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

REGION, ACCOUNT, PARTITION = "ap-southeast-4", "123456789012", "aws"
# What CloudFormation adds to the names that it makes up.
SUFFIX = "ABCDEFGHIJKL"
_UUID = "51af3dc0-da77-11e4-872e-1234567db123"


class UnresolvedError(Exception):
    """CloudFormation would refuse the template: something refers to what is not there."""


class _NoValue:
    """The pseudo parameter `AWS::NoValue`: whatever has it is left out."""


NO_VALUE = _NoValue()


@dataclass
class Stack:
    """A translated template, deployed as a stack of a name with some parameters.

    Args:
        template: The template after SAM's transform; it is not changed.
        name: The stack's name.
        parameters: Values of parameters; the others have their defaults.
        region: Where the stack is.
    """

    template: Mapping[str, Any]
    name: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    region: str = REGION

    def __post_init__(self) -> None:
        self._decided: dict[str, bool] = {}

    def resources(self) -> dict[str, dict[str, Any]]:
        """Return the resources that the conditions leave, with resolved properties, by logical id.

        Raises:
            UnresolvedError: One refers to a resource, parameter, mapping or condition that is not there.
        """
        return {
            name: {**found, "Properties": self.resolve(found.get("Properties", {}))}
            for name, found in self.template["Resources"].items()
            if self._is_there(name)
        }

    def outputs(self) -> dict[str, Any]:
        """Return the values of the outputs that the conditions leave."""
        return {
            name: self.resolve(found["Value"])
            for name, found in self.template["Outputs"].items()
            if "Condition" not in found or self.decide(found["Condition"])
        }

    def concrete(self) -> dict[str, Any]:
        """Return a template without parameters, conditions and functions, with the same resources and outputs."""
        return {
            "AWSTemplateFormatVersion": "2010-09-09",
            "Resources": {
                name: {key: each for key, each in found.items() if key != "Condition"}
                for name, found in self.resources().items()
            },
            "Outputs": {name: {"Value": value} for name, value in self.outputs().items()},
        }

    def broken_rules(self) -> list[str]:
        """Return the descriptions of the assertions that the parameters violate."""
        return [
            assertion["AssertDescription"]
            for rule in self.template.get("Rules", {}).values()
            if "RuleCondition" not in rule or self._holds(rule["RuleCondition"])
            for assertion in rule["Assertions"]
            if not self._holds(assertion["Assert"])
        ]

    def decide(self, condition: str) -> bool:
        """Return whether a condition of the template holds."""
        if condition not in self._decided:
            if condition not in self.template["Conditions"]:
                raise UnresolvedError(f"the template has no condition {condition}")
            self._decided[condition] = self._holds(self.template["Conditions"][condition])
        return self._decided[condition]

    def parameter(self, name: str) -> str:
        """Return the value of a parameter."""
        found = self.template["Parameters"][name]
        if name not in self.parameters and "Default" not in found:
            raise UnresolvedError(f"{name} has no default and is not given")
        return str(self.parameters.get(name, found.get("Default")))

    def resolve(self, value: Any) -> Any:
        """Return a value without functions.

        Raises:
            UnresolvedError: It refers to something that is not there.
        """
        if isinstance(value, list):
            return [each for each in map(self.resolve, value) if each is not NO_VALUE]
        if not isinstance(value, Mapping):
            return value
        if len(value) == 1:
            ((function, asked),) = value.items()
            if function in self._functions():
                return self._functions()[function](asked)
            if function.startswith("Fn::"):
                raise UnresolvedError(f"{function} is not known here")
        found = {key: self.resolve(each) for key, each in value.items()}
        return {key: each for key, each in found.items() if each is not NO_VALUE}

    def physical_name(self, logical: str, most: int = 64) -> str:
        """Return the name that CloudFormation makes up for a resource: cut, so that its type's limit is kept."""
        room = most - len(SUFFIX) - 2
        stack = self.name[: max(room - len(logical), room // 2)]
        return f"{stack}-{logical[: room - len(stack)]}-{SUFFIX}"

    def _functions(self) -> dict[str, Callable[[Any], Any]]:
        return {
            "Ref": self._ref,
            "Fn::GetAtt": lambda asked: self._attribute(*(asked if isinstance(asked, list) else asked.split(".", 1))),
            "Fn::Sub": self._sub,
            "Fn::If": lambda asked: self.resolve(asked[1] if self.decide(asked[0]) else asked[2]),
            "Fn::Select": lambda asked: self.resolve(asked[1])[int(asked[0])],
            "Fn::Split": lambda asked: str(self.resolve(asked[1])).split(asked[0]),
            "Fn::Join": lambda asked: asked[0].join(map(str, self.resolve(asked[1]))),
            "Fn::FindInMap": self._find_in_map,
        }

    def _holds(self, condition: Any) -> bool:
        ((function, asked),) = condition.items()
        match function:
            case "Condition":
                return self.decide(asked)
            case "Fn::Equals":
                first, second = map(self.resolve, asked)
                return str(first) == str(second)
            case "Fn::Not":
                return not self._holds(asked[0])
            case "Fn::And":
                return all(map(self._holds, asked))
            case "Fn::Or":
                return any(map(self._holds, asked))
        raise UnresolvedError(f"{function} is no condition")

    def _is_there(self, logical: str) -> bool:
        condition = self.template["Resources"][logical].get("Condition")
        return condition is None or self.decide(condition)

    def _ref(self, name: str) -> Any:
        pseudo = {
            "AWS::AccountId": ACCOUNT,
            "AWS::NoValue": NO_VALUE,
            "AWS::Partition": PARTITION,
            "AWS::Region": self.region,
            "AWS::StackId": f"arn:{PARTITION}:cloudformation:{self.region}:{ACCOUNT}:stack/{self.name}/{_UUID}",
            "AWS::StackName": self.name,
            "AWS::URLSuffix": "amazonaws.com",
        }
        if name in pseudo:
            return pseudo[name]
        if name in self.template["Parameters"]:
            return self.parameter(name)
        return self._attribute(name, "Ref")

    def _sub(self, asked: Any) -> str:
        text, own = (asked, {}) if isinstance(asked, str) else asked

        def value(match: re.Match[str]) -> str:
            name = match[1]
            if name.startswith("!"):
                return f"${{{name[1:]}}}"
            if name in own:
                return str(self.resolve(own[name]))
            return str(self._attribute(*name.split(".", 1)) if "." in name else self._ref(name))

        return re.sub(r"\$\{([^}]+)\}", value, text)

    def _find_in_map(self, asked: list[Any]) -> Any:
        mapping, first, second = map(self.resolve, asked)
        try:
            return self.template["Mappings"][mapping][str(first)][second]
        except KeyError as error:
            raise UnresolvedError(f"the mapping {mapping} has no {first} with {second}") from error

    def _attribute(self, logical: str, attribute: str) -> str:
        if logical not in self.template["Resources"]:
            raise UnresolvedError(f"the template has no resource and no parameter {logical}")
        if not self._is_there(logical):
            condition = self.template["Resources"][logical]["Condition"]
            raise UnresolvedError(f"{logical} is referred to, but {condition} leaves it out")
        kind = self.template["Resources"][logical]["Type"]
        form = _forms().get((kind, attribute))
        if form is None:
            raise UnresolvedError(f"{kind} has no attribute {attribute} that is known here")
        place = {"partition": PARTITION, "region": self.region, "account": ACCOUNT, "uuid": _UUID}
        name = self._given_name(logical, kind)
        return form.format(name=name, lower=name.lower(), suffix=SUFFIX, **place)

    def _given_name(self, logical: str, kind: str) -> str:
        named, most = _NAMES.get(kind, ("", 64))
        given = self.template["Resources"][logical].get("Properties", {}).get(named)
        return self.physical_name(logical, most) if given is None else str(self.resolve(given))


# The property that holds a resource's name, and the longest name, for the types to which something refers.
# https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/aws-template-resource-type-ref.html
_NAMES = {
    "AWS::ApiGateway::DomainName": ("DomainName", 255),
    "AWS::ApiGateway::Stage": ("StageName", 128),
    "AWS::CloudWatch::Alarm": ("AlarmName", 255),
    "AWS::DynamoDB::Table": ("TableName", 255),
    "AWS::Events::EventBus": ("Name", 256),
    "AWS::Events::Rule": ("Name", 64),
    "AWS::IAM::Role": ("RoleName", 64),
    "AWS::Lambda::Function": ("FunctionName", 64),
    "AWS::Lambda::LayerVersion": ("LayerName", 140),
    "AWS::Logs::LogGroup": ("LogGroupName", 512),
    "AWS::S3::Bucket": ("BucketName", 63),
    "AWS::SQS::Queue": ("QueueName", 80),
    "AWS::SSM::Parameter": ("Name", 1011),
    "AWS::Scheduler::ScheduleGroup": ("Name", 64),
    "AWS::SecretsManager::Secret": ("Name", 512),
    "AWS::StepFunctions::StateMachine": ("StateMachineName", 80),
}
# What `Ref` and `GetAtt` return, by type: its page in the same reference, section "Return values".
_FORMS = {
    "AWS::ApiGateway::Deployment": {"Ref": "a1b2c3"},
    "AWS::ApiGateway::DomainName": {
        "Ref": "{name}",
        "RegionalDomainName": "d-abcdefghij.execute-api.{region}.amazonaws.com",
    },
    "AWS::ApiGateway::RestApi": {"Ref": "a1b2c3d4e5"},
    "AWS::ApiGateway::Stage": {"Ref": "{name}"},
    "AWS::CloudFront::CachePolicy": {"Ref": "{uuid}"},
    "AWS::CloudFront::Distribution": {"Ref": "E2QWRUHAPOMQZL", "DomainName": "d111111abcdef8.cloudfront.net"},
    "AWS::CloudFront::KeyGroup": {"Ref": "{uuid}"},
    "AWS::CloudFront::OriginAccessControl": {"Id": "E327GJI25M56DG"},
    "AWS::CloudFront::PublicKey": {"Ref": "K36X4X2EO997HM"},
    "AWS::CloudFront::ResponseHeadersPolicy": {"Id": "{uuid}"},
    "AWS::CloudWatch::Alarm": {"Arn": "arn:{partition}:cloudwatch:{region}:{account}:alarm:{name}"},
    "AWS::DynamoDB::Table": {
        "Ref": "{name}",
        "Arn": "arn:{partition}:dynamodb:{region}:{account}:table/{name}",
        "StreamArn": "arn:{partition}:dynamodb:{region}:{account}:table/{name}/stream/2026-01-01T00:00:00.000",
    },
    "AWS::Events::EventBus": {"Ref": "{name}", "Arn": "arn:{partition}:events:{region}:{account}:event-bus/{name}"},
    "AWS::Events::Rule": {"Ref": "{name}", "Arn": "arn:{partition}:events:{region}:{account}:rule/{name}"},
    "AWS::IAM::Policy": {"Ref": "{name}"},
    "AWS::IAM::Role": {"Ref": "{name}", "Arn": "arn:{partition}:iam::{account}:role/{name}"},
    "AWS::Lambda::Function": {
        "Ref": "{name}",
        "Arn": "arn:{partition}:lambda:{region}:{account}:function:{name}",
    },
    "AWS::Lambda::LayerVersion": {"Ref": "arn:{partition}:lambda:{region}:{account}:layer:{name}:1"},
    "AWS::Logs::LogGroup": {"Ref": "{name}", "Arn": "arn:{partition}:logs:{region}:{account}:log-group:{name}:*"},
    "AWS::S3::Bucket": {
        "Ref": "{lower}",
        "Arn": "arn:{partition}:s3:::{lower}",
        "RegionalDomainName": "{lower}.s3.{region}.amazonaws.com",
    },
    "AWS::SQS::Queue": {
        "Ref": "https://sqs.{region}.amazonaws.com/{account}/{name}",
        "Arn": "arn:{partition}:sqs:{region}:{account}:{name}",
        "QueueName": "{name}",
    },
    "AWS::SSM::Parameter": {"Ref": "{name}"},
    "AWS::Scheduler::ScheduleGroup": {"Ref": "{name}"},
    "AWS::SecretsManager::Secret": {
        "Ref": "arn:{partition}:secretsmanager:{region}:{account}:secret:{name}-abcdef",
        "Id": "arn:{partition}:secretsmanager:{region}:{account}:secret:{name}-abcdef",
    },
    "AWS::StepFunctions::StateMachine": {
        "Ref": "arn:{partition}:states:{region}:{account}:stateMachine:{name}",
        "Arn": "arn:{partition}:states:{region}:{account}:stateMachine:{name}",
        "Name": "{name}",
    },
}


@cache
def _forms() -> dict[tuple[str, str], str]:
    return {(kind, attribute): form for kind, forms in _FORMS.items() for attribute, form in forms.items()}


# Values of the parameters that turn every condition on, each the longest or nearly so.
EVERYTHING: dict[str, str] = {
    "CorsOrigin": "https://" + "a" * 60 + ".example.com",
    "DomainName": "ai." + "a" * 60 + ".example.com",
    "CertificateArn": f"arn:{PARTITION}:acm:{REGION}:{ACCOUNT}:certificate/{_UUID}",
    "ReplicateApiToken": "r8_" + "x" * 37,
    "OutputUrls": "cloudfront",
    "OutputUrlPublicKey": "-----BEGIN PUBLIC KEY-----\n" + ("A" * 64 + "\n") * 7 + "-----END PUBLIC KEY-----\n",
    "OutputUrlSecretArn": f"arn:{PARTITION}:secretsmanager:{REGION}:{ACCOUNT}:secret:{'s' * 40}-abcdef",
    "SourceBucketName": "s" * 63,
    "SourceKeyArn": f"arn:{PARTITION}:kms:{REGION}:{ACCOUNT}:key/{_UUID}",
    "ScheduleExpression": "cron(0 9 ? * MON-FRI *)",
    "ScheduleRequest": '{"model": "black-forest-labs/flux-schnell", "input": {"prompt": "a lighthouse"}}',
    "ProcessingEvents": "true",
    "UsageCounters": "true",
    "AlarmTopicArn": f"arn:{PARTITION}:sns:{REGION}:{ACCOUNT}:{'t' * 60}",
    "Tracing": "Active",
    "Dashboard": "true",
    "WebhookReservedConcurrency": "10",
    "StartReservedConcurrency": "10",
    "DeletionProtection": "true",
    "KmsKeyArn": f"arn:{PARTITION}:kms:{REGION}:{ACCOUNT}:key/{_UUID}",
    "PermissionsBoundaryArn": f"arn:{PARTITION}:iam::{ACCOUNT}:policy/{'b' * 128}",
    "QueueSenders": ",".join(f"AROAEXAMPLE{n:05d}=team-{n:04d}" for n in range(56)),
}
# And those that turn every condition off.
NOTHING: dict[str, str] = {
    "ReplicateTokenSecretArn": f"arn:{PARTITION}:secretsmanager:{REGION}:{ACCOUNT}:secret:replicate-abcdef",
    "Dashboard": "false",
    "DeletionProtection": "false",
}
# The parameters on which a condition rests, where they are more than one.
TOGETHER = (
    ("DomainName", "CertificateArn"),
    ("OutputUrls", "OutputUrlPublicKey", "OutputUrlSecretArn"),
    ("SourceBucketName", "SourceKeyArn"),
    ("ScheduleExpression", "ScheduleRequest"),
    ("ReplicateApiToken", "ReplicateTokenSecretArn"),
)


def combinations() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield parameters by a name: everything, nothing, and both with one group of parameters as in the other."""
    yield "everything", EVERYTHING
    yield "nothing", NOTHING
    grouped = {name for group in TOGETHER for name in group}
    groups = [*TOGETHER, *((name,) for name in (EVERYTHING | NOTHING) if name not in grouped)]
    for group in groups:
        for label, base, other in (("with", NOTHING, EVERYTHING), ("without", EVERYTHING, NOTHING)):
            rest = {name: value for name, value in base.items() if name not in group}
            yield f"{label} {group[0]}", rest | {name: other[name] for name in group if name in other}
    yield "SourceBucketName without SourceKeyArn", EVERYTHING | {"SourceKeyArn": ""}
    yield "defaults", {"ReplicateApiToken": EVERYTHING["ReplicateApiToken"]}
