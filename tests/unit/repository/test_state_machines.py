import copy
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from jsonata.jsonata import Jsonata
from moto.stepfunctions.parser.asl.static_analyser.static_analyser import StaticAnalyser
from predictions import errors
from predictions.intents.model import LIFETIME_LIMIT_SECONDS
from predictions.pipelines.definition import FAN_OUTS_LIMIT, ITEMS_LIMIT, STEPS_LIMIT
from predictions.pipelines.manage import LIFETIME_SECONDS

from local.opinions.machines import EXPRESSIONS, expression_cases
from tests.support.template import ROOT, listed, load_template, resources, statements

DEFINITIONS = sorted((ROOT / "statemachine").glob("*.asl.json"))
PLACEHOLDER = re.compile(r"\$\{(\w+)\}")

# Names that AWS gives to errors; every other one is the class name of an exception in `predictions.errors`.
# Step Functions' own, but for those that a retry must not name here.
# https://docs.aws.amazon.com/step-functions/latest/dg/concepts-error-handling.html
STATES_ERRORS = {
    f"States.{name}"
    for name in (
        "DataLimitExceeded",
        "ExceedToleratedFailureThreshold",
        "HeartbeatTimeout",
        "ItemReaderFailed",
        "Permissions",
        "QueryEvaluationError",
        "ResultWriterFailed",
        "Timeout",
    )
}
# Lambda's, as its optimized integration names them, and those of a function whose process ended.
# https://docs.aws.amazon.com/step-functions/latest/dg/bp-lambda-serviceexception.html
# https://docs.aws.amazon.com/lambda/latest/dg/troubleshooting-invocation.html
LAMBDA_ERRORS = {
    *(
        f"Lambda.{name}"
        for name in (
            "AWSLambdaException",
            "ClientExecutionTimeoutException",
            "SdkClientException",
            "ServiceException",
            "TooManyRequestsException",
            "Unknown",
        )
    ),
    "Runtime.ExitError",
    "Runtime.OutOfMemory",
    "Sandbox.Timedout",
}
# The optimized integration of SQS has the names of the older SDK.
# https://docs.aws.amazon.com/step-functions/latest/dg/connect-sqs.html
SQS_ERRORS = {"SQS.AmazonSQSException", "SQS.SdkClientException"}


@cache
def sdk_errors(service: str, operation: str) -> set[str]:
    """The names of the errors of an `aws-sdk` integration, by botocore's model of its operation.

    A name is that of the service in PascalCase, and that of the error with `Exception` at its end, also if the service
    names it without: https://docs.aws.amazon.com/step-functions/latest/dg/supported-services-awssdk.html. Those of the
    SDK itself come on top: the one for what has no name of its own, and the one for what never reached the service.
    """
    model = botocore.session.Session().get_service_model(service)
    prefix = "".join(part.capitalize() for part in re.findall(r"[A-Z][a-z]+|[A-Z0-9]+", model.service_id))
    shapes = [shape.name for shape in model.operation_model(operation).error_shapes]
    names = [name if name.endswith("Exception") else f"{name}Exception" for name in shapes]
    return {f"{prefix}.{name}" for name in (*names, f"{prefix}Exception", "SdkClientException")}


def possible_errors(resource: str) -> set[str]:
    """The names of AWS's errors that a state with this resource can meet."""
    _, _, integration = resource.partition(":states:::")
    service = integration.removesuffix(".waitForTaskToken")
    if service.startswith("aws-sdk:"):
        _, name, operation = service.split(":")
        return STATES_ERRORS | sdk_errors(name, operation[0].upper() + operation[1:])
    return STATES_ERRORS | {"lambda:invoke": LAMBDA_ERRORS, "sqs:sendMessage": SQS_ERRORS}.get(service, set())


# The action that a role needs for each resource that a state names.
ACTIONS = {
    "lambda:invoke": "lambda:InvokeFunction",
    "aws-sdk:dynamodb:updateItem.waitForTaskToken": "dynamodb:UpdateItem",
    "sqs:sendMessage.waitForTaskToken": "sqs:SendMessage",
}
# What a Distributed Map does by itself: reads items, writes results, starts children and looks after them.
# https://docs.aws.amazon.com/step-functions/latest/dg/iam-policies-eg-dist-map.html
DISTRIBUTED_MAP_ACTIONS = {
    "s3:GetObject",
    "s3:PutObject",
    "s3:ListMultipartUploadParts",
    "s3:AbortMultipartUpload",
    "states:StartExecution",
    "states:DescribeExecution",
    "states:StopExecution",
}


MACHINES = sorted(resources("AWS::Serverless::StateMachine"))
"""By their logical ids: several may have one definition."""


def properties_of(machine: str) -> dict[str, Any]:
    """The state machine's properties in the template."""
    found: dict[str, Any] = resources("AWS::Serverless::StateMachine")[machine]["Properties"]
    return found


def path_of(machine: str) -> Path:
    """The file of its definition."""
    return ROOT / str(properties_of(machine)["DefinitionUri"])


def definition_of(machine: str) -> dict[str, Any]:
    """The definition as CloudFormation makes it, numbers from the parameters' defaults and `{Name}` for the rest."""
    substitutions = properties_of(machine)["DefinitionSubstitutions"]
    parameters = load_template()["Parameters"]

    def value(match: re.Match[str]) -> str:
        given = substitutions[match[1]]
        if isinstance(given, str):
            return given
        default = parameters.get(given.get("Ref"), {}).get("Default")
        return str(default) if isinstance(default, int) else f"{{{match[1]}}}"

    definition: dict[str, Any] = json.loads(PLACEHOLDER.sub(value, path_of(machine).read_text()))
    return definition


def graphs(definition: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A machine, and those that its Maps run for each item: each has `StartAt` and `States` of its own."""
    yield definition
    for state in definition["States"].values():
        if state["Type"] == "Map":
            yield from graphs(state["ItemProcessor"])


def states_of(machine: str) -> dict[str, dict[str, Any]]:
    """All states of a machine, those inside its Maps too."""
    return {name: state for graph in graphs(definition_of(machine)) for name, state in graph["States"].items()}


def arguments(state: dict[str, Any]) -> dict[str, Any]:
    """What a task is given, in JSONata or JSONPath."""
    given: dict[str, Any] = state.get("Arguments") or state["Parameters"]
    return given


def targets(state: dict[str, Any]) -> list[str]:
    found = [state.get("Next"), state.get("Default")]
    found += [branch["Next"] for branch in (*state.get("Choices", []), *state.get("Catch", []))]
    return [name for name in found if name]


def error_names(state: dict[str, Any]) -> list[str]:
    return [name for rule in (*state.get("Retry", []), *state.get("Catch", [])) for name in rule["ErrorEquals"]]


def expressions(value: Any) -> Iterator[str]:
    """Every text inside a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from expressions(each)
    elif isinstance(value, list):
        for each in value:
            yield from expressions(each)


CASES = [
    pytest.param(machine, name, state, id=f"{machine.removesuffix('StateMachine')}-{name}")
    for machine in MACHINES
    for name, state in states_of(machine).items()
]
JSONATA = [case for case in CASES if definition_of(case.values[0])["QueryLanguage"] == "JSONata"]  # type: ignore[arg-type]  # the machine
TASKS = [case for case in CASES if case.values[2]["Type"] == "Task"]  # type: ignore[index]  # the state

every_machine = pytest.mark.parametrize("machine", MACHINES)
every_state = pytest.mark.parametrize(("machine", "name", "state"), CASES)
every_jsonata_state = pytest.mark.parametrize(("machine", "name", "state"), JSONATA)
every_task = pytest.mark.parametrize(("machine", "name", "state"), TASKS)


# -- refused -------------------------------------------------------------------------------------------------------


@every_state
def test_no_state_catches_or_retries_everything(machine: str, name: str, state: dict[str, Any]) -> None:
    assert not {"States.ALL", "States.TaskFailed"} & set(error_names(state))


@every_state
def test_error_that_is_caught_or_retried_exists(machine: str, name: str, state: dict[str, Any]) -> None:
    for error in error_names(state):
        assert exists(error, state)


def exists(error: str, state: dict[str, Any]) -> bool:
    """Whether a state can meet an error: one of AWS's, of the function that it invokes, or that is sent to it."""
    if error in possible_errors(state.get("Resource", "")):
        return True
    if error == errors.OutputsToCopy.__name__:
        return bool(state.get("Resource", "").endswith(":dynamodb:updateItem.waitForTaskToken"))
    own = getattr(errors, error, None) if state.get("Resource", "").endswith("lambda:invoke") else None
    return isinstance(own, type) and issubclass(own, errors.PredictionsError)


@pytest.mark.parametrize(
    ("resource", "error"),
    [
        ("aws-sdk:dynamodb:updateItem.waitForTaskToken", "DynamoDb.ConditionalCheckFailed"),
        ("aws-sdk:dynamodb:updateItem.waitForTaskToken", "DynamoDB.ConditionalCheckFailedException"),
        ("aws-sdk:dynamodb:updateItem.waitForTaskToken", "DynamoDb.InternalServerError"),
        ("aws-sdk:dynamodb:updateItem.waitForTaskToken", "DynamoDb.TransactionCanceledException"),
        ("aws-sdk:dynamodb:updateItem.waitForTaskToken", "Lambda.ServiceException"),
        ("aws-sdk:dynamodb:updateItem.waitForTaskToken", "CopyInterrupted"),
        ("lambda:invoke", "OutputsToCopy"),
        ("lambda:invoke", "Lambda.TooManyRequestException"),
        ("lambda:invoke", "States.TimeOut"),
        ("lambda:invoke", "CopyInterupted"),
        ("sqs:sendMessage.waitForTaskToken", "Sqs.SdkClientException"),
    ],
)
def test_misspelled_error_or_one_of_another_service_does_not_exist(resource: str, error: str) -> None:
    assert not exists(error, {"Resource": f"arn:{{Partition}}:states:::{resource}"})


def test_errors_of_sdk_integrations_have_the_names_that_aws_documents() -> None:
    # The two examples of the page, and one of the errors that DynamoDB names without the suffix.
    assert "AcmPca.ResourceNotFoundException" in sdk_errors("acm-pca", "DeleteCertificateAuthority")
    assert "S3.BucketAlreadyExistsException" in sdk_errors("s3", "CreateBucket")
    assert "DynamoDb.RequestLimitExceededException" in sdk_errors("dynamodb", "UpdateItem")


@every_jsonata_state
def test_state_carries_ids_and_waiting_times_only(machine: str, name: str, state: dict[str, Any]) -> None:
    outputs = [
        state.get("Output"),
        *(rule.get("Output") for rule in (*state.get("Catch", []), *state.get("Choices", []))),
    ]
    caught = [rule for rule in state.get("Catch", []) if "Output" not in rule]
    assert not caught, "without Output a Catch hands on the error and its cause"
    assert state["Type"] == "Choice" or state.get("Output"), "without Output a state hands on all that it was given"
    for output in filter(None, outputs):
        assert output.keys() <= {"id", "wait_seconds", "done", "seen"}
        assert output["id"] == "{% $states.input.id %}"


# -- structure -----------------------------------------------------------------------------------------------------


@every_machine
def test_definition_is_a_machine_in_one_language_that_the_template_deploys(machine: str) -> None:
    definition = definition_of(machine)
    # The local cloud does not evaluate JSONata in the ItemReader of a Distributed Map.
    reads_items = any("ItemReader" in state for state in definition["States"].values())
    assert definition["QueryLanguage"] == ("JSONPath" if reads_items else "JSONata")
    assert properties_of(machine)["Type"] == "STANDARD"  # Express machines end after five minutes and wait for no token
    assert not [state for state in states_of(machine).values() if "QueryLanguage" in state]


@every_machine
def test_every_target_exists_and_every_state_is_reached(machine: str) -> None:
    for graph in graphs(definition_of(machine)):
        states = graph["States"]
        reached: set[str] = set()
        waiting = [graph["StartAt"]]
        while waiting:
            name = waiting.pop()
            assert name in states
            if name not in reached:
                reached.add(name)
                waiting += targets(states[name])
        assert reached == states.keys()


@every_machine
def test_every_state_can_come_to_an_end(machine: str) -> None:
    for graph in graphs(definition_of(machine)):
        states = graph["States"]
        ending = {name for name, state in states.items() if state.get("End") or state["Type"] in ("Succeed", "Fail")}
        grown = True
        while grown:
            more = {name for name, state in states.items() if ending & set(targets(state))} - ending
            ending |= more
            grown = bool(more)
        assert ending == states.keys()


@every_machine
def test_placeholders_are_the_substitutions_of_the_template(machine: str) -> None:
    used = set(PLACEHOLDER.findall(path_of(machine).read_text()))
    assert used == properties_of(machine)["DefinitionSubstitutions"].keys()


@every_task
def test_task_ends_by_itself(machine: str, name: str, state: dict[str, Any]) -> None:
    # A constant: without one a task may run for a year.
    assert isinstance(state["TimeoutSeconds"], int)
    assert state["TimeoutSeconds"] > 0


@every_task
def test_task_allows_its_function_to_use_all_its_time(machine: str, name: str, state: dict[str, Any]) -> None:
    if state["Resource"].endswith(":lambda:invoke"):
        function = load_template()["Resources"][f"{name}Function"]["Properties"]
        assert arguments(state)["FunctionName"] == f"{{{name}FunctionArn}}"
        assert function["Timeout"] < state["TimeoutSeconds"] <= function["Timeout"] + 60
        substitutions = properties_of(machine)["DefinitionSubstitutions"]
        assert substitutions[f"{name}FunctionArn"] == {"Fn::GetAtt": [f"{name}Function", "Arn"]}


def used_by(machine: str, state: dict[str, Any]) -> tuple[str, Any]:
    """The action that a task takes, and on what, as the role names it."""
    (used,) = [arguments(state)[key] for key in ("FunctionName", "TableName", "QueueUrl") if key in arguments(state)]
    substituted = properties_of(machine)["DefinitionSubstitutions"][used.strip("{}")]
    # A table or a queue is named in the machine and given by its ARN in the role.
    wanted = {"Fn::GetAtt": [substituted["Ref"], "Arn"]} if "Ref" in substituted else substituted
    return ACTIONS[state["Resource"].partition(":states:::")[2]], wanted


@every_task
def test_role_may_do_what_the_task_does(machine: str, name: str, state: dict[str, Any]) -> None:
    action, wanted = used_by(machine, state)
    granted = [each for each in statements(machine) if action in listed(each["Action"])]
    (found,) = [each for each in granted if wanted in listed(each["Resource"])]
    if key := arguments(state).get("Key"):
        # Of the table, the items of its own kind only: `{% 'prediction#' & … %}`.
        (pattern,) = found["Condition"]["ForAllValues:StringLike"]["dynamodb:LeadingKeys"]
        assert key["pk"]["S"].startswith(f"{{% '{pattern.removesuffix('*')}' & ")


@every_machine
def test_role_may_do_nothing_that_no_task_does(machine: str) -> None:
    states = states_of(machine).values()
    needed = {ACTIONS[state["Resource"].partition(":states:::")[2]] for state in states if state["Type"] == "Task"}
    if any(state["Type"] == "Map" for state in states):
        needed |= DISTRIBUTED_MAP_ACTIONS
    allowed = {action for statement in statements(machine) for action in listed(statement["Action"])}
    # What Step Functions itself does with logs and traces.
    assert {action for action in allowed if not action.startswith(("logs:", "xray:"))} == needed


@every_machine
def test_role_names_nothing_that_no_task_uses(machine: str) -> None:
    used = [used_by(machine, state) for state in states_of(machine).values() if state["Type"] == "Task"]
    for statement in statements(machine):
        for action in set(listed(statement["Action"])) & set(ACTIONS.values()):
            assert [each for each in listed(statement["Resource"]) if (action, each) not in used] == []


@every_state
def test_state_that_waits_retries_or_catches_says_how_long(machine: str, name: str, state: dict[str, Any]) -> None:
    if state["Type"] == "Wait" or state.get("Retry") or state.get("Catch"):
        assert re.search(r"\d+ s\b", state["Comment"])
    for retry in state.get("Retry", []):
        seconds = total_wait_seconds(retry)
        assert f"= {seconds} s" in state["Comment"]


def total_wait_seconds(retry: dict[str, Any]) -> int:
    waits = [retry["IntervalSeconds"] * retry["BackoffRate"] ** n for n in range(retry["MaxAttempts"])]
    return int(sum(min(wait, retry.get("MaxDelaySeconds", wait)) for wait in waits))


@every_task
def test_task_retries_every_fault_of_aws_that_passes(machine: str, name: str, state: dict[str, Any]) -> None:
    # https://docs.aws.amazon.com/step-functions/latest/dg/bp-lambda-serviceexception.html
    retried = {error for rule in state["Retry"] for error in rule["ErrorEquals"]}
    if state["Resource"].endswith(":lambda:invoke"):
        names = ("ClientExecutionTimeout", "Service", "AWSLambda", "SdkClient", "TooManyRequests")
        assert {f"Lambda.{each}Exception" for each in names} <= retried
    elif "dynamodb" in state["Resource"]:
        assert {"DynamoDb.DynamoDbException", "DynamoDb.SdkClientException"} <= retried
    else:
        assert {"SQS.SdkClientException", "SQS.AmazonSQSException"} <= retried


@every_state
def test_expressions_are_whole_values(machine: str, name: str, state: dict[str, Any]) -> None:
    # `a {% b %}` is not evaluated and would be sent as it stands.
    for each in expressions({key: value for key, value in state.items() if key != "Comment"}):
        assert "{%" not in each or re.fullmatch(r"\{% .* %\}", each)
        assert each.count("{%") == each.count("%}") <= 1


# -- second opinions -----------------------------------------------------------------------------------------------


def analysed(definition: dict[str, Any]) -> None:
    """Have LocalStack's parser, of which moto has a copy, read a definition; raises if it cannot.

    Its only gap is younger than the copy: it does not know the format JSONL of items.
    """
    text = json.dumps(definition)
    assert text.count('"InputType": "JSONL"') == (1 if "RunLines" in definition["States"] else 0)
    StaticAnalyser().analyse(text.replace('"InputType": "JSONL"', '"InputType": "JSON"'))


@every_machine
def test_definition_is_read_by_a_parser_that_is_not_ours(machine: str) -> None:
    analysed(definition_of(machine))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('"Type": "Task"', '"Type": "Tusk"'),
        ('"TimeoutSeconds": 70', '"TimeoutSeconds": "70"'),
        ('"ErrorEquals": ["States.Timeout"]', '"ErrorEquals": "States.Timeout"'),
        ('"End": true', '"End": 1'),
        ('"QueryLanguage": "JSONata"', '"QueryLanguage": "JSONPath"'),
        ('"StartAt": "SubmitPrediction", ', ""),
    ],
)
def test_fault_in_a_definition_is_noticed_by_that_parser(right: str, wrong: str) -> None:
    text = json.dumps(definition_of("TrackPredictionStateMachine"))
    assert right in text
    with pytest.raises(Exception, match=r".+"):
        analysed(json.loads(text.replace(right, wrong)))


def test_every_jsonata_expression_has_cases() -> None:
    definitions = [path.read_text() for path in DEFINITIONS]
    found = {each for text in definitions for each in re.findall(r'"\{% (.*?) %\}"', text)}
    assert {each["expression"] for each in json.loads(EXPRESSIONS.read_text())} == found


@pytest.mark.parametrize("case", list(expression_cases()), ids=lambda case: case["text"])
def test_expression_has_its_value_in_jsonata_python(case: dict[str, Any]) -> None:
    # `make audit` holds JSONata's own implementation to the same cases.
    expression = Jsonata(case["text"])
    frame = expression.create_frame()
    frame.bind("states", case["states"])
    frame.bind("parse", Jsonata.JLambda(json.loads))
    if "millis" in case:
        frame.bind("millis", Jsonata.JLambda(lambda: case["millis"]))
    value = expression.evaluate(None, frame)
    assert (value, isinstance(value, bool)) == (case["value"], isinstance(case["value"], bool))


# -- track_prediction ----------------------------------------------------------------------------------------------


@pytest.fixture
def states() -> dict[str, Any]:
    states: dict[str, Any] = definition_of("TrackPredictionStateMachine")["States"]
    return states


def caught(state: dict[str, Any], error: str) -> str:
    (name,) = [rule["Next"] for rule in state["Catch"] if error in rule["ErrorEquals"]]
    return str(name)


def test_submitted_prediction_ends_by_webhook_in_one_state_and_with_files_in_two(states: dict[str, Any]) -> None:
    assert definition_of("TrackSubmittedStateMachine") == definition_of("TrackPredictionStateMachine") | {
        "StartAt": "AwaitWebhook"
    }
    assert states["AwaitWebhook"]["End"] is True
    assert caught(states["AwaitWebhook"], errors.OutputsToCopy.__name__) == "CopyOutputs"
    assert states["CopyOutputs"]["End"] is True


def test_prediction_that_was_only_written_down_enters_one_state_more(states: dict[str, Any]) -> None:
    assert definition_of("TrackPredictionStateMachine")["StartAt"] == "SubmitPrediction"
    assert states["SubmitPrediction"]["Next"] == "AwaitWebhook"


def test_machines_of_one_definition_differ_in_name_and_first_state_only() -> None:
    different = ("Name", "DefinitionSubstitutions")
    first, second = (
        {name: value for name, value in properties_of(machine).items() if name not in different}
        for machine in ("TrackPredictionStateMachine", "TrackSubmittedStateMachine")
    )
    assert first == second


def test_what_wakes_executions_is_updated_before_them() -> None:
    # Else a new execution may be woken by an old function, which does not know the error that leads to the copy.
    for machine in ("TrackPredictionStateMachine", "TrackSubmittedStateMachine"):
        wakers = set(load_template()["Resources"][machine]["DependsOn"])
        assert wakers == {"ReceiveWebhookFunction", "ReadPredictionFunction", "CancelPredictionFunction"}
    # And what starts executions after their machine is there.
    functions = load_template()["Resources"].items()
    starting = {name for name, found in functions if found.get("DependsOn") == "TrackSubmittedStateMachine"}
    assert starting == {"StartPredictionFunction", "RunPredictionFunction", "SweepPredictionsFunction"}


def test_error_that_wakes_an_execution_is_not_logged_as_a_fault() -> None:
    assert properties_of("TrackSubmittedStateMachine")["Logging"]["Level"] == "FATAL"
    assert properties_of("RunBatchStateMachine")["Logging"]["Level"] == "ERROR"


@pytest.mark.parametrize("name", ["AwaitWebhook", "AwaitWebhookAgain"])
def test_wait_that_ends_without_a_webhook_costs_two_states_a_poll(states: dict[str, Any], name: str) -> None:
    assert caught(states[name], "States.Timeout") == "PollPrediction"
    assert states["PollPrediction"]["Next"] == "AwaitWebhookAgain"


@pytest.mark.parametrize("name", ["AwaitWebhook", "AwaitWebhookAgain"])
def test_prediction_that_has_ended_is_not_waited_for(states: dict[str, Any], name: str) -> None:
    state = states[name]
    # An item that is not there has no `execution_arn`.
    assert state["Arguments"]["ConditionExpression"] == "execution_arn = :execution AND #rank < :terminal"
    assert state["Arguments"]["ExpressionAttributeValues"][":terminal"] == {"N": "9"}
    assert caught(state, "DynamoDb.ConditionalCheckFailedException") == "CopyOutputs"


@pytest.mark.parametrize("name", ["AwaitWebhook", "AwaitWebhookAgain"])
def test_execution_that_the_item_does_not_name_does_not_wait(states: dict[str, Any], name: str) -> None:
    values = states[name]["Arguments"]["ExpressionAttributeValues"]
    assert values[":execution"] == {"S": "{% $states.context.Execution.Id %}"}


@pytest.mark.parametrize("name", ["AwaitWebhook", "AwaitWebhookAgain"])
def test_wait_tells_that_it_catches_the_error_by_which_it_is_woken(states: dict[str, Any], name: str) -> None:
    arguments = states[name]["Arguments"]
    assert "wake = :wake" in arguments["UpdateExpression"]
    assert arguments["ExpressionAttributeValues"][":wake"] == {"S": "v2"}
    assert caught(states[name], "OutputsToCopy") == "CopyOutputs"


def test_waits_differ_in_their_time_only(states: dict[str, Any]) -> None:
    different = ("Comment", "TimeoutSeconds")
    first, later = (
        {key: copy.deepcopy(value) for key, value in states[name].items() if key not in different}
        for name in ("AwaitWebhook", "AwaitWebhookAgain")
    )
    for state, name in ((first, "AwaitWebhook"), (later, "AwaitWebhookAgain")):
        # The sweep looks two minutes after the wait is over.
        check = state["Arguments"]["ExpressionAttributeValues"].pop(":next_check_at")["N"]
        assert check == f"{{% $string($floor($millis() / 1000) + {states[name]['TimeoutSeconds']} + 120) %}}"
    assert first == later
    defaults = load_template()["Parameters"]
    assert states["AwaitWebhook"]["TimeoutSeconds"] == defaults["FirstPollSeconds"]["Default"]
    assert states["AwaitWebhookAgain"]["TimeoutSeconds"] == defaults["PollSeconds"]["Default"]


@pytest.mark.parametrize("name", ["SubmitPrediction", "PollPrediction"])
def test_throttled_prediction_waits_for_its_turn_and_is_submitted_again(states: dict[str, Any], name: str) -> None:
    assert caught(states[name], "PredictionThrottled") == "WaitForTurn"
    assert states["WaitForTurn"]["Next"] == "SubmitPrediction"
    # The message of the error is read as a number of seconds.
    assert str(errors.PredictionThrottled(7)) == "7"


def test_interrupted_copy_is_tried_until_replicate_removes_the_files(states: dict[str, Any]) -> None:
    (retry,) = [rule for rule in states["CopyOutputs"]["Retry"] if "CopyInterrupted" in rule["ErrorEquals"]]
    assert 45 * 60 <= total_wait_seconds(retry) <= 60 * 60
    assert "JitterStrategy" not in retry  # full jitter would halve that time


def test_throttled_copy_is_tried_until_replicate_removes_the_files(states: dict[str, Any]) -> None:
    (retry,) = [
        rule for rule in states["CopyOutputs"]["Retry"] if "Lambda.TooManyRequestsException" in rule["ErrorEquals"]
    ]
    assert retry["ErrorEquals"] == ["Lambda.TooManyRequestsException"], "the other faults are tried less long"
    assert 45 * 60 <= total_wait_seconds(retry) <= 60 * 60


def test_functions_are_given_ids_only(states: dict[str, Any]) -> None:
    payloads = {
        name: state["Arguments"]["Payload"] for name, state in states.items() if "Payload" in state.get("Arguments", {})
    }
    assert payloads == {
        "SubmitPrediction": {"id": "{% $states.input.id %}"},
        "PollPrediction": {"id": "{% $states.input.id %}"},
        "CopyOutputs": {
            "id": "{% $states.input.id %}",
            "execution": "{% $states.context.Execution.Name %}",
        },
    }


# -- run_pipeline --------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline_states() -> dict[str, Any]:
    states: dict[str, Any] = definition_of("RunPipelineStateMachine")["States"]
    return states


@pytest.mark.parametrize("error", ["DynamoDb.ConditionalCheckFailedException", "States.Timeout"])
def test_pipeline_is_looked_at_again_however_the_wait_ends(pipeline_states: dict[str, Any], error: str) -> None:
    assert caught(pipeline_states["AwaitStep"], error) == "AdvancePipeline"
    assert pipeline_states["AwaitStep"]["Next"] == "AdvancePipeline"


def test_pipeline_waits_only_while_nothing_has_ended_since_it_was_looked_at(pipeline_states: dict[str, Any]) -> None:
    arguments = pipeline_states["AwaitStep"]["Arguments"]
    assert arguments["ConditionExpression"] == "#status = :running AND #events = :seen"
    values = arguments["ExpressionAttributeValues"]
    assert values[":seen"] == {"N": "{% $string($states.input.seen) %}"}
    # The sweep looks two minutes after the wait is over.
    check = f"{{% $string($floor($millis() / 1000) + {pipeline_states['AwaitStep']['TimeoutSeconds']} + 120) %}}"
    assert values[":next_check_at"] == {"N": check}


def test_pipeline_ends_only_when_its_function_says_so(pipeline_states: dict[str, Any]) -> None:
    (choice,) = pipeline_states["IsDone"]["Choices"]
    assert (choice["Condition"], choice["Next"]) == ("{% $states.input.done = true %}", "Done")
    assert pipeline_states["AdvancePipeline"]["Arguments"]["Payload"] == {"id": "{% $states.input.id %}"}


def test_history_holds_the_largest_pipeline_that_takes_as_long_as_it_may(pipeline_states: dict[str, Any]) -> None:
    # A turn: a task that is entered, scheduled, started, succeeded and left; a choice; a task that waits.
    events_of_a_turn = 5 + 2 + 6
    predictions = (STEPS_LIMIT - FAN_OUTS_LIMIT) + FAN_OUTS_LIMIT * ITEMS_LIMIT
    polls = LIFETIME_SECONDS // pipeline_states["AwaitStep"]["TimeoutSeconds"]
    assert (predictions + polls) * events_of_a_turn < 25_000


# -- run_batch -----------------------------------------------------------------------------------------------------


@pytest.fixture
def batch() -> dict[str, Any]:
    return states_of("RunBatchStateMachine")


def test_lines_are_counted_by_their_children_and_hand_nothing_on(batch: dict[str, Any]) -> None:
    lines = batch["RunLines"]
    assert lines["ItemProcessor"]["ProcessorConfig"] == {"Mode": "DISTRIBUTED", "ExecutionType": "STANDARD"}
    # However many lines there are: the children's results are `{}` in an object, and the state's own is dropped.
    assert (batch["RunLine"]["OutputPath"], lines["ResultPath"]) == (None, None)
    assert lines["ResultWriter"]["Parameters"] == {"Bucket": "{OutputsBucketName}", "Prefix": "payloads/batches/runs"}
    assert all(rule["ResultPath"] is None for rule in lines["Catch"])


def test_line_is_sent_by_numbers_only_and_with_its_token(batch: dict[str, Any]) -> None:
    message = batch["RunLine"]["Parameters"]["MessageBody"]
    assert message.keys() == {f"{name}.$" for name in ("batch_id", "attempt", "n", "offset", "length", "task_token")}
    assert message["task_token.$"] == "$$.Task.Token"


def test_line_is_waited_for_longer_than_its_prediction_can_take(batch: dict[str, Any]) -> None:
    assert batch["RunLine"]["TimeoutSeconds"] >= 2 * LIFETIME_LIMIT_SECONDS + 24 * 3600


def test_batch_with_too_many_failing_lines_is_finished_too(batch: dict[str, Any]) -> None:
    assert caught(batch["RunLines"], "States.ExceedToleratedFailureThreshold") == "LinesExceeded"
    assert batch["LinesExceeded"]["Parameters"]["exceeded"] is True
    assert batch["LinesExceeded"]["Next"] == batch["LinesDone"]["Next"] == "FinishBatch"


def test_distributed_map_may_start_its_own_machine_only() -> None:
    machine = load_template()["Resources"]["RunBatchStateMachine"]["Properties"]["Name"]["Fn::Sub"]
    named = [each["Resource"] for each in statements("RunBatchStateMachine") if "states:" in str(each)]
    on_machines = [[at["Fn::Sub"] for at in each] if isinstance(each, list) else each["Fn::Sub"] for each in named]
    prefix = "arn:${AWS::Partition}:states:${AWS::Region}:${AWS::AccountId}"
    # Executions by the form in AWS's own example, and by that of a child's ARN.
    executions = [f"{prefix}:execution:{machine}:*", f"{prefix}:execution:{machine}/*"]
    assert on_machines == [f"{prefix}:stateMachine:{machine}", executions]


def test_functions_of_a_batch_are_given_ids_and_numbers_only(batch: dict[str, Any]) -> None:
    payloads = {name: batch[name]["Parameters"]["Payload"].keys() for name in ("PrepareBatch", "FinishBatch")}
    assert payloads == {
        "PrepareBatch": {"id.$", "attempt.$"},
        "FinishBatch": {"id.$", "attempt.$", "exceeded.$", "lap.$"},
    }
