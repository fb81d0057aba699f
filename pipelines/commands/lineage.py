"""`xtuner lineage`, `verify` and `trace`: where a model came from, whether that is still so, and what became of one line of the data."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from pipelines.commands.cache import verify_all
from pipelines.commands.models import MODELS
from pipelines.commands.recipe_options import DEFAULT_STORE, StoreDir

if TYPE_CHECKING:
    from pipelines.artifacts import Store

MODEL = Parameter(help="NAME (the one in production), NAME@NUMBER, or a path to or into a convert artifact.")
Model = Annotated[str, MODEL]
Flag = Annotated[bool, Parameter(negative=())]


def add_to(app: App) -> None:
    """Make them commands of `xtuner`."""
    for command in (lineage, verify, trace):
        app.command(command, group=MODELS)


def lineage(model: Model, *, json: Flag = False, mermaid: Flag = False, store: StoreDir = DEFAULT_STORE) -> None:
    """Print everything a model came from, back to the digest of every input file.

    Parameters
    ----------
    json
        For programs, with all settings.
    mermaid
        As a graph for a Markdown page.
    """
    from pipelines import lineage_page
    from pipelines.artifacts import Store
    from pipelines.lineage import trace_back
    from xtuner_core.durable import json_bytes

    chain = trace_back(Store(store), model)
    if json:
        sys.stdout.write(json_bytes(lineage_page.as_json(chain)).decode())
    elif mermaid:
        sys.stdout.write(lineage_page.mermaid(chain))
    else:
        print(*lineage_page.as_text(chain), sep="\n")


def verify(model: Annotated[str | None, MODEL] = None, *, store: StoreDir = DEFAULT_STORE) -> None:
    """Re-hash everything a model came from, or without MODEL every artifact of the store; exit code 65 if anything is damaged.

    Input files that are gone or have changed since are told, and are no damage: the model is what it was.
    """
    from pipelines.artifacts import Store

    if model:
        _verify_chain(Store(store), model)
    else:
        verify_all(Store(store), Store(store).folders())


def _verify_chain(store: Store, model: str) -> None:
    from pipelines.lineage import trace_back
    from pipelines.verify import verify
    from xtuner_core.errors import DataError

    broken = []
    for step, findings in verify(trace_back(store, model)):
        print(f"{'✗' if any(one.broken for one in findings) else '✓'} {step.node:<12} {step.id}", flush=True)
        print(*(f"    {one.where}: {one.what}" for one in findings), sep="\n", end="\n" if findings else "")
        broken += [one for one in findings if one.broken]
    if broken:
        more = f" ({len(broken)} in all)" if len(broken) > 1 else ""
        raise DataError(f"the chain of {model} breaks first at {broken[0].where}: {broken[0].what}{more}")
    print(f"{model} is what its manifests say, back to its inputs")


def trace(
    model: Model,
    *,
    sample: Annotated[str, Parameter(help="FILE:LINE of an input file, lines counted from 1.")],
    store: StoreDir = DEFAULT_STORE,
) -> None:
    """Say whether a model was trained on a line, in which packs and at which steps; or what became of the line instead."""
    from pipelines.artifacts import Store
    from pipelines.lineage import trace_back
    from pipelines.trace import told

    print(*told(trace_back(Store(store), model), sample), sep="\n")
