"""What one prediction costs in writes and calls: the promise of the design, counted at AWS's door."""

import json
from typing import Any

import pytest
from predictions.files.outputs_bucket import OutputsBucket
from predictions.lifecycle.archive_outputs import copy
from predictions.lifecycle.receive_webhook import receive
from predictions.store.predictions import PredictionsTable
from predictions.store.schemas import StoredSchemas

from tests.support.fakes import PNG, VERSION, Clock, ReplicateInMemory, Wakes, attempt, served
from tests.support.figures import Calls
from tests.support.predictions import FILE, hold_token, wanted
from tests.support.protocol import Submissions


def run(
    submissions: Submissions,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    outputs: OutputsBucket,
    clock: Clock,
    output: Any,
    *,
    number: int | None = None,
    polls: int = 0,
    known: bool = True,
    prompt: str = "a red fox",
) -> Calls:
    """One prediction from request to end, completed by its webhooks; the state machine's own writes included.

    What there is to know of its version is in the table, unless it is not `known`.
    """
    if known:
        StoredSchemas.from_env().put_schema(VERSION, "null", int(clock.now()) + 3600, "stability-ai/sdxl")
    calls = Calls("dynamodb")
    replicate.files = {FILE: served(PNG)}
    started = submissions.start(
        wanted(input={"prompt": prompt}), attempt=None if number is None else attempt(clock, number)
    )
    hold_token(table, started.id, "token-1")
    bound = table.get(started.id)
    assert bound is not None
    told = replicate.predictions[bound.upstream_id or ""]
    told["status"] = "processing"
    receive(table, started.id, json.dumps(told).encode(), clock.now())
    for n in range(polls):
        clock.advance(60)
        submissions.poll(started.id)
        hold_token(table, started.id, f"token-{n + 2}")
    done = replicate.finish(told["id"], output=output, logs="done")
    receive(table, started.id, json.dumps(done).encode(), clock.now())
    copy(table, outputs, started.id, 1, remaining_seconds=lambda: 900, now=clock.now)
    ended = table.get(started.id)
    assert ended is not None
    assert ended.visible == "succeeded"
    return calls


LONG = "a red fox " * 200
"""Too long for the status item, as an input and as an output."""


@pytest.mark.parametrize(("prompt", "writes"), [(LONG, 8), ("a red fox", 7)], ids=["long input", "small input"])
def test_webhook_completed_prediction_with_files_writes_at_most_eight_items(
    submissions: Submissions,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    outputs: OutputsBucket,
    wakes: Wakes,
    clock: Clock,
    prompt: str,
    writes: int,
) -> None:
    assert run(submissions, table, replicate, outputs, clock, [FILE], prompt=prompt).writes == writes


@pytest.mark.parametrize(
    ("prompt", "output", "writes"),
    [(LONG, LONG, 7), (LONG, "text", 6), ("a red fox", "text", 5)],
    ids=["long", "long input", "small"],
)
def test_webhook_completed_prediction_without_files_writes_at_most_seven_items(
    submissions: Submissions,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    outputs: OutputsBucket,
    wakes: Wakes,
    clock: Clock,
    prompt: str,
    output: str,
    writes: int,
) -> None:
    assert run(submissions, table, replicate, outputs, clock, output, prompt=prompt).writes == writes


def test_version_of_which_nothing_is_known_costs_two_writes_once(
    submissions: Submissions,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    outputs: OutputsBucket,
    wakes: Wakes,
    clock: Clock,
) -> None:
    replicate.versions = {f"stability-ai/sdxl/versions/{VERSION}": {"id": VERSION, "openapi_schema": None}}
    # Its model is noted, then its schema is kept.
    for writes in (9, 9, 8, 8):
        clock.advance(60)  # else each would be counted by the limiter, too
        calls = run(submissions, table, replicate, outputs, clock, [FILE], known=False, prompt=LONG)
        assert calls.writes == writes


@pytest.mark.parametrize(("number", "polls", "writes"), [(0, 0, 9), (None, 1, 9), (None, 3, 11), (0, 1, 10)])
def test_request_of_an_sdk_and_each_poll_write_one_item_more(
    submissions: Submissions,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    outputs: OutputsBucket,
    wakes: Wakes,
    clock: Clock,
    number: int | None,
    polls: int,
    writes: int,
) -> None:
    calls = run(submissions, table, replicate, outputs, clock, [FILE], number=number, polls=polls, prompt=LONG)
    assert calls.writes == writes
