"""Novelty scores and measures: by hand, by scikit-learn and SciPy, and as laws."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import sklearn.metrics as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.covariance import EmpiricalCovariance

from bioscan.analysis import novelty
from bioscan.analysis.intervals import Z95

Pair = tuple[NDArray[np.float64], NDArray[np.float64]]

# few values, so that ties within and between the two are common
values = st.lists(st.integers(0, 6).map(lambda i: i / 2), min_size=1, max_size=25).map(
    lambda v: np.array(v, float)
)


def labelled(seen: NDArray[np.float64], unseen: NDArray[np.float64]) -> tuple[NDArray[np.int64], Any]:
    return np.repeat([0, 1], [seen.size, unseen.size]), np.concatenate([seen, unseen])


@settings(max_examples=150)
@given(values, values)
def test_measures_are_those_of_scikit_learn_ties_included(
    seen: NDArray[np.float64], unseen: NDArray[np.float64]
) -> None:
    found = novelty.separation(seen, unseen, np.ones(seen.size, bool))
    is_unseen, score = labelled(seen, unseen)
    assert found.auroc == pytest.approx(oracle.roc_auc_score(is_unseen, score), abs=1e-12)
    assert found.aupr_unseen == pytest.approx(oracle.average_precision_score(is_unseen, score), abs=1e-12)
    assert found.aupr_seen == pytest.approx(oracle.average_precision_score(1 - is_unseen, -score), abs=1e-12)
    flagged, found_unseen, _ = oracle.roc_curve(is_unseen, score, drop_intermediate=False)
    assert found.fpr95 == pytest.approx(flagged[np.argmax(found_unseen >= 0.95)], abs=1e-12)
    missed, kept, _ = oracle.roc_curve(1 - is_unseen, -score, drop_intermediate=False)
    assert found.missed95 == pytest.approx(missed[np.argmax(kept >= 0.95)], abs=1e-12)
    assert found.oscr == pytest.approx(found.auroc)  # everything seen is named right


@settings(max_examples=100)
@given(values, values, st.randoms(use_true_random=False))
def test_oscr_is_the_area_under_its_curve_and_counts_pairs(
    seen: NDArray[np.float64], unseen: NDArray[np.float64], random: Any
) -> None:
    right = np.array([random.random() < 0.6 for _ in seen])
    found = novelty.separation(seen, unseen, right)
    pairs = [
        (1.0 if s < u else 0.5 if s == u else 0.0) * bool(r)
        for s, r in zip(seen, right, strict=True)
        for u in unseen
    ]
    assert found.oscr == pytest.approx(np.mean(pairs))
    # Dhamija et al.: correct classification rate against false positive rate, by the confidence
    levels = np.concatenate([[np.inf], np.unique(-np.concatenate([seen, unseen]))[::-1]])
    correct = [np.mean(right & (-seen >= level)) for level in levels]
    false = [np.mean(-unseen >= level) for level in levels]
    assert found.oscr == pytest.approx(np.trapezoid(correct, false))
    assert found.oscr <= right.mean() + 1e-12


@settings(max_examples=60)
@given(values, values)
def test_only_the_order_of_scores_matters(seen: NDArray[np.float64], unseen: NDArray[np.float64]) -> None:
    right = seen < 2
    found = vars(novelty.separation(seen, unseen, right))
    again = vars(novelty.separation(np.exp(seen) - 9, np.exp(unseen) - 9, right))
    assert again == pytest.approx(found)
    turned = novelty.separation(unseen, seen, np.ones(unseen.size, bool))
    assert turned.auroc == pytest.approx(1 - found["auroc"])


def test_the_two_conventions_of_fpr_at_95_differ_and_are_those_worked_out_by_hand() -> None:
    seen = np.arange(20.0)  # 0 to 19
    unseen = np.array([3.5, 18.5] + [30.0] * 18)  # twenty: 95 % are nineteen, all but 3.5
    found = novelty.separation(seen, unseen, np.ones(20, bool))
    assert found.fpr95 == pytest.approx(1 / 20)  # flagged from 18.5 on: 19
    assert found.missed95 == pytest.approx(1 / 20)  # nineteen seen kept, 0 to 18: only 3.5 is not above 18
    assert novelty.missed(seen, unseen, 0.95) == (18.0, 1 / 20)
    assert novelty.missed(seen, unseen, 0.5) == (9.0, 1 / 20)


def test_a_score_that_says_nothing_flags_everybody() -> None:
    found = novelty.separation(np.zeros(5), np.zeros(3), np.ones(5, bool))
    assert (found.auroc, found.fpr95, found.missed95, found.oscr) == (0.5, 1.0, 1.0, 0.5)
    assert found.aupr_unseen == pytest.approx(3 / 8)
    assert found.aupr_seen == pytest.approx(5 / 8)


def test_without_specimens_of_a_kind_nothing_is_measured() -> None:
    for seen, unseen in ((np.ones(0), np.ones(2)), (np.ones(2), np.ones(0))):
        found = novelty.separation(seen, unseen, np.ones(seen.size, bool))
        assert all(math.isnan(value) for value in vars(found).values())


# -- interval


def delong(seen: NDArray[np.float64], unseen: NDArray[np.float64]) -> float:
    """Variance of the area by DeLong et al. 1988, over all pairs."""
    pairs = (seen[:, None] < unseen) + 0.5 * (seen[:, None] == unseen)
    return float(pairs.mean(axis=1).var(ddof=1) / seen.size + pairs.mean(axis=0).var(ddof=1) / unseen.size)


def test_with_groups_of_one_the_interval_is_delongs() -> None:
    generator = np.random.default_rng(1)
    seen, unseen = generator.normal(0, 1, 60).round(1), generator.normal(1, 1, 40).round(1)
    low, high = novelty.auroc_interval(seen, unseen, np.arange(60), np.arange(40))
    half = Z95 * math.sqrt(delong(seen, unseen))
    area = novelty.separation(seen, unseen, np.ones(60, bool)).auroc
    assert (low, high) == pytest.approx((area - half, area + half))


def test_taxa_whose_specimens_score_alike_widen_the_interval_and_it_covers() -> None:
    generator = np.random.default_rng(2)
    hits, widths = 0, []
    for _ in range(200):
        # 15 taxa of 20 specimens that share most of their score; the area for a new taxon is by symmetry
        seen, unseen = (
            (generator.normal(shift, 1, 15)[:, None] + generator.normal(0, 0.3, (15, 20))).ravel()
            for shift in (0, 1)
        )
        groups = np.repeat(np.arange(15), 20)
        low, high = novelty.auroc_interval(seen, unseen, groups, groups)
        truth = scipy.special.ndtr(1 / math.sqrt(2 * (1 + 0.09)))
        hits += low <= truth <= high
        naive = novelty.auroc_interval(seen, unseen, np.arange(300), np.arange(300))
        widths.append((high - low) / (naive[1] - naive[0]))
    assert 0.88 <= hits / 200 <= 1.0
    assert np.mean(widths) > 2


def test_one_unseen_taxon_has_no_interval() -> None:
    ends = novelty.auroc_interval(np.arange(4.0), np.arange(3.0), np.arange(4), np.zeros(3, int))
    assert all(math.isnan(end) for end in ends)


# -- curve


@settings(max_examples=60)
@given(values, values)
def test_the_curve_says_what_each_threshold_does(
    seen: NDArray[np.float64], unseen: NDArray[np.float64]
) -> None:
    right = seen != 1
    found = novelty.curve(seen, unseen, right)
    for i, threshold in enumerate(found["threshold"]):
        assert found["seen_flagged"][i] == pytest.approx(np.mean(seen > threshold))
        assert found["unseen_flagged"][i] == pytest.approx(np.mean(unseen > threshold))
        assert found["right_kept"][i] == pytest.approx(np.mean(right & (seen <= threshold)))
    assert (found["seen_flagged"][0], found["unseen_flagged"][0]) == (0, 0)


def test_a_long_curve_is_thinned_and_keeps_its_ends_and_area() -> None:
    generator = np.random.default_rng(3)
    seen, unseen = generator.normal(0, 1, 20_000), generator.normal(1, 1, 5_000)
    found = novelty.curve(seen, unseen, np.ones(20_000, bool))
    assert found["threshold"].size <= novelty.CURVE_POINTS
    area = np.trapezoid([*found["unseen_flagged"], 1.0], [*found["seen_flagged"], 1.0])
    assert area == pytest.approx(novelty.separation(seen, unseen, np.ones(20_000, bool)).auroc, abs=1e-3)


# -- scores from outputs


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(0.2, 5))
def test_energy_is_minus_logsumexp_and_gives_the_largest_logit_back(seed: int, temperature: float) -> None:
    logits = np.random.default_rng(seed).normal(0, 20, (5, 7))
    energy = novelty.energy(logits, temperature)
    expected = -temperature * scipy.special.logsumexp(logits / temperature, axis=1)
    np.testing.assert_allclose(energy, expected, rtol=1e-12)
    best = scipy.special.softmax(logits / temperature, axis=1).max(axis=1)
    np.testing.assert_allclose(novelty.max_logit(energy, best, temperature), -logits.max(axis=1), atol=1e-9)


def test_energy_of_huge_logits_is_finite() -> None:
    assert novelty.energy(np.array([[1e4, -1e4]])).tolist() == [-1e4]


def test_msp_within_a_genus_by_hand() -> None:
    # of two species, of one, and a genus without species in the model
    species = np.array([[0.6, 0.2, 0.2], [0.1, 0.2, 0.7], [0.0, 0.0, 0.1], [np.nan] * 3])
    genus = np.array([[0.8, 0.2, 0.0], [0.3, 0.7, 0.0], [0.0, 0.1, 0.9], [np.nan] * 3])
    found = novelty.msp_within(species, genus, np.array([0, 0, 1]))
    np.testing.assert_allclose(found, [1 - 0.6 / 0.8, np.nan, np.nan, np.nan], atol=1e-12)


def test_a_row_without_scores_stays_without() -> None:
    assert np.isnan(novelty.msp(np.array([[np.nan, np.nan]]))).all()
    assert np.isnan(novelty.energy(np.array([[np.nan, np.nan]]))).all()


# -- scores from embeddings


def space(seed: int = 0, rows: int = 400, width: int = 6) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    classes = generator.integers(0, 5, rows)
    mixing = generator.normal(size=(width, width))
    features = generator.normal(0, 4, (5, width))[classes] + generator.normal(size=(rows, width)) @ mixing
    return features.astype(np.float32), classes * 3


def test_mahalanobis_is_that_of_scikit_learn_to_the_nearest_mean() -> None:
    features, classes = space()
    queries, _ = space(1, 50)
    found = novelty.Gaussians.fit(features, classes)
    means = np.stack([features[classes == c].mean(axis=0, dtype=float) for c in np.unique(classes)])
    centred = features - means[np.unique(classes, return_inverse=True)[1]]
    covariance = EmpiricalCovariance(assume_centered=True).fit(centred)
    each = np.stack([covariance.mahalanobis(queries - mean) for mean in means])
    np.testing.assert_allclose(found.mahalanobis(queries), each.min(axis=0), rtol=1e-5)
    background = EmpiricalCovariance().fit(features.astype(float)).mahalanobis(queries)
    np.testing.assert_allclose(found.background(queries), background, rtol=1e-5)


def test_with_one_class_the_background_is_that_class() -> None:
    features, classes = space()
    one = novelty.Gaussians.fit(features, np.zeros_like(classes))
    np.testing.assert_allclose(one.background(features), one.mahalanobis(features), rtol=1e-4, atol=1e-4)


def test_a_feature_that_never_varies_is_left_out_of_the_distance() -> None:
    features, classes = space()
    dead = np.column_stack([features, np.zeros(len(features), np.float32)])
    found = novelty.Gaussians.fit(dead, classes)
    assert found.whitening_FD.shape == (7, 6)
    expected = novelty.Gaussians.fit(features, classes).mahalanobis(features[:9])
    np.testing.assert_allclose(found.mahalanobis(dead[:9]), expected, rtol=1e-5)


def test_fewer_specimens_than_features_still_give_distances() -> None:
    features, classes = space(2, 4, 12)
    found = novelty.Gaussians.fit(features, classes).mahalanobis(features)
    assert np.isfinite(found).all()
    with pytest.raises(ValueError, match="specimens"):
        novelty.Gaussians.fit(features[:0], classes[:0])


def test_vim_is_the_papers_formula() -> None:
    """Wang et al. 2022, section 4: alpha · |residual| - logsumexp, with the sign turned."""
    features, _ = space(3, 500, 10)
    generator = np.random.default_rng(4)
    weight, bias = generator.normal(size=(5, 10)), generator.normal(size=5)
    queries, _ = space(5, 30, 10)
    found = novelty.Vim.fit(features, weight, bias, dimensions=4)
    origin = -np.linalg.pinv(weight) @ bias
    spread = EmpiricalCovariance(assume_centered=True).fit(features - origin).covariance_
    eigenvalues, eigenvectors = np.linalg.eig(spread)
    outside = eigenvectors[:, np.argsort(-eigenvalues)[4:]]

    def residual(x: NDArray[np.float32]) -> NDArray[np.float64]:
        length: NDArray[np.float64] = np.linalg.norm((x - origin) @ outside, axis=1)
        return length

    alpha = (features @ weight.T + bias).max(axis=1).mean() / residual(features).mean()
    expected = alpha * residual(queries) - scipy.special.logsumexp(queries @ weight.T + bias, axis=1)
    np.testing.assert_allclose(found.score(queries), expected, rtol=1e-6)


def test_the_principal_space_has_the_papers_size() -> None:
    assert [novelty.principal_dimensions(width) for width in (2048, 768, 100)] == [1000, 512, 50]
    found = novelty.Vim.fit(space()[0], np.ones((2, 6)), np.zeros(2))
    assert found.residual_FR.shape == (6, 3)


def test_a_principal_space_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="3 of 3"):
        novelty.Vim.fit(np.ones((2, 3)), np.ones((2, 3)), np.zeros(2), dimensions=3)


def test_every_score_is_higher_for_specimens_far_from_the_training_ones() -> None:
    features, classes = space(6, 600, 16)
    near, _ = space(6, 100, 16)
    far = near + np.random.default_rng(8).normal(0, 12, near.shape)
    gaussians = novelty.Gaussians.fit(features, classes)
    vim = novelty.Vim.fit(features, np.random.default_rng(9).normal(size=(5, 16)) / 16, np.zeros(5))
    for score in (gaussians.mahalanobis, vim.score):
        assert novelty.separation(score(near), score(far), np.ones(len(near), bool)).auroc > 0.75


@settings(max_examples=50)
@given(st.floats(0, 1), st.floats(0, 1))
def test_the_harmonic_mean_lies_below_the_smaller_twice_and_is_symmetric(a: float, b: float) -> None:
    found = float(novelty.harmonic_mean(a, b))
    assert found == pytest.approx(float(novelty.harmonic_mean(b, a)))
    assert min(a, b) - 1e-9 <= found <= 2 * min(a, b) + 1e-9
    assert math.isnan(novelty.harmonic_mean(math.nan, a))
