"""A program for OpenCompass' own Python: data sets of its collection, by name, as plain data.

    python -P resolve.py REQUEST.json ANSWER.json

REQUEST: `{"names": [...], "limit": number or null}`. ANSWER: `{"sets": {name: [{"config", "size"}]}}`, or `{"problem": {...}}` with the
name, and `closest` names, or the `missing` path of its data, or the `reason` why it cannot be used. Nothing is downloaded.
"""

from __future__ import annotations

import difflib
import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import opencompass  # pyright: ignore[reportMissingImports]
import opencompass.utils.datasets as data_paths  # pyright: ignore[reportMissingImports]
from mmengine.config import Config, ConfigDict  # pyright: ignore[reportMissingImports]
from opencompass.utils import build_dataset_from_cfg, dataset_abbr_from_cfg  # pyright: ignore[reportMissingImports]

CONFIGS = Path(opencompass.__file__).parent / "configs" / "datasets"


class Problem(Exception):
    """Why a name cannot be evaluated."""


def no_download(path: str, *_: Any, **__: Any) -> str:
    """In place of OpenCompass' own, which fetches what is not on the disk."""
    raise Problem({"missing": path})


def resolve(name: str, limit: int | None) -> list[dict[str, Any]]:
    """The data sets that the name stands for, each with the number of its samples."""
    files = {file.stem: file for file in sorted(CONFIGS.rglob("*.py"), reverse=True)}
    if name not in files:
        raise Problem({"closest": difflib.get_close_matches(name, files, n=5, cutoff=0.4)})
    config = Config.fromfile(str(files[name]))
    lists = [config[key] for key in config if key.endswith("_datasets") and isinstance(config[key], list)]
    sets: dict[str, dict[str, Any]] = {}
    for entry in map(plain, chain.from_iterable(lists)):
        entry.setdefault("abbr", dataset_abbr_from_cfg(entry))
        sets.setdefault(entry["abbr"], entry)  # many configurations list each set, and all of them once more
    if not sets:
        raise Problem({"reason": "its configuration describes no data set"})
    return [_sized(config, limit) for config in sets.values()]


def _sized(config: dict[str, Any], limit: int | None) -> dict[str, Any]:
    if limit:
        config["reader_cfg"]["test_range"] = f"{config['reader_cfg'].get('test_range', '')}[:{limit}]"
    size = len(build_dataset_from_cfg(ConfigDict(config)).test)
    if not size:
        raise Problem({"reason": f"{config['abbr']} holds no sample"})
    return {"config": config, "size": size}


def plain(value: Any) -> Any:
    """Classes and functions become the names by which OpenCompass' registries find them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    name = getattr(value, "__qualname__", "<lambda>")
    if "<" in name:
        raise Problem({"reason": f"its configuration holds code without a name ({value!r})"})
    return f"{value.__module__}.{name}"


def main() -> None:
    """Answer the request."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    data_paths.download_dataset = no_download
    answer: dict[str, Any] = {"sets": {}}
    for name in request["names"]:
        try:
            answer["sets"][name] = resolve(name, request["limit"])
        except Problem as problem:
            answer = {"problem": {"name": name, **problem.args[0]}}
            break
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            answer = {"problem": {"name": name, "reason": f"{type(error).__name__}: {error}"}}
            break
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
