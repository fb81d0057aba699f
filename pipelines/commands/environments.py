"""`xtuner env`: environments of tools whose pins contradict ours."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import App, Parameter

app = App(name="env", help="Environments of tools whose pins contradict ours (opencompass, lmdeploy).")
WithoutCuda = Annotated[bool, Parameter(negative=(), help="The smaller one for machines without a CUDA GPU (lmdeploy): nothing generates.")]


def _name(name: str, without_cuda: bool) -> str:
    from pipelines.environments import WITHOUT_CUDA

    return name + WITHOUT_CUDA if without_cuda else name


@app.command
def create(name: str, *, without_cuda: WithoutCuda = False, torch_index_url: str | None = None) -> None:
    """Build an environment if it is not there, and print its Python.

    Parameters
    ----------
    torch_index_url
        Where pip finds torch (the CPU wheels, say), if not in its configured sources.
    """
    from pipelines.environments import ensure

    print(ensure(_name(name, without_cuda), lambda message: print(message, file=sys.stderr), torch_index_url))


@app.command(name="list")
def list_() -> None:
    """List the known environments and whether they are built."""
    from pipelines.environments import list_environments

    for state in list_environments():
        print(f"{state.name:<22} {'complete' if state.complete else 'not built':<10} {state.path}")


@app.command
def check(name: str, *, without_cuda: WithoutCuda = False) -> None:
    """Ask an environment whether its versions are the pinned ones and its modules import; exit code 74 if not."""
    from pipelines.environments import check as complaints
    from xtuner_core.errors import StorageError

    if found := complaints(_name(name, without_cuda)):
        raise StorageError("\n".join([f"environment {_name(name, without_cuda)} is not as it should be:", *found]))
    print(f"{_name(name, without_cuda)} answers with the pinned versions")
