"""The packed, chunked loss against transformers' own loss from labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xtuner_core.config import TrainConfig
from xtuner_core.data.dataset import PackedDataset
from xtuner_core.data.loader import IGNORE, Batch, make_batch
from xtuner_core.errors import RecipeError
from xtuner_core.loss import chunked_cross_entropy, packed_loss, require_packable
from xtuner_core.models import attention
from xtuner_core.models.load import load_model

FP32 = TrainConfig(dtype="fp32")


@pytest.fixture
def model(tiny_model_folder: Path) -> PreTrainedModel:
    return load_model(tiny_model_folder, FP32)


@pytest.fixture(scope="module")
def dataset(tiny_data: Path) -> PackedDataset:
    return PackedDataset(tiny_data)


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert (found[name] - expected[name]).abs().max() <= tolerance * expected[name].abs().max(), name


def test_equals_transformers_loss_summed_over_the_documents(
    tiny_model_folder: Path, model: PreTrainedModel, dataset: PackedDataset
) -> None:
    batch = make_batch(dataset, 0)
    ours = packed_loss(model, batch, chunk=64)
    ours.backward()
    own = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32, attn_implementation="eager")
    total = 0.0
    for number in batch.documents:
        document = dataset.document(number)
        ids = torch.from_numpy(document.ids.astype("int64"))[None]
        labels = ids.masked_fill(~torch.from_numpy(document.loss)[None], IGNORE)
        loss = own(input_ids=ids, labels=labels).loss * document.loss.sum()  # transformers gives the mean
        loss.backward()
        total += loss.item()
    assert ours.item() == pytest.approx(total, rel=1e-5)
    assert_close(gradients(model), gradients(own), 1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 100_000])
def test_the_chunk_size_changes_nothing(model: PreTrainedModel, dataset: PackedDataset, chunk: int) -> None:
    batch = make_batch(dataset, 1)
    learned = (batch.labels[0] != IGNORE).nonzero()[:, 0]
    batch.labels[0, learned[40] :] = IGNORE  # keeps chunks of one token quick
    assert batch.learned == 40
    losses, found = [], []
    for size in (16, chunk):
        loss = packed_loss(model, batch, size)
        loss.backward()
        losses.append(loss.item())
        found.append(gradients(model))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert_close(found[1], found[0], 1e-5)


def test_a_pack_without_learned_tokens_has_zero_loss_and_zero_gradients(model: PreTrainedModel, dataset: PackedDataset) -> None:
    batch = make_batch(dataset, 0)
    batch.labels.fill_(IGNORE)
    loss = packed_loss(model, batch, 64)
    loss.backward()  # every rank must take part in the backward pass
    found = gradients(model)
    assert loss.item() == 0.0 and len(found) > 10
    assert not any(bool(gradient.any()) for gradient in found.values())


def test_a_head_of_its_own_has_a_zero_gradient_too() -> None:
    hidden, head = torch.randn(0, 4, requires_grad=True), torch.nn.Linear(4, 9)
    chunked_cross_entropy(hidden, head, torch.zeros(0, dtype=torch.long), 32).backward()
    assert head.weight.grad is not None and not head.weight.grad.any()


def test_logits_exist_for_one_chunk_at_a_time() -> None:
    seen: list[int] = []

    class Head(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            seen.append(len(hidden))
            return super().forward(hidden)

    hidden, head = torch.randn(70, 4, requires_grad=True), Head(4, 9)
    chunked_cross_entropy(hidden, head, torch.zeros(70, dtype=torch.long), 32).backward()
    assert sorted(seen) == [6, 6, 32, 32, 32, 32]  # forward, and again in the backward pass


TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": None,
}


def build(model_type: str, **more: object) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **TINY, num_key_value_heads=1, head_dim=8, bos_token_id=0, eos_token_id=0, **more)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.register()).eval()


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused() -> None:
    require_packable(build("hyperclovax", logits_scaling=1.0))
    with pytest.raises(RecipeError, match="HyperCLOVAXForCausalLM changes its logits after the head"):
        require_packable(build("hyperclovax", logits_scaling=8.0))  # it multiplies by what Granite divides by


CHANGED = (
    ("granite", {"logits_scaling": 10.0}),
    ("cohere", {"logit_scale": 0.3}),
    ("gemma2", {"final_logit_softcapping": 0.5}),
    ("gemma3_text", {"final_logit_softcapping": 1.0}),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "more"), [*CHANGED, *((name, {}) for name in ("llama", "mistral", "qwen3_moe", "phi3"))])
def test_known_heads_are_accepted(model_type: str, more: dict[str, object], dtype: torch.dtype) -> None:
    require_packable(build(model_type, **more).to(dtype))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("model_type", "more"), CHANGED)
def test_a_change_of_the_logits_that_is_left_out_is_found(model_type: str, more: dict[str, object]) -> None:
    model = build(model_type, **more)
    forward, (name,) = model.forward, more
    config = model.config.get_text_config()

    def own(**inputs: object) -> object:
        setattr(config, name, more[name])
        return forward(**inputs)

    setattr(config, name, 1e6 if "cap" in name else 1.0)
    model.forward = own  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RecipeError, match="changes its logits after the head"):
        require_packable(model)


def test_a_batch_can_be_moved(dataset: PackedDataset) -> None:
    batch = make_batch(dataset, 0)
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch) and moved.input_ids.is_meta and moved.places is not None and moved.places.is_meta
    assert moved.boundaries is batch.boundaries  # or every layer would wait for the device to hear them
    assert (moved.longest, moved.documents, moved.shared) == (batch.longest, batch.documents, batch.shared)
