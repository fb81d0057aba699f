"""The folder that a server is given: a model folder, one found in an artifact, or a base and an adapter merged for the occasion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from xtuner_core.errors import RecipeError


@contextmanager
def model_to_serve(model: Path, adapter: Path | None = None) -> Iterator[Path]:
    """The model folder behind `model`; with `adapter`, a folder that holds both merged and is gone after the block.

    Raises:
        RecipeError: neither `model` nor a place where artifacts keep theirs is a model folder, or `adapter` is no adapter folder.
        DataError: the adapter does not fit the model.
    """
    base = model_folder(model)
    if adapter is None:
        yield base
        return
    trained = _holding(adapter, "adapter_config.json", "adapter")
    if trained is None:
        raise RecipeError(
            f"{adapter}: not an adapter folder, nor an artifact that holds one. One has adapter_config.json and "
            "adapter_model.safetensors, like payload/adapter of a convert artifact."
        )
    from xtuner_core.export.merge import merge

    with TemporaryDirectory(prefix="xtuner-merged-") as folder:
        merged = Path(folder, "model")
        merge(base, [(trained, 1.0)], merged)
        yield merged


def model_folder(path: Path) -> Path:
    """`path` itself, or `payload/model` or `model` inside it (an artifact, its payload), whichever holds a model.

    Raises:
        RecipeError: none of them does.
    """
    if folder := _holding(path, "config.json", "model"):
        return folder
    raise RecipeError(
        f"{path}: not a model folder, nor an artifact that holds one. A model folder has config.json, *.safetensors and "
        "tokenizer.json, like payload/model of a convert artifact."
    )


def named_model(text: str, store: Path) -> Path:
    """The folder of the version that NAME@NUMBER or NAME@production means in the store's registry; any other text is a path.

    Raises:
        RecipeError: there is no such model or version.
    """
    if "@" not in text or Path(text).exists():
        return Path(text)
    from pipelines import model_registry
    from pipelines.artifacts import Store

    return model_registry.folder(Store(store), model_registry.find(Store(store), text)) / "model"


def _holding(path: Path, file: str, name: str) -> Path | None:
    """Which of `path` and the places where an artifact, or its payload, keeps `name` holds `file`."""
    folders = (path, path / "payload" / name, path / name)
    return next((folder for folder in folders if (folder / file).is_file()), None)
