"""Intervals against their definitions and by simulation."""

import numpy as np
import pytest
from numpy.typing import NDArray

from bioscan.analysis import intervals


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
