"""`transformers serve` as it is, which also writes the token ids that it gives to the model: FILE, then the arguments of serve."""

from __future__ import annotations

import json
import sys
from typing import Any

from transformers import GenerationMixin
from transformers.cli.transformers import app

_generate = GenerationMixin.generate
RECORD = sys.argv.pop(1)


def _recorded(self: Any, *arguments: Any, **options: Any) -> Any:
    ids = options["input_ids"] if "input_ids" in options else arguments[0]
    with open(RECORD, "a", encoding="utf-8") as file:
        file.write(json.dumps(ids[0].tolist()) + "\n")
    return _generate(self, *arguments, **options)


GenerationMixin.generate = _recorded
app()
