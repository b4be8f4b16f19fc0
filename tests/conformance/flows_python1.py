"""The real flows of the official Python client 1, unmodified, against a deployed stack.

Variables and output are those of flows.mjs: ``API_URL``, ``ACCESS_TOKEN``, ``WEAK_TOKEN``; one line of JSON for a flow.
"""

import base64
import hashlib
import io
import json
import os
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
from replicate.client import Client
from replicate.exceptions import ModelError, ReplicateError
from replicate.pagination import paginate
from replicate.webhook import InvalidSignatureError, Webhooks

API_URL, ACCESS_TOKEN, WEAK_TOKEN = (os.environ[name] for name in ("API_URL", "ACCESS_TOKEN", "WEAK_TOKEN"))
NOT_OFFERED = "–"  # noqa: RUF001 - what the table shows
TEXT = b"the sea is calm and the sea is deep and the night is calm and the night is long"
DEPLOYMENT = {"model": "local/painter", "hardware": "gpu-t4", "min_instances": 0, "max_instances": 2}

# This version adds /v1 itself.
BASE_URL = API_URL.removesuffix("/v1")
client = Client(api_token=ACCESS_TOKEN, base_url=BASE_URL)
flows = {}


def flow(function):
    """Adds a flow; what it returns is in what it differs."""
    flows[function.__name__] = function
    return function


def version_of(name):
    return client.models.get("local", name).latest_version.id


def fetched(url):
    answer = httpx.get(str(url), follow_redirects=True)
    assert answer.status_code == 200, f"{url} is answered {answer.status_code}"
    return answer.content


def picture(url):
    # On AWS a FileOutput; the local cloud's URLs are http, which this client leaves as text.
    data = fetched(getattr(url, "url", url))
    assert data[1:4] == b"PNG", f"{url} is no PNG"
    return data


def painted():
    return picture(client.run("local/painter", input={"prompt": "a fox"}))


def refusal(status, function, *arguments, **named):
    error = raised(ReplicateError, function, *arguments, **named)
    assert error.status == status, error
    return error


def raised(kind, function, *arguments, **named):
    try:
        function(*arguments, **named)
    except kind as error:
        return error
    raise AssertionError("it did not fail")


def ended(get, *which):
    deadline = time.monotonic() + 60
    while (found := get(*which)).status not in ("succeeded", "failed", "canceled"):
        assert time.monotonic() < deadline, "it did not end within 60 s"
        time.sleep(0.3)
    return found


def waited(prediction):
    prediction.wait()
    return prediction


def slept(**input_):
    return client.models.predictions.create(("local", "sleeper"), input_)


@flow
def run_file():
    painted()


@flow
def run_text():
    words = client.run("local/storyteller", input={"prompt": "a fox", "max_tokens": 12})
    assert len("".join(words).split()) == 12


@flow
def run_list():
    files = list(client.run("local/series", input={"count": 3}))
    assert len({hashlib.sha256(picture(file)).hexdigest() for file in files}) == 3


@flow
def run_nested():
    album = client.run("local/album", input={"title": "Foxes", "pages": 2})
    assert album["title"] == "Foxes"
    assert album["details"]["colours"] == ["sand", "umber"]
    for file in (album["cover"], *album["pages"]):
        picture(file)
    assert fetched(album["details"]["thumbnails"]["small"])[:2] == b"\xff\xd8"


@flow
def run_by_version():
    version = version_of("sleeper")
    assert client.run(f"local/sleeper:{version}", input={"seconds": 0, "text": "by version"}) == "by version"


@flow
def run_polling():
    assert client.run("local/sleeper", wait=False, input={"seconds": 1}) == "slept well"


@flow
def run_longer_than_wait():
    assert client.run("local/sleeper", wait=1, input={"seconds": 4}) == "slept well"


@flow
def run_failed():
    error = raised(ModelError, client.run, "local/crasher", input={"message": "no paint"})
    assert "no paint" in str(error), str(error)


@flow
def run_aborted():
    return NOT_OFFERED


@flow
def run_file_object():
    picture(client.run("local/etcher", input={"image": io.BytesIO(painted()), "style": "mosaic"}))


@flow
def file_as_input():
    file = client.files.create(io.BytesIO(painted()), filename="fox.png")
    picture(client.run("local/etcher", input={"image": file.urls["get"], "style": "duotone"}))


@flow
def progress():
    created = client.models.predictions.create(("local", "series"), {"count": 3, "delay_seconds": 1})
    seen = [created.status]
    while created.status not in ("succeeded", "failed", "canceled"):
        time.sleep(0.2)
        created.reload()
        seen.append(created.status)
    assert (seen[0], seen[-1]) == ("starting", "succeeded")
    assert "processing" in seen
    assert "Picture 3 of 3" in created.logs


@flow
def stream():
    events = list(client.stream("local/storyteller", input={"prompt": "a fox", "max_tokens": 12}))
    assert events[-1].event.value == "done"
    assert len("".join(str(event) for event in events if event.event.value == "output").split()) == 12
    return "from Replicate's own address, not through the stack"


@flow
def create_by_version_id():
    version = version_of("sleeper")
    created = client.predictions.create(version=version, input={"seconds": 0, "text": "by id"})
    assert created.version == version
    assert waited(created).output == "by id"


@flow
def create_by_model():
    created = slept(seconds=1)
    assert (created.model, created.urls["get"]) == ("local/sleeper", f"{API_URL}/predictions/{created.id}")
    assert waited(created).output == "slept well"


@flow
def create_by_owner_and_name():
    created = client.predictions.create(version="local/sleeper", input={"seconds": 0})
    assert waited(created).output == "slept well"


@flow
def create_without_waiting():
    began = time.monotonic()
    created = slept(seconds=30)
    assert created.status == "starting"
    assert time.monotonic() - began < 15, "it was waited for"
    client.predictions.cancel(created.id)


@flow
def create_and_wait():
    created = client.predictions.create(version="local/sleeper", input={"seconds": 1}, wait=20)
    assert (created.status, created.output) == ("succeeded", "slept well")


@flow
def predictions_get():
    created = client.predictions.create(version="local/painter", input={"prompt": "a fox"})
    waited(created)
    found = client.predictions.get(created.id)
    assert (found.id, found.status, found.input) == (created.id, "succeeded", {"prompt": "a fox"})
    assert found.created_at <= found.started_at <= found.completed_at
    picture(found.output)


@flow
def predictions_list():
    created = slept(seconds=0)
    assert created.id in [prediction.id for prediction in client.predictions.list().results]


@flow
def predictions_paginate():
    # A page is cut where an answer would be larger than Lambda's: three of these are never on one.
    made = []
    for _ in range(3):
        created = slept(seconds=0, text="fox " * 600_000)
        made.append(waited(created).id)
    pages = [[prediction.id for prediction in page.results] for page in paginate(client.predictions.list)]
    assert len(pages) > 1, "there was one page only"
    listed = [each for page in pages for each in page]
    assert len(set(listed)) == len(listed)
    assert [each for each in listed if each in made] == made[::-1]


@flow
def predictions_cancel():
    created = slept(seconds=60)
    client.predictions.cancel(created.id)
    assert ended(client.predictions.get, created.id).status == "canceled"


@flow
def models_get():
    model = client.models.get("local", "painter")
    assert (model.owner, model.name, model.visibility) == ("local", "painter", "public")
    example = model.default_example
    assert example.urls["get"] == f"{API_URL}/predictions/{example.id}"


@flow
def models_list():
    assert {"painter", "sleeper"} <= {model.name for page in paginate(client.models.list) for model in page.results}


@flow
def models_search():
    refusal(404, client.models.search, "lighthouse")
    return "404: sends the method QUERY, which API Gateway does not know; use `GET /search`"


@flow
def models_create():
    made = client.models.create("local", "sketch-py1", visibility="private", hardware="cpu")
    assert (made.owner, made.name, made.visibility) == ("local", "sketch-py1", "private")
    client.models.delete("local/sketch-py1")


@flow
def models_delete():
    client.models.create("local", "gone-py1", visibility="private", hardware="cpu")
    assert client.models.delete("local/gone-py1")
    refusal(404, client.models.get, "local/gone-py1")


@flow
def models_versions_list():
    versions = client.models.get("local/painter").versions.list().results
    assert [version.id for version in versions] == [version_of("painter")]


@flow
def models_versions_get():
    version = version_of("painter")
    found = client.models.get("local/painter").versions.get(version)
    assert found.id == version
    assert "prompt" in found.openapi_schema["components"]["schemas"]["Input"]["properties"]


@flow
def models_examples():
    assert not hasattr(client.models, "examples")
    return NOT_OFFERED


@flow
def models_readme():
    assert not hasattr(client.models, "readme")
    return NOT_OFFERED


@flow
def collections_list():
    assert "text-to-image" in [collection.slug for collection in client.collections.list().results]


@flow
def collections_get():
    models = client.collections.get("text-to-image").models
    assert "painter" in [model.name for model in models]


@flow
def hardware_list():
    assert "cpu" in [hardware.sku for hardware in client.hardware.list()]


@flow
def account_get():
    account = client.accounts.current()
    assert (account.type, account.username) == ("user", "local")


def deploy(name):
    return client.deployments.create(**DEPLOYMENT, name=f"py1-{name}", version=version_of("painter"))


def undeploy(name):
    assert client.deployments.delete("local", f"py1-{name}")


@flow
def deployments_create():
    release = deploy("create").current_release
    assert (release.number, release.configuration.hardware) == (1, "gpu-t4")
    undeploy("create")


@flow
def deployments_get():
    made = deploy("get")
    found = client.deployments.get("local/py1-get")
    assert found.dict() == made.dict()
    undeploy("get")


@flow
def deployments_list():
    assert "painter-deployment" in [deployment.name for deployment in client.deployments.list().results]


@flow
def deployments_update():
    deploy("update")
    changed = client.deployments.update("local", "py1-update", max_instances=5)
    assert (changed.current_release.number, changed.current_release.configuration.max_instances) == (2, 5)
    undeploy("update")


@flow
def deployments_delete():
    deploy("delete")
    undeploy("delete")
    refusal(404, client.deployments.get, "local/py1-delete")


@flow
def deployments_predictions_create():
    deployment = client.deployments.get("local/painter-deployment")
    picture(waited(deployment.predictions.create({"prompt": "a fox"})).output)


def train(**more):
    data = "data:text/plain;base64," + base64.b64encode(TEXT).decode()
    version = f"local/tuner:{version_of('tuner')}"
    return client.trainings.create(version=version, input={"train_data": data, **more}, destination="local/tuner")


@flow
def trainings_create():
    found = ended(client.trainings.get, train().id)
    assert found.status == "succeeded", found.error
    assert found.output["version"].startswith("local/tuner:")
    assert fetched(found.output["weights"])


@flow
def trainings_get():
    training = train()
    found = client.trainings.get(training.id)
    assert (found.id, found.urls["get"]) == (training.id, f"{API_URL}/trainings/{training.id}")


@flow
def trainings_list():
    assert train().id in [training.id for training in client.trainings.list().results]


@flow
def trainings_cancel():
    training = train(seconds=60)
    client.trainings.cancel(training.id)
    assert ended(client.trainings.get, training.id).status == "canceled"


def upload(content):
    return client.files.create(io.BytesIO(content), filename="fox.txt", metadata={"take": 2})


@flow
def files_create():
    file = upload(b"fox one")
    assert (file.name, file.size, file.metadata) == ("fox.txt", 7, {"take": 2})
    assert file.checksums["sha256"] == hashlib.sha256(b"fox one").hexdigest()
    assert fetched(file.urls["get"]) == b"fox one"


@flow
def files_get():
    file = upload(b"fox two")
    assert client.files.get(file.id) == file


@flow
def files_list():
    assert upload(b"fox three").id in [file.id for file in client.files.list()]


@flow
def files_delete():
    file = upload(b"fox four")
    assert client.files.delete(file.id)
    assert httpx.get(file.urls["get"]).status_code == 404


@flow
def webhooks():
    received = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            received.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    secret = client.webhooks.default.secret()
    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        created = client.predictions.create(
            version="local/painter",
            input={"prompt": "a fox"},
            webhook=f"http://127.0.0.1:{server.server_port}/hook",
            webhook_events_filter=["start", "completed"],
        )
        deadline = time.monotonic() + 40
        while "succeeded" not in [json.loads(body)["status"] for _, body in list(received)]:
            assert time.monotonic() < deadline, f"told within 40 s: {received}"
            time.sleep(0.2)
        server.shutdown()
    for headers, body in received:
        assert json.loads(body)["id"] == created.id
        Webhooks.validate(headers=headers, body=body, secret=secret, tolerance=300)
        raised(InvalidSignatureError, Webhooks.validate, headers=headers, body=body + " ", secret=secret)
    picture(json.loads(received[-1][1])["output"])


@flow
def error_unauthorized():
    stranger = Client(api_token="nobody", base_url=BASE_URL)
    refusal(401, stranger.predictions.list)


@flow
def error_forbidden():
    reader = Client(api_token=WEAK_TOKEN, base_url=BASE_URL)
    assert "predict" in refusal(403, reader.predictions.create, version="local/sleeper", input={}).detail


@flow
def error_not_found():
    refusal(404, client.models.get, "local/unknown")
    refusal(404, client.predictions.get, "unknown")


@flow
def error_invalid_input():
    error = refusal(422, client.predictions.create, version="local/painter", input={"seed": -1})
    assert "input.prompt" in error.detail
    assert "input.seed" in error.detail


def main():
    """Run the flows that are named, or all."""
    for name in sys.argv[1:] or flows:
        ok = True
        try:
            detail = flows[name]() or ""
        except Exception:  # noqa: BLE001 - it is told as the flow's failure
            ok, detail = False, traceback.format_exc()
        sys.stdout.write(json.dumps({"flow": name, "ok": ok, "detail": detail}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
