"""What the engine can be told, as one frozen pydantic tree; a recipe's `data` and `train` sections are these classes.

No torch import here: `xtuner plan` and the Prefect form read this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator

from xtuner_core.registry import Word

_ALTERNATIVES = {"null": "not set", "string": "text", "integer": "number", "array": "list"}


class Config(BaseModel):
    """Base of every section: immutable, and an unknown field is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, model_title_generator=lambda kind: kind.__name__.removesuffix("Config")
    )

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """With a word for each alternative of a field: a form shows them side by side."""
        schema = handler(core)
        for field in handler.resolve_ref_schema(schema).get("properties", {}).values():
            for alternative in field.get("anyOf", ()):
                if "type" in alternative:
                    alternative.setdefault("title", _ALTERNATIVES.get(alternative["type"], alternative["type"]))
        return schema


def _split_paths(value: Any) -> Any:
    """`a.jsonl` or `a.jsonl,b.jsonl` from the command line means a list of paths."""
    if isinstance(value, str):
        return [value] if Path(value).exists() else [part.strip() for part in value.split(",")]
    return value


Paths = Annotated[tuple[str, ...], BeforeValidator(_split_paths)]


def _split_names(value: Any) -> Any:
    """`q_proj` or `q_proj,v_proj` from the command line means a list of names."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_split_names)]


def _one_or_more(value: Any) -> Any:
    """One value stands for a list of it."""
    return (value,) if isinstance(value, str | int | float) else value


Steps = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_one_or_more)]


def _texts(value: Any) -> Any:
    """One text or several; on the command line a text may look like a number."""
    parts = _one_or_more(value)
    return tuple(str(part) if isinstance(part, int | float) else part for part in parts) if isinstance(parts, (list, tuple)) else parts


PROMPT_FILES = (".txt", ".jsonl")
"""A prompt that ends so names a file."""
Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_texts)]


Format = Annotated[str, Word("xtuner_core/data/formats", ("auto",))]


class Source(Config):
    """Some input files, and how much of them is used."""

    path: str = Field(
        min_length=1, description="A file (.jsonl, .json, .parquet, .csv, each also .gz or .zst), a folder, a glob or a data set folder."
    )
    format: Format | None = Field(default=None, description="Input format, a module of xtuner_core/data/formats; data.format if not given.")
    sample_ratio: float = Field(default=1.0, gt=0, description="2 uses every sample twice an epoch, 0.5 a random half of them.")
    draw: int = Field(default=0, ge=0, description="Another number takes another random half.")


def _sources(value: Any) -> Any:
    """A plain path stands for a source with nothing else said."""
    if isinstance(value, dict):
        return [value]
    parts = _split_paths(value)
    return [{"path": part} if isinstance(part, str) else part for part in parts] if isinstance(parts, (list, tuple)) else parts


Sources = Annotated[tuple[Source, ...], BeforeValidator(_sources), Field(min_length=1)]


class DataConfig(Config):
    """Which conversations are trained on, and how they become packed token sequences."""

    train: Sources = Field(description="Training data: a path, or several, each plain or with its own format and sample_ratio.")
    validation: Annotated[float, Field(ge=0, lt=1)] | Paths = Field(
        default=0.0, description="Share of the samples that is kept back for the validation loss, or files of their own."
    )
    format: Format = Field(default="auto", description="Input format, a module of xtuner_core/data/formats; auto looks at the first lines.")
    loss: Literal["all", "last"] = Field(default="all", description="Learn every assistant turn, or only the last of a conversation.")
    thinking: Literal["keep", "drop"] = Field(
        default="keep", description="Thinking before an answer: as the model's own template shows it, or never."
    )
    max_length: int = Field(default=2048, ge=8, description="Longest document in tokens; plain text is cut into chunks of this length.")
    too_long: Literal["reject", "drop", "cut_turns", "cut_tokens"] = Field(
        default="reject",
        description="A conversation over max_length: an error, left out and counted, cut after its last whole turn that fits, or cut "
        "at max_length. A cut that leaves nothing to learn rejects it.",
    )
    packing: Annotated[str, Word("xtuner_core/data/packing")] = Field(
        default="best_fit", description="How documents fill packs, a module of xtuner_core/data/packing."
    )
    pack_length: int = Field(default=2048, ge=8, description="Length of one packed training sequence, in tokens.")
    order: Literal["shuffled", "length_grouped"] = Field(
        default="shuffled", description="Order of the packs in an epoch: random, or random with packs of equal cost in one step."
    )
    max_rejected: float = Field(default=0.0, ge=0, le=1, description="Share of the lines that may be rejected before the stage fails.")
    workers: int | None = Field(default=None, ge=1, description="Processes that tokenize, all cores if not given.")
    runner: Literal["local", "dask", "ray"] = Field(
        default="local", description="Where input files are tokenized: this machine, or a cluster through a Prefect task runner."
    )

    @model_validator(mode="after")
    def _a_document_fits_a_pack(self) -> Self:
        if self.max_length > self.pack_length and self.packing != "hard":
            raise ValueError(
                f"max_length ({self.max_length}) is greater than pack_length ({self.pack_length}), and only packing hard cuts documents"
            )
        return self


class LoraConfig(Config):
    """Low-rank adapters (Hu et al., arXiv:2106.09685), made by peft."""

    rank: int = Field(default=16, ge=1, description="Rank of the update matrices.")
    alpha: int = Field(default=32, ge=1, description="The update is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: Names = Field(
        default=("all-linear",),
        min_length=1,
        description="Linear layers that get an adapter, by name or the end of it (q_proj, layers.0.self_attn.q_proj), or all-linear "
        "(all but the head).",
    )
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA, arXiv:2312.03732).")
    dora: bool = Field(default=False, description="Learn the length of each output row apart from its direction (arXiv:2402.09353).")


class FsdpConfig(Config):
    """How the model is spread over the processes (PyTorch FSDP2)."""

    sharding_size: int | None = Field(
        default=None,
        ge=1,
        description="Processes that share one copy of the model (HSDP); gradients are averaged over the copies. None: all share one copy.",
    )
    reshard_after_forward: bool = Field(
        default=True,
        description="Give a layer's gathered weights back between its forward and its backward pass: less memory, more communication.",
    )
    cpu_offload: bool = Field(
        default=False,
        description="Keep weights, gradients and optimizer states in CPU memory, and bring a layer to the GPU when its turn comes.",
    )


OBSERVING = frozenset({
    "launcher", "dry_run", "prefetch", "checkpoint_interval", "checkpoint_minutes", "checkpoint_keep", "checkpoint_last",
    "async_checkpoint", "trackers", "peak_flops", "profile_step", "profile_memory",
    "sample_prompts", "sample_interval", "sample_tokens",
})  # fmt: skip
"""Train settings that say how a run is started, watched and saved: any value leads to the same result."""


class TrainConfig(Config):
    """How the model is trained."""

    method: Annotated[str, Word("xtuner_core/adapters")] = Field(
        default="full",
        description="What is trained, a module of xtuner_core/adapters: full (the model's own weights), lora (low-rank adapters beside "
        "frozen weights) or qlora (the same, the frozen weights in 4 bits).",
    )
    start: str | None = Field(
        default=None,
        description="Folder with the trained tensors of an earlier run (its `final`, or payload/checkpoint of a train artifact) to begin "
        "with, of the same model and method; the base model's own weights, or a new adapter, if not given.",
    )
    freeze: Names = Field(
        default=(), description="Parameters that method full leaves as they are: names, or patterns such as model.layers.0.*"
    )
    lora: LoraConfig = Field(default=LoraConfig(), description="Used when method is lora or qlora.")
    epochs: int | None = Field(default=None, ge=1, description="Passes over the data (1 if neither this nor total_step is given).")
    total_step: int | None = Field(default=None, ge=1, description="Optimizer steps, instead of epochs.")
    global_batch_size: int = Field(default=1, ge=1, description="Packed sequences in one optimizer step, over all processes.")
    lr: float = Field(default=6e-5, gt=0, description="Peak learning rate.")
    lr_min: float = Field(default=1e-6, ge=0, description="Learning rate at the end of the schedule.")
    scheduler: Annotated[str, Word("xtuner_core/optim/schedules")] = Field(
        default="cosine", description="Shape of the learning rate after warm-up, a module of xtuner_core/optim/schedules."
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0, description="Steps in which the learning rate rises linearly: below 1 a share of all steps, else their number."
    )
    decay_ratio: float = Field(
        default=0.2, gt=0, le=1, description="Share of the steps after warm-up in which scheduler wsd lowers the learning rate."
    )
    optimizer: Annotated[str, Word("xtuner_core/optim/optimizers")] = Field(
        default="adamw", description="Update rule, a module of xtuner_core/optim/optimizers."
    )
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled weight decay; not applied to vectors (norms, biases).")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's running-average coefficients, each in [0, 1).")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are scaled down to this norm.")
    skip_grad_norm_factor: float | None = Field(
        default=None,
        gt=1,
        description="Leave out a step whose gradient norm is above this many times the median of the last steps' norms, or is not finite "
        "(none: no step is left out, and a number that is not finite ends the run).",
    )
    skip_grad_norm_window: int = Field(
        default=32, ge=1, description="Steps whose gradient norms make the median; until there are so many, only finiteness counts."
    )
    max_skipped_steps: int = Field(default=8, ge=1, description="Steps left out in a row at which the run ends with an error.")
    dtype: Literal["bf16", "fp32"] = Field(default="bf16", description="Precision of the computation.")
    loss_reduction: Literal["token", "sample", "square"] = Field(
        default="token",
        description="What a learned token counts in a step's mean loss: all alike (token), 1/n in a document of n learned ones, so that "
        "documents count alike (sample), or 1/√n (square). The validation loss is always per token.",
    )
    weights: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Precision in which method full keeps the weights between steps; bf16 takes half the memory, for them and their "
        "gradients, and updates are rounded at random, so that small ones are not lost.",
    )
    loss_chunk: int = Field(default=1024, ge=1, description="Tokens whose logits exist at one time.")
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Activations of decoder layers that are computed again in the backward pass instead of kept: none, all but the results "
        "of matrix products and attention (selective), or all but a layer's input (full).",
    )
    recompute_ratio: float = Field(
        default=1.0, gt=0, le=1, description="Share of the decoder layers, from the first on, that recompute is for."
    )
    activation_offload: bool = Field(
        default=False,
        description="Move activations that decoder layers keep for the backward pass to CPU memory meanwhile (no effect on a CPU).",
    )
    compile: bool = Field(default=False, description="Compile each decoder layer with torch.compile; the first steps take longer.")
    fsdp: FsdpConfig = Field(default=FsdpConfig(), description="How the model is spread over the processes.")
    dry_run: Literal["auto", "off", "on"] = Field(
        default="auto",
        description="Before the first step, a forward and a backward pass of the largest packs without an update, so that memory that does "
        "not suffice is told at once; auto: on a GPU only.",
    )
    processes: int = Field(
        default=1, ge=1, description="Training processes in all, on all machines together (one a GPU; on CPU they share the cores)."
    )
    launcher: Annotated[str, Word("pipelines/launchers")] = Field(
        default="local", description="How processes are started, a module of pipelines/launchers."
    )
    prefetch: int = Field(default=2, ge=0, description="Steps whose packs are read in the background before they are due (0: none).")
    validation_interval: int | None = Field(
        default=None, ge=1, description="Steps between measurements of the validation loss (none: when an epoch ends); always at the end."
    )
    checkpoint_interval: int | None = Field(
        default=None, ge=1, description="Steps between checkpoints to resume from (none: only when a signal comes)."
    )
    checkpoint_minutes: float | None = Field(
        default=None, gt=0, description="Minutes after which a checkpoint is saved, beside those of checkpoint_interval."
    )
    checkpoint_keep: int = Field(default=2, ge=1, description="Newest checkpoints that are kept; older ones are removed.")
    checkpoint_last: bool = Field(
        default=False, description="A checkpoint after the last step as well, from which a run with more steps goes on."
    )
    checkpoint_best: bool = Field(
        default=False,
        description="Save a checkpoint at each new minimum of the validation loss, keep it, and make the result from the last such one.",
    )
    async_checkpoint: bool = Field(
        default=False, description="Write checkpoints in the background, from a copy in host memory; final is waited for."
    )
    early_stop: int | None = Field(
        default=None, ge=1, description="End after so many measurements of the validation loss in a row without a new minimum."
    )
    trackers: Annotated[tuple[Annotated[str, Word("xtuner_core/trackers")], ...], BeforeValidator(_split_names)] = Field(
        default=(), description="Where the numbers of each step are shown beside the log, modules of xtuner_core/trackers."
    )
    peak_flops: float | None = Field(
        default=None, gt=0, description="Operations a second of one device at its best, for MFU (none: known for some GPUs, else no MFU)."
    )
    profile_step: Steps = Field(default=(), description="Steps, counted from 1, of which a profiler trace is written.")
    profile_memory: bool = Field(default=False, description="Memory in those traces as well, and on a GPU a snapshot of its allocations.")
    sample_prompts: Texts = Field(
        default=(),
        description="What the model is asked now and then: texts, or files with one a line (.txt) or one conversation a line (.jsonl).",
    )
    sample_interval: int | None = Field(
        default=None, ge=1, description="Steps between answers to sample_prompts (none: only at the end); always at the end."
    )
    sample_tokens: int = Field(default=64, ge=1, description="Most tokens of such an answer.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.epochs and self.total_step:
            raise ValueError("give epochs or total_step, not both")
        if self.global_batch_size % self.processes:
            raise ValueError(f"global_batch_size ({self.global_batch_size}) must be a multiple of processes ({self.processes})")
        if self.weights == "bf16" and (self.method != "full" or self.dtype != "bf16"):
            raise ValueError("weights bf16 is for method full with dtype bf16; other methods train adapters, which are small, in fp32")
        if self.freeze and self.method != "full":
            raise ValueError(f"freeze is for method full, and method {self.method} leaves all the model's own weights as they are")
        if self.recompute_ratio < 1 and self.recompute == "none":
            raise ValueError(f"recompute_ratio ({self.recompute_ratio}) is for recompute selective or full")
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min ({self.lr_min}) is greater than lr ({self.lr})")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas ({self.betas[0]}, {self.betas[1]}) must be at least 0 and below 1")
        if self.lr * self.weight_decay >= 1:
            raise ValueError(f"lr × weight_decay ({self.lr * self.weight_decay}) must be below 1, or decay turns the weights' signs")
        if self.warmup_ratio >= 1 and not self.warmup_ratio.is_integer():
            raise ValueError(f"warmup_ratio ({self.warmup_ratio}) is a number of steps from 1 on, so it must be whole")
        return self

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result, as JSON values by name; of `start` only the content does, which is no setting."""
        return self.model_dump(mode="json", exclude={*OBSERVING, "start"})


def trained_otherwise(earlier: dict[str, Any], train: TrainConfig) -> str:
    """Why a run with these settings cannot go on from the tensors of one with those (as JSON values); empty if it can."""
    every = TrainConfig().model_dump(mode="json")  # a field may be new in this version
    before, now = _trained({**every, **earlier}), _trained(train.model_dump(mode="json"))
    names = ["method"] if before["method"] != now["method"] else {**before, **now}
    different = [name for name in names if before.get(name) != now.get(name)]
    return ", ".join(f"train.{name} is {before.get(name)} there and {now.get(name)} here" for name in different)


def _trained(train: dict[str, Any]) -> dict[str, Any]:
    """What decides which tensors are trained, their types, and what an adapter's numbers mean."""
    if train["method"] == "full":
        return {"method": "full", "freeze": sorted(train["freeze"]), "weights": train["weights"]}
    lora = {**train["lora"], "targets": sorted(train["lora"]["targets"])}
    return {"method": train["method"], **{f"lora.{name}": value for name, value in lora.items() if name != "dropout"}}


class SftConfig(Config):
    """Everything one training run reads; written as JSON for `torchrun -m xtuner_core.sft --config FILE`."""

    model_dir: Path = Field(description="Hugging Face folder of the base model.")
    data_dir: Path = Field(description="Packed data, as `xtuner prepare` leaves it.")
    tokenizer_dir: Path | None = Field(default=None, description="Folder of the data's tokenizer; model_dir if not given.")
    work_dir: Path = Field(description="Checkpoints, metrics and the outcome are written here.")
    seed: int = Field(default=42, ge=0, description="Seed of data order, dropout and adapter initialisation.")
    train: TrainConfig
