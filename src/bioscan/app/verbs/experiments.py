"""`bioscan experiments`."""

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from bioscan.app import output as out
from bioscan.app.flags import Json, Overwrite
from bioscan.errors import RequestError
from bioscan.jobs.experiments import (
    Plan,
    Run,
    chosen,
    plan_runs,
    run_experiments,
    state_of,
    write_plan,
)
from bioscan.jobs.slurm import Slurm, submit

Several = Parameter(consume_multiple=1, negative="")


def run(
    plan: str = "paper",
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    catalogue: Path | None = None,
    images: Path | None = None,
    original: Path | None = None,
    set: Annotated[tuple[str, ...], Several] = (),
    only: Annotated[tuple[str, ...], Several] = (),
    run: Annotated[bool, Parameter(negative="")] = False,
    submit: Literal["slurm"] | None = None,
    inexact: Annotated[bool, Parameter(negative="")] = False,
    gpus: int = 1,
    nodes: int = 1,
    cpus: int = 8,
    time: str = "24:00:00",
    sbatch: Annotated[tuple[str, ...], Several] = (),
    setup: Annotated[tuple[str, ...], Several] = (),
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Plan the paper's 72 runs; train, predict and evaluate them.

    Two tasks (insect orders, Diptera families), three sizes, ResNet-50 and ViT-B/16, cross-entropy and focal
    loss, three seeds, with the hyper-parameters of the paper's program. Without --output the plan is only
    shown. Each run is a file that `bioscan train --config` takes. Called again, --run skips what is done and
    goes on with what was interrupted; called once for each GPU of a machine, the calls share the runs.
    `bioscan compare OUTPUT` gathers the results.

    Args:
        plan: Name of the plan: paper.
        output: Folder of the plan: run files, run folders, scripts.
        catalogue: Catalogue with the split columns; kept in the plan.
        images: Package of the cropped images; kept in the plan.
        original: Package of the uncropped images: adds the paper's comparison on them, three runs.
        set: Other settings, `epochs=1`; for some runs `PATTERN:setting=value`, as
            `*vit*:weights=vit.safetensors`. Runs that become the same are one.
        only: Only these runs: names, patterns (`small_*_s1`) or parts of names.
        run: Run them here.
        submit: Write a job script for each run, and submit it where sbatch is.
        inexact: Let runs go on with other numbers of processes or threads, or on another device, as in
            `bioscan train`.
        gpus: GPUs of a machine that train one run, a process each.
        nodes: SLURM: machines that train one run.
        cpus: SLURM: cores of each GPU.
        time: SLURM: limit of a job.
        sbatch: SLURM: more options, account=abc partition=gpu.
        setup: SLURM: shell lines that come first.
    """
    if run and submit:
        raise RequestError("--run runs here, --submit elsewhere: choose one")
    if output is None:
        if run or submit:
            raise RequestError("--run and --submit need --output, the folder of the plan")
        runs = chosen(plan_runs(plan, overrides=set, original=original is not None), only)
        _show(runs, {r.name: "planned" for r in runs}, None, json=json)
        return 0
    made = write_plan(
        output,
        plan,
        catalogue=catalogue,
        images=images,
        original=original,
        overrides=set or None,
        overwrite=overwrite,
    )
    if run:
        return _run(made, only, gpus, inexact=inexact, json=json)
    if submit:
        wanted = Slurm(nodes=nodes, gpus=gpus, cpus=cpus, time=time, sbatch=sbatch, setup=setup)
        return _submit(made, only, wanted, inexact=inexact, json=json)
    runs = chosen(made.runs, only)
    _show(runs, {r.name: state_of(made, r) for r in runs}, output, json=json)
    return 0


def _show(runs: list[Run], states: dict[str, str], output: Path | None, *, json: bool) -> None:
    rows = [
        {
            "run": run.name,
            "experiment": run.settings.experiment,
            "model": run.settings.model,
            "loss": run.settings.loss,
            "images": "original" if run.original else "cropped",
            "seed": run.settings.seed,
            "state": states[run.name],
        }
        for run in runs
    ]
    if json:
        out.show(out.to_json({"output": output, "runs": rows}))
        return
    columns = ["run", "model", "images", "state"]
    out.show(out.table([[row[c] for c in columns] for row in rows], columns))
    out.show(_counted([*states.values()]))
    if output is None:
        out.show("nothing is written; --output FOLDER writes the run files")
    else:
        out.show(f"run files: {output / 'configs'}; --run runs them, --submit slurm writes job scripts")


def _counted(states: list[str]) -> str:
    counts = ", ".join(f"{count:,} {state}" for state, count in Counter(states).items())
    return f"{len(states):,} {'run' if len(states) == 1 else 'runs'}: {counts}"


def _run(plan: Plan, only: tuple[str, ...], gpus: int, *, inexact: bool, json: bool) -> int:
    def told(result: dict[str, Any]) -> None:
        if json:
            return
        scores = f"micro {result['micro']:.4f}, macro {result['macro']:.4f}" if "micro" in result else ""
        failed = f"{result['failed_images']:,} images failed" if result["failed_images"] else ""
        words = [scores, failed, *([result["error"]] if result["error"] else [])]
        out.show(f"{result['run']}: {result['state']}" + "".join(f"; {word}" for word in words if word))
        sys.stdout.flush()  # a log of days shows each run when it ends

    with out.progress("experiments") as progress:
        results = run_experiments(plan, only=only, gpus=gpus, inexact=inexact, report=told, progress=progress)
    if json:
        out.show(out.to_json({"output": plan.folder, "runs": results}))
    else:
        counts = _counted([result["state"] for result in results])
        out.show(f"{counts}; bioscan compare {plan.folder} gathers the results")
    return 1 if any(r["state"] == "failed" or r["failed_images"] for r in results) else 0


def _submit(plan: Plan, only: tuple[str, ...], slurm: Slurm, *, inexact: bool, json: bool) -> int:
    results = submit(plan, only=only, slurm=slurm, inexact=inexact)
    if json:
        out.show(out.to_json({"output": plan.folder, "runs": results}))
        return 0
    for result in results:
        job = f", job {result['job']}" if result["job"] else ""
        out.show(f"{result['run']}: {result['state']}{job}")
    states = [result["state"] for result in results]
    out.show(_counted(states))
    if "written" in states:
        out.say(f"sbatch is not here: submit the scripts in {plan.folder / 'slurm'} where it is")
    return 0
