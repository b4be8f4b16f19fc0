"""Once means once: what is accepted is answered as accepted, and a key never shows what another request started."""

import json
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError
from predictions.aws import clients
from predictions.aws.executions import Executions
from predictions.batches.manage import BatchControl
from predictions.batches.store import Batches
from predictions.files.outputs_bucket import OutputsBucket
from predictions.files.signed_urls import Distribution, PrivateKey
from predictions.ids import derived_id
from predictions.intake.invocation import RunJobs
from predictions.intents.sources import Message
from predictions.lifecycle.archive_outputs import copy
from predictions.pipelines.advance import PipelineExecutions
from predictions.pipelines.manage import PipelineApi
from predictions.pipelines.store import PipelinesTable
from predictions.recipes.store import RecipeItems
from predictions.store.predictions import PredictionsTable
from predictions.store.recent_requests import RecentRequests
from predictions.views.prediction import Presenter

from tests.support.apps import AwsCalls, Context, load_app, sample
from tests.support.batches import LLAMA, RETENTION
from tests.support.batches import World as BatchWorld
from tests.support.batches import world as batch_world  # noqa: F401  # a fixture
from tests.support.fakes import PNG, Clock, Died, Executed, Fault, ReplicateInMemory, faulty, refusing, served
from tests.support.fixtures import make_submissions
from tests.support.pipeline_definitions import step
from tests.support.pipelines import IMAGE
from tests.support.pipelines import World as PipelineWorld
from tests.support.pipelines import world as pipeline_world  # noqa: F401  # a fixture
from tests.support.predictions import FILE, current, raw_items, told, wanted
from tests.support.protocol import Submissions

Post = Callable[..., int]

BODIES: dict[str, Callable[[int], Any]] = {
    "batches": lambda n: {"requests": [{"model": "meta/llama", "input": {"prompt": f"{n}-{line}"}} for line in "ab"]},
    "pipelines": lambda n: {"steps": [step("one", {"prompt": str(n)})]},
}


@pytest.fixture
def post(
    table: PredictionsTable,
    outputs: OutputsBucket,
    submissions: Submissions,
    executed: Executed,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> Post:
    """`POST /batches` or `POST /pipelines` of the handlers; a function that dies is a 502 of API Gateway's."""
    apps: dict[str, Any] = {}
    for door in BODIES:
        with pytest.MonkeyPatch.context() as only_here:
            apps[door] = load_app(f"manage_{door}", only_here)
    stepfunctions = clients.client("stepfunctions")
    control = BatchControl(
        Batches("predictions", "outputs", now=clock.now),
        RecipeItems.from_env(),
        executed.batch_machine_arn,
        "inputs",
        RETENTION,
        stepfunctions,
        recent=RecentRequests.from_env(),
    )
    pipelines = PipelinesTable("predictions", outputs, clients.client("dynamodb"))
    executions = PipelineExecutions(pipelines, Executions(executed.machine_arn, stepfunctions), now=clock.now)
    api = PipelineApi(
        pipelines, table, RecentRequests.from_env(), submissions.lookup, executions, Presenter(outputs, 3600),
        RETENTION,        now=clock.now,
    )  # fmt: skip
    monkeypatch.setattr(apps["batches"], "control", control)
    monkeypatch.setattr(apps["pipelines"], "pipelines", api)

    def post(door: str, n: int, **headers: str) -> int:
        event = sample(f"manage_{door}", "create")
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        event["headers"] = {"Content-Type": "application/json", **named}
        event["multiValueHeaders"] = {name: [value] for name, value in event["headers"].items()}
        event["body"] = json.dumps(BODIES[door](n))
        event["requestContext"]["requestTimeEpoch"] = int(clock.now() * 1000)
        try:
            return int(apps[door].handler(event, Context())["statusCode"])
        except Died:
            return 502

    return post


def made(door: str) -> int:
    """How many batches or pipelines there are."""
    prefix = f"{door.removesuffix('es') if door == 'batches' else door.removesuffix('s')}#"
    found = clients.client("dynamodb").scan(TableName="predictions")["Items"]
    return sum(item["sk"]["S"] == "status" and item["pk"]["S"].startswith(prefix) for item in found)


@pytest.mark.parametrize("door", BODIES)
@pytest.mark.parametrize("fault", Fault)
def test_request_without_key_that_is_repeated_on_5xx_after_a_fault_at_any_call_is_made_once(
    post: Post, clock: Clock, door: str, fault: Fault
) -> None:
    dies = fault in (Fault.DIED_BEFORE, Fault.DIED_AFTER)
    for n in count():
        clients._api_url = None
        before = made(door)
        with faulty(fault, n) as calls:
            # Only a client that counts its attempts can find again what a function began before it died.
            status = post(door, n, **({"X_Stainless_Retry_Count": "0"} if dies else {}))
        if status >= 500:
            assert calls[n] != "stepfunctions.StartExecution" or dies, "it was written down, so it is accepted"
            clock.advance(1)
            status = post(door, n, **({"X_Stainless_Retry_Count": "1"} if dies else {}))
        assert status == 201, calls[n]
        assert made(door) - before == 1, calls[n]
        if len(calls) <= n:
            break
    assert n >= 4, "faults struck"


@pytest.mark.parametrize("door", BODIES)
def test_same_request_is_another_one_unless_its_client_says_that_it_repeats(
    post: Post, clock: Clock, door: str
) -> None:
    for expected, headers in (
        (1, {}),
        (2, {}),
        (3, {"X_Stainless_Retry_Count": "0"}),
        (3, {"X_Stainless_Retry_Count": "1"}),
        (3, {"X_Stainless_Retry_Count": "2"}),
        (4, {"X_Stainless_Retry_Count": "0"}),
    ):
        assert post(door, 0, **headers) == 201
        assert made(door) == expected
        clock.advance(10)
    clock.advance(121)
    post(door, 0, X_Stainless_Retry_Count="1")
    assert made(door) == 5


@pytest.mark.parametrize("door", BODIES)
def test_request_whose_answer_cannot_be_put_together_makes_nothing(post: Post, door: str) -> None:
    clients._api_url = None
    with refusing("GetParameter", "ThrottlingException", service="ssm"):
        assert post(door, 0) == 503
    assert made(door) == 0


def test_pipeline_that_was_repeated_is_answered_though_it_cannot_be_read(post: Post) -> None:
    assert post("pipelines", 0, Idempotency_Key="k") == 201
    # It is found by its key; that its steps cannot be read is no reason to send it again.
    with refusing("Query", "ThrottlingException", service="dynamodb"):
        assert post("pipelines", 0, Idempotency_Key="k") == 201
    assert made("pipelines") == 1


# -- cancel and retry of a batch ------------------------------------------------------------------------------------


def failed_batch(world: BatchWorld, replicate: ReplicateInMemory) -> Any:
    batch = world.prepared(LLAMA)
    world.end(world.run(batch)[1], replicate, "failed", error="no")
    world.finish(batch)
    return world.there(batch)


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.ANSWER_LOST])
def test_retry_of_a_batch_that_meets_a_fault_at_any_call_begins_one_attempt(
    batch_world: BatchWorld,  # noqa: F811
    replicate: ReplicateInMemory,
    fault: Fault,
) -> None:
    for n in count():
        batch = failed_batch(batch_world, replicate)
        clients._api_url = None
        with faulty(fault, n) as calls:
            try:
                assert batch_world.control.again(batch).attempt == 2
            except (ClientError, BotoCoreError):
                assert batch_world.there(batch).attempt == 1, "told of an error though it was begun"
                assert batch_world.control.again(batch_world.there(batch)).attempt == 2
        if len(calls) <= n:
            break
    assert n >= 3


def test_retry_that_its_client_repeats_is_answered_with_the_attempt_that_was_begun(
    batch_world: BatchWorld,  # noqa: F811
    replicate: ReplicateInMemory,
) -> None:
    begun = batch_world.control.again(failed_batch(batch_world, replicate))
    assert batch_world.control.again(batch_world.there(begun), repeated=True).attempt == 2
    assert batch_world.there(begun).attempt == 2


@pytest.mark.parametrize("route", ["retry", "cancel"])
def test_change_of_a_batch_that_cannot_be_shown_is_answered_without_what_is_missing(
    batch_world: BatchWorld,  # noqa: F811
    outputs: OutputsBucket,
    replicate: ReplicateInMemory,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    route: str,
) -> None:
    with pytest.MonkeyPatch.context() as only_here:
        app = load_app("manage_batches", only_here)
    distribution = Distribution("d111.cloudfront.net", "K2JCJMDEHXQW5F", damaged_key, now=clock.now)
    monkeypatch.setattr(app, "control", batch_world.control)
    batch_world.submissions.put_into(app, monkeypatch)
    monkeypatch.setattr(app, "presenter", Presenter(outputs, 3600, distribution))
    # A retry shows the results of the attempt before, a cancel how far the Map is.
    batch = failed_batch(batch_world, replicate) if route == "retry" else batch_world.prepared(LLAMA)
    event = sample("manage_batches", "cancel")
    event["path"], event["resource"] = f"/batches/{batch.id}/{route}", f"/batches/{{id}}/{route}"
    with refusing("ListMapRuns", "ThrottlingException"):
        answer = app.handler(event, Context())
    shown = json.loads(answer["body"])
    assert (answer["statusCode"], shown["results"]) == (200, None)
    assert (shown["attempt"], shown["cancel_requested"]) == ((2, False) if route == "retry" else (1, True))


def test_cancel_of_a_batch_that_fails_half_way_is_answered_and_finished_by_the_sweep(
    batch_world: BatchWorld,  # noqa: F811
    replicate: ReplicateInMemory,
    clock: Clock,
) -> None:
    batch = batch_world.prepared(LLAMA, LLAMA)
    batch_world.run(batch)
    with refusing("StopExecution", "ThrottlingException"):
        halted = batch_world.control.halt(batch, batch_world.submissions.canceling, lambda: 100.0)
    assert halted.stop == "canceled"
    clock.advance(61)
    batch_world.control.sweep_one(batch.id, batch_world.submissions.canceling, lambda: 100.0)
    assert len(set(replicate.canceled)) == 2
    assert f"{batch.id}-1-2" in batch_world.executions


# -- what was paid for is never answered 5xx ------------------------------------------------------------------------


def ending(
    submissions: Callable[[], Submissions], outputs: OutputsBucket, replicate: ReplicateInMemory, clock: Clock
) -> Callable[[float], None]:
    """While its caller waits, the prediction ends with a file, which is copied."""

    def sleep(seconds: float) -> None:
        clock.advance(seconds)
        for upstream_id, prediction in replicate.predictions.items():
            if prediction["status"] == "starting":
                replicate.finish(upstream_id, output=[FILE])
        ours = submissions()
        for item in clients.client("dynamodb").scan(TableName="predictions")["Items"]:
            if item["sk"]["S"] == "status" and item["rank"]["N"] != "9":
                id_ = item["id"]["S"]
                ours.poll(id_)
                copy(ours.table, outputs, id_, 1, remaining_seconds=lambda: 900, now=clock.now)

    return sleep


def refused_key() -> PrivateKey:
    raise ClientError({"Error": {"Code": "AccessDeniedException", "Message": ""}}, "GetSecretValue")


def damaged_key() -> PrivateKey:
    return PrivateKey.from_json('{"p": "0", "q": 7}')


@pytest.mark.parametrize("key", [refused_key, damaged_key], ids=["refused", "damaged"])
def test_start_whose_file_urls_cannot_be_signed_is_answered_201_starting(
    table: PredictionsTable,
    outputs: OutputsBucket,
    replicate: ReplicateInMemory,
    executed: Executed,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    key: Callable[[], PrivateKey],
) -> None:
    replicate.files[FILE] = served(PNG)
    monkeypatch.setattr(clock, "sleep", ending(lambda: submissions, outputs, replicate, clock))
    submissions = make_submissions(table, replicate, executed, clock)
    with pytest.MonkeyPatch.context() as only_here:
        app = load_app("start_prediction", only_here)
    distribution = Distribution("d111.cloudfront.net", "K2JCJMDEHXQW5F", key, now=clock.now)
    submissions.put_into(app, monkeypatch)
    monkeypatch.setattr(app, "presenter", Presenter(outputs, 3600, distribution))
    calls = AwsCalls()
    event = sample("start_prediction", "version")
    event["headers"]["Prefer"] = "wait=10"
    event["multiValueHeaders"]["Prefer"] = ["wait=10"]
    # Also when the same key asks again, after the end.
    for _ in range(2):
        answer = app.handler(event, Context())
        shown = json.loads(answer["body"])
        assert (answer["statusCode"], shown["status"], "output" in shown, shown["output_files"]) == (
            201, "starting", False, [],
        )  # fmt: skip
        assert "upstream_status" not in shown
        assert shown["urls"]["get"].endswith(shown["id"])
        assert shown["input"] == json.loads(event["body"])["input"]
        assert current(table, shown["id"]).visible == "succeeded", "it has ended, but its URLs cannot be signed"
    assert len(replicate.creates) == 1
    assert calls.made


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.ANSWER_LOST])
def test_start_that_meets_a_fault_at_any_call_after_its_create_is_answered_201(
    submissions: Submissions, replicate: ReplicateInMemory, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    with pytest.MonkeyPatch.context() as only_here:
        app = load_app("start_prediction", only_here)
    submissions.put_into(app, monkeypatch)
    event = sample("start_prediction", "version")
    for name in ("headers", "multiValueHeaders"):
        event[name] = {n: v for n, v in event[name].items() if n.lower() != "idempotency-key"}
    after = 0
    for n in count():
        clients._api_url = None
        replicate.asked.clear()
        with faulty(fault, n) as calls:
            status = app.handler(event, Context())["statusCode"]
        # The other way round: who is answered an error may start another one, since nothing was paid for.
        assert status == 201 or not replicate.creates, calls[n]
        after += status == 201 and len(calls) > n
        if len(calls) <= n:
            break
    assert after >= 3


@pytest.mark.parametrize("job", [
    {"model": "meta/llama", "prompt": "a fox"},
    {"model": "meta/llama", "input_data": {"prompt": "a fox"}},
])  # fmt: skip
def test_run_job_that_cannot_be_shown_is_answered_with_its_id_and_status(
    submissions: Submissions, outputs: OutputsBucket, replicate: ReplicateInMemory, clock: Clock, job: dict[str, Any]
) -> None:
    class Broken(Presenter):
        """Signs nothing."""

        def link(self, key: str) -> str:
            raise ArithmeticError(key)

    replicate.files[FILE] = served(PNG)
    jobs = RunJobs(
        submissions.starting, submissions.table, Broken(outputs, 3600), owner="queue", allow_loopback_webhooks=False
    )
    first = jobs.run(job | {"idempotency_key": "k"} | ({"wait_for_completion": False} if "input_data" in job else {}),
                     "r", lambda: 900)  # fmt: skip
    replicate.finish(next(iter(replicate.predictions)), output=[FILE])
    submissions.poll(first["prediction_id"])
    copy(submissions.table, outputs, first["prediction_id"], 1, remaining_seconds=lambda: 900, now=clock.now)
    again = jobs.run(job | {"idempotency_key": "k"} | ({"wait_for_completion": False} if "input_data" in job else {}),
                     "r", lambda: 900)  # fmt: skip
    assert (again["prediction_id"], again["status"], again["output"]) == (first["prediction_id"], "starting", None)
    assert len(replicate.creates) == 1


# -- keys that outlive what they name -------------------------------------------------------------------------------


def remove(pk: str, sk: str) -> None:
    """As TTL does, late and in any order."""
    clients.client("dynamodb").delete_item(TableName="predictions", Key={"pk": {"S": pk}, "sk": {"S": sk}})


def key_item() -> dict[str, Any]:
    (item,) = (i for i in clients.client("dynamodb").scan(TableName="predictions")["Items"] if i["sk"]["S"] == "key")
    return dict(item)


@pytest.mark.parametrize("removed", [True, False], ids=["batch removed", "nothing removed yet"])
@pytest.mark.parametrize("release", ["this", "before"])
def test_key_of_a_batch_that_has_expired_makes_a_new_one(
    batch_world: BatchWorld,  # noqa: F811
    replicate: ReplicateInMemory,
    clock: Clock,
    removed: bool,
    release: str,
) -> None:
    old = batch_world.prepared(LLAMA, key="monthly")
    batch_world.end(batch_world.run(old)[1], replicate, output="OLD")
    batch_world.finish(old)
    if release == "before":
        item = key_item()
        item["expires_at"] = item.pop("named_until")
        clients.client("dynamodb").put_item(TableName="predictions", Item=item)
    clock.advance(RETENTION - 1)
    assert batch_world.make(LLAMA, key="monthly").id == old.id
    clock.advance(2)
    if removed:
        remove(f"batch#{old.id}", "status")
    new = batch_world.prepared(LLAMA, key="monthly")
    assert new.id != old.id
    batch_world.run(new)
    assert len(replicate.creates) == 2, "its line ran anew"
    assert batch_world.make(LLAMA, key="monthly").id == new.id
    clock.advance(RETENTION - 2)
    assert batch_world.make(LLAMA, key="monthly").id == new.id


def test_key_lasts_as_long_as_a_batch_that_was_written_long_after_it(batch_world: BatchWorld, clock: Clock) -> None:  # noqa: F811
    of_the_batch = refusing("PutItem", "AccessDenied", lambda b: b["Item"]["sk"] == {"S": "status"}, service="dynamodb")
    with of_the_batch, pytest.raises(ClientError):
        batch_world.make(LLAMA, key="k")
    clock.advance(RETENTION - 60)
    late = batch_world.make(LLAMA, key="k")
    clock.advance(120)
    assert batch_world.make(LLAMA, key="k").id == late.id


@pytest.mark.parametrize("removed", [True, False], ids=["pipeline removed", "nothing removed yet"])
def test_key_of_a_pipeline_that_has_expired_runs_a_new_one(
    pipeline_world: PipelineWorld,  # noqa: F811
    clock: Clock,
    removed: bool,
) -> None:
    world = pipeline_world
    many = step("many", {"x": "{{ item }}"}, for_each="{{ steps.image.output }}")
    old = world.create(IMAGE, many, key="monthly")
    world.deliver()
    clock.advance(3 * 86400)
    world.end(old, "image", ["a", "b"])
    world.turn(old)
    world.deliver()
    for index in range(2):
        world.end(old, "many", "OLD", index)
    world.turn(old)
    assert world.shown(old)["output"] == {"many": ["OLD", "OLD"]}
    clock.advance(27 * 86400 - 1)
    assert world.create(IMAGE, many, key="monthly") == old
    clock.advance(2)
    if removed:
        # Its predictions were written later, and expire later.
        remove(f"pipeline#{old}", "status")
    new = world.create(IMAGE, many, key="monthly")
    assert new != old
    assert world.statuses(new) == {"image": "starting", "many": "waiting"}
    world.deliver()
    world.end(new, "image", ["c"])
    world.turn(new)
    world.deliver()
    world.end(new, "many", "NEW", 0)
    world.turn(new)
    assert world.shown(new)["output"] == {"many": ["NEW"]}


def test_pipeline_whose_id_an_earlier_release_made_of_its_key_is_found_by_it(
    pipeline_world: PipelineWorld,  # noqa: F811
    clock: Clock,
) -> None:
    world = pipeline_world
    new = world.create(IMAGE, key="k")
    old_id = derived_id("pipelines#alice", "k")
    for item in clients.client("dynamodb").scan(TableName="predictions")["Items"]:
        if item["pk"]["S"] == f"pipeline#{new}":
            fields = {"id": {"S": old_id}} if item["sk"]["S"] == "status" else {}
            moved = {**item, **fields, "pk": {"S": f"pipeline#{old_id}"}}
            clients.client("dynamodb").put_item(TableName="predictions", Item=moved)
            remove(f"pipeline#{new}", item["sk"]["S"])
    remove(key_item()["pk"]["S"], "key")
    assert world.create(IMAGE, key="k") == old_id
    clock.advance(30 * 86400 + 1)
    assert world.create(IMAGE, key="k") not in (old_id, new)


def test_pipeline_whose_key_was_bound_by_a_request_that_died_is_made_by_its_repetition(
    pipeline_world: PipelineWorld,  # noqa: F811
    clock: Clock,
) -> None:
    with refusing("PutItem", "Throttled", lambda b: b["Item"]["sk"] == {"S": "status"}, service="dynamodb"), \
            pytest.raises(ClientError):  # fmt: skip
        pipeline_world.create(IMAGE, key="k")
    clock.advance(29 * 86400)
    late = pipeline_world.create(IMAGE, key="k")
    clock.advance(2 * 86400)
    assert pipeline_world.create(IMAGE, key="k") == late


def test_key_of_a_prediction_that_has_expired_starts_a_new_one_that_shows_nothing_of_the_old(
    submissions: Submissions, table: PredictionsTable, outputs: OutputsBucket, replicate: ReplicateInMemory,
    clock: Clock,
) -> None:  # fmt: skip
    keyed = {"idempotency-key": "monthly"}
    old = submissions.start(wanted(headers=keyed))
    table.merge(old.id, told("processing", old.upstream_id or "", output=["OLD"], logs="OLD " * 99), clock.now())
    replicate.files[FILE] = served(PNG)
    # More files than the status item holds: they are an item of their own.
    replicate.finish(old.upstream_id or "", output=[FILE] * 200)
    submissions.poll(old.id)
    copy(table, outputs, old.id, 1, remaining_seconds=lambda: 900, now=clock.now)
    assert {"files", "progress"} <= raw_items(old.id).keys()
    clock.advance(RETENTION - 1)
    assert submissions.start(wanted(headers=keyed)).visible == "succeeded"
    clock.advance(2)
    new = submissions.start(wanted(headers=keyed))
    assert (new.id, new.visible, new.repeated) == (old.id, "starting", False)
    assert len(replicate.creates) == 2
    table.merge(new.id, told("processing", new.upstream_id or "", logs="new"), clock.now())
    whole = table.read(new.id)
    assert whole is not None
    assert (whole.output, whole.logs, whole.files) == (None, "new", [])
    replicate.finish(new.upstream_id or "", output="NEW")
    submissions.poll(new.id)
    [listed] = table.list("alice", None, older=True, size=9).predictions
    assert (listed.output, listed.files) == ("NEW", [])


def test_key_of_a_message_whose_prediction_has_expired_starts_a_new_one(
    batch_world: BatchWorld,  # noqa: F811
    replicate: ReplicateInMemory,
    clock: Clock,
) -> None:
    def take() -> str:
        asked = json.dumps({**LLAMA, "idempotency_key": "monthly"})
        prediction = batch_world.requests.take(Message("m", "sender", asked, int(clock.now())))
        assert prediction is not None
        batch_world.submissions.submit(prediction.id)
        return prediction.id

    batch_world.end(take(), replicate, output="OLD")
    clock.advance(RETENTION - 1)
    take()
    assert len(replicate.creates) == 1
    clock.advance(2)
    whole = batch_world.table.read(take())
    assert len(replicate.creates) == 2
    assert whole is not None
    assert (whole.prediction.visible, whole.output) == ("starting", None)


def test_key_of_an_expired_prediction_that_has_not_ended_is_not_used_again(
    submissions: Submissions, replicate: ReplicateInMemory, clock: Clock
) -> None:
    keyed = {"idempotency-key": "k"}
    old = submissions.start(wanted(headers=keyed))
    clock.advance(RETENTION + 1)
    assert submissions.start(wanted(headers=keyed)).repeated
    assert old.upstream_id
    assert len(replicate.creates) == 1


# -- who waits ------------------------------------------------------------------------------------------------------


def waiting_request(submissions: Submissions, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
    """The function that starts predictions, and a request that wants to wait 10 s for the end."""
    with pytest.MonkeyPatch.context() as only_here:
        app = load_app("start_prediction", only_here)
    submissions.put_into(app, monkeypatch)
    event = sample("start_prediction", "version")
    event["headers"]["Prefer"] = "wait=10"
    event["multiValueHeaders"]["Prefer"] = ["wait=10"]
    return app, event


def test_only_the_request_that_starts_a_prediction_waits_for_it(
    submissions: Submissions, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, event = waiting_request(submissions, monkeypatch)
    waited, applied = [], []
    for _ in range(3):
        began = clock.now()
        answer = app.handler(event, Context())
        assert (answer["statusCode"], json.loads(answer["body"])["status"]) == (201, "starting")
        waited.append(round(clock.now() - began))
        applied.append("Preference-Applied" in answer.get("multiValueHeaders", {}))
    assert waited == [10, 0, 0]
    assert applied == [True, False, False]


def test_repetition_of_a_waiting_request_that_has_ended_is_answered_with_its_end(
    submissions: Submissions, replicate: ReplicateInMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, event = waiting_request(submissions, monkeypatch)
    started = json.loads(app.handler(event, Context())["body"])
    replicate.finish(next(iter(replicate.predictions)), output="A fox.")
    submissions.poll(started["id"])
    shown = json.loads(app.handler(event, Context())["body"])
    assert (shown["status"], shown["output"]) == ("succeeded", "A fox.")


def test_wait_of_25_seconds_reads_the_table_rarely_and_ends_in_time(submissions: Submissions, clock: Clock) -> None:
    started = submissions.start(wanted())
    calls, began = AwsCalls(), clock.now()
    assert submissions.wait_for_end(started.id, 25) is False
    assert round(clock.now() - began, 3) == 25
    assert calls.made.count("dynamodb.GetItem") <= 35


def test_lost_answer_of_a_waiting_client_is_told_by_its_own_repetition(
    submissions: Submissions, replicate: ReplicateInMemory, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as only_here:
        app = load_app("start_prediction", only_here)
    submissions.put_into(app, monkeypatch)
    statuses = []
    for number in ("0", "1"):
        event = sample("start_prediction", "sdk_retry")
        changed = {"Prefer": "wait=5", "X-Stainless-Retry-Count": number}
        event["headers"] |= changed
        event["multiValueHeaders"] |= {name: [value] for name, value in changed.items()}
        event["requestContext"]["requestTimeEpoch"] = int(clock.now() * 1000)
        shown = json.loads(app.handler(event, Context())["body"])
        statuses.append((shown["id"], shown["status"]))
    assert statuses[0] == statuses[1]
    assert statuses[0][1] == "starting"
    assert len(replicate.creates) == 1
