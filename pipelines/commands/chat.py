"""`xtuner chat`: the stage, given a recipe; a conversation in the terminal, given a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pipelines.commands.recipe_options import DEFAULT_STORE, STAGES, Overrides, StoreDir, run_stage

app = App(name="chat", group=STAGES)


@app.default
def chat(
    target: Annotated[str, Parameter(help="A recipe (runs the smoke test), or a model folder (talk to it).")],
    *,
    overrides: Overrides = None,
    store: StoreDir = DEFAULT_STORE,
    system: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
) -> None:
    """Ask the exported model held-out questions; or, given a model folder, talk to it in the terminal."""
    if Path(target).is_dir():
        from pipelines.terminal_chat import converse

        converse(Path(target), system, max_tokens, temperature)
    else:
        run_stage("chat", target, overrides, store)
