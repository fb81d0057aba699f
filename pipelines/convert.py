"""Stage convert: training checkpoint → adapter in peft's format → one Hugging Face folder, verified before it is published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.recipe import Recipe
from pipelines.stage import Metrics, Stage, Work
from xtuner_core import adapters, registry
from xtuner_core.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MERGE_TOLERANCE = 1e-5
"""Largest difference of logits, relative to the largest logit, between the fp32 merge and base + adapter."""
MIN_AGREEMENT = 0.99
"""Share of next-token choices that the exported precision must keep. Where the two best tokens are closer than the precision can tell
(a tie: half the positions of a random model, a few of a trained one), either of them counts as kept."""
PROBES = 16
"""Training samples that the checks run on."""


def run(recipe: Recipe, work: Work) -> Metrics:
    """Write `model/` (and `adapter/` after LoRA).

    Raises:
        DataError: a check failed; names the check, the tensor or the figure.
    """
    import torch

    from xtuner_core.checkpoint.hf import make_portable, save_model

    base_dir, model_dir = work.inputs["base"] / "model", work.payload / "model"
    probes = _probes(work)
    merged, adapted = _merge(recipe, work, base_dir, probes)
    reference = _logits(merged, probes)
    checks = {"merge_error": _merge_error(adapted, reference)} if adapted else {}
    exported = {name: tensor.to(_dtype(recipe)) for name, tensor in merged.state_dict().items()}
    _require_finite(exported)
    merged.to(_dtype(recipe))  # pyright: ignore[reportArgumentType]
    save_model(merged, model_dir, recipe.convert.max_shard_size)
    _copy_tokenizer(base_dir, model_dir)
    make_portable(model_dir)

    _require_same_keys(base_dir, model_dir)
    reloaded = _load(model_dir, torch.float32)  # computes exactly, so that only the rounding of the weights is judged
    _require_equal(exported, reloaded.state_dict())
    rounded = _logits(reloaded, probes)
    checks["same_next_token"] = _agreement(reference, rounded, 0.0)
    checks["next_token_agreement"] = _agreement(reference, rounded, torch.finfo(_dtype(recipe)).eps)
    if checks["next_token_agreement"] < MIN_AGREEMENT:
        raise DataError(
            f"only {checks['next_token_agreement']:.2%} of next-token choices survive the cast to {recipe.convert.dtype}, "
            f"{MIN_AGREEMENT:.0%} must. Export with --set convert.dtype=float32."
        )
    _require_same_template(work, model_dir)
    work.log(f"exported {model_dir.name}: " + ", ".join(f"{name} {value:.3g}" for name, value in checks.items()))
    return {**checks, "tensors": len(exported), "parameters": sum(tensor.numel() for tensor in reloaded.parameters())}


def _merge(recipe: Recipe, work: Work, base_dir: Path, probes: list[list[int]]) -> tuple[PreTrainedModel, list[torch.Tensor]]:
    """The trained model in fp32; after LoRA also the logits of base + adapter, before they became one."""
    import torch

    from xtuner_core.checkpoint.store import load_whole
    from xtuner_core.export.tensors import Lazy

    trained = load_whole(work.inputs["checkpoint"] / "checkpoint")
    _require_fit(recipe, base_dir, trained)
    _require_finite(trained)
    base = _load(base_dir, torch.float32)
    save_adapter = getattr(registry.find(adapters, recipe.train.method), "save_adapter", None)
    if save_adapter is None:
        base.load_state_dict(trained, strict=False)  # a tied tensor is there once, a frozen one not at all
        return base, []

    from peft import PeftModel

    save_adapter({name: Lazy.of(tensor) for name, tensor in trained.items()}, recipe.train, _base_name(recipe), work.payload / "adapter")
    adapted = PeftModel.from_pretrained(base, str(work.payload / "adapter")).eval()
    before = _logits(adapted, probes)
    return adapted.merge_and_unload(safe_merge=True), before


def _merge_error(adapted: list[torch.Tensor], merged: list[torch.Tensor]) -> float:
    error = max(float((a - b).abs().max()) for a, b in zip(adapted, merged, strict=True))
    relative = error / max(float(logits.abs().max()) for logits in adapted)
    if not relative <= MERGE_TOLERANCE:
        raise DataError(f"merging changed the logits by {relative:.2e} of the largest one, at most {MERGE_TOLERANCE} is allowed.")
    return relative


def _require_fit(recipe: Recipe, base_dir: Path, trained: Mapping[str, torch.Tensor]) -> None:
    """The checkpoint must have exactly the tensors that this recipe trains of this base; peft and torch overlook missing ones."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_dir, local_files_only=True))
        registry.find(adapters, recipe.train.method).prepare(model, recipe.train, recipe.seed)
    expected = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name: tensor.shape for name, tensor in trained.items()}
    if wrong := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        raise DataError(f"the checkpoint was trained with another base model or method; it differs in {', '.join(wrong[:5])}.")


def _load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, attn_implementation="sdpa").eval()


def _dtype(recipe: Recipe) -> torch.dtype:
    import torch

    return getattr(torch, recipe.convert.dtype)


def _logits(model: torch.nn.Module, probes: list[list[int]]) -> list[torch.Tensor]:
    """fp32 logits `[tokens, vocabulary]` of each probe."""
    import torch

    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float() for ids in probes]


def _agreement(reference: list[torch.Tensor], other: list[torch.Tensor], tie: float) -> float:
    """Share of positions where the other choice is as good: its reference logit is within `tie` × the largest logit of the best."""
    kept = 0
    for exact, rounded in zip(reference, other, strict=True):  # [tokens, vocabulary]
        chosen = exact.gather(-1, rounded.argmax(-1, keepdim=True))[:, 0]
        kept += int((exact.amax(-1) - chosen <= tie * exact.abs().amax(-1)).sum())
    return kept / sum(len(logits) for logits in reference)


def _require_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    import torch

    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"tensor {name} holds NaN or infinity as {tensor.dtype}; it is not exported. Train with a lower train.lr.")


def _require_same_keys(base_dir: Path, model_dir: Path) -> None:
    from xtuner_core.checkpoint.hf import weight_keys

    before = {name: shape for name, (shape, _) in weight_keys(base_dir).items()}
    after = {name: shape for name, (shape, _) in weight_keys(model_dir).items()}
    if before != after:
        wrong = sorted(name for name in before | after if before.get(name) != after.get(name))
        raise DataError(f"the exported tensors differ from the base model's in name or shape: {', '.join(wrong[:5])}.")


def _require_equal(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    import torch

    for name, tensor in expected.items():
        if not torch.equal(tensor.float(), found[name]):
            raise DataError(f"tensor {name} read back from the exported folder is not the fp32 merge rounded once.")


def _copy_tokenizer(base_dir: Path, model_dir: Path) -> None:
    """Tokenizer, chat template and what else is text comes from the base, byte for byte."""
    for path in sorted(base_dir.iterdir()):
        is_text = path.suffix in (".json", ".jinja", ".txt", ".model") and not path.name.endswith(".index.json")
        if is_text and path.is_file() and not (model_dir / path.name).exists():
            shutil.copyfile(path, model_dir / path.name)


def _require_same_template(work: Work, model_dir: Path) -> None:
    """The exported chat template must give the ids that training saw."""
    import numpy as np

    from xtuner_core.data.conversation import Conversation, Message
    from xtuner_core.data.render import find_template, first_difference, has_own_template, own_ids
    from xtuner_core.data.tokenize import load_tokenizer

    samples = _samples(work)
    if not has_own_template(model_dir):
        name = json.loads((work.inputs["data"] / "data.json").read_text(encoding="utf-8"))["template"]
        (model_dir / "chat_template.jinja").write_text(find_template(name).JINJA or "", encoding="utf-8")
    conversations = [Conversation(tuple(map(Message.from_dict, sample["messages"])), tuple(sample["tools"])) for sample in samples]
    seen = [np.array(sample["ids"], dtype=np.uint32) for sample in samples]
    if difference := first_difference(seen, own_ids(model_dir, conversations), set(load_tokenizer(model_dir).control.values())):
        raise DataError(f"the exported chat template gives other tokens than training saw: {difference}.")


def _samples(work: Work) -> list[dict[str, Any]]:
    with open(work.inputs["data"] / "samples.jsonl", encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def _probes(work: Work) -> list[list[int]]:
    """Token ids the checks run on: of the stored conversations or, where only plain text was trained on, of the first documents."""
    from xtuner_core.data.dataset import PackedDataset

    if samples := _samples(work)[:PROBES]:
        return [sample["ids"] for sample in samples]
    dataset = PackedDataset(work.inputs["data"])
    count = sum(len(shard) for shard in dataset.shards)
    return [dataset.document(number).ids.tolist() for number in range(min(PROBES, count))]


def _base_name(recipe: Recipe) -> str:
    base = recipe.model.base
    return Path(base).name if Path(base).exists() else base


def _settings(recipe: Recipe) -> dict[str, Any]:
    # The checkpoint's digest does not tell how its tensors are meant, so the method and its scaling are settings here too.
    method = recipe.train.model_dump(mode="json", include={"method", "freeze"} if recipe.train.method == "full" else {"method", "lora"})
    return {**recipe.convert.model_dump(mode="json"), **method, "base": _base_name(recipe)}


STAGE = Stage(name="convert", version=1, run=run, settings=_settings, libraries=("torch", "transformers", "peft", "safetensors"))
