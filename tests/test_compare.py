"""Runs side by side: means and deviations by hand, what repeats what, and the published figures."""

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from scipy.stats import binomtest
from sklearn.metrics import recall_score

from bioscan.analysis import published
from bioscan.analysis.published import FIGURES, PER_CLASS, TEST_SIZES, figures_of
from bioscan.errors import DataError, RequestError
from bioscan.jobs.compare import EVERY_PAIR, Comparison, compare
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
    answers(wrong, rank).write_parquet(folder / "predictions.parquet")
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


def test_one_run_has_the_interval_of_its_evaluation_and_several_have_none(
    six: Path, run_bioscan: Bioscan
) -> None:
    made = json.loads((six / "focal_2/evaluation.json").read_text())["metrics"]["f1"]["macro"]
    one = score(compare([six / "focal_2"]), "f1", "macro")
    assert (one["low"], one["high"]) == (made["low"], made["high"])
    assert score(compare([six]), "f1", "macro", loss="focal")["low"] is None
    # Wilson's interval of 7 of 10
    assert "0.7000 (0.3968–0.8922)" in run_bioscan("compare", six / "focal_2")[1]


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


@pytest.mark.parametrize("known", ["settings", "record"])
def test_a_model_of_several_ranks_repeats_none_of_one_rank(tmp_path: Path, known: str) -> None:
    for name, ranks in (("flat", ["order"]), ("tree", ["order", "family"])):
        told: dict[str, Any] = {"record": {"ranks": ranks}} if known == "record" else {"ranks": ranks}
        write_run(tmp_path / name, 1, model="m", loss="focal", seed=1, **told)
    assert {*compare([tmp_path]).runs["variant"]} == {"ranks=order", "ranks=order,family"}


def test_the_settings_of_a_model_that_was_calibrated_anew_are_still_its_own(tmp_path: Path) -> None:
    record = {"model_sha256": "before", "weights_sha256": "same"}
    run = write_run(tmp_path / "a", 1, model="m", loss="focal", seed=1, record=record)
    place = run / "model/model.json"
    for weights, loss in (("same", "focal"), ("other", None)):
        place.write_text(json.dumps(json.loads(place.read_text()) | {"weights_sha256": weights}))
        assert compare([run]).runs["loss"].to_list() == [loss]


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
        "they say nothing about one another",
        "no paired tests: they need the answers of single specimens, from predictions (or run folders that "
        "hold them) and --catalogue",
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


def test_published_orders_do_not_stand_beside_families_in_the_text(
    tmp_path: Path, run_bioscan: Bioscan
) -> None:
    one = json.loads((write_run(tmp_path / "a", 1, model="m", seed=1) / "evaluation.json").read_text())
    both = {"ranks": {"order": one, "family": {**one, "rank": "family"}}}
    (tmp_path / "a/evaluation.json").write_text(json.dumps(both))
    orders, families = run_bioscan("compare", tmp_path)[1].split("rank family")
    assert "published" in orders
    assert not [line for line in families.splitlines() if line.startswith("published")]


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


# -- pairs of runs, specimen by specimen


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    place = tmp_path / "catalogue.csv"
    catalogue().write_csv(place)
    return place


def predict(place: Path, wrong: int) -> Path:
    answers(wrong).write_csv(place)
    return place


def test_two_predictions_are_compared_on_the_same_specimens_by_hand(tmp_path: Path, truth: Path) -> None:
    files = [predict(tmp_path / f"{name}.csv", wrong) for name, wrong in (("a", 1), ("b", 4))]
    found = compare(files, catalogue=truth, experiment=EXPERIMENT)
    (row,) = found.pairs.to_dicts()
    assert (row["experiment"], row["role"], row["rank"]) == (EXPERIMENT, "test", "order")
    assert (row["a"], row["b"], row["runs_a"], row["runs_b"], row["n"]) == ("a", "b", 1, 1, 10)
    assert (row["micro_a"], row["micro_b"]) == (0.9, 0.6)
    assert row["micro"] == pytest.approx(0.3)
    # the errors are among six Diptera: recall 5/6 against 2/6, the two other orders are all right
    assert row["macro"] == pytest.approx((5 / 6 - 2 / 6) / 3)
    assert row["macro_a"] - row["macro_b"] == pytest.approx(row["macro"])
    # three Diptera differ, so the difference of a resample is k/10, k binomial of 6 and 3/6: 1 to 5
    assert (row["micro_low"], row["micro_high"]) == pytest.approx((0.1, 0.5))
    assert (row["macro_low"], row["macro_high"]) == pytest.approx((1 / 18, 5 / 18))
    assert (row["only_a"], row["only_b"]) == (3, 0)
    assert row["p"] == row["p_holm"] == pytest.approx(binomtest(3, 3).pvalue)


def test_the_answers_of_evaluated_runs_come_from_their_predictions(six: Path, truth: Path) -> None:
    found = compare([six / "focal_1", six / "cross_entropy_1"], catalogue=truth)
    (row,) = found.pairs.to_dicts()
    assert (row["a"], row["b"]) == ("cross_entropy", "focal")
    assert (row["only_a"], row["only_b"], row["p"]) == (2, 0, 0.5)  # 1 and 3 wrong: two differ
    assert found.scores.equals(compare([six / "focal_1", six / "cross_entropy_1"]).scores)


def test_seeds_are_averaged_per_specimen_and_never_tested(six: Path, truth: Path) -> None:
    (row,) = compare([six], catalogue=truth).pairs.to_dicts()
    assert (row["runs_a"], row["runs_b"], row["n"]) == (3, 3, 10)
    assert row["micro"] == pytest.approx(23 / 30 - 0.7)
    assert [row[name] for name in ("only_a", "only_b", "p", "p_holm")] == [None] * 4
    # per specimen a less b: the first Diptera 0, then 1/3, 2/3 (all seeds of b wrong), -1/3, 0, 0
    differences = [0, 1 / 3, 2 / 3, -1 / 3, 0, 0]
    assert row["micro"] == pytest.approx(sum(differences) / 10)
    assert row["micro_low"] < 0 < row["micro"] < row["micro_high"] <= 6 * 2 / 3 / 10


def test_seeds_are_averaged_over_specimens_that_all_of_them_predict(six: Path, truth: Path) -> None:
    for seed in (1, 2, 3):
        (six / f"focal_{seed}/evaluation.json").unlink()
    answers(3)[2:].write_parquet(six / "focal_2/predictions.parquet")
    (row,) = compare([six], catalogue=truth, experiment=EXPERIMENT).pairs.to_dicts()
    assert (row["runs_b"], row["n"]) == (3, 8)
    assert row["micro_b"] == 7 / 8


def test_of_many_kinds_each_is_compared_with_the_best_and_p_is_corrected(tmp_path: Path, truth: Path) -> None:
    wrongs = [3, 0, 6, 5, 4, 6, 6]
    files = [predict(tmp_path / f"m{i}.csv", wrong) for i, wrong in enumerate(wrongs)]
    every = compare(files[:EVERY_PAIR], catalogue=truth).pairs
    assert every.height == 15
    pairs = compare(files, catalogue=truth).pairs
    assert pairs["a"].to_list() == ["m1"] * 6
    assert pairs["b"].to_list() == ["m0", "m2", "m3", "m4", "m5", "m6"]
    # p is 2 · 2^-d for d specimens that differ; Holm: the three smallest times 6, then 3, 2 and 1
    assert pairs["p"].to_list() == pytest.approx([2 / 8, 2 / 64, 2 / 32, 2 / 16, 2 / 64, 2 / 64])
    corrected = [0.25, 0.1875, 0.1875, 0.25, 0.1875, 0.1875]
    assert pairs["p_holm"].to_list() == pytest.approx(corrected)


def test_specimens_that_only_one_predicts_are_left_out(tmp_path: Path, truth: Path) -> None:
    answers(1)[:7].write_csv(tmp_path / "a.csv")
    answers(2)[5:].write_csv(tmp_path / "b.csv")
    answers(2)[8:].write_csv(tmp_path / "c.csv")
    found = compare([tmp_path / f"{name}.csv" for name in "abc"], catalogue=truth)
    assert found.pairs.select("a", "b", "n").rows() == [("a", "b", 2), ("b", "c", 2)]
    assert "a and c have no specimens in common" in found.notes


def test_an_evaluation_of_other_predictions_is_not_tested_with_these(six: Path, truth: Path) -> None:
    answers(5).write_parquet(six / "focal_1/predictions.parquet")
    found = compare([six / "focal_1", six / "cross_entropy_1"], catalogue=truth)
    assert found.pairs.is_empty()
    assert any(
        note.startswith("focal_1: no paired tests, as its evaluation is of other predictions or another")
        for note in found.notes
    )


def test_runs_that_a_catalogue_cannot_score_are_told_and_the_rest_is_there(six: Path, tmp_path: Path) -> None:
    catalogue("mine").write_csv(tmp_path / "other.csv")
    found = compare([six], catalogue=tmp_path / "other.csv")
    assert found.runs.height == 6
    assert found.pairs.is_empty()
    assert sum("its predictions cannot be scored (the catalogue has no column" in n for n in found.notes) == 6


def test_intervals_of_whole_plates_are_wider_than_of_specimens_alone(tmp_path: Path) -> None:
    # twenty plates of ten; on each the models are all right or all wrong
    names = [f"BIOUG{plate:05d}-A{well:02d}" for plate in range(20) for well in range(1, 11)]
    frame = pl.DataFrame({"sampleid": names, "order": "Diptera", "uri": [n[:10] for n in names]})
    frame.write_csv(tmp_path / "catalogue.csv")
    for model, right in (("a", range(0, 20, 2)), ("b", range(0, 20, 5))):
        made = [("Diptera" if int(name[5:10]) in right else "Hemiptera") for name in names]
        frame.select("sampleid", order=pl.Series(made)).write_csv(tmp_path / f"{model}.csv")
    width = {}
    for group in ("none", "plate", "bin", "uri"):
        found = compare(
            [tmp_path / "a.csv", tmp_path / "b.csv"], catalogue=tmp_path / "catalogue.csv", group=group
        )
        (row,) = found.pairs.to_dicts()
        assert row["micro"] == pytest.approx(0.3)  # 10 against 4 plates of 20
        width[group] = row["micro_high"] - row["micro_low"]
    assert width["plate"] > 2.5 * width["none"]  # ten alike: √10 times
    assert width["plate"] == width["bin"] == width["uri"]


def test_groups_need_a_catalogue_that_has_them(six: Path, truth: Path) -> None:
    with pytest.raises(RequestError, match="groups of specimens come from the catalogue: pass --catalogue"):
        compare([six], group="plate")
    with pytest.raises(RequestError, match="no column 'trap'"):
        compare([six], catalogue=truth, group="trap")


def test_the_command_shows_and_writes_the_pairs(
    six: Path, truth: Path, run_bioscan: Bioscan, tmp_path: Path
) -> None:
    runs = [six / "cross_entropy_1", six / "focal_1"]
    status, out, err = run_bioscan("compare", *runs, "--catalogue", truth, "--csv", tmp_path / "tables")
    assert (status, err) == (0, "")
    (row,) = [line.split() for line in out.splitlines() if line.startswith("cross_entropy ")]
    assert row[:4] == ["cross_entropy", "focal", "10", "+0.2000"]
    assert row[-4:] == ["2", "0", "0.5", "0.5"]
    assert "p: McNemar's exact test between single runs, which takes specimens as independent" in out
    assert pl.read_csv(tmp_path / "tables/pairs.csv")["micro"].to_list() == pytest.approx([0.2])
    made = json.loads(run_bioscan("compare", *runs, "--catalogue", truth, "--json")[1])
    assert made["pairs"][0]["only_a"] == 2
    together = run_bioscan("compare", six, "--catalogue", truth)[1]
    (row,) = [line.split() for line in together.splitlines() if line.startswith("cross_entropy ")]
    assert row[-4:] == ["–"] * 4


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
        "pairs": 0,
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
