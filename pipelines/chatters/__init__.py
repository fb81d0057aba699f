"""How a model is served: one module each, found by its name. A module has:

* `serve(request, log_file, log)`, a context manager: inside it the model answers at the `Endpoint` it yields, after it the server and
  all its children are gone, also if we are killed; the server's own output goes to `log_file`
* `unavailable() -> str | None`: why this machine cannot run it, and what to do; None if it can
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from pipelines.environments import KNOWN, pinned_versions
from xtuner_core import registry
from xtuner_core.digest import library_version
from xtuner_core.errors import RecipeError

LOOPBACK = "127.0.0.1"
START_SECONDS = 900
"""A large model may come from a slow disk."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is served, and where."""

    model_dir: Path
    host: str = LOOPBACK
    port: int | None = None
    """None or 0: a free one."""
    token: str | None = field(default=None, repr=False)
    """Clients must send it (`Authorization: Bearer`); needed for any host but loopback."""
    start_timeout: int = START_SECONDS
    """Seconds until the server must be healthy."""
    url: str | None = None
    """A server that runs already (chatter openai)."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an OpenAI client finds the model."""

    base_url: str
    model: str
    """The name that requests must give."""
    api_key: str = field(default="none", repr=False)


def choose(name: str) -> ModuleType:
    """The module called `name`; `auto` is lmdeploy where it can run, else transformers.

    Raises:
        RecipeError: there is no such module, or this machine cannot run it; names the reason.
    """
    if name == "auto":
        lmdeploy = registry.find(sys.modules[__name__], "lmdeploy")
        return lmdeploy if lmdeploy.unavailable() is None else choose("transformers")
    module = registry.find(sys.modules[__name__], name)
    if reason := module.unavailable():
        raise RecipeError(f"chatter {name} cannot run here: {reason}")
    return module


def facts(name: str) -> dict[str, Any]:
    """What decides answers about the chatter that `name` means on this machine: which one it is, and the versions of its software (of a
    server that runs already nothing is known)."""
    name = choose(name).__name__.rpartition(".")[2] if name == "auto" else name
    if name == "openai":
        return {"chatter": name}
    pins = pinned_versions(KNOWN[name].constraints) if name in KNOWN else {}
    software = {one: pins.get(one) or library_version(one) for one in (name, "torch", "tokenizers", "transformers")}
    return {"chatter": name, "software": software}
