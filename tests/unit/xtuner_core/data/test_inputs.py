"""Input files of every kind: which are found, and every row of them read, with its place, in bounded memory."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xtuner_core.data.formats import openai
from xtuner_core.data.inputs import Part, input_files, parts_of, rows
from xtuner_core.data.json_array import array_rows
from xtuner_core.data.jsonl import MAX_LINE_BYTES
from xtuner_core.errors import DataError

PROJECT = Path(__file__).resolve().parents[4]

# Every kind ------------------------------------------------------------------------------------------------------------------------

CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}
RECORDS: list[dict[str, Any]] = [
    {
        "id": number,
        "messages": [
            {"role": "user", "content": f'é "{number}",\r\n\tq\\'},
            *([CALL, {"role": "tool", "content": "1", "name": "f"}] if number % 3 == 0 else []),
            {"role": "assistant", "content": f"]}},[{{ {number}", "thinking": "hm" if number % 2 else None},
        ],
        "tools": json.dumps([{"name": "f"}]) if number % 3 == 0 else None,
    }
    for number in range(50)
]


def lines() -> bytes:
    return "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def write_csv(path: Path) -> None:
    with open(path, "w", encoding="utf-8-sig", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["id", "messages", "tools"])
        table.writerows([record["id"], json.dumps(record["messages"]), record["tools"] or ""] for record in RECORDS)


def write_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    with pa.ipc.new_file(path, table.schema) as stream:
        stream.write_table(table, max_chunksize=7)


def write_stream(path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    with pa.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table, max_chunksize=7)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_bytes(lines()),
    "a.json": lambda path: path.write_text(json.dumps(RECORDS)),
    "indented.json": lambda path: path.write_text(json.dumps(RECORDS, indent=1, ensure_ascii=False), encoding="utf-8-sig"),
    "object.json": lambda path: path.write_text(json.dumps({"version": 1, "about": {"by": ["x"]}, "data": RECORDS, "count": 50})),
    "lines.json": lambda path: path.write_bytes(lines()),
    "a.csv": write_csv,
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=7),
    "a.arrow": write_stream,
    "file.arrow": write_arrow_file,
}


def samples(file: Path) -> list[Any]:
    found = list(rows(Part(file)))
    assert [row.number for row in found] == list(range(1, len(RECORDS) + 1))
    assert not any(row.reason or row.blank for row in found)
    return [openai.parse(row.value) for row in found]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", WRITERS)
def test_the_same_records_are_the_same_samples_in_every_kind(name: str, packed: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    file = tmp_path / (name + packed)
    if packed:
        with pa.output_stream(str(file)) as stream:
            stream.write((tmp_path / name).read_bytes())
    assert samples(file) == [openai.parse(record) for record in RECORDS]


def test_a_data_set_that_datasets_saved_is_its_train_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list(RECORDS)
    train.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict({"train": train, "test": train.select(range(3))}).save_to_disk(tmp_path / "two")
    for folder, count in (("one", 3), ("two", 1)):
        files = input_files([tmp_path / folder])
        assert len(files) == count and all(file.suffix == ".arrow" for file in files)
        assert [openai.parse(row.value) for file in files for row in rows(Part(file))] == [openai.parse(record) for record in RECORDS]
    assert input_files([tmp_path]) == input_files([tmp_path / "one", tmp_path / "two"])
    (tmp_path / "two" / "train").rename(tmp_path / "two" / "other")
    with pytest.raises(DataError, match="two: a saved data set without a train split"):
        input_files([tmp_path / "two"])
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"one: data-00001-of-00003\.arrow is missing"):
        input_files([tmp_path / "one"])


def test_json_elements_are_found_whatever_the_pieces_they_are_read_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    WRITERS["object.json"](file)
    raw = file.read_bytes()
    for size in (1, 2, 3, 7, 64, 1000):
        monkeypatch.setattr("xtuner_core.data.json_array._CHUNK", size)
        with open(file, "rb") as stream:
            found = list(array_rows(stream, file))
        assert [row.value for row in found] == RECORDS
        assert all(json.JSONDecoder().raw_decode(raw[row.offset :].decode())[0] == row.value for row in found)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", []),
        (" [ ] ", []),
        ('{"data": []}', []),
        ("[1, [2], 3]", [1, [2], 3]),
        ("[1,,2,]", [1, "Expecting value", 2, "Expecting value"]),
        ('[{"a": 1, "a": 2}, NaN]', ["'a' appears twice", "NaN is not"]),
        ("[1]\n[2]\n", [[1], [2]]),
        ("[1][2]", "stands outside the array"),
        ("[1] x", "stands outside the array"),
        ("x [1]", "stands outside the array"),
        ("42", "stands outside the array"),
        ('{"a": 1}', "holds no array of records"),
        ('{"a": [1], "b": [2]}', "several arrays"),
        ('{"id": 1, "messages": [{"role": "user"}]}', "is one conversation"),
        ("[1, [2]", "ends in the middle, after element 1"),
        ('[1, "2]', "ends in the middle, after element 1"),
    ],
)
def test_what_a_json_file_may_be(text: str, told: list[Any] | str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    if isinstance(told, str):
        with pytest.raises(DataError, match=r"a\.json: .*" + told):
            list(rows(Part(file)))
        return
    for row, expected in zip(rows(Part(file)), told, strict=True):
        assert expected in row.reason if row.reason else expected == row.value


def test_a_table_keeps_what_it_has_and_no_more(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'instruction,prompt,tools\r\n"a\r\nb",[{not json,\r\n\r\n\xff,x,[]\r\nc,"[{""role"": 1}]",{\r\n"d"e,x,\r\nlast,,[1]')
    found = list(rows(Part(file)))
    assert [(row.value, row.reason, row.blank) for row in found] == [
        ({"instruction": "a\r\nb", "prompt": "[{not json"}, None, False),
        (None, None, True),
        (None, "column instruction: not UTF-8", False),
        (None, "column tools: not JSON: Expecting property name enclosed in double quotes at column 2", False),
        (None, "not CSV: ',' expected after '\"'", False),
        ({"instruction": "last", "prompt": "", "tools": [1]}, None, False),
    ]
    edges = [row.offset for row in found]
    assert [file.read_bytes()[at : at + 3] for at in edges] == [b'"a\r', b"\r\n\xff", b"\xff,x", b'c,"', b'"d"', b"las"]


def test_a_cell_that_is_not_text_costs_its_row(tmp_path: Path) -> None:
    column = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found = list(rows(Part(tmp_path / "a.parquet")))
    assert [row.value for row in found] == [{"text": "a"}, None, {"text": "c"}]
    assert "utf-8" in str(found[1].reason)


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    WRITERS["a.parquet"](file)
    raw = bytearray(file.read_bytes())
    raw[40:400] = bytes(360)
    file.write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.parquet: not Parquet, or damaged"):
        list(rows(Part(file)))


# Parts, lines and memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, 999, 10**6])
def test_parts_hold_every_line_once(size: int, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(raw := b"\xef\xbb\xbf" + lines() + b"\n" + b"x" * 500 + b"\n[]")
    whole, parts = list(rows(Part(file))), parts_of(file, size)
    assert (parts[0].start, parts[-1].end) == (0, None if size > len(raw) else len(raw))
    assert len(parts) == (53 if size == 1 else len(parts)) and (len(parts) > 1) == (size < len(raw))
    pieces = [list(rows(part)) for part in parts]
    assert [(row.offset, row.value, row.reason) for piece in pieces for row in piece] == [(r.offset, r.value, r.reason) for r in whole]
    assert all([row.number for row in piece] == list(range(1, len(piece) + 1)) for piece in pieces)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "a.csv"])
def test_other_kinds_are_one_part(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x" * 100)
    assert parts_of(tmp_path / name, 10) == [Part(tmp_path / name)]


MEASURE = """
import sys
from pathlib import Path
from xtuner_core.data.inputs import Part, rows
import pyarrow.parquet

def peak():  # not getrusage's, which begins with that of the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
reasons = [str(row.reason) for row in rows(Part(Path(sys.argv[1])))]
print(peak() - before)
print(*reasons, sep="\\n")
"""


def measured(file: Path) -> tuple[float, list[str]]:
    """Memory that reading a file takes, in MiB, and the reasons of its rows, from a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(file)], capture_output=True, text=True, cwd=PROJECT, check=True)
    memory, *reasons = done.stdout.splitlines()
    return int(memory) / 1024, reasons


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv"])
def test_a_line_of_100_mb_costs_the_memory_of_the_longest_that_is_read(name: str, tmp_path: Path) -> None:
    good = b'{"text": "a"}' if "json" in name else b"a"
    before, between, after = {"a.json": (b"[", b",\n", b"]"), "a.csv": (b"text\n", b"\n", b"\n")}.get(name, (b"", b"\n", b"\n"))
    content = before + good + between + b'"' + b"x" * 10**8 + b'"' + between + good + after
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    memory, reasons = measured(tmp_path / name)
    assert reasons == ["None", f"line of {10**8 + 3} bytes, at most {MAX_LINE_BYTES} are read", "None"]
    assert memory < 64  # the line's first 16 MiB, twice while it is put together, and buffers


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_brackets_without_end_cost_no_memory(name: str, tmp_path: Path) -> None:
    bomb = b"[" * 5 * 10**7
    (tmp_path / name).write_bytes(b"[0,\n" + bomb if name == "a.json" else b"0\n" + bomb + b"\n" + b"[" * 10**6 + b"\n0\n")
    if name == "a.json":
        with pytest.raises(DataError, match="element 2 is nested more than 10000 levels"):
            list(rows(Part(tmp_path / name)))
        return
    memory, reasons = measured(tmp_path / name)
    assert reasons == ["None", f"line of {len(bomb) + 1} bytes, at most {MAX_LINE_BYTES} are read", "nested more than 64 levels", "None"]
    assert memory < 64


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.csv"])
def test_a_large_file_is_never_held_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [{"id": number, "messages": [{"role": "user", "content": f"{number} " * 2000}], "tools": None} for number in range(8_000)]
    monkeypatch.setattr(sys.modules[__name__], "RECORDS", many)
    WRITERS[name](tmp_path / name)
    memory, reasons = measured(tmp_path / name)
    assert set(reasons) == {"None"} and len(reasons) == len(many)
    assert memory < 40  # of text there are 80 MB


# Which files ------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b"").rstrip(b"\r")), max_size=20), st.booleans())
@settings(max_examples=100, deadline=None)
def test_numbers_and_offsets_lead_back_to_the_bytes(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], mark: bool) -> None:
    assume(not (contents and contents[0].startswith(b"\xef\xbb\xbf")))
    file = tmp_path_factory.getbasetemp() / "offsets.jsonl"
    start = b"\xef\xbb\xbf" if mark else b""
    file.write_bytes(raw := start + b"".join(content + b"\r\n" for content in contents))
    found = list(rows(Part(file)))
    assert [row.number for row in found] == list(range(1, len(contents) + 1))
    assert [row.blank for row in found] == [not content.strip() for content in contents]
    edges = [*(row.offset for row in found), len(raw)]
    assert [raw[left:right] for left, right in pairwise(edges)] == [content + b"\r\n" for content in contents]


def test_input_files_of_a_path_a_folder_and_a_glob(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    a, b, c = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "deep/c.jsonl"))
    assert input_files([b]) == [b]
    assert input_files([tmp_path]) == [a, b, c]
    assert input_files([f"{tmp_path}/*.jsonl"]) == [a, b]
    assert input_files([b, tmp_path, b]) == [b, a, c]


@pytest.mark.parametrize("missing", ["gone.jsonl", "empty", "*.json"])
def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=missing.replace("*", r"\*") + ": no such file"):
        input_files([tmp_path / missing])


def test_a_folder_is_every_known_file_below_it(tmp_path: Path) -> None:
    names = ["a.jsonl", "b.json.gz", "c.PARQUET", "d.csv.zst", "e.arrow", "sub/f.jsonl"]
    for name in [*names, ".hidden.jsonl", ".cache/x.jsonl", "notes.txt", "dataset_infos.json", "g.gz", "README.md"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(file.relative_to(tmp_path)) for file in input_files([tmp_path])] == names
    with pytest.raises(DataError, match=r"notes\.txt: not a kind of file that is read: \.jsonl, "):
        input_files([tmp_path / "notes.txt"])


def test_a_hub_repository_is_its_train_split_and_links_keep_their_names(tmp_path: Path) -> None:
    for name in ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"):
        blob = tmp_path / "blobs" / name.replace("/", "_")
        blob.parent.mkdir(exist_ok=True)
        blob.with_suffix("").touch()
        link = tmp_path / "snapshot" / name
        link.parent.mkdir(exist_ok=True, parents=True)
        link.symlink_to(blob.with_suffix(""))
    files = [tmp_path / "snapshot" / "data" / f"train-0000{shard}-of-00002.parquet" for shard in (0, 1)]
    assert input_files([tmp_path / "snapshot"]) == files
    assert input_files([f"{tmp_path}/snapshot/*/test*"]) == [tmp_path / "snapshot/data/test-00000-of-00001.parquet"]
