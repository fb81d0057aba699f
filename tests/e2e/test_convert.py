"""LoRA from data to a merged folder on the tiny model, and convert's checks, fed with what must not be exported."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from pipelines import convert, prepare
from pipelines.artifacts import Artifact, Store, sha256
from pipelines.model_card import plain
from pipelines.recipe import PROJECT, Recipe, load_recipe
from pipelines.runner import run_until
from pipelines.stage import Metrics, Work
from xtuner_core.checkpoint.hf import weight_keys
from xtuner_core.checkpoint.store import is_whole
from xtuner_core.errors import DataError, RecipeError
from xtuner_core.export import checkpoint
from xtuner_core.export.tensors import Tensors

pytestmark = pytest.mark.slow

LORA = load_recipe("qwen3_tiny_full_openai", ["train.total_step=4", "train.method=lora", "train.lora={rank: 4, alpha: 32}"])
FULL = load_recipe("qwen3_tiny_full_openai", ["train.total_step=1"])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("convert") / "store")


def made(name: str, recipe: Recipe, store: Store) -> Artifact:
    return run_until(name, recipe, store, print).artifact


def run(recipe: Recipe, store: Store, folder: Path, **changed: Path) -> Metrics:
    """The convert stage on the recipe's real inputs, some of them replaced."""
    names = {"base": "base", "data": "prepare", "checkpoint": "train"}
    inputs = {name: changed.get(name) or made(node, recipe, store).payload for name, node in names.items()}
    parts = {part: folder / part for part in ("payload", "record", "scratch", "cache")}
    for part in parts.values():
        part.mkdir(parents=True)
    return convert.run(recipe, Work(inputs, **parts, log=print))


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(40)[None]).logits[0].float()


def with_value(source: Path, folder: Path, tensor: int, value: float) -> Path:
    """A copy of a trained payload in which the first number of one tensor is another, and every digest fits again."""
    shutil.copytree(source, folder)
    (file,) = (folder / "checkpoint" / "tensors").iterdir()
    data = bytearray(file.read_bytes())
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    name = sorted(name for name in header if name != "__metadata__")[tensor]
    struct.pack_into("<f", data, 8 + size + header[name]["data_offsets"][0], value)
    file.write_bytes(data)
    described = folder / "checkpoint" / "checkpoint.json"
    described.write_text(_with_digests(json.loads(described.read_text()), file))
    assert is_whole(folder / "checkpoint")
    return folder


def _with_digests(told: dict[str, Any], file: Path) -> str:
    from xtuner_core.checkpoint.store import _digest

    del told["sha256"]
    told["files"] = {file.name: sha256(file)}
    return json.dumps({**told, "sha256": _digest(told)})


def other_base(source: Path, folder: Path, **config: Any) -> Path:
    """The base's folder with a new random model of another shape."""
    shutil.copytree(source, folder)
    described = AutoConfig.from_pretrained(source / "model", **config)
    AutoModelForCausalLM.from_config(described, dtype=torch.bfloat16).save_pretrained(folder / "model")
    return folder


def test_lora_becomes_an_adapter_that_peft_loads_and_a_folder_that_equals_it(store: Store) -> None:
    base, converted = made("base", LORA, store), made("convert", LORA, store)
    model, adapter = converted.payload / "model", converted.payload / "adapter"
    assert sorted(path.name for path in converted.payload.iterdir()) == ["adapter", "facts.json", "model"]
    assert sorted(path.name for path in adapter.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]

    plain = load(base.payload / "model", dtype=torch.float32)
    untouched = logits(plain)
    adapted = PeftModel.from_pretrained(plain, str(adapter)).eval()
    wanted = logits(adapted)
    assert (wanted - untouched).abs().max() > 0.05, "the adapter must have learned something"
    merged = load(model, dtype=torch.float32)
    assert (logits(merged) - wanted).abs().max() <= 0.02 * wanted.abs().max(), "bfloat16 rounds, no more"
    rounded = {name: tensor.bfloat16() for name, tensor in adapted.merge_and_unload().state_dict().items()}
    exported = load(model, dtype=torch.bfloat16).state_dict()
    assert rounded.keys() == exported.keys()
    assert all(torch.equal(rounded[name], tensor) for name, tensor in exported.items())

    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == LORA.model.base
    assert weight_keys(model).keys() == weight_keys(base.payload / "model").keys()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (model / name).read_bytes() == (base.payload / "model" / name).read_bytes()
    assert not (model / "model.safetensors.index.json").exists()
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    ids = {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    ends = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    assert ids["<|im_end|>"] in ([ends] if isinstance(ends, int) else ends), "every server must stop at the end of a turn"
    assert 0 <= converted.metrics["merge_error"] <= convert.MERGE_TOLERANCE
    assert converted.metrics["next_token_agreement"] >= convert.MIN_AGREEMENT


def test_the_same_inputs_give_the_same_bytes(store: Store, tmp_path: Path) -> None:
    converted = made("convert", LORA, store)
    run(LORA, store, tmp_path / "again")
    files = [path.relative_to(converted.payload) for path in converted.payload.rglob("*") if path.is_file()]
    assert all((converted.payload / file).read_bytes() == (tmp_path / "again" / "payload" / file).read_bytes() for file in files)


def test_the_cards_tell_base_data_and_checks(store: Store) -> None:
    converted = made("convert", LORA, store)
    texts = {name: (converted.payload / name / "README.md").read_text() for name in ("model", "adapter")}
    headers = {name: yaml.safe_load(text.split("---")[1]) for name, text in texts.items()}
    assert headers["model"]["base_model"] == headers["adapter"]["base_model"] == LORA.model.base
    assert [headers[name]["base_model_relation"] for name in texts] == ["finetune", "adapter"]
    assert [headers[name]["library_name"] for name in texts] == ["transformers", "peft"]
    assert "Weights in bfloat16" in texts["model"] and "Weights in float32" in texts["adapter"]
    (file,) = prepare.files_of(LORA)
    data = f"| {plain(file.name)} | {sha256(made('prepare', LORA, store).payload / 'documents' / '00000' / 'ids.bin')} |"
    last_loss = f"{made('train', LORA, store).metrics['last_loss']:.4g}"
    for text in texts.values():
        assert data in text and f"last loss: {last_loss}" in text and "of the largest" in text
        assert str(store.root) not in text and str(PROJECT) not in text


@pytest.mark.parametrize("recipe", [LORA, FULL], ids=["lora", "full"])
def test_two_tensors_in_each_other_s_place_are_found(recipe: Recipe, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one shape and with little to say: the logits of a few samples hardly change."""
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    named = checkpoint.to_hugging_face

    def swapped(folder: Path, tensors: Tensors) -> Tensors:
        found = named(folder, tensors)
        return {**found, gate: found[up], up: found[gate]}

    monkeypatch.setattr(checkpoint, "to_hugging_face", swapped)
    with pytest.raises(DataError, match=r"tensor model\.layers\.0\.mlp\.gate_proj\.weight read back from the exported folder is not what"):
        run(recipe, store, tmp_path / "out")


def test_full_training_exports_no_adapter(store: Store, tmp_path: Path) -> None:
    assert "merge_error" not in run(FULL, store, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "payload").iterdir()) == ["facts.json", "model"]


def test_small_shards_are_one_model(store: Store, tmp_path: Path) -> None:
    recipe = FULL.model_copy(update={"convert": FULL.convert.model_copy(update={"max_shard_size": "50KB"})})
    run(recipe, store, tmp_path / "out")
    model = tmp_path / "out" / "payload" / "model"
    assert len(list(model.glob("*.safetensors"))) > 2 and (model / "model.safetensors.index.json").is_file()
    assert load(model, dtype=torch.bfloat16).num_parameters() > 100_000


@pytest.mark.parametrize("recipe", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_not_exported(recipe: Recipe, value: float, store: Store, tmp_path: Path) -> None:
    checkpoint = with_value(made("train", recipe, store).payload, tmp_path / "bad", 3, value)
    with pytest.raises(DataError, match=r"tensor model\.layers\.0\.mlp\.\S+ holds NaN or infinity"):
        run(recipe, store, tmp_path / "out", checkpoint=checkpoint)


def test_what_float16_cannot_hold_is_not_exported(store: Store, tmp_path: Path) -> None:
    recipe = FULL.model_copy(update={"convert": FULL.convert.model_copy(update={"dtype": "float16"})})
    checkpoint = with_value(made("train", recipe, store).payload, tmp_path / "big", 3, 1e6)
    with pytest.raises(DataError, match=r"holds NaN or infinity as torch\.float16"):
        run(recipe, store, tmp_path / "out", checkpoint=checkpoint)


@pytest.mark.parametrize("recipe", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
        {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
        {"intermediate_size": 96},
    ],
    ids=["a layer less", "a layer more", "narrower"],
)
def test_a_checkpoint_of_another_base_is_refused(recipe: Recipe, config: dict[str, Any], store: Store, tmp_path: Path) -> None:
    base = other_base(made("base", recipe, store).payload, tmp_path / "base", **config)
    with pytest.raises(DataError, match=r"trained with another base model or method; it differs in model\.layers\."):
        run(recipe, store, tmp_path / "out", base=base)


@pytest.mark.parametrize(("recipe", "other"), [(LORA, FULL), (FULL, LORA)], ids=["full as lora", "lora as full"])
def test_a_checkpoint_of_another_method_is_refused(recipe: Recipe, other: Recipe, store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="trained with another base model or method"):
        run(recipe, store, tmp_path / "out", checkpoint=made("train", other, store).payload)


@pytest.mark.parametrize(
    ("old", "new"),
    [("<|im_start|>'", "<|im_start|> '"), ("<|im_end|>'", "<|im_end|> '"), ("+ message['content'] +", "+ message['content'] | upper +")],
)
def test_a_chat_template_that_training_did_not_see_is_refused(old: str, new: str, store: Store, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(made("base", FULL, store).payload, base)
    template = base / "model" / "chat_template.jinja"
    assert old in template.read_text()
    template.write_text(template.read_text().replace(old, new))
    with pytest.raises(DataError, match="the exported chat template gives other tokens than training saw: conversation 0 differs at token"):
        run(FULL, store, tmp_path / "out", base=base)


def test_a_torn_base_is_refused(store: Store, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(made("base", FULL, store).payload, base)
    with open(base / "model" / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, 2) - 100)
    with pytest.raises(DataError, match=r"model\.safetensors: not a whole safetensors file"):
        run(FULL, store, tmp_path / "out", base=base)


def test_a_base_without_a_tokenizer_is_refused(store: Store, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(made("base", FULL, store).payload, base)
    (base / "model" / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match=r"tokenizer\.json: not a tokenizer"):
        run(FULL, store, tmp_path / "out", base=base)


def test_a_tokenizer_that_contradicts_itself_is_refused(store: Store, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(made("base", FULL, store).payload, base)
    file = base / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    one, other = tokenizer["added_tokens"][-2:]
    one["id"], other["id"] = other["id"], one["id"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match=r"turns the control token .* into \[259\], not into 260"):
        run(FULL, store, tmp_path / "out", base=base)


def test_a_damaged_checkpoint_is_refused(store: Store, tmp_path: Path) -> None:
    shutil.copytree(made("train", FULL, store).payload, tmp_path / "bad")
    (file,) = (tmp_path / "bad" / "checkpoint" / "tensors").iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="the checkpoint is damaged or incomplete"):
        run(FULL, store, tmp_path / "out", checkpoint=tmp_path / "bad")
