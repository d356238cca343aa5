"""Paired comparisons against scipy, enumeration, resampling of single specimens, and by simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest, false_discovery_control

from bioscan.analysis import paired
from bioscan.analysis.paired import holm, mcnemar, paired_bootstrap

Floats = NDArray[np.float64]


def flags(text: str) -> NDArray[np.bool_]:
    return np.array([letter == "1" for letter in text])


# -- McNemar


def test_mcnemar_by_enumeration() -> None:
    # four differ, three of them for the first: as uneven or more in 10 of 16 ways (0, 1, 3 or 4 of 4)
    found = mcnemar(flags("11100110"), flags("00010110"))
    assert (found.only_a, found.only_b) == (3, 1)
    assert found.p == pytest.approx(10 / 16)


@settings(max_examples=60)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 30))
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int, same: int) -> None:
    right_a = np.repeat([True, False, True], [only_a, only_b, same])
    right_b = np.repeat([False, True, True], [only_a, only_b, same])
    found = mcnemar(right_a, right_b)
    assert found[:2] == (only_a, only_b)
    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert found.p == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_a_whole_test_part_keeps_its_tiny_p() -> None:
    right_a = np.repeat([True, False, True], [4000, 2500, 200_000])
    right_b = np.repeat([False, True, True], [4000, 2500, 200_000])
    p = mcnemar(right_a, right_b).p
    assert 0 < p < 1e-70
    assert p == pytest.approx(binomtest(4000, 6500, 0.5).pvalue, rel=1e-8)


def test_equally_good_models_are_told_apart_no_more_often_than_asked() -> None:
    random = np.random.default_rng(1)
    hard = random.random((2000, 200)) < 0.5
    p = [
        mcnemar(h | (a < 0.4), h | (b < 0.4)).p
        for h, a, b in zip(hard, *random.random((2, 2000, 200)), strict=True)
    ]
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * (0.05 * 0.95 / 2000) ** 0.5


# -- Holm


def test_holm_by_hand() -> None:
    # ascending 0.01·4, 0.02·3, 0.03·2 (raised to 0.06), 0.9
    assert holm([0.03, 0.9, 0.01, 0.02]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert holm([]) == []
    assert holm([0.6, 0.7]) == [1.0, 1.0]


@settings(max_examples=60)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_its_stepwise_rule_rejects_and_less_than_false_discovery_control(
    p_values: list[float],
) -> None:
    corrected = holm(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    going = True
    for step, i in enumerate(order):
        going = going and p_values[i] * (len(p_values) - step) <= 0.05
        assert (corrected[i] <= 0.05) == going
    assert all(h >= p for h, p in zip(corrected, p_values, strict=True))
    assert (np.array(corrected) >= false_discovery_control(p_values) - 1e-12).all()


# -- bootstrap


def test_the_differences_are_those_of_micro_and_macro_accuracy_by_hand() -> None:
    # class 0: 3 of 4 against 1 of 4; class 2: 0 of 1 against 1 of 1
    found = paired_bootstrap(
        flags("11100"), flags("10001"), np.array([0, 0, 0, 0, 2]), np.random.default_rng(0), resamples=50
    )
    assert found["micro"].value == pytest.approx((3 - 2) / 5)
    assert found["macro"].value == pytest.approx((2 / 4 - 1) / 2)


def slow(
    difference_N: Floats, classes_N: NDArray[np.int64], random: np.random.Generator, number: int
) -> Floats:
    """Specimens drawn one by one within each class; ends for micro and macro."""
    members = [np.flatnonzero(classes_N == c) for c in np.unique(classes_N)]
    made = []
    for _ in range(number):
        drawn = [difference_N[random.choice(rows, rows.size)] for rows in members]
        made.append([np.concatenate(drawn).mean(), np.mean([d.mean() for d in drawn])])
    ends: Floats = np.quantile(made, [0.025, 0.975], axis=0)
    return ends


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_intervals_are_those_of_drawing_specimens_within_classes(seeds: int) -> None:
    random = np.random.default_rng(3)
    classes = np.repeat([0, 2, 3], [80, 30, 10])  # a class without specimens counts nowhere
    right_a, right_b = (random.random((2, 120, seeds)) < np.array([0.8, 0.65])[:, None, None]).mean(axis=2)
    found = paired_bootstrap(right_a, right_b, classes, np.random.default_rng(0), resamples=4000)
    expected = slow(right_a - right_b, classes, np.random.default_rng(1), 4000)
    made = np.array([[value.low for value in found.values()], [value.high for value in found.values()]])
    np.testing.assert_allclose(made, expected, atol=0.013)


def test_pairing_makes_the_interval_narrower_than_two_models_apart() -> None:
    random = np.random.default_rng(8)
    easy = random.random(400) < 0.8
    right_a, right_b = easy | (random.random(400) < 0.1), easy | (random.random(400) < 0.05)
    classes = np.zeros(400, np.int64)
    both = paired_bootstrap(right_a, right_b, classes, random)["micro"]
    apart = [paired_bootstrap(r, np.zeros(400), classes, random)["micro"] for r in (right_a, right_b)]
    width = sum((one.high - one.low) ** 2 for one in apart) ** 0.5
    assert both.high - both.low < 0.6 * width


def test_whole_groups_are_drawn_where_groups_are_given() -> None:
    # each group is all right for one model: the specimens of a group say the same thing twenty times
    random = np.random.default_rng(5)
    groups = np.repeat(np.arange(40), 20)
    right_a = np.repeat(random.random(40) < 0.5, 20)
    classes = np.tile([0, 1], 400)
    found = paired_bootstrap(right_a, ~right_a, classes, random, groups_N=groups, resamples=4000)
    difference = np.where(right_a, 1.0, -1.0).reshape(40, 20).mean(axis=1)
    drawn = difference[random.integers(0, 40, (4000, 40))].mean(axis=1)
    expected = np.quantile(drawn, [0.025, 0.975])
    for value in found.values():  # both classes are alike in every group: macro is micro
        np.testing.assert_allclose([value.low, value.high], expected, atol=0.03)
    alone = paired_bootstrap(right_a, ~right_a, classes, random)["micro"]
    assert found["micro"].high - found["micro"].low > 3 * (alone.high - alone.low)


def test_macro_by_groups_is_the_mean_over_the_classes_drawn() -> None:
    # the last class lies in one group of nine alone: every third draw misses it
    random = np.random.default_rng(4)
    classes, groups = np.r_[random.integers(0, 2, 80), [2] * 10], np.r_[random.integers(0, 8, 80), [8] * 10]
    difference = random.choice([-1.0, 0.0, 1.0], 90, p=[0.2, 0.5, 0.3])
    slowly = []
    for _ in range(3000):
        rows = np.concatenate([np.flatnonzero(groups == group) for group in random.integers(0, 9, 9)])
        slowly.append(
            np.mean([difference[rows][classes[rows] == c].mean() for c in np.unique(classes[rows])])
        )
    found = paired_bootstrap(
        difference, np.zeros(90), classes, np.random.default_rng(0), groups_N=groups, resamples=4000
    )["macro"]
    assert (found.low, found.high) == pytest.approx(np.quantile(slowly, [0.025, 0.975]), abs=0.02)


def test_groups_in_small_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(2)
    right_a, right_b = random.random((2, 90)) < 0.6
    classes, groups = random.integers(0, 4, 90), random.integers(0, 30, 90)

    def made() -> dict[str, paired.Difference]:
        return paired_bootstrap(
            right_a, right_b, classes, np.random.default_rng(0), groups_N=groups, resamples=60
        )

    whole = made()
    monkeypatch.setattr(paired, "_CELLS", 200)
    assert made() == whole


def test_the_interval_holds_the_true_difference_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(9)
    classes = np.repeat([0, 1], [120, 60])
    covered = 0
    for _ in range(200):
        right_a = random.random(180) < np.where(classes == 0, 0.9, 0.6)
        right_b = random.random(180) < np.where(classes == 0, 0.8, 0.6)
        found = paired_bootstrap(right_a, right_b, classes, random, resamples=400)["macro"]
        covered += found.low <= 0.05 <= found.high
    assert 0.90 <= covered / 200 <= 0.985


def test_models_that_answer_alike_differ_by_nothing() -> None:
    right = flags("1101")
    found = paired_bootstrap(right, right, np.array([0, 0, 1, 1]), np.random.default_rng(0))
    assert {tuple(value) for value in found.values()} == {(0.0, 0.0, 0.0)}


def test_no_specimens_are_refused() -> None:
    none = np.empty(0)
    with pytest.raises(ValueError, match="no specimens to compare"):
        paired_bootstrap(none, none, none.astype(np.int64), np.random.default_rng(0))
