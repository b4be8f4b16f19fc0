"""The real flows of the official Python client 2, unmodified, against a deployed stack.

Runs in an environment of its own, because two versions of one package cannot be in one. Variables and output are those
of flows.mjs: ``API_URL``, ``ACCESS_TOKEN``, ``WEAK_TOKEN``; a line of JSON for each flow.
"""

import base64
import hashlib
import io
import json
import os
import sys
import time
import traceback
import warnings

import httpx
import replicate as package
from replicate import Replicate
from replicate.exceptions import ModelError

API_URL, ACCESS_TOKEN, WEAK_TOKEN = (os.environ[name] for name in ("API_URL", "ACCESS_TOKEN", "WEAK_TOKEN"))
NOT_OFFERED = "–"  # noqa: RUF001 - what the table shows
TEXT = b"the sea is calm and the sea is deep and the night is calm and the night is long"
DEPLOYMENT = {"model": "local/painter", "hardware": "gpu-t4", "min_instances": 0, "max_instances": 2}

client = Replicate(bearer_token=ACCESS_TOKEN, base_url=API_URL)
flows = {}


def flow(function):
    """Adds a flow; what it returns is in what it differs."""
    flows[function.__name__] = function
    return function


def version_of(name):
    return client.models.get(model_owner="local", model_name=name).latest_version.id


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


def refusal(kind, function, **arguments):
    error = raised(kind, function, **arguments)
    assert error.body["status"] == error.status_code
    return error


def raised(kind, function, *arguments, **named):
    try:
        function(*arguments, **named)
    except kind as error:
        return error
    raise AssertionError("it did not fail")


def ended(get, **which):
    deadline = time.monotonic() + 60
    while (found := get(**which)).status not in ("succeeded", "failed", "canceled"):
        assert time.monotonic() < deadline, "it did not end within 60 s"
        time.sleep(0.3)
    return found


def slept(**input_):
    return client.models.predictions.create(model_owner="local", model_name="sleeper", input=input_)


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
    file = client.files.create(content=("fox.png", painted(), "image/png"))
    picture(client.run("local/etcher", input={"image": file.urls.get, "style": "duotone"}))


@flow
def progress():
    created = client.models.predictions.create(
        model_owner="local", model_name="series", input={"count": 3, "delay_seconds": 1}
    )
    seen = [created]
    while seen[-1].status not in ("succeeded", "failed", "canceled"):
        time.sleep(0.2)
        seen.append(client.predictions.get(prediction_id=created.id))
    assert (seen[0].status, seen[-1].status) == ("starting", "succeeded")
    assert "processing" in [prediction.status for prediction in seen]
    assert "Picture 3 of 3" in seen[-1].logs


@flow
def stream():
    # Whatever client it is called on, it makes itself another one from the environment.
    os.environ |= {"REPLICATE_API_TOKEN": ACCESS_TOKEN, "REPLICATE_BASE_URL": API_URL}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        events = list(client.stream("local/storyteller", input={"prompt": "a fox", "max_tokens": 12}))
    assert len("".join(map(str, events)).split()) == 12
    return "needs `REPLICATE_API_TOKEN` and `REPLICATE_BASE_URL` in the environment; polls this stack"


@flow
def create_by_version_id():
    version = version_of("sleeper")
    created = client.predictions.create(version=version, input={"seconds": 0, "text": "by id"})
    assert created.version == version
    assert client.predictions.wait(created.id).output == "by id"


@flow
def create_by_model():
    created = slept(seconds=1)
    assert (created.model, created.urls.get) == ("local/sleeper", f"{API_URL}/predictions/{created.id}")
    assert client.predictions.wait(created.id).output == "slept well"


@flow
def create_by_owner_and_name():
    created = client.predictions.create(version="local/sleeper", input={"seconds": 0})
    assert client.predictions.wait(created.id).output == "slept well"


@flow
def create_without_waiting():
    began = time.monotonic()
    created = slept(seconds=30)
    assert created.status == "starting"
    assert time.monotonic() - began < 15, "it was waited for"
    client.predictions.cancel(prediction_id=created.id)


@flow
def create_and_wait():
    created = client.predictions.create(version="local/sleeper", input={"seconds": 1}, prefer="wait=20")
    assert (created.status, created.output) == ("succeeded", "slept well")


@flow
def predictions_get():
    created = client.predictions.create(version="local/painter", input={"prompt": "a fox"})
    client.predictions.wait(created.id)
    found = client.predictions.get(prediction_id=created.id)
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
        made.append(client.predictions.wait(created.id).id)
    pages = [[prediction.id for prediction in page.results] for page in client.predictions.list().iter_pages()]
    assert len(pages) > 1, "there was one page only"
    listed = [each for page in pages for each in page]
    assert len(set(listed)) == len(listed)
    assert [each for each in listed if each in made] == made[::-1]


@flow
def predictions_cancel():
    created = slept(seconds=60)
    client.predictions.cancel(prediction_id=created.id)
    assert ended(client.predictions.get, prediction_id=created.id).status == "canceled"


@flow
def models_get():
    model = client.models.get(model_owner="local", model_name="painter")
    assert (model.owner, model.name, model.visibility) == ("local", "painter", "public")
    example = model.default_example
    assert example["urls"]["get"] == f"{API_URL}/predictions/{example['id']}"


@flow
def models_list():
    assert {"painter", "sleeper"} <= {model.name for model in client.models.list()}


@flow
def models_search():
    refusal(package.NotFoundError, client.models.search, body="lighthouse")
    [found] = client.search(query="word by word").models
    assert found.model.name == "storyteller"
    return "404: sends the method QUERY, which API Gateway does not know; `client.search` works"


@flow
def models_create():
    made = client.models.create(owner="local", name="sketch-py2", visibility="private", hardware="cpu")
    assert (made.owner, made.name, made.visibility) == ("local", "sketch-py2", "private")
    client.models.delete(model_owner="local", model_name="sketch-py2")


@flow
def models_delete():
    client.models.create(owner="local", name="gone-py2", visibility="private", hardware="cpu")
    client.models.delete(model_owner="local", model_name="gone-py2")
    refusal(package.NotFoundError, client.models.get, model_owner="local", model_name="gone-py2")


@flow
def models_versions_list():
    versions = client.models.versions.list(model_owner="local", model_name="painter")
    assert [version.id for version in versions] == [version_of("painter")]


@flow
def models_versions_get():
    version = version_of("painter")
    found = client.models.versions.get(model_owner="local", model_name="painter", version_id=version)
    assert found.id == version
    assert "prompt" in found.openapi_schema["components"]["schemas"]["Input"]["properties"]


@flow
def models_examples():
    [example] = client.models.examples.list(model_owner="local", model_name="painter")
    assert example.urls.get == f"{API_URL}/predictions/{example.id}"


@flow
def models_readme():
    assert len(client.models.readme.get(model_owner="local", model_name="painter")) > 0


@flow
def collections_list():
    assert "text-to-image" in [collection.slug for collection in client.collections.list()]


@flow
def collections_get():
    models = client.collections.get(collection_slug="text-to-image").models
    assert "painter" in [model.name for model in models]


@flow
def hardware_list():
    assert "cpu" in [hardware.sku for hardware in client.hardware.list()]


@flow
def account_get():
    account = client.account.get()
    assert (account.type, account.username) == ("user", "local")


def deploy(name):
    return client.deployments.create(**DEPLOYMENT, name=f"py2-{name}", version=version_of("painter"))


def undeploy(name):
    client.deployments.delete(deployment_owner="local", deployment_name=f"py2-{name}")


@flow
def deployments_create():
    release = deploy("create").current_release
    assert (release.number, release.configuration.hardware) == (1, "gpu-t4")
    undeploy("create")


@flow
def deployments_get():
    made = deploy("get")
    found = client.deployments.get(deployment_owner="local", deployment_name="py2-get")
    assert found.to_dict() == made.to_dict()
    undeploy("get")


@flow
def deployments_list():
    assert "painter-deployment" in [deployment.name for deployment in client.deployments.list()]


@flow
def deployments_update():
    deploy("update")
    changed = client.deployments.update(deployment_owner="local", deployment_name="py2-update", max_instances=5)
    assert (changed.current_release.number, changed.current_release.configuration.max_instances) == (2, 5)
    undeploy("update")


@flow
def deployments_delete():
    deploy("delete")
    undeploy("delete")
    refusal(package.NotFoundError, client.deployments.get, deployment_owner="local", deployment_name="py2-delete")


@flow
def deployments_predictions_create():
    created = client.deployments.predictions.create(
        deployment_owner="local", deployment_name="painter-deployment", input={"prompt": "a fox"}
    )
    picture(client.predictions.wait(created.id).output)


def train(**more):
    data = "data:text/plain;base64," + base64.b64encode(TEXT).decode()
    return client.trainings.create(
        model_owner="local", model_name="tuner", version_id=version_of("tuner"), destination="local/tuner",
        input={"train_data": data, **more},
    )  # fmt: skip


@flow
def trainings_create():
    found = ended(client.trainings.get, training_id=train().id)
    assert found.status == "succeeded", found.error
    assert found.output.version.startswith("local/tuner:")
    assert fetched(found.output.weights)


@flow
def trainings_get():
    training = train()
    found = client.trainings.get(training_id=training.id)
    assert (found.id, found.urls.get) == (training.id, f"{API_URL}/trainings/{training.id}")


@flow
def trainings_list():
    assert train().id in [training.id for training in client.trainings.list()]


@flow
def trainings_cancel():
    training = train(seconds=60)
    client.trainings.cancel(training_id=training.id)
    assert ended(client.trainings.get, training_id=training.id).status == "canceled"


def upload(content):
    return client.files.create(content=("fox.txt", content, "text/plain"))


@flow
def files_create():
    file = upload(b"fox one")
    assert (file.content_type, file.size) == ("text/plain", 7)
    assert file.checksums.sha256 == hashlib.sha256(b"fox one").hexdigest()
    assert fetched(file.urls.get) == b"fox one"


@flow
def files_get():
    file = upload(b"fox two")
    assert client.files.get(file_id=file.id).to_dict() == file.to_dict()


@flow
def files_list():
    assert upload(b"fox three").id in [file.id for file in client.files.list()]


@flow
def files_delete():
    file = upload(b"fox four")
    client.files.delete(file_id=file.id)
    assert httpx.get(file.urls.get).status_code == 404


@flow
def webhooks():
    assert client.webhooks.default.secret.get().key.startswith("whsec_")
    assert not hasattr(client.webhooks, "validate")
    return "gives the secret; this client has no validator"


@flow
def error_unauthorized():
    stranger = Replicate(bearer_token="nobody", base_url=API_URL)
    refusal(package.AuthenticationError, stranger.predictions.list)


@flow
def error_forbidden():
    reader = Replicate(bearer_token=WEAK_TOKEN, base_url=API_URL)
    error = refusal(package.PermissionDeniedError, reader.predictions.create, version="local/sleeper", input={})
    assert "predict" in error.body["detail"]


@flow
def error_not_found():
    refusal(package.NotFoundError, client.models.get, model_owner="local", model_name="unknown")
    refusal(package.NotFoundError, client.predictions.get, prediction_id="unknown")


@flow
def error_invalid_input():
    kind = package.UnprocessableEntityError
    error = refusal(kind, client.predictions.create, version="local/painter", input={"seed": -1})
    assert [field["field"] for field in error.body["invalid_fields"]] == ["input.prompt", "input.seed"]


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
