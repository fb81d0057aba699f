"""Stage `production`: the model in use today becomes `payload/model`, to be judged beside the tuned one.

Only in the run of a recipe with `eval.production`, which may name the exported folder of an earlier run or any other model folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.base_model import describe, folder_files, give_known_form, is_completed, take_folder
from pipelines.recipe import Recipe, resolve_path
from pipelines.stage import Metrics, Stage, Work
from xtuner_core.checkpoint.hf import complaint
from xtuner_core.errors import RecipeError


def run(recipe: Recipe, work: Work) -> Metrics:
    """Link the folder.

    Raises:
        RecipeError: it is no complete model.
        DataError: its weights are damaged, not finite, or not those of its config.
    """
    from xtuner_core.models.check import require_usable

    folder = work.payload / "model"
    folder.mkdir()
    take_folder(_folder(recipe), folder)
    give_known_form(folder, work)
    require_usable(folder)
    return describe(folder)


def files(recipe: Recipe) -> list[Path]:
    """Its weights and texts."""
    return folder_files(_folder(recipe))


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Names only: `files` stands for the content, and the folder's place decides nothing."""
    return {"files": [file.name for file in files(recipe)]}


def _folder(recipe: Recipe) -> Path:
    folder = resolve_path(recipe.eval.production or "")
    if not folder.is_dir():
        raise RecipeError(f"eval.production: {recipe.eval.production}: no such folder. Name the folder of a complete model.")
    if (wrong := complaint(folder)) and not is_completed(folder):
        raise RecipeError(f"eval.production: {recipe.eval.production} {wrong}")
    return folder


STAGE = Stage(name="production", version=1, run=run, settings=_settings, files=files, libraries=("safetensors",))
