"""Samples as they are trained on: which tokens the model learns to write, which are control tokens, and where each one begins."""

from __future__ import annotations

import json
import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.recipe import PROJECT
from xtuner_core.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np
    from rich.text import Text

    from xtuner_core.data.dataset import PackedDataset
    from xtuner_core.data.tokenize import ChatTokenizer

LEARNED = ("⟦", "⟧")
BOUNDARY = "│"
_STYLES = {(False, False): "", (True, False): "green", (False, True): "cyan", (True, True): "bold reverse green"}
"""(learned, control) → style on a terminal."""
_INVISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)
_INVISIBLE |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)
"""Characters that would steer the terminal or turn the direction of writing → visible ones."""


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens of one kind, as text; one token only, if boundaries were asked for."""

    text: str
    learned: bool
    control: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One document; `title` says where it is from and how long it is."""

    title: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Prepared:
    """A prepare artifact's documents with what shows them: its tokenizer, and the names of its input files."""

    payload: Path
    model_dir: Path
    files: tuple[str, ...]

    @cached_property
    def dataset(self) -> PackedDataset:
        from xtuner_core.data.dataset import PackedDataset

        return PackedDataset(self.payload)

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        from xtuner_core.data.tokenize import load_tokenizer

        return load_tokenizer(self.model_dir)

    @cached_property
    def starts(self) -> list[int]:
        """Number of the first document of each file, and how many there are."""
        starts = [0]
        for shard in self.dataset.shards:
            starts.append(starts[-1] + len(shard))
        return starts

    @cached_property
    def lines(self) -> list[np.ndarray]:
        import numpy as np

        return [np.load(shard.folder / "lines.npy", mmap_mode="r") for shard in self.dataset.shards]

    @cached_property
    def splits(self) -> np.ndarray:
        from xtuner_core.data.statistics import split_of

        return split_of(self.payload, self.starts[-1])

    def place(self, number: int) -> str:
        """FILE:LINE of a document."""
        file = bisect_right(self.starts, number) - 1
        return f"{short(self.files[file])}:{self.lines[file][number - self.starts[file]]}"

    def sample(self, number: int, boundaries: bool = False, most: int | None = None) -> Sample:
        """A document to look at; of a long one the first `most` tokens."""
        from xtuner_core.data.statistics import SPLITS

        document = self.dataset.document(number)
        title = f"{self.place(number)}: {len(document.ids)} tokens, {int(document.loss.sum())} learned, {SPLITS[self.splits[number]]}"
        spans = tuple(_spans(self.tokenizer, document.ids[:most].tolist(), document.loss[:most].tolist(), boundaries))
        cut = (Span(f" … {len(document.ids) - most} tokens more", False, False),) if most and len(document.ids) > most else ()
        return Sample(f"document {number}: {visible(title)}", spans + cut)


def short(file: str) -> str:
    """A path as one would type it here."""
    path = Path(file)
    return next((str(path.relative_to(base)) for base in (Path.cwd(), PROJECT) if path.is_relative_to(base)), file)


def open_prepared(payload: Path, record: Path, model_dir: Path) -> Prepared:
    """A finished prepare artifact."""
    report = json.loads((record / "report.json").read_text(encoding="utf-8"))
    return Prepared(payload, model_dir, tuple(entry["file"] for entry in report["files"]))


def choose(prepared: Prepared, count: int, seed: int, validation: bool = False) -> list[int]:
    """`count` document numbers, drawn by the seed, in order; all, if there are fewer.

    Raises:
        RecipeError: validation samples are asked for and there are none.
    """
    import numpy as np

    numbers = np.flatnonzero(prepared.splits == 2).tolist() if validation else range(prepared.starts[-1])
    if validation and not numbers:
        raise RecipeError("there are no validation samples; set data.validation to a share such as 0.02, or to files of their own.")
    return sorted(random.Random(seed).sample(numbers, min(count, len(numbers))))


def documents_of(prepared: Prepared, place: str) -> list[int]:
    """The numbers of the documents that came from FILE:LINE.

    Raises:
        RecipeError: no such input file, or why the line became no document.
    """
    import numpy as np

    name, _, line = place.rpartition(":")
    if not name or not line.isdecimal():
        raise RecipeError(f"--line {place}: write FILE:LINE, for example {Path(prepared.files[0]).name}:3.")
    index = _file_index(prepared, name)
    found = np.flatnonzero(np.asarray(prepared.lines[index]) == int(line)) + prepared.starts[index]
    if not len(found):
        raise RecipeError(f"{short(prepared.files[index])}:{line}: no sample came from this line: {why_not(prepared, index, int(line))}.")
    return found.tolist()


def _file_index(prepared: Prepared, name: str) -> int:
    found = [index for index, file in enumerate(prepared.files) if Path(file) == Path(name).resolve()]
    found = found or [index for index, file in enumerate(prepared.files) if f"/{file}".endswith(f"/{name}")]
    if len(found) != 1:
        told = "is none of the input files" if not found else "means several of the input files"
        raise RecipeError(f"{name} {told}: {', '.join(map(short, prepared.files))}.")
    return found[0]


def why_not(prepared: Prepared, index: int, line: int) -> str:
    """What became of a line that became no document."""
    shard = prepared.dataset.shards[index].folder
    for entry in rejected_rows(shard):
        if entry["line"] == line:
            return f"rejected, {visible(entry['reason'])}"
    tally = json.loads((shard / "tally.json").read_text(encoding="utf-8"))
    if not 1 <= line <= tally["lines"]:
        return f"the file has {tally['lines']} lines"
    if line in map(itemgetter("line"), _rows(shard / "kept.jsonl")):
        return "it is a preference pair or a prompt, kept for later use"
    ends = (("it is blank", tally["blank"]), ("it was dropped as too long", tally["dropped"]))
    return " or ".join(reason for reason, count in ends if count)


def rejected_rows(shard: Path) -> Iterator[dict[str, Any]]:
    """`line`, `byte_offset` and `reason` of every rejected line of a shard."""
    return _rows(shard / "rejected.jsonl")


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def _spans(tokenizer: ChatTokenizer, ids: list[int], loss: list[bool], boundaries: bool) -> Iterator[Span]:
    names = {number: name for name, number in tokenizer.control.items()}
    kinds = [(learned, number in names) for number, learned in zip(ids, loss, strict=True)]
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or kinds[end] != kinds[start]:
            learned, control = kinds[start]
            ranges = list(_single(tokenizer, ids, start, end, control)) if boundaries else [(start, end)]
            for first, last in ranges:
                text = "".join(names[number] for number in ids[first:last]) if control else _text(tokenizer, ids, kinds, first, last)
                yield Span(visible(text), learned, control)
            start = end


def _single(tokenizer: ChatTokenizer, ids: list[int], start: int, end: int, control: bool) -> Iterator[tuple[int, int]]:
    """Each token alone, but those together that only together are characters."""
    first = start
    for last in range(start + 1, end + 1):
        if control or last == end or not tokenizer.plain.decode(ids[first:last]).endswith("\ufffd"):
            yield first, last
            first = last


def _text(tokenizer: ChatTokenizer, ids: list[int], kinds: list[tuple[bool, bool]], start: int, end: int) -> str:
    """The text of some tokens where they stand: some tokenizers leave out a space at the beginning of what they decode."""
    before = ids[start - 1 : start] if start and not kinds[start - 1][1] else []
    whole, known = tokenizer.plain.decode(before + ids[start:end]), tokenizer.plain.decode(before)
    return whole[len(known) :] if whole.startswith(known) else tokenizer.plain.decode(ids[start:end])


def visible(text: str) -> str:
    """The text with control characters as pictures, so that no data can steer a terminal."""
    return text.translate(_INVISIBLE)


def marked(sample: Sample, control: Sequence[str], boundaries: bool = False) -> str:
    """A sample without colours: what is learned stands between ⟦ and ⟧; a control token's name that is plain text gets a backslash."""
    forged = re.compile("|".join(re.escape(name) for name in sorted(control, key=len, reverse=True) if name.strip()) or r"(?!)")
    parts = [f"{sample.title}\n"]
    for index, span in enumerate(sample.spans):
        before, after = sample.spans[index - 1] if index else None, sample.spans[index + 1] if index + 1 < len(sample.spans) else None
        if span.learned and not (before and before.learned):
            parts.append(LEARNED[0])
        parts.append(span.text if span.control else forged.sub(lambda found: "\\" + found[0], span.text))
        if span.learned and not (after and after.learned):
            parts.append(LEARNED[1])
        if boundaries and after:
            parts.append(BOUNDARY)
    return "".join(parts)


def colored(sample: Sample, boundaries: bool = False) -> Text:
    """A sample for a terminal: learned text green, control tokens cyan, learned control tokens reversed."""
    from rich.text import Text

    text = Text(sample.title + "\n", style="")
    text.stylize("bold")
    for index, span in enumerate(sample.spans):
        if boundaries and index:
            text.append(BOUNDARY, style="dim")
        text.append(span.text, style=_STYLES[span.learned, span.control])
    return text


def show(prepared: Prepared, numbers: Sequence[int], boundaries: bool = False) -> None:
    """Print samples: in colours on a terminal, with marks elsewhere and where NO_COLOR is set."""
    from rich.console import Console

    console = Console(highlight=False)
    in_color = console.is_terminal and not console.no_color
    if in_color:
        console.print("[green]learned[/] · not learned · [cyan]control token[/] · [bold reverse green]learned control token[/]\n")
    for sample in (prepared.sample(number, boundaries) for number in numbers):
        if in_color:
            console.print(colored(sample, boundaries), soft_wrap=True, end="\n\n")
        else:
            print(marked(sample, tuple(prepared.tokenizer.control), boundaries) + "\n")
