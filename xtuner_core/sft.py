"""Supervised fine-tuning, one process of it: `torchrun --nproc-per-node N -m xtuner_core.sft --config FILE.json`.

torchrun exits with 1 whatever a rank's code was, so the outcome (exit code and message) is also written to `WORK_DIR/outcome.json`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pydantic import ValidationError

from xtuner_core.config import SftConfig
from xtuner_core.durable import write_json
from xtuner_core.errors import RecipeError, UserError, from_os_error
from xtuner_core.signals import StopRequest, die_with_parent

OUTCOME = "outcome.json"


def read_config(path: Path) -> SftConfig:
    """The run's configuration (RecipeError names the field that is wrong)."""
    try:
        return SftConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"--config {path}: {error.strerror}.") from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise RecipeError(f"--config {path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}.") from None


def run(config: SftConfig, stop: StopRequest) -> None:
    """Join the other ranks and train."""
    from xtuner_core.parallel.mesh import join_world
    from xtuner_core.trainer import train

    with join_world() as world:
        train(config, world, stop)


def main(arguments: list[str] | None = None) -> int:
    """Train, and report a failure on stderr, as exit code, and in the outcome file."""
    parser = argparse.ArgumentParser(prog="python -m xtuner_core.sft", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="JSON file with the fields of xtuner_core.config.SftConfig")
    path = parser.parse_args(arguments).config
    die_with_parent()
    stop = StopRequest()
    work_dir = None
    try:
        config = read_config(path)
        work_dir = config.work_dir
        work_dir.mkdir(parents=True, exist_ok=True)
        run(config, stop)
        return 0
    except UserError as error:
        return _report(work_dir, error)
    except OSError as error:
        return _report(work_dir, from_os_error(error))


def _report(work_dir: Path | None, error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    if work_dir is not None and os.environ.get("RANK", "0") == "0":
        try:
            write_json(work_dir / OUTCOME, {"code": error.exit_code, "message": str(error)})
        except OSError as failure:
            print(f"error: the outcome could not be written: {failure}", file=sys.stderr, flush=True)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
