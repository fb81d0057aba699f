"""One change, one place: a file dropped into a folder is found by its name and used, with no edit elsewhere."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pipelines import chat, chatters, evaluate, evaluators, launchers, prepare, train
from pipelines.recipe import PROJECT, load_recipe, shipped_names
from pipelines.stage import Metrics, Stage, Work
from xtuner_core import adapters, registry, trackers
from xtuner_core.checkpoint.state import trained_tensors
from xtuner_core.config import TrainConfig
from xtuner_core.data import formats, packing, templates
from xtuner_core.errors import Interrupted, RecipeError
from xtuner_core.models.load import load_model
from xtuner_core.optim import optimizers, schedules
from xtuner_core.optim.optimizer import make_optimizer
from xtuner_core.optim.schedule import learning_rate

REGISTRIES = (formats, templates, packing, adapters, optimizers, schedules, trackers, launchers, evaluators, chatters)

FORMAT = """
from xtuner_core.data.conversation import Conversation, Message

def parse(value):
    return Conversation((Message("user", value["q"]), Message("assistant", value["a"], loss=True)))
"""

TEMPLATE = """
from xtuner_core.data.pieces import Control, Text

JINJA, STOP = "unused", "<|im_end|>"

def render(conversation):
    for message in conversation.messages:
        yield Text(message.content, loss=message.loss)
        yield Control(STOP, loss=message.loss)
"""

METHOD = """
import torch
from transformers import AutoModelForCausalLM

def load(model_dir, train, **options):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64, **options)

def prepare(model, train, seed):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("norm.weight"))
"""

OPTIMIZER = """
import torch

def make(model, train):
    return torch.optim.SGD(model.parameters(), lr=train.lr)
"""

SCHEDULE = """
def share(progress, train):
    return 1 - progress ** 2
"""

LAUNCHER = """
import sys

TELL = "import json, pathlib, sys; c = json.load(open(sys.argv[1])); o = pathlib.Path(c['work_dir'], 'outcome.json'); "
TELL += "o.write_text(json.dumps({'code': 75, 'message': 'by the throw-away launcher'})); sys.exit(75)"

def check(launch):
    pass

def command(job):
    return [sys.executable, "-c", TELL, str(job.config)]

def environment(job):
    return {}

def described(job):
    return "thrown away"
"""

EVALUATOR = """
from pipelines.evaluators import DatasetScore, Kind, Sample

KINDS = {"sums": Kind("one and one", needs_path=False)}

def evaluate(model_dir, datasets, config, endpoint, work, log):
    (dataset,) = datasets
    return {dataset.name: DatasetScore("accuracy", (Sample("1+1", "2", "2", 1.0), Sample("1+2", "3", "4", 0.0)))}

def versions():
    return {"throwaway": "9"}
"""

CHATTER = """
import json, threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pipelines.chatters import Endpoint

def unavailable():
    return None

class Same(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        delta = {"role": "assistant", "content": f"{asked['model']} heard {asked['messages'][-1]['content']}"}
        choice = {"index": 0, "delta": delta, "finish_reason": "stop"}
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
        body = f"data: {json.dumps(chunk)}\\n\\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

@contextmanager
def serve(request, log_file, log):
    with HTTPServer((request.host, request.port or 0), Same) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "parrot")
        server.shutdown()
"""


@pytest.fixture
def drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[ModuleType, str], str]]:
    """Put `throwaway.py` into a package's folder (one more folder of the package, so that the real one stays clean)."""
    dropped: list[ModuleType] = []

    def drop_into(package: ModuleType, text: str) -> str:
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / "throwaway.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        importlib.invalidate_caches()
        dropped.append(package)
        return "throwaway"

    yield drop_into
    for package in dropped:
        sys.modules.pop(f"{package.__name__}.throwaway", None)
        vars(package).pop("throwaway", None)


def _run(stage: Stage, folder: Path, inputs: dict[str, Path], *overrides: str) -> Metrics:
    parts = {part: folder / part for part in ("payload", "record", "scratch", "cache")}
    for part in parts.values():
        part.mkdir(parents=True)
    return stage.run(load_recipe("qwen3_tiny_full_openai", overrides), Work(inputs, **parts, log=print))


def _jsonl(path: Path, row: object) -> Path:
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("package", REGISTRIES, ids=lambda package: package.__name__)
def test_an_unknown_name_lists_the_known_ones(package: ModuleType) -> None:
    shipped = [file.stem for file in Path(package.__path__[0]).glob("[!_]*.py")]
    assert shipped
    with pytest.raises(RecipeError) as caught:
        registry.find(package, "nosuch")
    assert "'nosuch' is not one of the" in str(caught.value)
    assert all(name in str(caught.value) for name in shipped)


@pytest.mark.parametrize("name", ["__init__", "_private", "../cli", "", "os.path"])
def test_only_the_folder_s_own_files_are_names(name: str) -> None:
    with pytest.raises(RecipeError, match="is not one of the launchers: kubernetes, local"):
        registry.find(launchers, name)


def test_a_format(drop: Callable[[ModuleType, str], str], tmp_path: Path, tiny_model_folder: Path) -> None:
    name = drop(formats, FORMAT)
    data = _jsonl(tmp_path / "data.jsonl", {"q": "1+1", "a": "two"})
    metrics = _run(prepare.STAGE, tmp_path / "out", {"base": tiny_model_folder.parent}, f"data.format={name}", f"data.train={data}")
    assert (metrics["accepted"], metrics["learned_tokens"]) == (1, len("two") + 1)


def test_a_template(drop: Callable[[ModuleType, str], str], tmp_path: Path, tiny_model_folder: Path) -> None:
    name = drop(templates, TEMPLATE)
    shutil.copytree(tiny_model_folder, tmp_path / "base" / "model", ignore=shutil.ignore_patterns("*.jinja", "*.safetensors"))
    data = _jsonl(tmp_path / "data.jsonl", [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "two"}])
    metrics = _run(prepare.STAGE, tmp_path / "out", {"base": tmp_path / "base"}, f"model.template={name}", f"data.train={data}")
    assert (metrics["template"], metrics["tokens"]) == (name, len("1+1") + len("two") + 2)


def test_a_method(drop: Callable[[ModuleType, str], str], tiny_model_folder: Path) -> None:
    train = TrainConfig(method=drop(adapters, METHOD))
    model = load_model(tiny_model_folder, train)
    registry.find(adapters, train.method).prepare(model, train, 0)
    assert model.dtype == torch.float64
    assert {name.rsplit(".", 2)[-2] for name in trained_tensors(model)} >= {"norm", "input_layernorm"}
    assert all("norm" in name for name in trained_tensors(model))


def test_an_optimizer(drop: Callable[[ModuleType, str], str]) -> None:
    model = torch.nn.Linear(2, 2)
    made = make_optimizer(model, TrainConfig(optimizer=drop(optimizers, OPTIMIZER), lr=0.5))
    assert isinstance(made, torch.optim.SGD) and made.param_groups[0]["lr"] == 0.5


def test_a_schedule(drop: Callable[[ModuleType, str], str]) -> None:
    train = TrainConfig(scheduler=drop(schedules, SCHEDULE), lr=4.0, lr_min=0.0, warmup_ratio=0, weight_decay=0)
    assert [learning_rate(step, 3, train) for step in range(3)] == [4.0, 3.0, 0.0]


def test_a_launcher(drop: Callable[[ModuleType, str], str], tmp_path: Path, tiny_model_folder: Path) -> None:
    name = drop(launchers, LAUNCHER)
    with pytest.raises(Interrupted, match="by the throw-away launcher"):
        _run(train.STAGE, tmp_path / "out", {"base": tiny_model_folder.parent, "data": tmp_path}, f"train.launcher={name}")


def test_an_evaluator(drop: Callable[[ModuleType, str], str], tmp_path: Path, tiny_model_folder: Path) -> None:
    name = drop(evaluators, EVALUATOR)
    sums = "eval.datasets=[{name: sums, kind: sums}]"
    assert _run(evaluate.STAGE, tmp_path / "out", {"model": tiny_model_folder.parent}, sums) == {"scores": {"sums": 50.0}}
    assert evaluate.STAGE.settings(load_recipe("qwen3_tiny_full_openai", [sums]))["versions"] == {name: {"throwaway": "9"}}


def test_a_chatter(drop: Callable[[ModuleType, str], str], tmp_path: Path, tiny_model_folder: Path) -> None:
    name = drop(chatters, CHATTER)
    data = _jsonl(tmp_path / "ask.jsonl", [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "parrot heard hi"}])
    inputs = {"model": tiny_model_folder.parent}
    metrics = _run(chat.STAGE, tmp_path / "out", inputs, f"chat.chatter={name}", f"chat.prompts={data}", "chat.min_correct=1")
    assert (metrics["passed"], metrics["total"], metrics["ok"]) == (1, 1, True)


def test_a_recipe(tmp_path: Path) -> None:
    """The folder has no search path, so the file is dropped into a copy of the two lower floors."""
    for floor in ("pipelines", "xtuner_core"):
        shutil.copytree(PROJECT / floor, tmp_path / floor, ignore=shutil.ignore_patterns("__pycache__"))
    for needed in (PROJECT / "data", *PROJECT.glob("constraints*.txt")):
        (tmp_path / needed.name).symlink_to(needed)
    recipes = tmp_path / "pipelines" / "recipes"
    text = (recipes / "qwen3_tiny_full_openai.yaml").read_text(encoding="utf-8")
    (recipes / "throwaway.yaml").write_text(text.replace("A verification run", "Thrown away soon"), encoding="utf-8")
    listed = _xtuner(tmp_path, "list-cfg").stdout.splitlines()
    assert listed[::2] == [*shipped_names(), "throwaway"]
    assert "Thrown away soon" in listed[-1]
    assert _xtuner(tmp_path, "plan", "throwaway", "--store", str(tmp_path / "store")).stdout.startswith("base ")
    unknown = _xtuner(tmp_path, "plan", "nosuch")
    assert unknown.returncode == 78
    assert all(name in unknown.stderr for name in [*shipped_names(), "throwaway"])


def _xtuner(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipelines.cli", *arguments], cwd=folder, capture_output=True, text=True, check=False)
