"""All that comes before the ranks train together, done by rank 0 alone: the model's folder, the packed data, and whether the work
directory may go on with them. What is made is whole or absent, and found again by the next run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xtuner_core import adapters, registry, run_record, trackers
from xtuner_core import work_dir as work
from xtuner_core.config import DataConfig, SftConfig
from xtuner_core.data import packing, shards, templates
from xtuner_core.data.prepare import Plan, code_digest, make_plan, told, write_data
from xtuner_core.digest import key_of
from xtuner_core.durable import publish, remove
from xtuner_core.models.source import ModelFolders, find_model, tokenizer_digests
from xtuner_core.optim import optimizers, schedules
from xtuner_core.progress import Log
from xtuner_core.run_config import RunConfig


def prepare_run(run: RunConfig, processes: int, say: Log) -> SftConfig | None:
    """What to train, with all of it in place; None if the work directory has its result already.

    Raises:
        RecipeError, DataError: the model or the data cannot be used, or are not those of the checkpoint in the work directory.
    """
    require_known_words(run)
    folder = run.work_dir.resolve()
    prepared = folder / work.PREPARED
    folders = find_model(run.model, run.seed, prepared, say)
    template = choose(folders, run.model.template)
    plan = make_plan(run.data, folders.tokenizer, template, say)
    if not run.resume and (aside := work.put_aside(folder)):
        run_record.moved(folder, aside)
        say(f"starting over; what was there is in {aside}")
    earlier = work.earlier_facts(folder)
    facts = decided(run, folders, plan, earlier)
    if earlier and work.has_progress(folder):
        work.require_same_run(folder, earlier, facts, say)
        if work.is_complete(folder, run.train, run.seed):
            return None
    data = pack(run, plan, prepared, say)
    work.write_facts(folder, {**facts, "model_dir": str(folders.model)})  # only found by it: a model that moved is the same
    remove(folder / "outcome.json")  # an earlier attempt's
    config = SftConfig(
        model_dir=folders.model, data_dir=data, tokenizer_dir=folders.tokenizer, work_dir=folder, seed=run.seed, train=run.train
    )
    run_record.begin(config, processes)
    return config


def require_known_words(run: RunConfig) -> None:
    """Refuse a registered word that is not known, or a tracker that is not installed, before anything is made."""
    words = ((adapters, run.train.method), (optimizers, run.train.optimizer), (schedules, run.train.scheduler), (packing, run.data.packing))
    for package, name in words:
        registry.require(package, name)
    if run.model.template and run.model.template != templates.OWN:
        registry.require(templates, run.model.template)
    trackers.require_installed(run.train.trackers)


def choose(folders: ModelFolders, asked: str | None) -> str:
    """The template to train with; the byte tokenizer speaks any, ChatML if none is asked for."""
    from xtuner_core.data.render import choose_template, find_template

    if folders.speaks_bytes and asked:
        find_template(asked)
        return asked
    return choose_template(folders.tokenizer, asked)


_USE = {"format": "format", "ratio": "sample_ratio", "draw": "draw", "validation": "validation"}


def decided(run: RunConfig, folders: ModelFolders, plan: Plan, earlier: work.Facts | None) -> work.Facts:
    """What decides the run, by content; a work directory goes on only with the same."""
    files = [
        {"file": str(one.file), "sha256": job.digest, **{name: getattr(one, field) for name, field in _USE.items()}}
        for one, job in zip(plan.inputs, plan.jobs, strict=True)
    ]
    return {
        "schema": 1,
        "model": work.model_facts(folders.model, earlier),
        "tokenizer": tokenizer_digests(folders.tokenizer),
        "template": plan.template,
        "data": {**data_settings(run.data), "files": files},
        "train": {**run.train.model_dump(mode="json"), "start": work.start_digest(run.train)},
        "seed": run.seed,
    }


def data_settings(data: DataConfig) -> dict[str, Any]:
    """What decides the packs beside the files."""
    settings = data.model_dump(mode="json", exclude={"train", "format", "max_rejected", "workers", "runner"})
    return settings if isinstance(data.validation, float) else {**settings, "validation": "files"}


def pack(run: RunConfig, plan: Plan, prepared: Path, say: Log) -> Path:
    """The folder of the run's packed data: made now, or found as an earlier run made it."""
    uses = [(job.key, one.sample_ratio, one.draw, one.validation) for one, job in zip(plan.inputs, plan.jobs, strict=True)]
    key = key_of({"data": data_settings(run.data), "uses": uses, "seed": run.seed, "code": code_digest()})
    folder = prepared / f"data-{key}"
    if folder.is_dir():
        return folder
    shards.tokenize(plan.jobs, prepared / "shards", run.data.workers, say)
    draft = prepared / f".{folder.name}.draft"
    remove(draft)
    draft.mkdir(parents=True)
    metrics = write_data(plan, run.data, run.seed, prepared / "shards", draft, run.work_dir / "rejected.jsonl")
    publish(draft, folder)
    say(told(metrics))
    return folder
