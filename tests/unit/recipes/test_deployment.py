"""Recipes that come with a deployment: from CloudFormation's request to its answer."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from predictions.aws import clients
from predictions.errors import Problem
from predictions.recipes.deployment import FILES_LIMIT, NEEDED_SECONDS, DeployedRecipes, DeploymentRefused, recipe_files
from predictions.recipes.manage import RECIPE_LIMIT_BYTES, RecipeChanges
from predictions.recipes.rules import RecipeRules
from predictions.recipes.store import RecipeItems
from predictions.store.predictions import PredictionsTable

from tests.support.apps import Context, load_app, sample
from tests.support.fakes import Clock, ReplicateInMemory, refusing
from tests.support.fixtures import ENVIRONMENT, make_recipe_changes
from tests.support.template import ROOT

MODEL = "black-forest-labs/flux-schnell"
RULE = "replicate-serverless-recipe-"
RECIPE: dict[str, Any] = {"model": MODEL, "input": {"prompt": "{{ object.url }}"}, "s3": {"prefix": "in/"}}

Ask = Callable[..., dict[str, Any]]


def packed(**recipes: Any) -> dict[str, bytes]:
    return {f"{name}.json": json.dumps(recipe).encode() for name, recipe in recipes.items()}


def plenty() -> float:
    return 300


@pytest.fixture
def items(cloud: None) -> RecipeItems:
    return RecipeItems.from_env()


@pytest.fixture
def changes(table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock) -> RecipeChanges:
    return make_recipe_changes(table, replicate, clock)


@pytest.fixture
def deployed(items: RecipeItems, changes: RecipeChanges, clock: Clock) -> DeployedRecipes:
    return DeployedRecipes(items, changes, RecipeRules.from_env(sleep=clock.advance), default_owner="queue")


@pytest.fixture
def stack_id(cloud: None) -> str:
    """A stack that is not deleted."""
    template = json.dumps({"Resources": {"Topic": {"Type": "AWS::SNS::Topic"}}})
    made = clients.client("cloudformation").create_stack(StackName="replicate-serverless", TemplateBody=template)
    return made["StackId"]


def rules(bus: str = "default") -> set[str]:
    return {rule["Name"] for rule in clients.client("events").list_rules(EventBusName=bus)["Rules"]}


def names(items: RecipeItems, owner: str = "queue") -> list[str]:
    return sorted(recipe.name for recipe in items.page(owner, None, older=True, size=50)[0])


class TestRefused:
    @pytest.mark.parametrize(
        ("file", "content", "reason"),
        [
            ("a.json", b"{", "recipes/a.json: "),
            ("a.json", b'{"input": 1, "input": 2}', "recipes/a.json: "),
            ("a.json", b"\xff", "recipes/a.json: The body is not UTF-8"),
            ("a.json", b"[]", "recipes/a.json: The body must be a JSON object"),
            ("a.json", b" " * (RECIPE_LIMIT_BYTES + 1), "recipes/a.json: The recipe exceeds the limit"),
            ("A b.json", json.dumps(RECIPE).encode(), "recipes/A b.json: name: "),
            ("a.json", json.dumps({**RECIPE, "name": "b"}).encode(), "recipes/a.json: name: "),
            ("a.json", json.dumps({**RECIPE, "owner": "Team A"}).encode(), "recipes/a.json: owner: "),
            ("a.json", json.dumps({**RECIPE, "owner": "payloads"}).encode(), "recipes/a.json: owner: "),
            ("a.json", json.dumps({**RECIPE, "owner": None}).encode(), "recipes/a.json: owner: "),
            ("a.json", json.dumps({**RECIPE, "colour": 1}).encode(), "recipes/a.json: colour: "),
            (
                "a.json",
                json.dumps({**RECIPE, "input": {"prompt": "{{ objct.url }}"}}).encode(),
                "recipes/a.json: input.prompt: `{{ objct.url }}`: An expression must begin with",
            ),
            (
                "a.json",
                json.dumps({**RECIPE, "model": "no/body"}).encode(),
                "recipes/a.json: Model no/body not found",
            ),
        ],
        ids=[
            "cut off",
            "a key twice",
            "not UTF-8",
            "a list",
            "too large",
            "a name that is none",
            "another name",
            "an owner that is none",
            "an owner that is kept",
            "nobody",
            "an unknown field",
            "an unknown root",
            "an unknown model",
        ],
    )
    def test_a_bad_file_is_named_with_its_field_and_nothing_is_changed(
        self, deployed: DeployedRecipes, items: RecipeItems, file: str, content: bytes, reason: str
    ) -> None:
        deployed.apply(packed(there=RECIPE), plenty)
        before = items.named("queue", "there")
        with pytest.raises(DeploymentRefused) as refused:
            deployed.apply(
                {file: content, **packed(zebra={**RECIPE, "input": {"prompt": "{{ ! }}"}}, new=RECIPE)}, plenty
            )
        assert reason in str(refused.value)
        assert "recipes/zebra.json: input.prompt: " in str(refused.value), "all that is wrong is told at once"
        assert (names(items), items.named("queue", "there")) == (["there"], before)
        assert items.deployed() == {("queue", "there")}

    def test_a_name_that_the_api_has_given_is_refused_and_its_recipe_stays(
        self, deployed: DeployedRecipes, changes: RecipeChanges, items: RecipeItems
    ) -> None:
        changes.put("queue", json.dumps(RECIPE).encode(), None, name="mine")
        with pytest.raises(DeploymentRefused, match=r"recipes/mine\.json: queue has a recipe mine from the API"):
            deployed.apply(packed(mine={**RECIPE, "s3": {"prefix": "other/"}}), plenty)
        there = items.named("queue", "mine")
        assert there
        assert there.definition["s3"] == {"prefix": "in/"}

    @pytest.mark.parametrize("name", ["mine", None])
    def test_the_api_does_not_replace_what_came_with_the_stack_but_may_delete_it(
        self, deployed: DeployedRecipes, changes: RecipeChanges, items: RecipeItems, name: str | None
    ) -> None:
        deployed.apply(packed(mine=RECIPE), plenty)
        with pytest.raises(Problem, match=r"409: .*recipes/mine\.json"):
            changes.put("queue", json.dumps({**RECIPE, "name": "mine"}).encode(), None, name=name)
        assert changes.delete("queue", "mine"), "what runs wild has to be stopped at once"
        assert rules() == set()
        deployed.apply(packed(mine=RECIPE), plenty)
        assert names(items) == ["mine"]

    def test_role_that_scheduler_does_not_know_yet_is_waited_for_and_other_refusals_are_not(
        self, items: RecipeItems, changes: RecipeChanges, clock: Clock, deployed: DeployedRecipes
    ) -> None:
        scheduled = {"model": MODEL, "input": {"prompt": "x"}, "schedule": {"expression": "rate(1 day)"}}
        began = clock.now()
        refusals = iter([True, True, False])
        message = "The execution role you provide must allow AWS EventBridge Scheduler to assume the role."
        with refusing(
            "CreateSchedule", "ValidationException", lambda _: next(refusals), service="scheduler", message=message
        ):
            deployed.apply(packed(a=scheduled), plenty)
        assert clock.now() - began == 1 + 2
        assert items.deployed() == {("queue", "a")}
        wrong = {**scheduled, "schedule": {"expression": "rate(2 days)"}}
        with (
            refusing(
                "UpdateSchedule", "ValidationException", service="scheduler", message="Invalid Schedule Expression"
            ),
            pytest.raises(DeploymentRefused, match="Invalid Schedule Expression"),
        ):
            deployed.apply(packed(a=wrong), plenty)
        assert clock.now() - began == 1 + 2
        with (
            refusing("UpdateSchedule", "ValidationException", service="scheduler", message=message),
            pytest.raises(DeploymentRefused, match="assume the role"),
        ):
            deployed.apply(packed(a=wrong), plenty)
        assert clock.now() - began == 3 + 2 * 7, "once for the change, and once for what was there"

    def test_more_files_than_fit_are_refused(self, deployed: DeployedRecipes) -> None:
        many = {f"r{number}.json": b"{}" for number in range(FILES_LIMIT + 1)}
        with pytest.raises(DeploymentRefused, match=r"the limit of 100 files \(got 101\)"):
            deployed.apply(many, plenty)

    def test_what_eventbridge_does_not_take_is_refused_and_gone_with_the_next_files(
        self, deployed: DeployedRecipes, items: RecipeItems
    ) -> None:
        with (
            refusing("PutRule", "LimitExceededException", service="events"),
            pytest.raises(DeploymentRefused, match=r"recipes/b\.json: s3: "),
        ):
            deployed.apply(packed(a={"model": MODEL, "input": {"prompt": "x"}}, b=RECIPE), plenty)
        assert names(items) == ["a"]
        deployed.apply({}, plenty)  # the rollback
        assert (names(items), items.deployed()) == ([], set())

    def test_with_too_little_time_left_nothing_is_begun(self, deployed: DeployedRecipes, items: RecipeItems) -> None:
        left = iter([300, 300, 300, NEEDED_SECONDS - 1])
        with pytest.raises(DeploymentRefused, match=r"Not enough time for recipes/b\.json\. Deploy again"):
            deployed.apply(packed(a=RECIPE, b=RECIPE), lambda: next(left))
        assert names(items) == ["a"]
        deployed.apply(packed(a=RECIPE, b=RECIPE), plenty)
        assert names(items) == ["a", "b"]


class TestFiles:
    def test_files_are_put_replaced_and_deleted_and_what_the_api_has_put_stays(
        self, deployed: DeployedRecipes, changes: RecipeChanges, items: RecipeItems
    ) -> None:
        changes.put("queue", json.dumps(RECIPE).encode(), None, name="by-api")
        deployed.apply(packed(a=RECIPE, b={**RECIPE, "owner": "team-a"}), plenty)
        first = items.named("queue", "a")
        assert first
        assert (first.deployed, first.state, names(items, "team-a")) == (True, "active", ["b"])
        assert "owner" not in first.definition
        for _ in range(2):
            deployed.apply(packed(a={**RECIPE, "s3": {"prefix": "new/"}}), plenty)
        second = items.named("queue", "a")
        assert second
        assert (second.id, second.definition["s3"]) == (first.id, {"prefix": "new/"})
        assert (names(items), names(items, "team-a")) == (["a", "by-api"], [])
        assert len(rules()) == 2
        deployed.apply({}, plenty)
        assert (names(items), items.deployed()) == (["by-api"], set())

    def test_another_owner_in_the_file_leaves_nothing_with_the_first(
        self, deployed: DeployedRecipes, items: RecipeItems
    ) -> None:
        deployed.apply(packed(a=RECIPE), plenty)
        deployed.apply(packed(a={**RECIPE, "owner": "team-a"}), plenty)
        assert (names(items), names(items, "team-a"), len(rules())) == ([], ["a"], 1)

    @pytest.mark.parametrize(
        ("service", "operation"),
        [("events", "PutRule"), ("events", "PutTargets"), ("dynamodb", "UpdateItem"), ("dynamodb", "PutItem")],
    )
    def test_what_broke_off_is_known_to_the_next_deployment(
        self, deployed: DeployedRecipes, items: RecipeItems, service: str, operation: str
    ) -> None:
        deployed.apply(packed(old=RECIPE), plenty)
        with refusing(operation, "InternalException", service=service), pytest.raises(Exception, match=operation):
            deployed.apply(packed(new=RECIPE), plenty)
        deployed.apply({}, plenty)
        assert (names(items), items.deployed(), rules()) == ([], set(), set())

    def test_without_files_nothing_is_written(self, deployed: DeployedRecipes, items: RecipeItems) -> None:
        with refusing("PutItem", "InternalServerError", service="dynamodb"):
            deployed.apply({}, plenty)

    def test_the_sample_in_the_folder_is_a_recipe(self, deployed: DeployedRecipes, items: RecipeItems) -> None:
        text = (ROOT / "recipes/README.md").read_text()
        written = json.loads(text.split("```json\n")[1].split("```")[0])
        written |= {"model": MODEL, "input": {"prompt": written["input"]["image"]}}
        deployed.apply(packed(etch=written), plenty)
        assert names(items, "team-a") == ["etch"]


class TestDeleting:
    def test_a_stack_that_is_deleted_takes_the_rules_of_all_its_recipes_along_and_no_other_stack_s(
        self, deployed: DeployedRecipes, changes: RecipeChanges, stack_id: str
    ) -> None:
        deployed.apply(packed(a=RECIPE), plenty)
        pattern = {"model": MODEL, "input": {"prompt": "x"}, "pattern": {"source": ["shop"]}, "bus": "stack"}
        changes.put("alice", json.dumps(pattern).encode(), None, name="by-api")
        events = clients.client("events")
        for other in (f"{RULE}o-recipe-{'a' * 26}", f"o-recipe-{'a' * 26}"):
            events.put_rule(Name=other, EventPattern='{"source": ["x"]}')
        clients.client("cloudformation").delete_stack(StackName=stack_id)
        deployed.remove(stack_id, plenty)
        assert rules() == {f"{RULE}o-recipe-{'a' * 26}", f"o-recipe-{'a' * 26}"}
        assert rules("bus") == set()
        deployed.remove(stack_id, plenty)

    def test_one_rule_that_cannot_be_removed_does_not_keep_the_others(
        self, deployed: DeployedRecipes, stack_id: str
    ) -> None:
        deployed.apply(packed(a=RECIPE, b=RECIPE, c=RECIPE), plenty)
        kept = min(rules())
        clients.client("cloudformation").delete_stack(StackName=stack_id)
        with refusing("DeleteRule", "InternalException", lambda body: body["Name"] == kept, service="events"):
            deployed.remove(stack_id, plenty)
        assert rules() == {kept}

    @pytest.mark.parametrize(("service", "operation"), [("events", "DeleteRule"), ("events", "ListRules")])
    def test_what_could_not_be_removed_is_tried_again_for_some_seconds_and_rules_of_others_stay(
        self,
        items: RecipeItems,
        changes: RecipeChanges,
        clock: Clock,
        stack_id: str,
        caplog: pytest.LogCaptureFixture,
        service: str,
        operation: str,
    ) -> None:
        pattern = {"model": MODEL, "input": {"prompt": "x"}, "pattern": {"source": ["shop"]}, "bus": "stack"}
        changes.put("alice", json.dumps(pattern).encode(), None, name="by-api")
        clients.client("events").put_rule(Name="theirs", EventBusName="bus", EventPattern='{"source": ["x"]}')
        clients.client("cloudformation").delete_stack(StackName=stack_id)
        refused: Any = refusing(operation, "InternalException", service=service)
        waited: list[float] = []

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 2:
                refused.__exit__(None, None, None)

        deployed = DeployedRecipes(items, changes, RecipeRules.from_env(sleep=sleep), default_owner="queue")
        refused.__enter__()
        deployed.remove(stack_id, plenty)
        assert rules("bus") == {"theirs"}, "which a person has to delete: the bus cannot be deleted before"
        assert waited == [1, 2]

    def test_rules_that_stay_are_given_up_after_some_seconds(
        self, deployed: DeployedRecipes, clock: Clock, stack_id: str
    ) -> None:
        deployed.apply(packed(a=RECIPE), plenty)
        clients.client("cloudformation").delete_stack(StackName=stack_id)
        began = clock.now()
        with refusing("DeleteRule", "InternalException", service="events"):
            deployed.remove(stack_id, plenty)
        assert clock.now() - began == 7

    def test_where_the_stack_stays_only_what_came_with_it_goes(
        self, deployed: DeployedRecipes, changes: RecipeChanges, items: RecipeItems, stack_id: str
    ) -> None:
        deployed.apply(packed(a=RECIPE), plenty)
        changes.put("queue", json.dumps(RECIPE).encode(), None, name="by-api")
        deployed.remove(stack_id, plenty)
        assert (names(items), len(rules())) == (["by-api"], 1)


class CloudFormation:
    """Where the answers arrive."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.faults: list[httpx.Response | httpx.HTTPError] = []

    def client(self, **_: Any) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self._take))

    def _take(self, request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.host) == ("PUT", "cloudformation-custom-resource-response.s3.amazonaws.com")
        assert "Content-Type" not in request.headers, "it is not signed"
        if self.faults:
            fault = self.faults.pop(0)
            if isinstance(fault, httpx.HTTPError):
                raise fault
            return fault
        assert len(request.content) <= 4096
        self.answers.append(json.loads(request.content))
        return httpx.Response(200)


class TestHandler:
    @pytest.fixture
    def cloudformation(self) -> CloudFormation:
        return CloudFormation()

    @pytest.fixture
    def files(self) -> dict[str, bytes]:
        """What is packed with the function."""
        return {}

    @pytest.fixture
    def ask(
        self,
        deployed: DeployedRecipes,
        cloudformation: CloudFormation,
        files: dict[str, bytes],
        monkeypatch: pytest.MonkeyPatch,
    ) -> Ask:
        """Asks as CloudFormation does; its answer."""
        with pytest.MonkeyPatch.context() as template_only:
            app = load_app("deploy_recipes", template_only)
        for name, value in {
            "deployed_recipes": deployed,
            "open_client": cloudformation.client,
            "recipe_files": lambda: files,
        }.items():
            monkeypatch.setattr(app, name, value)

        def ask(kind: str, **changed: Any) -> dict[str, Any]:
            event = sample("deploy_recipes", kind.lower())
            app.handler({**event, **changed}, Context(250))
            answer: dict[str, Any] = cloudformation.answers.pop()
            assert {name: answer[name] for name in ("StackId", "RequestId", "LogicalResourceId")} == {
                name: event[name] for name in ("StackId", "RequestId", "LogicalResourceId")
            }
            assert answer["PhysicalResourceId"] == "DeployedRecipes"
            return answer

        return ask

    @pytest.mark.parametrize("kind", ["Create", "Update"])
    def test_a_bad_file_fails_the_deployment_with_the_reason(
        self, ask: Ask, files: dict[str, bytes], items: RecipeItems, kind: str
    ) -> None:
        files.update(packed(a={**RECIPE, "colour": '"\n\x1b' * 9}, b=RECIPE))
        answer = ask(kind)
        assert (answer["Status"], answer["Reason"]) == ("FAILED", "recipes/a.json: colour: Unknown field.")
        assert names(items) == []

    def test_a_long_reason_is_cut_to_what_cloudformation_takes(self, ask: Ask, files: dict[str, bytes]) -> None:
        files.update({f'é{number}\n".json': b"{" for number in range(FILES_LIMIT)})
        answer = ask("Create")
        assert answer["Status"] == "FAILED"
        assert answer["Reason"].startswith('recipes/é0 ".json: ')

    @pytest.mark.parametrize("kind", ["Create", "Update", "Delete"])
    def test_it_is_answered_whatever_happens(
        self, ask: Ask, files: dict[str, bytes], items: RecipeItems, kind: str
    ) -> None:
        files.update(packed(a=RECIPE))
        with (
            refusing("GetItem", "InternalServerError", service="dynamodb"),
            refusing("DescribeStacks", "AccessDenied", service="cloudformation"),
        ):
            answer = ask(kind)
        if kind == "Delete":
            assert answer["Status"] == "SUCCESS", "it would hold the stack"
        else:
            assert answer["Status"] == "FAILED"
            assert "InternalServerError" in answer["Reason"]

    def test_an_answer_that_does_not_arrive_is_sent_again_and_the_function_fails_at_last(
        self, ask: Ask, cloudformation: CloudFormation, items: RecipeItems, files: dict[str, bytes]
    ) -> None:
        files.update(packed(a=RECIPE))
        cloudformation.faults += [httpx.Response(503), httpx.ConnectTimeout("x")]
        assert ask("Create")["Status"] == "SUCCESS"
        cloudformation.faults += [httpx.Response(503)] * 3
        with pytest.raises(Exception, match="took no answer: HTTP 503") as failed:
            ask("Create")
        assert "amazonaws" not in str(failed.value), "the URL is a secret"
        assert ask("Create")["Status"] == "SUCCESS", "Lambda's next try"
        assert names(items) == ["a"]

    def test_a_rollback_that_comes_before_the_function_s_own_changes_nothing_and_does_not_fail(
        self, ask: Ask, files: dict[str, bytes], items: RecipeItems
    ) -> None:
        files.update(packed(a=RECIPE))
        ask("Create")
        files.update({"bad.json": b"{"})
        answer = ask("Update", ResourceProperties={"Files": ENVIRONMENT["RECIPE_FILES_ARN"] + "0"})
        assert (answer["Status"], names(items)) == ("SUCCESS", ["a"])

    def test_files_are_those_of_the_layer(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "recipe_files").mkdir()
        (tmp_path / "recipe_files/etch.json").write_bytes(b"{}")
        (tmp_path / "recipe_files/README.md").write_bytes(b"#")
        monkeypatch.syspath_prepend(tmp_path)
        assert recipe_files() == {"etch.json": b"{}"}
