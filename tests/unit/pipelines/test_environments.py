"""Separate environments: whole or built again, and a readable error where pip fails. Real pip, two tiny wheels made here."""

from __future__ import annotations

import subprocess
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import environments
from pipelines.cli import main
from pipelines.environments import KNOWN, Environment, check, ensure, list_environments, pinned_versions
from xtuner_core.errors import RecipeError, StorageError


def _wheel(folder: Path, name: str, version: str, needs: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def known(tmp_path: Path, only_source: Callable[[Path], None]) -> dict[str, Environment]:
    """An environment `tiny` of two packages, of which newer versions than the pinned ones exist."""
    for name in ("underlay", "tool"):
        for version in ("1.0", "2.0"):
            _wheel(tmp_path / "wheels", name, version)
    only_source(tmp_path / "wheels")
    constraints = tmp_path / "constraints-tiny.txt"
    constraints.write_text("tool==1.0\nunderlay==1.0\n")
    return {"tiny": Environment(constraints, first="underlay", package="tool", modules=("tool",))}


def _versions(python: Path) -> str:
    command = [str(python), "-c", "import tool, underlay; print(tool.version, underlay.version)"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_an_environment_has_the_pinned_versions_is_reused_and_a_half_made_one_is_rebuilt(
    tmp_path: Path, known: dict[str, Environment]
) -> None:
    """Two ask for it at once: it is built once."""
    root, said = tmp_path / "environments", []
    threads = [threading.Thread(target=ensure, args=("tiny", said.append), kwargs={"root": root, "known": known}) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("built in" in line for line in said) == 1
    python = ensure("tiny", said.append, root=root, known=known)
    assert _versions(python) == "1.0 1.0"
    assert [state.complete for state in list_environments(root, known)] == [True]

    said.clear()
    assert ensure("tiny", said.append, root=root, known=known) == python
    assert said == []

    folder = python.parents[1]
    assert check("tiny", tmp_path / "environments", known) == []
    (folder / "complete.json").unlink()
    assert "only half; run `xtuner env create tiny`" in check("tiny", tmp_path / "environments", known)[0]
    (folder / "left-over").write_text("of the interrupted attempt")
    assert [state.complete for state in list_environments(root, known)] == [False]
    ensure("tiny", said.append, root=root, known=known)
    assert not (folder / "left-over").exists()
    assert _versions(python) == "1.0 1.0"


def test_other_pins_are_another_environment(tmp_path: Path, known: dict[str, Environment]) -> None:
    before = list_environments(tmp_path, known)[0].path
    known["tiny"].constraints.write_text("tool==2.0\nunderlay==1.0\n")
    assert list_environments(tmp_path, known)[0].path != before


def test_ctrl_c_leaves_nothing_that_is_trusted(tmp_path: Path, known: dict[str, Environment]) -> None:
    def interrupt(line: str) -> None:
        if "Installing collected packages" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure("tiny", interrupt, root=tmp_path, known=known)
    assert [state.complete for state in list_environments(tmp_path, known)] == [False]


def test_failing_pip_is_explained(tmp_path: Path, known: dict[str, Environment]) -> None:
    known["tiny"].constraints.write_text("tool==1.0\nunderlay==9.9\n")
    with pytest.raises(StorageError) as caught:
        ensure("tiny", print, root=tmp_path, known=known)
    message = str(caught.value)
    assert "No matching distribution found for underlay==9.9" in message
    assert "TORCH_INDEX_URL" in message
    (log,) = tmp_path.glob("tiny-*.log")
    assert str(log) in message and "9.9" in log.read_text()
    assert [state.complete for state in list_environments(tmp_path, known)] == [False]


def test_the_first_package_can_come_from_a_source_of_its_own(
    tmp_path: Path, known: dict[str, Environment], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    _wheel(index, "x", "0")
    (index / "underlay").mkdir()
    (tmp_path / "wheels" / "underlay-1.0-py3-none-any.whl").rename(index / "underlay" / "underlay-1.0-py3-none-any.whl")
    (index / "underlay" / "index.html").write_text('<a href="underlay-1.0-py3-none-any.whl">underlay-1.0-py3-none-any.whl</a>')
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    python = ensure("tiny", print, torch_index_url=index.as_uri(), root=tmp_path, known=known)
    assert _versions(python) == "1.0 1.0"


def test_what_a_module_says_is_no_complaint_and_damage_is_told_with_what_to_do(tmp_path: Path, known: dict[str, Environment]) -> None:
    python = ensure("tiny", print, root=tmp_path, known=known)
    (packages,) = python.parents[1].glob("lib/*/site-packages")
    (packages / "tool.py").write_text("print('welcome')")
    assert check("tiny", tmp_path, known) == []
    (packages / "tool.py").write_text("import underlay, no_such_part")
    (packages / "underlay-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: underlay\nVersion: 3.0\nRequires-Dist: gone\n"
    )
    said = "\n".join(check("tiny", tmp_path, known))
    assert "underlay is 3.0, pinned is 1.0" in said
    assert "tool does not import: ModuleNotFoundError: No module named 'no_such_part'" in said
    assert "underlay 3.0 requires gone, which is not installed." in said
    assert f"rm -r {python.parents[1]}" in said
    (python.parents[1] / "pyvenv.cfg").unlink()
    python.unlink()
    python.write_text("#!/bin/sh\nkill -SEGV $$\n")
    assert "does not answer" in check("tiny", tmp_path, known)[0]
    python.chmod(0o755)
    assert "ended with status -11: without a word" in check("tiny", tmp_path, known)[0]


def test_what_is_left_out_on_purpose_is_not_asked_for(tmp_path: Path, known: dict[str, Environment]) -> None:
    _wheel(tmp_path / "wheels", "tool", "1.0", needs="Requires-Dist: no-such-engine\n")
    known["tiny"] = replace(known["tiny"], nothing_else=True)
    assert _versions(ensure("tiny", print, root=tmp_path, known=known)) == "1.0 1.0"
    assert check("tiny", tmp_path, known) == []


def test_one_that_needs_a_gpu_is_refused_without_one(
    tmp_path: Path, known: dict[str, Environment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    known["tiny"] = replace(known["tiny"], needs_cuda=True)
    with pytest.raises(RecipeError, match=r"(?s)needs a CUDA GPU, and none is visible.*--without-cuda"):
        ensure("tiny", print, root=tmp_path, known=known)
    assert list(tmp_path.glob("tiny-*")) == []


def test_the_command_checks_what_is_built(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environments, "_is_complete", lambda folder: False)
    assert main(["env", "check", "lmdeploy", "--without-cuda"]) == 74
    assert "run `xtuner env create lmdeploy --without-cuda`" in capsys.readouterr().err
    assert main(["env", "check", "lmdeplo"]) == 78
    assert "'lmdeplo' is not one of opencompass, lmdeploy" in capsys.readouterr().err


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="opencompass"):
        ensure("opencompas", print)


def test_the_shipped_pins_name_what_is_installed() -> None:
    for environment in KNOWN.values():
        pins = pinned_versions(environment.constraints)
        assert environment.first in pins and environment.package in pins
