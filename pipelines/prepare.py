"""Stage prepare: files of conversations → token ids with loss masks → packs, with every line accounted for."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.recipe import Recipe, resolve_path
from pipelines.stage import Metrics, Stage, Work
from xtuner_core.errors import DataError

KEPT_SAMPLES = 64
"""Conversations stored with their ids, for the check of the exported chat template."""


def run(recipe: Recipe, work: Work) -> Metrics:
    """Write `documents/`, `packs/`, `data.json`, `samples.jsonl`; report and preview go to the record.

    Raises:
        DataError: more lines rejected than `data.max_rejected` allows, or nothing is left to train on.
    """
    import numpy as np

    from xtuner_core.data.dataset import write_description, write_documents, write_packs
    from xtuner_core.data.pack import efficiency
    from xtuner_core.data.packing import best_fit
    from xtuner_core.data.render import choose_template
    from xtuner_core.data.tokenize import Tokenized, load_tokenizer

    model_dir = work.inputs["base"] / "model"
    template = choose_template(model_dir, recipe.model.template)
    tokenizer = load_tokenizer(model_dir)
    files = files_of(recipe)
    read = [_read_file(file, recipe, template, tokenizer) for file in files]
    _write_rejected(work.record / "rejected.jsonl", read)
    _require_enough(recipe, work, read)

    for index, part in enumerate(read):
        batches = (Tokenized(one.ids, one.loss, np.array([len(one.ids)])) for _, one in part.accepted)
        write_documents(work.payload / "documents" / f"{index:05d}", batches)
    documents = [document for part in read for _, document in part.accepted]
    lengths = [len(document.ids) for document in documents]
    packs = best_fit.pack(np.array(lengths, int), recipe.data.pack_length, recipe.seed)
    write_packs(work.payload / "packs", packs)
    metrics: Metrics = {
        "lines": sum(part.lines for part in read),
        "accepted": len(documents),
        "rejected": sum(len(part.rejected) for part in read),
        "blank": sum(part.blank for part in read),
        "tokens": sum(lengths),
        "learned_tokens": int(sum(document.loss.sum() for document in documents)),
        "packs": len(packs),
        "pack_efficiency": round(efficiency(packs, recipe.data.pack_length), 6),
        "template": template,
    }
    write_description(work.payload, {**metrics, "pack_length": recipe.data.pack_length, "vocab_size": tokenizer.vocab_size})
    _write_samples(work.payload / "samples.jsonl", read)
    _write_report(work, recipe, read, lengths, metrics)
    work.log(
        f"{metrics['accepted']} of {metrics['lines']} lines accepted, {metrics['tokens']} tokens ({metrics['learned_tokens']} learned) "
        f"in {metrics['packs']} packs, {metrics['pack_efficiency']:.1%} full; template {template}"
    )
    return metrics


def files_of(recipe: Recipe) -> list[Path]:
    """The training files, in a fixed order."""
    from xtuner_core.data.inputs import input_files

    return input_files(resolve_path(source.path) for source in recipe.data.train)


@dataclass(slots=True)
class _FileRead:
    """What became of the lines of one file: accepted + rejected + blank = lines."""

    file: Path
    lines: int = 0
    blank: int = 0
    accepted: list[tuple[Any, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)


def _read_file(file: Path, recipe: Recipe, template: str, tokenizer: Any) -> _FileRead:
    from xtuner_core.data.jsonl import Rejected, read_lines
    from xtuner_core.data.render import find_template
    from xtuner_core.data.tokenize import encode

    result = _FileRead(file)
    conversations = []
    for line in read_lines(file):
        result.lines += 1
        if not line.content.strip():
            result.blank += 1
            continue
        try:
            conversations.append((line, _conversation(line, "openai" if recipe.data.format == "auto" else recipe.data.format)))
        except Rejected as reason:
            result.rejected.append(_reject(line, str(reason)))
    render = find_template(template).render
    documents = encode(tokenizer, [list(render(conversation)) for _, conversation in conversations])
    for (line, conversation), document in zip(conversations, documents, strict=True):
        if len(document.ids) > recipe.data.max_length:
            reason = f"{len(document.ids)} tokens, data.max_length is {recipe.data.max_length}"
            result.rejected.append(_reject(line, reason))
        else:
            result.accepted.append((conversation, document))
    result.rejected.sort(key=lambda entry: entry["line"])
    return result


def _conversation(line: Any, format_name: str) -> Any:
    from xtuner_core import registry
    from xtuner_core.data import formats
    from xtuner_core.data.jsonl import parse

    return registry.find(formats, format_name).parse(parse(line.content))


def _reject(line: Any, reason: str) -> dict[str, Any]:
    return {"file": str(line.file), "line": line.number, "byte_offset": line.offset, "reason": reason}


def _write_rejected(path: Path, read: list[_FileRead]) -> None:
    rows = [json.dumps(entry, ensure_ascii=False) + "\n" for part in read for entry in part.rejected]
    path.write_text("".join(rows), encoding="utf-8")


def _require_enough(recipe: Recipe, work: Work, read: list[_FileRead]) -> None:
    rejected = [entry for part in read for entry in part.rejected]
    usable = sum(len(part.accepted) for part in read) + len(rejected)
    allowed = recipe.data.max_rejected
    if rejected and len(rejected) > allowed * usable:
        shown = "\n".join(f"  {entry['file']}:{entry['line']}: {entry['reason']}" for entry in rejected[:20])
        more = f"\n  … and {len(rejected) - 20} more" if len(rejected) > 20 else ""
        share = len(rejected) / usable
        raise DataError(
            f"{len(rejected)} of {usable} lines rejected ({share:.2%}), data.max_rejected allows {allowed:.2%}:\n{shown}{more}\n"
            f"All of them: {work.record / 'rejected.jsonl'}. Mend the lines, or allow them: --set data.max_rejected={_round_up(share)}"
        )
    if usable == len(rejected):
        raise DataError(f"nothing to train on: no conversation was accepted from {', '.join(str(part.file) for part in read)}.")


def _round_up(share: float) -> float:
    return min(1.0, int(share * 1000 + 1) / 1000)


def _write_samples(path: Path, read: list[_FileRead]) -> None:
    accepted = [pair for part in read for pair in part.accepted][:KEPT_SAMPLES]
    rows = [
        json.dumps({"messages": conversation.as_dicts(), "tools": list(conversation.tools), "ids": document.ids.tolist()}, ensure_ascii=False)
        for conversation, document in accepted
    ]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def _write_report(work: Work, recipe: Recipe, read: list[_FileRead], lengths: list[int], metrics: Metrics) -> None:
    from pipelines.pictures import length_histogram
    from xtuner_core.durable import write_json

    files = [
        {"file": str(p.file), "lines": p.lines, "accepted": len(p.accepted), "rejected": len(p.rejected), "blank": p.blank} for p in read
    ]
    rejected = [entry for part in read for entry in part.rejected]
    write_json(work.record / "report.json", {**metrics, "files": files, "rejected_lines": rejected, "pack_length": recipe.data.pack_length})
    length_histogram(lengths, work.record / "lengths.png")
    model_dir = work.inputs["base"] / "model"
    (work.record / "preview.txt").write_text("\n\n".join(preview(model_dir, work.payload, 3)) + "\n", encoding="utf-8")


def preview(model_dir: Path, data_dir: Path, count: int, mark: tuple[str, str] = ("⟦", "⟧")) -> Iterator[str]:
    """`count` documents as text as they are trained on; what the model learns to write stands between the marks."""
    from tokenizers import Tokenizer

    from xtuner_core.data.dataset import PackedDataset

    dataset = PackedDataset(data_dir)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    total = sum(len(shard) for shard in dataset.shards)
    for number in sorted(random.Random(0).sample(range(total), min(count, total))):
        document = dataset.document(number)
        yield f"document {number}: {len(document.ids)} tokens, {int(document.loss.sum())} learned\n" + _marked(tokenizer, document, mark)


def _marked(tokenizer: Any, document: Any, mark: tuple[str, str]) -> str:
    parts, start = [], 0
    for end in range(1, len(document.ids) + 1):
        if end == len(document.ids) or document.loss[end] != document.loss[start]:
            text = tokenizer.decode(document.ids[start:end].tolist(), skip_special_tokens=False)
            parts.append(mark[0] + text + mark[1] if document.loss[start] else text)
            start = end
    return "".join(parts)


def _settings(recipe: Recipe) -> dict[str, Any]:
    return {"data": recipe.data.model_dump(mode="json", exclude={"train"}), "template": recipe.model.template}


STAGE = Stage(name="prepare", version=2, run=run, settings=_settings, files=files_of, libraries=("tokenizers", "numpy"))
