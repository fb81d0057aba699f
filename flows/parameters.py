"""What `finetune-flow` can be asked for: types whose JSON schema is the form in the Prefect UI and the server's check.

(Titles and descriptions of the parameters themselves are the flow's docstring: Prefect looks nowhere else.)
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipelines.recipe import Recipe, shipped_names

DEMO = "smollm2_135m_instruct_lora_tickets_e3"
"""What runs when nothing else is asked for."""

ShippedName = Annotated[str, Field(title="A shipped recipe", json_schema_extra={"enum": list(shipped_names())})]
RecipeFile = Annotated[str, Field(title="A recipe's file", min_length=1)]
WholeRecipe = Annotated[Recipe, Field(title="The whole recipe")]
AskedRecipe = ShippedName | RecipeFile | WholeRecipe
Trigger = Literal["hand", "schedule", "new-data"]
