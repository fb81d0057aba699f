"""The folder of the model that a run trains: the one to load from, or one made once from a config, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner_core.checkpoint.hf import complaint
from xtuner_core.digest import key_of, library_version, sha256
from xtuner_core.durable import publish, remove
from xtuner_core.errors import RecipeError
from xtuner_core.models.check import read_config, require_room, require_usable
from xtuner_core.models.preset import TOKENIZER_FILES, create_from_config, preset_file, preset_names
from xtuner_core.run_config import ModelChoice, refuse_program

PRESET = "preset:"


@dataclass(frozen=True, slots=True)
class ModelFolders:
    """Where weights and config are, and where the tokenizer is."""

    model: Path
    tokenizer: Path
    speaks_bytes: bool
    """The tokenizer is the byte tokenizer, which knows no template of its own."""


def find_model(choice: ModelChoice, seed: int, prepared: Path, say: Callable[[str], None]) -> ModelFolders:
    """The folders that a choice means; random weights are made once below `prepared`, whole or absent.

    Raises:
        RecipeError: there is no such model, or it is not complete; the message says what to give instead.
        DataError: a config is not readable, or the weights are damaged or not those of the config.
    """
    if choice.config or (choice.base or "").startswith(PRESET):
        return _random(choice.config or (choice.base or "").removeprefix(PRESET), choice, seed, prepared, say)
    folder = _complete(Path(choice.base or "").expanduser())
    tokenizer = _tokenizer_folder(choice.tokenizer) if choice.tokenizer else folder
    require_usable(folder)
    if tokenizer != folder:
        require_room(read_config(folder / "config.json"), tokenizer)
    return ModelFolders(folder, tokenizer, speaks_bytes=False)


def _complete(folder: Path) -> Path:
    if not folder.is_dir():
        raise RecipeError(f"--load-from {folder}: no such folder. Give a Hugging Face folder on this machine, or --model-cfg for a preset.")
    if wrong := complaint(folder):
        raise RecipeError(f"--load-from {folder} {wrong}")
    return folder.resolve()


TEMPLATE = "chatml"
"""What the byte tokenizer speaks if nothing is asked for."""


def _random(name: str, choice: ModelChoice, seed: int, prepared: Path, say: Callable[[str], None]) -> ModelFolders:
    file, own = _config_file(name)
    fields = read_config(file)
    tokenizer = _tokenizer_folder(choice.tokenizer) if choice.tokenizer else own
    if tokenizer:
        require_room(fields, tokenizer)
    template = choice.template or TEMPLATE
    folder = prepared / f"model-{_key(fields, seed, tokenizer, template)}"
    if not folder.is_dir():
        say(f"making {name} with random weights (seed {seed}), {'its tokenizer' if tokenizer else 'the byte tokenizer'}")
        draft = prepared / f".{folder.name}.draft"
        remove(draft)
        draft.mkdir(parents=True)
        create_from_config(fields, draft, seed, tokenizer, template)
        require_room(fields, draft)
        publish(draft, folder)
    return ModelFolders(folder, folder, speaks_bytes=tokenizer is None)


def _config_file(name: str) -> tuple[Path, Path | None]:
    """The config that `--model-cfg` means, and the folder of its tokenizer if it has one."""
    refuse_program("--model-cfg", name, f"give a preset ({', '.join(preset_names())}), a config.json, or its fields in --config run.yaml")
    path = Path(name).expanduser()
    if name.lower() in preset_names():
        return preset_file(name), None
    if path.is_dir():
        return path / "config.json", path if (path / "tokenizer.json").is_file() else None
    if path.is_file():
        return path, None
    raise RecipeError(f"--model-cfg {name}: no such file, and the presets are {', '.join(preset_names())}.")


def _tokenizer_folder(name: str) -> Path:
    folder = Path(name).expanduser().resolve()
    if not (folder / "tokenizer.json").is_file():
        raise RecipeError(f"--tokenizer-path {name}: no tokenizer.json in it; name a folder with a fast tokenizer.")
    return folder


def _key(fields: dict[str, Any], seed: int, tokenizer: Path | None, template: str) -> str:
    return key_of({
        "config": fields,
        "seed": seed,
        "tokenizer": tokenizer_digests(tokenizer) if tokenizer else ["bytes", template],
        "libraries": {name: library_version(name) for name in ("torch", "transformers")},
    })  # fmt: skip


def tokenizer_digests(folder: Path) -> dict[str, str]:
    """sha256 of each of the folder's files that decide what becomes of text."""
    return {name: sha256(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
