"""What the deployed stack passes on to Replicate, asked by the official Python client and by plain HTTP."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from replicate.client import Client
from replicate.exceptions import ReplicateError

from local.cloud import LocalCloud
from local.replicate.catalog import models
from local.replicate.process import LocalReplicate

Api = Callable[..., httpx.Client]

PAINTER = models["local/painter"]
DEPLOYMENT = {
    "name": "harbour",
    "model": "local/painter",
    "version": PAINTER.version,
    "hardware": "gpu-t4",
    "min_instances": 0,
    "max_instances": 2,
}


@pytest.fixture(scope="module")
def client(cloud: LocalCloud) -> Iterator[Client]:
    """The official Python client, told nothing but where the stack is."""
    client = Client(api_token=cloud.create_token("alice"), base_url=cloud.stack.api_url.removesuffix("/v1"))
    yield client
    client._client.close()


def asked(replicate: LocalReplicate) -> list[tuple[str, str]]:
    """Method and path of what the stand-in was asked, but for what the stack's own sweep asks."""
    requests = replicate.record()["requests"]
    return [(r["method"], r["path"]) for r in requests if not r["path"].startswith(("/v1/webhooks", "/v1/predictions"))]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/deployments"),
        ("PATCH", "/deployments/local/painter-deployment"),
        ("DELETE", "/deployments/local/painter-deployment"),
        ("POST", "/models"),
        ("DELETE", "/models/local/relic"),
    ],
)
def test_a_change_with_a_token_that_may_not_manage_is_refused_and_not_passed_on(
    cloud: LocalCloud, replicate: LocalReplicate, method: str, path: str
) -> None:
    headers = {"Authorization": f"Bearer {cloud.create_token('bob', ['predict', 'read'])}"}
    answer = httpx.request(
        method, f"{cloud.stack.api_url}{path}", json=DEPLOYMENT, headers=headers, trust_env=False, timeout=60
    )
    assert (answer.status_code, answer.json()["status"]) == (403, 403)
    assert "manage" in answer.json()["detail"]
    assert asked(replicate) == []


@pytest.mark.parametrize(
    "path",
    [
        "/models/local/..%2f..%2faccount",
        "/models/%2e%2e/account",
        "/models/local/painter%3fx=1",
        "/models/local/painter/versions/latest",
        "/collections/..%2faccount",
        "/deployments/local/a%2523b",
        "/nothing",
    ],
)
def test_a_path_that_is_no_route_or_no_name_is_a_problem_and_not_passed_on(
    api: Api, replicate: LocalReplicate, path: str
) -> None:
    answer = api().get(httpx.URL(f"{api().base_url}".rstrip("/") + path))
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    assert asked(replicate) == []


def test_the_clients_search_by_the_method_query_is_refused_as_there_is_no_such_method(client: Client) -> None:
    with pytest.raises(ReplicateError, match="no such path, or it does not take this method"):
        client.models.search("lighthouse")


def test_replicates_refusals_come_through_as_it_says_them(client: Client, replicate: LocalReplicate) -> None:
    with pytest.raises(ReplicateError) as missing:
        client.models.get("local/unknown")
    assert (missing.value.status, missing.value.detail) == (404, "The requested resource could not be found.")
    with pytest.raises(ReplicateError) as invalid:
        client.deployments.create(**{**DEPLOYMENT, "max_instances": 1000})  # type: ignore[arg-type]
    assert invalid.value.status == 422
    assert "max_instances" in str(invalid.value)


@pytest.mark.parametrize("status", [401, 402])
def test_a_refusal_of_the_stacks_own_token_or_credit_is_no_fault_of_the_caller(
    api: Api, replicate: LocalReplicate, status: int
) -> None:
    replicate.fault("other_error", status=status, path="/account")
    answer = api().get("/account")
    assert (answer.status_code, answer.headers["content-type"]) == (502, "application/problem+json")
    assert "operator" in answer.json()["detail"]
    assert api().get("/account").status_code == 200


@pytest.mark.parametrize(("told", "given"), [(500, 502), (503, 503), (429, 429), (409, 409)])
def test_a_failure_of_replicate_is_told_as_such(api: Api, replicate: LocalReplicate, told: int, given: int) -> None:
    replicate.fault("other_error", status=told, path="/hardware")
    answer = api().get("/hardware")
    assert (answer.status_code, answer.json()["status"]) == (given, given)
    assert len(asked(replicate)) == 1
    if given == 429:
        assert int(answer.headers["retry-after"]) > 0


def test_a_broken_connection_is_tried_again_for_a_read_only(api: Api, replicate: LocalReplicate) -> None:
    replicate.fault("other_reset", path="/account")
    assert api().get("/account").status_code == 200
    assert asked(replicate) == [("GET", "/v1/account")] * 2
    replicate.fault("other_reset", path="/deployments")
    answer = api().post("/deployments", json=DEPLOYMENT)
    assert answer.status_code == 502
    assert "is unknown" in answer.json()["detail"]
    assert asked(replicate)[2:] == [("POST", "/v1/deployments")]


def test_silence_of_replicate_ends_before_the_api_gives_up(api: Api, replicate: LocalReplicate) -> None:
    replicate.fault("other_silence", path="/hardware")
    answer = api().get("/hardware")
    assert (answer.status_code, answer.json()["title"]) == (504, "Gateway Timeout")
    assert "Replicate did not respond in time" in answer.json()["detail"]
    assert asked(replicate) == [("GET", "/v1/hardware")]


# -- the official client ----------------------------------------------------------------------------------------------


def test_the_client_reads_models_with_their_versions_and_examples(client: Client, cloud: LocalCloud) -> None:
    painter = client.models.get("local/painter")
    assert (painter.owner, painter.name) == ("local", "painter")
    assert painter.latest_version is not None
    assert painter.latest_version.id == PAINTER.version
    assert painter.default_example is not None
    urls: Any = painter.default_example.urls
    assert urls["get"] == f"{cloud.stack.api_url}/predictions/{painter.default_example.id}"
    listed = client.models.list()
    assert {model.id for model in listed.results} == set(models)
    assert listed.next is None
    versions = painter.versions.list()
    assert [version.id for version in versions.results] == [PAINTER.version]
    assert painter.versions.get(PAINTER.version).openapi_schema == PAINTER.schema


def test_the_client_reads_collections_hardware_and_account(client: Client) -> None:
    [paint, *_] = client.collections.list().results
    assert paint.slug == "text-to-image"
    held = client.collections.get("text-to-image").models
    assert held is not None
    assert [model.id for model in held] == ["local/painter", "local/series"]
    assert {hardware.sku for hardware in client.hardware.list()} >= {"cpu", "gpu-t4"}
    account = client.accounts.current()
    assert (account.type, account.username) == ("user", "local")


def test_the_client_makes_changes_runs_and_deletes_a_deployment(client: Client, replicate: LocalReplicate) -> None:
    made = client.deployments.create(**DEPLOYMENT)  # type: ignore[arg-type]  # a dict of the parameters
    assert made.id == "local/harbour"
    assert made.current_release is not None
    assert (made.current_release.number, made.current_release.configuration.hardware) == (1, "gpu-t4")
    changed = client.deployments.update("local", "harbour", max_instances=5)
    assert changed.current_release is not None
    assert (changed.current_release.number, changed.current_release.configuration.max_instances) == (2, 5)
    assert client.deployments.get("local/harbour").current_release == changed.current_release
    assert {each.name for each in client.deployments.list().results} == {"painter-deployment", "harbour"}
    prediction = made.predictions.create(input={"prompt": "a harbour in fog"})
    prediction.wait()
    assert prediction.status == "succeeded"
    assert client.deployments.delete("local", "harbour")
    with pytest.raises(ReplicateError) as gone:
        client.deployments.get("local/harbour")
    assert gone.value.status == 404
    [create] = [r for r in replicate.record()["requests"] if (r["method"], r["path"]) == ("POST", "/v1/deployments")]
    assert (create["authorization"], create["body"]) == ("valid", DEPLOYMENT)
    assert create["headers"]["user-agent"] == "replicate-serverless"


def test_the_client_makes_and_deletes_a_model(client: Client, api: Api) -> None:
    made = client.models.create("local", "sketch", visibility="private", hardware="cpu", description="Draws.")
    assert (made.visibility, made.latest_version) == ("private", None)
    changed = api().patch("/models/local/sketch", json={"description": "Draws foxes.", "readme": "# Sketch\n\nFüchse."})
    assert (changed.status_code, changed.json()["description"]) == (200, "Draws foxes.")
    readme = api().get("/models/local/sketch/readme")
    assert (readme.text, readme.headers["content-type"]) == ("# Sketch\n\nFüchse.", "text/plain; charset=utf-8")
    assert client.models.delete("local/sketch")
    assert api().get("/models/local/sketch").status_code == 404


def test_a_version_is_asked_for_once_until_it_is_deleted(client: Client, api: Api, replicate: LocalReplicate) -> None:
    relic = client.models.get("local/relic")
    [version] = relic.versions.list().results
    before = len(asked(replicate))
    assert [relic.versions.get(version.id).id for _ in range(3)] == [version.id] * 3
    assert len(asked(replicate)) == before + 1
    assert api().delete(f"/models/local/relic/versions/{version.id}").status_code == 202
    assert api().get(f"/models/local/relic/versions/{version.id}").status_code == 404
    deleted = api().delete("/models/local/relic")
    assert (deleted.status_code, deleted.content) == (204, b"")


# -- what the client has no method for --------------------------------------------------------------------------------


def test_examples_and_search_are_read_with_links_to_the_stack(api: Api, cloud: LocalCloud) -> None:
    [example] = api().get("/models/local/painter/examples").json()["results"]
    assert example["urls"]["get"].startswith(f"{cloud.stack.api_url}/predictions/")
    assert example["urls"]["cancel"].startswith(f"{cloud.stack.api_url}/predictions/")
    found = api().get("/search", params={"query": "word by word", "limit": 5}).json()
    assert (found["query"], [each["model"]["name"] for each in found["models"]]) == ("word by word", ["storyteller"])
    refused = api().get("/search")
    assert (refused.status_code, refused.json()["detail"]) == (400, 'Query parameter "query" is required')


def test_a_query_passes_whatever_is_in_it(api: Api, replicate: LocalReplicate) -> None:
    query = {"query": "größe & 50% + #1 /../ ?"}
    assert api().get("/search", params=query).json()["query"] == query["query"]
    [request] = [r for r in replicate.record()["requests"] if r["path"] == "/v1/search"]
    assert dict(httpx.QueryParams(request["query"])) == query
