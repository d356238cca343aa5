"""The paper's experiments: planned as run files, run, and resumed (`jobs.slurm` hands them to a cluster).

A plan folder holds `plan.json`, `runs.csv`, a run file for each run in `configs/`, the run folders in `runs/`
and, for SLURM, a script for each run in `slurm/`. The run files are what counts: `bioscan train --config`
takes them, and one that was changed by hand is run as it stands.
"""

import contextlib
import csv
import fnmatch
import io
import json
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

from bioscan.config import layered
from bioscan.data.predictions import read_record
from bioscan.errors import BioscanError, DataError, RequestError, unknown
from bioscan.files import locked, writing
from bioscan.jobs.evaluate import evaluate, evaluate_ranks
from bioscan.learn.settings import RECIPES, TrainSettings
from bioscan.vocabulary import EXPERIMENTS

PLAN: Final = "plan.json"
EVALUATION: Final = "evaluation.json"
PREDICTIONS: Final = "predictions.parquet"
SCHEMA_VERSION: Final = 1

BACKBONES: Final = ("resnet50.tv_in1k", "vit_base_patch16_224.augreg_in21k_ft_in1k")
"""The paper's two, by timm's names for the weights that its program loads: torchvision's first ImageNet
weights, and what `vit_base_patch16_224` was in timm 0.6.13, which its requirements name."""
LOSSES: Final = ("cross_entropy", "focal")
SEEDS: Final = (1, 2, 3)
SIZES: Final = ("small", "medium", "large")

State = Literal["planned", "started", "trained", "done"]
Progress = Callable[..., None]

ONLY_TIME: Final = ("device", "workers", "threads", "cache_mb")
"""Settings that do not make another run."""


@dataclass(frozen=True)
class Run:
    """One training of a plan, with its prediction and evaluation."""

    name: str
    settings: TrainSettings
    original: bool = False
    """On the package of uncropped images."""


@dataclass(frozen=True)
class Plan:
    """A folder with runs, and where their data lies."""

    folder: Path
    name: str
    """As in `PLANS`."""
    overrides: tuple[str, ...]
    catalogue: Path | None
    images: Path | None
    original: Path | None
    runs: tuple[Run, ...]

    def config(self, run: Run) -> Path:
        """The run file."""
        return self.folder / "configs" / f"{run.name}.toml"

    def place(self, run: Run) -> Path:
        """The run folder."""
        return self.folder / "runs" / run.name

    def script(self, run: Run) -> Path:
        """The script for SLURM."""
        return self.folder / "slurm" / f"{run.name}.sh"

    def data(self, run: Run) -> tuple[Path, Path]:
        """Catalogue and package of a run.

        Raises:
            RequestError: one of them was never named.
        """
        package = self.original if run.original else self.images
        if self.catalogue is None or package is None:
            raise RequestError("the runs need --catalogue and --images; the plan keeps them once given")
        return self.catalogue, package


# -- planning


def _paper() -> list[dict[str, Any]]:
    """Two tasks, three sizes, two backbones, two losses, three seeds; the small ones first."""
    return [
        {"experiment": experiment.name, "model": model, "loss": loss, "seed": seed}
        for size in SIZES
        for experiment in sorted(EXPERIMENTS.values(), key=lambda e: e.name, reverse=True)
        if experiment.size == size
        for model in BACKBONES
        for loss in LOSSES
        for seed in SEEDS
    ]


def _paper_original() -> list[dict[str, Any]]:
    """The side comparison on uncropped images: ResNet-50, cross-entropy, small_insect_order."""
    wanted = {"experiment": "small_insect_order", "model": BACKBONES[0], "loss": "cross_entropy"}
    return [run for run in _paper() if wanted.items() <= run.items()]


PLANS: Final = {"paper": (_paper, _paper_original)}
"""Name -> what it varies, and its runs on uncropped images; everything else is the recipe of that name."""


def plan_runs(name: str = "paper", *, overrides: Sequence[str] = (), original: bool = False) -> list[Run]:
    """The runs of a plan; those that the overrides make equal are one.

    Args:
        name: As in `PLANS`.
        overrides: `setting=value`, or `PATTERN:setting=value` for the runs whose planned name fits the
            pattern (`*vit*`); the later wins.
        original: Add the runs on uncropped images.

    Raises:
        RequestError: an unknown plan or setting, a value that does not fit, a pattern that fits no run.
    """
    if name not in PLANS:
        raise unknown("plan", name, PLANS)
    cropped, uncropped = PLANS[name]
    wanted = [(run, False) for run in cropped()] + [(run, True) for run in uncropped() if original]
    changes = [_override(text) for text in overrides]
    fitting = [0] * len(changes)
    runs: dict[str, Run] = {}
    for varied, on_original in wanted:
        planned = _name(TrainSettings(**{**RECIPES[name], **varied}), on_original)
        values: dict[str, Any] = {}
        for number, (pattern, key, value) in enumerate(changes):
            if fnmatch.fnmatchcase(planned, pattern):
                values[key] = value
                fitting[number] += 1
        settings = layered(TrainSettings, recipe={**RECIPES[name], **varied}, flags=values)
        run = Run(_name(settings, on_original), settings, on_original)
        if runs.setdefault(run.name, run) != run:
            raise RequestError(f"two different runs would be called {run.name}; change what tells them apart")
    for text, count in zip(overrides, fitting, strict=True):
        if not count:
            raise RequestError(f"{text}: no run of the plan fits the pattern")
    return list(runs.values())


def _override(text: str) -> tuple[str, str, Any]:
    """Pattern, setting and value; the value as TOML has it, a bare word is text."""
    left, equals, value = text.partition("=")
    pattern, _, key = left.rpartition(":")
    if not equals or not key:
        raise RequestError(f"'{text}' is no setting=value, such as epochs=1")
    if key == "weights" and Path(value).exists():  # runs may begin in another folder
        return pattern or "*", key, str(Path(value).absolute())
    try:
        return pattern or "*", key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return pattern or "*", key, value


def _name(settings: TrainSettings, original: bool) -> str:
    """As the paper's program names its runs: experiment, model, loss, seed."""
    backbone = re.sub(r"[^\w-]+", "-", settings.model.rsplit("/", 1)[-1].split(".")[0])
    parts = [settings.experiment, backbone, settings.loss, *(["original"] if original else [])]
    return "_".join([*parts, f"s{settings.seed}"])


def toml_of(settings: TrainSettings) -> str:
    """The settings that differ from the defaults, and those that name the run, as the table [train]."""
    naming = ("experiment", "model", "loss", "seed")
    lines = [
        f"{field.name} = {_toml(value)}"
        for field in fields(settings)
        if (value := getattr(settings, field.name)) is not None
        and (field.name in naming or value != field.default)
    ]
    return "\n".join(["[train]", *lines, ""])


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace(
        "\x7f", "\\u007f"
    )  # all that TOML strings lack of JSON's


# -- the plan folder


def write_plan(
    folder: Path | str,
    name: str = "paper",
    *,
    catalogue: Path | str | None = None,
    images: Path | str | None = None,
    original: Path | str | None = None,
    overrides: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Plan:
    """Plan runs in a folder, or open the plan that is there.

    Args:
        folder: The plan folder.
        name: As in `PLANS`.
        catalogue: Catalogue with the split columns; None: as it was given before.
        images: Package of the cropped images; None: as it was given before.
        original: Package of the uncropped images: adds the runs on them.
        overrides: As `plan_runs`; None: as they were given before.
        overwrite: Write the run files anew; run folders stay.

    Raises:
        RequestError: the folder holds something else, or a plan with other overrides; as `plan_runs`.
        DataError: a file of the plan that cannot be read.
    """
    folder = Path(folder)
    there = read_plan(folder) if (folder / PLAN).is_file() else None
    if there is None and folder.exists() and not _is_empty(folder):
        raise RequestError(f"{folder} exists and is no plan; choose another --output")
    changes = tuple(overrides) if overrides is not None else there.overrides if there else ()
    if there and not overwrite and (there.name, there.overrides) != (name, changes):
        was = ", ".join(there.overrides) or "none"
        raise RequestError(
            f"{folder} holds a plan with other settings (--set {was}); "
            "choose another --output, or pass --overwrite to write its run files anew"
        )
    data = {
        key: Path(given).absolute() if given is not None else getattr(there, key, None)
        for key, given in (("catalogue", catalogue), ("images", images), ("original", original))
    }
    for key, path in data.items():
        if path is not None and not path.exists():
            raise RequestError(f"--{key}: {path} does not exist")
    if data["images"] and data["original"] and data["images"].name == data["original"].name:
        raise RequestError(
            f"--images and --original are both called {data['images'].name}, and runs are told apart by that "
            "name; link one of them under another"
        )
    runs = plan_runs(name, overrides=changes, original=data["original"] is not None)
    if there and not overwrite:
        known = {run.name: run for run in there.runs}
        runs = [known.get(run.name, run) for run in runs]
    plan = Plan(folder, name, changes, runs=tuple(runs), **data)
    for run in plan.runs:
        if overwrite or not plan.config(run).exists():
            write_text(plan.config(run), f"{_header(plan, run)}\n{toml_of(run.settings)}")
    if overwrite:
        for stale in {*folder.glob("configs/*.toml")} - {plan.config(run) for run in plan.runs}:
            stale.unlink()
    write_text(folder / "runs.csv", _table(plan))
    content = {
        "schema_version": SCHEMA_VERSION,
        "plan": name,
        "set": list(changes),
        **{key: None if path is None else str(path) for key, path in data.items()},
        "runs": [{"name": run.name, "original": run.original} for run in plan.runs],
    }
    write_text(folder / PLAN, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return plan


def read_plan(folder: Path | str) -> Plan:
    """The plan in a folder, its settings as the run files have them.

    Raises:
        RequestError: there is none; a run file that is absent or has an unknown setting.
        DataError: a file that cannot be read.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        data = {
            key: None if content[key] is None else Path(content[key])
            for key in ("catalogue", "images", "original")
        }
        named = [(str(run["name"]), bool(run["original"])) for run in content["runs"]]
        runs = tuple(
            Run(
                run,
                layered(TrainSettings, file=folder / "configs" / f"{run}.toml", table="train"),
                original,
            )
            for run, original in named
        )
        return Plan(folder, content["plan"], tuple(content["set"]), runs=runs, **data)
    except FileNotFoundError:
        raise RequestError(f"{folder}: no plan; bioscan experiments writes one") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / PLAN}: cannot be read as a plan ({error})") from None


def _is_empty(folder: Path) -> bool:
    """Whether nothing but what a plan that was killed before its last file leaves is in a folder."""
    return folder.is_dir() and all(
        entry.name in ("configs", "runs.csv") or entry.name.endswith(".partial") for entry in folder.iterdir()
    )


def write_text(path: Path, text: str) -> None:
    """Write a file of the plan, unless it says so already: its time then stays."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    with writing(path, overwrite=True) as partial:
        partial.write_text(text, encoding="utf-8")


def _header(plan: Plan, run: Run) -> str:
    images = "UNCROPPED_IMAGES" if run.original else "IMAGES"
    return (
        f"# A run of the plan «{plan.name}»:\n"
        f"# bioscan train CATALOGUE {images} --config {run.name}.toml --output RUN\n"
    )


def _table(plan: Plan) -> str:
    """The runs as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "experiment", "model", "loss", "images", "seed"])
    for run in plan.runs:
        made = run.settings
        images = "original" if run.original else "cropped"
        writer.writerow([run.name, made.experiment, made.model, made.loss, images, made.seed])
    return text.getvalue()


def chosen(runs: Sequence[Run], only: Sequence[str]) -> list[Run]:
    """The runs that one of the patterns fits; all without a pattern.

    Args:
        runs: Of a plan.
        only: A name, a pattern (`small_*_s1`), or a part of names (`resnet50`).

    Raises:
        RequestError: a pattern that fits no run.
    """
    names = [run.name for run in runs]
    found: set[str] = set()
    for pattern in only:
        glob = pattern if pattern in names or set(pattern) & set("*?[") else f"*{pattern}*"
        fitting = fnmatch.filter(names, glob) if pattern else []
        if not fitting:
            raise RequestError(f"no run is called '{pattern}'; their names are like {names[0]}")
        found |= {*fitting}
    return [run for run in runs if not only or run.name in found]


def state_of(plan: Plan, run: Run) -> State:
    """How far a run is.

    Raises:
        RequestError: the run folder holds a run with other settings.
    """
    place = plan.place(run)
    record = place / "record.json"
    if record.is_file():
        _refuse_other_settings(plan, run, record)
    if (place / EVALUATION).is_file():
        return "done"
    if (place / "model" / "model.json").is_file():
        return "trained"
    return "started" if record.is_file() else "planned"


def _refuse_other_settings(plan: Plan, run: Run, record: Path) -> None:
    try:
        was = json.loads(record.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{record}: cannot be read as the record of a run ({error})") from None
    now = json.loads(json.dumps(asdict(run.settings)))
    differing = [
        f"{key} was {was[key]!r}, is {value!r}"
        for key, value in now.items()
        if key in was and was[key] != value and key not in ONLY_TIME
    ]
    if differing:
        raise RequestError(
            f"{plan.place(run)} was made with other settings ({'; '.join(differing)}); remove it to run anew"
        )


# -- running


def run_experiments(
    plan: Plan,
    *,
    only: Sequence[str] = (),
    gpus: int = 1,
    inexact: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Train, predict and evaluate the runs of a plan, one after the other.

    Finished runs are skipped and interrupted ones go on. A run that another process works on is left to it,
    so that the same call may be made once for each GPU. A run that fails is told, and the next one begins.

    Args:
        plan: From `write_plan` or `read_plan`.
        only: As `chosen`.
        gpus: More than 1: train with so many processes of this machine.
        inexact: As in `jobs.train.train`, for runs that go on.
        report: Called with the result of each run when it ends.
        progress: Called as `progress(done, total, run=..., step=..., **values)`.

    Returns:
        Per run: `run`, `state` (done, skipped, busy or failed), `error`, `failed_images` and, where there is
        an evaluation, `micro` and `macro` top-1 on the test part.

    Raises:
        RequestError: no run fits; the data is not named.
    """
    if gpus < 0:
        raise RequestError(f"gpus is {gpus}; it must be at least 0")
    results = []
    runs = chosen(plan.runs, only)
    for run in runs:
        plan.data(run)
    for run in runs:
        result: dict[str, Any] = {"run": run.name, "state": "done", "error": None, "failed_images": 0}
        try:
            with _alone(plan.config(run)):
                if state_of(plan, run) == "done":
                    result["state"] = "skipped"
                else:
                    result["failed_images"] = _finish(plan, run, gpus, inexact, progress)
                result |= _headline(plan.place(run))
        except BlockingIOError:
            result["state"] = "busy"
        except BioscanError as error:
            result |= {"state": "failed", "error": str(error)}
        results.append(result)
        if report:
            report(result)
    return results


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """A lock on the run file.

    Raises:
        BlockingIOError: another process has it.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(path))
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass
        yield


def _finish(plan: Plan, run: Run, gpus: int, inexact: bool, progress: Progress | None) -> int:
    """What is left of a run; gives the number of images that failed."""
    from bioscan.jobs.predict import predict

    def step(name: str) -> Progress | None:
        if progress is None:
            return None
        return lambda done, total=None, **values: progress(done, total, run=run.name, step=name, **values)

    place = plan.place(run)
    catalogue, images = plan.data(run)
    failed = 0
    state = state_of(plan, run)
    if state != "trained":
        resume = state == "started"
        failed += _train(
            plan, run, gpus, resume=resume, inexact=inexact and resume, progress=step("training")
        )
    predictions = place / PREDICTIONS
    model = json.loads((place / "model" / "model.json").read_text(encoding="utf-8"))
    if not predictions.is_file() or read_record(predictions).get("model_sha256") != model["content_sha256"]:
        made = predict(
            place,
            catalogue,
            predictions,
            images=images,
            device=run.settings.device,
            workers=run.settings.workers,
            threads=run.settings.threads,
            overwrite=True,
            progress=step("predicting"),
        )
        failed += made["failed"]
    if len(run.settings.target_ranks) > 1:
        by_rank = evaluate_ranks(predictions, catalogue)
        found: dict[str, Any] = {"ranks": {rank: scores.to_dict() for rank, scores in by_rank.items()}}
    else:
        found = evaluate(predictions, catalogue).to_dict()
    text = json.dumps({"schema_version": SCHEMA_VERSION, **_finite(found)}, indent=1, ensure_ascii=False)
    write_text(place / EVALUATION, text + "\n")
    return failed


def _train(plan: Plan, run: Run, gpus: int, *, resume: bool, inexact: bool, progress: Progress | None) -> int:
    """Train in this process, or under torchrun; gives the number of images that failed."""
    place = plan.place(run)
    catalogue, images = plan.data(run)
    if gpus < 2:
        from bioscan.jobs.train import train

        made = train(
            catalogue, images, place, run.settings, resume=resume, inexact=inexact, progress=progress
        )
        return len(made["failed"])
    command = [*torchrun(gpus), "--standalone", *train_command(plan, run)]
    command += ["--resume"] * resume + ["--inexact"] * inexact
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)  # noqa: S603
    if not (place / "model" / "model.json").is_file():  # its status says no more: 1 also if images failed
        raise RequestError(f"training under torchrun ended with status {done.returncode}; it says why above")
    with (place / "failed.csv").open(encoding="utf-8", newline="") as file:
        return sum(1 for _ in csv.DictReader(file))


def torchrun(processes: int) -> list[str]:
    """The command that starts so many processes on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={max(1, processes)}"]


def train_command(plan: Plan, run: Run) -> list[str]:
    """What `torchrun` starts to train a run."""
    catalogue, images = plan.data(run)
    paths = (plan.place(run).absolute(), plan.config(run).absolute())
    return [
        "-m",
        "bioscan",
        "train",
        str(catalogue),
        str(images),
        "-o",
        str(paths[0]),
        "--config",
        str(paths[1]),
    ]


def _headline(place: Path) -> dict[str, float]:
    """Top-1 on the test part, of several ranks the deepest."""
    found = json.loads((place / EVALUATION).read_text(encoding="utf-8"))
    top_1 = (list(found["ranks"].values())[-1] if "ranks" in found else found)["metrics"]["top_1"]
    return {average: top_1[average]["value"] for average in ("micro", "macro")}


def _finite(value: Any) -> Any:
    """For JSON: what is not a number becomes null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
