"""Run jobs: two shapes in, the same two out, one prediction for each."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError
from predictions.aws import clients
from predictions.files.outputs_bucket import OutputsBucket
from predictions.intake.invocation import RunJobs
from predictions.lifecycle.receive_webhook import receive
from predictions.store.predictions import PredictionsTable
from predictions.views.prediction import Presenter

from tests.support.apps import AwsCalls
from tests.support.fakes import (
    API_URL,
    VERSION,
    Clock,
    Executed,
    ReplicateInMemory,
    accept_then,
    answer,
    refusing,
)
from tests.support.protocol import Submissions

MODEL = "black-forest-labs/flux-schnell"
PROMPT = {"model": MODEL, "prompt": "a fox"}
INPUT = {"model": MODEL, "input_data": {"prompt": "a fox", "num_outputs": 2}}
PROMPT_ANSWER = {"success", "prediction_id", "status", "output", "urls", "logs", "error"}
INPUT_ANSWER = {
    "prediction_id", "status", "model", "input", "output", "error", "created_at", "completed_at", "urls", "metrics",
    "cost",
}  # fmt: skip

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def looks() -> list[Callable[[], None]]:
    """What happens while a job sleeps, one after the other."""
    return []


@pytest.fixture
def run(submissions: Submissions, outputs: OutputsBucket, clock: Clock, looks: list[Callable[[], None]]) -> Run:
    """Runs a job; its function may run for 900 s from now."""

    def sleep(seconds: float) -> None:
        clock.advance(seconds)
        if looks:
            looks.pop(0)()

    jobs = RunJobs(
        submissions.starting, submissions.table, Presenter(outputs, 3600),
        owner="queue", allow_loopback_webhooks=False, sleep=sleep,
    )  # fmt: skip

    def run(event: Any, request_id: str = "request-1") -> dict[str, Any]:
        began = clock.now()
        return jobs.run(event, request_id, lambda: 900 - (clock.now() - began))

    return run


@pytest.fixture
def tell(table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock) -> Callable[..., Callable[[], None]]:
    """Makes Replicate end the only prediction, and its webhook arrive."""

    def make(status: str = "succeeded", **told: Any) -> Callable[[], None]:
        def end() -> None:
            [(upstream_id, _)] = replicate.predictions.items()
            done = replicate.finish(upstream_id, status, **told)
            receive(table, ours(), json.dumps(done).encode(), clock.now())

        return end

    return make


def items() -> list[Any]:
    return list(clients.client("dynamodb").scan(TableName="predictions")["Items"])


def ours() -> str:
    """The id of the only prediction in the table."""
    [pk] = {item["pk"]["S"] for item in items() if item["sk"]["S"] == "status"}
    return str(pk.removeprefix("prediction#"))


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (None, "The event must be a JSON object"),
        ([PROMPT], "The event must be a JSON object"),
        ({}, "model: This field is required. prompt: This field is required (or `input_data`)."),
        ({"model": MODEL}, "prompt: This field is required (or `input_data`)."),
        ({"prompt": "a fox"}, "model: This field is required."),
        (PROMPT | {"prompt": ""}, "prompt: String should have at least 1 character"),
        (PROMPT | {"prompt": 7}, "prompt: Input should be a valid string"),
        (PROMPT | {"prompt": "\ud800"}, "half of a surrogate pair"),
        (PROMPT | {"model": "flux"}, "model: Must be `owner/name`"),
        (PROMPT | {"model": f"{MODEL}:latest"}, "model: Must be `owner/name`"),
        (PROMPT | {"webhook": "https://hooks.example.com"}, "webhook: Unknown field. The known fields are `model`,"),
        (PROMPT | {"webhook_url": "http://hooks.example.com"}, "webhook_url: "),
        (PROMPT | {"webhook_url": "https://169.254.169.254/"}, "webhook_url: "),
        (PROMPT | {"idempotency_key": "two words"}, "idempotency_key: Must be 1 to 255 printable"),
        (PROMPT | {"owner": "alice"}, "owner: Unknown field."),
    ],
)  # fmt: skip
def test_prompt_that_is_wrong_is_refused_in_its_shape_before_anything_is_asked_or_written(
    run: Run, replicate: ReplicateInMemory, event: Any, error: str
) -> None:
    calls = AwsCalls()
    told = run(event)
    assert told == dict.fromkeys(PROMPT_ANSWER) | {"success": False, "error": told["error"]}
    assert told["error"].startswith(error) or error in told["error"]
    assert (calls.made, replicate.asked) == ([], [])


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (INPUT | {"prompt": "a fox"}, "input_data: Give `prompt` or `input_data`, not both."),
        ({"model": MODEL, "wait_for_completion": True}, "input_data: This field is required."),
        (INPUT | {"input_data": "a fox"}, "input_data: Input should be a valid dictionary"),
        (INPUT | {"input_data": {"n": float("nan")}}, "not JSON"),
        (INPUT | {"input_data": {"n": nested(150)}}, "nested deeper than 100 levels"),
        (INPUT | {"input_data": {"n": nested(100_000)}}, "nested too deep"),
        (INPUT | {"input_data": {"n": "x" * 6_000_000}}, "bytes, which exceeds the limit of 5242880"),
        (INPUT | {"model": "a" * 257}, "model: String should have at most 256 characters"),
        (INPUT | {"wait_for_completion": "yes"}, "wait_for_completion: Input should be a valid boolean"),
        (INPUT | {"poll_interval": 0}, "poll_interval: Input should be greater than or equal to 0.1"),
        (INPUT | {"poll_interval": 61}, "poll_interval: Input should be less than or equal to 60"),
        (INPUT | {"poll_interval": "1"}, "poll_interval: Input should be a valid number"),
        (INPUT | {"max_poll_attempts": 0}, "max_poll_attempts: Input should be greater than or equal to 1"),
        (INPUT | {"max_poll_attempts": 10_001}, "max_poll_attempts: Input should be less than or equal to 10000"),
        (INPUT | {"max_poll_attempts": 1.5}, "max_poll_attempts: Input should be a valid integer"),
        (INPUT | {"webhook_url": "https://hooks.example.com"}, "webhook_url: Unknown field."),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_input_that_is_wrong_is_refused_in_its_shape_before_anything_is_asked_or_written(
    run: Run, replicate: ReplicateInMemory, event: Any, error: str
) -> None:
    calls = AwsCalls()
    told = run(event)
    assert told == dict.fromkeys(INPUT_ANSWER) | {"error": told["error"]}
    assert error in told["error"]
    assert (calls.made, replicate.asked) == ([], [])


def test_input_that_the_models_schema_refuses_names_its_fields_and_starts_nothing(
    run: Run, replicate: ReplicateInMemory
) -> None:
    told = run(INPUT | {"input_data": {"num_outputs": 9}})
    assert told["error"].startswith("input_data.prompt: This field is required. input_data.num_outputs: ")
    assert run({"model": "no/such", "prompt": "a fox"})["error"].startswith("Replicate API error: HTTP 404: ")
    assert (replicate.creates, items_of_predictions()) == ([], [])


def items_of_predictions() -> list[Any]:
    return [item for item in items() if item["pk"]["S"].startswith("prediction#")]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, "Replicate API error: HTTP 401"),
        (402, "Replicate API error: HTTP 402"),
        (422, "Replicate API error: HTTP 422: no such input"),
    ],
)
def test_refusal_of_replicate_is_an_error_that_says_so_and_nothing_is_started_later(
    run: Run, table: PredictionsTable, replicate: ReplicateInMemory, status: int, error: str
) -> None:
    replicate.faults = [answer(status, {"detail": "no such input"})]
    told = run(PROMPT)
    assert told == dict.fromkeys(PROMPT_ANSWER) | {"success": False, "error": error}
    ended = table.get(ours())
    assert ended is not None
    assert ended.visible == "failed"
    # Lambda repeats it: the same answer, and no second POST.
    assert run(PROMPT) == told
    assert len(replicate.creates) == 1


@pytest.mark.parametrize("status", [401, 402, 403])
def test_token_that_is_refused_when_the_model_is_asked_for_is_an_error_at_once(
    run: Run, replicate: ReplicateInMemory, clock: Clock, status: int
) -> None:
    replicate.read_faults = [lambda *_: httpx.Response(status)] * 3
    before = clock.now()
    assert run(INPUT)["error"] == f"Replicate API error: HTTP {status}"
    assert clock.now() == before
    assert items() == []


def test_replicate_that_cannot_be_asked_is_asked_three_times(
    run: Run, replicate: ReplicateInMemory, clock: Clock
) -> None:
    replicate.read_faults = [lambda *_: httpx.Response(500)] * 3
    before = clock.now()
    assert run(INPUT)["error"].startswith("Replicate API error: HTTP 500: ")
    assert (clock.now() - before, items()) == (10, [])
    replicate.read_faults = [lambda *_: httpx.Response(500)] * 2
    assert run(PROMPT)["success"] is True


def test_aws_that_fails_before_anything_is_started_fails_the_invocation_which_is_repeated(
    run: Run, replicate: ReplicateInMemory
) -> None:
    with refusing("PutItem", "InternalServerError", service="dynamodb"), pytest.raises(ClientError):
        run(PROMPT)
    assert replicate.creates == []
    assert run(PROMPT)["success"] is True


def test_key_of_another_job_is_refused(run: Run, replicate: ReplicateInMemory) -> None:
    assert run(PROMPT | {"idempotency_key": "order-7"})["success"] is True
    told = run(PROMPT | {"idempotency_key": "order-7", "prompt": "a wolf"}, "request-2")
    assert told["error"].startswith("idempotency_key: This key belongs to another request")
    assert len(replicate.creates) == 1


# -- what is answered -----------------------------------------------------------------------------------------------


def test_prompt_is_answered_at_once(
    run: Run, table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock
) -> None:
    before = clock.now()
    told = run(PROMPT | {"webhook_url": "https://hooks.example.com/x"})
    url = f"{API_URL}/predictions/{ours()}"
    assert told == {
        "success": True,
        "prediction_id": ours(),
        "status": "starting",
        "output": None,
        "urls": {"get": url, "cancel": f"{url}/cancel"},
        "logs": None,
        "error": None,
    }
    assert clock.now() == before
    [created] = replicate.creates
    assert created["input"] == {"prompt": "a fox"}
    assert executed.inputs == {f"{ours()}-1": {"id": ours(), "submit": False}}
    item = table.get(ours())
    assert item is not None
    assert (item.owner, item.source, item.webhook, item.webhook_events_filter) == (
        "queue", "run_job", "https://hooks.example.com/x", ("completed",),
    )  # fmt: skip


def test_input_is_answered_at_its_end(
    run: Run, replicate: ReplicateInMemory, clock: Clock, looks: list[Any], tell: Any
) -> None:
    before = clock.now()
    looks += [lambda: None, tell(output="A fox.", logs="done")]
    told = run(INPUT | {"poll_interval": 2.5})
    assert clock.now() - before == 5
    url = f"{API_URL}/predictions/{ours()}"
    assert told == {
        "prediction_id": ours(),
        "status": "succeeded",
        "model": MODEL,
        "input": INPUT["input_data"],
        "output": "A fox.",
        "error": None,
        "created_at": told["created_at"],
        "completed_at": replicate.timestamp(),
        "urls": {"get": url, "cancel": f"{url}/cancel"},
        "metrics": {"predict_time": 1.5},
        "cost": {
            "micro_dollars": None,
            "reason": f"Its metrics lack image_output_count, by which {MODEL} is billed.",
            "price": None,
        },
    }
    assert told["created_at"] < told["completed_at"]


@pytest.mark.parametrize(("status", "seen"), [("failed", "failed"), ("canceled", "canceled"), ("aborted", "canceled")])
def test_model_that_does_not_succeed_is_answered_with_its_status(
    run: Run, looks: list[Any], tell: Any, status: str, seen: str
) -> None:
    error = "out of paint" if status == "failed" else None
    looks.append(tell(status, error=error))
    told = run(INPUT)
    assert (told["status"], told["error"], told["output"]) == (seen, error, None)
    assert told.keys() == INPUT_ANSWER


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        ({}, 60),
        ({"poll_interval": 0.5, "max_poll_attempts": 4}, 2),
        ({"wait_for_completion": False}, 0),
        ({"poll_interval": 60, "max_poll_attempts": 10_000}, 840),
        ({"poll_interval": 20, "max_poll_attempts": 10_000}, 880),
    ],
)
def test_wait_that_ends_first_says_so_and_the_prediction_goes_on(
    run: Run, replicate: ReplicateInMemory, clock: Clock, tell: Any, asked: Any, seconds: int
) -> None:
    before = clock.now()
    told = run(INPUT | asked)
    assert clock.now() - before == seconds
    assert told.keys() == INPUT_ANSWER
    assert (told["status"], told["error"], told["completed_at"], told["metrics"]) == ("starting", None, None, {})
    tell(output="A fox.")()
    assert run(INPUT | asked)["status"] == "succeeded"
    assert len(replicate.creates) == 1


@pytest.mark.parametrize("job", [PROMPT, INPUT | {"wait_for_completion": False}])
def test_model_may_be_named_in_each_way(run: Run, replicate: ReplicateInMemory, job: Any) -> None:
    for n, name in enumerate((f"stability-ai/sdxl:{VERSION}", VERSION, "stability-ai/sdxl")):
        told = run(job | {"model": name}, f"request-{n}")
        assert told["error"] is None
        assert told.get("model", "stability-ai/sdxl") == "stability-ai/sdxl"
    assert [created["version"] for created in replicate.creates] == [VERSION] * 3


def test_answer_of_replicate_that_is_lost_is_no_error(run: Run, replicate: ReplicateInMemory) -> None:
    replicate.faults = [accept_then(httpx.ReadTimeout)]
    told = run(INPUT | {"model": VERSION, "wait_for_completion": False})
    assert (told["status"], told["error"], told["model"]) == ("starting", None, VERSION)


def test_aws_that_fails_after_the_start_is_no_error(run: Run, replicate: ReplicateInMemory) -> None:
    with refusing("Query", "InternalServerError", service="dynamodb"):
        told = run(PROMPT)
    assert (told["success"], told["status"], told["error"]) == (True, "starting", None)


def test_look_that_fails_is_followed_by_the_next(run: Run, looks: list[Any], tell: Any) -> None:
    refused = refusing("GetItem", "InternalServerError", service="dynamodb")

    def recover() -> None:
        refused.__exit__(None, None, None)
        tell(output="A fox.")()

    looks += [lambda: refused.__enter__() and None, recover]
    assert run(INPUT)["status"] == "succeeded"


# -- once -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", [PROMPT, INPUT | {"wait_for_completion": False}])
def test_invocation_that_lambda_repeats_starts_nothing_more(
    run: Run, replicate: ReplicateInMemory, executed: Executed, job: Any
) -> None:
    first = run(job)
    # Found before Replicate is asked for anything: it may not answer now.
    replicate.read_faults = [lambda *_: httpx.Response(500)] * 9
    assert run(job) == first
    assert len(replicate.creates) == len(executed.inputs) == 1
    replicate.read_faults = []
    assert run(job, "request-2")["prediction_id"] != first["prediction_id"]


@pytest.mark.parametrize("key", [{}, {"idempotency_key": None}, {"idempotency_key": "mine"}])
def test_invocation_that_is_redriven_starts_nothing_more(
    run: Run, replicate: ReplicateInMemory, key: dict[str, Any]
) -> None:
    first = run({**PROMPT, **key}, "request-1")
    again = run({"request_id": "request-1", "job": {**PROMPT, **key}}, "request-2")
    assert again["prediction_id"] == first["prediction_id"]
    assert len(replicate.creates) == 1


@pytest.mark.parametrize("event", [{"request_id": 1, "job": PROMPT}, {"request_id": "r", "job": "x"}, {"job": PROMPT}])
def test_redriven_job_that_is_none_is_refused(run: Run, replicate: ReplicateInMemory, event: Any) -> None:
    assert run(event)["success"] is False
    assert replicate.creates == []


def test_key_makes_one_prediction_of_two_invocations(run: Run, replicate: ReplicateInMemory) -> None:
    job = PROMPT | {"idempotency_key": "nightly-2025-06-15T06:00:00Z"}
    assert run(job) == run(job, "request-2")
    assert len(replicate.creates) == 1


def test_key_with_a_token_that_is_refused_is_submitted_once_that_is_mended(
    run: Run, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
) -> None:
    job = PROMPT | {"idempotency_key": "order-7"}
    replicate.faults = [answer(401)]
    assert run(job)["error"] == "Replicate API error: HTTP 401"
    clock.advance(301)
    submissions.submit(ours())
    told = run(job, "request-2")
    assert (told["success"], told["status"]) == (True, "starting")
    assert len(replicate.creates) == 2
