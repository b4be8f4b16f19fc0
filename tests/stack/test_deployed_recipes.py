"""Recipes and a schedule that come with the deployment, on a stack of its own, deployed again and deleted."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from predictions.cli.__main__ import main

from local.cloud import CREDENTIALS, OWNER, REGION, STACK_NAME, LocalCloud, LocalCloudError
from tests.support.deployment import copy_checkout

Wait = Callable[..., Any]

STORY = {"model": "local/storyteller", "input": {"prompt": "A card for {{ event.detail.customer }}"}}
SHOP = {**STORY, "pattern": {"source": ["shop"]}, "bus": "stack"}
DAILY = {**STORY, "input": {"prompt": "News"}, "schedule": {"expression": "rate(1 day)"}, "owner": "team-a"}
SCHEDULED = {
    "model": "local/storyteller",
    "input": {"prompt": "the story of <aws.scheduler.scheduled-time>"},
    "idempotency_key": "story-<aws.scheduler.scheduled-time>",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with two recipes."""
    folder = copy_checkout(tmp_path_factory)
    (folder / "recipes/shop.json").write_text(json.dumps(SHOP))
    (folder / "recipes/daily.json").write_text(json.dumps(DAILY))
    return folder


@pytest.fixture(scope="module")
def own(checkout: Path) -> Iterator[LocalCloud]:
    """That stack."""
    parameters = {
        "FirstPollSeconds": "5",
        "PollSeconds": "3",
        "ScheduleExpression": "rate(1 minute)",
        "ScheduleRequest": json.dumps(SCHEDULED),
    }
    with LocalCloud(parameters=parameters, checkout=checkout) as started:
        yield started


def test_recipes_of_files_live_and_go_with_the_stack(
    own: LocalCloud,
    checkout: Path,
    wait_until: Wait,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    headers = {owner: {"Authorization": f"Bearer {own.create_token(owner)}"} for owner in (OWNER, "team-a")}

    def call(method: str, path: str, body: Any = None, owner: str = OWNER) -> tuple[int, Any]:
        url = own.api_url + path
        answer = httpx.request(method, url, headers=headers[owner], json=body, timeout=30, trust_env=False)
        return answer.status_code, answer.json() if answer.content else None

    def recipes(owner: str = OWNER) -> dict[str, Any]:
        return {each["name"]: each for each in call("GET", "/recipes", owner=owner)[1]["results"]}

    def started(text: str) -> list[Any]:
        return [each for each in call("GET", "/predictions")[1]["results"] if text in json.dumps(each["input"])]

    def rules() -> list[str]:
        events = own.client("events")
        buses = [bus["Name"] for bus in events.list_event_buses()["EventBuses"]]
        return [rule["Name"] for bus in buses for rule in events.list_rules(EventBusName=bus)["Rules"]]

    # Created with the stack: each of its owner, and at work.
    (shop,) = recipes().values()
    assert (shop["name"], shop["state"], shop["deployed"]) == ("shop", "active", True)
    assert list(recipes("team-a")) == ["daily"]
    entry = {"Source": "shop", "DetailType": "Order", "EventBusName": own.stack.event_bus_name}
    own.client("events").put_events(Entries=[{**entry, "Detail": json.dumps({"customer": "Ada"})}])
    wait_until(lambda: started("A card for Ada"), 30, "the prediction of the recipe")
    assert call("PUT", "/recipes/shop", {**STORY, "pattern": {"source": ["shop"]}})[0] == 409
    assert call("PUT", "/recipes/by-api", {**SHOP, "pattern": {"source": ["other"]}})[0] == 201
    before = recipes()

    # A bad file fails the deployment, with its name and field, and everything is as it was.
    (checkout / "recipes/bad.json").write_text(json.dumps({**STORY, "input": {"prompt": "{{ event."}}))
    (checkout / "recipes/shop.json").write_text(json.dumps({**SHOP, "lifetime": "5m"}))
    with pytest.raises(LocalCloudError, match="UPDATE_ROLLBACK_COMPLETE"):
        own.deploy_again()
    cloudformation = own.client("cloudformation")
    (stack,) = cloudformation.describe_stacks(StackName=STACK_NAME)["Stacks"]
    assert stack["StackStatus"] == "UPDATE_ROLLBACK_COMPLETE"
    pages = cloudformation.get_paginator("describe_stack_events").paginate(StackName=STACK_NAME)
    told = [each.get("ResourceStatusReason", "") for page in pages for each in page["StackEvents"]]
    assert [reason for reason in told if "recipes/bad.json: input.prompt: A placeholder begins" in reason]
    assert recipes() == before

    # One file is changed, one is gone; what the API has put stays.
    (checkout / "recipes/bad.json").unlink()
    (checkout / "recipes/daily.json").unlink()
    own.deploy_again()
    after = recipes()
    assert (after["shop"]["id"], after["shop"]["lifetime"]) == (before["shop"]["id"], "5m")
    assert after["by-api"] == before["by-api"]
    # Those of the two recipes, and that of manifests.
    assert (recipes("team-a"), len(rules())) == ({}, 3)
    schedules = own.client("scheduler").list_schedules(GroupName=STACK_NAME)["Schedules"]
    names = sorted(schedule["Name"] for schedule in schedules)
    assert ["RequestSchedule" in names[0], "SweepPredictions" in names[1]] == [True, True], names

    # The schedule of the parameters sends its request, of QueueOwner; its key has it run once for each minute.
    scheduled = wait_until(lambda: started("the story of"), 90, "the scheduled prediction")
    assert {each["source"] for each in scheduled} == {"api"}
    assert len({each["input"]["prompt"] for each in scheduled}) == len(scheduled)

    # A stack that is deleted leaves no rules, of whichever recipes.
    cloudformation.delete_stack(StackName=STACK_NAME)

    def status() -> str:
        found: str = cloudformation.describe_stacks(StackName=stack["StackId"])["Stacks"][0]["StackStatus"]
        return found

    wait_until(lambda: status() == "DELETE_COMPLETE", 60, "the end of the stack")
    assert rules() == []
    groups = own.client("scheduler").list_schedule_groups()["ScheduleGroups"]
    assert STACK_NAME not in [group["Name"] for group in groups]

    # Its data stays, and is named.
    for name, value in {**CREDENTIALS, "AWS_REGION": REGION, "AWS_ENDPOINT_URL": own.endpoint_url}.items():
        monkeypatch.setenv(name, value)
    assert main(["kept", "--stack", STACK_NAME, "--json"]) == 0
    left = {each["name"] for each in json.loads(capsys.readouterr().out)}
    assert left == {own.stack.table_name, own.stack.outputs_bucket, own.stack.inputs_bucket}
    assert own.client("dynamodb").scan(TableName=own.stack.table_name)["Count"] > 0
    for bucket in (own.stack.outputs_bucket, own.stack.inputs_bucket):
        own.client("s3").head_bucket(Bucket=bucket)
