"""Each job of the console as its users do it, on a desktop and on a phone."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.console.browser import ROOT, SIZES, Stack, Watched

AXE = (ROOT / "console" / "node_modules" / "axe-core" / "axe.min.js").read_text()
RECIPE = {"model": "local/painter", "input": {"prompt": "{{ object.key }}"}}
MARKUP = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"


def ended(stack: Stack, model: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Run a prediction to its end."""
    shown: dict[str, Any] = stack.call("POST", f"/models/{model}/predictions", {"input": asked})
    for _ in range(600):
        if shown["status"] not in ("starting", "processing"):
            return shown
        shown = stack.call("GET", f"/predictions/{shown['id']}")
    raise AssertionError(f"did not end: {shown}")


@pytest.fixture(scope="session")
def picture(stack: Stack) -> dict[str, Any]:
    return ended(stack, "local/painter", {"prompt": "a lighthouse at dusk"})


@pytest.fixture(scope="session")
def failure(stack: Stack) -> dict[str, Any]:
    return ended(stack, "local/crasher", {"message": MARKUP})


@pytest.fixture(scope="session")
def batch(stack: Stack) -> dict[str, Any]:
    made: dict[str, Any] = stack.call(
        "POST", "/batches", {"requests": [{"model": "local/painter", "input": {"prompt": f"{n}"}} for n in range(3)]}
    )
    return made


@pytest.fixture(scope="session")
def pipeline(stack: Stack) -> dict[str, Any]:
    steps = [
        {"name": "paint", "model": "local/painter", "input": {"prompt": "a sea"}},
        {"name": "etch", "model": "local/etcher", "input": {"image": "{{ steps.paint.output }}"}},
    ]
    made: dict[str, Any] = stack.call("POST", "/pipelines", {"steps": steps})
    return made


class TestSignIn:
    def test_token_that_is_not_valid_is_refused_with_the_reason(self, open_page: Callable[..., Watched]) -> None:
        watched = open_page(signed_in=False)
        watched.open()
        watched.page.get_by_label("Access token").fill("rs_wrong")
        watched.page.get_by_role("button", name="Sign in").click()
        expect(watched.page.get_by_role("alert")).to_contain_text("token")
        assert watched.page.evaluate("sessionStorage.length") == 0
        watched.forgive("401")

    def test_token_is_in_this_tab_only_and_gone_after_signing_out(self, open_page: Callable[..., Watched]) -> None:
        watched = open_page()
        page = watched.page
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.reload()
        expect(page.get_by_role("heading", name="Gallery")).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("Access token")).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0


class TestGallery:
    def test_newest_outputs_are_pictures_that_lead_to_their_predictions(
        self, sized: Watched, picture: dict[str, Any]
    ) -> None:
        sized.open("#/predictions?status=succeeded&model=local%2Fpainter")
        shown = sized.page.locator(f'a[href="#/predictions/{picture["id"]}"]')
        expect(shown).to_be_visible()
        assert loaded(sized.page, f'a[href="#/predictions/{picture["id"]}"] img')
        sized.keep("gallery")
        shown.click()
        expect(sized.page.get_by_role("heading", name="Prediction")).to_be_visible()

    def test_filter_by_status_leaves_the_others_out_and_is_part_of_the_address(
        self, sized: Watched, picture: dict[str, Any], failure: dict[str, Any]
    ) -> None:
        page = sized.page
        page.get_by_label("Status").select_option("failed")
        expect(page).to_have_url(re.compile("status=failed"))
        expect(page.locator(f'a[href="#/predictions/{failure["id"]}"]')).to_be_visible()
        expect(page.locator(f'a[href="#/predictions/{picture["id"]}"]')).to_have_count(0)

    def test_list_is_endless(self, open_page: Callable[..., Watched], stack: Stack) -> None:
        for n in range(2):
            ended(stack, "local/painter", {"prompt": f"page {n}"})
        watched = open_page(signed_in=False)
        pages: list[str] = []

        def cut(route: Any) -> None:
            # A page of one: the API's own is a hundred.
            answer = route.fetch()
            body = answer.json()
            if "cursor" not in route.request.url:
                pages.append(route.request.url)
                body = body | {"results": body["results"][:1], "next": f"{stack.api_url}/predictions?cursor="}
            route.fulfill(response=answer, json=body)

        watched.page.route(re.compile(r"/v1/predictions(\?|$)"), cut)
        watched.sign_in()
        expect(watched.page.locator(".tile").nth(1)).to_be_visible()
        assert pages


class TestPrediction:
    def test_page_has_output_file_cost_timeline_input_and_logs(self, sized: Watched, picture: dict[str, Any]) -> None:
        page = sized.page
        sized.open(f"#/predictions/{picture['id']}")
        expect(page.get_by_role("img", name="Output of local/painter")).to_be_visible()
        assert loaded(page, "main img")
        (file,) = picture["output_files"]
        expect(page.get_by_role("cell", name=file["key"])).to_be_visible()
        expect(page.locator(f'code[title="{file["sha256"]}"]')).to_be_visible()
        expect(page.get_by_role("list", name="Timeline")).to_contain_text("Completed")
        expect(page.get_by_text("No price of local/painter is known.")).to_be_visible()
        expect(page.locator("pre", has_text="a lighthouse at dusk")).to_be_visible()
        expect(page.locator("pre.logs")).to_contain_text("Painting")
        sized.keep("prediction")

    def test_data_is_deleted_after_a_question(self, sized: Watched, stack: Stack) -> None:
        made = ended(stack, "local/painter", {"prompt": "to be deleted"})
        page = sized.page
        sized.open(f"#/predictions/{made['id']}")
        page.get_by_role("button", name="Delete").click()
        assert not stack.call("GET", f"/predictions/{made['id']}")["data_removed"]
        page.get_by_role("button", name="Yes").click()
        expect(page.get_by_text("were deleted")).to_be_visible()
        assert stack.call("GET", f"/predictions/{made['id']}")["data_removed"]

    def test_open_one_is_live_and_is_canceled(self, open_page: Callable[..., Watched], stack: Stack) -> None:
        started = stack.call("POST", "/models/local/sleeper/predictions", {"input": {"seconds": 120}})
        watched = open_page()
        watched.open(f"#/predictions/{started['id']}")
        watched.page.get_by_role("button", name="Cancel").click()
        expect(watched.page.locator(".status.canceled")).to_be_visible()

    def test_markup_of_a_model_is_text(self, sized: Watched, failure: dict[str, Any]) -> None:
        for route in ("", f"#/predictions/{failure['id']}", f"#/run?from={failure['id']}"):
            sized.open(route)
            expect(sized.page.locator("main")).to_contain_text("onerror")
            assert sized.page.locator("main img[src='x']").count() == 0
            assert "hacked" not in sized.page.title()

    def test_unknown_one_is_said_to_be_unknown(self, open_page: Callable[..., Watched]) -> None:
        watched = open_page()
        watched.open("#/predictions/%3Cscript%3E")
        expect(watched.page.get_by_role("alert")).to_contain_text("not found")
        watched.forgive("404")


class TestPlayground:
    def test_model_runs_by_a_form_of_its_own_schema(self, sized: Watched) -> None:
        page = sized.page
        sized.open("#/run")
        page.get_by_label("Model").fill("local/painter")
        page.get_by_role("button", name="Open").click()
        page.get_by_label("Prompt").fill("a desert at night")
        page.get_by_label("Aspect Ratio").select_option("1:1")
        page.get_by_role("button", name="Run", exact=True).click()
        expect(page.locator(".runs .status.succeeded")).to_be_visible()
        assert loaded(page, ".runs img")
        page.get_by_label("Prompt").fill("a sea at dawn")
        page.get_by_role("button", name="Run", exact=True).click()
        expect(page.locator(".runs .status.succeeded")).to_have_count(2)
        page.get_by_text("The same call as code").click()
        expect(page.locator("details pre")).to_contain_text("a sea at dawn")
        page.get_by_role("button", name="Python").click()
        expect(page.locator("details pre")).to_contain_text("replicate.Client")
        sized.keep("run")

    def test_value_out_of_range_is_told_at_its_field_before_anything_starts(
        self, open_page: Callable[..., Watched]
    ) -> None:
        watched = open_page()
        page = watched.page
        watched.open("#/run?model=local/painter")
        page.get_by_label("Seed").fill("-1")
        page.get_by_role("button", name="Run", exact=True).click()
        expect(page.locator(".field strong.error").first).to_be_visible()
        expect(page.get_by_text("Has to be at least 0 (got -1).").first).to_be_visible()
        assert page.locator(".runs article").count() == 0

    def test_file_that_is_chosen_is_uploaded_and_used(
        self, open_page: Callable[..., Watched], tmp_path: Path, stack: Stack, picture: dict[str, Any]
    ) -> None:
        watched = open_page()
        page = watched.page
        content = page.request.get(picture["output"]).body()
        (tmp_path / "picture.png").write_bytes(content)
        watched.open("#/run?model=local/etcher")
        page.locator("input[type=file]").set_input_files(tmp_path / "picture.png")
        expect(page.locator(".drop input[type=text]")).to_have_value(re.compile("^http"))
        page.get_by_role("button", name="Run", exact=True).click()
        expect(page.locator(".runs .status.succeeded")).to_be_visible()

    def test_run_again_begins_with_the_same_input(
        self, open_page: Callable[..., Watched], picture: dict[str, Any]
    ) -> None:
        watched = open_page()
        watched.open(f"#/predictions/{picture['id']}")
        watched.page.get_by_role("button", name="Run again").click()
        expect(watched.page.get_by_label("Prompt")).to_have_value("a lighthouse at dusk")


class TestWork:
    def test_batch_shows_how_far_it_is(self, sized: Watched, batch: dict[str, Any]) -> None:
        page = sized.page
        page.get_by_role("link", name="Batches").click()
        page.locator(f'a[href="#/batches/{batch["id"]}"]').click()
        expect(page.get_by_role("button", name="Download results")).to_be_visible(timeout=60_000)
        expect(page.locator("main")).to_contain_text("3 succeeded")
        sized.keep("batch")

    def test_pipeline_is_a_graph_with_the_outputs_of_its_steps(self, sized: Watched, pipeline: dict[str, Any]) -> None:
        page = sized.page
        page.get_by_role("link", name="Pipelines").click()
        page.locator(f'a[href="#/pipelines/{pipeline["id"]}"]').click()
        expect(page.locator("svg.graph text")).to_have_text(["paint", "etch"])
        expect(page.locator("svg.graph .succeeded")).to_have_count(2, timeout=60_000)
        sized.keep("pipeline")

    def test_recipe_is_made_changed_and_deleted(self, sized: Watched, stack: Stack) -> None:
        page = sized.page
        page.get_by_role("link", name="Recipes").click()
        page.get_by_role("link", name="New recipe").click()
        page.get_by_label("Name").fill("shots")
        definition = page.get_by_label("Definition")
        definition.fill(json.dumps({**RECIPE, "s3": {"prefix": "shots/"}}))
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("heading", name="Recipes")).to_be_visible()
        page.get_by_role("link", name=re.compile("shots")).click()
        definition.fill(json.dumps({**RECIPE, "s3": {"prefix": "sea/"}}))
        sized.keep("recipe")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("heading", name="Recipes")).to_be_visible()
        assert stack.call("GET", "/recipes/shots")["s3"] == {"prefix": "sea/"}
        page.get_by_role("link", name=re.compile("shots")).click()
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("button", name="Yes").click()
        expect(page.get_by_text("No recipe yet.")).to_be_visible()


ROUTES = (
    "", "#/run", "#/run?model=local/painter", "#/batches", "#/pipelines", "#/recipes", "#/recipes/new", "#/nowhere",
)  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing_on_any_page(
    open_page: Callable[..., Watched], scheme: str, size: str, picture: dict[str, Any], batch: dict[str, Any],
    pipeline: dict[str, Any], failure: dict[str, Any],
) -> None:  # fmt: skip
    watched = open_page(signed_in=False, viewport=SIZES[size], color_scheme=scheme)
    watched.open()
    expect(watched.page.get_by_role("heading", name="Sign in")).to_be_visible()
    check(watched, "sign-in")
    watched.sign_in()
    own = [f"#/predictions/{each['id']}" for each in (picture, failure)]
    for route in (*ROUTES, *own, f"#/batches/{batch['id']}", f"#/pipelines/{pipeline['id']}"):
        watched.open(route)
        expect(watched.page.locator("main h1")).to_be_visible()
        expect(watched.page.locator("main [aria-busy=true]")).to_have_count(0)
        check(watched, route)


def check(watched: Watched, route: str) -> None:
    page = watched.page
    page.evaluate(AXE)
    found = page.evaluate("axe.run({resultTypes: ['violations']})")
    violations = [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found["violations"]]
    assert violations == [], route
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"{route} is {wide} px wider than the screen"


def test_all_is_reached_by_keyboard(open_page: Callable[..., Watched]) -> None:
    watched = open_page(signed_in=False)
    page = watched.page
    watched.open()
    page.get_by_label("Access token").focus()
    page.keyboard.insert_text(watched.stack.token)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Gallery")).to_be_focused()
    page.get_by_role("link", name="Run", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Run a model")).to_be_focused()


def loaded(page: Page, selector: str) -> bool:
    """Whether a picture was decoded: a broken one has no width."""
    image = page.locator(selector).first
    expect(image).to_be_visible()
    image.evaluate("image => image.decode()")
    return bool(image.evaluate("image => image.naturalWidth > 0"))
