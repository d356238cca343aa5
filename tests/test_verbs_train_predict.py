"""`bioscan train` and `bioscan predict` as a user meets them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from bioscan.data.predictions import read_predictions
from bioscan.learn import model_folder
from bioscan.learn.calibration import Calibration

Paint = Callable[..., tuple[Path, Path]]
RunBioscan = Callable[..., tuple[int, str, str]]

THREE = {"Diptera": (10, 4, 2), "Coleoptera": (7, 3, 2), "Lepidoptera": (4, 2, 2)}
SMALL = {
    "--model": "test_byobnet",
    "--image-size": "36",
    "--crop-size": "32",
    "--threads": "1",
    "--epochs": "2",
    "--batch-size": "8",
}


def small(*flags: object) -> list[object]:
    """The flags of a quick run, the given ones in their place."""
    return [*(a for pair in SMALL.items() if pair[0] not in flags for a in pair), *flags]


@pytest.fixture
def trained(paint: Paint, run_bioscan: RunBioscan, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Metadata, pictures, and a run on them."""
    metadata, images = paint(THREE)
    status, _, err = run_bioscan("train", metadata, images, "-o", tmp_path / "run", *small())
    assert (status, err) == (0, "")
    return metadata, images, tmp_path / "run"


def test_train_says_what_it_learned_and_where_the_model_is(
    paint: Paint, run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    metadata, images = paint({**THREE, "not_classified": (2, 0, 0)})
    status, out, err = run_bioscan("train", metadata, images, "-o", tmp_path / "run", *small())
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "test_byobnet, 3 taxa at rank order: 21 training, 9 validation specimens"
    assert lines[1] == "left out: 2 with no name at rank order"
    assert lines[2].startswith("kept epoch ")
    assert [line.split(":")[0] for line in lines[3:6]] == [
        "validation loss",
        "validation micro_top_1",
        "validation macro_top_1",
    ]
    assert re.fullmatch(r"temperature \d+\.\d{3} \(bioscan predict applies it\)", lines[6])
    assert lines[7] == f"model: {tmp_path / 'run' / 'model'}"


def test_train_as_json(paint: Paint, run_bioscan: RunBioscan, tmp_path: Path) -> None:
    status, out, _ = run_bioscan("train", *paint(THREE), "-o", tmp_path / "run", *small("--json"))
    made = json.loads(out)
    assert status == 0
    assert made["schema_version"] == 1
    assert (made["classes"], made["training"], made["epochs"]) == (3, 21, 2)
    assert len(made["history"]) == 2


def test_train_lists_images_that_cannot_be_read_and_exits_1(
    paint: Paint, run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    metadata, images = paint(THREE)
    (images / "Diptera-train-2.jpg").write_bytes(b"")
    status, out, err = run_bioscan("train", metadata, images, "-o", tmp_path / "run", *small())
    assert status == 1
    assert "model: " in out
    assert err == (
        "1 images could not be read (first: Diptera-train-2.jpg: empty file (insects/Diptera-train-2.jpg)); "
        f"see {tmp_path / 'run' / 'failed.csv'}\n"
    )


def test_settings_are_layered_recipe_file_flags(
    paint: Paint, run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    config = tmp_path / "run.toml"
    config.write_text('[train]\nlr = 0.02\nmomentum = 0.5\nweights = "hub"\n')
    status, _, err = run_bioscan(
        *("train", *paint(THREE), "-o", tmp_path / "run", *small("--recipe", "paper")),
        *("--config", config, "--lr", 0.03, "--weights", "none", "--steps", 1, 2),
    )
    assert (status, err) == (0, "")
    made = json.loads((tmp_path / "run/record.json").read_text())["settings"]
    wanted = {
        "lr": 0.03,  # flag over file
        "weights": "none",  # flag over file and recipe
        "momentum": 0.5,  # file over recipe
        "optimizer": "sgd",  # recipe over default
        "model": "test_byobnet",
        "steps": [1, 2],
        "focal_gamma": 2.0,  # default
    }
    assert {name: made[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "papr"], "unknown recipe 'papr'; did you mean 'paper'"),
        (["--model", "resnt18"], "unknown model 'resnt18'; did you mean 'resnet18'"),
        (["--rank", "famly"], "unknown rank 'famly'; did you mean 'family'"),
        (["--experiment", "large_insect_ordr"], "did you mean 'large_insect_order'"),
        (["--lr", "fast"], 'Invalid value for --lr: unable to convert "fast" into float'),
        (["--optimizer", "adam"], '"adam"'),
        (["--epoch", "3"], "--epoch"),
        (["--resume"], "holds no run to resume"),
        (["--config", "nowhere.toml"], "nowhere.toml: no such settings file"),
    ],
)
def test_a_wrong_request_is_one_message_and_exit_2(
    paint: Paint, run_bioscan: RunBioscan, tmp_path: Path, flags: list[str], message: str
) -> None:
    status, out, err = run_bioscan("train", *paint(THREE), "-o", tmp_path / "run", *small(*flags))
    assert (status, out) == (2, "")
    assert err.startswith("bioscan train: ")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_second_run_in_the_same_folder_needs_overwrite(
    trained: tuple[Path, Path, Path], run_bioscan: RunBioscan
) -> None:
    metadata, images, run = trained
    status, _, err = run_bioscan("train", metadata, images, "-o", run, *small())
    assert status == 2
    assert "holds a finished run; choose another --output or pass --overwrite" in err
    assert run_bioscan("train", metadata, images, "-o", run, *small("--overwrite"))[0] == 0


def test_predict_then_evaluate(
    trained: tuple[Path, Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    metadata, images, run = trained
    table = tmp_path / "p.parquet"
    status, out, err = run_bioscan("predict", run, metadata, "--images", images, "-o", table)
    assert (status, err) == (0, "")
    assert out == f"15 of 15 specimens named\npredictions: {table}\n"
    status, out, _ = run_bioscan("evaluate", table, metadata, "--json")
    assert status == 0
    assert json.loads(out)["n"] == 6


FAMILIES = {
    "Diptera/Sciaridae": (8, 3, 3),
    "Diptera/Syrphidae": (4, 2, 2),
    "Diptera": (4, 1, 2),  # known to the order alone
    "Lepidoptera/Pieridae": (6, 2, 2),
}


@pytest.mark.parametrize("softmax", ["flat", "conditional"])
def test_one_model_of_two_ranks_trains_names_and_is_scored_at_each(
    paint: Paint, run_bioscan: RunBioscan, tmp_path: Path, softmax: str
) -> None:
    metadata, images = paint(FAMILIES)
    run, table = tmp_path / "run", tmp_path / "p.parquet"
    flags = small("--ranks", "order,family", "--softmax", softmax)
    status, out, _ = run_bioscan("train", metadata, images, "-o", run, *flags)
    assert status == 0
    assert out.startswith(
        "test_byobnet, 3 taxa at ranks order, family: 22 training, 8 validation specimens\n"
    )
    assert "| order | 2 | 22 | 4 |" in (run / "model/README.md").read_text()
    asked = ("predict", run, metadata, "--images", images, "-o", table, "--decode", "greedy", "--tau", 1)
    status, out, err = run_bioscan(*asked, "--no-calibration")
    assert (status, err) == (0, "")
    assert out.startswith("17 of 17 specimens named\n")
    made = read_predictions(table)
    both = set(made.select("order", "family").unique().rows())
    assert both <= {("Diptera", "Sciaridae"), ("Diptera", "Syrphidae"), ("Lepidoptera", "Pieridae")}
    status, out, _ = run_bioscan("evaluate", table, metadata, "--rank", "all", "--json")
    scores = json.loads(out)["ranks"]
    assert status == 0
    assert {rank: scores[rank]["n"] for rank in scores} == {"order": 9, "family": 7}


def test_tau_on_top_of_a_fair_training_is_said(paint: Paint, run_bioscan: RunBioscan, tmp_path: Path) -> None:
    metadata, images = paint(THREE)
    flags = small("--loss", "logit_adjusted", "--epochs", 1)
    assert run_bioscan("train", metadata, images, "-o", tmp_path / "run", *flags)[0] == 0
    asked = ("predict", tmp_path / "run", metadata, "--images", images)
    assert run_bioscan(*asked, "-o", tmp_path / "p.csv")[2] == ""
    status, _, err = run_bioscan(*asked, "-o", tmp_path / "q.csv", "--tau", "-1", "--no-calibration")
    assert status == 0
    assert err == (
        "the model was made fair to rare taxa in training (loss logit_adjusted): --tau -1 is on top of that\n"
    )


def with_records(run: Path, wrong: int) -> Path:
    """The run's model, calibrated by 40 specimens of which so many got a wrong name, the surest of all."""
    taxonomy = model_folder.load(run).taxonomy
    rank, node = taxonomy.ranks[-1], int(taxonomy.leaves_L[0])
    records = pl.DataFrame(
        {
            f"{rank}_true": [-1] * wrong + [node] * (40 - wrong),
            f"{rank}_named": [node] * 40,
            f"{rank}_probability": [0.9] * wrong + [0.1] * (40 - wrong),
            f"{rank}_truth_probability": [0.0] * wrong + [0.1] * (40 - wrong),
            f"{rank}_before": [0.0] * 40,
            f"{rank}_place": [9] * wrong + [0] * (40 - wrong),
        }
    )
    reliability = pl.DataFrame(
        {
            "taxon": [node],
            "training": 10,
            "checked": 40,
            "precision": 0.95,
            "recall": 1.0,
            "confusions": "B 5 %",
        }
    )
    info = {"fit": {"n": 40}, "second": {"n": 40}, "ranks": {}, "warnings": []}
    made = Calibration(1.5, None, 0.0, "leaf", info, records, reliability)
    model_folder.recalibrated(run, run.parent / f"wrong{wrong}", made)
    return run.parent / f"wrong{wrong}"


PROMISE = (
    "promises are for specimens like those of the calibration: collected, photographed and named in the same "
    "way; and specimens that somebody could name are no random sample of all\n"
)


def test_predict_says_which_promise_holds(
    trained: tuple[Path, Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    metadata, images, run = trained
    model = with_records(run, 2)  # of 40 records 0.1 * 41 - 1 = 3 may be wrong: every name is given
    asked = ("predict", model, metadata, "--images", images, "--role", "test")
    status, out, err = run_bioscan(*asked, "--max-error", 0.1, "-o", tmp_path / "p.parquet")
    assert status == 0
    assert out.splitlines() == [
        "6 of 6 specimens named",
        "assigned: order 6; no name is sure enough: 0",
        "order: named 100 % of 40 checked specimens; wrong among all 5 % (promised: at most 10 %), "
        "among the named 5 % (1.4–16.5 %)",
        f"predictions: {tmp_path / 'p.parquet'}",
    ]
    status, out, _ = run_bioscan(
        *asked, "--max-error", 0.1, "--promise", "answer", "-o", tmp_path / "a.parquet"
    )
    assert status == 0
    assert out.splitlines()[2:4] == [
        "order: named 100 % of 40 checked specimens; wrong among all 5 % (not promised), "
        "among the named 5 % (1.4–16.5 %)",
        "whole answers: named 100 % of 40 checked specimens; wrong among all 5 % (promised: at most 10 %), "
        "among the named 5 % (1.4–16.5 %)",
    ]
    assert err == PROMISE
    made = read_predictions(tmp_path / "p.parquet")
    first = made.filter(pl.col("assigned_training") == 10)
    assert first["assigned_confusions"].unique().to_list() in ([], ["B 5 %"])
    model = with_records(run, 20)  # too many are wrong, at 0.9: above that 0 of 40 are named
    asked = ("predict", model, metadata, "--images", images, "--role", "test")
    status, out, _ = run_bioscan(*asked, "--max-error", 0.1, "-o", tmp_path / "q.parquet")
    assert out.splitlines()[2] == (
        "order: named 0 % of 40 checked specimens; wrong among all 0 % (promised: at most 10 %), "
        "none is named"
    )
    status, out, _ = run_bioscan(*asked, "--max-error", 0.01, "-o", tmp_path / "r.parquet")
    assert out.splitlines()[1:3] == [
        "assigned: none; no name is sure enough: 6",
        "order: not named: 40 records can be checked; an error of 0.01 takes 99 or more",
    ]
    status, out, _ = run_bioscan(*asked, "--max-error", 0.1, "--json", "-o", tmp_path / "s.parquet")
    told = json.loads(out)
    assert told["temperature"] == 1.5
    assert told["back_off"]["ranks"][0]["wrong"] == 0


def test_predict_says_which_taxa_are_precise_and_how_large_sets_are(
    trained: tuple[Path, Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    metadata, images, run = trained
    asked = ("predict", with_records(run, 0), metadata, "--images", images, "--role", "test")
    status, out, err = run_bioscan(
        *asked, "--min-precision", 0.9, "--sets", "lac", "--coverage", 0.98, "-o", tmp_path / "p.csv"
    )
    assert status == 0
    lines = out.splitlines()
    assert lines[2] == (
        "order: 1 of 1 taxa can be named with a precision of 90 %; that names 100 % of 40 checked specimens"
    )
    # 40 records: a coverage of 0.98 takes 49, so every order is in every set
    assert lines[3] == (
        "sets (lac, order): 3.00 taxa on average, 0 empty; they hold the true one of 98 % of specimens with "
        "a name at the rank (promised by 40 such calibration specimens)"
    )
    assert err == (
        "each taxon's precision was tested by itself, at a confidence of 90 %: of the taxa that are less "
        "precise than asked, up to 10 % are named all the same\n"
        "sets: 40 calibration records are too few for coverage 0.98 (at least 49): every taxon is in "
        "every set\nsets: 1 of 1 taxa have fewer than 49 calibration records: what coverage they have by "
        "themselves cannot be promised\n" + PROMISE
    )
    assert read_predictions(tmp_path / "p.csv")["set_size"].to_list() == [3] * 6
    status, out, _ = run_bioscan(*asked, "--min-precision", 0.99, "-o", tmp_path / "q.csv")
    assert out.splitlines()[2] == (
        "order: not named: of 1 taxa none was right so often, among enough specimens to tell"
    )


def test_predict_says_what_of_the_calibration_it_leaves_out(
    trained: tuple[Path, Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    metadata, images, run = trained
    asked = ("predict", with_records(run, 0), metadata, "--images", images, "--role", "test", "--tau", 0.5)
    status, _, err = run_bioscan(*asked, "-o", tmp_path / "p.csv")
    assert status == 0
    assert err == (
        "the model's calibration is for tau 0, not 0.5: probabilities are not calibrated "
        "(bioscan calibrate --tau 0.5 makes it anew)\n"
    )
    assert run_bioscan(*asked, "--no-calibration", "-o", tmp_path / "q.csv")[2] == ""


def test_a_specimen_without_a_photograph_is_told_by_its_id(
    trained: tuple[Path, Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    metadata, images, run = trained
    frame = pl.read_csv(metadata, separator="\t", infer_schema=False).head(3)
    frame = frame.with_columns(image_file=pl.when(pl.int_range(pl.len()) > 0).then("image_file"))
    frame.write_csv(tmp_path / "m.tsv", separator="\t")
    arguments = ("predict", run, tmp_path / "m.tsv", "--images", images, "--all-rows")
    status, _, err = run_bioscan(*arguments, "-o", tmp_path / "p.csv")
    assert status == 1
    assert err.startswith(f"1 of 3 pictures could not be named (first: {frame['sampleid'][0]}: not in the")


def test_predict_lists_failures_and_exits_1(
    trained: tuple[Path, Path, Path], run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    metadata, images, run = trained
    (images / "Diptera-test-1.jpg").unlink()
    arguments = ("predict", run, metadata, "--images", images, "--role", "test", "--no-scores")
    status, out, err = run_bioscan(*arguments, "-o", tmp_path / "p.csv")
    assert status == 1
    assert out.startswith("5 of 6 specimens named\n")
    assert err == (
        "1 of 6 pictures could not be named "
        "(first: Diptera-test-1.jpg: not in the package (insects)); see the column 'error'\n"
    )
    assert read_predictions(tmp_path / "p.csv").filter(pl.col("error").is_not_null()).height == 1
    assert not (tmp_path / "p.scores.parquet").exists()
    status, out, _ = run_bioscan(*arguments, "-o", tmp_path / "q.csv", "--json")
    assert status == 1
    assert json.loads(out)["first_failed"] == [
        {
            "sampleid": "Diptera-test-1",
            "image_file": "Diptera-test-1.jpg",
            "error": "not in the package (insects)",
        }
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "none.zip"], "none.zip"),
        (["--role", "tset"], "unknown role 'tset'; did you mean 'test'"),
        (["-o", "p.xlsx"], "unknown form of predictions '.xlsx'"),
        (["--decode", "gready"], "greedy"),
        (["--tau", "much"], "--tau"),
        (["--tau", "nan"], "tau is nan; it must be a number, such as 0 or 1"),
        (["--sets", "lca"], "lac"),
        (["--set-rank", "order"], "set_rank goes with sets"),
        (["--max-error", "0.1"], "the model's calibration kept no records apart"),
    ],
)
def test_a_wrong_prediction_request_is_one_message_and_exit_2(
    trained: tuple[Path, Path, Path],
    run_bioscan: RunBioscan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    metadata, images, run = trained
    given: dict[str, Any] = {
        "-o": "p.csv",
        "--images": images,
        **dict(zip(flags[::2], flags[1::2], strict=True)),
    }
    status, out, err = run_bioscan("predict", run, metadata, *(a for pair in given.items() for a in pair))
    assert (status, out) == (2, "")
    assert message in err
    assert list(tmp_path.glob("p.*")) == []


def test_the_real_photographs_train_and_are_named(
    shared: Path, run_bioscan: RunBioscan, tmp_path: Path
) -> None:
    insects = shared / "data/insects"
    run, table = tmp_path / "run", tmp_path / "p.parquet"
    status, out, _ = run_bioscan(
        *("train", insects / "metadata.tsv", insects, "-o", run, *small("--epochs", 3, "--lr", 0.003)),
        *("--within", "Lepidoptera", "--rank", "species"),
    )
    assert status == 0
    assert "20 taxa at rank species: 694 training, 40 validation specimens" in out
    assert "kept from that for thresholds and sets: 54 validation specimens" in out
    status, out, _ = run_bioscan("predict", run, insects / "metadata.tsv", "--images", insects, "-o", table)
    assert status == 0
    assert out.startswith("306 of 306 specimens named")
    made = read_predictions(table)
    assert made["order"].unique().to_list() == ["Lepidoptera"]
    status, out, _ = run_bioscan("evaluate", table, insects / "metadata.tsv", "--json")
    scores = json.loads(out)
    assert scores["n"] == 212
    assert scores["metrics"]["top_1"]["micro"]["value"] > 0.1  # chance is 0.05
