"""One rank under torchrun that trains one configuration after another, so that a test pays for the imports once."""

from __future__ import annotations

import sys
from pathlib import Path

from xtuner_core import determinism
from xtuner_core.config import SftConfig
from xtuner_core.parallel.mesh import join_world, leave
from xtuner_core.signals import StopRequest
from xtuner_core.trainer import train

determinism.apply(determinism.switches())
with join_world() as world:
    for file in sys.argv[1:]:
        train(SftConfig.model_validate_json(Path(file).read_text(encoding="utf-8")), world, StopRequest())
leave(0)
