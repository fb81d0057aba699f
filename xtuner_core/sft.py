"""Supervised fine-tuning, one process of it: `torchrun --nproc-per-node N -m xtuner_core.sft FLAGS`, or without torchrun as the only one.

torchrun exits with 1 whatever a rank's code was, so the outcome (exit code and message) is also written to `WORK_DIR/outcome.json`.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from xtuner_core import determinism, run_record
from xtuner_core.arguments import Arguments, parse
from xtuner_core.config import SftConfig
from xtuner_core.determinism import switches
from xtuner_core.durable import write_json
from xtuner_core.errors import Interrupted, RecipeError, UserError, from_os_error
from xtuner_core.run_config import RunConfig, is_prepared, merge, prepared_run, read_tree, whole_run
from xtuner_core.signals import StopRequest, die_with_parent

OUTCOME = "outcome.json"
DONE = "done"


def read_config(path: Path) -> SftConfig:
    """A run on data that is packed already (RecipeError names the field that is wrong)."""
    return prepared_run(read_tree(path), f"--config {path}")


def asked(arguments: Arguments) -> SftConfig | RunConfig:
    """What the command line and its file ask for.

    Raises:
        RecipeError: a field is wrong, or a flag has no place in a run on prepared data.
    """
    tree = read_tree(arguments.config) if arguments.config else {}
    source = f"--config {arguments.config}" if arguments.config else "command line"
    if not is_prepared(tree):
        return whole_run(merge(tree, arguments.values), source, processes_of_this_run())
    if foreign := [".".join(field) for field in arguments.values if field[0] not in ("train", "seed", "work_dir")]:
        raise RecipeError(f"{source}: it names data and a model that are prepared; {', '.join(foreign)} cannot be changed any more.")
    return prepared_run(merge(tree, arguments.values), source)


def run(config: SftConfig, stop: StopRequest) -> None:
    """Join the other ranks and train."""
    with stop.at_once("the libraries were loaded"):
        from xtuner_core.dry_run import out_of_memory_told
        from xtuner_core.metrics import say
        from xtuner_core.models.attention_kernels import described
        from xtuner_core.parallel.mesh import join_world
        from xtuner_core.trainer import train

    determinism.apply(switches())
    with join_world() as world, out_of_memory_told(config, world):
        say(world.rank, f"environment: {switches().described()}; attention: {described(switches().use_fa3, world.device)}")
        train(config, world, stop)


def run_whole(asked: RunConfig, stop: StopRequest) -> None:
    """Let rank 0 prepare, then train.

    Raises:
        Interrupted: a signal came; what is finished is kept.
    """
    try:
        with stop.at_once("the run was prepared"):
            from xtuner_core.parallel.rendezvous import sharing

            share = sharing()  # kept to the end: with it the store would go
            settled = share(lambda: prepare(asked))
    except Interrupted:
        if not _is_first():  # the launcher ends the ranks that wait for the first
            raise SystemExit(Interrupted.exit_code) from None
        raise
    if settled == DONE:
        if _is_first():
            print(f"nothing to do: {asked.work_dir / 'final'} is this run's result. Start over with --no-resume.", flush=True)
        return
    config = SftConfig.model_validate_json(settled)
    comment = "failed"
    try:
        run(config, stop)
        comment = "finished"
    except Interrupted as stopped:
        comment = "stopped"
        raise stopped if asked.resume else Interrupted(f"{stopped} Leave out --no-resume, which would start over again.") from None
    finally:
        if _is_first():
            run_record.end(config, processes_of_this_run(), comment)


def prepare(asked: RunConfig) -> str:
    """What to train as JSON, with all of it in place; DONE if the result is there."""
    from xtuner_core.metrics import say
    from xtuner_core.preparation import prepare_run

    config = prepare_run(asked, processes_of_this_run(), lambda line: say(0, line))
    return config.model_dump_json() if config else DONE


def processes_of_this_run() -> int:
    """How many torchrun started; one without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def main(arguments: list[str] | None = None) -> int:
    """Train, and report a failure on stderr, as exit code, and in the outcome file."""
    work_dir, stop = None, StopRequest()
    try:
        with ExitStack() as files:
            with stop.at_once("the settings were read"):
                config = asked(parse(sys.argv[1:] if arguments is None else arguments))
                switches()  # a mistake there is told before anything is prepared
                if "LOCAL_RANK" in os.environ:
                    die_with_parent()
            if isinstance(config, SftConfig):
                work_dir = config.work_dir
                work_dir.mkdir(parents=True, exist_ok=True)
                run(config, stop)
            else:
                if _is_first():
                    from xtuner_core.work_dir import claim

                    files.callback(claim(config.work_dir).release)
                work_dir = config.work_dir  # from here on it is ours to write to
                run_whole(config, stop)
        return 0
    except UserError as error:
        return _report(work_dir, error)
    except OSError as error:
        return _report(work_dir, from_os_error(error))


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _report(work_dir: Path | None, error: UserError) -> int:
    print(error if isinstance(error, Interrupted) else f"error: {error}", file=sys.stderr, flush=True)
    # Any rank may be the only one to fail, on its own disk say; that it was told to stop is for the first to say.
    if work_dir is not None and (_is_first() or not isinstance(error, Interrupted)):
        try:
            write_json(work_dir / OUTCOME, {"code": error.exit_code, "message": str(error)})
        except OSError as failure:
            print(f"error: the outcome could not be written: {failure}", file=sys.stderr, flush=True)
    return error.exit_code


if __name__ == "__main__":
    status = main()
    if "torch" not in sys.modules:  # it ended early
        sys.exit(status)
    from xtuner_core.parallel.mesh import leave

    leave(status)
