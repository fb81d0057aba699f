"""`xtuner serve`: a model for others, behind OpenAI's protocol, until Ctrl-C."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from cyclopts.types import PositiveInt

from pipelines.commands.recipe_options import DEFAULT_STORE, StoreDir

if TYPE_CHECKING:
    from pipelines.chatters import Endpoint

app = App(name="serve")
TOKEN = "XTUNER_TOKEN"  # noqa: S105 - the name of a variable
POLL_SECONDS = 1


@app.default
def serve(
    model: Annotated[str, Parameter(help="A model folder, a convert artifact, or NAME@NUMBER or NAME@production of the registry.")],
    *,
    adapter: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    chatter: str = "auto",
    token_file: Path | None = None,
    start_timeout: PositiveInt = 900,
    store: StoreDir = DEFAULT_STORE,
) -> None:
    """Serve a model by OpenAI's protocol until Ctrl-C.

    Parameters
    ----------
    adapter
        A LoRA folder (peft's form) to merge into the model first.
    host
        Where to listen; an address that others can reach needs a token.
    port
        0: a free one.
    chatter
        A module of pipelines/chatters; auto: lmdeploy where it can run, else transformers.
    token_file
        File with the token that clients must send; or set the environment variable XTUNER_TOKEN.
    start_timeout
        Seconds until the server must be healthy.
    """
    from tempfile import TemporaryDirectory

    from pipelines import chatters
    from pipelines.chatters import Request
    from pipelines.chatters._server import require_safe, usable_port
    from pipelines.served_model import model_to_serve, named_model
    from xtuner_core.errors import RecipeError

    token = token_file.read_text(encoding="utf-8", errors="replace").strip() if token_file else os.environ.get(TOKEN) or None
    if chatter == "openai":
        raise RecipeError("chatter openai is a server that runs already; to serve a model choose another one.")
    start = chatters.choose(chatter).serve
    chosen = named_model(model, store)
    require_safe(Request(chosen, host, port, token))  # before an adapter is merged, which may take minutes
    usable_port(port, host)
    try:
        with model_to_serve(chosen, adapter) as folder, TemporaryDirectory(prefix="xtuner-serve-") as logs:
            log_file = Path(logs, "server.log")
            print(f"loading {folder}; the server's output: {log_file}", flush=True)
            request = Request(folder, host, port, token, start_timeout)
            with start(request, log_file, lambda message: None) as endpoint:
                print(_how_to_ask(endpoint, token is not None), flush=True)
                _stay(log_file)
    except KeyboardInterrupt:
        print("\nstopped", flush=True)


def _how_to_ask(endpoint: Endpoint, with_token: bool) -> str:
    header = f' -H "Authorization: Bearer ${TOKEN}"' if with_token else ""
    body = f'{{"model": "{endpoint.model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    ask = f"curl {endpoint.base_url}/chat/completions -H 'Content-Type: application/json'{header} -d '{body}'"
    return f"base_url: {endpoint.base_url}\nmodel:    {endpoint.model}\n{ask}\nCtrl-C ends."


def _stay(log_file: Path) -> None:
    """Until Ctrl-C, or until one of the processes that serve has ended."""
    import psutil

    from pipelines.processes import tail
    from xtuner_core.errors import UserError

    servers = psutil.Process().children()
    while all(server.status() != psutil.STATUS_ZOMBIE for server in servers):
        time.sleep(POLL_SECONDS)
    raise UserError(f"the chat server has ended. The end of its log:\n{tail(log_file)}")
