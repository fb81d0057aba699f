"""What a recipe means today: its own model in production, if it goes on from that, and whether there is anything new to learn."""

from __future__ import annotations

from pipelines import promotion
from pipelines.artifacts import Store
from pipelines.recipe import Recipe

REGISTRY = "registry"
"""As `eval.production`: the recipe's own model in production."""


def as_of_today(recipe: Recipe, store: Store) -> Recipe:
    """The recipe with folders in place of what it says about production; stages see nothing else."""
    if recipe.eval.production != REGISTRY:
        return recipe
    version = promotion.production(store, promotion.model_name(recipe))
    found = str(promotion.folder(store, version) / "model") if version else None
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"production": found})})
