"""OpenCompass as a child: with its own Python, in a scratch directory, without our environment and, where it scores, without network.

Some of its scorers run what a model wrote (`eval`). They never see a key: against a server it runs twice, first asking (with the
network and the key, if there is one), then scoring (with neither).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from pipelines.chatters import Endpoint
from pipelines.processes import child, follow, tail
from pipelines.stage import Log
from xtuner_core.durable import remove
from xtuner_core.errors import DataError

MOST_SHOWN = 400
"""Characters of an error."""
GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL."""


def run(python: Path, work: Path, endpoint: Endpoint | None, data: Path | None, timeout: int, log: Log) -> None:
    """Ask and score what `work/config.json` says; `data` is where the data sets of its own collection lie.

    One process does it all: with `--debug` tasks run inside it instead of importing everything again (9 s) in two more.

    Raises:
        DataError: it failed or took too long; shows the end of its log.
    """
    options = ["--debug", "--dump-eval-details", "True", "--work-dir", str(work.resolve() / "out")]
    command = [str(python), "-m", "opencompass.cli.main", str(work.resolve() / "config.json"), *options]
    found = {"COMPASS_DATA_CACHE": str(data)} if data else {}
    if endpoint is None:
        caged(command, work, found, timeout, log)
        return
    log(f"OpenCompass asks {endpoint.base_url}, so with the network; it scores without")
    _run([*command, "--mode", "infer"], work, {**found, "OPENAI_API_KEY": endpoint.api_key}, timeout)
    caged([*command, "--mode", "eval", "--reuse", "latest"], work, found, timeout, log)


def caged(command: list[str], work: Path, more: Mapping[str, str], timeout: int, log: Log) -> None:
    """Run a command of OpenCompass' environment without network, where the kernel allows that."""
    cage = network_cage()
    log("OpenCompass runs " + ("without network" if cage else "with its offline switches only: `unshare --net` is not allowed here"))
    _run([*cage, *command], work, more, timeout)


def _run(command: list[str], work: Path, more: Mapping[str, str], timeout: int) -> None:
    scratch, output = work.resolve() / "scratch", work / "opencompass.log"
    scratch.mkdir()
    started = time.monotonic()
    try:
        with child(command, output, {**clean_environment(scratch), **more}, GRACE, cwd=scratch) as running:
            status = follow(running, lambda line: None, timeout)
    except TimeoutError:
        raise failure(work, f"did not finish within eval.timeout = {timeout} s and was stopped") from None
    finally:
        remove(scratch)
    with open(work / "runs.jsonl", "a", encoding="utf-8") as runs:
        runs.write(json.dumps({"command": command, "exit_status": status, "seconds": round(time.monotonic() - started, 1)}) + "\n")
    if status != 0:
        raise failure(work, f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}")


def failure(work: Path, what: str) -> DataError:
    """What went wrong, with the last error that OpenCompass told, and the end of its log."""
    output = work / "opencompass.log"
    told = [line.partition(" - ERROR - ")[2] for line in tail(output, lines=500).splitlines() if " - ERROR - " in line]
    last = f" Its last error: {told[-1][:MOST_SHOWN]}\n" if told else " "
    return DataError(f"OpenCompass {what}.{last}The end of {output}:\n{tail(output)}")


def network_cage() -> list[str]:
    """The command prefix that takes the network away where the kernel allows it, else none.

    In a user namespace of its own a process cannot read ours either (`/proc/PID/environ`). Entering one forgets "die with the parent"
    (PR_SET_PDEATHSIG), so it is asked for again behind it.
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
