"""Nodes of a Slurm cluster: srun waits in the queue, runs one torchrun agent on each node, and shows their output.

Told to stop, we have Slurm send SIGTERM to the agents, whose ranks save a checkpoint (srun itself takes SIGTERM for "kill all"); a job
that still waits is given up. Slurm does the same a minute before the time limit. A job that an earlier attempt left behind is waited for
(`singleton`): two never train in one folder.

As a program: python -m pipelines.launchers.slurm NAME srun ... submits and follows the job of that name. On a node, with the agent's
arguments alone, it adds where the nodes meet and becomes the agent.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from pipelines.launch import Job, LaunchConfig
from pipelines.launchers._torchrun import SHUTDOWN_SECONDS, environment_here, meeting, torchrun
from xtuner_core.errors import RecipeError

POLL_SECONDS = 0.2
_OPTIONS = frozenset({
    "--clusters", "--constraint", "--contiguous", "--core-spec", "--exclude", "--exclusive", "--gpu-bind", "--gpu-freq", "--gres",
    "--hint", "--licenses", "--mem-bind", "--mem-per-cpu", "--mem-per-gpu", "--nice", "--nodelist", "--priority", "--qos",
    "--reservation", "--switches", "--threads-per-core", "--tmp",
})  # fmt: skip
"""Those that choose resources. srun also has options that run programs (--prolog, --task-prolog, --mpi …), and it takes abbreviations."""


def check(launch: LaunchConfig) -> None:
    """RecipeError if an option is not one of those that choose resources, or srun is missing."""
    for option in launch.slurm.options:
        if option.partition("=")[0] not in _OPTIONS or not option.isprintable():
            raise RecipeError(f"launch.slurm.options: {option!r} is none of {', '.join(sorted(_OPTIONS))} (write --name or --name=value).")
    if shutil.which("srun") is None:
        raise RecipeError("launcher slurm: this machine has no program srun. Run the flow where jobs are submitted.")


def command(job: Job) -> list[str]:
    """srun and the agents; each agent learns on its node where they meet."""
    asked = job.launch
    given = {
        "--cpus-per-task": asked.cpus_per_node,
        "--gpus-per-node": job.gpus_per_node or None,
        "--mem": asked.memory_per_node,
        "--time": asked.time_limit,
        "--partition": asked.slurm.partition,
        "--account": asked.slurm.account,
    }
    ours = [sys.executable, "-m", __name__]
    srun = [*ours, job.name, "srun", f"--job-name={job.name}", "--dependency=singleton", f"--nodes={asked.nodes}", "--ntasks-per-node=1"]
    srun += [f"{name}={value}" for name, value in given.items() if value is not None]
    # The rest get as long as a checkpoint takes once one agent has ended; --signal reaches them before the time limit.
    srun += [f"--wait={SHUTDOWN_SECONDS}", "--signal=TERM@60", *asked.slurm.options]
    return [*srun, *ours, *torchrun(meeting(job, None), job)]


def environment(job: Job) -> dict[str, str]:
    """This process's, which srun hands on; how many threads a rank gets is for the nodes to say."""
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def described(job: Job) -> str:
    return f"Slurm job {job.name}: {job.processes} processes on {job.launch.nodes} nodes"


def on_this_node(agent: Sequence[str], slurm: Mapping[str, str], first: str) -> list[str]:
    """The agent with the place where the nodes meet: the job's first node, at a port that the job's number chooses."""
    end = agent.index("torch.distributed.run") + 1
    port = 20000 + int(slurm["SLURM_JOB_ID"]) % 10000
    return [*agent[:end], f"--rdzv-endpoint={first}:{port}", f"--local-addr={slurm['SLURMD_NODENAME']}", *agent[end:]]


def _first_node(slurm: Mapping[str, str]) -> str:
    told = subprocess.run(["scontrol", "show", "hostnames", slurm["SLURM_JOB_NODELIST"]], check=True, capture_output=True, text=True)
    return told.stdout.split()[0]


def submit(name: str, srun: Sequence[str]) -> int:
    """Run srun to its end; its exit status."""
    process = subprocess.Popen(srun, start_new_session=True)  # SIGTERM comes to our whole group
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    while process.poll() is None and not asked:
        time.sleep(POLL_SECONDS)
    if process.poll() is None:
        subprocess.run(["scancel", f"--name={name}", "--state=PENDING"], check=False)
        subprocess.run(["scancel", f"--name={name}", "--state=RUNNING", "--signal=TERM"], check=False)
        try:
            process.wait(SHUTDOWN_SECONDS + 2)
        except subprocess.TimeoutExpired:
            subprocess.run(["scancel", f"--name={name}"], check=False)
    return process.wait()


def main() -> None:
    if sys.argv[2] == "srun":
        sys.exit(submit(sys.argv[1], sys.argv[2:]))
    agent = on_this_node(sys.argv[1:], os.environ, _first_node(os.environ))
    (processes,) = (int(word.partition("=")[2]) for word in agent if word.startswith("--nproc-per-node="))
    os.execve(agent[0], agent, environment_here(processes))


if __name__ == "__main__":
    main()
