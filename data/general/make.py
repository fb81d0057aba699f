"""Write the general-ability set: `python data/general/make.py`; `--check` only compares and exits 1 on a difference.

What is asked is in questions.txt (right answer first, wrong ones behind it) and texts.txt (passages between blank lines); here the
choices are put into an order that depends on nothing but the question, and each letter is right equally often.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parent
LETTERS = "ABCD"


def questions() -> Iterator[dict[str, str]]:
    """Rows of the evaluation kind `choice`; a line of the source is `group | text | right | wrong | wrong | wrong`."""
    lines = [line for line in (HERE / "questions.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    for number, line in enumerate(lines):
        group, text, right, *wrong = (part.strip() for part in line.split("|"))
        assert len({right, *wrong}) == len(LETTERS), line
        draw = Random(text).random
        others = iter(sorted(wrong, key=lambda _: draw()))
        answer = LETTERS[number % len(LETTERS)]
        choices = {letter: right if letter == answer else next(others) for letter in LETTERS}
        yield {"text": text, **choices, "answer": answer, "group": group}


def texts() -> Iterator[dict[str, str]]:
    """Rows of the evaluation kind `loss`."""
    for passage in (HERE / "texts.txt").read_text(encoding="utf-8").strip().split("\n\n"):
        yield {"text": " ".join(passage.split())}


def main() -> int:
    """Write or compare both files."""
    made = {"questions.jsonl": questions(), "texts.jsonl": texts()}
    differing = 0
    for name, rows in made.items():
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if "--check" not in sys.argv:
            (HERE / name).write_text(content, encoding="utf-8")
        elif (HERE / name).read_text(encoding="utf-8") != content:
            print(f"{name} differs; run python data/general/make.py")
            differing = 1
    return differing


if __name__ == "__main__":
    sys.exit(main())
