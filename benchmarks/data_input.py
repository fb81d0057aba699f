"""Input for benchmarks/data.py, from real text: the docstrings and the source of the Python packages beside this one.

Chats: two turns each of a question (one sentence) and an answer (three), without a system prompt, about 216 tokens. The sentences
are drawn without replacement from all distinct ones, in an order of the seed; when they run out, they start again in another order.
Documents: source files cut at blank lines to about 3,000 characters, each distinct.
"""

from __future__ import annotations

import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

DOCSTRING = re.compile(r'"""(.+?)"""', re.DOTALL)
SENTENCE = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`])")
DOCUMENT_CHARACTERS = 3000


def write_chats(path: Path, rows: int, seed: int) -> None:
    """`rows` lines in OpenAI's format."""
    drawn = _endless(sentences(), random.Random(seed))
    with open(path, "w", encoding="utf-8") as stream:
        for _ in range(rows):
            turns = [(role, " ".join(next(drawn) for _ in range(count))) for role, count in (("user", 1), ("assistant", 3)) * 2]
            messages = [{"role": role, "content": content} for role, content in turns]
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def write_texts(path: Path, size: int, seed: int) -> None:
    """Lines `{"text": ...}` of about `size` bytes together."""
    documents = list(_documents())
    random.Random(seed).shuffle(documents)
    with open(path, "w", encoding="utf-8") as stream:
        for document in documents:
            stream.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            if stream.tell() >= size:
                return
    raise SystemExit(f"the packages of this environment have only {path.stat().st_size / 1e6:.0f} MB of source")


def sentences() -> list[str]:
    """Distinct sentences of 40 to 400 characters from docstrings."""
    found: dict[str, None] = {}
    for source in _sources():
        for docstring in DOCSTRING.findall(source):
            for sentence in SENTENCE.split(docstring):
                joined = " ".join(sentence.split())
                if 40 <= len(joined) <= 400:
                    found[joined] = None
    return list(found)


def _endless(items: list[str], order: random.Random) -> Iterator[str]:
    while True:
        order.shuffle(items)
        yield from items


def _documents() -> Iterator[str]:
    seen: set[str] = set()
    for source in _sources():
        document = ""
        for block in source.split("\n\n"):
            document += block + "\n\n"
            if len(document) >= DOCUMENT_CHARACTERS:
                if document not in seen:
                    seen.add(document)
                    yield document
                document = ""


def _sources() -> Iterator[str]:
    paths = sysconfig.get_paths()
    for folder in dict.fromkeys((paths["stdlib"], paths["purelib"])):
        for file in sorted(Path(folder).rglob("*.py")):
            try:
                yield file.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
