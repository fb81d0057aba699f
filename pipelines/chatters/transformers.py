"""`transformers serve` of this environment, on loopback: needs no GPU, takes one if there is one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.chatters import LOOPBACK, Endpoint, Request
from pipelines.chatters._server import MODEL, running
from pipelines.stage import Log


def unavailable() -> str | None:
    """It is part of this environment."""
    return None


@contextmanager
def serve(request: Request, log_file: Path, log: Log) -> Iterator[Endpoint]:
    """Serve a Hugging Face folder in the precision of its weights.

    Raises:
        RecipeError, UserError: as `running`.
    """
    with TemporaryDirectory(prefix="xtuner-chat-") as folder:
        _lay_out(request.model_dir.resolve(), Path(folder, MODEL))
        with running(command, request, log_file, log, cwd=Path(folder)) as endpoint:
            yield endpoint


def command(port: int) -> list[str]:
    """The server's argument list; it runs in the folder that holds `MODEL`."""
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve", MODEL]
    return [*serve, "--host", LOOPBACK, "--port", str(port), "--device", "auto", "--dtype", "auto"]


def _lay_out(model_dir: Path, served: Path) -> None:
    """Links to the model's files, under a name without an `@` (which the server takes for a revision).

    The generation config says `do_sample`: otherwise the server ignores a request's temperature. (Temperature 0 is greedy nevertheless.)
    """
    served.mkdir()
    for item in model_dir.iterdir():
        (served / item.name).symlink_to(item)
    generation = served / "generation_config.json"
    with suppress(FileNotFoundError, ValueError):
        sampling = json.loads(generation.read_text(encoding="utf-8")) | {"do_sample": True}
        generation.unlink()
        generation.write_text(json.dumps(sampling), encoding="utf-8")
