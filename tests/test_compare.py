"""Runs side by side: means and deviations by hand, what repeats what, and the published figures."""

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sklearn.metrics import recall_score

from bioscan.analysis import published
from bioscan.analysis.published import FIGURES, PER_CLASS, TEST_SIZES, figures_of
from bioscan.errors import DataError, RequestError
from bioscan.jobs.compare import Comparison, compare
from bioscan.jobs.evaluate import evaluate
from bioscan.vocabulary import EXPERIMENTS

Bioscan = Callable[..., tuple[int, str, str]]

ORDERS = ("Diptera", "Coleoptera", "Hemiptera")
TRUTH = ["Diptera"] * 6 + ["Coleoptera"] * 3 + ["Hemiptera"]
EXPERIMENT = "large_insect_order"


def catalogue(experiment: str = EXPERIMENT, rank: str = "order") -> pl.DataFrame:
    return pl.DataFrame({"sampleid": [f"s{i}" for i in range(10)], rank: TRUTH, experiment: ["test"] * 10})


def answers(wrong: int, rank: str = "order") -> pl.DataFrame:
    """The first `wrong` of the ten specimens are taken for Hemiptera."""
    return (
        catalogue(rank=rank)
        .select("sampleid", rank)
        .with_columns(
            pl.when(pl.int_range(pl.len()) < wrong).then(pl.lit("Hemiptera")).otherwise(rank).alias(rank)
        )
    )


def write_run(
    folder: Path,
    wrong: int,
    *,
    experiment: str = EXPERIMENT,
    rank: str = "order",
    record: Mapping[str, Any] | None = None,
    change: Callable[[dict[str, Any]], object] = lambda evaluation: None,
    **settings: Any,
) -> Path:
    """A run folder with what compare reads: the model's settings, and an evaluation."""
    made = evaluate(answers(wrong, rank), catalogue(experiment, rank), rank=rank, experiment=experiment)
    evaluation = made.to_dict()
    evaluation["record"] = {"model": settings.get("model"), "images": "cropped.zip", **(record or {})}
    change(evaluation)
    (folder / "model").mkdir(parents=True)
    (folder / "model/model.json").write_text(json.dumps({"settings": settings, "content_sha256": "abc"}))
    (folder / "evaluation.json").write_text(json.dumps(evaluation, default=lambda frame: frame.to_dicts()))
    return folder


@pytest.fixture
def six(tmp_path: Path) -> Path:
    """Two losses, three seeds: 1, 2 and 4 wrong, and 3, 3 and 3."""
    folder = tmp_path / "runs"
    for loss, wrongs in (("cross_entropy", (1, 2, 4)), ("focal", (3, 3, 3))):
        for seed, wrong in enumerate(wrongs, 1):
            write_run(folder / f"{loss}_{seed}", wrong, model="resnet50", loss=loss, seed=seed, epochs=5)
    return folder


def score(found: Comparison, metric: str, average: str, **group: Any) -> dict[str, Any]:
    rows = found.scores.filter(metric=metric, average=average, **group)
    assert rows.height == 1
    return rows.row(0, named=True)


# -- means and deviations


def test_mean_and_deviation_over_seeds_by_hand(six: Path) -> None:
    found = compare([six])
    micro = score(found, "top_1", "micro", loss="cross_entropy")
    assert micro["mean"] == pytest.approx((0.9 + 0.8 + 0.6) / 3, abs=1e-12)
    # deviations from 23/30: 4/30, 1/30, 5/30; their squares over n - 1 = 2
    assert micro["deviation"] == pytest.approx(((16 + 1 + 25) / 900 / 2) ** 0.5, abs=1e-12)
    assert (micro["runs"], micro["lowest"], micro["highest"]) == (3, 0.6, 0.9)
    assert score(found, "top_1", "micro", loss="focal")["deviation"] == pytest.approx(0, abs=1e-12)


def test_macro_scores_and_recalls_equal_scikit_learn_and_statistics(six: Path) -> None:
    found = compare([six])
    recalls = []
    for wrong in (1, 2, 4):
        named = answers(wrong)["order"].to_list()
        recalls.append(recall_score(TRUTH, named, labels=ORDERS, average=None))
    macro = score(found, "top_1", "macro", loss="cross_entropy")
    means = [float(r.mean()) for r in recalls]
    assert macro["mean"] == pytest.approx(statistics.fmean(means), abs=1e-12)
    assert macro["deviation"] == pytest.approx(statistics.stdev(means), abs=1e-12)
    rows = found.per_class.filter(loss="cross_entropy").rows_by_key("taxon", named=True, unique=True)
    for number, order in enumerate(ORDERS):
        of_order = [float(r[number]) for r in recalls]
        assert rows[order]["recall"] == pytest.approx(statistics.fmean(of_order), abs=1e-12)
        assert rows[order]["deviation"] == pytest.approx(statistics.stdev(of_order), abs=1e-12)
        assert rows[order]["support"] == TRUTH.count(order)


def test_one_run_has_no_deviation(six: Path) -> None:
    found = compare([six / "focal_2"])
    assert score(found, "top_1", "micro")["deviation"] is None
    assert found.runs["run"].to_list() == ["focal_2"]


def test_a_metric_that_some_runs_lack_is_the_mean_of_the_others_and_says_so(
    six: Path, run_bioscan: Bioscan
) -> None:
    path = six / "focal_1/evaluation.json"
    made = json.loads(path.read_text())
    made["metrics"]["top_1"]["micro"]["value"] = None
    path.write_text(json.dumps(made))
    assert score(compare([six]), "top_1", "micro", loss="focal")["runs"] == 2
    assert "0.7000 ± 0.0000 (n=2)" in run_bioscan("compare", six)[1]


# -- what repeats what


def test_a_run_that_is_named_twice_counts_once(six: Path) -> None:
    found = compare([six, six / "focal_1", six / "focal_1/evaluation.json"])
    assert found.runs.height == 6


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(six: Path) -> None:
    write_run(six / "longer", 0, model="resnet50", loss="focal", seed=4, epochs=100)
    found = compare([six])
    focal = found.scores.filter(metric="top_1", average="micro", loss="focal")
    assert focal.select("variant", "runs").rows() == [("epochs=100", 1), ("epochs=5", 3)]
    assert score(found, "top_1", "micro", loss="cross_entropy")["variant"] is None


def test_settings_that_only_cost_time_make_no_other_run(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path / str(seed), seed, model="m", loss="focal", seed=seed, threads=seed, workers=seed)
    assert score(compare([tmp_path]), "top_1", "micro")["runs"] == 2


@pytest.mark.parametrize("told", [{"tau": 1.0}, {"decode": "greedy"}])
def test_predictions_made_in_another_way_are_another_variant(tmp_path: Path, told: dict[str, Any]) -> None:
    plain = {"tau": 0.0, "decode": "leaf"}
    write_run(tmp_path / "1", 1, model="m", loss="focal", seed=1, record=plain)
    write_run(tmp_path / "2", 1, model="m", loss="focal", seed=2, record={**plain, **told})
    found = compare([tmp_path])
    (name,) = told
    variants = {f"predicted with {name}={plain[name]}", f"predicted with {name}={told[name]}"}
    assert {*found.runs["variant"]} == variants


def test_runs_whose_settings_nobody_knows_are_never_averaged(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, 1, record={"model": "resnet50", "model_sha256": "of another model"})
    found = compare([tmp_path])
    rows = found.scores.filter(metric="top_1", average="micro").select("model", "loss", "variant", "runs")
    assert rows.rows() == [("resnet50", None, "a", 1), ("resnet50", None, "b", 1)]


def test_settings_in_the_record_of_the_predictions_are_taken(tmp_path: Path) -> None:
    for seed in (1, 2):
        settings = {"model": "resnet50", "loss": "focal", "seed": seed}
        write_run(tmp_path / str(seed), 1, record={"training": settings})
    found = compare([*sorted(tmp_path.glob("*/evaluation.json"))])
    assert found.runs.select("model", "loss", "seed", "variant").rows() == [
        ("resnet50", "focal", 1, None),
        ("resnet50", "focal", 2, None),
    ]


def test_a_seed_that_occurs_twice_is_told(six: Path) -> None:
    write_run(six / "copy", 3, model="resnet50", loss="focal", seed=2, epochs=5)
    assert "seed 2 occurs more than once: copy, focal_2" in compare([six]).notes


def test_other_specimens_or_another_split_are_told(tmp_path: Path) -> None:
    write_run(tmp_path / "1", 1, model="m", loss="focal", seed=1, record={"split_hash": "x"})
    write_run(tmp_path / "2", 1, model="m", loss="focal", seed=2, record={"split_hash": "y"})
    note = f"{EXPERIMENT} at rank order: the runs were not scored on the same specimens (10)"
    assert note in compare([tmp_path]).notes
    assert note not in compare([tmp_path / "1"]).notes


def test_scores_on_another_split_than_the_models_are_told(tmp_path: Path) -> None:
    write_run(tmp_path / "1", 1, model="m", loss="focal", seed=1, change=lambda e: e.update(same_split=False))
    assert "1: scored on another split than it was trained with" in compare([tmp_path]).notes


def test_every_rank_of_an_evaluation_of_all_ranks_is_a_task(tmp_path: Path) -> None:
    one = json.loads((write_run(tmp_path / "a", 1, model="m", seed=1) / "evaluation.json").read_text())
    both = {"ranks": {"order": one, "family": {**one, "rank": "family"}}}
    (tmp_path / "a/evaluation.json").write_text(json.dumps(both))
    found = compare([tmp_path])
    assert found.runs["rank"].to_list() == ["order", "family"]


def test_tables_go_by_experiment_as_the_paper_lists_them(tmp_path: Path) -> None:
    names = ["mine", "small_insect_order", "large_insect_order"]
    for name in names:
        write_run(tmp_path / name, 1, experiment=name, model="m", loss="focal", seed=1)
    assert compare([tmp_path]).runs["experiment"].to_list() == names[::-1]


# -- the published figures


def test_the_bars_have_the_classes_and_test_specimens_of_the_papers_experiments() -> None:
    assert {name: len(bars) for name, bars in PER_CLASS.items()} == {
        "large_insect_order": 16,
        "large_diptera_family": 40,
    }
    for name, bars in PER_CLASS.items():
        assert sum(bar.test for bar in bars.values()) == TEST_SIZES[name]
    assert {*TEST_SIZES} == {*EXPERIMENTS}


def test_every_bar_of_a_small_class_is_a_share_of_its_test_specimens() -> None:
    # so the bars are of the large test parts, and were read right: 0.58 is 11/19, 0.67 of six is 4/6
    for bars in PER_CLASS.values():
        for taxon, bar in bars.items():
            if bar.test < 100:
                assert round(round(bar.recall * bar.test) / bar.test, 2) == bar.recall, taxon
    assert PER_CLASS["large_insect_order"]["Ephemeroptera"].test == 19


def test_what_follows_from_the_bars_is_what_the_facts_say() -> None:
    orders, families, micro, best = FIGURES
    assert orders.value == pytest.approx(0.9075, abs=1e-9)  # 14.52 / 16
    assert families.value == pytest.approx(0.912, abs=1e-9)  # 36.48 / 40
    assert micro.value == pytest.approx(0.975, abs=5e-4)
    assert (micro.low, micro.high) == pytest.approx((0.970, 0.980), abs=5e-4)
    assert (best.value, best.experiment, best.average) == (0.9969, None, None)
    for figure in FIGURES:
        assert figure.low < figure.value < figure.high
        assert figure.source
        assert figure.what


def test_a_bar_of_all_right_cannot_be_off_upwards() -> None:
    # Diptera and Embioptera are at 1.00: 14 of 16 bars may be higher
    assert FIGURES[0].high == pytest.approx(0.9075 + 14 / 16 * published.ROUNDING, abs=1e-12)


def test_figures_belong_to_the_large_experiments_alone() -> None:
    assert {name: len(figures_of(name)) for name in EXPERIMENTS} == {
        **dict.fromkeys(EXPERIMENTS, 0),
        "large_insect_order": 2,
        "large_diptera_family": 2,
    }


def test_published_recalls_stand_beside_ours_and_other_data_is_told(six: Path) -> None:
    found = compare([six])
    rows = found.per_class.filter(loss="focal").rows_by_key("taxon", named=True, unique=True)
    assert (rows["Hemiptera"]["published"], rows["Hemiptera"]["published_support"]) == (0.99, 9394)
    assert found.published == figures_of(EXPERIMENT)
    assert found.notes == [
        "large_insect_order at rank order: the published figures are of 225,660 test specimens, ours of 10: "
        "they say nothing about one another"
    ]


def test_on_the_papers_number_of_specimens_there_is_nothing_to_warn_of(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 1, model="m", seed=1, change=lambda e: e.update(n=225_660))
    assert compare([tmp_path]).notes == []


@pytest.mark.parametrize(
    "change",
    [
        {"rank": "family"},
        {"role": "validation"},
        {"within": "Diptera"},
        {"experiment": "mine"},
        {"experiment": None, "role": None},
        {"experiment": "large_diptera_family"},
    ],
)
def test_nothing_published_stands_beside_another_task(tmp_path: Path, change: dict[str, Any]) -> None:
    write_run(tmp_path / "a", 1, model="m", seed=1, change=lambda e: e.update(change))
    found = compare([tmp_path])
    assert found.published == ()
    assert found.per_class["published"].null_count() == 3
    assert found.notes == []


def test_families_of_the_order_that_the_experiment_implies_are_the_papers_task(tmp_path: Path) -> None:
    write_run(
        tmp_path / "a",
        1,
        experiment="large_diptera_family",
        rank="family",
        model="m",
        change=lambda e: e.update(within="Diptera", n=TEST_SIZES["large_diptera_family"]),
    )
    assert compare([tmp_path]).published == figures_of("large_diptera_family")


# -- sources


def test_predictions_are_evaluated_with_a_catalogue(tmp_path: Path) -> None:
    answers(2).write_csv(tmp_path / "theirs.csv")
    catalogue().write_csv(tmp_path / "catalogue.csv")
    found = compare([tmp_path / "theirs.csv"], catalogue=tmp_path / "catalogue.csv", experiment=EXPERIMENT)
    (run,) = found.runs.to_dicts()
    assert (run["run"], run["model"], run["loss"], run["seed"]) == ("theirs", "theirs", None, None)
    assert score(found, "top_1", "micro")["mean"] == 0.8
    both = compare([tmp_path / "theirs.csv"], catalogue=tmp_path / "catalogue.csv", rank="all")
    assert both.runs["rank"].to_list() == ["order"]
    with pytest.raises(RequestError, match=r"theirs\.csv holds predictions: pass --catalogue"):
        compare([tmp_path / "theirs.csv"])


def test_a_run_folder_that_is_predicted_but_not_evaluated_needs_a_catalogue(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs/a", 1, model="m", loss="focal", seed=1)
    (run / "evaluation.json").unlink()
    answers(2).write_parquet(run / "predictions.parquet")
    catalogue().write_csv(tmp_path / "catalogue.csv")
    with pytest.raises(RequestError, match=r"no evaluation in .*runs \(unfinished runs: 1\)"):
        compare([tmp_path / "runs"])
    found = compare([run], catalogue=tmp_path / "catalogue.csv", experiment=EXPERIMENT)
    assert found.runs.select("model", "loss", "seed").rows() == [("m", "focal", 1)]


def test_unfinished_runs_are_listed(six: Path) -> None:
    (six / "begun").mkdir()
    (six / "begun/record.json").write_text("{}")
    (six / "notes").mkdir()
    assert compare([six]).unfinished == ["begun"]


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ("{", DataError, "evaluation.json: cannot be read as JSON"),
        ("[1]", DataError, "evaluation.json: no evaluation, as bioscan evaluate --output writes it"),
        ("{}", DataError, "no evaluation, as bioscan evaluate --output writes it"),
        ('{"ranks": {"order": 3}}', DataError, "no evaluation"),
    ],
)
def test_a_file_that_is_no_evaluation_is_refused(
    tmp_path: Path, content: str, kind: type[Exception], message: str
) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(kind, match=message):
        compare([tmp_path])


def test_a_folder_without_runs_and_a_name_that_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no runs"):
        compare([tmp_path])
    with pytest.raises(RequestError, match="no such run, evaluation or predictions"):
        compare([tmp_path / "none"])


# -- the command


def test_the_text_shows_ours_and_what_is_published(six: Path, run_bioscan: Bioscan) -> None:
    status, out, err = run_bioscan("compare", six, "--per-class")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "large_insect_order, test, rank order: 10 specimens of 3 taxa"
    assert lines[1].split() == ["model", "loss", "runs", "average", "top_1", "f1"]
    assert lines[2].split()[:7] == ["resnet50", "cross_entropy", "3", "micro", "0.7667", "±", "0.1528"]
    assert lines[6].split() == ["published", "–", "–", "macro", "0.9075", "–"]
    assert lines[7].split() == ["published", "–", "–", "–", "0.9969", "–"]
    assert lines[8] == (
        "published, macro: mean of 16 bars read from a figure; the figure names no model "
        "(README of zahrag/BIOSCAN-1M, figure 5)"
    )
    (row,) = [line.split() for line in lines if line.startswith("Diptera")]
    assert row == ["Diptera", "6", "0.6111", "±", "0.2546", "0.5000", "±", "0.0000", "179,263", "1.00"]


def test_json_and_csv_hold_everything(six: Path, run_bioscan: Bioscan, tmp_path: Path) -> None:
    place, folder = tmp_path / "compare.json", tmp_path / "tables"
    status, out, _ = run_bioscan("compare", six, "--json", "-o", place, "--csv", folder)
    assert status == 0
    made = json.loads(out)
    assert made == json.loads(place.read_text())
    assert made["schema_version"] == 1
    found = compare([six])
    assert pl.DataFrame(made["scores"])["mean"].to_list() == found.scores["mean"].to_list()
    assert made["published"][0]["source"] == "README of zahrag/BIOSCAN-1M, figure 5"
    tables = {path.stem: pl.read_csv(path) for path in folder.glob("*.csv")}
    assert {name: table.height for name, table in tables.items()} == {
        "runs": 6,
        "scores": found.scores.height,
        "per_class": 6,
        "published": 2,
    }
    assert tables["published"]["what"][1].startswith("best accuracy of the orders in a machine-written")
    status, _, err = run_bioscan("compare", six, "-o", place)
    assert status == 2
    assert "exists; choose another name or pass --overwrite" in err


def test_nothing_to_compare_and_an_unknown_metric_are_refused(six: Path, run_bioscan: Bioscan) -> None:
    assert run_bioscan("compare")[0] == 2
    status, _, err = run_bioscan("compare", six, "--metric", "top_2")
    assert (status, err) == (
        2,
        "bioscan compare: unknown metric 'top_2'; did you mean 'top_1'? (known: f1, top_1)\n",
    )
