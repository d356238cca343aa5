"""From predictions and catalogue to scores: by hand, by scikit-learn, and by the command line."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import sklearn.metrics as oracle
from numpy.typing import NDArray

import bioscan
from bioscan.analysis.splits import split_hash
from bioscan.data import predictions
from bioscan.data.predictions import PredictionsWriter
from bioscan.errors import DataError, RequestError
from bioscan.jobs.evaluate import Evaluation, evaluate_ranks
from bioscan.vocabulary import RANKS

Bioscan = Callable[..., tuple[int, str, str]]
EXPERIMENT = "small_insect_order"

# Ten specimens. Test: a and b are flies (one right, one taken for a beetle), c a beetle (right), d a beetle
# whose image failed, e a mayfly, which the model does not know; f has no order; g is not predicted.
# Validation: v and w. Training: t.
CATALOGUE = """sampleid,image_file,order,small_insect_order
a,a.jpg,Diptera,test
b,b.jpg,Diptera,test
c,c.jpg,Coleoptera,test
d,d.jpg,Coleoptera,test
e,e.jpg,Ephemeroptera,test
f,f.jpg,not_classified,test
g,g.jpg,Diptera,test
v,v.jpg,Diptera,validation
w,w.jpg,Hemiptera,validation
t,t.jpg,Diptera,train
"""
MODEL = ("Diptera", "Coleoptera", "Hemiptera", "Hymenoptera")
SCORES = {
    "w": (0.30, 0.20, 0.40, 0.10),
    "c": (0.25, 0.45, 0.20, 0.10),
    "a": (0.70, 0.15, 0.10, 0.05),
    "b": (0.36, 0.54, 0.06, 0.04),
    "d": None,
    "e": (0.20, 0.50, 0.20, 0.10),
    "f": (0.90, 0.05, 0.03, 0.02),
    "v": (0.60, 0.22, 0.12, 0.06),
    "x": (0.97, 0.01, 0.01, 0.01),
}


def lineage(order: str) -> tuple[str | None, ...]:
    return ("Arthropoda", "Insecta", order)


def write_predictions(
    path: Path,
    keys: Sequence[str],
    scores_NL: NDArray[np.float32],
    leaves: Sequence[tuple[str | None, ...]],
    *,
    rank: str = "order",
    ranks: Sequence[str] = ("phylum", "class", "order"),
    **record: Any,
) -> None:
    """As `bioscan predict` writes them; a row of NaN is an image that failed."""
    failed = np.isnan(scores_NL[:, 0])
    best = np.nan_to_num(scores_NL).argmax(axis=1)
    empty = pl.Series(failed)
    columns: dict[str, Any] = {"sampleid": keys, "image_file": [f"{key}.jpg" for key in keys]}
    for level, name in enumerate(ranks):
        columns[name] = pl.Series([leaves[b][level] for b in best]).set(empty, None)
        columns[f"{name}_probability"] = pl.Series(scores_NL.max(axis=1).astype(float)).set(empty, None)
    columns |= {
        "assigned_rank": rank,
        "assigned_taxon": columns[ranks[-1]],
        "assigned_probability": columns[f"{ranks[-1]}_probability"],
        "error": pl.Series(["truncated JPEG" if f else None for f in failed], dtype=pl.String),
    }
    with PredictionsWriter(path, ranks=ranks, leaves=leaves, record={"rank": rank, **record}) as writer:
        writer.write(pl.DataFrame(columns), scores_NL)


@pytest.fixture
def by_hand(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and catalogue as described above."""
    catalogue, path = tmp_path / "catalogue.csv", tmp_path / "predictions.parquet"
    catalogue.write_text(CATALOGUE)
    scores = np.array([row or (np.nan,) * 4 for row in SCORES.values()], np.float32)
    write_predictions(path, list(SCORES), scores, [lineage(o) for o in MODEL], experiment=EXPERIMENT)
    return path, catalogue


def test_the_counts_are_those_of_the_specimens_by_hand(by_hand: tuple[Path, Path]) -> None:
    found = bioscan.evaluate(*by_hand)
    assert (found.rank, found.experiment, found.role, found.n) == ("order", EXPERIMENT, "test", 5)
    assert found.counts == {
        "failed": 1,  # d
        "unnamed": 0,
        "unknown_to_model": 1,  # e
        "unlabelled": 1,  # f
        "not_predicted": 1,  # g
        "other": 2,  # v, w
        "not_in_catalogue": 1,  # x
    }


def test_the_scores_are_those_worked_out_by_hand(by_hand: tuple[Path, Path]) -> None:
    found = bioscan.evaluate(*by_hand, ks=(1, 2, 3))
    value = {name: {a: s.value for a, s in averages.items()} for name, averages in found.metrics.items()}
    # right: a, c of five; recalls Diptera 1/2, Coleoptera 1/2, Ephemeroptera 0
    assert value["top_1"] == pytest.approx(
        {"micro": 2 / 5, "macro": 1 / 3, "macro_all": 1 / 5, "macro_seen": 1 / 3}
    )
    assert found.metrics["top_1"]["macro"].classes == 3
    assert found.metrics["top_1"]["macro_all"].classes == 5  # the model's four and the mayfly
    assert found.metrics["top_1"]["micro"].classes is None
    # the second best of b is right too
    assert value["top_2"]["micro"] == pytest.approx(3 / 5)
    assert value["top_2"]["macro"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    # F1: flies 2·1/(2+1), beetles 2·1/(2+3), mayfly 0
    assert value["f1"]["macro"] == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)
    assert value["f1"]["micro"] == pytest.approx(2 * 2 / (5 + 4))  # d has no answer
    # validation: .60 .40 .30 .22 .20 .12 .10 .06, two specimens: after the 2nd for k = 1, the 4th for k = 2
    assert found.thresholds["average_1"].value == pytest.approx((0.40 + 0.30) / 2)
    assert found.thresholds["average_2"].value == pytest.approx((0.22 + 0.20) / 2)
    assert value["average_1"]["micro"] == pytest.approx(3 / 5)  # a .70, b .36, c .45
    # the four test rows with scores: a 1, b 2, c 1, e 1 taxa reach .35
    assert found.thresholds["average_1"].mean_set_size == pytest.approx(5 / 4)
    # first and last validation row of the file: w .40, v .60
    assert found.thresholds["reference_average_1"].value == pytest.approx(0.50)
    assert value["reference_average_1"]["micro"] == pytest.approx(1 / 5)
    assert found.thresholds["average_1"].validation == 2


def test_intervals_are_wilsons_for_shares_and_stand_around_every_value(by_hand: tuple[Path, Path]) -> None:
    found = bioscan.evaluate(*by_hand)
    low, high = wilson_by_hand(2, 5)
    micro = found.metrics["top_1"]["micro"]
    assert (micro.low, micro.high, micro.n) == pytest.approx((low, high, 5))
    for averages in found.metrics.values():
        for score in averages.values():
            assert score.low <= score.value <= score.high


def wilson_by_hand(hits: int, n: int) -> tuple[float, float]:
    z2, share = 1.959963984540054**2, hits / n
    low, high = sorted(np.roots([n + z2, -(2 * n * share + z2), n * share**2]).real)
    return float(low), float(high)


def test_each_class_has_its_support_interval_and_most_common_confusion(by_hand: tuple[Path, Path]) -> None:
    rows = {row["taxon"]: row for row in bioscan.evaluate(*by_hand).per_class.to_dicts()}
    assert list(rows) == ["Coleoptera", "Diptera", "Ephemeroptera", "Hemiptera", "Hymenoptera"]
    flies = rows["Diptera"]
    assert (flies["support"], flies["correct"], flies["predicted"]) == (2, 1, 1)
    assert (flies["recall"], flies["precision"]) == (0.5, 1.0)
    assert (flies["recall_low"], flies["recall_high"]) == pytest.approx(wilson_by_hand(1, 2))
    assert (flies["confused_with"], flies["confused"]) == ("Coleoptera", 1)
    assert rows["Coleoptera"]["confused_with"] is None  # its other specimen has no answer
    assert (rows["Hemiptera"]["support"], rows["Hemiptera"]["recall"]) == (0, None)


def test_the_confusion_holds_every_specimen_once_and_misses_none(by_hand: tuple[Path, Path]) -> None:
    found = bioscan.evaluate(*by_hand)
    assert set(found.confusion.rows()) == {
        ("Coleoptera", "Coleoptera", 1),
        ("Coleoptera", None, 1),
        ("Diptera", "Diptera", 1),
        ("Diptera", "Coleoptera", 1),
        ("Ephemeroptera", "Coleoptera", 1),
    }


def test_errors_come_most_confident_first_and_failures_last(by_hand: tuple[Path, Path]) -> None:
    errors = bioscan.evaluate(*by_hand).errors()
    assert errors["sampleid"].to_list() == ["b", "e", "d"]
    assert errors["error"].to_list() == [None, None, "truncated JPEG"]


def test_k_of_all_classes_or_more_is_not_computable_and_says_why(by_hand: tuple[Path, Path]) -> None:
    found = bioscan.evaluate(*by_hand, ks=(1, 4, 10))
    assert set(found.not_computable) == {
        f"{m}_{k}" for m in ("top", "average", "reference_average") for k in (4, 10)
    }
    assert "not below 4, the classes of the model" in found.not_computable["top_10"]


def test_without_scores_or_validation_rows_the_reason_is_given(
    by_hand: tuple[Path, Path], tmp_path: Path
) -> None:
    path, catalogue = by_hand
    assert "scores file" in bioscan.evaluate(pl.read_parquet(path), catalogue).not_computable["average_1"]
    tests_only = pl.read_csv(catalogue).filter(pl.col(EXPERIMENT) != "validation")
    tests_only.write_csv(tmp_path / "tests.csv")
    found = bioscan.evaluate(path, tmp_path / "tests.csv", ks=(1, 2))
    assert set(found.metrics) == {"top_1", "top_2", "f1"}
    assert "validation specimens" in found.not_computable["reference_average_2"]


def test_rows_are_joined_by_key_whatever_their_order(by_hand: tuple[Path, Path], tmp_path: Path) -> None:
    path, catalogue = by_hand
    before = bioscan.evaluate(path, catalogue).to_dict()
    shuffled = tmp_path / "shuffled.csv"
    pl.read_csv(catalogue).sample(fraction=1, shuffle=True, seed=3).write_csv(shuffled)
    table = pl.read_parquet(path).sample(fraction=1, shuffle=True, seed=4)
    table.write_parquet(path, metadata={"bioscan": pl.read_parquet_metadata(path)["bioscan"]})
    assert bioscan.evaluate(path, shuffled).to_dict() == before


def test_a_frame_and_a_file_give_the_same(by_hand: tuple[Path, Path]) -> None:
    path, catalogue = by_hand
    frame = bioscan.read_metadata(catalogue)
    assert bioscan.evaluate(path, frame).to_dict() == bioscan.evaluate(path, catalogue).to_dict()


def test_the_seed_moves_only_the_bootstrap(by_hand: tuple[Path, Path]) -> None:
    first, same, other = (bioscan.evaluate(*by_hand, seed=seed) for seed in (1, 1, 2))
    assert first.to_dict() == same.to_dict()
    values = [[s.value for a in e.metrics.values() for s in a.values()] for e in (first, other)]
    assert values[0] == values[1]


# -- by an oracle


def random_run(
    tmp_path: Path, *, tests: int = 400, validation: int = 150
) -> tuple[Path, Path, NDArray[np.float32], Any]:
    random = np.random.default_rng(8)
    classes, num = 12, tests + validation
    targets = random.choice(9, num)  # three of the model's taxa never occur
    logits = random.normal(0, 1, (num, classes))
    logits[np.arange(num), targets] += 1.5
    scores = np.exp(logits)
    scores = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
    names = [f"Order{c:02d}" for c in range(classes)]
    keys = [f"BIOUG{i:05d}-A{1 + i % 12:02d}" for i in range(num)]
    catalogue = pl.DataFrame(
        {
            "sampleid": keys,
            "order": [names[t] for t in targets],
            EXPERIMENT: ["test"] * tests + ["validation"] * validation,
        }
    )
    catalogue.write_csv(tmp_path / "c.csv")
    write_predictions(
        tmp_path / "p.parquet", keys, scores, [lineage(n) for n in names], experiment=EXPERIMENT
    )
    return tmp_path / "p.parquet", tmp_path / "c.csv", scores, targets


def test_a_random_run_equals_scikit_learn(tmp_path: Path) -> None:
    path, catalogue, scores, targets = random_run(tmp_path)
    found = bioscan.evaluate(path, catalogue)
    test, truth = scores[:400], targets[:400]
    for k in (3, 5, 10):
        expected = oracle.top_k_accuracy_score(truth, test, k=k, labels=np.arange(12))
        assert found.metrics[f"top_{k}"]["micro"].value == pytest.approx(expected, abs=1e-12)
    named = test.argmax(axis=1)
    assert found.metrics["top_1"]["micro"].value == pytest.approx(
        oracle.accuracy_score(truth, named), abs=1e-12
    )
    expected = oracle.f1_score(truth, named, average="macro", zero_division=0)
    assert found.metrics["f1"]["macro_seen"].value == pytest.approx(expected, abs=1e-12)
    matrix = oracle.confusion_matrix(truth, named, labels=np.arange(12))
    for taxon, answer, cell in found.confusion.rows():
        assert matrix[int(taxon[-2:]), int(answer[-2:])] == cell
    assert found.confusion["specimens"].sum() == matrix.sum() == 400


def test_scores_read_in_small_batches_give_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, catalogue, _, _ = random_run(tmp_path)
    whole = bioscan.evaluate(path, catalogue).to_dict()
    monkeypatch.setattr(predictions, "_HELD", 0)
    monkeypatch.setattr(predictions, "_BATCH", 12 * 37)
    assert bioscan.evaluate(path, catalogue).to_dict() == whole


# -- ranks, names, experiments

FAMILIES = [("Arthropoda", "Insecta", name[0], name) for name in ("A1", "A2", "B1", "B2", "C1")]


def test_at_a_higher_rank_probabilities_are_summed_and_the_named_taxon_comes_first(tmp_path: Path) -> None:
    # orders in sum A .5, B .4, C .1 and A .40, B .35, C .25; the best families are A1 and C1
    scores = np.array([[0.3, 0.2, 0.2, 0.2, 0.1], [0.20, 0.20, 0.18, 0.17, 0.25]], np.float32)
    path = tmp_path / "p.parquet"
    ranks = ("phylum", "class", "order", "family")
    write_predictions(path, ["one", "two"], scores, FAMILIES, rank="family", ranks=ranks)
    catalogue = pl.DataFrame({"sampleid": ["one", "two"], "order": ["B", "B"], "family": ["B1", "B1"]})
    found = bioscan.evaluate(path, catalogue, rank="order", ks=(1, 2))
    assert found.metrics["top_1"]["micro"].value == 0  # named A and C
    assert found.metrics["top_2"]["micro"].value == 1 / 2  # A B C, and C A B
    assert bioscan.evaluate(path, catalogue, ks=(1, 2)).rank == "family"


def test_homonyms_are_told_apart_by_the_ranks_above(tmp_path: Path) -> None:
    names = [("Arthropoda", "Insecta", o, "Sp. 1") for o in ("Diptera", "Coleoptera")]
    scores = np.array([[0.8, 0.2], [0.7, 0.3], [0.1, 0.9]], np.float32)
    path = tmp_path / "p.parquet"
    ranks = ("phylum", "class", "order", "family")
    write_predictions(path, ["a", "b", "c"], scores, names, rank="family", ranks=ranks)
    catalogue = pl.DataFrame({"sampleid": ["a", "b", "c"], "order": ["Diptera", "Coleoptera", "Coleoptera"]})
    found = bioscan.evaluate(path, catalogue.with_columns(family=pl.lit("Sp. 1")), ks=(1,))
    assert found.homonyms == ["Sp. 1"]
    assert found.metrics["top_1"]["micro"].value == pytest.approx(2 / 3)
    assert sorted(found.per_class["taxon"]) == [
        "Sp. 1 (Arthropoda > Insecta > Coleoptera)",
        "Sp. 1 (Arthropoda > Insecta > Diptera)",
    ]


def test_another_opinion_about_the_ranks_above_makes_no_error() -> None:
    table = pl.DataFrame({"sampleid": ["a"], "order": ["Psocodea"], "family": ["Liposcelididae"]})
    truth = pl.DataFrame({"sampleid": ["a"], "order": ["Psocoptera"], "family": ["Liposcelididae"]})
    assert bioscan.evaluate(table, truth).metrics["top_1"]["micro"].value == 1


def test_within_and_role_choose_the_specimens(by_hand: tuple[Path, Path]) -> None:
    path, catalogue = by_hand
    assert bioscan.evaluate(path, catalogue, within="Diptera").n == 2
    assert bioscan.evaluate(path, catalogue, role="validation").n == 2
    every = bioscan.evaluate(path, catalogue, experiment="none")
    assert (every.experiment, every.role, every.n) == (None, None, 7)


def test_image_files_are_the_key_where_sample_ids_are_absent(
    by_hand: tuple[Path, Path], tmp_path: Path
) -> None:
    _, catalogue = by_hand
    other = tmp_path / "other.csv"
    other.write_text("image_file,order\na.jpg,Diptera\nb.jpg,Diptera\n")
    found = bioscan.evaluate(other, catalogue, experiment=EXPERIMENT)
    assert (found.key, found.n, found.metrics["top_1"]["micro"].value) == ("image_file", 2, 1.0)


def test_the_rank_is_the_deepest_that_names_something() -> None:
    predictions = pl.DataFrame({"sampleid": ["a", "b"], "order": ["Diptera", None], "genus": [None, None]})
    truth = pl.DataFrame({"sampleid": ["a", "b"], "order": ["Diptera"] * 2, "genus": ["Musca"] * 2})
    found = bioscan.evaluate(predictions.cast(pl.String), truth)
    assert (found.rank, found.n, found.counts["unnamed"]) == ("order", 2, 1)


def test_other_roles_than_those_of_the_training_are_noticed(tmp_path: Path, run_bioscan: Bioscan) -> None:
    catalogue, path = tmp_path / "catalogue.csv", tmp_path / "predictions.parquet"
    catalogue.write_text(CATALOGUE)
    frame = bioscan.read_metadata(catalogue)
    digest = split_hash(frame["sampleid"], frame[EXPERIMENT])
    scores = np.array([row or (np.nan,) * 4 for row in SCORES.values()], np.float32)
    leaves = [lineage(o) for o in MODEL]
    write_predictions(path, list(SCORES), scores, leaves, experiment=EXPERIMENT, split_hash=digest)
    assert bioscan.evaluate(path, catalogue).same_split is True
    assert bioscan.evaluate(path, catalogue, experiment="none").same_split is None
    catalogue.write_text(CATALOGUE.replace("t.jpg,Diptera,train", "t.jpg,Diptera,test"))
    assert bioscan.evaluate(path, catalogue).same_split is False
    _, text, _ = run_bioscan("evaluate", path, catalogue)
    assert "specimens that count here may have been trained on" in text


# -- command line


def test_the_text_says_what_was_counted_and_what_could_not_be(
    by_hand: tuple[Path, Path], run_bioscan: Bioscan
) -> None:
    status, text, talk = run_bioscan("evaluate", *by_hand)
    assert (status, talk) == (0, "")
    lines = text.splitlines()
    assert lines[0] == "small_insect_order, test: 5 specimens of 3 taxa at rank order"
    assert "1 without an answer because the image failed: counted as errors" in lines
    assert "1 of a taxon that the model cannot name: counted as errors" in lines
    (top_1,) = (line.split() for line in lines if line.startswith("top_1 "))
    assert top_1 == ["top_1", "0.4000", "0.1176–0.7693", "0.3333", top_1[4], "0.2000", "0.3333", "5", "3"]
    assert any(line.startswith("not computable: top_5, top_10,") for line in lines)
    assert any("mostly chance" in line for line in lines)


def test_json_and_csv_hold_everything(
    by_hand: tuple[Path, Path], tmp_path: Path, run_bioscan: Bioscan
) -> None:
    place, folder = tmp_path / "e.json", tmp_path / "csv"
    status, text, _ = run_bioscan("evaluate", *by_hand, "-o", place, "--csv", folder, "--json", "--k", 1, 2)
    assert status == 0
    told = json.loads(text)
    assert told == json.loads(place.read_text())
    assert told["schema_version"] == 1
    assert told["metrics"]["top_1"]["micro"]["value"] == 0.4
    assert told["per_class"][0]["taxon"] == "Coleoptera"
    assert {p.name for p in folder.iterdir()} == {
        "metrics.csv",
        "per_class.csv",
        "confusion.csv",
        "errors.csv",
        "reliability.csv",
        "risk_coverage.csv",
        "buckets.csv",
        "sets.csv",
        "set_sizes.csv",
    }
    table = pl.read_csv(folder / "metrics.csv")
    assert table.columns == ["metric", "average", "value", "low", "high", "n", "classes"]
    assert pl.read_csv(folder / "errors.csv")["sampleid"].to_list() == ["b", "e", "d"]


def test_outputs_that_exist_stay_unless_told(
    by_hand: tuple[Path, Path], tmp_path: Path, run_bioscan: Bioscan
) -> None:
    place = tmp_path / "e.json"
    place.write_text("mine")
    status, text, talk = run_bioscan("evaluate", *by_hand, "-o", place)
    assert (status, text, place.read_text()) == (2, "", "mine")
    assert "--overwrite" in talk
    assert run_bioscan("evaluate", *by_hand, "-o", place, "--overwrite")[0] == 0
    assert json.loads(place.read_text())["n"] == 5


WRONG: dict[str, tuple[list[str], str]] = {
    "rank": (["--rank", "famly"], "unknown rank 'famly'; did you mean 'family'"),
    "rank that is not predicted": (
        ["--rank", "family"],
        "no column 'family'; they name phylum, class, order",
    ),
    "experiment": (["--experiment", "small_insect_ordr"], "did you mean 'small_insect_order'"),
    "role": (["--role", "val"], "unknown role 'val'"),
    "role without specimens": (["--experiment", "order"], "no specimen has role test in order"),
    "role without experiment": (["--experiment", "none", "--role", "test"], "role test of which split"),
    "within": (["--within", "Dipteraa"], "no record belongs to 'Dipteraa'; did you mean 'Diptera'"),
    "k": (["--k", "0"], "k must be 1 or more"),
    "sets": (["--sets", "lacc"], "unknown method of prediction sets 'lacc'; did you mean 'lac'"),
    "coverage": (["--coverage", "90"], "the coverage of prediction sets must lie between 0 and 1, not 90"),
    "buckets": (["--buckets", "100", "20"], "buckets are two rising numbers above 0, not 100 and 20"),
    "embeddings": (["--embeddings", "e.parquet"], "--embeddings and --model are for --open-set"),
    "open set at all ranks": (["--open-set", "--rank", "all"], "--open-set is told at one rank"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_one_message(name: str, by_hand: tuple[Path, Path], run_bioscan: Bioscan) -> None:
    flags, message = WRONG[name]
    status, text, talk = run_bioscan("evaluate", *by_hand, *flags)
    assert (status, text) == (2, "")
    assert message in talk
    assert talk.count("\n") == 1


BAD: dict[str, tuple[str, str]] = {
    "no key": ("name,order\na,Diptera\n", "no key column, sampleid or image_file"),
    "no rank": ("sampleid,taxon_name\na,Diptera\n", "no column of names"),
    "duplicates": ("sampleid,order\na,Diptera\na,Diptera\n", "sampleid occurs more than once: a"),
    "no probability": ("sampleid,order,order_probability\na,Diptera,1.5\n", "order_probability of a is 1.5"),
    "no overlap": ("sampleid,order\nzz,Diptera\n", "none of the 10 specimens is in the predictions"),
    "no name": ("sampleid,order\nf,Diptera\n", "none of the 1 predicted specimens has a name at rank order"),
    "empty": ("", "cannot be read as predictions"),
    "header only": ("sampleid,order\n", "no rows"),
    "another delimiter": ("sampleid;order\na;Diptera\n", "no key column"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_table_that_cannot_be_used_is_one_message(
    name: str, by_hand: tuple[Path, Path], tmp_path: Path, run_bioscan: Bioscan
) -> None:
    content, message = BAD[name]
    path = tmp_path / "bad.csv"
    path.write_text(content)
    status, text, talk = run_bioscan("evaluate", path, by_hand[1], "-o", tmp_path / "out.json")
    assert (status, text) == (2, "")
    assert message in talk
    assert talk.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_a_truncated_parquet_is_one_message(by_hand: tuple[Path, Path], run_bioscan: Bioscan) -> None:
    path, catalogue = by_hand
    path.write_bytes(path.read_bytes()[:200])
    status, _, talk = run_bioscan("evaluate", path, catalogue)
    assert status == 2
    assert "predictions.parquet: cannot be read as predictions" in talk


def test_a_catalogue_without_the_models_experiment_says_the_way_out(
    by_hand: tuple[Path, Path], tmp_path: Path, run_bioscan: Bioscan
) -> None:
    path, catalogue = by_hand
    pl.read_csv(catalogue).drop(EXPERIMENT).write_csv(tmp_path / "bare.csv")
    status, _, talk = run_bioscan("evaluate", path, tmp_path / "bare.csv")
    assert status == 2
    assert "--experiment none" in talk
    assert run_bioscan("evaluate", path, tmp_path / "bare.csv", "--experiment", "none")[0] == 0


def test_scores_that_lack_a_specimen_are_of_other_predictions(by_hand: tuple[Path, Path]) -> None:
    path, catalogue = by_hand
    place = path.with_name("predictions.scores.parquet")
    footer = pl.read_parquet_metadata(place)
    kept = {key: footer[key] for key in ("bioscan", "leaves")}
    pl.read_parquet(place).filter(pl.col("sampleid") != "a").write_parquet(place, metadata=kept)
    with pytest.raises(DataError, match=r"1 of the 5 specimens are not in it \(first: a\)"):
        bioscan.evaluate(path, catalogue)


# -- several ranks

# a is known to its species, b to its genus, c and d to the family, e to the order alone; the family of f's
# genus is not known. Of the model's leaves one is a family, the others are species.
SEVERAL = """sampleid,order,family,genus,species,small_insect_order
a,Diptera,Sciaridae,Sciara,Sciara una,test
b,Diptera,Sciaridae,Bradysia,,test
c,Diptera,Sciaridae,,,test
d,Diptera,Syrphidae,,,test
e,Coleoptera,,,,test
f,Diptera,,Incertae,Incertae sp,test
"""
SEVERAL_LEAVES = [
    ("Arthropoda", "Insecta", "Diptera", "Sciaridae", None, None, "Sciara", "Sciara una"),
    ("Arthropoda", "Insecta", "Diptera", "Sciaridae", None, None, "Bradysia", "Bradysia duo"),
    ("Arthropoda", "Insecta", "Diptera", None, None, None, "Incertae", "Incertae sp"),
    ("Arthropoda", "Insecta", "Coleoptera", "Carabidae"),
]
NAMED = {"a": 1, "b": 1, "c": 1, "d": 3, "e": 3, "f": 2}
"""Specimen -> the leaf that it was named."""


@pytest.fixture
def several(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions of a model of several ranks, with scores, and the catalogue."""
    catalogue, path = tmp_path / "several.csv", tmp_path / "several.parquet"
    catalogue.write_text(SEVERAL)
    ranks = ("order", "family", "genus", "species")
    rows = []
    scores = np.full((len(NAMED), 4), 0.1, np.float32)
    for number, (key, leaf) in enumerate(NAMED.items()):
        scores[number, leaf] = 0.7
        path_of = dict(zip(RANKS, SEVERAL_LEAVES[leaf], strict=False))
        names: dict[str, Any] = {rank: path_of.get(rank) for rank in ranks}
        assigned = {
            "assigned_rank": RANKS[len(SEVERAL_LEAVES[leaf]) - 1],
            "assigned_taxon": [*path_of.values()][-1],
        }
        rows.append({"sampleid": key, "image_file": None, **names, **assigned, "error": None})
    columns = {f"{rank}_probability": pl.lit(0.7) for rank in (*ranks, "assigned")}
    frame = pl.DataFrame(rows, infer_schema_length=None).with_columns(**columns)
    record = {"rank": "species", "ranks": ranks, "experiment": EXPERIMENT}
    with PredictionsWriter(path, ranks=ranks, leaves=SEVERAL_LEAVES, record=record) as writer:
        writer.write(frame, scores)
    return path, catalogue


def test_each_rank_counts_the_specimens_labelled_there(several: tuple[Path, Path]) -> None:
    found = evaluate_ranks(*several)
    assert list(found) == ["order", "family", "genus", "species"]
    assert {rank: one.n for rank, one in found.items()} == {"order": 6, "family": 4, "genus": 3, "species": 2}
    right = {
        "order": 5 / 6,  # all but d, taken for a beetle
        "family": 3 / 4,  # a, b and c, though c was named deeper than it is labelled
        "genus": 2 / 3,  # b and f; a is Bradysia
        "species": 1 / 2,  # f
    }
    assert {rank: one.metrics["top_1"]["micro"].value for rank, one in found.items()} == right
    macro = {rank: one.metrics["top_1"]["macro"].value for rank, one in found.items()}
    assert macro == pytest.approx(
        {"order": (4 / 5 + 1) / 2, "family": 1 / 2, "genus": 2 / 3, "species": 1 / 2}
    )
    assert {rank: one.counts["unlabelled"] for rank, one in found.items()} == {
        "order": 0,
        "family": 2,  # e and f
        "genus": 3,
        "species": 4,
    }
    assert found["family"].counts["unknown_to_model"] == 1  # d's Syrphidae


def test_at_each_rank_it_is_the_evaluation_of_that_rank(several: tuple[Path, Path]) -> None:
    for rank, found in evaluate_ranks(*several).items():
        alone = bioscan.evaluate(*several, rank=rank)
        assert found.to_dict() == alone.to_dict()
        assert found.specimens.equals(alone.specimens)
    assert bioscan.evaluate(*several).rank == "species"  # the deepest, unless asked


def test_scores_of_leaves_at_several_ranks_add_up_at_each(several: tuple[Path, Path]) -> None:
    found = bioscan.evaluate(*several, rank="family", ks=(1, 2))
    # Two taxa at rank family, Sciaridae with two leaves; the leaf without a family is none of them, so top-2
    # leaves nothing open and is not computed
    assert found.not_computable["top_2"].startswith("k is not below 2, the classes of the model")
    order = bioscan.evaluate(*several, rank="order", ks=(1,))
    assert order.metrics["top_1"]["micro"].value == pytest.approx(5 / 6)


def test_a_specimen_answered_without_a_name_at_the_rank_is_an_error_there(
    several: tuple[Path, Path], tmp_path: Path
) -> None:
    labels = SEVERAL.replace("f,Diptera,,", "f,Diptera,Cecidomyiidae,")
    (tmp_path / "labelled.csv").write_text(labels)
    found = bioscan.evaluate(several[0], tmp_path / "labelled.csv", rank="family")
    assert (found.n, found.counts["unnamed"]) == (5, 1)
    assert found.metrics["top_1"]["micro"].value == 3 / 5


def test_all_ranks_as_text_json_and_csv(
    several: tuple[Path, Path], tmp_path: Path, run_bioscan: Bioscan
) -> None:
    status, text, talk = run_bioscan("evaluate", *several, "--rank", "all")
    assert (status, talk) == (0, "")
    lines = text.splitlines()
    assert lines[0] == "small_insect_order, test"
    assert "family: 1 of a taxon that the model cannot name: counted as errors" in lines
    end = lines.index("whole paths of 6 specimens; what is named below or beside the label is not counted")
    cells = {line.split()[0]: line.split() for line in lines[:end] if line.startswith(RANKS)}
    assert list(cells) == ["family:", "order", "family", "genus", "species"]
    # micro, interval, macro, interval, F1, ECE, n, taxa, unlabelled, unnamed, failed
    assert (cells["order"][1], cells["order"][-5:]) == ("0.8333", ["6", "2", "0", "0", "0"])
    assert (cells["family"][1], cells["family"][-5:]) == ("0.7500", ["4", "2", "2", "0", "0"])
    assert (cells["species"][1], cells["species"][-5:]) == ("0.5000", ["2", "2", "4", "0", "0"])
    status, text, _ = run_bioscan(
        *("evaluate", *several, "--rank", "all", "--json", "--csv", tmp_path / "csv"),
        *("-o", tmp_path / "e.json"),
    )
    told = json.loads(text)
    assert (status, told["schema_version"]) == (0, 1)
    assert told == json.loads((tmp_path / "e.json").read_text())
    one = json.loads(run_bioscan("evaluate", *several, "--rank", "genus", "--json")[1])
    assert told["ranks"]["genus"] == {key: value for key, value in one.items() if key != "schema_version"}
    table = pl.read_csv(tmp_path / "csv/metrics.csv")
    assert table.columns[:3] == ["rank", "metric", "average"]
    assert table["rank"].unique(maintain_order=True).to_list() == ["order", "family", "genus", "species"]
    errors = pl.read_csv(tmp_path / "csv/errors.csv").select("rank", "sampleid")
    assert errors.rows() == [("order", "d"), ("family", "d"), ("genus", "a"), ("species", "a")]


def test_of_a_model_of_one_rank_all_are_those_at_which_taxa_are_to_be_told_apart(
    by_hand: tuple[Path, Path],
) -> None:
    assert list(evaluate_ranks(*by_hand)) == ["order"]  # the catalogue has no phylum and no class
    frame = pl.read_csv(by_hand[1]).with_columns(pl.lit("Insecta").alias("class"))
    assert list(evaluate_ranks(by_hand[0], frame)) == ["order"]  # one class: every answer would be right
    spider = pl.when(pl.col("order") == pl.col("order").first()).then(pl.lit("Arachnida")).otherwise("class")
    assert list(evaluate_ranks(by_hand[0], frame.with_columns(spider.alias("class")))) == ["class", "order"]


def test_one_rank_tells_that_there_are_others(several: tuple[Path, Path], run_bioscan: Bioscan) -> None:
    _, text, _ = run_bioscan("evaluate", *several)
    assert "the model names order, family, genus, species: --rank all compares at each" in text.splitlines()


def test_without_a_label_at_any_rank_it_is_told(several: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "bare.csv").write_text("sampleid,class,small_insect_order\na,Insecta,test\n")
    with pytest.raises(RequestError, match=r"has a name at a rank of the predictions \(order, family"):
        evaluate_ranks(several[0], tmp_path / "bare.csv")


def test_predictions_of_other_specimens_are_told(several: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("sampleid,order,small_insect_order\nzz,Diptera,test\n")
    with pytest.raises(
        DataError, match="none of the 1 specimens is in the predictions; their sampleid is like 'zz'"
    ):
        evaluate_ranks(several[0], tmp_path / "other.csv")


def test_a_catalogue_without_the_role_tells_the_way_out(several: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("sampleid,order,small_insect_order\na,Diptera,no_split\n")
    with pytest.raises(
        RequestError, match="has role test in small_insect_order; --experiment none counts every"
    ):
        evaluate_ranks(several[0], tmp_path / "other.csv")


def test_evaluation_needs_no_torch(by_hand: tuple[Path, Path]) -> None:
    program = (
        "import sys; from bioscan.app.cli import run\n"
        f"status = run(['evaluate', {str(by_hand[0])!r}, {str(by_hand[1])!r}])\n"
        "sys.exit(status or any(name in sys.modules for name in ('torch', 'timm', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_evaluation_is_frozen(by_hand: tuple[Path, Path]) -> None:
    found = bioscan.evaluate(*by_hand)
    assert isinstance(found, Evaluation)
    with pytest.raises(AttributeError):
        found.n = 3  # type: ignore[misc]


@pytest.mark.parametrize("which", [0, 1])
def test_an_input_is_never_overwritten(by_hand: tuple[Path, Path], run_bioscan: Bioscan, which: int) -> None:
    before = by_hand[which].read_bytes()
    status, _, err = run_bioscan("evaluate", *by_hand, "-o", by_hand[which], "--overwrite")
    assert status == 2
    assert err.rstrip().endswith("is an input, and would be overwritten; choose another name")
    assert by_hand[which].read_bytes() == before
