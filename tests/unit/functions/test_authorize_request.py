import hashlib
import importlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from predictions.admission.quotas import OwnerLimits, OwnersLimits
from predictions.api.access_tokens import AccessTokens
from predictions.aws import clients

from tests.support.quick_aws import mocked

EVENTS = Path(__file__).parents[3] / "events" / "authorize_request"
SAMPLE_TOKEN = "rs_" + "A" * 43
STAGE = "arn:aws:execute-api:us-east-1:123456789012:abcdef1234/v1"

Handler = Callable[[dict[str, Any], object], dict[str, Any]]


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Handler]:
    """The handler of a function that has just started, with the token of the event samples in its table."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("TABLE_NAME", "predictions")
    with mocked():
        client = clients.client("dynamodb")
        client.create_table(
            TableName="predictions",
            BillingMode="PAY_PER_REQUEST",
            KeySchema=[
                {"AttributeName": "pk", "KeyType": "HASH"},
                {"AttributeName": "sk", "KeyType": "RANGE"},
            ],
            AttributeDefinitions=[
                {"AttributeName": "pk", "AttributeType": "S"},
                {"AttributeName": "sk", "AttributeType": "S"},
            ],
        )
        client.put_item(
            TableName="predictions",
            Item={
                "pk": {"S": "tokens"},
                "sk": {"S": hashlib.sha256(SAMPLE_TOKEN.encode()).hexdigest()},
                "owner": {"S": "alice"},
                "scopes": {"SS": ["predict", "read"]},
                "name": {"S": "samples"},
                "created_at": {"S": "2024-01-01T00:00:00+00:00"},
                "token_hint": {"S": "AAAA"},
            },
        )
        app: Any = importlib.reload(importlib.import_module("functions.authorize_request.app"))
        yield app.handler


def sample(name: str) -> dict[str, Any]:
    event: dict[str, Any] = json.loads((EVENTS / f"{name}.json").read_text())
    return event


ALLOWED = {"bearer_token", "token_scheme"}
REFUSED = {"unknown_token", "replicate_token", "basic_scheme", "without_scheme"}


def test_every_sample_is_expected_to_be_allowed_or_refused() -> None:
    assert {path.stem for path in EVENTS.glob("*.json")} == ALLOWED | REFUSED


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_sample_is_answered_401(handler: Handler, name: str) -> None:
    with pytest.raises(Exception, match=r"^Unauthorized$") as refusal:
        handler(sample(name), None)
    assert refusal.type is Exception


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer \x00", "Bearer " + "A" * 10_000, "\ud800", None])
def test_a_hostile_header_is_answered_401(handler: Handler, authorization: Any) -> None:
    with pytest.raises(Exception, match=r"^Unauthorized$"):
        handler({**sample("bearer_token"), "authorizationToken": authorization}, None)


def test_a_missing_header_is_answered_401(handler: Handler) -> None:
    with pytest.raises(Exception, match=r"^Unauthorized$"):
        handler({"type": "TOKEN", "methodArn": f"{STAGE}/GET/predictions"}, None)


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_an_allowed_sample_may_call_the_whole_stage_as_its_owner(handler: Handler, name: str) -> None:
    answer = handler(sample(name), None)
    assert answer == {
        "principalId": "alice",
        "policyDocument": {
            "Version": "2012-10-17",
            "Statement": [{"Action": "execute-api:Invoke", "Effect": "Allow", "Resource": f"{STAGE}/*"}],
        },
        "context": {
            "owner": "alice",
            "scopes": "predict read",
            "token_id": hashlib.sha256(SAMPLE_TOKEN.encode()).hexdigest()[:12],
        },
    }
    # API Gateway takes no lists or objects in the context.
    assert all(isinstance(value, str) for value in answer["context"].values())


@pytest.mark.parametrize(
    "resource", ["GET/", "GET/predictions/*", "POST/models/a/b/predictions", "GET/../../prod/GET/x"]
)
def test_the_route_cannot_widen_the_policy(handler: Handler, resource: str) -> None:
    answer = handler({**sample("bearer_token"), "methodArn": f"{STAGE}/{resource}"}, None)
    assert answer["policyDocument"]["Statement"][0]["Resource"] == f"{STAGE}/*"


def test_a_created_token_is_allowed_until_it_is_revoked(handler: Handler) -> None:
    tokens = AccessTokens.from_env()
    token, access = tokens.create("bob", ["manage"])
    event = {**sample("bearer_token"), "authorizationToken": f"Bearer {token}"}
    assert handler(event, None)["context"] == {"owner": "bob", "scopes": "manage", "token_id": access.id}
    tokens.revoke(access.id)
    with pytest.raises(Exception, match=r"^Unauthorized$"):
        handler(event, None)


def test_limits_of_the_owner_are_passed_on_as_texts(handler: Handler) -> None:
    limits = OwnersLimits("predictions", clients.client("dynamodb"))
    for given, passed in (
        (OwnerLimits(in_flight=20, per_day=0), {"in_flight_limit": "20", "per_day_limit": "0"}),
        (OwnerLimits(per_day=7), {"per_day_limit": "7"}),
        (OwnerLimits(open_batches=0, open_pipelines=9), {"open_batches_limit": "0", "open_pipelines_limit": "9"}),
    ):
        limits.remove_limits("alice")
        limits.set_limits("alice", given)
        context = handler(sample("bearer_token"), None)["context"]
        assert context.items() >= passed.items()
        assert OwnerLimits.of_context(context) == given
        assert len(context) == 3 + len(passed)


def test_a_table_that_cannot_be_read_is_not_answered_401(handler: Handler) -> None:
    clients.client("dynamodb").delete_table(TableName="predictions")
    with pytest.raises(ClientError) as fault:
        handler(sample("bearer_token"), None)
    assert str(fault.value) != "Unauthorized"
    assert "A" * 10 not in str(fault.value)


@pytest.mark.parametrize("name", sorted(ALLOWED | REFUSED))
def test_a_token_is_never_logged_or_printed(
    handler: Handler, name: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    event = sample(name)
    with nullcontext() if name in ALLOWED else pytest.raises(Exception, match=r"^Unauthorized$"):
        handler(event, None)
    written = caplog.text + "".join(capsys.readouterr())
    assert event["authorizationToken"].split()[-1] not in written
