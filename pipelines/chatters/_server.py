"""What chat servers that we start share: a port, a clean environment, the wait until they are healthy, the guard before them."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.chatters import LOOPBACK, Endpoint, Request
from pipelines.processes import Child, child, tail
from pipelines.stage import Log
from xtuner_core.errors import RecipeError, UserError

if TYPE_CHECKING:
    import psutil

MODEL = "model"
"""The name that requests give; a path would tell clients about our disk."""
GRACE_SECONDS = 10
POLL_SECONDS = 0.2
SHORTEST_TOKEN = 16
_GUARD = Path(__file__).with_name("_guard.py")
_PASSED_ON = (
    *("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "LD_LIBRARY_PATH", "CC", "CXX"),
    *("OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
)
_PASSED_ON_PREFIXES = ("CUDA_", "NVIDIA_", "NCCL_", "TRITON_", "TORCHINDUCTOR_")
_OURS = {
    "LANG": "C.UTF-8",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONSAFEPATH": "1",
    "PYTHONNOUSERSITE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads made answers ten times slower beside one other busy process (2 cores)
}


@contextmanager
def running(
    command: Callable[[int], Sequence[str]],
    request: Request,
    log_file: Path,
    log: Log,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Iterator[Endpoint]:
    """Inside the block the server `command(port)` is healthy; after it, it and all its children are gone.

    The server listens on that port of loopback; where a token is asked for, a guard before it answers at the request's address.

    Raises:
        RecipeError: the port is taken, or the address is not loopback and there is no token.
        UserError: the server ended, or was not healthy in `request.start_timeout` seconds; the message holds the end of its log.
    """
    require_safe(request)
    port, started = usable_port(request.port, request.host), time.monotonic()
    inner = port if request.token is None else usable_port(None)
    with ExitStack() as stack:
        doors = [(stack.enter_context(child(command(inner), log_file, env or environment(), GRACE_SECONDS, cwd=cwd)), LOOPBACK, inner)]
        if request.token is not None:
            guard = [sys.executable, "-I", str(_GUARD), request.host, str(port), str(inner), MODEL]
            secret = environment() | {"XTUNER_TOKEN": request.token}
            doors.append((stack.enter_context(child(guard, log_file, secret, GRACE_SECONDS)), request.host, port))
        _wait(doors, request.start_timeout)
        host = _to_reach(request.host)
        log(f"chat: the server answers on {host}:{port} after {time.monotonic() - started:.1f} s")
        yield Endpoint(f"http://{host}:{port}/v1", MODEL, request.token or "none")


def environment() -> dict[str, str]:
    """What a server needs of ours, without its secrets, and no network. Compiled kernels are kept in HOME, or where the user moved them."""
    wanted = {name: value for name, value in os.environ.items() if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)}
    return wanted | _OURS


def require_safe(request: Request) -> None:
    """RecipeError if others could use the model without a token worth the name."""
    if request.token is None:
        if request.host not in (LOOPBACK, "localhost"):
            raise RecipeError(
                f"{request.host}: an address other than {LOOPBACK} needs a token, because whoever reaches it could use the model. Give one "
                f"(--token-file FILE, or XTUNER_TOKEN), or stay on {LOOPBACK} and let others in with `ssh -L 8000:{LOOPBACK}:8000 HERE`."
            )
    elif len(request.token) < SHORTEST_TOKEN or not all("!" <= letter <= "~" for letter in request.token):
        raise RecipeError(
            f"the token must have at least {SHORTEST_TOKEN} characters, all printable ASCII without spaces. "
            "`openssl rand -hex 16` makes a good one."
        )


def _to_reach(host: str) -> str:
    """The host of a URL for a client on this machine."""
    if host in ("0.0.0.0", "localhost"):  # noqa: S104 - compared, not bound
        return LOOPBACK
    return f"[{'::1' if host == '::' else host}]" if ":" in host else host


def usable_port(port: int | None, host: str = LOOPBACK) -> int:
    """`port`, or a free one if it is None.

    Raises:
        RecipeError: another process has it, we may not use it, or there is no such address here.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise RecipeError(
                f"port {port or '(any)'} on {host} cannot be used: {reason.rstrip('.')}{_holder(port)}. Choose another one (--port, where "
                "0 is a free one, or chat.port of the recipe, without which it is a free one); the address must be one of this machine."
            ) from None
        return probe.getsockname()[1]


def _holder(port: int | None) -> str:
    """Who listens there, as far as we may know."""
    if port is None:
        return ""
    import psutil

    with suppress(psutil.Error):
        for pid in (connection.pid for connection in _listening(psutil.net_connections("tcp"), port) if connection.pid):
            return f" (process {pid}, {psutil.Process(pid).name()})"
    return ""


def _listening(connections: Sequence[Any], port: int) -> list[Any]:
    import psutil

    return [item for item in connections if item.status == psutil.CONN_LISTEN and item.laddr.port == port]


def _wait(doors: Sequence[tuple[Child, str, int]], timeout: int) -> None:
    """Until each child answers at its host and port."""
    deadline = time.monotonic() + timeout
    for server, host, port in doors:
        while not (_is_healthy(host, port) and _is_its_own(server.process.pid, port)):
            _complain(doors, timeout if time.monotonic() > deadline else None)
            time.sleep(POLL_SECONDS)


def _complain(doors: Sequence[tuple[Child, str, int]], timeout: int | None) -> None:
    for server, _, _ in doors:
        status = server.process.poll()
        if status is not None:
            raise UserError(f"the chat server ended with status {status} before it answered. The end of its log:\n{tail(server.output)}")
        if timeout is not None:
            raise UserError(
                f"the chat server did not answer within {timeout} s (chat.start_timeout, --start-timeout). "
                f"The end of its log:\n{tail(server.output)}"
            )


def _is_its_own(pid: int, port: int) -> bool:
    """Whether the server or a child of it listens there: another process may have taken the port while the model was loading."""
    import psutil

    with suppress(psutil.Error):
        server = psutil.Process(pid)
        return any(_listens(process, port) for process in (server, *server.children(recursive=True)))
    return False


def _listens(process: psutil.Process, port: int) -> bool:
    import psutil

    with suppress(psutil.Error):
        return bool(_listening(process.net_connections("tcp"), port))
    return False


def _is_healthy(host: str, port: int) -> bool:
    import http.client

    connection = http.client.HTTPConnection(_to_reach(host).strip("[]"), port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
