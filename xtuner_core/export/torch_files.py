"""Files of `torch.save`, read without running anything that is in them.

Such a file is a pickle: a program that may name any function. torch's own reader for weights (`weights_only=True`) runs only those that
make tensors and containers. What other tools leave beside their tensors, a log's history, say, is read as `Inert`.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xtuner_core.errors import DataError, from_os_error
from xtuner_core.models.check import some


class Inert:
    """Takes the place of an object that is no tensor: it is made of anything, and keeps nothing."""

    def __new__(cls, *values: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *values: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_HARMLESS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",  # a HistoryBuffer's list of its own methods; called on stand-ins, it would be ours
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.ndarray", "numpy.dtype",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)  # fmt: skip
STAND_INS: list[Any] = [*((Inert, name) for name in _HARMLESS), (int, "deepspeed.runtime.zero.config.ZeroStageEnum")]
"""What is called instead of the class or function of that name."""


def load(path: Path) -> Any:
    """What `torch.save` wrote; tensors of the newer (zip) form stay in the file until their numbers are read.

    Raises:
        DataError: not such a file, a torn one, or one that names a class or function which is neither a tensor's nor harmless.
        StorageError: it cannot be read.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(STAND_INS):
            warnings.simplefilter("ignore")  # of how the file was written
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise from_os_error(error) from None
    except Exception as error:  # a damaged pickle fails in any way
        raise DataError(f"{path}: {_reason(path, error)}") from None


def _reason(path: Path, error: Exception) -> str:
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"the file names {named[1]}, which is neither a tensor nor a plain value: to read it, that code would have to run. "
            "Save the tensors alone where you trust the file: torch.save(model.state_dict(), NEW_FILE)."
        )
    with open(path, "rb") as file:
        start = file.read(24)
    if not start:
        return "the file is empty. Copy it again."
    if start.isascii() and start[:1] in (b"<", b"{", b"v", b"#"):
        return f"no file of torch.save; it begins with {start.decode()!r}. Copy or download the file itself."
    found = str(error).rpartition("WeightsUnpickler error:")[2]  # behind advice that is not for our users
    reason = next(iter(found.strip().splitlines()), "")
    return f"no whole file of torch.save ({type(error).__name__}: {reason[:200]}). Copy it again."


_CONTAINERS = ("state_dict", "module", "model")


def state_dict(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, which may lie in containers named `state_dict`, `module` or `model`.

    Raises:
        DataError: there are none, several containers have some, or something among them is no plain tensor.
    """
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: holds a {type(content).__name__}, not tensors by name.")
    if not any(isinstance(value, torch.Tensor) for value in content.values()):
        inner = [name for name in _CONTAINERS if isinstance(content.get(name), Mapping) and content[name]]
        if len(inner) != 1:
            held = some([str(name) for name in content]) or "nothing"
            raise DataError(f"{path}: its tensors are expected in one of {', '.join(_CONTAINERS)}; the file holds {held}.")
        return state_dict(content[inner[0]], path)
    odd = [str(name) for name, value in content.items() if not (isinstance(name, str) and _plain(value))]
    if odd:
        raise DataError(f"{path}: not plain tensors: {some(odd)}.")
    return dict(content)


def _plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized and not value.is_meta
