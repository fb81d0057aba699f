"""What one CPU training step costs, and what two of its choices are worth; variants interleaved in one run, in CPU-seconds.

shipped       FSDP2 on a mesh of one process, documents of similar length attended together
unsharded     the same without FSDP2 (torch.autocast does the mixed precision)
one_by_one    FSDP2, but one SDPA call a document

python benchmarks/training_step.py RECIPE [--steps 8] [--store artifacts]     writes benchmarks/results/training_step.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "training_step.json"
ONE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}


def main() -> None:
    """Measure every variant and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--store", type=Path, default=Path("artifacts"))
    arguments = parser.parse_args()
    os.environ.update(ONE_PROCESS)
    from xtuner_core.parallel.mesh import join_world

    config = prepare(arguments.recipe, arguments.store)
    with join_world() as world:
        rates = measure(config, world, arguments.steps)
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    result = {
        "what": "tokens per CPU-second of a training step, median",
        "recipe": arguments.recipe,
        "steps": arguments.steps,
        "tokens_per_cpu_second": medians,
        "ratio_to_shipped": {name: round(value / medians["shipped"], 3) for name, value in medians.items()},
        **machine(),
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def prepare(recipe_name: str, store: Path):
    """The engine's configuration for a recipe, its data being prepared."""
    from pipelines.artifacts import Store
    from pipelines.recipe import load_recipe
    from pipelines.runner import run_until
    from xtuner_core.config import SftConfig

    recipe = load_recipe(recipe_name)
    base, data = (run_until(name, recipe, Store(store), print).artifact for name in ("base", "prepare"))
    return SftConfig(model_dir=base.payload / "model", data_dir=data.payload, work_dir=Path("unused"), seed=recipe.seed, train=recipe.train)


def measure(config, world, steps: int) -> dict[str, list[float]]:
    """Tokens per CPU-second of each step and variant; the first round warms up."""
    from xtuner_core.data.dataset import PackedDataset
    from xtuner_core.data.loader import load_step
    from xtuner_core.guards import History
    from xtuner_core.trainer import train_step

    dataset = PackedDataset(config.data_dir)
    models = {"shipped": build(config, world, sharded=True), "unsharded": build(config, world, sharded=False)}
    variants = {"shipped": ("shipped", unchanged), "unsharded": ("unsharded", unchanged), "one_by_one": ("shipped", one_by_one)}
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(steps + 1):
        for name, (model_name, setting) in variants.items():
            batches = load_step(dataset, step, config.train.global_batch_size, config.seed, 0, 1)
            with setting():
                started = time.process_time()
                train_step(*models[model_name], batches, config, world, History(), step)
                spent = time.process_time() - started
            if step:
                rates[name].append(sum(batch.text_tokens for batch in batches) / spent)
    return rates


def build(config, world, sharded: bool):
    """Model and optimizer as the trainer builds them, or with autocast in the place of FSDP2."""
    import torch

    from xtuner_core import trainer
    from xtuner_core.loss import packed_loss

    if sharded:
        return trainer.build(config, world)

    def autocast_instead(model, world, dtype: str) -> None:
        def loss(model, batch, chunk: int):
            with torch.autocast("cpu", torch.bfloat16):
                return packed_loss(model, batch, chunk)

        model.packed_loss = types.MethodType(loss, model)

    original, trainer.shard = trainer.shard, autocast_instead
    try:
        return trainer.build(config, world)
    finally:
        trainer.shard = original


@contextmanager
def unchanged() -> Iterator[None]:
    """As shipped."""
    yield


@contextmanager
def one_by_one() -> Iterator[None]:
    """Every document a group of its own, through SDPA."""
    from xtuner_core.models import attention

    groups: Callable = attention._groups
    short, attention.SHORT = attention.SHORT, 0
    attention._groups = lambda bounds, shared: [attention._places([pair], shared) for pair in pairwise(bounds)]
    try:
        yield
    finally:
        attention.SHORT, attention._groups = short, groups


def machine() -> dict[str, object]:
    """Where and when."""
    import torch

    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
