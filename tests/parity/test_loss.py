"""The packed, chunked loss against transformers' own loss from labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from xtuner_core import linear_cross_entropy as module
from xtuner_core.adapters.lora import add_lora
from xtuner_core.config import LoraConfig, TrainConfig
from xtuner_core.data.dataset import PackedDataset
from xtuner_core.data.loader import IGNORE, Batch, make_batch
from xtuner_core.errors import RecipeError
from xtuner_core.linear_cross_entropy import chunked_cross_entropy, linear_cross_entropy
from xtuner_core.loss import packed_loss, require_packable, weigh
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


def naive(hidden: torch.Tensor, matrix: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.cross_entropy((hidden @ matrix.T).float(), labels, reduction="none") * weights).sum()


@pytest.mark.parametrize("chunk", [1, 32, 100])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_taken_in_the_forward_pass_are_those_of_autograd(weighted: bool, chunk: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(70, 16), torch.randn(40, 16)
    labels, weights = torch.randint(40, (70,)), torch.rand(70) if weighted else torch.ones(70)
    results = []
    for function in ("naive", "chunked", "linear"):
        hidden, matrix = (row.clone().requires_grad_() for row in rows)
        given = weights if weighted else None
        if function == "naive":
            loss = naive(hidden, matrix, labels, weights)
        elif function == "linear":
            loss = linear_cross_entropy(hidden, matrix, labels, chunk, given)
        else:
            loss = chunked_cross_entropy(hidden, lambda piece, matrix=matrix: piece @ matrix.T, labels, chunk, given)
        (loss * 0.3).backward()
        results.append({"loss": loss.detach(), "hidden": hidden.grad, "matrix": matrix.grad})
    assert_close(results[1], results[0], 1e-6)
    assert_close(results[2], results[0], 1e-6)


def test_in_bf16_loss_and_gradients_are_as_exact_as_those_of_autograd() -> None:
    """Measured against fp32; torch's own F.linear_cross_entropy sums in bf16 and fails this."""
    torch.manual_seed(0)
    rows = torch.randn(600, 32).bfloat16(), torch.randn(500, 32).bfloat16()
    labels, errors = torch.randint(500, (600,)), {}
    exact = [row.float().requires_grad_() for row in rows]
    expected = naive(*exact, labels, torch.ones(600))  # pyright: ignore[reportCallIssue]
    expected.backward()
    for name in ("autograd", "linear"):
        leaves = [row.clone().requires_grad_() for row in rows]
        hidden, matrix = leaves
        loss = naive(hidden, matrix, labels, torch.ones(600)) if name == "autograd" else linear_cross_entropy(hidden, matrix, labels, 100)
        loss.backward()
        grads = [(leaf.grad, one.grad) for leaf, one in zip(leaves, exact, strict=True)]
        errors[name] = [float((leaf.float() - one).norm() / one.norm()) for leaf, one in grads if leaf is not None and one is not None]
        errors[name].append(abs(float(loss.detach()) / float(expected.detach()) - 1))
    assert errors["linear"][0] <= 1.1 * errors["autograd"][0] and errors["linear"][2] < 1e-4
    assert errors["linear"][1] <= 2 * errors["autograd"][1]  # six chunks, each added in bf16


def test_a_frozen_head_gets_no_gradient_and_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, matrix = torch.randn(70, 4, requires_grad=True), torch.randn(9, 4)
    labels = torch.zeros(70, dtype=torch.long)
    linear_cross_entropy(hidden, matrix, labels, 32).backward()
    assert matrix.grad is None and hidden.grad is not None and bool(hidden.grad.any())
    with torch.no_grad():  # torch.mm is what takes the gradient
        monkeypatch.setattr(torch, "mm", None)
        torch.testing.assert_close(linear_cross_entropy(hidden, matrix, labels, 32), naive(hidden, matrix, labels, torch.ones(70)))


def test_logits_of_a_plain_head_are_computed_once_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = module._loss_and_slope

    def watched(logits: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(logits))
        return original(logits, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(module, "_loss_and_slope", watched)
    hidden, matrix = torch.randn(70, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    linear_cross_entropy(hidden, matrix, torch.zeros(70, dtype=torch.long), 32).backward()
    assert seen == [32, 32, 6]


def test_no_learned_token_means_zero_gradients_of_a_plain_head() -> None:
    hidden, matrix = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, matrix, torch.zeros(0, dtype=torch.long), 32)
    loss.backward()
    assert loss == 0 and matrix.grad is not None and not matrix.grad.any()


POWER = {"token": 0.0, "sample": -1.0, "square": -0.5}


@pytest.mark.parametrize("reduction", POWER)
def test_reductions_equal_their_definition_on_the_documents_alone(
    reduction: str, tiny_model_folder: Path, model: PreTrainedModel, dataset: PackedDataset
) -> None:
    """Two packs as two micro-batches against one mean over all documents: the split into packs does not matter."""
    batches = [weigh(make_batch(dataset, pack), reduction) for pack in (0, 1)]
    ours = sum((packed_loss(model, batch, chunk=64) for batch in batches), torch.zeros(())) / sum(batch.weight for batch in batches)
    ours.backward()
    own = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32, attn_implementation="eager")
    total, weight = torch.zeros(()), 0.0
    for number in (number for batch in batches for number in batch.documents):
        document = dataset.document(number)
        ids = torch.from_numpy(document.ids.astype("int64"))[None]
        count = int(document.loss[1:].sum())  # what comes first is not predicted
        one = count ** POWER[reduction]
        mean = own(input_ids=ids, labels=ids.masked_fill(~torch.from_numpy(document.loss)[None], IGNORE)).loss
        total, weight = total + mean * count * one, weight + count * one
    (total / weight).backward()
    assert ours.item() == pytest.approx(float(total / weight), rel=1e-5)
    assert_close(gradients(model), gradients(own), 2e-5)


def test_the_reductions_differ(model: PreTrainedModel, dataset: PackedDataset) -> None:
    batches = [weigh(make_batch(dataset, 0), reduction) for reduction in POWER]
    losses = {round(float(packed_loss(model, batch, 64)) / batch.weight, 6) for batch in batches}
    assert len(losses) == 3 and batches[1].weight == pytest.approx(len(batches[1].documents))


def test_a_document_without_labels_has_no_weight(dataset: PackedDataset) -> None:
    batch = make_batch(dataset, 0)
    start, end = batch.boundaries[:2].tolist()
    batch.labels[0, start:end] = IGNORE
    assert weigh(batch, "sample").weight == pytest.approx(len(batch.documents) - 1)


def test_a_head_with_an_adapter_is_called_and_learns(tiny_model_folder: Path, dataset: PackedDataset) -> None:
    lora = TrainConfig(dtype="fp32", method="lora", lora=LoraConfig(targets=("lm_head",)))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(tiny_model_folder, tie_word_embeddings=False), attn_implementation=attention.register()
    )
    add_lora(model, lora.lora, 0)
    packed_loss(model, make_batch(dataset, 0), 64).backward()
    found = gradients(model)
    assert len(found) == 2 and bool(found["lm_head.lora_B.default.weight"].any())


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
