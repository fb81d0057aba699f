"""`xtuner convert`: the stage, given a recipe; or one of the conversions between forms of a model."""

from __future__ import annotations

from cyclopts import App

from pipelines.commands.recipe_options import DEFAULT_STORE, STAGES, Overrides, RecipeName, StoreDir, run_stage

app = App(name="convert", group=STAGES, help="Trained weights → adapter and merged Hugging Face folder, verified; and other conversions.")


@app.default
def convert(recipe: RecipeName, *, overrides: Overrides = None, store: StoreDir = DEFAULT_STORE) -> None:
    """Trained weights → adapter and merged Hugging Face folder, verified."""
    run_stage("convert", recipe, overrides, store)
