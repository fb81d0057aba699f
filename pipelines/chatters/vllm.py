"""`vllm serve`, if the user has installed it (`vllm` on the PATH): we never install it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.chatters import LOOPBACK, Endpoint, Request
from pipelines.chatters._server import MODEL, environment, running
from pipelines.stage import Log


def unavailable() -> str | None:
    """Why it cannot serve here."""
    if shutil.which("vllm") is None:
        return "no `vllm` on the PATH. Install vLLM in an environment of its own and put that environment's bin folder on the PATH."
    return None


@contextmanager
def serve(request: Request, log_file: Path, log: Log) -> Iterator[Endpoint]:
    """Serve a Hugging Face folder.

    Raises:
        RecipeError, UserError: as `running`.
    """
    env = environment() | {"VLLM_NO_USAGE_STATS": "1"}
    with running(lambda port: command(request.model_dir.resolve(), port), request, log_file, log, env) as endpoint:
        yield endpoint


def command(model_dir: Path, port: int) -> list[str]:
    """The server's argument list; by default it would listen on every address and answer any web page."""
    serve = ["vllm", "serve", str(model_dir), "--served-model-name", MODEL]
    return [*serve, "--host", LOOPBACK, "--port", str(port), "--allowed-origins", "[]"]
