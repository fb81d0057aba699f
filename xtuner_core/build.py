"""From a model folder to what the loop trains: each part is put on from outside, in the one order in which they fit together."""

from __future__ import annotations

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from xtuner_core import adapters, registry
from xtuner_core.config import SftConfig
from xtuner_core.loss import require_packable
from xtuner_core.metrics import say
from xtuner_core.models.compile import compile_layers
from xtuner_core.models.load import load_model, outline_model
from xtuner_core.models.offload import offload_activations
from xtuner_core.models.recompute import recompute
from xtuner_core.optim.optimizer import make_optimizer
from xtuner_core.parallel.mesh import World
from xtuner_core.parallel.shard import shard
from xtuner_core.parallel.spread import follow_head, spread, whole_weights


def build(config: SftConfig, world: World) -> tuple[PreTrainedModel, Optimizer]:
    """The model, ready for `packed_loss`, and its optimizer.

    Raises:
        RecipeError: the model cannot be trained as `config.train` asks.
    """
    method = registry.find(adapters, config.train.method)
    from_first = world.size > 1 and not getattr(method, "READ_BY_ALL", False)
    if from_first and world.rank > 0:
        model = outline_model(config.model_dir, config.train)
    else:
        model = load_model(config.model_dir, config.train)
        require_packable(model)
    if from_first:
        follow_head(model, world)
    model.train()
    method.prepare(model, config.train, config.seed)
    trained, every = model.num_parameters(only_trainable=True), model.num_parameters()  # a 4-bit weight counts as what it stands for
    say(world.rank, f"Total trainable parameters: {trained / 1e6:.1f}M, total parameters: {every / 1e6:.1f}M")
    compile_layers(model, config.train, world.device)
    recompute(model, config.train)
    offload_activations(model, config.train, world.device)
    weights = whole_weights(model, world) if from_first else {}
    shard(model, world, config.train)
    if from_first:
        spread(model, weights, world)
    torch.manual_seed(config.seed * 1000 + world.rank)
    return model, make_optimizer(model, config.train)
