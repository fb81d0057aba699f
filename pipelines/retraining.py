"""What a recipe means today: its own model in production, if it goes on from that, and whether there is anything new to learn."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines import promotion
from pipelines.artifacts import Store
from pipelines.recipe import Recipe, changed, load_recipe

REGISTRY = "registry"
"""As `eval.production`: the recipe's own model in production."""


def recipe_of_today(recipe: str | Recipe, changes: Sequence[str] | None, store: Store) -> Recipe:
    """What every command and the flow begin with: the recipe that is meant (a shipped name, a file or the whole), as it is today.

    Raises:
        RecipeError: it is not there, not readable, or a change does not fit it.
    """
    asked = load_recipe(recipe, changes or []) if isinstance(recipe, str) else changed(recipe, changes or [])
    return as_of_today(asked, store)


def as_of_today(recipe: Recipe, store: Store) -> Recipe:
    """The recipe with folders in place of what it says about production; stages see nothing else."""
    if recipe.eval.production != REGISTRY:
        return recipe
    version = promotion.production(store, promotion.model_name(recipe))
    found = str(promotion.folder(store, version) / "model") if version else None
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"production": found})})
