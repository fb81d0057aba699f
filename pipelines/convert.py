"""Stage convert: training checkpoint → adapter in peft's format → one Hugging Face folder, verified before it is published.

payload/model/        the folder that servers load, with its model card
payload/adapter/      after LoRA and QLoRA: the adapter as peft has it, with its own
payload/facts.json    what the cards tell

Read, check, write, read back and check again; the store publishes what passed. Tensors are streamed, so that memory does not depend on
the size of the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import prepare
from pipelines.model_card import base_name, card, deciding
from pipelines.recipe import Recipe
from pipelines.stage import Metrics, Stage, Work
from xtuner_core import adapters, registry
from xtuner_core.checkpoint.hf import copy_texts, header, license_of, weight_keys
from xtuner_core.data.prepare import code_digest
from xtuner_core.digest import sha256
from xtuner_core.durable import write_bytes, write_json
from xtuner_core.errors import DataError
from xtuner_core.progress import progress

if TYPE_CHECKING:
    import torch

    from xtuner_core.export.tensors import Tensors

MERGE_TOLERANCE = 3e-5
"""Largest difference of logits, relative to the largest logit, between the fp32 merge and base + adapter. Rounding in another order alone
makes 8.6e-6 of the demo's 30 layers."""
MIN_AGREEMENT = 0.99
"""Share of next-token choices that the exported precision must keep. Where the two best tokens are closer than the precision can tell
(a tie: half the positions of a random model, a few of a trained one), either of them counts as kept."""
PROBES = 8
PROBE_TOKENS = 64
"""The checks of logits run on so many training samples, and on so many of their last tokens."""
Checks = dict[str, float]


def run(recipe: Recipe, work: Work) -> Metrics:
    """Write `model/` (and `adapter/` after LoRA).

    Raises:
        DataError: a check failed; names the check, the tensor or the figure.
        RecipeError: the base's config or tokenizer is missing or damaged.
    """
    from xtuner_core.export.run import complete
    from xtuner_core.export.verify import logits

    base_dir, model_dir, probes = work.inputs["base"] / "model", work.payload / "model", _probes(work)
    trained = _trained(recipe, work, base_dir)
    if hasattr(registry.find(adapters, recipe.train.method), "save_adapter"):
        whole, reference, checks = _merged(recipe, work, base_dir, trained, probes)
    else:
        whole = _tuned(base_dir, trained)
        reference, checks = logits(base_dir, whole, probes), {}

    digests = _write(recipe, work, base_dir, whole)
    complete(model_dir, _described(work)["template"])

    _require_same_keys(base_dir, model_dir)
    checks |= _read_back(recipe, model_dir, digests, reference, probes)
    _require_same_template(work, model_dir)
    work.log(f"exported {model_dir.name}: " + ", ".join(f"{name} {value:.3g}" for name, value in checks.items()))

    sizes = _sizes(weight_keys(model_dir))
    _write_cards(recipe, work, {**_facts(recipe, work, checks), **sizes})
    return {**checks, **sizes}


def _trained(recipe: Recipe, work: Work, base_dir: Path) -> Tensors:
    """The checkpoint's tensors, which are just those that this recipe trains of this base; reading one that is not finite fails."""
    from xtuner_core.checkpoint.store import is_whole
    from xtuner_core.export.checkpoint import open_checkpoint
    from xtuner_core.export.tensors import finite

    folder = work.inputs["checkpoint"] / "checkpoint"
    if not is_whole(folder):
        raise DataError(f"{folder}: the checkpoint is damaged or incomplete. Run the training stage again.")
    trained = open_checkpoint(folder)
    _require_fit(recipe, base_dir, trained)
    return finite(trained)


def _require_fit(recipe: Recipe, base_dir: Path, trained: Tensors) -> None:
    """The checkpoint must have exactly the tensors that this recipe trains of this base; peft and torch overlook missing ones."""
    from xtuner_core.export.run import differences

    if wrong := differences(trained, recipe.train, base_dir):
        raise DataError(f"the checkpoint was trained with another base model or method; it differs in {', '.join(wrong[:5])}.")


def _tuned(base_dir: Path, trained: Tensors) -> Tensors:
    """After full training; what was frozen is the base's."""
    from xtuner_core.export.checkpoint import open_model

    return {**open_model(base_dir), **trained}


def _merged(
    recipe: Recipe, work: Work, base_dir: Path, trained: Tensors, probes: list[list[int]]
) -> tuple[Tensors, list[torch.Tensor], Checks]:
    """Write `adapter/`; the fp32 merge, its logits, and how far they are from those of base + adapter."""
    import torch

    from xtuner_core.adapters.qlora import as_quantized
    from xtuner_core.export.adapter import open_adapter
    from xtuner_core.export.checkpoint import open_model, outline
    from xtuner_core.export.merge import merged
    from xtuner_core.export.verify import largest_difference, logits

    folder = work.payload / "adapter"
    registry.find(adapters, recipe.train.method).save_adapter(trained, recipe.train, base_name(recipe), folder)
    adapter = open_adapter(folder)
    base = open_model(base_dir)
    if adapter.quantized_base:
        work.log("the base's linear layers are quantized to 4 bits and de-quantized again before the merge, as the adapter knew them")
        base = {**base, **as_quantized(base, outline(base_dir), getattr(torch, adapter.quantized_base["dtype"]))}
    whole = merged(base, base_dir, [(adapter, 1.0)])
    adapted = logits(base_dir, base, probes, adapter=folder)
    reference = logits(base_dir, whole, probes)
    error = largest_difference(adapted, reference)
    if not error <= MERGE_TOLERANCE:
        raise DataError(f"merging changed the logits by {error:.2e} of the largest one, at most {MERGE_TOLERANCE} is allowed.")
    return whole, reference, {"merge_error": error}


def _write(recipe: Recipe, work: Work, base_dir: Path, whole: Tensors) -> dict[str, str]:
    """Every tensor rounded once; the digests of what was written, by its name in the model."""
    import torch

    from xtuner_core.export.checkpoint import to_hugging_face
    from xtuner_core.export.tensors import finite, write_folder
    from xtuner_core.export.verify import noted

    dtype, folder = getattr(torch, recipe.convert.dtype), work.payload / "model"
    folder.mkdir()
    rounded = {name: tensor.to(dtype) if tensor.dtype.is_floating_point else tensor for name, tensor in whole.items()}
    digests: dict[str, str] = {}
    published = finite(to_hugging_face(base_dir, noted(rounded, digests)))
    with progress("writing", sum(tensor.bytes for tensor in published.values()), work.log) as wrote:
        write_folder(published, folder, recipe.convert.max_shard_size, wrote)
    copy_texts(base_dir, folder, recipe.convert.dtype)
    return digests


def _read_back(
    recipe: Recipe, model_dir: Path, digests: Mapping[str, str], reference: list[torch.Tensor], probes: list[list[int]]
) -> Checks:
    """The folder's tensors are the model's to the bit, after their names and layout were changed and changed back; then only the rounding
    is to be judged, so logits are computed exactly.
    """
    import torch

    from xtuner_core.export.checkpoint import open_model
    from xtuner_core.export.verify import agreement, logits, require_noted

    exported = open_model(model_dir)
    require_noted(exported, digests)
    rounded = logits(model_dir, exported, probes)
    kept = agreement(reference, rounded, torch.finfo(getattr(torch, recipe.convert.dtype)).eps)
    if kept < MIN_AGREEMENT:
        raise DataError(
            f"only {kept:.2%} of next-token choices survive the cast to {recipe.convert.dtype}, {MIN_AGREEMENT:.0%} must. "
            "Export with --set convert.dtype=float32."
        )
    return {"same_next_token": agreement(reference, rounded), "next_token_agreement": kept}


def _require_same_keys(base_dir: Path, model_dir: Path) -> None:
    before = {name: shape for name, (shape, _) in weight_keys(base_dir).items()}
    after = {name: shape for name, (shape, _) in weight_keys(model_dir).items()}
    if before != after:
        wrong = sorted(name for name in before | after if before.get(name) != after.get(name))
        raise DataError(f"the exported tensors differ from the base model's in name or shape: {', '.join(wrong[:5])}.")


def _require_same_template(work: Work, model_dir: Path) -> None:
    """The exported tokenizer must be faithful, and its chat template must give the ids that training saw."""
    import numpy as np

    from xtuner_core.data.conversation import Conversation, Message
    from xtuner_core.data.render import first_difference, own_ids
    from xtuner_core.data.tokenize import load_tokenizer
    from xtuner_core.export.tokenizer import require_faithful

    samples = _samples(work)
    conversations = [Conversation(tuple(map(Message.from_dict, sample["messages"])), tuple(sample["tools"])) for sample in samples]
    require_faithful(model_dir, [message.content or "" for one in conversations for message in one.messages])
    seen = [np.array(sample["ids"], dtype=np.uint32) for sample in samples]
    if difference := first_difference(seen, own_ids(model_dir, conversations), set(load_tokenizer(model_dir).control.values())):
        raise DataError(f"the exported chat template gives other tokens than training saw: {difference}.")


def _samples(work: Work) -> list[dict[str, Any]]:
    with open(work.inputs["data"] / "samples.jsonl", encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def _described(work: Work) -> dict[str, Any]:
    return json.loads((work.inputs["data"] / "data.json").read_text(encoding="utf-8"))


def _probes(work: Work) -> list[list[int]]:
    """Token ids the checks run on: of the stored conversations or, where only plain text was trained on, of the first documents."""
    from xtuner_core.data.dataset import PackedDataset

    if samples := _samples(work)[:PROBES]:
        return [sample["ids"][-PROBE_TOKENS:] for sample in samples]
    dataset = PackedDataset(work.inputs["data"])
    count = sum(len(shard) for shard in dataset.shards)
    return [dataset.document(number).ids[-PROBE_TOKENS:].tolist() for number in range(min(PROBES, count))]


_COUNTS = ("documents", "tokens", "learned_tokens", "validation_documents", "rejected", "dropped")


def _facts(recipe: Recipe, work: Work, checks: Checks) -> dict[str, Any]:
    """What the cards tell."""
    described, training = _described(work), work.inputs["checkpoint"] / "training.json"
    return {
        "base": base_name(recipe),
        "license": license_of(work.inputs["base"] / "model"),
        "relation": "finetune",
        "dtype": recipe.convert.dtype,
        "checks": _told(recipe, checks),
        "data": [
            {"file": file.name, "sha256": sha256(work.inputs["data"] / "documents" / f"{number:05d}" / "ids.bin")}
            for number, file in enumerate(prepare.files_of(recipe))
        ],
        "counts": {name: described[name] for name in _COUNTS if described.get(name)},
        "training": json.loads(training.read_text(encoding="utf-8")) if training.is_file() else {},
    }


def _told(recipe: Recipe, checks: Checks) -> dict[str, str]:
    """The checks' figures in steps: their last digits are the processor's, and the card's bytes are to be the model's."""
    told = {f"next-token choices kept in {recipe.convert.dtype}": f"{checks['next_token_agreement']:.0%}"}
    if error := checks.get("merge_error"):
        told["logits of the merge differ from those of base + adapter by"] = (
            f"at most {10.0 ** math.ceil(math.log10(error)):.0e} of the largest"
        )
    return told


def _sizes(described: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, int]:
    return {"tensors": len(described), "parameters": sum(math.prod(shape) for shape, _ in described.values())}


def _write_cards(recipe: Recipe, work: Work, facts: Mapping[str, Any]) -> None:
    write_json(work.payload / "facts.json", facts)
    write_bytes(work.payload / "model" / "README.md", card(recipe, facts).encode())
    if (adapter := work.payload / "adapter").is_dir():
        own = {"relation": "adapter", "dtype": "float32", **_sizes(header(adapter / "adapter_model.safetensors"))}
        write_bytes(adapter / "README.md", card(recipe, {**facts, **own}).encode())


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What the inputs do not tell: how the tensors are meant and written, what the card says, and the code of the chat templates."""
    return {"card": deciding(recipe), "files": [file.name for file in prepare.files_of(recipe)], "code": code_digest()}


STAGE = Stage(
    name="convert",
    version=3,
    run=run,
    settings=_settings,
    libraries=("torch", "transformers", "peft", "safetensors", "huggingface_hub", "bitsandbytes"),
)
