"""After the stages: the run's result becomes a version, and goes into production if the recipe's gate, or a person, says so.

The registry is files (pipelines/model_registry.py); every new line of its history becomes an event `finetune.model.WHAT`, on which
automations and deployments may be triggered, and a new edition of the table NAME-versions.

A run that waits for a person is suspended: its process ends. Resumed, or tried again after it was killed, it decides about the version
that it had made, whatever lies in the data folder or is in production by then.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cyclopts import App
from prefect import State, get_run_logger, suspend_flow_run, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.input import RunInput
from prefect.input.actions import create_flow_run_input, read_flow_run_input
from prefect.runtime import deployment, flow_run
from prefect.variables import Variable
from pydantic import Field

from flows.caching import failed, finished
from flows.reporting.board import slug
from pipelines import model_registry, promotion
from pipelines.artifacts import Artifact, Damaged, Hold, Result, Store
from pipelines.model_history import Entry
from pipelines.model_registry import Version
from pipelines.pipeline import nodes
from pipelines.recipe import Recipe
from xtuner_core.errors import DataError, UserError

MADE = "version"
"""Under this key the server keeps which version a flow run has made."""


class Approval(RunInput):
    """The form."""

    approve: Literal["yes", "no"] = Field(title="Put it into production?", description="no: it stays where it is and counts as rejected.")
    name: str = Field(min_length=1, title="Your name", description="It goes into the model's history.")
    comment: str = Field(default="", title="Comment", description="Why; for those who look at the history later.")


def made_before(store: Store) -> Version | None:
    """The version that this flow run had made, and was to decide about, when it was suspended or killed."""
    title = read_flow_run_input(MADE)
    return model_registry.find(store, str(title)) if title else None


def found_again(recipe: Recipe, version: Version, store: Store) -> tuple[dict[str, Result], State[Any] | None]:
    """The version's artifacts, each shown as `Cached`; and the state of the first one that is not as it was."""
    results: dict[str, Result] = {}
    order = {node.name: place for place, node in enumerate(nodes(recipe))}
    for node in sorted(version.artifacts, key=lambda node: order.get(node, len(order))):
        state = _found.with_options(name=node, task_run_name=node)(version, version.artifacts[node], store, return_state=True)
        outcome = state.result(raise_on_failure=False)
        if not isinstance(outcome, Result):
            return results, failed(outcome) if isinstance(outcome, UserError) else state
        results[node] = outcome
    return results, None


@task(cache_policy=NO_CACHE, persist_result=False)
def _found(version: Version, reference: Mapping[str, str], store: Store) -> State[Any]:
    place = f"{reference['stage']}/{reference['key']}"
    try:
        artifact = store.find(reference["stage"], reference["key"])
    except Damaged as damage:
        return failed(DataError(f"{version.title}: {place} is damaged: {damage}. Run the recipe again to rebuild it."))
    if artifact is None or artifact.digest != reference["payload_digest"]:
        return failed(DataError(f"{version.title}: {place} is not as it was when the run asked about it. Run the recipe again."))
    return finished(Result(replace(artifact, hold=Hold(artifact.path)), True, 0.0))


def conclude(recipe: Recipe, store: Store, results: Mapping[str, Result], summary: Mapping[str, Any], faults: str) -> str:
    """Make the result a version and do with it what the recipe, as it is written, says; what has become of it, in words.

    Raises:
        UserError: it should go into production and cannot: it is damaged, say.
        Pause: the run is suspended until a person has answered.
    """
    name = model_registry.model_name(recipe)
    known = len(model_registry.history(store, name))
    try:
        made: dict[str, Artifact] = {node: result.artifact for node, result in results.items()}
        version = promotion.register(store, recipe, made, summary["ok"], faults, summary["scores"], f"run {flow_run.name}")
        return _follow(recipe, store, version)
    finally:
        announce(store, name, known)


def _follow(recipe: Recipe, store: Store, version: Version) -> str:
    decision = promotion.decide(recipe, version, model_registry.status(store, version))
    if decision in ("promote", "ask") and read_flow_run_input(MADE) is None:
        create_flow_run_input(MADE, version.title)
    match decision:
        case "reject":
            promotion.reject(store, version, "gate", version.faults)
        case "promote":
            outdated = partial(model_registry.judged_against_another, store, recipe, version)
            if not promotion.promote(store, version, "gate", "the gate and the chat test passed", unless=outdated):
                get_run_logger().warning("another version went into production while %s was judged; it stays a candidate", version.title)
        case "ask" if deployment.id:
            _ask(recipe, store, version)
        case "ask":
            get_run_logger().warning("%s waits for approval, but only a run of a deployment can be suspended until then", version.title)
    return _told(store, version)


def _told(store: Store, version: Version) -> str:
    now = model_registry.status(store, version)
    by_hand = f": xtuner promote {version.title} --why ..." if now == "candidate" else ""
    return f"{version.title} is {'in production' if now == 'production' else f'a {now} version'}{by_hand}"


def _ask(recipe: Recipe, store: Store, version: Version) -> None:
    """Suspend until a person has answered the form, and do what it says.

    The key names what was shown: should another version be in production by then, the question is another one, and asked anew.
    """
    in_use = model_registry.production(store, version.name)
    shown = Approval.with_initial_data(description=question(store, recipe, version, in_use))
    key = f"approve-{version.number}-{version.artifacts['convert']['payload_digest'][:16]}-instead-of-{in_use.number if in_use else 'none'}"
    answer = suspend_flow_run(wait_for_input=shown, timeout=int(recipe.promotion.approval_hours * 3600), key=key)
    if answer.approve == "yes":
        promotion.promote(store, version, answer.name, answer.comment or "approved")
    else:
        promotion.reject(store, version, answer.name, answer.comment or "not approved")


def question(store: Store, recipe: Recipe, version: Version, in_use: Version | None) -> str:
    """What the person sees above the form, as markdown."""
    verdict = store.root / "verdict" / version.artifacts["verdict"]["key"]
    report = (verdict / "payload" / "report.md").read_text(encoding="utf-8")
    instead = f"in place of {in_use.title}" if in_use else "as the first one"
    folder = model_registry.folder(store, version) / "model"
    heading = re.sub("^#", "##", report, flags=re.MULTILINE)
    outdated = model_registry.judged_against_another(store, recipe, version)
    warning = "\n\n**It was not compared with that one:** another was in production when it was judged." if outdated else ""
    return f"**{version.title}** would go into production {instead}.{warning}\n\n{heading}\n\nTry it first: `xtuner chat {folder}`\n"


def announce(store: Store, name: str, known: int) -> None:
    """Tell Prefect the lines of the model's history behind the first `known`, and show the table and the pointer anew."""
    fresh = model_registry.history(store, name)[known:]
    for entry in fresh:
        _emit(store, model_registry.find(store, f"{name}@{entry.version}"), entry)
    if fresh:
        _show(store, name)


def _emit(store: Store, version: Version, entry: Entry) -> None:
    resource = {"prefect.resource.id": f"finetune.model.{version.name}", "prefect.resource.name": version.title}
    payload = {
        "model": version.name,
        "version": version.number,
        "title": version.title,
        "recipe": version.recipe,
        "folder": str(model_registry.folder(store, version) / "model"),
        "serve": str(model_registry.home(store, version.name) / "production" / "model"),
        "scores": version.scores,
        "gate": version.gate,
        "faults": version.faults,
        "by": entry.by,
        "why": entry.why,
        "at": entry.at,
    }
    emit_event(f"finetune.model.{entry.what.replace(' ', '-')}", resource, payload=payload)


def _show(store: Store, name: str) -> None:
    rows = [
        {"version": entry.version, "what": entry.what, "at": entry.at, "by": entry.by, "why": entry.why}
        for entry in reversed(model_registry.history(store, name))
    ]
    in_use = model_registry.production(store, name)
    told = f"In production: {in_use.title}" if in_use else "None in production"
    create_table_artifact(rows, key=f"{slug(name)}-versions", description=told)
    Variable.set(f"production_{slug(name).replace('-', '_')}", in_use.title if in_use else "none", overwrite=True)


def tell(name: str, *, store: Path, known: int) -> None:
    """What `xtuner promote` and `xtuner rollback` start when a server is at hand."""
    announce(Store(store), name, known)


if __name__ == "__main__":
    sys.exit(App(name="python -m flows.promoting", default_command=tell)(result_action="return_value"))
