"""`finetune-flow`: prepare → train → convert → eval → chat under Prefect.

As a program (`python -m flows.finetune RECIPE`, what `xtuner run` starts) it runs the flow here, on a temporary server unless
PREFECT_API_URL names one, prints the table, and exits with the documented code.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from cyclopts import App, Parameter
from prefect import State, flow, get_run_logger
from prefect.states import Completed, Failed

from flows.caching import Unfit, ended_in, failed
from flows.cluster import fill_cache, require_runner
from flows.labels import label, run_name
from flows.live import signs_of_life
from flows.news import nothing_to_learn
from flows.parameters import DEMO, AskedRecipe, Trigger
from flows.promoting import conclude, found_again, made_before
from flows.reporting.board import Board, board
from flows.reporting.summary import faults, summarize, table
from flows.tasks import task_of
from pipelines import prepare
from pipelines.artifacts import Artifact, Result, Store
from pipelines.forecast import forecast_of, lines
from pipelines.pipeline import check, nodes, plan
from pipelines.recipe import Recipe
from pipelines.retraining import as_of_today, asked, recipe_of_today
from xtuner_core.durable import write_json
from xtuner_core.errors import BUG, DataError, Interrupted, UserError


@flow(name="finetune-flow", flow_run_name=run_name, persist_result=False, log_prints=False)
def finetune_flow(
    recipe: AskedRecipe = DEMO,
    changes: tuple[str, ...] = (),
    store: Path = Path("artifacts"),
    trigger: Trigger = "hand",
    recheck: bool = False,
) -> State[Any]:
    """Fine-tune the recipe's model, judge it and talk to it; every stage whose artifact is whole is shown as `Cached`.

    A model that does not pass the recipe's gate or the chat test fails the run; what was made stays.

    Args:
        recipe: The name of a shipped recipe (`xtuner list-cfg`), a YAML file on the machine that runs it, or the whole recipe.
        changes: Fields that differ from the recipe, each as field=value, for example train.total_step=20.
        store: Folder of the artifacts, on the machine that runs it; relative to the project.
        trigger: Why it runs. Unless by hand, a run ends at once when there is nothing new to learn.
        recheck: Hash every artifact that is found again, whatever its time stamps say.
    """
    home = Store(store, full=recheck)
    try:
        written = asked(recipe, changes)
        today = as_of_today(written, home)
        check(today)
        require_runner(today)
        label(today, trigger)
        earlier = made_before(home)
        idle = None if earlier else nothing_to_learn(written, today, home, trigger)
    except UserError as error:
        return failed(error)
    if idle:
        return idle
    with board(today, home) as shown:
        results, ended = found_again(today, earlier, home) if earlier else run_stages(today, home, shown)
        if ended:
            return ended
        shown.results.update(results)
        summary = summarize(today, results)
        try:
            told = conclude(written, home, results, summary, faults(summary))
        except UserError as error:
            return failed(error)
    if not summary["ok"]:
        unfit = Unfit(f"the model was made, but {faults(summary)}.", (summary, table(results)))
        return Failed(message=str(unfit), data=unfit)
    return Completed(message=f"all stages are whole; {told}", data=(summary, table(results)))


def foretell(recipe: Recipe, store: Store) -> None:
    """Log what the run will take, and warn of what will not fit, before it starts."""
    log = get_run_logger()
    for line in lines(forecast_of(recipe, store)):
        (log.warning if line.startswith("warning: ") else log.info)(line)


def run_stages(recipe: Recipe, store: Store, shown: Board) -> tuple[dict[str, Result], State[Any] | None]:
    """What the stages made or found, in order, and the state of the one that ended the run before its end."""
    foretell(recipe, store)
    results: dict[str, Result] = {}
    made: dict[str, Artifact] = {}
    deadline = time.monotonic() + 3600 * recipe.timeout_hours if recipe.timeout_hours else None
    for node in nodes(recipe):
        if node.stage is prepare.STAGE and (filled := fill_cache(recipe, store, made["base"])) and not filled.is_completed():
            return results, filled
        left = None if deadline is None else max(0.01, deadline - time.monotonic())
        state = task_of(node, left)(recipe, store, made, return_state=True)
        outcome = state.result(raise_on_failure=False)
        if not isinstance(outcome, Result):
            shown.failed(node.name, state.message or state.name or "")
            return results, ended_in(node.name, state, recipe.timeout_hours)
        results[node.name], made[node.name] = outcome, outcome.artifact
        shown.done(node.name, outcome)
    return results, None


def run(
    recipe: str,
    *,
    overrides: Annotated[list[str] | None, Parameter("--set")] = None,
    store: Path = Path("artifacts"),
    json: Path | None = None,
    recheck: bool = False,
) -> int:
    """Run the flow once and report; returns the exit code."""
    changes, home = tuple(overrides or ()), store.resolve()
    try:
        with signs_of_life(not _is_cached(recipe, changes, Store(home))):
            state = finetune_flow(recipe, changes, home, recheck=recheck, return_state=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; finished stages are kept, run the same command again to continue.", file=sys.stderr)
        return Interrupted.exit_code
    outcome = state.result(raise_on_failure=False)
    told = outcome.told if isinstance(outcome, Unfit) else outcome
    if not isinstance(told, tuple):
        print(f"error: {state.message}", file=sys.stderr)
        return outcome.exit_code if isinstance(outcome, UserError) else BUG
    summary, text = told
    if json:
        write_json(json, summary)
    print(f"\n{text}\n")
    if not summary["ok"]:
        print(f"error: {state.message}", file=sys.stderr)
        return DataError.exit_code
    print(f"{state.message}\nTalk to it: xtuner chat {_model(summary)}")
    return 0


def _is_cached(recipe: str, changes: tuple[str, ...], store: Store) -> bool:
    return all(step.state == "cached" for step in plan(recipe_of_today(recipe, changes, store), store))


def _model(summary: dict[str, Any]) -> Path:
    convert = next(stage for stage in summary["stages"] if stage["name"] == "convert")
    return Path(convert["artifact"]) / "payload" / "model"


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    program = App(name="python -m flows.finetune", default_command=run)
    sys.exit(program(result_action="return_value"))
