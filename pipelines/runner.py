"""Run stages without an orchestrator: each needed one in turn, cached or made."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from safetensors import SafetensorError

from pipelines.artifacts import Artifact, Result, Store
from pipelines.forecast import expected
from pipelines.pipeline import Node, check_stages, needed_for
from pipelines.recipe import Recipe
from pipelines.stage import Progress, Stage, untold
from xtuner_core.errors import Interrupted, StorageError


def run_until(name: str, recipe: Recipe, store: Store, say: Callable[[str], None]) -> Result:
    """The result of node `name`; what it needs and is not in the store is made first. A mistake in the recipe is told before that."""
    needed = needed_for(name, recipe)
    check_stages(needed, recipe)
    made: dict[str, Artifact] = {}
    for node in needed:
        result = run_node(node, recipe, store, made, lambda message, node=node: say(f"[{node.name}] {message}"))
        made[node.name] = result.artifact
        state = "cached" if result.cached else f"done in {result.seconds:.1f} s"
        say(f"[{node.name}] {state}: {result.artifact.path}")
    return result


def run_node(
    node: Node,
    recipe: Recipe,
    store: Store,
    made: dict[str, Artifact],
    log: Callable[[str], None],
    progress: Progress = untold,
    making: Callable[[Stage], AbstractContextManager[None]] = nullcontext,
) -> Result:
    """One node, its inputs being made already; inside of `making(stage)` unless it is in the store.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; what is finished is kept.
        StorageError: something cannot be written, and the error names no file (safetensors' and numpy's do not).
    """
    inputs = {name: made[source] for name, source in node.inputs.items()}
    try:
        return store.produce(node.stage, recipe, inputs, log, progress, lambda: expected(node, recipe, store, made), making)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted in {node.name}; finished stages are kept, run the same command again to continue.") from None
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        reason = getattr(error, "strerror", None) or error
        told = f"{node.name}: {reason}. Check space and permissions below {store.root}, then run the same command again."
        raise StorageError(told) from None
