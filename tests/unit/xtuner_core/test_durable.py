"""What a killed process leaves behind is cleared away by the next one, and nobody else's work is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xtuner_core.durable import drafted
from xtuner_core.errors import RecipeError

KILLED = """
import os, signal, sys
from pathlib import Path
from xtuner_core.durable import drafted
with drafted(Path(sys.argv[1])) as draft:
    draft.mkdir()
    (draft / "half.bin").write_bytes(b"0" * 100)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_target_and_its_draft_goes_with_the_next(tmp_path: Path) -> None:
    target = tmp_path / "model"
    assert subprocess.run([sys.executable, "-c", KILLED, str(target)], cwd=Path(__file__).parents[3]).returncode == -9
    assert not target.exists() and len(list(tmp_path.glob(".model.*.draft"))) == 1
    others = [tmp_path / f".model.{os.getppid()}.draft", tmp_path / ".another.999999999.draft", tmp_path / ".model.notes.draft"]
    for other in others:
        other.mkdir()
    with drafted(target) as draft:
        draft.mkdir()
    assert sorted(tmp_path.iterdir()) == sorted([target, *others])


def test_what_fails_leaves_nothing_and_what_is_there_stays(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), drafted(tmp_path / "file") as draft:
        draft.write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RecipeError, match="exists already"), drafted(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
