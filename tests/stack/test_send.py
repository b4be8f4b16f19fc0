"""`make send` against the deployed stack."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest

from local.activity import Activity
from local.cloud import CHECKOUT, LocalCloud
from local.replicate.process import LocalReplicate
from local.send import NotSendable, SendFailed, send
from local.terminal import Terminal

EVENTS = CHECKOUT / "events"
Send = Callable[..., str]


@pytest.fixture
def sent(cloud: LocalCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Send]:
    """Sends a sample to the stack, which is described where `make local` does; gives what was told."""
    monkeypatch.setenv("LOCAL_DIR", str(tmp_path))

    def run(sample: str, model: str | None = None) -> str:
        told = StringIO()
        send(Terminal(told), EVENTS / f"{sample}.json", model=model)
        return told.getvalue()

    with cloud.stack.file(tmp_path / "stack.json"):
        yield run


def test_sample_that_only_the_stack_sends_says_why(sent: Send) -> None:
    with pytest.raises(NotSendable, match="A state machine calls copy_outputs"):
        sent("copy_outputs/first_execution")
    with pytest.raises(SendFailed, match=r"^Sample .* not found"):
        sent("copy_outputs/nothing")


def test_refused_sample_is_sent_as_it_is(sent: Send, replicate: LocalReplicate) -> None:
    told = sent("start_prediction/refused_unknown_model")
    assert " 404 Not Found" in told
    assert "nobody/nothing" in told
    assert replicate.creates() == []


def test_sample_of_a_route_is_a_request_and_its_prediction_is_followed_to_its_end(sent: Send) -> None:
    told = sent("start_prediction/community_model")
    assert "local/painter instead of stability-ai/sdxl" in told
    assert re.search(r"answer +201 Created", told), told
    names = re.findall(r"^ +[0-9.]+ s  (\w+)", told, re.MULTILINE)
    assert names[:2] == ["sent", "answer"]
    assert names[-2:] == ["succeeded", "output"], told
    assert re.search(r"output +[0-9,]+ bytes of image/png\n +file +s3://\S+/local/\S+\n", told), told


def test_sample_of_a_route_that_starts_nothing_is_answered_only(sent: Send) -> None:
    assert "200 OK" in sent("read_predictions/list")


def test_sample_of_a_webhook_is_sent_without_a_token(sent: Send) -> None:
    assert " 401 " in sent("receive_webhook/refused_forged")


def test_sample_of_a_run_job_is_an_invocation(sent: Send) -> None:
    told = sent("run_prediction/not_waiting", model="local/storyteller")
    assert "invocation of RunPredictionFunction" in told
    assert re.search(r"^ +[0-9.]+ s  succeeded", told, re.MULTILINE), told


def test_samples_of_the_queue_and_of_s3_start_what_a_recipe_and_a_message_ask_for(sent: Send) -> None:
    told = sent("start_from_queue/request")
    assert "message to the requests queue" in told
    assert re.search(r"^ +[0-9.]+ s  succeeded", told, re.MULTILINE), told
    assert " 201 Created" in sent("manage_recipes/create")
    told = sent("start_from_queue/s3")
    assert "/postcards/lisbon.json" in told.replace("\n", "")
    assert re.search(r"^ +[0-9.]+ s  succeeded", told, re.MULTILINE), told


def test_what_comes_without_a_token_is_shown_to_that_of_the_stack(cloud: LocalCloud, sent: Send) -> None:
    told = sent("run_prediction/not_waiting", model="local/storyteller") + sent("start_from_queue/request")
    started = re.findall(r"succeeded +([a-z0-9]{26})$", told, re.MULTILINE)
    assert len(started) == 2, told
    headers = {"Authorization": f"Bearer {cloud.stack.access_token}"}
    answer = httpx.get(f"{cloud.stack.api_url}/predictions", headers=headers, trust_env=False, timeout=30)
    assert set(started) <= {each["id"] for each in answer.raise_for_status().json()["results"]}


def test_requests_status_changes_and_webhooks_are_lines(
    cloud: LocalCloud, replicate: LocalReplicate, wait_until: Callable[..., Any]
) -> None:
    told = StringIO()
    activity = Activity(cloud, Terminal(told))
    activity.skip()
    body = {
        "version": "local/painter",
        "input": {"prompt": "a lighthouse"},
        "webhook": "http://127.0.0.1:9/nobody",
        "webhook_events_filter": ["completed"],
    }
    headers = {"Authorization": f"Bearer {cloud.stack.access_token}"}
    answer = httpx.post(f"{cloud.stack.api_url}/predictions", headers=headers, json=body, trust_env=False, timeout=60)
    id_ = answer.raise_for_status().json()["id"]

    def lines() -> list[str]:
        activity.show()
        return re.findall(rf"^ +[0-9.]+ s  (.*{id_}.*|request .*)$", told.getvalue(), re.MULTILINE)

    wait_until(lambda: [line for line in lines() if "to the caller" in line], 30, "a line of the caller's webhook")
    kinds = [" ".join(line.split()).partition(f" {id_}") for line in lines()]
    assert [name for name, _, _ in kinds if name.startswith("request POST /predictions: 201 in ")]
    assert ("prediction", f" {id_}", " starting: local/painter, of local, from http") in kinds
    assert ("prediction", f" {id_}", " succeeded") in kinds
    assert [rest for name, _, rest in kinds if name == "webhook" and rest.startswith(" from Replicate: 200 in")]
    assert [rest for name, _, rest in kinds if name == "webhook" and rest.startswith("-completed-1 to the caller: ")]
    assert told.getvalue().count(f"{id_} succeeded") == 1
    assert (cloud.logs / "functions.log").stat().st_size > 0


def test_command_says_what_went_wrong_and_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "local", "send", str(EVENTS / "run_prediction" / "prompt.json")]
    environment = {"PATH": "/usr/bin:/bin", "LOCAL_DIR": str(tmp_path)}
    done = subprocess.run(  # noqa: S603  # our own command
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "No local stack is running. Run `make local`" in done.stdout
    assert done.stderr == ""
