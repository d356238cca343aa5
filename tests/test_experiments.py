"""The paper's 72 runs: the plan and its run files, running, resuming, failing, and SLURM with a false
cluster.
"""

import dataclasses
import itertools
import json
import os
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan.config import layered
from bioscan.data.predictions import read_record
from bioscan.errors import RequestError
from bioscan.files import locked
from bioscan.jobs.experiments import (
    Plan,
    Run,
    chosen,
    plan_runs,
    read_plan,
    run_experiments,
    state_of,
    toml_of,
    write_plan,
)
from bioscan.jobs.slurm import Slurm, slurm_script, submit
from bioscan.learn.settings import TrainSettings

Paint = Callable[..., tuple[Path, Path]]
Bioscan = Callable[..., tuple[int, str, str]]

THREE = {"Diptera": (8, 3, 2), "Coleoptera": (6, 3, 2), "Lepidoptera": (4, 2, 2)}
QUICK = (
    *("model=test_byobnet", "weights=none", "epochs=2", "batch_size=8", "image_size=36", "crop_size=32"),
    *("threads=1", "workers=0", "device=cpu"),
)
S1, S2, S3 = (f"large_insect_order_test_byobnet_cross_entropy_s{seed}" for seed in (1, 2, 3))


# -- the plan


def test_the_paper_has_72_runs_of_two_tasks_three_sizes_two_backbones_two_losses_and_three_seeds() -> None:
    runs = plan_runs("paper")
    made = [(r.settings.experiment, r.settings.model, r.settings.loss, r.settings.seed) for r in runs]
    wanted = itertools.product(
        [
            f"{size}_{task}"
            for size in ("small", "medium", "large")
            for task in ("insect_order", "diptera_family")
        ],
        ["resnet50.tv_in1k", "vit_base_patch16_224.augreg_in21k_ft_in1k"],
        ["cross_entropy", "focal"],
        [1, 2, 3],
    )
    assert made == list(wanted)
    assert len({run.name for run in runs}) == 72
    assert runs[71].name == "large_diptera_family_vit_base_patch16_224_focal_s3"


def test_every_run_has_the_hyper_parameters_of_the_papers_program() -> None:
    wanted = {  # its defaults: main.py of zahrag/BIOSCAN-1M
        **{"epochs": 100, "steps": (20, 25), "weight_decay": 1e-4, "momentum": 0.9, "lr": 1e-3},
        **{"batch_size": 32, "image_size": 256, "crop_size": 224, "focal_gamma": 2.0, "weights": "hub"},
        **{"optimizer": "sgd", "normalise": False, "flip": "horizontal", "rotate": False, "colour": 0.0},
        **{"criterion": "micro_top_1", "amp": "off", "mixup": 0.0, "ema": 0.0, "sampler": "uniform"},
    }
    for run in plan_runs("paper"):
        assert {key: getattr(run.settings, key) for key in wanted} == wanted


def test_the_side_comparison_is_resnet_cross_entropy_and_small_order_on_uncropped_images() -> None:
    runs = plan_runs("paper", original=True)
    assert len(runs) == 75
    names = [f"small_insect_order_resnet50_cross_entropy_original_s{seed}" for seed in (1, 2, 3)]
    assert [run.name for run in runs if run.original] == names
    by_name = {run.name: run for run in runs}
    for name in names:
        assert by_name[name].settings == by_name[name.replace("_original", "")].settings


def test_an_override_counts_for_the_runs_that_its_pattern_fits_and_the_later_wins() -> None:
    runs = plan_runs(overrides=("epochs=3", "*vit*_s2:epochs=4", "*vit*:weights=none", "*:steps=[1, 2]"))
    for run in runs:
        vit = "vit" in run.name
        assert run.settings.epochs == (4 if vit and run.settings.seed == 2 else 3)
        assert run.settings.weights == ("none" if vit else "hub")
        assert run.settings.steps == (1, 2)


def test_runs_that_an_override_makes_equal_are_one() -> None:
    assert len(plan_runs(overrides=("model=resnet18",))) == 36
    assert len(plan_runs(overrides=("model=resnet18", "loss=focal", "seed=7"))) == 6


def test_weights_that_lie_here_are_named_so_that_they_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vit.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    runs = plan_runs(overrides=("*vit*:weights=vit.safetensors",))
    assert {run.settings.weights for run in runs} == {"hub", str(tmp_path / "vit.safetensors")}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["epoch=1"], "unknown setting in flags: 'epoch'; did you mean 'epochs'?"),
        (["epochs=one"], "'epochs' is 'one', expected int"),
        (["epochs"], "'epochs' is no setting=value, such as epochs=1"),
        (["*vgg*:epochs=1"], r"no run of the plan fits the pattern"),
        (["loss=focl"], "did you mean 'focal'?"),
        (
            ["*resnet*:model=a.b", "*vit*:model=a.c"],
            "two different runs would be called small_insect_order_a",
        ),
    ],
)
def test_a_wrong_override_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        plan_runs(overrides=overrides)
    assert message in str(caught.value)


def test_an_unknown_plan_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown plan 'papr'; did you mean 'paper'"):
        plan_runs("papr")


# -- run files


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        TrainSettings,
        experiment=TEXT,
        model=TEXT,
        within=st.none() | TEXT,
        lr=st.floats(1e-300, 1e300),
        clip_norm=st.none() | st.floats(1e-300, 1e300) | st.just(float("inf")),
        steps=st.lists(st.integers(0, 99), max_size=3).map(tuple),
        ranks=st.sampled_from([(), ("order",), ("family", "order")]),
        flip=st.sampled_from(["none", "both"]),
        normalise=st.booleans(),
        patience=st.none() | st.integers(0, 9),
        seed=st.integers(0, 2**40),
    )
)
def test_a_run_file_gives_back_the_settings_that_it_was_made_of(wanted: TrainSettings) -> None:
    text = toml_of(wanted)
    table = tomllib.loads(text)["train"]
    assert layered(TrainSettings, flags=table) == wanted


def test_a_run_file_is_what_train_takes(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan", overrides=("epochs=7",))
    for run in plan.runs:
        assert layered(TrainSettings, file=plan.config(run), table="train") == run.settings


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_planning_again_changes_no_file_and_remembers_the_overrides(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan", overrides=("epochs=7",))
    before = contents(plan.folder)
    assert len(before) == 72 + 2
    assert write_plan(plan.folder) == plan == write_plan(plan.folder, overrides=("epochs=7",))
    assert read_plan(plan.folder) == plan
    assert contents(plan.folder) == before


def test_other_overrides_need_overwrite_which_writes_the_run_files_anew(tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    write_plan(folder, overrides=("epochs=7",))
    with pytest.raises(RequestError, match=r"a plan with other settings \(--set epochs=7\).*--overwrite"):
        write_plan(folder, overrides=("model=resnet18",))
    plan = write_plan(folder, overrides=("model=resnet18",), overwrite=True)
    assert {*folder.glob("configs/*")} == {plan.config(run) for run in plan.runs}
    assert len(plan.runs) == 36


def test_a_run_file_changed_by_hand_counts_as_it_stands(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan")
    first = plan.config(plan.runs[0])
    first.write_text(first.read_text().replace("[train]", "[train]\nlr = 0.5"))
    again = write_plan(plan.folder)
    assert again.runs[0].settings == dataclasses.replace(plan.runs[0].settings, lr=0.5)
    assert again.runs[1:] == plan.runs[1:]


def test_data_and_uncropped_images_can_be_named_later(tmp_path: Path) -> None:
    for name in ("c.parquet", "cropped.zip", "original.zip"):
        (tmp_path / name).touch()
    plan = write_plan(tmp_path / "plan")
    with pytest.raises(RequestError, match="the runs need --catalogue and --images"):
        plan.data(plan.runs[0])
    catalogue, images = tmp_path / "c.parquet", tmp_path / "cropped.zip"
    plan = write_plan(plan.folder, catalogue=catalogue, images=images)
    assert plan.data(plan.runs[0]) == (catalogue, images)
    more = write_plan(plan.folder, original=tmp_path / "original.zip")
    assert [more.data(run)[1].name for run in more.runs].count("original.zip") == 3
    assert more.runs[:72] == plan.runs


def test_packages_of_one_name_are_refused_because_compare_could_not_tell_them_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "images").mkdir(parents=True)
    with pytest.raises(RequestError, match="both called images"):
        write_plan(tmp_path / "plan", images=tmp_path / "a/images", original=tmp_path / "b/images")


def test_a_folder_of_something_else_is_no_plan_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RequestError, match="exists and is no plan"):
        write_plan(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_plan_killed_before_its_last_file_is_written_again(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan")
    (plan.folder / "plan.json").unlink()
    assert write_plan(plan.folder) == plan


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ([], ["a_x_s1", "a_x_s10", "b_y_s1"]),
        (["a_x_s1"], ["a_x_s1"]),
        (["x"], ["a_x_s1", "a_x_s10"]),
        (["*_s1"], ["a_x_s1", "b_y_s1"]),
        (["b", "*s10"], ["a_x_s10", "b_y_s1"]),
    ],
)
def test_runs_are_chosen_by_name_pattern_or_part_of_a_name(only: list[str], names: list[str]) -> None:
    runs = [Run(name, TrainSettings()) for name in ("a_x_s1", "a_x_s10", "b_y_s1")]
    assert [run.name for run in chosen(runs, only)] == names
    with pytest.raises(RequestError, match="no run is called 'c'; their names are like a_x_s1"):
        chosen(runs, [*only, "c"])


# -- the command


def test_without_an_output_the_plan_is_only_shown(run_bioscan: Bioscan, tmp_path: Path) -> None:
    status, out, err = run_bioscan("experiments", "--only", "medium_*_s3")
    assert (status, err) == (0, "")
    assert "8 runs: 8 planned\nnothing is written; --output FOLDER writes the run files\n" in out
    status, out, _ = run_bioscan("experiments", "paper", "--json")
    assert len(json.loads(out)["runs"]) == 72


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run"], "--run and --submit need --output"),
        (["--run", "--submit", "slurm", "-o", "x"], "choose one"),
        (["-o", "x", "--run"], "the runs need --catalogue and --images"),
        (["-o", "x", "--catalogue", "none.parquet"], "none.parquet does not exist"),
        (["-o", "x", "--only", "vgg"], "no run is called 'vgg'"),
        (["-o", "x", "--only", ""], "no run is called ''"),
        (["-o", "x", "--only"], "--only"),
        (["--set", "epoch=1"], "did you mean 'epochs'?"),
    ],
)
def test_a_wrong_request_is_one_message_and_exit_2(
    run_bioscan: Bioscan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run_bioscan("experiments", "paper", *flags)
    assert (status, out) == (2, "")
    assert err.startswith("bioscan experiments: ")
    assert message in err


def test_planning_and_comparing_do_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom bioscan.app.cli import run\n"
        "assert run(['experiments', 'paper', '-o', sys.argv[1]]) == 0\n"
        "assert run(['compare', sys.argv[1]]) == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "plan")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no evaluation in" in done.stderr
    assert "unfinished runs: 72" in done.stderr


# -- running


@pytest.fixture
def plan(paint: Paint, tmp_path: Path) -> Plan:
    """A plan of quick runs, of which those of large_insect_order can be run."""
    metadata, images = paint(THREE)
    return write_plan(tmp_path / "plan", catalogue=metadata, images=images, overrides=QUICK)


def fingerprint(plan: Plan, name: str) -> str:
    model = plan.folder / "runs" / name / "model/model.json"
    return str(json.loads(model.read_text(encoding="utf-8"))["content_sha256"])


def test_runs_are_trained_predicted_evaluated_and_skipped_the_next_time(
    plan: Plan, run_bioscan: Bioscan
) -> None:
    arguments = ("experiments", "-o", plan.folder, "--run", "--only", S1, S2)
    status, out, err = run_bioscan(*arguments)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.split(";")[0] for line in lines[:2]] == [f"{S1}: done", f"{S2}: done"]
    assert lines[2] == f"2 runs: 2 done; bioscan compare {plan.folder} gathers the results"
    made = json.loads((plan.folder / "runs" / S1 / "evaluation.json").read_text(encoding="utf-8"))
    assert (made["n"], made["experiment"], made["role"]) == (6, "large_insect_order", "test")
    settings = json.loads((plan.folder / "runs" / S2 / "record.json").read_text())["settings"]
    assert (settings["seed"], settings["epochs"], settings["optimizer"]) == (2, 2, "sgd")
    before = contents(plan.folder)
    status, out, _ = run_bioscan(*arguments)
    assert [line.split(";")[0] for line in out.splitlines()[:2]] == [f"{S1}: skipped", f"{S2}: skipped"]
    assert contents(plan.folder) == before
    (plan.folder / "runs" / S1 / "evaluation.json").unlink()
    assert run_bioscan(*arguments)[0] == 0
    assert {path: kept[0] for path, kept in contents(plan.folder).items()} == {
        path: kept[0] for path, kept in before.items()
    }
    status, out, _ = run_bioscan("compare", plan.folder)
    assert status == 0
    assert "unfinished runs: 34 (first: small_insect_order_test_byobnet_cross_entropy_s1)" in out


def test_an_interrupted_run_goes_on_and_ends_with_the_model_of_one_that_was_not(plan: Plan) -> None:
    def interrupt(done: int, total: int | None = None, **values: Any) -> None:
        if values["step"] == "training" and done > 18:  # in the second epoch of 18 specimens
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiments(plan, only=[S1], progress=interrupt)
    (run,) = chosen(plan.runs, [S1])
    assert state_of(plan, run) == "started"
    assert (plan.place(run) / "checkpoint.pt").exists()
    assert run_experiments(plan, only=[S1])[0]["state"] == "done"
    interrupted = fingerprint(plan, S1)
    other = write_plan(
        plan.folder.with_name("other"), catalogue=plan.catalogue, images=plan.images, overrides=QUICK
    )
    assert run_experiments(other, only=[S1])[0]["state"] == "done"
    assert fingerprint(other, S1) == interrupted


def test_a_run_goes_on_with_other_threads_where_that_is_allowed(paint: Paint, tmp_path: Path) -> None:
    import torch

    def interrupt(done: int, total: int | None = None, **values: Any) -> None:
        if values["step"] == "training" and done > 18:
            raise KeyboardInterrupt

    metadata, images = paint(THREE)
    overrides = [text for text in QUICK if text != "threads=1"]
    plan = write_plan(tmp_path / "plan", catalogue=metadata, images=images, overrides=overrides)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with pytest.raises(KeyboardInterrupt):
            run_experiments(plan, only=[S1], progress=interrupt)
        torch.set_num_threads(2)
        (result,) = run_experiments(plan, only=[S1])
        assert result["state"] == "failed"
        assert "--inexact" in result["error"]
        (result,) = run_experiments(plan, only=[S1], inexact=True)
        assert result["state"] == "done"
    finally:
        torch.set_num_threads(threads)


def test_predictions_of_another_model_are_made_anew(plan: Plan) -> None:
    run_experiments(plan, only=[S1, S2])
    (run,) = chosen(plan.runs, [S1])
    for name in ("predictions.parquet", "predictions.scores.parquet"):
        (plan.place(run) / name).write_bytes((plan.folder / "runs" / S2 / name).read_bytes())
    (plan.place(run) / "evaluation.json").unlink()
    run_experiments(plan, only=[S1])
    made_by = read_record(plan.place(run) / "predictions.parquet")["model_sha256"]
    assert made_by == fingerprint(plan, S1) != fingerprint(plan, S2)


def test_a_run_that_fails_is_told_and_the_next_one_begins(plan: Plan, run_bioscan: Bioscan) -> None:
    (run,) = chosen(plan.runs, [S1])
    config = plan.config(run)
    config.write_text(config.read_text().replace('"test_byobnet"', '"test_byobnt"'))
    status, out, err = run_bioscan("experiments", "-o", plan.folder, "--run", "--only", S1, S2)
    assert (status, err) == (1, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"{S1}: failed; unknown model 'test_byobnt'")
    assert lines[1].startswith(f"{S2}: done; ")
    assert lines[2].startswith("2 runs: 1 failed, 1 done; ")


def test_a_run_that_another_process_works_on_is_left_to_it(plan: Plan) -> None:
    (run,) = chosen(plan.runs, [S1])
    with locked(plan.config(run)):
        (result,) = run_experiments(plan, only=[S1])
    assert result["state"] == "busy"
    assert not plan.place(run).exists()


def test_a_run_folder_with_other_settings_is_not_taken_for_the_run(plan: Plan) -> None:
    (run,) = chosen(plan.runs, [S1])
    plan.place(run).mkdir(parents=True)
    record = {"settings": {**dataclasses.asdict(run.settings), "lr": 0.5, "threads": 64}}
    (plan.place(run) / "record.json").write_text(json.dumps(record))
    (plan.place(run) / "evaluation.json").write_text("{}")
    (result,) = run_experiments(plan, only=[S1])
    assert result["state"] == "failed"
    assert "was made with other settings (lr was 0.5, is 0.001); remove it to run anew" in result["error"]


def test_images_that_fail_are_counted_and_the_exit_status_is_1(plan: Plan, run_bioscan: Bioscan) -> None:
    assert plan.images is not None
    for role in ("train", "test"):
        (plan.images / f"Diptera-{role}-1.jpg").unlink()
    status, out, err = run_bioscan("experiments", "-o", plan.folder, "--run", "--only", S1, "--json")
    (result,) = json.loads(out)["runs"]
    assert (status, err) == (1, "")
    assert (result["state"], result["failed_images"]) == ("done", 2)


def test_uncropped_runs_read_the_other_package(plan: Plan, run_bioscan: Bioscan, tmp_path: Path) -> None:
    assert plan.catalogue is not None
    assert plan.images is not None
    renamed = tmp_path / "small.tsv"
    text = plan.catalogue.read_text(encoding="utf-8")
    renamed.write_text(text.replace("large_insect_order", "small_insect_order"), encoding="utf-8")
    (tmp_path / "uncropped").symlink_to(plan.images)
    again = write_plan(plan.folder, catalogue=renamed, original=tmp_path / "uncropped")
    wanted = "small_insect_order_test_byobnet_cross_entropy_original_s1"
    results = run_experiments(again, only=["small_insect_order_*cross_entropy*s1"])
    assert [r["state"] for r in results] == ["done", "done"]
    record = json.loads((again.folder / "runs" / wanted / "record.json").read_text(encoding="utf-8"))
    assert record["images"] == "uncropped"
    status, out, _ = run_bioscan("compare", plan.folder, "--json")
    assert status == 0
    assert {run["images"] for run in json.loads(out)["runs"]} == {plan.images.name, "uncropped"}


# -- SLURM


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in PATH with programs that look like SLURM's: jobs get the numbers 101, 102 …"""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(
        folder,
        "sbatch",
        f'[ "$1" = --parsable ] || exit 9; echo "$2" >> {folder}/scripts\n'
        f'echo "$((100 + $(wc -l < {folder}/scripts)));cluster"',
    )
    program(folder, "squeue", f"cat {folder}/queue")
    (folder / "queue").touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_without_sbatch_the_scripts_are_written(
    plan: Plan, run_bioscan: Bioscan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    status, out, err = run_bioscan("experiments", "-o", plan.folder, "--submit", "slurm", "--only", S1, S2)
    assert status == 0
    assert out == f"{S1}: written\n{S2}: written\n2 runs: 2 written\n"
    assert err == f"sbatch is not here: submit the scripts in {plan.folder / 'slurm'} where it is\n"
    assert sorted(p.name for p in plan.folder.glob("slurm/*")) == [f"{S1}.sh", f"{S2}.sh"]


def test_a_script_asks_for_what_was_asked_and_is_sound_shell(plan: Plan) -> None:
    (run,) = chosen(plan.runs, [S1])
    wanted = Slurm(nodes=2, gpus=4, cpus=6, time="3:00:00", sbatch=("account=abc",), setup=("module load x",))
    text = slurm_script(plan, run, wanted)
    lines = text.splitlines()
    assert [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")] == [
        f"job-name={S1}",
        f"output={plan.folder}/slurm/{S1}-%j.log",
        "nodes=2",
        "ntasks-per-node=1",
        "cpus-per-task=24",
        "gpus-per-node=4",
        "time=3:00:00",
        "requeue",
        "account=abc",
    ]
    assert "module load x" in lines
    assert "--nproc-per-node=4 --nnodes=2 --rdzv-backend=c10d" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert "gpus-per-node" not in slurm_script(plan, run, Slurm(gpus=0))
    assert 'resume="--resume"; fi' in text
    assert 'resume="--resume --inexact"; fi' in slurm_script(plan, run, wanted, inexact=True)


@pytest.mark.parametrize("options", [{"nodes": 0}, {"gpus": -1}, {"sbatch": ("--account=abc",)}])
def test_what_no_cluster_can_give_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Slurm(**options)


def test_runs_are_submitted_once_while_their_job_is_in_the_queue(plan: Plan, cluster: Path) -> None:
    made = submit(plan, only=[S1, S2])
    assert [(r["state"], r["job"]) for r in made] == [("submitted", "101"), ("submitted", "102")]
    assert (cluster / "scripts").read_text().split() == [str(plan.folder / f"slurm/{s}.sh") for s in (S1, S2)]
    (cluster / "queue").write_text("7\n102\n")
    (run,) = chosen(plan.runs, [S3])
    plan.place(run).mkdir(parents=True)
    (plan.place(run) / "evaluation.json").write_text("{}")
    made = submit(plan, only=[S1, S2, S3])
    assert [(r["state"], r["job"]) for r in made] == [("submitted", "103"), ("queued", "102"), ("done", None)]


def test_what_sbatch_says_when_it_refuses_is_told(plan: Plan, cluster: Path, run_bioscan: Bioscan) -> None:
    program(cluster, "sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1")
    status, _, err = run_bioscan("experiments", "-o", plan.folder, "--submit", "slurm", "--only", S1)
    assert status == 2
    assert err.endswith(f"{S1}.sh: sbatch: error: Invalid account\n")


def test_a_queue_that_does_not_answer_stops_the_second_submission(plan: Plan, cluster: Path) -> None:
    submit(plan, only=[S1])
    program(cluster, "squeue", "echo 'slurm_load_jobs error: timed out' >&2; exit 1")
    with pytest.raises(RequestError, match="squeue does not tell what was submitted already: slurm_load"):
        submit(plan, only=[S1])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("gpus", [0, 2])
def test_a_job_script_trains_under_torchrun_predicts_and_evaluates(
    plan: Plan, cluster: Path, gpus: int
) -> None:
    program(cluster, "srun", 'shift; exec "$@"')
    program(cluster, "scontrol", "echo localhost")
    submit(plan, only=[S1], slurm=Slurm(gpus=gpus))
    environment = {**os.environ, "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost"}
    script = ["bash", str(plan.folder / f"slurm/{S1}.sh")]
    for state in ("done", "skipped"):
        done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"{S1}: {state}; micro" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_several_processes_of_this_machine_train_one_run(plan: Plan) -> None:
    (result,) = run_experiments(plan, only=[S1], gpus=2)
    assert (result["state"], result["error"]) == ("done", None)
    bad = dataclasses.replace(plan, images=plan.folder)
    (result,) = run_experiments(bad, only=[S2], gpus=2)
    assert result["state"] == "failed"
    assert "training under torchrun ended with status" in result["error"]
