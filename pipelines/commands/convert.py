"""`xtuner convert`: the stage, given a recipe; or one of the conversions between forms of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from pipelines.commands.recipe_options import DEFAULT_STORE, STAGES, Overrides, RecipeName, StoreDir, run_stage
from xtuner_core.errors import RecipeError

if TYPE_CHECKING:
    import torch

DType = Literal["float32", "bfloat16", "float16"]
ShardSize = Annotated[str, Parameter(help="Weights are cut into files of at most this size.")]

app = App(name="convert", group=STAGES, help="Trained weights → adapter and merged Hugging Face folder, verified; and other conversions.")


@app.default
def convert(recipe: RecipeName, *, overrides: Overrides = None, store: StoreDir = DEFAULT_STORE) -> None:
    """Trained weights → adapter and merged Hugging Face folder, verified."""
    run_stage("convert", recipe, overrides, store)


def _torch_dtype(name: DType | None) -> torch.dtype | None:
    import torch

    return getattr(torch, name) if name else None


@app.command(name=("pth_to_hf", "pth-to-hf"))
def pth_to_hf(
    source: Path,
    target: Path,
    output: Annotated[Path | None, Parameter(show=False)] = None,
    /,
    *,
    base: str | None = None,
    alpha: int | None = None,
    dtype: DType | None = None,
    max_shard_size: ShardSize = "5GB",
) -> None:
    """A .pth file or DeepSpeed folder of another trainer → Hugging Face folder, or adapter in peft's format.

    Parameters
    ----------
    source
        The checkpoint. No code in it is run.
    target
        The folder to be made.
    base
        Folder of the model that was trained; for an adapter a name will do, or what the file says.
    alpha
        LoRA's alpha, if the file does not say it.
    dtype
        Type of the weights; without it a model's are stored as the base's, an adapter's as they are.
    """
    from xtuner_core.export.pth import convert_pth

    if output:
        raise RecipeError(
            f"pth_to_hf takes the checkpoint and the folder to be made, no config: "
            f"xtuner convert pth_to_hf {target} {output} --base FOLDER_OF_THE_TRAINED_MODEL"
        )
    convert_pth(source, target, base, alpha, _torch_dtype(dtype), max_shard_size, print)
    print(target)


@app.command(name=("internlm2_to_llama", "internlm2-to-llama"))
def internlm2_to_llama(source: Path, target: Path, *, base: Path | None = None, max_shard_size: ShardSize = "5GB") -> None:
    """An InternLM2 folder (fused wqkv), or an adapter of one → the llama form, which needs no code of its own.

    Parameters
    ----------
    source
        Model folder or adapter folder.
    target
        The folder to be made.
    base
        For an adapter, the folder of its model.
    """
    from xtuner_core.export.internlm2 import to_llama

    to_llama(source, target, max_shard_size, base)
    print(target)


@app.command(name=("llama_to_internlm2", "llama-to-internlm2"))
def llama_to_internlm2(source: Path, target: Path, *, max_shard_size: ShardSize = "5GB") -> None:
    """A llama folder → InternLM2's form; whoever reads it needs the Python files that InternLM publishes beside its weights.

    Parameters
    ----------
    source
        Model folder.
    target
        The folder to be made.
    """
    from xtuner_core.export.internlm2 import from_llama

    from_llama(source, target, max_shard_size)
    print(target)
