"""What a run of the engine has trained, given to others: as an adapter in peft's form, or as a whole Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from xtuner_core import adapters, registry, work_dir
from xtuner_core.checkpoint import store
from xtuner_core.checkpoint.hf import complete_generation_config, copy_texts
from xtuner_core.config import TrainConfig
from xtuner_core.data import templates
from xtuner_core.data.render import find_template, has_own_template, stop_token
from xtuner_core.data.tokenize import load_tokenizer
from xtuner_core.durable import drafted, write_bytes
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.export.adapter import open_adapter
from xtuner_core.export.checkpoint import open_checkpoint, open_model, outline, to_hugging_face
from xtuner_core.export.merge import published
from xtuner_core.export.tensors import Lazy, Tensors, finite, open_folder, write_folder
from xtuner_core.progress import shown

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Trained:
    """Trained tensors, named as in the model; how they were trained, and on which base."""

    tensors: Tensors
    train: TrainConfig
    base: Path
    run: dict[str, Any]
    """The run's own record, run.json; empty for a checkpoint that lies elsewhere."""

    @property
    def save_adapter(self) -> Callable[..., None] | None:
        """How the training method writes its adapter; None if it trained the model's own weights."""
        return getattr(registry.find(adapters, self.train.method), "save_adapter", None)


def open_trained(place: Path, base: Path | None = None) -> Trained:
    """The result of a work directory (its newest checkpoint, if the run is not finished), or a named checkpoint.

    Raises:
        RecipeError: there is no such thing at `place`, or nobody says what the base was.
        DataError: the checkpoint is damaged, or it was trained on another base.
    """
    folder = _checkpoint(place)
    if damage := store.damage_of(folder):
        raise DataError(f"{folder}: {damage}. Take another checkpoint of the run.")
    facts, run = store.facts(folder), _run_of(folder)
    settings = facts.get("train") or run.get("train")
    if settings is None:
        raise RecipeError(f"{folder}: nothing says how it was trained; leave it in the work directory, beside {work_dir.FACTS}.")
    found = Path(base or run.get("model_dir") or "")
    if not (found / "config.json").is_file():
        raise RecipeError(f"{folder}: give --base, the Hugging Face folder that was trained{f'; {found} is not there' if run else ''}.")
    tensors = open_checkpoint(folder)
    if "train" not in facts:  # a checkpoint to resume from holds more than weights
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    trained = Trained(finite(tensors), TrainConfig.model_validate(settings), found, run)
    _require_base(folder, trained)
    return trained


def _checkpoint(place: Path) -> Path:
    if (place / store.FACTS).is_file():
        return place
    if (place / "final" / store.FACTS).is_file():
        return place / "final"
    if newest := store.newest(place):
        return newest
    raise RecipeError(f"{place}: no work directory of a run with a result or a checkpoint, and no checkpoint.")


def _run_of(folder: Path) -> dict[str, Any]:
    """What decided the run that a checkpoint belongs to."""
    for above in (folder.parent, folder.parent.parent):
        if (file := above / work_dir.FACTS).is_file():
            try:
                return json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise DataError(f"{file}: damaged ({error}).") from None
    return {}


def _require_base(folder: Path, trained: Trained) -> None:
    """Refuse a base that is not the one of the run, or in which the tensors have no place (DataError)."""
    if known := trained.run.get("model"):
        now = work_dir.model_facts(trained.base, trained.run)
        if other := [name for name in known if now.get(name, {}).get("sha256") != known[name]["sha256"]]:
            raise DataError(f"{folder}: was trained on another model than {trained.base}; {', '.join(other)} differs. Give --base.")
    if wrong := differences(trained.tensors, trained.train, trained.base):
        raise DataError(f"{folder}: was trained on another model or by another method; it differs in {', '.join(wrong[:5])}. Give --base.")


def differences(tensors: Tensors, train: TrainConfig, base: Path) -> list[str]:
    """Names of the tensors that are not just those which `train` trains of this base; peft and torch overlook missing ones."""
    model = outline(base)
    registry.find(adapters, train.method).prepare(model, train, 0)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    return sorted(name for name in expected | found if expected.get(name) != found.get(name))


def write_adapter(trained: Trained, folder: Path) -> None:
    """Write the adapter as the new folder `folder`, which peft loads (RecipeError: no adapter was trained)."""
    if trained.save_adapter is None:
        raise RecipeError(f"method {trained.train.method} trained the model itself and no adapter; use xtuner convert to_hf.")
    with drafted(folder) as draft:
        trained.save_adapter(trained.tensors, trained.train, str(trained.base), draft)


def write_model(trained: Trained, folder: Path, dtype: torch.dtype | None, max_shard_size: str, say: Say) -> None:
    """Write the whole model as the new Hugging Face folder `folder`, after LoRA merged; of `dtype`, or as the base has its tensors.

    Raises:
        DataError: a tensor holds NaN or infinity.
    """
    with TemporaryDirectory(prefix="xtuner-") as scratch:
        if trained.save_adapter:
            trained.save_adapter(trained.tensors, trained.train, str(trained.base), Path(scratch, "adapter"))
            tensors = published(trained.base, [(open_adapter(Path(scratch, "adapter")), 1.0)], dtype, "auto", say)
        else:
            tensors = _tuned(trained, dtype)
        with drafted(folder) as draft:
            draft.mkdir()
            with shown(sum(tensor.bytes for tensor in tensors.values())) as wrote:
                write_folder(tensors, draft, max_shard_size, wrote)
            copy_texts(trained.base, draft, str(dtype).removeprefix("torch.") if dtype else None)
            if template := trained.run.get("template"):
                complete(draft, template)


def _tuned(trained: Trained, dtype: torch.dtype | None) -> dict[str, Lazy]:
    """What was trained instead of the base's tensors."""
    stored = open_folder(trained.base)
    tensors = to_hugging_face(trained.base, {**open_model(trained.base), **trained.tensors})
    kinds = {name: stored[name].dtype if name in stored else tensor.dtype for name, tensor in tensors.items()}
    return finite({name: tensor.to(dtype if dtype and kinds[name].is_floating_point else kinds[name]) for name, tensor in tensors.items()})


def complete(folder: Path, template: str) -> None:
    """Give a model folder the chat template it was trained with, if it has none, and a generation config that ends answers as training did.

    Raises:
        DataError: a file is not JSON.
    """
    tokenizer = load_tokenizer(folder)
    if template != templates.OWN and not has_own_template(folder):
        write_bytes(folder / "chat_template.jinja", (find_template(template).JINJA or "").encode())
    stop = tokenizer.control.get(stop_token(template, folder, tokenizer) or "")
    complete_generation_config(folder, [] if stop is None else [stop])
