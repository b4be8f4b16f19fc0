"""`run_prediction`, invoked as `aws lambda invoke` does."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from predictions.files.outputs_bucket import OutputsBucket
from predictions.store.predictions import PredictionsTable

from local.cloud import OWNER, LocalCloud
from local.replicate.process import LocalReplicate

Api = Callable[..., httpx.Client]
PROMPT_ANSWER = {"success", "prediction_id", "status", "output", "urls", "logs", "error"}
INPUT_ANSWER = {
    "prediction_id", "status", "model", "input", "output", "error", "created_at", "completed_at", "urls", "metrics",
    "cost",
}  # fmt: skip


@pytest.fixture
def invoke(cloud: LocalCloud) -> Callable[..., dict[str, Any]]:
    """Invokes the function and waits for its answer."""

    def invoke(**job: Any) -> dict[str, Any]:
        answer = cloud.client("lambda").invoke(
            FunctionName=cloud.outputs["RunPredictionFunctionName"], Payload=json.dumps(job)
        )
        told: dict[str, Any] = json.loads(answer["Payload"].read())
        assert "FunctionError" not in answer, told
        return told

    return invoke


def predictions_of(replicate: LocalReplicate) -> list[dict[str, Any]]:
    return [asked for asked in replicate.record()["requests"] if asked["method"] == "POST"]


def ended(client: httpx.Client, prediction_id: str) -> dict[str, Any] | None:
    shown: dict[str, Any] = client.get(f"/predictions/{prediction_id}").raise_for_status().json()
    return shown if shown["status"] in ("succeeded", "failed", "canceled") else None


@pytest.mark.parametrize(
    ("job", "answer"),
    [
        ({"model": "local/painter"}, PROMPT_ANSWER),
        ({"model": "local/painter", "input_data": {"seed": -1}}, INPUT_ANSWER),
        ({"model": "local/nobody", "prompt": "a fox"}, PROMPT_ANSWER),
    ],
)
def test_refused_job_starts_nothing(
    invoke: Callable[..., Any], replicate: LocalReplicate, job: dict[str, Any], answer: set[str]
) -> None:
    told = invoke(**job)
    assert told.keys() == answer
    assert told["error"]
    assert [told[name] for name in answer - {"error"} if told[name]] == []
    assert predictions_of(replicate) == []


def test_prompt_is_answered_at_once_and_its_owner_reads_the_end(
    cloud: LocalCloud, api: Api, wait_until: Callable[..., Any], invoke: Callable[..., Any], replicate: LocalReplicate
) -> None:
    job = {"model": "local/painter", "prompt": "a lighthouse at dusk", "idempotency_key": "stack-prompt"}
    told = invoke(**job)
    assert told.keys() == PROMPT_ANSWER
    assert (told["success"], told["output"], told["error"]) == (True, None, None)
    assert told["urls"]["get"] == f"{cloud.stack.api_url}/predictions/{told['prediction_id']}"
    # A client that saw no answer asks again.
    again = invoke(**job)
    assert again["prediction_id"] == told["prediction_id"]
    shown = wait_until(lambda: ended(api(OWNER), told["prediction_id"]), 30)
    assert (shown["status"], len(shown["output_files"])) == ("succeeded", 1)
    assert api("alice").get(f"/predictions/{told['prediction_id']}").status_code == 404
    assert len(predictions_of(replicate)) == 1


def test_input_is_answered_at_its_end_with_files_of_ours(
    cloud: LocalCloud, invoke: Callable[..., Any], replicate: LocalReplicate
) -> None:
    asked = {"prompt": "a lighthouse at dusk", "aspect_ratio": "3:2"}
    told = invoke(model="local/painter", input_data=asked, poll_interval=0.2, max_poll_attempts=150)
    assert told.keys() == INPUT_ANSWER
    assert (told["status"], told["error"], told["model"], told["input"]) == ("succeeded", None, "local/painter", asked)
    assert told["metrics"]["predict_time"] > 0
    assert told["completed_at"] > told["created_at"]
    assert cloud.stack.outputs_bucket in str(told["output"])
    content = httpx.get(told["output"], trust_env=False, timeout=60).content
    assert content.startswith(b"\x89PNG")
    assert len(predictions_of(replicate)) == 1


def test_model_that_fails_is_answered_with_its_error(invoke: Callable[..., Any], replicate: LocalReplicate) -> None:
    told = invoke(model="local/crasher", input_data={"message": "out of paint"}, poll_interval=0.2)
    assert told.keys() == INPUT_ANSWER
    assert (told["status"], told["output"]) == ("failed", None)
    assert "out of paint" in told["error"]
    assert told["prediction_id"]


def test_wait_that_ends_first_is_answered_and_the_prediction_succeeds_later(
    api: Api, wait_until: Callable[..., Any], invoke: Callable[..., Any], replicate: LocalReplicate
) -> None:
    told = invoke(model="local/sleeper", input_data={"seconds": 8}, poll_interval=0.1, max_poll_attempts=2)
    # Its own shape has every field, also those that the API leaves out of an open prediction.
    assert told.keys() == INPUT_ANSWER
    assert told["status"] in ("starting", "processing")
    assert (told["output"], told["error"], told["completed_at"]) == (None, None, None)
    shown = wait_until(lambda: ended(api(OWNER), told["prediction_id"]), 30)
    assert (shown["status"], shown["output"]) == ("succeeded", "slept well")
    assert len(predictions_of(replicate)) == 1


def test_event_invocation_that_nobody_waits_for_starts_one(
    cloud: LocalCloud, wait_until: Callable[..., Any], replicate: LocalReplicate
) -> None:
    job = {"model": "local/sleeper", "input_data": {"seconds": 0.1}, "wait_for_completion": False}
    function = cloud.outputs["RunPredictionFunctionName"]
    answer = cloud.client("lambda").invoke(FunctionName=function, Payload=json.dumps(job), InvocationType="Event")
    assert answer["StatusCode"] == 202
    [asked] = wait_until(lambda: predictions_of(replicate), 20)
    prediction_id = asked["body"]["webhook"].rpartition("/")[2]
    table = PredictionsTable(
        cloud.stack.table_name, OutputsBucket(cloud.stack.outputs_bucket, []), cloud.client("dynamodb")
    )
    item = table.get(prediction_id)
    assert item is not None
    assert (item.owner, item.source) == (OWNER, "run_job")
