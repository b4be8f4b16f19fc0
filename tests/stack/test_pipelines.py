"""Pipelines on the deployed stack: the queue, the state machine, the stream and the stand-in's models as they are."""

import io
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from PIL import Image

from local.cloud import LocalCloud
from local.replicate.process import LocalReplicate

Api = Callable[..., httpx.Client]
WaitUntil = Callable[..., Any]


class Pipelines:
    """What the tests ask of the deployed stack."""

    def __init__(self, cloud: LocalCloud, alice: httpx.Client, wait_until: WaitUntil) -> None:
        self.cloud, self.alice, self._wait_until = cloud, alice, wait_until

    def create(self, *steps: dict[str, Any], **others: Any) -> str:
        answer = self.alice.post("/pipelines", json={"steps": list(steps), **others})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def get(self, pipeline_id: str) -> dict[str, Any]:
        shown: dict[str, Any] = self.alice.get(f"/pipelines/{pipeline_id}").raise_for_status().json()
        return shown

    def until(self, pipeline_id: str, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        def shown() -> dict[str, Any] | None:
            pipeline = self.get(pipeline_id)
            return pipeline if condition(pipeline) else None

        found: dict[str, Any] = self._wait_until(shown, 180, what)
        return found

    def ended(self, pipeline_id: str) -> dict[str, Any]:
        return self.until(pipeline_id, lambda shown: shown["status"] != "running", "the pipeline to end")

    def execution(self, pipeline_id: str) -> str:
        """How the pipeline's first execution ended."""
        stepfunctions = self.cloud.client("stepfunctions")
        arn = self.cloud.resources["RunPipelineStateMachine"].replace(":stateMachine:", ":execution:")

        def status() -> str | None:
            found: str = stepfunctions.describe_execution(executionArn=f"{arn}:{pipeline_id}-1")["status"]
            return found if found != "RUNNING" else None

        return str(self._wait_until(status, 60, "the execution to end"))


@pytest.fixture
def pipelines(cloud: LocalCloud, api: Api, wait_until: WaitUntil, replicate: LocalReplicate) -> Pipelines:
    return Pipelines(cloud, api("alice"), wait_until)


def picture_at(url: str) -> tuple[int, int]:
    """The size of a picture that is served."""
    answer = httpx.get(url, follow_redirects=True, trust_env=False, timeout=60).raise_for_status()
    return Image.open(io.BytesIO(answer.content)).size


def test_cycle_is_refused_with_its_steps_and_nothing_is_started(
    pipelines: Pipelines, replicate: LocalReplicate
) -> None:
    answer = pipelines.alice.post(
        "/pipelines",
        json={
            "steps": [
                {"name": "first", "model": "local/storyteller", "input": {"prompt": "{{ steps.second.output }}"}},
                {"name": "second", "model": "local/storyteller", "input": {"prompt": "{{ steps.first.output }}"}},
                {"name": "third", "model": "local/storyteller", "input": {"prompt": 7}},
                {"name": "fourth", "model": "local/nobody", "input": {}},
            ]
        },
    )
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    found = {each["field"]: each["detail"] for each in answer.json()["invalid_fields"]}
    assert found.keys() == {"steps.0.input", "steps.1.input", "steps.2.input.prompt", "steps.3.model"}
    assert "`first` needs `second` needs `first`" in found["steps.0.input"]
    assert replicate.creates() == []


def test_image_is_redrawn_and_described(pipelines: Pipelines, api: Api, replicate: LocalReplicate) -> None:
    pipeline_id = pipelines.create(
        {"name": "image", "model": "local/painter", "input": {"prompt": "{{ input.subject }}"}},
        {"name": "large", "version": "local/etcher", "input": {"image": "{{ steps.image.output }}"}},
        {
            "name": "caption",
            "model": "local/storyteller",
            "input": {"prompt": "{{ input.subject }} at {{ steps.large.output }}", "max_tokens": 5},
        },
        input={"subject": "a lighthouse at dusk"},
    )
    assert api("bob").get(f"/pipelines/{pipeline_id}").status_code == 404
    shown = pipelines.ended(pipeline_id)
    assert (shown["status"], shown["error"]) == ("succeeded", None)
    image, large, caption = shown["steps"]
    assert len("".join(shown["output"]["caption"]).split()) == 5
    assert shown["output"].keys() == {"caption"}
    assert picture_at(image["output"]) == picture_at(large["output"])
    [prediction_id] = caption["predictions"]
    prediction = pipelines.alice.get(f"/predictions/{prediction_id}").json()
    assert prediction["input"]["prompt"].startswith("a lighthouse at dusk at http")
    assert "/objects/outputs/" in prediction["input"]["prompt"]
    assert len(replicate.creates()) == 3
    assert pipelines.execution(pipeline_id) == "SUCCEEDED"


def test_step_runs_for_each_file_of_another_one(pipelines: Pipelines) -> None:
    pipeline_id = pipelines.create(
        {"name": "series", "version": "local/series", "input": {"count": 3}},
        {
            "name": "drawn",
            "version": "local/etcher",
            "for_each": "{{ steps.series.output }}",
            "input": {"image": "{{ item }}", "style": "{{ input.style }}"},
        },
        input={"style": "mosaic"},
    )
    shown = pipelines.ended(pipeline_id)
    assert (shown["status"], shown["error"]) == ("succeeded", None)
    assert len(set(shown["steps"][1]["predictions"])) == 3
    assert [picture_at(url) for url in shown["output"]["drawn"]] == [(96, 96)] * 3


def test_failed_step_ends_what_needs_it_only(pipelines: Pipelines, replicate: LocalReplicate) -> None:
    pipeline_id = pipelines.create(
        {"name": "crash", "version": "local/crasher", "input": {"message": "no paint left"}},
        {"name": "after", "model": "local/storyteller", "input": {"prompt": "{{ steps.crash.output }}"}},
        {"name": "other", "version": "local/sleeper", "input": {"seconds": 1, "text": "fine"}},
        {"name": "wrong", "model": "local/storyteller", "input": {"prompt": "{{ steps.other.output.title }}"}},
    )
    shown = pipelines.ended(pipeline_id)
    assert shown["status"] == "failed"
    assert {each["name"]: each["status"] for each in shown["steps"]} == {
        "crash": "failed",
        "after": "skipped",
        "other": "succeeded",
        "wrong": "failed",
    }
    assert "no paint left" in shown["error"]
    assert shown["steps"][3]["error"].startswith("Step `wrong`: input.prompt: ")
    assert shown["output"] == {"after": None, "wrong": None}
    assert len(replicate.creates()) == 2


def test_cancel_cancels_what_runs_and_starts_nothing_more(pipelines: Pipelines, replicate: LocalReplicate) -> None:
    pipeline_id = pipelines.create(
        {"name": "long", "version": "local/sleeper", "input": {"seconds": 600}},
        {"name": "after", "model": "local/storyteller", "input": {"prompt": "{{ steps.long.output }}"}},
    )
    pipelines.until(pipeline_id, lambda shown: shown["steps"][0]["status"] == "processing", "the first step to run")
    canceled = pipelines.alice.post(f"/pipelines/{pipeline_id}/cancel")
    assert (canceled.status_code, bool(canceled.json()["cancel_requested_at"])) == (200, True)
    shown = pipelines.ended(pipeline_id)
    assert shown["status"] == "canceled"
    assert [each["status"] for each in shown["steps"]] == ["canceled", "canceled"]
    assert len(replicate.creates()) == 1
    assert [each["path"] for each in replicate.record()["requests"] if each["path"].endswith("/cancel")]
    listed = pipelines.alice.get("/pipelines").json()["results"]
    assert pipeline_id in [each["id"] for each in listed]


def test_same_key_is_the_same_pipeline(pipelines: Pipelines, replicate: LocalReplicate) -> None:
    body = {"steps": [{"name": "nap", "version": "local/sleeper", "input": {"seconds": 0.1}}]}
    answers = [pipelines.alice.post("/pipelines", json=body, headers={"Idempotency-Key": "nap-1"}) for _ in range(2)]
    first, second = (answer.json()["id"] for answer in answers)
    assert first == second
    assert pipelines.ended(first)["status"] == "succeeded"
    assert len(replicate.creates()) == 1
