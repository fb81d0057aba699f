"""What every command that takes a recipe shares: its arguments, and running stages up to one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

STAGES = Group("One stage (and what it needs), without Prefect")
RecipeName = Annotated[str, Parameter(help="A shipped recipe's name (see list-cfg), or a YAML file.")]
Overrides = Annotated[list[str] | None, Parameter(name="--set", negative=(), help="Change a field, e.g. train.total_step=20; repeatable.")]
StoreDir = Annotated[Path, Parameter(help="Artifact store.")]
DEFAULT_STORE = Path("artifacts")


def run_stage(name: str, recipe: str, overrides: list[str] | None, store: Path) -> Mapping[str, Any]:
    """Make a stage's artifact, and what it needs, and print its figures; returns them."""
    from pipelines.artifacts import Store
    from pipelines.retraining import recipe_of_today
    from pipelines.runner import run_until

    result = run_until(name, recipe_of_today(recipe, overrides, Store(store)), Store(store), lambda message: print(message, flush=True))
    for field, value in result.artifact.metrics.items():
        if isinstance(value, (int, float, str)):
            print(f"  {field}: {value}")
    return result.artifact.metrics
