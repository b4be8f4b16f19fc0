"""A new version is deployed while predictions run, over items of an earlier one; in the end the stack is deleted.

The earlier version is this one with the state machine as the first release had it, and with that one alone.
`old_items.json` holds what that release wrote into its table, as it was there: predictions that have ended, one that
runs at Replicate and whose execution is gone, and one that was only written down.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from local.cloud import CHECKOUT, CREDENTIALS, REGION, STACK_NAME, LocalCloud
from tests.support import old_machine
from tests.support.deployment import QUICK, copy_checkout

Wait = Callable[..., Any]

ENDED = ("succeeded", "failed", "canceled")
ITEMS = json.loads((Path(__file__).parent / "old_items.json").read_text())
OLD_TOKEN = "rs_" + "old".ljust(43, "o")
MACHINE = "statemachine/track_prediction.asl.json"
OLD = {
    name: f"old{name}".ljust(26, "a")
    for name in ("text", "files", "failed", "canceled", "running", "written", "started")
}
# Another one that was only written down, whose execution an old function starts in the midst of the deployment.
ITEMS += [
    json.loads(json.dumps(item).replace(OLD["written"], OLD["started"]))
    for item in ITEMS
    if OLD["written"] in item["pk"]["S"]
]
PAINTER = {"version": "local/painter", "input": {"prompt": "a lighthouse at dusk"}}
PICTURE = b"\x89PNG of the first release"


def older(definition: str) -> str:
    """The state machine of the first release, which told the sweep not when to look; with one state's name changed.

    It asked nobody which execution tracks the prediction, and was woken by success alone.
    """
    machine = old_machine.older(
        json.loads(definition.replace("${FirstPollSeconds}", "1001").replace("${PollSeconds}", "1002"))
    )
    for name in ("AwaitWebhook", "AwaitWebhookAgain"):
        arguments = machine["States"][name]["Arguments"]
        arguments["UpdateExpression"] = "SET task_token = :task_token"
        del arguments["ExpressionAttributeValues"][":next_check_at"]
    payload = machine["States"]["CopyOutputs"]["Arguments"]["Payload"]
    payload["attempt"] = "{% $states.context.State.RetryCount %}"
    return (
        json.dumps(machine)
        .replace('"CopyOutputs"', '"KeepOutputs"')
        .replace("1001", "${FirstPollSeconds}")
        .replace("1002", "${PollSeconds}")
    )


def with_one_machine(template: str) -> str:
    """The template without the second machine: all that names it names the first one, or is left out."""
    second, rest = re.subn(
        r"  # The same definition for predictions.*?(?=  StateMachineLogGroup:)", "", template, flags=re.DOTALL
    )[::-1]
    assert second == 1
    only = ("    DependsOn: TrackSubmitted", "- {Id: track_submitted", "ExecutionsFailed")
    lines = [
        line for line in rest.splitlines() if not ("TrackSubmitted" in line and any(each in line for each in only))
    ]
    text = "\n".join(lines).replace(", !Ref TrackSubmittedStateMachineRole", "")
    text = text.replace("!Ref TrackSubmittedStateMachine", "!Ref TrackPredictionStateMachine")
    return text.replace("-track-submitted", "-track-prediction") + "\n"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the earlier version."""
    folder = copy_checkout(tmp_path_factory)
    (folder / MACHINE).write_text(older((folder / MACHINE).read_text()))
    (folder / "template.yaml").write_text(with_one_machine((folder / "template.yaml").read_text()))
    return folder


@pytest.fixture(scope="module")
def own(checkout: Path) -> Iterator[LocalCloud]:
    """The earlier version, deployed."""
    with LocalCloud(parameters=QUICK, checkout=checkout) as started:
        yield started


class Caller:
    """Who calls the API with an access token of the first release."""

    def __init__(self, cloud: LocalCloud) -> None:
        self._cloud = cloud
        self._headers = {"Authorization": f"Bearer {OLD_TOKEN}"}

    def call(self, method: str, path: str, body: Any = None, key: str = "") -> httpx.Response:
        headers = self._headers | ({"Idempotency-Key": key} if key else {})
        url = self._cloud.api_url + path
        return httpx.request(method, url, headers=headers, json=body, timeout=60, trust_env=False)

    def get(self, path: str) -> Any:
        return self.call("GET", path).raise_for_status().json()

    def sleep(self, seconds: float, key: str = "") -> str:
        body = {"version": "local/sleeper", "input": {"seconds": seconds}}
        answer = self.call("POST", "/predictions", body, key)
        for _ in range(5):
            if not key or answer.status_code < 500:
                break
            answer = self.call("POST", "/predictions", body, key)  # what keys are for
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def paint(self) -> str:
        answer = self.call("POST", "/predictions", PAINTER)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def ended(self, path: str, wait_until: Wait) -> Any:
        """Waits for the end of a prediction or a batch, and returns it."""
        seen: list[Any] = []

        def over() -> bool:
            seen[:] = [self.get(path)]
            return seen[0]["status"] in ENDED

        try:
            wait_until(over, 90)
        except AssertionError:
            pytest.fail(f"does not end: {seen}")
        return seen[0]

    def keep_sleeping(self, stopped: threading.Event, ids: list[str]) -> None:
        """Starts one prediction after the other, each with a key, twice."""
        while not stopped.wait(0.3):
            key = f"load-{len(ids)}"
            ids.append(self.sleep(0.5, key))
            assert self.sleep(0.5, key) == ids[-1]


def put_old_items(cloud: LocalCloud, running: Any) -> None:
    """Writes what the first release had written ten minutes ago, with its access token and its file."""
    now = int(time.time())
    dynamodb = cloud.client("dynamodb")
    for item in ITEMS:
        written = next(int(each["created"]["N"]) for each in ITEMS if each["pk"] == item["pk"] and "created" in each)
        moved = {
            name: {"N": str(int(value["N"]) + now - 600 - written)} if int(value.get("N", 0)) > 1e9 else value
            for name, value in item.items()
        }
        if "upstream_id" in moved and OLD["running"] in moved["pk"]["S"]:
            moved["upstream_id"] = {"S": running["id"]}
        if "version" in moved:
            moved["version"] = {"S": running["version"]}
        dynamodb.put_item(TableName=cloud.stack.table_name, Item=moved)
        for file in json.loads(item.get("files_json", {"S": "[]"})["S"]):
            cloud.client("s3").put_object(Bucket=cloud.stack.outputs_bucket, Key=file["key"], Body=PICTURE)
    token = {
        "pk": {"S": "tokens"}, "sk": {"S": hashlib.sha256(OLD_TOKEN.encode()).hexdigest()}, "owner": {"S": "alice"},
        "scopes": {"SS": ["manage", "predict", "read"]}, "name": {"S": "old"}, "token_hint": {"S": "oldo"},
        "created_at": {"S": "2026-11-20T18:13:45.212415+00:00"},
    }  # fmt: skip
    dynamodb.put_item(TableName=cloud.stack.table_name, Item=token)


def make_due(cloud: LocalCloud, *prediction_ids: str) -> None:
    """Lets the sweep look at once: an earlier one may have started what the deployment has killed."""
    dynamodb = cloud.client("dynamodb")
    for id_ in prediction_ids:
        with contextlib.suppress(dynamodb.exceptions.ConditionalCheckFailedException):  # it has ended
            dynamodb.update_item(
                TableName=cloud.stack.table_name,
                Key={"pk": {"S": f"prediction#{id_}"}, "sk": {"S": "status"}},
                UpdateExpression="SET next_check_at = :then",
                ConditionExpression="attribute_exists(#open)",
                ExpressionAttributeNames={"#open": "open"},
                ExpressionAttributeValues={":then": {"N": "1"}},
            )


def last_state(cloud: LocalCloud, prediction_id: str) -> str:
    """The last state that a prediction's execution has entered, by which the versions differ."""
    key = {"pk": {"S": f"prediction#{prediction_id}"}, "sk": {"S": "status"}}
    item = cloud.client("dynamodb").get_item(TableName=cloud.stack.table_name, Key=key)["Item"]
    history = cloud.client("stepfunctions").get_execution_history(executionArn=item["execution_arn"]["S"])["events"]
    return [str(each["stateEnteredEventDetails"]["name"]) for each in history if "stateEnteredEventDetails" in each][-1]


def test_new_version_over_a_working_stack_loses_nothing_and_a_deletion_keeps_the_data(
    own: LocalCloud, checkout: Path, wait_until: Wait
) -> None:
    alice = Caller(own)
    with httpx.Client(
        base_url=own.replicate_url, headers=own.replicate.headers, trust_env=False, timeout=60
    ) as replicate:
        version = replicate.get("/models/local/sleeper").json()["latest_version"]["id"]
        running = replicate.post("/predictions", json={"version": version, "input": {"seconds": 3600}}).json()
    own.replicate.reset()
    put_old_items(own, running)

    # Under way in the earlier version: by HTTP, by the queue, and a batch.
    slow = [alice.sleep(seconds) for seconds in (14, 15, 16)]
    quick = alice.sleep(0)
    own.replicate.fault("start_late", seconds=16)
    picture = alice.paint()
    message = {"model": "local/sleeper", "input": {"seconds": 12}}
    for _ in range(2):
        own.client("sqs").send_message(QueueUrl=own.outputs["RequestsQueueUrl"], MessageBody=json.dumps(message))
    lines = [{"model": "local/sleeper", "input": {"seconds": 12, "text": str(n)}} for n in range(4)]
    answer = alice.call("POST", "/batches", {"requests": lines})
    assert answer.status_code == 201, answer.text
    batch = answer.json()["id"]
    wait_until(lambda: alice.get(f"/predictions/{quick}")["status"] == "succeeded", 60, "an end in the earlier version")
    # Whoever learns of an end writes it at once; the execution hears of it later.
    wait_until(lambda: last_state(own, quick) == "KeepOutputs", 60, "the last state of the earlier version")
    # The emulator ends the functions that a deployment changes; a message that one of them had would come again after
    # three minutes.
    wait_until(lambda: len(own.replicate.creates()) == len([*slow, quick, picture]) + 2 + len(lines), 60, "all creates")

    # The new version comes while callers go on.
    for changed in (MACHINE, "template.yaml"):
        shutil.copy(CHECKOUT / changed, checkout / changed)
    (checkout / "layers/predictions/predictions/version.py").write_text('"""Not the code of the version before."""\n')
    stopped = threading.Event()
    during: list[str] = []
    calling = threading.Thread(target=alice.keep_sleeping, args=(stopped, during))
    calling.start()
    try:
        own.deploy_again()
        wait_until(lambda: len(during) > 5, 60, "callers that go on")
    finally:
        stopped.set()
        calling.join()
    after = alice.paint()
    assert len(during) > 5
    # A function of the earlier version that still ran: it says in the input what the machines say now.
    own.client("stepfunctions").start_execution(
        stateMachineArn=own.outputs["TrackPredictionStateMachineArn"],
        name=f"{OLD['started']}-1",
        input=json.dumps({"id": OLD["started"], "submit": True}),
    )

    # Each one ends well, and was created once; an execution goes on with the definition that it began with.
    mine = [*slow, picture, *during, after]
    assert Counter(alice.ended(f"/predictions/{each}", wait_until)["status"] for each in mine) == {
        "succeeded": len(mine)
    }
    for each in (slow[-1], picture):
        wait_until(
            lambda each=each: last_state(own, each) == "KeepOutputs", 60, "the last state of the earlier version"
        )
    (file,) = alice.get(f"/predictions/{picture}")["output_files"]
    assert file["bytes"] > 0, "an old execution, woken by a new function, copies too"
    assert own.resources["TrackSubmittedStateMachine"] != own.resources["TrackPredictionStateMachine"]
    wait_until(lambda: last_state(own, after) == "CopyOutputs", 60, "the last state of the new version")
    ended = alice.ended(f"/batches/{batch}", wait_until)
    assert (ended["status"], ended["counts"]["succeeded"]) == ("succeeded", 4)

    # Items of the first release are read, listed, canceled and swept.
    shown = {name: alice.get(f"/predictions/{OLD[name]}") for name in OLD}
    assert shown["text"]["output"][:3] == ["It", " began", " with"]
    assert httpx.get(shown["files"]["output"], trust_env=False, timeout=60).content == PICTURE
    assert (shown["failed"]["status"], shown["failed"]["error"][:12]) == ("failed", "RuntimeError")
    assert shown["canceled"]["status"] == "canceled"
    for name in ("text", "files", "failed", "canceled"):
        assert shown[name]["cost"]["reason"] == "It ended before this stack recorded costs."
    assert {shown[name]["status"] for name in ("running", "written", "started")} <= {
        "starting",
        "processing",
        "succeeded",
    }
    assert set(OLD.values()) <= {each["id"] for each in alice.get("/predictions")["results"]}
    make_due(own, OLD["written"], OLD["running"])
    own.client("lambda").invoke(FunctionName=own.resources["SweepPredictionsFunction"], Payload=b"{}")
    assert alice.call("POST", f"/predictions/{OLD['running']}/cancel").status_code == 200
    for name, status in (("written", "succeeded"), ("started", "succeeded"), ("running", "canceled")):
        assert alice.ended(f"/predictions/{OLD[name]}", wait_until)["status"] == status

    creates = [str(each["body"]["webhook"]).rpartition("/")[2].partition("?")[0] for each in own.replicate.creates()]
    assert set(Counter(creates).values()) == {1}
    assert set(creates) >= {*mine, quick, OLD["written"], OLD["started"]}
    assert OLD["running"] not in creates
    assert len(creates) == len(mine) + 1 + 2 + 2 + 4

    # What a deletion leaves is what the command names, before and after.
    kept = {own.stack.table_name, own.stack.outputs_bucket, own.stack.inputs_bucket}
    assert named_as_kept(own) == kept
    own.delete()
    assert named_as_kept(own) == kept
    item = own.client("dynamodb").get_item(TableName=own.stack.table_name, Key={n: ITEMS[0][n] for n in ("pk", "sk")})
    assert item["Item"]["pk"] == ITEMS[0]["pk"]
    objects = own.client("s3").list_objects_v2(Bucket=own.stack.outputs_bucket)["Contents"]
    assert any(OLD["files"] in each["Key"] for each in objects)
    own.client("s3").head_bucket(Bucket=own.stack.inputs_bucket)
    assert own.client("secretsmanager").list_secrets()["SecretList"] == []
    assert not [
        each for each in own.client("lambda").list_functions()["Functions"] if STACK_NAME in each["FunctionName"]
    ]


def named_as_kept(cloud: LocalCloud) -> set[str]:
    """What `replicate-serverless kept` names."""
    environment = {**os.environ, **CREDENTIALS, "AWS_ENDPOINT_URL": cloud.endpoint_url, "AWS_REGION": REGION}
    done = subprocess.run(  # noqa: S603  # ours
        [sys.executable, "-m", "predictions", "kept", "--stack", STACK_NAME, "--json"],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return {each["name"] for each in json.loads(done.stdout)}
