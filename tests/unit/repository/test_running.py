"""The running local stack: one in a folder, found again, and described for a shell."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from local import activity, cloud
from local.__main__ import run
from local.cloud import CHECKOUT, OWNER, LocalCloud, LocalCloudError, Stack, stack_parameters
from local.running import exports, reserved, running_stack
from local.terminal import Terminal
from tests.support.template import load_template

STACK = Stack(**{each.name: f"the-{each.name}" for each in fields(Stack)})
PYTHON = (sys.executable, "-c")
HOLDS = """
import fcntl, os, sys
lock = open(sys.argv[1] + "/stack.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print(os.getpid(), file=lock, flush=True)
print("holds it", flush=True)
sys.stdin.read()
"""  # what `reserved` does, without its imports


# -- one in a folder ------------------------------------------------------------------------------------------------


def test_second_stack_in_a_folder_is_refused_before_it_starts_and_leaves_the_first_ones_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_DIR", str(tmp_path))
    monkeypatch.setattr(cloud, "EMULATOR_PYTHON", tmp_path / "none")  # one that is not refused ends soon
    with reserved(tmp_path), STACK.file(tmp_path / "stack.json"):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(LocalCloudError) as refused:
            run(Terminal(StringIO()), {})
        assert f"is running in {tmp_path} already (process {os.getpid()})" in str(refused.value)
        assert "make local LOCAL_DIR=/tmp/second" in str(refused.value)
        assert sorted(tmp_path.iterdir()) == before, "it has started something"
        assert Stack(**json.loads((tmp_path / "stack.json").read_text())) == STACK
    assert not (tmp_path / "stack.json").exists()


def test_folder_of_a_killed_process_is_free_and_its_file_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen(  # noqa: S603  # our own code
        [*PYTHON, HOLDS, str(tmp_path)], cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout
        assert first.stdout.readline() == b"holds it\n"
        (tmp_path / "stack.json").write_text("of the first")
        with pytest.raises(LocalCloudError, match=rf"\(process {first.pid}\)"), reserved(tmp_path):
            pass
        assert (tmp_path / "stack.json").exists()
        first.kill()
    with reserved(tmp_path):
        assert not (tmp_path / "stack.json").exists()


def test_folder_that_names_a_process_which_is_not_the_stack_is_free(tmp_path: Path) -> None:
    (tmp_path / "stack.lock").write_text(f"{os.getppid()}\n")  # given out again
    with reserved(tmp_path):
        assert (tmp_path / "stack.lock").read_text() == f"{os.getpid()}\n"


def test_folder_that_cannot_be_made_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LocalCloudError, match=r"cannot be used .*Set LOCAL_DIR"), reserved(tmp_path / "file"):
        pass


# -- its parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("PollSecond=5", "no parameter 'PollSecond'. Did you mean PollSeconds or FirstPollSeconds"),
        ("FirstPollSeconds=5 pollseconds=5", "no parameter 'pollseconds'. Did you mean PollSeconds"),
        (
            "Xyzzy=5",
            "no parameter 'Xyzzy'. It has AlarmTopicArn, AllowLoopbackWebhooks, .*, WebhookReservedConcurrency",
        ),
        ("PollSeconds", "must be"),
        ('"PollSeconds=5', "cannot be read"),
    ],
)
def test_invalid_parameter_is_refused(text: str, message: str) -> None:
    with pytest.raises(LocalCloudError, match=message):
        stack_parameters(text)


def test_parameters_of_the_template_are_accepted() -> None:
    assert stack_parameters("") == {}
    text = " ".join(f"{name}='a b'" for name in load_template()["Parameters"])
    assert stack_parameters(text) == dict.fromkeys(load_template()["Parameters"], "a b")


def test_unknown_parameter_is_refused_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_DIR", str(tmp_path / "new"))
    monkeypatch.setattr(cloud, "EMULATOR_PYTHON", tmp_path / "none")
    with pytest.raises(LocalCloudError, match="no parameter 'PollSecond'"):
        run(Terminal(StringIO()), {"STACK_PARAMETERS": "PollSecond=5"})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("parameters", "owner"), [({}, OWNER), ({"QueueOwner": "alice"}, "alice")])
def test_messages_and_invocations_belong_to_the_owner_of_the_token(parameters: dict[str, str], owner: str) -> None:
    started = LocalCloud(parameters=parameters)
    assert started.owner == owner
    assert started.deployed_parameters("http://127.0.0.1:1/v1", "r8_token")["QueueOwner"] == owner


# -- for a shell ----------------------------------------------------------------------------------------------------


def shell(text: str, names: list[str], **variables: str) -> dict[str, str]:
    """Evaluate what `make env` prints in a shell; return its variables."""
    script = f'eval "$1"; for name in {" ".join(names)}; do eval printf "%s=%s\\\\\\\\0" $name "\\"\\$$name\\""; done'
    done = subprocess.run(  # noqa: S603  # our own script
        ["/bin/sh", "-euc", script, "sh", text], env={"PATH": os.defpath, **variables}, capture_output=True, check=True
    )
    return dict(line.partition("=")[::2] for line in done.stdout.decode().split("\0") if line)


def test_exports_are_quoted_and_set_what_the_pages_use() -> None:
    stack = replace(STACK, access_token="""rs_'"$(exit 3)`exit 3`\\ ;&""", queue_url="http://q?a=1&b=2")
    text = exports(stack, {})
    names = [line.split()[1].partition("=")[0] for line in text.splitlines() if line.startswith("export ")]
    found = shell(text, names, AWS_PROFILE="work", AWS_SESSION_TOKEN="other")
    assert found.pop("PATH") == f"{CHECKOUT / '.local' / 'bin'}:{os.defpath}"
    assert found == {
        "API": stack.api_url,
        "TOKEN": stack.access_token,
        "OWNER": stack.owner,
        "STACK": "replicate-serverless",
        "QUEUE": "http://q?a=1&b=2",
        "INPUTS_BUCKET": stack.inputs_bucket,
        "OUTPUTS_BUCKET": stack.outputs_bucket,
        "FUNCTION": stack.run_prediction_function_name,
        "FUNCTION_ARN": stack.run_prediction_function_arn,
        "REPLICATE": stack.replicate_api_url,
        "AWS_ENDPOINT_URL": stack.endpoint_url,
        "AWS_REGION": stack.region,
        "AWS_DEFAULT_REGION": stack.region,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }
    unset = ["AWS_PROFILE", "AWS_SESSION_TOKEN"]
    with pytest.raises(subprocess.CalledProcessError):
        shell(text, unset, AWS_PROFILE="work", AWS_SESSION_TOKEN="other")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"https_proxy": "http://proxy:1"}, "127.0.0.1,localhost"),
        ({"HTTP_PROXY": "http://proxy:1", "NO_PROXY": "intranet"}, "intranet,127.0.0.1,localhost"),
    ],
)
def test_exports_lead_past_a_proxy(environment: dict[str, str], expected: str) -> None:
    assert shell(exports(STACK, environment), ["NO_PROXY"]) == {"NO_PROXY": expected}


def test_old_aws_command_addresses_the_stack_for_queues_too(tmp_path: Path) -> None:
    """Version 1 of the AWS CLI takes AWS_ENDPOINT_URL for all services except a few, of which SQS is one."""
    installed = tmp_path / "aws"
    installed.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    installed.chmod(0o755)
    script = f"{exports(STACK, {})}\naws sqs send-message 'a b'\nunset AWS_ENDPOINT_URL\naws s3 ls"
    done = subprocess.run(  # noqa: S603  # our own script
        ["/bin/sh", "-euc", script],
        env={"PATH": f"{tmp_path}:{os.defpath}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"--endpoint-url={STACK.endpoint_url}|sqs|send-message|a b|s3|ls|"


def test_exports_have_the_operators_command_and_no_other() -> None:
    exports(STACK, {})
    (only,) = (CHECKOUT / ".local" / "bin").iterdir()
    assert only.name == "replicate-serverless"
    assert only.resolve() == (CHECKOUT / ".venv" / "bin" / only.name).resolve()


def test_environment_without_a_running_stack_is_an_error_beside_the_exports(tmp_path: Path) -> None:
    done = subprocess.run(  # our own command
        [sys.executable, "-m", "local", "env"],
        cwd=CHECKOUT,
        env={"PATH": os.defpath, "LOCAL_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "No local stack is running. Run `make local`" in done.stderr


@pytest.fixture
def emulator() -> Iterator[str]:
    """An address at which every request succeeds."""

    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_running_stack_is_found_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulator: str) -> None:
    monkeypatch.setenv("LOCAL_DIR", str(tmp_path))
    stack = replace(STACK, endpoint_url=emulator)
    with stack.file(tmp_path / "stack.json"):
        assert running_stack() == stack


# -- what happens in it ---------------------------------------------------------------------------------------------

ITEM = {"pk": "prediction#p", "sk": "status", "id": "p", "owner": "local", "source": "queue", "name": "local/painter"}


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ({}, ITEM | {"visible": "starting"}, "p starting: local/painter, of local, from queue"),
        (ITEM | {"visible": "starting"}, ITEM | {"visible": "processing"}, "p processing"),
        (ITEM | {"visible": "processing"}, ITEM | {"visible": "failed", "error": "x" * 900}, f"p failed: {'x' * 300}"),
        (ITEM | {"visible": "processing"}, ITEM | {"visible": "processing", "rank": "2"}, None),
        ({}, ITEM | {"sk": "input#1", "visible": "starting"}, None),
        ({}, ITEM | {"pk": "batch#b", "visible": "starting"}, None),
    ],
)
def test_change_of_a_status_is_a_line(old: dict[str, Any], new: dict[str, Any], line: str | None) -> None:
    assert activity.change(old, new) == line


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/predictions", ("request", "POST /predictions: 201 in 0.3 s")),
        ("/webhooks/replicate/p", ("webhook", "p from Replicate: 201 in 0.3 s")),
        ("/webhooks/default/secret", ("request", "POST /webhooks/default/secret: 201 in 0.3 s")),
    ],
)
def test_request_and_webhook_of_replicate_are_lines(path: str, expected: tuple[str, str]) -> None:
    assert activity.request({"method": "POST", "path": path, "status": 201, "seconds": 0.26}) == expected


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (
            {"message": "webhook delivered", "webhook_id": "p-completed", "answer": 204},
            "p-completed to the caller: 204",
        ),
        (
            {"message": "webhook not delivered", "webhook_id": "p-start", "reason": "answer 500", "wait_seconds": 5},
            "p-start to the caller: answer 500, sent again in 5 s",
        ),
        (
            {"message": "webhook not delivered", "webhook_id": "p-start", "reason": "410", "wait_seconds": None},
            "p-start to the caller: 410, given up",
        ),
        ({"message": "webhook verified", "status": "succeeded"}, None),
        ({"_aws": {}}, None),
    ],
)
def test_webhook_to_a_caller_is_a_line(record: dict[str, Any], line: str | None) -> None:
    assert activity.delivery(record) == line


def test_growing_log_is_read_once_and_by_whole_lines(tmp_path: Path) -> None:
    log = tmp_path / "requests.log"
    tail = activity._Tail(log)
    assert list(tail.records()) == []
    log.write_text('{"n": 1}\nTraceback\n{"n": broken}\n{"n": 2')
    assert list(tail.records()) == [{"n": 1}]
    with log.open("a") as more:
        more.write("}\n")
    assert list(tail.records()) == [{"n": 2}]
    assert list(tail.records()) == []
