"""The folder is the registry: a name in a recipe is the name of a module in a folder.

Adding a format, template, launcher, evaluator or chatter means adding one file; nothing else is edited.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import GetJsonSchemaHandler

from xtuner_core.errors import RecipeError


def names(package: ModuleType) -> list[str]:
    """The registered words: the modules of `package`, sorted, without private ones."""
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def require(package: ModuleType, name: str) -> None:
    """Check a name without importing its module.

    Raises:
        RecipeError: no such module; the message lists the known names.
    """
    known = names(package)
    if name not in known:
        kind = package.__name__.rsplit(".", 1)[-1]
        raise RecipeError(f"{name!r} is not one of the {kind}: {', '.join(known)}.")


def find(package: ModuleType, name: str) -> ModuleType:
    """The module of `package` called `name` (RecipeError as `require`)."""
    require(package, name)
    return importlib.import_module(f"{package.__name__}.{name}")


@dataclass(frozen=True, slots=True)
class Word:
    """Annotation of a field that holds a registered word, or one of `more`: forms list them. It checks nothing; `require` does."""

    folder: str
    """Of the package, relative to the project; nothing of it is imported."""
    more: tuple[str, ...] = ()

    def __get_pydantic_json_schema__(self, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        path = Path(__file__).parents[1] / self.folder
        found = (module.name for module in pkgutil.iter_modules([str(path)]) if not module.name.startswith("_"))
        return {**handler(core), "enum": [*self.more, *sorted(found)]}
