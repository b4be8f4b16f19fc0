import base64
import hashlib
import hmac
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from local.replicate.catalog import models
from local.replicate.faults import Bucket
from local.replicate.process import LocalReplicate
from local.replicate.schema import openapi_schema
from local.replicate.webhooks import signature
from tests.support.fakes import WEBHOOK_VECTORS

JsonObject = dict[str, Any]

PAINTER = "local/painter"
version = {model.name: model.version for model in models.values()}


class Receiver:
    """A webhook receiver: gives what it got, and answers with the statuses it was told to, else 200."""

    def __init__(self) -> None:
        self.received: queue.Queue[tuple[httpx.Headers, bytes]] = queue.Queue()
        self.statuses: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.received.put((httpx.Headers(self.headers.items()), body))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                self.send_header("location", "/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the base class's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook?for=ours"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def next(self) -> tuple[httpx.Headers, JsonObject]:
        headers, body = self.received.get(timeout=60)
        return headers, json.loads(body)

    def statuses_received(self, count: int) -> list[str]:
        return [self.next()[1]["status"] for _ in range(count)]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def running() -> Iterator[LocalReplicate]:
    with LocalReplicate() as replicate:
        yield replicate


@pytest.fixture
def replicate(running: LocalReplicate) -> LocalReplicate:
    running.reset()
    return running


@pytest.fixture(scope="module")
def client(running: LocalReplicate) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, headers=running.headers, timeout=120, trust_env=False) as client:
        yield client


@pytest.fixture
def api(replicate: LocalReplicate, client: httpx.Client) -> httpx.Client:
    return client


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def run(api: httpx.Client, model: str, input_: JsonObject, **body: Any) -> JsonObject:
    """A finished prediction."""
    created = api.post(
        "/predictions", json={"version": version[model], "input": input_, **body}, headers={"Prefer": "wait"}
    )
    assert created.status_code == 201, created.text
    return dict(created.json())


def until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether `condition` became true in time."""
    end = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        if time.monotonic() > end:
            return False
        pause.wait(0.05)
    return True


def attempts(replicate: LocalReplicate, prediction: JsonObject) -> list[JsonObject]:
    """The recorded attempts to send a webhook of `prediction`."""
    sent = replicate.record()["webhooks"]
    return [entry for entry in sent if entry["prediction"] == prediction["id"] and entry["attempt"]]


def status_of(api: httpx.Client, prediction: JsonObject) -> str:
    return str(api.get(f"/predictions/{prediction['id']}").json()["status"])


# Refusals


@pytest.mark.parametrize("authorization", [None, "Bearer r8_wrong", "Basic r8_local", "Bearer", "Bearer é"])
def test_request_without_the_token_is_refused_as_recorded(replicate: LocalReplicate, authorization: str | None) -> None:
    headers = {b"Authorization": authorization.encode()} if authorization else {}
    answer = httpx.get(f"{replicate.url}/predictions", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {
        "title": "Unauthenticated",
        "detail": "You did not pass a valid authentication token",
        "status": 401,
    }


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"version": PAINTER, "input": {"prompt": "x"}, "lifetime": "30s"}, "lifetime"),
        ({"version": PAINTER, "input": {"prompt": "x"}, "webhook_completed": "https://example.com"}, "webhook_c"),
        ({"version": PAINTER}, "input"),
        ({"input": {}}, "version"),
        ({"version": PAINTER, "input": "x"}, "input"),
        ({"version": PAINTER, "input": {}}, "prompt"),
        ({"version": PAINTER, "input": {"prompt": 5}}, "input.prompt"),
        ({"version": PAINTER, "input": {"prompt": "x", "aspect_ratio": "2:9"}}, "input.aspect_ratio"),
        ({"version": PAINTER, "input": {"prompt": "x", "seed": -1}}, "input.seed"),
        ({"version": version["etcher"], "input": {"image": "/etc/passwd"}}, "input.image"),
        ({"version": PAINTER, "input": {"prompt": "x"}, "webhook": "http://example.com/"}, "webhook"),
        ({"version": PAINTER, "input": {"prompt": "x"}, "webhook": "nonsense"}, "webhook"),
        ({"version": PAINTER, "input": {"prompt": "x"}, "webhook_events_filter": ["end"]}, "webhook_events_filter"),
        ({"version": "local/etcher", "input": {}}, "version"),
        ({"version": "local/unknown", "input": {}}, "version"),
        ({"version": "0" * 64, "input": {}}, "version"),
        ({"version": f"local/etcher:{version['painter']}", "input": {"prompt": "x"}}, "version"),
        ([], "body"),
    ],
)
def test_bad_create_is_refused_and_starts_nothing(
    replicate: LocalReplicate, api: httpx.Client, body: Any, field: str
) -> None:
    before = len(replicate.record()["predictions"])
    answer = api.post("/predictions", json=body)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert field in answer.json()["detail"]
    assert len(replicate.record()["predictions"]) == before


@pytest.mark.parametrize("content", ["", "{", '{"input": NaN}', "[" * 100_000])
def test_body_that_is_not_json_is_refused(api: httpx.Client, content: str) -> None:
    assert api.post("/predictions", content=content).status_code == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"Prefer": "wait=0"},
        {"Prefer": "wait=61"},
        {"Prefer": "respond-async"},
        {"Cancel-After": "4"},
        {"Cancel-After": "4s"},
        {"Cancel-After": ""},
        {"Cancel-After": "5x"},
        {"Cancel-After": "m"},
    ],
)
def test_bad_header_is_refused(api: httpx.Client, headers: dict[str, str]) -> None:
    body = {"version": PAINTER, "input": {"prompt": "x"}}
    assert api.post("/predictions", json=body, headers=headers).status_code == 422


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/models/local/etcher/predictions", 404),
        ("POST", "/models/local/unknown/predictions", 404),
        ("POST", "/deployments/local/unknown/predictions", 404),
        ("GET", "/models/local/unknown", 404),
        ("GET", "/models/local/painter/versions/" + "0" * 64, 404),
        ("DELETE", "/models/local/painter/versions/" + "0" * 64, 404),
        ("DELETE", "/models/local/painter/versions/" + version["painter"], 403),
        ("DELETE", "/models/local/painter", 403),
        ("DELETE", "/models/local/relic", 403),
        ("DELETE", "/models/local/unknown", 404),
        ("PATCH", "/models/local/unknown", 404),
        ("GET", "/models/local/relic/readme", 404),
        ("GET", "/models/local/unknown/examples", 404),
        ("GET", "/models?sort_by=stars", 422),
        ("POST", "/models", 422),
        ("GET", "/collections/unknown", 404),
        ("GET", "/deployments/local/unknown", 404),
        ("PATCH", "/deployments/local/unknown", 404),
        ("DELETE", "/deployments/local/unknown", 404),
        ("POST", "/deployments", 422),
        ("GET", "/predictions/unknown", 404),
        ("POST", "/predictions/unknown/cancel", 404),
        ("GET", "/nothing", 404),
        ("DELETE", "/predictions", 405),
        ("GET", "/predictions?cursor=%00", 422),
        ("GET", "/predictions?created_after=yesterday", 422),
        ("GET", "/predictions?source=api", 422),
    ],
)
def test_unknown_thing_is_a_problem(api: httpx.Client, method: str, path: str, status: int) -> None:
    answer = api.request(method, path, json={"input": {"prompt": "x"}} if method == "POST" else None)
    assert (answer.status_code, answer.json()["status"]) == (status, status)
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "fault", [{"fault": "unknown"}, {"fault": "webhook_lost", "tmies": 2}, {"fault": "get_error", "status": 200}]
)
def test_unknown_fault_is_refused(replicate: LocalReplicate, fault: JsonObject) -> None:
    assert httpx.post(f"{replicate.origin}/_control/faults", json=fault).status_code == 422


def test_other_host_name_is_refused(replicate: LocalReplicate) -> None:
    answer = httpx.get(f"{replicate.origin}/_control/record", headers={"host": "evil.example"})
    assert answer.status_code == 400


# Creating and reading


@pytest.mark.parametrize(
    ("path", "version_sent", "version_shown", "deployment"),
    [
        ("/predictions", PAINTER, "hidden", None),
        ("/predictions", version["painter"], version["painter"], None),
        ("/predictions", f"{PAINTER}:{version['painter']}", version["painter"], None),
        ("/models/local/painter/predictions", None, "hidden", None),
        (
            "/deployments/local/painter-deployment/predictions",
            None,
            version["painter"],
            "local/painter-deployment",
        ),
    ],
)
def test_create_in_every_form_gives_a_starting_prediction(
    replicate: LocalReplicate,
    api: httpx.Client,
    path: str,
    version_sent: str | None,
    version_shown: str,
    deployment: str | None,
) -> None:
    replicate.fault("start_late", seconds=3600)
    body: JsonObject = {"input": {"prompt": "a lake"}}
    if version_sent:
        body["version"] = version_sent
    answer = api.post(path, json=body)
    created = answer.json()
    assert answer.status_code == 201
    assert int(answer.headers["ratelimit-remaining"]) == 599
    assert int(answer.headers["ratelimit-reset"]) >= 1
    assert re.fullmatch("[a-z0-9]{26}", created["id"])
    assert {**created, "created_at": "", "urls": {}} == {
        "id": created["id"],
        "model": PAINTER,
        "version": version_shown,
        "input": {"prompt": "a lake"},
        "logs": "",
        "output": None,
        "data_removed": False,
        "error": None,
        "source": "api",
        "status": "starting",
        "created_at": "",
        "urls": {},
        **({"deployment": deployment} if deployment else {}),
    }
    assert created["urls"]["get"] == f"{replicate.url}/predictions/{created['id']}"
    assert api.get(created["urls"]["get"]).json()["id"] == created["id"]


def test_text_to_image_gives_the_same_picture_for_the_same_prompt(api: httpx.Client) -> None:
    one, other = (run(api, "painter", {"prompt": "the sea at dusk", "seed": 4}) for _ in range(2))
    assert (one["status"], one["error"]) == ("succeeded", None)
    assert one["metrics"]["total_time"] >= one["metrics"]["predict_time"] > 0
    assert one["created_at"] < one["started_at"] < one["completed_at"]
    assert "Palette: dusk" in one["logs"]
    file = httpx.get(one["output"])
    assert file.headers["content-type"] == "image/png"
    assert Image.open(BytesIO(file.content)).size == (960, 640)
    assert httpx.get(other["output"]).content == file.content
    assert httpx.get(other["output"], headers={"Range": "bytes=0-3"}).content == file.content[:4]


def test_image_to_image_reads_a_file_url(api: httpx.Client) -> None:
    picture = BytesIO()
    Image.new("RGB", (40, 30), "red").save(picture, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    first = run(api, "etcher", {"image": url, "style": "mosaic"})
    second = run(api, "etcher", {"image": first["output"], "style": "duotone"})
    assert Image.open(BytesIO(httpx.get(second["output"]).content)).size == (40, 30)


def test_files_in_lists_and_objects_are_urls_and_a_data_url_stays(api: httpx.Client) -> None:
    series = run(api, "series", {"count": 2})["output"]
    album = run(api, "album", {"pages": 1})["output"]
    blob = run(api, "blob", {"size_bytes": 3, "name": "a b.png"})["output"]
    urls = [*series, album["cover"], *album["pages"], album["details"]["thumbnails"]["small"], blob]
    assert [httpx.get(url).status_code for url in urls] == [200] * 6
    assert blob.endswith("/a%20b.png")
    assert album["homepage"] == "https://example.com/album.png"
    assert run(api, "blob", {"size_bytes": 3, "as_data_url": True})["output"].startswith("data:application/")
    assert run(api, "series", {"count": 0})["output"] == []


def test_failing_model_gives_error_and_logs_and_the_next_run_works(api: httpx.Client) -> None:
    failed = run(api, "crasher", {"message": "no more blue"})
    assert (failed["status"], failed["error"], failed["output"]) == (
        "failed",
        "RuntimeError: no more blue",
        None,
    )
    assert "Mixing the colours" in failed["logs"]
    assert run(api, "crasher", {"how": "exit"})["error"] == "Worker crashed"
    assert run(api, "crasher", {"message": "again"})["error"] == "RuntimeError: again"


def test_streaming_model_can_be_read_as_events(api: httpx.Client) -> None:
    body = {"version": "local/storyteller", "input": {"prompt": "a fox", "max_tokens": 6}}
    created = api.post("/predictions", json=body).json()
    events = httpx.get(created["urls"]["stream"], headers={"accept": "text/event-stream"}).text
    words = re.findall(r"event: output\ndata: (.*)\n", events)
    assert len(words) == 6
    assert events.rstrip().endswith("event: done\ndata: {}")
    assert "".join(words) == "".join(api.get(created["urls"]["get"]).json()["output"])
    third = re.findall(r"id: (\S+)", events)[2]
    rest = httpx.get(created["urls"]["stream"], headers={"last-event-id": third}).text
    assert events.endswith(rest)
    assert len(re.findall("event:", events)) - len(re.findall("event:", rest)) == 3


def test_wait_that_ends_early_gives_the_running_prediction(api: httpx.Client) -> None:
    # Its process is started by its first prediction, which takes longer than a second on a busy machine.
    api.post("/predictions", json={"version": version["sleeper"], "input": {"seconds": 0}}, headers={"Prefer": "wait"})
    body = {"version": version["sleeper"], "input": {"seconds": 60}}
    answer = api.post("/predictions", json=body, headers={"Prefer": "wait=1"})
    assert answer.headers["preference-applied"] == "wait=1"
    assert answer.json()["status"] == "processing"
    assert api.post(answer.json()["urls"]["cancel"]).status_code == 200
    assert until(lambda: status_of(api, answer.json()) == "canceled")
    assert api.post(answer.json()["urls"]["cancel"]).json()["status"] == "canceled"


def test_cancel_before_the_start_ends_it_at_once(replicate: LocalReplicate, api: httpx.Client) -> None:
    replicate.fault("start_late", seconds=3600)
    created = api.post("/predictions", json={"version": PAINTER, "input": {"prompt": "x"}}).json()
    canceled = api.post(created["urls"]["cancel"]).json()
    assert canceled["status"] == "canceled"
    assert "started_at" not in canceled


@pytest.mark.slow
def test_deadline_cancels_what_runs_and_aborts_what_has_not_started(
    replicate: LocalReplicate, api: httpx.Client
) -> None:
    replicate.fault("start_late", seconds=3600, model=PAINTER)
    headers = {"Cancel-After": "5s"}
    waiting = api.post("/predictions", json={"version": PAINTER, "input": {"prompt": "x"}}, headers=headers)
    sleeping = {"version": version["sleeper"], "input": {"seconds": 60}}
    running = api.post("/predictions", json=sleeping, headers=headers | {"Prefer": "wait"})
    assert running.json()["status"] == "canceled"
    assert running.json()["deadline"] <= running.json()["completed_at"]
    assert until(lambda: status_of(api, waiting.json()) == "aborted")


TEXT = "data:text/plain,the%20sea%20is%20deep%20and%20the%20sea%20is%20calm"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"input": {"train_data": TEXT}}, 422),
        ({"destination": "local/nothing", "input": {"train_data": TEXT}}, 422),
        ({"destination": "local/tuner", "input": {}}, 422),
        ({"destination": "local/tuner", "input": {"train_data": "/etc/passwd"}}, 422),
        ({"destination": "local/tuner", "input": {"train_data": TEXT}, "stream": True}, 422),
    ],
)
def test_bad_training_is_refused(api: httpx.Client, body: JsonObject, status: int) -> None:
    assert api.post(f"/models/local/tuner/versions/{version['tuner']}/trainings", json=body).status_code == status
    assert api.post(f"/models/local/painter/versions/{version['painter']}/trainings", json=body).status_code == 404


def test_training_gives_a_version_and_weights_that_the_model_runs_with(
    api: httpx.Client, receiver: Receiver, replicate: LocalReplicate
) -> None:
    body = {"destination": "local/tuner", "input": {"train_data": TEXT}, "webhook": receiver.url}
    created = api.post(f"/models/local/tuner/versions/{version['tuner']}/trainings", json=body)
    assert created.status_code == 201
    path = f"/trainings/{created.json()['id']}"
    assert created.json()["urls"]["get"] == f"{replicate.url}{path}"
    replicate.wait_for_webhook(created.json()["id"])
    training = api.get(path).json()
    assert training["status"] == "succeeded", training["error"]
    assert training["output"]["version"].startswith("local/tuner:")
    assert "Epoch 3 of 3" in training["logs"]
    weights = training["output"]["weights"]
    assert httpx.get(weights, trust_env=False).json()["sea"] == {"is": 6}
    ran = run(api, "tuner", {"weights": weights, "words": 4})
    assert len(ran["output"].split()) == 4
    assert api.get(path.replace("trainings", "predictions")).status_code == 404
    assert training["id"] in [each["id"] for each in api.get("/trainings").json()["results"]]
    assert training["id"] not in [each["id"] for each in api.get("/predictions").json()["results"]]


def test_models_versions_and_deployments_can_be_read(api: httpx.Client) -> None:
    painter, etcher = (api.get(f"/models/local/{name}").json() for name in ("painter", "etcher"))
    assert (painter["is_official"], etcher["is_official"]) == (True, False)
    latest = etcher["latest_version"]
    assert latest["id"] == version["etcher"]
    assert api.get(f"/models/local/etcher/versions/{latest['id']}").json() == latest
    assert api.get("/models/local/etcher/versions").json()["results"] == [latest]
    schemas = latest["openapi_schema"]["components"]["schemas"]
    assert schemas["Input"]["required"] == ["image"]
    assert schemas["Output"] == {"title": "Output", "type": "string", "format": "uri"}
    assert len(api.get("/models").json()["results"]) == len(models)
    deployment = api.get("/deployments/local/painter-deployment").json()
    assert deployment["current_release"]["version"] == version["painter"]
    assert api.get("/deployments").json()["results"] == [deployment]
    assert isinstance(api.get("/hardware").json(), list)
    assert api.get("/account").json()["username"] == "local"


DEPLOYMENT = {
    "name": "harbour",
    "model": "local/etcher",
    "version": version["etcher"],
    "hardware": "gpu-t4",
    "min_instances": 0,
    "max_instances": 2,
}
MODEL = {"owner": "local", "name": "sketch", "visibility": "private", "hardware": "cpu"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/deployments", DEPLOYMENT | {"version": version["painter"]}, 422),
        ("POST", "/deployments", DEPLOYMENT | {"max_instances": 21}, 422),
        ("POST", "/deployments", DEPLOYMENT | {"hardware": "abacus"}, 422),
        ("POST", "/deployments", DEPLOYMENT | {"name": "Not A Name"}, 422),
        ("POST", "/deployments", DEPLOYMENT | {"owner": "local"}, 422),
        ("POST", "/deployments", DEPLOYMENT | {"name": "painter-deployment"}, 409),
        ("PATCH", "/deployments/local/painter-deployment", {"version": version["etcher"]}, 422),
        ("PATCH", "/deployments/local/painter-deployment", {"name": "other"}, 422),
        ("POST", "/models", MODEL | {"owner": "somebody"}, 403),
        ("POST", "/models", MODEL | {"name": "painter"}, 409),
        ("POST", "/models", MODEL | {"visibility": "secret"}, 422),
        ("PATCH", "/models/local/painter", {"name": "other"}, 422),
    ],
)
def test_bad_change_is_refused_and_changes_nothing(
    api: httpx.Client, method: str, path: str, body: JsonObject, status: int
) -> None:
    def everything() -> list[Any]:
        return [api.get(path).json() for path in ("/deployments", "/models", "/models/local/relic")]

    before = everything()
    answer = api.request(method, path, json=body)
    assert (answer.status_code, answer.json()["status"]) == (status, status)
    assert everything() == before


def test_deployment_is_made_changed_run_and_deleted_until_a_reset(replicate: LocalReplicate, api: httpx.Client) -> None:
    made = api.post("/deployments", json=DEPLOYMENT)
    release = made.json()["current_release"]
    assert (made.status_code, made.json()["owner"], release["number"]) == (200, "local", 1)
    assert release["configuration"] == {"hardware": "gpu-t4", "min_instances": 0, "max_instances": 2}
    assert api.post("/deployments", json=DEPLOYMENT).status_code == 409
    changed = api.patch("/deployments/local/harbour", json={"max_instances": 5}).json()["current_release"]
    assert (changed["number"], changed["version"]) == (2, version["etcher"])
    assert changed["configuration"] == {"hardware": "gpu-t4", "min_instances": 0, "max_instances": 5}
    assert api.get("/deployments/local/harbour").json()["current_release"] == changed
    refused = api.post("/deployments/local/harbour/predictions", json={"input": {}})
    assert (refused.status_code, "image" in refused.json()["detail"]) == (422, True)
    deleted = api.delete("/deployments/local/harbour")
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert api.get("/deployments/local/harbour").status_code == 404
    assert api.delete("/deployments/local/painter-deployment").status_code == 204
    replicate.reset()
    assert [each["name"] for each in api.get("/deployments").json()["results"]] == ["painter-deployment"]


def test_model_is_made_changed_and_deleted(api: httpx.Client) -> None:
    made = api.post("/models", json=MODEL | {"description": "Draws."})
    assert made.status_code == 201
    assert (made.json()["description"], made.json()["latest_version"]) == ("Draws.", None)
    assert api.get("/models/local/sketch/readme").status_code == 404
    changed = api.patch("/models/local/sketch", json={"readme": "# Füchse", "paper_url": "https://arxiv.org/abs/1"})
    assert (changed.status_code, changed.json()["paper_url"]) == (200, "https://arxiv.org/abs/1")
    assert changed.json()["description"] == "Draws."
    readme = api.get("/models/local/sketch/readme")
    assert (readme.text, readme.headers["content-type"]) == ("# Füchse", "text/plain; charset=utf-8")
    assert "sketch" not in {model["name"] for model in api.get("/models").json()["results"]}, "it is private"
    assert api.delete("/models/local/sketch").status_code == 204
    assert api.get("/models/local/sketch").status_code == 404


def test_version_of_a_private_model_can_be_deleted_and_then_the_model(api: httpx.Client) -> None:
    [pushed] = api.get("/models/local/relic/versions").json()["results"]
    path = f"/models/local/relic/versions/{pushed['id']}"
    assert api.get(path).json() == pushed == api.get("/models/local/relic").json()["latest_version"]
    deleted = api.delete(path)
    assert (deleted.status_code, deleted.content) == (202, b"")
    assert api.get(path).status_code == 404
    assert api.get("/models/local/relic").json()["latest_version"] is None
    assert api.delete("/models/local/relic").status_code == 204


def test_collections_examples_and_search_can_be_read(api: httpx.Client) -> None:
    listed = api.get("/collections").json()["results"]
    assert {"text-to-image", "language-models"} <= {collection["slug"] for collection in listed}
    held = api.get("/collections/text-to-image").json()
    assert [model["name"] for model in held["models"]] == ["painter", "series"]
    [example] = api.get("/models/local/painter/examples").json()["results"]
    assert api.get("/models/local/painter").json()["default_example"] == example
    assert (example["status"], example["version"]) == ("succeeded", version["painter"])
    assert api.get("/models/local/sleeper/examples").json()["results"] == []
    found = api.get("/search", params={"query": "TEXT image"}).json()
    assert {each["model"]["name"] for each in found["models"]} == {"painter"}
    assert [collection["slug"] for collection in found["collections"]] == ["text-to-image"]
    assert len(api.get("/search", params={"query": "local", "limit": 2}).json()["models"]) == 2
    for query in ("", "query=", "query=x&limit=51", "query=x&limit=all"):
        assert api.get(f"/search?{query}").status_code == 400


def test_other_routes_can_fail_break_off_and_be_silent(replicate: LocalReplicate, api: httpx.Client) -> None:
    replicate.fault("other_error", status=402, path="/account")
    assert api.get("/hardware").status_code == 200
    assert api.get("/account").status_code == 402
    assert api.get("/account").status_code == 200
    replicate.fault("other_error", path="/deployments")
    assert api.post("/deployments", json=DEPLOYMENT).status_code == 500
    assert api.get("/deployments/local/harbour").status_code == 404
    replicate.fault("other_reset")
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        api.get("/account")
    replicate.fault("other_silence")
    with pytest.raises(httpx.ReadTimeout):
        api.get("/account", timeout=0.5)
    replicate.fault("other_error", times=None)
    assert api.get("/predictions").status_code == 200


def test_list_has_pages_of_100_newest_first_with_absolute_urls(replicate: LocalReplicate, api: httpx.Client) -> None:
    replicate.fault("start_late", times=None, seconds=3600)
    body = {"version": PAINTER, "input": {"prompt": "x"}}
    made = [api.post("/predictions", json=body).json() for _ in range(102)]
    first = api.get("/predictions", params={"created_after": made[0]["created_at"]}).json()
    assert [item["id"] for item in first["results"]] == [item["id"] for item in reversed(made[2:])]
    assert first["previous"] is None
    assert first["next"].startswith(f"{replicate.url}/predictions?")
    second = api.get(first["next"]).json()
    assert [item["id"] for item in second["results"]] == [made[1]["id"], made[0]["id"]]
    assert second["next"] is None
    assert api.get(second["previous"]).json()["results"] == first["results"]
    newest = {"created_after": made[0]["created_at"], "created_before": made[1]["created_at"]}
    assert [item["id"] for item in api.get("/predictions", params=newest).json()["results"]] == [made[0]["id"]]
    replicate.settings(list_lag_seconds=3600)
    assert api.get("/predictions").json()["results"] == []


def test_data_is_removed_when_its_time_has_come(replicate: LocalReplicate, api: httpx.Client) -> None:
    done = run(api, "blob", {})
    assert httpx.get(done["output"]).status_code == 200
    replicate.settings(removal_seconds=0)
    removed = api.get(done["urls"]["get"]).json()
    assert (removed["status"], removed["data_removed"]) == ("succeeded", True)
    assert (removed["input"], removed["output"], removed["logs"]) == ({}, None, "")
    assert httpx.get(done["output"]).status_code == 404


# Webhooks


@pytest.mark.parametrize(("secret", "webhook_id", "timestamp", "body", "expected"), WEBHOOK_VECTORS)
def test_signature_is_the_one_of_standard_webhooks(
    secret: str, webhook_id: str, timestamp: int, body: bytes, expected: str
) -> None:
    assert signature(secret, webhook_id, timestamp, body) == expected


def test_webhooks_are_signed_and_carry_the_prediction(
    replicate: LocalReplicate, api: httpx.Client, receiver: Receiver
) -> None:
    done = run(api, "blob", {}, webhook=receiver.url, webhook_events_filter=["start", "completed"])
    _, started = receiver.next()
    assert (started["id"], started["status"], started["output"]) == (done["id"], "processing", None)
    headers, body = receiver.received.get(timeout=60)
    assert json.loads(body) == api.get(done["urls"]["get"]).json()
    key = base64.b64decode(replicate.signing_secret.removeprefix("whsec_"))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert abs(time.time() - int(headers["webhook-timestamp"])) < 10
    assert until(lambda: len(attempts(replicate, done)) == 2)
    sent = [(entry["event"], entry["url"], entry["answer"]) for entry in attempts(replicate, done)]
    assert sent == [("start", receiver.url, 200), ("completed", receiver.url, 200)]


def test_all_events_are_sent_without_a_filter(api: httpx.Client, receiver: Receiver, replicate: LocalReplicate) -> None:
    done = run(api, "series", {"count": 2, "delay_seconds": 0.6}, webhook=receiver.url)
    replicate.wait_for_webhook(done["id"])
    events = [entry["event"] for entry in attempts(replicate, done)]
    assert (events[0], events[-1]) == ("start", "completed")
    assert (events.count("output"), events.count("logs")) == (2, 2)


@pytest.mark.parametrize(("statuses", "count"), [([500, 404], 3), ([302], 1)])
def test_terminal_webhook_alone_is_tried_again_with_the_same_id(
    replicate: LocalReplicate, api: httpx.Client, receiver: Receiver, statuses: list[int], count: int
) -> None:
    replicate.settings(webhook_retry_seconds=1)
    receiver.statuses = [500, *statuses]
    done = run(api, "blob", {}, webhook=receiver.url, webhook_events_filter=["start", "completed"])
    _, started = receiver.next()
    ids = {receiver.next()[0]["webhook-id"] for _ in range(count)}
    assert started["status"] == "processing"
    assert len(ids) == 1
    assert until(lambda: len(attempts(replicate, done)) == count + 1)
    assert [entry["attempt"] for entry in attempts(replicate, done)] == [1, *range(1, count + 1)]


def test_terminal_webhook_is_given_up_when_its_time_is_over(
    replicate: LocalReplicate, api: httpx.Client, receiver: Receiver
) -> None:
    replicate.settings(webhook_retry_seconds=0)
    receiver.statuses = [503] * 9
    done = run(api, "blob", {}, webhook=receiver.url, webhook_events_filter=["completed"])
    assert until(lambda: [entry["answer"] for entry in attempts(replicate, done)] == [503] * 7)


@pytest.mark.parametrize(
    ("fault", "statuses"),
    [
        ({"name": "webhook_lost", "events": ["completed"]}, ["processing"]),
        ({"name": "webhook_lost", "events": ["start"]}, ["succeeded"]),
        ({"name": "webhook_duplicated", "events": ["completed"]}, ["processing", "succeeded", "succeeded"]),
        ({"name": "webhook_reordered", "events": ["start"]}, ["succeeded", "processing"]),
        ({"name": "webhook_late", "events": ["start"], "seconds": 0.5}, ["succeeded", "processing"]),
    ],
)
def test_webhook_fault_does_what_it_says(
    replicate: LocalReplicate, api: httpx.Client, receiver: Receiver, fault: JsonObject, statuses: list[str]
) -> None:
    replicate.fault(webhook="for=ours", **fault)
    done = run(api, "blob", {}, webhook=receiver.url, webhook_events_filter=["start", "completed"])
    assert receiver.statuses_received(len(statuses)) == statuses
    assert status_of(api, done) == "succeeded"
    assert until(lambda: len(attempts(replicate, done)) == len(statuses))
    assert receiver.received.empty()


def test_release_ends_what_faults_hold_up(replicate: LocalReplicate, api: httpx.Client, receiver: Receiver) -> None:
    replicate.fault("start_late", seconds=3600)
    replicate.fault("webhook_late", seconds=3600, events=["completed"])
    replicate.fault("get_error", times=None)
    body = {"version": version["sleeper"], "input": {"seconds": 0}, "webhook": receiver.url}
    prediction = api.post("/predictions", json={**body, "webhook_events_filter": ["completed"]}).json()
    path = f"/predictions/{prediction['id']}"
    assert api.get(path).status_code == 500
    replicate.release()
    assert receiver.next()[1]["status"] == "succeeded"
    assert api.get(path).json()["status"] == "succeeded"


def test_signing_secret_can_be_changed(replicate: LocalReplicate) -> None:
    secret = f"whsec_{base64.b64encode(b'another secret of 24 byt').decode()}"
    before = replicate.signing_secret
    replicate.settings(signing_secret=secret)
    assert replicate.signing_secret == secret
    replicate.reset()
    assert replicate.signing_secret == before


# Faults


def create(api: httpx.Client, **headers: str) -> httpx.Response:
    return api.post("/predictions", json={"version": version["blob"], "input": {}}, headers=headers)


def test_throttled_create_makes_nothing(replicate: LocalReplicate, api: httpx.Client) -> None:
    replicate.fault("create_throttled", retry_after_seconds=7)
    replicate.fault("create_throttled", retry_after_seconds=2, header=True, body_field=True)
    plain, told, third = create(api), create(api), create(api)
    assert (plain.status_code, told.status_code, third.status_code) == (429, 429, 201)
    assert plain.json() == {"detail": "Request was throttled. Your rate limit resets in ~7s."}
    assert "retry-after" not in plain.headers
    assert (told.headers["retry-after"], told.json()["retry_after"]) == ("2", 2)
    assert [request["prediction"] for request in replicate.creates()] == [None, None, third.json()["id"]]


def test_rate_limit_is_a_token_bucket(replicate: LocalReplicate, api: httpx.Client) -> None:
    replicate.settings(creates_per_minute=1)
    allowed, refused = create(api), create(api)
    assert (allowed.status_code, allowed.headers["ratelimit-remaining"]) == (201, "0")
    assert (refused.status_code, refused.headers["ratelimit-remaining"]) == (429, "0")
    assert re.fullmatch(r"Request was throttled\. Your rate limit resets in ~\d+s\.", refused.json()["detail"])
    assert api.get("/predictions").status_code == 200


def test_bucket_fills_up_again_with_time() -> None:
    now = [0.0]
    bucket = Bucket(6, clock=lambda: now[0])
    assert [bucket.take()[0] for _ in range(7)] == [True] * 6 + [False]
    assert bucket.take() == (False, 0, 10)
    now[0] = 10.0
    assert bucket.take() == (True, 0, 10)
    now[0] = 1000.0
    assert bucket.take() == (True, 5, 10)


@pytest.mark.parametrize(("name", "made"), [("create_refused", 0), ("create_accepted_then_error", 1)])
def test_create_error_comes_before_or_after_the_prediction_is_made(
    replicate: LocalReplicate, api: httpx.Client, name: str, made: int
) -> None:
    before = len(replicate.record()["predictions"])
    replicate.fault(name, status=502)
    assert create(api).status_code == 502
    assert len(replicate.record()["predictions"]) == before + made
    assert create(api).status_code == 201


@pytest.mark.parametrize("name", ["create_accepted_then_reset", "create_accepted_then_silence"])
def test_lost_answer_leaves_a_prediction_behind(replicate: LocalReplicate, api: httpx.Client, name: str) -> None:
    replicate.fault(name)
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError, httpx.ReadTimeout)) as caught:
        api.post("/predictions", json={"version": version["blob"], "input": {}}, timeout=0.5)
    assert isinstance(caught.value, httpx.ReadTimeout) == (name == "create_accepted_then_silence")
    (request,) = replicate.creates()
    assert (request["status"], request["fault"]) == (None, name)
    assert until(lambda: status_of(api, {"id": request["prediction"]}) == "succeeded")


@pytest.mark.parametrize("name", ["create_reset", "create_silence"])
def test_lost_create_leaves_nothing_behind(replicate: LocalReplicate, api: httpx.Client, name: str) -> None:
    before = len(replicate.record()["predictions"])
    replicate.fault(name)
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError, httpx.ReadTimeout)) as caught:
        api.post("/predictions", json={"version": version["blob"], "input": {}}, timeout=0.5)
    assert isinstance(caught.value, httpx.ReadTimeout) == (name == "create_silence")
    assert len(replicate.record()["predictions"]) == before
    assert create(api).status_code == 201


def test_answer_can_come_after_the_webhook(replicate: LocalReplicate, api: httpx.Client, receiver: Receiver) -> None:
    replicate.fault("create_answer_late", until_webhook=True)
    body = {"version": version["blob"], "input": {}, "webhook": receiver.url}
    answer = api.post("/predictions", json=body | {"webhook_events_filter": ["completed"]})
    assert answer.json()["status"] == "succeeded"
    assert not receiver.received.empty()


def test_waiting_create_can_be_answered_with_data_urls(replicate: LocalReplicate, api: httpx.Client) -> None:
    replicate.fault("create_data_urls")
    answered = create(api, Prefer="wait").json()
    assert answered["status"] == "processing"
    read = api.get(answered["urls"]["get"]).json()
    content = base64.b64encode(httpx.get(read["output"]).content).decode()
    assert answered["output"] == f"data:application/octet-stream;base64,{content}"


def test_reads_and_cancels_can_fail(replicate: LocalReplicate, api: httpx.Client) -> None:
    created = create(api).json()
    replicate.fault("get_error", status=404)
    replicate.fault("list_error", status=503)
    replicate.fault("cancel_error", model="local/painter")
    replicate.fault("cancel_error", times=2)
    urls = created["urls"]
    assert [api.get(urls["get"]).status_code for _ in range(2)] == [404, 200]
    assert [api.get("/predictions").status_code for _ in range(2)] == [503, 200]
    assert [api.post(urls["cancel"]).status_code for _ in range(3)] == [500, 500, 200]
    left = httpx.get(f"{replicate.origin}/_control/faults").json()["faults"]
    assert left == [{"fault": "cancel_error", "model": "local/painter", "times": 1}]


def test_files_can_break(replicate: LocalReplicate, api: httpx.Client) -> None:
    url = run(api, "blob", {"size_bytes": 500_000})["output"]
    replicate.fault("file_error", status=503)
    assert [httpx.get(url).status_code for _ in range(2)] == [503, 200]
    replicate.fault("file_truncated", share=0.25)
    with httpx.stream("GET", url) as answer:
        parts = answer.iter_raw(chunk_size=1000)
        assert answer.headers["content-length"] == "500000"
        assert sum(len(next(parts)) for _ in range(125)) == 125_000
        with pytest.raises(httpx.RemoteProtocolError):
            next(parts)
    replicate.fault("file_redirected", location="http://127.0.0.1:1/")
    assert httpx.get(url).headers["location"] == "http://127.0.0.1:1/"
    replicate.fault("file_slow", bytes_per_second=5_000_000)
    assert len(httpx.get(url).content) == 500_000


# The record, and the end


def test_record_counts_without_keeping_the_token(replicate: LocalReplicate, api: httpx.Client) -> None:
    body = {"version": version["blob"], "input": {}, "webhook": "http://127.0.0.1:1/webhooks/abc"}
    body |= {"webhook_events_filter": ["start"], "input": {"note": "x" * 100_000}}
    done = api.post("/predictions", json=body, headers={"Prefer": "wait"}).json()
    failed = replicate.wait_for_webhook(done["id"], "start")
    api.post("/predictions", json={"version": "x" * 64, "input": {}})
    httpx.get(f"{replicate.url}/predictions", headers={"Authorization": "Bearer r8_stolen"})
    record = replicate.record()
    assert [(entry["status"], entry["authorization"]) for entry in record["requests"]] == [
        (201, "valid"),
        (422, "valid"),
        (401, "wrong"),
    ]
    (counted,) = replicate.creates("/abc")
    assert counted["headers"]["prefer"] == "wait"
    assert counted["body"]["input"].keys() == {"too_large_to_record_bytes"}
    assert (failed["answer"], failed["error"]) == (None, "ConnectError")
    assert replicate.token not in json.dumps(record)
    assert "r8_stolen" not in json.dumps(record)


def processes() -> dict[int, tuple[int, str]]:
    """The parent and the state of every process."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True)  # noqa: S607
    return {int(pid): (int(parent), state) for pid, parent, state in map(str.split, table.stdout.splitlines())}


def children(pid: int) -> set[int]:
    direct = {child for child, (parent, _) in processes().items() if parent == pid}
    return direct.union(*(children(child) for child in direct))


def alive(pid: int) -> bool:
    _, state = processes().get(pid, (0, "Z"))
    return not state.startswith("Z")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_end_of_the_front_ends_its_cog_servers(how: signal.Signals) -> None:
    with LocalReplicate() as replicate:
        body = {"version": version["blob"], "input": {}}
        headers = replicate.headers | {"Prefer": "wait"}
        assert httpx.post(f"{replicate.url}/predictions", json=body, headers=headers).status_code == 201
        assert replicate.pid is not None
        started = children(replicate.pid)
        assert len(started) >= 2
        os.kill(replicate.pid, how)
        assert until(lambda: not any(alive(pid) for pid in started))


def test_end_of_the_parent_ends_the_front(tmp_path: Path) -> None:
    parent = subprocess.Popen(  # noqa: S603 - our own command line
        [
            sys.executable,
            "-c",
            "import subprocess, sys; subprocess.run([sys.executable, '-m', 'local.replicate', *sys.argv[1:]])",
            f"--state-dir={tmp_path}",
        ],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        url = json.loads(parent.stdout.readline())["url"]
        assert httpx.get(url).status_code == 404
        (front,) = children(parent.pid)
        parent.kill()
    assert until(lambda: not alive(front))


def test_schema_of_an_unknown_type_is_refused_by_name(tmp_path: Path) -> None:
    predictor = tmp_path / "predict.py"
    predictor.write_text("class Predictor:\n    def run(self, when: complex) -> str: ...\n")
    with pytest.raises(TypeError, match="complex"):
        openapi_schema(predictor)
