"""The peers' side of benchmarks/train_cpu.py and train_gpu.py. Prints one line of JSON.

python train_peers.py KIND JOB.json

padded        transformers Trainer, the documents of a pack as a batch, padded to the longest
padded_by_8   the same in batches of 8 documents, its default, with gradient accumulation
flattened     transformers Trainer, the documents of a pack as one row with restarting positions
liger         flattened, with liger's kernels
trl           TRL's SFTTrainer with its defaults (bf16, activation checkpointing), as many documents a batch as a pack has
trl_packing   the same with packing=True, which makes packs of its own
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from training_job import IGNORE, Documents, Job, Json, Meter, answer


def main() -> Json:
    """Train with one peer."""
    import torch

    kind, job = sys.argv[1], Job.read(sys.argv[2])
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        meter = Meter(job)
        trainer = (sft_trainer if kind.startswith("trl") else plain_trainer)(kind, job, meter, Path(scratch))
        trainer.train()
    return meter.result()


def model_of(job: Job):
    """The model with transformers' own attention, or random weights on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job.weights]
    if not job.random:
        return AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.model_dir), dtype=dtype, attn_implementation="sdpa")


def plain_trainer(kind: str, job: Job, meter: Meter, scratch: Path):
    """transformers Trainer; an item of its data set is a pack, so that steps have the same tokens as ours."""
    from transformers import Trainer, TrainingArguments

    documents, model = Documents.read(job.data_dir), model_of(job)
    packs, batches = documents.packs(), 1
    if kind == "padded_by_8":
        packs, batches = in_eights(packs), max(1, len(packs[0]) // 8)
    if job.method == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, lora_config())
        if job.checkpointing:
            model.enable_input_require_grads()
    more = {"use_liger_kernel": True} if kind == "liger" else {}
    arguments = TrainingArguments(
        **common(job, scratch), **more, per_device_train_batch_size=1, gradient_accumulation_steps=job.packs_per_step * batches,
        bf16=job.dtype == "bf16", gradient_checkpointing=job.checkpointing, remove_unused_columns=False,
    )  # fmt: skip
    collate = padded if kind.startswith("padded") else flattened
    tokens = [documents.tokens(pack) for pack in packs]
    return in_order(Trainer)(
        model=model, args=arguments, train_dataset=packs, data_collator=lambda items: collate(documents, items[0]),
        callbacks=[callback(meter, tokens, job.packs_per_step * batches)],
    )  # fmt: skip


def in_eights(packs: list[list[int]]) -> list[list[int]]:
    """The documents of each pack, eight at a time; each pack has a multiple of eight or fewer."""
    return [pack[first : first + 8] for pack in packs for first in range(0, len(pack), 8)]


def sft_trainer(kind: str, job: Job, meter: Meter, scratch: Path):
    """TRL with its defaults, but for what all sides have in common."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    documents, packing = Documents.read(job.data_dir), kind == "trl_packing"
    columns = {"input_ids": [ids.tolist() for ids in documents.ids], "labels": [labels.tolist() for labels in documents.labels]}
    batch = 1 if packing else documents.sizes[0]
    longest = max(documents.tokens(pack) for pack in documents.packs())
    arguments = SFTConfig(
        **common(job, scratch), per_device_train_batch_size=batch, packing=packing, max_length=longest,
    )  # fmt: skip
    trainer = in_order(SFTTrainer)(
        model=model_of(job), args=arguments, train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(job.model_dir),
    )  # fmt: skip
    trainer.add_callback(callback(meter, [len(ids) for ids in trainer.train_dataset["input_ids"]], batch))
    return trainer


def common(job: Job, scratch: Path) -> Json:
    """What all sides train with: AdamW as in the engine, constant rate, no padding to fixed shapes, no files."""
    import torch

    return {
        "output_dir": str(scratch), "max_steps": job.total, "learning_rate": job.lr, "lr_scheduler_type": "constant",
        "weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.95, "max_grad_norm": 1.0, "optim": "adamw_torch_fused",
        "use_cpu": not torch.cuda.is_available(), "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
    }  # fmt: skip


def lora_config():
    """As the engine's defaults."""
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM", bias="none")


def in_order(trainer: type) -> type:
    """The trainer, taking its data in the order it has."""
    from torch.utils.data import SequentialSampler

    class InOrder(trainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    return InOrder


def callback(meter: Meter, tokens: list[int], items: int):
    """Measures each step; `tokens` of each item of the data set, `items` in a step."""
    from transformers import TrainerCallback

    class Measure(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            meter.begin()

        def on_step_end(self, args, state, control, **kwargs):
            first = meter.done * items
            if meter.end(sum(tokens[number % len(tokens)] for number in range(first, first + items))):
                control.should_training_stop = True

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                meter.losses.append(float(logs["loss"]))

    return Measure()


def padded(documents: Documents, pack: list[int]) -> Json:
    """Each document a row."""
    import torch

    longest = max(len(documents.ids[number]) for number in pack)

    def rows(values: list[np.ndarray], filler: int) -> torch.Tensor:
        return torch.from_numpy(
            np.stack([np.pad(values[number], (0, longest - len(values[number])), constant_values=filler) for number in pack])
        )

    mask = rows([np.ones_like(ids) for ids in documents.ids], 0)
    return {"input_ids": rows(documents.ids, 0), "attention_mask": mask, "labels": rows(documents.labels, IGNORE)}


def flattened(documents: Documents, pack: list[int]) -> Json:
    """All documents one row, as transformers' DataCollatorWithFlattening: no document predicts the next one's first token."""
    import torch

    labels = [documents.labels[number].copy() for number in pack]
    for one in labels:
        one[0] = IGNORE
    ids = [documents.ids[number] for number in pack]
    columns = {"input_ids": ids, "labels": labels, "position_ids": [np.arange(len(one)) for one in ids]}
    return {name: torch.from_numpy(np.concatenate(values))[None] for name, values in columns.items()}


if __name__ == "__main__":
    answer(main)
