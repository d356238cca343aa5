"""Temperatures, calibration errors and selective prediction against oracles, brute force, planted truths."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bioscan.analysis import confidence, hierarchy
from bioscan.analysis.intervals import wilson
from bioscan.analysis.taxonomy import Taxonomy
from bioscan.errors import DataError, RequestError

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Batch = tuple[NDArray[np.floating], NDArray[np.integer]]

seeds = st.integers(0, 2**32 - 1)


def insects() -> Taxonomy:
    """Three orders; two families have genera, the third order and one family end early, a gap is filled."""
    rows = [
        ("Diptera", "Aidae", "Aus", "Aus bus"),
        ("Diptera", "Aidae", "Aus", "Aus cus"),
        ("Diptera", "Aidae", "Bus", "Bus bus"),
        ("Diptera", "Bidae", "Cus", "Cus cus"),
        ("Diptera", "Bidae", None, "Dus dus"),
        ("Hymenoptera", "Cidae", "Eus", "Eus eus"),
        ("Hymenoptera", "Cidae", "Eus", "Eus fus"),
        ("Hymenoptera", "Didae", None, None),
        ("Coleoptera", None, None, None),
    ]
    ranks = ("order", "family", "genus", "species")
    return Taxonomy.build(pl.DataFrame(rows, dict.fromkeys(ranks, pl.String), orient="row"), ranks).filled()[
        0
    ]


def drawn(probabilities_NK: Array, generator: np.random.Generator) -> Ints:
    """One class per row, by its probabilities."""
    passed_NK = probabilities_NK.cumsum(axis=1) < generator.random(len(probabilities_NK))[:, None]
    classes_N: Ints = np.minimum(passed_NK.sum(axis=1), probabilities_NK.shape[1] - 1)
    return classes_N


def likelihood(tree: Taxonomy, logits: Array, nodes: Ints, temperature: float) -> float:
    """Mean -ln P(node), by summing probabilities leaf by leaf."""
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    shares = weights / weights.sum(axis=1, keepdims=True)
    below = [shares[i, tree.first_leaf_N[n] : tree.end_leaf_N[n]].sum() for i, n in enumerate(nodes)]
    return float(-np.log(below).mean())


def in_one(*batches: Batch) -> Callable[[], Iterable[Batch]]:
    return lambda: list(batches)


# -- temperature


@pytest.mark.parametrize("planted", [0.4, 1.0, 2.5])
def test_a_planted_temperature_is_found_within_two_percent_and_few_passes(planted: float) -> None:
    random = np.random.default_rng(3)
    logits = random.normal(0, 2 * planted, (20_000, 12)).astype(np.float32)
    targets = drawn(confidence.softmax(logits, planted), random)
    passes = 0

    def batches() -> Iterator[Batch]:
        nonlocal passes
        passes += 1
        yield from ((logits[i : i + 512], targets[i : i + 512]) for i in range(0, len(logits), 512))

    found = confidence.fit_temperature(batches)
    assert found.value == pytest.approx(planted, rel=0.02)
    assert found.n == 20_000
    assert not found.at_bound
    assert found.nll_after <= found.nll_before
    assert passes <= 8


def test_a_planted_temperature_is_found_from_partly_named_records() -> None:
    random = np.random.default_rng(4)
    tree = insects()
    logits = random.normal(0, 3, (20_000, tree.num_leaves))
    nodes = tree.leaves_L[drawn(confidence.softmax(logits, 1.8), random)].astype(np.int64)
    for _ in range(2):  # most are known to a higher taxon only, some to none
        up = (random.random(nodes.size) < 0.5) & (nodes > 0)
        nodes[up] = tree.parent_N[nodes[up]]
    found = confidence.fit_temperature(in_one((logits, nodes)), tree)
    assert found.value == pytest.approx(1.8, rel=0.02)
    assert found.n == (nodes > 0).sum() < nodes.size
    named = nodes > 0
    assert found.nll_before == pytest.approx(likelihood(tree, logits[named], nodes[named], 1.0))
    assert found.nll_after == pytest.approx(likelihood(tree, logits[named], nodes[named], found.value))


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from([0.3, 1.0, 4.0]))
def test_the_temperature_is_where_a_search_of_the_whole_range_finds_the_least(
    seed: int, scale: float
) -> None:
    random = np.random.default_rng(seed)
    tree = insects()
    logits = random.normal(0, scale, (40, tree.num_leaves))
    nodes = random.integers(1, tree.num_nodes, 40)
    found = confidence.fit_temperature(in_one((logits, nodes)), tree)
    grid = np.geomspace(*confidence.TEMPERATURES, 600)
    values = [likelihood(tree, logits, nodes, t) for t in grid]
    assert found.nll_after <= found.nll_before
    assert found.nll_after == pytest.approx(likelihood(tree, logits, nodes, found.value))
    assert found.nll_after <= min(values) + 1e-3
    if not found.at_bound:  # a minimum to within what the tolerance allows
        around = [likelihood(tree, logits, nodes, found.value * f) for f in (0.999, 1.001)]
        assert found.nll_after <= min(around)


@settings(max_examples=20, deadline=None)
@given(seeds, st.lists(st.integers(0, 60), max_size=5))
def test_the_temperature_depends_neither_on_batches_nor_on_constants_added_to_a_record(
    seed: int, cuts: list[int]
) -> None:
    random = np.random.default_rng(seed)
    logits, targets = random.normal(0, 3, (60, 5)), random.integers(0, 5, 60)
    shifted = np.log(confidence.softmax(logits)) + random.normal(0, 1, (60, 1))
    bounds = [0, *sorted(cuts), 60]
    parts = [(shifted[a:b], targets[a:b]) for a, b in itertools.pairwise(bounds)]
    one = confidence.fit_temperature(in_one((logits, targets)))
    other = confidence.fit_temperature(in_one(*parts))
    assert other.value == pytest.approx(one.value, rel=1e-4)
    assert other.n == one.n


def test_a_model_that_is_always_right_ends_at_the_least_temperature_and_a_blind_one_at_the_greatest() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 5, (500, 4))
    sure = confidence.fit_temperature(in_one((logits, logits.argmax(axis=1))))
    blind = confidence.fit_temperature(in_one((logits, logits.argmin(axis=1))))
    assert [sure.value, blind.value] == pytest.approx(confidence.TEMPERATURES)
    assert sure.at_bound
    assert blind.at_bound


def test_a_model_that_is_far_too_modest_is_found_out_in_few_passes() -> None:
    logits = np.tile([0.0, 30.0], (50, 1))  # Newton's steps on e^(-30 / T) are of 1 / 30
    passes = 0

    def batches() -> Iterator[Batch]:
        nonlocal passes
        passes += 1
        yield logits, np.ones(50, np.int64)

    assert confidence.fit_temperature(batches).value < 0.2
    assert passes <= 4


def test_records_without_scores_or_without_a_taxon_of_the_model_are_left_out() -> None:
    random = np.random.default_rng(1)
    logits, targets = random.normal(0, 3, (50, 4)), random.integers(0, 4, 50)
    spoilt = np.concatenate([logits, np.full((1, 4), np.nan), np.zeros((2, 4)), np.full((1, 4), -np.inf)])
    more = np.concatenate([targets, [0, -1, 4, 2]])
    assert confidence.fit_temperature(in_one((spoilt, more))) == confidence.fit_temperature(
        in_one((logits, targets))
    )


def test_no_usable_record_is_an_error_that_says_so() -> None:
    with pytest.raises(DataError, match="no record has scores and a taxon"):
        confidence.fit_temperature(in_one((np.zeros((3, 2)), np.array([-1, -1, 2]))))
    with pytest.raises(DataError, match="no temperature can be fitted"):
        confidence.fit_temperature(
            in_one((np.zeros((2, insects().num_leaves)), np.array([0, -1]))), insects()
        )


def test_logits_that_overflow_and_logarithms_of_zero_stay_finite() -> None:
    scores = np.array([[3000.0, 0, -3000], [0, -np.inf, -1], [-np.inf, 0, -np.inf]])
    found = confidence.fit_temperature(in_one((scores, np.array([2, 1, 0]))))
    assert np.isfinite([found.value, found.nll_before, found.nll_after]).all()
    # 6000, ln(1 + e^-1 + e^-104) + 104 and ln(1 + 2 e^-104) + 104
    assert found.nll_before == pytest.approx((6000 + np.log1p(np.exp(-1)) + 208) / 3)


def test_equal_scores_leave_the_temperature_at_one() -> None:
    found = confidence.fit_temperature(in_one((np.zeros((5, 3)), np.arange(5) % 3)))
    assert (found.value, found.at_bound) == (1.0, False)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0.05, 20))
def test_a_temperature_keeps_the_order_of_classes_and_is_that_of_the_logits(
    seed: int, temperature: float
) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, (6, 7))
    probabilities = confidence.softmax(logits)
    tempered = confidence.apply_temperature(probabilities, temperature)
    weights = np.exp(logits / temperature - logits.max() / temperature)
    np.testing.assert_allclose(tempered, weights / weights.sum(axis=1, keepdims=True), rtol=1e-9)
    np.testing.assert_allclose(confidence.softmax(logits, temperature), tempered, rtol=1e-9)
    np.testing.assert_array_equal(tempered.argmax(axis=1), probabilities.argmax(axis=1))


def test_no_score_stays_none_and_zero_stays_zero_at_any_temperature() -> None:
    found = confidence.apply_temperature(np.array([[0.0, 0.25, 0.75], [np.nan] * 3], np.float32), 0.5)
    # squares: 1/16 and 9/16
    np.testing.assert_allclose(found, [[0, 0.1, 0.9], [np.nan] * 3])


# -- temperatures of ranks


def test_at_temperature_one_a_rank_is_the_sum_over_its_leaves_and_others_keep_the_total() -> None:
    tree = insects()
    probabilities = np.random.default_rng(5).dirichlet(np.ones(tree.num_leaves), 6)
    for rank in tree.ranks:
        sums, nodes = hierarchy.rank_probabilities(tree, probabilities, rank)
        found, found_nodes = confidence.tempered_rank_probabilities(tree, probabilities, rank, 1.0)
        np.testing.assert_allclose(found, sums)
        np.testing.assert_array_equal(found_nodes, nodes)
        hotter, _ = confidence.tempered_rank_probabilities(tree, probabilities, rank, 3.0)
        assert (hotter.sum(axis=1) <= 1 + 1e-12).all()
    # by hand: the leaves Coleoptera and Didae have no genus, so they count beside the genera
    leaf = np.full((1, tree.num_leaves), 0.0)
    leaf[0, 0], leaf[0, -1] = 0.8, 0.2
    found, nodes = confidence.tempered_rank_probabilities(tree, leaf, "genus", 0.5)
    assert tree.paths[tree.leaves_L[-1]][-1] == "Coleoptera"
    np.testing.assert_allclose(found.sum(), 0.64 / (0.64 + 0.04))


def test_a_temperature_planted_at_each_rank_is_found() -> None:
    random = np.random.default_rng(6)
    rows = [(f"O{i // 6}", f"F{i // 2}", f"G{i}") for i in range(24)]
    tree = Taxonomy.build(pl.DataFrame(rows, ["order", "family", "genus"], orient="row"), ["order", "family"])
    logits = random.normal(0, 2.5, (30_000, tree.num_leaves))
    for rank, planted in {"order": 0.6, "family": 2.0}.items():
        shown = confidence.softmax(logits, 1.4)
        tempered, nodes = confidence.tempered_rank_probabilities(tree, shown, rank, planted)
        targets = nodes[drawn(tempered, random)]
        higher = np.arange(30_000) % 3 == 0  # a third is named no deeper than the order
        targets = np.where(higher & (rank == "family"), tree.parent_N[targets], targets)
        found = confidence.fit_rank_temperatures(in_one((logits, targets)), tree, temperature=1.4)
        assert found[rank].value == pytest.approx(planted, rel=0.03)
        assert found[rank].n == {"order": 30_000, "family": 20_000}[rank]
        assert set(found) == {"order", rank}  # a rank without labels has none


def test_a_placeholder_is_no_truth_for_the_temperature_of_a_rank() -> None:
    tree = insects()
    nodes = np.array([n for n in range(tree.num_nodes) if tree.paths[n][-1:] == ("Dus dus",)])
    assert not tree.predictable_N[tree.parent_N[nodes]].any()  # its genus is not known
    found = confidence.fit_rank_temperatures(in_one((np.zeros((1, tree.num_leaves)), nodes)), tree)
    assert set(found) == {"order", "family", "species"}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.one_of(st.floats(0, 1), st.just(np.nan)), min_size=4, max_size=4), min_size=1, max_size=5
    )
)
def test_the_running_minimum_lets_no_rank_outrank_those_above(rows: list[list[float]]) -> None:
    found = confidence.running_minimum(np.array(rows))
    for before, after in zip(rows, found, strict=True):
        least = np.inf
        for p, q in zip(before, after, strict=True):
            assert np.isnan(p) == np.isnan(q)
            if not np.isnan(p):
                least = min(least, p)
                assert q == least


# -- calibration errors


def torch_error(probabilities: NDArray[np.floating], targets: Ints, bins: int) -> float:
    from bioscan.learn.compat import import_torchvision

    import_torchvision()
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    value = multiclass_calibration_error(
        torch.from_numpy(probabilities), torch.from_numpy(targets), probabilities.shape[1], n_bins=bins
    )
    return float(value)


@pytest.mark.parametrize("bins", [5, 15, 20])
@pytest.mark.parametrize("seed", range(4))
def test_the_calibration_error_is_that_of_torchmetrics(seed: int, bins: int) -> None:
    random = np.random.default_rng(seed)
    edges = np.linspace(0, 1, bins + 1).astype(np.float32)
    first = random.choice(edges[edges > 0.5], 60)  # a third are exactly on an edge, 1 among them
    probabilities = np.concatenate(
        [np.stack([first, 1 - first], axis=1), random.dirichlet([0.4, 0.4], 120).astype(np.float32)]
    )
    targets = random.integers(0, 2, 180)
    top, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    found = confidence.calibration_error(top, right, bins=bins)
    assert found == pytest.approx(torch_error(probabilities, targets, bins), abs=1e-6)


def test_a_bin_has_its_lower_edge_and_one_is_a_bin_of_its_own() -> None:
    probability = np.array([0.2, 0.1, 0.5, 1.0, 0.9, np.nan], np.float32)
    right = np.array([True, False, True, True, False, False])
    curve = confidence.reliability_curve(probability, right, bins=5)
    np.testing.assert_allclose(curve["low"], [0, 0.2, 0.4, 0.8, 1], atol=1e-7)
    np.testing.assert_allclose(curve["high"], [0.2, 0.4, 0.6, 1, 1], atol=1e-7)
    assert curve["n"].tolist() == [1] * 5
    assert curve["accuracy"].tolist() == [0, 1, 1, 0, 1]
    # 0.1, 0.8, 0.5, 0.9 and 0 of five
    assert confidence.calibration_error(probability, right, bins=5) == pytest.approx(2.3 / 5)


def test_bins_of_equal_mass_are_consecutive_parts_of_equal_size() -> None:
    random = np.random.default_rng(2)
    probability, right = random.random(300), random.random(300) < 0.6
    order = np.argsort(probability)
    parts = [(probability[o].mean(), right[o].mean()) for o in np.split(order, 15)]
    expected = np.mean([abs(p - r) for p, r in parts])
    assert confidence.calibration_error(probability, right, kind="mass") == pytest.approx(expected)
    curve = confidence.reliability_curve(probability, right, kind="mass")
    assert curve["n"].tolist() == [20] * 15
    np.testing.assert_allclose(curve["low"], np.sort(probability)[::20])
    np.testing.assert_allclose(curve["high"], np.sort(probability)[19::20])


def test_equal_probabilities_stay_in_one_bin_of_mass() -> None:
    curve = confidence.reliability_curve(np.repeat([0.9, 0.3], 50), np.arange(100) < 40, kind="mass")
    assert curve["n"].tolist() == [50, 50]
    assert curve["low"].tolist() == curve["high"].tolist() == [0.3, 0.9]
    assert curve["accuracy"].tolist() == [0, 0.8]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9, 1.0, np.nan]), st.booleans()), max_size=40),
    st.sampled_from(list(confidence.KINDS)),
    seeds,
)
def test_the_curve_holds_every_answer_once_in_any_order_and_its_gaps_are_the_error(
    rows: list[tuple[float, bool]], kind: str, seed: int
) -> None:
    probability, right = np.array([p for p, _ in rows]), np.array([r for _, r in rows], bool)
    curve = confidence.reliability_curve(probability, right, kind=kind)
    answered = ~np.isnan(probability)
    assert curve["n"].sum() == answered.sum()
    assert (curve["n"] > 0).all()
    assert (curve["low"] <= curve["confidence"] + 1e-12).all()
    assert (curve["confidence"] <= curve["high"] + 1e-12).all()
    np.testing.assert_array_equal(
        (curve["accuracy_low"], curve["accuracy_high"]),
        wilson(np.rint(curve["accuracy"] * curve["n"]).astype(np.int64), curve["n"]),
    )
    error = confidence.calibration_error(probability, right, kind=kind)
    if answered.any():
        gaps = np.abs(curve["accuracy"] - curve["confidence"])
        assert error == pytest.approx((gaps * curve["n"]).sum() / answered.sum())
        order = np.random.default_rng(seed).permutation(len(rows))
        assert confidence.calibration_error(probability[order], right[order], kind=kind) == pytest.approx(
            error
        )
    else:
        assert np.isnan(error)


def test_an_unknown_kind_of_bins_is_an_error_that_names_the_known() -> None:
    with pytest.raises(RequestError, match="did you mean 'mass'"):
        confidence.calibration_error(np.ones(1), np.ones(1, bool), kind="mas")


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_classwise_error_is_the_mean_over_classes_of_their_own_in_any_batches(kind: Any) -> None:
    random = np.random.default_rng(8)
    probabilities = random.dirichlet(np.full(5, 0.3), 400).astype(kind)
    probabilities[:20] = np.eye(5, dtype=kind)[random.integers(0, 5, 20)]
    targets = random.integers(0, 6, 400)  # 5: not known to the model
    parts = np.array_split(np.arange(400), 7)
    sums = np.sum([confidence.classwise_bins(probabilities[rows], targets[rows]) for rows in parts], axis=0)
    expected = [confidence.calibration_error(probabilities[:, k], targets == k) for k in range(5)]
    assert confidence.classwise_error(sums) == pytest.approx(np.mean(expected), abs=1e-9)
    spoilt = np.concatenate([probabilities, np.full((1, 5), np.nan, kind), probabilities[:1]])
    more = np.append(targets, [2, -1])
    np.testing.assert_allclose(confidence.classwise_bins(spoilt, more), sums, atol=1e-9)
    assert np.isnan(confidence.classwise_error(np.zeros((3, 5, 16))))


def test_brier_and_likelihood_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import brier_score_loss, log_loss

    random = np.random.default_rng(9)
    probabilities, targets = random.dirichlet(np.full(7, 0.4), 500), random.integers(0, 7, 500)
    labels = list(range(7))
    expected = brier_score_loss(targets, probabilities, labels=labels, scale_by_half=False)
    assert confidence.brier(probabilities, targets).mean() == pytest.approx(expected, abs=1e-12)
    assert confidence.nll(probabilities, targets).mean() == pytest.approx(
        log_loss(targets, probabilities, labels=labels), abs=1e-9
    )


def test_an_unknown_class_costs_brier_one_and_has_no_likelihood() -> None:
    probabilities = np.array([[0.5, 0.5], [0.0, 1.0], [0.25, 0.75], [np.nan, np.nan]], np.float32)
    targets = np.array([2, 0, -1, 1])
    # (0.5² + 0.5²) + 1; 1² + 1²; unlabelled; no scores
    np.testing.assert_allclose(confidence.brier(probabilities, targets), [1.5, 2, np.nan, np.nan])
    found = confidence.nll(probabilities, targets)
    np.testing.assert_allclose(found, [np.nan, -np.log(np.finfo(np.float32).tiny), np.nan, np.nan], rtol=1e-6)


# -- selective prediction


confidences = st.sampled_from([-np.inf, np.nan, 0.1, 0.2, 0.3, 0.4, 0.5])
answers = st.lists(st.tuples(confidences, st.booleans()), min_size=1, max_size=7)


def test_risk_and_coverage_by_hand() -> None:
    curve = confidence.risk_coverage(
        np.array([0.9, 0.5, 0.5, 0.8, np.nan]), np.array([True, False, True, True, False])
    )
    np.testing.assert_allclose(curve["coverage"], [0.2, 0.4, 0.8, 1.0])
    np.testing.assert_allclose(curve["threshold"], [0.9, 0.8, 0.5, -np.inf])
    np.testing.assert_allclose(curve["risk"], [0, 0, 0.25, 0.4])
    np.testing.assert_array_equal(curve["n"], [1, 2, 4, 5])
    np.testing.assert_array_equal((curve["low"], curve["high"]), wilson(np.array([0, 0, 1, 2]), curve["n"]))


@settings(max_examples=60, deadline=None)
@given(answers)
def test_the_area_is_the_mean_over_all_orders_that_confidence_allows(rows: list[tuple[float, bool]]) -> None:
    known = [(-np.inf if np.isnan(c) else c, r and np.isfinite(c)) for c, r in rows]
    areas = []
    for order in itertools.permutations(known):
        if all(a[0] >= b[0] for a, b in itertools.pairwise(order)):
            wrong = np.cumsum([not right for _, right in order])
            areas.append((wrong / np.arange(1, len(rows) + 1)).mean())
    found = confidence.aurc(np.array([c for c, _ in rows]), np.array([r for _, r in rows]))
    assert found == pytest.approx(np.mean(areas))


@settings(max_examples=60, deadline=None)
@given(answers, st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_the_coverage_at_a_risk_is_the_greatest_that_any_threshold_gives(
    rows: list[tuple[float, bool]], risk: float
) -> None:
    known = [(-np.inf if np.isnan(c) else c, r and np.isfinite(c)) for c, r in rows]
    shares = [0.0]
    for threshold, _ in known:
        kept = [right for c, right in known if c >= threshold]
        if kept.count(False) <= risk * len(kept):
            shares.append(len(kept) / len(rows))
    found = confidence.coverage_at_risk(np.array([c for c, _ in rows]), np.array([r for _, r in rows]), risk)
    assert found == pytest.approx(max(shares))


def test_a_long_curve_is_thinned_but_its_ends_and_the_area_stay() -> None:
    random = np.random.default_rng(10)
    sure, right = random.random(5000), random.random(5000) < 0.7
    whole = confidence.risk_coverage(sure, right, points=5000)
    thin = confidence.risk_coverage(sure, right)
    assert whole["n"].size == 5000
    assert 190 <= thin["n"].size <= 200
    for name, values in thin.items():
        assert (values[0], values[-1]) == (whole[name][0], whole[name][-1])
        np.testing.assert_array_equal(values, whole[name][thin["n"] - 1])
    assert np.diff(thin["coverage"]).max() < 0.006
    assert confidence.aurc(sure, right) == pytest.approx(whole["risk"].mean())
    # right ones first: risk 0 up to a share a, then 1 - a / c
    accuracy = right.mean()
    assert confidence.best_aurc(right) == pytest.approx(1 - accuracy + accuracy * np.log(accuracy), abs=1e-3)
    assert confidence.best_aurc(right) < confidence.aurc(sure, right)


def test_nothing_to_select_from_gives_an_empty_curve_and_no_area() -> None:
    nothing, none = np.zeros(0), np.zeros(0, bool)
    assert all(values.size == 0 for values in confidence.risk_coverage(nothing, none).values())
    assert np.isnan(confidence.aurc(nothing, none))
    assert confidence.coverage_at_risk(nothing, none, 0.1) == 0
    assert all(values.size == 0 for values in confidence.reliability_curve(nothing, none).values())
