"""`xtuner env`: environments of tools whose pins contradict ours."""

from __future__ import annotations

import sys

from cyclopts import App

app = App(name="env", help="Environments of tools whose pins contradict ours (OpenCompass).")


@app.command
def create(name: str, *, torch_index_url: str | None = None) -> None:
    """Build an environment if it is not there, and print its Python.

    Parameters
    ----------
    torch_index_url
        Where pip finds torch (the CPU wheels, say), if not in its configured sources.
    """
    from pipelines.environments import ensure

    print(ensure(name, lambda message: print(message, file=sys.stderr), torch_index_url))


@app.command(name="list")
def list_() -> None:
    """List the known environments and whether they are built."""
    from pipelines.environments import list_environments

    for state in list_environments():
        print(f"{state.name:<12} {'complete' if state.complete else 'not built':<10} {state.path}")
