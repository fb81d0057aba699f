"""How a run is found again in the Prefect UI: its name and its tags."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from pipelines.model_registry import model_name
from pipelines.recipe import Recipe


def run_name() -> str:
    """Recipe, trigger and time; the name of a flow run."""
    asked = flow_run.parameters
    return f"{_called(asked['recipe'])} · {asked['trigger']} · {datetime.now():%Y-%m-%d %H:%M}"


def _called(recipe: Any) -> str:
    return Path(recipe).name.removesuffix(".yaml") if isinstance(recipe, str) else getattr(recipe, "name", None) or recipe["name"]


def label(recipe: Recipe, trigger: str) -> None:
    """Tag the flow run with recipe, model and trigger, beside the tags it has."""
    tags = {*flow_run.tags, f"recipe:{recipe.name}", f"model:{model_name(recipe)}", f"trigger:{trigger}"}
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, tags=sorted(tags))
