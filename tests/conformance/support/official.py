"""The flows of the official Python client that its versions 1 and 2 spell alike; the other ones are the subclasses'."""

import base64
import hashlib
import io
import time

from flows import API_URL, NOT_OFFERED, creates, fetched, flow, picture, raised, unique
from flows import run as run_flows

TRAIN_DATA = (
    "data:text/plain;base64,"
    + base64.b64encode(b"the sea is calm and the sea is deep and the night is calm and the night is long").decode()
)


def ended(get, *which, **named):
    deadline = time.monotonic() + 240
    while (found := get(*which, **named)).status not in ("succeeded", "failed", "canceled"):
        assert time.monotonic() < deadline, "it did not end within 240 s"
        time.sleep(0.3)
    return found


class Flows:
    """A version's flows, run with its `client`.

    Beside the flows that it spells otherwise, a subclass has ``ModelError``, ``prefix`` (of what it makes), and its own
    words for what these flows need: ``version_of(name)``, ``slept(**input)``, ``waited(prediction)``, ``get(id)``,
    ``cancel(id)``, ``painted_once(prompt, key)``, ``pages()`` of predictions, ``link(what)``, ``upload(content)``,
    ``undeploy(name)``.
    """

    def __init__(self, client):
        self.client = client

    def run(self):
        """Run the flows that are named, or all."""
        kinds = reversed(type(self).__mro__)
        names = [name for kind in kinds for name, member in vars(kind).items() if hasattr(member, "is_flow")]
        run_flows({name: getattr(self, name) for name in names})

    def painted(self):
        return picture(self.client.run("local/painter", input={"prompt": "a fox"}))

    def deploy(self, name):
        return self.client.deployments.create(
            model="local/painter", name=f"{self.prefix}-{name}", version=self.version_of("painter"), hardware="gpu-t4",
            min_instances=0, max_instances=2,
        )  # fmt: skip

    @flow
    def run_file(self):
        self.painted()

    @flow
    def run_text(self):
        words = self.client.run("local/storyteller", input={"prompt": "a fox", "max_tokens": 12})
        assert len("".join(words).split()) == 12

    @flow
    def run_list(self):
        files = list(self.client.run("local/series", input={"count": 3}))
        assert len({hashlib.sha256(picture(file)).hexdigest() for file in files}) == 3

    @flow
    def run_nested(self):
        album = self.client.run("local/album", input={"title": "Foxes", "pages": 2})
        assert album["title"] == "Foxes"
        assert album["details"]["colours"] == ["sand", "umber"]
        for file in (album["cover"], *album["pages"]):
            picture(file)
        assert fetched(album["details"]["thumbnails"]["small"])[:2] == b"\xff\xd8"

    @flow
    def run_by_version(self):
        version = self.version_of("sleeper")
        assert self.client.run(f"local/sleeper:{version}", input={"seconds": 0, "text": "by version"}) == "by version"

    @flow
    def run_polling(self):
        assert self.client.run("local/sleeper", wait=False, input={"seconds": 1}) == "slept well"

    @flow
    def run_longer_than_wait(self):
        assert self.client.run("local/sleeper", wait=1, input={"seconds": 4}) == "slept well"

    @flow
    def run_failed(self):
        error = raised(self.ModelError, self.client.run, "local/crasher", input={"message": "no paint"})
        assert "no paint" in str(error), str(error)

    @flow
    def run_aborted(self):
        return NOT_OFFERED

    @flow
    def run_file_object(self):
        picture(self.client.run("local/etcher", input={"image": io.BytesIO(self.painted()), "style": "mosaic"}))

    @flow
    def create_by_version_id(self):
        version = self.version_of("sleeper")
        created = self.client.predictions.create(version=version, input={"seconds": 0, "text": "by id"})
        assert created.version == version
        assert self.waited(created).output == "by id"

    @flow
    def create_by_model(self):
        created = self.slept(seconds=1)
        assert (created.model, self.link(created)) == ("local/sleeper", f"{API_URL}/predictions/{created.id}")
        assert self.waited(created).output == "slept well"

    @flow
    def create_by_owner_and_name(self):
        created = self.client.predictions.create(version="local/sleeper", input={"seconds": 0})
        assert self.waited(created).output == "slept well"

    @flow
    def create_without_waiting(self):
        began = time.monotonic()
        created = self.slept(seconds=30)
        assert created.status == "starting"
        assert time.monotonic() - began < 15, "it was waited for"
        self.cancel(created.id)

    @flow
    def predictions_get(self):
        created = self.client.predictions.create(version="local/painter", input={"prompt": "a fox"})
        self.waited(created)
        found = self.get(created.id)
        assert (found.id, found.status, found.input) == (created.id, "succeeded", {"prompt": "a fox"})
        assert found.created_at <= found.started_at <= found.completed_at
        picture(found.output)

    @flow
    def predictions_list(self):
        created = self.slept(seconds=0)
        assert created.id in [prediction.id for prediction in self.client.predictions.list().results]

    @flow
    def predictions_paginate(self):
        # A page is cut where an answer would be larger than Lambda's: three of these are never on one.
        made = []
        for _ in range(3):
            created = self.slept(seconds=0, text="fox " * 600_000)
            made.append(self.waited(created).id)
        pages = [[prediction.id for prediction in page.results] for page in self.pages()]
        assert len(pages) > 1, "there was one page only"
        listed = [each for page in pages for each in page]
        assert len(set(listed)) == len(listed)
        assert [each for each in listed if each in made] == made[::-1]

    @flow
    def predictions_cancel(self):
        created = self.slept(seconds=60)
        self.cancel(created.id)
        assert ended(self.get, created.id).status == "canceled"

    @flow
    def hardware_list(self):
        assert "cpu" in [hardware.sku for hardware in self.client.hardware.list()]

    @flow
    def deployments_create(self):
        release = self.deploy("create").current_release
        assert (release.number, release.configuration.hardware) == (1, "gpu-t4")
        self.undeploy("create")

    @flow
    def files_list(self):
        assert self.upload(b"fox three").id in [file.id for file in self.client.files.list()]

    @flow
    def no_output_yet(self):
        created = self.slept(seconds=20)
        found = self.get(created.id)
        for open_ in (created, found):
            assert open_.status in ("starting", "processing")
            assert (open_.output, open_.error) == (None, None)
        self.cancel(created.id)

    @flow
    def idempotency_key(self):
        prompt = unique()
        ids = {self.painted_once(prompt, prompt).id for _ in range(2)}
        assert (len(ids), len(creates(prompt))) == (1, 1)
        other = self.painted_once(prompt, f"other-{prompt}")
        assert other.id not in ids
