"""Recipe routes of the API: which prediction to run at which event."""

from predictions.api.app import answer_with, body_of, headers_of, json_response, owner_with, resolver
from predictions.api.pagination import page_body, read_cursor
from predictions.api.routing import Response
from predictions.recipes.manage import RecipeChanges, is_name
from predictions.recipes.store import RecipeItems
from predictions.recipes.view import recipe_not_found, recipe_url, show_recipe

PAGE_SIZE = 50

app = resolver()
recipes = RecipeItems.from_env()
recipe_changes = RecipeChanges.from_env()


@app.post("/recipes")
def create() -> Response:
    """`POST /recipes`: 201; 409 if the name is taken."""
    owner = owner_with(app, "manage")
    recipe, _ = recipe_changes.put(owner, body_of(app), headers_of(app).get("content-type"))
    return json_response(201, show_recipe(recipe), {"Location": recipe_url(recipe)})


@app.get("/recipes")
def list_() -> Response:
    """`GET /recipes?cursor=`: up to 50 recipes, newest first."""
    owner = owner_with(app, "manage")
    older, start = read_cursor(app.request.query_value("cursor", ""))
    page, more = recipes.page(owner, start, older=older, size=PAGE_SIZE)
    first, last = (page[0].listed_at, page[-1].listed_at) if page else (None, None)
    results = [show_recipe(recipe) for recipe in page]
    body = page_body("/recipes", start, results, older=older, first=first, beyond=last if more else None)
    return json_response(200, body)


@app.get("/recipes/<name>")
def get(name: str) -> Response:
    """`GET /recipes/{name}`: 404 also for a recipe of another owner."""
    owner = owner_with(app, "manage")
    recipe = recipes.named(owner, name) if is_name(name) else None
    if recipe is None:
        raise recipe_not_found(name)
    return json_response(200, show_recipe(recipe))


@app.put("/recipes/<name>")
def put(name: str) -> Response:
    """`PUT /recipes/{name}`: 201 for a new recipe, 200 for a replaced one."""
    owner = owner_with(app, "manage")
    recipe, new = recipe_changes.put(owner, body_of(app), headers_of(app).get("content-type"), name=name)
    return json_response(201 if new else 200, show_recipe(recipe), {"Location": recipe_url(recipe)})


@app.delete("/recipes/<name>")
def delete(name: str) -> Response:
    """`DELETE /recipes/{name}`: 204; the recipe starts nothing from then on."""
    owner = owner_with(app, "manage")
    if not (is_name(name) and recipe_changes.delete(owner, name)):
        raise recipe_not_found(name)
    return Response(status_code=204, body="")


handler = answer_with(app)
