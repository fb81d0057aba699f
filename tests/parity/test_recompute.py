"""Every architecture of the field: what recomputation forgets comes back as it was, bit for bit."""

from __future__ import annotations

from typing import Literal

import pytest
import test_architectures as field
import torch
from transformers import PreTrainedModel

from xtuner_core.config import TrainConfig
from xtuner_core.loss import packed_loss
from xtuner_core.models import attention
from xtuner_core.models.layers import decoder_layers
from xtuner_core.models.recompute import recompute


def stepped(name: str, what: Literal["none", "selective", "full"]) -> PreTrainedModel:
    """The tiny model with the gradients of one packed step."""
    model = field.build(field.ARCHITECTURES[name], attention.register()).train()
    assert len(decoder_layers(model)) == 2
    recompute(model, TrainConfig(recompute=what))
    torch.manual_seed(0)
    packed_loss(model, field.pack(field.documents(7), 7), chunk=16).backward()
    return model


@pytest.mark.parametrize("name", field.ARCHITECTURES)
def test_recomputation_is_exact(name: str) -> None:
    plain = stepped(name, "none")
    assert field.largest_difference(stepped(name, "selective"), plain)[0] == 0
    assert field.largest_difference(stepped(name, "full"), plain)[0] == 0
