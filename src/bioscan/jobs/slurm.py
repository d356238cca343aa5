"""A plan's runs as jobs of SLURM: scripts, and their submission."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bioscan.errors import RequestError
from bioscan.jobs.experiments import Plan, Run, chosen, state_of, torchrun, train_command, write_text


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What a run asks the cluster for."""

    nodes: int = 1
    gpus: int = 1
    """Of each node, a process for each; 0: one process without."""
    cpus: int = 8
    """Cores of each GPU."""
    time: str = "24:00:00"
    sbatch: tuple[str, ...] = ()
    """More options, `account=abc`."""
    setup: tuple[str, ...] = ()
    """Shell lines that come first, such as `module load python`."""

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus", 0), ("cpus", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for option in self.sbatch:
            if not re.fullmatch(r"[a-z][\w-]*(=\S+)?", option):
                raise RequestError(f"'{option}' is no option of sbatch, such as account=abc (without --)")


def slurm_script(plan: Plan, run: Run, slurm: Slurm, *, inexact: bool = False) -> str:
    """The job of a run: torchrun on each node, then prediction and evaluation on the first.

    It begins a run or goes on with it, so that it may be submitted again, and requeued by the cluster.
    """
    folder = plan.folder.absolute()
    processes = max(1, slurm.gpus)
    options = {
        "job-name": run.name,
        "output": f"{folder}/slurm/{run.name}-%j.log",
        "nodes": slurm.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": slurm.cpus * processes,
        **({"gpus-per-node": slurm.gpus} if slurm.gpus else {}),
        "time": slurm.time,
    }
    asked = [f"{name}={value}" for name, value in options.items()] + ["requeue", *slurm.sbatch]
    train = shlex.join(train_command(plan, run))
    rest = ["-m", "bioscan", "experiments", plan.name, "-o", str(folder), "--only", run.name, "--run"]
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{option}" for option in asked),
            "set -euo pipefail",
            *slurm.setup,
            f"run={shlex.quote(str(plan.place(run).absolute()))}",
            "status=0",
            'if [ ! -f "$run/model/model.json" ]; then',
            "    resume=",
            '    if [ -f "$run/record.json" ]; then resume="--resume' + " --inexact" * inexact + '"; fi',
            '    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            f"    srun --cpus-per-task={options['cpus-per-task']} {shlex.join(torchrun(processes))} "
            f'--nnodes={slurm.nodes} --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" '
            '--rdzv-endpoint="$first:$((20000 + SLURM_JOB_ID % 20000))" \\',
            f"        {train} $resume || status=$?",
            "fi",
            "# status 1 may only mean that images could not be read: the model says whether it was trained",
            'if [ ! -f "$run/model/model.json" ]; then exit $((status ? status : 1)); fi',
            shlex.join([sys.executable, *rest]),
            "",
        ]
    )


def submit(
    plan: Plan, *, only: Sequence[str] = (), slurm: Slurm | None = None, inexact: bool = False
) -> list[dict[str, Any]]:
    """Write a script for each run that is not done, and submit it where `sbatch` is.

    A run whose job is still in the queue is not submitted again.

    Returns:
        Per run: `run`, `state` (done, queued, submitted; written: there is no sbatch here), `job` (its number
        or None), `script`.

    Raises:
        RequestError: no run fits; the data is not named; sbatch refuses.
    """
    slurm = slurm or Slurm()
    runs = chosen(plan.runs, only)
    for run in runs:
        plan.data(run)
    sbatch, submitted = shutil.which("sbatch"), plan.folder / "slurm" / "jobs.json"
    jobs: dict[str, str] = json.loads(submitted.read_text(encoding="utf-8")) if submitted.is_file() else {}
    queue = _queue() if sbatch and jobs else set()
    results = []
    for run in runs:
        script = plan.script(run)
        result: dict[str, Any] = {"run": run.name, "state": "done", "job": None, "script": str(script)}
        results.append(result)
        if state_of(plan, run) == "done":
            continue
        write_text(script, slurm_script(plan, run, slurm, inexact=inexact))
        if sbatch is None:
            result["state"] = "written"
        elif jobs.get(run.name) in queue:
            result |= {"state": "queued", "job": jobs[run.name]}
        else:
            done = subprocess.run(  # noqa: S603
                [sbatch, "--parsable", str(script)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RequestError(f"sbatch refuses {script}: {done.stderr.strip() or done.stdout.strip()}")
            jobs[run.name] = done.stdout.strip().split(";")[0]
            write_text(submitted, json.dumps(jobs, indent=1) + "\n")
            result |= {"state": "submitted", "job": jobs[run.name]}
    return results


def _queue() -> set[str]:
    """Numbers of this user's jobs that wait or run.

    Raises:
        RequestError: squeue does not say: a run might be submitted twice.
    """
    squeue = shutil.which("squeue")
    if squeue is None:
        raise RequestError("squeue is not here, which tells what was submitted already")
    done = subprocess.run(  # noqa: S603
        [squeue, "--me", "--noheader", "--format=%i"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RequestError(f"squeue does not tell what was submitted already: {done.stderr.strip()}")
    return {*done.stdout.split()}
