import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import moto  # before predictions: it must see every client being made
import pytest
from predictions.__main__ import Stack, main
from predictions.access import AccessTokens
from predictions.dead_requests import DeadRequests
from predictions.requests import Message

REGION = "us-east-1"
ENVIRONMENT = (
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


def template(outputs: dict[str, str]) -> str:
    return json.dumps(
        {
            "Resources": {"Topic": {"Type": "AWS::SNS::Topic"}},
            **({"Outputs": {key: {"Value": value} for key, value in outputs.items()}} if outputs else {}),
        }
    )


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[AccessTokens]:
    """A stack named `demo` in REGION and one named `other` that is somebody else's."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    with moto.mock_aws():
        create_client: Any = botocore.session.Session().create_client
        cloudformation = create_client("cloudformation", region_name=REGION)
        cloudformation.create_stack(StackName="demo", TemplateBody=template({"ApiUrl": "x", "TableName": "table-1"}))
        cloudformation.create_stack(StackName="other", TemplateBody=template({}))
        dynamodb = create_client("dynamodb", region_name=REGION)
        dynamodb.create_table(
            TableName="table-1",
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
        yield AccessTokens("table-1", dynamodb)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without any configuration of AWS."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command that must not succeed; gives the one line it says why."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("replicate-serverless: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


LIST = ("tokens", "list", "--stack", "demo")
CREATE = ("tokens", "create", "--stack", "demo", "--owner", "alice")


@pytest.mark.usefixtures("nowhere")
def test_no_region_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--region" in refused(capsys, *LIST)


@pytest.mark.usefixtures("nowhere")
def test_no_credentials_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no AWS credentials" in refused(capsys, *LIST, "--region", REGION)


@pytest.mark.usefixtures("nowhere")
def test_an_unknown_profile_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nobody" in refused(capsys, *LIST, "--profile", "nobody")


@pytest.mark.usefixtures("nowhere")
def test_an_endpoint_where_nothing_listens_is_tried_and_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    assert "http://127.0.0.1:1" in refused(capsys, *LIST, "--region", REGION)


@pytest.mark.usefixtures("stack")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("tokens", "list", "--stack", "absent"), "no stack 'absent' in us-east-1"),
        ((*LIST, "--region", "eu-west-1"), "no stack 'demo' in eu-west-1"),
        (("tokens", "list", "--stack", "other"), "has no output TableName"),
        ((*CREATE[:-1], "Alice"), "owner 'Alice'"),
        ((*CREATE, "--scopes", "all"), "scopes all"),
        ((*CREATE, "--scopes", ""), "scopes"),
        ((*CREATE, "--name", "a\tb"), "name"),
        (("tokens", "revoke", "--stack", "demo", "nothex"), "'nothex'"),
        (("tokens", "revoke", "--stack", "demo", "abcdef123456"), "No token has the id abcdef123456"),
    ],
)
def test_what_cannot_be_done_is_said(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], said: str) -> None:
    assert said in refused(capsys, *argv)


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("tokens",),
        ("tokens", "list"),
        ("tokens", "create", "--stack", "demo"),
        ("tokens", "revoke", "--stack", "demo"),
        ("tokens", "rename", "--stack", "demo"),
        ("tokens", "list", "--sta", "demo"),
        ("webhooks",),
        ("webhooks", "redeliver", "--stack", "demo"),
        ("webhooks", "redeliver", "--stack", "demo", "a" * 26, "--event", "deleted"),
        ("webhooks", "rotate", "--stack", "demo"),
        ("requests",),
        ("requests", "redrive", "--stack", "demo", "--id"),
    ],
)
def test_an_incomplete_command_shows_its_usage(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: replicate-serverless")


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("tokens",),
        ("tokens", "create"),
        ("tokens", "list"),
        ("tokens", "revoke"),
        ("webhooks",),
        ("webhooks", "redeliver"),
        ("webhooks", "failed"),
        ("webhooks", "redrive"),
        ("webhooks", "rotate"),
        ("requests",),
        ("requests", "list"),
        ("requests", "redrive"),
    ],
)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert " ".join(["usage: replicate-serverless", *command]) in capsys.readouterr().out


def test_a_created_token_alone_is_on_stdout_and_works(stack: AccessTokens, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CREATE, "--name", "laptop"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"rs_[A-Za-z0-9_-]{43}\n", out)
    assert out.strip() not in err
    found = stack.find(out.strip())
    assert found is not None
    assert (found.owner, found.scopes, found.name) == ("alice", ("predict", "read"), "laptop")
    assert found.id in err


def test_scopes_are_taken_as_a_list_with_commas(stack: AccessTokens, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CREATE, "--scopes", "manage, read"]) == 0
    found = stack.find(capsys.readouterr().out.strip())
    assert found is not None
    assert found.scopes == ("read", "manage")


def test_the_listing_shows_each_token_but_not_itself(stack: AccessTokens, capsys: pytest.CaptureFixture[str]) -> None:
    token, alice = stack.create("alice", ["read", "predict"], "laptop")
    _, bob = stack.create("bob", ["manage"])
    assert main(LIST) == 0
    out, err = capsys.readouterr()
    header, *rows = out.splitlines()
    assert header.split() == ["ID", "OWNER", "SCOPES", "ENDS", "IN", "CREATED", "NAME"]
    assert [row.split()[:4] for row in rows] == [
        [alice.id, "alice", "predict,read", token[-4:]],
        [bob.id, "bob", "manage", bob.token_hint],
    ]
    assert rows[0].endswith("laptop")
    assert token not in out + err


def test_the_listing_as_json_can_be_read_by_programs(stack: AccessTokens, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LIST, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    _, access = stack.create("alice", ["read"], "laptop")
    assert main([*LIST, "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert rows == [
        {
            "id": access.id,
            "owner": "alice",
            "scopes": ["read"],
            "name": "laptop",
            "created_at": access.created_at,
            "token_hint": access.token_hint,
        }
    ]


def test_a_revoked_token_no_longer_works(stack: AccessTokens, capsys: pytest.CaptureFixture[str]) -> None:
    token, access = stack.create("alice", ["read"])
    assert main(["tokens", "revoke", "--stack", "demo", access.id]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "within 60 seconds" in err
    assert stack.find(token) is None
    assert "revoked already" in refused(capsys, "tokens", "revoke", "--stack", "demo", access.id)


@pytest.mark.parametrize(
    ("environment", "option", "exit_code"),
    [
        ({"AWS_REGION": REGION, "AWS_DEFAULT_REGION": "eu-west-1"}, [], 0),
        ({"AWS_REGION": "", "AWS_DEFAULT_REGION": REGION}, [], 0),
        ({"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-1"}, ["--region", REGION], 0),
        ({"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": REGION}, [], 2),
    ],
)
@pytest.mark.usefixtures("stack")
def test_the_region_is_the_options_then_the_environments(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], option: list[str], exit_code: int
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([*LIST, *option]) == exit_code


@pytest.mark.usefixtures("stack")
def test_the_profile_decides_region_and_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    keys = "aws_access_key_id = x\naws_secret_access_key = x\n"
    (tmp_path / "config").write_text(
        f"[profile here]\nregion = {REGION}\n{keys}[profile there]\nregion = eu-west-1\n{keys}",
        encoding="utf-8",
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert main([*LIST, "--profile", "here"]) == 0
    assert main([*LIST, "--profile", "there"]) == 2


# -- webhooks ------------------------------------------------------------------------------------------------------

ID = "a" * 26
FAILED = {"id": ID, "event": "completed", "n": 1, "first_at": 1_750_000_000}


@pytest.fixture
def hooks(stack: AccessTokens) -> Any:
    """The stack's queues, and predictions: `a…` has ended, `b…` runs, `c…` has no webhook."""
    create_client: Any = botocore.session.Session().create_client
    dynamodb, sqs, cloudformation = (
        create_client(name, region_name=REGION) for name in ("dynamodb", "sqs", "cloudformation")
    )
    urls = {name: sqs.create_queue(QueueName=name)["QueueUrl"] for name in ("deliveries", "dead")}
    cloudformation.create_stack(
        StackName="hooks",
        TemplateBody=template(
            {
                "TableName": "table-1",
                "OutputsBucketName": "outputs",
                "DeliveriesQueueUrl": urls["deliveries"],
                "DeliveriesDeadLetterQueueUrl": urls["dead"],
            }
        ),
    )
    for id_, rank, visible, webhook in (
        ("a", 9, "succeeded", "https://hooks.example.com/"),
        ("b", 2, "processing", "https://hooks.example.com/"),
        ("c", 9, "succeeded", None),
        ("d", 9, "processing", "https://hooks.example.com/"),
    ):
        texts = {"id": id_ * 26, "owner": "alice", "created_at": "2025-06-15T15:06:40Z", "fingerprint": "f",
                 "source": "http", "kind": "version", "status": visible, "visible": visible}  # fmt: skip
        numbers = {"created": 1, "rank": rank, "deadline": 1, "execution_n": 1, "expires_at": 1}
        dynamodb.put_item(
            TableName="table-1",
            Item={
                "pk": {"S": f"prediction#{id_ * 26}"},
                "sk": {"S": "status"},
                "keyed": {"BOOL": False},
                **{name: {"S": value} for name, value in texts.items()},
                **{name: {"N": str(value)} for name, value in numbers.items()},
                **({"webhook": {"S": webhook}} if webhook else {}),
            },
        )
    return sqs


def messages(sqs: Any, queue: str) -> list[dict[str, Any]]:
    found = sqs.receive_message(
        QueueUrl=sqs.get_queue_url(QueueName=queue)["QueueUrl"], MaxNumberOfMessages=10, VisibilityTimeout=0
    )
    return [json.loads(message["Body"]) for message in found.get("Messages", [])]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("redeliver", "z" * 26), "no prediction"),
        (("redeliver", "../x"), "no prediction"),
        (("redeliver", "b" * 26), "has not ended"),
        (("redeliver", "d" * 26), "has not ended"),
        (("redeliver", "c" * 26), "without a webhook"),
        (("rotate", "--owner", "Alice"), "The owner 'Alice'"),
    ],
)
def test_webhook_command_that_cannot_be_done_is_said_and_sends_nothing(
    hooks: Any, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], said: str
) -> None:
    assert said in refused(capsys, "webhooks", *argv, "--stack", "hooks")
    assert messages(hooks, "deliveries") == []


def test_second_rotation_needs_force(hooks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rotate = ("webhooks", "rotate", "--stack", "hooks", "--owner", "alice")
    assert main(rotate) == 0
    assert "version 2" in capsys.readouterr().err
    assert "--force" in refused(capsys, *rotate)
    assert main([*rotate, "--force"]) == 0
    assert "version 3" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "event", "n"), [([], "completed", 1), (["--event", "output"], "output", 0)])
def test_redelivery_is_queued_under_the_id_of_the_first(hooks: Any, options: list[str], event: str, n: int) -> None:
    assert main(["webhooks", "redeliver", "--stack", "hooks", ID, *options]) == 0
    (message,) = messages(hooks, "deliveries")
    assert (message["id"], message["event"], message["n"]) == (ID, event, n)


def test_failed_webhooks_are_listed_and_sent_again(hooks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    dead = hooks.get_queue_url(QueueName="dead")["QueueUrl"]
    hooks.send_message(QueueUrl=dead, MessageBody=json.dumps({**FAILED, "reason": "answered 500"}))
    hooks.send_message(QueueUrl=dead, MessageBody="[]")
    assert main(["webhooks", "failed", "--stack", "hooks"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["ID", "EVENT", "DUE", "REASON"]
    assert [row.split(maxsplit=3) for row in rows] == [
        [ID, "completed", "2025-06-15T15:06:40Z", "answered 500"],
        ["-", "-", "-", "not a delivery"],
    ]
    assert main(["webhooks", "failed", "--stack", "hooks", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [], "what was listed is hidden for a while"
    hooks.purge_queue(QueueUrl=dead)
    hooks.send_message(QueueUrl=dead, MessageBody=json.dumps({**FAILED, "reason": "answered 500"}))
    hooks.send_message(QueueUrl=dead, MessageBody="[]")
    assert main(["webhooks", "redrive", "--stack", "hooks"]) == 0
    assert "Queued again: 1" in capsys.readouterr().err
    (again,) = messages(hooks, "deliveries")
    assert {**again, "first_at": 0} == {**FAILED, "first_at": 0}
    assert again["first_at"] > FAILED["first_at"], "it is tried for another day"


# -- requests ------------------------------------------------------------------------------------------------------


class Queue:
    """The stack's dead requests, and start_from_queue, which answers what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        create_client: Any = botocore.session.Session().create_client
        self._sqs = create_client("sqs", region_name=REGION)
        self._url = self._sqs.create_queue(QueueName="dead-requests")["QueueUrl"]
        self.dead = DeadRequests(self._url, self._sqs)
        self.asked: list[dict[str, Any]] = []
        self.answers: list[tuple[dict[str, Any], str | None]] = []
        create_client("cloudformation", region_name=REGION).create_stack(
            StackName="queue",
            TemplateBody=template({"RequestsDeadLetterQueueUrl": self._url, "StartFromQueueFunctionName": "start"}),
        )
        make: Any = Stack.client

        def client(stack: Stack, service_name: str) -> Any:
            made = make(stack, service_name)
            if service_name == "lambda":
                made.meta.events.register("before-call.lambda.Invoke", self._invoked)
            return made

        # moto runs functions in Docker only: this answers in AWS's place, at the client's own door.
        monkeypatch.setattr(Stack, "client", client)

    def bury(self, id_: str, body: str, reason: str = "model: not a name") -> None:
        self.dead.bury(Message(id_, "AROAALICE0000", body, 1_750_000_000), reason)

    @property
    def left(self) -> int:
        attributes = self._sqs.get_queue_attributes(QueueUrl=self._url, AttributeNames=["All"])["Attributes"]
        return int(attributes["ApproximateNumberOfMessages"]) + int(attributes["ApproximateNumberOfMessagesNotVisible"])

    def _invoked(self, params: dict[str, Any], **_: Any) -> tuple[Any, dict[str, Any]]:
        self.asked.append(json.loads(params["body"]))
        said, error = self.answers.pop(0) if self.answers else ({"batchItemFailures": []}, None)
        answer = {"StatusCode": 200, "Payload": io.BytesIO(json.dumps(said).encode())}
        return type("Http", (), {"status_code": 200})(), answer | ({"FunctionError": error} if error else {})


@pytest.fixture
def queue(stack: AccessTokens, monkeypatch: pytest.MonkeyPatch) -> Queue:
    return Queue(monkeypatch)


REQUESTS = ("requests", "list", "--stack", "queue")
PUT_BACK = ("requests", "redrive", "--stack", "queue")


def test_dead_requests_are_listed_with_their_reasons_and_no_token(
    queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.bury("message-1", '{"task_token": "AQC/secret==", "model": "\x1b[2J"}')
    assert main(REQUESTS) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["ID", "SENT", "REASON", "BODY"]
    assert row.split(maxsplit=2)[:2] == ["message-1", "2025-06-15T15:06:40Z"]
    assert "model: not a name" in row
    assert "secret" not in row
    assert "\x1b" not in row
    assert main([*REQUESTS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [], "what was listed is hidden for a while"


def test_dead_requests_as_json_are_whole(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    queue.bury("message-1", "x" * 1000)
    assert main([*REQUESTS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "id": "message-1",
            "sender": "AROAALICE0000",
            "sent_at": 1_750_000_000,
            "reason": "model: not a name",
            "body": "x" * 1000,
        }
    ]


def test_dead_request_is_tried_as_the_message_that_it_was_and_forgotten(
    queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.bury("message-1", "{}")
    queue.bury("message-2", "{}")
    assert main([*PUT_BACK, "--id", "message-2"]) == 0
    assert "Tried once more: 1." in capsys.readouterr().err
    ((record,),) = [event["Records"] for event in queue.asked]
    assert (record["messageId"], record["body"]) == ("message-2", "{}")
    assert record["attributes"] == {"SenderId": "AROAALICE0000", "SentTimestamp": "1750000000000"}
    assert queue.left == 1


def test_dead_request_that_cannot_be_started_stays(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    queue.bury("message-1", "{}")
    queue.answers = [({"batchItemFailures": [{"itemIdentifier": "message-1"}]}, None)]
    assert main(PUT_BACK) == 0
    assert "Left where they are" in capsys.readouterr().err
    assert queue.left == 1


def test_function_that_fails_over_a_dead_request_is_said(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    queue.bury("message-1", "{}")
    queue.answers = [({"errorMessage": "no memory"}, "Unhandled")]
    assert "no memory" in refused(capsys, *PUT_BACK)
    assert queue.left == 1


def test_unknown_dead_request_is_said(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no dead letter 'message-9'" in refused(capsys, *PUT_BACK, "--id", "message-9")
