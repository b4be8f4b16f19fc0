"""The commands of an operator, on the deployed stack: those of the runbook, and what each does."""

import io
import json
import re
import shlex
import time
import zipfile
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any

import httpx
import pytest
from predictions.cli.__main__ import main

from local.cloud import CREDENTIALS, REGION, STACK_NAME, LocalCloud
from local.replicate.process import LocalReplicate
from tests.support.commands import stack_of
from tests.support.template import ROOT

Api = Callable[..., httpx.Client]
WaitUntil = Callable[..., Any]
Run = Callable[..., tuple[int, str, str]]

PAINTER = {"version": "local/painter", "input": {"prompt": "CANARY of an operator"}}


@pytest.fixture
def run(cloud: LocalCloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command as on a terminal: its exit code, stdout and stderr."""
    for name, value in {**CREDENTIALS, "AWS_REGION": REGION, "AWS_ENDPOINT_URL": cloud.endpoint_url}.items():
        monkeypatch.setenv(name, value)

    def command(*argv: str) -> tuple[int, str, str]:
        code = main([*argv, "--stack", STACK_NAME])
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def painted(api: Api, replicate: LocalReplicate, wait_until: WaitUntil) -> str:  # without faults
    """A prediction that has ended, with a file."""
    prediction_id = api("operated").post("/predictions", json=PAINTER, headers={"Prefer": "wait"}).json()["id"]
    path = f"/predictions/{prediction_id}"
    wait_until(lambda: api("operated").get(path).json()["status"] == "succeeded", 20, "its end")
    return str(prediction_id)


def test_story_of_a_prediction_has_its_states_its_webhooks_and_its_files_in_order(
    run: Run, painted: str, wait_until: WaitUntil
) -> None:
    parts = ("created by operated (http)", "enters AwaitWebhook", "enters CopyOutputs", "webhook verified")
    shown: dict[str, Any] = {}

    def complete() -> bool:
        code, out, _ = run("show", painted, "--json")
        assert code == 0
        shown.update(json.loads(out))
        what = [f"{each['where']}: {each['what']}" for each in shown["story"]]
        return all(any(part in each for each in what) for part in parts)

    # Whoever learns of the end writes it; the execution and Replicate's own webhook may come later.
    wait_until(complete, 20, f"{parts} in its story")
    out = json.dumps(shown)
    assert [each["at"] for each in shown["story"]] == sorted(each["at"] for each in shown["story"])
    (file,) = shown["files"]
    assert file["bytes"] > 0
    assert "CANARY" not in out
    _, text, _ = run("show", painted)
    assert file["key"] in text
    assert "CANARY" not in text
    assert "CANARY" in run("show", painted, "--input")[1]


def test_file_that_could_not_be_copied_is_archived_while_replicate_has_it(
    run: Run, api: Api, replicate: LocalReplicate, cloud: LocalCloud, wait_until: WaitUntil
) -> None:
    # Gone for the copy, and there again.
    replicate.fault("file_error", status=404, times=None)
    prediction_id = api("operated").post("/predictions", json=PAINTER).json()["id"]

    def read() -> dict[str, Any]:
        found: dict[str, Any] = api("operated").get(f"/predictions/{prediction_id}").json()
        return found

    ended = wait_until(lambda: read() if read()["status"] == "succeeded" else None, 20, "the end")
    assert ended["error"]
    code, _, err = run("outputs", "archive", prediction_id)
    assert code == 2
    assert "0 copied, 1 failed" in err
    replicate.reset()
    code, _, err = run("outputs", "archive", prediction_id)
    assert (code, "1 copied, 0 failed." in err) == (0, True)
    assert read()["error"] is None
    (file,) = read()["output_files"]
    stored = cloud.client("s3").head_object(Bucket=cloud.stack.outputs_bucket, Key=file["key"])
    assert stored["ContentLength"] == file["bytes"]


def test_price_that_comes_later_is_applied_to_what_ended_without_one(
    run: Run, api: Api, painted: str, wait_until: WaitUntil
) -> None:
    def read() -> dict[str, Any]:
        found: dict[str, Any] = api("operated").get(f"/predictions/{painted}").json()
        return found

    why = "No price of local/painter is known."
    assert read()["cost"] == {"micro_dollars": None, "reason": why, "price": None}
    wait_until(lambda: why in run("prices", "check")[1], 20, "its record by the consumer of the stream")
    assert run("prices", "set", "local/painter", "predict_time=0.001", "--date", "2026-11-30")[0] == 0
    try:
        missing = next(m for m in json.loads(run("prices", "check", "--json")[1]) if m["reason"] == why)
        assert missing["has_price"]
        assert "operated" in missing["owners"]
        day = str(read()["created_at"])[:10]
        code, out, _ = run("prices", "apply", "--since", day)
        assert (code, out.startswith("Wrote the cost of ")) == (0, True)
        cost = read()["cost"]
        assert cost["price"] == "local/painter#1@2026-11-30"
        assert cost["micro_dollars"] == int(Decimal(str(read()["metrics"]["predict_time"])) * 1000 + Decimal("0.5"))
        assert run("prices", "apply", "--since", day)[1].startswith("Wrote the cost of 0 predictions")
        assert read()["cost"] == cost
    finally:
        assert run("prices", "remove", "local/painter")[0] == 0


def test_budget_refuses_what_does_not_fit_and_is_settled_by_the_true_cost(
    run: Run, api: Api, cloud: LocalCloud, wait_until: WaitUntil
) -> None:
    post = partial(api("budgeted").post, "/predictions", json={"version": "local/painter", "input": {"prompt": "b"}})
    assert run("budgets", "set", "budgeted", "--day", "0.15", "--unknown-price", "0.10")[0] == 0
    assert run("prices", "set", "local/painter", "run=0.12", "--date", "2026-11-30")[0] == 0

    def used() -> dict[str, Any]:
        listed = json.loads(run("budgets", "list", "--json")[1])
        found: dict[str, Any] = next(each for each in listed if each["owner"] == "budgeted")
        return found

    try:
        # A process may know the prices of before for five minutes: then it reserves the unknown price.
        assert post().status_code == 201
        reserved = used()["day_used_micro_dollars"]
        assert reserved in (100_000, 120_000)
        refused = post()
        assert (refused.status_code, refused.json()["title"]) == (429, "Budget used up")
        assert int(refused.headers["Retry-After"]) <= 86_401
        assert "owner budgeted" in refused.json()["detail"]
        settled = ("settled_micro_dollars", "settled_unknown")
        key = {"pk": {"S": "usage#budgeted"}, "sk": {"S": f"threshold#{time.strftime('%Y-%m-%d', time.gmtime())}#100"}}
        dynamodb = cloud.client("dynamodb")
        assert "Item" in dynamodb.get_item(TableName=cloud.stack.table_name, Key=key)

        def ended() -> dict[str, Any] | None:
            items = dynamodb.scan(TableName=cloud.stack.table_name)["Items"]
            mine = [i for i in items if i.get("owner") == {"S": "budgeted"} and "reserved_on" in i]
            return mine[0] if len(mine) == 1 and settled[0] in mine[0] else None

        item = wait_until(ended, 30, "the settlement")
        amount = int(item.get("cost_micro_dollars", {"N": "100000"})["N"])
        assert int(item[settled[0]]["N"]) == used()["day_used_micro_dollars"] == amount
        assert item[settled[1]]["BOOL"] == ("cost_micro_dollars" not in item)
    finally:
        assert run("budgets", "remove", "budgeted")[0] == run("prices", "remove", "local/painter")[0] == 0


def test_what_stands_still_is_listed_with_what_it_waits_for(run: Run, cloud: LocalCloud, painted: str) -> None:
    assert painted not in run("stuck")[1]
    table, key = cloud.client("dynamodb"), {"pk": {"S": f"prediction#{painted}"}, "sk": {"S": "status"}}

    def overdue() -> list[Any]:
        table.update_item(
            TableName=cloud.stack.table_name,
            Key=key,
            UpdateExpression="SET #open = :open, next_check_at = :then",
            ExpressionAttributeNames={"#open": "open"},
            ExpressionAttributeValues={":open": {"S": "open"}, ":then": {"N": str(int(time.time()) - 3600)}},
        )
        rows = json.loads(run("stuck", "--older-than", "30m", "--json")[1])
        return [row["waits_for"] for row in rows if row["id"] == painted]

    try:
        # A sweep may come in between, once.
        assert (overdue() or overdue()) == ["the sweep to remove it from its list"]
        assert painted not in run("stuck", "--older-than", "2h")[1]
    finally:
        table.update_item(
            TableName=cloud.stack.table_name,
            Key=key,
            UpdateExpression="REMOVE #open, next_check_at",
            ExpressionAttributeNames={"#open": "open"},
        )


def test_change_that_was_given_up_is_read_again_and_told(run: Run, cloud: LocalCloud, painted: str) -> None:
    streams = cloud.client("dynamodbstreams")
    (stream,) = streams.list_streams(TableName=cloud.stack.table_name)["Streams"]
    (shard,) = streams.describe_stream(StreamArn=stream["StreamArn"])["StreamDescription"]["Shards"]
    iterator = streams.get_shard_iterator(
        StreamArn=stream["StreamArn"], ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
    )["ShardIterator"]
    numbers: list[str] = []
    while iterator:
        answer = streams.get_records(ShardIterator=iterator)
        keys = [(each["dynamodb"]["Keys"]["pk"]["S"], each["dynamodb"]["SequenceNumber"]) for each in answer["Records"]]
        numbers += [number for pk, number in keys if pk == f"prediction#{painted}"]
        if not answer["Records"]:
            break
        iterator = answer.get("NextShardIterator")
    part = {
        "shardId": shard["ShardId"],
        "streamArn": stream["StreamArn"],
        "startSequenceNumber": numbers[0],
        "endSequenceNumber": numbers[-1],
        "batchSize": len(numbers),
    }
    queue = cloud.resources["ChangesDeadLetterQueue"]
    cloud.client("sqs").send_message(QueueUrl=queue, MessageBody=json.dumps({"DDBStreamBatchInfo": part}))
    assert json.loads(run("dead-letters", "count", "--json")[1])["changes"] == 1
    code, _, err = run("dead-letters", "redrive", "changes")
    assert (code, "Redriven: 1." in err) == (0, True), err
    assert json.loads(run("dead-letters", "count", "--json")[1])["changes"] == 0


def test_failed_job_is_invoked_again_under_its_own_id_and_starts_nothing_twice(
    run: Run, cloud: LocalCloud, replicate: LocalReplicate, wait_until: WaitUntil
) -> None:
    job = {"model": "local/painter", "input_data": {"prompt": "operated again"}}
    letter = {"requestContext": {"requestId": "operated-1"}, "requestPayload": job, "responsePayload": {}}
    queue = cloud.resources["RunJobsDeadLetterQueue"]
    for _ in range(2):
        cloud.client("sqs").send_message(QueueUrl=queue, MessageBody=json.dumps(letter))
    code, _, err = run("dead-letters", "redrive", "run-jobs")
    assert (code, "Redriven: 2." in err) == (0, True), err

    def created() -> int:
        return len(replicate.creates())

    wait_until(created, 20, "the job's create")
    time.sleep(0.5)
    assert created() == 1


def test_secrets_are_refreshed_and_changed(
    run: Run,
    cloud: LocalCloud,
    replicate: LocalReplicate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secrets = cloud.client("secretsmanager")

    def value(arn: str) -> str:
        return str(secrets.get_secret_value(SecretId=arn)["SecretString"])

    signing = value(cloud.outputs["SigningSecretArn"])
    code, _, err = run("secrets", "refresh")
    assert (code, "is the one that is stored" in err) == (0, True), err
    assert value(cloud.outputs["SigningSecretArn"]) == signing
    token = value(cloud.outputs["ReplicateTokenSecretArn"])
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{token}\n"))
    assert run("secrets", "rotate", "replicate-token")[0] == 0
    assert value(cloud.outputs["ReplicateTokenSecretArn"]) == token
    for secret in ("links", "webhook-master"):
        assert run("secrets", "rotate", secret)[0] == 2


def test_what_a_deletion_leaves_is_named(run: Run, cloud: LocalCloud) -> None:
    found = json.loads(run("kept", "--json")[1])
    # A rule on the stack's bus, such as the one with which these tests listen, keeps the bus from being deleted.
    kept = {each["name"] for each in found if each["type"] != "AWS::Events::Rule"}
    assert kept == {cloud.stack.table_name, cloud.stack.outputs_bucket, cloud.stack.inputs_bucket}


def test_deployed_layer_holds_no_command(cloud: LocalCloud) -> None:
    lambda_ = cloud.client("lambda")
    configuration = lambda_.get_function_configuration(FunctionName=cloud.resources["ReadPredictionsFunction"])
    (layer,) = configuration["Layers"]
    location = lambda_.get_layer_version_by_arn(Arn=layer["Arn"])["Content"]["Location"]
    archive = zipfile.ZipFile(io.BytesIO(httpx.get(location, trust_env=False, timeout=60).raise_for_status().content))
    names = archive.namelist()
    assert len([name for name in names if re.fullmatch(r"python/predictions/(\w+/)?\w+\.py", name)]) > 50
    assert [name.rpartition("/")[2] for name in names if "/openapi." in name] == ["openapi.json"]
    assert not [name for name in names if name.startswith(("python/predictions/cli", "python/predictions/__main__"))]
    assert not [name for name in names if name.startswith(("python/typer", "python/click", "python/rich"))]


RUNBOOK = (ROOT / "docs/runbook.md").read_text()
COMMANDS = sorted(
    {
        re.split(r"\s+[#<>] ?", text)[0].strip()
        for block in re.findall(r"^```bash\n(.*?)^```", RUNBOOK, re.MULTILINE | re.DOTALL)
        for text in block.splitlines()
        if text.startswith("replicate-serverless ")
    }
)


@pytest.mark.parametrize("text", COMMANDS)
def test_command_of_the_runbook_runs(run: Run, text: str, request: pytest.FixtureRequest) -> None:
    _, *words = shlex.split(text)
    assert stack_of(words) == "$STACK"
    if {"rotate", "forget", "redrive"} & set(words):
        return  # those above, and what other tests still need
    if "$ID" in words:
        words = [request.getfixturevalue("painted") if word == "$ID" else word for word in words]
    del words[words.index("--stack") : words.index("--stack") + 2]
    code, _, err = run(*words)
    # Nothing is missing, and it has no webhook: which is said.
    assert code == (2 if words[0] in ("outputs", "webhooks") else 0), err
