"""The owners' secrets: their own, the same each time, and rotated with an overlap."""

import base64

import pytest
from botocore.exceptions import ClientError
from predictions.aws import clients
from predictions.aws.secrets import SecretTooShort
from predictions.net.signatures import sign, verify
from predictions.notifications.signing_secrets import (
    OwnerSecrets,
    RotatedRecently,
    SecretVersion,
    SecretVersions,
)

from tests.support.fakes import Clock, answers_lost

DAY = 24 * 3600


@pytest.fixture
def versions(cloud: None) -> SecretVersions:
    return SecretVersions.from_env()


@pytest.fixture
def secrets(versions: SecretVersions, clock: Clock) -> OwnerSecrets:
    return OwnerSecrets(versions, "webhook-master", clients.client("secretsmanager"), clock.now)


def set_master(value: str) -> None:
    clients.client("secretsmanager").put_secret_value(SecretId="webhook-master", SecretString=value)


def test_master_that_is_too_short_makes_no_secret(secrets: OwnerSecrets) -> None:
    set_master("short")
    with pytest.raises(SecretTooShort) as error:
        secrets.current_secret("alice")
    assert "short" not in str(error.value).replace("too short", "")


def test_master_that_cannot_be_read_is_said_and_read_again(secrets: OwnerSecrets) -> None:
    secretsmanager = clients.client("secretsmanager")
    secretsmanager.delete_secret(SecretId="webhook-master", ForceDeleteWithoutRecovery=True)
    with pytest.raises(ClientError):
        secrets.current_secret("alice")
    secretsmanager.create_secret(Name="webhook-master", SecretString="m" * 64)
    assert secrets.current_secret("alice")


def test_second_rotation_within_a_day_is_refused_and_changes_nothing(
    versions: SecretVersions, secrets: OwnerSecrets, clock: Clock
) -> None:
    versions.rotate("alice", clock.now())
    before = secrets.valid_secrets("alice", clock.now())
    clock.advance(DAY - 1)
    with pytest.raises(RotatedRecently, match="--force"):
        versions.rotate("alice", clock.now())
    assert secrets.valid_secrets("alice", clock.now()) == before


def test_owners_have_different_secrets_which_stay_the_same(secrets: OwnerSecrets, clock: Clock) -> None:
    found = {owner: secrets.current_secret(owner) for owner in ("alice", "bob", "1", "11")}
    assert len(set(found.values())) == 4
    assert {owner: secrets.current_secret(owner) for owner in found} == found
    for secret in found.values():
        assert len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32
        verify(b"{}", sign(b"{}", webhook_id="m", timestamp=int(clock.now()), secrets=[secret]), [secret], clock.now())


def test_another_master_makes_other_secrets_within_minutes(secrets: OwnerSecrets, clock: Clock) -> None:
    before = secrets.current_secret("alice")
    set_master("n" * 64)
    assert secrets.current_secret("alice") == before
    clock.advance(301)
    assert secrets.current_secret("alice") != before


def test_old_secret_signs_for_a_day_after_a_rotation(
    versions: SecretVersions, secrets: OwnerSecrets, clock: Clock
) -> None:
    old, bobs = secrets.current_secret("alice"), secrets.current_secret("bob")
    assert secrets.valid_secrets("alice", clock.now()) == [old]
    assert versions.rotate("alice", clock.now()) == SecretVersion(2, int(clock.now()))
    new = secrets.current_secret("alice")
    assert new != old
    assert secrets.valid_secrets("alice", clock.now()) == [new, old]
    clock.advance(DAY)
    assert secrets.valid_secrets("alice", clock.now()) == [new]
    assert secrets.current_secret("bob") == bobs


def test_forced_rotation_ends_the_secret_before_the_last(
    versions: SecretVersions, secrets: OwnerSecrets, clock: Clock
) -> None:
    first = secrets.current_secret("alice")
    versions.rotate("alice", clock.now())
    second = secrets.current_secret("alice")
    assert versions.rotate("alice", clock.now(), force=True).version == 3
    assert secrets.valid_secrets("alice", clock.now()) == [secrets.current_secret("alice"), second]
    assert first not in secrets.valid_secrets("alice", clock.now())


def test_rotation_whose_answer_is_lost_counts_once(versions: SecretVersions, clock: Clock) -> None:
    with answers_lost() as lost:
        assert versions.rotate("alice", clock.now()).version == 2
    assert "PutItem" in lost
    assert versions.version_of("alice") == SecretVersion(2, int(clock.now()))
