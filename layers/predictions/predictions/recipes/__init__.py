"""Recipes: named templates of requests that events start."""
