"""The house rules, read from the source by ast: three floors, no circle, no dangerous call, every parameter typed.

Every rule is a function from sources to complaints; each is shown a bad snippet too, so that it is known to be able to fail.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePath
from typing import Literal

import pytest

from pipelines.recipe import PROJECT, shipped_names

FLOORS = ("xtuner_core", "pipelines", "flows")
"""From the ground up."""
HEAVY = {"torch", "transformers", "peft"}
Sources = Mapping[str, str]
"""File relative to the project → its text."""


def sources(*folders: str) -> dict[str, str]:
    files = [path for folder in folders for path in sorted((PROJECT / folder).rglob("*.py"))]
    return {str(path.relative_to(PROJECT)): path.read_text(encoding="utf-8") for path in files}


HOUSE = sources(*FLOORS)
EVERYTHING = HOUSE | sources("benchmarks", "data", "tests")


# Imports ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Import:
    name: str
    """Dotted, of a module or of something in it."""
    when: Literal["start", "call", "typing"]
    """When the importing module is imported, when a function runs, or only for the type checker."""
    line: int


def module_name(file: str) -> str:
    parts = PurePath(file).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: str, text: str) -> list[Import]:
    package = module_name(file) if file.endswith("__init__.py") else module_name(file).rpartition(".")[0]
    return list(_imports(ast.parse(text), package, "start"))


def _imports(node: ast.AST, package: str, when: Literal["start", "call", "typing"]) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import():
                yield from (Import(alias.name, when, child.lineno) for alias in child.names)
            case ast.ImportFrom():
                above = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                origin = ".".join([*above, *([child.module] if child.module else [])])
                yield from (Import(f"{origin}.{alias.name}", when, child.lineno) for alias in child.names)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                for part, moment in ((child.body, "typing"), (child.orelse, when)):
                    yield from _imports(ast.Module(part, []), package, moment)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                yield from _imports(child, package, "typing" if when == "typing" else "call")
            case _:
                yield from _imports(child, package, when)


def upward(files: Sources) -> list[str]:
    """Imports of a higher floor, wherever they stand, and of Prefect below its floor."""
    return [
        f"{file}:{found.line}: {found.name}"
        for file, text in files.items()
        for found in imports(file, text)
        if found.name.split(".")[0] in _forbidden(file.split("/")[0])
    ]


def _forbidden(floor: str) -> set[str]:
    return {*FLOORS[FLOORS.index(floor) + 1 :], *(() if floor == "flows" else ("prefect",))}


def loaded_at_start(files: Sources) -> dict[str, set[str]]:
    """Module → our modules, and top-level names of others, that importing it imports."""
    ours = {module_name(file) for file in files}
    graph: dict[str, set[str]] = {}
    for file, text in files.items():
        found = (_resolve(one.name, ours) for one in imports(file, text) if one.when == "start")
        graph[module_name(file)] = {name for names in found for name in names} - {module_name(file)}
    return graph


def _resolve(name: str, ours: set[str]) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)} & ours or {parts[0]}


def circles(files: Sources) -> list[str]:
    """The first circle among modules that import each other when they are imported."""
    try:
        TopologicalSorter(loaded_at_start(files)).prepare()
    except CycleError as error:
        return [" → ".join(reversed(error.args[1]))]
    return []


def heavy(files: Sources) -> list[str]:
    """Modules above the engine whose import alone, directly or through others, imports a slow library."""
    graph = loaded_at_start(files)
    return [
        f"{module} → {', '.join(sorted(HEAVY & _reach(module, graph)))}"
        for module in graph
        if not module.startswith("xtuner_core") and HEAVY & _reach(module, graph)
    ]


def _reach(module: str, graph: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [module]
    while todo:
        for name in graph.get(todo.pop(), set()) - seen:
            seen.add(name)
            todo.append(name)
    return seen


# Calls ------------------------------------------------------------------------------------------------------------------------------

BANNED = {
    "eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "marshal.loads", "shelve.open",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
}  # fmt: skip
MUST_BE = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "weights_only": True}
"""Keyword, or key of a dictionary that becomes keywords → the only value it may have."""


def banned_calls(files: Sources) -> list[str]:
    """Calls that run text as a program or read a format that can carry one."""
    return [f"{file}:{line}: {what}" for file, text in files.items() for line, what in _banned(ast.parse(text))]


def _banned(tree: ast.Module) -> Iterator[tuple[int, str]]:
    names = _known_as(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = _dotted(node.func, names)
            if called in BANNED:
                yield node.lineno, called
            if called == "torch.load" and not any(keyword.arg == "weights_only" for keyword in node.keywords):
                yield node.lineno, "torch.load without weights_only=True"
        for name, value in _settings(node):
            if name in MUST_BE and not (isinstance(value, ast.Constant) and value.value is MUST_BE[name]):
                yield value.lineno, f"{name} that is not {MUST_BE[name]}"


def _settings(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Call):
        yield from ((keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg)
    if isinstance(node, ast.Dict):
        yield from ((key.value, value) for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant))


def _known_as(tree: ast.Module) -> dict[str, str]:
    """Name in this file → what it was imported as."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _dotted(node: ast.expr, names: Mapping[str, str]) -> str:
    match node:
        case ast.Name(id=name):
            return names.get(name, name)
        case ast.Attribute(value=value, attr=attribute):
            return f"{_dotted(value, names)}.{attribute}"
        case _:
            return "?"


# Names and types --------------------------------------------------------------------------------------------------------------------


def nameless(files: Sources) -> list[str]:
    """Files and folders that are named for nothing in particular."""
    return [file for file in files if {"util", "utils", "misc"} & {PurePath(part).stem for part in PurePath(file).parts}]


def python_after_fork(files: Sources) -> list[str]:
    """`preexec_fn`: in a process with threads Python may never get to it (pipelines/supervisor.py has none)."""
    found = ((file, node) for file, text in files.items() if file != "pipelines/supervisor.py" for node in ast.walk(ast.parse(text)))
    return [f"{file}:{value.lineno}: {name}" for file, node in found for name, value in _settings(node) if name == "preexec_fn"]


def untyped(files: Sources) -> list[str]:
    """Parameters without annotation (a method's first one and a lambda's cannot have or need none)."""
    return [f"{file}:{line}: {name}" for file, text in files.items() for line, name in _untyped(ast.parse(text))]


def _untyped(tree: ast.Module) -> Iterator[tuple[int, str]]:
    methods = {child for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for child in node.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parts = node.args
            listed = [*parts.posonlyargs, *parts.args, *parts.kwonlyargs, *(one for one in (parts.vararg, parts.kwarg) if one)]
            for index, parameter in enumerate(listed):
                is_self = index == 0 and node in methods and parameter.arg in ("self", "cls")
                if parameter.annotation is None and not is_self:
                    yield parameter.lineno, f"{node.name}({parameter.arg})"


# The house obeys them ---------------------------------------------------------------------------------------------------------------


RULES = [upward, circles, heavy, banned_calls, nameless, python_after_fork, untyped]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_obeys(rule: Callable[[Sources], list[str]]) -> None:
    assert len(HOUSE) > 50
    assert rule(HOUSE) == []


@pytest.mark.parametrize("rule", [banned_calls, nameless], ids=lambda rule: rule.__name__)
def test_so_do_tests_data_scripts_and_benchmarks(rule: Callable[[Sources], list[str]]) -> None:
    assert len(EVERYTHING) > len(HOUSE)
    assert rule(EVERYTHING) == []


# Each rule can fail -----------------------------------------------------------------------------------------------------------------

BAD = [
    (upward, {"xtuner_core/a.py": "import pipelines.cli"}, "xtuner_core/a.py:1: pipelines.cli"),
    (upward, {"pipelines/a.py": "def f():\n    from flows.tasks import TASKS"}, "pipelines/a.py:2: flows.tasks.TASKS"),
    (upward, {"pipelines/a.py": "if TYPE_CHECKING:\n    import flows"}, "pipelines/a.py:2: flows"),
    (upward, {"pipelines/a/b.py": "def f():\n    from prefect import task"}, "pipelines/a/b.py:2: prefect.task"),
    (circles, {"pipelines/a.py": "from pipelines import b", "pipelines/b.py": "import pipelines.a"}, "pipelines.a → pipelines.b"),
    (circles, {"pipelines/__init__.py": "from .a import f", "pipelines/a.py": "import pipelines"}, "pipelines.a → pipelines"),
    (heavy, {"flows/a.py": "import torch.nn"}, "flows.a → torch"),
    (heavy, {"pipelines/a.py": "from xtuner_core.b import f", "xtuner_core/b.py": "from peft import X"}, "pipelines.a → peft"),
    (banned_calls, {"a.py": "subprocess.run('ls', shell=True)"}, "a.py:1: shell that is not False"),
    (banned_calls, {"a.py": "subprocess.run('ls', shell=flag)"}, "a.py:1: shell that is not False"),
    (banned_calls, {"a.py": "import os as o\no.system('ls')"}, "a.py:2: os.system"),
    (banned_calls, {"a.py": "from os import system\nsystem('ls')"}, "a.py:2: os.system"),
    (banned_calls, {"a.py": "import pickle\npickle.load(f)"}, "a.py:2: pickle.load"),
    (banned_calls, {"a.py": "from pickle import loads as read\nread(b)"}, "a.py:2: pickle.loads"),
    (banned_calls, {"a.py": "yaml.load(text, Loader)"}, "a.py:1: yaml.load"),
    (banned_calls, {"a.py": "eval('1')"}, "a.py:1: eval"),
    (banned_calls, {"a.py": "def f():\n    exec(text)"}, "a.py:2: exec"),
    (banned_calls, {"a.py": "load(x, trust_remote_code=True)"}, "a.py:1: trust_remote_code that is not False"),
    (banned_calls, {"a.py": "options = {'trust_remote_code': True}"}, "a.py:1: trust_remote_code that is not False"),
    (banned_calls, {"a.py": "torch.load(f, weights_only=False)"}, "a.py:1: weights_only that is not True"),
    (banned_calls, {"a.py": "from torch import load\nload(f)"}, "a.py:2: torch.load without weights_only=True"),
    (banned_calls, {"a.py": "np.load(f, allow_pickle=True)"}, "a.py:1: allow_pickle that is not False"),
    (nameless, {"pipelines/utils.py": ""}, "pipelines/utils.py"),
    (nameless, {"xtuner_core/misc/a.py": ""}, "xtuner_core/misc/a.py"),
    (python_after_fork, {"a.py": "subprocess.Popen(words, preexec_fn=f)"}, "a.py:1: preexec_fn"),
    (untyped, {"a.py": "def f(x: int, y=1): ..."}, "a.py:1: f(y)"),
    (untyped, {"a.py": "class A:\n    def f(self, *, key): ..."}, "a.py:2: f(key)"),
    (untyped, {"a.py": "async def f(*rest, **more: int): ..."}, "a.py:1: f(rest)"),
]

GOOD = [
    (upward, {"flows/a.py": "import prefect\nfrom pipelines import cli", "pipelines/b.py": "import xtuner_core.durable"}),
    (circles, {"pipelines/a.py": "import pipelines.b", "pipelines/b.py": "def f():\n    import pipelines.a"}),
    (circles, {"pipelines/a.py": "import pipelines.b", "pipelines/b.py": "if TYPE_CHECKING:\n    import pipelines.a"}),
    (heavy, {"pipelines/a.py": "if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch", "xtuner_core/b.py": "import torch"}),
    (banned_calls, {"a.py": "model.eval()\nyaml.safe_load(t)\njson.load(f)\ntorch.load(f, weights_only=True)\nrun(c, shell=False)"}),
    (nameless, {"pipelines/utility_bills.py": ""}),
    (python_after_fork, {"pipelines/supervisor.py": "subprocess.Popen(words, preexec_fn=f)"}),
    (untyped, {"a.py": "class A:\n    def f(self, x: int) -> None: ...\n    @classmethod\n    def g(cls): ...\nh = lambda x: x"}),
]


@pytest.mark.parametrize(("rule", "files", "complaint"), BAD)
def test_a_rule_sees(rule: Callable[[Sources], list[str]], files: Sources, complaint: str) -> None:
    found = rule(files)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(("rule", "files"), GOOD)
def test_a_rule_lets_pass(rule: Callable[[Sources], list[str]], files: Sources) -> None:
    assert rule(files) == []


# A fresh interpreter ----------------------------------------------------------------------------------------------------------------

PLAN = """
import json, sys, time
from pipelines.cli import main
code = main(["plan", sys.argv[1], "--store", sys.argv[2]])
print(json.dumps({"code": code, "cpu": time.process_time(), "modules": sorted(set(m.split(".")[0] for m in sys.modules))}))
"""


@pytest.mark.parametrize("recipe", shipped_names())
def test_plan_answers_at_once_without_torch(recipe: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PLAN, recipe, str(tmp_path)]
    told = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told[0].split()[:3] == ["base", "will", "run"]
    facts = json.loads(told[-1])
    assert facts["code"] == 0
    assert not {"torch", "transformers", "peft", "prefect", "matplotlib", "numpy"} & set(facts["modules"])
    assert facts["cpu"] <= 1.0


@pytest.mark.xdist_group("arch")
def test_groups_of_tests_stay_on_one_worker(request: pytest.FixtureRequest) -> None:
    """pytest-xdist tells them by the test's id; without it every worker makes every shared fixture."""
    if os.environ.get("PYTEST_XDIST_WORKER") is None:
        pytest.skip("without pytest-xdist")
    assert request.node.nodeid.endswith("@arch")
