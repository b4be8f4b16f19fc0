"""Files on the deployed stack: uploaded, given to models, and fetched again."""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from PIL import Image
from replicate.client import Client
from replicate.helpers import FileOutput

from local.cloud import LocalCloud

Api = Callable[..., httpx.Client]


@pytest.fixture(scope="module")
def picture() -> bytes:
    """A picture that is no UTF-8 in any part."""
    drawn = io.BytesIO()
    Image.effect_noise((96, 64), 80).convert("RGB").save(drawn, "PNG")
    return drawn.getvalue()


@pytest.fixture(scope="module")
def client(cloud: LocalCloud) -> Iterator[Client]:
    """The official client, as a team uses it: with another base URL and token, and nothing else."""
    token = cloud.create_token("alice")
    # The transport leaves out the proxies of this machine; the client itself cannot be closed.
    with httpx.HTTPTransport() as transport:
        yield Client(api_token=token, base_url=cloud.stack.api_url.removesuffix("/v1"), transport=transport)


def fetched(url: str, **headers: str) -> httpx.Response:
    """A file's link, opened as a model does."""
    return httpx.get(url, headers=headers, follow_redirects=True, timeout=30, trust_env=False)


class TestRefusals:
    def test_strangers_are_told_nothing(self, cloud: LocalCloud) -> None:
        for method, path in (("GET", "/files"), ("POST", "/files"), ("POST", "/uploads"), ("DELETE", "/files/x")):
            answer = httpx.request(method, cloud.stack.api_url + path, timeout=30, trust_env=False)
            assert answer.status_code == 401

    def test_a_link_of_ones_own_making_opens_nothing(self, cloud: LocalCloud, api: Api) -> None:
        shown = api("alice").post("/files", files={"content": b"secret"}).json()
        link = httpx.URL(shown["urls"]["get"])
        wrong = [link.copy_remove_param("signature"), link.copy_set_param("signature", "x" * 43)]
        for url in [*wrong, link.copy_set_param("owner", "bob"), link.copy_set_param("expiry", 9999999999)]:
            answer = fetched(str(url))
            assert (answer.status_code, b"secret" in answer.content) == (404, False)
        assert fetched(str(link)).content == b"secret"

    def test_owners_never_see_each_others_files(self, api: Api) -> None:
        shown = api("alice").post("/files", files={"content": b"mine"}).json()
        for method in ("GET", "DELETE"):
            assert api("bob").request(method, f"/files/{shown['id']}").status_code == 404
        assert api("bob").get("/files").json()["results"] == []
        assert shown in api("alice").get("/files").json()["results"]
        assert shown["id"] not in [each["id"] for each in api("alice").get("/predictions").json()["results"]]

    @pytest.mark.parametrize(
        ("content_type", "body", "status"),
        [
            ("multipart/form-data", b"--x--\r\n", 400),
            ("multipart/form-data; boundary=x", b"\xff\xfe", 400),
            ("multipart/form-data; boundary=x", b"--x--\r\n", 422),
            ("application/json", b"{}", 415),
            ("application/octet-stream", bytes(range(256)), 415),
        ],
    )
    def test_a_body_that_is_no_form_is_a_problem(self, api: Api, content_type: str, body: bytes, status: int) -> None:
        answer = api("alice").post("/files", content=body, headers={"Content-Type": content_type})
        assert (answer.status_code, answer.json()["status"]) == (status, status)

    def test_a_file_that_lambda_cannot_carry_is_sent_to_uploads(self, api: Api) -> None:
        answer = api("alice").post("/files", files={"content": bytes(4_400_001)})
        assert answer.status_code == 413
        assert "POST /uploads" in answer.json()["detail"]


class TestFiles:
    def test_the_official_client_uploads_lists_and_deletes(self, client: Client, picture: bytes) -> None:
        made = client.files.create(io.BytesIO(picture), filename="fox.png", metadata={"take": 2})
        assert (made.name, made.content_type, made.size) == ("fox.png", "image/png", len(picture))
        assert made.checksums["sha256"] == hashlib.sha256(picture).hexdigest()
        assert made.metadata == {"take": 2}
        assert client.files.get(made.id) == made
        assert made in client.files.list()
        opened = fetched(made.urls["get"])
        assert (opened.content, opened.headers["content-type"]) == (picture, "image/png")
        asked = httpx.head(made.urls["get"], follow_redirects=True, timeout=30, trust_env=False)
        assert (asked.status_code, asked.headers["content-length"]) == (200, str(len(picture)))
        assert client.files.delete(made.id)
        assert fetched(made.urls["get"]).status_code == 404

    def test_the_largest_file_of_a_request_comes_back_byte_for_byte(self, api: Api) -> None:
        content = os.urandom(4_400_000)
        shown = api("alice").post("/files", files={"content": content}).json()
        assert fetched(shown["urls"]["get"]).content == content

    def test_a_large_file_goes_straight_to_s3(self, api: Api) -> None:
        alice, content = api("alice"), os.urandom(9_000_000)
        announced = {"filename": "film.mp4", "type": "video/mp4", "size": len(content)}
        shown = alice.post("/uploads", json=announced).json()
        assert fetched(shown["urls"]["get"]).status_code == 404, "it is not there yet"
        upload = shown["upload"]
        put = httpx.request(
            upload["method"], upload["url"], headers=upload["headers"], content=content, timeout=60, trust_env=False
        )
        assert put.status_code == 200, put.text
        opened = fetched(shown["urls"]["get"])
        assert (opened.content, opened.headers["content-type"]) == (content, "video/mp4")
        found = alice.get(f"/files/{shown['id']}").json()
        assert (found["uploaded"], found["size"]) == (True, len(content))


class TestFilesAsInputs:
    def test_an_uploaded_file_is_the_input_of_a_model(self, client: Client, cloud: LocalCloud, picture: bytes) -> None:
        made = client.files.create(io.BytesIO(picture), filename="fox.png")
        output: Any = client.run("local/etcher", input={"image": made.urls["get"], "style": "mosaic"})
        with Image.open(io.BytesIO(fetched(output).content)) as opened:
            assert (opened.format, opened.size) == ("PNG", (96, 64))

    def test_a_file_object_in_the_input_is_uploaded_by_the_client(self, client: Client, picture: bytes) -> None:
        prediction = client.predictions.create(
            version="local/etcher", input={"image": io.BytesIO(picture), "style": "posterize"}
        )
        assert prediction.input is not None
        assert "/download?owner=alice&" in prediction.input["image"]
        prediction.wait()
        assert prediction.status == "succeeded", prediction.error


class TestOutputUrls:
    def test_link_of_an_output_opens_its_bytes_but_not_with_a_token_as_well(
        self, client: Client, cloud: LocalCloud
    ) -> None:
        prediction = client.predictions.create(version="local/painter", input={"prompt": "a harbour"})
        prediction.wait()
        shown = httpx.get(
            f"{cloud.stack.api_url}/predictions/{prediction.id}",
            headers={"Authorization": f"Bearer {cloud.create_token('alice')}"},
            trust_env=False,
            timeout=60,
        ).json()
        (file,) = shown["output_files"]
        stored = cloud.client("s3").get_object(Bucket=file["bucket"], Key=file["key"])["Body"].read()
        url: Any = prediction.output
        assert fetched(url).content == stored
        # The client leaves http URLs as text, where it makes a FileOutput of https ones, and sends its token along.
        with pytest.raises(httpx.HTTPStatusError, match="400 Bad Request"):
            FileOutput(url, client).read()


class TestBrowsers:
    PAGE = "https://app.example.com"

    def test_a_preflight_needs_no_token(self, cloud: LocalCloud) -> None:
        asked = {"Origin": self.PAGE, "Access-Control-Request-Method": "POST"}
        for path in ("/predictions", "/files", "/predictions/x/cancel"):
            answer = httpx.options(cloud.stack.api_url + path, headers=asked, trust_env=False, timeout=60)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == self.PAGE
            assert "Authorization" in answer.headers["access-control-allow-headers"]

    def test_a_page_can_read_answers_refusals_and_the_gateways_own(self, cloud: LocalCloud, api: Api) -> None:
        page = {"Origin": self.PAGE}
        answers = [
            api("alice").get("/predictions", headers=page),
            api("alice").get("/files/x", headers=page),
            api("alice").get("/nothing", headers=page),
            httpx.get(cloud.stack.api_url + "/predictions", headers=page, trust_env=False, timeout=60),
        ]
        assert [answer.status_code for answer in answers] == [200, 404, 404, 401]
        assert {answer.headers.get("access-control-allow-origin") for answer in answers} == {self.PAGE}

    def test_another_page_cannot_read_an_answer(self, api: Api) -> None:
        answer = api("alice").get("/predictions", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in answer.headers
