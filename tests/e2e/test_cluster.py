"""Tokenizing on a real local cluster: its shards are those the prepare stage then finds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import psutil
import pytest

from pipelines.artifacts import Artifact, Store
from pipelines.recipe import load_recipe
from pipelines.runner import run_until
from xtuner_core.errors import DataError, RecipeError

TINY = "qwen3_tiny_full_openai"


def installed(runner: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(f"prefect_{runner}") is None
    return pytest.mark.skipif(missing, reason=f"pip install 'xtuner-pipeline[{runner}]' to run this")


RUNNERS = [pytest.param(name, marks=installed(name)) for name in ("dask", "ray")]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = []
    for number in range(5):
        made.append(tmp_path / f"{number}.jsonl")
        rows = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": f"{number} {row}"}] for row in range(20)]
        made[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return made


def base_of(store: Store) -> Artifact:
    return run_until("base", load_recipe(TINY), store, print).artifact


def listed(files: list[Path]) -> str:
    return f"data.train=[{','.join(map(str, files))}]"


@pytest.mark.slow
@pytest.mark.parametrize("runner", RUNNERS)
def test_the_stage_finds_what_the_cluster_made(prefect_server: None, store: Store, files: list[Path], runner: str) -> None:
    from flows.cluster import fill_cache

    recipe = load_recipe(TINY, [listed(files), f"data.runner={runner}", "data.workers=2"])
    state = fill_cache(recipe, store, base_of(store))
    assert state and state.is_completed() and state.message == "5 files tokenized, 0 were in the cache"
    told: list[str] = []
    made = run_until("prepare", recipe, store, told.append).artifact
    assert made.metrics["documents"] == 100
    assert not any("tokenized" in line for line in told)
    assert fill_cache(recipe, store, base_of(store)) is None, "the artifact is there, so nothing is asked for"
    local = run_until("prepare", load_recipe(TINY, [listed(files)]), Store(store.root.parent / "local"), print).artifact
    assert local.digest == made.digest
    assert not [child.cmdline() for child in psutil.Process().children(recursive=True) if "distributed" in " ".join(child.cmdline())]


@pytest.mark.slow
@installed("dask")
def test_a_mistake_on_the_cluster_is_told_as_at_home(prefect_server: None, store: Store, files: list[Path]) -> None:
    from flows.cluster import fill_cache

    bad = files[0].with_suffix(".parquet")
    bad.write_bytes(b"no parquet")
    recipe = load_recipe(TINY, [listed([*files, bad]), "data.runner=dask", "data.workers=1", "data.format=openai"])
    state = fill_cache(recipe, store, base_of(store))
    assert state and state.is_failed()
    outcome = state.result(raise_on_failure=False)
    assert isinstance(outcome, DataError) and bad.name in str(outcome)


def test_a_missing_extra_is_told_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.cluster import require_runner

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_runner(load_recipe(TINY))
    for runner in ("dask", "ray"):
        with pytest.raises(RecipeError, match=rf"pip install 'xtuner-pipeline\[{runner}\]'"):
            require_runner(load_recipe(TINY, [f"data.runner={runner}"]))


def test_the_local_runner_asks_no_cluster(store: Store, files: list[Path]) -> None:
    from flows.cluster import fill_cache

    assert fill_cache(load_recipe(TINY, [listed(files)]), store, base_of(store)) is None
    assert not store.cache.exists()
