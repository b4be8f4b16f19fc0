"""What costs AWS's money counts against its owner's limits: open batches and pipelines, attempts, refused lines."""

import json
from typing import Any

import httpx
import pytest
from predictions.admission.quotas import OwnerLimits, OwnersLimits, OwnersUsage
from predictions.aws import clients
from predictions.batches.dropped import DroppedManifests
from predictions.batches.manage import ATTEMPTS_LIMIT, BatchControl
from predictions.batches.prepare import prepare
from predictions.errors import PredictionThrottled, Problem
from predictions.intents.sources import RequestRefused

from tests.support.apps import AwsCalls
from tests.support.batches import LLAMA, RETENTION
from tests.support.batches import World as BatchWorld
from tests.support.batches import body as batch_body
from tests.support.batches import world as batch_world  # noqa: F401  # a fixture
from tests.support.fakes import Clock, Executed, ReplicateInMemory, answers_lost, meanwhile
from tests.support.pipelines import World as PipelineWorld
from tests.support.pipelines import world as pipeline_world  # noqa: F401  # a fixture

FLUX = "black-forest-labs/flux-schnell"
BY_SCHEMA: dict[str, Any] = {"model": FLUX, "input": {"prompt": "a fox", "num_outputs": 9}}
"""A line whose form is right, and which the model's own schema refuses."""
MIDNIGHT = 1_750_032_000
"""The end of the day of the tests' clock."""


@pytest.fixture
def usage(cloud: None, clock: Clock) -> OwnersUsage:
    """What owners use."""
    return OwnersUsage("predictions", clients.client("dynamodb"), now=clock.now)


@pytest.fixture
def batches(batch_world: BatchWorld, usage: OwnersUsage) -> BatchWorld:  # noqa: F811
    """Batches that are under limits."""
    batch_world.control = BatchControl(
        batch_world.batches,
        batch_world.recipes,
        batch_world.machine,
        "inputs",
        RETENTION,
        clients.client("stepfunctions"),
        usage=usage,
    )
    return batch_world


@pytest.fixture
def pipelines(pipeline_world: PipelineWorld, usage: OwnersUsage) -> PipelineWorld:  # noqa: F811
    """Pipelines that are under limits."""
    pipeline_world.api._usage = usage
    return pipeline_world


def make(world: BatchWorld, limits: OwnerLimits, *requests: Any, **fields: Any) -> Any:
    key = fields.pop("key", None)
    if requests:
        fields["requests"] = list(requests)
    return world.control.make(
        batch_body(**fields), {"idempotency-key": key} if key else {}, "alice", limits=limits
    )  # fmt: skip


def create(world: PipelineWorld, limits: OwnerLimits, key: str | None = None) -> str:
    asked = json.dumps({"steps": [{"name": "image", "model": FLUX, "input": {"prompt": "a fox"}}]}).encode()
    headers = {"idempotency-key": key} if key else {}
    return str(world.api.create_pipeline("alice", asked, headers, limits=limits)["id"])


def refused(problem: Any) -> tuple[int, str]:
    return problem.value.status, problem.value.headers.get("Retry-After", "")


def places(sk: str) -> set[str]:
    key = {"pk": {"S": "usage#alice"}, "sk": {"S": sk}}
    item = clients.client("dynamodb").get_item(TableName="predictions", Key=key).get("Item", {})
    return set(item.get("ids", {}).get("M", {}))


def items() -> list[Any]:
    return sorted(clients.client("dynamodb").scan(TableName="predictions")["Items"], key=str)


def use_day_up(limits: OwnerLimits, usage: OwnersUsage) -> None:
    for n in range(limits.per_day or 0):
        usage.acquire_slot("alice", str(n) * 26, OwnerLimits(per_day=limits.per_day))


def fail_lines(world: BatchWorld, batch: Any, replicate: ReplicateInMemory) -> Any:
    """Runs an attempt of which every line fails."""
    for prediction_id in world.run(world.there(batch)).values():
        world.end(prediction_id, replicate, "failed", error="no")
    world.finish(batch)
    return world.there(batch)


# -- open batches ---------------------------------------------------------------------------------------------------


def test_batch_beyond_the_limit_is_refused_with_limit_and_value_and_leaves_nothing(batches: BatchWorld) -> None:
    limits = OwnerLimits(open_batches=2)
    for _ in range(2):
        make(batches, limits, LLAMA)
    before, objects = items(), clients.client("s3").list_objects_v2(Bucket="outputs")["KeyCount"]
    with pytest.raises(Problem, match="Owner alice has reached its limit of 2 open batches") as problem:
        make(batches, limits, LLAMA)
    assert refused(problem) == (429, "60")
    assert (items(), clients.client("s3").list_objects_v2(Bucket="outputs")["KeyCount"]) == (before, objects)
    assert len(batches.executions) == 2


def test_repetition_by_key_is_no_further_batch(batches: BatchWorld) -> None:
    limits = OwnerLimits(open_batches=1)
    first = make(batches, limits, LLAMA, key="k")
    assert make(batches, limits, LLAMA, key="k").id == first.id
    assert places("open_batches") == {first.id}


def test_place_of_a_batch_is_free_when_it_has_ended(
    batches: BatchWorld, replicate: ReplicateInMemory, clock: Clock
) -> None:
    limits = OwnerLimits(open_batches=1)
    first = batches.there(make(batches, limits, LLAMA))
    prepare(batches.batches, first.id, 1)
    with pytest.raises(Problem):
        make(batches, limits, LLAMA)
    fail_lines(batches, first, replicate)
    clock.advance(3)  # so long a process believes that all places are taken
    second = make(batches, limits, LLAMA)
    assert places("open_batches") == {second.id}
    # A retry opens the first one again, and needs a place.
    with pytest.raises(Problem) as problem:
        batches.control.again(batches.there(first), limits=limits)
    assert refused(problem) == (429, "60")
    assert batches.there(first).attempt == 1


def test_batch_whose_manifest_is_missing_uses_no_place(batches: BatchWorld) -> None:
    limits = OwnerLimits(open_batches=1)
    with pytest.raises(Problem, match="Object not found"):
        make(batches, limits, manifest="s3://inputs/batches/alice/missing.jsonl")
    assert places("open_batches") == set()
    assert make(batches, limits, LLAMA)


def test_place_whose_answer_was_lost_is_one_place(batches: BatchWorld) -> None:
    with answers_lost():
        first = make(batches, OwnerLimits(open_batches=1), LLAMA)
    assert places("open_batches") == {first.id}


def test_two_batches_at_once_never_take_one_place(batches: BatchWorld) -> None:
    limits = OwnerLimits(open_batches=1)
    other: list[Any] = []
    with meanwhile("UpdateItem", lambda: other.append(make(batches, limits, LLAMA))), pytest.raises(Problem):
        make(batches, limits, LLAMA)
    assert places("open_batches") == {other[0].id}


def test_owner_without_limits_has_any_number_of_open_batches_and_pays_for_no_call(
    batches: BatchWorld, pipelines: PipelineWorld
) -> None:
    calls = AwsCalls()
    make(batches, OwnerLimits(), LLAMA)
    create(pipelines, OwnerLimits())
    assert "dynamodb.UpdateItem" not in calls.made
    assert not [item for item in items() if item["pk"]["S"].startswith("usage#")]


def test_owner_with_any_limit_has_a_default_of_open_batches_and_pipelines() -> None:
    for limits, batches, pipelines in (
        (OwnerLimits(), None, None),
        (OwnerLimits(in_flight=5), 100, 500),
        (OwnerLimits(per_day=0), 100, 500),
        (OwnerLimits(open_batches=7), 7, 500),
        (OwnerLimits(open_pipelines=0), 100, 0),
    ):
        assert (limits.open_allowed("batch"), limits.open_allowed("pipeline")) == (batches, pipelines)
        assert OwnerLimits.of_context(limits.context()) == limits


def test_dropped_manifest_beyond_the_limit_is_refused_with_its_reason(batches: BatchWorld) -> None:
    OwnersLimits("predictions", clients.client("dynamodb")).set_limits("alice", OwnerLimits(open_batches=1))
    batches.put_recipe("fill", batches={})
    door = DroppedManifests(batches.control, inputs_bucket_name="inputs", max_origin_depth=3)

    def drop(name: str) -> Any:
        key = f"batches/alice/fill/{name}.jsonl"
        etag = clients.client("s3").put_object(Bucket="inputs", Key=key, Body=b"{}\n")["ETag"]
        told = {
            "bucket": {"name": "inputs"},
            "object": {"key": key, "size": 3, "etag": etag.strip('"'), "sequencer": "0"},
        }
        return door.take({"detail-type": "Object Created", "source": "aws.s3", "detail": told})

    assert drop("first")
    for _ in range(2):
        with pytest.raises(RequestRefused, match="its limit of 1 open batches"):
            drop("second")
    assert len(batches.executions) == 1


# -- open pipelines -------------------------------------------------------------------------------------------------


def test_pipeline_beyond_the_limit_is_refused_until_one_has_ended(
    pipelines: PipelineWorld, pipeline_executed: Executed, clock: Clock
) -> None:
    limits = OwnerLimits(open_pipelines=1)
    first = create(pipelines, limits, "k")
    assert create(pipelines, limits, "k") == first
    with pytest.raises(Problem, match="Owner alice has reached its limit of 1 open pipelines") as problem:
        create(pipelines, limits)
    assert refused(problem) == (429, "60")
    assert list(pipeline_executed.inputs) == [f"{first}-1"]
    pipelines.api.cancel_pipeline(first, "alice")
    pipelines.turn(first)
    clock.advance(3)
    second = create(pipelines, limits)
    assert places("open_pipelines") == {second}


# -- attempts -------------------------------------------------------------------------------------------------------


def test_batch_is_run_no_more_often_than_the_limit(batches: BatchWorld, replicate: ReplicateInMemory) -> None:
    batch = batches.prepared(LLAMA)
    ended = fail_lines(batches, batch, replicate)
    for attempt in range(2, ATTEMPTS_LIMIT + 1):
        assert batches.control.again(ended).attempt == attempt
        prepare(batches.batches, batch.id, attempt)
        ended = fail_lines(batches, batch, replicate)
    with pytest.raises(
        Problem, match=rf"has reached the limit of {ATTEMPTS_LIMIT} attempts \(got {ATTEMPTS_LIMIT}\)"
    ) as problem:
        batches.control.again(ended)
    assert problem.value.status == 409
    assert batches.there(batch).attempt == ATTEMPTS_LIMIT
    assert len(batches.executions) == ATTEMPTS_LIMIT


# -- the limit of the day -------------------------------------------------------------------------------------------


def test_nothing_is_made_or_run_again_while_the_limit_of_the_day_is_used_up(
    batches: BatchWorld,
    pipelines: PipelineWorld,
    usage: OwnersUsage,
    executed: Executed,
    replicate: ReplicateInMemory,
    clock: Clock,
) -> None:
    limits = OwnerLimits(per_day=2)
    failed = fail_lines(batches, batches.prepared(LLAMA), replicate)
    executions, tracked = len(batches.executions), len(executed.inputs)
    use_day_up(limits, usage)
    for ask in (
        lambda: make(batches, limits, *[BY_SCHEMA] * 60),
        lambda: batches.control.again(failed, limits=limits),
        lambda: create(pipelines, limits),
    ):
        with pytest.raises(Problem, match="limit of 2 predictions per day") as problem:
            ask()
        assert refused(problem) == (429, str(MIDNIGHT - int(clock.now()) + 1))
    assert len(batches.executions) == executions
    assert len(executed.inputs) == tracked
    clock.moment = MIDNIGHT
    assert make(batches, limits, LLAMA)
    assert batches.control.again(failed, limits=limits).attempt == 2


def test_lines_that_the_schema_refuses_use_the_day_up_and_the_rest_waits_for_the_next(
    batches: BatchWorld, replicate: ReplicateInMemory, clock: Clock
) -> None:
    OwnersLimits("predictions", clients.client("dynamodb")).set_limits("alice", OwnerLimits(per_day=3))
    batch = batches.prepared(*[BY_SCHEMA] * 5)
    ended, waits = [], []
    for prediction_id in batches.run(batch, submit=False).values():
        try:
            batches.submissions.submit(prediction_id)
            prediction = batches.table.get(prediction_id)
            ended.append(prediction and prediction.visible)
        except PredictionThrottled as throttled:
            waits.append(throttled.seconds)
    assert ended == ["failed"] * 3
    # One long wait, no loop.
    assert waits == [MIDNIGHT - int(clock.now()) + 1] * 2
    assert replicate.creates == []


def test_line_that_waits_for_an_outage_counts_once(
    batches: BatchWorld, replicate: ReplicateInMemory, clock: Clock
) -> None:
    OwnersLimits("predictions", clients.client("dynamodb")).set_limits("alice", OwnerLimits(per_day=9, in_flight=9))
    [prediction_id] = batches.run(
        batches.prepared({"model": FLUX, "input": {"prompt": "a fox"}}), submit=False
    ).values()
    for _ in range(3):
        replicate.read_faults = [lambda *_: httpx.Response(500)]
        with pytest.raises(PredictionThrottled):
            batches.submissions.submit(prediction_id)
        clock.advance(60)
    batches.submissions.submit(prediction_id)
    key = {"pk": {"S": "usage#alice"}, "sk": {"S": "day#2025-06-15"}}
    assert clients.client("dynamodb").get_item(TableName="predictions", Key=key)["Item"]["n"] == {"N": "1"}
    assert len(replicate.creates) == 1
