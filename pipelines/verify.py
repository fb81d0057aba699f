"""Is a model what its manifests say: every byte of the chain is hashed again, and every link of it compared with what it leads to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.artifacts import Damaged, Store
from pipelines.lineage import Chain, Step, id_of, manifest_of, place_in
from xtuner_core.digest import key_of, sha256


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a step; `broken`: the chain proves nothing beyond it, else only worth knowing."""

    where: str
    what: str
    broken: bool = True


def verify(chain: Chain) -> Iterator[tuple[Step, list[Finding]]]:
    """Hash everything again, step by step from the inputs on; what each step's own files, its links and its input files tell."""
    known, own = {step.id: step for step in chain.steps}, chain.own()
    for step in chain.steps:
        findings = list(_own(chain.store, step) if step.path else _gone(step, step.id in own))
        yield step, findings if any(one.broken for one in findings) else [*findings, *_links(step, known), *_files(chain.store, step)]


def _gone(step: Step, own: bool) -> Iterator[Finding]:
    """Of an earlier run the sealed manifest is enough: the clean-up keeps it, and it tells the digests of what was made of it."""
    if own or not step.manifest:
        yield Finding(step.id, "is gone" + (", only its manifest was kept" if step.manifest else ""))
    elif (
        step.reference != {name: step.manifest[name] for name in step.reference}
        or key_of(step.manifest["ingredients"]) != step.manifest["key"]
    ):
        yield Finding(step.id, "was cleaned up, and the manifest that was kept is of another artifact")
    else:
        yield Finding(step.id, "was cleaned up; its manifest was kept", broken=False)


def _own(store: Store, step: Step) -> Iterator[Finding]:
    """Are the files those of the manifest, and is it that of the name."""
    assert step.path
    try:
        store.find(step.path.parent.name, step.path.name, full=True)
    except Damaged as damage:
        yield Finding(str(step.path), str(damage))
        return
    if step.manifest["payload_digest"] != step.reference["payload_digest"]:
        yield Finding(str(step.path), f"its payload is {step.manifest['payload_digest']}, and was {step.reference['payload_digest']}")
    if step.path.name != step.reference["key"]:
        yield Finding(step.id, f"is gone; {step.path} has the same bytes", broken=False)


def _links(step: Step, known: Mapping[str, Step]) -> Iterator[Finding]:
    """Do its ingredients name what lies there."""
    ingredients, where = step.manifest["ingredients"], _manifest(step)
    if ingredients["stage"] != step.reference["stage"] or step.manifest["stage"] != step.reference["stage"]:
        yield Finding(where, f"it is of stage {ingredients['stage']}")
    if ingredients["inputs"] != {name: one["payload_digest"] for name, one in step.manifest["inputs"].items()}:
        yield Finding(where, "its inputs are not those of its ingredients")
    if ingredients["files"] != [one["sha256"] for one in step.manifest["input_files"]]:
        yield Finding(where, "its input files are not those of its ingredients")
    for name, one in step.manifest["inputs"].items():
        there = known[id_of(one)].manifest  # empty if it is damaged itself, which is told of it
        if there and there["payload_digest"] != one["payload_digest"]:
            yield Finding(where, f"was made of {name} {one['payload_digest']}, and {id_of(one)} is {there['payload_digest']}")


def _manifest(step: Step) -> str:
    return f"{step.path}/manifest.json" if step.path else f"the manifest of {step.id}"


def _files(store: Store, step: Step) -> Iterator[Finding]:
    """Input files that are gone or changed since; those in the store are steps of their own."""
    for one in step.manifest["input_files"]:
        if place := place_in(store, one["path"]):
            there = manifest_of(store, place)
            if there and one["sha256"] not in {file["sha256"] for file in there["files"]}:
                yield Finding(_manifest(step), f"was made of {one['path']}, which has other bytes now")
        elif not Path(one["path"]).is_file():
            yield Finding(one["path"], "is not there any more", broken=False)
        elif sha256(Path(one["path"])) != one["sha256"]:
            yield Finding(one["path"], f"has changed since {step.node} read it (was sha256 {one['sha256']})", broken=False)
