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
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
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


@app.command
def merge(
    base: Path,
    *folders: Path,
    weight: Annotated[tuple[float, ...], Parameter(negative=())] = (),
    dtype: DType | None = None,
    max_shard_size: ShardSize = "5GB",
    quantized_base: Literal["auto", "nf4", "none"] = "auto",
) -> None:
    """Adapters in peft's form become part of their model: BASE ADAPTER [ADAPTER ...] TARGET.

    Parameters
    ----------
    base
        Folder of the model.
    folders
        The adapters, and last the folder to be made.
    weight
        What the change that an adapter makes is multiplied with, one for each adapter in their order; 1 if not given.
    dtype
        Type of the weights; without it each is stored as the base has it.
    quantized_base
        nf4: the base is quantized to 4 bits and de-quantized again first, as an adapter of method qlora saw it; auto: for such adapters.
    """
    from xtuner_core.export.merge import merge

    if len(folders) < 2:
        raise RecipeError("convert merge takes the model's folder, one adapter or more, and the folder to be made.")
    *adapters, target = folders
    if weight and len(weight) != len(adapters):
        raise RecipeError(f"convert merge: {len(weight)} --weight for {len(adapters)} adapters; give one for each, or none.")
    merge(
        base,
        list(zip(adapters, weight or [1.0] * len(adapters), strict=True)),
        target,
        _torch_dtype(dtype),
        max_shard_size,
        quantized_base,
        print,
    )
    print(target)


@app.command
def adapter(source: Path, target: Path, *, base: Path | None = None) -> None:
    """What a LoRA, DoRA or QLoRA run of the engine trained → adapter in peft's form.

    Parameters
    ----------
    source
        The run's work directory, or one of its checkpoints.
    target
        The folder to be made.
    base
        Folder of the model that was trained, if it is not where the run found it.
    """
    from xtuner_core.export.run import open_trained, write_adapter

    write_adapter(open_trained(source, base), target)
    print(target)


@app.command(name=("to_hf", "to-hf"))
def to_hf(
    source: Path,
    target: Path,
    *,
    base: Path | None = None,
    merge: bool = False,
    dtype: DType | None = None,
    max_shard_size: ShardSize = "5GB",
) -> None:
    """What a run of the engine trained → Hugging Face folder; of LoRA, DoRA and QLoRA the adapter, or with --merge the whole model.

    Parameters
    ----------
    source
        The run's work directory, or one of its checkpoints.
    target
        The folder to be made.
    base
        Folder of the model that was trained, if it is not where the run found it.
    merge
        Make the adapter part of the model.
    dtype
        Type of the weights; without it each is stored as the base has it.
    """
    from xtuner_core.export.run import open_trained, write_adapter, write_model

    trained = open_trained(source, base)
    if trained.save_adapter and not merge:
        write_adapter(trained, target)
    else:
        write_model(trained, target, _torch_dtype(dtype), max_shard_size, print)
    print(target)


@app.command(name=("to_gguf", "to-gguf"))
def to_gguf(source: Path, target: Path, *, type: GgufType = "bf16") -> None:
    """A Hugging Face folder → a GGUF file, for llama.cpp and what is built on it.

    Parameters
    ----------
    source
        Model folder.
    target
        The .gguf file to be made.
    type
        Type of the matrices.
    """
    from xtuner_core.export.gguf import export_gguf

    export_gguf(source, target, type)
    print(target)


@app.command(name=("from_gguf", "from-gguf"))
def from_gguf(source: Path, target: Path, *, dtype: DType = "bfloat16") -> None:
    """A GGUF file → Hugging Face folder, its weights de-quantized.

    Parameters
    ----------
    source
        The .gguf file.
    target
        The folder to be made.
    dtype
        Type of the weights.
    """
    from xtuner_core.durable import drafted
    from xtuner_core.models.gguf import import_gguf

    if not source.is_file():
        raise RecipeError(f"{source}: there is no such file.")
    with drafted(target) as draft:
        import_gguf(source, draft, dtype)
    print(target)
