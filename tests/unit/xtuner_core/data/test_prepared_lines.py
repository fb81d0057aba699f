"""The real prepare stage on bad input: every line is accounted for, and the limit on rejected lines holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import prepare
from pipelines.recipe import load_recipe
from pipelines.stage import Work
from xtuner_core.data.dataset import PackedDataset
from xtuner_core.data.inputs import Part, rows
from xtuner_core.errors import DataError

HOSTILE = Path(__file__).resolve().parents[4] / "data" / "hostile"
PROMISES = dict(re.findall(r"^\| `(\w+)` \|.*\| (.+) \|$", (HOSTILE / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
"""File → what its README says prepare must do."""
Place = Callable[[], Work]


def prepared(place: Place, files: Path | list[Path], *overrides: str) -> tuple[dict[str, Any], Work]:
    """Metrics of the stage, and where it wrote."""
    names = ",".join(str(file) for file in (files if isinstance(files, list) else [files]))
    work = place()
    return prepare.run(load_recipe("qwen3_tiny_full_openai", [f"data.train={names}", *overrides]), work), work


def rejected(work: Work) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (work.record / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


def chat(answer: str) -> str:
    return json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]) + "\n"


def test_the_readme_lists_every_file() -> None:
    assert set(PROMISES) == {file.stem for file in HOSTILE.glob("*.jsonl")}


@pytest.mark.parametrize("name", PROMISES)
def test_each_hostile_file_is_treated_as_its_readme_says(name: str, prepare_place: Place) -> None:
    file = HOSTILE / f"{name}.jsonl"
    metrics, work = prepared(prepare_place, file, "data.max_rejected=0.5")
    assert metrics["lines"] == metrics["accepted"] + metrics["rejected"] + metrics["blank"] == len(list(rows(Part(file))))
    if PROMISES[name].startswith("reject"):
        assert (metrics["accepted"], metrics["rejected"]) == (2, 1)
        [row] = rejected(work)
        assert (row["file"], row["line"]) == (str(file), 2)
        assert row["byte_offset"] == file.read_bytes().index(b"\n") + 1
        assert row["reason"] and "Traceback" not in row["reason"]
        [group] = json.loads((work.record / "report.json").read_text())["rejects"]
        assert group["examples"] == [{"place": f"data/hostile/{name}.jsonl:2", "reason": row["reason"]}]
    else:
        assert metrics["rejected"] == 0 and rejected(work) == []
        assert (metrics["blank"] > 0) == (name == "blank_lines")
    assert len(PackedDataset(work.payload)) == metrics["packs"] == 1


def test_a_rejected_line_stops_the_stage_unless_allowed(prepare_place: Place) -> None:
    with pytest.raises(DataError) as error:
        prepared(prepare_place, HOSTILE / "unknown_role.jsonl")
    told = str(error.value)
    assert "1 of 3 lines rejected (33.33%), data.max_rejected allows 0.00%" in told
    assert "unknown_role.jsonl:2: message 1: unknown role 'wizard'" in told
    [allowed] = re.findall(r"(data\.max_rejected=\S+)", told)
    metrics, _ = prepared(prepare_place, HOSTILE / "unknown_role.jsonl", allowed)
    assert metrics["rejected"] == 1


@pytest.mark.parametrize(("share", "passes"), [(0.25, True), (0.249, False)])
def test_the_share_is_of_lines_that_are_not_blank(tmp_path: Path, prepare_place: Place, share: float, passes: bool) -> None:
    file = tmp_path / "quarter.jsonl"
    file.write_text(chat("a") * 3 + "\n" * 20 + "rubbish\n")
    if passes:
        metrics, _ = prepared(prepare_place, file, f"data.max_rejected={share}")
        assert (metrics["accepted"], metrics["rejected"], metrics["blank"]) == (3, 1, 20)
    else:
        with pytest.raises(DataError, match="1 of 4 lines"):
            prepared(prepare_place, file, f"data.max_rejected={share}")


def test_a_conversation_that_is_too_long_is_rejected_with_its_length(tmp_path: Path, prepare_place: Place) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text("".join(map(chat, ("fits", "x" * 64, "x" * 65))))
    overhead = 1 + len("user\n") + 1 + 2 + 1 + len("assistant\n") + 2  # bytes and control tokens around question and answer
    limit = f"data.max_length={overhead + 64}"
    metrics, work = prepared(prepare_place, file, limit, "data.max_rejected=0.4")
    assert metrics["accepted"] == 2
    [row] = rejected(work)
    assert row["line"] == 3
    assert row["reason"].startswith(f"{overhead + 65} tokens, data.max_length is {overhead + 64}")


def test_several_files_keep_their_own_count(prepare_place: Place) -> None:
    files = [HOSTILE / f"{name}.jsonl" for name in ("blank_lines", "not_a_conversation")]
    metrics, work = prepared(prepare_place, files, "data.max_rejected=0.5")
    report = json.loads((work.record / "report.json").read_text())
    assert [(row["accepted"], row["rejected"], row["blank"]) for row in report["files"]] == [(2, 0, 3), (2, 1, 0)]
    assert metrics["accepted"] == sum(len(shard) for shard in PackedDataset(work.payload).shards) == 4


@pytest.mark.parametrize("content", ["", "\n \n", "rubbish\n"])
def test_nothing_to_train_on_is_an_error(tmp_path: Path, prepare_place: Place, content: str) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=r"nothing to train on: .*empty\.jsonl"):
        prepared(prepare_place, file, "data.max_rejected=1.0")
