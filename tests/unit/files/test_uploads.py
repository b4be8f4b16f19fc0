"""The file routes from the event to table and bucket."""

import base64
import hashlib
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from predictions.aws import clients
from predictions.files.uploads import Files

from tests.support.apps import AwsCalls, Context, load_app, sample
from tests.support.fakes import API_URL, Clock

Call = Callable[..., dict[str, Any]]
DAY = 86400


@pytest.fixture
def files(cloud: None, clock: Clock) -> Files:
    return Files("predictions", "inputs", DAY, now=clock.now)


@pytest.fixture
def call(files: Files, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls a file function as API Gateway does; `answer` is the answer with its body parsed."""
    loaded: dict[str, Any] = {}

    def call(function: str, case: str, owner: str = "alice", **changes: Any) -> dict[str, Any]:
        event = sample(function, case) | changes
        if "authorizer" in event["requestContext"]:
            event["requestContext"]["authorizer"]["owner"] = owner
        if function not in loaded:
            with pytest.MonkeyPatch.context() as template_only:
                loaded[function] = load_app(function, template_only)
            monkeypatch.setattr(loaded[function], "files", files)
        answer: dict[str, Any] = loaded[function].handler(event, Context())
        headers = {name: values[0] for name, values in answer.get("multiValueHeaders", {}).items()}
        body = json.loads(answer["body"]) if answer["body"] else None
        return {"status": answer["statusCode"], "headers": answer.get("headers", {}) | headers, "body": body}

    return call


def create(call: Call, owner: str = "alice") -> dict[str, Any]:
    shown: dict[str, Any] = call("store_files", "create", owner)["body"]
    return shown


def get(call: Call, file_id: str, owner: str = "alice") -> dict[str, Any]:
    return call("store_files", "refused_unknown", owner, path=f"/files/{file_id}")


def delete(call: Call, file_id: str, owner: str = "alice") -> dict[str, Any]:
    return call("store_files", "refused_delete_unknown", owner, path=f"/files/{file_id}")


def listed(call: Call, owner: str = "alice", query: dict[str, str] | None = None) -> dict[str, Any]:
    many = {name: [value] for name, value in (query or {}).items()}
    answer = call("store_files", "list", owner, queryStringParameters=query, multiValueQueryStringParameters=many)
    page: dict[str, Any] = answer["body"]
    return page


def download(call: Call, url: str, **changes: str) -> dict[str, Any]:
    parts = urlsplit(url)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()} | changes
    many = {name: [value] for name, value in query.items()}
    return call(
        "serve_files", "refused_unknown", path=parts.path.removeprefix("/v1"), queryStringParameters=query,
        multiValueQueryStringParameters=many,
    )  # fmt: skip


def head(call: Call, url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    many = {name: [value] for name, value in query.items()}
    return call(
        "serve_files", "refused_head_of_unknown", path=parts.path.removeprefix("/v1"), queryStringParameters=query,
        multiValueQueryStringParameters=many,
    )  # fmt: skip


def keys() -> list[str]:
    return [each["Key"] for each in clients.client("s3").list_objects_v2(Bucket="inputs").get("Contents", [])]


# -- refusals ------------------------------------------------------------------------------------------------


def test_another_owner_neither_sees_nor_deletes_a_file(call: Call) -> None:
    shown = create(call)
    assert get(call, shown["id"], "bob")["status"] == 404
    assert delete(call, shown["id"], "bob")["status"] == 404
    assert listed(call, "bob")["results"] == []
    assert get(call, shown["id"])["body"] == shown


@pytest.mark.parametrize(
    "changes",
    [
        {"signature": "x" * 43},
        {"signature": ""},
        {"signature": "\udcff"},
        {"owner": "bob"},
        {"expiry": "1750086401"},
        {"expiry": "01750086400"},
        {"expiry": "9999999999"},
        {"expiry": "never"},
    ],
)
def test_a_link_that_was_changed_opens_nothing(call: Call, changes: dict[str, str]) -> None:
    url = create(call)["urls"]["get"]
    answer = download(call, url, **changes)
    assert (answer["status"], "Location" in answer["headers"]) == (404, False)
    assert download(call, url)["status"] == 302


@pytest.mark.parametrize("file_id", ["x", "../tokens", "a" * 26, "A" * 26, "a" * 5000])
def test_an_id_that_is_none_is_not_found(call: Call, file_id: str) -> None:
    for answer in (get(call, file_id), delete(call, file_id), download(call, f"{API_URL}/files/{file_id}/download")):
        assert answer["status"] == 404


def test_a_link_dies_with_its_file_and_with_its_day(call: Call, clock: Clock) -> None:
    deleted, expired = create(call), create(call)
    assert delete(call, deleted["id"])["status"] == 204
    assert delete(call, deleted["id"])["status"] == 404
    assert download(call, deleted["urls"]["get"])["status"] == 404
    clock.advance(DAY - 1)
    assert download(call, expired["urls"]["get"])["status"] == 302
    clock.advance(1)
    assert download(call, expired["urls"]["get"])["status"] == 404
    assert get(call, expired["id"])["status"] == 404
    assert listed(call)["results"] == []


def test_nothing_is_shown_of_a_file_that_could_not_be_stored(call: Call) -> None:
    clients.client("s3").delete_bucket(Bucket="inputs")
    assert call("store_files", "create")["status"] == 503
    assert listed(call)["results"] == []


def test_a_delete_that_broke_off_between_object_and_item_is_completed_by_the_next(call: Call) -> None:
    shown = create(call)
    clients.client("s3").delete_object(Bucket="inputs", Key=keys()[0])
    assert delete(call, shown["id"])["status"] == 204
    assert get(call, shown["id"])["status"] == 404


def test_a_file_with_a_hostile_name_gets_a_key_of_ids_only(call: Call) -> None:
    name = "../../payloads/x%00<script>.html"
    body = base64.b64decode(sample("store_files", "create")["body"]).replace(b"fox.png", name.encode())
    answer = call("store_files", "create", body=base64.b64encode(body).decode())
    assert answer["status"] == 201, answer
    assert keys() == [f"files/alice/{answer['body']['id']}"]
    url = download(call, answer["body"]["urls"]["get"])["headers"]["Location"]
    assert parse_qs(urlsplit(url).query)["response-content-disposition"] == ["attachment"]


# -- what works ----------------------------------------------------------------------------------------------


def test_a_file_is_stored_byte_for_byte_and_shown_as_replicate_does(call: Call, clock: Clock) -> None:
    answer = call("store_files", "create")
    shown = answer["body"]
    content = b"\x89PNG\r\n\x1a\n\xff\xfe a fox"
    assert (answer["status"], answer["headers"]["Location"]) == (201, f"{API_URL}/files/{shown['id']}")
    md5 = hashlib.md5(content).hexdigest()  # noqa: S324  # a checksum that Replicate shows
    link = shown.pop("urls")["get"]
    assert shown == {
        "id": shown["id"],
        "name": "fox.png",
        "content_type": "image/png",
        "size": len(content),
        "etag": md5,
        "checksums": {"sha256": hashlib.sha256(content).hexdigest(), "md5": md5},
        "metadata": {"customer_reference_id": 123},
        "created_at": "2025-06-15T15:06:40.000000Z",
        "expires_at": "2025-06-16T15:06:40Z",
        "uploaded": True,
    }
    led = download(call, link)
    assert (led["status"], led["headers"]["Cache-Control"]) == (302, "no-store")
    target = urlsplit(led["headers"]["Location"])
    stored = clients.client("s3").get_object(Bucket="inputs", Key=keys()[0])
    assert target.path.endswith(keys()[0])
    assert (stored["Body"].read(), stored["ContentType"]) == (content, "image/png")


def test_a_file_that_came_as_text_is_stored(call: Call) -> None:
    shown = call("store_files", "create_as_text")["body"]
    assert (shown["name"], shown["content_type"], shown["size"]) == ("fox é.txt", "text/markdown", 5)


def test_an_owner_pages_through_files_only(call: Call, files: Files, clock: Clock, monkeypatch: Any) -> None:
    made = []
    for _ in range(5):
        made.append(create(call)["id"])
        clock.advance(1)
    load = __import__("functions.store_files.app", fromlist=["app"])
    monkeypatch.setattr(load, "PAGE_SIZE", 2)
    page = listed(call)
    seen = [page]
    while page["next"]:
        page = listed(call, query={"cursor": parse_qs(urlsplit(page["next"]).query)["cursor"][0]})
        seen.append(page)
    assert [file["id"] for page in seen for file in page["results"]] == made[::-1]
    assert seen[0]["previous"] is None
    back = listed(call, query={"cursor": parse_qs(urlsplit(seen[-1]["previous"]).query)["cursor"][0]})
    assert back["results"] == seen[1]["results"]


def test_an_upload_is_a_link_for_exactly_what_was_announced(call: Call) -> None:
    answer = call("store_files", "upload", body='{"filename": "a.bin", "size": 5, "sha256": "' + "0" * 64 + '"}')
    assert answer["status"] == 201
    shown, upload = answer["body"], answer["body"]["upload"]
    assert (shown["uploaded"], shown["size"], shown["etag"]) == (False, 5, "")
    assert shown["checksums"] == {"sha256": "0" * 64}
    query = parse_qs(urlsplit(upload["url"]).query)
    signed = set(query["X-Amz-SignedHeaders"][0].split(";"))
    assert {"content-length", "content-type", "if-none-match", "host"} <= signed
    # A header that begins with x-amz is signed as part of the query, where S3 reads it.
    assert "x-amz-checksum-sha256" in signed | {name.lower() for name in query}
    assert query["X-Amz-Expires"] == ["3600"]
    assert {name.lower() for name in upload["headers"]} == signed - {"host"} | {"x-amz-checksum-sha256"}
    assert upload["headers"]["Content-Length"] == "5"


def test_an_upload_is_complete_once_s3_has_it(call: Call) -> None:
    shown = call("store_files", "upload", body='{"filename": "a.bin", "size": 5}')["body"]
    link = shown["urls"]["get"]
    assert get(call, shown["id"])["body"]["uploaded"] is False
    assert download(call, link)["status"] == 404
    # As S3 does for the link: the tests of the stack go through it.
    clients.client("s3").put_object(Bucket="inputs", Key=f"files/alice/{shown['id']}", Body=b"a fox")
    assert download(call, link)["status"] == 302, "its use completes it, without a GET before"
    found = get(call, shown["id"])["body"]
    assert (found["uploaded"], found["size"], found["etag"]) == (True, 5, hashlib.md5(b"a fox").hexdigest())  # noqa: S324  # an ETag
    calls = AwsCalls()
    assert get(call, shown["id"])["body"] == found
    assert "s3.HeadObject" not in calls.made


def test_list_shows_each_upload_as_its_own_get_does(call: Call) -> None:
    made = [call("store_files", "upload", body='{"filename": "a.bin", "size": 9}')["body"]["id"] for _ in range(3)]
    create(call)
    for file_id in made[:2]:
        clients.client("s3").put_object(Bucket="inputs", Key=f"files/alice/{file_id}", Body=b"a fox")
    rows = {row["id"]: row for row in listed(call)["results"]}
    assert [rows[file_id]["uploaded"] for file_id in made] == [True, True, False]
    assert {rows[file_id]["etag"] for file_id in made[:2]} == {hashlib.md5(b"a fox").hexdigest()}  # noqa: S324  # an ETag
    assert all(row == get(call, file_id)["body"] for file_id, row in rows.items())
    calls = AwsCalls()
    assert len(listed(call)["results"]) == 4
    assert calls.made.count("s3.HeadObject") == 1, "S3 is asked only for what has not arrived"


def test_link_that_is_asked_for_headers_leads_to_a_url_for_them(call: Call) -> None:
    link = create(call)["urls"]["get"]
    got, asked = download(call, link), head(call, link)
    assert (got["status"], asked["status"], asked["body"]) == (302, 302, None)
    # Only that for GET sets a header of the response, and each is signed for its own method.
    locations = [urlsplit(each["headers"]["Location"]) for each in (got, asked)]
    assert locations[0].path == locations[1].path
    assert ["response-content-disposition" in each.query for each in locations] == [True, False]
    assert head(call, link.replace("signature=", "signature=x"))["status"] == 404
