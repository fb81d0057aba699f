"""Likelihoods by our own engine: how well a model foresees held-out texts, and which of several answers it finds likeliest.

Nothing is generated, so it takes seconds. The model runs in a process of its own (xtuner_core/likelihood.py).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pipelines.chatters import Endpoint
from pipelines.evaluators import DatasetScore, Kind, Sample
from pipelines.launchers._torchrun import environment_here
from pipelines.processes import child, follow, tail
from pipelines.questions import ChoiceQuestion, Measured, read_choices, read_measured
from pipelines.recipe import EvalConfig, EvalDataset
from pipelines.stage import Log
from xtuner_core.digest import library_version
from xtuner_core.durable import write_bytes, write_json
from xtuner_core.errors import BUG, DataError, UserError, from_exit_code

KINDS = {
    "loss": Kind("conversations or plain texts; nats per token that training would learn, perplexity, token accuracy"),
    "choice": Kind("questions with choices A, B, ...; how often the right one has the highest likelihood per character"),
}
Likelihoods = Mapping[str, list[Any]]
"""A line of the result: nats, tokens and hits, one for each choice."""
MOST_NATS = 700.0
"""Per token; the perplexity of more is larger than any number that JSON's readers know."""
GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL."""


def versions() -> dict[str, str]:
    """The libraries that compute."""
    return {name: str(library_version(name)) for name in ("torch", "transformers", "tokenizers")}


def evaluate(
    model_dir: Path, datasets: Sequence[EvalDataset], config: EvalConfig, endpoint: Endpoint | None, work: Path, log: Log
) -> dict[str, DatasetScore]:
    """All data sets in one process; the model is loaded once.

    Raises:
        DataError: a file or row is unusable, a text is longer than the model's context, or the weights are not finite.
        RecipeError: the model cannot be loaded, or has no chat template.
    """
    asked = {dataset.name: _READ[dataset.kind](Path(str(dataset.path)))[: config.limit] for dataset in datasets}
    found = iter(_measure(model_dir, [_row(sample) for samples in asked.values() for sample in samples], config.timeout, work))
    log(f"{sum(map(len, asked.values()))} samples measured by likelihood")
    return {one.name: _SCORE[one.kind](asked[one.name], list(islice(found, len(asked[one.name])))) for one in datasets}


def _row(sample: ChoiceQuestion | Measured) -> dict[str, Any]:
    if isinstance(sample, Measured):
        return {"place": sample.place, **sample.row}
    asked = {"messages": [{"role": "user", "content": sample.question}]} if sample.chat else {"text": sample.question}
    return {"place": sample.place, **asked, "choices": list(sample.choices.values())}


def _measure(model_dir: Path, rows: Sequence[Mapping[str, Any]], timeout: int, work: Path) -> list[Likelihoods]:
    write_bytes(work / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    files = {"rows": "rows.jsonl", "result": "likelihoods.jsonl", "outcome": "outcome.json"}
    request, output = work / "request.json", work / "likelihood.log"
    write_json(request, {"model_dir": str(model_dir.resolve()), **{name: str((work / file).resolve()) for name, file in files.items()}})
    try:
        with child([sys.executable, "-m", "xtuner_core.likelihood", str(request)], output, environment_here(1), GRACE) as running:
            status = follow(running, lambda line: None, timeout)
    except TimeoutError:
        raise DataError(f"likelihoods were not measured within eval.timeout = {timeout} s. The end of {output}:\n{tail(output)}") from None
    if status != 0:
        raise _failure(work, status, output)
    return [json.loads(line) for line in (work / files["result"]).read_text(encoding="utf-8").splitlines()]


def _failure(work: Path, status: int, output: Path) -> UserError:
    try:
        told = json.loads((work / "outcome.json").read_text(encoding="utf-8"))
        return from_exit_code(told["code"], told["message"])
    except (OSError, ValueError, KeyError):
        return from_exit_code(BUG, f"measuring likelihoods ended with status {status}. The end of {output}:\n{tail(output)}")


def loss_score(samples: Sequence[Measured], found: Sequence[Likelihoods]) -> DatasetScore:
    """Nats per token, each sample weighing its tokens; `token_accuracy`: the share of tokens that were the likeliest, in percent."""
    nats, tokens, hits = ([one[name][0] for one in found] for name in ("nats", "tokens", "hits"))
    told = zip(samples, nats, tokens, strict=True)
    judged = tuple(Sample(one.question, one.text, "", cost / count, count) for one, cost, count in told)
    extras = {"perplexity": math.exp(min(sum(nats) / sum(tokens), MOST_NATS)), "token_accuracy": 100.0 * sum(hits) / sum(tokens)}
    return DatasetScore("loss", judged, extras=extras)


def choice_score(samples: Sequence[ChoiceQuestion], found: Sequence[Likelihoods]) -> DatasetScore:
    """The choice whose log-likelihood is highest in proportion to its characters counts, as `acc_norm` of lm-evaluation-harness; without
    that proportion (`acc`) it is `accuracy_unnormalised`, in percent.
    """
    pairs = [(sample, likelihoods["nats"]) for sample, likelihoods in zip(samples, found, strict=True)]
    plain = sum(_likeliest(sample, nats, 0) == sample.answer for sample, nats in pairs)
    judged = tuple(_choice_sample(sample, nats) for sample, nats in pairs)
    return DatasetScore("accuracy", judged, extras={"accuracy_unnormalised": 100.0 * plain / len(judged)})


def _choice_sample(sample: ChoiceQuestion, nats: Sequence[float]) -> Sample:
    chosen = _likeliest(sample, nats, 1)
    return Sample(sample.question, sample.choices[sample.answer], sample.choices[chosen], float(chosen == sample.answer))


def _likeliest(sample: ChoiceQuestion, nats: Sequence[float], power: int) -> str:
    """The letter of the fewest nats per character (`power` 1) or altogether (0); of equals the first."""
    costs = {letter: cost / len(text) ** power for (letter, text), cost in zip(sample.choices.items(), nats, strict=True)}
    return min(costs, key=costs.__getitem__)


_READ: Mapping[str, Callable[[Path], Sequence[Any]]] = {"loss": read_measured, "choice": read_choices}
_SCORE: Mapping[str, Callable[[Sequence[Any], Sequence[Likelihoods]], DatasetScore]] = {"loss": loss_score, "choice": choice_score}
