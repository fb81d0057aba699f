"""What Prefect adds: python benchmarks/orchestration.py [RESULT.json], on a quiet machine.

In one session, on a real server of its own and on one recipe of seconds:
* `bare`: the stages one after another in one process, without Prefect, into an empty store; `cold`: the same by `python -m flows.finetune`
  against the running server. Their difference is what orchestration adds.
* `cached`, `temporary`: `xtuner run` on a store that has everything, against the running server and with the temporary one.
Each is taken ROUNDS times in turn; the medians and their difference are told, all times are kept. Seconds of wall time.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from flows.service import down, up  # noqa: E402
from xtuner_core.durable import write_json  # noqa: E402

RECIPE = PROJECT / "tests" / "service" / "tiny.yaml"
ROUNDS = 3
BARE = """
import sys
from pathlib import Path
from pipelines.artifacts import Store
from pipelines.recipe import load_recipe
from pipelines.runner import run_until

for last in ("verdict", "chat"):
    run_until(last, load_recipe(sys.argv[1]), Store(Path(sys.argv[2])), print)
"""


def seconds(words: list[str], environment: dict[str, str]) -> float:
    """How long a command takes that must succeed."""
    started = time.monotonic()
    subprocess.run([sys.executable, *words], cwd=PROJECT, env=environment, check=True, capture_output=True)
    return round(time.monotonic() - started, 2)


def measure(place: Path) -> dict[str, list[float]]:
    """Name → the times of its rounds."""
    service = up(place / "home", place / "unused", str(RECIPE))
    alone = {**os.environ, "PREFECT_HOME": str(place / "client"), "DO_NOT_TRACK": "1", "PYTHONPATH": str(PROJECT)}
    alone.pop("PREFECT_API_URL", None)
    served = {**alone, **service.environment}
    times: dict[str, list[float]] = {"bare": [], "cold": [], "cached": [], "temporary": []}
    xtuner = ["-m", "pipelines.cli", "run", str(RECIPE), "--store"]
    try:
        seconds([*xtuner, str(place / "warm")], alone)  # byte code, and the database of the temporary server
        for number in range(ROUNDS):
            bare, cold = (str(place / f"{kind}-{number}") for kind in ("bare", "cold"))
            times["bare"].append(seconds(["-c", BARE, str(RECIPE), bare], alone))
            times["cold"].append(seconds(["-m", "flows.finetune", str(RECIPE), "--store", cold], served))
            times["cached"].append(seconds([*xtuner, str(place / "warm")], served))
            times["temporary"].append(seconds([*xtuner, str(place / "warm")], alone))
            print({name: found[-1] for name, found in times.items()}, flush=True)
    finally:
        down(place / "home")
    return times


def main(target: Path | None) -> None:
    """Measure, tell and write."""
    with tempfile.TemporaryDirectory(prefix="orchestration") as place:
        times = measure(Path(place))
    middle = {name: statistics.median(found) for name, found in times.items()}
    result = {
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": platform.machine(), "load": os.getloadavg()[0]},
        "rounds": times,
        "median": middle,
        "added_by_orchestration": round(middle["cold"] - middle["bare"], 2),
        "added_share": round(middle["cold"] / middle["bare"] - 1, 4),
    }
    print(result)
    if target:
        write_json(target, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
