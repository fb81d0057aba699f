"""`lmdeploy serve api_server`, from an environment of its own: needs a CUDA GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines import environments
from pipelines.chatters import LOOPBACK, Endpoint, Request
from pipelines.chatters._server import MODEL, running
from pipelines.stage import Log


def unavailable() -> str | None:
    """Why it cannot serve here: no GPU, or its environment is not built."""
    if not environments.cuda_is_visible():
        return "LMDeploy generates on a CUDA GPU only, and none is visible. Use chatter transformers."
    if environments.built("lmdeploy") is None:
        return "its environment is not built. Run `xtuner env create lmdeploy` (several gigabytes)."
    return None


@contextmanager
def serve(request: Request, log_file: Path, log: Log) -> Iterator[Endpoint]:
    """Serve a Hugging Face folder with TurboMind where it knows the architecture, else with LMDeploy's PyTorch engine (its own choice).

    Raises:
        RecipeError, UserError: as `running`.
    """
    python = environments.ensure("lmdeploy", log)
    with running(lambda port: [str(python), *arguments(request.model_dir.resolve(), port)], request, log_file, log) as endpoint:
        yield endpoint


def arguments(model_dir: Path, port: int) -> list[str]:
    """What follows `python`. LMDeploy's own defaults are every address, any web page's requests, and pages of documentation."""
    serve = ["-m", "lmdeploy", "serve", "api_server", str(model_dir), "--model-name", MODEL]
    return [
        *serve,
        "--server-name",
        LOOPBACK,
        "--server-port",
        str(port),
        "--allow-origins",
        f"http://{LOOPBACK}",
        "--disable-fastapi-docs",
    ]
