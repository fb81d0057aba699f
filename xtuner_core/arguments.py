"""The command line of the engine, made from the fields of `RunConfig`: one flag for each, named as XTuner V1 names it where it has it.

Dashes and underscores are the same. No torch import here.
"""

from __future__ import annotations

import argparse
import difflib
import json
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from xtuner_core.config import DataConfig, TrainConfig
from xtuner_core.errors import RecipeError
from xtuner_core.run_config import ModelChoice, RunConfig, refuse_program

PROGRAM = "python -m xtuner_core.sft"
USAGE = (
    "torchrun [--nproc-per-node N] -m xtuner_core.sft, or " + PROGRAM + "\n"
    "       (--model-cfg PRESET|CONFIG.json|FOLDER | --load-from FOLDER) --dataset FILE|FOLDER|GLOB … [--work-dir DIR] [flags]\n"
    "       --config FILE [flags]"
)
Field = tuple[str, ...]
"""Where a field lies in the tree, `("train", "lr")`."""

XTUNER_NAMES: dict[str, str] = {
    "load-from": "model.base",
    "model-cfg": "model.config",
    "chat-template": "model.template",
    "tokenizer-path": "model.tokenizer",
    "dataset": "data.train",
    "tokenize-fn": "data.format",
    "pack-max-length": "data.pack_length",
    "epoch-num": "train.epochs",
    "total-epoch": "train.epochs",
    "optim": "train.optimizer",
    "scheduler-type": "train.scheduler",
    "loss-config.chunk-size": "train.loss_chunk",
    "loss-config.loss-reduction": "train.loss_reduction",
    "fsdp-config.recompute-ratio": "train.recompute_ratio",
    "fsdp-config.torch-compile": "train.compile",
    "fsdp-config.cpu-offload": "train.fsdp.cpu_offload",
    "fsdp-config.hsdp-sharding-size": "train.fsdp.sharding_size",
    "fsdp-config.reshard-after-forward": "train.fsdp.reshard_after_forward",
    "exp-tracker": "train.trackers",
}
"""Flags of XTuner V1 whose field is called otherwise here."""
_OF_THE_PIPELINE = {"data.runner", "train.processes", "train.launcher"}
"""Fields that decide how the pipeline starts the engine; here torchrun does."""
_TAKEN = {"config", "help", "model", "data", "train", "base"}
"""Words that are no short name of a field."""
_FORGIVING = {"train.optimizer": str.lower, "train.scheduler": str.lower, "model.template": lambda word: word.replace("-", "_")}
"""XTuner writes AdamW and gpt-oss."""
_SECTIONS = {
    "model": ModelChoice.__doc__,
    "data": DataConfig.__doc__,
    "train": TrainConfig.__doc__,
    "": "The run.",
}


@dataclass(frozen=True, slots=True)
class Flag:
    """One field as flags: `names` without dashes, the first is the one to show."""

    field: Field
    names: tuple[str, ...]
    info: FieldInfo
    default: Any

    @property
    def dotted(self) -> str:
        return ".".join(self.field)

    @property
    def is_switch(self) -> bool:
        return self.info.annotation is bool

    @property
    def is_list(self) -> bool:
        return any(get_origin(kind) is tuple for kind in _alternatives(self.info.annotation))

    @property
    def is_text(self) -> bool:
        return all(kind in (str, Path) for kind in _alternatives(self.info.annotation))

    @property
    def shown_default(self) -> str:
        if self.default is None:
            return "none"
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        return " ".join(map(str, self.default)) or "none" if isinstance(self.default, tuple) else str(self.default)

    @property
    def values(self) -> str:
        """What may be written behind the flag."""
        kinds = _alternatives(self.info.annotation)
        choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        names = {int: "N", float: "X", str: "WORD", Path: "DIR", bool: "on|off"}
        listed = [names[kind] for kind in kinds if kind in names] + (["VALUE …"] if self.is_list else [])
        return "|".join(choices + list(dict.fromkeys(listed)))


def _alternatives(annotation: Any) -> list[Any]:
    """The types of a union, without None."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(annotation) if part is not type(None) for kind in _alternatives(part)]
    return _alternatives(get_args(annotation)[0]) if hasattr(annotation, "__metadata__") else [annotation]


def flags() -> list[Flag]:
    """A flag for every field, in the order of the tree."""
    found = [(field, info, default) for field, info, default in _leaves(RunConfig, ()) if ".".join(field) not in _OF_THE_PIPELINE]
    short = Counter(_short(field) for field, _, _ in found)
    return [Flag(field, _names(field, short[_short(field)] == 1), *rest) for field, *rest in found]


def _leaves(section: type[BaseModel], above: Field) -> Iterator[tuple[Field, FieldInfo, Any]]:
    for name, info in section.model_fields.items():
        inner = [kind for kind in _alternatives(info.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if inner:
            yield from _leaves(inner[0], (*above, name))
        else:
            yield (*above, name), info, None if info.is_required() else info.get_default(call_default_factory=True)


def _short(field: Field) -> str:
    return _dashed(".".join(field[1:] or field))


def _dashed(text: str) -> str:
    return text.replace("_", "-")


def _names(field: Field, unique: bool) -> tuple[str, ...]:
    theirs = [name for name, dotted in XTUNER_NAMES.items() if dotted == ".".join(field)]
    short = [_short(field)] if unique and _short(field) not in _TAKEN else []
    return tuple(dict.fromkeys([*theirs, *short, _dashed(".".join(field))]))


# Parsing ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arguments:
    """A parsed command line: the file, and values by field."""

    config: Path | None
    values: dict[Field, Any]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}. {PROGRAM} --help lists every flag.")


def parse(arguments: Sequence[str]) -> Arguments:
    """Read a command line; `--help` prints and ends the program.

    Raises:
        RecipeError: an unknown flag (with the one that may have been meant), or one without its value.
    """
    every = flags()
    told, rest = parser(every).parse_known_args([_with_dashes(word) for word in arguments])
    if rest:
        raise RecipeError(_unknown(rest[0], every))
    values = vars(told)
    config = values.pop("config")
    by_dotted = {flag.dotted: flag for flag in every}
    return Arguments(
        Path(config) if config else None, {by_dotted[dotted].field: _value(by_dotted[dotted], given) for dotted, given in values.items()}
    )


def parser(every: Sequence[Flag]) -> argparse.ArgumentParser:
    """The parser of these flags."""
    made = _Parser(
        prog=PROGRAM,
        usage=USAGE,
        description="Fine-tune a model on files of conversations, on one process or, under torchrun, on many. "
        "The same command in the same work directory continues from the last checkpoint.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=140),
    )
    made.add_argument(
        "--config", metavar="FILE", default=None, help="YAML or JSON with the fields in brackets below, or a recipe; flags win over it."
    )
    groups = {name: made.add_argument_group(name or "run", text) for name, text in _SECTIONS.items()}
    for flag in every:
        _add(groups[flag.field[0] if len(flag.field) > 1 else ""], flag)
    return made


def _add(group: Any, flag: Flag) -> None:
    """Show the flag by its short names; the field's whole path, which the brackets tell, is understood too."""
    shown = flag.names[:-1] or flag.names
    text = f"{flag.info.description} (default: {flag.shown_default}) [{flag.dotted}]".replace("%", "%%")
    for names, told in ((shown, text), (flag.names[len(shown) :], argparse.SUPPRESS)):
        if names:
            _add_names(group, flag, names, told)


def _add_names(group: Any, flag: Flag, names: Sequence[str], text: str) -> None:
    dashed = [f"--{name}" for name in names]
    common = {"dest": flag.dotted, "default": argparse.SUPPRESS}
    if flag.is_switch:
        group.add_argument(*dashed, nargs="?", const="true", metavar="on|off", help=text, **common)
        group.add_argument(*(f"--no-{name}" for name in names), action="store_const", const="false", help=argparse.SUPPRESS, **common)
    else:
        group.add_argument(*dashed, nargs="+" if flag.is_list else None, metavar=flag.values.split(" ")[0], help=text, **common)


def _with_dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return _dashed(name) + equals + value


def _unknown(word: str, every: Sequence[Flag]) -> str:
    known = ["--config", *(f"--{name}" for flag in every for name in flag.names)]
    near = difflib.get_close_matches(word.partition("=")[0], known, n=1)
    return f"{word}: no such flag{f'; did you mean {near[0]}?' if near else '.'} {PROGRAM} --help lists every flag."


def _value(flag: Flag, given: str | list[str]) -> Any:
    if isinstance(given, list):
        if flag.field[0] == "data":
            refuse_program("--" + flag.names[0], given[0], "name data files: .jsonl, .json, .parquet, .csv, a folder or a glob")
        return _literal(given[0]) if len(given) == 1 else [_literal(part) for part in given]
    if flag.is_text:
        return _FORGIVING.get(flag.dotted, str)(given)
    return {"on": True, "off": False}.get(given, _literal(given)) if flag.is_switch else _literal(given)


def _literal(text: str) -> Any:
    """A number, true, null, a list or an object as YAML writes them; anything else is text, a path with any character in it."""
    try:
        return yaml.safe_load(text) if text[:1] in ("[", "{") else json.loads(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


# The table in docs/engine.md --------------------------------------------------------------------------------------------------------


def table() -> str:
    """Every flag with its field, default and meaning, as Markdown."""
    lines = ["| flag | field | values | default | meaning |", "|---|---|---|---|---|"]
    for flag in flags():
        names = ", ".join(f"`--{name}`" for name in flag.names if name != _dashed(flag.dotted) or len(flag.names) == 1)
        cells = (names, f"`{flag.dotted}`", f"`{flag.values}`", flag.shown_default, flag.info.description or "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write_table(file: Path) -> None:
    """Put the table in the place of the one that a Markdown file has."""
    text = file.read_text(encoding="utf-8")
    start = text.index(table().splitlines()[0])
    rest = text[start:].splitlines(keepends=True)
    after = next((number for number, line in enumerate(rest) if not line.startswith("|")), len(rest))
    file.write_text(text[:start] + table() + "".join(rest[after:]), encoding="utf-8")


if __name__ == "__main__":
    write_table(Path(__file__).resolve().parents[1] / "docs" / "engine.md")
