"""The order of template.yaml, its anchors, the names of its statements, and its form after `sam build`."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import yaml

from tests.support import template
from tests.support.template import ROOT, load_template, resources

TEXT = (ROOT / "template.yaml").read_text()
LINES = TEXT.splitlines()
# At most this many lines: what repeats has an anchor.
LONGEST = 3200
RULER = "  # " + "=" * 117
FUNCTIONS = {
    "Shared": (),
    "API": ("AuthorizeRequest", "CallReplicate", "StoreFiles", "ServeFiles", "ServeConsole"),
    "Predictions": (
        "StartPrediction",
        "ReadPrediction",
        "ReadPredictions",
        "CancelPrediction",
        "SubmitPrediction",
        "PollPrediction",
        "ReceiveWebhook",
        "CopyOutputs",
        "SweepPredictions",
    ),
    "Intake": ("StartFromQueue", "RunPrediction"),
    "Recipes": ("ManageRecipes", "DeployRecipes"),
    "Batches": ("ManageBatches", "PrepareBatch", "FinishBatch"),
    "Pipelines": ("ManagePipelines", "AdvancePipeline"),
    "Notifications": ("PublishChanges", "GiveSecret", "DeliverWebhook"),
    "Operations": (),
}
# The functions that emit the stack's own metrics with an alarm; other functions emit those of a submission, too.
EMITTED_BY = {
    "CopiesFailed": "CopyOutputsFunction",
    "UpstreamRefusals": "SubmitPredictionFunction",
    "UpstreamThrottles": "SubmitPredictionFunction",
    "PaidTwice": "SubmitPredictionFunction",
    "ResubmissionStopped": "SubmitPredictionFunction",
    "UndecidableSubmissions": "SubmitPredictionFunction",
    "EndsByPoll": "PollPredictionFunction",
    "SecondsToEnd": "PollPredictionFunction",
    "WebhooksRejected": "ReceiveWebhookFunction",
    "Paused": "SweepPredictionsFunction",
    "ExecutionsReplaced": "SweepPredictionsFunction",
    "SecondsPastDeadline": "SweepPredictionsFunction",
    "ChangesDelayed": "PublishChangesFunction",
    "BudgetThresholds": "PublishChangesFunction",
}
# Alarms of more than one function, or of all.
OF_ALL = {"FunctionThrottlesAlarm", "FunctionErrorsAlarm"}


def sections() -> dict[str, list[str]]:
    """The resources of each section, in the order of the file."""
    found: dict[str, list[str]] = {}
    section = ""
    for before, line in pairwise(LINES[LINES.index("Resources:") : LINES.index("Outputs:")]):
        heading = re.fullmatch(r"  # (\d)\. (\w+)", line)
        if heading:
            assert before == RULER
            section = heading[2]
            found[section] = []
            assert len(found) == int(heading[1])
        elif resource := re.fullmatch(r"  (\w+):", line):
            assert section, f"{resource[1]} stands before the first section"
            found[section].append(resource[1])
    return found


SECTIONS = sections()
SECTION_OF = {name: section for section, names in SECTIONS.items() for name in names}


def references(value: Any) -> Iterator[str]:
    """The resources and parameters that a value refers to."""
    if isinstance(value, dict):
        if "Ref" in value:
            yield value["Ref"]
        elif "Fn::GetAtt" in value:
            yield value["Fn::GetAtt"][0]
        else:
            for each in value.values():
                yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def properties(kind: str) -> dict[str, Any]:
    return {name: found["Properties"] for name, found in resources(kind).items()}


def watched(alarm: dict[str, Any]) -> set[str]:
    """The resources whose metrics an alarm reads; functions for the stack's own metrics."""
    metrics = [each["MetricStat"]["Metric"] for each in alarm.get("Metrics", []) if "MetricStat" in each] or [alarm]
    found: set[str] = set()
    for metric in metrics:
        if metric["Namespace"] == "ReplicateServerless":
            found.add(EMITTED_BY[metric["MetricName"]])
        elif metric["Namespace"] == "AWS/ApiGateway":
            found.add("Api")
        else:
            found |= set(references(metric["Dimensions"]))
    return found


# -- order ---------------------------------------------------------------------------------------------------------


def test_template_is_of_readable_length() -> None:
    assert len(LINES) <= LONGEST


def test_table_of_contents_lists_the_sections_in_their_order() -> None:
    contents = re.findall(r"^#    (\d)\. (\w+)  +\S", TEXT[: TEXT.index("AWSTemplateFormatVersion")], re.MULTILINE)
    assert contents == [(str(number), name) for number, name in enumerate(SECTIONS, 1)]
    assert [*SECTIONS] == [*FUNCTIONS]


def test_every_resource_stands_in_one_section() -> None:
    counted = Counter(name for names in SECTIONS.values() for name in names)
    assert counted == Counter(load_template()["Resources"].keys())
    assert all(SECTIONS.values())


def test_function_stands_in_the_section_of_its_domain() -> None:
    placed = {name: SECTION_OF[name] for name in resources("AWS::Serverless::Function")}
    assert placed == {f"{name}Function": section for section, names in FUNCTIONS.items() for name in names}


@pytest.mark.parametrize("name", sorted(resources("AWS::CloudWatch::Alarm").keys() - OF_ALL))
def test_alarm_stands_in_the_section_of_its_function(name: str) -> None:
    seen = watched(properties("AWS::CloudWatch::Alarm")[name])
    assert seen
    assert {SECTION_OF[each] for each in seen} == {SECTION_OF[name]}


def test_alarms_of_all_functions_stand_with_the_operations() -> None:
    assert {SECTION_OF[name] for name in OF_ALL} == {"Operations"}


def test_machine_and_its_log_stand_with_the_functions_of_its_states() -> None:
    for name, machine in properties("AWS::Serverless::StateMachine").items():
        functions = {each for each in references(machine["DefinitionSubstitutions"]) if each.endswith("Function")}
        assert functions
        for part in functions | set(references(machine["Logging"])):
            assert SECTION_OF[part] == SECTION_OF[name], part


def test_queue_stands_with_its_consumer_and_dead_letters_with_what_failed() -> None:
    sources = properties("AWS::Lambda::EventSourceMapping")
    home = {each: name for name, source in sources.items() for each in references(source["EventSourceArn"])}
    for name, source in sources.items():
        (function,) = references(source["FunctionName"])
        assert SECTION_OF[name] == SECTION_OF[function]
    queues = properties("AWS::SQS::Queue")
    for name, queue in queues.items():
        if name in home:
            assert SECTION_OF[name] == SECTION_OF[home[name]]
        for dead_letters in references(queue.get("RedrivePolicy")):
            assert SECTION_OF[dead_letters] == SECTION_OF[name]
    for name, function in properties("AWS::Serverless::Function").items():
        for dead_letters in references(function.get("EventInvokeConfig")):
            assert SECTION_OF[dead_letters] == SECTION_OF[name]


# -- statements ----------------------------------------------------------------------------------------------------


def documents(value: Any) -> Iterator[list[dict[str, Any]]]:
    """The statements of each policy document, as the template has them."""
    if isinstance(value, dict):
        if isinstance(value.get("Statement"), list):
            yield [each["Fn::If"][1] if "Fn::If" in each else each for each in value["Statement"]]
        for each in value.values():
            yield from documents(each)
    elif isinstance(value, list):
        for each in value:
            yield from documents(each)


def test_every_statement_has_a_name_of_its_own_in_its_policy() -> None:
    found = [*documents(load_template())]
    assert len(found) > len(resources("AWS::Serverless::Function"))
    for statements in found:
        names = [statement["Sid"] for statement in statements]
        # https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_elements_sid.html
        assert all(re.fullmatch(r"[A-Za-z0-9]+", name) for name in names)
        assert len(names) == len(set(names)), names


# -- YAML ----------------------------------------------------------------------------------------------------------


def mappings(node: yaml.Node, seen: set[int]) -> Iterator[yaml.MappingNode]:
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from mappings(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from mappings(value, seen)


def test_no_mapping_has_a_key_twice() -> None:
    # cfn-lint does not see it in a mapping with a merge.
    checked = 0
    root = yaml.compose(TEXT, yaml.SafeLoader)
    assert root
    for mapping in mappings(root, set()):
        keys = [key.value for key, _ in mapping.value]
        assert len(keys) == len(set(keys)), (mapping.start_mark.line + 1, keys)
        checked += 1
    assert checked > len(load_template()["Resources"])


def test_every_anchor_is_used_again() -> None:
    tokens = [*yaml.scan(TEXT, yaml.SafeLoader)]
    anchors = Counter(token.value for token in tokens if isinstance(token, yaml.AnchorToken))
    assert set(anchors.values()) == {1}
    assert {token.value for token in tokens if isinstance(token, yaml.AliasToken)} == anchors.keys()


def test_template_that_sam_writes_has_no_alias_or_merge_and_is_the_same() -> None:
    # What `sam build` and `sam package` read and write templates with; tests/stack looks at the file that was built.
    # In a process of its own: samcli changes yaml.SafeLoader for all of a process.
    program = "import sys; from samcli.yamlhelper import *; print(yaml_dump(yaml_parse(sys.stdin.read())))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, input=TEXT, capture_output=True, text=True, check=True)  # noqa: S603  # our own
    built = done.stdout
    assert not [token for token in yaml.scan(built) if isinstance(token, (yaml.AliasToken, yaml.AnchorToken))]
    assert "<<:" not in built
    assert yaml.load(built, template._Loader) == load_template()  # noqa: S506  # a SafeLoader
