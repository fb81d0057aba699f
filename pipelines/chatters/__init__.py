"""How a model is served for chat: one module each with `serve(...)`; a module is found by its name.

`serve(model_dir, port, log_file, log)` is a context manager: inside it the model answers at the `Endpoint` it yields, after it the
server and all its children are gone. `port` None means a free one; the server's own output goes to `log_file`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an OpenAI client finds the model."""

    base_url: str
    model: str
    """The name that requests must give."""
