"""`xtuner models`, `promote` and `rollback`: the versions of a model, and which of them is in production."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Group, Parameter

from pipelines.commands.recipe_options import DEFAULT_STORE, StoreDir
from xtuner_core.errors import RecipeError

if TYPE_CHECKING:
    from pipelines.artifacts import Store
    from pipelines.model_registry import Version

MODELS = Group("Models and where they came from")
EVENT_SECONDS = 60
Title = Annotated[str, Parameter(help="NAME@NUMBER; `xtuner models` lists them.")]
Why = Annotated[str, Parameter(help="The reason, for the model's history.")]


def add_to(app: App) -> None:
    """Make them commands of `xtuner`."""
    for command in (models, promote, rollback):
        app.command(command, group=MODELS)


def models(name: str | None = None, *, store: StoreDir = DEFAULT_STORE) -> None:
    """List the models and what is in production; of one model, its versions with scores, and its history.

    Parameters
    ----------
    name
        A model's name.
    """
    from pipelines import model_registry
    from pipelines.artifacts import Store

    known = model_registry.names(Store(store))
    if not known:
        print(f"no model in {Store(store).root}; a run that ends registers one")
    if name is None:
        for one in known:
            in_use = model_registry.production(Store(store), one)
            count = len(model_registry.versions(Store(store), one))
            print(f"{one:<40} {count} versions, in production: {in_use.number if in_use else 'none'}")
    else:
        _tell(Store(store), name)


def _tell(store: Store, name: str) -> None:
    from pipelines import model_registry

    model_registry.find(store, name)
    for version in model_registry.versions(store, name):
        state = model_registry.status(store, version)
        print(f"{version.title:<30} {state:<11} {version.created[:16]}  {_scores(version)}{_faults(version)}")
    print("\nhistory")
    for entry in model_registry.history(store, name):
        print(f"{entry.at[:16]}  {f'{name}@{entry.version}':<30} {entry.what:<11} by {entry.by}: {entry.why}")
    if model_registry.production(store, name):
        print(f"\nserve it: {model_registry.home(store, name) / 'production' / 'model'}")


def _scores(version: Version) -> str:
    tuned: Mapping[str, float] = version.scores.get("tuned", {})
    return ", ".join(f"{dataset} {figure:.4g}" for dataset, figure in tuned.items())


def _faults(version: Version) -> str:
    return "" if version.gate else f"  does not pass: {version.faults}"


def promote(
    title: Title,
    *,
    why: Why,
    by: str | None = None,
    anyway: Annotated[bool, Parameter(negative=())] = False,
    store: StoreDir = DEFAULT_STORE,
) -> None:
    """Put a version into production, after every byte of it was read again.

    Parameters
    ----------
    by
        Who decides; the user of this machine if not given.
    anyway
        Even if it did not pass the gate or the chat test.
    """
    from pipelines import model_registry, promotion
    from pipelines.artifacts import Store

    place = Store(store)
    version = model_registry.find(place, _with_number(title))
    if not version.gate and not anyway:
        raise RecipeError(f"{version.title} did not pass: {version.faults} With --anyway it goes into production all the same.")
    known = len(model_registry.history(place, version.name))
    changed = promotion.promote(place, version, by or getpass.getuser(), why)
    served = model_registry.home(place, version.name) / "production" / "model"
    print(f"{version.title} is in production{'' if changed else ' already'}: {served}")
    _tell_the_server(place, version.name, known)


def _with_number(title: str) -> str:
    if "@" not in title:
        raise RecipeError(f"{title}: name the version too, {title}@NUMBER; `xtuner models {title}` lists them.")
    return title


def rollback(name: str, *, why: Why, by: str | None = None, store: StoreDir = DEFAULT_STORE) -> None:
    """Put the version back that was in production before; again goes further back.

    Parameters
    ----------
    name
        The model.
    by
        Who decides; the user of this machine if not given.
    """
    from pipelines import model_registry, promotion
    from pipelines.artifacts import Store

    place = Store(store)
    known = len(model_registry.history(place, name))
    version = promotion.rollback(place, name, by or getpass.getuser(), why)
    print(f"{version.title} is in production: {model_registry.home(place, name) / 'production' / 'model'}")
    _tell_the_server(place, name, known)


def _tell_the_server(store: Store, name: str, known: int) -> None:
    """The event and the table in the UI, where a server is named; the registry is changed in any case."""
    if "PREFECT_API_URL" not in os.environ:
        return
    command = [sys.executable, "-m", "flows.promoting", name, "--store", str(store.root), "--known", str(known)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=EVENT_SECONDS, check=False)
        told = done.returncode == 0
    except (OSError, subprocess.SubprocessError):
        told = False
    if not told:
        print(f"note: {os.environ['PREFECT_API_URL']} does not answer and was not told", file=sys.stderr)
