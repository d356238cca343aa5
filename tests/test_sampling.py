"""The order of an epoch, and the draws of each specimen."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from bioscan.learn.sampling import Sampler, draws, epoch_order, expected_counts, occurrences

SIZES = {4: 900, 7: 90, 2: 9, 30: 1}
"""Specimens of each class."""


def classes(seed: int = 0) -> NDArray[np.int64]:
    made = np.repeat(list(SIZES), list(SIZES.values()))
    return np.random.default_rng(seed).permutation(made)


def shares(sampler: Sampler, epochs: int) -> dict[int, float]:
    """Share of each class among what so many epochs see."""
    seen = np.concatenate(
        [classes()[epoch_order(sampler, classes(), seed=3, epoch=e)] for e in range(epochs)]
    )
    return {number: float(np.mean(seen == number)) for number in SIZES}


# -- order


def test_without_balancing_each_specimen_is_seen_once_in_another_order_each_epoch() -> None:
    first, second = (epoch_order("uniform", classes(), seed=1, epoch=epoch) for epoch in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(1000))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_the_order_follows_from_seed_and_epoch(sampler: Sampler) -> None:
    made = epoch_order(sampler, classes(), seed=1, epoch=2)
    assert made.dtype == np.int64
    assert np.array_equal(made, epoch_order(sampler, classes(), seed=1, epoch=2))
    for seed, epoch in ((1, 3), (2, 2), (2, 1)):
        assert not np.array_equal(made, epoch_order(sampler, classes(), seed=seed, epoch=epoch))


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_the_numbers_of_the_classes_do_not_matter(sampler: Sampler) -> None:
    made = epoch_order(sampler, classes(), seed=1, epoch=0, repeat_threshold=0.1)
    assert np.array_equal(
        made, epoch_order(sampler, classes() * 5 - 3, seed=1, epoch=0, repeat_threshold=0.1)
    )


def test_class_balanced_shows_each_class_equally_often() -> None:
    # 100 epochs of 1000: deviation sqrt(0.25 · 0.75 / 100,000) = 0.0014
    assert shares("class_balanced", 100) == pytest.approx(dict.fromkeys(SIZES, 0.25), abs=0.006)


def test_square_root_shows_each_class_by_the_root_of_its_size() -> None:
    # 30, 9.487, 3 and 1 of 43.487
    expected = {4: 0.6899, 7: 0.2182, 2: 0.0690, 30: 0.0230}
    assert shares("square_root", 100) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("sampler", ["class_balanced", "square_root"])
def test_with_replacement_specimens_of_a_class_are_equally_likely(sampler: Sampler) -> None:
    numbers = np.concatenate([epoch_order(sampler, classes(), seed=0, epoch=e) for e in range(200)])
    assert numbers.size == 200 * 1000
    for number in (4, 7, 2):
        counts = np.bincount(numbers, minlength=1000)[classes() == number]
        assert stats.chisquare(counts).pvalue > 1e-3


def test_repeat_factor_is_the_rule_of_lvis() -> None:
    # shares 0.9, 0.09, 0.009, 0.001 and threshold 0.1: max(1, sqrt(0.1 / share))
    factors = {4: 1.0, 7: 1.05409, 2: 3.33333, 30: 10.0}
    times = np.stack(
        [
            np.bincount(
                epoch_order("repeat_factor", classes(), seed=5, epoch=epoch, repeat_threshold=0.1),
                minlength=1000,
            )
            for epoch in range(300)
        ]
    )
    for number, factor in factors.items():
        of_class = times[:, classes() == number]
        assert set(np.unique(of_class)) <= {int(np.floor(factor)), int(np.ceil(factor))}
        assert of_class.mean() == pytest.approx(factor, abs=0.04)  # 9 · 300 of deviation 0.47: 0.009


def test_repeat_factor_with_nothing_rare_sees_each_once() -> None:
    made = epoch_order("repeat_factor", classes(), seed=1, epoch=0, repeat_threshold=1e-3)
    assert sorted(made.tolist()) == list(range(1000))


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_the_expected_counts_are_the_means_over_epochs(sampler: Sampler) -> None:
    counts = np.bincount(classes())  # classes without specimens among them
    epochs = 400
    orders = [epoch_order(sampler, classes(), seed=3, epoch=e, repeat_threshold=0.05) for e in range(epochs)]
    seen = np.bincount(classes()[np.concatenate(orders)]) / epochs
    expected = expected_counts(sampler, counts, repeat_threshold=0.05)
    assert expected == pytest.approx(seen, rel=0.03)
    assert (expected[counts == 0] == 0).all()
    assert expected_counts(sampler, np.zeros(3, np.int64)).tolist() == [0, 0, 0]


def test_repeated_specimens_are_spread_over_the_epoch() -> None:
    made = epoch_order("repeat_factor", classes(), seed=1, epoch=0, repeat_threshold=0.1)
    places = np.flatnonzero(classes()[made] == 30)
    assert places.size == 10
    assert np.diff(places).max() > 20


@given(st.lists(st.integers(0, 5), max_size=30))
def test_occurrences_count_what_came_before(numbers: list[int]) -> None:
    made = occurrences(np.array(numbers, np.int64))
    assert made.tolist() == [numbers[:at].count(number) for at, number in enumerate(numbers)]


# -- draws


def splitmix64(state: int, count: int) -> list[int]:
    """As its authors wrote it, with Python's whole numbers."""
    found = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(z ^ (z >> 31))
    return found


def nth(state: int, n: int) -> int:
    return splitmix64((state + n * 0x9E3779B97F4A7C15) % 2**64, 1)[0]


def of_many(
    count: int, *, seed: int = 1, epoch: int = 0, occurrence: int = 0, num_draws: int = 8
) -> NDArray[np.float32]:
    numbers = np.arange(count)
    return draws(seed, epoch, numbers, np.full(count, occurrence), num_draws=num_draws)


def test_draws_are_those_of_splitmix64_written_out() -> None:
    # the published first values for seed 1234567
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    key = int(np.random.SeedSequence((8, 3, 1)).generate_state(1, np.uint64)[0])
    made = draws(8, 3, np.array([0, 41, 1_128_312]), np.array([0, 2, 1]), num_draws=4)
    for row, number, occurrence in zip(made, (0, 41, 1_128_312), (0, 2, 1), strict=True):
        expected = [bits >> 40 for bits in splitmix64(nth(nth(key, number), occurrence), 4)]
        assert (row.astype(np.float64) * 2**24).tolist() == expected


@settings(max_examples=50)
@given(
    st.integers(0, 2**70),
    st.integers(0, 10_000),
    st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 50)), max_size=12),
    st.integers(1, 20),
)
def test_a_specimens_draws_are_the_same_in_any_batch(
    seed: int, epoch: int, keys: list[tuple[int, int]], num_draws: int
) -> None:
    numbers, occurrence = np.array(keys, np.int64).reshape(-1, 2).T
    whole = draws(seed, epoch, numbers, occurrence, num_draws=num_draws)
    assert whole.shape == (len(keys), num_draws)
    assert whole.dtype == np.float32
    assert bool(((whole >= 0) & (whole < 1)).all())
    for row, (number, times) in zip(whole, keys, strict=True):
        alone = draws(seed, epoch, np.array([number]), np.array([times]), num_draws=num_draws + 3)
        assert np.array_equal(alone[0, :num_draws], row)


def test_draws_are_uniform() -> None:
    values = of_many(50_000).astype(np.float64)
    for column in values.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert stats.kstest(values.ravel(), "uniform").pvalue > 1e-3
    # and so are the low bits, in which weak hashes show
    low = (values * 2**24).astype(np.int64) % 64
    assert stats.chisquare(np.bincount(low.ravel(), minlength=64)).pvalue > 1e-3


def test_draws_of_different_things_are_independent() -> None:
    n = 50_000
    base = of_many(n)
    others = {
        "next specimen": np.roll(base, 1, axis=0),
        "next draw": np.roll(base, 1, axis=1),
        "next epoch": of_many(n, epoch=1),
        "next seed": of_many(n, seed=2),
        "next occurrence": of_many(n, occurrence=1),
    }
    for name, other in others.items():
        r = [np.corrcoef(base[:, d], other[:, d])[0, 1] for d in range(base.shape[1])]
        assert np.abs(r).max() < 4.5 / np.sqrt(n), name  # 4.5 deviations
    # specimen 1 seen first is not specimen 0 seen again
    crossed = draws(1, 0, np.array([1, 0]), np.array([0, 1]), num_draws=n)
    assert abs(np.corrcoef(crossed[0], crossed[1])[0, 1]) < 4.5 / np.sqrt(n)
    # pairs of draws fill the square evenly
    cells = (base[:, 0] * 16).astype(int) * 16 + (base[:, 1] * 16).astype(int)
    assert stats.chisquare(np.bincount(cells, minlength=256)).pvalue > 1e-3


def test_draws_have_nothing_to_do_with_the_order() -> None:
    order = epoch_order("uniform", np.zeros(20_000, np.int64), seed=1, epoch=0)
    place = np.empty(20_000)
    place[order] = np.arange(20_000)
    r = [np.corrcoef(place, column)[0, 1] for column in of_many(20_000).T]
    assert np.abs(r).max() < 4.5 / np.sqrt(20_000)
