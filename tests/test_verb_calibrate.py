"""`bioscan calibrate`, and what `bioscan train` keeps for it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from bioscan.analysis.groups import cut, groups_of
from bioscan.data.predictions import read_predictions
from bioscan.jobs.train import train
from bioscan.learn import model_folder
from bioscan.learn.settings import TrainSettings

Run = Callable[..., tuple[int, str, str]]
Paint = Callable[..., tuple[Path, Path]]
TREE = {
    "Diptera/Sciaridae/Bradysia": (12, 14, 6),
    "Diptera/Sciaridae": (6, 8, 0),
    "Diptera/Syrphidae/Eristalis": (10, 12, 6),
    "Lepidoptera/Pieridae/Pieris": (10, 12, 6),
    "Odonata/Aeshnidae/Aeshna": (0, 4, 0),  # the model does not know it
}
QUICK: dict[str, Any] = {
    "model": "test_byobnet",
    "image_size": 36,
    "crop_size": 32,
    "epochs": 2,
    "batch_size": 8,
    "threads": 1,
    "workers": 0,
    "ranks": ("order", "family", "genus"),
}
SPEED = ("--workers", 0, "--threads", 1)


def trained(metadata: Path, images: Path, run: Path, **changes: Any) -> dict[str, Any]:
    return train(metadata, images, run, TrainSettings(**{**QUICK, **changes}))


@pytest.fixture(scope="module")
def whole(paint: Paint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A run that chose its epoch by all validation specimens, its metadata and its images."""
    metadata, images = paint(TREE)
    run = tmp_path_factory.mktemp("whole") / "run"
    trained(metadata, images, run, calibration_share=0.0)
    return run, metadata, images


@pytest.fixture
def bare(whole: tuple[Path, Path, Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    """That model without a calibration, in a folder that may be changed; metadata and images."""
    model = model_folder.load(whole[0])
    told = {key: value for key, value in model.info.items() if key not in ("calibration", "content_sha256")}
    model_folder.save(
        tmp_path / "model",
        model.network.state_dict(),
        backbone=str(told.pop("backbone")),
        taxonomy=model.taxonomy,
        spec=model.spec,
        record=told,
        history=[],
        target_counts=model.target_counts_N,
    )
    return tmp_path / "model", *whole[1:]


def asked(bare: tuple[Path, Path, Path], *more: object) -> tuple[object, ...]:
    return "calibrate", bare[0], bare[1], "--images", bare[2], *SPEED, *more


# -- training


def test_training_keeps_whole_groups_from_the_choice_of_the_epoch(paint: Paint, tmp_path: Path) -> None:
    metadata, images = paint(TREE)
    told = trained(metadata, images, tmp_path / "run")
    frame = pl.read_csv(metadata, separator="\t", infer_schema=False)
    valid = frame.filter(pl.col("large_insect_order") == "validation")
    groups, by = groups_of(valid)
    second = valid.filter(pl.Series(cut(groups, 0.5)))
    loaded = model_folder.load(tmp_path / "run")
    made = loaded.calibration
    assert made is not None
    assert made.records is not None
    assert by == "none"
    assert sorted(made.records["group"]) == sorted(second["sampleid"])
    strangers = pl.col("order") == "Odonata"
    first_known = (
        valid.height - second.height - valid.filter(strangers).height + second.filter(strangers).height
    )
    assert (told["validation"], told["calibration"]) == (first_known, second.height)
    assert made.info["first"]["n"] == made.info["fit"]["n"] == first_known
    assert made.records.filter(pl.col("order_true") == -1).height == second.filter(strangers).height > 0
    # the scores of the history are of the first part, and the temperature's likelihood begins there
    assert made.info["fit"]["nll_before"] == pytest.approx(told["validation_scores"]["loss"], rel=1e-4)
    assert made.cut == {"group": "none", "share": 0.5, "seed": 0}


def test_specimens_without_an_id_are_of_one_part_or_the_other(paint: Paint, tmp_path: Path) -> None:
    metadata, images = paint(TREE)
    frame = pl.read_csv(metadata, separator="\t", infer_schema=False)
    is_valid = pl.col("large_insect_order") == "validation"
    mute = pl.int_range(pl.len()).over("large_insect_order") % 2 == 0
    frame = frame.with_columns(pl.when(is_valid & mute).then(None).otherwise("sampleid").alias("sampleid"))
    frame.write_parquet(tmp_path / "catalogue.parquet")
    told = trained(tmp_path / "catalogue.parquet", images, tmp_path / "run")
    valid = frame.filter(is_valid)
    second = pl.Series(cut(groups_of(valid)[0], 0.5))
    known = valid["order"] != "Odonata"
    assert valid.filter(second)["sampleid"].has_nulls()
    assert (told["validation"], told["calibration"]) == (int((known & ~second).sum()), int(second.sum()))


def test_records_are_what_predict_says_of_those_specimens(
    paint: Paint, tmp_path: Path, run_bioscan: Run
) -> None:
    metadata, images = paint(TREE)
    trained(metadata, images, tmp_path / "run")
    table = tmp_path / "p.parquet"
    flags = ("--images", images, "-o", table, "--role", "validation", *SPEED)
    assert run_bioscan("predict", tmp_path / "run", metadata, *flags)[0] == 0
    loaded = model_folder.load(tmp_path / "run")
    assert loaded.calibration is not None
    assert loaded.calibration.records is not None
    both = loaded.calibration.records.join(
        read_predictions(table), left_on="group", right_on="sampleid", maintain_order="left"
    )
    assert both.height == loaded.calibration.records.height
    for rank in ("order", "family", "genus"):
        names = [None if node is None else loaded.taxonomy.name(node) for node in both[f"{rank}_named"]]
        assert names == both[rank].to_list()
        known = both.drop_nulls(f"{rank}_named")
        np.testing.assert_allclose(
            known[f"{rank}_probability"], known[f"{rank}_probability_right"], atol=1e-12
        )


def test_with_all_of_validation_for_the_epoch_there_is_a_temperature_only(
    whole: tuple[Path, Path, Path],
) -> None:
    made = model_folder.load(whole[0]).calibration
    assert made is not None
    assert (made.records, made.reliability, made.cut) == (None, None, None)
    assert made.info["first"]["n"] == 46


def test_a_photograph_of_the_second_part_that_is_broken_is_listed(paint: Paint, tmp_path: Path) -> None:
    metadata, images = paint(TREE)
    frame = pl.read_csv(metadata, separator="\t", infer_schema=False)
    valid = frame.filter(pl.col("large_insect_order") == "validation")
    broken = valid.filter(pl.Series(cut(groups_of(valid)[0], 0.5)))["image_file"][0]
    (images / broken).write_bytes(b"broken")
    told = trained(metadata, images, tmp_path / "run")
    assert [row["image_file"] for row in told["failed"]] == [broken]
    made = model_folder.load(tmp_path / "run").calibration
    assert made is not None
    assert made.info["second"]["n"] == told["calibration"] - 1


def test_a_column_to_group_by_that_is_not_there_is_told_before_training(paint: Paint, tmp_path: Path) -> None:
    from bioscan.errors import RequestError

    with pytest.raises(RequestError, match="no column 'trap' to group specimens by"):
        trained(*paint(TREE), tmp_path / "run", calibration_group="trap")
    assert not (tmp_path / "run").exists()


def test_without_validation_there_is_no_calibration(paint: Paint, tmp_path: Path) -> None:
    metadata, images = paint({"Diptera": (6, 0, 2), "Lepidoptera": (6, 0, 2)})
    told = trained(metadata, images, tmp_path / "run", criterion="last", ranks=("order",))
    assert (told["temperature"], told["calibration"]) == (None, 0)
    assert model_folder.load(tmp_path / "run").calibration is None


# -- the verb


def test_calibrate_says_what_it_found_and_puts_it_into_the_model(
    bare: tuple[Path, Path, Path], run_bioscan: Run
) -> None:
    before = model_folder.load(bare[0])
    status, out, err = run_bioscan(*asked(bare))
    assert status == 0
    loaded = model_folder.load(bare[0])
    made = loaded.calibration
    assert made is not None
    assert made.records is not None
    assert loaded.info["weights_sha256"] == before.info["weights_sha256"]
    first, second = made.info["first"]["n"], made.info["second"]["n"]
    assert first + second == 50
    strangers = first - made.info["fit"]["n"]
    assert strangers == 4 - made.records.filter(pl.col("order_true") == -1).height > 0
    assert f"temperature {made.temperature:.3f}, from {first} specimens, less {strangers} of taxa" in out
    assert f" from {made.info['fit']['n']} labelled specimens" in (bare[0] / "README.md").read_text("utf-8")
    assert f"kept for thresholds and sets: {second} specimens\n" in out
    order = made.info["ranks"]["order"]
    line = next(line.split() for line in out.splitlines() if line.startswith("order "))
    assert line[:3] == ["order", str(second), f"{order['nll_before']:.4f}"]
    assert out.count("family") >= 3  # asked errors
    assert "never" in out  # 20 and some records are too few for 2 %
    assert f"model: {bare[0]}" in out
    assert "these validation specimens also chose the model's epoch" in err
    # and predict takes it at its word
    predictions = bare[0].parent / "p.parquet"
    flags = ("--images", bare[2], "-o", predictions, "--max-error", 0.1, *SPEED)
    assert run_bioscan("predict", bare[0], bare[1], *flags)[0] == 0


def test_calibrate_as_json_has_the_thresholds_of_each_asked_error(
    bare: tuple[Path, Path, Path], run_bioscan: Run, tmp_path: Path
) -> None:
    status, out, err = run_bioscan(*asked(bare, "-o", tmp_path / "new", "--json"))
    told = json.loads(out)
    assert (status, err) == (0, "")
    assert [one["max_error"] for one in told["thresholds"]] == [0.02, 0.05, 0.1]
    for one in told["thresholds"]:
        assert [row["rank"] for row in one["ranks"]] == ["order", "family", "genus"]
        for row in one["ranks"]:
            assert row["reason"] or row["wrong"] + 1 <= one["max_error"] * (row["checked"] + 1)
    assert told["group"] == "none"
    assert told["warnings"]
    assert model_folder.load(bare[0]).calibration is None
    made = model_folder.load(tmp_path / "new").calibration
    assert made is not None
    assert made.temperature == told["temperature"]


def test_a_calibration_is_replaced_only_when_told(bare: tuple[Path, Path, Path], run_bioscan: Run) -> None:
    assert run_bioscan(*asked(bare, "--json"))[0] == 0
    first = model_folder.load(bare[0]).calibration
    status, _, err = run_bioscan(*asked(bare, "--tau", 1))
    assert status == 2
    assert "has a calibration; pass --overwrite to replace it, or -o for a new model folder" in err
    assert run_bioscan(*asked(bare, "--tau", 1, "--decode", "greedy", "--overwrite"))[0] == 0
    second = model_folder.load(bare[0]).calibration
    assert first is not None
    assert second is not None
    assert (first.tau, first.decode, second.tau, second.decode) == (0, "leaf", 1, "greedy")


def test_the_model_of_a_run_folder_is_calibrated_in_place(
    whole: tuple[Path, Path, Path], tmp_path: Path, run_bioscan: Run
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    assert run_bioscan(*asked((run, *whole[1:]), "--overwrite", "--per-rank"))[0] == 0
    made = model_folder.load(run).calibration
    assert made is not None
    assert made.rank_temperatures is not None
    assert (run / "record.json").is_file()


def own_records(metadata: Path, folder: Path, **columns: Any) -> Path:
    """The validation specimens as a user's own, who knows nothing of experiments."""
    frame = pl.read_csv(metadata, separator="\t", infer_schema=False)
    frame = frame.filter(pl.col("large_insect_order") == "validation").drop("large_insect_order")
    (folder / "own.tsv").write_text(frame.with_columns(**columns).write_csv(separator="\t"))
    return folder / "own.tsv"


def test_own_specimens_have_no_roles_and_any_column_groups_them(
    bare: tuple[Path, Path, Path], run_bioscan: Run, tmp_path: Path
) -> None:
    traps = pl.Series([f"trap {n % 25}" for n in range(50)])
    own = own_records(bare[1], tmp_path, trap=traps)
    status, _, err = run_bioscan(*asked((bare[0], own, bare[2])))
    assert status == 2
    assert "has no column 'large_insect_order'; pass --all-rows if the model was trained on none" in err
    status, out, err = run_bioscan(*asked((bare[0], own, bare[2]), "--all-rows", "--group", "trap"))
    assert status == 0
    assert "specimens of " in out
    assert "groups by trap" in out
    assert "chose" not in err
    made = model_folder.load(bare[0]).calibration
    assert made is not None
    assert made.records is not None
    kept = cut(traps, 0.5)
    assert made.records["group"].to_list() == traps.filter(pl.Series(kept)).to_list()
    assert (made.cut, made.info["roles"]) == (None, [])


def test_specimens_of_the_training_are_refused(bare: tuple[Path, Path, Path], run_bioscan: Run) -> None:
    for flags in (("--role", "train"), ("--all-rows",)):
        status, _, err = run_bioscan(*asked(bare, *flags))
        assert status == 2
        assert "the model was trained on 38 of these" in err
    assert model_folder.load(bare[0]).calibration is None


def test_specimens_of_another_split_with_role_train_may_have_been_trained_on(
    bare: tuple[Path, Path, Path], run_bioscan: Run, tmp_path: Path
) -> None:
    model, metadata, images = bare
    frame = pl.read_csv(metadata, separator="\t", infer_schema=False)
    part = tmp_path / "part.tsv"  # another hash, as rows are missing
    frame.filter(pl.col("large_insect_order") != "test").write_csv(part, separator="\t")
    status, _, err = run_bioscan(*asked((model, part, images), "--role", "train", "-o", tmp_path / "new"))
    assert status == 0
    assert "38 of these specimens have role train" in " ".join(err.split())


def test_test_specimens_test_nothing_any_more(
    bare: tuple[Path, Path, Path], run_bioscan: Run, tmp_path: Path
) -> None:
    status, _, err = run_bioscan(*asked(bare, "--role", "test", "-o", tmp_path / "new"))
    assert status == 0
    assert "scores of predictions on them test nothing any more" in err


def test_photographs_that_are_broken_or_absent_are_listed(
    bare: tuple[Path, Path, Path], run_bioscan: Run, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(bare[2], images, ignore=shutil.ignore_patterns(".*", "*.parquet"))
    (images / "Bradysia-validation-0.jpg").write_bytes(b"broken")
    (images / "Bradysia-validation-1.jpg").unlink()
    failures = tmp_path / "failures.csv"
    status, out, err = run_bioscan(*asked((*bare[:2], images), "--failures", failures))
    assert status == 1
    assert "2 of 50 images failed" in err
    listed = pl.read_csv(failures)
    assert sorted(listed["name"]) == ["Bradysia-validation-0.jpg", "Bradysia-validation-1.jpg"]
    assert "temperature " in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--share", 1), "share is 1; it must be from 0 to 0.9"),
        (("--group", "trp"), "no column 'trp' to group specimens by"),
        (("--tau", "nan"), "tau is nan"),
        (("--batch-size", 0), "batch_size is 0"),
        (("--role", "valid"), "unknown role 'valid'"),
    ],
)
def test_a_wrong_request_is_one_message_and_changes_nothing(
    bare: tuple[Path, Path, Path], run_bioscan: Run, flags: tuple[object, ...], message: str
) -> None:
    status, out, err = run_bioscan(*asked(bare, *flags))
    assert (status, out) == (2, "")
    assert message in err
    assert model_folder.load(bare[0]).calibration is None
