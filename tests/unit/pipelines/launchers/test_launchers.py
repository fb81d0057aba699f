"""The command that each launcher makes of a recipe, word for word, and what recipes cannot make it do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from pipelines.launch import Job, LaunchConfig
from pipelines.launchers import kubernetes, local, slurm, ssh, torchrun
from pipelines.pipeline import check, nodes
from pipelines.recipe import load_recipe
from pipelines.supervisor import __file__ as SUPERVISOR
from xtuner_core.errors import RecipeError

CONFIG = Path("/store/.work/train-1/record/config.json")
ENGINE = ["--max-restarts=0", "--shutdown-timeout=20", "-m", "xtuner_core.sft", "--config", str(CONFIG)]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
NAME = "xtuner-c2f2d6d040bc4f74"


def job(processes: int = 4, config: Path = CONFIG, **launch: object) -> Job:
    return Job(config, config.with_name("train.log"), processes, LaunchConfig.model_validate(launch))


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in which only a few variables and programs are there."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("srun", "kubectl", "ssh"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o700)
    for name in os.environ:
        monkeypatch.delenv(name)
    for name, value in {"PATH": str(folder), "OMP_NUM_THREADS": "3", "XTUNER_AUTH": "canary", "WANDB_API_KEY": "canary"}.items():
        monkeypatch.setenv(name, value)
    return folder


def meet(nodes: int, endpoint: str) -> list[str]:
    return [f"--nnodes={nodes}", "--rdzv-backend=c10d", endpoint, f"--rdzv-id={NAME}", "--rdzv-conf=join_timeout=1800"]


def test_local() -> None:
    assert local.command(job()) == [*TORCHRUN, "--standalone", "--nproc-per-node=4", *ENGINE]


def test_torchrun(tmp_path: Path, programs: Path) -> None:
    config = tmp_path / "a b" / "config.json"
    config.parent.mkdir()
    wanted = job(6, config, nodes=3, rendezvous="node1:29400", join_minutes=5, max_restarts=2)
    here = torchrun.command(wanted)
    assert here[3:9] == ["--nnodes=3", "--rdzv-backend=c10d", "--rdzv-endpoint=node1:29400", f"--rdzv-id={wanted.name}",
                         "--rdzv-conf=join_timeout=300", "--local-addr=node1"]  # fmt: skip
    assert here[9:11] == ["--nproc-per-node=2", "--max-restarts=2"]
    script = config.with_name("join.sh")
    assert torchrun.described(wanted) == f"to take part, run on 2 other machines within 5 min: sh '{script}'"
    assert subprocess.run(["/bin/sh", "-n", script]).returncode == 0
    last = script.read_text().splitlines()[-1]
    assert last.startswith("exec env ") and "OMP_NUM_THREADS=3" in last and last.endswith(f">> '{config.with_name('train.log')}' 2>&1")
    assert f"--config '{config}'" in last and "--local-addr" not in last and "canary" not in last


def test_ssh(programs: Path) -> None:
    wanted = job(nodes=2, rendezvous="node1:29400", hosts=["me@node2"])
    agent = [*TORCHRUN, *meet(2, "--rdzv-endpoint=node1:29400"), "--nproc-per-node=2", *ENGINE]
    log = str(CONFIG.with_name("train.log"))
    assert ssh.command(wanted) == [sys.executable, "-m", "pipelines.launchers.ssh", "me@node2", "node1", log, *agent]
    *program, host, there = ssh.on_host("me@node2", agent, {"OMP_NUM_THREADS": "3; rm -rf /", "WANDB_API_KEY": "canary"}, "/a b/log")
    assert program == ["ssh", "-tt", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-o", "ServerAliveInterval=15", "--"]
    assert host == "me@node2"
    begin = f"env 'OMP_NUM_THREADS=3; rm -rf /' PYTHONUNBUFFERED=1 {sys.executable} -I {SUPERVISOR} 22 0 {sys.executable}"
    assert there.startswith(f"{begin} -m torch.distributed.run --local-addr=node2 --nnodes=2 ") and there.endswith(" >> '/a b/log' 2>&1")


def test_slurm(programs: Path) -> None:
    asked = {"cpus_per_node": 16, "memory_per_node": "64G", "time_limit": 90}
    wanted = job(nodes=2, **asked, slurm={"partition": "gpu", "account": "team", "options": ["--qos=high", "--exclusive"]})
    agent = [*TORCHRUN, "--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-id={NAME}", "--rdzv-conf=join_timeout=1800", "--nproc-per-node=2"]
    assert slurm.command(wanted) == [
        sys.executable, "-m", "pipelines.launchers.slurm", NAME, "srun", f"--job-name={NAME}",
        "--dependency=singleton", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=16",
        "--gpus-per-node=2", "--mem=64G", "--time=90", "--partition=gpu", "--account=team", "--wait=20", "--signal=TERM@60",
        "--qos=high", "--exclusive", sys.executable, "-m", "pipelines.launchers.slurm", *agent, *ENGINE,
    ]  # fmt: skip
    on_node = slurm.on_this_node([*agent, *ENGINE], {"SLURM_JOB_ID": "123456", "SLURMD_NODENAME": "node8"}, "node7")
    assert on_node == [*TORCHRUN, "--rdzv-endpoint=node7:23456", "--local-addr=node8", *agent[3:], *ENGINE]
    assert not [word for word in slurm.command(job(2, gpus_per_node=0)) if word.startswith("--gpus")]


def test_kubernetes(programs: Path, tmp_path: Path) -> None:
    """This manifest passed kubernetes-validate 1.37 (Kubernetes' own schemas of 1.28 and 1.33), strictly."""
    config = tmp_path / "config.json"
    place = {
        "image": "registry.example/xtuner:1",
        "namespace": "ml",
        "claim": "store",
        "mount": str(tmp_path),
        "node_selector": {"gpu": "h200"},
    }
    wanted = job(4, config, nodes=2, cpus_per_node=8, memory_per_node="64G", time_limit=90, max_restarts=1, kubernetes=place)
    assert kubernetes.command(wanted) == [sys.executable, "-m", "pipelines.launchers.kubernetes", str(tmp_path / "kubernetes.json")]
    made = json.loads((tmp_path / "kubernetes.json").read_text())
    service, batch = made["items"]
    metadata = {"name": wanted.name, "namespace": "ml", "labels": {"app.kubernetes.io/part-of": "xtuner"}}
    assert service == {
        "apiVersion": "v1", "kind": "Service", "metadata": metadata,
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"batch.kubernetes.io/job-name": wanted.name}},
    }  # fmt: skip
    pod = batch["spec"].pop("template")["spec"]
    assert batch == {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": metadata,
        "spec": {"completions": 2, "parallelism": 2, "completionMode": "Indexed", "backoffLimit": 1, "ttlSecondsAfterFinished": 86400,
                 "activeDeadlineSeconds": 5400},
    }  # fmt: skip
    (container,) = pod.pop("containers")
    assert pod.pop("volumes")[0] == {"name": "store", "persistentVolumeClaim": {"claimName": "store"}}
    assert pod == {
        "subdomain": wanted.name, "restartPolicy": "Never", "terminationGracePeriodSeconds": 22, "automountServiceAccountToken": False,
        "enableServiceLinks": False, "nodeSelector": {"gpu": "h200"},
        "securityContext": {"runAsUser": os.getuid(), "runAsGroup": os.getgid(), "runAsNonRoot": os.getuid() != 0,
                            "seccompProfile": {"type": "RuntimeDefault"}},
    }  # fmt: skip
    words = container["command"]
    assert words[:6] == ["python", "-m", "torch.distributed.run", "--nnodes=2", "--rdzv-backend=c10d",
                         f"--rdzv-endpoint={wanted.name}-0.{wanted.name}:29400"]  # fmt: skip
    assert words[-2:] == ["--config", str(config)] and "--nproc-per-node=2" in words
    asked = {"cpu": "8", "memory": "64G", "nvidia.com/gpu": "2"}
    assert container["resources"] == {"requests": asked, "limits": asked}
    assert {"name": "OMP_NUM_THREADS", "value": "3"} in container["env"] and "canary" not in json.dumps(made)


def test_kubernetes_takes_no_text_for_a_variable(programs: Path, tmp_path: Path) -> None:
    place = {"image": "a", "claim": "b", "mount": str(tmp_path)}
    made = kubernetes.manifest(job(1, tmp_path / "$(HOSTNAME)" / "config.json", kubernetes=place))
    assert made["items"][1]["spec"]["template"]["spec"]["containers"][0]["command"][-1] == f"{tmp_path}/$$(HOSTNAME)/config.json"


def test_kubernetes_needs_the_store_on_the_volume(programs: Path) -> None:
    with pytest.raises(RecipeError, match=r"launch.kubernetes.mount /elsewhere: the store must lie below it"):
        kubernetes.command(job(kubernetes={"image": "a", "claim": "b", "mount": "/elsewhere"}))


FAKE_KUBECTL = """#!{python}
import json, pathlib, sys, time
here, words = pathlib.Path(__file__).parent, sys.argv[1:]
with open(here / "calls", "a") as calls:
    print(" ".join(words), file=calls)
if "logs" in words:
    print("[XTuner] a line of a pod", flush=True)
    time.sleep(60)
if words[1:3] == ["get", "pods"]:
    print(json.dumps({{"items": [{{"status": {{"phase": "Running"}}}}] * 2}}))
if words[1:3] == ["get", "job"]:
    conditions = [{{"type": "{ends}", "status": "True"}}] if (here / "calls").read_text().count("get job") > 2 else []
    print(json.dumps({{"status": {{"conditions": conditions}}}}))
"""
"""Stands in for kubectl, whose cluster no test has: writes down what it is asked and answers as a cluster would."""


@pytest.mark.parametrize(("ends", "status"), [("Complete", 0), ("Failed", 1), ("Running", None)])
def test_kubernetes_follows_the_pods_and_deletes_them(tmp_path: Path, ends: str, status: int | None) -> None:
    kubectl, file = tmp_path / "kubectl", tmp_path / "kubernetes.json"
    kubectl.write_text(FAKE_KUBECTL.format(python=sys.executable, ends=ends))
    kubectl.chmod(0o700)
    file.write_text(json.dumps(kubernetes.manifest(job(2, nodes=2, kubernetes={"image": "a", "claim": "b", "mount": "/store"}))))
    program = "from pipelines.launchers import kubernetes as k; import signal, sys, pathlib; k.POLL_SECONDS = 0.2"
    program += "; signal.signal(signal.SIGTERM, k._stop); sys.exit(k.run(pathlib.Path(sys.argv[1])))"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen([sys.executable, "-c", program, file], env=environment, stdout=subprocess.PIPE) as running:
        if status is None:
            deadline = time.monotonic() + 60
            while "logs" not in (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else True:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            running.terminate()
        told, _ = running.communicate(timeout=60)
    assert running.returncode == (1 if status is None else status)
    calls = [call.removeprefix("--namespace=default ") for call in (tmp_path / "calls").read_text().splitlines()]
    delete = f"delete --filename={file} --ignore-not-found --cascade=foreground --wait"
    assert calls[:2] == [delete, f"create --filename={file}"] and calls[-1] == delete
    assert f"logs --follow --selector=batch.kubernetes.io/job-name={NAME} --tail=-1 --max-log-requests=2" in calls
    assert status is None or told == b"[XTuner] a line of a pod\n"


@pytest.mark.parametrize(
    ("launcher", "launch", "told"),
    [
        (local, {"nodes": 2}, "launcher local starts processes on this machine only"),
        (torchrun, {"nodes": 2}, "set launch.rendezvous to HOST:PORT"),
        (ssh, {"nodes": 3, "rendezvous": "a:1", "hosts": ["b"]}, "launch.nodes is 3, but this machine and launch.hosts are 2"),
        (slurm, {"slurm": {"options": ["--task-prolog=/tmp/x"]}}, "'--task-prolog=/tmp/x' is none of --clusters"),
        (slurm, {"slurm": {"options": ["--prol=/tmp/x"]}}, "is none of"),
        (slurm, {"slurm": {"options": ["rm"]}}, "is none of"),
        (kubernetes, {}, "set launch.kubernetes.image, launch.kubernetes.claim, launch.kubernetes.mount"),
    ],
)
def test_what_is_missing_is_told_before_anything_runs(programs: Path, launcher: ModuleType, launch: dict[str, object], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        launcher.check(LaunchConfig.model_validate(launch))
    assert told in str(caught.value)


@pytest.mark.parametrize("launcher", [slurm, kubernetes, ssh])
def test_a_missing_program_is_told(launcher: ModuleType, programs: Path) -> None:
    whole = {"rendezvous": "a:1", "kubernetes": {"image": "a", "claim": "b", "mount": "/c"}}
    launcher.check(LaunchConfig.model_validate(whole))
    for program in programs.iterdir():
        program.unlink()
    with pytest.raises(RecipeError, match="this machine has no program"):
        launcher.check(LaunchConfig.model_validate(whole))


@pytest.mark.parametrize(
    "change",
    [
        "launch.rendezvous='a:1; reboot'",
        "launch.rendezvous=-a:1",
        "launch.hosts=['-oProxyCommand=reboot']",
        "launch.hosts=['a b']",
        "launch.slurm.partition='a --prolog=x'",
        "launch.slurm.account=--uid=0",
        "launch.memory_per_node='1G,x'",
        "launch.kubernetes.image='a b'",
        "launch.kubernetes.namespace=--all",
        "launch.kubernetes.claim='x: {y'",
        "launch.kubernetes.mount='/a:$(x)'",
        "launch.nosuch=1",
    ],
)
def test_a_recipe_s_words_are_no_options_and_no_shell(change: str) -> None:
    with pytest.raises(RecipeError, match=r"launch\."):
        load_recipe("qwen3_tiny_full_openai", [change])


def test_processes_are_those_of_all_machines_and_their_places_do_not_matter_to_the_result() -> None:
    recipe, other = (
        load_recipe(
            "qwen3_tiny_full_openai", ["train.processes=2", f"launch.nodes={nodes}", "launch.rendezvous=a:1", "train.launcher=torchrun"]
        )
        for nodes in (1, 2)
    )
    (stage,) = (node.stage for node in nodes(recipe) if node.name == "train")
    assert stage.settings(recipe) == stage.settings(other)
    check(other)
    with pytest.raises(RecipeError, match=r"train.processes \(2\) must be a multiple of launch.nodes \(3\)"):
        load_recipe("qwen3_tiny_full_openai", ["train.processes=2", "launch.nodes=3"])
