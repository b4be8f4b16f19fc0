import base64
import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from botocore.exceptions import ClientError
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from predictions.aws import clients
from predictions.cli.__main__ import main
from predictions.files.outputs_bucket import OutputsBucket
from predictions.files.signed_urls import Distribution, PrivateKey
from predictions.views.prediction import Presenter

from tests.support.fakes import Clock

KEY = rsa.generate_private_key(65537, 2048)
PRIVATE = PrivateKey(KEY.private_numbers().p, KEY.private_numbers().q, 65537)
FILE = "alice/phbiy2aqvath546nlxzgyq5c3q/ufawqhfynnddngldkgtslldrkq/0"


def distribution(clock: Clock, key: PrivateKey = PRIVATE) -> Distribution:
    return Distribution("d111.cloudfront.net", "K2JCJMDEHXQW5F", lambda: key, now=clock.now)


def opened(url: str, public_key: Any = None) -> tuple[str, int]:
    """What the URL's signature allows, and until when; checked as CloudFront does.

    Raises:
        InvalidSignature: It is not this key's.
    """
    query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
    assert query.keys() == {"Policy", "Signature", "Key-Pair-Id"}
    assert query["Key-Pair-Id"] == "K2JCJMDEHXQW5F"
    policy, signature = (
        base64.b64decode(query[name].replace("-", "+").replace("_", "=").replace("~", "/"))
        for name in ("Policy", "Signature")
    )
    (public_key or KEY.public_key()).verify(signature, policy, PKCS1v15(), SHA1())  # noqa: S303  # CloudFront's choice
    (statement,) = json.loads(policy)["Statement"]
    assert statement["Condition"].keys() == {"DateLessThan"}
    return statement["Resource"], statement["Condition"]["DateLessThan"]["AWS:EpochTime"]


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"p": "zz", "q": "3", "e": "5"}', "-----BEGIN PRIVATE KEY"])
def test_a_secret_that_is_no_key_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="holds no key") as refused:
        PrivateKey.from_json(text)
    assert refused.value.__suppress_context__


def test_a_damaged_key_signs_nothing() -> None:
    with pytest.raises(ArithmeticError, match="damaged"):
        PrivateKey(PRIVATE.p, PRIVATE.q + 2, 65537).sign_sha1(b"policy")


def test_a_signature_of_another_key_does_not_verify(clock: Clock) -> None:
    other = rsa.generate_private_key(65537, 2048)
    with pytest.raises(InvalidSignature):
        opened(distribution(clock).url(FILE, 3600), other.public_key())


def test_a_key_is_not_shown() -> None:
    assert str(PRIVATE.p) not in repr(PRIVATE)
    assert PrivateKey.from_json(PRIVATE.to_json()) == PRIVATE


@pytest.mark.parametrize("message", [b"", b"policy", bytes(100_000)])
def test_a_signature_is_the_one_that_a_proven_library_makes(message: bytes) -> None:
    expected = KEY.sign(message, PKCS1v15(), SHA1())  # noqa: S303  # CloudFront's choice
    assert PRIVATE.sign_sha1(message) == expected
    assert PRIVATE.sign_sha1(message) == expected, "whatever it was blinded with"


@pytest.mark.parametrize("seconds", [60, 3600, 21600])
def test_a_url_opens_one_predictions_files_for_its_time_and_at_most_a_quarter_more(clock: Clock, seconds: int) -> None:
    for _ in range(10):
        url = distribution(clock).url(FILE, seconds)
        resource, until = opened(url)
        assert resource == f"https://d111.cloudfront.net/{FILE[:-2]}/*"
        assert url.startswith(f"https://d111.cloudfront.net/{FILE}?")
        assert seconds <= until - int(clock.now()) <= seconds * 1.25
        clock.advance(seconds / 7)


def test_a_page_that_is_asked_for_again_costs_one_signature_for_each_prediction(clock: Clock) -> None:
    asked = []

    def key() -> PrivateKey:
        asked.append(1)
        return PRIVATE

    served = Distribution("d111.cloudfront.net", "K2JCJMDEHXQW5F", key, now=clock.now)
    assert asked == [], "a function that shows no file does not read the secret"
    first = [served.url(f"{FILE[:-1]}{index}", 3600) for index in range(4)]
    signatures = {parse_qs(urlsplit(url).query)["Signature"][0] for url in first}
    assert (len(signatures), asked) == (1, [1])
    clock.advance(3600)
    renewed = served.url(FILE, 3600)
    assert renewed != first[0]
    assert opened(renewed)[1] > clock.now() + 3599
    assert asked == [1]


def test_an_operators_key_pair_signs_what_its_public_key_verifies(
    cloud: None, clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["urls", "keys", "--stack", "team"]) == 0
    told = capsys.readouterr()
    parameters = json.loads(told.out)
    assert parameters.keys() == {"OutputUrls", "OutputUrlPublicKey", "OutputUrlSecretArn"}
    secret = clients.client("secretsmanager").get_secret_value(SecretId=parameters["OutputUrlSecretArn"])
    assert secret["Name"] == "team/output-urls"
    kept = PrivateKey.from_json(secret["SecretString"])
    assert f"{kept.p:x}" not in told.out + told.err
    monkeypatch.setenv("OUTPUT_URL_DOMAIN", "d111.cloudfront.net")
    monkeypatch.setenv("OUTPUT_URL_KEY_ID", "K2JCJMDEHXQW5F")
    monkeypatch.setenv("OUTPUT_URL_SECRET_ARN", parameters["OutputUrlSecretArn"])
    served = Distribution.from_env()
    assert served
    opened(served.url(FILE, 3600), load_pem_public_key(parameters["OutputUrlPublicKey"].encode()))


def test_a_damaged_secret_is_read_again_at_the_next_url(cloud: None, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = clients.client("secretsmanager")
    secret = secrets.create_secret(Name="output-urls", SecretString="damaged")["ARN"]
    monkeypatch.setenv("OUTPUT_URL_DOMAIN", "d111.cloudfront.net")
    monkeypatch.setenv("OUTPUT_URL_SECRET_ARN", secret)
    served = Distribution.from_env()
    assert served
    with pytest.raises(ValueError, match="no key"):
        served.url(FILE, 3600)
    secrets.put_secret_value(SecretId=secret, SecretString=PRIVATE.to_json())
    assert served.url(FILE, 3600)


def test_a_second_key_pair_does_not_replace_the_first(cloud: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["urls", "keys", "--stack", "team"]) == 0
    secrets = clients.client("secretsmanager")
    before = secrets.get_secret_value(SecretId="team/output-urls")["SecretString"]
    capsys.readouterr()
    assert main(["urls", "keys", "--stack", "team"]) == 2
    told = capsys.readouterr()
    assert (told.out, "team/output-urls exists" in told.err) == ("", True)
    assert secrets.get_secret_value(SecretId="team/output-urls")["SecretString"] == before


def test_without_a_distribution_urls_are_presigned(cloud: None) -> None:
    assert Distribution.from_env() is None
    url = Presenter.from_env().link(FILE)
    assert "X-Amz-Signature" in parse_qs(urlsplit(url).query)


def test_a_key_that_cannot_be_read_is_an_error_and_not_another_url(
    cloud: None, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTPUT_URL_DOMAIN", "d111.cloudfront.net")
    monkeypatch.setenv("OUTPUT_URL_SECRET_ARN", "nothing")
    served = Distribution.from_env()
    presenter = Presenter(OutputsBucket("outputs"), 3600, served)
    with pytest.raises(ClientError, match="ResourceNotFound"):
        presenter.link(FILE)
