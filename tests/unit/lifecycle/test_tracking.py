"""Which execution tracks a prediction, in which of the two state machines, and how it is woken."""

import json
from typing import Any

import httpx
import pytest
from predictions.aws import clients
from predictions.aws.executions import Executions
from predictions.files.outputs_bucket import OutputsBucket
from predictions.intake.queue import Requests
from predictions.intents.model import create_requested_intent
from predictions.lifecycle.archive_outputs import copy
from predictions.lifecycle.receive_webhook import receive
from predictions.lifecycle.tracking import Tracking
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction
from predictions.upstream.prediction import UpstreamPrediction

from tests.support.fakes import (
    PNG,
    Answer,
    Clock,
    Died,
    Executed,
    ReplicateInMemory,
    Wakes,
    accept_then,
    answer,
    refusing,
    served,
)
from tests.support.predictions import FILE, current, hold_token, waiting, wanted
from tests.support.protocol import Submissions
from tests.support.quick_aws import account
from tests.support.requests import requests  # noqa: F401  # a fixture

THROTTLED = answer(429, {"retry_after": 5})


def webhook(table: PredictionsTable, prediction: Prediction, clock: Clock, **told: object) -> None:
    upstream_id = current(table, prediction.id).upstream_id
    receive(table, prediction.id, json.dumps({"id": upstream_id, **told}).encode(), clock.now())


# -- waking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "catches", "expected"),
    [
        ([FILE], True, ([], ["token"])),
        # Its execution began before the release that catches the error: it looks by itself for what to copy.
        ([FILE], False, (["token"], [])),
        ("text", True, (["token"], [])),
        ("text", False, (["token"], [])),
    ],
)
def test_execution_is_woken_by_the_error_only_where_files_are_to_be_copied_and_it_catches_that(
    submissions: Submissions,
    table: PredictionsTable,
    wakes: Wakes,
    clock: Clock,
    output: object,
    catches: bool,
    expected: tuple[list[str], list[str]],
) -> None:
    started = submissions.start(wanted())
    hold_token(table, started.id, "token", catches=catches)
    webhook(table, started, clock, status="succeeded", output=output)
    assert (wakes.tokens, wakes.copies) == expected


@pytest.mark.parametrize("wakes_it", ["poll", "sweep"])
def test_poll_and_sweep_wake_as_a_webhook_does(
    submissions: Submissions,
    replicate: ReplicateInMemory,
    table: PredictionsTable,
    wakes: Wakes,
    clock: Clock,
    wakes_it: str,
) -> None:
    started = submissions.start(wanted())
    hold_token(table, started.id, "token")
    told = replicate.finish(current(table, started.id).upstream_id or "", output=[FILE])
    if wakes_it == "poll":
        submissions.poll(started.id)
    else:  # the function of the webhook crashed between its write and its message
        table.merge(started.id, UpstreamPrediction.parse(told), clock.now())
        clock.advance(121)
        submissions.sweep(10, lambda: 300)
    assert (wakes.tokens, wakes.copies) == ([], ["token"])


def test_stale_token_of_a_copy_is_expected(table: PredictionsTable, clock: Clock, wakes: Wakes) -> None:
    prediction = waiting(table, clock)
    table.merge(prediction.id, UpstreamPrediction.parse({"id": "u", "status": "processing"}), clock.now())
    hold_token(table, prediction.id, "token")
    wakes.stale.add("token")
    webhook(table, prediction, clock, status="succeeded", output=[FILE])
    assert current(table, prediction.id).awaits_copy


@pytest.mark.parametrize("first_sweep", [0, 30, 59])
def test_execution_that_ended_without_its_copy_is_replaced_within_three_minutes_by_one_that_copies_at_once(
    submissions: Submissions,
    replicate: ReplicateInMemory,
    table: PredictionsTable,
    outputs: OutputsBucket,
    executed: Executed,
    clock: Clock,
    first_sweep: int,
) -> None:
    started = submissions.start(wanted())
    replicate.files = {FILE: served(PNG)}
    told = replicate.finish(current(table, started.id).upstream_id or "", output=[FILE])
    # A function of the release before wakes it as if there were nothing to copy.
    table.merge(started.id, UpstreamPrediction.parse(told), clock.now())
    ended_at = clock.now()
    account("stepfunctions").describe_execution(executed.arn(f"{started.id}-1")).status = "SUCCEEDED"
    clock.advance(first_sweep)
    while current(table, started.id).execution_n == 1 and clock.now() < ended_at + 600:
        clock.advance(60)
        submissions.sweep(10, lambda: 300)
    assert current(table, started.id).execution_n == 2
    assert clock.now() <= ended_at + 180
    assert f"{started.id}-2" in executed.inputs
    copy(table, outputs, started.id, 2, remaining_seconds=lambda: 900, now=clock.now)
    assert current(table, started.id).visible == "succeeded"


# -- which machine ------------------------------------------------------------------------------------------------


def test_submitted_prediction_is_tracked_by_the_machine_that_begins_to_wait(
    submissions: Submissions, table: PredictionsTable, executed: Executed
) -> None:
    started = submissions.start(wanted())
    assert executed.inputs == {f"{started.id}-1": {"id": started.id, "submit": False}}
    assert current(table, started.id).execution_arn == executed.arn(f"{started.id}-1")


def test_message_that_repeats_a_request_of_the_api_starts_no_execution_in_the_other_machine(
    submissions: Submissions,
    requests: Requests,  # noqa: F811
    table: PredictionsTable,
    executed: Executed,
) -> None:
    started = submissions.start(wanted(key="k"))
    body = {"version": started.version, "input": {"prompt": "a fox"}, "idempotency_key": "k"}
    intent = create_requested_intent(
        body, owner="alice", source="queue", source_key="m-1", allow_loopback_webhooks=False
    )
    assert intent.id == started.id
    requests.start(intent)
    assert executed.inputs == {f"{started.id}-1": {"id": started.id, "submit": False}}


@pytest.mark.parametrize("create", [THROTTLED, accept_then(500)], ids=["throttled", "unknown"])
def test_create_that_is_not_clear_counts_up_before_the_other_machine_tracks_it(
    submissions: Submissions,
    replicate: ReplicateInMemory,
    table: PredictionsTable,
    executed: Executed,
    create: Answer,
) -> None:
    replicate.faults = [create]
    started = submissions.start(wanted())
    assert executed.inputs == {f"{started.id}-2": {"id": started.id, "submit": True}}
    there = current(table, started.id)
    assert (there.execution_n, there.execution_arn) == (2, executed.arn(f"{started.id}-2"))


def test_create_without_a_clear_answer_that_a_webhook_has_bound_needs_no_other_machine(
    submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, executed: Executed, clock: Clock
) -> None:
    def bound_and_lost(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
        accepted = replicate.accept(request)
        (intent,) = table.list("alice", None, older=True, size=1).predictions
        webhook_of = json.dumps({"id": accepted["id"], "status": "processing"}).encode()
        receive(table, intent.prediction.id, webhook_of, clock.now())
        return answer(500)(request, replicate)

    replicate.faults = [bound_and_lost]
    started = submissions.start(wanted())
    assert executed.inputs == {f"{started.id}-1": {"id": started.id, "submit": False}}


@pytest.mark.parametrize("create", [THROTTLED, answer(500)], ids=["throttled", "unknown"])
def test_function_whose_item_moved_on_to_the_other_machine_starts_nothing(
    submissions: Submissions,
    replicate: ReplicateInMemory,
    table: PredictionsTable,
    executed: Executed,
    clock: Clock,
    create: Answer,
) -> None:
    def swept_meanwhile(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
        # The function was frozen: the sweep takes its claim for one of unknown outcome.
        clock.advance(31)
        submissions.sweep(10, lambda: 300)
        return create(request, replicate)

    replicate.faults = [swept_meanwhile]
    started = submissions.start(wanted(key="k"))
    assert executed.inputs == {f"{started.id}-2": {"id": started.id, "submit": True}}
    assert current(table, started.id).execution_n == 2


def test_request_whose_function_died_before_any_execution_is_failed_and_not_submitted(
    submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, executed: Executed, clock: Clock
) -> None:
    replicate.faults = [THROTTLED]
    intent = wanted()
    # It has counted up for the other machine, and dies before it starts the execution there.

    def die(_: Any) -> bool:
        raise Died

    with refusing("StartExecution", "-", die), pytest.raises(Died):
        submissions.start(intent)
    assert (current(table, intent.id).execution_n, executed.inputs) == (2, {})
    clock.advance(100)
    submissions.sweep(10, lambda: 300)
    assert current(table, intent.id).visible == "failed"
    assert replicate.predictions == {}


def test_bind_leaves_the_check_of_its_claim_which_is_sooner_than_any_that_it_would_set(
    submissions: Submissions, table: PredictionsTable, clock: Clock
) -> None:
    bound = current(table, submissions.start(wanted()).id)
    assert bound.upstream_id
    assert bound.next_check_at == int(clock.now()) + 30


def test_item_of_an_earlier_release_stays_with_its_machine(
    submissions: Submissions, table: PredictionsTable, executed: Executed, clock: Clock
) -> None:
    started = submissions.start(wanted())
    old_arn = f"{executed.machine_arn.replace(':stateMachine:', ':execution:')}:{started.id}-1"
    clients.client("dynamodb").update_item(
        TableName="predictions",
        Key={"pk": {"S": f"prediction#{started.id}"}, "sk": {"S": "status"}},
        UpdateExpression="SET execution_arn = :arn",
        ExpressionAttributeValues={":arn": {"S": old_arn}},
    )
    clients.client("stepfunctions").start_execution(
        stateMachineArn=executed.machine_arn, name=f"{started.id}-1", input=json.dumps({"id": started.id})
    )
    machines = (
        Executions(executed.machine_arn, clients.client("stepfunctions")),
        Executions(str(executed.submitted_machine_arn), clients.client("stepfunctions")),
    )
    tracking = Tracking(table, *machines, now=clock.now)
    assert tracking.status(current(table, started.id)) == "RUNNING"
    clients.client("stepfunctions").stop_execution(executionArn=old_arn)
    assert tracking.status(current(table, started.id)) == "ABORTED"
    clock.advance(181)
    submissions.sweep(10, lambda: 300)
    # The next one needs no submission.
    assert current(table, started.id).execution_arn == executed.arn(f"{started.id}-2")
    assert str(executed.submitted_machine_arn).rpartition(":")[2] in executed.arn(f"{started.id}-2")
