"""One rank under torchrun that saves a checkpoint where none can be: `save_in_vain.py FOLDER`, with and without a group of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from xtuner_core.checkpoint import store
from xtuner_core.errors import StorageError
from xtuner_core.parallel.mesh import join_world, leave

with join_world() as world:
    for group in (None, cast(dist.ProcessGroup, dist.new_group(backend="gloo"))):
        try:
            store.save(Path(sys.argv[1], "step-1"), {"a": torch.ones(3)}, {"step": 1}, world, group)
        except StorageError as error:
            print(f"on {world.rank}: {error}", flush=True)
leave(0)
