"""Training that goes on from an earlier run's result: its trained tensors over base weights or new adapters, all else anew."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import PreTrainedModel

from xtuner_core.checkpoint import state, store
from xtuner_core.checkpoint.hf import weight_files
from xtuner_core.config import SftConfig, trained_otherwise
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.metrics import say
from xtuner_core.parallel.mesh import World, gather_numbers

PIECES, PIECE_BYTES = 64, 2**16
"""Of each weight file so many pieces, spread evenly, make the fingerprint: training moves every weight, and a second is enough."""


def begin(config: SftConfig, model: PreTrainedModel, world: World) -> None:
    """Put the tensors of `train.start` in the place of those that `model` trains; saved on any number of processes, sharded in any way.

    Raises:
        DataError: the folder is no finished run's result, or damaged.
        RecipeError: it is of another model or method, or of other layers, shapes or types. The model is unchanged then.
    """
    folder = Path(config.train.start or "")
    _require(gather_numbers(_damage(folder).encode() if world.rank == 0 else b"", world), folder, DataError)
    _require(gather_numbers(_mismatch(folder, config).encode() if world.rank == 0 else b"", world), folder, RecipeError)
    trained = state.trained_tensors(model)
    if different := store.differences(folder, trained):
        raise RecipeError(f"train.start {folder}: it does not have just the tensors that are trained here: {different}. {_ADVICE}")
    store.load(folder, trained)
    say(world.rank, f"training begins with the {len(trained)} trained tensors of {folder}")


_ADVICE = "Go on with the model, train.method and layers of that run, or leave train.start out."


def _require(told: list[int], folder: Path, kind: type[DataError | RecipeError]) -> None:
    """Every rank raises what rank 0 found."""
    if told:
        raise kind(f"train.start {folder}: {bytes(told).decode()}")


def _damage(folder: Path) -> str:
    if not (folder / store.FACTS).is_file():
        return f"no {store.FACTS} is there. Name a run's folder `final`, or payload/checkpoint of an artifact of stage train."
    damage = store.damage_of(folder)
    return f"the checkpoint is damaged: {damage}. Copy it again, or leave train.start out." if damage else ""


def _mismatch(folder: Path, config: SftConfig) -> str:
    """What its facts tell; those of a checkpoint that is to be resumed, or was saved by an earlier version, tell less."""
    facts = store.facts(folder)
    if "history" in facts:
        return "a checkpoint to resume from is no result. Name the run's folder `final`."
    if "base" in facts and facts["base"] != fingerprint(config.model_dir):
        return f"it was trained on another model than {config.model_dir}. {_ADVICE}"
    if differs := trained_otherwise(facts.get("train", {}), config.train):
        return f"it was trained otherwise: {differs}. {_ADVICE}"
    return ""


def fingerprint(model_dir: Path) -> str:
    """What tells the weights of a model folder from those of another, without reading all of them."""
    digest = hashlib.sha256()
    for file in weight_files(model_dir):
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with open(file, "rb") as stream:
            for piece in range(PIECES):
                stream.seek(max(0, size - PIECE_BYTES) * piece // (PIECES - 1))
                digest.update(stream.read(PIECE_BYTES))
    return digest.hexdigest()
