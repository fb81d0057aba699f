"""A program for OpenCompass' own Python: data sets of its collection, by name, as plain data.

    python -P resolve.py REQUEST.json ANSWER.json

REQUEST: `{"names": [...], "limit": number or null}`. ANSWER: `{"sets": {name: [{"config", "size"}]}}`, or `{"problem": {...}}` with the
name, and `closest` names, or the `missing` path of its data, or the `reason` why it cannot be used. Nothing is downloaded.
"""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import Any

import opencompass  # pyright: ignore[reportMissingImports]
import opencompass.utils.datasets as data_paths  # pyright: ignore[reportMissingImports]
from mmengine.config import Config, ConfigDict  # pyright: ignore[reportMissingImports]
from opencompass.utils import build_dataset_from_cfg  # pyright: ignore[reportMissingImports]

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
    return [_sized(plain(entry), limit) for key in config if key.endswith("_datasets") for entry in config[key]]


def _sized(config: dict[str, Any], limit: int | None) -> dict[str, Any]:
    if limit:
        config["reader_cfg"]["test_range"] = f"{config['reader_cfg'].get('test_range', '')}[:{limit}]"
    return {"config": config, "size": len(build_dataset_from_cfg(ConfigDict(config)).test)}


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
