"""Recipes on the deployed stack: a file, a schedule or an event starts a prediction, once."""

import io
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from PIL import Image

from local.cloud import LocalCloud
from local.replicate.process import LocalReplicate

FIXED = {"image": "https://example.com/fox.png", "style": "mosaic"}

Api = Callable[..., httpx.Client]
Boto = Callable[[str], Any]
Wait = Callable[..., Any]


@pytest.fixture
def recipe(api: Api) -> Iterator[Callable[..., dict[str, Any]]]:
    """Puts a recipe of an owner of its own, and deletes it after the test."""
    made: list[tuple[str, str]] = []

    def recipe(name: str, owner: str = "carol", **definition: Any) -> dict[str, Any]:
        answer = api(owner).put(f"/recipes/{name}", json=definition)
        assert answer.status_code in (200, 201), answer.text
        made.append((owner, name))
        shown: dict[str, Any] = answer.json()
        assert shown["state"] == "active"
        return shown

    yield recipe
    for owner, name in set(made):
        assert api(owner).delete(f"/recipes/{name}").status_code == 204


@pytest.fixture
def drop(cloud: LocalCloud, boto: Boto) -> Callable[..., bytes]:
    """Puts a picture into the inputs bucket."""

    def drop(key: str, size: tuple[int, int] = (96, 64), **options: Any) -> bytes:
        drawn = io.BytesIO()
        Image.effect_noise(size, 80).convert("RGB").save(drawn, "PNG")
        boto("s3").put_object(
            Bucket=cloud.stack.inputs_bucket, Key=key, Body=drawn.getvalue(), ContentType="image/png", **options
        )
        return drawn.getvalue()

    return drop


@pytest.fixture
def started(api: Api) -> Callable[..., list[dict[str, Any]]]:
    """The predictions of an owner, the newest first, in which a text is."""

    def started(text: str, owner: str = "carol") -> list[dict[str, Any]]:
        listed = api(owner).get("/predictions").json()["results"]
        return [each for each in listed if text in json.dumps(each["input"])]

    return started


def queued(cloud: LocalCloud) -> int:
    """How many messages the requests queue holds, with those that are being handled."""
    names: list[Any] = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    counts = cloud.client("sqs").get_queue_attributes(QueueUrl=cloud.stack.queue_url, AttributeNames=names)
    return sum(int(counts["Attributes"][name]) for name in names)


def dead(cloud: LocalCloud, boto: Boto, text: str) -> list[dict[str, Any]]:
    """The messages of the dead-letter queue in which a text is; they stay there."""
    answer = boto("sqs").receive_message(
        QueueUrl=cloud.outputs["RequestsDeadLetterQueueUrl"],
        MaxNumberOfMessages=10,
        MessageAttributeNames=["All"],
        VisibilityTimeout=0,
    )
    return [each for each in answer.get("Messages", []) if text in json.dumps(each)]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "status", "field"),
        [
            ({"input": {"image": "{{ object.url", "style": "mosaic"}}, 422, "input.image"),
            ({"input": {"style": "mosaic"}}, 422, "input.image"),
            ({"input": {"image": "{{ object.url }}", "style": "cubism"}}, 422, "input.style"),
            ({"model": "local/nobody"}, 404, None),
            ({"s3": {"prefix": "files/"}}, 422, "s3.prefix"),
            ({"s3": {"prefix": ""}}, 422, "s3.prefix"),
            ({"s3": {"prefix": "p/", "bucket": "outputs"}}, 422, "s3.bucket"),
            ({"s3": {"prefix": "p/", "bucket": "source"}}, 422, "s3.bucket"),
            ({"s3": None, "pattern": {"detail": "no list"}}, 422, "pattern"),
            ({"s3": None, "schedule": {"expression": "rate(1 day)"}}, 422, "input.image"),
            ({"s3": None, "schedule": {"expression": "every day"}, "input": FIXED}, 422, "schedule.expression"),
            ({"input": {"image": "{{ objct.url }}", "style": "mosaic"}}, 422, "input.image"),
            ({"pattern": {"source": ["a"]}}, 422, "pattern"),
            ({"colour": "red"}, 422, "colour"),
        ],
        ids=str,
    )
    def test_a_bad_recipe_is_refused_by_its_field_and_leaves_nothing(
        self, api: Api, boto: Boto, changes: dict[str, Any], status: int, field: str | None
    ) -> None:
        good = {
            "model": "local/etcher",
            "input": {"image": "{{ object.url }}", "style": "mosaic"},
            "s3": {"prefix": "refused/"},
        }
        rules = len(boto("events").list_rules()["Rules"])
        answer = api("carol").put("/recipes/refused", json=good | changes)
        shown = answer.json()
        assert (answer.status_code, shown["status"]) == (status, status), shown
        if field:
            assert [each["field"] for each in shown["invalid_fields"]] == [field], shown
        assert api("carol").get("/recipes/refused").status_code == 404
        assert len(boto("events").list_rules()["Rules"]) == rules

    def test_a_token_without_the_scope_and_another_owner_see_nothing(
        self, cloud: LocalCloud, api: Api, recipe: Callable[..., dict[str, Any]]
    ) -> None:
        recipe("mine", model="local/painter", input={"prompt": "x"})
        token = cloud.create_token("carol", ["predict", "read"])
        for method, path in (("GET", "/recipes"), ("GET", "/recipes/mine"), ("DELETE", "/recipes/mine")):
            answer = httpx.request(
                method,
                cloud.stack.api_url + path,
                headers={"Authorization": f"Bearer {token}"},
                trust_env=False,
                timeout=30,
            )
            assert answer.status_code == 403
        assert api("bob").get("/recipes/mine").status_code == 404
        assert api("bob").get("/recipes").json()["results"] == []
        assert [each["name"] for each in api("carol").get("/recipes").json()["results"]] == ["mine"]
        assert (
            api("carol")
            .post("/recipes", json={"name": "mine", "model": "local/painter", "input": {"prompt": "x"}})
            .status_code
            == 409
        )


class TestObjects:
    def test_a_file_that_is_dropped_starts_its_prediction_and_the_results_land_by_its_key(
        self,
        cloud: LocalCloud,
        api: Api,
        boto: Boto,
        wait_until: Wait,
        recipe: Callable[..., dict[str, Any]],
        drop: Callable[..., bytes],
        started: Callable[..., list[dict[str, Any]]],
    ) -> None:
        recipe(
            "etch",
            model="local/etcher",
            input={"image": "{{ object.url }}", "style": "{{ object.metadata.style }}"},
            defaults={"style": "posterize"},
            s3={"prefix": "photos/", "suffix": ".png", "min_bytes": 1000, "max_bytes": 1_000_000},
        )
        drop("photos/a fox.png", Metadata={"style": "mosaic"})
        drop("photos/note.txt")
        drop("photos/tiny.png", size=(2, 2))
        drop("elsewhere/fox.png")
        drop("photos/by-default.png")
        (fox,) = wait_until(lambda: started("a_fox.png"), 30, "the prediction")
        (other,) = wait_until(lambda: started("by-default.png"), 30, "the other one")

        def ended(each: dict[str, Any]) -> dict[str, Any] | None:
            shown: dict[str, Any] = api("carol").get(f"/predictions/{each['id']}").json()
            return shown if shown["status"] in ("succeeded", "failed") else None

        fox = wait_until(lambda: ended(fox), 30, "its end")
        other = wait_until(lambda: ended(other), 30, "the other's end")
        assert (fox["status"], fox["input"]["style"], other["input"]["style"]) == ("succeeded", "mosaic", "posterize")
        (file,) = fox["output_files"]
        assert file["key"].startswith(f"carol/photos/a_fox.png/{fox['id']}/")
        stored = boto("s3").get_object(Bucket=file["bucket"], Key=file["key"])
        assert stored["Metadata"]["origin-depth"] == "0"
        with Image.open(io.BytesIO(stored["Body"].read())) as opened:
            assert opened.size == (96, 64)
        assert len(started("/objects/inputs/")) == 2, "and nothing else was started"

        # Deleting finds the files in their other place.
        assert api("carol").delete(f"/predictions/{fox['id']}").status_code == 200
        below = boto("s3").list_objects_v2(Bucket=file["bucket"], Prefix="carol/photos/a_fox.png/")
        assert below["KeyCount"] == 0

        # An overwrite is another object, and so another prediction; a result that comes back is one result deeper.
        drop("photos/a fox.png", size=(64, 48), Metadata={"origin-depth": "2"})
        (second,) = wait_until(lambda: started("a_fox.png"), 30, "the second prediction")
        assert second["id"] != fox["id"]
        drop("photos/round.png", Metadata={"origin-depth": "3"})
        (refused,) = wait_until(lambda: dead(cloud, boto, "photos/round.png"), 30, "the refusal")
        assert "MaxOriginDepth" in json.dumps(refused)
        assert started("round.png") == []

    def test_a_notification_that_comes_twice_starts_one_prediction(
        self,
        cloud: LocalCloud,
        boto: Boto,
        wait_until: Wait,
        recipe: Callable[..., dict[str, Any]],
        drop: Callable[..., bytes],
        started: Callable[..., list[dict[str, Any]]],
    ) -> None:
        made = recipe("twice", model="local/etcher", input={"image": "{{ object.url }}"}, s3={"prefix": "twice/"})
        drop("twice/one.png")
        (one,) = wait_until(lambda: started("one.png"), 30, "the prediction")
        head = boto("s3").head_object(Bucket=cloud.stack.inputs_bucket, Key="twice/one.png")
        event = {
            "source": "aws.s3",
            "detail-type": "Object Created",
            "detail": {
                "bucket": {"name": cloud.stack.inputs_bucket},
                "object": {"key": "twice/two.png", "size": 9, "etag": head["ETag"].strip('"'), "sequencer": "0A"},
            },
        }
        drop("files/carol/secret.png")
        gone = json.loads(json.dumps(event))
        event["detail"]["object"]["key"] = "twice/one.png"  # type: ignore[index]
        outside = json.loads(json.dumps(event))
        outside["detail"]["object"]["key"] = "files/carol/secret.png"
        for each in (event, event, gone, outside):
            body = {"recipe_id": made["id"], "event": each}
            boto("sqs").send_message(QueueUrl=cloud.stack.queue_url, MessageBody=json.dumps(body))
        boto("sqs").send_message(
            QueueUrl=cloud.stack.queue_url, MessageBody=json.dumps({"recipe_id": "a" * 26, "event": event})
        )
        # The sequencer of the first one is S3's; the two that were sent by hand are one more.
        wait_until(lambda: len(started("one.png")) == 2, 30, "the one sent twice")
        wait_until(lambda: queued(cloud) == 0, 30, "all notifications to be handled")
        assert len(started("one.png")) == 2
        assert started("two.png") == started("secret.png") == []
        assert one["id"] in {each["id"] for each in started("one.png")}


class TestEvents:
    def test_a_custom_event_starts_its_prediction_and_a_result_does_not_go_round_for_ever(
        self,
        cloud: LocalCloud,
        boto: Boto,
        wait_until: Wait,
        recipe: Callable[..., dict[str, Any]],
        started: Callable[..., list[dict[str, Any]]],
    ) -> None:
        recipe(
            "orders",
            model="local/storyteller",
            input={"prompt": "A story about {{ event.detail.topic }}"},
            pattern={"source": ["shop"], "detail": {"topic": [{"exists": True}]}},
            bus="stack",
        )
        entry = {"Source": "shop", "DetailType": "Order", "EventBusName": cloud.stack.event_bus_name}
        for detail in ({"topic": "owls and depth"}, {"nothing": 1}, {"topic": "a loop", "origin-depth": 3}):
            boto("events").put_events(Entries=[{**entry, "Detail": json.dumps(detail)}])
        (owls,) = wait_until(lambda: started("owls and depth"), 30, "the prediction")
        assert owls["model"] == "local/storyteller"
        (refused,) = wait_until(lambda: dead(cloud, boto, "a loop"), 30, "the refusal")
        assert "MaxOriginDepth" in json.dumps(refused)
        assert started("a loop") == []

    def test_a_recipe_that_its_own_results_start_is_stopped_by_the_depth(
        self,
        cloud: LocalCloud,
        boto: Boto,
        wait_until: Wait,
        recipe: Callable[..., dict[str, Any]],
        started: Callable[..., list[dict[str, Any]]],
    ) -> None:
        made = recipe(
            "ouroboros",
            model="local/storyteller",
            input={"prompt": "after {{ event.detail.id }} at depth {{ event.detail.depth || `0` }}"},
            pattern={"source": ["replicate-serverless"], "detail-type": ["Prediction Succeeded"]},
            bus="stack",
        )
        entry = {
            "Source": "replicate-serverless",
            "DetailType": "Prediction Succeeded",
            "EventBusName": cloud.stack.event_bus_name,
        }
        for owner, depth, prediction_id in (("carol", 2, "snake"), ("carol", 3, "tail"), ("bob", 0, "stranger")):
            detail = json.dumps({"version": "1", "id": prediction_id, "owner": owner, "depth": depth})
            boto("events").put_events(Entries=[{**entry, "Detail": detail}])
        wait_until(lambda: started("after snake"), 30, "the prediction")
        (refused,) = wait_until(lambda: dead(cloud, boto, '\\"tail\\"'), 30, "the refusal")
        assert "exceeds MaxOriginDepth (3)" in json.dumps(refused)
        assert started("after tail") == started("after stranger") == []
        assert made["bus"] == "stack"

    def test_a_chain_of_real_results_ends_at_the_depth_with_the_reason(
        self,
        cloud: LocalCloud,
        api: Api,
        boto: Boto,
        wait_until: Wait,
        replicate: LocalReplicate,
        recipe: Callable[..., dict[str, Any]],
        started: Callable[..., list[dict[str, Any]]],
    ) -> None:
        recipe(
            "chain",
            "looper",
            model="local/storyteller",
            input={"prompt": "a link of the chain after {{ event.detail.id }}"},
            pattern={
                "source": ["replicate-serverless"],
                "detail-type": ["Prediction Succeeded"],
                "detail": {"owner": ["looper"]},
            },
            bus="stack",
        )
        first = {"version": "local/storyteller", "input": {"prompt": "a link of the chain, the first"}}
        assert api("looper").post("/predictions", json=first).status_code == 201
        (refused,) = wait_until(lambda: dead(cloud, boto, "looper"), 60, "the end of the chain")
        assert "descends from 4 results" in refused["MessageAttributes"]["reason"]["StringValue"]
        assert "exceeds MaxOriginDepth (3). Recipe chain probably starts itself" in json.dumps(refused)
        wait_until(lambda: queued(cloud) == 0, 30, "whatever else it might start")
        links = started("a link of the chain", "looper")
        assert [each["status"] for each in links] == ["succeeded"] * 4
        # Each but the first after the one before it, the newest first.
        assert [each["input"]["prompt"].rpartition(" ")[2] for each in links[:3]] == [each["id"] for each in links[1:]]
        assert len([each for each in replicate.creates() if "a link of the chain" in json.dumps(each)]) == 4


class TestSchedules:
    def test_a_schedule_starts_its_prediction_at_its_time(
        self,
        boto: Boto,
        wait_until: Wait,
        recipe: Callable[..., dict[str, Any]],
        started: Callable[..., list[dict[str, Any]]],
        cloud: LocalCloud,
    ) -> None:
        due = (datetime.now(UTC) + timedelta(seconds=2)).strftime("%Y-%m-%dT%H:%M:%S")
        made = recipe(
            "daily",
            model="local/storyteller",
            input={"prompt": "the scheduled story of {{ schedule.time }}"},
            schedule={"expression": f"at({due})", "time_zone": "UTC"},
        )
        name = f"replicate-serverless-recipe-{made['id']}"
        schedule = boto("scheduler").get_schedule(Name=name, GroupName="replicate-serverless")
        assert "<aws.scheduler.scheduled-time>" in schedule["Target"]["Input"]
        # The emulator looks every ten seconds.
        (story,) = wait_until(lambda: started("the scheduled story"), 40, "the prediction")
        assert "the scheduled story of 20" in story["input"]["prompt"]
        # Another source takes its place, and nothing is left of the first.
        recipe(
            "daily",
            model="local/storyteller",
            input={"prompt": "x"},
            pattern={"source": ["shop"]},
        )
        (left,) = boto("scheduler").list_schedules(GroupName="replicate-serverless")["Schedules"]
        assert "SweepPredictions" in left["Name"]
        assert name in [each["Name"] for each in boto("events").list_rules()["Rules"]]
