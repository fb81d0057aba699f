"""What training tools put before the names of a model's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

WRAPPERS = frozenset({"module", "model", "llm", "base_model"})
"""What they call the model inside their own module; a model may have such names itself."""
LAYER_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
"""What they put around the model or single layers of it; no model has such names."""


def prefixes(names: Iterable[str]) -> Iterator[str]:
    """Every beginning that all names share and that consists of wrappers' words, the shortest (nothing) first."""
    prefix, rest = "", set(names)
    while True:
        yield prefix
        first = {name.partition(".")[0] for name in rest}
        if len(first) != 1 or not first <= WRAPPERS:
            return
        prefix += f"{first.pop()}."
        rest = {name.partition(".")[2] for name in rest}
