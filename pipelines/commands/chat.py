"""`xtuner chat`: the stage, given a recipe; a conversation in the terminal, given a model folder."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.types import NonNegativeFloat, PositiveInt
from cyclopts.validators import Number

from pipelines.commands.recipe_options import DEFAULT_STORE, STAGES, Overrides, StoreDir, run_stage
from xtuner_core.errors import DataError, RecipeError

app = App(name="chat", group=STAGES)


@Parameter(name="*", show=False)
@dataclass(frozen=True, slots=True)
class Old:
    """Options of XTuner's old chat that have no meaning here; each is answered with what to do instead."""

    bits: str | None = None
    torch_dtype: str | None = None
    top_k: str | None = None
    no_streamer: Annotated[bool, Parameter(negative=())] = False
    lagent: Annotated[bool, Parameter(negative=())] = False
    with_plugins: str | None = None
    llava: str | None = None
    image: str | None = None


_INSTEAD = {
    "bits": "models are served in the precision of their weights; for a quantized one start a server that can, and give --url",
    "torch_dtype": "models are served in the precision of their weights; convert.dtype of the recipe decides it",
    "top_k": "the chat protocol has no such field; use --top-p, or write top_k into the model's generation_config.json",
    "no_streamer": "answers always come as a stream",
    "lagent": "this chat runs no tools",
    "with_plugins": "this chat runs no tools",
    "llava": "this chat is about text",
    "image": "this chat is about text",
}


@app.default
def chat(
    target: Annotated[
        str,
        Parameter(
            help="A recipe (runs the smoke test); or a model folder, a convert artifact, NAME@NUMBER or NAME@production (talk to it)."
        ),
    ] = "",
    *,
    overrides: Overrides = None,
    store: StoreDir = DEFAULT_STORE,
    adapter: Path | None = None,
    system: str | None = None,
    prompt_template: str | None = None,
    chatter: str = "auto",
    url: str | None = None,
    max_tokens: Annotated[PositiveInt, Parameter(name=["--max-tokens", "--max-new-tokens"])] = 512,
    temperature: NonNegativeFloat = 0.0,
    top_p: Annotated[float | None, Parameter(validator=Number(gt=0, lte=1))] = None,
    seed: int | None = None,
    old: Old | None = None,
) -> None:
    """Smoke-test a recipe's exported model (exit code 65 if it fails); or, given a model folder, talk to it in the terminal (/help there).

    Parameters
    ----------
    adapter
        Folder of an adapter, merged into the model for the conversation.
    system
        System prompt.
    prompt_template
        Chat template (a name of xtuner_core/data/templates, or an old one such as internlm2_chat) instead of the model's own.
    chatter
        How the model is served: auto, or a module of pipelines/chatters.
    url
        Talk to the OpenAI server at this address, such as http://127.0.0.1:8000/v1#MODEL; TARGET is not needed then.
    max_tokens
        Longest answer.
    temperature
        0 is greedy.
    top_p
        Sample among the likeliest tokens with this much probability together.
    seed
        Of the sampling.
    """
    _refuse(old)
    if not target and not url:
        raise RecipeError("name a recipe, a model folder, or with --url a server.")
    from pipelines.served_model import named_model
    from pipelines.terminal.conversation import Options, converse

    options = Options(system, adapter, prompt_template, chatter, url, max_tokens, temperature, top_p, seed)
    model = named_model(target, store)
    if model.is_dir() or not target:
        if overrides or (store != DEFAULT_STORE and model == Path(target)):
            raise RecipeError("--set and --store are for the smoke test of a recipe; this is a conversation with a model.")
        converse(model, options)
        return
    if given := [item.name.replace("_", "-") for item in fields(Options) if getattr(options, item.name) != item.default]:
        raise RecipeError(
            f"--{', --'.join(given)}: for a conversation with a model, and there is no folder {target}. A recipe has its section chat."
        )
    _require_recipe(target)
    figures = run_stage("chat", target, overrides, store)
    if not figures["ok"]:
        raise DataError(f"the chat test failed: {'; '.join(figures['why'])}. What was made is kept.")


def _require_recipe(target: str) -> None:
    from pipelines.recipe import recipe_file

    try:
        recipe_file(target)
    except RecipeError as error:
        raise RecipeError(f"{error} Nor is there a model folder {target}.") from None


def _refuse(old: Old | None) -> None:
    given = [item.name for item in fields(Old) if old and getattr(old, item.name)]
    if given:
        raise RecipeError("\n".join(f"--{name.replace('_', '-')}: {_INSTEAD[name]}." for name in given))
