import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st
from predictions.aws import clients
from predictions.net.signatures import SignatureMismatch, SigningSecretUnavailable, WebhookRefused, sign, verify
from predictions.upstream.signing_secret import SigningSecrets

from tests.support.quick_aws import mocked

NOW = 1_700_000_000
BODY = b'{"id":"ufawqhfynnddngldkgtslldrkq","status":"succeeded"}'
SECRET = "whsec_" + base64.b64encode(bytes(range(24))).decode()
OTHER = "whsec_" + base64.b64encode(bytes(range(32))).decode()
THIRD = "whsec_" + base64.b64encode(bytes(range(64))).decode()
SIGNED = sign(BODY, webhook_id="msg_1", timestamp=NOW, secrets=[SECRET])


def test_no_secret_at_all_is_our_fault() -> None:
    with pytest.raises(SigningSecretUnavailable):
        verify(BODY, SIGNED, [], NOW)
    with pytest.raises(SigningSecretUnavailable):
        sign(BODY, webhook_id="msg_1", timestamp=NOW, secrets=[])


@pytest.mark.parametrize(
    ("webhook_id", "timestamp", "count"),
    [("msg.1", NOW, 1), ("", NOW, 1), ("m", 0, 1), ("m", -1, 1), ("m", NOW, 9)],
)
def test_what_no_receiver_would_take_is_not_signed(webhook_id: str, timestamp: int, count: int) -> None:
    with pytest.raises(ValueError, match="Not to be signed"):
        sign(BODY, webhook_id=webhook_id, timestamp=timestamp, secrets=[SECRET] * count)


def test_what_two_secrets_sign_is_verified_by_either() -> None:
    signed = sign(BODY, webhook_id="msg_1", timestamp=NOW, secrets=[SECRET, OTHER])
    verify(BODY, signed, [SECRET], NOW)
    verify(BODY, signed, [OTHER], NOW)
    with pytest.raises(SignatureMismatch):
        verify(BODY, signed, [THIRD], NOW)


@given(
    body=st.binary(max_size=200),
    webhook_id=st.from_regex(r"[A-Za-z0-9_-]{1,256}", fullmatch=True),
    timestamp=st.integers(1, 999_999_999_999),
    age=st.integers(-300, 300),
)
def test_whatever_is_signed_is_verified(body: bytes, webhook_id: str, timestamp: int, age: int) -> None:
    signed = sign(body, webhook_id=webhook_id, timestamp=timestamp, secrets=[OTHER])
    verify(body, signed, [SECRET, OTHER], timestamp + age)


@given(
    body=st.binary(max_size=50),
    headers=st.dictionaries(
        st.one_of(st.sampled_from([*SIGNED, *(name.title() for name in SIGNED)]), st.text()),
        st.one_of(st.text(), st.sampled_from(list(SIGNED.values())), st.none(), st.integers()),
    ),
)
def test_anything_at_all_is_refused_and_raises_nothing_else(body: bytes, headers: dict[str, Any]) -> None:
    with pytest.raises(WebhookRefused):
        verify(body, headers, [SECRET], NOW)


# ---- Replicate's secret in Secrets Manager


class SecretsManager:
    """The one secret: counts the calls that the code under test makes, and can be out of order."""

    def __init__(self, arn: str) -> None:
        self.arn = arn
        self.calls: list[str] = []
        self.down = False

    @property
    def reads(self) -> int:
        return self.calls.count("GetSecretValue")

    def secrets(self) -> SigningSecrets:
        """As in a function that has just started."""
        return SigningSecrets.from_env()

    def put(self, value: str) -> None:
        clients.client("secretsmanager").put_secret_value(SecretId=self.arn, SecretString=value)
        self.calls.clear()

    def put_document(self, current: str, previous: str | None, rotated_at: float) -> None:
        moment = datetime.fromtimestamp(rotated_at, UTC).isoformat().replace("+00:00", "Z")
        self.put(json.dumps({"current": current, "previous": previous, "rotated_at": moment}))

    def document(self) -> dict[str, Any]:
        value = clients.client("secretsmanager").get_secret_value(SecretId=self.arn)
        document: dict[str, Any] = json.loads(value["SecretString"])
        return document


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Iterator[SecretsManager]:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mocked():
        client = clients.client("secretsmanager")
        fake = SecretsManager(client.create_secret(Name="signing", SecretString="{}")["ARN"])
        monkeypatch.setenv("SIGNING_SECRET_ARN", fake.arn)

        def observe(model: Any, **kwargs: Any) -> None:
            fake.calls.append(model.name)
            if fake.down:
                raise ClientError({"Error": {"Code": "InternalServiceError", "Message": "down"}}, model.name)

        events = client.meta.events
        events.register("before-call.secrets-manager.*", observe)
        yield fake
        events.unregister("before-call.secrets-manager.*", observe)


def test_a_missing_variable_fails_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIGNING_SECRET_ARN", raising=False)
    with pytest.raises(KeyError, match="SIGNING_SECRET_ARN"):
        SigningSecrets.from_env()


@pytest.mark.parametrize(
    "value",
    [
        "{}",
        "[]",
        "null",
        "not json",
        '{"current": null}',
        '{"current": ""}',
        '{"current": "whsec_short"}',
        '{"current": ["whsec_"]}',
    ],
)
def test_no_usable_secret_is_unavailable_until_one_is_stored(stored: SecretsManager, value: str) -> None:
    stored.put(value)
    secrets = stored.secrets()
    with pytest.raises(SigningSecretUnavailable, match="holds no signing secret"):
        secrets.current(NOW)
    with pytest.raises(SigningSecretUnavailable):
        secrets.verify(BODY, SIGNED, NOW)
    assert stored.secrets().store(SECRET, NOW)
    assert secrets.current(NOW + 5) == [SECRET]


def test_a_secret_without_any_version_is_unavailable_and_can_be_stored(
    stored: SecretsManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGNING_SECRET_ARN", clients.client("secretsmanager").create_secret(Name="empty")["ARN"])
    with pytest.raises(SigningSecretUnavailable):
        stored.secrets().current(NOW)
    assert stored.secrets().store(SECRET, NOW)
    assert stored.secrets().current(NOW) == [SECRET]


def test_a_secret_that_does_not_exist_is_said_when_storing(
    stored: SecretsManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGNING_SECRET_ARN", stored.arn + "x")
    with pytest.raises(ClientError, match="ResourceNotFoundException"):
        stored.secrets().store(SECRET, NOW)


def test_secrets_manager_out_of_order_is_unavailable_and_asked_rarely(stored: SecretsManager) -> None:
    stored.put_document(SECRET, None, NOW)
    stored.down = True
    secrets = stored.secrets()
    for _ in range(3):
        with pytest.raises(SigningSecretUnavailable):
            secrets.verify(BODY, SIGNED, NOW)
    assert stored.reads == 1
    stored.down = False
    secrets.verify(BODY, SIGNED, NOW + 5)


def test_strangers_before_the_first_secret_cause_a_read_each_five_seconds(stored: SecretsManager) -> None:
    secrets = stored.secrets()
    for tenths in range(100):
        with pytest.raises(SigningSecretUnavailable):
            secrets.verify(BODY, SIGNED, NOW + tenths / 10)
    assert stored.reads == 2


def test_genuine_webhooks_cause_a_read_each_five_minutes(stored: SecretsManager) -> None:
    stored.put_document(SECRET, None, NOW)
    secrets = stored.secrets()
    for second in (0, 1, 100, 299.9):
        secrets.verify(BODY, SIGNED, NOW + second)
    assert stored.reads == 1
    assert secrets.current(NOW + 300) == [SECRET]
    assert stored.reads == 2


def test_forged_webhooks_cause_a_read_each_thirty_seconds(stored: SecretsManager) -> None:
    stored.put_document(OTHER, None, NOW)
    secrets = stored.secrets()
    for second in range(60):
        with pytest.raises(SignatureMismatch):
            secrets.verify(BODY, SIGNED, NOW + second)
    assert stored.reads == 2


def test_malformed_webhooks_cause_no_further_read(stored: SecretsManager) -> None:
    stored.put_document(SECRET, None, NOW)
    secrets = stored.secrets()
    for second in range(0, 299, 10):
        with pytest.raises(WebhookRefused):
            secrets.verify(BODY, {}, NOW + second)
    assert stored.reads == 1


def test_the_first_webhook_of_a_new_secret_is_verified_by_reading_again(stored: SecretsManager) -> None:
    stored.put_document(OTHER, None, NOW - 60)
    secrets = stored.secrets()
    assert secrets.current(NOW - 60) == [OTHER]
    stored.put_document(SECRET, OTHER, NOW)
    secrets.verify(BODY, SIGNED, NOW)
    assert stored.reads == 1


@pytest.mark.parametrize(
    ("age_seconds", "expected"),
    [(0, [SECRET, OTHER]), (86399, [SECRET, OTHER]), (86400, [SECRET]), (10**6, [SECRET])],
)
def test_the_previous_secret_is_believed_for_a_day(
    stored: SecretsManager, age_seconds: int, expected: list[str]
) -> None:
    stored.put_document(SECRET, OTHER, NOW - age_seconds)
    assert stored.secrets().current(NOW) == expected


def test_the_day_of_overlap_ends_although_the_document_is_cached(stored: SecretsManager) -> None:
    stored.put_document(SECRET, OTHER, NOW - 86390)
    secrets = stored.secrets()
    assert secrets.current(NOW) == [SECRET, OTHER]
    assert secrets.current(NOW + 10) == [SECRET]
    assert stored.reads == 1


@pytest.mark.parametrize(
    ("previous", "rotated_at"),
    [("whsec_x", "2023-11-14T22:13:20Z"), (OTHER, "yesterday"), (OTHER, None), (None, 5)],
)
def test_a_senseless_previous_secret_is_not_believed(stored: SecretsManager, previous: Any, rotated_at: Any) -> None:
    stored.put(json.dumps({"current": SECRET, "previous": previous, "rotated_at": rotated_at}))
    assert stored.secrets().current(NOW) == [SECRET]


@pytest.mark.parametrize("secret", ["", "{}", "whsec_", "r8_token", "whsec_short"])
def test_storing_something_else_than_a_secret_writes_nothing(stored: SecretsManager, secret: str) -> None:
    stored.put_document(SECRET, None, NOW)
    with pytest.raises(SigningSecretUnavailable):
        stored.secrets().store(secret, NOW)
    assert stored.calls == []


def test_storing_the_same_secret_again_writes_nothing(stored: SecretsManager) -> None:
    secrets = stored.secrets()
    assert secrets.store(SECRET, NOW)
    assert stored.document() == {
        "current": SECRET,
        "previous": None,
        "rotated_at": "2023-11-14T22:13:20+00:00",
    }
    stored.calls.clear()
    assert not secrets.store(SECRET, NOW + 60)
    assert not stored.secrets().store(SECRET, NOW + 120)
    assert stored.calls == ["GetSecretValue", "GetSecretValue"]


def test_storing_a_new_secret_keeps_the_former_as_previous(stored: SecretsManager) -> None:
    secrets = stored.secrets()
    secrets.store(SECRET, NOW - 3600)
    assert secrets.current(NOW - 3600) == [SECRET]
    assert secrets.store(OTHER, NOW)
    assert secrets.current(NOW) == [OTHER, SECRET]
    assert stored.secrets().current(NOW + 86399) == [OTHER, SECRET]
    assert stored.secrets().current(NOW + 86400) == [OTHER]


def test_a_late_writer_of_the_former_secret_leaves_both_valid(stored: SecretsManager) -> None:
    stored.secrets().store(SECRET, NOW)
    stored.secrets().store(OTHER, NOW + 60)
    stored.secrets().store(SECRET, NOW + 61)  # It had asked Replicate before the rotation.
    assert set(stored.secrets().current(NOW + 61)) == {SECRET, OTHER}
    stored.secrets().store(OTHER, NOW + 120)
    assert stored.secrets().current(NOW + 120) == [OTHER, SECRET]
