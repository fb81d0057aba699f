"""Streams of tensors: what is written is what the safetensors library writes, and what is read what it reads."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

from xtuner_core.errors import DataError, RecipeError, StorageError
from xtuner_core.export import tensors as module
from xtuner_core.export.tensors import Extent, Lazy, finite, open_file, open_folder, write_file, write_folder

INDEX = "model.safetensors.index.json"
KINDS = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64,
]  # fmt: skip


@st.composite
def models(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=1, max_size=8, unique=True))
    names = [name for name in names if name != "__metadata__"] or ["weight"]
    shapes = st.lists(st.integers(0, 5), max_size=3)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    return {name: torch.randn(draw(shapes), generator=generator).mul(3).to(draw(st.sampled_from(KINDS))) for name in names}


def lazies(tensors: dict[str, torch.Tensor]) -> dict[str, Lazy]:
    return {name: Lazy.of(tensor) for name, tensor in tensors.items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Also NaN, and types that torch cannot compare."""
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


@settings(max_examples=60)
@given(tensors=models())
def test_the_bytes_are_the_library_s(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("model")
    write_folder(lazies(tensors), folder)
    [file] = folder.iterdir()
    assert file.name == "model.safetensors" and file.read_bytes() == save(tensors, {"format": "pt"})
    copy = tmp_path_factory.mktemp("copy")
    write_folder(open_folder(folder), copy)  # this time from file to file
    assert (copy / "model.safetensors").read_bytes() == file.read_bytes()
    found = open_folder(folder)
    assert found.keys() == tensors.keys() and all(same(found[name].read(), tensors[name]) for name in tensors)


@settings(max_examples=60)
@given(tensors=models(), limit=st.integers(1, 400))
def test_shards_are_no_larger_than_asked_for(
    tensors: dict[str, torch.Tensor], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("model")
    told: list[int] = []
    write_folder(lazies(tensors), folder, f"{limit / 1000}KB", told.append)
    files = sorted(folder.glob("*.safetensors"))
    held = {file.name: load_file(file) for file in files}
    assert {name for part in held.values() for name in part} == tensors.keys()
    for part in held.values():
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= limit
        assert all(same(part[name], tensors[name]) for name in part)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(told) == total
    assert (folder / INDEX).exists() == (len(files) > 1)
    if len(files) > 1:
        assert [file.name for file in files] == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
        told_index = json.loads((folder / INDEX).read_text())
        assert told_index["weight_map"] == {name: file for file, part in held.items() for name in part}
        assert told_index["metadata"]["total_size"] == total


def test_a_size_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"max_shard_size: .*'5 apples'"):
        write_folder({}, tmp_path, "5 apples")


def test_a_cast_rounds_once_and_an_equal_type_changes_nothing(tmp_path: Path) -> None:
    tensor = torch.randn(7, 5)
    write_file(tmp_path / "a", {"a": Lazy.of(tensor)})
    stored = open_file(tmp_path / "a")["a"]
    assert same(stored.to(torch.bfloat16).read(), tensor.bfloat16()) and stored.to(torch.bfloat16).bytes == 70
    assert stored.to(torch.float32) is stored


def test_what_is_written_in_pieces_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of numbers in a file, in two, and in memory; cast and checked on the way, and a fault in a late piece is found."""
    monkeypatch.setattr(module, "PIECE", 7)
    tensor = torch.randn(9, 5)
    for rows, name in ((tensor[:4], "a"), (tensor[4:], "b"), (tensor, "whole")):
        write_file(tmp_path / name, {"x": Lazy.of(rows)})
    halves = [extent for name in "ab" for extent in open_file(tmp_path / name)["x"].extents]
    for lazy in (open_file(tmp_path / "whole")["x"], Lazy.stored((9, 5), torch.float32, *halves), Lazy.of(tensor)):
        one = finite({"x": lazy.to(torch.bfloat16)})["x"]
        assert max(part.numel() for part in one.pieces()) == 7
        assert same(torch.cat([part.clone() for part in one.pieces()]).view(9, 5), tensor.bfloat16()) and same(
            one.read(), tensor.bfloat16()
        )
        write_file(tmp_path / "written", {"x": one})
        assert same(load_file(tmp_path / "written")["x"], tensor.bfloat16())
    with pytest.raises(DataError, match="tensor x holds NaN"):
        write_file(tmp_path / "written", finite({"x": Lazy.of(tensor.index_fill(0, torch.tensor(8), float("nan")))}))


def test_changing_what_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    write_file(tmp_path / "a", {"a": Lazy.of(torch.ones(3))})
    open_file(tmp_path / "a")["a"].read().zero_()
    assert load_file(tmp_path / "a")["a"].tolist() == [1, 1, 1]


def test_a_tensor_in_several_places_and_at_odd_ones(tmp_path: Path) -> None:
    header = b'{"b":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"a":{"dtype":"F32","shape":[2],"data_offsets":[3,11]}}'
    (tmp_path / "odd").write_bytes(struct.pack("<Q", len(header)) + header + bytes([1, 2, 3]) + struct.pack("<2f", 0.5, -2.0))
    odd = open_file(tmp_path / "odd")
    assert odd["b"].read().tolist() == [1, 2, 3] and odd["a"].read().tolist() == [0.5, -2.0]
    twice = Lazy.stored((2, 2), torch.float32, *odd["a"].extents, Extent(tmp_path / "odd", 0, 0), *odd["a"].extents)
    write_file(tmp_path / "twice", {"a": twice})
    for found in (twice.read(), load_file(tmp_path / "twice")["a"]):
        assert found.tolist() == [[0.5, -2.0], [0.5, -2.0]]


def test_from_a_file_system_that_cannot_copy_inside_the_kernel(tmp_path: Path) -> None:
    content = Path("/proc/version").read_bytes()
    write_file(tmp_path / "a", {"a": Lazy.stored((6,), torch.uint8, Extent(Path("/proc/version"), 2, 6))})
    assert bytes(load_file(tmp_path / "a")["a"].tolist()) == content[2:8]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_what_is_not_finite_is_named(value: float, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 8)
    good, bad = torch.full((3, 7), 1e4).to(kind), torch.ones(3, 7).index_fill(1, torch.tensor(6), value).to(kind)
    checked = finite(lazies({"good": good, "bad": bad, "whole": torch.arange(9), "empty": torch.empty(0)}))
    assert all(checked[name].read().dtype == checked[name].dtype for name in ("good", "whole", "empty"))
    with pytest.raises(DataError, match="tensor bad holds NaN or infinity"):
        checked["bad"].read()


def test_a_full_disk_names_the_file() -> None:
    for tensor in (Lazy.of(torch.ones(9)), Lazy.stored((9,), torch.uint8, Extent(Path(__file__), 0, 9))):
        with pytest.raises(StorageError, match="/dev/full: no space left"):
            write_file(Path("/dev/full"), {"a": tensor})


def test_a_file_that_becomes_shorter_is_refused(tmp_path: Path) -> None:
    write_file(tmp_path / "a", {"a": Lazy.of(torch.ones(99))})
    opened = open_file(tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-9])
    with pytest.raises(DataError, match="a: became shorter"):
        write_file(tmp_path / "b", opened)
    with pytest.raises(DataError, match="a: became shorter"):
        opened["a"].read()
    with pytest.raises(DataError, match="not a whole safetensors file"):
        open_file(tmp_path / "a")


@pytest.mark.parametrize("outside", ["../model.safetensors", "/etc/passwd", "..", "", "pytorch_model.bin", 3])
def test_an_index_names_files_of_its_folder_alone(outside: object, tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", {"a": Lazy.of(torch.ones(3))})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"a": outside}}))
    with pytest.raises(DataError, match="is no safetensors file in this folder"):
        open_folder(tmp_path / "model")


def test_numbers_that_torch_has_not_are_refused(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}'
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"ab")
    with safe_open(tmp_path / "model.safetensors", "pt"):
        pass
    with pytest.raises(DataError, match="the tensor a holds numbers of type F4"):
        open_folder(tmp_path)
