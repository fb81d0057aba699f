"""What the Prefect UI shows of a run while it goes on: artifacts as soon as their stage is done, an event for every stage.

Artifacts are sent by a thread beside the run, which neither waits for the API nor fails with it. Keys begin with the name of the run's
model, so that the versions of a key are the weeks of one model: NAME-stages, -data, -training, -scores, -answers, -forecast, -report,
-model-card. A cached stage brings no artifact of its own: that of the run which made it stands, and the report holds all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.events import emit_event
from prefect.logging import get_logger
from prefect.runtime import flow_run

from flows.reporting.sections import SECTIONS, model_card, page
from flows.reporting.summary import outcome, state_of
from pipelines.artifacts import Result, Store
from pipelines.model_registry import model_name
from pipelines.recipe import Recipe

log = get_logger("reporting")
KEYS = {"prepare": "data", "train": "training", "verdict": "scores", "chat": "answers"}
"""Node → end of the key of its artifact."""
ABOUT = {
    "stages": "state, time and result of every stage",
    "data": "what became of every line of the data",
    "training": "the loss curve",
    "scores": "base, production and tuned model compared; the gate",
    "answers": "what the served model said",
    "forecast": "time and memory of every stage, foretold and real",
    "report": "all of a run on one page",
    "model-card": "what the model is, where it stands and where it came from",
}
"""End of a key → what stands there."""
REQUEST_SECONDS, LAST_SECONDS = 10, 10
"""For one request; for what is not sent yet when the run ends."""


@dataclass(frozen=True, slots=True)
class Board:
    """The artifacts of one run."""

    recipe: Recipe
    store: Store
    run: UUID
    client: SyncPrefectClient
    sender: ThreadPoolExecutor
    results: dict[str, Result] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    ids: dict[str, UUID] = field(default_factory=dict)
    """Of what is shown already: it changes in place."""
    unsent: dict[str, Future[None]] = field(default_factory=dict)
    context: Any = field(default_factory=copy_context)
    """The run's settings and logger, for the thread."""

    def done(self, name: str, result: Result) -> None:
        """A stage made or found its artifact."""
        self.results[name] = result
        self._show("stages", "table", partial(_rows, dict(self.results)))
        if name in SECTIONS and not result.cached:
            self._show(KEYS[name], "markdown", partial(SECTIONS[name], result.artifact))
        _emit(self.recipe, name, "completed", _figures(result))

    def failed(self, name: str, why: str) -> None:
        """A stage, and with it the run, ended without an artifact."""
        self.failures.append(f"{name}: {why}")
        last = {"stage": name, "state": "failed", "seconds": "", "result": why}
        self._show("stages", "table", lambda: [*_rows(self.results), last])
        _emit(self.recipe, name, "failed", {"reason": why})

    def ended(self) -> None:
        """All that is left to tell, of a run that is whole or not."""
        self._show("report", "markdown", partial(page, self.recipe, self.results, self.failures))
        self._show("forecast", "table", lambda: [_foretold(name, result) for name, result in self.results.items()])
        if verdict := self.results.get("verdict"):
            self._show("model-card", "markdown", partial(model_card, self.store, model_name(self.recipe), verdict.artifact))

    def _show(self, what: str, kind: str, content: Callable[[], Any]) -> None:
        """Create the artifact, or put this in place of what it showed; what waits to be sent is not sent any more."""
        if what in self.unsent:
            self.unsent[what].cancel()
        self.unsent[what] = self.sender.submit(self.context.run, self._send, what, kind, content)

    def _send(self, what: str, kind: str, content: Callable[[], Any]) -> None:
        try:
            data = content()
            if what in self.ids:
                self.client.update_artifact(self.ids[what], ArtifactUpdate(data=data))
            else:
                key = f"{slug(model_name(self.recipe))}-{what}"
                wanted = ArtifactCreate(key=key, type=kind, data=data, description=ABOUT[what], flow_run_id=self.run)
                self.ids[what] = self.client.create_artifact(wanted).id
        except Exception as error:  # whatever it is, it must not cost a training
            log.warning("the artifact %s could not be shown: %r", what, error)


@contextmanager
def board(recipe: Recipe, store: Store) -> Iterator[Board]:
    """The board of the flow run that is going on; however the block ends, the report is shown."""
    sender = ThreadPoolExecutor(1, "artifacts")
    # Settings of its own make it another client than the one that the run is using in its thread.
    with get_client(sync_client=True, httpx_settings={"timeout": REQUEST_SECONDS}) as client:
        shown = Board(recipe, store, UUID(flow_run.id), client, sender)
        try:
            yield shown
        finally:
            if shown.results or shown.failures:
                shown.ended()
            wait(shown.unsent.values(), LAST_SECONDS)
            sender.shutdown(wait=False, cancel_futures=True)


def slug(name: str) -> str:
    """A name as part of an artifact's key, for which Prefect takes small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _rows(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    return [
        {"stage": name, "state": state_of(result), "seconds": round(result.seconds, 1), "result": outcome(name, results)}
        for name, result in results.items()
    ]


def _foretold(name: str, result: Result) -> dict[str, Any]:
    """What was forecast of a stage before it began, and what it took then."""
    manifest = result.artifact.manifest
    foretold, memory = manifest.get("forecast") or {}, manifest["metrics"].get("peak_memory") or manifest.get("peak_memory")
    return {
        "stage": name,
        "seconds": round(manifest["seconds"], 1),
        "forecast seconds": _rounded(foretold.get("seconds"), 1),
        "GiB": _rounded(memory, 2**30),
        "forecast GiB": _rounded(foretold.get("memory"), 2**30),
        "learned from": foretold.get("learned_from") or "–",
    }


def _rounded(amount: float | None, unit: float) -> float | str:
    return "–" if amount is None else round(amount / unit, 1)


def _figures(result: Result) -> dict[str, Any]:
    figures = {name: value for name, value in result.artifact.metrics.items() if isinstance(value, int | float) and isfinite(value)}
    about = {"cached": result.cached, "seconds": round(result.seconds, 3), "artifact": str(result.artifact.path)}
    return about | {"figures": figures}


def _emit(recipe: Recipe, stage: str, what: str, payload: Mapping[str, Any]) -> None:
    """`finetune.stage.completed` or `.failed`, of the resource finetune.stage.RECIPE.STAGE; Prefect adds the flow run."""
    resource = {"prefect.resource.id": f"finetune.stage.{recipe.name}.{stage}", "prefect.resource.name": f"{recipe.name} {stage}"}
    emit_event(f"finetune.stage.{what}", resource, payload={"recipe": recipe.name, "stage": stage, **payload})
