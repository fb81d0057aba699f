"""`transformers serve` of this environment, on loopback: needs no GPU, takes one if there is one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.chatters import LOOPBACK, Endpoint, Request
from pipelines.chatters._server import running, usable_port
from pipelines.stage import Log

MODEL = "model"
_NO_NETWORK = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONSAFEPATH": "1"}
_POLITE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Waiting threads sleep: spinning ones made answers ten times slower beside one other busy process (2 cores)."""


def unavailable() -> str | None:
    """It is part of this environment."""
    return None


@contextmanager
def serve(request: Request, log_file: Path, log: Log) -> Iterator[Endpoint]:
    """Serve a Hugging Face folder in the precision of its weights.

    Raises:
        RecipeError: the port is taken.
        UserError: the server ended or did not answer in time; the message holds the end of its log.
    """
    port = usable_port(request.port)
    with TemporaryDirectory(prefix="xtuner-chat-") as folder:
        _lay_out(request.model_dir.resolve(), Path(folder, MODEL))
        with running(command(port), _POLITE | os.environ | _NO_NETWORK, port, request, log_file, log, cwd=Path(folder)):
            yield Endpoint(f"http://{LOOPBACK}:{port}/v1", MODEL)


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
