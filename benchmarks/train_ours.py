"""The engine's side of benchmarks/train_cpu.py and train_gpu.py: the loop of xtuner_core.trainer as it is. Prints one line of JSON.

python train_ours.py JOB.json
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

from training_job import SEED, Job, Json, Meter, answer


class Enough(Exception):
    """All steps that are wanted were measured."""


def main() -> Json:
    """Train as xtuner_core.sft does in one process, until enough steps are measured."""
    job = Job.read(sys.argv[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from xtuner_core import trainer
    from xtuner_core.parallel.mesh import join_world
    from xtuner_core.signals import StopRequest

    meter = Meter(job)
    trainer.train_step = measured(trainer.train_step, meter)
    with tempfile.TemporaryDirectory() as scratch, join_world() as world:
        if job.random:
            random_weights(world.device)
        try:
            trainer.train(config_of(job, Path(scratch)), world, StopRequest())
        except Enough:
            return meter.result()
    raise SystemExit("the loop ended before enough steps were measured")


def measured(train_step, meter: Meter):
    """The trainer's step, timed; loading and logging fall between two steps and count as well."""

    def step(model, optimizer, batches, *rest):
        meter.begin()
        found = train_step(model, optimizer, batches, *rest)
        meter.losses.append(found[0])
        if meter.end(sum(batch.text_tokens for batch in batches)):
            raise Enough
        return found

    return step


def config_of(job: Job, work_dir: Path):
    """The run's configuration; constant learning rate, nothing else changed but what the job says."""
    from xtuner_core.config import SftConfig, TrainConfig

    fields = {"method": job.method, "dtype": job.dtype, "lr": job.lr, "scheduler": "constant", "warmup_ratio": 0.0}
    train = TrainConfig.model_validate({**fields, "global_batch_size": job.packs_per_step, "total_step": job.total + 1, **job.train})
    return SftConfig(model_dir=Path(job.model_dir), data_dir=Path(job.data_dir), work_dir=work_dir, seed=SEED, train=train)


def random_weights(device) -> None:
    """Have transformers draw weights on the device instead of reading them: 8B parameters would take minutes by way of the disk."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def from_config(folder: Path, *, dtype: torch.dtype, attn_implementation: str, local_files_only: bool):
        torch.manual_seed(0)
        with torch.device(device):
            config = AutoConfig.from_pretrained(folder)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation).eval()

    AutoModelForCausalLM.from_pretrained = from_config


if __name__ == "__main__":
    answer(main)
