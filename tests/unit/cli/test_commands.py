import io
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from predictions.admission.quotas import LimitInvalid, ModelLimits, OwnerLimits, OwnersLimits
from predictions.admission.rate_limiter import Limiter
from predictions.api.access_tokens import AccessTokens
from predictions.aws.dead_letter_queue import DeadLetterQueue
from predictions.aws.dynamodb import serialize
from predictions.cli.__main__ import main
from predictions.cli.dead_letters import QUEUES
from predictions.cli.inspect import _of_submissions, waits_for
from predictions.cli.stack import Stack, _Bucket
from predictions.cli.webhooks import Event
from predictions.files.outputs_bucket import OutputsBucket
from predictions.intake.refused import MESSAGE_LIMIT_BYTES, DeadRequests
from predictions.intents.sources import Message
from predictions.notifications.webhook_queue import EVENTS
from predictions.store.records import Prediction

from tests.support.commands import COMMANDS, GROUPS, stack_of
from tests.support.quick_aws import mocked
from tests.support.template import ROOT, dead_letter_queues, resources, table_properties, timeout_of

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


@cache
def session() -> Any:
    """One session for the clients of all tests: it takes longer to make than what a test does with it."""
    return botocore.session.Session()


def create_client(name: str, **options: Any) -> Any:
    return session().create_client(name, **options)


def template(outputs: dict[str, str], resources: dict[str, Any] | None = None) -> str:
    return json.dumps(
        {
            "Resources": resources or {"Topic": {"Type": "AWS::SNS::Topic"}},
            **({"Outputs": {key: {"Value": value} for key, value in outputs.items()}} if outputs else {}),
        }
    )


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[AccessTokens]:
    """A stack named `demo` in REGION and one named `other` that is somebody else's."""
    for name, value in {"DEFAULT_REGION": REGION, "ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with mocked():
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
        (("tokens", "revoke", "--stack", "demo", "abcdef123456"), "Token abcdef123456 not found"),
        (("pause", "--stack", "absent"), "no stack 'absent'"),
        (("pause", "--stack", "demo", "--reason", " "), "reason"),
        (("pause", "--stack", "demo", "--reason", "x" * 201), "reason"),
        (("pause", "--stack", "demo", "--reason", "a\tb"), "reason"),
        (("limits", "set", "alice", "--stack", "demo"), "--in-flight"),
        (("limits", "set", "Alice", "--stack", "demo", "--per-day", "1"), "The owner 'Alice'"),
        (("limits", "set", "alice", "--stack", "demo", "--per-day", "-1"), "--per-day"),
        (("limits", "set", "alice", "--stack", "demo", "--in-flight", "1001"), "--in-flight"),
        (("limits", "remove", "#limits", "--stack", "demo"), "The owner '#limits'"),
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
        ("dead-letters",),
        ("dead-letters", "redrive", "--stack", "demo"),
        ("dead-letters", "redrive", "letters", "--stack", "demo"),
        ("dead-letters", "redrive", "requests", "--stack", "demo", "--id"),
        ("show", "--stack", "demo"),
        ("outputs", "archive", "--stack", "demo"),
        ("secrets", "rotate", "signing", "--stack", "demo"),
        ("pause",),
        ("status", "--sta", "demo"),
        ("limits",),
        ("limits", "set", "--stack", "demo"),
        ("limits", "set", "alice", "--stack", "demo", "--per-day", "many"),
        ("limits", "remove", "--stack", "demo"),
    ],
)
def test_an_incomplete_command_shows_its_usage(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Usage: replicate-serverless")


def test_commands_are_these() -> None:
    assert {" ".join(command) for command in COMMANDS} == {
        "show", "stuck", "dead-letters count", "dead-letters list", "dead-letters redrive", "dead-letters forget",
        "outputs archive", "webhooks redeliver", "webhooks rotate", "secrets rotate", "secrets refresh",
        "tokens create", "tokens list", "tokens revoke", "limits set", "limits list", "limits remove",
        "pause", "resume", "status", "urls keys", "kept", "doctor",
        "prices set", "prices remove", "prices list", "prices check", "prices apply",
        "budgets set", "budgets list", "budgets remove", "usage",
    }  # fmt: skip


def test_module_is_the_command_too() -> None:
    command = [sys.executable, "-m", "predictions", "tokens", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # our own
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: replicate-serverless tokens list")


def test_events_of_a_redelivery_are_those_that_are_sent() -> None:
    assert tuple(Event) == EVENTS


@pytest.mark.parametrize("command", [(), *GROUPS, *COMMANDS], ids=" ".join)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    assert main([*command, "--help"]) == 0
    assert " ".join(["Usage: replicate-serverless", *command]) in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_example_of_a_commands_help_is_one_of_it(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    assert main([*command, "--help"]) == 0
    _, _, example = " ".join(capsys.readouterr().out.split()).partition("Example: replicate-serverless ")
    words = shlex.split(re.split(" [<>] ", example)[0])
    assert words[: len(command)] == list(command)
    assert stack_of(words) == "NAME"


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
    assert "may already be revoked" in refused(capsys, "tokens", "revoke", "--stack", "demo", access.id)


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


# -- limits and pause ----------------------------------------------------------------------------------------------


@pytest.fixture
def limited() -> Iterator[Any]:
    """A stack with the template's own table."""
    with mocked():
        create_client("cloudformation", region_name=REGION).create_stack(
            StackName="demo", TemplateBody=template({"TableName": "predictions"})
        )
        dynamodb = create_client("dynamodb", region_name=REGION)
        dynamodb.create_table(TableName="predictions", **table_properties())
        yield dynamodb


def test_status_tells_which_owners_wait(limited: Any, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.time()  # however long the reservations take
    limiter = Limiter("predictions", limited, now=lambda: began)
    for _ in range(80):
        limiter.reserve_for_queue("team-a", latest=4e9)
    assert main(["status", "--json", "--stack", "demo", "--region", REGION]) == 0
    waiting = json.loads(capsys.readouterr().out)["queue_waiting_seconds"]
    assert 4 <= waiting["team-a"] <= 9
    assert main(["status", "--stack", "demo", "--region", REGION]) == 0
    assert "team-a, for" in capsys.readouterr().out


def test_status_tells_of_a_pause_from_its_command_to_its_end(limited: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def status() -> Any:
        assert main(["status", "--json", "--stack", "demo", "--region", REGION]) == 0
        return json.loads(capsys.readouterr().out)

    assert status() == {
        "paused": False,
        "paused_by": None,
        "pause_reason": None,
        "paused_since": None,
        "paused_until": None,
        "throttled_seconds": 0,
        "queue_reserved_seconds": 0,
        "http_reserved_seconds": 0,
        "queue_waiting_seconds": {},
        "http_waiting_seconds": {},
    }
    limited.put_item(
        TableName="predictions",
        Item={
            "pk": {"S": "limiter"},
            "sk": {"S": "creates"},
            "paused_at": {"N": "9" * 38},
            "paused_until": {"N": "9" * 38},
        },
    )
    assert status()["paused_since"] == "1970-01-01T00:00:00Z", "a hand that edits the table does not break the command"
    Limiter("predictions", limited).resume()
    limiter = Limiter("predictions", limited)
    limiter.block(30)
    limiter.pause_automatically("Replicate refuses it.")
    found = status()
    assert (found["paused"], found["paused_by"], found["pause_reason"]) == (True, "Replicate", "Replicate refuses it.")
    assert found["paused_until"] > found["paused_since"]
    assert (found["throttled_seconds"], found["http_reserved_seconds"]) == (30, 40)
    assert main(["pause", "--reason", "Moving.", "--stack", "demo", "--region", REGION]) == 0
    assert capsys.readouterr().out == ""
    found = status()
    assert (found["paused_by"], found["pause_reason"], found["paused_until"]) == ("command", "Moving.", None)
    assert main(["status", "--stack", "demo", "--region", REGION]) == 0
    assert "until `resume`" in capsys.readouterr().out
    assert main(["resume", "--stack", "demo", "--region", REGION]) == 0
    assert status()["paused"] is False


def test_limits_are_set_listed_and_removed(limited: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*argv: str) -> str:
        assert main(["limits", *argv, "--stack", "demo", "--region", REGION]) == 0
        return capsys.readouterr().out

    run("set", "bob", "--in-flight", "20", "--per-day", "5000")
    run("set", "alice", "--per-day", "0")
    run("set", "bob", "--in-flight", "30")
    run("set", "carol", "--open-batches", "3", "--open-pipelines", "0")
    assert json.loads(run("list", "--json")) == [
        {"owner": "alice", "in_flight": None, "per_day": 0, "open_batches": None, "open_pipelines": None},
        {"owner": "bob", "in_flight": 30, "per_day": 5000, "open_batches": None, "open_pipelines": None},
        {"owner": "carol", "in_flight": None, "per_day": None, "open_batches": 3, "open_pipelines": 0},
    ]
    # What is not set of batches and pipelines is the default of owners with limits.
    assert [line.split() for line in run("list").splitlines()[1:]] == [
        ["alice", "-", "0", "100", "500"],
        ["bob", "30", "5000", "100", "500"],
        ["carol", "-", "-", "3", "0"],
    ]
    run("remove", "carol")
    run("remove", "bob")
    run("remove", "bob")
    assert [each["owner"] for each in json.loads(run("list", "--json"))] == ["alice"]
    assert OwnersLimits("predictions", limited).limits_of("bob") == OwnerLimits()


def test_setting_one_limit_keeps_the_others_and_one_can_be_removed(
    limited: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: str) -> str:
        assert main(["limits", *argv, "--stack", "demo", "--region", REGION]) == 0
        return capsys.readouterr().err

    run("set", "bob", "--in-flight", "20", "--open-batches", "7")
    said = run("set", "bob", "--per-day", "5000")
    assert "20 in flight, 5000 per day, 7 open batches and 500 open pipelines" in said, "all of them are told"
    assert "5000 per day, 7 open batches" in run("remove", "bob", "--in-flight")
    limits = OwnersLimits("predictions", limited)
    assert limits.limits_of("bob") == OwnerLimits(per_day=5000, open_batches=7)
    assert "are removed" in run("remove", "bob", "--per-day", "--open-batches")
    assert "are removed" in run("remove", "bob", "--per-day")
    assert limited.scan(TableName="predictions")["Items"] == []


@pytest.mark.parametrize(
    ("first", "meanwhile", "left"),
    [
        ("set", {"per_day": 9}, OwnerLimits(in_flight=5, per_day=9)),
        ("remove", {"per_day": 9}, OwnerLimits(per_day=9)),
    ],
)
def test_limit_set_concurrently_is_not_lost(
    limited: Any, first: str, meanwhile: dict[str, Any], left: OwnerLimits
) -> None:
    limits = OwnersLimits("predictions", limited)
    limits.set_limits("bob", OwnerLimits(in_flight=2))
    calls: list[str] = []

    def other_call(**_: Any) -> None:
        # Before this call's last write: whatever it has read by then is outdated.
        calls.append("write")
        if len(calls) == (1 if first == "set" else 2):
            limits.set_limits("bob", OwnerLimits(**meanwhile))

    for operation in ("PutItem", "UpdateItem", "DeleteItem"):
        limited.meta.events.register(f"before-call.dynamodb.{operation}", other_call)
    if first == "set":
        limits.set_limits("bob", OwnerLimits(in_flight=5))
    else:
        limits.remove_limits("bob", ["in_flight"])
    assert limits.limits_of("bob") == left


def test_limits_of_a_model_are_set_listed_and_removed(limited: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*argv: str, code: int = 0) -> Any:
        assert main(["limits", *argv, "--stack", "demo", "--region", REGION]) == code
        return capsys.readouterr()

    flux = ("--model", "black-forest-labs/flux-schnell")
    run("set", "bob", *flux, "--in-flight", "5")
    run("set", "bob", "--per-day", "9")
    said = run("set", "bob", "--model", "Black-Forest-Labs/FLUX-schnell", "--per-day", "1000").err
    assert "9 per day" in said
    assert "5 in flight of black-forest-labs/flux-schnell and 1000 per day of black-forest-labs/flux-schnell" in said
    (listed,) = json.loads(run("list", "--json").out)
    assert listed["models"] == {"black-forest-labs/flux-schnell": {"in_flight": 5, "per_day": 1000}}
    assert [line.split() for line in run("list").out.splitlines()[1:]] == [
        ["bob", "-", "9", "100", "500"],
        ["bob", "black-forest-labs/flux-schnell", "5", "1000"],
    ]
    assert "1000 per day of" in run("remove", "bob", *flux, "--in-flight").err
    run("remove", "bob", "--per-day")
    limits = OwnersLimits("predictions", limited)
    assert limits.limits_of("bob").models == {"black-forest-labs/flux-schnell": ModelLimits(per_day=1000)}
    assert "are removed" in run("remove", "bob", *flux).err
    assert "are removed" in run("remove", "bob", *flux).err
    assert limited.scan(TableName="predictions")["Items"] == []
    for wrong in (("a b/c",), ("flux",), ("a/b:" + "0" * 64,), ("a/b", "--open-batches", "3")):
        assert "model" in run("set", "bob", "--in-flight", "1", "--model", *wrong, code=2).err.lower()
    for bad in ("1001", "-1"):
        assert f"must be 0 to 1000 (got {bad})" in run("set", "bob", *flux, "--in-flight", bad, code=2).err
    assert "Give at least one" in run("set", "bob", *flux, code=2).err
    assert limited.scan(TableName="predictions")["Items"] == []


def test_models_with_limits_are_bounded_and_fit_the_context(limited: Any) -> None:
    limits = OwnersLimits("predictions", limited)
    for n in range(50):
        limits.set_model_limits("bob", f"some-owner/model-{n}", ModelLimits(5, 1000))
    with pytest.raises(LimitInvalid, match="50 models at most"):
        limits.set_model_limits("bob", "one/more", ModelLimits(1))
    found = limits.set_model_limits("bob", "some-owner/model-0", ModelLimits(6))
    assert found.models["some-owner/model-0"] == ModelLimits(6, 1000)
    assert OwnerLimits.of_context(found.context()) == found
    assert len(found.context()["models_limit"]) < 4000
    for n in range(36):
        limits.set_model_limits("carol", f"{'o' * 60}/{'m' * 40}-{n}", ModelLimits(5))
    with pytest.raises(LimitInvalid, match="4000 characters"):
        limits.set_model_limits("carol", f"{'o' * 100}/{'m' * 100}", ModelLimits(5))


def test_limit_of_another_model_set_concurrently_is_not_lost(limited: Any) -> None:
    limits = OwnersLimits("predictions", limited)
    others = iter([("a/b", ModelLimits(1)), ("e/f", ModelLimits(2))])

    def other_call(**_: Any) -> None:
        if other := next(others, None):
            limits.set_model_limits("bob", *other)

    limited.meta.events.register("before-call.dynamodb.UpdateItem", other_call)
    limits.set_model_limits("bob", "c/d", ModelLimits(3))
    assert limits.limits_of("bob").models == {"a/b": ModelLimits(1), "c/d": ModelLimits(3), "e/f": ModelLimits(2)}


# -- webhooks ------------------------------------------------------------------------------------------------------

ID = "a" * 26
FUNCTIONS = ("StartFromQueue", "PublishChanges", "RunPrediction", "CopyOutputs")
SECRETS = ("WebhookMasterSecret", "LinkSecret")
LOG_GROUP = "hooks-FunctionsLogGroup-1A2B3C"


def queue_named(name: str) -> dict[str, Any]:
    return {"Type": "AWS::SQS::Queue", "Properties": {"QueueName": name}}


def named(function: str) -> dict[str, Any]:
    """A resource with the physical id of what moto makes no resource of: functions, secrets."""
    return {"Type": "AWS::Logs::LogGroup", "Properties": {"LogGroupName": function}}


FAILED = {"id": ID, "event": "completed", "n": 1, "first_at": 1_750_000_000}


@pytest.fixture
def hooks(stack: AccessTokens) -> Any:
    """The stack's queues, and predictions: `a…` has ended, `b…` runs, `c…` has no webhook."""
    dynamodb, sqs, cloudformation = (
        create_client(name, region_name=REGION) for name in ("dynamodb", "sqs", "cloudformation")
    )
    deliveries = sqs.create_queue(QueueName="deliveries")["QueueUrl"]
    cloudformation.create_stack(
        StackName="hooks",
        TemplateBody=template(
            {
                "TableName": "table-1",
                "OutputsBucketName": "outputs",
                "DeliveriesQueueUrl": deliveries,
                "ReplicateTokenSecretArn": "token",
                "SigningSecretArn": "signing",
                "TrackPredictionStateMachineArn": f"arn:aws:states:{REGION}:123456789012:stateMachine:track",
                "TrackSubmittedStateMachineArn": f"arn:aws:states:{REGION}:123456789012:stateMachine:submitted",
            },
            {
                **{name: queue_named(name) for name in (*QUEUES.values(), "ChangesRetryQueue")},
                **{f"{function}Function": named(function) for function in FUNCTIONS},
                **{secret: named(secret) for secret in SECRETS},
                "FunctionsLogGroup": named(LOG_GROUP),
            },
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
        (("redeliver", "b" * 26), "has not completed"),
        (("redeliver", "d" * 26), "has not completed"),
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
    assert message["again"] is True, "it is sent whatever was sent before"


@pytest.mark.parametrize(("kind", "attempt", "n"), [("batch", "3", 3), ("pipeline", None, 1)])
def test_redelivery_of_a_batch_or_pipeline_is_queued_once_it_has_completed(
    hooks: Any, capsys: pytest.CaptureFixture[str], kind: str, attempt: str | None, n: int
) -> None:
    id_ = "e" * 26
    key = {"pk": {"S": f"{kind}#{id_}"}, "sk": {"S": "status"}}
    item = {**key, **({"attempt": {"N": attempt}} if attempt else {})}
    for more, said in (({}, "without a webhook"), ({"webhook": {"S": "https://hooks.example.com/"}}, "not completed")):
        create_client("dynamodb", region_name=REGION).put_item(TableName="table-1", Item={**item, **more})
        assert said in refused(capsys, "webhooks", "redeliver", id_, "--stack", "hooks")
    completed = {**item, "webhook": {"S": "https://hooks.example.com/"}, "visible": {"S": "failed"}}
    create_client("dynamodb", region_name=REGION).put_item(TableName="table-1", Item=completed)
    assert main(["webhooks", "redeliver", "--stack", "hooks", id_]) == 0
    (message,) = messages(hooks, "deliveries")
    assert (message["id"], message["event"], message["n"]) == (id_, f"{kind}.completed", n)
    assert f"{id_}-completed-{n}" in capsys.readouterr().err


def test_failed_webhooks_are_listed_and_sent_again(hooks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    dead = hooks.get_queue_url(QueueName="DeliveriesDeadLetterQueue")["QueueUrl"]
    hooks.send_message(QueueUrl=dead, MessageBody=json.dumps({**FAILED, "reason": "answered 500"}))
    hooks.send_message(QueueUrl=dead, MessageBody="[]")
    assert main(["dead-letters", "list", "webhooks", "--stack", "hooks"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["ID", "EVENT", "DUE", "REASON"]
    assert [row.split(maxsplit=3) for row in rows] == [
        [ID, "completed", "2025-06-15T15:06:40Z", "answered 500"],
        ["-", "-", "-", "not a delivery"],
    ]
    assert main(["dead-letters", "list", "webhooks", "--stack", "hooks", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2, "what was listed can be listed and redriven at once"
    assert main(["dead-letters", "redrive", "webhooks", "--stack", "hooks"]) == 2
    err = capsys.readouterr().err
    assert "Redriven: 1." in err
    assert "Left in the queue: -: not a delivery" in err
    (again,) = messages(hooks, "deliveries")
    assert {**again, "first_at": 0} == {**FAILED, "first_at": 0}
    assert again["first_at"] > FAILED["first_at"], "it is tried for another day"


# -- requests ------------------------------------------------------------------------------------------------------


class Queue:
    """The stack's dead requests, and start_from_queue, which answers what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._sqs = create_client("sqs", region_name=REGION)
        self.asked: list[dict[str, Any]] = []
        self.answers: list[tuple[dict[str, Any], str | None]] = []
        create_client("cloudformation", region_name=REGION).create_stack(
            StackName="queue",
            TemplateBody=template(
                {},
                {
                    "RequestsDeadLetterQueue": queue_named("dead-requests"),
                    "StartFromQueueFunction": named("start"),
                },
            ),
        )
        self._url = self._sqs.get_queue_url(QueueName="dead-requests")["QueueUrl"]
        self.dead = DeadRequests(self._url, self._sqs, lambda: OutputsBucket("outputs"))
        make: Any = Stack.client

        def client(stack: Stack, service_name: str) -> Any:
            made = make(stack, service_name)
            if service_name == "lambda":
                made.meta.events.register("before-call.lambda.Invoke", self._invoked)
            return made

        # moto runs functions in Docker only: this answers in AWS's place, at the client's own door.
        monkeypatch.setattr(Stack, "client", client)

    def with_bucket(self) -> None:
        """The stack tells of its outputs bucket."""
        create_client("s3", region_name=REGION).create_bucket(Bucket="outputs")
        self.dead._outputs = lambda: _Bucket("outputs", create_client("s3", region_name=REGION))
        create_client("cloudformation", region_name=REGION).update_stack(
            StackName="queue",
            TemplateBody=template(
                {"OutputsBucketName": "outputs"},
                {
                    "RequestsDeadLetterQueue": queue_named("dead-requests"),
                    "StartFromQueueFunction": named("start"),
                },
            ),
        )

    def send(self, id_: str, body: str, reason: str = "model: not a name") -> None:
        self.dead.send(Message(id_, "AROAALICE0000", body, 1_750_000_000), reason)

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


REQUESTS = ("dead-letters", "list", "requests", "--stack", "queue")
PUT_BACK = ("dead-letters", "redrive", "requests", "--stack", "queue")


def test_dead_requests_are_listed_with_their_reasons_and_no_token(
    queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.send("message-1", '{"task_token": "AQC/secret==", "model": "\x1b[2J"}')
    assert main(REQUESTS) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["ID", "SENT", "REASON", "BODY"]
    assert row.split(maxsplit=2)[:2] == ["message-1", "2025-06-15T15:06:40Z"]
    assert "model: not a name" in row
    assert "secret" not in row
    assert "\x1b" not in row
    assert main([*REQUESTS, "--json"]) == 0
    assert [each["id"] for each in json.loads(capsys.readouterr().out)] == ["message-1"], "it can be listed again"


def test_dead_requests_as_json_are_whole(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    queue.send("message-1", "x" * 1000)
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
    queue.send("message-1", "{}")
    queue.send("message-2", "{}")
    assert main([*PUT_BACK, "--id", "message-2"]) == 0
    assert "Redriven: 1." in capsys.readouterr().err
    ((record,),) = [event["Records"] for event in queue.asked]
    assert (record["messageId"], record["body"]) == ("message-2", "{}")
    assert record["attributes"] == {"SenderId": "AROAALICE0000", "SentTimestamp": "1750000000000"}
    assert queue.left == 1


MANIFEST = {"source": "aws.s3", "detail-type": "Object Created", "detail": {"object": {"key": "batches/a/b/c.csv"}}}
UNSENT: dict[str, tuple[dict[str, str], Any, Any]] = {
    "ManifestsRule → requests-queue": (
        {"RULE_ARN": f"arn:aws:events:{REGION}:123456789012:rule/queue-ManifestsRule-1ABC"},
        MANIFEST,
        {"batch_manifest": MANIFEST},
    ),
    "RequestSchedule": (
        {"SCHEDULE_ARN": f"arn:aws:scheduler:{REGION}:123456789012:schedule/queue/RequestSchedule"},
        {"model": "acme/painter", "input": {}},
        {"model": "acme/painter", "input": {}},
    ),
    "RequestsEventSource": ({}, {"model": "acme/painter"}, {"model": "acme/painter"}),
    "a recipe's rule": (
        {"RULE_ARN": f"arn:aws:events:{REGION}:123456789012:rule/queue-recipe-{'a' * 26}"},
        {"id": "event-1"},
        {"recipe_id": "a" * 26, "event": {"id": "event-1"}},
    ),
    "a recipe's schedule": (
        {"SCHEDULE_ARN": f"arn:aws:scheduler:{REGION}:123456789012:schedule/queue/recipe"},
        {"recipe_id": "a" * 26, "event": {"time": "2025-06-15T15:06:40Z"}},
        {"recipe_id": "a" * 26, "event": {"time": "2025-06-15T15:06:40Z"}},
    ),
}
"""What each hop to the requests queue leaves in its dead-letter queue, and what a redrive makes of it."""


def test_every_hop_to_the_requests_queue_has_a_dead_letter_that_is_tried() -> None:
    hops = {hop for hop, kept in dead_letter_queues().items() if kept == QUEUES["requests"]}
    assert UNSENT.keys() >= hops


@pytest.mark.parametrize("hop", UNSENT)
def test_dead_letter_of_every_hop_to_the_requests_queue_is_redriven(queue: Queue, hop: str) -> None:
    names, body, message = UNSENT[hop]
    attributes = {**names, **({"ERROR_CODE": "NO_PERMISSIONS"} if names else {})}
    queue._sqs.send_message(
        QueueUrl=queue._url,
        MessageBody=json.dumps(body),
        MessageAttributes={n: {"DataType": "String", "StringValue": v} for n, v in attributes.items()},
    )
    assert main(PUT_BACK) == 0
    ((record,),) = [event["Records"] for event in queue.asked]
    assert json.loads(record["body"]) == message
    assert queue.left == 0


def test_dead_request_whose_body_is_an_object_is_redriven_whole(queue: Queue, stack: AccessTokens) -> None:
    body = "x" * MESSAGE_LIMIT_BYTES
    queue.with_bucket()
    queue.send("message-1", body)
    assert main(PUT_BACK) == 0
    ((record,),) = [event["Records"] for event in queue.asked]
    assert record["body"] == body


def test_dead_request_that_cannot_be_started_stays(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    queue.send("message-1", "{}")
    queue.answers = [({"batchItemFailures": [{"itemIdentifier": "message-1"}]}, None)]
    assert main(PUT_BACK) == 2
    assert "Left in the queue: message-1: AWS did not start it" in capsys.readouterr().err
    assert queue.left == 1


def test_function_that_fails_over_one_dead_request_is_said_and_tries_the_others(
    queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.send("message-1", "{}")
    queue.send("message-2", "{}")
    queue.answers = [({"errorMessage": "no memory"}, "Unhandled")]
    assert main(PUT_BACK) == 2
    err = capsys.readouterr().err
    assert "Redriven: 1." in err
    assert "no memory" in err
    assert "1 could not be redriven" in err
    assert queue.left == 1


def test_function_is_waited_for_as_long_as_it_may_take_and_invoked_once() -> None:
    config = Stack("demo", REGION, None).client("lambda").meta.config
    longest = max(map(timeout_of, resources("AWS::Serverless::Function")))
    assert config.read_timeout > longest == 900


def test_look_at_more_letters_than_can_be_seen_before_the_first_come_back_ends() -> None:
    class Returning:
        """A queue whose letters are seen again at once."""

        def __init__(self) -> None:
            self._at = 0

        def receive_message(self, **_: Any) -> dict[str, Any]:
            self._at += 10
            ids = [f"message-{n % 25}" for n in range(self._at - 10, self._at)]
            return {"Messages": [{"MessageId": id_, "Body": "", "ReceiptHandle": "r"} for id_ in ids]}

    sqs: Any = Returning()
    letters = [letter.id for letter in DeadLetterQueue("url", sqs).receive(30)]
    assert sorted(letters) == sorted(f"message-{n}" for n in range(25))


def test_list_followed_at_once_by_redrive_redrives_what_was_listed(
    queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(12):  # more than one call receives or releases
        queue.send(f"message-{n}", "{}")
    assert main(REQUESTS) == 0
    assert len(capsys.readouterr().out.splitlines()) == 13
    assert main(PUT_BACK) == 0
    assert "Redriven: 12." in capsys.readouterr().err
    assert queue.left == 0


def test_redrive_of_one_dead_request_leaves_the_others_to_the_next_command(queue: Queue) -> None:
    for n in range(3):
        queue.send(f"message-{n}", "{}")
    queue.answers = [({"batchItemFailures": [{"itemIdentifier": "message-1"}]}, None)]
    assert main([*PUT_BACK, "--id", "message-1"]) == 2
    assert main(PUT_BACK) == 0, "also the one that could not be redriven"
    assert queue.left == 0


@pytest.mark.parametrize("said", ["AccessDenied", "part"])
def test_list_without_the_right_to_release_says_for_how_long_they_are_hidden(
    queue: Queue, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    queue.send("message-1", "{}")
    make: Any = Stack.client

    def answer(**_: Any) -> tuple[Any, dict[str, Any]]:
        refusal = {"Error": {"Code": said, "Message": ""}} if said == "AccessDenied" else {"Failed": [{"Id": "0"}]}
        return type("Http", (), {"status_code": 403 if "Error" in refusal else 200})(), refusal

    def client(stack: Stack, service_name: str) -> Any:
        made = make(stack, service_name)
        if service_name == "sqs":
            made.meta.events.register("before-call.sqs.ChangeMessageVisibilityBatch", answer)
        return made

    monkeypatch.setattr(Stack, "client", client)
    assert main(REQUESTS) == 0
    out, err = capsys.readouterr()
    assert "message-1" in out
    assert "for 30 seconds" in err
    assert main([*REQUESTS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_unknown_dead_request_is_said(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no dead letter 'message-9'" in refused(capsys, *PUT_BACK, "--id", "message-9")


# -- other dead letters --------------------------------------------------------------------------------------------


@pytest.fixture
def invoked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What is asked of functions: their names and events. Each answers as `publish_changes` without a failure."""
    asked: list[tuple[str, Any]] = []
    make: Any = Stack.client

    def answer(params: dict[str, Any], model: Any, **_: Any) -> tuple[Any, dict[str, Any]]:
        http = type("Http", (), {"status_code": 200})()
        if model.name == "ListEventSourceMappings":
            pattern = json.dumps({"eventName": ["INSERT"], "dynamodb": {"NewImage": {"sk": {"S": ["status"]}}}})
            return http, {"EventSourceMappings": [{"FilterCriteria": {"Filters": [{"Pattern": pattern}]}}]}
        asked.append((params["url_path"].split("/")[-2], json.loads(params["body"])))
        said: dict[str, Any] = {"batchItemFailures": [], "stored": ["/0"], "failed": [{"path": "/1", "error": "gone"}]}
        return http, {"StatusCode": 200, "Payload": io.BytesIO(json.dumps(said).encode())}

    def client(stack: Stack, service_name: str) -> Any:
        made = make(stack, service_name)
        if service_name == "lambda":  # moto runs functions in Docker only
            made.meta.events.register("before-call.lambda", answer)
        return made

    monkeypatch.setattr(Stack, "client", client)
    return asked


def bury(sqs: Any, queue: str, *bodies: Any) -> None:
    url = sqs.get_queue_url(QueueName=queue)["QueueUrl"]
    for body in bodies:
        sqs.send_message(QueueUrl=url, MessageBody=body if isinstance(body, str) else json.dumps(body))


def counts(capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    assert main(["dead-letters", "count", "--stack", "hooks", "--json"]) == 0
    found: dict[str, int] = json.loads(capsys.readouterr().out)
    return found


FAILED_JOB = {
    "timestamp": "2025-06-15T15:06:40.000Z",
    "requestContext": {"requestId": "request-1", "condition": "RetriesExhausted"},
    "requestPayload": {"model": "acme/painter", "prompt": "CANARY"},
    "responsePayload": {"errorMessage": "no table"},
}


def test_failed_jobs_are_invoked_again_as_what_they_were(
    hooks: Any, invoked: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    redriven = {
        **FAILED_JOB,
        "requestContext": {"requestId": "request-9"},
        "requestPayload": {"request_id": "request-2", "job": {"model": "acme/painter"}},
    }
    bury(hooks, "RunJobsDeadLetterQueue", FAILED_JOB, redriven, "no JSON")
    assert main(["dead-letters", "redrive", "run-jobs", "--stack", "hooks"]) == 2
    assert [event for _, event in invoked] == [
        {"request_id": "request-1", "job": {"model": "acme/painter", "prompt": "CANARY"}},
        {"request_id": "request-2", "job": {"model": "acme/painter"}},
    ]
    out, err = capsys.readouterr()
    assert out == ""
    assert "Redriven: 2." in err
    assert "not an invocation" in err
    assert counts(capsys) == {"requests": 0, "webhooks": 0, "changes": 0, "run-jobs": 1, "invocations": 0}


def test_failed_jobs_are_listed_without_what_they_asked_for(hooks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bury(hooks, "RunJobsDeadLetterQueue", FAILED_JOB)
    assert main(["dead-letters", "list", "run-jobs", "--stack", "hooks"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split(maxsplit=2) == ["request-1", "2025-06-15T15:06:40.000Z", "no table"]
    assert "CANARY" not in out


@pytest.mark.parametrize(("options", "left"), [(["--all"], 0), (["--id", "?"], 1)])
def test_letters_are_forgotten_one_by_one_or_all(
    hooks: Any, capsys: pytest.CaptureFixture[str], options: list[str], left: int
) -> None:
    failed = {"requestContext": {"functionArn": "arn:aws:lambda:x:1:function:sweep:$LATEST"}, "responsePayload": {}}
    bury(hooks, "InvocationsDeadLetterQueue", failed)
    forget = ["dead-letters", "forget", "invocations", "--stack", "hooks"]
    if left:
        assert "no dead letter" in refused(capsys, *forget, *options)
    else:
        assert main([*forget, *options]) == 0
    assert counts(capsys)["invocations"] == left


def test_letters_are_never_forgotten_without_being_named(hooks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bury(hooks, "InvocationsDeadLetterQueue", {})
    forget = ("dead-letters", "forget", "invocations", "--stack", "hooks")
    assert "--id or --all" in refused(capsys, *forget)
    assert "--id or --all" in refused(capsys, *forget, "--id", "x", "--all")
    assert counts(capsys)["invocations"] == 1


def test_failed_sweep_cannot_be_redriven(hooks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bury(hooks, "InvocationsDeadLetterQueue", {})
    assert main(["dead-letters", "redrive", "invocations", "--stack", "hooks"]) == 2
    assert "the next sweep" in capsys.readouterr().err
    assert counts(capsys)["invocations"] == 1


def streamed(dynamodb: Any) -> tuple[str, str, list[dict[str, Any]]]:
    streams = create_client("dynamodbstreams", region_name=REGION)
    (stream,) = streams.list_streams(TableName=dynamodb)["Streams"]
    (shard,) = streams.describe_stream(StreamArn=stream["StreamArn"])["StreamDescription"]["Shards"]
    iterator = streams.get_shard_iterator(
        StreamArn=stream["StreamArn"], ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
    )["ShardIterator"]
    return stream["StreamArn"], shard["ShardId"], streams.get_records(ShardIterator=iterator)["Records"]


def test_changes_that_were_given_up_are_read_from_the_stream_again_and_published(
    hooks: Any, invoked: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    dynamodb = create_client("dynamodb", region_name=REGION)
    dynamodb.create_table(TableName="predictions", **table_properties())
    for n, sk in enumerate(("status", "status", "input#1", "status", "status")):
        dynamodb.put_item(TableName="predictions", Item={"pk": {"S": f"prediction#{n}"}, "sk": {"S": sk}})
    arn, shard, records = streamed("predictions")
    numbers = [record["dynamodb"]["SequenceNumber"] for record in records]
    part = {
        "shardId": shard,
        "startSequenceNumber": numbers[1],
        "endSequenceNumber": numbers[3],
        "approximateArrivalOfFirstRecord": "2025-06-15T15:06:40Z",
        "approximateArrivalOfLastRecord": "2025-06-15T15:06:41Z",
        "batchSize": 3,
        "streamArn": arn,
    }
    beyond = {**part, "endSequenceNumber": str(int(numbers[-1]) + 1)}
    bury(hooks, "ChangesDeadLetterQueue", *({"DDBStreamBatchInfo": each} for each in (part, beyond, {})))
    assert main(["dead-letters", "redrive", "changes", "--stack", "hooks"]) == 2
    ((_, event),) = invoked
    # What its filter lets through, and nothing of before or after.
    assert [record["dynamodb"]["SequenceNumber"] for record in event["Records"]] == [numbers[1], numbers[3]]
    assert all(isinstance(each["dynamodb"]["ApproximateCreationDateTime"], float) for each in event["Records"])
    err = capsys.readouterr().err
    assert "names no part of the stream" in err
    assert "did not return all of it" in err
    assert counts(capsys)["changes"] == 2


EFFECT = {
    "effect": "event",
    "first_at": 1_750_000_000,
    "record": {
        "eventName": "MODIFY",
        "dynamodb": {
            "SequenceNumber": "7",
            "ApproximateCreationDateTime": 1_750_000_000.5,
            "Keys": {"pk": {"S": f"prediction#{ID}"}, "sk": {"S": "status"}},
            "NewImage": {"visible": {"S": "succeeded"}},
        },
    },
}


def test_effects_that_were_given_up_are_listed_with_their_reason_and_retried_for_another_day(
    hooks: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    died = {**EFFECT, "effect": "callers", "callers": ["caller#1"]}
    bury(hooks, "ChangesDeadLetterQueue", {**EFFECT, "reason": "failed for a day"}, died)
    assert main(["dead-letters", "list", "changes", "--stack", "hooks"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["ID", "RECORDS", "FROM", "TO", "REASON"]
    moment = "2025-06-15T15:06:40Z"
    assert [row.split(maxsplit=4)[1:] for row in rows] == [
        ["1", moment, moment, "event: failed for a day"],
        ["1", moment, moment, "callers: publish_changes crashed on it every time; see its log"],
    ]
    hooks.purge_queue(QueueUrl=hooks.get_queue_url(QueueName="ChangesDeadLetterQueue")["QueueUrl"])
    bury(hooks, "ChangesDeadLetterQueue", {**EFFECT, "reason": "failed for a day"}, died)
    assert main(["dead-letters", "redrive", "changes", "--stack", "hooks"]) == 0
    again = messages(hooks, "ChangesRetryQueue")
    assert [{**each, "first_at": 1_750_000_000} for each in again] == [EFFECT, died]
    assert all(each["first_at"] > 1_750_000_000 for each in again)
    assert counts(capsys)["changes"] == 0


# -- a prediction's story ------------------------------------------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main([*argv, "--stack", "hooks", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def payloads(hooks: Any) -> Any:
    dynamodb = create_client("dynamodb", region_name=REGION)
    for sk, text in (("input#f", '{"prompt": "CANARY"}'), ("progress", '{"output": "CANARY", "logs": "CANARY"}')):
        item = {"pk": {"S": f"prediction#{'b' * 26}"}, "sk": {"S": sk}, "json": {"S": text}, "length": {"N": "20"}}
        dynamodb.put_item(TableName="table-1", Item=item)
    return dynamodb


@pytest.mark.usefixtures("payloads")
def test_story_is_told_in_its_order_without_input_and_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "b" * 26, "--stack", "hooks"]) == 0
    out = capsys.readouterr().out
    assert "created by alice (http)" in out
    assert "Waits for: the sweep to start another execution: the last one is not found" in out
    shown = told(capsys, "show", "b" * 26)
    assert [each["at"] for each in shown["story"]] == sorted(each["at"] for each in shown["story"])
    assert shown["characters"] == {"input": 20, "progress": 20}
    assert "hooks.example.com" not in out + json.dumps(shown)
    assert "CANARY" not in out + json.dumps(shown)


@pytest.mark.parametrize("group", [LOG_GROUP, "/aws/lambda/hooks"], ids=["the stack's", "of an earlier release"])
@pytest.mark.usefixtures("payloads")
def test_story_has_what_the_functions_logged_whatever_their_group_is_called(
    capsys: pytest.CaptureFixture[str], group: str
) -> None:
    logs = create_client("logs", region_name=REGION)
    if group != LOG_GROUP:
        logs.create_log_group(logGroupName=group)
    logs.create_log_stream(logGroupName=group, logStreamName="a")
    entry = {"level": "INFO", "message": "told by the log", "correlation_id": "b" * 26, "function_name": "x"}
    event: Any = {"timestamp": int(time.time() * 1000), "message": json.dumps(entry)}
    logs.put_log_events(logGroupName=group, logStreamName="a", logEvents=[event])
    assert "told by the log" in json.dumps(told(capsys, "show", "b" * 26)["story"])


def test_rules_of_others_on_the_bus_of_the_stack_are_named_before_it_is_deleted(
    stack: AccessTokens, capsys: pytest.CaptureFixture[str]
) -> None:
    cloudformation, events = (create_client(name, region_name=REGION) for name in ("cloudformation", "events"))
    bus = {"Type": "AWS::Events::EventBus", "Properties": {"Name": "kept"}}
    cloudformation.create_stack(StackName="kept", TemplateBody=template({}, {"EventBus": bus}))
    for rule in ("alerts", f"kept-recipe-{ID}", f"kept-recipe-x-recipe-{ID}"):
        events.put_rule(Name=rule, EventBusName="kept", EventPattern='{"source": ["x"]}')

    def named_rules() -> list[str]:
        assert main(["kept", "--json", "--stack", "kept", "--region", REGION]) == 0
        rows = json.loads(capsys.readouterr().out)
        return [row["name"] for row in rows if row["type"] == "AWS::Events::Rule"]

    # Those of the stack's own recipes go with it.
    assert named_rules() == ["kept/alerts", f"kept/kept-recipe-x-recipe-{ID}"]
    for rule in ("alerts", f"kept-recipe-x-recipe-{ID}"):
        events.delete_rule(Name=rule, EventBusName="kept")
    assert named_rules() == []


@pytest.mark.usefixtures("payloads")
def test_input_and_output_are_shown_where_they_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "show", "b" * 26, "--input")["input"] == {"prompt": "CANARY"}


@pytest.mark.parametrize("told", ["soon", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "\x1b[2J"])
def test_story_goes_without_a_time_of_replicate_that_is_none(
    payloads: Any, capsys: pytest.CaptureFixture[str], told: str
) -> None:
    payloads.update_item(
        TableName="table-1",
        Key={"pk": {"S": f"prediction#{'b' * 26}"}, "sk": {"S": "status"}},
        UpdateExpression="SET started_at = :told",
        ExpressionAttributeValues={":told": {"S": told}},
    )
    assert main(["show", "b" * 26, "--stack", "hooks"]) == 0
    out = capsys.readouterr().out
    assert "created by alice" in out
    assert "the model started" not in out
    assert "\x1b" not in out


def set_attributes(dynamodb: Any, **changes: Any) -> None:
    """Sets attributes of the prediction of these tests."""
    dynamodb.update_item(
        TableName="table-1",
        Key={"pk": {"S": f"prediction#{'b' * 26}"}, "sk": {"S": "status"}},
        UpdateExpression="SET " + ", ".join(f"#{name} = :{name}" for name in changes),
        ExpressionAttributeNames={f"#{name}": name for name in changes},
        ExpressionAttributeValues=serialize({f":{name}": value for name, value in changes.items()}),
    )


def story(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    """The timeline: minutes and seconds, and what happened."""
    shown = told(capsys, "show", "b" * 26)
    assert [each["at"] for each in shown["story"]] == sorted(each["at"] for each in shown["story"])
    return [(each["at"][14:], f"{each['where']}: {each['what']}") for each in shown["story"]]


def test_story_is_ordered_to_the_millisecond_also_where_the_table_has_whole_seconds(
    payloads: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    set_attributes(
        payloads, created_at="2025-06-15T15:06:40.731902Z", claimed=1_750_000_000, upstream_id="u",
        cancel_requested=1_750_000_002, started_at="2025-06-15T15:06:41.9Z", rank=9, status="succeeded",
        completed_at="2025-06-15T15:06:43.731Z", ended=1_750_000_003, deleted=1_750_000_009, visible="succeeded",
    )  # fmt: skip
    assert story(capsys) == [
        ("06:40.731Z", "table: created by alice (http)"),
        ("06:40.731Z", "table: claimed for submission"),
        ("06:41.900Z", "Replicate: the model started"),
        ("06:42.000Z", "table: cancellation requested"),
        ("06:43.731Z", "Replicate: completed: succeeded"),
        ("06:43.731Z", "table: finished: succeeded"),
        ("06:49.000Z", "table: data deleted by the owner"),
    ]


@pytest.mark.parametrize(
    ("changes", "upstream_status", "ends"),
    [
        ({"status": "canceled", "visible": "canceled"}, None, ["table: finished: canceled"]),
        (
            {"status": "failed", "visible": "failed", "upstream_id": "u", "upstream_status": "processing"},
            "processing",
            ["table: finished: failed"],
        ),
        (
            {"status": "failed", "visible": "failed", "upstream_id": "u", "upstream_status": "succeeded"},
            "succeeded",
            ["Replicate: completed: succeeded", "table: finished: failed"],
        ),
        (
            {"status": "aborted", "visible": "canceled", "upstream_id": "u"},
            "aborted",
            ["Replicate: completed: aborted", "table: finished: canceled"],
        ),
    ],
    ids=["never submitted", "ended by the stack", "too large", "aborted"],
)
def test_story_says_that_replicate_ended_it_only_where_it_did(
    payloads: Any,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    upstream_status: str | None,
    ends: list[str],
) -> None:
    ended = {"rank": 9, "completed_at": "2025-06-15T15:06:43.5Z", "ended": 1_750_000_003}
    set_attributes(payloads, **ended, **changes)
    assert [what for _, what in story(capsys) if "completed" in what or "finished" in what] == ends
    assert told(capsys, "show", "b" * 26)["upstream_status"] == upstream_status
    assert told(capsys, "show", "b" * 26)["cost"]["reason"] == "It ended before this stack recorded costs."


def test_origin_is_shown_with_its_names(payloads: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert (told(capsys, "show", "b" * 26)["origin"], told(capsys, "show", "b" * 26)["origin_names"]) == ("api", None)
    set_attributes(payloads, source="batch", origin={"batch": "c" * 26, "line": 3, "attempt": 1})
    shown = told(capsys, "show", "b" * 26)
    assert (shown["origin"], shown["origin_names"]) == ("batch", {"batch": "c" * 26, "line": 3, "attempt": 1})
    assert main(["show", "b" * 26, "--stack", "hooks"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^origin +batch$", out, re.MULTILINE)
    assert re.search(r'^origin_names +\{.*"line": 3', out, re.MULTILINE)


def test_unknown_prediction_is_said(hooks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no prediction" in refused(capsys, "show", "z" * 26, "--stack", "hooks")
    assert "no prediction" in refused(capsys, "outputs", "archive", "../x", "--stack", "hooks")


def prediction(**changed: Any) -> Prediction:
    texts = {"id": ID, "owner": "alice", "created_at": "2025-06-15T15:06:40Z", "fingerprint": "f", "source": "http"}
    values: dict[str, Any] = {**texts, "kind": "version", "status": "queued", "visible": "starting", "keyed": False}
    values |= {"created": 1, "rank": 0, "deadline": 1000, "execution_n": 1, "expires_at": 1}
    return Prediction(**(values | changed))


@pytest.mark.parametrize(
    ("changed", "execution", "said"),
    [
        ({"rank": 9, "visible": "succeeded"}, "SUCCEEDED", None),
        ({"rank": 9, "visible": "succeeded", "orphans": frozenset({"x"})}, "SUCCEEDED", "1 orphan"),
        ({"rank": 9, "visible": "succeeded", "deleted": 1, "next_check_at": 2}, None, "finish its deletion"),
        ({}, "FAILED", "the last one is FAILED"),
        ({"rank": 9, "visible": "processing"}, "RUNNING", "copy_outputs"),
        ({"rank": 2, "upstream_id": "u", "claimed": 1}, "RUNNING", "Replicate to complete it"),
        ({"rank": 2, "upstream_id": "u", "claimed": 1, "deadline": 10}, "RUNNING", "its deadline has passed"),
        ({"claimed": 1}, "RUNNING", "whose response was lost"),
        ({"submit_at": 200}, "RUNNING", "its turn to be submitted"),
        ({}, "RUNNING", "submit_prediction"),
    ],
)
def test_what_a_prediction_waits_for_is_said(changed: dict[str, Any], execution: str | None, said: str | None) -> None:
    waits = waits_for(prediction(**changed), execution, now=100)
    assert waits is None if said is None else said in str(waits)


@pytest.mark.parametrize("older_than", ["10", "-1m", "1w", "", "0m"])
def test_time_that_is_none_is_said(hooks: Any, capsys: pytest.CaptureFixture[str], older_than: str) -> None:
    assert "such as 90s" in refused(capsys, "stuck", "--stack", "hooks", f"--older-than={older_than}")


# -- files and secrets ---------------------------------------------------------------------------------------------


def test_what_could_not_be_copied_again_is_said(
    hooks: Any,
    invoked: list[tuple[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["outputs", "archive", ID, "--stack", "hooks"]) == 2
    assert invoked == [("CopyOutputs", {"id": ID, "again": True})]
    err = capsys.readouterr().err
    assert "1 copied, 1 failed." in err
    assert "/1: gone" in err


@pytest.fixture
def secret_values(hooks: Any) -> Callable[[str], str]:
    secretsmanager = create_client("secretsmanager", region_name=REGION)
    for name in (*SECRETS, "token", "signing"):
        secretsmanager.create_secret(Name=name, SecretString="old")
    return lambda name: str(secretsmanager.get_secret_value(SecretId=name)["SecretString"])


@pytest.mark.parametrize(("secret", "name"), [("webhook-master", "WebhookMasterSecret"), ("links", "LinkSecret")])
def test_secret_whose_change_ends_what_is_in_use_is_changed_only_by_a_clear_word(
    secret_values: Callable[[str], str], capsys: pytest.CaptureFixture[str], secret: str, name: str
) -> None:
    rotate = ("secrets", "rotate", secret, "--stack", "hooks")
    assert "--yes" in refused(capsys, *rotate)
    assert secret_values(name) == "old"
    assert main([*rotate, "--yes"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"[A-Za-z0-9]{64}", secret_values(name))
    assert secret_values(name) not in out + err


@pytest.mark.parametrize("given", ["", "short\n", "r8_" + "x" * 600, "r8_with spaces\ttabs\n", "r8_ümlaut-token\n"])
def test_token_that_can_be_none_is_not_stored(
    secret_values: Callable[[str], str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(given))
    assert "stdin" in refused(capsys, "secrets", "rotate", "replicate-token", "--stack", "hooks")
    assert secret_values("token") == "old"


def test_new_token_is_stored_as_it_is_and_not_shown(
    secret_values: Callable[[str], str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("r8_new_token\n"))
    assert main(["secrets", "rotate", "replicate-token", "--stack", "hooks"]) == 0
    assert secret_values("token") == "r8_new_token"
    assert "r8_" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("stored", ['{"token": ', '{"other": "r8_secret"}', "r8_secret with a space"])
def test_secret_without_a_token_is_said_and_not_shown(
    secret_values: Callable[[str], str], capsys: pytest.CaptureFixture[str], stored: str
) -> None:
    secrets = create_client("secretsmanager", region_name=REGION)
    secrets.put_secret_value(SecretId="token", SecretString=stored)
    said = refused(capsys, "secrets", "refresh", "--stack", "hooks")
    assert "holds no Replicate token" in said
    assert "r8_secret" not in said
    assert secret_values("signing") == "old"


# -- what the pages say --------------------------------------------------------------------------------------------

SHOWING = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
SHOWN = sorted(
    {
        re.split(r"\s+[#<>] ?", found)[0].strip()
        for page in SHOWING
        for block in re.findall(r"^```(?:bash|console)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        for found in re.findall(r"^(?:\$ )?(?:\.venv/bin/)?replicate-serverless (.*)$", block, re.MULTILINE)
    }
)


@pytest.mark.parametrize("shown", SHOWN)
def test_command_of_the_readme_or_a_page_is_one(shown: str) -> None:
    assert stack_of(shlex.split(shown))


def test_every_command_is_shown_on_some_page() -> None:
    whole = "".join(page.read_text() for page in SHOWING)
    for command in COMMANDS:
        assert " ".join(command) in whole, command


def test_submissions_and_readings_are_told_in_plain_words() -> None:
    readings = [
        {"at": 110, "pages": 1, "entries": 2, "undecided": ["x", "y"], "number": 12},
        {"at": 120, "pages": 0, "entries": 0, "why_not": "a page was answered 500"},
        {"at": 130, "pages": 2, "entries": 150},
    ]
    submissions = [{"at": 100, "outcome": "answered 502"}]
    waits = prediction(
        submissions_json=json.dumps(submissions),
        readings_json=json.dumps(readings),
        evidence_at=140,
        bound_at=150,
        unknown_creates=1,
    )
    said = [each.what for each in _of_submissions(waits)]
    assert said == [
        "submitted, outcome unknown: answered 502",
        "read Replicate's list: 1 pages, 2 predictions; undecidable: x, y and 10 more",
        "read Replicate's list: 0 pages, 0 predictions; this is no evidence, since a page was answered 500",
        "read Replicate's list: 2 pages, 150 predictions; none of them is this one",
        "evidence of absence: two complete readings do not show it",
        "bound, after 1 submissions that started nothing",
    ]
    undecided = prediction(claimed=1, readings_json=json.dumps(readings[:1]))
    assert "x, y" in str(waits_for(undecided, "RUNNING", now=100))
