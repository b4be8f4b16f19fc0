"""Trainings go through the protocol of predictions; what differs is tested here."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from predictions.aws import clients
from predictions.errors import Problem
from predictions.files.outputs_bucket import OutputsBucket
from predictions.intents.model import (
    Intent,
    create_intent,
    create_requested_intent,
    create_training,
    training_reference,
)
from predictions.lifecycle.archive_outputs import copy
from predictions.lifecycle.receive_webhook import Receipt, receive
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction

from tests.support.apps import Context, load_app, sample
from tests.support.fakes import (
    API_URL,
    PNG,
    VERSION,
    Clock,
    Executed,
    ReplicateInMemory,
    Wakes,
    accept_then,
    answer,
    served,
)
from tests.support.fixtures import make_submissions
from tests.support.predictions import current, look, wanted
from tests.support.protocol import Submissions

WEIGHTS = "https://replicate.delivery/pbxt/abc/trained_model.tar"
BODY: dict[str, Any] = {"destination": "acme/fox", "input": {"input_images": "https://example.com/foxes.zip"}}
WEEK = 7 * 86400

Call = Callable[..., dict[str, Any]]


def training(
    *, owner: str = "alice", headers: dict[str, str] | None = None, version: str = VERSION, **body: Any
) -> Intent:
    return create_training(
        json.dumps(BODY | body).encode(),
        {"content-type": "application/json", **(headers or {})},
        owner=owner,
        reference=training_reference("stability-ai", "sdxl", version),
        allow_loopback_webhooks=False,
    )


def asked(replicate: ReplicateInMemory, method: str = "POST") -> list[str]:
    """The paths that Replicate was asked for."""
    return [r.url.path.removeprefix("/v1") for r in replicate.asked if r.method == method]


def lost(submissions: Submissions, replicate: ReplicateInMemory, error: Any = 502) -> Prediction:
    """A training whose create was accepted, and not answered."""
    replicate.faults = [accept_then(error)]
    return submissions.start(training())


# -- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, ["destination", "input"]),
        ({"input": {}}, ["destination"]),
        ({"destination": "acme/fox"}, ["input"]),
        ({**BODY, "destination": "fox"}, ["destination"]),
        ({**BODY, "destination": "acme/fox:" + VERSION}, ["destination"]),
        ({**BODY, "destination": "acme/fox/../x"}, ["destination"]),
        ({**BODY, "destination": "acme/fox\n"}, ["destination"]),
        ({**BODY, "destination": None}, ["destination"]),
        ({**BODY, "destination": 7}, ["destination"]),
        ({**BODY, "input": []}, ["input"]),
        ({**BODY, "version": VERSION}, ["version"]),
        ({**BODY, "stream": True}, ["stream"]),
        ({**BODY, "lifetime": "1h"}, ["lifetime"]),
        ({**BODY, "webhook_completed": "https://example.com/h"}, ["webhook_completed"]),
        ({**BODY, "webhook": "http://169.254.169.254/"}, ["webhook"]),
        ({**BODY, "webhook_events_filter": ["done"]}, ["webhook_events_filter.0"]),
    ],
    ids=str,
)
def test_bad_body_is_a_problem_that_names_every_field(body: Any, fields: list[str]) -> None:
    with pytest.raises(Problem) as problem:
        create_training(
            json.dumps(body).encode(),
            {},
            owner="alice",
            reference=training_reference("stability-ai", "sdxl", VERSION),
            allow_loopback_webhooks=False,
        )
    assert problem.value.status == 422
    assert sorted(field["field"] for field in problem.value.invalid_fields) == fields


def test_field_that_only_predictions_have_is_told_apart_from_those_of_a_training() -> None:
    with pytest.raises(Problem) as problem:
        training(stream=True)
    assert "`destination`" in problem.value.detail
    assert "`lifetime`" not in problem.value.detail


def test_deadline_that_replicate_does_not_know_is_refused() -> None:
    with pytest.raises(Problem) as problem:
        training(headers={"cancel-after": "1h"})
    assert [field["field"] for field in problem.value.invalid_fields] == ["Cancel-After"]


@pytest.mark.parametrize("version", ["x", VERSION[:-1], VERSION + "0", VERSION.upper(), "..", "%2e", VERSION + "\n"])
def test_route_with_an_id_that_is_none_is_not_found(version: str) -> None:
    with pytest.raises(Problem) as problem:
        training_reference("stability-ai", "sdxl", version)
    assert problem.value.status == 404


def test_refusal_of_replicate_is_the_callers_answer(submissions: Submissions, replicate: ReplicateInMemory) -> None:
    replicate.faults = [answer(422, {"detail": "The destination does not exist"})]
    with pytest.raises(Problem) as problem:
        submissions.start(training())
    assert (problem.value.status, problem.value.detail) == (422, "The destination does not exist")


# -- start ----------------------------------------------------------------------------------------------------


def test_accepted_training_is_posted_once_bound_and_tracked(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock
) -> None:
    started = submissions.start(training())
    bound = current(table, started.id)
    assert bound.upstream_id in replicate.predictions
    assert (bound.object, bound.destination, bound.owner) == ("training", "acme/fox", "alice")
    assert executed.inputs == {f"{started.id}-1": {"id": started.id, "submit": False}}
    [sent] = [r for r in replicate.asked if r.method == "POST"]
    assert sent.url.path == f"/v1/models/stability-ai/sdxl/versions/{VERSION}/trainings"
    assert "cancel-after" not in sent.headers
    assert json.loads(sent.content) == BODY | {
        "webhook": f"{API_URL}/webhooks/replicate/{started.id}",
        "webhook_events_filter": ["start", "completed"],
    }
    assert bound.deadline == int(clock.now()) + WEEK
    assert bound.expires_at > bound.deadline + 3600, "it would be forgotten before it can be given up"


def test_same_key_and_request_is_posted_once_and_a_prediction_may_have_that_key_too(
    submissions: Submissions, replicate: ReplicateInMemory
) -> None:
    key = {"idempotency-key": "order-7"}
    first, second = (submissions.start(training(headers=key)) for _ in range(2))
    assert first.id == second.id
    prediction = submissions.start(wanted(key="order-7"))
    assert prediction.id != first.id
    assert len(replicate.creates) == 2
    with pytest.raises(Problem):
        submissions.start(training(headers=key, destination="acme/other"))


def test_throttled_training_is_submitted_by_the_state_machine(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
) -> None:
    replicate.faults = [answer(429, {"detail": "Request was throttled. Your rate limit resets in ~30s."})]
    started = submissions.start(training())
    clock.advance(31)
    submissions.submit(started.id)
    assert asked(replicate)[0] == asked(replicate)[1]
    assert "cancel-after" not in replicate.asked[-1].headers
    assert current(table, started.id).upstream_id in replicate.predictions


# -- reconcile, poll, deadline, cancel --------------------------------------------------------------------------


def test_unknown_outcome_is_never_posted_again_and_found_in_the_list_of_trainings(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
) -> None:
    started = lost(submissions, replicate)
    [upstream_id] = replicate.predictions
    clock.advance(91)
    submissions.poll(started.id)
    assert asked(replicate, "GET") == ["/trainings", f"/trainings/{upstream_id}"]
    [listed] = [r for r in replicate.asked if r.url.path == "/v1/trainings"]
    assert not listed.url.query, "Replicate's list of trainings takes no filters"
    assert current(table, started.id).upstream_id == upstream_id
    assert len(replicate.creates) == 1


def test_prediction_that_looks_the_same_is_not_taken_for_a_training(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
) -> None:
    started = lost(submissions, replicate)
    for upstream in replicate.predictions.values():
        del upstream["destination"]  # as if it were a prediction
    clock.advance(91)
    look(submissions, started.id)
    assert current(table, started.id).upstream_id is None


def test_later_trainings_are_passed_over_to_find_the_one(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
) -> None:
    started = lost(submissions, replicate)
    [upstream_id] = replicate.predictions
    clock.advance(3600)
    submissions.start(training())
    submissions.poll(started.id)
    assert current(table, started.id).upstream_id == upstream_id


def test_policy_resubmit_does_not_submit_a_training_again(
    table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock, wakes: Wakes
) -> None:
    submissions = make_submissions(table, replicate, executed, clock, resubmit=True)
    started = lost(submissions, replicate)
    replicate.predictions.clear()
    for _ in range(3):
        clock.advance(100)
        look(submissions, started.id)
    ended = current(table, started.id)
    assert ended.visible == "failed"
    assert "nothing was started" in (ended.error or "")
    assert len(replicate.creates) == 1


def test_poll_asks_for_the_training_and_at_its_deadline_cancels_it(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock, wakes: Wakes
) -> None:
    started = submissions.start(training())
    upstream_id = current(table, started.id).upstream_id
    clock.advance(WEEK - 1)
    submissions.poll(started.id)
    assert asked(replicate, "GET") == [f"/trainings/{upstream_id}"]
    assert replicate.canceled == []
    clock.advance(1)
    submissions.poll(started.id)
    assert asked(replicate)[-1] == f"/trainings/{upstream_id}/cancel"
    assert current(table, started.id).visible == "canceled"


def test_cancel_and_orphans_are_canceled_as_trainings(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock, wakes: Wakes
) -> None:
    started = submissions.start(training())
    upstream_id = current(table, started.id).upstream_id or ""
    orphan = replicate.predictions[upstream_id] | {
        "id": "orphan" * 4,
        "webhook": f"{API_URL}/webhooks/replicate/{started.id}",
    }
    replicate.predictions["orphan" * 4] = orphan
    assert receive(table, started.id, json.dumps(orphan).encode(), clock.now()) is Receipt.ORPHAN
    clock.advance(1)
    submissions.sweep(10, lambda: 300)
    submissions.cancel(current(table, started.id))
    assert asked(replicate)[1:] == [f"/trainings/{'orphan' * 4}/cancel", f"/trainings/{upstream_id}/cancel"]
    assert current(table, started.id).visible == "canceled"


# -- outputs --------------------------------------------------------------------------------------------------


def test_weights_are_copied_and_the_version_stays_a_text(
    submissions: Submissions,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    outputs: OutputsBucket,
    clock: Clock,
    wakes: Wakes,
) -> None:
    replicate.files = {WEIGHTS: served(PNG, content_type="application/x-tar")}
    started = submissions.start(training())
    upstream_id = current(table, started.id).upstream_id or ""
    output = {"version": f"acme/fox:{VERSION}", "weights": WEIGHTS}
    done = replicate.finish(upstream_id, output=output, logs="trained")
    receive(table, started.id, json.dumps(done).encode(), clock.now())
    assert current(table, started.id).visible == "processing"
    copy(table, outputs, started.id, 1, remaining_seconds=lambda: 900, now=clock.now)
    whole = table.read(started.id)
    assert whole is not None
    [file] = whole.files
    assert (file.path, file.bytes, file.key) == ("/weights", len(PNG), f"alice/{started.id}/{upstream_id}/0")
    assert (whole.prediction.visible, whole.output["version"]) == ("succeeded", f"acme/fox:{VERSION}")


# -- the API ----------------------------------------------------------------------------------------------------


@pytest.fixture
def call(submissions: Submissions, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls a function with a sample's event at another path; the answer's body is parsed."""
    loaded: dict[str, Any] = {}

    def call(function: str, case: str, *, owner: str = "alice", **changes: Any) -> dict[str, Any]:
        event = sample(function, case) | changes
        event["requestContext"]["authorizer"]["owner"] = owner
        if function not in loaded:
            with pytest.MonkeyPatch.context() as template_only:
                loaded[function] = load_app(function, template_only)
            submissions.put_into(loaded[function], monkeypatch)
        answered: dict[str, Any] = loaded[function].handler(event, Context())
        return {**answered, "body": json.loads(answered["body"])}

    return call


# The properties of `schemas_training_response`: https://api.replicate.com/openapi.json
KEYS = {
    "created_at", "error", "id", "input", "logs", "model", "source", "status", "urls", "version",
}  # fmt: skip


def test_training_is_shown_as_replicate_shows_it(call: Call) -> None:
    created = call("start_prediction", "training")
    shown = created["body"]
    url = f"{API_URL}/trainings/{shown['id']}"
    assert created["statusCode"] == 201
    assert created["multiValueHeaders"]["Location"] == [url]
    assert shown.keys() >= KEYS
    assert (shown["status"], shown["model"], shown["version"]) == ("starting", "stability-ai/sdxl", VERSION)
    assert (shown["destination"], shown["source"]) == ("acme/sdxl-fox", "api")
    assert shown["urls"] == {"get": url, "cancel": f"{url}/cancel", "web": url}
    again = call("read_prediction", "refused_training", path=f"/trainings/{shown['id']}")
    assert (again["statusCode"], again["body"]) == (200, shown)


def test_neither_is_found_under_the_path_of_the_other(call: Call, replicate: ReplicateInMemory) -> None:
    ids = {
        "predictions": call("start_prediction", "version")["body"]["id"],
        "trainings": call("start_prediction", "training")["body"]["id"],
    }
    for collection, other in (("predictions", "trainings"), ("trainings", "predictions")):
        path = f"/{collection}/{ids[other]}"
        assert call("read_prediction", "one", path=path)["statusCode"] == 404
        assert call("cancel_prediction", "open", path=f"{path}/cancel")["statusCode"] == 404
        listed = call("read_predictions", "list", path=f"/{collection}")["body"]["results"]
        assert [each["id"] for each in listed] == [ids[collection]]
    path = f"/predictions/{ids['trainings']}"
    assert call("cancel_prediction", "refused_delete_open", path=path)["statusCode"] == 404
    assert replicate.canceled == []
    answered = call("cancel_prediction", "refused_training", path=f"/trainings/{ids['trainings']}/cancel")
    assert (answered["statusCode"], answered["body"]["status"]) == (200, "canceled")


def test_another_owner_sees_no_training(call: Call) -> None:
    training_id = call("start_prediction", "training")["body"]["id"]
    path = f"/trainings/{training_id}"
    assert call("read_prediction", "refused_training", owner="bob", path=path)["statusCode"] == 404
    assert call("read_predictions", "trainings", owner="bob")["body"]["results"] == []
    assert call("cancel_prediction", "refused_training", owner="bob", path=f"{path}/cancel")["statusCode"] == 404


def test_list_has_pages_with_links_of_its_own(
    call: Call, submissions: Submissions, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = []
    for _ in range(3):
        clock.advance(1)
        ids.append(submissions.start(training()).id)
        submissions.start(wanted())
    call("read_predictions", "trainings")  # loads it
    app = __import__("functions.read_predictions.app", fromlist=["app"])
    monkeypatch.setattr(app, "PAGE_SIZE", 2)
    first = call("read_predictions", "trainings")["body"]
    assert [each["id"] for each in first["results"]] == ids[:0:-1]
    assert first["previous"] is None
    url, _, cursor = first["next"].partition("?cursor=")
    assert url == f"{API_URL}/trainings"
    parameters = {"queryStringParameters": {"cursor": cursor}, "multiValueQueryStringParameters": {"cursor": [cursor]}}
    second = call("read_predictions", "trainings", **parameters)["body"]
    assert [each["id"] for each in second["results"]] == ids[:1]
    assert second["next"] is None
    assert second["previous"].startswith(f"{API_URL}/trainings?cursor=")


@pytest.mark.parametrize("scopes", ["read", "predict read"])
def test_token_without_the_scope_starts_no_training(call: Call, replicate: ReplicateInMemory, scopes: str) -> None:
    event = sample("start_prediction", "training")
    event["requestContext"]["authorizer"]["scopes"] = scopes
    answered = call("start_prediction", "training", requestContext=event["requestContext"])
    assert answered["statusCode"] == 403
    assert "`train`" in answered["body"]["detail"]
    assert replicate.asked == []
    assert clients.client("dynamodb").scan(TableName="predictions")["Items"] == []


@pytest.mark.parametrize("scopes", ["train", "manage"])
def test_training_is_started_by_a_token_with_train_or_manage_alone(
    call: Call, replicate: ReplicateInMemory, scopes: str
) -> None:
    event = sample("start_prediction", "training")
    event["requestContext"]["authorizer"]["scopes"] = scopes
    assert call("start_prediction", "training", requestContext=event["requestContext"])["statusCode"] == 201
    assert len(replicate.creates) == 1


@pytest.mark.parametrize("more", [{}, {"destination": "acme/fox"}, {"training": True}, {"object": "training"}])
def test_only_the_route_of_trainings_makes_a_training(more: dict[str, Any]) -> None:
    # The doors of tokens with `predict`, of messages, and of lines of batches and steps of pipelines.
    body = {"version": "acme/fox", "input": {"prompt": "x"}, **more}
    given: dict[str, Any] = {"owner": "alice", "allow_loopback_webhooks": False}
    doors: list[Callable[[], Intent]] = [
        lambda: create_intent(json.dumps(body).encode(), {}, reference=None, **given),
        lambda: create_requested_intent(body, source="queue", source_key="k", **given),
    ]
    for door in doors:
        if more:
            with pytest.raises(Problem, match="Unknown field"):
                door()
        else:
            intent = door()
            assert (intent.object, intent.destination, intent.reference.kind) == ("prediction", None, "model")
