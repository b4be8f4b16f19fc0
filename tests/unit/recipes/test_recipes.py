"""Recipes from the owner's call to the rule, and from the event to the intent."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from predictions.aws import clients
from predictions.errors import Problem
from predictions.files.links import Links
from predictions.files.outputs_bucket import folder, safe_prefix
from predictions.intake.queue import Requests
from predictions.intents.model import Intent
from predictions.intents.sources import Message, RequestRefused
from predictions.recipes.manage import RECIPE_LIMIT_BYTES, RecipeChanges
from predictions.recipes.store import RecipeItems, Recipes
from predictions.store.predictions import PredictionsTable

from tests.support.apps import Context, load_app, sample
from tests.support.fakes import API_URL, Clock, Executed, ReplicateInMemory, answer, refusing
from tests.support.fixtures import make_recipe_changes

Call = Callable[..., tuple[int, Any]]
MODEL = "black-forest-labs/flux-schnell"
SENT = 1_750_000_000
RULE = "replicate-serverless-recipe-"
PLAIN: dict[str, Any] = {"input": {"prompt": "a fox"}}
RECIPE: dict[str, Any] = {"model": MODEL, "input": {"prompt": "{{ object.url }}"}, "s3": {"prefix": "in/"}}


@pytest.fixture
def items(cloud: None) -> RecipeItems:
    return RecipeItems.from_env()


@pytest.fixture
def changes(table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock) -> RecipeChanges:
    return make_recipe_changes(table, replicate, clock)


@pytest.fixture
def recipes(items: RecipeItems, clock: Clock) -> Recipes:
    buckets = {"inputs": "inputs", "outputs": "outputs", "source": "source"}
    return Recipes(
        items,
        Links(buckets, "link-secret", now=clock.now),
        inputs_bucket_name="inputs",
        source_bucket_name="source",
        outputs_bucket_name="outputs",
        max_origin_depth=3,
        allow_loopback_webhooks=False,
        now=clock.now,
    )


@pytest.fixture
def call(changes: RecipeChanges, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls manage_recipes as API Gateway does: status and parsed body."""
    with pytest.MonkeyPatch.context() as template_only:
        app = load_app("manage_recipes", template_only)
    monkeypatch.setattr(app, "recipe_changes", changes)

    def call(method: str, name: str | None = None, body: Any = None, owner: str = "alice") -> tuple[int, Any]:
        event = sample("manage_recipes", "list")
        event["httpMethod"], event["path"] = method, f"/recipes/{name}" if name else "/recipes"
        event["body"] = body if body is None or isinstance(body, str) else json.dumps(body)
        event["headers"] = {"Content-Type": "application/json"}
        event["requestContext"]["authorizer"]["owner"] = owner
        given = app.handler(event, Context())
        return given["statusCode"], json.loads(given["body"]) if given["body"] else None

    return call


def rules(bus: str = "default") -> dict[str, Any]:
    found = clients.client("events").list_rules(EventBusName=bus)["Rules"]
    return {rule["Name"].removeprefix(RULE): json.loads(rule["EventPattern"]) for rule in found}


def target(recipe_id: str, bus: str = "default") -> dict[str, Any]:
    (found,) = clients.client("events").list_targets_by_rule(Rule=RULE + recipe_id, EventBusName=bus)["Targets"]
    return dict(found)


def schedules() -> list[str]:
    found = clients.client("scheduler").list_schedules(GroupName="replicate-serverless")["Schedules"]
    return [each["Name"].removeprefix(RULE) for each in found]


class TestRefused:
    @pytest.mark.parametrize(
        ("changed", "field"),
        [
            ({"input": None}, "input"),
            ({"input": "{{ event }}"}, "input"),
            ({"colour": "red"}, "colour"),
            ({"name": "other"}, "name"),
            ({"model": None}, "model"),
            ({"version": MODEL}, "model"),
            ({"model": "no slash"}, "model"),
            ({"model": "{{ event.model }}/x"}, "model"),
            ({"defaults": {"prompt": "{{ event.x }}"}}, "defaults"),
            ({"input": {"prompt": "{{ object.."}}, "input.prompt"),
            ({"input": {"prompt": "{{ object.! }}"}}, "input.prompt"),
            ({"input": {"prompt": "x", "num_outputs": "many"}}, "input.num_outputs"),
            ({"input": {"num_outputs": 1}}, "input.prompt"),
            ({"webhook": "http://10.0.0.1/x"}, "webhook"),
            ({"webhook": "{{ ! }}"}, "webhook"),
            ({"lifetime": "a year"}, "lifetime"),
            ({"output_prefix": "{{ ! }}"}, "output_prefix"),
            ({"s3": {"prefix": "files/alice/"}}, "s3.prefix"),
            ({"s3": {"prefix": "f"}}, "s3.prefix"),
            ({"s3": {"prefix": "batches/x"}}, "s3.prefix"),
            ({"s3": {"prefix": ""}}, "s3.prefix"),
            ({"s3": {"prefix": "in/", "bucket": "outputs"}}, "s3.bucket"),
            ({"s3": {"prefix": "in/", "min_bytes": 9, "max_bytes": 8}}, "s3.max_bytes"),
            ({"s3": {"prefix": "in/", "max_bytes": 10**12}}, "s3.max_bytes"),
            ({"batches": True}, "batches"),
            ({"batches": {"max_concurrency": 0}}, "batches.max_concurrency"),
            ({"batches": {"tolerated_failure_percentage": 101}}, "batches.tolerated_failure_percentage"),
            ({"batches": {"owner": "bob"}}, "batches.owner"),
            ({"pattern": {"source": ["x"]}}, "pattern"),
            ({"s3": None, "bus": "stack", **PLAIN}, "bus"),
            ({"s3": None, "pattern": {}}, "pattern"),
            ({"s3": None, "pattern": {"source": ["x" * 2100]}}, "pattern"),
            ({"s3": None, "pattern": {"source": "not a list"}}, "pattern"),
            ({"s3": None, "schedule": {"expression": "rate(0 minutes)"}, **PLAIN}, "schedule.expression"),
            ({"s3": None, "schedule": {"expression": "cron(0 9 * * *)"}, **PLAIN}, "schedule.expression"),
            ({"s3": None, "schedule": {"expression": "rate(1 day)", "time_zone": "Mars Base"}}, "schedule.time_zone"),
            ({"input": {"prompt": "{{ objct.url }}"}}, "input.prompt"),
            ({"input": {"prompt": "{{ objct.url || 'x' }}"}}, "input.prompt"),
            ({"input": {"prompt": "x", "seeds": ["{{ sum(rows[].n) }}"]}}, "input.seeds.0"),
            ({"input": {"prompt": "{{ object.ulr }}"}}, "input.prompt"),
            ({"input": {"prompt": "{{ defaults.style }}"}}, "input.prompt"),
            ({"input": {"prompt": "{{ schedule.time }}"}}, "input.prompt"),
            ({"s3": None}, "input.prompt"),
            ({"s3": None, "schedule": {"expression": "rate(1 day)"}}, "input.prompt"),
            ({"webhook": "https://hooks.example.com/{{ objct.key }}"}, "webhook"),
            ({"output_prefix": "{{ evnt.id }}"}, "output_prefix"),
            ({"defaults": {"num_outputs": "many"}}, "defaults.num_outputs"),
            (
                {"input": {"prompt": "x", "num_outputs": "{{ row.n }}"}, "defaults": {"num_outputs": 0}},
                "defaults.num_outputs",
            ),
            ({"input": {"num_outputs": "{{ row.n }}"}}, "input.prompt"),
        ],
        ids=str,
    )
    def test_a_bad_recipe_is_refused_by_its_field_and_leaves_nothing(
        self, call: Call, changed: dict[str, Any], field: str
    ) -> None:
        body = {name: part for name, part in (RECIPE | changed).items() if part is not None}
        status, shown = call("PUT", "mine", body)
        assert (status, [each["field"] for each in shown["invalid_fields"]]) == (422, [field]), shown
        assert call("GET", "mine")[0] == 404
        assert (rules(), schedules()) == ({}, [])

    def test_an_unknown_model_is_404_and_a_replicate_that_is_away_does_not_block(
        self, call: Call, replicate: ReplicateInMemory
    ) -> None:
        assert call("PUT", "mine", {**RECIPE, "model": "nobody/nothing"})[0] == 404
        replicate.read_faults += [answer(503)] * 4
        assert call("PUT", "mine", {**RECIPE, "input": {"num_outputs": "many"}})[0] == 201

    def test_unknown_root_is_named_with_the_known_and_the_nearest_ones(self, call: Call) -> None:
        shown = call("PUT", "mine", {**RECIPE, "input": {"prompt": "{{ objct.url }}"}})[1]
        assert shown["invalid_fields"] == [
            {
                "field": "input.prompt",
                "detail": "`{{ objct.url }}`: An expression must begin with `event`, `object`, `row`, `recipe` or "
                "`defaults` (got `objct`). Did you mean `object`?",
            }
        ]

    @pytest.mark.parametrize(
        "changed",
        [
            {"input": {"prompt": "{{ row.text || object.metadata.title || schedule.time }}"}},
            {"input": {"prompt": "{{ not_null(schedule.time, row.text) }}"}},
            {"input": {"prompt": "{{ object.ulr || 'x' }}"}},
            {"input": {"prompt": "{{ to_string(@) }}"}},
            {"input": {"prompt": "{{ keys(object)[0] }}"}},
            {"input": {"prompt": "{{ event.detail.items[?sku == 'a'].name | [0] }}"}},
            {"input": {"prompt": "{{ defaults.style }} {{ recipe.name }}"}, "defaults": {"style": "mosaic"}},
            {"input": {"prompt": "x", "num_outputs": "{{ row.n }}"}, "defaults": {"num_outputs": 2}},
            {"input": {"num_outputs": "{{ row.n }}"}, "defaults": {"prompt": "x"}},
            {"s3": None, "schedule": {"expression": "rate(1 day)"}, "input": {"prompt": "{{ schedule.time }}"}},
            {"s3": None, "pattern": {"source": ["aws.s3"]}},
            {"s3": None, "input": {"prompt": "{{ row.text }}"}},
        ],
        ids=str,
    )
    def test_expression_that_may_find_something_is_accepted(self, call: Call, changed: dict[str, Any]) -> None:
        body = {name: part for name, part in (RECIPE | changed).items() if part is not None}
        status, shown = call("PUT", "mine", body)
        assert status == 201, shown

    @pytest.mark.parametrize(("body", "status"), [("{", 400), ("[]", 422), ("x" * (RECIPE_LIMIT_BYTES + 1), 413)])
    def test_a_body_that_is_no_recipe_is_refused(self, call: Call, body: str, status: int) -> None:
        assert call("PUT", "mine", body)[0] == status

    @pytest.mark.parametrize("name", ["UPPER", "a_b", "x" * 64, "-x"])
    def test_a_name_that_is_none_is_refused(self, call: Call, name: str) -> None:
        assert call("PUT", name, RECIPE)[0] == 422
        assert call("GET", name)[0] == call("DELETE", name)[0] == 404

    def test_without_a_source_bucket_no_recipe_names_it(self, call: Call, changes: RecipeChanges) -> None:
        for nobody in ("", "outputs"):
            changes._source_bucket_name = nobody
            status, shown = call("PUT", "mine", {**RECIPE, "s3": {"bucket": "source", "prefix": ""}})
            assert (status, shown["invalid_fields"][0]["field"]) == (422, "s3.bucket")

    def test_what_eventbridge_refuses_leaves_the_recipe_as_it_was(self, call: Call) -> None:
        before = call("PUT", "mine", {**RECIPE, "s3": None, "pattern": {"source": ["shop"]}})[1]
        with refusing("PutRule", "LimitExceededException", service="events"):
            assert call("PUT", "mine", RECIPE)[0] == 422
            assert call("PUT", "other", RECIPE)[0] == 422
        assert call("GET", "mine")[1] == before
        assert rules() == {before["id"]: {"source": ["shop"]}}
        assert call("GET", "other")[0] == 404

    def test_other_owners_see_nothing(self, call: Call) -> None:
        call("PUT", "mine", RECIPE)
        assert call("GET", "mine", owner="bob")[0] == call("DELETE", "mine", owner="bob")[0] == 404
        assert call("GET", owner="bob")[1]["results"] == []
        assert call("PUT", "mine", RECIPE, owner="bob")[0] == 201, "a name is an owner's own"
        assert len(rules()) == 2


class TestChanges:
    def test_a_recipe_is_created_once_whatever_is_repeated(self, call: Call) -> None:
        status, first = call("PUT", "mine", RECIPE)
        again, second = call("PUT", "mine", {**RECIPE, "name": "mine"})
        assert (status, again, first["state"], first["id"]) == (201, 200, "active", second["id"])
        assert call("POST", None, {**RECIPE, "name": "mine"})[0] == 409
        assert call("POST", None, {**RECIPE, "name": "third"})[0] == 201
        assert [each["name"] for each in call("GET")[1]["results"]] in (["third", "mine"], ["mine", "third"])
        assert set(rules()) >= {first["id"]}

    @pytest.mark.parametrize(
        ("s3", "matched"),
        [
            ({"prefix": "in/"}, {"bucket": {"name": ["inputs"]}, "object": {"key": [{"prefix": "in/"}]}}),
            (
                {"prefix": "a*b\\", "suffix": ".png"},
                {"bucket": {"name": ["inputs"]}, "object": {"key": [{"wildcard": "a\\*b\\\\*.png"}]}},
            ),
            (
                {"bucket": "source", "prefix": "", "min_bytes": 1, "max_bytes": 9},
                {
                    "bucket": {"name": ["source"]},
                    "object": {"size": [{"numeric": [">=", 1, "<=", 9]}]},
                },
            ),
            ({"bucket": "source", "prefix": ""}, {"bucket": {"name": ["source"]}}),
        ],
    )
    def test_objects_are_matched_by_a_rule(self, call: Call, s3: dict[str, Any], matched: dict[str, Any]) -> None:
        shown = call("PUT", "mine", {**RECIPE, "s3": s3})[1]
        pattern = {"source": ["aws.s3"], "detail-type": ["Object Created"], "detail": matched}
        found = rules()[shown["id"]]
        if shown["s3"].get("prefix") == "":
            found["detail"].get("object", {}).pop("key", None)  # every key has the prefix ""
            found["detail"] = {name: part for name, part in found["detail"].items() if part}
        assert found == pattern
        sent = target(shown["id"])
        assert sent["Arn"].endswith(":requests")
        assert sent["DeadLetterConfig"]["Arn"].endswith(":dead-requests")
        assert shown["id"] in sent["InputTransformer"]["InputTemplate"]
        assert sent["SqsParameters"] == {"MessageGroupId": "alice"}

    def test_another_source_takes_the_place_of_the_first(self, call: Call) -> None:
        recipe_id = call("PUT", "mine", RECIPE)[1]["id"]
        without = {name: part for name, part in (RECIPE | PLAIN).items() if name != "s3"}
        call("PUT", "mine", {**without, "pattern": {"source": ["shop"]}, "bus": "stack"})
        assert (rules(), list(rules("bus")), schedules()) == ({}, [recipe_id], [])
        call("PUT", "mine", {**without, "schedule": {"expression": "rate(1 day)", "time_zone": "Europe/Berlin"}})
        assert (rules(), rules("bus"), schedules()) == ({}, {}, [recipe_id])
        call("PUT", "mine", {**without, "schedule": {"expression": "rate(2 days)"}})
        schedule = clients.client("scheduler").get_schedule(Name=RULE + recipe_id, GroupName="replicate-serverless")
        assert (schedule["ScheduleExpression"], schedule["ScheduleExpressionTimezone"]) == ("rate(2 days)", "UTC")
        assert json.loads(schedule["Target"]["Input"])["event"]["time"] == "<aws.scheduler.scheduled-time>"
        call("PUT", "mine", without)
        assert (rules(), rules("bus"), schedules()) == ({}, {}, [])
        assert call("DELETE", "mine")[0] == 204

    @pytest.mark.parametrize("operation", ["PutRule", "PutTargets"])
    def test_a_recipe_whose_rule_was_not_made_is_pending_and_mended_by_the_next_call(
        self, call: Call, operation: str
    ) -> None:
        with refusing(operation, "InternalException", service="events"):
            assert call("PUT", "mine", RECIPE)[0] == 503
        assert call("GET", "mine")[1]["state"] == "pending"
        status, shown = call("PUT", "mine", RECIPE)
        assert (status, shown["state"], list(rules())) == (200, "active", [shown["id"]])

    @pytest.mark.parametrize("operation", ["RemoveTargets", "DeleteRule"])
    def test_a_deletion_that_broke_off_starts_nothing_and_is_finished_by_the_next_one(
        self, call: Call, recipes: Recipes, operation: str
    ) -> None:
        shown = call("PUT", "mine", RECIPE)[1]
        with refusing(operation, "InternalException", service="events"):
            assert call("DELETE", "mine")[0] == 503
        assert call("GET", "mine")[1]["state"] == "deleting"
        assert recipes.intent({"recipe_id": shown["id"], "event": created("in/a.png")}, message()) is None
        assert call("DELETE", "mine")[0] == 204
        assert (call("DELETE", "mine")[0], rules()) == (404, {})
        assert call("PUT", "mine", RECIPE)[1]["id"] != shown["id"]

    def test_a_change_at_the_same_time_wins_or_is_told(self, call: Call, items: RecipeItems) -> None:
        shown = call("PUT", "mine", RECIPE)[1]
        stale = items.find(shown["id"])
        assert stale
        call("PUT", "mine", {**RECIPE, "s3": {"prefix": "new/"}})
        assert not items.put(stale, replaces=stale)
        assert not items.set_state(stale, "deleting")
        assert not items.erase(stale)
        assert call("GET", "mine")[1]["s3"] == {"prefix": "new/"}


def message(message_id: str = "m1", sent_at: int = SENT) -> Message:
    return Message(message_id, "AIDA", "", sent_at)


def created(key: str, bucket: str = "inputs", *, put: bool = True, **changes: Any) -> dict[str, Any]:
    """S3's event of an object, which is put there."""
    etag = "0" * 32
    if put:
        s3 = clients.client("s3")
        etag = s3.put_object(Bucket=bucket, Key=key, Body=b"x", Metadata=changes.pop("metadata", {}))["ETag"].strip('"')
    found = {"key": key, "size": 1, "etag": etag, "sequencer": "0055AED6DCD90281E5", **changes}
    return {
        "id": "17793124-05d4-b198-2fde-7ededc63b103",
        "source": "aws.s3",
        "detail-type": "Object Created",
        "time": "2025-06-15T15:06:40Z",
        "detail": {"bucket": {"name": bucket}, "object": found},
    }


class TestDoor:
    @pytest.fixture
    def intent(self, call: Call, recipes: Recipes) -> Callable[..., Intent | None]:
        """The intent of an event by a recipe."""

        def intent(definition: dict[str, Any], event: Any, told: Message | None = None) -> Intent | None:
            body = {name: part for name, part in (RECIPE | definition).items() if part is not None}
            status, shown = call("PUT", "mine", body)
            assert status in (200, 201), shown
            return recipes.intent({"recipe_id": shown["id"], "event": event}, told or message())

        return intent

    @pytest.mark.parametrize("recipe_id", [None, 3, "", "x", "A" * 26])
    def test_what_names_no_recipe_is_refused(self, recipes: Recipes, recipe_id: Any) -> None:
        with pytest.raises(RequestRefused, match="recipe_id"):
            recipes.intent({"recipe_id": recipe_id, "event": {}}, message())

    def test_a_recipe_that_is_gone_starts_nothing(self, recipes: Recipes) -> None:
        assert recipes.intent({"recipe_id": "a" * 26, "event": {}}, message()) is None

    @pytest.mark.parametrize(
        "event",
        [
            None,
            [],
            "x",
            {"source": "aws.s3", "detail-type": "Object Created"},
            {"source": "aws.s3", "detail-type": "Object Created", "detail": {"bucket": "x", "object": []}},
            {"source": "aws.s3", "detail-type": "Object Created", "detail": {"bucket": {"name": 1}, "object": {}}},
        ],
        ids=str,
    )  # fmt: skip
    def test_an_event_that_cannot_be_read_is_refused(self, intent: Callable[..., Any], event: Any) -> None:
        with pytest.raises(RequestRefused, match="event"):
            intent({}, event)

    @pytest.mark.parametrize(
        ("key", "bucket"),
        [
            ("elsewhere/a.png", "inputs"),
            ("in/a.txt", "inputs"),
            ("files/alice/x.png", "inputs"),
            ("in/a.png", "source"),
        ],
    )
    def test_an_object_that_is_not_the_recipes_starts_nothing(
        self, intent: Callable[..., Any], key: str, bucket: str
    ) -> None:
        assert intent({"s3": {"prefix": "in/", "suffix": ".png"}}, created(key, bucket)) is None

    def test_objects_of_the_outputs_bucket_are_refused(self, intent: Callable[..., Any]) -> None:
        with pytest.raises(RequestRefused, match="outputs bucket"):
            intent({}, created("in/a.png", "outputs"))

    def test_owners_uploads_are_handed_to_no_model(self, intent: Callable[..., Any]) -> None:
        pattern = {"s3": None, "pattern": {"source": ["aws.s3"]}}
        with pytest.raises(RequestRefused, match=r"input\.prompt: .*finds nothing"):
            intent(pattern, created("files/bob/secret"))
        made = intent(pattern, created("in/fine.png"))
        assert "/objects/inputs/fine.png?" in json.loads(made.input_json)["prompt"]

    @pytest.mark.parametrize(("depth", "next_depth"), [(None, 0), ("0", 1), ("2", 3)])
    def test_an_object_hands_its_depth_on(self, intent: Callable[..., Any], depth: str | None, next_depth: int) -> None:
        made = intent({}, created("in/a.png", metadata={"origin-depth": depth} if depth else {}))
        assert made.depth == next_depth

    @pytest.mark.parametrize(
        ("depth", "said"), [("3", r"MaxOriginDepth \(3\)"), ("-1", "whole number"), ("x", "whole")]
    )
    def test_too_deep_or_unknowable_is_refused(self, intent: Callable[..., Any], depth: str, said: str) -> None:
        with pytest.raises(RequestRefused, match=said):
            intent({}, created("in/a.png", metadata={"origin-depth": depth}))

    @pytest.mark.parametrize(
        ("event", "outcome"),
        [
            ({"source": "replicate-serverless", "detail": {"owner": "alice", "depth": 2}}, 3),
            ({"source": "replicate-serverless", "detail": {"owner": "alice"}}, 1),
            ({"source": "replicate-serverless", "detail": {"owner": "alice", "depth": 3}}, "refused"),
            ({"source": "replicate-serverless", "detail": {"owner": "alice", "depth": True}}, "refused"),
            ({"source": "replicate-serverless", "detail": {"owner": "bob", "depth": 0}}, None),
            ({"source": "replicate-serverless", "detail": "x"}, None),
            ({"source": "replicate-serverless", "detail": {"owner": "alice", "depth": 0, "event_id": 3}}, 1),
            ({"source": "shop", "detail": {"depth": 5000}}, 0),
            ({"source": "shop", "detail": {"origin-depth": 1}}, 2),
            ({"source": "shop", "detail": {"origin-depth": 9}}, "refused"),
            ({"source": "shop"}, 0),
        ],
        ids=str,
    )
    def test_an_event_hands_its_depth_on(self, intent: Callable[..., Any], event: Any, outcome: Any) -> None:
        definition = {"s3": None, "pattern": {"source": ["x"]}, "input": {"prompt": "{{ event.id }}"}}
        if outcome == "refused":
            with pytest.raises(RequestRefused):
                intent(definition, {"id": "e1", **event})
            return
        made = intent(definition, {"id": "e1", **event})
        assert (made.depth if made else None) == outcome

    def test_an_object_that_is_gone_or_overwritten_starts_nothing(self, intent: Callable[..., Any]) -> None:
        assert intent({}, created("in/never.png", put=False)) is None
        first = created("in/a.png")
        clients.client("s3").put_object(Bucket="inputs", Key="in/a.png", Body=b"another")
        assert intent({}, first) is None

    def test_a_file_becomes_a_request_with_a_link_and_a_place_for_its_results(self, intent: Callable[..., Any]) -> None:
        made = intent(
            {"input": {"prompt": "{{ object.metadata.title }} {{ object.name }}", "image": "{{ object.url }}"},
             "defaults": {"prompt": "untitled", "num_outputs": 1}},
            created("in/ü fox.png"),
        )  # fmt: skip
        value = json.loads(made.input_json)
        assert (value["prompt"], value["num_outputs"]) == ("untitled", 1)
        assert value["image"].startswith(f"{API_URL}/objects/inputs/__fox.png?")
        assert f"expires={SENT + 7 * 86400}&" in value["image"]
        assert (made.owner, made.source, made.origin, made.depth) == ("alice", "recipe", {"recipe": "mine"}, 0)
        assert made.output_prefix == "in/__fox.png"

    def test_the_same_object_is_the_same_request_and_another_version_another(
        self, intent: Callable[..., Any], clock: Clock
    ) -> None:
        event = created("in/a.png")
        first = intent({}, event)
        clock.advance(3600)
        again = intent({}, {**event, "id": "another delivery"}, message("m2"))
        assert again == first
        later = json.loads(json.dumps(event))
        later["detail"]["object"]["sequencer"] = "0055AED6DCD90281E6"
        assert intent({}, later).id != first.id

    def test_a_message_that_was_put_back_after_days_has_a_link_that_works(
        self, intent: Callable[..., Any], clock: Clock
    ) -> None:
        clock.advance(12 * 86400)
        made = intent({}, created("in/a.png"))
        assert f"expires={SENT + 21 * 86400}&" in json.loads(made.input_json)["prompt"]

    def test_a_schedule_is_one_request_for_each_time(self, intent: Callable[..., Any]) -> None:
        definition = {
            "s3": None,
            "schedule": {"expression": "rate(1 day)"},
            "input": {"prompt": "{{ schedule.time }}"},
            "output_prefix": "daily/{{ schedule.time }}",
        }
        event = {"time": "2025-06-15T09:00:00Z"}
        first = intent(definition, event)
        assert json.loads(first.input_json) == {"prompt": "2025-06-15T09:00:00Z"}
        assert first.output_prefix == "daily/2025-06-15T09_00_00Z"
        assert intent(definition, event, message("m2")).id == first.id
        assert intent(definition, {"time": "2025-06-16T09:00:00Z"}).id != first.id
        literal = intent(definition, {"time": "<aws.scheduler.scheduled-time>"})
        assert json.loads(literal.input_json) == {"prompt": "2025-06-15T15:06:40Z"}

    def test_the_stacks_own_event_that_comes_twice_is_one_request(self, intent: Callable[..., Any]) -> None:
        definition = {
            "s3": None,
            "pattern": {"source": ["replicate-serverless"]},
            "bus": "stack",
            "input": {"prompt": "x"},
        }
        detail = {"owner": "alice", "depth": 0, "event_id": "x-succeeded"}
        told = [{"id": each, "source": "replicate-serverless", "detail": detail} for each in ("e1", "e2")]
        assert intent(definition, told[0]).id == intent(definition, told[1]).id

    def test_a_placeholder_that_finds_nothing_is_refused_with_recipe_and_field(
        self, intent: Callable[..., Any]
    ) -> None:
        with pytest.raises(RequestRefused, match=r"Recipe mine, input\.prompt: .*finds nothing"):
            intent({"input": {"prompt": "{{ object.metadata.title }}"}}, created("in/a.png"))

    def test_the_requests_queue_hands_messages_of_recipes_on(self, call: Call, executed: Executed) -> None:
        shown = call("PUT", "mine", RECIPE)[1]
        body = json.dumps({"recipe_id": shown["id"], "event": created("in/a.png")})
        prediction = Requests.from_env().take(Message("m1", "AIDA", body, SENT))
        assert prediction
        assert (prediction.owner, prediction.source, prediction.output_prefix) == ("alice", "recipe", "in/a.png")
        again = Requests.from_env().take(Message("m2", "AIDA", body, SENT))
        assert again
        assert again.id == prediction.id


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("", ""),
        ("///", ""),
        ("in/fox.png", "in/fox.png"),
        ("../../bob/x", "_./_./bob/x"),
        ("/absolute//twice/", "absolute/twice"),
        ("ü b\n?/*", "__b__/_"),
        ("payloads/x", "payloads/x"),
        ("abcdefghijklmnopqrstuvwxyz/x", "_abcdefghijklmnopqrstuvwxyz/x"),
        ("@a/+b/=c", "_a/_b/_c"),
        ("x" * 2000, "x" * 512),
    ],
)
def test_a_place_for_results_never_leaves_its_owners_part(text: str, safe: str) -> None:
    assert safe_prefix(text) == safe
    assert folder("alice", "i" * 26, safe or None).startswith("alice/")
    assert safe_prefix(safe_prefix(text)) == safe_prefix(text)


def webhook_of(call: Call, recipes: Recipes, key: str, **changes: Any) -> str | None:
    """The webhook of the intent that a recipe makes of an object."""
    status, shown = call("PUT", "mine", RECIPE | changes)
    assert status in (200, 201), shown
    intent = recipes.intent({"recipe_id": shown["id"], "event": created(key)}, message())
    assert intent is not None
    return intent.webhook


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("in/fox.png", "in%2Ffox.png"),
        ("in/a&admin=1", "in%2Fa%26admin%3D1"),
        ("in/a b#c?d", "in%2Fa%20b%23c%3Fd"),
        ("in/../x", "in%2F..%2Fx"),
        ("in/füchse%20", "in%2Ff%C3%BCchse%2520"),
    ],
)
def test_value_in_a_webhook_adds_no_parameter_and_ends_no_url(
    call: Call, recipes: Recipes, key: str, said: str
) -> None:
    webhook = "https://hooks.example.com/{{ object.key }}?key={{ object.key }}&size={{ object.size }}"
    assert webhook_of(call, recipes, key, webhook=webhook) == f"https://hooks.example.com/{said}?key={said}&size=1"


def test_placeholder_at_the_beginning_of_a_webhook_is_its_base(call: Call, recipes: Recipes) -> None:
    base = "https://hooks.example.com/in?a=1"
    found = webhook_of(
        call, recipes, "in/a&b", defaults={"hook": base}, webhook="{{ defaults.hook }}&key={{ object.key }}"
    )
    assert found == f"{base}&key=in%2Fa%26b"


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def labeled(call: Call, recipes: Recipes, labels: dict[str, str], detail: dict[str, Any]) -> Intent | None:
    recipe = {**RECIPE, "s3": None, "input": {"prompt": "x"}, "pattern": {"source": ["shop"]}, "labels": labels}
    status, shown = call("PUT", "mine", {name: part for name, part in recipe.items() if part is not None})
    assert status in (200, 201), shown
    event = {"id": "e1", "source": "shop", "detail-type": "Order", "detail": detail}
    return recipes.intent({"recipe_id": shown["id"], "event": event}, message())


def test_recipe_fills_labels_from_the_event_and_takes_its_trace(call: Call, recipes: Recipes) -> None:
    labels = {"team": "shop", "order": "{{ event.detail.order }}", "by": "{{ event.detail.who }}/{{ recipe.name }}"}
    found = labeled(call, recipes, labels, {"order": 7, "who": "ann", "traceparent": TRACE})
    assert found
    assert (found.labels, found.traceparent) == ({"team": "shop", "order": "7", "by": "ann/mine"}, TRACE)


@pytest.mark.parametrize("who", ["", "x" * 257, "a\nb", None, ["a"]])
def test_label_that_an_event_fills_badly_is_refused(call: Call, recipes: Recipes, who: Any) -> None:
    with pytest.raises((Problem, RequestRefused), match=r"labels\.who"):
        labeled(call, recipes, {"who": "{{ event.detail.who }}"}, {"who": who})


@pytest.mark.parametrize(
    ("labels", "field"),
    [
        ({"team": 7}, "labels.team"),
        ({"te am": "a"}, "labels"),
        ({f"k{n}": "{{ event.id }}" for n in range(11)}, "labels"),
        ({"team": "{{ row2.x }}"}, "labels.team"),
        ([], "labels"),
    ],
    ids=repr,
)
def test_recipe_with_bad_labels_is_refused(call: Call, labels: Any, field: str) -> None:
    status, problem = call("PUT", "mine", {**RECIPE, "labels": labels})
    assert (status, [each["field"] for each in problem["invalid_fields"]]) == (422, [field])
