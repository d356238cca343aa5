"""Intervals against their definitions and by simulation."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom

from bioscan.analysis import intervals

Floats = NDArray[np.float64]


@pytest.mark.parametrize(("hits", "n"), [(1, 3), (7, 10), (11, 19), (250, 1000), (225_000, 225_660)])
def test_the_ends_of_wilsons_interval_are_where_the_normal_test_just_rejects(hits: int, n: int) -> None:
    # |p - share| = z sqrt(p (1 - p) / n), squared: (n + z²) p² - (2 n share + z²) p + n share² = 0
    z2, share = intervals.Z95**2, hits / n
    expected = sorted(np.roots([n + z2, -(2 * n * share + z2), n * share**2]).real)
    np.testing.assert_allclose(intervals.wilson(hits, n), expected, atol=1e-12)


def test_wilsons_interval_ends_at_0_and_1_where_none_or_all_are_right() -> None:
    low, high = intervals.wilson(np.array([0, 5, 0]), np.array([5, 5, 0]))
    np.testing.assert_array_equal(low, [0, low[1], np.nan])
    np.testing.assert_array_equal(high, [high[0], 1, np.nan])
    # the rule of three in Wilson's form: z² / (n + z²)
    assert high[0] == pytest.approx(intervals.Z95**2 / (5 + intervals.Z95**2))
    assert low[1] == pytest.approx(1 - high[0])


def cells(counts: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Class and count of each cell of a table of classes by outcomes."""
    return np.repeat(np.arange(len(counts)), len(counts[0])), np.array(counts).ravel()


def macro_of_pairs(drawn_RM: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean over classes of the share of the first of two outcomes."""
    pairs = drawn_RM.reshape(drawn_RM.shape[0], -1, 2)
    values: NDArray[np.float64] = (pairs[:, :, 0] / pairs.sum(axis=2)).mean(axis=1, keepdims=True)
    return values


def test_the_bootstrap_covers_the_true_macro_value_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(11)
    truth, sizes = np.array([0.9, 0.7, 0.5]), np.array([60, 40, 50])
    covered = 0
    for _ in range(300):
        right = random.binomial(sizes, truth)
        table = np.stack([right, sizes - right], axis=1).tolist()
        low, high = intervals.bootstrap(macro_of_pairs, *cells(table), random, resamples=400)
        covered += bool(low[0] <= truth.mean() <= high[0])
    assert 0.90 <= covered / 300 <= 0.98


def test_the_bootstrap_is_that_of_resampling_specimens_within_classes() -> None:
    counts = [[30, 8, 2], [9, 3, 0]]

    def share(drawn_RM: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.stack([drawn_RM[:, 1] / 40 + drawn_RM[:, 4] / 12, drawn_RM[:, 2] / 40], axis=1) / 2

    ends = intervals.bootstrap(share, *cells(counts), np.random.default_rng(0), resamples=4000)
    random = np.random.default_rng(1)
    specimens = [np.repeat([0, 1, 2], row) for row in counts]
    slow = []
    for _ in range(4000):
        drawn = [random.choice(outcomes, outcomes.size) for outcomes in specimens]
        slow.append([np.mean([(d == 1).mean() for d in drawn]), (drawn[0] == 2).mean() / 2])
    np.testing.assert_allclose(ends, np.quantile(slow, [0.025, 0.975], axis=0), atol=0.013)


def test_a_class_keeps_its_size_in_every_resample_and_no_new_outcome_appears() -> None:
    drawn = []

    def look(drawn_RM: NDArray[np.int64]) -> NDArray[np.float64]:
        drawn.append(drawn_RM.reshape(-1, 3, 3))
        return np.zeros((drawn_RM.shape[0], 1))

    counts = [[5, 0, 1], [0, 0, 0], [1, 1, 1]]
    intervals.bootstrap(look, *cells(counts), np.random.default_rng(0), resamples=50)
    everything = np.concatenate(drawn)
    assert (everything.sum(axis=2) == [6, 0, 3]).all()
    assert (everything[:, 0, 1] == 0).all()
    assert everything.std(axis=0)[2].min() > 0


def test_drawing_in_parts_bounds_the_memory_and_gives_as_many_resamples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = []

    def look(drawn_RM: NDArray[np.int64]) -> NDArray[np.float64]:
        parts.append(drawn_RM.shape[0])
        return macro_of_pairs(drawn_RM)

    monkeypatch.setattr(intervals, "_CELLS", 60)  # four cells and two classes: ten resamples at a time
    intervals.bootstrap(look, *cells([[3, 1], [2, 2]]), np.random.default_rng(0), resamples=25)
    assert parts == [10, 10, 5]


def test_the_same_seed_gives_the_same_interval() -> None:
    table = cells([[8, 2], [5, 5]])
    first, second = (intervals.bootstrap(macro_of_pairs, *table, np.random.default_rng(4)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


# -- whole samples


def ratio_slowly(parts_N: Floats, wholes_N: Floats, groups_N: NDArray[np.int64], number: int) -> Floats:
    random = np.random.default_rng(1)
    members = [np.flatnonzero(groups_N == group) for group in np.unique(groups_N)]
    made = []
    for _ in range(number):
        rows = np.concatenate([members[group] for group in random.integers(0, len(members), len(members))])
        made.append(parts_N[rows].sum() / wholes_N[rows].sum())
    ends: Floats = np.quantile(made, [0.025, 0.975])
    return ends


@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize("distinct", [2, 1000])  # values that differ: drawn by kind, or one by one
def test_ratios_of_sums_are_resampled_by_whole_groups_of_specimens(size: int, distinct: int) -> None:
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(180 // size), size)
    wholes = 1.0 + random.integers(0, distinct, groups.max() + 1)[groups] / distinct
    parts = wholes * (random.random(groups.max() + 1)[groups] < 0.3)
    both = intervals.bootstrap_ratio(
        np.stack([parts, 2 * parts], axis=1),
        np.stack([wholes, wholes], axis=1),
        np.random.default_rng(2),
        groups_N=groups if size > 1 else None,
        resamples=4000,
    )
    expected = ratio_slowly(parts, wholes, groups, 4000)
    np.testing.assert_allclose(np.transpose(both)[0], expected, atol=0.012)
    np.testing.assert_allclose(np.transpose(both)[1], np.transpose(both)[0] * 2, atol=1e-12)


def test_specimens_that_do_not_count_are_left_out_and_an_empty_column_has_no_interval() -> None:
    parts = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 0.0]] * 50)
    low, high = intervals.bootstrap_ratio(parts, parts > 0, np.random.default_rng(0))
    assert 1.7 < low[0] < 2 < high[0] < 2.3
    assert np.isnan([low[1], high[1]]).all()


def test_resamples_without_a_specimen_that_counts_are_left_out() -> None:
    # one of three counts: 8 of 27 resamples miss it, the others have the value 5
    parts = np.array([[5.0], [0.0], [0.0]])
    low, high = intervals.bootstrap_ratio(parts, parts > 0, np.random.default_rng(0))
    assert (low[0], high[0]) == (5, 5)


def test_equal_specimens_are_drawn_together_as_often_as_one_by_one() -> None:
    counts = np.array([900, 60, 40])
    for kinds in (counts, np.r_[counts, np.zeros(97, np.int64)]):  # by kind, one by one
        (drawn,) = intervals.draws(kinds, np.random.default_rng(0), 3000)
        assert (drawn.sum(axis=1) == 1000).all()
        np.testing.assert_allclose(drawn.mean(axis=0), kinds, rtol=0.02)
        np.testing.assert_allclose(drawn.var(axis=0), kinds * (1 - kinds / 1000), rtol=0.1)


def test_draws_come_in_parts_that_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_CELLS", 30)
    parts = intervals.draws(np.array([5, 5, 1]), np.random.default_rng(0), 25)
    assert [part.shape[0] for part in parts] == [10, 10, 5]


# -- the binomial tail


@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_the_binomial_tail_is_the_sum_of_its_terms(n: int) -> None:
    for k in range(n + 1):
        for p in (0.05, 0.5, 0.9):
            terms = [math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)]
            assert intervals.binomial_at_most(k, n, p) == pytest.approx(math.fsum(terms), rel=1e-12)


@settings(max_examples=80)
@given(st.integers(1, 10_000), st.floats(0, 1), st.floats(1e-6, 1 - 1e-6))
def test_the_binomial_tail_equals_scipys(n: int, share: float, p: float) -> None:
    k = int(share * n)
    assert intervals.binomial_at_most(k, n, p) == pytest.approx(binom.cdf(k, n, p), rel=1e-8, abs=1e-290)


def test_the_binomial_tail_does_not_vanish_where_single_terms_do() -> None:
    exact = sum(Fraction(math.comb(2000, i), 2**2000) for i in range(301))
    assert intervals.binomial_at_most(300, 2000, 0.5) == pytest.approx(float(exact), rel=1e-9)
    assert 0 < float(exact) < 1e-230


def test_the_binomial_tail_at_its_ends() -> None:
    assert intervals.binomial_at_most(-1, 5, 0.3) == 0
    assert intervals.binomial_at_most(5, 5, 0.3) == 1
    assert intervals.binomial_at_most(2, 5, 0.0) == 1
    assert intervals.binomial_at_most(2, 5, 1.0) == 0
    assert intervals.binomial_at_most(0, 0, 0.5) == 1
