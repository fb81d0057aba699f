"""What is put on decoder layers from outside changes neither loss nor gradients, only what is kept, computed again, or compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xtuner_core.adapters.lora import add_lora
from xtuner_core.build import build
from xtuner_core.config import LoraConfig, SftConfig, TrainConfig
from xtuner_core.data.loader import Batch
from xtuner_core.errors import RecipeError
from xtuner_core.loss import packed_loss
from xtuner_core.models import attention
from xtuner_core.models.compile import compile_layers
from xtuner_core.models.layers import decoder_layers
from xtuner_core.models.offload import Offload
from xtuner_core.models.recompute import is_dear, recompute
from xtuner_core.parallel.mesh import World

Configure = Callable[..., SftConfig]
CPU = torch.device("cpu")
TINY = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024, "initializer_range": 0.2, "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "attention_dropout": 0.1},
    "lora": {"model_type": "qwen3"},
    "qwen3_moe": {"model_type": "qwen3_moe", **EXPERTS},
    "gpt_oss": {"model_type": "gpt_oss", "sliding_window": 9, **EXPERTS},  # its attention has checkpoints of its own
}
LENGTHS = (23, 5, 600, 12)


def new_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**TINY, **MODELS[name]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.register())
    if name == "lora":
        add_lora(model, LoraConfig(rank=4, dropout=0.3, targets=("q_proj", "down_proj")), 0)
        torch.nn.init.normal_(model.get_submodule("model.layers.0.self_attn.q_proj.lora_B.default").weight)
    return model.train()


def new_batch(lengths: tuple[int, ...] = LENGTHS) -> Batch:
    torch.manual_seed(len(lengths))
    ids = torch.randint(0, 128, (1, sum(lengths)))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    return Batch(ids, ids, places, bounds, max(lengths), (0,), 0, sum(lengths))


def step(model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Loss and gradients by name."""
    torch.manual_seed(7)
    loss = model.packed_loss(batch, 1024) if hasattr(model, "packed_loss") else packed_loss(model, batch, 1024)  # with FSDP, without
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


def put_on(model: PreTrainedModel, words: str) -> None:
    """`full`, `selective` and `offload`, in the order of `build`; the offload copies although this is a CPU."""
    for word in words.split("+"):
        if word == "offload":
            Offload(CPU, smallest=0).wrap(decoder_layers(model))
        else:
            recompute(model, TrainConfig.model_validate({"recompute": word}))


@pytest.mark.parametrize("words", ["selective", "full", "offload", "selective+offload", "full+offload"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_same(name: str, words: str) -> None:
    """Bit for bit; but a part of a tensor comes back from the offload as a tensor of its own, which kernels may sum up in another order."""
    plain, model = new_model(name), new_model(name)
    names = list(model.state_dict())
    put_on(model, words)
    for lengths in (LENGTHS, (40, 30)):  # nothing is left behind that would change the next pack
        expected, found = step(plain, new_batch(lengths)), step(model, new_batch(lengths))
        assert len(expected) > 2 and found.keys() == expected.keys()
        for part, value in expected.items():
            tolerance = 2e-6 * float(value.abs().max()) if "offload" in words else 0.0
            torch.testing.assert_close(found[part], value, rtol=0, atol=tolerance, msg=part)
    assert list(model.state_dict()) == names


class Operations(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def in_backward(name: str, words: str) -> tuple[int, int]:
    """How many matrix products and SiLUs the backward pass computes."""
    model = new_model(name)
    put_on(model, words)
    loss = packed_loss(model, new_batch((40, 30)), 1024)
    with Operations() as operations:
        loss.backward()
    return operations.count["mm"], operations.count["silu"]


def test_selective_repeats_what_is_cheap_and_full_everything() -> None:
    products, silus = in_backward("qwen3", "none")
    assert silus == 0
    assert in_backward("qwen3", "selective") == (products, 2)
    assert in_backward("qwen3", "full") == (products + 2 * 6, 2)  # of a layer's seven products none needs the last one's result


@pytest.mark.parametrize(("summed", "columns", "kept"), [(64, 64, True), (16, 128, True), (16, 129, False), (576, 16, True)])
def test_a_product_that_is_cheap_for_its_size_is_repeated(summed: int, columns: int, kept: bool) -> None:
    assert is_dear((torch.ones(9, summed), torch.ones(summed, columns))) == kept
    assert is_dear((torch.ones(columns), torch.ones(9, summed), torch.ones(3, summed, columns))) == kept


@pytest.mark.parametrize(("ratio", "layers"), [(0.4, 0), (0.5, 1), (1.0, 2)])
def test_a_share_of_the_layers(ratio: float, layers: int) -> None:
    model = new_model("qwen3")
    recompute(model, TrainConfig(recompute="full", recompute_ratio=ratio))
    assert sum("forward" in vars(layer) for layer in decoder_layers(model)) == layers
    assert "forward" in vars(decoder_layers(model)[0]) or layers == 0


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recompute_ratio \(0.5\) is for recompute selective or full"):
        TrainConfig(recompute_ratio=0.5)


class Waves(torch.nn.Linear):
    """Keeps its input, its weight and, twice, the product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = x @ self.weight.t()
        return product.sin() + product.cos()


def test_the_offload_copies_each_activation_once_and_no_weight() -> None:
    layers: list[torch.nn.Module] = [Waves(8, 8, bias=False), Waves(8, 8, bias=False)]
    offload = Offload(CPU, smallest=9 * 8 * 4)
    offload.wrap(layers)
    result = layers[1](layers[0](torch.randn(9, 8, requires_grad=True)))
    last = offload._last
    assert last is not None and last.previous is not None
    assert not last.previous.sources and len(last.sources) == 2  # the first layer's activations are no longer on the device
    copies = last.copies + last.previous.copies
    assert len(copies) == 4
    result.sum().backward()
    assert all(reference() is None for reference in copies) and not last.sources  # without a garbage collection
    layers[0](torch.randn(8, 8, requires_grad=True))
    assert offload._last is not None and not offload._last.copies and offload._last.previous is None  # too small; and a new chain


def test_a_compiled_layer_needs_a_compiler() -> None:
    import torch._inductor.config as inductor

    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(RecipeError, match=r"train\.compile needs a C\+\+ compiler"):
        compile_layers(new_model("qwen3"), TrainConfig(compile=True), CPU)


@pytest.mark.slow
def test_compiled_layers_learn_the_same_and_are_compiled_once_for_packs_of_any_length(world: World, sft_config: Configure) -> None:
    """Under FSDP, with recomputation, in training and in measuring."""
    (plain, _), (model, _) = (build(sft_config(recompute="full", compile=compiled), world) for compiled in (False, True))
    frames = []
    for lengths in ((23, 5, 40, 12), (10, 20, 7), (60,), (8, 9, 10, 30, 2)):
        batch = new_batch(lengths)
        expected, found = step(plain, batch), step(model, batch)
        for part, value in expected.items():
            difference, size = (
                (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).abs().max() for tensor in (found[part] - value, value)
            )
            assert difference <= 1e-5 * size, part
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    assert frames[0] > 0 and frames[1] == frames[-1]
