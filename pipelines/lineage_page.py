"""A model's lineage as text, as JSON, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines import model_registry
from pipelines.lineage import Chain, Step, id_of, place_in

SHOWN_FILES = 8
"""Of one artifact, in the picture."""


def as_json(chain: Chain) -> dict[str, Any]:
    """The whole chain for programs."""
    told = ("created", "seconds", "recipe", "input_files", "ingredients", "environment", "metrics")
    steps = [
        {
            **step.reference,
            "node": step.node,
            "there": step.path is not None,
            "inputs": dict(step.inputs),
            **{name: step.manifest.get(name) for name in told},
        }
        for step in chain.steps
    ]
    version = asdict(chain.version) if chain.version else None
    return {"model": chain.title, "artifact": id_of(chain.model), "version": version, "steps": steps}


def as_text(chain: Chain) -> Iterator[str]:
    """A paragraph for each step, what it is made of first."""
    yield f"{chain.title}: {chain.store.root / id_of(chain.model) / 'payload' / 'model'}"
    if version := chain.version:
        state = model_registry.status(chain.store, version)
        yield f"{state}, registered {version.created}, {'passed gate and chat test' if version.gate else version.faults}"
    for step in chain.steps:
        yield ""
        yield from _paragraph(step)


def _paragraph(step: Step) -> Iterator[str]:
    manifest = step.manifest
    yield f"{step.node:<12} {step.id}{_missing(step)}"
    yield f"  payload    sha256 {step.reference['payload_digest']}"
    if not manifest:
        return
    ingredients, environment = manifest["ingredients"], manifest["environment"]
    code = (environment.get("code") or "unknown")[:16]
    yield f"  made       {manifest['created']} in {manifest['seconds']} s by stage version {ingredients['version']}, code {code}"
    if isinstance(ingredients["settings"], dict) and "kind" in ingredients["settings"]:
        yield f"  source     {ingredients['settings']['kind']} {ingredients['settings'].get('name', '')}".rstrip()
    if step.inputs:
        yield f"  from       {', '.join(f'{name} {one}' for name, one in step.inputs.items())}"
    if isinstance(ingredients["settings"], dict) and "seed" in ingredients["settings"]:
        yield f"  seed       {ingredients['settings']['seed']}"
    libraries = {name: version for name, version in {**environment, **ingredients["libraries"]}.items() if version and name != "code"}
    yield f"  versions   {', '.join(f'{name} {version}' for name, version in libraries.items())}"
    for one in manifest["input_files"]:
        yield f"  file       {one['path']}\n             sha256 {one['sha256']}"


def _missing(step: Step) -> str:
    if step.path:
        return "" if step.manifest else "  (its manifest was edited or is damaged)"
    return "  (gone, only its manifest was kept)" if step.manifest else "  (gone)"


def mermaid(chain: Chain) -> str:
    """The chain as a graph that Prefect's pages and GitHub draw; an arrow leads from an ingredient to what was made of it."""
    numbers = {step.id: f"s{number}" for number, step in enumerate(chain.steps)}
    lines = ["graph LR"]
    for step in chain.steps:
        own = numbers[step.id]
        seed = _seed(step.manifest)
        lines.append(f'{own}["{_label(step.node)}<br/>{step.reference["key"]}{seed}"]')
        lines += [f"{numbers[source]} -->|{_label(name)}| {own}" for name, source in step.inputs.items()]
        lines += _file_boxes(own, [one for one in step.manifest.get("input_files", []) if not place_in(chain.store, one["path"])])
    if chain.version:
        lines.append(f'model(["{_label(chain.title)}"])')
        lines.append(f"{numbers[id_of(chain.model)]} --> model")
    return "\n".join(lines) + "\n"


def _seed(manifest: Mapping[str, Any]) -> str:
    settings = manifest.get("ingredients", {}).get("settings")
    return f"<br/>seed {settings['seed']}" if isinstance(settings, dict) and "seed" in settings else ""


def _file_boxes(own: str, files: list[Mapping[str, str]]) -> Iterator[str]:
    for number, one in enumerate(files[:SHOWN_FILES]):
        yield f'{own}f{number}[("{_label(Path(one["path"]).name)}<br/>{one["sha256"][:12]}")] --> {own}'
    if len(files) > SHOWN_FILES:
        yield f'{own}more[("{len(files) - SHOWN_FILES} more files")] --> {own}'


def _label(text: str) -> str:
    """Text that means nothing to mermaid or HTML."""
    return "".join(character if character.isalnum() or character in " ._-@" else f"#{ord(character)};" for character in text)
