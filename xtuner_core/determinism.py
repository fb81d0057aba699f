"""The two environment switches that change numerics, read here and nowhere else. No torch import here: `xtuner plan` reads this file.

XTUNER_DETERMINISTIC   the same run gives the same bytes also on a GPU; slower
XTUNER_USE_FA3         attention by FlashAttention 3 where it is installed (it computes in another order than FlashAttention 2)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from xtuner_core.errors import RecipeError

DETERMINISTIC, USE_FA3 = "XTUNER_DETERMINISTIC", "XTUNER_USE_FA3"
_WORDS = {**dict.fromkeys(("1", "true", "yes", "on"), True), **dict.fromkeys(("", "0", "false", "no", "off"), False)}
CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Without a workspace of fixed size cuBLAS may split sums differently from call to call (NVIDIA, cuBLAS documentation, 2.1.4)."""


@dataclass(frozen=True, slots=True)
class Switches:
    """What the environment asks for."""

    deterministic: bool = False
    use_fa3: bool = False

    def facts(self) -> dict[str, bool]:
        """The switches that are on, by the name of their variable; nothing by default."""
        return {name: True for name, on in ((DETERMINISTIC, self.deterministic), (USE_FA3, self.use_fa3)) if on}

    def described(self) -> str:
        """For the log."""
        return ", ".join(f"{name} {'on' if name in self.facts() else 'off'}" for name in (DETERMINISTIC, USE_FA3))


def read(environment: Mapping[str, str]) -> Switches:
    """The switches of an environment: 1, true, yes or on against 0, false, no, off or nothing, in any case.

    Raises:
        RecipeError: a variable has another value.
    """
    return Switches(*(_is_on(name, environment.get(name, "")) for name in (DETERMINISTIC, USE_FA3)))


def _is_on(name: str, value: str) -> bool:
    try:
        return _WORDS[value.strip().lower()]
    except KeyError:
        raise RecipeError(f"environment variable {name}: {value!r} is neither on (1, true, yes) nor off (0, false, no).") from None


@lru_cache(1)
def switches() -> Switches:
    """Those of this process, read once (RecipeError as in `read`)."""
    return read(os.environ)


def apply(chosen: Switches) -> None:
    """Put deterministic mode in force for this process; to be called before anything runs on a GPU.

    The flash kernels follow torch's flag (xtuner_core/models/attention_kernels.py). An operation that has no deterministic form fails
    with torch's message that names it.
    """
    if not chosen.deterministic:
        return
    import torch

    os.environ |= {name: os.environ.get(name, value) for name, value in CUBLAS.items()}
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
