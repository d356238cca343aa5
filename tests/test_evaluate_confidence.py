"""What an evaluation says of confidence, rare taxa and prediction sets: by hand, by scikit-learn, by loop."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import sklearn.metrics as oracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bioscan import vocabulary
from bioscan.analysis import groups
from bioscan.app import open_set
from bioscan.data import predictions
from bioscan.data.predictions import PredictionsWriter
from bioscan.errors import RequestError
from bioscan.jobs.evaluate import Evaluation, evaluate
from bioscan.jobs.open_set import evaluate_open_set

Bioscan = Callable[..., tuple[int, str, str]]
FAMILIES = ("Sciaridae", "Syrphidae", "Culicidae", "Muscidae")
LINEAGES = [("Arthropoda", "Insecta", "Diptera", name) for name in FAMILIES]
EXPERIMENT = "split"
Run = tuple[Path, pl.DataFrame, NDArray[np.float32], NDArray[np.int64], list[str]]
"""Predictions, catalogue, scores, true classes, roles."""


def write(
    path: Path,
    keys: list[str],
    scores_NL: NDArray[np.float32],
    *,
    order: NDArray[np.int64] | None = None,
    **record: Any,
) -> Path:
    """Predictions of the four families with scores; a row of NaN is an image that failed."""
    failed = pl.Series(np.isnan(scores_NL[:, 0]))
    best = np.nan_to_num(scores_NL).argmax(axis=1)
    names = pl.Series([FAMILIES[b] for b in best]).set(failed, None)
    values = pl.Series(scores_NL.max(axis=1).astype(float)).set(failed, None)
    frame = pl.DataFrame(
        {
            "sampleid": keys,
            "image_file": [f"{key}.jpg" for key in keys],
            "family": names,
            "family_probability": values,
            "assigned_rank": "family",
            "assigned_taxon": names,
            "assigned_probability": values,
            "error": pl.Series(["truncated" if f else None for f in failed], dtype=pl.String),
        }
    )
    order = np.arange(len(keys)) if order is None else order
    record = {"rank": "family", "experiment": EXPERIMENT, **record}
    with PredictionsWriter(path, ranks=["family"], leaves=LINEAGES, record=record) as writer:
        writer.write(frame[order], scores_NL[order])
    return path


def catalogue_of(keys: list[str], families: list[str | None], roles: list[str]) -> pl.DataFrame:
    return pl.DataFrame({"sampleid": keys, "family": families, EXPERIMENT: roles, "order": "Diptera"})


def drawn(n: int, seed: int = 1) -> tuple[list[str], NDArray[np.float32], NDArray[np.int64], list[str]]:
    """Keys on plates, scores, true classes (4: a family that the model does not know) and roles."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(5, n, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    logits = rng.normal(0, 1, (n, 4))
    known = truth < 4
    logits[known, truth[known]] += 1.5
    scores = np.exp(logits)
    scores = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
    keys = [f"BIOUG{number // 10:05d}-A{number % 10 + 1:02d}" for number in range(n)]
    roles = rng.choice(["train", "validation", "test"], n, p=[0.4, 0.3, 0.3]).tolist()
    return keys, scores, truth, roles


def families(truth: NDArray[np.int64]) -> list[str | None]:
    return [(*FAMILIES, "Tipulidae")[t] for t in truth]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A random run: predictions, catalogue, and what they were made from."""
    keys, scores, truth, roles = drawn(900)
    path = write(tmp_path / "p.parquet", keys, scores)
    return path, catalogue_of(keys, families(truth), roles), scores, truth, roles


def _summing_to_one(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = scores.astype(np.float64)
    made: NDArray[np.float64] = wide / wide.sum(axis=1, keepdims=True)
    return made


# -- confidence


def test_a_temperature_of_the_rank_is_in_all_that_probabilities_are_worth(tmp_path: Path) -> None:
    # leaves by order, family, genus; Dus has no family, Orthoptera ends above it
    names = [
        ("D", "Da", "Aus"),
        ("D", "Da", "Bus"),
        ("D", None, "Dus"),
        ("D", None, "Eus"),
        ("O", None, None),
    ]
    order, family, genus = (vocabulary.RANKS.index(rank) for rank in ("order", "family", "genus"))
    leaves: list[list[str | None]] = []
    for lineage in [*names, ("D", "Db", "Cus")]:
        leaves.append([None] * (genus + 1))
        leaves[-1][order], leaves[-1][family], leaves[-1][genus] = lineage
    scores_NL = np.random.default_rng(0).dirichlet(np.ones(6), 40).astype(np.float32)
    # classes at the family: Da, Db, D without a family, O
    parts_N4 = np.stack(
        [scores_NL[:, leaf].sum(axis=1) for leaf in ([0, 1], [5], [2, 3], [4])], axis=1, dtype=np.float64
    )
    shown_N2 = (parts_N4**0.5 / (parts_N4**0.5).sum(axis=1, keepdims=True))[:, :2]
    keys = [f"s{number}" for number in range(40)]
    frame = pl.DataFrame(
        {
            "sampleid": keys,
            "family": [("Da", "Db")[best] for best in shown_N2.argmax(axis=1)],
            "family_probability": shown_N2.max(axis=1),
        }
    ).with_columns(
        pl.lit(None, pl.String).alias(column)
        for column in ("image_file", "assigned_rank", "assigned_taxon", "assigned_probability", "error")
    )
    record = {"rank": "family", "ranks": ["order", "family", "genus"], "rank_temperatures": {"family": 2.0}}
    path = tmp_path / "p.parquet"
    with PredictionsWriter(
        path, ranks=["family"], leaves=leaves, record={**record, "experiment": EXPERIMENT}
    ) as writer:
        writer.write(frame, scores_NL)
    truth = np.arange(40) % 2
    catalogue = catalogue_of(
        keys, [("Da", "Db")[t] for t in truth], ["validation" if n < 20 else "test" for n in range(40)]
    )
    found = evaluate(path, catalogue, sets=["lac"])
    assert found.confidence is not None
    assert found.confidence.nll is not None
    likely = shown_N2[np.arange(40), truth]
    assert found.confidence.nll.value == pytest.approx(-np.log(likely[20:]).mean(), abs=1e-6)
    assert found.sets["threshold"][0] == pytest.approx(np.sort(1 - likely[:20])[18], abs=1e-6)


# Five test specimens, the surest first: right .9, wrong .8, right .8, right .6; the last image failed.
BY_HAND = np.array(
    [[0.9, 0.1, 0, 0], [0.8, 0.2, 0, 0], [0.8, 0, 0.2, 0], [0.2, 0.6, 0.2, 0], [np.nan] * 4], np.float32
)
TRUE = ["Sciaridae", "Syrphidae", "Sciaridae", "Syrphidae", "Sciaridae"]


@pytest.fixture
def by_hand(tmp_path: Path) -> Evaluation:
    keys = list("abcde")
    path = write(tmp_path / "p.parquet", keys, BY_HAND)
    return evaluate(path, catalogue_of(keys, list(TRUE), ["test"] * 5))


def test_confidence_is_as_worked_out_by_hand(by_hand: Evaluation) -> None:
    found = by_hand.confidence
    assert found is not None
    assert (found.n, found.answered) == (5, 4)
    assert found.mean == pytest.approx((0.9 + 0.8 + 0.8 + 0.6) / 4)
    assert found.accuracy == pytest.approx(3 / 4)
    # bins of 1/15: .9 alone, both .8 together (one of two right), .6 alone
    assert found.ece == pytest.approx((abs(1 - 0.9) + 2 * abs(0.5 - 0.8) + abs(1 - 0.6)) / 4, abs=1e-6)
    # Brier: (.1² + .1²), (.8² + .8²), (.2² + .2²), (.2² + .4² + .2²)
    assert found.brier is not None
    assert found.nll is not None
    assert found.brier.value == pytest.approx((0.02 + 1.28 + 0.08 + 0.24) / 4, abs=1e-6)
    assert found.nll.value == pytest.approx(-sum(map(math.log, (0.9, 0.2, 0.8, 0.6))) / 4, abs=1e-6)
    # risk: 0/1; the two of .8 in either order (1/2 or 0/2, then 1/3); 1/4; the failed one is wrong: 2/5
    assert found.aurc == pytest.approx((0 + 1 / 4 + 1 / 3 + 1 / 4 + 2 / 5) / 5)
    assert found.aurc_best == pytest.approx((0 + 0 + 0 + 1 / 4 + 2 / 5) / 5)
    assert found.coverage_at[0.05] == pytest.approx(1 / 5)
    assert found.risk_coverage.select("coverage", "n", "risk").rows() == [
        (1 / 5, 1, 0.0),
        (3 / 5, 3, 1 / 3),
        (4 / 5, 4, 1 / 4),
        (1.0, 5, 2 / 5),
    ]
    assert found.risk_coverage["threshold"].to_list() == pytest.approx([0.9, 0.8, 0.6, None])
    assert found.reliability.select("n", "accuracy").rows() == [(1, 1.0), (2, 0.5), (1, 1.0)]


def test_brier_and_likelihood_are_scikit_learns_and_the_classwise_error_a_loops(
    run: Run,
) -> None:
    path, catalogue, scores, truth, roles = run
    found = evaluate(path, catalogue).confidence
    assert found is not None
    assert found.brier is not None
    assert found.nll is not None
    test = np.array(roles) == "test"
    known = test & (truth < 4)
    one_hot = np.eye(5)[truth[test]]
    wide = np.column_stack([scores[test], np.zeros(test.sum())])
    assert found.brier.value == pytest.approx(((wide - one_hot) ** 2).sum(axis=1).mean(), abs=1e-6)
    assert found.nll.value == pytest.approx(
        oracle.log_loss(truth[known], _summing_to_one(scores[known]), labels=range(4)), abs=1e-5
    )
    assert (found.brier.n, found.nll.n) == (test.sum(), known.sum())
    errors = []
    for taxon in range(4):
        p, right = scores[test, taxon].astype(float), truth[test] == taxon
        bins = np.minimum((p * 15).astype(int), 14)
        errors.append(
            sum(
                abs(right[bins == b].mean() - p[bins == b].mean()) * (bins == b).mean()
                for b in np.unique(bins)
            )
        )
    assert found.ece_classwise == pytest.approx(np.mean(errors), abs=1e-6)
    half = 1.959964 * np.std(((wide - one_hot) ** 2).sum(axis=1), ddof=1) / math.sqrt(test.sum())
    assert found.brier.high - found.brier.value == pytest.approx(half, rel=1e-4)


def test_without_probabilities_there_is_no_confidence_and_a_reason() -> None:
    answers = pl.DataFrame({"sampleid": ["a", "b"], "family": ["Sciaridae", "Sciaridae"]})
    truth = catalogue_of(["a", "b"], ["Sciaridae", "Muscidae"], ["test", "test"])
    found = evaluate(answers, truth, experiment=EXPERIMENT)
    assert found.confidence is None
    assert "family_probability" in found.not_computable["confidence"]
    assert found.to_dict()["confidence"] is None


def test_without_scores_confidence_is_that_of_the_answers_alone(by_hand: Evaluation) -> None:
    answers = by_hand.specimens.select("sampleid", family="named", family_probability="probability")
    truth = catalogue_of(list("abcde"), list(TRUE), ["test"] * 5)
    alone = evaluate(answers, truth, experiment=EXPERIMENT)
    assert alone.confidence is not None
    assert by_hand.confidence is not None
    assert (alone.confidence.brier, alone.confidence.nll, alone.confidence.ece_classwise) == (None,) * 3
    assert alone.confidence.ece == pytest.approx(by_hand.confidence.ece)
    assert alone.confidence.aurc == by_hand.confidence.aurc
    assert {"brier", "nll", "ece_classwise", "sets"} <= alone.not_computable.keys()


# -- buckets


def test_taxa_fall_into_buckets_by_their_training_specimens() -> None:
    # training: Sciaridae 101, Syrphidae 100, Culicidae 20, Muscidae 19, Tipulidae none
    training = dict(zip(FAMILIES, (101, 100, 20, 19), strict=True))
    rows = [(name, "train") for name, count in training.items() for _ in range(count)]
    test = [("Sciaridae", "Sciaridae"), ("Sciaridae", "Muscidae"), ("Syrphidae", "Syrphidae")]
    test += [("Culicidae", "Culicidae"), ("Culicidae", "Sciaridae"), ("Muscidae", "Muscidae")]
    test += [("Tipulidae", "Sciaridae")]
    rows += [(truth, "test") for truth, _ in test]
    keys = [f"s{number}" for number in range(len(rows))]
    catalogue = catalogue_of(keys, [name for name, _ in rows], [role for _, role in rows])
    answers = pl.DataFrame({"sampleid": keys[-7:], "family": [named for _, named in test]})
    found = evaluate(answers, catalogue, experiment=EXPERIMENT).buckets
    shown = found.select("bucket", "at_least", "at_most", "taxa", "specimens", "micro", "macro")
    assert shown.rows() == [
        ("many", 101, None, 1, 2, 0.5, 0.5),
        ("medium", 20, 100, 2, 3, 2 / 3, 0.75),  # Syrphidae 1 of 1, Culicidae 1 of 2
        ("few", 1, 19, 1, 1, 1.0, 1.0),
        ("unseen", 0, 0, 1, 1, 0.0, 0.0),
    ]
    other = evaluate(answers, catalogue, experiment=EXPERIMENT, buckets=(5, 19)).buckets
    assert other["bucket"].to_list() == ["many", "medium", "unseen"]
    assert other.filter(bucket="medium").select("at_least", "at_most", "taxa").row(0) == (5, 19, 1)


def test_without_training_specimens_there_are_no_buckets_and_a_reason(by_hand: Evaluation) -> None:
    assert by_hand.buckets.is_empty()
    assert "no training specimens" in by_hand.not_computable["buckets"]


def test_the_buckets_share_out_all_specimens(
    run: Run,
) -> None:
    path, catalogue, *_ = run
    found = evaluate(path, catalogue)
    assert found.buckets["specimens"].sum() == found.n
    right = (found.buckets["micro"] * found.buckets["specimens"]).sum()
    assert right / found.n == pytest.approx(found.metrics["top_1"]["micro"].value)
    # Tipulidae has training specimens in the catalogue, though the model does not know it
    assert "unseen" not in found.buckets["bucket"].to_list()


# -- prediction sets


def by_loop(
    scores: NDArray[np.float32],
    truth: NDArray[np.int64],
    calibrates: NDArray[np.bool_],
    test: NDArray[np.bool_],
) -> tuple[float, list[int], list[bool]]:
    """LAC as its definition has it: threshold, sizes of the sets, who is covered."""
    worst = sorted(
        1 - float(row[t]) if t < 4 else math.inf
        for row, t in zip(scores[calibrates], truth[calibrates], strict=True)
    )
    place = math.ceil((len(worst) + 1) * 0.9)
    threshold = worst[place - 1] if place <= len(worst) else math.inf
    made = [{k for k in range(4) if 1 - float(row[k]) <= threshold} for row in scores[test]]
    return (
        threshold,
        [len(one) for one in made],
        [t in one for one, t in zip(made, truth[test], strict=True)],
    )


def test_lac_sets_are_those_of_the_definition(
    run: Run,
) -> None:
    path, catalogue, scores, truth, roles = run
    validation, test = (np.array(roles) == role for role in ("validation", "test"))
    threshold, sizes, covered = by_loop(scores, truth, validation, test)
    found = evaluate(path, catalogue, sets=["lac"])
    row = found.sets.row(0, named=True)
    assert row["threshold"] == pytest.approx(threshold, abs=1e-6)
    assert (row["n"], row["calibration"]) == (test.sum(), validation.sum())
    assert row["coverage"] == pytest.approx(np.mean(covered))
    assert row["mean_size"] == pytest.approx(np.mean(sizes))
    assert row["median_size"] == np.median(sizes)
    assert row["empty"] == sizes.count(0)
    by_taxon = pl.DataFrame({"t": truth[test], "c": covered}).group_by("t").agg(pl.col("c").mean())
    assert row["macro_coverage"] == pytest.approx(by_taxon["c"].mean())
    counted = {size: sizes.count(size) for size in sorted(set(sizes))}
    assert dict(found.set_sizes.select("size", "specimens").iter_rows()) == counted
    assert "all validation specimens" in row["warnings"][0]


def test_sets_are_calibrated_on_the_part_that_the_temperature_does_not_come_from(tmp_path: Path) -> None:
    keys, scores, truth, roles = drawn(900)
    cut = {"group": "plate", "share": 0.5, "seed": 0}
    path = write(tmp_path / "p.parquet", keys, scores, calibration_cut=cut)
    names, _ = groups.groups_of(pl.DataFrame({"sampleid": keys}), "plate")
    calibrates = (np.array(roles) == "validation") & groups.cut(names, 0.5, 0)
    threshold, _, covered = by_loop(scores, truth, calibrates, np.array(roles) == "test")
    row = evaluate(path, catalogue_of(keys, families(truth), roles), sets=["lac"]).sets.row(0, named=True)
    assert row["calibration"] == calibrates.sum() < (np.array(roles) == "validation").sum()
    assert row["groups"] == names.filter(pl.Series(calibrates)).n_unique()
    assert row["threshold"] == pytest.approx(threshold, abs=1e-6)
    assert row["coverage"] == pytest.approx(np.mean(covered))
    # a calibration made after the training may have cut them otherwise: of the epoch nothing is said
    assert row["warnings"][0].endswith("that the temperature does not come from (cut by plate)")


def test_without_the_column_of_the_groups_there_are_no_sets_but_all_other_scores(tmp_path: Path) -> None:
    keys, scores, truth, roles = drawn(300)
    catalogue = catalogue_of(keys, families(truth), roles)
    for group, column in (("bin", "uri"), ("trap", "trap")):
        cut = {"group": group, "share": 0.5, "seed": 0}
        path = write(tmp_path / f"{group}.parquet", keys, scores, calibration_cut=cut)
        found = evaluate(path, catalogue)
        assert found.sets.is_empty()
        assert f"has no column '{column}', which the model's" in found.not_computable["sets"]
        assert found.metrics["top_1"]["micro"].n == found.n


def test_every_method_covers_about_what_was_asked(
    run: Run,
) -> None:
    path, catalogue, *_ = run
    methods = ("lac", "aps", "raps", "pas", "mondrian")
    found = evaluate(path, catalogue, sets=methods, coverage=0.8)
    assert found.sets["method"].to_list() == list(methods)
    others = found.sets.filter(pl.col("method") != "mondrian")  # which promises nothing for unknown taxa
    # 270 test and calibration specimens: a standard error of .024 each
    assert others["coverage"].to_list() == pytest.approx([0.8] * 4, abs=0.1)
    assert found.set_sizes.group_by("method").agg(pl.col("specimens").sum())["specimens"].to_list() == (
        [found.n] * 5
    )
    means = found.set_sizes.group_by("method", maintain_order=True).agg(
        (pl.col("size") * pl.col("specimens")).sum() / pl.col("specimens").sum()
    )
    assert means["size"].to_list() == pytest.approx(found.sets["mean_size"].to_list())


def test_the_specimens_that_calibrate_are_not_the_ones_evaluated(
    run: Run,
) -> None:
    path, catalogue, *_ = run
    found = evaluate(path, catalogue, role="validation")
    assert found.sets.is_empty()
    assert found.set_sizes.is_empty()
    assert "are the ones that are evaluated" in found.not_computable["sets"]
    none = evaluate(path, catalogue, experiment="none")
    assert "there are none with scores" in none.not_computable["sets"]


def test_methods_that_need_training_counts_say_so(tmp_path: Path) -> None:
    keys, scores, truth, _ = drawn(200)
    roles = ["validation", "test"] * 100
    path = write(tmp_path / "p.parquet", keys, scores)
    found = evaluate(path, catalogue_of(keys, families(truth), roles))
    assert found.sets["method"].to_list() == ["lac"]
    assert {"sets by pas", "sets by mondrian"} <= found.not_computable.keys()


def test_too_few_validation_specimens_put_every_taxon_in_every_set(tmp_path: Path) -> None:
    keys, scores, truth, _ = drawn(60)
    roles = ["validation"] * 5 + ["test"] * 55
    path = write(tmp_path / "p.parquet", keys, scores)
    found = evaluate(path, catalogue_of(keys, families(truth), roles), sets=["lac"])
    assert found.set_sizes.rows() == [("lac", 4, 55)]
    assert "too few" in found.sets["warnings"][0][1]
    assert math.isinf(found.sets["threshold"][0])


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_may_come_in_any_order_and_in_small_batches(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    keys, scores, truth, roles = drawn(240, seed)
    scores[::17] = np.nan
    catalogue = catalogue_of(keys, families(truth), roles)
    folder = tmp_path_factory.mktemp("order")
    order = np.random.default_rng(seed).permutation(len(keys))
    methods = ("lac", "aps", "raps", "pas", "mondrian")
    one = evaluate(write(folder / "one.parquet", keys, scores), catalogue, sets=methods)
    shuffled = write(folder / "two.parquet", keys, scores, order=order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions, "_HELD", 0)
        patch.setattr(predictions, "_BATCH", 100)
        two = evaluate(shuffled, catalogue, sets=methods)
    assert one.confidence is not None
    assert two.confidence is not None
    assert one.sets.equals(two.sets)
    assert one.set_sizes.equals(two.set_sizes)
    assert one.buckets.equals(two.buckets)
    for name in ("ece", "ece_mass", "ece_classwise", "aurc"):
        assert getattr(two.confidence, name) == pytest.approx(getattr(one.confidence, name), abs=1e-9)
    assert two.confidence.brier is not None
    assert one.confidence.brier is not None
    assert two.confidence.brier.value == pytest.approx(one.confidence.brier.value)


# -- the command line


def test_the_text_tells_confidence_buckets_and_sets(
    run: Run,
    tmp_path: Path,
    run_bioscan: Bioscan,
) -> None:
    path, catalogue, *_ = run
    place = tmp_path / "catalogue.parquet"
    catalogue.write_parquet(place)
    status, text, talk = run_bioscan("evaluate", path, place, "--sets", "lac", "aps", "--coverage", 0.8)
    assert (status, talk) == (0, "")
    assert "calibration error" in text
    assert "Brier score" in text
    assert "training specimens" in text
    assert "few (1 to 19)" in text
    lines = text.splitlines()
    rows = [line.split() for line in lines if line.startswith(("lac ", "aps "))]
    assert [row[1] for row in rows] == ["0.8000", "0.8000"]
    assert "calibrated on all validation specimens, also those that chose the epoch" in lines
    without = run_bioscan("evaluate", path, place, "--sets", "none", "--json")[1]
    told = json.loads(without)
    assert told["sets"] == told["set_sizes"] == []
    assert "sets" not in told["not_computable"]
    assert told["confidence"]["coverage_at"].keys() == {"0.01", "0.02", "0.05", "0.1"}
    assert told["confidence"]["brier"].keys() == {"value", "low", "high", "n", "classes"}
    assert told["buckets"][0]["bucket"] in ("many", "medium")


def test_the_csv_tables_are_those_of_the_evaluation(
    run: Run,
    tmp_path: Path,
    run_bioscan: Bioscan,
) -> None:
    path, catalogue, *_ = run
    place, folder = tmp_path / "catalogue.parquet", tmp_path / "csv"
    catalogue.write_parquet(place)
    found = evaluate(path, catalogue)
    assert found.confidence is not None
    assert run_bioscan("evaluate", path, place, "--csv", folder)[0] == 0
    assert pl.read_csv(folder / "set_sizes.csv").equals(found.set_sizes)
    assert pl.read_csv(folder / "buckets.csv")["specimens"].to_list() == found.buckets["specimens"].to_list()
    assert pl.read_csv(folder / "reliability.csv")["n"].sum() == found.confidence.answered
    sets = pl.read_csv(folder / "sets.csv")
    assert sets["warnings"].to_list() == ["; ".join(told) for told in found.sets["warnings"].to_list()]


def test_the_open_set_has_its_own_output(run: Run, tmp_path: Path, run_bioscan: Bioscan) -> None:
    path, catalogue, *_ = run
    place = tmp_path / "catalogue.parquet"
    catalogue.write_parquet(place)
    status, text, _ = run_bioscan("evaluate", path, place, "--open-set", "--json", "--csv", tmp_path / "csv")
    told = json.loads(text)
    told.pop("schema_version")
    found = evaluate_open_set(path, catalogue)
    assert (status, told.keys()) == (0, found.to_dict().keys())
    assert {place.stem for place in (tmp_path / "csv").iterdir()} == open_set.csv_tables(found).keys()
    status, shown, talk = run_bioscan("evaluate", path, place, "--open-set")
    assert (status, shown.rstrip("\n"), talk) == (0, open_set.text(found), "")


def test_a_wrong_request_is_told_before_anything_is_read() -> None:
    for wrong in ({"sets": ["lacc"]}, {"coverage": 1.0}, {"buckets": (0, 10)}, {"ks": ()}):
        with pytest.raises(RequestError):
            evaluate("absent.parquet", "absent.csv", **wrong)
