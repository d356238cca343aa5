"""Paths down the taxonomy against ancestor sets, walks in a tree, and thresholds tried one by one."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from bioscan.analysis import intervals
from bioscan.analysis.hierarchical_metrics import (
    METRICS,
    compare_paths,
    information,
    is_one_path,
    operating_curve,
    terms,
    values,
)

Codes = NDArray[np.int64]


def codes(*rows: str) -> Codes:
    """A row of names, a letter each, `-` for none: "AB-" is order A, family B, no genus."""
    return np.array([[-1 if letter == "-" else ord(letter) for letter in row] for row in rows])


tables = st.integers(1, 4).flatmap(
    lambda ranks: st.integers(1, 8).flatmap(
        lambda n: st.tuples(*[arrays(np.int64, (n, ranks), elements=st.integers(-1, 2)) for _ in range(2)])
    )
)
"""Truth and answers with gaps anywhere."""


# -- one specimen, by hand


@pytest.mark.parametrize(
    ("true", "named", "depth_true", "depth_named", "common", "parted"),
    [
        ("ABC", "ABC", 3, 3, 3, -1),
        ("ABC", "ABX", 3, 3, 2, 2),
        ("ABC", "AXC", 3, 3, 1, 1),  # the same name under another taxon is another taxon
        ("ABC", "XBC", 3, 3, 0, 0),
        ("ABC", "AB-", 3, 2, 2, -1),  # stops early: not wrong
        ("AB-", "ABC", 2, 2, 2, -1),  # deeper than the label: unknown, not wrong
        ("AB-", "AXC", 2, 2, 1, 1),
        ("A-C", "ABC", 2, 2, 2, -1),  # the truth has no family
        ("ABC", "A-C", 3, 2, 2, -1),  # the answer has none
        ("A-C", "XBC", 2, 2, 0, 0),
        ("ABC", "---", 3, 0, 0, -1),
        ("---", "ABC", 0, 0, 0, -1),
    ],
)
def test_only_ranks_that_the_truth_names_are_checked(
    true: str, named: str, depth_true: int, depth_named: int, common: int, parted: int
) -> None:
    paths = compare_paths(codes(true), codes(named))
    assert paths.depth_true_N.tolist() == [depth_true]
    assert paths.depth_named_N.tolist() == [depth_named]
    assert paths.common_N.tolist() == [common]
    assert paths.parted_N.tolist() == [parted]
    assert paths.depth_given_N.tolist() == [3 - named.count("-")]


def test_the_metrics_of_four_specimens_by_hand() -> None:
    paths = compare_paths(codes("ABC", "ABC", "AB-", "---"), codes("ABX", "A--", "ABX", "ABC"))
    assert values(paths) == pytest.approx(
        {
            "hierarchical_precision": 5 / 6,  # right 2 + 1 + 2, checked 3 + 1 + 2
            "hierarchical_recall": 5 / 8,  # true 3 + 3 + 2
            "hierarchical_f": 2 * 5 / 14,
            "tree_distance": (2 + 2 + 0) / 3,
            "lca_height": (1 + 2 + 0) / 3,
            "mistake_severity": 1.0,  # the first alone is wrong, at the last rank
            "correct_or_ancestor": 2 / 3,
            "exact": 1 / 3,
            "checked_depth": 6 / 3,
        },
        abs=1e-12,
    )
    assert {*terms(paths)} == {*METRICS}


def test_nothing_that_can_be_checked_has_no_value() -> None:
    assert all(math.isnan(value) for value in values(compare_paths(codes("---"), codes("ABC"))).values())
    empty = np.empty((0, 3), np.int64)
    assert all(math.isnan(value) for value in values(compare_paths(empty, empty)).values())


def test_without_errors_there_is_no_severity_of_mistakes() -> None:
    found = values(compare_paths(codes("ABC", "ABC"), codes("ABC", "AB-")))
    assert math.isnan(found["mistake_severity"])
    assert found["lca_height"] == 0.5


# -- second ways


def path_to(node: int, parents: list[int]) -> list[int]:
    """From the root down, the root left out."""
    path: list[int] = []
    while node > 0:
        path.insert(0, node)
        node = parents[node]
    return path


def test_whole_paths_give_what_ancestor_sets_and_walks_in_the_tree_give() -> None:
    random = np.random.default_rng(5)
    parents = [-1, *[int(random.integers(0, n)) for n in range(1, 60)]]  # a random tree; 0 is the root
    deepest = max(len(path_to(node, parents)) for node in range(60))
    true, named = random.integers(1, 60, 400), random.integers(0, 60, 400)
    sets, rows = [], []
    for t, p in zip(true, named, strict=True):
        true_path = path_to(int(t), parents)
        named_path = path_to(int(p), parents)[: len(true_path)]  # what can be checked
        sets.append(({*true_path}, {*named_path}))
        rows.append([path + [-1] * (deepest - len(path)) for path in (true_path, path_to(int(p), parents))])
    table = np.array(rows)
    paths = compare_paths(table[:, 0], table[:, 1])
    found = values(paths)
    shared = [len(t & p) for t, p in sets]
    assert found["hierarchical_precision"] == pytest.approx(sum(shared) / sum(len(p) for _, p in sets))
    assert found["hierarchical_recall"] == pytest.approx(sum(shared) / sum(len(t) for t, _ in sets))
    precision, recall = found["hierarchical_precision"], found["hierarchical_recall"]
    assert found["hierarchical_f"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert paths.distance_N.tolist() == [len(t ^ p) for t, p in sets]
    assert paths.height_N.tolist() == [len(t - p) for t, p in sets]
    assert found["correct_or_ancestor"] == pytest.approx(np.mean([p <= t for t, p in sets]))
    assert found["exact"] == pytest.approx(np.mean([p == t for t, p in sets]))
    wrong = [len(t - p) for t, p in sets if not p <= t]
    assert found["mistake_severity"] == pytest.approx(np.mean(wrong))


def walked(true: Codes, named: Codes) -> tuple[int, int, int]:
    """Checked, right, and the place of the first wrong name, rank by rank; -1 for none."""
    checked = right = 0
    parted = -1
    for rank, (t, p) in enumerate(zip(true, named, strict=True)):
        if t < 0 or p < 0:
            continue
        checked += 1
        if t != p and parted < 0:
            parted = rank
        right += parted < 0
    return checked, right, parted


@settings(max_examples=60)
@given(tables)
def test_paths_with_gaps_are_compared_as_if_walked_rank_by_rank(both: tuple[Codes, Codes]) -> None:
    paths = compare_paths(*both)
    expected = [walked(t, p) for t, p in zip(*both, strict=True)]
    found = zip(paths.depth_named_N, paths.common_N, paths.parted_N, strict=True)
    assert [tuple(map(int, row)) for row in found] == expected


@settings(max_examples=60)
@given(tables)
def test_names_below_the_label_change_no_metric(both: tuple[Codes, Codes]) -> None:
    true, named = both
    cut = np.where(true >= 0, named, -1)
    np.testing.assert_equal(values(compare_paths(true, cut)), values(compare_paths(true, named)))


@settings(max_examples=60)
@given(tables)
def test_renumbering_the_names_changes_nothing(both: tuple[Codes, Codes]) -> None:
    true, named = both
    other_true, other_named = (np.where(table >= 0, 7 - 2 * table, -1) for table in both)
    np.testing.assert_equal(
        values(compare_paths(other_true, other_named)), values(compare_paths(true, named))
    )


def test_intervals_of_all_metrics_come_from_their_terms() -> None:
    random = np.random.default_rng(2)
    true = random.integers(0, 3, (300, 3))
    named = np.where(random.random((300, 3)) < 0.8, true, random.integers(-1, 3, (300, 3)))
    found = values(compare_paths(true, named))
    pairs = terms(compare_paths(true, named)).values()
    parts, wholes = (np.stack([pair[side] for pair in pairs], axis=1) for side in (0, 1))
    low, high = intervals.bootstrap_ratio(parts, wholes, random)
    for value, lowest, highest in zip(found.values(), low, high, strict=True):
        assert lowest < value < highest


# -- one path


def test_an_answer_that_no_lineage_has_is_no_path() -> None:
    lineages = codes("ABC", "ABD", "EFG", "E-H")
    answers = ["ABC", "ABG", "AFG", "A--", "-BC", "EBC", "E-H", "EFH", "---"]
    expected = [True, False, False, True, True, False, True, False, True]
    assert is_one_path(codes(*answers), lineages).tolist() == expected


def test_a_name_that_no_lineage_has_says_nothing_about_the_path() -> None:
    lineages = codes("ABC", "EFG")
    assert is_one_path(codes("ABZ", "ZBC", "AZG", "ZZZ"), lineages).tolist() == [True, True, False, True]


def test_the_same_name_in_two_places_is_told_by_the_whole_path() -> None:
    lineages = codes("ABC", "EFC")  # genus C in two families
    assert is_one_path(codes("ABC", "EFC", "AFC", "--C"), lineages).tolist() == [True, True, False, True]


@settings(max_examples=60)
@given(tables)
def test_one_path_equals_looking_for_a_fitting_lineage(both: tuple[Codes, Codes]) -> None:
    answers, lineages = both
    expected = []
    for answer in answers:
        names = [(r, c) for r, c in enumerate(answer) if c >= 0 and c in lineages[:, r]]
        expected.append(any(all(lineage[r] == c for r, c in names) for lineage in lineages))
    assert is_one_path(answers, lineages).tolist() == expected


# -- information


def test_a_name_says_as_many_bits_as_it_halves_the_lineages() -> None:
    lineages = codes("ABC", "ABD", "AEF", "AEG")
    found = information(codes("ABC", "AZ-"), lineages)
    np.testing.assert_array_equal(found, [[0, 1, 2], [0, np.nan, np.nan]])


# -- operating curve


def emitted(probability: NDArray[np.float64], named: Codes, threshold: float) -> Codes:
    """The answer down to the last name before one that does not reach the threshold."""
    kept = np.full_like(named, -1)
    for rank, name in enumerate(named):
        if name >= 0:
            shown = 0.0 if np.isnan(probability[rank]) else probability[rank]
            if shown < threshold:
                break
            kept[rank] = name
    return kept


def slow_curve(
    probability: NDArray[np.float64], true: Codes, named: Codes, bits: NDArray[np.float64], threshold: float
) -> dict[str, Any]:
    rows = [row for row in range(len(true)) if (true[row] >= 0).any()]
    kept = np.array([emitted(probability[row], named[row], threshold) for row in rows]).reshape(
        -1, true.shape[1]
    )
    paths = compare_paths(true[rows], kept)
    found = values(paths)
    deepest = [max((r for r, name in enumerate(row) if name >= 0), default=-1) for row in kept]
    worth = 0.0
    for place, row in enumerate(rows):
        if not paths.is_wrong_N[place]:
            told = [bits[row, r] for r, name in enumerate(kept[place]) if name >= 0]
            worth += max((b for b in told if not np.isnan(b)), default=0.0)
    return {
        "error": 1 - found["correct_or_ancestor"],
        "correct_or_ancestor": found["correct_or_ancestor"],
        "hierarchical_precision": found["hierarchical_precision"],
        "hierarchical_recall": found["hierarchical_recall"],
        "checked_depth": found["checked_depth"],
        "given_depth": float(np.mean(paths.depth_given_N)),
        "deepest_TR": [deepest.count(rank) / len(rows) for rank in range(true.shape[1])],
        "information": worth / len(rows),
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_curve_equals_cutting_every_answer_at_every_threshold(seed: int) -> None:
    random = np.random.default_rng(seed)
    true = random.integers(-1, 3, (80, 4))
    named = np.where(random.random((80, 4)) < 0.6, np.maximum(true, 0), random.integers(-1, 3, (80, 4)))
    probability = random.random((80, 4)).round(1)  # ties, and deeper names that exceed those above
    probability[random.random((80, 4)) < 0.1] = np.nan
    bits = information(named, random.integers(0, 3, (12, 4)))
    tried = np.array([0, 0.05, 0.1, 0.3, 0.55, 0.9, 1.0, 1.1])
    curve = operating_curve(probability, true, named, thresholds=tried, bits_NR=bits)
    for place, threshold in enumerate(tried):
        for name, value in slow_curve(probability, true, named, bits, threshold).items():
            np.testing.assert_allclose(curve[name][place], value, atol=1e-12, err_msg=f"{name} {threshold}")


def test_threshold_0_is_the_whole_answer_and_above_1_nothing_is_named() -> None:
    random = np.random.default_rng(4)
    true, named = random.integers(0, 2, (50, 3)), random.integers(0, 2, (50, 3))
    curve = operating_curve(random.random((50, 3)), true, named, thresholds=np.array([0, 1.01]))
    found = values(compare_paths(true, named))
    assert curve["correct_or_ancestor"].tolist() == pytest.approx([found["correct_or_ancestor"], 1])
    assert curve["checked_depth"].tolist() == [3, 0]
    assert curve["deepest_TR"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert np.isnan(curve["hierarchical_precision"][1])


@settings(max_examples=60)
@given(tables, st.integers(0, 2**32 - 1))
def test_a_higher_threshold_never_makes_more_errors_or_says_more(
    both: tuple[Codes, Codes], seed: int
) -> None:
    probability = np.random.default_rng(seed).random(both[0].shape)
    curve = operating_curve(probability, *both)
    assert (np.diff(curve["threshold"]) > 0).all()
    for name in ("error", "checked_depth", "given_depth", "hierarchical_recall"):
        assert (np.diff(curve[name]) <= 1e-12).all()


def test_the_curve_of_many_specimens_has_few_points_and_keeps_both_ends() -> None:
    random = np.random.default_rng(6)
    probability = np.sort(random.random((5000, 3)), axis=1)[:, ::-1]
    true = random.integers(0, 2, (5000, 3))
    curve = operating_curve(probability, true, random.integers(0, 2, (5000, 3)), points=50)
    assert curve["threshold"].size == 51
    assert (curve["threshold"][0], curve["threshold"][-1]) == (0, probability.max())
    fallen = -np.diff(curve["given_depth"])
    assert fallen.max() <= 2 * 3 / 50  # about as many names fall away from point to point


def test_a_curve_without_specimens_that_can_be_checked_is_all_nothing() -> None:
    curve = operating_curve(np.ones((2, 2)), codes("--", "--"), codes("AB", "A-"))
    assert curve["threshold"].tolist() == [0]
    assert curve["error"].tolist() == [0]
    assert curve["deepest_TR"].tolist() == [[0, 0]]


def test_every_pair_of_short_paths_is_as_the_definitions_say() -> None:
    # all truths and answers of two ranks and two names: distance is a metric on what can be checked
    names = [np.array(pair) for pair in itertools.product((0, 1), repeat=2)]
    for a, b, c in itertools.product(names, repeat=3):
        distance = [
            int(compare_paths(x[None], y[None]).distance_N[0]) for x, y in ((a, b), (b, c), (a, c), (b, a))
        ]
        assert distance[2] <= distance[0] + distance[1]
        assert distance[3] == distance[0]
        assert (distance[0] == 0) == bool((a == b).all())
