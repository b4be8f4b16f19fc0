"""`Prefer: wait` on the deployed stack: Replicate's own sync mode, through the claim."""

import time
from collections.abc import Callable
from typing import Any

import httpx

from local.cloud import LocalCloud
from local.replicate.process import LocalReplicate

Api = Callable[..., httpx.Client]


def create(client: httpx.Client, wait: int, model: str, **input_: Any) -> dict[str, Any]:
    body = {"version": f"local/{model}", "input": input_}
    answer = client.post("/predictions", json=body, headers={"Prefer": f"wait={wait}"})
    assert answer.status_code == 201, answer.text
    assert answer.headers["preference-applied"] == f"wait={wait}"
    shown: dict[str, Any] = answer.json()
    return shown


def executions(cloud: LocalCloud, prediction_id: str) -> int:
    machines = (cloud.stack.state_machine_arn, cloud.stack.submitted_state_machine_arn)
    listed = [cloud.client("stepfunctions").list_executions(stateMachineArn=arn)["executions"] for arn in machines]
    return sum(each["name"].startswith(prediction_id) for executions in listed for each in executions)


def test_end_without_files_is_replicates_own_answer_and_needs_no_execution(
    cloud: LocalCloud, api: Api, replicate: LocalReplicate
) -> None:
    replicate.fault("webhook_lost", times=None)
    began = time.monotonic()
    shown = create(api("alice"), 15, "sleeper", seconds=1)
    assert (shown["status"], shown["output"]) == ("succeeded", "slept well")
    [asked] = replicate.creates(shown["id"])
    # What is left of the caller's time when Replicate is asked.
    spent = time.monotonic() - began - asked["seconds"]
    assert 15 - spent - 1 <= int(asked["headers"]["prefer"].removeprefix("wait=")) <= 15
    assert asked["seconds"] >= 1
    assert executions(cloud, shown["id"]) == 0


def test_processing_with_data_urls_ends_when_replicate_says_so_with_the_files_copied(
    cloud: LocalCloud, api: Api, replicate: LocalReplicate
) -> None:
    replicate.fault("create_data_urls")
    shown = create(api("alice"), 20, "painter", prompt="a lighthouse at dusk")
    assert shown["status"] == "succeeded", shown
    assert len(shown["output_files"]) == 1
    assert not str(shown["output"]).startswith("data:")
    assert len(replicate.creates(shown["id"])) == 1


def test_wait_that_ends_early_is_answered_starting_and_can_be_canceled(api: Api, replicate: LocalReplicate) -> None:
    shown = create(api("alice"), 1, "sleeper", seconds=30)
    assert (shown["status"], "output" in shown) == ("starting", False)
    assert api("alice").post(f"/predictions/{shown['id']}/cancel").status_code == 200
