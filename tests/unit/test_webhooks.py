import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import moto  # before predictions: it must see every client being made
import pytest
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st
from predictions import aws
from predictions.webhooks import (
    MAX_BODY_BYTES,
    SignatureMismatch,
    SigningSecrets,
    SigningSecretUnavailable,
    WebhookRefused,
    sign,
    verify,
)

NOW = 1_700_000_000
BODY = b'{"id":"ufawqhfynnddngldkgtslldrkq","status":"succeeded"}'
SECRET = "whsec_" + base64.b64encode(bytes(range(24))).decode()
OTHER = "whsec_" + base64.b64encode(bytes(range(32))).decode()
THIRD = "whsec_" + base64.b64encode(bytes(range(64))).decode()
SIGNED = sign(BODY, webhook_id="msg_1", timestamp=NOW, secrets=[SECRET])
SIGNATURE = SIGNED["webhook-signature"]


def changed(**headers: Any) -> dict[str, Any]:
    return {**SIGNED, **{name.replace("_", "-"): value for name, value in headers.items()}}


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in SIGNED.items() if key != name}


REFUSED = {
    "no headers": {},
    "no id": without("webhook-id"),
    "no timestamp": without("webhook-timestamp"),
    "no signature": without("webhook-signature"),
    "id twice": {**SIGNED, "Webhook-Id": "msg_1"},
    "timestamp twice": {**SIGNED, "WEBHOOK-TIMESTAMP": str(NOW)},
    "signature twice": {**SIGNED, "Webhook-Signature": SIGNATURE},
    "id joined with another": changed(webhook_id="msg_1, msg_1"),
    "id not text": changed(webhook_id=None),
    "id empty": changed(webhook_id=""),
    "id with a dot": changed(webhook_id="msg.1"),
    "id with a space": changed(webhook_id="msg 1"),
    "id with a line end": changed(webhook_id="msg_1\n"),
    "id with a null": changed(webhook_id="msg_1\0"),
    "id not ASCII": changed(webhook_id="msg_é"),
    "id with a lone surrogate": changed(webhook_id="msg_\ud800"),
    "id of 257": changed(webhook_id="m" * 257),
    "id beyond any header": changed(webhook_id="m" * 1_000_000),
    "timestamp empty": changed(webhook_timestamp=""),
    "timestamp negative": changed(webhook_timestamp=f"-{NOW}"),
    "timestamp with a plus": changed(webhook_timestamp=f"+{NOW}"),
    "timestamp of a fraction": changed(webhook_timestamp=f"{NOW}.0"),
    "timestamp in e notation": changed(webhook_timestamp="1e9"),
    "timestamp in hexadecimal": changed(webhook_timestamp=hex(NOW)),
    "timestamp with an underscore": changed(webhook_timestamp="1_700_000_000"),
    "timestamp in Arabic digits": changed(webhook_timestamp="1\u0667\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660"),
    "timestamp with a superscript": changed(webhook_timestamp="170000000²"),
    "timestamp with a space": changed(webhook_timestamp=f" {NOW}"),
    "timestamp with a line end": changed(webhook_timestamp=f"{NOW}\n"),
    "timestamp nan": changed(webhook_timestamp="nan"),
    "timestamp infinite": changed(webhook_timestamp="inf"),
    "timestamp zero": changed(webhook_timestamp="0"),
    "timestamp with a leading zero": changed(webhook_timestamp=f"0{NOW}"),
    "timestamp in milliseconds": changed(webhook_timestamp=str(NOW * 1000)),
    "timestamp huge": changed(webhook_timestamp="9" * 5000),
    "timestamp an integer": changed(webhook_timestamp=NOW),
    "signature empty": changed(webhook_signature=""),
    "signature without version": changed(webhook_signature=SIGNATURE[3:]),
    "signature of version only": changed(webhook_signature="v1,"),
    "signature without comma": changed(webhook_signature=SIGNATURE.replace(",", "")),
    "signature of other versions only": changed(webhook_signature=f"v1a,abc v2,{SIGNATURE[3:]}"),
    "signature of no version": changed(webhook_signature=f"x1,{SIGNATURE[3:]}"),
    "signature not base64": changed(webhook_signature="v1,***"),
    "signature not ASCII": changed(webhook_signature="v1," + "é" * 44),
    "signature with a lone surrogate": changed(webhook_signature="v1,\udcff"),
    "signature without padding": changed(webhook_signature=SIGNATURE.rstrip("=")),
    "signature with more padding": changed(webhook_signature=SIGNATURE + "="),
    "signature too short": changed(webhook_signature="v1," + base64.b64encode(b"x" * 31).decode()),
    "signature too long": changed(webhook_signature="v1," + base64.b64encode(b"x" * 33).decode()),
    "signature of base64url": changed(webhook_signature="v1," + "-_" * 21 + "A="),
    "signature with a line end": changed(webhook_signature=SIGNATURE + "\n"),
    "signatures joined by a comma": changed(webhook_signature=f"{SIGNATURE}, {SIGNATURE}"),
    "signatures with two spaces": changed(webhook_signature=f"{SIGNATURE}  {SIGNATURE}"),
    "one signature malformed": changed(webhook_signature=f"{SIGNATURE} v1,abc"),
    "nine signatures": changed(webhook_signature=" ".join([SIGNATURE] * 9)),
    "a header of other versions beyond measure": changed(webhook_signature=f"{SIGNATURE} v2,{'A' * 4000}"),
}


@pytest.mark.parametrize("headers", REFUSED.values(), ids=REFUSED.keys())
def test_malformed_headers_are_refused(headers: dict[str, str]) -> None:
    with pytest.raises(WebhookRefused) as refusal:
        verify(BODY, headers, [SECRET], NOW)
    assert not isinstance(refusal.value, SignatureMismatch)
    assert refusal.value.reason.isascii()
    assert not any(str(value) in refusal.value.reason for value in headers.values() if len(str(value)) > 4)


@pytest.mark.parametrize("seconds", [-301, 300.5, 301, 86400, -1e18, 1e18])
def test_a_stale_or_future_timestamp_is_refused(seconds: float) -> None:
    with pytest.raises(WebhookRefused, match="too far from the present"):
        verify(BODY, SIGNED, [SECRET], NOW + seconds)


@pytest.mark.parametrize("seconds", [-300, 0, 299.9, 300])
def test_a_timestamp_within_five_minutes_is_taken(seconds: float) -> None:
    verify(BODY, SIGNED, [SECRET], NOW + seconds)


@pytest.mark.parametrize(
    ("body", "headers", "secrets"),
    [
        (BODY + b" ", SIGNED, [SECRET]),
        (b"", SIGNED, [SECRET]),
        (b"\xff\xfe\x00", SIGNED, [SECRET]),
        (BODY, changed(webhook_id="msg_2"), [SECRET]),
        (BODY, changed(webhook_timestamp=str(NOW + 1)), [SECRET]),
        (BODY, SIGNED, [OTHER]),
        (BODY, SIGNED, [OTHER, THIRD]),
    ],
    ids=[
        "body longer",
        "body empty",
        "body not text",
        "other id",
        "other timestamp",
        "other secret",
        "other secrets",
    ],
)
def test_what_was_not_signed_is_a_mismatch(body: bytes, headers: dict[str, str], secrets: list[str]) -> None:
    with pytest.raises(SignatureMismatch):
        verify(body, headers, secrets, NOW)


def test_a_body_over_the_limit_is_refused_even_if_signed() -> None:
    body = b"x" * (MAX_BODY_BYTES + 1)
    signed = sign(body, webhook_id="msg_1", timestamp=NOW, secrets=[SECRET])
    with pytest.raises(WebhookRefused, match="too large"):
        verify(body, signed, [SECRET], NOW)
    verify(body[:-1], sign(body[:-1], webhook_id="m", timestamp=NOW, secrets=[SECRET]), [SECRET], NOW)


def test_a_dot_cannot_be_moved_between_id_timestamp_and_body() -> None:
    """Id `a`, timestamp `1700000000`, body `1700000001.x` are signed as id `a.1700000000` and so on would."""
    signed = sign(b"1700000001.x", webhook_id="a", timestamp=NOW, secrets=[SECRET])
    moved = {**signed, "webhook-id": "a.1700000000", "webhook-timestamp": "1700000001"}
    with pytest.raises(WebhookRefused):
        verify(b"x", moved, [SECRET], NOW)


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "whsec_",
        SECRET.removeprefix("whsec_"),
        f" {SECRET}",
        f"{SECRET}\n",
        "whsec_***",
        "whsec_é",
        SECRET[:-1],
        "whsec_" + base64.b64encode(b"x" * 23).decode(),
        "whsec_" + base64.b64encode(b"x" * 65).decode(),
        None,
        b"whsec_",
    ],
)
def test_a_malformed_secret_is_our_fault_and_is_not_shown(secret: Any) -> None:
    for secrets in ([secret], [SECRET, secret]):
        with pytest.raises(SigningSecretUnavailable) as fault:
            verify(BODY, SIGNED, secrets, NOW)
        assert not isinstance(fault.value, WebhookRefused)
        assert "***" not in str(fault.value)
        assert SECRET not in str(fault.value)
        with pytest.raises(SigningSecretUnavailable):
            sign(BODY, webhook_id="msg_1", timestamp=NOW, secrets=secrets)


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


# Published with Standard Webhooks' libraries and with Svix's: https://github.com/standard-webhooks/standard-webhooks
VECTORS = [
    (
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
        "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    ),
    (
        "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",
        "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk",
        1649367553,
        b'{"email":"test@example.com","username":"test_user"}',
        "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw=",
    ),
]


@pytest.mark.parametrize(("secret", "webhook_id", "timestamp", "body", "signature"), VECTORS)
def test_a_published_vector_is_verified_and_made(
    secret: str, webhook_id: str, timestamp: int, body: bytes, signature: str
) -> None:
    headers = {"Webhook-ID": webhook_id, "WEBHOOK-TIMESTAMP": str(timestamp), "webhook-Signature": signature}
    verify(body, headers, [secret], timestamp)
    made = sign(body, webhook_id=webhook_id, timestamp=timestamp, secrets=[secret])
    assert made == {name.lower(): value for name, value in headers.items()}


@pytest.mark.parametrize("secrets", [[SECRET], [OTHER, SECRET], [SECRET, OTHER], [THIRD, OTHER, SECRET]])
@pytest.mark.parametrize(
    "signature",
    [
        SIGNATURE,
        f"v1,{'A' * 43}= {SIGNATURE}",
        f"{SIGNATURE} v1,{'A' * 43}=",
        f"v1a,anything {SIGNATURE} v2,more",
        " ".join([*[f"v1,{'A' * 43}="] * 7, SIGNATURE]),
    ],
)
def test_one_right_signature_of_one_valid_secret_suffices(secrets: list[str], signature: str) -> None:
    verify(BODY, changed(webhook_signature=signature), secrets, NOW)


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


@given(st.data())
def test_a_single_changed_byte_anywhere_is_refused(data: st.DataObject) -> None:
    # As they come from a socket: bytes that HTTP servers show as Latin-1 text.
    parts = [BODY, *(value.encode() for value in SIGNED.values())]
    part = data.draw(st.integers(0, len(parts) - 1))
    position = data.draw(st.integers(0, len(parts[part]) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte != parts[part][position]))
    parts[part] = parts[part][:position] + bytes([value]) + parts[part][position + 1 :]
    headers = dict(zip(SIGNED, (value.decode("latin-1") for value in parts[1:]), strict=True))
    with pytest.raises(WebhookRefused):
        verify(parts[0], headers, [SECRET, OTHER], NOW)


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
        aws.client("secretsmanager").put_secret_value(SecretId=self.arn, SecretString=value)
        self.calls.clear()

    def put_document(self, current: str, previous: str | None, rotated_at: float) -> None:
        moment = datetime.fromtimestamp(rotated_at, UTC).isoformat().replace("+00:00", "Z")
        self.put(json.dumps({"current": current, "previous": previous, "rotated_at": moment}))

    def document(self) -> dict[str, Any]:
        value = aws.client("secretsmanager").get_secret_value(SecretId=self.arn)
        document: dict[str, Any] = json.loads(value["SecretString"])
        return document


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Iterator[SecretsManager]:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with moto.mock_aws():
        client = aws.client("secretsmanager")
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
    monkeypatch.setenv("SIGNING_SECRET_ARN", aws.client("secretsmanager").create_secret(Name="empty")["ARN"])
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
