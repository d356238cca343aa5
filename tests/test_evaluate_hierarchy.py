"""Answers as whole paths, from predictions and catalogue: by hand, by sets of ancestors, by command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from bioscan.analysis.intervals import wilson
from bioscan.data.predictions import PredictionsWriter
from bioscan.errors import DataError, RequestError
from bioscan.jobs.evaluate import evaluate_ranks
from bioscan.jobs.evaluate_hierarchy import METRICS, evaluate_hierarchy

Bioscan = Callable[..., tuple[int, str, str]]
TASK = ("order", "family", "genus")

# name: true path, forced path, assigned rank
SPECIMENS: dict[str, tuple[tuple[str | None, ...], tuple[str | None, ...], str | None]] = {
    "a": (("Dip", "Scia", "Aus"), ("Dip", "Scia", "Aus"), "genus"),  # right
    "b": (("Dip", "Scia", "Aus"), ("Dip", "Scia", "Bus"), "family"),  # wrong genus, not assigned
    "c": (("Dip", "Scia", None), ("Dip", "Scia", "Bus"), "genus"),  # deeper than its label
    "d": (("Dip", "Scia", "Aus"), ("Col", "Cara", "Cus"), "order"),  # wrong from the order on
    "e": (("Col", None, None), ("Dip", "Syrp", None), "family"),  # wrong, and deeper
    "f": (("Col", "Cara", "Cus"), (None, None, None), None),  # failed
    "g": (("Dip", None, "Dus"), ("Dip", "Syrp", "Dus"), "genus"),  # its family is not known
}


def frames() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Predictions, surer the higher the rank, and the catalogue."""
    rows, truth = [], []
    for key, (true, named, end) in SPECIMENS.items():
        path = dict(zip(TASK, named, strict=True))
        sure = {f"{rank}_probability": p for rank, p in zip(TASK, (0.9, 0.8, 0.6), strict=True)}
        shown = {name: value if path[name.partition("_")[0]] else None for name, value in sure.items()}
        assigned = {"assigned_rank": end, "assigned_taxon": path[end] if end else None}
        error = None if any(named) else "truncated"
        rows.append({"sampleid": key, "image_file": None, **path, **shown, **assigned, "error": error})
        truth.append({"sampleid": key, **dict(zip(TASK, true, strict=True)), "split": "test"})
    return pl.DataFrame(rows, infer_schema_length=None), pl.DataFrame(truth, infer_schema_length=None)


def ancestors(path: tuple[str | None, ...]) -> set[tuple[str | None, ...]]:
    """The taxa of a path: each is the names down to it."""
    return {path[: end + 1] for end, name in enumerate(path) if name}


def test_forced_paths_are_scored_by_their_sets_of_ancestors() -> None:
    found = evaluate_hierarchy(*frames(), experiment="split")
    assert (found.n, found.ranks, found.key) == (7, TASK, "sampleid")
    common = given = true = 0
    for truth, named, _ in SPECIMENS.values():
        cut = tuple(name if t else None for t, name in zip(truth, named, strict=True))
        common += len(ancestors(truth) & ancestors(cut))
        given += len(ancestors(cut))
        true += len(ancestors(truth))
    # a 3, b 2, c 2, d 0, e 0, f 0, g 2 of 3 3 2 3 1 0 2 names, and of 3 3 2 3 1 3 2 that there are
    assert (common, given, true) == (9, 14, 17)
    value = {name: score.value for name, score in found.metrics.items()}
    assert value["hierarchical_precision"] == pytest.approx(9 / 14)
    assert value["hierarchical_recall"] == pytest.approx(9 / 17)
    assert value["hierarchical_f"] == pytest.approx(2 * 9 / (14 + 17))
    # a 0, b 2 (up to the family and down), c 0, d 6, e 2, f 3 (from the root), g 0
    assert value["tree_distance"] == pytest.approx(13 / 7)
    assert value["mistake_severity"] == pytest.approx((1 + 3 + 1) / 3)  # b, d, e
    assert value["lca_height"] == pytest.approx((1 + 3 + 1 + 3) / 7)  # and f, which has no answer
    assert value["correct_or_ancestor"] == pytest.approx(4 / 7)  # a, c, f, g
    assert value["exact"] == pytest.approx(3 / 7)  # a, c, g
    # names that the catalogue has nowhere (Bus, Syrp) say nothing; the others stand together in it
    assert (value["consistency"], found.metrics["consistency"].n) == (1.0, 6)
    assert value.keys() <= METRICS.keys()
    for score in found.metrics.values():
        assert score.low <= score.value <= score.high


def test_assigned_names_are_counted_at_each_rank_with_both_errors() -> None:
    found = evaluate_hierarchy(*frames(), experiment="split")
    rows = {row["rank"]: row for row in found.assigned.to_dicts()}
    counts = {
        r: tuple(row[c] for c in ("labelled", "named", "wrong", "unchecked")) for r, row in rows.items()
    }
    # order: f has none; d and e are wrong. family: labelled a b c d f, named a b c; those of e and g are not
    # known. genus: labelled a b d f g, named a and g; that of c is not known
    assert counts == {"order": (7, 6, 2, 0), "family": (5, 3, 0, 2), "genus": (5, 2, 0, 1)}
    assert rows["order"]["error_over_all"] == pytest.approx(2 / 7)
    assert rows["order"]["error_among_named"] == pytest.approx(2 / 6)
    assert rows["family"]["coverage"] == pytest.approx(3 / 5)
    ends = [rows["order"][f"{of}_{end}"] for of in ("over_all", "among_named") for end in ("low", "high")]
    assert ends == pytest.approx([float(end) for n in (7, 6) for end in wilson(2, n)])
    # whole assigned paths: d is wrong at the order alone
    value = {name: score.value for name, score in found.assigned_metrics.items()}
    assert value["hierarchical_precision"] == pytest.approx((3 + 2 + 2 + 0 + 0 + 2) / (3 + 2 + 2 + 1 + 1 + 2))
    assert value["correct_or_ancestor"] == pytest.approx(5 / 7)


def test_the_intervals_of_shares_are_wide_where_specimens_are_few_and_alike() -> None:
    answers, truth = frames()
    found = evaluate_hierarchy(answers[:1], truth[:1], experiment="split")  # one specimen, right
    for name in ("exact", "correct_or_ancestor", "consistency"):
        score = found.metrics[name]
        assert (score.value, score.high, score.n) == (1.0, 1.0, 1)
        assert score.low == pytest.approx(float(wilson(1, 1)[0]))
    found = evaluate_hierarchy(answers, truth, experiment="split")
    score = found.assigned_metrics["correct_or_ancestor"]
    assert (score.low, score.high) == pytest.approx(tuple(float(end) for end in wilson(5, 7)))


def test_a_rank_that_the_back_off_passes_over_is_not_named(tmp_path: Path) -> None:
    answers, truth = frames()
    record = {"ranks": TASK, "experiment": "split", "max_error": 0.05, "ranks_left_empty": ["family"]}
    with PredictionsWriter(tmp_path / "p.parquet", ranks=TASK, leaves=None, record=record) as writer:
        writer.write(answers.with_columns(assigned_probability=pl.lit(None, pl.Float64)))
    found = evaluate_hierarchy(tmp_path / "p.parquet", truth)
    named = dict(found.assigned.select("rank", "named").iter_rows())
    assert named == {"order": 6, "family": 0, "genus": 2}  # 3 families are on the way to what is assigned
    value = found.assigned_metrics["checked_depth"].value
    assert value == pytest.approx((6 + 0 + 2) / 7)


def test_each_specimen_has_its_distance_and_where_it_left_the_path() -> None:
    found = evaluate_hierarchy(*frames(), experiment="split")
    columns = ("sampleid", "rank", "taxon", "named", "distance", "height", "parted")
    assert found.specimens.select(columns).rows() == [
        ("a", "genus", "Aus", "Aus", 0, 0, None),
        ("b", "genus", "Aus", "Bus", 2, 1, "genus"),
        ("c", "family", "Scia", "Scia", 0, 0, None),
        ("d", "genus", "Aus", "Cus", 6, 3, "order"),
        ("e", "order", "Col", "Dip", 2, 1, "order"),
        ("f", "genus", "Cus", None, 3, 3, None),
        ("g", "genus", "Dus", "Dus", 0, 0, None),
    ]
    assert found.specimens["error"].to_list() == [None] * 5 + ["truncated", None]


def test_the_operating_curve_starts_at_the_forced_paths_and_ends_in_silence() -> None:
    found = evaluate_hierarchy(*frames(), experiment="split")
    curve = found.operating
    assert curve["threshold"].to_list() == pytest.approx([0.0, 0.6, 0.8, 0.9])
    first, last = curve.row(0, named=True), curve.row(-1, named=True)
    assert first["correct_or_ancestor"] == pytest.approx(found.metrics["correct_or_ancestor"].value)
    assert first["hierarchical_recall"] == pytest.approx(found.metrics["hierarchical_recall"].value)
    # at .9 only orders: d and e are wrong
    assert last["error"] == pytest.approx(2 / 7)
    assert (last["deepest_order"], last["deepest_genus"]) == (pytest.approx(6 / 7), 0)
    assert curve["error"].is_sorted(descending=True)


def test_without_assigned_taxa_or_probabilities_the_reason_is_given() -> None:
    answers, truth = frames()
    names = answers.select("sampleid", *TASK)
    found = evaluate_hierarchy(names, truth, experiment="split")
    assert found.not_computable == {
        "assigned": "the predictions have no column assigned_rank",
        "operating": "the predictions have no probabilities of their names",
    }
    assert found.assigned_metrics == {}
    assert found.assigned.is_empty()
    assert found.operating.is_empty()
    whole = evaluate_hierarchy(*frames(), experiment="split")
    # without the column `error`, f is still without a name
    assert {n: s.value for n, s in found.metrics.items()} == {n: s.value for n, s in whole.metrics.items()}


def test_an_assigned_taxon_that_is_not_on_its_path_is_an_error() -> None:
    answers, truth = frames()
    odd = answers.with_columns(assigned_taxon=pl.col("assigned_taxon").replace("Aus", "Xus"))
    with pytest.raises(DataError, match=r"1 of 7 predictions assign a taxon .* \(first: a, genus Xus\)"):
        evaluate_hierarchy(odd, truth, experiment="split")


def test_names_beside_an_error_are_no_answer() -> None:
    answers, truth = frames()
    failed = answers.with_columns(error=pl.when(pl.col("sampleid") == "a").then(pl.lit("truncated")))
    found = evaluate_hierarchy(failed, truth, experiment="split")
    assert found.specimens.row(0)[3:6] == (None, 3, 3)  # no name; up to the root


def test_of_homonyms_only_the_right_one_is_right() -> None:
    # Oxy is a genus of two families; only the names above tell which one is meant
    truth = pl.DataFrame(
        {"sampleid": ["a", "b"], "family": ["Scia", "Syrp"], "genus": ["Oxy", "Oxy"], "split": "test"}
    )
    answers = pl.DataFrame({"sampleid": ["a", "b"], "family": ["Scia", "Scia"], "genus": ["Oxy", "Oxy"]})
    answers = answers.with_columns(assigned_rank=pl.lit("genus"), assigned_taxon=pl.col("genus"))
    found = evaluate_hierarchy(answers, truth, experiment="split")
    assert found.assigned["wrong"].to_list() == [1, 1]
    assert found.specimens["distance"].to_list() == [0, 4]


def test_names_that_no_lineage_joins_are_not_consistent() -> None:
    truth = pl.DataFrame(
        {"sampleid": ["a", "b"], "family": ["Scia", "Syrp"], "genus": ["Aus", "Bus"], "split": "test"}
    )
    answers = pl.DataFrame({"sampleid": ["a", "b"], "family": ["Scia", "Syrp"], "genus": ["Aus", "Aus"]})
    found = evaluate_hierarchy(answers, truth, experiment="split")
    assert found.metrics["consistency"].value == 0.5
    assert found.metrics["consistency"].n == 2


def test_at_each_rank_the_error_is_that_of_the_evaluation_there(tmp_path: Path) -> None:
    """Where everything is assigned, over all specimens: 1 - micro top-1 less those without a name."""
    path, catalogue = random_run(tmp_path)
    found = evaluate_hierarchy(path, catalogue)
    for rank, one in evaluate_ranks(path, catalogue, sets=()).items():
        row = found.assigned.row(by_predicate=pl.col("rank") == rank, named=True)
        silent = one.counts["failed"] + one.counts["unnamed"]
        assert row["labelled"] == one.n
        assert row["wrong"] + silent == one.n - round(one.metrics["top_1"]["micro"].value * one.n)
    assert found.metrics["consistency"].value == 1.0
    assert found.max_error == 0.05


def test_the_order_of_rows_changes_nothing(tmp_path: Path) -> None:
    path, catalogue = random_run(tmp_path)
    answers = pl.read_parquet(path)
    one = evaluate_hierarchy(answers, catalogue, experiment="split")
    two = evaluate_hierarchy(
        answers.sample(fraction=1, shuffle=True, seed=1),
        catalogue.sample(fraction=1, shuffle=True, seed=2),
        experiment="split",
    )
    assert one.assigned.equals(two.assigned)
    assert one.operating.drop("threshold").to_numpy() == pytest.approx(
        two.operating.drop("threshold").to_numpy()
    )
    assert one.specimens.equals(two.specimens.sort("sampleid"))
    assert {n: s.value for n, s in one.metrics.items()} == {n: s.value for n, s in two.metrics.items()}


LEAVES = [
    ("Arthropoda", "Insecta", "Dip", "Scia", None, None, "Aus"),
    ("Arthropoda", "Insecta", "Dip", "Scia", None, None, "Bus"),
    ("Arthropoda", "Insecta", "Dip", "Syrp", None, None, "Dus"),
    ("Arthropoda", "Insecta", "Col", "Cara"),
]


def random_run(folder: Path) -> tuple[Path, pl.DataFrame]:
    """Predictions with scores of a model of three ranks, all assigned as deep as they go; short labels."""
    rng = np.random.default_rng(5)
    n = 300
    keys = [f"s{number:03d}" for number in range(n)]
    truth, answer = rng.integers(0, 4, n), rng.integers(0, 4, n)
    answer = np.where(rng.random(n) < 0.6, truth, answer)
    failed = rng.random(n) < 0.05
    scores = np.full((n, 4), 0.1, np.float32)
    scores[np.arange(n), answer] = 0.7
    scores[failed] = np.nan
    rows: list[dict[str, Any]] = []
    labels: list[dict[str, Any]] = []
    for i, key in enumerate(keys):
        leaf = LEAVES[answer[i]]
        names = dict(zip(TASK, (leaf[2], leaf[3], leaf[6] if len(leaf) > 6 else None), strict=True))
        if failed[i]:
            names = dict.fromkeys(TASK)
        deepest = next((rank for rank in reversed(TASK) if names[rank]), None)
        rows.append(
            {"sampleid": key, "image_file": None, **names}
            | {f"{rank}_probability": 0.7 if names[rank] else None for rank in TASK}
            | {"assigned_rank": deepest, "assigned_taxon": names[deepest] if deepest else None}
            | {"assigned_probability": None, "error": "truncated" if failed[i] else None}
        )
        known = LEAVES[truth[i]]
        path = (known[2], known[3], known[6] if len(known) > 6 else None)[: rng.integers(1, 4)]
        labels.append({"sampleid": key, **dict.fromkeys(TASK), **dict(zip(TASK, path, strict=False))})
    place = folder / "p.parquet"
    record = {"rank": "genus", "ranks": TASK, "experiment": "split", "max_error": 0.05}
    with PredictionsWriter(place, ranks=TASK, leaves=LEAVES, record=record) as writer:
        writer.write(pl.DataFrame(rows, infer_schema_length=None), scores)
    return place, pl.DataFrame(labels, infer_schema_length=None).with_columns(split=pl.lit("test"))


def test_no_specimen_with_a_label_is_one_message() -> None:
    answers, truth = frames()
    with pytest.raises(RequestError, match="no column of the predictions' ranks"):
        evaluate_hierarchy(answers, truth.drop(TASK), experiment="split")
    other = truth.with_columns(sampleid=pl.lit("x") + pl.col("sampleid"))
    with pytest.raises(RequestError, match="none of the 7 specimens"):
        evaluate_hierarchy(answers, other, experiment="split")
    bare = truth.with_columns(pl.lit(None, pl.String).alias(rank) for rank in TASK)
    with pytest.raises(RequestError, match="no specimen has a name at a rank of the predictions"):
        evaluate_hierarchy(answers, bare, experiment="split")


def test_all_ranks_on_the_command_line_hold_the_hierarchy(tmp_path: Path, run_bioscan: Bioscan) -> None:
    path, truth = random_run(tmp_path)
    catalogue = tmp_path / "catalogue.parquet"
    truth.write_parquet(catalogue)
    status, text, talk = run_bioscan("evaluate", path, catalogue, "--rank", "all")
    assert (status, talk) == (0, "")
    assert "hierarchical_precision" in text
    assert "assigned taxa" in text
    assert "promised at each rank: at most 0.05 of all labelled specimens wrong" in text
    folder = tmp_path / "csv"
    told = json.loads(run_bioscan("evaluate", path, catalogue, "--rank", "all", "--json", "--csv", folder)[1])
    found = evaluate_hierarchy(path, truth)
    assert told["ranks"].keys() == set(TASK)
    assert told["hierarchy"]["n"] == found.n
    assert told["hierarchy"]["metrics"]["tree_distance"]["value"] == pytest.approx(
        found.metrics["tree_distance"].value
    )
    assert told["hierarchy"]["assigned"] == found.assigned.to_dicts()
    assert pl.read_csv(folder / "assigned.csv")["wrong"].to_list() == found.assigned["wrong"].to_list()
    assert pl.read_csv(folder / "hierarchy.csv")["answer"].unique().sort().to_list() == ["assigned", "forced"]
    assert pl.read_csv(folder / "paths.csv").height == found.n
    assert pl.read_csv(folder / "operating.csv").columns == found.operating.columns
