"""The clients of AWS: created once, whoever asks first."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import botocore.session
import pytest
from botocore.regions import EndpointResolver
from predictions.aws import clients

NEW_SESSION = clients._session.__wrapped__

# Every service that a function calls, as endpoints.json names it, by its name in botocore.
SERVICES = {
    "cloudformation": "cloudformation",
    "dynamodb": "dynamodb",
    "events": "events",
    "lambda": "lambda",
    "s3": "s3",
    "scheduler": "scheduler",
    "secretsmanager": "secretsmanager",
    "sqs": "sqs",
    "ssm": "ssm",
    "stepfunctions": "states",
}


def test_threads_that_ask_at_once_share_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    created = 0
    at_once = threading.Barrier(4)
    second = threading.Event()

    class Session(botocore.session.Session):
        def create_client(self, *args: Any, **options: Any) -> Any:
            nonlocal created
            created += 1
            if created > 1:
                second.set()
            second.wait(0.1)  # another thread has its chance to come in
            return super().create_client(*args, **options)

    def ask() -> object:
        at_once.wait()
        return clients.client("s3")

    monkeypatch.setattr(clients, "_session", Session)
    clients._client.cache_clear()
    try:
        with ThreadPoolExecutor(4) as pool:
            found = [asked.result() for asked in [pool.submit(ask) for _ in range(4)]]
    finally:
        clients._client.cache_clear()
    assert len({id(client) for client in found}) == 1
    assert created == 1


@pytest.mark.parametrize(
    ("region", "host"),
    [
        ("us-east-1", "s3.us-east-1.amazonaws.com"),
        ("eu-central-1", "s3.eu-central-1.amazonaws.com"),
        ("eu-south-2", "s3.eu-south-2.amazonaws.com"),  # opened after March 2019
        ("ap-southeast-4", "s3.ap-southeast-4.amazonaws.com"),
        ("us-gov-west-1", "s3.us-gov-west-1.amazonaws.com"),
        ("cn-north-1", "s3.cn-north-1.amazonaws.com.cn"),
    ],
)
def test_presigned_urls_lead_to_the_region_of_the_bucket(
    environment: None, monkeypatch: pytest.MonkeyPatch, region: str, host: str
) -> None:
    monkeypatch.setenv("AWS_REGION", region)
    monkeypatch.setenv("AWS_DEFAULT_REGION", region)
    for operation in ("get_object", "put_object", "head_object"):
        url = urlsplit(
            _fresh("s3", monkeypatch).generate_presigned_url(operation, Params={"Bucket": "b-1", "Key": "a/b"})
        )
        assert (url.scheme, url.netloc, url.path) == ("https", f"b-1.{host}", "/a/b")
        assert f"%2F{region}%2Fs3%2Faws4_request" in url.query


def test_presigned_urls_of_the_emulator_have_the_bucket_in_their_path(
    environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:4566")
    url = urlsplit(
        _fresh("s3", monkeypatch).generate_presigned_url("get_object", Params={"Bucket": "b-1", "Key": "a/b"})
    )
    assert (url.scheme, url.netloc, url.path) == ("http", "127.0.0.1:4566", "/b-1/a/b")


def _fresh(service: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of this process, made from the environment as it is now."""
    monkeypatch.setattr(clients, "_session", NEW_SESSION)
    clients._client.cache_clear()
    try:
        return clients.client(service)
    finally:
        clients._client.cache_clear()


def test_defaults_of_a_partition_are_what_endpoints_json_says_of_every_region() -> None:
    usual, lean = botocore.session.Session(), NEW_SESSION()
    theirs, ours = (
        EndpointResolver(session.get_component("data_loader").load_data("endpoints")) for session in (usual, lean)
    )
    partitions = usual.get_component("data_loader").load_data("endpoints")["partitions"]
    compared = 0
    for region, service in itertools.product(
        (name for each in partitions for name in each["regions"]), SERVICES.values()
    ):
        expected, found = (resolver.construct_endpoint(service, region) or {} for resolver in (theirs, ours))
        said = ("partition", "dnsSuffix", "hostname", "endpointName")
        assert {name: found[name] for name in said} == {name: expected[name] for name in said}
        if service != "s3":  # for which `_S3_CONFIG` says it
            assert found["signatureVersions"] == expected["signatureVersions"]
        compared += 1
    assert compared > 300


def test_clients_sign_and_send_as_those_of_a_usual_session(environment: None) -> None:
    usual, lean = botocore.session.get_session(), NEW_SESSION()
    for region, service in itertools.product(("us-east-1", "cn-north-1"), SERVICES):
        config = clients._S3_CONFIG if service == "s3" else clients._CONFIG
        expected, found = (created(session, service, region, config) for session in (usual, lean))
        for seen in ("endpoint_url", "partition", "region_name", "service_model.signing_name"):
            assert _at(found.meta, seen) == _at(expected.meta, seen)
        assert found.meta.config.signature_version == expected.meta.config.signature_version
        assert found._request_signer._signature_version == expected._request_signer._signature_version
        assert dir(found) == dir(expected)


def test_no_client_reads_the_endpoints_of_all_services(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    listed: list[str] = []

    class Files(clients._Files):
        def load_file(self, file_path: str) -> Any:
            opened.append(file_path)
            return super().load_file(file_path)

        def exists(self, file_path: str) -> bool:
            listed.append(file_path)
            return super().exists(file_path)

    monkeypatch.setattr(clients._Data, "FILE_LOADER_CLASS", Files)
    _fresh("dynamodb", monkeypatch)
    assert any(path.endswith("service-2") for path in opened)
    assert not [path for path in opened if path.endswith("endpoints")]
    assert all("/dynamodb/" in path for path in listed)


def created(session: Any, service: str, region: str, config: Any) -> Any:
    return session.create_client(service, region_name=region, config=config)


def _missing(*_: Any, **__: Any) -> Any:
    raise KeyError("outputs")


CHANGES: dict[str, tuple[Any, str, Any]] = {
    "its data are elsewhere": (clients._Data, "list_available_services", lambda *_: []),
    "its files have another suffix": (clients._Files, "load_file", lambda *_: None),
    "partitions are described otherwise": (clients, "_endpoints", _missing),
    "its loader is made otherwise": (clients._Data, "__init__", _missing),
}
"""What another version of botocore may do."""


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("service", ["dynamodb", "s3"])
def test_client_is_made_as_botocore_does_where_its_data_have_changed(
    change: tuple[Any, str, Any], service: str, environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _fresh(service, monkeypatch)
    monkeypatch.setattr(*change)
    found = _fresh(service, monkeypatch)
    assert not isinstance(found._loader, clients._Data)
    assert found.meta.endpoint_url == expected.meta.endpoint_url
    assert found.meta.config.read_timeout == expected.meta.config.read_timeout


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name)
    return value
