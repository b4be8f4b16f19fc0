"""Batches from their making to their results, with Step Functions' part played by the tests."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from predictions.aws import clients
from predictions.batches import files as batch_files
from predictions.batches.checks import CHECK_SECONDS, LineSchema
from predictions.batches.files import get_text, lines_key, new_object, read_jsonl, refused_key, requests_key
from predictions.batches.prepare import prepare
from predictions.batches.store import Batch, event_of
from predictions.batches.view import show_batch
from predictions.errors import NoLongerWanted, Problem
from predictions.files.outputs_bucket import OutputsBucket
from predictions.lifecycle.model_lookup import ModelLookup, ModelSchemas
from predictions.status import Status
from predictions.store.schemas import StoredSchemas
from predictions.upstream.client import Replicate
from predictions.upstream.credentials import Token
from predictions.views.prediction import Presenter

from tests.support.batches import LLAMA, RETENTION, World, body, plenty, world
from tests.support.fakes import Clock, ReplicateInMemory, answer, meanwhile, refusing
from tests.support.stream import Bus
from tests.support.stream import make as make_changes
from tests.support.template import passes, resources

__all__ = ["world"]  # a fixture

BAD = {"model": "meta/llama"}


def refused(make: Callable[[], Any]) -> tuple[int, list[str]]:
    with pytest.raises(Problem) as caught:
        make()
    return caught.value.status, [field["field"] for field in caught.value.invalid_fields]


# -- making: refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, ["manifest"]),
        ({"requests": [LLAMA], "manifest": "s3://inputs/batches/alice/a.jsonl"}, ["manifest"]),
        ({"requests": []}, ["requests"]),
        ({"requests": {}}, ["requests"]),
        ({"requests": [LLAMA], "format": "csv"}, ["requests"]),
        ({"requests": [LLAMA], "max_concurrency": 0}, ["max_concurrency"]),
        ({"requests": [LLAMA], "max_concurrency": 1001}, ["max_concurrency"]),
        ({"requests": [LLAMA], "max_concurrency": True}, ["max_concurrency"]),
        ({"requests": [LLAMA], "tolerated_failure_percentage": 101}, ["tolerated_failure_percentage"]),
        ({"requests": [LLAMA], "tolerated_failure_percentage": 0.5}, ["tolerated_failure_percentage"]),
        ({"requests": [LLAMA], "owner": "bob"}, ["owner"]),
        ({"requests": [LLAMA], "template": {"input": {"prompt": "{{ row. }}"}}}, ["template.input.prompt"]),
        ({"requests": [LLAMA], "template": {"model": "meta/llama"}}, ["template.input"]),
        ({"requests": [LLAMA], "template": {**LLAMA, "inptu": "{{ row.a }}"}}, ["template.inptu"]),
        ({"requests": [LLAMA], "template": {"input": {}}}, ["template.model"]),
        ({"requests": [LLAMA], "template": {**LLAMA, "version": "{{ row.v }}"}}, ["template.model"]),
        ({"requests": [LLAMA], "template": {**LLAMA, "webhook": "http://10.0.0.1/"}}, ["template.webhook"]),
        (
            {"requests": [LLAMA], "template": {**LLAMA, "webhook": "https://x.example/{{ rwo.a }}"}},
            ["template.webhook"],
        ),
        ({"requests": [LLAMA], "template": {**LLAMA, "idempotency_key": "{{ row.a }}"}}, ["template.idempotency_key"]),
        (
            {"requests": [LLAMA], "template": {**LLAMA, "input": {"a": "{{ object.url }}", "b": ["{{ rwo.b }}"]}}},
            ["template.input.a", "template.input.b.0"],
        ),
        ({"requests": [LLAMA], "recipe": "missing"}, ["recipe"]),
        ({"requests": [LLAMA], "recipe": "of-bob"}, ["recipe"]),
        ({"requests": [LLAMA], "recipe": "going"}, ["recipe"]),
        ({"requests": [LLAMA], "recipe": "bob#of-bob"}, ["recipe"]),
        ({"requests": [LLAMA], "recipe": ["mine"]}, ["recipe"]),
        ({"requests": [LLAMA], "recipe": "mine", "template": LLAMA}, ["recipe"]),
        ({"manifest": "https://inputs/batches/alice/a.jsonl"}, ["manifest"]),
        ({"manifest": "s3://outputs/batches/alice/a.jsonl"}, ["manifest"]),
        ({"manifest": "s3://inputs/batches/bob/a.jsonl"}, ["manifest"]),
        ({"manifest": "s3://inputs/files/bob/a"}, ["manifest"]),
        ({"manifest": "s3://inputs/batches/alice"}, ["manifest"]),
        ({"manifest": "s3://inputs"}, ["manifest"]),
        ({"manifest": "s3://inputs/batches/alice/missing.jsonl"}, ["manifest"]),
        ({"manifest": "a" * 26}, ["manifest"]),
        ({"manifest": f"s3://inputs/batches/alice/{'a' * 1024}"}, ["manifest"]),
        ({"manifest": "s3://inputs/batches/alice/a.csv"}, ["template"]),
        ({"manifest": "s3://inputs/batches/alice/a", "format": "csv"}, ["template"]),
        ({"manifest": "s3://inputs/batches/alice/a", "format": "xlsx"}, ["format"]),
    ],
    ids=lambda value: json.dumps(value)[:70],
)
def test_batch_that_cannot_be_made_is_refused_by_its_field(
    world: World, fields: dict[str, Any], named: list[str]
) -> None:
    world.put_recipe("mine")
    world.put_recipe("going", state="deleting")
    world.put_recipe("of-bob", owner="bob")
    assert refused(lambda: world.control.make(body(**fields), {}, "alice")) == (422, named)
    assert world.executions == {}


@pytest.mark.parametrize("content", [b"[]", b"null", b'"requests"'])
def test_body_that_is_no_object_is_refused(world: World, content: bytes) -> None:
    assert refused(lambda: world.control.make(content, {}, "alice"))[0] == 422


def test_key_of_another_batch_is_refused(world: World) -> None:
    world.make(LLAMA, key="k")
    assert refused(lambda: world.make(LLAMA, LLAMA, key="k")) == (422, ["Idempotency-Key"])


@pytest.mark.parametrize("batch_id", ["nope", "a" * 26, "A" * 26, "../status"])
def test_unknown_batch_is_not_found(world: World, batch_id: str) -> None:
    assert refused(lambda: world.control.own(batch_id, "alice"))[0] == 404


def test_batch_of_another_owner_is_not_found(world: World) -> None:
    batch = world.make(LLAMA)
    assert refused(lambda: world.control.own(batch.id, "bob"))[0] == 404
    assert world.batches.page("bob", None, older=True, size=10) == ([], False)


# -- making --------------------------------------------------------------------------------------------------------


def test_same_key_gives_the_same_batch_and_ids_cannot_be_guessed(world: World) -> None:
    first, again = (world.make(LLAMA, key="k") for _ in range(2))
    assert first == again
    assert world.make(LLAMA, key="k", owner="bob").id != first.id
    assert world.make(LLAMA).id != first.id
    assert world.executions[f"{first.id}-1-1"] == {"id": first.id, "attempt": 1}


def test_batch_whose_requests_two_calls_with_one_key_wrote_at_once_is_read(world: World) -> None:
    made: list[Batch] = []
    other = {name: LLAMA[name] for name in reversed(LLAMA)}  # the same request, in other bytes, hence of another ETag

    def make() -> None:
        made.append(world.make(LLAMA, LLAMA, key="k"))

    # The first call has taken the key and found no batch; the second one comes before it stores its requests.
    with meanwhile("PutObject", make, service="s3"):
        made.append(world.make(other, other, key="k"))
    assert made[0] == made[1]
    prepare(world.batches, made[0].id, 1)
    there = world.there(made[0])
    assert (there.status, there.lines, there.error) == ("running", 2, None)


def test_batch_that_is_there_already_is_returned_without_another_read_that_could_fail(world: World) -> None:
    batch = world.make(LLAMA)
    with refusing("GetItem", "ThrottlingException", service="dynamodb"):
        assert world.batches.write_down(batch).id == batch.id


def test_cancel_that_is_stored_while_the_results_are_written_ends_it_canceled(
    world: World, replicate: ReplicateInMemory
) -> None:
    batch = world.prepared(LLAMA)
    for prediction_id in world.run(batch).values():
        world.end(prediction_id, replicate, output="done")
    with meanwhile("PutObject", lambda: world.batches.stop(world.there(batch), "canceled"), service="s3"):
        assert world.finish(batch)["open"] == 1
    assert not world.there(batch).ended
    assert world.finish(batch)["open"] == 0
    ended = world.there(batch)
    assert (ended.status, ended.counts["succeeded"] if ended.counts else 0) == ("canceled", 1)


def test_making_that_died_half_way_is_completed_by_the_same_key(world: World) -> None:
    of_the_batch = refusing("PutItem", "AccessDenied", lambda b: b["Item"]["sk"] == {"S": "status"}, service="dynamodb")
    with of_the_batch, pytest.raises(ClientError):
        world.make(LLAMA, key="k")
    batch = world.make(LLAMA, key="k")
    assert list(world.executions) == [f"{batch.id}-1-1"]


def test_batch_whose_execution_was_not_started_is_started_by_the_sweep(world: World, clock: Clock) -> None:
    with refusing("StartExecution", "AccessDeniedException"):
        accepted = world.make(LLAMA, key="k")
    assert (accepted.status, world.executions) == ("preparing", {})
    clock.advance(61)
    world.submissions.sweep(
        10, plenty, {"batch": lambda id_: world.control.sweep_one(id_, world.submissions.canceling, plenty)}
    )
    batch = world.make(LLAMA, key="k")
    assert batch.id == accepted.id
    assert list(world.executions) == [f"{batch.id}-1-1"]


def test_execution_that_is_gone_is_started_again_under_another_name(world: World, clock: Clock) -> None:
    batch = world.make(LLAMA)
    for n in (1, 2):
        world.stop_execution(f"{batch.id}-1-{n}")
        clock.advance(301)
        world.control.sweep_one(batch.id, world.submissions.canceling, plenty)
    clock.advance(301)
    world.control.sweep_one(batch.id, world.submissions.canceling, plenty)
    assert sorted(world.executions) == [f"{batch.id}-1-{n}" for n in (1, 2, 3)]


def test_list_of_an_owner_has_the_newest_first(world: World, clock: Clock) -> None:
    made = []
    for _ in range(3):
        made.append(world.make(LLAMA).id)
        clock.advance(1)
    page, more = world.batches.page("alice", None, older=True, size=2)
    assert ([batch.id for batch in page], more) == (made[:0:-1], True)


# -- preparing -----------------------------------------------------------------------------------------------------


def test_bad_line_among_good_ones_is_refused_alone(world: World) -> None:
    batch = world.prepared(LLAMA, BAD, 3, LLAMA)
    assert (batch.status, batch.lines, batch.total, batch.refused) == ("running", 2, 4, 2)
    assert [line["n"] for line in read_jsonl("outputs", lines_key(batch.id, 1))] == [1, 4]
    assert [(line["n"], line["error"]) for line in read_jsonl("outputs", refused_key(batch.id))] == [
        (2, "input: This field is required."),
        (3, "The line must be a JSON object."),
    ]


def test_manifest_of_rows_is_filled_into_the_template(world: World) -> None:
    clients.client("s3").put_object(Bucket="inputs", Key="batches/alice/a.csv", Body=b"who,n\nfox,1\nowl\n")
    template = {"model": "meta/llama", "input": {"prompt": "{{ row.who }}"}}
    batch = world.prepared(manifest="s3://inputs/batches/alice/a.csv", template=template)
    assert list(read_jsonl("outputs", requests_key(batch.id))) == [
        {"n": 2, "request": {"model": "meta/llama", "input": {"prompt": "fox"}}}
    ]
    assert (batch.lines, batch.refused) == (1, 1)


def test_recipe_as_it_was_makes_the_requests(world: World, replicate: ReplicateInMemory) -> None:
    recipe = world.put_recipe(
        "fill",
        input={"prompt": "A {{ row.animal }} by {{ recipe.name }}", "seed": "{{ to_number(row.seed) }}"},
        defaults={"seed": 7},
        webhook="https://example.com/{{ row.animal }}",
        lifetime="10m",
        output_prefix="zoo/{{ row.animal }}",
    )
    rows = b"animal,seed\nfox,3\n,4\nhare,\n"
    clients.client("s3").put_object(Bucket="inputs", Key="batches/alice/a.csv", Body=rows)
    batch = world.make(manifest="s3://inputs/batches/alice/a.csv", recipe="fill", key="k")
    # Nothing of a batch changes with its recipe.
    world.put_recipe("fill", input={"prompt": "changed"})
    prepare(world.batches, batch.id, 1)
    assert world.recipes.erase(world.recipes.find(recipe.id) or recipe)
    fox, place, hare = [world.table.get(prediction_id) for prediction_id in world.run(batch).values()]
    assert fox
    assert place
    assert hare
    assert [create["input"] for create in replicate.creates] == [
        {"seed": 3, "prompt": "A fox by fill"},
        {"seed": 4, "prompt": "A  by fill"},
        {"seed": 7, "prompt": "A hare by fill"},
    ]
    assert (fox.owner, fox.source, fox.output_prefix, fox.deadline - fox.created) == ("alice", "batch", "zoo/fox", 600)
    assert fox.webhook == "https://example.com/fox"


def test_row_in_which_a_recipe_finds_nothing_is_refused_alone(world: World) -> None:
    world.put_recipe("fill", input={"prompt": "{{ row.animal }}"}, s3={"prefix": "photos/"})
    batch = world.prepared({"animal": "fox"}, {"beast": "hare"}, "owl", {"animal": "elk"}, recipe="fill")
    assert [line["n"] for line in world.messages(batch)] == [1, 4]
    assert [line["request"]["input"] for line in read_jsonl("outputs", requests_key(batch.id))] == [
        {"prompt": "fox"}, {"prompt": "elk"}
    ]  # fmt: skip
    reasons = [line["error"] for line in read_jsonl("outputs", refused_key(batch.id))]
    assert reasons[0].startswith("input.prompt: `{{ row.animal }}` finds nothing here")
    assert reasons[1] == "The line must be a JSON object."


def test_template_that_makes_half_a_surrogate_pair_is_refused_line_by_line(world: World) -> None:
    template = {"model": "meta/llama", "input": {"prompt": '{{ row.who || `"\\ud83d"` }}'}}
    batch = world.prepared({"who": "fox"}, {}, template=template)
    assert (batch.status, batch.lines, batch.refused) == ("running", 1, 1)


def test_file_of_the_owner_is_a_manifest_by_its_id(world: World) -> None:
    clients.client("s3").put_object(Bucket="inputs", Key=f"files/alice/{'a' * 26}", Body=json.dumps(LLAMA).encode())
    assert world.prepared(manifest="a" * 26).lines == 1


@pytest.mark.parametrize("change", ["another", "gone", "no header", "too many"])
def test_manifest_that_cannot_be_read_fails_the_batch_with_the_reason(
    world: World, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3, key = clients.client("s3"), "batches/alice/a.csv"
    s3.put_object(Bucket="inputs", Key=key, Body=b"a,a\n1,2\n" if change == "no header" else b"a,b\n1,2\n3,4\n")
    template = {"model": "meta/llama", "input": {"prompt": "{{ row.a }}"}}
    batch = world.make(manifest=f"s3://inputs/{key}", template=template)
    if change == "another":
        s3.put_object(Bucket="inputs", Key=key, Body=b"a,b\n5,6\n")
    elif change == "gone":
        s3.delete_object(Bucket="inputs", Key=key)
    elif change == "too many":
        monkeypatch.setattr("predictions.batches.prepare.LINES_LIMIT", 1)
    assert prepare(world.batches, batch.id, 1)["lines"] == 0
    assert world.finish(batch)["open"] == 0
    batch = world.there(batch)
    assert (batch.status, batch.error is not None, world.results(batch)) == ("failed", True, [])
    assert refused(lambda: world.control.again(batch))[0] == 409


@pytest.mark.parametrize("manifest", [b"{}\n" * 9, b"\n" * 600_000], ids=["lines", "empty lines"])
def test_manifest_that_takes_longer_than_the_function_may_run_fails_the_batch(world: World, manifest: bytes) -> None:
    clients.client("s3").put_object(Bucket="inputs", Key="batches/alice/a.jsonl", Body=manifest)
    batch = world.make(manifest="s3://inputs/batches/alice/a.jsonl")
    left = iter([900.0, 61.0, 59.0, 58.0])
    assert prepare(world.batches, batch.id, 1, lambda: next(left))["lines"] == 0
    assert world.finish(batch)["open"] == 0
    assert (world.there(batch).status, "takes too long" in (world.there(batch).error or "")) == ("failed", True)


def test_manifest_over_which_one_execution_after_the_other_dies_fails_the_batch(world: World, clock: Clock) -> None:
    batch = world.make(LLAMA)
    for n in range(1, 7):
        world.stop_execution(f"{batch.id}-1-{n}")
        clock.advance(3601)  # looked at ever more rarely, at most an hour apart
        world.control.sweep_one(batch.id, world.submissions.canceling, plenty)
    assert prepare(world.batches, batch.id, 1)["lines"] == 0
    world.finish(batch)
    assert (world.there(batch).status, "each try" in (world.there(batch).error or "")) == ("failed", True)


def test_preparing_twice_writes_the_same_and_says_the_same(world: World) -> None:
    batch = world.make(LLAMA, BAD)
    first = prepare(world.batches, batch.id, 1)
    before = get_text("outputs", requests_key(batch.id))
    assert prepare(world.batches, batch.id, 1) == first
    assert get_text("outputs", requests_key(batch.id)) == before
    assert first == {
        "id": batch.id,
        "attempt": 1,
        "owner": batch.owner,
        "lines": 1,
        "key": lines_key(batch.id, 1),
        "max_concurrency": 20,
        "tolerated_failure_percentage": 100,
    }
    assert prepare(world.batches, batch.id, 2)["lines"] == 0


def test_object_is_whole_or_not_there(cloud: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_files, "PART_BYTES", 5 * 1024**2)
    text = "x" * 1024**2

    def write(key: str, count: int) -> None:
        with new_object("outputs", key) as writer:
            for n in range(count):
                writer.write_json({"n": n, "text": text if n < 12 else float("nan")})

    with pytest.raises(ValueError, match="JSON"):
        write("broken", 13)
    assert batch_files.etag_of("outputs", "broken") is None
    assert "Uploads" not in clients.client("s3").list_multipart_uploads(Bucket="outputs")
    write("whole", 12)
    assert [line["n"] for line in read_jsonl("outputs", "whole")] == list(range(12))


# -- the door ------------------------------------------------------------------------------------------------------


def test_line_starts_one_prediction_however_often_it_is_sent(world: World, replicate: ReplicateInMemory) -> None:
    batch = world.prepared(LLAMA)
    (message,) = world.messages(batch)
    ids = {world.take(message) for _ in range(3)}
    (prediction_id,) = ids
    prediction = world.table.get(prediction_id)
    assert prediction
    assert (prediction.owner, prediction.source) == ("alice", "batch")
    assert prediction.origin == {"batch": batch.id, "line": 1, "attempt": 1}
    assert prediction_id == batch.prediction_id(1, 1)
    for _ in range(2):
        world.submissions.submit(prediction_id)
    assert len(replicate.creates) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"batch_id": "a" * 26},
        {"batch_id": 3},
        {"n": 2},
        {"offset": 1},
        {"length": 10},
        {"length": 10**12},
        {"length": 0},
        {"offset": -1},
        {"offset": 10**9},
        {"attempt": "1"},
        {"attempt": True},
    ],
    ids=str,
)
def test_message_that_names_no_line_starts_nothing(world: World, change: dict[str, Any]) -> None:
    batch = world.prepared(LLAMA)
    (message,) = world.messages(batch)
    with pytest.raises(Problem, match="404"):
        world.batches.intent(message | change, None)


def test_line_of_an_earlier_attempt_or_an_ended_batch_is_no_longer_wanted(world: World) -> None:
    batch = world.prepared(LLAMA)
    (message,) = world.messages(batch)
    with pytest.raises(NoLongerWanted):
        world.take(message | {"attempt": 2})
    world.finish(batch)
    with pytest.raises(NoLongerWanted):
        world.take(message)
    assert world.results(batch)[0]["status"] == "failed"


# -- checks by the model's schema ------------------------------------------------------------------------------------

MODEL = "black-forest-labs/flux-schnell"
"""`prompt` is required; `num_outputs` is a whole number from 1 to 4."""


@pytest.fixture
def checking(world: World, replicate: ReplicateInMemory, clock: Clock) -> World:
    """The same stack, in which the schemas of models can be read."""
    upstream = Replicate(ReplicateInMemory.URL, Token("replicate-token"), replicate.client())
    schemas = ModelSchemas(StoredSchemas.from_env(), upstream, now=clock.now)
    world.control._lookup = ModelLookup(upstream, schemas, now=clock.now)
    return world


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ({"model": MODEL, "input": {"num_outputs": 1}}, ["template.input.prompt"]),
        ({"model": MODEL, "input": {"prompt": "{{ row.a }}", "num_outputs": 9}}, ["template.input.num_outputs"]),
        ({"model": MODEL, "input": {"prompt": 1}}, ["template.input.prompt"]),
        ({"model": "nobody/nothing", "input": {}}, ["template.model"]),
    ],
)
def test_template_that_its_model_refuses_whatever_the_rows_hold_is_refused_and_its_key_is_free(
    checking: World, template: dict[str, Any], named: list[str]
) -> None:
    rows = [{"a": "a fox"}]
    assert refused(lambda: checking.make(*rows, template=template, key="k")) == (422, named)
    right = {"model": MODEL, "input": {"prompt": "{{ row.a }}"}}
    assert checking.make(*rows, template=right, key="k").status == "preparing"


def test_key_finds_its_batch_although_the_model_has_gone_since(checking: World, replicate: ReplicateInMemory) -> None:
    template = {"model": MODEL, "input": {"prompt": "{{ row.a }}"}}
    batch = checking.make({"a": "x"}, template=template, key="k")
    checking.control._lookup._models.clear()  # type: ignore[union-attr]
    replicate.read_faults += [answer(404)] * 4
    assert checking.make({"a": "x"}, template=template, key="k") == batch


def test_lines_that_the_model_would_refuse_are_refused_before_they_start(
    checking: World, replicate: ReplicateInMemory
) -> None:
    template = {"model": MODEL, "input": {"prompt": "{{ row.a }}", "num_outputs": "{{ row.n }}"}}
    rows = [{"a": "fox", "n": 1}, {"a": "owl", "n": 9}, {"a": "hare", "n": "many"}]
    batch = checking.prepared(*rows, template=template)
    assert (batch.total, batch.refused, batch.checked) == (3, 2, True)
    assert [line["n"] for line in checking.messages(batch)] == [1]
    told = {line["n"]: line["error"] for line in read_jsonl("outputs", refused_key(batch.id))}
    assert told == {
        2: "input.num_outputs: Must be at most 4 (got 9).",
        3: "input.num_outputs: Must be a whole number, not a string.",
    }
    plain = checking.prepared(*({"model": MODEL, "input": {"prompt": p}} for p in ("a", 1)))
    assert (plain.refused, plain.checked) == (1, True)
    checking.put_recipe("mine", model=MODEL, input={"prompt": "{{ row.a }}"})
    by_recipe = checking.prepared({"a": "x"}, {"a": ["x"]}, recipe="mine")
    assert (by_recipe.refused, by_recipe.checked) == (1, True)


def test_lines_of_several_models_and_those_named_by_rows_are_checked_when_they_start(checking: World) -> None:
    several = checking.prepared({"model": MODEL, "input": {}}, LLAMA)
    template = {"model": "{{ row.m }}", "input": {}}
    by_row = checking.prepared({"m": MODEL}, template=template)
    assert [(batch.refused, batch.checked) for batch in (several, by_row)] == [(0, False)] * 2


def test_replicate_that_is_away_refuses_no_batch(checking: World, replicate: ReplicateInMemory) -> None:
    replicate.read_faults += [answer(503)] * 4
    batch = checking.prepared({"a": "x"}, template={"model": MODEL, "input": {"num_outputs": "many"}})
    assert (batch.refused, batch.checked) == (0, False)


def test_schema_that_takes_long_is_given_up_for_the_lines_that_follow(replicate: ReplicateInMemory) -> None:
    text = json.dumps({"Input": {"type": "object", "required": ["prompt"]}})
    times = iter([0.0, CHECK_SECONDS + 1, 0.0])
    schema = LineSchema(text, clock=lambda: next(times))
    assert schema.reason({}) == "input.prompt: This field is required."
    assert schema.reason({}) is None


# -- finishing -----------------------------------------------------------------------------------------------------


def test_results_are_in_the_manifests_order_with_refused_lines_at_their_place(
    world: World, replicate: ReplicateInMemory, clock: Clock
) -> None:
    batch = world.prepared(LLAMA, BAD, LLAMA, LLAMA)
    ids = world.run(batch)
    clock.advance(7)
    world.end(ids[4], replicate, output=["a", "b"])
    world.end(ids[1], replicate, "failed", error="out of paint")
    assert world.finish(batch) == {"open": 1, "lap": 1, "wait_seconds": 5}
    assert world.there(batch).results_key is None
    world.end(ids[3], replicate, output="x" * 40_000)
    assert world.finish(batch)["open"] == 0
    results = world.results(batch)
    unknown = {"micro_dollars": None, "reason": "No price of meta/llama is known.", "price": None}
    free = {"micro_dollars": 0, "reason": "Not billed: it was not started.", "price": None}
    assert [line.pop("cost") for line in results] == [unknown, free, unknown, unknown]
    assert results == [
        {"n": 1, "id": ids[1], "status": "failed", "error": "out of paint", "seconds": 7},
        {"n": 2, "id": None, "status": "refused", "error": "input: This field is required.", "seconds": None},
        {"n": 3, "id": ids[3], "status": "succeeded", "error": None, "seconds": 7, "output_truncated": True},
        {"n": 4, "id": ids[4], "status": "succeeded", "error": None, "seconds": 7, "output": ["a", "b"]},
    ]
    batch = world.there(batch)
    assert batch.status == "succeeded"
    assert world.control.counts(batch) == {
        "waiting": 0, "running": 0, "succeeded": 2, "failed": 1, "canceled": 0, "refused": 1
    }  # fmt: skip
    assert (batch.next_check_at, world.finish(batch)["open"]) == (None, 0)


def test_output_with_half_a_surrogate_pair_ends_its_batch_like_any_other(
    world: World, replicate: ReplicateInMemory
) -> None:
    batch = world.prepared(LLAMA)
    prediction = world.table.get(world.run(batch)[1])
    assert prediction
    told = replicate.finish(prediction.upstream_id or "", output="cut off: \ud83d")
    answer = httpx.Response(200, content=json.dumps(told))
    replicate.others["GET", f"/predictions/{prediction.upstream_id}"] = lambda: answer
    world.submissions.poll(prediction.id)
    assert world.finish(batch)["open"] == 0
    assert [line["output"] for line in world.results(batch)] == ["cut off: ?"]


def test_batch_whose_lines_are_all_refused_ends(world: World) -> None:
    batch = world.prepared(BAD, BAD)
    world.finish(batch)
    assert [line["status"] for line in world.results(batch)] == ["refused"] * 2
    ended = world.there(batch)
    assert (ended.status, ended.error) == ("failed", None)
    assert ended.reason == "No line of the batch succeeded (2 refused). The results hold the reason of each line."


@pytest.mark.parametrize(
    ("counts", "status"),
    [
        ({"succeeded": 1, "failed": 99}, "succeeded"),
        ({"succeeded": 0, "failed": 1, "canceled": 1}, "failed"),
        ({"succeeded": 0, "canceled": 3}, "succeeded"),  # one by one, by its owner
        ({"succeeded": 0}, "succeeded"),  # an empty manifest
    ],
)
def test_batch_fails_if_all_its_lines_did(
    world: World, monkeypatch: pytest.MonkeyPatch, counts: dict[str, int], status: str
) -> None:
    batch = world.prepared(LLAMA)
    results = [{"n": 1, "status": name} for name, count in counts.items() for _ in range(count)]
    monkeypatch.setattr("predictions.batches.finish._results", lambda *_: iter(results))
    world.finish(batch)
    shown = show_batch(world.there(batch), world.control, Presenter(OutputsBucket("outputs"), 60), ask=False)
    assert (shown["status"], shown["error"] is not None) == (status, status == "failed")


def test_batch_in_which_every_line_failed_can_be_retried_and_succeed(
    world: World, replicate: ReplicateInMemory
) -> None:
    batch = world.prepared(LLAMA, LLAMA)
    for id_ in world.run(batch).values():
        world.end(id_, replicate, "failed", error="no")
    world.finish(batch)
    assert (world.there(batch).status, "(2 failed)" in (world.there(batch).reason or "")) == ("failed", True)
    again = world.control.again(world.there(batch))
    assert (again.attempt, again.reason) == (2, None)
    prepare(world.batches, batch.id, 2)
    ids = world.run(again)
    world.end(ids[1], replicate, output="at last")
    world.end(ids[2], replicate, "failed", error="no")
    world.finish(batch)
    assert (world.there(batch).status, world.there(batch).reason) == ("succeeded", None)


def test_batch_that_an_earlier_release_ended_reads_as_before(world: World) -> None:
    batch = world.prepared(LLAMA)
    counts = {"succeeded": 0, "failed": 1}
    earlier = replace(batch, status="succeeded", counts=counts)
    assert (earlier.ended, earlier.reason) == (True, None)
    assert replace(batch, status="failed", stop="exceeded", counts=counts).reason is None
    assert replace(batch, status="failed", error="gone", counts={}).reason == "gone"


def test_more_failing_lines_than_tolerated_fail_the_batch_and_cancel_what_runs(
    world: World, replicate: ReplicateInMemory, clock: Clock
) -> None:
    batch = world.prepared(LLAMA, LLAMA, LLAMA, tolerated_failure_percentage=10)
    messages = world.messages(batch)
    ids = [world.take(message) for message in messages[:2]]
    for id_ in ids:
        world.submissions.submit(id_)
    world.end(ids[0], replicate, "failed", error="no")
    assert world.finish(batch, exceeded=True)["open"] == 1
    with pytest.raises(NoLongerWanted):
        world.take(messages[2])
    clock.advance(61)
    world.submissions.sweep(
        10, plenty, {"batch": lambda id_: world.control.sweep_one(id_, world.submissions.canceling, plenty)}
    )
    assert len(replicate.canceled) == 1
    assert world.finish(batch, exceeded=True)["open"] == 0
    assert world.there(batch).status == "failed"
    assert [line["status"] for line in world.results(batch)] == ["failed", "canceled", "canceled"]
    assert "tolerates" in world.results(batch)[2]["error"]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.sampled_from(["succeeded", "failed", "refused", "never"]), min_size=1, max_size=12))
def test_whatever_becomes_of_the_lines_each_has_one_result_at_its_place(world: World, fates: list[str]) -> None:
    batch = world.prepared(*(BAD if fate == "refused" else LLAMA for fate in fates))
    for message in world.messages(batch):
        fate = fates[message["n"] - 1]
        if fate != "never":
            prediction = world.table.get(world.take(message))
            assert prediction
            world.table.end(prediction, Status(fate), None, world.clock.now())
    world.finish(batch)
    expected = ["failed" if fate == "never" else fate for fate in fates]
    results = world.results(batch)
    assert [line["n"] for line in results] == list(range(1, len(fates) + 1))
    assert [line["status"] for line in results] == expected


# -- cancel --------------------------------------------------------------------------------------------------------


def test_cancel_stops_new_lines_and_cancels_running_ones_upstream(world: World, replicate: ReplicateInMemory) -> None:
    batch = world.prepared(LLAMA, LLAMA, LLAMA, LLAMA)
    messages = world.messages(batch)
    ids = [world.take(message) for message in messages[:3]]
    for id_ in ids[:2]:
        world.submissions.submit(id_)
    world.end(ids[0], replicate, output="done")
    for _ in range(2):
        halted = world.control.halt(batch, world.submissions.canceling, plenty)
    assert (halted.stop, halted.stopped_before, halted.ended) == ("canceled", None, False)
    with pytest.raises(NoLongerWanted):
        world.take(messages[3])
    world.submissions.submit(ids[2])
    assert (len(replicate.creates), len(replicate.canceled)) == (2, 1)
    world.finish(batch)
    assert [line["status"] for line in world.results(batch)] == ["succeeded", "canceled", "canceled", "canceled"]
    assert world.there(batch).status == "canceled"
    assert world.control.halt(world.there(batch), world.submissions.canceling, plenty).status == "canceled"


def test_canceled_batch_does_not_wait_for_its_map(world: World, replicate: ReplicateInMemory, clock: Clock) -> None:
    # Its map waits for the second line, whose message is in the dead-letter queue, and would for days.
    batch = world.prepared(LLAMA, LLAMA)
    id_ = world.take(world.messages(batch)[0])
    world.submissions.submit(id_)
    for _ in range(2):
        world.control.halt(batch, world.submissions.canceling, plenty)
    assert sorted(world.executions) == [f"{batch.id}-1-1", f"{batch.id}-1-2"]
    assert prepare(world.batches, batch.id, 1)["lines"] == 0
    assert world.finish(batch)["open"] == 0
    assert [line["status"] for line in world.results(batch)] == ["canceled"] * 2
    assert world.control.again(world.there(batch)).attempt == 2


def test_map_of_a_canceled_batch_is_stopped_by_the_sweep_where_the_call_had_no_time(world: World, clock: Clock) -> None:
    batch = world.prepared(LLAMA)
    world.run(batch)
    world.control.halt(batch, world.submissions.canceling, lambda: 0)
    assert list(world.executions) == [f"{batch.id}-1-1"]
    clock.advance(1)
    for _ in range(3):
        world.control.sweep_one(batch.id, world.submissions.canceling, plenty)
        clock.advance(61)
    assert sorted(world.executions) == [f"{batch.id}-1-1", f"{batch.id}-1-2"]


def test_line_that_was_written_down_while_its_batch_was_canceled_is_never_submitted(
    world: World, replicate: ReplicateInMemory
) -> None:
    batch = world.prepared(LLAMA)
    ids = world.run(batch, submit=False)
    # It was let in after the cancel had looked for running lines.
    world.batches.stop(batch, "canceled")
    world.submissions.submit(ids[1])
    prediction = world.table.get(ids[1])
    assert prediction
    assert (prediction.visible, replicate.creates) == ("canceled", [])


def test_line_that_was_late_is_not_submitted_when_its_batch_is_run_anew(
    world: World, replicate: ReplicateInMemory
) -> None:
    batch = world.prepared(LLAMA)
    late = world.run(batch, submit=False)[1]
    world.control.halt(batch, world.submissions.canceling, lambda: 0)
    world.batches.end(batch, status="canceled", counts={"canceled": 1}, results_key="alice/batches/x/results-1.jsonl")
    world.batches.begin_again(world.there(batch))
    world.submissions.submit(late)
    assert replicate.creates == []


def test_cancel_that_runs_out_of_time_is_gone_on_with_by_the_sweep(
    world: World, replicate: ReplicateInMemory, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("predictions.batches.manage._CHUNK", 2)
    batch = world.prepared(*[LLAMA] * 5)
    world.run(batch)
    seconds = iter([100.0] * 3 + [0.0] * 10)
    halted = world.control.halt(batch, world.submissions.canceling, lambda: next(seconds))
    assert (halted.stopped_before, len(replicate.canceled)) == (2, 3)
    clock.advance(1)
    world.submissions.sweep(
        10, plenty, {"batch": lambda id_: world.control.sweep_one(id_, world.submissions.canceling, plenty)}
    )
    assert (world.there(batch).stopped_before, len(set(replicate.canceled))) == (None, 5)


def test_batch_that_is_canceled_while_it_is_prepared_starts_nothing(world: World) -> None:
    batch = world.make(LLAMA, LLAMA)
    world.control.halt(batch, world.submissions.canceling, plenty)
    prepare(world.batches, batch.id, 1)
    with pytest.raises(NoLongerWanted):
        world.take(world.messages(batch)[0])
    world.finish(batch)
    assert [line["status"] for line in world.results(batch)] == ["canceled"] * 2


# -- retry ---------------------------------------------------------------------------------------------------------


def test_batch_that_runs_or_has_nothing_to_retry_is_not_retried(world: World, replicate: ReplicateInMemory) -> None:
    batch = world.prepared(LLAMA, BAD)
    assert refused(lambda: world.control.again(batch))[0] == 409
    world.end(world.run(batch)[1], replicate, output="done")
    world.finish(batch)
    assert refused(lambda: world.control.again(world.there(batch)))[0] == 409


def test_batch_that_would_expire_before_its_end_is_not_retried(
    world: World, replicate: ReplicateInMemory, clock: Clock
) -> None:
    batch = world.prepared(LLAMA)
    world.end(world.run(batch)[1], replicate, "failed", error="no")
    world.finish(batch)
    clock.advance(RETENTION - 2 * 86400)
    assert refused(lambda: world.control.again(world.there(batch)))[0] == 409
    assert world.there(batch).attempt == 1


def test_retry_runs_what_failed_and_keeps_what_succeeded(world: World, replicate: ReplicateInMemory) -> None:
    batch = world.prepared(LLAMA, LLAMA, BAD, LLAMA)
    ids = world.run(batch)
    world.end(ids[1], replicate, output="first")
    world.end(ids[2], replicate, "failed", error="no")
    world.end(ids[4], replicate, "canceled")
    world.finish(batch)
    again = world.control.again(world.there(batch))
    assert (again.attempt, again.status) == (2, "preparing")
    assert f"{batch.id}-2-1" in world.executions
    assert prepare(world.batches, batch.id, 2)["lines"] == 2
    assert [message["n"] for message in world.messages(again)] == [2, 4]
    new_ids = world.run(again)
    assert set(new_ids.values()).isdisjoint(ids.values())
    world.end(new_ids[2], replicate, output="second")
    world.end(new_ids[4], replicate, "failed", error="still no")
    world.finish(batch)
    assert [(line["n"], line["id"], line["status"]) for line in world.results(batch)] == [
        (1, ids[1], "succeeded"),
        (2, new_ids[2], "succeeded"),
        (3, None, "refused"),
        (4, new_ids[4], "failed"),
    ]
    assert len(replicate.creates) == 5
    third = world.control.again(world.there(batch))
    assert prepare(world.batches, batch.id, 3)["lines"] == 1
    assert [message["n"] for message in world.messages(third)] == [4]


# -- events --------------------------------------------------------------------------------------------------------


def records() -> Iterator[dict[str, Any]]:
    """The table's stream, as Lambda passes it."""
    table = clients.client("dynamodb").describe_table(TableName="predictions")["Table"]
    streams: Any = clients._session().create_client("dynamodbstreams")
    (shard,) = streams.describe_stream(StreamArn=table["LatestStreamArn"])["StreamDescription"]["Shards"]
    iterator = streams.get_shard_iterator(
        StreamArn=table["LatestStreamArn"], ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
    )["ShardIterator"]
    for record in streams.get_records(ShardIterator=iterator)["Records"]:
        # Lambda gives seconds.
        record["dynamodb"]["ApproximateCreationDateTime"] = record["dynamodb"][
            "ApproximateCreationDateTime"
        ].timestamp()
        yield record


def test_end_of_a_batch_is_one_event(world: World, replicate: ReplicateInMemory) -> None:
    batch = world.prepared(LLAMA, BAD)
    world.end(world.run(batch)[1], replicate, "failed", error="no")
    world.finish(batch)
    found = [r for r in records() if r["dynamodb"]["Keys"] == {"pk": {"S": f"batch#{batch.id}"}, "sk": {"S": "status"}}]
    (event,) = filter(None, (event_of(record["dynamodb"], "outputs") for record in found))
    assert event == (
        "Batch Completed",
        {
            "version": "1",
            "event_id": f"{batch.id}-1-completed",
            "id": batch.id,
            "object": "batch",
            "owner": "alice",
            "status": "failed",
            "attempt": 1,
            "recipe": None,
            "manifest": None,
            "total": 2,
            "counts": {"succeeded": 0, "failed": 1, "canceled": 0, "refused": 1},
            "depth": 0,
            "error": "No line of the batch succeeded (1 failed, 1 refused). The results hold the reason of each line.",
            "results": f"s3://outputs/alice/batches/{batch.id}/results-1.jsonl",
            "created_at": batch.created_at,
            "completed_at": world.there(batch).completed_at,
        },
    )
    json.dumps(event)


def test_stream_of_a_batch_puts_its_end_on_the_bus_once_for_each_attempt(
    world: World, outputs: OutputsBucket, replicate: ReplicateInMemory
) -> None:
    bus = Bus()
    batch = world.prepared(LLAMA)
    for _ in range(2):
        world.end(world.run(world.there(batch)).popitem()[1], replicate, "failed", error="no")
        world.finish(batch)
        prepare(world.batches, batch.id, world.control.again(world.there(batch)).attempt)
    of_batches = [record for record in records() if record["dynamodb"]["Keys"]["pk"]["S"].startswith("batch#")]
    assert make_changes(world.table, outputs).publish(of_batches) is None
    assert [(kind, detail["attempt"]) for kind, detail in bus.taken] == [("Batch Completed", 1), ("Batch Completed", 2)]
    filters = resources("AWS::Lambda::EventSourceMapping")["ChangesEventSource"]["Properties"]["FilterCriteria"]
    patterns = [json.loads(each["Pattern"]) for each in filters["Filters"] if "Pattern" in each]
    ends = [r for r in of_batches if "visible" in r["dynamodb"].get("NewImage", {})]
    assert ends
    for record in ends:
        assert any(passes(pattern, record) for pattern in patterns)
