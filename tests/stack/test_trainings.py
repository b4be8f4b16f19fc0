"""Trainings on the deployed stack, with Cog's own `train` behind the stand-in."""

import base64
import hashlib
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from replicate.client import Client

from local.cloud import LocalCloud
from local.replicate.process import LocalReplicate

Api = Callable[..., httpx.Client]
WaitUntil = Callable[..., Any]

TEXT = b"the sea is calm and the sea is deep and the night is calm and the night is long"
DATA = "data:text/plain;base64," + base64.b64encode(TEXT).decode()
GOOD: dict[str, Any] = {"destination": "local/tuner", "input": {"train_data": DATA}}


@pytest.fixture(scope="session")
def route(cloud: LocalCloud) -> str:
    """The create route of trainings of the one model that has `train`."""
    answer = httpx.get(
        f"{cloud.replicate.url}/models/local/tuner", headers=cloud.replicate.headers, trust_env=False, timeout=60
    )
    return f"/models/local/tuner/versions/{answer.json()['latest_version']['id']}/trainings"


@pytest.fixture
def ended(api: Api, wait_until: WaitUntil) -> Callable[..., dict[str, Any]]:
    """The training as soon as callers see it ended."""

    def ended(training_id: str, seconds: float = 40) -> dict[str, Any]:
        def shown() -> dict[str, Any] | None:
            training: dict[str, Any] = api("alice").get(f"/trainings/{training_id}").raise_for_status().json()
            return training if training["status"] in ("succeeded", "failed", "canceled") else None

        found: dict[str, Any] = wait_until(shown, seconds, f"training {training_id} to end")
        return found

    return ended


def train(client: httpx.Client, route: str, **input_: Any) -> dict[str, Any]:
    body = GOOD | {"input": GOOD["input"] | input_}
    answer = client.post(route, json=body)
    assert answer.status_code == 201, answer.text
    shown: dict[str, Any] = answer.json()
    assert answer.headers["location"] == shown["urls"]["get"]
    return shown


def test_bad_training_is_a_problem_before_anything_is_spent(api: Api, replicate: LocalReplicate, route: str) -> None:
    bad: list[dict[str, Any]] = [{"input": {}}, {"destination": "tuner", "input": {}}, {**GOOD, "x": 1}]
    for body in bad:
        assert api("alice").post(route, json=body).status_code == 422
    assert api("alice").post(route.replace("/versions/", "/versions/x"), json={}).status_code == 404
    assert replicate.creates() == []


def test_refusal_of_replicate_is_the_callers_answer(api: Api, replicate: LocalReplicate, route: str) -> None:
    answer = api("alice").post(route, json={"destination": "local/nothing", "input": {"train_data": DATA}})
    assert answer.status_code == 422
    assert "destination" in answer.json()["detail"]


def test_training_ends_with_its_version_and_its_weights_in_the_bucket(
    cloud: LocalCloud, api: Api, replicate: LocalReplicate, route: str, ended: Callable[..., dict[str, Any]]
) -> None:
    alice = api("alice")
    created = train(alice, route)
    assert (created["status"], created["destination"]) == ("starting", "local/tuner")
    training = ended(created["id"])
    assert training["status"] == "succeeded", training["error"]
    assert training["output"]["version"].startswith("local/tuner:")
    assert "Epoch 3 of 3" in training["logs"]
    (file,) = training["output_files"]
    assert file["path"] == "/weights"
    stored = cloud.client("s3").get_object(Bucket=file["bucket"], Key=file["key"])["Body"].read()
    assert (len(stored), hashlib.sha256(stored).hexdigest()) == (file["bytes"], file["sha256"])
    assert json.loads(stored)["sea"] == {"is": 6}
    assert replicate.origin not in json.dumps(training)
    [sent] = replicate.creates(created["id"])
    assert "cancel-after" not in sent["headers"]
    # Apart from predictions, and from other owners.
    assert alice.get(f"/predictions/{created['id']}").status_code == 404
    assert created["id"] not in [each["id"] for each in alice.get("/predictions").json()["results"]]
    assert created["id"] in [each["id"] for each in alice.get("/trainings").json()["results"]]
    assert api("bob").get(f"/trainings/{created['id']}").status_code == 404


@pytest.mark.parametrize("fault", ["create_accepted_then_error", "create_accepted_then_reset"])
def test_training_whose_answer_and_webhooks_were_lost_is_found_and_not_started_twice(
    api: Api, replicate: LocalReplicate, route: str, ended: Callable[..., dict[str, Any]], fault: str
) -> None:
    replicate.fault(fault)
    replicate.fault("webhook_lost", times=None)
    created = train(api("alice"), route)
    # Neither the list nor a GET shows webhooks here: its likeness tells, after the grace.
    assert ended(created["id"], 90)["status"] == "succeeded"
    assert len(replicate.creates()) == 1


def test_cancel_ends_it_at_replicate(
    api: Api, replicate: LocalReplicate, route: str, ended: Callable[..., dict[str, Any]]
) -> None:
    created = train(api("alice"), route, seconds=60)
    assert api("alice").post(f"/trainings/{created['id']}/cancel").status_code == 200
    assert ended(created["id"])["status"] == "canceled"
    asked = [request["path"] for request in replicate.record()["requests"] if request["path"].endswith("/cancel")]
    assert all(path.startswith("/v1/trainings/") for path in asked)
    assert asked


def test_official_client_trains_lists_and_cancels(
    cloud: LocalCloud, replicate: LocalReplicate, route: str, ended: Callable[..., dict[str, Any]]
) -> None:
    version = route.split("/")[5]
    client = Client(api_token=cloud.create_token("alice"), base_url=cloud.stack.api_url.removesuffix("/v1"))
    training = client.trainings.create(
        version=f"local/tuner:{version}", input={"train_data": DATA}, destination="local/tuner"
    )
    assert ended(training.id)["status"] == "succeeded"
    training.reload()
    assert training.output is not None
    assert training.output["version"].startswith("local/tuner:")
    assert training.id in [each.id for each in client.trainings.list().results]
    client.trainings.cancel(training.id)
    assert client.trainings.get(training.id).status == "succeeded"
    client._client.close()
