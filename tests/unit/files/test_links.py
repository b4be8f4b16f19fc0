"""Links to objects: what opens nothing, and what leads to the right bytes."""

import hashlib
import hmac
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote, urlencode, urlsplit

import pytest
from predictions.aws import clients
from predictions.aws.secrets import SecretTooShort
from predictions.files.links import Links, UnknownBucket

from tests.support.fakes import API_URL, Clock

BUCKETS = {"inputs": "inputs", "outputs": "outputs", "source": "their-bucket"}


@pytest.fixture
def links(cloud: None, clock: Clock) -> Links:
    return Links(BUCKETS, "link-secret", now=clock.now, clock=clock.now)


def parts(url: str) -> dict[str, Any]:
    """What `open` is given when a link is opened."""
    split = urlsplit(url)
    query = dict(parse_qsl(split.query, keep_blank_values=True))
    return {"bucket": split.path.split("/")[-2], "version_id": None, **query}


@pytest.mark.parametrize(
    ("bucket", "key"),
    [("elsewhere", "a.png"), ("", "a.png"), ("outputs", "payloads/x/input.json"), ("source2", "a.png")],
)
def test_no_link_is_made_to_what_is_not_for_models(links: Links, bucket: str, key: str) -> None:
    with pytest.raises(UnknownBucket):
        links.url(bucket, key, expires=2_000_000_000)


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "in/other.png"},
        {"key": ""},
        {"bucket": "outputs"},
        {"bucket": "their-bucket"},
        {"bucket": "elsewhere"},
        {"expires": "2000000001"},
        {"expires": "02000000000"},
        {"expires": "٢٠٠٠٠٠٠٠٠٠"},
        {"expires": ""},
        {"expires": "9" * 5000},
        {"version_id": "v2"},
        {"version_id": ""},
        {"signature": "0" * 64},
        {"signature": ""},
        {"signature": "ü" * 64},
    ],
    ids=str,
)
def test_a_link_that_was_changed_opens_nothing(links: Links, changes: dict[str, Any]) -> None:
    link = parts(links.url("inputs", "in/fox.png", expires=2_000_000_000))
    assert links.open(**link)
    assert links.open(**(link | changes)) is None


def test_a_link_ends_when_it_says(links: Links, clock: Clock) -> None:
    link = parts(links.url("inputs", "in/fox.png", expires=int(clock.now()) + 60))
    clock.advance(59)
    assert links.open(**link)
    clock.advance(1)
    assert links.open(**link) is None


def test_a_link_of_another_stack_opens_nothing(links: Links, clock: Clock) -> None:
    clients.client("secretsmanager").create_secret(Name="other", SecretString="o" * 64)
    other = Links(BUCKETS, "other", now=clock.now)
    assert links.open(**parts(other.url("inputs", "in/fox.png", expires=2_000_000_000))) is None


def test_payloads_are_not_served_even_with_the_right_signature(links: Links) -> None:
    signature = links._signature("outputs", "payloads/x", None, 2_000_000_000)
    assert links.open("outputs", "payloads/x", None, "2000000000", signature) is None


def test_a_secret_that_is_none_signs_nothing(cloud: None) -> None:
    clients.client("secretsmanager").create_secret(Name="short", SecretString="x")
    with pytest.raises(SecretTooShort):
        Links(BUCKETS, "short").url("inputs", "a", expires=2_000_000_000)


def test_without_a_source_bucket_there_are_no_links_into_one(cloud: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_BUCKET_NAME", "")
    with pytest.raises(UnknownBucket):
        Links.from_env().url("", "a.png", expires=2_000_000_000)
    assert Links.from_env().open("source", "a.png", None, "2000000000", "0" * 64) is None


@pytest.mark.parametrize(
    ("bucket", "key", "version_id", "path", "real"),
    [
        ("inputs", "in/fox.png", None, "/objects/inputs/fox.png", "inputs"),
        ("outputs", "alice/id/up/0", None, "/objects/outputs/0", "outputs"),
        ("their-bucket", "a/ü b?.jpeg", "3/L4kqtJ", "/objects/source/__b_.jpeg", "their-bucket"),
        ("source", "a/..", None, "/objects/source/object", "their-bucket"),
        ("inputs", "folder/", None, "/objects/inputs/object", "inputs"),
        ("inputs", "x" * 900 + ".png", None, "/objects/inputs/" + "x" * 96 + ".png", "inputs"),
        ("inputs", 'line\nend"&key=b', None, "/objects/inputs/line_end__key_b", "inputs"),
    ],
)
def test_a_link_leads_to_its_object(
    links: Links, bucket: str, key: str, version_id: str | None, path: str, real: str
) -> None:
    url = links.url(bucket, key, version_id=version_id, expires=2_000_000_000)
    assert url.startswith(f"{API_URL}{path}?")
    assert url == links.url(bucket, key, version_id=version_id, expires=2_000_000_000), "the same for the same request"
    opened = links.open(**parts(url))
    assert opened
    signed = parse_qs(urlsplit(opened).query)
    assert real in f"{urlsplit(opened).netloc}{urlsplit(opened).path}"
    assert signed.get("versionId") == ([version_id] if version_id else None)
    assert signed["X-Amz-Expires"] == ["300"]
    assert urlencode({"": signed["response-content-disposition"][0]}) == "=attachment"


def signature_of(method: str, url: str) -> str:
    """The signature of a presigned URL for a method, as S3 computes it.

    https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    del query["X-Amz-Signature"]
    canonical = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in sorted(query.items()))
    request = "\n".join([method, parts.path, canonical, f"host:{parts.netloc}", "", "host", "UNSIGNED-PAYLOAD"])
    scope = query["X-Amz-Credential"].partition("/")[2]
    digest = hashlib.sha256(request.encode()).hexdigest()
    signed = "\n".join(["AWS4-HMAC-SHA256", query["X-Amz-Date"], scope, digest])
    key = b"AWS4testing"
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.digest(key, signed.encode(), "sha256").hex()


@pytest.mark.parametrize("version_id", [None, "v1"])
def test_link_that_is_opened_with_head_leads_to_a_url_that_s3_takes_for_head(
    links: Links, version_id: str | None
) -> None:
    link = parts(links.url("inputs", "in/fox.png", version_id=version_id, expires=2_000_000_000))
    link["version_id"] = version_id
    get, head = links.open(**link), links.open(**link, for_head=True)
    assert get
    assert head
    # The signature is over the method: S3 refuses what is signed for GET to HEAD, whose response has no disposition.
    asked = {name: parse_qs(urlsplit(url).query) for name, url in (("get", get), ("head", head))}
    assert [asked["get"]["X-Amz-Signature"], asked["head"]["X-Amz-Signature"]] == [
        [signature_of("GET", get)], [signature_of("HEAD", head)],
    ]  # fmt: skip
    assert "response-content-disposition" in asked["get"]
    assert "response-content-disposition" not in asked["head"]
    assert asked["head"].get("versionId") == ([version_id] if version_id else None)
    assert links.open(**{**link, "signature": "0" * 64}, for_head=True) is None
