"""The official Python client, version 2 (beta): how it spells the flows of support/official.py."""

# /// client
# title = "Python"
# packages = ["replicate==2.0.0b4"]
# official = true
# ///

import hashlib
import os
import time
import warnings

from urllib.error import HTTPError

import replicate as package
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
from replicate import Replicate
from replicate.exceptions import ModelError


# docs:point
replicate = Replicate(bearer_token=ACCESS_TOKEN, base_url=API_URL)
# docs:end
# Whatever client they are called on, `stream` and `use` make themselves another one from the environment.
os.environ |= {"REPLICATE_API_TOKEN": ACCESS_TOKEN, "REPLICATE_BASE_URL": API_URL}


class Client2(Flows):
    prefix = "py2"
    ModelError = ModelError

    def version_of(self, name):
        return self.client.models.get(model_owner="local", model_name=name).latest_version.id

    def refusal(self, kind, function, **arguments):
        error = raised(kind, function, **arguments)
        assert error.body["status"] == error.status_code
        return error

    def slept(self, **input_):
        return self.client.models.predictions.create(model_owner="local", model_name="sleeper", input=input_)

    def waited(self, prediction):
        return self.client.predictions.wait(prediction.id)

    def get(self, id_):
        return self.client.predictions.get(prediction_id=id_)

    def cancel(self, id_):
        self.client.predictions.cancel(prediction_id=id_)

    def pages(self):
        return self.client.predictions.list().iter_pages()

    def painted_once(self, prompt, key):
        # docs:key
        return replicate.predictions.create(
            version="local/painter", input={"prompt": prompt}, extra_headers={"Idempotency-Key": key}
        )
        # docs:end

    def link(self, what):
        return what.urls.get

    @flow
    def file_as_input(self):
        file = self.client.files.create(content=("fox.png", self.painted(), "image/png"))
        picture(self.client.run("local/etcher", input={"image": file.urls.get, "style": "duotone"}))

    @flow
    def progress(self):
        created = self.client.models.predictions.create(
            model_owner="local", model_name="series", input={"count": 3, "delay_seconds": 1}
        )
        seen = [created]
        while seen[-1].status not in ("succeeded", "failed", "canceled"):
            time.sleep(0.2)
            seen.append(self.client.predictions.get(prediction_id=created.id))
        assert (seen[0].status, seen[-1].status) == ("starting", "succeeded")
        assert "processing" in [prediction.status for prediction in seen]
        assert "Picture 3 of 3" in seen[-1].logs

    def streamed(self, model, input_):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield from self.client.stream(model, input=input_)

    @flow
    def stream(self):
        events = list(self.streamed("local/storyteller", {"prompt": "a fox", "max_tokens": 12}))
        assert len("".join(map(str, events)).split()) == 12
        return "needs `REPLICATE_API_TOKEN` and `REPLICATE_BASE_URL` in the environment; polls this stack"

    @flow
    def stream_link(self):
        created = self.client.predictions.create(version="local/storyteller", input={"prompt": "a fox"})
        assert len(opened(created.urls.stream).split()) == 24

    @flow
    def stream_token(self):
        told = stream_reader(lambda: list(self.streamed("local/storyteller", {"prompt": "a fox"})))
        assert told is None, told
        return "does not connect to it"

    @flow
    def live_logs(self):
        run, seen = package.use("local/narrator").create(**NARRATION), []
        while (found := self.get(run._prediction.id)).status not in ("succeeded", "failed", "canceled"):
            time.sleep(0.3)
            if found.status == "processing":
                seen.append(run.logs())
        growing(seen)

    @flow
    def live_progress(self):
        return NOT_OFFERED

    @flow
    def live_output(self):
        narrator = package.use("local/narrator", streaming=True)
        assert len(grew(narrator(**NARRATION)).split()) == 10
        assert len(grew(self.streamed("local/narrator", NARRATION)).split()) == 10

    @flow
    def create_and_wait(self):
        created = self.client.predictions.create(version="local/sleeper", input={"seconds": 1}, prefer="wait=20")
        assert (created.status, created.output) == ("succeeded", "slept well")

    @flow
    def models_get(self):
        model = self.client.models.get(model_owner="local", model_name="painter")
        assert (model.owner, model.name, model.visibility) == ("local", "painter", "public")
        example = model.default_example
        assert example["urls"]["get"] == f"{API_URL}/predictions/{example['id']}"

    @flow
    def models_list(self):
        assert {"painter", "sleeper"} <= {model.name for model in self.client.models.list()}

    @flow
    def models_search(self):
        self.refusal(package.NotFoundError, self.client.models.search, body="lighthouse")
        [found] = self.client.search(query="word by word").models
        assert found.model.name == "storyteller"
        return "404: sends the method QUERY, which API Gateway does not know; `client.search` works"

    @flow
    def models_create(self):
        made = self.client.models.create(owner="local", name="sketch-py2", visibility="private", hardware="cpu")
        assert (made.owner, made.name, made.visibility) == ("local", "sketch-py2", "private")
        self.client.models.delete(model_owner="local", model_name="sketch-py2")

    @flow
    def models_delete(self):
        self.client.models.create(owner="local", name="gone-py2", visibility="private", hardware="cpu")
        self.client.models.delete(model_owner="local", model_name="gone-py2")
        self.refusal(package.NotFoundError, self.client.models.get, model_owner="local", model_name="gone-py2")

    @flow
    def models_versions_list(self):
        versions = self.client.models.versions.list(model_owner="local", model_name="painter")
        assert [version.id for version in versions] == [self.version_of("painter")]

    @flow
    def models_versions_get(self):
        version = self.version_of("painter")
        found = self.client.models.versions.get(model_owner="local", model_name="painter", version_id=version)
        assert found.id == version
        assert "prompt" in found.openapi_schema["components"]["schemas"]["Input"]["properties"]

    @flow
    def models_examples(self):
        [example] = self.client.models.examples.list(model_owner="local", model_name="painter")
        assert example.urls.get == f"{API_URL}/predictions/{example.id}"

    @flow
    def models_readme(self):
        assert len(self.client.models.readme.get(model_owner="local", model_name="painter")) > 0

    @flow
    def collections_list(self):
        assert "text-to-image" in [collection.slug for collection in self.client.collections.list()]

    @flow
    def collections_get(self):
        models = self.client.collections.get(collection_slug="text-to-image").models
        assert "painter" in [model.name for model in models]

    @flow
    def account_get(self):
        account = self.client.account.get()
        assert (account.type, account.username) == ("user", "local")

    def undeploy(self, name):
        self.client.deployments.delete(deployment_owner="local", deployment_name=f"py2-{name}")

    @flow
    def deployments_get(self):
        made = self.deploy("get")
        found = self.client.deployments.get(deployment_owner="local", deployment_name="py2-get")
        assert found.to_dict() == made.to_dict()
        self.undeploy("get")

    @flow
    def deployments_list(self):
        assert "painter-deployment" in [deployment.name for deployment in self.client.deployments.list()]

    @flow
    def deployments_update(self):
        self.deploy("update")
        changed = self.client.deployments.update(
            deployment_owner="local", deployment_name="py2-update", max_instances=5
        )
        assert (changed.current_release.number, changed.current_release.configuration.max_instances) == (2, 5)
        self.undeploy("update")

    @flow
    def deployments_delete(self):
        self.deploy("delete")
        self.undeploy("delete")
        self.refusal(
            package.NotFoundError, self.client.deployments.get, deployment_owner="local", deployment_name="py2-delete"
        )

    @flow
    def deployments_predictions_create(self):
        created = self.client.deployments.predictions.create(
            deployment_owner="local", deployment_name="painter-deployment", input={"prompt": "a fox"}
        )
        picture(self.client.predictions.wait(created.id).output)

    def train(self, **more):
        return self.client.trainings.create(
            model_owner="local", model_name="tuner", version_id=self.version_of("tuner"), destination="local/tuner",
            input={"train_data": TRAIN_DATA, **more},
        )  # fmt: skip

    @flow
    def trainings_create(self):
        found = ended(self.client.trainings.get, training_id=self.train().id)
        assert found.status == "succeeded", found.error
        assert found.output.version.startswith("local/tuner:")
        assert fetched(found.output.weights)

    @flow
    def trainings_get(self):
        training = self.train()
        found = self.client.trainings.get(training_id=training.id)
        assert (found.id, found.urls.get) == (training.id, f"{API_URL}/trainings/{training.id}")

    @flow
    def trainings_list(self):
        assert self.train().id in [training.id for training in self.client.trainings.list()]

    @flow
    def trainings_cancel(self):
        training = self.train(seconds=60)
        self.client.trainings.cancel(training_id=training.id)
        assert ended(self.client.trainings.get, training_id=training.id).status == "canceled"

    def upload(self, content):
        return self.client.files.create(content=("fox.txt", content, "text/plain"))

    @flow
    def files_create(self):
        file = self.upload(b"fox one")
        assert (file.content_type, file.size) == ("text/plain", 7)
        assert file.checksums.sha256 == hashlib.sha256(b"fox one").hexdigest()
        assert fetched(file.urls.get) == b"fox one"

    @flow
    def files_get(self):
        file = self.upload(b"fox two")
        assert self.client.files.get(file_id=file.id).to_dict() == file.to_dict()

    @flow
    def files_delete(self):
        file = self.upload(b"fox four")
        self.client.files.delete(file_id=file.id)
        assert raised(HTTPError, fetched, file.urls.get).code == 404

    @flow
    def webhooks(self):
        assert self.client.webhooks.default.secret.get().key.startswith("whsec_")
        assert not hasattr(self.client.webhooks, "validate")
        return "gives the secret; this client has no validator"

    @flow
    def error_unauthorized(self):
        stranger = Replicate(bearer_token="nobody", base_url=API_URL)
        self.refusal(package.AuthenticationError, stranger.predictions.list)

    @flow
    def error_forbidden(self):
        reader = Replicate(bearer_token=WEAK_TOKEN, base_url=API_URL)
        error = self.refusal(
            package.PermissionDeniedError, reader.predictions.create, version="local/sleeper", input={}
        )
        assert "predict" in error.body["detail"]

    @flow
    def error_not_found(self):
        self.refusal(package.NotFoundError, self.client.models.get, model_owner="local", model_name="unknown")
        self.refusal(package.NotFoundError, self.client.predictions.get, prediction_id="unknown")

    @flow
    def error_invalid_input(self):
        kind = package.UnprocessableEntityError
        error = self.refusal(kind, self.client.predictions.create, version="local/painter", input={"seed": -1})
        assert [field["field"] for field in error.body["invalid_fields"]] == ["input.prompt", "input.seed"]


if __name__ == "__main__":
    Client2(replicate).run()
