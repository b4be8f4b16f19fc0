"""Every event sample runs through its handler."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from predictions.api.access_tokens import Scope
from predictions.api.proxy import Forwarding, VersionCache
from predictions.aws import clients
from predictions.aws.dynamodb import Table, deserialize
from predictions.aws.executions import Executions
from predictions.batches.manage import BatchControl
from predictions.batches.store import Batch, Batches
from predictions.files.links import Links
from predictions.files.outputs_bucket import OutputsBucket
from predictions.files.uploads import Files
from predictions.intake.invocation import RunJobs
from predictions.intake.refused import DeadRequests
from predictions.notifications.signing_secrets import OwnerSecrets
from predictions.notifications.webhook_queue import Delivery
from predictions.pipelines.advance import PipelineExecutions, Progress
from predictions.pipelines.definition import fingerprint
from predictions.pipelines.manage import PipelineApi
from predictions.pipelines.steps import Pipelines
from predictions.pipelines.store import PipelinesTable
from predictions.recipes.store import Recipe, RecipeItems
from predictions.store.idempotency_keys import IdempotencyKeys
from predictions.store.keys import OPEN_SHARDS, shard_of
from predictions.store.predictions import PredictionsTable
from predictions.store.recent_requests import RecentRequests
from predictions.upstream.credentials import Token
from predictions.views.prediction import Presenter

from tests.support.apps import (
    EVENTS,
    SAMPLE_ID,
    SAMPLE_SIGNING_SECRET,
    SAMPLE_UPSTREAM_ID,
    AwsCalls,
    Context,
    clock_module,
    load_app,
    sample,
)
from tests.support.described import check_answer, operation_of
from tests.support.fakes import API_URL, PNG, Clock, Executed, ReplicateInMemory, Wakes, refusing
from tests.support.fixtures import make_recipe_changes
from tests.support.protocol import Submissions
from tests.support.stream import Bus
from tests.support.template import resources
from tests.support.webhook_queue import waiting

SAMPLE_BATCH_ID = "qm4tz7wv2xk5c3n6hbr8yjdp2a"
BATCH_LINE: dict[str, Any] = {
    "model": "black-forest-labs/flux-schnell",
    "input": {"prompt": "a red fox in the snow"},
}
FILE = "https://replicate.delivery/xezq/abc/out-0.png"

REFUSED = {
    ("start_prediction", "refused_without_scope"): (403, []),
    ("start_prediction", "refused_media_type"): (415, []),
    ("start_prediction", "refused_without_body"): (400, []),
    ("start_prediction", "refused_cut_off"): (400, []),
    ("start_prediction", "refused_nan"): (400, []),
    ("start_prediction", "refused_unknown_field"): (422, ["num_outputs"]),
    ("start_prediction", "refused_without_input"): (422, ["input"]),
    ("start_prediction", "refused_version"): (422, ["version"]),
    ("start_prediction", "refused_private_webhook"): (422, ["webhook"]),
    ("start_prediction", "refused_plain_webhook"): (422, ["webhook"]),
    ("start_prediction", "refused_wait"): (422, ["Prefer"]),
    ("start_prediction", "refused_cancel_after"): (422, ["Cancel-After"]),
    ("start_prediction", "refused_idempotency_key"): (422, ["Idempotency-Key"]),
    ("start_prediction", "refused_model_route"): (404, []),
    ("start_prediction", "refused_version_on_model_route"): (422, ["version"]),
    ("start_prediction", "refused_training_destination"): (422, ["destination"]),
    ("read_predictions", "refused_cursor"): (422, ["cursor"]),
    ("read_prediction", "refused_without_scope"): (403, []),
    ("serve_console", "refused_unknown"): (404, []),
    ("read_predictions", "refused_usage"): (422, ["from"]),
    ("read_predictions", "refused_filters"): (422, ["status", "origin", "model"]),
    ("read_predictions", "refused_without_scope"): (403, []),
    ("read_predictions", "refused_openapi_without_scope"): (403, []),
    ("cancel_prediction", "refused_without_scope"): (403, []),
    ("call_replicate", "refused_without_scope"): (403, []),
    ("call_replicate", "refused_name"): (404, []),
    ("call_replicate", "refused_version"): (404, []),
    ("call_replicate", "refused_body"): (422, []),
    ("give_secret", "refused_without_scope"): (403, []),
    ("store_files", "refused_without_scope"): (403, []),
    ("store_files", "refused_without_boundary"): (400, []),
    ("store_files", "refused_cut_off"): (400, []),
    ("store_files", "refused_media_type"): (415, []),
    ("store_files", "refused_without_content"): (422, ["content"]),
    ("store_files", "refused_metadata"): (422, ["metadata"]),
    ("store_files", "refused_upload_size"): (422, ["size"]),
    ("store_files", "refused_upload_field"): (422, ["key"]),
    ("store_files", "refused_cursor"): (422, ["cursor"]),
    ("serve_files", "refused_without_signature"): (404, []),
    ("manage_pipelines", "refused_without_scope"): (403, []),
    ("manage_pipelines", "refused_without_steps"): (422, ["steps"]),
    ("manage_pipelines", "refused_cursor"): (422, ["cursor"]),
    ("serve_files", "refused_object_without_key"): (404, []),
    ("manage_recipes", "refused_without_scope"): (403, []),
    ("manage_recipes", "refused_cursor"): (422, ["cursor"]),
    ("manage_recipes", "refused_placeholder"): (422, ["input.prompt"]),
    ("manage_recipes", "refused_prefix"): (422, ["s3.prefix"]),
    ("manage_recipes", "refused_two_sources"): (422, ["schedule"]),
    ("manage_batches", "refused_without_scope"): (403, []),
    ("manage_batches", "refused_unknown_field"): (422, ["owner"]),
    ("manage_batches", "refused_other_owners_manifest"): (422, ["manifest"]),
    ("manage_batches", "refused_csv_without_template"): (422, ["template"]),
    ("manage_batches", "refused_cursor"): (422, ["cursor"]),
}
"""Refused for what the request itself says: status and fields."""

REFUSED_BY_WHAT_IS_THERE = {
    ("start_prediction", "refused_unknown_model"): 404,
    ("start_prediction", "refused_by_schema"): 422,
    ("start_prediction", "refused_over_limit"): 429,
    ("read_prediction", "refused_other_owner"): 404,
    ("read_prediction", "refused_unknown"): 404,
    ("read_prediction", "refused_training"): 404,
    ("cancel_prediction", "refused_training"): 404,
    ("cancel_prediction", "refused_other_owner"): 404,
    ("cancel_prediction", "refused_unknown"): 404,
    ("store_files", "refused_unknown"): 404,
    ("manage_pipelines", "refused_cycle"): 422,
    ("manage_pipelines", "refused_unknown"): 404,
    ("manage_pipelines", "refused_cancel_unknown"): 404,
    ("store_files", "refused_delete_unknown"): 404,
    ("serve_files", "refused_unknown"): 404,
    ("serve_files", "refused_forged_object"): 404,
    ("serve_files", "refused_head_of_unknown"): 404,
    ("serve_files", "refused_head_of_forged_object"): 404,
    ("manage_recipes", "refused_unknown"): 404,
    ("manage_recipes", "refused_delete_unknown"): 404,
    ("cancel_prediction", "refused_delete_open"): 409,
    ("receive_webhook", "refused_stale"): 401,
    ("receive_webhook", "refused_forged"): 401,
    ("receive_webhook", "refused_unsigned"): 401,
    ("receive_webhook", "refused_altered"): 401,
    ("manage_batches", "refused_unknown"): 404,
    ("manage_batches", "refused_unknown_recipe"): 422,
}
ANSWERED = {
    ("start_prediction", "version"): 201,
    ("start_prediction", "community_model"): 201,
    ("start_prediction", "everything"): 201,
    ("start_prediction", "lifetime"): 201,
    ("start_prediction", "model_route"): 201,
    ("start_prediction", "deployment_route"): 201,
    ("start_prediction", "sdk_retry"): 201,
    ("start_prediction", "base64_body"): 201,
    ("start_prediction", "training"): 201,
    ("read_prediction", "one"): 200,
    ("read_predictions", "trainings"): 200,
    ("read_predictions", "list"): 200,
    ("read_predictions", "list_page"): 200,
    ("read_predictions", "list_filtered"): 200,
    ("read_predictions", "openapi"): 200,
    ("read_predictions", "usage"): 200,
    ("serve_console", "page"): 200,
    ("serve_console", "icon"): 200,
    ("cancel_prediction", "open"): 200,
    ("store_files", "create"): 201,
    ("store_files", "create_as_text"): 201,
    ("store_files", "upload"): 201,
    ("store_files", "list"): 200,
    ("manage_pipelines", "create"): 201,
    ("manage_pipelines", "list"): 200,
    ("receive_webhook", "start"): 200,
    ("receive_webhook", "succeeded"): 200,
    ("receive_webhook", "succeeded_with_file"): 200,
    ("receive_webhook", "failed"): 200,
    ("receive_webhook", "unknown_prediction"): 200,
    ("receive_webhook", "no_prediction_id"): 200,
    ("manage_recipes", "list"): 200,
    ("manage_recipes", "create"): 201,
    ("manage_recipes", "put_schedule"): 201,
    ("manage_recipes", "put_event"): 201,
    ("give_secret", "secret"): 200,
    ("manage_batches", "create"): 201,
    ("manage_batches", "list"): 200,
}
FORWARDED = {
    ("call_replicate", "account"): 200,
    ("call_replicate", "collections"): 200,
    ("call_replicate", "collection"): 200,
    ("call_replicate", "deployments"): 200,
    ("call_replicate", "deployment_create"): 200,
    ("call_replicate", "deployment"): 200,
    ("call_replicate", "deployment_update"): 200,
    ("call_replicate", "deployment_delete"): 204,
    ("call_replicate", "hardware"): 200,
    ("call_replicate", "models"): 200,
    ("call_replicate", "model_create"): 201,
    ("call_replicate", "model"): 200,
    ("call_replicate", "model_update"): 200,
    ("call_replicate", "model_delete"): 204,
    ("call_replicate", "model_examples"): 200,
    ("call_replicate", "model_readme"): 200,
    ("call_replicate", "model_versions"): 200,
    ("call_replicate", "model_version"): 200,
    ("call_replicate", "model_version_delete"): 202,
    ("call_replicate", "search"): 200,
}
"""Answered by Replicate, with this status."""
RUN = {
    ("submit_prediction", "execution"),
    ("poll_prediction", "execution"),
    ("advance_pipeline", "execution"),
    ("copy_outputs", "first_execution"),
    ("sweep_predictions", "schedule"),
    ("sweep_predictions", "shards"),
    ("publish_changes", "nothing_visible"),
    ("deliver_webhook", "completed"),
    ("deliver_webhook", "start"),
    # Of a recipe that is not there.
    ("start_from_queue", "s3"),
    ("start_from_queue", "schedule"),
    ("start_from_queue", "event"),
    # That is not there.
    ("start_from_queue", "manifest"),
}
DEPLOYED = {("deploy_recipes", "create"), ("deploy_recipes", "update"), ("deploy_recipes", "delete")}
RUN_JOBS = {
    ("run_prediction", "prompt"): None,
    ("run_prediction", "scheduled"): None,
    ("run_prediction", "waiting"): None,
    ("run_prediction", "not_waiting"): None,
    ("run_prediction", "refused_both_inputs"): "input_data: Give `prompt` or `input_data`, not both.",
    ("run_prediction", "refused_without_input"): "prompt: This field is required (or `input_data`).",
    ("run_prediction", "refused_private_webhook"): "webhook_url: ",
    ("run_prediction", "refused_poll_interval"): "poll_interval: Input should be greater than or equal to 0.1",
}
"""How the error begins with which a direct invocation is answered."""
API_FUNCTIONS = {
    "call_replicate",
    "cancel_prediction",
    "give_secret",
    "manage_batches",
    "manage_pipelines",
    "manage_recipes",
    "read_prediction",
    "read_predictions",
    "receive_webhook",
    "serve_console",
    "serve_files",
    "start_prediction",
    "store_files",
}
PUBLISHED = {
    ("publish_changes", "start_and_output"): ["start"],
    ("publish_changes", "files_stored"): ["output"],
    ("publish_changes", "asked"): [],
    ("publish_changes", "asked_by_a_state_machine"): [],
    ("publish_changes", "succeeded"): [],
    ("publish_changes", "failed"): [],
    ("publish_changes", "canceled"): [],
    ("publish_changes", "deleted"): [],
    ("publish_changes", "pipeline_succeeded"): [],
    ("publish_changes", "retry"): [],
    ("publish_changes", "budget_threshold"): [],
}
"""What is queued at once of what each calls for; the rest follows a second later."""
TOLD_TO_THE_BUS = {
    "asked": ["Prediction Started"],
    "asked_by_a_state_machine": ["Prediction Started"],
    "canceled": ["Prediction Canceled"],
    "deleted": [],
    "failed": ["Prediction Failed"],
    "files_stored": ["Prediction Succeeded"],
    "nothing_visible": [],
    "pipeline_succeeded": ["Pipeline Completed"],
    "retry": ["Prediction Succeeded"],
    "start_and_output": [],
    "succeeded": ["Prediction Succeeded"],
}


TAKEN = {
    ("start_from_queue", "request"): [("queue", "starting")],
    ("start_from_queue", "idempotency_key"): [("queue", "starting")],
    ("start_from_queue", "task_token"): [("queue", "starting")],
    ("start_from_queue", "of_a_sender"): [("alice", "starting")],
    ("start_from_queue", "put_back"): [("queue", "starting")],
    ("start_from_queue", "poison_among_good"): [("queue", "starting"), ("queue", "starting")],
}
"""Started by the queue: whose, and as what they are shown."""
BURIED = {
    ("start_from_queue", "poison_among_good"): "The body is not JSON at line 1, column 11.",
    ("start_from_queue", "refused_not_json"): "The body is not JSON at line 1, column 1.",
    ("start_from_queue", "refused_not_an_object"): "The message must be a JSON object.",
    ("start_from_queue", "refused_unknown_field"): "num_outputs: Unknown field.",
    ("start_from_queue", "refused_without_model"): "model: Give exactly one of",
    ("start_from_queue", "refused_owner"): "owner: Unknown field.",
    ("start_from_queue", "refused_private_webhook"): "webhook: ",
    ("start_from_queue", "refused_with_token"): "input: This field is required.",
    ("start_from_queue", "refused_task_token"): "task_token: ",
    ("start_from_queue", "refused_step_of_no_pipeline"): "pipeline_id: pipeline ",
    ("start_from_queue", "refused_unknown_batch"): "Batch not found.",
    ("start_from_queue", "refused_manifest_elsewhere"): "batch_manifest: must be a .jsonl or .csv below batches/",
}
"""Kept in the dead-letter queue, with this reason."""


OF_A_BATCH = {
    ("manage_batches", "one"),
    ("manage_batches", "cancel"),
    ("manage_batches", "refused_retry_open"),
    ("prepare_batch", "execution"),
    ("finish_batch", "execution"),
    ("start_from_queue", "batch_line"),
}
"""Of the batch with `SAMPLE_BATCH_ID`: gone through in one test."""


Run = Callable[..., Any]


def names(samples: Iterable[tuple[str, str]]) -> list[str]:
    return ["/".join(sample) for sample in sorted(samples)]


def test_every_sample_has_its_expected_outcome() -> None:
    found = {
        (path.parent.name, path.stem) for path in EVENTS.glob("*/*.json") if path.parent.name != "authorize_request"
    }
    answered = ANSWERED.keys() | FORWARDED.keys()
    of_queues = RUN_JOBS.keys() | TAKEN.keys() | BURIED.keys() | RUN | PUBLISHED.keys() | OF_A_BATCH
    assert found == REFUSED.keys() | REFUSED_BY_WHAT_IS_THERE.keys() | answered | of_queues | DEPLOYED


def test_every_function_has_a_sample() -> None:
    assert {path.parent.name for path in EVENTS.glob("*/*.json")} == {
        path.parent.name for path in EVENTS.parent.glob("functions/*/app.py")
    }


@pytest.mark.parametrize("function", sorted(API_FUNCTIONS))
def test_the_samples_are_of_routes_in_the_template(function: str) -> None:
    name = "".join(word.capitalize() for word in function.split("_")) + "Function"
    events = resources("AWS::Serverless::Function")[name]["Properties"]["Events"].values()
    routes = {(event["Properties"]["Method"].upper(), event["Properties"]["Path"]) for event in events}
    samples = [json.loads(path.read_text()) for path in (EVENTS / function).glob("*.json")]
    assert {(event["httpMethod"], event["resource"]) for event in samples} == routes


@pytest.fixture
def run(
    submissions: Submissions,
    table: PredictionsTable,
    outputs: OutputsBucket,
    replicate: ReplicateInMemory,
    pipeline_executed: Executed,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Runs an event through its handler, with Replicate and the time of the test.

    Every answer of the API is held against its OpenAPI document.
    """

    versions = VersionCache("predictions", clients.client("dynamodb"), clock.now)
    changes = make_recipe_changes(table, replicate, clock)
    forwarding = Forwarding(ReplicateInMemory.URL, Token("replicate-token"), replicate.client(), versions)

    pipelines = PipelinesTable("predictions", outputs, clients.client("dynamodb"))
    pipeline_executions = PipelineExecutions(
        pipelines, Executions(pipeline_executed.machine_arn, clients.client("stepfunctions")), now=clock.now
    )
    steps = Pipelines(pipelines, table, outputs, Links({"outputs": "outputs"}, "link-secret", now=clock.now))
    queue_url = clients.client("sqs").get_queue_url(QueueName="requests")["QueueUrl"]

    def run(function: str, event: dict[str, Any], **others: Any) -> Any:
        with pytest.MonkeyPatch.context() as only_here:
            app = load_app(function, only_here)
            submissions.put_into(app, only_here)
            for name, value in {
                "table": table,
                "outputs": outputs,
                "forwarding": forwarding,
                "recipe_changes": changes,
                "pipelines": PipelineApi(
                    pipelines,
                    table,
                    RecentRequests.from_env(),
                    submissions.lookup,
                    pipeline_executions,
                    Presenter(outputs, 3600),
                    30 * 86400,
                    now=clock.now,
                ),
                "pipeline_executions": pipeline_executions,
                "progress": Progress(steps, submissions.canceling, queue_url, clients.client("sqs"), now=clock.now),
                "files": Files("predictions", "inputs", 86400, now=clock.now),
                "time": clock_module(clock.now),
                **others,
            }.items():
                if hasattr(app, name):
                    only_here.setattr(app, name, value)
            answer = app.handler(event, Context(remaining_seconds=280))
            if function in API_FUNCTIONS:
                check_answer(event, answer)
            return answer

    return run


@pytest.fixture
def started(run: Run, replicate: ReplicateInMemory) -> None:
    """The prediction of the samples, as Replicate accepted it, and the secret that signs its webhooks."""
    replicate.files[FILE] = lambda: httpx.Response(200, content=iter([PNG]), headers={"content-type": "image/png"})

    def accept(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
        prediction = replicate.accept(request, id=SAMPLE_UPSTREAM_ID)
        replicate.predictions = {SAMPLE_UPSTREAM_ID: prediction}
        return httpx.Response(201, json=prediction)

    replicate.faults = [accept]
    assert run("start_prediction", sample("start_prediction", "version"))["statusCode"] == 201
    rotated_at = datetime(2025, 1, 1, tzinfo=UTC).isoformat()
    secret = {"current": SAMPLE_SIGNING_SECRET, "previous": None, "rotated_at": rotated_at}
    clients.client("secretsmanager").put_secret_value(SecretId="signing-secret", SecretString=json.dumps(secret))


def problem_of(answer: dict[str, Any]) -> dict[str, Any]:
    """The problem in an answer, which has to be one."""
    headers = {**answer.get("headers", {}), **{k: v[0] for k, v in answer.get("multiValueHeaders", {}).items()}}
    assert headers["Content-Type"] == "application/problem+json"
    problem: dict[str, Any] = json.loads(answer["body"])
    assert problem["status"] == answer["statusCode"]
    assert problem["title"]
    assert problem["detail"]
    return problem


@pytest.mark.parametrize(("function", "case"), sorted(REFUSED), ids=names(REFUSED))
def test_a_refused_sample_is_a_problem_before_anything_is_asked_or_written(
    run: Run, replicate: ReplicateInMemory, function: str, case: str
) -> None:
    calls = AwsCalls()
    answer = run(function, sample(function, case))
    status, fields = REFUSED[function, case]
    problem = problem_of(answer)
    assert (answer["statusCode"], [field["field"] for field in problem.get("invalid_fields", [])]) == (status, fields)
    assert calls.made == []
    assert replicate.asked == []


@pytest.mark.parametrize(("function", "case"), sorted(REFUSED_BY_WHAT_IS_THERE), ids=names(REFUSED_BY_WHAT_IS_THERE))
def test_a_sample_that_is_refused_by_what_is_there_changes_nothing(
    run: Run, started: None, replicate: ReplicateInMemory, function: str, case: str
) -> None:
    before = items()
    answer = run(function, sample(function, case))
    assert answer["statusCode"] == REFUSED_BY_WHAT_IS_THERE[function, case]
    assert "fox" not in problem_of(answer)["detail"]
    assert items() == before
    assert len(replicate.creates) == 1
    assert replicate.canceled == []


def items() -> list[Any]:
    """Everything in the table."""
    return sorted(clients.client("dynamodb").scan(TableName="predictions")["Items"], key=str)


@pytest.mark.parametrize(("function", "case"), sorted(ANSWERED), ids=names(ANSWERED))
def test_an_answered_sample_is_answered(run: Run, started: None, function: str, case: str) -> None:
    answer = run(function, sample(function, case))
    assert answer["statusCode"] == ANSWERED[function, case], answer["body"]
    # The console's are held against its files: test_serve_console.py.
    assert function == "serve_console" or isinstance(json.loads(answer["body"]), dict)


@pytest.mark.parametrize(("function", "case"), sorted(FORWARDED), ids=names(FORWARDED))
def test_a_forwarded_sample_is_asked_of_replicate_and_answered_as_it_says(
    run: Run, replicate: ReplicateInMemory, function: str, case: str
) -> None:
    event, status = sample(function, case), FORWARDED[function, case]
    body = "" if status in (202, 204) else '{"name":"fox"}'
    media_type = "text/plain" if case == "model_readme" else "application/json"
    told = httpx.Response(status, content=body.encode(), headers={"Content-Type": media_type})
    replicate.others[event["httpMethod"], event["path"]] = lambda: told
    answer = run(function, event)
    assert (answer["statusCode"], answer["body"]) == (status, body)
    [request] = replicate.asked
    assert dict(request.url.params) == (event["queryStringParameters"] or {})
    assert request.content.decode() == (event["body"] or "")


@pytest.mark.parametrize(("function", "case"), sorted(ANSWERED | FORWARDED), ids=names(ANSWERED | FORWARDED))
def test_a_sample_needs_one_of_the_scopes_that_are_described_and_no_other(
    run: Run, started: None, replicate: ReplicateInMemory, function: str, case: str
) -> None:
    event = sample(function, case)
    if not (security := operation_of(event)["security"]):
        assert event["requestContext"].get("authorizer") is None
        return
    described = {scope for each in security for scope in each["accessToken"]}
    replicate.others[event["httpMethod"], event["path"]] = lambda: httpx.Response(204)
    refused = {}
    for scopes in (*Scope, " ".join(set(Scope) - described)):
        event["requestContext"]["authorizer"]["scopes"] = scopes
        refused[scopes] = run(function, event)["statusCode"] == 403
    assert described
    assert refused == {scopes: scopes not in described for scopes in refused}


def test_the_started_sample_is_asked_for_once(run: Run, started: None, replicate: ReplicateInMemory) -> None:
    answer = run("start_prediction", sample("start_prediction", "version"))
    shown = json.loads(answer["body"])
    assert (answer["statusCode"], shown["id"], shown["status"]) == (201, SAMPLE_ID, "starting")
    [created] = replicate.creates
    assert created["webhook"] == f"{API_URL}/webhooks/replicate/{SAMPLE_ID}"
    assert created["input"] == {"prompt": "a red fox in the snow", "num_outputs": 1}
    assert created.keys() == {"version", "input", "webhook", "webhook_events_filter"}


def test_the_sample_with_everything_is_submitted_as_asked(run: Run, replicate: ReplicateInMemory, clock: Clock) -> None:
    answer = run("start_prediction", sample("start_prediction", "everything"))
    shown = json.loads(answer["body"])
    assert shown["status"] == "starting"
    assert shown["webhook"] == "https://hooks.example.com/replicate?job=7"
    assert shown["deadline"] == "2025-06-15T16:36:40Z"
    assert clock.now() >= 1_750_000_005, "it waited the five seconds of `Prefer`"
    [request] = [r for r in replicate.asked if r.method == "POST"]
    assert request.headers["cancel-after"] == "5400s"
    assert json.loads(request.content)["webhook"].startswith(API_URL)


def test_the_samples_of_webhooks_tell_a_prediction_to_its_end(run: Run, started: None) -> None:
    def read() -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(run("read_prediction", sample("read_prediction", "one"))["body"])
        return shown

    told = ("start", "unknown_prediction", "succeeded_with_file", "start", "failed", "succeeded")
    answers = [run("receive_webhook", sample("receive_webhook", case)) for case in told]
    received = [json.loads(answer["body"])["received"] for answer in answers]
    assert received == ["merged", "unknown prediction", "merged", "nothing new", "nothing new", "nothing new"]
    assert (read()["status"], "output" in read(), read()["upstream_status"]) == ("processing", False, "succeeded")
    assert run("copy_outputs", sample("copy_outputs", "first_execution")) == {}
    shown = read()
    assert shown["status"] == "succeeded"
    assert [file["bytes"] for file in shown["output_files"]] == [len(PNG)]
    assert "replicate.delivery" not in json.dumps(shown)
    listed = json.loads(run("read_predictions", sample("read_predictions", "list"))["body"])
    assert [prediction["id"] for prediction in listed["results"]] == [SAMPLE_ID]


def test_webhook_of_a_second_run_has_its_prediction_polled_at_once(run: Run, started: None) -> None:
    made: list[str] = []

    def answer(params: dict[str, Any], **_: Any) -> Any:
        made.append(params["url_path"])
        return type("Http", (), {"status_code": 202})(), {"StatusCode": 202}

    answered: Any = answer  # the stubs do not know that a handler may answer in AWS's place
    clients.client("lambda").meta.events.register_first("before-call.lambda.Invoke", answered)
    clients.client("dynamodb").update_item(
        TableName="predictions",
        Key={"pk": {"S": f"prediction#{SAMPLE_ID}"}, "sk": {"S": "status"}},
        UpdateExpression="SET upstream_id = :first",
        ExpressionAttributeValues={":first": {"S": "f" * 26}},
    )
    told = run("receive_webhook", sample("receive_webhook", "start"))
    assert json.loads(told["body"]) == {"received": "orphan"}
    assert made == ["/2015-03-31/functions/poll-prediction/invocations"]


def test_the_sample_of_a_cancel_cancels_at_replicate(run: Run, started: None, replicate: ReplicateInMemory) -> None:
    shown = json.loads(run("cancel_prediction", sample("cancel_prediction", "open"))["body"])
    assert (shown["id"], shown["status"]) == (SAMPLE_ID, "canceled")
    assert replicate.canceled == [SAMPLE_UPSTREAM_ID]


def test_the_sample_of_a_deletion_removes_the_data_of_what_has_ended(run: Run, started: None) -> None:
    run("receive_webhook", sample("receive_webhook", "succeeded"))
    for _ in range(2):
        answer = run("cancel_prediction", sample("cancel_prediction", "refused_delete_open"))
        shown = json.loads(answer["body"])
        assert (answer["statusCode"], shown["status"], shown["data_removed"]) == (200, "succeeded", True)
        assert (shown["input"], shown["output"], shown["logs"], shown["output_files"]) == ({}, None, "", [])


def test_the_samples_of_a_pipeline_tell_it_to_its_cancel(
    run: Run, pipeline_executed: Executed, replicate: ReplicateInMemory, clock: Clock
) -> None:
    # Ids are random: the samples' key names the samples' pipeline already, as after a first request that died.
    event, pipeline_id = sample("manage_pipelines", "create"), sample("advance_pipeline", "execution")["id"]
    print_ = fingerprint(json.loads(event["body"]))
    keys = IdempotencyKeys("pipeline", Table.from_env(), now=clock.now)
    keys.take_key("alice", event["headers"]["Idempotency-Key"], pipeline_id, print_, int(clock.now()) + 86400)

    def shown(case: str) -> dict[str, Any]:
        pipeline: dict[str, Any] = json.loads(run("manage_pipelines", sample("manage_pipelines", case))["body"])
        return pipeline

    created = shown("create")
    assert created["id"] == pipeline_id
    assert [step["status"] for step in created["steps"]] == ["starting", "waiting", "waiting"]
    assert pipeline_executed.inputs == {f"{created['id']}-1": {"id": created["id"]}}
    assert run("advance_pipeline", sample("advance_pipeline", "execution")) == {"done": False, "seen": 0}
    assert run("start_from_queue", sample("start_from_queue", "refused_step_of_no_pipeline")) == {
        "batchItemFailures": []
    }
    assert shown("refused_unknown")["steps"][0]["predictions"] != []
    assert [each["id"] for each in shown("list")["results"]] == [created["id"]]
    assert shown("refused_cancel_unknown")["cancel_requested_at"]
    # The first turn cancels; the end of what it canceled is an event, which the second turn sees.
    assert run("advance_pipeline", sample("advance_pipeline", "execution")) == {"done": False, "seen": 2}
    assert run("advance_pipeline", sample("advance_pipeline", "execution")) == {"done": True, "seen": -1}
    assert shown("refused_unknown")["status"] == "canceled"
    assert replicate.creates == []


@pytest.mark.parametrize(("function", "case"), sorted(RUN), ids=names(RUN))
def test_a_sample_for_nothing_to_do_does_nothing(run: Run, function: str, case: str) -> None:
    assert run(function, sample(function, case)) in (
        {},
        {"found": 0},
        {"batchItemFailures": []},
        {"done": True, "seen": -1},
    )
    assert items() == []


def test_the_sample_of_a_submission_leaves_a_submitted_prediction_alone(
    run: Run, started: None, replicate: ReplicateInMemory
) -> None:
    before = items()
    assert run("submit_prediction", sample("submit_prediction", "execution")) == {}
    assert items() == before
    assert len(replicate.creates) == 1


def test_the_sample_of_a_poll_finds_the_end(run: Run, started: None, replicate: ReplicateInMemory) -> None:
    replicate.finish(SAMPLE_UPSTREAM_ID, output="A fox.", logs="done")
    assert run("poll_prediction", sample("poll_prediction", "execution")) == {}
    shown = json.loads(run("read_prediction", sample("read_prediction", "one"))["body"])
    assert (shown["status"], shown["output"], shown["logs"]) == ("succeeded", "A fox.", "done")


def test_the_sample_of_the_schedule_stores_the_signing_secret_and_restarts_what_stands_still(
    run: Run, started: None, executed: Executed, clock: Clock
) -> None:
    executed.stop(f"{SAMPLE_ID}-1")
    clock.advance(3600)
    assert run("sweep_predictions", sample("sweep_predictions", "schedule")) == {"found": 1}
    assert executed.inputs[f"{SAMPLE_ID}-2"] == {"id": SAMPLE_ID, "submit": False}
    stored = clients.client("secretsmanager").get_secret_value(SecretId="signing-secret")["SecretString"]
    assert json.loads(stored)["current"] == ReplicateInMemory.SECRET
    assert json.loads(stored)["previous"] == SAMPLE_SIGNING_SECRET


def test_the_sample_of_handed_over_shards_restarts_what_stands_still_in_them_and_nothing_else(
    run: Run, started: None, executed: Executed, clock: Clock
) -> None:
    executed.stop(f"{SAMPLE_ID}-1")
    clock.advance(3600)
    shards = sample("sweep_predictions", "shards")
    others = [shard for shard in OPEN_SHARDS if shard not in shards["shards"]]
    assert shard_of(SAMPLE_ID) in shards["shards"]
    assert run("sweep_predictions", {"shards": others}) == {"found": 0}
    assert run("sweep_predictions", shards) == {"found": 1}
    assert executed.inputs[f"{SAMPLE_ID}-2"] == {"id": SAMPLE_ID, "submit": False}
    stored = clients.client("secretsmanager").get_secret_value(SecretId="signing-secret")["SecretString"]
    assert json.loads(stored)["current"] == SAMPLE_SIGNING_SECRET


@pytest.mark.parametrize(
    ("function", "case"), sorted(TAKEN.keys() | BURIED.keys()), ids=names(TAKEN.keys() | BURIED.keys())
)
def test_a_sample_of_the_queue_is_started_or_kept_with_its_reason(
    run: Run, executed: Executed, wakes: Wakes, replicate: ReplicateInMemory, function: str, case: str
) -> None:
    assert run(function, sample(function, case)) == {"batchItemFailures": []}
    statuses = [deserialize(item) for item in items() if item["sk"]["S"] == "status"]
    assert [(item["owner"], item["visible"]) for item in statuses] == TAKEN.get((function, case), [])
    assert executed.inputs == {f"{item['id']}-1": {"id": item["id"], "submit": True} for item in statuses}
    reasons = [request.reason for request in DeadRequests.from_env().receive(30)]
    expected = [BURIED[function, case]] if (function, case) in BURIED else []
    assert [reason[: len(start)] for reason, start in zip(reasons, expected, strict=True)] == expected
    assert replicate.asked == []


@pytest.mark.parametrize(("function", "case"), sorted(PUBLISHED), ids=names(PUBLISHED))
def test_a_sample_of_the_stream_is_queued_in_its_order(run: Run, cloud: None, function: str, case: str) -> None:
    assert run(function, sample(function, case)) == {"batchItemFailures": []}
    assert [(message["id"], message["event"]) for message in waiting("deliveries")] == [
        (SAMPLE_ID, event) for event in PUBLISHED[function, case]
    ]


@pytest.mark.parametrize("case", TOLD_TO_THE_BUS)
def test_a_sample_of_the_stream_is_told_to_the_bus(run: Run, cloud: None, case: str) -> None:
    bus = Bus()
    assert run("publish_changes", sample("publish_changes", case)) == {"batchItemFailures": []}
    assert bus.types == TOLD_TO_THE_BUS[case]


@pytest.mark.parametrize(("function", "case"), sorted(RUN_JOBS), ids=names(RUN_JOBS))
def test_a_sample_of_a_run_job_is_answered(
    run: Run,
    submissions: Submissions,
    outputs: OutputsBucket,
    replicate: ReplicateInMemory,
    clock: Clock,
    function: str,
    case: str,
) -> None:
    jobs = RunJobs(
        submissions.starting,
        submissions.table,
        Presenter(outputs, 3600),
        owner="queue",
        allow_loopback_webhooks=False,
        sleep=clock.sleep,
    )
    answer = run(function, sample(function, case), run_jobs=jobs)
    error = RUN_JOBS[function, case]
    assert (answer["status"], answer["prediction_id"] is None) == (None if error else "starting", bool(error))
    assert (answer["error"] or "").startswith(error or "")
    assert len(replicate.creates) == (0 if error else 1)


def test_a_sample_of_the_stream_that_cannot_be_queued_is_read_again(run: Run, cloud: None) -> None:
    event = sample("publish_changes", "start_and_output")
    with refusing("SendMessage", "AccessDenied", service="sqs"):
        failed = run("publish_changes", event)["batchItemFailures"]
    assert failed == [{"itemIdentifier": event["Records"][0]["dynamodb"]["SequenceNumber"]}]


def test_the_sample_of_a_retry_stays_in_its_queue_where_it_cannot_be_queued_again(run: Run, cloud: None) -> None:
    event = sample("publish_changes", "retry")
    Bus().call_refused_with = "AccessDeniedException"
    with refusing("SendMessage", "AccessDenied", service="sqs"):
        failed = run("publish_changes", event)["batchItemFailures"]
    assert failed == [{"itemIdentifier": event["Records"][0]["messageId"]}]


@pytest.fixture
def batch(cloud: None, executed: Executed, clock: Clock) -> Batch:
    """The batch of the samples, of one line, as it is when its execution begins."""
    batches = Batches("predictions", "outputs", now=clock.now)
    stepfunctions, recipes = clients.client("stepfunctions"), RecipeItems.from_env()
    made = BatchControl(batches, recipes, executed.batch_machine_arn, "inputs", 86400, stepfunctions).make(
        json.dumps({"requests": [BATCH_LINE]}).encode(), {}, "alice"
    )
    return batches.write_down(replace(made, id=SAMPLE_BATCH_ID))


def test_the_samples_of_a_batch_run_it_to_its_end(
    run: Run, batch: Batch, executed: Executed, replicate: ReplicateInMemory
) -> None:
    def shown(case: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(run("manage_batches", sample("manage_batches", case))["body"])
        return answer

    assert shown("one")["status"] == "preparing"
    assert run("prepare_batch", sample("prepare_batch", "execution"))["lines"] == 1
    assert run("start_from_queue", sample("start_from_queue", "batch_line")) == {"batchItemFailures": []}
    (name,) = executed.inputs
    assert run("submit_prediction", {"id": name.removesuffix("-1")}) == {}
    assert [create["input"] for create in replicate.creates] == [BATCH_LINE["input"]]
    assert run("finish_batch", sample("finish_batch", "execution"))["open"] == 1
    replicate.finish(next(iter(replicate.predictions)), output="A fox.")
    assert run("poll_prediction", {"id": name.removesuffix("-1")}) == {}
    assert shown("refused_retry_open")["status"] == 409
    assert run("finish_batch", sample("finish_batch", "execution"))["open"] == 0
    ended = shown("one")
    assert (ended["status"], ended["counts"]["succeeded"]) == ("succeeded", 1)
    assert ended["results"]["uri"].startswith("s3://outputs/alice/batches/")


def test_the_samples_of_a_batch_that_is_canceled_start_nothing_and_tell_the_state_that_waits(
    run: Run, batch: Batch, executed: Executed, wakes: Wakes
) -> None:
    answer = run("manage_batches", sample("manage_batches", "cancel"))
    assert json.loads(answer["body"])["cancel_requested"] is True
    run("prepare_batch", sample("prepare_batch", "execution"))
    assert run("start_from_queue", sample("start_from_queue", "batch_line")) == {"batchItemFailures": []}
    assert executed.inputs == {}
    assert wakes.told == [("AQCEAAAAKgAAAAMAAAAAAAAAAline", ("RequestNoLongerWanted", "The batch was canceled."))]
    assert list(DeadRequests.from_env().receive(30)) == []


@pytest.mark.parametrize("case", sorted(case for _, case in DEPLOYED))
def test_a_sample_of_a_deployment_is_answered(run: Run, cloud: None, case: str) -> None:
    answers: list[Any] = []

    def take(request: httpx.Request) -> httpx.Response:
        answers.append(json.loads(request.content))
        return httpx.Response(200)

    def open_client(**_: Any) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(take))

    packed = {"etch.json": json.dumps({"deployment": "acme/etcher", "input": {"prompt": "x"}}).encode()}
    run("deploy_recipes", sample("deploy_recipes", case), open_client=open_client, recipe_files=lambda: packed)
    (answer,) = answers
    assert answer["Status"] == "SUCCESS", answer
    there = RecipeItems.from_env().named("queue", "etch")
    assert (there is not None) == (case != "delete")


def test_the_sample_of_the_secret_gives_the_owners_own(run: Run, cloud: None) -> None:
    event = sample("give_secret", "secret")
    answer = run("give_secret", event)
    key = json.loads(answer["body"])["key"]
    assert key == OwnerSecrets.from_env().current_secret("alice")
    assert answer["multiValueHeaders"]["Cache-Control"] == ["no-store"]
    event["requestContext"]["authorizer"]["owner"] = "bob"
    assert json.loads(run("give_secret", event)["body"])["key"] != key


def test_the_sample_of_a_delivery_that_the_receiver_does_not_take_stays_in_the_queue(run: Run, cloud: None) -> None:
    class Busy:
        def deliver(self, delivery: Delivery, receipt_handle: str) -> bool:
            return delivery.event != "completed" or not receipt_handle

    event = sample("deliver_webhook", "completed")
    assert run("deliver_webhook", event, receivers=Busy()) == {
        "batchItemFailures": [{"itemIdentifier": event["Records"][0]["messageId"]}]
    }


@pytest.mark.parametrize(
    ("case", "source", "asked"),
    [
        ("s3", {"s3": {"prefix": "postcards/"}}, "lisbon.json"),
        ("schedule", {"schedule": {"expression": "rate(1 day)"}}, "2025-06-15T09:00:00Z"),
        ("event", {"pattern": {"source": ["shop"]}}, "a fox with a hat"),
    ],
)
def test_a_sample_of_an_event_starts_its_recipe_once(
    run: Run, executed: Executed, case: str, source: Any, asked: str
) -> None:
    prompt = {"s3": "{{ object.name }}", "schedule": "{{ schedule.time }}", "event": "{{ event.detail.text }}"}[case]
    event = sample("start_from_queue", case)
    recipe_id = json.loads(event["Records"][0]["body"])["recipe_id"]
    definition = {"model": "black-forest-labs/flux-schnell", "input": {"prompt": prompt}, **source}
    at = "2025-06-15T15:00:00.000000Z"
    RecipeItems.from_env().put(Recipe(recipe_id, "alice", "mine", definition, "active", "1", at, at), replaces=None)
    clients.client("s3").put_object(Bucket="inputs", Key="postcards/lisbon.json", Body=b"hello\n")
    for _ in range(2):
        assert run("start_from_queue", event) == {"batchItemFailures": []}
    assert len(executed.inputs) == 1
    started = [item for item in items() if item["sk"]["S"] == "status"]
    assert [(item["owner"]["S"], item["source"]["S"]) for item in started] == [("alice", "recipe")]
    (written,) = [item["json"]["S"] for item in items() if item["sk"]["S"].startswith("input#")]
    assert asked in written


def test_the_sample_of_a_manifest_starts_its_batch_once(run: Run, executed: Executed) -> None:
    definition = {
        "model": "black-forest-labs/flux-schnell", "input": {"prompt": "{{ row.animal }}"}, "batches": {}
    }  # fmt: skip
    at = "2025-06-15T15:00:00.000000Z"
    recipes = RecipeItems.from_env()
    recipe_id = recipes.claim_name("alice", "animals", SAMPLE_ID)
    recipes.put(Recipe(recipe_id, "alice", "animals", definition, "active", "1", at, at), replaces=None)
    manifest = b'{"animal": "fox"}\n{"animal": "hare"}\n'
    clients.client("s3").put_object(Bucket="inputs", Key="batches/alice/animals/2025-06.jsonl", Body=manifest)
    for _ in range(2):
        assert run("start_from_queue", sample("start_from_queue", "manifest")) == {"batchItemFailures": []}
    (found,) = json.loads(run("manage_batches", sample("manage_batches", "list"))["body"])["results"]
    assert (found["recipe"], found["manifest"]) == ("animals", "s3://inputs/batches/alice/animals/2025-06.jsonl")
    stepfunctions = clients.client("stepfunctions")
    (started,) = stepfunctions.list_executions(stateMachineArn=executed.batch_machine_arn)["executions"]
    assert started["name"] == f"{found['id']}-1-1"
