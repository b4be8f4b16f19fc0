"""Recipe routes of the API: owners write down what is to be run at which event."""

from typing import Any

from aws_lambda_powertools.event_handler import Response
from predictions.api.app import answer_with, body_of, headers_of, json_response, owner_with, resolver
from predictions.api.pagination import page_body, read_cursor
from predictions.aws.clients import api_url
from predictions.errors import Problem
from predictions.recipes.manage import RecipeChanges, is_name
from predictions.recipes.store import Recipe, RecipeItems

PAGE_SIZE = 50

app = resolver()
recipes = RecipeItems.from_env()
recipe_changes = RecipeChanges.from_env()


@app.post("/recipes")
def create() -> Response[str]:
    """`POST /recipes`: 201; 409 where the name is taken."""
    owner = owner_with(app, "manage")
    recipe, _ = recipe_changes.put(owner, body_of(app), headers_of(app).get("content-type"))
    return json_response(201, _show(recipe), {"Location": _url(recipe)})


@app.get("/recipes")
def list_() -> Response[str]:
    """`GET /recipes?cursor=`: up to 50 recipes, newest first."""
    owner = owner_with(app, "manage")
    older, start = read_cursor(app.current_event.get_query_string_value("cursor", ""))
    page, more = recipes.page(owner, start, older=older, size=PAGE_SIZE)
    first, last = (page[0].listed_at, page[-1].listed_at) if page else (None, None)
    results = [_show(recipe) for recipe in page]
    body = page_body("/recipes", start, results, older=older, first=first, beyond=last if more else None)
    return json_response(200, body)


@app.get("/recipes/<name>")
def get(name: str) -> Response[str]:
    """`GET /recipes/{name}`: 404 also for another owner's."""
    owner = owner_with(app, "manage")
    recipe = recipes.named(owner, name) if is_name(name) else None
    if recipe is None:
        raise _not_found(name)
    return json_response(200, _show(recipe))


@app.put("/recipes/<name>")
def put(name: str) -> Response[str]:
    """`PUT /recipes/{name}`: 201 for a new one, 200 for one that is replaced."""
    owner = owner_with(app, "manage")
    recipe, new = recipe_changes.put(owner, body_of(app), headers_of(app).get("content-type"), name=name)
    return json_response(201 if new else 200, _show(recipe), {"Location": _url(recipe)})


@app.delete("/recipes/<name>")
def delete(name: str) -> Response[str]:
    """`DELETE /recipes/{name}`: 204; it starts nothing from then on."""
    owner = owner_with(app, "manage")
    if not (is_name(name) and recipe_changes.delete(owner, name)):
        raise _not_found(name)
    return Response(status_code=204, body="")


def _show(recipe: Recipe) -> dict[str, Any]:
    return {
        "id": recipe.id,
        "name": recipe.name,
        **recipe.definition,
        "state": recipe.state,
        "deployed": recipe.deployed,
        "created_at": recipe.created_at,
        "updated_at": recipe.updated_at,
        "urls": {"get": _url(recipe)},
    }


def _url(recipe: Recipe) -> str:
    return f"{api_url()}/recipes/{recipe.name}"


def _not_found(name: str) -> Problem:
    return Problem(404, f"There is no recipe {name[:64]!r}.")


handler = answer_with(app)
