import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from predictions.api.access_tokens import (
    AccessTokenInvalid,
    AccessTokenNotFound,
    AccessTokens,
    Scope,
    parse_authorization,
)
from predictions.aws import clients

from tests.support.quick_aws import mocked

TOKEN = "rs_" + "A" * 43


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("TABLE_NAME", "predictions")
    with mocked():
        clients.client("dynamodb").create_table(
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
        yield "predictions"


@pytest.fixture
def access_tokens(table: str) -> AccessTokens:
    return AccessTokens.from_env()


@pytest.fixture
def calls(table: str) -> Iterator[list[dict[str, Any]]]:
    """What is asked of DynamoDB: `operation` and the parameters."""
    seen: list[dict[str, Any]] = []

    def observe(params: dict[str, Any], model: Any, **kwargs: Any) -> None:
        seen.append({"operation": model.name, **params})

    events = clients.client("dynamodb").meta.events
    events.register("before-parameter-build.dynamodb.*", observe)
    yield seen
    events.unregister("before-parameter-build.dynamodb.*", observe)


def items() -> list[dict[str, Any]]:
    return list(clients.client("dynamodb").scan(TableName="predictions")["Items"])


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        " ",
        "Bearer",
        "Bearer ",
        "Bearer  ",
        TOKEN,
        f"Basic {TOKEN}",
        f"Bearer{TOKEN}",
        f"Bearer\t{TOKEN}",
        f"Bearer {TOKEN} {TOKEN}",
        f"Bearer {TOKEN}\n",
        f"Bearer {TOKEN}\r\nX: y",
        f"\nBearer {TOKEN}",
        f"Bearer Token {TOKEN}",
        "Bearer é",
        "Bearer \x00",
        "Bearer \ud800",
        f"To\u212aen {TOKEN}",  # the Kelvin sign, which lower-cases to k
        "Bearer " + "x" * 257,
        "Bearer " + " " * 1_000_000,
        "Bearer " + "x" * 1_000_000,
        b"Bearer x",
        7,
    ],
)
def test_a_malformed_authorization_is_none(header: Any) -> None:
    assert parse_authorization(header) is None


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Token", "token", "tOKEN"])
@pytest.mark.parametrize("spaces", [" ", "  "])
def test_bearer_and_token_in_any_case_are_parsed(scheme: str, spaces: str) -> None:
    assert parse_authorization(f"{scheme}{spaces}{TOKEN}") == TOKEN
    assert parse_authorization(f"{scheme}{spaces}{TOKEN} ") == TOKEN


@given(st.text())
def test_any_authorization_is_parsed_or_none(text: str) -> None:
    for header in (text, f"Bearer {text}", f"Token {text}"):
        parsed = parse_authorization(header)
        assert parsed is None or (parsed in header and " " not in parsed)


@pytest.mark.parametrize(
    "token",
    [
        "",
        "rs_",
        "rs_" + "A" * 42,
        "rs_" + "A" * 44,
        "RS_" + "A" * 43,
        "r8_" + "A" * 43,
        "rs_" + "A" * 42 + "+",
        "rs_" + "A" * 42 + "é",
        "rs_" + "A" * 42 + "\ud800",
        TOKEN + "\n",
        " " + TOKEN,
        "x" * 1_000_000,
        hashlib.sha256(TOKEN.encode()).hexdigest(),
    ],
)
def test_what_is_not_a_token_is_not_found_and_costs_no_read(
    access_tokens: AccessTokens, calls: list[dict[str, Any]], token: str
) -> None:
    assert access_tokens.find(token) is None
    assert calls == []


def test_an_unknown_token_is_not_found(access_tokens: AccessTokens) -> None:
    access_tokens.create("alice", ["read"])
    assert access_tokens.find(TOKEN) is None


@pytest.mark.parametrize(
    "owner",
    ["", "-a", "A", "alice@example.com", "a b", "a_b", "é", "a" * 33, "alice\n", "a/b", "a#b", "\u0663"],
)
def test_an_owner_out_of_form_is_refused(access_tokens: AccessTokens, owner: str) -> None:
    with pytest.raises(AccessTokenInvalid, match="owner"):
        access_tokens.create(owner, ["read"])
    assert items() == []


@pytest.mark.parametrize("scopes", [[], [""], ["admin"], ["read", "admin"], ["READ"], ["predict,read"], "read"])
def test_unknown_or_no_scopes_are_refused(access_tokens: AccessTokens, scopes: Any) -> None:
    with pytest.raises(AccessTokenInvalid, match=r"must be some of predict, read, train, manage\."):
        access_tokens.create("alice", scopes)
    assert items() == []


@pytest.mark.parametrize("name", ["x" * 65, "a\nb", "\x1b[31m", "é", "\x7f"])
def test_a_name_out_of_form_is_refused(access_tokens: AccessTokens, name: str) -> None:
    with pytest.raises(AccessTokenInvalid, match="name"):
        access_tokens.create("alice", ["read"], name)
    assert items() == []


@pytest.mark.parametrize("token_id", ["", "abcde", "ABCDEF", "abcdeg", "a" * 65, TOKEN, "abcdef\n", "tokens"])
def test_an_id_out_of_form_is_refused(access_tokens: AccessTokens, calls: list[dict[str, Any]], token_id: str) -> None:
    with pytest.raises(AccessTokenInvalid, match="id"):
        access_tokens.revoke(token_id)
    assert calls == []


def test_a_created_token_is_found_with_its_owner_and_scopes(access_tokens: AccessTokens) -> None:
    token, created = access_tokens.create("alice-2", ["manage", "predict", "predict"], "laptop 1")
    assert token.startswith("rs_")
    assert len(token) == 46
    assert access_tokens.find(token) == created
    assert created.owner == "alice-2"
    assert created.scopes == (Scope.PREDICT, Scope.MANAGE)
    assert created.name == "laptop 1"
    assert created.token_hint == token[-4:]
    assert created.id == hashlib.sha256(token.encode()).hexdigest()[:12]


def test_tokens_differ_and_only_their_hashes_are_stored(access_tokens: AccessTokens) -> None:
    tokens = [access_tokens.create("alice", list(Scope))[0] for _ in range(20)]
    assert len(set(tokens)) == 20
    stored = items()
    assert {item["sk"]["S"] for item in stored} == {hashlib.sha256(token.encode()).hexdigest() for token in tokens}
    assert {item["pk"]["S"] for item in stored} == {"tokens"}
    assert not any(token[3:-4] in json.dumps(stored) for token in tokens)
    assert not any("listed_at" in item or "expires_at" in item for item in stored)


def test_reads_that_decide_are_consistent(access_tokens: AccessTokens, calls: list[dict[str, Any]]) -> None:
    token, created = access_tokens.create("alice", ["read"])
    access_tokens.find(token)
    access_tokens.list()
    access_tokens.revoke(created.id)
    reads = [call for call in calls if call["operation"] in {"GetItem", "Query"}]
    assert len(reads) == 3
    assert all(call["ConsistentRead"] is True for call in reads)


def test_a_put_repeated_after_a_lost_answer_succeeds_and_another_owners_does_not(
    access_tokens: AccessTokens, calls: list[dict[str, Any]]
) -> None:
    access_tokens.create("alice", ["read"])
    put = {key: value for key, value in calls[0].items() if key != "operation"}
    client = clients.client("dynamodb")
    client.put_item(**put)
    assert len(items()) == 1
    put["ExpressionAttributeValues"] = {**put["ExpressionAttributeValues"], ":owner": {"S": "mallory"}}
    with pytest.raises(client.exceptions.ConditionalCheckFailedException):
        client.put_item(**put)


def test_an_unknown_scope_in_the_table_allows_nothing(access_tokens: AccessTokens) -> None:
    token, _ = access_tokens.create("alice", ["read"])
    item = items()[0]
    item["scopes"] = {"SS": ["root", "read"]}
    clients.client("dynamodb").put_item(TableName="predictions", Item=item)
    found = access_tokens.find(token)
    assert found is not None
    assert found.scopes == (Scope.READ,)


def test_a_revoked_token_is_unknown_at_once_and_others_stay(access_tokens: AccessTokens) -> None:
    token, created = access_tokens.create("alice", ["read"])
    kept, _ = access_tokens.create("alice", ["read"])
    assert access_tokens.revoke(created.id) == created
    assert access_tokens.find(token) is None
    assert access_tokens.find(kept) is not None
    with pytest.raises(AccessTokenNotFound, match="already be revoked"):
        access_tokens.revoke(created.id)


def test_an_id_of_two_tokens_revokes_neither(access_tokens: AccessTokens) -> None:
    access_tokens.create("alice", ["read"])
    item = items()[0]
    twin = {**item, "sk": {"S": item["sk"]["S"][:-1] + ("0" if item["sk"]["S"][-1] != "0" else "1")}}
    clients.client("dynamodb").put_item(TableName="predictions", Item=twin)
    with pytest.raises(AccessTokenNotFound, match="2 tokens"):
        access_tokens.revoke(item["sk"]["S"][:12])
    assert len(items()) == 2
    access_tokens.revoke(item["sk"]["S"])
    assert items() == [twin]


def test_tokens_are_listed_oldest_first_and_nothing_else_is(access_tokens: AccessTokens) -> None:
    assert access_tokens.list() == []
    created = [access_tokens.create(owner, ["read"])[1] for owner in ("carol", "alice", "bob")]
    clients.client("dynamodb").put_item(
        TableName="predictions",
        Item={"pk": {"S": "prediction#abc"}, "sk": {"S": "status"}, "owner": {"S": "alice"}},
    )
    assert access_tokens.list() == created


def test_more_tokens_than_a_page_are_all_listed(access_tokens: AccessTokens) -> None:
    """A page of DynamoDB ends at 1 MB."""
    for number in range(6):
        clients.client("dynamodb").put_item(
            TableName="predictions",
            Item={
                "pk": {"S": "tokens"},
                "sk": {"S": f"{number:064x}"},
                "owner": {"S": "alice"},
                "scopes": {"SS": ["read"]},
                "name": {"S": ""},
                "created_at": {"S": f"2024-01-0{number + 1}T00:00:00+00:00"},
                "token_hint": {"S": "abcd"},
                "ballast": {"S": "x" * 300_000},
            },
        )
    assert [token.created_at[8:10] for token in access_tokens.list()] == ["01", "02", "03", "04", "05", "06"]


def test_a_missing_variable_fails_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TABLE_NAME", raising=False)
    with pytest.raises(KeyError, match="TABLE_NAME"):
        AccessTokens.from_env()
