"""Pods of a Kubernetes cluster: an Indexed Job with a headless service, both of the core API, so that no operator is needed.

As a program: python -m pipelines.launchers.kubernetes MANIFEST creates them, shows the pods' output, and deletes them when the job has
ended or SIGTERM comes; deleted pods save a checkpoint first. What an earlier attempt left behind is deleted before.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from pipelines.launch import Job, LaunchConfig
from pipelines.launchers._torchrun import SHUTDOWN_SECONDS, carried, defaults, meeting, torchrun
from xtuner_core.durable import write_json
from xtuner_core.errors import RecipeError

PORT = 29400
POLL_SECONDS = 5


def check(launch: LaunchConfig) -> None:
    """RecipeError if image, claim or mount is missing, or kubectl is."""
    missing = [name for name in ("image", "claim", "mount") if getattr(launch.kubernetes, name) is None]
    if missing:
        raise RecipeError(f"launcher kubernetes: set {', '.join(f'launch.kubernetes.{name}' for name in missing)}.")
    if shutil.which("kubectl") is None:
        raise RecipeError("launcher kubernetes: this machine has no program kubectl.")


def command(job: Job) -> list[str]:
    """Write the manifest beside the settings, and the program that looks after it.

    Raises:
        RecipeError: the store does not lie on the volume that the pods mount.
    """
    mount = Path(str(job.launch.kubernetes.mount))
    if not job.config.is_relative_to(mount):
        raise RecipeError(f"launch.kubernetes.mount {mount}: the store must lie below it, so that pods can read {job.config}.")
    file = job.config.with_name("kubernetes.json")
    write_json(file, manifest(job))
    return [sys.executable, "-m", __name__, str(file)]


def environment(job: Job) -> dict[str, str]:
    """This process's; kubectl needs its settings and passwords, pods get neither."""
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def described(job: Job) -> str:
    where = f"namespace {job.launch.kubernetes.namespace}"
    return f"Kubernetes job {job.name} in {where}: {job.processes} processes in {job.launch.nodes} pods"


def manifest(job: Job) -> dict[str, Any]:
    """The service, under whose name pods find each other, and the job."""
    metadata = {"name": job.name, "namespace": job.launch.kubernetes.namespace, "labels": {"app.kubernetes.io/part-of": "xtuner"}}
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"batch.kubernetes.io/job-name": job.name}}
    one_each = {"completions": job.launch.nodes, "parallelism": job.launch.nodes, "completionMode": "Indexed"}
    limit = {} if job.launch.time_limit is None else {"activeDeadlineSeconds": 60 * job.launch.time_limit}
    spec = {**one_each, "backoffLimit": job.launch.max_restarts, "ttlSecondsAfterFinished": 86400, **limit, "template": {"spec": _pod(job)}}
    return {
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec},
        ],
    }


def _pod(job: Job) -> dict[str, Any]:
    """As the user who runs the flow, because both write to the store; with no right to anything in the cluster."""
    asked = job.launch.kubernetes
    memory = {"name": "memory", "emptyDir": {"medium": "Memory"}}
    return {
        "subdomain": job.name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": SHUTDOWN_SECONDS + 2,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "nodeSelector": asked.node_selector,
        "securityContext": {
            "runAsUser": os.getuid(),
            "runAsGroup": os.getgid(),
            "runAsNonRoot": os.getuid() != 0,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(job)],
        "volumes": [{"name": "store", "persistentVolumeClaim": {"claimName": asked.claim}}, memory],
    }


def _container(job: Job) -> dict[str, Any]:
    asked = job.launch
    own = {"cpu": asked.cpus_per_node, "memory": asked.memory_per_node, "nvidia.com/gpu": job.gpus_per_node or None}
    resources = {name: str(value) for name, value in own.items() if value is not None}
    threads = {} if asked.cpus_per_node is None else defaults(asked.cpus_per_node // job.per_node)
    settings = carried({**threads, **os.environ})
    settings.pop("PYTHONPATH", None)  # the image has the project
    return {
        "name": "train",
        "image": asked.kubernetes.image,
        "command": [_literal(word) for word in torchrun(meeting(job, f"{job.name}-0.{job.name}:{PORT}"), job, python="python")],
        "env": [{"name": name, "value": _literal(value)} for name, value in settings.items()],
        "resources": {"requests": resources, "limits": resources},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "store", "mountPath": asked.kubernetes.mount}, {"name": "memory", "mountPath": "/dev/shm"}],  # noqa: S108
    }


def _literal(text: str) -> str:
    """Text in which Kubernetes sees no reference to a variable, $(NAME)."""
    return text.replace("$", "$$")


def run(file: Path) -> int:
    """Create what the manifest says, follow it to its end, delete it; 0 if the job completed."""
    job = json.loads(file.read_text(encoding="utf-8"))["items"][1]
    kubectl = ["kubectl", f"--namespace={job['metadata']['namespace']}"]
    delete = [*kubectl, "delete", f"--filename={file}", "--ignore-not-found", "--cascade=foreground", "--wait"]
    subprocess.run(delete, check=True)
    shown: subprocess.Popen[bytes] | None = None
    try:
        subprocess.run([*kubectl, "create", f"--filename={file}"], check=True)
        while (ended := _ended(kubectl, job["metadata"]["name"])) is None:
            shown = _show(kubectl, job, shown)
            time.sleep(POLL_SECONDS)
        return 0 if ended == "Complete" else 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.run(delete, check=False, start_new_session=True)  # the signal goes to our whole group
        if shown:
            shown.terminate()


def _ended(kubectl: list[str], name: str) -> str | None:
    """How the job ended; None while it runs, or while the cluster does not answer."""
    told = _get(kubectl, "job", name, "--ignore-not-found")
    if told is None:
        return None
    conditions = told.get("status", {}).get("conditions", []) if told else [{"type": "Deleted", "status": "True"}]
    return next((one["type"] for one in conditions if one["status"] == "True" and one["type"] in ("Complete", "Failed", "Deleted")), None)


def _show(kubectl: list[str], job: dict[str, Any], shown: subprocess.Popen[bytes] | None) -> subprocess.Popen[bytes] | None:
    """Follow the pods' output once all of them have some; again from now on if the connection broke."""
    if shown and shown.poll() is None:
        return shown
    pods, every = f"--selector=batch.kubernetes.io/job-name={job['metadata']['name']}", job["spec"]["completions"]
    there = _get(kubectl, "pods", pods)
    if there is None or sum(pod["status"].get("phase") in ("Running", "Succeeded", "Failed") for pod in there["items"]) < every:
        return shown
    since = "--since=10s" if shown else "--tail=-1"
    return subprocess.Popen([*kubectl, "logs", "--follow", pods, since, f"--max-log-requests={every}"], start_new_session=True)


def _get(kubectl: list[str], *what: str) -> dict[str, Any] | None:
    """What kubectl tells as JSON (empty if there is none); None if it fails."""
    told = subprocess.run([*kubectl, "get", *what, "--output=json"], capture_output=True, text=True, check=False)
    return None if told.returncode else json.loads(told.stdout or "{}")


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        sys.exit(run(Path(sys.argv[1])))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
