"""How schemas are had: at what cost, for how long, and that none of it can keep a prediction from being started."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError
from predictions.aws import clients
from predictions.errors import PredictionThrottled, Problem
from predictions.intents.model import Intent, Reference, create_intent, model_reference
from predictions.lifecycle.model_lookup import ModelLookup
from predictions.observability import metrics
from predictions.store.payloads import PAYLOAD_LIMIT_BYTES
from predictions.store.predictions import PredictionsTable
from predictions.store.records import StoredSchema
from predictions.store.schemas import StoredSchemas
from predictions.upstream.client import Replicate

from tests.support.apps import AwsCalls
from tests.support.fakes import VERSION, Clock, Executed, ReplicateInMemory, answer, fail, refusing
from tests.support.fixtures import make_submissions
from tests.support.protocol import Submissions

OTHER = "a" * 64
NAMED = f"stability-ai/sdxl:{VERSION}"
GOOD = {"prompt": "a fox"}
BAD = {"seed": "x", "steps": 0}
WRONG = [
    {"field": "input.prompt", "detail": "This field is required."},
    {"field": "input.seed", "detail": "Must be a whole number, not a string."},
    {"field": "input.steps", "detail": "Must be at least 1 (got 0)."},
]


def document(**properties: Any) -> dict[str, Any]:
    """A version's `openapi_schema`."""
    described = {
        "prompt": {"type": "string"}, "seed": {"type": "integer"}, "steps": {"type": "integer", "minimum": 1},
        **properties,
    }  # fmt: skip
    schemas = {"Input": {"type": "object", "required": ["prompt"], "properties": described}, "Output": {}}
    return {"openapi": "3.0.2", "info": {"title": "Cog"}, "components": {"schemas": schemas}}


@pytest.fixture(autouse=True)
def described(replicate: ReplicateInMemory) -> None:
    """Replicate gives schemas, wherever it can."""
    replicate.models = {
        "meta/llama": {"is_official": True, "latest_version": {"id": OTHER, "openapi_schema": document()}},
        "stability-ai/sdxl": {
            "is_official": False,
            "latest_version": {"id": VERSION, "openapi_schema": document()},
        },
    }
    replicate.versions = {f"stability-ai/sdxl/versions/{VERSION}": {"id": VERSION, "openapi_schema": document()}}
    release = {"number": 3, "model": "stability-ai/sdxl", "version": VERSION}
    replicate.deployments = {"acme/painter": {"owner": "acme", "name": "painter", "current_release": release}}


def wanted(given: dict[str, Any], version: str | None = None, reference: Reference | None = None) -> Intent:
    body = {"input": given, **({"version": version} if version else {})}
    return create_intent(
        json.dumps(body).encode(), {}, owner="alice", reference=reference, allow_loopback_webhooks=False
    )


def queued(table: PredictionsTable, clock: Clock, intent: Intent) -> str:
    """An intent of an event, only written down."""
    return table.put_intent(
        replace(intent, source="queue"),
        version=intent.reference.version,
        deadline=int(clock.now()) + 3600,
        expires=int(clock.now()) + 864000,
        claim=False,
        execution_arn="arn:x",
        now=clock.now(),
    ).id


def asked(replicate: ReplicateInMemory) -> list[str]:
    """What Replicate was asked besides creates."""
    return [request.url.path.removeprefix("/v1") for request in replicate.asked if request.method == "GET"]


def unusable() -> int:
    """How many schemas were counted as unusable."""
    return len(metrics.metric_set.get("SchemasUnusable", {}).get("Value", []))


WAYS = {
    "community model": ("stability-ai/sdxl", None),
    "official model": ("meta/llama", None),
    "named version": (NAMED, None),
    "model's route": (None, model_reference("model", "stability-ai", "sdxl")),
    "deployment": (None, model_reference("deployment", "acme", "painter")),
}


@pytest.mark.parametrize("way", WAYS)
def test_wrong_input_is_refused_whole_before_anything_is_written(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, way: str
) -> None:
    intent = wanted(BAD, *WAYS[way])
    with pytest.raises(Problem) as problem:
        submissions.start(intent)
    assert (problem.value.status, problem.value.title) == (422, "Input validation failed")
    assert problem.value.invalid_fields == WRONG
    assert "input.seed: Must be a whole number" in problem.value.detail
    assert table.get(intent.id) is None
    assert replicate.creates == []
    assert executed.inputs == {}


@pytest.mark.parametrize("way", WAYS)
def test_right_input_is_submitted(submissions: Submissions, replicate: ReplicateInMemory, way: str) -> None:
    submissions.start(wanted(GOOD, *WAYS[way]))
    assert [body["input"] for body in replicate.creates] == [GOOD]


@pytest.mark.parametrize("way", WAYS)
def test_turned_off_nothing_is_checked_and_no_schema_is_asked_for(
    table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock, way: str
) -> None:
    submissions = make_submissions(table, replicate, executed, clock, schemas=None)
    submissions.start(wanted(BAD, *WAYS[way]))
    assert [body["input"] for body in replicate.creates] == [BAD]
    assert [path for path in asked(replicate) if "/versions/" in path or "/deployments/" in path] == []


@pytest.mark.parametrize(("value", "checks"), [("true", True), ("false", False)])
def test_parameter_turns_it_on_and_off(
    table: PredictionsTable, monkeypatch: pytest.MonkeyPatch, value: str, checks: bool
) -> None:
    monkeypatch.setenv("VALIDATE_INPUT", value)
    assert (ModelLookup.from_env(StoredSchemas.from_env(), Replicate.from_env())._schemas is not None) == checks


def test_bare_version_of_an_unknown_model_is_left_to_replicate(
    submissions: Submissions, replicate: ReplicateInMemory
) -> None:
    replicate.faults = [answer(422, {"detail": "no", "invalid_fields": [{"field": "input.seed", "detail": "no"}]})]
    with pytest.raises(Problem) as problem:
        submissions.start(wanted(BAD, VERSION))
    assert problem.value.invalid_fields == [{"field": "input.seed", "detail": "no"}]
    assert len(replicate.creates) == 1
    assert asked(replicate) == []


@pytest.mark.parametrize("same_function", [True, False])
def test_second_prediction_of_a_bare_version_is_checked(
    table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock, same_function: bool
) -> None:
    first = make_submissions(table, replicate, executed, clock)
    first.start(wanted(BAD, VERSION))
    assert StoredSchemas.from_env().get_schema(VERSION, clock.now()) == StoredSchema("stability-ai/sdxl", None)
    second = first if same_function else make_submissions(table, replicate, executed, clock)
    with pytest.raises(Problem) as problem:
        second.start(wanted(BAD, VERSION))
    assert problem.value.invalid_fields == WRONG
    second.start(wanted(GOOD, VERSION))
    assert [body["input"] for body in replicate.creates] == [BAD, GOOD]
    assert asked(replicate) == [f"/models/stability-ai/sdxl/versions/{VERSION}"]


def test_event_of_a_bare_version_is_checked_and_teaches_as_well(
    submissions: Submissions, table: PredictionsTable, clock: Clock
) -> None:
    submissions.submit(queued(table, clock, wanted(BAD, VERSION)))
    second = queued(table, clock, wanted(BAD, VERSION))
    submissions.submit(second)
    ended = table.get(second)
    assert ended is not None
    assert (ended.visible, ended.error) == ("failed", " ".join(f"{each['field']}: {each['detail']}" for each in WRONG))


def test_model_of_a_version_is_noted_once(
    table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock
) -> None:
    both = [make_submissions(table, replicate, executed, clock) for _ in range(2)]
    for each in both:
        each.lookup.find(wanted(GOOD, VERSION).reference)  # before either has learned it
    both[0].start(wanted(GOOD, VERSION))
    clock.advance(1)
    both[1].start(wanted(GOOD, VERSION))
    kept = StoredSchemas.from_env().get_schema(VERSION, clock.now() + 30 * 86400 - 2)
    assert kept == StoredSchema("stability-ai/sdxl", None)
    assert StoredSchemas.from_env().get_schema(VERSION, clock.now() + 30 * 86400 - 1) is None, "the first note stays"


@pytest.mark.parametrize(
    "told",
    [
        {"model": None}, {"model": 7}, {"model": "sdxl"}, {"model": "a/../b"}, {"model": "../.."},
        {"model": "a/b?x="}, {"model": "a/" + "b" * 200}, {"model": "ä/b"}, {"version": "hidden"}, {"version": OTHER},
    ],
    ids=str,
)  # fmt: skip
def test_answer_that_names_no_model_of_the_version_teaches_nothing(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock, told: dict[str, Any]
) -> None:
    replicate.faults = [lambda request, there: httpx.Response(201, json=there.accept(request, **told))]
    submissions.start(wanted(BAD, VERSION))
    assert StoredSchemas.from_env().get_schema(VERSION, clock.now()) is None


@pytest.mark.parametrize("way", [way for way in WAYS if way != "named version"])
def test_only_a_bare_version_is_noted(
    submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock, way: str
) -> None:
    replicate.versions.clear()
    submissions.start(wanted(GOOD, *WAYS[way]))
    assert StoredSchemas.from_env().get_schema(VERSION, clock.now()) is None


def test_large_schema_whose_object_has_expired_is_asked_for_again_by_the_version_alone(
    table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock
) -> None:
    large = document(choice={"enum": [f"choice {n} " + "x" * 50 for n in range(3_000)]})
    replicate.versions[f"stability-ai/sdxl/versions/{VERSION}"]["openapi_schema"] = large
    make_submissions(table, replicate, executed, clock).start(wanted(GOOD, NAMED))
    (stored,) = clients.client("s3").list_objects_v2(Bucket="outputs", Prefix="payloads/schemas/")["Contents"]
    clients.client("s3").delete_object(Bucket="outputs", Key=stored["Key"])
    with pytest.raises(Problem):
        make_submissions(table, replicate, executed, clock).start(wanted(BAD, VERSION))


@pytest.mark.parametrize(
    ("way", "paths"),
    [
        ("community model", ["/models/stability-ai/sdxl"]),
        ("official model", ["/models/meta/llama"]),
        ("named version", [f"/models/stability-ai/sdxl/versions/{VERSION}"]),
        ("deployment", ["/deployments/acme/painter", f"/models/stability-ai/sdxl/versions/{VERSION}"]),
    ],
)
def test_replicate_is_asked_once_by_a_warm_function(
    submissions: Submissions, replicate: ReplicateInMemory, way: str, paths: list[str]
) -> None:
    for _ in range(3):
        submissions.start(wanted(GOOD, *WAYS[way]))
    assert asked(replicate) == paths


def test_cold_function_reads_the_table_once_and_asks_replicate_nothing(
    table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock
) -> None:
    make_submissions(table, replicate, executed, clock).start(wanted(GOOD, NAMED))
    reads = []
    for options in ({}, {"schemas": None}):
        cold = make_submissions(table, replicate, executed, clock, **options)
        calls = AwsCalls()
        cold.start(wanted(GOOD, NAMED))
        cold.start(wanted(GOOD, NAMED))
        reads.append(calls.made.count("dynamodb.GetItem"))
    assert reads[0] == reads[1] + 1
    assert asked(replicate) == [f"/models/stability-ai/sdxl/versions/{VERSION}"]
    with pytest.raises(Problem):
        make_submissions(table, replicate, executed, clock).start(wanted(BAD, NAMED))


def test_kept_schema_expires(
    table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock
) -> None:
    for _ in range(2):
        make_submissions(table, replicate, executed, clock).start(wanted(GOOD, NAMED))
        clock.advance(31 * 86400)
    assert len(asked(replicate)) == 2


def test_description_of_a_model_is_asked_for_anew_after_minutes(
    submissions: Submissions, replicate: ReplicateInMemory, clock: Clock
) -> None:
    submissions.start(wanted({**GOOD, "style": 7}, "meta/llama"))
    changed = document(style={"type": "string"})
    replicate.models["meta/llama"]["latest_version"]["openapi_schema"] = changed
    submissions.start(wanted({**GOOD, "style": 7}, "meta/llama"))
    clock.advance(301)
    with pytest.raises(Problem):
        submissions.start(wanted({**GOOD, "style": 7}, "meta/llama"))


def test_next_release_of_a_deployment_is_seen_after_minutes(
    submissions: Submissions, replicate: ReplicateInMemory, clock: Clock
) -> None:
    intent = wanted({**GOOD, "style": 7}, *WAYS["deployment"])
    submissions.start(intent)
    replicate.deployments["acme/painter"]["current_release"]["version"] = OTHER
    replicate.versions[f"stability-ai/sdxl/versions/{OTHER}"] = {"openapi_schema": document(style={"type": "string"})}
    clock.advance(301)
    with pytest.raises(Problem):
        submissions.start(wanted({**GOOD, "style": 7}, *WAYS["deployment"]))


def test_large_schema_is_kept_in_the_bucket(
    table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock
) -> None:
    large = document(choice={"enum": [f"choice {n} " + "x" * 50 for n in range(3_000)]})
    replicate.versions[f"stability-ai/sdxl/versions/{VERSION}"]["openapi_schema"] = large
    make_submissions(table, replicate, executed, clock).start(wanted(GOOD, NAMED))
    (stored,) = clients.client("s3").list_objects_v2(Bucket="outputs", Prefix="payloads/schemas/")["Contents"]
    assert stored["Size"] > PAYLOAD_LIMIT_BYTES
    with pytest.raises(Problem):
        make_submissions(table, replicate, executed, clock).start(wanted({**GOOD, "choice": "none"}, NAMED))
    assert len(asked(replicate)) == 1
    # The bucket's rules may remove it before the table forgets it.
    clients.client("s3").delete_object(Bucket="outputs", Key=stored["Key"])
    with pytest.raises(Problem):
        make_submissions(table, replicate, executed, clock).start(wanted({**GOOD, "choice": "none"}, NAMED))
    assert len(asked(replicate)) == 2


# -- what must never keep a prediction from being started ----------------------------------------------------------


@pytest.mark.parametrize("way", ["named version", "deployment"])
@pytest.mark.parametrize(
    "fault",
    [
        answer(404), answer(401), answer(429), answer(500), fail(httpx.ReadTimeout), fail(httpx.ConnectError),
        lambda *_: httpx.Response(200, content=b"["),
        lambda *_: httpx.Response(200, content=b"[" * 100_000),
        lambda *_: httpx.Response(200, content=b" " * (3 * 1024 * 1024)),
        lambda *_: httpx.Response(200, json=[]),
        lambda *_: httpx.Response(302, headers={"location": "http://169.254.169.254/"}),
    ],
)  # fmt: skip
def test_schema_that_replicate_does_not_give_is_done_without(
    submissions: Submissions, replicate: ReplicateInMemory, fault: Any, way: str
) -> None:
    replicate.read_faults = [fault] * 2
    for _ in range(2):
        submissions.start(wanted(BAD, *WAYS[way]))
    assert [body["input"] for body in replicate.creates] == [BAD, BAD]
    # The second prediction does not wait for it again.
    assert len(asked(replicate)) == 1


def test_failure_is_forgotten_after_a_minute(
    submissions: Submissions, replicate: ReplicateInMemory, clock: Clock
) -> None:
    replicate.read_faults = [fail(httpx.ReadTimeout)]
    submissions.start(wanted(BAD, NAMED))
    clock.advance(61)
    with pytest.raises(Problem):
        submissions.start(wanted(BAD, NAMED))


def test_schema_is_asked_for_with_little_patience(submissions: Submissions, replicate: ReplicateInMemory) -> None:
    submissions.start(wanted(GOOD, *WAYS["deployment"]))
    timeouts = [r.extensions["timeout"]["read"] for r in replicate.asked if r.method == "GET"]
    assert timeouts == [2.5, 2.5]


@pytest.mark.parametrize(
    "openapi_schema", [None, 7, {}, {"components": {"schemas": {"Input": {"$ref": "https://a/b"}}}}]
)
@pytest.mark.parametrize("way", WAYS)
def test_unusable_schema_is_done_without_and_counted_once(
    submissions: Submissions, replicate: ReplicateInMemory, way: str, openapi_schema: Any
) -> None:
    for model in replicate.models.values():
        model["latest_version"]["openapi_schema"] = openapi_schema
    replicate.versions[f"stability-ai/sdxl/versions/{VERSION}"]["openapi_schema"] = openapi_schema
    for _ in range(2):
        submissions.start(wanted(BAD, *WAYS[way]))
    assert [body["input"] for body in replicate.creates] == [BAD, BAD]
    # To have none is no fault.
    assert unusable() == (0 if openapi_schema is None else 1)


def test_unusable_schema_is_not_asked_for_by_the_next_cold_function_but_the_next_day(
    table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock
) -> None:
    replicate.versions[f"stability-ai/sdxl/versions/{VERSION}"]["openapi_schema"] = {"components": 7}
    for count in (1, 1, 2):
        make_submissions(table, replicate, executed, clock).start(wanted(BAD, NAMED))
        assert len(asked(replicate)) == count
        clock.advance(50_000)


@pytest.mark.parametrize("version", [NAMED, VERSION])
@pytest.mark.parametrize("operation", ["GetItem", "PutItem"])
def test_table_that_refuses_schemas_does_not_matter(
    submissions: Submissions, replicate: ReplicateInMemory, operation: str, version: str
) -> None:
    with refusing(operation, "AccessDeniedException", lambda body: "schema#" in json.dumps(body), service="dynamodb"):
        submissions.start(wanted(GOOD, version))
    assert len(replicate.creates) == 1


def test_check_that_would_last_is_done_without(submissions: Submissions, replicate: ReplicateInMemory) -> None:
    replicate.models["meta/llama"]["latest_version"]["openapi_schema"] = document(x={"items": {"type": "string"}})
    submissions.start(wanted({"x": [1] * 150_000}, "meta/llama"))
    assert len(replicate.creates) == 1


@pytest.mark.parametrize(
    "release",
    [
        None, 7, {}, {"model": 7, "version": VERSION}, {"model": "a/b", "version": "latest"},
        {"model": "a/../b", "version": VERSION}, {"model": "a/b?x=", "version": VERSION},
        {"model": "../..", "version": VERSION},
    ],
)  # fmt: skip
def test_release_of_another_form_is_done_without(
    submissions: Submissions, replicate: ReplicateInMemory, release: Any
) -> None:
    replicate.deployments["acme/painter"]["current_release"] = release
    submissions.start(wanted(BAD, *WAYS["deployment"]))
    assert asked(replicate) == ["/deployments/acme/painter"]
    assert len(replicate.creates) == 1


# -- intents of events ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_intent_of_an_event_with_a_wrong_input_fails_with_all_that_is_wrong(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock, way: str
) -> None:
    prediction_id = queued(table, clock, wanted(BAD, *WAYS[way]))
    submissions.submit(prediction_id)
    ended = table.get(prediction_id)
    assert ended is not None
    assert ended.visible == "failed"
    assert ended.error == " ".join(f"{each['field']}: {each['detail']}" for each in WRONG)
    assert replicate.creates == []


@pytest.mark.parametrize("way", WAYS)
def test_intent_of_an_event_with_a_right_input_is_submitted(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock, way: str
) -> None:
    prediction_id = queued(table, clock, wanted(GOOD, *WAYS[way]))
    submissions.submit(prediction_id)
    assert len(replicate.creates) == 1


def test_intent_of_http_is_not_checked_again(
    submissions: Submissions, replicate: ReplicateInMemory, clock: Clock
) -> None:
    replicate.faults = [answer(429, {"detail": "~5s"})]
    started = submissions.start(wanted(GOOD, NAMED))
    replicate.versions.clear()
    calls = AwsCalls()
    with pytest.raises(PredictionThrottled):
        submissions.submit(started.id)
    clock.advance(6)
    submissions.submit(started.id)
    assert len(replicate.creates) == 2
    assert len(asked(replicate)) == 1
    assert "dynamodb.GetItem" in calls.made


def test_key_of_a_refused_input_is_free(submissions: Submissions, replicate: ReplicateInMemory) -> None:
    def keyed(given: dict[str, Any]) -> Intent:
        body = json.dumps({"version": NAMED, "input": given}).encode()
        headers = {"idempotency-key": "order-7"}
        return create_intent(body, headers, owner="alice", reference=None, allow_loopback_webhooks=False)

    for _ in range(2):
        with pytest.raises(Problem) as problem:
            submissions.start(keyed(BAD))
        assert problem.value.invalid_fields == WRONG
    submissions.start(keyed(GOOD))
    assert len(replicate.creates) == 1


def test_table_forgets_a_schema_by_its_time_to_live(table: PredictionsTable) -> None:
    StoredSchemas.from_env().put_schema(VERSION, "{}", 1_000, "acme/fox")
    item = clients.client("dynamodb").get_item(
        TableName="predictions", Key={"pk": {"S": f"schema#{VERSION}"}, "sk": {"S": "input"}}
    )["Item"]
    assert item["expires_at"] == {"N": "1000"}
    assert StoredSchemas.from_env().get_schema(VERSION, 999) == StoredSchema("acme/fox", "{}")
    assert StoredSchemas.from_env().get_schema(VERSION, 1_000) is None


def test_note_never_takes_the_place_of_what_is_kept_until_that_expires(table: PredictionsTable) -> None:
    StoredSchemas.from_env().put_schema(VERSION, "{}", 1_000, "acme/fox")
    StoredSchemas.from_env().put_model(VERSION, "acme/wolf", 5_000, 999)
    assert StoredSchemas.from_env().get_schema(VERSION, 999) == StoredSchema("acme/fox", "{}")
    StoredSchemas.from_env().put_model(VERSION, "acme/wolf", 5_000, 1_000)
    assert StoredSchemas.from_env().get_schema(VERSION, 1_000) == StoredSchema("acme/wolf", None)


def test_other_failure_of_the_bucket_is_told(table: PredictionsTable) -> None:
    StoredSchemas.from_env().put_schema(VERSION, json.dumps("x" * PAYLOAD_LIMIT_BYTES), 1_000, "acme/fox")
    with refusing("GetObject", "SlowDown", service="s3"), pytest.raises(ClientError):
        StoredSchemas.from_env().get_schema(VERSION, 1)
