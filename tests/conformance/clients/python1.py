"""The official Python client, version 1: how it spells the flows of support/official.py."""

# /// client
# title = "Python"
# packages = ["replicate==1.0.7"]
# official = true
# ///

import hashlib
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.error import HTTPError

from flows import (
    ACCESS_TOKEN,
    API_URL,
    NARRATION,
    NOT_OFFERED,
    WEAK_TOKEN,
    fetched,
    flow,
    grew,
    growing,
    opened,
    picture,
    raised,
    stream_reader,
)
from official import TRAIN_DATA, Flows, ended
from replicate.client import Client
from replicate.exceptions import ModelError, ReplicateError
from replicate.pagination import paginate
from replicate.webhook import InvalidSignatureError, Webhooks

# This version adds /v1 itself.
BASE_URL = API_URL.removesuffix("/v1")
# docs:point
client = Client(api_token=ACCESS_TOKEN, base_url=API_URL.removesuffix("/v1"))
# docs:end


class Client1(Flows):
    prefix = "py1"
    ModelError = ModelError

    def version_of(self, name):
        return self.client.models.get("local", name).latest_version.id

    def refusal(self, status, function, *arguments, **named):
        error = raised(ReplicateError, function, *arguments, **named)
        assert error.status == status, error
        return error

    def waited(self, prediction):
        prediction.wait()
        return prediction

    def slept(self, **input_):
        return self.client.models.predictions.create(("local", "sleeper"), input_)

    def get(self, id_):
        return self.client.predictions.get(id_)

    def cancel(self, id_):
        self.client.predictions.cancel(id_)

    def pages(self):
        return paginate(self.client.predictions.list)

    def painted_once(self, prompt, key):
        # docs:key
        client = Client(api_token=ACCESS_TOKEN, base_url=API_URL.removesuffix("/v1"), headers={"Idempotency-Key": key})
        return client.predictions.create(version="local/painter", input={"prompt": prompt})
        # docs:end

    def link(self, what):
        return what.urls["get"]

    @flow
    def file_as_input(self):
        file = self.client.files.create(io.BytesIO(self.painted()), filename="fox.png")
        picture(self.client.run("local/etcher", input={"image": file.urls["get"], "style": "duotone"}))

    @flow
    def progress(self):
        created = self.client.models.predictions.create(("local", "series"), {"count": 3, "delay_seconds": 1})
        seen = [created.status]
        while created.status not in ("succeeded", "failed", "canceled"):
            time.sleep(0.2)
            created.reload()
            seen.append(created.status)
        assert (seen[0], seen[-1]) == ("starting", "succeeded")
        assert "processing" in seen
        assert "Picture 3 of 3" in created.logs

    @flow
    def stream(self):
        events = list(self.client.stream("local/storyteller", input={"prompt": "a fox", "max_tokens": 12}))
        assert events[-1].event.value == "done"
        assert len("".join(str(event) for event in events if event.event.value == "output").split()) == 12
        return "from Replicate's own address, not through the stack"

    @flow
    def stream_link(self):
        created = self.client.predictions.create(version="local/storyteller", input={"prompt": "a fox"})
        assert len(opened(created.urls["stream"]).split()) == 24

    @flow
    def stream_token(self):
        told = stream_reader(lambda: list(self.client.stream("local/storyteller", input={"prompt": "a fox"})))
        assert told == "wrong", told
        return "sends it the stack's access token"

    def narrated(self):
        return self.client.models.predictions.create(("local", "narrator"), NARRATION)

    def watched(self, look):
        created, seen = self.narrated(), []
        while created.status not in ("succeeded", "failed", "canceled"):
            time.sleep(0.3)
            created.reload()
            if created.status == "processing":
                seen.append(look(created))
        assert created.status == "succeeded", created.error
        return seen

    @flow
    def live_logs(self):
        growing(self.watched(lambda prediction: prediction.logs))

    @flow
    def live_progress(self):
        seen = [each.current for each in self.watched(lambda prediction: prediction.progress) if each]
        assert seen == sorted(seen)
        assert len(set(seen)) >= 3, seen
        assert min(seen) < 10, seen

    @flow
    def live_output(self):
        growing(self.watched(lambda prediction: prediction.output))
        assert len(grew(self.narrated().output_iterator()).split()) == 10

    @flow
    def create_and_wait(self):
        created = self.client.predictions.create(version="local/sleeper", input={"seconds": 1}, wait=20)
        assert (created.status, created.output) == ("succeeded", "slept well")

    @flow
    def models_get(self):
        model = self.client.models.get("local", "painter")
        assert (model.owner, model.name, model.visibility) == ("local", "painter", "public")
        example = model.default_example
        assert example.urls["get"] == f"{API_URL}/predictions/{example.id}"

    @flow
    def models_list(self):
        assert {"painter", "sleeper"} <= {
            model.name for page in paginate(self.client.models.list) for model in page.results
        }

    @flow
    def models_search(self):
        self.refusal(404, self.client.models.search, "lighthouse")
        return "404: sends the method QUERY, which API Gateway does not know; use `GET /search`"

    @flow
    def models_create(self):
        made = self.client.models.create("local", "sketch-py1", visibility="private", hardware="cpu")
        assert (made.owner, made.name, made.visibility) == ("local", "sketch-py1", "private")
        self.client.models.delete("local/sketch-py1")

    @flow
    def models_delete(self):
        self.client.models.create("local", "gone-py1", visibility="private", hardware="cpu")
        assert self.client.models.delete("local/gone-py1")
        self.refusal(404, self.client.models.get, "local/gone-py1")

    @flow
    def models_versions_list(self):
        versions = self.client.models.get("local/painter").versions.list().results
        assert [version.id for version in versions] == [self.version_of("painter")]

    @flow
    def models_versions_get(self):
        version = self.version_of("painter")
        found = self.client.models.get("local/painter").versions.get(version)
        assert found.id == version
        assert "prompt" in found.openapi_schema["components"]["schemas"]["Input"]["properties"]

    @flow
    def models_examples(self):
        assert not hasattr(self.client.models, "examples")
        return NOT_OFFERED

    @flow
    def models_readme(self):
        assert not hasattr(self.client.models, "readme")
        return NOT_OFFERED

    @flow
    def collections_list(self):
        assert "text-to-image" in [collection.slug for collection in self.client.collections.list().results]

    @flow
    def collections_get(self):
        models = self.client.collections.get("text-to-image").models
        assert "painter" in [model.name for model in models]

    @flow
    def account_get(self):
        account = self.client.accounts.current()
        assert (account.type, account.username) == ("user", "local")

    def undeploy(self, name):
        assert self.client.deployments.delete("local", f"py1-{name}")

    @flow
    def deployments_get(self):
        made = self.deploy("get")
        found = self.client.deployments.get("local/py1-get")
        assert found.dict() == made.dict()
        self.undeploy("get")

    @flow
    def deployments_list(self):
        assert "painter-deployment" in [deployment.name for deployment in self.client.deployments.list().results]

    @flow
    def deployments_update(self):
        self.deploy("update")
        changed = self.client.deployments.update("local", "py1-update", max_instances=5)
        assert (changed.current_release.number, changed.current_release.configuration.max_instances) == (2, 5)
        self.undeploy("update")

    @flow
    def deployments_delete(self):
        self.deploy("delete")
        self.undeploy("delete")
        self.refusal(404, self.client.deployments.get, "local/py1-delete")

    @flow
    def deployments_predictions_create(self):
        deployment = self.client.deployments.get("local/painter-deployment")
        picture(self.waited(deployment.predictions.create({"prompt": "a fox"})).output)

    def train(self, **more):
        version = f"local/tuner:{self.version_of('tuner')}"
        return self.client.trainings.create(
            version=version, input={"train_data": TRAIN_DATA, **more}, destination="local/tuner"
        )

    @flow
    def trainings_create(self):
        found = ended(self.client.trainings.get, self.train().id)
        assert found.status == "succeeded", found.error
        assert found.output["version"].startswith("local/tuner:")
        assert fetched(found.output["weights"])

    @flow
    def trainings_get(self):
        training = self.train()
        found = self.client.trainings.get(training.id)
        assert (found.id, found.urls["get"]) == (training.id, f"{API_URL}/trainings/{training.id}")

    @flow
    def trainings_list(self):
        assert self.train().id in [training.id for training in self.client.trainings.list().results]

    @flow
    def trainings_cancel(self):
        training = self.train(seconds=60)
        self.client.trainings.cancel(training.id)
        assert ended(self.client.trainings.get, training.id).status == "canceled"

    def upload(self, content):
        return self.client.files.create(io.BytesIO(content), filename="fox.txt", metadata={"take": 2})

    @flow
    def files_create(self):
        file = self.upload(b"fox one")
        assert (file.name, file.size, file.metadata) == ("fox.txt", 7, {"take": 2})
        assert file.checksums["sha256"] == hashlib.sha256(b"fox one").hexdigest()
        assert fetched(file.urls["get"]) == b"fox one"

    @flow
    def files_get(self):
        file = self.upload(b"fox two")
        assert self.client.files.get(file.id) == file

    @flow
    def files_delete(self):
        file = self.upload(b"fox four")
        assert self.client.files.delete(file.id)
        assert raised(HTTPError, fetched, file.urls["get"]).code == 404

    @flow
    def webhooks(self):
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

        secret = self.client.webhooks.default.secret()
        with HTTPServer(("127.0.0.1", 0), Receiver) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            created = self.client.predictions.create(
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
    def error_unauthorized(self):
        stranger = Client(api_token="nobody", base_url=BASE_URL)
        self.refusal(401, stranger.predictions.list)

    @flow
    def error_forbidden(self):
        reader = Client(api_token=WEAK_TOKEN, base_url=BASE_URL)
        assert "predict" in self.refusal(403, reader.predictions.create, version="local/sleeper", input={}).detail

    @flow
    def error_not_found(self):
        self.refusal(404, self.client.models.get, "local/unknown")
        self.refusal(404, self.client.predictions.get, "unknown")

    @flow
    def error_invalid_input(self):
        error = self.refusal(422, self.client.predictions.create, version="local/painter", input={"seed": -1})
        assert "input.prompt" in error.detail
        assert "input.seed" in error.detail


if __name__ == "__main__":
    Client1(client).run()
