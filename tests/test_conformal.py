"""Conformal sets: thresholds by hand, sets by sorting, coverage against its exact distribution."""

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from bioscan.analysis.conformal import (
    METHODS,
    RAPS_FREE,
    RAPS_PENALTY,
    Calibrated,
    Truth,
    calibrate,
    contains,
    covering_node,
    frequency_bins,
    least_records,
    macro_coverage,
    prior,
    sets,
    truth_of,
    uniforms,
)
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import RequestError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def of(probabilities: list[float], classes: list[int] | None = None) -> Truth:
    """Records with these probabilities of their true classes, each the most probable."""
    values = np.array(probabilities)
    zeros = np.zeros(values.size)
    numbers = np.array(classes if classes is not None else zeros, np.int64)
    return Truth(values, zeros, zeros.astype(np.int64), numbers)


def long_tailed(seed: int, n: int, *, classes: int = 60, spread: float = 1.0) -> tuple[Floats, Ints, Floats]:
    """Probabilities, true classes and shares of a classifier that knows the distribution: normal clouds."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, classes + 1) ** 1.2
    shares /= shares.sum()
    centres = rng.normal(0, spread, (classes, 16))
    truth = rng.choice(classes, n, p=shares)
    features = centres[truth] + rng.normal(0, 1, (n, 16))
    logits = features @ centres.T - (centres**2).sum(axis=1) / 2 + np.log(shares)
    values = np.exp(logits - logits.max(axis=1, keepdims=True))
    return values / values.sum(axis=1, keepdims=True), truth, shares


def needs(method: str, classes: int, shares: Floats | None = None) -> dict[str, Any]:
    """What the method needs beside the records."""
    if method == "pas":
        return {"prior_K": np.full(classes, 1 / classes) if shares is None else shares}
    return {"bin_K": np.arange(classes) * 3 // classes} if method == "mondrian" else {}


# -- thresholds


def test_the_threshold_is_the_score_at_the_place_that_the_promise_asks_for() -> None:
    truth = of([0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    # ceil(10 × 0.9) = 9, the largest of nine scores; ceil(10 × 0.8) = 8; ceil(10 × 0.75) = 8
    assert calibrate("lac", truth, error=0.1).threshold == pytest.approx(0.8)
    assert calibrate("lac", truth, error=0.2).threshold == pytest.approx(0.7)
    assert calibrate("lac", truth, error=0.25).threshold == pytest.approx(0.7)


@pytest.mark.parametrize(("error", "least"), [(0.1, 9), (0.05, 19), (0.02, 49), (0.3, 3), (0.5, 1)])
def test_with_fewer_records_than_the_promise_needs_every_class_is_in_every_set(
    error: float, least: int
) -> None:
    assert least_records(error) == least
    assert math.isfinite(calibrate("lac", of([0.5] * least), error=error).threshold)
    found = calibrate("lac", of([0.5] * (least - 1)), error=error)
    assert found.threshold == math.inf
    assert any("too few for coverage" in warning for warning in found.warnings)
    assert sets(found, np.array([[0.9, 0.1, 0.0]])).all()


def test_the_score_of_each_method_is_that_of_its_paper() -> None:
    probabilities = np.array([[0.1, 0.4, 0.3, 0.15, 0.02, 0.02, 0.01]] * 9)
    uniform = np.full(9, 0.25)
    truth = truth_of(probabilities, np.full(9, 5))  # after 1, 2, 3, 0 and, its equal, 4
    shares = np.array([0.3, 0.2, 0.1, 0.1, 0.1, 0.05, 0.15])
    aps = 0.4 + 0.3 + 0.15 + 0.1 + 0.02 + 0.75 * 0.02
    expected = {
        "lac": 0.98,
        "aps": aps,
        "raps": aps + RAPS_PENALTY * (6 - RAPS_FREE),
        "pas": -0.02 / 0.05,
        "mondrian": 0.98,
    }
    for method, score in expected.items():
        found = calibrate(method, truth, error=0.1, uniform_N=uniform, **needs(method, 7, shares))
        assert found.threshold == pytest.approx(score), method


def test_what_the_model_cannot_name_is_never_covered_and_counts_against_the_promise() -> None:
    known = [0.05 * number for number in range(1, 20)]
    some = of([*known, 0.0], [*[0] * 19, -1])
    # ceil(21 × 0.8) = 17 of 20 scores, one of them inf: the 17th of the known, p = 0.15
    found = calibrate("lac", some, error=0.2)
    assert found.threshold == pytest.approx(0.85)
    assert any("cannot name the taxon: no set covers it" in warning for warning in found.warnings)
    many = calibrate(
        "lac", of([*known, *[0.0] * 5], [*[0] * 19, *[-1] * 5]), error=0.2
    )  # ceil(25 × 0.8) = 20
    assert many.threshold == math.inf
    assert any("of 5 of 24" in warning and "out of reach" in warning for warning in many.warnings)
    np.testing.assert_array_equal(contains(np.ones((3, 2), bool), np.array([0, 2, -1])), [True, False, False])


def test_mondrian_rests_on_the_records_that_the_model_can_name_alone_and_says_so() -> None:
    known = [0.05 * number for number in range(1, 20)]
    truth = of([*known, *[0.0] * 5], [*[0] * 19, *[-1] * 5])
    found = calibrate("mondrian", truth, error=0.2, bin_K=np.zeros(2, np.int64))
    assert found.n == 19
    assert found.threshold == pytest.approx(0.8)  # ceil(20 × 0.8) = 16: p = 0.2
    assert any("of 5 of 24" in w and "nothing is promised for specimens" in w for w in found.warnings)
    few = calibrate("mondrian", truth, error=0.04, bin_K=np.zeros(2, np.int64))  # takes 24
    assert any(w.startswith("19 calibration records are too few") for w in few.warnings)


def test_a_bin_with_too_few_records_shares_those_of_other_small_bins_and_says_so() -> None:
    # bin 0: four records, bin 1: six, bin 2: ninety; at error 0.1 nine are needed
    values = [*[0.1, 0.2, 0.3, 0.4], *[0.5] * 6, *[0.9] * 90]
    truth = of(values, [*[0] * 4, *[1] * 6, *[2] * 90])
    found = calibrate("mondrian", truth, error=0.1, bin_K=np.arange(3))
    # ceil(11 × 0.9) = 10 of ten: p = 0.1
    assert [(b.n, round(b.threshold, 12), b.joined) for b in found.bins] == [
        (4, 0.9, (0, 1)),
        (6, 0.9, (0, 1)),
        (90, 0.1, (2,)),
    ]
    assert any("2 of 3 bins" in w and "2 bins together (10 records)" in w for w in found.warnings)
    assert sets(found, np.array([[0.1, 0.09, 0.85]])).tolist() == [[True, False, False]]


def test_small_bins_that_are_too_few_together_share_those_of_the_smallest_other() -> None:
    truth = of([*[0.2] * 3, *[0.5] * 20, *[0.9] * 90], [*[0] * 3, *[1] * 20, *[2] * 90])
    found = calibrate("mondrian", truth, error=0.1, bin_K=np.arange(3))
    assert [b.joined for b in found.bins] == [(0, 1), (0, 1), (2,)]
    alone = calibrate("mondrian", of([0.2] * 3), error=0.1, bin_K=np.arange(3))
    assert [b.threshold for b in alone.bins] == [math.inf] * 3
    assert any("so have all together" in warning for warning in alone.warnings)


def test_taxa_with_too_few_records_are_counted_in_a_warning() -> None:
    found = calibrate("lac", of([0.5] * 30, [*[0] * 20, *[1] * 8, *[2] * 2]), error=0.1)
    assert any("2 of 3 taxa have fewer than 9" in warning for warning in found.warnings)
    assert calibrate("lac", of([0.5] * 30), error=0.1).warnings == ()


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("lak", {}, "unknown method of prediction sets 'lak'; did you mean 'lac'"),
        ("lac", {"error": 0.0}, "between 0 and 1, not 1"),
        ("lac", {"error": 1.0}, "between 0 and 1"),
        ("pas", {}, "pas needs the share of each taxon"),
        ("pas", {"prior_K": np.array([1.0, 0.0])}, "above 0"),
        ("mondrian", {}, "mondrian needs the bin"),
    ],
)
def test_a_request_that_cannot_be_met_says_why(method: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        calibrate(method, of([0.5] * 20), **({"error": 0.1} | changes))


# -- where the truth stands


TABLES = st.integers(1, 6).flatmap(
    lambda classes: st.lists(
        st.tuples(st.lists(st.integers(0, 5), min_size=classes, max_size=classes), st.integers(-1, classes)),
        min_size=1,
        max_size=12,
    )
)


def table(rows: list[tuple[list[int], int]]) -> tuple[NDArray[np.float32], Ints]:
    """Probabilities with many ties, sums below 1 among them, and targets of which some are unknown."""
    return np.array([row for row, _ in rows], np.float32) / np.float32(32), np.array(
        [target for _, target in rows]
    )


def with_rest(row: NDArray[Any]) -> list[float]:
    """What the row falls short of 1 as a last class."""
    rest = 1 - sum(map(float, row))
    return [*map(float, row), *([rest] if rest > 1e-5 else [])]


@settings(max_examples=60, deadline=None)
@given(TABLES)
def test_the_place_of_the_truth_is_the_one_in_descending_order(rows: list[tuple[list[int], int]]) -> None:
    probabilities, targets = table(rows)
    found = truth_of(probabilities, targets)
    classes = probabilities.shape[1]
    for number, (row, target) in enumerate(zip(map(with_rest, probabilities), targets, strict=True)):
        made = found.probability_N[number], found.before_N[number], found.place_N[number]
        if 0 <= target < classes:
            order = sorted(range(len(row)), key=lambda k: (-row[k], k))
            place = order.index(target)
            assert made == (row[target], pytest.approx(sum(row[k] for k in order[:place])), place)
        else:
            assert made == (0, 1, classes)


def test_what_a_row_falls_short_of_one_is_a_class_that_is_no_answer() -> None:
    # taxa that end above the rank hold 0.6 of the first row and 0.02 of the second
    rows = np.array([[0.1, 0.3], [0.9, 0.08]])
    truth = truth_of(rows, np.array([0, 0]))
    assert truth.before_N.tolist() == pytest.approx([0.9, 0])
    assert truth.place_N.tolist() == [2, 0]
    known = Calibrated("aps", 0.1, 99, 0.85)
    found = sets(known, rows, np.zeros(2))
    # first row: 0.6 comes first, then 0.6 + 0.3 is above 0.85: nothing that has a name; second: 0.9 is above
    assert found.tolist() == [[False, False], [False, False]]
    assert sets(Calibrated("aps", 0.1, 99, 0.92), rows, np.zeros(2)).tolist() == [
        [False, True],
        [True, False],
    ]
    whole = np.column_stack([rows, 1 - rows.sum(axis=1)])
    for threshold in (0.5, 0.7, 0.95, 0.99):
        one = Calibrated("raps", 0.1, 99, threshold)
        numbers = np.array([0.2, 0.7])
        assert (sets(one, rows, numbers) == sets(one, whole, numbers)[:, :2]).all()


def test_blocks_of_records_joined_are_the_records() -> None:
    probabilities, truth, _ = long_tailed(1, 50)
    whole = truth_of(probabilities, truth)
    parts = Truth.concat([truth_of(probabilities[i : i + 7], truth[i : i + 7]) for i in range(0, 50, 7)])
    for column in ("probability_N", "before_N", "place_N", "class_N"):
        np.testing.assert_array_equal(getattr(parts, column), getattr(whole, column))


def test_a_record_without_a_prediction_is_one_that_no_set_covers() -> None:
    probabilities = np.array([[np.nan, np.nan], [0.6, 0.4]])
    found = truth_of(probabilities, np.array([0, 1]))
    assert found.class_N.tolist() == [-1, 1]
    for method in METHODS:
        plenty = truth_of(np.full((30, 2), 0.5), np.zeros(30, np.int64))
        calibrated = calibrate(method, plenty, error=0.1, **needs(method, 2))
        for never_empty in (False, True):
            made = sets(calibrated, probabilities, np.array([0.5, 0.5]), never_empty=never_empty)
            assert not made[0].any(), method


# -- sets


def by_sorting(found: Calibrated, row: NDArray[Any], uniform: float) -> list[bool]:
    """The set of a specimen by the definition of the scores, class by class."""
    whole = with_rest(row) if found.method in ("aps", "raps") else row
    order = sorted(range(len(whole)), key=lambda k: (-whole[k], k))
    made = []
    for k in range(row.size):
        place = order.index(k)
        score = 1 - float(row[k])
        limit = found.threshold if found.threshold_K is None else found.threshold_K[k]
        if found.method == "pas":
            assert found.prior_K is not None
            score = -float(row[k]) / found.prior_K[k]
        if found.method in ("aps", "raps"):
            score = sum(float(whole[j]) for j in order[:place]) + (1 - uniform) * float(row[k])
            limit += 1e-9
        if found.method == "raps":
            score += RAPS_PENALTY * max(0, place + 1 - RAPS_FREE)
        made.append(bool(score <= limit))
    return made


@settings(max_examples=150, deadline=None)
@given(TABLES, st.sampled_from(METHODS), st.floats(0, 0.999), st.floats(-0.2, 1.3))
def test_sets_are_those_of_a_sort_of_each_row(
    rows: list[tuple[list[int], int]], method: str, uniform: float, threshold: float
) -> None:
    probabilities, _ = table(rows)
    classes = probabilities.shape[1]
    found = Calibrated(
        method,
        0.1,
        9,
        -8 * threshold if method == "pas" else threshold,
        threshold_K=np.linspace(threshold - 0.1, threshold, classes) if method == "mondrian" else None,
        prior_K=np.linspace(0.05, 0.2, classes) if method == "pas" else None,
    )
    expected = [by_sorting(found, row, uniform) for row in probabilities]
    assert sets(found, probabilities, np.full(len(rows), uniform)).tolist() == expected


@pytest.mark.parametrize("threshold", [0.3, 0.9, 0.999, 0.9999999, 1.0, math.inf])
def test_cumulated_sets_of_many_classes_are_those_of_a_sort(threshold: float) -> None:
    # from one class that has nearly everything to thousands that have the same
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 1, (40, 3000)) * np.linspace(0, 9, 40)[:, None]
    values = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = (values / values.sum(axis=1, keepdims=True)).astype(np.float32)
    uniform = rng.random(40)
    found = sets(Calibrated("aps", 0.1, 9, threshold), probabilities, uniform)
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ordered = np.take_along_axis(probabilities, order, axis=1).astype(np.float64)
    scores = np.cumsum(ordered, axis=1) - uniform[:, None] * ordered
    expected = np.zeros(found.shape, bool)
    np.put_along_axis(expected, order, scores <= threshold + 1e-9, axis=1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_set_does_not_depend_on_the_specimens_beside_it(method: str) -> None:
    probabilities, truth, shares = long_tailed(2, 400)
    calibrated = calibrate(
        method, truth_of(probabilities[:200], truth[:200]), error=0.1, **needs(method, 60, shares)
    )
    keys = [f"S{number}" for number in range(200)]
    whole = sets(calibrated, probabilities[200:], uniforms(keys, 3))
    parts = [
        sets(calibrated, probabilities[200 + i : 200 + i + 33], uniforms(keys[i : i + 33], 3))
        for i in range(0, 200, 33)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert whole.any(axis=1).mean() > 0.8


def test_numbers_of_keys_are_uniform_repeatable_and_differ_by_seed() -> None:
    drawn = uniforms(range(20_000))
    assert stats.kstest(drawn, "uniform").pvalue > 0.001
    assert drawn.min() >= 0
    assert drawn.max() < 1
    np.testing.assert_array_equal(uniforms(["7", "9"]), drawn[[7, 9]])  # by the text of the key
    assert not np.isin(uniforms(range(100), seed=1), drawn[:100]).any()
    # printf '0\\0a' | b2sum -l 64 gives 15d8d767d2a6ebd3, read from its last byte
    assert uniforms(["a"])[0] == pytest.approx(0xD3EBA6D267D7D815 / 2**64, abs=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_a_set_that_would_be_empty_gets_the_class_that_fits_best(method: str) -> None:
    probabilities = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    shares = np.array([0.8, 0.1, 0.1])
    strict = Calibrated(
        method,
        0.9,
        9,
        -7.9 if method == "pas" else 0.25,
        threshold_K=np.full(3, 0.25) if method == "mondrian" else None,
        prior_K=shares if method == "pas" else None,
    )
    uniform = np.full(2, 0.0)
    plain = sets(strict, probabilities, uniform)
    filled = sets(strict, probabilities, uniform, never_empty=True)
    assert not plain[0].any()
    assert filled[0].tolist() == ([False, True, False] if method == "pas" else [True, False, False])
    assert (filled >= plain).all()
    assert filled.any(axis=1).all()


def test_cumulated_sets_without_their_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="one uniform number per specimen"):
        sets(Calibrated("aps", 0.1, 9, 0.5), np.array([[0.5, 0.5]]))


# -- the promise


SPLITS, RECORDS, TESTED = 120, 199, 400


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [0.1, 0.05])
def test_coverage_over_random_splits_has_its_exact_distribution(method: str, error: float) -> None:
    # Of TESTED specimens, the covered ones are Beta-binomial with parameters k, n + 1 - k (scores without
    # ties): the mean over splits within 4 standard errors, and no split outside the 1 - 1e-6 interval.
    place = math.ceil((RECORDS + 1) * (1 - error))
    law = stats.betabinom(TESTED, place, RECORDS + 1 - place)
    covered = []
    for split in range(SPLITS):
        probabilities, truth, shares = long_tailed(split, RECORDS + TESTED, classes=12)
        rng = np.random.default_rng(1000 + split)
        kind = {"bin_K": np.zeros(12, np.int64)} if method == "mondrian" else needs(method, 12, shares)
        known = truth_of(probabilities[:RECORDS], truth[:RECORDS])
        calibrated = calibrate(method, known, error=error, uniform_N=rng.random(RECORDS), **kind)
        made = sets(calibrated, probabilities[RECORDS:], rng.random(TESTED))
        covered.append(int(contains(made, truth[RECORDS:]).sum()))
    assert abs(np.mean(covered) - law.mean()) < 4 * law.std() / math.sqrt(SPLITS)
    low, high = law.interval(1 - 1e-6)
    assert low <= min(covered)
    assert max(covered) <= high


def test_mondrian_keeps_its_promise_in_each_bin() -> None:
    bins = np.arange(60) // 20
    hits, totals = np.zeros(3), np.zeros(3)
    for split in range(60):
        probabilities, truth, _ = long_tailed(split, 3_000)
        calibrated = calibrate(
            "mondrian", truth_of(probabilities[:1500], truth[:1500]), error=0.1, bin_K=bins
        )
        covered = contains(sets(calibrated, probabilities[1500:]), truth[1500:])
        hits += np.bincount(bins[truth[1500:]], covered, minlength=3)
        totals += np.bincount(bins[truth[1500:]], minlength=3)
    # the rarest bin has some 200 records a split: standard error of its mean coverage 0.003
    np.testing.assert_allclose(hits / totals, 0.9, atol=0.012)


def test_pas_covers_the_taxa_of_a_long_tail_far_more_evenly_than_lac_at_less_than_twice_its_size() -> None:
    macro: dict[str, list[float]] = {"lac": [], "pas": []}
    size: dict[str, list[float]] = {"lac": [], "pas": []}
    for split in range(10):
        probabilities, truth, shares = long_tailed(split, 8_000)
        known = truth_of(probabilities[:3000], truth[:3000])
        for method in macro:
            calibrated = calibrate(method, known, error=0.1, **needs(method, 60, shares))
            made = sets(calibrated, probabilities[3000:])
            macro[method].append(macro_coverage(contains(made, truth[3000:]), truth[3000:]))
            size[method].append(float(made.sum(axis=1).mean()))
    assert np.mean(macro["pas"]) >= np.mean(macro["lac"]) + 0.1
    assert np.mean(size["pas"]) < 2 * np.mean(size["lac"])


def test_macro_coverage_is_the_mean_over_true_classes() -> None:
    targets = np.array([0, 0, 0, 0, 2, 7, -1])  # 7: a class of its own that the model cannot name
    covered = np.array([True, True, True, False, True, False, False])
    assert macro_coverage(covered, targets) == pytest.approx((3 / 4 + 1 + 0) / 3)
    assert math.isnan(macro_coverage(covered[6:], targets[6:]))


def test_priors_and_bins_follow_the_training_records() -> None:
    np.testing.assert_allclose(prior(np.array([0, 1, 2])), np.array([0.5, 1.5, 2.5]) / 4.5)
    assert frequency_bins(np.array([0, 19, 20, 100, 101, 5000])).tolist() == [0, 0, 1, 1, 2, 2]
    assert frequency_bins(np.array([4, 5, 6]), [5]).tolist() == [0, 1, 1]


# -- the taxon that holds a set


@pytest.fixture(scope="module")
def tree() -> Taxonomy:
    """Diptera: Sciaridae with Aus (two species) and Bus (one), Culicidae without more; Coleoptera alone; a
    genera Cus and Dus whose family is not known."""
    rows = [
        ("Diptera", "Sciaridae", "Aus", "Aus unus"),
        ("Diptera", "Sciaridae", "Aus", "Aus duo"),
        ("Diptera", "Sciaridae", "Bus", "Bus unus"),
        ("Diptera", "Culicidae", None, None),
        ("Coleoptera", None, None, None),
        ("Diptera", None, "Cus", None),
        ("Diptera", None, "Dus", None),
    ]
    ranks = ["order", "family", "genus", "species"]
    return Taxonomy.build(pl.DataFrame(rows, schema=ranks, orient="row"), ranks).filled()[0]


def test_a_set_is_held_by_the_smallest_taxon_above_its_members(tree: Taxonomy) -> None:
    leaves = {tree.name(int(node)): number for number, node in enumerate(tree.leaves_L)}
    cases = {
        ("Aus unus",): "Aus unus",
        ("Aus unus", "Aus duo"): "Aus",
        ("Aus unus", "Bus unus"): "Sciaridae",
        ("Bus unus", "Culicidae"): "Diptera",
        ("Cus",): "Cus",
        ("Cus", "Aus duo"): "Diptera",
        ("Cus", "Dus"): "Diptera",  # not the placeholder that stands for their family
        ("Aus duo", "Coleoptera"): "",
    }
    given_sets = np.zeros((len(cases) + 1, tree.num_leaves), bool)
    for row, names in zip(given_sets, cases, strict=False):
        row[[leaves[name] for name in names]] = True
    found = covering_node(tree, given_sets)
    assert [tree.name(int(node)) for node in found[:-1]] == list(cases.values())
    assert found[-1] == -1


def test_sets_of_taxa_at_one_rank_are_held_like_their_leaves(tree: Taxonomy) -> None:
    families = np.flatnonzero(tree.rank_N == 3)
    names = [tree.name(int(node)) for node in families]
    made = np.array([[name == "Sciaridae" for name in names], [name != "" for name in names]])
    found = covering_node(tree, made, families)
    assert [tree.name(int(node)) for node in found] == ["Sciaridae", "Diptera"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=15),
    st.lists(st.integers(0, 2**15 - 1), min_size=1, max_size=8),
)
def test_the_holding_taxon_is_the_lowest_common_ancestor(
    rows: list[tuple[int, ...]], chosen: list[int]
) -> None:
    ranks = ["order", "family", "genus"]
    names = [[f"{'.'.join(map(str, row[: i + 1]))}" for i in range(3)] for row in rows]
    tree = Taxonomy.build(pl.DataFrame(names, schema=ranks, orient="row"), ranks)
    made = np.array([[bool(number >> leaf & 1) for leaf in range(tree.num_leaves)] for number in chosen])
    for row, node in zip(made, covering_node(tree, made), strict=True):
        above = []
        for leaf in np.flatnonzero(row):
            path, place = [], int(tree.leaves_L[leaf])
            while place >= 0:
                path.append(place)
                place = int(tree.parent_N[place])
            above.append(path)
        common = set.intersection(*map(set, above)) if above else {-1}
        assert node == max(common)  # numbers grow downwards along a path
