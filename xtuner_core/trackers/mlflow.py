"""MLflow: the server of `MLFLOW_TRACKING_URI`, else a database in `WORK_DIR/mlflow`.

Look at it with `mlflow ui --backend-store-uri sqlite:///WORK_DIR/mlflow/mlflow.db`. Steps after the checkpoint are there twice when a run
goes on, for MLflow forgets nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from xtuner_core.trackers._service import run_id

PACKAGE = "mlflow"
LONGEST_PARAMETER = 500
"""What every MLflow server takes."""


class _Mlflow:
    def __init__(self, client: Any, metric: Any, run: str) -> None:
        self.client, self.metric, self.run = client, metric, run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.run, [self.metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self.client.set_terminated(self.run)


def open_tracker(work_dir: Path, settings: Mapping[str, Any], first_step: int) -> _Mlflow:
    """The work directory's run, made the first time in the experiment `MLFLOW_EXPERIMENT_NAME`, else xtuner."""
    mlflow, entities = import_module(PACKAGE), import_module(f"{PACKAGE}.entities")
    folder = work_dir / "mlflow"
    folder.mkdir(exist_ok=True)
    client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve()}/mlflow.db")

    def new_run() -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "xtuner")
        known = client.get_experiment_by_name(name)
        run = client.create_run(known.experiment_id if known else client.create_experiment(name), run_name=work_dir.name).info.run_id
        texts = {name: str(value)[:LONGEST_PARAMETER] for name, value in settings["train"].items()}
        client.log_batch(run, params=[entities.Param(name, text) for name, text in texts.items()])
        return run

    run = run_id(work_dir, PACKAGE, new_run)
    client.update_run(run, status="RUNNING")
    return _Mlflow(client, entities.Metric, run)
