"""OpenCompass 0.5.4 in an environment of its own, as one subprocess without network: the share of exactly right answers.

It exits 0 when a task fails, so nothing it says is believed before the predictions on disk were compared with what was asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pipelines.chatters import Endpoint
from pipelines.environments import KNOWN, ensure, pinned_versions
from pipelines.evaluators import DatasetScore, Kind, Sample
from pipelines.heldout import HeldOut, read_heldout
from pipelines.processes import child, follow, tail
from pipelines.recipe import EvalConfig, EvalDataset
from pipelines.stage import Log
from xtuner_core.durable import remove, write_bytes, write_json
from xtuner_core.errors import DataError

KINDS = {"qa": Kind("conversations; the share of answers that equal the expected text", served=True)}
ENVIRONMENT = "opencompass"
MODEL = "model"
"""What OpenCompass calls the model in its output folders."""
QUESTION, ANSWER, SYSTEM = "held_out_question", "held_out_answer", "held_out_system"
"""Column names; OpenCompass also replaces `{column}` inside the questions, so they are names no question has."""
ROUND = [{"role": "HUMAN", "api_role": "HUMAN"}, {"role": "BOT", "api_role": "BOT", "generate": True}]
"""A conversation's shape; the default has an empty system turn behind the user's, which adds a line break to every question."""
GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL."""


def versions() -> dict[str, str]:
    """The pins that decide answers and scores."""
    pins = pinned_versions(KNOWN[ENVIRONMENT].constraints)
    return {name: pins[name] for name in ("opencompass", "torch", "transformers", "tokenizers", "numpy")}


def evaluate(
    model_dir: Path, datasets: Sequence[EvalDataset], config: EvalConfig, endpoint: Endpoint | None, work: Path, log: Log
) -> dict[str, DatasetScore]:
    """Ask the model every held-out question, greedily, and count the answers that equal the expected text.

    Raises:
        DataError: a data set is unusable, the model folder is none, or OpenCompass failed (with the end of its log).
        StorageError: its environment cannot be built.
    """
    asked = {dataset.name: questions(dataset, config.limit) for dataset in datasets}
    context = context_length(model_dir)
    python = ensure(ENVIRONMENT, log)
    for name, samples in asked.items():
        write_questions(work / "questions" / f"{name}.jsonl", samples)
    with_system = {name for name, samples in asked.items() if system(samples[0]) is not None}
    write_json(work / "config.json", experiment(model_dir, datasets, config.batch_size, work / "questions", context, with_system))
    _run(python, work, config.timeout, log)
    return {name: read_score(work, name, samples) for name, samples in asked.items()}


def questions(dataset: EvalDataset, limit: int | None) -> list[HeldOut]:
    """The data set's first `limit` samples (all if None).

    Raises:
        DataError: the file is unreadable or a conversation is not one question and one answer; names file and line.
    """
    path = Path(str(dataset.path))
    samples = read_heldout(path)[:limit]
    for sample in samples:
        roles = [message["role"] for message in sample.messages]
        if roles not in (["user"], ["system", "user"]) or not question(sample):
            raise DataError(
                f"{path}:{sample.line}: evaluation asks one user message, behind a system message if there is one, and compares one "
                f"assistant message, but {' + '.join(roles)} precede the answer. Put the rest into a non-empty user message, or remove it."
            )
        if (system(sample) is None) != (system(samples[0]) is None):
            raise DataError(f"{path}:{sample.line}: either all conversations of a file have a system message, or none.")
    return samples


def question(sample: HeldOut) -> str:
    """The user's message."""
    return sample.messages[-1]["content"]


def system(sample: HeldOut) -> str | None:
    """The system message, if there is one."""
    return sample.messages[0]["content"] if sample.messages[0]["role"] == "system" else None


def context_length(model_dir: Path) -> int:
    """The model's own limit, in tokens; without it OpenCompass would look it up with remote code allowed.

    Raises:
        DataError: this is no Hugging Face folder.
    """
    path = model_dir / "config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8")).get("max_position_embeddings", 4096))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: not readable as a model's configuration ({error}). Give a Hugging Face model folder.") from None


def order(samples: Sequence[HeldOut]) -> list[int]:
    """Indices by length of question: prompts of one batch are padded to its longest."""
    return sorted(range(len(samples)), key=lambda index: len(question(samples[index])))


def write_questions(path: Path, samples: Sequence[HeldOut]) -> None:
    """One JSON object a line, in the order they are asked."""
    asked = [samples[index] for index in order(samples)]
    rows = [{QUESTION: question(sample), ANSWER: sample.expected, SYSTEM: system(sample) or ""} for sample in asked]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def experiment(
    model_dir: Path, datasets: Sequence[EvalDataset], batch_size: int, folder: Path, context: int, with_system: Collection[str] = ()
) -> dict[str, Any]:
    """OpenCompass' configuration as plain data (its usual form is a Python file that is executed).

    `with_system` names the data sets whose questions stand behind a system message.
    """
    return {
        "models": [
            {
                "type": "opencompass.models.HuggingFacewithChatTemplate",
                "abbr": MODEL,
                "path": str(model_dir.resolve()),
                "meta_template": {"round": ROUND, "reserved_roles": [{"role": "SYSTEM", "api_role": "SYSTEM"}]},
                "model_kwargs": {"device_map": "auto", "torch_dtype": "bfloat16", "trust_remote_code": False},
                "tokenizer_kwargs": {"trust_remote_code": False},
                "generation_kwargs": {"do_sample": False},
                "max_seq_len": context,
                "batch_size": batch_size,
                "run_cfg": {"num_gpus": 0},
            }
        ],
        "datasets": [_dataset(dataset, folder / f"{dataset.name}.jsonl", dataset.name in with_system) for dataset in datasets],
    }


def _dataset(dataset: EvalDataset, path: Path, with_system: bool) -> dict[str, Any]:
    begin = {"begin": [{"role": "SYSTEM", "fallback_role": "HUMAN", "prompt": f"{{{SYSTEM}}}"}]} if with_system else {}
    prompt = begin | {"round": [{"role": "HUMAN", "prompt": f"{{{QUESTION}}}"}, {"role": "BOT", "prompt": f"{{{ANSWER}}}"}]}
    return {
        "abbr": dataset.name,
        "type": "opencompass.datasets.CustomDataset",
        "path": str(path.resolve()),
        "reader_cfg": {"input_columns": [QUESTION, SYSTEM], "output_column": ANSWER},
        "infer_cfg": {
            "prompt_template": {"type": "opencompass.openicl.PromptTemplate", "template": prompt},
            "retriever": {"type": "opencompass.openicl.ZeroRetriever"},
            "inferencer": {"type": "opencompass.openicl.GenInferencer", "max_out_len": dataset.max_out_len},
        },
        "eval_cfg": {"evaluator": {"type": "opencompass.openicl.AccEvaluator"}},
    }


def _run(python: Path, work: Path, timeout: int, log: Log) -> None:
    """One process does it all: with `--debug` tasks run inside it instead of importing everything again (9 s) in two more."""
    scratch, output = work.resolve() / "scratch", work / "opencompass.log"
    scratch.mkdir()
    cage = network_cage()
    log("OpenCompass runs " + ("without network" if cage else "with its offline switches only: `unshare --net` is not allowed here"))
    options = ["--debug", "--dump-eval-details", "False", "--work-dir", str(work.resolve() / "out")]
    command = [*cage, str(python), "-m", "opencompass.cli.main", str(work.resolve() / "config.json"), *options]
    started = time.monotonic()
    try:
        with child(command, output, clean_environment(scratch), GRACE, cwd=scratch) as running:
            status = follow(running, lambda line: None, timeout)
    except TimeoutError:
        raise _failure(work, f"did not finish within eval.timeout = {timeout} s and was stopped") from None
    finally:
        remove(scratch)
    seconds = round(time.monotonic() - started, 1)
    write_json(work / "run.json", {"command": command, "exit_status": status, "network": not cage, "seconds": seconds})
    if status != 0:
        raise _failure(work, f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}")


def network_cage() -> list[str]:
    """The command prefix that takes the network away where the kernel allows it, else none.

    Entering a user namespace forgets "die with the parent" (PR_SET_PDEATHSIG), so it is asked for again behind it.
    """
    prefix = ["unshare", "--user", "--map-root-user", "--net", "setpriv", "--pdeathsig", "TERM"]
    try:
        probe = subprocess.run([*prefix, "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return prefix if probe.returncode == 0 else []


_KEEP = str(1 << 30)
"""Bytes that glibc keeps instead of giving back and fetching again at every token (a tenth of the processor time)."""
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")


def clean_environment(scratch: Path) -> dict[str, str]:
    """No secret and no setting of ours: a home that is thrown away, and every switch that means offline."""
    return {
        **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "LANG": "C.UTF-8",
        "PYTHONNOUSERSITE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0))),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads take 4 times as long where another process wants a core
        "MALLOC_TRIM_THRESHOLD_": _KEEP,
        "MALLOC_MMAP_THRESHOLD_": _KEEP,
        **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"),
    }


def read_score(work: Path, name: str, samples: Sequence[HeldOut]) -> DatasetScore:
    """Believe a data set's result only if every question was asked as written and OpenCompass' accuracy is that of its answers.

    Raises:
        DataError: a file is missing or says something else; shows the end of the log.
    """
    predictions = list(_output(work, "predictions", name).values())
    reported = _output(work, "results", name).get("accuracy")
    if len(predictions) != len(samples):
        raise _failure(work, f"answered {len(predictions)} of the {len(samples)} questions of {name}")
    by_index = dict(zip(order(samples), predictions, strict=True))
    judged = tuple(_judge(sample, by_index[index], work) for index, sample in enumerate(samples))
    score = DatasetScore("accuracy", judged)
    if not isinstance(reported, int | float) or abs(score.value - reported) > 1e-6:
        raise _failure(work, f"reports accuracy {reported!r} for {name}, but its answers have {score.value}")
    return score


_ROLES = {"system": "SYSTEM", "user": "HUMAN"}


def _judge(sample: HeldOut, prediction: dict[str, Any], work: Path) -> Sample:
    meant = [(_ROLES[message["role"]], message["content"]) for message in sample.messages]
    asked = [(turn["role"], turn["prompt"]) for turn in prediction["origin_prompt"]]
    if (asked, prediction["gold"]) != (meant, sample.expected):
        raise _failure(work, f"changed the sample of line {sample.line}: {meant!r} became {asked!r}")
    answer = str(prediction["prediction"])
    return Sample(question(sample), sample.expected, answer, float(answer == sample.expected))


def _output(work: Path, kind: str, name: str) -> dict[str, Any]:
    for path in (work / "out").glob(f"*/{kind}/{MODEL}/{name}.json"):
        return json.loads(path.read_text(encoding="utf-8"))
    raise _failure(work, f"left no {kind} for {name}")


def _failure(work: Path, what: str) -> DataError:
    output = work / "opencompass.log"
    return DataError(f"OpenCompass {what}. The end of {output}:\n{tail(output)}")
