"""The `xtuner` command. Every command imports what it needs when it runs, so that help and plan answer at once."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from pipelines.commands import cache, chat, convert, environments, lineage, models, serve, service
from pipelines.commands.recipe_options import DEFAULT_STORE, STAGES, Overrides, RecipeName, StoreDir, run_stage
from xtuner_core.errors import BUG, RecipeError, UserError, from_os_error

INTERRUPTED = 75


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("xtuner-pipeline")
    except PackageNotFoundError:
        return "not installed"


app = App(
    name="xtuner",
    help="Fine-tune a language model: prepare → train → convert → eval → chat, a verifiable artifact after every stage.",
    version=_version,
    version_flags=["--version"],
    help_format="plaintext",
)
for commands in (convert.app, chat.app, serve.app, environments.app, cache.app):
    app.command(commands)
for command in (service.up, service.down, service.status):
    app.command(command, group=service.SERVICE)
for group in (models, lineage):
    group.add_to(app)

_PREFECT_DEFAULTS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # a busy machine needs more than Prefect's 20 s
}
"""For the temporary server; the user's own settings win."""


@app.command(name="list-cfg")
def list_cfg(*, pattern: Annotated[str, Parameter(name=["--pattern", "-p"])] = "") -> None:
    """List the shipped recipes."""
    from pipelines.recipe import load_recipe, shipped_names

    for name in shipped_names():
        if pattern in name:
            print(f"{name}\n    {load_recipe(name).description}")


@app.command(name="list-suites")
def list_suites() -> None:
    """List the shipped suites of data sets, and the kinds of data set that a suite or a recipe may name."""
    from pipelines.evaluate import kinds
    from pipelines.suites import load_suite, shipped_names

    for name in shipped_names():
        suite = load_suite(name)
        print(f"{name}\n    {suite.description}")
        print(*(f"    {dataset.name} ({dataset.kind})" for dataset in suite.datasets), sep="\n")
    print("\nkinds")
    for name, kind in sorted(kinds().items()):
        print(f"    {name:<12} {kind.about}")


@app.command(name="copy-cfg")
def copy_cfg(name: str, folder: Path) -> None:
    """Copy a shipped recipe to FOLDER/NAME_copy.yaml, to change it there."""
    from pipelines.recipe import recipe_file

    source = recipe_file(name)
    target = folder / f"{source.stem}_copy.yaml"
    if target.exists():
        raise RecipeError(f"{target} exists already; move it away or choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    print(target)


@app.command
def plan(
    recipe: RecipeName,
    stage: str | None = None,
    *,
    overrides: Overrides = None,
    store: StoreDir = DEFAULT_STORE,
    why: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Say which stages are cached, which will run and why, how long all takes, and whether it fits this machine.

    Parameters
    ----------
    stage
        With --why: of this stage only.
    why
        Name everything that changed since the recipe's last run: fields, files, libraries, inputs.
    """
    from pipelines.artifacts import Store
    from pipelines.forecast import forecast, lines, this_machine
    from pipelines.pipeline import explain
    from pipelines.pipeline import plan as make_plan
    from pipelines.retraining import as_of_today, asked, beginning

    home, written = Store(store), asked(recipe, overrides)
    chosen = as_of_today(written, home)
    steps = list(make_plan(chosen, home))
    if stage is not None and stage not in (known := [step.node.name for step in steps]):
        raise RecipeError(f"{stage}: no stage of this run; they are {', '.join(known)}.")
    for step in steps if stage is None else [step for step in steps if step.node.name == stage]:
        print(f"{step.node.name:<15} {step.state:<9} {step.why}")
        for line in explain(step) if why or stage else ():
            print(f"    {line}")
    if stage is None:
        print(*lines(forecast(steps, chosen, home, this_machine())), sep="\n")
        if written.retrain.start == "production":
            print(beginning(written, home).why)


@app.command
def run(
    recipe: RecipeName,
    *,
    overrides: Overrides = None,
    store: StoreDir = DEFAULT_STORE,
    json: Path | None = None,
    recheck: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Run the whole flow under Prefect (a temporary server, unless PREFECT_API_URL names one).

    Parameters
    ----------
    json
        Write stages, scores and the verdict to this file.
    recheck
        Hash every artifact that is found again, whatever its time stamps say.
    """
    from pipelines.artifacts import Store
    from pipelines.pipeline import check
    from pipelines.retraining import recipe_of_today

    check(recipe_of_today(recipe, overrides, Store(store)))  # a mistake is told before Prefect starts
    options = [f"--set={override}" for override in overrides or []] + [f"--store={store}"] + ([f"--json={json}"] if json else [])
    options += ["--recheck"] if recheck else []
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "flows.finetune", recipe, *options], {**_PREFECT_DEFAULTS, **os.environ})


@app.command(group=STAGES)
def prepare(recipe: RecipeName, *, overrides: Overrides = None, store: StoreDir = DEFAULT_STORE) -> None:
    """Files of conversations → packed token ids with loss masks, and a report."""
    run_stage("prepare", recipe, overrides, store)


@app.command(group=STAGES)
def train(recipe: RecipeName, *, overrides: Overrides = None, store: StoreDir = DEFAULT_STORE) -> None:
    """Packed data → trained weights, by torchrun; resumes an interrupted run."""
    run_stage("train", recipe, overrides, store)


@app.command(name="eval", group=STAGES)
def evaluate(recipe: RecipeName, *, overrides: Overrides = None, store: StoreDir = DEFAULT_STORE) -> None:
    """Judge base, production and tuned model on the held-out sets and print the verdict; exit code 65 if the gate is not passed."""
    from pipelines.artifacts import Store
    from pipelines.retraining import recipe_of_today
    from pipelines.runner import run_until
    from xtuner_core.errors import DataError

    chosen = recipe_of_today(recipe, overrides, Store(store))
    verdict = run_until("verdict", chosen, Store(store), lambda message: print(message, flush=True)).artifact
    print("", (verdict.payload / "report.md").read_text(encoding="utf-8"), f"All of it: {verdict.record / 'report.html'}", sep="\n")
    if not verdict.metrics["gate"]["passed"]:
        raise DataError("the model does not pass the gate; the rules that do not hold are marked above. What was made is kept.")


@app.command
def preview(
    recipe: RecipeName,
    *,
    count: Annotated[int, Parameter(name=["--count", "-n"])] = 3,
    seed: int = 0,
    line: str | None = None,
    validation: Annotated[bool, Parameter(negative=())] = False,
    tokens: Annotated[bool, Parameter(negative=())] = False,
    overrides: Overrides = None,
    store: StoreDir = DEFAULT_STORE,
) -> None:
    """Print samples as they are trained on: in colours, or with what the model learns to write between ⟦ and ⟧.

    Parameters
    ----------
    count
        How many samples.
    seed
        Decides which.
    line
        FILE:LINE; show what became of this line of an input file instead.
    validation
        Choose among the samples that are kept back for the validation loss.
    tokens
        Show where each token begins.
    """
    from pipelines.artifacts import Store
    from pipelines.preview import choose, documents_of, open_prepared, show
    from pipelines.retraining import recipe_of_today
    from pipelines.runner import run_until

    chosen = recipe_of_today(recipe, overrides, Store(store))
    prepared, base = (
        run_until(name, chosen, Store(store), lambda message: print(message, file=sys.stderr)).artifact for name in ("prepare", "base")
    )
    data = open_prepared(prepared.payload, prepared.record, base.payload / "model")
    show(data, documents_of(data, line) if line else choose(data, count, seed, validation), tokens)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code says how it went, and a user's mistake is told without a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # the terminal is gone; with nohup it is ignored
        signal.signal(signal.SIGHUP, _terminate)
    # Read when torch loads. Waiting threads spin a tenth of a millisecond, then sleep: nearly free alone, fair beside other processes.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    try:
        app(arguments, exit_on_error=False, print_error=True, result_action="return_value")
        return 0
    except CycloptsError:
        return RecipeError.exit_code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; finished stages are kept, run the same command again to continue.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    except OSError as error:
        told = from_os_error(error)
        print(f"error: {told}", file=sys.stderr)
        return told.exit_code
    except Exception:
        traceback.print_exc()
        print("This is a bug in xtuner, not in your recipe; please report it with the lines above.", file=sys.stderr)
        return BUG


if __name__ == "__main__":
    sys.exit(main())
