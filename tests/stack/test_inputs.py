"""Inputs are checked against the schemas of real Cog models, before anything reaches Replicate."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from local.cloud import LocalCloud
from local.replicate.process import LocalReplicate

Api = Callable[..., httpx.Client]


def version_of(replicate: LocalReplicate, model: str) -> str:
    answer = httpx.get(
        f"{replicate.origin}/v1/models/{model}",
        headers={"Authorization": f"Bearer {replicate.token}"},
        trust_env=False,
        timeout=60,
    )
    version: str = answer.raise_for_status().json()["latest_version"]["id"]
    return version


@pytest.mark.parametrize(
    ("model", "given", "fields"),
    [
        ("painter", {}, ["input.prompt"]),
        ("painter", {"prompt": 7}, ["input.prompt"]),
        ("painter", {"prompt": "a fox", "seed": -1}, ["input.seed"]),
        ("painter", {"prompt": "a fox", "seed": "7"}, ["input.seed"]),
        ("painter", {"prompt": "a fox", "aspect_ratio": "7:1"}, ["input.aspect_ratio"]),
        ("painter", {"seed": 0.5, "output_format": "gif"}, ["input.prompt", "input.seed", "input.output_format"]),
        ("storyteller", {"prompt": "a fox", "max_tokens": 2001}, ["input.max_tokens"]),
        ("etcher", {"image": "fox.png"}, ["input.image"]),
        ("etcher", {"image": ["https://example.com/fox.png"], "style": 1}, ["input.image", "input.style"]),
        ("blob", {"name": "x" * 101, "as_data_url": "yes"}, ["input.name", "input.as_data_url"]),
        ("sleeper", {"seconds": 3601}, ["input.seconds"]),
    ],
)
def test_wrong_input_is_refused_whole_and_never_reaches_replicate(
    api: Api, replicate: LocalReplicate, model: str, given: dict[str, Any], fields: list[str]
) -> None:
    by_version = f"local/{model}:{version_of(replicate, f'local/{model}')}"
    for version in (f"local/{model}", by_version):
        answer = api("alice").post("/predictions", json={"version": version, "input": given})
        assert answer.status_code == 422, answer.text
        assert answer.headers["content-type"].startswith("application/problem+json")
        problem = answer.json()
        assert problem["title"] == "Input validation failed"
        assert [each["field"] for each in problem["invalid_fields"]] == fields
        assert all(each["detail"] for each in problem["invalid_fields"])
    assert replicate.creates() == []


@pytest.mark.parametrize(
    "path", ["/models/local/painter/predictions", "/deployments/local/painter-deployment/predictions"]
)
def test_wrong_input_on_the_routes_of_models_and_deployments_is_refused(
    api: Api, replicate: LocalReplicate, path: str
) -> None:
    answer = api("alice").post(path, json={"input": {"seed": -1}})
    assert answer.status_code == 422, answer.text
    assert [each["field"] for each in answer.json()["invalid_fields"]] == ["input.prompt", "input.seed"]
    assert replicate.creates() == []


def test_schema_of_a_version_is_asked_for_once_and_kept_in_the_table(
    api: Api, cloud: LocalCloud, replicate: LocalReplicate
) -> None:
    version = version_of(replicate, "local/crasher")
    for how in ("exception", "none"):
        given = {"how": how, "after_seconds": 0}
        answer = api("alice").post("/predictions", json={"version": f"local/crasher:{version}", "input": given})
        assert answer.status_code == (201 if how == "exception" else 422), answer.text
    path = f"/v1/models/local/crasher/versions/{version}"
    assert len([r for r in replicate.record()["requests"] if r["path"] == path]) == 1
    key = {"pk": {"S": f"schema#{version}"}, "sk": {"S": "input"}}
    kept = cloud.client("dynamodb").get_item(TableName=cloud.stack.table_name, Key=key)["Item"]
    assert "after_seconds" in kept["json"]["S"]
    assert int(kept["expires_at"]["N"]) > 0


def test_version_alone_is_checked_from_its_second_prediction_on(
    api: Api, cloud: LocalCloud, replicate: LocalReplicate
) -> None:
    version = version_of(replicate, "local/etcher")
    wrong = {"version": version, "input": {"image": 7}}
    first = api("alice").post("/predictions", json=wrong)
    # Replicate's own refusal says nothing of the model; what it accepts does.
    assert first.status_code in (201, 422), first.text
    right = {"version": version, "input": {"image": "https://127.0.0.1:1/fox.png"}}
    accepted = api("alice").post("/predictions", json=right)
    assert accepted.status_code == 201, accepted.text
    assert accepted.headers["ratelimit-remaining"].isdigit()
    assert accepted.headers["ratelimit-reset"].isdigit()
    creates = len(replicate.creates())
    second = api("alice").post("/predictions", json=wrong)
    assert (second.status_code, second.json()["title"]) == (422, "Input validation failed")
    assert len(replicate.creates()) == creates


def test_schema_of_a_version_that_was_read_checks_the_version_alone(api: Api, replicate: LocalReplicate) -> None:
    version = version_of(replicate, "local/blob")
    assert api("alice").get(f"/models/local/blob/versions/{version}").status_code == 200
    answer = api("alice").post("/predictions", json={"version": version, "input": {"name": "x" * 101}})
    assert answer.status_code == 422, answer.text
    assert [each["field"] for each in answer.json()["invalid_fields"]] == ["input.name"]
    assert replicate.creates() == []


def test_list_is_between_moments(api: Api) -> None:
    client = api("filterer")
    made = [
        client.post("/predictions", json={"version": "local/crasher", "input": {"how": "exception"}}).json()
        for _ in range(2)
    ]
    first, second = made
    for query, ids in (
        ({"created_after": second["created_at"]}, [second["id"]]),
        ({"created_before": second["created_at"]}, [first["id"]]),
        ({"created_after": first["created_at"], "source": "api"}, [second["id"], first["id"]]),
        ({"source": "web"}, []),
    ):
        page = client.get("/predictions", params=query).raise_for_status().json()
        assert [each["id"] for each in page["results"]] == ids
