"""Recipes as callers see them."""

from typing import Any

from predictions.aws.clients import api_url
from predictions.errors import Problem
from predictions.recipes.store import Recipe


def show_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as a response shows it."""
    return {
        "id": recipe.id,
        "name": recipe.name,
        **recipe.definition,
        "state": recipe.state,
        "deployed": recipe.deployed,
        "created_at": recipe.created_at,
        "updated_at": recipe.updated_at,
        "urls": {"get": recipe_url(recipe)},
    }


def recipe_url(recipe: Recipe) -> str:
    """Return the URL of a recipe."""
    return f"{api_url()}/recipes/{recipe.name}"


def recipe_not_found(name: str) -> Problem:
    """Return the problem of a name that is no recipe of the owner's."""
    return Problem(404, f"There is no recipe {name[:64]!r}.")
