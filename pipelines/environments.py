"""Separate virtual environments for tools whose pins contradict ours, built on demand from a file of exact versions.

    .environments/<name>-<digest>/                 the environment; the digest is of its constraints and the Python version
    .environments/<name>-<digest>/complete.json    written last: without it the environment is half-made and is built again
    .environments/<name>-<digest>.log              what pip said

By hand: `xtuner env create|list|check NAME`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from pipelines.processes import child, follow, tail
from pipelines.recipe import PROJECT
from pipelines.stage import Log
from xtuner_core.durable import remove, write_json
from xtuner_core.errors import RecipeError, StorageError

ROOT = PROJECT / ".environments"
INSIDE = Path(__file__).with_name("inside_environment.py")
CHECK_SECONDS = 600
"""A first import compiles thousands of files."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What is installed: `first` alone, because it may come from a source of its own, then `package`."""

    constraints: Path
    """Exact versions, as `pip freeze` writes them; names both packages."""
    first: str
    package: str
    modules: tuple[str, ...] = ()
    """What must import in it."""
    nothing_else: bool = False
    """The constraints are all that is installed, whatever the packages ask for beside it."""
    needs_cuda: bool = False


WITHOUT_CUDA = "-without-cuda"
KNOWN: Mapping[str, Environment] = {
    "opencompass": Environment(
        PROJECT / "constraints-opencompass.txt", first="torch", package="opencompass", modules=("opencompass.cli.main",)
    ),
    "lmdeploy": Environment(
        PROJECT / "constraints-lmdeploy.txt",
        first="torch",
        package="lmdeploy",
        modules=("lmdeploy.cli", "lmdeploy.turbomind", "lmdeploy.serve.openai.api_server"),
        needs_cuda=True,
    ),
    f"lmdeploy{WITHOUT_CUDA}": Environment(
        PROJECT / "constraints-lmdeploy-without-cuda.txt",
        first="torch",
        package="lmdeploy",
        modules=("lmdeploy.cli", "lmdeploy.archs", "lmdeploy.pytorch.config"),
        nothing_else=True,
    ),
}


@dataclass(frozen=True, slots=True)
class State:
    """An environment on this disk."""

    name: str
    path: Path
    complete: bool


def ensure(name: str, log: Log, torch_index_url: str | None = None, root: Path = ROOT, known: Mapping[str, Environment] = KNOWN) -> Path:
    """The python of the environment, which is built if it is missing or half-made (about a minute, network needed).

    Raises:
        RecipeError: no such environment, or it needs a GPU that is not there.
        StorageError: it cannot be built; names pip's complaint, the log and what to do.
    """
    folder = _folder(name, _known(name, known), root)
    if known[name].needs_cuda and not cuda_is_visible():
        raise RecipeError(
            f"environment {name} needs a CUDA GPU, and none is visible here: its engines run on nothing else, and most of its gigabytes "
            "are CUDA libraries. To chat on this machine use chatter transformers. For what works without a GPU (imports, check_env, the "
            f"argument parser): `xtuner env create {name} --without-cuda`."
        )
    if not _is_complete(folder):
        log(f"environment {name} is missing: building {folder}, or waiting for the run that does (output: {_output(folder)})")
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{folder.name}.lock"):
            if not _is_complete(folder):
                _build(folder, name, known[name], torch_index_url, log)
    return _python(folder)


def built(name: str, root: Path = ROOT, known: Mapping[str, Environment] = KNOWN) -> Path | None:
    """The python of an environment that is built; None if it is not."""
    folder = _folder(name, _known(name, known), root)
    return _python(folder) if _is_complete(folder) else None


def list_environments(root: Path = ROOT, known: Mapping[str, Environment] = KNOWN) -> list[State]:
    """Every known environment, built or not."""
    folders = [(name, _folder(name, environment, root)) for name, environment in known.items()]
    return [State(name, folder, _is_complete(folder)) for name, folder in folders]


def check(name: str, root: Path = ROOT, known: Mapping[str, Environment] = KNOWN) -> list[str]:
    """What is wrong with an environment: not built, other versions than the pinned ones, a module that does not import, a broken
    requirement; each with what to do. None: it answers as it should.

    Raises:
        RecipeError: no such environment.
    """
    environment = _known(name, known)
    folder = _folder(name, environment, root)
    if not _is_complete(folder):
        return [f"{folder} is not built, or only half; run `xtuner env create {name.replace(WITHOUT_CUDA, ' --without-cuda')}`."]
    asked = json.dumps({"versions": pinned_versions(environment.constraints), "modules": environment.modules})
    found = _answer(folder, [str(INSIDE)], asked)
    if not environment.nothing_else:
        found += [line for line in _answer(folder, ["-m", "pip", "check"]) if "No broken requirements" not in line]
    advice = f"`rm -r {folder}`, then `xtuner env create {name.replace(WITHOUT_CUDA, ' --without-cuda')}`"
    return [*found, f"To build it anew: {advice}."] if found else []


def _answer(folder: Path, arguments: list[str], question: str = "") -> list[str]:
    """The lines that the environment's Python prints; how it ended if it fails without any."""
    command = [str(_python(folder)), "-I", *arguments]
    try:
        done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"its Python does not answer: {error}"]
    lines = done.stdout.splitlines()
    if done.returncode == 0 or lines:
        return lines
    return [f"its Python ended with status {done.returncode}: {''.join(done.stderr.splitlines()[-1:]) or 'without a word'}"]


def cuda_is_visible() -> bool:
    """Whether a CUDA program would find a GPU, without starting one."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(Path("/dev").glob("nvidia[0-9]*"))


def pinned_versions(constraints: Path) -> dict[str, str]:
    """Package → version, from `name==version` lines."""
    lines = (line.split("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    return {name: version for name, equals, version in (line.partition("==") for line in lines) if equals}


def _known(name: str, known: Mapping[str, Environment]) -> Environment:
    if name not in known:
        raise RecipeError(f"environment {name!r} is not one of {', '.join(known)}.")
    return known[name]


def _folder(name: str, environment: Environment, root: Path) -> Path:
    decides = environment.constraints.read_bytes() + platform.python_version().encode()
    return root / f"{name}-{hashlib.sha256(decides).hexdigest()[:12]}"


def _output(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _is_complete(folder: Path) -> bool:
    """Finished, and the Python it was made from still exists (its `python` is a link to that)."""
    return (folder / "complete.json").is_file() and _python(folder).exists()


def _build(folder: Path, name: str, environment: Environment, torch_index_url: str | None, log: Log) -> None:
    """In place, because scripts of a virtual environment hold its path."""
    started = time.monotonic()
    remove(folder)
    remove(_output(folder))
    for command in _steps(folder, environment, torch_index_url):
        _run(command, folder, name, log)
    versions = pinned_versions(environment.constraints)
    write_json(folder / "complete.json", {"name": name, "python": platform.python_version(), "constraints": versions})
    log(f"environment {name} built in {time.monotonic() - started:.0f} s")


def _steps(folder: Path, environment: Environment, torch_index_url: str | None) -> Iterable[list[str]]:
    install = [str(_python(folder)), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    install += ["--no-compile"]  # of tens of thousands of files, those that are used are compiled when they are
    pinned = f"{environment.first}=={pinned_versions(environment.constraints)[environment.first]}"
    yield [sys.executable, "-m", "venv", str(folder)]
    # Its dependencies come unpinned: an index of torch alone rarely has our versions of them. The last step corrects them.
    yield [*install, pinned, *(["--index-url", torch_index_url] if torch_index_url else [])]
    if environment.nothing_else:
        yield [*install, "--no-deps", "--requirement", str(environment.constraints)]
    else:
        yield [*install, environment.package, "--constraint", str(environment.constraints)]


_WORTH_TELLING = re.compile(r"\(\d[\d.]* [MG]B\)|^Installing collected packages")


def _run(command: list[str], folder: Path, name: str, log: Log) -> None:
    def on_line(line: str) -> None:
        if _WORTH_TELLING.search(line):
            log(f"environment {name}: {line.strip()[:120]}")

    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    with child(command, _output(folder), env, grace=10) as running:
        status = follow(running, on_line)
    if status != 0:
        raise StorageError(
            f"environment {name} cannot be built: {_complaint(_output(folder)) or f'exit status {status}'}\n"
            f"All output: {_output(folder)}. Check the network and pip's sources (`pip config list`; a mirror: "
            "`pip config set global.index-url URL`; another source for torch alone: `make demo TORCH_INDEX_URL=URL`), "
            "then run the same command again."
        )


def _complaint(output: Path) -> str:
    """pip's last ERROR lines, or whatever came last."""
    lines = [line.strip() for line in tail(output, lines=100).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return "\n".join(errors[-2:] or lines[-1:])
