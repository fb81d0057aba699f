"""What comes with the project as YAML files: a shipped name, or the path of a file of the user's."""

from __future__ import annotations

from pathlib import Path

from xtuner_core.errors import RecipeError


def names(folder: Path) -> list[str]:
    """The shipped names."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def find(folder: Path, name_or_path: str, what: str, kind: str) -> Path:
    """The file that is meant; `what` says where it was asked for, and `kind` what the folder holds.

    Raises:
        RecipeError: neither exists; the message lists the shipped names.
    """
    if name_or_path in names(folder):
        return folder / f"{name_or_path}.yaml"
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    raise RecipeError(f"{what} {name_or_path!r}: no such file, and the shipped {kind} are {', '.join(names(folder))}.")
